"""README, --help, requirements.txt, the PEP 723 block and the code say the same."""

import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path

import drift
import picture
import pytest
import yaml
from conftest import run_tagcheck

import tagcheck

ROOT = Path(tagcheck.__file__).resolve().parent
README = (ROOT / "README.md").read_text("utf-8")


def fenced(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def readme_runs():
    """The commands of each block that the README shows with their output."""
    for block in fenced("console"):
        runs = [run.partition("\n") for run in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
        named = [(command.rpartition("&& ")[2], out) for command, _, out in runs if "tagcheck.py" in command]
        if named and "org.yaml" not in block:  # that one needs AWS: test_documents_runbook
            yield pytest.param(named, id=named[-1][0][-60:])


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """What `python tests/drift.py demo` leaves behind."""
    directory = tmp_path_factory.mktemp("month") / "demo"
    assert drift.main([str(directory)]) == 0
    return directory


@pytest.mark.parametrize("runs", list(readme_runs()))
def test_readme_shows_what_the_commands_print(runs, tmp_path, request):
    for name in ("tests/data", "policies"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "tagcheck.py", tmp_path)
    if "demo/" in str(runs):
        shutil.copytree(request.getfixturevalue("demo"), tmp_path / "demo")
    for command, output in runs:
        python, script, *arguments = shlex.split(command)
        assert python.endswith("python")
        result = run_tagcheck(*arguments, cwd=tmp_path, script=tmp_path / script)
        assert output in (result.out, result.err) or (output and result.out.startswith(output))


def test_the_picture_of_a_terminal_shows_what_a_scan_prints():
    assert picture.PICTURE.read_text("utf-8") == picture.draw(picture.scan())
    assert max(map(len, picture.scan().splitlines())) <= picture.COLUMNS


def test_readme_has_the_table_of_exit_codes():
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (.*) \|$", README, re.MULTILINE)
    assert rows == [(str(int(code)), code.name, code.meaning) for code in tagcheck.ExitCode]


def test_readme_policy_is_valid():
    (policy,) = fenced("yaml")[:1]
    assert tagcheck.check_policy(policy.encode(), "README.md").covers("eu-west-3")


def test_readme_names_only_options_that_exist():
    options = {
        option
        for command in tagcheck.build_parser().commands.values()
        for action in command._actions
        for option in action.option_strings
    }
    of_others = {"--soak", "--include-managed-resources", "--output"}  # of pytest and the AWS CLI
    assert set(re.findall(r"--[a-z][a-z-]+", README)) - options - of_others == set()


def test_readme_is_short_and_its_contents_are_its_sections():
    assert README.count("\n") <= 350
    links = re.findall(r"\[([^]]+)\]\(#([a-z0-9-]+)\)", README)
    sections = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert [name for name, _ in links] == sections
    assert [anchor for _, anchor in links] == [name.lower().replace(" ", "-") for name in sections]


def test_readme_ansible_tasks_parse():
    blocks = [yaml.safe_load(block) for block in fenced("yaml") if "ansible.builtin" in block]
    commands = [
        task["ansible.builtin.command"]["argv"]
        for tasks in blocks
        for task in tasks
        if "register" in task or "changed_when" in task
    ]
    assert [command[2] for command in commands] == ["scan", "remediate", "remediate"]
    assert all(tagcheck.build_parser().parse_args(command[2:]).quiet for command in commands)


def test_readme_jenkins_options_exist():
    commands = re.findall(r"sh(?:\(script:)? '(.*?)'", "".join(fenced("groovy")))
    commands += [line for block in fenced("sh") for line in block.splitlines()]
    assert len(commands) == 9
    for command in commands:
        filled = re.sub(r"\$\(\(.*?\)\)|\$SHARD", "2", command)
        assert tagcheck.build_parser().parse_args(shlex.split(filled)[2:]).command in (
            *("scan", "init", "validate", "report", "prune"),
        )


def test_readme_parts_of_policies_are_valid():
    head = "version: 1\nname: test\nrequired_tags: [Owner]\nregions: {us-east-1: }\n"
    parts = [block for block in fenced("yaml") if block.startswith(("accounts:", "notify:"))]
    assert len(parts) == 2
    for part in parts:
        assert tagcheck.check_policy((head + part.replace(", …", "")).encode(), "README.md")


def test_ci_runs_the_readme_test_command():
    assert ".venv/bin/python -m pytest -q" in README
    assert "python -m pytest -q" in (ROOT / ".ci/run").read_text("utf-8")


def test_the_script_asks_for_the_packages_of_requirements():
    script = (ROOT / "tagcheck.py").read_text("utf-8")
    block = re.search(r"^# /// script\n(.*?)^# ///$", script, re.MULTILINE | re.DOTALL)[1]
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.MULTILINE))
    to_run = (ROOT / "requirements.txt").read_text("utf-8").partition("# To test")[0].splitlines()
    assert metadata["dependencies"] == [line for line in to_run if line and not line.startswith("#")]
    assert metadata["requires-python"] == ">=3.11"


def test_minimum_versions_are_the_same_everywhere():
    to_run = (ROOT / "requirements.txt").read_text("utf-8").partition("# To test")[0].splitlines()
    packages = {name: version for name, version in tagcheck.MINIMUM_VERSIONS.items() if name != "botocore"}
    wanted = [f"{name}>={version}" for name, version in packages.items()]
    assert [line for line in to_run if ">=" in line] == wanted
    assert tagcheck.MINIMUM_VERSIONS["botocore"] == packages["boto3"]
    assert re.findall(r"(?:boto3|botocore|PyYAML|jsonschema)>=[\d.]+", README) == wanted


def test_table_of_contents_is_that_of_the_sections():
    script = (ROOT / "tagcheck.py").read_text("utf-8")
    contents = re.findall(r"^ (\d) (\S[\w ]*?) {2,}", script, re.MULTILINE)
    banners = re.findall(r"^#{104}\n# (\d) ([\w ]+?): .*\n#{104}$", script, re.MULTILINE)
    assert contents == banners


def test_default_policy_is_the_contract():
    policy = tagcheck.load_policy(str(ROOT / "policies/default.yaml"))
    assert [rule.key for rule in policy.rules("us-east-1")] == ["Owner", "CostCenter", "Project"]
    assert list(policy.regions) == ["us-east-1"]


def test_only_the_agreed_things_stand_at_the_top():
    named = {"tagcheck.py", "policies", "tests", "requirements.txt", "README.md", "LICENSE"}
    made = {
        "instance_state.db",
        "violators.csv",
        "__pycache__",
        "demo",
        "dashboard.html",
        "remediate-plan.csv",
    }
    assert {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - made == named


def test_python_is_new_enough():
    assert sys.version_info >= (3, 11)
