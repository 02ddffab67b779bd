#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["boto3>=1.42.95", "PyYAML>=6.0.1", "jsonschema>=4.0.1"]
# ///
"""Find the EC2 instances that lack their required tags, and remember which were seen before.

The file reads downward; a section uses only what stands above it:

 1 Words           exit codes, errors, records
 2 Policy          the YAML file, checked, as a Policy
 3 Evaluation      an instance's tags and its rules -> violations
 4 Suggestions     the tags of its siblings -> the likely value of a missing tag
 5 AWS             accounts, regions and instances, live or saved
 6 State           what is remembered between scans, in SQLite
 7 Reports         summary, CSV, JSON, JUnit
 8 Dashboard       the HTML page
 9 Notifications   digests for Slack, SNS and email
10 Remediation     plans, undo files, and the calls that write tags
11 Command line    the commands; the only place with print, the clock and threads
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import contextvars
import csv
import difflib
import errno
import fnmatch
import functools
import hashlib
import heapq
import importlib.resources
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import shlex
import shutil
import signal
import sqlite3
import stat
import sys
import tempfile
import threading
import time
import unicodedata
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from enum import Enum, IntEnum, StrEnum, unique
from io import BufferedReader, StringIO, TextIOBase, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal, NamedTuple, NoReturn, Self, TypeVar
from xml.etree import ElementTree
from xml.parsers import expat
from xml.sax.saxutils import XMLGenerator
from xml.sax.xmlreader import AttributesImpl

__version__ = "1.0"

LOG = logging.getLogger("tagcheck")


########################################################################################################
# 1 Words: ExitCode, the errors, the records
########################################################################################################


@unique
class ExitCode(IntEnum):
    """How a run ended, for automation to branch on; the higher of 3, 4 and 5 wins."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> Self:  # noqa: D102
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    COMPLIANT = 0, "every target was read and no finding counts under --fail-on"
    CRASHED = 1, "a bug or a missing package: Python's own code, never used for findings"
    USAGE = 2, "wrong arguments or an invalid policy; nothing was scanned"
    VIOLATIONS = 3, "every target was read, and findings count"
    INCOMPLETE = 4, "some account or region could not be read; the rest is recorded and reported; outranks 3"
    FAILED = 5, "could not run or finish: credentials, state, an output file, a notification; outranks 4"
    INTERRUPTED = 130, "stopped by Ctrl-C or SIGTERM; nothing was recorded"


class TagcheckError(Exception):
    """An expected failure; its message says what to do next."""

    exit_code = ExitCode.FAILED


class PackageError(TagcheckError):
    """A package that tagcheck needs is missing or too old."""

    exit_code = ExitCode.CRASHED


class UsageError(TagcheckError):
    """The arguments, or a file that they name, cannot be used."""

    exit_code = ExitCode.USAGE


class CredentialsError(TagcheckError):
    """AWS knows no caller: there is nothing to scan with."""


class StateError(TagcheckError):
    """The state cannot be read or written."""


class MissingStateError(StateError):
    """There is no state where one was named."""


class UploadError(StateError):
    """The scan is recorded in a copy of the state that could not be put in the state's place."""


class OutputError(TagcheckError):
    """A report cannot be written."""


class NotificationError(TagcheckError):
    """Somebody was not told of a scan, which is recorded and reported."""


class TargetError(TagcheckError):
    """One target could not be read in full; the others can."""

    exit_code = ExitCode.INCOMPLETE

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a policy file, with its place (line and column count from 1), written as compilers do."""

    file: str
    line: int
    column: int
    where: str
    message: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        severity = "warning: " if self.severity == "warning" else ""
        return printable(f"{self.file}:{self.line}:{self.column}: {severity}{where}{self.message}")


MAX_PROBLEMS = 100


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """Return a line for each of the first problems of a file, and one that counts the others."""
    more = len(problems) - MAX_PROBLEMS
    rest = [f"… and {counted(more, 'more problem')}"] if more > 0 else []
    return [*map(str, problems[:MAX_PROBLEMS]), *rest]


class PolicyError(UsageError):
    """A policy file, or an edited plan, is wrong; holds every problem that was found in it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line, problem.column)))
        super().__init__("\n".join(problem_lines(self.problems)))


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """One account in one region: the unit of scanning, of failure and of resolution."""

    account_id: str
    region: str

    def __str__(self) -> str:
        return f"{self.account_id} {self.region}"


@dataclass(frozen=True, slots=True)
class Instance:
    """What a scan needs to know of one EC2 instance."""

    instance_id: str
    state: str
    launch_time: datetime
    tags: Mapping[str, str]
    instance_type: str = ""
    profile: str = ""
    subnet_id: str = ""
    vpc_id: str = ""
    managed_by: str = ""  # the AWS service that operates it, such as eks.amazonaws.com


class ViolationType(StrEnum):
    """In which way an instance fails a required tag."""

    MISSING = "missing"
    EMPTY = "empty"
    NONCOMPLIANT_VALUE = "noncompliant_value"


@dataclass(frozen=True, slots=True)
class Violation:
    """One required tag that one instance fails; of a near miss, the key that was found and its value."""

    tag_key: str
    type: ViolationType
    value: str | None
    found_key: str | None
    message: str


class Status(StrEnum):
    """What a scan makes of a finding, seen against the scans before it."""

    NEW = "NEW"
    REPEAT = "REPEAT"
    REOPENED = "REOPENED"
    RESOLVED = "RESOLVED"


class Resolution(StrEnum):
    """Why a finding is no longer open."""

    TAGGED = "tagged"
    GONE = "gone"
    EXEMPTED = "exempted"
    POLICY_CHANGED = "policy_changed"


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What a required tag should probably be, how sure that is (0 to 1), and why."""

    tag_key: str
    value: str
    confidence: float
    evidence: str

    def __str__(self) -> str:
        return f"{self.tag_key}={self.value} ({self.evidence})"


class Group(NamedTuple):
    """What instances of a target have in common, such as their Auto Scaling group."""

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Finding:
    """An instance with violations under a policy, with its history; times are text in UTC."""

    account_id: str
    region: str
    instance_id: str
    state: str
    launch_time: str
    tags: Mapping[str, str]
    violations: tuple[Violation, ...]
    status: Status
    first_seen: str
    last_seen: str
    times_seen: int
    times_reopened: int
    resolved_at: str | None
    resolution: Resolution | None
    created_by: str | None
    suggestions: tuple[Suggestion, ...]
    instance_type: str | None
    cause: Group | None
    monthly_cost: float | None
    managed_by: str | None  # "" where no AWS service does, None where the first edition recorded it

    @property
    def target(self) -> Target:
        """Where the instance is."""
        return Target(self.account_id, self.region)

    @property
    def name(self) -> str:
        """The instance's Name tag, as consoles show it."""
        return self.tags.get("Name", "")


UNKNOWN = "unknown ("  # how `created_by` begins where nobody is known; why follows


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a finding at a time, and the violations that it had from then on."""

    at: str
    event: str
    violations: tuple[Violation, ...]
    resolution: Resolution | None


@dataclass(frozen=True, slots=True)
class Change:
    """One tag that `remediate` wrote, or was about to write when it was last heard of."""

    change_id: str
    policy: str
    account_id: str
    region: str
    instance_id: str
    tag_key: str
    former: str | None
    value: str | None
    why: str
    who: str
    changed_at: str
    status: Literal["intended", "written"]

    @property
    def target(self) -> Target:
        """Where the instance is."""
        return Target(self.account_id, self.region)

    def __str__(self) -> str:
        done = "deleted" if self.value is None else f"set to {self.value!r}"
        before = "missing" if self.former is None else repr(self.former)
        unknown = "" if self.status == "written" else "; whether it was carried out is not known"
        return f"{self.changed_at} {self.tag_key} {done} (it was {before}) by {self.who}: {self.why}{unknown}"


@dataclass(frozen=True, slots=True)
class Coverage:
    """How far one target was read in a scan, and what was found there."""

    target: Target
    error_code: str | None = None
    error_message: str | None = None
    instances: int = 0
    compliant: int = 0
    findings: int = 0
    exempted: int = 0
    new: int = 0
    repeat: int = 0
    reopened: int = 0
    resolved: int = 0

    @property
    def read(self) -> bool:
        """True where every instance of the target was looked at."""
        return self.error_code is None

    @property
    def too_young(self) -> int:
        """Instances within their grace period, not judged yet."""
        return self.instances - self.compliant - self.findings - self.exempted


@dataclass(frozen=True, slots=True)
class Standing:
    """A target as it stands: how the latest scan of it ended, and the counts of when it was last read in full."""

    target: Target
    error: str | None
    last_read: str | None
    instances: int
    compliant: int
    findings: int
    exempted: int


@dataclass(frozen=True, slots=True)
class TrendPoint:
    """What was open after a scan, all targets as they were last read, and what the scan changed."""

    at: str
    open: int
    new: int
    reopened: int
    resolved: int
    targets: int
    targets_unread: int


# The oldest versions that CI tests; requirements.txt, the block at the top of this file and the README name the same.
# boto3 1.42.93 has no IncludeManagedResources. botocore comes with boto3, but a lock file may hold an older one.
MINIMUM_VERSIONS = {"boto3": "1.42.95", "botocore": "1.42.95", "PyYAML": "6.0.1", "jsonschema": "4.0.1"}


def check_packages(*names: str) -> None:
    """Raise PackageError if a package is missing or older than MINIMUM_VERSIONS."""
    import importlib.metadata  # here, as it takes tens of milliseconds that --help does not need

    for name in names:
        minimum = MINIMUM_VERSIONS[name]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise missing_package(name) from error
        if _numbers(str(version)) < _numbers(minimum):  # None, if what pip left of the package is damaged
            raise PackageError(
                f"{name} {version} is too old ({minimum} or later is needed): {_install_command()}"
            )


def missing_package(name: str) -> PackageError:
    """Return the error for a package that cannot be imported."""
    return PackageError(f"the package {name} is missing: {_install_command()}")


def _install_command() -> str:
    """Return the command that installs all packages, each new enough."""
    wanted = [f"{name}>={minimum}" for name, minimum in MINIMUM_VERSIONS.items()]
    return f"pip install --upgrade {shlex.join(wanted)}"


def _numbers(version: str) -> list[int]:
    """Return the numbers that a version begins with, to compare it by."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


# Unicode's Default_Ignorable_Code_Point, and the characters that are blank by design: the Braille pattern, the
# musical note head and the Khitan filler. str.isprintable() is true for many of them.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U00016fe4\U0001bca0-\U0001bca3\U0001d159"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def printable(text: str) -> str:
    r"""Return text with control, format and other invisible characters escaped (`\x1b`, `\u202e`).

    Tag values, account names and AWS's messages are written by strangers: unescaped they could move a
    terminal's cursor, forge a log line, or show text in another order than it has.
    """
    if is_printable(text):
        return text
    return "".join(
        character if is_printable(character) else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def is_printable(text: str) -> bool:
    """Return whether every character of a text can be seen, or is a space."""
    return text.isprintable() and (text.isascii() or not INVISIBLE.search(text))


def stripped(text: str) -> str:
    """Return text without the spaces and invisible characters around it; nothing is left of a blank text."""
    if is_printable(text):
        return text.strip()
    visible = [
        index
        for index, character in enumerate(text)
        if unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Zs")
        and not INVISIBLE.match(character)
    ]
    return text[visible[0] : visible[-1] + 1] if visible else ""


def is_blank(text: str) -> bool:
    """Return whether nothing of a text can be seen."""
    return not stripped(text)


to_json = json.JSONEncoder(separators=(",", ":")).encode


def violation_record(violation: Violation) -> dict[str, str | None]:
    """Return a violation as a JSON object."""
    return {
        "tag_key": violation.tag_key,
        "type": violation.type,
        "value": violation.value,
        "found_key": violation.found_key,
        "message": violation.message,
    }


def suggestion_record(suggestion: Suggestion) -> dict[str, Any]:
    """Return a suggestion as a JSON object."""
    return {
        "tag_key": suggestion.tag_key,
        "value": suggestion.value,
        "confidence": suggestion.confidence,
        "evidence": suggestion.evidence,
    }


CHUNK_SIZE = 65_536  # bytes or characters to have in memory of what is only passed on


def utc_text(moment: datetime) -> str:
    """Return a time as the state and the JSON keep it: 2026-02-24T10:30:45Z."""
    # Not strftime: its %Y writes the year 1 as "1" on Linux.
    return f"{moment.astimezone(UTC).replace(microsecond=0, tzinfo=None).isoformat()}Z"


def counted(number: int, word: str, plural: str = "") -> str:
    """Return "1 finding", "2 findings", "12,000 instances"."""
    return f"{number:,} {word if number == 1 else plural or f'{word}s'}"


def cut_text(text: str, width: int) -> str:
    """Return text of at most this width, its end cut off visibly."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


# What to do about an error, by its codes: AWS's own, and the names of botocore's exceptions.
_ADVICE = (
    ("AuthFailure", "the region is not enabled in this account, or the credentials are not for it: enable the "
     "region, or take it out of the policy"),
    ("OptInRequired", "the region is not enabled in this account: enable it, or take it out of the policy"),
    ("UnauthorizedOperation AccessDenied AccessDeniedException", "the credentials may not call {operation}: "
     "allow it (tagcheck.py iam-policy prints how)"),
    ("ExpiredToken ExpiredTokenException", "the credentials have expired: renew them and run again"),
    ("RequestExpired", "the request was too old when it arrived: check this machine's clock, then renew the "
     "credentials"),
    ("SignatureDoesNotMatch", "the secret key is wrong, or this machine's clock is"),
    ("InvalidClientTokenId UnrecognizedClientException", "AWS does not know these credentials: check the profile "
     "or the environment"),
    ("RequestLimitExceeded Throttling ThrottlingException TooManyRequestsException", "AWS throttled the calls, and "
     "went on after every retry: run again later, or with fewer --workers"),
    ("EndpointConnectionError ConnectTimeoutError ConnectionClosedError ProxyConnectionError", "no connection: check "
     "the network, the proxy and the region's name"),
    ("ReadTimeoutError CallTimeout", "no answer in time: check the network and run again"),
    ("SSLError", "the TLS connection failed: check the proxy and its certificates (AWS_CA_BUNDLE)"),
    ("ForeignAnswer IncompleteAnswer", "the answer was cut short or is not AWS's: check the network and the proxy"),
    ("InvalidHeader", "the session token or the access key has a line break or another character that HTTP cannot send: "
     "copy it again"),
    ("HTTPClientError", "the HTTP request failed: check the network, the proxy and the AWS configuration"),
    ("UnknownAccountState", "the account's state is new to tagcheck: exclude the account in the policy, or update tagcheck"),
    ("InternalError InternalFailure ServiceUnavailable Unavailable 500 502 503 504", "AWS failed, and went on failing after every "
     "retry: run again later"),
)  # fmt: skip
ADVICE = {code: advice for codes, advice in _ADVICE for code in codes.split()}


########################################################################################################
# 2 Policy: POLICY_SCHEMA, Policy, parse_yaml, load_policy
########################################################################################################


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a list that is not empty."""
    return {"type": "array", "minItems": 1, "items": items}


def _form(pattern: str, complaint: str) -> dict[str, Any]:
    """Return the schema of a text of some form; of another, validate and editors say the complaint."""
    return {"type": "string", "pattern": pattern, "patternErrorMessage": complaint}


def _mapping(
    required: str, more: Mapping[str, Any], **keys: tuple[str, Any, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the schema of a mapping with these keys alone: what editors say of each, an example, its schema."""
    properties = {
        name: {"description": description, "examples": [example], **schema}
        for name, (description, example, schema) in keys.items()
    }
    closed = {"required": required.split(), "additionalProperties": False, "properties": properties}
    return {**more, "type": more.get("type", "object"), **closed}


# tagcheck reads every scalar as text; the schema takes numbers as well because editors see them so.
_TEXT: dict[str, Any] = {"type": ["string", "number"], "minLength": 1}
# EC2's API reference, Tag: a key has up to 127 characters, a value up to 256.
TAG_KEY, TAG_VALUE = _TEXT | {"maxLength": 127}, _TEXT | {"maxLength": 256}
_DATE = _form("^[0-9]{4}-[0-9]{2}-[0-9]{2}$", "is no date: write year-month-day, such as 2027-01-31")
_DURATION = _form("^[0-9]{1,4}[smhd]$", "is no time: write a number and s, m, h or d, such as 2h")
_ACCOUNT_ID = _form("^[0-9]{12}$", "is no account id: it has 12 digits") | {"type": ["string", "number"]}
_INSTANCE_ID = _form("^i-[0-9a-f]{8,17}$", "is no instance id: it looks like i-0123456789abcdef0")
_ROLE_NAME = _form("^[A-Za-z0-9+=,.@_/-]{1,512}$", "is no role name: give the name alone, not the ARN")
_AT = r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@([A-Za-z0-9-]+\.)+[A-Za-z0-9-]+"
_MEMBER = "[UW][A-Z0-9]{6,20}"
_ADDRESS = _form(f"^{_AT}$", "is no e-mail address")
_RECIPIENT = _form(
    f"^({_AT}|{_MEMBER})$", "is neither an e-mail address nor a Slack member's id such as U012ABCDEF"
)
_VARIABLE = _form(
    "^[A-Za-z_][A-Za-z0-9_]*$", "is no name of an environment variable: a secret never stands in the policy"
)
_HOST = _form(
    "^[a-z0-9.-]+(:[0-9]{1,5})?$", "is no host: write its name alone, and :port where it is not 443"
)
_TOPIC_ARN = _form("^arn:[a-z-]+:sns:[a-z0-9-]+:[0-9]{12}:[A-Za-z0-9_-]{1,256}$",
                   "is no ARN of an SNS topic (nor is that of a FIFO topic, which this cannot use)")  # fmt: skip
# The first four are the default: a terminated instance cannot be put right.
_STATES = ["pending", "running", "stopping", "stopped", "shutting-down", "terminated"]

_REQUIRED_TAGS = _list(_mapping(
    "key",
    {"description": "A tag that instances must carry: its key alone, or the key with a rule for its value.",
     **TAG_KEY, "type": ["string", "number", "object"]},
    key=("The tag key, in exactly this spelling.", "CostCenter", TAG_KEY),
    values=("The values that are allowed, in exactly this spelling.", ["dev", "prod"], _list(TAG_VALUE)),
    pattern=("A regular expression (Python's) for the whole value.", "CC-[0-9]{4}", _TEXT),
    default=("What remediate may write where nothing better is known.", "dev", TAG_VALUE),
))  # fmt: skip
_REGION = _mapping(
    "",
    {"description": "What this region asks for. Nothing here: the policy's required_tags alone.",
     "type": ["object", "null"]},
    inherit=("false: the policy's required_tags do not hold here.", False, {"type": "boolean"}),
    required_tags=("Tags as well as the policy's. The same key replaces the policy's.", ["Tier"], _REQUIRED_TAGS),
)  # fmt: skip
_ACCOUNTS = _mapping(
    "role_name",
    {"oneOf": [{"required": ["ids"]},
               {"required": ["organization"], "properties": {"organization": {"const": True}}}]},
    organization=("true: every active account of the organization.", True, {"type": "boolean"}),
    ids=("The ids of the accounts.", ["012345678901"], _list(_ACCOUNT_ID)),
    role_name=("The role to assume in each of them but the caller's own.", "tagcheck-read", _ROLE_NAME),
    external_id=("The external id that the role asks for.", "tagcheck", _TEXT),
    exclude=("Accounts to leave out.", ["210987654321"], _list(_ACCOUNT_ID)),
)  # fmt: skip
_EXEMPTION = _mapping(
    "reason",
    {"description": "Instances that need not carry some tags, why, and until when. All that it names must match.",
     "anyOf": [{"required": [key]} for key in ("tags", "instances", "accounts", "regions", "managed_by")]},
    reason=("Why: every report shows it.", "EKS nodes are tagged by the cluster team", _TEXT),
    tags=("Tags of the instances; in a value * stands for any text and ? for one character.",
          {"eks:cluster-name": "*"},
          {"type": "object", "minProperties": 1, "additionalProperties": TAG_VALUE | {"minLength": 0}}),
    instances=("The ids of the instances.", ["i-0123456789abcdef0"], _list(_INSTANCE_ID)),
    accounts=("The accounts.", ["012345678901"], _list(_ACCOUNT_ID)),
    regions=("The regions.", ["eu-west-1"], _list(_TEXT)),
    managed_by=("Instances that this AWS service operates; * and ? as in tags, so \"*\" is any service.",
                "eks.amazonaws.com", _TEXT),
    required_tags=("The tags that they need not carry. Left out: none of them.", ["Owner"], _list(TAG_KEY)),
    expires=("The last day on which it holds (UTC).", "2027-01-31", _DATE),
    approved_by=("Who agreed.", "head of platform", _TEXT),
    ticket=("Where it was agreed.", "OPS-1234", _TEXT),
)  # fmt: skip
_SLACK = _mapping(
    "webhook_url_env",
    {},
    webhook_url_env=("The environment variable that holds the URL of an incoming webhook.", "SLACK_WEBHOOK_URL",
                     _VARIABLE),
    allow_hosts=("Hosts that the URL may name beside Slack's own.", ["slack.example.com"], _list(_HOST)),
)  # fmt: skip
_EMAIL = _mapping(
    "from",
    {},
    **{"from": ("The sender, an address that SES has verified.", "tags@example.com", _ADDRESS)},
    to=("Who gets the digest of everything.", ["ops@example.com"], _list(_ADDRESS) | {"maxItems": 50}),
    region=("The region of SES. Left out: that of the credentials.", "eu-west-1", _TEXT),
)
_OWNERS = _mapping(
    "",
    {"description": "To send each owner a digest of what is theirs."},
    tag=("The tag that names the owner. Left out: Owner.", "Owner", TAG_KEY),
    mapping=("For a value of that tag, or a creator, the address or the Slack member's id.",
             {"team-web": "web@example.com", "alice": "U012ABCDEF"},
             {"type": "object", "minProperties": 1, "additionalProperties": _RECIPIENT}),
    domains=("A value or a creator that is an address of one of these is written to as it is.", ["example.com"],
             _list(_HOST)),
    default=("Who gets what nobody is known for. Left out: nobody.", "ops@example.com", _RECIPIENT),
)  # fmt: skip
_NOTIFY = _mapping(
    "",
    {},
    on=("new: what is NEW or REOPENED, once; any: all that is open, with each scan.", "new", {"enum": ["new", "any"]}),
    slack=("An incoming webhook of Slack.", {"webhook_url_env": "SLACK_WEBHOOK_URL"}, _SLACK),
    sns=("A topic of SNS.", {"topic_arn": "arn:aws:sns:eu-west-1:012345678901:tags"},
         _mapping("topic_arn", {}, topic_arn=("Its ARN.", "arn:aws:sns:eu-west-1:012345678901:tags", _TOPIC_ARN))),
    email=("E-mail, sent by SES.", {"from": "tags@example.com", "to": ["ops@example.com"]}, _EMAIL),
    owners=("A digest for each owner, of what is theirs.", {"domains": ["example.com"]}, _OWNERS),
)  # fmt: skip
POLICY_SCHEMA = _mapping(
    "version name regions",
    {"$schema": "http://json-schema.org/draft-07/schema#", "title": "tagcheck policy",
     "description": "Which tags EC2 instances must carry, region by region."},
    version=("The version of this format: 1.", 1, {"enum": [1, "1"]}),
    name=("Findings are kept under this name. Rename a policy, and all of them are NEW.", "org-tagging", _TEXT),
    required_tags=("The tags that instances must carry in every region below.", ["Owner"], _REQUIRED_TAGS),
    placeholder_values=("Values that count as empty, whatever their case.", ["tbd", "n/a"], _list(TAG_VALUE)),
    states=("The instance states that are looked at. Left out: all but shutting-down and terminated.",
            ["running", "stopped"], _list({"enum": _STATES})),
    grace_period=("How long after its launch an instance may lack tags: 90s, 30m, 2h or 1d.", "2h", _DURATION),
    regions=('The regions to scan, each with what it asks for. "*" is every other region that is enabled.',
             {"us-east-1": {}, "eu-west-1": {"required_tags": ["DataResidency"]}},
             {"type": "object", "minProperties": 1, "additionalProperties": _REGION}),
    accounts=("The accounts to scan. Left out: the one account of the credentials.",
              {"organization": True, "role_name": "tagcheck-read"}, _ACCOUNTS),
    expected_account=("The account that the credentials must be of. With any other nothing is read.", "012345678901",
                      _ACCOUNT_ID),
    exemptions=("Instances that need not carry some tags, each with a reason.",
                [{"reason": "the cluster team tags them", "tags": {"eks:cluster-name": "*"}}], _list(_EXEMPTION)),
    notify=("Who is told of what a scan found.", {"slack": {"webhook_url_env": "SLACK_WEBHOOK_URL"}}, _NOTIFY),
)  # fmt: skip

# Far beyond any policy of use; they keep a hostile file's size, nesting and aliases from costing anything.
MAX_POLICY_BYTES, MAX_POLICY_DEPTH, MAX_POLICY_NODES = 1_000_000, 40, 30_000

# AWS's regions by the endpoint data of botocore 1.44.5 (2026-11). A name that is not here is looked up in
# the installed botocore's data, so that a region younger than this file needs only a newer boto3.
AWS_REGIONS = frozenset("""
    af-south-1 ap-east-1 ap-east-2 ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-south-1 ap-south-2 ap-southeast-1
    ap-southeast-2 ap-southeast-3 ap-southeast-4 ap-southeast-5 ap-southeast-6 ap-southeast-7 ca-central-1 ca-west-1
    cn-north-1 cn-northwest-1 eu-central-1 eu-central-2 eu-isoe-west-1 eu-north-1 eu-south-1 eu-south-2 eu-west-1
    eu-west-2 eu-west-3 eusc-de-east-1 il-central-1 me-central-1 me-south-1 mx-central-1 sa-east-1 us-east-1
    us-east-2 us-gov-east-1 us-gov-west-1 us-iso-east-1 us-iso-west-1 us-isob-east-1 us-isob-west-1 us-isof-east-1
    us-isof-south-1 us-west-1 us-west-2
    """.split())  # fmt: skip


REGION_NAME = "[a-z]+(?:-[a-z]+)+-[0-9]+"


def is_region(name: str) -> bool:
    """Return whether AWS has a region of this name, as far as this file or the installed botocore knows."""
    return name in AWS_REGIONS or name in _botocore_regions()


@functools.cache
def _botocore_regions() -> frozenset[str]:
    """Return the regions that the installed botocore knows; none where it is not installed."""
    try:
        partitions = importlib.resources.files("botocore").joinpath("data/partitions.json").read_text("utf-8")
    except (ModuleNotFoundError, OSError):
        return frozenset()
    return frozenset(
        region for partition in json.loads(partitions)["partitions"] for region in partition["regions"]
    )


# The processor time that a pattern may take on one value, and how long to wait for it on a busy machine.
PATTERN_SECONDS, PATTERN_WAIT = 0.5, 3.0
# A pattern that was stopped on so many values, or took so long on slow ones, is not tried on others.
MAX_STOPPED, MAX_SLOW_SECONDS = 3, 10.0
PATTERN_START = 60.0  # a Python process starts in 15 milliseconds
MAX_PATTERN_STEPS = (
    2_000_000  # an upper bound by the text alone: the slowest that was found took 2 milliseconds
)
MAX_PATTERN_LENGTH = 10_000
# For all patterns of a policy together: after the first they are only compiled, after the second refused.
MAX_TRY_SECONDS, MAX_CHECK_SECONDS = 1.0, 2.0
TRY_SECONDS = 0.0001  # what asking the child costs; not measured, so that a busy machine changes no verdict

# Reads lines of JSON (pattern, value, limit), and answers each with a line (matches or error, seconds).
# Nobody handles SIGPROF, so that it ends the process even within `re`, and even when tagcheck was killed.
_MATCHER_CODE = """
import json, re, signal, sys, time
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
def limit(seconds):
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)
print("ready", flush=True)
for line in sys.stdin:
    pattern, value, seconds = json.loads(line)
    limit(seconds)
    began = time.process_time()
    try:
        answer = re.fullmatch(pattern, value) is not None
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        answer = str(error)
    took = time.process_time() - began
    limit(0)
    print(json.dumps([answer, took]), flush=True)
"""


class _Matcher:
    """Matches patterns in a child process, which is started when needed and ended when a match takes too long.

    `re` holds the interpreter lock, and only a signal in the main thread of POSIX could interrupt it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None

    def match(self, pattern: str, value: str) -> tuple[bool | str, float] | None:
        """Return whether a pattern matches, or why it is not one, and the seconds; None where it was stopped."""
        request = json.dumps([pattern, value, PATTERN_SECONDS]).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # a busy machine or too little memory can stop a harmless match
                answer, exit_code = self._ask(request)
                if answer is not None:
                    matches, seconds = json.loads(answer)
                    return matches, seconds
                if exit_code == -getattr(signal, "SIGPROF", 0):
                    break
        return None

    def _ask(self, request: bytes) -> tuple[bytes | None, int | None]:
        """Return the child's answer; where there is none, the code that it ended with."""
        answer = exit_code = None
        try:
            if self._process is None:
                self._start()
            with contextlib.suppress(OSError, queue.Empty):
                self._process.stdin.write(request)
                self._process.stdin.flush()
                answer = self._answers.get(timeout=PATTERN_WAIT)
        finally:
            if answer is None:  # also on Ctrl-C: the answer to this must not become that to the next
                exit_code = self.stop()
        return answer, exit_code

    def _start(self) -> None:
        """Start the child, in a session of its own so that Ctrl-C does not reach it; raises TagcheckError."""
        import subprocess  # most policies do not need it

        try:
            self._process = process = subprocess.Popen(
                [sys.executable or "", "-I", "-S", "-c", _MATCHER_CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
            self._answers = queue.SimpleQueue()
            self._reader = threading.Thread(
                target=_read_lines, args=(process.stdout, self._answers), daemon=True
            )
            self._reader.start()
            if self._answers.get(timeout=PATTERN_START) is None:
                raise OSError("it ended at once")
        except (OSError, RuntimeError, queue.Empty) as error:  # RuntimeError: no new thread
            self.stop()
            why = str(error) or f"no answer within {PATTERN_START:.0f} s"
            advice = "allow one more process, or list the values in the policy instead of a pattern"
            message = f"cannot start a Python process to check a pattern in: {why}; {advice}"
            raise TagcheckError(message) from error

    def stop(self) -> int | None:
        """End the child if there is one; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(OSError):  # what could not be written
            process.stdin.close()
        exit_code: int = process.wait()
        if self._reader is not None and self._reader.ident is not None:
            self._reader.join()
        return exit_code


def _read_lines(file: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    """Put the lines of a file into a queue, and None at its end: the queue can be waited on with a limit."""
    with file:
        for line in file:
            lines.put(line)
    lines.put(None)


_MATCHER = _Matcher()
# A thread that still reads when Python ends would crash it.
atexit.register(_MATCHER.stop)


def is_quick(pattern: str) -> bool:
    """Return whether a pattern cannot take long on any value that AWS allows.

    Each quantifier and each alternative multiplies the ways to match a value. Without a repeated group, a
    back-reference or anything else that is special, their product bounds the time.
    """
    text = re.sub(r"^\(\?[aims]+\)", "", pattern)
    if not text.isascii() or re.search(r"\(\?(?!:)|\)[*+?{]|[*+?}]\+|\\(?![dDsSwW])[0-9A-Za-z]", text):
        return False
    ways, width = 1, len(text)
    for sign, low, comma, high in re.findall(r"([*+?]|\{([0-9]*)(,?)([0-9]*)\})", text):
        if len(low + high) > 8:
            return False
        least = int(low or 0)
        most = int(high or _MOST_CHARACTERS) if comma else least
        width += min(most, _MOST_CHARACTERS)
        ways *= {"*": _MOST_CHARACTERS, "+": _MOST_CHARACTERS, "?": 2}.get(sign, max(1, most - least + 1))
        if ways > MAX_PATTERN_STEPS:
            return False
    alternatives, groups = text.count("|"), text.count("(") + 1
    return groups < 100 and ways * width * (1 + alternatives / groups) ** groups <= MAX_PATTERN_STEPS


_MOST_CHARACTERS: int = TAG_VALUE["maxLength"]


class Verdict(Enum):
    """What a rule says about a value."""

    ALLOWED = 1
    REFUSED = 2
    STOPPED = 3  # its pattern took too long on this value, or failed: `re` has bugs
    NOT_CHECKED = 4  # its pattern took too long on other values


class ValuePattern:
    """A regular expression for whole tag values, which strangers write: no value can keep it busy for long."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._quick = re.compile(text) if is_quick(text) else None
        self._verdicts: dict[str, Verdict] = {}
        self.slow_seconds = 0.0
        self.stopped = 0

    @property
    def given_up(self) -> bool:
        """Whether it took so long that no other value is checked."""
        return self.stopped >= MAX_STOPPED or self.slow_seconds >= MAX_SLOW_SECONDS

    def judge(self, value: str) -> Verdict:
        """Return whether the whole value matches, where that can be said in time."""
        if self._quick and len(value) <= _MOST_CHARACTERS:
            return Verdict.ALLOWED if self._quick.fullmatch(value) else Verdict.REFUSED
        if value not in self._verdicts:
            if self.given_up:
                return Verdict.NOT_CHECKED
            # Only a saved file can hold longer values than AWS allows, of any length.
            if len(self._verdicts) >= 2000 or len(value) > _MOST_CHARACTERS:
                self._verdicts.clear()
            self._verdicts[value] = self._ask(value)
        return self._verdicts[value]

    def _ask(self, value: str) -> Verdict:
        """Let the child process match a value."""
        answer = _MATCHER.match(self.text, value)
        if answer is None:
            self.stopped += 1
            self.slow_seconds += PATTERN_SECONDS
            return Verdict.STOPPED
        matches, seconds = answer
        self.slow_seconds += seconds if seconds > 0.001 else 0
        return Verdict.ALLOWED if matches is True else Verdict.REFUSED


@dataclass(frozen=True, slots=True)
class RequiredTag:
    """One rule: a key that must be there, what its value must be, and the policy's line that says so."""

    key: str
    values: tuple[str, ...] = ()
    pattern: ValuePattern | None = None
    default: str | None = None
    line: int = 0

    def allows(self, value: str) -> bool:
        """Return whether the rule holds for a value that is not empty."""
        return self.judge(value) is Verdict.ALLOWED

    def judge(self, value: str) -> Verdict:
        """Return what the rule says about a value that is not empty."""
        if self.values and value not in self.values:
            return Verdict.REFUSED
        return self.pattern.judge(value) if self.pattern else Verdict.ALLOWED

    @property
    def wanted(self) -> str:
        """What the value should have been, for messages."""
        values = f"one of {', '.join(self.values)}" if self.values else ""
        pattern = f"a match of {self.pattern.text}" if self.pattern else ""
        return " and ".join(filter(None, (values, pattern)))


@dataclass(frozen=True, slots=True)
class Exemption:
    """Instances that need not carry some tags; what is left empty restricts nothing."""

    reason: str
    tags: tuple[tuple[str, str], ...] = ()
    instances: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    managed_by: str | None = None
    required_tags: tuple[str, ...] = ()
    expires: date | None = None
    approved_by: str | None = None
    ticket: str | None = None
    line: int = 0
    column: int = 0

    @property
    def conditions(self) -> list[object]:
        """What an instance must meet: each list that is given, and each tag."""
        return [*filter(None, (self.instances, self.accounts, self.regions, self.managed_by)), *self.tags]

    def holds(self, today: date) -> bool:
        """Return whether it has not ended; the day that it names is its last."""
        return self.expires is None or today <= self.expires

    def mismatches(self, target: Target, instance: Instance) -> Iterator[str]:
        """Yield why it does not cover an instance; nothing where it does."""
        if self.accounts and target.account_id not in self.accounts:
            yield f"it is for account {', '.join(self.accounts)}"
        if self.regions and target.region not in self.regions:
            yield f"it is for region {', '.join(self.regions)}"
        if self.instances and instance.instance_id not in self.instances:
            yield f"it is for {', '.join(self.instances)}"
        if self.managed_by and not (
            instance.managed_by and _glob(self.managed_by).match(instance.managed_by)
        ):
            operator = instance.managed_by or "no AWS service"
            yield f"it is for instances managed by {self.managed_by}; this one is managed by {operator}"
        for key, wanted in self.tags:
            value = instance.tags.get(key)
            if value is None or not _glob(wanted).match(value):
                yield f"it is for {key}={wanted}; here {key} is {'missing' if value is None else repr(value)}"


@dataclass(frozen=True, slots=True)
class Accounts:
    """Which accounts are scanned, and how they are entered."""

    role_name: str
    organization: bool = False
    ids: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    external_id: str | None = None

    def covers(self, account_id: str) -> bool:
        """Return whether an account is in the policy's scope."""
        return account_id not in self.exclude and (self.organization or account_id in self.ids)


@dataclass(frozen=True, slots=True)
class Slack:
    """An incoming webhook; its URL is a secret, and stands in the environment."""

    webhook_url_env: str
    allow_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Email:
    """From whom e-mail comes, and who gets the digest of everything."""

    sender: str
    to: tuple[str, ...] = ()
    region: str | None = None


@dataclass(frozen=True, slots=True)
class Owners:
    """How a name becomes an address or a Slack member; the names of `mapping` are in small letters."""

    tag: str = "Owner"
    mapping: Mapping[str, str] = field(default_factory=dict)
    domains: tuple[str, ...] = ()
    default: str | None = None

    def recipient(self, names: Iterable[str]) -> str | None:
        """Return whom to write to: for the first of the names that is known, else the default.

        Tags are written by strangers, so an address in one is used only where its domain is in the policy. A
        creator may be `role/session`, or `alice@example.com (SSO Admin)`.
        """
        for name in names:
            whole = stripped(name).casefold()
            for text in (whole, whole.partition(" (")[0].rpartition("/")[2]):
                if text in self.mapping:
                    return self.mapping[text]
                if re.fullmatch(_AT, text) and text.rpartition("@")[2] in self.domains:
                    return text
        return self.default


@dataclass(frozen=True, slots=True)
class Notify:
    """Who is told of what a scan found."""

    on: Literal["new", "any"] = "new"
    slack: Slack | None = None
    sns: str | None = None
    email: Email | None = None
    owners: Owners | None = None

    @property
    def channels(self) -> list[str]:
        """What is told each finding, and marked as told, apart from the others."""
        told = (self.slack, self.sns, self.email and self.email.to, self.owners)
        return [name for name, given in zip(("slack", "sns", "email", "owners"), told, strict=True) if given]


@functools.cache
def _glob(text: str) -> re.Pattern[str]:
    """Return the pattern of a text in which `*` and `?` stand for others, as in file names."""
    return re.compile(fnmatch.translate(text.replace("[", "[[]")))


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy file that was found right; nothing behind it asks whether a key is there."""

    name: str
    file: str
    digest: str
    regions: Mapping[str, tuple[RequiredTag, ...]]
    placeholder_values: frozenset[str]
    states: frozenset[str]
    grace_period: timedelta
    exemptions: tuple[Exemption, ...]
    accounts: Accounts | None
    expected_account: str | None
    notify: Notify | None

    def covers(self, region: str) -> bool:
        """Return whether the region is in the policy's scope."""
        return region in self.regions or "*" in self.regions

    def rules(self, region: str) -> tuple[RequiredTag, ...]:
        """Return the tags required in a region that the policy covers."""
        return self.regions[region] if region in self.regions else self.regions["*"]

    def includes(self, state: str) -> bool:
        """Return whether instances in a state are judged; those in a state that AWS added later are."""
        return state in self.states or is_new_state(state)


def is_new_state(state: str) -> bool:
    """Return whether an instance state is not one that AWS documents today."""
    return state not in _STATES


KeyPath = tuple[str | int, ...]


class Mistake(NamedTuple):
    """What is wrong in a policy and at which path: at the value there, or at the key that leads to it."""

    path: KeyPath
    message: str
    at_key: bool = False
    near: tuple[Any, tuple[str, ...]] | None = None  # a word, and the ones of which it may be a misspelling


class YamlError(Exception):
    """A text is no YAML, or not that of a policy."""

    def __init__(self, mark: Any, message: str) -> None:
        super().__init__(message)
        self.line, self.column, self.message = mark.line + 1, mark.column + 1, message


class YamlDocument:
    """The value of a YAML text, and where in it each key and value stands.

    Every scalar is the text as it was written, so `NO`, `0123` and `2027-01-31` stay what they look like;
    only `true`, `false` and null without quotes are special. Raises YamlError.
    """

    def __init__(self, text: str) -> None:
        check_packages("PyYAML")
        import yaml

        self._nodes = 0
        self._key_marks: dict[KeyPath, Any] = {}
        self._value_marks: dict[KeyPath, Any] = {}
        self.mistakes: list[Mistake] = []
        if control := yaml.reader.Reader.NON_PRINTABLE.search(text):
            message = f"the character U+{ord(control[0]):04X} cannot stand here; take it out"
            raise YamlError(_mark(text[: control.start()]), message)
        loader = yaml.SafeLoader(text)
        compose, nodes = loader.compose_node, itertools.count(1)

        def compose_node(parent: Any, index: Any) -> Any:
            if next(nodes) > MAX_POLICY_NODES:
                message = f"more than {MAX_POLICY_NODES:,} keys and values: this is no policy"
                raise YamlError(loader.peek_event().start_mark, message)
            return compose(parent, index)

        loader.compose_node = compose_node  # PyYAML takes up to 10 seconds for all of a megabyte
        start = loader.get_mark()
        try:
            root = loader.get_single_node() or yaml.ScalarNode("", "", start, start)
            self.value = self._build(root, ())
        except yaml.MarkedYAMLError as error:
            raise _yaml_error(text, error) from error
        except RecursionError as error:
            raise YamlError(loader, "nested too deep") from error
        except (ValueError, OverflowError) as error:  # PyYAML's own, of numbers in escapes and directives
            raise YamlError(loader, "a number in an escape or a directive is too large") from error

    def place(self, path: KeyPath, *, at_key: bool = False) -> tuple[int, int]:
        """Return line and column, from 1, of the value at a path, or of the key that leads to it."""
        mark = (self._key_marks if at_key else self._value_marks)[path]
        return mark.line + 1, mark.column + 1

    def _build(self, node: Any, path: KeyPath) -> Any:
        """Return the value of a node; an alias costs as much as if its anchor stood there again."""
        self._nodes += 1
        if self._nodes > MAX_POLICY_NODES or len(path) > MAX_POLICY_DEPTH:
            raise YamlError(node.start_mark, "the nesting or the aliases make this larger than any policy")
        if node.tag.rpartition(":")[2] not in _YAML_TAGS:
            self.mistakes.append(Mistake(path, f"{node.tag} has no meaning in a policy; take it out"))
        value: Any
        if node.id == "mapping":
            value = self._build_mapping(node, path)
        elif node.id == "sequence":
            value = [self._build(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            self._check_text(node, path)
            value = _YAML_WORDS.get(node.value, node.value) if node.style is None else node.value
        self._value_marks[path] = node.start_mark  # last, as what is merged in has left its own here
        return value

    def _build_mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        """Return a mapping; what it merges in comes first, so that its own keys and their places replace that."""
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != _YAML_MERGE):
            if key.tag == _YAML_MERGE:
                for source in reversed(value.value if value.id == "sequence" else [value]):
                    merged = self._build(source, path)
                    if not isinstance(merged, dict):
                        raise YamlError(source.start_mark, "<< takes a mapping, or a list of them")
                    mapping |= merged
                continue
            if key.id != "scalar":
                raise YamlError(key.start_mark, "a key must be plain text; put quotes round it")
            name, key_path = key.value, (*path, key.value)
            self._key_marks[key_path] = key.start_mark
            self._check_text(key, key_path, at_key=True)
            if name in lines:
                message = f"{shown_value(name)} appears twice (first in line {lines[name]})"
                self.mistakes.append(Mistake(key_path, message, at_key=True))
            lines.setdefault(name, key.start_mark.line + 1)
            mapping[name] = self._build(value, key_path)
        return mapping

    def _check_text(self, node: Any, path: KeyPath, *, at_key: bool = False) -> None:
        """Note what in a text no tag would ever match, though it may look right; people's prose is their own."""
        plain, prose = node.style is None, not at_key and path[-1:] in _PROSE
        odd = _HALF if prose else _HALF + _CONTROL + _UNSEEN + (_UNQUOTED if plain else ())
        if plain and not prose and node.start_mark.line != node.end_mark.line:
            message = f"goes on in the next line, so that both are one text, {shown_value(node.value)}"
            self.mistakes.append(Mistake(path, f"{message}: indent the lines alike", at_key))
        elif found := _find_odd(node.value, odd):
            self.mistakes.append(Mistake(path, found[1], at_key))
        elif node.value.strip() and is_blank(node.value):
            message = "only invisible characters stand here: type the text again"
            self.mistakes.append(Mistake(path, message, at_key))


_YAML_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_YAML_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "value", "seq", "map", "merge", "")
_YAML_MERGE = "tag:yaml.org,2002:merge"
_PROSE = (("reason",), ("approved_by",), ("ticket",))

# Characters that no tag would ever match, though they may look right, and what to say of the first one.
_HALF = (("[\ud800-\udfff]", "half of a character (U+{:04X}) stands here: write the character itself"),)
_CONTROL = (
    ("[\0-\t\v-\x1f\x7f-\x9f]", "the control character U+{:04X} stands here: take it out"),
    ("\n", "the control character U+{:04X} stands here: take it out (| and > add one at the end)"),
)
_UNSEEN = (
    ("[\u00a0\u2007\u202f]", "a no-break space, not a space (U+{:04X}) stands here: type it anew"),
    # A variation selector after a visible character is part of many an emoji.
    (f"[\u2028\u2029]|(?![\ufe00-\ufe0f]){INVISIBLE.pattern}", "an invisible character (U+{:04X}) stands here: type it anew"),
)  # fmt: skip
_UNQUOTED = (
    ("^[\u201c\u201d\u201e\u2018\u2019\u201a]", "a typographic quote stands here: type a straight one, or none"),
    ("['\"]$", "{text} ends with a quote that nothing opens: take it out, or write both"),
)  # fmt: skip


def _find_odd(text: str, odd: Sequence[tuple[str, str]]) -> tuple[int, str] | None:
    """Return where in a text the first of such characters stands, and what to say of it."""
    for characters, message in odd:
        if found := re.search(characters, text):
            return found.start(), message.format(ord(found[0]), text=shown_value(text))
    return None


# What PyYAML says (context and problem), what to do about it, and whether the place is where it began.
_YAML_ADVICE = (
    (r"character '\\t'", "a TAB stands here; use spaces", False),
    ("cannot start any token|expected alphabetic", "a text that begins with {begun!r} needs quotes round it", True),
    ("undefined alias", "a text that begins with * needs quotes round it (as it is, it names an anchor)", False),
    ("unknown escape", "a backslash in double quotes begins an escape; use single quotes: '…'", False),
    ("quoted scalar", "the quote opened here is not closed", True),
    ("flow (sequence|mapping)", "the [ or {{ opened here is not closed, or a comma in it is missing", True),
    ("another document", "a second document begins here; a policy is one document", False),
    ("mapping values are not allowed", "a text with ': ' in it needs quotes round it; or this line is not indented "
     "as it should be, or the one above lacks its colon", False),
    ("could not find expected ':'.*-", "a space is missing after the dash", True),
    ("could not find expected ':'", "a colon and a space after it are missing in this line", True),
    ("sequence entries", "a list cannot begin with - in the line of its key; begin it on the next line", False),
    ("duplicate anchor", "the anchor is there twice", False),
    ("block scalar", "a text that begins with | or > needs quotes round it", True),
    ("<block end>.* after text", "text goes on after a closing quote or bracket: put quotes round all of it", False),
    ("<block end>", "not indented like the lines above that it belongs to", False),
    ("node content", "a value is missing here", False),
    ("", "not YAML: {problem}", False),
)  # fmt: skip


def _yaml_error(text: str, error: Any) -> YamlError:
    """Return where a YAML text is broken, and what to do about it."""
    mark = error.problem_mark or error.context_mark
    begun = error.context_mark or mark
    said = f"{error.context}; {error.problem}"
    said += " after text" if text[mark.index - mark.column : mark.index].strip(" -?") else ""
    said += " -" if text[begun.index :].startswith("-") else ""
    advice, at_beginning = next(row[1:] for row in _YAML_ADVICE if re.search(row[0], said))
    mark = begun if at_beginning else mark
    line = "".join(text.splitlines(keepends=True)[mark.line : mark.line + 1])
    if odd := _find_odd(line, _UNSEEN):
        return YamlError(SimpleNamespace(line=mark.line, column=odd[0]), odd[1])
    return YamlError(mark, advice.format(begun=text[mark.index :][:1], problem=error.problem))


def load_policy(path: str) -> Policy:
    """Read a policy file; raises PolicyError with every problem in it, or UsageError if it cannot be read."""
    try:
        with Path("/dev/stdin" if path == "-" else path).open("rb") as file:
            content = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        advice = "name another file (of a scan: --policy FILE)"
        raise UsageError(f"cannot read the policy {path}: {error.strerror}; {advice}") from error
    return check_policy(content, path)


def check_policy(content: bytes, file: str) -> Policy:
    """Turn the bytes of a policy file into a Policy; raises PolicyError with every problem in it."""
    try:
        document = YamlDocument(_decode(content))
    except YamlError as error:
        raise PolicyError([Problem(file, error.line, error.column, "", error.message)]) from error
    mistakes = [*document.mistakes, *_schema_mistakes(document.value), *_rule_mistakes(document.value)]
    if not mistakes:
        policy = _policy(document, file, hashlib.sha256(content).hexdigest())
        idle = [region for region, rules in policy.regions.items() if not rules]
        if not idle:
            return policy
        # Told only when nothing else is wrong, as that may be the cause.
        advice = "asks for no tag: name one, or take the region out"
        mistakes = [Mistake(("regions", region), f"{region} {advice}", at_key=True) for region in idle]
    places = {
        mistake[:3]: (document.place(mistake.path, at_key=mistake.at_key), mistake) for mistake in mistakes
    }
    problems: list[Problem] = []
    for place, (path, message, at_key, near) in sorted(places.values(), key=lambda placed: placed[0]):
        # Only a problem that is shown is worth the search.
        hint = did_you_mean(*near) if near and len(problems) < MAX_PROBLEMS else ""
        where = _where(path[:-1] if at_key else path)
        problems.append(Problem(file, *place, where, message + hint))
    raise PolicyError(problems)


def _decode(content: bytes) -> str:
    """Return the text of a policy file: UTF-8, or UTF-16 where a byte order mark says so."""
    if len(content) > MAX_POLICY_BYTES:
        raise YamlError(_mark(""), f"larger than {MAX_POLICY_BYTES:,} bytes: this is no policy")
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte 0x{content[error.start]:02X}); save the file as UTF-8"
        raise YamlError(_mark(content[: error.start].decode(errors="replace")), message) from error


def _mark(before: str) -> SimpleNamespace:
    """Return the place that comes after a text, counted from 0 as PyYAML does."""
    return SimpleNamespace(line=before.count("\n"), column=len(before) - before.rfind("\n") - 1)


def _where(path: KeyPath) -> str:
    """Return a path as people write it: regions.eu-west-1.required_tags[1]."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _schema_mistakes(value: Any) -> Iterator[Mistake]:
    """Yield what POLICY_SCHEMA finds wrong, in words of our own.

    jsonschema's messages hold a dump of the whole value: with aliases that can be gigabytes.
    """
    check_packages("jsonschema")
    import jsonschema

    for error in jsonschema.Draft7Validator(POLICY_SCHEMA).iter_errors(value):
        path, found, wanted = tuple(error.absolute_path), error.instance, error.validator_value
        known = sorted(error.schema.get("properties", ()))
        unknown = [key for key in found if key not in known] if known and isinstance(found, dict) else []
        # `- Owner:` is one mistake, and told as an unknown key.
        colon = path[-2:-1] == ("required_tags",) and bool(unknown) and len(found) == 1
        match error.validator:
            case "additionalProperties":
                for key in unknown:
                    hint = ""
                    near: tuple[Any, tuple[str, ...]] | None = (key, tuple(known))
                    if colon:
                        hint, near = f": take the colon away (- {key[:40]}), or write - key: {key[:40]}", None
                    elif not path and is_region(key):
                        hint, near = ": it is a region; indent it by two spaces, under regions:", None
                    elif path[-1:] == ("slack",):
                        hint = ": a secret never stands in the policy; name the variable that holds it in webhook_url_env"
                    yield Mistake((*path, key), f"unknown key {shown_value(key)}{hint}", True, near)
            case "required":
                missing = [] if colon else [key for key in wanted if key not in found]
                yield from (Mistake(path, f"the key {key!r} is missing") for key in missing)
            case "type":
                kinds = " or ".join(_KINDS[kind] for kind in _KINDS if kind in wanted)
                yield Mistake(path, f"must be {kinds}, not {shown_value(found)}{_type_hint(path, found)}")
            case "enum":
                texts = list(dict.fromkeys(map(str, wanted)))
                choice = f"{'one of ' if len(texts) > 1 else ''}{', '.join(texts)}"
                yield Mistake(path, f"{shown_value(found)} is not {choice}", near=(found, tuple(texts)))
            case "oneOf" if not isinstance(found, dict):
                pass  # its type is told
            case other:
                message = _SCHEMA_MESSAGES[other]
                yield Mistake(path, message.format(shown_value(found), len(found), wanted, error.schema))


_KINDS = {"array": "a list", "boolean": "true or false", "string": "text", "object": "a mapping (key: value)"}
_SCHEMA_MESSAGES = {
    "pattern": "{0} {3[patternErrorMessage]}",
    "minLength": "must not be empty",
    "minItems": "the list is empty: name at least one, or take the key out",
    "minProperties": "is empty: name at least one",
    "maxLength": "{0} has {1} characters; AWS allows {2}",
    "anyOf": "does not say for which instances: add tags, instances, accounts, regions or managed_by",
    "oneOf": "says not which accounts: give it organization: true, or ids, not both",
}


def _type_hint(path: KeyPath, found: Any) -> str:
    """Return what to write where something of another kind stands, as far as the place tells."""
    text = found[:40] if isinstance(found, str) else ""
    if text.startswith("-"):
        return "; a space is missing after the dash: - Owner"
    match path:
        case ("regions",):
            return "; write each region on a line of its own, indented, with a colon after it: us-east-1:"
        case ("regions", _):
            return "; put required_tags: before it"
        case (*_, "required_tags" | "values" | "states" | "placeholder_values" | "accounts" | "ids") if text:
            one = "," in text or " " not in text
            return f"; write [{text}]" if one else "; begin each with a dash: - Owner"
        case (*_, "required_tags" | "exemptions" as key):
            return f"; begin each one with a dash and a space: - {'reason: …' if key == 'exemptions' else 'Owner'}"
        case (*_, "pattern"):
            return "; put single quotes round it: '[0-9]'"
        case (*_, "inherit"):
            return "; write it in small letters and without quotes"
        case (*_, "tags", _) if found is None:
            return '; for any value write "*"'
        case () if re.match(r"[\w-]+:\S", text):
            return "; a space must follow each colon"
        case (_, *_) if found is None:
            return "; if it begins with #, put quotes round it"
    return ""


# What people write for our keys, beside typing errors.
_SYNONYMS = {
    "values": "allowed allowed_values value enum",
    "pattern": "regex regexp match format",
    "key": "tag tag_key name",
    "required_tags": "required tags mandatory_tags",
    "exemptions": "ignore exceptions waivers exclude",
    "expires": "until expiry expires_at expired_at end",
    "reason": "why comment description",
    "placeholder_values": "placeholders empty_values",
    "grace_period": "grace grace_minutes grace_hours",
}


def did_you_mean(word: Any, known: Sequence[str]) -> str:
    """Return " (did you mean 'x'?)" where a known word is near, or one that people write for it."""
    if len(known) > 1000:
        return ""  # takes too long
    words = {synonym: key for key in known for synonym in _SYNONYMS.get(key, "").split()}
    words |= {key.casefold(): key for key in known}
    word = word[:100].casefold() if isinstance(word, str) else ""
    near = difflib.get_close_matches(word, words)
    # Of equally near words difflib may not choose the one whose letters were only typed in another order.
    near.sort(key=lambda candidate: sorted(candidate) != sorted(word))
    return f" (did you mean {words[near[0]]!r}?)" if near else ""


def shown_value(value: Any) -> str:
    """Return a value of a policy for a message: short, whatever is in it."""
    if isinstance(value, str):
        value = re.sub(
            r"(?s)(://|hooks\.slack).*", r"\1…", value
        )  # a webhook's URL is a secret, wherever it stands
        return repr(value if len(value) <= 100 else f"{value[:99]}…")
    if isinstance(value, bool):
        return f'{str(value).lower()} (for that text write "{str(value).lower()}")'
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), repr(value)[:100])


def _given(mapping: Any, key: str, kind: type[Any]) -> Any:
    """Return what a mapping has under a key; something empty of this kind where the schema finds it wrong."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    return value if isinstance(value, kind) else kind()


def _texts(mapping: Any, key: str) -> dict[int, str]:
    """Return the texts of a list under a key, by their places in it."""
    return {index: text for index, text in enumerate(_given(mapping, key, list)) if isinstance(text, str)}


def _rules(entry: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rules of a required_tags list in their long form, each with its place in the list."""
    for index, tag in enumerate(_given(entry, "required_tags", list)):
        rule = {"key": tag} if isinstance(tag, str) else tag
        if _given(rule, "key", str):
            yield index, rule


class _PatternCheck:
    """Says why a policy cannot use a pattern. The tries for all patterns of a policy share a limit."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}
        self._patterns: dict[str, ValuePattern] = {}
        self._seconds = 0.0

    def complaint(self, pattern: str) -> str | None:
        """Return why a policy cannot use a pattern; None where it can."""
        if pattern not in self._known:
            self._known[pattern] = self._complaint(pattern)
        return self._known[pattern]

    def allows(self, rule: RequiredTag, value: str) -> bool:
        """Return whether a rule allows a value."""
        before = rule.pattern.slow_seconds if rule.pattern else 0
        allowed = rule.allows(value)
        self._seconds += rule.pattern.slow_seconds - before if rule.pattern else 0
        return allowed

    def usable(self, pattern: str) -> ValuePattern:
        """Return a pattern without a complaint; the same text is one pattern, with one limit."""
        if pattern not in self._patterns:
            self._patterns[pattern] = ValuePattern(pattern)
        return self._patterns[pattern]

    def _complaint(self, pattern: str) -> str | None:
        """Compile a pattern, and try it on a few long values."""
        if len(pattern) > MAX_PATTERN_LENGTH:
            return f"has more than {MAX_PATTERN_LENGTH:,} characters: list the values instead"
        if is_quick(pattern):
            try:
                re.compile(pattern)
            except (re.error, OverflowError) as error:
                return _not_a_pattern(str(error))
            return None
        # Long values of one character each, and the same behind the text that the pattern begins with.
        begun = re.match(r"[^\\.^$*+?{}\[\]|()]*", pattern)
        before = ["", begun[0]] if begun and begun[0] else [""]
        characters = dict.fromkeys([*"aA0 ", *pattern])
        values = [
            f"{(text + character * _MOST_CHARACTERS)[: _MOST_CHARACTERS - 1]}\0"
            for text in before
            for character in characters
        ]
        for value in ("", *values):
            limit = MAX_TRY_SECONDS if value else MAX_CHECK_SECONDS
            if self._seconds >= limit:
                # Untried is no risk, as every value has its limit; what may not compile cannot be used.
                return None if value else "was not checked: the patterns before it took too long"
            answer = _MATCHER.match(pattern, value)
            self._seconds += TRY_SECONDS + (answer[1] if answer else PATTERN_SECONDS)
            if answer is None and not value:
                return "takes too much time or memory to compile: shorten it, or list the values"
            if answer is None:
                return "can run forever on long values: repeat no part that holds a repetition, or list the values"
            if isinstance(answer[0], str):
                return _not_a_pattern(answer[0])
        return None


def _not_a_pattern(error: str) -> str:
    """Return what to say of a pattern that `re` does not take."""
    hint = " (any text is .* in a pattern)" if "nothing to repeat" in error else ""
    return f"is not a regular expression: {cut_text(error, 200)}{hint}"


def _rule_mistakes(value: Any) -> Iterator[Mistake]:
    """Yield what a schema cannot say; what the schema has found wrong is passed over."""
    patterns = _PatternCheck()
    yield from _tag_mistakes((), value, patterns)
    asked = {rule["key"] for _, rule in _rules(value)}
    for region, entry in _given(value, "regions", dict).items():
        if region != "*":
            yield from _region_mistakes(("regions", region), region, at_key=True)
        yield from _tag_mistakes(("regions", region), entry, patterns)
        asked |= {rule["key"] for _, rule in _rules(entry)}
    known = tuple(sorted(asked))
    for number, entry in enumerate(_given(value, "exemptions", list)):
        for index, region in _texts(entry, "regions").items():
            yield from _region_mistakes(("exemptions", number, "regions", index), region)
        for index, key in _texts(entry, "required_tags").items():
            if key not in asked:
                message = f"the policy does not ask for {shown_value(key)}"
                yield Mistake(("exemptions", number, "required_tags", index), message, near=(key, known))
        expires = _given(entry, "expires", str)
        if re.match(_DATE["pattern"], expires):
            try:
                date.fromisoformat(expires)
            except ValueError:
                yield Mistake(("exemptions", number, "expires"), f"the calendar has no {expires}")
    if _given(value, "notify", dict):
        yield from _notify_mistakes(value["notify"])


def _notify_mistakes(notify: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield what is wrong with who is told: nobody is, or some by a channel that is not there."""
    if not notify.keys() & {"slack", "sns", "email"}:
        yield Mistake(("notify",), "says not how: give it slack, sns or email")
    email, owners = _given(notify, "email", dict), _given(notify, "owners", dict)
    if email and not owners and "to" not in email:
        yield Mistake(("notify", "email"), "says not to whom: give it to, or notify owners")
    if region := _given(email, "region", str):
        yield from _region_mistakes(("notify", "email", "region"), region)
    mapping = {("mapping", name): to for name, to in _given(owners, "mapping", dict).items()}
    domains = {("domains", index): f"who@{domain}" for index, domain in _texts(owners, "domains").items()}
    for path, to in (mapping | domains | {("default",): owners.get("default")}).items():
        channel = "slack" if re.fullmatch(_MEMBER, str(to)) else "email"
        if re.fullmatch(f"{_AT}|{_MEMBER}", str(to)) and channel not in notify:
            yield Mistake(("notify", "owners", *path), f"cannot be written to without {channel} in notify")


def _region_mistakes(path: KeyPath, region: str, *, at_key: bool = False) -> Iterator[Mistake]:
    """Yield what is wrong with the name of a region."""
    if not is_region(region):
        near = (region, tuple(sorted(AWS_REGIONS)))
        yield Mistake(path, f"AWS has no region {shown_value(region)}", at_key, near)


def _tag_mistakes(path: KeyPath, entry: Any, patterns: _PatternCheck) -> Iterator[Mistake]:
    """Yield what is wrong with the rules of one required_tags list."""
    seen: set[str] = set()
    for index, rule in _rules(entry):
        key, rule_path = rule["key"], (*path, "required_tags", index)
        key_path = rule_path if entry["required_tags"][index] == key else (*rule_path, "key")
        if key in seen:
            yield Mistake(key_path, f"{shown_value(key)} is asked for twice")
        seen.add(key)
        if key.lower().startswith("aws:"):
            message = f"{shown_value(key)}: keys that begin with aws: are AWS's own and cannot be asked for"
            yield Mistake(key_path, message)
        if key != key.strip():
            yield Mistake(key_path, f"{shown_value(key)} begins or ends with a space: take it out")
        values: dict[str, None] = {}
        for number, text in _texts(rule, "values").items():
            if text in values:
                yield Mistake((*rule_path, "values", number), f"{shown_value(text)} stands in the list twice")
            values[text] = None
        pattern, default = _given(rule, "pattern", str), _given(rule, "default", str)
        if complaint := patterns.complaint(pattern):
            yield Mistake((*rule_path, "pattern"), f"{shown_value(pattern)} {complaint}")
            continue
        checked = RequiredTag(key, tuple(values), patterns.usable(pattern) if pattern else None)
        if default and not patterns.allows(checked, default):
            message = (
                f"{shown_value(default)} is not {cut_text(checked.wanted, 500)}, as the rule itself asks"
            )
            yield Mistake((*rule_path, "default"), message, near=(default, checked.values))


def check_patterns(policy: Policy) -> Iterator[str]:
    """Yield a notice for each rule whose pattern took too long on values."""
    for rule in dict.fromkeys(itertools.chain.from_iterable(policy.regions.values())):
        if rule.pattern is None or not (rule.pattern.stopped or rule.pattern.given_up):
            continue
        what = f"took too long on {counted(rule.pattern.stopped, 'tag value')} (counted as not matching)"
        if rule.pattern.given_up:
            what = "takes too long on some tag values, so others were not checked and count as not matching"
        advice = "list the values, or repeat no part that holds a repetition"
        yield printable(f"{policy.file}:{rule.line}: warning: {rule.key}: its pattern {what}: {advice}")


MAX_SILENT = 2  # targets that a dead endpoint may cost their time-outs


# How the values of some keys become fields.
_READ: dict[str, Callable[[Any], Any]] = {
    "expires": date.fromisoformat,
    "tags": lambda tags: tuple(tags.items()),
    "slack": lambda entry: Slack(**_fields(entry)),
    "sns": lambda entry: entry["topic_arn"],
    "email": lambda entry: Email(entry["from"], tuple(entry.get("to", ())), entry.get("region")),
    "owners": lambda entry: Owners(**_fields(entry)),
    "mapping": lambda mapping: {stripped(name).casefold(): recipient for name, recipient in mapping.items()},
    "domains": lambda domains: tuple(domain.casefold() for domain in domains),
}


def _fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record from a mapping of the policy, whose keys are their names."""
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return fields | {key: read(fields[key]) for key, read in _READ.items() if key in fields}


def _policy(document: YamlDocument, file: str, digest: str) -> Policy:
    """Build the Policy of a document in which no mistake was found."""
    value = document.value
    pattern = functools.cache(ValuePattern)  # what a value costs is counted once for all rules of a pattern

    def required_tags(entry: Any, *path: str) -> dict[str, RequiredTag]:
        """Return the rules of the required_tags at a path, by their keys."""
        lines = {index: document.place((*path, "required_tags", index))[0] for index, _ in _rules(entry)}
        rules = {}
        for index, rule in _rules(entry):
            fields = _fields(rule) | ({"pattern": pattern(rule["pattern"])} if "pattern" in rule else {})
            rules[rule["key"]] = RequiredTag(**fields, line=lines[index])
        return rules

    shared = required_tags(value)
    regions = {}
    for region, entry in value["regions"].items():
        inherited = shared if (entry or {}).get("inherit", True) else {}
        regions[region] = tuple((inherited | required_tags(entry, "regions", region)).values())
    exemptions = []
    for index, entry in enumerate(value.get("exemptions", ())):
        line, column = document.place(("exemptions", index))
        exemptions.append(Exemption(**_fields(entry), line=line, column=column))
    return Policy(
        name=value["name"],
        file=file,
        digest=digest,
        regions=regions,
        placeholder_values=frozenset(
            stripped(text).casefold() for text in value.get("placeholder_values", ())
        ),
        states=frozenset(value.get("states", _STATES[:4])),
        grace_period=duration(value.get("grace_period", "0s")),
        exemptions=tuple(exemptions),
        accounts=Accounts(**_fields(value["accounts"])) if "accounts" in value else None,
        expected_account=value.get("expected_account"),
        notify=Notify(**_fields(value["notify"])) if "notify" in value else None,
    )


def duration(text: str) -> timedelta:
    """Return the time that 90s, 30m, 2h or 1d stand for; raises ValueError."""
    if not re.fullmatch(_DURATION["pattern"], text):
        raise ValueError(text)
    return timedelta(seconds=int(text[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[text[-1]])


NOTICE_DAYS = 14


def check_expiry(policy: Policy, today: date) -> list[Problem]:
    """Return a warning for each exemption that has ended, or ends within NOTICE_DAYS."""
    endings = []
    for index, exemption in enumerate(policy.exemptions):
        if exemption.expires is None or (days := (exemption.expires - today).days) > NOTICE_DAYS:
            continue
        message = f"ends on {exemption.expires}, {'in ' + counted(days, 'day') if days else 'today'}"
        if days < 0:
            message = f"ended on {exemption.expires} and no longer holds: renew it, or take it out"
        where = f"exemptions[{index}] ({exemption.reason})"
        endings.append(Problem(policy.file, exemption.line, exemption.column, where, message, "warning"))
    return endings


########################################################################################################
# 3 Evaluation: judge, evaluate, check_tag, near_miss, is_too_young, resolution, decide_exit_code
########################################################################################################


@dataclass(frozen=True, slots=True)
class Exempted:
    """A violation that does not count, and the exemption that says so."""

    violation: Violation
    exemption: Exemption

    def __str__(self) -> str:
        until = f" until {self.exemption.expires}" if self.exemption.expires else ""
        return f"{self.violation.message}: exempted{until}, {self.exemption.reason}"


@dataclass(frozen=True, slots=True)
class Sighting:
    """An instance as a scan saw it, its violations, those that are exempted, and whether it is too young."""

    instance: Instance
    violations: tuple[Violation, ...]
    exempted: tuple[Exempted, ...]
    too_young: bool

    def values(self, rules: Iterable[RequiredTag]) -> tuple[str | None, ...]:
        """Return the value of each required tag, None where it fails its rule, to suggest values from."""
        failing = {violation.tag_key for violation in self.violations}
        failing.update(exempted.violation.tag_key for exempted in self.exempted)
        return tuple(None if rule.key in failing else self.instance.tags[rule.key] for rule in rules)


@dataclass(frozen=True, slots=True)
class ExemptedInstance:
    """An instance all of whose violations are exempted."""

    account_id: str
    region: str
    instance_id: str
    state: str
    launch_time: str
    tags: Mapping[str, str]
    exempted: tuple[Exempted, ...]


def exempted_record(exempted: Exempted) -> dict[str, str | None]:
    """Return an exempted violation as a JSON object."""
    exemption = exempted.exemption
    return violation_record(exempted.violation) | {
        "reason": exemption.reason,
        "expires": str(exemption.expires) if exemption.expires else None,
        "approved_by": exemption.approved_by,
        "ticket": exemption.ticket,
    }


@dataclass(frozen=True, slots=True)
class Scan:
    """One run over the targets; the state keeps it under its UUID."""

    scan_id: str
    policy: Policy
    started_at: datetime
    may_hide_managed: bool = False  # whether the input may lack instances that AWS services operate


def new_state_notice(state: str) -> str:
    """Return the notice about an instance state that this version does not know."""
    return f"The instance state {state[:64]!r} is new to tagcheck, and judged like running"


def judge(target: Target, instance: Instance, policy: Policy, now: datetime) -> Sighting:
    """Return how an instance of a target does under a policy; of several exemptions the first counts."""
    violations = evaluate(instance.tags, policy.rules(target.region), policy.placeholder_values)
    exempted: dict[str, Exempted] = {}
    if violations and policy.exemptions:
        in_force = (exemption for exemption in policy.exemptions if exemption.holds(now.date()))
        covering = [exemption for exemption in in_force if not any(exemption.mismatches(target, instance))]
        for violation, exemption in itertools.product(violations, covering):
            if not exemption.required_tags or violation.tag_key in exemption.required_tags:
                exempted.setdefault(violation.tag_key, Exempted(violation, exemption))
        violations = tuple(violation for violation in violations if violation.tag_key not in exempted)
    too_young = is_too_young(instance, policy.grace_period, now)
    return Sighting(instance, violations, tuple(exempted.values()), too_young)


def evaluate(
    tags: Mapping[str, str], rules: Iterable[RequiredTag], placeholders: frozenset[str]
) -> tuple[Violation, ...]:
    """Return how an instance's tags fail the rules, in the order of the rules; () where they comply."""
    return tuple(filter(None, (check_tag(tags, rule, placeholders) for rule in rules)))


def check_tag(tags: Mapping[str, str], rule: RequiredTag, placeholders: frozenset[str]) -> Violation | None:
    """Return how the tags fail one rule, None where they comply; both are case-sensitive, as in AWS."""
    value = tags.get(rule.key)
    if value is None:
        message, found = f"{rule.key} is missing", near_miss(tags, rule.key)
        if found is not None:
            value, message = tags[found], f"{message}; the instance has {found!r}: rename that key"
        return Violation(rule.key, ViolationType.MISSING, value, found, message)
    text = stripped(value)
    if not text or text.casefold() in placeholders:
        message = f"{rule.key} is {value!r}, a placeholder" if text else f"{rule.key} is empty"
        return Violation(rule.key, ViolationType.EMPTY, value, None, message)
    verdict = rule.judge(value)
    if verdict is Verdict.ALLOWED:
        return None
    message = _value_message(rule, value, verdict)
    return Violation(rule.key, ViolationType.NONCOMPLIANT_VALUE, value, None, message)


@functools.lru_cache(maxsize=4096)
def _value_message(rule: RequiredTag, value: str, verdict: Verdict) -> str:
    """Return what the value should have been and which allowed one is nearest, or why it was not checked."""
    unchecked = {
        Verdict.STOPPED: f"its pattern gave no answer on this value within {PATTERN_SECONDS:g} s",
        Verdict.NOT_CHECKED: "not checked, as its pattern took too long on other values",
    }
    if verdict in unchecked:
        return f"{rule.key} is {value!r}: {unchecked[verdict]}; it counts as not matching"
    return f"{rule.key} is {value!r}, not {rule.wanted}{did_you_mean(value, rule.values)}"


def near_miss(tags: Iterable[str], wanted: str) -> str | None:
    """Return the key that differs from the wanted one only in case, spaces, `_` or `-`."""
    bare = bare_key(wanted)
    return min((key for key in tags if bare_key(key) == bare), default=None)


@functools.lru_cache(maxsize=4096)
def bare_key(key: str) -> str:
    """Return a key without case, spaces, `_` and `-`."""
    return re.sub(r"[\s_-]", "", key).casefold()


# A launch further in the future is a mistake in the answer, and the instance would never be judged.
MAX_CLOCK_DIFFERENCE = timedelta(days=1)


def is_too_young(instance: Instance, grace_period: timedelta, now: datetime) -> bool:
    """Return whether an instance is still within its grace period: tags often come after the launch."""
    return -MAX_CLOCK_DIFFERENCE < now - instance.launch_time < grace_period


def resolution(
    violations: Sequence[Violation], tags: Mapping[str, str] | None, exempted: Container[str] = ()
) -> Resolution:
    """Return why a finding is no longer open; `tags` are None where the instance is gone.

    `exempted` are the keys that do not count. If a tag is still as it was, it is the policy that changed.
    """
    if tags is None:
        return Resolution.GONE
    if any(violation.tag_key in exempted for violation in violations):
        return Resolution.EXEMPTED
    for violation in violations:
        value = tags.get(violation.tag_key, "")
        if is_blank(value) or (violation.type is not ViolationType.MISSING and value == violation.value):
            return Resolution.POLICY_CHANGED
    return Resolution.TAGGED


FailOn = Literal["any", "new", "never"]


def decide_exit_code(coverage: Sequence[Coverage], fail_on: FailOn) -> ExitCode:
    """Return how a recorded scan ends: unread targets outrank findings."""
    if not all(target.read for target in coverage):
        return ExitCode.INCOMPLETE
    counts = {"any": ("findings",), "new": ("new", "reopened"), "never": ()}[fail_on]
    fails = any(getattr(target, count) for target in coverage for count in counts)
    return ExitCode.VIOLATIONS if fails else ExitCode.COMPLIANT


########################################################################################################
# 4 Suggestions: groups_of, cause_of, agreements, suggest, cause_lines
########################################################################################################


class GroupKind(NamedTuple):
    """A way in which instances belong together; `remedy` says how to have the group tag them, if it can.

    `risk` is what happens to a tag that is set on an instance only.
    """

    word: str
    remedy: str = ""
    risk: str = "the tag is lost when an instance is replaced"


# The most specific first. A cause is a group that can tag its instances; how is in AWS's user guides (EC2
# Auto Scaling, Tag groups and instances; CloudFormation, Resource tags; EKS, Managed node groups with launch
# templates, and Create a Node Class; ECS, Tags for managed instances; EC2, Tag on creation) and Karpenter's
# (NodeClasses, spec.tags). Karpenter and ECS make launch templates of their own, so they come before these.
GROUP_KINDS = {
    "node_group": GroupKind("EKS node group", "set it in the launch template of {names}"),
    "node_class": GroupKind("EKS Auto Mode node class", "set it in spec.tags of the NodeClass {names}"),
    "ec2_node_class": GroupKind("Karpenter node class", "set it in spec.tags of the EC2NodeClass {names}"),
    "node_pool": GroupKind("Karpenter node pool", "set it in spec.tags of the EC2NodeClass of {names}"),
    "capacity_provider": GroupKind(
        "ECS capacity provider", "set it on {names} with propagateTags: CAPACITY_PROVIDER"
    ),
    "autoscaling_group": GroupKind("Auto Scaling group", "set it on {names} with propagation"),
    "launch_template": GroupKind(
        "launch template", "set it in the instance tags of {names}", "instances launched later lack the tag"
    ),
    "stack": GroupKind(
        "CloudFormation stack", "set it on the stack {names}", "the next stack update may revert the tag"
    ),
    "operator": GroupKind("AWS service", "set it where {names} takes its tags from"),
    "instance_profile": GroupKind("instance profile"),
    "name_prefix": GroupKind("name"),
    "subnet": GroupKind("subnet"),
    "vpc": GroupKind("VPC"),
}
# The tag that names a group, and those that may name its cluster.
_GROUP_TAGS = (
    ("node_group", "eks:nodegroup-name", ("eks:cluster-name", "aws:eks:cluster-name")),
    ("node_class", "eks:kubernetes-node-class-name", ("eks:eks-cluster-name",)),
    ("ec2_node_class", "karpenter.k8s.aws/ec2nodeclass", ("eks:eks-cluster-name",)),
    ("node_pool", "karpenter.sh/nodepool", ("eks:eks-cluster-name",)),
    ("capacity_provider", "aws:ecs:capacityProviderName", ("aws:ecs:clusterName",)),
    ("autoscaling_group", "aws:autoscaling:groupName", ()),
    ("launch_template", "aws:ec2launchtemplate:id", ()),
    ("stack", "aws:cloudformation:stack-name", ()),
)


def groups_of(instance: Instance) -> list[Group]:
    """Return the groups of an instance within its target, the most specific first, with printable names."""
    others = (
        ("operator", instance.managed_by),
        ("instance_profile", instance.profile.rpartition("/")[2]),  # of its ARN
        ("name_prefix", instance.tags.get("Name", "").rstrip("0123456789").rstrip("-_. ")),
        ("subnet", instance.subnet_id),
        ("vpc", instance.vpc_id),
    )
    return tag_groups(instance.tags) + [Group(kind, printable(name)) for kind, name in others if name]


def tag_groups(tags: Mapping[str, str]) -> list[Group]:
    """Return the groups that an instance's tags name, the most specific first."""
    groups: list[Group] = []
    for kind, key, cluster_keys in _GROUP_TAGS:
        if name := tags.get(key):
            cluster = next(filter(None, map(tags.get, cluster_keys)), None)
            groups.append(Group(kind, printable(f"{cluster}/{name}" if cluster else name)))
    return groups


def cause_of(groups: Iterable[Group]) -> Group | None:
    """Return the first group that can tag all its instances, if there is one."""
    return next((group for group in groups if GROUP_KINDS[group.kind].remedy), None)


class Agreement(NamedTuple):
    """The most common valid value of a tag in a group, and how many members have it, or any valid one.

    If hardly any member has a valid one, `agreeing` is 0, and `members` counts all.
    """

    value: str
    agreeing: int
    members: int


MIN_MEMBERS = 3  # that have a tag; fewer say nothing about the group
MAX_VALUES = 1000  # of a tag in one group, to bound memory; with more there is no agreement


def agreements(
    values: Iterable[tuple[Sequence[str | None], int]], keys: Sequence[str]
) -> dict[str, Agreement]:
    """Return the agreement on each tag key of a group: rows of values, and how many members have each."""
    counts: list[Counter[str]] = [Counter() for _ in keys]
    size = 0
    for row, number in values:
        size += number
        for count, value in zip(counts, row, strict=True):
            if value is not None and len(count) < MAX_VALUES:
                count[value] += number
    found = {}
    for key, count in zip(keys, counts, strict=True):
        members = count.total()
        if members < MIN_MEMBERS <= size:
            found[key] = Agreement("", 0, size)
        elif members >= MIN_MEMBERS and len(count) < MAX_VALUES:
            # On a tie the first by name, so that the order of the answers does not matter.
            value, agreeing = min(count.items(), key=lambda item: (-item[1], item[0]))
            found[key] = Agreement(value, agreeing, members)
    return found


class Reliability:
    """How far the members of a kind of group agree on a tag, over all groups of that kind in a scan."""

    def __init__(self) -> None:
        self._agreeing: Counter[tuple[str, str]] = Counter()
        self._members: Counter[tuple[str, str]] = Counter()

    def learn(self, kind: str, found: Mapping[str, Agreement]) -> None:
        """Count one group."""
        for tag_key, agreement in found.items():
            if agreement.agreeing:
                self._agreeing[kind, tag_key] += agreement.agreeing
                self._members[kind, tag_key] += agreement.members

    def confidence(self, kind: str, tag_key: str, agreement: Agreement) -> float:
        """Return the probability that one more member has the value that most have.

        It is the share of members that agree, drawn towards the share in all groups of the kind as if that
        was of PRIOR_MEMBERS more members (a beta prior); that usual share is itself drawn towards a half.
        """
        usual = (self._agreeing[kind, tag_key] + 1) / (self._members[kind, tag_key] + 2)
        return (agreement.agreeing + PRIOR_MEMBERS * usual) / (agreement.members + PRIOR_MEMBERS)


PRIOR_MEMBERS = 5
MIN_CONFIDENCE = 0.95  # what `remediate` takes by default
MIN_SHOWN, MOST_CONFIDENCE = 0.5, 0.9999  # nothing is certain
# At most, where a whole Auto Scaling group lacks the tag: wider groups say less about it, and a mistake would
# be made on all its instances. Measured: without it 92 in 100 suggestions at 0.95 were right, with it 97.
UNTAGGED_CONFIDENCE = 0.9
# The instance has the value itself, under another key or in another spelling.
OWN_CONFIDENCE, TYPO_CONFIDENCE = 0.99, 0.9


def suggest(
    violation: Violation,
    rule: RequiredTag,
    placeholders: frozenset[str],
    siblings: Iterable[tuple[Group, Mapping[str, Agreement]]],
    reliability: Reliability,
) -> Suggestion | None:
    """Return the likely value of a tag: from the instance's own tags, or else from those of its siblings.

    If confident siblings agree with the instance, the confidence is higher; if they contradict it, it is low.
    """
    own = _own_value(violation, rule, placeholders)
    best = _sibling_value(rule.key, siblings, reliability)
    if own is None:
        return best if best and best.confidence >= MIN_SHOWN else None
    if best is None or best.confidence < MIN_CONFIDENCE:
        return own
    if best.value != own.value:
        evidence = f"{own.evidence}; but {best.value} is {best.evidence}"
        return replace(own, confidence=MIN_SHOWN, evidence=evidence)
    confidence = min(round(1 - (1 - own.confidence) * (1 - best.confidence), 4), MOST_CONFIDENCE)
    return replace(own, confidence=confidence, evidence=f"{own.evidence}; {best.evidence}")


def _sibling_value(
    tag_key: str, siblings: Iterable[tuple[Group, Mapping[str, Agreement]]], reliability: Reliability
) -> Suggestion | None:
    """Return the value of the most specific group that is confident enough, else of the most confident."""
    suggestions: list[Suggestion] = []
    ceiling = MOST_CONFIDENCE
    for group, found in siblings:
        agreement, kind = found.get(tag_key), GROUP_KINDS[group.kind]
        if agreement and agreement.agreeing:
            confidence = min(reliability.confidence(group.kind, tag_key, agreement), ceiling)
            where = group.name if kind.remedy else f"{kind.word} {group.name}"
            evidence = f"{agreement.agreeing:,} of {agreement.members:,} in {where}"
            suggestions.append(Suggestion(tag_key, agreement.value, round(confidence, 4), evidence))
            if confidence >= MIN_CONFIDENCE:
                return suggestions[-1]
        elif agreement and kind.remedy:
            ceiling = UNTAGGED_CONFIDENCE
    return max(suggestions, key=lambda suggestion: suggestion.confidence, default=None)


def _own_value(violation: Violation, rule: RequiredTag, placeholders: frozenset[str]) -> Suggestion | None:
    """Return the value that the instance has under a near-miss key or in another spelling."""
    value = stripped(violation.value or "")
    text = value.casefold()
    if not value or text in placeholders:
        return None
    written = f"{violation.found_key or violation.tag_key}={cut_text(value, 40)}"
    alike = [allowed for allowed in rule.values if bare_key(allowed) == bare_key(value)]
    for spelling in (value, value.upper(), value.lower(), *alike):
        if rule.allows(spelling):
            return Suggestion(rule.key, spelling, OWN_CONFIDENCE, f"it has {written}")
    folded = {allowed.casefold(): allowed for allowed in rule.values if rule.allows(allowed)}
    long = (near for near in folded if min(len(near), len(text)) > 2)
    parts = [near for near in long if near.startswith(text) or text.startswith(near)]
    for near in parts or difflib.get_close_matches(text, folded, n=1):
        return Suggestion(rule.key, folded[near], TYPO_CONFIDENCE, f"near to {written}")
    return None


@dataclass(frozen=True, slots=True)
class Cause:
    """A group whose instances lack the same tag, so that it is one thing to fix."""

    target: Target
    group: Group
    tag_key: str
    instances: int

    def __str__(self) -> str:
        return next(cause_lines([self]))


CAUSES_NAMED = 3


def cause_lines(causes: Iterable[Cause]) -> Iterator[str]:
    """Yield a sentence for each kind of group and tag: what is missing, and where to set it for all."""
    alike: dict[tuple[str, str], list[Cause]] = {}
    for cause in causes:
        alike.setdefault((cause.group.kind, cause.tag_key), []).append(cause)
    for (kind, tag_key), group in alike.items():
        more = f" and {len(group) - CAUSES_NAMED:,} more" if len(group) > CAUSES_NAMED else ""
        names = ", ".join(cause.group.name for cause in group[:CAUSES_NAMED]) + more
        instances = sum(cause.instances for cause in group)
        lack = "instance lacks" if instances == 1 else "instances lack"
        remedy = GROUP_KINDS[kind].remedy.format(names=names)
        yield f"{counted(len(group), GROUP_KINDS[kind].word)}: {instances:,} {lack} {tag_key}; {remedy}"


########################################################################################################
# 5 AWS: Aws, describe_accounts, describe_instances, describe_creators, write_tags, load_instances, load_prices
########################################################################################################

PAGE_SIZE = 1000  # EC2's largest page; a page size also draws from the larger request bucket
MAX_PAGES = 10_000
MAX_EMPTY_PAGES = 100  # EC2 may send pages without instances, but not for ever
CONNECT_TIMEOUT = 5
READ_TIMEOUT = 60  # EC2 itself takes up to 3 seconds for a page of 1,000
SDK_ATTEMPTS = 5
# botocore 1.44 rides out a broken network for a few seconds only, and never repeats a cut answer.
NETWORK_PAUSES = (3.0,)
# What a role is assumed for, as its session policy and as `iam-policy` prints it.
READ_ACTIONS = ("ec2:DescribeInstances", "ec2:DescribeRegions")
WRITE_ACTIONS = ("ec2:DescribeInstances", "ec2:CreateTags", "ec2:DeleteTags")
CREATOR_ACTIONS = ("cloudtrail:LookupEvents",)

# Of one call with all that the SDK tries: five time-outs of a minute, and the pauses between them.
CALL_SECONDS = 400.0

NO_CONNECTION = frozenset(
    (
        *("EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError", "ProxyConnectionError"),
        *("ReadTimeoutError", "CallTimeout"),
    )
)

# The account that requests are signed for, and its credentials; None is for the caller's own.
_ENTERED: contextvars.ContextVar[tuple[str, Any]] = contextvars.ContextVar("entered", default=("", None))

Returned = TypeVar("Returned")


def within(seconds: float, function: Callable[[], Returned]) -> Returned:
    """Return what a function returns, and raise what it raises; raises TimeoutError when it takes longer.

    A time-out of sockets begins again with each byte, and so does not end an answer that trickles. The function
    runs in a daemon thread, which is left behind then: Python cannot stop it, and it must not keep a run alive.
    """
    future: Future[Returned] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        message = "cannot start a thread: use fewer --workers, or allow more processes (ulimit -u)"
        raise TagcheckError(message) from error
    return future.result(seconds)


def public_text(error: Exception) -> str:
    """Return an exception's text without the user and password of a URL, and without what a program printed."""
    import botocore.exceptions

    if isinstance(error, botocore.exceptions.CredentialRetrievalError):
        return f"{error.kwargs.get('provider')} did not give any: run it by hand to see why"
    return re.sub(r"//[^/\s]*@", "//", str(error))


def policy_document(statements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return an IAM policy document."""
    return {"Version": "2012-10-17", "Statement": list(statements)}


def allow_statement(actions: Sequence[str], resource: str | list[str], **more: Any) -> dict[str, Any]:
    """Return a statement that allows actions."""
    return {"Effect": "Allow", "Action": list(actions), "Resource": resource, **more}


class Aws:
    """AWS as one scan calls it: one client a service and region, shared by all accounts and threads.

    A client costs 10 ms, a session 20 MB: 500 accounts with their own would be minutes and gigabytes. So the
    clients are the caller's, and a request is signed for the account that its thread has entered.
    """

    def __init__(
        self, profile: str | None, workers: int, actions: Sequence[str] = READ_ACTIONS, interval: float = 0
    ) -> None:
        check_packages("boto3", "botocore")
        import boto3
        import botocore.config
        import botocore.exceptions

        try:
            self.session = boto3.Session(profile_name=profile)
        except botocore.exceptions.BotoCoreError as error:
            raise CredentialsError(f"{error}; see `aws configure list-profiles`") from error
        # All said outright: botocore's own defaults differ by version.
        self._config = botocore.config.Config(
            retries={"mode": "standard", "total_max_attempts": SDK_ATTEMPTS},
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            max_pool_connections=workers,
            user_agent_extra=f"tagcheck/{__version__}",
        )
        self._actions = actions
        self._interval = interval  # between two calls of an account and region
        self._called_at: dict[tuple[str, str], float] = {}
        self._clients: dict[tuple[str, str], Any] = {}
        self._making = threading.Lock()  # clients may be shared by threads, sessions may not
        self._credentials: dict[str, Any] = {}  # of each account; None where they are the caller's own

    def client(self, service: str, region: str) -> Any:
        """Return the client of a service in a region; raises CredentialsError where none can be made."""
        import botocore.exceptions

        with self._making:
            if (service, region) not in self._clients:
                try:
                    client = self.session.client(service, region_name=region, config=self._config)
                except (botocore.exceptions.BotoCoreError, ValueError) as error:
                    raise CredentialsError(
                        f"cannot call AWS: {public_text(error)}; check the AWS configuration"
                    ) from error
                if service in ("ec2", "cloudtrail"):
                    client.meta.events.register(f"before-sign.{service}", self._sign)
                if service == "ec2":
                    _read_answers_of(client)
                self._clients[service, region] = client
            return self._clients[service, region]

    def _sign(self, request: Any, region_name: str = "", **_: object) -> None:
        """Have botocore sign a request for the account that was entered, when its time has come.

        A request that botocore repeats is signed again, so that repetitions are paced as well.
        """
        account_id, credentials = _ENTERED.get()
        if self._interval:
            place = account_id, region_name
            due = self._called_at.get(place, -math.inf) + self._interval
            time.sleep(max(0.0, due - time.monotonic()))
            self._called_at[place] = time.monotonic()
        if credentials:
            request.context.setdefault("signing", {})["request_credentials"] = credentials

    @contextlib.contextmanager
    def account(self, account_id: str) -> Iterator[None]:
        """Sign this thread's requests to EC2 and CloudTrail for an account that was entered before."""
        _ENTERED.set((account_id, self._credentials[account_id]))
        try:
            yield
        finally:
            _ENTERED.set(("", None))

    def enter_own(self, account_id: str) -> None:
        """Let the caller's own account be read with the caller's own credentials."""
        self._credentials[account_id] = None

    def assume_role(self, account_id: str, accounts: Accounts, home: str, partition: str) -> None:
        """Get credentials of an account, which renew themselves in time; raises TargetError."""
        import botocore.credentials

        sts = self.client("sts", home)
        # An hour: shorter ones are within botocore's window for renewal from the beginning, and are renewed with
        # each call; longer ones are refused where the caller has a role itself.
        arguments = {
            "RoleArn": f"arn:{partition}:iam::{account_id}:role/{accounts.role_name}",
            "RoleSessionName": "tagcheck",
            "DurationSeconds": 3600,
            "Policy": to_json(policy_document([allow_statement(self._actions, "*")])),
        }
        if accounts.external_id:
            arguments["ExternalId"] = accounts.external_id

        def renew() -> dict[str, str]:
            answer = call_aws(sts, "AssumeRole", **arguments)
            credentials = answer.get("Credentials", {})
            names = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")
            for name in names:
                if not credentials.get(name):
                    raise target_error("ForeignAnswer", f"no {name}", "sts:AssumeRole")
            access_key, secret_key, token, expires = (credentials[name] for name in names)
            if not expires.tzinfo or not 1970 < expires.year < 9999:
                raise target_error("ForeignAnswer", f"credentials until {expires}", "sts:AssumeRole")
            arn = answer.get("AssumedRoleUser", {"Arn": arguments["RoleArn"]}).get("Arn", "")
            if arn.split(":")[4:5] != [account_id]:
                message = f"credentials of {arn or 'nobody'}, not of the account {account_id}"
                raise target_error("ForeignAnswer", message, "sts:AssumeRole")
            keys = {"access_key": access_key, "secret_key": secret_key, "token": token}
            return keys | {"expiry_time": expires.isoformat()}

        refreshable = botocore.credentials.RefreshableCredentials
        self._credentials[account_id] = refreshable.create_from_metadata(renew(), renew, "assume-role")


def call_aws(client: Any, operation: str, deadline: float = math.inf, /, **arguments: Any) -> Any:
    """Call an AWS operation by its name in the API (`DescribeInstances`); raises TargetError, CredentialsError.

    The SDK retries what AWS asks to be retried; a broken network and a cut answer are tried again here. It ends
    at a deadline of the monotonic clock with CallTimeout.
    """
    import botocore

    method = getattr(client, botocore.xform_name(operation))
    name = f"{client.meta.service_model.service_name}:{operation}"
    for pause in (*NETWORK_PAUSES, None):
        try:
            return within(min(CALL_SECONDS, deadline - time.monotonic()), lambda: method(**arguments))
        except TagcheckError:
            raise
        except Exception as error:
            failure = failure_of(error)
            if not failure.passes or pause is None or time.monotonic() + pause > deadline:
                raise target_error(failure.code, failure.message, name) from error
            LOG.debug("%s: %s; trying again in %.0f s", name, failure.code, pause)
            time.sleep(pause)


class Failure(NamedTuple):
    """Why a call failed: AWS's code or ours, what was said of it, and whether it may pass by itself."""

    code: str
    message: str
    passes: bool = False


def failure_of(error: Exception) -> Failure:
    """Return why a call of AWS failed; raises CredentialsError, and the error itself if it is of nothing known.

    The codes are the same with all versions of botocore and urllib3.
    """
    import botocore.exceptions as exceptions
    import botocore.parsers

    code = type(error).__name__
    match error:
        case exceptions.ClientError():
            answer = error.response.get("Error", {})
            code, message = answer.get("Code"), answer.get("Message")
            known = isinstance(code, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,100}", code)
            return Failure(code if known else "ForeignAnswer", message if isinstance(message, str) else "")
        case (
            exceptions.IncompleteReadError()
            | exceptions.ResponseStreamingError()
            | exceptions.FlexibleChecksumError()
            | botocore.parsers.ResponseParserError()  # whose text repeats the answer, perhaps with credentials
        ):
            return Failure("IncompleteAnswer", "", passes=True)
        case exceptions.ConnectionError() | exceptions.HTTPClientError():
            if code in NO_CONNECTION or code == "SSLError":
                return Failure(code, public_text(error), passes=True)
            # Its text may repeat a header, and with it the session token: only its kind may be printed.
            cause = type(error.kwargs.get("error"))
            if cause in (ValueError, UnicodeEncodeError):  # of http.client, before anything is sent
                return Failure("InvalidHeader", "")
            return Failure("HTTPClientError", f"{code}, {cause.__name__}", passes=True)
        case exceptions.NoCredentialsError():
            raise CredentialsError(
                "no AWS credentials were found: set AWS_PROFILE or --profile, run `aws sso login`, or give "
                "the machine a role"
            ) from error
        case exceptions.BotoCoreError():
            raise CredentialsError(f"the AWS credentials cannot be used: {public_text(error)}") from error
        case TimeoutError():
            return Failure("CallTimeout", "the answer did not come to its end")
        # From here on these are Python's own, which botocore's parsers raise for answers of another form.
        case ValueError() | RecursionError():
            return Failure("IncompleteAnswer", f"{code}: {error}", passes=True)
        case KeyError():
            return Failure("ForeignAnswer", f"no {error}")
        case LookupError() | TypeError() | AttributeError() | ArithmeticError():
            return Failure("ForeignAnswer", f"{code}: {error}")
        case RuntimeError():  # of credentials that were renewed, and have expired already
            return Failure("ExpiredToken", str(error))
    raise error


def next_token(page: Mapping[str, Any], operation: str) -> str:
    """Return the token of the next page, "" after the last; raises TargetError."""
    token = page.get("NextToken", "")
    if not isinstance(token, str):
        raise target_error("ForeignAnswer", f"a NextToken that is {type(token).__name__}", operation)
    return token


def target_error(code: str, aws_message: str, operation: str) -> TargetError:
    """Return a TargetError with AWS's code, a sentence that helps, and what AWS itself said."""
    advice = ADVICE.get(code, "")
    if operation == "sts:AssumeRole" and code == "AccessDenied":
        advice = "the role is not there, or does not trust these credentials (tagcheck.py iam-policy)"
    if "service control policy" in aws_message:
        advice = "a service control policy of the organization denies {operation} here"
    # EC2 adds kilobytes of an encoded message, which only an administrator can decode.
    said = printable(aws_message.partition(" Encoded authorization failure message")[0][:300])
    sentences = [advice.format(operation=operation), f"{operation}: {said}" if said else ""]
    return TargetError(code, " — ".join(filter(None, sentences)) or f"{operation} failed")


def home_region(regions: Iterable[str]) -> str:
    """Return the region to ask what is not of a region: one that no account of the partition can be without.

    STS of a region that is not enabled refuses every caller (IAM user guide, STS in AWS regions).
    """
    first = next(iter(regions), "")
    homes = {"cn-": "cn-north-1", "us-gov-": "us-gov-west-1", "eusc-": "eusc-de-east-1"}
    isolated = first if first.startswith(("us-iso", "eu-iso")) else "us-east-1"
    return next((home for prefix, home in homes.items() if first.startswith(prefix)), isolated)


def describe_caller(sts: Any) -> tuple[str, str, str]:
    """Return account, partition and ARN of the credentials; raises CredentialsError where AWS knows no caller."""
    try:
        answer = call_aws(sts, "GetCallerIdentity")
    except TargetError as error:
        raise CredentialsError(f"cannot tell whose credentials these are: {error}") from error
    account_id, arn = str(answer.get("Account")), str(answer.get("Arn"))
    partition = re.match("arn:(aws[a-z-]*):", arn)
    if not partition or not re.fullmatch("[0-9]{12}", account_id):
        raise CredentialsError("the answer is not AWS's: check the network and the proxy")
    return account_id, partition[1], arn


# The states in which an account has no instances to scan (Organizations API reference, Account).
INACTIVE = frozenset(("PENDING_ACTIVATION", "SUSPENDED", "PENDING_CLOSURE", "CLOSED"))


def describe_accounts(organizations: Any) -> dict[str, str]:
    """Return the state of each account of the organization (`ACTIVE`, `SUSPENDED`); raises CredentialsError.

    A page may be empty and yet not the last (Organizations API reference, ListAccounts). `Status` was
    retired for `State` in September 2026.
    """
    states: dict[str, str] = {}
    token = ""
    try:
        for _ in range(MAX_PAGES):
            page = call_aws(organizations, "ListAccounts", **({"NextToken": token} if token else {}))
            for account in page["Accounts"]:
                id_, state = _account_id(account["Id"]), account.get("State") or account["Status"]
                if not isinstance(state, str) or states.setdefault(id_, state) != state:
                    raise ValueError(
                        f"{id_} has the state {shown_value(state)}, and {shown_value(states.get(id_))}"
                    )
            token = next_token(page, "organizations:ListAccounts")
            if not token and not states:
                raise KeyError("account")
            if not token:
                return states
    except TargetError as error:
        raise CredentialsError(
            f"the accounts of the organization cannot be listed: {error} (it takes the management account, or one "
            "that it delegates to)"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise CredentialsError(
            f"the list of accounts {what}: the answer is not that of Organizations, or its format has changed"
        ) from error
    raise CredentialsError("the list of accounts does not end: run again, and tell AWS")


def describe_regions(client: Any) -> list[str]:
    """Return the regions that are enabled in the account; raises TargetError."""
    try:
        regions = call_aws(client, "DescribeRegions", AllRegions=True)["Regions"]
        enabled = [region["RegionName"] for region in regions if region["OptInStatus"] != "not-opted-in"]
    except KeyError as error:
        raise target_error("ForeignAnswer", f"no {error}", "ec2:DescribeRegions") from error
    if not enabled:
        raise target_error("ForeignAnswer", "no region at all", "ec2:DescribeRegions")
    for name in enabled:
        if not re.fullmatch(REGION_NAME, name):  # it becomes part of a host's name
            raise target_error("ForeignAnswer", f"a region {name!r}", "ec2:DescribeRegions")
    return sorted(enabled)


def describe_instances(client: Any, **scope: Any) -> Iterator[list[Instance]]:
    """Yield every instance of the client's account and region by pages, or those in scope; raises TargetError.

    An account can hide the instances that AWS services operate from answers that do not ask for them, though it
    pays for them (EC2 API reference, DescribeInstances and ModifyManagedResourceVisibility).
    """
    scope["IncludeManagedResources"] = True
    if "InstanceIds" not in scope:
        scope["MaxResults"] = PAGE_SIZE
    asked = frozenset(scope.get("InstanceIds", ()))
    token, tokens, empty_pages = "", set(), 0
    for _ in range(MAX_PAGES):
        page = call_aws(client, "DescribeInstances", **scope, **({"NextToken": token} if token else {}))
        if PARSED not in page:
            # A captive portal's "200 OK" would otherwise be a region without instances.
            raise TargetError("ForeignAnswer", "the answer is not EC2's: check the network and the proxy")
        for instance in page[PARSED] if asked else ():
            if instance.instance_id not in asked:
                message = f"{instance.instance_id}, which was not asked for"
                raise target_error("ForeignAnswer", message, "ec2:DescribeInstances")
        yield page[PARSED]
        token = page.get("NextToken", "")
        empty_pages = 0 if page[PARSED] else empty_pages + 1
        if not token:
            return
        if token in tokens or empty_pages > MAX_EMPTY_PAGES:
            break
        tokens.add(token)
    raise TargetError("EndlessPages", "EC2 went on announcing a next page: run again, and tell AWS")


def _read_answers_of(client: Any) -> None:
    """Have a client of EC2 read instances by parse_instances, and whether tags were written."""
    # botocore's name for handing over a body unread; 5.5 MB a page and thread are saved, twice.
    client.meta.service_model.operation_model("DescribeInstances").has_streaming_output = True
    client.meta.events.register("before-parse.ec2.DescribeInstances", _parse_instances)
    for operation in ("CreateTags", "DeleteTags"):
        client.meta.events.register(f"before-parse.ec2.{operation}", _parse_written)


PARSED = "tagcheck.instances"
WRITTEN = "tagcheck.written"
_ROOT = "/DescribeInstancesResponse"
_TOKEN = f"{_ROOT}/nextToken"
_RESERVATIONS = f"{_ROOT}/reservationSet"
_RESERVATION = f"{_RESERVATIONS}/item"
_OWNER = f"{_RESERVATION}/ownerId"
_SET = f"{_RESERVATION}/instancesSet"
_ITEM = f"{_SET}/item"
_TAGS = f"{_ITEM}/tagSet"
_TAG = f"{_TAGS}/item"
_LEAVES = frozenset(
    (
        *(_TOKEN, _OWNER, f"{_TAG}/key", f"{_TAG}/value", f"{_ITEM}/instanceId"),
        *(f"{_ITEM}/instanceState/name", f"{_ITEM}/launchTime", f"{_ITEM}/instanceType"),
        *(f"{_ITEM}/iamInstanceProfile/arn", f"{_ITEM}/subnetId", f"{_ITEM}/vpcId"),
        *(f"{_ITEM}/operator/managed", f"{_ITEM}/operator/principal"),
    )
)
# AWS adds members to reservations and instances, but not to these, which hold nothing but what is named here.
_CLOSED = frozenset((_ROOT, _RESERVATIONS, _SET, _TAGS, _TAG))
_PLACES = _LEAVES | _CLOSED | {f"{_ROOT}/requestId"} | {leaf.rpartition("/")[0] for leaf in _LEAVES}
# No other member of EC2's answer has such a name: elsewhere it is a list that would not be read.
_ONLY_IN_PLACE = frozenset(("nextToken", "reservationSet", "instancesSet", "tagSet", "key"))
MAX_DEPTH = 100  # of elements that are not read; EC2's have up to 6


def _parse_instances(
    response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object
) -> None:
    """Read the instances of an answer of DescribeInstances in place of botocore.

    botocore spends a millisecond on each instance, nearly all of it on members that nobody reads. This is
    its public event `before-parse`; answers that are errors are left to it as they are.
    """
    import botocore.parsers

    if response_dict["status_code"] >= 300:
        return
    body = response_dict["body"]
    try:
        account_id, _ = _ENTERED.get()
        instances, token = parse_instances(iter(lambda: body.read(CHUNK_SIZE), b""), account_id)
    except expat.ExpatError as error:
        raise botocore.parsers.ResponseParserError(f"not XML: {error}") from error
    response_dict["body"] = b"<DescribeInstancesResponse/>"
    if instances is not None:
        customized_response_dict.update({PARSED: instances, "NextToken": token})


def _parse_written(
    operation_model: Any, response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object
) -> None:
    """Add to an answer of CreateTags or DeleteTags that EC2 says it is done, which botocore does not read."""
    if response_dict["status_code"] >= 300:
        return
    try:
        root = ElementTree.fromstring(response_dict["body"])
    except ElementTree.ParseError:
        return  # botocore reads it next, and raises its own error
    members = [(element.tag.rpartition("}")[2], element.text) for element in root]
    is_answer = root.tag.rpartition("}")[2] == f"{operation_model.name}Response"
    returned = [text for name, text in members if name == "return"]
    if is_answer and "requestId" in dict(members) and returned in ([], ["true"]):
        customized_response_dict[WRITTEN] = True


def parse_instances(body: Iterable[bytes], account_id: str = "") -> tuple[list[Instance] | None, str]:
    """Return the instances of an answer of DescribeInstances (None where it has no list of them) and its token.

    Takes the answer in pieces, and keeps only what is read: a page of 1,000 as a whole would be 8 MB, and a
    tree of it 60 MB, in each thread. Raises ExpatError, and TargetError where it cannot be EC2's whole answer,
    or has instances of another account than the one that is given.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    instances: list[Instance] | None = None
    path, token, owner, has_set = "", None, None, False
    unread = 0  # how deep the parser is in an element that is not read
    texts: list[str] = []
    found: dict[str, str] = {}
    tags: dict[str, str] = {}
    known: dict[str, Instance] = {}

    def refuse(what: str) -> NoReturn:
        raise target_error("ForeignAnswer", what, "ec2:DescribeInstances")

    def no_text(text: str) -> None:
        if not text.isspace():
            refuse(f"the text {text[:50]!r} in {path}")

    def start(name: str, attributes: Mapping[str, str]) -> None:
        nonlocal path, instances, has_set, unread
        if unread:
            unread += 1
            if name in _ONLY_IN_PLACE or unread > MAX_DEPTH:
                refuse(f"<{name}> out of place" if unread <= MAX_DEPTH else "elements nested too deeply")
            return
        place = f"{path}/{name}"
        if place not in _PLACES:
            if path in _CLOSED or name in _ONLY_IN_PLACE:
                refuse(f"an unknown <{name}> in {path or 'the answer'}")
            unread = 1
            return
        if attributes and (place != _ROOT or attributes.keys() != {"xmlns"}):
            refuse(f"an attribute in <{name}>")
        path = place
        if path in _LEAVES:
            texts.clear()
            parser.CharacterDataHandler = texts.append
            parser.StartElementHandler = start_within_text
            return
        parser.CharacterDataHandler = no_text if path in _CLOSED else None
        if path == _RESERVATIONS:
            if instances is not None:
                refuse("a second reservationSet")
            instances = []
        elif path == _SET:
            if has_set:
                refuse("a second instancesSet in a reservation")
            has_set = True
        elif path == _TAGS:
            if name in found:
                refuse("a second tagSet in an instance")
            found[name] = ""

    def start_within_text(name: str, _: object) -> None:
        refuse(f"<{name}> within the text of {path}")

    def end(name: str) -> None:
        nonlocal path, token, owner, has_set, found, tags, unread
        if unread:
            unread -= 1
            return
        if path in _LEAVES:
            parser.StartElementHandler = start
            text = "".join(texts)
            if path == _TOKEN:
                if token is not None:
                    refuse("a second nextToken")
                token = text
            elif path == _OWNER:
                if owner is not None:
                    refuse("a second ownerId in a reservation")
                owner = text
            elif name in found:
                refuse(f"a second {name} in an instance or a tag")
            else:
                found[name] = text
        elif path == _TAG:
            key, value = found.pop("key", ""), found.pop("value", None)
            if not key or key in tags:
                refuse(f"the tag key {key!r} twice in an instance" if key else "a tag without a key")
            if value is None:
                refuse(f"the tag {key!r} without a value")
            tags[sys.intern(key)] = value
        elif path == _ITEM:
            end_instance()
            found, tags = {}, {}
        elif path == _RESERVATION:
            if not has_set:
                refuse("a reservation without instancesSet")
            if owner is not None and account_id and owner != account_id:
                refuse(f"instances of the account {owner!r}")
            owner, has_set = None, False
        path = path[: -len(name) - 1]
        parser.CharacterDataHandler = no_text if path in _CLOSED else None

    def end_instance() -> None:
        assert instances is not None
        try:
            managed = found.get("managed", "false")
            if managed not in ("true", "false"):
                raise ValueError(f"its managed is {managed!r}, not true or false")
            instance = _instance(
                *(found.get("instanceId"), found.get("name"), found.get("launchTime"), tags),
                *(sys.intern(found.get(key, "")) for key in ("instanceType", "arn", "subnetId", "vpcId")),
                _operator(managed == "true", found.get("principal")),
            )
        except (TypeError, ValueError) as error:
            refuse(f"an instance in the answer is not whole: {error}")
        if known.setdefault(instance.instance_id, instance) is instance:
            instances.append(instance)
        elif known[instance.instance_id] != instance:
            refuse(f"the instance {instance.instance_id} twice, and not the same")

    parser.StartDoctypeDeclHandler = lambda *_: refuse("a DOCTYPE, as HTML has")
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    for piece in body:
        parser.Parse(piece, False)
    parser.Parse(b"", True)
    return instances, token or ""


def _operator(managed: Any, principal: str | None) -> str:
    """Return which AWS service operates an instance; "" where none does."""
    return sys.intern(principal or "unknown") if managed else ""


def _instance(instance_id: Any, state: Any, launch_time: Any, tags: dict[str, str], *more: str) -> Instance:
    """Build an Instance from the texts of an answer; raises TypeError or ValueError if it is not whole."""
    if not (instance_id and isinstance(state, str) and state.strip()):
        raise ValueError("no instance id or no state")
    if not re.fullmatch("i-[0-9a-f]+", instance_id):
        raise ValueError(f"{shown_value(instance_id)} is no instance id")
    launched = datetime.fromisoformat(launch_time)
    try:
        launched = launched.astimezone(UTC) if launched.tzinfo else launched.replace(tzinfo=UTC)
    except OverflowError as error:
        raise ValueError(f"no time of this world: {launch_time}") from error
    if launched.year < 1970:
        raise ValueError(f"launched before 1970: {launch_time}")
    return Instance(instance_id, state, launched, tags, *more)


CLOUDTRAIL_DAYS = 90  # that CloudTrail keeps events
LAST_LAUNCH = datetime(9999, 1, 1, tzinfo=UTC)  # to look up: Python knows no later year than that
LOOKUP_PAUSE = 0.5  # CloudTrail takes two lookups a second of an account and region (its API reference)
MAX_EVENT_PAGES = 10


def describe_creators(
    client: Any, launches: Iterable[tuple[str, datetime]], deadline: float
) -> Iterator[list[tuple[str, str]]]:
    """Yield who made instances of the client's account and region, until a time of the monotonic clock.

    Takes the instances' ids and launch times. One RunInstances makes many of them, so that one lookup may answer
    for all of these. Raises TargetError.
    """
    waiting = dict(launches)
    next_call = 0.0
    while waiting:
        instance_id = next(iter(waiting))
        launched = min(waiting[instance_id], LAST_LAUNCH)
        around = {"StartTime": launched - timedelta(minutes=10), "EndTime": launched + timedelta(minutes=10)}
        made: list[tuple[str, str]] = []
        # To start a stopped instance renews its launch time: then any time will do.
        for window, pages in ((around, 1), ({}, MAX_EVENT_PAGES)):
            token: dict[str, str] = {}
            for _ in range(0 if made else pages):
                time.sleep(max(0.0, next_call - time.monotonic()))
                next_call = time.monotonic() + LOOKUP_PAUSE
                if next_call > deadline:
                    return
                by_id = [{"AttributeKey": "ResourceName", "AttributeValue": instance_id}]
                try:
                    page = call_aws(
                        client, "LookupEvents", deadline, LookupAttributes=by_id, **window, **token
                    )
                except TargetError:
                    if time.monotonic() < deadline:
                        raise
                    return
                if "Events" not in page:
                    raise target_error("ForeignAnswer", "no Events", "cloudtrail:LookupEvents")
                made = [pair for event in page["Events"] for pair in creators_of(event)]
                following = next_token(page, "cloudtrail:LookupEvents")
                token = {"NextToken": following} if following else {}
                if made or not token:
                    break
        nobody = (instance_id, f"{UNKNOWN}CloudTrail has no RunInstances of it)")
        yield [pair for pair in made if waiting.pop(pair[0], None)]
        if waiting.pop(instance_id, None):
            yield [nobody]


def creators_of(event: Any) -> list[tuple[str, str]]:
    """Return each instance that an event of CloudTrail made, and who made it; the event may be of any JSON."""
    resources = event.get("Resources") if isinstance(event, Mapping) else None
    ids = [
        text_at(item, "ResourceName")
        for item in (resources if isinstance(resources, list) else ())
        if text_at(item, "ResourceType") == "AWS::EC2::Instance"
    ]
    if text_at(event, "EventName") != "RunInstances":
        return []
    try:
        detail = json.loads(text_at(event, "CloudTrailEvent"))
    except (ValueError, RecursionError):
        return [(instance_id, f"{UNKNOWN}the event cannot be read)") for instance_id in ids]
    if isinstance(detail, Mapping) and detail.get("errorCode"):
        return []
    who = creator_name(detail.get("userIdentity") if isinstance(detail, Mapping) else None)
    return [(instance_id, who) for instance_id in ids]


def creator_name(identity: Any) -> str:
    """Return who a userIdentity of CloudTrail is (its user guide, CloudTrail userIdentity element)."""
    arn = text_at(identity, "arn")
    role, session = text_at(identity, "sessionContext", "sessionIssuer", "userName"), arn.rpartition("/")[2]
    service, kind = text_at(identity, "invokedBy"), text_at(identity, "type")
    if service.endswith(".amazonaws.com") or role.startswith("AWSServiceRoleFor"):
        by = service.removesuffix(".amazonaws.com") or role.removeprefix("AWSServiceRoleFor")
        return f"{by} (automation)"
    if role.startswith("AWSReservedSSO_"):
        return f"{session} (SSO {role.removeprefix('AWSReservedSSO_').rpartition('_')[0]})"
    known = text_at(identity, "userName") or arn or text_at(identity, "principalId")
    if kind == "AssumedRole":
        known = f"{role or arn.split('/')[1]}/{session}" if "/" in arn else role or known
    elif kind == "Root":
        return f"root of {text_at(identity, 'accountId') or 'the account'}"
    return known or f"{UNKNOWN}the event names nobody)"


def text_at(value: Any, *path: str) -> str:
    """Return the text at a path of keys in JSON of any shape; "" where there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""


def split_s3(location: str) -> tuple[str, str]:
    """Return bucket and key of s3://BUCKET/KEY; raises UsageError."""
    bucket, _, key = location.removeprefix("s3://").partition("/")
    if not bucket or not key or key.endswith("/"):
        raise UsageError(f"{printable(location)}: name the state as s3://BUCKET/KEY")
    return bucket, key


def load_instances(path: str) -> tuple[dict[Target, list[Instance]], bool]:
    """Read what `aws ec2 describe-instances` printed (`-`: standard input), and whether it is all of it.

    The account is the OwnerId, the region comes from the zone. Raises UsageError.
    """
    shown = "standard input" if path == "-" else path
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = content.decode(json.detect_encoding(content))
        answer = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        reservations = answer["Reservations"]
    except OSError as error:
        raise UsageError(f"cannot read {shown}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{shown} is not what `aws ec2 describe-instances --output json` prints: "
            + ("it has no Reservations" if isinstance(error, (KeyError, TypeError)) else str(error))
        ) from error
    targets: dict[Target, list[Instance]] = {}
    place = "Reservations"
    try:
        for index, reservation in enumerate(_listed(reservations)):
            place = f"Reservations[{index}]"
            owner = _account_id(_text(reservation, "OwnerId"))
            for number, item in enumerate(_listed(reservation["Instances"])):
                place = f"Reservations[{index}].Instances[{number}]"
                target = Target(owner, zone_region(_text(item, "Placement", "AvailabilityZone")))
                targets.setdefault(target, []).append(_instance_of_json(item))
        place = "NextToken"
        misspelt = [key for key in answer if "token" in key.lower() and key != "NextToken"]
        if misspelt:
            raise ValueError(f"the key {shown_value(misspelt[0])} in place of NextToken")
        complete = answer.get("NextToken") is None or not _text(answer, "NextToken")
    except (KeyError, TypeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"{shown}: {place}: {what}") from error
    return targets, complete


def load_fleet(paths: Iterable[str]) -> tuple[dict[Target, list[Instance]], str]:
    """Read saved files as one, each instance once, and return the last file that is not whole; raises UsageError."""
    targets: dict[Target, dict[str, tuple[Instance, str]]] = {}
    cut = ""
    for path in paths:
        loaded, complete = load_instances(path)
        cut = cut if complete else path
        for target, instances in loaded.items():
            known = targets.setdefault(target, {})
            for instance in instances:
                other, source = known.setdefault(instance.instance_id, (instance, path))
                if other != instance:
                    what = "other tags" if other.tags != instance.tags else "another state or launch"
                    where = f"twice in {path}" if source == path else f"in {source} and in {path}"
                    raise UsageError(
                        f"{instance.instance_id} in {target} is {where}, with {what}: save it again, in one file"
                    )
    return {target: [pair[0] for pair in known.values()] for target, known in targets.items()}, cut


PRICE_COLUMNS = ("instance_type", "region", "hourly_price")


HOURS_A_MONTH = 730  # as AWS's own calculator has it


@dataclass(frozen=True, slots=True)
class Prices:
    """What an hour of an instance costs, by instance type and region."""

    hourly: Mapping[tuple[str, str], float]

    def monthly_cost(self, instance: Instance, region: str) -> float | None:
        """Return what an instance costs in a month as it is now; None where its price is not known."""
        hourly = self.hourly.get((instance.instance_type, region))
        if hourly is None:
            return None
        runs = instance.state in ("pending", "running") or is_new_state(instance.state)
        return hourly * HOURS_A_MONTH if runs else 0.0


def load_prices(path: str) -> Prices:
    """Read a CSV of instance type, region and hourly price, with a line that names the columns; raises UsageError."""
    hourly: dict[tuple[str, str], float] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            if not set(PRICE_COLUMNS) <= {*(table.fieldnames or ())}:
                raise UsageError(f"{path}:1: the first line must name the columns {','.join(PRICE_COLUMNS)}")
            for row in table:
                kind, region, price = (str(row[column] or "").strip() for column in PRICE_COLUMNS)
                if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,12})?", price):
                    message = f"{path}:{table.line_num}: {shown_value(price)} is no price: write it as 0.0832"
                    raise UsageError(message)
                if not is_region(region):
                    raise UsageError(f"{path}:{table.line_num}: AWS has no region {shown_value(region)}")
                hourly[kind, region] = float(price)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is no CSV in UTF-8: {error}") from error
    return Prices(hourly)


def _instance_of_json(item: Mapping[str, Any]) -> Instance:
    """Build an Instance from an item of `Instances`; raises KeyError, TypeError or ValueError."""
    tags: dict[str, str] = {}
    instance_id = _text(item, "InstanceId")
    for tag in _listed(item.get("Tags", [])):
        key = _text(tag, "Key")
        if not key or key in tags:
            raise ValueError(
                f"it has the tag key {shown_value(key)} twice" if key else "it has a tag without a key"
            )
        tags[key] = _text(tag, "Value")
    more = (("InstanceType",), ("IamInstanceProfile", "Arn"), ("SubnetId",), ("VpcId",))
    texts = [_text(item, *path) if item.get(path[0]) is not None else "" for path in more]
    operator = item.get("Operator") or {}
    if not isinstance(operator, dict) or not isinstance(operator.get("Managed", False), bool):
        raise TypeError("its Operator is not an object with Managed, true or false")
    principal = _text(operator, "Principal") if "Principal" in operator else None
    texts.append(_operator(operator.get("Managed"), principal))
    return _instance(instance_id, _text(item, "State", "Name"), _text(item, "LaunchTime"), tags, *texts)


def _text(value: Any, *path: str) -> str:
    """Return the text at a path of a saved answer; raises KeyError, TypeError or ValueError."""
    for key in path:
        if not isinstance(value, dict):
            raise TypeError(f"{shown_value(value)} stands where an object with {key} should")
        value = value[key]
    if not isinstance(value, str):
        raise TypeError(f"its {path[-1]} is {shown_value(value)}, not text")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"its {path[-1]} {shown_value(value)} holds half a character (a lone surrogate)")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raises ValueError for a key that appears twice in it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown_value(key)} appears twice in one object")
    return found


def _constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which only Python reads as JSON; raises ValueError."""
    raise ValueError(f"{name} is not JSON")


def _listed(value: Any) -> list[Any]:
    """Return a list if the value is one; raises TypeError."""
    if not isinstance(value, list):
        raise TypeError(f"{shown_value(value)} stands where a list should")
    return value


def _account_id(text: Any) -> str:
    """Return an account id if the text is one; raises ValueError."""
    if not isinstance(text, str) or not re.fullmatch("[0-9]{12}", text):
        raise ValueError(f"{shown_value(text)} is no account id")
    return text


def zone_region(zone: str) -> str:
    """Return the region of an availability, local or wavelength zone: us-west-2 of us-west-2-lax-1a."""
    match = re.match(REGION_NAME, zone)
    if not match:
        raise ValueError(f"{shown_value(zone)} is no availability zone")
    return match[0]


########################################################################################################
# 6 State: LocalState, S3State, the sightings, record_scan, fetch_findings, fetch_open, prune_state, record_changes
########################################################################################################

APPLICATION_ID = 0x74616763  # "tagc", in SQLite's header: it tells our files from other programs'
BUSY_TIMEOUT = 60  # seconds to wait while another scan records

# One entry a version of the state, each run in one transaction with the version that it reaches.
# `findings` has a rowid and a separate key: rows of this size make a WITHOUT ROWID table slow.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE scans (
            id INTEGER PRIMARY KEY, scan_id TEXT NOT NULL UNIQUE, policy TEXT NOT NULL, policy_file TEXT NOT NULL,
            policy_digest TEXT NOT NULL, started_at TEXT NOT NULL, finished_at TEXT NOT NULL
        )
        """,
        """
        CREATE TABLE coverage (
            scan INTEGER NOT NULL REFERENCES scans (id), account_id TEXT NOT NULL, region TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('read', 'unread')), error_code TEXT, error_message TEXT,
            instances INTEGER NOT NULL, compliant INTEGER NOT NULL, findings INTEGER NOT NULL,
            exempted INTEGER NOT NULL, new INTEGER NOT NULL, repeat INTEGER NOT NULL, reopened INTEGER NOT NULL,
            resolved INTEGER NOT NULL, PRIMARY KEY (scan, account_id, region)
        ) WITHOUT ROWID
        """,
        """
        CREATE TABLE findings (
            id INTEGER PRIMARY KEY, policy TEXT NOT NULL, account_id TEXT NOT NULL, region TEXT NOT NULL,
            instance_id TEXT NOT NULL, state TEXT NOT NULL, launch_time TEXT NOT NULL, tags TEXT NOT NULL,
            violations TEXT NOT NULL, last_scan INTEGER NOT NULL REFERENCES scans (id),
            status TEXT NOT NULL CHECK (status IN ('NEW', 'REPEAT', 'REOPENED', 'RESOLVED')),
            first_seen TEXT NOT NULL, last_seen TEXT NOT NULL, times_seen INTEGER NOT NULL,
            times_reopened INTEGER NOT NULL, resolved_at TEXT, resolution TEXT, created_by TEXT, suggestions TEXT,
            UNIQUE (policy, account_id, region, instance_id)
        )
        """,
    ),
    (
        # The keys of `violations` by themselves, to count a million findings without reading their JSON.
        "ALTER TABLE findings ADD COLUMN tag_keys TEXT",
        "UPDATE findings SET tag_keys = (SELECT json_group_array(json_extract(value, '$.tag_key')) "
        "FROM json_each(violations))",
        "ALTER TABLE findings ADD COLUMN instance_type TEXT",
        "ALTER TABLE findings ADD COLUMN cause_kind TEXT",
        "ALTER TABLE findings ADD COLUMN cause TEXT",
        "ALTER TABLE findings ADD COLUMN monthly_cost REAL",
        # What became of a finding after it was NEW; `before` are the violations that it had until then.
        """
        CREATE TABLE events (
            id INTEGER PRIMARY KEY, finding INTEGER NOT NULL REFERENCES findings (id), at TEXT NOT NULL,
            event TEXT NOT NULL CHECK (event IN ('CHANGED', 'RESOLVED', 'REOPENED')), before TEXT, resolution TEXT
        )
        """,
        "CREATE INDEX events_of ON events (finding)",
        "INSERT INTO events (finding, at, event, before, resolution) "
        "SELECT id, resolved_at, 'RESOLVED', violations, resolution FROM findings WHERE resolved_at IS NOT NULL",
        # What is left of scans that were pruned: their last of each day.
        """
        CREATE TABLE trend (
            policy TEXT NOT NULL, day TEXT NOT NULL, at TEXT NOT NULL, open INTEGER NOT NULL, new INTEGER NOT NULL,
            reopened INTEGER NOT NULL, resolved INTEGER NOT NULL, targets INTEGER NOT NULL,
            targets_unread INTEGER NOT NULL, PRIMARY KEY (policy, day)
        ) WITHOUT ROWID
        """,
    ),
    (
        # What `remediate` wrote: `former` is NULL where the tag was missing, `value` where it was taken away.
        # It is intended before the call, so that what was under way when a run was killed is known.
        """
        CREATE TABLE changes (
            id INTEGER PRIMARY KEY, change_id TEXT NOT NULL UNIQUE, policy TEXT NOT NULL, account_id TEXT NOT NULL,
            region TEXT NOT NULL, instance_id TEXT NOT NULL, tag_key TEXT NOT NULL, former TEXT, value TEXT,
            why TEXT NOT NULL, who TEXT NOT NULL, changed_at TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('intended', 'written'))
        )
        """,
        "CREATE INDEX changes_of ON changes (policy, account_id, region, instance_id)",
    ),
    (
        # What each channel of the policy's `notify` is to tell, and when it has: NULL where it has not yet.
        """
        CREATE TABLE notifications (
            policy TEXT NOT NULL, subject TEXT NOT NULL, channel TEXT NOT NULL, told_at TEXT,
            PRIMARY KEY (policy, subject, channel)
        ) WITHOUT ROWID
        """,
    ),
    ("ALTER TABLE findings ADD COLUMN managed_by TEXT",),
)

# What one scan saw, in a private database on disk: memory does not grow with the fleet, and recording can
# be repeated without reading AWS again. `violations` are those that count: NULL where there are none.
SIGHTINGS_SCHEMA = (
    """
    CREATE TABLE target (
        id INTEGER PRIMARY KEY, account_id TEXT NOT NULL, region TEXT NOT NULL, error_code TEXT,
        error_message TEXT, UNIQUE (account_id, region)
    )
    """,
    """
    CREATE TABLE sighting (
        target INTEGER NOT NULL, instance_id TEXT NOT NULL, state TEXT NOT NULL, launch_time TEXT NOT NULL,
        tags TEXT NOT NULL, violations TEXT, exempted TEXT, too_young INTEGER NOT NULL, instance_type TEXT,
        monthly_cost REAL, groups TEXT, cause_kind TEXT, cause TEXT, tag_keys TEXT, managed_by TEXT,
        suggestions TEXT, created_by TEXT
    )
    """,
    # The values of a group's members, as JSON in the order of the rules, and how many have them: a group is
    # counted page by page. What its members agree on comes of it when all are read.
    """
    CREATE TABLE usage (
        target INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, copies_of TEXT NOT NULL,
        tag_values TEXT NOT NULL, members INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE agreement (
        target INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, agreements TEXT NOT NULL,
        PRIMARY KEY (target, kind, name)
    ) WITHOUT ROWID
    """,
    "CREATE TABLE resolved (finding INTEGER PRIMARY KEY, resolution TEXT NOT NULL)",
    # What belongs in digests. The recipient is "" except for owners, the subject NULL if the channel was sent it
    # before. Only a finding has a line; it is "" where no digest lists it.
    "CREATE TABLE digest_line (channel TEXT NOT NULL, recipient TEXT NOT NULL, subject TEXT, line TEXT)",
    "CREATE INDEX digest_of ON digest_line (channel, recipient)",
)


WAY_OUT = "restore it from a backup, or move it away to start anew (every finding will be NEW again)"


class _BadRowError(sqlite3.DatabaseError):
    """A row of the state does not hold what tagcheck writes."""


@contextlib.contextmanager
def _state_errors(name: Path | str) -> Iterator[None]:
    """Turn what SQLite and the rows of a state can fail with into StateErrors, but for bugs of ours."""
    advice = {
        "SQLITE_BUSY": f"is in use: another scan has been writing to it for {BUSY_TIMEOUT} s; run again",
        "SQLITE_LOCKED": "is in use; run again",
        "SQLITE_NOTADB": f"is not a SQLite database: {WAY_OUT}",
        "SQLITE_CORRUPT": f"is damaged: {WAY_OUT}",
        "SQLITE_CONSTRAINT": f"is damaged: {WAY_OUT}",
        "SQLITE_FULL": f"cannot grow: the disk is full (or that of {tempfile.gettempdir()}); make room and run again",
        "SQLITE_READONLY": "cannot be written: check the permissions of the file and of its directory",
        "SQLITE_CANTOPEN": "cannot be opened: check the permissions of the file and of its directory",
        "SQLITE_IOERR": "cannot be read or written: check the disk, its space and its quota",
        "SQLITE_PERM": "cannot be opened: check its permissions",
        "SQLITE_AUTH": "cannot be opened: check its permissions",
        "SQLITE_TOOBIG": f"holds a value too large for SQLite: {WAY_OUT}",
    }
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.Error as error:
        code = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        if code == "SQLITE_ERROR" and _QUERY_BUG.match(str(error)):
            raise
        # SQLITE_ERROR is of a value that cannot be worked with ("malformed JSON"), as the tables are ours.
        unusable = f"is damaged or was changed ({str(error)[:200]}): {WAY_OUT}"
        raise StateError(f"the state {name} {advice.get(code, unusable)}") from error


# What SQLite says of a query that does not fit the tables, which are ours where any is asked.
_QUERY_BUG = re.compile("no such column|no such function|near |ambiguous column|wrong number of arguments")


def check_state(path: Path, name: Path | str | None = None, *, create: bool = True) -> None:
    """Find out before the scan whether the state can be used, and create it where there is none.

    Refuses what is not ours or not whole: to begin anew silently would lose every first_seen. Raises
    StateError, which says `name` where `path` is a copy.
    """
    name = name or path
    if not _exists(path):
        if not create:
            raise _missing(name)
        _create_state(path)
    with _checked_state(path, name) as db:
        _migrate(db, name)


def _exists(path: Path) -> bool:
    """Return whether there is anything of this name; raises StateError where nobody can tell."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise StateError(
            f"the state {path} cannot be read: {error.strerror}; name another file with --state"
        ) from error
    return True


def _missing(name: Path | str) -> MissingStateError:
    """Return the error of a state that is not there."""
    return MissingStateError(
        f"there is no state {name}: run a scan first, or name the right one with --state"
    )


@contextlib.contextmanager
def _checked_state(path: Path, name: Path | str) -> Iterator[sqlite3.Connection]:
    """Yield a state that is there, found to be ours and whole; raises StateError."""
    with opened_state(path, name) as db:
        # count(*) does not notice flipped bits, and quick_check none in an index.
        damage = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if damage != "ok":
            raise StateError(f"the state {name} is damaged ({damage}): {WAY_OUT}")
        yield db


def has_scan(path: Path, scan_id: str) -> bool:
    """Return whether a scan is in a state already; raises StateError."""
    with opened_state(path, path) as db:
        return db.execute("SELECT 1 FROM scans WHERE scan_id = ?", (scan_id,)).fetchone() is not None


def copy_state(path: Path, copy: Path) -> None:
    """Copy a state, where there is one, as it is after its last transaction; raises StateError."""
    if _exists(path):
        with _checked_state(path, path) as source, contextlib.closing(sqlite3.connect(copy)) as target:
            source.backup(target)


def resolve_state(name: str) -> Path:
    """Return the file that a name of a state leads to; raises StateError for a link that leads nowhere."""
    path = Path(os.path.realpath(name))
    # Whoever may write the link would else choose where a new state is put.
    if os.path.islink(name) and not os.path.lexists(path):
        raise StateError(
            f"the state {name} is a link to {path}, which does not exist: put the state there, or "
            "name its file with --state"
        )
    return path


def _refuse_unlike_state(path: Path, name: Path | str) -> None:
    """Raise StateError for what is not a file, for an empty one, or one that may not be looked at."""
    try:
        status = path.stat()
    except OSError as error:
        message = f"the state {name} cannot be read: {error.strerror}; name another file with --state"
        raise StateError(message) from error
    if stat.S_ISDIR(status.st_mode):
        raise StateError(f"the state {name} is a directory: name a file with --state")
    if not stat.S_ISREG(status.st_mode):  # to open a FIFO waits for a writer
        raise StateError(f"the state {name} is not a regular file: name another file with --state")
    size = status.st_size
    if size == 0:
        raise StateError(f"the state {name} is empty (0 bytes): {WAY_OUT}")
    if size < 512:  # SQLite's smallest page; it takes what is smaller for a database that is new
        raise StateError(f"the state {name} is not a SQLite database, or cut short ({size} bytes): {WAY_OUT}")


def _create_state(path: Path) -> None:
    """Create an empty state readable by its owner alone; kill it at any point, and there is all or nothing."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise StateError(
            f"the state {path} cannot be created: {error.strerror}; name another place with --state"
        ) from error
    os.close(handle)
    try:
        with _state_errors(path), contextlib.closing(_connect(Path(name))) as db:
            _migrate(db, path)
        with contextlib.suppress(FileExistsError):  # another scan was first, and its state is as good
            os.link(name, path)
    except OSError as error:
        raise StateError(f"the state {path} cannot be created: {error.strerror}") from error
    finally:
        os.unlink(name)


def _connect(path: Path) -> sqlite3.Connection:
    """Open a database that exists; the caller closes it, as sqlite3's own `with` only commits."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
    db.execute("PRAGMA trusted_schema = OFF")
    return db


@contextlib.contextmanager
def opened_state(path: Path, name: Path | str) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a state whose schema is ours; raises StateError."""
    _refuse_unlike_state(path, name)
    with _state_errors(name), contextlib.closing(_connect(path)) as db:
        _state_version(db, name)
        yield db


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Write in one transaction, which an exception in the body undoes."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        # A full disk has ended the transaction already; a second ROLLBACK would be an error of its own.
        if db.in_transaction:
            db.execute("ROLLBACK")


@contextlib.contextmanager
def writing_state(db: sqlite3.Connection, name: Path | str, schema: str = "main") -> Iterator[None]:
    """Write to a state of the present version in one transaction, which an exception in the body undoes.

    The schema is compared again: another process may have changed the file since it was opened.
    """
    with _transaction(db):
        if _state_version(db, name, schema) != len(MIGRATIONS):
            raise StateError(f"the state {name} was changed while this command ran: run it again")
        yield


def _migrate(db: sqlite3.Connection, name: Path | str) -> None:
    """Bring a state to the present version in one transaction; refuse a newer one and another program's."""
    if _state_version(db, name) == len(MIGRATIONS):
        return
    with _transaction(db):
        for statements in MIGRATIONS[_state_version(db, name) :]:
            for statement in statements:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


OLDER_TABLE = "flagged_instances"
OLDER_COLUMNS = {"instance_id", "first_seen", "is_active"}


def _state_version(db: sqlite3.Connection, name: Path | str, schema: str = "main") -> int:
    """Return the version of a state: 0 of a new file and of the older tool's.

    Raises StateError for another program's, for a newer one, and for a schema that is not of its version: a
    trigger or a view could change what a scan records, or what a report shows.
    """
    application_id, version = (
        db.execute(f"PRAGMA {schema}.{pragma}").fetchone()[0] for pragma in ("application_id", "user_version")
    )
    found = _read_schema(db, schema)
    older = {row[1] for row in db.execute(f"PRAGMA {schema}.table_info({OLDER_TABLE})")} >= OLDER_COLUMNS
    is_unmarked = (application_id, version) == (0, 0)
    if not (application_id == APPLICATION_ID or (is_unmarked and (older or not found))):
        raise StateError(f"the state {name} is another program's database: name another file with --state")
    if version > len(MIGRATIONS):
        raise StateError(
            f"the state {name} was written by a newer tagcheck (version {version}): use that one"
        )
    expected = _expected_schema(max(version, 0))
    unknown = [row for row in (found - expected) if not (older and _is_of_older_tool(row))]
    if version < 0:
        why = f"its version is {version}"
    elif unknown:
        kind, object_name, table, _ = min(unknown, key=repr)
        on = f" on {str(table)[:60]!r}" if table != object_name else ""
        why = f"it has a {str(kind)[:20]} {str(object_name)[:60]!r}{on} that tagcheck did not make"
    elif missing := expected - found:
        kind, object_name, *_ = min(missing, key=repr)
        why = f"it lacks the {kind} {object_name!r}"
    else:
        return int(version)
    raise StateError(
        f"the state {name} is not a tagcheck state, or was changed by something else ({why}): {WAY_OUT}"
    )


SchemaRow = tuple[str, str, str, str]


def _read_schema(db: sqlite3.Connection, schema: str = "main") -> Counter[SchemaRow]:
    """Return what a database consists of: type, name, table and SQL, its white space made alike."""
    try:
        rows = db.execute(f"SELECT type, name, tbl_name, sql FROM {schema}.sqlite_master").fetchall()
    except UnicodeDecodeError as error:  # sqlite3 fails to decode SQLite's message, which quotes a name
        raise _BadRowError("a name in its schema is not UTF-8") from error
    return Counter((*row, re.sub(r"\s*([(),])\s*", r"\1", " ".join(str(sql).split()))) for *row, sql in rows)


@functools.lru_cache
def _expected_schema(version: int) -> Counter[SchemaRow]:
    """Return what a state of a version consists of."""
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        for statement in itertools.chain.from_iterable(MIGRATIONS[:version]):
            db.execute(statement)
        return _read_schema(db)


def _is_of_older_tool(row: SchemaRow) -> bool:
    """Return whether a part of a schema is the older tool's table, or an index of it."""
    kind, name, table, sql = row
    if kind == "table" and name == "sqlite_sequence":  # of AUTOINCREMENT
        return sql == "CREATE TABLE sqlite_sequence(name,seq)"
    if table != OLDER_TABLE:
        return False
    of_key = kind == "index" and sql == "None"
    # What the SQL says is what SQLite makes, whatever the other columns say. A virtual table is other code's.
    return of_key or bool(
        re.match(rf"""CREATE TABLE ["`\[]?{OLDER_TABLE}\b|{_OLDER_INDEX}""", sql, re.IGNORECASE)
    )


_OLDER_INDEX = rf"""CREATE( UNIQUE)? INDEX ["`\[]?\w+["`\]]? ON ["`\[]?{OLDER_TABLE}\b"""


class LocalState:
    """A state in a file of this machine; without `create` a missing one is a MissingStateError."""

    def __init__(self, path: Path, name: str | None = None, *, create: bool = True) -> None:
        self.path, self.name, self._create = path, name or str(path), create

    def check(self) -> None:
        """Find out before the scan whether it can be used; raises StateError."""
        check_state(self.path, create=self._create)

    def attempts(self, scan_id: str | None = None) -> Iterator[Path]:
        """Yield the file to record into, once: a transaction that ends stands."""
        yield self.path

    def release_signals(self) -> None:
        """Do nothing: no signal is held back."""

    def copy(self, copy: Path) -> None:
        """Copy it, where there is one; raises StateError."""
        if not (self._create or _exists(self.path)):
            raise _missing(self.name)
        copy_state(self.path, copy)


S3_TRIES = 40
S3_DAMAGED = 2  # answers that may be the network's fault; then it is the state that is damaged
S3_TIME_OUTS = 2  # each may take S3_SECONDS
S3_SECONDS = 1800.0  # of one transfer: a state of a gigabyte over a slow line
S3_PAUSE = 3.0  # seconds at most between two tries; the pauses are random, so that agents part


class _DamagedError(StateError):
    """A copy of the state is not whole, perhaps because its transfer was not."""


class _PassingError(Exception):
    """S3 refused or failed in a way that may pass."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class S3State:
    """A state in S3, recorded into a copy that takes its place only if nobody else was faster.

    Without `create` a missing one is a MissingStateError.
    """

    def __init__(
        self,
        s3: Any,
        bucket: str,
        key: str,
        path: Path,
        hold_signals: Callable[[], Callable[[], None]],
        *,
        create: bool = True,
    ) -> None:
        self._s3, self._object, self._hold_signals = s3, {"Bucket": bucket, "Key": key}, hold_signals
        self._create = create
        self._release: Callable[[], None] | None = None
        self.path, self.name = path, f"s3://{bucket}/{key}"

    def check(self) -> None:
        """Find out before the scan whether it can be read; raises StateError."""
        next(self.attempts())

    def copy(self, copy: Path) -> None:
        """Copy it, where there is one; raises StateError."""
        self.check()
        copy_state(self.path, copy)

    def attempts(self, scan_id: str | None = None) -> Iterator[Path]:
        """Yield a fresh copy to record into, as often as it takes until one stands; raises StateError.

        A put whose answer was lost is repeated by the SDK, and then refused because of itself: only the scan's
        id in the state tells that it was not another's.
        """
        failure, time_outs, damaged, recorded = "", 0, 0, False
        for number in range(S3_TRIES):
            if number:
                LOG.debug("%s: %s; trying again", self.name, failure)
                time.sleep(random.uniform(0, min(S3_PAUSE, 0.1 * 2**number)))
            try:
                etag = self._download()
                if etag and scan_id is not None and has_scan(self.path, scan_id):
                    return
                yield self.path
                recorded = True
                self._upload(etag)
                return
            except _PassingError as error:
                failure = str(error)
                time_outs += error.timed_out
                if time_outs >= S3_TIME_OUTS:
                    break
            except _DamagedError as error:
                failure = str(error)
                damaged += 1
                if damaged > S3_DAMAGED and not recorded:
                    raise
                if damaged > S3_DAMAGED:
                    break
        raise UploadError(
            f"the state {self.name}: given up after {counted(number + 1, 'try', 'tries')}, the last of which ended in "
            f"{failure}; the scan is not recorded, run again"
        )

    def _download(self) -> str | None:
        """Fetch the state and check it; returns its ETag, or None where there is none and a new one begins."""
        new = self.path.with_suffix(".new")
        new.unlink(missing_ok=True)
        answer = self._call("get_object")
        if answer and "ETag" not in answer:
            raise self._foreign_answer()
        if answer:
            with new.open("wb") as file:
                self._call(lambda: shutil.copyfileobj(answer["Body"], file))
        elif not self._create:
            raise _missing(self.name)
        self._check(new)
        new.replace(self.path)
        return str(answer["ETag"]) if answer else None

    def _upload(self, etag: str | None) -> None:
        """Put the copy in the place of what it was made from, or of nothing; signals wait for the end of it."""
        self._check(self.path)
        condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        self._release = self._hold_signals()  # a put that is cut off may have been carried out
        try:
            with self.path.open("rb") as body:
                answer = self._call("put_object", Body=body, **condition)
            if answer is None:
                raise _PassingError("the state was deleted meanwhile")
            if "ETag" not in answer:
                raise self._foreign_answer()
        except (_PassingError, StateError):
            self.release_signals()
            raise

    def release_signals(self) -> None:
        """Let signals come again that were held back since a put that stands."""
        release, self._release = self._release, None
        if release:
            release()

    def _foreign_answer(self) -> _DamagedError:
        """Return the error of an answer that is not S3's."""
        return _DamagedError(
            f"the state {self.name}: the answer is not S3's: check the network and the proxy"
        )

    def _check(self, path: Path) -> None:
        """Check a copy of the state; raises _DamagedError."""
        try:
            check_state(path, self.name)
        except StateError as error:
            raise _DamagedError(str(error)) from error

    def _call(self, operation: str | Callable[[], None], **arguments: Any) -> Any:
        """Return what S3 answers, None where the object is not there; raises _PassingError or StateError.

        409 ConditionalRequestConflict is for the caller to try again (S3 user guide, conditional writes), and
        botocore never does.
        """
        import botocore.exceptions as exceptions

        call = operation if callable(operation) else getattr(self._s3, operation)
        given = {} if callable(operation) else self._object | arguments
        try:
            return within(S3_SECONDS, lambda: call(**given))
        except exceptions.ClientError as error:
            code, message, _ = failure_of(error)
            if code == "NoSuchKey":
                return None
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in (409, 412, 429) or status >= 500 or code in ("SlowDown", "RequestTimeout"):
                raise _PassingError(f"{code}: {message}") from error
            advice = {
                "AccessDenied": "allow s3:GetObject, s3:PutObject and s3:ListBucket (tagcheck.py iam-policy)",
                "NoSuchBucket": "create the bucket, or correct its name",
                "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION to it",
            }.get(code, ADVICE.get(code, "check --state"))
            raise StateError(f"the state {self.name}: {code}: {printable(message)}; {advice}") from error
        except Exception as error:
            try:
                code, message, passes = failure_of(error)
            except CredentialsError as unusable:
                raise StateError(f"the state {self.name}: {unusable}") from error
            if passes or code == "CallTimeout":
                message = f"{code}: {message}" if message else code
                raise _PassingError(message, timed_out=code == "CallTimeout") from error
            advice = ADVICE.get(code, "check --state")
            raise StateError(f"the state {self.name}: {code}: {printable(message)}; {advice}") from error


State = LocalState | S3State


def open_sightings() -> sqlite3.Connection:
    """Return a private database for what a scan sees; SQLite deletes it when it is closed, or killed."""
    db = sqlite3.connect("", uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
    db.execute("PRAGMA trusted_schema = OFF")  # of what is attached as well
    for statement in SIGHTINGS_SCHEMA:
        db.execute(statement)
    return db


def sighting_errors() -> contextlib.AbstractContextManager[None]:
    """Turn SQLite's errors of what this scan has seen, in the body of the `with`, into StateErrors."""
    return _state_errors(Path(tempfile.gettempdir()) / "(of this scan)")


def add_target(db: sqlite3.Connection, target: Target) -> int:
    """Note that a target is being read, and return its number among the sightings."""
    row = db.execute(
        "INSERT INTO target (account_id, region) VALUES (?, ?)", (target.account_id, target.region)
    )
    return row.lastrowid or 0


def fail_target(db: sqlite3.Connection, target: int, error: TargetError) -> None:
    """Note why a target could not be read in full; what was seen of it no longer counts."""
    db.execute(
        "UPDATE target SET error_code = ?, error_message = ? WHERE id = ?",
        (error.code, error.message, target),
    )
    db.execute("DELETE FROM sighting WHERE target = ?", (target,))


def add_sightings(
    db: sqlite3.Connection, target: int, sightings: Iterable[tuple[Sighting, float | None]]
) -> None:
    """Keep what was made of instances of a target, and what each costs in a month if that is known."""
    db.execute("BEGIN")
    db.executemany(
        f"INSERT INTO sighting VALUES ({', '.join('?' * 17)})",
        (_sighting_row(target, seen, cost) for seen, cost in sightings),
    )
    db.execute("COMMIT")


def _sighting_row(target: int, seen: Sighting, monthly_cost: float | None) -> tuple[object, ...]:
    """Return a row of `sighting`."""
    instance = seen.instance
    launch_time, tags = utc_text(instance.launch_time), to_json(instance.tags)
    row = (target, instance.instance_id, instance.state, launch_time, tags)
    exempted = to_json([exempted_record(case) for case in seen.exempted]) if seen.exempted else None
    if not seen.violations:
        return (*row, None, exempted, seen.too_young, *(None,) * 6, instance.managed_by, None, None)
    violations = to_json([violation_record(violation) for violation in seen.violations])
    groups = groups_of(instance)
    kind, name = cause_of(groups) or (None, None)
    keys = to_json([violation.tag_key for violation in seen.violations])
    found = (instance.instance_type, monthly_cost, to_json(groups), kind, name, keys)
    return (*row, violations, exempted, seen.too_young, *found, instance.managed_by, None, None)


# How many instances of a target have these values of the required tags in a group. In a group that is no cause,
# those of a cause are copies of each other, and count once: an Auto Scaling group of 30 is no 30 witnesses.
Usage = Counter[tuple[int, str, str, str, tuple[str | None, ...]]]
MAX_USAGE = 50_000  # entries to count in memory, some 15 MB


def count_usage(usage: Usage, target: int, seen: Sighting, rules: Iterable[RequiredTag]) -> None:
    """Count the tags of an instance in each of its groups."""
    values = seen.values(rules)
    cause = ""
    for kind, name in groups_of(seen.instance):
        hands_on = GROUP_KINDS[kind].remedy
        cause = cause or (name if hands_on else "")
        # One copy with all its tags will do for its wider groups, and those without would be many entries.
        if hands_on or not cause or None not in values:
            usage[target, kind, name, "" if hands_on else cause, values] += 1


def add_usage(db: sqlite3.Connection, usage: Usage) -> None:
    """Keep what was counted so far of the groups' tags; a group can come again."""
    rows = ((*group, to_json(values), count) for (*group, values), count in usage.items())
    db.execute("BEGIN")
    db.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?)", rows)
    db.execute("COMMIT")


def add_suggestions(db: sqlite3.Connection, policy: Policy) -> None:
    """Add to what violates the policy what its tags should probably be, by all that was seen."""
    targets = db.execute("SELECT id, region FROM target WHERE error_code IS NULL AND region <> '*'")
    rules = {target: {rule.key: rule for rule in policy.rules(region)} for target, region in targets}
    reliability = _add_agreements(db, {target: [*by_key] for target, by_key in rules.items()})

    @functools.lru_cache(10_000)
    def agreements_of(target: int, kind: str, name: str) -> dict[str, Agreement]:
        query = "SELECT agreements FROM agreement WHERE (target, kind, name) = (?, ?, ?)"
        row = db.execute(query, (target, kind, name)).fetchone()
        return {key: Agreement(*found) for key, found in json.loads(row[0]).items()} if row else {}

    def suggestions(target: int, violations: str, groups: str) -> str | None:
        members = [Group(*group) for group in json.loads(groups)]
        found = []
        for violation in map(_load_violation, json.loads(violations)):  # this scan's own
            siblings = ((group, agreements_of(target, *group)) for group in members)
            rule = rules[target][violation.tag_key]
            found.append(suggest(violation, rule, policy.placeholder_values, siblings, reliability))
        records = [suggestion_record(suggestion) for suggestion in found if suggestion]
        return to_json(records) if records else None

    last = 0
    while True:
        rows = db.execute(
            "SELECT rowid, target, violations, groups FROM sighting WHERE rowid > ? AND violations IS NOT NULL "
            "ORDER BY rowid LIMIT 1000",
            (last,),
        ).fetchall()
        if not rows:
            return
        last = rows[-1][0]
        db.execute("BEGIN")
        db.executemany(
            "UPDATE sighting SET suggestions = ? WHERE rowid = ?",
            ((suggestions(*row), number) for number, *row in rows),
        )
        db.execute("COMMIT")


def _add_agreements(db: sqlite3.Connection, keys: Mapping[int, Sequence[str]]) -> Reliability:
    """Find out what the members of each group agree on, and how far groups of each kind do."""
    reliability = Reliability()
    load_values = functools.lru_cache(10_000)(json.loads)  # an instance's groups have the same values

    def rows() -> Iterator[tuple[int, str, str, str]]:
        usage = db.execute(
            "SELECT target, kind, name, tag_values, CASE copies_of WHEN '' THEN sum(members) ELSE 1 END FROM usage "
            "GROUP BY target, kind, name, copies_of, tag_values ORDER BY target, kind, name"
        )
        for (target, kind, name), members in itertools.groupby(usage, key=lambda row: row[:3]):
            values = ((load_values(row[3]), row[4]) for row in members)
            if target in keys and (found := agreements(values, keys[target])):
                reliability.learn(kind, found)
                yield target, kind, name, to_json(found)

    db.execute("BEGIN")
    db.executemany("INSERT INTO agreement VALUES (?, ?, ?, ?)", rows())
    db.execute("COMMIT")
    return reliability


MAX_LOOKUPS = 1000  # a target and scan: more than the budget of time allows


def fetch_uncreated(
    db: sqlite3.Connection, path: Path, scan: Scan, since: datetime
) -> dict[Target, list[tuple[str, datetime]]]:
    """Return the findings whose creator the state does not know and that were launched since a time.

    By target, the youngest first, each with its launch time. Raises StateError.
    """
    with _state_errors(path):
        db.execute("ATTACH DATABASE ? AS state", (f"{path.absolute().as_uri()}?mode=rw",))
        _state_version(db, path, "state")
        rows = db.execute(
            """
            SELECT account_id, region, instance_id, launch_time FROM (
                SELECT target.account_id, target.region, sighting.instance_id, sighting.launch_time,
                    row_number() OVER (PARTITION BY target ORDER BY sighting.launch_time DESC) AS number
                FROM target JOIN sighting ON sighting.target = target.id
                LEFT JOIN state.findings AS finding ON finding.policy = :policy
                    AND finding.account_id = target.account_id AND finding.region = target.region
                    AND finding.instance_id = sighting.instance_id
                WHERE target.error_code IS NULL AND sighting.violations IS NOT NULL
                    AND NOT sighting.too_young AND sighting.launch_time >= :since
                    AND (finding.created_by IS NULL OR finding.created_by LIKE :unknown)
            ) WHERE number <= :limit ORDER BY account_id, region, launch_time DESC
            """,
            {
                "policy": scan.policy.name,
                "since": utc_text(since),
                "unknown": f"{UNKNOWN}%",
                "limit": MAX_LOOKUPS,
            },
        ).fetchall()
        db.execute("DETACH DATABASE state")
    found: dict[Target, list[tuple[str, datetime]]] = {}
    for account_id, region, instance_id, launched in rows:
        entry = (instance_id, datetime.fromisoformat(launched))
        found.setdefault(Target(account_id, region), []).append(entry)
    return found


def add_unknown_creators(db: sqlite3.Connection, before: datetime, why: str) -> None:
    """Keep that nobody can say any more who made what was launched before a time."""
    db.execute(
        "UPDATE sighting SET created_by = ? WHERE violations IS NOT NULL AND launch_time < ?",
        (f"{UNKNOWN}{why})", utc_text(before)),
    )


def add_creators(db: sqlite3.Connection, target: Target, creators: Iterable[tuple[str, str]]) -> None:
    """Keep who made instances of a target."""
    db.execute("CREATE INDEX IF NOT EXISTS sighting_key ON sighting (target, instance_id)")
    db.executemany(
        "UPDATE sighting SET created_by = ? WHERE instance_id = ? "
        "AND target = (SELECT id FROM target WHERE (account_id, region) = (?, ?))",
        ((printable(who), id_, target.account_id, target.region) for id_, who in creators),
    )


def _is_text(value: Any) -> bool:
    """Return whether a value is text."""
    return type(value) is str


def _is_text_or_none(value: Any) -> bool:
    """Return whether a value is text, or nothing."""
    return value is None or type(value) is str


def _is_count(value: Any) -> bool:
    """Return whether a value is a number of things."""
    return type(value) is int and 0 <= value < MAX_COUNT


def _is_amount(value: Any) -> bool:
    """Return whether a value is an amount of money."""
    return type(value) in (int, float) and 0 <= value < math.inf


def _is_time(value: Any) -> bool:
    """Return whether a value is a time as utc_text() writes it."""
    return type(value) is str and _TIME.fullmatch(value) is not None and _is_moment(value)


@functools.lru_cache(10_000)
def _is_moment(text: str) -> bool:
    """Return whether a time is on a day that there is; the findings of a scan have few different ones."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _is_one_of(*values: str | None) -> Callable[[Any], bool]:
    """Return what tells whether a value is one of these."""
    return lambda value: value in values


def _is_absent_or(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return what tells whether a value is nothing, or passes a check."""
    return lambda value: value is None or check(value)


MAX_COUNT = 2**53  # as far as JSON's readers count exactly
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z")
_COUNT_COLUMNS = (
    "instances compliant findings exempted new reopened resolved open targets targets_unread times_seen "
    "times_reopened number"
).split()
# What columns and JSON keys hold. A state is data that anyone may have changed: no row is used unchecked.
_COLUMNS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_COUNT_COLUMNS, _is_count),
    **dict.fromkeys(("at", "first_seen", "last_seen", "launch_time", "changed_at", "started_at"), _is_time),
    **dict.fromkeys(
        ("error_code", "error_message", "created_by", "instance_type", "managed_by", "former"),
        _is_text_or_none,
    ),
    **dict.fromkeys(
        ("policy", "account_id", "region", "instance_id", "state", "tag_key", "message"), _is_text
    ),
    **dict.fromkeys(("change_id", "why", "who", "subject", "channels", "evidence"), _is_text),
    **dict.fromkeys(("value", "found_key", "cause"), _is_text_or_none),
    "resolved_at": _is_absent_or(_is_time),
    "status": _is_one_of(*Status),
    "resolution": _is_one_of(None, *Resolution),
    "cause_kind": _is_one_of(None, *GROUP_KINDS),
    "event": _is_one_of("CHANGED", "RESOLVED", "REOPENED"),
    "change_status": _is_one_of("intended", "written"),
    "monthly_cost": _is_absent_or(_is_amount),
    "cost": _is_amount,
    "type": _is_one_of(*ViolationType),
    "confidence": lambda value: _is_amount(value) and value <= 1,
}


def checked_row(columns: Sequence[str], row: Sequence[Any]) -> Sequence[Any]:
    """Return a row of the state, all of whose values are what their columns hold; raises _BadRowError."""
    for column, value in zip(columns, row, strict=True):
        if not _COLUMNS[column](value):
            raise _BadRowError(f"{column} is {value!r:.80}")
    return row


def _load_json(column: str, text: Any, kind: type) -> Any:
    """Return a column's JSON, which is an object or a list; raises _BadRowError."""
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise _BadRowError(f"{column} is not JSON: {text!r:.80}") from error
    if type(value) is not kind:
        raise _BadRowError(f"{column} is {text!r:.80}")
    return value


def _load_records(column: str, text: Any, keys: Mapping[str, str]) -> list[Sequence[Any]]:
    """Return the values of a column's JSON objects, whose keys name their checks; raises _BadRowError."""
    rows = []
    for record in _load_json(column, text, list):
        if type(record) is not dict or record.keys() != keys.keys():
            raise _BadRowError(f"{column} is {text!r:.80}")
        rows.append(checked_row([*keys.values()], [record[key] for key in keys]))
    return rows


_VIOLATION = {key: key for key in ("tag_key", "type", "value", "found_key", "message")}


def _load_violations(text: str | bytes) -> tuple[Violation, ...]:
    """Read the violations of a finding back from the state; raises _BadRowError."""
    rows = _load_records("violations", text, _VIOLATION)
    if not rows:
        raise _BadRowError("violations is an empty list")
    return tuple(Violation(key, ViolationType(kind), *more) for key, kind, *more in rows)


def _load_violation(row: Mapping[str, Any]) -> Violation:
    """Read one violation back from the sightings."""
    kind = ViolationType(row["type"])
    return Violation(row["tag_key"], kind, row["value"], row["found_key"], row["message"])


def _load_exempted(text: str) -> tuple[Exempted, ...]:
    """Read exempted violations back from the sightings."""
    return tuple(
        Exempted(
            _load_violation(row),
            Exemption(
                row["reason"],
                expires=date.fromisoformat(row["expires"]) if row["expires"] else None,
                approved_by=row["approved_by"],
                ticket=row["ticket"],
            ),
        )
        for row in json.loads(text)
    )


@contextlib.contextmanager
def record_scan(
    db: sqlite3.Connection, path: Path, scan: Scan, finished_at: datetime, name: str
) -> Iterator[None]:
    """Record what was seen into the state, in one transaction; the body of the `with` runs before it is final.

    In the body, fetch_coverage and fetch_findings answer for this scan. An exception there undoes all, so
    that a report that cannot be written costs no NEW. Raises StateError.
    """
    with _state_errors(name):
        db.execute("CREATE INDEX IF NOT EXISTS sighting_key ON sighting (target, instance_id)")
        # An instance that moved between two pages while they were read is on both: the last sight counts.
        db.execute(
            """
            DELETE FROM sighting WHERE rowid IN (
                SELECT older.rowid FROM (
                    SELECT target, instance_id, max(rowid) AS latest FROM sighting
                    GROUP BY target, instance_id HAVING count(*) > 1
                ) AS twice
                JOIN sighting AS older USING (target, instance_id) WHERE older.rowid < twice.latest
            )
            """
        )
        db.execute("ATTACH DATABASE ? AS state", (f"{path.absolute().as_uri()}?mode=rw",))
        db.execute("PRAGMA state.synchronous = FULL")
        with writing_state(db, name, "state"):
            _record(db, scan, utc_text(scan.started_at), utc_text(finished_at))
            yield
        # After an exception queries of it may still be open, and only the end of the connection detaches it.
        db.execute("DETACH DATABASE state")


def _record(db: sqlite3.Connection, scan: Scan, now: str, finished_at: str) -> None:
    """Bring scans, findings and coverage of the attached state up to date."""
    raised: list[BaseException] = []

    def resolution_of(*row: Any) -> str | None:
        try:
            return _resolution(*row)
        except BaseException as error:  # sqlite3 tells only that there was one, also of Ctrl-C
            raised.append(error)
            raise

    db.create_function("resolution", 3, resolution_of, deterministic=True)
    cursor = db.execute(
        "INSERT INTO state.scans (scan_id, policy, policy_file, policy_digest, started_at, finished_at) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (scan.scan_id, scan.policy.name, scan.policy.file, scan.policy.digest, now, finished_at),
    )
    names = {"policy": scan.policy.name, "scan": cursor.lastrowid, "now": now, "unknown": f"{UNKNOWN}%"}
    if db.execute("SELECT 1 FROM state.coverage WHERE scan = :scan", names).fetchone():
        raise _BadRowError("it has counts of a scan that was not yet made")
    db.execute("DELETE FROM resolved")
    # Only a target that was read in full resolves anything. Without --include-managed-resources
    # `aws ec2 describe-instances` may leave out what an AWS service operates (EC2 API reference): it is not gone.
    # In a state of the first edition managed_by is NULL, as it did not know.
    names["may_hide"] = scan.may_hide_managed
    resolve = """
        INSERT INTO resolved
        SELECT finding.id,
            resolution(CAST(finding.violations AS BLOB), sighting.tags, sighting.exempted)
        FROM target
        JOIN state.findings AS finding ON finding.policy = :policy
            AND finding.account_id = target.account_id AND finding.region = target.region
        LEFT JOIN sighting ON sighting.target = target.id AND sighting.instance_id = finding.instance_id
        WHERE target.error_code IS NULL AND finding.resolved_at IS NULL AND sighting.violations IS NULL
            AND (sighting.instance_id IS NOT NULL OR NOT :may_hide OR finding.managed_by IS '')
        """
    try:
        db.execute(resolve, names)
    except sqlite3.OperationalError:
        if raised:
            raise raised[0] from None
        raise
    db.execute(
        """
        INSERT INTO state.events (finding, at, event, before, resolution)
        SELECT finding.id, :now, 'RESOLVED', finding.violations, resolved.resolution
        FROM resolved JOIN state.findings AS finding ON finding.id = resolved.finding
        """,
        names,
    )
    db.execute(
        """
        INSERT INTO state.events (finding, at, event, before)
        SELECT finding.id, :now, 'CHANGED', finding.violations
        FROM target JOIN sighting ON sighting.target = target.id
        JOIN state.findings AS finding ON finding.policy = :policy
            AND finding.account_id = target.account_id AND finding.region = target.region
            AND finding.instance_id = sighting.instance_id
        WHERE target.error_code IS NULL AND finding.resolved_at IS NULL
            AND sighting.violations <> finding.violations
        """,
        names,
    )
    db.execute(
        """
        UPDATE state.findings SET status = 'RESOLVED', resolved_at = :now, last_scan = :scan,
            resolution = (SELECT resolution FROM resolved WHERE finding = findings.id)
        WHERE id IN (SELECT finding FROM resolved)
        """,
        names,
    )
    # A stopped instance that is started again has a new launch time: what is open stays open, however young.
    db.execute(
        """
        INSERT INTO state.findings (policy, account_id, region, instance_id, state, launch_time, tags,
            violations, status, last_scan, first_seen, last_seen, times_seen, times_reopened, created_by,
            suggestions, instance_type, cause_kind, cause, tag_keys, monthly_cost, managed_by)
        SELECT :policy, target.account_id, target.region, sighting.instance_id, sighting.state,
            sighting.launch_time, sighting.tags, sighting.violations, 'NEW', :scan, :now, :now, 1, 0,
            sighting.created_by, sighting.suggestions, sighting.instance_type, sighting.cause_kind,
            sighting.cause, sighting.tag_keys, sighting.monthly_cost, sighting.managed_by
        FROM target JOIN sighting ON sighting.target = target.id
        WHERE target.error_code IS NULL AND sighting.violations IS NOT NULL AND (
            NOT sighting.too_young OR EXISTS (
                SELECT 1 FROM state.findings AS open WHERE open.policy = :policy
                    AND open.account_id = target.account_id AND open.region = target.region
                    AND open.instance_id = sighting.instance_id AND open.resolved_at IS NULL
            )
        )
        ORDER BY target.account_id, target.region, sighting.instance_id
        ON CONFLICT (policy, account_id, region, instance_id) DO UPDATE SET
            state = excluded.state, launch_time = excluded.launch_time, tags = excluded.tags,
            violations = excluded.violations, last_scan = excluded.last_scan,
            status = CASE WHEN resolved_at IS NULL THEN 'REPEAT' ELSE 'REOPENED' END,
            last_seen = max(last_seen, excluded.last_seen),
            times_seen = times_seen + 1,
            times_reopened = times_reopened + (resolved_at IS NOT NULL),
            resolved_at = NULL, resolution = NULL, suggestions = excluded.suggestions,
            instance_type = excluded.instance_type, cause_kind = excluded.cause_kind, cause = excluded.cause,
            tag_keys = excluded.tag_keys, monthly_cost = excluded.monthly_cost, managed_by = excluded.managed_by,
            created_by = CASE WHEN created_by IS NULL OR created_by LIKE :unknown
                THEN coalesce(excluded.created_by, created_by) ELSE created_by END
        """,
        names,
    )
    if _has_table(db, "state", OLDER_TABLE):
        _adopt_flagged_instances(db, names)
    _record_coverage(db, names)
    db.execute(
        f"INSERT INTO state.events (finding, at, event) SELECT finding.id, :now, 'REOPENED' {_SEEN} "
        "WHERE finding.status = 'REOPENED'",
        names,
    )


def _resolution(violations: bytes, tags: str | None, exempted: str | None) -> str | None:
    """Return resolution() of JSON from the state and the sightings; None, which no column takes, of damaged JSON."""
    now = None if tags is None else json.loads(tags)
    try:
        before = _load_violations(violations)
    except _BadRowError:
        return None
    return resolution(before, now, {row["tag_key"] for row in json.loads(exempted or "[]")})


def _adopt_flagged_instances(db: sqlite3.Connection, names: Mapping[str, Any]) -> None:
    """Give findings of this scan the history that the older tool kept of them.

    Its table `flagged_instances` has neither account nor region, so an entry is taken over when its
    instance is found again. An entry that is not active was resolved: the finding is back.
    """
    db.execute(
        """
        UPDATE state.findings AS finding SET
            first_seen = coalesce(strftime('%Y-%m-%dT%H:%M:%SZ', old.first_seen), finding.first_seen),
            status = CASE WHEN coalesce(old.is_active, 0) THEN 'REPEAT' ELSE 'REOPENED' END,
            times_seen = finding.times_seen + 1,
            times_reopened = finding.times_reopened + NOT coalesce(old.is_active, 0)
        FROM state.flagged_instances AS old
        WHERE old.instance_id = finding.instance_id AND finding.policy = :policy
            AND finding.last_scan = :scan AND finding.status = 'NEW'
        """,
        names,
    )
    db.execute(
        """
        UPDATE state.flagged_instances SET is_active = 0 WHERE instance_id IN (
            SELECT instance_id FROM sighting JOIN target ON target.id = sighting.target
            WHERE error_code IS NULL AND violations IS NULL
        )
        """
    )
    db.execute(
        """
        DELETE FROM state.flagged_instances WHERE instance_id IN (
            SELECT instance_id FROM state.findings WHERE policy = :policy AND last_scan = :scan
        )
        """,
        names,
    )


# The findings of the attached state that this scan saw, in the order of (account, region, instance).
_SEEN = """
    FROM (SELECT * FROM target WHERE error_code IS NULL ORDER BY account_id, region) AS target
    CROSS JOIN sighting ON sighting.target = target.id AND sighting.violations IS NOT NULL
    CROSS JOIN state.findings AS finding ON finding.policy = :policy
        AND finding.account_id = target.account_id AND finding.region = target.region
        AND finding.instance_id = sighting.instance_id AND finding.last_scan = :scan
"""


def _record_coverage(db: sqlite3.Connection, names: Mapping[str, Any]) -> None:
    """Keep for every target of the scan how far it was read and what was found there."""
    db.execute(
        f"""
        WITH seen AS (
            SELECT target, count(*) AS instances, sum(violations IS NULL AND exempted IS NULL) AS compliant,
                sum(violations IS NULL AND exempted IS NOT NULL) AS exempted
            FROM sighting GROUP BY target
        ), found AS (
            SELECT target.id AS target, count(*) AS findings,
                sum(finding.status = 'NEW') AS new, sum(finding.status = 'REPEAT') AS repeat,
                sum(finding.status = 'REOPENED') AS reopened
            {_SEEN} GROUP BY target.id
        ), ended AS (
            SELECT account_id, region, count(*) AS resolved
            FROM resolved JOIN state.findings ON id = finding GROUP BY account_id, region
        )
        INSERT INTO state.coverage
        SELECT :scan, target.account_id, target.region,
            CASE WHEN error_code IS NULL THEN 'read' ELSE 'unread' END, error_code, error_message,
            coalesce(instances, 0), coalesce(compliant, 0), coalesce(findings, 0),
            coalesce(seen.exempted, 0), coalesce(new, 0),
            coalesce(repeat, 0), coalesce(reopened, 0), coalesce(resolved, 0)
        FROM target
        LEFT JOIN seen ON seen.target = target.id
        LEFT JOIN found ON found.target = target.id
        LEFT JOIN ended ON ended.account_id = target.account_id AND ended.region = target.region
        """,
        names,
    )
    # A too young instance is a finding only where it was open before. All others are findings by what this
    # scan saw alone, whatever the state holds.
    differing = db.execute(
        """
        SELECT target.account_id, target.region FROM target
        JOIN state.coverage ON scan = :scan AND coverage.account_id = target.account_id
            AND coverage.region = target.region
        LEFT JOIN (
            SELECT target, count(*) AS violating, sum(NOT too_young) AS sure FROM sighting
            WHERE violations IS NOT NULL GROUP BY target
        ) ON target = target.id
        WHERE findings <> new + repeat + reopened
            OR findings NOT BETWEEN coalesce(sure, 0) AND coalesce(violating, 0)
        """,
        names,
    ).fetchone()
    if differing:
        raise _BadRowError(f"it did not keep all findings in {' '.join(differing)}")


def fetch_coverage(db: sqlite3.Connection, scan: Scan) -> list[Coverage]:
    """Return the coverage of the scan that is being recorded, sorted by account and region."""
    rows = db.execute(
        "SELECT account_id, region, error_code, error_message, instances, compliant, findings, exempted, new, "
        "repeat, reopened, resolved FROM state.coverage WHERE scan = (SELECT id FROM state.scans WHERE scan_id = ?)",
        (scan.scan_id,),
    )
    return [Coverage(Target(*row[:2]), *row[2:]) for row in rows]


def fetch_notice(
    db: sqlite3.Connection, scan: Scan, name: str, coverage: Iterable[Coverage], *, dry_run: bool
) -> str:
    """Return why every finding of the scan being recorded is NEW; nothing where earlier ones are known."""
    rows = db.execute("SELECT DISTINCT policy FROM state.scans WHERE scan_id <> ?", (scan.scan_id,))
    policies = {policy for (policy,) in rows}
    known = any(target.repeat or target.reopened for target in coverage)  # to the older tool
    if scan.policy.name in policies or known:
        return ""
    if policies or _has_table(db, "state", OLDER_TABLE):
        return f"No earlier scan of the policy {scan.policy.name} in the state {name}: every finding is NEW"
    if dry_run:
        return f"There is no state {name} yet: every finding would be NEW"
    return f"New state {name}: every finding is NEW"


def fetch_unseen(db: sqlite3.Connection, scan: Scan) -> list[tuple[Target, int]]:
    """Return how many open findings of each target the scan being recorded neither saw nor resolved.

    Those of targets that it names as unread are left out.
    """
    rows = db.execute(
        """
        SELECT finding.account_id, finding.region, count(*) FROM state.findings AS finding
        LEFT JOIN target ON target.account_id = finding.account_id AND target.region IN (finding.region, '*')
        WHERE finding.policy = :policy AND finding.resolved_at IS NULL AND finding.last_scan <> :scan
            AND target.error_code IS NULL
        GROUP BY 1, 2 ORDER BY 1, 2
        """,
        _names(db, scan),
    )
    checked = (checked_row(("account_id", "region", "number"), row) for row in rows)
    return [(Target(account_id, region), number) for account_id, region, number in checked]


def require_scans(path: Path, name: str) -> None:
    """Raise StateError for a state without a scan, of this or of the older tool."""
    with opened_state(path, name) as db:
        if not (db.execute("SELECT 1 FROM scans").fetchone() or _has_table(db, "main", OLDER_TABLE)):
            raise StateError(
                f"the state {name} has no scan yet, and --require-state is given: restore it from a backup, "
                "or run once without --require-state"
            )


def _has_table(db: sqlite3.Connection, schema: str, table: str) -> bool:
    """Return whether a database has a table."""
    tables = db.execute(f"SELECT 1 FROM {schema}.sqlite_master WHERE (type, name) = ('table', ?)", (table,))
    return tables.fetchone() is not None


def fetch_exempted(db: sqlite3.Connection) -> Iterator[ExemptedInstance]:
    """Yield the instances that were seen and all of whose violations are exempted, sorted."""
    rows = db.execute(
        "SELECT account_id, region, instance_id, state, launch_time, tags, exempted "
        "FROM (SELECT * FROM target WHERE error_code IS NULL ORDER BY account_id, region) AS target "
        "CROSS JOIN sighting ON sighting.target = target.id AND violations IS NULL AND exempted IS NOT NULL "
        "ORDER BY account_id, region, instance_id"
    )
    for row in rows:
        yield replace(ExemptedInstance(*row), tags=json.loads(row[5]), exempted=_load_exempted(row[6]))


def fetch_findings(db: sqlite3.Connection, scan: Scan, *, resolved: bool = False) -> Iterator[Finding]:
    """Yield the findings of the scan that is being recorded, or those that it resolved, sorted."""
    source = (
        "FROM state.findings AS finding WHERE id IN (SELECT finding FROM resolved) "
        "ORDER BY account_id, region, instance_id"
        if resolved
        else f"{_SEEN} ORDER BY target.account_id, target.region, sighting.instance_id"
    )
    return map(_load_finding, db.execute(f"SELECT {_FINDING} {source}", _names(db, scan)))


def fetch_causes(db: sqlite3.Connection, scan: Scan) -> list[Cause]:
    """Return what the findings of the scan that is being recorded have in common, the greatest first."""
    return _causes(db, _SEEN, _names(db, scan))


def fetch_operators(db: sqlite3.Connection, scan: Scan) -> list[tuple[str, int]]:
    """Return which AWS services operate instances with findings, and how many, in the scan being recorded."""
    query = f"SELECT finding.managed_by, count(*) {_SEEN} WHERE finding.managed_by <> '' GROUP BY 1"
    return db.execute(f"{query} ORDER BY 2 DESC, 1", _names(db, scan)).fetchall()


def fetch_costs(db: sqlite3.Connection, scan: Scan) -> tuple[list[tuple[str, float]], int]:
    """Return what the scan's findings that lack each tag cost in a month, and how many have no price."""
    names = _names(db, scan)
    priced, unpriced = db.execute(
        f"SELECT count(finding.monthly_cost), sum(finding.monthly_cost IS NULL) {_SEEN}", names
    ).fetchone()
    rows = db.execute(
        f"""
        SELECT tag_key.value, sum(cost) FROM (
            SELECT finding.tag_keys, sum(finding.monthly_cost) AS cost {_SEEN} GROUP BY 1
        ) CROSS JOIN json_each(tag_keys) AS tag_key GROUP BY 1 ORDER BY 2 DESC, 1
        """,
        names,
    )
    return ([(key, cost or 0.0) for key, cost in rows], unpriced) if priced else ([], unpriced or 0)


def _names(db: sqlite3.Connection, scan: Scan) -> dict[str, Any]:
    """Return what _SEEN asks of the scan that is being recorded."""
    number = db.execute("SELECT id FROM state.scans WHERE scan_id = ?", (scan.scan_id,)).fetchone()[0]
    return {"policy": scan.policy.name, "scan": number}


MAX_CAUSES = 100


def _causes(db: sqlite3.Connection, source: str, names: Mapping[str, Any]) -> list[Cause]:
    """Return the causes of findings; a group of one is none."""
    rows = db.execute(
        f"""
        SELECT account_id, region, cause_kind, cause, tag_key.value, sum(number) AS instances FROM (
            SELECT finding.account_id, finding.region, finding.cause_kind, finding.cause, finding.tag_keys,
                count(*) AS number
            {source} WHERE finding.cause IS NOT NULL GROUP BY 1, 2, 3, 4, 5
        ) CROSS JOIN json_each(tag_keys) AS tag_key
        GROUP BY 1, 2, 3, 4, 5 HAVING instances > 1
        ORDER BY instances DESC, 1, 2, 3, 4, 5 LIMIT {MAX_CAUSES}
        """,
        names,
    )
    columns = ("account_id", "region", "cause_kind", "cause", "tag_key", "number")
    return [
        Cause(Target(*row[:2]), Group(*row[2:4]), *row[4:]) for row in (checked_row(columns, r) for r in rows)
    ]


@contextlib.contextmanager
def reading_state(state: State, copy: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection on which a state stays as it is now, for reading; raises StateError.

    One of an older version is brought up to date in a copy: to read writes nothing.
    """
    path = state.path
    if isinstance(state, S3State):
        state.check()
    elif not _exists(path):
        raise _missing(path)
    else:
        with opened_state(path, state.name) as db:
            version = _state_version(db, state.name)
        if version < len(MIGRATIONS):
            copy_state(path, copy)
            check_state(copy, state.name)
            path = copy
    with opened_state(path, state.name) as db:
        db.execute("BEGIN")
        _state_version(db, state.name)
        yield db


def require_policy(db: sqlite3.Connection, name: Path | str, policy: str) -> None:
    """Raise StateError where a state has no scan of a policy; the message names the policies that it has."""
    names = fetch_policies(db)
    if policy not in names:
        shown = ", ".join(map(repr, names[:20])) + (", …" if len(names) > 20 else "")
        has = (
            f"it has scans of {shown}: name that policy's file with --policy" if names else "run a scan first"
        )
        raise StateError(f"the state {name} has no scan of the policy {policy!r}; {has}")


def fetch_policies(db: sqlite3.Connection) -> list[str]:
    """Return the names of the policies that a state has scans of, sorted."""
    rows = db.execute("SELECT DISTINCT policy FROM scans ORDER BY policy")
    return [checked_row(("policy",), row)[0] for row in rows]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which findings of a policy are asked for; what is left empty restricts nothing."""

    policy: str
    instance_id: str | None = None
    accounts: Sequence[str] = ()
    regions: Sequence[str] = ()
    statuses: Sequence[str] = ()
    tag_keys: Sequence[str] = ()
    first_seen_before: datetime | None = None


def fetch_history(db: sqlite3.Connection, selection: Selection) -> Iterator[Finding]:
    """Yield the findings that a state keeps, the open ones first and of these the oldest."""
    conditions, values = ["policy = ?"], [selection.policy]
    for column in ("accounts", "regions", "statuses"):
        if wanted := getattr(selection, column):
            name = {"accounts": "account_id", "regions": "region", "statuses": "status"}[column]
            conditions.append(f"{name} IN ({', '.join('?' * len(wanted))})")
            values += wanted
    if selection.tag_keys:
        conditions.append(
            f"EXISTS (SELECT 1 FROM json_each(tag_keys) WHERE value IN ({', '.join('?' * len(selection.tag_keys))}))"
        )
        values += selection.tag_keys
    if selection.instance_id:
        conditions.append("instance_id = ?")
        values.append(selection.instance_id)
    if selection.first_seen_before:
        conditions.append("first_seen < ?")
        values.append(utc_text(selection.first_seen_before))
    # Only what orders them is sorted, not the findings themselves, which are a hundred times as much.
    numbers = db.execute(
        f"SELECT id FROM findings WHERE {' AND '.join(conditions)} "
        "ORDER BY resolved_at IS NOT NULL, coalesce(resolved_at, first_seen), account_id, region, instance_id",
        values,
    )
    for number in numbers:
        query = f"SELECT {_FINDING} FROM findings AS finding WHERE id = ?"
        yield _load_finding(db.execute(query, number).fetchone())


def fetch_events(db: sqlite3.Connection, policy: str, finding: Finding) -> list[Event]:
    """Return what became of a finding, from NEW on."""
    rows = db.execute(
        "SELECT at, event, before, events.resolution FROM events JOIN findings ON findings.id = events.finding "
        "WHERE policy = ? AND (account_id, region, instance_id) = (?, ?, ?) ORDER BY events.id",
        (policy, finding.account_id, finding.region, finding.instance_id),
    ).fetchall()
    for row in rows:
        checked_row(("at", "event", "resolution"), (row[0], row[1], row[3]))
    befores = [_load_violations(row[2]) if row[2] is not None else () for row in rows]
    # An event keeps what was lacking before it; so what was lacking after it stands in the next one.
    afters = [*befores, finding.violations]
    events = [Event(finding.first_seen, Status.NEW, next(filter(None, afters)), None)]
    for (at, event, _, resolution), after in zip(rows, afters[1:], strict=True):
        ended = event == Status.RESOLVED
        events.append(
            Event(at, event, () if ended else after, Resolution(resolution) if resolution else None)
        )
    return events


def fetch_standings(db: sqlite3.Connection, policy: str) -> tuple[list[TrendPoint], list[Standing]]:
    """Return what was open after each scan of a policy, and how each target stands; sorted."""
    rows = db.execute(
        "SELECT at, open, new, reopened, resolved, targets, targets_unread FROM trend WHERE policy = ? ORDER BY at",
        (policy,),
    )
    trend = [TrendPoint(*checked_row(_TREND, row)) for row in rows]
    pruned_until = trend[-1].at if trend else ""
    standings: dict[Target, Standing] = {}
    total = 0
    rows = db.execute(
        "SELECT scans.started_at, account_id, region, error_code, error_message, instances, compliant, findings, "
        "exempted, new, reopened, resolved FROM scans JOIN coverage ON scan = scans.id WHERE policy = ? "
        "ORDER BY scans.started_at, scans.id, account_id, region",
        (policy,),
    )
    for at, targets in itertools.groupby(rows, key=lambda row: row[0]):
        counts: Counter[str] = Counter()
        for row in targets:
            _, account_id, region, code, message, *numbers, new, reopened, resolved = checked_row(
                _STANDING, row
            )
            if sum(numbers[1:]) > numbers[0] or new + reopened > numbers[2]:
                raise _BadRowError(f"the counts of {account_id} {region} at {at} contradict each other")
            target = Target(account_id, region)
            before = standings.get(target)
            if code is None:
                total += numbers[2] - (before.findings if before else 0)
                standings[target] = Standing(target, None, at, *numbers)
            else:
                standing = before or Standing(target, None, None, 0, 0, 0, 0)
                standings[target] = replace(standing, error=f"{code}: {message}")
            counts.update(targets=1, unread=code is not None, new=new, reopened=reopened, resolved=resolved)
        if at > pruned_until:
            changes = (counts["new"], counts["reopened"], counts["resolved"])
            trend.append(TrendPoint(at, total, *changes, counts["targets"], counts["unread"]))
    return trend, sorted(standings.values(), key=lambda standing: standing.target)


_TREND = ("at", "open", "new", "reopened", "resolved", "targets", "targets_unread")
_STANDING = (
    "started_at account_id region error_code error_message instances compliant findings exempted new reopened "
    "resolved"
).split()


# The upper ends of the ages that are counted together, in days.
AGES = (
    (1, "up to 1 day"),
    (7, "2 to 7 days"),
    (30, "8 to 30 days"),
    (90, "31 to 90 days"),
    (365, "91 to 365 days"),
)
OLDER = "over a year"
OLDEST_FINDINGS = 25


@dataclass(frozen=True, slots=True)
class OpenFindings:
    """The open findings of a policy, counted in several ways; each list has the greatest first."""

    total: int
    by_tag: Sequence[tuple[str, int]]
    by_age: Sequence[tuple[str, int]]
    by_creator: Sequence[tuple[str, int]]
    by_owner: Sequence[tuple[str, int]]
    causes: Sequence[Cause]
    oldest: Sequence[Finding]
    priced: int
    cost_by_tag: Sequence[tuple[str, float]]
    by_operator: Sequence[tuple[str, int]]


def fetch_open(db: sqlite3.Connection, policy: str, owner_tag: str, now: datetime) -> OpenFindings:
    """Count the open findings of a policy; `owner_tag` is the tag that says whom to ask, or would."""
    names = {"policy": policy, "owner": owner_tag, "unknown": f"{UNKNOWN}%", "sure": MIN_CONFIDENCE}
    names["owner_path"] = None if '"' in owner_tag else f'$."{owner_tag}"'  # SQLite's paths know no escape
    names |= {f"age{days}": utc_text(now - timedelta(days=days)) for days, _ in AGES}
    # The findings are read once, for what is counted: a million of them are a gigabyte.
    db.execute(
        """
        CREATE TEMP TABLE open AS
        SELECT id, account_id, region, instance_id, first_seen, tag_keys, created_by, cause_kind, cause,
            monthly_cost, managed_by, CASE
                WHEN :owner NOT IN (SELECT value FROM json_each(tag_keys)) THEN json_extract(tags, :owner_path)
                ELSE (
                    SELECT json_extract(value, '$.value') FROM json_each(suggestions)
                    WHERE json_extract(value, '$.tag_key') = :owner AND json_extract(value, '$.confidence') >= :sure
                )
            END AS owner
        FROM findings WHERE policy = :policy AND resolved_at IS NULL
        """,
        names,
    )
    # What checked_row does with the rows that are loaded, in SQL, as these are only counted.
    bad = db.execute(
        f"""
        SELECT id FROM temp.open WHERE typeof(account_id) <> 'text' OR typeof(region) <> 'text'
            OR typeof(instance_id) <> 'text' OR typeof(first_seen) <> 'text' OR typeof(tag_keys) <> 'text'
            OR typeof(created_by) NOT IN ('text', 'null') OR typeof(owner) NOT IN ('text', 'null')
            OR typeof(managed_by) NOT IN ('text', 'null')
            OR typeof(monthly_cost) NOT IN ('real', 'integer', 'null')
            OR monthly_cost NOT BETWEEN 0 AND {sys.float_info.max}
            OR first_seen NOT GLOB '????-??-??T??:??:??Z'
        LIMIT 1
        """
    ).fetchone()
    if bad:
        raise _BadRowError(f"the finding with the id {bad[0]} has a value that its column does not hold")

    def counts(what: str, where: str = "1") -> list[tuple[str, int]]:
        query = f"SELECT {what}, count(*) FROM temp.open WHERE {where} GROUP BY 1 ORDER BY 2 DESC, 1"
        return db.execute(query, names).fetchall()

    age = "".join(f"WHEN first_seen >= :age{days} THEN '{label}' " for days, label in AGES)
    by_age = dict(counts(f"CASE {age} ELSE '{OLDER}' END"))
    tags = db.execute(
        """
        SELECT tag_key.value, sum(number), sum(cost) FROM (
            SELECT tag_keys, count(*) AS number, coalesce(sum(monthly_cost), 0) AS cost FROM temp.open GROUP BY 1
        ) CROSS JOIN json_each(tag_keys) AS tag_key GROUP BY 1 ORDER BY 2 DESC, 1
        """
    ).fetchall()
    tags = [checked_row(("tag_key", "number", "cost"), row) for row in tags]
    total, priced = db.execute("SELECT count(*), count(monthly_cost) FROM temp.open").fetchone()
    oldest = db.execute(
        f"""
        SELECT {_FINDING} FROM (
            SELECT * FROM temp.open ORDER BY first_seen, account_id, region, instance_id LIMIT {OLDEST_FINDINGS}
        ) AS oldest CROSS JOIN findings AS finding USING (id)
        ORDER BY finding.first_seen, finding.account_id, finding.region, finding.instance_id
        """
    )
    return OpenFindings(
        total,
        by_tag=[(key, number) for key, number, _ in tags],
        by_age=[(label, by_age.get(label, 0)) for label in (*(label for _, label in AGES), OLDER)],
        by_creator=counts("created_by", "created_by NOT LIKE :unknown"),
        by_owner=counts("owner", "owner IS NOT NULL"),
        causes=_causes(db, "FROM temp.open AS finding", names),
        oldest=[*map(_load_finding, oldest)],
        priced=priced,
        cost_by_tag=sorted(((key, cost) for key, _, cost in tags if priced), key=lambda pair: -pair[1]),
        by_operator=counts("managed_by", "managed_by <> ''"),
    )


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was deleted, or would be."""

    findings: int
    scans: int
    coverage: int


def prune_state(path: Path, before: datetime, name: str) -> Pruned:
    """Delete from a state what is older than a time, and give back the room; raises StateError."""
    with opened_state(path, name) as db:
        with writing_state(db, name):
            pruned = _prune(db, before)
        free, pages = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_count")
        )
        if free > pages / 4:
            try:
                db.execute("VACUUM")
            except sqlite3.OperationalError as error:  # it needs the room of a copy, for a moment
                LOG.info("the file keeps its size: %s", error)
    return pruned


def _prune(db: sqlite3.Connection, before: datetime) -> Pruned:
    """Delete findings resolved before a time, and scans; the trend keeps a row a day.

    What a target's last full reading found stays, however old: of a target that cannot be read any more it is
    all that is known.
    """
    names = {"before": utc_text(before)}
    for (policy,) in db.execute("SELECT DISTINCT policy FROM scans").fetchall():
        points = [point for point in fetch_standings(db, policy)[0] if point.at < names["before"]]
        for day, group in itertools.groupby(points, key=lambda point: point.at[:10]):
            *earlier, last = group
            changes = {
                name: sum(getattr(point, name) for point in (*earlier, last))
                for name in ("new", "reopened", "resolved")
            }
            row = (policy, day, *astuple(replace(last, **changes)))
            db.execute("INSERT OR REPLACE INTO trend VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    resolved = "FROM findings WHERE resolved_at < :before"
    db.execute(f"DELETE FROM events WHERE finding IN (SELECT id {resolved})", names)
    findings = db.execute(f"DELETE {resolved}", names).rowcount
    coverage = db.execute(
        """
        DELETE FROM coverage WHERE scan IN (SELECT id FROM scans WHERE started_at < :before)
            AND (scan, account_id, region) NOT IN (
                SELECT max(scan), account_id, region FROM coverage JOIN scans ON scans.id = scan
                WHERE coverage.status = 'read' AND started_at < :before GROUP BY policy, account_id, region
            )
        """,
        names,
    ).rowcount
    scans = db.execute(
        "DELETE FROM scans WHERE started_at < :before AND id NOT IN (SELECT scan FROM coverage) "
        "AND id NOT IN (SELECT last_scan FROM findings)",
        names,
    ).rowcount
    return Pruned(findings, scans, coverage)


def queue_notifications(db: sqlite3.Connection, scan: Scan, endings: Sequence[str]) -> None:
    """Record, in the transaction of a scan, what each channel has to be sent: it is pending until it is sent.

    That is a finding when it opens, an unread target once until it is read, the end of an exemption once.
    """
    notify = scan.policy.notify or Notify()
    names = _names(db, scan) | {"channels": to_json(notify.channels), "endings": to_json(endings)}
    unread = "SELECT 'unread ' || account_id || ' ' || region FROM target WHERE error_code IS NOT NULL"
    db.execute(
        f"""
        DELETE FROM state.notifications WHERE policy = :policy AND subject IN (
            SELECT {_FINDING_SUBJECT} FROM resolved JOIN state.findings AS finding ON id = resolved.finding
            UNION ALL SELECT 'unread ' || account_id || ' ' || place.value
                FROM target, json_each(json_array(region, '*')) AS place WHERE error_code IS NULL
            EXCEPT {unread}
        )
        """,
        names,
    )
    opened = f"SELECT {_FINDING_SUBJECT} AS subject {_SEEN} WHERE finding.status IN ('NEW', 'REOPENED')"
    others = f"SELECT value AS subject FROM json_each(:endings) UNION ALL {unread}"
    for conflict, subjects in (("REPLACE", opened), ("IGNORE", others)):
        db.execute(
            f"INSERT OR {conflict} INTO state.notifications SELECT :policy, subject, channel.value, NULL "
            f"FROM ({subjects}) CROSS JOIN json_each(:channels) AS channel",
            names,
        )


def fetch_pending(db: sqlite3.Connection, policy: str, subject: str) -> set[str]:
    """Return the channels that a subject is pending for."""
    query = "SELECT channel FROM state.notifications WHERE policy = ? AND subject = ? AND told_at IS NULL"
    return {channel for (channel,) in db.execute(query, (policy, subject))}


DigestLine = tuple[str, str, str | None, str | None]  # the columns of `digest_line`


def add_digest_lines(db: sqlite3.Connection, lines: Iterable[DigestLine]) -> None:
    """Keep what belongs in digests until they are sent."""
    db.execute("DELETE FROM digest_line")
    db.executemany("INSERT INTO digest_line VALUES (?, ?, ?, ?)", lines)


def fetch_digests(db: sqlite3.Connection, channel: str, limit: int) -> Iterator[tuple[str, int, list[str]]]:
    """Yield each recipient of a channel, the number of its findings, and the lines of the first ones."""
    recipients = "SELECT recipient, count(line) FROM digest_line WHERE channel = ? GROUP BY 1 ORDER BY 1"
    lines = "FROM digest_line WHERE (channel, recipient) = (?, ?) AND line <> '' ORDER BY rowid LIMIT ?"
    for to, number in db.execute(recipients, (channel,)):
        yield to, number, [line for (line,) in db.execute(f"SELECT line {lines}", (channel, to, limit))]


def drop_digest(db: sqlite3.Connection, channel: str, recipient: str) -> None:
    """Forget what could not be sent, so that it stays pending."""
    db.execute("DELETE FROM digest_line WHERE (channel, recipient) = (?, ?)", (channel, recipient))


def record_sent(db: sqlite3.Connection, state: State, policy: str, channel: str, sent_at: datetime) -> None:
    """Record in the state that a channel was sent what `digest_line` still has; raises StateError."""
    sent = "SELECT ?, ?, channel, subject FROM digest_line WHERE channel = ? AND subject IS NOT NULL"
    values = (utc_text(sent_at), policy, channel)
    for path in state.attempts() if db.execute(sent, values).fetchone() else ():
        with opened_state(path, path) as copy, writing_state(copy, path):
            query = "UPDATE notifications SET told_at = ? WHERE policy = ? AND channel = ? AND subject = ?"
            copy.executemany(query, db.execute(sent, values))


_FINDING_SUBJECT = "'finding ' || finding.account_id || ' ' || finding.region || ' ' || finding.instance_id"
_FINDING_COLUMNS = (
    "account_id region instance_id state launch_time status first_seen last_seen times_seen times_reopened "
    "resolved_at resolution created_by instance_type cause_kind monthly_cost managed_by cause"
).split()
_FINDING = ", ".join(
    f"finding.{column}" for column in (*_FINDING_COLUMNS, "tags", "violations", "suggestions")
)


def _load_finding(row: Sequence[Any]) -> Finding:
    """Build a Finding from the columns of _FINDING; raises _BadRowError."""
    *columns, tags_text, violations, suggestions = row
    values = dict(zip(_FINDING_COLUMNS, checked_row(_FINDING_COLUMNS, columns), strict=True))
    status, ended, kind, cause = (values.pop(c) for c in ("status", "resolution", "cause_kind", "cause"))
    if len({status == Status.RESOLVED, ended is not None, values["resolved_at"] is not None}) > 1:
        raise _BadRowError(f"status is {status}, and resolved_at {values['resolved_at']}")
    if (kind is None) is not (cause is None):
        raise _BadRowError(f"cause_kind is {kind!r}, and cause {cause!r:.80}")
    tags = _load_json("tags", tags_text, dict)
    if not all(type(value) is str for value in tags.values()):
        raise _BadRowError(f"tags is {tags_text!r:.80}")
    rows = _load_records("suggestions", suggestions, _SUGGESTION) if suggestions is not None else ()
    return Finding(
        **values,
        tags=tags,
        violations=_load_violations(violations),
        status=Status(status),
        resolution=Resolution(ended) if ended else None,
        suggestions=tuple(Suggestion(*columns) for columns in rows),
        cause=Group(kind, cause) if kind else None,
    )


_SUGGESTION = {"tag_key": "tag_key", "value": "message", "confidence": "confidence", "evidence": "evidence"}


########################################################################################################
# 7 Reports: write_csv, write_json, write_junit, write_summary, table_lines, explain, history_lines, Output
########################################################################################################


@dataclass(frozen=True, slots=True)
class ScanReport:
    """Everything the reports of one scan show; findings are streamed, sorted, on every call."""

    scan: Scan
    finished_at: datetime
    dry_run: bool
    exit_code: ExitCode
    coverage: Sequence[Coverage]
    findings: Callable[[], Iterator[Finding]]
    resolved: Callable[[], Iterator[Finding]]
    exempted: Callable[[], Iterator[ExemptedInstance]]
    causes: Sequence[Cause]
    costs: Sequence[tuple[str, float]]
    unpriced: int
    operators: Sequence[tuple[str, int]]
    notices: Sequence[str]

    @property
    def unread(self) -> list[Coverage]:
        """The targets that could not be read in full."""
        return [target for target in self.coverage if not target.read]

    @property
    def totals(self) -> dict[str, int]:
        """The counts of all targets together, named as in the JSON."""
        counts = "instances compliant findings new repeat reopened resolved exempted too_young".split()
        return {
            "targets": len(self.coverage),
            "targets_unread": len(self.unread),
            **{name: sum(getattr(target, name) for target in self.coverage) for name in counts},
            "findings_managed": sum(number for _, number in self.operators),
        }


@dataclass(frozen=True, slots=True)
class HistoryReport:
    """Findings from a state; for one instance also its events, and the tags that were written."""

    policy: str
    findings: Callable[[], Iterator[Finding]]
    events: Callable[[Finding], Sequence[Event]] | None
    changes: Sequence[Change]
    unread: Sequence[Coverage] = ()  # nothing is read for a history; write_csv asks


CSV_COLUMNS = tuple(
    "InstanceId MissingTags LaunchTime InvalidTags Status FirstSeen LastSeen TimesSeen AccountId Region Name "
    "State CreatedBy SuggestedTags Error ManagedBy".split()
)


def write_csv(file: TextIOBase, report: ScanReport | HistoryReport) -> None:
    """Write one row per finding and, so that none looks clean, one per unread target (Status UNREAD)."""
    file.write(csv_line(CSV_COLUMNS))
    for cells in itertools.chain(map(_finding_cells, report.findings()), map(_unread_cells, report.unread)):
        file.write(csv_line(cells.get(column, "") for column in CSV_COLUMNS))


def _finding_cells(finding: Finding) -> dict[str, str]:
    """Return a finding's cells by column; an empty tag counts as missing, a wrong value as invalid."""
    wrong = ViolationType.NONCOMPLIANT_VALUE
    return {
        "InstanceId": finding.instance_id,
        "MissingTags": ",".join(v.tag_key for v in finding.violations if v.type is not wrong),
        "LaunchTime": _csv_time(finding.launch_time),
        "InvalidTags": ",".join(f"{v.tag_key}={v.value}" for v in finding.violations if v.type is wrong),
        "Status": finding.status,
        "FirstSeen": _csv_time(finding.first_seen),
        "LastSeen": _csv_time(finding.last_seen),
        "TimesSeen": str(finding.times_seen),
        "AccountId": finding.account_id,
        "Region": finding.region,
        "Name": finding.name,
        "State": finding.state,
        "CreatedBy": finding.created_by or "",
        "SuggestedTags": ", ".join(map(str, finding.suggestions)),
        "ManagedBy": finding.managed_by or "",
    }


def _unread_cells(coverage: Coverage) -> dict[str, str]:
    """Return the cells of a target that could not be read."""
    where = {"AccountId": coverage.target.account_id, "Region": coverage.target.region}
    return {"Status": "UNREAD", **where, "Error": f"{coverage.error_code}: {coverage.error_message}"}


def _csv_time(text: str) -> str:
    """Return a time as spreadsheets read it: 2026-02-24 10:30:45."""
    return text.replace("T", " ").removesuffix("Z")


# A spreadsheet that splits at another character than a comma ignores quotes within a cell: it also splits our
# quoted cells there, and may take what follows for a formula.
_SPLIT, _FORMULA = "(^|[;|\t])", "[ \"']*[=+\\-@＝＋－＠]"
_MAY_SPLIT = re.compile(f"[;|\t]|^{_FORMULA}")  # a fast look: few cells have any of these
_FORMULA_PLACE = re.compile(f"{_SPLIT}(?={_FORMULA})")
_ESCAPED_PLACE = re.compile(f"{_SPLIT}'(?={_FORMULA})")
_QUOTED = re.compile('[,;|\t"\r\n]')


def csv_cell(text: str) -> str:
    """Return text that no spreadsheet takes for a formula (OWASP, CSV injection; ASVS 1.2.10)."""
    # A text that has such a ' itself gets another, so that csv_text tells them apart.
    shown = printable(text)
    return _FORMULA_PLACE.sub(r"\1'", shown) if _MAY_SPLIT.search(shown) else shown


def csv_text(cell: str) -> str:
    """Return the printable text that csv_cell turned into this cell."""
    return _ESCAPED_PLACE.sub(r"\1", cell)


def csv_line(texts: Iterable[str]) -> str:
    """Return a line of a CSV file; a cell that holds any usual separator is quoted."""
    cells = map(csv_cell, texts)
    quoted = ('"' + cell.replace('"', '""') + '"' if _QUOTED.search(cell) else cell for cell in cells)
    return f"{','.join(quoted)}\n"


def picked(record: Any, names: Iterable[str] = ()) -> dict[str, Any]:
    """Return these fields of a record, by default all those of a dataclass with slots, as a JSON object."""
    return {name: getattr(record, name) for name in names or record.__slots__}


_encode = json.JSONEncoder(
    default=picked
).encode  # violations, suggestions, events and changes are dataclasses


def write_json_object(file: TextIOBase, head: Mapping[str, Any], **lists: Iterable[object]) -> None:
    """Write an object: the keys of its head, then its lists, one line per record, which are streamed."""
    separator = "{\n"
    for key, value in head.items():
        file.write(f"{separator}{_encode(key)}: {_encode(value)}")
        separator = ",\n"
    for key, records in lists.items():
        file.write(f"{separator}{_encode(key)}: [")
        for number, record in enumerate(records):
            file.write((",\n" if number else "\n") + _encode(record))
        file.write("]")
    file.write("\n}\n")


def write_json(file: TextIOBase, report: ScanReport) -> None:
    """Write the report as one JSON object, with one line per target and per finding."""
    scan = report.scan
    head = {
        "version": __version__,
        "policy": picked(scan.policy, ("name", "file", "digest")),
        "scan_id": scan.scan_id,
        "started_at": utc_text(scan.started_at),
        "finished_at": utc_text(report.finished_at),
        "dry_run": report.dry_run,
        "exit_code": int(report.exit_code),
        "exit_name": report.exit_code.name,
        "summary": report.totals,
        "monthly_cost_without": dict(report.costs),
        "notices": list(report.notices),
    }
    if report.dry_run:
        head["preview"] = _preview(report)
    write_json_object(
        file,
        head,
        coverage=map(_coverage_record, report.coverage),
        causes=map(_cause_record, report.causes),
        findings=map(_finding_record, report.findings()),
        resolved=map(_finding_record, report.resolved()),
        exempted=map(_exempted_record, report.exempted()),
    )


def write_history_json(file: TextIOBase, report: HistoryReport) -> None:
    """Write findings as a scan's JSON has them; for one instance with its events and changes."""

    def record(finding: Finding) -> dict[str, Any]:
        if not report.events:
            return _finding_record(finding)
        changes = [change for change in report.changes if change.target == finding.target]
        return _finding_record(finding) | {"events": report.events(finding), "changes": changes}

    head = {"version": __version__, "policy": report.policy}
    write_json_object(file, head, findings=map(record, report.findings()))


def _coverage_record(coverage: Coverage) -> dict[str, Any]:
    """Return how far a target was read as a JSON object."""
    error = None if coverage.read else {"code": coverage.error_code, "message": coverage.error_message}
    status = {"status": "read" if coverage.read else "unread", "error": error}
    counts = picked(coverage, ("instances", "compliant", "findings", "exempted", "too_young"))
    return picked(coverage.target) | status | counts


def _cause_record(cause: Cause) -> dict[str, Any]:
    """Return what findings have in common as a JSON object."""
    what = {"tag_key": cause.tag_key, "instances": cause.instances, "message": str(cause)}
    return picked(cause.target) | cause.group._asdict() | what


_FINDING_KEYS = (
    "account_id region instance_id name state launch_time status violations first_seen last_seen times_seen "
    "times_reopened instance_type monthly_cost managed_by created_by cause suggestions"
).split()


def _finding_record(finding: Finding) -> dict[str, Any]:
    """Return a finding as a JSON object; a resolved one says when and why it was resolved."""
    ending = ("resolved_at", "resolution") if finding.status is Status.RESOLVED else ()
    plain = {"managed_by": finding.managed_by or None, "cause": finding.cause and finding.cause._asdict()}
    return picked(finding, [*_FINDING_KEYS, *ending]) | plain


def _exempted_record(exempted: ExemptedInstance) -> dict[str, Any]:
    """Return an exempted instance as a JSON object."""
    where = picked(exempted, ("account_id", "region", "instance_id"))
    instance = {"name": exempted.tags.get("Name", ""), **picked(exempted, ("state", "launch_time"))}
    return where | instance | {"violations": [exempted_record(case) for case in exempted.exempted]}


def _preview(report: ScanReport) -> dict[str, dict[str, int]]:
    """Return, tag by tag, how many findings the scan opens, and how many it closes as policy_changed."""
    opened = (finding for finding in report.findings() if finding.status is Status.NEW)
    closed = (finding for finding in report.resolved() if finding.resolution is Resolution.POLICY_CHANGED)
    counts = {}
    for change, findings in (("new", opened), ("policy_changed", closed)):
        tag_keys = Counter(violation.tag_key for finding in findings for violation in finding.violations)
        counts[change] = dict(tag_keys.most_common())
    return counts


def write_junit(file: TextIOBase, report: ScanReport) -> None:
    """Write one suite per target: its `scan` case, so that a clean one is not empty, and a case per finding.

    Jenkins keeps a case's history under its name, so names hold no counts and no dates.
    """
    xml = XMLGenerator(file, encoding="UTF-8", short_empty_elements=True)
    xml.startDocument()
    totals = report.totals
    attributes = {
        "name": "tagcheck",
        "tests": totals["targets"] + totals["findings"] + totals["exempted"],
        "failures": totals["findings"],
        "errors": totals["targets_unread"],
        "time": f"{(report.finished_at - report.scan.started_at).total_seconds():.3f}",
    }
    with _element(xml, "testsuites", attributes):
        # All three are sorted by place, and a target comes right before the cases in it.
        cases: Iterator[Case] = heapq.merge(report.coverage, report.findings(), report.exempted(), key=_place)
        for _, group in itertools.groupby(cases, key=lambda case: _place(case)[:2]):
            _write_suite(xml, group, utc_text(report.scan.started_at).removesuffix("Z"))
    xml.endDocument()


Case = Coverage | Finding | ExemptedInstance


def _place(case: Case) -> tuple[str, str, str]:
    """Return what cases are sorted by: account, region and instance."""
    if isinstance(case, Coverage):
        return case.target.account_id, case.target.region, ""
    return case.account_id, case.region, case.instance_id


def _write_suite(xml: XMLGenerator, cases: Iterator[Case], timestamp: str) -> None:
    """Write the suite of the target that comes first among these cases."""
    target = next(cases)
    assert isinstance(target, Coverage)
    attributes = {
        "name": f"{target.target.account_id}.{target.target.region}",
        "tests": 1 + target.findings + target.exempted,
        "failures": target.findings,
        "errors": int(not target.read),
        "skipped": target.exempted,
        "time": 0,
        "timestamp": timestamp,
    }
    with _element(xml, "testsuite", attributes):
        for case in itertools.chain([target], cases):
            name = _place(case)[2] or "scan"
            with _element(xml, "testcase", {"classname": attributes["name"], "name": name, "time": 0}):
                _write_outcome(xml, case)


def _write_outcome(xml: XMLGenerator, case: Case) -> None:
    """Write the error of an unread target, the failure of a finding, or why an instance is exempted."""
    if isinstance(case, Coverage):
        if not case.read:
            error = {"type": case.error_code or "", "message": case.error_message or ""}
            with _element(xml, "error", error):
                pass
    elif isinstance(case, ExemptedInstance):
        with _element(xml, "skipped", {"message": "; ".join(map(str, case.exempted))}):
            pass
    else:
        messages = [violation.message for violation in case.violations]
        types = dict.fromkeys(violation.type for violation in case.violations)
        with _element(xml, "failure", {"type": ",".join(types), "message": "; ".join(messages)}):
            history = f"{case.status}, seen {counted(case.times_seen, 'time')} since {case.first_seen}"
            lines = [f"{case.instance_id} {case.name} ({case.state})", history, *messages]
            xml.characters("\n".join(map(printable, lines)))


@contextlib.contextmanager
def _element(xml: XMLGenerator, name: str, attributes: Mapping[str, object]) -> Iterator[None]:
    """Write an element around what the body of the `with` writes; XML has no place for most controls."""
    xml.startElement(name, AttributesImpl({key: printable(str(value)) for key, value in attributes.items()}))
    try:
        yield
    finally:
        xml.endElement(name)
        xml.characters("\n")


# A new format needs its writer, its row here, and its option in the lists of the command line.
WRITERS = {"csv": write_csv, "json": write_json, "junit": write_junit}
HISTORY_WRITERS = {"csv": write_csv, "json": write_history_json}

SUMMARY_FINDINGS = 20  # rows of a table that people read
SUMMARY_CAUSES = 5
TABLE_HEAD = ("STATUS", "ACCOUNT", "REGION", "INSTANCE", "NAME", "SINCE", "VIOLATIONS")
COLOURS = {"NEW": 31, "RESOLVED": 32, "REPEAT": 33, "REOPENED": 35, "EXEMPTED": 36}
COLOURS |= {"VIOLATIONS": 31, "COMPLIANT": 32, "INCOMPLETE": 33}
_COLOURED = re.compile(rf"^(Exit code \d+ )?({'|'.join(COLOURS)})\b", re.MULTILINE)


def in_columns(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a line per row with its cells aligned, laying out 1,000 rows at a time."""
    rows = iter(rows)
    former: list[list[str]] = []
    while block := [[*map(printable, row)] for row in itertools.islice(rows, 1000)]:
        widths = [max(map(len, column)) for column in zip(*former, *block, strict=True)]
        former = [[" " * width for width in widths]]  # the next block is no narrower
        for row in block:
            yield "  ".join(map(str.ljust, row, widths)).rstrip()


def table_lines(
    rows: Iterable[Sequence[str]], number: int, head: Sequence[str] = (), file: str = ""
) -> list[str]:
    """Return the first of so many rows under their head, and how many more there are, in which file."""
    shown = list(itertools.islice(rows, SUMMARY_FINDINGS))
    titles = [head] if head and shown else []
    return [*in_columns([*titles, *shown]), *more_lines(number - len(shown), file)]


def more_lines(number: int, file: str = "") -> list[str]:
    """Return the line that says how many more there are, and in which file; no line if there are none."""
    where = f" in {file}" if file not in ("", "-") else ""
    return [f"… and {number:,} more{where}"] if number > 0 else []


def count_lines(totals: Mapping[str, int]) -> list[str]:
    """Return what a scan read and what it found, in two lines."""
    read = totals["targets"] - totals["targets_unread"]
    others = (("too_young", "too young to judge"), ("exempted", "exempted"))
    more = "".join(f", {totals[name]:,} {words}" for name, words in others if totals[name])
    return [
        f"{read:,} of {counted(totals['targets'], 'target')} read, "
        f"{counted(totals['instances'], 'instance')}, {totals['compliant']:,} compliant{more}",
        f"{counted(totals['findings'], 'finding')}: {totals['new']:,} NEW, {totals['repeat']:,} REPEAT, "
        f"{totals['reopened']:,} REOPENED; {totals['resolved']:,} RESOLVED since the last scan",
    ]


def write_summary(file: IO[str], report: ScanReport, csv_path: str, *, colour: bool) -> None:
    """Write for people what was scanned, what was found, what was not read, and how the run ends."""
    paragraphs = ["\n".join(map(printable, lines)) for lines in _summary(report, csv_path) if lines]
    text = "\n\n".join(paragraphs) + "\n"
    if colour:
        text = _COLOURED.sub(lambda word: f"{word[1] or ''}\x1b[{COLOURS[word[2]]}m{word[2]}\x1b[0m", text)
    file.write(text)


def _summary(report: ScanReport, csv_path: str) -> Iterator[Sequence[str]]:
    """Yield the paragraphs of the summary, an empty one where there is nothing to say."""
    policy, totals, code = report.scan.policy, report.totals, report.exit_code
    read, found = count_lines(totals)
    dry_run = " — a dry run, nothing is recorded" if report.dry_run else ""
    yield [f"Policy {policy.name} ({policy.file}): {read}{dry_run}", found]
    yield table_lines(map(_finding_row, report.findings()), totals["findings"], TABLE_HEAD, csv_path)
    yield list(itertools.islice(cause_lines(report.causes), SUMMARY_CAUSES))
    managed = totals["findings_managed"]
    are = "is on an instance" if managed == 1 else "are on instances"
    services = ", ".join(f"{service} ({number:,})" for service, number in report.operators)
    yield [f"{counted(managed, 'finding')} {are} that an AWS service operates: {services}"] if managed else []
    unpriced = f" ({counted(report.unpriced, 'finding')} without a price left out)" if report.unpriced else ""
    yield [f"{cost:,.2f} a month without {tag_key}{unpriced}" for tag_key, cost in report.costs]
    resolved = (_row(finding.status, finding, finding.resolution or "") for finding in report.resolved())
    yield table_lines(resolved, totals["resolved"])
    whys = ((case, dict.fromkeys(map(str, case.exempted))) for case in report.exempted())
    yield table_lines((_row("EXEMPTED", case, "; ".join(why)) for case, why in whys), totals["exempted"])
    for change, numbers in _preview(report).items() if report.dry_run else ():
        title = "RESOLVED as policy_changed" if change == "policy_changed" else "NEW"
        lines = [f"  {number:>9,}  {tag_key}" for tag_key, number in numbers.items()]
        yield lines and [f"Findings that would be {title}, by required tag:", *lines]
    yield report.notices
    unread = [f"  {target.target}  {target.error_code}: {target.error_message}" for target in report.unread]
    yield unread and ["Could not be read (their findings are unchanged):", *unread]
    yield [f"Exit code {int(code)} {code.name}: {code.meaning}"]


def _finding_row(finding: Finding) -> tuple[str, ...]:
    """Return a finding as a row of the summary."""
    since = "-" if finding.status is Status.NEW else finding.first_seen[:10]
    return _row(finding.status, finding, since, ", ".join(short_violations(finding)))


def name_cell(name: str) -> str:
    """Return a name as a table shows it: cut if it is long, a dash if there is none."""
    return cut_text(name, 24) or "-"


def _row(status: str, case: Finding | ExemptedInstance, *more: str) -> tuple[str, ...]:
    """Return a row of a table: what became of an instance, where it is, its name, and what more is to say."""
    return status, *_place(case), name_cell(case.tags.get("Name", "")), *more


def short_violations(finding: Finding) -> list[str]:
    """Return violations in a few words: "Environment=prd (prod?)", "Owner missing (has owner; alice?)"."""
    likely = {s.tag_key: s.value for s in finding.suggestions if s.confidence >= MIN_CONFIDENCE}
    texts = []
    for violation in finding.violations:
        wrong = violation.type is ViolationType.NONCOMPLIANT_VALUE
        what = f"={cut_text(violation.value or '', 40)}" if wrong else f" {violation.type}"
        notes = [f"has {cut_text(violation.found_key, 40)}"] if violation.found_key else []
        if violation.tag_key in likely:
            notes.append(f"{cut_text(likely[violation.tag_key], 40)}?")
        texts.append(violation.tag_key + what + (f" ({'; '.join(notes)})" if notes else ""))
    return texts


def explain_region(policy: Policy, region: str, today: date) -> Iterator[str]:
    """Yield the rules in force in a region, each with its line in the policy."""
    here = "every region that is not named" if region == "*" else region
    yield f"Policy {policy.name} in {here}:"
    for rule in policy.rules(region):
        yield f"  {rule.key}: {rule.wanted or 'any value but an empty one'} ({policy.file}:{rule.line})"
    if policy.placeholder_values:
        yield f"  These count as empty: {', '.join(sorted(policy.placeholder_values))}"
    yield f"  Looked at: instances that are {', '.join(sorted(policy.states))}"
    if policy.grace_period:
        yield f"  Not judged within {policy.grace_period} of their launch"
    for exemption in policy.exemptions:
        if exemption.holds(today) and (region == "*" or not exemption.regions or region in exemption.regions):
            until = f" until {exemption.expires}" if exemption.expires else ""
            which = ", ".join(exemption.required_tags) or "all tags"
            yield f"  Exempted{until} from {which}: {exemption.reason} ({policy.file}:{exemption.line})"


def explain(
    policy: Policy,
    target: Target,
    instance: Instance,
    finding: Finding | None,
    changes: Iterable[Change],
    now: datetime,
) -> Iterator[str]:
    """Yield, rule by rule, why an instance passes or fails, then its history."""
    name = f" ({instance.tags['Name']})" if instance.tags.get("Name") else ""
    # The state keeps an instance as it was when it was last found in violation.
    then = f", as it was at {finding.last_seen}" if finding and instance.tags is finding.tags else ""
    managed = f", managed by {instance.managed_by}" if instance.managed_by else ""
    yield f"{instance.instance_id}{name} in {target}, {instance.state}{managed}{then}:"
    sighting = judge(target, instance, policy, now)
    failing = {violation.tag_key: violation for violation in sighting.violations}
    exempted = {case.violation.tag_key: case for case in sighting.exempted}
    for rule in policy.rules(target.region):
        line = f"({policy.file}:{rule.line})"
        if rule.key in failing:
            yield f"  FAILS     {failing[rule.key].message} {line}"
        elif case := exempted.get(rule.key):
            yield f"  EXEMPTED  {case} ({policy.file}:{case.exemption.line})"
        else:
            yield f"  passes    {rule.key} is {instance.tags[rule.key]!r} {line}"
    yield from _near_exemptions(policy, target, instance, failing, now.date())
    if is_new_state(instance.state):
        yield f"  {new_state_notice(instance.state)}"
    if not policy.includes(instance.state):
        yield f"  Not looked at: the policy looks at instances that are {', '.join(sorted(policy.states))}"
    if failing and sighting.too_young and not (finding and finding.status is not Status.RESOLVED):
        yield f"  Too young to be judged before {utc_text(instance.launch_time + policy.grace_period)}"
    yield from _past(finding, target, changes)


def _near_exemptions(
    policy: Policy, target: Target, instance: Instance, failing: Mapping[str, Violation], today: date
) -> Iterator[str]:
    """Yield the exemptions that would cover what fails but for one condition, or because they have ended."""
    for exemption in policy.exemptions if failing else ():
        if exemption.required_tags and not failing.keys() & exemption.required_tags:
            continue
        ended = [] if exemption.holds(today) else [f"it ended on {exemption.expires}"]
        reasons = [*exemption.mismatches(target, instance), *ended]
        # A single condition that is not met is not near, unless the instance has the tag with another value.
        partly = len(exemption.conditions) > 1 or any(key in instance.tags for key, _ in exemption.tags)
        if len(reasons) == 1 and (ended or partly):
            which = f"{policy.file}:{exemption.line} ({exemption.reason})"
            yield f"  The exemption at {which} nearly covers it: {reasons[0]}"


def _past(finding: Finding | None, target: Target, changes: Iterable[Change]) -> Iterator[str]:
    """Yield the history of a finding in one line, and the tags that were written to its instance."""
    if finding:
        seen = f"found {counted(finding.times_seen, 'time')} from {finding.first_seen} to {finding.last_seen}"
        again = f", reopened {counted(finding.times_reopened, 'time')}" if finding.times_reopened else ""
        ended = f", resolved at {finding.resolved_at} ({finding.resolution})" if finding.resolved_at else ""
        yield f"  History: {finding.status}, {seen}{again}{ended}"
    else:
        yield "  History: none known"
    yield from (f"  Written   {change}" for change in changes if change.target == target)


def history_lines(report: HistoryReport) -> Iterator[str]:
    """Yield a table of the findings or, for one instance, its timeline."""
    if report.events:
        for finding in report.findings():
            yield from _timeline(finding, report.events(finding), report.changes)
        return
    rows = map(_history_row, report.findings())
    first = next(rows, None)
    head = (*TABLE_HEAD[:-1], "SEEN", TABLE_HEAD[-1])
    yield from in_columns(itertools.chain([head, first], rows)) if first else ["No matching findings"]


def _history_row(finding: Finding) -> tuple[str, ...]:
    """Return a finding as a row of `history`, with what it lacks, or how and when it was resolved."""
    ended = f"{finding.resolution} on {(finding.resolved_at or '')[:10]}" if finding.resolved_at else ""
    what = ended or ", ".join(short_violations(finding))
    return _row(finding.status, finding, finding.first_seen[:10], f"{finding.times_seen:,}", what)


def _timeline(finding: Finding, events: Iterable[Event], changes: Iterable[Change]) -> Iterator[str]:
    """Yield what happened to a finding, one line per event, and what is known of its instance."""
    name = f" ({finding.name})" if finding.name else ""
    yield f"{finding.instance_id}{name} in {finding.target}, {finding.state} at {finding.last_seen}:"
    for event in events:
        how = event.resolution or ", ".join(violation.message for violation in event.violations)
        yield f"  {event.at}  {event.event:<8}  {how}"
    yield from _past(finding, finding.target, changes)
    yield from (f"  Suggested: {suggestion}" for suggestion in finding.suggestions)
    if finding.created_by:
        yield f"  Created by: {finding.created_by}"


@dataclass(frozen=True, slots=True)
class Output:
    """A report that was asked for: its format, and the file it goes to (`-` for stdout)."""

    format: str
    path: str

    @property
    def replaceable(self) -> bool:
        """True for an ordinary file; a pipe or a device is written to, not replaced."""
        path = Path(self.path)
        return self.path != "-" and not self.is_device and (path.is_file() or not path.exists())

    @property
    def is_device(self) -> bool:
        """True for a name in /dev; what is behind it may be a file (`3>out`, /dev/fd/3)."""
        return os.path.realpath(Path(self.path).parent) in {"/dev", os.path.realpath("/dev/fd")}

    def __str__(self) -> str:
        return f"--{self.format} {self.path}"


@contextlib.contextmanager
def _output_errors(output: Output) -> Iterator[None]:
    """Raise OutputError, which says what to do, where the system cannot write a report."""
    try:
        yield
    except OSError as error:
        reason = f"{output} cannot be written: {error.strerror}"
        raise OutputError(f"{reason}; name another place, or make room") from error


def check_output(output: Output) -> None:
    """Find out before the scan whether a report can be written; raises OutputError."""
    path = Path(output.path)
    with _output_errors(output):  # a name that is too long, a directory that may not be entered
        if path.is_dir():
            raise OutputError(f"{output} is a directory: name a file in it")
        if output.replaceable and not path.parent.is_dir():
            raise OutputError(f"{output}: there is no directory {path.parent}; create it")
        if output.replaceable and not os.access(path.parent, os.W_OK):
            raise OutputError(f"{output}: the directory {path.parent} cannot be written to")


@dataclass(frozen=True, slots=True)
class Staged:
    """A new, private file that holds a report until it is published; its name is never opened again."""

    output: Output
    file: IO[bytes]
    path: Path | None  # beside its destination, to be moved there; None: it has no name, and is copied


def open_private(path: str, flags: int) -> int:
    """Open a file for its owner alone, and never through a symbolic link."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o600)  # Windows has no such flag


@contextlib.contextmanager
def staged_outputs(outputs: Iterable[Output]) -> Iterator[list[Staged]]:
    """Yield a new file for each report; at the end those that were not published are removed."""
    staged: list[Staged] = []
    with contextlib.ExitStack() as stack:
        for output in outputs:
            path = Path(output.path).parent / f".tagcheck.{uuid.uuid4().hex}" if output.replaceable else None
            with _output_errors(output):
                if path:
                    stack.callback(_remove, path)
                    file: IO[bytes] = open(path, "x+b", buffering=0, opener=open_private)  # noqa: SIM115
                else:
                    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            staged.append(Staged(output, stack.enter_context(file), path))
        yield staged


def _remove(path: Path) -> None:
    """Remove a staged file, if it is still there."""
    with contextlib.suppress(OSError):
        path.unlink()


Report = TypeVar("Report")
Writers = Mapping[str, Callable[[TextIOBase, Report], None]]  # by format


def stage_report(staged: Iterable[Staged], writers: Writers[Report], report: Report) -> None:
    """Write a report in the format of each new file, down to the disk; raises OutputError."""
    for new in staged:
        with _output_errors(new.output):
            new.file.seek(0)
            new.file.truncate()
            with open(new.file.fileno(), "w", encoding="utf-8", newline="", closefd=False) as file:
                writers[new.output.format](file, report)
            os.fsync(new.file.fileno())


PIPE_SECONDS = 10.0  # to wait for the reader of a named pipe


def publish_report(staged: Iterable[Staged], emit: Callable[[str], None]) -> None:
    """Move each new file into place; then write those for stdout (by emit), a pipe or a device."""
    for new in sorted(staged, key=lambda new: new.path is None):
        # A reader that has read enough closes its pipe.
        with _output_errors(new.output), contextlib.suppress(BrokenPipeError):
            if new.path:
                _move(new.file, new.path, new.output)
            else:
                _copy(new.file, new.output, emit)


def write_report(
    outputs: Iterable[Output], writers: Writers[Report], report: Report, emit: Callable[[str], None]
) -> None:
    """Write a report to all its outputs, each whole or not at all; raises OutputError."""
    with staged_outputs(outputs) as staged:
        stage_report(staged, writers, report)
        publish_report(staged, emit)


def _move(file: IO[bytes], path: Path, output: Output) -> None:
    """Move a staged file into place, with the mode of an ordinary file; raises OutputError."""
    if not os.path.samestat(os.fstat(file.fileno()), path.lstat()):
        raise OutputError(
            f"{output}: another process replaced the file it was written to; name a directory that only "
            "you can write to"
        )
    if os.chmod in os.supports_fd:
        mask = os.umask(0o077)
        os.umask(mask)
        os.chmod(file.fileno(), 0o666 & ~mask)
    file.close()  # Windows moves no open file
    path.replace(output.path)


def _copy(file: IO[bytes], output: Output, emit: Callable[[str], None]) -> None:
    """Copy a staged file to stdout (by emit), a pipe or a device; raises OutputError."""
    file.seek(0)
    with open(file.fileno(), encoding="utf-8", newline="", closefd=False) as source:
        pieces = iter(functools.partial(source.read, CHUNK_SIZE), "")
        if output.path == "-":
            for piece in pieces:
                emit(piece)
        else:
            with open(_open_device(output), "w", encoding="utf-8", newline="") as device:
                device.writelines(pieces)


def _open_device(output: Output) -> int:
    """Open a pipe or a device to write to it, and wait a while for a pipe's reader; raises OutputError."""
    path = Path(output.path)
    deadline = time.monotonic() + PIPE_SECONDS
    while path.is_fifo():
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{output} is a pipe that nobody reads: start its reader, and run again"
                ) from error
            time.sleep(0.1)
        else:
            os.set_blocking(descriptor, True)
            return descriptor
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and not output.is_device:
        os.close(descriptor)
        raise OutputError(f"{output}: another process replaced this pipe by a file; run again")
    return descriptor


########################################################################################################
# 8 Dashboard: write_html; _node, _card, _picture, _line, _bar, _table draw; then the page from top to bottom
########################################################################################################


@dataclass(frozen=True, slots=True)
class Dashboard:
    """Everything the dashboard shows; `trend` and `standings` have every scan and target of the state."""

    policy: Policy
    made_at: datetime
    trend: Sequence[TrendPoint]
    standings: Sequence[Standing]
    open: OpenFindings
    endings: Sequence[Problem]


HTML_STYLE = """
:root{color-scheme:light dark;--paper:#faf8f3;--card:#fff;--ink:#1d1b18;--soft:#625d54;--rule:#ddd6c9;
--bad:#a33b1a;--good:#176b5b;--warn:#7a4b00;--note:#fff3d3;--h0:#e1efeb;--h1:#fbe9de;--h2:#f6cfb8;
--h3:#eba883;--h4:#b5502b;--h5:#7c260d;--on:#fff}
@media screen and (prefers-color-scheme:dark){:root{--paper:#151412;--card:#1e1c19;--ink:#ece7dd;
--soft:#aaa398;--rule:#3b372f;--bad:#f0946c;--good:#6fc9b5;--warn:#f2cf83;--note:#33290f;--h0:#17302b;
--h1:#33231b;--h2:#54301f;--h3:#7b4026;--h4:#d3744a;--h5:#f8b08d;--on:#1a0d06}}
*{box-sizing:border-box}body{margin:0 auto;padding:2.5rem 1.25rem 3rem;max-width:72rem;
background:var(--paper);color:var(--ink);overflow-wrap:anywhere;font:1rem/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums}
h1,h2,.verdict{font:600 1.375rem/1.2 "Iowan Old Style",Charter,Palatino,Georgia,"Liberation Serif",serif;
margin:0}h1{font-size:2.25rem}.verdict{font-size:1.625rem}h2+.verdict{margin-top:.375rem}p{margin:.375rem 0 0}
a{color:inherit}.eyebrow,.card h2{font:600 .8125rem/1.4 system-ui,sans-serif;letter-spacing:.06em;
text-transform:uppercase;color:var(--soft)}.soft,footer{color:var(--soft);font-size:.875rem}
.warn,.banner b{color:var(--warn)}header{border-top:3px solid var(--ink);padding-top:.75rem}
.banner{margin-top:1.25rem;padding:.75rem 1rem;background:var(--note);border-left:4px solid var(--warn)}
.cards,.pair{display:grid;gap:1.25rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));
margin-top:1.25rem}.pair{gap:0 3rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));
margin:0}.card{padding:1rem 1.25rem 1.125rem;background:var(--card);border:1px solid var(--rule);
border-top:4px solid var(--soft)}.bad{border-top-color:var(--bad)}.bad>.verdict{color:var(--bad)}
.good{border-top-color:var(--good)}.good>.verdict{color:var(--good)}
section,footer{margin-top:2.75rem;border-top:1px solid var(--rule);padding-top:1rem;min-width:0}
svg{display:block;overflow:visible}.card svg,.chart,.scroll,table,details{margin-top:1rem}
text{font-size:11.5px;fill:var(--soft);paint-order:stroke;stroke:var(--paper);stroke-width:4px;
stroke-linejoin:round}.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}.line,.new,.bar{color:var(--bad)}
.hollow{fill:var(--paper)}.card .hollow{fill:var(--card)}.done{color:var(--good)}
.again{color:var(--h3);stroke:var(--bad);outline:1px solid var(--bad);outline-offset:-1px}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem}.step{padding:.0625rem .5rem}
.key{display:inline-block;width:.875rem;height:.875rem;margin-right:.375rem;vertical-align:-.125rem;
background:currentColor}table{border-collapse:collapse;width:100%;font-size:.875rem;overflow-wrap:break-word}
.scroll{overflow-x:auto}.scroll table{margin:0}th,td{padding:.4375rem .625rem .4375rem 0;text-align:left;
vertical-align:top;border-bottom:1px solid var(--rule)}thead th{color:var(--soft);vertical-align:bottom;
border-color:var(--soft)}.number{text-align:right}.number,.whole{white-space:nowrap}.list{font-size:.8125rem}
.bars th{font-weight:400;width:44%;overflow-wrap:anywhere}.bars td{vertical-align:middle}
.bars .number{width:1%;padding-right:0}.heat th,.heat td{border:2px solid var(--paper);
padding:.3125rem .125rem;text-align:center;vertical-align:middle;font-size:.8125rem}
.heat thead th{font-size:.6875rem}.heat td{min-width:2.875rem}.heat small{display:block}
.heat td:nth-child(2),.heat tr.all>*{font-weight:700}.heat th:first-child{text-align:left;position:sticky;
left:0;background:var(--paper);font-weight:400;white-space:nowrap;padding-left:0}
.h0{background:var(--h0);color:var(--good)}.h1,.h2,.h3{background:var(--h1);color:var(--ink)}
.h2{background:var(--h2)}.h3{background:var(--h3)}.h4,.h5{background:var(--h4);color:var(--on)}
.h5{background:var(--h5)}summary{cursor:pointer}.unread{background:repeating-linear-gradient(135deg,
var(--rule) 0 2px,transparent 2px 7px),var(--note);color:var(--warn);font-weight:600;line-height:1.15}
@media (max-width:40rem){body{padding-top:1.25rem}h1{font-size:1.75rem}.wide,.list thead{display:none}
.list tr,.list td{display:block}.list{font-size:.875rem}
.list tr{padding:.625rem 0;border-bottom:1px solid var(--rule)}
.list td{border:0;padding:.0625rem 0 .0625rem 6.75rem;text-align:left;white-space:normal;
overflow-wrap:anywhere}.list td::before{content:attr(data-label);float:left;width:6.5rem;margin-left:-6.75rem;
color:var(--soft)}.list td:empty{display:none}}
@media print{@page{margin:12mm}:root{--paper:#fff}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details{display:none}body{padding:0;max-width:none;font-size:10pt}section{margin-top:1.25rem}
.card,tr,svg{break-inside:avoid}h2{break-after:avoid}.cards{grid-template-columns:repeat(3,1fr);gap:.75rem}
.pair{grid-template-columns:1fr 1fr}.verdict{font-size:1.25rem}.scroll{overflow:visible}
.list{font-size:7.5pt;overflow-wrap:anywhere}.list td{padding-right:.375rem}
.heat thead th,.heat th,.heat td{font-size:6.5pt;padding:.125rem 0;border-width:1px;min-width:0;
overflow-wrap:anywhere}}
"""
HTML_ACCOUNTS, HTML_ROWS, HTML_UNREAD = 30, 25, 50  # rows of the heat map, a table, the unread targets
HTML_POINTS, HTML_BARS = 400, 60  # 60 bars are wider than 2 pixels on a phone
COMPLIANCE_STEPS = (100, 95, 85, 70, 50)  # percent: below each of them the heat map is darker
COLUMN_LOOKS = dict.fromkeys("Instances,Open,NEW,REOPENED,RESOLVED,A month".split(","), "number")
COLUMN_LOOKS |= dict.fromkeys("Scan,Instance,Account,Region,First seen,When,Last read".split(","), "whole")
RED, PALE, GREEN, GREY = "#b5502b", "#eba883", "#2a8a78", "#888"  # where the style is blocked, as in Jenkins
Element = ElementTree.Element
_LEFT, _WIDTH = 9.0, 89.5  # percent of a picture within which it draws; left of it are the numbers


def write_html(file: TextIOBase, dashboard: Dashboard) -> None:
    """Write the dashboard as one page that runs no script and loads nothing."""
    name, policy_file = _brief(dashboard.policy.name, 120), _brief(dashboard.policy.file, 120)
    cards = (_trend_card(dashboard), _worst_card(dashboard.standings), _ask_card(dashboard))
    parts = [_header(dashboard, name), _node("div.cards", *cards), _trend(dashboard.trend)]
    parts += [_heat_map(dashboard.standings), _counts(dashboard.open), *_lists(dashboard)]
    source = f"Made by tagcheck {__version__} for the policy {name} ({policy_file}). All times are UTC."
    body = _node("body", _node("main", *parts), _node("footer", source))
    page = _node("html", _head(_brief(f"{dashboard.policy.name}: required tags", 120)), body, lang="en")
    for number, svg in enumerate(page.iterfind(".//svg[@role]")):
        words = [child for child in svg if child.tag in ("title", "desc")]
        for child in words:
            child.set("id", f"{child.tag}{number}")
        svg.set("aria-labelledby", " ".join(child.attrib["id"] for child in words))
    file.write(f"<!DOCTYPE html>\n{ElementTree.tostring(page, encoding='unicode', method='html')}\n")


def _node(selector: str, *children: Element | str, **attributes: object) -> Element:
    """Return an element such as `p.soft`; what strangers wrote stays text in it, with nothing invisible."""
    tag, *classes = selector.split(".")
    attributes = {"class": " ".join(filter(None, classes))} | attributes
    names = {key.rstrip("_").replace("_", "-"): printable(str(value)) for key, value in attributes.items()}
    element = ElementTree.Element(tag, {name: value for name, value in names.items() if value})
    for child in children:
        if not isinstance(child, str):
            element.append(child)
        elif len(element):
            element[-1].tail = printable(child)
        else:
            element.text = printable(child)
    return element


def _bold(bold: str, text: str) -> Element:
    """Draw a paragraph that begins in bold."""
    return _node("p", _node("b", bold), text)


def _card(question: str, answer: str, *children: Element, tone: str = "") -> Element:
    """Draw a card: a question, its answer, and what supports it."""
    return _node(f"article.card.{tone}", _node("h2", question), _node("p.verdict", answer), *children)


def _titled(title: str, lead: str, *children: Element, **attributes: object) -> Element:
    """Draw a section: its heading, how to read it, and its content."""
    leads = [_node("p.soft", lead)] if lead else []
    return _node("section", _node("h2", title), *leads, *children, **attributes)


def _picture(title: str, text: str, height: int, *drawn: Element, look: str = "") -> Element:
    """Draw a picture in percent across and pixels down, so that its text does not shrink on a phone."""
    words = [_node("title", title), *([_node("desc", text)] if text else [])]
    return _node(f"svg.{look}", *words, *drawn, role="img", width="100%", height=height)


def _label(text: str, x: float, y: float, anchor: str = "start", look: str = "") -> Element:
    """Draw a few words in a picture."""
    place = {"x": f"{x:.2f}%", "y": f"{y:.1f}", "text_anchor": anchor}
    return _node(f"text.{look}", text, fill=GREY, font_size=12, **place)


def _bar(look: str, colour: str, **place: str) -> Element:
    """Draw a bar of a chart."""
    return _node(f"rect.{look}", color=colour, **place)


def _grid(lines: Sequence[tuple[int, float]]) -> list[Element]:
    """Draw lines across a chart, each with its number; the line of 0 is the axis."""
    group = _node("g.grid", stroke="#8888")
    for number, y in lines:
        place = {"x1": 0, "x2": "100%", "y1": f"{y:.1f}", "y2": f"{y:.1f}"}
        group.append(_node("line" if number else "line.axis", **place))
    return [group, *(_label(f"{number:,}", 0, y - 4) for number, y in lines)]


def _ticks(peak: int, most: int = 4) -> list[int]:
    """Return round numbers from 0 up to a peak, in at most so many steps."""
    steps = (factor * 10**power for power in range(20) for factor in (1, 2, 5))
    step = next(step for step in steps if step * most >= peak)
    return list(range(0, peak + 1, step))


def _line(
    points: Sequence[TrendPoint], peak: int, top: int, height: int, left: float = _LEFT
) -> list[Element]:
    """Draw the open findings as a line with its area; a dot is hollow where a scan left targets unread."""
    moments = [datetime.fromisoformat(point.at).timestamp() for point in points]
    span, width = moments[-1] - moments[0], _LEFT + _WIDTH - left
    across = [left + width * ((moment - moments[0]) / span if span else 0.5) for moment in moments]
    down = [height * (1 - point.open / max(peak, 1)) for point in points]
    path = "L".join(f"{x:.2f},{y:.1f}" for x, y in zip(across, down, strict=True))
    corners = f"M{across[0]:.2f},{height}L{path}L{across[-1]:.2f},{height}Z"
    area = _node("path", d=corners, fill="currentColor", fill_opacity=0.12)
    stroke = {"fill": "none", "stroke": "currentColor", "stroke_width": 2, "stroke_linejoin": "round"}
    line = _node("path", d=f"M{path}", vector_effect="non-scaling-stroke", **stroke)
    box = {"viewBox": f"0 0 100 {height}", "preserveAspectRatio": "none", "overflow": "visible"}
    plot = _node("svg.line", area, line, **box, y=top, width="100%", height=height, color=RED)
    dots = _node("g.line", color=RED, stroke="currentColor", stroke_width=1.5)
    for point, x, y in zip(points, across, down, strict=True):
        unread = point.targets_unread
        if point is points[-1] or (left == _LEFT and (unread or len(points) <= HTML_BARS)):
            more = f", {counted(unread, 'target')} not read" if unread else ""
            title = _node("title", f"{_minute(point.at)}: {point.open:,} open{more}")
            look, fill = ("circle.hollow", "#fff") if unread else ("circle", "currentColor")
            dots.append(_node(look, title, cx=f"{x:.2f}%", cy=f"{top + y:.1f}", r=3, fill=fill))
    return [plot, dots]


def _table(columns: str, rows: Sequence[Sequence[str]], most: int = HTML_ROWS) -> list[Element]:
    """Draw the first rows as a table without its empty columns, and count the others."""
    cells = zip(columns.split(","), zip(*rows[:most], strict=True), strict=True)
    known = {column: values for column, values in cells if any(values)}
    looks = [COLUMN_LOOKS.get(column, "") for column in known]
    head = [_node(f"th.{look}", column, scope="col") for look, column in zip(looks, known, strict=True)]
    body = _node("tbody")
    for row in zip(*known.values(), strict=True):
        named = zip(looks, known, row, strict=True)
        body.append(_node("tr", *(_node(f"td.{look}", cell, data_label=name) for look, name, cell in named)))
    table = _node("table.list", _node("thead", _node("tr", *head)), body)
    return [_node("div.scroll", table), *_rest(len(rows) - most)]


def _rest(number: int) -> list[Element]:
    """Draw how many more there are than are shown, if there are any."""
    return [_node("p.soft", line) for line in more_lines(number)]


def _brief(text: str, width: int = 60) -> str:
    """Return text as the page shows it: printable, and cut where it is long."""
    return cut_text(printable(text), width)


def _minute(moment: str) -> str:
    """Return a time of the state as people read it: 2026-02-24 10:30."""
    return moment[:16].replace("T", " ")


def _head(title: str) -> Element:
    """Return the head of the page, which forbids the browser to run or load anything."""
    style = _node("style")
    style.text = HTML_STYLE
    digest = base64.b64encode(hashlib.sha256(HTML_STYLE.encode()).digest()).decode()
    rules = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    metas = (
        _node("meta", charset="utf-8"),
        _node("meta", http_equiv="Content-Security-Policy", content=rules),
        _node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _node("meta", name="color-scheme", content="light dark"),
        _node("meta", name="referrer", content="no-referrer"),
    )
    return _node("head", *metas, _node("title", title), style)


def _header(dashboard: Dashboard, name: str) -> Element:
    """Draw the policy, the time and the size of the fleet, and a banner if targets were not read."""
    standings, latest = dashboard.standings, dashboard.trend[-1].at
    accounts, regions = (len(_worst_first(standings, place)) for place in ("account_id", "region"))
    days = (dashboard.made_at - datetime.fromisoformat(latest)).days
    ago = f", {counted(days, 'day')} ago" if days > 0 else ""
    fleet = counted(sum(standing.instances for standing in standings), "instance")
    fleet += f" in {counted(accounts, 'account')} and {counted(regions, 'region')}"
    when = f"{_minute(utc_text(dashboard.made_at))} UTC · latest scan {_minute(latest)}{ago} · {fleet}"
    heading = _node("p.eyebrow", "EC2 instances and their required tags"), _node("h1", name)
    header = _node("header", *heading, _node("p.soft", when))
    if unread := _unread(standings):
        codes = Counter(_brief((standing.error or "").partition(":")[0], 40) for standing in unread)
        why = ", ".join(f"{number:,} {code}" for code, number in codes.most_common(3))
        more = ", …" if len(codes) > 3 else ""
        were = f"of {counted(len(standings), 'target')} {'was' if len(unread) == 1 else 'were'} not read"
        text = "What is said of them is as they were last read; nothing is known of them since."
        bold = _node("b", f"Incomplete: {len(unread):,} {were}")
        link = _node("a", "Which, and why", href="#unread")
        header.append(_node("p.banner", bold, f" ({why}{more}). {text} ", link))
    return header


def _unread(standings: Iterable[Standing]) -> list[Standing]:
    """Return the targets that the latest scan could not read."""
    return [standing for standing in standings if standing.error]


def _compliance(standings: Iterable[Standing]) -> tuple[int, int, str]:
    """Return how many instances comply, how many do not, and the share that does, never rounded up."""
    pairs = [(standing.compliant, standing.findings) for standing in standings]
    compliant, findings = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    percent = 100 * compliant // max(compliant + findings, 1)
    text = "–" if not compliant + findings else f"{percent}%" if percent or not compliant else "<1%"
    return compliant, findings, text


def _worst_first(standings: Iterable[Standing], attribute: str) -> dict[str, list[Standing]]:
    """Group the targets by account_id or region, most open findings first, then most unread targets."""
    groups: dict[str, list[Standing]] = {}
    for standing in standings:
        groups.setdefault(getattr(standing.target, attribute), []).append(standing)
    badness = {name: (-_compliance(group)[1], -len(_unread(group)), name) for name, group in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=badness.__getitem__)}


def _trend_card(dashboard: Dashboard) -> Element:
    """Draw the card that compares the open findings with 30 days ago, or with the first scan."""
    trend, total = dashboard.trend, dashboard.open.total
    question, now = "Does it get better?", counted(total, "open finding")
    if len(trend) == 1:
        return _card(question, now, _node("p", "Not known yet: a trend needs a second scan."))
    latest = datetime.fromisoformat(trend[-1].at)
    month_ago = utc_text(latest - timedelta(days=30))
    base = next((point for point in reversed(trend) if point.at <= month_ago), trend[0])
    change = total - base.open
    better, worse = ("Getting better", "good", "fewer"), ("Getting worse", "bad", "more")
    answer, tone, more = better if change < 0 else worse if change else ("Unchanged", "", "")
    share = f" ({100 * abs(change) / base.open:,.0f}%)" if base.open else ""
    than = f"{abs(change):,} {more}{share} than" if change else "as many as"
    days = counted((latest - datetime.fromisoformat(base.at)).days, "day")
    when = f"{days} before" if base.at <= month_ago else "at the first scan"
    lines = [_bold(now, f", {than} {when}, on {base.at[:10]} ({base.open:,})")]
    doubts = ((len(_unread(dashboard.standings)), "not read now"), (base.targets_unread, "not read then"))
    if doubt := " and ".join(f"{counted(number, 'target')} {word}" for number, word in doubts if number):
        lines.append(_node("p.warn", f"As far as is known: {doubt}."))
    points = _grouped(trend, HTML_POINTS)
    line = _line(points, max(point.open for point in points), 4, 36, left=1.0)
    lines.append(_picture(f"Open findings: {base.open:,} {when}, {total:,} now", "", 44, *line))
    return _card(question, answer, *lines, tone=tone)


def _worst_card(standings: Sequence[Standing]) -> Element:
    """Draw the card of the target, account and region with most open findings and least compliance."""
    question, unread = "Where is it worst?", _unread(standings)
    text = f"{counted(len(unread), 'target')} not read: it may be worse there."
    warning = [_node("p.warn", text)] if unread else []
    worst = max(standings, key=lambda standing: standing.findings)
    if not worst.findings and unread:
        return _card(question, "Not known", _node("p", "Nothing is open in what was read."), *warning)
    if not worst.findings:
        return _card(question, "Nowhere", _node("p", _all_good(standings)), tone="good")
    since = f", not read since {(worst.last_read or '')[:10]}" if worst.error else ""
    of = f"{worst.findings:,} of {counted(worst.instances, 'instance')}"
    lines = [_node("p.verdict", worst.target.region), _bold(of, f" lack tags{since}")]
    for attribute in ("account_id", "region"):
        groups = _worst_first(standings, attribute)
        name = next(iter(groups))
        _, findings, share = _compliance(groups[name])
        if len(groups) > 1:
            lines.append(_bold(name, f" in all: {findings:,} open, {share} compliant"))
    judged = [s for s in standings if not s.error and s.compliant + s.findings]
    lowest = min(judged, key=lambda s: s.compliant / (s.compliant + s.findings), default=worst)
    share = _compliance([lowest])[2]
    if share != _compliance([worst])[2]:
        of = f"{share} of {counted(lowest.instances, 'instance')}"
        lines.append(_bold(str(lowest.target), f": {of} compliant"))
    return _card(question, worst.target.account_id, *lines, *warning, tone="bad")


def _all_good(standings: Sequence[Standing]) -> str:
    """Return what is true when everything was read and nothing is open."""
    numbers = [(standing.instances, standing.compliant, standing.exempted) for standing in standings]
    instances, compliant, exempted = map(sum, zip(*numbers, strict=True))
    fleet = counted(instances, "instance")
    if compliant == instances:
        return f"Every one of {fleet} carries its tags." if instances else "There are no instances."
    rest = ((exempted, "exempted"), (instances - compliant - exempted, "too young to judge"))
    others = " and ".join(f"{number:,} {word}" for number, word in rest if number)
    return f"{compliant:,} of {fleet} carry their tags; {others}."


def _ask_card(dashboard: Dashboard) -> Element:
    """Draw the card of those who own or created most of what is open, and of the largest cause."""
    found, question = dashboard.open, "Whom to ask?"
    if not found.total:
        nobody = "Nobody yet" if _unread(dashboard.standings) else "Nobody"
        return _card(question, nobody, _node("p", "Nothing is open."))

    def named(counts: Iterable[tuple[str, int]]) -> str:
        return ", ".join(f"{_brief(who, 40)} ({number:,})" for who, number in counts)

    people = found.by_owner or found.by_creator
    lines = []
    if people:
        does = f"{'owns, or probably owns,' if found.by_owner else 'created'} {people[0][1]:,}"
        lines.append(_bold(does, f" of {counted(found.total, 'instance')} with findings"))
    if len(people) > 1:
        lines.append(_bold("Then", f": {named(people[1:4])}"))
    if found.by_owner and found.by_creator:
        lines.append(_bold("Created", f" by {named(found.by_creator[:3])}"))
    if found.causes:
        lines.append(_bold("Most at once", f": {_brief(str(found.causes[0]), 240)}"))
    if not found.by_creator:
        code, text = _node("code", "scan --creators"), "Who created the instances is not known: "
        lines.append(_node("p.soft", text, code, " looks it up."))
    return _card(question, _brief(people[0][0]) if people else "Not known", *lines)


def _grouped(trend: Sequence[TrendPoint], most: int) -> list[TrendPoint]:
    """Merge neighbouring scans into at most so many points, each with their sums and its last state."""
    size = -(-len(trend) // most)
    points = []
    for group in (trend[start : start + size] for start in range(0, len(trend), size)):
        sums = {name: sum(getattr(p, name) for p in group) for name in ("new", "reopened", "resolved")}
        points.append(replace(group[-1], targets_unread=max(p.targets_unread for p in group), **sums))
    return points


def _trend(trend: Sequence[TrendPoint]) -> Element:
    """Draw the open findings over time, what each scan changed, and the latest scans in numbers."""
    points = _grouped(trend, HTML_POINTS)
    peak = max(1, *(point.open for point in points))
    drawn = _grid([(tick, 18 + 200 * (1 - tick / peak)) for tick in _ticks(peak)])
    drawn += _line(points, peak, 18, 200)
    (first, start), (last, end) = ((p, datetime.fromisoformat(p.at)) for p in (points[0], points[-1]))
    form = "%Y-%m-%d" if end - start > timedelta(days=5) else "%m-%d %H:%M"
    for quarter in range(5) if end > start else [2]:
        moment, anchor = start + (end - start) * quarter / 4, {0: "start", 4: "end"}.get(quarter, "middle")
        look = "wide" if quarter % 2 else ""  # too many for a phone
        drawn.append(_label(f"{moment:{form}}", _LEFT + _WIDTH * quarter / 4, 242, anchor, look))
    text = f"From {first.open:,} on {first.at[:10]} to {last.open:,} on {last.at[:10]}"
    text += f", in {counted(len(trend), 'scan')}"
    chart = _picture("Open findings over time", text, 250, *drawn, look="chart")
    rows = []
    for p in trend[: -HTML_ROWS - 1 : -1]:
        numbers = [f"{number:,}" for number in (p.open, p.new, p.reopened, p.resolved)]
        rows.append([_minute(p.at), *numbers, f"{p.targets_unread:,} of {counted(p.targets, 'target')}"])
    table = _table("Scan,Open,NEW,REOPENED,RESOLVED,Not read", rows)
    details = _node("details", _node("summary.soft", "The latest scans in numbers"), *table)
    lead = "All targets, each as it was last read; a hollow point is a scan that left targets unread."
    return _titled("Open findings over time", lead, chart, *_changes(trend), details)


def _changes(trend: Sequence[TrendPoint]) -> list[Element]:
    """Draw what scans opened (up) and resolved (down) as bars; a bar may stand for several scans."""
    bars, size = _grouped(trend, HTML_BARS), -(-len(trend) // HTML_BARS)
    # To the first scan everything is NEW: at its scale all others would be flat.
    first, *others = (bar.new + bar.reopened for bar in bars)
    down = max(bar.resolved for bar in bars)
    rest = max(0, down, *others)
    cut = first > 2 * rest > 0
    up = rest if cut else max(first, 0, *others)
    if not up + down:
        return []
    each = "each bar is a scan" if size == 1 else f"each bar is {size:,} scans"
    looks = (("new", "NEW (up)"), ("again", "REOPENED (up)"), ("done", "RESOLVED (down)"))
    keys = [_node("span", _node(f"span.key.{look}"), f"{words} ") for look, words in looks]
    scale = 150 / (up + down)
    zero, ticks = 22 + up * scale, _ticks(max(up, down), 2)
    drawn = _grid([(n, zero - n * scale) for n in ticks if n <= up])
    drawn += _grid([(n, zero + n * scale) for n in ticks[1:] if n <= down])
    slot = _WIDTH / len(bars)
    width = min(slot * 0.72, 6)
    for index, bar in enumerate(bars):
        middle = _LEFT + slot * (index + 0.5)
        text = f"{bar.new:,} NEW, {bar.reopened:,} REOPENED, {bar.resolved:,} RESOLVED"
        group = _node("g", _node("title", f"{_minute(bar.at)}: {text}"), fill="currentColor")
        new, again = min(bar.new, up), min(bar.reopened, max(up - bar.new, 0))
        # Each with its colour, its number, and how far above zero its top is.
        parts = ("new", RED, new, new), ("again", PALE, again, new + again), ("done", GREEN, bar.resolved, 0)
        across = {"x": f"{middle - width / 2:.2f}%", "width": f"{width:.2f}%"}
        for look, colour, number, above in parts:
            upright = {"y": f"{zero - above * scale:.1f}", "height": f"{number * scale:.1f}"}
            if number:
                group.append(_bar(look, colour, **across, **upright))
        drawn.append(group)
        if index in (0, len(bars) - 1):
            anchor = "middle" if len(bars) < 4 else "end" if index else "start"
            drawn.append(_label(bar.at[:10], middle, 196, anchor))
    if cut:
        drawn.append(_label(f"↑ {first:,} at first", _LEFT + (slot - width) / 2, 14))
    picture = _picture("NEW, REOPENED and RESOLVED findings per scan", each, 200, *drawn, look="chart")
    return [_node("p.legend.soft", *keys, _node("span", each)), picture]


def _heat_map(standings: Sequence[Standing]) -> Element:
    """Draw the compliance of each account in each region, worst first; what was not read is hatched."""
    accounts, regions = (_worst_first(standings, attribute) for attribute in ("account_id", "region"))
    names, title = list(accounts), "Compliance by account and region"
    rows = [(account, accounts[account], "") for account in names[:HTML_ACCOUNTS]]
    lead = "The share of instances that carry their tags, of those that were judged; worst first."
    if others := names[HTML_ACCOUNTS:]:
        lead += f" Of {counted(len(names), 'account')} these are the {HTML_ACCOUNTS} worst."
        rest = [standing for account in others for standing in accounts[account]]
        rows.append((f"all the others ({len(others):,})", rest, ""))
    if len(names) > 1:
        rows.append(("all accounts", list(standings), "all"))
    steps = ["100%", *(f"{step}% or more" for step in COMPLIANCE_STEPS[1:]), f"below {COMPLIANCE_STEPS[-1]}%"]
    legend = _node("p.legend.soft")
    for step, words in enumerate(steps):
        legend.append(_node(f"span.step.h{step}", words))
        legend[-1].tail = " "
    legend.append(_node("span.step.unread", "not read"))
    head = [_node("th", column, scope="col") for column in ("Account", "all", *regions)]
    body = _node("tbody")
    for account, group, look in rows:
        by_region = _worst_first(group, "region")
        cells = [_heat_cell(f"{account}, {region}", by_region.get(region, [])) for region in regions]
        whole = _heat_cell(f"{account}, all regions", group)
        body.append(_node(f"tr.{look}", _node("th", account, scope="row"), whole, *cells))
    table = _node("table.heat", _node("thead", _node("tr", *head)), body)
    box = _node("div.scroll", table, tabindex=0, role="region", aria_label=title)
    return _titled(title, lead, legend, box)


def _heat_cell(where: str, standings: Sequence[Standing]) -> Element:
    """Draw a cell of the heat map; where anything was not read it says so, and has no other colour."""
    read, unread = [standing for standing in standings if not standing.error], len(_unread(standings))
    compliant, findings, share = _compliance(read)
    judged = compliant + findings
    step = sum(100 * compliant < limit * judged for limit in COMPLIANCE_STEPS)
    title = f"{where}: {findings:,} of {counted(judged, 'instance')} lack tags" if read else where
    look = "unread" if unread else f"h{step}" if judged else ""
    small = [_node("small", f" {unread:,} not read")] if read and unread else []
    return _node(f"td.{look}", share if read else "not read" if unread else "", *small, title=title)


def _counts(found: OpenFindings) -> Element:
    """Draw the open findings by tag, age, creator, service and owner, and the cost by tag, as bars."""
    unpriced = found.total - found.priced
    spend = "What the instances that lack a tag cost in a month, by the prices that scans were given"
    spend += f"; {counted(unpriced, 'finding')} without a price left out." if unpriced else "."
    costs = sorted(found.cost_by_tag, key=lambda row: row[0] != "Owner")  # who pays is asked first
    charts: tuple[tuple[str, str, Sequence[tuple[str, float]]], ...] = (
        ("Tags that are lacking", "An instance can lack several.", found.by_tag),
        ("Age of open findings", "Since a scan first saw them.", found.by_age),
        ("Created by", "Who made the instances.", found.by_creator),
        ("Operated by AWS services", "Their tags come from the service's own settings.", found.by_operator),
        ("Owners", "By their tag, or the value that it most probably should have.", found.by_owner),
        ("Spend that lacks its tag", spend, costs),
    )
    pair = _node("div.pair")
    for title, lead, rows in charts:
        body, most = _node("tbody"), max((number for _, number in rows), default=0) or 1
        for name, number in rows[:HTML_ROWS]:
            brief, amount, width = _brief(name), f"{number:,.0f}", f"{100 * number / most:.1f}%"
            bar = _bar("bar", RED, width=width, height="12", fill="currentColor")
            cells = _node("td", _picture(f"{brief}: {amount}", "", 12, bar)), _node("td.number", amount)
            body.append(_node("tr", _node("th", brief, scope="row"), *cells))
        if rows:
            pair.append(_titled(title, lead, _node("table.bars", body), *_rest(len(rows) - HTML_ROWS)))
    return pair


def _lists(dashboard: Dashboard) -> Iterator[Element]:
    """Draw the causes, the oldest findings, ending exemptions and unread targets, if there are any."""
    found = dashboard.open
    if causes := [(f"{c.instances:,}", *astuple(c.target), _brief(str(c), 240)) for c in found.causes]:
        lead = "What many instances share, and where to put it right for all of them."
        yield _titled("Causes", lead, *_table("Instances,Account,Region,What to do", causes))
    if oldest := [_oldest_row(finding, dashboard.made_at) for finding in found.oldest]:
        columns = "Instance,Name,Account,Region,First seen,Lacks,Probably,Created by,A month"
        yield _titled("Open for longest", "", *_table(columns, oldest))
    if endings := [(_brief(end.message, 120), _brief(end.where, 240)) for end in dashboard.endings]:
        yield _titled("Exemptions that end", "", *_table("When,Exemption", endings))
    rows = []
    for target in sorted(_unread(dashboard.standings), key=lambda s: (s.last_read or "", s.target)):
        known = ("never", "not known")
        if target.last_read:
            known = (_minute(target.last_read), f"{target.findings:,}")
        rows.append((*astuple(target.target), *known, _brief(target.error or "", 240)))
    if rows:
        lead = "Nothing is known of these since they were last read; what was open then still counts."
        table = _table("Account,Region,Last read,Open,Why", rows, HTML_UNREAD)
        yield _titled("Not read", lead, *table, id="unread")


def _oldest_row(finding: Finding, now: datetime) -> tuple[str, ...]:
    """Return a finding as a row of those that are open for longest."""
    days = max((now - datetime.fromisoformat(finding.first_seen)).days, 0)
    since = f"{finding.first_seen[:10]}, {counted(days, 'day')}"
    lacks = ", ".join(_brief(violation, 80) for violation in short_violations(finding))
    likely = ", ".join(_brief(str(suggestion), 80) for suggestion in finding.suggestions)
    cost = "" if finding.monthly_cost is None else f"{finding.monthly_cost:,.0f}"
    where = (finding.instance_id, _brief(finding.name, 40), finding.account_id, finding.region)
    return (*where, since, _brief(lacks, 240), _brief(likely, 240), _brief(finding.created_by or ""), cost)


########################################################################################################
# 9 Notifications: digest_lines, write_digests, digest_text, find_webhook, and a sender for each medium
########################################################################################################

DIGEST_LINES, OWNER_LINES = 10, 100  # findings listed in a digest for everybody, and in an owner's
# Slack cuts a text after 40,000 characters, and SNS refuses more than 256 KB; a digest has five sections.
SECTION_WIDTHS = {"slack": 3_000, "sns": 10_000, "email": 100_000}
SLACK_HOSTS = ("hooks.slack.com", "hooks.slack-gov.com")
SLACK_SECONDS = 10.0
SLACK_PAUSES = (1.0, 3.0)  # before trying again, where Slack does not say how long
SLACK_LONGEST_PAUSE = 30.0
# SES's errors about one message; after any other error the next message would fail as well.
ONE_EMAIL_ERRORS = ("MessageRejected", "BadRequestException", "InvalidParameterValue")


class Section(NamedTuple):
    """A part of a digest: its title, the first of its lines, and how many lines there are."""

    title: str
    lines: Sequence[str]
    number: int


@dataclass(frozen=True, slots=True)
class Digest:
    """A message about a scan, for all who get everything, or for one owner: an address or a Slack member."""

    channel: str
    to: str
    title: str
    sections: Sequence[Section]

    @property
    def medium(self) -> str:
        """How it is sent: by slack, sns or email."""
        return ("email" if "@" in self.to else "slack") if self.to else self.channel


Senders = Mapping[str, Callable[[Digest], None]]  # by medium


def ending_subjects(policy: Policy, today: date) -> list[str]:
    """Return a subject, for the state, for each exemption that has ended or ends soon: one for each date."""
    exemptions = {(exemption.line, exemption.column): exemption for exemption in policy.exemptions}
    ending = [exemptions[problem.line, problem.column] for problem in check_expiry(policy, today)]
    return [f"exemption {exemption.expires} {exemption.reason}" for exemption in ending]


def digest_lines(report: ScanReport, pending: Callable[[str], Container[str]]) -> Iterator[DigestLine]:
    """Yield what belongs in digests: channel, recipient, subject and line.

    `pending` returns the channels that a subject is pending for; with `on: new` only these get it.
    """
    policy, numbers = report.scan.policy, Counter[str]()
    notify = policy.notify or Notify()
    owners = notify.owners or Owners()

    def channels_for(subject: str) -> Iterator[tuple[str, str | None]]:
        waiting = pending(subject)
        for channel in notify.channels:
            if notify.on == "any" or channel in waiting:
                yield channel, subject if channel in waiting else None

    for finding in report.findings():
        for channel, subject in channels_for(f"finding {finding.target} {finding.instance_id}"):
            names = _known_names(finding, owners.tag, policy.placeholder_values)
            recipient = owners.recipient(names.values()) if channel == "owners" else ""
            if recipient is not None:
                numbers[channel] += 1
                is_listed = channel == "owners" or numbers[channel] <= DIGEST_LINES
                yield channel, recipient, subject, _finding_line(finding, names) if is_listed else ""
    unread = [f"unread {target.target}" for target in report.unread]
    for other in (*unread, *ending_subjects(policy, report.scan.started_at.date())):
        yield from (
            (channel, "", subject, None) for channel, subject in channels_for(other) if channel != "owners"
        )


def write_digests(
    report: ScanReport, channel: str, recipients: Iterable[tuple[str, int, Sequence[str]]]
) -> Iterator[Digest]:
    """Yield a digest for each recipient: who it is, the number of its findings, and their first lines."""
    policy = report.scan.policy
    word = "new finding" if policy.notify and policy.notify.on == "new" else "open finding"
    for to, number, lines in recipients:
        title = [counted(number, word)] if number else []
        if to:
            sections = [Section("Your findings, by owner tag or creator:", lines, number)]
        else:
            endings = check_expiry(policy, report.scan.started_at.date())
            title += [f"{counted(len(report.unread), 'target')} not read"] if report.unread else []
            title += [f"{counted(len(endings), 'exemption')} ending"] if endings else []
            errors = (
                f"{target.target}: {target.error_code}: {target.error_message}" for target in report.unread
            )
            sections = [
                Section("", count_lines(report.totals), 2),
                Section("Findings:", lines, number),
                _section("Could not be read (their findings are unchanged):", errors),
                _section("Fix many at once:", cause_lines(report.causes)),
                _section("Exemptions:", (f"{ending.where}: {ending.message}" for ending in endings)),
            ]
        headline = printable(f"tagcheck {cut_text(policy.name, 40)}: {', '.join(title)}")
        yield Digest(channel, to, headline, [section for section in sections if section.number])


def _section(title: str, lines: Iterable[str]) -> Section:
    """Return a section with the first of these lines."""
    every = list(lines)
    return Section(title, [cut_text(printable(line), 400) for line in every[:DIGEST_LINES]], len(every))


def _known_names(finding: Finding, owner_tag: str, placeholders: Container[str]) -> dict[str, str]:
    """Return who may know about an instance: its owner, then its creator, where they are known."""
    key = owner_tag if finding.tags.get(owner_tag) else near_miss(finding.tags, owner_tag) or ""
    owner, creator = stripped(finding.tags.get(key, "")), finding.created_by or ""
    names = {
        "owner": "" if owner.casefold() in placeholders else owner,
        "created by": "" if creator.startswith(UNKNOWN) else creator,
    }
    return {role: name for role, name in names.items() if name}


def _finding_line(finding: Finding, names: Mapping[str, str]) -> str:
    """Return a finding in one line: what it lacks, whom to ask, and likely values of the tags."""
    name = f" ({cut_text(finding.name, 40)})" if finding.name else ""
    parts = [", ".join(short_violations(finding))]
    parts += [f"{role} {cut_text(who, 60)}" for role, who in names.items()]
    # short_violations shows the more confident suggestions already.
    unsure = [
        f"{s.tag_key}={cut_text(s.value, 40)}" for s in finding.suggestions if s.confidence < MIN_CONFIDENCE
    ]
    parts += [f"perhaps {', '.join(unsure)}"] if unsure else []
    line = f"{finding.status} {finding.instance_id}{name} in {finding.target}: {'; '.join(parts)}"
    return cut_text(printable(line), 400)


def digest_text(digest: Digest) -> str:
    """Return a digest as text; for Slack in code blocks, where nothing becomes a mention, a link or bold."""
    is_slack, width = digest.medium == "slack", SECTION_WIDTHS[digest.medium]
    encode: Callable[[str], str] = _slack_escape if is_slack else str
    fence = ["```"] if is_slack else []
    parts = [(f"<@{digest.to}> " if is_slack and digest.to else "") + encode(digest.title)]
    for title, lines, number in digest.sections:
        encoded = [*map(encode, lines)]
        ends = itertools.accumulate(len(line) + 1 for line in encoded)
        shown = encoded[: sum(end <= width for end in ends)]
        more = [f"… and {number - len(shown):,} more"] if number > len(shown) else []
        head = [title] if title or is_slack else []
        parts.append("\n".join([*head, *fence, *shown, *more, *fence]))
    return "\n".join(parts) if is_slack else "\n\n".join(parts) + "\n"


def _slack_escape(text: str) -> str:
    """Escape what Slack reads as a command, such as `<!channel>`, and what would end a code block."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("`", "'")


def find_webhook(slack: Slack, environment: Mapping[str, str]) -> str:
    """Return the URL of the webhook; raises UsageError, which does not repeat it."""
    name, url = slack.webhook_url_env, environment.get(slack.webhook_url_env, "").strip()
    if not url:
        raise UsageError(
            f"the policy notifies Slack: put the webhook's URL into the environment variable {name}"
        )
    parts = re.fullmatch(r"https://([^/?#\s]+)/[!-~]*", url)
    if not parts:
        raise UsageError(f"{name} does not hold the https:// URL of a webhook: copy it again from Slack")
    hosts = (*SLACK_HOSTS, *slack.allow_hosts)
    if parts[1].removesuffix(":443") not in hosts:
        raise UsageError(
            f"{name} holds a URL of another host than {', '.join(hosts)}: see notify.slack.allow_hosts"
        )
    return url


def post_to_slack(url: str, text: str) -> None:
    """Post a text to a webhook; raises NotificationError, which does not repeat the URL."""
    import urllib.request as http

    # Of urllib's handlers only these: the others would open files, and follow a redirect to anywhere.
    opener = http.OpenerDirector()
    opener.add_handler(http.ProxyHandler())
    opener.add_handler(http.HTTPSHandler())
    message = json.dumps({"text": text, "unfurl_links": False, "unfurl_media": False}).encode()
    headers = {"Content-Type": "application/json", "User-Agent": f"tagcheck/{__version__}"}
    request = http.Request(url, message, headers)
    for pause in (*SLACK_PAUSES, math.inf):
        status, body, retry_after = _answer(opener, request)
        if status < 300:
            return
        wait = float(retry_after) if retry_after.isdecimal() else pause
        if pause == math.inf or wait > SLACK_LONGEST_PAUSE or (status != 429 and status < 500):
            break
        LOG.debug("Slack answered %d; trying again in %.0f s", status, wait)
        time.sleep(wait)
    # Slack's own errors are words such as no_service; another page may repeat the URL.
    word = f" ({body})" if re.fullmatch("[a-z_]{2,40}", body) and body not in url else ""
    redirect = ", a redirect, which is not followed" if status < 400 else ""
    raise NotificationError(f"Slack answered {status}{word}{redirect}")


def _answer(opener: Any, request: Any) -> tuple[int, str, str]:
    """Return status, first bytes and Retry-After of the answer to a request; raises NotificationError."""
    import http.client

    def ask() -> tuple[int, str, str]:
        with opener.open(request, timeout=SLACK_SECONDS) as answer:
            body = answer.read(100).decode(errors="replace") if answer.status >= 300 else ""
            return answer.status, body, answer.headers.get("Retry-After", "")

    try:
        return within(SLACK_SECONDS, ask)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise NotificationError(f"Slack did not answer within {SLACK_SECONDS:.0f} s") from None
        # Other exceptions may repeat the URL.
        why = str(reason) if isinstance(reason, OSError) else type(reason).__name__
        raise NotificationError(f"cannot reach Slack: {why}") from None


def publish_to_sns(client: Any, topic_arn: str, digest: Digest) -> None:
    """Publish a digest to a topic; subjects are ASCII, of less than 100 characters; raises TargetError."""
    subject = digest.title.encode("ascii", "replace").decode()[:99]
    call_aws(client, "Publish", TopicArn=topic_arn, Subject=subject, Message=digest_text(digest))


def send_email(client: Any, email: Email, digest: Digest) -> None:
    """Send a digest by SES, to its owner or to all who get everything; raises TargetError."""
    subject, body = ({"Data": text, "Charset": "UTF-8"} for text in (digest.title, digest_text(digest)))
    to = [digest.to] if digest.to else list(email.to)
    call_aws(
        client,
        "SendEmail",
        FromEmailAddress=email.sender,
        Destination={"ToAddresses": to},
        Content={"Simple": {"Subject": subject, "Body": {"Text": body}}},
    )


########################################################################################################
# 10 Remediation: plan, PlanRow, UndoFile
########################################################################################################


@unique
class Action(StrEnum):
    """What a row of a plan asks for; `restore` and `delete` are those of an undo file."""

    ADD = "add"  # where the tag is missing or empty
    REPLACE = "replace"  # a value that is there: only a person asks for it
    REVIEW = "review"  # a value that is there, and probably wrong; nothing is written
    SKIP = "skip"
    RESTORE = "restore"
    DELETE = "delete"


PLAN_ACTIONS = (Action.ADD, Action.REPLACE, Action.REVIEW, Action.SKIP)
UNDO_ACTIONS = (Action.RESTORE, Action.DELETE)
MAX_TAGS = 50  # of a resource; those of AWS itself do not count (EC2 user guide, Tag restrictions)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One tag of one instance that is to be written; `current` is its value as the plan was made, as a file shows it."""

    target: Target
    instance_id: str
    name: str
    tag_key: str
    value: str
    action: Action
    current: str
    confidence: str
    why: str
    place: str = ""  # the file and line that it was read from
    warning: str = ""

    def __str__(self) -> str:
        return f"{self.target} {self.instance_id} {self.tag_key}"

    @property
    def value_after(self) -> str | None:
        """The value that the tag has once the row is carried out; None where it is deleted."""
        return None if self.action is Action.DELETE else self.value

    @property
    def writes(self) -> bool:
        """True where the row changes something, unless the instance has changed."""
        return self.action not in (Action.REVIEW, Action.SKIP)


@unique
class Result(StrEnum):
    """What became of a row of a plan."""

    PLANNED = "planned"
    NOT_ASKED = "not_asked"  # review and skip
    WRITTEN = "written"
    ALREADY_THERE = "already_there"
    CHANGED_SINCE = "changed_since"
    GONE = "gone"
    FAILED = "failed"
    UNKNOWN = "unknown"  # the answer was lost, and the tags could not be read again


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row, why, and the value that the tag had before."""

    row: PlanRow
    result: Result
    message: str = ""
    former: str | None = None
    warning: str = ""


def revert_warning(cause: Group | None) -> str:
    """Return what would undo a tag that is set on one instance of a group, and where to set it instead."""
    if not cause:
        return ""
    kind = GROUP_KINDS[cause.kind]
    return f"{kind.word} {cause.name}: {kind.risk}; {kind.remedy.format(names=cause.name)}"


def plan(findings: Iterable[Finding], policy: Policy, min_confidence: float) -> Iterator[PlanRow]:
    """Yield what would put findings right: suggestions that are sure enough, or else the policy's default.

    What the policy no longer asks for is left out, and so is what it would not accept.
    """
    for finding in findings:
        rules = policy.rules(finding.region) if policy.covers(finding.region) else ()
        suggestions = {suggestion.tag_key: suggestion for suggestion in finding.suggestions}
        for violation in finding.violations:
            for rule in rules:
                if rule.key == violation.tag_key:
                    row = _plan_row(finding, rule, suggestions.get(rule.key), policy, min_confidence)
                    if row and not row_complaint(row, policy):
                        yield row


def _plan_row(
    finding: Finding, rule: RequiredTag, suggestion: Suggestion | None, policy: Policy, min_confidence: float
) -> PlanRow | None:
    """Return what to write for one violation; None where nothing is known."""
    current = finding.tags.get(rule.key, "")
    action = Action.ADD if is_blank(current) else Action.REVIEW
    if suggestion and (action is Action.REVIEW or suggestion.confidence >= min_confidence):
        value, confidence, why = suggestion.value, f"{suggestion.confidence:g}", suggestion.evidence
    elif rule.default is not None and action is Action.ADD:
        value, confidence, why = rule.default, "", f"the policy's default ({policy.file}:{rule.line})"
        if suggestion and suggestion.value != value:
            why += f"; but {suggestion.value} is {suggestion.evidence}"
            if suggestion.confidence >= MIN_SHOWN:
                action = Action.REVIEW
    else:
        return None
    place = (finding.target, finding.instance_id, finding.name)
    warning = revert_warning(finding.cause)
    return PlanRow(*place, rule.key, value, action, printable(current), confidence, why, warning=warning)


def row_complaint(row: PlanRow, policy: Policy) -> str | None:
    """Return why a row may not be carried out under a policy; None where it may."""
    if not re.fullmatch(REGION_NAME, row.target.region):  # it becomes part of a host's name
        return f"{row.target.region!r} is not a region"
    if not policy.covers(row.target.region):
        return f"{policy.file} does not cover the region {row.target.region}"
    if policy.accounts and not policy.accounts.covers(row.target.account_id):
        return f"{policy.file} does not cover the account {row.target.account_id}"
    if row.tag_key.lower().startswith("aws:") or not 0 < len(row.tag_key) <= TAG_KEY["maxLength"]:
        return f"{row.tag_key!r} is no key that can be written: it is AWS's own, or too long"
    if len(row.value) > TAG_VALUE["maxLength"]:
        return f"the value has {len(row.value)} characters; EC2 allows {TAG_VALUE['maxLength']}"
    if row.action in UNDO_ACTIONS:
        return None
    rule = next((rule for rule in policy.rules(row.target.region) if rule.key == row.tag_key), None)
    if rule is None:
        return f"{policy.file} does not ask for {row.tag_key} in {row.target.region}"
    if not row.writes:
        return None
    if not is_printable(row.value):
        return "the value has characters that nobody can see"
    violation = check_tag({row.tag_key: row.value}, rule, policy.placeholder_values)
    return violation.message if violation else None


def refuse_rows(complaints: Sequence[tuple[PlanRow, str]]) -> None:
    """Raise PolicyError with every complaint by its line, or UsageError if the rows were not read from a file."""
    problems = []
    for row, complaint in complaints:
        file, _, line = row.place.rpartition(":")
        if not file:
            raise UsageError(f"{row}: {complaint}")
        problems.append(Problem(file, int(line), 1, "", complaint))
    if problems:
        raise PolicyError(problems)


def decide(row: PlanRow, tags: Mapping[str, str] | None) -> Outcome | None:
    """Return what becomes of a row without a call, seen the instance's tags as they are now; None: it is written.

    No value is overwritten but the one that the row was made for, and an empty one.
    """
    if tags is None:
        return Outcome(row, Result.GONE, "the instance is gone")
    now = tags.get(row.tag_key)
    if now == row.value_after:
        return Outcome(row, Result.ALREADY_THERE, former=now)
    expected = is_blank(now or "") if row.action is Action.ADD else (now or "") == row.current
    if expected:
        new = {row.tag_key, *(key for key in tags if not key.lower().startswith("aws:"))}
        if now is None and len(new) > MAX_TAGS:
            return Outcome(row, Result.FAILED, f"it has {MAX_TAGS} tags, which is EC2's limit")
        if is_printable(now or ""):
            return None
    return Outcome(row, Result.CHANGED_SINCE, "it is missing now" if now is None else f"it is {now!r} now")


# EC2 takes 1,000 ids in a call, and asks for less where tags are written (EC2 API reference, CreateTags). A filter
# takes 200 values.
READ_BATCH, WRITE_BATCH, FILTER_VALUES = 1000, 200, 200
# Ten a second is what EC2 refills for CreateTags and DeleteTags in an account and region (EC2 developer guide,
# Request throttling); a tenth more between two keeps it so on a network that lets some catch up.
CALL_INTERVAL = 0.11
MAX_CHANGES = 50  # of a run when nothing else is said
MAX_SPLITS = 50  # of batches in a target, so that one that is denied altogether costs seconds


def describe_tags(client: Any, instance_ids: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """Return the tags of those of at most READ_BATCH instances that are still there; raises TargetError."""
    try:
        pages = list(describe_instances(client, InstanceIds=instance_ids))
    except TargetError as error:
        if not error.code.startswith("InvalidInstanceID"):
            raise
        # One is gone. A filter does not mind, but it takes several calls.
        scopes = (instance_ids[n : n + FILTER_VALUES] for n in range(0, len(instance_ids), FILTER_VALUES))
        filters = ([{"Name": "instance-id", "Values": scope}] for scope in scopes)
        pages = [page for each in filters for page in describe_instances(client, Filters=each)]
    return {
        instance.instance_id: instance.tags
        for instance in itertools.chain.from_iterable(pages)
        if instance.state not in ("shutting-down", "terminated")
    }


def batches(rows: Iterable[PlanRow]) -> Iterator[list[PlanRow]]:
    """Yield the rows of a target by batches of instances, those that get the same tags beside each other."""
    by_instance: dict[str, list[PlanRow]] = {}
    for row in sorted(rows, key=lambda row: (row.tag_key, row.value)):
        by_instance.setdefault(row.instance_id, []).append(row)
    alike = sorted(by_instance.values(), key=lambda rows: [(row.tag_key, row.value) for row in rows])
    for start in range(0, len(alike), READ_BATCH):
        yield [*itertools.chain.from_iterable(alike[start : start + READ_BATCH])]


def tag_calls(rows: Iterable[PlanRow]) -> dict[tuple[str, tuple[tuple[str, str], ...]], list[PlanRow]]:
    """Return the calls that carry rows out: operation and tags, and the rows of the instances that get just these.

    DeleteTags is told the value as well: it deletes no other (EC2 API reference).
    """
    by_instance: dict[tuple[str, str], list[PlanRow]] = {}
    for row in rows:
        operation = "DeleteTags" if row.action is Action.DELETE else "CreateTags"
        by_instance.setdefault((operation, row.instance_id), []).append(row)
    calls: dict[tuple[str, tuple[tuple[str, str], ...]], list[PlanRow]] = {}
    for (operation, _), group in by_instance.items():
        pairs = ((row.tag_key, row.current if row.action is Action.DELETE else row.value) for row in group)
        calls.setdefault((operation, tuple(sorted(pairs))), []).extend(group)
    return calls


def write_tags(
    client: Any, operation: str, instance_ids: Sequence[str], tags: Mapping[str, str], splits: Iterator[int]
) -> dict[str, TargetError]:
    """Create or delete the same tags on instances; returns those that were refused, each with the reason.

    EC2 refuses a whole batch for the sake of one instance. Those that are gone it names; to find others the
    batch is halved, as often as there are `splits`.
    """
    refused: dict[str, TargetError] = {}
    batches = [list(instance_ids[n : n + WRITE_BATCH]) for n in range(0, len(instance_ids), WRITE_BATCH)]
    pairs = [{"Key": key, "Value": value} for key, value in tags.items()]
    while batches:
        batch = batches.pop()
        try:
            answer = call_aws(client, operation, Resources=batch, Tags=pairs)
            if WRITTEN not in answer:  # as in a captive portal's "200 OK"
                message = "the answer does not say that it is done"
                raise target_error("ForeignAnswer", message, f"ec2:{operation}")
        except TargetError as error:
            named = set(re.findall("i-[0-9a-f]{8,17}", error.message)).intersection(batch)
            gone = named if error.code.startswith("InvalidInstanceID") else set()
            if gone:
                refused |= dict.fromkeys(gone, error)
                batches += [rest] if (rest := [id_ for id_ in batch if id_ not in gone]) else []
            elif is_of_instance(error) and len(batch) > 1 and next(splits, None) is not None:
                middle = len(batch) // 2
                batches += [batch[middle:], batch[:middle]]
            else:
                refused |= dict.fromkeys(batch, error)
                if not is_of_instance(error):
                    refused |= dict.fromkeys(itertools.chain.from_iterable(batches), error)
                    break
    return refused


# EC2 refuses an instance in more ways than can be listed (a service manages it, its state, a tag policy). So these
# are listed: what any other call meets as well (EC2 API reference, Common client errors and Server errors).
_DENIED = frozenset("UnauthorizedOperation AccessDenied AccessDeniedException".split())
_OF_TARGET = (ADVICE.keys() - _DENIED) | frozenset(
    "Blocked PendingVerification NotSignedUp InvalidAccessKeyId MissingAuthenticationToken IncompleteSignature "
    "ThrottledException RequestThrottled RequestThrottledException BandwidthLimitExceeded SlowDown 505 "
    "ServiceUnavailableException RequestTimeout RequestTimeoutException".split()
)


def is_of_instance(error: TargetError) -> bool:
    """Return whether an error may be of some instances only; else nothing more will come of the target."""
    # botocore's exceptions end in Error: they are of the network, and not AWS's refusal.
    return error.code not in _OF_TARGET and not error.code.endswith("Error")


_CHANGE = (
    "change_id, policy, account_id, region, instance_id, tag_key, former, value, why, who, changed_at, status"
)
_SAME_TAG = (
    "policy = :policy AND account_id = :account_id AND region = :region AND instance_id = :instance_id "
    "AND tag_key = :tag_key AND change_id <> :change_id"
)


def record_changes(state: State, changes: Iterable[tuple[Change, Result]]) -> None:
    """Keep what is intended and what was written, and forget what came to nothing; raises StateError.

    It may be repeated, as with a state in S3 it is. What an earlier run that was killed had intended is
    written where the tag is found as it was to be, and never was where it is written now.
    """
    changes = list(changes)
    for path in state.attempts() if changes else ():
        with opened_state(path, state.name) as db:
            db.execute("PRAGMA synchronous = FULL")
            with writing_state(db, state.name):
                for change, result in changes:
                    _record_change(db, change, result)
    state.release_signals()


def _record_change(db: sqlite3.Connection, change: Change, result: Result) -> None:
    """Keep one change as it stands now."""
    names = {name: getattr(change, name) for name in _CHANGE.split(", ")}
    if result in (Result.PLANNED, Result.WRITTEN):
        db.execute(
            f"INSERT INTO changes ({_CHANGE}) VALUES (:{_CHANGE.replace(', ', ', :')}) ON CONFLICT (change_id) "
            "DO UPDATE SET former = excluded.former, changed_at = excluded.changed_at, status = excluded.status",
            names,
        )
    elif result is not Result.UNKNOWN:
        db.execute("DELETE FROM changes WHERE change_id = :change_id", names)
    if result is Result.ALREADY_THERE:  # the last run that intended it found it undone, and so it did it
        intended = (
            f"SELECT max(id) FROM changes WHERE {_SAME_TAG} AND status = 'intended' AND value IS :value"
        )
        db.execute(f"UPDATE changes SET status = 'written' WHERE id = ({intended})", names)
    if result in (Result.ALREADY_THERE, Result.WRITTEN):
        db.execute(f"DELETE FROM changes WHERE {_SAME_TAG} AND status = 'intended'", names)


def fetch_changes(
    db: sqlite3.Connection, policy_name: str, instance_id: str, target: Target | None = None
) -> list[Change]:
    """Return what `remediate` wrote on an instance, in a target or in all, the oldest first."""
    where, values = "policy = ? AND instance_id = ?", [policy_name, instance_id]
    if target:
        where += " AND account_id = ? AND region = ?"
        values += astuple(target)
    rows = db.execute(f"SELECT {_CHANGE} FROM changes WHERE {where} ORDER BY id", values)
    columns = _CHANGE.replace("status", "change_status").split(", ")
    return [Change(*checked_row(columns, row)) for row in rows]


def check_undo(db: sqlite3.Connection, name: str, policy_name: str, rows: Iterable[PlanRow]) -> list[PlanRow]:
    """Return the rows of an undo file, with `skip` for what is reverted already; raises PolicyError.

    Each row must revert a change that the state has on record: anybody can write or edit an undo file.
    """
    checked, complaints = [], []
    for row in rows:
        found = fetch_changes(db, policy_name, row.instance_id, row.target)
        changes = [change for change in found if change.tag_key == row.tag_key]
        written = [change for change in changes if change.status == "written"]
        # A person may have set the same value again since: that one is not the tool's to take away.
        if written and (written[-1].former or "", written[-1].value) == (row.current, row.value_after):
            why = f"reverted already, at {written[-1].changed_at}"
            checked.append(replace(row, action=Action.SKIP, why=why))
        elif any(_reverts(row, change) for change in changes):
            checked.append(row)
        else:
            done = f"set it to {row.current!r}" if row.current else "deleted it"
            before = "missing" if row.action is Action.DELETE else repr(row.value)
            complaint = (
                f"{row.instance_id} {row.tag_key}: the state {name} has no record that tagcheck {done} under the policy "
                f"{policy_name} when it was {before}: take the row out, or name that run's state with --state"
            )
            complaints.append((row, complaint))
    refuse_rows(complaints)
    return checked


def _reverts(row: PlanRow, change: Change) -> bool:
    """Return whether a row of an undo file reverts just this change.

    What is not printable is never written over, and so not in an undo file: nothing is unescaped.
    """
    former, restored = change.former, row.value_after
    if is_blank(former or "") and is_blank(restored or ""):
        former = restored  # of a run that was killed the record says "missing" for an empty tag as well
    return (change.value or "") == row.current and former == restored


PLAN_COLUMNS = (
    "Account", "Region", "InstanceId", "Name", "Tag", "Value", "Action", "Current", "Confidence", "Why", "Warning",
    "Checksum",
)  # fmt: skip
PLAN_NEEDED = ("Account", "Region", "InstanceId", "Tag", "Value", "Action")


def write_plan(file: TextIOBase, rows: Iterable[PlanRow], *, header: bool = True) -> None:
    """Write a plan, or the undo file of one, as CSV."""
    if header:
        file.write(csv_line(PLAN_COLUMNS))
    for row in rows:
        where = (row.target.account_id, row.target.region, row.instance_id, row.name)
        what = (row.tag_key, row.value, row.action, row.current, row.confidence, row.why, row.warning, "")
        file.write(csv_line((*where, *what)))


def plan_text(rows: Iterable[PlanRow]) -> str:
    """Return a plan as CSV; the checksum in its first row tells later whether anybody has edited it."""
    file = StringIO()
    write_plan(file, rows)
    text = file.getvalue()
    head, _, body = text.partition("\n")
    body = body or "," * (len(PLAN_COLUMNS) - 1) + "\n"  # a plan without rows has a checksum as well
    first, end, rest = body.partition("\n")
    checksum = hashlib.sha256(f"{head}\n{body}".encode()).hexdigest()[:16]
    return f"{head}\n{first}{checksum}{end}{rest}"


def is_unedited_plan(file: IO[bytes]) -> bool:
    """Return whether a file is a plan as plan_text made it; none of the first edition is."""
    head, first = file.readline(MAX_PLAN_LINE), file.readline(MAX_PLAN_LINE)
    cells, comma, checksum = first.removesuffix(b"\n").rpartition(b",")
    digest = hashlib.sha256(head + cells + comma + b"\n")
    while piece := file.read(CHUNK_SIZE):
        digest.update(piece)
    return digest.hexdigest()[:16].encode() == checksum


MAX_PLAN_PROBLEMS = 1000  # a file with more of them is some other file
MAX_PLAN_LINE = 1_048_576  # bytes; EC2's longest key and value are some hundred


def read_plan(path: str, policy: Policy, actions: Container[Action]) -> list[PlanRow]:
    """Return the rows of a plan that a person may have edited, all of which may be carried out; raises PolicyError."""
    rows: dict[tuple[Target, str, str], PlanRow] = {}
    problems: list[Problem] = []
    for line, cells in _plan_lines(path):
        row = _read_row(cells, f"{path}:{line}")
        complaint = row if isinstance(row, str) else None
        if isinstance(row, PlanRow):
            same = rows.setdefault((row.target, row.instance_id, row.tag_key), row)
            if row.action not in actions:
                complaint = f"a row to {row.action}: --plan takes a plan, --undo an undo file"
            elif row.action is Action.REPLACE and "Current" not in cells:
                complaint = "to replace a value takes the column Current: it may have changed since"
            elif same is not row:
                complaint = f"{same.place} has the same tag of the same instance: keep one of them"
            else:
                complaint = row_complaint(row, policy)
        if complaint:
            problems.append(Problem(path, line, 1, "", complaint))
        if len(problems) == MAX_PLAN_PROBLEMS:
            break
    if problems:
        raise PolicyError(problems)
    return list(rows.values())


def _plan_lines(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row of a plan that is not blank, by its header, and the line it ends on; raises PolicyError."""
    columns: list[str] = []
    blank = 0
    try:
        with Path(path).open("rb") as file:
            lines = _decoded_lines(file, path)
            head = ""
            for head in lines:
                if head.strip():
                    break
                blank += 1
            # Excel separates by what the region of the machine uses: a semicolon in much of Europe.
            separator = max(",;\t", key=head.count)
            table = csv.reader(itertools.chain([head], lines), delimiter=separator, strict=True)
            try:
                for cells in table:
                    line = blank + table.line_num
                    if not any(cell.strip() for cell in cells):
                        continue
                    if not columns:
                        columns = [cell.strip() for cell in cells]
                        lacking = [name for name in PLAN_NEEDED if columns.count(name) != 1]
                        if lacking:
                            raise _plan_error(path, line, f"the header needs {', '.join(lacking)}, once each")
                    elif len(cells) != len(columns):
                        counts = f"{counted(len(cells), 'cell')} under {counted(len(columns), 'column')}"
                        raise _plan_error(
                            path, line, f"{counts}: is a comma not in quotes, or the file cut short?"
                        )
                    else:
                        row = dict(zip(columns, map(csv_text, cells), strict=True))
                        if any(text.strip() for name, text in row.items() if name != "Checksum"):
                            yield line, row
            except csv.Error as problem:
                raise _plan_error(path, blank + table.line_num, f"not CSV: {problem}") from problem
    except OSError as problem:
        raise UsageError(f"{path} cannot be read: {problem.strerror}") from problem
    if not columns:
        raise _plan_error(path, 1, "empty: it needs a header, and a row for each tag")


def _decoded_lines(file: BufferedReader, path: str) -> Iterator[str]:
    """Yield the lines of a plan, of whatever size the file is; raises PolicyError."""
    start = file.peek(2)[:2]
    for number, line in enumerate(iter(lambda: file.readline(MAX_PLAN_LINE), b""), 1):
        if len(line) == MAX_PLAN_LINE:
            raise _plan_error(path, number, f"longer than {MAX_PLAN_LINE:,} bytes: this is not a plan")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as problem:
            what = "UTF-16" if start in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
            raise _plan_error(path, number, f'{what}: save it as "CSV UTF-8"') from problem
        yield from StringIO(text, newline="")  # old programs end a line with a carriage return


def _plan_error(path: str, line: int, message: str) -> PolicyError:
    """Return the error of a file that cannot be read as a plan."""
    return PolicyError([Problem(path, line, 1, "", message)])


def _read_row(cells: Mapping[str, str], place: str) -> PlanRow | str:
    """Return a row of a plan, or what is wrong with its cells."""
    account_id, region, instance_id = (cells[name].strip() for name in PLAN_NEEDED[:3])
    action = cells["Action"].strip().lower()
    if not re.fullmatch("[0-9]{12}", account_id):
        return f"{account_id!r} is no account id: it has 12 digits (a spreadsheet may have cut its zeros)"
    if not re.fullmatch("i-[0-9a-f]{8,17}", instance_id):
        return f"{instance_id!r} is no instance id: it looks like i-0123456789abcdef0"
    if action not in list(Action):
        return f"{action!r} is no action: write {', '.join(PLAN_ACTIONS[:-1])} or {PLAN_ACTIONS[-1]}"
    name, current, confidence, why = (cells.get(key, "") for key in ("Name", "Current", "Confidence", "Why"))
    return PlanRow(
        *(Target(account_id, region), instance_id, name, cells["Tag"], cells["Value"], Action(action)),
        *(current, confidence, why, place),
        warning=cells.get("Warning", ""),
    )


class UndoFile:
    """What takes a run back, as a plan: every row is on the disk before its tag is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[PlanRow, str | None] = {}  # rows that may have been written, and the former values
        self._file: IO[bytes] | None = None  # kept open: its name may be another file's later

    @property
    def shown(self) -> str:
        """Its path for a command line, short where it can be."""
        try:
            return os.path.relpath(self.path)
        except (OSError, ValueError):  # no current directory; another drive
            return str(self.path)

    def close(self) -> None:
        """Close the file, if any row was added."""
        if self._file:
            self._file.close()

    def add(self, rows: Mapping[PlanRow, str | None]) -> None:
        """Keep what the tags of rows are before they are written; raises OutputError."""
        text = StringIO()
        write_plan(text, (_undoing(row, former) for row, former in rows.items()), header=not self.rows)
        size: int | None = None
        try:
            if self._file is None:
                self._file = open(self.path, "xb", buffering=0, opener=open_private)  # noqa: SIM115
            elif not os.path.samestat(os.fstat(self._file.fileno()), self.path.lstat()):
                raise OSError(errno.ESTALE, "another process replaced it")
            size = os.fstat(self._file.fileno()).st_size
            with open(self._file.fileno(), "wb", closefd=False) as file:
                file.write(text.getvalue().encode())
            os.fsync(self._file.fileno())
        except FileExistsError:  # of another run in the same second
            self.path = self.path.with_stem(f"{self.path.stem}-{uuid.uuid4().hex[:8]}")
            self.add(rows)
        except OSError as error:
            if self._file and size is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(size)  # half a row could not be read back
                    self._file.seek(size)
            raise OutputError(
                f"the undo file {self.path} cannot be written: {error.strerror}; nothing more was written in AWS, "
                "make room and run again"
            ) from error
        self.rows.update(rows)

    def drop(self, rows: Iterable[PlanRow]) -> None:
        """Take out the rows whose tags were not written after all; raises OutputError."""
        for row in rows:
            del self.rows[row]
        new = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        try:
            self.close()
            self._file = None
            if not self.rows:
                self.path.unlink()
                return
            with open(new, "x", encoding="utf-8", opener=open_private) as file:
                write_plan(file, itertools.starmap(_undoing, self.rows.items()))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise OutputError(
                f"the undo file {self.path} cannot be shortened to what was written: {error.strerror}"
            ) from error


def _undoing(row: PlanRow, former: str | None) -> PlanRow:
    """Return the row that takes another one back."""
    action = Action.DELETE if former is None else Action.RESTORE
    written = row.value_after or ""
    why = f"undo of: {row.why.removeprefix('undo of: ')}"
    return replace(
        row, action=action, value=former or "", current=written, confidence="", why=why, warning=""
    )


@dataclass(frozen=True, slots=True)
class Remediation:
    """All that is to be said of a plan, carried out or not."""

    policy: Policy
    applied: bool
    outcomes: Sequence[Outcome]
    undo_file: str
    exit_code: ExitCode

    @property
    def totals(self) -> dict[str, int]:
        """The number of rows with each result."""
        return {str(result): sum(o.result is result for o in self.outcomes) for result in Result}

    @property
    def changed(self) -> bool:
        """True where something in AWS is, or may be, no longer as it was."""
        return bool(self.totals[Result.WRITTEN] or self.totals[Result.UNKNOWN])

    @property
    def warnings(self) -> list[tuple[Target, int, str]]:
        """What would undo the tags that are written: where, on how many instances, and a sentence."""
        warned = {(o.row.target, o.warning, o.row.instance_id) for o in self.outcomes if o.warning}
        counts = Counter((target, warning) for target, warning, _ in warned)
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return [
            (target, number, f"{counted(number, 'instance')} of {warning}")
            for (target, warning), number in ordered
        ]


def write_remediation_json(file: TextIOBase, done: Remediation) -> None:
    """Write what became of a plan as one JSON object, a line a row; `changed` is Ansible's."""
    head = {
        "version": __version__,
        "policy": {"name": done.policy.name, "file": done.policy.file, "digest": done.policy.digest},
        "changed": done.changed,
        "applied": done.applied,
        "undo_file": done.undo_file or None,
        "exit_code": int(done.exit_code),
        "exit_name": done.exit_code.name,
        "summary": done.totals,
        "warnings": [
            {
                "account_id": target.account_id,
                "region": target.region,
                "instances": instances,
                "message": message,
            }
            for target, instances, message in done.warnings
        ],
    }
    write_json_object(file, head, rows=map(_outcome_record, done.outcomes))


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    """Return what became of a row as a JSON object."""
    row = outcome.row
    return {
        "account_id": row.target.account_id,
        "region": row.target.region,
        "instance_id": row.instance_id,
        "name": row.name,
        "tag_key": row.tag_key,
        "value": row.value_after,
        "action": row.action,
        "why": row.why,
        "result": outcome.result,
        "message": outcome.message or None,
        "warning": outcome.warning or None,
    }


def _write_outcomes_csv(file: TextIOBase, done: Remediation) -> None:
    """Write the plan again, whatever became of it, as CSV."""
    file.write(plan_text(outcome.row for outcome in done.outcomes))


REMEDIATION_WRITERS: dict[str, Callable[[TextIOBase, Remediation], None]] = {
    "csv": _write_outcomes_csv,
    "json": write_remediation_json,
}


def remediation_lines(done: Remediation, csv_path: str, command: Callable[..., str]) -> Iterator[str]:
    """Yield the plan or what became of it, for people, and what to do next."""
    rows = [outcome.row for outcome in done.outcomes]
    writing = [row for row in rows if row.writes]
    instances = len({(row.target, row.instance_id) for row in writing})
    aside = Counter(row.action for row in rows if not row.writes)
    others = "".join(f", {number:,} to {action}" for action, number in sorted(aside.items()))
    yield (
        f"Policy {done.policy.name} ({done.policy.file}): {counted(len(writing), 'tag')} to write on "
        f"{counted(instances, 'instance')}{others}"
    )
    if done.applied:
        yield from _result_lines(done)
        yield from _warning_lines(done)
        if done.totals[Result.WRITTEN] and writing[0].action in PLAN_ACTIONS:
            yield "The findings stay open until the next scan, which resolves them as tagged"
        if done.undo_file:
            yield f"To take it back: {command('--undo', done.undo_file, '--apply')}"
        return
    if rows:
        head = ("ACTION", "ACCOUNT", "REGION", "INSTANCE", "NAME", "TAG", "VALUE", "WHY")
        yield ""
        yield from table_lines(map(_plan_cells, rows), len(rows), head, csv_path)
        yield ""
    yield from _warning_lines(done)
    if writing and writing[0].action in PLAN_ACTIONS:
        yield "Terraform and other infrastructure as code may revert these tags: set them there as well"
    yield "Nothing was written" + (f"; to write it: {command('--apply')}" if writing else "")


def _plan_cells(row: PlanRow) -> tuple[str, ...]:
    """Return a row of a plan as the table shows it."""
    where = (row.target.account_id, row.target.region, row.instance_id, name_cell(row.name))
    return (row.action, *where, cut_text(row.tag_key, 40), cut_text(row.value, 40) or "-", row.why)


def _warning_lines(done: Remediation) -> Iterator[str]:
    """Yield what would undo the tags, a line for each source."""
    warnings = done.warnings
    yield from (f"Warning: {message}" for _, _, message in warnings[:SUMMARY_FINDINGS])
    if len(warnings) > SUMMARY_FINDINGS:
        yield f"  … and {len(warnings) - SUMMARY_FINDINGS:,} more"


def _result_lines(done: Remediation) -> Iterator[str]:
    """Yield how many rows were carried out, and which were not and why."""
    words = {Result.WRITTEN: "written", Result.ALREADY_THERE: "already there"}
    named = [outcome for outcome in done.outcomes if outcome.row.writes and outcome.result not in words]
    numbers = [f"{done.totals[result]:,} {word}" for result, word in words.items()]
    yield f"{', '.join(numbers)}, {len(named):,} left out{':' if named else ''}"
    for outcome in named[:SUMMARY_FINDINGS]:
        yield f"  {outcome.result}  {outcome.row}: {outcome.message}"
    if len(named) > SUMMARY_FINDINGS:
        yield f"  … and {len(named) - SUMMARY_FINDINGS:,} more"


def check_plan_goal(output: Output) -> None:
    """Refuse to replace a file that may be a plan that a person has edited; raises OutputError."""
    if not output.replaceable:
        return
    try:
        with Path(output.path).open("rb") as file:
            unedited = is_unedited_plan(file)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(
            f"--csv {output.path} cannot be read: {error.strerror}; name another file"
        ) from error
    if not unedited:
        raise OutputError(
            f"{output.path} exists and is not as tagcheck wrote it: it may be a plan that somebody has edited, and "
            f"was left alone. Apply it with --plan {output.path}, write the new plan elsewhere with --csv FILE, or "
            "delete it"
        )


########################################################################################################
# 11 Command line: build_parser, run_scan, main
########################################################################################################

DEFAULT_POLICY = Path(__file__).resolve().parent / "policies" / "default.yaml"
with contextlib.suppress(OSError, ValueError):  # not in the directory of the script, or in one that is gone
    DEFAULT_POLICY = DEFAULT_POLICY.relative_to(Path.cwd())
# What the reading of a target hands on: a page of it, the reason why it failed, or None at its end.
Reading = tuple[Target, list[Instance] | TargetError | None]


def _positive(text: str) -> int:
    """Return a number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _days(text: str) -> int:
    """Return a number of days that no time is before the calendar's begin for, for argparse."""
    days = _positive(text)
    if days > 9999:
        raise argparse.ArgumentTypeError(f"{days} is more than 9999 days")
    return days


def _probability(text: str) -> float:
    """Return a number from 0 to 1, for argparse."""
    number = float(text)
    if not 0 <= number <= 1:
        raise ValueError
    return number


def _shard(text: str) -> tuple[int, int]:
    """Return the share that 3/8 stands for."""
    part, _, parts = text.partition("/")
    share = int(part), int(parts)
    if not 1 <= share[0] <= share[1]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no share: write the first of eight as 1/8, the last as 8/8"
        )
    return share


def _one(metavar: str, help_: str, **more: Any) -> dict[str, Any]:
    """Describe an option that takes one value."""
    return {"metavar": metavar, "help": help_, **more}


def _many(metavar: str, help_: str) -> dict[str, Any]:
    """Describe an option that can be given several times."""
    return {"metavar": metavar, "help": f"{help_} (repeatable)", "action": "append", "default": []}


def _flag(help_: str) -> dict[str, Any]:
    """Describe an option without a value."""
    return {"action": "store_true", "help": help_}


_FAIL_ON = "which findings make the exit code 3: any, new (NEW and REOPENED) or never"
OPTIONS: dict[str, dict[str, Any]] = {
    "--policy": _one("FILE", "default: policies/default.yaml beside the script", default=str(DEFAULT_POLICY)),
    "--region": _many("R", "only this region of the policy's"),
    "--account": _many("ID", "only this account of the policy's"),
    "--shard": _one("I/N", "only the I-th of N shares of the accounts", type=_shard, default=(1, 1)),
    "--profile": _one("NAME", "the AWS profile whose credentials to use"),
    "--instances": _many(
        "FILE", "saved `aws ec2 describe-instances` JSON in place of calling AWS, - for stdin"
    ),
    "--include-managed-resources": _flag(
        "the saved files were made with this option of the AWS CLI, so they have the instances that AWS services "
        "operate"
    ),
    "--live": _flag("ask AWS how the instance is now"),
    "--workers": _one("N", "targets read at a time (default: 16)", type=_positive, default=16),
    "--state": _one(
        "FILE",
        "what is remembered, or s3://BUCKET/KEY (default: instance_state.db)",
        default="instance_state.db",
    ),
    "--csv": _one("FILE", "the findings (default: violators.csv, none of a --dry-run), - for stdout"),
    "--json": _one("FILE", "the whole result as JSON, - for stdout"),
    "--junit": _one("FILE", "the result as JUnit XML, for Jenkins, - for stdout"),
    "--prices": _one("FILE", "a CSV of instance_type,region,hourly_price: what findings cost a month"),
    "--creators": _flag("look up in CloudTrail who made what was found, and remember it"),
    "--creators-budget": _one(
        "TIME", "how long to look them up (default: 60s)", type=duration, default=timedelta(minutes=1)
    ),
    "iam-policy --creators": _flag("for scans with --creators"),
    "history --csv": _one("FILE", "the findings as CSV, - for stdout"),
    "history --json": _one("FILE", "the findings as JSON, - for stdout"),
    "history --account": _many("ID", "only of this account"),
    "history --region": _many("R", "only of this region"),
    "--status": _many("S", "only open or resolved ones, or NEW, REPEAT, REOPENED or RESOLVED"),
    "--tag": _many("KEY", "only those that lack this tag"),
    "--older-than": _one("TIME", "only those first seen longer ago, such as 30d", type=duration),
    "--html": _one("FILE", "the dashboard, - for stdout", required=True),
    "--days": _one("N", "how many days to keep, at most 9999", type=_days, required=True),
    "prune --dry-run": _flag("only say what would go"),
    "remediate --csv": _one(
        "FILE", "the plan (default: remediate-plan.csv), - for stdout; one that was edited is never replaced"
    ),
    "--min-confidence": _one(
        "P", "how sure a suggestion must be (default: 0.95)", type=_probability, default=MIN_CONFIDENCE
    ),
    "--plan": _one("FILE", "a plan as it was written, or as a person has edited it"),
    "--apply": _flag("write the tags, in AWS; without it nothing is changed"),
    "--max-changes": _one(
        "N", "refuse to write more tags (default: 50)", type=_positive, default=MAX_CHANGES
    ),
    "--undo": _one("FILE", "the undo file of an earlier run, to take back what is still as it was written"),
    "--role": _one("NAME", "the role to assume for writing (default: the policy's role_name)"),
    "--fail-on": {"choices": ["any", "new", "never"], "default": "any", "help": _FAIL_ON},
    "--require-state": _flag("fail where there is no state yet, instead of starting a new one"),
    "--dry-run": _flag("compare with the state, write nothing to it: the preview of a changed policy"),
    "--quiet": _flag("no summary and no progress, only errors"),
    "--verbose": _flag("say each retry as well"),
}
_COMMANDS = {
    "scan": (
        "check every instance in scope against the policy; record, report, exit",
        *("--policy", "--region", "--account", "--shard", "--profile", "--instances", "--workers", "--state"),
        *("--include-managed-resources",),
        *("--csv", "--json", "--junit", "--prices", "--creators", "--creators-budget"),
        *("--fail-on", "--require-state", "--dry-run", "--quiet", "--verbose"),
    ),
    "validate": ("say what is wrong in policy files, and what to write instead; no AWS needed", "--json"),
    "explain": (
        "print the rules in force in a region; of an instance, why it passes or fails, and its history",
        *("--policy", "--region", "--account", "--state", "--instances", "--live", "--profile"),
    ),
    "history": (
        "list findings kept in the state: open, resolved, or one instance's",
        *("--policy", "--account", "--region", "--status", "--tag", "--older-than"),
        *("--state", "--csv", "--json", "--profile"),
    ),
    "report": ("write the dashboard: trends as one HTML page", "--html", "--policy", "--state", "--profile"),
    "prune": (
        "delete findings that were resolved more than N days ago, and scans; the trend keeps a row a day",
        *("--days", "--dry-run", "--state", "--profile"),
    ),
    "remediate": (
        "plan the tags that would put the open findings right; --apply writes them",
        *("--policy", "--region", "--account", "--profile", "--role", "--state", "--min-confidence", "--csv"),
        *("--plan", "--max-changes", "--apply", "--undo", "--json", "--quiet", "--verbose"),
    ),
    "schema": ("print the policy's JSON Schema (Draft 7)",),
    "iam-policy": (
        "print the least IAM policy that this policy file's features need",
        *("--policy", "--state", "--creators"),
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; its help ends with the table of exit codes."""
    codes = "exit codes:\n" + "\n".join(f"  {code:>3} {code.name:<11} {code.meaning}" for code in ExitCode)
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": codes}
    what = "Find the EC2 instances that lack their required tags."
    parser = argparse.ArgumentParser(prog="tagcheck.py", description=what, **shape)
    parser.add_argument("--version", action="version", version=f"tagcheck {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (help_, *options) in _COMMANDS.items():
        command = commands.add_parser(
            name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.", **shape
        )
        command.set_defaults(run=globals()[f"run_{name.replace('-', '_')}"], quiet=False, verbose=False)
        for option in options:
            short = [f"-{option[2]}"] if option in ("--quiet", "--verbose") else []
            command.add_argument(*short, option, **OPTIONS.get(f"{name} {option}", OPTIONS.get(option, {})))
        if name == "validate":
            command.add_argument("policies", metavar="POLICY", nargs="+", help="a policy file, - for stdin")
        elif name in ("explain", "history"):
            command.add_argument(
                "instance", metavar="INSTANCE", nargs="?", help="an instance id, such as i-0abc…"
            )
    return parser


def run_scan(args: argparse.Namespace, now: datetime) -> ExitCode:
    """Read every target, record what was found, write the reports; returns how it ended."""
    begun = time.monotonic()
    policy = load_policy(args.policy)
    _check_scope(args, policy)
    if args.creators and args.instances:
        raise UsageError("--creators asks AWS, and --instances is there not to: leave one of them out")
    if args.csv is None:
        args.csv = "" if args.dry_run else "violators.csv"
    outputs = _outputs(args)
    senders = {} if args.dry_run else _senders(args, policy)
    if args.include_managed_resources and not args.instances:
        raise UsageError("--include-managed-resources says how files were saved: give it with --instances")
    may_hide_managed = bool(args.instances) and not args.include_managed_resources
    scan = Scan(str(uuid.uuid4()), policy, now, may_hide_managed)
    prices = load_prices(args.prices) if args.prices else Prices({})
    aws = None
    if not args.instances:
        actions = (*READ_ACTIONS, *(CREATOR_ACTIONS if args.creators else ()))
        aws = Aws(args.profile, args.workers, actions)
    with contextlib.ExitStack() as stack:
        state = open_state(args, stack, copied=args.dry_run, create=not args.require_state)
        state.check()
        if args.require_state:
            require_scans(state.path, state.name)
        staged = stack.enter_context(staged_outputs(outputs))
        db = stack.enter_context(contextlib.closing(open_sightings()))
        notices: list[str] = []
        readings = read_live(args, policy, aws, notices) if aws else read_saved(args, policy, notices)
        with sighting_errors():
            used = _collect(db, scan, readings, prices, Progress(quiet=args.quiet), notices)
            if aws and args.creators:
                notices += _look_up_creators(args, aws, db, state.path, scan)
        finished_at = now + timedelta(seconds=time.monotonic() - begun)
        talk = sys.stderr if "-" in (output.path for output in outputs) else sys.stdout
        report: ScanReport | None = None
        summary = StringIO()

        def record(path: Path) -> None:
            nonlocal report, summary
            with record_scan(db, path, scan, finished_at, state.name):
                coverage = fetch_coverage(db, scan)
                begun_anew = filter(
                    None, [fetch_notice(db, scan, args.state, coverage, dry_run=args.dry_run)]
                )
                more = (
                    *_unseen_notices(args, scan, fetch_unseen(db, scan), coverage),
                    *_exemption_notices(args, scan, used),
                    *check_patterns(policy),
                )
                report = _report(args, db, scan, finished_at, coverage, [*begun_anew, *notices, *more])
                if senders:
                    queue_notifications(db, scan, ending_subjects(policy, now.date()))
                    pending = functools.partial(fetch_pending, db, policy.name)
                    add_digest_lines(db, digest_lines(report, pending))
                stage_report(staged, WRITERS, report)
                summary = StringIO()
                write_summary(summary, report, args.csv, colour=_has_colour(talk))
                if isinstance(state, LocalState):
                    _ignore_signals()  # state and reports take their places together

        try:
            for path in state.attempts(scan.scan_id):
                record(path)
        except UploadError:
            if report is None:
                record(state.path)  # the state as it was before the scan will do for a CSV
            publish_report([goal for goal in staged if goal.output.format == "csv"], emit)
            raise
        assert report is not None
        _ignore_signals()
        publish_report(staged, emit)
        if not args.quiet:
            emit(summary.getvalue(), talk)
        if senders:
            _notify(senders, db, state, report)
        return report.exit_code


def _senders(args: argparse.Namespace, policy: Policy) -> Senders:
    """Return how to send by each medium, before anything is read; raises UsageError, CredentialsError."""
    senders: dict[str, Callable[[Digest], None]] = {}
    notify = policy.notify or Notify()
    if notify.slack:
        webhook = find_webhook(notify.slack, os.environ)
        senders["slack"] = lambda digest: post_to_slack(webhook, digest_text(digest))
    aws = Aws(args.profile, workers=1) if notify.sns or notify.email else None
    if aws and (topic := notify.sns):
        senders["sns"] = lambda digest: publish_to_sns(aws.client("sns", topic.split(":")[3]), topic, digest)
    if aws and (email := notify.email):
        region = email.region or aws.session.region_name or home_region(sorted(policy.regions))
        senders["email"] = lambda digest: send_email(aws.client("sesv2", region), email, digest)
    return senders


def _notify(senders: Senders, db: sqlite3.Connection, state: State, report: ScanReport) -> None:
    """Send the digests; raises NotificationError if some could not be sent."""
    with sighting_errors():
        failures = _send(senders, db, state, report)
        shown = "; ".join(itertools.islice(failures, 5))
        more = sum(1 for _ in failures)
    if shown:
        shown += f"; and {more:,} more" if more else ""
        raise NotificationError(
            f"the scan is recorded, but not every notification was sent; the next scan tries again: {shown}"
        )


def _send(senders: Senders, db: sqlite3.Connection, state: State, report: ScanReport) -> Iterator[str]:
    """Send the digests, record in the state what each channel was sent, and yield what failed.

    A crash between the two makes the next scan send that channel's again: rather twice than never.
    """
    policy, down = report.scan.policy, set[str]()
    for channel in policy.notify.channels if policy.notify else ():
        for digest in write_digests(report, channel, fetch_digests(db, channel, OWNER_LINES)):
            try:
                if digest.medium in down:
                    raise NotificationError("not tried")
                _heed_signals()
                senders[digest.medium](digest)
                continue
            except (TagcheckError, KeyboardInterrupt) as error:
                failure = error
            finally:
                _ignore_signals()
            drop_digest(db, channel, digest.to)
            if isinstance(failure, KeyboardInterrupt):
                down |= senders.keys()
            elif not (isinstance(failure, TargetError) and failure.code in ONE_EMAIL_ERRORS):
                down.add(digest.medium)
            yield f"{digest.to or channel}: {str(failure) or 'interrupted'}"
        try:
            record_sent(db, state, policy.name, channel, report.finished_at)
        except StateError as error:
            LOG.debug("%s", error)
            yield f"{channel}: sent, and will be sent again, as the state could not be updated"


def _report(
    args: argparse.Namespace,
    db: sqlite3.Connection,
    scan: Scan,
    finished_at: datetime,
    coverage: Sequence[Coverage],
    notices: Sequence[str],
) -> ScanReport:
    """Return what the reports print of the scan that is being recorded."""
    costs, unpriced = fetch_costs(db, scan)
    return ScanReport(
        scan,
        finished_at,
        args.dry_run,
        decide_exit_code(coverage, args.fail_on),
        coverage,
        findings=lambda: fetch_findings(db, scan),
        resolved=lambda: fetch_findings(db, scan, resolved=True),
        exempted=lambda: fetch_exempted(db),
        causes=fetch_causes(db, scan),
        costs=costs,
        unpriced=unpriced,
        operators=fetch_operators(db, scan),
        notices=notices,
    )


def _look_up_creators(
    args: argparse.Namespace, aws: Aws, db: sqlite3.Connection, path: Path, scan: Scan
) -> Iterator[str]:
    """Keep who made what was found and has no creator yet, and yield what is to be said of it; fails no scan."""
    deadline = time.monotonic() + args.creators_budget.total_seconds()
    since = scan.started_at - timedelta(days=CLOUDTRAIL_DAYS)
    waiting = fetch_uncreated(db, path, scan, since)
    add_unknown_creators(db, since, f"launched more than {CLOUDTRAIL_DAYS} days ago")
    number = sum(map(len, waiting.values()))
    if number:
        LOG.info("Looking up who made %s, for at most %s", counted(number, "instance"), args.creators_budget)

    def describe(target: Target) -> Iterator[list[tuple[str, str]]]:
        with aws.account(target.account_id):
            client = aws.client("cloudtrail", target.region)
            yield from describe_creators(client, waiting[target], deadline)

    for target, creators in read_in_parallel([*waiting], describe, args.workers):
        if isinstance(creators, TargetError):
            rest = [(instance_id, f"{UNKNOWN}{creators.code})") for instance_id, _ in waiting[target]]
            number -= len(rest)
            add_creators(db, target, rest)
            yield f"Who made the instances in {target} was not looked up: {creators}"
        elif creators:
            number -= len(creators)
            add_creators(db, target, creators)
            known = {instance_id for instance_id, _ in creators}
            waiting[target] = [entry for entry in waiting[target] if entry[0] not in known]
    if number > 0:
        yield (
            f"Who made {counted(number, 'instance')} was not looked up within --creators-budget "
            f"{int(args.creators_budget.total_seconds())}s: the next scan goes on"
        )


def _check_scope(args: argparse.Namespace, policy: Policy) -> None:
    """Raise UsageError where a region or an account that was asked for cannot be in the policy's scope."""
    for region in args.region:
        if not policy.covers(region) or not is_region(region):
            covered = ", ".join(sorted(policy.regions))
            raise UsageError(
                f"--region {printable(region)}: {policy.file} does not cover it (it has {covered})"
            )
    for account_id in args.account:
        if not re.fullmatch("[0-9]{12}", account_id):
            raise UsageError(f"--account {printable(account_id)}: an account id has 12 digits")


def _outputs(args: argparse.Namespace) -> list[Output]:
    """Return the reports that were asked for, each known to be writable; raises UsageError, OutputError."""
    formats = (*WRITERS, "html")
    paths = {name: path for name in formats if (path := getattr(args, name, None))}
    stdout = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
    outputs = [Output(name, "-" if path in stdout else path) for name, path in paths.items()]
    goals = [output.path if output.path == "-" else os.path.realpath(output.path) for output in outputs]
    taken = {
        os.path.realpath(path)
        for path in (args.state, args.policy, getattr(args, "prices", None), *getattr(args, "instances", ()))
        if path and path != "-"
    }
    taken |= {f"{os.path.realpath(args.state)}{end}" for end in ("-journal", "-wal", "-shm")}  # SQLite's own
    if len(set(goals)) < len(goals) or taken & set(goals):
        raise UsageError(
            "two of --state, --policy, --instances, --prices, --csv, --json, --junit, --html have the same goal (or a "
            "report has the name of the state's journal): give each its own"
        )
    for output in outputs:
        check_output(output)
    return outputs


def open_state(
    args: argparse.Namespace, stack: contextlib.ExitStack, *, copied: bool = False, create: bool = False
) -> State:
    """Return the state that was named, or a copy of it to do with as one likes; raises UsageError, StateError.

    Where there is none, only `create` lets one begin.
    """
    state: State
    if args.state.startswith("s3://"):
        bucket, key = split_s3(args.state)
        aws = Aws(args.profile, workers=1)
        s3 = aws.client("s3", aws.session.region_name or "us-east-1")
        state = S3State(s3, bucket, key, _temporary(stack) / "state.db", _hold_signals, create=create)
    else:
        state = LocalState(resolve_state(args.state), create=create)
    if copied:
        copy = LocalState(_temporary(stack) / "state.db", state.name)
        state.copy(copy.path)
        return copy
    return state


@contextlib.contextmanager
def _reading(args: argparse.Namespace, policy: str | None) -> Iterator[sqlite3.Connection]:
    """Yield a connection for reading the state that was named; raises UsageError, StateError.

    Where a policy is given, the state must have a scan of it.
    """
    with contextlib.ExitStack() as stack:
        state = open_state(args, stack)
        db = stack.enter_context(reading_state(state, _temporary(stack) / "state.db"))
        if policy is not None:
            require_policy(db, state.name, policy)
        yield db


def _temporary(stack: contextlib.ExitStack) -> Path:
    """Return a directory that goes away at the end of the command."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tagcheck-")))


def read_live(args: argparse.Namespace, policy: Policy, aws: Aws, notices: list[str]) -> Iterator[Reading]:
    """Yield what AWS answers for every target in scope, many targets at a time.

    First each account is entered, then its regions are read; consecutive targets are of different accounts, so
    that a slow one does not keep all workers.
    """
    named = sorted(args.region or policy.regions.keys() - {"*"})
    home, caller, partition, _ = _identify(aws, policy, named)
    accounts = _accounts_in_scope(args, policy, aws, caller, home, notices)

    def enter(account_id: str) -> Iterator[list[str]]:
        if accounts[account_id] != "ACTIVE":
            message = f"Organizations says {accounts[account_id]!r}"
            raise target_error("UnknownAccountState", message, "organizations:ListAccounts")
        if policy.accounts is None or account_id == caller:
            aws.enter_own(account_id)
        else:
            aws.assume_role(account_id, policy.accounts, home, partition)
        yield named
        if "*" in policy.regions and not args.region:
            with aws.account(account_id):
                yield sorted(set(describe_regions(aws.client("ec2", home))) - set(named))

    targets: list[Target] = []
    for account_id, regions in read_in_parallel(sorted(accounts), enter, args.workers):
        if isinstance(regions, list):
            targets += [Target(account_id, region) for region in regions]
        elif regions:
            yield Target(account_id, "*"), regions
    silent: Counter[str] = Counter()

    def describe(target: Target) -> Iterator[list[Instance]]:
        if silent[target.region] >= MAX_SILENT:
            raise TargetError("EndpointConnectionError", f"not tried: {target.region} does not answer at all")
        try:
            with aws.account(target.account_id):
                yield from describe_instances(aws.client("ec2", target.region))
            silent[target.region] = 0
        except TargetError as error:
            silent[target.region] += error.code in NO_CONNECTION
            raise

    targets.sort(key=lambda target: (target.region, target.account_id))
    yield from read_in_parallel(targets, describe, args.workers)


def _identify(aws: Aws, policy: Policy, regions: Iterable[str]) -> tuple[str, str, str, str]:
    """Return the region to ask at home, and the caller's account, partition and ARN; raises CredentialsError."""
    home = aws.session.region_name or home_region(regions)
    caller, partition, arn = describe_caller(aws.client("sts", home))
    if policy.expected_account not in (None, caller):
        raise CredentialsError(
            f"these are the credentials of {caller}; the policy expects {policy.expected_account}"
        )
    return home, caller, partition, arn


def _accounts_in_scope(
    args: argparse.Namespace, policy: Policy, aws: Aws, caller: str, home: str, notices: list[str]
) -> dict[str, str]:
    """Return the accounts to scan with their states; adds a notice for each that is left out as inactive.

    Raises UsageError, and TagcheckError where all are inactive.
    """
    found = _account_states(policy, aws, caller, home)
    in_scope = {
        id_: state for id_, state in found.items() if policy.accounts is None or policy.accounts.covers(id_)
    }
    if not in_scope:
        raise UsageError(f"{policy.file} leaves no account to scan: see ids and exclude")
    for account_id in args.account:
        if in_scope.get(account_id) in INACTIVE:
            raise UsageError(f"--account {account_id}: it is {in_scope[account_id]}")
        if account_id not in in_scope:
            raise UsageError(
                f"--account {account_id}: not in the policy's scope (the credentials are of {caller})"
            )
    chosen = {id_: state for id_, state in in_scope.items() if _is_chosen(args, id_)}
    notices += [
        f"Account {id_} is {state}: not scanned" for id_, state in sorted(chosen.items()) if state in INACTIVE
    ]
    active = {id_: state for id_, state in chosen.items() if state not in INACTIVE}
    if not active and args.shard == (1, 1):
        raise TagcheckError(
            f"no account to scan: of the {counted(len(chosen), 'account')} in scope none is active "
            f"({', '.join(sorted(set(chosen.values())))}): see the policy's accounts"
        )
    if not active:
        notices.append(_empty_share(args))
    return active


def _empty_share(args: argparse.Namespace) -> str:
    """Return the notice that --shard leaves nothing to scan."""
    part, parts = args.shard
    return f"--shard {part}/{parts} has no account to scan: nothing was read in this run"


def _account_states(policy: Policy, aws: Aws, caller: str, home: str) -> dict[str, str]:
    """Return the accounts that the policy names, with their states; raises CredentialsError."""
    if policy.accounts is None:
        return {caller: "ACTIVE"}
    if policy.accounts.organization:
        return describe_accounts(aws.client("organizations", home))
    return dict.fromkeys(policy.accounts.ids, "ACTIVE")


def _is_chosen(args: argparse.Namespace, account_id: str) -> bool:
    """Return whether --account and --shard let an account be scanned."""
    part, parts = args.shard
    # Not hash(), which Python salts anew in each process.
    share = int.from_bytes(hashlib.sha256(account_id.encode()).digest()[:8]) % parts
    return (not args.account or account_id in args.account) and share == part - 1


Job = TypeVar("Job")
Page = TypeVar("Page")


def read_in_parallel(
    jobs: Sequence[Job], read: Callable[[Job], Iterator[list[Page]]], workers: int
) -> Iterator[tuple[Job, list[Page] | TargetError | None]]:
    """Yield the pages of many jobs as they come, from threads that wait for the network.

    A job ends with None, or with the TargetError that ended it. The queue is short, so that slow recording
    holds back reading. The threads are daemons: one that waits for an answer must not keep an interrupted run
    alive.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    readings: queue.Queue[tuple[Job, list[Page] | Exception | None]] = queue.Queue(4)
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                for page in read(job):
                    readings.put((job, page))
                readings.put((job, None))
            except CredentialsError as error:
                readings.put((job, TargetError("Credentials", str(error))))
            except Exception as error:  # a bug goes to the main thread, which would wait for ever
                readings.put((job, error))

    for _ in range(min(workers, len(jobs))):
        threading.Thread(target=work, daemon=True).start()
    ended = 0
    while ended < len(jobs):
        job, reading = readings.get()
        if isinstance(reading, Exception) and not isinstance(reading, TargetError):
            raise reading
        ended += not isinstance(reading, list)
        yield job, reading


def read_saved(args: argparse.Namespace, policy: Policy, notices: list[str]) -> Iterator[Reading]:
    """Yield what saved files hold of every target in scope.

    A file says nothing of a region that it has no instance of: that one is not read, unless --region
    says that the files cover it.
    """
    instances, cut = load_fleet(args.instances)
    covered = (lambda _: True) if policy.accounts is None else policy.accounts.covers
    listed = policy.accounts.ids if policy.accounts and not args.account else ()
    in_scope = {a for a in {*args.account, *listed, *(t.account_id for t in instances)} if covered(a)}
    accounts = {a for a in in_scope if _is_chosen(args, a)}
    named = set(args.region) or policy.regions.keys() - {"*"}
    targets = {Target(account_id, region) for account_id in accounts for region in named}
    if not args.region:
        targets |= {t for t in instances if t.account_id in accounts and policy.covers(t.region)}
        targets |= {Target(account_id, "*") for account_id in accounts - {t.account_id for t in targets}}
    more = f"{cut} has a NextToken, so more follows: save it without --max-items and --no-paginate"
    if in_scope and not accounts and args.shard != (1, 1):
        if cut:
            raise UsageError(more)
        notices.append(_empty_share(args))
    elif not targets:
        raise UsageError(
            "the files hold no instance, so of what account they are is not known: say it with --account"
        )
    left_out = instances.keys() - targets
    if left_out:
        number = sum(len(instances[target]) for target in left_out)
        LOG.info(
            "%s left out, not in scope: %s",
            counted(number, "instance"),
            ", ".join(map(str, sorted(left_out))),
        )
    for target in sorted(targets):
        if target in instances:
            yield target, instances[target]
        if cut:  # what follows may be of any account and region
            yield target, TargetError("Truncated", more)
        elif target not in instances and not args.region:
            what = "account" if target.region == "*" else "region"
            message = f"no instance of this {what} is in the files; if there is none, say so with --region"
            yield target, TargetError("NotInFiles", message)
        else:
            yield target, None


def _collect(
    db: sqlite3.Connection,
    scan: Scan,
    readings: Iterable[Reading],
    prices: Prices,
    progress: Progress,
    notices: list[str],
) -> set[Exemption]:
    """Judge every instance that is read and keep what was seen; returns the exemptions that covered any.

    Adds a notice for each instance state that is new.
    """
    policy = scan.policy
    numbers: dict[Target, int] = {}
    used: set[Exemption] = set()
    new_states: set[str] = set()
    usage: Usage = Counter()
    for target, reading in readings:
        if target not in numbers:
            numbers[target] = add_target(db, target)
        if isinstance(reading, list):
            seen = [
                judge(target, instance, policy, scan.started_at)
                for instance in reading
                if policy.includes(instance.state)
            ]
            new_states.update(
                state
                for state in {sighting.instance.state for sighting in seen} - new_states
                if is_new_state(state) and len(new_states) < MAX_NEW_STATES
            )
            used.update(exempted.exemption for sighting in seen for exempted in sighting.exempted)
            rules = policy.rules(target.region)
            for sighting in seen:
                count_usage(usage, numbers[target], sighting, rules)
            if len(usage) > MAX_USAGE:
                add_usage(db, usage)
                usage.clear()
            costs = (prices.monthly_cost(sighting.instance, target.region) for sighting in seen)
            add_sightings(db, numbers[target], zip(seen, costs, strict=True))
            progress.page(target, len(seen))
        else:
            if reading:
                fail_target(db, numbers[target], reading)
            progress.end(target, reading)
    progress.close()
    notices += map(new_state_notice, sorted(new_states))
    add_usage(db, usage)
    add_suggestions(db, policy)
    return used


MAX_NEW_STATES = 10  # to name in notices


def _unseen_notices(
    args: argparse.Namespace,
    scan: Scan,
    unseen: Iterable[tuple[Target, int]],
    coverage: Iterable[Coverage],
) -> Iterator[str]:
    """Yield a notice for each target in scope with open findings that a scan neither saw nor resolved."""
    policy, read = scan.policy, {target.target for target in coverage}
    narrowed = bool(args.region or args.account) or args.shard != (1, 1)
    for target, number in unseen:
        where = f"{counted(number, 'open finding')} in {target}"
        if target in read:
            yield (
                f"{where} may be of instances that AWS hides, and which the files lack; they stay open. Save the files "
                "with `aws ec2 describe-instances --include-managed-resources`, then add --include-managed-resources here"
            )
            continue
        known = {each.account_id for each in read} if policy.accounts is None else ()
        covered = policy.accounts.covers if policy.accounts else known.__contains__
        if not narrowed and policy.covers(target.region) and covered(target.account_id):
            yield f"{where} were not looked at, as this scan was told of no such region or account; they stay open"


def _exemption_notices(args: argparse.Namespace, scan: Scan, used: Iterable[Exemption]) -> Iterator[str]:
    """Yield what is to be said of the exemptions: that one ends, has ended, or covered nothing."""
    today = scan.started_at.date()
    yield from map(str, check_expiry(scan.policy, today))
    if args.region or args.account or args.shard != (1, 1):
        return
    for index, exemption in enumerate(scan.policy.exemptions):
        if exemption.holds(today) and exemption not in used:
            where = f"exemptions[{index}] ({exemption.reason})"
            place = (scan.policy.file, exemption.line, exemption.column, where)
            yield str(Problem(*place, "covered nothing that was read in this scan", "warning"))


def run_validate(args: argparse.Namespace, now: datetime) -> ExitCode:
    """Say what is wrong in each policy file; returns USAGE where one cannot be used."""
    results: dict[str, Sequence[Problem]] = {}
    for path in args.policies:
        try:
            results[path] = check_expiry(load_policy(path), now.date())
        except PolicyError as error:
            results[path] = error.problems
        except UsageError as error:
            results[path] = [Problem(path, 1, 1, "", str(error))]
    lines: list[str] = []
    for path, problems in results.items():
        errors = sum(problem.severity == "error" for problem in problems)
        also = f", {counted(len(problems) - errors, 'warning')}" if errors < len(problems) else ""
        verdict = f"{path}: {counted(errors, 'error') if errors else 'valid'}{also}"
        lines += [*problem_lines(problems), printable(verdict)]
    if args.json:
        output = Output("json", args.json)
        check_output(output)
        write_report([output], {"json": _write_problems}, results, emit)
    if args.json != "-":
        emit("\n".join(lines) + "\n")
    valid = all(problem.severity == "warning" for problems in results.values() for problem in problems)
    return ExitCode.COMPLIANT if valid else ExitCode.USAGE


def _write_problems(file: TextIOBase, results: Mapping[str, Sequence[Problem]]) -> None:
    """Write the problems of each file as JSON, for editors."""
    files = [
        {
            "file": path,
            "valid": all(problem.severity == "warning" for problem in problems),
            "problems": [
                {key: getattr(problem, key) for key in ("line", "column", "severity", "where", "message")}
                for problem in problems[:MAX_PROBLEMS]
            ],
            "problem_count": len(problems),
        }
        for path, problems in results.items()
    ]
    file.write(json.dumps({"version": __version__, "files": files}, indent=2) + "\n")


def run_schema(args: argparse.Namespace, now: datetime) -> ExitCode:
    """Print the policy's JSON Schema."""
    emit(json.dumps(POLICY_SCHEMA, indent=2) + "\n")
    return ExitCode.COMPLIANT


def iam_documents(policy: Policy, state: str, *, creators: bool) -> dict[str, dict[str, Any]]:
    """Return the least IAM policies for what a policy uses, and perhaps `--creators`, by who needs them.

    `scan` is the caller's; `member` and `member_trust` are the role's in the other accounts, and its trust
    policy's; `remediate` is for whoever writes tags, and should be another role.
    """
    describing = allow_statement(READ_ACTIONS if "*" in policy.regions else READ_ACTIONS[:1], "*")
    reading = [describing, *([allow_statement(CREATOR_ACTIONS, "*")] if creators else [])]
    scan, documents = [*reading], {}
    accounts = policy.accounts
    if accounts:
        members = ["*"] if accounts.organization else accounts.ids
        roles = [f"arn:*:iam::{account_id}:role/{accounts.role_name}" for account_id in members]
        scan.append(allow_statement(["sts:AssumeRole"], roles))
        if accounts.organization:
            scan.append(allow_statement(["organizations:ListAccounts"], "*"))
        trust = {
            "Effect": "Allow",
            "Principal": {"AWS": f"arn:aws:iam::{policy.expected_account or 'CALLER-ACCOUNT-ID'}:root"},
            "Action": "sts:AssumeRole",
        }
        if accounts.external_id:
            trust["Condition"] = {"StringEquals": {"sts:ExternalId": accounts.external_id}}
        documents = {"member": policy_document(reading), "member_trust": policy_document([trust])}
    if state.startswith("s3://"):
        bucket, key = split_s3(state)
        scan.append(allow_statement(["s3:GetObject", "s3:PutObject"], f"arn:*:s3:::{bucket}/{key}"))
        # Without it S3 answers 403 for a state that is not there yet, as for one that may not be read.
        scan.append(
            allow_statement(
                ["s3:ListBucket"], f"arn:*:s3:::{bucket}", Condition={"StringLike": {"s3:prefix": key}}
            )
        )
    if policy.notify and policy.notify.sns:
        scan.append(allow_statement(["sns:Publish"], policy.notify.sns))
    if policy.notify and policy.notify.email:
        sender = {"StringEquals": {"ses:FromAddress": policy.notify.email.sender}}
        scan.append(allow_statement(["ses:SendEmail"], "*", Condition=sender))
    keys = sorted({rule.key for rules in policy.regions.values() for rule in rules})
    writing = allow_statement(
        [action for action in WRITE_ACTIONS if action not in READ_ACTIONS],
        "arn:*:ec2:*:*:instance/*",
        Condition={"ForAllValues:StringEquals": {"aws:TagKeys": keys}},
    )
    listing = (
        [allow_statement(["organizations:ListAccounts"], "*")] if accounts and accounts.organization else []
    )
    return {
        "scan": policy_document(scan),
        **documents,
        "remediate": policy_document([allow_statement(READ_ACTIONS[:1], "*"), *listing, writing]),
    }


def run_iam_policy(args: argparse.Namespace, now: datetime) -> ExitCode:
    """Print the IAM policies that the policy's features need."""
    documents = iam_documents(load_policy(args.policy), args.state, creators=args.creators)
    emit(json.dumps(documents, indent=2) + "\n")
    return ExitCode.COMPLIANT


def run_explain(args: argparse.Namespace, now: datetime) -> ExitCode:
    """Print the rules in force in a region, or why an instance passes or fails."""
    policy = load_policy(args.policy)
    _check_scope(args, policy)
    if args.instance:
        changes: list[Change] = []
        cases = list(_find_instance(args, policy, changes))
        lines = [
            line
            for target, instance, finding in cases
            for line in explain(policy, target, instance, finding, changes, now)
        ]
    else:
        lines = [
            line
            for region in args.region or sorted(policy.regions)
            for line in explain_region(policy, region, now.date())
        ]
    emit("\n".join(map(printable, lines)) + "\n")
    return ExitCode.COMPLIANT


def _find_instance(
    args: argparse.Namespace, policy: Policy, changes: list[Change]
) -> Iterator[tuple[Target, Instance, Finding | None]]:
    """Yield an instance as saved files, AWS or the state have it, with its finding; adds what was written on it."""
    known: dict[Target, Finding] = {}
    elsewhere = bool(args.instances or args.live)
    try:
        with _reading(args, None if elsewhere else policy.name) as db:
            findings = fetch_history(db, Selection(policy.name, args.instance))
            known = {finding.target: finding for finding in findings}
            changes += fetch_changes(db, policy.name, args.instance)
    except MissingStateError as error:
        if not elsewhere:
            raise
        LOG.warning("%s", printable(f"The history of {args.instance} is not known: {error}"))
    if args.instances:
        for target, instances in load_fleet(args.instances)[0].items():
            for instance in instances:
                if instance.instance_id == args.instance and policy.covers(target.region):
                    yield target, instance, known.get(target)
                    return
        raise UsageError(
            f"{args.instance} is not in {', '.join(args.instances)}, or in a region that is not covered"
        )
    if args.live:
        regions = args.region or sorted({target.region for target in known})
        if not regions:
            raise UsageError(f"the state does not know {args.instance}: say with --region where it is")
        yield from _describe_instance(args, policy, regions, known)
        return
    here = {
        target: finding
        for target, finding in known.items()
        if (not args.region or target.region in args.region)
        and (not args.account or target.account_id in args.account)
        and policy.covers(target.region)
    }
    for target, finding in here.items():
        launched = datetime.fromisoformat(finding.launch_time)
        operator = finding.managed_by or ""
        yield (
            target,
            Instance(finding.instance_id, finding.state, launched, finding.tags, managed_by=operator),
            finding,
        )
    if not here:
        known_in = f" there, only in {', '.join(map(str, known))}" if known else ""
        raise UsageError(
            f"{args.state} has no finding of {args.instance} under the policy {policy.name}{known_in}: it complied, was "
            "exempted or too young whenever it was looked at, or never was; ask AWS with --live --region R"
        )


def _describe_instance(
    args: argparse.Namespace, policy: Policy, regions: Sequence[str], known: Mapping[Target, Finding]
) -> Iterator[tuple[Target, Instance, Finding | None]]:
    """Yield an instance as AWS has it now, from the first of the regions that knows it; raises UsageError."""
    aws = Aws(args.profile, workers=1)
    _, account_id, *_ = _identify(aws, policy, regions)
    if args.account and account_id not in args.account:
        raise UsageError(
            f"--live looks only into the account of the credentials, {account_id}: leave out --account, or choose "
            f"credentials of {' or '.join(args.account)} with --profile"
        )
    aws.enter_own(account_id)
    for region in regions:
        try:
            with aws.account(account_id):
                pages = list(describe_instances(aws.client("ec2", region), InstanceIds=[args.instance]))
            for instance in itertools.chain.from_iterable(pages):
                yield Target(account_id, region), instance, known.get(Target(account_id, region))
                return
        except TargetError as error:
            if not error.code.startswith("InvalidInstanceID"):
                raise
    raise UsageError(
        f"account {account_id} has no {args.instance} in {', '.join(regions)}: say with --region where it is"
    )


def run_history(args: argparse.Namespace, now: datetime) -> ExitCode:
    """List findings that the state keeps, or tell the story of one instance."""
    statuses: dict[str, tuple[str, ...]] = {status.lower(): (status,) for status in Status}
    statuses |= {"open": ("NEW", "REPEAT", "REOPENED")}
    wanted: list[str] = []
    for word in args.status:
        if word.lower() not in statuses:
            raise UsageError(f"--status {printable(word)}: give open, {', '.join(Status)}")
        wanted += statuses[word.lower()]
    outputs = _outputs(args)
    policy = load_policy(args.policy).name
    since = now - args.older_than if args.older_than else None
    selection = Selection(policy, args.instance, args.account, args.region, wanted, args.tag, since)
    with _reading(args, policy) as db:
        report = HistoryReport(
            policy,
            lambda: fetch_history(db, selection),
            (lambda finding: fetch_events(db, policy, finding)) if args.instance else None,
            fetch_changes(db, policy, args.instance) if args.instance else (),
        )
        if args.instance and next(report.findings(), None) is None:
            raise UsageError(f"{args.state} has no such finding of {args.instance} under the policy {policy}")
        write_report(outputs, HISTORY_WRITERS, report, emit)
        if not outputs:
            lines = history_lines(report)
            while block := "".join(f"{printable(line)}\n" for line in itertools.islice(lines, 1000)):
                emit(block)
    return ExitCode.COMPLIANT


def run_report(args: argparse.Namespace, now: datetime) -> ExitCode:
    """Write the dashboard of a policy's findings."""
    outputs = _outputs(args)
    policy = load_policy(args.policy)
    keys = dict.fromkeys(rule.key for rules in policy.regions.values() for rule in rules)
    owner = next((key for key in keys if key.casefold() == "owner"), next(iter(keys)))
    with _reading(args, policy.name) as db:
        trend, standings = fetch_standings(db, policy.name)
        if not standings:
            raise StateError(
                f"the state {args.state} has no counts of a scan of the policy {policy.name!r}: {WAY_OUT}"
            )
        open_ = fetch_open(db, policy.name, owner, now)
    dashboard = Dashboard(policy, now, trend, standings, open_, check_expiry(policy, now.date()))
    write_report(outputs, {"html": write_html}, dashboard, emit)
    return ExitCode.COMPLIANT


def run_prune(args: argparse.Namespace, now: datetime) -> ExitCode:
    """Delete what is older than --days, and say what went."""
    before = now - timedelta(days=args.days)
    pruned = Pruned(0, 0, 0)
    with contextlib.ExitStack() as stack:
        state = open_state(args, stack, copied=args.dry_run)
        state.check()
        for path in state.attempts(str(uuid.uuid4())):
            # An attempt that is repeated because its answer was lost finds nothing any more.
            again = prune_state(path, before, state.name)
            pruned = max(pruned, again, key=lambda pruned: astuple(pruned))
    emit(
        f"{'Would delete' if args.dry_run else 'Deleted'} {counted(pruned.findings, 'finding')} resolved before "
        f"{before.date()}, {counted(pruned.scans, 'scan')} and the counts of {counted(pruned.coverage, 'target')} "
        "from before it; the trend keeps a row a day\n"
    )
    return ExitCode.COMPLIANT


def run_remediate(args: argparse.Namespace, now: datetime) -> ExitCode:
    """Plan the tags that would put findings right, or write those of a plan, or take them back."""
    policy = load_policy(args.policy)
    _check_scope(args, policy)
    if args.plan and args.undo:
        raise UsageError("--plan and --undo: give one of them")
    if args.role and not policy.accounts:
        raise UsageError(f"--role {printable(args.role)}: {policy.file} names no accounts to assume it in")
    given = args.plan or args.undo
    args.csv = args.csv or ("" if given or args.apply else "remediate-plan.csv")
    outputs = _outputs(argparse.Namespace(**vars(args), instances=[given] if given else []))
    rows = read_plan(given, policy, UNDO_ACTIONS if args.undo else PLAN_ACTIONS) if given else []
    if args.plan:
        with _reading(args, None):  # a plan comes from a state, and what is written is kept there
            pass
    else:
        with _reading(args, None if args.undo else policy.name) as db:
            is_open = Selection(policy.name, None, statuses=("NEW", "REPEAT", "REOPENED"))
            rows = (
                check_undo(db, args.state, policy.name, rows)
                if args.undo
                else list(plan(fetch_history(db, is_open), policy, args.min_confidence))
            )
    in_scope = [
        row
        for row in sorted(rows, key=lambda row: (row.target, row.instance_id))
        if (not args.region or row.target.region in args.region)
        and (not args.account or row.target.account_id in args.account)
    ]
    outcomes = [
        Outcome(row, Result.PLANNED, warning=row.warning) if row.writes else Outcome(row, Result.NOT_ASKED)
        for row in in_scope
    ]
    writing = [row for row in in_scope if row.writes]
    next_command = functools.partial(_next_command, args, len(writing))
    plans = [output for output in outputs if output.format == "csv"]
    for output in plans:
        check_plan_goal(output)
    undo_file = ""
    with contextlib.ExitStack() as stack:
        staged = stack.enter_context(staged_outputs(outputs))
        if args.apply and writing:
            state = open_state(args, stack)
            beside = state.path.parent if isinstance(state, LocalState) else Path()
            undo = UndoFile(beside / f"remediate-undo-{now:%Y%m%dT%H%M%SZ}.csv")
            stack.callback(undo.close)
            stack.enter_context(_telling_the_way_back(undo, next_command))
            decided = {outcome.row: outcome for outcome in _apply(args, policy, state, writing, undo, now)}
            outcomes = [decided.get(outcome.row, outcome) for outcome in outcomes]
            undo_file = undo.shown if undo.rows else ""
        well = {Result.PLANNED, Result.NOT_ASKED, Result.WRITTEN, Result.ALREADY_THERE}
        code = ExitCode.COMPLIANT if well.issuperset(o.result for o in outcomes) else ExitCode.INCOMPLETE
        done = Remediation(policy, args.apply, outcomes, undo_file, code)
        stage_report(staged, REMEDIATION_WRITERS, done)
        for output in plans:  # again, as applying takes its time
            check_plan_goal(output)
        publish_report(staged, emit)
        if not args.quiet:
            lines = remediation_lines(done, args.csv, next_command)
            talk = sys.stderr if "-" in (output.path for output in outputs) else sys.stdout
            emit("".join(f"{printable(line)}\n" for line in lines), talk)
    return code


@contextlib.contextmanager
def _telling_the_way_back(undo: UndoFile, command: Callable[..., str]) -> Iterator[None]:
    """Print the command that reverts a run on stderr if the run ends before it has printed it itself."""
    try:
        yield
    except BaseException as error:  # even a bug must not leave tags written and nobody told
        if undo.rows:
            line = f"To take it back: {command('--undo', undo.shown, '--apply')}"
            emit(f"{printable(line)}\n", sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            done = "what was written is recorded, and the same command goes on from there"
            raise KeyboardInterrupt(done if undo.rows else "nothing was written") from None
        raise


def _next_command(args: argparse.Namespace, changes: int, *more: str) -> str:
    """Return the command that writes what was planned, or that takes back what was written, for a shell."""
    words = ["tagcheck.py", "remediate"]
    for name in ("policy", "state", "profile", "role"):
        if (value := getattr(args, name)) not in (None, OPTIONS[f"--{name}"].get("default")):
            words += [f"--{name}", value]
    words += ["--max-changes", str(changes)] if changes > MAX_CHANGES else []
    if "--undo" not in more:
        for name in ("region", "account"):  # a plan that was given may have rows of others
            words += [word for value in getattr(args, name) for word in (f"--{name}", value)]
        if (path := args.undo or args.plan or args.csv) != "-":
            words += ["--undo" if args.undo else "--plan", path]
        elif args.min_confidence != MIN_CONFIDENCE:
            words += ["--min-confidence", str(args.min_confidence)]
    return shlex.join([*words, *more])


def _apply(
    args: argparse.Namespace, policy: Policy, state: State, rows: list[PlanRow], undo: UndoFile, now: datetime
) -> list[Outcome]:
    """Carry out a plan, target by target; returns what became of each row.

    All of it is intended in the state before the first call, and a row is in the undo file before its own: kill
    it at any point, and state, file and tags together tell what was done.
    """
    begun = time.monotonic()
    if len(rows) > args.max_changes:
        raise UsageError(
            f"the plan would write {len(rows):,} tags, more than --max-changes {args.max_changes}: read it, and if "
            f"all is well give --max-changes {len(rows)}"
        )
    state.check()
    aws = Aws(args.profile, 1, WRITE_ACTIONS, CALL_INTERVAL)
    home, caller, partition, who = _identify(aws, policy, sorted({row.target.region for row in rows}))
    states = _account_states(policy, aws, caller, home)
    unfit = [row for row in rows if states.get(row.target.account_id) != "ACTIVE"]
    refuse_rows([(row, _account_complaint(row.target.account_id, policy, states, caller)) for row in unfit])
    changes: dict[PlanRow, Change] = {}
    run = uuid.uuid4().hex
    for row in rows:
        account_id, region = row.target.account_id, row.target.region
        changes[row] = Change(
            *(f"{run}/{len(changes)}", policy.name, account_id, region, row.instance_id, row.tag_key),
            # To add is to write where nothing is, or blanks: which of them is known when the tag is read.
            *(None if row.action is Action.ADD else row.current or None,),
            row.value_after,
            *(row.why, who, utc_text(now)),
            status="intended",
        )
    record_changes(state, ((change, Result.PLANNED) for change in changes.values()))
    outcomes: list[Outcome] = []
    settled: list[tuple[Change, Result]] = []
    refused: list[PlanRow] = []  # by AWS, after they were kept in the undo file

    def enter(account_id: str) -> None:
        if policy.accounts is None or account_id == caller:
            aws.enter_own(account_id)
        else:
            role = replace(policy.accounts, role_name=args.role or policy.accounts.role_name)
            aws.assume_role(account_id, role, home, partition)

    try:
        for target, group in itertools.groupby(rows, key=lambda row: row.target):
            for batch in _apply_to_target(aws, target, list(group), undo, enter):
                outcomes += batch
                at = utc_text(now + timedelta(seconds=time.monotonic() - begun))
                for outcome in batch:
                    if outcome.row in undo.rows and outcome.result not in (Result.WRITTEN, Result.UNKNOWN):
                        refused.append(outcome.row)
                        continue
                    change = replace(changes[outcome.row], former=outcome.former, changed_at=at)
                    settled.append((replace(change, status="written"), outcome.result))
                if isinstance(state, LocalState):  # one in S3 would be moved to and fro with each batch
                    record_changes(state, settled)
                    settled.clear()
            LOG.info("%s: %s so far", target, counted(len(outcomes), "row"))
    finally:
        untouched = changes.keys() - undo.rows - {outcome.row for outcome in outcomes}
        record_changes(state, [*settled, *((changes[row], Result.FAILED) for row in untouched)])
        # First the file: a row of it without its record would be refused.
        if refused:
            undo.drop(refused)
            record_changes(state, ((changes[row], Result.FAILED) for row in refused))
    return outcomes


def _account_complaint(account_id: str, policy: Policy, states: Mapping[str, str], caller: str) -> str:
    """Return why nothing is written in an account that is not active, or not in the policy's scope."""
    if policy.accounts is None:
        return f"{account_id} is not the account of the credentials, {caller}"
    how = f"is {states[account_id]}" if account_id in states else "is not there"
    return f"in the organization the account {account_id} {how}: take the row out, or choose others with --account"


def _apply_to_target(
    aws: Aws, target: Target, rows: Sequence[PlanRow], undo: UndoFile, enter: Callable[[str], None]
) -> Iterator[list[Outcome]]:
    """Carry out the rows of one target; yields what became of them, batch by batch.

    An error that is not of an instance ends it: what follows would only meet the same.
    """
    splits = iter(range(MAX_SPLITS))
    failure: TargetError | None = None
    try:
        enter(target.account_id)
    except TargetError as error:
        failure = error
    for batch in batches(rows):
        if failure:
            yield [Outcome(row, Result.FAILED, f"not tried: {failure}") for row in batch]
            continue
        with aws.account(target.account_id):
            outcomes, failure = _apply_batch(aws.client("ec2", target.region), batch, undo, splits)
        yield outcomes


def _apply_batch(
    client: Any, rows: Sequence[PlanRow], undo: UndoFile, splits: Iterator[int]
) -> tuple[list[Outcome], TargetError | None]:
    """Read the tags of a batch again and write what is to be written; returns the error that ends the target, too."""
    try:
        tags = describe_tags(client, sorted({row.instance_id for row in rows}))
    except TargetError as error:
        return [Outcome(row, Result.FAILED, str(error)) for row in rows], error
    outcomes = []
    former: dict[PlanRow, str | None] = {}
    for row in rows:
        now = tags.get(row.instance_id)
        outcome = decide(row, now)
        if outcome:
            outcomes.append(outcome)
        elif now is not None:
            former[row] = now.get(row.tag_key)
            tags[row.instance_id] = {**now, row.tag_key: row.value}  # it counts to the limit of tags
    if former:
        undo.add(former)
    refused: dict[PlanRow, TargetError] = {}
    failure: TargetError | None = None
    for (operation, pairs), alike in tag_calls(former).items():
        ids = [*dict.fromkeys(row.instance_id for row in alike)]
        errors = dict.fromkeys(ids, failure) if failure else {}
        if not failure:
            errors = write_tags(client, operation, ids, dict(pairs), splits)
            failure = next((error for error in errors.values() if not is_of_instance(error)), None)
        refused |= {row: errors[row.instance_id] for row in alike if row.instance_id in errors}
    found: Mapping[str, Mapping[str, str]] | None = None
    if failure:  # an answer may have been lost on its way back
        with contextlib.suppress(TargetError):
            found = describe_tags(client, sorted({row.instance_id for row in refused}))
    for row, value in former.items():
        outcome = _outcome(row, value, refused.get(row), found)
        if row.action in PLAN_ACTIONS and outcome.result is Result.WRITTEN:
            outcome = replace(outcome, warning=revert_warning(cause_of(tag_groups(tags[row.instance_id]))))
        outcomes.append(outcome)
    return outcomes, failure


def _outcome(
    row: PlanRow, former: str | None, error: TargetError | None, found: Mapping[str, Mapping[str, str]] | None
) -> Outcome:
    """Return what became of a row that was called for; `found` are the tags after an error of the whole target."""
    if error is None:
        return Outcome(row, Result.WRITTEN, former=former)
    if is_of_instance(error):
        gone = error.code.startswith("InvalidInstanceID")
        return Outcome(row, Result.GONE if gone else Result.FAILED, str(error))
    if found is None:
        return Outcome(row, Result.UNKNOWN, f"{error}; whether it was written is not known: run again")
    after = decide(row, found.get(row.instance_id))
    if after and after.result is Result.ALREADY_THERE:
        return Outcome(row, Result.WRITTEN, former=former)
    return Outcome(row, Result.FAILED, str(error))


class Progress:
    """Says on stderr how far the scan is: one line that changes on a terminal, elsewhere a line a target."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.live = not quiet and sys.stderr.isatty()
        self.instances: dict[Target, int] = {}
        self.ended = 0
        self.shown_at = 0.0

    def page(self, target: Target, instances: int) -> None:
        """Count a page of a target; the line changes at most ten times a second."""
        self.instances[target] = self.instances.get(target, 0) + instances
        if self.live and time.monotonic() - self.shown_at > 0.1:
            self.shown_at = time.monotonic()
            total = counted(sum(self.instances.values()), "instance")
            emit(f"\r\x1b[K{counted(self.ended, 'target')} read, {total} so far", sys.stderr)

    def end(self, target: Target, error: TargetError | None) -> None:
        """Say how a target ended."""
        self.ended += 1
        if not self.live and (error or not self.quiet):
            how = f"not read: {error}" if error else counted(self.instances.get(target, 0), "instance")
            emit(printable(f"{target}: {how}") + "\n", sys.stderr)

    def close(self) -> None:
        """Clear the line."""
        if self.live:
            emit("\r\x1b[K", sys.stderr)


def _has_colour(stream: IO[str]) -> bool:
    """Return whether to colour: only a terminal, and not where NO_COLOR says so (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _heed_signals() -> None:
    """Let the first Ctrl-C or SIGTERM end the run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _ignore_signals() -> None:
    """Let no Ctrl-C and no SIGTERM come between any more: what is left takes a moment."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _hold_signals() -> Callable[[], None]:
    """Let no Ctrl-C and no SIGTERM come between, for a moment; returns what lets them come."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = [(number, signal.signal(number, lambda number, _: came.append(number))) for number in numbers]

    def release() -> None:
        for number, handler in former:
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])

    return release


def emit(text: str, stream: IO[str] | None = None) -> None:
    """Write text to stdout, or to another stream; raises OutputError.

    A reader that went away, as of `| head`, is no failure, and what is said on stderr is no result.
    """
    stream = stream or sys.stdout
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # What is left in the stream must not fail again when Python flushes it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            message = (
                f"standard output cannot be written: {error.strerror}; if this was a scan, it is recorded"
            )
            raise OutputError(message) from error


def _interrupt(*_: object) -> None:
    """End the run at the first Ctrl-C or SIGTERM; a second one must not interrupt the cleaning up."""
    _ignore_signals()
    raise KeyboardInterrupt


def _check_directory() -> None:
    """Raise UsageError where the current directory is gone, as then no relative name leads anywhere."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            f"the current directory cannot be used: {error.strerror}; change to another"
        ) from error


def main(argv: Sequence[str] | None = None, now: datetime | None = None) -> int:
    """Run a command and return its exit code; every expected failure ends here."""
    _heed_signals()
    warnings.simplefilter("ignore", FutureWarning)  # of `re`, on patterns that work
    # A stream that the caller has closed is None.
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    for text in sys.argv[1:] if argv is None else argv:
        if re.search("[\ud800-\udfff]", text):  # neither the state nor JSON could keep it
            parser.error(f"the argument {text!r} is not UTF-8")
    level = logging.DEBUG if args.verbose else logging.WARNING if args.quiet else logging.INFO
    LOG.handlers, LOG.propagate = [logging.StreamHandler(sys.stderr)], False
    LOG.setLevel(level)
    # What botocore has to say comes as an exception; its log holds tracebacks, and may hold secrets.
    logging.getLogger("botocore").addHandler(logging.NullHandler())
    try:
        _check_directory()
        return int(args.run(args, now or datetime.now(UTC)))
    except PolicyError as error:
        number_of = counted(len(error.problems), "problem")
        done = "written" if args.command == "remediate" else "scanned"
        emit(f"{error}\n{number_of}; nothing was {done}\n", sys.stderr)
        return ExitCode.USAGE
    except TagcheckError as error:
        emit(f"tagcheck: {printable(str(error))}\n", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        emit(f"tagcheck: interrupted; {str(interrupt) or 'nothing was recorded'}\n", sys.stderr)
        return ExitCode.INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in ("boto3", "botocore", "yaml", "jsonschema"):
            raise
        emit(f"tagcheck: {missing_package(error.name)}\n", sys.stderr)
        return ExitCode.CRASHED


if __name__ == "__main__":
    raise SystemExit(main())
