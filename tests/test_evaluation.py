"""Evaluation: an instance's tags and its rules give its violations."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

import tagcheck
from tagcheck import Instance, RequiredTag, Resolution, Target, ViolationType

PLACEHOLDERS = frozenset({"tbd", "n/a", "none"})
OWNER = RequiredTag("Owner")
ENVIRONMENT = RequiredTag("Environment", values=("dev", "test", "prod"))
COST_CENTER = RequiredTag("CostCenter", pattern=tagcheck.ValuePattern("CC-[0-9]{4}"))
BOTH = RequiredTag("Tier", values=("a1", "b2", "cc"), pattern=tagcheck.ValuePattern("[a-z][0-9]"))


@pytest.mark.parametrize(
    ("rule", "tags", "expected"),
    [
        pytest.param(OWNER, {"Owner": "alice"}, None, id="any value will do"),
        pytest.param(OWNER, {}, "missing", id="no tags at all"),
        pytest.param(OWNER, {"Owner": ""}, "empty", id="an emptied value is a violation"),
        pytest.param(OWNER, {"Owner": " \t"}, "empty", id="white space is no owner"),
        pytest.param(
            OWNER, {"Owner": "TBD\u200b\u3164"}, "empty", id="a placeholder with invisible characters"
        ),
        pytest.param(OWNER, {"Owner": "TBD"}, "empty", id="a placeholder counts as empty whatever its case"),
        pytest.param(OWNER, {"Owner": " n/a "}, "empty", id="a placeholder with spaces round it"),
        pytest.param(OWNER, {"Owner": "tbd-team"}, None, id="a placeholder is the whole value"),
        pytest.param(OWNER, {"Owner": "=1+1"}, None, id="a formula is a value like any other here"),
        pytest.param(ENVIRONMENT, {"Environment": "prod"}, None, id="one of the values"),
        pytest.param(
            ENVIRONMENT, {"Environment": "Prod"}, "noncompliant_value", id="values are case-sensitive"
        ),
        pytest.param(
            ENVIRONMENT, {"Environment": "prod "}, "noncompliant_value", id="a space is a difference"
        ),
        pytest.param(ENVIRONMENT, {"Environment": "production"}, "noncompliant_value", id="not a prefix"),
        pytest.param(COST_CENTER, {"CostCenter": "CC-1042"}, None, id="pattern"),
        pytest.param(COST_CENTER, {"CostCenter": "CC-10423"}, "noncompliant_value", id="to the value's end"),
        pytest.param(COST_CENTER, {"CostCenter": "xCC-1042"}, "noncompliant_value", id="from its beginning"),
        pytest.param(
            COST_CENTER, {"CostCenter": "CC-1042\n"}, "noncompliant_value", id="a last newline counts"
        ),
        pytest.param(BOTH, {"Tier": "a1"}, None, id="values and pattern"),
        pytest.param(BOTH, {"Tier": "cc"}, "noncompliant_value", id="in the list but not of the pattern"),
        pytest.param(BOTH, {"Tier": "z9"}, "noncompliant_value", id="of the pattern but not in the list"),
    ],
)
def test_check_tag(rule, tags, expected):
    violation = tagcheck.check_tag(tags, rule, PLACEHOLDERS)
    assert (violation and violation.type) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "\t\r\n",
            "\x00",
            "\x7f",
            "\x85",
            "\u00a0",
            "\u00ad",
            "\u2003",
            "\u2028",
            "\u2029",
            "\u3000",
        ),
        *("\u034f", "\u061c", "\u115f", "\u1160", "\u17b4", "\u180b", "\u180f", "\u200b", "\u202e", "\u2060"),
        *("\u2065", "\u2800", "\u3164", "\ufe00", "\ufe0f", "\ufeff", "\uffa0", "\ufff0", "\U00016fe4"),
        *("\U0001bca0", "\U0001d159", "\U0001d173", "\U000e0001", "\U000e0100", "\U000e01ef", "\U000e0fff"),
        " \u3164\u2800\ufe0f ",
    ],
    ids=ascii,
)
def test_value_that_nobody_can_see_is_empty_and_shown_escaped(text):
    violation = tagcheck.check_tag({"Owner": text}, OWNER, PLACEHOLDERS)
    assert violation.type == "empty"
    assert tagcheck.resolution([violation], {"Owner": f"{text}\u3164"}) == "policy_changed"
    shown = tagcheck.printable(text)
    assert shown.isascii() and shown.isprintable()
    assert "\\" in shown or not text.strip(" ")


@pytest.mark.parametrize(
    "text",
    ["a\u3164", "\u2764\ufe0f", "\U0001f469\u200d\U0001f4bb", "\u3042", "\U0001fae9", "\ue000", "\u0301"],
    ids=ascii,
)
def test_value_with_anything_to_see_is_not_empty(text):
    assert tagcheck.check_tag({"Owner": text}, OWNER, PLACEHOLDERS) is None


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        pytest.param({"owner": "x"}, "owner", id="case"),
        pytest.param({"Owner ": "x"}, "Owner ", id="space at the end"),
        pytest.param({"OW NER": "x"}, "OW NER", id="space within"),
        pytest.param({"_own-er": "x"}, "_own-er", id="underscore and hyphen"),
        pytest.param({"Owners": "x"}, None, id="another word"),
        pytest.param({"team:Owner": "x"}, None, id="a prefix"),
        pytest.param({"owner": "x", "OWNER": "y"}, "OWNER", id="of several always the same"),
    ],
)
def test_near_miss_is_missing_and_names_the_key(tags, found):
    violation = tagcheck.check_tag(tags, OWNER, PLACEHOLDERS)
    assert violation.type is ViolationType.MISSING
    assert violation.found_key == found
    assert violation.value == (tags[found] if found else None)
    assert (repr(found) in violation.message) == bool(found)


@pytest.mark.parametrize(("exact", "expected"), [("alice", None), ("", "empty"), ("tbd", "empty")])
def test_the_exact_key_wins_over_a_near_miss(exact, expected):
    violation = tagcheck.check_tag({"Owner": exact, "owner": "bob"}, OWNER, PLACEHOLDERS)
    assert (violation and violation.type) == expected


def test_violations_come_in_the_order_of_the_rules():
    policy = SimpleNamespace(
        rules=lambda region: (COST_CENTER, ENVIRONMENT, OWNER),
        placeholder_values=PLACEHOLDERS,
        owner_key="Owner",
        exemptions=(),
        grace_period=timedelta(0),
    )
    instance = Instance("i-00000001", "running", datetime(2026, 1, 1, tzinfo=UTC), {"Environment": "prd"})
    target, now = Target("111122223333", "us-east-1"), datetime(2026, 2, 1, tzinfo=UTC)
    found = tagcheck.judge(target, instance, policy, now).violations
    assert [violation.tag_key for violation in found] == ["CostCenter", "Environment", "Owner"]
    assert found[1].message == "Environment is 'prd', not one of dev, test, prod (did you mean 'prod'?)"


@pytest.mark.parametrize(
    ("age", "young"),
    [
        pytest.param(timedelta(hours=1), True, id="within"),
        pytest.param(timedelta(hours=2), False, id="over at the very end"),
        pytest.param(timedelta(hours=3), False, id="after"),
        pytest.param(timedelta(hours=-1), True, id="launched in the future by a clock that is behind"),
        pytest.param(timedelta(days=-2), False, id="launched in the future by no clock"),
    ],
)
def test_grace_period(age, young):
    now = datetime(2026, 11, 23, 12, tzinfo=UTC)
    instance = tagcheck.Instance("i-0", "running", now - age, {})
    assert tagcheck.is_too_young(instance, timedelta(hours=2), now) is young


def violation(kind, value=None):
    return tagcheck.Violation("Environment", ViolationType(kind), value, None, "")


@pytest.mark.parametrize(
    ("before", "tags", "expected"),
    [
        pytest.param(violation("missing"), None, "gone", id="no longer looked at"),
        pytest.param(violation("missing"), {"Environment": "prod"}, "tagged", id="tag added"),
        pytest.param(violation("missing"), {}, "policy_changed", id="still missing"),
        pytest.param(violation("missing"), {"Environment": ""}, "policy_changed", id="added but empty"),
        pytest.param(violation("empty", ""), {"Environment": "prod"}, "tagged", id="filled in"),
        pytest.param(
            violation("empty", "tbd"), {"Environment": "tbd"}, "policy_changed", id="still the placeholder"
        ),
        pytest.param(violation("empty", ""), {}, "policy_changed", id="now absent, and no longer asked for"),
        pytest.param(
            violation("noncompliant_value", "prd"), {"Environment": "prod"}, "tagged", id="corrected"
        ),
        pytest.param(
            violation("noncompliant_value", "prd"), {"Environment": "prd"}, "policy_changed", id="now allowed"
        ),
    ],
)
def test_resolution(before, tags, expected):
    assert tagcheck.resolution([before], tags) is Resolution(expected)


def test_one_tag_that_is_as_it_was_makes_it_the_policy():
    other = tagcheck.Violation("Owner", ViolationType.MISSING, None, None, "")
    assert (
        tagcheck.resolution([violation("missing"), other], {"Environment": "prod"})
        is Resolution.POLICY_CHANGED
    )


def coverage(**counts):
    return tagcheck.Coverage(tagcheck.Target("123456789012", "us-east-1"), **counts)


@pytest.mark.parametrize(
    ("targets", "fail_on", "expected"),
    [
        pytest.param([], "any", 0, id="nothing in scope"),
        pytest.param([coverage(instances=3)], "any", 0, id="clean"),
        pytest.param([coverage(findings=1, repeat=1)], "any", 3, id="any finding"),
        pytest.param([coverage(findings=1, repeat=1)], "new", 0, id="a repeat is not new"),
        pytest.param([coverage(findings=1, new=1)], "new", 3, id="new"),
        pytest.param([coverage(findings=1, reopened=1)], "new", 3, id="reopened counts as new"),
        pytest.param([coverage(findings=1, new=1)], "never", 0, id="never"),
        pytest.param(
            [coverage(findings=1, new=1), coverage(error_code="X")], "any", 4, id="unread outranks findings"
        ),
        pytest.param([coverage(error_code="X")], "never", 4, id="not even never makes unread clean"),
    ],
)
def test_exit_code(targets, fail_on, expected):
    assert tagcheck.decide_exit_code(targets, fail_on) == expected
