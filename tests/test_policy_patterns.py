"""Patterns of a policy meet tag values of strangers: no value stops a scan, and none hides a finding."""

import contextlib
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest
from builders import instance, policy, save_fleet, save_policy
from conftest import TAGCHECK, Result, run_tagcheck, time_limit

import tagcheck as script

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
# No try at load time meets what it needs before it becomes slow.
TRAP = r"(?=[xy])\wz(b|bb|a)*!"
HOSTILE = [f"{first}z{'b' * length}" for first in "xy" for length in range(200, 203)]
STOPPED = "its pattern gave no answer on this value within 0.1 s; it counts as not matching"
NOT_CHECKED = "not checked, as its pattern took too long on other values; it counts as not matching"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs signals")


Main = Callable[..., Result]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Main:
    """Give a function that runs a command in the test's own directory and with a short limit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "PATTERN_SECONDS", 0.1)

    return functools.partial(run_tagcheck, cwd=tmp_path, now=NOW)


def write(pattern: str, values: Sequence[str]) -> None:
    """Write a policy with a pattern for CostCenter, and an instance for each value."""
    rule = {"key": "CostCenter", "pattern": pattern}
    save_policy(Path("p.yaml"), required_tags=[rule])
    save_fleet(Path(), *(instance(number, {"CostCenter": value}) for number, value in enumerate(values)))


SCAN = "scan --policy p.yaml --instances fleet.json --region us-east-1 --json out.json".split()
SCAN += ["--account", "123456789012"]


def messages() -> dict[int, str]:
    """Return the message of each finding of the last scan, by the instance's number."""
    report = json.loads(Path("out.json").read_text())
    return {
        int(finding["instance_id"][2:], 16): finding["violations"][0]["message"]
        for finding in report["findings"]
    }


def test_value_on_which_a_pattern_is_stopped_is_a_finding_and_the_scan_goes_on(main: Main) -> None:
    write(TRAP, ["xzab!", HOSTILE[0], "yzb!", "other"])
    run = main(*SCAN)
    assert run.code == 3
    found = messages()
    assert sorted(found) == [1, 3]
    assert found[1].startswith("CostCenter is 'xzbbb")
    assert found[1].endswith(STOPPED)
    assert found[3].startswith("CostCenter is 'other', not a match of")
    *_, notice = json.loads(Path("out.json").read_text())["notices"]
    assert notice == (
        "p.yaml:1: warning: CostCenter: its pattern took too long on 1 tag value (counted as not matching): "
        "list the values, or repeat no part that holds a repetition"
    )
    assert "p.yaml:1: warning: CostCenter: its pattern took too long on 1 tag value" in run.out


def test_pattern_that_was_stopped_often_is_tried_on_no_other_value(main: Main) -> None:
    write(TRAP, ["xzab!", *HOSTILE[:4], "xzab!", HOSTILE[0], "yzb!"])
    assert main(*SCAN).code == 3
    found = messages()
    assert sorted(found) == [1, 2, 3, 4, 6, 7]
    assert all(found[number].endswith(STOPPED) for number in (1, 2, 3, 6))
    assert found[4].endswith(NOT_CHECKED)
    assert found[7] == f"CostCenter is 'yzb!': {NOT_CHECKED}"
    *_, notice = json.loads(Path("out.json").read_text())["notices"]
    assert "takes too long on some tag values, so others were not checked" in notice


def test_pattern_that_is_slow_again_and_again_is_given_up(
    main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "MAX_SLOW_SECONDS", 0.02)
    monkeypatch.setattr(script, "PATTERN_SECONDS", 5)
    write("[xy]z[a-z]*[a-z]*[a-z]*[0-9]", [f"xz{'b' * length}" for length in range(150, 250)])
    assert main(*SCAN).code == 3
    ends = [message.endswith(NOT_CHECKED) for _, message in sorted(messages().items())]
    assert ends == sorted(ends)
    assert ends[0] is False
    assert ends[-1] is True


def test_explain_says_the_same(main: Main) -> None:
    write(TRAP, HOSTILE[:1])
    run = main("explain", "--policy", "p.yaml", "--instances", "fleet.json", f"i-{0:017x}")
    assert run.code == 0
    assert STOPPED in run.out


def test_row_of_a_plan_says_the_same(main: Main) -> None:
    write(TRAP, [])
    policy = script.load_policy("p.yaml")
    place = ("123456789012", "us-east-1", "i-0")
    row = script.PlanRow(*place, "", "CostCenter", HOSTILE[0], script.Action.ADD, None, None, "")
    assert (script.row_error(row, policy) or "").endswith(STOPPED)


@pytest.mark.usefixtures("main")
def test_hostile_value_is_not_suggested() -> None:
    rule = script.RequiredTag("CostCenter", pattern=script.ValuePattern(TRAP))
    violation = script.check_tag({"cost_center": HOSTILE[0]}, rule, frozenset())
    assert violation is not None
    assert script.suggest(violation, rule, frozenset(), [], script.Reliability()) is None
    violation = script.check_tag({"cost_center": "xzb!"}, rule, frozenset())
    assert violation is not None
    suggestion = script.suggest(violation, rule, frozenset(), [], script.Reliability())
    assert suggestion is not None
    assert suggestion.value == "xzb!"


@pytest.mark.usefixtures("main")
def test_limit_holds_in_threads() -> None:
    pattern = script.ValuePattern(TRAP)
    values = [*HOSTILE[:2], "xzb!", "no"]
    verdicts: dict[str, script.Verdict] = {}

    def judge(value: str) -> None:
        verdicts[value] = pattern.judge(value)

    threads = [threading.Thread(target=judge, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stopped, allowed, refused = script.Verdict.STOPPED, script.Verdict.ALLOWED, script.Verdict.REFUSED
    assert [verdicts[value] for value in values] == [stopped, stopped, allowed, refused]


@pytest.mark.usefixtures("main")
@pytest.mark.parametrize("pattern", [".*", "[a-z]*[a-z]*!"])
def test_limit_holds_for_a_value_longer_than_aws_allows(pattern: str) -> None:
    judged = script.ValuePattern(f"({pattern})").judge("a" * 20_000)
    assert judged is (script.Verdict.ALLOWED if pattern == ".*" else script.Verdict.STOPPED)


def test_policy_with_simple_patterns_starts_no_process(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    write("CC-[0-9]{4}|[a-z]+@example\\.com", ["CC-1234", "me@example.com", "CC-12345"])
    assert main(*SCAN).code == 3
    assert sorted(messages()) == [2]


@pytest.mark.parametrize("executable", ["", "nowhere/python", "/bin/true", "/bin/cat"])
def test_scan_fails_where_no_process_can_be_started(
    main: Main, monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    script._MATCHER.stop()
    monkeypatch.setattr(sys, "executable", executable)
    write(TRAP, ["xzb!"])
    run = main(*SCAN)
    assert run.code == 5
    assert "cannot start a Python process to check a pattern in: " in run.err
    assert "list the values in the policy instead of a pattern" in run.err
    assert not Path("out.json").exists()
    assert main("validate", "p.yaml").code == 5


def test_child_that_was_killed_is_started_again() -> None:
    pattern = script.ValuePattern(TRAP)
    assert pattern.judge("xzb!") is script.Verdict.ALLOWED
    os.kill(script._MATCHER._process.pid, signal.SIGKILL)
    assert pattern.judge("xza!") is script.Verdict.ALLOWED
    assert pattern.stopped == 0


HOLDS_A_CHILD = """\
import sys; sys.path.insert(0, sys.argv[1]); import tagcheck
tagcheck.PATTERN_SECONDS = 1.0
tagcheck.ValuePattern("(a)*").judge("a")
print(tagcheck._MATCHER._process.pid, flush=True)
tagcheck.ValuePattern("(a|aa)+").judge("a" * 200 + "!") if sys.argv[2] == "busy" else sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["idle", "busy"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_child_ends_with_its_parent(how: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", HOLDS_A_CHILD, str(TAGCHECK.parent), how]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as parent:  # type: ignore[call-overload]
        child = int(parent.stdout.readline())
        time.sleep(0.1)
        parent.send_signal(number)
        _, err = parent.communicate(timeout=30)
    assert "Fatal" not in err
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, os.WNOHANG)
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").exists() and ") Z " in Path(f"/proc/{child}/stat").read_text():
            return  # it has ended; nobody has asked how
        time.sleep(0.05)
    pytest.fail("the child is still there")


def test_ctrl_c_during_a_match_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(TRAP, HOSTILE)
    lines = [
        f"import sys; sys.path.insert(0, {str(TAGCHECK.parent)!r}); import tagcheck",
        "judge = tagcheck.ValuePattern.judge",
        "tagcheck.ValuePattern.judge = lambda *args: (print('judging', flush=True), judge(*args))[1]",
        "raise SystemExit(tagcheck.main(sys.argv[1:]))",
    ]
    Path("run.py").write_text("\n".join(lines))
    command = [sys.executable, "run.py", *SCAN]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "judging\n"
        time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        _, err = run.communicate(timeout=30)
    assert run.returncode == 130, err
    assert err == "tagcheck: interrupted; nothing was recorded\n"


# ---- At load time ------------------------------------------------------------------------------------------


def load(*patterns: str) -> list[str]:
    """Return the messages of a policy with these patterns."""
    rules = [{"key": f"k{number}", "pattern": pattern} for number, pattern in enumerate(patterns)]
    try:
        script.check_policy(json.dumps(policy(required_tags=rules)).encode(), "p.yaml")
    except script.PolicyError as error:
        return [problem.message for problem in error.problems]
    return []


@pytest.mark.usefixtures("main")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("((((a{256}){256}){256}){256}){4}", None),
        ("(((a{1,1000}){1,1000}){1,1000})", "can run forever on long values"),
        ("a{1,99999999999}", "the repetition number is too large"),
        ("(a{1,99999999999})*", "the repetition number is too large"),
        ("(?i)" + r"[\u0000-\U0010ffff]" * 450, "takes too much time or memory to compile"),
        ("a" * 10_001, "has more than 10,000 characters"),
        ("(" * 3000 + ")" * 3000, "is not a regular expression"),
        ("(a{" + "9" * 5000 + "})", "is not a regular expression: Exceeds the limit"),
        (f"(?P={'a' * 5000})", "is not a regular expression: unknown group name 'aaa"),
        ("(?P<a", "is not a regular expression: missing >, unterminated name"),
        ("(*-prod)", "nothing to repeat at position 1 (any text is .* in a pattern)"),
    ],
)
def test_compiling_has_a_limit(pattern: str, message: str | None) -> None:
    began = time.monotonic()
    found = load(pattern)
    assert time.monotonic() - began < 10
    assert (found == []) if message is None else (message in found[0])


@pytest.mark.usefixtures("main")
def test_tries_of_one_policy_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "MAX_TRY_SECONDS", 60)
    monkeypatch.setattr(script, "MAX_CHECK_SECONDS", 60)
    patterns = [f"(a|a)*{number}" for number in range(3)]
    assert ["can run forever" in message for message in load(*patterns)] == [True] * 3
    monkeypatch.setattr(script, "MAX_TRY_SECONDS", 0)
    assert load(*patterns) == []  # untried, as each value has its limit
    monkeypatch.setattr(script, "MAX_CHECK_SECONDS", 0)
    assert ["was not checked" in message for message in load(*patterns)] == [True] * 3


# ---- Whatever pattern, whatever value ----------------------------------------------------------------------

ATOMS = (
    *(
        "a",
        "b",
        "ab",
        "0",
        " ",
        "é",
        ".",
        "[ab]",
        "[^a]",
        "[a-z]",
        "[^\\W_]",
        r"\w",
        r"\W",
        r"\d",
        r"\s",
        r"\S",
    ),
    *(
        "x",
        "-",
        r"\.",
        "[)(*]",
        "(?:)",
        "^",
        "$",
        r"\b",
        r"\B",
        "[\u4e00-\u9fff]",
        "(?:a{3})",
        "(?=a)",
        "(?!b)",
        "(?<=a)",
    ),
)
GROUPS = ("({})", "(?:{})", "(?={})", "(?!{})", "({})\\1", "(?i:{})", "({}|a)", "(a|{}|ab)", "(?:{}|{})")
REPEATS = ("", "", "", "*", "+", "?", "*?", "+?", "{2}", "{2,}", "{1,30}", "{,3}", "*+")
FLAGS = ("", "", "", "(?i)", "(?s)", "(?a)", "(?m)", "(?x)", "(?is)")


def some_pattern(rng: random.Random, depth: int = 3) -> str:
    """Make a pattern of random pieces, some of which `re` does not take."""
    pieces = []
    for _ in range(rng.randrange(1, 4)):
        piece = rng.choice(ATOMS)
        if depth and rng.random() < 0.6:
            inner = some_pattern(rng, depth - 1)
            piece = rng.choice(GROUPS).replace("{}", inner)
        pieces.append(piece + rng.choice(REPEATS))
    return "".join(pieces)


def some_policy_pattern(rng: random.Random) -> str:
    """Make a pattern for `re`; half of them are slow only on values that no try at load time knows."""
    begun = rng.choice(["", "[xy]z"])
    while True:
        pattern = rng.choice(FLAGS) + begun + some_pattern(rng)
        with contextlib.suppress(re.error):
            re.compile(pattern)
            return pattern
        if rng.random() < 0.05:
            return pattern


def some_values(rng: random.Random) -> list[str]:
    """Make values on which patterns are slow, and some on which they are not."""
    pieces = ["a", "b", "ab", "A", "0", " ", "é", "x", "-", "\u4e2d", "\U0001f600", "aab", "a ", "\n"]
    ends = ["", "!", "\0", "\n", "b"]
    long = [(rng.choice(pieces) * 256)[:255] + rng.choice(ends) for _ in range(8)]
    mixed = ["".join(rng.choices(pieces, k=rng.randrange(1, 128))) for _ in range(6)]
    values = (*long, *mixed, "a", "b", "ab", "A", "0", "x-", "-")
    return [*dict.fromkeys(value[:256] for value in (*values, *(f"xz{value}" for value in values)))]


class LateError(Exception):
    """`re` did not judge a value in time."""


def be_late() -> NoReturn:
    """Raise LateError."""
    raise LateError


def check_search(main: Main, seed: int) -> tuple[str, str, float]:
    """Scan values with a pattern, and compare with `re` itself; returns pattern, outcome and seconds."""
    rng = random.Random(seed)
    pattern = some_policy_pattern(rng)
    values = [value for value in some_values(rng) if not script.is_blank(value)]
    write(pattern, values)
    Path("out.json").unlink(missing_ok=True)
    began = time.monotonic()
    run = main(*SCAN)
    took = time.monotonic() - began
    if run.code == 2:
        try:
            re.compile(pattern)
        except re.error as error:
            assert f"is not a regular expression: {error}".splitlines()[0] in run.err
            return pattern, "not a pattern", took
        assert "can run forever on long values" in run.err
        return pattern, "refused", took
    found = messages()
    outcome = "scanned"
    for number, value in enumerate(values):
        message = found.get(number, "")
        outcome = "given up" if message.endswith(NOT_CHECKED) else outcome
        try:
            with time_limit(script.PATTERN_SECONDS / 10, be_late):
                matches = re.fullmatch(pattern, value) is not None
        except (LateError, SystemError):  # of some patterns `re` itself says that it has a bug
            continue
        assert not message.endswith(STOPPED), value
        assert matches is (not message) or message.endswith(NOT_CHECKED), value
    assert run.code == (3 if found else 0)
    return pattern, outcome, took


@pytest.mark.parametrize("seeds", [range(30), pytest.param(range(1000, 1400), marks=pytest.mark.soak)])
def test_no_pattern_and_no_value_stops_a_scan_or_changes_a_verdict(main: Main, seeds: range) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    ended = []
    for seed in seeds:
        try:
            ended.append(check_search(main, seed))
        except BaseException as error:
            error.add_note(f"seed {seed}: {json.loads(Path('p.yaml').read_text())['required_tags'][0]}")
            raise
    slowest = sorted(ended, key=lambda end: -end[2])
    assert slowest[0][2] < 20, slowest[0]
    print(*slowest[:5], sep="\n")
    outcomes: dict[str, int] = {}
    for _, outcome, _ in ended:
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(outcomes)
    assert outcomes["scanned"] > len(ended) / 10


def test_pattern_that_is_matched_in_process_is_never_slow() -> None:
    warnings.simplefilter("ignore", FutureWarning)
    rng = random.Random(7)
    quick = 0
    for _ in range(20_000):
        pattern = rng.choice(FLAGS) + some_pattern(rng, rng.choice([0, 1]))
        if not script.is_quick(pattern):
            continue
        try:
            compiled = re.compile(pattern)
        except re.error:
            continue
        quick += 1
        for value in ("a" * 255 + "\0", "ab" * 127 + "!", "0" * 256):
            began = time.process_time()
            compiled.fullmatch(value)
            assert time.process_time() - began < 0.1, (pattern, value)
    assert quick > 500


@pytest.mark.parametrize(
    ("pattern", "quick"),
    [
        ("CC-[0-9]{4}", True),
        ("(dev|test|prod)-[0-9]+", True),
        ("(?i)[a-z]+-[a-z0-9]*", True),
        (r"\d{4}-\d{2}-\d{2}", True),
        ("a?" * 10 + "a" * 10, True),
        ("a?" * 30 + "a" * 30, False),
        ("(a|a)" * 10, True),
        ("(a|a)" * 30, False),
        (".*.*.*", False),
        ("(a+)+", False),
        ("(a){3}", False),
        (r"(a)\1", False),
        ("(?=a)a", False),
        ("(?x)(a+) *", False),
        ("a{1,9}" * 9, False),
        ("é+", False),
        ("a{2,999999999}", False),
    ],
)
def test_what_is_matched_in_process(pattern: str, quick: Any) -> None:
    assert script.is_quick(pattern) is quick


def test_the_rules_of_all_regions_share_a_pattern_and_its_limit() -> None:
    rule = {"required_tags": [{"key": "CostCenter", "pattern": "CC-[0-9]{4}"}]}
    policy = {"version": 1, "name": "test", "regions": {"us-east-1": rule, "eu-west-1": rule}}
    regions = script.check_policy(json.dumps(policy).encode(), "p.yaml").regions
    assert regions["us-east-1"][0].pattern is regions["eu-west-1"][0].pattern
