"""What people see: lines that fit, what to do first, errors that say what was meant, TAGCHECK_* variables."""

import fcntl
import os
import pty
import re
import select
import shlex
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aws_server import AwsServer
from builders import instance, reservation, save_fleet, save_policy
from builders import instance_id as ident
from conftest import TAGCHECK, Result, clean_environment, run_tagcheck

import tagcheck as script

Run = Callable[..., Result]
LONG = {"Name": "a-name-" * 8, "Owner": "team-" * 20}
REGIONS = ("us-east-1", "eu-west-1", "ap-northeast-1")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """Save a fleet that is hard to show: long values, several accounts and regions, exemptions, warnings."""
    rules = [
        "Owner",
        {"key": "CostCenter", "values": ["a-very-long-value-" * 3, "b"]},
        {"key": "Environment", "values": ["prod"], "default": "prod"},
        {"key": "Team", "effective_from": "2999-01-01"},
    ]
    exemptions = [
        {"reason": ("the vendor tags them " * 8).strip(), "tags": {"Vendor": "*"}},
        {"reason": "nothing has this tag", "tags": {"None": "*"}, "required_tags": ["Owner"]},
    ]
    save_policy(tmp_path, required_tags=rules, regions=dict.fromkeys(REGIONS), exemptions=exemptions)
    fleet = [
        reservation(number, tags, region=region, account=account)
        for number, (tags, region, account) in enumerate(
            [
                ({**LONG, "CostCenter": "wrong-" * 12}, REGIONS[0], "123456789012"),
                ({"Name": "web-1"}, REGIONS[1], "123456789012"),
                ({"Name": "web-2", "owner": "ann"}, REGIONS[2], "012345678901"),
                ({"Name": "v-1", "Vendor": "x"}, REGIONS[0], "123456789012"),
                ({"Name": "v-2", "Vendor": "x"}, REGIONS[0], "123456789012"),
            ],
            1,
        )
    ]
    save_fleet(tmp_path, *fleet)
    return tmp_path


COMMANDS: dict[str, tuple[str, ...]] = {
    "scan": ("scan", "--instances", "fleet.json", "--policy", "policy.yaml"),
    "dry run": ("scan", "--instances", "fleet.json", "--policy", "policy.yaml", "--dry-run"),
    "history": ("history",),
    "history of one": ("history", ident(1)),
    "explain": ("explain", "--policy", "policy.yaml", ident(1)),
    "rules": ("explain", "--policy", "policy.yaml"),
    "remediate": ("remediate", "--policy", "policy.yaml"),
    "prune": ("prune", "--older-than", "1w"),
    **{f"help of {name}": (name, "--help") for name in script.COMMANDS},
    "help": ("--help",),
}


def run_in(directory: Path, *args: str, columns: int | None = None, **env: str) -> Result:
    return run_tagcheck(*args, cwd=directory, env=env | ({"COLUMNS": str(columns)} if columns else {}))


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_is_longer_than_the_terminal_unless_a_word_is(fleet: Path, name: str, columns: int) -> None:
    run_in(fleet, *COMMANDS["scan"])
    lines = run_in(fleet, *COMMANDS[name], columns=columns).lines
    assert lines
    words = max(len(word) for line in lines for word in line.split())
    assert [line for line in lines if len(line) > max(columns, words + 12)] == []
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize("columns", ["0", "1", "-3", "x", "99999"])
@pytest.mark.parametrize("name", ["scan", "remediate", "help of scan"])
def test_no_width_is_a_crash(fleet: Path, name: str, columns: str) -> None:
    run_in(fleet, *COMMANDS["scan"])
    assert run_in(fleet, *COMMANDS[name], COLUMNS=columns).code in (0, 4)


def test_a_line_of_spaces_is_a_line() -> None:
    assert script.fitted(" " * 100, 80) == [" " * 100]


def test_a_pipe_gets_the_full_table(fleet: Path) -> None:
    out = run_in(fleet, *COMMANDS["scan"]).out
    assert re.search("^STATUS +ACCOUNT +REGION +INSTANCE +NAME +SINCE +VIOLATIONS$", out, re.MULTILINE)


def test_what_all_rows_share_stands_above_them(tmp_path: Path) -> None:
    save_policy(tmp_path)
    save_fleet(tmp_path, reservation(1, {"Name": "web"}), reservation(2))
    narrow = run_in(tmp_path, *COMMANDS["scan"], columns=80).out
    assert (
        "Account 123456789012, us-east-1\n"
        "STATUS  INSTANCE             NAME  SINCE\n"
        f"NEW     {ident(1)}  web   -\n"
        "          Owner missing\n"
    ) in narrow
    wide = run_in(tmp_path, *COMMANDS["scan"], "--state", "another.db", columns=120).out
    assert f"NEW     {ident(1)}  web   -      Owner missing\n" in wide


def test_summary_begins_with_what_to_do(tmp_path: Path) -> None:
    save_policy(tmp_path, regions={"us-east-1": None, "eu-west-1": None})
    asg = {"aws:autoscaling:groupName": "web-asg"}
    old = [reservation(number, asg) for number in range(1, 9)]
    save_fleet(tmp_path, *old)
    run_in(tmp_path, *COMMANDS["scan"])
    save_fleet(tmp_path, *old, reservation(9, asg))
    out = run_in(tmp_path, *COMMANDS["scan"]).out
    places = [
        out.index(text)
        for text in (
            "9 findings: 1 NEW, 8 REPEAT",
            "Could not be read",
            "1 Auto Scaling group: 9 instances lack Owner",
            f"NEW     123456789012  us-east-1  {ident(9)}",
            "8 findings REPEAT, the oldest first:",
            f"REPEAT  123456789012  us-east-1  {ident(1)}",
            "… and 3 more in violators.csv",
            "Findings: violators.csv\nState: instance_state.db\nExplain a finding: tagcheck.py explain",
            "\nExit code 4 INCOMPLETE",
        )
    ]
    assert places == sorted(places)
    assert ident(6) not in out


def test_the_summary_ends_with_a_command_that_explains_a_finding(tmp_path: Path) -> None:
    save_policy(tmp_path)
    save_fleet(tmp_path, reservation(1, {"Owner": "ann"}), reservation(2), reservation(3))
    for _ in ("NEW", "REPEAT"):
        *_, command, code = run_in(tmp_path, *COMMANDS["scan"], "--state", "its state.db").lines
        words = ("--policy", "policy.yaml", "--state", "its state.db", ident(2))
        assert command == f"Explain a finding: tagcheck.py explain {shlex.join(words)}"
        assert code.startswith("Exit code 3")
        assert f"{ident(2)} in " in run_in(tmp_path, "explain", *words).out
    # Nothing that a state does not have.
    save_fleet(tmp_path, reservation(1, {"Owner": "ann"}))
    assert "Explain" not in run_in(tmp_path, *COMMANDS["scan"], "--state", "new.db").out
    save_fleet(tmp_path, reservation(1))
    assert "Explain" not in run_in(tmp_path, *COMMANDS["scan"], "--dry-run").out


def test_exemptions_are_counted_and_not_listed(fleet: Path) -> None:
    out = run_in(fleet, *COMMANDS["scan"]).out
    assert out.count("EXEMPTED") == 1
    assert f"EXEMPTED  2 instances: {'the vendor tags them ' * 8}".rstrip() in out
    assert ident(4) not in out


def test_a_command_that_is_wrapped_still_works_when_it_is_copied(fleet: Path) -> None:
    run_in(fleet, *COMMANDS["scan"], "--state", "a-state-with-a-long-name.db")
    plan = ("--csv", "a-plan-with-a-long-name-as-well.csv", "--state", "a-state-with-a-long-name.db")
    lines = run_in(fleet, *COMMANDS["remediate"], *plan, columns=60).lines
    place = next(index for index, line in enumerate(lines) if line.startswith("  tagcheck.py"))
    command = "\n".join(lines[place:])
    assert command.count("\\\n") >= 1
    words = subprocess.run(["sh", "-c", f"echo {command}"], capture_output=True, text=True, check=True).stdout
    assert words.split() == [
        *("tagcheck.py", "remediate", "--policy", "policy.yaml", "--state", "a-state-with-a-long-name.db"),
        *("--plan", "a-plan-with-a-long-name-as-well.csv", "--apply"),
    ]


def test_no_tag_is_taken_for_a_command(tmp_path: Path) -> None:
    save_policy(tmp_path, required_tags=["Owner", {"key": "Environment", "values": ["prod"]}])
    wrong = {"Environment": "a: tagcheck.py remediate --apply"}
    long = wrong | {"aws:autoscaling:groupName": ": tagcheck.py x" * 2000}
    save_fleet(tmp_path, *(reservation(number, tags) for number, tags in enumerate([wrong, long, long], 1)))
    for name in ("scan", "history", "history of one", "explain"):
        lines = run_in(tmp_path, *COMMANDS[name], columns=60).lines
        assert any("a: tagcheck.py" in line for line in lines)
        commands = [line for line in lines if line.endswith("\\") or line.startswith("  tagcheck.py r")]
        assert [line for line in commands if not line.startswith("  tagcheck.py explain ")] == []


def test_a_command_is_broken_only_between_its_words(fleet: Path) -> None:
    run_in(fleet, *COMMANDS["scan"], "--state", "a state with a long name.db")
    lines = run_in(fleet, *COMMANDS["remediate"], "--state", "a state with a long name.db", columns=40).lines
    assert lines[lines.index("Plan only. Apply it with:") + 1 :] == [
        "  tagcheck.py remediate --policy \\",
        "    policy.yaml --state \\",
        "    'a state with a long name.db' \\",
        "    --plan remediate-plan.csv --apply",
    ]


# ---- Arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "usage", "says"),
    [
        (("scna",), "", "unknown command 'scna' (did you mean 'scan'?)"),
        (("x",), "", "unknown command 'x': --help lists the commands; options come after the command"),
        (("--policy", "x", "scan"), "", "unknown command 'x': --help lists the commands; options come after"),
        (("-v", "scan"), "scan", "-v comes after the command: tagcheck.py scan -v"),
        (
            ("--state=x", "history"),
            "history",
            "--state=x comes after the command: tagcheck.py history --state=x",
        ),
        (("-v", "history"), "history", "unknown option -v"),
        (("scan", "--polcy", "x"), "scan", "unknown option --polcy (did you mean '--policy'?)"),
        (("scan", "--polcy=x"), "scan", "unknown option --polcy=x (did you mean '--policy'?)"),
        (("scan", "us-east-1"), "scan", "unknown argument us-east-1"),
        (("scan", "--workers", "many"), "scan", "'many' is not a number of at least 1"),
        (("scan", "--creators-budget", "5"), "scan", "'5' is not a time: write 90s, 36h, 7d or 1w"),
        (("history", "--older-than", "3 years"), "history", "'3 years' is not a time"),
        (
            ("prune", "--older-than", "5m"),
            "prune",
            "'5m' is less than a day, as m is minutes: write 90d or 12w",
        ),
        (("prune", "--older-than", "0d"), "prune", "'0d' is less than a day"),
        (("prune", "--older-than", "5"), "prune", "'5' is not a time: write 90d or 12w"),
        (("explain", "web-1"), None, "web-1 is not an instance id, such as i-0123456789abcdef0"),
        (("history", "foo"), None, "foo is not an instance id"),
        (("prune", "--days", "0"), "prune", "'0' is not a number of at least 1"),
    ],
)
def test_wrong_argument_says_what_was_meant(
    tmp_path: Path, args: tuple[str, ...], usage: str | None, says: str
) -> None:
    result = run_in(tmp_path, *args)
    assert result.code == 2
    assert says in result.err
    if usage is not None:
        assert result.err.startswith(f"usage: tagcheck.py {usage}".rstrip())
    assert not re.search(r"\b_\w+|<function", result.err)


def test_no_arguments_are_the_help_and_exit_code_2(tmp_path: Path) -> None:
    result = run_in(tmp_path)
    assert (result.code, result.out) == (2, "")
    assert "exit codes:" in result.err


@pytest.mark.parametrize("name", script.COMMANDS)
def test_help_has_two_examples_that_are_right(tmp_path: Path, name: str) -> None:
    out = run_in(tmp_path, name, "--help", columns=200).out
    examples = out.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) == 2
    for example in examples:
        words = re.split("[|>]", example)[0].split()
        assert words[0] == "tagcheck.py"
        assert script.build_parser().parse_args(words[1:]).command == name
    assert ("exit codes:" in out) == (name == "scan")


@pytest.mark.parametrize("args", [(), ("--days", "3", "--older-than", "3d")])
def test_prune_wants_one_age(tmp_path: Path, args: tuple[str, ...]) -> None:
    assert "--older-than 90d, or --days 90" in run_in(tmp_path, "prune", *args).err


@pytest.mark.parametrize(("text", "hours"), [("7d", 168), ("1w", 168), ("36h", 36), ("90s", 0.025)])
def test_times(text: str, hours: float) -> None:
    assert script.duration(text).total_seconds() == hours * 3600


# ---- The environment ---------------------------------------------------------------------------------------


def test_environment_gives_files_and_the_command_line_wins(fleet: Path) -> None:
    given = {
        "TAGCHECK_POLICY": "policy.yaml",
        "TAGCHECK_STATE": "mine.db",
        "TAGCHECK_INSTANCES": "fleet.json",
        "TAGCHECK_CSV": "mine.csv",
        "TAGCHECK_JSON": "",
    }
    result = run_in(fleet, "scan", "-v", **given)
    assert result.code == 4
    assert (fleet / "mine.db").exists()
    assert (fleet / "mine.csv").exists()
    assert "--state mine.db (from TAGCHECK_STATE)" in result.err
    result = run_in(fleet, "scan", "-v", "--state", "other.db", **given)
    assert (fleet / "other.db").exists()
    assert "TAGCHECK_STATE" not in result.err
    save_fleet(fleet, reservation(9))
    (fleet / "fleet.json").rename(fleet / "more.json")
    result = run_in(fleet, "scan", "--instances", "more.json", **given)
    assert "fleet.json" not in result.err
    assert "(default from TAGCHECK_STATE: mine.db)" in " ".join(
        run_in(fleet, "scan", "--help", **given).out.split()
    )


@pytest.mark.parametrize("name", ["POLICY", "STATE", "INSTANCES", "CSV"])
def test_environment_that_is_not_utf_8_is_refused(fleet: Path, name: str) -> None:
    given = {f"TAGCHECK_{name}": "s3://a/\udcff" if name == "STATE" else "a\udcff"}
    result = run_in(fleet, *COMMANDS["scan"][:1], **given)
    assert result.code == 2
    assert re.search(rf"tagcheck: --{name.lower()} .*udcff \(from TAGCHECK_{name}\): .* UTF-8", result.err)


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("", "COMMAND [options]"),
        ("scan", "[options]"),
        ("validate", "[options] POLICY ..."),
        ("explain", "[options] [INSTANCE]"),
        ("report", "[options] --html FILE"),
    ],
)
def test_usage_names_what_a_command_needs(tmp_path: Path, name: str, usage: str) -> None:
    words = [*filter(None, [name])]
    usage = " ".join(["usage: tagcheck.py", *words, usage])
    assert run_in(tmp_path, *words, "--help", columns=80).lines[0] == usage
    assert run_in(tmp_path, *words, "--colour", columns=80).err.startswith(f"{usage}\n")


def test_environment_names_the_outputs_of_a_scan_only(fleet: Path) -> None:
    given = {"TAGCHECK_CSV": "mine.csv", "TAGCHECK_JSON": "mine.json"}
    run_in(fleet, *COMMANDS["scan"], **given)
    before = [(fleet / name).read_bytes() for name in given.values()]
    assert ident(1) in run_in(fleet, "history", **given).out
    assert "valid" in run_in(fleet, "validate", "policy.yaml", **given).out
    assert run_in(fleet, *COMMANDS["remediate"], **given).code == 0
    assert (fleet / "remediate-plan.csv").exists()
    assert [(fleet / name).read_bytes() for name in given.values()] == before
    assert "TAGCHECK_CSV: mine.csv" in run_in(fleet, "scan", "--help", columns=200, **given).out
    assert "TAGCHECK" not in run_in(fleet, "history", "--help", columns=200, **given).out
    assert "TAGCHECK_CSV, TAGCHECK_JSON and TAGCHECK_JUNIT" in run_in(fleet, "--help", columns=400).out


@pytest.mark.parametrize(
    ("args", "given", "says"),
    [
        (("explain", ident(1), "--live"), "INSTANCES", "credentials"),
        (("scan", "--creators"), "INSTANCES", "credentials"),
        (("remediate", "--plan", "p.csv"), "UNDO", "p.csv cannot be read"),
        (("remediate", "--undo", "u.csv"), "PLAN", "no state"),
        (("remediate", "--owner", "ann"), "PLAN", "no state"),
    ],
)
def test_environment_gives_nothing_that_an_option_excludes(
    fleet: Path, args: tuple[str, ...], given: str, says: str
) -> None:
    result = run_in(fleet, *args, "--policy", "policy.yaml", **{f"TAGCHECK_{given}": "fleet.json"})
    assert says in result.err


@pytest.mark.parametrize(
    ("args", "given", "says"),
    [
        (("explain", ident(1), "--live", "--instances", "fleet.json"), (), "--instances and --live"),
        (("scan", "--creators", "--instances", "fleet.json"), (), "--instances and --creators"),
        (("remediate", "--owner", "ann", "--undo", "u.csv"), (), "--owner and --undo"),
        (("remediate",), ("PLAN", "UNDO"), "--plan and --undo"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    tmp_path: Path, args: tuple[str, ...], given: tuple[str, ...], says: str
) -> None:
    result = run_in(tmp_path, *args, **{f"TAGCHECK_{name}": "x" for name in given})
    assert (result.code, result.err) == (2, f"tagcheck: {says}: give one of them\n")


def test_environment_gives_what_is_required(fleet: Path) -> None:
    run_in(fleet, *COMMANDS["scan"])
    assert run_in(fleet, "report").code == 2
    assert run_in(fleet, "report", TAGCHECK_HTML="page.html").code == 0
    assert (fleet / "page.html").exists()


# ---- The only policy of a state ----------------------------------------------------------------------------


def test_only_policy_of_a_state_needs_no_option(fleet: Path) -> None:
    run_in(fleet, *COMMANDS["scan"])
    assert ident(1) in run_in(fleet, "history").out
    assert "Team" in run_in(fleet, "report", "--html", "-").out
    (fleet / "policy.yaml").unlink()
    assert ident(1) in run_in(fleet, "history").out
    assert "open findings" in run_in(fleet, "report", "--html", "-").out
    os.mkfifo(fleet / "policy.yaml")  # to read it would take forever
    assert ident(1) in run_in(fleet, "history").out
    with closing(sqlite3.connect(fleet / "instance_state.db")) as db, db:
        db.execute("UPDATE scans SET policy_file = ?", ["x" * 5000])  # the system cannot even look for it
    assert ident(1) in run_in(fleet, "history").out
    assert "open findings" in run_in(fleet, "report", "--html", "-").out


def test_two_policies_of_a_state_need_the_option(fleet: Path) -> None:
    run_in(fleet, *COMMANDS["scan"])
    save_policy(fleet, name="other")
    run_in(fleet, *COMMANDS["scan"])
    result = run_in(fleet, "history")
    assert result.code == 5
    assert "it has scans of 'other', 'test': name that policy's file with --policy" in result.err
    assert run_in(fleet, "history", "--policy", "policy.yaml").code == 0


# ---- Progress ----------------------------------------------------------------------------------------------


def test_targets_without_instances_are_counted_in_one_line(aws: AwsServer, tmp_path: Path) -> None:
    aws.launch("us-east-1")
    save_policy(tmp_path, regions=dict.fromkeys(REGIONS))
    result = run_tagcheck("scan", "--policy", "policy.yaml", cwd=tmp_path, env=aws.env)
    assert result.err.splitlines() == [
        "123456789012 us-east-1: 1 instance",
        "2 targets without instances",
    ]
    quiet = run_tagcheck("scan", "--policy", "policy.yaml", "-q", cwd=tmp_path, env=aws.env)
    assert quiet.err == ""


def in_terminal(directory: Path, *args: str, columns: int, env: Mapping[str, str]) -> str:
    """Run the script in a terminal of this width; returns what it writes there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    variables: dict[str, Any] = {**clean_environment(directory), **env, "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, TAGCHECK, *args], cwd=directory, env=variables, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline and select.select([ours], [], [], 60)[0]:
        try:
            written += os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal that nobody has open
            break
    process.wait(60)
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


def test_terminal_shows_how_far_a_scan_is_and_what_it_waits_for(aws: AwsServer, tmp_path: Path) -> None:
    aws.launch("us-east-1")
    save_policy(tmp_path, regions=dict.fromkeys(REGIONS))
    aws.fault("slow", seconds=0.5, action="DescribeInstances", region="eu-west-1")
    text = in_terminal(tmp_path, "scan", "--policy", "policy.yaml", columns=70, env=aws.env)
    lines = re.findall(r"\r\x1b\[K([^\r\n\x1b]+)", text)
    assert any(re.match(r"[0-3]/3 targets · [01] instances? · 0:0\d", line) for line in lines)
    assert any("waiting: " in line for line in lines)
    assert max(map(len, lines)) < 70
    shown = re.sub("\x1b\\[[0-9]*[mK]", "", text)
    assert max(map(len, shown.splitlines())) <= 70
    assert "Account 123456789012, us-east-1\n" in shown


def test_explain_live_looks_through_the_regions_of_the_policy(aws: AwsServer, tmp_path: Path) -> None:
    (id_,) = aws.launch("eu-west-1")
    save_policy(tmp_path, regions=dict.fromkeys(("us-east-1", "eu-west-1")))
    args = ("explain", "--policy", "policy.yaml", "--live", id_)
    result = run_tagcheck(*args, cwd=tmp_path, env=aws.env, check=0)
    assert f"{id_} in 123456789012 eu-west-1" in result.out
    save_policy(tmp_path, regions={"us-east-1": None, "*": None})
    assert "eu-west-1" in run_tagcheck(*args, cwd=tmp_path, env=aws.env, check=0).out


def test_owners_are_compared_with_the_first_scan_where_it_is_younger_than_30_days(fleet: Path) -> None:
    run_in(fleet, *COMMANDS["scan"])
    page = run_in(fleet, "report", "--html", "-").out
    assert "open finding" in page
    assert "30 days ago" not in page


def test_columns_of_wide_characters_are_aligned(tmp_path):
    names = {1: "web", 2: "\u6771\u4eac\u306e\u7d50\u679c" * 5, 3: "e\u0301te\u0301"}
    save_policy(tmp_path)
    save_fleet(tmp_path, *(instance(number, {"Name": name}) for number, name in names.items()))
    lines = run_in(tmp_path, *COMMANDS["scan"], columns=200).out.splitlines()
    places = {
        script.display_width(line[: line.index("Owner missing")]) for line in lines if "Owner missing" in line
    }
    assert len(places) == 1
    assert all(script.display_width(script.cut_text(name, 7)) <= 7 for name in names.values())
    assert script.cut_text(names[2], 7) == "\u6771\u4eac\u306e\u2026"


def test_variables_name_only_files_and_the_profile(tmp_path):
    save_policy(tmp_path)
    save_fleet(tmp_path, instance(1))
    result = run_in(tmp_path, *COMMANDS["scan"], TAGCHECK_FAIL_ON="foo", TAGCHECK_REGION="eu-west-1")
    assert "1 finding: 1 NEW" in result.out
