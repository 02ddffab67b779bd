"""AWS: what AWS answers, what it fails with, and what was saved of it; no failure counts as clean."""

import gzip
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from aws_server import ACCOUNT_ID, EC2_NAMESPACE, IMAGE_ID, AwsServer, Request
from builders import remembered, save_policy
from conftest import TAGCHECK, Result, clean_environment, run_tagcheck, script_with, wait_for_threads
from moto import mock_aws

import tagcheck as script

REGION = "us-east-1"
OTHER_ACCOUNT = "210987654321"
OUTPUTS = ("--csv", "out.csv", "--json", "out.json", "--junit", "out.xml")

# ---- What the tests share ----------------------------------------------------------------------------------


def write_policy(directory: Path, *regions: str, **keys: Any) -> Path:
    """Write a policy that asks for Owner in these regions."""
    return save_policy(directory, **{"regions": dict.fromkeys(regions)} | keys)


Scan = Callable[..., Result]


@pytest.fixture
def scan(aws: AwsServer, tagcheck: Callable[..., Result], tmp_path: Path) -> Scan:
    """Give a function that scans these regions of the server and writes every output."""

    def run(
        *regions: str,
        args: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        keys: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Result:
        policy = write_policy(tmp_path, *regions, **dict(keys or {}))
        return tagcheck("scan", "--policy", policy, *OUTPUTS, *args, env=aws.env | dict(env or {}), **options)

    return run


def without(names: tuple[str, ...], env: Mapping[str, str]) -> dict[str, str]:
    """Give an environment without some of its variables."""
    return {name: value for name, value in env.items() if name not in names}


def coverage(result: Result) -> dict[str, dict[str, Any]]:
    """Read the coverage of a scan by region."""
    return {target["region"]: target for target in result.json("out.json")["coverage"]}


def errors(result: Result) -> dict[str, str | None]:
    """Read the code of each region's error: None where it was read."""
    return {
        region: target["error"] and target["error"]["code"] for region, target in coverage(result).items()
    }


def found(result: Result, key: str = "findings") -> dict[str, list[str]]:
    """Read the ids of the findings, or of those resolved, by region."""
    by_region: dict[str, list[str]] = {}
    for finding in result.json("out.json")[key]:
        by_region.setdefault(finding["region"], []).append(finding["instance_id"])
    return by_region


OWNER = f"<ownerId>{ACCOUNT_ID}</ownerId>"


def page_of(*ids: str, token: str = "", owner: str = ACCOUNT_ID) -> tuple[int, dict[str, str], bytes]:
    """Write a page of DescribeInstances."""
    items = "".join(
        f"<item><instanceId>{i}</instanceId><instanceState><name>running</name></instanceState>"
        "<launchTime>2026-02-24T10:30:45.000Z</launchTime></item>"
        for i in ids
    )
    reservation = (
        f"<item><ownerId>{owner}</ownerId><instancesSet>{items}</instancesSet></item>" if ids else ""
    )
    xml = f"<reservationSet>{reservation}</reservationSet>" + (
        f"<nextToken>{token}</nextToken>" if token else ""
    )
    return 200, {"Content-Type": "text/xml"}, in_root(xml)


def in_root(xml: str) -> bytes:
    """Write an answer of DescribeInstances."""
    return f'<DescribeInstancesResponse xmlns="{EC2_NAMESPACE}">{xml}</DescribeInstancesResponse>'.encode()


# ---- Every trouble at once: a scan of many regions, each with a trouble of its own -------------------------

LAUNCHED_AT_NO_TIME = page_of("i-0a")[2].replace(b"launchTime", b"launchDate")
NOT_VALIDATED = "AWS was not able to validate the provided access credentials"
DENIED = "You are not authorized to perform this operation."
ENCODED = " Encoded authorization failure message: " + "xyzzy" * 300
SCP = "User: u is not authorized to perform: ec2:DescribeInstances"
SCP += " with an explicit deny in a service control policy"
HOSTILE = "first\nForged: line\x9b31m\u202e"


def endless(tokens: Callable[[], Iterator[str]], *ids: str) -> dict[str, Any]:
    """Give the fault of pages that announce a next one for ever."""
    left = tokens()
    return {"kind": "answer", "answer": lambda _: page_of(*ids, token=next(left))}


def numbers() -> Iterator[str]:
    """Give a new token each time."""
    return (f"token-{number}" for number in itertools.count())


def error(status: int, code: str, message: str = "No.", **when: int) -> dict[str, Any]:
    """Give the fault of an error of EC2."""
    return {"kind": "error", "status": status, "code": code, "message": message, **when}


def body(text: bytes, status: int = 200) -> dict[str, Any]:
    """Give the fault of an answer that is not EC2's."""
    return {"kind": "body", "body": text, "status": status}


@dataclass(frozen=True)
class Trouble:
    """What a region's requests meet, and what a scan must make of it."""

    fault: dict[str, Any]
    code: str
    says: tuple[str, ...]
    requests: int = 1  # no more than these


PORTAL = b"<html><body>Log in to the guest network</body></html>"
LOGIN = b"<!DOCTYPE html><html><body>Log in<br></body></html>"
TROUBLES = {
    "denied": Trouble(
        error(403, "UnauthorizedOperation", DENIED + ENCODED),
        "UnauthorizedOperation",
        ("ec2:DescribeInstances", "allow it", DENIED),
    ),
    "denied by the organization": Trouble(
        error(403, "UnauthorizedOperation", SCP), "UnauthorizedOperation", ("a service control policy of",)
    ),
    "not enabled": Trouble(
        error(401, "AuthFailure", NOT_VALIDATED), "AuthFailure", ("enable the region", NOT_VALIDATED)
    ),
    "not opted in": Trouble(error(400, "OptInRequired"), "OptInRequired", ("enable it",)),
    "clock is wrong": Trouble(error(400, "RequestExpired"), "RequestExpired", ("clock",)),
    "503 for ever": Trouble(error(503, "Unavailable"), "Unavailable", ("AWS failed",), 5),
    "500 for ever": Trouble(error(500, "InternalError"), "InternalError", ("AWS failed",), 5),
    "throttled for ever": Trouble(
        error(503, "RequestLimitExceeded"), "RequestLimitExceeded", ("--workers",), 5
    ),
    "throttled on its second page": Trouble(
        error(503, "RequestLimitExceeded", skip=1), "RequestLimitExceeded", ("throttled",), 6
    ),
    "denied on its second page": Trouble(
        error(403, "UnauthorizedOperation", skip=1), "UnauthorizedOperation", ("allow it",), 2
    ),
    "the same token again": Trouble(
        endless(lambda: itertools.repeat("same"), "i-0a"), "EndlessPages", ("next page",), 3
    ),
    "two tokens in turn": Trouble(
        endless(lambda: itertools.cycle("ab"), "i-0a"), "EndlessPages", ("next page",), 4
    ),
    "new tokens and no instance": Trouble(endless(numbers), "EndlessPages", ("next page",), 110),
    "page of a captive portal": Trouble(body(PORTAL), "ForeignAnswer", ("network", "proxy")),
    "portal that answers 403": Trouble(body(PORTAL, 403), "ForeignAnswer", ("network", "proxy")),
    "portal that redirects": Trouble(body(PORTAL, 302), "ForeignAnswer", ("network", "proxy")),
    "bad gateway for ever": Trouble(body(PORTAL, 502), "502", ("run again",), 5),
    "HTML that is no XML": Trouble(body(LOGIN), "ForeignAnswer", ("DOCTYPE", "proxy")),
    "XML of somebody else": Trouble(body(b"<x/>"), "ForeignAnswer", ("proxy",)),
    "answer of another operation": Trouble(
        body(in_root("<regionInfo/>").replace(b"Instances", b"Regions")), "ForeignAnswer", ("proxy",)
    ),
    "no reservationSet": Trouble(body(in_root("<requestId>r</requestId>")), "ForeignAnswer", ("proxy",)),
    "instance without its launch time": Trouble(body(LAUNCHED_AT_NO_TIME), "ForeignAnswer", ("incomplete",)),
    "no body": Trouble(body(b""), "IncompleteAnswer", ("cut short",), 3),
    "JSON": Trouble(body(b"{}"), "IncompleteAnswer", ("cut short",), 3),
    "cut short for ever": Trouble({"kind": "truncate"}, "IncompleteAnswer", ("cut short",), 3),
    "dropped for ever": Trouble({"kind": "drop"}, "ConnectionClosedError", ("no connection",), 15),
    "connection ends in the answer": Trouble({"kind": "cut"}, "IncompleteAnswer", ("cut short",), 15),
    "hostile message": Trouble(
        error(403, "UnauthorizedOperation", HOSTILE),
        "UnauthorizedOperation",
        (r"first\nForged: line\x9b31m\u202e",),
    ),
    "hostile message that is no XML": Trouble(
        error(403, "UnauthorizedOperation", "\x1b[2Jgone"), "IncompleteAnswer", ("cut short",), 3
    ),
}
RECOVERIES = {
    "no trouble": {"kind": "slow", "seconds": 0.0},
    "503 twice": error(503, "Unavailable", times=2),
    "throttled twice": error(503, "RequestLimitExceeded", times=2),
    "throttled once on its second page": error(503, "RequestLimitExceeded", skip=1, times=1),
    "cut short once": {"kind": "truncate", "times": 1},
    "cut short once on its second page": {"kind": "truncate", "skip": 1, "times": 1},
    "dropped twice": {"kind": "drop", "times": 2},
    "connection ends in the answer once": {"kind": "cut", "times": 1},
}

REGIONS = (
    "af-south-1", "ap-east-1", "ap-east-2", "ap-northeast-1", "ap-northeast-2", "ap-northeast-3",
    "ap-south-1", "ap-south-2", "ap-southeast-1", "ap-southeast-2", "ap-southeast-3", "ap-southeast-4",
    "ap-southeast-5", "ap-southeast-6", "ap-southeast-7", "ca-central-1", "ca-west-1", "eu-central-1",
    "eu-central-2", "eu-north-1", "eu-south-1", "eu-south-2", "eu-west-1", "eu-west-2", "eu-west-3",
    "il-central-1", "me-central-1", "me-south-1", "mx-central-1", "sa-east-1", "us-east-1", "us-east-2",
    "us-gov-east-1", "us-gov-west-1", "us-west-1", "us-west-2", "cn-north-1",
)  # fmt: skip
PLACES = dict(zip([*TROUBLES, *RECOVERIES], REGIONS, strict=True))


@dataclass(frozen=True)
class Storm:
    """A scan in which every region has its own trouble, after one that had none."""

    ids: dict[str, list[str]]
    before: dict[str, list[tuple[Any, ...]]]
    after: dict[str, list[tuple[Any, ...]]]
    requests: Counter[str]
    result: Result


@pytest.fixture(scope="module")
def storm(aws_server: AwsServer, tmp_path_factory: pytest.TempPathFactory) -> Storm:
    """Scan a world without troubles; put half of it right, let the troubles begin, and scan again."""
    aws, cwd = aws_server, tmp_path_factory.mktemp("storm")
    aws.reset()
    aws.opted_in.update(REGIONS)
    aws.page_size = 1
    ids = {region: aws.launch(region, count=2) for region in REGIONS}
    args = ("scan", "--policy", write_policy(cwd, *REGIONS), *OUTPUTS, "--workers", str(len(REGIONS)))
    run_tagcheck(*args, cwd=cwd, env=aws.env, check=3)
    before = {region: remembered(cwd, region) for region in REGIONS}
    for region in REGIONS:
        aws.tag(region, ids[region][:1], {"Owner": "ann"})
    faults = {why: trouble.fault for why, trouble in TROUBLES.items()} | RECOVERIES
    asked = len(aws.requests)
    for why, fault in faults.items():
        aws.fault(**fault, action="DescribeInstances", region=PLACES[why])
    result = run_tagcheck(*args, cwd=cwd, env=aws.env, check=4, timeout=120)
    requests = Counter(request.region for request in aws.requests[asked:] if request.service == "ec2")
    aws.reset()
    return Storm(ids, before, {region: remembered(cwd, region) for region in REGIONS}, requests, result)


@pytest.mark.parametrize("why", TROUBLES)
def test_region_that_cannot_be_read_in_full_is_said_to_be_unread(storm: Storm, why: str) -> None:
    region, trouble = PLACES[why], TROUBLES[why]
    target = coverage(storm.result)[region]
    assert target["status"] == "unread"
    assert target["error"]["code"] == trouble.code
    for text in trouble.says:
        assert text in target["error"]["message"]
    assert len(target["error"]["message"]) < 600
    assert target["instances"] == target["compliant"] == target["findings"] == 0
    error_text = f"{trouble.code}: {target['error']['message']}"
    assert f"{ACCOUNT_ID} {region}: not read: {error_text}" in storm.result.err
    assert f"  {ACCOUNT_ID} {region}  {error_text}" in storm.result.out
    [row] = [row for row in storm.result.csv("out.csv") if row["Region"] == region]
    assert (row["Status"], row["InstanceId"], row["Error"]) == ("UNREAD", "", error_text)
    junit = ET.parse(storm.result.cwd / "out.xml").getroot()
    [problem] = junit.findall(f"testsuite[@name='{ACCOUNT_ID}.{region}']/testcase/error")
    assert (problem.get("type"), problem.get("message")) == (trouble.code, target["error"]["message"])


@pytest.mark.parametrize("why", TROUBLES)
def test_region_that_cannot_be_read_keeps_its_findings_as_they_were(storm: Storm, why: str) -> None:
    region = PLACES[why]
    assert len(storm.before[region]) == 2
    assert storm.after[region] == storm.before[region]
    assert region not in found(storm.result) | found(storm.result, "resolved")


@pytest.mark.parametrize("why", TROUBLES)
def test_region_that_cannot_be_read_is_not_asked_for_ever(storm: Storm, why: str) -> None:
    assert 1 <= storm.requests[PLACES[why]] <= TROUBLES[why].requests


@pytest.mark.parametrize("why", RECOVERIES)
def test_region_whose_trouble_passes_is_read_in_full(storm: Storm, why: str) -> None:
    region, fault = PLACES[why], RECOVERIES[why]
    tagged, untagged = storm.ids[region]
    target = coverage(storm.result)[region]
    assert (target["status"], target["error"], target["instances"]) == ("read", None, 2)
    assert found(storm.result)[region] == [untagged]
    assert found(storm.result, "resolved")[region] == [tagged]
    assert storm.requests[region] == 2 + fault.get("times", 0)
    assert f"{ACCOUNT_ID} {region}: 2 instances" in storm.result.err
    assert "trying again" not in storm.result.err
    assert not [row for row in storm.result.csv("out.csv") if row["Region"] == region and row["Error"]]


def test_no_output_of_the_storm_holds_a_control_character(storm: Storm) -> None:
    texts = {name: (storm.result.cwd / name).read_text(encoding="utf-8") for name in OUTPUTS[1::2]}
    messages = [str(target["error"]) for target in storm.result.json("out.json")["coverage"]]
    for name, text in texts.items() | {"stdout": storm.result.out, "stderr": storm.result.err}.items():
        bad = [line for line in text.splitlines() if not line.isprintable()]
        assert bad == [], name
        assert not [line for line in text.splitlines() if line.startswith("Forged")], name
    assert all(message.isprintable() for message in messages)


# ---- One trouble at a time ---------------------------------------------------------------------------------


def test_all_regions_fail_and_nothing_counts_as_clean(aws: AwsServer, scan: Scan, tmp_path: Path) -> None:
    regions = (REGION, "eu-west-1")
    for region in regions:
        aws.launch(region)
    scan(*regions, check=3)
    before = remembered(tmp_path)
    aws.fault(**error(403, "UnauthorizedOperation"), action="DescribeInstances")
    result = scan(*regions, check=4)
    assert errors(result) == dict.fromkeys(regions, "UnauthorizedOperation")
    summary = result.json("out.json")["summary"]
    assert (summary["targets"], summary["targets_unread"], summary["resolved"]) == (2, 2, 0)
    assert remembered(tmp_path) == before
    assert [row["Status"] for row in result.csv("out.csv")] == ["UNREAD", "UNREAD"]


def test_error_without_a_message_is_an_error_like_any_other(aws: AwsServer, scan: Scan) -> None:
    aws.fault(**error(403, "UnauthorizedOperation", ""), action="DescribeInstances")
    assert errors(scan(REGION, check=4)) == {REGION: "UnauthorizedOperation"}


@pytest.mark.parametrize(
    ("region", "sts_says"),
    [
        pytest.param("us-west-2", None, id="another region"),
        pytest.param(
            "af-south-1", "InvalidClientTokenId", id="the first region, whose STS knows nobody then"
        ),
    ],
)
def test_region_that_is_not_enabled_costs_no_other_region(
    aws: AwsServer, scan: Scan, region: str, sts_says: str | None
) -> None:
    aws.disabled.add((ACCOUNT_ID, region))
    if sts_says:
        aws.fault("error", service="sts", region=region, status=403, code=sts_says)
    result = scan(region, REGION, check=4)
    assert errors(result) == {region: "AuthFailure", REGION: None}
    assert "enable the region, or remove it from the policy" in result.err


def closed_port() -> str:
    """Give the address of a port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_refused_connections(aws: AwsServer, tagcheck: Callable[..., Result], tmp_path: Path) -> None:
    def run(variable: str) -> Result:
        (cwd := tmp_path / variable).mkdir()
        args = ("scan", "--policy", write_policy(cwd, REGION), *OUTPUTS)
        return tagcheck(*args, cwd=cwd, env=aws.env | {variable: closed_port()})

    with ThreadPoolExecutor() as pool:  # both wait, and most of the time
        no_ec2, no_network = pool.map(run, ("AWS_ENDPOINT_URL_EC2", "AWS_ENDPOINT_URL"))
    assert (no_ec2.code, no_network.code) == (4, 5)
    assert errors(no_ec2) == {REGION: "EndpointConnectionError"}
    assert "check the network" in no_ec2.out
    assert "check the network" in no_network.err
    assert [request.action for request in aws.requests] == ["GetCallerIdentity"]


def test_answer_that_does_not_come_in_time_is_asked_for_again_and_then_an_error(aws: AwsServer) -> None:
    fault = aws.fault("slow", action="DescribeInstances", seconds=60)
    client = aws.client("ec2", REGION, read_timeout=0.2, retries={"total_max_attempts": 1})
    with pytest.raises(script.TargetError, match="check the network") as caught:
        script.call_aws(client, "DescribeInstances")
    assert caught.value.code == "ReadTimeoutError"
    assert fault.hits == 1 + len(script.NETWORK_PAUSES) > 1


def test_answer_that_trickles_is_not_waited_for_to_its_end(
    aws: AwsServer, scan: Scan, tmp_path: Path
) -> None:
    regions = (REGION, "eu-west-1", "us-west-2")
    for region in regions:
        aws.launch(region)
    scan(*regions, check=3)
    before = remembered(tmp_path, REGION) + remembered(tmp_path, "eu-west-1")
    aws.fault("trickle", action="DescribeInstances", region=REGION, seconds=0.2)
    aws.fault("trickle", action="DescribeInstances", region="eu-west-1", seconds=0.2, in_headers=True)
    impatient = script_with(tmp_path, CALL_SECONDS=2.0)
    result = scan(*regions, script=impatient, check=4, process=True)
    assert errors(result) == {REGION: "CallTimeout", "eu-west-1": "CallTimeout", "us-west-2": None}
    assert "check the network" in coverage(result)[REGION]["error"]["message"]
    assert remembered(tmp_path, REGION) + remembered(tmp_path, "eu-west-1") == before
    aws.fault("trickle", action="GetCallerIdentity", seconds=0.2)
    assert "CallTimeout" in scan(REGION, script=impatient, check=5, process=True).err


def test_call_whose_deadline_has_passed_is_not_made(aws: AwsServer) -> None:
    threads = {*threading.enumerate()}
    client = aws.client("ec2", REGION)
    with pytest.raises(script.TargetError) as caught:
        script.call_aws(client, "DescribeInstances", time.monotonic() - 1)
    wait_for_threads(threads)
    assert caught.value.code == "CallTimeout"
    assert aws.requests == []


def test_a_thread_that_is_free_makes_the_next_call() -> None:
    released = threading.Event()
    with pytest.raises(TimeoutError):
        script.within(0.05, released.wait)
    try:
        threads = set()
        for _ in range(20):
            threads.add(script.within(10, threading.current_thread))
            time.sleep(0.01)  # until it waits again
        assert len(threads) == 1
    finally:
        released.set()


def test_interrupt_ends_a_scan_that_waits_for_its_first_answer(aws: AwsServer, tmp_path: Path) -> None:
    fault = aws.fault("trickle", action="GetCallerIdentity", seconds=0.2, in_headers=True)
    command = [sys.executable, str(TAGCHECK), "scan", "--policy", str(write_policy(tmp_path, REGION))]
    with subprocess.Popen(
        command, cwd=tmp_path, env=clean_environment(tmp_path) | aws.env, stderr=subprocess.PIPE
    ) as run:
        for _ in range(300):
            if fault.hits:
                break
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
        assert run.stderr is not None
        assert b"interrupted; nothing was recorded" in run.stderr.read()


# ---- Whose credentials these are ---------------------------------------------------------------------------


def sts_error(status: int, code: str) -> dict[str, Any]:
    """Give the fault of an error of STS."""
    return {"kind": "error", "status": status, "code": code, "message": "No."}


KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
CONFIG = """
[profile broken]
credential_process = /bin/false
[profile half]
aws_access_key_id = testing
"""


@dataclass(frozen=True)
class Credentials:
    """How the credentials of a run are not what they should be."""

    fault: dict[str, Any] | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def scanned(aws_server: AwsServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the directory of a scan that found one instance."""
    cwd = tmp_path_factory.mktemp("scanned")
    aws_server.reset()
    aws_server.launch(REGION)
    args = ("scan", "--policy", write_policy(cwd, REGION), *OUTPUTS)
    run_tagcheck(*args, cwd=cwd, env=aws_server.env, check=3)
    aws_server.reset()
    return cwd


@pytest.mark.parametrize(
    ("credentials", "says"),
    [
        pytest.param(
            Credentials(sts_error(403, "InvalidClientTokenId")), "AWS does not know these", id="unknown key"
        ),
        pytest.param(
            Credentials(sts_error(403, "ExpiredToken")), "have expired: renew them", id="expired token"
        ),
        pytest.param(
            Credentials(sts_error(403, "SignatureDoesNotMatch")),
            "or this machine's clock is",
            id="wrong secret",
        ),
        pytest.param(Credentials(body(PORTAL)), "check the network and the proxy", id="captive portal"),
        pytest.param(
            Credentials(body(b"<x/>")), "check the network and the proxy", id="XML of somebody else"
        ),
        pytest.param(Credentials(unset=KEYS), "set AWS_PROFILE or --profile, run `aws sso login`", id="none"),
        pytest.param(Credentials(unset=KEYS[1:]), "AWS_SECRET_ACCESS_KEY", id="half in the environment"),
        pytest.param(Credentials(args=("--profile", "none")), "profile (none) could", id="unknown profile"),
        pytest.param(
            Credentials(env={"AWS_PROFILE": "none"}), "profile (none) could", id="unknown AWS_PROFILE"
        ),
        pytest.param(Credentials(args=("--profile", "half")), "aws_secret_access_key", id="half a profile"),
        pytest.param(Credentials(args=("--profile", "broken")), "custom-process", id="process that fails"),
        pytest.param(
            Credentials(env={"AWS_CONFIG_FILE": "policy.yaml"}), "policy.yaml", id="config file that is none"
        ),
        pytest.param(Credentials(env={"AWS_ENDPOINT_URL": "nonsense"}), "nonsense", id="no endpoint"),
    ],
)
def test_without_a_caller_nothing_is_scanned(
    aws: AwsServer,
    tagcheck: Callable[..., Result],
    scanned: Path,
    tmp_path: Path,
    credentials: Credentials,
    says: str,
) -> None:
    for file in scanned.iterdir():
        shutil.copy(file, tmp_path)
    before = remembered(tmp_path), (tmp_path / "out.csv").read_bytes()
    (tmp_path / "config").write_text(CONFIG)
    if credentials.fault:
        aws.fault(**credentials.fault, action="GetCallerIdentity")
    env = without(credentials.unset, aws.env) | {"AWS_CONFIG_FILE": "config"} | credentials.env
    args = ("scan", "--policy", "policy.yaml", *OUTPUTS, *credentials.args)
    result = tagcheck(*args, env=env, check=5)
    assert result.err.startswith("tagcheck: ")
    assert says in result.err
    assert result.out == ""
    assert not [request for request in aws.requests if request.service == "ec2"]
    assert len(before[0]) == 1
    assert (remembered(tmp_path), (tmp_path / "out.csv").read_bytes()) == before


MARKER = "MARKERmarker0123"


@pytest.mark.parametrize(
    ("service", "variable", "secret"),
    [
        pytest.param("sts", "AWS_SESSION_TOKEN", f"{MARKER}\n", id="token with a line break"),
        pytest.param("sts", "AWS_SESSION_TOKEN", f"{MARKER}\r\nX: y", id="token with a header"),
        pytest.param("sts", "AWS_SESSION_TOKEN", f"{MARKER}\u20ac", id="token that is not ASCII"),
        pytest.param("sts", "AWS_ACCESS_KEY_ID", f"{MARKER}\n", id="access key with a line break"),
        pytest.param("sts", "AWS_SECRET_ACCESS_KEY", f"{MARKER}\n", id="secret key with a line break"),
        pytest.param("organizations", "AWS_SESSION_TOKEN", f"{MARKER}\n", id="Organizations"),
        pytest.param("s3", "AWS_SESSION_TOKEN", f"{MARKER}\n", id="S3"),
        pytest.param("sns", "AWS_SESSION_TOKEN", f"{MARKER}\n", id="SNS"),
        pytest.param("email", "AWS_SESSION_TOKEN", f"{MARKER}\n", id="SES"),
    ],
)
def test_credentials_that_cannot_be_sent_are_not_printed(
    aws: AwsServer, tagcheck: Callable[..., Result], tmp_path: Path, variable: str, secret: str, service: str
) -> None:
    args: tuple[str, ...] = ()
    keys: dict[str, Any] = {}
    if service == "organizations":
        keys = {"accounts": {"organization": True, "role_name": "r"}}
    elif service == "s3":
        args = ("--state", "s3://bucket/state.db")
    elif service != "sts":
        (tmp_path / "saved.json").write_text(json.dumps(saved(item("i-0a"))))
        args = ("--instances", "saved.json")
        topic = {"topic_arn": f"arn:aws:sns:us-east-1:{ACCOUNT_ID}:topic"}
        email = {"from": "a@example.com", "to": ["b@example.com"]}
        keys = {"notify": {"sns": topic} if service == "sns" else {"email": email}}
    policy = write_policy(tmp_path, REGION, **keys)
    hasty = script_with(tmp_path, NETWORK_PAUSES=(0.01,), S3_TRIES=2)
    env = aws.env | {variable: secret}
    result = tagcheck("scan", "--policy", policy, *OUTPUTS, *args, "--verbose", env=env, script=hasty)
    texts = [file.read_bytes() for file in tmp_path.iterdir()] + [result.out.encode(), result.err.encode()]
    assert not any(MARKER.encode() in text for text in texts)
    if variable != "AWS_SECRET_ACCESS_KEY" and "\n" in secret:
        assert result.code == 5
        assert "InvalidHeader" in result.err
        assert "copy it again" in result.err


# ---- Which regions there are -------------------------------------------------------------------------------


def enable_only(aws: AwsServer, *regions: str) -> None:
    """Disable every other region: to scan two dozen of them takes its time."""
    listed = aws.client("ec2", REGION).describe_regions(AllRegions=True)["Regions"]
    names = {region["RegionName"] for region in listed}
    assert set(regions) <= names
    aws.disabled |= {(ACCOUNT_ID, name) for name in names - set(regions)}
    aws.opted_in |= set(regions)


def test_star_is_every_other_region_that_is_enabled(aws: AwsServer, scan: Scan) -> None:
    enable_only(aws, REGION, "us-west-2", "me-south-1")
    aws.launch("me-south-1")
    aws.launch("us-west-2", {"Team": "web"})
    own = {"regions": {"us-west-2": {"inherit": False, "required_tags": ["Team"]}, "*": None}}
    result = scan(keys=own, check=3)
    assert errors(result) == dict.fromkeys((REGION, "us-west-2", "me-south-1"))
    assert set(found(result)) == {"me-south-1"}


def test_star_is_all_regions_that_need_no_opting_in(aws: AwsServer, scan: Scan) -> None:
    listed = {region["RegionName"] for region in aws.client("ec2", REGION).describe_regions()["Regions"]}
    assert len(listed) > 20
    assert "me-south-1" not in listed
    assert set(coverage(scan("*", check=0))) == listed


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        pytest.param(
            error(403, "UnauthorizedOperation"), "UnauthorizedOperation", "ec2:DescribeRegions", id="denied"
        ),
        pytest.param(body(PORTAL), "ForeignAnswer", "proxy", id="captive portal"),
        pytest.param(
            body(b"<DescribeRegionsResponse><regionInfo/></DescribeRegionsResponse>"),
            "ForeignAnswer",
            "proxy",
            id="no regions",
        ),
        pytest.param(
            body(
                b"<DescribeRegionsResponse><regionInfo><item><regionName>us-east-2</regionName></item></regionInfo>"
                b"</DescribeRegionsResponse>"
            ),
            "ForeignAnswer",
            "proxy",
            id="region that is not whole",
        ),
    ],
)
def test_without_the_list_of_regions_those_named_are_scanned(
    aws: AwsServer, scan: Scan, tmp_path: Path, fault: dict[str, Any], code: str, says: str
) -> None:
    enable_only(aws, REGION, "us-west-2")
    ids = aws.launch(REGION)
    aws.launch("us-west-2")
    scan(REGION, "*", check=3)
    before = remembered(tmp_path, "us-west-2")
    assert len(before) == 1
    aws.fault(**fault, action="DescribeRegions")
    result = scan(REGION, "*", check=4)
    assert errors(result) == {"*": code, REGION: None}
    assert says in coverage(result)["*"]["error"]["message"]
    assert found(result) == {REGION: ids}
    assert remembered(tmp_path, "us-west-2") == before


@pytest.mark.parametrize(
    "statuses",
    [("opted-in", "not-opted-in"), ("not-opted-in", "opted-in"), ("opted-in", "opt-in-not-required")],
    ids=" ".join,
)
def test_region_that_is_listed_twice_is_scanned_if_one_entry_says_it_is_enabled(
    aws: AwsServer, scan: Scan, statuses: tuple[str, str]
) -> None:
    """Read once. If it is disabled after all, EC2 refuses, and that is not taken for a clean region."""
    enable_only(aws, REGION, "me-south-1")
    ids = aws.launch("me-south-1")
    items = [
        f"<item><regionName>{name}</regionName><optInStatus>{status}</optInStatus></item>"
        for name, status in [(REGION, "opt-in-not-required"), *(("me-south-1", each) for each in statuses)]
    ]
    answer = f"<DescribeRegionsResponse><regionInfo>{''.join(items)}</regionInfo></DescribeRegionsResponse>"
    aws.fault(**body(answer.encode()), action="DescribeRegions")
    result = scan("*", check=3)
    assert found(result) == {"me-south-1": ids}
    assert len(aws.calls("DescribeInstances", region="me-south-1")) == 1
    aws.opted_in.clear()
    assert errors(scan("*", check=4)) == {REGION: None, "me-south-1": "AuthFailure"}


def test_one_region_asked_for_needs_no_list_of_them(aws: AwsServer, scan: Scan) -> None:
    result = scan("*", args=("--region", "us-west-2"), check=0)
    assert set(coverage(result)) == {"us-west-2"}
    assert not aws.calls("DescribeRegions")


# ---- Pages and calls ---------------------------------------------------------------------------------------


def test_page_by_page_with_no_call_too_many(aws: AwsServer, scan: Scan) -> None:
    ids = aws.launch(REGION, count=5)
    aws.page_size, aws.empty_pages = 2, 2
    result = scan(REGION, check=3)
    assert found(result) == {REGION: sorted(ids)}
    actions = Counter(request.action for request in aws.requests)
    assert actions == {"GetCallerIdentity": 1, "DescribeInstances": 5}
    assert {request.params["MaxResults"] for request in aws.calls("DescribeInstances")} == {"1000"}
    tokens = [request.params.get("NextToken") for request in aws.calls("DescribeInstances")]
    assert tokens[0] is None
    assert len(set(tokens)) == 5


def test_instance_on_two_pages_is_one_finding(aws: AwsServer, scan: Scan) -> None:
    pages = {None: page_of("i-0a", "i-0b", token="next"), "next": page_of("i-0b", "i-0c")}
    aws.fault("answer", action="DescribeInstances", answer=lambda r: pages[r.params.get("NextToken")])
    result = scan(REGION, check=3)
    assert found(result) == {REGION: ["i-0a", "i-0b", "i-0c"]}
    assert result.json("out.json")["summary"]["instances"] == 3
    assert [row["TimesSeen"] for row in result.csv("out.csv")] == ["1", "1", "1"]


def test_regions_are_read_at_the_same_time(aws: AwsServer, scan: Scan) -> None:
    meeting = threading.Barrier(3)

    def wait_for_the_others(_: Request) -> None:
        meeting.wait(20)

    aws.fault("answer", action="DescribeInstances", answer=wait_for_the_others)
    scan(REGION, "eu-west-1", "us-west-2", check=0)


def test_one_worker_reads_all_regions(aws: AwsServer, scan: Scan) -> None:
    result = scan(REGION, "eu-west-1", "us-west-2", args=("--workers", "1"), check=0)
    assert len(errors(result)) == len(aws.calls("DescribeInstances")) == 3


def test_no_instances_at_all_is_compliant(scan: Scan) -> None:
    result = scan(REGION, check=0)
    assert coverage(result)[REGION]["instances"] == 0
    assert result.csv("out.csv") == []
    assert (result.cwd / "out.csv").read_text().startswith("InstanceId,MissingTags,LaunchTime,")
    assert result.json("out.json")["findings"] == []
    assert ET.parse(result.cwd / "out.xml").getroot().get("failures") == "0"


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        pytest.param(None, {"running", "stopped"}, id="what is terminated cannot be put right"),
        pytest.param(["stopped"], {"stopped"}, id="only those of the policy"),
        pytest.param(["running", "terminated"], {"running", "terminated"}, id="terminated on request"),
    ],
)
def test_only_instances_in_the_states_of_the_policy_are_looked_at(
    aws: AwsServer, scan: Scan, states: list[str] | None, expected: set[str]
) -> None:
    _, stopped, terminated = aws.launch(REGION, count=3)
    aws.backstage("ec2", REGION).stop_instances(InstanceIds=[stopped])
    aws.terminate(REGION, [terminated])
    result = scan(REGION, keys={"states": states} if states else {}, check=3)
    assert {finding["state"] for finding in result.json("out.json")["findings"]} == expected
    assert coverage(result)[REGION]["instances"] == len(expected)


def in_state(state: str) -> Callable[[bytes], bytes]:
    """Give an edit that puts instances into a state."""
    return lambda answer: answer.replace(b"<name>running</name>", f"<name>{state}</name>".encode())


def test_state_that_aws_added_later_is_judged_with_a_notice(aws: AwsServer, scan: Scan) -> None:
    ids = aws.launch(REGION, count=2)
    scan(REGION, keys={"states": ["running"]}, check=3)
    aws.fault("edit", action="DescribeInstances", edit=in_state("hibernating&#x9b;"))
    result = scan(REGION, keys={"states": ["running"]}, check=3)
    assert found(result) == {REGION: sorted(ids)}
    assert found(result, "resolved") == {}
    [notice] = [text for text in result.json("out.json")["notices"] if "hibernating" in text]
    assert notice.startswith("The instance state 'hibernating\\x9b' is new to tagcheck")
    explained = ("explain", "--policy", "policy.yaml", ids[0], "--live", "--region", REGION)
    said = run_tagcheck(*explained, cwd=result.cwd, env=aws.env, check=0).out
    assert "is new to tagcheck" in said
    assert "not checked" not in said


def test_empty_state_is_no_answer_of_ec2(aws: AwsServer, scan: Scan, tmp_path: Path) -> None:
    aws.launch(REGION)
    scan(REGION, check=3)
    before = remembered(tmp_path)
    aws.fault("edit", action="DescribeInstances", edit=in_state(" "))
    assert errors(scan(REGION, check=4)) == {REGION: "ForeignAnswer"}
    assert remembered(tmp_path) == before


# ---- Reading past botocore: the same instances as it reads -------------------------------------------------

ODD_TAGS = {
    "Owner": "Zoë \U0001f469\u200d\U0001f4bb",
    "<&>": "<b>&amp;\"'</b> ]]>",
    " spaces ": "  before and after  ",
    "Empty": "",
    "Blank": " ",
    "Lines": "a\tb\nc",
    "C1": "\x9b31m\u202e\u2028\x7f",
    "aws:autoscaling:groupName": "=1+1",
    "Long": "é" * 256,
}


@pytest.fixture
def ec2(aws: AwsServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the client by which a scan reads a region of the server."""
    for name, value in aws.env.items():
        monkeypatch.setenv(name, value)
    return script.Aws(None, 1).client("ec2", REGION)


def of_boto3(client: Any) -> list[tuple[Any, ...]]:
    """Read instances as boto3 itself does."""
    pages = client.get_paginator("describe_instances").paginate(PaginationConfig={"PageSize": 1000})
    items = [
        item for page in pages for reservation in page["Reservations"] for item in reservation["Instances"]
    ]
    return [
        (
            item["InstanceId"],
            item["State"]["Name"],
            item["LaunchTime"],
            {tag["Key"]: tag["Value"] for tag in item.get("Tags", [])},
        )
        for item in items
    ]


def of_ours(client: Any) -> list[tuple[Any, ...]]:
    """Read instances as a scan does."""
    instances = [instance for page in script.describe_instances(client) for instance in page]
    return [(i.instance_id, i.state, i.launch_time, dict(i.tags)) for i in instances]


@pytest.mark.parametrize("page_size", [None, 2], ids=["one page", "many pages"])
def test_instances_are_those_that_boto3_reads(aws: AwsServer, ec2: Any, page_size: int | None) -> None:
    aws.launch(REGION, ODD_TAGS, count=2)
    aws.launch(REGION)
    for number in range(9):
        aws.launch(REGION, {f"key{n}": f"value{n} {'&' * number}" for n in range(40)})
    stopped, terminated = aws.launch(REGION, {"Name": "ends"}, count=2)
    aws.backstage("ec2", REGION).stop_instances(InstanceIds=[stopped])
    aws.terminate(REGION, [terminated])
    aws.page_size = page_size
    theirs = of_boto3(aws.client("ec2", REGION))
    assert len(theirs) == 14
    assert {state for _, state, _, _ in theirs} == {"running", "stopped", "terminated"}
    assert theirs[0][3] == ODD_TAGS
    assert theirs[2][3] == {}
    assert of_ours(ec2) == theirs


def test_client_has_the_operations_that_are_called_as_botocore_describes_them(ec2: Any) -> None:
    def described(shape: Any) -> Any:
        parts = {"structure": "members", "list": "member"}.get(getattr(shape, "type_name", ""), "")
        inner = getattr(shape, parts) if parts else {}
        inner = inner if isinstance(inner, Mapping) else {"": inner}
        return shape and (shape.name, shape.serialization, {n: described(s) for n, s in inner.items()})

    ours, theirs = (client.meta.service_model for client in (ec2, boto3.client("ec2", REGION)))
    called = {action.partition(":")[2] for action in (*script.READ_ACTIONS, *script.WRITE_ACTIONS)}
    assert {*ours.operation_names} == called
    for name in called:
        for part in ("input_shape", "output_shape"):
            one, other = (getattr(model.operation_model(name), part) for model in (ours, theirs))
            assert described(one) == described(other)


@mock_aws
def test_moto_in_process_gives_instances_and_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.setenv(name, "testing")
    made = boto3.client("ec2", REGION).run_instances(ImageId=IMAGE_ID, MinCount=3, MaxCount=3)
    ids = [instance["InstanceId"] for instance in made["Instances"]]
    ours = script.Aws(None, 1).client("ec2", REGION)
    assert [instance_id for instance_id, *_ in of_ours(ours)] == ids
    assert {REGION, "eu-west-1"} <= set(script.describe_regions(ours))


@pytest.mark.parametrize("piece", [1, 7, 1000], ids=lambda size: f"pieces of {size}")
def test_answer_is_read_the_same_in_whatever_pieces_it_comes(piece: int) -> None:
    xml = page_of("i-0a", "i-0b", token="né&amp;xt")[2]
    stream = io.BytesIO(xml)
    instances, token = script.parse_instances(iter(lambda: stream.read(piece), b""))
    assert ([i.instance_id for i in instances or []], token) == (["i-0a", "i-0b"], "né&xt")


ITEM = (
    "<item><instanceId>{}</instanceId><instanceState><name>running</name></instanceState>"
    "<launchTime>2026-02-24T10:30:45.000Z</launchTime><tagSet>{}</tagSet></item>"
)
TAG = "<item><key>Owner</key><value>{}</value></item>"


def with_items(*items: str, after: str = "") -> bytes:
    """Write a page of DescribeInstances with these instances, and something after them."""
    instances = f"<instancesSet>{''.join(items)}</instancesSet>"
    return in_root(f"<reservationSet><item>{OWNER}{instances}</item></reservationSet>{after}")


def parse(xml: bytes) -> tuple[list[script.Instance] | None, str]:
    """Read an answer as a scan does."""
    return script.parse_instances([xml], ACCOUNT_ID)


@pytest.mark.parametrize(
    ("xml", "says"),
    [
        pytest.param(b"<!DOCTYPE x [<!ENTITY e 'x'>]>" + with_items(), "DOCTYPE", id="DOCTYPE"),
        pytest.param(
            with_items(ITEM.format("i-0a", ""), after="<reservationSet/>"),
            "a second reservationSet",
            id="two lists",
        ),
        pytest.param(
            with_items(after="<nextToken>a</nextToken><nextToken/>"), "a second nextToken", id="two tokens"
        ),
        pytest.param(
            with_items(after="<NextToken>a</NextToken>"), "an unknown <NextToken>", id="capital token"
        ),
        pytest.param(
            with_items(after="<nexttoken>a</nexttoken>"), "an unknown <nexttoken>", id="small token"
        ),
        pytest.param(
            with_items(after="<nextToken>a</nextToken><x:nextToken xmlns:x='urn:x'>b</x:nextToken>"),
            "a second nextToken",
            id="second token, of a namespace",
        ),
        pytest.param(
            with_items(ITEM.format("i-0a", TAG.format("a") + "<item><value>b</value></item>")),
            "a tag without a key",
            id="tag without a key",
        ),
        pytest.param(
            with_items(ITEM.format("i-0a", TAG.format("a") * 2)), "'Owner' twice", id="tag key twice"
        ),
        pytest.param(
            with_items(ITEM.format("i-0a</instanceId><instanceId>i-0b", "")),
            "a second instanceId",
            id="two ids",
        ),
        pytest.param(
            with_items(*(ITEM.format("i-0a", TAG.format(owner)) for owner in ("a", "b"))),
            "i-0a twice",
            id="instance twice, with other tags",
        ),
        pytest.param(
            in_root("<reservationSet><item><instanceSet/></item></reservationSet>"),
            "a reservation without instancesSet",
            id="instances in a list of another name",
        ),
        pytest.param(
            in_root(f"<reservationSet><item>{'<instancesSet/>' * 2}</item></reservationSet>"),
            "a second instancesSet",
            id="two lists of instances",
        ),
        pytest.param(
            with_items(ITEM.format("i-0a<b>7</b>", "")), "an unknown <b>", id="an element within a text"
        ),
        pytest.param(
            with_items(ITEM.format("i-0a", "")[:-7] + "<a>" * 600 + "</a>" * 600 + "</item>"),
            "nested too deeply",
            id="nested too deeply",
        ),
        pytest.param(
            with_items(ITEM.format("i-0a", "").replace("2026-", "1969-")),
            "before 1970",
            id="launched in 1969",
        ),
    ],
)
def test_answer_that_cannot_be_ec2s_is_refused(xml: bytes, says: str) -> None:
    with pytest.raises(script.TargetError, match=says) as caught:
        parse(xml)
    assert caught.value.code == "ForeignAnswer"
    assert "check the network and the proxy" in caught.value.message


WHOLE = with_items(ITEM.format("i-0a", TAG.format("a"))).decode()


def swapped(old: str, new: str) -> bytes:
    """Write a whole answer of one instance in which one text is another."""
    assert old in WHOLE
    return WHOLE.replace(old, new).encode()


@pytest.mark.parametrize(
    ("xml", "says"),
    [
        pytest.param(
            in_root("<reservationSet><html/></reservationSet>"), "unknown <html>", id="HTML in the list"
        ),
        pytest.param(
            in_root("<reservationSet>Log in</reservationSet>"), "text 'Log in'", id="text in the list"
        ),
        pytest.param(in_root("Log in<reservationSet/>"), "text 'Log in'", id="text in the root"),
        pytest.param(in_root("<Errors/><reservationSet/>"), "unknown <Errors>", id="errors and a list"),
        pytest.param(
            in_root("<reservationSet><member/></reservationSet>"),
            "unknown <member>",
            id="no item in the list",
        ),
        pytest.param(with_items("<member/>"), "unknown <member>", id="no item in a reservation"),
        pytest.param(
            with_items(ITEM.format("i-0a", "<member/>")), "unknown <member>", id="no item in the tags"
        ),
        pytest.param(swapped("<value>a</value>", ""), "'Owner' without a value", id="tag without a value"),
        pytest.param(swapped("tagSet", "tags"), "<key> out of place", id="tags of another name"),
        pytest.param(swapped("</tagSet>", "</tagSet><tagSet/>"), "a second tagSet", id="tags twice"),
        *(
            pytest.param(in_root(f"{before}<reservationSet/>{after}"), "an unknown", id=f"end told by {id_}")
            for id_, before, after in (
                ("metadata", "", "<responseMetadata><nextToken>a</nextToken></responseMetadata>"),
                ("a marker", "<marker>a</marker>", ""),
                ("next", "", "<next>a</next>"),
                ("isTruncated", "", "<isTruncated>true</isTruncated>"),
            )
        ),
        pytest.param(
            in_root("<reservationSet><nextToken>a</nextToken></reservationSet>"),
            "unknown <nextToken>",
            id="token in the list",
        ),
        pytest.param(
            swapped("</tagSet>", "</tagSet><nextToken>a</nextToken>"),
            "unknown <nextToken>",
            id="token in an instance",
        ),
        pytest.param(
            swapped("</tagSet>", "</tagSet><more><nextToken>a</nextToken></more>"),
            "<nextToken> out of place",
            id="token in a member that is not read",
        ),
        pytest.param(
            in_root('<reservationSet nextToken="abc"/>'), "an attribute in <reservationSet>", id="attribute"
        ),
        pytest.param(
            swapped(ACCOUNT_ID, OTHER_ACCOUNT), f"account '{OTHER_ACCOUNT}'", id="another account's instance"
        ),
        pytest.param(swapped(OWNER, OWNER * 2), "a second ownerId", id="owner twice"),
        pytest.param(swapped("i-0a", "../../x"), "not an instance id", id="id that is a path"),
        pytest.param(swapped("i-0a", " i-0a "), "not an instance id", id="id with blanks"),
        pytest.param(
            swapped("<tagSet>", "<operator><managed>TRUE</managed></operator><tagSet>"),
            "'TRUE', not true or false",
            id="operator that is neither there nor not",
        ),
    ],
)
def test_list_of_another_grammar_is_refused(xml: bytes, says: str) -> None:
    with pytest.raises(script.TargetError, match=says) as caught:
        parse(xml)
    assert caught.value.code == "ForeignAnswer"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            "<tagSet>", "<newSet><item><a>x</a><name>y</name></item></newSet><tagSet>", id="instance"
        ),
        pytest.param("<instancesSet>", "<new at='1'>x<item/></new><instancesSet>", id="reservation"),
        pytest.param("><", ">\n  <", id="white space"),
    ],
)
def test_members_that_aws_may_add_change_nothing(old: str, new: str) -> None:
    assert parse(swapped(old, new)) == parse(WHOLE.encode())


def test_scan_keeps_the_findings_of_a_region_whose_answer_is_anothers(aws: AwsServer, scan: Scan) -> None:
    aws.launch(REGION)
    scan(REGION, check=3)
    for old, new in ((ACCOUNT_ID, OTHER_ACCOUNT), ("item>", "member>")):
        aws.clear_faults()
        pair = old.encode(), new.encode()
        aws.fault("edit", action="DescribeInstances", edit=lambda xml, pair=pair: xml.replace(*pair))
        result = scan(REGION, check=4)
        assert errors(result) == {REGION: "ForeignAnswer"}
        assert result.json("out.json")["summary"]["resolved"] == 0


def test_instance_twice_in_one_answer_with_the_same_tags_is_one() -> None:
    instances, token = parse(
        with_items(*[ITEM.format("i-0a", TAG.format("a"))] * 2, after="<nextToken>t</nextToken>")
    )
    assert ([instance.instance_id for instance in instances or []], token) == (["i-0a"], "t")


# ---- Hostile answers: any status, any headers and any body -------------------------------------------------

ODD_JSON = (
    *("null", "true", "7", "-1e999", '"x"', '""', "[]", "[7]", "[null]", "{}", '{"x": [{}]}', "9" * 5000),
    *('"\\ud800"', "[" * 50_000, '{"a":' * 5000, "NaN"),
)
ODD_XML = (
    *("<x/>", "<x><y>", "<a>" * 50_000, "<html><br></html>", "<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>"),
    *('<?xml version="1.0" encoding="utf-7"?><x/>', "<x>&#0;</x>", "<x xmlns:a='b'><a:nextToken/></x>"),
)
KEYS_OF_JSON = ("Accounts", "Events", "NextToken", "__type", "message", "Message", "Error", "code")
CODES = (200, 200, 200, 200, 201, 204, 206, 300, 301, 302, 307, 400, 403, 404, 418, 429, 500, 503)
TYPES = ("text/xml", "text/html", "application/json", "application/x-amz-json-1.1", "image/png", "")


def hostile_answers(seed: int, elsewhere: str) -> Iterator[tuple[int, dict[str, str], bytes]]:
    """Give answers that are not AWS's, without end; those that redirect lead elsewhere."""
    chosen = random.Random(seed)

    def xml(depth: int) -> str:
        responses = "DescribeInstancesResponse DescribeRegionsResponse AssumeRoleResult".split()
        names = "Credentials Expiration item Error regionInfo Code Message Account Arn Errors".split()
        name = chosen.choice(responses + names)
        inner = (
            "".join(xml(depth - 1) for _ in range(chosen.randrange(4)))
            if depth
            else chosen.choice(ODD_JSON)[:99]
        )
        return f"<{name}>{inner}</{name}>"

    def text() -> str:
        json_object = {key: json.dumps(key) for key in chosen.sample(KEYS_OF_JSON, 3)}
        members = ", ".join(f"{key}: {chosen.choice(ODD_JSON)}" for key in json_object.values())
        return chosen.choice([chosen.choice(ODD_JSON), chosen.choice(ODD_XML), xml(5), f"{{{members}}}"])

    while True:
        body = text().encode()
        body = chosen.choice(
            [
                *(body, body, body[: len(body) // 2], b"", b"\xef\xbb\xbf" + body, chosen.randbytes(99)),
                *(gzip.compress(body), body.decode().encode("utf-16"), body + b"\0", b"\xff" + body),
            ]
        )
        headers = {"Content-Type": chosen.choice(TYPES), "Location": elsewhere}
        if chosen.random() < 0.2:
            headers["Content-Encoding"] = chosen.choice(["gzip", "br", "x"])
        yield chosen.choice(CODES), headers, body


@dataclass(frozen=True)
class Hostile:
    """Accounts, each of which gets another hostile answer, and a server that nobody should be led to."""

    answers: dict[str, tuple[int, dict[str, str], bytes]]
    elsewhere: AwsServer

    def fault(self, account_of: Callable[[Request], str]) -> dict[str, Any]:
        """Give the fault by which each account gets its answer."""
        return {"kind": "answer", "answer": lambda request: self.answers.get(account_of(request))}


@pytest.fixture
def hostile(aws: AwsServer, request: pytest.FixtureRequest) -> Iterator[Hostile]:
    """Give sixty hostile answers, and many more with --soak."""
    number = 600 if request.config.getoption("soak") else 60
    elsewhere = AwsServer()
    made = hostile_answers(20261124, elsewhere.url)
    yield Hostile({f"3{n:011}": answer for n, answer in zip(range(number), made, strict=False)}, elsewhere)
    assert elsewhere.requests == []
    elsewhere.stop()


def account_signed_for(request: Request) -> str:
    """Tell the account whose credentials a request is signed with."""
    return request.account_id


def account_of_role(request: Request) -> str:
    """Tell the account whose role is asked for."""
    return str(request.params["RoleArn"].split(":")[4])


@pytest.mark.parametrize(
    ("action", "account_of", "regions", "where"),
    [
        pytest.param("DescribeInstances", account_signed_for, (REGION,), REGION, id="DescribeInstances"),
        pytest.param("DescribeRegions", account_signed_for, ("*",), "*", id="DescribeRegions"),
        pytest.param("AssumeRole", account_of_role, (REGION,), "*", id="AssumeRole"),
    ],
)
def test_account_with_a_hostile_answer_is_unread_and_keeps_its_findings(
    aws: AwsServer,
    scan: Scan,
    hostile: Hostile,
    tmp_path: Path,
    action: str,
    account_of: Callable[[Request], str],
    regions: tuple[str, ...],
    where: str,
) -> None:
    enable_only(aws, REGION)
    for name in [name for _, name in aws.disabled]:
        aws.disabled.add((None, name))
    keys = {"accounts": {"ids": [*hostile.answers], "role_name": "r"}}
    shown = aws.fault(
        "answer", action="DescribeInstances", answer=lambda request: page_of("i-0a", owner=request.account_id)
    )
    hasty = script_with(tmp_path, SDK_ATTEMPTS=1, NETWORK_PAUSES=(0.01,))
    scan(*regions, keys=keys, check=3, script=hasty)
    before = remembered(tmp_path)
    assert len(before) == len(hostile.answers)
    shown.times = 0
    aws.fault(**hostile.fault(account_of), action=action)
    aws.fault("answer", action="DescribeInstances", answer=lambda _: page_of())
    result = scan(*regions, keys=keys, check=4, script=hasty)
    targets = {
        target["account_id"]: (target["region"], target["status"])
        for target in result.json("out.json")["coverage"]
    }
    assert targets == dict.fromkeys(hostile.answers, (where, "unread"))
    assert remembered(tmp_path) == before


def test_hostile_answers_of_cloudtrail_cost_only_the_creators(
    aws: AwsServer, scan: Scan, hostile: Hostile, tmp_path: Path
) -> None:
    keys = {"accounts": {"ids": [*hostile.answers], "role_name": "r"}}
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%d").encode()

    def launched_yesterday(request: Request) -> tuple[int, dict[str, str], bytes]:
        status, headers, page = page_of("i-0a", owner=request.account_id)
        return status, headers, page.replace(b"2026-02-24", yesterday)

    aws.fault("answer", action="DescribeInstances", answer=launched_yesterday)
    aws.fault(**hostile.fault(account_signed_for), action="LookupEvents")
    hasty = script_with(tmp_path, SDK_ATTEMPTS=1, NETWORK_PAUSES=(0.01,), LOOKUP_PAUSE=0.01)
    result = scan(REGION, keys=keys, args=("--creators",), check=3, script=hasty)
    creators = [finding["created_by"] for finding in result.json("out.json")["findings"]]
    assert len(creators) == len(hostile.answers)
    assert all(who.startswith("unknown (") for who in creators)
    assert len(aws.calls("LookupEvents")) >= len(creators)


@pytest.mark.parametrize(
    ("service", "action", "ask"),
    [
        pytest.param("sts", "GetCallerIdentity", script.describe_caller, id="GetCallerIdentity"),
        pytest.param("organizations", "ListAccounts", script.describe_accounts, id="ListAccounts"),
    ],
)
def test_hostile_answer_about_the_caller_or_the_accounts_ends_the_run(
    aws: AwsServer,
    hostile: Hostile,
    monkeypatch: pytest.MonkeyPatch,
    service: str,
    action: str,
    ask: Callable[..., Any],
) -> None:
    for name, value in aws.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(script, "SDK_ATTEMPTS", 1)
    monkeypatch.setattr(script, "NETWORK_PAUSES", ())
    client = script.Aws(None, 1).client(service, REGION)
    for answer in hostile.answers.values():
        fault = aws.fault("answer", action=action, answer=lambda _, answer=answer: answer)
        with pytest.raises(script.TagcheckError) as caught:
            ask(client)
        assert caught.value.exit_code == 5
        assert str(caught.value).isprintable()
        assert fault.hits
        aws.clear_faults()


def test_instance_that_moved_to_a_later_page_counts_as_it_was_seen_last(aws: AwsServer, scan: Scan) -> None:
    first = with_items(ITEM.format("i-0a", TAG.format("ann")), after="<nextToken>next</nextToken>")
    pages = {None: first, "next": with_items(ITEM.format("i-0a", ""))}
    aws.fault(
        "answer",
        action="DescribeInstances",
        answer=lambda r: (200, {"Content-Type": "text/xml"}, pages[r.params.get("NextToken")]),
    )
    result = scan(REGION, check=3)
    assert found(result) == {REGION: ["i-0a"]}
    assert result.json("out.json")["summary"]["instances"] == 1


# ---- Saved instances ---------------------------------------------------------------------------------------


def item(instance_id: str, zone: str = "us-east-1a", **keys: Any) -> dict[str, Any]:
    """Write an instance as `aws ec2 describe-instances` prints it, without a tag."""
    return {
        "InstanceId": instance_id,
        "State": {"Code": 16, "Name": "running"},
        "Placement": {"AvailabilityZone": zone},
        "LaunchTime": "2026-02-24T10:30:45+00:00",
    } | keys


def saved(*items: dict[str, Any], owner: str = ACCOUNT_ID, **keys: Any) -> dict[str, Any]:
    """Write an answer of DescribeInstances with one reservation."""
    return {"Reservations": [{"OwnerId": owner, "Instances": list(items)}]} | keys


ScanSaved = Callable[..., Result]


@pytest.fixture
def scan_saved(tagcheck: Callable[..., Result], tmp_path: Path) -> ScanSaved:
    """Give a function that scans these saved answers, without any way to AWS."""

    def run(
        *answers: Any, regions: tuple[str, ...] = (REGION,), args: tuple[str, ...] = (), **options: Any
    ) -> Result:
        files: list[str] = []
        for number, answer in enumerate(answers):
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            (tmp_path / f"saved{number}.json").write_bytes(content)
            files += ["--instances", f"saved{number}.json"]
        policy = write_policy(tmp_path, *regions)
        return tagcheck("scan", "--policy", policy, *OUTPUTS, *files, *args, **options)

    return run


def test_several_files_are_one_scan(scan_saved: ScanSaved) -> None:
    files = [
        saved(item("i-0a"), item("i-0b", Tags=[{"Key": "Owner", "Value": "ann"}])),
        saved(item("i-0a"), item("i-0c", "us-west-2a")),
        saved(item("i-0d"), owner=OTHER_ACCOUNT),
    ]
    result = scan_saved(*files, regions=(REGION, "*"), check=3)
    findings = result.json("out.json")["findings"]
    assert [(f["account_id"], f["region"], f["instance_id"]) for f in findings] == [
        (ACCOUNT_ID, REGION, "i-0a"),
        (ACCOUNT_ID, "us-west-2", "i-0c"),
        (OTHER_ACCOUNT, REGION, "i-0d"),
    ]
    assert result.json("out.json")["summary"]["instances"] == 4


@pytest.mark.parametrize(
    "encoding",
    [
        pytest.param("utf-8", id="as aws prints it"),
        pytest.param("utf-8-sig", id="saved by an editor on Windows"),
        pytest.param("utf-16", id="by > of PowerShell"),
        pytest.param("utf-16-be", id="UTF-16 the other way round"),
    ],
)
def test_saved_answer_in_many_encodings(scan_saved: ScanSaved, tmp_path: Path, encoding: str) -> None:
    answer = saved(item("i-0a", Tags=[{"Key": "Name", "Value": "zoë"}]))
    text = json.dumps(answer, ensure_ascii=False, indent=4).replace("\n", "\r\n")
    content = ("\ufeff" + text if encoding == "utf-16-be" else text).encode(encoding)
    (tmp_path / "saved.json").write_bytes(content)
    [[instance]] = script.load_instances(str(tmp_path / "saved.json"))[0].values()
    assert instance.tags == {"Name": "zoë"}
    result = scan_saved(args=("--instances", "-"), stdin=content, check=3)
    assert [finding["name"] for finding in result.json("out.json")["findings"]] == ["zoë"]


@pytest.mark.parametrize(
    ("zone", "region"),
    [
        pytest.param("us-east-1a", "us-east-1", id="availability zone"),
        pytest.param("ap-southeast-2c", "ap-southeast-2", id="long name"),
        pytest.param("us-gov-west-1a", "us-gov-west-1", id="GovCloud"),
        pytest.param("eu-isoe-west-1a", "eu-isoe-west-1", id="isolated"),
        pytest.param("eusc-de-east-1b", "eusc-de-east-1", id="sovereign"),
        pytest.param("us-east-1-bos-1a", "us-east-1", id="local zone"),
        pytest.param("ap-northeast-1-tpe-1a", "ap-northeast-1", id="local zone abroad"),
        pytest.param("us-east-1-wl1-atl-wlz-1", "us-east-1", id="wavelength zone"),
        pytest.param("eu-west-2-wl2-man-wlz1", "eu-west-2", id="wavelength zone without a dash"),
    ],
)
def test_zone_tells_the_region(zone: str, region: str) -> None:
    assert script.zone_region(zone) == region
    assert script.is_region(region)


def test_local_zone_belongs_to_its_region(scan_saved: ScanSaved) -> None:
    result = scan_saved(saved(item("i-0a", "us-east-1-bos-1a"), item("i-0b")), check=3)
    assert found(result) == {REGION: ["i-0a", "i-0b"]}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("2026-02-24T10:30:45+00:00", id="version 2 of aws"),
        pytest.param("2026-02-24T10:30:45.000Z", id="version 1 of aws"),
        pytest.param("2026-02-24T10:30:45.123456+00:00", id="parts of a second"),
        pytest.param("2026-02-24T10:30:45", id="no time zone"),
        pytest.param("2026-02-24T11:30:45+01:00", id="another time zone"),
    ],
)
def test_launch_time_as_it_was_written(tmp_path: Path, text: str) -> None:
    (tmp_path / "saved.json").write_text(json.dumps(saved(item("i-0a", LaunchTime=text))))
    [[instance]] = script.load_instances(str(tmp_path / "saved.json"))[0].values()
    assert script.utc_text(instance.launch_time) == "2026-02-24T10:30:45Z"


def lacking(*path: str) -> dict[str, Any]:
    """Write a saved instance that lacks something, after one that is whole."""
    broken = item("i-0b")
    inner = broken
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return saved(item("i-0a"), broken)


SECOND = "Reservations[0].Instances[1]: "


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "is not what `aws ec2 describe-instances --output json` prints", id="empty"),
        pytest.param(b"\x00\xff\x80", "is not what", id="binary"),
        pytest.param(b"RESERVATIONS\tr-0a", "is not what", id="--output text"),
        pytest.param(b'{"Reservations": [', "is not what", id="cut short"),
        pytest.param(b"[" * 100_000, "is not what", id="nested too deep"),
        pytest.param([], "instead of an object with Reservations", id="a list, as --query gives"),
        pytest.param("text", "'text' instead of an object with Reservations", id="text"),
        pytest.param({}, "it has no 'Reservations'", id="an answer without the key"),
        pytest.param({"Volumes": []}, "it has no 'Reservations'", id="the answer of another command"),
        pytest.param({"Reservations": None}, "", id="null in place of the reservations"),
        pytest.param({"Reservations": 7}, "", id="a number in place of the reservations"),
        pytest.param({"Reservations": ["r"]}, "", id="text in place of a reservation"),
        pytest.param({"Reservations": [{"Instances": None}]}, "", id="null in place of the instances"),
        pytest.param(
            {"Reservations": [{"OwnerId": ACCOUNT_ID}]},
            "Reservations[0]",
            id="a reservation without Instances",
        ),
        pytest.param({"Reservations": [{"Instances": [item("i-0a")]}]}, "'OwnerId'", id="no owner"),
        pytest.param(
            saved(item("i-0a"), owner="1234"), "is not an account id", id="an owner that is no account"
        ),
        pytest.param(saved(item("i-0a"), 7), SECOND, id="a number in place of an instance"),  # type: ignore[arg-type]
        pytest.param(saved(item("i-0a"), item("")), SECOND, id="an empty id"),
        pytest.param(lacking("InstanceId"), SECOND + "it has no 'InstanceId'", id="no id"),
        pytest.param(lacking("State", "Name"), SECOND + "it has no 'Name'", id="no state"),
        pytest.param(lacking("LaunchTime"), SECOND + "it has no 'LaunchTime'", id="no launch time"),
        pytest.param(lacking("Placement"), SECOND + "it has no 'Placement'", id="no placement"),
        pytest.param(saved(item("i-0a"), item("i-0b", "nowhere")), SECOND + "'nowhere' is not", id="no zone"),
        pytest.param(saved(item("i-0a"), item("i-0b", LaunchTime="soon")), SECOND, id="no time"),
        pytest.param(saved(item("i-0a"), item("i-0b", Tags={"Owner": "x"})), SECOND, id="tags as a mapping"),
        pytest.param(saved(item("i-0a"), item("i-0b", Tags=None)), SECOND, id="null in place of the tags"),
        pytest.param(
            saved(item("i-0a"), item("i-0b", Tags=[{"Key": "Owner", "Value": 7}])),
            SECOND,
            id="a number as value",
        ),
        pytest.param(
            saved(item("i-0a"), item("i-0b", Tags=[{"Key": "Owner", "Value": None}])),
            SECOND,
            id="null as value",
        ),
        pytest.param(saved(item("i-0a"), item("i-0b", InstanceId=7)), SECOND, id="a number as id"),
        pytest.param(
            b'{"Reservations": [], "Reservations": []}', "'Reservations' appears twice", id="a key twice"
        ),
        pytest.param(
            json.dumps(saved(item("i-0a"))).replace("{", '{"Tags": [], "Tags": [],', 3).encode(),
            "'Tags' appears twice",
            id="a key twice in an instance",
        ),
        pytest.param(b'{"Reservations": [], "x": NaN}', "NaN is not JSON", id="NaN"),
        pytest.param(
            saved(item("i-0a"), NextToken=7), "its NextToken is 7, not text", id="a number as token"
        ),
        pytest.param(
            saved(item("i-0a"), nextToken="a"), "NextToken: the key 'nextToken' instead of", id="small token"
        ),
        pytest.param(saved(item("i-0a"), item("i-0b", State={"Name": ""})), SECOND, id="an empty state"),
        pytest.param(saved(item("i-0a"), item("i-0b", State="running")), SECOND, id="text as state"),
        pytest.param(saved(item("i-0a"), item("i-0b", Placement=[])), SECOND, id="a list as placement"),
        pytest.param(
            saved(item("i-0a"), item("i-0b", LaunchTime=7)), SECOND + "its LaunchTime", id="a number as time"
        ),
        pytest.param(
            saved(item("i-0a"), item("i-0b", LaunchTime="0001-01-01T00:00:00Z")),
            SECOND + "launched",
            id="year 1",
        ),
        pytest.param(saved(item("i-0a"), item("i-0b", IamInstanceProfile="p")), SECOND, id="text as profile"),
        pytest.param(
            saved(item("i-0a"), item("i-0b", Tags=[{"Value": "a"}])), SECOND, id="a tag without a key"
        ),
        pytest.param(
            saved(item("i-0a"), item("i-0b", Tags=[{"Key": "", "Value": "a"}])),
            SECOND,
            id="a tag with an empty key",
        ),
        pytest.param(
            saved(item("i-0a"), item("i-0b", Tags=[{"Key": "Owner", "Value": v} for v in "ab"])),
            SECOND + "it has the tag key 'Owner' twice",
            id="a tag key twice",
        ),
        pytest.param(
            saved(item("i-0a"), item("i-0b", Tags=[{"Key": "Owner", "Value": "\ud800"}])),
            SECOND + "its Value '\\ud800' holds half a character",
            id="a lone surrogate",
        ),
        pytest.param(
            json.dumps(
                saved(item("i-0a", Tags=[{"Key": "Owner", "Value": "\ud800"}])), ensure_ascii=False
            ).encode("utf-8", "surrogatepass"),
            "is not what",
            id="a lone surrogate in UTF-8",
        ),
    ],
)
def test_file_that_is_no_saved_answer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / "saved.json").write_bytes(text)
    with pytest.raises(script.UsageError) as caught:
        script.load_instances("saved.json")
    assert "saved.json" in str(caught.value)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


def test_one_wrong_file_is_a_usage_error_and_nothing_is_recorded(
    scan_saved: ScanSaved, tmp_path: Path
) -> None:
    result = scan_saved(saved(item("i-0a")), b"[]", check=2)
    assert result.err.startswith("tagcheck: saved1.json is not what")
    assert not (tmp_path / "out.csv").exists()
    assert remembered(tmp_path) == []


@pytest.mark.parametrize("command", ["scan", "explain"])
def test_files_that_contradict_each_other_are_refused(
    scan_saved: ScanSaved, tagcheck: Callable[..., Result], command: str
) -> None:
    owners = [saved(item("i-0a", Tags=[{"Key": "Owner", "Value": value}])) for value in ("ann", "bob")]
    result = scan_saved(*owners, check=2)
    if command == "explain":
        files = ("--instances", "saved0.json", "--instances", "saved1.json")
        result = tagcheck("explain", "--policy", "policy.yaml", "i-0a", *files, check=2)
    assert (
        "i-0a in 123456789012 us-east-1 is in saved0.json and in saved1.json, with other tags" in result.err
    )


def test_file_that_contradicts_itself_is_refused(scan_saved: ScanSaved) -> None:
    twice = saved(item("i-0a"), item("i-0a", Tags=[{"Key": "Owner", "Value": "ann"}]))
    assert "is twice in saved0.json, with other tags" in scan_saved(twice, check=2).err


@pytest.mark.parametrize("name", ["none.json", "."], ids=["not there", "a directory"])
def test_file_that_cannot_be_read_is_refused(scan_saved: ScanSaved, name: str) -> None:
    err = scan_saved(args=("--instances", name), check=2).err
    assert f"cannot read {name}: " in err
    assert "; name each file with --instances FILE" in err


def test_part_of_an_answer_is_not_the_whole(scan_saved: ScanSaved, tmp_path: Path) -> None:
    scan_saved(saved(item("i-0a"), item("i-0b")), check=3)
    before = remembered(tmp_path)
    result = scan_saved(saved(item("i-0a"), NextToken="eyJ"), check=4)
    assert errors(result) == {REGION: "Truncated"}
    assert "saved0.json has a NextToken" in coverage(result)[REGION]["error"]["message"]
    assert remembered(tmp_path) == before


def test_instances_out_of_scope_are_left_out_with_a_word(scan_saved: ScanSaved) -> None:
    result = scan_saved(saved(item("i-0a"), item("i-0b", "eu-west-1b"), item("i-0c", "eu-west-1c")), check=3)
    assert found(result) == {REGION: ["i-0a"]}
    assert f"2 instances left out, not in scope: {ACCOUNT_ID} eu-west-1" in result.err


def test_region_that_no_file_has_is_not_read(scan_saved: ScanSaved, tmp_path: Path) -> None:
    both = (REGION, "us-west-2")
    scan_saved(saved(item("i-0a"), item("i-0b", "us-west-2b")), regions=both, check=3)
    before = remembered(tmp_path, "us-west-2")
    result = scan_saved(saved(item("i-0a")), regions=both, check=4)
    assert errors(result) == {REGION: None, "us-west-2": "NotInFiles"}
    told = coverage(result)["us-west-2"]["error"]["message"]
    assert told.endswith("if it has none, repeat --region for each region that the files cover")
    assert remembered(tmp_path, "us-west-2") == before
    args = ("--region", REGION, "--region", "us-west-2")
    result = scan_saved(saved(item("i-0a")), regions=both, args=args, check=3)
    assert errors(result) == {REGION: None, "us-west-2": None}
    assert found(result, "resolved") == {"us-west-2": ["i-0b"]}


def test_files_without_an_instance_need_an_account(scan_saved: ScanSaved) -> None:
    assert "with --account ID" in scan_saved({"Reservations": []}, check=2).err
    known = ("--account", ACCOUNT_ID)
    result = scan_saved({"Reservations": []}, args=known, check=4)
    assert errors(result) == {REGION: "NotInFiles"}
    result = scan_saved({"Reservations": []}, args=(*known, "--region", REGION), check=0)
    assert errors(result) == {REGION: None}


def test_saved_instances_need_neither_boto3_nor_credentials(scan_saved: ScanSaved, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("boto3", "botocore"):
        (packages / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')")
    env = {"PYTHONPATH": str(packages), "AWS_PROFILE": "none", "AWS_CONFIG_FILE": os.devnull}
    result = scan_saved(saved(item("i-0a")), env=env, check=3)
    assert found(result) == {REGION: ["i-0a"]}
