"""Measure what a scan costs, beside a plain boto3 loop over the same fleet.

The fleet is made up, and a process of its own serves it from 127.0.0.1 with its pages ready, so that what is
measured is the reader. Figures are printed, never asserted; but a run that did not find what is there fails.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import re
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from subprocess import DEVNULL, PIPE, Popen
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl
from xml.etree import ElementTree

BENCHMARK = Path(__file__).resolve()
TAGCHECK = BENCHMARK.parent.parent / "tagcheck.py"
OWN_ACCOUNT = "123456789012"
ROLE_NAME = "tagcheck-read"
REGIONS = (
    "us-east-1 us-east-2 us-west-2 eu-west-1 eu-central-1 ap-south-1 sa-east-1 us-west-1 ca-central-1 "
    "eu-west-2 eu-west-3 eu-north-1 ap-northeast-1 ap-northeast-2 ap-northeast-3 "
    "ap-southeast-1 ap-southeast-2"
).split()
REQUIRED_TAGS = ["Owner", "CostCenter", "Project"]
COST_CENTERS = [f"CC-{n}" for n in range(1000, 1006)]
PAGE_SIZE = 1000  # the most that EC2 puts on a page
SAVED_INSTANCES = 50
SHORT_RUNS = 5  # so many times a round for what takes less than a second
CSV_NAME, STAGES_NAME = "violators.csv", "stages.json"


# ---- The fleet: SHAPES, Fleet, instance_tags, instance_items -----------------------------------------------

# How many Auto Scaling groups a fleet has. "pages": a hundred on each page, and every third instance is in
# violation. "groups": 200 in all, whatever the size, in one subnet, and every second instance is.
SHAPES = {"pages": 0, "groups": 200}


@dataclass(frozen=True)
class Fleet:
    """So many instances, spread evenly over every region of every account."""

    instances: int
    regions: int
    accounts: int
    groups: int = 0

    def region_names(self) -> list[str]:
        """The regions, which are the same in every account."""
        return REGIONS[: self.regions]

    def account_ids(self) -> list[str]:
        """The account of the credentials, then those that a role has to be assumed in."""
        return [OWN_ACCOUNT, *(str(200_000_000_000 + n) for n in range(1, self.accounts))]

    @cached_property
    def targets(self) -> dict[tuple[str, str], int]:
        """The number of instances in each account and region."""
        targets = [(account, region) for account in self.account_ids() for region in self.region_names()]
        share, rest = divmod(self.instances, len(targets))
        return {target: share + (n < rest) for n, target in enumerate(targets)}

    def groups_in(self, number: int) -> int:
        """The number of groups in a target, at least one; 0 if each page has its own."""
        return self.groups and max(1, len(range(number, self.groups, len(self.targets))))

    def findings_among(self, count: int) -> int:
        """The number of violating ones among a target's first so many instances."""
        pages, rest = divmod(count, PAGE_SIZE)
        return pages * len(violating(PAGE_SIZE, self.groups)) + len(violating(rest, self.groups))

    def findings(self) -> int:
        """The number of instances that violate the policy."""
        return sum(map(self.findings_among, self.targets.values()))


def violating(count: int, groups: int) -> range:
    """The violating ones among the first instances of a page."""
    return range(0, count, 2 if groups else 3)


# What is wrong with the tags of a violating instance; None is a missing tag.
LAPSES: list[dict[str, str | None]] = [
    {"Owner": None},
    {"Owner": ""},
    {"CostCenter": None},
    {"CostCenter": None, "Project": None},
    {"Owner": None, "owner": "payments"},
    {"CostCenter": "CC-9999"},  # only in the shape "groups", whose policy lists the values
]


def group_number(n: int, groups: int) -> int:
    """The group of the n-th instance on a page; a violating one is in that of the next, which complies."""
    return n // 2 % groups if groups else n // 60 * 6 + n % 6


def instance_tags(n: int, groups: int = 0) -> dict[str, str]:
    """The tags of the n-th instance on a page of a target with so many groups."""
    team_number, number = group_number(n, groups) % 6, group_number(n, groups) // 6
    team = ["payments", "search", "identity", "logistics", "data-platform", "mobile"][team_number]
    place, hexadecimal = ("ACCOUNT-REGION", "0" * 9) if groups else ("PAGENUMBR", "PAGENUMBR")
    tags: dict[str, str | None] = {
        "Name": f"{team}-worker-{n:04d}",
        "Owner": f"{team}@example.com",
        "CostCenter": COST_CENTERS[team_number],
        "Project": f"{team}-{'migration' if number % 2 else 'run'}",
        "Environment": ["prod", "test", "dev"][n // 3 % 3],
        "Backup": "daily; keep 35 days",
        "aws:autoscaling:groupName": f"{team}-workers-{number}-{place}",
        "aws:ec2launchtemplate:id": f"lt-{team_number:02}{number:02}01234{hexadecimal}",
        "aws:ec2launchtemplate:version": str(1 + n % 30),
    }
    lapses = LAPSES if groups else LAPSES[:-1]
    lapse = lapses[n // 3 % len(lapses)] if n in violating(PAGE_SIZE, groups) else {}
    return {key: value for key, value in (tags | lapse).items() if value is not None}


# {…} is filled in once for each position on a page; PAGENUMBR, ACCOUNT and REGION on every page that is sent.
INSTANCE = """
<item><reservationId>r-PAGENUMBR{n:08x}</reservationId><ownerId>ACCOUNT</ownerId><groupSet/><instancesSet><item>
<instanceId>i-PAGENUMBR{n:08x}</instanceId><imageId>ami-0a1b2c3d4e5f60718</imageId><instanceState><code>16</code>
<name>running</name></instanceState><privateDnsName>ip-10-20-1-{n}.REGION.compute.internal</privateDnsName><dnsName/>
<reason/><keyName>workers</keyName><amiLaunchIndex>0</amiLaunchIndex><productCodes/><instanceType>m7g.2xlarge</instanceType>
<launchTime>2026-02-24T10:30:45.000Z</launchTime><placement><availabilityZone>REGIONa</availabilityZone><groupName/>
<tenancy>default</tenancy></placement><monitoring><state>disabled</state></monitoring>
<subnetId>subnet-0f1e2d3c4b5a6{zone:04}</subnetId><vpcId>vpc-01234567890abcdef</vpcId>
<privateIpAddress>10.20.1.{n}</privateIpAddress><sourceDestCheck>true</sourceDestCheck><groupSet><item>
<groupId>sg-0aa11bb22cc33dd44</groupId><groupName>workers</groupName></item></groupSet>
<architecture>arm64</architecture><rootDeviceType>ebs</rootDeviceType><rootDeviceName>/dev/xvda</rootDeviceName>
<blockDeviceMapping><item><deviceName>/dev/xvda</deviceName><ebs><volumeId>vol-PAGENUMBR0{n:07x}</volumeId>
<status>attached</status><attachTime>2026-02-24T10:30:46.000Z</attachTime><deleteOnTermination>true</deleteOnTermination>
</ebs></item><item><deviceName>/dev/sdf</deviceName><ebs><volumeId>vol-PAGENUMBR1{n:07x}</volumeId>
<status>attached</status><attachTime>2026-02-24T10:30:46.000Z</attachTime><deleteOnTermination>true</deleteOnTermination>
</ebs></item></blockDeviceMapping><virtualizationType>hvm</virtualizationType>
<clientToken>fleet-PAGENUMBR{n:08x}</clientToken><tagSet/><hypervisor>xen</hypervisor><networkInterfaceSet><item>
<networkInterfaceId>eni-PAGENUMBR{n:08x}</networkInterfaceId><subnetId>subnet-0f1e2d3c4b5a6{zone:04}</subnetId>
<vpcId>vpc-01234567890abcdef</vpcId><description/><ownerId>ACCOUNT</ownerId><status>in-use</status>
<macAddress>02:4f:5c:00:00:01</macAddress><privateIpAddress>10.20.1.{n}</privateIpAddress>
<privateDnsName>ip-10-20-1-{n}.REGION.compute.internal</privateDnsName><sourceDestCheck>true</sourceDestCheck><groupSet>
<item><groupId>sg-0aa11bb22cc33dd44</groupId><groupName>workers</groupName></item></groupSet><attachment>
<attachmentId>eni-attach-PAGENUMBR{n:08x}</attachmentId><deviceIndex>0</deviceIndex><status>attached</status>
<attachTime>2026-02-24T10:30:45.000Z</attachTime><deleteOnTermination>true</deleteOnTermination>
<networkCardIndex>0</networkCardIndex></attachment><privateIpAddressesSet><item>
<privateIpAddress>10.20.1.{n}</privateIpAddress><privateDnsName>ip-10-20-1-{n}.REGION.compute.internal</privateDnsName>
<primary>true</primary></item></privateIpAddressesSet><ipv6AddressesSet/><interfaceType>interface</interfaceType></item>
</networkInterfaceSet><iamInstanceProfile><arn>arn:aws:iam::ACCOUNT:instance-profile/worker-{team}</arn>
<id>AIPA0123456789ABCDEFG</id></iamInstanceProfile><ebsOptimized>true</ebsOptimized><cpuOptions><coreCount>8</coreCount>
<threadsPerCore>1</threadsPerCore></cpuOptions><capacityReservationSpecification>
<capacityReservationPreference>open</capacityReservationPreference></capacityReservationSpecification>
<hibernationOptions><configured>false</configured></hibernationOptions><metadataOptions><state>applied</state>
<httpTokens>required</httpTokens><httpPutResponseHopLimit>2</httpPutResponseHopLimit><httpEndpoint>enabled</httpEndpoint>
</metadataOptions><enclaveOptions><enabled>false</enabled></enclaveOptions><maintenanceOptions>
<autoRecovery>default</autoRecovery></maintenanceOptions><privateDnsNameOptions><hostnameType>ip-name</hostnameType>
<enableResourceNameDnsARecord>false</enableResourceNameDnsARecord></privateDnsNameOptions></item></instancesSet></item>
"""

PAGE = b"""<?xml version="1.0" encoding="UTF-8"?>
<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">
    <requestId>00000000-0000-4000-8000-%012x</requestId><reservationSet>
%b    </reservationSet>
%b</DescribeInstancesResponse>"""


@cache
def instance_items(groups: int) -> list[bytes]:
    """The reservations of one page, indented (by less than EC2 does, to keep an instance near 5 KB)."""
    items = []
    for n in range(PAGE_SIZE):
        team, zone = group_number(n, groups) % 6, 0 if groups else n % 3
        item = ElementTree.fromstring(INSTANCE.format(n=n, team=team, zone=zone))
        tag_set = next(item.iter("tagSet"))
        for key, value in instance_tags(n, groups).items():
            tag = ElementTree.SubElement(tag_set, "item")
            ElementTree.SubElement(tag, "key").text = key
            ElementTree.SubElement(tag, "value").text = value
        ElementTree.indent(item, space=" ", level=2)
        items.append(b"  " + ElementTree.tostring(item).replace(b" />", b"/>") + b"\n")
    return items


# ---- The server: SHORT_ANSWERS, describe_instances, answer, run_server -------------------------------------

SHORT_ANSWERS = {
    "DescribeRegions": "<DescribeRegionsResponse><regionInfo>{regions}"
    "</regionInfo></DescribeRegionsResponse>",
    "GetCallerIdentity": "<GetCallerIdentityResponse><GetCallerIdentityResult><Account>{account}</Account>"
    "<Arn>arn:aws:iam::{account}:user/benchmark</Arn><UserId>AIDABENCHMARK</UserId>"
    "</GetCallerIdentityResult></GetCallerIdentityResponse>",
    "AssumeRole": "<AssumeRoleResponse><AssumeRoleResult><Credentials>"
    "<AccessKeyId>ASIA{role_account}</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>"
    "<SessionToken>token</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>"
    "<AssumedRoleUser><Arn>arn:aws:sts::{role_account}:assumed-role/benchmark/tagcheck</Arn></AssumedRoleUser>"
    "</AssumeRoleResult></AssumeRoleResponse>",
    "ListAccounts": '{{"Accounts": [{accounts}]}}',
}


def describe_instances(fleet: Fleet, account: str, region: str, form: dict[str, str]) -> bytes:
    """A page of one target; it never reaches over a multiple of PAGE_SIZE, so that one template is enough."""
    count, target = fleet.targets[account, region], list(fleet.targets).index((account, region))
    start = int(form.get("NextToken", 0))
    page, first = divmod(start, PAGE_SIZE)
    end = min(start + int(form.get("MaxResults", PAGE_SIZE)), (page + 1) * PAGE_SIZE, count)
    page_number = target * 0x10000 + page
    items = b"".join(instance_items(fleet.groups_in(target))[first : first + end - start])
    for marker, text in [("PAGENUMBR", f"{page_number:09x}"), ("ACCOUNT", account), ("REGION", region)]:
        items = items.replace(marker.encode(), text.encode())
    token = b"    <nextToken>%d</nextToken>\n" % end if end < count else b""
    return PAGE % (page_number, items, token)


# What remediation asks and writes: the tags of each instance, and each call with its time and its instances.
TAGS: dict[str, dict[str, str]] = defaultdict(dict)
TAG_CALLS: list[tuple[float, str, str, list[str]]] = []
TAGGED_INSTANCE = (
    "<item><ownerId>{account}</ownerId><instancesSet><item><instanceId>{id}</instanceId>"
    "<instanceState><name>running</name></instanceState><launchTime>2026-02-24T10:30:45.000Z</launchTime>"
    "<tagSet>{tags}</tagSet></item></instancesSet></item>"
)


def answer_remediation(action: str, account: str, region: str, form: dict[str, str]) -> bytes:
    """The body of a response to one of the calls of remediation, which is kept."""
    if action == "ListTagCalls":
        return json.dumps(TAG_CALLS).encode()
    ids = [value for name, value in form.items() if name.startswith(("ResourceId.", "InstanceId."))]
    TAG_CALLS.append((time.time(), action, f"{account} {region}", ids))
    if action == "CreateTags":
        for instance_id in ids:
            TAGS[instance_id][form["Tag.1.Key"]] = form["Tag.1.Value"]
        return b"<CreateTagsResponse><requestId>r</requestId><return>true</return></CreateTagsResponse>"
    items = ""
    for id_ in ids:
        tags = "".join(f"<item><key>{k}</key><value>{v}</value></item>" for k, v in TAGS[id_].items())
        items += TAGGED_INSTANCE.format(account=account, id=id_, tags=tags)
    return PAGE % (0, items.encode(), b"")


def answer(fleet: Fleet, action: str, account: str, region: str, form: dict[str, str]) -> bytes:
    """The body of a response; a KeyError is an action or a target that is not here."""
    if action in ("CreateTags", "ListTagCalls") or "InstanceId.1" in form:
        return answer_remediation(action, account, region, form)
    if action == "DescribeInstances":
        return describe_instances(fleet, account, region, form)
    opted_in = "<optInStatus>opt-in-not-required</optInStatus>"
    regions = (f"<item><regionName>{name}</regionName>{opted_in}</item>" for name in fleet.region_names())
    accounts = (f'{{"Id": "{account_id}", "Status": "ACTIVE"}}' for account_id in fleet.account_ids())
    role_account = form.get("RoleArn", "::::").split(":")[4]
    lists = {"regions": "".join(regions), "accounts": ", ".join(accounts)}
    return SHORT_ANSWERS[action].format(account=account, role_account=role_account, **lists).encode()


def run_server(fleet: Fleet, latency_ms: str) -> None:
    """Answer on a free port, which is printed first, until stdin ends: also when the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body leave together

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            target = self.headers.get("X-Amz-Target")  # how a JSON service, Organizations, names its action
            form = {} if target else dict(parse_qsl(body))
            action = target.rpartition(".")[2] if target else form["Action"]
            key, _, region, *_ = self.headers["Authorization"].partition("Credential=")[2].split("/")
            account = key.removeprefix("ASIA") if key.startswith("ASIA") else OWN_ACCOUNT
            time.sleep(int(latency_ms) / 1000)
            try:
                status, content = 200, answer(fleet, action, account, region, form)
            except KeyError as error:
                message = f"<Error><Code>NotInThisFleet</Code><Message>{error}</Message></Error>"
                status, content = 400, f"<Response><Errors>{message}</Errors></Response>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            """Nothing: a log would be written to the figures."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # a client that was stopped is no error
                super().handle_error(request, client_address)

    for groups in set(map(fleet.groups_in, range(len(fleet.targets)))):
        instance_items(groups)
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()
        server.shutdown()


# ---- Beside it: run_plain, run_save ------------------------------------------------------------------------


def failing(tags: dict[str, str]) -> str:
    """The required tags that have no value; a cost center has to exist, too."""
    exists = tags.get("CostCenter") in COST_CENTERS
    return ",".join(key for key in REQUIRED_TAGS if not (exists if key == "CostCenter" else tags.get(key)))


def run_plain(fleet: Fleet, csv_path: str) -> None:
    """The loop that anyone would write first: the paginator, a commit for each finding, a CSV."""
    import boto3

    sts = boto3.client("sts", region_name=REGIONS[0])
    rows = []
    with closing(sqlite3.connect("plain.db")) as database:
        database.execute("CREATE TABLE IF NOT EXISTS findings (id TEXT PRIMARY KEY, missing, launched)")
        for account in fleet.account_ids():
            session = boto3.Session()
            if account != OWN_ACCOUNT:
                role_arn = f"arn:aws:iam::{account}:role/{ROLE_NAME}"
                keys = sts.assume_role(RoleArn=role_arn, RoleSessionName="plain")["Credentials"]
                session = boto3.Session(keys["AccessKeyId"], keys["SecretAccessKey"], keys["SessionToken"])
            for region in fleet.region_names():
                paginator = session.client("ec2", region_name=region).get_paginator("describe_instances")
                for page in paginator.paginate(PaginationConfig={"PageSize": PAGE_SIZE}):
                    for reservation in page["Reservations"]:
                        for instance in reservation["Instances"]:
                            tags = {tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])}
                            if missing := failing(tags):
                                rows.append((instance["InstanceId"], missing, str(instance["LaunchTime"])))
                                database.execute("INSERT OR REPLACE INTO findings VALUES (?, ?, ?)", rows[-1])
                                database.commit()
    with open(csv_path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("InstanceId", "MissingTags", "LaunchTime"), *rows])


def run_save(fleet: Fleet, json_path: str) -> None:
    """Save a few instances of the first region as `aws ec2 describe-instances` prints them."""
    import boto3

    page = boto3.client("ec2", region_name=REGIONS[0]).describe_instances(MaxResults=SAVED_INSTANCES)
    text = json.dumps({"Reservations": page["Reservations"]}, indent=4, default=datetime.isoformat)
    Path(json_path).write_text(text, encoding="utf-8")


# ---- Stages of a scan: STAGES, run_stages ------------------------------------------------------------------

SCAN = ["scan", "-q", "--policy", "../policy.yaml", "--csv", CSV_NAME, "--state"]

# What the time of a thread counts for outside of the functions below: all but the main thread read.
READING, REST = "clients, HTTP", "the rest"
OWN, LOADING, EXIT = "start of benchmark", "compile, import", "after main"
BODY = "within record_scan"  # the reports are queried and written there
# The functions of tagcheck whose CPU time is counted, by stage. A scan has to call all of them.
STAGES = {
    LOADING: "start",
    READING: "reading",
    "parse_instances": "reading",
    "judge": "judging",
    "add_sightings": "collecting",
    "add_suggestions": "suggestions",
    "record_scan": "recording",
    BODY: "reports",
    "publish_report": "reports",
    REST: "main thread",
    EXIT: "exit",
}


def load_tagcheck() -> Any:
    """The module that is measured, compiled anew: a script has no cache."""
    module = sys.modules["tagcheck"] = ModuleType("tagcheck")
    module.__file__ = str(TAGCHECK)
    exec(compile(TAGCHECK.read_bytes(), TAGCHECK, "exec"), vars(module))
    return module


def run_stages(fleet: Fleet, state: str) -> None:
    """Scan in this process, write the CPU seconds of each part of STAGES up to here, and exit as the scan."""
    seconds: dict[str, float] = defaultdict(float, {OWN: time.thread_time()})
    current, lock = {threading.get_ident(): REST}, threading.Lock()

    @contextmanager
    def counting(name: str) -> Iterator[None]:
        thread = threading.get_ident()
        outer, current[thread] = current.get(thread, READING), name
        begun = time.thread_time()
        try:
            yield
        finally:
            used, current[thread] = time.thread_time() - begun, outer
            with lock:
                seconds[name] += used
                seconds[outer] -= used  # a function within another counts for itself alone

    @contextmanager
    def record_scan(record: Callable[..., Any], *arguments: Any) -> Iterator[None]:
        with counting("record_scan"), record(*arguments), counting(BODY):
            yield

    with counting(LOADING):
        tagcheck = load_tagcheck()
    for name in filter(str.isidentifier, STAGES):
        function = getattr(tagcheck, name, None)
        if function is None:
            sys.exit(f"tagcheck has no {name}: name in STAGES what does its work now")
        counted = counting(name)(function)
        setattr(tagcheck, name, partial(record_scan, function) if name == "record_scan" else counted)
    gc.set_threshold(100_000, 50, 1000)  # as the script does, which is not what runs here
    exit_code = tagcheck.main([*SCAN, state])
    if idle := STAGES.keys() - seconds.keys() - {EXIT}:
        sys.exit(f"the scan did not call {', '.join(idle)}: name in STAGES what does its work now")
    seconds[REST] += time.thread_time() - seconds[OWN]
    seconds[READING] += sum(os.times()[:4]) - time.thread_time()  # of all threads and child processes
    Path(STAGES_NAME).write_text(json.dumps(seconds), encoding="utf-8")
    gc.freeze()
    sys.exit(exit_code)


PARTS = {"serve": run_server, "plain": run_plain, "save": run_save, "stages": run_stages}


# ---- Measuring: Run, Usage, measure, serving, policy_text --------------------------------------------------


class BenchmarkError(Exception):
    """A run did not do what was to be measured."""


@dataclass(frozen=True)
class Run:
    """A command to be measured in its own directory, and what shows that it did its work."""

    name: str
    command: list[str]
    directory: Path
    port: int
    exit_code: int
    instances: int = 0
    findings: int = 0
    status: str | None = None


@dataclass(frozen=True)
class Usage:
    """What a run took."""

    cpu: float
    wall: float
    peak: float

    def __str__(self) -> str:
        return f"{self.wall:.1f} s, {self.cpu:.1f} s CPU, {self.peak:.0f} MiB"


def environment(port: int) -> dict[str, str]:
    """The caller's environment without proxies, its AWS settings replaced by the server's."""
    kept = {key: value for key, value in os.environ.items() if not re.search(r"(?i)^aws_|_proxy$", key)}
    return kept | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "AKIABENCHMARK",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }


def complaint(run: Run, exit_code: int) -> str | None:
    """What shows that a run did not do its work, or None; its CSV is taken away before the next run."""
    if exit_code != run.exit_code:
        return f"expected exit code {run.exit_code}, got {exit_code}"
    if run.findings:
        csv_path = run.directory / CSV_NAME
        with csv_path.open(newline="", encoding="utf-8") as stream:
            found = Counter(row.get("Status") for row in csv.DictReader(stream))
        csv_path.unlink()
        if found != {run.status: run.findings}:
            return f"expected {run.findings} rows in the CSV with status {run.status}, got {dict(found)}"
    return None


def measure(run: Run) -> Usage:
    """Run a command to its end and ask the system what it took."""
    errors_path, env = run.directory / "stderr", environment(run.port)
    with errors_path.open("wb") as stderr:
        started = time.perf_counter()
        process = Popen(run.command, cwd=run.directory, env=env, stdout=DEVNULL, stderr=stderr)
        try:
            # A child's peak includes what its parent held at the fork, so this process has to stay small.
            _, wait_status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(wait_status)
    if wrong := complaint(run, process.returncode):
        raise BenchmarkError(f"{run.name}: {wrong}\n{errors_path.read_text(errors='replace')}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss * unit / 2**20)


def part(name: str, fleet: Fleet, argument: str) -> list[str]:
    """The command that runs a part of this file as a process of its own."""
    return [sys.executable, str(BENCHMARK), name, *map(str, astuple(fleet)), argument]


@contextmanager
def serving(fleet: Fleet, latency_ms: int) -> Iterator[int]:
    """The port on which the fleet is served; the server ends with this block."""
    with Popen(part("serve", fleet, str(latency_ms)), stdin=PIPE, stdout=PIPE, text=True) as server:
        assert server.stdout
        yield int(server.stdout.readline())


def policy_text(fleet: Fleet) -> str:
    """The policy that covers the fleet, and nothing else."""
    lines = ["version: 1", "name: benchmark", "required_tags:", *(f"  - key: {key}" for key in REQUIRED_TAGS)]
    if fleet.groups:
        lines.insert(lines.index("  - key: CostCenter") + 1, f"    values: [{', '.join(COST_CENTERS)}]")
    lines += ["regions:", *(f"  {region}:" for region in fleet.region_names())]
    if fleet.accounts > 1:
        ids = ", ".join(f'"{account_id}"' for account_id in fleet.account_ids())
        lines += ["accounts:", f"  ids: [{ids}]", f"  role_name: {ROLE_NAME}"]
    return "\n".join(lines) + "\n"


# ---- Scans: round_of_runs, print_results, run_benchmark ----------------------------------------------------

FIRST, SECOND, GROWN = "tagcheck, all new", "tagcheck, all repeat", "tagcheck, grown fleet"
STAGED, PLAIN = "tagcheck, by stage", "plain boto3 loop"
PASS, HELP, OFFLINE = "python -c pass", "tagcheck --help", "tagcheck --instances"


def round_of_runs(fleet: Fleet, port: int, directory: Path, grown: dict[int, Fleet]) -> list[Run]:
    """What is measured in each round, in turns, so that noise hits all of it; `grown` is by port."""
    tagcheck = [sys.executable, str(TAGCHECK)]
    scan = [*tagcheck, *SCAN]
    first = Run(FIRST, [*scan, "fleet.db"], directory, port, 3, fleet.instances, fleet.findings(), "NEW")
    plain = replace(first, name=PLAIN, command=part("plain", fleet, CSV_NAME), exit_code=0, status=None)
    staged = replace(first, name=STAGED, command=part("stages", fleet, "stages.db"))
    runs = [first, replace(first, name=SECOND, status="REPEAT"), staged]
    if len(fleet.targets) <= 1000:  # it makes a client for each: more of them would take many minutes
        runs.insert(1, plain)
    for grown_port, large in grown.items():
        run = replace(first, name=GROWN, command=[*scan, "grown.db"], port=grown_port)
        runs.append(replace(run, instances=large.instances, findings=large.findings()))
    count = min(SAVED_INSTANCES, max(fleet.targets.values()))
    saved = replace(first, name=OFFLINE, instances=count, findings=fleet.findings_among(count))
    # A target of which the file says nothing would make the scan incomplete.
    narrow = ["--region", REGIONS[0], *(["--account", OWN_ACCOUNT] if fleet.accounts > 1 else [])]
    for n in range(SHORT_RUNS):
        runs.append(Run(PASS, [sys.executable, "-c", "pass"], directory, port, 0))
        runs.append(Run(HELP, [*tagcheck, "--help"], directory, port, 0))
        runs.append(replace(saved, command=[*scan, f"saved-{n}.db", "--instances", "../saved.json", *narrow]))
    return runs


def spread(values: list[float]) -> str:
    """The median, and the least and the most."""
    return f"{median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def print_runs(sizes: dict[str, int], usages: dict[str, list[Usage]]) -> None:
    """Print a line for each run."""
    print(f"{'run':<22}{'instances':>10}{'CPU s':>28}{'ms each':>9}{'wall s':>28}{'peak MiB':>10}")
    for name, size in sizes.items():
        cpu, wall = [usage.cpu for usage in usages[name]], [usage.wall for usage in usages[name]]
        each = f"{1000 * median(cpu) / size:.3f}" if size else ""
        peak = f"{median(usage.peak for usage in usages[name]):.1f}" if size else ""
        print(f"{name:<22}{size or '':>10}{spread(cpu):>28}{each:>9}{spread(wall):>28}{peak:>10}")


def print_stages(instances: int, rounds: list[dict[str, float]]) -> None:
    """Print the CPU time of each stage of a scan."""
    print(f"\n{STAGED:<32}{'CPU s':>28}{'ms each':>9}")
    for name, stage in STAGES.items():
        seconds = [each[name] for each in rounds]
        print(f"{stage:<12}{name:<20}{spread(seconds):>28}{1000 * median(seconds) / instances:>9.3f}")


def print_comparisons(sizes: dict[str, int], usages: dict[str, list[Usage]], targets: int) -> None:
    """Print how the runs compare, each with the one beside it."""

    def compare(title: str, one: str, other: str, value: Callable[[Usage, Usage], float]) -> None:
        if {one, other} <= usages.keys():
            print(f"{title:<58}{spread(list(map(value, usages[one], usages[other])))}")

    print()
    compare(f"CPU, {FIRST} : {PLAIN}", FIRST, PLAIN, lambda a, b: a.cpu / b.cpu)
    compare(f"CPU, {SECOND} : {FIRST}", SECOND, FIRST, lambda a, b: a.cpu / b.cpu)
    compare(f"CPU ms a target ({targets:,}), {FIRST}", FIRST, FIRST, lambda a, _: 1000 * a.cpu / targets)
    more = sizes.get(GROWN, 0) - sizes[FIRST]
    compare(f"CPU ms each, {GROWN} - {FIRST}", GROWN, FIRST, lambda a, b: 1000 * (a.cpu - b.cpu) / more)
    compare(f"peak, {GROWN} : {FIRST}", GROWN, FIRST, lambda a, b: a.peak / b.peak)
    compare(f"peak MiB, {GROWN} - {FIRST}", GROWN, FIRST, lambda a, b: a.peak - b.peak)
    for name in (HELP, OFFLINE):
        compare(f"CPU ms, {name} - {PASS}", name, PASS, lambda a, b: 1000 * (a.cpu - b.cpu))
        compare(f"wall ms, {name} - {PASS}", name, PASS, lambda a, b: 1000 * (a.wall - b.wall))


def run_benchmark(fleet: Fleet, rounds: int, latency_ms: int, growth: int | None) -> None:
    """Measure round by round, then print."""
    sizes: dict[str, int] = {}
    usages: dict[str, list[Usage]] = defaultdict(list)
    stages: list[dict[str, float]] = []
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tagcheck-benchmark-")))
        port = stack.enter_context(serving(fleet, latency_ms))
        larger = [replace(fleet, instances=growth * fleet.instances)] if growth else []
        grown = {stack.enter_context(serving(large, latency_ms)): large for large in larger}
        (root / "policy.yaml").write_text(policy_text(fleet), encoding="utf-8")
        measure(Run("saving instances", part("save", fleet, "saved.json"), root, port, 0))
        for n in range(1, rounds + 1):
            directory = root / f"round-{n}"
            directory.mkdir()
            for run in round_of_runs(fleet, port, directory, grown):
                usages[run.name].append(measure(run))
                print(f"round {n}: {run.name}: {usages[run.name][-1]}", file=sys.stderr)
                sizes[run.name] = run.instances
            counted = json.loads((directory / STAGES_NAME).read_text(encoding="utf-8"))
            stages.append(counted | {EXIT: usages[STAGED][-1].cpu - sum(counted.values())})
    print_runs(sizes, usages)
    print_stages(fleet.instances, stages)
    print_comparisons(sizes, usages, len(fleet.targets))


# ---- The state alone: run_record, measure_report -----------------------------------------------------------


def run_record(fleet: Fleet, times: int) -> None:
    """Record findings into a new state, then a third of them again, and print what each took."""
    tagcheck = load_tagcheck()
    policy = tagcheck.check_policy(policy_text(replace(fleet, accounts=1)).encode(), "benchmark")
    now = datetime.now(UTC)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        state = Path(directory) / "state.db"
        for name, share in [("all NEW", 1), *[("a third of them again", 3)] * times]:
            with closing(tagcheck.open_sightings()) as sightings:
                for (account, region), count in list(fleet.targets.items())[::share]:
                    target = tagcheck.Target(account, region)
                    number = tagcheck.add_target(sightings, target)
                    for page in range(0, count, PAGE_SIZE):
                        ids = range(page, min(page + PAGE_SIZE, count))
                        seen = [tagcheck.Instance(f"i-{n:017x}", "running", now, {"Name": "x"}) for n in ids]
                        judged = [tagcheck.judge(target, instance, policy, now) for instance in seen]
                        tagcheck.add_sightings(sightings, number, [(sighting, None) for sighting in judged])
                begun = time.monotonic()
                tagcheck.check_state(state)
                scan = tagcheck.Scan(str(uuid.uuid4()), policy, now)
                with tagcheck.record_scan(sightings, state, scan, now, str(state)):
                    findings = sum(target.findings for target in tagcheck.fetch_coverage(sightings, scan))
                print(f"recorded {findings:>9} findings, {name}: {time.monotonic() - begun:.1f} s")


REPORT_TARGETS, REPORT_SCANS = 100, 400


def run_report(fleet: Fleet, directory: str) -> None:
    """Fill a state with as many findings and a history of scans; half of the findings have a common cause."""
    tagcheck = load_tagcheck()
    state = Path(directory) / "instance_state.db"
    targets = [(f"{n // 10:012}", REGIONS[n % 10]) for n in range(REPORT_TARGETS)]
    (Path(directory) / "policy.yaml").write_text(policy_text(Fleet(0, regions=10, accounts=1)))
    kind = tagcheck.ViolationType.MISSING
    missing = [tagcheck.Violation(key, kind, None, None, f"{key} is missing") for key in REQUIRED_TAGS]
    violations = [json.dumps(list(map(tagcheck.to_record, missing[: n + 1]))) for n in range(3)]
    suggested = tagcheck.Suggestion("Owner", "team@example.com", 0.98, "38 of 38 in web-asg")
    tagcheck.check_state(state)
    now = datetime.now(UTC)
    times = [tagcheck.utc_text(now - timedelta(days=n)) for n in range(REPORT_SCANS, 0, -1)]

    def finding(n: int) -> tuple[object, ...]:
        resolved = n % 5 == 0
        return (
            *("benchmark", *targets[n % REPORT_TARGETS], f"i-{n:017x}", "running", times[0]),
            json.dumps(instance_tags(n % PAGE_SIZE)),
            *(violations[n % 3], REPORT_SCANS, "RESOLVED" if resolved else "REPEAT"),
            *(times[n % REPORT_SCANS], times[-1], 9, 0),
            *((times[-1], "tagged") if resolved else (None, None)),
            *(f"person-{n % 300}", json.dumps([tagcheck.to_record(suggested)]), "m7g.2xlarge"),
            *(("autoscaling_group", f"group-{n // 200}") if n % 2 else (None, None)),
            *(100.0, json.dumps(REQUIRED_TAGS[: n % 3 + 1])),
        )

    def insert(table: str, width: int, rows: Iterable[tuple[object, ...]]) -> None:
        db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * width)})", rows)

    with closing(sqlite3.connect(state)) as db, db:
        for n, time_ in enumerate(times):
            read = ("read", None, None, 20_000, 10_000, 10_000 - n, 0, 10, 9_000, 1, 11)
            insert("scans", 7, [(n + 1, str(n), "benchmark", "policy.yaml", "", time_, time_)])
            insert("coverage", 14, ((n + 1, *target, *read) for target in targets))
            insert("trend", 8, [("benchmark", time_, REPORT_TARGETS * (10_000 - n), 1000, 100, 1100, 100, 0)])
        columns = (
            "policy, account_id, region, instance_id, state, launch_time, tags, violations, last_scan, "
            "status, first_seen, last_seen, times_seen, times_reopened, resolved_at, resolution, created_by, "
            "suggestions, instance_type, cause_kind, cause, monthly_cost, tag_keys"
        )
        insert(f"findings ({columns})", 23, map(finding, range(fleet.instances)))


def measure_report(fleet: Fleet, rounds: int) -> None:
    """Print what the dashboard of a large state takes, a line a round."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        run_report(fleet, directory)
        size = (Path(directory) / "instance_state.db").stat().st_size
        print(f"{fleet.instances:,} findings, {REPORT_SCANS} scans: a state of {size >> 20} MiB")
        command = [sys.executable, str(TAGCHECK), "report", "--html", "page.html", "--policy", "policy.yaml"]
        for _ in range(rounds):
            used = measure(Run("report", command, Path(directory), 0, 0))
            page = (Path(directory) / "page.html").stat().st_size
            print(f"report: {used}, page {page >> 10} KiB")


# ---- Remediation: remediation_plan, tag_calls, measure_remediation -----------------------------------------

SHARED_VALUES, KILLS = 10, 5  # how many values a plan's tags have, and how often it is killed


def write_remediation_plan(path: Path, fleet: Fleet, changes: int) -> None:
    """Write a plan that gives so many instances, spread over the fleet's targets, an Owner each."""
    targets = list(fleet.targets)
    with path.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream)
        table.writerow(["Account", "Region", "InstanceId", "Tag", "Value", "Action"])
        for n in range(changes):
            turn, place = divmod(n, len(targets))
            table.writerow([*targets[place], f"i-{n:017x}", "Owner", f"team-{turn % SHARED_VALUES}", "add"])


def tag_calls(port: int) -> list[tuple[float, str, str, list[str]]]:
    """Each call that remediation has made to the server."""
    url, head = f"http://127.0.0.1:{port}", {"Authorization": "Credential=A/1/us-east-1/ec2/aws4_request"}
    with urllib.request.urlopen(urllib.request.Request(url, b"Action=ListTagCalls", head)) as response:
        return [tuple(call) for call in json.load(response)]


def measure_remediation(fleet: Fleet, changes: int, latency_ms: int) -> None:
    """Apply a plan, and apply it again to another server while it is killed now and then; print both."""
    tagcheck = load_tagcheck()
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tagcheck-benchmark-")))
        for name in ("whole.db", "killed.db"):  # a plan is not applied without a state
            tagcheck.check_state(root / name)
        (root / "policy.yaml").write_text(policy_text(fleet), encoding="utf-8")
        write_remediation_plan(root / "plan.csv", fleet, changes)
        command = [sys.executable, str(TAGCHECK), "remediate", "-q", "--policy", "policy.yaml", "--apply"]
        command += ["--plan", "plan.csv", "--max-changes", str(changes), "--state"]
        port = stack.enter_context(serving(fleet, latency_ms))
        usage = measure(Run("remediate", [*command, "whole.db"], root, port, 0))
        calls = tag_calls(port)
        peak = 0
        for place in {call[2] for call in calls}:
            times = [call[0] for call in calls if call[2] == place]
            peak = max(peak, *(sum(0 <= later - time < 1 for later in times) for time in times))
        print(f"wrote {changes} tags: {usage}; calls: {dict(Counter(call[1] for call in calls))}")
        print(f"{len(calls) / changes:.4f} calls per instance, at most {peak} a second in a target")

        port = stack.enter_context(serving(fleet, latency_ms))
        for n in range(KILLS):
            with Popen([*command, "killed.db"], cwd=root, env=environment(port)) as process:
                time.sleep(0.5 + (n + 0.37) * usage.wall / (2 * KILLS))
                process.kill()
        measure(Run("remediate", [*command, "killed.db"], root, port, 0))
        written = Counter(id_ for call in tag_calls(port) if call[1] == "CreateTags" for id_ in call[3])
        twice = sum(number > 1 for number in written.values())
        with closing(sqlite3.connect(root / "killed.db")) as state:
            (recorded,) = state.execute("SELECT count(*) FROM changes WHERE status = 'written'").fetchone()
        print(
            f"killed {KILLS} times: {len(written)} tags written, {twice} of them twice, {recorded} recorded"
        )


# ---- The command line: build_parser, main ------------------------------------------------------------------


def positive(text: str) -> int:
    """A number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The options; the parts that run as processes of their own are not for people."""
    parser = argparse.ArgumentParser(description="Measure what a scan costs, beside a plain boto3 loop.")
    parser.add_argument("--instances", type=positive, default=100_000, metavar="N", help="100000 if left out")
    parser.add_argument("--regions", type=int, default=4, choices=range(1, len(REGIONS) + 1), metavar="N")
    parser.add_argument("--accounts", type=positive, default=1, metavar="N")
    parser.add_argument("--shape", choices=SHAPES, default="pages", help="what is violated, in which groups")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--latency-ms", type=int, default=0, metavar="MS", help="what each answer waits")
    parser.add_argument("--record", action="store_true", help="only record findings, then a third again")
    parser.add_argument("--report", action="store_true", help="only make the dashboard of so many findings")
    parser.add_argument("--remediate", type=positive, metavar="N", help="only write so many tags by a plan")
    more = "scan a fleet so many times as large as well, four times if left out"
    parser.add_argument("--growth", type=positive, nargs="?", const=4, metavar="FACTOR", help=more)
    return parser


def main(argv: list[str]) -> int:
    """Run the benchmark, or the part of it that the first argument names."""
    if argv and argv[0] in PARTS:
        PARTS[argv[0]](Fleet(*map(int, argv[1:5])), argv[5])
        return 0
    options = build_parser().parse_args(argv)
    fleet = Fleet(options.instances, options.regions, options.accounts, SHAPES[options.shape])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.record:
            run_record(fleet, options.rounds)
        elif options.report:
            measure_report(fleet, options.rounds)
        elif options.remediate:
            measure_remediation(fleet, options.remediate, options.latency_ms)
        else:
            run_benchmark(fleet, options.rounds, options.latency_ms, options.growth)
    except (BenchmarkError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
