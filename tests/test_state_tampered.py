"""State: one that somebody has changed is data; it costs no finding, and no command crashes on it."""

import contextlib
import csv
import json
import os
import random
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import policy, save_policy
from conftest import Result, run_tagcheck

import tagcheck as script

TODAY = datetime(2026, 3, 10, 6, tzinfo=UTC)
FLEET = Path(__file__).resolve().parent / "data" / "fleet.json"
STATE = "instance_state.db"
POLICY = ("--policy", "policy.yaml")
SAVED = ("--instances", "fleet.json")
KEYS = policy(
    required_tags=["Owner", "CostCenter", {"key": "Environment", "default": "dev"}],
    regions={"us-east-1": {}, "eu-west-1": {}},
    grace_period="2h",
)
VIOLATIONS, UNREAD, FAILED = 3, 4, 5


class Desk:
    """The script in a directory of its own."""

    def run(self, *args: str, now: datetime = TODAY) -> Result:
        return run_tagcheck(*args, cwd=Path.cwd(), now=now)

    def scan(self, *args: str, now: datetime = TODAY) -> Result:
        return self.run(
            "scan",
            *POLICY,
            *SAVED,
            "--include-managed-resources",
            "--region",
            "us-east-1",
            "--region",
            "eu-west-1",
            *args,
            now=now,
        )


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Desk:
    """Give a desk without a state."""
    monkeypatch.chdir(tmp_path)
    save_policy(tmp_path, **KEYS)
    save_fleet()
    return Desk()


def save_fleet(change: Callable[[int, dict[str, Any]], None] = lambda *_: None) -> None:
    """Save the fleet of the tests' data, each instance as `change` leaves it."""
    fleet = json.loads(FLEET.read_text())
    for number, reservation in enumerate(fleet["Reservations"]):
        for instance in reservation["Instances"]:
            change(number, instance)
    Path("fleet.json").write_text(json.dumps(fleet))


def strip_first(number: int, instance: dict[str, Any]) -> None:
    """Take all tags from the first instances."""
    if number < 3:
        instance["Tags"] = []


def tag_first(number: int, instance: dict[str, Any]) -> None:
    """Give the first instances all tags."""
    if number < 3:
        instance["Tags"] = [{"Key": key, "Value": "x"} for key in ("Owner", "CostCenter", "Environment")]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Give a state after three scans, in which findings came and went, and tags were written."""
    directory = tmp_path_factory.mktemp("history")
    with contextlib.chdir(directory):
        save_policy(directory, **KEYS)
        for days, change in ((9, strip_first), (5, tag_first), (2, lambda *_: None)):
            save_fleet(change)
            now = TODAY - timedelta(days=days)
            where = ("--region", "us-east-1", "--region", "eu-west-1")
            run_tagcheck("scan", "-q", *POLICY, *SAVED, *where, cwd=directory, now=now, check=VIOLATIONS)
        with closing(sqlite3.connect(STATE)) as db, db:
            db.execute(
                "INSERT INTO changes SELECT NULL, 'x/1', policy, account_id, region, instance_id, 'Owner', "
                "NULL, 'ann', 'why', 'who', first_seen, 'written' FROM findings LIMIT 1"
            )
        return Path(STATE).read_bytes()


def violators() -> list[str]:
    """The instances of the CSV."""
    with Path("violators.csv").open(encoding="utf-8-sig") as file:
        return sorted(row["InstanceId"] for row in csv.DictReader(file))


def use(*statements: str) -> None:
    """Let somebody else write the state."""
    with closing(sqlite3.connect(STATE, isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)


def query(sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(STATE)) as db:
        return db.execute(sql).fetchall()


def commands() -> dict[str, tuple[str, ...]]:
    """Every command that uses a state; a scan comes last, as it changes it."""
    (instance_id,) = query_or(
        "SELECT instance_id FROM findings ORDER BY id LIMIT 1", ("i-0005e1f3a7b9c2d40",)
    )
    return {
        "history": ("history", *POLICY),
        "history as JSON": ("history", *POLICY, "--json", "-"),
        "history of one": ("history", str(instance_id), *POLICY),
        "report": ("report", *POLICY, "--html", "page.html"),
        "explain": ("explain", str(instance_id), *POLICY),
        "explain saved": ("explain", str(instance_id), *POLICY, *SAVED),
        "remediate": ("remediate", *POLICY),
        "prune dry": ("prune", "--days", "3", "--dry-run"),
    }


def query_or(sql: str, otherwise: tuple[Any, ...]) -> tuple[Any, ...]:
    """Ask the state, which may be in any condition."""
    with suppress(sqlite3.Error, UnicodeDecodeError):
        if not Path(STATE).is_file():
            return otherwise
        if (rows := query(sql)) and "\0" not in str(rows[0][0]) and not str(rows[0][0]).startswith("-"):
            return rows[0]
    return otherwise


# ---- What does not belong into a state ---------------------------------------------------------------------

HOSTILE_SCHEMAS = {
    "a trigger that deletes": (
        "CREATE TRIGGER foo AFTER INSERT ON findings BEGIN DELETE FROM findings; END",
        "it has a trigger 'foo' on 'findings'",
    ),
    "a trigger on counts": (
        "CREATE TRIGGER foo AFTER INSERT ON coverage BEGIN UPDATE coverage SET findings = 0, new = 0; END",
        "it has a trigger 'foo' on 'coverage'",
    ),
    "a view": ("CREATE VIEW foo AS SELECT * FROM findings", "it has a view 'foo'"),
    "an index": ("CREATE INDEX foo ON findings (status)", "it has a index 'foo' on 'findings'"),
    "a table": ("CREATE TABLE foo (x)", "it has a table 'foo'"),
    "a column": ("ALTER TABLE findings ADD COLUMN x TEXT", "it has a table 'findings'"),
    "a table that is gone": ("DROP TABLE notifications", "it lacks the table 'notifications'"),
    "an index that is gone": ("DROP INDEX events_of", "it lacks the index 'events_of'"),
    "another's older table": (
        "CREATE TABLE flagged_instances (flag TEXT)",
        "it has a table 'flagged_instances'",
    ),
    "a view in place of the older table": (
        "CREATE VIEW flagged_instances AS SELECT instance_id, first_seen, 1 AS is_active FROM findings",
        "it has a view 'flagged_instances'",
    ),
    "a view of nothing": ("CREATE VIEW flagged_instances AS SELECT * FROM missing", "no such table"),
    "a lower version": ("PRAGMA user_version = 1", "that tagcheck did not make"),
    "no version": ("PRAGMA user_version = 0", "that tagcheck did not make"),
    "a negative version": ("PRAGMA user_version = -1", "its version is -1"),
    "a high version": ("PRAGMA user_version = 2147483647", "was written by a newer tagcheck"),
    "another application": ("PRAGMA application_id = 1", "is another program's database"),
}


@pytest.mark.parametrize("why", HOSTILE_SCHEMAS)
def test_schema_that_is_not_ours_is_refused_by_every_command(desk: Desk, history: bytes, why: str) -> None:
    statement, message = HOSTILE_SCHEMAS[why]
    Path(STATE).write_bytes(history)
    args = commands()
    use(statement)
    before = Path(STATE).read_bytes()
    for run in (*(desk.run(*command) for command in args.values()), desk.scan(), desk.scan("--dry-run")):
        assert (run.code, run.out) == (FAILED, "")
        assert message in run.err
        assert f"the state {Path(STATE).resolve()} " in run.err
    assert Path(STATE).read_bytes() == before
    assert not Path("violators.csv").exists()


OLDER = (
    "CREATE TABLE flagged_instances (id INTEGER PRIMARY KEY AUTOINCREMENT, instance_id TEXT UNIQUE NOT NULL, "
    "first_seen TIMESTAMP, last_seen TIMESTAMP, missing_tags TEXT, is_active INTEGER DEFAULT 1)"
)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("CREATE INDEX active ON flagged_instances (is_active)", ""),
        (
            "CREATE TRIGGER foo AFTER DELETE ON flagged_instances BEGIN SELECT 1; END",
            "it has a trigger 'foo'",
        ),
        ("CREATE VIEW foo AS SELECT * FROM flagged_instances", "it has a view 'foo'"),
        ("CREATE TABLE foo (x)", "it has a table 'foo'"),
        (
            "INSERT INTO sqlite_master VALUES "
            "('index', 'foo', 'flagged_instances', 2, 'CREATE INDEX foo ON x (y)')",
            "restore it from a backup",
        ),
    ],
    ids=["an index", "a trigger", "a view", "another table", "what only says that it is an index"],
)
def test_older_tools_table_comes_with_nothing_but_indexes(desk: Desk, more: str, message: str) -> None:
    use(OLDER, "PRAGMA writable_schema = ON", more)
    run = desk.scan()
    assert run.code == (FAILED if message else VIOLATIONS)
    assert message in run.err
    assert desk.scan().code == run.code  # once more, now that it is of this version


def test_schema_is_compared_again_when_a_scan_is_recorded(
    desk: Desk, history: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(STATE).write_bytes(history)
    reading = script.read_saved

    def read_while_another_writes(*args: Any) -> Iterator[script.Reading]:
        use("CREATE TRIGGER foo AFTER INSERT ON findings BEGIN DELETE FROM findings; END")
        return reading(*args)

    monkeypatch.setattr(script, "read_saved", read_while_another_writes)
    run = desk.scan()
    assert run.code == FAILED
    assert "it has a trigger 'foo'" in run.err
    assert not Path("violators.csv").exists()


# ---- What rows may not hold --------------------------------------------------------------------------------

DEEP = "[" * 100_000
HOSTILE_ROWS = {
    "violations are cut": "UPDATE findings SET violations = substr(violations, 1, 9)",
    "violations are deep": f"UPDATE findings SET violations = '{DEEP}'",
    "violations are an object": """UPDATE findings SET violations = '{"tag_key": "x"}'""",
    "violations are none": "UPDATE findings SET violations = '[]'",
    "violations are numbers": "UPDATE findings SET violations = '[1]'",
    "a violation's key is a list": (
        """UPDATE findings SET violations = replace(violations, '"Owner"', '[]')"""
    ),
    "violations of no type": "UPDATE findings SET violations = replace(violations, 'missing', 'lost')",
    "violations are a blob": "UPDATE findings SET violations = x'5b5d'",
    "tags are numbers": """UPDATE findings SET tags = '{"Name": 1, "Owner": 2}'""",
    "tags are a list": "UPDATE findings SET tags = '[]'",
    "tags are not UTF-8": "UPDATE findings SET tags = CAST(x'7bff7d' AS TEXT)",
    "keys are no JSON": "UPDATE findings SET tag_keys = 'x'",
    "a time is none": "UPDATE findings SET first_seen = 'yesterday'",
    "a time has no zone": "UPDATE findings SET first_seen = '2026-02-24T10:30:45'",
    "a time is a number": "UPDATE findings SET first_seen = x'3039'",
    "a launch is on no day": "UPDATE findings SET launch_time = '2026-02-30T00:00:00Z'",
    "a count is negative": "UPDATE findings SET times_seen = -5",
    "a count is huge": "UPDATE findings SET times_seen = 9223372036854775807",
    "a count is a text": "UPDATE findings SET times_reopened = 'often'",
    "costs are endless": "UPDATE findings SET monthly_cost = 9e999",
    "costs are a text": "UPDATE findings SET monthly_cost = 'much'",
    "a cause of no kind": "UPDATE findings SET cause_kind = 'fate', cause = 'x'",
    "a cause without a kind": "UPDATE findings SET cause_kind = NULL, cause = 'x'",
    "suggestions without a value": (
        "UPDATE findings SET suggestions = "
        """'[{"tag_key":"Owner","value":null,"confidence":1,"evidence":""}]'"""
    ),
    "suggestions that are too sure": (
        "UPDATE findings SET suggestions = "
        """'[{"tag_key":"Owner","value":"a","confidence":9,"evidence":""}]'"""
    ),
    "suggestions are no JSON": "UPDATE findings SET suggestions = 'x'",
    "a creator is a blob": "UPDATE findings SET created_by = x'ff'",
    "resolved and open": "UPDATE findings SET status = 'RESOLVED'",
    "a status that is none": "UPDATE findings SET status = 'FINE'",
    "events of no kind": "UPDATE events SET event = 'LOST'",
    "events at no time": "UPDATE events SET at = 'x'",
    "events of nothing": "UPDATE events SET before = '[]'",
    "resolved for no reason": "UPDATE events SET resolution = 'luck'",
    "changes at no time": "UPDATE changes SET changed_at = 7",
    "changes of no status": "UPDATE changes SET status = 'hoped'",
    "impossible counts": "UPDATE coverage SET compliant = 99",
    "negative counts": "UPDATE coverage SET instances = -1",
    "counts that are a text": "UPDATE coverage SET findings = 'none'",
    "an error that is not UTF-8": "UPDATE coverage SET error_message = x'ff', error_code = 'x'",
    "scans at no time": "UPDATE scans SET started_at = 'x'",
    "scans of a blob": "UPDATE scans SET policy = x'ff' WHERE id = 1",
    "no counts": "DELETE FROM coverage",
    "a trend of no time": "INSERT INTO trend VALUES ('test', 'x', 1, 1, 1, 1, 1, 1)",
    "a trend before there was EC2": "UPDATE trend SET at = '0001-01-03T00:00:00Z'",
    "a trend with more unread targets than targets": (
        "INSERT INTO trend VALUES ('test', '2026-03-09T00:00:00Z', 1, 1, 0, 0, 1, 2)"
    ),
    "a trend with more new findings than open ones": (
        "INSERT INTO trend VALUES ('test', '2026-03-09T00:00:00Z', 2, 2, 1, 0, 1, 0)"
    ),
    "a trend with more reopened findings than open ones": "UPDATE trend SET reopened = open + resolved + 1",
}


@pytest.mark.parametrize("why", HOSTILE_ROWS)
def test_rows_that_hold_something_else_end_a_command_with_a_message(
    desk: Desk, history: bytes, why: str
) -> None:
    Path(STATE).write_bytes(history)
    args = commands()
    use("PRAGMA ignore_check_constraints = ON", HOSTILE_ROWS[why])
    spoiled = Path(STATE).read_bytes()
    refused = 0
    for command in args.values():
        run = desk.run(*command)
        assert run.code in (0, FAILED)
        if run.code == FAILED:
            refused += 1
            assert run.err.startswith("tagcheck: the state ")
            assert f"{STATE} " in run.err
            assert "restore it from a backup" in run.err or "has no scan of the policy" in run.err
    assert refused
    assert Path(STATE).read_bytes() == spoiled
    check_scan(desk)


def check_scan(desk: Desk) -> None:
    """Check that a scan says what a fresh one says, or that the state cannot be used."""
    run = desk.scan()
    if run.code != FAILED:
        assert run.code == VIOLATIONS, run.err
        found = violators()
        fresh = desk.scan("--state", "fresh.db", "--csv", "violators.csv")
        assert (fresh.code, violators()) == (VIOLATIONS, found)


# ---- What a scan saw counts --------------------------------------------------------------------------------

AS_OF_NEXT_SCAN = "(SELECT max(id) + 1 FROM scans)"
ATTACKS = {
    "all are resolved": "UPDATE findings SET status = 'RESOLVED', resolved_at = '2026-03-09T00:00:00Z', "
    "resolution = 'tagged'",
    "seen in the future": "UPDATE findings SET first_seen = '2999-01-01T00:00:00Z', last_seen = first_seen",
    "seen by this scan": f"UPDATE findings SET last_scan = {AS_OF_NEXT_SCAN}",
    "ids at their end": "UPDATE findings SET id = id + 9223372036854775000",
    "scans at their end": "UPDATE scans SET id = 9223372036854775807 WHERE id = 3",
    "keys in another case": "UPDATE findings SET instance_id = upper(instance_id), region = upper(region)",
    "keys as blobs": "UPDATE findings SET instance_id = CAST(instance_id AS BLOB)",
    "nothing was found": "DELETE FROM findings",
    "all were told": (
        "INSERT INTO notifications SELECT 'test', 'finding ' || account_id || ' ' || region || ' ' || "
        "instance_id, 'slack', '2026-01-01T00:00:00Z' FROM findings"
    ),
    "a region that is fine": (
        f"INSERT INTO coverage SELECT {AS_OF_NEXT_SCAN}, account_id, region, 'read', NULL, NULL, "
        "9, 9, 0, 0, 0, 0, 0, 0 FROM coverage WHERE scan = 3"
    ),
    "a region that nobody read": (
        f"INSERT INTO coverage SELECT {AS_OF_NEXT_SCAN}, account_id, 'moon-1', 'unread', 'x', "
        "'x', 0, 0, 0, 0, 0, 0, 0, 0 FROM coverage WHERE scan = 3 LIMIT 1"
    ),
}


@pytest.mark.parametrize("why", ATTACKS)
def test_no_history_takes_a_finding_from_a_scan(desk: Desk, history: bytes, why: str) -> None:
    Path(STATE).write_bytes(history)
    use(ATTACKS[why])
    check_scan(desk)


def test_a_finding_that_was_not_kept_fails_the_scan(
    desk: Desk, history: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(STATE).write_bytes(history)
    lossy = script._SEEN + " AND finding.instance_id > 'i-0005e1f3a7b9c2d40'"
    monkeypatch.setattr(script, "_RECORD_COVERAGE", script._RECORD_COVERAGE.replace(script._SEEN, lossy))
    run = desk.scan()
    assert run.code == FAILED
    assert "it did not keep all findings" in run.err
    assert not Path("violators.csv").exists()


def test_what_a_scan_writes_can_be_read_again(desk: Desk) -> None:
    def age(number: int, instance: dict[str, Any]) -> None:
        instance["LaunchTime"] = "1970-01-01T00:00:00+00:00"

    save_fleet(age)
    assert desk.scan().code == VIOLATIONS
    for name, command in commands().items():
        assert (name, desk.run(*command).code) == (name, 0)


# ---- A state that is not there -----------------------------------------------------------------------------


def test_only_a_scan_begins_a_state(desk: Desk) -> None:
    args = {**commands(), "prune": ("prune", "--days", "3")}
    del args["explain saved"]
    plan = "Account,Region,InstanceId,Tag,Value,Action\n123456789012,us-east-1,i-00000001,Owner,ann,add\n"
    Path("plan.csv").write_text(plan)
    args |= {"apply": ("remediate", *POLICY, "--plan", "plan.csv", "--apply")}
    before = sorted(os.listdir())
    for name, command in args.items():
        run = desk.run(*command)
        assert (name, run.code, run.out) == (name, FAILED, "")
        assert f"there is no state {Path(STATE).resolve()}: run a scan first" in run.err
        assert sorted(os.listdir()) == before


def test_explain_of_saved_instances_does_without_a_state_and_says_so(desk: Desk) -> None:
    run = desk.run(*commands()["explain saved"])
    assert run.code == 0
    assert "History: none known" in run.out
    assert "The history of i-0005e1f3a7b9c2d40 is not known: there is no state" in run.err
    assert not Path(STATE).exists()


def test_state_without_a_scan_of_the_policy_names_those_that_it_has(desk: Desk, history: bytes) -> None:
    Path(STATE).write_bytes(history)
    args = commands()
    Path("policy.yaml").write_text(json.dumps(KEYS | {"name": "other"}))
    for name in ("history", "history of one", "report", "explain", "remediate"):
        run = desk.run(*args[name])
        assert (run.code, run.out) == (FAILED, "")
        assert "has no scan of the policy 'other'; it has scans of 'test'" in run.err
    assert desk.run(*args["explain saved"]).code == 0
    run = desk.scan("--json", "out.json")
    notice = f"No earlier scan of the policy other in the state {STATE}: every finding is NEW"
    assert notice in run.out
    assert notice in json.loads(Path("out.json").read_text())["notices"]


def test_scan_says_that_it_begins_a_state(desk: Desk) -> None:
    planned, notice = (
        "There is no state {} yet: every finding would be NEW",
        "New state {}: every finding is NEW",
    )
    for options, told in ((["--dry-run"], planned.format(STATE)), ([], notice.format(STATE))):
        run = desk.scan("--json", "out.json", *options)
        assert told in run.out
        assert told in json.loads(Path("out.json").read_text())["notices"]
    assert "every finding is NEW" not in desk.scan().out


def test_older_tools_state_is_not_new(desk: Desk) -> None:
    use(OLDER, "INSERT INTO flagged_instances (instance_id) VALUES ('i-0005e1f3a7b9c2d40')")
    run = desk.scan("--require-state")
    assert run.code == VIOLATIONS
    assert "every finding is NEW" not in run.out


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["scan", "dry run"])
def test_required_state(desk: Desk, history: bytes, options: list[str]) -> None:
    before = sorted(os.listdir())
    run = desk.scan("--require-state", *options)
    assert (run.code, run.out) == (FAILED, "")
    assert f"there is no state {Path(STATE).resolve()}" in run.err
    assert sorted(os.listdir()) == before
    script.check_state(Path(STATE))  # as a first scan leaves it that could not go on
    run = desk.scan("--require-state", *options)
    assert run.code == FAILED
    assert "has no scan yet" in run.err
    Path(STATE).write_bytes(history)
    assert desk.scan("--require-state", *options).code == VIOLATIONS


def test_link_to_nothing_is_refused(desk: Desk, tmp_path: Path) -> None:
    Path(STATE).symlink_to(tmp_path / "victim")
    for run in (desk.scan(), desk.scan("--dry-run"), *(desk.run(*c) for c in commands().values())):
        assert (run.code, run.out) == (FAILED, "")
        assert f"is a link to {tmp_path / 'victim'}, which does not exist" in run.err
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_what_is_not_a_file_is_refused(desk: Desk, tmp_path: Path, kind: str) -> None:
    if kind == "FIFO":
        os.mkfifo(STATE)
    elif kind == "device":
        Path(STATE).symlink_to("/dev/zero")
    else:
        socket.socket(socket.AF_UNIX).bind(STATE)
    for run in (desk.scan(), desk.scan("--dry-run"), *(desk.run(*c) for c in commands().values())):
        assert (run.code, run.out) == (FAILED, "")
        assert "is not a regular file" in run.err


# ---- Tampering at random -----------------------------------------------------------------------------------

HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, "", "x", "NULL", "0", -1, 0, 1, 2**31, 2**63 - 1, -(2**63), 1.5, -1.5, 9e999, b"", b"\xff\x00"),
    *(
        "\ud7ff\u202e\x1b[2J",
        "\x00",
        "9" * 5000,
        "x" * 100_000,
        "[]",
        "{}",
        "[[]]",
        "[null]",
        "null",
        "1",
        '"x"',
    ),
    *(
        '{"a": 1}',
        '["Owner"]',
        '[{"tag_key": 1}]',
        '{"tag_key":"Owner"}',
        "[" * 2000,
        '{"a":' * 5000,
        "[1e999]",
        "NaN",
    ),
    *(
        "NEW",
        "REPEAT",
        "REOPENED",
        "RESOLVED",
        "tagged",
        "gone",
        "read",
        "unread",
        "test",
        "autoscaling_group",
    ),
    *(
        "2026-03-01T00:00:00Z",
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
        "2026-03-01",
        "2026-13-01T00:00:00Z",
    ),
    *('{"Owner":"ann"}', '{"Owner":null}', '[{"tag_key":"Owner","value":"a","confidence":1,"evidence":"e"}]'),
    '[{"tag_key":"Owner","type":"missing","value":null,"found_key":null,"message":"Owner is missing"}]',
    '[{"tag_key":"Gone","type":"empty","value":"","found_key":"","message":""}]',
    *("123456789012", "us-east-1", "US-EAST-1", "i-0005e1f3a7b9c2d40", "finding", "*"),
)
HOSTILE_OBJECTS = (
    "CREATE TRIGGER foo BEFORE INSERT ON findings BEGIN SELECT RAISE(IGNORE); END",
    "CREATE TRIGGER foo AFTER UPDATE ON findings BEGIN DELETE FROM findings; END",
    "CREATE VIEW foo AS WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT * FROM n",
    "CREATE TABLE foo AS SELECT * FROM findings",
    "CREATE UNIQUE INDEX foo ON findings (policy)",
    "CREATE INDEX foo ON coverage (findings) WHERE findings > 0",
    "ALTER TABLE findings RENAME COLUMN status TO state2",
    "CREATE TABLE flagged_instances AS SELECT instance_id, first_seen, times_seen AS is_active FROM findings",
    "CREATE TABLE flagged_instances "
    "(instance_id COLLATE NOCASE UNIQUE, first_seen, is_active CHECK (is_active = 1))",
    "ANALYZE",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = replace(sql, 'status', 'Status')",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET rootpage = 2",
    "PRAGMA writable_schema = ON; DELETE FROM sqlite_master WHERE type = 'index'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = x'ff', name = 7",
    "PRAGMA journal_mode = WAL",
    "PRAGMA encoding = 'UTF-16'; VACUUM",
)
TABLES = ("scans", "coverage", "findings", "events", "trend", "changes", "notifications")


def tamper(chance: random.Random) -> str:
    """Change the state at random, and tell how."""
    how = chance.choice(
        ["value"] * 12 + ["delete", "swap", "object", "object", "flip", "flip", "truncate", "header", "ids"]
    )
    path = Path(STATE)
    content = bytearray(path.read_bytes())
    if how == "flip":
        for _ in range(chance.choice((1, 1, 5, 100))):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif how == "truncate":
        content = content[: chance.choice((chance.randrange(len(content)), 4096 * chance.randrange(1, 9)))]
    elif how == "header":
        content[chance.randrange(100)] = chance.randrange(256)
    if content != path.read_bytes():
        path.write_bytes(content)
        return how
    with (
        closing(sqlite3.connect(STATE, isolation_level=None)) as db,
        suppress(sqlite3.Error, UnicodeDecodeError),
    ):
        db.execute("PRAGMA ignore_check_constraints = ON")
        table = chance.choice((*TABLES, "findings", "findings"))
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        column, other = chance.choice(columns), chance.choice(columns)
        some = f"LIMIT {chance.choice((1, 99))} OFFSET {chance.randrange(4)}"
        where = f"{columns[0]} IN (SELECT {columns[0]} FROM {table} {some})"
        value = chance.choice(HOSTILE_VALUES)
        if how == "value":
            how = f"{table}.{column} = {value!r:.40}"
            db.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (value,))
        elif how == "delete":
            how = f"delete from {table}"
            db.execute(f"DELETE FROM {table} WHERE {where}")
        elif how == "swap":
            how = f"swap {table}.{column} and {other}"
            db.execute(f"UPDATE {table} SET {column} = {other}, {other} = {column} WHERE {where}")
        elif how == "object":
            how = chance.choice(HOSTILE_OBJECTS)
            db.executescript(how)
        else:
            pragma = chance.choice(("user_version", "application_id"))
            how = f"{pragma} = {(number := chance.choice((0, 1, 2, 3, 5, -1, 2**31 - 1, -(2**31))))}"
            db.execute(f"PRAGMA {pragma} = {number}")
    return how


def check_tampered(desk: Desk, history: bytes, seed: int) -> None:
    """Tamper with a state, and check what every command makes of it."""
    chance = random.Random(seed)
    for name in os.listdir():
        if name not in ("policy.yaml", "fleet.json"):
            Path(name).unlink()
    Path(STATE).write_bytes(history)
    how = [tamper(chance) for _ in range(chance.choice((1, 1, 2, 4)))]
    codes = {}
    try:
        for name, command in commands().items():
            codes[name] = desk.run(*command).code
        check_scan(desk)
        codes["prune"] = desk.run("prune", "--days", "3").code
        codes["again"] = desk.run("report", *POLICY, "--html", "page.html").code
        assert set(codes.values()) <= {0, 2, FAILED}, codes
    except BaseException as error:
        error.add_note(f"seed {seed}: {how}")
        raise


@pytest.mark.parametrize("seed", range(40))
def test_tampered_state_crashes_nothing_and_hides_nothing(desk: Desk, history: bytes, seed: int) -> None:
    check_tampered(desk, history, seed)


@pytest.mark.soak
def test_many_tampered_states_crash_nothing_and_hide_nothing(desk: Desk, history: bytes) -> None:
    for seed in range(40, 440):
        check_tampered(desk, history, seed)
