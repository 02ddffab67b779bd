"""`remediate`: what is planned, what is written and what is left alone, and that it can be taken back."""

import csv
import io
import json
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from aws_server import ACCOUNT_ID, numbered
from builders import SAVED_FILES, instance, save_fleet, save_policy
from conftest import TAGCHECK, clean_environment, run_tagcheck, script_with

import tagcheck as script

REGION, OTHER_REGION = "us-east-1", "eu-west-1"
MEMBER = "210987654321"
HERE = script.Target(ACCOUNT_ID, REGION)
KEYS = {
    "version": 1,
    "name": "test",
    "required_tags": ["Owner", {"key": "Environment", "values": ["dev", "prod"], "default": "dev"}],
    "placeholder_values": ["tbd"],
    "regions": {REGION: {}, OTHER_REGION: {"required_tags": ["Team"]}},
}
POLICY = script.check_policy(json.dumps(KEYS).encode(), "policy.yaml")
COLUMNS = script.PLAN_COLUMNS


# ---- What is planned ---------------------------------------------------------------------------------------


def finding(tags, *suggestions, region=REGION, policy=POLICY, cause=None, id_="i-00000001"):
    """Make an open finding of an instance with these tags, as a scan would."""
    checks = (script.check_tag(tags, rule, policy.placeholder_values) for rule in policy.rules(region))
    violations = tuple(filter(None, checks))
    times = ("2026-02-24T10:30:45Z",) * 2
    return script.Finding(
        *(ACCOUNT_ID, region, id_, "running", times[0], tags, violations, script.Status.NEW),
        *(*times, 1, 0, None, None, None, suggestions, None, cause, None, None),
    )


def planned(*findings, policy=POLICY, min_confidence=0.95):
    return [
        (row.tag_key, row.value, str(row.action), row.current)
        for row in script.plan(findings, policy, min_confidence, Counter())
    ]


def suggestion(value, confidence, key="Owner"):
    return script.Suggestion(key, value, confidence, "9 of 9 in web")


@pytest.mark.parametrize(
    ("tags", "suggestions", "expected"),
    [
        pytest.param({}, [("ann", 0.95)], ("ann", "add", ""), id="missing"),
        pytest.param({}, [("ann", 0.949)], None, id="not sure enough"),
        pytest.param({}, [], None, id="nothing known"),
        pytest.param({"Owner": ""}, [("ann", 1)], ("ann", "add", ""), id="empty"),
        pytest.param({"Owner": "  "}, [("ann", 1)], ("ann", "add", "  "), id="blank"),
        pytest.param({"Owner": "tbd"}, [("ann", 1)], ("ann", "review", "tbd"), id="placeholder is a value"),
        pytest.param({"owner": "ann"}, [("ann", 0.99)], ("ann", "add", ""), id="near miss is left alone"),
        pytest.param({}, [("a\u202eb", 1)], None, id="value with what nobody sees"),
        pytest.param({}, [("x" * 257, 1)], None, id="value too long"),
        pytest.param({}, [("TBD", 1)], None, id="value that is a placeholder"),
    ],
)
def test_plan_of_a_tag(tags, suggestions, expected):
    case = finding({"Environment": "dev"} | tags, *(suggestion(*s) for s in suggestions))
    assert planned(case) == ([("Owner", *expected)] if expected else [])


@pytest.mark.parametrize(
    ("tags", "confidence", "expected"),
    [
        pytest.param({}, 0, ("dev", "add", ""), id="nothing better is known"),
        pytest.param({}, 0.9, ("dev", "review", ""), id="a suggestion contradicts it"),
        pytest.param({}, 0.5, ("dev", "review", ""), id="a weak suggestion contradicts it"),
        pytest.param({}, 0.49, ("dev", "add", ""), id="a guess contradicts it"),
        pytest.param({}, 0.96, ("prod", "add", ""), id="a suggestion is better"),
        pytest.param({"Environment": "prd"}, 0.9, ("prod", "review", "prd"), id="wrong value"),
        pytest.param({"Environment": "prd"}, 0, None, id="wrong value, nothing known"),
    ],
)
def test_plan_of_a_tag_with_a_default(tags, confidence, expected):
    known = [suggestion("prod", confidence, "Environment")] if confidence else []
    case = finding({"Owner": "ann"} | tags, *known)
    assert planned(case) == ([("Environment", *expected)] if expected else [])


def test_default_is_planned_with_what_contradicts_it():
    case = finding({"Owner": "ann"}, suggestion("prod", 0.9, "Environment"))
    [row] = script.plan([case], POLICY, 0.95, Counter())
    assert not row.writes
    assert row.why == "the policy's default (policy.yaml:1); but prod is 9 of 9 in web"


@pytest.mark.parametrize(
    ("tags", "warning"),
    [
        pytest.param(
            {"aws:autoscaling:groupName": "web"},
            "Auto Scaling group web: the tag is lost when an instance is replaced; "
            "set it on web for new instances (PropagateAtLaunch)",
            id="Auto Scaling",
        ),
        pytest.param(
            {"aws:cloudformation:stack-name": "shop", "aws:cloudformation:logical-id": "Web"},
            "CloudFormation stack shop: the next stack update may revert the tag; set it on the stack shop",
            id="CloudFormation",
        ),
        pytest.param(
            {"eks:cluster-name": "c", "eks:nodegroup-name": "n", "aws:autoscaling:groupName": "eks-n"},
            "EKS node group c/n: the tag is lost when an instance is replaced; "
            "set it in the launch template of c/n",
            id="EKS",
        ),
        pytest.param(
            {"karpenter.k8s.aws/ec2nodeclass": "default", "aws:ec2launchtemplate:id": "lt-1"},
            "Karpenter node class default: the tag is lost when an instance is replaced; "
            "set it in spec.tags of the EC2NodeClass default",
            id="Karpenter",
        ),
        pytest.param({"Name": "web-1"}, "", id="nothing"),
    ],
)
def test_plan_warns_where_the_source_of_an_instance_undoes_a_tag(tags, warning):
    instance = script.Instance("i-00000001", "running", script.datetime.now(script.UTC), tags)
    case = finding(
        {"Environment": "dev"}, suggestion("ann", 1), cause=script.cause_of(script.groups_of(instance))
    )
    [row] = script.plan([case], POLICY, 0.95, Counter())
    assert row.warning == warning


def test_plan_leaves_out_what_the_policy_no_longer_asks_for():
    case = finding({}, suggestion("ann", 1), suggestion("qa", 1, "Environment"))
    later = script.check_policy(json.dumps(KEYS | {"required_tags": ["Environment"]}).encode(), "later.yaml")
    assert planned(case, policy=later) == [("Environment", "qa", "add", "")]
    other = script.check_policy(json.dumps(KEYS | {"regions": {OTHER_REGION: {}}}).encode(), "other.yaml")
    assert planned(case, policy=other) == []


@pytest.mark.parametrize(
    ("case", "keys", "reasons"),
    [
        pytest.param(finding({}), {}, {"UNKNOWN"}, id="nothing known of one, a default of the other"),
        pytest.param(finding({"Owner": "tbd"}), {}, {"WRONG"}, id="wrong value, nothing known"),
        pytest.param(finding({}, suggestion("ann", 0.9)), {}, {"UNSURE"}, id="not sure enough"),
        pytest.param(finding({}, suggestion("a\u202eb", 1)), {}, {"NOT_ALLOWED"}, id="value not allowed"),
        pytest.param(
            finding({}), {"required_tags": ["Environment"]}, {"NOT_REQUIRED", "UNKNOWN"}, id="another policy"
        ),
        pytest.param(finding({}), {"regions": {OTHER_REGION: {}}}, {"NOT_REQUIRED"}, id="another region"),
        pytest.param(
            finding({}),
            {"accounts": {"ids": [MEMBER], "role_name": "r"}},
            {"NOT_REQUIRED"},
            id="another account",
        ),
        pytest.param(finding({}, suggestion("ann", 1)), {}, set(), id="all is planned"),
    ],
)
def test_plan_counts_the_instances_with_tags_that_it_leaves_out(case, keys, reasons):
    policy, left_out = script.check_policy(json.dumps(KEYS | keys).encode(), "policy.yaml"), Counter()
    list(script.plan([case, case], policy, 0.95, left_out))
    assert left_out == {script.LeftOut[reason]: 2 for reason in reasons}


def test_plan_says_what_it_leaves_out_and_why_there_is_nothing_to_write(tagcheck, tmp_path):
    def remediate(*args):
        lines = tagcheck("remediate", "--policy", "policy.yaml", *args, check=0).lines
        return [line for line in lines if line.startswith(("Left", "Nothing"))]

    save_policy(tmp_path)
    save_fleet(tmp_path, *map(instance, (1, 2)), instance(3, {"owner": "ann"}))
    tagcheck("scan", *SAVED_FILES, check=3)
    unknown = (
        "Left out on 2 instances: tags without a likely value; "
        "set them by hand, or give them a default in the policy"
    )
    unsure = (
        "Left out on 1 instance: tags whose likely value is not sure enough; "
        "a lower --min-confidence plans them"
    )
    assert remediate() == [unknown]
    assert remediate("--min-confidence", "1") == [unknown, unsure, "Nothing to write"]
    assert remediate("--min-confidence", "1", "--apply") == [unknown, unsure]
    empty = save_plan(tmp_path / "empty.csv")
    assert remediate("--plan", empty) == ["Nothing to write"]
    skip = save_plan(tmp_path / "skip.csv", row(action="skip"))
    assert remediate("--plan", skip) == ["Nothing to write"]
    review = save_plan(tmp_path / "review.csv", row(action="review"))
    replace = "Nothing to write: put replace in place of review where the new value is right"
    assert remediate("--plan", review) == [replace]
    save_fleet(tmp_path, *(instance(number, {"Owner": "ann"}) for number in (1, 2, 3)))
    tagcheck("scan", *SAVED_FILES, check=0)
    assert remediate() == ["Nothing to write: no finding to fix is open"]


def test_plan_advises_no_default_where_a_value_is_wrong(tagcheck, tmp_path):
    save_policy(tmp_path, required_tags=[{"key": "Environment", "values": ["dev"], "default": "dev"}])
    save_fleet(tmp_path, instance(1, {"Environment": "staging"}))
    tagcheck("scan", *SAVED_FILES, check=3)
    run = tagcheck("remediate", "--policy", "policy.yaml", "--json", "out.json", check=0)
    assert run.json("out.json")["left_out"] == {"wrong": 1}
    assert run.lines[1:] == [
        "Left out on 1 instance: tags with a wrong value and no likely one; correct them by hand",
        "Nothing to write",
    ]


# ---- What an edited plan may be ----------------------------------------------------------------------------


def row(instance_id="i-00000001", tag="Owner", value="ann", action="add", **cells):
    known = {"Account": ACCOUNT_ID, "Region": REGION, "InstanceId": instance_id, "Tag": tag}
    return dict.fromkeys(COLUMNS, "") | known | {"Value": value, "Action": action} | cells


def save_plan(path, *rows, columns=COLUMNS, delimiter=",", end="\n", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        table = csv.DictWriter(file, columns, delimiter=delimiter, lineterminator=end, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return path


def read(path, actions=script.PLAN_ACTIONS):
    return list(script.read_plan(str(path), POLICY, actions))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param({}, id="as it was written"),
        pytest.param({"encoding": "utf-8-sig", "delimiter": ";", "end": "\r\n"}, id="by Excel in Europe"),
        pytest.param({"delimiter": "\t"}, id="tabs"),
        pytest.param({"end": "\r"}, id="lines as of old"),
        pytest.param({"columns": script.PLAN_NEEDED}, id="only the columns that are needed"),
        pytest.param({"columns": ("Note", *reversed(COLUMNS))}, id="other columns and order"),
    ],
)
def test_plan_is_read_back(tmp_path, form):
    rows = row(value="=a,b; c"), row("i-00000002", action=" Skip ")
    path = save_plan(tmp_path / "plan.csv", *rows, **form)
    path.write_bytes(path.read_bytes() + b"\n \n" + form.get("delimiter", ",").encode() * 9)
    assert [(r.instance_id, r.value, r.action) for r in read(path)] == [
        ("i-00000001", "=a,b; c", "add"),
        ("i-00000002", "ann", "skip"),
    ]


@pytest.mark.parametrize("text", ["=1+1", "'=1", "''@x", "'ann", "''", "+", 'a"b,c;d\n', "＝x", " =x"])
def test_cell_is_the_text_again(text):
    cell = script.csv_cell(text)
    assert not cell.startswith(("=", "+", "-", "@", "＝"))
    assert script.csv_text(cell) == script.printable(text)


GOOD = row()


@pytest.mark.parametrize(
    ("rows", "line", "complaint"),
    [
        pytest.param([GOOD, GOOD], 3, "2 has the same tag", id="twice the same"),
        pytest.param([GOOD, row(value="bob")], 3, "2 has the same tag", id="contradiction"),
        pytest.param([row(action="remove")], 2, "'remove' is not an action", id="unknown action"),
        pytest.param([row(action="")], 2, "'' is not an action", id="no action"),
        pytest.param([row(action="delete")], 2, "--undo", id="action of an undo file"),
        pytest.param([GOOD, row("i-1")], 3, "not an instance id", id="no instance id"),
        pytest.param([row(Account="12345678901")], 2, "cut its zeros", id="account without its zero"),
        pytest.param([row(Account="1.23457E+11")], 2, "cut its zeros", id="account as a number"),
        pytest.param([row(Region="eu-west-3")], 2, "does not cover the region", id="region outside"),
        pytest.param(
            [GOOD, row(tag="Owner\u200b")], 3, "does not require Owner", id="key with what nobody sees"
        ),
        pytest.param([row(value="a\0")], 2, "invisible", id="NUL"),
        pytest.param([row(tag="Team")], 2, "does not require Team in us-east-1", id="key of another region"),
        pytest.param([row(tag="aws:x")], 2, "AWS's own", id="key of AWS"),
        pytest.param([row(tag="AWS:x")], 2, "AWS's own", id="key of AWS in capitals"),
        pytest.param(
            [row(tag="Environment", value="prd")], 2, "not one of dev, prod", id="value not allowed"
        ),
        pytest.param([row(value="")], 2, "Owner is empty", id="no value"),
        pytest.param([row(value="x" * 257)], 2, "257 characters", id="long value"),
        pytest.param([row(value="a\u200bb")], 2, "invisible", id="zero width space"),
    ],
)
def test_row_that_cannot_be_carried_out_is_named(tmp_path, rows, line, complaint):
    path = save_plan(tmp_path / "plan.csv", *rows)
    with pytest.raises(script.PolicyError) as raised:
        read(path)
    [problem] = raised.value.problems
    assert (problem.line, complaint in str(problem)) == (line, True), str(problem)


HEAD = ",".join(script.PLAN_NEEDED)
WRONG = f"{ACCOUNT_ID},{REGION},i-1,Owner,ann,add"


@pytest.mark.parametrize(
    ("lines", "complaints"),
    [
        pytest.param(
            [WRONG, "a,b", WRONG, WRONG + ",more"],
            ["2:1: 'i-1' is not", "3:1: 2 cells", "4:1: 'i-1' is not", "5:1: 7 cells"],
            id="too few and too many cells",
        ),
        pytest.param([WRONG, "\xe9", WRONG], ["2:1: 'i-1' is not", "3:1: not UTF-8"], id="not UTF-8"),
        pytest.param([WRONG, '"a', WRONG], ["2:1: 'i-1' is not", "4:1: not CSV"], id="quote left open"),
        pytest.param(
            [WRONG, "a" * 2_000_000], ["2:1: 'i-1' is not", "3:1: longer than"], id="too long a line"
        ),
    ],
)
def test_wrong_rows_are_all_named_where_the_file_is_broken_as_well(tmp_path, lines, complaints):
    path = tmp_path / "plan.csv"
    path.write_bytes("\n".join([HEAD, *lines]).encode("latin-1"))
    with pytest.raises(script.PolicyError) as raised:
        read(path)
    for problem, complaint in zip(raised.value.problems, complaints, strict=True):
        assert str(problem).startswith(f"{path}:{complaint}")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        pytest.param(b"", "1:1: empty", id="nothing"),
        pytest.param(b"\xef\xbb\xbf\n\n", "1:1: empty", id="blank lines"),
        pytest.param(b"\n,,,\n,,,\n", "1:1: empty", id="blank cells"),
        pytest.param("Account,Tag\n1,2\n".encode("utf-16"), "UTF-16", id="UTF-16"),
        pytest.param(b"Account\xe9,", "not UTF-8", id="Latin-1"),
        pytest.param(b"Account,Region,Tag,Value,Action\n", "needs InstanceId", id="column left out"),
        pytest.param(b"Account,Region,InstanceId,Tag,Tag,Value,Action\n", "needs Tag", id="column twice"),
        pytest.param(",".join(script.PLAN_NEEDED).encode() + b"\na,b\n", ":2:1: 2 cells", id="cut short"),
        pytest.param(
            ",".join(script.PLAN_NEEDED).encode() + b"\na,b,c,d,e,f,g\n", "2:1: 7 cells", id="comma"
        ),
        pytest.param(",".join(script.PLAN_NEEDED).encode() + b'\n"a', "not CSV", id="quote left open"),
        pytest.param(b"PK\x03\x04\x00\x00", "needs Account", id="Excel's own format"),
        pytest.param(b"\0" * 3_000_000, "1:1: longer than", id="line without an end"),
        pytest.param(b"Account," + b"x" * 200_000, "field larger than field limit", id="endless cell"),
        pytest.param(
            b"\n\n" + ",".join(script.PLAN_NEEDED).encode() + b"\na\xff", ":4:1: not UTF-8", id="late"
        ),
    ],
)
def test_file_that_is_no_plan_is_refused(tmp_path, content, complaint):
    path = tmp_path / "plan.csv"
    path.write_bytes(content)
    with pytest.raises(script.UsageError, match=re.escape(complaint)):
        read(path)


def test_region_that_aws_does_not_have_is_refused_where_the_policy_covers_every_region(tmp_path):
    policy = script.check_policy(json.dumps(KEYS | {"regions": {"*": {}}}).encode(), "every.yaml")
    path = save_plan(tmp_path / "plan.csv", row(), row(Region="us-east-1.example.com"))
    with pytest.raises(script.PolicyError, match=r":3:1: 'us-east-1.example.com' is not a region"):
        script.read_plan(str(path), policy, script.PLAN_ACTIONS)


def test_plan_of_another_kind_is_not_complained_of_for_ever(tmp_path):
    path = save_plan(tmp_path / "plan.csv", *[row("i-1")] * 1500)
    with pytest.raises(script.PolicyError) as raised:
        read(path)
    assert len(raised.value.problems) == script.MAX_PLAN_PROBLEMS


def test_large_file_costs_no_memory(tmp_path):
    path = tmp_path / "plan.csv"
    with path.open("wb") as file:
        file.truncate(2**30)
    limit = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (600_000_000,) * 2)\n"
        f"sys.path.insert(0, {str(TAGCHECK.parent)!r}); import tagcheck; raise SystemExit(tagcheck.main())"
    )
    (tmp_path / "limited.py").write_text(limit)
    (tmp_path / "policy.yaml").write_text(json.dumps(KEYS))
    command = ("remediate", "--policy", "policy.yaml", "--plan", "plan.csv")
    err = run_tagcheck(*command, cwd=tmp_path, script=tmp_path / "limited.py", check=2).err
    assert "plan.csv:1:1: longer than 1,048,576 characters" in err


# ---- What becomes of a plan that was edited ----------------------------------------------------------------


def test_plan_is_replaced_only_while_it_is_as_it_was_written(aws, run, remediate, tmp_path):
    aws.launch(REGION, {"owner": "ann", "Environment": "dev"})
    run("scan", check=3)
    plan = tmp_path / "remediate-plan.csv"
    run("remediate")
    first = plan.read_bytes()
    run("remediate")
    assert plan.read_bytes() == first
    aws.launch(REGION, {"owner": "bob", "Environment": "dev"})
    run("scan", check=3)
    run("remediate", "--csv", "remediate-plan.csv")
    second = plan.read_bytes()
    assert second.count(b"\n") == first.count(b"\n") + 1

    lines = second.splitlines(keepends=True)
    for edited in (
        second.replace(b"ann,add", b"eve,add"),
        lines[0] + lines[2],
        b"".join(lines[:2]),
        second + b"\n",
        second.replace(b"\n", b"\r\n"),
        b"",
        "Büro".encode("latin-1"),
    ):
        plan.write_bytes(edited)
        for args in ((), ("--csv", "remediate-plan.csv")):
            code, err = remediate(*args)
            assert (code, "remediate-plan.csv exists" in err) == (5, True)
            assert all(words in err for words in ("--plan remediate-plan.csv", "--csv FILE"))
            assert plan.read_bytes() == edited
    assert sorted(path.name for path in tmp_path.iterdir() if "plan" in path.name) == [plan.name]
    run("remediate", "--csv", "other.csv")
    assert (tmp_path / "other.csv").read_bytes() == second


def test_memory_does_not_grow_with_a_plan(aws, run, remediate, tmp_path):
    aws.launch(REGION, {"owner": "ann", "Environment": "dev"})
    run("scan", check=3)
    peaks = []
    for number in (1000, 4000):
        with closing(sqlite3.connect(tmp_path / "instance_state.db")) as db, db:
            columns = [column for _, column, *_ in db.execute("PRAGMA table_info(findings)")][1:]
            values = ", ".join(columns).replace("instance_id", "printf('i-%017x', value)")
            numbers = json.dumps([*range(number)])
            db.execute(
                f"INSERT OR IGNORE INTO findings ({', '.join(columns)}) SELECT {values} FROM json_each(?), "
                "(SELECT * FROM findings LIMIT 1)",
                [numbers],
            )
        tracemalloc.start()
        assert remediate("--csv", f"{number}.csv", "--json", "out.json")[0] == 0
        assert remediate("--plan", f"{number}.csv", "--json", "out.json")[0] == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(json.loads((tmp_path / "out.json").read_bytes())["rows"]) == number + 1
    assert peaks[1] - peaks[0] < 3000 * 300  # bytes; a row in memory takes a thousand


def test_plan_edited_while_it_was_applied_is_left_alone(aws, run, tmp_path):
    [id_] = aws.launch(REGION, {"owner": "ann", "Environment": "dev"})
    run("scan", check=3)

    def edit(request):
        (tmp_path / "late.csv").write_text("edited")
        return False

    aws.fault("drop", action="CreateTags", when=edit)
    result = run("remediate", "--apply", "--csv", "late.csv", check=5)
    assert (tmp_path / "late.csv").read_text() == "edited"
    assert tags_of(aws, [id_])[0]["Owner"] == "ann"
    assert "Undo it with: tagcheck.py remediate --policy policy.yaml --undo remediate-undo-" in result.err


def test_value_is_replaced_only_with_its_current_one_at_hand(tmp_path):
    path = save_plan(tmp_path / "plan.csv", row(action="replace"), columns=script.PLAN_NEEDED)
    with pytest.raises(script.PolicyError, match="needs the column Current"):
        read(path)


# ---- What is written ---------------------------------------------------------------------------------------


@pytest.fixture
def run(aws, tmp_path):
    """Run a command against the server, with the policy and a state without findings."""
    (tmp_path / "policy.yaml").write_text(json.dumps(KEYS))
    script.check_state(tmp_path / "instance_state.db")

    def run(command, *args, check=0, **options):
        policy = () if "--policy" in args else ("--policy", "policy.yaml")
        named = [command, *policy, *args]
        return run_tagcheck(*named, cwd=tmp_path, env=aws.env, check=check, **options)

    return run


@pytest.fixture
def remediate(run, tmp_path, monkeypatch):
    """Run `remediate`, and give its exit code and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def remediate(*args):
        result = run("remediate", *args, check=None)
        return result.code, result.err

    return remediate


@pytest.fixture
def apply(run, tmp_path):
    """Apply a plan of these rows, and give what became of each, and the result."""

    def apply(*rows, args=(), **options):
        save_plan(tmp_path / "plan.csv", *rows)
        result = run("remediate", "--plan", "plan.csv", "--apply", "--json", "out.json", *args, **options)
        return result, results(result.json("out.json"))

    return apply


def results(report):
    return [entry["result"] for entry in report["rows"]]


def tags_of(aws, ids, region=REGION, account_id=None):
    found = aws.backstage("ec2", region, account_id).describe_instances(InstanceIds=ids)["Reservations"]
    tags = {
        instance["InstanceId"]: {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
        for reservation in found
        for instance in reservation["Instances"]
    }
    return [tags[id_] for id_ in ids]


def writes(aws):
    return [request for request in aws.requests if request.action in ("CreateTags", "DeleteTags")]


def changes(path="instance_state.db"):
    with closing(sqlite3.connect(path)) as db:
        return db.execute(
            "SELECT instance_id, tag_key, former, value, status FROM changes ORDER BY id"
        ).fetchall()


def test_from_the_scan_to_the_undo(aws, run, tmp_path):
    near, wrong = aws.launch(REGION, {"owner": "ann", "Name": "web"}) + aws.launch(
        REGION, {"Owner": "bob", "Environment": "prd"}
    )
    run("scan", check=3)
    planned = run("remediate", "--json", "out.json")
    assert "2 tags to write on 1 instance, 1 to review" in planned.out
    report = planned.json("out.json")
    assert (report["changed"], report["applied"], report["exit_code"]) == (False, False, 0)
    assert writes(aws) == []
    command = re.search("remediate --policy .*", planned.out)[0].split()

    plan = tmp_path / "remediate-plan.csv"
    plan.write_text(plan.read_text().replace(",review,", ",replace,"))
    done = run("remediate", *command[3:], "--json", "out.json")
    assert done.json("out.json")["changed"] is True
    assert "stay open until the next scan" in done.out
    assert tags_of(aws, [near, wrong]) == [
        {"owner": "ann", "Name": "web", "Owner": "ann", "Environment": "dev"},
        {"Owner": "bob", "Environment": "prod"},
    ]
    again = run("remediate", *command[3:], "--json", "out.json")
    assert again.json("out.json")["changed"] is False
    assert results(again.json("out.json")) == ["already_there"] * 3
    assert "owner=ann" in (story := run("explain", near).out)
    assert re.search(rf"Owner set to 'ann' \(it was missing\) by arn:aws:sts::{ACCOUNT_ID}:\S+: ", story)
    assert run("scan", "--json", "-").json("-")["summary"]["resolved"] == 2
    assert "0 tags to write on 0 instances\n" in run("remediate", "--csv", "later.csv").out

    undo = re.search(r"--undo (\S+) --apply", done.out)[1]
    assert stat.S_IMODE((tmp_path / undo).stat().st_mode) == 0o600
    aws.tag(REGION, [near], {"Owner": "eve"})
    back = run("remediate", "--undo", undo, "--apply", "--json", "out.json", check=4)
    assert results(back.json("out.json")).count("changed_since") == 1
    assert "it is 'eve' now" in back.out
    assert tags_of(aws, [near, wrong]) == [
        {"owner": "ann", "Name": "web", "Owner": "eve"},
        {"Owner": "bob", "Environment": "prd"},
    ]
    assert "Environment deleted (it was 'dev')" in run("explain", near).out
    assert [change[1:] for change in changes(tmp_path / "instance_state.db") if change[0] == wrong] == [
        ("Environment", "prd", "prod", "written"),
        ("Environment", "prod", "prd", "written"),
    ]


def test_undo_file_that_another_replaces_by_a_link_harms_nobody(tmp_path):
    (tmp_path / "victim").write_text("precious")
    first, second = (
        script.PlanRow(ACCOUNT_ID, REGION, f"i-0000000{n}", "", "Owner", "ann", script.Action.ADD, "", "", "")
        for n in (1, 2)
    )
    with closing(script.UndoFile(tmp_path / "undo.csv")) as undo:
        undo.add([first])
        (tmp_path / "undo.csv").rename(tmp_path / "moved.csv")
        (tmp_path / "undo.csv").symlink_to("victim")
        with pytest.raises(script.OutputError, match="another process replaced it"):
            undo.add([second])
    assert (tmp_path / "victim").read_text() == "precious"
    undone = read(tmp_path / "moved.csv", script.UNDO_ACTIONS)
    assert [each.instance_id for each in undone] == ["i-00000001"]


def plan_text(*rows):
    file = io.StringIO()
    script.write_plan(file, rows)
    return file.getvalue()


def test_a_plan_whose_rows_were_deleted_is_not_replaced(tmp_path):
    empty, plan = plan_text(), tmp_path / "plan.csv"
    plan.write_text(empty)
    assert read(plan) == []
    assert script.is_unedited_plan(io.BytesIO(empty.encode()))
    head = plan_text(
        script.PlanRow(ACCOUNT_ID, REGION, "i-0000000a", "", "Owner", "ann", script.Action.ADD, "", "", "")
    )
    assert not script.is_unedited_plan(io.BytesIO(head.partition("\n")[0].encode() + b"\n"))
    assert not script.is_unedited_plan(io.BytesIO(empty.encode().replace(b",,", b",x,", 1)))


def test_a_region_younger_than_the_script_can_be_planned(tmp_path):
    policy = script.check_policy(json.dumps(KEYS | {"regions": {"*": {}}}).encode(), "every.yaml")
    rows = list(
        script.plan(
            [finding({}, suggestion("ann", 1), region="xx-new-9", policy=policy)], policy, 0.95, Counter()
        )
    )
    assert {str(each.target) for each in rows} == {f"{ACCOUNT_ID} xx-new-9"}


def test_nothing_is_overwritten_unless_asked_for(aws, apply):
    tags = [{"Owner": "bob"}, {"Owner": " "}, {"Owner": "bob"}, {"Owner": "bob"}, {"Owner": "bob"}, {}]
    ids = [aws.launch(REGION, each)[0] for each in tags]
    actions = ("add", "add", "replace", "replace", "review", "skip")
    current = ("", "", "bob", "former", "bob", "")
    rows = [row(i, action=a, Current=c) for i, a, c in zip(ids, actions, current, strict=True)]
    result, became = apply(*rows, check=4)
    order = sorted(ids)
    assert dict(zip(order, became, strict=True)) == dict(
        zip(
            ids,
            ("changed_since", "written", "written", "changed_since", "not_asked", "not_asked"),
            strict=True,
        )
    )
    after = [each.get("Owner") for each in tags_of(aws, ids)]
    assert after == ["bob", "ann", "ann", "bob", "bob", None]
    recorded = {id_: former for id_, _, former, *_ in changes(result.cwd / "instance_state.db")}
    assert recorded == {ids[1]: " ", ids[2]: "bob"}
    assert f"{ids[0]} Owner: it is 'bob' now" in result.out


def test_one_that_is_gone_costs_the_others_nothing(aws, apply):
    ids = aws.launch(REGION, count=4)
    aws.terminate(REGION, ids[:1])
    aws.fault(
        *("error",),
        status=400,
        code="InvalidInstanceID.NotFound",
        message=f"The instance ID '{ids[1]}' does not exist",
        action="CreateTags",
        when=lambda request: ids[1] in numbered(request.params, "ResourceId"),
    )
    result, became = apply(*map(row, [*sorted(ids), "i-0123456789abcdef0"]), check=4)
    assert Counter(became) == {"gone": 3, "written": 2}
    assert [each.get("Owner") for each in tags_of(aws, ids)] == [None, None, "ann", "ann"]
    assert len(writes(aws)) == 2
    assert ids[1] in result.out
    assert len(changes(result.cwd / "instance_state.db")) == 2


def test_limit_of_tags_is_seen_before_the_call(aws, apply):
    many = {f"key-{number}": "x" for number in range(49)}
    full = aws.launch(REGION, many | {"Owner": ""})[0]
    nearly = aws.launch(REGION, many)[0]
    rows = [row(id_, tag, "dev") for id_ in (full, nearly) for tag in ("Owner", "Environment")]
    result, _ = apply(*rows, check=4)
    assert [len(each) for each in tags_of(aws, [full, nearly])] == [50, 50]
    assert result.out.count("it has 50 tags, which is EC2's limit") == 2
    assert len(writes(aws)) == 2


def test_what_undoes_a_tag_is_said_once_for_each_source(aws, run, tmp_path):
    web = aws.launch(REGION, {"owner": "ann", "aws:autoscaling:groupName": "web"}, count=3)
    aws.launch(REGION, {"owner": "ann", "Environment": "dev"})
    run("scan", check=3)
    sentence = (
        "Warning: 3 instances of Auto Scaling group web: the tag is lost when an instance is replaced; "
        "set it on web for new instances (PropagateAtLaunch)\n"
    )
    general = "Terraform and other infrastructure as code may revert these tags"
    for command in (("--json", "out.json"), ("--plan", "remediate-plan.csv", "--json", "out.json")):
        planned = run("remediate", *command)
        assert (planned.out.count(sentence), planned.out.count(general)) == (1, 1)
        [warning] = planned.json("out.json")["warnings"]
        assert (warning["account_id"], warning["region"], warning["instances"]) == (ACCOUNT_ID, REGION, 3)
        assert f"Warning: {warning['message']}\n" == sentence
    cells = {line["InstanceId"]: line["Warning"] for line in planned.csv("remediate-plan.csv")}
    assert {id_ for id_, warning in cells.items() if warning} == set(web)

    # A plan of the first edition has no such column; the tags that are read before they are written tell it.
    old = tmp_path / "old.csv"
    save_plan(old, *planned.csv("remediate-plan.csv"), columns=COLUMNS[:10])
    assert "Auto Scaling" not in old.read_text()
    done = run("remediate", "--plan", "old.csv", "--apply", "--json", "out.json")
    assert done.out.count(sentence) == 1
    assert [entry["instances"] for entry in done.json("out.json")["warnings"]] == [3]
    undo = re.search(r"--undo (\S+) --apply", done.out)[1]
    assert "Warning" not in run("remediate", "--undo", undo, "--apply").out


def deny(aws, *ids):
    return aws.fault(
        *("error",),
        status=403,
        code="UnauthorizedOperation",
        message="You are not authorized to perform this operation.",
        action="CreateTags",
        when=lambda request: not ids or set(ids) & {*numbered(request.params, "ResourceId")},
    )


def test_one_that_is_denied_costs_the_others_nothing(aws, apply):
    ids = aws.launch(REGION, count=8)
    deny(aws, ids[3])
    result, became = apply(*map(row, ids), check=4)
    assert Counter(became) == {"written": 7, "failed": 1}
    assert len(writes(aws)) == 7
    assert f"failed  {HERE} {ids[3]} Owner: UnauthorizedOperation" in result.out


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "UnsupportedOperation"),
        (403, "OperationNotPermitted"),
        (400, "TagPolicyViolation"),
        (400, "IncorrectState"),
    ],
)
def test_refusal_of_one_instance_is_its_own(aws, apply, status, code):
    ids = sorted(aws.launch(REGION, count=4))
    aws.fault(
        *("error",),
        status=status,
        code=code,
        message="The instance is managed by another service.",
        action="CreateTags",
        when=lambda request: ids[1] in numbered(request.params, "ResourceId"),
    )
    result, became = apply(*map(row, ids), check=4)
    assert became == ["written", "failed", "written", "written"]
    assert f"failed  {HERE} {ids[1]} Owner: {code}: " in result.out
    assert "managed by another service" in result.out
    [undo] = result.cwd.glob("remediate-undo-*.csv")
    assert [line["InstanceId"] for line in csv.DictReader(undo.open())] == [ids[0], *ids[2:]]
    assert stat.S_IMODE(undo.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("code", "of_instance"),
    [
        *(
            (code, False)
            for code in ("RequestLimitExceeded", "AuthFailure", "ExpiredToken", "InternalError", "503")
        ),
        *((code, False) for code in ("SSLError", "ConnectionError", "HTTPClientError", "ForeignAnswer")),
        *(
            (code, True)
            for code in ("UnauthorizedOperation", "InvalidParameterValue", "OperationNotPermitted")
        ),
        *((code, True) for code in ("IncorrectInstanceState", "TagLimitExceeded", "WhateverComesNext")),
    ],
)
def test_what_any_call_meets_ends_the_target(code, of_instance):
    assert script.is_of_instance(script.TargetError(code, "")) == of_instance


def test_all_denied_costs_few_calls(aws, apply, tmp_path):
    ids = aws.launch(REGION, count=8)
    deny(aws)
    _, became = apply(*map(row, ids), check=4, script=script_with(tmp_path, MAX_SPLITS=2))
    assert became == ["failed"] * 8
    assert len(writes(aws)) == 5
    assert list(tmp_path.glob("remediate-undo-*.csv")) == []
    assert changes(tmp_path / "instance_state.db") == []


def test_throttled_target_is_left_and_the_next_one_done(aws, apply, tmp_path):
    ids = aws.launch(REGION, count=3)
    [other] = aws.launch(OTHER_REGION)
    aws.fault(
        "error", status=503, code="RequestLimitExceeded", message="slow", action="CreateTags", region=REGION
    )
    impatient = script_with(tmp_path, SDK_ATTEMPTS=1, READ_BATCH=2, WRITE_BATCH=1)
    result, became = apply(
        *map(row, ids), row(other, tag="Team", value="a", Region=OTHER_REGION), check=4, script=impatient
    )
    assert became == ["written", "failed", "failed", "failed"]
    assert "not tried: RequestLimitExceeded" in result.out
    assert len(writes(aws)) == 2


def test_answer_that_was_lost_is_looked_for(aws, apply, tmp_path):
    ids = aws.launch(REGION, count=2)
    aws.fault("lost", action="CreateTags")
    impatient = script_with(tmp_path, SDK_ATTEMPTS=1, NETWORK_PAUSES=())
    result, became = apply(*map(row, ids), script=impatient)
    assert became == ["written"] * 2
    assert [change[2:] for change in changes(tmp_path / "instance_state.db")] == [
        (None, "ann", "written")
    ] * 2
    assert result.out.count("2 written, 0 already there, 0 not written") == 1


def test_answer_of_another_is_none(aws, apply):
    ids = aws.launch(REGION, count=2)
    aws.fault("body", body=b"<html><body>log in</body></html>", action="CreateTags")
    result, became = apply(*map(row, ids), check=4)
    assert became == ["failed"] * 2
    assert "ForeignAnswer" in result.out


ANSWER = (
    '<{0}Response xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>r</requestId>{1}</{0}Response>'
)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(ANSWER.format("CreateTags", "<return>false</return>"), id="it says false"),
        pytest.param(ANSWER.format("CreateTags", "<return>true</return>" * 2), id="it says so twice"),
        pytest.param(ANSWER.format("DescribeTags", "<return>true</return>"), id="another operation"),
        pytest.param("<html><requestId>r</requestId><return>true</return></html>", id="HTML"),
        pytest.param("<CreateTagsResponse><return>true</return>", id="cut short"),
    ],
)
def test_answer_that_does_not_say_it_is_done_writes_nothing(aws, apply, tmp_path, body):
    ids = aws.launch(REGION, count=2)
    aws.fault("body", body=body.encode(), action="CreateTags")
    impatient = script_with(tmp_path, NETWORK_PAUSES=())
    result, became = apply(*map(row, ids), check=4, script=impatient)
    assert became == ["failed"] * 2
    assert "Answer: " in result.out
    assert changes(tmp_path / "instance_state.db") == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("tagSet", "tags", id="tags in a list of another name"),
        pytest.param("value>", "val>", id="tags without a value"),
        pytest.param("<instanceId>i-", "<instanceId>i-0", id="another instance"),
    ],
)
def test_value_that_an_answer_hides_is_not_overwritten(aws, apply, old, new):
    ids = aws.launch(REGION, {"Owner": "precious"}, count=1)
    pair = old.encode(), new.encode()
    aws.fault("edit", action="DescribeInstances", edit=lambda xml: xml.replace(*pair))
    result, became = apply(*map(row, ids), check=4)
    assert became == ["failed"]
    assert "ForeignAnswer" in result.out
    assert writes(aws) == []


def test_what_is_not_known_is_said_to_be_so(aws, apply, run, tmp_path):
    ids = aws.launch(REGION, count=2)
    aws.fault("lost", action="CreateTags")
    aws.fault("drop", action="DescribeInstances", skip=1)
    impatient = script_with(tmp_path, SDK_ATTEMPTS=1, NETWORK_PAUSES=())
    result, became = apply(*map(row, ids), check=4, script=impatient)
    assert became == ["unknown"] * 2
    assert result.json("out.json")["changed"] is True
    assert [change[-1] for change in changes(tmp_path / "instance_state.db")] == ["intended"] * 2
    aws.clear_faults()
    _, became = apply(*map(row, ids))
    assert became == ["already_there"] * 2
    assert [change[-1] for change in changes(tmp_path / "instance_state.db")] == ["written"] * 2


# ---- What stops it before the first call -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        pytest.param(("--max-changes", "1"), "would write 2 tags, more than --max-changes 1", id="too many"),
        pytest.param(("--undo", "undo.csv"), "give one of them", id="plan and undo"),
        pytest.param(("--role", "writer"), "has no accounts", id="role without accounts"),
        pytest.param(("--csv", "plan.csv"), "the same file", id="plan over plan"),
    ],
)
def test_refused_before_the_first_call(aws, run, tmp_path, args, complaint):
    save_plan(tmp_path / "plan.csv", row(), row("i-00000002"))
    assert complaint in run("remediate", "--plan", "plan.csv", "--apply", *args, check=2).err
    assert aws.requests == []


def test_bad_rows_are_all_named_by_line(run, tmp_path, aws):
    save_plan(tmp_path / "plan.csv", row("i-1"), row(), row(action="x"))
    err = run("remediate", "--plan", "plan.csv", "--apply", check=2).err
    assert re.findall(r"^plan.csv:(\d):1: ", err, re.MULTILINE) == ["2", "4"]
    assert err.endswith("2 problems; nothing was written\n")


def test_row_of_another_account_is_refused(aws, run, tmp_path):
    save_plan(tmp_path / "plan.csv", row(Account=MEMBER))
    err = run("remediate", "--plan", "plan.csv", "--apply", check=2).err
    assert f"plan.csv:2:1: {MEMBER} is not the account of the credentials" in err
    assert aws.calls(service="ec2") == []


def test_without_a_scan_there_is_no_plan(run):
    assert "scan" in run("remediate", check=5).err


def test_undo_file_that_cannot_grow_stays_readable(tmp_path):
    rows = read(save_plan(tmp_path / "plan.csv", row(), row("i-00000002")))
    undo = script.UndoFile(tmp_path / "undo.csv")
    undo.add([script.replace(rows[0], former="bob")])
    size = undo.path.stat().st_size
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, former[1]))
    try:
        with pytest.raises(script.OutputError, match="undo file"):
            undo.add([rows[1]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert set(undo.rows) == {str(rows[0])}
    [left] = read(undo.path, script.UNDO_ACTIONS)
    assert (left.action, left.value, left.current) == ("restore", "bob", "ann")


def test_undo_file_that_cannot_be_made_stops_it_before_the_first_call(aws, run, tmp_path):
    ids = aws.launch(REGION, count=2)
    save_plan(tmp_path / "plan.csv", *map(row, ids))
    full = script_with(tmp_path)
    stop = "def add(*_): raise tagcheck.OutputError('no room')\ntagcheck.UndoFile.add = add\nraise SystemExit"
    full.write_text(full.read_text().replace("raise SystemExit", stop))
    result = run("remediate", "--plan", "plan.csv", "--apply", check=5, script=full, process=True)
    assert "no room" in result.err
    assert writes(aws) == []
    assert changes(tmp_path / "instance_state.db") == []


# ---- What an undo file may take back -----------------------------------------------------------------------


@pytest.fixture
def undo(aws, run, remediate, tmp_path):
    """Write Owner on two instances, and give their ids and the undo file of it."""
    ids = sorted([*aws.launch(REGION), *aws.launch(REGION, {"Owner": "bob"})])
    before = [tags.get("Owner") for tags in tags_of(aws, ids)]
    rows = [
        row(id_, action="replace" if former else "add", Current=former or "")
        for id_, former in zip(ids, before, strict=True)
    ]
    run("scan", "--quiet", check=None)
    save_plan(tmp_path / "plan.csv", *rows)
    assert remediate("--plan", "plan.csv", "--apply")[0] == 0
    [path] = tmp_path.glob("remediate-undo-*.csv")
    return ids, path.rename(tmp_path / "undo.csv")


@pytest.mark.parametrize("args", [pytest.param((), id="plan"), pytest.param(("--apply",), id="apply")])
@pytest.mark.parametrize(
    "cells",
    [
        pytest.param({"InstanceId": "i-0123456789abcdef0", "Action": "delete", "Value": ""}, id="instance"),
        pytest.param({"Region": OTHER_REGION}, id="region"),
        pytest.param({"Account": MEMBER}, id="account"),
        pytest.param({"Tag": "Environment"}, id="tag"),
        pytest.param({"Tag": "Name"}, id="tag that the policy does not ask for"),
        pytest.param({"Tag": "owner"}, id="tag in another spelling"),
        pytest.param({"Tag": "Owner\u200b"}, id="tag with what nobody sees"),
        pytest.param({"Value": "eve", "Action": "restore"}, id="value"),
        pytest.param({"Value": "bob\u200b", "Action": "restore"}, id="value with what nobody sees"),
        pytest.param({"Current": "eve"}, id="current value"),
        pytest.param({"Current": ""}, id="no current value"),
    ],
)
def test_undo_of_what_is_not_on_record_is_refused(aws, remediate, undo, cells, args):
    ids, path = undo
    with path.open(newline="") as file:
        good, other = csv.DictReader(file)
    save_plan(path, good, other | cells)
    aws.tag(REGION, ids, {"Name": "ann", "owner": "ann"})
    before = len(aws.requests)
    code, err = remediate("--undo", "undo.csv", *args)
    assert code == 2
    assert re.match(r"undo\.csv:3:1: .*the state instance_state\.db has no record that", err), err
    assert err.endswith("1 problem; nothing was written\n")
    assert len(aws.requests) == before


def test_undo_needs_the_state_of_its_run(aws, run, undo, tmp_path):
    calls = len(aws.requests)
    for args in ((), ("--apply",)):
        err = run("remediate", "--undo", "undo.csv", "--state", "other.db", *args, check=5).err
        assert "no state" in err
        assert not (tmp_path / "other.db").exists()
    (tmp_path / "policy.yaml").write_text(json.dumps(KEYS | {"name": "other"}))
    err = run("remediate", "--undo", "undo.csv", "--apply", check=2).err
    assert err.count("has no record that tagcheck set it to 'ann' under the policy other") == 2
    assert len(aws.requests) == calls


def test_undo_is_taken_back_and_repeated(aws, run, undo, tmp_path):
    ids, _ = undo

    def owners():
        return [tags.get("Owner") for tags in tags_of(aws, ids)]

    def revert(name):
        return run("remediate", "--undo", name, "--apply", "--json", "out.json").json("out.json")

    first = revert("undo.csv")
    formers = owners()
    assert sorted(map(str, formers)) == ["None", "bob"]
    # Again: the state knows that it is done, and nothing is called.
    calls = len(aws.requests)
    again = revert("undo.csv")
    assert (results(again), again["changed"]) == (["not_asked"] * 2, False)
    assert len(aws.requests) == calls
    # The undo of the undo, and of that.
    second = revert(first["undo_file"])
    assert owners() == ["ann", "ann"]
    revert(second["undo_file"])
    assert owners() == formers
    # What a person sets afterwards is not the tool's, though it is the same value.
    aws.tag(REGION, ids, {"Owner": "ann"})
    calls = len(writes(aws))
    revert("undo.csv")
    assert (owners(), len(writes(aws))) == (["ann", "ann"], calls)


def test_undo_of_a_run_that_was_killed(aws, run, tmp_path):
    """Undo file and state kept a row before its call; an empty tag counts as missing."""
    ids = [aws.launch(REGION, tags)[0] for tags in ({}, {"Owner": ""}, {"Owner": "  "}, {"Owner": "bob"})]
    rows = [row(id_) for id_ in ids[:3]] + [row(ids[3], action="replace", Current="bob")]
    save_plan(tmp_path / "plan.csv", *rows)
    run("scan", check=3)
    fault = aws.fault("slow", seconds=30, action="CreateTags")
    process = start(aws, tmp_path)
    wait_for_writes(aws, 1)
    process.kill()
    process.communicate(timeout=30)
    aws.clear_faults()
    assert fault.hits == 1
    assert {change[-1] for change in changes(tmp_path / "instance_state.db")} == {"intended"}
    aws.tag(REGION, ids, {"Owner": "ann"})  # as if it had been carried out
    [undo] = tmp_path.glob("remediate-undo-*.csv")
    for _ in range(2):
        run("remediate", "--undo", undo.name, "--apply")
        assert [tags.get("Owner") for tags in tags_of(aws, ids)] == [None, "", "  ", "bob"]


def test_undo_of_values_that_look_like_formulas_and_escapes(aws, apply, run, tmp_path):
    formers = ["=1+1", "'=1", r"\x1b[31m", 'a"b,c;d', " x "]
    ids = [aws.launch(REGION, {"Owner": former})[0] for former in formers]
    rows = [
        row(id_, action="replace", value="-ann", Current=script.csv_cell(former))
        for id_, former in zip(ids, formers, strict=True)
    ]
    _, became = apply(*[line | {"Value": script.csv_cell("-ann")} for line in rows])
    assert became == ["written"] * 5
    [undo] = tmp_path.glob("remediate-undo-*.csv")
    run("remediate", "--undo", undo.name, "--apply")
    assert [tags["Owner"] for tags in tags_of(aws, ids)] == formers


def test_undo_file_of_a_run_with_refusals_has_only_what_was_written(aws, apply, run, tmp_path):
    ids = sorted(aws.launch(REGION, count=3))
    deny(aws, ids[1])
    result, became = apply(*map(row, ids), check=4)
    assert became == ["written", "failed", "written"]
    aws.clear_faults()
    undo = result.json("out.json")["undo_file"]
    assert [line["InstanceId"] for line in result.csv(undo)] == [ids[0], ids[2]]
    run("remediate", "--undo", undo, "--apply")
    assert tags_of(aws, ids) == [{}] * 3


# ---- The way back is told, however it ends -----------------------------------------------------------------


def way_back(err):
    """Find the undo command that was printed."""
    [line] = re.findall(r"^Undo it with: tagcheck\.py (.*)$", err, re.MULTILINE)
    command = shlex.split(line)
    assert command[0] == "remediate"
    assert command[-1] == "--apply"
    return command


@pytest.mark.parametrize("args", [(), ("--quiet",)])
def test_reports_that_cannot_be_written_do_not_hide_the_way_back(aws, run, tmp_path, args):
    [id_] = aws.launch(REGION)
    (tmp_path / "a b").mkdir()
    run("scan", "--state", "a b/state.db", check=3)
    save_plan(tmp_path / "plan.csv", row(id_))
    (tmp_path / "reports").mkdir()

    def remove(request):
        shutil.rmtree(tmp_path / "reports", ignore_errors=True)
        return False

    aws.fault("drop", action="CreateTags", when=remove)
    command = ("--plan", "plan.csv", "--apply", "--state", "a b/state.db", "--json", "reports/out.json")
    result = run("remediate", *command, *args, check=5)
    assert "--json reports/out.json cannot be written" in result.err
    assert tags_of(aws, [id_]) == [{"Owner": "ann"}]
    aws.clear_faults()
    back = way_back(result.err)
    run(*back)
    assert tags_of(aws, [id_]) == [{}]


def test_full_standard_output_does_not_hide_the_way_back(aws, run, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    [id_] = aws.launch(REGION)
    run("scan", check=3)
    save_plan(tmp_path / "plan.csv", row(id_))
    command = [
        sys.executable,
        TAGCHECK,
        "remediate",
        "--policy",
        "policy.yaml",
        "--plan",
        "plan.csv",
        "--apply",
    ]
    with open("/dev/full", "w") as full:
        env = clean_environment(tmp_path) | aws.env
        done = subprocess.run(
            command, cwd=tmp_path, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 5
    run(*way_back(done.stderr))
    assert tags_of(aws, [id_]) == [{}]


def test_undo_file_that_vanishes_ends_the_run_and_the_rest_is_not_written(aws, run, tmp_path):
    ids = sorted(aws.launch(REGION, count=4))
    run("scan", check=3)
    save_plan(tmp_path / "plan.csv", *map(row, ids))

    def remove(request):
        for path in tmp_path.glob("remediate-undo-*.csv"):
            path.unlink()
        return False

    aws.fault("drop", action="CreateTags", when=remove)
    small = script_with(tmp_path, READ_BATCH=2)
    err = run("remediate", "--plan", "plan.csv", "--apply", check=5, script=small).err
    assert "cannot be written: No such file" in err
    assert [tags.get("Owner") for tags in tags_of(aws, ids)] == ["ann", "ann", None, None]
    assert len(changes(tmp_path / "instance_state.db")) == 2


def test_state_that_vanishes_ends_the_run_with_the_way_back(aws, run, tmp_path):
    ids = sorted(aws.launch(REGION, count=4))
    run("scan", check=3)
    save_plan(tmp_path / "plan.csv", *map(row, ids))

    def remove(request):
        (tmp_path / "instance_state.db").unlink(missing_ok=True)
        return False

    aws.fault("drop", action="CreateTags", when=remove)
    small = script_with(tmp_path, READ_BATCH=2)
    err = run("remediate", "--plan", "plan.csv", "--apply", check=5, script=small).err
    assert "instance_state.db" in err
    way_back(err)
    assert [tags.get("Owner") for tags in tags_of(aws, ids)] == ["ann", "ann", None, None]


def test_next_command_keeps_the_scope_of_this_one(aws, run, tmp_path):
    [here], [there] = aws.launch(REGION), aws.launch(OTHER_REGION)
    run("scan", check=3)
    save_plan(tmp_path / "plan.csv", row(here), row(there, tag="Team", value="a", Region=OTHER_REGION))
    planned = run("remediate", "--plan", "plan.csv", "--region", REGION)
    [command] = re.findall(r"Apply it with: tagcheck\.py (.*)", planned.out)
    run(*shlex.split(command))
    assert [len(tags_of(aws, [here])[0]), len(tags_of(aws, [there], OTHER_REGION)[0])] == [1, 0]


# ---- Interrupted, and started again ------------------------------------------------------------------------


def start(aws, tmp_path, *args, script=TAGCHECK):
    command = [
        sys.executable,
        script,
        "remediate",
        "--policy",
        "policy.yaml",
        "--plan",
        "plan.csv",
        "--apply",
    ]
    env = clean_environment(tmp_path) | aws.env
    return subprocess.Popen([*command, *args], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)


def wait_for_writes(aws, number):
    end = time.monotonic() + 30
    while len(writes(aws)) < number:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_the_middle_and_started_again(aws, apply, tmp_path, run, number):
    ids = sorted(aws.launch(REGION, count=6))
    small = script_with(tmp_path, READ_BATCH=2)
    save_plan(tmp_path / "plan.csv", *map(row, ids))
    aws.fault("slow", seconds=30, action="CreateTags", skip=1)
    process = start(aws, tmp_path, script=small)
    wait_for_writes(aws, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    assert ("what was written is recorded" in err) == (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        assert way_back(err)[:4] == ["remediate", "--policy", "policy.yaml", "--undo"]
    aws.clear_faults()
    # Of the batch that was under way nothing is known; what was not begun is known not to be written.
    left = ["written"] * 2 + ["intended"] * (2 if number == signal.SIGTERM else 4)
    assert [change[-1] for change in changes(tmp_path / "instance_state.db")] == left
    [undo] = tmp_path.glob("remediate-undo-*.csv")
    assert [line["InstanceId"] for line in csv.DictReader(undo.open())] == ids[:4]

    done = writes(aws)
    _, became = apply(*map(row, ids), script=small)
    assert became == ["already_there"] * 2 + ["written"] * 4
    written = [id_ for request in writes(aws)[len(done) :] for id_ in numbered(request.params, "ResourceId")]
    assert sorted(written) == ids[2:]
    assert sorted(changes(tmp_path / "instance_state.db")) == [
        (id_, "Owner", None, "ann", "written") for id_ in ids
    ]


def test_of_runs_that_were_killed_the_last_one_did_it(tmp_path):
    state = script.LocalState(tmp_path / "state.db")
    state.check()
    what = ("test", ACCOUNT_ID, REGION, "i-00000001", "Owner", None, "ann", "why", "who")
    runs = [
        script.Change(name, *what, f"2026-02-2{day}T10:30:45Z", "intended") for day, name in enumerate("abc")
    ]
    for change in runs:
        script.record_changes(state, [(change, script.Result.PLANNED)])
    script.record_changes(state, [(runs[-1], script.Result.ALREADY_THERE)])
    with closing(sqlite3.connect(state.path)) as db:
        [left] = script.fetch_changes(db, "test", "i-00000001")
    assert (left.change_id, left.status) == ("b", "written")


# ---- Accounts, and a state in S3 ---------------------------------------------------------------------------


def test_role_for_writing_and_account_that_is_denied(aws, run, tmp_path):
    keys = KEYS | {"accounts": {"ids": [ACCOUNT_ID, MEMBER, "111122223333"], "role_name": "reader"}}
    (tmp_path / "policy.yaml").write_text(json.dumps(keys))
    [mine] = aws.launch(REGION)
    [theirs] = aws.launch(REGION, account_id=MEMBER)
    aws.denied_roles.add("111122223333")
    rows = [row(mine), row(theirs, Account=MEMBER), row(Account="111122223333")]
    save_plan(tmp_path / "plan.csv", *rows)
    args = ("--plan", "plan.csv", "--apply", "--role", "writer", "--json", "out.json")
    report = run("remediate", *args, check=4).json("out.json")
    assert {entry["account_id"]: entry["result"] for entry in report["rows"]} == {
        ACCOUNT_ID: "written",
        MEMBER: "written",
        "111122223333": "failed",
    }
    assert tags_of(aws, [theirs], account_id=MEMBER) == [{"Owner": "ann"}]
    [policy] = {request.params["Policy"] for request in aws.calls("AssumeRole")}
    assert json.loads(policy)["Statement"][0]["Action"] == [
        *("ec2:DescribeInstances", "ec2:CreateTags", "ec2:DeleteTags")
    ]
    assert {request.params["RoleArn"].rpartition("/")[2] for request in aws.calls("AssumeRole")} == {"writer"}


@pytest.mark.parametrize("state", ["SUSPENDED", "PENDING_CLOSURE", None])
def test_account_that_is_not_active_in_the_organization_is_refused_before_a_role_is_assumed(
    aws, run, tmp_path, state
):
    keys = KEYS | {"accounts": {"organization": True, "role_name": "reader"}}
    (tmp_path / "policy.yaml").write_text(json.dumps(keys))
    accounts = [{"Id": ACCOUNT_ID, "State": "ACTIVE"}, {"Id": "111122223333", "State": "ACTIVE"}]
    accounts += [{"Id": MEMBER, "State": state}] if state else []
    body = json.dumps({"Accounts": accounts}).encode()
    aws.fault("body", body=body, content_type="application/x-amz-json-1.1", action="ListAccounts")
    [mine] = aws.launch(REGION)
    save_plan(tmp_path / "plan.csv", row(mine), row(Account=MEMBER), row(Account="111122223333"))
    err = run("remediate", "--plan", "plan.csv", "--apply", check=2).err
    assert err.startswith(f"plan.csv:3:1: the account {MEMBER} is {state or 'missing'} in the organization: ")
    assert err.endswith("1 problem; nothing was written\n")
    assert {request.action for request in aws.requests} == {"GetCallerIdentity", "ListAccounts"}
    only = ("--account", ACCOUNT_ID, "--account", "111122223333", "--json", "out.json")
    done = run("remediate", "--plan", "plan.csv", "--apply", *only, check=4)
    assert sorted(results(done.json("out.json"))) == ["gone", "written"]


def test_state_in_s3_keeps_the_record(aws, run, tmp_path):
    s3 = aws.backstage("s3", REGION)
    s3.create_bucket(Bucket="bucket")
    s3.upload_file(str(tmp_path / "instance_state.db"), "bucket", "state.db")
    ids = sorted(aws.launch(REGION, count=2))
    save_plan(tmp_path / "plan.csv", *map(row, ids))
    aws.fault("lost", action="PutObject", times=1)  # a put is repeated, and nothing is recorded twice
    run("remediate", "--plan", "plan.csv", "--apply", "--state", "s3://bucket/state.db")
    s3.download_file("bucket", "state.db", str(tmp_path / "copy.db"))
    assert changes(tmp_path / "copy.db") == [(id_, "Owner", None, "ann", "written") for id_ in ids]
    assert len(list(tmp_path.glob("remediate-undo-*.csv"))) == 1


def test_undo_file_is_beside_the_state_that_a_link_leads_to(aws, apply, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "instance_state.db").rename(tmp_path / "kept" / "state.db")
    (tmp_path / "link.db").symlink_to("kept/state.db")
    result, became = apply(row(*aws.launch(REGION)), args=("--state", "link.db"))
    assert became == ["written"]
    [undo] = tmp_path.glob("**/remediate-undo-*.csv")
    assert (undo.parent, result.json("out.json")["undo_file"]) == (tmp_path / "kept", str(undo))


# ---- How many calls, and how fast --------------------------------------------------------------------------


def test_calls_are_few_and_paced(aws, apply, tmp_path):
    ids = aws.launch(REGION, count=30)
    rows = [row(id_, value="ann" if number % 2 else "bob") for number, id_ in enumerate(ids)]
    _, became = apply(*rows, script=script_with(tmp_path, READ_BATCH=10, WRITE_BATCH=2))
    assert became == ["written"] * 30
    calls = aws.calls(service="ec2")
    assert Counter(call.action for call in calls) == {"DescribeInstances": 3, "CreateTags": 16}
    times = [call.received_at for call in calls]
    assert all(later - first >= 1 for first, later in zip(times, times[10:], strict=False))


def test_batches_are_as_ec2_takes_them():
    assert script.FILTER_VALUES <= 200
    assert script.WRITE_BATCH <= script.READ_BATCH <= 1000
    assert 1 / script.READ_BATCH + 1 / min(script.WRITE_BATCH, 100) <= 1.2 / 100
    assert 10 * script.CALL_INTERVAL > 1
