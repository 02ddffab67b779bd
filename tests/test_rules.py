"""The rule language from end to end: what each key of a rule asks for, alone and together with the others."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from builders import ACCOUNT, REGION, reservation, save_fleet, save_policy
from builders import instance_id as ident
from conftest import Result, run_tagcheck

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
Scan = Callable[..., dict[str, Any]]


@pytest.fixture
def scan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scan:
    """Scan saved instances under rules, and return the JSON report."""
    monkeypatch.chdir(tmp_path)

    def run(rules: list[Any], *fleet: Any, now: datetime = NOW, **keys: Any) -> dict[str, Any]:
        save_policy(tmp_path, required_tags=rules, **keys)
        instances = [item if isinstance(item, dict) and "OwnerId" in item else None for item in fleet]
        reservations = [
            whole or reservation(number, tags)
            for number, (whole, tags) in enumerate(zip(instances, fleet, strict=True), 1)
        ]
        save_fleet(tmp_path, *reservations)
        result = command("scan", "--instances", "fleet.json", "--json", "out.json", now=now)
        report: dict[str, Any] = json.loads(Path("out.json").read_text())
        assert result.code == (3 if report["findings"] else 0)
        return report

    return run


def command(name: str, *args: str, now: datetime = NOW) -> Result:
    return run_tagcheck(name, "--policy", "policy.yaml", *args, cwd=Path.cwd(), now=now)


def violations(report: Mapping[str, Any]) -> dict[int, list[tuple[str, str]]]:
    """Return the violations of each instance, by its number."""
    return {
        int(finding["instance_id"][2:], 16): [(v["tag_key"], v["type"]) for v in finding["violations"]]
        for finding in report["findings"]
    }


MISSING, EMPTY, WRONG = "missing", "empty", "noncompliant_value"


@pytest.mark.parametrize(
    ("rule", "tags", "expected"),
    [
        # aliases: met by any of the keys; the first that has a value counts, the rule's own first.
        ({"aliases": ["b", "c"]}, {"A": "x"}, None),
        ({"aliases": ["b", "c"]}, {"c": "x"}, None),
        ({"aliases": ["b", "c"]}, {"A": "", "b": " ", "c": "x"}, None),
        ({"aliases": ["b", "c"]}, {}, MISSING),
        ({"aliases": ["b", "c"]}, {"A": ""}, EMPTY),
        ({"aliases": ["b", "c"]}, {"c": "tbd"}, EMPTY),
        ({"aliases": ["b", "c"]}, {"C": "x"}, MISSING),
        ({"aliases": ["b", "c"], "values": ["x"]}, {"A": "y", "b": "x"}, WRONG),
        ({"aliases": ["b", "c"], "values": ["x"]}, {"A": "TBD", "b": "x", "c": "y"}, None),
        ({"aliases": ["b", "c"], "values": ["x"]}, {"b": "y", "c": "x"}, WRONG),
        # ignore_case: for values and pattern.
        ({"values": ["Dev", "prod"], "ignore_case": True}, {"A": "dEV"}, None),
        ({"values": ["STRASSE"], "ignore_case": True}, {"A": "straße"}, None),
        ({"values": ["Dev", "prod"], "ignore_case": True}, {"A": "de"}, WRONG),
        ({"values": ["Dev"]}, {"A": "dev"}, WRONG),
        ({"values": ["Dev"], "ignore_case": False}, {"A": "dev"}, WRONG),
        ({"pattern": "cc-[0-9]+", "ignore_case": True}, {"A": "CC-1"}, None),
        ({"pattern": "(?s)cc.[0-9]+", "ignore_case": True}, {"A": "CC\n1"}, None),
        ({"pattern": "(cc|dd)+-(?=1)[0-9]+", "ignore_case": True}, {"A": "CCdd-1"}, None),
        ({"pattern": "cc-[0-9]+"}, {"A": "CC-1"}, WRONG),
        # allow_empty: what counts as empty is allowed.
        ({"allow_empty": True}, {"A": ""}, None),
        ({"allow_empty": True}, {"A": "tbd"}, None),
        ({"allow_empty": True}, {}, MISSING),
        ({"allow_empty": True}, {"a": "x"}, MISSING),
        ({"allow_empty": True, "values": ["x"]}, {"A": " "}, None),
        ({"allow_empty": True, "values": ["x"]}, {"A": "y"}, WRONG),
        ({"allow_empty": True, "pattern": "[0-9]+"}, {"A": ""}, None),
        ({"allow_empty": True, "aliases": ["b"]}, {"b": ""}, None),
        # optional: checked where the tag is present; a key in another case is the same tag, spelled wrong.
        ({"optional": True}, {}, None),
        ({"optional": True}, {"A": "x"}, None),
        ({"optional": True}, {"A": ""}, EMPTY),
        ({"optional": True}, {"a": "x"}, MISSING),
        ({"optional": True, "key": "Cost-Center"}, {"CostCenter": "x"}, None),
        ({"optional": True, "values": ["x"]}, {"A": "y"}, WRONG),
        ({"optional": True, "aliases": ["b"]}, {"b": "x"}, None),
        ({"optional": True, "aliases": ["b"], "values": ["x"]}, {"b": "y"}, WRONG),
        ({"optional": True, "allow_empty": True}, {"A": ""}, None),
        ({"optional": True, "allow_empty": True}, {"a": ""}, MISSING),
        ({"optional": True, "allow_empty": True, "values": ["x"]}, {"A": ""}, None),
        # when: for instances that match.
        ({"when": {"tags": {"E": "prod"}}}, {"E": "prod"}, MISSING),
        ({"when": {"tags": {"E": "prod"}}}, {"E": "PROD"}, None),
        ({"when": {"tags": {"E": "prod"}}}, {"e": "prod"}, None),
        ({"when": {"tags": {"E": "prod"}}}, {}, None),
        ({"when": {"tags": {"E": ["prod", "st*"]}}}, {"E": "stage"}, MISSING),
        ({"when": {"tags": {"E": ["prod", "st*"]}}}, {"E": "dev"}, None),
        ({"when": {"tags": {"E": "*"}}}, {"E": "x"}, MISSING),
        ({"when": {"tags": {"E": "*"}}}, {"E": ""}, None),
        ({"when": {"tags": {"E": "*"}}}, {"E": " \u200b"}, None),
        ({"when": {"tags": {"E": "t*"}}}, {"E": "tbd"}, None),
        ({"when": {"tags": {"E": ""}}}, {"E": ""}, MISSING),
        ({"when": {"tags": {"E": ["x", ""]}}}, {"E": "TBD "}, MISSING),
        ({"when": {"tags": {"E": ["", "*"]}}}, {"E": "x"}, MISSING),
        ({"when": {"tags": {"E": ["", "*"]}}}, {}, None),
        ({"when": {"tags": {"E": ""}}}, {"E": "x"}, None),
        ({"when": {"tags": {"E": "tbd"}}}, {"E": "tbd"}, MISSING),
        ({"when": {"tags": {"E": "prod", "F": "x"}}}, {"E": "prod"}, None),
        ({"when": {"tags": {"E": "prod"}}, "optional": True}, {"E": "prod"}, None),
        (
            {"when": {"tags": {"E": "prod"}}, "optional": True, "values": ["x"]},
            {"E": "prod", "A": "y"},
            WRONG,
        ),
        ({"when": {"tags": {"E": "prod"}}, "values": ["x"]}, {"E": "dev", "A": "y"}, None),
        ({"when": {"instances": [ident(1)]}}, {}, MISSING),
        ({"when": {"instances": [ident(2)]}}, {}, None),
        ({"when": {"accounts": [ACCOUNT]}}, {}, MISSING),
        ({"when": {"accounts": ["000000000001"]}}, {}, None),
        ({"when": {"regions": [REGION]}}, {}, MISSING),
        ({"when": {"regions": ["eu-west-1"], "accounts": [ACCOUNT]}}, {}, None),
    ],
)
def test_rule(scan: Scan, rule: dict[str, Any], tags: dict[str, str], expected: str | None) -> None:
    report = scan([{"key": "A"} | rule], tags, placeholder_values=["tbd"])
    key = rule.get("key", "A")
    assert violations(report) == ({1: [(key, expected)]} if expected else {})


@pytest.mark.parametrize(
    ("wanted", "fails", "exactly"),
    [
        ("prod", {1, 2}, {1}),
        (["x", "PR*"], {1, 2}, {2}),
        ("straße", {4}, set()),
        ("tbd", set(), set()),
        ("*", {1, 2, 4}, {1, 2, 4}),
    ],
)
def test_case_matters_in_a_condition_as_in_the_rule_for_that_tag(
    scan: Scan, wanted: str | list[str], fails: set[int], exactly: set[int]
) -> None:
    env = {"key": "Env", "values": ["prod", "strasse"], "ignore_case": True, "allow_empty": True}
    keys = {"placeholder_values": ["tbd"], "regions": {REGION: {"required_tags": [env]}}}
    fleet = [{"Env": value, "Stage": value} for value in ("prod", "PROD", "TBD", "STRASSE")]
    for key, expected in (("Env", fails), ("Stage", exactly)):
        rule = {"key": "A", "when": {"tags": {key: wanted}}}
        assert set(violations(scan([rule], *fleet, **keys))) == expected
        exemption = {"reason": "r", "tags": {key: "prod"}, "required_tags": ["A"]}
        exempted = scan(["A"], *fleet, **keys, exemptions=[exemption])["exempted"]
        assert len(exempted) == (2 if key == "Env" else 1)


@pytest.mark.parametrize(
    ("when", "fails"),
    [
        ({"instance_types": ["t3.*"]}, {1}),
        ({"instance_types": ["t3.micro", "m5.?arge"]}, {1, 2}),
        ({"instance_types": ["*.micro"]}, {1}),
        ({"instance_types": ["t3"]}, set()),
        ({"managed_by": "eks.amazonaws.com"}, {2}),
        ({"managed_by": ["*"]}, {2, 3}),
        ({"managed_by": ["ecs*", "eks*"], "instance_types": ["m5.large"]}, {2}),
    ],
)
def test_when_by_what_an_instance_is(scan: Scan, when: dict[str, Any], fails: set[int]) -> None:
    managed = {"Managed": True, "Principal": "eks.amazonaws.com"}
    fleet = (
        reservation(1, {}, InstanceType="t3.micro"),
        reservation(2, {}, InstanceType="m5.large", Operator=managed),
        reservation(3, {}, Operator=managed | {"Principal": "ecs.amazonaws.com"}),
    )
    assert set(violations(scan([{"key": "A", "when": when}], *fleet))) == fails


def test_alias_with_a_wrong_value_is_named(scan: Scan) -> None:
    rule = {"key": "CostCenter", "aliases": ["cost-center"], "pattern": "CC-[0-9]+"}
    [finding] = scan([rule], {"cost-center": "cc-7"})["findings"]
    assert finding["violations"] == [
        {
            "tag_key": "CostCenter",
            "type": WRONG,
            "value": "cc-7",
            "found_key": "cost-center",
            "message": "CostCenter (here cost-center) is 'cc-7', not a match of CC-[0-9]+",
        }
    ]
    assert finding["suggestions"] == []
    [finding] = scan([rule], {"cost-center": "cc-7"}, normalize_aliases=True)["findings"]
    assert [each["value"] for each in finding["suggestions"]] == ["CC-7"]


def planned() -> list[tuple[str, str, str, str]]:
    rows = csv.DictReader(io.StringIO(command("remediate", "--csv", "-").out))
    return [(row["InstanceId"], row["Tag"], row["Value"], row["Why"]) for row in rows if row["InstanceId"]]


def test_normalize_aliases_plans_the_rules_own_key(scan: Scan) -> None:
    rules = [{"key": "CostCenter", "aliases": ["cost-center", "Billing"], "pattern": "CC-[0-9]+"}]
    fleet = ({"cost-center": "CC-7"}, {"CostCenter": "CC-1"}, {"CostCenter": "", "Billing": "CC-9"}, {})
    assert set(violations(scan(rules, *fleet))) == {4}
    assert planned() == []
    assert set(violations(scan(rules, *fleet, normalize_aliases=True))) == {4}
    assert planned() == [
        (ident(1), "CostCenter", "CC-7", "it has cost-center=CC-7"),
        (ident(3), "CostCenter", "CC-9", "it has Billing=CC-9"),
    ]
    # The policy that is used last decides, and so does the latest scan.
    save_policy(Path(), required_tags=rules)
    assert planned() == []
    scan(rules, *fleet[1:3], {"cost-center": "x"}, normalize_aliases=True)
    assert planned() == [(ident(2), "CostCenter", "CC-9", "it has Billing=CC-9")]


# ---- A rule that is announced ------------------------------------------------------------------------------

TEAM, TEAM_DAY = {"key": "Team", "effective_from": "2026-12-01"}, datetime(2026, 12, 1, tzinfo=UTC)


def test_upcoming_rule_is_counted_and_makes_findings_from_its_day_on(scan: Scan) -> None:
    fleet = ({"Owner": "a"}, {"Owner": "a", "Team": "x"}, {"Owner": "a", "Team": ""})
    before = scan(["Owner", TEAM], *fleet, now=datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC))
    assert before["findings"] == []
    assert before["summary"]["compliant"] == 3
    assert before["upcoming"] == [{"tag_key": "Team", "effective_from": "2026-12-01", "instances": 2}]
    result = command("scan", "--instances", "fleet.json")
    assert "\nTeam from 2026-12-01: 2 instances would fail\n" in result.out
    page = command("report", "--html", "-").out
    cells = re.sub("<[^>]*>", " ", page.partition("Upcoming rules")[2]).split()
    assert "2026-12-01 Team 2" in " ".join(cells)
    on_the_day = scan(["Owner", TEAM], *fleet, now=TEAM_DAY)
    assert {finding["status"] for finding in on_the_day["findings"]} == {"NEW"}
    assert violations(on_the_day) == {1: [("Team", MISSING)], 3: [("Team", EMPTY)]}
    assert on_the_day["upcoming"] == []


def test_upcoming_rule_counts_neither_the_exempted_nor_the_young(scan: Scan) -> None:
    old, young = reservation(1, {"Skip": "1"}), reservation(2, {}, launched=NOW)
    exemptions = [{"reason": "r", "tags": {"Skip": "1"}, "required_tags": ["Team"]}]
    report = scan([TEAM], old, young, reservation(3, {}), grace_period="1d", exemptions=exemptions)
    assert [rule["instances"] for rule in report["upcoming"]] == [1]
    assert report["exempted"] == []
    assert report["summary"]["compliant"] == 3


def test_exemption_from_an_upcoming_rule_is_told_and_is_not_useless(scan: Scan) -> None:
    exemption = {"reason": "legacy", "tags": {"Skip": "1"}, "required_tags": ["Team"]}
    report = scan(["Owner", TEAM], {"Skip": "1", "Owner": "a"}, exemptions=[exemption])
    assert (report["upcoming"], report["exempted"], report["summary"]["compliant"]) == ([], [], 1)
    assert not [notice for notice in report["notices"] if "exempted nothing" in notice]
    explained = command("explain", "--instances", "fleet.json", ident(1)).lines
    assert explained[2] == "  EXEMPTED  Team is missing: exempted, legacy (policy.yaml:1)"
    on_the_day = scan(["Owner", TEAM], {"Skip": "1", "Owner": "a"}, now=TEAM_DAY, exemptions=[exemption])
    assert [entry["violations"][0]["reason"] for entry in on_the_day["exempted"]] == ["legacy"]
    assert on_the_day["findings"] == []


@pytest.mark.parametrize(("expires", "fails"), [("2026-11-30", True), ("2026-12-01", False)])
def test_exemption_that_ends_before_a_rule_counts_is_none_from_it(
    scan: Scan, expires: str, fails: bool
) -> None:
    report = scan([TEAM], {}, exemptions=[{"reason": "r", "regions": [REGION], "expires": expires}])
    assert [rule["instances"] for rule in report["upcoming"]] == [1] * fails
    assert sum("exempted nothing" in notice for notice in report["notices"]) == fails
    explained = command("explain", "--instances", "fleet.json", ident(1)).out
    assert ("WILL FAIL Team is missing" in explained) == fails


def test_upcoming_counts_are_those_of_the_targets_that_were_read(scan: Scan) -> None:
    scan([TEAM], {}, {})
    [rule] = scan([TEAM], {})["upcoming"]
    assert rule["instances"] == 1


# ---- Why a finding ended -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "before", "after", "why"),
    [
        ({"aliases": ["b"]}, {}, {"b": "x"}, "tagged"),
        ({"when": {"tags": {"E": "prod"}}}, {"E": "prod"}, {"E": "dev"}, "tagged"),
        ({"optional": True, "values": ["x"]}, {"A": "y"}, {}, "tagged"),
        ({"optional": True}, {"a": "y"}, {}, "tagged"),
        ({"allow_empty": True, "values": ["x"]}, {"A": "y"}, {"A": ""}, "tagged"),
    ],
)
def test_tags_that_end_a_finding(
    scan: Scan, rule: dict[str, Any], before: dict[str, str], after: dict[str, str], why: str
) -> None:
    assert scan([{"key": "A"} | rule], before)["findings"]
    [ended] = scan([{"key": "A"} | rule], after)["resolved"]
    assert ended["resolution"] == why


@pytest.mark.parametrize(
    "rule",
    [
        {"aliases": ["b"]},
        {"when": {"tags": {"E": "prod"}}},
        {"optional": True},
        {"allow_empty": True},
        {"effective_from": "2027-01-01"},
    ],
)
def test_policy_that_ends_a_finding(scan: Scan, rule: dict[str, Any]) -> None:
    tags = {"b": "x", "E": "dev"} | ({"A": ""} if "allow_empty" in rule else {})
    assert scan(["A"], tags)["findings"]
    [ended] = scan([{"key": "A"} | rule], tags)["resolved"]
    assert ended["resolution"] == "policy_changed"


# ---- explain -----------------------------------------------------------------------------------------------


def test_explain_says_of_each_rule_why_it_applies_or_not(scan: Scan) -> None:
    Path("policy.yaml").write_text(
        """version: 1
name: test
required_tags:
  - key: Backup
    when:
      tags: {Environment: prod}
  - key: Owner
    aliases: [owner]
  - key: Class
    optional: true
  - key: Team
    effective_from: 2027-02-01
regions: {us-east-1: }
"""
    )
    save_fleet(Path(), reservation(1, {"Environment": "dev", "owner": "ann"}))
    lines = command("explain", "--instances", "fleet.json", ident(1)).out.splitlines()
    assert lines[1:5] == [
        "  skipped   Backup: not asked, Environment is 'dev' (policy.yaml:4, when in line 6)",
        "  passes    owner is 'ann', an alias of Owner (policy.yaml:7)",
        "  passes    Class: not asked, it is missing and optional (policy.yaml:9)",
        "  WILL FAIL Team is missing, from 2027-02-01 on (policy.yaml:11)",
    ]
    rules = command("explain", "--region", REGION).out.splitlines()
    assert rules[1:5] == [
        "  Backup: any value but an empty one, only for Environment=prod (policy.yaml:4, when in line 6)",
        "  Owner: any value but an empty one, also as owner (policy.yaml:7)",
        "  Class: any value but an empty one, only where the tag is present (policy.yaml:9)",
        "  Team: any value but an empty one, from 2027-02-01 on (policy.yaml:11)",
    ]


def test_siblings_suggest_no_value_that_a_rule_does_not_allow(scan: Scan) -> None:
    asg = {"aws:autoscaling:groupName": "web"}
    rule = {"key": "A", "values": ["x"], "when": {"tags": {"E": "prod"}}, "allow_empty": True}
    fleet = [{**asg, "E": "dev", "A": value} for value in ("bad", "bad", "bad", "", "", "")]
    [finding] = scan([rule], *fleet, {**asg, "E": "prod"})["findings"]
    assert finding["suggestions"] == []
    fleet = [{**asg, "E": "dev", "A": "x"}] * 6
    [finding] = scan([rule], *fleet, {**asg, "E": "prod"})["findings"]
    assert [each["value"] for each in finding["suggestions"]] == ["x"]
