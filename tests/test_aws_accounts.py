"""AWS, many accounts: which are scanned, how they are entered, and that none is missed in silence."""

import itertools
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aws_server import ACCOUNT_ID, AwsServer, Fault, Request
from builders import instance, reservation, save_fleet, save_policy
from conftest import TAGCHECK, Result, clean_environment, run_tagcheck, script_with

import tagcheck as script

OWN, MEMBER, OTHER, SUSPENDED = ACCOUNT_ID, "210987654321", "098765432109", "111122223333"
REGION, REGIONS = "us-east-1", ("ap-south-1", "eu-west-1", "us-east-1")
ROLE = "tagcheck-read"
OUTPUTS = ("--csv", "out.csv", "--json", "out.json", "--junit", "out.xml")

# ---- What the tests share ----------------------------------------------------------------------------------

Scan = Callable[..., Result]


def write_policy(directory: Path, accounts: Mapping[str, Any] | None, *regions: str, **keys: Any) -> Path:
    """Write a policy that asks for Owner in these accounts and regions."""
    scope = {"accounts": {"role_name": ROLE} | dict(accounts)} if accounts else {}
    return save_policy(directory, regions=dict.fromkeys(regions), **scope, **keys)


@pytest.fixture
def scan(aws: AwsServer, tagcheck: Callable[..., Result], tmp_path: Path) -> Scan:
    """Give a function that scans these accounts and regions of the server and writes every output."""

    def run(
        accounts: Mapping[str, Any] | None,
        *regions: str,
        args: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
        keys: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Result:
        policy = write_policy(tmp_path, accounts, *regions or (REGION,), **dict(keys or {}))
        return tagcheck("scan", "--policy", policy, *OUTPUTS, *args, env=aws.env | dict(env or {}), **options)

    return run


def coverage(result: Result) -> dict[tuple[str, str], str | None]:
    """Read the code of each target's error: None where it was read."""
    return {
        (target["account_id"], target["region"]): target["error"] and target["error"]["code"]
        for target in result.json("out.json")["coverage"]
    }


def accounts_of(result: Result) -> list[str]:
    """Read which accounts a scan looked at."""
    return sorted({account_id for account_id, _ in coverage(result)})


def found(result: Result, key: str = "findings") -> list[str]:
    """Read the ids of the findings, or of those resolved."""
    return [finding["instance_id"] for finding in result.json("out.json")[key]]


def entered(requests: list[Request]) -> list[str]:
    """List the accounts whose roles were assumed, once for each time."""
    return sorted(
        request.params["RoleArn"].split(":")[4] for request in requests if request.action == "AssumeRole"
    )


def make_organization(aws: AwsServer, members: int) -> list[str]:
    """Make an organization of the caller's account and so many members; gives the ids of these."""
    organizations = aws.backstage("organizations", REGION)
    organizations.create_organization(FeatureSet="ALL")
    created = [
        organizations.create_account(Email=f"{number}@example.com", AccountName=f"member {number}")
        for number in range(members)
    ]
    return sorted(each["CreateAccountStatus"]["AccountId"] for each in created)


def findings_table(path: Path) -> list[tuple[Any, ...]]:
    """Read what a state holds of its findings, but for the numbers and times of the last scans."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(
            "SELECT policy, account_id, region, instance_id, state, launch_time, tags, violations, status, "
            "first_seen, times_seen, times_reopened, resolved_at IS NULL, resolution, created_by, "
            "suggestions FROM findings ORDER BY policy, account_id, region, instance_id"
        ).fetchall()


# ---- An organization of twelve accounts in three regions ---------------------------------------------------

BUCKET, STATE = "fleet-state", "instance_state.db"
SHARDS = ("1/4", "2/4", "3/4", "4/4")


@dataclass(frozen=True)
class Fleet:
    """What scans made of a fleet: before the troubles, in them (whole and in shards), and after them."""

    denied: str
    suspended: str
    partly: str  # one region is not enabled there
    right: list[str]  # instances that were put right, or went, where the troubles are not
    unseen: list[str]  # and where they are
    targets: set[tuple[str, str]]
    requests: list[Request]
    before: Result
    troubled: Result
    after: Result
    tables: dict[str, list[tuple[Any, ...]]]
    shards: dict[str, Result]


@pytest.fixture(scope="module")
def fleet(aws_server: AwsServer, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Scan a fleet; deny an account, suspend another, disable a region, and scan twice more."""
    aws, tmp_path = aws_server, tmp_path_factory.mktemp("fleet")
    aws.reset()
    aws.backstage("s3", REGION).create_bucket(Bucket=BUCKET)
    members = make_organization(aws, members=11)
    denied, suspended, partly, healthy = members[:4]
    targets = {(account_id, region) for account_id in (OWN, *members) for region in REGIONS}
    ids = {target: aws.launch(target[1], account_id=target[0])[0] for target in sorted(targets)}
    args = (
        "scan",
        "--policy",
        write_policy(tmp_path, {"organization": True}, *REGIONS, expected_account=OWN),
        *OUTPUTS,
    )
    tables: dict[str, list[tuple[Any, ...]]] = {}

    def run(directory: str, *more: str) -> Result:
        (cwd := tmp_path / directory).mkdir(exist_ok=True)
        return run_tagcheck(*args, *more, cwd=cwd, env=aws.env)

    def run_into(state: str, directory: str) -> Result:
        result = run(directory, "--state", state)
        tables[directory] = findings_table(Path(state))
        return result

    state = tmp_path / STATE
    before = run_into(str(state), "before")
    requests = aws.requests
    shards_state = tmp_path / "shards.db"
    shards_state.write_bytes(state.read_bytes())
    s3 = aws.backstage("s3", REGION)
    s3.put_object(Bucket=BUCKET, Key=STATE, Body=state.read_bytes())

    changes = [
        (healthy, REGION),
        (OWN, "eu-west-1"),
        (denied, REGION),
        (suspended, REGION),
        (partly, "ap-south-1"),
    ]
    for number, (account_id, region) in enumerate(changes):
        instance = [ids[account_id, region]]
        if number % 2:
            aws.terminate(region, instance, account_id=account_id)
        else:
            aws.tag(region, instance, {"Owner": "ann"}, account_id=account_id)
    aws.denied_roles.add(denied)
    aws.disabled.add((partly, "ap-south-1"))
    aws.backstage("organizations", REGION).close_account(AccountId=suspended)

    troubled = run_into(str(state), "troubled")
    shards = {}
    with ThreadPoolExecutor() as pool:
        into_s3 = ("--state", f"s3://{BUCKET}/{STATE}")
        at_the_same_time = [
            pool.submit(run, f"s3 {shard[0]}", "--shard", shard, *into_s3) for shard in SHARDS
        ]
        for shard in SHARDS:
            shards[shard] = run(f"local {shard[0]}", "--shard", shard, "--state", str(shards_state))
            tables[f"shards up to {shard}"] = findings_table(shards_state)
        assert {future.result().code for future in at_the_same_time} <= {0, 3, 4}
    fetched = tmp_path / "fetched.db"
    fetched.write_bytes(s3.get_object(Bucket=BUCKET, Key=STATE)["Body"].read())
    tables["shards in S3"] = findings_table(fetched)

    aws.denied_roles.clear()
    aws.disabled.clear()
    after = run_into(str(state), "after")
    changed = [ids[target] for target in changes]
    aws.reset()
    return Fleet(
        denied,
        suspended,
        partly,
        changed[:2],
        changed[2:],
        targets,
        requests,
        before,
        troubled,
        after,
        tables,
        shards,
    )


def rows_of(table: list[tuple[Any, ...]], *targets: tuple[str, str]) -> list[tuple[Any, ...]]:
    """Read the findings of some targets."""
    return [row for row in table if row[1:3] in targets]


def test_every_account_is_scanned_in_every_region(fleet: Fleet) -> None:
    assert fleet.before.code == 3
    assert coverage(fleet.before) == dict.fromkeys(fleet.targets)
    assert len(found(fleet.before)) == len(fleet.targets) == 36


def test_each_target_is_read_once_with_the_credentials_of_its_account(fleet: Fleet) -> None:
    described = Counter(
        (request.account_id, request.region)
        for request in fleet.requests
        if request.action == "DescribeInstances"
    )
    assert described == dict.fromkeys(fleet.targets, 1)


def test_each_account_but_the_callers_own_is_entered_once(fleet: Fleet) -> None:
    assert entered(fleet.requests) == sorted({account_id for account_id, _ in fleet.targets} - {OWN})
    assert Counter(request.action for request in fleet.requests) == {
        "GetCallerIdentity": 1, "ListAccounts": 1, "AssumeRole": 11, "DescribeInstances": 36
    }  # fmt: skip


def test_coverage_says_exactly_what_was_not_read(fleet: Fleet) -> None:
    expected: dict[tuple[str, str], str | None] = {
        target: None for target in fleet.targets if target[0] not in (fleet.denied, fleet.suspended)
    }
    expected |= {(fleet.denied, "*"): "AccessDenied", (fleet.partly, "ap-south-1"): "AuthFailure"}
    assert fleet.troubled.code == 4
    assert coverage(fleet.troubled) == expected
    summary = fleet.troubled.json("out.json")["summary"]
    assert (summary["targets"], summary["targets_unread"]) == (31, 2)


def test_what_was_not_read_is_said_once_everywhere(fleet: Fleet) -> None:
    unread = {(fleet.denied, "*"), (fleet.partly, "ap-south-1")}
    rows = [row for row in fleet.troubled.csv("out.csv") if row["Status"] == "UNREAD"]
    assert {(row["AccountId"], row["Region"]) for row in rows} == unread
    assert len(rows) == 2
    said = [line for line in fleet.troubled.err.splitlines() if "not read" in line]
    assert len(said) == 2
    assert all(
        any(line.startswith(f"{account_id} {region}: not read: ") for line in said)
        for account_id, region in unread
    )
    [denied] = [line for line in said if "AccessDenied" in line]
    assert "the role does not exist, or does not trust the caller" in denied
    assert f"arn:aws:iam::{fleet.denied}:role/{ROLE}" in denied


def test_suspended_account_is_listed_and_not_scanned(fleet: Fleet) -> None:
    notice = f"Account {fleet.suspended} is SUSPENDED: not scanned"
    assert notice in fleet.troubled.out
    assert notice in fleet.after.out
    assert "not scanned" not in fleet.before.out
    assert sum(notice in result.out for result in fleet.shards.values()) == 1


def test_unread_targets_keep_their_findings_as_they_were(fleet: Fleet) -> None:
    unread = [target for target in fleet.targets if target[0] in (fleet.denied, fleet.suspended)]
    unread.append((fleet.partly, "ap-south-1"))
    before, troubled = (rows_of(fleet.tables[name], *unread) for name in ("before", "troubled"))
    assert len(before) == 7
    assert troubled == before
    assert sorted(found(fleet.troubled, "resolved")) == sorted(fleet.right)


def test_next_clean_run_resolves_what_it_read_and_nothing_else(fleet: Fleet) -> None:
    suspended = [(fleet.suspended, region) for region in REGIONS]
    assert fleet.after.code == 3
    assert coverage(fleet.after) == dict.fromkeys(fleet.targets - set(suspended))
    of_suspended = {row[3] for row in rows_of(fleet.tables["before"], *suspended)}
    assert sorted(found(fleet.after, "resolved")) == sorted(set(fleet.unseen) - of_suspended)
    assert rows_of(fleet.tables["after"], *suspended) == rows_of(fleet.tables["before"], *suspended)
    assert {finding["status"] for finding in fleet.after.json("out.json")["findings"]} == {"REPEAT"}


@pytest.mark.parametrize("where", ["shards up to 4/4", "shards in S3"])
def test_four_shards_leave_the_same_state_as_one_run(fleet: Fleet, where: str) -> None:
    assert fleet.tables[where] == fleet.tables["troubled"]
    assert fleet.tables["troubled"] != fleet.tables["before"]


def test_shards_are_disjoint_and_all_there_is(fleet: Fleet) -> None:
    assert sorted(target for result in fleet.shards.values() for target in coverage(result)) == sorted(
        coverage(fleet.troubled)
    )
    shares = [accounts_of(result) for result in fleet.shards.values()]
    assert sorted(account_id for share in shares for account_id in share) == accounts_of(fleet.troubled)
    for key in ("findings", "resolved"):
        together = [id_ for result in fleet.shards.values() for id_ in found(result, key)]
        assert sorted(together) == sorted(found(fleet.troubled, key))


def test_shard_ends_with_the_code_of_its_share(fleet: Fleet) -> None:
    for shard, result in fleet.shards.items():
        unread = any(coverage(result).values())
        assert result.code == (4 if unread else 3 if found(result) else 0), shard
    assert 4 in {result.code for result in fleet.shards.values()}


def test_shard_changes_nothing_outside_its_share(fleet: Fleet) -> None:
    former = fleet.tables["before"]
    for shard, result in fleet.shards.items():
        table, share = fleet.tables[f"shards up to {shard}"], accounts_of(result)
        assert [row for row in table if row[1] not in share] == [row for row in former if row[1] not in share]
        former = table


# ---- Which accounts there are: the list of the organization ------------------------------------------------


def account(account_id: str, state: str | None = "ACTIVE", status: str | None = None) -> dict[str, str]:
    """Write an account as ListAccounts does."""
    keys = {"Id": account_id, "Name": "n", "State": state, "Status": status}
    return {key: value for key, value in keys.items() if value}


def answers(*pages: Any) -> dict[str, Any]:
    """Give the fault of a list of accounts in these pages."""

    def answer(request: Request) -> tuple[int, Mapping[str, str], bytes]:
        number = int(request.params.get("NextToken", 0))
        page = pages[min(number, len(pages) - 1)]
        if isinstance(page, list):
            token = {"NextToken": str(number + 1)} if number + 1 < len(pages) else {}
            page = {"Accounts": page} | token
        status = 400 if "__type" in page else 200
        return status, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(page).encode()

    return {"kind": "answer", "answer": answer}


def refuses(status: int, code: str, **when: int) -> dict[str, Any]:
    """Give the fault of an error of Organizations."""
    return {"kind": "error", "status": status, "code": code, "message": "No."} | when


@dataclass(frozen=True)
class Listing:
    """How Organizations answers: which accounts are scanned then (none after an error), and what is said."""

    fault: dict[str, Any]
    accounts: tuple[str, ...] = ()
    says: tuple[str, ...] = ()


THROTTLED = "TooManyRequestsException"
LISTINGS = {
    "three pages": Listing(
        answers([account(OWN)], [account(MEMBER)], [account(OTHER)]), (OWN, MEMBER, OTHER)
    ),
    "empty pages that are not the last": Listing(answers([], [], [account(MEMBER)]), (MEMBER,)),
    "throttled once": Listing(refuses(400, THROTTLED, times=1), (OWN,)),
    "State alone": Listing(answers([account(MEMBER, "ACTIVE"), account(OTHER, "SUSPENDED")]), (MEMBER,)),
    "Status alone": Listing(
        answers([account(MEMBER, None, "ACTIVE"), account(OTHER, None, "SUSPENDED")]),
        (MEMBER,),
        (f"Account {OTHER} is SUSPENDED: not scanned (n)",),
    ),
    "State counts, not Status": Listing(
        answers(
            [
                account(MEMBER, "ACTIVE", "SUSPENDED"),
                account(OTHER, "PENDING_CLOSURE", "ACTIVE"),
                account(OWN, "PENDING_ACTIVATION", "ACTIVE"),
            ]
        ),
        (MEMBER,),
        (f"Account {OTHER} is PENDING_CLOSURE: not", f"Account {OWN} is PENDING_ACTIVATION: not"),
    ),
    "neither State nor Status": Listing(answers([account(MEMBER), account(OTHER, None)]), (), ("Status",)),
    "account without an id": Listing(answers([account(MEMBER), {"State": "ACTIVE"}]), (), ("Id",)),
    "account that is text": Listing(answers({"Accounts": [OWN]}), ()),
    "account that is null": Listing(answers({"Accounts": [None]}), ()),
    "id that is a number": Listing(answers([account(MEMBER), account(7)]), (), ("its Id is 7, not text",)),  # type: ignore[arg-type]
    "id that is too short": Listing(answers([account(MEMBER), account("1234")]), (), ("'1234' is not",)),
    "id that is null": Listing(answers({"Accounts": [{"State": "ACTIVE"}]}), (), ("Id",)),
    "one id with two states": Listing(
        answers([account(MEMBER)], [account(MEMBER, "SUSPENDED")]), (), (MEMBER, "SUSPENDED")
    ),
    "one id twice": Listing(answers([account(MEMBER)], [account(MEMBER)]), (MEMBER,)),
    "state that is a list": Listing(
        answers({"Accounts": [{"Id": MEMBER, "State": ["ACTIVE"]}]}), (), ("its State is",)
    ),
    "token that is a number": Listing(answers({"Accounts": [account(MEMBER)], "NextToken": 7}), ()),
    "token that is false": Listing(answers({"Accounts": [account(MEMBER)], "NextToken": False}), ()),
    "all of them suspended": Listing(
        answers([account(MEMBER, "SUSPENDED"), account(OWN, "CLOSED")]),
        (),
        ("no account to scan", "CLOSED, SUSPENDED"),
    ),
    "no account at all": Listing(answers([]), ()),
    "nothing in the second answer": Listing(answers([account(MEMBER)], {}), (), ("Accounts",)),
    "captive portal": Listing(
        {"kind": "body", "body": b"<html>Log in</html>", "content_type": "text/html"}, (), ("is not AWS's",)
    ),
    "not allowed on the second page": Listing(
        answers([account(MEMBER)], {"__type": "AccessDeniedException"}),
        (),
        ("organizations:ListAccounts", "iam-policy"),
    ),
    "no organization": Listing(
        refuses(400, "AWSOrganizationsNotInUseException"), (), ("management account",)
    ),
    "throttled for ever": Listing(refuses(400, THROTTLED), (), ("throttled",)),
    "the same page for ever": Listing(
        answers({"Accounts": [account(MEMBER)], "NextToken": "0"}), (), ("keeps announcing a next page",)
    ),
}


@pytest.mark.parametrize("why", LISTINGS)
def test_list_of_accounts_is_whole_or_an_error(aws: AwsServer, scan: Scan, tmp_path: Path, why: str) -> None:
    listing = LISTINGS[why]
    make_organization(aws, members=0)
    aws.fault(**listing.fault, action="ListAccounts")
    impatient = script_with(tmp_path, SDK_ATTEMPTS=2, MAX_PAGES=100)
    result = scan({"organization": True}, script=impatient)
    requests = aws.requests
    for text in listing.says:
        assert text in result.err + result.out
    if listing.accounts:
        assert result.code == 0
        assert accounts_of(result) == sorted(listing.accounts)
        assert entered(requests) == sorted(set(listing.accounts) - {OWN})
        return
    assert result.code == 5
    assert result.err.startswith("tagcheck: ")
    assert {request.action for request in requests} == {"GetCallerIdentity", "ListAccounts"}
    assert len(requests) <= 110
    assert not (result.cwd / "out.csv").exists()
    with closing(sqlite3.connect(result.cwd / STATE)) as db:
        assert db.execute("SELECT count(*) FROM scans").fetchone() == (0,)


def test_account_in_a_state_that_is_new_is_unread_and_keeps_its_findings(
    aws: AwsServer, scan: Scan, tmp_path: Path
) -> None:
    aws.launch(REGION, account_id=MEMBER)
    make_organization(aws, members=0)
    listed = aws.fault(**answers([account(MEMBER), account(OWN)]), action="ListAccounts")
    assert len(found(scan({"organization": True}, check=3))) == 1
    before = findings_table(tmp_path / STATE)
    listed.times = 0
    aws.fault(**answers([account(MEMBER, "FROZEN"), account(OWN)]), action="ListAccounts")
    for args in ((), ("--account", MEMBER)):
        result = scan({"organization": True}, args=args, check=4)
        own = {} if args else {(OWN, REGION): None}
        assert coverage(result) == {(MEMBER, "*"): "UnknownAccountState"} | own
        assert "'FROZEN'" in result.err
        assert findings_table(tmp_path / STATE) == before
    assert entered(aws.requests) == [MEMBER]


@pytest.mark.parametrize("saved", [False, True], ids=["live", "saved"])
def test_share_without_an_account_says_so_and_writes_every_output(
    aws: AwsServer, scan: Scan, tmp_path: Path, saved: bool
) -> None:
    save_fleet(tmp_path, instance())
    args = ("--shard", "1/4", *(("--instances", "fleet.json") if saved else ()))
    result = scan(None, args=args, check=0)
    notice = "--shard 1/4 has no accounts: nothing was scanned"
    assert result.json("out.json")["notices"][1:] == [notice]
    assert notice in result.out
    assert coverage(result) == {}
    assert result.csv("out.csv") == []
    assert ET.parse(tmp_path / "out.xml").getroot().tag == "testsuites"
    with closing(sqlite3.connect(tmp_path / STATE)) as db:
        assert db.execute("SELECT count(*) FROM scans").fetchone() == (1,)


def test_share_of_a_file_that_is_cut_is_not_empty(tagcheck: Callable[..., Result], tmp_path: Path) -> None:
    save_fleet(tmp_path, instance(), NextToken="t")
    args = ("--policy", write_policy(tmp_path, None, REGION), "--instances", "fleet.json", "--shard", "1/4")
    assert "fleet.json has a NextToken, so more follows" in tagcheck("scan", *args, check=2).err


def test_share_whose_accounts_are_all_suspended_is_empty(aws: AwsServer, scan: Scan) -> None:
    make_organization(aws, members=0)
    aws.fault(**answers([account(OWN, "SUSPENDED")]), action="ListAccounts")
    result = scan({"organization": True}, args=("--shard", "3/4"), check=0)
    assert [notice.split(":")[0] for notice in result.json("out.json")["notices"][1:]] == [
        f"Account {OWN} is SUSPENDED",
        "--shard 3/4 has no accounts",
    ]


# ---- Which accounts there are: the policy and the command line ---------------------------------------------

LIST = {"ids": [MEMBER, OWN, OTHER]}


@dataclass(frozen=True)
class Scope:
    """What a policy and the arguments name, and the accounts that are scanned; none, if it is an error."""

    accounts: dict[str, Any] | None
    args: tuple[str, ...] = ()
    scanned: tuple[str, ...] = ()
    says: str = ""
    code: int = 0


SCOPES = {
    "ids": Scope(LIST, (), (OWN, MEMBER, OTHER)),
    "organization but the excluded": Scope({"organization": True, "exclude": [OWN]}, (), (MEMBER,)),
    "one account asked for": Scope(LIST, ("--account", MEMBER), (MEMBER,)),
    "share without an account": Scope(None, ("--shard", "1/4")),
    "share with the account": Scope(None, ("--shard", "3/4"), (OWN,)),
    "unknown to the policy": Scope(
        {"ids": [MEMBER]}, ("--account", OTHER), says=f"--account {OTHER}", code=2
    ),
    "asked for, but excluded": Scope(LIST | {"exclude": [OTHER]}, ("--account", OTHER), says=OTHER, code=2),
    "another than the caller's": Scope(None, ("--account", MEMBER), says=f"credentials are of {OWN}", code=2),
    "every id excluded": Scope({"ids": [OTHER], "exclude": [OTHER]}, says="exclude", code=2),
    "suspended account asked for": Scope(
        {"organization": True}, ("--account", SUSPENDED), says="SUSPENDED", code=2
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", SCOPES)
def test_scope_is_what_policy_and_arguments_have_in_common(aws: AwsServer, scan: Scan, why: str) -> None:
    scope = SCOPES[why]
    listed = [account(MEMBER), account(OWN), account(SUSPENDED, "SUSPENDED")]
    aws.fault(**answers(listed), action="ListAccounts")
    result, requests = scan(scope.accounts, *REGIONS[1:], args=scope.args), aws.requests
    assert result.code == scope.code, result.err
    assert scope.says in result.err
    assert entered(requests) == sorted(set(scope.scanned) - {OWN})
    if scope.code:
        assert "DescribeInstances" not in {request.action for request in requests}
    else:
        assert coverage(result) == {(id_, region): None for id_ in scope.scanned for region in REGIONS[1:]}


@pytest.mark.parametrize("share", ["0/4", "5/4", "4"])
def test_share_that_is_none_is_a_usage_error(tagcheck: Callable[..., Result], share: str) -> None:
    assert "--shard" in tagcheck("scan", "--shard", share, check=2).err


def test_credentials_of_another_account_than_expected_read_nothing(aws: AwsServer, scan: Scan) -> None:
    result = scan(LIST, keys={"expected_account": MEMBER}, check=5)
    assert f"these are the credentials of {OWN}; the policy expects {MEMBER}" in result.err
    assert [request.action for request in aws.requests] == ["GetCallerIdentity"]


@pytest.mark.parametrize(
    ("accounts", "args", "scanned"),
    [
        pytest.param({"ids": [MEMBER]}, (), [MEMBER], id="ids"),
        pytest.param({"organization": True}, ("--shard", "3/4"), [OWN], id="share"),
    ],
)
def test_saved_instances_of_accounts_out_of_scope_are_left_out(
    tagcheck: Callable[..., Result],
    tmp_path: Path,
    accounts: dict[str, Any],
    args: tuple[str, ...],
    scanned: list[str],
) -> None:
    save_fleet(tmp_path, *(reservation(f"i-{id_}", account=id_) for id_ in (OWN, MEMBER)))
    policy = write_policy(tmp_path, accounts, REGION)
    result = tagcheck("scan", "--policy", policy, "--instances", "fleet.json", *OUTPUTS, *args, check=3)
    assert found(result) == [f"i-{id_}" for id_ in scanned]
    assert accounts_of(result) == scanned
    [left_out] = {OWN, MEMBER} - set(scanned)
    assert f"1 instance left out, not in scope: {left_out} {REGION}" in result.err


# ---- The accounts of a policy, when they are wrong ---------------------------------------------------------

MISTAKES = {
    "both": ('organization: true\n  ids: ["012345678901"]\n  role_name: r', "6:3: accounts: "),
    "neither": ("role_name: r", "6:3: accounts: "),
    "organization: false": ("organization: false\n  role_name: r", "6:3: accounts: "),
    "no role": ("organization: true", "6:3: accounts: the key 'role_name' is missing"),
    "ARN of a role": (
        "organization: true\n  role_name: arn:aws:iam::123456789012:role/r",
        "7:14: accounts.role_name: ",
    ),
    "id that is too short": (
        'ids: ["012345678901", 12345]\n  role_name: r',
        "6:25: accounts.ids[1]: '12345' is",
    ),
    "id with hyphens": ("ids: [0123-4567-8901]\n  role_name: r", "6:9: accounts.ids[0]: '0123-4567-8901' is"),
    "name in place of an id": (
        "organization: true\n  exclude: [prod]\n  role_name: r",
        "7:13: accounts.exclude[0]: ",
    ),
    "no ids": ("ids: []\n  role_name: r", "6:8: accounts.ids: "),
    "misspelt key": (
        "organisation: true\n  role_name: r",
        "6:3: accounts: unknown key 'organisation' (did you",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Validate every policy of the table, and give what is said of them."""
    cwd = tmp_path_factory.mktemp("mistaken")
    for name, (accounts, _) in MISTAKES.items():
        head = "version: 1\nname: t\nrequired_tags: [Owner]\nregions: {us-east-1: }\naccounts:\n  "
        (cwd / f"{name}.yaml").write_text(head + accounts)
    return run_tagcheck("validate", *(f"{name}.yaml" for name in MISTAKES), cwd=cwd, check=2).out.splitlines()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named_with_its_place(mistaken: list[str], name: str) -> None:
    said = [line for line in mistaken if line.startswith(f"{name}.yaml:") and "error" not in line]
    assert [line for line in said if MISTAKES[name][1] in line]


# ---- How an account is entered -----------------------------------------------------------------------------


def test_role_is_assumed_for_reading_alone(aws: AwsServer, scan: Scan) -> None:
    accounts = {"ids": [MEMBER], "role_name": "teams/tagcheck", "external_id": "x-1042"}
    scan(accounts, *REGIONS, env={"AWS_DEFAULT_REGION": "eu-central-1"}, check=0)
    [request] = aws.calls("AssumeRole")
    assert request.region == "eu-central-1"
    assert request.params["RoleArn"] == f"arn:aws:iam::{MEMBER}:role/teams/tagcheck"
    assert request.params["ExternalId"] == "x-1042"
    assert request.params["DurationSeconds"] == "3600"
    assert re.fullmatch(r"[\w+=,.@-]{2,64}", request.params["RoleSessionName"])
    [statement] = json.loads(request.params["Policy"])["Statement"]
    assert statement == {
        "Effect": "Allow", "Action": ["ec2:DescribeInstances", "ec2:DescribeRegions"], "Resource": "*"
    }  # fmt: skip


def test_role_is_of_the_partition_of_the_caller(aws: AwsServer, scan: Scan) -> None:
    arn = f"arn:aws-us-gov:iam::{OWN}:user/ann".encode()
    aws.fault("edit", action="GetCallerIdentity", edit=lambda body: re.sub(rb"arn:aws[^<]*", arn, body))
    scan({"ids": [MEMBER]}, "us-gov-east-1", check=0)
    [request] = aws.calls("AssumeRole")
    assert request.params["RoleArn"] == f"arn:aws-us-gov:iam::{MEMBER}:role/{ROLE}"
    assert request.region == "us-gov-west-1"
    assert "ExternalId" not in request.params


def expiring(minutes: int, **when: int) -> dict[str, Any]:
    """Give the fault of credentials that expire so many minutes from now."""

    def edit(body: bytes) -> bytes:
        moment = datetime.now(UTC) + timedelta(minutes=minutes)
        text = moment.strftime("<Expiration>%Y-%m-%dT%H:%M:%SZ").encode()
        edited, number = re.subn(rb"<Expiration>[^<]*", text, body)
        assert number == 1
        return edited

    return {"kind": "edit", "edit": edit} | when


MARKER = "MARKERmarker0123"


def edited(name: str, text: str) -> dict[str, Any]:
    """Give the fault of an answer in which an element has another text."""
    pattern, made = re.compile(f"<{name}>[^<]*".encode()), f"<{name}>{text}".encode()
    return {"kind": "edit", "edit": lambda body: pattern.sub(made, body)}


@dataclass(frozen=True)
class Role:
    """What a member's role answers: the error, the regions that show it, and how often it is assumed at most.

    No regions: whichever they are.
    """

    faults: tuple[dict[str, Any], ...] = ()
    code: str | None = None
    where: tuple[str, ...] = REGIONS
    says: str = ""
    assumed: int = 1


def lost(code: str, *faults: dict[str, Any], says: str = "", assumed: int = 1) -> Role:
    """Write a row in which the account as a whole is not read, in one line."""
    return Role(faults, code, ("*",), says, assumed)


NOT_AWS = b"<AssumeRoleResponse xmlns='https://sts.amazonaws.com/doc/2011-06-15/'><x/></AssumeRoleResponse>"
EMPTY = NOT_AWS.replace(b"<x/>", b"<AssumeRoleResult/>")
ROLES = {
    "no trouble": Role(),
    "throttled once": Role((refuses(400, "Throttling", times=1),), assumed=2),
    "denied": lost("AccessDenied", refuses(403, "AccessDenied"), says="does not trust the caller"),
    "STS is not enabled there": lost("RegionDisabledException", refuses(403, "RegionDisabledException")),
    "throttled for ever": lost("Throttling", refuses(400, "Throttling"), says="throttled", assumed=2),
    "dropped for ever": lost("ConnectionClosedError", {"kind": "drop"}, assumed=4),
    "captive portal": lost("ForeignAnswer", {"kind": "body", "body": b"<html>Log in</html>"}, says="proxy"),
    "another answer": lost("ForeignAnswer", {"kind": "body", "body": NOT_AWS}, says="proxy"),
    "no credentials in the answer": lost("ForeignAnswer", {"kind": "body", "body": EMPTY}, says="proxy"),
    "renewed before they expire": Role((expiring(1, times=1),), assumed=2),
    "not renewed before they expire": Role(
        (expiring(1, times=1), refuses(403, "AccessDenied", skip=1)), "AccessDenied", says="trust", assumed=4
    ),
    "renewed by a captive portal": Role(
        (expiring(1, times=1), {"kind": "body", "body": NOT_AWS, "skip": 1}), "ForeignAnswer", assumed=4
    ),
    "not renewed yet, but still good": Role(
        (expiring(14, times=1), refuses(403, "AccessDenied", skip=1)), assumed=4
    ),
    "expiry that is no time": lost(
        "IncompleteAnswer", edited("Expiration", "soon"), says="cut short", assumed=2
    ),
    "expiry after all time": lost("ForeignAnswer", edited("Expiration", "9999-12-31T23:59:59Z"), says="9999"),
    "no access key": lost("ForeignAnswer", edited("AccessKeyId", ""), says="no AccessKeyId"),
    "cut short within the credentials": lost(
        "IncompleteAnswer",
        {"kind": "body", "body": f"<x><SecretAccessKey>{MARKER}</SecretAccessKey><y".encode()},
        assumed=2,
    ),
    "token with a line break": Role(
        (edited("SessionToken", f"{MARKER}&#10;b"),), "InvalidHeader", says="copy it again"
    ),
    "credentials of another account": lost(
        "ForeignAnswer", edited("Arn", f"arn:aws:sts::{OTHER}:assumed-role/r/s"), says="not of the account"
    ),
    "credentials of nobody": lost("ForeignAnswer", edited("Arn", ""), says="credentials of nobody"),
    "renewed with those of another account": Role(
        (expiring(1, times=1), edited("Arn", f"arn:aws:sts::{OTHER}:assumed-role/r/s") | {"skip": 1}),
        "ForeignAnswer",
        assumed=4,
    ),
    "expired when they come": Role((expiring(-60),), "Any", where=(), assumed=4),
}


@dataclass(frozen=True)
class Listed:
    """What a scan ended with, and what its caller asked for."""

    result: Result
    requests: list[Request]


WITH_ROLES = {why: f"2000000000{number}" for number, why in enumerate(ROLES, start=10)}


@pytest.fixture(scope="module")
def assumed(aws_server: AwsServer, tmp_path_factory: pytest.TempPathFactory) -> Listed:
    """Scan accounts each of which has another role of the table, and two that have no trouble."""
    aws, cwd = aws_server, tmp_path_factory.mktemp("assumed")
    aws.reset()
    for why, role in ROLES.items():
        for fault in role.faults:
            aws.fault(
                **fault,
                action="AssumeRole",
                when=lambda request, id_=WITH_ROLES[why]: id_ in request.params["RoleArn"],
            )
    accounts = {"ids": [*WITH_ROLES.values(), OWN, OTHER]}
    args = ("scan", "--policy", write_policy(cwd, accounts, *REGIONS), *OUTPUTS)
    impatient = script_with(cwd, SDK_ATTEMPTS=2, NETWORK_PAUSES=(0.01,))
    return Listed(run_tagcheck(*args, cwd=cwd, env=aws.env, script=impatient, check=4), aws.requests)


@pytest.mark.parametrize("why", ROLES)
def test_role_that_fails_costs_its_account_alone(assumed: Listed, why: str) -> None:
    role, account_id = ROLES[why], WITH_ROLES[why]
    codes = {region: code for (id_, region), code in coverage(assumed.result).items() if id_ == account_id}
    if role.where:
        assert codes == dict.fromkeys(role.where, role.code)
    assert all(codes.values()) is bool(role.code)
    said = [line for line in assumed.result.err.splitlines() if line.startswith(account_id)]
    assert len(said) == (len(codes) if role.code else 0)  # the others have no instances
    assert all(role.says in line for line in said)
    assert 1 <= entered(assumed.requests).count(account_id) <= role.assumed


def test_no_credentials_of_a_role_are_printed(assumed: Listed) -> None:
    result = assumed.result
    texts = [result.out, result.err, *(file.read_text("latin-1") for file in result.cwd.iterdir())]
    assert not [text for text in texts if MARKER in text]


def test_roles_that_fail_cost_no_other_account(assumed: Listed) -> None:
    targets = coverage(assumed.result)
    assert all(targets[id_, region] is None for id_ in (OWN, OTHER) for region in REGIONS)
    assert {id_ for id_, _ in targets} == {*WITH_ROLES.values(), OWN, OTHER}
    assert entered(assumed.requests).count(OTHER) == 1
    assert entered(assumed.requests).count(OWN) == 0


def test_renewed_credentials_are_used(aws: AwsServer, scan: Scan) -> None:
    aws.fault(**expiring(1, times=1), action="AssumeRole")
    given: list[str] = []

    def note(body: bytes) -> bytes:
        given.extend(re.findall(r"<AccessKeyId>([^<]+)", body.decode()))
        return body

    aws.fault("edit", action="AssumeRole", edit=note)
    scan({"ids": [MEMBER]}, *REGIONS, check=0)
    assert len(given) == 2
    assert [request.access_key for request in aws.calls("DescribeInstances")] == given[1:] * len(REGIONS)


# ---- Many targets at a time --------------------------------------------------------------------------------

CROWD = {"ids": [f"1000000000{number}" for number in range(10, 26)]}


def enable_only(aws: AwsServer, *regions: str) -> None:
    """Disable every other region in all accounts."""
    listed = aws.client("ec2", REGION).describe_regions(AllRegions=True)["Regions"]
    aws.disabled |= {(None, each["RegionName"]) for each in listed if each["RegionName"] not in regions}
    aws.opted_in |= set(regions)


def test_regions_are_those_that_each_account_has_enabled(aws: AwsServer, scan: Scan) -> None:
    enable_only(aws, REGION, "me-south-1", "af-south-1")
    aws.disabled |= {(MEMBER, "me-south-1"), (OTHER, "af-south-1")}
    result = scan(LIST, "*", check=0)
    regions = {
        OWN: (REGION, "me-south-1", "af-south-1"),
        MEMBER: (REGION, "af-south-1"),
        OTHER: (REGION, "me-south-1"),
    }
    assert coverage(result) == {(id_, region): None for id_ in regions for region in regions[id_]}


def test_region_that_one_account_has_not_enabled_costs_no_other(aws: AwsServer, scan: Scan) -> None:
    enable_only(aws, REGION, "us-west-2", "af-south-1")
    aws.disabled.add((MEMBER, "af-south-1"))
    result = scan({"ids": [OWN, MEMBER]}, "af-south-1", "*", check=4)
    regions = ("af-south-1", REGION, "us-west-2")
    assert coverage(result) == {
        **{(id_, region): None for id_ in (OWN, MEMBER) for region in regions},
        (MEMBER, "af-south-1"): "AuthFailure",
    }


def test_accounts_take_turns(aws: AwsServer, scan: Scan) -> None:
    scan(LIST, *REGIONS, args=("--workers", "1"), check=0)
    turns = [request.account_id for request in aws.calls("DescribeInstances")]
    assert all(one != next_ for one, next_ in itertools.pairwise(turns))
    assert len(turns) == 9


def test_no_more_workers_at_a_time_than_asked_for(aws: AwsServer, scan: Scan) -> None:
    meeting, working, numbers = threading.Barrier(3), Counter[str](), itertools.count()
    crowds: list[int] = []

    def work(request: Request) -> None:
        working[request.account_id] = 1
        crowds.append(working.total())
        if next(numbers) < 3:
            meeting.wait(20)
        time.sleep(0.1)
        working[request.account_id] = 0

    aws.fault("answer", action="DescribeInstances", answer=work)
    scan({"ids": CROWD["ids"][:8]}, args=("--workers", "3"), check=0)
    assert max(crowds) == 3


@pytest.fixture
def impatient(tmp_path: Path) -> Path:
    """Give a script that is tagcheck.py, but does not pause long."""
    return script_with(tmp_path, NETWORK_PAUSES=(0.01,))


def test_region_that_does_not_answer_costs_a_few_tries_and_not_one_an_account(
    aws: AwsServer, scan: Scan, impatient: Path
) -> None:
    aws.fault("drop", action="DescribeInstances", region="eu-west-1")
    result = scan(CROWD, "eu-west-1", REGION, args=("--workers", "2"), script=impatient, check=4)
    unread = {region for (_, region), code in coverage(result).items() if code}
    assert unread == {"eu-west-1"}
    assert sum(code is None for code in coverage(result).values()) == len(CROWD["ids"])
    tries = (script.MAX_SILENT + 2) * script.SDK_ATTEMPTS * (1 + len(script.NETWORK_PAUSES))
    assert len(aws.calls("DescribeInstances", region="eu-west-1")) <= tries


def test_endpoint_at_which_nobody_listens_is_not_tried_for_every_account(scan: Scan, impatient: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    env = {"AWS_ENDPOINT_URL_EC2": closed}
    result = scan(CROWD, env=env, args=("--workers", "2"), script=impatient, check=4)
    assert set(coverage(result).values()) == {"EndpointConnectionError"}
    assert result.err.count("not tried") >= len(CROWD["ids"]) - script.MAX_SILENT - 2


@pytest.mark.parametrize(
    ("number", "action"),
    [
        pytest.param(signal.SIGINT, "DescribeInstances", id="Ctrl-C while instances are read"),
        pytest.param(signal.SIGTERM, "AssumeRole", id="SIGTERM while accounts are entered"),
    ],
)
def test_signal_ends_a_scan_all_of_whose_workers_wait(
    aws: AwsServer, tmp_path: Path, number: int, action: str
) -> None:
    fault: Fault = aws.fault("slow", action=action, seconds=60)
    args = ("scan", "--policy", write_policy(tmp_path, CROWD, *REGIONS), *OUTPUTS)
    process = subprocess.Popen(
        [sys.executable, TAGCHECK, *args],
        cwd=tmp_path,
        env=clean_environment(tmp_path) | aws.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 30
        while fault.hits < 16:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        aws.clear_faults()
    assert (process.returncode, out, err) == (130, "", "tagcheck: interrupted; nothing was recorded\n")
    assert {file.name for file in tmp_path.iterdir()} == {"policy.yaml", STATE}
    with closing(sqlite3.connect(tmp_path / STATE)) as db:
        assert db.execute("SELECT count(*) FROM scans").fetchone() == (0,)


# ---- What accounts are called, and where they are in the organization --------------------------------------

UNIT, NESTED = "ou-ab12-11111111", "ou-ab12-22222222"
ROOT = "o-a1b2c3d4e5/r-ab12/"


def named(account_id: str, name: str, *units: str) -> dict[str, Any]:
    """Write an account as ListAccounts does, with its name and its place."""
    path = ROOT + "".join(f"{unit}/" for unit in units)
    return account(account_id) | {"Name": name, "Paths": [f"{path}{account_id}/"]}


@pytest.fixture
def organization(aws: AwsServer) -> AwsServer:
    """Give a server of an organization with three accounts, one of whose units is within another."""
    make_organization(aws, members=0)
    for account_id in (OWN, MEMBER, OTHER):
        aws.launch(REGION, account_id=account_id)
    accounts = [named(OWN, "main"), named(MEMBER, "prod", UNIT), named(OTHER, "batch", UNIT, NESTED)]
    aws.fault(**answers(accounts), action="ListAccounts")
    return aws


def test_every_output_shows_the_names_of_accounts(
    organization: AwsServer, scan: Scan, tmp_path: Path
) -> None:
    result = scan({"organization": True, "names": {OTHER: "the batch"}}, check=3)
    names = {OWN: "main", MEMBER: "prod", OTHER: "the batch"}
    report = result.json("out.json")
    for key in ("coverage", "findings"):
        assert {entry["account_id"]: entry["account_name"] for entry in report[key]} == names
    rows = result.csv("out.csv")
    assert {row["AccountId"]: row["AccountName"] for row in rows} == names
    assert [*rows[0]][-1] == "AccountName"
    failures = ET.parse(tmp_path / "out.xml").getroot().iterfind("testsuite/testcase/failure")
    texts = [str(failure.text) for failure in failures]
    for account_id, name in names.items():
        assert any(f"account {account_id} ({name}) {REGION}" in text for text in texts)
        assert f"{account_id} ({name})" in result.out
    policy = ("--policy", "policy.yaml")
    history = run_tagcheck("history", *policy, cwd=tmp_path, check=0).out
    page = run_tagcheck("report", *policy, "--html", "-", cwd=tmp_path, check=0).out
    for account_id, name in names.items():
        assert f"{account_id} ({name})" in history
        assert f"{account_id} ({name})" in page


@pytest.mark.parametrize(
    "command", [("scan",), ("history",), ("remediate", "--csv", "-")], ids=lambda c: c[0]
)
def test_account_is_chosen_by_its_name(
    organization: AwsServer, scan: Scan, tmp_path: Path, command: tuple[str, ...]
) -> None:
    accounts = {"organization": True}
    scan(accounts, check=3)
    policy = write_policy(tmp_path, accounts, REGION, required_tags=[{"key": "Owner", "default": "ops"}])
    outputs = OUTPUTS if command == ("scan",) else ()

    def run(name: str, **more: Any) -> Result:
        args = (*command, *outputs, "--policy", policy, "--account", name)
        return run_tagcheck(*args, cwd=tmp_path, env=organization.env, **more)

    result = run("prod")
    assert result.code in (0, 3)
    text = result.out + (json.dumps(result.json("out.json")["findings"]) if outputs else "")
    assert MEMBER in text
    assert OTHER not in text
    wrong = run("prd", check=2).err
    assert "--account prd: no account of this name is known here" in wrong
    assert "did you mean 'prod'?" in wrong


def test_name_that_two_accounts_have_is_refused(organization: AwsServer, scan: Scan) -> None:
    accounts = {"organization": True, "names": {OWN: "prod"}}
    result = scan(accounts, args=("--account", "prod"), check=2)
    assert f"--account prod: {OWN}, {MEMBER} have this name; give an id" in result.err


def test_account_with_the_id_of_another_as_its_name_is_not_taken_for_it(
    organization: AwsServer, scan: Scan
) -> None:
    accounts = {"organization": True, "names": {OWN: MEMBER}}
    assert accounts_of(scan(accounts, args=("--account", MEMBER), check=3)) == [MEMBER]


def test_names_of_a_policy_without_an_organization(aws: AwsServer, scan: Scan) -> None:
    aws.launch(REGION, account_id=MEMBER)
    accounts = {"ids": [MEMBER, OWN], "names": {MEMBER: "prod", OTHER: "gone"}}
    result = scan(accounts, args=("--account", "prod"), check=3)
    assert accounts_of(result) == [MEMBER]
    assert [finding["account_name"] for finding in result.json("out.json")["findings"]] == ["prod"]
    assert not aws.calls("ListAccounts")


@pytest.mark.parametrize("name", ["\x1b[31mred\x1b[0m\n", "=1+1", "<script>", "\u202e", "n" * 300, ""])
def test_hostile_name_of_an_account_reaches_no_output(aws: AwsServer, scan: Scan, name: str) -> None:
    make_organization(aws, members=0)
    aws.launch(REGION)
    aws.fault(**answers([account(OWN) | {"Name": name}]), action="ListAccounts")
    result = scan({"organization": True}, check=3)
    assert "\x1b" not in result.out + result.err
    shown = result.json("out.json")["findings"][0]["account_name"]
    assert len(shown) <= 50
    assert script.is_printable(shown)
    assert not result.csv("out.csv")[0]["AccountName"].startswith("=")
    page = run_tagcheck("report", "--policy", "policy.yaml", "--html", "-", cwd=result.cwd, check=0).out
    assert "<script>" not in page


UNITS = {
    "a unit, and the units below it": ([UNIT], {MEMBER, OTHER}),
    "a unit within another": ([NESTED], {OTHER}),
    "a path, and nothing below it": ([f"{ROOT}{UNIT}/"], {MEMBER}),
    "a path without its last slash": ([f"{ROOT}{UNIT}"], {MEMBER}),
    "a path and all below it": ([f"{ROOT}{UNIT}/*"], {MEMBER, OTHER}),
    "any path to a unit": ([f"*/{NESTED}/"], {OTHER}),
    "the root": (["r-ab12"], {OWN, MEMBER, OTHER}),
    "ids that begin alike": (["ou-ab12-1*", "ou-ab12-9*"], {MEMBER, OTHER}),
    "another unit": (["ou-ab12-1111111"], set[str]()),
}


@pytest.mark.parametrize("which", UNITS)
def test_organizational_units_of_rules_and_exemptions(
    organization: AwsServer, scan: Scan, which: str
) -> None:
    units, inside = UNITS[which]
    rule = {"key": "Owner", "when": {"organizational_units": units}}
    result = scan({"organization": True}, keys={"required_tags": [rule]})
    assert {finding["account_id"] for finding in result.json("out.json")["findings"]} == inside
    exemption = {"reason": "r", "organizational_units": units}
    result = scan({"organization": True}, keys={"exemptions": [exemption]})
    assert {each["account_id"] for each in result.json("out.json")["exempted"]} == inside


def test_account_whose_place_is_not_known_is_unread(aws: AwsServer, scan: Scan, tmp_path: Path) -> None:
    make_organization(aws, members=0)
    aws.launch(REGION)
    aws.fault(**answers([account(OWN)]), action="ListAccounts")
    keys = {"required_tags": [{"key": "Owner", "when": {"organizational_units": [UNIT]}}]}
    result = scan({"organization": True}, keys=keys, check=4)
    assert coverage(result) == {(OWN, "*"): "UnknownAccountPath"}
    save_fleet(tmp_path, instance())
    result = scan({"organization": True}, args=("--instances", "fleet.json"), keys=keys, check=4)
    assert coverage(result) == {(OWN, REGION): "UnknownAccountPath"}


@pytest.mark.parametrize("paths", ["x", ["x"], [7], {"a": 1}, [f"{ROOT}../"], [f"{ROOT}\x1b/"]], ids=repr)
def test_place_that_is_none_is_refused(aws: AwsServer, scan: Scan, paths: Any) -> None:
    make_organization(aws, members=0)
    aws.fault(**answers([account(OWN) | {"Paths": paths}]), action="ListAccounts")
    assert "cannot list the accounts" in scan({"organization": True}, check=5).err


def test_explain_knows_where_an_account_was(organization: AwsServer, scan: Scan, tmp_path: Path) -> None:
    exemption = {"reason": "r", "organizational_units": [NESTED], "required_tags": ["Owner"]}
    keys = {"required_tags": ["Owner", "Team"], "exemptions": [exemption]}
    result = scan({"organization": True}, keys=keys, check=3)
    ids = {each["account_id"]: each["instance_id"] for each in result.json("out.json")["findings"]}
    for account_id in (MEMBER, OTHER):
        text = run_tagcheck("explain", "--policy", "policy.yaml", ids[account_id], cwd=tmp_path, check=0).out
        assert ("EXEMPTED" in text) == (account_id == OTHER)
    # A saved file does not say where its account is: what is known of it stays known.
    save_fleet(tmp_path, instance(1), account=OTHER)
    write_policy(tmp_path, {"organization": True, "names": {OTHER: "other"}}, REGION, **keys)
    offline = run_tagcheck(
        "scan", "--policy", "policy.yaml", "--instances", "fleet.json", cwd=tmp_path, check=4
    )
    assert "UnknownAccountPath" in offline.out
    write_policy(tmp_path, {"organization": True}, REGION, **keys)
    text = run_tagcheck("explain", "--policy", "policy.yaml", ids[OTHER], cwd=tmp_path, check=0).out
    assert "EXEMPTED" in text
