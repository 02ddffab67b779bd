"""Command line: the script as its users run it, from its arguments to its exit code."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from aws_server import ACCOUNT_ID, AwsServer, Fault
from builders import instance, remembered, save_fleet, save_policy
from conftest import TAGCHECK, Result, clean_environment

import tagcheck as script

REGION, OTHER_REGION, CLEAN_REGION = "us-east-1", "eu-west-1", "ap-south-1"
DENIED = {"status": 403, "code": "UnauthorizedOperation", "message": "No."}
JSON_OUTPUT = ("--json", "out.json")

Tagcheck = Callable[..., Result]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Write a policy that asks for Owner and CostCenter in two regions."""
    regions = {REGION: None, OTHER_REGION: None}
    return save_policy(tmp_path, required_tags=["Owner", "CostCenter"], regions=regions)


def save(path: Path, *items: tuple[str, dict[str, str]]) -> Path:
    """Save instances, each with its id and its tags."""
    return save_fleet(path, *(instance(*item) for item in items))


def statuses(result: Result, key: str = "findings") -> dict[str, str]:
    """Read the status of each finding of a run by its instance."""
    return {finding["instance_id"]: finding["status"] for finding in result.json("out.json")[key]}


def files(directory: Path) -> dict[str, bytes]:
    """Read every file of a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# ---- The whole way -----------------------------------------------------------------------------------------


def test_findings_are_new_repeated_resolved_and_reopened(
    aws: AwsServer, tagcheck: Tagcheck, policy: Path, tmp_path: Path
) -> None:
    right = {"Owner": "ann", "CostCenter": "CC-1"}
    aws.launch(CLEAN_REGION, right, count=2)
    [untagged], [half] = aws.launch(REGION), aws.launch(OTHER_REGION, {"Owner": "ann"})
    aws.launch(OTHER_REGION, right)
    regions = dict.fromkeys((REGION, OTHER_REGION, CLEAN_REGION))
    policy.write_text(json.dumps(json.loads(policy.read_text()) | {"regions": regions}))

    def scan(code: int) -> Result:
        return tagcheck("scan", "--policy", policy, *JSON_OUTPUT, env=aws.env, check=code)

    first = scan(3)
    assert statuses(first) == {untagged: "NEW", half: "NEW"}
    first_seen = {f["instance_id"]: f["first_seen"] for f in first.json("out.json")["findings"]}
    rows = {row["InstanceId"]: row for row in first.csv("violators.csv")}
    assert {instance_id: row["MissingTags"] for instance_id, row in rows.items()} == {
        untagged: "Owner,CostCenter",
        half: "CostCenter",
    }
    second = scan(3)
    assert statuses(second) == {untagged: "REPEAT", half: "REPEAT"}
    assert [finding["times_seen"] for finding in second.json("out.json")["findings"]] == [2, 2]

    before = remembered(tmp_path, OTHER_REGION)
    aws.fault("error", action="DescribeInstances", region=OTHER_REGION, **DENIED)
    aws.tag(OTHER_REGION, [half], right)
    denied = scan(4)
    assert statuses(denied) == {untagged: "REPEAT"}
    assert remembered(tmp_path, OTHER_REGION) == before
    assert [row["Status"] for row in denied.csv("violators.csv")] == ["REPEAT", "UNREAD"]

    aws.clear_faults()
    aws.tag(REGION, [untagged], right)
    tagged = scan(0)
    assert statuses(tagged, "resolved") == {untagged: "RESOLVED", half: "RESOLVED"}
    assert {finding["resolution"] for finding in tagged.json("out.json")["resolved"]} == {"tagged"}
    assert statuses(tagged) == {}
    assert tagged.csv("violators.csv") == []

    aws.untag(REGION, [untagged], right)
    back = scan(3)
    assert statuses(back) == {untagged: "REOPENED"}
    [finding] = back.json("out.json")["findings"]
    assert (finding["times_seen"], finding["times_reopened"]) == (4, 1)
    assert finding["first_seen"] == first_seen[untagged]


# ---- Exit codes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [("--help",), ("scan", "--help")], ids=" ".join)
def test_help_ends_with_the_exit_codes(tagcheck: Tagcheck, args: tuple[str, ...]) -> None:
    text = re.sub(r"\n {18}(?=\S)", " ", tagcheck(*args, check=0).out.partition("exit codes:")[2])
    table = re.findall(r"^ +(\d+) ([A-Z]+) +(.+)$", text, re.MULTILINE)
    assert table == [(str(int(code)), code.name, code.meaning) for code in script.ExitCode]


@pytest.mark.parametrize("package", ["jsonschema", "yaml", "boto3", "botocore"])
def test_missing_package_is_named_and_no_finding(
    aws: AwsServer, tagcheck: Tagcheck, policy: Path, tmp_path: Path, package: str
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name={package!r})")
    env = aws.env | {"PYTHONPATH": str(packages)}
    result = tagcheck("scan", "--policy", policy, env=env, check=1)
    assert f"the package {package} is missing: pip install" in result.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        pytest.param((), "usage:", id="no command"),
        pytest.param(("scna",), "unknown command 'scna'", id="no such command"),
        pytest.param(("scan", "--polcy", "p"), "unknown option --polcy", id="no such option"),
        pytest.param(("scan", "--workers", "0"), "--workers", id="no worker"),
        pytest.param(("scan", "--fail-on", "maybe"), "--fail-on", id="no such choice"),
        pytest.param(("scan", "--policy", "none.yaml"), "none.yaml", id="policy that is not there"),
        pytest.param(("scan", "--policy", "bad.yaml"), "bad.yaml:1:13: version", id="invalid policy"),
        pytest.param(
            ("scan", "--policy", "typo.yaml"),
            "(did you mean 'us-east-1'?)",
            id="policy with an unknown region",
        ),
        pytest.param(
            ("scan", "--policy", "policy.yaml", "--region", "us-west-2"),
            "--region us-west-2: policy.yaml does not cover it",
            id="region that the policy does not cover",
        ),
        pytest.param(
            ("scan", "--policy", "star.yaml", "--region", "us-west-9"),
            "--region us-west-9",
            id="region that AWS does not have",
        ),
        pytest.param(
            ("scan", "--policy", "policy.yaml", "--account", "1234"),
            "has 12 digits",
            id="account that is none",
        ),
        pytest.param(
            ("scan", "--policy", "policy.yaml", "--account", "210987654321"),
            f"credentials are of {ACCOUNT_ID}",
            id="account of other credentials",
        ),
        pytest.param(
            ("scan", "--policy", "policy.yaml", "--json", "./violators.csv"),
            "--json ./violators.csv and --csv violators.csv are the same file: give each its own",
            id="one goal twice",
        ),
        pytest.param(
            ("scan", "--policy", "policy.yaml", "--json", "-", "--csv", "-"),
            "--json - and --csv - are the same file",
            id="stdout twice",
        ),
        pytest.param(
            ("scan", "--policy", "policy.yaml", "--csv", "instance_state.db"),
            "--csv instance_state.db and --state instance_state.db are the same file",
            id="the state as CSV",
        ),
        pytest.param(
            ("validate", "policy.yaml", "--json", "policy.yaml"),
            "--json policy.yaml and policy.yaml are the same file",
            id="the policy as JSON",
        ),
        pytest.param(
            ("scan", "--policy", "policy.yaml", "--instances", "none.json"),
            "none.json",
            id="no saved instances",
        ),
    ],
)
@pytest.mark.usefixtures("policy")
def test_usage_error_is_said_and_nothing_is_scanned(
    aws: AwsServer, tagcheck: Tagcheck, tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    valid = '"name": "test", "required_tags": ["Owner"]'
    (tmp_path / "bad.yaml").write_text(f'{{"version": 2, {valid}, "regions": {{"us-east-1": }}}}')
    (tmp_path / "typo.yaml").write_text(f'{{"version": 1, {valid}, "regions": {{"us-esat-1": }}}}')
    (tmp_path / "star.yaml").write_text(f'{{"version": 1, {valid}, "regions": {{"*": }}}}')
    result = tagcheck(*args, env=aws.env, check=2)
    assert says in result.err
    assert result.out == ""
    assert not aws.calls(service="ec2")
    assert not (tmp_path / "violators.csv").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        pytest.param(
            ("--state", "none/state.db"), "name another place with --state", id="no place for the state"
        ),
        pytest.param(("--state", "."), "is a directory", id="a directory as state"),
        pytest.param(("--state", "empty"), "is empty (0 bytes)", id="an empty file as state"),
        pytest.param(("--state", "policy.yaml"), "is not a SQLite database", id="a text as state"),
        pytest.param(
            ("--csv", "none/out.csv"), "the directory none does not exist", id="no place for the CSV"
        ),
        pytest.param(("--json", "."), "is a directory", id="a directory as JSON"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_scan(
    aws: AwsServer, tagcheck: Tagcheck, policy: Path, tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    (tmp_path / "empty").touch()
    before = files(tmp_path)
    result = tagcheck("scan", "--policy", policy, *args, env=aws.env, check=5)
    assert result.err.startswith("tagcheck: ")
    assert says in result.err
    assert aws.requests == []
    assert {name: text for name, text in files(tmp_path).items() if name in before} == before


FULL = ("--json", "/dev/full")


@pytest.mark.parametrize(
    ("tags", "denied", "args", "code"),
    [
        pytest.param({"Owner": "x", "CostCenter": "x"}, False, (), 0, id="0"),
        pytest.param({}, False, (), 3, id="3"),
        pytest.param({"Owner": "x", "CostCenter": "x"}, True, (), 4, id="4"),
        pytest.param({}, True, (), 4, id="4 before 3"),
        pytest.param({}, True, ("--fail-on", "never"), 4, id="4 whatever counts"),
        pytest.param({}, False, FULL, 5, id="5 before 3"),
        pytest.param({}, True, FULL, 5, id="5 before 4"),
    ],
)
def test_the_worst_decides(
    aws: AwsServer, tagcheck: Tagcheck, policy: Path, tags: dict[str, str], denied: bool, args: Any, code: int
) -> None:
    aws.launch(REGION, tags)
    if denied:
        aws.fault("error", action="DescribeInstances", region=OTHER_REGION, **DENIED)
    result = tagcheck("scan", "--policy", policy, *args, env=aws.env, check=code)
    if not args or args[0] != "--json":
        assert f"Exit code {code} {script.ExitCode(code).name}: " in result.out
    else:
        assert "/dev/full cannot be written: No space left on device" in result.err


RIGHT = {"Owner": "ann", "CostCenter": "CC-1"}


@pytest.mark.parametrize(
    ("history", "now", "codes"),
    [
        pytest.param([], [("i-0a", {})], {"any": 3, "new": 3, "never": 0}, id="NEW"),
        pytest.param([[("i-0a", {})]], [("i-0a", {})], {"any": 3, "new": 0, "never": 0}, id="REPEAT"),
        pytest.param(
            [[("i-0a", {})], [("i-0a", RIGHT)]],
            [("i-0a", {})],
            {"any": 3, "new": 3, "never": 0},
            id="REOPENED",
        ),
        pytest.param([[("i-0a", {})]], [("i-0a", RIGHT)], {"any": 0, "new": 0, "never": 0}, id="RESOLVED"),
        pytest.param(
            [[("i-0a", {})]],
            [("i-0a", {}), ("i-0b", {})],
            {"any": 3, "new": 3, "never": 0},
            id="REPEAT and NEW",
        ),
    ],
)
def test_fail_on_says_which_findings_count(
    tagcheck: Tagcheck, policy: Path, tmp_path: Path, history: Any, now: Any, codes: Mapping[str, int]
) -> None:
    args = ("scan", "--policy", policy, "--region", REGION, "--instances")
    for instances in history:
        tagcheck(*args, save(tmp_path / "then.json", *instances))
    saved = save(tmp_path / "now.json", *now)
    given = {choice: tagcheck(*args, saved, "--dry-run", "--fail-on", choice).code for choice in codes}
    assert given == codes
    assert tagcheck(*args, saved).code == codes["any"]


# ---- Options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", script.COMMANDS)
def test_options_are_the_fields_of_the_commands_record_each_with_help(name: str) -> None:
    [commands] = [action for action in script.build_parser()._actions if action.dest == "command"]
    assert isinstance(commands.choices, dict)
    options = {
        action.dest: action.help for action in commands.choices[name]._actions if action.dest != "help"
    }
    assert list(options) == [field.name for field in fields(script.COMMANDS[name][1])]
    assert all(options.values())


def test_option_that_is_not_described_is_a_programming_error(monkeypatch: pytest.MonkeyPatch) -> None:
    undescribed = make_dataclass("undescribed", [("colour", str)])
    monkeypatch.setitem(script.COMMANDS, "paint", (script.run_schema, undescribed))
    with pytest.raises(AttributeError):
        script.build_parser()


# ---- Stopped -----------------------------------------------------------------------------------------------


def wait_for(fault: Fault, hits: int, process: subprocess.Popen[str]) -> None:
    """Wait until the fault holds that many requests of a process that still runs."""
    end = time.monotonic() + 30
    while fault.hits < hits:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "action", "hits"),
    [
        pytest.param(signal.SIGINT, "DescribeInstances", 2, id="Ctrl-C while all workers wait"),
        pytest.param(signal.SIGTERM, "DescribeInstances", 2, id="SIGTERM while all workers wait"),
        pytest.param(signal.SIGINT, "GetCallerIdentity", 1, id="Ctrl-C at the first call"),
        pytest.param(signal.SIGTERM, "GetCallerIdentity", 1, id="SIGTERM at the first call"),
    ],
)
def test_interrupted_scan_ends_at_once_and_leaves_everything_as_it_was(
    aws: AwsServer, tagcheck: Tagcheck, policy: Path, tmp_path: Path, number: int, action: str, hits: int
) -> None:
    [instance] = aws.launch(REGION)
    args = ("scan", "--policy", policy, *JSON_OUTPUT, "--junit", "out.xml")
    tagcheck(*args, env=aws.env, check=3)
    before = files(tmp_path)
    aws.tag(REGION, [instance], RIGHT)
    fault = aws.fault("slow", action=action, seconds=60)
    process = subprocess.Popen(
        [sys.executable, TAGCHECK, *args],
        cwd=tmp_path,
        env=clean_environment(tmp_path) | aws.env | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(fault, hits, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        aws.clear_faults()
    assert (process.returncode, out, err) == (130, "", "tagcheck: interrupted; nothing was recorded\n")
    assert files(tmp_path) == before
    assert statuses(tagcheck(*args, env=aws.env, check=0), "resolved") == {instance: "RESOLVED"}


def test_reader_that_goes_away_is_no_failure(tagcheck: Tagcheck, policy: Path, tmp_path: Path) -> None:
    save(tmp_path / "saved.json", *((f"i-{number:04}", {}) for number in range(3000)))
    args = ["scan", "--policy", policy, "--region", REGION, "--instances", "saved.json", "--csv", "-", "-q"]
    process = subprocess.Popen(
        [sys.executable, TAGCHECK, *args],
        cwd=tmp_path,
        env=clean_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 3
    assert len(remembered(tmp_path)) == 3000


def test_stdout_that_takes_nothing_is_a_failure(policy: Path, tmp_path: Path) -> None:
    save(tmp_path / "saved.json", ("i-0a", {}))
    args = ["scan", "--policy", policy, "--region", REGION, "--instances", "saved.json"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, TAGCHECK, *args],
            cwd=tmp_path,
            env=clean_environment(tmp_path),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (run.returncode, "Traceback" in run.stderr) == (5, False)


# ---- What is said ------------------------------------------------------------------------------------------


def test_version(tagcheck: Tagcheck) -> None:
    assert tagcheck("--version", check=0).out == f"tagcheck {script.__version__}\n"


@pytest.mark.parametrize(("tags", "code"), [(RIGHT, 0), ({}, 3)], ids=["compliant", "violations"])
def test_quiet_says_nothing(
    aws: AwsServer, tagcheck: Tagcheck, policy: Path, tags: dict[str, str], code: int
) -> None:
    aws.launch(REGION, tags)
    result = tagcheck("scan", "--policy", policy, "-q", env=aws.env, check=code)
    assert (result.out, result.err) == ("", "")
    assert len(result.csv("violators.csv")) == (code == 3)


def test_quiet_prints_a_report_that_was_asked_for(tagcheck: Tagcheck, policy: Path, tmp_path: Path) -> None:
    saved = save(tmp_path / "saved.json", ("i-0a", {}))
    args = ("scan", "--policy", policy, "--region", REGION, "--instances", saved, "--csv", "-", "-q")
    result = tagcheck(*args, check=3)
    assert [row["InstanceId"] for row in result.csv("-")] == ["i-0a"]
    assert result.err == ""


def test_quiet_still_says_errors(aws: AwsServer, tagcheck: Tagcheck, policy: Path) -> None:
    assert "none.yaml" in tagcheck("scan", "-q", "--policy", "none.yaml", env=aws.env, check=2).err
    aws.fault("error", action="DescribeInstances", region=OTHER_REGION, **DENIED)
    result = tagcheck("scan", "-q", "--policy", policy, env=aws.env, check=4)
    assert result.out == ""
    assert f"{ACCOUNT_ID} {OTHER_REGION}: not read: UnauthorizedOperation: " in result.err
    assert REGION not in result.err


def test_verbose_says_each_retry(aws: AwsServer, tagcheck: Tagcheck, policy: Path) -> None:
    aws.fault("truncate", action="DescribeInstances", region=REGION, times=1)
    result = tagcheck("scan", "--policy", policy, "-v", env=aws.env, check=0)
    assert "ec2:DescribeInstances: IncompleteAnswer; trying again" in result.err


def test_progress_is_a_line_a_target_where_there_is_no_terminal(
    aws: AwsServer, tagcheck: Tagcheck, policy: Path
) -> None:
    aws.launch(REGION, RIGHT, count=3)
    aws.page_size = 1
    result = tagcheck("scan", "--policy", policy, env=aws.env, check=0)
    assert sorted(result.err.splitlines()) == [
        "1 target without instances",
        f"{ACCOUNT_ID} {REGION}: 3 instances",
    ]


def test_progress_is_one_line_that_goes_away_on_a_terminal(
    aws: AwsServer, policy: Path, tmp_path: Path
) -> None:
    aws.launch(REGION, RIGHT)
    leader, follower = os.openpty()
    run = subprocess.run(
        [sys.executable, TAGCHECK, "scan", "--policy", policy],
        cwd=tmp_path,
        env=clean_environment(tmp_path) | aws.env,
        stdout=subprocess.PIPE,
        stderr=follower,
        timeout=60,
        check=False,
    )
    os.close(follower)
    said = os.read(leader, 10_000).decode()
    os.close(leader)
    assert run.returncode == 0
    waiting = r"( · waiting: [a-z0-9, -]+)?"
    line = rf"\r\x1b\[K\d/\d targets? · \d instances? · 0:\d\d{waiting}"
    assert re.fullmatch(rf"({line})+\r\x1b\[K", said)
    assert b"\x1b" not in run.stdout


# ---- The one file ------------------------------------------------------------------------------------------


def write_package(directory: Path, name: str, version: str) -> None:
    """Write what pip leaves of a package that is installed."""
    place = directory / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    ("name", "version", "command"),
    [
        ("boto3", "1.35.0", ["scan", "--policy", "policy.yaml"]),
        ("boto3", "1.42.93", ["scan", "--policy", "policy.yaml"]),
        ("botocore", "1.42.9", ["scan", "--policy", "policy.yaml"]),
        ("boto3", "1.35.0", ["history", "--policy", "policy.yaml", "--state", "s3://bucket/key"]),
        ("PyYAML", "6.0", ["validate", "policy.yaml"]),
        ("jsonschema", "3.2.0", ["validate", "policy.yaml"]),
    ],
)
@pytest.mark.usefixtures("policy")
def test_package_that_is_too_old_is_named_with_what_to_install(
    tagcheck: Tagcheck, tmp_path: Path, name: str, version: str, command: list[str]
) -> None:
    write_package(tmp_path / "packages", name, version)
    result = tagcheck(*command, env={"PYTHONPATH": str(tmp_path / "packages")}, check=1)
    minimum = script.MINIMUM_VERSIONS[name]
    assert result.err == (
        f"tagcheck: {name} {version} is too old ({minimum} or later is needed): pip install --upgrade "
        "'boto3>=1.42.95' 'botocore>=1.42.95' 'PyYAML>=6.0.1' 'jsonschema>=4.0.1'\n"
    )
    assert result.out == ""
    assert not (tmp_path / "instance_state.db").exists()


@pytest.mark.parametrize("version", ["1.42.95", "1.43.0", "1.100", "2.0.0rc1"])
def test_package_that_is_new_enough_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str
) -> None:
    write_package(tmp_path, "boto3", version)
    monkeypatch.syspath_prepend(tmp_path)
    script.check_packages("boto3")


@pytest.mark.usefixtures("policy")
def test_old_boto3_matters_only_to_what_calls_aws(tagcheck: Tagcheck, tmp_path: Path) -> None:
    write_package(tmp_path / "packages", "boto3", "1.35.0")
    env = {"PYTHONPATH": str(tmp_path / "packages")}
    tagcheck("validate", "policy.yaml", env=env, check=0)
    tagcheck("--help", env=env, check=0)


def test_help_imports_nothing_that_it_does_not_need() -> None:
    code = "import sys, tagcheck; tagcheck.build_parser().format_help(); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=TAGCHECK.parent, capture_output=True, text=True, check=True
    )
    assert {"importlib.metadata", "boto3", "botocore", "yaml", "jsonschema"}.isdisjoint(run.stdout.split())


@pytest.mark.parametrize("way", ["symlink", "copy"])
def test_default_policy_stands_beside_the_script(aws: AwsServer, tmp_path: Path, way: str) -> None:
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    shutil.copytree(TAGCHECK.parent / "policies", home / "policies")
    shutil.copy(TAGCHECK, home)
    cwd.mkdir()
    path = home / TAGCHECK.name
    if way == "symlink":
        path = cwd / "tagcheck"
        path.symlink_to(home / TAGCHECK.name)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, path, "scan", *JSON_OUTPUT],
            cwd=cwd,
            env=clean_environment(cwd) | aws.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert run().returncode == 0
    report = json.loads((cwd / "out.json").read_text())
    assert Path(cwd, report["policy"]["file"]) == (home / "policies" / "default.yaml").resolve()
    assert [target["region"] for target in report["coverage"]] == [REGION]
    shutil.rmtree(home / "policies")
    without = run()
    assert (without.returncode, "of a scan: --policy FILE" in without.stderr) == (2, True)


# ---- Arguments, files and environments that nobody expects -------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        pytest.param(["prune", "--days", "10000000"], 2, "at most 9999", id="days before all time"),
        pytest.param(["history", "--tag", "\udcff"], 2, "is not UTF-8", id="not UTF-8"),
        pytest.param(["scan", "--csv", "x" * 300], 5, "File name too long", id="a name too long"),
    ],
)
def test_argument_that_cannot_be_used(
    tagcheck: Tagcheck, tmp_path: Path, policy: Path, args: list[str], code: int, says: str
) -> None:
    fleet = save(tmp_path / "fleet.json", ("i-0a", {}))
    more = ["--policy", policy] if args[0] != "prune" else []
    more += ["--instances", fleet] if args[0] == "scan" else []
    assert says in tagcheck(*args, *more, check=code).err


def by_shell(line: str, *args: str | Path, home: Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run the script by a line of a shell, in which "$@" is its command."""
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, TAGCHECK, *args],
        cwd=cwd,
        env=clean_environment(home),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_closed_standard_input_holds_no_instances(tmp_path: Path, policy: Path) -> None:
    run = by_shell(
        'exec "$@" <&-', "scan", "--policy", policy, "--instances", "-", home=tmp_path, cwd=tmp_path
    )
    assert (run.returncode, "standard input is not what" in run.stderr) == (2, True), run.stderr


def test_a_directory_that_is_gone_is_told(tmp_path: Path, policy: Path) -> None:
    (gone := tmp_path / "gone").mkdir()
    run = by_shell('rmdir "$PWD" && exec "$@"', "validate", policy, home=tmp_path, cwd=gone)
    assert (run.returncode, "cannot use the current directory" in run.stderr) == (2, True), run.stderr


def test_no_password_of_an_endpoint_or_of_a_program_is_printed(
    tagcheck: Tagcheck, tmp_path: Path, policy: Path
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    config = tmp_path / "config"
    config.write_text("[default]\ncredential_process = sh -c 'echo hunter2 >&2; exit 1'\n")
    for env in (
        keys | {"AWS_ENDPOINT_URL": "http://user:hunter2@127.0.0.1:1"},
        {"AWS_CONFIG_FILE": str(config), "AWS_EC2_METADATA_DISABLED": "true"},
    ):
        run = tagcheck("scan", "--policy", policy, env=env, check=5)
        assert "hunter2" not in run.out + run.err


def test_a_listed_account_that_the_files_lack_is_unread(
    tagcheck: Tagcheck, tmp_path: Path, policy: Path
) -> None:
    fleet = save(tmp_path / "fleet.json", ("i-0a", {"Owner": "ann", "CostCenter": "CC-1"}))
    keys = json.loads(policy.read_text())
    accounts = {"ids": [ACCOUNT_ID, "210987654321"], "role_name": "r"}
    for regions, region in (({REGION: None}, REGION), ({"*": None}, "*")):
        policy.write_text(json.dumps(keys | {"accounts": accounts, "regions": regions}))
        args = ("scan", "--policy", policy, "--instances", fleet, *JSON_OUTPUT)
        run = tagcheck(*args, check=4)
        unread = [target for target in run.json("out.json")["coverage"] if target["status"] == "unread"]
        assert [(u["account_id"], u["region"], u["error"]["code"]) for u in unread] == [
            ("210987654321", region, "NotInFiles")
        ]
        tagcheck(*args, "--account", ACCOUNT_ID, check=0)


def test_an_open_finding_in_a_region_that_no_answer_names_is_told(
    tagcheck: Tagcheck, tmp_path: Path, policy: Path
) -> None:
    policy.write_text(json.dumps(json.loads(policy.read_text()) | {"regions": {"*": None}}))
    elsewhere = json.loads(save(tmp_path / "fleet.json", ("i-0a", {})).read_text())
    elsewhere["Reservations"][0]["Instances"][0]["Placement"]["AvailabilityZone"] = f"{OTHER_REGION}a"
    (tmp_path / "other.json").write_text(json.dumps(elsewhere))
    tagcheck("scan", "--policy", policy, "--instances", "other.json", check=3)
    save(tmp_path / "fleet.json", ("i-0b", {"Owner": "ann", "CostCenter": "CC-1"}))
    run = tagcheck("scan", "--policy", policy, "--instances", "fleet.json", *JSON_OUTPUT, check=0)
    notice = f"1 open finding in {ACCOUNT_ID} {OTHER_REGION} was not checked and will stay open: "
    assert any(notice in line for line in run.json("out.json")["notices"])
    narrow = tagcheck("scan", "--policy", policy, "--instances", "fleet.json", "--region", REGION, check=0)
    assert "not checked" not in narrow.out
