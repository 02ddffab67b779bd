"""Policy: a policy file becomes a Policy, or is refused with every mistake's place."""

import textwrap
from datetime import timedelta

import pytest

import tagcheck

HEAD = "version: 1\nname: test\n"


def load(text):
    return tagcheck.check_policy(textwrap.dedent(text).encode() if isinstance(text, str) else text, "p.yaml")


def problems(text):
    with pytest.raises(tagcheck.PolicyError) as caught:
        load(text)
    return str(caught.value).splitlines()


def keys(policy, region):
    return [rule.key for rule in policy.rules(region)]


def test_regions_inherit_replace_and_stand_alone():
    policy = load(
        HEAD
        + """\
required_tags: [Owner, {key: Stage, values: [a]}]
regions:
  us-east-1:
  eu-west-1: {required_tags: [Data, {key: Stage, values: [b]}]}
  ap-south-1: {inherit: false, required_tags: [Owner]}
  "*": {required_tags: [Rest]}
"""
    )
    assert keys(policy, "us-east-1") == ["Owner", "Stage"]
    assert keys(policy, "eu-west-1") == ["Owner", "Stage", "Data"]
    assert policy.rules("eu-west-1")[1].values == ("b",)
    assert keys(policy, "ap-south-1") == ["Owner"]
    assert keys(policy, "sa-east-1") == ["Owner", "Stage", "Rest"]


def test_without_a_star_other_regions_are_not_covered():
    policy = load(HEAD + "regions: {us-east-1: {required_tags: [Owner]}}")
    assert policy.covers("us-east-1")
    assert not policy.covers("us-east-2")


@pytest.mark.parametrize(
    "written",
    [
        "NO",
        "on",
        "0123",
        "1_000",
        "0x1F",
        "12:30:45",
        "2027-01-31",
        "2024-13-45",
        "1.10",
        ".inf",
        "012345670123",
        "=",
    ],
)
def test_scalars_are_the_text_as_it_was_written(written):
    policy = load(
        HEAD + f"regions: {{us-east-1: {{required_tags: [{{key: {written}, values: [{written}]}}]}}}}"
    )
    (rule,) = policy.rules("us-east-1")
    assert (rule.key, rule.values) == (written, (written,))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("\ufeff{}", id="byte order mark"),
        pytest.param("{}", id="plain"),
        pytest.param("# comment\n{}# last\n", id="comments"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_encodings(text, encoding):
    body = HEAD + "regions: {us-east-1: {required_tags: [Größe]}}\n"
    assert keys(load(text.format(body).encode(encoding)), "us-east-1") == ["Größe"]


def test_windows_line_ends():
    assert load(
        (HEAD + "regions:\n  us-east-1:\n    required_tags: [Owner]\n").replace("\n", "\r\n").encode()
    )


def test_anchors_and_merges():
    policy = load(
        HEAD
        + """\
regions:
  us-east-1: &base
    required_tags: &tags [Owner]
  eu-west-1: *base
  eu-west-2: {<<: *base, inherit: false}
  eu-west-3: {required_tags: *tags}
"""
    )
    assert all(keys(policy, region) == ["Owner"] for region in policy.regions)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("90s", timedelta(seconds=90)),
        ("30m", timedelta(minutes=30)),
        ("2h", timedelta(hours=2)),
        ("1d", timedelta(1)),
    ],
)
def test_grace_period(written, expected):
    policy = load(HEAD + f"grace_period: {written}\nregions: {{us-east-1: {{required_tags: [A]}}}}")
    assert policy.grace_period == expected


def test_defaults():
    policy = load(HEAD + "regions: {us-east-1: {required_tags: [A]}}")
    assert policy.states == {"pending", "running", "stopping", "stopped"}
    assert policy.grace_period == timedelta(0)
    assert policy.placeholder_values == frozenset()


BODY = HEAD + "regions: {us-east-1: {required_tags: [Owner]}}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", "p.yaml:1:1: must be a mapping (key: value), not nothing", id="empty"),
        pytest.param(
            "# only\n", "p.yaml:1:1: must be a mapping (key: value), not nothing", id="comments alone"
        ),
        pytest.param(
            "- a\n", "p.yaml:1:1: must be a mapping (key: value), not a list", id="a list at the top"
        ),
        pytest.param(
            BODY + "name: x\n", "p.yaml:4:1: 'name' appears twice (first in line 2)", id="duplicate key"
        ),
        pytest.param(
            BODY + "stats: []\n", "p.yaml:4:1: unknown key 'stats' (did you mean 'states'?)", id="unknown"
        ),
        pytest.param(
            HEAD + "regions: {us-esat-1: {required_tags: [A]}}",
            "p.yaml:3:11: regions: AWS has no region 'us-esat-1' (did you mean 'us-east-1'?)",
            id="a region that AWS does not have",
        ),
        pytest.param(
            HEAD + "regions: {us-east-1: }",
            "p.yaml:3:11: regions: us-east-1 requires no tags",
            id="nothing asked for",
        ),
        pytest.param(
            BODY + "required_tags: [A, A]",
            "p.yaml:4:20: required_tags[1]: 'A' is required twice",
            id="twice",
        ),
        pytest.param(
            BODY + "required_tags: ['AWS:x']",
            "p.yaml:4:17: required_tags[0]: 'AWS:x': keys that begin with aws:",
            id="reserved",
        ),
        pytest.param(
            BODY + "required_tags: [{key: A, pattern: '('}]",
            "p.yaml:4:35: required_tags[0].pattern: '(' is not a regular expression",
            id="pattern that does not compile",
        ),
        pytest.param(
            BODY + "grace_period: 2 hours",
            "p.yaml:4:15: grace_period: '2 hours' is not a duration",
            id="duration",
        ),
        pytest.param(
            BODY + "states: [run]", "p.yaml:4:10: states[0]: 'run' is not one of pending", id="state"
        ),
        pytest.param(
            BODY + "required_tags: [true]",
            "p.yaml:4:17: required_tags[0]: must be text or a mapping (key: value), not true",
            id="true is no text",
        ),
        pytest.param(BODY + "a: b: c", "p.yaml:4:5: a text with ': ' in it needs quotes", id="no YAML"),
        pytest.param(
            BODY + "x: *y", "p.yaml:4:4: a text that begins with * needs", id="an alias without an anchor"
        ),
        pytest.param(BODY + "---\na: 1", "p.yaml:4:1: a second document begins here", id="two documents"),
        pytest.param(
            BODY + "x: !!python/name:os.system ''", "p.yaml:4:4: x: tag:yaml.org,2002:python", id="python"
        ),
        pytest.param(HEAD.encode() + b"x: \xe9", "p.yaml:3:4: not UTF-8 (byte 0xE9)", id="Latin-1"),
        pytest.param(
            HEAD + "x: \a", "p.yaml:3:4: the character U+0007 is not allowed", id="control character"
        ),
        pytest.param("&a [*a]", "p.yaml:1:1: the nesting or the aliases", id="an alias of itself"),
        pytest.param("[" * 5000, "p.yaml:1:", id="5,000 levels"),
        pytest.param(b" " * 1_000_001, "p.yaml:1:1: larger than 1,000,000 bytes", id="too large"),
        pytest.param(b"\x7fELF\x02\x01\x01\x00", "p.yaml:1:1: the character U+007F", id="binary"),
    ],
)
def test_mistakes_have_a_place_and_a_reason(text, expected):
    assert any(problem.startswith(expected) for problem in problems(text)), problems(text)


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file():
    found = problems("version: 2\nregions:\n  us-esat-1: {inherit: maybe}\nfoo: 1\n")
    assert [problem.split(": ")[0] for problem in found] == [
        "p.yaml:1:1",
        "p.yaml:1:10",
        "p.yaml:3:3",
        "p.yaml:3:24",
        "p.yaml:4:1",
    ]


def test_an_alias_bomb_costs_nothing():
    levels = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 20))
    assert "aliases" in problems("b0: &b0 [x]\n" + levels)[0]


def test_a_hostile_key_is_short_and_printable_in_a_message():
    (problem,) = problems(BODY + '"\\e[31m' + "x" * 5000 + '": 1')
    assert len(problem) < 300
    assert "\x1b" not in problem


def test_a_region_younger_than_this_file_is_known_from_botocore(monkeypatch):
    monkeypatch.setattr(tagcheck, "AWS_REGIONS", frozenset())
    assert tagcheck.is_region("eu-west-1")
    assert not tagcheck.is_region("eu-west-99")


def test_a_policy_that_is_not_there(tagcheck):
    result = tagcheck("scan", "--policy", "none.yaml", check=2)
    assert "cannot read the policy none.yaml: No such file or directory" in result.err
