"""AWS on a loopback port: moto over HTTP, as strict as AWS where it matters, with faults on demand.

A request passes the faults of the test, then the rules that moto is too lax about, then moto itself.
What `AwsServer.backstage` clients send, to set a scene, goes straight to moto and is not logged.
"""

import contextlib
import copy
import fnmatch
import inspect
import io
import itertools
import json
import math
import os
import re
import socket
import threading
import time
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import boto3
import botocore.config
import moto.settings
import werkzeug.test
from moto.ec2.models import ec2_backends
from moto.ec2.models.availability_zones_and_regions import RegionsAndZonesBackend
from moto.iam.access_control import IAMPolicy, IAMUserAccessKey, PermissionResult
from moto.iam.models import get_account_id_from
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.organizations.models import organizations_backends
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.serving import WSGIRequestHandler, make_server

ACCOUNT_ID = "123456789012"  # whose keys they are that moto did not give out
IMAGE_ID = "ami-12345678"
BACKSTAGE = "backstage"

# ------------------------------------------------------------------------------------------------------------
# Words: Request, Answer, ConnectionDroppedError
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request as a client sent it."""

    service: str  # as boto3 names it; "" for a request that is not signed
    region: str
    account_id: str
    access_key: str
    action: str
    params: dict[
        str, Any
    ]  # form fields flat ("Filter.1.Name"), JSON as it is, Bucket and Key and conditions for S3
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    received_at: float = field(default_factory=time.monotonic)

    def fits(self, **wanted: str | None) -> bool:
        """Tell whether the request has every wanted attribute; None wants nothing."""
        return all(value is None or getattr(self, name) == value for name, value in wanted.items())


class Answer(NamedTuple):
    """One HTTP answer; its Content-Length is set when it is sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class ConnectionDroppedError(ConnectionAbortedError):
    """The connection ends here; of `cut_answer`, if there is one, the client still gets half."""

    def __init__(self, cut_answer: Answer | None = None):
        super().__init__("dropped on purpose")
        self.cut_answer = cut_answer


class TricklingError(ConnectionDroppedError):
    """The answer comes byte by byte, with a pause before each byte of the body, or of the headers too."""

    def __init__(self, answer: Answer, seconds: float, in_headers: bool, ended: threading.Event):
        super().__init__()
        self.answer, self.seconds, self.in_headers, self.ended = answer, seconds, in_headers, ended

    def send(self, connection: socket.socket, method: str) -> None:
        """Send the answer, unless the client goes away or the fault ends."""
        status, headers = head(self.answer, method)
        lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers), "", ""]
        start = "\r\n".join(lines).encode()
        at_once, slowly = (b"", start + self.answer.body) if self.in_headers else (start, self.answer.body)
        with contextlib.suppress(OSError):
            connection.sendall(at_once)
            for byte in slowly:
                if self.ended.wait(self.seconds):
                    return
                connection.sendall(bytes([byte]))


# ------------------------------------------------------------------------------------------------------------
# Reading requests: read_request
# ------------------------------------------------------------------------------------------------------------

CREDENTIAL = re.compile(
    r"Credential=(?P<access_key>[^/]+)/\d+/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request"
)

S3_ACTIONS = {  # by method and by whether the path names a key
    ("GET", True): "GetObject",
    ("HEAD", True): "HeadObject",
    ("PUT", True): "PutObject",
    ("DELETE", True): "DeleteObject",
    ("GET", False): "ListObjects",
    ("HEAD", False): "HeadBucket",
    ("PUT", False): "CreateBucket",
    ("DELETE", False): "DeleteBucket",
}
SESV2_ACTIONS = {("POST", "/v2/email/outbound-emails"): "SendEmail"}


def read_body(environ: dict[str, Any]) -> bytes:
    """Read the whole body, and put it back so that it can be read again."""
    chunked = environ.pop("wsgi.input_terminated", False)
    size = -1 if chunked else int(environ.get("CONTENT_LENGTH") or 0)
    body: bytes = environ["wsgi.input"].read(size)
    environ.pop("HTTP_TRANSFER_ENCODING", None)
    replace_body(environ, body)
    return body


def replace_body(environ: dict[str, Any], body: bytes) -> None:
    """Make this the body of the request."""
    environ["wsgi.input"] = io.BytesIO(body)
    environ["CONTENT_LENGTH"] = str(len(body))


def read_action(
    service: str, environ: dict[str, Any], headers: dict[str, str], body: bytes
) -> tuple[str, dict[str, Any]]:
    """Find what is asked for, and with which parameters, in the wire format that the service speaks."""
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    if "x-amz-target" in headers:
        return headers["x-amz-target"].rpartition(".")[2], json.loads(body or b"{}")
    if service == "s3":
        _, bucket, key = (path + "/").split("/", 2)
        conditions = {"IfMatch": headers.get("if-match"), "IfNoneMatch": headers.get("if-none-match")}
        params = {"Bucket": bucket, "Key": key.removesuffix("/")} | conditions
        return S3_ACTIONS.get((method, bool(key)), f"{method} {path}"), {k: v for k, v in params.items() if v}
    if service == "sesv2":
        return SESV2_ACTIONS.get((method, path), f"{method} {path}"), json.loads(body or b"{}")
    form = dict(urllib.parse.parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True))
    return form.get("Action", f"{method} {path}"), form


def read_request(environ: dict[str, Any]) -> Request:
    """Read who asks what of which service from a WSGI environment."""
    sent = {name.removeprefix("HTTP_"): value for name, value in environ.items() if name.startswith("HTTP_")}
    headers = {name.replace("_", "-").lower(): value for name, value in sent.items()}
    scope = CREDENTIAL.search(headers.get("authorization", ""))
    access_key, region, service = scope.group("access_key", "region", "service") if scope else ("", "", "")
    if service == "ses" and environ["PATH_INFO"].startswith("/v2/"):
        service = "sesv2"
    body = read_body(environ)
    action, params = read_action(service, environ, headers, body)
    return Request(
        service=service,
        region=region,
        account_id=get_account_id_from(access_key),
        access_key=access_key,
        action=action,
        params=params,
        method=environ["REQUEST_METHOD"],
        path=environ["PATH_INFO"],
        headers=headers,
        body=body,
    )


def is_backstage(request: Request) -> bool:
    """Tell whether a request sets a scene."""
    return BACKSTAGE in request.headers.get("user-agent", "")


def numbered(params: dict[str, str], name: str) -> list[str]:
    """List the values of a form parameter that is a list, such as `ResourceId.1`, `ResourceId.2`."""
    return [value for key, value in params.items() if re.fullmatch(rf"{re.escape(name)}\.\d+", key)]


def named(params: dict[str, str], pattern: str) -> dict[str, str]:
    """Find the form parameters such as `Tag.1.Key`, by what stands before the last dot."""
    return {key.rpartition(".")[0]: value for key, value in params.items() if re.fullmatch(pattern, key)}


def filters_of(params: dict[str, str]) -> dict[str, list[str]]:
    """Gather the values of the filters of an EC2 request, by the filter's name."""
    names = named(params, r"Filter\.\d+\.Name")
    return {name: numbered(params, f"{prefix}.Value") for prefix, name in names.items()}


def tags_of(params: dict[str, str]) -> dict[str, str]:
    """Gather the tags of a CreateTags or DeleteTags request."""
    keys = named(params, r"Tag\.\d+\.Key")
    return {key: params.get(f"{prefix}.Value", "") for prefix, key in keys.items()}


# ------------------------------------------------------------------------------------------------------------
# Answers: error_answer, head, and EC2's XML
# ------------------------------------------------------------------------------------------------------------


def error_body(request: Request, code: str, message: str) -> tuple[str, str]:
    """Write an error as the service would, after its content type: each family has its own wire format."""
    xml = f"<Code>{escape(code)}</Code><Message>{escape(message)}</Message>"
    if "x-amz-target" in request.headers:
        return "application/x-amz-json-1.1", json.dumps({"__type": code, "message": message})
    if request.service == "ec2":
        return (
            "text/xml",
            f"<Response><Errors><Error>{xml}</Error></Errors><RequestID>r</RequestID></Response>",
        )
    if request.service == "s3":
        return "application/xml", f"<Error>{xml}<RequestId>r</RequestId></Error>"
    if "Action" in request.params:
        error = f"<Error><Type>Sender</Type>{xml}</Error>"
        return "text/xml", f"<ErrorResponse>{error}<RequestId>r</RequestId></ErrorResponse>"
    return "application/json", json.dumps({"code": code, "message": message})


def error_answer(
    request: Request, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Answer:
    """Say no as the service would."""
    content_type, body = error_body(request, code, message)
    return Answer(status, {"Content-Type": content_type} | dict(headers or {}), body.encode())


def invalid_value(request: Request, message: str) -> Answer:
    """Say that a parameter has a value that AWS does not take."""
    return error_answer(request, 400, "InvalidParameterValue", message)


def head(answer: Answer, method: str) -> tuple[str, list[tuple[str, str]]]:
    """Write the status line and the headers; only an answer to HEAD keeps the length that it names."""
    headers = dict(answer.headers)
    if method != "HEAD":
        headers = {name: value for name, value in headers.items() if name.lower() != "content-length"}
        headers["Content-Length"] = str(len(answer.body))
    return f"{answer.status} {HTTP_STATUS_CODES.get(answer.status, 'Unknown')}", list(headers.items())


EC2_NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15/"


def namespace(root: ET.Element) -> str:
    """Name the XML namespace of an answer."""
    return root.tag[1:].partition("}")[0]


def child(element: ET.Element, name: str) -> ET.Element:
    """Give the child element that is always there."""
    found = element.find(f"{{*}}{name}")
    if found is None:
        raise KeyError(name)
    return found


def to_xml(root: ET.Element) -> bytes:
    """Write an EC2 answer without prefixes on its elements, as EC2 does."""
    ns = namespace(root)
    xml: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True, default_namespace=ns)
    return xml


# ------------------------------------------------------------------------------------------------------------
# As strict as AWS: …_refusal (an error, or None where AWS has none), cut_page, cut_regions
# ------------------------------------------------------------------------------------------------------------

EVENT_PAGE_SIZE = 50  # of LookupEvents
NOT_OPTED_IN = "not-opted-in"
OPT_IN_STATUS = {region.name: region.opt_in_status for region in RegionsAndZonesBackend.regions}


def role_refusal(request: Request, denied_accounts: set[str]) -> Answer | None:
    """Refuse to assume a role of an account that does not trust the caller."""
    role = request.params.get("RoleArn", "")
    accounts = set(role.split(":")[4:5])
    if request.fits(service="sts", action="AssumeRole") and accounts & denied_accounts:
        caller = f"arn:aws:iam::{request.account_id}:user/tester"
        message = f"User: {caller} is not authorized to perform: sts:AssumeRole on resource: {role}"
        return error_answer(request, 403, "AccessDenied", message)
    return None


def organization_refusal(request: Request, has_organization: bool) -> Answer | None:
    """Refuse to list the accounts where there is no organization; moto lists none."""
    if request.fits(service="organizations", action="ListAccounts") and not has_organization:
        message = "Your account is not a member of an organization."
        return error_answer(request, 400, "AWSOrganizationsNotInUseException", message)
    return None


def region_refusal(request: Request, opt_in_status: str) -> Answer | None:
    """Refuse everything in a region that is not enabled, in the words that AWS also has for a wrong key."""
    if request.service == "ec2" and opt_in_status == NOT_OPTED_IN:
        message = "AWS was not able to validate the provided access credentials"
        return error_answer(request, 401, "AuthFailure", message)
    return None


def missing_object_refusal(request: Request) -> Answer | None:
    """Refuse to say that an object is not there to a user who may not list the bucket."""
    user = IAMUserAccessKey(request.account_id, "aws", request.access_key, {})
    listing = "s3:ListBucket", f"arn:aws:s3:::{request.params['Bucket']}"
    if PermissionResult.PERMITTED in (
        IAMPolicy(p).is_action_permitted(*listing) for p in user.collect_policies()
    ):
        return None
    return error_answer(request, 403, "AccessDenied", "Access Denied")


def page_refusal(request: Request) -> Answer | None:
    """Refuse a MaxResults that DescribeInstances does not take."""
    max_results = request.params.get("MaxResults")
    if max_results is None:
        return None
    if numbered(request.params, "InstanceId"):
        message = "The parameter instancesSet cannot be used with the parameter maxResults"
        return error_answer(request, 400, "InvalidParameterCombination", message)
    if not 5 <= int(max_results) <= 1000:
        return invalid_value(
            request, f"Value ( {max_results} ) for parameter maxResults is not from 5 to 1000."
        )
    return None


def tag_refusal(request: Request, instances: Mapping[str, Mapping[str, str]]) -> Answer | None:
    """Refuse to write tags where one resource or tag will not do: nothing at all is tagged then.

    `instances` has the tags of every instance that exists, by its id.
    """
    tags, resources = tags_of(request.params), numbered(request.params, "ResourceId")
    unknown = [resource for resource in resources if resource.startswith("i-") and resource not in instances]
    if unknown:
        what = f"ID '{unknown[0]}' does" if len(unknown) == 1 else f"IDs '{', '.join(unknown)}' do"
        return error_answer(request, 400, "InvalidInstanceID.NotFound", f"The instance {what} not exist")
    if any(key.lower().startswith("aws:") for key in tags):
        return invalid_value(request, "Tag keys starting with 'aws:' are reserved for internal use")
    if any(len(key) > 127 for key in tags):
        return invalid_value(request, "Tag key exceeds the maximum length of 127 characters")
    if any(len(value) > 256 for value in tags.values()):
        return invalid_value(request, "Tag value exceeds the maximum length of 256 characters")
    counts = [count_user_tags(instances.get(resource, {}), tags) for resource in resources]
    if request.action == "CreateTags" and max(counts, default=0) > 50:
        return error_answer(request, 400, "TagLimitExceeded", "A resource would have more than 50 tags.")
    return None


def count_user_tags(*tags: Mapping[str, str]) -> int:
    """Count the tags that count to the limit: those of AWS itself do not."""
    return len({key for key in itertools.chain(*tags) if not key.lower().startswith("aws:")})


def done(request: Request) -> Answer:
    """Answer that EC2 has done what was asked for."""
    answer = ET.Element(f"{{{EC2_NAMESPACE}}}{request.action}Response")
    ET.SubElement(answer, f"{{{EC2_NAMESPACE}}}requestId").text = "r"
    ET.SubElement(answer, f"{{{EC2_NAMESPACE}}}return").text = "true"
    return Answer(200, {"Content-Type": "text/xml;charset=UTF-8"}, to_xml(answer))


def instance_ids(answer: ET.Element) -> list[str]:
    """List the instances of a DescribeInstances answer in its order."""
    return [
        item.text or ""
        for item in answer.findall("{*}reservationSet/{*}item/{*}instancesSet/{*}item/{*}instanceId")
    ]


def with_instances(answer: ET.Element, kept: Iterable[str]) -> ET.Element:
    """Copy a DescribeInstances answer with only these instances, and no reservation without any."""
    kept, page = set(kept), copy.deepcopy(answer)
    reservations = child(page, "reservationSet")
    for reservation in list(reservations):
        instances = child(reservation, "instancesSet")
        for instance in list(instances):
            if instance.findtext("{*}instanceId") not in kept:
                instances.remove(instance)
        if not len(instances):
            reservations.remove(reservation)
    return page


def cut_page(answer: ET.Element, size: int) -> tuple[ET.Element, ET.Element | None]:
    """Cut a DescribeInstances answer into a page of that many instances and the rest, if any is left."""
    ids = instance_ids(answer)
    page, rest = ids[:size], ids[size:]
    return with_instances(answer, page), with_instances(answer, rest) if rest else None


def with_operators(answer: ET.Element, managed: Mapping[str, str], *, hide: bool) -> ET.Element:
    """Say of each instance of a DescribeInstances answer which service operates it, or leave those out."""
    if hide:
        return with_instances(answer, [id_ for id_ in instance_ids(answer) if id_ not in managed])
    for instance in answer.iterfind("{*}reservationSet/{*}item/{*}instancesSet/{*}item"):
        principal = managed.get(instance.findtext("{*}instanceId", ""))
        operator = ET.SubElement(instance, f"{{{namespace(answer)}}}operator")
        texts = {"managed": "true" if principal else "false", "principal": principal}
        for name, text in texts.items():
            if text:
                ET.SubElement(operator, f"{{{namespace(answer)}}}{name}").text = text
    return answer


def cut_regions(
    answer: ET.Element, params: dict[str, str], opt_in_status: Callable[[str], str]
) -> ET.Element:
    """Keep of a DescribeRegions answer what was asked for, with each region's true opt-in status."""
    regions = child(answer, "regionInfo")
    for item in list(regions):
        name, endpoint = item.findtext("{*}regionName", ""), item.findtext("{*}regionEndpoint", "")
        status = opt_in_status(name)
        child(item, "optInStatus").text = status
        listed = params.get("AllRegions") == "true" or status != NOT_OPTED_IN
        attributes = {"region-name": name, "opt-in-status": status, "endpoint": endpoint}
        if not listed or not passes(attributes, filters_of(params)):
            regions.remove(item)
    return answer


def passes(attributes: dict[str, str], wanted: dict[str, list[str]]) -> bool:
    """Tell whether attributes pass EC2 filters: one value of each filter must fit."""
    return all(any(fnmatch.fnmatchcase(attributes[name], value) for value in wanted[name]) for name in wanted)


# ------------------------------------------------------------------------------------------------------------
# Faults: one function for each kind, FAULT_KINDS, Fault
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """A request at a fault: `proceed` gets the answer that it would have had."""

    request: Request
    proceed: Callable[[], Answer]
    ended: threading.Event  # set when the fault is taken away: nobody waits for it any longer


def error_fault(
    passage: Passage, *, status: int, code: str, message: str = "", headers: Mapping[str, str] | None = None
) -> Answer:
    """Answer with an error of the service; nothing is carried out."""
    return error_answer(passage.request, status, code, message, headers)


def slow_fault(passage: Passage, *, seconds: float) -> Answer:
    """Answer truly, but late."""
    if passage.ended.wait(seconds):
        raise ConnectionDroppedError
    return passage.proceed()


def drop_fault(passage: Passage) -> Answer:
    """Close the connection without an answer; nothing is carried out."""
    raise ConnectionDroppedError


def lost_fault(passage: Passage) -> Answer:
    """Carry the request out, and close the connection without an answer."""
    passage.proceed()
    raise ConnectionDroppedError


def cut_fault(passage: Passage) -> Answer:
    """Carry the request out, promise the whole answer, send half of it and close the connection."""
    raise ConnectionDroppedError(cut_answer=passage.proceed())


def trickle_fault(passage: Passage, *, seconds: float, in_headers: bool = False) -> Answer:
    """Carry the request out, and send the answer byte by byte, with a pause before each."""
    raise TricklingError(passage.proceed(), seconds, in_headers, passage.ended)


def truncate_fault(passage: Passage) -> Answer:
    """Carry the request out, and answer with half of the true body as if it were all."""
    answer = passage.proceed()
    return answer._replace(body=answer.body[: len(answer.body) // 2])


def body_fault(passage: Passage, *, body: bytes, content_type: str = "text/xml", status: int = 200) -> Answer:
    """Answer with this body, such as the login page of a proxy; nothing is carried out."""
    return Answer(status, {"Content-Type": content_type}, body)


def answer_fault(
    passage: Passage, *, answer: Callable[[Request], tuple[int, Mapping[str, str], bytes] | None]
) -> Answer:
    """Answer with what the function makes of the request; None lets it pass."""
    made = answer(passage.request)
    return passage.proceed() if made is None else Answer(*made)


def edit_fault(passage: Passage, *, edit: Callable[[bytes], bytes]) -> Answer:
    """Carry the request out, and answer with what the function makes of the true body."""
    answer = passage.proceed()
    return answer._replace(body=edit(answer.body))


FAULT_KINDS: dict[str, Callable[..., Answer]] = {
    "error": error_fault,
    "slow": slow_fault,
    "drop": drop_fault,
    "lost": lost_fault,
    "cut": cut_fault,
    "trickle": trickle_fault,
    "truncate": truncate_fault,
    "body": body_fault,
    "answer": answer_fault,
    "edit": edit_fault,
}


@dataclass
class Fault:
    """A kind of fault, the requests that it is for, and how many of them it has hit."""

    kind: str
    details: dict[str, Any]
    wanted: dict[str, str | None]
    when: Callable[[Request], bool] | None
    times: int | None
    skip: int
    hits: int = 0
    passed: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def takes(self, request: Request) -> bool:
        """Tell whether this request is hit, and count it."""
        if not request.fits(**self.wanted) or (self.when and not self.when(request)):
            return False
        with self.lock:
            if self.passed < self.skip:
                self.passed += 1
                return False
            if self.times is not None and self.hits >= self.times:
                return False
            self.hits += 1
            return True

    def act(self, request: Request, proceed: Callable[[], Answer]) -> Answer:
        """Do to the request what this kind of fault does."""
        return FAULT_KINDS[self.kind](Passage(request, proceed, self.ended), **self.details)


def through_faults(faults: list[Fault], request: Request, proceed: Callable[[], Answer]) -> Answer:
    """Lead a request through the faults in their order, and then on."""
    if not faults:
        return proceed()
    first, others = faults[0], faults[1:]

    def go_on() -> Answer:
        return through_faults(others, request, proceed)

    return first.act(request, go_on) if first.takes(request) else go_on()


# ------------------------------------------------------------------------------------------------------------
# The server: AwsServer
# ------------------------------------------------------------------------------------------------------------


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Write tags the way the API takes them."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def looked_up_events(request: Request, events: list[dict[str, Any]]) -> Answer:
    """Answer LookupEvents, which moto lacks: the events of a resource within a time, at most 50 a page."""
    (attribute,) = request.params["LookupAttributes"]
    assert attribute["AttributeKey"] == "ResourceName"
    found = [
        event
        for event in events
        if any(each["ResourceName"] == attribute["AttributeValue"] for each in event["Resources"])
        and request.params.get("StartTime", 0)
        <= event["EventTime"]
        <= request.params.get("EndTime", math.inf)
    ]
    start = int(request.params.get("NextToken", 0))
    page: dict[str, Any] = {"Events": found[start : start + EVENT_PAGE_SIZE]}
    if len(found) > start + EVENT_PAGE_SIZE:
        page["NextToken"] = str(start + EVENT_PAGE_SIZE)
    return Answer(200, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(page).encode())


def run_instances_event(
    ids: Iterable[str], at: float, identity: Mapping[str, Any], **detail: Any
) -> dict[str, Any]:
    """Write what CloudTrail keeps of a RunInstances that made these instances."""
    record = {"eventName": "RunInstances", "userIdentity": dict(identity), **detail}
    return {
        "EventName": "RunInstances",
        "EventTime": at,
        "Resources": [{"ResourceType": "AWS::EC2::Instance", "ResourceName": id_} for id_ in ids],
        "CloudTrailEvent": json.dumps(record),
    }


class QuietRequestHandler(WSGIRequestHandler):
    """Serves without a line for each request on stderr."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


class AwsServer:
    """AWS for tests: one server that plays every service, region and account."""

    def __init__(self) -> None:
        os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"  # slow to load, and nobody asks for one
        self._moto = DomainDispatcherApplication(create_backend_app)
        # moto is not made for threads: two conditional writes to S3 could both succeed
        self._moto_lock = threading.Lock()
        self._session: Any = boto3.Session()  # one, for it keeps the models of the services
        self._start_anew()
        self._server = make_server("127.0.0.1", 0, self._serve, True, request_handler=QuietRequestHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def _start_anew(self) -> None:
        """Set everything that a test may change to how it is before a test."""
        #: Instances on a page of DescribeInstances, whatever MaxResults says.
        self.page_size: int | None = None
        #: So many of the next pages of DescribeInstances are empty, with a token; math.inf for no end.
        self.empty_pages: float = 0
        #: Regions that are enabled though they are not by default, in every account.
        self.opted_in: set[str] = set()
        #: Regions that are not enabled, each with its account, or with None for every account.
        self.disabled: set[tuple[str | None, str]] = set()
        #: Accounts that let nobody assume their roles.
        self.denied_roles: set[str] = set()
        #: Callers may do what IAM allows them, and nothing else; keys that IAM does not know may do nothing.
        self.checks_permissions = False
        #: Instances that an AWS service operates, by principal; hidden from those who do not ask for them.
        self.managed: dict[str, str] = {}
        #: What CloudTrail knows, by account and region, the newest event first.
        self.events: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self._faults: list[Fault] = []
        self._requests: list[Request] = []
        self._credentials: dict[str, dict[str, str]] = {}
        self._backstage: dict[tuple[str, str, str | None], Any] = {}
        self._rests: dict[tuple[str, str, str], ET.Element | Answer] = {}
        self._token_numbers = itertools.count(1)

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment variables that lead the AWS SDK of a subprocess here and nowhere else."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    @property
    def requests(self) -> list[Request]:
        """All requests since the last reset, backstage ones left out."""
        return list(self._requests)

    def calls(self, action: str | None = None, **wanted: str | None) -> list[Request]:
        """The requests with this action, and this service, region or account_id."""
        return [request for request in self.requests if request.fits(action=action, **wanted)]

    def fault(
        self,
        kind: str,
        *,
        service: str | None = None,
        region: str | None = None,
        account_id: str | None = None,
        action: str | None = None,
        when: Callable[[Request], bool] | None = None,
        times: int | None = None,
        skip: int = 0,
        **details: Any,
    ) -> Fault:
        """Let requests meet a fault: these, the first `skip` of them left out, and not more than `times`."""
        inspect.signature(FAULT_KINDS[kind]).bind(None, **details)
        wanted = {"service": service, "region": region, "account_id": account_id, "action": action}
        fault = Fault(kind, details, wanted, when, times, skip)
        self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Take all faults away, and drop the connections that still wait in one."""
        faults, self._faults = self._faults, []
        for fault in faults:
            fault.ended.set()

    def reset(self) -> None:
        """Forget all instances, faults, requests and settings."""
        self.clear_faults()
        with self._moto_lock:
            werkzeug.test.Client(self._moto).post("/moto-api/reset")
            self._start_anew()

    def stop(self) -> None:
        """End the server and whatever still waits in it."""
        self.clear_faults()
        self._server.shutdown()
        self._thread.join()

    # Clients

    def client(self, service: str, region: str, account_id: str | None = None, **config: Any) -> Any:
        """Make a boto3 client that is treated as any other; `config` is botocore's."""
        return self._session.client(
            service,
            region_name=region,
            endpoint_url=self.url,
            config=botocore.config.Config(**config),
            **self._credentials_for(account_id or ACCOUNT_ID),
        )

    def backstage(self, service: str, region: str, account_id: str | None = None) -> Any:
        """Make a boto3 client to set a scene with: nothing but moto sees its requests."""
        key = (service, region, account_id)
        if key not in self._backstage:
            once = {"total_max_attempts": 1}
            self._backstage[key] = self.client(
                service, region, account_id, user_agent_extra=BACKSTAGE, retries=once
            )
        return self._backstage[key]

    def _credentials_for(self, account_id: str) -> dict[str, str]:
        """Assume a role of another account, once: moto tells accounts apart by the role's access key."""
        known = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        if account_id == ACCOUNT_ID:
            return known
        if account_id not in self._credentials:
            role = f"arn:aws:iam::{account_id}:role/backstage"
            sts = self.backstage("sts", "us-east-1")
            given = sts.assume_role(RoleArn=role, RoleSessionName="backstage")["Credentials"]
            self._credentials[account_id] = {
                "aws_access_key_id": given["AccessKeyId"],
                "aws_secret_access_key": given["SecretAccessKey"],
                "aws_session_token": given["SessionToken"],
            }
        return self._credentials[account_id]

    # Scenes

    def launch(
        self, region: str, tags: dict[str, str] | None = None, count: int = 1, account_id: str | None = None
    ) -> list[str]:
        """Launch instances with these tags, as one reservation, and give their ids."""
        specifications = [{"ResourceType": "instance", "Tags": tag_list(tags)}] if tags else []
        ec2 = self.backstage("ec2", region, account_id)
        run = ec2.run_instances(
            ImageId=IMAGE_ID, MinCount=count, MaxCount=count, TagSpecifications=specifications
        )
        return [instance["InstanceId"] for instance in run["Instances"]]

    def tag(self, region: str, ids: list[str], tags: dict[str, str], account_id: str | None = None) -> None:
        """Write tags on instances."""
        self.backstage("ec2", region, account_id).create_tags(Resources=ids, Tags=tag_list(tags))

    def untag(self, region: str, ids: list[str], keys: Iterable[str], account_id: str | None = None) -> None:
        """Take tags off instances."""
        self.backstage("ec2", region, account_id).delete_tags(
            Resources=ids, Tags=[{"Key": key} for key in keys]
        )

    def terminate(self, region: str, ids: list[str], account_id: str | None = None) -> None:
        """Terminate instances."""
        self.backstage("ec2", region, account_id).terminate_instances(InstanceIds=ids)

    # Serving

    def _serve(
        self, environ: dict[str, Any], start_response: Callable[..., Callable[[bytes], object]]
    ) -> list[bytes]:
        """Answer one request; this is the WSGI application."""
        try:
            given = self._answer(environ)
        except ConnectionDroppedError as dropped:
            if isinstance(dropped, TricklingError):
                dropped.send(environ["werkzeug.socket"], environ["REQUEST_METHOD"])
            if dropped.cut_answer:
                whole = dropped.cut_answer.body
                write = start_response(*head(dropped.cut_answer, environ["REQUEST_METHOD"]))
                write(whole[: len(whole) // 2])
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise  # werkzeug takes it for a client that went away, and says nothing
        start_response(*head(given, environ["REQUEST_METHOD"]))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [given.body]

    def _answer(self, environ: dict[str, Any]) -> Answer:
        """Answer one request: backstage ones by moto alone, the others with all there is."""
        with self._moto_lock:
            request = read_request(environ)
        if is_backstage(request):
            return self._moto_answer(request, environ)
        self._requests.append(request)
        return through_faults(self._faults, request, lambda: self._aws_answer(request, environ))

    def _aws_answer(self, request: Request, environ: dict[str, Any]) -> Answer:
        """Answer as AWS would: refuse what it refuses, and mend what moto answers laxly."""
        refusal = self._refusal(request)
        if refusal:
            return refusal
        if request.fits(service="cloudtrail", action="LookupEvents"):
            return looked_up_events(request, self.events.get((request.account_id, request.region), []))
        if request.fits(service="ec2", action="DescribeInstances"):
            # Those that cut_page makes of it are not signed, and not checked.
            given = self._moto_answer(request, environ) if self.checks_permissions else None
            return given if given and given.status != 200 else self._describe_instances(request, environ)
        if request.fits(service="ec2", action="DescribeRegions"):
            return self._describe_regions(request, environ)
        if request.fits(service="ec2", action="CreateTags") and request.params.get("DryRun") != "true":
            given = self._moto_answer(request, environ) if self.checks_permissions else None
            return given if given and given.status != 200 else self._create_tags(request)
        given = self._moto_answer(request, environ)
        if request.fits(service="ec2", action="DeleteTags") and given.status == 200:
            return done(request)  # moto leaves out `return`
        if self.checks_permissions and request.action == "GetObject" and given.status == 404:
            return missing_object_refusal(request) or given
        return given

    def _refusal(self, request: Request) -> Answer | None:
        """Find what AWS would refuse the request for."""
        refusal = role_refusal(request, self.denied_roles)
        refusal = refusal or region_refusal(request, self._opt_in_status(request.account_id, request.region))
        if request.service == "organizations":
            organization = organizations_backends[request.account_id]["aws"].org
            refusal = refusal or organization_refusal(request, has_organization=organization is not None)
        if request.action == "DescribeInstances":
            refusal = refusal or page_refusal(request)
        if request.action in ("CreateTags", "DeleteTags") and request.params.get("DryRun") != "true":
            refusal = refusal or tag_refusal(request, self._instances(request))
        return refusal

    def _opt_in_status(self, account_id: str, region: str) -> str:
        """Tell whether a region is enabled in an account, in the words of DescribeRegions."""
        if (account_id, region) in self.disabled or (None, region) in self.disabled:
            return NOT_OPTED_IN
        return "opted-in" if region in self.opted_in else OPT_IN_STATUS.get(region, "opt-in-not-required")

    def _instances(self, request: Request) -> dict[str, dict[str, str]]:
        """Give the tags of every instance in the account and region of a request."""
        with self._moto_lock:
            ec2 = ec2_backends[request.account_id][request.region]
            return {instance.id: dict(ec2.tags.get(instance.id, {})) for instance in ec2.all_instances()}

    def _create_tags(self, request: Request) -> Answer:
        """Write tags that were not refused; moto would count those of AWS itself to the limit."""
        with self._moto_lock:
            ec2 = ec2_backends[request.account_id][request.region]
            for resource in numbered(request.params, "ResourceId"):
                ec2.tags[resource].update(tags_of(request.params))
        return done(request)

    def _describe_regions(self, request: Request, environ: dict[str, Any]) -> Answer:
        """Answer DescribeRegions with what was asked for."""
        given = self._moto_answer(request, environ)
        if given.status != 200:
            return given

        def opt_in_status(region: str) -> str:
            return self._opt_in_status(request.account_id, region)

        regions = cut_regions(ET.fromstring(given.body), request.params, opt_in_status)
        return given._replace(body=to_xml(regions))

    def _describe_instances(self, request: Request, environ: dict[str, Any]) -> Answer:
        """Answer DescribeInstances page by page; a token leads to the rest as it was at the first page."""
        token = request.params.get("NextToken")
        if token:
            listing = self._rests.get((request.account_id, request.region, token))
        else:
            listing = self._all_instances(request, environ)
        if listing is None:
            return invalid_value(request, "Unable to parse pagination token")
        if isinstance(listing, Answer):
            return listing
        page, rest = cut_page(listing, self._take_page_size(request))
        if rest is not None:
            ET.SubElement(page, f"{{{namespace(page)}}}nextToken").text = self._keep(request, rest)
        return Answer(200, {"Content-Type": "text/xml;charset=UTF-8"}, to_xml(page))

    def _all_instances(self, request: Request, environ: dict[str, Any]) -> ET.Element | Answer:
        """Ask moto for all instances that a request is about; it gives 100 reservations at a time."""
        params = {name: value for name, value in request.params.items() if name != "MaxResults"}
        pages: list[ET.Element] = []
        while not pages or "NextToken" in params:
            given = self._moto_answer(request, environ, urllib.parse.urlencode(params).encode())
            if given.status != 200:
                return given
            pages.append(ET.fromstring(given.body))
            token = pages[-1].find("{*}nextToken")
            params.pop("NextToken", None)
            if token is not None:
                pages[-1].remove(token)
                params["NextToken"] = token.text
        for page in pages[1:]:
            child(pages[0], "reservationSet").extend(child(page, "reservationSet"))
        return with_operators(
            pages[0], self.managed, hide=request.params.get("IncludeManagedResources") != "true"
        )

    def _take_page_size(self, request: Request) -> int:
        """Tell how many instances go on the next page."""
        if numbered(request.params, "InstanceId"):
            return 1000
        if self.empty_pages > 0:
            self.empty_pages -= 1
            return 0
        return self.page_size or int(request.params.get("MaxResults", 1_000_000))

    def _keep(self, request: Request, rest: ET.Element) -> str:
        """Keep what is left for the next pages under a token."""
        token = f"token-{next(self._token_numbers):06d}"
        self._rests[request.account_id, request.region, token] = rest
        return token

    def _moto_answer(self, request: Request, environ: dict[str, Any], body: bytes | None = None) -> Answer:
        """Let moto carry out a request, or one with another body; what moto cannot do is an error 500."""
        environ = dict(environ)
        replace_body(environ, request.body if body is None else body)
        checked = self.checks_permissions and body is None and not is_backstage(request)
        with self._moto_lock:
            moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = 0 if checked else math.inf
            try:
                chunks, status, headers = werkzeug.test.run_wsgi_app(self._moto, environ, buffered=True)
            except Exception as failure:  # moto in its debug mode raises on what it has not implemented
                return error_answer(request, 500, "InternalError", f"moto: {failure!r}")
            finally:
                moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = math.inf
        return Answer(int(status.split()[0]), dict(headers), b"".join(chunks))
