"""State: what is remembered between scans, and that no accident costs any of it."""

import csv
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from builders import SAVED_FILES, save_fleet, save_policy
from builders import reservation as instance
from conftest import TAGCHECK, clean_environment, run_tagcheck

import tagcheck as script

ACCOUNT, OTHER_ACCOUNT = "123456789012", "012345670123"
REGION, OTHER_REGION = "us-east-1", "eu-west-1"
NOW = datetime(2026, 2, 24, 10, 30, 45, tzinfo=UTC)
SECOND, HOUR, DAY = timedelta(seconds=1), timedelta(hours=1), timedelta(days=1)
STATE = "instance_state.db"
OWNED: dict[str, str] = {"Owner": "ann"}
BARE: dict[str, str] = {}
as_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


# Complies with every policy here, and keeps fleets from being empty: of an empty one the account is unknown.
BYSTANDER = instance(0xFF, {"Owner": "bob", "Project": "x", "CostCenter": "CC-1042", "Environment": "prod"})


def query(sql, path=STATE):
    with closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


def outcome(report, number=1, *, region=REGION, account=ACCOUNT):
    """What a report says has become of an instance: `NEW`, `RESOLVED gone`, or `-` for nothing."""
    key = (account, region, f"i-{number:017x}")
    found = [
        " ".join(filter(None, (entry["status"], entry.get("resolution"))))
        for entry in report["findings"] + report["resolved"]
        if (entry["account_id"], entry["region"], entry["instance_id"]) == key
    ]
    return ", ".join(found) or "-"


@pytest.fixture
def scan(tmp_path, monkeypatch):
    """Scan saved instances at a time of the test's choice, and give the JSON report."""
    monkeypatch.chdir(tmp_path)

    def run(*reservations, now=NOW, policy=BARE, args=(), **answer):
        save_fleet(tmp_path, *reservations, **answer)
        save_policy(tmp_path, **policy)
        result = run_tagcheck("scan", "-q", *SAVED_FILES, "--json", "out.json", *args, cwd=tmp_path, now=now)
        report = result.json("out.json")
        assert (report["exit_code"], report["started_at"]) == (result.code, script.utc_text(now))
        return report

    return run


def start(cwd, *args, **options):
    """Start the script without waiting for its end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, TAGCHECK, "scan", "-q", "--policy", "policy.yaml", *args]
    return subprocess.Popen(command, cwd=cwd, env=clean_environment(cwd), text=True, **pipes | options)


def limited(size):
    """Let no file of a process grow beyond a size, as on a disk that is full."""
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}


def finish(process):
    """Wait for the end, and give exit code and stderr."""
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, err


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            pytest.fail("waited in vain")
        time.sleep(0.001)


def is_locked(path, sql):
    """Tell whether others are kept from this; in another process, as SQLite shares locks within one."""
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute(sys.argv[2]).fetchone()"
    run = subprocess.run([sys.executable, "-ISc", code, path, sql], capture_output=True, text=True)
    return "database is locked" in run.stderr


# ---- The life of a finding ---------------------------------------------------------------------------------


class Step(NamedTuple):
    """One scan of a history: what is there, and what is to come of it."""

    outcome: str
    tags: dict[str, str] | None = BARE  # None: the instance is not there
    policy: Mapping[str, Any] = MappingProxyType({})
    age: timedelta = 30 * DAY  # since the last launch
    state: str = "running"


def asks_for(*required_tags):
    return {"required_tags": required_tags}


ENVIRONMENT = asks_for({"key": "Environment", "values": ["dev", "prod"]})
WIDENED = asks_for({"key": "Environment", "values": ["dev", "prod", "prd"]})
PATTERN = asks_for({"key": "CostCenter", "pattern": "CC-[0-9]{4}"})
TWO = asks_for("Owner", "Project")
PLACEHOLDER = {"placeholder_values": ["tbd"]}
GRACE = {"grace_period": "2h"}
WRONG = {"Environment": "prd"}


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([Step("-", OWNED), Step("-", OWNED)], id="compliant is no finding"),
        pytest.param([Step("NEW"), Step("REPEAT"), Step("REPEAT")], id="open"),
        pytest.param(
            [
                Step("NEW"),
                Step("RESOLVED tagged", OWNED),
                Step("-", OWNED),
                Step("REOPENED"),
                Step("REPEAT"),
                Step("RESOLVED tagged", OWNED),
                Step("REOPENED"),
            ],
            id="put right and back, twice",
        ),
        pytest.param(
            [Step("NEW"), Step("RESOLVED gone", None), Step("-", None), Step("REOPENED")], id="gone and back"
        ),
        pytest.param([Step("NEW"), Step("RESOLVED gone", state="terminated")], id="terminated"),
        pytest.param(
            [
                Step("NEW", state="stopped"),
                Step("RESOLVED gone", state="stopped", policy={"states": ["running"]}),
            ],
            id="its state is no longer looked at",
        ),
        pytest.param(
            [
                Step("NEW"),
                Step("RESOLVED policy_changed", {"Project": "x"}, asks_for("Project")),
                Step("REOPENED", {"Project": "x"}),
            ],
            id="no longer asked for, and asked for again",
        ),
        pytest.param(
            [
                Step("NEW", {"Owner": "", "Project": "x"}),
                Step("RESOLVED policy_changed", {"Owner": "", "Project": "x"}, asks_for("Project")),
            ],
            id="empty, and no longer asked for",
        ),
        pytest.param(
            [Step("NEW", WRONG, ENVIRONMENT), Step("RESOLVED policy_changed", WRONG, WIDENED)],
            id="the same wrong value is allowed now",
        ),
        pytest.param(
            [
                Step("NEW", {"CostCenter": "x"}, PATTERN),
                Step("RESOLVED policy_changed", {"CostCenter": "x"}, asks_for("CostCenter")),
            ],
            id="any value will do now",
        ),
        pytest.param(
            [Step("NEW", {"Owner": "tbd"}, PLACEHOLDER), Step("RESOLVED policy_changed", {"Owner": "tbd"})],
            id="its value is no placeholder any more",
        ),
        pytest.param(
            [Step("NEW", WRONG, ENVIRONMENT), Step("RESOLVED tagged", {"Environment": "prod"}, WIDENED)],
            id="put right although more is allowed now",
        ),
        pytest.param(
            [Step("NEW"), Step("RESOLVED tagged", OWNED | {"Project": "x"}, asks_for("Project"))],
            id="put right although no longer asked for",
        ),
        pytest.param(
            [Step("NEW", BARE, TWO), Step("RESOLVED policy_changed", OWNED, asks_for("Owner"))],
            id="one put right and the other no longer asked for",
        ),
        pytest.param([Step("NEW", BARE, TWO), Step("REPEAT", OWNED, TWO)], id="put right in part"),
        pytest.param(
            [Step("-", age=2 * HOUR - SECOND, policy=GRACE), Step("NEW", age=2 * HOUR, policy=GRACE)],
            id="too young until the grace period is over",
        ),
        pytest.param(
            [Step("-", age=HOUR, policy=GRACE), Step("-", OWNED, age=3 * HOUR, policy=GRACE)],
            id="tagged within the grace period",
        ),
        pytest.param(
            [Step("NEW", policy=GRACE), Step("REPEAT", age=HOUR, policy=GRACE)],
            id="restarted while open stays open however young",
        ),
        pytest.param(
            [Step("NEW", policy=GRACE), Step("RESOLVED tagged", OWNED, age=HOUR, policy=GRACE)],
            id="restarted and put right",
        ),
        pytest.param(
            [
                Step("NEW", policy=GRACE),
                Step("RESOLVED gone", None, policy=GRACE),
                Step("-", age=HOUR, policy=GRACE),
                Step("REOPENED", age=DAY, policy=GRACE),
            ],
            id="resolved and back too young",
        ),
        pytest.param([Step("-", age=-HOUR, policy=GRACE)], id="launched in the future"),
    ],
)
def test_life_of_a_finding(scan, steps):
    seen = []
    for day, step in enumerate(steps):
        now = NOW + day * DAY
        there = (
            [] if step.tags is None else [instance(1, step.tags, launched=now - step.age, state=step.state)]
        )
        report = scan(*there, BYSTANDER, policy=step.policy, now=now)
        assert (day, outcome(report)) == (day, step.outcome)
        seen += [script.utc_text(now)] if step.outcome in ("NEW", "REPEAT", "REOPENED") else []
    reopened = sum(step.outcome == "REOPENED" for step in steps)
    kept = query("SELECT first_seen, last_seen, times_seen, times_reopened FROM findings")
    assert kept == ([(seen[0], seen[-1], len(seen), reopened)] if seen else [])


def test_resolved_finding_says_when(scan):
    scan(instance(1), BYSTANDER)
    (resolved,) = scan(instance(1, OWNED), BYSTANDER, now=NOW + DAY)["resolved"]
    assert (resolved["resolved_at"], resolved["last_seen"]) == (
        "2026-02-25T10:30:45Z",
        "2026-02-24T10:30:45Z",
    )
    (reopened,) = scan(instance(1), BYSTANDER, now=NOW + 2 * DAY)["findings"]
    assert query("SELECT resolved_at, resolution FROM findings") == [(None, None)]
    assert reopened["first_seen"] == "2026-02-24T10:30:45Z"


def test_open_finding_shows_what_is_wrong_now(scan):
    scan(instance(1, {"Name": "old"}), BYSTANDER, policy=TWO)
    (finding,) = scan(instance(1, {"Name": "new", "Owner": "ann"}, state="stopped"), BYSTANDER, policy=TWO)[
        "findings"
    ]
    assert [violation["tag_key"] for violation in finding["violations"]] == ["Project"]
    assert (finding["name"], finding["state"]) == ("new", "stopped")


# ---- Whose finding it is -----------------------------------------------------------------------------------

BOTH_REGIONS = {"regions": {REGION: {}, OTHER_REGION: {}}}


def test_same_id_elsewhere_is_another_finding(scan):
    places = [
        (ACCOUNT, REGION),
        (ACCOUNT, OTHER_REGION),
        (OTHER_ACCOUNT, REGION),
        (OTHER_ACCOUNT, OTHER_REGION),
    ]
    fleet = [instance(1, BARE, account=account, region=region) for account, region in places]
    scan(*fleet[:1], policy=BOTH_REGIONS)
    report = scan(*fleet, policy=BOTH_REGIONS, now=NOW + DAY)
    found = [outcome(report, account=account, region=region) for account, region in places]
    assert found == ["REPEAT", "NEW", "NEW", "NEW"]
    assert query("SELECT count(*) FROM findings") == [(4,)]


def test_policies_share_a_state(scan):
    owner, project = {"name": "owner"}, {"name": "project", **asks_for("Project")}
    assert outcome(scan(instance(1), BYSTANDER, policy=owner)) == "NEW"
    assert outcome(scan(instance(1), BYSTANDER, policy=project)) == "NEW"
    report = scan(instance(1, {"Project": "x"}), BYSTANDER, policy=project)
    assert (outcome(report), len(report["resolved"])) == ("RESOLVED tagged", 1)
    (finding,) = scan(instance(1), BYSTANDER, policy=owner)["findings"]
    assert (finding["status"], finding["times_seen"]) == ("REPEAT", 2)


def test_policy_is_known_by_its_name_whatever_its_file(scan, tmp_path):
    scan(instance(1), BYSTANDER)
    save_policy(tmp_path / "moved.yaml")
    assert outcome(scan(instance(1), BYSTANDER, args=["--policy", "moved.yaml"])) == "REPEAT"


# ---- Only what was read in full resolves anything ----------------------------------------------------------

ELSEWHERE = instance(2, BARE, region=OTHER_REGION)


@pytest.mark.parametrize(
    ("fleet", "answer", "args", "code"),
    [
        pytest.param([BYSTANDER], {}, ["--region", REGION], 0, id="narrowed to another region"),
        pytest.param([BYSTANDER], {}, [], 4, id="the file has nothing of the region"),
        pytest.param(
            [BYSTANDER, instance(3, OWNED, region=OTHER_REGION)],
            {"NextToken": "x"},
            [],
            4,
            id="more pages follow",
        ),
        pytest.param(
            [BYSTANDER],
            {"NextToken": "x"},
            ["--region", REGION, "--region", OTHER_REGION],
            4,
            id="the region may be on the pages that follow",
        ),
        pytest.param(
            [],
            {"NextToken": "x"},
            ["--region", OTHER_REGION, "--account", ACCOUNT],
            4,
            id="an empty page and more that follow",
        ),
        pytest.param(
            [
                instance(3, OWNED, account=OTHER_ACCOUNT, region=OTHER_REGION),
                instance(4, OWNED, account=OTHER_ACCOUNT),
            ],
            {},
            [],
            0,
            id="another account",
        ),
    ],
)
def test_target_that_was_not_read_keeps_its_findings(scan, fleet, answer, args, code):
    kept = f"SELECT * FROM findings WHERE region = '{OTHER_REGION}'"
    scan(BYSTANDER, ELSEWHERE, policy=BOTH_REGIONS)
    before = query(kept)
    report = scan(*fleet, policy=BOTH_REGIONS, args=args, now=NOW + DAY, **answer)
    assert (report["exit_code"], report["findings"], report["resolved"]) == (code, [], [])
    assert query(kept) == before
    (finding,) = scan(BYSTANDER, ELSEWHERE, policy=BOTH_REGIONS, now=NOW + 2 * DAY)["findings"]
    assert (finding["status"], finding["times_seen"]) == ("REPEAT", 2)


def test_findings_of_an_unread_target_are_not_recorded(scan):
    report = scan(instance(1), NextToken="x")
    assert (report["exit_code"], report["findings"]) == (4, [])
    assert query("SELECT status, error_code, instances, findings FROM coverage") == [
        ("unread", "Truncated", 0, 0)
    ]
    assert query("SELECT * FROM findings") == []


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([[instance(1), BYSTANDER, instance(1)]], id="in one file"),
        pytest.param([[instance(1)], [BYSTANDER, instance(1)]], id="in two files"),
    ],
)
def test_instance_on_two_pages_is_one(scan, tmp_path, files):
    for number, reservations in enumerate(files):
        save_fleet(tmp_path / f"page{number}.json", *reservations)
    pages = [arg for number in range(1, len(files)) for arg in ("--instances", f"page{number}.json")]
    report = scan(*files[0], policy=TWO, args=pages)
    assert (report["summary"]["instances"], report["summary"]["compliant"]) == (2, 1)
    (finding,) = report["findings"]
    assert (finding["times_seen"], finding["violations"][0]["tag_key"]) == (1, "Owner")


# ---- Clocks ------------------------------------------------------------------------------------------------

CEST, CET = timezone(2 * HOUR), timezone(HOUR)


@pytest.mark.parametrize(
    ("moments", "first", "last"),
    [
        pytest.param([NOW, NOW, NOW], NOW, NOW, id="three scans in a second"),
        pytest.param([NOW, NOW - DAY, NOW - 2 * DAY], NOW, NOW, id="the clock goes back"),
        pytest.param(
            [NOW, NOW - DAY, NOW + HOUR], NOW, NOW + HOUR, id="the clock goes back and is put right"
        ),
        pytest.param(
            [datetime(2026, 10, 25, 2, 30, tzinfo=CEST), datetime(2026, 10, 25, 2, 15, tzinfo=CET)],
            datetime(2026, 10, 25, 0, 30, tzinfo=UTC),
            datetime(2026, 10, 25, 1, 15, tzinfo=UTC),
            id="the hour that summer time ends in comes twice",
        ),
    ],
)
def test_counters_do_not_depend_on_the_clock(scan, moments, first, last):
    outcomes = [outcome(scan(instance(1), BYSTANDER, now=moment)) for moment in moments]
    assert outcomes == ["NEW"] + ["REPEAT"] * (len(moments) - 1)
    kept = query("SELECT first_seen, last_seen, times_seen, times_reopened FROM findings")
    assert kept == [(script.utc_text(first), script.utc_text(last), len(moments), 0)]


def test_finding_resolves_and_reopens_while_the_clock_goes_back(scan):
    fleets = [instance(1), instance(1, OWNED), instance(1), instance(1)]
    outcomes = [outcome(scan(fleet, BYSTANDER, now=NOW - day * DAY)) for day, fleet in enumerate(fleets)]
    assert outcomes == ["NEW", "RESOLVED tagged", "REOPENED", "REPEAT"]
    assert query("SELECT times_seen, times_reopened FROM findings") == [(3, 1)]


def test_times_are_utc_in_every_time_zone(tagcheck, tmp_path):
    save_fleet(tmp_path / "fleet.json", instance(1))
    save_policy(tmp_path / "policy.yaml")
    for count, zone in enumerate(("UTC", "EAST-14", "WEST12"), 1):
        before = script.utc_text(datetime.now(UTC))
        run = tagcheck(
            *("scan", "--policy", "policy.yaml", "--instances", "fleet.json", "--json", "-"), env={"TZ": zone}
        )
        (finding,) = run.json("-")["findings"]
        assert before <= finding["last_seen"] <= script.utc_text(datetime.now(UTC))
        assert finding["times_seen"] == count
        assert finding["launch_time"] == "2026-02-24T10:30:45Z"


# ---- The older tool's table --------------------------------------------------------------------------------

FLAGGED_INSTANCES = """
    CREATE TABLE flagged_instances (
        id INTEGER PRIMARY KEY AUTOINCREMENT, instance_id TEXT UNIQUE NOT NULL,
        first_seen TIMESTAMP DEFAULT CURRENT_TIMESTAMP, last_seen TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
        missing_tags TEXT NOT NULL, is_active INTEGER DEFAULT 1
    )
"""


def save_older_state(path, *rows):
    """Write a database of the older tool: (number of the instance, first_seen, is_active)."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(FLAGGED_INSTANCES)
        db.executemany(
            "INSERT INTO flagged_instances (instance_id, first_seen, missing_tags, is_active) "
            "VALUES (?, ?, 'Owner', ?)",
            [(f"i-{number:017x}", first_seen, is_active) for number, first_seen, is_active in rows],
        )


LONG_AGO = "2025-03-30 01:30:00"


@pytest.mark.parametrize(
    ("first_seen", "is_active", "fleets", "outcomes", "kept"),
    [
        pytest.param(
            LONG_AGO,
            1,
            [BARE, BARE],
            ["REPEAT", "REPEAT"],
            ("2025-03-30T01:30:00Z", 3, 0),
            id="active is open",
        ),
        pytest.param(
            LONG_AGO,
            0,
            [BARE, BARE],
            ["REOPENED", "REPEAT"],
            ("2025-03-30T01:30:00Z", 3, 1),
            id="not active was resolved",
        ),
        pytest.param(
            LONG_AGO,
            1,
            [OWNED, BARE],
            ["-", "REOPENED"],
            ("2025-03-30T01:30:00Z", 2, 1),
            id="active, put right, and back",
        ),
        pytest.param(
            "last tuesday", 1, [BARE], ["REPEAT"], ("2026-02-24T10:30:45Z", 2, 0), id="first_seen is no time"
        ),
        pytest.param(None, 1, [BARE], ["REPEAT"], ("2026-02-24T10:30:45Z", 2, 0), id="no first_seen"),
        pytest.param(
            LONG_AGO,
            None,
            [BARE],
            ["REOPENED"],
            ("2025-03-30T01:30:00Z", 2, 1),
            id="nobody knows whether active",
        ),
    ],
)
def test_older_state_is_taken_over(scan, first_seen, is_active, fleets, outcomes, kept):
    save_older_state(STATE, (1, first_seen, is_active))
    reports = [scan(instance(1, tags), BYSTANDER, now=NOW + day * DAY) for day, tags in enumerate(fleets)]
    assert [outcome(report) for report in reports] == outcomes
    assert query("SELECT first_seen, times_seen, times_reopened FROM findings") == [kept]


def test_older_state_keeps_what_was_not_found_again(scan):
    save_older_state(STATE, (1, LONG_AGO, 1), (2, LONG_AGO, 1))
    scan(instance(1), BYSTANDER)
    assert query("SELECT instance_id FROM flagged_instances") == [("i-00000000000000002",)]


OLDER_TABLE = "SELECT * FROM flagged_instances"


@pytest.fixture
def older(tmp_path):
    """Save an older state whose instances are all to be found again, and give its directory."""
    save_older_state(tmp_path / STATE, *((number, LONG_AGO, 1) for number in range(200)))
    save_fleet(tmp_path / "fleet.json", *map(instance, range(200)))
    save_policy(tmp_path / "policy.yaml")
    return tmp_path


def check_older_state(cwd, table):
    """Check that nothing happened to an older state, and that it can be taken over still."""
    state = cwd / STATE
    assert query("PRAGMA integrity_check", state) == [("ok",)]
    tables = query("SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite%'", state)
    assert tables == [("flagged_instances",)]
    assert (query(OLDER_TABLE, state), query("PRAGMA user_version", state)) == (table, [(0,)])
    assert finish(start(cwd, "--instances", "fleet.json"))[0] == 3
    assert query("SELECT DISTINCT status, times_seen FROM findings", state) == [("REPEAT", 2)]


def test_kill_in_the_migration_leaves_the_older_state_whole(older):
    table = query(OLDER_TABLE, older / STATE)
    with closing(sqlite3.connect(older / STATE, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute(OLDER_TABLE).fetchone()  # while this reads, the migration begins but cannot commit
        migration = start(older, "--instances", "fleet.json")
        wait_until(lambda: is_locked(older / STATE, "BEGIN IMMEDIATE"))
        migration.kill()
        migration.communicate()
    check_older_state(older, table)


def test_full_disk_in_the_migration_leaves_the_older_state_whole(older):
    table, size = query(OLDER_TABLE, older / STATE), (older / STATE).stat().st_size
    full = start(
        older, "--instances", "fleet.json", **limited(size + 2 * 4096)
    )  # room for some of the tables
    assert finish(full)[0] == 5
    check_older_state(older, table)


# ---- A state that cannot be used is refused as it is -------------------------------------------------------


def page_of(path, table, kind):
    """Find a page of a table or index that holds rows: its offset in the file, and the size of a page."""
    content = path.read_bytes()
    size = int.from_bytes(content[16:18], "big")
    (root,) = query(f"SELECT rootpage FROM sqlite_master WHERE name = '{table}'", path)[0]
    page = (root - 1) * size
    while content[page] != kind:  # go down by the first child: interior pages point to others
        cell = page + int.from_bytes(content[page + 12 : page + 14], "big")
        page = (int.from_bytes(content[cell : cell + 4], "big") - 1) * size
    return page, size


TABLE_LEAF, INDEX_LEAF = 0x0D, 0x0A
INDEX = "sqlite_autoindex_findings_1"


def change(path, offset, length):
    content = bytearray(path.read_bytes())
    content[offset : offset + length] = bytes(byte ^ 0xFF for byte in content[offset : offset + length])
    path.write_bytes(content)


def rot_page_header(path):
    change(path, page_of(path, "findings", TABLE_LEAF)[0], 8)


def rot_cell_pointers(path):
    change(path, page_of(path, "findings", TABLE_LEAF)[0] + 8, 16)


def rot_sector(path):
    """Lose 512 bytes in the middle of a page, as a disk does."""
    page, size = page_of(path, "findings", TABLE_LEAF)
    content = path.read_bytes()
    path.write_bytes(content[: page + size // 2] + bytes(512) + content[page + size // 2 + 512 :])


def rot_index(path):
    """Flip the letters of a key in the index: the table still is whole."""
    page, size = page_of(path, INDEX, INDEX_LEAF)
    change(path, path.read_bytes().index(b"i-0", page, page + size), 8)


def rot_text(path):
    """Flip letters within the rows' texts, which no check of SQLite's finds."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b'[{"tag_key"', b"[{\xff\xfetag_key"))


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def empty(path):
    path.write_bytes(b"")


def write_text(path):
    path.write_text("Owner,CostCenter\n" * 1000)


def write_little(path):
    path.write_text("x")


def make_directory(path):
    path.unlink()
    path.mkdir()


def use(*statements):
    """Let another program, or another version of ours, write the database."""

    def write(path):
        with closing(sqlite3.connect(path)) as db, db:
            for statement in statements:
                db.execute(statement)

    return write


def instead(write):
    """Put another file in the place of the state."""

    def replace(path):
        path.unlink()
        write(path)

    return replace


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Give a directory in which a scan has found much, to copy."""
    cwd = tmp_path_factory.mktemp("filled")
    save_fleet(cwd / "fleet.json", *map(instance, range(300)))
    save_policy(cwd / "policy.yaml")
    assert finish(start(cwd, "--instances", "fleet.json"))[0] == 3
    return cwd


RESTORE = "restore it from a backup"
NO_STATE = "name the right one with --state; if it is the right one, restore it from a backup"
ANOTHER = "another program's database: name the right one with --state"


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["scan", "dry run"])
@pytest.mark.parametrize(
    ("spoil", "way_out"),
    [
        pytest.param(empty, RESTORE, id="zero length"),
        pytest.param(write_little, NO_STATE, id="one byte"),
        pytest.param(write_text, NO_STATE, id="a text"),
        pytest.param(cut(90), NO_STATE, id="cut within the header"),
        pytest.param(cut(4096), RESTORE, id="cut after the first page"),
        pytest.param(cut(60_000), RESTORE, id="cut within a page"),
        pytest.param(rot_page_header, RESTORE, id="rot in a page's header"),
        pytest.param(rot_cell_pointers, RESTORE, id="rot in a page's pointers"),
        pytest.param(rot_sector, RESTORE, id="rot of a sector"),
        pytest.param(rot_index, RESTORE, id="rot in the index"),
        pytest.param(rot_text, RESTORE, id="rot in a text"),
        pytest.param(use("PRAGMA user_version = 999"), "use that one", id="of a newer version"),
        pytest.param(instead(use("CREATE TABLE moz_places (id)")), ANOTHER, id="another program's"),
        pytest.param(
            instead(use("CREATE TABLE t (id)", "PRAGMA application_id = 1196444487")),
            ANOTHER,
            id="a GeoPackage",
        ),
        pytest.param(instead(use("PRAGMA user_version = 1")), ANOTHER, id="another program's without tables"),
        pytest.param(
            instead(use("CREATE TABLE flagged_instances (flag TEXT)")),
            ANOTHER,
            id="another's flagged_instances",
        ),
        pytest.param(make_directory, "name a file with --state", id="a directory"),
        pytest.param(link_to_itself, "--state", id="a link to itself"),
    ],
)
def test_unusable_state_is_refused_untouched(filled, tmp_path, spoil, way_out, options):
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    state = tmp_path / STATE
    spoil(state)
    before = state.read_bytes() if state.is_file() else None
    files = sorted(path.name for path in tmp_path.iterdir())
    old_csv = (tmp_path / "violators.csv").read_bytes()
    save_fleet(tmp_path / "fleet.json", BYSTANDER)  # so that what is remembered is read: all is resolved
    message = run_tagcheck("scan", "-q", *SAVED_FILES, *options, cwd=tmp_path, check=5).err
    assert way_out in message
    assert str(state) in message
    assert (state.read_bytes() if state.is_file() else None) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert (tmp_path / "violators.csv").read_bytes() == old_csv


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["scan", "dry run"])
@as_root
def test_unreadable_state_is_refused(tagcheck, tmp_path, options):
    save_fleet(tmp_path / "fleet.json", instance(1))
    save_policy(tmp_path / "policy.yaml")
    command = ["scan", "--policy", "policy.yaml", "--instances", "fleet.json", "-q"]
    tagcheck(*command, check=3)
    (tmp_path / STATE).chmod(0)
    assert "permissions" in tagcheck(*command, *options, check=5).err


@as_root
def test_state_in_a_read_only_directory_is_refused(tagcheck, tmp_path):
    save_fleet(tmp_path / "fleet.json", instance(1))
    save_policy(tmp_path / "policy.yaml")
    place = tmp_path / "place"
    place.mkdir(mode=0o500)
    command = ["scan", "--policy", "policy.yaml", "--instances", "fleet.json", "--state", "place/state.db"]
    assert "--state" in tagcheck(*command, check=5).err
    assert list(place.iterdir()) == []


def test_state_in_a_missing_directory_is_refused(tagcheck, tmp_path):
    save_fleet(tmp_path / "fleet.json", instance(1))
    save_policy(tmp_path / "policy.yaml")
    command = ["scan", "--policy", "policy.yaml", "--instances", "fleet.json", "--state", "nowhere/state.db"]
    run = tagcheck(*command, check=5)
    assert "nowhere" in run.err
    assert "--state" in run.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.json", "policy.yaml"]


# ---- The file ----------------------------------------------------------------------------------------------


def test_layout_can_be_read_by_any_client(scan):
    scan(instance(1), BYSTANDER)
    tables = {name for (name,) in query("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables >= {"scans", "coverage", "findings"}
    assert query("PRAGMA application_id") == [(int.from_bytes(b"tagc", "big"),)]
    assert query("PRAGMA user_version") == [(len(script.MIGRATIONS),)]
    assert query("PRAGMA journal_mode") == [("delete",)]
    ((policy, started_at, violations),) = query(
        "SELECT scans.policy, started_at, violations FROM findings JOIN scans ON scans.id = last_scan"
    )
    assert (policy, started_at) == ("test", "2026-02-24T10:30:45Z")
    assert json.loads(violations)[0]["type"] == "missing"
    columns = "account_id, region, status, instances, compliant, findings, new, repeat, reopened, resolved"
    assert query(f"SELECT {columns} FROM coverage") == [(ACCOUNT, REGION, "read", 2, 1, 1, 1, 0, 0, 0)]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_new_state_is_its_owners_alone(scan, mask):
    former = os.umask(mask)
    try:
        scan(instance(1))
    finally:
        os.umask(former)
    assert Path(STATE).stat().st_mode & 0o777 == 0o600


def test_linked_state(scan, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    true_state = tmp_path / "elsewhere" / "true.db"
    scan(instance(1), args=["--state", str(true_state)])
    Path(STATE).symlink_to(true_state)
    assert outcome(scan(instance(1))) == "REPEAT"
    assert Path(STATE).is_symlink()
    assert query("SELECT count(*) FROM findings", true_state) == [(1,)]


@pytest.mark.parametrize("name", ["a state?mode=ro#%41.db", "état.db", "a;b'c\".db", "new\nline.db"])
def test_state_may_have_any_name(scan, name):
    scan(instance(1), args=["--state", name])
    assert outcome(scan(instance(1), args=["--state", name])) == "REPEAT"
    assert Path(name).is_file()


@pytest.mark.parametrize("older", [False, True], ids=["of this tool", "of the older tool"])
def test_dry_run_compares_and_writes_nothing(scan, older):
    if older:
        save_older_state(STATE, (1, LONG_AGO, 1))
    else:
        scan(instance(1), instance(3), BYSTANDER)
    before = Path(STATE).read_bytes(), Path(STATE).stat().st_mtime_ns
    files = set(os.listdir()) | {"fleet.json", "policy.yaml", "out.json"}
    for _ in range(2):
        report = scan(instance(1), instance(2), instance(3, OWNED), now=NOW + DAY, args=["--dry-run"])
        outcomes = [outcome(report, number) for number in (1, 2, 3)]
        assert outcomes == ["REPEAT", "NEW", "-" if older else "RESOLVED tagged"]
        assert report["dry_run"] is True
    assert (Path(STATE).read_bytes(), Path(STATE).stat().st_mtime_ns) == before
    assert set(os.listdir()) == files


def test_dry_run_creates_no_state(scan):
    assert outcome(scan(instance(1), args=["--dry-run"])) == "NEW"
    assert not Path(STATE).exists()


# ---- Many at once, and ends before the end -----------------------------------------------------------------

FLEET = [instance(number, {"Name": "n" * 250, "Note": "x" * 250}) for number in range(1500)]
FILES = ["--instances", "fleet.json", "--json", "out.json"]


@pytest.fixture
def fleet(tmp_path):
    """Save a fleet whose findings are more than SQLite holds in memory, and give its directory."""
    save_fleet(tmp_path / "fleet.json", *FLEET)
    save_policy(tmp_path / "policy.yaml")
    return tmp_path


def check_outputs(cwd):
    """Check that the reports are whole, and give the number of the scan that each is of."""
    with (cwd / "violators.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    report = json.loads((cwd / "out.json").read_text())
    assert (len(rows), len(report["findings"])) == (len(FLEET), len(FLEET))
    (csv_times_seen,) = {int(row["TimesSeen"]) for row in rows}
    (json_times_seen,) = {finding["times_seen"] for finding in report["findings"]}
    return csv_times_seen, json_times_seen


def check_state(cwd):
    """Check that every recorded scan is in the state as a whole, and give their number."""
    state = cwd / STATE
    assert query("PRAGMA integrity_check", state) == [("ok",)]
    ((scans,),) = query("SELECT count(*) FROM scans", state)
    assert query("SELECT count(*), sum(findings) FROM coverage", state) == [(scans, scans * len(FLEET))]
    assert query("SELECT times_seen, count(*) FROM findings GROUP BY 1", state) == [(scans, len(FLEET))]
    return scans


def leftovers(cwd):
    return {path.name for path in cwd.iterdir()} - {
        "fleet.json",
        "policy.yaml",
        "out.json",
        "violators.csv",
        STATE,
    }


@pytest.fixture
def begin(fleet):
    """Start a scan, and give it and the pipe that it has begun to read its instances from."""
    pipe = fleet.with_name(f"{fleet.name}-pipe")
    os.mkfifo(pipe)

    def has_reader():
        nonlocal handle
        with suppress(OSError):
            handle = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        return handle

    def run():
        nonlocal handle
        handle = 0
        process = start(fleet, *FILES[2:], "--instances", pipe)
        wait_until(has_reader)
        os.set_blocking(handle, True)
        return process, open(handle, "wb")

    handle = 0
    return run


def feed(cwd, pipe):
    """Give a scan the fleet that it waits for."""
    with pipe:
        pipe.write((cwd / "fleet.json").read_bytes())


def test_scans_at_once_are_all_counted(fleet):
    scans = [start(fleet, *FILES) for _ in range(4)]
    assert [finish(process) for process in scans] == [(3, "")] * 4
    assert check_state(fleet) == 4
    check_outputs(fleet)
    assert leftovers(fleet) == set()


def test_scan_waits_for_another_that_records(fleet, begin):
    assert finish(start(fleet, *FILES))[0] == 3
    with closing(sqlite3.connect(fleet / STATE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        process, pipe = begin()
        feed(fleet, pipe)
        time.sleep(2)
        assert process.poll() is None
        other.execute("ROLLBACK")
    assert finish(process)[0] == 3
    assert check_state(fleet) == 2


def test_kill_at_any_moment_costs_nothing(fleet):
    begun = time.monotonic()
    assert finish(start(fleet, *FILES))[0] == 3
    duration = time.monotonic() - begun
    chance, scans, journals = random.Random(30), 1, 0
    journal = fleet / f"{STATE}-journal"
    for number in range(30):
        process = start(fleet, *FILES)
        if number % 2:
            wait_until(lambda: journal.exists() or process.poll() is not None)  # noqa: B023
            time.sleep(chance.uniform(0, duration / 4))
        else:
            time.sleep(duration * number / 30)
        process.kill()
        finish(process)
        journals += journal.exists()
        recorded = check_state(fleet)
        assert recorded - scans in ([1] if process.returncode == 3 else [0, 1])
        scans = recorded
        assert max(check_outputs(fleet)) <= scans
    assert journals  # else no run was killed while it recorded
    assert finish(start(fleet, *FILES))[0] == 3
    assert (check_state(fleet), check_outputs(fleet)) == (scans + 1, (scans + 1, scans + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("while_it", ["reads", "waits to record"])
def test_interrupted_scan_records_nothing(fleet, begin, number, while_it):
    assert finish(start(fleet, *FILES))[0] == 3
    before = {path.name: path.read_bytes() for path in fleet.iterdir()}
    with closing(sqlite3.connect(fleet / STATE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        process, pipe = begin()
        if while_it == "reads":
            process.send_signal(number)
            pipe.close()  # a signal just before the system call that reads would wait for its end
        else:
            feed(fleet, pipe)
            process.send_signal(number)
        other.execute("ROLLBACK")
    code, err = finish(process)
    assert (code, err) == (130, "tagcheck: interrupted; nothing was recorded\n")
    assert {path.name: path.read_bytes() for path in fleet.iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_at_any_moment_is_obeyed_or_late(fleet, begin, number):
    assert finish(start(fleet, *FILES))[0] == 3
    chance, scans = random.Random(number), 1
    for moment in ["after a while", "as it writes", "when all is written"] * 4:
        published = (fleet / "out.json").stat().st_ino
        process, pipe = begin()
        feed(fleet, pipe)
        if moment == "after a while":
            time.sleep(chance.uniform(0, 0.3))
        elif moment == "as it writes":
            wait_until(lambda: leftovers(fleet) or process.poll() is not None)  # noqa: B023
        else:
            wait_until(lambda: (fleet / "out.json").stat().st_ino != published)  # noqa: B023
        process.send_signal(number)
        code, err = finish(process)
        assert (code, err) in [(3, ""), (130, "tagcheck: interrupted; nothing was recorded\n")]
        scans += code == 3
        assert (check_state(fleet), check_outputs(fleet)) == (scans, (scans, scans))
        assert leftovers(fleet) == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_signal_in_the_last_moment_lets_state_and_reports_agree(fleet, number):
    assert finish(start(fleet, *FILES))[0] == 3
    with closing(sqlite3.connect(fleet / STATE, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM scans").fetchone()
        process = start(fleet, *FILES)
        # A transaction that waits for readers to end lets no new one in.
        wait_until(lambda: is_locked(fleet / STATE, "SELECT * FROM scans"))
        process.send_signal(number)
    assert finish(process)[0] == 3
    assert (check_state(fleet), check_outputs(fleet)) == (2, (2, 2))
    assert leftovers(fleet) == set()


@pytest.mark.parametrize(
    ("limit", "blamed"),
    [
        pytest.param(100_000, "--csv violators.csv", id="the CSV"),
        pytest.param(1_300_000, STATE, id="the state"),
    ],
)
def test_full_disk_costs_nothing(fleet, limit, blamed):
    (fleet / "violators.csv").write_text("old")
    full = finish(start(fleet, "--instances", "fleet.json", **limited(limit)))
    assert full[0] == 5
    assert blamed in full[1]
    assert (fleet / "violators.csv").read_text() == "old"
    assert query("SELECT * FROM scans", fleet / STATE) == query("SELECT * FROM findings", fleet / STATE) == []
    assert leftovers(fleet) == set()
    assert finish(start(fleet, *FILES))[0] == 3
    assert (check_state(fleet), check_outputs(fleet)) == (1, (1, 1))


def test_full_temporary_directory_costs_nothing(fleet):
    notes = {f"Note{number}": "x" * 250 for number in range(6)}
    save_fleet(fleet / "fleet.json", *(instance(number, notes) for number in range(2500)))
    code, err = finish(start(fleet, "--instances", "fleet.json", **limited(1_300_000)))
    assert code == 5
    assert re.search("space|room", err)
    assert query("SELECT * FROM scans", fleet / STATE) == query("SELECT * FROM findings", fleet / STATE) == []
    assert leftovers(fleet) == set()


# ---- What is not the state's fault -------------------------------------------------------------------------


def test_a_mistake_in_a_query_is_not_told_as_damage(tmp_path):
    state = tmp_path / "state.db"
    script.check_state(state)
    with (
        pytest.raises(sqlite3.OperationalError),
        script.sighting_errors(),
        closing(sqlite3.connect(state)) as db,
    ):
        db.execute("SELECT nothing FROM scans")


STOPPED_WHILE_RESOLVING = """import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import tagcheck
resolution = tagcheck.resolution
def stopped(*args):
    os.kill(os.getpid(), signal.SIGINT)
    return resolution(*args)
tagcheck.resolution = stopped
raise SystemExit(tagcheck.main())"""


def test_ctrl_c_while_findings_are_resolved_is_an_interruption(scan, tmp_path):
    scan(instance(1), BYSTANDER)
    (tmp_path / "stopped.py").write_text(STOPPED_WHILE_RESOLVING)
    save_fleet(tmp_path / "none.json", BYSTANDER)
    before = query("SELECT status FROM findings")
    run = subprocess.run(
        [sys.executable, "stopped.py", TAGCHECK.parent, "scan", "--policy", "policy.yaml",
         "--instances", "none.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (run.returncode, "interrupted" in run.stderr) == (130, True), run.stderr
    assert query("SELECT status FROM findings") == before
