"""`scan --creators`: who made what was found, as CloudTrail tells it; nothing of it fails a scan."""

import itertools
import json
import re
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from aws_server import ACCOUNT_ID, run_instances_event
from builders import save_policy
from conftest import script_with

import tagcheck as script

REGION, MEMBER = "us-east-1", "210987654321"
SSO_ROLE = "AWSReservedSSO_Admin_0123456789abcdef"


def user(name):
    return {"type": "IAMUser", "userName": name, "arn": f"arn:aws:iam::{ACCOUNT_ID}:user/{name}"}


def role(name, session, **more):
    issuer = {"sessionContext": {"sessionIssuer": {"type": "Role", "userName": name}}}
    arn = f"arn:aws:sts::{ACCOUNT_ID}:assumed-role/{name}/{session}"
    return {"type": "AssumedRole", "arn": arn, **issuer, **more}


@pytest.fixture
def scan(aws, tagcheck, tmp_path):
    """Give a function that scans one region, and looks creators up."""

    def run(*args, regions=(REGION,), policy=(), cwd=tmp_path, **options):
        save_policy(cwd, regions=dict.fromkeys(regions), **dict(policy))
        files = ("--policy", "policy.yaml", "--json", "out.json")
        return tagcheck("scan", *files, "--creators", *args, cwd=cwd, env=aws.env, **options)

    return run


@pytest.fixture
def hasty(tmp_path):
    """The script without the pause between two lookups."""
    return script_with(tmp_path, LOOKUP_PAUSE=0.01)


def created_by(result):
    findings = result.json("out.json")["findings"]
    return {finding["instance_id"]: finding["created_by"] for finding in findings}


def remember(aws, ids, identity, ago=0.0, region=REGION, account_id=ACCOUNT_ID, **detail):
    event = run_instances_event(ids, time.time() - ago, identity, **detail)
    aws.events.setdefault((account_id, region), []).insert(0, event)


@pytest.mark.parametrize(
    ("identity", "expected"),
    {
        "user": (user("ann"), "ann"),
        "role and session": (role("deploy", "jenkins-42"), "deploy/jenkins-42"),
        "SSO user": (role(SSO_ROLE, "ann@example.com"), "ann@example.com (SSO Admin)"),
        "root": ({"type": "Root", "accountId": ACCOUNT_ID}, f"root of {ACCOUNT_ID}"),
        "auto scaling": (
            role("AWSServiceRoleForAutoScaling", "AutoScaling", invokedBy="autoscaling.amazonaws.com"),
            "autoscaling (automation)",
        ),
        "EKS": (role("AWSServiceRoleForAmazonEKSNodegroup", "EKS"), "AmazonEKSNodegroup (automation)"),
        "service": ({"type": "AWSService", "invokedBy": "batch.amazonaws.com"}, "batch (automation)"),
        "federated": (
            {"type": "FederatedUser", "arn": "arn:aws:sts::1:federated-user/x"},
            "arn:aws:sts::1:federated-user/x",
        ),
        "identity center": ({"type": "IdentityCenterUser", "principalId": "u-1"}, "u-1"),
        "nobody": ({}, "unknown (the event names nobody)"),
    }.values(),
)  # fmt: skip
def test_creator_name(identity, expected):
    assert str(script.creator_name(identity)) == expected


def test_creators_are_found_shown_kept_and_not_asked_for_again(aws, scan, hasty, tagcheck, tmp_path):
    together, (alone,), (renewed,), (forgotten,), (failed,) = (
        aws.launch(REGION, count=count) for count in (3, 1, 1, 1, 1)
    )
    fine = aws.launch(REGION, tags={"Owner": "ann"})
    remember(aws, [*together, *fine], role("deploy", "jenkins-42"))
    remember(aws, [alone], user("ann"))
    # It was started again: its launch time is of now, and the event of long ago. Sixty others came since.
    remember(aws, [renewed], user("bob"), ago=86400)
    for number in range(60):
        later = run_instances_event([renewed], time.time() - 3600 + number, user("x")) | {
            "EventName": "StopInstances"
        }
        aws.events[ACCOUNT_ID, REGION].insert(0, later)  # fmt: skip
    remember(aws, [failed], user("eve"), errorCode="Client.InstanceLimitExceeded")
    result = scan(check=3, script=hasty)
    assert created_by(result) == dict.fromkeys(together, "deploy/jenkins-42") | {
        alone: "ann",
        renewed: "bob",
        forgotten: "unknown (CloudTrail has no RunInstances event for it)",
        failed: "unknown (CloudTrail has no RunInstances event for it)",
    }
    assert {row["CreatedBy"] for row in result.csv("violators.csv")} == {*created_by(result).values()}
    # Of three that were launched together one was asked for; what complies is not asked for.
    asked = [call.params["LookupAttributes"][0]["AttributeValue"] for call in aws.calls("LookupEvents")]
    assert len({*together} & {*asked}) == 1
    assert not {*fine} & {*asked}
    assert {*asked} >= {alone, renewed, forgotten}

    aws.events.clear()
    before = len(aws.requests)
    again = scan(check=3, script=hasty)
    assert created_by(again) == created_by(result)
    lookups = [call.params for call in aws.requests[before:] if call.action == "LookupEvents"]
    asked = {params["LookupAttributes"][0]["AttributeValue"] for params in lookups}
    assert asked == {forgotten, failed}
    story = tagcheck("history", alone, "--policy", "policy.yaml", cwd=tmp_path)
    assert "  Created by: ann\n" in story.out


def test_a_launch_that_cloudtrail_has_forgotten_is_not_asked_for(aws, scan, tmp_path):
    (id_,) = aws.launch(REGION)
    result = scan(check=3, now=datetime.now(UTC) + timedelta(days=91))
    assert created_by(result) == {id_: "unknown (launched more than 90 days ago)"}
    assert aws.calls("LookupEvents") == []
    # A creator that is known already stays known.
    with closing(sqlite3.connect(tmp_path / "instance_state.db")) as db, db:
        db.execute("UPDATE findings SET created_by = 'ann'")
    assert created_by(scan(check=3, now=datetime.now(UTC) + timedelta(days=92))) == {id_: "ann"}


def test_a_failure_is_a_notice_and_is_asked_for_again(aws, scan, hasty):
    (id_,) = aws.launch(REGION)
    denied = aws.fault("error", service="cloudtrail", code="AccessDeniedException", status=400)
    result = scan(check=3, script=hasty)
    assert created_by(result) == {id_: "unknown (AccessDeniedException)"}
    _, notice = result.json("out.json")["notices"]
    assert notice.startswith(
        f"Who created the instances in {ACCOUNT_ID} {REGION} was not looked up: AccessDenied"
    )
    assert "cloudtrail:LookupEvents" in notice
    assert notice in result.out
    denied.times = 0
    remember(aws, [id_], user("ann"))
    assert created_by(scan(check=3, script=hasty)) == {id_: "ann"}


@pytest.mark.parametrize(
    "answer", ['{"Event": []}', '{"Events": [7]}', '{"Events": [], "NextToken": 7}', "<html>"]
)
def test_an_answer_that_is_not_cloudtrails_is_a_notice(aws, scan, hasty, answer):
    (id_,) = aws.launch(REGION)
    aws.fault("body", service="cloudtrail", body=answer.encode())
    result = scan(check=3, script=script_with(hasty.parent, NETWORK_PAUSES=(0.01,)))
    assert created_by(result)[id_] in ("unknown (ForeignAnswer)", "unknown (IncompleteAnswer)")
    assert result.json("out.json")["notices"]


ODD = [None, True, 7, 1e400, "", "x", "\ud800\0/", [], ["x"], {}, {"x": []}]
PATHS = [
    *(
        ("CloudTrailEvent",),
        ("EventName",),
        ("Resources",),
        ("Resources", 0),
        ("Resources", 0, "ResourceName"),
    ),
    *(
        ("Resources", 0, "ResourceType"),
        ("detail",),
        ("detail", "userIdentity"),
        ("detail", "userIdentity", "type"),
    ),
    *(
        ("detail", "userIdentity", key)
        for key in ("arn", "userName", "invokedBy", "principalId", "accountId")
    ),
    *(
        ("detail", "userIdentity", "sessionContext"),
        ("detail", "userIdentity", "sessionContext", "sessionIssuer"),
    ),
    ("detail", "userIdentity", "sessionContext", "sessionIssuer", "userName"),
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_an_event_may_be_of_any_shape(path):
    for identity in (
        role("deploy", "jenkins"),
        {"type": "Root", "accountId": ACCOUNT_ID},
        {"type": "AssumedRole"},
    ):
        for value in ODD:
            event = run_instances_event(["i-0a"], 0, identity)
            event["detail"] = json.loads(event["CloudTrailEvent"])
            inner = event
            for step in path[:-1]:
                inner = inner.setdefault(step, {}) if isinstance(inner, dict) else inner[step]
            inner[path[-1]] = value
            detail = event.pop("detail")
            event |= {"CloudTrailEvent": json.dumps(detail)} if path[0] == "detail" else {}
            for instance_id, who in script.creators_of(event):
                assert isinstance(instance_id, str)
                assert isinstance(who, script.Creator)
                assert str(who)
    assert [script.creators_of(value) for value in ODD] == [[]] * len(ODD)


def test_events_that_are_not_cloudtrails_cost_only_the_creator(aws, scan, hasty):
    texts = [
        "x",
        "",
        "[" * 100_000,
        "null",
        "7",
        '{"userIdentity": {"arn": ["x"]}}',
        '{"userIdentity": "x"}',
        None,
        7,
    ]
    ids = [aws.launch(REGION)[0] for _ in (*texts, "good")]
    for id_, text in zip(ids, texts, strict=False):
        remember(aws, [id_], {})
        aws.events[ACCOUNT_ID, REGION][0]["CloudTrailEvent"] = text
    remember(aws, ids[-1:], user("\ud800\0"))
    creators = created_by(scan(check=3, script=hasty))
    assert creators[ids[-1]] == "\\ud800\\x00"
    assert {creators[id_] for id_ in ids[:-1]} == {
        "unknown (the event cannot be read)",
        "unknown (the event names nobody)",
    }


def test_an_instance_launched_at_the_end_of_time_has_no_known_creator(aws, scan, hasty):
    (id_,) = aws.launch(REGION)
    late = re.compile(rb"<launchTime>[^<]*")
    aws.fault(
        "edit",
        action="DescribeInstances",
        edit=lambda body: late.sub(b"<launchTime>9999-12-31T23:59:59.000Z", body),
    )
    assert created_by(scan(check=3, script=hasty)) == {
        id_: "unknown (CloudTrail has no RunInstances event for it)"
    }


def test_the_budget_ends_the_lookups_and_the_next_scan_goes_on(aws, scan):
    ids = [aws.launch(REGION)[0] for _ in range(4)]
    for id_ in ids:
        remember(aws, [id_], user("ann"))
    first = scan("--creators-budget", "1s", check=3, process=True)
    known = [id_ for id_, who in created_by(first).items() if who]
    assert 1 <= len(known) <= 2
    _, notice = first.json("out.json")["notices"]
    assert notice == (
        f"Who created {script.counted(4 - len(known), 'instance')} was not looked up within "
        "--creators-budget 1s: the next scan continues"
    )
    second = scan(check=3, process=True)
    assert set(created_by(second).values()) == {"ann"}
    # Two calls a second of an account and region are what CloudTrail takes.
    times = [call.received_at for call in aws.calls("LookupEvents")]
    assert len(times) == 4
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.45


def test_the_budget_ends_an_answer_that_trickles(aws, scan):
    aws.launch(REGION)
    aws.fault("trickle", action="LookupEvents", seconds=5)
    begun = time.monotonic()
    result = scan("--creators-budget", "1s", check=3, process=True)
    assert time.monotonic() - begun < 20
    assert (
        "1 instance was not looked up within --creators-budget 1s" in result.json("out.json")["notices"][-1]
    )


def test_each_account_is_asked_with_its_own_credentials(aws, scan, hasty):
    (own,), (other,) = aws.launch(REGION), aws.launch(REGION, account_id=MEMBER)
    remember(aws, [own], user("ann"))
    remember(aws, [other], user("bob"), account_id=MEMBER)
    accounts = {"accounts": {"ids": [ACCOUNT_ID, MEMBER], "role_name": "tagcheck-read"}}
    assert created_by(scan(check=3, policy=accounts, script=hasty)) == {own: "ann", other: "bob"}
    (assumed,) = aws.calls("AssumeRole")
    assert "cloudtrail:LookupEvents" in assumed.params["Policy"]


def test_what_a_stranger_is_called_stays_text(aws, scan, hasty, tagcheck):
    (id_,) = aws.launch(REGION)
    remember(aws, [id_], user("=HYPERLINK(1)\u202e\x1b[2J"))
    result = scan(check=3, script=hasty)
    shown = "=HYPERLINK(1)\\u202e\\x1b[2J"
    assert created_by(result) == {id_: shown}
    assert result.csv("violators.csv")[0]["CreatedBy"] == f"'{shown}"
    story = tagcheck("history", id_, "--policy", "policy.yaml")
    assert f"Created by: {shown}\n" in story.out


def test_creators_of_saved_instances_cannot_be_looked_up(tagcheck):
    result = tagcheck("scan", "--creators", "--instances", "x.json", check=2)
    assert "--instances and --creators: give one of them" in result.err


def test_iam_policy_lists_the_lookup_only_where_it_is_asked_for(tagcheck):
    assert "cloudtrail" not in tagcheck("iam-policy", check=0).out
    assert "cloudtrail:LookupEvents" in tagcheck("iam-policy", "--creators", check=0).out
