"""Instances that AWS services operate: AWS hides them, no scan misses them, and reports name the service."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from aws_server import ACCOUNT_ID, AwsServer
from builders import instance, save_fleet, save_policy
from conftest import Result

REGION = "us-east-1"
EKS = "eks.amazonaws.com"
OUTPUTS = ("--csv", "out.csv", "--json", "out.json")
Tagcheck = Callable[..., Result]


def saved_instance(number: int, principal: str | None = None, **tags: str) -> dict[str, Any]:
    """Make an instance that an AWS service may operate."""
    operator = {"Managed": True, "Principal": principal} if principal else {"Managed": False}
    return instance(number, tags, Operator=operator)


def open_findings(directory: Path) -> list[tuple[Any, ...]]:
    """Read which findings are open in the state, and which service operates their instances."""
    with closing(sqlite3.connect(directory / "instance_state.db")) as db:
        query = "SELECT instance_id, managed_by FROM findings WHERE resolved_at IS NULL ORDER BY instance_id"
        return db.execute(query).fetchall()


@pytest.fixture
def node(aws: AwsServer) -> str:
    """Launch an instance that EKS operates and AWS hides."""
    (node,) = aws.launch(REGION, {"Name": "node"})
    aws.managed[node] = EKS
    return node


def test_the_server_hides_managed_instances_unless_asked(aws: AwsServer, node: str) -> None:
    client = aws.client("ec2", REGION)
    assert client.describe_instances()["Reservations"] == []
    (reservation,) = client.describe_instances(IncludeManagedResources=True)["Reservations"]
    (instance,) = reservation["Instances"]
    assert instance["InstanceId"] == node
    assert instance["Operator"] == {"Managed": True, "Principal": EKS}


def test_a_scan_finds_hidden_instances_and_names_the_service(
    tagcheck: Tagcheck, aws: AwsServer, node: str, tmp_path: Path
) -> None:
    (other,) = aws.launch(REGION)
    run = tagcheck("scan", "--policy", save_policy(tmp_path), *OUTPUTS, env=aws.env, check=3)
    report = run.json("out.json")
    assert {f["instance_id"]: f["managed_by"] for f in report["findings"]} == {node: EKS, other: None}
    assert report["summary"]["findings_managed"] == 1
    assert {row["InstanceId"]: row["ManagedBy"] for row in run.csv("out.csv")} == {node: EKS, other: ""}
    assert (tmp_path / "out.csv").read_text().splitlines()[0].endswith(",Error,ManagedBy,AccountName")
    assert f"1 finding is on an instance that an AWS service operates: {EKS} (1)" in run.out
    assert "set it where eks.amazonaws.com takes its tags from" not in run.out  # one instance is no group


def test_a_hidden_instance_is_repeat_and_never_gone(
    tagcheck: Tagcheck, aws: AwsServer, node: str, tmp_path: Path
) -> None:
    policy = save_policy(tmp_path)
    for status in ("NEW", "REPEAT"):
        run = tagcheck("scan", "--policy", policy, *OUTPUTS, env=aws.env, check=3)
        assert [f["status"] for f in run.json("out.json")["findings"]] == [status]
        assert run.json("out.json")["resolved"] == []


def test_explain_says_which_service_operates_the_instance(
    tagcheck: Tagcheck, aws: AwsServer, node: str, tmp_path: Path
) -> None:
    policy = save_policy(tmp_path)
    live = tagcheck("explain", node, "--live", "--region", REGION, "--policy", policy, env=aws.env, check=0)
    assert f"running, managed by {EKS}:" in live.out
    tagcheck("scan", "--policy", policy, env=aws.env, check=3)
    remembered = tagcheck("explain", node, "--policy", policy, check=0)
    assert f"running, managed by {EKS}, as it was at" in remembered.out


def test_remediate_reads_and_tags_a_hidden_instance(
    tagcheck: Tagcheck, aws: AwsServer, node: str, tmp_path: Path
) -> None:
    policy = save_policy(tmp_path, required_tags=[{"key": "Owner", "default": "platform"}])
    tagcheck("scan", "--policy", policy, env=aws.env, check=3)
    tagcheck("remediate", "--policy", policy, "--apply", env=aws.env, check=0)
    (reservation,) = aws.client("ec2", REGION).describe_instances(IncludeManagedResources=True)[
        "Reservations"
    ]
    assert {"Key": "Owner", "Value": "platform"} in reservation["Instances"][0]["Tags"]


def test_a_refusal_for_a_managed_instance_is_the_result_of_its_row(
    tagcheck: Tagcheck, aws: AwsServer, node: str, tmp_path: Path
) -> None:
    (other,) = aws.launch(REGION)
    policy = save_policy(tmp_path, required_tags=[{"key": "Owner", "default": "platform"}])
    tagcheck("scan", "--policy", policy, env=aws.env, check=3)
    aws.fault(
        "error",
        action="CreateTags",
        when=lambda request: node in request.params.values(),
        status=400,
        code="OperationNotPermitted",
        message=f"The instance {node} is managed by {EKS}.",
    )
    run = tagcheck("remediate", "--policy", policy, "--apply", "--json", "done.json", env=aws.env, check=4)
    results = {row["instance_id"]: row["result"] for row in run.json("done.json")["rows"]}
    assert results == {node: "failed", other: "written"}


@pytest.mark.parametrize(
    ("managed_by", "exempted"),
    [
        pytest.param("*", {1, 2}, id="any service"),
        pytest.param(EKS, {1}, id="one service"),
        pytest.param("*.amazonaws.com", {1, 2}, id="a pattern"),
        pytest.param("EKS.amazonaws.com", set(), id="another spelling"),
    ],
)
def test_an_exemption_of_managed_instances(
    tagcheck: Tagcheck, tmp_path: Path, managed_by: str, exempted: set[int]
) -> None:
    fleet = save_fleet(
        tmp_path, saved_instance(1, EKS), saved_instance(2, "lambda.amazonaws.com"), saved_instance(3)
    )
    policy = save_policy(tmp_path, exemptions=[{"reason": "theirs", "managed_by": managed_by}])
    run = tagcheck("scan", "--policy", policy, "--instances", fleet, *OUTPUTS, check=3)
    assert {int(case["instance_id"][2:], 16) for case in run.json("out.json")["exempted"]} == exempted
    assert len(run.json("out.json")["findings"]) == 3 - len(exempted)


def test_explain_names_an_exemption_for_another_service(tagcheck: Tagcheck, tmp_path: Path) -> None:
    fleet = save_fleet(tmp_path, saved_instance(1, "lambda.amazonaws.com"))
    exemption = {"reason": "theirs", "managed_by": EKS, "regions": [REGION]}
    policy = save_policy(tmp_path, exemptions=[exemption])
    run = tagcheck("explain", f"i-{1:017x}", "--instances", fleet, "--policy", policy, check=0)
    assert f"it is for instances managed by {EKS}; this one is managed by lambda.amazonaws.com" in run.out


def test_files_without_managed_instances_resolve_none_of_them(tagcheck: Tagcheck, tmp_path: Path) -> None:
    policy = save_policy(tmp_path)
    scan = ("scan", "--policy", policy, *OUTPUTS, "--instances")
    tagcheck(*scan, save_fleet(tmp_path, saved_instance(1, EKS), saved_instance(2)), check=3)
    right = (
        saved_instance(2, Owner="ann"),
        saved_instance(3, EKS, Owner="ann"),
    )  # another one proves nothing
    run = tagcheck(*scan, save_fleet(tmp_path, *right), check=0)
    (notice,) = run.json("out.json")["notices"][:1]
    assert notice.startswith(f"1 open finding in {ACCOUNT_ID} {REGION} may be of instances that AWS hides")
    assert "--include-managed-resources" in notice
    assert notice in run.out
    assert [finding["resolution"] for finding in run.json("out.json")["resolved"]] == ["tagged"]
    assert open_findings(tmp_path) == [(f"i-{1:017x}", EKS)]


@pytest.mark.parametrize("principal", [EKS, None], ids=["managed", "not managed"])
def test_an_instance_is_gone_where_the_files_would_have_it(
    tagcheck: Tagcheck, tmp_path: Path, principal: str | None
) -> None:
    scan = ("scan", "--policy", save_policy(tmp_path), *OUTPUTS, "--instances")
    ordinary = saved_instance(2, Owner="ann")
    tagcheck(*scan, save_fleet(tmp_path, saved_instance(1, principal), ordinary), check=3)
    options = ["--include-managed-resources"] if principal else []
    run = tagcheck(*scan, save_fleet(tmp_path, ordinary), *options, check=0)
    assert [finding["resolution"] for finding in run.json("out.json")["resolved"]] == ["gone"]
    assert open_findings(tmp_path) == []


def test_of_what_the_first_edition_recorded_nothing_is_gone_by_files_alone(
    tagcheck: Tagcheck, tmp_path: Path
) -> None:
    scan = ("scan", "--policy", save_policy(tmp_path), *OUTPUTS, "--instances")
    ordinary = saved_instance(2, Owner="ann")
    tagcheck(*scan, save_fleet(tmp_path, saved_instance(1), ordinary), check=3)
    with closing(sqlite3.connect(tmp_path / "instance_state.db")) as db, db:
        db.execute("UPDATE findings SET managed_by = NULL")  # as its migration leaves them
    assert tagcheck(*scan, save_fleet(tmp_path, ordinary), check=0).json("out.json")["resolved"] == []
    assert open_findings(tmp_path) == [(f"i-{1:017x}", None)]


def test_the_option_for_files_needs_files(tagcheck: Tagcheck, tmp_path: Path) -> None:
    run = tagcheck("scan", "--policy", save_policy(tmp_path), "--include-managed-resources", check=2)
    assert "give it with --instances" in run.err


@pytest.mark.parametrize("operator", [{"Managed": "true"}, {"Managed": True, "Principal": 7}, ["x"]])
def test_an_operator_of_another_form_is_refused(tagcheck: Tagcheck, tmp_path: Path, operator: object) -> None:
    fleet = save_fleet(tmp_path, saved_instance(1) | {"Operator": operator})
    run = tagcheck("scan", "--policy", save_policy(tmp_path), "--instances", fleet, check=2)
    assert "Reservations[0].Instances[0]" in run.err


def test_an_instance_whose_service_is_not_named_is_managed_all_the_same(
    tagcheck: Tagcheck, tmp_path: Path
) -> None:
    fleet = save_fleet(tmp_path, saved_instance(1) | {"Operator": {"Managed": True}})
    policy = save_policy(tmp_path, exemptions=[{"reason": "theirs", "managed_by": "*"}])
    run = tagcheck("scan", "--policy", policy, "--instances", fleet, *OUTPUTS, check=0)
    assert run.json("out.json")["summary"]["exempted"] == 1


def test_the_dashboard_counts_them(tagcheck: Tagcheck, tmp_path: Path) -> None:
    policy = save_policy(tmp_path)
    fleet = save_fleet(tmp_path, *(saved_instance(number, EKS) for number in (1, 2)))
    tagcheck("scan", "--policy", policy, "--instances", fleet, check=3)
    tagcheck("report", "--html", "page.html", "--policy", policy, check=0)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Operated by AWS services" in page and EKS in page


def test_a_service_that_operates_many_is_a_cause(tagcheck: Tagcheck, tmp_path: Path) -> None:
    fleet = save_fleet(
        tmp_path, *(saved_instance(number, "workspaces.amazonaws.com") for number in range(1, 4))
    )
    run = tagcheck("scan", "--policy", save_policy(tmp_path), "--instances", fleet, check=3)
    cause = "1 AWS service: 3 instances lack Owner; set it where workspaces.amazonaws.com takes its tags from"
    assert cause in run.out
