"""Owners: whose findings are open, how that went, what they cost, and the plan for theirs."""

import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import builders
import pytest
from builders import SAVED_FILES, instance_id, save_fleet, save_policy
from conftest import run_tagcheck

import tagcheck as script

REGION, OTHER = "us-east-1", "eu-west-1"
START = datetime(2026, 3, 1, 6, tzinfo=UTC)
GROUP = {"aws:autoscaling:groupName": "web-asg"}
HOSTILE = "</code><script>alert(1)</script>\u202e$(reboot) '\""


def scan(directory, day, fleet, *args, region=REGION, check=None, **keys):
    """Scan instances, number -> tags, on the so-many-th day; the other region is not read."""
    save_policy(
        directory, **{"required_tags": ["Owner", "Project"], "regions": {REGION: {}, OTHER: {}}} | keys
    )
    instances = [
        builders.instance(number, tags, region=region, InstanceType="m5.large")
        for number, tags in fleet.items()
    ]
    save_fleet(directory, *instances)
    now = START + timedelta(days=day)
    return run_tagcheck(
        "scan", *SAVED_FILES, *args, "--json", "out.json", cwd=directory, now=now, check=check
    )


def run(directory, *args, day=20, **options):
    return run_tagcheck(*args, cwd=directory, now=START + timedelta(days=day), **options)


def found(directory, day=20):
    with closing(sqlite3.connect(directory / "instance_state.db")) as db:
        return script.fetch_open(db, "test", START + timedelta(days=day))


def by_name(directory, **more):
    return {each.owner: each for each in found(directory, **more).owners}


@pytest.fixture
def state(tmp_path):
    """Ann fixes one of three, bob his only one, and of the seven of a group five have an Owner."""
    group = {number: GROUP | {"Owner": "web"} for number in range(20, 28)} | {30: GROUP, 31: GROUP}
    ann = {1: {"Owner": "ann"}, 2: {"Owner": " ann "}, 3: {"Owner": "ann"}}
    scan(tmp_path, 0, ann | {4: {"Owner": "bob"}, 5: {}} | group)
    done = {"Project": "shop"}
    ann[3], later = ann[3] | done, {6: {"Owner": HOSTILE}, 7: {"Owner": "ann"}}
    scan(tmp_path, 10, ann | {4: {"Owner": "bob"} | done, 5: {}} | later | group)
    return tmp_path


def test_whose_findings_are_open(state):
    owners = by_name(state)
    assert [(each.owner, each.total, each.resolved) for each in owners.values()] == [
        ("web", 10, 0),  # two of them by what their group says
        ("ann", 3, 1),
        ("", 1, 0),
        (HOSTILE, 1, 0),
        ("bob", 0, 1),
    ]
    assert found(state).owners_total == 5


@pytest.mark.parametrize(
    ("tags", "owner", "rule"),
    [
        ({"Eigentümer": "ann"}, "ann", "Eigentümer"),
        ({'a"b': "ann"}, "ann", 'a"b'),
        ({"Owner": "\u200bann \u200b"}, "ann", "Owner"),
        ({"owner": "ann"}, "ann", "Owner"),
        ({"Owner": "bob"}, "bob", {"key": "Owner", "values": ["ann", "carol"]}),
        ({"Team": "ann"}, "ann", {"key": "Owner", "aliases": ["Team"]}),
        ({"Owner": "TBD"}, "", "Owner"),
        ({"Owner": "TBD", "owner": "ann"}, "ann", "Owner"),
        ({"Owner": "TBD"}, "", {"key": "Owner", "effective_from": "2999-01-01"}),
    ],
)
def test_the_owner_is_the_same_for_the_page_and_a_plan(tmp_path, tags, owner, rule):
    required = [rule, {"key": "Project", "default": "shop"}]
    scan(tmp_path, 0, {1: tags}, required_tags=required, placeholder_values=["tbd"])
    assert [*by_name(tmp_path)] == [owner]
    page = run(tmp_path, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert f'id="{script.owner_anchor(owner)}"' in page
    plan = ("remediate", "--policy", "policy.yaml", "--csv", "plan.csv", f"--owner={owner}")
    assert "Project" in [row["Tag"] for row in run(tmp_path, *plan, check=0).csv("plan.csv")]


def test_a_likely_owner_is_found_whichever_tag_comes_first(tmp_path):
    group = {number: GROUP | {"Owner": "web", "Project": "shop"} for number in range(20, 28)} | {30: GROUP}
    scan(tmp_path, 0, group, required_tags=["Project", "Owner"])
    assert [(each.owner, each.total) for each in found(tmp_path).owners] == [("web", 1)]


def test_an_alias_is_of_no_owner(tmp_path):
    keys = {"required_tags": ["Owner", {"key": "Project", "aliases": ["proj"]}], "normalize_aliases": True}
    scan(tmp_path, 0, {1: {"Owner": "ann", "proj": "x"}, 2: {"Owner": "ann"}}, **keys)
    plan = ("remediate", "--policy", "policy.yaml", "--csv", "plan.csv")
    rows = run(tmp_path, *plan, check=0).csv("plan.csv")
    assert {(row["InstanceId"], row["Tag"]) for row in rows} >= {(instance_id(1), "Project")}
    (tmp_path / "plan.csv").unlink()
    rows = run(tmp_path, *plan, "--owner=ann", check=0).csv("plan.csv")
    assert instance_id(1) not in {row["InstanceId"] for row in rows}


def test_the_trend_of_an_owner_is_what_was_open_each_day(state):
    [*_, before, _, then] = (point.open for point in by_name(state, day=11)["ann"].trend)
    assert (before, then) == (3, 3)
    trend = {point.at[5:10]: point.open for point in by_name(state)["ann"].trend}
    days = ("02-28", "03-01", "03-10", "03-11", "03-21")
    assert [trend.get(day) for day in days] == [None, 3, 3, 3, 3]
    assert len(trend) == 21  # there was no scan before
    later = [point.open for point in by_name(state, day=60)["ann"].trend]
    assert {*later} == {3}  # what was resolved before these days is left out on all of them


def test_findings_that_are_alike_are_counted_together(state):
    web = by_name(state)["web"]
    assert [(alike.finding.instance_id[-2:], alike.number) for alike in web.oldest] == [("14", 8), ("1e", 2)]
    assert [(cause.tags, cause.instances) for cause in web.causes] == [({"Project": 10, "Owner": 2}, 10)]
    assert [alike.number for alike in by_name(state)["ann"].oldest] == [1, 1, 1]
    assert [alike.number for alike in found(state).oldest] == [1, 1, 1, 8, 2, 1, 1]


def test_findings_that_could_not_be_read_are_separate(state):
    scan(state, 11, {50: {"Owner": "eve"}}, region=OTHER, check=4)
    open_ = found(state)
    assert [alike.finding.instance_id[-2:] for alike in open_.oldest] == ["32"]
    assert sum(alike.number for alike in open_.oldest_unread) == 15
    page = run(state, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "1 + 15 as last read, in 1 target that the latest scan did not read" in page


@pytest.mark.parametrize(
    ("owner", "ids"),
    [
        ("ann", {"1", "2", "7"}),
        ("web", {"30", "31"} | {str(number) for number in range(20, 28)}),
        ("", {"5"}),
        (HOSTILE, {"6"}),
    ],
)
def test_remediate_plans_what_an_owner_has_open(state, owner, ids):
    keys = {
        "required_tags": ["Owner", {"key": "Project", "default": "shop"}],
        "regions": {REGION: {}, OTHER: {}},
    }
    save_policy(state, **keys)
    done = run(state, "remediate", "--policy", "policy.yaml", f"--owner={owner}", check=0)
    planned = {
        str(int(row["InstanceId"][2:], 16))
        for row in done.csv("remediate-plan.csv")
        if row["Tag"] == "Project"
    }
    assert planned == ids


@pytest.mark.parametrize(
    ("owner", "hint"), [("bob", ""), ("nobody-here", ""), ("Ann", " (did you mean 'ann'?)")]
)
def test_an_owner_of_nothing_that_is_open_is_refused(state, owner, hint):
    refused = run(state, "remediate", "--policy", "policy.yaml", "--owner=web", f"--owner={owner}", check=2)
    assert f"--owner {owner}: no open finding under the policy test has this owner{hint};" in refused.err


def test_an_owner_is_for_new_plans(state):
    refused = run(state, "remediate", "--policy", "policy.yaml", "--owner", "ann", "--plan", "x.csv", check=2)
    assert "--owner and --plan: give one of them" in refused.err
    shown = run(state, "remediate", "--policy", "policy.yaml", "--owner", "web", "--csv", "-", check=0)
    assert "remediate --policy policy.yaml --owner=web --apply" in re.sub(r"\s+", " ", shown.err)


def test_the_page_names_the_command_and_stays_text(state):
    page = run(state, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "<code>tagcheck.py remediate --policy policy.yaml --owner=ann</code>" in page
    assert "<code>tagcheck.py remediate --policy policy.yaml --owner ''</code>" in page
    assert "<script" not in page and "\u202e" not in page
    assert page.count(f'id="{script.owner_anchor(HOSTILE)}"') == 1
    assert "--owner=&lt;" not in page  # nobody can type a character that is not seen


def test_who_the_owner_is_comes_from_the_policy(tmp_path):
    def key(**keys):
        return script.check_policy(script.to_json(builders.policy(**keys)).encode(), "policy.yaml").owner_key

    assert key(required_tags=["Project", "owner"]) == "owner"
    assert key(required_tags=["Project", "Team"]) == "Project"
    owners = {"tag": "Team", "default": "ops@example.com"}
    notify = {"owners": owners, "email": {"from": "a@example.com", "to": ["b@example.com"]}}
    assert key(required_tags=["Owner", "Team"], notify=notify) == "Team"


# ---- What it costs -----------------------------------------------------------------------------------------


def prices(directory, head="hourly_price_eur"):
    (directory / "prices.csv").write_text(f"instance_type,region,{head}\nm5.large,{REGION},0.1\n")
    return ("--prices", "prices.csv")


def test_the_share_of_spend_that_is_allocated(tmp_path):
    fleet = {1: {"Owner": "ann"}, 2: {"Owner": "ann", "Project": "x"}, 3: {}, 4: {"Name": "exempt"}}
    keys = {"exemptions": [{"reason": "it is", "tags": {"Name": "exempt"}}]}
    result = scan(tmp_path, 0, fleet, *prices(tmp_path), **keys)
    assert result.json("out.json")["currency"] == "EUR"
    assert "73.00 EUR a month without Owner" in result.out
    page = run(tmp_path, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "66% of 219 EUR a month is allocated (has Owner), 73 EUR is not" in page
    result = scan(tmp_path, 1, fleet, *prices(tmp_path, "hourly_price"), **keys)
    assert result.json("out.json")["currency"] is None
    assert "73.00 a month without Owner" in result.out
    scan(tmp_path, 2, fleet, **keys)
    page = run(tmp_path, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "allocated" not in page and "EUR" not in page


def test_a_share_of_spend_is_never_rounded_up(tmp_path):
    scan(
        tmp_path, 0, {1: {}} | {n: {"Owner": "ann", "Project": "x"} for n in range(2, 251)}, *prices(tmp_path)
    )
    page = run(tmp_path, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "99% of 18,250 EUR a month is allocated" in page


def test_amounts_in_several_currencies_have_no_sum(tmp_path):
    regions = {REGION: {}, OTHER: {}}
    scan(tmp_path, 0, {1: {"Owner": "ann"}}, *prices(tmp_path), regions=regions)
    (tmp_path / "usd.csv").write_text(f"instance_type,region,hourly_price_usd\nm5.large,{OTHER},0.2\n")
    args = ("--region", OTHER, "--prices", "usd.csv")
    scan(tmp_path, 1, {2: {"Owner": "ann"}}, *args, regions=regions, region=OTHER)
    page = run(tmp_path, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "the prices are in several currencies: EUR, USD" in page
    assert "a month" not in page and "Spend that lacks its tag" not in page


@pytest.mark.parametrize("head", ["hourly_price,hourly_price_eur", "hourly_price_euro", "hourly_price_"])
def test_one_column_names_the_price(tmp_path, head):
    message = "the first line must name the columns instance_type,region,hourly_price"
    assert message in scan(tmp_path, 0, {1: {}}, *prices(tmp_path, head), check=2).err


# ---- The style beside the page -----------------------------------------------------------------------------


def test_report_writes_the_style_beside_the_page(state):
    (state / "out").mkdir()
    args = ("report", "--policy", "policy.yaml", "--html", "out/page.html")
    run(state, *args, "--css", "out/tagcheck.css", check=0)
    page = (state / "out" / "page.html").read_text()
    assert '<link rel="stylesheet" href="tagcheck.css">' in page and "<style" not in page
    assert (state / "out" / "tagcheck.css").read_text() == script.HTML_STYLE
    refused = run(state, *args, "--css", "tagcheck.css", check=2)
    assert "--css tagcheck.css must be in the directory of --html out/page.html" in refused.err
    assert "are the same file" in run(state, *args, "--css", "out/page.html", check=2).err
    for html in ("page.html", "-"):
        stdout = run(state, *args[:3], "--html", html, "--css", "-", check=2)
        assert stdout.err.startswith("tagcheck: --css -: the page links to its style")
    assert "<style" in run(state, *args[:3], "--html", "-", check=0).out
