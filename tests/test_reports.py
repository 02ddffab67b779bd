"""Reports: what a scan prints and writes, to the letter, whatever is in a tag."""

import csv
import json
import os
import pty
import re
import stat
import subprocess
import sys
import threading
import unicodedata
from xml.etree import ElementTree

import pytest
from builders import LAUNCHED, instance, save_fleet, save_policy
from conftest import TAGCHECK, clean_environment, script_with

import tagcheck

ACCOUNT, REGION, OTHER_REGION = "123456789012", "us-east-1", "eu-west-1"
READ = ("--region", REGION)  # without it the other region is not read, as the saved files have nothing of it
POLICY = {
    "required_tags": ["Owner", "CostCenter", {"key": "Environment", "values": ["dev", "prod"]}],
    "placeholder_values": ["tbd"],
    "regions": {REGION: {}, OTHER_REGION: {}},
}
GOOD = {"Owner": "ann", "CostCenter": "CC-1042", "Environment": "prod"}
BARE = {"Environment": "dev", "Name": "web-1"}
FIRST_ID = "i-0123456789abcdef0"


def save(cwd, *tags, launched=LAUNCHED, region=REGION, **policy):
    """Save a policy, and a fleet of an instance for each of these tags."""
    first = int(FIRST_ID[2:], 16)
    one_each = (instance(first + n, each, launched=launched, region=region) for n, each in enumerate(tags))
    save_fleet(cwd, *one_each)
    save_policy(cwd, **POLICY | policy)


COMMAND = ("scan", "--policy", "policy.yaml", "--instances", "fleet.json")


@pytest.fixture
def scan(tagcheck, tmp_path):
    """Scan a fleet of one instance without Owner and CostCenter, unless another is saved."""
    save(tmp_path, BARE)
    return lambda *args, **options: tagcheck(*COMMAND, *args, **options)


def start(cwd, *args, **options):
    """Run the script where the test decides on its streams."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, TAGCHECK, *COMMAND, *args]
    return subprocess.Popen(command, cwd=cwd, env=clean_environment(cwd), text=True, **pipes | options)


# ---- CSV ---------------------------------------------------------------------------------------------------

HEADER = (
    "InstanceId,MissingTags,LaunchTime,InvalidTags,Status,FirstSeen,LastSeen,TimesSeen,AccountId,Region,Name,"
    "State,CreatedBy,SuggestedTags"
)


@pytest.mark.parametrize(
    "launched",
    [
        pytest.param("2026-02-24T10:30:45+00:00", id="as the AWS CLI has it"),
        pytest.param("2026-02-24T10:30:45.000Z", id="as the SDKs have it"),
        pytest.param("2026-02-24T12:30:45+02:00", id="of another time zone"),
    ],
)
def test_csv_to_the_letter(scan, tmp_path, launched):
    save(tmp_path, BARE, launched=launched)
    run = scan(*READ, check=3)
    text = (tmp_path / "violators.csv").read_bytes().decode()
    (row,) = run.csv("violators.csv")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row["FirstSeen"])
    header, line = text.splitlines()
    assert header.startswith(HEADER)
    assert line.startswith(
        'i-0123456789abcdef0,"Owner,CostCenter",2026-02-24 10:30:45,'
        f",NEW,{row['FirstSeen']},{row['FirstSeen']},1,123456789012,us-east-1,web-1,running,,"
    )
    assert text == f"{header}\n{line}\n"


@pytest.mark.parametrize(
    ("tags", "missing", "invalid"),
    [
        pytest.param({}, "Owner,CostCenter,Environment", "", id="nothing at all"),
        pytest.param(GOOD | {"Owner": ""}, "Owner", "", id="an empty value is missing"),
        pytest.param(GOOD | {"Owner": "TBD"}, "Owner", "", id="a placeholder is missing"),
        pytest.param(GOOD | {"Environment": "prd"}, "", "Environment=prd", id="a wrong value is invalid"),
        pytest.param(
            {"owner": "ann", "Environment": "prd"}, "Owner,CostCenter", "Environment=prd", id="both"
        ),
        pytest.param(GOOD | {"Environment": 'a,"b"'}, "", 'Environment=a,"b"', id="comma and quotes"),
    ],
)
def test_csv_tells_missing_from_invalid(scan, tmp_path, tags, missing, invalid):
    save(tmp_path, tags)
    (row,) = scan(*READ, "--csv", "-", check=3).csv("-")
    assert (row["MissingTags"], row["InvalidTags"]) == (missing, invalid)


def test_csv_has_a_row_for_what_was_not_read(scan):
    finding, unread = scan(check=4).csv("violators.csv")
    assert (finding["Status"], finding["InstanceId"], finding["Error"]) == ("NEW", FIRST_ID, "")
    assert (unread["AccountId"], unread["Region"]) == (ACCOUNT, OTHER_REGION)
    assert (unread["Status"], unread["InstanceId"], unread["MissingTags"]) == ("UNREAD", "", "")
    assert unread["Error"].startswith("NotInFiles: ")


def test_csv_of_a_clean_scan_is_its_header(scan, tmp_path):
    save(tmp_path, GOOD)
    assert scan(*READ, "--csv", "-", check=0).out.startswith(HEADER)
    assert scan(*READ, "--csv", "-", check=0).csv("-") == []


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "＝", "＋", "－", "＠", "\t=", "\r=", "\n="])
def test_no_cell_of_the_csv_begins_a_formula(scan, tmp_path, sign):
    key = f"{sign[-1]}team"
    save(
        tmp_path,
        {"Name": f"{sign}cmd|' /C calc'!A1", key: "x"},
        required_tags=[{"key": key, "values": ["y"]}, "Owner"],
    )
    (row,) = scan(*READ, check=3).csv("violators.csv")
    shown = sign.encode("unicode_escape").decode() if sign.isspace() or sign[0].isspace() else f"'{sign}"
    assert row["Name"] == f"{shown}cmd|' /C calc'!A1"
    assert row["InvalidTags"] == f"'{key}=x"
    save(tmp_path, {}, required_tags=[key])
    (row,) = scan(*READ, check=3).csv("violators.csv")
    assert row["MissingTags"] == f"'{key}"
    assert not any(cell.lstrip().startswith(tuple("=+-@＝＋－＠\t\r")) for cell in row.values())


@pytest.mark.parametrize("separator", ";|\t")
@pytest.mark.parametrize("before", ["", "a", 'a"', "'"])
@pytest.mark.parametrize("between", ["", " ", '"', '""', "'", '"\'" '])
def test_no_spreadsheet_splits_a_cell_into_a_formula(scan, tmp_path, separator, before, between):
    name = f"{before}{separator}{between}=1+1{separator}{between}@x"
    save(tmp_path, {"Name": name, "Environment": name}, {"Name": 'a";=1+1'})
    run = scan(*READ, check=3)
    text = (tmp_path / "violators.csv").read_bytes().decode()
    for delimiter in ",;|\t":
        cells = [cell for row in csv.reader(text.splitlines(), delimiter=delimiter) for cell in row]
        assert not [cell for cell in cells if cell.lstrip(' "').startswith(tuple("=+-@＝＋－＠"))]
    first, second = run.csv("violators.csv")
    assert first["Name"].replace("'", "") == tagcheck.printable(name).replace("'", "")
    assert tagcheck.csv_text(first["Name"]) == tagcheck.printable(name)
    assert second["Name"] == "a\";'=1+1"


@pytest.mark.parametrize("separator", [",", ";", "|"])
def test_cell_with_any_separator_is_quoted(scan, tmp_path, separator):
    save(tmp_path, {"Name": f"a{separator}b"})
    scan(*READ, check=3)
    assert f',"a{separator}b",' in (tmp_path / "violators.csv").read_text()


# ---- Tag text is written by strangers ----------------------------------------------------------------------

INVISIBLE = "\u034f\u115f\u1160\u2800\u3164\ufe0f\uffa0\U000e0100"

HOSTILE = [
    pytest.param("\x1b[31mred\x1b[0m", id="a colour"),
    pytest.param("\x1b]0;owned\x07", id="a window's title"),
    pytest.param("\x9b2J", id="C1 control"),
    pytest.param("a\nNEW     123456789012  us-east-1  i-0  forged", id="a new line"),
    pytest.param("a\r\nb", id="CR LF"),
    pytest.param("a\u2028b\u2029c\x85d", id="Unicode's new lines"),
    pytest.param("\u202etxt.exe", id="right to left"),
    pytest.param("a\u2066b\u200bc\ufeffd", id="invisible"),
    pytest.param(f"a{INVISIBLE}b", id="invisible to everybody but Python"),
    pytest.param("\x00\x01\x08\x0b\x0c\x7f", id="controls that XML has no place for"),
    pytest.param("\ufffe\uffff\U0001ffff", id="no characters"),
    pytest.param("😀" * 256, id="256 emoji"),
    pytest.param("</title><script>alert(1)</script>", id="markup"),
    pytest.param("]]><!-- &amp; &lt; -->", id="XML"),
    pytest.param("\"'`$(id);|&", id="shell"),
    pytest.param("%s%n{0}{x!r}\\x41\\", id="format strings and a backslash at the end"),
]


def unfit(text):
    """List the characters that no line of text should hold: controls, formats, separators, surrogates."""
    categories = ("Cc", "Cf", "Cs", "Zl", "Zp", "Cn")
    return [c for c in text if c != "\n" and (c in INVISIBLE or unicodedata.category(c) in categories)]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_value(scan, tmp_path, value):
    save(tmp_path, GOOD | {"Environment": value, "Name": value})
    run = scan(*READ, "--json", "out.json", "--junit", "out.xml", check=3)
    texts = [(tmp_path / name).read_text("utf-8") for name in ("violators.csv", "out.xml", "out.json")]
    assert [unfit(text) for text in [run.out, run.err, *texts]] == [[], [], [], [], []]

    table = run.out.split("\n\n")[1].split("\n")
    assert [line.split()[0] for line in table] == ["STATUS", "NEW"]

    assert texts[0].count("\n") == 2
    (row,) = run.csv("violators.csv")
    assert (row["InstanceId"], row["AccountId"], row["Status"]) == (FIRST_ID, ACCOUNT, "NEW")

    (finding,) = run.json("out.json")["findings"]
    assert (finding["name"], finding["violations"][0]["value"]) == (value, value)

    suites = ElementTree.fromstring(texts[1])
    assert [case.get("name") for case in suites.iter("testcase")] == ["scan", FIRST_ID]
    assert {element.tag for element in suites.iter()} == {"testsuites", "testsuite", "testcase", "failure"}


def test_hostile_names_of_what_is_resolved(scan, tmp_path):
    names = [case.values[0] for case in HOSTILE]
    save(tmp_path, *({"Name": name} for name in names))
    scan(*READ, check=3)
    save(tmp_path, *[GOOD] * len(names))
    run = scan(*READ, "--json", "out.json", check=0)
    assert unfit(run.out) == []
    lines = run.out.split("\n\n")[1].split("\n")
    assert [line.split()[0] for line in lines] == ["RESOLVED"] * len(names)
    assert [finding["name"] for finding in run.json("out.json")["resolved"]] == names


def test_hostile_names_of_files(tagcheck, tmp_path):
    hostile = "a\x1b[31m\x9b1m\u202e\nb"
    save(tmp_path, *[BARE] * 21)
    (tmp_path / "policy.yaml").rename(tmp_path / f"{hostile}.yaml")
    answer = json.loads((tmp_path / "fleet.json").read_text())
    (tmp_path / "cut.json").write_text(json.dumps(answer | {"NextToken": "x"}))
    (tmp_path / "cut.json").rename(tmp_path / f"{hostile}.json")
    for fleet, code in (("fleet.json", 3), (f"{hostile}.json", 4)):
        files = ["--policy", f"{hostile}.yaml", "--instances", fleet, "--csv", f"{hostile}.csv"]
        run = tagcheck("scan", *READ, *files, "--json", "out.json", "--junit", "out.xml", check=code)
        texts = [(tmp_path / name).read_text("utf-8") for name in (f"{hostile}.csv", "out.json", "out.xml")]
        assert [unfit(text) for text in (run.out, run.err, *texts)] == [[], [], [], [], []]
        assert texts[0].count("\n") == {3: 22, 4: 2}[code]
        assert ElementTree.fromstring(texts[2]).get("errors") == {3: "0", 4: "1"}[code]
    assert run.json("out.json")["policy"]["file"] == f"{hostile}.yaml"


@pytest.mark.parametrize(
    "value",
    ["Grüße", "日本語", "שלום", "a b", "back\\slash", "😀", 'i\'m "quoted"', "1.0", "a  b"],
)
def test_ordinary_value_is_shown_as_it_is(scan, tmp_path, value):
    save(tmp_path, {**GOOD, "Environment": value, "Name": value})
    run = scan(*READ, check=3)
    assert f"Environment={value}" in run.out
    (row,) = run.csv("violators.csv")
    assert (row["Name"], row["InvalidTags"]) == (value, f"Environment={value}")


# ---- JSON --------------------------------------------------------------------------------------------------

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
COUNTS = ["instances", "compliant", "findings", "new", "repeat", "reopened", "resolved", "exempted"]
REPORT = [
    "version",
    "policy",
    "scan_id",
    "started_at",
    "finished_at",
    "dry_run",
    "exit_code",
    "exit_name",
    "summary",
    "coverage",
    "findings",
    "resolved",
]
COVERAGE = ["account_id", "region", "status", "error", "instances", "compliant", "findings", "exempted"]
VIOLATION = ["tag_key", "type", "value", "found_key", "message"]
FINDING = [
    "account_id",
    "region",
    "instance_id",
    "name",
    "state",
    "launch_time",
    "status",
    "violations",
    "first_seen",
    "last_seen",
    "times_seen",
    "times_reopened",
]


def check_keys(record, promised):
    """Check that every promised key is there, in its order; keys may be added."""
    assert [key for key in record if key in promised] == promised


def test_json_has_the_keys_that_are_promised(scan, tmp_path):
    save(tmp_path, GOOD, BARE, {"owner": "ann"}, GOOD | {"Environment": "prd"})
    scan(check=4)
    save(tmp_path, GOOD, GOOD, {"owner": "ann"}, GOOD | {"Environment": "prd"}, BARE)
    run = scan("--json", "-", check=4)
    report = run.json("-")
    check_keys(report, REPORT)
    check_keys(report["policy"], ["name", "file", "digest"])
    check_keys(report["summary"], ["targets", "targets_unread", *COUNTS])
    unread, read = report["coverage"]
    for record in (unread, read):
        check_keys(record, COVERAGE)
    assert (unread["region"], unread["status"], list(unread["error"])) == (
        OTHER_REGION,
        "unread",
        ["code", "message"],
    )
    assert (read["region"], read["status"], read["error"]) == (REGION, "read", None)
    for finding in report["findings"]:
        check_keys(finding, FINDING)
        for violation in finding["violations"]:
            check_keys(violation, VIOLATION)
    (resolved,) = report["resolved"]
    check_keys(resolved, [*FINDING, "resolved_at", "resolution"])
    times = [report["started_at"], report["finished_at"], resolved["resolved_at"], resolved["launch_time"]]
    assert all(map(TIME.fullmatch, times))


def test_json_says_what_was_found(scan, tmp_path):
    save(tmp_path, GOOD, BARE, {"owner": "ann"}, GOOD | {"Environment": "prd"})
    scan(check=4)
    save(tmp_path, GOOD, GOOD, {"owner": "ann", "CostCenter": ""}, GOOD | {"Environment": "prd"}, BARE)
    report = scan("--json", "-", check=4).json("-")
    counts = {key: report["summary"][key] for key in ["targets", "targets_unread", *COUNTS]}
    assert list(counts.values()) == [2, 1, 5, 2, 3, 1, 2, 0, 1, 0]
    assert (report["exit_code"], report["exit_name"], report["dry_run"]) == (4, "INCOMPLETE", False)
    assert [(f["status"], f["times_seen"]) for f in report["findings"]] == [
        ("REPEAT", 2),
        ("REPEAT", 2),
        ("NEW", 1),
    ]
    violations = [
        [(v["tag_key"], v["type"], v["value"], v["found_key"]) for v in f["violations"]]
        for f in report["findings"]
    ]
    assert violations == [
        [
            ("Owner", "missing", "ann", "owner"),
            ("CostCenter", "empty", "", None),
            ("Environment", "missing", None, None),
        ],
        [("Environment", "noncompliant_value", "prd", None)],
        [("Owner", "missing", None, None), ("CostCenter", "missing", None, None)],
    ]
    (resolved,) = report["resolved"]
    assert (resolved["status"], resolved["resolution"], resolved["name"]) == ("RESOLVED", "tagged", "web-1")


@pytest.mark.parametrize(
    ("tags", "args"),
    [
        pytest.param([GOOD], READ, id="all comply"),
        pytest.param([], (*READ, "--account", ACCOUNT), id="no instances"),
    ],
)
def test_reports_without_findings_are_whole(scan, tmp_path, tags, args):
    save(tmp_path, *tags)
    run = scan(*args, "--json", "-", "--junit", "out.xml", check=0)
    report = run.json("-")
    assert (report["findings"], report["resolved"], report["exit_name"]) == ([], [], "COMPLIANT")
    suites = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert [(case.get("name"), len(case)) for case in suites.iter("testcase")] == [("scan", 0)]


def test_findings_are_sorted_whatever_their_order_in_the_file(scan, tmp_path):
    save(tmp_path, BARE, BARE, BARE)
    answer = json.loads((tmp_path / "fleet.json").read_text())
    answer["Reservations"][0]["Instances"].reverse()
    (tmp_path / "fleet.json").write_text(json.dumps(answer))
    run = scan(*READ, "--json", "out.json", check=3)
    ids = [finding["instance_id"] for finding in run.json("out.json")["findings"]]
    assert ids == sorted(ids)
    assert [row["InstanceId"] for row in run.csv("violators.csv")] == ids


# ---- JUnit -------------------------------------------------------------------------------------------------


def cases(path):
    """Read the cases of a JUnit file: (classname, name, tag of what it holds)."""
    return [
        (case.get("classname"), case.get("name"), "".join(child.tag for child in case))
        for case in ElementTree.parse(path).iter("testcase")
    ]


def test_junit(scan, tmp_path):
    save(tmp_path, GOOD, BARE, GOOD, {})
    run = scan("--junit", "out.xml", check=4)
    read, unread = f"{ACCOUNT}.{REGION}", f"{ACCOUNT}.{OTHER_REGION}"
    ids = [row["InstanceId"] for row in run.csv("violators.csv") if row["Status"] == "NEW"]
    assert cases(tmp_path / "out.xml") == [
        (unread, "scan", "error"),
        (read, "scan", ""),
        *((read, instance_id, "failure") for instance_id in ids),
    ]
    root = ElementTree.parse(tmp_path / "out.xml").getroot()
    counted = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
    for element in (root, *root):
        for name, tag in counted.items():
            if element is not root or name != "skipped":  # Jenkins' schema has none there
                assert int(element.get(name)) == len(list(element.iter(tag)))
    assert [suite.get("name") for suite in root] == [unread, read]
    (error,), (failure, _) = root.iter("error"), root.iter("failure")
    assert (error.get("type"), bool(error.get("message"))) == ("NotInFiles", True)
    assert failure.get("type") == "missing"
    assert failure.get("message") == "Owner is missing; CostCenter is missing"


# Jenkins' xUnit plugin, junit-10.xsd: of each element the attributes that it must have, those that it may
# have, and the elements that may stand in it. All attributes are texts there, but for `time`.
JUNIT = {
    "testsuites": ("", "name time tests failures errors", "testsuite"),
    "testsuite": (
        "name tests failures errors",
        "group time skipped timestamp hostname id package file log url",
        "testsuite properties testcase system-out system-err",
    ),
    "testcase": ("name", "time classname group", "skipped error failure system-out system-err"),
    "failure": ("", "type message", ""),
    "error": ("", "type message", ""),
    "skipped": ("", "type message", ""),
}
JUNIT_TIME = re.compile(r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]*)?")
JUNIT_COUNTS = ("tests", "failures", "errors", "skipped")
MIXED = ("failure", "error", "skipped")  # may hold text


def junit_mistakes(element):
    """Yield what the schema of Jenkins' xUnit plugin does not allow."""
    required, optional, children = map(str.split, JUNIT[element.tag])
    yield from (f"{element.tag} without {name}" for name in required if element.get(name) is None)
    for name, value in element.items():
        if name not in required + optional:
            yield f"{element.tag} with {name}"
        if (name == "time" and not JUNIT_TIME.fullmatch(value)) or (
            name in JUNIT_COUNTS and not value.isdigit()
        ):
            yield f"{element.tag} with {name}={value}"
    texts = [element.text, *(child.tail for child in element)]
    if element.tag not in MIXED and any(text and text.strip() for text in texts):
        yield f"{element.tag} with text"
    for child in element:
        if child.tag not in children:
            yield f"{child.tag} in {element.tag}"
        else:
            yield from junit_mistakes(child)


def test_junit_is_valid_to_jenkins(scan, tmp_path):
    exemption = {"reason": "agreed", "instances": [FIRST_ID]}
    save(tmp_path, BARE, BARE, GOOD, BARE | {"Environment": "x"}, exemptions=[exemption])
    scan("--junit", "out.xml", check=4)
    root = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert {element.tag for element in root.iter()} == set(JUNIT)
    assert root.tag == "testsuites"
    assert list(junit_mistakes(root)) == []


def test_junit_names_stay_from_run_to_run(scan, tmp_path):
    save(tmp_path, BARE, {})
    scan("--junit", "out.xml", check=4)
    before = cases(tmp_path / "out.xml")
    save(tmp_path, BARE | {"Owner": "", "Name": "renamed"}, {"CostCenter": "x"}, BARE)
    scan("--junit", "out.xml", check=4)
    assert cases(tmp_path / "out.xml")[:-1] == before


# ---- Summary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "args", "last"),
    [
        pytest.param(20, [], None, id="just as many as are shown"),
        pytest.param(21, [], "… and 1 more in violators.csv", id="one more"),
        pytest.param(1030, ["--csv", "x.csv"], "… and 1,010 more in x.csv", id="many more"),
        pytest.param(21, ["--csv", "-"], "… and 1 more", id="the CSV is on stdout"),
        pytest.param(21, ["--csv", ""], "… and 1 more", id="no CSV"),
    ],
)
def test_summary_shows_the_first_findings(scan, tmp_path, number, args, last):
    save(tmp_path, *[BARE] * number)
    run = scan(*READ, *args, check=3)
    summary = run.err if "-" in args else run.out
    rows = [line for line in summary.splitlines() if line.startswith("NEW ")]
    assert len(rows) == 20
    assert rows[0].split()[1:5] == [ACCOUNT, REGION, FIRST_ID, "web-1"]
    assert [line for line in summary.splitlines() if line.startswith("…")] == ([last] if last else [])


def test_summary_is_aligned(scan, tmp_path):
    names = ["a", "a name of more than twenty-four characters", "\x1b[31m", "middling", ""]
    save(tmp_path, *({"Name": name} for name in names[:3]))
    scan(*READ, check=3)
    save(tmp_path, *({"Name": name, "Owner": "x"} for name in names))
    new, repeat = scan(*READ, check=3).out.split("\n\n")[1:3]
    assert repeat.startswith("3 findings REPEAT, the oldest first:\n")
    for text, status in ((new, "NEW"), (repeat.partition("\n")[2], "REPEAT")):
        header, *rows = text.split("\n")
        assert {row.split()[0] for row in rows} == {status}
        for word in header.split()[1:]:
            start = header.index(word)
            assert {row[start - 2 : start] for row in rows} == {"  "}
            assert not any(row[start].isspace() for row in rows)


def test_summary_cuts_a_long_name(scan, tmp_path):
    name, shown = "x" * 200, f"  {'x' * 23}…  "
    save(tmp_path, {"Name": name})
    new = scan(*READ, check=3).out
    save(tmp_path, GOOD | {"Name": name})
    resolved = scan(*READ, check=0).out
    assert [(out.count(shown), "x" * 24 in out) for out in (new, resolved)] == [(1, False)] * 2


def test_summary_says_all_there_is_to_say(scan, tmp_path):
    save(tmp_path, {"Name": "web-1", "owner": "ann"}, {"Name": "web-2", **GOOD, "Environment": "prd"}, BARE)
    scan(check=4)
    save(tmp_path, {"Name": "web-1", "owner": "ann"}, {"Name": "web-2", **GOOD, "Environment": "prd"}, GOOD)
    out = scan("--dry-run", check=4).out
    assert "Policy test (policy.yaml): 1 of 2 targets read, 3 instances, 1 compliant" in out
    assert "dry run" in out
    assert "2 findings: 0 NEW, 2 REPEAT, 0 REOPENED; 1 RESOLVED" in out
    assert "Owner missing (has owner; ann?), CostCenter missing" in out
    assert "Environment=prd" in out
    assert re.search(r"^RESOLVED  .* tagged$", out, re.MULTILINE)
    assert re.search(
        rf"^  {ACCOUNT} {OTHER_REGION}  NotInFiles: no instance of this region", out, re.MULTILINE
    )
    assert out.endswith(
        "\n\nExit code 4 INCOMPLETE: some account or region could not be read; the rest is recorded and "
        "reported; outranks 3\n"
    )


@pytest.mark.parametrize(
    ("fail_on", "more", "end"),
    [
        ("new", [], "0: 1 finding; --fail-on counts none"),
        ("never", [BARE], "0: 2 findings; --fail-on counts none"),
        ("new", [GOOD], "0: 1 finding; --fail-on counts none"),
        ("new", [BARE], "3 VIOLATIONS: every target was read, and findings count"),
    ],
)
def test_summary_calls_nothing_compliant_while_findings_are_open(scan, tmp_path, fail_on, more, end):
    scan(*READ, check=3)
    save(tmp_path, BARE, *more)
    run = scan(*READ, "--fail-on", fail_on)
    assert run.lines[-1] == f"Exit code {end}"


def test_summary_calls_no_reopened_finding_new(scan, tmp_path):
    for tags in (BARE, GOOD, BARE):
        save(tmp_path, tags)
        run = scan(*READ, "--fail-on", "never", check=0)
    assert run.lines[1].startswith("1 finding: 0 NEW, 0 REPEAT, 1 REOPENED")
    assert run.lines[-1] == "Exit code 0: 1 finding; --fail-on counts none"


# ---- Streams and exit codes --------------------------------------------------------------------------------

SCENES = [
    pytest.param([GOOD], READ, 0, id="COMPLIANT"),
    pytest.param([BARE], READ, 3, id="VIOLATIONS"),
    pytest.param([BARE], (), 4, id="INCOMPLETE"),
]
FORMATS = (
    [],
    ["-q"],
    ["-v"],
    ["--csv", "-"],
    ["--json", "-"],
    ["--junit", "-", "-q"],
    ["--json", "o", "--junit", "p"],
)


@pytest.mark.parametrize(("tags", "args", "code"), SCENES)
def test_exit_code_does_not_depend_on_the_format(scan, tmp_path, tags, args, code):
    save(tmp_path, *tags)
    assert [scan(*args, *form).code for form in FORMATS] == [code] * len(FORMATS)


@pytest.mark.parametrize(
    ("form", "parse"),
    [
        ("--csv", lambda text: next(iter(csv.reader(text.splitlines(), strict=True)))[0] == "InstanceId"),
        ("--json", json.loads),
        ("--junit", ElementTree.fromstring),
    ],
)
@pytest.mark.parametrize("goal", ["-", "/dev/stdout"])
def test_machine_format_is_alone_on_stdout(scan, tmp_path, form, parse, goal):
    run = scan(*READ, form, goal, check=3)
    assert parse(run.out)
    assert "Exit code" not in run.out
    assert "Exit code 3 VIOLATIONS" in run.err
    assert (tmp_path / "violators.csv").exists() == (form != "--csv")
    assert scan(*READ, form, goal, "-q", check=3).err == ""


def test_quiet_says_nothing(scan):
    run = scan(*READ, "-q", check=3)
    assert (run.out, run.err) == ("", "")


def test_summary_is_on_stdout_and_progress_on_stderr(scan):
    run = scan(*READ, check=3)
    assert run.out.startswith("Policy test ")
    assert run.err == f"{ACCOUNT} {REGION}: 1 instance\n"
    assert "\x1b" not in run.out + run.err


def on_terminal(cwd, *args, env=None, **streams):
    """Run a scan on a pseudo terminal, but for the streams that are given: its code, screen and pipes."""
    screen, terminal = pty.openpty()
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal} | streams
    environment = clean_environment(cwd) | {"TERM": "xterm"} | (env or {})
    command = [sys.executable, TAGCHECK, *COMMAND, *args]
    process = subprocess.Popen(command, cwd=cwd, env=environment, text=True, **streams)
    os.close(terminal)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    shown = b""
    with open(screen, "rb", buffering=0) as file:
        try:
            while chunk := file.read(65536):
                shown += chunk
        except OSError:  # how Linux says that the last of the other side has closed it
            pass
    out, err = process.communicate(timeout=60)
    watchdog.cancel()
    assert "Traceback" not in shown.decode()
    return process.returncode, shown.decode().replace("\r\n", "\n"), (out or "") + (err or "")


@pytest.mark.parametrize(
    ("env", "coloured"),
    [
        pytest.param({}, True, id="by itself"),
        pytest.param({"NO_COLOR": ""}, True, id="NO_COLOR is there but empty"),
        pytest.param({"NO_COLOR": "1"}, False, id="NO_COLOR"),
        pytest.param({"NO_COLOR": "0"}, False, id="NO_COLOR whatever it says"),
        pytest.param({"TERM": "dumb"}, False, id="a dumb terminal"),
    ],
)
def test_colour_on_a_terminal(scan, tmp_path, env, coloured):
    code, shown, _ = on_terminal(tmp_path, *READ, env=env, stderr=subprocess.DEVNULL)
    assert code == 3
    assert ("\x1b[31mNEW\x1b[0m  " in shown, "\x1b[31mVIOLATIONS\x1b[0m:" in shown) == (coloured, coloured)
    assert ("\x1b" in shown) == coloured


PROGRESS = "\r\x1b[K0/1 target · 1 instance · 0:00"


@pytest.mark.parametrize(
    ("args", "streams", "progress", "colour"),
    [
        pytest.param([], {}, True, True, id="both streams are terminals"),
        pytest.param([], {"stdout": subprocess.PIPE}, True, False, id="stderr only"),
        pytest.param([], {"stderr": subprocess.PIPE}, False, True, id="stdout only"),
        pytest.param(["-q"], {}, False, False, id="quiet"),
        pytest.param(["--json", "-"], {"stdout": subprocess.PIPE}, True, True, id="the summary is on stderr"),
    ],
)
def test_progress_and_colour_only_on_a_terminal(scan, tmp_path, args, streams, progress, colour):
    code, shown, piped = on_terminal(tmp_path, *READ, *args, **streams)
    assert code == 3
    assert (PROGRESS in shown, "\x1b[31mNEW" in shown) == (progress, colour)
    assert "\x1b" not in piped
    assert (f"{ACCOUNT} {REGION}: 1 instance" in piped) == (streams.keys() == {"stderr"})
    if progress:  # nothing of it stays
        assert re.search(r"0:\d\d[^\r]*\r\x1b\[K[^\r]*$", shown.replace("\r\n", "\n"))


@pytest.mark.parametrize("value", ["\x1b[2J", "\x1b]0;owned\x07", "\x9b2J", "\u202e", "a\nb", "a\rb"])
def test_terminal_gets_no_sequence_from_a_tag(scan, tmp_path, value):
    save(tmp_path, {"Name": value})
    code, shown, _ = on_terminal(tmp_path, *READ)
    assert code == 3
    assert unfit(re.sub(r"\r?\x1b\[(K|[0-9]+m)", "", shown)) == []
    assert value.encode("unicode_escape").decode() in shown


# ---- Where reports go --------------------------------------------------------------------------------------


def listing(cwd):
    return sorted(path.name for path in cwd.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["--csv", "a", "--json", "a"], id="the same name"),
        pytest.param(["--csv", "a", "--json", "./x/../a"], id="the same file"),
        pytest.param(["--json", "-", "--junit", "-"], id="stdout twice"),
        pytest.param(["--json", "-", "--junit", "/dev/stdout"], id="stdout by two names"),
        pytest.param(["--json", "violators.csv"], id="the default of another"),
        pytest.param(["--csv", "a", "--state", "a"], id="the state"),
        pytest.param(["--csv", "link", "--json", "x/a"], id="a link to the other"),
        pytest.param(["--json", "fleet.json"], id="what is read"),
        pytest.param(["--json", "policy.yaml"], id="the policy"),
    ],
)
def test_two_outputs_with_one_goal_are_a_usage_error(scan, tmp_path, args):
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("x/a")
    before = (
        listing(tmp_path),
        (tmp_path / "fleet.json").read_bytes(),
        (tmp_path / "policy.yaml").read_bytes(),
    )
    run = scan(*READ, *args, check=2)
    assert run.err
    assert before == (
        listing(tmp_path),
        (tmp_path / "fleet.json").read_bytes(),
        (tmp_path / "policy.yaml").read_bytes(),
    )


@pytest.mark.parametrize("form", ["--csv", "--json", "--junit"])
@pytest.mark.parametrize(
    ("goal", "why"), [("place", "is a directory"), ("nowhere/out", "the directory nowhere does not exist")]
)
def test_goal_that_cannot_be_is_found_before_the_scan(scan, tmp_path, form, goal, why):
    (tmp_path / "place").mkdir()
    before = listing(tmp_path)
    run = scan(*READ, form, goal, check=5)
    assert f"{form} {goal}" in run.err
    assert why in run.err
    assert listing(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_goal_in_a_read_only_directory_is_found_before_the_scan(scan, tmp_path):
    (tmp_path / "place").mkdir(mode=0o500)
    assert "cannot be written" in scan(*READ, "--csv", "place/out.csv", check=5).err
    assert not (tmp_path / "instance_state.db").exists()


@pytest.mark.parametrize("victim", [True, False], ids=["to a file", "to nothing"])
def test_linked_output_is_replaced_and_its_victim_intact(scan, tmp_path, victim):
    (tmp_path / "elsewhere").mkdir()
    if victim:
        (tmp_path / "elsewhere" / "victim").write_text("precious")
    (tmp_path / "violators.csv").symlink_to("elsewhere/victim")
    run = scan(*READ, check=3)
    assert not (tmp_path / "violators.csv").is_symlink()
    assert len(run.csv("violators.csv")) == 1
    assert [path.read_text() for path in (tmp_path / "elsewhere").iterdir()] == ["precious"] * victim


def test_hard_linked_output_leaves_the_other_name_as_it_was(scan, tmp_path):
    (tmp_path / "kept.csv").write_text("precious")
    os.link(tmp_path / "kept.csv", tmp_path / "violators.csv")
    scan(*READ, check=3)
    assert (tmp_path / "kept.csv").read_text() == "precious"


def test_pipe_is_written_not_replaced(scan, tmp_path):
    save(tmp_path, *[BARE] * 2000)  # more than a pipe holds
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    scan(*READ, "--csv", "pipe", check=3)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    reader.join(60)
    assert read[0].startswith(HEADER)
    assert read[0].count("\n") == 2001


@pytest.mark.parametrize("goal", [os.devnull, "link"])
def test_device_is_written_not_replaced(scan, tmp_path, goal):
    (tmp_path / "link").symlink_to(os.devnull)
    scan(*READ, "--csv", goal, check=3)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert (tmp_path / "link").is_symlink()
    assert listing(tmp_path) == ["fleet.json", "instance_state.db", "link", "policy.yaml"]


def test_stdout_by_its_path_may_be_a_file(scan, tmp_path):
    with (tmp_path / "out").open("w") as file:
        process = start(tmp_path, *READ, "--csv", "/dev/stdout", stdout=file)
        process.communicate(timeout=60)
    assert process.returncode == 3
    assert (tmp_path / "out").read_text().startswith(HEADER)


@pytest.mark.parametrize("form", ["--csv", "--json"])
def test_full_device_is_a_failure(scan, form):
    assert f"{form} /dev/full cannot be written" in scan(*READ, form, "/dev/full", check=5).err


@pytest.mark.parametrize("args", [[], ["--csv", "-"]], ids=["summary", "CSV"])
def test_full_disk_under_stdout_is_a_failure(scan, tmp_path, args):
    with open("/dev/full", "w") as full:
        process = start(tmp_path, *READ, *args, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "Traceback" not in err
    assert "No space left on device" in err


@pytest.mark.parametrize(
    ("form", "stream"),
    [
        pytest.param([], "stdout", id="summary"),
        pytest.param(["--csv", "-"], "stdout", id="CSV"),
        pytest.param(["--json", "-", "-q"], "stdout", id="JSON"),
        pytest.param([], "stderr", id="progress"),
        pytest.param(["--csv", "-"], "stderr", id="summary on stderr"),
    ],
)
def test_reader_that_goes_away_is_no_failure(scan, tmp_path, form, stream):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(tmp_path, *READ, *form, "--junit", "out.xml", **{stream: writing})
    os.close(writing)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in (err or "")) == (3, False)
    assert cases(tmp_path / "out.xml")  # the other reports do not suffer
    if stream == "stderr" and form:
        assert out.startswith(HEADER)


def test_reader_that_has_read_enough_is_no_failure(scan, tmp_path):
    save(tmp_path, *[BARE] * 2000)
    process = start(tmp_path, *READ, "--csv", "-", "--json", "out.json")
    assert process.stdout.readline().startswith(HEADER)
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(60), "Traceback" in err) == (3, False)
    assert len(json.loads((tmp_path / "out.json").read_text())["findings"]) == 2000


@pytest.mark.parametrize("closed", [1, 2], ids=["stdout", "stderr"])
def test_stream_may_be_closed_from_the_start(scan, tmp_path, closed):
    process = start(tmp_path, *READ, "--json", "out.json", preexec_fn=lambda: os.close(closed))
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (3, False)
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == 3


def reading(cwd, *args, **options):
    """Start a scan, and return it when it has staged its reports and waits for the fleet."""
    fleet = (cwd / "fleet.json").read_text()
    (cwd / "fleet.json").unlink()
    os.mkfifo(cwd / "fleet.json")
    process = start(cwd, *READ, *args, **options)
    process.fleet = (cwd / "fleet.json").open("w")  # returns when the script opens it
    process.fleet.write(fleet)
    return process


def staged(cwd):
    """List the new files beside the goals."""
    return [path for path in cwd.rglob(".*") if path.is_file() or path.is_symlink()]


def finish(process):
    """Give the fleet to a scan that waits for it: its exit code and what it said on stderr."""
    process.fleet.close()
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, err


def test_report_is_private_until_it_is_published(scan, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    former = os.umask(0o022)
    try:
        process = reading(tmp_path, "--csv", "shared/out.csv")
    finally:
        os.umask(former)
    (new,) = staged(tmp_path)
    assert (new.parent.name, stat.S_IMODE(new.stat().st_mode)) == ("shared", 0o600)
    assert finish(process)[0] == 3
    assert stat.S_IMODE((tmp_path / "shared/out.csv").stat().st_mode) == 0o644
    assert listing(tmp_path / "shared") == ["out.csv"]


@pytest.mark.parametrize("by", ["a link", "a file", "nothing"])
def test_staged_report_that_another_replaces_harms_nobody(scan, tmp_path, by):
    (tmp_path / "shared").mkdir()
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "shared/out.csv").write_text("old")
    process = reading(tmp_path, "--csv", "shared/out.csv")
    (new,) = staged(tmp_path)
    new.unlink()
    if by == "a link":
        new.symlink_to(tmp_path / "victim")
    elif by == "a file":
        new.write_text("forged")
    code, err = finish(process)
    assert (code, "--csv shared/out.csv" in err) == (5, True)
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "shared/out.csv").read_text() == "old"
    assert listing(tmp_path / "shared") == ["out.csv"]


def test_report_for_stdout_is_nowhere_for_others_to_read(scan, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    process = reading(tmp_path, "--csv", "-")
    assert [path for path in (tmp_path / "tmp").iterdir() if path.stat().st_mode & 0o077] == []
    process.fleet.close()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.startswith(HEADER)) == (3, True)
    assert listing(tmp_path / "tmp") == []


def test_directory_that_vanishes_under_a_report_is_a_failure(scan, tmp_path):
    (tmp_path / "place").mkdir()
    process = reading(tmp_path, "--csv", "place/out.csv", "--json", "out.json")
    (tmp_path / "place").rename(tmp_path / "gone")
    code, err = finish(process)
    assert (code, "--csv place/out.csv cannot be written: No such file" in err) == (5, True)


def test_goal_that_becomes_a_directory_is_a_failure(scan, tmp_path):
    process = reading(tmp_path, "--csv", "out.csv")
    (tmp_path / "out.csv").mkdir()
    code, err = finish(process)
    assert (code, "--csv out.csv cannot be written: Is a directory" in err) == (5, True)
    assert [path.name for path in staged(tmp_path)] == []


def test_pipe_that_nobody_reads_is_a_failure(scan, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    impatient = script_with(tmp_path, PIPE_SECONDS=0.3)
    run = scan(*READ, "--csv", "pipe", "--json", "out.json", script=impatient, check=5)
    assert "--csv pipe is a pipe that nobody reads" in run.err
    assert run.json("out.json")["exit_code"] == 3


def test_pipe_that_becomes_a_link_to_a_file_leaves_the_file_intact(scan, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "victim").write_text("precious")
    process = reading(tmp_path, "--csv", "pipe", "--json", "out.json")
    (tmp_path / "pipe").unlink()
    (tmp_path / "pipe").symlink_to("victim")
    code, err = finish(process)
    assert (code, "--csv pipe" in err) == (5, True)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("end", ["-journal", "-wal", "-shm"])
def test_report_is_never_written_where_sqlite_keeps_its_own(scan, tmp_path, end):
    goal = f"instance_state.db{end}"
    said = f"--csv {goal} and the journal of --state instance_state.db are the same file: give each its own"
    assert said in scan(*READ, "--csv", goal, check=2).err


def test_prices_are_not_overwritten(scan, tmp_path):
    (tmp_path / "prices.csv").write_text("instance_type,region,hourly_price\n")
    scan(*READ, "--prices", "prices.csv", "--csv", "prices.csv", check=2)
    assert (tmp_path / "prices.csv").read_text() == "instance_type,region,hourly_price\n"


def test_dry_run_writes_a_csv_only_where_one_is_asked_for(scan, tmp_path):
    save(tmp_path, *[BARE] * 21)
    run = scan(*READ, "--dry-run", check=3)
    assert listing(tmp_path) == ["fleet.json", "policy.yaml"]
    assert "and 1 more\n" in run.out
    assert len(scan(*READ, "--dry-run", "--csv", "out.csv", check=3).csv("out.csv")) == 21


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_reports_respect_the_umask(scan, tmp_path, mask, mode):
    former = os.umask(mask)
    try:
        scan(*READ, "--json", "out.json", "--junit", "out.xml", check=3)
    finally:
        os.umask(former)
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in ("violators.csv", "out.json", "out.xml")}
    assert modes == {mode}


def test_nothing_is_left_beside_the_reports(scan, tmp_path):
    scan(*READ, "--json", "out.json", "--junit", "out.xml", check=3)
    files = ["fleet.json", "instance_state.db", "out.json", "out.xml", "policy.yaml", "violators.csv"]
    assert listing(tmp_path) == files


@pytest.mark.parametrize(
    ("spoilt", "content", "args", "code"),
    [
        pytest.param("policy.yaml", "version: 1", [], 2, id="an invalid policy"),
        pytest.param("policy.yaml", None, [], 2, id="no policy"),
        pytest.param("fleet.json", '{"Reservations": [', [], 2, id="a cut file of instances"),
        pytest.param("fleet.json", "{}", [], 2, id="a file without Reservations"),
        pytest.param("fleet.json", None, [], 2, id="no file of instances"),
        pytest.param("instance_state.db", "", [], 5, id="an empty state"),
        pytest.param("instance_state.db", "garbage", [], 5, id="a damaged state"),
        pytest.param("x", "", ["--region", "ap-south-1"], 2, id="a region out of scope"),
        pytest.param("x", "", ["--junit", "nowhere/out.xml"], 5, id="a goal that cannot be"),
        pytest.param("x", "", ["--bogus"], 2, id="a wrong argument"),
    ],
)
def test_failed_scan_leaves_old_reports_as_they_were(scan, tmp_path, spoilt, content, args, code):
    scan(*READ, "--json", "out.json", "--junit", "out.xml", check=3)
    if content is None:
        (tmp_path / spoilt).unlink()
    else:
        (tmp_path / spoilt).write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = scan(
        *READ,
        "--json",
        "out.json",
        *(args if "--junit" in args else ["--junit", "out.xml", *args]),
        check=code,
    )
    assert (run.out, bool(run.err)) == ("", True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
