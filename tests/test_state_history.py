"""`history`, `report` and `prune`: what the state keeps, told, shown and forgotten; and what it costs."""

import csv
import io
import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import astuple
from datetime import UTC, datetime, timedelta
from pathlib import Path

import builders
import drift
import pytest
from builders import SAVED_FILES, save_fleet, save_policy
from builders import instance_id as instance
from conftest import run_tagcheck

import tagcheck as script

ACCOUNT, REGION, OTHER = "123456789012", "us-east-1", "eu-west-1"
START = datetime(2026, 3, 1, 6, tzinfo=UTC)
GOOD = {"Owner": "ann", "Project": "shop"}
DATA = Path(__file__).parent / "data"
HOSTILE = '</title><script>alert(1)</script>\x1b[2J\u202e=HYPERLINK("http://x")'


def save(directory, fleet):
    """Save instances: region -> id's last digit -> tags, or (tags, more of what EC2 says)."""
    instances = []
    for region, of_region in fleet.items():
        for number, tags in of_region.items():
            tags, more = tags if isinstance(tags, tuple) else (tags, {})
            instances.append(builders.instance(number, tags, region=region, **more))
    save_fleet(directory, *instances)


def scan(directory, day, fleet, *args, **options):
    """Scan on the so-many-th day."""
    save_policy(directory, required_tags=["Owner", "Project"], regions={REGION: {}, OTHER: {}})
    save(directory, fleet)
    return run_tagcheck(
        "scan",
        "--quiet",
        *SAVED_FILES,
        "--json",
        "out.json",
        *args,
        cwd=directory,
        now=START + timedelta(days=day),
        **options,
    )


def command(directory, *args, day=40, **options):
    return run_tagcheck(*args, cwd=directory, now=START + timedelta(days=day), **options)


def history(directory, *args, **options):
    return command(directory, "history", "--policy", "policy.yaml", *args, **options)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A state after five scans: one instance comes and goes, one is half fixed, one is not read at last."""
    cwd = tmp_path_factory.mktemp("kept")
    scan(
        cwd,
        0,
        {REGION: {1: {}, 2: GOOD, 9: GOOD}, OTHER: {3: {"Owner": "ann", "Name": HOSTILE}, 4: {}}},
        check=3,
    )
    scan(
        cwd,
        10,
        {
            REGION: {1: {"Owner": "ann"}, 2: {"Project": "x"}, 9: GOOD},
            OTHER: {3: {"Owner": "ann", "Name": HOSTILE}},
        },
        check=3,
    )
    scan(cwd, 20, {REGION: {1: GOOD, 2: GOOD, 9: GOOD}}, check=4)
    scan(cwd, 30, {REGION: {1: {"Owner": "ann"}, 2: GOOD, 9: GOOD}}, check=4)
    return cwd  # fmt: skip


@pytest.fixture
def state(kept, tmp_path):
    """A copy of it to change."""
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return tmp_path


def ids(result):
    return [line.split()[3][-1] for line in result.out.partition("\n\n")[0].splitlines()[1:]]


@pytest.mark.parametrize(
    ("args", "expected"),
    {
        "all, the open ones first, the oldest of these first": ([], ["3", "1", "4", "2"]),
        "open": (["--status", "open"], ["3", "1"]),
        "resolved": (["--status", "resolved"], ["4", "2"]),
        "a status": (["--status", "reopened"], ["1"]),
        "two": (["--status", "REPEAT", "--status", "REOPENED"], ["3", "1"]),
        "a region": (["--region", OTHER], ["3", "4"]),
        "another account": (["--account", "210987654321"], []),
        "an account": (["--account", ACCOUNT, "--status", "open"], ["3", "1"]),
        "a tag": (["--tag", "Owner"], ["4", "2"]),
        "older": (["--older-than", "35d"], ["3", "1", "4"]),
        "at the edge": (["--older-than", "40d"], []),
    }.values(),
)
def test_findings_are_listed_as_they_are_asked_for(kept, args, expected):
    result = history(kept, *args, check=0)
    # Both were first seen on the first day; the region decides.
    order = ["3", "1"]
    assert ids(result) == expected if expected[:2] == order else sorted(ids(result)) == sorted(expected)
    open_ = len({*expected} & {*order})
    found = f"{script.counted(len(expected), 'finding')}: {open_} open, {len(expected) - open_} resolved"
    assert result.lines[-1] == (found if expected else "No matching findings")


@pytest.mark.parametrize("tag", ["Owner", "Project"])
def test_a_tag_that_no_finding_lacks_now_is_no_mistake(tmp_path, tag):
    scan(tmp_path, 0, {REGION: {1: GOOD}, OTHER: {2: GOOD}}, check=0)
    assert history(tmp_path, "--tag", tag, check=0).out == "No matching findings\n"


def test_an_instance_has_its_story(kept):
    lines = history(kept, instance(1), check=0).out.splitlines()
    assert lines[0] == f"{instance(1)} in {ACCOUNT} {REGION}, running at 2026-03-31T06:00:00Z:"
    assert lines[1:] == [
        "  2026-03-01T06:00:00Z  NEW       Owner is missing, Project is missing",
        "  2026-03-11T06:00:00Z  CHANGED   Project is missing",
        "  2026-03-21T06:00:00Z  RESOLVED  tagged",
        "  2026-03-31T06:00:00Z  REOPENED  Project is missing",
        "  History: REOPENED, found 3 times from 2026-03-01T06:00:00Z to 2026-03-31T06:00:00Z, "
        "reopened 1 time",
    ]
    gone = history(kept, instance(4), check=0).out
    assert "RESOLVED  gone" in gone


def test_json_and_csv_have_the_shape_of_a_scan(kept):
    found = json.loads(history(kept, "--json", "-", "--status", "reopened", check=0).out)
    (of_scan,) = json.loads((kept / "out.json").read_text())["findings"]
    assert found["policy"] == "test"
    assert found["findings"] == [of_scan]
    rows = list(csv.DictReader(io.StringIO(history(kept, "--csv", "-", check=0).out)))
    assert [row["InstanceId"] for row in rows] == [instance(int(n)) for n in ids(history(kept))]
    assert tuple(rows[0]) == script.CSV_COLUMNS
    (of_one,) = json.loads(history(kept, instance(1), "--json", "-", check=0).out)["findings"]
    assert [event["event"] for event in of_one["events"]] == ["NEW", "CHANGED", "RESOLVED", "REOPENED"]
    assert (of_one["events"][2]["resolution"], of_one["changes"]) == ("tagged", [])


def test_columns_of_a_long_table_get_wider_and_never_narrower():
    rows = [["NEW", "a" * 30, "end"], *[["NEW", "b", "end"]] * 1500, ["REOPENED", "c", "end"]]
    lines = list(script.in_columns([*rows, *[["NEW", "d", "end"]] * 1500]))
    places = [line.index("end") for line in lines]  # 1,000 rows are laid out at a time
    assert places == [37] * 1000 + [42] * 2002


def test_hostile_texts_are_told_as_text(kept):
    shown = script.printable(HOSTILE)
    assert script.cut_text(HOSTILE, 24)[:10] in history(kept).out
    for args in ([], [instance(3)], ["--csv", "-"]):
        out = history(kept, *args, check=0).out
        assert "\x1b" not in out
        assert "\u202e" not in out
    assert shown in history(kept, instance(3)).out
    page = command(kept, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "<script" not in page
    assert "\u202e" not in page


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--status", "fixed"], 2, "--status: fixed: give open, NEW, REPEAT"),
        (["--older-than", "30"], 2, "--older-than"),
        (["--tag", "Onwer"], 2, "no finding under the policy test lacks this tag (did you mean 'Owner'?)"),
        (["--tag", "Owner", "--tag", "x"], 2, "--tag x: no finding under the policy test lacks this tag\n"),
        (["i-0123456789abcdef0"], 2, "no such finding of i-0123456789abcdef0"),
        (["--state", "none.db"], 5, "there is no state"),
        (["--csv", "x.csv", "--json", "x.csv"], 2, "the same file"),
        (["--csv", "none/x.csv"], 5, "the directory none does not exist"),
    ],
)
def test_what_cannot_be_told_is_refused(kept, args, code, message):
    result = history(kept, *args, check=code)
    assert message in result.err
    assert not (kept / "none.db").exists()


def first_version(path):
    """Write a state as the first version did, with a finding that is open and one that is resolved."""
    with closing(sqlite3.connect(path)) as db, db:
        db.executescript(script.MIGRATIONS[0])
        db.execute(f"PRAGMA application_id = {script.APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
        db.execute(
            "INSERT INTO scans VALUES "
            "(1, 'x', 'test', 'p', 'd', '2026-02-01T00:00:00Z', '2026-02-01T00:00:00Z')"
        )
        for number, (status, *ended) in enumerate(
            [("REPEAT", None, None), ("RESOLVED", "2026-02-09T00:00:00Z", "tagged")], 1
        ):
            violations = [
                script.to_record(
                    script.Violation("Owner", script.ViolationType.MISSING, None, None, "Owner is missing")
                )
            ]
            db.execute(
                f"INSERT INTO findings VALUES ({', '.join('?' * 19)})",
                (number, "test", ACCOUNT, REGION, instance(number), "running", "2026-01-01T00:00:00Z", "{}",
                 json.dumps(violations), 1, status, "2026-02-01T00:00:00Z", "2026-02-03T00:00:00Z",
                 3, 0, *ended, "ann", None),
            )  # fmt: skip


def test_a_state_of_the_first_version_is_read_as_it_is_and_taken_over_by_the_next_scan(tmp_path):
    first_version(tmp_path / "instance_state.db")
    before = (tmp_path / "instance_state.db").read_bytes()
    (tmp_path / "policy.yaml").write_text(
        "version: 1\nname: test\nrequired_tags: [Owner]\nregions: {us-east-1: }\n"
    )
    assert ids(history(tmp_path, "--tag", "Owner", check=0)) == ["1", "2"]
    assert "2026-02-09T00:00:00Z  RESOLVED  tagged" in history(tmp_path, instance(2), check=0).out
    assert (tmp_path / "instance_state.db").read_bytes() == before
    result = scan(tmp_path, 0, {REGION: {1: {}, 2: {}}, OTHER: {}}, check=4)
    found = {f["instance_id"]: f for f in result.json("out.json")["findings"]}
    assert [found[instance(n)]["status"] for n in (1, 2)] == ["REPEAT", "REOPENED"]
    assert found[instance(1)]["created_by"] == "ann"
    story = history(tmp_path, instance(2), check=0).out
    assert [line.split()[1] for line in story.splitlines()[1:4]] == ["NEW", "RESOLVED", "REOPENED"]


def rows(directory, table):
    with closing(sqlite3.connect(directory / "instance_state.db")) as db:
        return db.execute(f"SELECT * FROM {table}").fetchall()


def standings(directory):
    with closing(sqlite3.connect(directory / "instance_state.db")) as db:
        return script.fetch_trend(db, "test"), script.fetch_standings(db, "test")


# ---- prune -------------------------------------------------------------------------------------------------


def test_prune_forgets_what_is_old_and_keeps_what_is_known(state):
    points, before = standings(state)
    dry = command(state, "prune", "--days", "15", "--dry-run", check=0)
    untouched = (state / "instance_state.db").read_bytes()
    done = command(state, "prune", "--days", "15", check=0)
    assert dry.out.replace("Would delete", "Deleted") == done.out
    assert done.out.startswith("Deleted 2 findings resolved before 2026-03-26T06:00:00Z, 1 scan ")
    assert (state / "instance_state.db").read_bytes() != untouched
    # What is open stays, and what of a region that is no longer read was known when it was.
    assert ids(history(state)) == ["3", "1"]
    after_points, after = standings(state)
    assert after == before
    assert after_points == points
    assert {row[1][:10] for row in rows(state, "trend")} == {
        "2026-03-01",
        "2026-03-11",
        "2026-03-21",
        "2026-03-31",
    }
    assert "0 findings" in command(state, "prune", "--days", "15", check=0).out


def test_prune_dry_run_changes_no_byte(state):
    before = (state / "instance_state.db").read_bytes()
    command(state, "prune", "--days", "1", "--dry-run", check=0)
    assert (state / "instance_state.db").read_bytes() == before


def test_prune_keeps_the_trend_of_every_scan(tmp_path):
    for hour, tags in enumerate([{}, GOOD, {}]):
        scan(tmp_path, hour / 24, {REGION: {1: tags}, OTHER: {2: {}}})
    before, _ = standings(tmp_path)
    changes = [(2, 2, 0, 0), (1, 0, 0, 1), (2, 0, 1, 0)]
    assert [(point.open, point.new, point.reopened, point.resolved) for point in before] == changes
    command(tmp_path, "prune", "--days", "3", check=0)
    assert standings(tmp_path)[0] == before
    assert len(rows(tmp_path, "scans")) == 1


def test_prune_keeps_the_scan_that_saw_a_finding_last(state):
    with closing(sqlite3.connect(state / "instance_state.db")) as db, db:
        db.execute("UPDATE findings SET last_scan = 1 WHERE resolved_at IS NULL")
        db.execute("DELETE FROM coverage WHERE scan = 1")
    command(state, "prune", "--days", "15", check=0)
    assert 1 in {row[0] for row in rows(state, "scans")}


def test_a_state_of_version_5_keeps_its_trend_and_its_creators(tmp_path):
    """The state and what was shown of it are from the last script that derived the trend of its scans."""
    with closing(sqlite3.connect(tmp_path / "instance_state.db")) as db:
        db.executescript((DATA / "state_5.sql").read_text())
    shown = json.loads((DATA / "state_5.json").read_text())
    script.check_state(tmp_path / "instance_state.db")
    assert rows(tmp_path, "pragma_user_version") == [(9,)]
    for policy, of_policy in shown.items():
        with closing(sqlite3.connect(tmp_path / "instance_state.db")) as db:
            trend, of = script.fetch_trend(db, policy), script.fetch_standings(db, policy)
            creators = {
                f.instance_id[-1]: f.creator for f in script.fetch_history(db, script.Selection(policy))
            }
        assert [list(astuple(point)) for point in trend] == of_policy["trend"]
        assert [[s.target.account_id, s.target.region, *astuple(s)[1:]] for s in of] == of_policy["standings"]
        assert creators == of_policy["creators"]


def test_prune_refuses_what_is_no_state(tmp_path):
    assert "there is no state" in command(tmp_path, "prune", "--days", "3", check=5).err
    (tmp_path / "instance_state.db").write_bytes(b"x" * 4096)
    assert "not a SQLite database" in command(tmp_path, "prune", "--days", "3", check=5).err
    assert (tmp_path / "instance_state.db").read_bytes() == b"x" * 4096
    command(tmp_path, "prune", "--days", "0", check=2)


def test_history_report_and_prune_of_a_state_in_s3(aws, state):
    s3 = aws.backstage("s3", REGION)
    s3.create_bucket(Bucket="ours")
    s3.put_object(Bucket="ours", Key="t.db", Body=(state / "instance_state.db").read_bytes())
    at = {"env": aws.env, "check": 0}
    assert ids(history(state, "--state", "s3://ours/t.db", **at)) == ids(history(state))
    page = command(
        state, "report", "--html", "-", "--policy", "policy.yaml", "--state", "s3://ours/t.db", **at
    )
    assert "open findings" in page.out
    done = command(state, "prune", "--days", "15", "--state", "s3://ours/t.db", **at)
    assert done.out.startswith("Deleted 2 findings")
    assert ids(history(state, "--state", "s3://ours/t.db", **at)) == ["3", "1"]


# ---- report ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def month(tmp_path_factory):
    """Thirty days of scans with drift."""
    directory = tmp_path_factory.mktemp("month") / "demo"
    assert drift.main([str(directory), "--instances", "400"]) == 0
    return directory


def test_the_page_after_a_month_says_how_it_goes_where_and_whom_to_ask(month):
    files = ("--html", "page.html", "--policy", "policy.yaml")
    command(month, "report", *files, day=(drift.NOW - START).days, check=0)
    page = (month / "page.html").read_text("utf-8")
    assert "Getting better" in page
    assert "not read" in page
    assert drift.worst_account(6) in page
    assert "for new instances (PropagateAtLaunch)" in page
    assert "torn down" in page  # an exemption that ends
    assert "Spend" in page


def test_a_report_says_where_it_is_and_what_is_open(state):
    args = ("report", "--policy", "policy.yaml", "--html")
    written = command(state, *args, "page.html", check=0)
    assert (written.out, written.err) == ("", "Wrote page.html: 2 open findings\n")
    assert command(state, *args, "page.html", "--quiet", check=0).err == ""
    page = command(state, *args, "-", check=0)
    assert page.err == ""
    assert "2 open findings" in page.out


def test_a_report_that_cannot_be_written_leaves_the_old_one(kept, state):
    (state / "page.html").write_text("old")
    args = ("report", "--policy", "policy.yaml", "--html")
    assert "the directory none does not exist" in command(state, *args, "none/page.html", check=5).err
    assert "cannot be written" in command(state, *args, "/dev/full", check=5).err
    (state / "other.yaml").write_text(
        "version: 1\nname: other\nrequired_tags: [Owner]\nregions: {us-east-1: }\n"
    )
    other = command(state, "report", "--html", "page.html", "--policy", "other.yaml", check=5)
    assert "has no scan of the policy 'other'; it has scans of 'test'" in other.err
    assert (state / "page.html").read_text() == "old"
    assert "there is no state" in command(state, *args, "page.html", "--state", "none.db", check=5).err


# ---- what it costs -----------------------------------------------------------------------------------------

PRICES = "instance_type,region,hourly_price\nm7g.large,us-east-1,0.1\nt3.micro,us-east-1,1\n"


def test_findings_carry_what_they_cost(tmp_path):
    (tmp_path / "prices.csv").write_text("\ufeff" + PRICES, encoding="utf-8")
    stopped = {"InstanceType": "t3.micro", "State": {"Name": "stopped"}}
    large, huge = ({"InstanceType": kind} for kind in ("m7g.large", "x1.32xlarge"))
    fleet = {1: ({}, large), 2: ({"Owner": "ann"}, large), 3: ({}, stopped), 4: ({}, huge)}
    result = scan(tmp_path, 0, {REGION: fleet, OTHER: {9: GOOD}}, "--prices", "prices.csv", check=3)
    report = result.json("out.json")
    costs = {finding["instance_id"][-1]: finding["monthly_cost"] for finding in report["findings"]}
    assert costs == {"1": pytest.approx(73), "2": pytest.approx(73), "3": 0, "4": None}
    assert report["monthly_cost_without"] == {"Owner": pytest.approx(73), "Project": pytest.approx(146)}
    files = ("--policy", "policy.yaml", "--instances", "fleet.json", "--prices", "prices.csv")
    summary = command(tmp_path, "scan", *files, check=3).out
    assert "73.00 a month without Owner\nleft out: 1 finding without a price\n" in summary
    assert "146.00 a month without Project" in summary
    page = command(tmp_path, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "Spend" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"type,price\n",
            "prices.csv:1: the first line must name the columns instance_type,region,hourly_price",
        ),
        (b"", "prices.csv:1: the first line must name"),
        (
            PRICES.encode() + b"m5.large,us-east-1,cheap\n",
            "prices.csv:4: 'cheap' is not a price: write it as 0.0832",
        ),
        (PRICES.encode() + b"m5.large,us-east-1\n", "prices.csv:4: '' is not a price"),
        (PRICES.encode() + b"m5.large,us-esat-1,1\n", "prices.csv:4: AWS has no region 'us-esat-1'"),
        (PRICES.encode() + b"\xff,us-east-1,1\n", "is not a CSV file in UTF-8"),
        (None, "cannot read prices.csv"),
    ],
)
def test_prices_that_cannot_be_used_are_refused_before_anything_is_read(tmp_path, text, message):
    if text is not None:
        (tmp_path / "prices.csv").write_bytes(text)
    result = scan(tmp_path, 0, {REGION: {1: {}}}, "--prices", "prices.csv", check=2)
    assert message in result.err
    assert not (tmp_path / "instance_state.db").exists()


def test_of_scans_at_the_same_time_the_latest_is_the_one_recorded_last(tmp_path):
    here = ("--region", REGION)
    scan(tmp_path, 0, {REGION: {1: {}, 2: {}}}, *here, check=3)
    scan(tmp_path, 1.01, {REGION: {1: {}, 2: {}}}, *here, check=3)
    scan(tmp_path, 1, {REGION: {1: {}, 2: GOOD}}, *here, check=3)  # it began earlier
    page = command(tmp_path, "report", "--html", "-", "--policy", "policy.yaml", check=0).out
    assert "1 open finding" in page and "latest scan 2026-03-02 06:00" in page
    assert "as last read, in" not in page and "did not read" not in page


def test_rules_that_the_policy_no_longer_has_are_not_upcoming(tmp_path):
    def page(**keys):
        rule = {"key": "Team", "effective_from": "2027-01-01"}
        save_policy(tmp_path, **{"required_tags": ["Owner", rule], "regions": {REGION: {}, OTHER: {}}} | keys)
        return command(tmp_path, "report", "--html", "-", "--policy", "policy.yaml", check=0).out

    rule = {"key": "Team", "effective_from": "2027-01-01"}
    save(tmp_path, {REGION: {1: {}}, OTHER: {2: {}}})
    save_policy(tmp_path, required_tags=["Owner", rule], regions={REGION: {}, OTHER: {}})
    run_tagcheck("scan", *SAVED_FILES, cwd=tmp_path, now=START, check=3)
    assert "Team from 2027-01-01: 2 instances" in page() or ">2<" in page().split("2027-01-01")[1][:200]
    assert ">1<" in page(regions={REGION: {}}).split("2027-01-01")[1][:200]
    later = {"key": "Team", "effective_from": "2027-02-01"}
    assert "2027-01-01" not in page(required_tags=["Owner", later])
    assert "2027-01-01" not in page(required_tags=["Owner"])
