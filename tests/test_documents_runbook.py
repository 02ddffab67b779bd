"""The runbook of the README, step by step, against an organization that moto plays."""

import re
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from aws_server import ACCOUNT_ID, AwsServer
from conftest import run_tagcheck
from moto.moto_api._internal import mock_random

import tagcheck as script

README = (Path(script.__file__).resolve().parent / "README.md").read_text("utf-8")
REGION = "us-east-1"
TOPIC = f"arn:aws:sns:{REGION}:{ACCOUNT_ID}:tags"
ENVIRONMENT = {"Environment": "prod"}


def make_scene(aws: AwsServer) -> None:
    """Make an organization of two accounts, a topic, and instances of which three lack a tag."""
    aws.reset()
    mock_random.seed(20261124)  # the README shows ids, so they have to be the same each time
    organizations = aws.backstage("organizations", REGION)
    organizations.create_organization(FeatureSet="ALL")
    created = organizations.create_account(Email="shop@example.com", AccountName="shop")
    member = created["CreateAccountStatus"]["AccountId"]
    aws.backstage("sns", REGION).create_topic(Name="tags")
    web = {"aws:autoscaling:groupName": "web-asg", **ENVIRONMENT}
    for number in range(1, 11):
        owner = {"Owner": "team-web"} if number < 10 else {}
        aws.launch(REGION, tags={"Name": f"web-{number}", **web, **owner})
    aws.launch(REGION, tags={"Name": "cart", "owner": "team-shop", **ENVIRONMENT}, account_id=member)
    aws.launch(REGION, tags={"Name": "jump", "Owner": "ops"}, account_id=member)


def steps() -> list[tuple[str, str]]:
    """Read the commands of the runbook and what the README says that each prints."""
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "org.yaml" in block)
    runs = [run.partition("\n") for run in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(command, output) for command, _, output in runs]


def without_times(text: str) -> str:
    """Put the same in place of every time, which is another each time."""
    return re.sub(r"20\d{2}-?\d{2}-?\d{2}(T\d\d:?\d\d:?\d\dZ(-[0-9a-f]{8})?)?", "TIME", text)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Write the README's policy of the runbook."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (text,) = (
        block
        for block in blocks
        if "topic_arn" in block and "organization: true" in block and "version" in block
    )
    path = tmp_path / "org.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_runbook_does_what_the_readme_says(aws: AwsServer, policy: Path, tmp_path: Path) -> None:
    make_scene(aws)
    told = []

    def run(*arguments: str) -> str:
        result = run_tagcheck(*arguments, cwd=tmp_path, env=aws.env)
        told.append(sum(request.action == "Publish" for request in aws.requests))
        return result.out

    for command, output in steps():
        python, name, *arguments = shlex.split(command)
        assert (python, name) == ("python", "tagcheck.py")
        assert without_times(run(*arguments)) == without_times(output)
    assert [arguments.split()[2] for arguments, _ in steps()] == ["scan", "remediate", "remediate"]
    # What was written is confirmed by a scan, and undone.
    assert "3 RESOLVED" in run("scan", "--policy", "org.yaml")
    (undo,) = tmp_path.glob("remediate-undo-*.csv")
    assert "3 written" in run("remediate", "--policy", "org.yaml", "--undo", undo.name, "--apply")
    assert "3 REOPENED" in run("scan", "--policy", "org.yaml")
    # Each scan is told of once, if it found something new; plan, apply and undo tell nobody.
    assert told == [1, 1, 1, 1, 1, 2]
    with closing(sqlite3.connect(tmp_path / "instance_state.db")) as db:
        assert {row[0] for row in db.execute("SELECT status FROM changes")} == {"written"}
