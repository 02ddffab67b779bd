"""The README's Ansible tasks, as ansible-playbook runs them against AWS that moto plays."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from aws_server import AwsServer
from builders import save_policy
from conftest import TAGCHECK, clean_environment

README = (TAGCHECK.parent / "README.md").read_text("utf-8")
REGION = "us-east-1"
# That of the virtual environment, which need not be on the PATH.
PLAYBOOK = shutil.which(
    "ansible-playbook", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)


@pytest.fixture(scope="module")
def tasks() -> list[dict[str, object]]:
    """Read the tasks that the README shows, in its order: scan, say, plan, write."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [task for block in blocks if "ansible.builtin" in block for task in yaml.safe_load(block)]


@pytest.mark.skipif(PLAYBOOK is None, reason="ansible-playbook is not installed: pip install ansible-core")
def test_playbook_scans_plans_writes_and_knows_what_has_changed(
    aws: AwsServer, tasks: list[dict[str, object]], tmp_path: Path
) -> None:
    shutil.copy(TAGCHECK, tmp_path)
    save_policy(tmp_path)
    (id_,) = aws.launch(REGION, tags={"owner": "ann"})
    play = [{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]
    text = yaml.safe_dump(play, sort_keys=False).replace("/opt/tagcheck", str(tmp_path))
    text = text.replace("/var/lib/tagcheck/", f"{tmp_path}/").replace("python3", sys.executable)
    (tmp_path / "play.yaml").write_text(text)

    def recap() -> dict[str, int]:
        run = subprocess.run(
            [
                PLAYBOOK,
                "-i",
                "localhost,",
                "-c",
                "local",
                "-e",
                f"ansible_python_interpreter={sys.executable}",
                "play.yaml",
            ],
            cwd=tmp_path,
            env=clean_environment(tmp_path) | aws.env | {"ANSIBLE_LOCALHOST_WARNING": "false"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        counts = dict(re.findall(r"(\w+)=(\d+)", run.stdout.rpartition("PLAY RECAP")[2]))
        assert run.returncode == 0, run.stdout + run.stderr
        return {name: int(counts[name]) for name in ("changed", "failed", "skipped")}

    assert recap() == {"changed": 1, "failed": 0, "skipped": 0}
    tags = aws.backstage("ec2", REGION).describe_tags(Filters=[{"Name": "resource-id", "Values": [id_]}])[
        "Tags"
    ]
    assert {tag["Key"]: tag["Value"] for tag in tags} == {"owner": "ann", "Owner": "ann"}
    # Now nothing is found, so that nothing is said, planned or written.
    assert recap() == {"changed": 0, "failed": 0, "skipped": 1}
