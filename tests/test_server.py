"""The AWS of the tests itself: each fault does what it says, and moto's lax answers are mended."""

import io
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from aws_server import ACCOUNT_ID, IMAGE_ID, AwsServer, Fault, Request
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError

REGION = "us-east-1"
OTHER_ACCOUNT = "210987654321"
ENABLED, OPT_IN = "us-west-2", "me-south-1"

# Some versions of botocore compare what they got with Content-Length, and others do not.
CUT_ANSWER_ERRORS = (HTTPClientError, ResponseParserError)


def client(aws: AwsServer, service: str = "ec2", region: str = REGION, account_id: str | None = None) -> Any:
    """Make a client that asks once and does not wait long."""
    once = {"mode": "standard", "total_max_attempts": 1}
    return aws.client(service, region, account_id, retries=once, read_timeout=30)


def found(aws: AwsServer, region: str = REGION, account_id: str | None = None, **options: Any) -> list[str]:
    """List the ids of the instances that one request finds."""
    answer = client(aws, region=region, account_id=account_id).describe_instances(**options)
    return [i["InstanceId"] for reservation in answer["Reservations"] for i in reservation["Instances"]]


def tags(aws: AwsServer, instance: str) -> dict[str, str]:
    """Read the tags that an instance carries."""
    answer = aws.backstage("ec2", REGION).describe_instances(InstanceIds=[instance])
    return {tag["Key"]: tag["Value"] for tag in answer["Reservations"][0]["Instances"][0].get("Tags", [])}


def refusal(call: Callable[..., Any], **params: Any) -> tuple[int, str]:
    """Give the HTTP status and the code of the error that a call ends with."""
    with pytest.raises(ClientError) as caught:
        call(**params)
    answer = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


# ---- Scenes and the log ------------------------------------------------------------------------------------


def test_scene_is_set_behind_the_faults_and_unlogged(aws: AwsServer) -> None:
    aws.fault("error", status=403, code="UnauthorizedOperation")
    one, two, three = aws.launch(REGION, {"Owner": "ann", "aws:autoscaling:groupName": "web"}, count=3)
    aws.tag(REGION, [one], {"Project": "x"})
    aws.untag(REGION, [one], ["Owner"])
    aws.terminate(REGION, [three])
    assert aws.requests == []
    aws.clear_faults()
    assert tags(aws, one) == {"Project": "x", "aws:autoscaling:groupName": "web"}
    assert tags(aws, two) == {"Owner": "ann", "aws:autoscaling:groupName": "web"}
    running = [{"Name": "instance-state-name", "Values": ["running"]}]
    assert found(aws, Filters=running) == [one, two]


def test_instance_without_tags_has_no_tags_at_all(aws: AwsServer) -> None:
    aws.launch(REGION)
    instance = client(aws).describe_instances()["Reservations"][0]["Instances"][0]
    assert "Tags" not in instance


def test_accounts_and_regions_are_apart(aws: AwsServer) -> None:
    mine = aws.launch(REGION)
    theirs = aws.launch(REGION, account_id=OTHER_ACCOUNT)
    assert (found(aws), found(aws, account_id=OTHER_ACCOUNT), found(aws, "eu-west-1")) == (mine, theirs, [])


def test_requests_are_logged_with_who_and_what(aws: AwsServer) -> None:
    bucket = {"Bucket": "a-bucket"}
    client(aws, account_id=OTHER_ACCOUNT).describe_instances(MaxResults=5)
    client(aws, "sts", "eu-west-1").get_caller_identity()
    client(aws, "s3").create_bucket(**bucket)
    client(aws, "s3").put_object(**bucket, Key="a/key", Body=b"text", IfNoneMatch="*")
    client(aws, "organizations").create_organization(FeatureSet="ALL")
    refusal(
        client(aws, "sesv2").send_email, Content={"Raw": {"Data": b"x"}}, FromEmailAddress="a@example.com"
    )
    seen = [(r.service, r.region, r.account_id, r.action) for r in aws.requests]
    assert seen == [
        ("ec2", REGION, OTHER_ACCOUNT, "DescribeInstances"),
        ("sts", "eu-west-1", ACCOUNT_ID, "GetCallerIdentity"),
        ("s3", REGION, ACCOUNT_ID, "CreateBucket"),
        ("s3", REGION, ACCOUNT_ID, "PutObject"),
        ("organizations", REGION, ACCOUNT_ID, "CreateOrganization"),
        ("sesv2", REGION, ACCOUNT_ID, "SendEmail"),
    ]
    assert aws.calls("DescribeInstances", region=REGION)[0].params["MaxResults"] == "5"
    assert aws.calls("PutObject")[0].params == bucket | {"Key": "a/key", "IfNoneMatch": "*"}
    assert aws.calls("CreateOrganization")[0].params == {"FeatureSet": "ALL"}


def test_reset_forgets_everything(aws: AwsServer) -> None:
    aws.launch(REGION, account_id=OTHER_ACCOUNT)
    aws.fault("drop")
    aws.page_size, aws.empty_pages = 1, 1
    aws.disabled.add((None, REGION))
    aws.denied_roles.add(OTHER_ACCOUNT)
    aws.reset()
    assert found(aws, account_id=OTHER_ACCOUNT) == []
    assert [request.action for request in aws.requests] == ["DescribeInstances"]


def test_what_moto_cannot_do_is_an_error_and_no_noise(
    aws: AwsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refusal(client(aws, "cloudtrail").list_channels) == (500, "InternalError")
    assert capfd.readouterr().err == ""


# ---- Faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "action", "params"),
    [
        ("ec2", "describe_instances", {}),
        ("sts", "get_caller_identity", {}),
        ("iam", "list_roles", {}),
        ("sns", "list_topics", {}),
        ("ses", "list_identities", {}),
        ("s3", "list_buckets", {}),
        ("s3", "get_object", {"Bucket": "a-bucket", "Key": "a-key"}),
        ("organizations", "list_accounts", {}),
        ("cloudtrail", "lookup_events", {}),
        ("sesv2", "list_email_identities", {}),
    ],
)
def test_error_is_understood_in_every_wire_format(
    aws: AwsServer, service: str, action: str, params: Any
) -> None:
    details: dict[str, Any] = {
        "code": "AccessDenied",
        "message": "<not> for & you",
        "headers": {"Retry-After": "7"},
    }
    aws.fault("error", service=service, status=403, **details)
    with pytest.raises(ClientError) as caught:
        getattr(client(aws, service), action)(**params)
    answer = caught.value.response
    assert answer["Error"]["Code"] == "AccessDenied"
    assert answer["Error"]["Message"] == "<not> for & you"
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert answer["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "7"


def test_error_to_a_head_request_has_no_body(aws: AwsServer) -> None:
    aws.fault("error", action="HeadObject", status=412, code="PreconditionFailed")
    assert refusal(client(aws, "s3").head_object, Bucket="a-bucket", Key="k") == (412, "412")


@pytest.mark.parametrize(
    "wanted",
    [
        {"service": "sts"},
        {"region": "eu-west-1"},
        {"account_id": OTHER_ACCOUNT},
        {"action": "DescribeRegions"},
    ],
    ids=lambda wanted: next(iter(wanted)),
)
def test_fault_leaves_other_requests_alone(aws: AwsServer, wanted: Any) -> None:
    fault = aws.fault("drop", **wanted)
    assert found(aws) == []
    assert fault.hits == 0


def test_fault_skips_hits_and_ends(aws: AwsServer) -> None:
    fault = aws.fault("error", action="DescribeInstances", skip=1, times=2, status=503, code="Unavailable")
    assert found(aws) == []
    assert refusal(client(aws).describe_instances) == (503, "Unavailable")
    assert refusal(client(aws).describe_instances) == (503, "Unavailable")
    assert found(aws) == []
    assert fault.hits == 2


@pytest.mark.parametrize(("kind", "details"), [("eror", {}), ("error", {}), ("drop", {"seconds": 1})])
def test_fault_that_makes_no_sense_is_refused_at_once(aws: AwsServer, kind: str, details: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        aws.fault(kind, **details)


def test_slow_answers_late_and_truly(aws: AwsServer) -> None:
    ids = aws.launch(REGION)
    aws.fault("slow", seconds=0.3)
    start = time.monotonic()
    assert found(aws) == ids
    assert time.monotonic() - start >= 0.3


def test_slow_runs_into_the_time_out_of_the_client(aws: AwsServer) -> None:
    aws.fault("slow", seconds=60)
    once = {"total_max_attempts": 1}
    with pytest.raises(ReadTimeoutError):
        aws.client("ec2", REGION, retries=once, read_timeout=0.2).describe_instances()


def after_hit(fault: Fault, act: Callable[[], None]) -> None:
    """Act as soon as the fault has hit a request."""

    def wait_and_act() -> None:
        while not fault.hits:
            time.sleep(0.01)
        act()

    threading.Thread(target=wait_and_act, daemon=True).start()


def test_slow_ends_when_the_faults_are_cleared(aws: AwsServer) -> None:
    after_hit(aws.fault("slow", seconds=60), aws.clear_faults)
    with pytest.raises(ConnectionClosedError):
        client(aws).describe_instances()


def test_slow_ends_when_the_server_stops() -> None:
    server = AwsServer()
    after_hit(server.fault("slow", seconds=60), server.stop)
    with pytest.raises(ConnectionClosedError):
        client(server).describe_instances()


def test_faults_meet_one_request_one_after_the_other(aws: AwsServer) -> None:
    aws.fault("slow", seconds=0.1)
    aws.fault("error", status=503, code="Unavailable")
    assert refusal(client(aws).describe_instances) == (503, "Unavailable")


@pytest.mark.parametrize(
    ("kind", "error", "tagged"),
    [
        ("drop", ConnectionClosedError, {}),
        ("lost", ConnectionClosedError, {"Owner": "ann"}),
        ("cut", CUT_ANSWER_ERRORS, {"Owner": "ann"}),
    ],
)
def test_connection_ends_quietly(
    aws: AwsServer, capfd: pytest.CaptureFixture[str], kind: str, error: Any, tagged: dict[str, str]
) -> None:
    ids = aws.launch(REGION)
    aws.fault(kind, action="CreateTags")
    with pytest.raises(error):
        client(aws).create_tags(Resources=ids, Tags=[{"Key": "Owner", "Value": "ann"}])
    assert tags(aws, ids[0]) == tagged
    assert capfd.readouterr().err == ""


def test_cut_object_is_noticed(aws: AwsServer) -> None:
    s3 = client(aws, "s3")
    s3.create_bucket(Bucket="a-bucket")
    s3.put_object(Bucket="a-bucket", Key="k", Body=b"0123456789")
    aws.fault("cut", action="GetObject")
    with pytest.raises((IncompleteReadError, ResponseStreamingError)):
        s3.get_object(Bucket="a-bucket", Key="k")["Body"].read()


def test_truncate_halves_an_answer_that_looks_whole(aws: AwsServer) -> None:
    aws.launch(REGION)
    fault = aws.fault("truncate", action="DescribeInstances")
    with pytest.raises(ResponseParserError):
        client(aws).describe_instances()
    assert fault.hits == 1


@pytest.mark.parametrize("body", [b"<html><body>log in</body></html>", b"<x/>"])
def test_body_of_somebody_else_reads_as_nothing(aws: AwsServer, body: bytes) -> None:
    aws.fault("body", body=body, content_type="text/html")
    assert set(client(aws).describe_instances()) == {"ResponseMetadata"}


@pytest.mark.parametrize("body", [b"", b"<DescribeInstancesResponse><reservationSet>"])
def test_body_that_ends_too_early_is_an_error(aws: AwsServer, body: bytes) -> None:
    aws.fault("body", body=body)
    with pytest.raises(ResponseParserError):
        client(aws).describe_instances()


def test_answer_is_what_a_function_makes_of_the_request(aws: AwsServer) -> None:
    def no_events(request: Request) -> tuple[int, dict[str, str], bytes] | None:
        if request.params.get("NextToken"):
            return None
        return 200, {"Content-Type": "application/x-amz-json-1.1"}, b'{"Events": []}'

    aws.fault("answer", action="LookupEvents", answer=no_events)
    cloudtrail = client(aws, "cloudtrail")
    assert cloudtrail.lookup_events()["Events"] == []
    assert refusal(cloudtrail.lookup_events, NextToken="x")[0] == 500


# ---- As strict as AWS: pages -------------------------------------------------------------------------------


def pages(aws: AwsServer, **options: Any) -> list[list[str]]:
    """List the instances of each page, following the tokens."""
    listed = []
    for page in client(aws).get_paginator("describe_instances").paginate(**options):
        listed.append([i["InstanceId"] for r in page["Reservations"] for i in r["Instances"]])
    return listed


def test_max_results_counts_instances(aws: AwsServer) -> None:
    ids = aws.launch(REGION, count=4) + aws.launch(REGION, {"Owner": "ann"}, count=4)
    assert pages(aws, MaxResults=5) == [ids[:5], ids[5:]]
    assert pages(aws, MaxResults=8) == [ids]


def test_page_size_of_the_test_goes_before_max_results(aws: AwsServer) -> None:
    ids = aws.launch(REGION, count=3)
    aws.page_size = 2
    assert pages(aws, MaxResults=1000) == [ids[:2], ids[2:]]
    assert pages(aws) == [ids[:2], ids[2:]]
    assert found(aws, InstanceIds=ids) == ids


def test_more_reservations_than_moto_lists_at_once(aws: AwsServer) -> None:
    ec2 = aws.backstage("ec2", REGION)
    for _ in range(101):
        ec2.run_instances(ImageId=IMAGE_ID, MinCount=1, MaxCount=1)
    assert len(set(found(aws))) == 101


def test_empty_pages_come_first_and_lead_on(aws: AwsServer) -> None:
    ids = aws.launch(REGION, count=3)
    aws.empty_pages, aws.page_size = 2, 2
    assert pages(aws) == [[], [], ids[:2], ids[2:]]


def test_empty_pages_without_end_have_a_new_token_each(aws: AwsServer) -> None:
    aws.launch(REGION)
    aws.empty_pages = math.inf
    first = client(aws).describe_instances()
    second = client(aws).describe_instances(NextToken=first["NextToken"])
    assert second["Reservations"] == []
    assert second["NextToken"] != first["NextToken"]


def test_page_can_be_asked_for_again(aws: AwsServer) -> None:
    ids = aws.launch(REGION, count=2)
    aws.page_size = 1
    token = client(aws).describe_instances()["NextToken"]
    assert found(aws, NextToken=token) == found(aws, NextToken=token) == ids[1:]


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"MaxResults": 4}, "InvalidParameterValue"),
        ({"MaxResults": 1001}, "InvalidParameterValue"),
        ({"NextToken": "of-somebody-else"}, "InvalidParameterValue"),
        ({"MaxResults": 5, "InstanceIds": ["i-0123456789abcdef0"]}, "InvalidParameterCombination"),
        ({"InstanceIds": ["i-0123456789abcdef0"]}, "InvalidInstanceID.NotFound"),
    ],
)
def test_describe_instances_refuses(aws: AwsServer, params: dict[str, Any], code: str) -> None:
    assert refusal(client(aws).describe_instances, **params) == (400, code)


# ---- As strict as AWS: regions, roles, organizations -------------------------------------------------------


def statuses(aws: AwsServer, **options: Any) -> dict[str, str]:
    """Read the opt-in status of the regions that DescribeRegions lists."""
    regions = client(aws).describe_regions(**options)["Regions"]
    return {region["RegionName"]: region["OptInStatus"] for region in regions}


def test_regions_that_are_not_enabled_are_listed_only_on_request(aws: AwsServer) -> None:
    assert set(statuses(aws).values()) == {"opt-in-not-required"}
    every = statuses(aws, AllRegions=True)
    assert (every[ENABLED], every[OPT_IN]) == ("opt-in-not-required", "not-opted-in")
    only = [
        {"Name": "opt-in-status", "Values": ["not-*"]},
        {"Name": "region-name", "Values": [ENABLED, OPT_IN]},
    ]
    assert statuses(aws, AllRegions=True, Filters=only) == {OPT_IN: "not-opted-in"}
    assert statuses(aws, RegionNames=[ENABLED]) == {ENABLED: "opt-in-not-required"}


def test_region_that_is_not_opted_in_refuses_everything(aws: AwsServer) -> None:
    aws.launch(OPT_IN)
    assert refusal(client(aws, region=OPT_IN).describe_instances) == (401, "AuthFailure")
    assert refusal(client(aws, region=OPT_IN).describe_regions) == (401, "AuthFailure")
    aws.opted_in.add(OPT_IN)
    assert statuses(aws)[OPT_IN] == "opted-in"
    assert len(found(aws, OPT_IN)) == 1


@pytest.mark.parametrize("account_id", [ACCOUNT_ID, None])
def test_region_can_be_disabled(aws: AwsServer, account_id: str | None) -> None:
    aws.disabled.add((account_id, ENABLED))
    assert ENABLED not in statuses(aws)
    assert statuses(aws, AllRegions=True)[ENABLED] == "not-opted-in"
    assert refusal(client(aws, region=ENABLED).describe_instances) == (401, "AuthFailure")


def test_region_can_be_disabled_in_one_account(aws: AwsServer) -> None:
    aws.disabled.add((OTHER_ACCOUNT, ENABLED))
    assert found(aws, ENABLED) == []
    refused = refusal(client(aws, region=ENABLED, account_id=OTHER_ACCOUNT).describe_instances)
    assert refused == (401, "AuthFailure")


def test_role_of_an_account_can_be_denied(aws: AwsServer) -> None:
    aws.denied_roles.add(OTHER_ACCOUNT)
    sts = client(aws, "sts")
    role = {"RoleArn": f"arn:aws:iam::{OTHER_ACCOUNT}:role/r", "RoleSessionName": "test"}
    assert refusal(sts.assume_role, **role) == (403, "AccessDenied")
    assert sts.assume_role(**role | {"RoleArn": "arn:aws:iam::111111111111:role/r"})["Credentials"]


def test_accounts_are_listed_only_where_there_is_an_organization(aws: AwsServer) -> None:
    organizations = client(aws, "organizations")
    assert refusal(organizations.list_accounts) == (400, "AWSOrganizationsNotInUseException")
    organizations.create_organization(FeatureSet="ALL")
    assert [account["Id"] for account in organizations.list_accounts()["Accounts"]] == [ACCOUNT_ID]


# ---- As strict as AWS: writing tags ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "code"),
    [
        ("aws:x", "v", "InvalidParameterValue"),
        ("AWS:x", "v", "InvalidParameterValue"),
        ("k" * 128, "v", "InvalidParameterValue"),
        ("k", "v" * 257, "InvalidParameterValue"),
    ],
)
def test_tag_that_aws_does_not_take(aws: AwsServer, key: str, value: str, code: str) -> None:
    ids = aws.launch(REGION)
    new = [{"Key": "Owner", "Value": "ann"}, {"Key": key, "Value": value}]
    assert refusal(client(aws).create_tags, Resources=ids, Tags=new) == (400, code)
    assert tags(aws, ids[0]) == {}


def test_longest_tag_that_aws_takes(aws: AwsServer) -> None:
    ids = aws.launch(REGION)
    client(aws).create_tags(Resources=ids, Tags=[{"Key": "k" * 127, "Value": "v" * 256}])
    assert tags(aws, ids[0]) == {"k" * 127: "v" * 256}


@pytest.mark.parametrize("call", ["create_tags", "delete_tags"])
def test_one_unknown_instance_keeps_all_from_being_tagged(aws: AwsServer, call: str) -> None:
    ids = aws.launch(REGION, {"Owner": "ann"})
    params = {"Resources": [*ids, "i-0123456789abcdef0"], "Tags": [{"Key": "Owner", "Value": "bob"}]}
    assert refusal(getattr(client(aws), call), **params) == (400, "InvalidInstanceID.NotFound")
    assert tags(aws, ids[0]) == {"Owner": "ann"}


def test_tag_of_aws_cannot_be_deleted(aws: AwsServer) -> None:
    ids = aws.launch(REGION, {"aws:x": "v"})
    refused = refusal(client(aws).delete_tags, Resources=ids, Tags=[{"Key": "aws:x"}])
    assert refused == (400, "InvalidParameterValue")
    assert tags(aws, ids[0]) == {"aws:x": "v"}


def test_fifty_tags_and_no_more(aws: AwsServer) -> None:
    full = {f"key{n}": "v" for n in range(49)}
    ids = aws.launch(REGION, full | {"aws:x": "v"})
    create = client(aws).create_tags
    create(Resources=ids, Tags=[{"Key": "key49", "Value": "v"}])
    create(Resources=ids, Tags=[{"Key": "key0", "Value": "overwritten"}])
    refused = refusal(create, Resources=ids, Tags=[{"Key": "key50", "Value": "v"}])
    assert refused == (400, "TagLimitExceeded")
    assert len(tags(aws, ids[0])) == 51
    assert tags(aws, ids[0])["key0"] == "overwritten"


def test_dry_run_writes_nothing(aws: AwsServer) -> None:
    ids = aws.launch(REGION)
    params = {"Resources": ids, "Tags": [{"Key": "Owner", "Value": "ann"}], "DryRun": True}
    assert refusal(client(aws).create_tags, **params) == (412, "DryRunOperation")
    assert tags(aws, ids[0]) == {}


# ---- Conditional writes ------------------------------------------------------------------------------------


def test_of_two_writers_with_the_same_etag_one_wins(aws: AwsServer) -> None:
    s3 = client(aws, "s3")
    s3.create_bucket(Bucket="a-bucket")
    etag = s3.put_object(Bucket="a-bucket", Key="k", Body=b"first")["ETag"]
    codes: list[int] = []

    def write(text: bytes) -> None:
        try:
            answer = s3.put_object(Bucket="a-bucket", Key="k", Body=io.BytesIO(text), IfMatch=etag)
        except ClientError as error:
            answer = error.response
        codes.append(answer["ResponseMetadata"]["HTTPStatusCode"])

    writers = [threading.Thread(target=write, args=(bytes([n]),)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(codes) == [200] + [412] * 7
