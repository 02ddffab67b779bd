"""The policy's author: every mistake is told where it stands, everything legal is taken, and nothing crashes.

`data/policies/invalid` has a file a mistake; its first lines say, after `#: `, what is to be said of it.
`data/policies/valid` has what looks odd and is legal; a line `#: REGION: KEY, KEY` says what it asks for.
"""

import itertools
import json
import os
import random
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import yaml
from builders import instance, save_fleet, save_policy
from conftest import TAGCHECK, Result, run_tagcheck

import tagcheck as script

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
CORPUS = Path(__file__).resolve().parent / "data" / "policies"
INVALID, VALID = (sorted((CORPUS / kind).glob("*.yaml")) for kind in ("invalid", "valid"))
SHIPPED = sorted((TAGCHECK.parent / "policies").glob("*.yaml"))
SCHEMA_FILE = TAGCHECK.parent / "policies" / "policy.schema.json"
OWNER = "version: 1\nname: test\nrequired_tags: [Owner]\n"
GOOD = OWNER + "regions: {us-east-1: }\n"
ENDED = GOOD + "exemptions: [{reason: old, regions: [us-east-1], expires: 2026-11-22}]\n"
BAD = "version: 2\nname: test\nrequired_tags: [Owner]\nregions: {us-esat-1: }\n"
BAD_PROBLEMS = [
    "bad.yaml:1:10: version: '2' is not 1",
    "bad.yaml:4:11: regions: AWS has no region 'us-esat-1' (did you mean 'us-east-1'?)",
]

Tagcheck = Callable[..., Result]


class Verdict(NamedTuple):
    """What `validate` has said."""

    code: int
    lines: list[str]
    err: str


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Verdict]:
    """Run `validate` in the test's own directory; a crash is the test's failure."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path) -> Verdict:
        result = run_tagcheck("validate", *args, cwd=Path.cwd(), now=NOW)
        return Verdict(result.code, result.lines, result.err)

    return run


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Write a policy that is right, one that is wrong, and one with a warning."""
    for name, text in (("good", GOOD), ("bad", BAD), ("ended", ENDED)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def notes(path: Path) -> list[str]:
    """Read what a file of the corpus says of itself."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    lines = re.split("\r\n|\r|\n", content.decode(encoding, "replace"))
    return [line.removeprefix("#: ") for line in lines if line.startswith("#: ")]


def stem(path: Path) -> str:
    return path.stem


# ---- The corpus --------------------------------------------------------------------------------------------


def test_corpus_is_not_lost() -> None:
    assert len(INVALID) >= 200
    assert len(VALID) >= 40


@pytest.mark.parametrize("path", INVALID, ids=stem)
def test_mistake(validate: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.chdir(path.parent)
    wanted = notes(path)
    assert wanted
    problems = [f"{path.name}:{problem}" for problem in wanted]
    assert validate(path.name) == (
        2,
        [*problems, f"{path.name}: {script.counted(len(problems), 'error')}"],
        "",
    )


@pytest.mark.parametrize("path", VALID, ids=stem)
def test_odd_but_legal(validate: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.chdir(path.parent)
    assert validate(path.name) == (0, [f"{path.name}: valid"], "")
    policy = script.load_policy(path.name)
    for note in notes(path):
        region, _, keys = note.partition(": ")
        assert ", ".join(rule.key for rule in policy.rules(region)) == keys


@pytest.mark.parametrize("path", VALID, ids=stem)
def test_what_is_valid_can_be_explained_and_scanned_with(tmp_path: Path, path: Path) -> None:
    assert all(line.isprintable() for line in use(tmp_path, path))


def use(cwd: Path, policy: Path) -> list[str]:
    """Explain a policy, and scan with it: both must end as they should; gives what they printed."""
    save_fleet(cwd, instance(1, {"Name": "x"}))
    explained = run_tagcheck("explain", "--policy", policy, cwd=cwd, now=NOW, check=0)
    regions = script.load_policy(str(policy)).regions
    scope = ["--region", "us-east-1"] if regions.keys() & {"us-east-1", "*"} else []
    args = ("--policy", policy, "--instances", "fleet.json", "--dry-run", *scope)
    scanned = run_tagcheck("scan", *args, cwd=cwd, now=NOW)
    assert scanned.code in (0, 3, 4)
    return explained.lines + scanned.lines


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(
            "version: 1\nname: large\nregions:\n"
            + "".join(
                f"  {region}:\n    required_tags:\n"
                + "".join(f"      - Tag-{number}-{region}\n" for number in range(22))
                for region in sorted(script.AWS_REGIONS)
            ),
            id="1,000 tags over all regions",
        ),
        pytest.param(
            "version: 1\nname: large\nrequired_tags:\n"
            + "".join(f"  - {{key: Tag-{number}, values: [a, b], default: a}}\n" for number in range(1000))
            + "regions:\n  us-east-1:\n",
            id="1,000 tags in one list",
        ),
        pytest.param(
            f"version: 1\nname: large\nrequired_tags: [{{key: Team, values: {list(range(1000))}}}]\n"
            "regions: {us-east-1: }\n",
            id="1,000 values",
        ),
        pytest.param(
            f"{GOOD}exemptions:\n"
            + "".join(f"  - {{reason: r, instances: [i-{number:017x}]}}\n" for number in range(1000)),
            id="1,000 exemptions",
        ),
        pytest.param("# comment\n" * 10_000 + GOOD, id="10,000 lines of comments"),
    ],
)
def test_large_and_legal(validate: Callable[..., Verdict], tmp_path: Path, text: str) -> None:
    (tmp_path / "large.yaml").write_text(text)
    assert validate("large.yaml") == (0, ["large.yaml: valid"], "")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(GOOD.encode("utf-16-le"), id="UTF-16 without a byte order mark"),
        pytest.param(GOOD.encode("utf-32"), id="UTF-32"),
        pytest.param(GOOD.encode("utf-16")[:-1], id="UTF-16 cut within a character"),
        pytest.param("\ufeffname: \U0001f3f7".encode("utf-16-le")[:-2], id="UTF-16 cut within a pair"),
        pytest.param(b"", id="nothing at all"),
        pytest.param(b"\xef\xbb\xbf", id="a byte order mark alone"),
        pytest.param(b"\0" * 100, id="zeros"),
        pytest.param(b"PK\x03\x04" + bytes(range(256)), id="a zip file"),
        pytest.param(b"SQLite format 3\0" + bytes(100), id="a database"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(100), id="a picture"),
        pytest.param(b'{"version":1,"name":"a"}\n{"version":1,"name":"b"}\n', id="JSON twice"),
        pytest.param(b"name: x\n}\n", id="a brace too many"),
        pytest.param(GOOD.encode() + b'x: "\\U00110000"\n', id="an escape beyond Unicode"),
        pytest.param(b"%YAML 1." + b"9" * 5000 + b"\n---\n" + GOOD.encode(), id="a version of 5,000 digits"),
        pytest.param(
            (OWNER + "regions: {us-east-1: , us-east-1: }\nregions: {eu-west-1: }\n").encode(),
            id="a mistake in what a second key replaces",
        ),
        pytest.param(
            (OWNER + "regions: &r\n  us-east-1:\n  <<: *r\n").encode(), id="a mapping merged into itself"
        ),
        pytest.param(
            (OWNER + "regions: {us-east-1: &x {<<: [*x]}}\n").encode(), id="a merge of its own list"
        ),
        pytest.param((OWNER + "regions: {us-east-1: }\n? {a: b}\n: c\n").encode(), id="a mapping as a key"),
        pytest.param(b"- " * 100 + b"x", id="100 levels"),
        pytest.param(
            ("placeholder_values: &a [" + "x, " * 5000 + "]\n" + GOOD + "states: *a").encode(),
            id="5,000 mistakes",
        ),
    ],
)  # fmt: skip
def test_no_policy_is_refused_without_a_crash(
    validate: Callable[..., Verdict], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "p.yaml").write_bytes(content)
    code, lines, err = validate("p.yaml")
    assert (code, err) == (2, "")
    assert_told(lines)


def assert_told(lines: list[str]) -> None:
    """Assert that problems are told as compilers do, and counted at the end."""
    *problems, verdict = lines
    assert problems
    more = 0
    if found := re.fullmatch("… and ([0-9,]+) more problems?", problems[-1]):
        more = int(found[1].replace(",", ""))
        problems.pop()
        assert len(problems) == script.MAX_PROBLEMS
    for line in problems:
        assert re.fullmatch(r"\S+\.yaml:[1-9]\d*:[1-9]\d*: .{4,}", line), line
        assert len(line) < 2000
        assert line.isprintable()
    errors = more + sum(": warning: " not in line for line in problems)
    assert re.match(rf"\S+\.yaml: {errors:,} errors?\b" if errors else r"\S+\.yaml: valid, ", verdict)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('required_tags: ["Own\\e[31mer"]', id="ESC in a tag key"),
        pytest.param('required_tags: ["Own\\0er"]', id="NUL in a tag key"),
        pytest.param('required_tags: ["Owner\\n"]', id="a line end after a tag key"),
        pytest.param('required_tags: ["\\uD800"]', id="half of a pair in a tag key"),
        pytest.param('required_tags: [{key: A, values: ["\\e[31m"]}]', id="ESC in a value"),
        pytest.param('placeholder_values: ["\\a"]', id="BEL in a placeholder"),
    ],
)
def test_controls_behind_escapes_are_refused(
    validate: Callable[..., Verdict], tmp_path: Path, line: str
) -> None:
    text = f"version: 1\nname: test\nregions: {{us-east-1: {{required_tags: [Team]}}}}\n{line}\n"
    (tmp_path / "p.yaml").write_text(text)
    code, lines, _ = validate("p.yaml")
    assert code == 2
    assert lines[0].startswith("p.yaml:4:")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(GOOD + "grace_period: 999999d\n", id="a grace period of 2,700 years"),
        pytest.param(GOOD + "grace_period: |\n  2h\n", id="a grace period with a line end"),
        pytest.param(GOOD.replace("name: test", 'name: "\\uD800"'), id="half of a pair as a name"),
        pytest.param(GOOD.replace("name: test", 'name: "a\\0b"'), id="NUL in a name"),
        pytest.param(GOOD + 'exemptions: [{reason: "\\uDFFF", regions: [us-east-1]}]\n', id="half a reason"),
        pytest.param(GOOD + 'exemptions: [{reason: r, tags: {"\\uD800": "*"}}]\n', id="half a tag"),
        pytest.param(
            GOOD + "exemptions: [{reason: r, regions: [us-east-1], expires: 9999-12-31}]\n", id="9999"
        ),
        pytest.param(
            GOOD + "exemptions: [{reason: r, tags: {Name: '[!]*[^]?]-'}}]\n", id="brackets in a glob"
        ),
    ],
)  # fmt: skip
def test_what_validates_never_crashes_a_scan(
    validate: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text(text)
    if validate(policy).code == 0:
        use(tmp_path, policy)


# ---- Patterns ----------------------------------------------------------------------------------------------


def pattern_policy(path: Path, pattern: str) -> None:
    save_policy(path, required_tags=[{"key": "Tag", "pattern": pattern}])


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "^(([a-z])+.)+[A-Z]([a-z])+$",
        r"^(\w+\s?)*$",
        "^([a-zA-Z0-9_-]+)*@x$",
        "(x+x+)+y",
        "^(a|aa)+$",
        "^(.*?,){11}P",
        "(a|a)*b",
        "prod-(?:[a-z]+)*-[0-9]",
        "(?=(a+)+$)a",
        "(?i)(A+)+!",
        r"(\S+\s*)+:",
    ],
)
def test_pattern_that_takes_for_ever_is_refused(
    validate: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pattern: str
) -> None:
    monkeypatch.setattr(script, "PATTERN_SECONDS", 0.1)
    pattern_policy(tmp_path / "p.yaml", pattern)
    code, (problem, *_), _ = validate("p.yaml")
    assert code == 2
    assert "required_tags[0].pattern: " in problem
    assert "can run forever" in problem


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("[a-z0-9]+(-[a-z0-9]+)*", "team-web-2"),
        (r"[a-z0-9._%+-]+@[a-z0-9.-]+\.[a-z]{2,}", "ops@example.com"),
        (r"[^@\s]+@example\.com", "ops@example.com"),
        ("CC-[0-9]{4}", "CC-1042"),
        ("dev|test|prod", "prod"),
        ("(dev|test|prod)-[0-9]+", "prod-1"),
        (r"\d{4}-\d{2}-\d{2}", "2027-01-31"),
        ("(?i)yes|no", "YES"),
        ("(?!prod)[a-z]+", "dev"),
        (r"\S+( \S+)*", "two words"),
        ("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "01234567-89ab-cdef-0123-456789abcdef"),
        (r"([a-z]+\.)*example\.com", "www.shop.example.com"),
        (r"(\d{1,3}\.){3}\d{1,3}", "10.0.0.17"),
        (r"https?://[^\s/]+(/\S*)?", "https://example.com/x"),
        ("[A-Z]{2,4}-[0-9]{1,6}(, [A-Z]{2,4}-[0-9]{1,6})*", "OPS-1, OPS-22"),
        ("[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "host-1"),
        (".{1,64}", "anything"),
        (".*", "anything"),
    ],
)
def test_ordinary_pattern_is_taken(
    validate: Callable[..., Verdict], tmp_path: Path, pattern: str, matches: str
) -> None:
    pattern_policy(tmp_path / "p.yaml", pattern)
    assert validate("p.yaml") == (0, ["p.yaml: valid"], "")
    (rule,) = script.load_policy("p.yaml").rules("us-east-1")
    assert rule.allows(matches)


# ---- The command -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("files")
def test_several_files(validate: Callable[..., Verdict]) -> None:
    code, lines, err = validate("good.yaml", "bad.yaml", "ended.yaml")
    assert (code, err) == (2, "")
    *told, warning, last = lines
    assert told == ["good.yaml: valid", *BAD_PROBLEMS, "bad.yaml: 2 errors"]
    assert warning.startswith("ended.yaml:5:14: warning: exemptions[0] (old): ended on 2026-11-22")
    assert last == "ended.yaml: valid, 1 warning"


@pytest.mark.usefixtures("files")
def test_warnings_are_no_reason_to_refuse(validate: Callable[..., Verdict]) -> None:
    code, lines, _ = validate("ended.yaml", "good.yaml")
    assert code == 0
    assert lines[-2:] == ["ended.yaml: valid, 1 warning", "good.yaml: valid"]


@pytest.mark.parametrize(
    ("days", "warned"), [(-400, True), (-1, True), (0, True), (14, True), (15, False), (400, False)]
)
def test_an_end_of_an_exemption_is_announced(
    validate: Callable[..., Verdict], files: Path, days: int, warned: bool
) -> None:
    day = (NOW + timedelta(days)).date().isoformat()
    (files / "ended.yaml").write_text(ENDED.replace("2026-11-22", day))
    code, lines, _ = validate("ended.yaml")
    assert code == 0
    assert [day in line for line in lines[:-1]] == [True] * warned


NO_SERVICE = "AWS services have names like eks.amazonaws.com"
NOT_COVERED = "the policy does not cover it"
LEFT_OUT = "the policy's accounts leave it out"


@pytest.mark.parametrize(
    ("scope", "match", "told"),
    [
        ({}, {"managed_by": "eks"}, [("managed_by", "'eks'", NO_SERVICE)]),
        ({}, {"managed_by": ["ecs*", "EKS.amazonaws.com"]}, [("[1]", "'EKS.amazonaws.com'", NO_SERVICE)]),
        ({}, {"managed_by": ["eks.amazonaws.com", "unknown", "*", "ec2.amazonaws.com.cn"]}, []),
        ({}, {"regions": ["us-east-1", "eu-west-1"]}, [("[1]", "'eu-west-1'", NOT_COVERED)]),
        ({"regions": {"*": None}}, {"regions": ["eu-west-1"]}, []),
        ({}, {"accounts": ["123456789012"]}, []),
        (
            {"accounts": {"ids": ["123456789012"], "role_name": "r"}},
            {"accounts": ["123456789012", "210987654321"]},
            [("[1]", "'210987654321'", LEFT_OUT)],
        ),
        (
            {"accounts": {"organization": True, "exclude": ["210987654321"], "role_name": "r"}},
            {"accounts": ["123456789012", "210987654321"]},
            [("[1]", "'210987654321'", LEFT_OUT)],
        ),
    ],
)
def test_a_condition_that_nothing_can_meet_is_a_warning(
    validate: Callable[..., Verdict],
    tmp_path: Path,
    scope: Mapping[str, Any],
    match: Mapping[str, Any],
    told: list[tuple[str, str, str]],
) -> None:
    save_policy(tmp_path, exemptions=[{"reason": "theirs", **match}], **scope)
    save_policy(tmp_path / "when.yaml", required_tags=[{"key": "Owner", "when": match}], **scope)
    for name in ("policy.yaml", "when.yaml"):
        code, lines, _ = validate(name)
        assert code == 0 and len(lines) == len(told) + 1
        for line, (where, item, why) in zip(lines, told, strict=False):
            assert "warning: " in line and line.endswith(f"{where}: {item} matches nothing: {why}")


@pytest.mark.usefixtures("files")
def test_json_for_editors(validate: Callable[..., Verdict], files: Path) -> None:
    verdict = validate("good.yaml", "bad.yaml", "ended.yaml", "--json", "out.json")
    assert (verdict.code, len(verdict.lines)) == (2, 6)
    report = json.loads((files / "out.json").read_text())
    assert report.keys() == {"version", "files"}
    assert report["version"] == script.__version__
    good, bad, ended = report["files"]
    assert good == {"file": "good.yaml", "valid": True, "problems": [], "problem_count": 0}
    assert (bad["file"], bad["valid"], ended["file"], ended["valid"]) == (
        "bad.yaml",
        False,
        "ended.yaml",
        True,
    )
    assert bad["problems"] == [
        {"line": 1, "column": 10, "severity": "error", "where": "version", "message": "'2' is not 1"},
        {
            "line": 4,
            "column": 11,
            "severity": "error",
            "where": "regions",
            "message": "AWS has no region 'us-esat-1' (did you mean 'us-east-1'?)",
        },
    ]
    (warning,) = ended["problems"]
    assert (warning["line"], warning["column"], warning["severity"]) == (5, 14, "warning")


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("name", "code"), [("good.yaml", 0), ("ended.yaml", 0), ("bad.yaml", 2)])
def test_json_to_stdout_stands_there_alone(validate: Callable[..., Verdict], name: str, code: int) -> None:
    verdict = validate(name, "--json", "-")
    assert (verdict.code, verdict.err) == (code, "")
    (file,) = json.loads("\n".join(verdict.lines))["files"]
    assert (file["file"], file["valid"]) == (name, code == 0)


@pytest.mark.usefixtures("files")
def test_json_that_cannot_be_written(validate: Callable[..., Verdict]) -> None:
    code, _, err = validate("good.yaml", "--json", "nowhere/out.json")
    assert code == 5
    assert "nowhere" in err


@pytest.mark.parametrize("name", ["none.yaml", "directory", ""])
def test_file_that_cannot_be_read_is_named(validate: Callable[..., Verdict], files: Path, name: str) -> None:
    (files / "directory").mkdir()
    code, lines, err = validate("good.yaml", name)
    assert code == 2
    assert f"{name}: " in "\n".join([*lines, err])


@pytest.mark.usefixtures("files")
def test_file_that_cannot_be_read_hides_no_other(validate: Callable[..., Verdict]) -> None:
    code, lines, err = validate("bad.yaml", "none.yaml", "good.yaml")
    assert code == 2
    assert [line for line in [*lines, *err.splitlines()] if "none.yaml" in line]
    assert [line for line in lines if "none.yaml" not in line] == [
        *BAD_PROBLEMS,
        "bad.yaml: 2 errors",
        "good.yaml: valid",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(validate: Callable[..., Verdict], files: Path) -> None:
    (files / "good.yaml").chmod(0)
    code, lines, err = validate("good.yaml")
    assert code == 2
    assert "Permission denied" in "\n".join([*lines, err])


@pytest.mark.parametrize(("text", "code"), [(GOOD, 0), (BAD, 2)], ids=["valid", "not valid"])
def test_policy_from_stdin(tagcheck: Tagcheck, text: str, code: int) -> None:
    result = tagcheck("validate", "-", stdin=text, check=code)
    assert result.out.splitlines()[-1].endswith(": valid" if code == 0 else ": 2 errors")


@pytest.mark.usefixtures("files")
def test_no_policy_named(tagcheck: Tagcheck) -> None:
    assert "POLICY" in tagcheck("validate", check=2).err


NO_NETWORK = """\
import socket
def refuse(*_, **__):
    raise AssertionError("validate has no business on the network")
socket.socket.connect = socket.getaddrinfo = refuse
"""


def test_needs_no_aws_no_boto3_and_no_network(tagcheck: Tagcheck, files: Path) -> None:
    packages = files / "packages"
    packages.mkdir()
    for name in ("boto3", "botocore"):
        (packages / f"{name}.py").write_text(f"raise ModuleNotFoundError('no', name={name!r})")
    (packages / "sitecustomize.py").write_text(NO_NETWORK)
    result = tagcheck("validate", "good.yaml", "bad.yaml", env={"PYTHONPATH": str(packages)}, check=2)
    assert result.out.splitlines() == ["good.yaml: valid", *BAD_PROBLEMS, "bad.yaml: 2 errors"]
    assert result.err == ""


@pytest.mark.usefixtures("files")
def test_json_for_a_full_disk(tagcheck: Tagcheck) -> None:
    assert tagcheck("validate", "good.yaml", "--json", "/dev/full", check=5).err


def test_file_name_is_no_way_into_the_terminal(validate: Callable[..., Verdict], files: Path) -> None:
    (files / "a\x1b[31m.yaml").write_text(BAD)
    code, lines, _ = validate("a\x1b[31m.yaml", "--json", "out.json")
    assert code == 2
    assert all(line.startswith("a\\x1b[31m.yaml:") and line.isprintable() for line in lines)


# ---- Quick verdicts ----------------------------------------------------------------------------------------

MEGABYTE = 1 << 20
# Runs a script with little memory, and says on stderr what it took; the peak that the system tells a parent
# begins with the parent's own.
MEASURED = f"""\
import atexit, resource, runpy, sys, time
resource.setrlimit(resource.RLIMIT_AS, ({400 * MEGABYTE},) * 2)
def say():
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("took", time.process_time(), peak.split()[1], file=sys.stderr)
atexit.register(say)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
LEVELS = "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 20))
MERGES = "".join(f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 9)}]}}\n" for n in range(1, 20))
NESTED_REPETITIONS = "((((a{256}){256}){256}){256}){4}"


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS") or sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize(
    ("content", "codes"),
    [
        pytest.param(f"b0: &b0 [x]\n{LEVELS}".encode(), [2], id="alias bomb"),
        pytest.param(f"b0: &b0 {{x: y}}\n{MERGES}".encode(), [2], id="merge bomb"),
        pytest.param(b"a: b\n" * 2_000_000, [2], id="10 MB"),
        pytest.param(b"[" * 5000, [2], id="5,000 lists"),
        pytest.param(b"{a: " * 5000, [2], id="5,000 mappings"),
        pytest.param(b"- " * 5000, [2], id="5,000 dashes"),
        pytest.param(b"".join(b" " * n + b"a:\n" for n in range(1400)), [2], id="1,400 levels of lines"),
        pytest.param(random.Random(3).randbytes(900_000), [2], id="binary"),
        pytest.param(b"\x7fELF\x02\x01\x01" + bytes(900_000), [2], id="a program"),
        pytest.param(b"version: 1\nname: " + b"n" * 900_000, [2], id="a text of 900 kB"),
        pytest.param(
            GOOD.replace("[Owner]", f"[{{key: A, pattern: '{NESTED_REPETITIONS}'}}]").encode(),
            [0, 2],
            id="a pattern whose repetitions multiply",
        ),
        pytest.param(
            GOOD.replace("[Owner]", f"[{{key: A, pattern: '{'(' * 3000}{')' * 3000}'}}]").encode(),
            [2],
            id="a pattern of 3,000 groups",
        ),
    ],
)
def test_quick_verdict(tmp_path: Path, content: bytes, codes: list[int]) -> None:
    """Each within a second and 100 MB; a busy machine is given three times as long."""
    (tmp_path / "p.yaml").write_bytes(content)
    (tmp_path / "measured.py").write_text(MEASURED)
    result = run_tagcheck(
        TAGCHECK, "validate", "p.yaml", cwd=tmp_path, script=tmp_path / "measured.py", timeout=120
    )
    assert result.code in codes
    assert_fair(result.code, result.out.splitlines())
    (took,) = re.findall(r"^took (\S+) (\d+)$", result.err, re.MULTILINE)
    assert float(took[0]) < 3
    assert int(took[1]) < 100 * 1024


# ---- Whatever bytes ----------------------------------------------------------------------------------------

PIECES = [
    *(b"\t", b"\n", b"\r", b" ", b"  ", b"\xc2\xa0", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\x00", b"\x1b"),
    *(b"\xff", b"\xfe", b"\xc3", b"\xe2\x80\x9c", b"\xf0\x9f\x8f\xb7", b"'", b'"', b"[", b"]", b"{", b"}"),
    *(b",", b":", b": ", b"- ", b"? ", b"#", b" #", b"|\n", b">-\n", b"&a ", b"*a", b"<<: *a", b"!x "),
    *(b"!!binary ", b"@", b"`", b"%", b"%YAML 1.1\n", b"---\n", b"...\n", b"\\", b'"\\U00110000"'),
    *(b'"\\uD800"', b"true", b"null", b"~", b"0", b"-1", b"*", b"=", b"aws:", b"(", b"9" * 400),
    *(b"2027-01-31", b"0000-00-00", b"1_000", b"grace_period: |\n  2h\n", b"name: x\n", b"regions:\n"),
    *(b"  us-east-1:\n", b"required_tags: [A]\n"),
]  # fmt: skip
SEEDS = [path.read_bytes() for path in [*VALID, *SHIPPED]]


def mutated(rng: random.Random) -> bytes:
    """Make a file of which nobody knows whether it is a policy: often it nearly is."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(300))
    content = rng.choice(SEEDS)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        begin = rng.randrange(len(content) + 1)
        end = min(len(content), begin + rng.randrange(1, 30))
        before, cut, after = content[:begin], content[begin:end], content[end:]
        other = rng.choice(SEEDS)
        lines = content.splitlines(keepends=True) or [b""]
        start = rng.randrange(len(other))
        content = rng.choice(
            [
                before + rng.choice(PIECES) + cut + after,
                before + rng.choice(PIECES) + after,
                before + after,
                before + cut * rng.randrange(2, 5) + after,
                before + rng.randbytes(1) + cut[1:] + after,
                before + other[start : start + rng.randrange(60)] + after,
                b"".join(
                    rng.sample(lines, len(lines)) if rng.random() < 0.3 else [*lines, rng.choice(lines)]
                ),
                content + other if rng.random() < 0.2 else content,
            ]
        )
    return content


def assert_fair(code: int, lines: list[str]) -> None:
    assert code in (0, 2, 5)
    if code == 2:
        assert_told(lines)
    else:
        assert re.match(r"p\.yaml: valid", lines[-1])


@pytest.mark.parametrize("first", range(0, 600, 50))
def test_no_bytes_end_in_a_crash(validate: Callable[..., Verdict], tmp_path: Path, first: int) -> None:
    for seed in range(first, first + 50):
        content = mutated(random.Random(seed))
        (tmp_path / "p.yaml").write_bytes(content)
        try:
            code, lines, _ = validate("p.yaml")
            assert_fair(code, lines)
        except Exception as error:
            error.add_note(f"seed {seed}: {content!r}")
            raise


@pytest.mark.parametrize("seed", range(10_000, 10_020))
def test_no_bytes_end_in_a_traceback(tagcheck: Tagcheck, tmp_path: Path, seed: int) -> None:
    (tmp_path / "p.yaml").write_bytes(mutated(random.Random(seed)))
    result = tagcheck("validate", "p.yaml")
    assert_fair(result.code, result.out.splitlines())


ODD_VALUES = [
    *("", "null", "~", "[]", "{}", "[[]]", "{a: b}", "[a, {b: c}]", "5", "-0.0", "1e400", ".nan", "true"),
    *("no", "!!binary x", '"\\UFFFFFFFF"', '"\\U0010FFFF"', '"\\ud800"', '"\\xFF"', '"\\N"', "!!int a"),
    *("!!set {a}", "!!omap [a: b]", "!x y", "? {a: b}\n  : c", "? [a]", "{? a}", "{[a]: b}", "{*a : b}"),
    *("*a", "&a", "&a [*a]", "<<: a", "{<<: [a]}", "|", ">-\n x", "2027-13-45", "0x_", "0b", "1:2:3"),
    *("9" * 5000, "@", "`", "%x", "'", '"', "- - -", "a: b: c", "\x85", "\ud7ff"),
]  # fmt: skip


def with_odd_values(rng: random.Random) -> bytes:
    """Make a policy some of whose values or lines are something else."""
    lines = rng.choice(SEEDS).decode(errors="replace").splitlines() or [""]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        number = rng.randrange(len(lines))
        other = rng.randrange(len(lines))
        line = lines[number]
        begun = re.match(r"(\s*(?:- )?(?:[^:{}\[\]]*: ?)?)", line)
        before = begun[0] if begun else ""
        match rng.randrange(6):
            case 0:
                lines[number] = ""
            case 1:
                lines.insert(other, line)
            case 2:
                lines[number], lines[other] = lines[other], line
            case _:
                lines[number] = before + rng.choice(ODD_VALUES)
    return "\n".join(lines).encode(errors="surrogatepass")


@pytest.mark.parametrize("first", [0, 500, pytest.param(1000, marks=pytest.mark.soak)])
def test_no_value_in_a_policy_ends_in_a_crash(first: int) -> None:
    for seed in range(first, first + (500 if first < 1000 else 20_000)):
        content = with_odd_values(random.Random(seed))
        try:
            assert isinstance(script.check_policy(content, "p.yaml"), script.Policy)
        except script.PolicyError as error:
            assert_told([*str(error).splitlines(), f"p.yaml: {script.counted(len(error.problems), 'error')}"])
        except Exception as error:
            error.add_note(f"seed {seed}: {content!r}")
            raise


@pytest.mark.parametrize(
    ("line", "place"),
    [
        *((f"{key}:", "p.yaml:4:") for key in script.POLICY_SCHEMA["properties"] if key != "regions"),
        ('x: "\\UFFFFFFFF"', "p.yaml:4:"),
        ('x: "\\ud800"', "p.yaml:4:"),
        ("x: !!binary x", "p.yaml:4:4: x: tag:yaml.org,2002:binary has no meaning in a policy"),
        ("? {complex: key}\n: x", "p.yaml:4:3: a key must be plain text"),
    ],
)
def test_value_of_another_kind_has_a_place(line: str, place: str) -> None:
    head = "version: 1\nname: test\nregions: {us-east-1: {required_tags: [A]}}\n"
    with pytest.raises(script.PolicyError) as caught:
        script.check_policy(f"{head}{line}\n".encode(), "p.yaml")
    assert place in str(caught.value)


FULL = {name: key["examples"][0] for name, key in script.POLICY_SCHEMA["properties"].items()} | {
    "required_tags": [
        "Owner",
        {"key": "A", "values": ["CC-1"], "pattern": "CC-[0-9]", "default": "CC-1"},
        {
            name: key["examples"][0]
            for name, key in script.POLICY_SCHEMA["properties"]["required_tags"]["items"][
                "properties"
            ].items()
            if name != "default"
        }
        | {"key": "B", "pattern": "[a-z]+", "aliases": ["b", "C"]},
    ],
    "exemptions": [
        {
            name: key["examples"][0]
            for name, key in script.POLICY_SCHEMA["properties"]["exemptions"]["items"]["properties"].items()
        }
    ],
    "accounts": {
        "organization": True,
        "role_name": "r",
        "external_id": "x",
        "exclude": ["012345678902"],
        "names": {"012345678901": "production"},
    },
    "notify": {
        name: key["examples"][0]
        for name, key in script.POLICY_SCHEMA["properties"]["notify"]["properties"].items()
    },
}


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """Return a value with another value at a path."""
    if not path:
        return other
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    items[path[0]] = replaced(items[path[0]], path[1:], other)
    return items if isinstance(value, dict) else [*items.values()]


OTHERS = (
    None,
    True,
    5,
    -1e300,
    "",
    "x",
    "9" * 300,
    "\ud800",
    [],
    [None],
    [[1]],
    {},
    {"a": None},
    [{"a": {"": ""}}],
)


def test_full_policy_is_valid() -> None:
    assert script.check_policy(json.dumps(FULL).encode(), "p.yaml")


@pytest.mark.parametrize("other", OTHERS, ids=repr)
def test_any_value_in_place_of_another_is_taken_or_told(other: Any) -> None:
    for path in paths(FULL):
        content = json.dumps(replaced(FULL, path, other)).encode()
        try:
            assert isinstance(script.check_policy(content, "p.yaml"), script.Policy)
        except script.PolicyError as error:
            assert_told([*str(error).splitlines(), f"p.yaml: {script.counted(len(error.problems), 'error')}"])
        except Exception as error:
            error.add_note(f"at {path}")
            raise


# ---- A megabyte of nonsense --------------------------------------------------------------------------------


def many(number: int, *, before: str = GOOD, item: str, after: str = "") -> str:
    return before + "".join(item.format(index) for index in range(10, number + 10)) + after


def many_rules(number: int, rule: str, after: str = "regions: {us-east-1: }\n") -> str:
    item = "  - {{key: a{0}, " + rule + "}}\n"
    return many(number, before=OWNER.replace("[Owner]", ""), item=item, after=after)


LIST_OF_VALUES = (
    "version: 1\nname: test\nregions: {{us-east-1: }}\nrequired_tags: [{{key: A, {}values: [".format
)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a\n" * 100_000, id="100,000 lines"),
        pytest.param("a" * 999_000, id="one line"),
        pytest.param("a b " * 249_000, id="words"),
        pytest.param("#\n" * 499_000, id="comments"),
        pytest.param(many(30_000, item="unknown{}: 1\n"), id="30,000 unknown keys"),
        pytest.param(many(12_000, item="requird_tag{}: 1\n"), id="12,000 unknown keys"),
        pytest.param(many(30_000, before=OWNER + "regions:\n", item="  eu-west-{}:\n"), id="30,000 regions"),
        pytest.param(many(12_000, before=OWNER + "regions:\n", item="  eu-west-{}:\n"), id="12,000 regions"),
        pytest.param("[" * 999_000, id="lists in lists"),
        pytest.param("{a: " * 249_000, id="mappings in mappings"),
        pytest.param("a: &a [x]\nb: [" + "*a, " * 249_000 + "]", id="aliases"),
        pytest.param(many_rules(20_000, "pattern: 'a(b|c)*'", after=""), id="20,000 patterns"),
        pytest.param(
            many_rules(4000, "pattern: '[a]z({0}?|b|bb)*!', default: az" + "b" * 150),
            id="4,000 slow defaults",
        ),
        pytest.param(
            many_rules(4000, "pattern: '[a]z(b|bb)*!', default: az{0}" + "b" * 150),
            id="4,000 slow defaults of a pattern",
        ),
        pytest.param(many_rules(5000, "pattern: 'a{0}(b|c)*'"), id="5,000 patterns"),
        pytest.param(many_rules(5000, "pattern: '{0}?(b|b)*'"), id="5,000 slow patterns"),
        pytest.param(many(20_000, item="a: 1\n"), id="20,000 times a key"),
        pytest.param(many(14_000, item="a: 1\n"), id="14,000 times a key"),
        pytest.param("- a\n" * 50_000, id="50,000 items"),
        pytest.param(
            many(28_000, before=LIST_OF_VALUES(""), item="v{}, ", after="]}]\n"), id="28,000 values"
        ),
        pytest.param(
            many(28_000, before=LIST_OF_VALUES("default: v, "), item="v{}, ", after="]}]\n"),
            id="28,000 values without the default",
        ),
        pytest.param(
            many(20_000, before=GOOD + "exemptions:\n", item="- {{reason: x, regions: [us-east-1]}}\n"),
            id="20,000 exemptions",
        ),
        pytest.param(
            many(4500, before=GOOD + "exemptions:\n", item="- {{reson: x, region: [us-east-1]}}\n"),
            id="4,500 wrong exemptions",
        ),
        pytest.param(
            many(
                25_000,
                before=GOOD + "exemptions:\n- reason: x\n  regions: [us-east-1]\n  required_tags: [",
                item="Ownr{}, ",
                after="]\n",
            ),
            id="25,000 unknown tags",
        ),
        pytest.param(
            many(25_000, before=GOOD + "states: [", item="run{}, ", after="]\n"), id="25,000 unknown states"
        ),
    ],
)
def test_megabyte_of_nonsense_is_judged_soon(text: str) -> None:
    """Each takes less than 5 seconds; a busy machine is given four times as long."""
    began = time.monotonic()
    try:
        script.check_policy(text.encode(), "p.yaml")
    except script.PolicyError as error:
        assert_told([*str(error).splitlines(), f"p.yaml: {script.counted(len(error.problems), 'error')}"])
        assert len(str(error)) < 100_000
    assert time.monotonic() - began < 20


def test_of_many_problems_the_first_are_shown_and_all_are_counted(
    validate: Callable[..., Verdict], tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text(many(1234, item="nam{}: 1\n"))
    code, lines, _ = validate("p.yaml", "--json", "out.json")
    assert code == 2
    assert lines[0] == "p.yaml:5:1: unknown key 'nam10' (did you mean 'name'?)"
    assert lines[99].startswith("p.yaml:104:1: unknown key 'nam109' (did you mean 'name'?)")
    assert lines[100:] == ["… and 1,134 more problems", "p.yaml: 1,234 errors"]
    (file,) = json.loads((tmp_path / "out.json").read_text())["files"]
    assert (len(file["problems"]), file["problem_count"]) == (100, 1234)


# ---- The schema, and the policies that come along ----------------------------------------------------------


def keys_of(schema: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each key that a policy can have, as a path, and its schema."""
    for name, key in schema.get("properties", {}).items():
        yield f"{path}{name}", key
        yield from keys_of(key, f"{path}{name}.")
    for name in ("items", "additionalProperties"):
        if isinstance(schema.get(name), dict):
            yield from keys_of(schema[name], f"{path}*.")


def used_keys(schema: Mapping[str, Any], value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the schema of each key that a value has; keys with one meaning in two places share theirs."""
    properties = schema.get("properties", {})
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name in properties:
            yield properties[name]
        others = schema.get("additionalProperties") or {}
        yield from used_keys(properties.get(name, others), inner)
    for inner in value if isinstance(value, list) else ():
        yield from used_keys(schema.get("items", {}), inner)


KEYS = dict(keys_of(script.POLICY_SCHEMA))


def test_schema_file_is_what_the_command_prints(tagcheck: Tagcheck) -> None:
    assert tagcheck("schema", check=0).out.encode() == SCHEMA_FILE.read_bytes()


def test_schema_is_draft_7() -> None:
    schema = json.loads(SCHEMA_FILE.read_text("utf-8"))
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(schema)
    assert schema["title"]
    assert schema["description"]


@pytest.mark.parametrize("key", KEYS)
def test_key_is_described_with_an_example(key: str) -> None:
    schema = KEYS[key]
    assert re.fullmatch(r"[^\s].{2,}[.)]", schema["description"]), schema["description"]
    assert schema["examples"]
    for example in schema["examples"]:
        assert list(jsonschema.Draft7Validator(schema).iter_errors(example)) == []


def subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and all that it is made of."""
    if isinstance(schema, dict):
        yield schema
        for name, inner in schema.items():
            if name not in ("examples", "enum", "const", "required"):
                yield from subschemas(inner)


def test_every_other_example_is_right_as_well() -> None:
    with_examples = [schema for schema in subschemas(script.POLICY_SCHEMA) if "examples" in schema]
    assert len(with_examples) >= len(KEYS)
    for schema in with_examples:
        for example in schema["examples"]:
            jsonschema.validate(example, schema, jsonschema.Draft7Validator)


def test_no_mapping_takes_keys_that_nobody_knows() -> None:
    for schema in subschemas(script.POLICY_SCHEMA):
        if "properties" in schema:
            assert "additionalProperties" in schema, schema.get("description")


@pytest.mark.parametrize("path", SHIPPED, ids=stem)
def test_shipped_policy(validate: Callable[..., Verdict], path: Path) -> None:
    first = path.read_text("utf-8").partition("\n")[0]
    assert first == f"# yaml-language-server: $schema={SCHEMA_FILE.name}"
    assert validate(path) == (0, [f"{path}: valid"], "")


class EditorLoader(yaml.SafeLoader):
    """Reads YAML 1.2, as editors do: numbers are numbers; dates, `on`, `yes` and the like are text."""


EditorLoader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag != "tag:yaml.org,2002:timestamp" and not (tag.endswith(":bool") and letter in "yYnNoO")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@pytest.mark.parametrize(
    "path", [*SHIPPED, CORPUS / "valid" / "account-ids-with-leading-zeros.yaml"], ids=stem
)
def test_an_editor_finds_nothing_wrong_either(path: Path) -> None:
    value = yaml.load(path.read_text("utf-8"), EditorLoader)
    assert list(jsonschema.Draft7Validator(script.POLICY_SCHEMA).iter_errors(value)) == []


def test_example_policy_shows_every_key_and_says_when_one_would_use_it() -> None:
    text = (TAGCHECK.parent / "policies" / "example.yaml").read_text("utf-8")
    used = set(map(id, used_keys(script.POLICY_SCHEMA, script.YamlDocument(text).value)))
    # Organization and ids exclude each other, so that ids stand in a comment.
    assert [key for key, schema in KEYS.items() if id(schema) not in used] == ["accounts.ids"]
    assert "# ids: [" in text
    lines = text.splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"[a-z]", line) and not line.startswith("version"):
            assert before.startswith("#"), f"nothing is said of {line}"
