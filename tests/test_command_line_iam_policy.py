"""`iam-policy`: the printed policies are the least: a scan works with them, and with nothing less."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from aws_server import ACCOUNT_ID, AwsServer
from builders import save_policy
from conftest import Result, run_tagcheck

from tagcheck import check_state

REGION = "us-east-1"
MEMBER = "210987654321"
BUCKET, KEY = "fleet-state", "org/tagcheck.db"
STATE = f"s3://{BUCKET}/{KEY}"
ROLE = "tagcheck-read"

ONE_REGION: dict[str, Any] = {"regions": {REGION: None}}
EVERY_REGION: dict[str, Any] = {"regions": {REGION: None, "*": None}}
IDS = {"accounts": {"ids": [ACCOUNT_ID, MEMBER], "role_name": ROLE}}
ORGANIZATION = {"accounts": {"organization": True, "role_name": f"teams/{ROLE}", "external_id": "x-1042"}}

Document = dict[str, Any]
Documents = dict[str, Document]


Print = Callable[..., Documents]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Print:
    """Give a function that prints the documents for a policy with these keys; it asks the script once."""
    known: dict[str, Documents] = {}

    def run(keys: Mapping[str, Any], *args: str) -> Documents:
        case = json.dumps([keys, args])
        if case not in known:
            cwd = tmp_path_factory.mktemp("printed")
            command = ("iam-policy", "--policy", save_policy(cwd, **keys), *args)
            known[case] = run_tagcheck(*command, cwd=cwd, check=0).json("-")
        return known[case]

    return run


def allowed(document: Document) -> dict[str, Any]:
    """List which resource each action of a document is allowed on."""
    statements = document["Statement"]
    assert {statement["Effect"] for statement in statements} == {"Allow"}
    pairs = [(action, each["Resource"]) for each in statements for action in each["Action"]]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


# ---- What is printed ---------------------------------------------------------------------------------------

INSTANCES = {"ec2:DescribeInstances": "*"}
REGIONS = {"ec2:DescribeRegions": "*"}
OBJECT = f"arn:*:s3:::{BUCKET}/{KEY}"
OF_STATE = {"s3:GetObject": OBJECT, "s3:PutObject": OBJECT, "s3:ListBucket": f"arn:*:s3:::{BUCKET}"}
OF_IDS = {"sts:AssumeRole": [f"arn:*:iam::{id_}:role/{ROLE}" for id_ in (ACCOUNT_ID, MEMBER)]}
OF_ORGANIZATION = {
    "sts:AssumeRole": [f"arn:*:iam::*:role/teams/{ROLE}"],
    "organizations:ListAccounts": "*",
}


@pytest.mark.parametrize(
    ("keys", "args", "scan", "member"),
    [
        pytest.param(ONE_REGION, (), INSTANCES, None, id="one account"),
        pytest.param(EVERY_REGION, (), INSTANCES | REGIONS, None, id="every region"),
        pytest.param(ONE_REGION, ("--state", "here.db"), INSTANCES, None, id="state in a file"),
        pytest.param(ONE_REGION, ("--state", STATE), INSTANCES | OF_STATE, None, id="state in S3"),
        pytest.param(ONE_REGION | IDS, (), INSTANCES | OF_IDS, INSTANCES, id="accounts by their ids"),
        pytest.param(
            EVERY_REGION | ORGANIZATION,
            ("--state", STATE),
            INSTANCES | REGIONS | OF_ORGANIZATION | OF_STATE,
            INSTANCES | REGIONS,
            id="organization, every region, state in S3",
        ),
    ],
)
def test_actions_are_those_of_the_features(
    printed: Print,
    keys: dict[str, Any],
    args: tuple[str, ...],
    scan: dict[str, Any],
    member: dict[str, Any] | None,
) -> None:
    documents = printed(keys, *args)
    assert {document["Version"] for document in documents.values()} == {"2012-10-17"}
    assert allowed(documents["scan"]) == scan
    assert ("member" in documents, "member_trust" in documents) == (bool(member), bool(member))
    assert not member or allowed(documents["member"]) == member


def test_listing_of_the_bucket_is_for_the_one_key(printed: Print) -> None:
    [listing] = [
        statement
        for statement in printed(ONE_REGION, "--state", STATE)["scan"]["Statement"]
        if "s3:ListBucket" in statement["Action"]
    ]
    assert listing["Condition"] == {"StringLike": {"s3:prefix": KEY}}


@pytest.mark.parametrize(
    ("keys", "principal", "condition"),
    [
        pytest.param(
            ORGANIZATION,
            "CALLER-ACCOUNT-ID",
            {"StringEquals": {"sts:ExternalId": "x-1042"}},
            id="external id",
        ),
        pytest.param(IDS | {"expected_account": ACCOUNT_ID}, ACCOUNT_ID, None, id="expected account"),
    ],
)
def test_role_trusts_the_caller_alone(
    printed: Print, keys: dict[str, Any], principal: str, condition: dict[str, Any] | None
) -> None:
    [trust] = printed(ONE_REGION | keys)["member_trust"]["Statement"]
    assert (trust["Effect"], trust["Action"]) == ("Allow", "sts:AssumeRole")
    assert trust["Principal"] == {"AWS": f"arn:aws:iam::{principal}:root"}
    assert trust.get("Condition") == condition


def test_only_the_required_tags_may_be_written(printed: Print) -> None:
    own = {
        "regions": {
            REGION: {"required_tags": ["Team"]},
            "eu-west-1": {"inherit": False, "required_tags": ["Cost"]},
        }
    }
    documents = printed(own | ORGANIZATION, "--state", STATE)
    writing = dict.fromkeys(("ec2:CreateTags", "ec2:DeleteTags"), "arn:*:ec2:*:*:instance/*")
    assert allowed(documents["remediate"]) == INSTANCES | writing | {"organizations:ListAccounts": "*"}
    assert allowed(printed(own)["remediate"]) == INSTANCES | writing
    condition = documents["remediate"]["Statement"][-1]["Condition"]
    assert condition == {"ForAllValues:StringEquals": {"aws:TagKeys": ["Cost", "Owner", "Team"]}}
    writes = [
        action for name in ("scan", "member") for action in allowed(documents[name]) if "Create" in action
    ]
    assert writes == []


@pytest.mark.parametrize("state", ["s3://", "s3://bucket", "s3://bucket/"])
def test_state_without_bucket_or_key_is_refused(
    tagcheck: Callable[..., Result], tmp_path: Path, state: str
) -> None:
    args = ("iam-policy", "--policy", save_policy(tmp_path, **ONE_REGION), "--state", state)
    assert "s3://BUCKET/KEY" in tagcheck(*args, check=2).err


# ---- Whether it suffices -----------------------------------------------------------------------------------


def without(document: Document, action: str) -> Document:
    """Take one action out of a document; one that is of no use stands for a statement that had no other."""
    statements = [
        statement | {"Action": [each for each in statement["Action"] if each != action] or ["iam:GetUser"]}
        for statement in document["Statement"]
    ]
    shorter = document | {"Statement": statements}
    assert allowed(shorter).keys() - {"iam:GetUser"} == allowed(document).keys() - {action}
    return shorter


class Fleet:
    """An organization of two accounts, in which a scan may do what documents allow it, and nothing else."""

    def __init__(self, aws: AwsServer) -> None:
        self.aws = aws
        self.s3, self.iam = aws.backstage("s3", REGION), aws.backstage("iam", REGION)
        self.s3.create_bucket(Bucket=BUCKET)
        organizations = aws.backstage("organizations", REGION)
        organizations.create_organization(FeatureSet="ALL")
        made = organizations.create_account(Email="member@example.com", AccountName="member")
        self.member = made["CreateAccountStatus"]["AccountId"]
        for account_id in (ACCOUNT_ID, self.member):
            aws.launch(REGION, account_id=account_id)
        listed = aws.backstage("ec2", REGION).describe_regions(AllRegions=True)["Regions"]
        names = {each["RegionName"] for each in listed}
        aws.disabled |= {(None, name) for name in names - {REGION, "us-west-2"}}
        self.iam.create_user(UserName="scanner")
        self.key = self.iam.create_access_key(UserName="scanner")["AccessKey"]
        self.iam_of_member = aws.backstage("iam", REGION, self.member)
        trust = json.dumps({"Version": "2012-10-17", "Statement": []})
        self.iam_of_member.create_role(Path="/teams/", RoleName=ROLE, AssumeRolePolicyDocument=trust)

    def allow(self, documents: Documents) -> None:
        """Allow the user and the role of the member what the documents say; let them find no state."""
        scan, member = (json.dumps(documents.get(name, documents["scan"])) for name in ("scan", "member"))
        self.iam.put_user_policy(UserName="scanner", PolicyName="scan", PolicyDocument=scan)
        self.iam_of_member.put_role_policy(RoleName=ROLE, PolicyName="member", PolicyDocument=member)
        self.s3.delete_object(Bucket=BUCKET, Key=KEY)

    def scan(self, features: str, cwd: Path, code: int) -> Result:
        """Scan as the user."""
        keys, args = FEATURES[features]
        env = {
            "AWS_ACCESS_KEY_ID": self.key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": self.key["SecretAccessKey"],
        }
        command = ("scan", "--policy", save_policy(cwd, **keys), *args, "--json", "out.json")
        self.aws.checks_permissions = True
        try:
            return run_tagcheck(*command, cwd=cwd, env=self.aws.env | env, check=code)
        finally:
            self.aws.checks_permissions = False


@pytest.fixture(scope="module")
def fleet(aws_server: AwsServer) -> Fleet:
    """Set the scene once, for documents are all that differs."""
    aws_server.reset()
    return Fleet(aws_server)


FEATURES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one account": (ONE_REGION, ()),
    "everything": (EVERY_REGION | ORGANIZATION, ("--state", STATE)),
}
LEFT_OUT = [
    ("one account", "scan", "ec2:DescribeInstances", 4),
    ("everything", "scan", "ec2:DescribeInstances", 4),
    ("everything", "scan", "ec2:DescribeRegions", 4),
    ("everything", "scan", "sts:AssumeRole", 4),
    ("everything", "scan", "organizations:ListAccounts", 5),
    ("everything", "scan", "s3:GetObject", 5),
    ("everything", "scan", "s3:PutObject", 5),
    ("everything", "scan", "s3:ListBucket", 5),
    ("everything", "member", "ec2:DescribeInstances", 4),
    ("everything", "member", "ec2:DescribeRegions", 4),
]


@pytest.mark.parametrize("features", FEATURES)
def test_scan_works_with_what_is_printed(fleet: Fleet, printed: Print, tmp_path: Path, features: str) -> None:
    keys, args = FEATURES[features]
    fleet.allow(printed(keys, *args))
    accounts = sorted({ACCOUNT_ID, fleet.member} if "accounts" in keys else {ACCOUNT_ID})
    for status in ("NEW", "REPEAT"):
        findings = fleet.scan(features, tmp_path, code=3).json("out.json")["findings"]
        assert [(each["account_id"], each["status"]) for each in findings] == [
            (id_, status) for id_ in accounts
        ]


@pytest.mark.parametrize(
    ("features", "name", "action", "code"), LEFT_OUT, ids=[" ".join(map(str, case)) for case in LEFT_OUT]
)
def test_scan_without_one_of_the_actions_is_not_clean(
    fleet: Fleet, printed: Print, tmp_path: Path, features: str, name: str, action: str, code: int
) -> None:
    keys, args = FEATURES[features]
    documents = printed(keys, *args)
    fleet.allow(documents | {name: without(documents[name], action)})
    assert action in fleet.scan(features, tmp_path, code).err


@pytest.mark.parametrize("features", FEATURES)
def test_each_action_was_left_out(printed: Print, features: str) -> None:
    keys, args = FEATURES[features]
    documents = {
        name: document for name, document in printed(keys, *args).items() if name in ("scan", "member")
    }
    actions = {(name, action) for name, document in documents.items() for action in allowed(document)}
    assert {(name, action) for which, name, action, _ in LEFT_OUT if which == features} == actions


# ---- Whether it suffices to write tags ---------------------------------------------------------------------


def remediate(fleet: Fleet, document: Document, cwd: Path, *args: str) -> Result:
    """Write tags, or take them back, as a user who may do what the document says.

    moto does not know resources and conditions of calls to EC2: only the actions are tried.
    """
    actions = [action for statement in document["Statement"] for action in statement["Action"]]
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    fleet.allow({"scan": document | {"Statement": [statement]}})
    env = {
        "AWS_ACCESS_KEY_ID": fleet.key["AccessKeyId"],
        "AWS_SECRET_ACCESS_KEY": fleet.key["SecretAccessKey"],
    }
    command = (
        "remediate",
        "--policy",
        save_policy(cwd, **ONE_REGION),
        *args,
        "--apply",
        "--json",
        "out.json",
    )
    fleet.aws.checks_permissions = True
    try:
        return run_tagcheck(*command, cwd=cwd, env=fleet.aws.env | env)
    finally:
        fleet.aws.checks_permissions = False


def test_remediation_works_with_what_is_printed_and_nothing_less(
    fleet: Fleet, printed: Print, tmp_path: Path
) -> None:
    document = printed(ONE_REGION)["remediate"]
    (instance_id,) = fleet.aws.launch(REGION)
    plan = f"Account,Region,InstanceId,Tag,Value,Action\n{ACCOUNT_ID},{REGION},{instance_id},Owner,ann,add\n"
    (tmp_path / "plan.csv").write_text(plan)
    check_state(tmp_path / "instance_state.db")
    for action in ("ec2:DescribeInstances", "ec2:CreateTags"):
        denied = remediate(fleet, without(document, action), tmp_path, "--plan", "plan.csv")
        assert (denied.code, action in denied.out) == (4, True), denied
    written = remediate(fleet, document, tmp_path, "--plan", "plan.csv")
    assert (written.code, written.json("out.json")["changed"]) == (0, True), written
    undo = ("--undo", written.json("out.json")["undo_file"])
    denied = remediate(fleet, without(document, "ec2:DeleteTags"), tmp_path, *undo)
    assert (denied.code, "ec2:DeleteTags" in denied.out) == (4, True), denied
    assert remediate(fleet, document, tmp_path, *undo).json("out.json")["changed"] is True
