"""Exemptions from end to end, `explain`, and the preview of a changed policy."""

import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from builders import NO_TAGS, reservation, save_fleet, save_policy
from builders import instance_id as ident
from conftest import Result, run_tagcheck

if TYPE_CHECKING:
    from aws_server import AwsServer

ACCOUNT, OTHER_ACCOUNT = "123456789012", "012345678901"
REGION, OTHER_REGION = "us-east-1", "eu-west-1"
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
DAY = timedelta(1)
RIGHT = {"Owner": "ann", "CostCenter": "CC-1042"}


def instance(
    number: int,
    tags: Mapping[str, str] = NO_TAGS,
    *,
    age: timedelta = 30 * DAY,
    **keys: Any,
) -> dict[str, Any]:
    """Make a reservation of one instance of an age."""
    return reservation(number, tags, launched=NOW - age, **keys)


BYSTANDER = instance(0xFF, RIGHT)


class Scan(NamedTuple):
    """How a scan ended, and its reports."""

    code: int
    summary: str
    report: dict[str, Any]
    junit: ET.Element

    def ids(self, key: str = "findings") -> set[int]:
        """The numbers of the instances in a list of the report."""
        return {int(entry["instance_id"][2:], 16) for entry in self.report[key]}

    def notices(self, *words: str) -> list[str]:
        return [notice for notice in self.warnings if all(word in notice for word in words)]

    @property
    def warnings(self) -> list[str]:
        """The notices, but for that of a state that begins with this scan."""
        return [notice for notice in self.report["notices"] if not notice.startswith("New state")]


class Desk:
    """The script in a directory of its own, at any time."""

    def __init__(self) -> None:
        self.write_policy()

    def write_policy(self, **keys: Any) -> None:
        """Write a policy that asks for Owner and CostCenter in two regions; JSON is YAML."""
        standard = {"required_tags": ["Owner", "CostCenter"], "regions": {REGION: None, OTHER_REGION: None}}
        save_policy(Path(), **standard | keys)

    def write_fleet(self, *reservations: Mapping[str, Any]) -> None:
        save_fleet(Path(), *reservations)

    def run(self, *args: str, now: datetime = NOW) -> Result:
        return run_tagcheck(*args, cwd=Path.cwd(), now=now)

    def scan(self, *reservations: Mapping[str, Any], now: datetime = NOW, args: Iterable[str] = ()) -> Scan:
        """Scan these instances; a region without any is said to be empty."""
        self.write_fleet(*reservations, BYSTANDER, instance(0xFE, RIGHT, region=OTHER_REGION))
        options = ["--policy", "policy.yaml", "--instances", "fleet.json"]
        outputs = ["--json", "out.json", "--junit", "out.xml"]
        run = self.run("scan", *options, *outputs, *args, now=now)
        return Scan(
            run.code, run.out, json.loads(Path("out.json").read_text()), ET.parse("out.xml").getroot()
        )

    def explain(self, *args: str, now: datetime = NOW) -> Result:
        return self.run("explain", "--policy", "policy.yaml", *args, now=now)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk()


# ---- Which instances an exemption covers -------------------------------------------------------------------

FLEET = [
    instance(1),
    instance(2, {"Team": "web"}),
    instance(3, {"Team": "web-2"}),
    instance(4, {"Team": "[web]"}, region=OTHER_REGION),
    instance(5, {"Team": "", "Stage": "x"}, region=OTHER_REGION, account=OTHER_ACCOUNT),
    instance(6, {"team": "web"}, account=OTHER_ACCOUNT),
    instance(7, {"Team": "web\n", "a:b/c": "1*2"}, account=OTHER_ACCOUNT),
]
NUMBERS = set(range(1, 8))


@pytest.mark.parametrize(
    ("conditions", "covered"),
    [
        pytest.param({"tags": {"Team": "web"}}, {2}, id="a value"),
        pytest.param({"tags": {"Team": "WEB"}}, set(), id="a value in capitals"),
        pytest.param({"tags": {"TEAM": "*"}}, set(), id="a key in capitals"),
        pytest.param({"tags": {"Team": "eb"}}, set(), id="a part of a value"),
        pytest.param({"tags": {"Team": "web*"}}, {2, 3, 7}, id="a beginning"),
        pytest.param({"tags": {"Team": "*2"}}, {3}, id="an end"),
        pytest.param({"tags": {"Team": "w*-?"}}, {3}, id="both signs"),
        pytest.param({"tags": {"Team": "we?"}}, {2}, id="any one character"),
        pytest.param({"tags": {"Team": "web?"}}, {7}, id="? is one character, never none"),
        pytest.param({"tags": {"Team": "*"}}, {2, 3, 4, 5, 7}, id="any value, an empty one too"),
        pytest.param({"tags": {"Team": "?*"}}, {2, 3, 4, 7}, id="any value but an empty one"),
        pytest.param({"tags": {"Team": ""}}, {5}, id="an empty value"),
        pytest.param({"tags": {"Team": "[web]"}}, {4}, id="brackets are brackets"),
        pytest.param({"tags": {"Team": "[w]*"}}, set(), id="brackets are no set of characters"),
        pytest.param({"tags": {"Team": "[!x]*"}}, set(), id="nor one of all others"),
        pytest.param({"tags": {"Team": "*]"}}, {4}, id="a bracket and a star"),
        pytest.param({"tags": {"Team": "w.*"}}, set(), id="a point is a point"),
        pytest.param({"tags": {"a:b/c": "1*"}}, {7}, id="a key with signs"),
        pytest.param({"tags": {"Team": "*", "Stage": "x"}}, {5}, id="all tags must match"),
        pytest.param({"tags": {"Team": "web", "Stage": "x"}}, set(), id="one of two is not enough"),
        pytest.param({"instances": [ident(1), ident(4), ident(0xEE)]}, {1, 4}, id="instances"),
        pytest.param({"accounts": [OTHER_ACCOUNT]}, {5, 6, 7}, id="an account"),
        pytest.param({"accounts": [OTHER_ACCOUNT, ACCOUNT]}, NUMBERS, id="every account"),
        pytest.param({"regions": [OTHER_REGION]}, {4, 5}, id="a region"),
        pytest.param(
            {"regions": [OTHER_REGION], "accounts": [OTHER_ACCOUNT]}, {5}, id="a region of an account"
        ),
        pytest.param({"instances": [ident(1), ident(2)], "tags": {"Team": "*"}}, {2}, id="ids and a tag"),
        pytest.param({"instances": [ident(1)], "regions": [OTHER_REGION]}, set(), id="never both"),
    ],
)  # fmt: skip
def test_what_is_covered(desk: Desk, conditions: Mapping[str, Any], covered: set[int]) -> None:
    desk.write_policy(exemptions=[{"reason": "because", **conditions}])
    scan = desk.scan(*FLEET, args=["--dry-run"])
    assert scan.ids("exempted") == covered
    assert scan.ids() == NUMBERS - covered
    assert scan.code == (3 if covered < NUMBERS else 0)


def test_account_without_quotes_keeps_its_leading_zero(desk: Desk) -> None:
    text = "version: 1\nname: t\nrequired_tags: [Owner]\nregions: {us-east-1: }\n"
    exemption = f"exemptions:\n  - reason: r\n    accounts: [{OTHER_ACCOUNT}]\n"
    Path("policy.yaml").write_text(text + exemption)
    scan = desk.scan(instance(1, account=OTHER_ACCOUNT))
    assert (scan.code, scan.ids("exempted")) == (0, {1})


# ---- Which tags an exemption is from -----------------------------------------------------------------------


def test_from_some_tags_the_rest_stays_a_finding(desk: Desk) -> None:
    exemption = {"reason": "because", "instances": [ident(1), ident(2), ident(3)], "required_tags": ["Owner"]}
    desk.write_policy(exemptions=[exemption])
    others = instance(2, {"CostCenter": "CC-1"}), instance(3, {"Owner": "ann"})
    scan = desk.scan(instance(1), *others)
    assert scan.code == 3
    assert scan.ids("exempted") == {2}
    found = {f["instance_id"]: [v["tag_key"] for v in f["violations"]] for f in scan.report["findings"]}
    assert found == {ident(1): ["CostCenter"], ident(3): ["CostCenter"]}
    assert (scan.report["summary"]["findings"], scan.report["summary"]["exempted"]) == (2, 1)


def test_two_exemptions_can_cover_an_instance_together(desk: Desk) -> None:
    owner = {"reason": "first", "instances": [ident(1)], "required_tags": ["Owner"]}
    cost = {"reason": "second", "regions": [REGION], "required_tags": ["CostCenter"]}
    desk.write_policy(exemptions=[owner, cost])
    scan = desk.scan(instance(1))
    assert scan.code == 0
    (exempted,) = scan.report["exempted"]
    assert [(v["tag_key"], v["reason"]) for v in exempted["violations"]] == [
        ("Owner", "first"),
        ("CostCenter", "second"),
    ]
    assert scan.notices("exempted nothing") == []


def test_the_first_exemption_that_covers_gives_the_reason(desk: Desk) -> None:
    desk.write_policy(exemptions=[{"reason": r, "instances": [ident(1)]} for r in ("first", "second")])
    scan = desk.scan(instance(1))
    assert {v["reason"] for v in scan.report["exempted"][0]["violations"]} == {"first"}
    assert scan.notices("exempted nothing")[0].count("second") == 1


def test_an_exemption_covers_every_way_to_fail(desk: Desk) -> None:
    rules = [{"key": "Owner"}, {"key": "Stage", "values": ["dev"]}, {"key": "Team", "pattern": "t-.*"}]
    exemption = {"reason": "because", "instances": [ident(1), ident(2)]}
    desk.write_policy(required_tags=rules, exemptions=[exemption], placeholder_values=["tbd"])
    tags = {"Owner": "ann", "Stage": "dev", "Team": "t-1"}
    wrong = instance(1, {"owner": "x", "Stage": "prod", "Team": "TBD"}), instance(2, tags)
    desk.write_fleet(*wrong)
    run = desk.run(
        "scan", "--policy", "policy.yaml", "--instances", "fleet.json", "--region", REGION, "--json", "o.json"
    )
    report = json.loads(Path("o.json").read_text())
    assert run.code == 0
    (exempted,) = report["exempted"]
    assert [v["type"] for v in exempted["violations"]] == ["missing", "noncompliant_value", "empty"]
    assert report["summary"]["compliant"] == 1


# ---- Until when --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "holds"),
    [
        (datetime(2026, 1, 1, tzinfo=UTC), True),
        (datetime(2026, 11, 30, 0, 0, 0, tzinfo=UTC), True),
        (datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC), True),
        (datetime(2026, 12, 1, 0, 0, 0, tzinfo=UTC), False),
        (datetime(2027, 12, 1, 0, 0, 0, tzinfo=UTC), False),
    ],
    ids=lambda value: value.isoformat() if isinstance(value, datetime) else "",
)
def test_the_day_that_is_named_is_the_last(desk: Desk, now: datetime, holds: bool) -> None:
    exemption = {"reason": "because", "instances": [ident(1)], "expires": "2026-11-30"}
    desk.write_policy(exemptions=[exemption])
    scan = desk.scan(instance(1, age=2000 * DAY), now=now)
    assert scan.code == (0 if holds else 3)
    assert scan.ids("exempted") == ({1} if holds else set())


def test_the_day_is_that_of_utc(tagcheck: Callable[..., Result], desk: Desk, tmp_path: Path) -> None:
    """A clock on an island a day ahead, or behind, changes nothing: the last day is today in UTC."""
    today = datetime.now(UTC).date()
    desk.write_fleet(instance(1))
    options = ["--policy", "policy.yaml", "--instances", "fleet.json", "--region", REGION, "--dry-run", "-q"]
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago", "XXX-24", "XXX+24"):
        desk.write_policy(exemptions=[{"reason": "r", "regions": [REGION], "expires": today.isoformat()}])
        tagcheck("scan", *options, cwd=tmp_path, env={"TZ": zone}, check=0)
        if datetime.now(UTC).date() != today:
            pytest.skip("midnight has passed")


@pytest.mark.parametrize(
    ("days", "announced"),
    [
        (-500, "ended"),
        (-1, "ended"),
        (0, "ends"),
        (1, "ends"),
        (13, "ends"),
        (14, "ends"),
        (15, ""),
        (500, ""),
    ],
)
def test_an_end_is_announced_14_days_before_and_after(desk: Desk, days: int, announced: str) -> None:
    last = (NOW + days * DAY).date()
    exemption = {"reason": "the vendor pays", "instances": [ident(1)], "expires": last.isoformat()}
    desk.write_policy(exemptions=[exemption])
    scan = desk.scan(instance(1))
    assert scan.notices("exemptions[0]", "the vendor pays", f"{announced} on {last}") == (
        scan.warnings if announced else []
    )
    assert len(scan.warnings) == bool(announced)
    for notice in scan.warnings:
        assert re.match(r"policy\.yaml:1:\d+: warning: ", notice)
        assert notice in scan.summary
    assert ("no longer applies" in scan.summary) == (announced == "ended")
    assert scan.code == (3 if days < 0 else 0)


def test_without_an_end_nothing_is_announced(desk: Desk) -> None:
    desk.write_policy(exemptions=[{"reason": "because", "instances": [ident(1)]}])
    assert desk.scan(instance(1)).warnings == []


USELESS = {"reason": "nobody has this", "tags": {"Team": "none"}}


@pytest.mark.parametrize(
    ("exemption", "said"),
    [
        pytest.param(USELESS, True, id="matches no instance"),
        pytest.param(
            {"reason": "complies anyway", "instances": [ident(0xFF)]}, True, id="matches one that complies"
        ),
        pytest.param({"reason": "used", "instances": [ident(1)]}, False, id="covers one"),
        pytest.param(
            {"reason": "used", "instances": [ident(1)], "required_tags": ["Owner"]},
            False,
            id="covers in part",
        ),
        pytest.param(USELESS | {"expires": "2026-11-22"}, False, id="has ended"),
        pytest.param(USELESS | {"expires": "2026-11-23"}, True, id="ends today"),
    ],
)  # fmt: skip
def test_an_exemption_that_covered_nothing_is_announced(
    desk: Desk, exemption: Mapping[str, Any], said: bool
) -> None:
    desk.write_policy(exemptions=[exemption])
    scan = desk.scan(instance(1))
    assert len(scan.notices("exemptions[0]", exemption["reason"], "exempted nothing")) == said
    assert scan.summary.count("exempted nothing") == said


@pytest.mark.parametrize("args", [["--region", REGION], ["--account", ACCOUNT]], ids=" ".join)
def test_of_a_part_nobody_knows_what_an_exemption_covered(desk: Desk, args: list[str]) -> None:
    desk.write_policy(exemptions=[USELESS])
    scan = desk.scan(instance(1), args=args)
    assert scan.code == 3
    assert scan.warnings == []


def test_of_what_was_not_read_nothing_is_claimed(desk: Desk) -> None:
    regions = {REGION: None, OTHER_REGION: None, "ap-south-1": None}
    desk.write_policy(exemptions=[USELESS | {"regions": ["ap-south-1"]}], regions=regions)
    scan = desk.scan(instance(1))
    assert scan.code == 4
    assert all("exempted nothing in this scan" in notice for notice in scan.warnings)


# ---- Where it is told --------------------------------------------------------------------------------------

AGREED = {
    "reason": "EKS nodes <are> tagged by the cluster team",
    "tags": {"eks:cluster-name": "*"},
    "expires": "2027-01-31",
    "approved_by": "head of platform",
    "ticket": "OPS-1234",
}
NODES = [instance(n, {"eks:cluster-name": "blue", "Name": f"node-{n}"}) for n in (1, 2)]


def test_exempted_instances_stand_apart(desk: Desk) -> None:
    desk.write_policy(exemptions=[AGREED])
    scan = desk.scan(*NODES, instance(3), instance(4, age=timedelta(0)))
    assert scan.code == 3
    assert scan.ids() == {3, 4}
    lines = scan.summary.splitlines()
    assert "2 exempted" in lines[0]
    told = [line for line in lines if line.startswith("EXEMPTED")]
    assert told == [f"EXEMPTED  2 instances until 2027-01-31: {AGREED['reason']}"]
    assert not [line for line in lines if line.startswith("NEW") and "node-" in line]
    rows = Path("violators.csv").read_text().splitlines()[1:]
    assert [row.partition(",")[0] for row in rows] == [ident(3), ident(4)]


def test_exempted_in_json(desk: Desk) -> None:
    desk.write_policy(exemptions=[AGREED])
    report = desk.scan(*NODES, instance(3)).report
    first = report["exempted"][0]
    assert {key: first[key] for key in first if key not in ("violations", "launch_time")} == {
        "account_id": ACCOUNT,
        "account_name": "",
        "region": REGION,
        "instance_id": ident(1),
        "name": "node-1",
        "state": "running",
    }
    assert first["violations"][0] == {
        "tag_key": "Owner",
        "type": "missing",
        "value": None,
        "found_key": None,
        "message": "Owner is missing",
        "reason": AGREED["reason"],
        "expires": "2027-01-31",
        "approved_by": "head of platform",
        "ticket": "OPS-1234",
    }
    counts = ("instances", "compliant", "findings", "exempted")
    assert [report["summary"][name] for name in counts] == [5, 2, 1, 2]
    coverage = {target["region"]: [target[name] for name in counts] for target in report["coverage"]}
    assert coverage == {REGION: [4, 1, 1, 2], OTHER_REGION: [1, 1, 0, 0]}


def test_exempted_in_junit(desk: Desk) -> None:
    desk.write_policy(exemptions=[AGREED])
    junit = desk.scan(*NODES, instance(3)).junit
    assert {name: junit.get(name) for name in ("tests", "failures", "errors")} == {
        "tests": "5",
        "failures": "1",
        "errors": "0",
    }
    (suite,) = (s for s in junit if s.get("name") == f"{ACCOUNT}.{REGION}")
    assert [suite.get(name) for name in ("tests", "failures", "skipped")] == ["4", "1", "2"]
    cases = {case.get("name"): case for case in suite}
    for number in (1, 2):
        (skipped,) = cases[ident(number)]
        assert skipped.tag == "skipped"
        assert AGREED["reason"] in (skipped.get("message") or "")
    assert [child.tag for child in cases[ident(3)]] == ["failure"]
    assert [child.tag for child in cases["scan"]] == []


@pytest.mark.parametrize("fail_on", ["any", "new", "never"])
def test_exempted_alone_is_compliant(desk: Desk, fail_on: str) -> None:
    desk.write_policy(exemptions=[AGREED])
    scan = desk.scan(*NODES, args=["--fail-on", fail_on])
    assert (scan.code, scan.report["exit_name"]) == (0, "COMPLIANT")
    assert scan.report["summary"]["compliant"] == 2


def test_hostile_text_in_an_exempted_instance_is_escaped(desk: Desk) -> None:
    desk.write_policy(exemptions=[{"reason": "r", "tags": {"Evil": "*"}}])
    evil = "\u202e\x9b31m<script>\u2028"
    scan = desk.scan(instance(1, {"Evil": evil, "Name": evil, "owner": evil, "OWNER\x85": evil}))
    assert scan.code == 0
    assert all(line.isprintable() for line in scan.summary.split("\n"))
    assert scan.report["exempted"][0]["name"] == evil


# ---- What becomes of findings ------------------------------------------------------------------------------


def test_an_open_finding_is_resolved_by_an_exemption_and_reopened_by_its_end(desk: Desk) -> None:
    first = desk.scan(instance(1))
    (found,) = first.report["findings"]
    desk.write_policy(exemptions=[{"reason": "r", "instances": [ident(1)], "expires": "2026-11-25"}])
    exempted = desk.scan(instance(1), now=NOW + DAY)
    assert (exempted.code, exempted.ids(), exempted.ids("exempted")) == (0, set(), {1})
    (resolved,) = exempted.report["resolved"]
    assert (resolved["status"], resolved["resolution"]) == ("RESOLVED", "exempted")
    assert re.search(rf"^RESOLVED .*{ident(1)} .*exempted$", exempted.summary, re.MULTILINE)
    assert desk.scan(instance(1), now=NOW + 2 * DAY).report["resolved"] == []
    ended = desk.scan(instance(1), now=NOW + 3 * DAY)
    assert ended.code == 3
    (back,) = ended.report["findings"]
    assert (back["status"], back["times_seen"], back["times_reopened"]) == ("REOPENED", 2, 1)
    assert back["first_seen"] == found["first_seen"]
    assert len(ended.notices("ended on 2026-11-25")) == 1


def test_a_new_exemption_from_some_tags_leaves_the_finding_open(desk: Desk) -> None:
    desk.scan(instance(1))
    desk.write_policy(exemptions=[{"reason": "r", "instances": [ident(1)], "required_tags": ["Owner"]}])
    scan = desk.scan(instance(1), now=NOW + DAY)
    (finding,) = scan.report["findings"]
    assert (finding["status"], scan.report["resolved"]) == ("REPEAT", [])
    assert [violation["tag_key"] for violation in finding["violations"]] == ["CostCenter"]


def test_what_was_put_right_is_tagged_though_the_rest_is_exempted(desk: Desk) -> None:
    desk.write_policy(exemptions=[{"reason": "r", "instances": [ident(1)], "required_tags": ["Owner"]}])
    (finding,) = desk.scan(instance(1)).report["findings"]
    assert [violation["tag_key"] for violation in finding["violations"]] == ["CostCenter"]
    scan = desk.scan(instance(1, {"CostCenter": "CC-1"}), now=NOW + DAY)
    assert (scan.code, scan.ids("exempted")) == (0, {1})
    assert [finding["resolution"] for finding in scan.report["resolved"]] == ["tagged"]


def test_one_that_is_gone_is_gone_though_it_was_exempted(desk: Desk) -> None:
    desk.scan(instance(1))
    desk.write_policy(exemptions=[{"reason": "r", "instances": [ident(1)]}])
    assert [f["resolution"] for f in desk.scan(now=NOW + DAY).report["resolved"]] == ["gone"]


# ---- explain --region --------------------------------------------------------------------------------------

POLICY = """\
version: 1
name: org
required_tags:
  - Owner
  - key: CostCenter
    pattern: 'CC-[0-9]{4}'
  - key: Environment
    values: [dev, test, prod]
placeholder_values: [tbd, n/a]
grace_period: 2h
regions:
  us-east-1:
  eu-west-1:
    required_tags:
      - Data
      - {key: Environment, values: [prod]}
  ap-south-1: {inherit: false, required_tags: [Owner]}
  "*":
    required_tags: [Rest]
exemptions:
  - reason: the cluster team tags them
    tags: {"eks:cluster-name": "*", Team: blue}
    required_tags: [Owner]
    expires: 2027-01-31
  - reason: the vendor pays
    instances: [i-00000000000000002]
    accounts: ["012345678901"]
  - reason: it was agreed
    instances: [i-00000000000000003]
    expires: 2026-11-22
  - reason: only there
    regions: [eu-west-1]
    tags: {Team: red}
"""


@pytest.fixture
def org(desk: Desk) -> Desk:
    """Give a policy with something of everything."""
    Path("policy.yaml").write_text(POLICY)
    return desk


def has(run: Result, *words: str) -> bool:
    """Tell whether one line has all the words."""
    return any(all(word in line for word in words) for line in run.lines)


def test_rules_of_a_region(org: Desk) -> None:
    run = org.explain("--region", REGION)
    assert run.code == 0
    assert run.lines[0] == "Policy org in us-east-1:"
    assert run.lines[1:4] == [
        "  Owner: any value but an empty one (policy.yaml:4)",
        "  CostCenter: a match of CC-[0-9]{4} (policy.yaml:5)",
        "  Environment: one of dev, test, prod (policy.yaml:7)",
    ]
    assert has(run, "empty", "n/a, tbd")
    assert has(run, "pending, running, stopped, stopping")
    assert has(run, "launch", "2")
    assert has(run, "the cluster team tags them", "policy.yaml:21", "Owner", "2027-01-31")
    assert has(run, "the vendor pays", "policy.yaml:25")
    assert not has(run, "only there")


@pytest.mark.parametrize(
    ("region", "rules"),
    [
        ("eu-west-1", {"Owner": 4, "CostCenter": 5, "Environment": 16, "Data": 15}),
        ("ap-south-1", {"Owner": 17}),
        ("sa-east-1", {"Owner": 4, "CostCenter": 5, "Environment": 7, "Rest": 19}),
    ],
)
def test_rules_come_from_their_lines(org: Desk, region: str, rules: Mapping[str, int]) -> None:
    run = org.explain("--region", region)
    found = re.findall(r"^  (\w+): .*\(policy\.yaml:(\d+)\)$", run.out, re.MULTILINE)
    assert {key: int(line) for key, line in found} == rules
    assert has(run, "only there") == (region == "eu-west-1")


def test_rules_of_all_regions(org: Desk) -> None:
    run = org.explain()
    heads = [line for line in run.lines if line.startswith("Policy ")]
    assert len(heads) == 4
    assert any("every region that is not named" in head for head in heads)
    assert len(org.explain("--region", REGION, "--region", OTHER_REGION).lines) < len(run.lines)


def test_an_exemption_that_has_ended_is_not_in_force(org: Desk) -> None:
    run = org.explain("--region", REGION)
    told = [line for line in run.lines if "it was agreed" in line]
    assert all("ended" in line for line in told)


@pytest.mark.parametrize("region", ["us-esat-1", "eu-west-9", "", "*"])
def test_a_region_that_is_none(org: Desk, region: str) -> None:
    run = org.explain("--region", region)
    assert (run.code, run.out) == (2, "")
    assert "--region" in run.err


def test_a_region_that_the_policy_does_not_cover(org: Desk) -> None:
    Path("policy.yaml").write_text(POLICY.replace('  "*":\n    required_tags: [Rest]\n', ""))
    run = org.explain("--region", "sa-east-1")
    assert run.code == 2
    assert "sa-east-1" in run.err
    assert "eu-west-1" in run.err  # what it does cover


def test_explain_with_a_wrong_policy_tells_the_mistakes(org: Desk) -> None:
    Path("policy.yaml").write_text(POLICY.replace("values:", "valeus:"))
    run = org.explain("--region", REGION)
    assert run.code == 2
    assert "policy.yaml:8:5: required_tags[2]: unknown key 'valeus' (did you mean 'values'?)" in run.err


# ---- explain INSTANCE --------------------------------------------------------------------------------------

FINE = {"Owner": "ann", "CostCenter": "CC-1042", "Environment": "dev"}


def explain_saved(desk: Desk, number: int, *reservations: Mapping[str, Any], now: datetime = NOW) -> Result:
    desk.write_fleet(*reservations)
    run = desk.explain(ident(number), "--instances", "fleet.json", now=now)
    assert run.code == 0, run.err
    return run


def test_instance_that_passes(org: Desk) -> None:
    run = explain_saved(org, 1, instance(1, FINE | {"Name": "web-1"}))
    assert run.lines[0] == f"{ident(1)} (web-1) in {ACCOUNT} {REGION}, running: compliant"
    assert [line.split()[0] for line in run.lines[1:4]] == ["passes"] * 3
    assert has(run, "passes", "CostCenter", "'CC-1042'", "policy.yaml:5")
    assert has(run, "History", "none known")


def test_instance_that_fails_says_the_rule_the_near_miss_and_the_nearest_value(org: Desk) -> None:
    tags = {"owner": "ann", "CostCenter": "CC-1", "Environment": "prdo"}
    run = explain_saved(org, 1, instance(1, tags))
    assert has(run, "FAILS", "Owner is missing", "'owner'", "rename", "policy.yaml:4")
    assert has(run, "FAILS", "'CC-1'", "CC-[0-9]{4}", "policy.yaml:5")
    assert has(run, "FAILS", "'prdo'", "dev, test, prod", "did you mean 'prod'", "policy.yaml:7")


def test_instance_with_a_placeholder_and_an_empty_tag(org: Desk) -> None:
    run = explain_saved(org, 1, instance(1, FINE | {"Owner": "TBD", "CostCenter": " "}))
    assert has(run, "FAILS", "Owner", "'TBD'", "placeholder")
    assert has(run, "FAILS", "CostCenter is empty")
    assert has(run, "passes", "Environment")


def test_instance_under_the_rule_of_its_region(org: Desk) -> None:
    run = explain_saved(org, 1, instance(1, FINE | {"Data": "eu"}, region=OTHER_REGION))
    assert has(run, "FAILS", "Environment", "'dev'", "one of prod", "policy.yaml:16")
    assert has(run, "passes", "Data", "policy.yaml:15")
    run = explain_saved(org, 2, instance(2, FINE, region="sa-east-1"))
    assert has(run, "FAILS", "Rest is missing", "policy.yaml:19")


def test_instance_that_is_exempted_in_part(org: Desk) -> None:
    run = explain_saved(
        org, 1, instance(1, {"eks:cluster-name": "x", "Team": "blue", "CostCenter": "CC-1042"})
    )
    assert has(run, "EXEMPTED", "Owner", "2027-01-31", "the cluster team tags them", "policy.yaml:21")
    assert has(run, "passes", "CostCenter")
    assert has(run, "FAILS", "Environment is missing")
    assert not has(run, "almost")


@pytest.mark.parametrize(
    ("reservation", "words"),
    [
        pytest.param(
            instance(1, {"eks:cluster-name": "x", "Team": "green"}),
            ("policy.yaml:21", "the cluster team tags them", "Team=blue", "'green'"),
            id="a tag with another value",
        ),
        pytest.param(
            instance(1, {"Team": "blue"}),
            ("policy.yaml:21", "eks:cluster-name=*", "missing"),
            id="a tag that is missing",
        ),
        pytest.param(
            instance(2), ("policy.yaml:25", "the vendor pays", "account 012345678901"), id="another account"
        ),
        pytest.param(instance(9, account=OTHER_ACCOUNT), ("policy.yaml:25", ident(2)), id="another instance"),
        pytest.param(instance(3), ("policy.yaml:28", "it was agreed", "ended on 2026-11-22"), id="an end"),
        pytest.param(
            instance(1, {"Team": "red"}), ("policy.yaml:31", "only there", "eu-west-1"), id="another region"
        ),
    ],
)
def test_exemption_that_nearly_covers_says_why_not(
    org: Desk, reservation: Mapping[str, Any], words: tuple[str, ...]
) -> None:
    number = int(reservation["Instances"][0]["InstanceId"][2:], 16)
    assert has(explain_saved(org, number, reservation), "almost applies", *words)


def test_exemptions_that_are_far_off_are_not_named(org: Desk) -> None:
    assert not has(explain_saved(org, 1, instance(1)), "exemption")
    # Nor any where nothing fails.
    assert not has(explain_saved(org, 3, instance(3, FINE)), "exemption")


def test_instance_that_is_too_young(org: Desk) -> None:
    run = explain_saved(org, 1, instance(1, age=timedelta(hours=1)))
    assert has(run, "running: too young to be judged before 2026-11-23T13:00:00Z")
    run = explain_saved(org, 1, instance(1, age=timedelta(hours=1)), now=NOW + timedelta(hours=1))
    assert not has(run, "young")
    assert not has(explain_saved(org, 1, instance(1, FINE, age=timedelta(hours=1))), "young")


def test_instance_in_a_state_that_is_not_looked_at(org: Desk) -> None:
    run = explain_saved(org, 1, instance(1, state="terminated"))
    assert has(run, "terminated: not checked", "pending, running, stopped, stopping")


def test_the_first_line_says_how_an_instance_is_judged(org: Desk) -> None:
    assert explain_saved(org, 1, instance(1)).lines[0].endswith("running: not compliant")
    node = FINE | {"Owner": "", "eks:cluster-name": "x", "Team": "blue"}
    exempted = explain_saved(org, 1, instance(1, node))
    assert exempted.lines[0].endswith("running: exempted")


def test_the_likely_value_of_a_missing_tag(org: Desk) -> None:
    siblings = [instance(n, FINE | {"aws:autoscaling:groupName": "web"}) for n in range(2, 60)]
    tags = {"CostCenter": "CC-1042", "Environment": "pord", "aws:autoscaling:groupName": "web"}
    likely = [
        "            likely Owner=ann (58 of 58 in web)",
        "            maybe Environment=prod (near to Environment=pord; but dev is 58 of 58 in web)",
    ]

    def told(run: Result) -> list[str]:
        """Give what follows what fails."""
        pairs = itertools.pairwise(run.lines)
        return [line for before, line in pairs if before.startswith("  FAILS")]

    run = explain_saved(org, 1, instance(1, tags), *siblings)
    assert told(run) == likely
    org.scan(instance(1, tags), *siblings)
    assert told(org.explain(ident(1))) == likely
    Path("instance_state.db").unlink()
    alone = ["            maybe Environment=prod (near to Environment=pord)"]
    assert told(explain_saved(org, 1, instance(1, tags)))[1:] == alone


def test_history_of_an_instance(desk: Desk) -> None:
    def history(*reservations: Mapping[str, Any]) -> str:
        desk.write_fleet(*reservations, BYSTANDER)
        return desk.explain(ident(1), "--instances", "fleet.json").lines[-1]

    assert history(instance(1)).strip() == "History: none known"
    desk.scan(instance(1))
    assert all(word in history(instance(1)) for word in ("NEW", "1 time ", "2026-11-23T12:00:00Z"))
    desk.scan(instance(1), now=NOW + DAY)
    told = history(instance(1))
    assert all(word in told for word in ("REPEAT", "2 times", "2026-11-23T12:00:00Z", "2026-11-24T12:00:00Z"))
    desk.scan(instance(1, RIGHT), now=NOW + 2 * DAY)
    assert all(word in history(instance(1, RIGHT)) for word in ("RESOLVED", "tagged", "2026-11-25T12:00:00Z"))
    desk.scan(instance(1), now=NOW + 3 * DAY)
    assert all(word in history(instance(1)) for word in ("REOPENED", "3 times", "reopened 1 time"))


def test_instance_from_the_state(org: Desk) -> None:
    org.scan(instance(1, {"owner": "ann", "Name": "web-1"}))
    Path("fleet.json").unlink()
    run = org.explain(ident(1))
    assert run.code == 0
    assert run.lines[0].startswith(f"{ident(1)} (web-1) in {ACCOUNT} {REGION}")
    assert has(run, "FAILS", "Owner is missing", "'owner'", "policy.yaml:4")
    assert has(run, "History", "NEW", "1 time ")


def test_to_explain_changes_nothing(org: Desk) -> None:
    org.scan(instance(1))
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    for args in ([], ["--region", REGION], [ident(1)], [ident(1), "--instances", "fleet.json"], [ident(2)]):
        org.explain(*args)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_to_explain_creates_no_state(org: Desk) -> None:
    explain_saved(org, 1, instance(1))
    assert not Path("instance_state.db").exists()


def test_one_id_in_two_accounts_is_explained_twice(org: Desk) -> None:
    org.scan(instance(1), instance(1, account=OTHER_ACCOUNT))
    run = org.explain(ident(1))
    heads = [line for line in run.lines if line.startswith("i-")]
    assert [head.split()[2] for head in heads] == [OTHER_ACCOUNT, ACCOUNT]
    run = org.explain(ident(1), "--account", OTHER_ACCOUNT)
    assert [line.split()[2] for line in run.lines if line.startswith("i-")] == [OTHER_ACCOUNT]


def test_what_was_resolved_is_not_said_to_fail(org: Desk) -> None:
    """The state keeps an instance as it was when it failed last."""
    org.scan(instance(1))
    org.scan(instance(1, FINE), now=NOW + DAY)
    run = org.explain(ident(1), now=NOW + DAY)
    assert has(run, "RESOLVED", "tagged")
    assert run.lines[0].endswith("as it was at 2026-11-23T12:00:00Z: not compliant; RESOLVED since (tagged)")


def test_unknown_instance_is_told_where_to_look(org: Desk) -> None:
    org.scan(instance(1))
    run = org.explain(ident(2))
    assert (run.code, run.out) == (2, "")
    assert all(
        word in run.err
        for word in (ident(2), "instance_state.db", "org", "--live", "--region", "--instances FILE")
    )


def test_unknown_instance_without_a_state(org: Desk) -> None:
    run = org.explain(ident(2))
    assert (run.code, run.out) == (5, "")
    assert f"there is no state {Path('instance_state.db').resolve()}: run a scan first" in run.err


def test_unknown_instance_in_saved_files(org: Desk) -> None:
    org.write_fleet(instance(1))
    run = org.explain(ident(2), "--instances", "fleet.json")
    assert (run.code, run.out) == (2, "")
    assert all(word in run.err for word in (ident(2), "fleet.json"))


def test_instance_in_saved_files_of_a_region_that_is_not_covered(org: Desk) -> None:
    Path("policy.yaml").write_text(POLICY.replace('  "*":\n    required_tags: [Rest]\n', ""))
    org.write_fleet(instance(1, region="sa-east-1"))
    run = org.explain(ident(1), "--instances", "fleet.json")
    assert (run.code, run.out) == (2, "")
    assert "policy.yaml does not cover" in run.err


@pytest.mark.parametrize("scope", [("--account", OTHER_ACCOUNT), ("--region", OTHER_REGION)])
def test_instance_that_saved_files_have_elsewhere(org: Desk, scope: tuple[str, str]) -> None:
    org.write_fleet(instance(1))
    run = org.explain(ident(1), "--instances", "fleet.json", *scope)
    assert (run.code, run.out) == (2, "")
    where = f"fleet.json has no {ident(1)} there, only in {ACCOUNT} {REGION}"
    assert f"{where}: --account or --region leaves it out" in run.err
    assert ident(1) in org.explain(ident(1), "--instances", "fleet.json", "--account", ACCOUNT).out


def test_instance_that_the_state_has_elsewhere(org: Desk) -> None:
    org.scan(instance(1))
    run = org.explain(ident(1), "--region", OTHER_REGION)
    assert (run.code, run.out) == (2, "")
    assert REGION in run.err


def test_no_verdict_on_an_account_that_the_policy_leaves_out(desk: Desk) -> None:
    desk.scan(instance(1, account=OTHER_ACCOUNT))
    desk.write_policy(accounts={"ids": [ACCOUNT], "role_name": "r"})
    for args in ((), ("--instances", "fleet.json")):
        run = desk.explain(ident(1), *args)
        assert (run.code, run.out) == (2, "")
        assert f"only in {OTHER_ACCOUNT} {REGION}: --account or --region leaves it out, or policy" in run.err


def test_instance_in_a_region_that_the_policy_no_longer_covers(desk: Desk) -> None:
    desk.scan(instance(1))
    desk.write_policy(regions={OTHER_REGION: None})
    run = desk.explain(ident(1))
    assert run.code == 2
    assert REGION in run.err


@pytest.mark.parametrize("wanted", ["i-\x1b[31mred", "web-1", ""])
def test_what_is_no_instance_id(org: Desk, wanted: str) -> None:
    org.scan(instance(1))
    for options in ([], ["--instances", "fleet.json"]):
        run = org.explain(wanted, *options)
        if wanted:
            assert (run.code, run.out) == (2, "")
        assert run.err.rstrip("\n").isprintable()


def test_hostile_tags_are_escaped(org: Desk) -> None:
    evil = "\x1b[2J\u202e\x9b31m\u2028\r\nHistory: compliant"
    tags = {"Owner": evil, "CostCenter": evil, "environment": evil, "Name": evil, "Environment ": evil}
    reservation = instance(1, tags | {"eks:cluster-name": "x", "Team": evil})
    run = explain_saved(org, 1, reservation)
    assert all(line.isprintable() for line in run.out.split("\n"))
    assert sum(line.lstrip().startswith("History") for line in run.lines) == 1
    org.scan(reservation)
    run = org.explain(ident(1))
    assert run.code == 0
    assert all(line.isprintable() for line in run.out.split("\n"))


# ---- explain --live ----------------------------------------------------------------------------------------


def test_live(aws: "AwsServer", tagcheck: Callable[..., Result], org: Desk) -> None:
    [wrong] = aws.launch(REGION, {"owner": "ann", "Environment": "prdo", "CostCenter": "CC-1042"})
    live = ["explain", wrong, "--policy", "policy.yaml", "--live"]
    out = tagcheck(*live, "--region", REGION, env=aws.env, check=0).out
    assert out.startswith(f"{wrong} in {ACCOUNT} {REGION}, running: too young")
    assert re.search(r"FAILS +Owner is missing; the instance has 'owner'.*\(policy\.yaml:4\)", out)
    assert re.search(r"FAILS +Environment is 'prdo'.*did you mean 'prod'", out)
    assert re.search(r"passes +CostCenter is 'CC-1042'", out)
    assert not Path("instance_state.db").exists()
    assert {call.action for call in aws.requests} <= {
        "DescribeInstances",
        "GetCallerIdentity",
        "DescribeRegions",
    }


def test_live_knows_the_place_and_the_history_from_the_state(
    aws: "AwsServer", tagcheck: Callable[..., Result], org: Desk
) -> None:
    [wrong] = aws.launch(REGION, FINE | {"Owner": "tbd"})
    reservation = instance(int(wrong[2:], 16), FINE | {"Owner": "tbd"})
    org.scan(reservation)
    aws.tag(REGION, [wrong], {"Owner": "ann"})
    out = tagcheck("explain", wrong, "--policy", "policy.yaml", "--live", env=aws.env, check=0).out
    assert re.search("passes +Owner is 'ann'", out)
    assert re.search("History: .*1 time ", out)


@pytest.mark.parametrize(
    "args",
    [
        pytest.param([ident(1), "--region", REGION], id="an id that is not there"),
        pytest.param(["web-1", "--region", REGION], id="a name"),
        pytest.param([ident(1)], id="no region"),
    ],
)
def test_live_unknown(aws: "AwsServer", tagcheck: Callable[..., Result], org: Desk, args: list[str]) -> None:
    result = tagcheck("explain", *args, "--policy", "policy.yaml", "--live", env=aws.env, check=2)
    assert result.out == ""
    assert args[0] in result.err
    assert ("is not an instance id" if args[0] == "web-1" else "region") in result.err


def test_live_in_the_second_of_two_regions(
    aws: "AwsServer", tagcheck: Callable[..., Result], org: Desk
) -> None:
    [there] = aws.launch(OTHER_REGION, FINE)
    regions = ["--region", REGION, "--region", OTHER_REGION]
    live = ["explain", there, "--policy", "policy.yaml", "--live"]
    assert OTHER_REGION in tagcheck(*live, *regions, env=aws.env, check=0).out


def test_live_with_the_credentials_of_another_account_than_the_policy_expects(
    aws: "AwsServer", tagcheck: Callable[..., Result], org: Desk
) -> None:
    [wrong] = aws.launch(REGION, {"Owner": "x"})
    org.write_policy(expected_account="210987654321")
    live = ["explain", wrong, "--policy", "policy.yaml", "--live", "--region", REGION]
    result = tagcheck(*live, env=aws.env, check=5)
    assert "the policy expects 210987654321" in result.err
    assert {request.action for request in aws.requests} == {"GetCallerIdentity"}


def test_live_looks_into_no_other_account(
    aws: "AwsServer", tagcheck: Callable[..., Result], org: Desk
) -> None:
    [wrong] = aws.launch(REGION, {"Owner": "x"})
    live = ["explain", wrong, "--policy", "policy.yaml", "--live", "--region", REGION, "--account"]
    result = tagcheck(*live, "210987654321", env=aws.env, check=2)
    assert result.out == ""
    assert f"--live looks only into the account of the credentials, {ACCOUNT}" in result.err
    assert tagcheck(*live, ACCOUNT, env=aws.env, check=0).out.startswith(wrong)


def test_live_refuses_an_instance_that_was_not_asked_for(
    aws: "AwsServer", tagcheck: Callable[..., Result], org: Desk
) -> None:
    [wrong] = aws.launch(REGION, {"Owner": "x"})
    other = b"i-0ffffffffffffffff"
    aws.fault("edit", action="DescribeInstances", edit=lambda xml: xml.replace(wrong.encode(), other))
    live = ["explain", wrong, "--policy", "policy.yaml", "--live", "--region", REGION]
    result = tagcheck(*live, env=aws.env)
    assert (result.code in (4, 5), result.out) == (True, "")
    assert "i-0ffffffffffffffff, which was not asked for" in result.err


def test_live_without_permission(aws: "AwsServer", tagcheck: Callable[..., Result], org: Desk) -> None:
    [wrong] = aws.launch(REGION)
    aws.fault("error", action="DescribeInstances", status=403, code="UnauthorizedOperation", message="No.")
    live = ["explain", wrong, "--policy", "policy.yaml", "--live", "--region", REGION]
    result = tagcheck(*live, env=aws.env)
    assert result.code in (4, 5)
    assert "UnauthorizedOperation" in result.err


# ---- The preview of a changed policy -----------------------------------------------------------------------


def write_new_policy(**keys: Any) -> None:
    old = json.loads(Path("policy.yaml").read_text())
    Path("new.yaml").write_text(json.dumps(old | keys))


def preview(desk: Desk, *reservations: Mapping[str, Any]) -> Scan:
    """Preview new.yaml, and assert that nothing but the reports has changed."""
    before = Path("instance_state.db").read_bytes()
    kept = {path.name for path in Path().iterdir()}
    scan = desk.scan(*reservations, now=NOW + DAY, args=["--dry-run", "--policy", "new.yaml"])
    assert Path("instance_state.db").read_bytes() == before
    assert {path.name for path in Path().iterdir()} == kept
    assert scan.report["dry_run"] is True
    return scan


PARTLY = [
    instance(1, {"Owner": "ann"}),
    instance(2, {"Owner": "ann"}),
    instance(3, {"CostCenter": "CC-1"}),
    instance(4),
    instance(5, RIGHT),
]


def test_preview_groups_by_required_tag(desk: Desk) -> None:
    desk.scan(*PARTLY)
    right = [instance(6, RIGHT | {"Team": "web"}), instance(7, RIGHT)]
    write_new_policy(required_tags=["Owner", "Team"])
    scan = preview(desk, *PARTLY, *right)
    assert scan.code == 3
    statuses = {finding["instance_id"]: finding["status"] for finding in scan.report["findings"]}
    assert statuses[ident(5)] == statuses[ident(7)] == "NEW"
    assert statuses[ident(3)] == statuses[ident(4)] == "REPEAT"
    # The two bystanders and 5 and 7 have no Team; 1 and 2 do not either, so they stay open.
    assert scan.report["preview"]["new"] == {"Team": 4}
    assert re.search(r"^Findings that would be NEW, by required tag:\n +4  Team$", scan.summary, re.MULTILINE)
    assert "nothing is recorded" in scan.summary


def test_preview_of_a_policy_that_asks_for_less(desk: Desk) -> None:
    desk.scan(*PARTLY)
    write_new_policy(required_tags=["Owner"])
    scan = preview(desk, *PARTLY)
    assert scan.report["preview"] == {"new": {}, "policy_changed": {"CostCenter": 2}}
    assert {finding["resolution"] for finding in scan.report["resolved"]} == {"policy_changed"}
    assert scan.ids("resolved") == {1, 2}
    assert scan.ids() == {3, 4}
    title = "Findings that would be RESOLVED as policy_changed, by required tag:"
    assert re.search(rf"^{title}\n +2  CostCenter$", scan.summary, re.MULTILINE)
    assert "would be NEW" not in scan.summary


def test_preview_tells_the_most_frequent_tag_first(desk: Desk) -> None:
    desk.scan()
    write_new_policy(required_tags=["Rare", "Often", "Owner"])
    has_rare = [instance(n, RIGHT | {"Rare": "x"}) for n in range(1, 6)]
    scan = preview(desk, *has_rare)
    assert list(scan.report["preview"]["new"].items()) == [("Often", 7), ("Rare", 2)]
    assert re.findall(r"^ +(\d+)  (\w+)$", scan.summary, re.MULTILINE) == [("7", "Often"), ("2", "Rare")]


def test_preview_of_looser_values(desk: Desk) -> None:
    rule = {"key": "Owner", "values": ["ann"]}
    desk.write_policy(required_tags=[rule])
    desk.scan(instance(1, {"Owner": "bob"}), instance(2, {"Owner": "eve"}))
    write_new_policy(required_tags=[rule | {"values": ["ann", "bob"]}])
    scan = preview(desk, instance(1, {"Owner": "bob"}), instance(2, {"Owner": "eve"}))
    assert (scan.ids("resolved"), scan.ids()) == ({1}, {2})
    assert scan.report["preview"]["policy_changed"] == {"Owner": 1}


def test_preview_of_an_exemption_is_no_change_of_the_rules(desk: Desk) -> None:
    desk.scan(instance(1))
    write_new_policy(exemptions=[{"reason": "r", "instances": [ident(1)]}])
    scan = preview(desk, instance(1))
    assert scan.report["preview"] == {"new": {}, "policy_changed": {}}
    assert [finding["resolution"] for finding in scan.report["resolved"]] == ["exempted"]


def test_preview_of_no_change(desk: Desk) -> None:
    desk.scan(*PARTLY)
    write_new_policy()
    scan = preview(desk, *PARTLY)
    assert scan.report["preview"] == {"new": {}, "policy_changed": {}}
    assert "by required tag" not in scan.summary
    assert scan.report["resolved"] == []


def test_preview_comes_true(desk: Desk) -> None:
    desk.scan(*PARTLY)
    write_new_policy(required_tags=["Owner", "Team"])
    before = preview(desk, *PARTLY).report
    true = desk.scan(*PARTLY, now=NOW + DAY, args=["--policy", "new.yaml"]).report
    changing = ("scan_id", "dry_run", "finished_at", "preview")
    assert "preview" not in true
    assert {k: v for k, v in before.items() if k not in changing} == {
        k: v for k, v in true.items() if k not in changing
    }


def test_preview_of_a_wrong_policy_scans_nothing(desk: Desk) -> None:
    desk.scan(*PARTLY)
    Path("new.yaml").write_text("version: 1\nnaem: x\n")
    before = Path("instance_state.db").read_bytes()
    run = desk.run("scan", "--policy", "new.yaml", "--instances", "fleet.json", "--dry-run")
    assert run.code == 2
    assert "new.yaml:2:1: unknown key 'naem' (did you mean 'name'?)" in run.err
    assert Path("instance_state.db").read_bytes() == before


def test_today_is_handed_down(desk: Desk) -> None:
    """Nothing here may look at the clock: what ends is judged by the scan's own time."""
    long_ago = datetime(2001, 2, 3, tzinfo=UTC)
    desk.write_policy(exemptions=[{"reason": "r", "instances": [ident(1)], "expires": "2001-02-03"}])
    reservation = instance(1, age=NOW - long_ago + DAY)
    assert desk.scan(reservation, now=long_ago).code == 0
    assert date(2001, 2, 3).isoformat() in desk.scan(reservation, now=long_ago).summary
