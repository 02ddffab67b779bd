"""State in S3: it outlives the agent, and counts every scan once whatever goes wrong on the way."""

import functools
import itertools
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aws_server import ACCOUNT_ID, AwsServer, Fault, Request
from builders import SAVED_FILES, instance, save_fleet, save_policy
from conftest import TAGCHECK, Result, clean_environment, kept_handlers, run_tagcheck, script_with

import tagcheck as script

REGION = "us-east-1"
BUCKET, KEY = "fleet-state", "org/tagcheck.db"
SHARED = "i-00000000000000000"
OUTPUTS = ("--csv", "out.csv", "--json", "out.json", "--junit", "out.xml")

# ---- What the tests share ----------------------------------------------------------------------------------


SCAN = ("scan", *SAVED_FILES, *OUTPUTS)


class State:
    """One state in S3, and the agents that record into it; each is thrown away after its scan."""

    def __init__(self, aws: AwsServer, directory: Path, key: str = KEY) -> None:
        self.aws, self.directory, self.key = aws, directory, key
        self.location = f"s3://{BUCKET}/{key}"
        self._s3 = aws.backstage("s3", REGION)
        self._agents = itertools.count(1)

    def new_agent(self, *ids: str) -> Path:
        """Make the directory of an agent that has never been there, with a policy and saved instances."""
        (cwd := self.directory / f"agent{next(self._agents)}").mkdir(parents=True)
        save_policy(cwd)
        save_fleet(cwd, *map(instance, (SHARED, *ids)))
        return cwd

    def scan(self, *args: str, code: int | None = 3, cwd: Path | None = None, **options: Any) -> Result:
        """Scan into the state."""
        args = (*SCAN, "--state", self.location, *args)
        return run_tagcheck(
            *args, cwd=cwd or self.new_agent(), check=code, **{"env": self.aws.env, "timeout": 120} | options
        )

    def compete(self, _: object) -> None:
        """Scan into the state, without any faults, while another's request is held."""
        self.scan(cwd=self.new_agent("i-0c"), env=self.aws.env | {"AWS_SDK_UA_APP_ID": "competitor"})

    def delete(self, _: object) -> None:
        """Delete the state while another's request is held."""
        self._s3.delete_object(Bucket=BUCKET, Key=self.key)

    def fault(self, kind: str, **details: Any) -> Fault:
        """Let requests for this state alone meet a fault; what answers is a method of State."""

        def is_ours(request: Request) -> bool:
            return request.params.get("Key") == self.key and "competitor" not in request.headers["user-agent"]

        if kind == "answer":
            details["answer"] = functools.partial(details["answer"], self)
        return self.aws.fault(kind, when=is_ours, **details)

    def calls(self, action: str) -> list[Request]:
        """List the requests for this state with this action."""
        return [request for request in self.aws.calls(action) if request.params["Key"] == self.key]

    @property
    def stored(self) -> bytes | None:
        """The state as it is stored, or None where there is none."""
        try:
            body: bytes = self._s3.get_object(Bucket=BUCKET, Key=self.key)["Body"].read()
        except self._s3.exceptions.NoSuchKey:
            return None
        return body

    @stored.setter
    def stored(self, body: bytes) -> None:
        self._s3.put_object(Bucket=BUCKET, Key=self.key, Body=body)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Ask the state."""
        path = self.directory / "fetched.db"
        path.write_bytes(self.stored or b"")
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return db.execute(sql).fetchall()

    @property
    def counted(self) -> tuple[int, int]:
        """How many scans are recorded, and how often they saw the instance that all of them see."""
        [(scans,)] = self.query("SELECT count(*) FROM scans")
        [(seen,)] = self.query(f"SELECT times_seen FROM findings WHERE instance_id = '{SHARED}'")
        return scans, seen


@pytest.fixture(scope="module")
def recorded(aws_server: AwsServer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Give a state after one scan."""
    state = State(new_bucket(aws_server), tmp_path_factory.mktemp("recorded"))
    state.scan()
    assert state.stored
    return state.stored


@pytest.fixture
def state(recorded: bytes, aws_server: AwsServer, tmp_path: Path) -> State:
    """Give a state that is not there yet."""
    return State(new_bucket(aws_server), tmp_path)


def new_bucket(aws: AwsServer) -> AwsServer:
    """Begin anew with an empty bucket."""
    aws.reset()
    aws.backstage("s3", REGION).create_bucket(Bucket=BUCKET)
    return aws


def database(*statements: str) -> bytes:
    """Make a SQLite database by these statements."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        for statement in statements:
            db.execute(statement)
        return db.serialize()


def tampered(recorded: bytes, statement: str) -> bytes:
    """Change a state as somebody else would."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.deserialize(recorded)
        db.execute(statement)
        return db.serialize()


def statuses(result: Result) -> list[str]:
    """Read what became of the findings."""
    return [finding["status"] for finding in result.json("out.json")["findings"]]


# ---- Without trouble ---------------------------------------------------------------------------------------


def test_agents_remember_what_other_agents_found_and_leave_nothing_behind(
    state: State, tmp_path: Path
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    assert statuses(state.scan(cwd=state.new_agent("i-0a"))) == ["NEW", "NEW"]
    for _ in range(2):
        result = state.scan(env=state.aws.env | {"TMPDIR": str(temporary)})
        assert statuses(result) == ["REPEAT"]
        assert list(temporary.iterdir()) == []
        assert {file.name for file in result.cwd.iterdir()} == {"policy.yaml", "fleet.json", *OUTPUTS[1::2]}
    assert state.counted == (3, 3)
    assert state.query("SELECT instance_id, resolution FROM findings WHERE resolved_at") == [("i-0a", "gone")]
    conditions = [
        (request.params.get("IfNoneMatch"), "IfMatch" in request.params)
        for request in state.calls("PutObject")
    ]
    assert conditions == [("*", False), (None, True), (None, True)]


def test_dry_run_compares_and_writes_nothing(state: State, recorded: bytes) -> None:
    assert statuses(state.scan("--dry-run")) == ["NEW"]
    assert state.stored is None
    state.stored = recorded
    assert statuses(state.scan("--dry-run")) == ["REPEAT"]
    assert state.stored == recorded
    assert not state.calls("PutObject")


def test_explain_reads_the_history(state: State, recorded: bytes) -> None:
    args = ("explain", SHARED, "--policy", "policy.yaml", "--state", state.location)
    cwd, env = state.new_agent(), state.aws.env
    assert f"there is no state {state.location}" in run_tagcheck(*args, cwd=cwd, env=env, check=5).err
    assert state.stored is None
    state.stored = recorded
    assert "History: NEW, found 1 time" in run_tagcheck(*args, cwd=cwd, env=env, check=0).out
    assert not state.calls("PutObject")


@pytest.mark.parametrize(
    "args",
    [
        ("history", "--policy", "policy.yaml"),
        ("report", "--policy", "policy.yaml", "--html", "page.html"),
        ("remediate", "--policy", "policy.yaml"),
        ("remediate", "--policy", "policy.yaml", "--plan", "plan.csv", "--apply"),
        ("prune", "--days", "3"),
        ("prune", "--days", "3", "--dry-run"),
        ("scan", "--policy", "policy.yaml", "--require-state"),
        ("scan", "--policy", "policy.yaml", "--require-state", "--dry-run"),
    ],
    ids=lambda args: " ".join(word for word in args if "." not in word),
)
def test_only_a_scan_begins_a_state(state: State, args: tuple[str, ...]) -> None:
    cwd = state.new_agent()
    plan = f"Account,Region,InstanceId,Tag,Value,Action\n{ACCOUNT_ID},{REGION},i-00000001,Owner,ann,add\n"
    (cwd / "plan.csv").write_text(plan)
    before = {file.name for file in cwd.iterdir()}
    result = run_tagcheck(*args, "--state", state.location, cwd=cwd, env=state.aws.env, check=5)
    assert f"there is no state {state.location}: run a scan first" in result.err
    assert (state.stored, state.calls("PutObject"), result.out) == (None, [], "")
    assert {file.name for file in cwd.iterdir()} == before
    assert not [request for request in state.aws.requests if request.service == "ec2"]


def test_key_may_have_any_signs(state: State, recorded: bytes) -> None:
    state = State(state.aws, state.directory, "équipe a//b/../état + 1 %20?#.db")
    state.stored = recorded
    assert statuses(state.scan()) == ["REPEAT"]
    assert state.counted == (2, 2)


def test_advice_for_a_bucket_in_another_region_works(state: State) -> None:
    state.aws.fault("error", action="GetObject", region=REGION, status=301, code="PermanentRedirect")
    advice = re.search(r"the bucket is in another region: set (\w+) to it", state.scan(code=5).err)
    assert advice
    state.scan(env=state.aws.env | {advice[1]: "eu-west-1"})
    assert state.calls("PutObject")[-1].region == "eu-west-1"


def test_state_of_the_older_tool_is_taken_over(state: State) -> None:
    state.stored = database(
        "CREATE TABLE flagged_instances (id INTEGER PRIMARY KEY, instance_id TEXT UNIQUE NOT NULL, "
        "first_seen TIMESTAMP, last_seen TIMESTAMP, missing_tags TEXT NOT NULL, is_active INTEGER DEFAULT 1)",
        "INSERT INTO flagged_instances (instance_id, first_seen, missing_tags) "
        f"VALUES ('{SHARED}', '2025-03-30 01:30:00', 'Owner')",
    )
    [finding] = state.scan().json("out.json")["findings"]
    assert (finding["status"], finding["first_seen"]) == ("REPEAT", "2025-03-30T01:30:00Z")
    assert state.query("SELECT first_seen FROM findings") == [("2025-03-30T01:30:00Z",)]


# ---- Troubles that pass ------------------------------------------------------------------------------------


def error(action: str, status: int, code: str, **when: Any) -> dict[str, Any]:
    """Give the fault of an error of S3."""
    return {"kind": "error", "action": action, "status": status, "code": code, "message": "No."} | when


def upload(kind: str, **when: Any) -> dict[str, Any]:
    """Give a fault of the upload."""
    return {"kind": kind, "action": "PutObject", **when}


def download(kind: str, **when: Any) -> dict[str, Any]:
    """Give a fault of the download."""
    return {"kind": kind, "action": "GetObject", **when}


def upload_error(status: int, code: str, **when: Any) -> dict[str, Any]:
    """Give the fault of an error of S3 at the upload."""
    return error("PutObject", status, code, **when)


@dataclass(frozen=True)
class Trouble:
    """What the requests of a scan meet, and how many scans are counted in the end, with the one before."""

    faults: tuple[dict[str, Any], ...]
    counted: int = 2
    status: str = "REPEAT"
    first: bool = False  # there is no state yet


def trouble(*faults: dict[str, Any], **expected: Any) -> Trouble:
    """Write a row of the table."""
    return Trouble(faults, **expected)


def first(*faults: dict[str, Any], counted: int = 1, status: str = "NEW") -> Trouble:
    """Write a row of the table in which there is no state yet."""
    return Trouble(faults, counted, status, first=True)


COMPETE, DELETE = {"answer": State.compete}, {"answer": State.delete}
CONFLICT, FAILED, UNMET = "ConditionalRequestConflict", "InternalError", "PreconditionFailed"
PORTAL: dict[str, Any] = {
    "body": b"<html>%s</html>" % (b"Log in to the guest network. " * 99),
    "content_type": "text/html",
}
TROUBLES = {
    "another was faster": trouble(upload("answer", times=1, **COMPETE), counted=3),
    "answer lost": trouble(upload("lost", times=1)),
    "answer lost, and another on top": trouble(
        upload("lost", times=1), upload("answer", skip=1, times=1, **COMPETE), counted=3
    ),
    "answer lost after another was faster": trouble(
        upload("answer", times=1, **COMPETE), upload("lost", skip=1, times=1), counted=3
    ),
    "connection dropped until the SDK gives up": trouble(upload("drop", times=6)),
    "two writers at the same moment": trouble(upload_error(409, CONFLICT, times=2)),
    "500 until the SDK gives up": trouble(upload_error(500, FAILED, times=6)),
    "upload ends at a captive portal": trouble(upload("body", times=1, **PORTAL)),
    "deleted before the upload": trouble(upload("answer", times=1, **DELETE), counted=1, status="NEW"),
    "connection ends in the download after the scan": trouble(download("cut", skip=1, times=1)),
    "half the download as if it were all": trouble(download("truncate", times=1)),
    "first, and another was faster": first(upload("answer", times=1, **COMPETE), counted=2, status="REPEAT"),
    "first, and its answer is lost": first(upload("lost", times=1)),
}


@pytest.mark.parametrize("why", TROUBLES)
def test_trouble_passes_and_every_scan_is_counted_once(state: State, recorded: bytes, why: str) -> None:
    case = TROUBLES[why]
    if not case.first:
        state.stored = recorded
    faults = [state.fault(**fault) for fault in case.faults]
    result = state.scan(code=3)
    assert [fault.hits for fault in faults] == [fault["times"] for fault in case.faults]
    assert state.counted == (case.counted, case.counted)
    assert statuses(result) == [case.status]
    assert [row["Status"] for row in result.csv("out.csv")] == [case.status]


def test_only_verbose_scans_show_that_they_try_again(state: State, recorded: bytes) -> None:
    state.stored = recorded
    for args in ((), ("-v",)):
        fault = state.fault(**upload_error(409, CONFLICT, times=1))
        result = state.scan(*args)
        assert fault.hits == 1
        assert ("trying again" in result.err) is bool(args)


def test_report_is_of_the_recording_that_stands(state: State) -> None:
    state.fault("answer", action="PutObject", times=1, **COMPETE)
    result = state.scan(cwd=state.new_agent("i-0b"))
    found = {each["instance_id"]: each["status"] for each in result.json("out.json")["findings"]}
    assert found == {SHARED: "REPEAT", "i-0b": "NEW"}
    assert [each["instance_id"] for each in result.json("out.json")["resolved"]] == ["i-0c"]
    assert {row["InstanceId"]: row["Status"] for row in result.csv("out.csv")} == found
    assert "1 NEW, 1 REPEAT" in result.out


# ---- Troubles that do not pass -----------------------------------------------------------------------------

OTHER_PROGRAMS = database("CREATE TABLE bookmarks (url TEXT)")
NEWER = database("CREATE TABLE scans (id)", "PRAGMA application_id = 0x74616763", "PRAGMA user_version = 99")
DENIED = "allow s3:GetObject, s3:PutObject and s3:ListBucket"
Refusal = tuple[Callable[[bytes], bytes | None], dict[str, Any] | None, str]
REFUSALS: dict[str, Refusal] = {
    "may not be read": (lambda recorded: recorded, error("GetObject", 403, "AccessDenied"), DENIED),
    "token has expired": (lambda recorded: recorded, error("GetObject", 400, "ExpiredToken"), "renew"),
    "answer without a reason": (
        lambda recorded: recorded,
        error("GetObject", 403, "AccessDenied", message=""),
        DENIED,
    ),
    "captive portal that answers 403": (
        lambda recorded: recorded,
        download("body", status=403, **PORTAL),
        "ForeignAnswer",
    ),
    "empty": (lambda _: b"", None, "is empty"),
    "garbage": (
        lambda _: b"not a database" * 400,
        None,
        "is not a SQLite database: name the right one with --state",
    ),
    "of another program": (lambda _: OTHER_PROGRAMS, None, "another program's database: name the right one"),
    "of a newer version": (lambda _: NEWER, None, "written by a newer tagcheck"),
    "with a trigger": (
        lambda recorded: tampered(recorded, "CREATE TRIGGER foo AFTER INSERT ON scans BEGIN SELECT 1; END"),
        None,
        "it has a trigger 'foo' on 'scans' that tagcheck did not make): name the right one with --state",
    ),
    "cut short": (lambda recorded: recorded[:-4096], None, "is damaged"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_state_that_cannot_be_used_is_refused_untouched_before_the_scan(
    state: State, recorded: bytes, why: str
) -> None:
    make, fault, says = REFUSALS[why]
    state.stored = stored = make(recorded)
    if fault:
        state.fault(**fault)
    result = state.scan(code=5)
    assert says in result.err
    assert result.err.startswith(f"tagcheck: the state {state.location}")
    assert state.stored == stored
    assert state.calls("PutObject") == []
    assert not (result.cwd / "out.csv").exists()


def test_bucket_that_is_not_there(state: State) -> None:
    assert "create the bucket" in state.scan("--state", "s3://nowhere/state.db", code=5).err


def test_without_credentials_there_is_no_state(state: State) -> None:
    env = {name: value for name, value in state.aws.env.items() if "KEY" not in name}
    assert "credentials" in state.scan(env=env, code=5).err


@pytest.mark.parametrize("in_headers", [False, True], ids=["in the body", "in the headers"])
def test_download_that_trickles_ends_the_scan(
    state: State, recorded: bytes, tmp_path: Path, in_headers: bool
) -> None:
    state.stored = recorded
    state.fault("trickle", action="GetObject", seconds=0.2, in_headers=in_headers)
    result = state.scan(script=script_with(tmp_path, S3_SECONDS=1.0), code=5, process=True)
    assert f"tagcheck: the state {state.location}: given up after 2 tries" in result.err
    assert "CallTimeout" in result.err
    assert state.stored == recorded


def test_upload_whose_answer_trickles_is_found_to_stand(
    state: State, recorded: bytes, tmp_path: Path
) -> None:
    state.stored = recorded
    state.fault("trickle", action="PutObject", seconds=0.2, in_headers=True, times=1)
    result = state.scan(script=script_with(tmp_path, S3_SECONDS=1.0), code=3, process=True)
    assert [finding["times_seen"] for finding in result.json("out.json")["findings"]] == [2]


def test_upload_that_never_ends_still_leaves_the_csv(state: State, recorded: bytes, tmp_path: Path) -> None:
    state.stored = recorded
    state.fault("slow", action="PutObject", seconds=60)
    result = state.scan(script=script_with(tmp_path, S3_SECONDS=0.5), code=5, process=True)
    assert "given up after 2 tries" in result.err
    assert len(result.csv("out.csv")) == 1
    assert state.stored == recorded


def test_a_page_in_place_of_the_state_is_told_soon(state: State, recorded: bytes) -> None:
    state.stored = recorded
    fault = state.fault("body", action="GetObject", body=b"<html>Log in</html>")
    assert "the answer is not S3's" in state.scan(code=5).err
    assert fault.hits == 3


def test_state_with_a_scan_that_has_no_id_is_used_like_any_other(
    state: State, recorded: bytes, tmp_path: Path
) -> None:
    (path := tmp_path / "tampered.db").write_bytes(recorded)
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE scans SET scan_id = ''")
        db.commit()
    state.stored = path.read_bytes()
    assert state.scan(code=3).json("out.json")["findings"][0]["status"] == "REPEAT"


def test_upload_that_is_denied_is_a_failure_with_its_reason(state: State, recorded: bytes) -> None:
    state.stored = recorded
    state.fault(**upload_error(403, "AccessDenied"))
    result = state.scan(code=5)
    assert DENIED in result.err
    assert state.stored == recorded
    assert not (result.cwd / "out.json").exists()


def test_signals_come_again_once_changes_are_recorded(state: State, recorded: bytes, tmp_path: Path) -> None:
    state.stored = recorded
    signals = script.Signals()
    client, copy = state.aws.client("s3", REGION), tmp_path / "state.db"
    s3_state = script.S3State(client, BUCKET, KEY, copy, signals.hold)
    change = script.Change(
        *("run/0", "test", ACCOUNT_ID, REGION, "i-0000000a", "Owner", None, "ann", "why", "who"),
        *("2026-02-24T10:30:45Z", "intended"),
    )
    script.record_changes(s3_state, [(change, script.Result.PLANNED)])
    assert not signals.held
    assert state.stored != recorded


ENDLESS = {
    "409": upload_error(409, CONFLICT),
    "500": upload_error(500, FAILED),
    "another is faster each time": upload("answer", **COMPETE),
    "no download after the scan": error("GetObject", 500, FAILED, skip=1),
}


@pytest.mark.parametrize("why", ENDLESS)
def test_tries_run_out_and_only_the_csv_is_written(
    state: State, recorded: bytes, tmp_path: Path, why: str
) -> None:
    state.stored = recorded
    cwd, fault = state.new_agent(), state.fault(**ENDLESS[why])
    for name in ("out.json", "out.xml"):
        (cwd / name).write_text("as it was")
    result = state.scan(cwd=cwd, code=5, script=script_with(tmp_path, S3_TRIES=3))
    assert result.out == ""
    assert f"the state {state.location}: given up after 3 tries" in result.err
    assert "not recorded, run again" in result.err
    others = fault.hits if ENDLESS[why]["kind"] == "answer" else 0
    assert state.counted == (1 + others, 1 + others)
    assert (state.stored == recorded) is (others == 0)
    assert {(cwd / name).read_text() for name in ("out.json", "out.xml")} == {"as it was"}
    assert {file.name for file in cwd.iterdir()} == {"policy.yaml", "fleet.json", *OUTPUTS[1::2]}
    assert [row["Status"] for row in result.csv("out.csv")] == ["REPEAT"]


def stopped_scan(state: State, cwd: Path, fault: Fault, hits: int) -> tuple[int, str, str]:
    """Send SIGTERM to a scan once it has met a fault so often; returns its exit code, stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, TAGCHECK, *SCAN, "--state", state.location],
        cwd=cwd,
        env=clean_environment(cwd) | state.aws.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 30
        while fault.hits < hits:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture
def signals() -> Iterator[script.Signals]:
    """Give a guard of signals, whose handlers do not outlive the test."""
    with kept_handlers():
        yield script.Signals()


def test_signal_ends_the_tries(state: State, recorded: bytes) -> None:
    state.stored = recorded
    fault, cwd = state.fault(**upload_error(409, CONFLICT)), state.new_agent()
    code, out, err = stopped_scan(state, cwd, fault, hits=2)
    assert (code, out) == (130, "")
    assert "nothing was recorded" in err
    assert state.stored == recorded


def test_signal_during_the_upload_lets_state_and_reports_agree(state: State, recorded: bytes) -> None:
    state.stored = recorded
    fault, cwd = state.fault("slow", action="PutObject", seconds=1), state.new_agent()
    code, _, err = stopped_scan(state, cwd, fault, hits=1)
    assert code == 3, err
    assert state.counted == (2, 2)
    assert [row["status"] for row in json.loads((cwd / "out.json").read_text())["findings"]] == ["REPEAT"]


def test_signal_while_changes_are_uploaded_comes_once_they_are_recorded(
    state: State, recorded: bytes, tmp_path: Path, signals: script.Signals
) -> None:
    state.stored = recorded
    client = state.aws.client("s3", REGION)
    client.meta.events.register("before-send.s3.PutObject", lambda **_: signal.raise_signal(signal.SIGINT))
    s3_state = script.S3State(client, BUCKET, KEY, tmp_path / "state.db", signals.hold)
    change = script.Change(
        *("run/0", "test", ACCOUNT_ID, REGION, "i-0000000a", "Owner", None, "ann", "why", "who"),
        *("2026-02-24T10:30:45Z", "intended"),
    )
    with signals, pytest.raises(KeyboardInterrupt):
        script.record_changes(s3_state, [(change, script.Result.PLANNED)])
    assert len(state.query("SELECT * FROM changes")) == 1


def test_an_upload_that_is_tried_again_releases_no_signal_that_the_scan_holds(
    state: State, recorded: bytes, tmp_path: Path, signals: script.Signals
) -> None:
    state.stored = recorded
    client = state.aws.client("s3", REGION)
    s3_state = script.S3State(client, BUCKET, KEY, tmp_path / "state.db", signals.hold)
    with signals:
        assert len([*s3_state.attempts()]) == 1  # as a scan is recorded
        signals.hold()
        state.fault(**upload_error(412, UNMET), times=1)
        for number, _ in enumerate(s3_state.attempts()):  # as what was sent is recorded
            if number == 1:
                signal.raise_signal(signal.SIGTERM)
        assert number == 1


def test_copy_that_is_deleted_before_the_upload_is_not_uploaded_as_an_empty_state(
    state: State, recorded: bytes, tmp_path: Path, signals: script.Signals
) -> None:
    state.stored = recorded
    copy = tmp_path / "state.db"
    s3_state = script.S3State(state.aws.client("s3", REGION), BUCKET, KEY, copy, signals.hold)
    before = datetime(2020, 1, 1, tzinfo=UTC)
    for number, path in enumerate(s3_state.attempts()):
        script.prune_state(path, before, s3_state.name)
        if number == 0:
            path.unlink()
    assert number == 1
    assert len(state.calls("PutObject")) == 1
    assert state.counted == (1, 1)
    with pytest.raises(script.UploadError, match="given up after 3 tries"):
        for path in s3_state.attempts():
            path.unlink()
    assert state.counted == (1, 1)


@pytest.mark.parametrize("location", ["s3://", "s3://fleet-state", "s3://fleet-state/"])
def test_location_without_bucket_or_key_is_a_usage_error(state: State, location: str) -> None:
    assert f"{location}: name the state as s3://BUCKET/KEY" in state.scan("--state", location, code=2).err
    assert state.aws.requests == []


# ---- Many at once ------------------------------------------------------------------------------------------


def scan_at_once(state: State, agents: int, rounds: int, seed: int) -> None:
    """Let agents scan into one state at once, again and again, while S3 fails at random: all must count."""
    chance = random.Random(seed).random
    mix = (
        (0.25, upload("lost")),
        (0.10, upload_error(409, CONFLICT)),
        (0.05, upload_error(412, UNMET)),
        (0.05, upload_error(500, FAILED)),
        (0.05, download("cut")),
    )
    faults = [state.aws.fault(**fault, when=lambda _, share=share: chance() < share) for share, fault in mix]
    own = [state.new_agent(f"i-0{number:x}") for number in range(1, agents + 1)]
    with ThreadPoolExecutor(agents) as pool:
        for _ in range(rounds):
            list(pool.map(lambda cwd: state.scan(cwd=cwd, timeout=300), own))
    state.aws.clear_faults()
    assert sum(fault.hits for fault in faults) > 0
    assert state.counted == (agents * rounds, agents * rounds)
    seen = state.query("SELECT instance_id, times_seen FROM findings ORDER BY instance_id")[1:]
    assert seen == [(f"i-0{number:x}", rounds) for number in range(1, agents + 1)]


def test_scans_at_once_are_all_counted(state: State) -> None:
    scan_at_once(state, agents=3, rounds=2, seed=1)


@pytest.mark.soak
def test_many_scans_at_once_are_all_counted(state: State) -> None:
    scan_at_once(state, agents=8, rounds=20, seed=7)
