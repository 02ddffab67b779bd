"""`init`: the policy that a person would have written for a fleet, or the equal of AWS's own rules."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from aws_server import ACCOUNT_ID, AwsServer
from builders import fleet, instance, instance_id, reservation, save, save_fleet
from conftest import TAGCHECK, Result, clean_environment

import tagcheck as script

Tagcheck = Callable[..., Result]
FLEET = ("--instances", "fleet.json")


def people(count: int, *, first: int = 1, **tags: str) -> list[dict[str, Any]]:
    """Make instances with the same tags."""
    return [instance(number, tags) for number in range(first, first + count)]


def small_fleet() -> list[dict[str, Any]]:
    """Make a fleet as people leave it."""
    tags = [{"Owner": f"team-{team}", "Environment": "prod"} for team in ("web", "data") for _ in range(8)]
    for number, each in enumerate(tags):
        each |= {"Name": f"web-{number}", "aws:autoscaling:groupName": "web-asg", "cost centre": "x"}
        if number % 5:
            each["CostCenter"] = f"CC-{2000 + number}"
    for number in (1, 2, 3, 4):
        tags[number]["Environment"] = "dev"
    tags[5]["Environment"], tags[6]["Environment"] = "prdo", "TBD"
    tags[7]["owner"] = tags[7].pop("Owner")
    tags[8]["Owner"] = ""
    tags[9] |= {"Rare": "1"}
    places = ["eu-west-1"] * 10 + ["us-east-1"] * 6
    items = [
        instance(number, each, region=region)
        for number, (each, region) in enumerate(zip(tags, places, strict=True), 1)
    ]
    eks = {"Operator": {"Managed": True, "Principal": "eks.amazonaws.com"}}
    return [*items, instance(90, {}, **eks), instance(91, {"Owner": "x"}, state="terminated")]


SMALL_POLICY = """\
# Made by `tagcheck.py init` from 17 instances in 2 regions of 1 account; the comments say why.
# Change what is wrong, then check it with validate and scan --dry-run.
# A scan with it finds now: 7 of 17 instances with violations, 1 exempted
#   Environment: 1 empty, 1 with another value
#   Owner: 1 missing, 1 empty
#   CostCenter: 4 missing
# Left out, as tools write them: aws:autoscaling:groupName (AWS, 16)

version: 1
name: tags
required_tags:
  - cost centre                 # 16 of 16 instances; always x
  - key: Environment            # 16 of 16 instances, 1 of them empty or a placeholder
    # left out as probable typing mistakes: prdo (1, for prod?)
    values:
      - prod                    # 10 instances
      - dev                     # 4 instances
  - Name                        # 16 of 16 instances
  - key: Owner                  # 16 of 16 instances, 1 of them empty or a placeholder
    # also spelled owner (1): a scan reports this, and suggests the value
    values:
      - team-web                # 8 instances
      - team-data               # 7 instances
  - key: CostCenter             # 12 of 16 instances
    pattern: 'CC-[0-9]{4}'      # 12 of 12 values, such as CC-2001
placeholder_values: [tbd]       # count as empty: tbd (1)
regions:
  eu-west-1:                    # 10 instances
  us-east-1:                    # 7 instances
  "*":                          # every other enabled region
exemptions:
  - reason: an AWS service operates them  # 1 instance
    managed_by: eks.amazonaws.com
"""


def test_the_policy_is_what_a_person_would_have_written(tagcheck: Tagcheck, tmp_path: Path) -> None:
    save_fleet(tmp_path, *small_fleet())
    result = tagcheck("init", *FLEET, check=0)
    assert (tmp_path / "policy.yaml").read_text() == SMALL_POLICY
    assert result.err == ""
    assert result.lines == [
        "Wrote policy.yaml: 5 rules for *, eu-west-1, us-east-1",
        "A scan with it finds now: 7 of 17 instances with violations, 1 exempted",
        "Read it, and change what is wrong. "
        "Next: tagcheck.py scan --policy policy.yaml --instances fleet.json --dry-run",
    ]


def test_it_validates_and_a_scan_finds_what_it_says(tagcheck: Tagcheck, tmp_path: Path) -> None:
    save_fleet(tmp_path, *small_fleet())
    [*_, following] = tagcheck("init", *FLEET, check=0).lines
    tagcheck("validate", "policy.yaml", check=0)
    command = following.partition("Next: tagcheck.py ")[2].split()
    assert "7 findings: 7 NEW" in tagcheck(*command, check=3).out
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy.read_text().replace("- dev ", "- prdo ").replace("name: tags", "name: ours"))
    assert "ours" in tagcheck("scan", "--policy", "policy.yaml", *FLEET, check=3).out


def test_the_order_of_the_answer_changes_nothing(tagcheck: Tagcheck, tmp_path: Path) -> None:
    items = small_fleet()
    for seed in range(3):
        random.Random(seed).shuffle(items)
        for item in items:
            random.Random(seed).shuffle(item["Tags"])
        save_fleet(tmp_path, *items)
        assert tagcheck("init", *FLEET, "--output", "-", check=0).out == SMALL_POLICY


# ---- Keys, values and patterns -----------------------------------------------------------------------------


def made(tagcheck: Tagcheck, path: Path, *items: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Make the policy of a fleet; returns its text, and its rules by key."""
    save_fleet(path, *items)
    text = tagcheck("init", *FLEET, "--output", "-", check=0).out
    script.check_policy(text.encode(), "policy.yaml")
    rules = yaml.safe_load(text)["required_tags"]
    return text, {rule if isinstance(rule, str) else rule["key"]: rule for rule in rules}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        pytest.param(["CC-1000"] * 9 + ["CC-2000"] * 9, {"pattern": "CC-[0-9]{4}"}, id="a code, though few"),
        pytest.param(["123456789012", "210987654321"] * 3, {"pattern": "[0-9]{12}"}, id="accounts"),
        pytest.param(
            [f"web-{n}" for n in range(1, 30)], {"pattern": "web-[0-9]+"}, id="digits of any length"
        ),
        pytest.param(
            [f"{word}-{word}-{word}-{n:03}" for word in ("web", "db", "app") for n in range(9)],
            {"pattern": "[a-z]{1,20}-[a-z]{1,20}-[a-z]{1,20}-[0-9]{3}"},
            id="words and a number",
        ),
        pytest.param(
            ["ann@example.com", "bob@example.com"] * 4, {"pattern": r"[^@ ]+@example\.com"}, id="one domain"
        ),
        pytest.param(
            ["ann@a.example", "bob@b.example"] * 4,
            {"pattern": "[^@ ]{1,64}@[A-Za-z0-9.-]{1,80}"},
            id="email addresses",
        ),
        pytest.param([f"word{chr(97 + n)}" for n in range(20)], {}, id="any words"),
        pytest.param([f"a\n{n:03}" for n in range(20)], {}, id="a line break in a shape"),
        pytest.param([f"a\u200b{n:03}" for n in range(20)], {}, id="an invisible character in a shape"),
        pytest.param(["a", "b"] * 9, {"values": ["a", "b"]}, id="few values"),
        pytest.param(
            [f"team {chr(97 + n % 13)}" for n in range(60)], {"pattern": "team [a-z]+"}, id="13 values"
        ),
        pytest.param(["only"] * 9, {}, id="one value"),
        pytest.param(["de"] * 9 + ["fr"] * 9 + ["den"], {"values": ["de", "fr", "den"]}, id="short words"),
        pytest.param(
            ["prod"] * 8 + ["Prod"] * 4 + ["dev"] * 6,
            {"values": ["prod", "dev"], "ignore_case": True},
            id="in any case",
        ),
        pytest.param(
            ["web1", "web2"] * 9 + ["web3"], {"values": ["web1", "web2", "web3"]}, id="not a mistake"
        ),
        pytest.param(
            ["team-a"] * 40 + ["team-b"] * 40 + ["team-c"],
            {"values": ["team-a", "team-b", "team-c"]},
            id="rare, and not a mistake",
        ),
        pytest.param(["true"] * 6 + ["no"] * 6, {"values": ["no", "true"]}, id="words of YAML"),
        pytest.param(["", "x", "tbd", " "] * 3, {"allow_empty": True}, id="mostly empty"),
    ],
)
def test_what_a_rule_asks_for(tagcheck: Tagcheck, tmp_path: Path, values: list[str], wanted: Any) -> None:
    items = [instance(number, {"Key": value}) for number, value in enumerate(values)]
    text, rules = made(tagcheck, tmp_path, *items)
    assert rules["Key"] == ({"key": "Key"} | wanted if wanted else "Key"), text


@pytest.mark.parametrize(
    ("values", "comment"),
    [
        (["prod"] * 40 + ["pord"], "left out as probable typing mistakes: pord (1, for prod?)"),
        (["data team"] * 40 + ["data-team"], "mistakes: data-team (1, for 'data team'?)"),
        (["a-b"] * 60 + ["other"], "other                   # 1 instance: rare, is it meant?"),
        (["CC-1000", "CC-1001"] * 20 + ["1001"], "not of this form: 1001 (1)"),
        (["a"] * 400 + [f"v{n * 'x'}" for n in range(12)] + ["b"] * 9, "left out as rare: v (1), vx (1), "),
        (["a", "b"] * 4 + ["N/A"], "count as empty: n/a (1)"),
        (["a\u200b", "b"] * 4, "# 8 of 8 instances"),
    ],
)
def test_what_a_comment_says(tagcheck: Tagcheck, tmp_path: Path, values: list[str], comment: str) -> None:
    items = [instance(number, {"Key": value}) for number, value in enumerate(values)]
    assert comment in made(tagcheck, tmp_path, *items)[0]


def test_half_of_the_instances_decide(tagcheck: Tagcheck, tmp_path: Path) -> None:
    text, rules = made(tagcheck, tmp_path, *people(3, Half="a"), *people(3, first=4, Less="a"), instance(7))
    assert "No tag is on half of the instances: required are the most common ones" in text
    assert set(rules) == {"Half", "Less"}
    _, rules = made(tagcheck, tmp_path, *people(3, Half="a"), *people(2, first=4, Less="a"), instance(7))
    assert set(rules) == {"Half"}


def test_an_instance_with_two_spellings_counts_once(tagcheck: Tagcheck, tmp_path: Path) -> None:
    items = [*people(3, Owner="a", owner="b"), *people(5, first=4)]
    assert "No tag is on half" in made(tagcheck, tmp_path, *items)[0]


@pytest.mark.parametrize(
    "key",
    [
        *(
            "AWS:x",
            "eks:cluster-name",
            "kubernetes.io/cluster/a",
            "node.kubernetes.io/x",
            "karpenter.sh/nodepool",
        ),
        *("k8s.io/cluster-autoscaler/enabled", "karpenter.k8s.aws/ec2nodeclass", "AmazonECSManaged"),
        *("elasticmapreduce:x", "elasticbeanstalk:environment-name", "KubernetesCluster", "spotinst:x"),
        *("red-hat-managed", "maid_status"),
    ],
)
def test_keys_of_tools_are_left_out(tagcheck: Tagcheck, tmp_path: Path, key: str) -> None:
    text, rules = made(tagcheck, tmp_path, *(instance(n, {key: "x", "Owner": "a"}) for n in range(4)))
    assert set(rules) == {"Owner"}
    assert re.search(rf"^# Left out, as tools write them: {re.escape(key)} \(", text, re.MULTILINE)


@pytest.mark.parametrize("key", ["\u202eOwner", " Owner", "a\tb", "k" * 128, "No\u00a0break"])
def test_keys_that_a_policy_cannot_hold_are_left_out(tagcheck: Tagcheck, tmp_path: Path, key: str) -> None:
    text, rules = made(tagcheck, tmp_path, *(instance(n, {key: "x", "Other": "a"}) for n in range(4)))
    assert set(rules) == {"Other"}
    assert "# Left out, as a policy cannot require such keys: " in text
    assert "Owner" in made(tagcheck, tmp_path, *(instance(n, {key: "x"}) for n in range(4)))[1]


# ---- Hostile tags ------------------------------------------------------------------------------------------

PIECES = [
    *(": ", " #", "#", "'", '"', "\n", "\r\n", "\u2028", "\u0085", "*", "&", "!", "%", "@", "`", "- ", "-"),
    *(
        "true",
        "null",
        "~",
        "0123",
        "2027-01-31",
        "\U0001f600",
        "\u202e",
        "\u200b",
        "\ufeff",
        "\x00",
        "\x1b[2J",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        ",",
        "|",
        ">",
        "?",
        "\\",
        "<<",
        "=",
        "\t",
        " ",
        "a",
        "B",
        "é",
        "\ue000",
        "yes",
        "1e3",
    ),
    *(
        "---",
        "...",
        "%YAML",
        "!!python/name:os.system",
        "${HOME}",
        "$(id)",
        "x" * 90,
        "\ufffe",
        "\u201c",
        "\u2800",
        "\ufe0f",
    ),
]


def test_hostile_tags_cannot_break_the_policy(tagcheck: Tagcheck, tmp_path: Path) -> None:
    generator = random.Random(1)

    def text(most: int) -> str:
        return "".join(generator.choice(PIECES) for _ in range(generator.randint(1, most)))[:200]

    for _ in range(60):
        keys, values = [text(3) for _ in range(6)], [text(4) for _ in range(3)]
        tags = [{key: generator.choice(values) for key in keys} for _ in range(generator.choice([3, 24]))]
        service = {"Operator": {"Managed": True, "Principal": text(3)}}
        items = [instance(number, each) for number, each in enumerate(tags)]
        save_fleet(tmp_path, *items, instance(99, {}, **service))
        out = tagcheck("init", *FLEET, "--output", "-", check=0).out
        policy = script.check_policy(out.encode(), "policy.yaml")
        rules = policy.rules("us-east-1")
        assert {rule.key for rule in rules} <= {*keys, "Owner"}
        assert {value for rule in rules for value in rule.values} <= {*values}
        assert policy.exemptions[0].reason == "an AWS service operates them"
        assert all(script.is_printable(line) for line in out.splitlines())
        # Every other reader of YAML sees the same texts.
        read = yaml.safe_load(out)
        assert [each if isinstance(each, str) else each["key"] for each in read["required_tags"]] == [
            rule.key for rule in rules
        ]
        assert [each.get("values", []) for each in read["required_tags"] if isinstance(each, dict)] == [
            [*rule.values] for rule in rules if rule.values or rule.pattern or rule.allow_empty
        ]


def test_yaml_text_is_read_as_the_text_that_it_was() -> None:
    generator = random.Random(2)
    texts = ["".join(generator.choices(PIECES, k=generator.randint(1, 4))) for _ in range(3000)]
    for text in filter(script.is_printable, [*PIECES, *texts, "a b", "n/a", "O'Brien", "C:\\x", "Off", "e1"]):
        shown = script.yaml_text(text)
        document = f"{shown}: [{shown}, {{x: {shown}}}]  # c\nlist:\n  - {shown}  # c\n"
        wanted = {text: [text, {"x": text}], "list": [text]}
        assert yaml.safe_load(document) == wanted, document
        read = script.YamlDocument(document)
        assert (read.value, read.problems) == (wanted, []), document


# ---- Files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "pipe"])
def test_what_exists_is_not_touched(tagcheck: Tagcheck, tmp_path: Path, kind: str) -> None:
    save_fleet(tmp_path, *small_fleet())
    other, output = tmp_path / "other.yaml", tmp_path / "policy.yaml"
    if kind == "file":
        output.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(output)
    else:
        output.symlink_to(other)
        if kind == "link":
            other.write_text("mine")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = tagcheck("init", *FLEET, check=2)
    assert "--output policy.yaml exists, and is not replaced: name a new file, or move it away" in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert kind != "file" or output.read_text() == "mine"
    assert kind != "link" or other.read_text() == "mine"


@contextmanager
def waiting(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], IO[str]]]:
    """Start the script, and yield it with the pipe of the fleet that it waits for."""
    pipe = directory / "fleet"
    os.mkfifo(pipe)
    command = [sys.executable, str(TAGCHECK), "init", "--instances", "fleet"]
    options: Any = {"cwd": directory, "env": clean_environment(directory), "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **options) as run, pipe.open("w") as file:  # as soon as it reads
        pipe.unlink()
        yield run, file


def test_a_file_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    with waiting(tmp_path) as (run, file):
        (tmp_path / "policy.yaml").write_text("mine")
        file.write(json.dumps(fleet(*small_fleet())))
        file.close()
        _, err = run.communicate()
    assert run.returncode == 2
    assert b"policy.yaml exists, and is not replaced" in err
    assert [path.name for path in tmp_path.iterdir()] == ["policy.yaml"]
    assert (tmp_path / "policy.yaml").read_text() == "mine"


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    with waiting(tmp_path) as (run, _):
        run.send_signal(signal.SIGINT)
        _, err = run.communicate()
    assert (run.returncode, [*tmp_path.iterdir()]) == (130, [])
    assert b"interrupted" in err


@pytest.mark.parametrize("output", ["none/policy.yaml", "."])
def test_an_impossible_output_is_reported_before_anything_is_read(tagcheck: Tagcheck, output: str) -> None:
    result = tagcheck("init", "--instances", "missing.json", "--output", output)
    assert result.code in (2, 5)
    assert f"--output {output}" in result.err


def test_the_policy_is_an_ordinary_file(tagcheck: Tagcheck, tmp_path: Path) -> None:
    save_fleet(tmp_path, *small_fleet())
    tagcheck("init", *FLEET, "--name", "O'Brien: ours", "--output", "ours.yaml", "--quiet", check=0)
    assert oct((tmp_path / "ours.yaml").stat().st_mode & 0o777) == oct(0o666 & ~umask())
    assert script.load_policy(str(tmp_path / "ours.yaml")).name == "O'Brien: ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fleet.json", "ours.yaml"]


def umask() -> int:
    """Give the mask of this process."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@pytest.mark.parametrize(
    ("items", "args"),
    [
        pytest.param([], (), id="empty"),
        pytest.param([instance(1, {"Owner": "a"}, state="terminated")], (), id="terminated"),
        pytest.param([instance(1, {"Owner": "a"}, Operator={"Managed": True})], (), id="managed"),
        pytest.param([instance(1, {"Owner": "a"})], ("--region", "eu-west-1"), id="in another region"),
    ],
)
def test_without_instances_it_says_what_to_do(
    tagcheck: Tagcheck, tmp_path: Path, items: Any, args: Any
) -> None:
    save_fleet(tmp_path, *items)
    result = tagcheck("init", *FLEET, *args, check=2)
    assert "no instance whose tags a policy could follow" in result.err
    assert "name other files, --region or --profile" in result.err
    assert not (tmp_path / "policy.yaml").exists()


@pytest.mark.parametrize("args", [("--region", "us-esat-1"), ("--name", " "), ("--name", "a\x1bb")])
def test_wrong_arguments(tagcheck: Tagcheck, args: tuple[str, str]) -> None:
    assert args[0] in tagcheck("init", *args, check=2).err


def test_a_file_that_is_cut_short_is_not_the_whole_fleet(tagcheck: Tagcheck, tmp_path: Path) -> None:
    save_fleet(tmp_path, *small_fleet(), NextToken="more")
    result = tagcheck("init", *FLEET, check=4)
    line = "Not read in full, so the policy may lack something: fleet.json: Truncated: it has a NextToken"
    assert line in result.err
    assert f"# {line}" in (tmp_path / "policy.yaml").read_text()


def test_regions_that_are_asked_for(tagcheck: Tagcheck, tmp_path: Path) -> None:
    save_fleet(tmp_path, *small_fleet())
    regions = ("--region", "us-east-1", "--region", "eu-west-3")
    result = tagcheck("init", *FLEET, *regions, check=0)
    assert result.out.endswith(f"--region us-east-1 --region eu-west-3 {' '.join(FLEET)} --dry-run\n")
    text = (tmp_path / "policy.yaml").read_text()
    first, second, after, *_ = text.partition("regions:\n")[2].splitlines()
    assert (first.split(maxsplit=1), second.split(maxsplit=1), after) == (
        ["eu-west-3:", "# no instances"],
        ["us-east-1:", "# 7 instances"],
        "exemptions:",
    )


def test_a_region_that_is_new_to_tagcheck(tagcheck: Tagcheck, tmp_path: Path) -> None:
    text, _ = made(tagcheck, tmp_path, *(instance(n, {"Owner": "a"}, region="xx-new-1") for n in range(3)))
    assert "xx-new-1 (3)" in text
    assert text.endswith('regions:\n  "*":                          # every enabled region\n')
    save(tmp_path, "policy.yaml", yaml.safe_load(text))
    tagcheck("scan", "--policy", "policy.yaml", *FLEET, check=0)


# ---- Live --------------------------------------------------------------------------------------------------


def test_the_account_of_the_credentials(tagcheck: Tagcheck, tmp_path: Path, aws: AwsServer) -> None:
    aws.launch("us-east-1", {"Owner": "a", "Name": "web"}, count=4)
    aws.launch("eu-west-1", {"Owner": "b"}, count=4)
    ids = aws.launch("eu-west-1", count=1)
    aws.managed = {ids[0]: "eks.amazonaws.com"}
    tagcheck("init", env=aws.env, check=0)
    text = (tmp_path / "policy.yaml").read_text()
    assert "# Made by `tagcheck.py init` from 9 instances in 2 regions of 1 account" in text
    assert "# A scan with it finds now: 4 of 9 instances with violations, 1 exempted" in text
    out = tagcheck("scan", "--policy", "policy.yaml", "--dry-run", env=aws.env, check=3).out
    assert "4 findings: 4 NEW" in out


def test_a_region_that_cannot_be_read_is_named(tagcheck: Tagcheck, tmp_path: Path, aws: AwsServer) -> None:
    aws.launch("us-east-1", {"Owner": "a"}, count=2)
    aws.fault(
        "error", region="eu-west-1", action="DescribeInstances", code="UnauthorizedOperation", status=403
    )
    result = tagcheck("init", env=aws.env, check=4)
    line = (
        f"Not read in full, so the policy may lack something: {ACCOUNT_ID} eu-west-1: UnauthorizedOperation: "
    )
    assert line in result.err
    assert f"# {line}" in (tmp_path / "policy.yaml").read_text()
    tagcheck("validate", "policy.yaml", check=0)


def test_if_nothing_can_be_read_there_is_no_policy(
    tagcheck: Tagcheck, tmp_path: Path, aws: AwsServer
) -> None:
    aws.fault("error", action="DescribeInstances", code="UnauthorizedOperation", status=403)
    result = tagcheck("init", "--region", "us-east-1", env=aws.env, check=4)
    assert f"{ACCOUNT_ID} us-east-1" in result.err
    assert [*tmp_path.iterdir()] == []


# ---- From AWS's own rules ----------------------------------------------------------------------------------

AUTHORED = {
    "tags": {
        "costcenter": {
            "tag_key": {"@@assign": "CostCenter"},
            "tag_value": {"@@assign": ["100", "200*"]},
            "enforced_for": {"@@assign": ["ec2:instance"]},
        },
        "env": {"tag_key": {"@@assign": "Env"}, "tag_value": {"@@assign": ["dev", "prod"]}},
        "note": {"tag_key": {"@@assign": "Note"}},
    }
}
EFFECTIVE = {
    "tags": {
        "costcenter": {
            "tag_key": "CostCenter",
            "tag_value": ["100", "200*"],
            "enforced_for": ["ec2:instance"],
        },
        "env": {"tag_key": "Env", "tag_value": ["dev", "prod"]},
        "note": {"tag_key": "Note"},
    }
}
EQUAL = [
    {"key": "CostCenter", "optional": True, "pattern": "100|200.*"},
    {"key": "Env", "optional": True, "values": ["dev", "prod"]},
    {"key": "Note", "allow_empty": True, "optional": True},
]


def from_aws(tagcheck: Tagcheck, path: Path, *answers: Any) -> tuple[str, dict[str, Any]]:
    """Make the policy that is the equal of these files; returns its text and what it says."""
    options = []
    for number, answer in enumerate(answers):
        save(path, f"{number}.json", answer)
        options += ["--from", f"{number}.json"]
    text = tagcheck("init", *options, "--output", "-", check=0).out
    script.check_policy(text.encode(), "policy.yaml")
    return text, yaml.safe_load(text)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(AUTHORED, id="authored"),
        pytest.param(EFFECTIVE, id="effective"),
        pytest.param({"Policy": {"Content": json.dumps(AUTHORED)}}, id="describe-policy"),
        pytest.param(
            {"EffectivePolicy": {"PolicyType": "TAG_POLICY", "PolicyContent": json.dumps(EFFECTIVE)}},
            id="describe-effective-policy",
        ),
    ],
)
def test_a_tag_policy(tagcheck: Tagcheck, tmp_path: Path, answer: Any) -> None:
    text, policy = from_aws(tagcheck, tmp_path, answer)
    assert policy["required_tags"] == EQUAL
    assert policy["regions"] == {"*": None}
    assert "enforced_for has no equal" in text
    assert script.TAG_POLICY_PAGE in text


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ({}, 0),
        ({"CostCenter": "100"}, 0),
        ({"CostCenter": "2001"}, 0),
        ({"CostCenter": "1001"}, 3),
        ({"costcenter": "100"}, 3),
        ({"Env": "Prod"}, 3),
        ({"Note": ""}, 0),
    ],
)
def test_a_tag_policy_means_the_same(tagcheck: Tagcheck, tmp_path: Path, tags: Any, code: int) -> None:
    save(tmp_path, "tags.json", EFFECTIVE)
    tagcheck("init", "--from", "tags.json", check=0)
    save_fleet(tmp_path, instance(1, tags))
    tagcheck("scan", "--policy", "policy.yaml", *FLEET, check=code)


@pytest.mark.parametrize(
    ("entry", "rule", "comment"),
    [
        ({}, {"key": "team", "allow_empty": True, "optional": True}, ""),
        ({"tag_value": ["*"]}, {"key": "team", "allow_empty": True, "optional": True}, ""),
        (
            {"tag_value": ["", "a"]},
            {"key": "team", "allow_empty": True, "optional": True, "values": ["a"]},
            "",
        ),
        ({"tag_value": ["*@a.b"]}, {"key": "team", "optional": True, "pattern": r".*@a\.b"}, ""),
        ({"tag_value": ["a'(b)*"]}, {"key": "team", "optional": True, "pattern": r"a'\(b\).*"}, ""),
        ({"tag_value": ["A****", "A0"]}, {"key": "team", "optional": True, "pattern": "A.*|A0"}, ""),
        ({"report_required_tag_for": {"@@assign": ["EC2:*"]}}, {"key": "team", "allow_empty": True}, ""),
        ({"report_required_tag_for": {"@@assign": ["*"]}}, {"key": "team", "allow_empty": True}, ""),
        ({"tag_value": ["a", "a"]}, {"key": "team", "optional": True, "values": ["a"]}, ""),
        ({"report_required_tag_for": ["ec2:instance"]}, {"key": "team", "allow_empty": True}, ""),
        (
            {"report_required_tag_for": {"@@assign": ["s3:bucket"]}},
            {"key": "team", "allow_empty": True, "optional": True},
            "report_required_tag_for does not name ec2:instance",
        ),
        (
            {"tag_value": {"@@append": ["a"]}},
            {"key": "team", "optional": True, "values": ["a"]},
            "No equal for @@append of the tag policy Team: it adds to a parent's values",
        ),
        (
            {"tag_value": {"@@assign": ["a"], "@@operators_allowed_for_child_policies": ["@@none"]}},
            {"key": "team", "optional": True, "values": ["a"]},
            "No equal for @@operators_allowed_for_child_policies of the tag policy Team: left out",
        ),
        (
            {"tag_value": ["a", "b\u200b"], "news": 1},
            {"key": "team", "optional": True, "values": ["a"]},
            r"a policy cannot list the value 'b\u200b'",
        ),
        (
            {"tag_value": ["a", " "]},
            {"key": "team", "optional": True, "values": ["a"]},
            "a policy cannot list the value ' '",
        ),
    ],
)
def test_parts_of_a_tag_policy(
    tagcheck: Tagcheck, tmp_path: Path, entry: Any, rule: Any, comment: str
) -> None:
    text, policy = from_aws(tagcheck, tmp_path, {"tags": {"@@x": 1, "Team": entry}})
    assert policy["required_tags"] == [rule]
    assert comment in text


def config(parameters: Any, scope: Any = None, arn: str = "", **keys: Any) -> dict[str, Any]:
    """Make what describe-config-rules prints of a rule."""
    rule = {
        "ConfigRuleName": "tags",
        "Source": {"Owner": "AWS", "SourceIdentifier": "REQUIRED_TAGS"},
        "InputParameters": json.dumps(parameters),
        "Scope": {"ComplianceResourceTypes": ["AWS::EC2::Instance"]} if scope is None else scope,
    }
    return {"ConfigRules": [rule | ({"ConfigRuleArn": arn} if arn else {}) | keys]}


ONE = config({}, InputParameters={"tag1Key": "A"})["ConfigRules"][0]
ARN = f"arn:aws:config:eu-west-1:{ACCOUNT_ID}:config-rule/config-rule-a1b2c3"


@pytest.mark.parametrize(
    ("answer", "rules", "comment"),
    [
        (
            config({"tag1Key": "Owner", "tag1Value": "a, b,", "tag6Key": "Key"}),
            [{"key": "Owner", "values": ["a", "b"]}, {"key": "Key", "allow_empty": True}],
            "# Config rule tags",
        ),
        (
            config({"tag1Key": "Backup"}, {"TagKey": "Env", "TagValue": "prod"}),
            [{"key": "Backup", "allow_empty": True, "when": {"tags": {"Env": "prod"}}}],
            "",
        ),
        (
            config({"tag1Key": "Backup"}, {"TagKey": "Env: x"}),
            [{"key": "Backup", "allow_empty": True, "when": {"tags": {"Env: x": ["", "*"]}}}],
            "",
        ),
        (
            config({"tag1Key": "Backup"}, {"TagKey": "Env", "TagValue": "a*?"}),
            [{"key": "Backup", "allow_empty": True, "when": {"tags": {"Env": "a*?"}}}],
            "No equal for the scope 'Env=a*?' of the Config rule tags: a policy takes * for any text and ?",
        ),
        (
            config({"tag1Key": "A"}, {"ComplianceResourceId": "i-0123456789abcdef0"}),
            [{"key": "A", "allow_empty": True, "when": {"instances": ["i-0123456789abcdef0"]}}],
            "",
        ),
        (ONE, [{"key": "A", "allow_empty": True}], "# Config rule tags"),
        (
            config({"tag1Key": "A", "tag2Key": "aws:x", "tag3Key": "B", "tag3Value": "x*"}, {}),
            [{"key": "A", "allow_empty": True}, {"key": "B", "values": ["x*"]}],
            "No equal for aws:x of the Config rule tags: a policy cannot require such a key",
        ),
    ],
)
def test_a_config_rule(tagcheck: Tagcheck, tmp_path: Path, answer: Any, rules: Any, comment: str) -> None:
    text, policy = from_aws(tagcheck, tmp_path, answer)
    assert policy["required_tags"] == rules
    assert comment in text
    assert script.TAG_POLICY_PAGE not in text


@pytest.mark.parametrize(
    ("rule", "comment"),
    [
        (
            config({"tag1Key": "B"}, {"ComplianceResourceTypes": ["AWS::S3::Bucket"]}),
            "not for AWS::EC2::Instance",
        ),
        (config({}, Source={"Owner": "AWS", "SourceIdentifier": "S3_X"}), "it is S3_X, not REQUIRED_TAGS"),
        (
            config({}, Source={"Owner": "CUSTOM_LAMBDA", "SourceIdentifier": "REQUIRED_TAGS"}),
            "not REQUIRED_TAGS",
        ),
        (config({"tag1Key": "B"}, {"TagKey": "a\nb"}), r"a policy cannot hold its scope 'a\nb='"),
    ],
)
def test_a_config_rule_without_an_equal(tagcheck: Tagcheck, tmp_path: Path, rule: Any, comment: str) -> None:
    both = {"ConfigRules": [*rule["ConfigRules"], *config({"tag1Key": "A"})["ConfigRules"]]}
    text, policy = from_aws(tagcheck, tmp_path, both)
    assert policy["required_tags"] == [{"key": "A", "allow_empty": True}]
    assert comment in text
    save(tmp_path, "alone.json", rule)
    assert "no rule for EC2 instances" in tagcheck("init", "--from", "alone.json", check=2).err


def test_config_rules_are_for_their_regions(tagcheck: Tagcheck, tmp_path: Path) -> None:
    rule = config({"tag1Key": "A"}, arn=ARN)
    assert from_aws(tagcheck, tmp_path, rule)[1]["regions"] == {"eu-west-1": None}
    text, policy = from_aws(tagcheck, tmp_path, rule, EFFECTIVE)
    assert policy["regions"] == {"*": None}
    assert "# The Config rules are those of eu-west-1" in text


@pytest.mark.parametrize(
    ("tag_policy", "parameters", "rule", "comment"),
    [
        (
            {"tag_key": "A"},
            {"tag1Key": "A"},
            {"key": "A", "allow_empty": True},
            "tag policy a, Config rule tags",
        ),
        ({"tag_key": "A", "tag_value": ["x", "y"]}, {"tag1Key": "A"}, {"key": "A", "values": ["x", "y"]}, ""),
        (
            {"tag_key": "A", "tag_value": ["x", "y"]},
            {"tag1Key": "A", "tag1Value": "y,z"},
            {"key": "A", "values": ["y"]},
            "",
        ),
        (
            {"tag_key": "A", "tag_value": ["1*"]},
            {"tag1Key": "A", "tag1Value": "10,20"},
            {"key": "A", "values": ["10"]},
            "",
        ),
        (
            {"tag_key": "A", "tag_value": ["x"]},
            {"tag1Key": "A", "tag1Value": "y"},
            {"key": "A", "optional": True, "values": ["x"]},
            "No equal for A of the Config rule tags: other values than in the tag policy a, which is kept",
        ),
        (
            {"tag_key": "A"},
            {"tag1Key": "a"},
            {"key": "A", "allow_empty": True, "optional": True},
            "another spelling than in the tag policy a, which is kept",
        ),
    ],
)
def test_two_rules_for_one_key(
    tagcheck: Tagcheck, tmp_path: Path, tag_policy: Any, parameters: Any, rule: Any, comment: str
) -> None:
    text, policy = from_aws(tagcheck, tmp_path, {"tags": {"a": tag_policy}}, config(parameters))
    assert policy["required_tags"] == [rule]
    assert comment in text


def test_a_scope_is_met_by_the_key_alone(tagcheck: Tagcheck, tmp_path: Path) -> None:
    save(tmp_path, "rule.json", config({"tag1Key": "A"}, {"TagKey": "Prod"}, arn=ARN))
    tagcheck("init", "--from", "rule.json", check=0)
    fleet = [
        instance(n, tags, region="eu-west-1") for n, tags in enumerate(({"Prod": ""}, {"Prod": " "}, {}))
    ]
    save_fleet(tmp_path, *fleet)
    scan = tagcheck("scan", "--policy", "policy.yaml", *FLEET, "--json", "-", check=3).json("-")
    assert [finding["instance_id"] for finding in scan["findings"]] == [instance_id(0), instance_id(1)]


@pytest.mark.parametrize(
    ("refused", "comment"),
    [
        (
            config({"tag1Key": "B"}, {"TagKey": "K", "TagValue": "v" * 300}),
            "has 300 characters; AWS allows 256",
        ),
        (
            {"tags": {"b": {"tag_value": [f"{n:06}*" for n in range(2000)]}}},
            "has more than 10,000 characters",
        ),
        ({"tags": {"b": {"tag_value": ["*a" * 120]}}}, "can run forever on long values"),
    ],
)
def test_what_a_policy_cannot_hold_is_a_comment(
    tagcheck: Tagcheck, tmp_path: Path, refused: Any, comment: str
) -> None:
    text, policy = from_aws(tagcheck, tmp_path, refused, {"tags": {"A": {"tag_key": "A"}}})
    assert [rule["key"] for rule in policy["required_tags"]] == ["A"]
    assert comment in next(line for line in text.splitlines() if line.lower().startswith("# no equal for b "))
    err = tagcheck("init", "--from", "0.json", check=2).err
    assert err.startswith("tagcheck: a policy cannot hold these rules: No equal for")
    assert comment in err


def test_rules_that_are_too_many_for_a_policy(tagcheck: Tagcheck, tmp_path: Path) -> None:
    save(tmp_path, "tags.json", {"tags": {f"t{n}": {"tag_key": f"t{n}"} for n in range(20_000)}})
    err = tagcheck("init", "--from", "tags.json", check=2).err
    assert err.startswith("tagcheck: a policy cannot hold these rules: ")
    assert "policy.yaml" not in err


def test_rules_of_aws_with_a_fleet(tagcheck: Tagcheck, tmp_path: Path) -> None:
    save(tmp_path, "tags.json", EFFECTIVE)
    save_fleet(tmp_path, *people(3, CostCenter="100"), *people(2, first=4, CostCenter="7"))
    tagcheck("init", "--from", "tags.json", *FLEET, check=0)
    text = (tmp_path / "policy.yaml").read_text()
    assert yaml.safe_load(text)["required_tags"] == EQUAL
    assert (
        "# A scan with it finds now: 2 of 5 instances with violations\n#   CostCenter: 2 with another value"
        in text
    )
    assert set(yaml.safe_load(text)["regions"]) == {"us-east-1", "*"}


DEEP = '{"tags":' * 20_000


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Expecting value"),
        ("[]", "a list instead of an object with tags"),
        ("{}", "it has no 'tags'"),
        ('{"tags": []}', "its tags is a list, not an object"),
        ('{"tags": {"a": 1}}', "its a is 1, not an object"),
        ('{"tags": {"a": {"tag_key": 1}}}', "its tag_key is 1, not text"),
        ('{"tags": {"a": {"tag_value": "x"}}}', "its tag_value is 'x', not a list"),
        ('{"tags": {"a": {"tag_value": [1]}}}', "its value is 1, not text"),
        ('{"tags": {"a": {}, "a": {}}}', "the key 'a' appears twice in one object"),
        ('{"tags": NaN}', "NaN is not JSON"),
        (DEEP, "recursion"),
        ('{"tags": {"a": {"tag_key": "\\ud800"}}}', "half a character"),
        ('{"Policy": {"Content": "{"}}', "Expecting property name"),
        ('{"EffectivePolicy": 1}', "1 instead of an object"),
        ('{"ConfigRules": {}}', "its ConfigRules is a mapping, not a list"),
        ('{"ConfigRules": [1]}', "instead of an object with ConfigRuleName"),
        ('{"ConfigRules": [], "NextToken": "x"}', "it has a NextToken, so more rules follow"),
        (json.dumps(config([])), "its InputParameters is a list, not an object"),
        (json.dumps(config({"tag1Key": 1})), "its tag1Key is 1, not text"),
        (json.dumps(config({}, "x")), "its Scope is 'x', not an object"),
        (" " * 10_000_001, "it is larger than 10,000,000 bytes"),
        (f'{{"tags": {"9" * 5000}}}', "integer string conversion"),
    ],
)
def test_malformed_files(tagcheck: Tagcheck, tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    err = tagcheck("init", "--from", "bad.json", check=2).err
    assert err.startswith(
        'tagcheck: bad.json is neither an AWS tag policy ({"tags": …}), nor what `aws organ'
    )
    assert why in err
    assert len(err) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_a_file_that_is_missing(tagcheck: Tagcheck) -> None:
    assert "cannot read no.json: No such file" in tagcheck("init", "--from", "no.json", check=2).err


def test_rules_from_stdin(tagcheck: Tagcheck, tmp_path: Path) -> None:
    tagcheck("init", "--from", "-", stdin=json.dumps(EFFECTIVE), check=0)
    assert yaml.safe_load((tmp_path / "policy.yaml").read_text())["required_tags"] == EQUAL


def test_hostile_rules_cannot_break_the_policy(tagcheck: Tagcheck, tmp_path: Path) -> None:
    generator = random.Random(3)
    for _ in range(40):
        texts = ["".join(generator.choices(PIECES, k=3)) for _ in range(8)]
        a, b, c, d, e, f, g, h = texts
        answers = (
            {"tags": {a: {"tag_value": [b, f"{c}*"]}, d: {"tag_key": e, "tag_value": [f]}, "ok": {}}},
            config({"tag1Key": g, "tag1Value": h}, {"TagKey": b, "TagValue": c}, ConfigRuleName=f),
        )
        text, _ = from_aws(tagcheck, tmp_path, *answers)
        assert all(script.is_printable(line) for line in text.splitlines())


# ---- Speed -------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_large_fleet_costs_little_more_than_reading_it(tmp_path: Path) -> None:
    keys = ("Owner", "Environment", "CostCenter", "Project", "Name", "Service")
    items = [
        reservation(number, {key: f"{key}-{number % 7 if key != 'Name' else number}" for key in keys})
        for number in range(100_000)
    ]
    path = save_fleet(tmp_path, *items)
    times = [time.process_time()]
    fleet_, _ = script.load_fleet([str(path)])
    times.append(time.process_time())
    starter = script.make_starter("tags", fleet_, [], None)
    policy = script.check_policy("\n".join(script.policy_lines(starter)).encode(), "policy.yaml")
    lines = [*script.finding_lines(policy, fleet_, script.datetime.now(script.UTC))]
    times.append(time.process_time())
    assert len(lines) == 1
    reading, rest = times[1] - times[0], times[2] - times[1]
    print(f"reading {reading / 100:.4f} ms an instance, the rest {rest / reading:.2f} times that")
    assert rest < 2 * reading
