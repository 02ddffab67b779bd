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
11 Starters        the tags of a fleet, or AWS's own rules -> a policy to begin with
12 Command line    the commands; the only place with print, the clock and threads
"""

from __future__ import annotations

import argparse
import atexit
import base64
import codecs
import contextlib
import contextvars
import csv
import difflib
import errno
import fnmatch
import functools
import gc
import gzip
import hashlib
import heapq
import html
import itertools
import json
import logging
import math
import operator
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
import textwrap
import threading
import time
import unicodedata
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import MISSING, Field, asdict, astuple, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, date, datetime, timedelta
from enum import Enum, IntEnum, StrEnum, unique
from io import StringIO, TextIOBase, TextIOWrapper
from pathlib import Path
from sqlite3 import Connection
from types import SimpleNamespace
from typing import (
    IO,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)
from urllib.parse import quote
from xml.etree import ElementTree
from xml.parsers import expat

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
        member._value_, member.meaning = code, meaning
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


# The oldest versions that CI tests, as in requirements.txt, the README and the block at the top of this file.
# boto3 1.42.93 has no IncludeManagedResources. A lock file may hold an older botocore than boto3 brings.
MINIMUM_VERSIONS = {"boto3": "1.42.95", "botocore": "1.42.95", "PyYAML": "6.0.1", "jsonschema": "4.0.1"}


class PackageError(TagcheckError):
    """A package that tagcheck needs is missing or too old."""

    exit_code = ExitCode.CRASHED

    def __init__(self, problem: str) -> None:
        wanted = [f"{name}>={minimum}" for name, minimum in MINIMUM_VERSIONS.items()]
        super().__init__(f"{problem}: pip install --upgrade {shlex.join(wanted)}")


class UsageError(TagcheckError):
    """The arguments, or a file that they name, cannot be used."""

    exit_code = ExitCode.USAGE


class CredentialsError(TagcheckError):
    """AWS does not accept the credentials, so nothing can be scanned."""


class StateError(TagcheckError):
    """The state cannot be read or written."""


class MissingStateError(StateError):
    """The state that was named does not exist."""

    def __init__(self, name: object) -> None:
        super().__init__(f"there is no state {name}: run a scan first, or name the right one with --state")


class UploadError(StateError):
    """The scan is recorded in a local copy of the state that could not be uploaded."""


class OutputError(TagcheckError):
    """A report cannot be written."""


class NotificationError(TagcheckError):
    """A notification failed; the scan is recorded and reported."""


class TargetError(TagcheckError):
    """One target could not be read in full; the others can."""

    exit_code = ExitCode.INCOMPLETE

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file, with its place as compilers write it (line and column count from 1)."""

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
    """Return a line for each of the first problems of a file, and one that counts the rest."""
    lines, more = [*map(str, problems[:MAX_PROBLEMS])], len(problems) - MAX_PROBLEMS
    return [*lines, f"… and {counted(more, 'more problem')}"] if more > 0 else lines


class PolicyError(UsageError):
    """Every problem that was found in a policy file or an edited plan."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line, problem.column)))
        super().__init__("\n".join(problem_lines(self.problems)))


# The types of fields and columns beyond Python's own; what they may hold is checked when they are loaded.
Moment = Annotated[str, "a time in UTC, as utc_text() writes it"]
Day = Annotated[str, "a date, as 2027-01-31"]
Share = Annotated[float, "from 0 to 1"]
Kind = Annotated[str, "a key of GROUP_KINDS"]


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """One account in one region: the unit of scanning, of failure and of resolution."""

    account_id: str
    region: str
    account_name: str = field(default="", compare=False)
    account_paths: str = field(default="", compare=False)  # as in Account

    @property
    def account(self) -> str:
        """The account as people are shown it."""
        return account_text(self.account_id, self.account_name)

    def __str__(self) -> str:
        return f"{self.account} {self.region}"


@dataclass(frozen=True, slots=True)
class Account:
    """What is known of an account besides its id; what is not known is empty."""

    name: str = ""
    paths: str = ""  # its places in the organization, as o-a1b2c3d4e5/r-ab12/ou-ab12-11111111/
    state: str = "ACTIVE"


def account_text(account_id: str, name: str) -> str:
    """Return how people are shown an account: its id, and its name where that is known."""
    return f"{account_id} ({name})" if name else account_id


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
    """How a finding compares with earlier scans."""

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
    """The likely value of a required tag, its confidence (0 to 1), and the evidence."""

    tag_key: str
    value: str
    confidence: Share
    evidence: str

    def __str__(self) -> str:
        return f"{self.tag_key}={self.value} ({self.evidence})"


class Group(NamedTuple):
    """What instances of a target have in common, such as their Auto Scaling group."""

    kind: Kind
    name: str


class Creator(NamedTuple):
    """Who launched an instance, or the reason why that is not known."""

    name: str | None
    reason: str | None = None

    def __str__(self) -> str:
        return self.name or (f"unknown ({self.reason})" if self.reason else "")


@dataclass(frozen=True, slots=True)
class Finding:
    """An instance with violations under a policy, with its history."""

    account_id: str
    region: str
    instance_id: str
    state: str
    launch_time: Moment
    tags: Mapping[str, str]
    violations: tuple[Violation, ...]
    status: Status
    first_seen: Moment
    last_seen: Moment
    times_seen: int
    times_reopened: int
    resolved_at: Moment | None
    resolution: Resolution | None
    created_by: str | None
    suggestions: tuple[Suggestion, ...]
    instance_type: str | None
    cause: Group | None
    monthly_cost: float | None
    managed_by: str | None  # "" where no AWS service does, None where the first edition recorded it
    created_by_reason: str | None = None
    account_name: str = ""
    account_paths: str = ""
    owner: str = ""  # by its tags, or likely by those of its siblings; "" where nobody is known

    @property
    def target(self) -> Target:
        """Where the instance is."""
        return Target(self.account_id, self.region, self.account_name, self.account_paths)

    @property
    def name(self) -> str:
        """The instance's Name tag, as consoles show it."""
        return self.tags.get("Name", "")

    @property
    def creator(self) -> str:
        """Who launched it, or why that is not known, as text."""
        return str(Creator(self.created_by, self.created_by_reason))


@dataclass(frozen=True, slots=True)
class Aliased:
    """A tag that an instance has under an alias, where the policy wants it under the rule's own key, too."""

    account_id: str
    region: str
    instance_id: str
    name: str
    tag_key: str
    alias: str
    value: str
    current: str | None  # what it has under the rule's own key
    cause: Group | None


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a finding at a time, and the violations that it had from then on."""

    at: Moment
    event: Literal["NEW", "CHANGED", "RESOLVED", "REOPENED"]
    violations: tuple[Violation, ...]
    resolution: Resolution | None


@dataclass(frozen=True, slots=True)
class Change:
    """One tag that `remediate` wrote, or was about to write when it was stopped."""

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
    changed_at: Moment
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
        """True where every instance of the target was read."""
        return self.error_code is None

    @property
    def too_young(self) -> int:
        """Instances within their grace period, not judged yet."""
        return self.instances - self.compliant - self.findings - self.exempted


@dataclass(frozen=True, slots=True)
class Standing:
    """A target now: how its latest scan ended, and the counts of when it was last read in full."""

    target: Target
    error: str | None
    last_read: Moment | None
    instances: int
    compliant: int
    findings: int
    exempted: int


@dataclass(frozen=True, slots=True)
class TrendPoint:
    """What was open after a scan, all targets as they were last read, and what the scan changed."""

    at: Moment
    open: int
    new: int
    reopened: int
    resolved: int
    targets: int
    targets_unread: int


@dataclass(frozen=True, slots=True)
class Upcoming:
    """How many instances fail a rule that does not count yet."""

    tag_key: str
    effective_from: Day
    instances: int

    def __str__(self) -> str:
        return f"{self.tag_key} from {self.effective_from}: {counted(self.instances, 'instance')} would fail"


def check_packages(*names: str) -> None:
    """Raise PackageError if a package is missing or older than MINIMUM_VERSIONS."""
    import importlib.metadata  # here, as it takes tens of milliseconds that --help does not need

    for name in names:
        minimum = MINIMUM_VERSIONS[name]
        try:
            version = str(importlib.metadata.version(name))  # "None" if the installed package is damaged
        except importlib.metadata.PackageNotFoundError as error:
            raise PackageError(f"the package {name} is missing") from error
        numbers, least = ([int(number) for number in re.findall(r"\d+", v)[:3]] for v in (version, minimum))
        if numbers < least:
            raise PackageError(f"{name} {version} is too old ({minimum} or later is needed)")


# Unicode's Default_Ignorable_Code_Point, and the characters that are blank by design: the Braille pattern,
# the musical note head and the Khitan filler. str.isprintable() is true for many of them.
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U00016fe4\U0001bca0-\U0001bca3\U0001d159"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def is_printable(text: str) -> bool:
    """Return whether every character of a text is visible or a space."""
    return text.isprintable() and (text.isascii() or not INVISIBLE.search(text))


def printable(text: str) -> str:
    r"""Return text with control, format and other invisible characters escaped (`\x1b`, `\u202e`).

    Tag values, account names and AWS's messages are written by strangers: unescaped they could move a
    terminal's cursor, forge a log line, or show text in another order than it has.
    """
    if is_printable(text):
        return text
    return "".join(sign if is_printable(sign) else sign.encode("unicode_escape").decode() for sign in text)


@functools.lru_cache(2000)  # the values of a tag are mostly the same
def stripped(text: str) -> str:
    """Return text without the spaces and invisible characters around it; a blank text becomes empty."""
    if is_printable(text):
        return text.strip()
    unseen = ("Cc", "Cf", "Zl", "Zp", "Zs")
    return text.strip("".join(c for c in {*text} if unicodedata.category(c) in unseen or INVISIBLE.match(c)))


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    return not stripped(text)


to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def to_record(item: Any, names: Iterable[str] = ()) -> dict[str, Any]:
    """Return these fields of a dataclass, or all of them, by name: a JSON object."""
    return {name: getattr(item, name) for name in names or item.__slots__}


CHUNK_SIZE = 65_536  # bytes or characters to hold in memory of what is only copied


def utc_text(moment: datetime) -> str:
    """Return a time as the state and the JSON keep it: 2026-02-24T10:30:45Z."""
    # Not strftime: its %Y writes the year 1 as "1" on Linux.
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='seconds')}Z"


def counted(number: int, word: str, plural: str = "") -> str:
    """Return "1 finding", "2 findings", "12,000 instances"."""
    return f"{number:,} {word if number == 1 else plural or f'{word}s'}"


def first_named(names: Sequence[str], most: int) -> str:
    """Return the first of these names for a sentence, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def display_width(text: str) -> int:
    """Return how many columns of a terminal a text takes: some characters are wide (Unicode, UAX 11)."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))


def cut_text(text: str, width: int) -> str:
    """Return text of at most this width, with … in place of what was cut off."""
    if len(text) <= width // 2 or display_width(text) <= width:
        return text
    ends = itertools.accumulate(map(display_width, text))
    return f"{text[: sum(end < width for end in itertools.islice(ends, width))]}…"


def owner_anchor(owner: str) -> str:
    """Return the id of an owner's section on the dashboard, for links to it; safe in URLs and in HTML."""
    readable = re.sub("[^a-z0-9]+", "-", owner.casefold()).strip("-")[:40]
    digest = hashlib.sha256(owner.encode(errors="surrogatepass")).hexdigest()
    return "-".join(filter(None, ("owner", readable, digest[:12])))


# What to do about an error, by its codes: AWS's own, and the names of botocore's exceptions.
_ADVICE = (
    ("AuthFailure", "the region is not enabled in this account, or the credentials are not for it: "
     "enable the region, or remove it from the policy"),
    ("OptInRequired", "the region is not enabled in this account: enable it, or remove it from the policy"),
    ("UnauthorizedOperation AccessDenied AccessDeniedException",
     "the credentials may not call {operation}: allow it (tagcheck.py iam-policy prints how)"),
    ("ExpiredToken ExpiredTokenException", "the credentials have expired: renew them and run again"),
    ("RequestExpired", "the request came too late: check this machine's clock, then renew the credentials"),
    ("SignatureDoesNotMatch", "the secret key is wrong, or this machine's clock is"),
    ("InvalidClientTokenId UnrecognizedClientException",
     "AWS does not know these credentials: check the profile or the environment"),
    ("RequestLimitExceeded Throttling ThrottlingException TooManyRequestsException",
     "AWS throttled the calls, even after retries: run again later, or with fewer --workers"),
    ("EndpointConnectionError ConnectTimeoutError ConnectionClosedError ProxyConnectionError",
     "no connection: check the network, the proxy and the region's name"),
    ("ReadTimeoutError CallTimeout", "no answer in time: check the network and run again"),
    ("SSLError", "the TLS connection failed: check the proxy and its certificates (AWS_CA_BUNDLE)"),
    ("ForeignAnswer IncompleteAnswer",
     "the answer was cut short or is not AWS's: check the network and the proxy"),
    ("InvalidHeader",
     "the session token or the access key has a line break or another bad character: copy it again"),
    ("HTTPClientError", "the HTTP request failed: check the network, the proxy and the AWS configuration"),
    ("UnknownAccountState",
     "the account's state is new to tagcheck: exclude the account in the policy, or update tagcheck"),
    ("UnknownAccountPath",
     "the policy asks for organizational_units, and where this account is in the organization is not known: "
     "scan the organization live with an up-to-date boto3, or name the accounts instead"),
    ("InternalError InternalFailure ServiceUnavailable Unavailable 500 502 503 504",
     "AWS failed, even after retries: run again later"),
)  # fmt: skip
ADVICE = {code: advice for codes, advice in _ADVICE for code in codes.split()}


########################################################################################################
# 2 Policy: ACCOUNT_ID and the like, ValuePattern, Policy, POLICY_SCHEMA, YamlDocument, load_policy
########################################################################################################

# How ids and names look, whether they come from a policy, AWS, a plan or the command line.
ACCOUNT_ID, INSTANCE_ID, REGION_NAME = "[0-9]{12}", "i-[0-9a-f]{8,17}", "[a-z]+(?:-[a-z]+)+-[0-9]+"
ROLE_NAME = "[A-Za-z0-9+=,.@_/-]{1,512}"
EMAIL_ADDRESS = r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@([A-Za-z0-9-]+\.)+[A-Za-z0-9-]+"
SLACK_MEMBER = "[UW][A-Z0-9]{6,20}"
ACCOUNT_PATH = "o-[a-z0-9]+/r-[a-z0-9]+(/ou-[a-z0-9]+-[a-z0-9]+)*"
MAX_ACCOUNT_NAME = 50  # characters (Organizations API reference, CreateAccount)
_UNIT = r"(\*/)?(ou|r|o)-[a-z0-9*?-]+(/[a-z0-9*?-]+)*/?"
_DATE, _DURATION = "[0-9]{4}-[0-9]{2}-[0-9]{2}", "[0-9]{1,4}[smhd]"
MAX_KEY_LENGTH, MAX_VALUE_LENGTH = 127, 256  # EC2 API reference, Tag

# AWS's regions by the endpoint data of botocore 1.44.5 (2026-11). A name that is not here is looked up in
# the installed botocore's data, so that a region younger than this file needs only a newer boto3.
AWS_REGIONS = frozenset(
    """
    af-south-1 ap-east-1 ap-east-2 ap-northeast-1 ap-northeast-2 ap-northeast-3 ap-south-1 ap-south-2
    ap-southeast-1 ap-southeast-2 ap-southeast-3 ap-southeast-4 ap-southeast-5 ap-southeast-6 ap-southeast-7
    ca-central-1 ca-west-1 cn-north-1 cn-northwest-1 eu-central-1 eu-central-2 eu-isoe-west-1 eu-north-1
    eu-south-1 eu-south-2 eu-west-1 eu-west-2 eu-west-3 eusc-de-east-1 il-central-1 me-central-1 me-south-1
    mx-central-1 sa-east-1 us-east-1 us-east-2 us-gov-east-1 us-gov-west-1 us-iso-east-1 us-iso-west-1
    us-isob-east-1 us-isob-west-1 us-isof-east-1 us-isof-south-1 us-west-1 us-west-2
    """.split()
)


def is_region(name: str) -> bool:
    """Return whether AWS has a region of this name, as far as this file or the installed botocore knows."""
    return name in AWS_REGIONS or name in _botocore_regions()


@functools.cache
def _botocore_regions() -> frozenset[str]:
    """Return the regions that the installed botocore knows; none where it is not installed."""
    import importlib.resources  # few commands need it, and it takes 5 milliseconds

    try:
        partitions = importlib.resources.files("botocore").joinpath("data/partitions.json").read_text("utf-8")
    except (ModuleNotFoundError, OSError):
        return frozenset()
    return frozenset[str]().union(*(each["regions"] for each in json.loads(partitions)["partitions"]))


# The processor time that a pattern may take on one value, and how long to wait for it on a busy machine.
PATTERN_SECONDS, PATTERN_WAIT = 0.5, 3.0
PATTERN_START = 60.0  # a Python process starts in 15 milliseconds
# After it was stopped on this many values, or took this long on slow ones, a pattern is not tried on others.
MAX_STOPPED, MAX_SLOW_SECONDS = 3, 10.0
# An upper bound by a pattern's text alone: the slowest that was found took 2 milliseconds.
MAX_PATTERN_STEPS, MAX_PATTERN_LENGTH = 2_000_000, 10_000
# For all patterns of a policy together: after the first they are only compiled, after the second refused.
MAX_TRY_SECONDS, MAX_CHECK_SECONDS = 1.0, 2.0
TRY_SECONDS = 0.0001  # what asking the child costs; not measured, so that a busy machine changes no verdict

# Reads lines of JSON (pattern, value, limit), and answers each with a line (matches or error, seconds).
# SIGPROF has no handler, so it ends the process even within `re`, and even when tagcheck was killed.
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
    """Matches patterns in a child process, which is started when needed and killed when it takes too long.

    `re` holds the interpreter lock, and only a signal in the main thread of POSIX could interrupt it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None
        self._exit_code = 0
        self._deadline = math.inf  # of the answer that is waited for
        self.seconds = 0.0  # what all matches have cost

    def match(self, pattern: str, value: str) -> tuple[bool | str, float] | None:
        """Return whether a pattern matches, or why it is invalid, and the seconds; None if it was stopped."""
        request = json.dumps([pattern, value, PATTERN_SECONDS]).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # a busy machine or too little memory can stop a harmless match
                if self._process is None:
                    self._start()
                if answer := self._ask(request, PATTERN_WAIT):
                    matches, seconds = json.loads(answer)
                    self.seconds += TRY_SECONDS + seconds
                    return matches, seconds
                if self._exit_code == -getattr(signal, "SIGPROF", 0):
                    break
            self.seconds += TRY_SECONDS + PATTERN_SECONDS
        return None

    def _ask(self, request: bytes, seconds: float) -> bytes:
        """Return the child's answer; nothing if it ended, or had to be killed after these seconds."""
        answer, self._deadline = b"", time.monotonic() + seconds
        try:
            with contextlib.suppress(OSError):
                self._process.stdin.write(request)
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
        finally:
            self._deadline = math.inf
            if not answer:  # also on Ctrl-C: the answer to this must not become that to the next
                self.stop()
        return answer

    def _start(self) -> None:
        """Start the child, in a session of its own so that Ctrl-C does not reach it; raises TagcheckError."""
        import subprocess  # most policies do not need it

        files: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        command = [sys.executable or "", "-I", "-S", "-c", _MATCHER_CODE]
        try:
            self._process = subprocess.Popen(command, **files, start_new_session=True, creationflags=flags)
            threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()
            if not self._ask(b"", PATTERN_START):
                raise OSError("it ended at once")
        except (OSError, RuntimeError) as error:  # RuntimeError: no new thread
            self.stop()
            advice = "allow one more process, or list the values in the policy instead of a pattern"
            message = f"cannot start a Python process to check a pattern in: {error}; {advice}"
            raise TagcheckError(message) from error

    def _watch(self, process: Any) -> None:
        """Kill a child that takes too long; a timer for each match would cost more than the match."""
        while process.poll() is None:
            if time.monotonic() > self._deadline:
                process.kill()
            time.sleep(0.05)

    def stop(self) -> None:
        """End the child if there is one."""
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(OSError), process:  # what could not be written
                process.kill()
            self._exit_code = process.returncode


_MATCHER = _Matcher()
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
        most = int(high or MAX_VALUE_LENGTH) if comma else least
        width += min(most, MAX_VALUE_LENGTH)
        ways *= {"*": MAX_VALUE_LENGTH, "+": MAX_VALUE_LENGTH, "?": 2}.get(sign, max(1, most - least + 1))
        if ways > MAX_PATTERN_STEPS:
            return False
    alternatives, groups = text.count("|"), text.count("(") + 1
    return groups < 100 and ways * width * (1 + alternatives / groups) ** groups <= MAX_PATTERN_STEPS


def any_case(pattern: str) -> str:
    """Return the pattern that matches the same texts in upper and in lower case."""
    flags = re.match(r"\(\?([aiLmsux]+)\)", pattern)  # Python wants them all at the beginning
    return f"(?i{flags[1]}){pattern[flags.end() :]}" if flags else f"(?i){pattern}"


def escaped(text: str) -> str:
    """Return the pattern of a literal text, with only the backslashes that it needs."""
    return re.sub(r"[.^$*+?{}\[\]\\|()]", r"\\\g<0>", text)


class Verdict(Enum):
    """What a rule says about a value."""

    ALLOWED = 1
    REFUSED = 2
    STOPPED = 3  # its pattern took too long on this value, or failed: `re` has bugs
    NOT_CHECKED = 4  # its pattern took too long on other values


class ValuePattern:
    """A regular expression for whole tag values: strangers write them, but none can keep it busy for long."""

    def __init__(self, text: str, *, ignore_case: bool = False) -> None:
        self.text = text
        self._regex = any_case(text) if ignore_case else text
        self._quick = re.compile(self._regex) if is_quick(text) else None
        self._verdicts: dict[str, Verdict] = {}
        self.slow_seconds = 0.0
        self.stopped = 0

    @property
    def given_up(self) -> bool:
        """Whether it took so long that no more values are checked."""
        return self.stopped >= MAX_STOPPED or self.slow_seconds >= MAX_SLOW_SECONDS

    def judge(self, value: str) -> Verdict:
        """Return whether the whole value matches, if that can be found out in time."""
        if self._quick and len(value) <= MAX_VALUE_LENGTH:
            return Verdict.ALLOWED if self._quick.fullmatch(value) else Verdict.REFUSED
        if value in self._verdicts:
            return self._verdicts[value]
        if self.given_up:
            return Verdict.NOT_CHECKED
        answer = _MATCHER.match(self._regex, value)
        self.stopped += answer is None
        matches, seconds = answer or (False, PATTERN_SECONDS)
        self.slow_seconds += seconds if seconds > 0.001 else 0
        # Only a saved file can hold longer values than AWS allows, of any length.
        if len(self._verdicts) >= 2000 or len(value) > MAX_VALUE_LENGTH:
            self._verdicts.clear()
        verdict = Verdict.ALLOWED if matches is True else Verdict.REFUSED if answer else Verdict.STOPPED
        return self._verdicts.setdefault(value, verdict)


def _string(example: str, **more: Any) -> dict[str, Any]:
    """Return the schema of a text that is not empty; what editors see as a number, tagcheck reads as text."""
    return {"type": ["string", "number"], "minLength": 1, "examples": [example]} | more


def _form(what: str, pattern: str, example: str) -> dict[str, Any]:
    """Return the schema of a text that matches a pattern, and what to say of any other text."""
    message = f"is not {what}, such as {example}"
    return _string(example, type="string", pattern=f"^({pattern})$", patternErrorMessage=message)


def _list(items: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the schema of a list that is not empty."""
    return {"type": "array", "minItems": 1, "items": items, "examples": [items["examples"]]} | more


def _one_or_more(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a text, or of a list of such texts that is not empty."""
    return {**item, "type": ["string", "number", "array"], "minItems": 1, "items": item}


def _mapping(values: Mapping[str, Any], example: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return the schema of a mapping that has any keys and is not empty."""
    shape = {"type": "object", "minProperties": 1, "additionalProperties": values, "examples": [example]}
    return shape | more


def _key(about: str, schema: Any, default: Any = MISSING, *, name: str = "", read: Any = None) -> Any:
    """Return a field that a policy key fills, with the key's schema; one with a default is optional.

    `read` turns the value, or each item of a list, into that of the field: a function, or a record's class.
    """
    metadata = {"name": name, "schema": schema | {"description": about}, "read": read}
    return field(default=default, metadata=metadata)


def _keys(record: Any) -> dict[str, Any]:
    """Return the fields of a record that policy keys fill, by the keys."""
    return {each.metadata["name"] or each.name: each for each in fields(record) if each.metadata}


def _schema(record: Any, example: Any, **more: Any) -> dict[str, Any]:
    """Return the schema of the mapping that becomes a record."""
    keys = _keys(record)
    required = [key for key, each in keys.items() if each.default is MISSING]
    properties = {key: each.metadata["schema"] for key, each in keys.items()}
    closed = {"required": required, "additionalProperties": False, "properties": properties}
    return {"type": "object", "examples": [example]} | more | closed


_TRUE, _FALSE = ({"type": "boolean", "examples": [example]} for example in (True, False))
_TAG_KEY, _TAG_VALUE = _string("Owner", maxLength=MAX_KEY_LENGTH), _string("prod", maxLength=MAX_VALUE_LENGTH)
_REGION = _string("eu-west-1")
_ACCOUNT = _form("an account id (12 digits)", ACCOUNT_ID, "012345678901") | {"type": ["string", "number"]}
_IS_ACCOUNT = {"pattern": f"^{ACCOUNT_ID}$", "patternErrorMessage": _ACCOUNT["patternErrorMessage"]}
_ACCOUNT_NAME = _string("production", maxLength=MAX_ACCOUNT_NAME)
_INSTANCE_TEXT = _form("an instance id", INSTANCE_ID, "i-0123456789abcdef0")
_ROLE = _form("a role name (which is only the end of its ARN)", ROLE_NAME, "tagcheck-read")
_ORGANIZATIONAL_UNIT = _form("the id or path of an organizational unit", _UNIT, "ou-ab12-12345678")
_INSTANCE_TYPE = _form("an instance type", "[a-z0-9*?][a-z0-9.*?-]*", "t3.micro")
_OPERATOR = _one_or_more(_string("eks.amazonaws.com"))
_OPERATOR_NAME = r".*[*?].*|unknown|[a-z0-9-]+(\.[a-z0-9-]+)+"  # or what a scan calls it
_PATTERN = _string("CC-[0-9]{4}")
_DATE_TEXT = _form("a date (year-month-day)", _DATE, "2027-01-31")
_TIME_TEXT = _form("a duration (a number and s, m, h or d)", _DURATION, "2h")
_ADDRESS = _form("an email address", EMAIL_ADDRESS, "ops@example.com")
_MEMBER_OR_ADDRESS = "an email address or the id of a Slack member"
_RECIPIENT = _form(_MEMBER_OR_ADDRESS, f"{EMAIL_ADDRESS}|{SLACK_MEMBER}", "U012ABCDEF")
_HOST = _form("a host (with :port if that is not 443)", "[a-z0-9.-]+(:[0-9]{1,5})?", "slack.example.com")
_HOSTS = _list(_HOST)
_SECRET = "the name of an environment variable (keep secrets out of the policy)"
_VARIABLE = _form(_SECRET, "[A-Za-z_][A-Za-z0-9_]*", "SLACK_WEBHOOK_URL")
_ARN = f"arn:[a-z-]+:sns:[a-z0-9-]+:{ACCOUNT_ID}:[A-Za-z0-9_-]{{1,256}}"
_TOPIC = _form("the ARN of an SNS topic that is not FIFO", _ARN, "arn:aws:sns:eu-west-1:012345678901:tags")
_PAGE_PATH = "[A-Za-z0-9._~:/?@!$&'()*+,;=%-]{0,500}"
_PAGE = _form(
    "an https:// URL (without a user name and a #, at most 500 characters after the host)",
    f"https://[A-Za-z0-9.-]{{1,253}}(:[0-9]{{1,5}})?(/{_PAGE_PATH})?",
    "https://ci.example.com/tagcheck/dashboard.html",
)
STATES = ("pending", "running", "stopping", "stopped", "shutting-down", "terminated")


def is_empty(value: str, placeholders: Container[str]) -> bool:
    """Return whether a tag value says nothing: it is blank, or a placeholder."""
    text = stripped(value)
    return not text or text.casefold() in placeholders


@functools.cache
def _any_of(texts: tuple[str, ...], *, ignore_case: bool = False) -> Callable[[str], object]:
    """Return what matches any of these texts, in which `*` matches any text and `?` one character."""
    folded = map(str.casefold, texts) if ignore_case else texts
    patterns = (fnmatch.translate(text.replace("[", "[[]")) for text in folded)
    match = re.compile("|".join(patterns) or "(?!)").match
    return (lambda value: match(value.casefold())) if ignore_case else match


@functools.lru_cache(10_000)  # asked of each instance, and the same for all of an account
def _is_in(units: tuple[str, ...], paths: str) -> bool:
    """Return whether one of an account's places is one of these units, or is below one given by its id."""
    is_id = _any_of(tuple(unit for unit in units if "/" not in unit))
    whole = (unit if unit[-1] == "*" else f"{unit.rstrip('/')}/" for unit in units if "/" in unit)
    is_path = _any_of(tuple(whole))
    return any(is_path(path) or any(map(is_id, path.split("/"))) for path in paths.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Which instances are meant: those that meet every condition that is given; of a list, one is enough."""

    tags: tuple[tuple[str, tuple[str, ...]], ...] = _key(
        "Tags that they have: a value, or a list of values. * matches any text and ? one character. "
        "Case matters, unless a rule for the tag has ignore_case.",
        _mapping(_one_or_more(_TAG_VALUE | {"minLength": 0}), {"eks:cluster-name": "*"}),
        (),
        read=lambda tags: tuple(
            (key, (wanted,) if isinstance(wanted, str) else tuple(wanted)) for key, wanted in tags.items()
        ),
    )
    instances: tuple[str, ...] = _key("Their ids.", _list(_INSTANCE_TEXT), ())
    accounts: tuple[str, ...] = _key("Their accounts.", _list(_ACCOUNT), ())
    organizational_units: tuple[str, ...] = _key(
        "Their accounts' units: an id, which includes the units below it, or a path; * and ? as in tags.",
        _list(_ORGANIZATIONAL_UNIT),
        (),
    )
    regions: tuple[str, ...] = _key("Their regions.", _list(_REGION), ())
    instance_types: tuple[str, ...] = _key("Their types; * and ? as in tags.", _list(_INSTANCE_TYPE), ())
    managed_by: tuple[str, ...] = _key(
        'The AWS service that operates them; * and ? as in tags, so "*" is any.', _OPERATOR, ()
    )
    any_case: frozenset[str] = frozenset()  # the tags that a rule with ignore_case asks for
    line: int = 0
    column: int = 0

    @property
    def wanted(self) -> list[str]:
        """What an instance must meet, in words: each list that is given, and each tag."""
        nothing = Instance("", "", datetime.min, {})
        return [wanted for wanted, _ in self.mismatches(Target("", ""), nothing)]

    def mismatches(
        self, target: Target, instance: Instance, placeholders: Container[str] | None = None
    ) -> Iterator[tuple[str, str]]:
        """Yield each condition that an instance does not meet: what is wanted, and what there is instead."""
        if self.accounts and target.account_id not in self.accounts:
            yield f"account {', '.join(self.accounts)}", f"the account is {target.account_id}"
        if self.organizational_units and not _is_in(self.organizational_units, target.account_paths):
            place = target.account_paths or "not known here"
            yield f"accounts in {', '.join(self.organizational_units)}", f"the account's place is {place}"
        if self.regions and target.region not in self.regions:
            yield f"region {', '.join(self.regions)}", f"the region is {target.region}"
        if self.instances and instance.instance_id not in self.instances:
            yield ", ".join(self.instances), f"the instance is {instance.instance_id}"
        if self.instance_types and not _any_of(self.instance_types)(instance.instance_type):
            found = f"the instance type is {instance.instance_type or 'not known'}"
            yield f"instance types {', '.join(self.instance_types)}", found
        operator = instance.managed_by
        if self.managed_by and not (operator and _any_of(self.managed_by)(operator)):
            found = f"this one is managed by {operator or 'no AWS service'}"
            yield f"instances managed by {', '.join(self.managed_by)}", found
        for key, wanted in self.tags:
            value = instance.tags.get(key)
            if value is None:
                yield f"{key}={' or '.join(wanted)}", f"{key} is missing"
            elif value not in wanted:
                # Only "" matches what counts as empty; a wildcard does so in an exemption (no placeholders).
                empty = placeholders is not None and is_empty(value, placeholders)
                if not ("" in wanted if empty else _any_of(wanted, ignore_case=key in self.any_case)(value)):
                    yield f"{key}={' or '.join(wanted)}", f"{key} is {value!r}"


_CONDITIONS = [{"required": [key]} for key in _keys(Match)]
_WHEN = _schema(Match, {"tags": {"Environment": "prod"}}, anyOf=_CONDITIONS)


@dataclass(frozen=True, slots=True)
class RequiredTag:
    """One rule: a required tag key, what its value must be, and its line in the policy."""

    key: str = _key("The tag key. Case matters.", _TAG_KEY)
    values: tuple[str, ...] = _key(
        "The allowed values. Case matters, unless ignore_case is true.", _list(_TAG_VALUE), ()
    )
    pattern: ValuePattern | None = _key("A Python regular expression for the whole value.", _PATTERN, None)
    default: str | None = _key("What remediate may write if it finds no better value.", _TAG_VALUE, None)
    aliases: tuple[str, ...] = _key(
        "Other keys that meet the rule, too; the first that has a value counts.", _list(_TAG_KEY), ()
    )
    ignore_case: bool = _key("true: values and pattern match in upper and lower case.", _TRUE, False)
    when: Match | None = _key(
        "The rule applies only to instances that meet all of this.", _WHEN, None, read=Match
    )
    allow_empty: bool = _key("true: the key is enough; its value may be empty.", _TRUE, False)
    optional: bool = _key("true: checked only where the tag is present.", _TRUE, False)
    effective_from: date | None = _key(
        "The first day on which it counts (UTC). Before it, what would fail is only counted.",
        _DATE_TEXT,
        None,
        read=date.fromisoformat,
    )
    line: int = 0
    column: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that meet the rule, its own first."""
        return self.key, *self.aliases

    @property
    def is_plain(self) -> bool:
        """Whether every instance must have a value under this very key, from now on."""
        return not (self.aliases or self.when or self.allow_empty or self.optional or self.effective_from)

    def unmet(self, target: Target, instance: Instance, placeholders: Container[str]) -> list[str]:
        """Return why the rule is not for an instance of a target; nothing if it is."""
        unmet = self.when.mismatches(target, instance, placeholders) if self.when else ()
        return [found for _, found in unmet]

    def counts(self, today: date) -> bool:
        """Return whether what fails the rule is a finding; `effective_from` is the first such day."""
        return self.effective_from is None or self.effective_from <= today

    def judge(self, value: str) -> Verdict:
        """Return the verdict on a value that is not empty."""
        listed = not self.values or value in self.values
        if not listed and not (self.ignore_case and value.casefold() in _folded(self.values)):
            return Verdict.REFUSED
        return self.pattern.judge(value) if self.pattern else Verdict.ALLOWED

    def allows(self, value: str) -> bool:
        """Return whether the rule allows a value that is not empty."""
        return self.judge(value) is Verdict.ALLOWED

    @property
    def wanted(self) -> str:
        """What the value should be, for messages."""
        values = f"one of {', '.join(self.values)}" if self.values else ""
        pattern = f"a match of {self.pattern.text}" if self.pattern else ""
        return " and ".join(filter(None, (values, pattern)))


@functools.lru_cache(1000)
def _folded(values: tuple[str, ...]) -> frozenset[str]:
    """Return values for comparing without regard to case."""
    return frozenset(map(str.casefold, values))


_TAG_OR_KEY = _TAG_KEY | {"type": ["string", "number", "object"]}
_REQUIRED_TAGS = _list(_schema(RequiredTag, "Owner", **_TAG_OR_KEY))


@dataclass(frozen=True, slots=True)
class Region:
    """What one region requires."""

    inherit: bool = _key("false: the policy's required_tags do not apply here.", _FALSE, True)
    required_tags: tuple[RequiredTag, ...] = _key(
        "More required tags; they replace the policy's of the same key.", _REQUIRED_TAGS, (), read=RequiredTag
    )


NOTICE_DAYS = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Exemption(Match):
    """Instances that may lack some tags."""

    reason: str = _key("Why. Every report shows it.", _string("EKS nodes are tagged by the cluster team"))
    required_tags: tuple[str, ...] = _key("The tags that they may lack. Default: all.", _list(_TAG_KEY), ())
    expires: date | None = _key("The last day it applies (UTC).", _DATE_TEXT, None, read=date.fromisoformat)
    approved_by: str | None = _key("Who approved it.", _string("head of platform"), None)
    ticket: str | None = _key("Where it was approved.", _string("OPS-1234"), None)

    def holds(self, today: date) -> bool:
        """Return whether it still applies; `expires` is its last day."""
        return self.expires is None or today <= self.expires

    def ends_soon(self, today: date) -> bool:
        """Return whether it has ended, or ends within NOTICE_DAYS."""
        return self.expires is not None and (self.expires - today).days <= NOTICE_DAYS


@dataclass(frozen=True, slots=True)
class Accounts:
    """Which accounts are scanned, and with which role."""

    role_name: str = _key("The role to assume in every account but your own.", _ROLE)
    organization: bool = _key("true: every active account of the organization.", _TRUE, False)
    ids: tuple[str, ...] = _key("The account ids.", _list(_ACCOUNT), ())
    exclude: tuple[str, ...] = _key("Accounts to skip.", _list(_ACCOUNT), ())
    external_id: str | None = _key("The external id that the role requires.", _string("tagcheck"), None)
    names: tuple[tuple[str, str], ...] = _key(
        "What reports call accounts. Default: their names in the organization.",
        _mapping(_ACCOUNT_NAME, {"012345678901": "production"}, propertyNames=_IS_ACCOUNT),
        (),
        read=lambda names: tuple(names.items()),
    )

    def covers(self, account_id: str) -> bool:
        """Return whether an account is in the policy's scope."""
        return account_id not in self.exclude and (self.organization or account_id in self.ids)


@dataclass(frozen=True, slots=True)
class Slack:
    """An incoming webhook; its URL is a secret, and stays in the environment."""

    webhook_url_env: str = _key("The environment variable that holds the webhook's URL.", _VARIABLE)
    allow_hosts: tuple[str, ...] = _key("Hosts that the URL may have besides Slack's.", _HOSTS, ())


@dataclass(frozen=True, slots=True)
class Sns:
    """A topic of SNS."""

    topic_arn: str = _key("The ARN of the topic.", _TOPIC)


@dataclass(frozen=True, slots=True)
class Email:
    """The sender of email, and who gets the digest of everything."""

    sender: str = _key("The sender, an address verified in SES.", _ADDRESS, name="from")
    to: tuple[str, ...] = _key("Who gets the digest of everything.", _list(_ADDRESS, maxItems=50), ())
    region: str | None = _key("The region of SES. Default: that of the credentials.", _REGION, None)


@dataclass(frozen=True, slots=True)
class Owners:
    """How to find the address or Slack member of an owner; the names in `mapping` are lower case."""

    tag: str = _key("The tag that names the owner. Default: Owner.", _TAG_KEY, "Owner")
    mapping: tuple[tuple[str, str], ...] = _key(
        "The email address or Slack member id of owners and creators.",
        _mapping(_RECIPIENT, {"team-web": "web@example.com", "alice": "U012ABCDEF"}),
        (),
        read=lambda mapping: tuple((stripped(name).casefold(), to) for name, to in mapping.items()),
    )
    domains: tuple[str, ...] = _key(
        "Email domains: owners and creators with such an address get email.", _HOSTS, (), read=str.casefold
    )
    default: str | None = _key("Who gets the rest. Default: nobody.", _RECIPIENT, None)

    def recipient(self, names: Iterable[str]) -> str | None:
        """Return the recipient for the first of the names that is known, else the default.

        Tags are written by strangers, so an address in one is used only where its domain is in the policy. A
        creator may be `role/session`, or `alice@example.com (SSO Admin)`.
        """
        known = dict(self.mapping)
        for name in names:
            whole = stripped(name).casefold()
            for text in (whole, whole.partition(" (")[0].rpartition("/")[2]):
                if text in known:
                    return known[text]
                if re.fullmatch(EMAIL_ADDRESS, text) and text.rpartition("@")[2] in self.domains:
                    return text
        return self.default


_SLACK = _schema(Slack, {"webhook_url_env": "SLACK_WEBHOOK_URL"})
_SNS = _schema(Sns, {"topic_arn": "arn:aws:sns:eu-west-1:012345678901:tags"})
_EMAIL = _schema(Email, {"from": "tags@example.com", "to": ["ops@example.com"]})
_OWNERS = _schema(Owners, {"domains": ["example.com"]})
_ON = {"enum": ["new", "any"], "examples": ["new"]}
_LONG_DURATION = "[0-9]{1,4}[smhdw]"
_AGE = _form("a duration (a number and s, m, h, d or w)", _LONG_DURATION, "7d")
_AGES = _list(_AGE, maxItems=5, examples=[["7d", "30d"]])  # each is a section of a digest


def duration(text: str) -> timedelta:
    """Return the duration that 90s, 30m, 2h, 1d or 1w mean; raises ValueError."""
    if not re.fullmatch(_LONG_DURATION, text):
        raise ValueError(text)
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
    return timedelta(seconds=int(text[:-1]) * seconds[text[-1]])


@dataclass(frozen=True, slots=True)
class Notify:
    """Who is notified of a scan's findings."""

    on: Literal["new", "any"] = _key("new: each finding once. any: all that is open, each time.", _ON, "new")
    slack: Slack | None = _key("An incoming webhook of Slack.", _SLACK, None, read=Slack)
    sns: Sns | None = _key("An SNS topic.", _SNS, None, read=Sns)
    email: Email | None = _key("Email, sent by SES.", _EMAIL, None, read=Email)
    owners: Owners | None = _key("A digest for each owner of their findings.", _OWNERS, None, read=Owners)
    dashboard_url: str | None = _key("Where `report` is published: digests link to it.", _PAGE, None)
    reminders: tuple[timedelta, ...] = _key(
        "Ages at which a finding that is still open is sent once more.", _AGES, (), read=duration
    )

    @property
    def channels(self) -> list[str]:
        """The channels; each is sent every finding, and remembers what it was sent."""
        channels = to_record(self, ("slack", "sns", "email", "owners"))
        return [name for name, given in (channels | {"email": self.email and self.email.to}).items() if given]


_ACCOUNTS = _schema(
    Accounts,
    {"organization": True, "role_name": "tagcheck-read"},
    oneOf=[
        {"required": ["ids"]},
        {"required": ["organization"], "properties": {"organization": {"const": True}}},
    ],
)
_EXEMPTION = _schema(
    Exemption,
    {"reason": "the cluster team tags them", "tags": {"eks:cluster-name": "*"}},
    description="Instances that may lack some tags. All conditions given must match.",
    anyOf=_CONDITIONS,
)
_REGIONS = _mapping(
    _schema(Region, None, type=["object", "null"], description="Its rules, if not the policy's alone."),
    {"us-east-1": {}, "eu-west-1": {"required_tags": ["DataResidency"]}},
)
_NOTIFY = _schema(Notify, {"slack": _SLACK["examples"][0]})
_VERSION = {"enum": [1, "1"], "examples": [1]}
_STATES = _list({"enum": list(STATES), "examples": ["running", "stopped"]})


@dataclass(frozen=True, slots=True)
class Policy:
    """A valid policy file; no code after this checks whether a key exists."""

    file: str
    digest: str
    version: str = _key("The version of this format: 1.", _VERSION)
    name: str = _key("Findings are stored under this name; a new name starts afresh.", _string("org-tagging"))
    regions: Mapping[str, tuple[RequiredTag, ...]] = _key(
        'The regions to scan, each with its rules. "*" is every other enabled region.', _REGIONS
    )
    required_tags: tuple[RequiredTag, ...] = _key(
        "The tags that instances must have in every region.", _REQUIRED_TAGS, (), read=RequiredTag
    )
    placeholder_values: frozenset[str] = _key(
        "Values that count as empty, such as tbd. Case does not matter.",
        _list(_TAG_VALUE),
        frozenset(),
        read=lambda text: stripped(text).casefold(),
    )
    states: frozenset[str] = _key(
        "States to check. Default: all but shutting-down and terminated.", _STATES, frozenset(STATES[:4])
    )
    normalize_aliases: bool = _key(
        "true: remediate may write a rule's own key where an alias has the value.", _TRUE, False
    )
    grace_period: timedelta = _key(
        "How long after its launch an instance may lack tags.", _TIME_TEXT, timedelta(0), read=duration
    )
    accounts: Accounts | None = _key(
        "The accounts to scan. Default: that of the credentials.", _ACCOUNTS, None, read=Accounts
    )
    expected_account: str | None = _key(
        "The account of the credentials. With any other, nothing is read.", _ACCOUNT, None
    )
    exemptions: tuple[Exemption, ...] = _key(
        "Instances that may lack some tags, each with a reason.", _list(_EXEMPTION), (), read=Exemption
    )
    notify: Notify | None = _key("Who is notified of a scan's findings.", _NOTIFY, None, read=Notify)
    warnings: tuple[Problem, ...] = ()

    def covers(self, region: str) -> bool:
        """Return whether the region is in the policy's scope."""
        return region in self.regions or "*" in self.regions

    def covers_account(self, account_id: str) -> bool:
        """Return whether the account is in the policy's scope."""
        return not self.accounts or self.accounts.covers(account_id)

    def covers_target(self, target: Target) -> bool:
        """Return whether both the account and the region are in the policy's scope."""
        return self.covers_account(target.account_id) and self.covers(target.region)

    def rules(self, region: str) -> tuple[RequiredTag, ...]:
        """Return the tags required in a region that the policy covers."""
        return self.regions[region] if region in self.regions else self.regions["*"]

    @property
    def all_rules(self) -> list[RequiredTag]:
        """The rules of all regions, each once."""
        return [*dict.fromkeys(itertools.chain.from_iterable(self.regions.values()))]

    @property
    def keys(self) -> list[str]:
        """The tags that are required anywhere."""
        return [*dict.fromkeys(rule.key for rule in self.all_rules)]

    @property
    def owner_key(self) -> str:
        """The tag that names the owner: that of `notify`, or the required tag Owner, or the first one."""
        if self.notify and self.notify.owners:
            return self.notify.owners.tag
        keys = [rule.key for rule in itertools.chain.from_iterable(self.regions.values())]
        return next((key for key in keys if key.casefold() == "owner"), keys[0] if keys else "Owner")

    @property
    def asks_for_units(self) -> bool:
        """Whether it depends on where an account is in the organization."""
        matches = [*self.exemptions, *(rule.when for rule in self.all_rules if rule.when)]
        return any(match.organizational_units for match in matches)

    def rules_by_key(self, region: str) -> dict[str, RequiredTag]:
        """Return the tags required in a region by their keys; none where the policy does not cover it."""
        return {rule.key: rule for rule in self.rules(region)} if self.covers(region) else {}

    def includes(self, state: str) -> bool:
        """Return whether instances in a state are checked; states that AWS added later are included."""
        return state in self.states or is_new_state(state)


def is_new_state(state: str) -> bool:
    """Return whether an instance state is not one that AWS documents today."""
    return state not in STATES


POLICY_SCHEMA = _schema(
    Policy,
    {"version": 1, "name": "org-tagging", "regions": {"us-east-1": {"required_tags": ["Owner"]}}},
    title="tagcheck policy",
    description="Which tags EC2 instances must have, region by region.",
    **{"$schema": "http://json-schema.org/draft-07/schema#"},
)

# Far more than any real policy needs; they bound what a hostile file's size, nesting and aliases can cost.
MAX_POLICY_BYTES, MAX_POLICY_DEPTH, MAX_POLICY_NODES = 1_000_000, 40, 30_000

KeyPath = tuple[str | int, ...]


class YamlDocument:
    """The value of a YAML text, the place of each key and value in it, and its problems.

    Every scalar is the text as it was written, so `NO`, `0123` and `2027-01-31` stay what they look like;
    only `true`, `false` and null without quotes are special. Raises PolicyError.
    """

    def __init__(self, text: str, file: str = "") -> None:
        check_packages("PyYAML")
        import yaml

        self.file = file
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.any_case: frozenset[str] = frozenset()  # the keys of rules with ignore_case
        self.pattern = functools.cache(ValuePattern)  # rules with the same pattern share its limits
        self.pattern_error = functools.cache(functools.partial(_pattern_error, _MATCHER.seconds))
        self._nodes = 0
        self._key_marks: dict[KeyPath, Any] = {}
        self._value_marks: dict[KeyPath, Any] = {}
        if control := yaml.reader.Reader.NON_PRINTABLE.search(text):
            message = f"the character U+{ord(control[0]):04X} is not allowed; remove it"
            raise _broken(file, _mark(text[: control.start()]), message)
        loader = yaml.SafeLoader(text)
        compose, nodes = loader.compose_node, itertools.count(1)

        def compose_node(parent: Any, index: Any) -> Any:
            if next(nodes) > MAX_POLICY_NODES:
                message = f"more than {MAX_POLICY_NODES:,} keys and values: this is not a policy"
                raise _broken(file, loader.peek_event().start_mark, message)
            return compose(parent, index)

        loader.compose_node = compose_node  # PyYAML takes up to 10 seconds for all of a megabyte
        start = loader.get_mark()
        try:
            self.value = self._build(loader.get_single_node() or yaml.ScalarNode("", "", start, start), ())
        except yaml.MarkedYAMLError as error:
            raise _broken(file, *_yaml_advice(text, error)) from error
        except RecursionError as error:
            raise _broken(file, loader, "nested too deeply") from error
        except (ValueError, OverflowError) as error:  # PyYAML's own, of numbers in escapes and directives
            raise _broken(file, loader, "a number in an escape or a directive is too large") from error

    def place(self, path: KeyPath, *, at_key: bool = False) -> tuple[int, int]:
        """Return line and column, from 1, of the value at a path, or of the key that leads to it."""
        mark = (self._key_marks if at_key else self._value_marks)[path]
        return mark.line + 1, mark.column + 1

    def add(self, path: KeyPath, message: str, *, at_key: bool = False, near: Any = ()) -> None:
        """Add a problem with the value at a path, or with its key; `near` is a word and what it may mean."""
        # Only as many problems as are shown are worth the search.
        hint = did_you_mean(*near) if near and len(self.problems) < MAX_PROBLEMS else ""
        steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path[: len(path) - at_key])
        where = "".join(steps).removeprefix(".")  # regions.eu-west-1.required_tags[1]
        place = self.place(path, at_key=at_key)
        self.problems.append(Problem(self.file, *place, where, message + hint))

    def warn(self, path: KeyPath, message: str) -> None:
        """Add a warning about the value at a path."""
        self.add(path, message)
        self.warnings.append(replace(self.problems.pop(), severity="warning"))

    def _build(self, node: Any, path: KeyPath) -> Any:
        """Return the value of a node; an alias costs as much as if its anchor stood there again."""
        self._nodes += 1
        if self._nodes > MAX_POLICY_NODES or len(path) > MAX_POLICY_DEPTH:
            message = "the nesting or the aliases make this larger than any policy"
            raise _broken(self.file, node.start_mark, message)
        self._value_marks[path] = node.start_mark
        if node.tag.rpartition(":")[2] not in _YAML_TAGS:
            self.add(path, f"{node.tag} has no meaning in a policy; remove it")
        if node.id == "mapping":
            value: Any = self._build_mapping(node, path)
        elif node.id == "sequence":
            value = [self._build(item, (*path, index)) for index, item in enumerate(node.value)]
        else:
            self._check_text(node, path)
            value = _YAML_WORDS.get(node.value, node.value) if node.style is None else node.value
        self._value_marks[path] = node.start_mark  # again, as what is merged in has left its own here
        return value

    def _build_mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        """Return a mapping; merged ones come first, so that its own keys and their places replace theirs."""
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in sorted(node.value, key=lambda pair: pair[0].tag != _YAML_MERGE):
            if key.tag == _YAML_MERGE:
                for source in reversed(value.value if value.id == "sequence" else [value]):
                    merged = self._build(source, path)
                    if not isinstance(merged, dict):
                        raise _broken(self.file, source.start_mark, "<< takes a mapping, or a list of them")
                    mapping |= merged
                continue
            if key.id != "scalar":
                raise _broken(self.file, key.start_mark, "a key must be plain text; put it in quotes")
            name, key_path = key.value, (*path, key.value)
            self._key_marks[key_path] = key.start_mark
            self._check_text(key, key_path, at_key=True)
            if name in lines:
                message = f"{shown_value(name)} appears twice (first in line {lines[name]})"
                self.add(key_path, message, at_key=True)
            lines.setdefault(name, key.start_mark.line + 1)
            mapping[name] = self._build(value, key_path)
        return mapping

    def _check_text(self, node: Any, path: KeyPath, *, at_key: bool = False) -> None:
        """Add a problem if a text has what no tag would ever match, though it may look right."""
        plain, prose = node.style is None, not at_key and path[-1:] in _PROSE
        if plain and not prose and node.start_mark.line != node.end_mark.line:
            message = f"continues on the next line, so both are one text, {shown_value(node.value)}"
            self.add(path, f"{message}: indent the lines alike", at_key=at_key)
        elif found := _find_odd(node.value, _ODD[:1] if prose else _ODD if plain else _ODD[:4]):
            self.add(path, found[1], at_key=at_key)
        elif node.value.strip() and is_blank(node.value):
            self.add(path, "found only invisible characters: type the text again", at_key=at_key)


_YAML_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_YAML_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "value", "seq", "map", "merge", "")
_YAML_MERGE = "tag:yaml.org,2002:merge"
_PROSE = (("reason",), ("approved_by",), ("ticket",))

# Characters that no tag would ever match, though they may look right, and what to say about the first one.
# Prose is only checked for the first row, a text in quotes for all but the last two.
_ODD = (
    ("[\ud800-\udfff]", "found half of a character (U+{:04X}): write the character itself"),
    ("[\0-\x1f\x7f-\x9f]", "found the control character U+{:04X}: remove it (| and > add one at the end)"),
    ("[\u00a0\u2007\u202f]", "found a no-break space (U+{:04X}): type a space"),
    # A variation selector after a visible character is part of many an emoji.
    (
        rf"[\u2028\u2029]|(?![\ufe00-\ufe0f]){INVISIBLE.pattern}",
        "found an invisible character (U+{:04X}): type the text again",
    ),
    ("^[\u201c\u201d\u201e\u2018\u2019\u201a]", "found a typographic quote: type a straight one, or none"),
    ("['\"]$", "{text} ends with a quote that nothing opens: remove it, or write both"),
)


def _find_odd(text: str, odd: Sequence[tuple[str, str]]) -> tuple[int, str] | None:
    """Return the place of the first of such characters in a text, and what to say about it."""
    for characters, message in odd:
        if found := re.search(characters, text):
            return found.start(), message.format(ord(found[0]), text=shown_value(text))
    return None


# What PyYAML says (context and problem), what to do about it, and whether the place is where it began.
_YAML_ADVICE = (
    (r"character '\\t'", "found a TAB: use spaces", False),
    ("cannot start any token|expected alphabetic|block scalar",
     "a text that begins with {begun!r} needs quotes", True),
    ("undefined alias", "a text that begins with * needs quotes (as it is, it is an alias)", False),
    ("unknown escape", "a backslash in double quotes begins an escape; use single quotes: '…'", False),
    ("quoted scalar", "the quote opened here is not closed", True),
    ("flow (sequence|mapping)", "the [ or {{ opened here is not closed, or a comma in it is missing", True),
    ("another document", "a second document begins here; a policy is one document", False),
    ("mapping values are not allowed", "a text with ': ' in it needs quotes; or this line is not "
     "indented as it should be, or the one above lacks its colon", False),
    ("could not find expected ':'.*-", "a space is missing after the dash", True),
    ("could not find expected ':'", "a colon and a space after it are missing in this line", True),
    ("sequence entries", "a list cannot begin on the line of its key; begin it on the next line", False),
    ("duplicate anchor", "the anchor appears twice", False),
    ("<block end>.* after text", "text follows a closing quote or bracket: put all of it in quotes", False),
    ("<block end>", "not indented like the lines above that it belongs to", False),
    ("node content", "a value is missing here", False),
    ("", "not YAML: {problem}", False),
)  # fmt: skip


def _yaml_advice(text: str, error: Any) -> tuple[Any, str]:
    """Return where a YAML text is broken, and what to do about it."""
    mark = error.problem_mark or error.context_mark
    begun = error.context_mark or mark
    said = f"{error.context}; {error.problem}"
    said += " after text" if text[mark.index - mark.column : mark.index].strip(" -?") else ""
    said += " -" if text[begun.index :].startswith("-") else ""
    advice, at_beginning = next(row[1:] for row in _YAML_ADVICE if re.search(row[0], said))
    mark = begun if at_beginning else mark
    line = "".join(text.splitlines(keepends=True)[mark.line : mark.line + 1])
    if odd := _find_odd(line, _ODD[2:4]):
        mark.column = odd[0]
        return mark, odd[1]
    return mark, advice.format(begun=text[mark.index :][:1], problem=error.problem)


def _broken(file: str, mark: Any, message: str) -> PolicyError:
    """Return the error of a file that cannot be read as a policy at all."""
    return PolicyError([Problem(file, mark.line + 1, mark.column + 1, "", message)])


def _mark(before: str) -> SimpleNamespace:
    """Return the place after a text, counted from 0 as PyYAML does."""
    return SimpleNamespace(line=before.count("\n"), column=len(before) - before.rfind("\n") - 1)


def read_input(path: str, most: int) -> bytes:
    """Return so many bytes at most of a file, - for standard input; raises OSError."""
    with Path("/dev/stdin" if path == "-" else path).open("rb") as file:
        return file.read(most)


def load_policy(path: str) -> Policy:
    """Read a policy file; raises PolicyError with every problem in it, or UsageError if it cannot be read."""
    try:
        content = read_input(path, MAX_POLICY_BYTES + 1)
    except OSError as error:
        advice = "name another file (of a scan: --policy FILE)"
        raise UsageError(f"cannot read the policy {path}: {error.strerror}; {advice}") from error
    return check_policy(content, path)


def check_policy(content: bytes, file: str) -> Policy:
    """Turn the bytes of a policy file into a Policy; raises PolicyError with every problem in it."""
    document = YamlDocument(_decode(content, file), file)
    _check_schema(document)
    _check_rules(document)
    if not document.problems:
        policy = _policy(document, hashlib.sha256(content).hexdigest())
        if not document.problems:
            return policy
    raise PolicyError([*dict.fromkeys(document.problems)])


def _decode(content: bytes, file: str) -> str:
    """Return the text of a policy file: UTF-8, or UTF-16 where a byte order mark says so."""
    if len(content) > MAX_POLICY_BYTES:
        raise _broken(file, _mark(""), f"larger than {MAX_POLICY_BYTES:,} bytes: this is not a policy")
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"not UTF-8 (byte 0x{content[error.start]:02X}); save the file as UTF-8"
        raise _broken(file, _mark(content[: error.start].decode(errors="replace")), message) from error


def _check_schema(document: YamlDocument) -> None:
    """Check a document against POLICY_SCHEMA, with our own messages."""
    check_packages("jsonschema")
    import jsonschema

    # Its messages hold a dump of the whole value: with aliases that can be gigabytes.
    for error in jsonschema.Draft7Validator(POLICY_SCHEMA).iter_errors(document.value):
        path, found, wanted = tuple(error.absolute_path), error.instance, error.validator_value
        is_key = "propertyNames" in error.absolute_schema_path
        known = tuple(sorted(error.schema.get("properties", ())))
        unknown = [key for key in found if key not in known] if known and isinstance(found, dict) else []
        # `- Owner:` is one mistake, and reported as an unknown key.
        colon = path[-2:-1] == ("required_tags",) and bool(unknown) and len(found) == 1
        match error.validator:
            case "additionalProperties":
                for key in unknown:
                    _add_unknown_key(document, (*path, key), known, colon=colon)
            case "required":
                for key in wanted:
                    if key not in found and not colon:
                        document.add(path, f"the key {key!r} is missing")
            case "type":
                kinds = " or ".join(_KINDS[kind] for kind in _KINDS if kind in wanted)
                document.add(path, f"must be {kinds}, not {shown_value(found)}{_type_hint(path, found)}")
            case "enum":
                texts = tuple(dict.fromkeys(map(str, wanted)))
                choice = f"{'one of ' if len(texts) > 1 else ''}{', '.join(texts)}"
                document.add(path, f"{shown_value(found)} is not {choice}", near=(found, texts))
            case "oneOf" if not isinstance(found, dict):
                pass  # its type is reported
            case "anyOf" if path[-1] == "when" and unknown:
                pass  # the unknown key was meant for a condition
            case other:
                message = _SCHEMA_MESSAGES[other].format(shown_value(found), len(found), wanted, error.schema)
                document.add((*path, found) if is_key else path, message, at_key=is_key)


_KINDS = {"array": "a list", "boolean": "true or false", "string": "text", "object": "a mapping (key: value)"}
_SCHEMA_MESSAGES = {
    "pattern": "{0} {3[patternErrorMessage]}",
    "minLength": "must not be empty",
    "minItems": "the list is empty: name at least one, or remove the key",
    "maxItems": "has {1} entries; at most {2} are possible",
    "minProperties": "is empty: name at least one",
    "maxLength": "{0} has {1} characters; AWS allows {2}",
    "anyOf": f"does not say for which instances: add {', '.join([*_keys(Match)][:-1])} or managed_by",
    "oneOf": "does not say which accounts: give it organization: true, or ids, not both",
}


def _add_unknown_key(document: YamlDocument, path: KeyPath, known: tuple[str, ...], *, colon: bool) -> None:
    """Add a key that the schema does not know, with what was probably meant."""
    key, hint = str(path[-1]), ""
    near: Any = ()
    if colon:
        hint = f": remove the colon (- {key[:40]}), or write - key: {key[:40]}"
    elif len(path) == 1 and is_region(key):
        hint = ": it is a region; indent it by two spaces, under regions:"
    elif key == "when" and path[0] == "exemptions":
        hint = ": write its conditions directly in the exemption"
    elif key in _BELONGS:
        hint = f": it belongs to {_BELONGS[key]}"
    elif path[-2:-1] == ("when",) and not did_you_mean(key, known):
        hint = f": if it is a tag, write tags: {{{key[:40]}: …}}"
    else:
        near = key, known
        if path[-2:-1] == ("slack",):
            hint = ": keep secrets out of the policy; name the variable that holds it in webhook_url_env"
    document.add(path, f"unknown key {shown_value(key)}{hint}", at_key=True, near=near)


# Where keys belong that people write elsewhere.
_BELONGS = {
    **dict.fromkeys(_keys(Match), "when, in a rule"),
    **dict.fromkeys(("reason", "expires", "approved_by", "ticket"), "an exemption"),
    **dict.fromkeys(("aliases", "ignore_case", "when", "allow_empty", "optional"), "a rule of required_tags"),
    "effective_from": "a rule of required_tags",
    "normalize_aliases": "the policy itself, beside required_tags",
    "unless": "an exemption: name these instances there",
    **dict.fromkeys(("dashboard_url", "reminders"), "notify"),
}


_RECORDS = (Policy, Region, RequiredTag, Exemption, Accounts, Notify, Slack, Sns, Email, Owners)
_KEYS = [(key, each.metadata["schema"].get("type")) for kind in _RECORDS for key, each in _keys(kind).items()]
_LISTS, _SWITCHES = ({key for key, kind in _KEYS if kind == wanted} for wanted in ("array", "boolean"))


def _type_hint(path: KeyPath, found: Any) -> str:
    """Return what to write in place of a value of the wrong type, as far as that can be told."""
    text = found[:40] if isinstance(found, str) else ""
    words = text and ("," in text or " " not in text)
    if text.startswith("-"):
        return "; a space is missing after the dash: - Owner"
    match path:
        case ("regions",):
            return "; write each region on its own line, indented, with a colon after it: us-east-1:"
        case ("regions", _):
            return "; put required_tags: before it"
        case (*_, key) if key in _LISTS and key != "exemptions" and words:
            return f"; write [{text}]"
        case (*_, "exemptions"):
            return "; begin each with a dash and a space: - reason: …"
        case (*_, "required_tags" | "values" as key) if text or key == "required_tags":
            return "; begin each with a dash and a space: - Owner"
        case (*_, "pattern"):
            return "; put it in single quotes: '[0-9]'"
        case (*_, key) if key in _SWITCHES:
            meant = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}
            word = meant.get(text.lower(), text.lower())
            return f"; write {word} without quotes" if word in ("true", "false") else ""
        case (*_, "effective_from") if found is None:
            return "; write a date, such as 2027-01-31"
        case (*_, "tags") if "when" in path or "exemptions" in path:
            key, _, value = text.partition("=")
            if value:
                return f"; write {{{key}: {value}}}"
            return "; write each tag with its value: {Environment: prod}"
        case (*_, "when"):
            return "; write the tag that instances must have: {tags: {Environment: prod}}"
        case (*_, "tags", _) if found is None:
            return '; for any value write "*"'
        case () if re.match(r"[\w-]+:\S", text):
            return "; a space must follow each colon"
        case (_, *_) if found is None:
            return "; if it begins with #, put it in quotes"
    return ""


# What people write for our keys, besides typing errors.
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
    "aliases": "alias other_keys alternatives also any_of",
    "ignore_case": "case_insensitive ignorecase case_sensitive insensitive",
    "when": "if only_if condition conditions where only_when",
    "allow_empty": "empty empty_ok allow_blank may_be_empty",
    "optional": "required mandatory if_present",
    "effective_from": "from starts start_date valid_from enforced_from enforce_from since starting",
    "organizational_units": "ou ous organizational_unit organization_units org_units",
    "instance_types": "type types instance_type",
    "normalize_aliases": "normalize normalise_aliases",
    "names": "account_names",
    "dashboard_url": "dashboard dashboard_link url link report_url",
    "reminders": "remind remind_after reminder repeat escalate",
}


def did_you_mean(word: Any, known: Sequence[str]) -> str:
    """Return " (did you mean 'x'?)" if a known word or a synonym of one is near."""
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
    """Return a value for a message: short, and without secrets."""
    if isinstance(value, str):
        # A webhook's URL is a secret, wherever it is.
        return repr(cut_text(re.sub(r"(?s)(://|hooks\.slack).*", r"\1…", value), 100))
    if isinstance(value, bool):
        return f'{str(value).lower()} (for that text write "{str(value).lower()}")'
    kinds = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value), repr(value)[:100])


def _given(mapping: Any, key: str, kind: type[Any]) -> Any:
    """Return the value of a key; an empty one of this kind if the schema refuses it."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    return value if isinstance(value, kind) else kind()


def _texts(mapping: Any, key: str) -> dict[int, str]:
    """Return the texts of the list at a key, by their index."""
    return {index: text for index, text in enumerate(_given(mapping, key, list)) if isinstance(text, str)}


def _check_rules(document: YamlDocument) -> None:
    """Check what a schema cannot express, and skip what the schema refuses."""
    value = document.value
    rules = _check_tags(document, (), value)
    for region, entry in _given(value, "regions", dict).items():
        if region != "*":
            _check_region(document, ("regions", region), region, at_key=True)
        rules |= _check_tags(document, ("regions", region), entry)
    keyed = [(key, rule) for rule in rules.values() if (key := _given(rule, "key", str))]
    asked = {key for key, _ in keyed}
    document.any_case = frozenset(key for key, rule in keyed if _given(rule, "ignore_case", bool))
    known = tuple(sorted(asked))
    placeholders = {stripped(text).casefold() for text in _texts(value, "placeholder_values").values()}
    for path, rule in rules.items():
        _check_aliases(document, path, rule, asked)
        if not _given(rule, "allow_empty", bool):
            _check_empty(document, path, rule, placeholders)
    for number, entry in enumerate(_given(value, "exemptions", list)):
        path = ("exemptions", number)
        _check_match(document, path, entry)
        _check_date(document, path, entry, "expires")
        for index, key in _texts(entry, "required_tags").items():
            if key not in asked:
                message = f"the policy does not require {shown_value(key)}"
                document.add((*path, "required_tags", index), message, near=(key, known))
    if notify := _given(value, "notify", dict):
        _check_notify(document, notify)


def _check_date(document: YamlDocument, path: KeyPath, entry: Any, key: str) -> None:
    """Add a problem if a date is on no calendar."""
    if re.fullmatch(_DATE, text := _given(entry, key, str)):
        try:
            date.fromisoformat(text)
        except ValueError:
            document.add((*path, key), f"{text} is not a valid date")


def _check_match(document: YamlDocument, path: KeyPath, match: Any) -> None:
    """Add a problem for what AWS does not have, and a warning for what nothing in scope can meet."""
    for index, region in _texts(match, "regions").items():
        _check_region(document, (*path, "regions", index), region)
    regions, accounts = (_given(document.value, key, dict) for key in ("regions", "accounts"))
    ids, excluded = ({*_texts(accounts, key).values()} for key in ("ids", "exclude"))
    left_out = "the policy's accounts leave it out"
    is_service = functools.partial(re.fullmatch, _OPERATOR_NAME)
    conditions: tuple[tuple[str, Callable[[str], object], str], ...] = (
        ("regions", lambda region: regions.keys() & {region, "*"}, "the policy does not cover it"),
        ("accounts", lambda id_: id_ not in excluded and (not ids or id_ in ids), left_out),
        ("managed_by", is_service, "AWS services have names like eks.amazonaws.com"),
    )
    for key, can_match, why in conditions:
        texts: dict[KeyPath, str] = {(key, index): text for index, text in _texts(match, key).items()}
        for place, text in (texts or {(key,): _given(match, key, str)}).items():
            if text and not can_match(text):
                document.warn((*path, *place), f"{shown_value(text)} matches nothing: {why}")
    if _given(match, "organizational_units", list) and accounts.get("organization") is not True:
        message = "organizational_units needs accounts.organization: true, as no other accounts are in units"
        document.add((*path, "organizational_units"), message, at_key=True)


def _check_aliases(document: YamlDocument, path: KeyPath, rule: Any, asked: Container[str]) -> None:
    """Add a problem for each alias that cannot be one: `asked` are the keys of all rules."""
    seen = {_given(rule, "key", str)}
    for index, alias in _texts(rule, "aliases").items():
        problem = ""
        if alias in seen:
            which = "the rule's own key" if alias == rule.get("key") else "in the list twice"
            problem = f"is {which}: remove it"
        elif alias in asked:
            problem = "is required by a rule of its own: remove it here, or remove that rule"
        elif alias != alias.strip():
            problem = "begins or ends with a space: remove it"
        if problem:
            document.add((*path, "aliases", index), f"{shown_value(alias)} {problem}")
        seen.add(alias)


def _check_empty(document: YamlDocument, path: KeyPath, rule: Any, placeholders: Container[str]) -> None:
    """Add a problem for each value of a rule, and for its default, that would fail it as empty."""
    texts: dict[KeyPath, str] = {("values", index): text for index, text in _texts(rule, "values").items()}
    texts["default",] = _given(rule, "default", str)
    for place, text in texts.items():
        if text and is_printable(text) and is_empty(text, placeholders):  # what is odd is told already
            advice = "remove it" if is_blank(text) else "remove it here, or from placeholder_values"
            document.add((*path, *place), f"{shown_value(text)} counts as empty, and would fail: {advice}")


# What gives access by itself: S3's presigned URLs, SAS, tokens.
_SECRET_IN_URL = re.compile(
    r"(?i)[?&;]([\w.-]*(?:token|secret|signature|credential|passw(?:or)?d|(?:access|api)[_-]?key|sig))="
)


def _check_notify(document: YamlDocument, notify: Mapping[str, Any]) -> None:
    """Add a problem where nobody is notified, or somebody by a channel that is not configured."""
    if not notify.keys() & {"slack", "sns", "email"}:
        document.add(("notify",), "has no channel: add slack, sns or email")
    email, owners = _given(notify, "email", dict), _given(notify, "owners", dict)
    if email and not owners and "to" not in email:
        document.add(("notify", "email"), "has no recipient: add to, or notify owners")
    if region := _given(email, "region", str):
        _check_region(document, ("notify", "email", "region"), region)
    if secret := _SECRET_IN_URL.search(_given(notify, "dashboard_url", str)):
        message = f"has a secret in it ({secret[1]}): link to a page for which readers sign in"
        document.add(("notify", "dashboard_url"), message)
    former = timedelta(0)
    for index, text in _texts(notify, "reminders").items():
        if re.fullmatch(_LONG_DURATION, text):
            age, problem = duration(text), ""
            if not age or age % timedelta(days=1):
                problem = "is not a number of whole days: write 1d or more"
            elif age <= former:
                problem = "is not longer than the one before it: write the shortest first, each once"
            if problem:
                document.add(("notify", "reminders", index), f"{text} {problem}")
            former = age
    mapping = {("mapping", name): to for name, to in _given(owners, "mapping", dict).items()}
    domains = {("domains", index): f"who@{domain}" for index, domain in _texts(owners, "domains").items()}
    for path, to in (mapping | domains | {("default",): owners.get("default")}).items():
        channel = "slack" if re.fullmatch(SLACK_MEMBER, str(to)) else "email"
        if re.fullmatch(f"{EMAIL_ADDRESS}|{SLACK_MEMBER}", str(to)) and channel not in notify:
            document.add(("notify", "owners", *path), f"needs notify.{channel}")


def _check_combination(document: YamlDocument, path: KeyPath, rule: Any) -> None:
    """Add a problem for keys of a rule that make no sense together, and check its `when` and its date."""
    given = {key for key in _keys(RequiredTag) if _given(rule, key, object) not in (None, False)}
    if {"optional", "default"} <= given:
        message = "default has no meaning here, as remediate never adds an optional tag: remove one of them"
        document.add((*path, "default"), message, at_key=True)
    if "ignore_case" in given and not given & {"values", "pattern"}:
        message = "ignore_case has nothing to compare: add values or pattern, or remove it"
        document.add((*path, "ignore_case"), message, at_key=True)
    _check_date(document, path, rule, "effective_from")
    _check_match(document, (*path, "when"), _given(rule, "when", dict))


def _check_region(document: YamlDocument, path: KeyPath, region: str, *, at_key: bool = False) -> None:
    """Add a problem if AWS has no such region."""
    if not is_region(region):
        near = (region, tuple(sorted(AWS_REGIONS)))
        document.add(path, f"AWS has no region {shown_value(region)}", at_key=at_key, near=near)


def _check_tags(document: YamlDocument, path: KeyPath, entry: Any) -> dict[KeyPath, Any]:
    """Check the rules of one required_tags list; returns them, as mappings, by their paths."""
    seen: set[str] = set()
    rules: dict[KeyPath, Any] = {}
    for index, tag in enumerate(_given(entry, "required_tags", list)):
        rule_path = (*path, "required_tags", index)
        rule, key_path = ({"key": tag}, rule_path) if isinstance(tag, str) else (tag, (*rule_path, "key"))
        rules[rule_path] = rule
        if not (key := _given(rule, "key", str)):
            continue
        shown = shown_value(key)
        if key in seen:
            document.add(key_path, f"{shown} is required twice")
        if key.lower().startswith("aws:"):
            document.add(key_path, f"{shown}: keys that begin with aws: are reserved for AWS")
        if key != key.strip():
            document.add(key_path, f"{shown} begins or ends with a space: remove it")
        if "*" in key:
            document.warn(key_path, f"{shown}: * is literal here; no key but this one is meant")
        seen.add(key)
        _check_values(document, rule_path, rule)
        _check_combination(document, rule_path, rule)
    return rules


def _check_values(document: YamlDocument, path: KeyPath, rule: Any) -> None:
    """Check the values, the pattern and the default of a rule."""
    values: set[str] = set()
    ignore_case = rule.get("ignore_case") is True
    for number, text in _texts(rule, "values").items():
        place, compared = (*path, "values", number), text.casefold() if ignore_case else text
        if compared in values:
            document.add(place, f"{shown_value(text)} is in the list twice")
        elif "*" in text:
            pattern = cut_text(".*".join(map(escaped, text.split("*"))).replace("'", "''"), 100)
            document.warn(place, f"{shown_value(text)}: * is literal here; use pattern: '{pattern}'")
        values.add(compared)
    pattern, default = _given(rule, "pattern", str), _given(rule, "default", str)
    if pattern and (why := document.pattern_error(any_case(pattern) if ignore_case else pattern)):
        document.add((*path, "pattern"), f"{shown_value(pattern)} {why}")
    elif default:
        texts = tuple(_texts(rule, "values").values())
        regex = document.pattern(pattern, ignore_case=ignore_case) if pattern else None
        checked = RequiredTag("", texts, regex, ignore_case=ignore_case)
        if not checked.allows(default):
            wanted = cut_text(checked.wanted, 500)
            message = f"{shown_value(default)} is not {wanted}, as the rule itself requires"
            document.add((*path, "default"), message, near=(default, checked.values))


def _pattern_error(began: float, pattern: str) -> str:
    """Return why a policy cannot use a pattern, or ""; `began` are the matcher's seconds before the first."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        return f"has more than {MAX_PATTERN_LENGTH:,} characters: list the values instead"
    if is_quick(pattern):
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            return _not_a_pattern(str(error))
        return ""
    # Long values of one character each, and the same behind the text that the pattern begins with.
    begun = re.split(r"[\\.^$*+?{}\[\]|()]", pattern, maxsplit=1)[0]
    long, signs = MAX_VALUE_LENGTH - 1, dict.fromkeys(f"aA0 {pattern}")
    values = [f"{(text + sign * long)[:long]}\0" for text in ("", begun) for sign in signs]
    for value in dict.fromkeys(("", *values)):
        if _MATCHER.seconds - began >= (MAX_TRY_SECONDS if value else MAX_CHECK_SECONDS):
            # An untried value is not a risk, as each has its limit; what may not compile cannot be used.
            return "" if value else "was not checked: the patterns before it took too long"
        answer = _MATCHER.match(pattern, value)
        if answer is None and not value:
            return "takes too much time or memory to compile: shorten it, or list the values"
        if answer is None:
            return "can run forever on long values: do not repeat a repetition, or list the values"
        if isinstance(answer[0], str):
            return _not_a_pattern(answer[0])
    return ""


def _not_a_pattern(error: str) -> str:
    """Return what is wrong with a pattern that `re` does not accept."""
    hint = " (any text is .* in a pattern)" if "nothing to repeat" in error else ""
    return f"is not a regular expression: {cut_text(error, 200)}{hint}"


def _policy(document: YamlDocument, digest: str) -> Policy:
    """Return the Policy of a document without problems; adds one for each region that requires nothing."""
    policy: Policy = _read_record(Policy, document.value, document, (), file=document.file, digest=digest)
    regions = {}
    for name, entry in policy.regions.items():
        region: Region = _read_record(Region, entry, document, ("regions", name))
        inherited = policy.required_tags if region.inherit else ()
        regions[name] = tuple({rule.key: rule for rule in (*inherited, *region.required_tags)}.values())
        if not regions[name]:
            message = f"{name} requires no tags: add one, or remove the region"
            document.add(("regions", name), message, at_key=True)
    return replace(policy, regions=regions, warnings=tuple(document.warnings))


def _read_record(kind: Any, value: Any, document: YamlDocument, path: KeyPath, **more: Any) -> Any:
    """Return the record of a mapping, of a tag key alone, or of nothing: each key fills its field."""
    given = {"key": value} if isinstance(value, str) else value or {}
    if "line" in kind.__dataclass_fields__:
        more["line"], more["column"] = document.place(path)
    if issubclass(kind, Match):
        more["any_case"] = document.any_case
    for key, each in _keys(kind).items():
        if key in given:
            found = given[key]
            # One text stands for a list of it.
            found = [found] if isinstance(found, str) and isinstance(each.default, tuple) else found
            more[each.name] = _read_field(each, found, document, (*path, key))
    if "pattern" in more:
        more["pattern"] = document.pattern(more["pattern"], ignore_case=more.get("ignore_case", False))
    return kind(**more)


def _read_field(each: Any, value: Any, document: YamlDocument, path: KeyPath) -> Any:
    """Return the value of a record's field; a list becomes what the field's default is."""
    read = each.metadata["read"] or (lambda value: value)
    if isinstance(value, list):
        kind = type(each.default)
        return kind(_read_field(each, item, document, (*path, index)) for index, item in enumerate(value))
    if is_dataclass(read):
        return _read_record(read, value, document, path)
    return read(value)


def check_patterns(policy: Policy) -> Iterator[str]:
    """Yield a notice for each rule whose pattern took too long on values."""
    for rule in policy.all_rules:
        if rule.pattern and (rule.pattern.stopped or rule.pattern.given_up):
            what = f"took too long on {counted(rule.pattern.stopped, 'tag value')} (counted as not matching)"
            if rule.pattern.given_up:
                what = (
                    "takes too long on some tag values, so others were not checked and count as not matching"
                )
            advice = "list the values, or repeat no part that holds a repetition"
            yield printable(f"{policy.file}:{rule.line}: warning: {rule.key}: its pattern {what}: {advice}")


def policy_warnings(policy: Policy, today: date) -> list[Problem]:
    """Return what is probably a mistake in a policy, and the exemptions that end."""
    return [*policy.warnings, *check_expiry(policy, today)]


def check_expiry(policy: Policy, today: date) -> list[Problem]:
    """Return a warning for each exemption that has ended, or ends within NOTICE_DAYS."""
    endings = []
    for index, exemption in enumerate(policy.exemptions):
        if exemption.expires is None or not exemption.ends_soon(today):
            continue
        days = (exemption.expires - today).days
        message = f"ends on {exemption.expires}, {'in ' + counted(days, 'day') if days else 'today'}"
        if days < 0:
            message = f"ended on {exemption.expires} and no longer applies: renew it, or remove it"
        where = f"exemptions[{index}] ({exemption.reason})"
        endings.append(Problem(policy.file, exemption.line, exemption.column, where, message, "warning"))
    return endings


########################################################################################################
# 3 Evaluation: judge, check_tag, near_miss, is_too_young, resolution, decide_exit_code
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
    upcoming: tuple[RequiredTag, ...] = ()  # the rules that it will fail from a later day on
    exempted_later: tuple[Exempted, ...] = ()  # what rules that count from a later day on are exempted from
    owner: str = ""  # who its tags say owns it, where it has violations


@dataclass(frozen=True, slots=True)
class ExemptedInstance:
    """An instance all of whose violations are exempted."""

    account_id: str
    account_name: str
    region: str
    instance_id: str
    state: str
    launch_time: str
    tags: Mapping[str, str]
    exempted: tuple[Exempted, ...]


def exempted_record(exempted: Exempted) -> dict[str, str | None]:
    """Return an exempted violation as a JSON object."""
    why = to_record(exempted.exemption, ("reason", "expires", "approved_by", "ticket"))
    why["expires"] = str(why["expires"]) if why["expires"] else None
    return to_record(exempted.violation) | why


@dataclass(frozen=True, slots=True)
class Scan:
    """One run over the targets; the state keeps it under its UUID."""

    scan_id: str
    policy: Policy
    started_at: datetime
    may_hide_managed: bool = False  # whether the input may lack instances that AWS services operate
    currency: str = ""  # of the prices, where they name it


def new_state_notice(state: str) -> str:
    """Return the notice about an instance state that this version does not know."""
    return f"The instance state {state[:64]!r} is new to tagcheck, and judged like running"


def judge(target: Target, instance: Instance, policy: Policy, now: datetime) -> Sighting:
    """Check an instance of a target against a policy; of several exemptions the first counts.

    What fails a rule that counts later is exempted only by an exemption that still holds on that day.
    """
    rules, placeholders, today = policy.rules(target.region), policy.placeholder_values, now.date()
    violations = tuple(
        violation
        for rule in rules
        if (violation := check_tag(instance.tags, rule, placeholders))
        and not rule.unmet(target, instance, placeholders)
    )
    too_young = is_too_young(instance, policy.grace_period, now)
    if not violations:
        return Sighting(instance, (), (), too_young)
    later = {rule.key: day for rule in rules if (day := rule.effective_from) and not rule.counts(today)}
    exempted: dict[str, Exempted] = {}
    in_force = (exemption for exemption in policy.exemptions if exemption.holds(today))
    covering = [exemption for exemption in in_force if not any(exemption.mismatches(target, instance))]
    for violation, exemption in itertools.product(violations, covering):
        key = violation.tag_key
        covers = not exemption.required_tags or key in exemption.required_tags
        if covers and exemption.holds(later.get(key, today)):
            exempted.setdefault(key, Exempted(violation, exemption))
    failing = {case.tag_key: case for case in violations if case.tag_key not in exempted}
    return Sighting(
        instance,
        tuple(case for key, case in failing.items() if key not in later),
        tuple(case for key, case in exempted.items() if key not in later),
        too_young,
        tuple(rule for rule in rules if rule.key in later and rule.key in failing),
        tuple(case for key, case in exempted.items() if key in later),
        _tagged_owner(instance.tags, policy, rules),
    )


def _tagged_owner(tags: Mapping[str, str], policy: Policy, rules: Iterable[RequiredTag]) -> str:
    """Return who tags say is the owner, if need be under an alias or a key that is near; "" for nobody."""
    key = policy.owner_key
    for each in next((rule.keys for rule in rules if rule.key == key), (key,)):
        if not is_empty(owner := tags.get(each, ""), policy.placeholder_values):
            return stripped(owner)
    owner = tags[near] if (near := near_miss(tags.keys() - {key}, key)) else ""
    return "" if is_empty(owner, policy.placeholder_values) else stripped(owner)


def aliases_used(
    tags: Mapping[str, str], rules: Iterable[RequiredTag], placeholders: Container[str]
) -> Iterator[tuple[str, str]]:
    """Yield the keys of rules that tags meet by an alias only, each with that alias."""
    for rule in rules:
        alias = key_that_meets(tags, rule, placeholders)
        if alias not in (None, rule.key):
            yield rule.key, alias


def counted_tag(
    tags: Mapping[str, str], rule: RequiredTag, placeholders: Container[str]
) -> tuple[str, str | None]:
    """Return the tag that counts for a rule: the first of its keys that has a value, else any of them."""
    present = [key for key in rule.keys if key in tags]
    for key in present:
        if not is_empty(tags[key], placeholders):
            return key, tags[key]
    key = present[0] if present else rule.key
    return key, tags.get(key)


def key_that_meets(tags: Mapping[str, str], rule: RequiredTag, placeholders: Container[str]) -> str | None:
    """Return the key by whose value tags meet a rule; None if they have none that the rule allows."""
    key, value = counted_tag(tags, rule, placeholders)
    return key if value and not is_empty(value, placeholders) and rule.allows(value) else None


def value_reader(rules: Iterable[RequiredTag], placeholders: Container[str]) -> Callable[[Sighting], Values]:
    """Return a function from a sighting to the values that meet these rules, to suggest values from."""
    readers = [(rule.key, None if rule.is_plain else rule) for rule in rules]

    def read(seen: Sighting) -> Values:
        tags = seen.instance.tags
        failing = {violation.tag_key for violation in seen.violations}
        failing.update(rule.key for rule in seen.upcoming)
        failing.update(case.violation.tag_key for case in (*seen.exempted, *seen.exempted_later))
        found = (
            None if key in failing else key_that_meets(tags, rule, placeholders) if rule else key
            for key, rule in readers
        )
        return tuple(None if key is None else tags[key] for key in found)

    return read


Values = tuple[str | None, ...]  # of the required tags, None where they fail their rule


def check_tag(tags: Mapping[str, str], rule: RequiredTag, placeholders: frozenset[str]) -> Violation | None:
    """Return how the tags fail one rule, None where they comply; both are case-sensitive, as in AWS."""
    key, value = rule.key, tags.get(rule.key)
    text = stripped(value or "")
    empty = not text or text.casefold() in placeholders  # as is_empty(); asked of every tag
    if empty and rule.aliases:
        key, value = counted_tag(tags, rule, placeholders)
        empty = is_empty(value or "", placeholders)
    alias = None if key is rule.key else key
    if value is not None and not empty:
        verdict = rule.judge(value)
        if verdict is Verdict.ALLOWED:
            return None
        message = _value_message(rule, alias, value, verdict)
        return Violation(rule.key, ViolationType.NONCOMPLIANT_VALUE, value, alias, message)
    if value is not None:
        if rule.allow_empty:
            return None
        what = "empty" if is_blank(value) else f"{value!r}, a placeholder"
        return Violation(rule.key, ViolationType.EMPTY, value, alias, f"{_named(rule, alias)} is {what}")
    # An AWS tag policy takes keys that differ only in case for the same tag, which is then spelled wrong.
    message, found = f"{rule.key} is missing", near_miss(tags, rule.key, any_spaces=not rule.optional)
    if found is not None:
        value, message = tags[found], f"{message}; the instance has {found!r}: rename that key"
    elif rule.optional:
        return None
    return Violation(rule.key, ViolationType.MISSING, value, found, message)


def _named(rule: RequiredTag, alias: str | None) -> str:
    """Return the key of a rule, and the alias whose value counts."""
    return f"{rule.key} (here {alias})" if alias else rule.key


@functools.lru_cache(maxsize=4096)
def _value_message(rule: RequiredTag, alias: str | None, value: str, verdict: Verdict) -> str:
    """Return what the value should have been and which allowed one is nearest, or why it was not checked."""
    named = _named(rule, alias)
    unchecked = {
        Verdict.STOPPED: f"its pattern gave no answer on this value within {PATTERN_SECONDS:g} s",
        Verdict.NOT_CHECKED: "not checked, as its pattern took too long on other values",
    }
    if verdict in unchecked:
        return f"{named} is {value!r}: {unchecked[verdict]}; it counts as not matching"
    return f"{named} is {value!r}, not {rule.wanted}{did_you_mean(value, rule.values)}"


def near_miss(tags: Iterable[str], wanted: str, *, any_spaces: bool = True) -> str | None:
    """Return the key that differs from the wanted one only in case or, if allowed, in spaces, `_` or `-`."""
    bare, folded = bare_key(wanted), wanted.casefold()
    near = (key for key in tags if bare_key(key) == bare)
    return min((key for key in near if any_spaces or key.casefold() == folded), default=None)


@functools.lru_cache(maxsize=4096)
def bare_key(key: str) -> str:
    """Return a key without case, spaces, `_` and `-`."""
    return re.sub(r"[\s_-]", "", key).casefold()


def is_too_young(instance: Instance, grace_period: timedelta, now: datetime) -> bool:
    """Return whether an instance is still within its grace period: tags often come after the launch."""
    # A launch further in the future is a mistake in the answer, and the instance would never be judged.
    return -timedelta(days=1) < now - instance.launch_time < grace_period


def resolution(
    violations: Sequence[Violation],
    tags: Mapping[str, str] | None,
    exempted: Container[str] = (),
    before: Mapping[str, str] | None = None,
    rules: Mapping[str, RequiredTag] | None = None,
) -> Resolution:
    """Return why a finding is closed: by its tags now (None: it is gone) and the keys that are exempted.

    `before` are the tags that it had when it was last found, and `rules` those of the policy now, by key.
    """
    if tags is None:
        return Resolution.GONE
    if any(violation.tag_key in exempted for violation in violations):
        return Resolution.EXEMPTED
    for violation in violations:
        # Where all that decides is still as it was, it is the policy that changed.
        rule = (rules or {}).get(violation.tag_key)
        if rule and not rule.is_plain:
            when = [key for key, _ in rule.when.tags] if rule.when else []
            keys = [*rule.keys, *when, violation.found_key or rule.key]
            same = all(tags.get(key) == (before or {}).get(key) for key in keys)
        else:
            value = tags.get(violation.tag_key, "")
            unchanged = violation.type is not ViolationType.MISSING and value == violation.value
            same = unchanged or is_blank(value)
        if same:
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
    """A way in which instances belong together."""

    word: str
    remedy: str = ""  # how to have the group tag its instances, if it can
    risk: str = "the tag is lost when an instance is replaced"  # where it is set on an instance only


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
        "ECS capacity provider", "set it on {names} for new instances (propagateTags: CAPACITY_PROVIDER)"
    ),
    "autoscaling_group": GroupKind(
        "Auto Scaling group", "set it on {names} for new instances (PropagateAtLaunch)"
    ),
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


Groups = tuple[Group, ...]


def groups_of(instance: Instance) -> Groups:
    """Return the groups of an instance within its target, the most specific first, with printable names."""
    others = (
        ("operator", instance.managed_by),
        ("instance_profile", instance.profile.rpartition("/")[2]),  # of its ARN
        ("name_prefix", instance.tags.get("Name", "").rstrip("0123456789").rstrip("-_. ")),
        ("subnet", instance.subnet_id),
        ("vpc", instance.vpc_id),
    )
    return (*tag_groups(instance.tags), *(_group(kind, name) for kind, name in others if name))


def tag_groups(tags: Mapping[str, str]) -> list[Group]:
    """Return the groups that an instance's tags name, the most specific first."""
    groups: list[Group] = []
    for kind, key, cluster_keys in _GROUP_TAGS:
        if name := tags.get(key):
            cluster = next(filter(None, map(tags.get, cluster_keys)), None)
            groups.append(_group(kind, f"{cluster}/{name}" if cluster else name))
    return groups


@functools.lru_cache(10_000)
def _group(kind: str, name: str) -> Group:
    """Return a group; its members, which are many, share it."""
    return Group(kind, printable(name))


def cause_of(groups: Iterable[Group]) -> Group | None:
    """Return the first group that can tag all its instances, if there is one."""
    return next((group for group in groups if GROUP_KINDS[group.kind].remedy), None)


class Agreement(NamedTuple):
    """The most common valid value of a tag in a group."""

    value: str
    agreeing: int  # how many have it; 0 if hardly any member has a valid one
    members: int  # how many have a valid one; all where `agreeing` is 0


MIN_MEMBERS = 3  # fewer say nothing about a group
MAX_VALUES = 1000  # of a tag in one group; with more of them nobody agrees
Siblings = Iterable[tuple[Group, Mapping[str, Agreement]]]  # of an instance, by the groups that it is in


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
    siblings: Siblings,
    reliability: Reliability,
    *,
    normalize_aliases: bool = False,
) -> Suggestion | None:
    """Return the likely value of a tag: from the instance's own tags, or else from those of its siblings.

    If confident siblings agree with the instance, the confidence is higher; if they contradict it, it is low.
    The value of an alias is only taken where the policy says so.
    """
    is_own = normalize_aliases or violation.found_key not in rule.aliases
    own = _own_value(violation, rule, placeholders) if is_own else None
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


def _sibling_value(tag_key: str, siblings: Siblings, reliability: Reliability) -> Suggestion | None:
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
    """A group whose instances lack the same tags, so that it is one thing to fix."""

    target: Target
    group: Group
    tags: Mapping[str, int]  # how many of its instances lack each, and how many lack any of them
    instances: int

    def __str__(self) -> str:
        return next(cause_lines([self]))


GROUPS_NAMED, TAGS_NAMED = 3, 5  # in a sentence, so that what to do stands near its beginning


def cause_lines(causes: Iterable[Cause]) -> Iterator[str]:
    """Yield a sentence for each kind of group and its tags: what is missing, and where to set it for all."""
    alike: dict[tuple[str, frozenset[str]], list[Cause]] = {}
    for cause in causes:
        alike.setdefault((cause.group.kind, frozenset(cause.tags)), []).append(cause)
    numbers = {key: sum(cause.instances for cause in group) for key, group in alike.items()}
    for (kind, keys), instances in sorted(numbers.items(), key=lambda item: -item[1]):
        group, lacking = alike[kind, keys], Counter[str]()
        for cause in group:
            lacking.update(cause.tags)
        tags = [f"{key} ({n:,})" if n < instances else key for key, n in lacking.most_common()]
        targets = Counter(cause.group.name for cause in group)  # it is a group of its own in each
        names = [f"{name} (in {n:,} targets)" if n > 1 else name for name, n in targets.items()]
        lack = "instance lacks" if instances == 1 else "instances lack"
        remedy = GROUP_KINDS[kind].remedy.format(names=first_named(names, GROUPS_NAMED))
        remedy = remedy if len(keys) == 1 else remedy.replace("set it", "set them", 1)
        groups, lacked = counted(len(group), GROUP_KINDS[kind].word), first_named(tags, TAGS_NAMED)
        yield f"{groups}: {instances:,} {lack} {lacked}; {remedy}"


########################################################################################################
# 5 AWS: Aws, call_aws, read_pages, describe_instances, describe_creators, load_fleet, load_prices
########################################################################################################

T = TypeVar("T")
PAGE_SIZE = 1000  # EC2's largest page; a page size also draws from the larger request bucket
MAX_PAGES = 10_000
MAX_EMPTY_PAGES = 100  # in a row; pages without instances are normal, but not without end
SDK_ATTEMPTS = 5
# botocore 1.44 retries a broken network for a few seconds only, and an answer that was cut short never.
NETWORK_PAUSES = (3.0,)
CALL_SECONDS = 400.0  # for one call: five time-outs of a minute, and the SDK's pauses between them
# The actions that a role is assumed for, in its session policy and in `iam-policy`.
READ_ACTIONS = ("ec2:DescribeInstances", "ec2:DescribeRegions")
WRITE_ACTIONS = ("ec2:DescribeInstances", "ec2:CreateTags", "ec2:DeleteTags")
CREATOR_ACTIONS = ("cloudtrail:LookupEvents",)

NO_CONNECTION = frozenset(
    "EndpointConnectionError ConnectTimeoutError ConnectionClosedError ProxyConnectionError ReadTimeoutError "
    "CallTimeout".split()
)
_CUT_SHORT = "IncompleteReadError ResponseStreamingError FlexibleChecksumError ResponseParserError".split()
# Advice by service and code, by code, or by service.
_CALL_ADVICE = ADVICE | {
    "sts AccessDenied": "the role does not exist, or does not trust the caller (tagcheck.py iam-policy)",
    "s3 AccessDenied": "allow s3:GetObject, s3:PutObject and s3:ListBucket (tagcheck.py iam-policy)",
    "s3 NoSuchBucket": "create the bucket, or correct its name",
    "s3 PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION to it",
    "s3": "check --state",
}


class CallError(TargetError):
    """A call to AWS that failed: the code, advice, what AWS said, the HTTP status, or 0, of a refusal."""

    def __init__(
        self, code: str, said: str, operation: str, *, status: int = 0, transient: bool = False
    ) -> None:
        service = operation.partition(":")[0]
        advice = next(filter(None, map(_CALL_ADVICE.get, (f"{service} {code}", code, service))), "")
        if "service control policy" in said:
            advice = "a service control policy of the organization denies {operation} here"
        # EC2 adds kilobytes of an encoded message, which only an administrator can decode.
        said = printable(said.partition(" Encoded authorization failure message")[0][:300])
        sentences = [advice.format(operation=operation), f"{operation}: {said}" if said else ""]
        super().__init__(code, " — ".join(filter(None, sentences)) or f"{operation} failed")
        self.status, self.transient = status, transient


def call_error(error: Exception, operation: str) -> TagcheckError:
    """Return the error to report for an exception of a call to AWS; raises any other again."""
    import botocore.exceptions as exceptions

    name = type(error).__name__
    code, said, status, transient = "ForeignAnswer", f"{name}: {error}", 0, False
    match error:
        case exceptions.ClientError():
            answer = error.response.get("Error", {})
            given, message = answer.get("Code"), answer.get("Message")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if isinstance(given, str) and re.fullmatch(r"[A-Za-z0-9._-]{1,100}", given):
                code = given
            said = message if isinstance(message, str) else ""
        # The text of a ResponseParserError repeats the answer, perhaps with credentials.
        case _ if name in _CUT_SHORT:
            code, said, transient = "IncompleteAnswer", name, True
        case exceptions.ConnectionError() | exceptions.HTTPClientError():
            # Other texts may repeat a header, and with it the session token: only the kind may be printed.
            cause = type(error.kwargs.get("error"))
            code, said, transient = "HTTPClientError", f"{name}, {cause.__name__}", True
            if name in NO_CONNECTION or name == "SSLError":
                code, said = name, public_text(error)
            elif cause in (ValueError, UnicodeEncodeError):  # of http.client, before anything is sent
                code, transient = "InvalidHeader", False
        case exceptions.BotoCoreError():
            return CredentialsError(
                f"the AWS credentials cannot be used: {public_text(error)}; set AWS_PROFILE or --profile, "
                "run `aws sso login`, or give the machine a role"
            )
        case TimeoutError():
            code, said = "CallTimeout", "the answer did not end in time"
        # The others are Python's own, which botocore's parsers raise for malformed answers.
        case ValueError() | RecursionError():
            code, transient = "IncompleteAnswer", True
        case RuntimeError():  # of credentials that were renewed, and have already expired
            code = "ExpiredToken"
        case LookupError() | TypeError() | AttributeError() | ArithmeticError():
            pass
        case _:
            raise error
    return CallError(code, said, operation, status=status, transient=transient)


def is_gone(error: TargetError) -> bool:
    """Return whether EC2 no longer has an instance."""
    return error.code.startswith("InvalidInstanceID")


def public_text(error: Exception) -> str:
    """Return an exception's text without the user and password of a URL, and without a program's output."""
    import botocore.exceptions

    if isinstance(error, botocore.exceptions.CredentialRetrievalError):
        return f"{error.kwargs.get('provider')} did not return any: run it by hand to see why"
    return re.sub(r"//[^/\s]*@", "//", str(error))


# Where the threads that have no call to make wait for one: to start a thread took a quarter of a call's time.
IDLE_THREADS: list[queue.SimpleQueue[Callable[[], None]]] = []


def within(seconds: float, function: Callable[[], T]) -> T:
    """Return what a function returns, and raise what it raises; raises TimeoutError when it takes longer."""
    # A socket's time-out starts again with each byte, so it does not end an answer that trickles. The
    # function runs in a daemon thread and is abandoned then: Python cannot stop it, and it must not keep a
    # run alive.
    if seconds <= 0:
        raise TimeoutError
    future: Future[T] = Future()
    try:
        calls = IDLE_THREADS.pop()
    except IndexError:
        calls = _start_thread()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    calls.put(functools.partial(contextvars.copy_context().run, run))
    return future.result(seconds)


def _start_thread() -> queue.SimpleQueue[Callable[[], None]]:
    """Start a thread that makes calls, and return the queue that it takes them from."""
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def make_calls() -> None:
        while True:
            calls.get()()
            IDLE_THREADS.append(calls)

    try:
        threading.Thread(target=make_calls, daemon=True).start()
    except RuntimeError as error:
        message = "cannot start a thread: use fewer --workers, or allow more processes (ulimit -u)"
        raise TagcheckError(message) from error
    return calls


def policy_document(statements: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return an IAM policy document."""
    return {"Version": "2012-10-17", "Statement": list(statements)}


def allow_statement(actions: Sequence[str], resource: str | list[str], **more: Any) -> dict[str, Any]:
    """Return a statement that allows actions."""
    return {"Effect": "Allow", "Action": list(actions), "Resource": resource, **more}


_EC2_OPERATIONS = {action.removeprefix("ec2:") for action in (*READ_ACTIONS, *WRITE_ACTIONS)}


# EC2 has 800 operations. botocore makes a method of each in every region's client, and reads a model with
# ordered dicts: that took twice as long, 15 MB more, and 1 MB more for each region.
def load_model(path: str) -> Any:
    """Return the model at a path, which has no ending: of EC2 only what is called; None if there is none."""
    for ending, open_file in ((".json", open), (".json.gz", gzip.open)):
        if os.path.isfile(path + ending):
            with open_file(path + ending, "rb") as file:
                model = json.load(file)
            is_ec2 = model.get("metadata", {}).get("serviceId") == "EC2"
            return _model_of(model, _EC2_OPERATIONS) if is_ec2 else model
    return None


def _model_of(model: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return what a service's model has of some operations: these, and the shapes that they refer to."""
    operations, shapes = {name: model["operations"][name] for name in names}, dict[str, Any]()
    waiting: list[Any] = [operations]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            name = part.get("shape")
            if isinstance(name, str) and name not in shapes:
                shapes[name] = model["shapes"][name]
                waiting.append(shapes[name])
    return {**model, "operations": operations, "shapes": shapes}


# The account that this thread's requests are signed for, and its credentials (None: the caller's own).
_ENTERED: contextvars.ContextVar[tuple[str, Any]] = contextvars.ContextVar("entered", default=("", None))


# A client costs 10 ms and a session 20 MB: too much for each of 500 accounts. So the clients are the
# caller's, and a request is signed for the account that its thread has entered.
class Aws:
    """AWS as one scan calls it: a client for each service and region, shared by all accounts and threads."""

    def __init__(
        self, profile: str | None, workers: int, actions: Sequence[str] = READ_ACTIONS, interval: float = 0
    ) -> None:
        check_packages("boto3", "botocore")
        import boto3
        import botocore.config
        import botocore.exceptions
        import botocore.session

        core = botocore.session.Session(profile=profile)
        try:
            core.get_component("data_loader").file_loader.load_file = load_model
            self.session = boto3.Session(botocore_session=core)
        except botocore.exceptions.BotoCoreError as error:
            raise CredentialsError(f"{error}; see `aws configure list-profiles`") from error
        # Everything is set here: botocore's own defaults differ by version.
        self._config = botocore.config.Config(
            retries={"mode": "standard", "total_max_attempts": SDK_ATTEMPTS},
            connect_timeout=5,
            read_timeout=60,  # EC2 itself takes up to 3 seconds for a page of 1,000
            max_pool_connections=workers,
            user_agent_extra=f"tagcheck/{__version__}",
        )
        self._actions = actions
        self._interval = interval  # seconds between two calls in an account and region
        self._called_at: dict[tuple[str, str], float] = {}
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()  # threads may share clients, but not sessions
        self._credentials: dict[str, Any] = {}  # by account

    def client(self, service: str, region: str) -> Any:
        """Return the client of a service in a region; raises CredentialsError where none can be made."""
        import botocore.exceptions

        with self._lock:
            if (service, region) in self._clients:
                return self._clients[service, region]
            try:
                client = self.session.client(service, region_name=region, config=self._config)
            except (botocore.exceptions.BotoCoreError, ValueError) as error:
                message = f"cannot call AWS: {public_text(error)}; check the AWS configuration"
                raise CredentialsError(message) from error
            if service in ("ec2", "cloudtrail"):
                client.meta.events.register(f"before-sign.{service}", self._sign)
            if service == "ec2":
                # botocore leaves an answer unread by this name: 5.5 MB less for each page and thread, twice.
                client.meta.service_model.operation_model("DescribeInstances").has_streaming_output = True
                client.meta.events.register("before-parse.ec2", _read_answer)
            self._clients[service, region] = client
            return client

    def _sign(self, request: Any, signing_name: str = "", region_name: str = "", **_: object) -> None:
        """Have botocore sign each request and retry for the entered account, once its interval has passed."""
        account_id, credentials = _ENTERED.get()
        if interval := LOOKUP_PAUSE if signing_name == "cloudtrail" else self._interval:
            place = account_id, region_name
            due = self._called_at.get(place, -math.inf) + interval
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
        """Read the caller's own account with the caller's own credentials."""
        self._credentials[account_id] = None

    def assume_role(self, account_id: str, accounts: Accounts, home: str, partition: str) -> None:
        """Get credentials of an account, which are renewed before they expire; raises TargetError."""
        import botocore.credentials

        sts = self.client("sts", home)
        # An hour: botocore would renew shorter ones with each call, and AWS refuses longer ones to callers
        # that have a role themselves.
        arguments = {
            "RoleArn": f"arn:{partition}:iam::{account_id}:role/{accounts.role_name}",
            "RoleSessionName": "tagcheck",
            "DurationSeconds": 3600,
            "Policy": to_json(policy_document([allow_statement(self._actions, "*")])),
        }
        if accounts.external_id:
            arguments["ExternalId"] = accounts.external_id

        def renew() -> dict[str, str]:
            return _role_credentials(call_aws(sts, "AssumeRole", **arguments), account_id)

        refreshable = botocore.credentials.RefreshableCredentials
        self._credentials[account_id] = refreshable.create_from_metadata(renew(), renew, "assume-role")


def _role_credentials(answer: Mapping[str, Any], account_id: str) -> dict[str, str]:
    """Return the credentials in an answer of AssumeRole, as botocore wants them; raises TargetError."""
    names = {"AccessKeyId": "access_key", "SecretAccessKey": "secret_key", "SessionToken": "token"}
    given, user = answer.get("Credentials", {}), answer.get("AssumedRoleUser")
    missing = [name for name in (*names, "Expiration") if not given.get(name)]
    expires = given.get("Expiration")
    if missing:
        problem = f"no {missing[0]}"
    elif not expires.tzinfo or not 1970 < expires.year < 9999:
        problem = f"credentials until {expires}"
    elif user is not None and user.get("Arn", "").split(":")[4:5] != [account_id]:
        problem = f"credentials of {user.get('Arn') or 'nobody'}, not of the account {account_id}"
    else:
        return {ours: given[name] for name, ours in names.items()} | {"expiry_time": expires.isoformat()}
    raise CallError("ForeignAnswer", problem, "sts:AssumeRole")


def call_aws(client: Any, operation: str, deadline: float = math.inf, /, **arguments: Any) -> Any:
    """Call an operation by its API name (`DescribeInstances`); raises TargetError or CredentialsError."""
    import botocore

    method = getattr(client, botocore.xform_name(operation))
    name = f"{client.meta.service_model.service_name}:{operation}"
    # The SDK retries what AWS asks to be retried; broken networks and cut answers are retried here. A call
    # ends with CallTimeout at a deadline of the monotonic clock.
    for pause in (*NETWORK_PAUSES, math.inf):
        try:
            return within(min(CALL_SECONDS, deadline - time.monotonic()), lambda: method(**arguments))
        except Exception as cause:
            error = call_error(cause, name)
            is_last = time.monotonic() + pause >= deadline
            if is_last or not isinstance(error, CallError) or not error.transient:
                raise error from cause
            LOG.debug("%s: %s; trying again in %.0f s", name, error.code, pause)
            time.sleep(pause)


def read_pages(
    client: Any, operation: str, key: str, deadline: float = math.inf, /, **arguments: Any
) -> Iterator[Any]:
    """Yield the list that each page has under a key, following NextToken; raises as call_aws."""
    name = f"{client.meta.service_model.service_name}:{operation}"
    tokens: set[str] = set()
    empty_pages = 0  # a page may be empty and yet not the last (Organizations API reference, ListAccounts)
    for _ in range(MAX_PAGES):
        page = call_aws(client, operation, deadline, **arguments)
        token = page.get("NextToken", "")
        if key not in page or not isinstance(token, str):  # as in a captive portal's "200 OK"
            problem = f"the NextToken {token!r}" if key in page else f"no {key}"
            raise CallError("ForeignAnswer", problem, name)
        yield page[key]
        empty_pages = 0 if page[key] else empty_pages + 1
        if not token:
            return
        if token in tokens or empty_pages > MAX_EMPTY_PAGES:
            break
        tokens.add(token)
        arguments["NextToken"] = token
    raise TargetError("EndlessPages", f"{name} keeps announcing a next page: run again, and report it to AWS")


def home_region(regions: Iterable[str]) -> str:
    """Return the region for what belongs to no region: one that every account of the partition has."""
    # STS in a region that is not enabled refuses every caller (IAM user guide, STS in AWS regions).
    first = next(iter(regions), "")
    homes = {"cn-": "cn-north-1", "us-gov-": "us-gov-west-1", "eusc-": "eusc-de-east-1"}
    homes |= {"us-iso": first, "eu-iso": first}
    return next((home for prefix, home in homes.items() if first.startswith(prefix)), "us-east-1")


def describe_caller(sts: Any) -> tuple[str, str, str]:
    """Return account, partition and ARN of the credentials; raises CredentialsError."""
    try:
        answer = call_aws(sts, "GetCallerIdentity")
    except TargetError as error:
        raise CredentialsError(f"cannot tell whose credentials these are: {error}") from error
    account_id, arn = str(answer.get("Account")), str(answer.get("Arn"))
    partition = re.match("arn:(aws[a-z-]*):", arn)
    if not partition or not re.fullmatch(ACCOUNT_ID, account_id):
        raise CredentialsError("the answer is not AWS's: check the network and the proxy")
    return account_id, partition[1], arn


# The states in which an account has no instances to scan (Organizations API reference, Account).
INACTIVE = frozenset(("PENDING_ACTIVATION", "SUSPENDED", "PENDING_CLOSURE", "CLOSED"))


def describe_accounts(organizations: Any) -> dict[str, Account]:
    """Return every account of the organization by its id; raises CredentialsError."""
    accounts: dict[str, Account] = {}
    try:
        pages = read_pages(organizations, "ListAccounts", "Accounts")
        for entry in itertools.chain.from_iterable(pages):
            account_id = _account_id(json_at(entry, str, "Id"))
            # `State` replaced `Status` in September 2026.
            state = json_at(entry, str, "State" if entry.get("State") else "Status")
            name = printable(stripped(json_at(entry, str, "Name"))) if entry.get("Name") else ""
            # Each path may end with the account itself (Organizations API reference, Account).
            place = rf"{ACCOUNT_PATH}/(?=([0-9]{{12}}/)?\Z)"
            paths = (_matching(place, path, "a path") for path in entry.get("Paths") or ())
            account = Account(cut_text(name, MAX_ACCOUNT_NAME), " ".join(paths), state)
            if (known := accounts.setdefault(account_id, account)).state != state:
                raise ValueError(f"{account_id} is {known.state!r} and {state!r}")
        if not accounts:
            raise KeyError("account")
    except (TargetError, KeyError, TypeError, ValueError) as error:
        takes = "this takes the management account, or a delegated administrator"
        message = f"cannot list the accounts of the organization: {json_error(error)} ({takes})"
        raise CredentialsError(message) from error
    return accounts


def describe_regions(client: Any) -> list[str]:
    """Return the regions that are enabled in the account; raises TargetError."""
    pages = read_pages(client, "DescribeRegions", "Regions", AllRegions=True)
    try:
        regions = [(region["RegionName"], region["OptInStatus"]) for page in pages for region in page]
    except KeyError as error:
        raise CallError("ForeignAnswer", f"no {error}", "ec2:DescribeRegions") from error
    enabled = sorted(name for name, status in regions if status != "not-opted-in")
    wrong = [name for name in enabled if not re.fullmatch(REGION_NAME, name)]  # they become host names
    if wrong or not enabled:
        problem = f"a region {wrong[0]!r}" if wrong else "no regions"
        raise CallError("ForeignAnswer", problem, "ec2:DescribeRegions")
    return enabled


def describe_instances(client: Any, **scope: Any) -> Iterator[list[Instance]]:
    """Yield every instance of the client's account and region, or those in scope; raises TargetError."""
    # An account can hide the instances that AWS services operate from answers that do not ask for them,
    # though it pays for them (EC2 API reference, DescribeInstances and ModifyManagedResourceVisibility).
    scope["IncludeManagedResources"] = True
    if "InstanceIds" not in scope:
        scope["MaxResults"] = PAGE_SIZE
    asked = frozenset(scope.get("InstanceIds", ()))
    for page in read_pages(client, "DescribeInstances", PARSED, **scope):
        others = [instance.instance_id for instance in page if asked and instance.instance_id not in asked]
        if others:
            raise CallError("ForeignAnswer", f"{others[0]}, which was not asked for", "ec2:DescribeInstances")
        yield page


READ_SIZE = 262_144  # bytes of an answer to read at once: smaller pieces cost more calls, larger ones memory
PARSED = "instances"
WRITTEN = "tagcheck.written"


def _read_answer(
    operation_model: Any, response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object
) -> None:
    """Read instances, and whether tags were written, at botocore's public event `before-parse`."""
    # botocore spends a millisecond on each instance, nearly all of it on members that nobody reads, and never
    # reads the other. It still reads answers that are errors.
    import botocore.parsers

    operation, body = operation_model.name, response_dict["body"]
    if response_dict["status_code"] >= 300:
        return
    try:
        if operation == "DescribeInstances":
            account_id, _credentials = _ENTERED.get()
            instances, token = parse_instances(iter(lambda: body.read(READ_SIZE), b""), account_id)
            response_dict["body"] = b"<DescribeInstancesResponse/>"
            customized_response_dict.update({PARSED: instances, "NextToken": token})
        elif operation in ("CreateTags", "DeleteTags"):
            root = _AnswerParser(operation, _WRITTEN_ROOT).read([body])
            if "requestId" in root and root.get("return", "true") == "true":
                customized_response_dict[WRITTEN] = True
    except expat.ExpatError as error:
        raise botocore.parsers.ResponseParserError(f"not XML: {error}") from error


# ---- Reading instances: the parser, then the patterns for plain pages --------------------------------


class _Element(NamedTuple):
    """An element of an answer, which holds text, members that are read, or these and what AWS may add."""

    content: Literal["text", "closed", "open"]
    members: Mapping[str, _Element] = {}


# What is read of answers of DescribeInstances, and of CreateTags and DeleteTags.
_LEAF = _Element("text")
_TAG = _Element("closed", {"key": _LEAF, "value": _LEAF})
_TEXTS = ("instanceId", "launchTime", "instanceType", "subnetId", "vpcId")
_PART_TEXTS = ("instanceState.name", "iamInstanceProfile.arn", "operator.managed", "operator.principal")
_TEXT_PATHS = (*_PART_TEXTS, *_TEXTS)
_PARTS = {
    "instanceState": _Element("open", {"name": _LEAF}),
    "iamInstanceProfile": _Element("open", {"arn": _LEAF}),
    "operator": _Element("open", {"managed": _LEAF, "principal": _LEAF}),
    "tagSet": _Element("closed", {"item": _TAG}),
}
_INSTANCE = _Element("open", dict.fromkeys(_TEXTS, _LEAF) | _PARTS)
_OWNER_ID = {"ownerId": _LEAF}
_RESERVATION = _Element("open", _OWNER_ID | {"instancesSet": _Element("closed", {"item": _INSTANCE})})
_LIST = _Element("closed", {"item": _RESERVATION})
_ROOT = _Element("closed", {"requestId": _LEAF, "nextToken": _LEAF, "reservationSet": _LIST})
_WRITTEN_ROOT = _Element("open", {"requestId": _LEAF, "return": _LEAF})
# No other member of EC2's answer has such a name: elsewhere it is a list that would not be read.
_ONLY_IN_PLACE = frozenset(("nextToken", "reservationSet", "instancesSet", "tagSet", "key"))
MAX_DEPTH = 100  # of elements that are not read; EC2's have up to 6


class _AnswerParser:
    """Reads an answer of EC2; raises TargetError where it cannot be EC2's whole answer."""

    def __init__(self, operation: str, root: _Element, account_id: str = "") -> None:
        self.operation, self.account_id = operation, account_id
        self.instances: dict[str, Instance] = {}
        # The open element, and what was read of it, by name; for a list of tags these are the tags.
        self.element, self.found = _Element("closed", {f"{operation}Response": root}), dict[str, Any]()
        self.outer: list[tuple[str, _Element, dict[str, Any]]] = []
        self.unread = 0  # how many elements are open that are not read
        self.texts: list[str] = []
        self.on_text = {"text": self.texts.append, "closed": self.no_text, "open": None}
        # As botocore reads: UTF-8 whatever is declared, and names without their namespaces.
        self.expat = expat.ParserCreate("UTF-8", "}")
        self.expat.buffer_text = True
        self.expat.StartDoctypeDeclHandler = lambda *_: self.refuse("a DOCTYPE, as HTML has")
        self.expat.StartElementHandler, self.expat.EndElementHandler = self.start, self.end

    def refuse(self, what: str) -> NoReturn:
        """Raise the TargetError of an answer that cannot be EC2's."""
        path = "/".join(name for name, *_ in self.outer) or "the answer"
        raise CallError("ForeignAnswer", f"{what} (in {path})", f"ec2:{self.operation}")

    def read(self, body: Iterable[bytes | bytearray]) -> dict[str, Any]:
        """Return what is read of the answer's root; takes the answer in pieces, raises ExpatError."""
        for piece in body:
            self.expat.Parse(piece, False)
        self.expat.Parse(b"", True)
        root: dict[str, Any]
        [root] = self.found.values()
        return root

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        """Open an element, or count it where it is not read."""
        if "\n" not in name:  # botocore leaves a namespace with a line break, so that the name is unknown
            name = name.rpartition("}")[2]
        if self.unread:
            self.unread += 1
            if name in _ONLY_IN_PLACE:
                self.refuse(f"<{name}> out of place")
            if self.unread > MAX_DEPTH:
                self.refuse("elements nested too deeply")
            return
        element = self.element.members.get(name)
        if element is None:
            if self.element.content != "open" or name in _ONLY_IN_PLACE:
                self.refuse(f"an unknown <{name}>")
            self.unread = 1
            return
        if attributes:
            self.refuse(f"an attribute in <{name}>")
        self.outer.append((name, self.element, self.found))
        self.element, self.found = element, {}
        self.texts.clear()
        self.expat.CharacterDataHandler = self.on_text[element.content]

    def no_text(self, text: str) -> None:
        """Refuse a text where there should be elements alone."""
        if not text.isspace():
            self.refuse(f"the text {text[:50]!r}")

    def end(self, _: str) -> None:
        """Close an element, and keep what it held."""
        if self.unread:
            self.unread -= 1
            return
        element, found = self.element, self.found
        name, self.element, self.found = self.outer.pop()
        self.expat.CharacterDataHandler = self.on_text[self.element.content]
        if element is _TAG:
            self.add_tag(**found)
        elif element is _INSTANCE:
            self.add_instance(found)
        elif element is _RESERVATION:
            self.check_reservation(found)
        elif name in self.found:
            self.refuse(f"a second {name}")
        else:
            self.found[name] = "".join(self.texts) if element is _LEAF else found

    def add_tag(self, key: str = "", value: str | None = None) -> None:
        """Add a tag to the list of them."""
        if not key or key in self.found:
            self.refuse(f"the tag key {key!r} twice in an instance" if key else "a tag without a key")
        if value is None:
            self.refuse(f"the tag {key!r} without a value")
        self.found[sys.intern(key)] = value

    def add_instance(self, found: Mapping[str, Any]) -> None:
        """Add an instance; the same one may come twice, if it moved between pages."""
        parts = (path.rpartition(".") for path in _TEXT_PATHS)
        texts = [(found.get(part, {}) if part else found).get(name) for part, _, name in parts]
        try:
            instance = _instance_of_texts(texts, found.get("tagSet", {}))
        except (TypeError, ValueError) as error:
            self.refuse(f"an incomplete instance: {error}")
        if self.instances.setdefault(instance.instance_id, instance) != instance:
            self.refuse(f"the instance {instance.instance_id} twice, and not the same")

    def check_reservation(self, found: Mapping[str, Any]) -> None:
        """Refuse a reservation that is another account's, or lacks its instances."""
        if "instancesSet" not in found:
            self.refuse("a reservation without instancesSet")
        owner = found.get("ownerId", self.account_id)
        if self.account_id and owner != self.account_id:
            self.refuse(f"instances of the account {owner!r}")


# To botocore, 20260224 is a second of August 1970, not a day as Python reads it.
_LAUNCH_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)


def _instance_of_texts(texts: Sequence[str | None], tags: dict[str, str]) -> Instance:
    """Build an Instance from the texts at _TEXT_PATHS; raises TypeError or ValueError if it is not whole."""
    state, profile, managed, principal, instance_id, launch_time, *places = texts
    if managed not in (None, "true", "false"):
        raise ValueError(f"its managed is {managed!r}, not true or false")
    kind, subnet, vpc = (place or "" for place in places)
    service = (principal or "unknown") if managed == "true" else ""
    if not _LAUNCH_TIME.fullmatch(launch_time or ""):
        raise ValueError(f"{shown_value(launch_time)} is not a time as EC2 writes it")
    return _instance(instance_id, state, launch_time, tags, kind, profile or "", subnet, vpc, service)


# A page as EC2 writes it is read with patterns, in a quarter of the time: UTF-8, no attributes, no comments,
# no entities but XML's own. They come from the table above, so they accept the members in any order, and what
# they do not match is left to the parser. No two choices begin alike, so a hostile page is not tried again.
_TEXT, _SPACE = "[^<]*+", r"\s*+"
_HEAD = (
    r'(?:<\?xml version="1\.0" encoding="UTF-8"\?>\s*+)?'
    r'<DescribeInstancesResponse(?: xmlns="http://ec2\.[\w./-]*+")?>\s*+'
    r"(?:<requestId>[^<]*+</requestId>\s*+)?<reservationSet>\s*+"
)
_TAIL = r"</reservationSet>\s*+(?:<nextToken>([^<]*+)</nextToken>\s*+)?</DescribeInstancesResponse>\s*+"
_TAG_ITEM = r"<item>\s*+<key>([^<]++)</key>\s*+<value(?:/>|>([^<]*+)</value>)\s*+</item>\s*+"
MAX_PLAIN_BYTES = 32_000_000  # a longer answer is not held, but parsed in pieces
MAX_PLAIN_PART = 100_000  # bytes of an instance; `re` takes up to 270 times as much to match many elements
_UNREAD_DEPTH = 6  # of elements within an instance; deeper ones are left to the parser
_REFERENCES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&amp;": "&"}  # &amp; is replaced last
_OTHER_REFERENCE = f"&(?!{'|'.join(_REFERENCES).replace('&', '')})".encode()
_CONTROLS = bytes({*range(32)} - {*b"\t\n"})  # not allowed in XML, but for CR, which a parser makes LF


_COMPILING = threading.Lock()  # or each thread would compile the patterns, at the same time


@functools.cache
def _page_patterns() -> tuple[list[re.Pattern[bytes]], list[int], re.Pattern[str]]:
    """Return the patterns of a page's parts, an instance's groups of texts and tags, and a tag's pattern."""
    # They take 10 milliseconds to compile.
    reservation, _ = _members_pattern("<item>", _OWNER_ID, "<instancesSet>")
    instance, numbers = _members_pattern("<item>", _INSTANCE.members, "</item>")
    end, _ = _members_pattern("</instancesSet>", _OWNER_ID, "</item>")
    parts = [re.compile(part.encode()) for part in (_HEAD, reservation, instance, end, _TAIL)]
    return parts, [numbers[path] for path in (*_TEXT_PATHS, "tagSet")], re.compile(_TAG_ITEM)


def _members_pattern(start: str, known: Mapping[str, _Element], end: str) -> tuple[str, dict[str, int]]:
    """Return the pattern of an open element's members between two tags, and the groups of what is read."""
    numbers, groups = itertools.count(1), dict[str, int]()

    def members(known: Mapping[str, _Element], path: str = "") -> str:
        choices = []
        for name, member in known.items():
            number = groups[path + name] = next(numbers)
            if member is _LEAF:
                content = f">({_TEXT})</{name}>"
            elif member.content == "open":
                content = f">(){members(member.members, f'{path}{name}.')}</{name}>"
            else:
                tags = re.sub(r"\((?!\?)", "(?:", _TAG_ITEM)
                content = f"(/>|>{_SPACE}(?:{tags})*</{name}>)"
            choices.append(f"{name}(?({number})(?!)){content}")  # only if it was not there before
        choices.append(unread(0 if path else _UNREAD_DEPTH, known))
        return f"{_SPACE}(?>(?:<(?:{'|'.join(choices)}){_SPACE})*)"

    def unread(depth: int, known: Iterable[str] = ()) -> str:
        number, read = next(numbers), "|".join(sorted(_ONLY_IN_PLACE.union(known)))
        close = rf"</\{number}>"
        inner = f"|(?>(?:<{unread(depth - 1)}{_TEXT})+){close}" if depth else ""
        return rf"(?!(?:{read})[/>])([A-Za-z]\w*+)(?:/>|>{_TEXT}(?:{close}{inner}))"

    return f"{start}{members(known)}{end}{_SPACE}", groups


def _unescaped(text: str) -> str:
    """Return a text with its references replaced; html.unescape() takes up to five times as long."""
    if "&" in text:
        for reference, character in _REFERENCES.items():
            text = text.replace(reference, character)
    return text


def _plain_text(raw: bytes | None) -> str | None:
    return None if raw is None else _unescaped(raw.decode())


def _plain_tags(raw: bytes | None, tag: re.Pattern[str]) -> dict[str, str]:
    """Return the tags in a tagSet; raises ValueError for a key that comes twice."""
    text = raw.decode() if raw else ""
    pairs = tag.findall(text)
    if "&" in text:
        pairs = [(_unescaped(key), _unescaped(value)) for key, value in pairs]
    tags = {sys.intern(key): value for key, value in pairs}
    if len(tags) < len(pairs):
        raise ValueError("a key that comes twice")
    return tags


def _check_plain(page: bytes | bytearray) -> None:
    """Raise ValueError for a text that a parser might refuse or change; looks at pieces, to copy nothing."""
    # What is rare is looked for by one byte first, which is thirty times as fast.
    if (b"&" in page and re.search(_OTHER_REFERENCE, page)) or (b"]" in page and b"]]>" in page):
        raise ValueError("a reference, or ]]>")
    decoder = None if page.isascii() else codecs.getincrementaldecoder("utf-8")()
    if decoder and b"\xef\xbf" in page:
        raise ValueError("perhaps U+FFFE or U+FFFF")
    for start in range(0, len(page), CHUNK_SIZE):
        piece = page[start : start + CHUNK_SIZE]
        if len(piece.translate(None, _CONTROLS)) < len(piece):
            raise ValueError("a control character")
        if decoder:
            decoder.decode(piece)


def read_plain_page(page: bytes | bytearray, account_id: str) -> tuple[list[Instance], str]:
    """Return the instances of a page and its token; raises ValueError for all that the parser should see."""
    _check_plain(page)
    with _COMPILING:
        (head, reservation, instance_part, end, tail), groups, tag = _page_patterns()
    instances: dict[str, Instance] = {}
    position = 0  # up to which the page has been matched

    def take(pattern: re.Pattern[bytes]) -> re.Match[bytes] | None:
        nonlocal position
        if match := pattern.match(page, position, position + MAX_PLAIN_PART):
            position = match.end()
        return match

    def need(pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        if match := take(pattern):
            return match
        raise ValueError(f"not a plain page at {position}")

    need(head)
    while opened := take(reservation):
        while match := take(instance_part):
            *texts, tag_set = match.group(*groups)
            instance = _instance_of_texts([*map(_plain_text, texts)], _plain_tags(tag_set, tag))
            known = instances.setdefault(instance.instance_id, instance)
            if known is not instance and known != instance:
                raise ValueError("an instance twice, and not the same")
        owners = [_plain_text(raw) for raw in (opened[1], need(end)[1]) if raw is not None]
        if len(owners) > 1 or (account_id and owners not in ([], [account_id])):
            raise ValueError("another owner")
    token = need(tail)[1]
    if position < len(page):
        raise ValueError("something after the end")
    return list(instances.values()), _plain_text(token) or ""


def parse_instances(body: Iterable[bytes], account_id: str = "") -> tuple[list[Instance], str]:
    """Return the instances and the token of an answer in pieces; raises ExpatError or TargetError."""
    # A page of 1,000 is 5 to 8 MB and held once; a tree of it would take 60.
    pieces, page = iter(body), bytearray()
    for piece in pieces:
        page += piece
        if len(page) > MAX_PLAIN_BYTES:
            break
    else:
        try:
            return read_plain_page(page, account_id)
        except (TypeError, ValueError) as error:
            LOG.debug("A page of answers is read by the parser: %s", error)
    parser = _AnswerParser("DescribeInstances", _ROOT, account_id)
    root = parser.read(itertools.chain([page], pieces))
    if "reservationSet" not in root:
        parser.refuse("no reservationSet")
    return list(parser.instances.values()), root.get("nextToken", "")


# ---- What an instance must be; who created it; saved files -------------------------------------------


def _matching(pattern: str, text: str, what: str) -> str:
    """Return the part of a text that a pattern matches at its start; raises ValueError."""
    if match := re.match(pattern, text):
        return match[0]
    raise ValueError(f"{shown_value(text)} is not {what}")


def _account_id(text: str) -> str:
    """Return a text that is an account id; raises ValueError."""
    return _matching(rf"{ACCOUNT_ID}\Z", text, "an account id")


# EC2 has made ids longer before; what people write has the lengths of today (INSTANCE_ID).
_EC2_ID = re.compile("i-[0-9a-f]+")


def _instance(instance_id: Any, state: Any, launch_time: Any, tags: dict[str, str], *more: str) -> Instance:
    """Build an Instance from the texts of an answer; raises TypeError or ValueError if it is not whole."""
    if not (instance_id and isinstance(state, str) and state.strip()):
        raise ValueError("no instance id or no state")
    if not _EC2_ID.fullmatch(instance_id):
        raise ValueError(f"{shown_value(instance_id)} is not an instance id")
    launched = datetime.fromisoformat(launch_time)
    try:
        launched = launched.astimezone(UTC) if launched.tzinfo else launched.replace(tzinfo=UTC)
    except OverflowError as error:
        raise ValueError(f"not a possible time: {launch_time}") from error
    if launched.year < 1970:
        raise ValueError(f"launched before 1970: {launch_time}")
    return Instance(instance_id, state, launched, tags, *map(sys.intern, more))


CLOUDTRAIL_DAYS = 90  # for which CloudTrail keeps events
LAST_LAUNCH = datetime(9999, 1, 1, tzinfo=UTC)  # to look up: Python knows no later year
LOOKUP_PAUSE = 0.5  # CloudTrail takes two lookups a second in an account and region (its API reference)
MAX_EVENT_PAGES = 10
Launch = tuple[str, datetime]  # an instance's id, and when it was launched
Created = tuple[str, Creator]  # an instance's id, and who launched it


def describe_creators(client: Any, launches: Iterable[Launch], deadline: float) -> Iterator[list[Created]]:
    """Yield who created instances, until a time of the monotonic clock; raises TargetError."""
    # One RunInstances may create many of them, and answers for all.
    waiting = dict(launches)
    while waiting and time.monotonic() + LOOKUP_PAUSE < deadline:  # a lookup waits for its turn
        instance_id, launched = next(iter(waiting.items()))
        try:
            created = _look_up_creator(client, instance_id, min(launched, LAST_LAUNCH), deadline)
        except TargetError:
            if time.monotonic() < deadline:
                raise
            return
        yield [pair for pair in created if waiting.pop(pair[0], None)]
        if waiting.pop(instance_id, None):
            yield [(instance_id, Creator(None, "CloudTrail has no RunInstances event for it"))]


def _look_up_creator(client: Any, instance_id: str, launched: datetime, deadline: float) -> list[Created]:
    """Return what creators_of finds in the first page of events that has any creator; raises TargetError."""
    by_id = [{"AttributeKey": "ResourceName", "AttributeValue": instance_id}]
    around = {"StartTime": launched - timedelta(minutes=10), "EndTime": launched + timedelta(minutes=10)}
    # Starting a stopped instance changes its launch time: then all times are looked at.
    for window, limit in ((around, 1), ({}, MAX_EVENT_PAGES)):
        pages = read_pages(client, "LookupEvents", "Events", deadline, LookupAttributes=by_id, **window)
        for events in itertools.islice(pages, limit):
            if created := [pair for event in events for pair in creators_of(event)]:
                return created
    return []


def creators_of(event: Any) -> list[Created]:
    """Return each instance that a CloudTrail event created, and who created it; the event may be any JSON."""
    if text_at(event, "EventName") != "RunInstances":
        return []
    try:
        detail = json.loads(text_at(event, "CloudTrailEvent"))
    except (ValueError, RecursionError):
        who = Creator(None, "the event cannot be read")
    else:
        detail = detail if isinstance(detail, Mapping) else {}
        if detail.get("errorCode"):
            return []
        who = creator_name(detail.get("userIdentity"))
    resources = event.get("Resources")
    return [
        (text_at(item, "ResourceName"), who)
        for item in (resources if isinstance(resources, list) else ())
        if text_at(item, "ResourceType") == "AWS::EC2::Instance"
    ]


def creator_name(identity: Any) -> Creator:
    """Return who a userIdentity of CloudTrail is (its user guide, CloudTrail userIdentity element)."""
    arn = text_at(identity, "arn")
    role, session = text_at(identity, "sessionContext", "sessionIssuer", "userName"), arn.rpartition("/")[2]
    service, kind = text_at(identity, "invokedBy"), text_at(identity, "type")
    if service.endswith(".amazonaws.com") or role.startswith("AWSServiceRoleFor"):
        by = service.removesuffix(".amazonaws.com") or role.removeprefix("AWSServiceRoleFor")
        return Creator(f"{by} (automation)")
    if role.startswith("AWSReservedSSO_"):
        return Creator(f"{session} (SSO {role.removeprefix('AWSReservedSSO_').rpartition('_')[0]})")
    if kind == "Root":
        return Creator(f"root of {text_at(identity, 'accountId') or 'the account'}")
    if kind == "AssumedRole" and "/" in arn:
        return Creator(f"{role or arn.split('/')[1]}/{session}")
    known = text_at(identity, "userName") or arn or text_at(identity, "principalId")
    name = (role if kind == "AssumedRole" else "") or known
    return Creator(name) if name else Creator(None, "the event names nobody")


def text_at(value: Any, *path: str) -> str:
    """Return the text at a path of keys in JSON of any shape; "" where there is none."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""


def load_instances(path: str) -> tuple[dict[Target, list[Instance]], bool]:
    """Read what `aws ec2 describe-instances` printed, and whether it is complete; raises UsageError."""
    shown = "standard input" if path == "-" else path
    place = " is not what `aws ec2 describe-instances --output json` prints"
    targets: dict[Target, list[Instance]] = {}
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        answer = parse_json(content)
        for index, reservation in enumerate(json_at(answer, list, "Reservations")):
            place = f": Reservations[{index}]"
            owner = _account_id(json_at(reservation, str, "OwnerId"))
            for number, item in enumerate(json_at(reservation, list, "Instances")):
                place = f": Reservations[{index}].Instances[{number}]"
                target = Target(owner, zone_region(json_at(item, str, "Placement", "AvailabilityZone")))
                targets.setdefault(target, []).append(_instance_of_json(item))
        place = ": NextToken"
        misspelt = [key for key in answer if "token" in key.lower() and key != "NextToken"]
        if misspelt:
            raise ValueError(f"the key {shown_value(misspelt[0])} instead of NextToken")
        complete = answer.get("NextToken") is None or not json_at(answer, str, "NextToken")
    except OSError as error:
        advice = "name each file with --instances FILE"
        raise UsageError(f"cannot read {shown}: {error.strerror}; {advice}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{shown}{place}: {json_error(error)}") from error
    return targets, complete


Fleet = Mapping[Target, Sequence[Instance]]


def load_fleet(paths: Iterable[str]) -> tuple[dict[Target, list[Instance]], str]:
    """Read saved files as one, each instance once, and return the last that is cut; raises UsageError."""
    fleet: dict[Target, dict[str, tuple[Instance, str]]] = {}
    cut = ""
    for path in paths:
        targets, complete = load_instances(path)
        cut = cut if complete else path
        for target, instances in targets.items():
            known = fleet.setdefault(target, {})
            for instance in instances:
                other, source = known.setdefault(instance.instance_id, (instance, path))
                if other != instance:
                    what = "other tags" if other.tags != instance.tags else "another state or launch"
                    where = f"twice in {path}" if source == path else f"in {source} and in {path}"
                    where = f"{instance.instance_id} in {target} is {where}"
                    raise UsageError(f"{where}, with {what}: save it again, in one file")
    return {target: [instance for instance, _ in known.values()] for target, known in fleet.items()}, cut


def _instance_of_json(item: Mapping[str, Any]) -> Instance:
    """Build an Instance from an item of `Instances`; raises KeyError, TypeError or ValueError."""
    paths = ("InstanceId",), ("State", "Name"), ("LaunchTime",)
    instance_id, state, launch_time = (json_at(item, str, *path) for path in paths)
    tags: dict[str, str] = {}
    for tag in json_at(item, list, "Tags") if "Tags" in item else ():
        key = json_at(tag, str, "Key")
        if not key or key in tags:
            raise ValueError(f"it has the tag key {shown_value(key)} twice" if key else "a tag without a key")
        tags[key] = json_at(tag, str, "Value")
    optional = (("InstanceType",), ("IamInstanceProfile", "Arn"), ("SubnetId",), ("VpcId",))
    more = [json_at(item, str, *path) if item.get(path[0]) is not None else "" for path in optional]
    operator = json_at(item, dict, "Operator") if item.get("Operator") else {}
    managed = "Managed" in operator and json_at(operator, bool, "Managed")
    service = (json_at(operator, str, "Principal") if "Principal" in operator else "") or "unknown"
    return _instance(instance_id, state, launch_time, tags, *more, service if managed else "")


def parse_json(content: str | bytes) -> Any:
    """Return the value of strict JSON, in any of its encodings; raises ValueError or RecursionError."""
    text = content if isinstance(content, str) else content.decode(json.detect_encoding(content))
    return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)


def json_at(value: Any, kind: type[T], *path: str) -> T:
    """Return the value at a path in JSON if it is of a kind; raises KeyError, TypeError or ValueError."""
    for key in path:
        if not isinstance(value, dict):
            raise TypeError(f"{shown_value(value)} instead of an object with {key}")
        value = value[key]
    if not isinstance(value, kind):
        what = {str: "text", list: "a list", dict: "an object", bool: "true or false"}[kind]
        raise TypeError(f"its {path[-1]} is {shown_value(value)}, not {what}")
    if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError(f"its {path[-1]} {shown_value(value)} holds half a character (a lone surrogate)")
    return value


def json_error(error: Exception) -> str:
    """Return what an error says of an answer; a KeyError says only the key."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


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


def zone_region(zone: str) -> str:
    """Return the region of an availability, local or wavelength zone: us-west-2 of us-west-2-lax-1a."""
    return _matching(REGION_NAME, zone, "an availability zone")


PRICE_COLUMNS = ("instance_type", "region", "hourly_price")
HOURS_A_MONTH = 730  # as in AWS's own calculator


class Prices(NamedTuple):
    """What instances cost, and in which currency, where that is known."""

    hourly: Mapping[tuple[str, str], float]  # by instance type and region
    currency: str = ""


def cost_of_month(prices: Prices, instance: Instance, region: str) -> float | None:
    """Return what an instance in its present state costs in a month; None without its price."""
    hourly = prices.hourly.get((instance.instance_type, region))
    runs = instance.state in ("pending", "running") or is_new_state(instance.state)
    return hourly and (hourly * HOURS_A_MONTH if runs else 0.0)


def load_prices(path: str) -> Prices:
    """Read a CSV of instance type, region and hourly price, with a line of names; raises UsageError."""
    # The column of prices may name their currency: hourly_price_eur.
    prices: dict[tuple[str, str], float] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            names = table.fieldnames or ()
            priced = [name for name in names if re.fullmatch("hourly_price(_[A-Za-z]{3})?", name)]
            columns = (*PRICE_COLUMNS[:2], *priced)
            if not (len(priced) == 1 and {*columns} <= {*names}):
                raise UsageError(f"{path}:1: the first line must name the columns {','.join(PRICE_COLUMNS)}")
            for row in table:
                kind, region, price = (str(row[column] or "").strip() for column in columns)
                place = f"{path}:{table.line_num}"
                if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,12})?", price):
                    raise UsageError(f"{place}: {shown_value(price)} is not a price: write it as 0.0832")
                if not is_region(region):
                    raise UsageError(f"{place}: AWS has no region {shown_value(region)}")
                prices[kind, region] = float(price)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a CSV file in UTF-8: {error}") from error
    return Prices(prices, priced[0].removeprefix("hourly_price").strip("_").upper())


########################################################################################################
# 6 State: MIGRATIONS, load_record, opened_state, add_sightings, record_scan, fetch_open, LocalState, S3State
########################################################################################################

APPLICATION_ID = 0x74616763  # "tagc", in SQLite's header: it tells our files from other programs'
BUSY_TIMEOUT = 60  # seconds to wait while another scan records

# One SQL script per version of the state; all that a state lacks run in one transaction.
# `findings` has a rowid and a separate key: rows of this size make a WITHOUT ROWID table slow.
MIGRATIONS = (
    """
    CREATE TABLE scans (
        id INTEGER PRIMARY KEY, scan_id TEXT NOT NULL UNIQUE, policy TEXT NOT NULL, policy_file TEXT NOT NULL,
        policy_digest TEXT NOT NULL, started_at TEXT NOT NULL, finished_at TEXT NOT NULL
    );
    CREATE TABLE coverage (
        scan INTEGER NOT NULL REFERENCES scans (id), account_id TEXT NOT NULL, region TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('read', 'unread')), error_code TEXT, error_message TEXT,
        instances INTEGER NOT NULL, compliant INTEGER NOT NULL, findings INTEGER NOT NULL,
        exempted INTEGER NOT NULL, new INTEGER NOT NULL, repeat INTEGER NOT NULL, reopened INTEGER NOT NULL,
        resolved INTEGER NOT NULL, PRIMARY KEY (scan, account_id, region)
    ) WITHOUT ROWID;
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
    """
    -- The keys of `violations`, to count a million findings without reading their JSON.
    ALTER TABLE findings ADD COLUMN tag_keys TEXT;
    UPDATE findings SET tag_keys =
        (SELECT json_group_array(json_extract(value, '$.tag_key')) FROM json_each(violations));
    ALTER TABLE findings ADD COLUMN instance_type TEXT;
    ALTER TABLE findings ADD COLUMN cause_kind TEXT;
    ALTER TABLE findings ADD COLUMN cause TEXT;
    ALTER TABLE findings ADD COLUMN monthly_cost REAL;
    -- What happened to a finding after it was NEW. `before` holds the violations that it had until then.
    CREATE TABLE events (
        id INTEGER PRIMARY KEY, finding INTEGER NOT NULL REFERENCES findings (id), at TEXT NOT NULL,
        event TEXT NOT NULL CHECK (event IN ('CHANGED', 'RESOLVED', 'REOPENED')), before TEXT, resolution TEXT
    );
    CREATE INDEX events_of ON events (finding);
    INSERT INTO events (finding, at, event, before, resolution)
        SELECT id, resolved_at, 'RESOLVED', violations, resolution
        FROM findings WHERE resolved_at IS NOT NULL;
    CREATE TABLE trend (
        policy TEXT NOT NULL, day TEXT NOT NULL, at TEXT NOT NULL, open INTEGER NOT NULL,
        new INTEGER NOT NULL, reopened INTEGER NOT NULL, resolved INTEGER NOT NULL, targets INTEGER NOT NULL,
        targets_unread INTEGER NOT NULL, PRIMARY KEY (policy, day)
    ) WITHOUT ROWID
    """,
    """
    -- What `remediate` wrote: `former` is NULL where the tag was missing, `value` where it was deleted.
    -- A row is 'intended' before the call, so that a run that was killed leaves a record of what it did.
    CREATE TABLE changes (
        id INTEGER PRIMARY KEY, change_id TEXT NOT NULL UNIQUE, policy TEXT NOT NULL,
        account_id TEXT NOT NULL, region TEXT NOT NULL, instance_id TEXT NOT NULL, tag_key TEXT NOT NULL,
        former TEXT, value TEXT, why TEXT NOT NULL, who TEXT NOT NULL, changed_at TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN ('intended', 'written'))
    );
    CREATE INDEX changes_of ON changes (policy, account_id, region, instance_id)
    """,
    """
    -- What each channel of the policy's `notify` has to send, and when it was sent: NULL until then.
    CREATE TABLE notifications (
        policy TEXT NOT NULL, subject TEXT NOT NULL, channel TEXT NOT NULL, told_at TEXT,
        PRIMARY KEY (policy, subject, channel)
    ) WITHOUT ROWID
    """,
    "ALTER TABLE findings ADD COLUMN managed_by TEXT",
    """
    -- Why `created_by` is not known was a text in `created_by` itself.
    ALTER TABLE findings ADD COLUMN created_by_reason TEXT;
    UPDATE findings SET created_by = NULL, created_by_reason = substr(created_by, 10, length(created_by) - 10)
        WHERE created_by GLOB 'unknown (*)';
    -- The trend had one row per day of pruned scans, and was derived from the coverage of the others.
    ALTER TABLE trend RENAME TO pruned_days;
    CREATE TABLE trend (
        policy TEXT NOT NULL, at TEXT NOT NULL, open INTEGER NOT NULL, new INTEGER NOT NULL,
        reopened INTEGER NOT NULL, resolved INTEGER NOT NULL, targets INTEGER NOT NULL,
        targets_unread INTEGER NOT NULL
    );
    INSERT INTO trend
        SELECT policy, at, open, new, reopened, resolved, targets, targets_unread FROM pruned_days;
    INSERT INTO trend
        WITH counts AS (
            SELECT policy, started_at AS at, new, reopened, resolved, status = 'unread' AS unread,
                iif(status = 'read', findings - lag(findings, 1, 0) OVER (
                    PARTITION BY policy, account_id, region, status ORDER BY started_at, scan
                ), 0) AS more
            FROM scans JOIN coverage ON scan = scans.id
        ), points AS (
            SELECT policy, at, sum(sum(more)) OVER (PARTITION BY policy ORDER BY at), sum(new), sum(reopened),
                sum(resolved), count(*), sum(unread)
            FROM counts GROUP BY policy, at
        )
        SELECT * FROM points
        WHERE at > coalesce((SELECT max(at) FROM pruned_days WHERE policy = points.policy), '');
    DROP TABLE pruned_days
    """,
    """
    -- How accounts were called, and where they were in the organization, when they were last scanned.
    CREATE TABLE accounts (
        account_id TEXT PRIMARY KEY, name TEXT NOT NULL, paths TEXT NOT NULL
    ) WITHOUT ROWID;
    -- How many instances failed a rule that did not count yet, when their target was last read in full.
    CREATE TABLE upcoming (
        policy TEXT NOT NULL, account_id TEXT NOT NULL, region TEXT NOT NULL, tag_key TEXT NOT NULL,
        effective_from TEXT NOT NULL, instances INTEGER NOT NULL,
        PRIMARY KEY (policy, account_id, region, tag_key)
    ) WITHOUT ROWID;
    -- Tags that instances had under an alias, where the policy wants them under the rule's own key, too.
    CREATE TABLE aliased (
        policy TEXT NOT NULL, account_id TEXT NOT NULL, region TEXT NOT NULL, instance_id TEXT NOT NULL,
        tag_key TEXT NOT NULL, name TEXT NOT NULL, alias TEXT NOT NULL, value TEXT NOT NULL, current TEXT,
        cause_kind TEXT, cause TEXT, PRIMARY KEY (policy, account_id, region, instance_id, tag_key)
    ) WITHOUT ROWID
    """,
    """
    -- What the instances that were judged cost in a month, where the scan that last read a target had prices.
    CREATE TABLE spend (
        policy TEXT NOT NULL, account_id TEXT NOT NULL, region TEXT NOT NULL, monthly_cost REAL NOT NULL,
        currency TEXT NOT NULL, PRIMARY KEY (policy, account_id, region)
    ) WITHOUT ROWID
    """,
    """
    -- Whose a finding is. The next scan that finds it knows better than the tag that is the default.
    ALTER TABLE findings ADD COLUMN owner TEXT NOT NULL DEFAULT '';
    UPDATE findings SET owner = coalesce(trim(json_extract(tags, '$.Owner')), '') WHERE json_valid(tags)
    """,
)

# What one scan saw, in a private database on disk: memory does not grow with the fleet, and recording can be
# repeated without reading AWS again. `violations` are those that count: NULL where there are none. `upcoming`
# has the keys of the rules that will be failed, with the days from which they count.
# An instance that moved between two pages while they were read is on both: the last one counts.
SIGHTINGS = """
    CREATE TABLE target (
        id INTEGER PRIMARY KEY, account_id TEXT NOT NULL, region TEXT NOT NULL, account_name TEXT NOT NULL,
        account_paths TEXT NOT NULL, error_code TEXT, error_message TEXT, monthly_cost REAL,
        UNIQUE (account_id, region)
    );
    CREATE TABLE sighting (
        target INTEGER NOT NULL, instance_id TEXT NOT NULL, state TEXT NOT NULL, launch_time TEXT NOT NULL,
        tags TEXT NOT NULL, managed_by TEXT, too_young INTEGER NOT NULL, upcoming TEXT,
        exempted TEXT, violations TEXT, tag_keys TEXT, instance_type TEXT, monthly_cost REAL, groups TEXT,
        cause_kind TEXT, cause TEXT, owner TEXT, suggestions TEXT, created_by TEXT, created_by_reason TEXT,
        PRIMARY KEY (target, instance_id)
    );
    CREATE VIEW seen AS
        SELECT account_id, region, account_name, sighting.*
        FROM target CROSS JOIN sighting ON sighting.target = target.id
        WHERE error_code IS NULL;
    CREATE TABLE aliased (
        target INTEGER NOT NULL, instance_id TEXT NOT NULL, tag_key TEXT NOT NULL, name TEXT NOT NULL,
        alias TEXT NOT NULL, value TEXT NOT NULL, current TEXT, cause_kind TEXT, cause TEXT,
        PRIMARY KEY (target, instance_id, tag_key)
    );
    -- How many members of a group have which values, as JSON in the order of the rules: counted page by page.
    CREATE TABLE usage (
        target INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, copies_of TEXT NOT NULL,
        tag_values TEXT NOT NULL, members INTEGER NOT NULL
    );
    CREATE TABLE agreement (
        target INTEGER NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, rule INTEGER NOT NULL,
        value TEXT NOT NULL, agreeing INTEGER NOT NULL, members INTEGER NOT NULL,
        PRIMARY KEY (target, kind, name, rule)
    ) WITHOUT ROWID;
    CREATE TABLE resolved (finding INTEGER PRIMARY KEY, resolution TEXT NOT NULL);
    -- What belongs in digests, as in DigestLine.
    CREATE TABLE digest_line (
        channel TEXT NOT NULL, recipient TEXT NOT NULL, subject TEXT, line TEXT, age INTEGER NOT NULL,
        owner TEXT NOT NULL, cause TEXT, tag_keys TEXT NOT NULL
    );
    CREATE INDEX digest_of ON digest_line (channel, recipient, age)
"""
SIGHTING_WIDTH = 20  # columns of `sighting`

# ---- Rows of a state, checked by the types of their records ------------------------------------------

MAX_COUNT = 2**53  # as far as JSON's readers count exactly


class _BadRowError(sqlite3.DatabaseError):
    """A row of the state does not hold what tagcheck writes."""


@functools.lru_cache(10_000)  # the findings of a scan have few different times
def _is_moment(text: str) -> bool:
    """Return whether a text is a time as utc_text() writes it, since 1970; raises ValueError."""
    return text >= "1970" and text.endswith("Z") and utc_text(datetime.fromisoformat(text)) == text


# What a value of each type must be. A state is data that anyone may have changed: no row is used unchecked.
_IS_VALID: dict[Any, Callable[[Any], bool]] = {
    Moment: lambda value: type(value) is str and _is_moment(value),
    Day: lambda value: type(value) is str and str(date.fromisoformat(value)) == value,
    int: lambda value: type(value) is int and 0 <= value < MAX_COUNT,
    float: lambda value: type(value) in (int, float) and 0 <= value < math.inf,
    Share: lambda value: type(value) in (int, float) and 0 <= value <= 1,
    Kind: lambda value: value in GROUP_KINDS,
}
# What the fields of a record must be to each other.
_AGREES: dict[Any, Callable[[Any], bool]] = {
    Finding: lambda row: (
        {row.status is Status.RESOLVED} == {row.resolution is not None, row.resolved_at is not None}
        and bool(row.violations)
    ),
    Standing: lambda row: row.compliant + row.findings + row.exempted <= row.instances,
    # A row of an older version counts a whole day: what it resolved can be what was new.
    TrendPoint: lambda row: (
        row.new + row.reopened <= row.open + row.resolved and row.targets_unread <= row.targets
    ),
}
Loader = Callable[[Any], Any]
Record = TypeVar("Record")
Names = Mapping[str, Any]  # the values of a query's names


def _loader(kind: Any) -> Loader:
    """Return a function from what the state holds to a value of a type; it raises ValueError or TypeError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is str:  # most are, so that this is the fastest check
        return str.__str__
    if is_valid := _IS_VALID.get(kind):

        def check(value: Any) -> Any:
            if not is_valid(value):
                raise ValueError
            return value

        return check
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    if type(None) in arguments:
        load = _loader(arguments[0])
        return lambda value: None if value is None else load(value)
    if origin is Literal:
        return lambda value: arguments[arguments.index(value)]
    if origin is tuple:
        return lambda text: () if text is None else _load_list(arguments[0], text)
    if kind == Mapping[str, str]:
        return _load_texts
    return functools.partial(_load_fields, kind)


def _from_json(text: Any, kind: type) -> Any:
    """Return the list or object that JSON holds; raises ValueError, TypeError or RecursionError."""
    if type(value := json.loads(text)) is not kind:
        raise ValueError
    return value


def _load_texts(text: Any) -> dict[str, str]:
    """Return the texts by key that a JSON object holds; raises as _from_json()."""
    texts = _from_json(text, dict)
    return dict(zip(texts, map(str.__str__, texts.values()), strict=True))


# Many findings of a scan fail in the same way, and have the same cause.
@functools.lru_cache(1000)
def _load_fields(kind: Callable[..., Record], text: Any) -> Record:
    """Return the record whose fields a JSON list holds, in their order; raises as load_record()."""
    return load_record(kind, _from_json(text, list))


@functools.lru_cache(1000)
def _load_list(kind: Callable[..., Record], text: Any) -> tuple[Record, ...]:
    """Return the records that a list of JSON objects holds, at least one; raises as _from_json()."""
    records = _from_json(text, list)
    names = _loaders(kind).keys()
    if not records or any(type(record) is not dict or record.keys() != names for record in records):
        raise ValueError
    return tuple(_load_object(kind, record) for record in records)


def _load_object(kind: Callable[..., Record], value: Mapping[str, Any]) -> Record:
    """Return the record of a JSON object, which may have more keys; raises _BadRowError."""
    return load_record(kind, [value[name] for name in _loaders(kind)])


@functools.cache
def _loaders(kind: Any) -> dict[str, Loader]:
    """Return a loader for each field of a record."""
    return {name: _loader(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _load_row(loaders: Mapping[str, Loader], row: Sequence[Any]) -> list[Any]:
    """Return the values of a row, whose columns the loaders name; raises _BadRowError."""
    values: list[Any] = []
    try:
        for load, value in zip(loaders.values(), row, strict=True):
            values.append(load(value))
    except (ValueError, TypeError, RecursionError) as error:
        name, value = [*loaders][len(values)], row[len(values)]
        raise _BadRowError(f"{name} is {value!r:.80}") from error
    return values


def load_rows(rows: Iterable[Sequence[Any]], **kinds: Any) -> Iterator[Any]:
    """Yield rows, as tuples, whose columns have these names and types; raises _BadRowError."""
    loaders = {name: _loader(kind) for name, kind in kinds.items()}
    return (tuple(_load_row(loaders, row)) for row in rows)


def load_record(kind: Callable[..., Record], row: Sequence[Any]) -> Record:
    """Return the record whose fields are the columns of a row; raises _BadRowError."""
    record = kind(*_load_row(_loaders(kind), row))
    if kind in _AGREES and not _AGREES[kind](record):
        raise _BadRowError(f"{record!r:.160} contradicts itself")
    return record


def _columns(names: Iterable[str], table: str) -> str:
    """Return the columns of a table or query that hold these fields of a record."""
    known = "coalesce((SELECT {} FROM accounts WHERE account_id = {}.account_id), '')"
    name, paths = (known.format(column, table) for column in ("name", "paths"))
    group = f"json_array({table}.cause_kind, {table}.cause)"
    others = {
        "target": f"json_array({table}.account_id, {table}.region, {name}, {paths})",
        "account_name": name,
        "account_paths": paths,
        "group": group,
        "cause": f"nullif({group}, '[null,null]')",
    }
    return ", ".join(others.get(field, f"{table}.{field}") for field in names)


# ---- Opening and writing a state ---------------------------------------------------------------------

WAY_OUT = "restore it from a backup, or move it away to start over (every finding will be NEW again)"
NO_STATE = f"name the right one with --state; if it is the right one, {WAY_OUT}"
# How SQLite's messages about a query that does not fit the tables begin.
_QUERY_BUG = re.compile("no such column|no such function|near |ambiguous column|wrong number of arguments")


@contextlib.contextmanager
def _state_errors(name: Path | str) -> Iterator[None]:
    """Turn what SQLite raises for a state that cannot be used into StateErrors, but not bugs of ours."""
    denied = "cannot be opened or written: check the permissions of the file and of its directory"
    full = f"cannot grow: its disk or that of {tempfile.gettempdir()} is full; free some space and run again"
    advice = {
        "SQLITE_BUSY": f"is in use: another scan has been writing to it for {BUSY_TIMEOUT} s; run again",
        "SQLITE_LOCKED": "is in use; run again",
        "SQLITE_NOTADB": f"is not a SQLite database: {NO_STATE}",
        "SQLITE_FULL": full,
        "SQLITE_IOERR": "cannot be read or written: check the disk, its space and its quota",
        **dict.fromkeys(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH"), denied),
    }
    try:
        yield
    except sqlite3.Error as error:
        code = "_".join(getattr(error, "sqlite_errorname", "").split("_")[:2])
        is_query = code == "SQLITE_ERROR" and _QUERY_BUG.match(str(error))
        if is_query or isinstance(error, sqlite3.ProgrammingError):
            raise
        # Other SQLITE_ERRORs are about a value ("malformed JSON"), as the tables are ours.
        unusable = f"is damaged or was changed ({str(error)[:200]}): {WAY_OUT}"
        raise StateError(f"the state {name} {advice.get(code, unusable)}") from error


def _connect(path: Path | None = None) -> Connection:
    """Open a file that exists, or a private database, which SQLite deletes when it is closed, or killed."""
    uri = f"{path.absolute().as_uri()}?mode=rw" if path else ""
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT, isolation_level=None)
    db.execute("PRAGMA trusted_schema = OFF")  # of what is attached as well
    db.execute("PRAGMA synchronous = FULL")
    return db


@contextlib.contextmanager
def opened_state(path: Path, name: Path | str) -> Iterator[Connection]:
    """Yield a connection to a state whose schema is ours; raises StateError, which says `name`."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingStateError(name) from None
    except OSError as error:
        message = f"the state {name} cannot be read: {error.strerror}; name another file with --state"
        raise StateError(message) from error
    size = status.st_size
    for is_so, what in (
        (stat.S_ISDIR(status.st_mode), "is a directory: name a file with --state"),
        # Opening a FIFO waits for a writer.
        (not stat.S_ISREG(status.st_mode), "is not a regular file: name another file with --state"),
        (size == 0, f"is empty (0 bytes): {WAY_OUT}"),
        # SQLite's smallest page: it treats a smaller file as a new database.
        (size < 512, f"is not a SQLite database, or cut short ({size} bytes): {NO_STATE}"),
    ):
        if is_so:
            raise StateError(f"the state {name} {what}")
    with _state_errors(name), contextlib.closing(_connect(path)) as db:
        _state_version(db, name)
        yield db


@contextlib.contextmanager
def _attached(db: Connection, path: Path, name: Path | str) -> Iterator[None]:
    """Attach a state whose schema is ours to the sightings; raises StateError."""
    with _state_errors(name):
        db.execute("ATTACH DATABASE ? AS state", (f"{path.absolute().as_uri()}?mode=rw",))
        db.execute("PRAGMA state.synchronous = FULL")
        _state_version(db, name, "state")
        yield
        # After an exception queries of it may still be open, and only the end of the connection detaches it.
        db.execute("DETACH DATABASE state")


@contextlib.contextmanager
def transaction(db: Connection, mode: str = "IMMEDIATE") -> Iterator[None]:
    """Run the body in one transaction, which an exception undoes."""
    db.execute(f"BEGIN {mode}")
    try:
        yield
        db.execute("COMMIT")
    finally:
        # A full disk has ended the transaction already; a second ROLLBACK would be an error of its own.
        if db.in_transaction:
            db.execute("ROLLBACK")


def _run(db: Connection, script: str, names: Names | None = None) -> None:
    """Run the statements of a script in the open transaction, which executescript() would commit."""
    for statement in script.split(";"):
        db.execute(statement, names or {})


@contextlib.contextmanager
def writing_state(db: Connection, name: Path | str, schema: str = "main") -> Iterator[None]:
    """Write to a state of the present version in one transaction, which an exception undoes."""
    # In other words than before ATTACH: sqlite3 keeps that statement, which would not lock the state.
    with transaction(db, f"IMMEDIATE /* {schema} */"):
        # Another process may have changed the file since it was opened.
        if _state_version(db, name, schema) != len(MIGRATIONS):
            raise StateError(f"the state {name} was changed while this command ran: run it again")
        yield


def check_state(path: Path, name: Path | str | None = None, *, create: bool = True) -> None:
    """Check a state and bring it to the present version, or create a missing one; raises StateError."""
    # What is not ours or damaged is refused: starting over silently would lose every first_seen.
    name = name or path
    try:
        with opened_state(path, name) as db:
            _migrate(db, name)
    except MissingStateError:
        if not create:
            raise
        _create_state(path)
        check_state(path, name, create=False)


def _migrate(db: Connection, name: Path | str) -> None:
    """Bring a state that is not damaged to the present version in one transaction; raises StateError."""
    # quick_check would not notice flipped bits in an index.
    damage = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if damage != "ok":
        raise StateError(f"the state {name} is damaged ({damage}): {WAY_OUT}")
    if _state_version(db, name) == len(MIGRATIONS):
        return
    with transaction(db):
        for script in MIGRATIONS[_state_version(db, name) :]:
            _run(db, script)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _create_state(path: Path) -> None:
    """Create an empty state, readable by its owner only, as a whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as directory:
            new = Path(directory) / "state.db"
            new.touch(0o600)
            with _state_errors(path), contextlib.closing(_connect(new)) as db:
                _migrate(db, path)
            with contextlib.suppress(FileExistsError):  # another scan was first, and its state is as good
                os.link(new, path)
    except OSError as error:
        message = f"the state {path} cannot be created: {error.strerror}; name another place with --state"
        raise StateError(message) from error


OLDER_TABLE = "flagged_instances"
OLDER_COLUMNS = {"instance_id", "first_seen", "is_active"}
# SQLite goes by the SQL, whatever the other columns say. A virtual table would run other code.
_OLDER_OBJECT = re.compile(
    rf"""CREATE (TABLE|(UNIQUE )?INDEX ["`\[]?\w+["`\]]? ON) ["`\[]?{OLDER_TABLE}\b""", re.IGNORECASE
)


def _state_version(db: Connection, name: Path | str, schema: str = "main") -> int:
    """Return the version of a state: 0 for a new file and for the older tool's; raises StateError."""
    # A schema that is not of its version is refused: a trigger or a view could change what a scan records or
    # a report shows.
    pragmas = (f"PRAGMA {schema}.{what}" for what in ("application_id", "user_version"))
    application_id, version = (int(db.execute(pragma).fetchone()[0]) for pragma in pragmas)
    found, older = _read_schema(db, schema), _has_older_table(db, schema)
    is_new = (application_id, version) == (0, 0) and (older or not found)
    if application_id != APPLICATION_ID and not is_new:
        raise StateError(f"the state {name} is another program's database: name the right one with --state")
    if version > len(MIGRATIONS):
        newer = f"was written by a newer tagcheck (version {version}): use that one"
        raise StateError(f"the state {name} {newer}")
    expected = _expected_schema(max(version, 0))
    why = [f"its version is {version}"] if version < 0 else []
    for kind, item, table, sql in sorted(found - expected, key=repr):
        if not (older and _is_of_older_tool(kind, item, table, sql)):
            on = f" on {str(table)[:60]!r}" if table != item else ""
            why.append(f"it has a {str(kind)[:20]} {str(item)[:60]!r}{on} that tagcheck did not make")
    why += (f"it lacks the {kind} {item!r}" for kind, item, *_ in sorted(expected - found, key=repr))
    if why:
        changed = f"is not a tagcheck state, or something else changed it ({why[0]})"
        raise StateError(f"the state {name} {changed}: {NO_STATE}")
    return version


def _read_schema(db: Connection, schema: str = "main") -> Counter[tuple[str, ...]]:
    """Return the objects of a database: type, name, table and SQL with its white space made alike."""
    try:
        rows = db.execute(f"SELECT type, name, tbl_name, sql FROM {schema}.sqlite_master").fetchall()
    except UnicodeDecodeError as error:  # sqlite3 fails to decode SQLite's message, which quotes a name
        raise _BadRowError("a name in its schema is not UTF-8") from error
    return Counter((*row, re.sub(r"\s*([(),])\s*", r"\1", " ".join(str(sql).split()))) for *row, sql in rows)


@functools.lru_cache
def _expected_schema(version: int) -> Counter[tuple[str, ...]]:
    """Return the objects of a state of a version."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        for script in MIGRATIONS[:version]:
            _run(db, script)
        return _read_schema(db)


def _is_of_older_tool(kind: str, name: str, table: str, sql: str) -> bool:
    """Return whether an object of a schema is the older tool's table, or an index of it."""
    if kind == "table" and name == "sqlite_sequence":  # of AUTOINCREMENT
        return sql == "CREATE TABLE sqlite_sequence(name,seq)"
    is_index = kind == "index" and sql == "None"
    return table == OLDER_TABLE and (is_index or _OLDER_OBJECT.match(sql) is not None)


def _has_older_table(db: Connection, schema: str) -> bool:
    return {row[1] for row in db.execute(f"PRAGMA {schema}.table_info({OLDER_TABLE})")} >= OLDER_COLUMNS


# ---- What a scan saw ---------------------------------------------------------------------------------


def open_sightings() -> Connection:
    """Return a private database for what a scan sees."""
    db = _connect()
    _run(db, SIGHTINGS)
    return db


def sighting_errors() -> contextlib.AbstractContextManager[None]:
    """Turn SQLite's errors about what this scan has seen, in the body of the `with`, into StateErrors."""
    return _state_errors(Path(tempfile.gettempdir()) / "(of this scan)")


def add_target(db: Connection, target: Target) -> int:
    """Add a target that is being read, and return its number among the sightings."""
    columns = ", ".join(target.__slots__)
    row = db.execute(f"INSERT INTO target ({columns}) VALUES (?, ?, ?, ?)", astuple(target))
    return row.lastrowid or 0


def fail_target(db: Connection, target: int, error: TargetError) -> None:
    """Record why a target could not be read in full; what was seen of it no longer counts."""
    failure = (error.code, error.message, target)
    db.execute("UPDATE target SET error_code = ?, error_message = ? WHERE id = ?", failure)
    db.execute("DELETE FROM sighting WHERE target = ?", (target,))


def add_sightings(
    db: Connection,
    target: int,
    sightings: Sequence[tuple[Sighting, float | None]],
    rules: Sequence[RequiredTag] = (),
    placeholders: Container[str] = (),
) -> None:
    """Add sightings of a target, each with the instance's cost per month, and the values of these tags."""
    values_of = value_reader(rules, placeholders)
    placed = [(seen, groups_of(seen.instance), cost) for seen, cost in sightings]
    rows = sorted((_sighting_row(target, *each) for each in placed), key=len)
    alike = Counter((groups, values_of(seen)) for seen, groups, _ in placed)
    usage: Counter[tuple[str, str, str, Values]] = Counter()
    for (groups, values), number in alike.items():
        for entry in _usage_of(groups, values):
            usage[entry] += number
    counts = ((target, *entry, to_json(values), number) for (*entry, values), number in usage.items())
    judged = (
        cost for seen, cost in sightings if not seen.too_young and (seen.violations or not seen.exempted)
    )
    priced = [cost for cost in judged if cost is not None]
    with transaction(db):
        if priced:
            spend = "UPDATE target SET monthly_cost = coalesce(monthly_cost, 0) + ? WHERE id = ?"
            db.execute(spend, (sum(priced), target))
        db.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?)", counts)
        for width, short in itertools.groupby(rows, key=len):
            columns = ", ".join(["?"] * width + ["NULL"] * (SIGHTING_WIDTH - width))
            db.executemany(f"INSERT OR REPLACE INTO sighting VALUES ({columns})", short)


def _sighting_row(target: int, seen: Sighting, groups: Groups, cost: float | None) -> tuple[object, ...]:
    """Return a row of `sighting` without the NULLs at its end: sqlite3 looks for an adapter of each None."""
    instance = seen.instance
    launch_time, tags = utc_text(instance.launch_time), to_json(instance.tags)
    place = (target, instance.instance_id, instance.state, launch_time, tags)
    row: tuple[object, ...] = (*place, instance.managed_by, int(seen.too_young))
    if not (seen.violations or seen.exempted or seen.upcoming):
        return row
    days = {rule.key: str(rule.effective_from) for rule in seen.upcoming}
    row = (*row, to_json(days) if days else None)
    exempted = _list_or_null(map(exempted_record, seen.exempted))
    if not seen.violations:
        return (*row, exempted)
    more = (instance.instance_type, cost, _groups_json(groups), *(cause_of(groups) or (None, None)))
    return (*row, exempted, *_violations_json(seen.violations), *more, seen.owner)


def add_aliased(
    db: Connection,
    target: int,
    sightings: Iterable[Sighting],
    rules: Iterable[RequiredTag],
    placeholders: Container[str],
) -> None:
    """Add the tags of a target's instances that the policy wants under the rules' own keys, too."""
    rows = []
    with_aliases = [rule for rule in rules if rule.aliases]
    for instance in (seen.instance for seen in sightings if not seen.too_young):
        tags = instance.tags
        for key, alias in aliases_used(tags, with_aliases, placeholders):
            row = (target, instance.instance_id, key, tags.get("Name", ""), alias, tags[alias], tags.get(key))
            rows.append((*row, *(cause_of(groups_of(instance)) or (None, None))))
    with transaction(db):
        db.executemany("INSERT OR REPLACE INTO aliased VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


# Siblings have the same groups and mostly fail in the same way.
_groups_json = functools.lru_cache(1000)(to_json)


@functools.lru_cache(1000)
def _violations_json(violations: tuple[Violation, ...]) -> tuple[str, str]:
    """Return violations and their tag keys as JSON."""
    return to_json([*map(to_record, violations)]), to_json([case.tag_key for case in violations])


def _list_or_null(items: Iterable[object]) -> str | None:
    """Return items as a JSON list, None where there are none."""
    return to_json(found) if (found := [*items]) else None


def _usage_of(groups: Groups, values: Values) -> Iterator[tuple[str, str, str, Values]]:
    """Yield each group of instances, the cause in which they are copies, and their required tags."""
    # In a group that is not a cause, copies of one cause count once: an Auto Scaling group is one witness.
    cause = ""
    for kind, name in groups:
        can_tag = GROUP_KINDS[kind].remedy
        cause = cause or (name if can_tag else "")
        # One copy with all its tags is enough for its wider groups, and those without would be many entries.
        if can_tag or not cause or None not in values:
            yield kind, name, "" if can_tag else cause, values


def add_suggestions(db: Connection, policy: Policy) -> None:
    """Add the likely values of the tags that violate the policy, from all that was seen."""
    reliability = Reliability()
    targets = db.execute("SELECT id, region FROM target WHERE error_code IS NULL AND region <> '*'")
    rules = {target: policy.rules_by_key(region) for target, region in targets}
    keys = {target: [*by_key] for target, by_key in rules.items()}
    with transaction(db):
        db.execute(_AGREEMENTS)
    query = "SELECT target, kind, rule, sum(agreeing), sum(members) FROM agreement WHERE agreeing"
    for target, kind, rule, *counts in db.execute(f"{query} GROUP BY 1, 2, 3"):
        reliability.learn(kind, {keys[target][rule]: Agreement("", *counts)})

    @functools.lru_cache(10_000)
    def agreements_of(target: int, kind: str, name: str) -> dict[str, Agreement]:
        query = "SELECT rule, value, agreeing, members FROM agreement WHERE (target, kind, name) = (?, ?, ?)"
        rows = db.execute(query, (target, kind, name))
        return {keys[target][rule]: Agreement(*found) for rule, *found in rows}

    likely = functools.partial(suggest, reliability=reliability, normalize_aliases=policy.normalize_aliases)

    @functools.lru_cache(1000)  # siblings that fail in the same way have the same suggestions
    def suggestions(target: int, violations: str, groups: str) -> tuple[str | None, str | None]:
        members, found = [Group(*group) for group in json.loads(groups)], list[Suggestion]()
        owner = None
        for violation in _load_list(Violation, violations):
            siblings = ((group, agreements_of(target, *group)) for group in members)
            rule = rules[target][violation.tag_key]
            if value := likely(violation, rule, policy.placeholder_values, siblings):
                found.append(value)
                if value.tag_key == policy.owner_key and value.confidence >= MIN_CONFIDENCE:
                    owner = value.value
        return _list_or_null(map(to_record, found)), owner

    query = "SELECT rowid, target, violations, groups FROM sighting WHERE violations IS NOT NULL"
    rows = ((*suggestions(*row), number) for number, *row in db.execute(query))
    with transaction(db):
        update = "UPDATE sighting SET suggestions = ?, owner = coalesce(?, owner) WHERE rowid = ?"
        db.executemany(update, rows)


# The most frequent value of each rule in a group, or '' where hardly any member has one. The copies of one
# cause are one member of its wider groups. Of equally frequent values the first one wins: the order of the
# pages does not matter.
_AGREEMENTS = f"""
    WITH member AS (
        SELECT target, kind, name, tag_values, iif(copies_of = '', sum(members), 1) AS number FROM usage
        WHERE target IN (SELECT id FROM target WHERE error_code IS NULL)
        GROUP BY target, kind, name, copies_of, tag_values
    ), vote AS (
        SELECT target, kind, name, rule.key AS rule, rule.value, sum(number) AS votes
        FROM member CROSS JOIN json_each(tag_values) AS rule GROUP BY 1, 2, 3, 4, 5
    ), ranked AS (
        SELECT *, row_number() OVER of_rule AS place, count(value) OVER of_rule AS different,
            sum(votes) OVER of_rule AS size, sum(iif(value IS NULL, 0, votes)) OVER of_rule AS members
        FROM vote WINDOW of_rule AS (
            PARTITION BY target, kind, name, rule ORDER BY value IS NULL, votes DESC, value
            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
        )
    )
    INSERT INTO agreement
    SELECT target, kind, name, rule, iif(members < {MIN_MEMBERS}, '', value),
        iif(members < {MIN_MEMBERS}, 0, votes), iif(members < {MIN_MEMBERS}, size, members)
    FROM ranked WHERE place = 1 AND size >= {MIN_MEMBERS} AND different < {MAX_VALUES}
"""


def fetch_suggestions(db: Connection, target: Target, instance_id: str) -> tuple[Suggestion, ...]:
    """Return the likely values of an instance's tags that violate the policy."""
    query = "SELECT suggestions FROM seen WHERE (account_id, region, instance_id) = (?, ?, ?)"
    rows = db.execute(query, (target.account_id, target.region, instance_id))
    return next((found for (found,) in load_rows(rows, suggestions=tuple[Suggestion, ...])), ())


MAX_LOOKUPS = 1000  # of creators per target and scan: more than the budget of time allows


def fetch_uncreated(db: Connection, path: Path, scan: Scan, since: datetime) -> dict[Target, list[Launch]]:
    """Return by target the findings launched since a time that have no known creator, the youngest first."""
    query = f"""
        SELECT account_id, region, instance_id, seen.launch_time
        FROM seen LEFT JOIN (SELECT * FROM state.findings WHERE policy = ?) AS finding USING ({_KEY})
        WHERE seen.violations IS NOT NULL AND NOT too_young AND seen.launch_time >= ?
            AND finding.created_by IS NULL
        ORDER BY account_id, region, seen.launch_time DESC
    """
    with _attached(db, path, path):
        rows = db.execute(query, (scan.policy.name, utc_text(since)))
        return {
            Target(*key): [
                (instance_id, datetime.fromisoformat(launched))
                for *_, instance_id, launched in itertools.islice(group, MAX_LOOKUPS)
            ]
            for key, group in itertools.groupby(rows, key=lambda row: row[:2])
        }


def add_unknown_creators(db: Connection, before: datetime, reason: str) -> None:
    """Add why the creators of what was launched before a time cannot be known any more."""
    query = "UPDATE sighting SET created_by_reason = ? WHERE violations IS NOT NULL AND launch_time < ?"
    db.execute(query, (reason, utc_text(before)))


def add_creators(db: Connection, target: Target, creators: Iterable[Created]) -> None:
    """Add who launched instances of a target, or why that is not known."""
    place = "target = (SELECT id FROM target WHERE (account_id, region) = (?, ?))"
    query = f"UPDATE sighting SET created_by = ?, created_by_reason = ? WHERE instance_id = ? AND {place}"
    for id_, creator in creators:
        name = creator.name and printable(creator.name)
        db.execute(query, (name, creator.reason, id_, target.account_id, target.region))


# ---- Recording a scan --------------------------------------------------------------------------------


@contextlib.contextmanager
def record_scan(db: Connection, path: Path, scan: Scan, finished_at: datetime, name: str) -> Iterator[None]:
    """Record what was seen, in one transaction that ends after the body of the `with`; raises StateError."""
    # In the body, fetch_coverage and fetch_findings answer for this scan. An exception there undoes
    # everything: a report that cannot be written costs no NEW.
    with _attached(db, path, name), writing_state(db, name, "state"):
        policy, times = scan.policy, (utc_text(scan.started_at), utc_text(finished_at))
        row = (scan.scan_id, policy.name, policy.file, policy.digest, *times)
        db.execute("INSERT INTO state.scans VALUES (NULL, ?, ?, ?, ?, ?, ?)", row)
        names = _names(db, scan)
        if db.execute("SELECT 1 FROM state.coverage WHERE scan = :scan", names).fetchone():
            raise _BadRowError("it has counts of a scan that was not yet made")
        _find_resolved(db, names, policy)
        _run(db, _RECORD_FINDINGS, names)
        if _has_older_table(db, "state"):
            _run(db, _ADOPT_OLDER, names)
        _run(db, _RECORD_COVERAGE, names)
        if differing := db.execute(_DIFFERING, names).fetchone():
            raise _BadRowError(f"it did not keep all findings in {' '.join(differing)}")
        yield


def _names(db: Connection, scan: Scan) -> dict[str, Any]:
    """Return the values of a scan that is being recorded by the names that queries have for them."""
    number = db.execute("SELECT id FROM state.scans WHERE scan_id = ?", (scan.scan_id,)).fetchone()[0]
    ages = to_json([age.days for age in (scan.policy.notify or Notify()).reminders])
    names = {"policy": scan.policy.name, "scan": number, "now": utc_text(scan.started_at), "ages": ages}
    return names | {"may_hide": scan.may_hide_managed, "currency": scan.currency}


def _find_resolved(db: Connection, names: Names, policy: Policy) -> None:
    """Find the open findings that this scan resolves, and why; raises _BadRowError."""
    db.execute("DELETE FROM resolved")
    kinds: dict[str, Any] = {"id": int, "region": str, "violations": tuple[Violation, ...]}
    kinds |= {"before": Mapping[str, str], "tags": Mapping[str, str] | None, "exempted": str | None}
    rules = functools.cache(policy.rules_by_key)

    def ended(row: Any) -> tuple[int, Resolution]:
        finding, region, violations, before, tags, exempted = row
        keys = {case["tag_key"] for case in json.loads(exempted or "[]")}
        return finding, resolution(violations, tags, keys, before, rules(region))

    rows = load_rows(db.execute(_RESOLVED, names), **kinds)
    db.executemany("INSERT INTO resolved VALUES (?, ?)", map(ended, rows))


# Only a target that was read in full resolves anything. Without --include-managed-resources
# `aws ec2 describe-instances` may leave out what an AWS service operates (EC2 API reference): it is not gone.
# In a state of the first edition managed_by is NULL, as it did not know.
_RESOLVED = """
    SELECT finding.id, region, finding.violations, finding.tags, sighting.tags, sighting.exempted
    FROM target JOIN state.findings AS finding USING (account_id, region)
    LEFT JOIN sighting ON sighting.target = target.id AND sighting.instance_id = finding.instance_id
    WHERE error_code IS NULL AND policy = :policy AND resolved_at IS NULL AND sighting.violations IS NULL
        AND (sighting.instance_id IS NOT NULL OR NOT :may_hide OR finding.managed_by IS '')
"""

# The join of what this scan saw and what the state keeps; in the order of _SORTED no sorting is needed.
_KNOWN = """
    FROM seen CROSS JOIN state.findings AS finding USING (account_id, region, instance_id)
    WHERE finding.policy = :policy AND seen.violations IS NOT NULL
"""
_SEEN = f"{_KNOWN} AND finding.last_scan = :scan"
_KEY = "account_id, region, instance_id"
_SORTED = f"ORDER BY {_KEY}"
_FINDING = _columns(Finding.__slots__, "finding")

# A stopped instance that is started again has a new launch time: what is open stays open, however young.
_COPIED = (
    "state launch_time tags violations suggestions instance_type cause_kind cause tag_keys monthly_cost "
    "managed_by owner"
).split()
_RECORD_FINDINGS = f"""
    INSERT INTO state.events (finding, at, event, before, resolution)
    SELECT id, :now, 'RESOLVED', violations, resolved.resolution
    FROM resolved JOIN state.findings ON id = finding;

    INSERT INTO state.events (finding, at, event, before)
    SELECT finding.id, :now, 'CHANGED', finding.violations
    {_KNOWN} AND resolved_at IS NULL AND seen.violations <> finding.violations;

    UPDATE state.findings SET status = 'RESOLVED', resolved_at = :now, last_scan = :scan,
        resolution = (SELECT resolution FROM resolved WHERE finding = findings.id)
    WHERE id IN (SELECT finding FROM resolved);

    INSERT INTO state.findings (policy, {_KEY}, status, last_scan, first_seen, last_seen, times_seen,
        times_reopened, created_by, created_by_reason, {", ".join(_COPIED)})
    SELECT :policy, {_KEY}, 'NEW', :scan, :now, :now, 1, 0, created_by, created_by_reason,
        {", ".join(_COPIED)}
    FROM seen WHERE violations IS NOT NULL AND (NOT too_young OR EXISTS (
        SELECT 1 FROM state.findings AS open
        WHERE (policy, open.account_id, open.region, open.instance_id)
            = (:policy, seen.account_id, seen.region, seen.instance_id) AND resolved_at IS NULL
    )) {_SORTED}
    ON CONFLICT (policy, account_id, region, instance_id) DO UPDATE SET
        {", ".join(f"{column} = excluded.{column}" for column in (*_COPIED, "last_scan"))},
        status = iif(resolved_at IS NULL, 'REPEAT', 'REOPENED'),
        last_seen = max(last_seen, excluded.last_seen), times_seen = times_seen + 1,
        times_reopened = times_reopened + (resolved_at IS NOT NULL), resolved_at = NULL, resolution = NULL,
        created_by = coalesce(created_by, excluded.created_by),
        created_by_reason = iif(coalesce(created_by, excluded.created_by) IS NULL,
            coalesce(excluded.created_by_reason, created_by_reason), NULL)
"""

# The older tool's table has neither account nor region, so an entry is adopted when its instance is found
# again. An entry that is not active was resolved: the finding is back.
_ADOPT_OLDER = f"""
    UPDATE state.findings AS finding SET
        first_seen = coalesce(strftime('%Y-%m-%dT%H:%M:%SZ', old.first_seen), finding.first_seen),
        status = CASE WHEN coalesce(old.is_active, 0) THEN 'REPEAT' ELSE 'REOPENED' END,
        times_seen = finding.times_seen + 1,
        times_reopened = finding.times_reopened + NOT coalesce(old.is_active, 0)
    FROM state.{OLDER_TABLE} AS old
    WHERE old.instance_id = finding.instance_id AND finding.policy = :policy
        AND finding.last_scan = :scan AND finding.status = 'NEW';

    UPDATE state.{OLDER_TABLE} SET is_active = 0
    WHERE instance_id IN (SELECT instance_id FROM seen WHERE violations IS NULL);

    DELETE FROM state.{OLDER_TABLE} WHERE instance_id IN (
        SELECT instance_id FROM state.findings WHERE policy = :policy AND last_scan = :scan
    )
"""

# The latest coverage of each target, of those with a status; max() picks the row of the other columns.
_LATEST = """
    SELECT *, max(scan) FROM coverage
    WHERE status IN ({}) AND scan IN (SELECT id FROM scans WHERE policy = :policy) GROUP BY account_id, region
"""
_LAST_READ = _LATEST.format("'read'")
_READ = "SELECT account_id, region FROM target WHERE error_code IS NULL"
# What was kept of the targets that were read is replaced by what follows this.
_REPLACE = f"""
    DELETE FROM state.{{0}} WHERE policy = :policy AND (account_id, region) IN ({_READ});
    INSERT INTO state.{{0}}"""
_RECORD_COVERAGE = f"""
    INSERT INTO state.events (finding, at, event)
    SELECT finding.id, :now, 'REOPENED' {_SEEN} AND status = 'REOPENED';

    INSERT INTO state.coverage
    WITH instances AS (
        SELECT target AS id, count(*) AS instances, sum(violations IS NULL AND exempted IS NULL) AS compliant,
            sum(violations IS NULL AND exempted IS NOT NULL) AS exempted
        FROM sighting GROUP BY target
    ), found AS (
        SELECT seen.target AS id, count(*) AS findings, sum(status = 'NEW') AS new,
            sum(status = 'REPEAT') AS repeat, sum(status = 'REOPENED') AS reopened
        {_SEEN} GROUP BY seen.target
    ), ended AS (
        SELECT account_id, region, count(*) AS resolved
        FROM resolved JOIN state.findings ON id = finding GROUP BY account_id, region
    )
    SELECT :scan, account_id, region, iif(error_code IS NULL, 'read', 'unread'), error_code, error_message,
        coalesce(instances, 0), coalesce(compliant, 0), coalesce(findings, 0), coalesce(exempted, 0),
        coalesce(new, 0), coalesce(repeat, 0), coalesce(reopened, 0), coalesce(resolved, 0)
    FROM target LEFT JOIN instances USING (id) LEFT JOIN found USING (id)
    LEFT JOIN ended USING (account_id, region);

    INSERT INTO state.accounts SELECT DISTINCT account_id, account_name, account_paths FROM target
    WHERE (account_name, account_paths) <> ('', '')
    ON CONFLICT DO UPDATE SET name = coalesce(nullif(excluded.name, ''), name),
        paths = coalesce(nullif(excluded.paths, ''), paths);

    {_REPLACE.format("upcoming")}
    SELECT :policy, account_id, region, rule.key, rule.value, count(*)
    FROM seen CROSS JOIN json_each(upcoming) AS rule WHERE NOT too_young GROUP BY 2, 3, 4;

    {_REPLACE.format("aliased")}
    SELECT :policy, account_id, region, instance_id, tag_key, name, alias, value, current, cause_kind, cause
    FROM target JOIN aliased ON aliased.target = target.id WHERE error_code IS NULL;

    {_REPLACE.format("spend")}
    SELECT :policy, account_id, region, monthly_cost, :currency
    FROM target WHERE error_code IS NULL AND monthly_cost IS NOT NULL;

    INSERT INTO state.trend
    SELECT :policy, :now, (SELECT coalesce(sum(findings), 0) FROM ({_LAST_READ})), sum(new), sum(reopened),
        sum(resolved), count(*), sum(status = 'unread')
    FROM state.coverage WHERE scan = :scan GROUP BY scan
"""

# An instance that is too young is a finding only where it was open before. All others are findings by what
# this scan saw alone, whatever the state holds.
_DIFFERING = """
    SELECT account_id, region
    FROM (SELECT * FROM state.coverage WHERE scan = :scan) JOIN target USING (account_id, region)
    LEFT JOIN (
        SELECT target AS id, count(*) AS violating, sum(NOT too_young) AS sure
        FROM sighting WHERE violations IS NOT NULL GROUP BY target
    ) USING (id)
    WHERE findings <> new + repeat + reopened
        OR findings NOT BETWEEN coalesce(sure, 0) AND coalesce(violating, 0)
"""


# ---- What the scan being recorded has found ----------------------------------------------------------


def fetch_coverage(db: Connection, scan: Scan) -> list[Coverage]:
    """Return the coverage of the scan that is being recorded, sorted by account and region."""
    query = f"SELECT {_columns(Coverage.__slots__, 'coverage')} FROM state.coverage WHERE scan = :scan"
    rows = db.execute(f"{query} ORDER BY account_id, region", _names(db, scan))
    return [load_record(Coverage, row) for row in rows]


def fetch_notice(
    db: Connection, scan: Scan, name: str, coverage: Iterable[Coverage], *, dry_run: bool
) -> str:
    """Return why every finding of the scan being recorded is NEW; nothing where earlier ones are known."""
    rows = db.execute("SELECT DISTINCT policy FROM state.scans WHERE scan_id <> ?", (scan.scan_id,))
    policies = {policy for (policy,) in rows}
    known = any(target.repeat or target.reopened for target in coverage)  # to the older tool
    if scan.policy.name in policies or known:
        return ""
    if policies or _has_older_table(db, "state"):
        return f"No earlier scan of the policy {scan.policy.name} in the state {name}: every finding is NEW"
    would = f"There is no state {name} yet: every finding would be NEW"
    return would if dry_run else f"New state {name}: every finding is NEW"


def fetch_unseen(db: Connection, scan: Scan) -> list[tuple[Target, int]]:
    """Return how many open findings of each target that is not unread the scan neither saw nor resolved."""
    query = f"""
        SELECT {_columns(["target"], "finding")}, count(*) FROM state.findings AS finding
        LEFT JOIN target ON target.account_id = finding.account_id AND target.region IN (finding.region, '*')
        WHERE policy = :policy AND resolved_at IS NULL AND last_scan <> :scan AND error_code IS NULL
        GROUP BY finding.account_id, finding.region ORDER BY finding.account_id, finding.region
    """
    return [*load_rows(db.execute(query, _names(db, scan)), target=Target, number=int)]


def fetch_exempted(db: Connection) -> Iterator[ExemptedInstance]:
    """Yield the instances that were seen and all of whose violations are exempted, sorted."""
    columns = ", ".join(ExemptedInstance.__slots__)
    where = f"WHERE violations IS NULL AND exempted IS NOT NULL {_SORTED}"
    for *texts, tags, exempted in db.execute(f"SELECT {columns} FROM seen {where}"):
        values = (*texts, json.loads(tags), tuple(map(_as_exempted, json.loads(exempted))))
        yield ExemptedInstance(*values)


def _as_exempted(record: Mapping[str, Any]) -> Exempted:
    """Return the exempted violation of a JSON object."""
    expires = date.fromisoformat(record["expires"]) if record["expires"] else None
    approval = {name: record[name] for name in ("reason", "approved_by", "ticket")}
    return Exempted(_load_object(Violation, record), Exemption(expires=expires, **approval))


def fetch_findings(
    db: Connection, scan: Scan, statuses: Iterable[Status] = (), *, resolved: bool = False
) -> Iterator[Finding]:
    """Yield the findings (of some statuses) of the scan being recorded, or those that it resolved, sorted."""
    ended = "FROM state.findings AS finding WHERE id IN (SELECT finding FROM resolved)"
    chosen = f" AND finding.status IN ({', '.join(map(repr, map(str, statuses)))})" if statuses else ""
    query = f"SELECT {_FINDING} {ended if resolved else _SEEN}{chosen} {_SORTED}"
    return (load_record(Finding, row) for row in db.execute(query, _names(db, scan)))


def fetch_oldest(db: Connection, scan: Scan, limit: int) -> list[Finding]:
    """Return the REPEAT findings of the scan that is being recorded that were first seen first."""
    oldest = f"SELECT finding.id {_SEEN} AND status = 'REPEAT' ORDER BY first_seen, {_KEY} LIMIT {limit}"
    query = f"SELECT {_FINDING} FROM state.findings AS finding WHERE id IN ({oldest})"
    rows = db.execute(f"{query} ORDER BY first_seen, {_KEY}", _names(db, scan))
    return [load_record(Finding, row) for row in rows]


def fetch_exemptions(db: Connection) -> list[tuple[str, str | None, int]]:
    """Return the exemptions that cover whole instances: reason, last day, and number of instances."""
    query = """
        SELECT reason, expires, count(*) FROM (
            SELECT DISTINCT target, instance_id, json_extract(one.value, '$.reason') AS reason,
                json_extract(one.value, '$.expires') AS expires
            FROM seen CROSS JOIN json_each(exempted) AS one WHERE violations IS NULL
        ) GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2
    """
    return db.execute(query).fetchall()


def fetch_upcoming(db: Connection, policy: Policy, today: date, *, of_scan: bool = False) -> list[Upcoming]:
    """Return how many instances (of all, or of the scan) fail each rule that does not count yet, by day."""
    query = f"""
        SELECT region, tag_key, effective_from, instances
        FROM upcoming {f"JOIN ({_READ}) USING (account_id, region)" if of_scan else ""}
        WHERE policy = ? AND effective_from > ?
    """
    rows = db.execute(query, (policy.name, str(today)))
    failing = Counter[tuple[str, str]]()
    for region, key, day, number in load_rows(rows, region=str, key=str, day=Day, instances=int):
        rule = policy.rules_by_key(region).get(key)
        if rule and str(rule.effective_from) == day:  # as it was then
            failing[day, key] += number
    return [Upcoming(key, day, number) for (day, key), number in sorted(failing.items())]


def fetch_causes(db: Connection, scan: Scan) -> list[Cause]:
    """Return what the findings of the scan that is being recorded have in common, the greatest first."""
    return _causes(db, _GROUPED.format(owner="''", source=_SEEN), _names(db, scan))


def fetch_operators(db: Connection, scan: Scan) -> list[tuple[str, int]]:
    """Return which AWS services operate instances with findings, and how many, in the scan being recorded."""
    return _count(db, _SEEN, _names(db, scan), "managed_by")


def fetch_costs(db: Connection, scan: Scan) -> tuple[list[tuple[str, float]], int]:
    """Return what the scan's findings that lack each tag cost per month, and how many have no price."""
    names = _names(db, scan)
    query = f"SELECT count(finding.monthly_cost), count(*) - count(finding.monthly_cost) {_SEEN}"
    priced, unpriced = db.execute(query, names).fetchone()
    return [(key, cost) for key, _, cost in _by_tag(db, _SEEN, names)] if priced else [], unpriced


# Three ways to count findings: of _SEEN, what the scan being recorded found, or of _OPEN, what is open.


def _count(db: Connection, source: str, names: Names, column: str) -> list[tuple[str, int]]:
    """Return how many findings have each value of a column; those without one are left out."""
    column = f"finding.{column}"
    query = f"SELECT {column}, count(*) {source} AND {column} <> '' GROUP BY 1 ORDER BY 2 DESC, 1"
    return [*load_rows(db.execute(query, names), **{column: str}, number=int)]


def _by_tag(db: Connection, source: str, names: Names) -> list[tuple[str, int, float]]:
    """Return how many findings fail each tag, and what they cost per month, the most expensive first."""
    # Each different list of keys is read once.
    query = f"""
        SELECT tag_key.value, sum(number), sum(cost) FROM (
            SELECT finding.tag_keys, count(*) AS number, coalesce(sum(finding.monthly_cost), 0.0) AS cost
            {source} GROUP BY 1
        ) CROSS JOIN json_each(tag_keys) AS tag_key GROUP BY 1 ORDER BY 3 DESC, 1
    """
    return [*load_rows(db.execute(query, names), tag_key=str, number=int, cost=float)]


MAX_CAUSES = 100
# Findings with a cause, by owner, cause and tags; the columns that differ most come first, to sort fast.
_GROUPED = """
    SELECT {owner} AS owner, finding.account_id, finding.region, finding.cause_kind, finding.cause,
        finding.tag_keys, count(*) AS number
    {source} AND finding.cause IS NOT NULL GROUP BY 5, 2, 3, 6, 4, 1
"""


def _causes(db: Connection, grouped: str, names: Names, most: int = MAX_CAUSES) -> list[Cause]:
    """Return the causes of findings in the greatest groups."""
    query = f"""
        WITH greatest AS (
            SELECT account_id, region, cause_kind, cause, sum(number) AS instances FROM ({grouped})
            GROUP BY 4, 1, 2, 3 HAVING instances > 1 ORDER BY 5 DESC, 1, 2, 3, 4 LIMIT {most}
        ), cause AS (
            SELECT greatest.*, tag_key.value AS tag_key, sum(number) AS lacking
            FROM ({grouped}) JOIN greatest USING (account_id, region, cause_kind, cause)
            CROSS JOIN json_each(tag_keys) AS tag_key GROUP BY 1, 2, 3, 4, tag_key.value
        )
        SELECT {_columns(["target", "group", "instances", "tag_key", "lacking"], "cause")} FROM cause
        ORDER BY instances DESC, account_id, region, cause_kind, cause, lacking DESC, tag_key
    """
    kinds = {"target": Target, "group": Group, "instances": int, "tag_key": str, "lacking": int}
    return [*_found_causes(load_rows(db.execute(query, names), **kinds))]


def _found_causes(rows: Iterable[tuple[Target, Group, int, str, int]]) -> Iterator[Cause]:
    """Yield a cause for each group of so many instances of which more than one lack the same tag."""
    for (target, group, instances), found in itertools.groupby(rows, key=lambda row: row[:3]):
        tags = {key: lacking for *_, key, lacking in found}
        if max(tags.values()) > 1:
            yield Cause(target, group, tags, instances)


# ---- What a state keeps ------------------------------------------------------------------------------


def require_scans(path: Path, name: str) -> None:
    """Raise StateError for a state without a scan, by this or by the older tool."""
    with opened_state(path, name) as db:
        if not (db.execute("SELECT 1 FROM scans").fetchone() or _has_older_table(db, "main")):
            advice = "restore it from a backup, or run once without --require-state"
            raise StateError(f"the state {name} has no scan yet, and --require-state is given: {advice}")


def fetch_policies(db: Connection) -> dict[str, str]:
    """Return the names of the policies of which a state has scans, each with the file it last had."""
    rows = db.execute("SELECT policy, policy_file, max(id) FROM scans GROUP BY policy ORDER BY policy")
    return {policy: file for policy, file, _ in load_rows(rows, policy=str, policy_file=str, id=int)}


def require_policy(name: Path | str, found: Sequence[str], policy: str) -> None:
    """Raise StateError where a state has no scan of a policy; `found` are the policies that it has."""
    if policy not in found:
        shown = ", ".join(map(repr, found[:20])) + (", …" if len(found) > 20 else "")
        has = f"it has scans of {shown}: name that policy's file with --policy"
        has = has if found else "run a scan first"
        raise StateError(f"the state {name} has no scan of the policy {policy!r}; {has}")


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
    owners: Sequence[str] = ()


def fetch_history(db: Connection, selection: Selection) -> Iterator[Finding]:
    """Yield the findings that a state keeps, the open ones first and of these the oldest."""
    is_in, before = "IN (SELECT value FROM json_each(:{}))".format, selection.first_seen_before
    has_key = f"EXISTS (SELECT 1 FROM json_each(tag_keys) WHERE value {is_in('keys')})"
    conditions: dict[str, tuple[str, Any]] = {
        "policy": ("policy = :policy", selection.policy),
        "instance": ("instance_id = :instance", selection.instance_id),
        "accounts": (f"account_id {is_in('accounts')}", _list_or_null(selection.accounts)),
        "regions": (f"region {is_in('regions')}", _list_or_null(selection.regions)),
        "statuses": (f"status {is_in('statuses')}", _list_or_null(selection.statuses)),
        "keys": (has_key, _list_or_null(selection.tag_keys)),
        "before": ("first_seen < :before", before and utc_text(before)),
        "owners": (f"owner {is_in('owners')}", _list_or_null(selection.owners)),
    }
    names = {name: value for name, (_, value) in conditions.items()}
    chosen = (condition for condition, value in conditions.values() if value is not None)
    # Only what orders them is sorted, not the findings themselves, which are a hundred times as much.
    query = f"""
        SELECT id FROM findings WHERE {" AND ".join(chosen)}
        ORDER BY resolved_at IS NOT NULL, coalesce(resolved_at, first_seen), {_KEY}
    """
    for number in db.execute(query, names):
        finding = db.execute(f"SELECT {_FINDING} FROM findings AS finding WHERE id = ?", number)
        yield load_record(Finding, finding.fetchone())


def fetch_aliased(db: Connection, policy: str) -> Iterator[Aliased]:
    """Yield the tags that a policy wants under their rules' own keys, as they were last seen."""
    query = f"SELECT {_columns(Aliased.__slots__, 'aliased')} FROM aliased WHERE policy = ?"
    return (load_record(Aliased, row) for row in db.execute(query, (policy,)))


def fetch_accounts(db: Connection) -> dict[str, Account]:
    """Return what is known of each account that was scanned, by its id."""
    rows = db.execute("SELECT account_id, name, paths FROM accounts")
    known = load_rows(rows, account_id=str, name=str, paths=str)
    return {account_id: Account(name, paths) for account_id, name, paths in known}


def fetch_events(db: Connection, policy: str, finding: Finding) -> list[Event]:
    """Return what happened to a finding, from NEW on."""
    # An event keeps the violations before it; those after it stand in the next one, or in the finding.
    query = """
        WITH finding AS (
            SELECT * FROM findings WHERE (policy, account_id, region, instance_id) = (?, ?, ?, ?)
        ), event AS (
            SELECT 0 AS number, first_seen AS at, 'NEW' AS event, NULL AS before, NULL AS why FROM finding
            UNION ALL
            SELECT events.id, at, event, before, events.resolution
            FROM finding JOIN events ON events.finding = finding.id
        )
        SELECT at, event, iif(
            event = 'RESOLVED', NULL, coalesce(lead(before) OVER (ORDER BY number), violations)
        ), why FROM event CROSS JOIN finding ORDER BY number
    """
    place = (policy, finding.account_id, finding.region, finding.instance_id)
    return [load_record(Event, row) for row in db.execute(query, place)]


def fetch_trend(db: Connection, policy: str) -> list[TrendPoint]:
    """Return what was open after each scan of a policy and what the scan changed, as they were recorded."""
    # Of two scans at the same time, the one that started first may be recorded last: it is the latest.
    query = f"SELECT {_columns(TrendPoint.__slots__, 'trend')} FROM trend WHERE policy = ? ORDER BY rowid"
    return [load_record(TrendPoint, row) for row in db.execute(query, (policy,))]


def fetch_standings(db: Connection, policy: str) -> list[Standing]:
    """Return how the latest scan of each target ended, and its counts from when it was last read in full."""
    query = f"""
        SELECT {_columns(["target"], "latest")},
            latest.error_code || ': ' || coalesce(latest.error_message, ''), scans.started_at,
            coalesce(read.instances, 0), coalesce(read.compliant, 0), coalesce(read.findings, 0),
            coalesce(read.exempted, 0)
        FROM ({_LATEST.format("'read', 'unread'")}) AS latest
        LEFT JOIN ({_LAST_READ}) AS read USING (account_id, region)
        LEFT JOIN scans ON scans.id = read.scan ORDER BY account_id, region
    """
    return [load_record(Standing, row) for row in db.execute(query, {"policy": policy})]


def fetch_spend(db: Connection, policy: str) -> list[tuple[str, float]]:
    """Return what the instances that were judged cost in a month, by the currency of the prices."""
    rows = db.execute("SELECT currency, sum(monthly_cost) FROM spend WHERE policy = ? GROUP BY 1", (policy,))
    return [*load_rows(rows, currency=str, cost=float)]


# The upper ends of the ages that are counted together, in days.
AGES = {
    1: "up to 1 day",
    7: "2 to 7 days",
    30: "8 to 30 days",
    90: "31 to 90 days",
    365: "91 to 365 days",
    math.inf: "over a year",
}
OLDEST_FINDINGS = 25
OWNERS_NAMED, OWNERS_SHOWN = 250, 50  # of all owners, and of these with what they have open
OWNER_DAYS, OWNER_OLDEST, OWNER_CAUSES = 30, 5, 3


class Alike(NamedTuple):
    """A finding, and how many there are of the same owner, cause, tags and time, with itself."""

    finding: Finding
    number: int


@dataclass(frozen=True, slots=True)
class OwnerFindings:
    """What one owner has open, and resolved in the last OWNER_DAYS days; no owner is known where it is ''."""

    owner: str
    total: int
    resolved: int
    monthly_cost: float | None
    trend: Sequence[TrendPoint] = ()
    causes: Sequence[Cause] = ()
    oldest: Sequence[Alike] = ()


@dataclass(frozen=True, slots=True)
class OpenFindings:
    """The open findings of a policy, counted in several ways; each list has the greatest first."""

    total: int
    by_tag: Sequence[tuple[str, int]]
    by_age: Sequence[tuple[str, int]]
    by_creator: Sequence[tuple[str, int]]
    by_owner: Sequence[tuple[str, int]]
    causes: Sequence[Cause]
    oldest: Sequence[Alike]
    priced: int
    cost_by_tag: Sequence[tuple[str, float]]
    by_operator: Sequence[tuple[str, int]]
    oldest_unread: Sequence[Alike] = ()  # in targets that the latest scan could not read
    owners: Sequence[OwnerFindings] = ()
    owners_total: int = 0


_OPEN = "FROM temp.open AS finding WHERE resolved IS NULL"
# The findings are read once, for what is counted: a million of them are a gigabyte. What was resolved lately
# is for the trends of owners.
_COUNT_OPEN = f"""
    CREATE TEMP TABLE open AS
    SELECT id, account_id, region, first_seen, tag_keys, created_by, cause_kind, cause,
        -- Costs in several currencies have no sum.
        iif((SELECT count(DISTINCT currency) FROM spend WHERE policy = :policy) > 1, NULL, monthly_cost)
            AS monthly_cost,
        managed_by, substr(resolved_at, 1, 10) AS resolved, owner
    FROM findings WHERE policy = :policy AND (resolved_at IS NULL OR resolved_at >= :since);

    CREATE INDEX temp.open_of ON open (owner, first_seen, resolved, monthly_cost);

    CREATE TEMP TABLE owned AS
    SELECT owner, sum(resolved IS NULL) AS open, count(resolved) AS resolved,
        sum(iif(resolved IS NULL, monthly_cost, NULL)) AS cost
    FROM temp.open GROUP BY 1;

    -- Each finding adds one on the day it was first seen, and takes it away on the day it was resolved.
    CREATE TEMP TABLE daily AS
    SELECT owner, first_seen AS at, count(*) AS number, sum(resolved IS NULL) AS open
    FROM temp.open GROUP BY 1, 2;

    INSERT INTO temp.daily
    SELECT owner, resolved, -count(*), 0 FROM temp.open WHERE resolved IS NOT NULL GROUP BY 1, 2;

    CREATE TEMP TABLE grouped AS {_GROUPED.format(owner="owner", source=_OPEN)};

    CREATE INDEX temp.grouped_of ON grouped (owner)
"""
_UNREAD_TARGETS = f"""(account_id, region) IN (
    SELECT account_id, region FROM ({_LATEST.format("'read', 'unread'")}) WHERE status = 'unread'
)"""


def fetch_open(db: Connection, policy: str, now: datetime) -> OpenFindings:
    """Count the open findings of a policy."""
    days = [str((now - timedelta(days=ago)).date()) for ago in range(OWNER_DAYS, -1, -1)]
    names = {"policy": policy, "since": days[0]}
    _run(db, _COUNT_OPEN, names)
    # Texts and blobs sort after numbers: where the least and the greatest cost are amounts, all are.
    query = f"SELECT count(*), count(monthly_cost), min(monthly_cost), max(monthly_cost) {_OPEN}"
    kinds = {"total": int, "priced": int, "least cost": float | None, "greatest cost": float | None}
    ((total, priced, *_),) = load_rows(db.execute(query), **kinds)
    tags = _by_tag(db, _OPEN, names)
    rows = db.execute("SELECT min(at) FROM trend WHERE policy = :policy", names)
    ((first,),) = load_rows(rows, at=Moment | None)
    known = [day for day in days if day >= (first or "")[:10]] or days[-1:]
    seen = db.execute("SELECT at, sum(open) FROM temp.daily WHERE open GROUP BY 1")
    rows = db.execute(f"SELECT * FROM temp.owned ORDER BY open DESC, resolved DESC, 1 LIMIT {OWNERS_NAMED}")
    owners = load_rows(rows, owner=str, open=int, resolved=int, cost=float | None)
    found = [*itertools.starmap(OwnerFindings, owners)]
    return OpenFindings(
        total,
        by_tag=sorted(((key, number) for key, number, _ in tags), key=lambda pair: (-pair[1], pair[0])),
        by_age=_ages(load_rows(seen, first_seen=Moment, number=int), now),
        by_creator=_count(db, _OPEN, names, "created_by"),
        by_owner=[(each.owner, each.total) for each in found if each.owner and each.total],
        causes=_causes(db, "SELECT * FROM temp.grouped", names),
        oldest=_oldest(db, f"NOT {_UNREAD_TARGETS}", names, OLDEST_FINDINGS),
        priced=priced,
        cost_by_tag=[(key, cost) for key, _, cost in tags if priced],
        by_operator=_count(db, _OPEN, names, "managed_by"),
        oldest_unread=_oldest(db, _UNREAD_TARGETS, names, OLDEST_FINDINGS),
        owners=[
            _of_owner(db, owner, names, known) if owner.total and place < OWNERS_SHOWN else owner
            for place, owner in enumerate(found)
        ],
        owners_total=db.execute("SELECT count(*) FROM temp.owned").fetchone()[0],
    )


def _of_owner(db: Connection, found: OwnerFindings, names: Names, days: Sequence[str]) -> OwnerFindings:
    """Return an owner's findings with their trend by day, their causes and the oldest of them."""
    names = {**names, "of": found.owner}
    changes = Counter[str]()
    for moment, number in db.execute("SELECT at, number FROM temp.daily WHERE owner = :of", names):
        changes[max(moment[:10], days[0])] += number
    opened = zip(days, itertools.accumulate(changes[day] for day in days), strict=True)
    trend = [TrendPoint(f"{day}T00:00:00Z", number, 0, 0, 0, 0, 0) for day, number in opened]
    causes = _causes(db, "SELECT * FROM temp.grouped WHERE owner = :of", names, OWNER_CAUSES)
    oldest = _oldest(db, "owner = :of", names, OWNER_OLDEST)
    return replace(found, trend=trend, causes=causes, oldest=oldest)


def _oldest(db: Connection, where: str, names: Names, most: int) -> list[Alike]:
    """Return the findings that are open for longest; of those that are alike, one with their number."""
    # The oldest so many groups are of the oldest so many times: only these are grouped.
    some = f"{_OPEN} AND {where}"
    query = f"""
        WITH times AS (SELECT DISTINCT first_seen {some} ORDER BY 1 LIMIT {most}), alike AS (
            SELECT min(id) AS id, count(*) AS number
            {some} AND first_seen <= (SELECT max(first_seen) FROM times)
            GROUP BY first_seen, cause, account_id, region, cause_kind, tag_keys, owner,
                iif(cause IS NULL, id, 0)
            ORDER BY first_seen, account_id, region, 1 LIMIT {most}
        )
        SELECT number, {_FINDING} FROM alike CROSS JOIN findings AS finding USING (id)
        ORDER BY finding.first_seen, {_KEY}
    """
    return [Alike(load_record(Finding, row), number) for number, *row in db.execute(query, names)]


def _ages(first_seen: Iterable[Sequence[Any]], now: datetime) -> list[tuple[str, int]]:
    """Return how many findings are of each age, by when they were first seen."""
    counts = dict.fromkeys(AGES.values(), 0)
    for moment, number in first_seen:
        age = (now - datetime.fromisoformat(moment)) / timedelta(days=1)
        counts[next(label for days, label in AGES.items() if age <= days)] += number
    return [*counts.items()]


class Pruned(NamedTuple):
    """How many rows of each table were deleted, or would be."""

    events: int = 0
    findings: int = 0
    coverage: int = 0
    scans: int = 0


def prune_state(path: Path, before: datetime, name: str) -> Pruned:
    """Delete from a state what is older than a time, except the trend, and free the space."""
    with opened_state(path, name) as db:
        with writing_state(db, name):
            names = {"before": utc_text(before)}
            pruned = Pruned(*(db.execute(query, names).rowcount for query in _PRUNE.split(";")))
        free, pages = (db.execute(f"PRAGMA {what}_count").fetchone()[0] for what in ("freelist", "page"))
        if free > pages / 4:
            try:
                db.execute("VACUUM")
            except sqlite3.OperationalError as error:  # it needs space for a copy
                LOG.info("the file keeps its size: %s", error)
    return pruned


# A target's last full reading stays, however old: it is all that is known of one no longer readable.
_PRUNE = """
    DELETE FROM events WHERE finding IN (SELECT id FROM findings WHERE resolved_at < :before);
    DELETE FROM findings WHERE resolved_at < :before;
    DELETE FROM coverage WHERE scan IN (SELECT id FROM scans WHERE started_at < :before)
        AND (scan, account_id, region) NOT IN (
            SELECT max(scan), account_id, region FROM coverage JOIN scans ON scans.id = scan
            WHERE coverage.status = 'read' AND started_at < :before GROUP BY policy, account_id, region
        );
    DELETE FROM scans WHERE started_at < :before
        AND id NOT IN (SELECT scan FROM coverage) AND id NOT IN (SELECT last_scan FROM findings)
"""

# ---- What is sent about a scan -----------------------------------------------------------------------


def queue_notifications(db: Connection, scan: Scan, endings: Sequence[str]) -> None:
    """Record, in the transaction of a scan, what each channel has to be sent: it is pending until then."""
    # That is a finding when it opens, and again where it was sent last before it reached an age of
    # `reminders`; an unread target once until it is read; the end of an exemption once.
    notify = scan.policy.notify or Notify()
    names = _names(db, scan) | {"channels": to_json(notify.channels), "endings": to_json(endings)}
    _run(db, _QUEUE_NOTIFICATIONS, names)


_FINDING_SUBJECT = "'finding ' || finding.account_id || ' ' || finding.region || ' ' || finding.instance_id"
_UNREAD = (
    "SELECT 'unread ' || account_id || ' ' || region AS subject FROM target WHERE error_code IS NOT NULL"
)
# Since when a finding is open, and of the ages to remind at the greatest that it has reached, or NULL.
_OPENED = """coalesce(iif(finding.times_reopened, (
    SELECT max(at) FROM state.events AS past WHERE past.finding = finding.id AND past.event = 'REOPENED'
), NULL), finding.first_seen)"""
_DAYS = "(strftime('%s', {}) - strftime('%s', {})) / 86400"
_DUE = f"""
    SELECT {_FINDING_SUBJECT} AS subject, {_OPENED} AS opened, (
        SELECT max(value) FROM json_each(:ages) WHERE {_DAYS.format(":now", _OPENED)} >= value
    ) AS age
"""
_QUEUE_NOTIFICATIONS = f"""
    DELETE FROM state.notifications WHERE policy = :policy AND subject IN (
        SELECT {_FINDING_SUBJECT} FROM resolved JOIN state.findings AS finding ON id = resolved.finding
        UNION ALL SELECT 'unread ' || account_id || ' ' || place.value
            FROM target, json_each(json_array(region, '*')) AS place WHERE error_code IS NULL
        EXCEPT {_UNREAD}
    );
    INSERT OR REPLACE INTO state.notifications
    SELECT :policy, subject, channel.value, NULL
    FROM (SELECT {_FINDING_SUBJECT} AS subject {_SEEN} AND finding.status IN ('NEW', 'REOPENED'))
    CROSS JOIN json_each(:channels) AS channel;

    INSERT OR REPLACE INTO state.notifications
    SELECT :policy, due.subject, channel.value, NULL
    FROM ({_DUE} {_SEEN} AND finding.status = 'REPEAT' AND :ages <> '[]') AS due
    CROSS JOIN json_each(:channels) AS channel LEFT JOIN state.notifications AS told
        ON (told.policy, told.subject, told.channel) = (:policy, due.subject, channel.value)
    WHERE age AND (told_at IS NULL OR {_DAYS.format("told_at", "opened")} < age);

    INSERT OR IGNORE INTO state.notifications
    SELECT :policy, subject, channel.value, NULL
    FROM (SELECT value AS subject FROM json_each(:endings) UNION ALL {_UNREAD})
    CROSS JOIN json_each(:channels) AS channel
"""


def fetch_pending(db: Connection, policy: str, subject: str) -> set[str]:
    """Return the channels that a subject is pending for."""
    query = "SELECT channel FROM state.notifications WHERE policy = ? AND subject = ? AND told_at IS NULL"
    return {channel for (channel,) in db.execute(query, (policy, subject))}


def fetch_reminder(db: Connection, scan: Scan, finding: Finding) -> tuple[int, str]:
    """Return the age in days that a pending finding is a reminder of, else 0, and since when it is open."""
    if finding.status is not Status.REPEAT:
        return 0, ""
    place = "(policy, account_id, region, instance_id) = (:policy, :account_id, :region, :instance_id)"
    names = _names(db, scan) | to_record(finding, _KEY.split(", "))
    _, opened, age = db.execute(f"{_DUE} FROM state.findings AS finding WHERE {place}", names).fetchone()
    return age or 0, opened


class DigestLine(NamedTuple):
    """What a digest has to say; `line` is None but for findings, and "" for those that are only counted."""

    channel: str
    recipient: str  # "" except for owners
    subject: str | None  # None: the channel was sent it before
    line: str | None = None
    age: int = 0  # of a reminder, in days
    owner: str = ""
    cause: str | None = None  # for owners, as JSON: the target's two ids, and the group's kind and name
    tag_keys: str = "[]"


# An age, how many findings, and their first lines with owners.
Listed = tuple[int, int, list[tuple[str, str]]]


class Recipient(NamedTuple):
    """A recipient of a channel: the owner of all its findings if that is one, and for owners the causes."""

    to: str
    owner: str | None
    found: Sequence[Listed]
    causes: Sequence[Cause]


def add_digest_lines(db: Connection, lines: Iterable[DigestLine]) -> None:
    """Keep what belongs in digests until they are sent."""
    db.execute("DELETE FROM digest_line")
    db.executemany("INSERT INTO digest_line VALUES (?, ?, ?, ?, ?, ?, ?, ?)", lines)


def fetch_recipients(db: Connection, channel: str, limit: int) -> Iterator[Recipient]:
    """Yield the recipients of a channel, with so many lines at most of each list of findings."""
    lists = """
        SELECT recipient, age, count(line), min(owner), max(owner) FROM digest_line WHERE channel = ?
        GROUP BY 1, 2 ORDER BY 1, 2
    """
    lines = """
        SELECT line, owner FROM digest_line
        WHERE (channel, recipient, age) = (?, ?, ?) AND line <> '' ORDER BY rowid LIMIT ?
    """
    grouped = """
        WITH line AS (
            SELECT cause, tag_keys, count(*) OVER (PARTITION BY cause) AS instances FROM digest_line
            WHERE (channel, recipient) = (?, ?) AND cause IS NOT NULL
        )
        SELECT cause, instances, tag_key.value, count(*) FROM line CROSS JOIN json_each(tag_keys) AS tag_key
        GROUP BY 1, 3 ORDER BY 2 DESC, 1, 4 DESC, 3
    """
    for to, found in itertools.groupby(db.execute(lists, (channel,)), operator.itemgetter(0)):
        rows = [*found]
        owners = {owner for *_, first, last in rows for owner in (first, last)}
        listed = [
            (age, number, db.execute(lines, (channel, to, age, limit)).fetchall())
            for _, age, number, *_ in rows
        ]
        lacking = db.execute(grouped, (channel, to))
        places = ((json.loads(cause), *counts) for cause, *counts in lacking)
        causes = _found_causes((Target(*at[:2]), Group(*at[2:]), *counts) for at, *counts in places)
        most = [*itertools.islice(causes, MAX_CAUSES)]
        yield Recipient(to, owners.pop() if len(owners) == 1 else None, listed, most)


def drop_digest(db: Connection, channel: str, recipient: str) -> None:
    """Forget what could not be sent, so that it stays pending."""
    db.execute("DELETE FROM digest_line WHERE (channel, recipient) = (?, ?)", (channel, recipient))


def record_sent(db: Connection, state: State, policy: str, channel: str, sent_at: datetime) -> None:
    """Record in the state that a channel was sent what `digest_line` still has; raises StateError."""
    sent = "SELECT ?, ?, channel, subject FROM digest_line WHERE channel = ? AND subject IS NOT NULL"
    values = (utc_text(sent_at), policy, channel)
    for path in state.attempts() if db.execute(sent, values).fetchone() else ():
        with opened_state(path, state.name) as copy, writing_state(copy, state.name):
            query = "UPDATE notifications SET told_at = ? WHERE policy = ? AND channel = ? AND subject = ?"
            copy.executemany(query, db.execute(sent, values))


# ---- Where a state is: a local file, or S3 (conditional puts: 409, 412; damaged transfers; tries) ----


class LocalState:
    """A state in a local file; without `create` a missing one is a MissingStateError."""

    def __init__(self, path: Path, name: str = "", *, create: bool = True) -> None:
        self.path = Path(os.path.realpath(path))
        self.name, self._create = name or str(self.path), create
        # Otherwise whoever may write the link chooses where a new state is created.
        if path.is_symlink() and not os.path.lexists(self.path):
            message = f"the state {path} is a link to {self.path}, which does not exist: put the state there"
            raise StateError(f"{message}, or name its file with --state")

    def check(self) -> None:
        """Check before the scan that it can be used; raises StateError."""
        check_state(self.path, self.name, create=self._create)

    def attempts(self, scan_id: str | None = None) -> Iterator[Path]:
        """Yield the file to record into, once: a committed transaction is final."""
        yield self.path

    def release_signals(self) -> None:
        """Do nothing: no signal is held back."""

    def copied(self, copy: Path) -> LocalState:
        """Return a copy of it as of its last transaction, a new state if there is none; raises StateError."""
        try:
            with opened_state(self.path, self.name) as db, contextlib.closing(sqlite3.connect(copy)) as new:
                db.backup(new)
        except MissingStateError:
            if not self._create:
                raise
        return LocalState(copy, self.name)


S3_TRIES = 40
# This many tries may fail this way; after that the state is damaged, or the line is too slow.
S3_LIMITS = {"damaged": 3, "timed out": 2}
S3_SECONDS = 1800.0  # for one transfer: a state of a gigabyte over a slow line
S3_PAUSE = 3.0  # seconds at most between two tries; the pauses are random, so that agents do not meet again
Release = Callable[[], None]  # lets signals come again that were held


class _RetryError(StateError):
    """A transfer of the state failed in a way that may pass: S3 or the state is busy, or see S3_LIMITS."""

    def __init__(self, message: str, kind: Literal["busy", "damaged", "timed out"] = "busy") -> None:
        super().__init__(message)
        self.kind = kind


class S3State:
    """A state in S3, recorded into a copy that takes its place only if no other scan was faster."""

    def __init__(
        self, s3: Any, bucket: str, key: str, path: Path, hold: Callable[[], Release], *, create: bool = True
    ) -> None:
        self.path, self.name, self._create = path, f"s3://{bucket}/{key}", create
        self._s3, self._object, self._hold_signals = s3, {"Bucket": bucket, "Key": key}, hold
        self.release_signals: Release = lambda: None

    def check(self) -> None:
        """Find out before the scan whether it can be read; raises StateError."""
        next(self.attempts())

    def copied(self, copy: Path) -> LocalState:
        """Return the copy that was downloaded; raises StateError."""
        self.check()
        return LocalState(self.path, self.name)

    def attempts(self, scan_id: str | None = None) -> Iterator[Path]:
        """Yield a fresh copy to record into, until one takes the state's place; raises StateError."""
        # The SDK repeats a put whose answer was lost, and S3 then refuses it because of itself: only the
        # scan's id in the state tells that it was not another scan's.
        tries: Counter[str] = Counter()
        recorded = False
        while True:
            try:
                etag = self._download()
                with opened_state(self.path, self.name) as db:
                    if db.execute("SELECT 1 FROM scans WHERE scan_id = ?", (scan_id,)).fetchone():
                        return
                yield self.path
                recorded = True
                self._upload(etag)
                return
            except _RetryError as error:
                tries[error.kind] += 1
                number = tries.total()
                if tries[error.kind] >= S3_LIMITS.get(error.kind, S3_TRIES):
                    if error.kind == "damaged" and not recorded:
                        raise
                    given_up = f"given up after {counted(number, 'try', 'tries')}, the last of which ended in"
                    message = (
                        f"the state {self.name}: {given_up} {error}; the scan is not recorded, run again"
                    )
                    raise UploadError(message) from error
                LOG.debug("%s: %s; trying again", self.name, error)
                time.sleep(random.uniform(0, min(S3_PAUSE, 0.1 * 2**number)))

    def _download(self) -> str | None:
        """Fetch the state and check it; return its ETag, or None where a new state begins."""

        def fetch() -> Mapping[str, Any]:
            answer: dict[str, Any] = self._s3.get_object(**self._object)
            shutil.copyfileobj(answer["Body"], file)
            return answer

        new = self.path.with_suffix(".new")
        with new.open("wb") as file:
            etag = self._call("GetObject", fetch)
        if not etag:
            new.unlink()
            if not self._create:
                raise MissingStateError(self.name)
        self._check(new, create=not etag)
        new.replace(self.path)
        return etag

    def _upload(self, etag: str | None) -> None:
        """Put the copy in the place of what it was made from, or of nothing; signals wait until then."""
        self._check(self.path, create=False)  # else an empty state would replace what was recorded
        condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        release = self._hold_signals()  # a put that is cut off may have been carried out
        try:
            with self.path.open("rb") as body:
                arguments = {"Body": body, **self._object, **condition}
                if not self._call("PutObject", lambda: self._s3.put_object(**arguments)):
                    raise _RetryError("the state was deleted meanwhile")
        except StateError:
            release()
            raise
        self.release_signals = release

    def _check(self, path: Path, *, create: bool) -> None:
        """Check a copy of the state, which may be damaged because its transfer was; raises _RetryError."""
        try:
            check_state(path, self.name, create=create)
        except StateError as error:
            raise _RetryError(str(error), "damaged") from error

    def _call(self, operation: str, call: Callable[[], Mapping[str, Any]]) -> str | None:
        """Return the ETag in an answer of S3, None if there is no state; raises _RetryError or StateError."""
        # 412 is for a state that another scan was faster to replace, 409 for one that is being replaced (S3
        # user guide, conditional writes): it takes a fresh copy to try again, so botocore never does.
        try:
            answer = within(S3_SECONDS, call)
        except Exception as cause:
            error = call_error(cause, f"s3:{operation}")
        else:
            if "ETag" in answer:
                return str(answer["ETag"])
            message = f"the state {self.name}: the answer is not S3's: check the network and the proxy"
            raise _RetryError(message, "damaged")
        if isinstance(error, CallError):
            if error.code == "NoSuchKey":
                return None
            if error.code == "CallTimeout":
                raise _RetryError(str(error), "timed out")
            passes = error.transient or error.status in (409, 412, 429) or error.status >= 500
            if passes or error.code in ("SlowDown", "RequestTimeout"):
                raise _RetryError(str(error))
        raise StateError(f"the state {self.name}: {error}") from error


def split_s3(location: str) -> tuple[str, str]:
    """Return bucket and key of s3://BUCKET/KEY; raises UsageError."""
    bucket, _, key = location.removeprefix("s3://").partition("/")
    if not bucket or not key or key.endswith("/"):
        raise UsageError(f"{printable(location)}: name the state as s3://BUCKET/KEY")
    return bucket, key


State = LocalState | S3State


@contextlib.contextmanager
def reading_state(state: State) -> Iterator[Connection]:
    """Yield a connection on which a state stays as it is now, for reading; raises StateError."""
    if isinstance(state, S3State):
        state.check()
    with opened_state(state.path, state.name) as db, transaction(db, "DEFERRED"):
        if _state_version(db, state.name) == len(MIGRATIONS):
            yield db
            return
        # It is brought up to date in a private copy: reading writes nothing.
        with contextlib.closing(_connect()) as copy:
            db.backup(copy)
            _migrate(copy, state.name)
            yield copy


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
    fresh: Callable[[], Iterator[Finding]]  # of the findings, those that are NEW or REOPENED
    oldest: Sequence[Finding]  # of the others, a few
    resolved: Callable[[], Iterator[Finding]]
    exempted: Callable[[], Iterator[ExemptedInstance]]
    causes: Sequence[Cause]
    costs: Sequence[tuple[str, float]]
    unpriced: int
    operators: Sequence[tuple[str, int]]
    upcoming: Sequence[Upcoming]
    exemptions: Sequence[tuple[str, str | None, int]]
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
    "State CreatedBy SuggestedTags Error ManagedBy AccountName".split()
)


def write_csv(file: TextIOBase, report: ScanReport | HistoryReport) -> None:
    """Write one row per finding and, so that none looks clean, one per unread target (Status UNREAD)."""
    file.write(csv_line(CSV_COLUMNS))
    file.writelines(csv_line(_finding_cells(finding)) for finding in report.findings())
    for unread in report.unread:
        cells = {"Status": "UNREAD", "AccountId": unread.target.account_id, "Region": unread.target.region}
        cells["AccountName"] = unread.target.account_name
        cells["Error"] = f"{unread.error_code}: {unread.error_message}"
        file.write(csv_line(cells.get(column, "") for column in CSV_COLUMNS))


def _finding_cells(finding: Finding) -> list[str]:
    """Return a finding's cells, as CSV_COLUMNS; an empty tag is missing, a wrong value invalid."""
    wrong = [v for v in finding.violations if v.type is ViolationType.NONCOMPLIANT_VALUE]
    missing = ",".join(v.tag_key for v in finding.violations if v not in wrong)
    invalid = ",".join(f"{v.tag_key}={v.value}" for v in wrong)
    first, last = _csv_time(finding.first_seen), _csv_time(finding.last_seen)
    cells = [finding.instance_id, missing, _csv_time(finding.launch_time), invalid]
    cells += [finding.status, first, last, str(finding.times_seen), finding.account_id, finding.region]
    cells += [finding.name, finding.state, finding.creator, ", ".join(map(str, finding.suggestions))]
    return [*cells, "", finding.managed_by or "", finding.account_name]


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
    return f"{','.join(map(_quoted_cell, texts))}\n"


@functools.lru_cache(1000)  # most cells of a file are the same
def _quoted_cell(text: str) -> str:
    """Return a cell as it stands in a line."""
    cell = csv_cell(text)
    return '"' + cell.replace('"', '""') + '"' if _QUOTED.search(cell) else cell


# Violations, suggestions, events and changes are dataclasses.
_encode = json.JSONEncoder(default=to_record).encode


def write_json_object(file: TextIOBase, head: Mapping[str, Any], **lists: Iterable[object]) -> None:
    """Write an object: the keys of its head, then its lists, one line per record, which are streamed."""
    file.write("{\n" + ",\n".join(f"{_encode(key)}: {_encode(value)}" for key, value in head.items()))
    for key, records in lists.items():
        file.write(f",\n{_encode(key)}: [")
        for number, record in enumerate(records):
            file.write((",\n" if number else "\n") + _encode(record))
        file.write("]")
    file.write("\n}\n")


def write_json(file: TextIOBase, report: ScanReport) -> None:
    """Write the report as one JSON object, with one line per target and per finding."""
    scan = report.scan
    head = {
        "version": __version__,
        "policy": to_record(scan.policy, ("name", "file", "digest")),
        "scan_id": scan.scan_id,
        "started_at": utc_text(scan.started_at),
        "finished_at": utc_text(report.finished_at),
        "dry_run": report.dry_run,
        "exit_code": int(report.exit_code),
        "exit_name": report.exit_code.name,
        "summary": report.totals,
        "monthly_cost_without": dict(report.costs),
        "currency": report.scan.currency or None,
        "upcoming": [to_record(rule) for rule in report.upcoming],
        "notices": list(report.notices),
    }
    if report.dry_run:
        head["preview"] = _preview(report)
    write_json_object(
        file,
        head,
        coverage=map(_coverage_record, report.coverage),
        causes=itertools.chain.from_iterable(map(_cause_records, report.causes)),
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


_TARGET_KEYS = ("account_id", "account_name", "region")


def _coverage_record(coverage: Coverage) -> dict[str, Any]:
    """Return how far a target was read as a JSON object."""
    error = None if coverage.read else {"code": coverage.error_code, "message": coverage.error_message}
    counts = to_record(coverage, ("instances", "compliant", "findings", "exempted", "too_young"))
    reading = {"status": "unread" if error else "read", "error": error}
    return to_record(coverage.target, _TARGET_KEYS) | reading | counts


def _cause_records(cause: Cause) -> Iterator[dict[str, Any]]:
    """Yield each tag that findings of a group have in common as a JSON object."""
    for key, number in cause.tags.items():
        if number > 1:
            message = str(replace(cause, tags={key: number}, instances=number))
            what = {"tag_key": key, "instances": number, "message": message}
            yield to_record(cause.target, _TARGET_KEYS) | cause.group._asdict() | what


_FINDING_KEYS = (
    "account_id account_name region instance_id name state launch_time status violations first_seen "
    "last_seen times_seen times_reopened instance_type monthly_cost managed_by created_by cause suggestions"
).split()


def _finding_record(finding: Finding) -> dict[str, Any]:
    """Return a finding as a JSON object; a resolved one says when and why it was resolved."""
    ending = ("resolved_at", "resolution") if finding.status is Status.RESOLVED else ()
    others = {"managed_by": finding.managed_by or None, "created_by": finding.creator or None}
    cause = {"cause": finding.cause and finding.cause._asdict()}
    return to_record(finding, [*_FINDING_KEYS, *ending]) | others | cause


def _exempted_record(exempted: ExemptedInstance) -> dict[str, Any]:
    """Return an exempted instance as a JSON object."""
    where = to_record(exempted, (*_TARGET_KEYS, "instance_id"))
    instance = {"name": exempted.tags.get("Name", ""), **to_record(exempted, ("state", "launch_time"))}
    return where | instance | {"violations": [exempted_record(case) for case in exempted.exempted]}


def _preview(report: ScanReport) -> dict[str, dict[str, int]]:
    """Return, tag by tag, how many findings the scan opens, and how many it closes as policy_changed."""
    opened = (finding for finding in report.findings() if finding.status is Status.NEW)
    closed = (finding for finding in report.resolved() if finding.resolution is Resolution.POLICY_CHANGED)
    changes = {"new": opened, "policy_changed": closed}
    counts = {
        name: Counter(v.tag_key for case in cases for v in case.violations) for name, cases in changes.items()
    }
    return {name: dict(tag_keys.most_common()) for name, tag_keys in counts.items()}


def write_junit(file: TextIOBase, report: ScanReport) -> None:
    """Write one suite per target: its `scan` case, so that a clean one is not empty, and a case per finding.

    Jenkins keeps a case's history under its name, so names hold no counts and no dates.
    """
    totals, begun = report.totals, report.scan.started_at
    tests = totals["targets"] + totals["findings"] + totals["exempted"]
    counts = {"tests": tests, "failures": totals["findings"], "errors": totals["targets_unread"]}
    timestamp = utc_text(begun).removesuffix("Z")
    seconds = f"{(report.finished_at - begun).total_seconds():.3f}"
    file.write('<?xml version="1.0" encoding="UTF-8"?>\n')
    file.write(_start_tag("testsuites", name="tagcheck", time=seconds, **counts))
    # All three are sorted by place, and a target comes right before the cases in it.
    cases: Iterator[Case] = heapq.merge(report.coverage, report.findings(), report.exempted(), key=_place)
    for (account_id, region), group in itertools.groupby(cases, key=lambda case: _place(case)[:2]):
        suite = f"{account_id}.{region}"
        for case in group:
            if isinstance(case, Coverage):
                counts = {"tests": 1 + case.findings + case.exempted, "failures": case.findings}
                counts |= {"errors": int(not case.read), "skipped": case.exempted, "time": 0}
                file.write(_start_tag("testsuite", name=suite, timestamp=timestamp, **counts))
            name = _place(case)[2] or "scan"
            file.write(_start_tag("testcase", classname=suite, name=name, time=0))
            file.write(f"{_outcome(case)}</testcase>\n")
        file.write("</testsuite>\n")
    file.write("</testsuites>\n")


Case = Coverage | Finding | ExemptedInstance


def _place(case: Case) -> tuple[str, str, str]:
    """Return what cases are sorted by: account, region and instance."""
    if isinstance(case, Coverage):
        return case.target.account_id, case.target.region, ""
    return case.account_id, case.region, case.instance_id


def _outcome(case: Case) -> str:
    """Return the error of an unread target, the failure of a finding, or why an instance is exempted."""
    if isinstance(case, Coverage):
        error = {"type": case.error_code, "message": case.error_message}
        account = html.escape(printable(f"account {case.target}"))
        return "" if case.read else f"{_start_tag('error', **error)}{account}</error>"
    if isinstance(case, ExemptedInstance):
        account = html.escape(printable(f"account {account_text(case.account_id, case.account_name)}"))
        return f"{_start_tag('skipped', message='; '.join(map(str, case.exempted)))}{account}</skipped>"
    messages = [violation.message for violation in case.violations]
    types = ",".join(dict.fromkeys(violation.type for violation in case.violations))
    history = f"{case.status}, seen {counted(case.times_seen, 'time')} since {case.first_seen}"
    lines = [f"{case.instance_id} {case.name} ({case.state})", f"account {case.target}", history, *messages]
    text = html.escape("\n".join(map(printable, lines)))
    return f"{_start_tag('failure', type=types, message='; '.join(messages))}{text}</failure>"


def _start_tag(tag: str, /, **attributes: object) -> str:
    """Return the start tag of an XML element; XML has no place for most controls."""
    pairs = (f' {key}="{html.escape(printable(str(value)))}"' for key, value in attributes.items())
    return f"<{tag}{''.join(pairs)}>"


# A new format needs its writer, its row here, and its option in the lists of the command line.
WRITERS = {"csv": write_csv, "json": write_json, "junit": write_junit}
HISTORY_WRITERS = {"csv": write_csv, "json": write_history_json}

SUMMARY_FINDINGS = 20  # rows of a table that people read
SUMMARY_CAUSES = SUMMARY_OLDEST = 5
TABLE_HEAD = ("STATUS", "ACCOUNT", "REGION", "INSTANCE", "NAME", "SINCE", "VIOLATIONS")
COLOURS = {"NEW": 31, "RESOLVED": 32, "REPEAT": 33, "REOPENED": 35, "EXEMPTED": 36}
COLOURS |= {"VIOLATIONS": 31, "COMPLIANT": 32, "INCOMPLETE": 33}
Rows = Iterable[Sequence[str]]
_COLOURED = re.compile(rf"^(Exit code \d+ )?({'|'.join(COLOURS)})\b", re.MULTILINE)


def in_columns(rows: Rows) -> Iterator[str]:
    """Yield a line per row with its cells aligned, laying out 1,000 rows at a time."""
    rows = iter(rows)
    former: list[list[str]] = []
    while block := [[*map(printable, row)] for row in itertools.islice(rows, 1000)]:
        widths = [max(map(display_width, column)) for column in zip(*former, *block, strict=True)]
        former = [[" " * width for width in widths]]  # the next block is at least as wide
        for row in block:
            padded = (
                cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)
            )
            yield "  ".join(padded).rstrip()


WIDE = 120  # columns from which on a table also holds what an instance lacks


class Command(NamedTuple):
    """A line that ends in a command for a shell; no text of strangers is taken for one."""

    before: str
    words: Sequence[str]

    def __str__(self) -> str:
        return f"{self.before} {shlex.join(self.words)}"


def command_lines(words: Iterable[str], width: int) -> list[str]:
    """Return a command, whose words are quoted, in lines that fit and still work when they are copied."""
    lines = [" "]
    for word in words:
        if lines[-1].strip() and len(f"{lines[-1]} {word} \\") > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return lines


def fitted(line: str | Command, width: int | None) -> list[str]:
    """Return a line in printable parts that fit a terminal."""
    text = printable(str(line))
    if width is None or len(text) <= width:
        return [text]
    if isinstance(line, Command):
        return [line.before, *command_lines(map(shlex.quote, map(printable, line.words)), width)]
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    wrapper = textwrap.TextWrapper(width, subsequent_indent=indent)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.wrap(text) or [text]


def table(head: Sequence[str], rows: Rows, width: int | None, details: int = 1) -> Iterator[str]:
    """Yield rows under their head: in full, or so that they fit a terminal.

    Then the account and the region stand above if all rows have the same, and the last columns, which are
    details, below each row where the terminal is narrow.
    """
    rows = iter(rows)
    if width is None and (first := next(rows, None)):
        yield from in_columns(itertools.chain(filter(None, [head]), [first], rows))
    while width is not None and (block := [*map(tuple, itertools.islice(rows, 1000))]):
        yield from _block(head, block, width, details)


def _block(head: Sequence[str], block: Sequence[Sequence[str]], width: int, details: int) -> Iterator[str]:
    """Yield a part of a table that fits a terminal."""
    place = [column for column, title in enumerate(head) if title in ("ACCOUNT", "REGION")]
    shared = [column for column in place if len({row[column] for row in block}) == 1]
    if shared:
        words = ", ".join(block[0][column] for column in shared)
        yield from fitted(f"{head[shared[0]].capitalize()} {words}", width)
    every = [column for column in range(len(head)) if column not in shared]
    short = every[:-details]
    least = [column for column in short if column not in place]
    for columns in ([every] if width >= WIDE else []) + [short, least]:
        lines = [*in_columns([row[column] for column in columns] for row in (head, *block))]
        if max(map(display_width, lines)) <= width:
            break
    below = [column for column in every if column not in columns]
    for line, row in zip(lines, (None, *block), strict=True):
        yield from fitted(line, width)
        if row and (detail := "  ".join(filter(None, (printable(row[column]) for column in below)))):
            yield from fitted(f"          {detail}", width)


def table_lines(
    rows: Rows, number: int, width: int | None, head: Sequence[str], file: str = "", details: int = 1
) -> list[str]:
    """Return the first of so many rows under their head, and how many more there are, in which file."""
    shown = list(itertools.islice(rows, SUMMARY_FINDINGS))
    return [*table(head, shown, width, details), *more_lines(number - len(shown), file)]


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


def write_summary(
    file: IO[str],
    report: ScanReport,
    csv_path: str,
    state: str,
    command: Sequence[str],
    width: int | None,
    *,
    colour: bool,
) -> None:
    """Write for people what to do, the most urgent first, then where everything is and how the run ends.

    `command` are the words that explain an instance, but for its id.
    """
    paragraphs = [
        "\n".join(part for line in lines for part in fitted(line, width))
        for lines in _summary(report, csv_path, state, command, width)
        if lines
    ]
    text = "\n\n".join(paragraphs) + "\n"
    if colour:
        text = _COLOURED.sub(lambda word: f"{word[1] or ''}\x1b[{COLOURS[word[2]]}m{word[2]}\x1b[0m", text)
    file.write(text)


def _summary(
    report: ScanReport, csv_path: str, state: str, command: Sequence[str], width: int | None
) -> Iterator[Sequence[str | Command]]:
    """Yield the paragraphs of the summary, an empty one where there is nothing to say."""
    policy, totals, code = report.scan.policy, report.totals, report.exit_code
    read, found = count_lines(totals)
    dry_run = " — a dry run, nothing is recorded" if report.dry_run else ""
    yield [f"Policy {policy.name} ({policy.file}): {read}{dry_run}", found]
    unread = [f"  {target.target}  {target.error_code}: {target.error_message}" for target in report.unread]
    yield unread and ["Could not be read (their findings are unchanged):", *unread]
    yield list(itertools.islice(cause_lines(report.causes), SUMMARY_CAUSES))
    fresh, number = [*itertools.islice(report.fresh(), SUMMARY_FINDINGS)], totals["new"] + totals["reopened"]
    yield table_lines(map(_finding_row, fresh), number, width, TABLE_HEAD, csv_path)
    oldest = table_lines(map(_finding_row, report.oldest), totals["repeat"], width, TABLE_HEAD, csv_path)
    yield oldest and [f"{counted(totals['repeat'], 'finding')} REPEAT, the oldest first:", *oldest]
    resolved = (_row(finding.status, finding, finding.resolution or "") for finding in report.resolved())
    yield table_lines(resolved, totals["resolved"], width, (*TABLE_HEAD[:5], "WHY") if width else ())
    yield [
        f"EXEMPTED  {counted(number, 'instance')}{f' until {expires}' if expires else ''}: {reason}"
        for reason, expires, number in report.exemptions
    ]
    managed = totals["findings_managed"]
    are = "is on an instance" if managed == 1 else "are on instances"
    services = ", ".join(f"{service} ({number:,})" for service, number in report.operators)
    yield [f"{counted(managed, 'finding')} {are} that an AWS service operates: {services}"] if managed else []
    money = f" {report.scan.currency}".rstrip()
    costs = [f"{cost:,.2f}{money} a month without {tag_key}" for tag_key, cost in report.costs]
    left_out = f"left out: {counted(report.unpriced, 'finding')} without a price"
    yield [*costs, left_out] if report.costs and report.unpriced else costs
    for change, numbers in _preview(report).items() if report.dry_run else ():
        title = "RESOLVED as policy_changed" if change == "policy_changed" else "NEW"
        lines = [f"  {number:>9,}  {tag_key}" for tag_key, number in numbers.items()]
        yield lines and [f"Findings that would be {title}, by required tag:", *lines]
    yield list(map(str, report.upcoming))
    yield report.notices
    ending: list[str | Command] = [f"Findings: {csv_path}"] if csv_path not in ("", "-") else []
    if not report.dry_run:
        ending.append(f"State: {state}")
        for finding in [*fresh, *report.oldest][:1]:
            ending.append(Command("Explain a finding:", [*command, finding.instance_id]))
    end = f" {code.name}: {code.meaning}"
    if code is ExitCode.COMPLIANT and totals["findings"]:
        end = f": {counted(totals['findings'], 'finding')}; --fail-on counts none"
    yield [*ending, f"Exit code {int(code)}{end}"]


def _finding_row(finding: Finding) -> tuple[str, ...]:
    """Return a finding as a row of the summary."""
    since = "-" if finding.status is Status.NEW else finding.first_seen[:10]
    return _row(finding.status, finding, since, ", ".join(short_violations(finding)))


def name_cell(name: str) -> str:
    """Return a name as a table shows it: cut if it is long, a dash if there is none."""
    return cut_text(name, 24) or "-"


def _row(status: str, finding: Finding, *more: str) -> tuple[str, ...]:
    """Return a row of a table: what became of an instance, where it is, its name, and what more is to say."""
    account = cut_text(finding.target.account, 32)
    return status, account, finding.region, finding.instance_id, name_cell(finding.name), *more


def short_violations(finding: Finding, *, unsure: bool = False) -> list[str]:
    """Return violations in a few words: "Environment=prd (prod?)", "Owner missing (has owner; alice?)".

    With `unsure` also the values that are less likely: "Owner missing (maybe alice?)".
    """
    likely = {
        s.tag_key: f"{'' if s.confidence >= MIN_CONFIDENCE else 'maybe '}{cut_text(s.value, 40)}?"
        for s in finding.suggestions
        if unsure or s.confidence >= MIN_CONFIDENCE
    }
    texts = []
    for violation in finding.violations:
        wrong = violation.type is ViolationType.NONCOMPLIANT_VALUE
        what = f"={cut_text(violation.value or '', 40)}" if wrong else f" {violation.type}"
        found = f"has {cut_text(violation.found_key, 40)}" if violation.found_key else ""
        notes = "; ".join(filter(None, [found, likely.get(violation.tag_key)]))
        texts.append(violation.tag_key + what + (f" ({notes})" if notes else ""))
    return texts


def explain_region(policy: Policy, region: str, today: date) -> Iterator[str]:
    """Yield the rules in force in a region, each with its line in the policy."""
    here = "every region that is not named" if region == "*" else region
    yield f"Policy {policy.name} in {here}:"
    for rule in policy.rules(region):
        yield f"  {rule.key}: {', '.join(_meaning(rule, today))} {_rule_place(policy, rule)}"
    if policy.placeholder_values:
        yield f"  These count as empty: {', '.join(sorted(policy.placeholder_values))}"
    yield f"  States checked: {', '.join(sorted(policy.states))}"
    if policy.grace_period:
        yield f"  Not judged within {policy.grace_period} of their launch"
    for exemption in policy.exemptions:
        if exemption.holds(today) and (region == "*" or not exemption.regions or region in exemption.regions):
            until = f" until {exemption.expires}" if exemption.expires else ""
            which = ", ".join(exemption.required_tags) or "all tags"
            yield f"  Exempted{until} from {which}: {exemption.reason} ({policy.file}:{exemption.line})"


def _meaning(rule: RequiredTag, today: date) -> Iterator[str]:
    """Yield what a rule asks for, in words."""
    case = " in upper or lower case" if rule.ignore_case else ""
    if rule.wanted:
        yield f"{rule.wanted}{case}{' or an empty value' if rule.allow_empty else ''}"
    else:
        yield "any value, also an empty one" if rule.allow_empty else "any value but an empty one"
    if rule.optional:
        yield "only where the tag is present"
    if rule.aliases:
        yield f"also as {' or '.join(rule.aliases)}"
    if rule.when:
        yield f"only for {' and '.join(rule.when.wanted)}"
    if not rule.counts(today):
        yield f"from {rule.effective_from} on"


def _rule_place(policy: Policy, rule: RequiredTag) -> str:
    """Return where a rule stands, and its `when`."""
    when = f", when in line {rule.when.line}" if rule.when else ""
    return f"({policy.file}:{rule.line}{when})"


def explain(
    policy: Policy,
    target: Target,
    instance: Instance,
    finding: Finding | None,
    suggestions: Iterable[Suggestion],
    changes: Iterable[Change],
    now: datetime,
) -> Iterator[str]:
    """Yield, rule by rule, why an instance passes or fails, with likely values, then its history."""
    name = f" ({instance.tags['Name']})" if instance.tags.get("Name") else ""
    # The state keeps an instance as it was when it was last found in violation.
    then = f", as it was at {finding.last_seen}" if finding and instance.tags is finding.tags else ""
    managed = f", managed by {instance.managed_by}" if instance.managed_by else ""
    sighting = judge(target, instance, policy, now)
    failing = {violation.tag_key: violation for violation in sighting.violations}
    verdict = "not compliant" if failing else "exempted" if sighting.exempted else "compliant"
    if failing and sighting.too_young and not (finding and finding.status is not Status.RESOLVED):
        verdict = f"too young to be judged before {utc_text(instance.launch_time + policy.grace_period)}"
    if not policy.includes(instance.state):
        verdict = f"not checked, as the policy checks only what is {', '.join(sorted(policy.states))}"
    if finding and finding.resolved_at and then:
        verdict += f"; {finding.status} since ({finding.resolution})"
    yield f"{instance.instance_id}{name} in {target}, {instance.state}{managed}{then}: {verdict}"
    exempted = {case.violation.tag_key: case for case in (*sighting.exempted, *sighting.exempted_later)}
    for rule in policy.rules(target.region):
        line, placeholders = _rule_place(policy, rule), policy.placeholder_values
        if rule.key in failing:
            yield f"  FAILS     {failing[rule.key].message} {line}"
            for likely in (each for each in suggestions if each.tag_key == rule.key):
                sure = "likely" if likely.confidence >= MIN_CONFIDENCE else "maybe"
                yield f"            {sure} {likely}"
        elif case := exempted.get(rule.key):
            yield f"  EXEMPTED  {case} ({policy.file}:{case.exemption.line})"
        elif rule in sighting.upcoming:
            violation = check_tag(instance.tags, rule, placeholders)
            message = violation.message if violation else ""
            yield f"  WILL FAIL {message}, from {rule.effective_from} on {line}"
        elif unmet := rule.unmet(target, instance, placeholders):
            yield f"  skipped   {rule.key}: not asked, {' and '.join(unmet)} {line}"
        else:
            yield f"  passes    {_why_it_passes(instance.tags, rule, placeholders)} {line}"
    yield from _near_exemptions(policy, target, instance, failing, now.date())
    if is_new_state(instance.state):
        yield f"  {new_state_notice(instance.state)}"
    yield from _past(finding, target, changes)


def _why_it_passes(tags: Mapping[str, str], rule: RequiredTag, placeholders: Container[str]) -> str:
    """Return which tag meets a rule that tags pass, or that the rule asks for none."""
    key, value = counted_tag(tags, rule, placeholders)
    if value is None:
        return f"{rule.key}: not asked, it is missing and optional"
    alias = f", an alias of {rule.key}" if key != rule.key else ""
    return f"{key} is {value!r}{alias}"


def _near_exemptions(
    policy: Policy, target: Target, instance: Instance, failing: Mapping[str, Violation], today: date
) -> Iterator[str]:
    """Yield the exemptions that would cover what fails but for one condition, or because they have ended."""
    for exemption in policy.exemptions if failing else ():
        if exemption.required_tags and not failing.keys() & exemption.required_tags:
            continue
        ended = [] if exemption.holds(today) else [f"it ended on {exemption.expires}"]
        unmet = exemption.mismatches(target, instance)
        reasons = [*(f"it is for {wanted}; {found}" for wanted, found in unmet), *ended]
        # A single condition that is not met is not near, unless the instance has the tag with another value.
        partly = len(exemption.wanted) > 1 or any(key in instance.tags for key, _ in exemption.tags)
        if len(reasons) == 1 and (ended or partly):
            which = f"{policy.file}:{exemption.line} ({exemption.reason})"
            yield f"  The exemption at {which} almost applies: {reasons[0]}"


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


def history_lines(report: HistoryReport, width: int | None) -> Iterator[str]:
    """Yield a table of the findings and how many they are or, for one instance, its timeline."""
    if report.events:
        for finding in report.findings():
            yield from _timeline(finding, report.events(finding), report.changes)
        return
    ended = Counter[bool]()

    def row(finding: Finding) -> tuple[str, ...]:
        at = finding.resolved_at
        ended[bool(at)] += 1
        what = f"{finding.resolution} on {at[:10]}" if at else ", ".join(short_violations(finding))
        return _row(finding.status, finding, finding.first_seen[:10], f"{finding.times_seen:,}", what)

    yield from table((*TABLE_HEAD[:-1], "SEEN", TABLE_HEAD[-1]), map(row, report.findings()), width)
    counts = f"{counted(ended.total(), 'finding')}: {ended[False]:,} open, {ended[True]:,} resolved"
    yield from ["", counts] if ended.total() else ["No matching findings"]


def _timeline(finding: Finding, events: Iterable[Event], changes: Iterable[Change]) -> Iterator[str]:
    """Yield what happened to a finding, one line per event, and what is known of its instance."""
    name = f" ({finding.name})" if finding.name else ""
    yield f"{finding.instance_id}{name} in {finding.target}, {finding.state} at {finding.last_seen}:"
    for event in events:
        how = event.resolution or ", ".join(violation.message for violation in event.violations)
        yield f"  {event.at}  {event.event:<8}  {how}"
    yield from _past(finding, finding.target, changes)
    yield from (f"  Suggested: {suggestion}" for suggestion in finding.suggestions)
    if finding.creator:
        yield f"  Created by: {finding.creator}"


@dataclass(frozen=True, slots=True)
class Output:
    """A report that was asked for: its format, and the file it goes to (`-` for stdout)."""

    format: str
    path: str
    is_new: bool = False  # whether it never replaces a file

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
def output_errors(
    what: object, done: str = "written", advice: str = "name another place, or free some space"
) -> Iterator[None]:
    """Raise OutputError, which says what to do, where the system cannot read or write a file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{what} cannot be {done}: {error.strerror}; {advice}") from error


_EXISTS = "{} exists, and is not replaced: name a new file, or move it away"


def check_output(output: Output) -> None:
    """Find out before the scan whether a report can be written; raises OutputError."""
    path = Path(output.path)
    if output.is_new and output.path != "-" and os.path.lexists(path):
        raise UsageError(_EXISTS.format(output))
    with output_errors(output):  # a name that is too long, a directory that may not be entered
        if path.is_dir():
            raise OutputError(f"{output} is a directory: name a file in it")
        if output.replaceable and not path.parent.is_dir():
            raise OutputError(f"{output}: the directory {path.parent} does not exist; create it")
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
            with output_errors(output):
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
        with output_errors(new.output):
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
        with output_errors(new.output), contextlib.suppress(BrokenPipeError):
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
        found = "another process replaced the file it was written to"
        raise OutputError(f"{output}: {found}; name a directory that only you can write to")
    if os.chmod in os.supports_fd:
        mask = os.umask(0o077)
        os.umask(mask)
        os.chmod(file.fileno(), 0o666 & ~mask)
    file.close()  # Windows moves no open file
    if not output.is_new:
        path.replace(output.path)
        return
    try:
        os.link(path, output.path)  # unlike a move, it fails if there is anything
    except FileExistsError as error:
        raise UsageError(_EXISTS.format(output)) from error


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
    path, deadline = Path(output.path), time.monotonic() + PIPE_SECONDS
    while path.is_fifo():
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            return descriptor
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                message = f"{output} is a pipe that nobody reads: start its reader, and run again"
                raise OutputError(message) from error
            time.sleep(0.1)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and not output.is_device:
        os.close(descriptor)
        raise OutputError(f"{output}: another process replaced this pipe by a file; run again")
    return descriptor


########################################################################################################
# 8 Dashboard: write_html; _card, _line, _table, _heat_cell draw; then the page from top to bottom
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
    upcoming: Sequence[Upcoming] = ()
    spend: Sequence[tuple[str, float]] = ()  # in each currency
    remediate: Sequence[str] = ("tagcheck.py", "remediate")  # the words of the command, but for the owner
    css: str = ""  # the file that has the style; empty where the page has it


# Chromium 156 does break inside of .together with break-inside: avoid, but never inside of an inline block.
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
margin:0}h1{font-size:2.25rem}.verdict{font-size:1.375rem}h2+.verdict{margin-top:.375rem}p{margin:.375rem 0 0}
a{color:inherit}.eyebrow,.card h2{font:600 .8125rem/1.4 system-ui,sans-serif;letter-spacing:.06em;
text-transform:uppercase;color:var(--soft)}.soft,footer{color:var(--soft);font-size:.875rem}
.warn,.banner b{color:var(--warn)}header{border-top:3px solid var(--ink);padding-top:.75rem}
.banner{margin-top:1.25rem;padding:.75rem 1rem;background:var(--note);border-left:4px solid var(--warn)}
.headline{font:600 1.375rem/1.35 "Iowan Old Style",Charter,Palatino,Georgia,"Liberation Serif",serif}
.cards,.pair{display:grid;gap:1.25rem;margin-top:1.25rem}.pair{gap:0 3rem;margin:0}
.owner{margin-top:1rem;border-top-style:dotted;padding-top:.75rem}h3{font-size:1rem;margin:0}
:target{background:var(--note)}.owner svg{margin-top:.375rem}.owner ul,.lines{padding-left:1.125rem}
.owner ul{margin:.5rem 0 0}.owner details{margin-top:.375rem}code{font-size:.875em}.rest{display:none}
.list small{display:block;width:0;min-width:100%;white-space:normal}
@media (min-width:40.01rem){.cards,.pair{grid-template-columns:1fr 1fr}
.pair>:last-child:nth-child(odd),.cards>:last-child{grid-column:1/-1}.lines{columns:2;column-gap:3rem}
.owner{display:grid;grid-template-columns:minmax(0,2fr) minmax(0,1fr);gap:0 3rem}
.owner>details{grid-column:1/-1}}@media (min-width:64rem){.cards{grid-template-columns:repeat(3,1fr)}
.cards>:last-child{grid-column:auto}}@media (min-width:40.01rem) and (max-width:64rem){
.list [data-label=Account],.list [data-label="First seen"]{white-space:normal}
.list [data-label=Probably]{display:none}}
.card{padding:1rem 1.25rem 1.125rem;background:var(--card);border:1px solid var(--rule);
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
.bars th{font-weight:400;width:52%;overflow-wrap:anywhere}.bars td{vertical-align:middle}
.bars .number{width:1%;padding-right:0}.heat th,.heat td{border:2px solid var(--paper);
padding:.3125rem .125rem;text-align:center;vertical-align:middle;font-size:.8125rem}
.heat thead th{font-size:.6875rem}.heat td{min-width:2.875rem}.heat small{display:block}
.heat td:nth-child(2),.heat tr.all>*{font-weight:700}.heat th:first-child{text-align:left;position:sticky;
left:0;background:var(--paper);font-weight:400;white-space:nowrap;padding-left:0}
.h0{background:var(--h0);color:var(--good)}.h1,.h2,.h3{background:var(--h1);color:var(--ink)}
.h2{background:var(--h2)}.h3{background:var(--h3)}.h4,.h5{background:var(--h4);color:var(--on)}
.h5{background:var(--h5)}summary{cursor:pointer}.unread{background:repeating-linear-gradient(135deg,
var(--rule) 0 2px,transparent 2px 7px),var(--note);color:var(--warn);font-weight:600;line-height:1.15}
@media (max-width:40rem){body{padding-top:1.25rem}h1{font-size:1.75rem}.verdict{font-size:1.25rem}
.wide,.list thead{display:none}.rest{display:block}
.five:has(+.rest:not([open])) :is(tbody>tr,li,.owner):not(:target):nth-child(n+6){
display:none}
.list tr,.list td{display:block}.list{font-size:.875rem}
.list tr{padding:.625rem 0;border-bottom:1px solid var(--rule)}
.list td{border:0;padding:.0625rem 0 .0625rem 6.75rem;text-align:left;white-space:normal;
overflow-wrap:anywhere}.list td::before{content:attr(data-label);float:left;width:6.5rem;margin-left:-6.75rem;
color:var(--soft)}.list td:empty{display:none}}
@media print{@page{margin:12mm}:root{--paper:#fff}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details:not([open]),summary{display:none}body{padding:0;max-width:none;font-size:10pt;orphans:3;widows:3}
body,.bars th{overflow-wrap:break-word}section{margin-top:1.25rem}
.card,tr,svg,li,p,.owner>div,.owner:not(:has([open])){break-inside:avoid}
h2,h3,h2+.soft,thead,.owner>div,.owner>svg{break-after:avoid}
.cards{grid-template-columns:repeat(3,1fr);gap:.75rem}.cards>:last-child{grid-column:auto}.bars{font-size:8pt}
.verdict{font-size:1.25rem}.scroll{overflow:visible}
.list{font-size:7.5pt}.list td{padding-right:.375rem}.pair>section{break-inside:avoid}
.together{display:inline-block;width:100%}.list [data-label=Lacks]{overflow-wrap:anywhere}
.heat thead th,.heat th,.heat td{font-size:6.5pt;padding:.125rem 0;border-width:1px;min-width:0;
overflow-wrap:anywhere}}
"""
HTML_ACCOUNTS, HTML_ROWS, HTML_UNREAD = 30, 25, 50  # rows of the heat map, a table, the unread targets
HEADLINE_CAUSES = 5
NO_OWNER = "No known owner"
HTML_POINTS, HTML_BARS = 400, 60  # 60 bars are wider than 2 pixels on a phone
COMPLIANCE_STEPS = (100, 95, 85, 70, 50)  # percent: below each of them the heat map is darker
COLUMN_LOOKS = dict.fromkeys("Instances,Closes,Open,NEW,REOPENED,RESOLVED,A month".split(","), "number")
COLUMN_LOOKS |= dict.fromkeys("Scan,Instance,Account,Region,First seen,When,Last read".split(","), "whole")
# Where each partition's instances are shown; those of other partitions have no link.
CONSOLES = {
    "[a-z]{2}-[a-z]+-[0-9]+": "console.aws.amazon.com",
    "cn-[a-z]+-[0-9]+": "console.amazonaws.cn",
    "us-gov-[a-z]+-[0-9]+": "console.amazonaws-us-gov.com",
}
RED, PALE, GREEN, GREY = "#b5502b", "#eba883", "#2a8a78", "#888"  # where the style is blocked, as in Jenkins
Element = ElementTree.Element
_LEFT, _WIDTH = 9.0, 89.5  # percent of a picture within which it draws; left of it are the numbers


def write_html(file: TextIOBase, dashboard: Dashboard) -> None:
    """Write the dashboard as one page that runs no script and loads nothing."""
    name, policy_file = _brief(dashboard.policy.name, 120), _brief(dashboard.policy.file, 120)
    standings = dashboard.standings
    cards = (_trend_card(dashboard), _worst_card(standings), _ask_card(dashboard))
    parts = [_header(dashboard, name), _node("div.cards", *cards), *_owners(dashboard)]
    parts += [*_trend(dashboard.trend), _heat_map(standings), *_counts(dashboard), *_lists(dashboard)]
    source = f"Made by tagcheck {__version__} for the policy {name} ({policy_file}). All times are UTC."
    body = _node("body", _node("main", *parts), _node("footer", source))
    title = _brief(f"{dashboard.policy.name}: required tags", 120)
    page = _node("html", _head(title, dashboard.css), body, lang="en")
    for number, svg in enumerate(page.iterfind(".//svg[@role]")):
        words = [child for child in svg if child.tag in ("title", "desc")]
        for child in words:
            child.set("id", f"{child.tag}{number}")
        svg.set("aria-labelledby", " ".join(child.attrib["id"] for child in words))
    file.write(f"<!DOCTYPE html>\n{ElementTree.tostring(page, encoding='unicode', method='html')}\n")


def write_css(file: TextIOBase, dashboard: Dashboard) -> None:
    """Write the style of a page that links to it."""
    file.write(HTML_STYLE)


DASHBOARD_WRITERS = {"html": write_html, "css": write_css}


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
    how = _node("p.soft", lead) if lead else ""
    return _node("section", _node("h2", title), how, *children, **attributes)


def _picture(title: str, text: str, height: int, *drawn: Element, look: str = "") -> Element:
    """Draw a picture in percent across and pixels down, so that its text does not shrink on a phone."""
    words = [_node("title", title), *([_node("desc", text)] if text else [])]
    return _node(f"svg.{look}", *words, *drawn, role="img", width="100%", height=height)


def _label(text: str, x: float, y: float, anchor: str = "start", look: str = "") -> Element:
    """Draw a few words in a picture."""
    place = {"x": f"{x:.2f}%", "y": f"{y:.1f}", "text_anchor": anchor}
    return _node(f"text.{look}", text, fill=GREY, font_size=12, **place)


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


def _line(points: Sequence[TrendPoint], top: int, height: int, left: float = _LEFT) -> list[Element]:
    """Draw the open findings as a line with its area; a dot is hollow where a scan left targets unread."""
    peak = max(1, *(point.open for point in points))
    moments = [datetime.fromisoformat(point.at).timestamp() for point in points]
    span, width = moments[-1] - moments[0], _LEFT + _WIDTH - left
    across = [left + width * ((moment - moments[0]) / span if span else 0.5) for moment in moments]
    down = [height * (1 - point.open / peak) for point in points]
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


def _table(columns: str, rows: Sequence[Sequence[Element | str]], most: int = HTML_ROWS) -> list[Element]:
    """Draw the first rows as a table without its empty columns, and count the others."""
    cells = zip(columns.split(","), zip(*rows[:most], strict=True), strict=True)
    known = {column: values for column, values in cells if any(value != "" for value in values)}

    def line(tag: str, cells: Iterable[Element | str], **more: str) -> Element:
        row = _node("tr")
        for name, cell in zip(known, cells, strict=True):
            row.append(_node(f"{tag}.{COLUMN_LOOKS.get(name, '')}", cell, **more, data_label=name))
        return row

    body = _node("tbody", *(line("td", row) for row in zip(*known.values(), strict=True)))
    table = _node("table.list", _node("thead", line("th", known, scope="col")), body)
    keyboard = {"tabindex": 0, "role": "group", "aria_label": f"Table: {', '.join(known)}"}
    return [_node("div.scroll.five", table, **keyboard), *_rest(len(rows), most)]


def _rest(number: int, most: int) -> list[Element]:
    """Draw what a phone opens to see more than five of a list, and how many more there are than are shown."""
    shown = min(number, most)
    more = [_node("details.rest", _node("summary.soft", f"{shown - 5:,} more"))] if shown > 5 else []
    return [*more, *(_node("p.soft", line) for line in more_lines(number - most))]


def _brief(text: str, width: int = 60) -> str:
    """Return text as the page shows it: printable, and cut where it is long."""
    return cut_text(printable(text), width)


def _minute(moment: str) -> str:
    """Return a time of the state as people read it: 2026-02-24 10:30."""
    return moment[:16].replace("T", " ")


def _head(title: str, css: str) -> Element:
    """Return the head of the page, which forbids the browser to run or load anything."""
    digest = base64.b64encode(hashlib.sha256(HTML_STYLE.encode()).digest()).decode()
    style, allowed = _node("style"), f"'sha256-{digest}'"
    if css:  # a file beside the page; what a browser opens from a disk has no origin
        style, allowed = _node("link", rel="stylesheet", href=quote(css)), "'self' file:"
    else:
        style.text = HTML_STYLE
    rules = f"default-src 'none'; style-src {allowed}; base-uri 'none'; form-action 'none'"
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
    accounts, regions = (len(_worst_first(standings, place)) for place in ("account", "region"))
    days = (dashboard.made_at - datetime.fromisoformat(latest)).days
    ago = f", {counted(days, 'day')} ago" if days > 0 else ""
    fleet = counted(sum(standing.instances for standing in standings), "instance")
    fleet += f" in {counted(accounts, 'account')} and {counted(regions, 'region')}"
    when = f"{_minute(utc_text(dashboard.made_at))} UTC · latest scan {_minute(latest)}{ago} · {fleet}"
    heading = _node("p.eyebrow", "EC2 instances and their required tags"), _node("h1", name)
    header = _node("header", *heading, _node("p.headline", _headline(dashboard)), *_facts(dashboard))
    header.append(_node("p.soft", when))
    if unread := _unread(standings):
        codes = Counter(_brief((standing.error or "").partition(":")[0], 40) for standing in unread)
        why = ", ".join(f"{number:,} {code}" for code, number in codes.most_common(3))
        more = ", …" if len(codes) > 3 else ""
        were = f"of {counted(len(standings), 'target')} {'was' if len(unread) == 1 else 'were'} not read"
        text = "Unread targets are shown as they were last read."
        bold = _node("b", f"Incomplete: {len(unread):,} {were}")
        link = _node("a", "Which, and why", href="#unread")
        header.append(_node("p.banner", bold, f" ({why}{more}). {text} ", link))
    return header


def _headline(dashboard: Dashboard) -> str:
    """Return what is open, how that compares with 30 days ago, and what would fix most, in one sentence."""
    found = dashboard.open
    text = counted(found.total, "open finding") if found.total else "No open findings"
    if than := _comparison(dashboard):
        base, when, _ = than
        change, share = found.total - base.open, ""
        if base.open:
            percent = 100 * abs(change) / base.open
            share = f"{percent:,.0f}%" if percent >= 1 else "less than 1%"
        text += f", {_compared(change, share)} {when}"
    if fixes := found.causes[:HEADLINE_CAUSES]:
        kinds, instances = {each.group.kind for each in fixes}, sum(each.instances for each in fixes)
        word = GROUP_KINDS[kinds.pop()].word if len(kinds) == 1 else "group"
        groups, tagged = counted(len(fixes), word), counted(instances, "instance")
        text += f"; fixing {groups} would tag {tagged}"
    return text


def _compared(change: int, number: str = "", share: str = "") -> str:
    """Return how a count compares: "12 fewer than", "5% fewer than", "12 fewer (5%) than", "as many as"."""
    how = f"{number or f'{abs(change):,}'} {'fewer' if change < 0 else 'more'}{share}"
    return f"{how} than" if change else "as many as"


def _comparison(dashboard: Dashboard) -> tuple[TrendPoint, str, str] | None:
    """Return the scan of 30 days ago or the first one, and when it was; None where there is only one."""
    trend = dashboard.trend
    if len(trend) == 1:
        return None
    latest = datetime.fromisoformat(trend[-1].at)
    month_ago = utc_text(latest - timedelta(days=30))
    base = next((point for point in reversed(trend) if point.at <= month_ago), trend[0])
    at = _minute(base.at) if base.at[:10] == trend[-1].at[:10] else base.at[:10]
    if base.at > month_ago:
        return base, "at the first scan", at
    days = counted((latest - datetime.fromisoformat(base.at)).days, "day")
    return base, f"{days} {'before' if dashboard.made_at - latest > timedelta(days=1) else 'ago'}", at


def _share(some: float, others: float) -> str:
    """Return which share of all some are, never rounded up."""
    if not some + others:
        return "–"
    percent = math.floor(100 * some / (some + others))
    return f"{percent}%" if percent or not some else "<1%"


def _facts(dashboard: Dashboard) -> list[Element]:
    """Draw why the count differs from the latest scan's own, and which share of the spend is allocated."""
    found, facts = dashboard.open, []
    latest, owner = dashboard.trend[-1].at, dashboard.policy.owner_key
    others = [target for target in dashboard.standings if target.error or target.last_read != latest]
    if kept := sum(target.findings for target in others):
        where = f"in {counted(len(others), 'target')} that the latest scan did not read"
        facts.append(f"{max(found.total - kept, 0):,} + {kept:,} as last read, {where}")
    if len(dashboard.spend) == 1:
        [(currency, cost)] = dashboard.spend
        lacking = min(dict(found.cost_by_tag).get(owner, 0.0), cost)
        share, every = _share(cost - lacking, lacking), _money(cost, currency)
        allocated = f"{share} of {every} a month is allocated (has {_brief(owner)})"
        facts.append(f"{allocated}, {_money(lacking, currency)} is not")
    elif dashboard.spend:
        names = ", ".join(currency or "unnamed" for currency, _ in dashboard.spend)
        facts.append(f"the prices are in several currencies: {names}")
    return [_node("p", " · ".join(facts))] if facts else []


def _money(amount: float, currency: str) -> str:
    """Return an amount with its currency, if that is known."""
    return f"{amount:,.0f} {currency}".rstrip()


def _leads(counts: Sequence[tuple[str, int]], total: int) -> bool:
    """Return whether the first of these has a twentieth of all findings more than the next."""
    return bool(counts) and counts[0][1] - (counts[1][1] if len(counts) > 1 else 0) >= max(total / 20, 1)


def _spread(word: str, counts: Sequence[tuple[str, int]], total: int) -> str:
    """Return that none stands out: "no account above 5%"."""
    return f"no {word} above {math.ceil(100 * counts[0][1] / total)}%"


def _unread(standings: Iterable[Standing]) -> list[Standing]:
    """Return the targets that the latest scan could not read."""
    return [standing for standing in standings if standing.error]


def _compliance(standings: Sequence[Standing]) -> tuple[int, int, str]:
    """Return how many instances comply, how many do not, and the share that does, never rounded up."""
    compliant, findings = sum(s.compliant for s in standings), sum(s.findings for s in standings)
    return compliant, findings, _share(compliant, findings)


def _worst_first(standings: Iterable[Standing], attribute: str) -> dict[str, list[Standing]]:
    """Group the targets by account or region, most open findings first, then most unread targets."""
    groups: dict[str, list[Standing]] = {}
    for standing in standings:
        groups.setdefault(getattr(standing.target, attribute), []).append(standing)
    badness = {name: (-_compliance(group)[1], -len(_unread(group)), name) for name, group in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=badness.__getitem__)}


def _trend_card(dashboard: Dashboard) -> Element:
    """Draw the card that compares the open findings with 30 days ago, or with the first scan."""
    trend, total = dashboard.trend, dashboard.open.total
    question, now = "Is it getting better?", counted(total, "open finding")
    if not (than := _comparison(dashboard)):
        return _card(question, now, _node("p", "Not known yet: a trend needs a second scan."))
    base, when, at = than
    change = total - base.open
    better, worse = ("Getting better", "good"), ("Getting worse", "bad")
    answer, tone = better if change < 0 else worse if change else ("Unchanged", "")
    share = f" ({100 * abs(change) / base.open:,.0f}%)" if base.open else ""
    lines = [_bold(now, f", {_compared(change, share=share)} {when}, on {at} ({base.open:,})")]
    doubts = ((len(_unread(dashboard.standings)), "not read now"), (base.targets_unread, "not read then"))
    if doubt := " and ".join(f"{counted(number, 'target')} {word}" for number, word in doubts if number):
        lines.append(_node("p.warn", f"As far as is known: {doubt}."))
    line = _line(_grouped(trend, HTML_POINTS), 4, 36, left=1.0)
    lines.append(_picture(f"Open findings: {base.open:,} {when}, {total:,} now", "", 44, *line))
    return _card(question, answer, *lines, tone=tone)


def _worst_card(standings: Sequence[Standing]) -> Element:
    """Draw the card of the account and region with most open findings, where these stand out."""
    question, unread = "Where is it worst?", _unread(standings)
    text = f"{counted(len(unread), 'target')} not read: it may be worse there."
    warning = [_node("p.warn", text)] if unread else []
    total = _compliance(standings)[1]
    if not total and unread:
        return _card(question, "Not known", _node("p", "Nothing is open in what was read."), *warning)
    if not total:
        return _card(question, "Nowhere", _node("p", _all_good(standings)), tone="good")
    verdict, lines, spread = "", [], []
    for attribute in ("account", "region"):
        groups = _worst_first(standings, attribute)
        counts = [(name, _compliance(group)[1]) for name, group in groups.items()]
        if not _leads(counts, total):
            spread.append(_spread(attribute, counts, total))
            continue
        name, findings = counts[0]
        verdict = verdict or name
        where = "" if name == verdict else f" in {name}"
        if len(groups) > 1 or not where:
            lines.append(_bold(f"{findings:,} open", f"{where}, {_compliance(groups[name])[2]} compliant"))
    if spread:
        text = f"{'; '.join(spread)} of the findings."
        lines.append(_node("p", text[0].upper() + text[1:]))
    worst = next(iter(_worst_first(standings, "account").values()))
    places = sorted(worst, key=lambda standing: -standing.findings)
    if _leads([(place.target.region, place.findings) for place in places], total) and len(standings) > 1:
        place = places[0]
        since = f", not read since {(place.last_read or '')[:10]}" if place.error else ""
        of = f"{place.findings:,} of {counted(place.instances, 'instance')}"
        lines.append(_bold(str(place.target), f": {of} lack tags{since}"))
    judged = [s for s in standings if not s.error and s.compliant + s.findings]
    lowest = min(judged, key=lambda s: s.compliant / (s.compliant + s.findings), default=None)
    if lowest and len(judged) > 1:
        of = f"{_compliance([lowest])[2]} of {counted(lowest.instances, 'instance')} compliant"
        lines.append(_bold("Lowest share", f": {lowest.target}, {of}"))
    return _card(question, verdict or "Spread out", *lines, *warning, tone="bad")


def _all_good(standings: Sequence[Standing]) -> str:
    """Return what is true when everything was read and nothing is open."""
    names = ("instances", "compliant", "exempted")
    instances, compliant, exempted = (sum(getattr(s, name) for s in standings) for name in names)
    fleet = counted(instances, "instance")
    if compliant == instances:
        return f"Every one of {fleet} carries its tags." if instances else "There are no instances."
    rest = ((exempted, "exempted"), (instances - compliant - exempted, "too young to judge"))
    others = " and ".join(f"{number:,} {word}" for number, word in rest if number)
    return f"{compliant:,} of {fleet} carry their tags; {others}."


def _ask_card(dashboard: Dashboard) -> Element:
    """Draw the card of those who own or created most of what is open, and of the largest cause."""
    found, question = dashboard.open, "Who to ask?"
    if not found.total:
        nobody = "Nobody yet" if _unread(dashboard.standings) else "Nobody"
        return _card(question, nobody, _node("p", "Nothing is open."))

    def named(counts: Iterable[tuple[str, int]]) -> str:
        return ", ".join(f"{_brief(who, 40)} ({number:,})" for who, number in counts)

    kinds = (("owner", "owns, or probably owns,", found.by_owner), ("creator", "created", found.by_creator))
    known = [kind for kind in kinds if kind[2]]
    who = next(((does, people) for _, does, people in known if _leads(people, found.total)), None)
    lines = []
    if who:
        does, people = who
        of = f" of {counted(found.total, 'instance')} with findings"
        lines.append(_bold(f"{does} {people[0][1]:,}", of))
        if len(people) > 1:
            lines.append(_bold("Then", f": {named(people[1:4])}"))
    for word, _, people in known:
        if not (who and people is who[1]):
            spread = "" if _leads(people, found.total) else f"{_spread(word, people, found.total)}: "
            lines.append(_bold(f"{word.capitalize()}s", f": {spread}{named(people[:3])}"))
    if found.owners:
        lines.append(_node("p", _node("a", "What each owner has open", href="#owners")))
    if found.causes:
        lines.append(_bold("Most at once", f": {_brief(str(found.causes[0]), 240)}"))
    if not found.by_creator:
        code, text = _node("code", "scan --creators"), "Who created the instances is not known: "
        lines.append(_node("p.soft", text, code, " looks it up."))
    verdict = _brief(who[1][0][0]) if who else "Spread out" if known else "Not known"
    return _card(question, verdict, *lines)


def _owners(dashboard: Dashboard) -> Iterator[Element]:
    """Draw a section for each of the owners with most open findings, and a line for each of the others."""
    found = dashboard.open
    shown = [owner for owner in found.owners if owner.trend]
    if not shown:
        return
    lead = (
        f"By the tag {_brief(dashboard.policy.owner_key)}, or its likely value. The lines show the open "
        f"findings of the last {OWNER_DAYS} days; they leave out what was pruned, and count what was "
        "reopened from when it was first seen."
    )
    drawn = [_owner(dashboard, owner, is_open=place < 3) for place, owner in enumerate(shown)]
    lines = _node("ul.lines.five")
    for owner in found.owners[len(shown) :]:
        text = f": {owner.total:,} open" if owner.total else ": nothing open"
        text += f", {owner.resolved:,} resolved in {OWNER_DAYS} days" if owner.resolved else ""
        place = {"id": owner_anchor(owner.owner)}
        lines.append(_node("li", _node("b", _brief(owner.owner) or NO_OWNER), text, **place))
    named = len(found.owners) - len(shown)
    more = [lines, *_rest(found.owners_total - len(shown), named)] if named else []
    every = _node("div.five", *drawn)
    yield _titled("Owners", lead, every, *_rest(len(drawn), len(drawn)), *more, id="owners")


def _owner(dashboard: Dashboard, owner: OwnerFindings, *, is_open: bool) -> Element:
    """Draw what one owner has open, its trend, the causes, the oldest findings, and the command."""
    numbers = [point.open for point in owner.trend]
    more = _compared(owner.total - numbers[0])
    then = f"{OWNER_DAYS} days ago" if len(numbers) > OWNER_DAYS else f"on {owner.trend[0].at[:10]}"
    facts = [counted(owner.total, "open finding"), *([f"{more} {then}"] if len(numbers) > 1 else [])]
    if owner.monthly_cost is not None:
        facts.append(f"{_money(owner.monthly_cost, _currency(dashboard))} a month")
    name = _brief(owner.owner) or NO_OWNER
    head = _node("div", _node("h3", name), _node("p", ", ".join(facts)))
    line = _line(owner.trend, 4, 32, left=1.0)
    picture = _picture(f"{name}: {numbers[0]:,} open {then}, {numbers[-1]:,} now", "", 40, *line)
    details = _node("details", _node("summary.soft", "Causes, oldest findings, and how to fix them"))
    if owner.causes:
        shares = ((_share(each.instances, owner.total - each.instances), each) for each in owner.causes)
        lines = (_brief(f"{share} of these: {each}, in {each.target}", 240) for share, each in shares)
        details.append(_node("ul", *(_node("li", each) for each in lines)))
    rows = [_oldest_row(alike, dashboard)[:6] for alike in owner.oldest]
    details.extend(_table("Instance,Name,Account,Region,First seen,Lacks", rows))
    rest = owner.total - sum(alike.number for alike in owner.oldest)
    details.extend(_node("p.soft", line) for line in more_lines(rest))
    if is_printable(owner.owner):
        of = [f"--owner={owner.owner}"] if owner.owner else ["--owner", ""]
        command = shlex.join([*dashboard.remediate, *of])
        details.append(_node("p", "Plan the tags that are likely enough: ", _node("code", command)))
    if is_open:
        details.set("open", "")
    shown = picture if len(numbers) > 1 else ""
    return _node("section.owner", head, shown, details, id=owner_anchor(owner.owner))


def _currency(dashboard: Dashboard) -> str:
    """Return the currency of all prices, empty where it is not known or there are several."""
    return dashboard.spend[0][0] if len(dashboard.spend) == 1 else ""


def _grouped(trend: Sequence[TrendPoint], most: int) -> list[TrendPoint]:
    """Merge neighbouring scans into at most so many points, each with their sums and its last state."""
    size = -(-len(trend) // most)
    points = []
    for group in (trend[start : start + size] for start in range(0, len(trend), size)):
        sums = {name: sum(getattr(p, name) for p in group) for name in ("new", "reopened", "resolved")}
        points.append(replace(group[-1], targets_unread=max(p.targets_unread for p in group), **sums))
    return points


def _time_axis(
    points: Sequence[TrendPoint], parts: int, left: float, width: float, y: float, ends: Sequence[str]
) -> list[Element]:
    """Draw the times below a chart, each once; `ends` are the anchors of the first and the last."""
    start, end = (datetime.fromisoformat(point.at) for point in (points[0], points[-1]))
    span, form = end - start, "%H:%M" if start.date() == end.date() else "%m-%d %H:%M"
    form = "%Y-%m-%d" if span > timedelta(days=5) else "%H:%M:%S" if span < timedelta(minutes=1) else form
    places: dict[str, float] = {}
    for part in (0, parts, *range(1, parts)):
        places.setdefault(f"{start + span * part / parts:{form}}", part / parts)
    drawn = []
    for text, place in places.items():
        anchor = ends[int(place)] if ends and place in (0, 1) else "middle"
        look = "wide" if place in (0.25, 0.75) else ""  # too many for a phone
        drawn.append(_label(text, left + width * place, y, anchor, look))
    return drawn


def _trend(trend: Sequence[TrendPoint]) -> Iterator[Element]:
    """Draw the open findings over time, what each scan changed, and the latest scans in numbers."""
    if len(trend) == 1 or not any(point.open or point.new or point.resolved for point in trend):
        return
    points = _grouped(trend, HTML_POINTS)
    peak = max(1, *(point.open for point in points))
    drawn = _grid([(tick, 18 + 200 * (1 - tick / peak)) for tick in _ticks(peak)])
    drawn += [*_line(points, 18, 200), *_time_axis(points, 4, _LEFT, _WIDTH, 242, ("start", "end"))]
    first, last = points[0], points[-1]
    text = f"From {first.open:,} on {_minute(first.at)} to {last.open:,} on {_minute(last.at)}"
    text += f", in {counted(len(trend), 'scan')}"
    chart = _picture("Open findings over time", text, 250, *drawn, look="chart")
    rows = []
    for p in trend[: -HTML_ROWS - 1 : -1]:
        numbers = [f"{number:,}" for number in (p.open, p.new, p.reopened, p.resolved)]
        rows.append([_minute(p.at), *numbers, f"{p.targets_unread:,} of {counted(p.targets, 'target')}"])
    table = _table("Scan,Open,NEW,REOPENED,RESOLVED,Not read", rows)
    details = _node("details", _node("summary.soft", "The latest scans in numbers"), *table)
    lead = "All targets, each as it was last read; a hollow point is a scan that left targets unread."
    content = (chart, *_changes(trend), details)
    yield _titled("Open findings over time", lead, *content, class_="together")


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
                group.append(_node(f"rect.{look}", color=colour, **across, **upright))
        drawn.append(group)
    ends = ("start", "end") if len(bars) > 3 else ()
    drawn += _time_axis(bars, 1, _LEFT + slot / 2, slot * (len(bars) - 1), 196, ends)
    if cut:
        drawn.append(_label(f"↑ {first:,} at first", _LEFT + (slot - width) / 2, 14))
    picture = _picture("NEW, REOPENED and RESOLVED findings per scan", each, 200, *drawn, look="chart")
    return [_node("p.legend.soft", *keys, _node("span", each)), picture]


def _heat_map(standings: Sequence[Standing]) -> Element:
    """Draw the compliance of each account in each region, worst first; what was not read is hatched."""
    accounts, regions = (_worst_first(standings, attribute) for attribute in ("account", "region"))
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
    if _unread(standings):
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


def _counts(dashboard: Dashboard) -> Iterator[Element]:
    """Draw the open findings by tag, age, creator and service, and the cost by tag, as bars."""
    found = dashboard.open
    unpriced = found.total - found.priced
    spend = "What the instances that lack a tag cost in a month, by the prices that scans were given"
    spend += f" in {_currency(dashboard)}" if _currency(dashboard) else ""
    spend += f"; {counted(unpriced, 'finding')} without a price left out." if unpriced else "."
    owner = dashboard.policy.owner_key
    costs = sorted(found.cost_by_tag, key=lambda row: row[0] != owner)  # who pays is asked first
    charts: tuple[tuple[str, str, Sequence[tuple[str, float]]], ...] = (
        ("Missing or invalid tags", "An instance can lack several.", found.by_tag),
        ("Age of open findings", "Since a scan first saw them.", found.by_age),
        ("Created by", "Who made the instances.", found.by_creator),
        ("Operated by AWS services", "Their tags come from the service's own settings.", found.by_operator),
        ("Spend that lacks its tag", spend, costs),
    )
    pair = _node("div.pair")
    for title, lead, every in charts:
        rows = [row for row in every if row[1]]
        body, most = _node("tbody"), max((number for _, number in rows), default=0) or 1
        for name, number in rows[:HTML_ROWS]:
            brief, amount, width = _brief(name), f"{number:,.0f}", f"{100 * number / most:.1f}%"
            bar = _node("rect.bar", color=RED, width=width, height=12, fill="currentColor")
            cells = _node("td", _picture(f"{brief}: {amount}", "", 12, bar)), _node("td.number", amount)
            body.append(_node("tr", _node("th", brief, scope="row"), *cells))
        if rows:
            table = _node("div.five", _node("table.bars", body))
            pair.append(_titled(title, lead, table, *_rest(len(rows), HTML_ROWS)))
    if len(pair):
        yield pair


def _lists(dashboard: Dashboard) -> Iterator[Element]:
    """Draw the causes, the oldest findings, ending exemptions and unread targets, if there are any."""
    found = dashboard.open
    causes = []
    for c in found.causes:
        closes = f"{c.instances:,} ({_share(c.instances, found.total - c.instances)})"
        causes.append((closes, c.target.account, c.target.region, _brief(str(c), 240)))
    every = (found.oldest, found.oldest_unread)
    oldest, kept = ([_oldest_row(alike, dashboard) for alike in findings] for findings in every)
    endings = [(_brief(end.message, 120), _brief(end.where, 240)) for end in dashboard.endings]
    upcoming = [(r.effective_from, _brief(r.tag_key, 60), f"{r.instances:,}") for r in dashboard.upcoming]
    group, finding = "Closes,Account,Region,What to do", "Instance,Name,Account,Region,First seen,Lacks"
    finding += ",Probably,Created by,A month"
    closes = "What many instances share, where to fix all of them, and how many open findings that closes."
    as_read = "In targets that the latest scan could not read: they may be tagged by now."
    lists: tuple[tuple[str, str, str, Sequence[Sequence[Element | str]]], ...] = (
        ("Causes", closes, group, causes),
        ("Open for longest", "", finding, oldest),
        ("Open for longest, as last read", as_read, finding, kept),
        ("Exemptions that end", "", "When,Exemption", endings),
        ("Upcoming rules", "What would fail rules that do not count yet.", "From,Tag,Instances", upcoming),
    )
    for title, lead, columns, rows in lists:
        if rows:
            yield _titled(title, lead, *_table(columns, rows))
    unread = []
    for target in sorted(_unread(dashboard.standings), key=lambda s: (s.last_read or "", s.target)):
        place = (target.target.account, target.target.region, _minute(target.last_read or "") or "never")
        number = f"{target.findings:,}" if target.last_read else "not known"
        unread.append((*place, number, _brief(target.error or "", 240)))
    if unread:
        lead = "As they were last read; what was open then still counts."
        table = _table("Account,Region,Last read,Open,Why", unread, HTML_UNREAD)
        yield _titled("Not read", lead, *table, id="unread")


def _oldest_row(alike: Alike, dashboard: Dashboard) -> tuple[Element | str, ...]:
    """Return a finding, and how many are like it, as a row of those that are open for longest."""
    finding = alike.finding
    days = max((dashboard.made_at - datetime.fromisoformat(finding.first_seen)).days, 0)
    since = _node("span", _node("span.whole", finding.first_seen[:10]), f", {counted(days, 'day')}")
    lacks = ", ".join(_brief(violation, 80) for violation in short_violations(finding))
    likely = ", ".join(_brief(str(suggestion), 80) for suggestion in finding.suggestions)
    cost = "" if finding.monthly_cost is None else f"{finding.monthly_cost:,.0f}"
    instance = _console_link(finding)
    if alike.number > 1 and finding.cause:
        group = f"{GROUP_KINDS[finding.cause.kind].word} {_brief(finding.cause.name, 40)}"
        instance = _node("span", instance, _node("small", f" and {alike.number - 1:,} more of the {group}"))
    where = (instance, _brief(finding.name, 40), finding.target.account, finding.region)
    return (*where, since, _brief(lacks, 240), _brief(likely, 240), _brief(finding.creator), cost)


def _console_link(finding: Finding) -> Element | str:
    """Return an instance's id, with a link to it in the EC2 console of its partition."""
    region, instance_id = finding.region, finding.instance_id
    consoles = [host for pattern, host in CONSOLES.items() if re.fullmatch(pattern, region)]
    if not (consoles and re.fullmatch(INSTANCE_ID, instance_id)):
        return instance_id
    url = f"https://{consoles[-1]}/ec2/home?region={region}#InstanceDetails:instanceId={instance_id}"
    return _node("a", instance_id, href=url, rel="noreferrer")


########################################################################################################
# 9 Notifications: digest_lines, write_digests, digest_text, find_webhook, and a sender for each medium
########################################################################################################

DIGEST_LINES, OWNER_LINES = 10, 100  # findings listed in a digest for everybody, and in an owner's
DIGEST_WIDTH = 100  # characters of a line
# Slack cuts a text after 40,000 characters, SNS refuses more than 256 KB; a digest has at most ten sections.
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
    link: str = ""  # to the dashboard

    @property
    def medium(self) -> str:
        """How it is sent: by slack, sns or email."""
        return ("email" if "@" in self.to else "slack") if self.to else self.channel


Senders = Mapping[str, Callable[[Digest], None]]  # by medium


def ending_subjects(policy: Policy, today: date) -> list[str]:
    """Return a subject, for the state, for each exemption that has ended or ends soon: one for each date."""
    return [
        f"exemption {exemption.expires} {exemption.reason}"
        for exemption in policy.exemptions
        if exemption.ends_soon(today)
    ]


def digest_lines(
    report: ScanReport, pending: Callable[[str], set[str]], reminder: Callable[[Finding], tuple[int, str]]
) -> Iterator[DigestLine]:
    """Yield what belongs in digests.

    `pending` returns the channels that a subject is pending for; with `on: new` only these get it. `reminder`
    returns the age that a pending finding is a reminder of, and when it was opened.
    """
    policy, numbers = report.scan.policy, Counter[tuple[str, int]]()
    notify = policy.notify or Notify()
    owners = notify.owners or Owners()

    def channels_for(subject: str) -> Iterator[tuple[str, str | None]]:
        waiting = pending(subject)
        for channel in notify.channels:
            if notify.on == "any" or channel in waiting:
                yield channel, subject if channel in waiting else None

    for finding in report.findings():
        keys = [violation.tag_key for violation in finding.violations]
        listed = [*channels_for(f"finding {finding.account_id} {finding.region} {finding.instance_id}")]
        is_pending = any(subject for _, subject in listed)
        due, opened = reminder(finding) if is_pending and notify.reminders else (0, "")
        for channel, subject in listed:
            age = due if subject else 0
            names = {"owner": finding.owner, "created by": finding.created_by or ""}
            recipient: str | None = ""
            owner, cause = "", None
            if channel == "owners":
                recipient = owners.recipient(filter(None, names.values()))
                owner = names.pop("owner")  # it is in the title, or added to each line
                cause = finding.cause and to_json((finding.account_id, finding.region, *finding.cause))
            elif policy.owner_key in keys:
                del names["owner"]  # what it is instead, or its likely value, is told with the tag
            if recipient is not None:
                numbers[channel, age] += 1
                is_listed = channel == "owners" or numbers[channel, age] <= DIGEST_LINES
                line = _finding_line(finding, names, opened if age else "") if is_listed else ""
                yield DigestLine(channel, recipient, subject, line, age, owner, cause, to_json(keys))
    unread = [f"unread {t.target.account_id} {t.target.region}" for t in report.unread]
    for other in (*unread, *ending_subjects(policy, report.scan.started_at.date())):
        for channel, subject in channels_for(other):
            if channel != "owners":
                yield DigestLine(channel, "", subject)


def write_digests(report: ScanReport, channel: str, recipients: Iterable[Recipient]) -> Iterator[Digest]:
    """Yield a digest for each recipient of a channel."""
    policy, today = report.scan.policy, report.scan.started_at.date()
    notify = policy.notify or Notify()
    word = "new" if notify.on == "new" else "open"
    for to, owner, found, causes in recipients:
        counts: list[str] = []
        remedies = map(printable, cause_lines(causes if to else report.causes))
        sections = [_section("Fix many at once:", remedies, most=SUMMARY_CAUSES)]
        link = notify.dashboard_url or ""
        for age, number, lines in found:
            days, fresh = f"still open after {counted(age, 'day')}", f"{word} finding"
            if number:
                counts.append(f"{number:,} {days}" if age else counted(number, fresh))
            texts = [f"{line}; owner {_short(who)}" if who and not owner else line for line, who in lines]
            sections.append(_section(f"{(days if age else f'{fresh}s').capitalize()}:", texts, number))
        if to and owner:
            counts[-1] += f" (owner {_short(owner)})"
            link += f"#{owner_anchor(owner)}" if link else ""
        elif to:
            is_default = notify.owners and to == notify.owners.default
            counts[-1] += (
                " (owner not known or without an address)" if is_default else " (by owner tag or creator)"
            )
        else:
            exemptions = [exemption for exemption in policy.exemptions if exemption.ends_soon(today)]
            over = sum(not exemption.holds(today) for exemption in exemptions)
            soon = len(exemptions) - over
            counts += [f"{counted(len(report.unread), 'target')} not read"] if report.unread else []
            counts += [counted(soon, "exemption ends soon", "exemptions end soon")] if soon else []
            counts += [counted(over, "exemption has ended", "exemptions have ended")] if over else []
            unread = (_entry(f"{t.target}:", f"{t.error_code}: {t.error_message}") for t in report.unread)
            endings = (_entry(f"{each.where}:", each.message) for each in check_expiry(policy, today))
            sections = [
                _section("", count_lines(report.totals)),
                *sections,
                _section("Could not be read (their findings are unchanged):", unread, most=DIGEST_LINES),
                _section("Exemptions:", endings, most=DIGEST_LINES),
            ]
        headline = printable(f"tagcheck {cut_text(policy.name, 40)}: {', '.join(counts)}")
        yield Digest(channel, to, headline, [section for section in sections if section.number], link)


def _short(name: str) -> str:
    """Return who an owner or a creator is, cut and printable."""
    return printable(cut_text(name, 60))


def _entry(head: str, details: str) -> str:
    """Return a line of a digest, with a newline where it is broken first if it is too long."""
    return f"{printable(head)}\n{printable(details)}"


def _section(title: str, lines: Iterable[str], number: int = 0, most: int = OWNER_LINES) -> Section:
    """Return a section with the first of these lines, which may be of so many."""
    every = list(lines)
    return Section(title, [*map(_fitted, every[:most])], number or len(every))


def _fitted(line: str) -> str:
    """Return a line of a digest in parts of at most DIGEST_WIDTH."""
    whole = line.replace("\n", " ")
    texts = [whole] if len(whole) <= DIGEST_WIDTH else line.replace("\n", "\n  ").split("\n")
    parts = (part for text in texts for part in fitted(cut_text(text, 400), DIGEST_WIDTH))
    return "\n".join(cut_text(part, DIGEST_WIDTH) for part in parts)


def _finding_line(finding: Finding, names: Mapping[str, str], opened: str) -> str:
    """Return a finding in one line: where it is, then what it lacks with likely values, and who may know."""
    name = f" ({cut_text(finding.name, 40)})" if finding.name else ""
    status, since = ("", f" since {opened[:10]}") if opened else (f"{finding.status} ", "")
    parts = [", ".join(short_violations(finding, unsure=True))]
    parts += [f"{role} {_short(who)}" for role, who in names.items() if who]
    where = f"{status}{finding.instance_id}{name} in {finding.target}{since}:"
    return _entry(where, "; ".join(parts))


def digest_text(digest: Digest) -> str:
    """Return a digest as text; for Slack in code blocks, where nothing becomes a mention, a link or bold."""
    is_slack, width = digest.medium == "slack", SECTION_WIDTHS[digest.medium]
    encode: Callable[[str], str] = _slack_escape if is_slack else str
    fence = ["```"] if is_slack else []
    title = encode(digest.title) if is_slack else _fitted(digest.title)
    parts = [(f"<@{digest.to}> " if is_slack and digest.to else "") + title]
    for head, lines, number in digest.sections:
        encoded = [*map(encode, lines)]
        ends = itertools.accumulate(len(line) + 1 for line in encoded)
        shown = encoded[: sum(end <= width for end in ends)]
        heads = [head] if head or is_slack else []
        parts.append("\n".join([*heads, *fence, *shown, *more_lines(number - len(shown)), *fence]))
    if link := encode(digest.link):
        parts.append(f"<{link}|Open the dashboard>" if is_slack else f"Dashboard: {link}")
    return "\n".join(parts) if is_slack else "\n\n".join(parts) + "\n"


def sample_digest(policy: Policy, channel: str, to: str = "") -> Digest:
    """Return a digest that is marked as a test, to see whether and how it arrives."""
    said = f"This is a test from tagcheck {__version__}, nothing was scanned. A finding looks like this:"
    example = "NEW i-00000000000000000 (example) in 123456789012 (prod) eu-west-1: Owner missing (team-web?)"
    title = printable(f"tagcheck {cut_text(policy.name, 40)}: this is a test")
    link = policy.notify.dashboard_url if policy.notify else ""
    return Digest(channel, to, title, [Section("", [said, example], 2)], link or "")


def _slack_escape(text: str) -> str:
    """Escape what Slack reads as a command, such as `<!channel>`, and what would end a code block."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("`", "'")


def find_webhook(slack: Slack, environment: Mapping[str, str]) -> str:
    """Return the URL of the webhook; raises UsageError, which does not repeat it."""
    name, url = slack.webhook_url_env, environment.get(slack.webhook_url_env, "").strip()
    if not url:
        advice = f"put the webhook's URL into the environment variable {name}"
        raise UsageError(f"the policy notifies Slack: {advice}")
    parts = re.fullmatch(r"https://([^/?#\s]+)/[!-~]*", url)
    if not parts:
        raise UsageError(f"{name} does not hold the https:// URL of a webhook: copy it again from Slack")
    hosts = (*SLACK_HOSTS, *slack.allow_hosts)
    if parts[1].removesuffix(":443") not in hosts:
        known = ", ".join(hosts)
        raise UsageError(f"{name} holds a URL of another host than {known}: see notify.slack.allow_hosts")
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
    title = digest.title.encode("ascii", "replace").decode()
    subject = title if len(title) < 100 else f"{title[:95].rpartition(',')[0]}, ..."
    call_aws(client, "Publish", TopicArn=topic_arn, Subject=subject, Message=digest_text(digest))


def send_email(client: Any, email: Email, digest: Digest) -> None:
    """Send a digest by SES, to its owner or to all who get everything; raises TargetError."""
    subject, body = ({"Data": text, "Charset": "UTF-8"} for text in (digest.title, digest_text(digest)))
    to = {"ToAddresses": [digest.to] if digest.to else list(email.to)}
    content = {"Simple": {"Subject": subject, "Body": {"Text": body}}}
    call_aws(client, "SendEmail", FromEmailAddress=email.sender, Destination=to, Content=content)


########################################################################################################
# 10 Remediation: PlanRow, PlanRows, plan, write_plan, read_plan, UndoFile, decide, apply_plan, record_changes
########################################################################################################


class Action(StrEnum):
    """What a row of a plan asks for; `restore` and `delete` are those of an undo file."""

    ADD = "add"  # where the tag is missing or empty
    REPLACE = "replace"  # an existing value; only a person asks for this
    REVIEW = "review"  # an existing value that is probably wrong; nothing is written
    SKIP = "skip"
    RESTORE = "restore"
    DELETE = "delete"


PLAN_ACTIONS = (Action.ADD, Action.REPLACE, Action.REVIEW, Action.SKIP)
UNDO_ACTIONS = (Action.RESTORE, Action.DELETE)


class Result(StrEnum):
    """The result of a row of a plan."""

    PLANNED = "planned"
    NOT_ASKED = "not_asked"  # review and skip
    WRITTEN = "written"
    ALREADY_THERE = "already_there"
    CHANGED_SINCE = "changed_since"
    GONE = "gone"
    FAILED = "failed"
    UNKNOWN = "unknown"  # the answer was lost, and the tags could not be read again


class LeftOut(StrEnum):
    """Tags of open findings that a new plan leaves out, and what to do."""

    UNKNOWN = "tags without a likely value; set them by hand, or give them a default in the policy"
    UNSURE = "tags whose likely value is not sure enough; a lower --min-confidence plans them"
    WRONG = "tags with a wrong value and no likely one; correct them by hand"
    NOT_ALLOWED = "tags whose likely value the policy or EC2 does not allow"
    NOT_REQUIRED = "tags that the policy does not require there"


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One tag to write on one instance, and the result; a file has the fields up to `warning`."""

    account_id: str
    region: str
    instance_id: str
    name: str
    tag_key: str
    value: str
    action: Action
    current: str  # the tag's value when the plan was made, as a file shows it
    confidence: str
    why: str
    warning: str = ""
    place: str = ""  # the file and line that it was read from
    result: Result = Result.PLANNED
    message: str = ""  # why it has this result
    former: str | None = None  # the tag's value right before it was written

    def __str__(self) -> str:
        return f"{self.account_id} {self.region} {self.instance_id} {self.tag_key}"

    @property
    def target(self) -> Target:
        """Where the instance is."""
        return Target(self.account_id, self.region)

    @property
    def writes(self) -> bool:
        """True if the row changes something, unless the instance has changed."""
        return self.action not in (Action.REVIEW, Action.SKIP)

    @property
    def value_after(self) -> str | None:
        """The value of the tag once the row is carried out; None if it is deleted."""
        return None if self.action is Action.DELETE else self.value

    def with_result(self, result: Result, message: str = "") -> PlanRow:
        """Return the row with its result."""
        return replace(self, result=result, message=message)


_ROW = tuple(column.name for column in fields(PlanRow))
_cells = operator.attrgetter(*_ROW)  # astuple and asdict copy each value, which takes ten times as long
_ROW_KEY = ("account_id", "region", "instance_id", "tag_key")
_SAME_TAG = " AND ".join(f"{name} = :{name}" for name in _ROW_KEY)


class PlanRows:
    """The rows of one plan, sorted, in a private database on disk: memory does not grow with them."""

    def __init__(self, rows: Iterable[PlanRow] = ()) -> None:
        self._db = sqlite3.connect("")
        self._db.execute(f"CREATE TABLE rows ({', '.join(_ROW)}, PRIMARY KEY ({', '.join(_ROW_KEY)}))")
        for row in rows:
            self.add(row)

    def __iter__(self) -> Iterator[PlanRow]:
        query = "SELECT * FROM rows ORDER BY account_id, region, instance_id, rowid"
        for row in itertools.starmap(PlanRow, self._db.execute(query)):
            yield replace(row, action=Action(row.action), result=Result(row.result))

    def add(self, row: PlanRow) -> None:
        """Add a row; raises UsageError if another one is for the same tag."""
        new = row if row.writes else row.with_result(Result.NOT_ASKED)
        try:
            self._db.execute(f"INSERT INTO rows VALUES ({', '.join('?' * len(_ROW))})", _cells(new))
        except sqlite3.IntegrityError as error:
            [place] = self._db.execute(f"SELECT place FROM rows WHERE {_SAME_TAG}", asdict(row)).fetchone()
            raise UsageError(f"{place} has the same tag of the same instance: keep one of them") from error

    def update(self, rows: Iterable[PlanRow]) -> None:
        """Keep the results of rows."""
        new = "result = :result, message = :message, former = :former, warning = :warning"
        self._db.executemany(f"UPDATE rows SET {new} WHERE {_SAME_TAG}", map(asdict, rows))

    def counts(self, column: str) -> Counter[str]:
        """Return the number of rows with each value of a column."""
        return Counter(dict(self._db.execute(f"SELECT {column}, count(*) FROM rows GROUP BY 1").fetchall()))

    @property
    def exit_code(self) -> ExitCode:
        """INCOMPLETE if a row that writes was not carried out."""
        fine = {Result.PLANNED, Result.NOT_ASKED, Result.WRITTEN, Result.ALREADY_THERE}
        return ExitCode.COMPLIANT if fine.issuperset(self.counts("result")) else ExitCode.INCOMPLETE

    def warnings(self) -> list[dict[str, Any]]:
        """Return what would undo the tags that are written, as JSON objects, the most instances first."""
        rows = self._db.execute(
            "SELECT account_id, region, count(DISTINCT instance_id), warning FROM rows WHERE warning <> '' "
            "AND result IN ('planned', 'written') GROUP BY 1, 2, 4 ORDER BY 3 DESC, 1, 2, 4"
        )
        names = ("account_id", "region", "instances", "message")
        each = ((*place, number, f"{counted(number, 'instance')} of {text}") for *place, number, text in rows)
        return [dict(zip(names, row, strict=True)) for row in each]


def plan(
    findings: Iterable[Finding], policy: Policy, min_confidence: float, left_out: Counter[LeftOut]
) -> Iterator[PlanRow]:
    """Yield what would fix findings and the policy still allows: sure suggestions, or else its default.

    `left_out` gets the number of findings that have such tags.
    """
    for finding in findings:
        reasons = set[LeftOut]()
        suggestions = {suggestion.tag_key: suggestion for suggestion in finding.suggestions}
        rules = policy.rules_by_key(finding.region) if policy.covers_target(finding.target) else {}
        for key in (violation.tag_key for violation in finding.violations):
            rule, suggestion = rules.get(key), suggestions.get(key)
            row = rule and _plan_row(finding, rule, suggestion, policy, min_confidence)
            if row and not row_error(row, policy):
                yield row
            elif row:
                reasons.add(LeftOut.NOT_ALLOWED)
            elif not rule:
                reasons.add(LeftOut.NOT_REQUIRED)
            elif suggestion:
                reasons.add(LeftOut.UNSURE)
            else:
                reasons.add(LeftOut.UNKNOWN if is_blank(finding.tags.get(key, "")) else LeftOut.WRONG)
        left_out.update(reasons)


def plan_aliased(aliased: Iterable[Aliased], policy: Policy, min_confidence: float) -> Iterator[PlanRow]:
    """Yield what would give rules their own keys, where the policy still wants it and allows the value."""
    for case in aliased if policy.normalize_aliases and min_confidence <= OWN_CONFIDENCE else ():
        rule = policy.rules_by_key(case.region).get(case.tag_key)
        if rule and case.alias in rule.aliases:
            place = (case.account_id, case.region, case.instance_id, case.name)
            current, why = printable(case.current or ""), f"it has {case.alias}={cut_text(case.value, 40)}"
            more = (current, f"{OWN_CONFIDENCE:g}", why, revert_warning(case.cause))
            row = PlanRow(*place, rule.key, case.value, Action.ADD, *more)
            if not row_error(row, policy):
                yield row


def _plan_row(
    finding: Finding, rule: RequiredTag, suggestion: Suggestion | None, policy: Policy, min_confidence: float
) -> PlanRow | None:
    """Return what to write for one violation, or None if nothing is known."""
    current = finding.tags.get(rule.key, "")
    action = Action.ADD if is_blank(current) else Action.REVIEW
    if suggestion and (action is Action.REVIEW or suggestion.confidence >= min_confidence):
        value, confidence, why = suggestion.value, f"{suggestion.confidence:g}", suggestion.evidence
    elif rule.default is not None and action is Action.ADD:
        value, confidence, why = rule.default, "", f"the policy's default ({policy.file}:{rule.line})"
        if suggestion and suggestion.value != value:
            why += f"; but {suggestion.value} is {suggestion.evidence}"
            action = Action.REVIEW if suggestion.confidence >= MIN_SHOWN else action
    else:
        return None
    place = (finding.account_id, finding.region, finding.instance_id, finding.name)
    warning = revert_warning(finding.cause)
    return PlanRow(*place, rule.key, value, action, printable(current), confidence, why, warning)


def revert_warning(cause: Group | None) -> str:
    """Return what would undo a tag that is set on one instance of a group, and where to set it instead."""
    if not cause:
        return ""
    kind = GROUP_KINDS[cause.kind]
    return f"{kind.word} {cause.name}: {kind.risk}; {kind.remedy.format(names=cause.name)}"


def row_error(row: PlanRow, policy: Policy) -> str | None:
    """Return why a policy does not allow a row; None if it does."""
    if not re.fullmatch(REGION_NAME, row.region):  # it becomes part of a host's name
        return f"{row.region!r} is not a region"
    if not policy.covers(row.region):
        return f"{policy.file} does not cover the region {row.region}"
    if policy.accounts and not policy.accounts.covers(row.account_id):
        return f"{policy.file} does not cover the account {row.account_id}"
    if row.tag_key.lower().startswith("aws:") or not 0 < len(row.tag_key) <= MAX_KEY_LENGTH:
        return f"{row.tag_key!r} cannot be written: the tag key is AWS's own, empty or too long"
    if len(row.value) > MAX_VALUE_LENGTH:
        return f"the value has {len(row.value)} characters; EC2 allows {MAX_VALUE_LENGTH}"
    rule = next((rule for rule in policy.rules(row.region) if rule.key == row.tag_key), None)
    if rule is None and row.action in PLAN_ACTIONS:
        return f"{policy.file} does not require {row.tag_key} in {row.region}"
    if rule is None or row.action not in (Action.ADD, Action.REPLACE):
        return None
    if not is_printable(row.value):
        return "the value has invisible characters"
    violation = check_tag({row.tag_key: row.value}, rule, policy.placeholder_values)
    return violation.message if violation else None


PLAN_COLUMNS = (
    "Account Region InstanceId Name Tag Value Action Current Confidence Why Warning Checksum".split()
)
PLAN_NEEDED = ("Account", "Region", "InstanceId", "Tag", "Value", "Action")
MAX_PLAN_PROBLEMS = 1000  # a file with more of them is not a plan
MAX_PLAN_LINE = 1_048_576  # characters; EC2's longest key and value have a few hundred


def plan_lines(rows: Iterable[PlanRow]) -> Iterator[str]:
    """Yield the lines of a plan or an undo file: a header and the rows, or a blank row if there is none."""
    yield csv_line(PLAN_COLUMNS)
    row = None
    for row in rows:
        yield csv_line([*_cells(row)[: len(PLAN_COLUMNS) - 1], ""])
    if row is None:
        yield csv_line([""] * len(PLAN_COLUMNS))


def write_plan(file: TextIOBase, rows: Iterable[PlanRow]) -> None:
    """Write a plan; the checksum in its first row tells later whether anyone has edited it."""
    digest = hashlib.sha256()
    for line in plan_lines(rows):
        digest.update(line.encode())
    lines = plan_lines(rows)
    file.write(next(lines))
    file.write(f"{next(lines)[:-1]}{digest.hexdigest()[:16]}\n")
    file.writelines(lines)


def is_unedited_plan(file: IO[bytes]) -> bool:
    """Return whether a file is just as write_plan wrote it; a plan without a checksum is not."""
    head, first = file.readline(MAX_PLAN_LINE), file.readline(MAX_PLAN_LINE)
    cells, comma, checksum = first.removesuffix(b"\n").rpartition(b",")
    digest = hashlib.sha256(head + cells + comma + b"\n")
    while piece := file.read(CHUNK_SIZE):
        digest.update(piece)
    return digest.hexdigest()[:16].encode() == checksum


def check_plan_output(output: Output) -> None:
    """Raise OutputError if a new plan would replace a file that may be one that a person has edited."""
    with output_errors(output, "read", "name another file"):
        if not output.replaceable or not os.path.exists(output.path):
            return
        with open(output.path, "rb") as file:
            if is_unedited_plan(file):
                return
    raise OutputError(
        f"{output.path} exists and is not as tagcheck wrote it: it may be a plan that you edited, and is "
        f"unchanged. Apply it with --plan {output.path}, write a new one elsewhere (--csv FILE), or delete it"
    )


def read_plan(
    path: str, policy: Policy, actions: Container[Action], check: Callable[[PlanRow], PlanRow] | None = None
) -> PlanRows:
    """Return the rows, as `check` makes them, of a file that a person may have edited; raises PolicyError."""
    rows, problems = PlanRows(), list[Problem]()
    for line, columns, cells in _plan_cells(path, problems):
        try:
            row = _read_row(columns, cells, f"{path}:{line}", actions)
            if message := row_error(row, policy):
                raise UsageError(message)
            rows.add(check(row) if check else row)
        except UsageError as error:
            problems.append(Problem(path, line, 1, "", str(error)))
        if len(problems) == MAX_PLAN_PROBLEMS:
            break
    if problems:
        raise PolicyError(problems)
    return rows


def _plan_cells(path: str, problems: list[Problem]) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield the line that each row ends on, the columns, and the row's cells; adds why the rest is unread."""
    line = 0

    def texts(file: IO[str]) -> Iterator[str]:
        nonlocal line
        while text := file.readline(MAX_PLAN_LINE):
            line += 1
            if len(text) == MAX_PLAN_LINE:
                raise UsageError(f"longer than {MAX_PLAN_LINE:,} characters: this is not a plan")
            if re.search("[\udc80-\udcff]", text):  # how Python keeps bytes that are not UTF-8
                raise UsageError('not UTF-8 (perhaps UTF-16): save it as "CSV UTF-8"')
            yield text

    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = texts(file)
            head = next((text for text in lines if re.search(r"[^\s,;]", text)), "")
            # Excel separates by what the machine's region uses: a semicolon in much of Europe.
            separator = max(",;\t", key=head.count)
            table = csv.reader(itertools.chain([head], lines), delimiter=separator, strict=True)
            columns = [cell.strip() for cell in next(table)]
            lacking = [name for name in PLAN_NEEDED if columns.count(name) != 1]
            if not head:
                line = 1
                raise UsageError("empty: it needs a header, and one row per tag")
            if lacking:
                raise UsageError(f"the header needs {', '.join(lacking)}, once each")
            for cells in table:
                named = itertools.zip_longest(columns, cells, fillvalue="")
                if any(text.strip() for name, text in named if name != "Checksum"):
                    yield line, columns, cells
    except (csv.Error, UsageError) as error:
        message = f"not CSV: {error}" if isinstance(error, csv.Error) else str(error)
        problems.append(Problem(path, line, 1, "", message))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _read_row(
    columns: Sequence[str], texts: Sequence[str], place: str, actions: Container[Action]
) -> PlanRow:
    """Return a row of a plan; raises UsageError if a cell is wrong."""
    if len(texts) != len(columns):
        counts = f"{counted(len(texts), 'cell')} under {counted(len(columns), 'column')}"
        raise UsageError(f"{counts}: does a comma need quotes, or is the file cut short?")
    cells = dict(zip(columns, map(csv_text, texts), strict=True))
    account_id, region, instance_id = (cells[column].strip() for column in PLAN_NEEDED[:3])
    name, tag_key, value, action, *others = (cells.get(column, "") for column in PLAN_COLUMNS[3:-1])
    current, confidence, why, warning = others
    action = action.strip().lower()
    if not re.fullmatch(ACCOUNT_ID, account_id):
        raise UsageError(f"{account_id!r} is not a 12-digit account id: did a spreadsheet cut its zeros?")
    if not re.fullmatch(INSTANCE_ID, instance_id):
        raise UsageError(f"{instance_id!r} is not an instance id, such as i-0123456789abcdef0")
    if action not in list(Action):
        raise UsageError(f"{action!r} is not an action: write {', '.join(PLAN_ACTIONS)}")
    if action not in actions:
        raise UsageError(f"a row to {action}: pass a plan with --plan, an undo file with --undo")
    if action == Action.REPLACE and "Current" not in cells:
        raise UsageError("to replace a value, the plan needs the column Current: it may have changed since")
    instance = (account_id, region, instance_id, name)
    return PlanRow(*instance, tag_key, value, Action(action), current, confidence, why, warning, place)


class UndoFile:
    """The plan that reverts a run: each row is on the disk before its tag is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, PlanRow] = {}  # what may have been written, by account, region, instance and tag
        self._file: IO[bytes] | None = None  # kept open: its name may be another file's later

    def close(self) -> None:
        """Close the file, if any row was added."""
        if self._file:
            self._file.close()

    def add(self, rows: Sequence[PlanRow]) -> None:
        """Append what reverts rows to their former values; raises OutputError."""
        lines = [*plan_lines(map(_reverting, rows))]
        try:
            if self._file is None:
                self._file = open(self.path, "xb", buffering=0, opener=open_private)  # noqa: SIM115
            elif not os.path.samestat(os.fstat(self._file.fileno()), self.path.lstat()):
                raise OSError(errno.ESTALE, "another process replaced it")
            size = os.fstat(self._file.fileno()).st_size
            try:
                with open(self._file.fileno(), "ab", closefd=False) as file:
                    file.write("".join(lines[1:] if self.rows else lines).encode())
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(size)  # half a row could not be read back
                raise
        except FileExistsError:  # of another run in the same second
            self.path = self.path.with_stem(f"{self.path.stem}-{uuid.uuid4().hex[:8]}")
            self.add(rows)
        except OSError as error:
            message = f"the undo file {self.path} cannot be written: {error.strerror}"
            message += "; no more tags were written: free some space and run again"
            raise OutputError(message) from error
        self.rows |= {str(row): row for row in rows}

    def drop(self, rows: Iterable[PlanRow]) -> None:
        """Take out rows that were not written after all, at the end of a run; raises OutputError."""
        for row in rows:
            del self.rows[str(row)]
        new = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}")
        try:
            self.close()
            if not self.rows:
                self.path.unlink()
                return
            with open(new, "x", encoding="utf-8", opener=open_private) as file:
                file.writelines(plan_lines(map(_reverting, self.rows.values())))
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            new.unlink(missing_ok=True)
            message = f"the undo file {self.path} cannot be shortened to what was written: {error.strerror}"
            raise OutputError(message) from error


def _reverting(row: PlanRow) -> PlanRow:
    """Return the row that reverts another one."""
    action, value = (Action.DELETE, "") if row.former is None else (Action.RESTORE, row.former)
    why, current = f"undo of: {row.why.removeprefix('undo of: ')}", row.value_after or ""
    return replace(row, action=action, value=value, current=current, why=why, confidence="", warning="")


MAX_CHANGES = 50  # per run, without --max-changes
MAX_TAGS = 50  # per resource, not counting AWS's own (EC2 user guide, Tag restrictions)
MAX_SPLITS = 50  # per target, so that one that denies everything takes seconds
# EC2 takes 1,000 ids in a call, but asks for fewer where tags are written (EC2 API reference, CreateTags).
# A filter takes 200 values.
READ_BATCH, WRITE_BATCH, FILTER_VALUES = 1000, 200, 200
# EC2 refills ten a second for CreateTags and DeleteTags in an account and region (EC2 developer guide,
# Request throttling); a tenth more is for networks that hold calls back and then deliver several at once.
CALL_INTERVAL = 0.11


def check_accounts(rows: Iterable[PlanRow], policy: Policy, accounts: Mapping[str, Account]) -> None:
    """Raise PolicyError, or UsageError for rows of no file, if an account is not active or is missing."""
    problems = []
    states = {account_id: account.state for account_id, account in accounts.items()}
    for row in (row for row in rows if row.writes and states.get(row.account_id) != "ACTIVE"):
        message = f"{row.account_id} is not the account of the credentials, {', '.join(states)}"
        if policy.accounts:
            state = states.get(row.account_id, "missing")
            message = f"the account {row.account_id} is {state} in the organization: take the row out, or "
            message += "choose others with --account"
        file, _, line = row.place.rpartition(":")
        if not file:
            raise UsageError(f"{row}: {message}")
        problems.append(Problem(file, int(line), 1, "", message))
    if problems:
        raise PolicyError(problems)


def decide(row: PlanRow, tags: Mapping[str, str] | None) -> PlanRow:
    """Return a row with its result, given the instance's tags now; PLANNED if it is to be written.

    Only the value that the row was made for, or an empty one, is overwritten.
    """
    if tags is None:
        return row.with_result(Result.GONE, "the instance is gone")
    now = tags.get(row.tag_key)
    warning = revert_warning(cause_of(tag_groups(tags))) if row.action in PLAN_ACTIONS else ""
    row = replace(row, former=now, warning=warning)
    if now == row.value_after:
        return row.with_result(Result.ALREADY_THERE)
    expected = is_blank(now or "") if row.action is Action.ADD else (now or "") == row.current
    if not expected or not is_printable(now or ""):
        found = "missing" if now is None else repr(now)
        return row.with_result(Result.CHANGED_SINCE, f"it is {found} now")
    new = {row.tag_key, *(key for key in tags if not key.lower().startswith("aws:"))}
    if now is None and len(new) > MAX_TAGS:
        return row.with_result(Result.FAILED, f"it has {MAX_TAGS} tags, which is EC2's limit")
    return row


def _in_parts(items: Sequence[Any], size: int) -> list[Any]:
    """Return items in parts of at most this size."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def describe_tags(client: Any, ids: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """Return the tags of those of at most READ_BATCH instances that are still there; raises TargetError."""
    try:
        pages = [*describe_instances(client, InstanceIds=ids)]
    except TargetError as error:
        if not is_gone(error):
            raise
        # One is gone. A filter ignores it, but takes several calls.
        filters = [{"Name": "instance-id", "Values": values} for values in _in_parts(ids, FILTER_VALUES)]
        pages = [page for each in filters for page in describe_instances(client, Filters=[each])]
    gone = ("shutting-down", "terminated")
    return {each.instance_id: each.tags for page in pages for each in page if each.state not in gone}


Enter = Callable[[str], None]  # gets the credentials of an account; raises TargetError
Call = tuple[bool, tuple[tuple[str, str], ...]]  # True to delete, False to create; the tags


def tag_calls(rows: Iterable[PlanRow]) -> dict[Call, list[str]]:
    """Return the calls that carry rows out, each with the instances that get exactly its tags."""
    tags: dict[tuple[bool, str], dict[str, str]] = {}
    for row in rows:
        deletes = row.value_after is None
        # DeleteTags gets the value as well: it deletes no other (EC2 API reference).
        value = row.current if deletes else row.value
        tags.setdefault((deletes, row.instance_id), {})[row.tag_key] = value
    calls: dict[Call, list[str]] = {}
    for (deletes, id_), of_instance in tags.items():
        calls.setdefault((deletes, tuple(sorted(of_instance.items()))), []).append(id_)
    return calls


def write_tags(
    client: Any, call: Call, ids: Sequence[str], splits: Iterator[int]
) -> Iterator[tuple[Sequence[str], TargetError | None]]:
    """Create or delete the same tags on instances; yields those done, and those refused with the reason.

    EC2 refuses a whole batch because of one instance. It names those that are gone; to find others the batch
    is halved, as often as there are `splits`. Raises TargetError where any other call would fail as well.
    """
    operation = "DeleteTags" if call[0] else "CreateTags"
    pairs = [{"Key": key, "Value": value} for key, value in call[1]]
    batches = _in_parts(ids, WRITE_BATCH)
    while batches:
        batch = batches.pop()
        try:
            answer = call_aws(client, operation, Resources=batch, Tags=pairs)
            if WRITTEN not in answer:  # as in a captive portal's "200 OK"
                raise CallError("ForeignAnswer", "the answer does not confirm it", f"ec2:{operation}")
            yield batch, None
        except TargetError as error:
            if not is_of_instance(error):
                raise
            if gone := is_gone(error) and set(re.findall(INSTANCE_ID, error.message)).intersection(batch):
                yield [*gone], error
                batches += _in_parts([id_ for id_ in batch if id_ not in gone], WRITE_BATCH)
            elif len(batch) > 1 and next(splits, None) is not None:
                batches += _in_parts(batch, (len(batch) + 1) // 2)
            else:
                yield batch, error


# EC2 refuses an instance in more ways than can be listed (a service manages it, its state, a tag policy). So
# these are listed: what any other call meets as well (EC2 API reference, Common client and Server errors).
_DENIED = frozenset("UnauthorizedOperation AccessDenied AccessDeniedException".split())
_OF_TARGET = (ADVICE.keys() - _DENIED) | frozenset(
    "Blocked PendingVerification NotSignedUp InvalidAccessKeyId MissingAuthenticationToken SlowDown 505 "
    "IncompleteSignature ThrottledException RequestThrottled RequestThrottledException RequestTimeout "
    "BandwidthLimitExceeded ServiceUnavailableException RequestTimeoutException".split()
)


def is_of_instance(error: TargetError) -> bool:
    """Return whether an error may be about some instances only, not about the whole target."""
    # botocore's exceptions end in Error: they are of the network, and not AWS's refusal.
    return error.code not in _OF_TARGET and not error.code.endswith("Error")


_CHANGE = tuple(column.name for column in fields(Change))
_INTENDED = f"policy = :policy AND {_SAME_TAG} AND change_id <> :change_id AND status = 'intended'"
_KEEP = (
    f"INSERT INTO changes ({', '.join(_CHANGE)}) VALUES (:{', :'.join(_CHANGE)}) ON CONFLICT (change_id) "
    "DO UPDATE SET former = excluded.former, changed_at = excluded.changed_at, status = excluded.status"
)
_FORGET = "DELETE FROM changes WHERE change_id = :change_id"
_FORGET_EARLIER = f"DELETE FROM changes WHERE {_INTENDED}"
# An earlier run was killed. The last one that intended the value had found another, so it wrote it.
_CONFIRM_EARLIER = (
    "UPDATE changes SET status = 'written' "
    f"WHERE id = (SELECT max(id) FROM changes WHERE {_INTENDED} AND value IS :value)"
)
_ON_RESULT = {
    Result.PLANNED: (_KEEP,),
    Result.WRITTEN: (_KEEP, _FORGET_EARLIER),
    Result.ALREADY_THERE: (_FORGET, _CONFIRM_EARLIER, _FORGET_EARLIER),
    Result.UNKNOWN: (),
}


def change_of(row: PlanRow, run: str, policy_name: str, who: str, at: str) -> Change:
    """Return what the state keeps of a row: what is intended if it is planned, else what was written."""
    intended = row.result is Result.PLANNED
    # ADD writes where nothing is, or blanks: which of them is known once the tags have been read.
    former = row.current or None if intended and row.action is not Action.ADD else row.former
    tag = (row.account_id, row.region, row.instance_id, row.tag_key, former, row.value_after, row.why)
    return Change(f"{run}/{row}", policy_name, *tag, who, at, "intended" if intended else "written")


def record_changes(state: State, changes: Sequence[tuple[Change, Result]]) -> None:
    """Keep what is intended and what was written, and forget the rest; raises StateError."""
    for path in state.attempts() if changes else ():
        with opened_state(path, state.name) as db, writing_state(db, state.name):
            for change, result in changes:
                for statement in _ON_RESULT.get(result, (_FORGET,)):
                    db.execute(statement, asdict(change))
    state.release_signals()


def fetch_changes(
    db: Connection, policy_name: str, instance_id: str, target: Target | None = None
) -> list[Change]:
    """Return what `remediate` wrote on an instance, in a target or in all, the oldest first."""
    where, values = "policy = ? AND instance_id = ?", [policy_name, instance_id]
    if target:
        where += " AND account_id = ? AND region = ?"
        values += (target.account_id, target.region)
    rows = db.execute(f"SELECT {', '.join(_CHANGE)} FROM changes WHERE {where} ORDER BY id", values)
    return [load_record(Change, row) for row in rows]


def check_undo(db: Connection, name: str, policy_name: str, row: PlanRow) -> PlanRow:
    """Return a row of an undo file, `skip` if it is reverted already; raises UsageError if not on record."""
    # Anyone can write or edit an undo file.
    found = fetch_changes(db, policy_name, row.instance_id, row.target)
    changes = [change for change in found if change.tag_key == row.tag_key]
    last = next((change for change in reversed(changes) if change.status == "written"), None)
    # A person may have set the same value again since, which must stay.
    if last and (last.former or "", last.value) == (row.current, row.value_after):
        return replace(row, action=Action.SKIP, why=f"reverted already, at {last.changed_at}")
    for change in changes:
        # The record of a killed run says "missing" for an empty tag as well.
        blank = is_blank(change.former or "") and is_blank(row.value_after or "")
        former = row.value_after if blank else change.former
        # What is not printable is never written over, and so not in an undo file: nothing is unescaped.
        if (change.value or "", former) == (row.current, row.value_after):
            return row
    done = f"set it to {row.current!r}" if row.current else "deleted it"
    before = "missing" if row.action is Action.DELETE else repr(row.value)
    raise UsageError(
        f"{row.instance_id} {row.tag_key}: the state {name} has no record that tagcheck {done} under the "
        f"policy {policy_name} when it was {before}: take the row out, or name that run's state with --state"
    )


def apply_plan(
    rows: PlanRows,
    aws: Aws,
    enter: Enter,
    undo: UndoFile,
    state: State,
    describe: Callable[[PlanRow], Change],
) -> None:
    """Carry out a plan, target by target, and keep each row's result.

    `describe` returns the record of a row. The state has every row as intended before the first call, and the
    undo file has a row before its own call: if the run is killed at any point, state, file and tags tell what
    was done. --max-changes bounds the memory.
    """

    def record(done: Iterable[PlanRow]) -> None:
        record_changes(state, [(describe(row), row.result) for row in done])

    def is_refused(row: PlanRow) -> bool:
        return row.result in (Result.GONE, Result.FAILED) and str(row) in undo.rows

    writing = [row for row in rows if row.writes]
    record(writing)
    settled: list[PlanRow] = []
    try:
        for target, group in itertools.groupby(writing, key=lambda row: row.target):
            for batch in _apply_to_target(aws, target, group, undo, enter):
                settled += itertools.filterfalse(is_refused, batch)
                if isinstance(state, LocalState):  # one in S3 would be downloaded and uploaded for each batch
                    record(settled)
                    settled.clear()
                rows.update(batch)
            LOG.info("%s: done", target)
    finally:
        untouched = [row for row in rows if row.result is Result.PLANNED and str(row) not in undo.rows]
        record([*settled, *(row.with_result(Result.FAILED) for row in untouched)])
        if refused := [*filter(is_refused, rows)]:
            undo.drop(refused)  # first the file: a row of it without its record would be refused
            record(refused)


def _apply_to_target(
    aws: Aws, target: Target, rows: Iterable[PlanRow], undo: UndoFile, enter: Enter
) -> Iterator[list[PlanRow]]:
    """Carry out the rows of one target, up to an error that all would meet; yields their results."""
    # Instances that get the same tags come together, which makes calls few.
    instances = itertools.groupby(rows, key=lambda row: row.instance_id)
    alike = [sorted(group, key=lambda row: row.tag_key) for _, group in instances]
    alike.sort(key=lambda rows: [(row.tag_key, row.value) for row in rows])
    splits = iter(range(MAX_SPLITS))
    failure: TargetError | None = None
    try:
        enter(target.account_id)
    except TargetError as error:
        failure = error
    for part in _in_parts(alike, READ_BATCH):
        batch = [*itertools.chain.from_iterable(part)]
        if failure:
            yield [row.with_result(Result.FAILED, f"not tried: {failure}") for row in batch]
            continue
        with aws.account(target.account_id):
            batch, failure = _apply_batch(aws.client("ec2", target.region), batch, undo, splits)
        yield batch


def _apply_batch(
    client: Any, rows: Sequence[PlanRow], undo: UndoFile, splits: Iterator[int]
) -> tuple[list[PlanRow], TargetError | None]:
    """Read the tags of a batch again and write; returns its rows, and the error that ends the target."""
    ids = [*dict.fromkeys(row.instance_id for row in rows)]
    try:
        tags = describe_tags(client, ids)
    except TargetError as error:
        return [row.with_result(Result.FAILED, str(error)) for row in rows], error
    decided = []
    for row in rows:
        decided.append(decide(row, tags.get(row.instance_id)))
        if decided[-1].result is Result.PLANNED:  # it counts to the limit of tags
            tags[row.instance_id] = {**tags[row.instance_id], row.tag_key: row.value}
    writing = [row for row in decided if row.result is Result.PLANNED]
    if writing:
        undo.add(writing)
    answers: dict[tuple[bool, str], TargetError | None] = {}
    failure, after = None, None
    try:
        for call, alike in tag_calls(writing).items():
            for answered, answer in write_tags(client, call, alike, splits):
                answers |= {(call[0], id_): answer for id_ in answered}
    except TargetError as error:
        failure = error
        with contextlib.suppress(TargetError):  # the answer may have been lost on its way back
            after = describe_tags(client, ids)
    for n, row in enumerate(decided):
        if row.result is Result.PLANNED:
            answer = answers.get((row.value_after is None, row.instance_id), failure)
            decided[n] = row.with_result(*_result(row, answer, after))
    return decided, failure


def _result(
    row: PlanRow, error: TargetError | None, after: Mapping[str, Mapping[str, str]] | None
) -> tuple[Result, str]:
    """Return the result of a row after its call; `after` are the tags after an error of the target."""
    if error is None:
        return Result.WRITTEN, ""
    if is_gone(error):
        return Result.GONE, str(error)
    if is_of_instance(error):
        return Result.FAILED, str(error)
    if after is None:
        return Result.UNKNOWN, f"{error}; it may have been written: run again to find out"
    found = decide(row, after.get(row.instance_id)).result is Result.ALREADY_THERE
    return (Result.WRITTEN, "") if found else (Result.FAILED, str(error))


@dataclass(frozen=True, slots=True)
class Remediation:
    """A plan with its results; `undo_file` is None if it was not applied, `left_out` if it is not new."""

    policy: Policy
    rows: PlanRows
    undo_file: str | None
    left_out: Counter[LeftOut] | None


def write_remediation_json(file: TextIOBase, done: Remediation) -> None:
    """Write a plan as one JSON object, one line per row."""
    policy, rows, totals = done.policy, done.rows, done.rows.counts("result")
    names = "account_id region instance_id name tag_key value action why result message warning".split()

    def record(row: PlanRow) -> dict[str, Any]:
        warning = row.warning if row.result in (Result.PLANNED, Result.WRITTEN) else ""
        others = {"value": row.value_after, "message": row.message or None, "warning": warning or None}
        return to_record(row, names) | others

    head = {
        "version": __version__,
        "policy": to_record(policy, ("name", "file", "digest")),
        "changed": bool(totals[Result.WRITTEN] or totals[Result.UNKNOWN]),  # read by Ansible
        "applied": done.undo_file is not None,
        "undo_file": done.undo_file or None,
        "exit_code": int(rows.exit_code),
        "exit_name": rows.exit_code.name,
        "summary": {result: totals[result] for result in Result},
        "warnings": rows.warnings(),
        "left_out": {reason.name.lower(): number for reason, number in (done.left_out or {}).items()},
    }
    write_json_object(file, head, rows=map(record, rows))


REMEDIATION_WRITERS: dict[str, Callable[[TextIOBase, Remediation], None]] = {
    "csv": lambda file, done: write_plan(file, done.rows),
    "json": write_remediation_json,
}


def remediation_lines(
    done: Remediation, csv_path: str, command: Callable[..., list[str]], width: int | None
) -> Iterator[str | Command]:
    """Yield a plan or its results, for people, and what to do next."""

    def cells(row: PlanRow) -> tuple[str, ...]:
        where = (row.account_id, row.region, row.instance_id, name_cell(row.name))
        return (row.action, *where, cut_text(row.tag_key, 40), cut_text(row.value, 40) or "-", row.why)

    policy, rows, undo_file = done.policy, done.rows, done.undo_file
    actions, totals, warnings = rows.counts("action"), rows.counts("result"), rows.warnings()
    aside = [action for action in (Action.REVIEW, Action.SKIP) if actions[action]]
    others = "".join(f", {actions.pop(action):,} to {action}" for action in aside)
    writing = ((row.target, row.instance_id) for row in rows if row.writes)
    instances = sum(1 for _ in itertools.groupby(writing))
    tags = f"{counted(actions.total(), 'tag')} to write on {counted(instances, 'instance')}"
    yield f"Policy {policy.name} ({policy.file}): {tags}{others}"
    if undo_file is not None:
        fine = (Result.NOT_ASKED, Result.WRITTEN, Result.ALREADY_THERE)
        left = totals.total() - sum(totals[result] for result in fine)
        counts = f"{totals[Result.WRITTEN]:,} written, {totals[Result.ALREADY_THERE]:,} already there"
        yield f"{counts}, {left:,} not written{':' if left else ''}"
        not_written = (row for row in rows if row.result not in fine)
        lines = (f"  {row.result}  {row}: {row.message}" for row in not_written)
        yield from (*itertools.islice(lines, SUMMARY_FINDINGS), *more_lines(left - SUMMARY_FINDINGS))
    elif totals:
        head = ("ACTION", "ACCOUNT", "REGION", "INSTANCE", "NAME", "TAG", "VALUE", "WHY")
        yield from ("", *table_lines(map(cells, rows), totals.total(), width, head, csv_path, 3), "")
    for reason, number in (done.left_out or Counter()).most_common():
        yield f"Left out on {counted(number, 'instance')}: {reason}"
    yield from (f"Warning: {each['message']}" for each in warnings[:SUMMARY_FINDINGS])
    yield from more_lines(len(warnings) - SUMMARY_FINDINGS)
    fixes = actions[Action.ADD] or actions[Action.REPLACE]
    if fixes and undo_file is None:
        yield "Terraform and other infrastructure as code may revert these tags: set them there as well"
    if fixes and totals[Result.WRITTEN]:
        yield "The findings stay open until the next scan, which resolves them as tagged"
    if undo_file:
        yield Command("Undo it with:", command("--undo", undo_file, "--apply"))
    elif undo_file is None and actions:
        yield Command("Plan only. Apply it with:", command("--apply"))
    elif undo_file is None and Action.REVIEW in aside:
        yield "Nothing to write: put replace in place of review where the new value is right"
    elif undo_file is None:
        is_open = done.left_out is None or done.left_out
        yield f"Nothing to write{'' if is_open else ': no finding to fix is open'}"


########################################################################################################
# 11 Starters: yaml_text, survey_tags, fleet_rule, read_rules, make_starter, policy_lines, finding_lines
########################################################################################################


@dataclass(frozen=True, slots=True)
class StarterRule:
    """One rule of a starter policy, with the evidence for each of its lines."""

    key: str
    evidence: str
    notes: tuple[str, ...] = ()
    values: tuple[tuple[str, str], ...] = ()  # each with its evidence
    pattern: str = ""
    pattern_evidence: str = ""
    when: str = ""  # as YAML
    flags: frozenset[str] = frozenset()  # of allow_empty, ignore_case and optional


@dataclass(frozen=True, slots=True)
class Starter:
    """What a starter policy is made of."""

    name: str
    rules: Sequence[StarterRule]
    regions: Mapping[str, str]  # each with its evidence
    placeholders: Mapping[str, int]
    services: Mapping[str, int]  # that operate instances
    notes: Sequence[str]


# What other YAML readers take for true, false or nothing; a number or a date does not begin with a letter.
_YAML_NOT_TEXT = frozenset("y n yes no on off true false null".split())


def yaml_text(text: str) -> str:
    """Return a printable text as YAML that every reader takes for this text, also within [] and {}."""
    if re.fullmatch(r"[A-Za-z][\w./@+-]*( [\w./@+-]+)*", text, re.ASCII):
        return f'"{text}"' if text.casefold() in _YAML_NOT_TEXT else text
    return f'"{text}"' if not re.search(r'["\\]', text) else "'" + text.replace("'", "''") + "'"


def _shown(text: str) -> str:
    """Return a text of a stranger for a comment: short, and in quotes where it would be misread."""
    return text if re.fullmatch(r"[\w.:/@+*-]{1,40}", text, re.ASCII) else repr(cut_text(text, 40))


def _listed(counts: Iterable[tuple[str, object]]) -> str:
    """Return texts for a comment, each with what is known of it: `prd (2), pord (1) and 3 more`."""
    shown = [f"{_shown(text)} ({f'{note:,}' if isinstance(note, int) else note})" for text, note in counts]
    return first_named(shown, 6)


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return what was counted, the most common first; the order of the input does not matter."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _is_key(key: str) -> bool:
    """Return whether a policy can require a tag key."""
    visible = 0 < len(key) <= MAX_KEY_LENGTH and is_printable(key) and key == key.strip()
    return visible and not key.lower().startswith("aws:")


def _is_value(value: str) -> bool:
    """Return whether a policy can list a tag value."""
    return len(value) <= MAX_VALUE_LENGTH and is_printable(value) and not is_blank(value)


# ---- From a fleet -------------------------------------------------------------------------------------

# Keys that tools write, by how they begin in lower case: nobody should have to type them.
_TOOL_KEYS = {
    "AWS": "aws:",  # reserved for AWS (EC2 User Guide, Tag restrictions)
    "EKS": "eks:",  # eks:cluster-name (EKS User Guide, Managed node groups)
    "ECS": "ecs:|amazonecs",  # AmazonECSManaged (ECS Developer Guide, Capacity providers)
    "EMR": "elasticmapreduce|for-use-with-amazon-emr",  # the latter: EMR Management Guide, Managed policies
    "Elastic Beanstalk": "elasticbeanstalk:",  # elasticbeanstalk:environment-name (Developer Guide, Tagging)
    "Kubernetes": r"kubernetescluster$|([\w.-]+\.)?(kubernetes|k8s)\.io/",  # kubernetes.io/cluster/NAME
    "Karpenter": r"karpenter\.sh/|([\w.-]+\.)?k8s\.aws/",  # karpenter.sh/nodepool (NodeClasses, spec.tags)
    "OpenShift": r"red-hat-|api\.openshift\.com/",  # red-hat-managed (ROSA)
    "Spot by Flexera": "spotinst:",  # spotinst:aws:ec2:group:id
    "Cloud Custodian": "maid_status$|c7n",  # maid_status (mark-for-op)
}
_PLACEHOLDERS = frozenset("- -- . ? n/a na none null nil unknown tbd tba todo xxx changeme change-me".split())
MAX_STARTER_RULES, MAX_STARTER_VALUES = 30, 12  # what a person still reads
MAX_RARE_VALUES, MAX_SHAPES = 50, 1000  # values to compare with the usual ones, and to find a pattern for
NEARLY_ALL = 0.95


@functools.lru_cache(4096)
def _tool_of(key: str) -> str:
    """Return the tool that writes a tag key; "" where people do."""
    return next((tool for tool, begin in _TOOL_KEYS.items() if re.match(begin, key.casefold())), "")


class TagUse(NamedTuple):
    """How many instances have a tag in each spelling, the one to require first, and their values."""

    spellings: dict[str, int]
    values: Counter[str]


def survey_tags(instances: Sequence[Instance]) -> tuple[list[TagUse], list[str]]:
    """Return the tags that at least half of the instances have, and notes on those that are left out."""
    counts = Counter(itertools.chain.from_iterable(instance.tags for instance in instances))
    spelled: dict[str, Counter[str]] = {}
    for key, number in counts.items():  # keys that differ only in case, spaces, `_` or `-` are one tag
        if not _tool_of(key):
            spelled.setdefault(bare_key(key) or key, Counter())[key] = number
    half = (len(instances) + 1) // 2
    groups = [spellings for spellings in spelled.values() if spellings.total() >= half]
    # An instance may have a tag in two spellings.
    common = [use for use in _tag_uses(groups, instances) if use.values.total() >= half]
    usable = [use for use in common if _is_key(next(iter(use.spellings)))]
    notes = []
    if not usable:
        notes.append("No tag is on half of the instances: required are the most common ones")
        groups = [spellings for spellings in spelled.values() if any(map(_is_key, spellings))]
        groups = sorted(groups, key=lambda spellings: (-spellings.total(), min(spellings)))[:3]
        usable = _tag_uses(groups, instances)
    if len(usable) > MAX_STARTER_RULES:
        notes.append(f"{counted(len(usable) - MAX_STARTER_RULES, 'more tag')} on half of the instances")
    odd = [each for use in common for each in use.spellings.items() if not _is_key(next(iter(use.spellings)))]
    if odd:
        notes.append(f"Left out, as a policy cannot require such keys: {_listed(odd)}")
    tools = {key: f"{_tool_of(key)}, {n:,}" for key, n in _by_count(counts) if n >= half and _tool_of(key)}
    if tools:
        notes.append(f"Left out, as tools write them: {_listed(tools.items())}")
    return usable[:MAX_STARTER_RULES], notes


def _tag_uses(groups: Iterable[Mapping[str, int]], instances: Sequence[Instance]) -> list[TagUse]:
    """Return how instances use tags, each given by its spellings; the most common tag comes first."""
    uses = []
    for spellings in groups:
        ordered = dict(sorted(_by_count(spellings), key=lambda item: not _is_key(item[0])))
        found = (next((each.tags[key] for key in ordered if key in each.tags), None) for each in instances)
        uses.append(TagUse(ordered, Counter(value for value in found if value is not None)))
    return sorted(uses, key=lambda use: (-use.values.total(), bare_key(next(iter(use.spellings)))))


def fleet_rule(use: TagUse, total: int) -> tuple[StarterRule, Mapping[str, int]]:
    """Return the rule that a fleet's use of a tag amounts to, and which of its values are placeholders."""
    (key, _), *others = use.spellings.items()
    evidence = f"{use.values.total():,} of {counted(total, 'instance')}"
    used: Counter[str] = Counter()
    empty: Counter[str] = Counter()
    for value, number in use.values.items():
        if is_empty(value, _PLACEHOLDERS):
            empty[stripped(value).casefold()] += number
        else:
            used[value] = number
    evidence += f", {empty.total():,} of them empty or a placeholder" if empty else ""
    also = f"also spelled {_listed(others)}: a scan reports this, and suggests the value"
    rule = StarterRule(key, evidence, (also,) if others else ())
    placeholders = {text: number for text, number in empty.items() if text}
    if empty.total() > used.total():
        return replace(rule, flags=frozenset({"allow_empty"})), placeholders
    if bare_key(key) == "name":  # names are free
        return rule, placeholders
    if len(used) == 1:
        return replace(rule, evidence=f"{evidence}; always {_shown(*used)}"), placeholders
    pattern = _shape(used)
    # A code, such as CC-1234 or an address, has a shape even if it has few values.
    is_code = re.search(r"\[0-9\]\{|@", pattern)
    if not is_code and (listed := _with_values(rule, used)):
        return listed, placeholders
    has_shape = is_code or (pattern and len(used) > 3)
    return (_with_pattern(rule, pattern, used) if has_shape else rule), placeholders


def _with_values(rule: StarterRule, found: Mapping[str, int]) -> StarterRule | None:
    """Return a rule with the few values that nearly all instances have; None if there are more."""
    most = heapq.nlargest(MAX_STARTER_VALUES + MAX_RARE_VALUES, found.values())
    if sum(most) < NEARLY_ALL * sum(found.values()):
        return None
    by_case: dict[str, str] = {}
    folded: Counter[str] = Counter()
    for value, number in _by_count(found):
        folded[by_case.setdefault(value.casefold(), value)] += number
    # Where more than a tenth are in another case, the case does not matter to people.
    ignore_case = 10 * sum(found[value] for value in folded) < 9 * folded.total()
    counts: Mapping[str, int] = folded if ignore_case else found
    ordered = _by_count(counts)
    usual = {value: number for value, number in ordered[: MAX_STARTER_VALUES + 1] if number > 2}
    mistakes: dict[str, str] = {}
    for value, number in ordered[: MAX_STARTER_VALUES + MAX_RARE_VALUES]:
        if meant := next((each for each in usual if _is_mistake(value, number, each, usual[each])), ""):
            mistakes[value] = f"{number:,}, for {_shown(meant)}?"
    kept = {value: number for value, number in ordered if value not in mistakes and _is_value(value)}
    notes = [f"left out as probable typing mistakes: {_listed(mistakes.items())}"] if mistakes else []
    if len(kept) > MAX_STARTER_VALUES:
        notes.append(f"left out as rare: {_listed(item for item in kept.items() if item[0] not in usual)}")
        kept = {value: number for value, number in kept.items() if value in usual}
    number, total = sum(kept.values()), folded.total()
    explained = number + sum(counts[value] for value in mistakes)
    if not kept or len(kept) > MAX_STARTER_VALUES or number < 3 * len(kept) or explained < NEARLY_ALL * total:
        return None
    rare = {value: ": rare, is it meant?" for value, n in kept.items() if n < 3 and 50 * n <= total}
    listed = tuple((value, counted(n, "instance") + rare.get(value, "")) for value, n in kept.items())
    flags = frozenset({"ignore_case"} if ignore_case else ())
    return replace(rule, values=listed, notes=(*rule.notes, *notes), flags=flags)


def _is_mistake(rare: str, number: int, usual: str, usually: int) -> bool:
    """Return whether a rare value looks like a usual one, mistyped."""
    if rare == usual or 4 * number > usually or len(rare) > 64:
        return False
    if bare_key(rare) == bare_key(usual):
        return 9 * number <= usually
    words, others = (re.findall(r"[^\W\d_]+|\d+", text.casefold()) for text in (rare, usual))
    pairs = [(word, other) for word, other in zip(words, others, strict=False) if word != other]
    # Neither of team-a and team-b is a mistake, nor of web1 and web2.
    long = all(len(min(pair, key=len)) > 2 and "".join(pair).isalpha() for pair in pairs)
    if not long or len(words) != len(others) or (number > 2 and 50 * number > usually):
        return False
    return all(difflib.SequenceMatcher(None, *pair).ratio() > 0.7 for pair in pairs)


def _with_pattern(rule: StarterRule, pattern: str, found: Mapping[str, int]) -> StarterRule:
    """Return a rule with a pattern, and its exceptions."""
    matching = [*filter(re.compile(pattern).fullmatch, found)]
    others = _by_count({value: found[value] for value in found.keys() - matching})
    notes = (*rule.notes, *([f"not of this form: {_listed(others)}"] if others else ()))
    number, total = (sum(map(found.__getitem__, values)) for values in (matching, found))
    evidence = f"{number:,} of {counted(total, 'value')}, such as {_shown(min(matching))}"
    return replace(rule, pattern=pattern, pattern_evidence=evidence, notes=notes)


def _shape(found: Mapping[str, int]) -> str:
    """Return a readable pattern that nearly all values match, such as `CC-[0-9]{4}`; "" if there is none."""
    enough = NEARLY_ALL * sum(found.values())
    addresses = [*filter(re.compile(EMAIL_ADDRESS).fullmatch, found)]
    if addresses and sum(map(found.__getitem__, addresses)) >= enough:
        domains = {value.rpartition("@")[2] for value in addresses}
        return f"[^@ ]+@{escaped(*domains)}" if len(domains) == 1 else "[^@ ]{1,64}@[A-Za-z0-9.-]{1,80}"
    some = _by_count(found)[:: len(found) // MAX_SHAPES + 1]
    split = {value: _PIECES.findall(value) for value, _ in some if len(value) <= 64}
    for exact in (True, False):
        alike: dict[tuple[str, ...], list[str]] = {}
        for value, pieces in split.items():
            alike.setdefault(tuple(_kind(piece, exact=exact) for piece in pieces), []).append(value)
        covered = {kinds: sum(map(found.__getitem__, values)) for kinds, values in alike.items()}
        kinds = max(covered, key=lambda kinds: (covered[kinds], kinds), default=())
        if not kinds or covered[kinds] < NEARLY_ALL * sum(number for _, number in some):
            continue
        columns = zip(*(split[value] for value in alike[kinds]), strict=True)
        parts = [
            kind if "0-9" in kind or len({*column}) > 1 else escaped(column[0])
            for kind, column in zip(kinds, columns, strict=True)
        ]
        # Without digits, or a word that all have in common, these are any words.
        if any("0-9" in part or part[0].isalnum() for part in parts):
            for many in ("]+", "]{1,20}"):
                pattern = "".join(part.replace("]+", many) for part in parts)
                matching = filter(re.compile(pattern).fullmatch, found)
                usable = is_quick(pattern) and is_printable(pattern)
                if usable and sum(map(found.__getitem__, matching)) >= enough:
                    return pattern
    return ""


_PIECES = re.compile("[0-9]+|[a-z]+|[A-Z]+|.", re.DOTALL)


def _kind(piece: str, *, exact: bool) -> str:
    """Return the pattern of a run of digits or letters; any other character stands for itself."""
    if piece[0] in "0123456789":
        return (f"[0-9]{{{len(piece)}}}" if len(piece) > 1 else "[0-9]") if exact else "[0-9]+"
    if piece.isascii() and piece.isalpha():
        return "[a-z]+" if piece.islower() else "[A-Z]+"
    return escaped(piece)


# ---- From AWS's own rules: tag policies, and required-tags of AWS Config -----------------------------

MAX_RULES_BYTES = 10_000_000
_RULES_WANTED = (
    'neither an AWS tag policy ({"tags": …}), nor what `aws organizations describe-effective-policy`, '
    "`describe-policy` or `aws configservice describe-config-rules` prints"
)
_OF_INSTANCES = ("ec2:instance", "ec2:*", "ec2:all_supported", "*")
# It says: "Untagged resources … aren't evaluated", "Like tag keys, tag values are case sensitive".
TAG_POLICY_PAGE = (
    "https://docs.aws.amazon.com/organizations/latest/userguide/orgs_manage_policies_tag-policies.html"
)


@dataclass(frozen=True, slots=True)
class AwsRules:
    """The rules that files from AWS hold, notes on what a policy cannot say, and their regions."""

    rules: dict[str, StarterRule] = field(default_factory=dict)  # by the key without its case
    notes: list[str] = field(default_factory=list)
    regions: set[str] = field(default_factory=set)

    def note(self, what: str, why: str) -> None:
        """Add a note on what a policy cannot say."""
        self.notes.append(f"No equal for {what}: {why}")

    def add(self, rule: StarterRule, wanted: Iterable[str], *, wildcards: bool = False) -> None:
        """Add a rule with the values that it allows, or join it with that for the same key."""
        what, values = f"{_shown(rule.key)} of the {rule.evidence}", [*dict.fromkeys(wanted)]
        if odd := [value for value in values if not _is_value(value)]:
            self.note(what, f"a policy cannot list the value {', '.join(map(_shown, odd))}")
        if not _is_key(rule.key):
            return self.note(what, "a policy cannot require such a key")
        if values and not (values := [value for value in values if value not in odd]):
            return None
        if wildcards and any("*" in value for value in values):
            pattern = "|".join(".*".join(map(escaped, re.split(r"\*+", value))) for value in values)
            rule = replace(rule, pattern=pattern, pattern_evidence=", ".join(map(_shown, values)))
        else:
            rule = replace(rule, values=tuple((value, "") for value in values))
        known = self.rules.get(rule.key.casefold())
        rule, why = _joined(known, rule) if known else (rule, "")
        self.rules[rule.key.casefold()] = rule
        return self.note(what, why) if why else None


def read_rules(paths: Iterable[str]) -> AwsRules:
    """Read AWS tag policies and required-tags rules of AWS Config as one; raises UsageError."""
    found = AwsRules()
    for path in paths:
        shown = "standard input" if path == "-" else path
        try:
            content = read_input(path, MAX_RULES_BYTES + 1)
            if len(content) > MAX_RULES_BYTES:
                raise ValueError(f"it is larger than {MAX_RULES_BYTES:,} bytes")
            _read_aws_answer(parse_json(content), found)
        except OSError as error:
            raise UsageError(f"cannot read {shown}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"{shown} is {_RULES_WANTED}: {json_error(error)}") from error
    if not found.rules:
        raise UsageError("; ".join(["--from has no rule for EC2 instances", *found.notes]))
    return found


def _read_aws_answer(answer: Any, found: AwsRules) -> None:
    """Add the rules of one file; raises KeyError, TypeError or ValueError."""
    for outer, inner in (("EffectivePolicy", "PolicyContent"), ("Policy", "Content")):
        if isinstance(answer, dict) and outer in answer:
            answer = parse_json(json_at(answer, str, outer, inner))
    if isinstance(answer, dict) and "ConfigRuleName" in answer:
        answer = {"ConfigRules": [answer]}
    if isinstance(answer, dict) and "ConfigRules" in answer:
        if answer.get("NextToken"):
            raise ValueError("it has a NextToken, so more rules follow: save it without --max-items")
        for rule in json_at(answer, list, "ConfigRules"):
            _read_config_rule(rule, found)
        return
    tags = json_at(answer, dict, "tags")
    found.regions.add("*")
    for name in tags:
        if name.startswith("@@"):
            found.note(f"{_shown(name)} of the tag policy", "it is about other tag policies")
        else:
            _read_tag_rule(name, json_at(tags, dict, name), found)


def _read_tag_rule(name: str, entry: dict[str, Any], found: AwsRules) -> None:
    """Add the rule of a tag policy for one key; raises TypeError or ValueError."""
    where = f"tag policy {_shown(name)}"
    known = ("tag_key", "tag_value", "enforced_for", "report_required_tag_for")
    given: dict[str, Any] = {}
    for part, value in entry.items():
        assigned = value if isinstance(value, dict) else {"@@assign": value}
        given[part] = assigned.get("@@assign", assigned.get("@@append"))
        if part not in known:
            found.note(f"{_shown(part)} of the {where}", "left out")
        elif "@@append" in assigned:
            found.note(f"@@append of the {where}", "it adds to a parent's values: give the effective policy")
        elif other := [name for name in assigned if name != "@@assign"]:
            found.note(f"{', '.join(map(_shown, other))} of the {where}", "left out")
    lists = {part: json_at(given, list, part) for part in known[1:] if given.get(part) is not None}
    values = [json_at({"value": value}, str, "value") for value in lists.get("tag_value", ())]
    required = lists.get("report_required_tag_for", ())
    is_required = any(str(each).lower() in _OF_INSTANCES for each in required)
    flags = set() if is_required else {"optional"}
    # Without tag_value "any value (including no value at all) is compliant" (Tag policy syntax).
    if not values or {"", "*"} & {*values}:
        flags.add("allow_empty")
    notes = []
    if lists.get("enforced_for"):
        notes.append("enforced_for has no equal: tagcheck reports such tags, it does not refuse them")
    if required and not is_required:
        notes.append("report_required_tag_for does not name ec2:instance")
    # "If case treatment isn't defined, lowercase is the default case treatment for tag keys" (there, too).
    key = name.lower() if given.get("tag_key") is None else json_at(given, str, "tag_key")
    rule = StarterRule(key, where, (*notes,), flags=frozenset(flags))
    found.add(rule, () if "*" in values else filter(None, values), wildcards=True)


def _read_config_rule(rule: Any, found: AwsRules) -> None:
    """Add the rules of one required-tags rule of AWS Config; raises KeyError, TypeError or ValueError."""
    where = f"Config rule {_shown(json_at(rule, str, 'ConfigRuleName'))}"
    owner, kind = (json_at(rule, str, "Source", name) for name in ("Owner", "SourceIdentifier"))
    if (owner, kind) != ("AWS", "REQUIRED_TAGS"):
        return found.note(f"the {where}", f"it is {_shown(kind)}, not REQUIRED_TAGS")
    scope = json_at(rule, dict, "Scope") if rule.get("Scope") else {}
    types = json_at(scope, list, "ComplianceResourceTypes") if scope.get("ComplianceResourceTypes") else ()
    if types and "AWS::EC2::Instance" not in types:
        return found.note(f"the {where}", "it is not for AWS::EC2::Instance")
    names = ("ComplianceResourceId", "TagKey", "TagValue")
    one, key, value = (json_at(scope, str, name) if scope.get(name) else "" for name in names)
    if (one and not re.fullmatch(INSTANCE_ID, one)) or not is_printable(key + value):
        return found.note(f"the {where}", f"a policy cannot hold its scope {_shown(one or f'{key}={value}')}")
    if "*" in value or "?" in value:
        what = f"the scope {_shown(f'{key}={value}')} of the {where}"
        found.note(what, "a policy takes * for any text and ? for any character, so more instances match")
    text = yaml_text(value) if value else '["", "*"]'
    when = f"{{tags: {{{yaml_text(key)}: {text}}}}}" if key else ""
    when = f"{{instances: [{one}]}}" if one else when
    if isinstance(given := rule.get("InputParameters"), str):
        given = parse_json(given)
    given = json_at({"InputParameters": given}, dict, "InputParameters")
    region = text_at(rule, "ConfigRuleArn").split(":")[3:4]
    found.regions.update(region if region and is_region(region[0]) else ["*"])
    for number in range(1, 7):
        if f"tag{number}Key" in given:
            name = json_at(given, str, f"tag{number}Key").strip()
            listed = json_at(given, str, f"tag{number}Value") if f"tag{number}Value" in given else ""
            values = [*filter(None, map(str.strip, listed.split(",")))]
            flags = frozenset(() if values else {"allow_empty"})
            found.add(StarterRule(name, where, when=when, flags=flags), values)
    return None


def _joined(one: StarterRule, other: StarterRule) -> tuple[StarterRule, str]:
    """Return a rule that asks for what both ask, or the first and why there is none."""
    values = [pair for pair in one.values or other.values if not other.values or pair in other.values]
    pattern = one.pattern or other.pattern
    if pattern:
        values = [pair for pair in values if ValuePattern(pattern).judge(pair[0]) is Verdict.ALLOWED]
    why = ""
    if one.key != other.key:
        why = "another spelling"
    elif one.when != other.when:
        why = "for other instances"
    elif (not values and (one.values or other.values)) or (other.pattern and pattern != other.pattern):
        why = "other values"
    if why:
        return one, f"{why} than in the {one.evidence}, which is kept"
    both = replace(one, evidence=f"{one.evidence}, {other.evidence}", flags=one.flags & other.flags)
    both = replace(both, notes=tuple(dict.fromkeys((*one.notes, *other.notes))), values=tuple(values))
    said = one.pattern_evidence or other.pattern_evidence
    return replace(both, pattern="" if values else pattern, pattern_evidence=said), ""


# ---- What a starter policy is made of, as YAML, and what it would find -------------------------------


def make_starter(name: str, fleet: Fleet, regions: Sequence[str], given: AwsRules | None) -> Starter:
    """Return what a policy is made of: the rules that are given or the fleet's own, and its regions."""
    instances = [instance for each in fleet.values() for instance in each]
    counts: Counter[str] = Counter()
    for target, each in fleet.items():
        counts[target.region] += len(each)
    new = {region: number for region, number in counts.items() if not is_region(region)}
    notes = [f'Under "*", as tagcheck does not know them: {_listed(_by_count(new))}'] if new else []
    found = {region: counted(number, "instance") for region, number in counts.items() if region not in new}
    if regions:
        found = {region: found.get(region, "no instances" if fleet else "") for region in regions}
    elif given and not fleet and "*" not in given.regions:
        found = dict.fromkeys(given.regions, "")
    else:
        found["*"] = f"every {'other ' if found else ''}enabled region"
    services = Counter(instance.managed_by for instance in instances if instance.managed_by)
    services = services if all(map(_is_value, services)) else Counter({"*": services.total()})
    if given:
        own = given.regions - {"*"}
        if own and own != found.keys():
            notes.append(f"The Config rules are those of {', '.join(sorted(own))}")
        return Starter(name, [*given.rules.values()], found, {}, services, [*notes, *given.notes])
    people = [instance for instance in instances if not instance.managed_by]
    uses, more = survey_tags(people)
    pairs = [fleet_rule(use, len(people)) for use in uses]
    placeholders = sum((Counter(empty) for _, empty in pairs), Counter[str]())
    rules = [rule for rule, _ in pairs] or [StarterRule("Owner", "only an example")]
    return Starter(name, rules, found, placeholders, services, [*notes, *more])


def _commented(text: str, comment: str) -> str:
    """Return a line with a comment, which cannot end the line whatever it holds."""
    return f"{text:<30}  # {printable(comment)}" if comment else text


def policy_lines(starter: Starter) -> Iterator[str]:
    """Yield the lines of a starter policy, each with its evidence."""
    yield from ("version: 1", f"name: {yaml_text(starter.name)}", "required_tags:")
    for rule in starter.rules:
        more = rule.values or rule.pattern or rule.when or rule.flags
        yield _commented(f"  - {'key: ' if more else ''}{yaml_text(rule.key)}", rule.evidence)
        yield from (f"    # {printable(note)}" for note in rule.notes)
        yield from (f"    {flag}: true" for flag in sorted(rule.flags))
        if rule.when:
            yield f"    when: {rule.when}"
        if rule.pattern:
            quoted = rule.pattern.replace("'", "''")
            yield _commented(f"    pattern: '{quoted}'", rule.pattern_evidence)
        if any(evidence for _, evidence in rule.values):
            yield "    values:"
            for value, evidence in rule.values:
                yield _commented(f"      - {yaml_text(value)}", evidence)
        elif rule.values:
            yield f"    values: [{', '.join(yaml_text(value) for value, _ in rule.values)}]"
    if placeholders := _by_count(starter.placeholders):
        texts = ", ".join(yaml_text(text) for text, _ in placeholders)
        yield _commented(f"placeholder_values: [{texts}]", f"count as empty: {_listed(placeholders)}")
    yield "regions:"
    for region in sorted(starter.regions, key=lambda region: (region == "*", region)):
        yield _commented(f"  {yaml_text(region)}:", starter.regions[region])
    yield from ("exemptions:",) if starter.services else ()
    for service, number in _by_count(starter.services):
        yield _commented("  - reason: an AWS service operates them", counted(number, "instance"))
        yield f"    managed_by: {yaml_text(service)}"


def check_starter(starter: Starter, file: str) -> tuple[Starter, str, Policy]:
    """Return a starter without the rules that a policy cannot hold, its text and its policy."""
    while True:
        text = "".join(f"{line}\n" for line in policy_lines(starter))
        try:
            return starter, text, check_policy(text.encode(), file)
        except PolicyError as error:
            places = [(re.match(r"required_tags\[([0-9]+)\]", each.where), each) for each in error.problems]
            refused = {int(place[1]): each.message for place, each in reversed(places) if place}
            gone = [(starter.rules[number], why) for number, why in sorted(refused.items())]
            notes = [f"No equal for {_shown(rule.key)} of the {rule.evidence}: {why}" for rule, why in gone]
            if len(notes) in (0, len(starter.rules)):
                why = "; ".join(notes or [problem.message for problem in error.problems])
                raise UsageError(f"a policy cannot hold these rules: {why}") from error
            rules = [rule for number, rule in enumerate(starter.rules) if number not in refused]
            starter = replace(starter, rules=rules, notes=[*starter.notes, *notes])


def origin_lines(fleet: Fleet, given: AwsRules | None) -> Iterator[str]:
    """Yield what a starter policy was made from, and what to do with it."""
    regions, accounts = ({getattr(target, name) for target in fleet} for name in ("region", "account_id"))
    places = f"{counted(len(regions), 'region')} of {counted(len(accounts), 'account')}"
    instances = f"{counted(sum(map(len, fleet.values())), 'instance')} in {places}"
    yield f"Made by `tagcheck.py init` from {'rules of AWS' if given else instances}; the comments say why."
    if given and any("optional" in rule.flags for rule in given.rules.values()):
        yield "An AWS tag policy is about tags that are present (optional: true), and case matters in it:"
        yield TAG_POLICY_PAGE
    yield "Change what is wrong, then check it with validate and scan --dry-run."


def finding_lines(policy: Policy, fleet: Fleet, now: datetime) -> Iterator[str]:
    """Yield what a scan with a policy would find in a fleet."""
    total = exempted = failing = 0
    types: Counter[tuple[str, ViolationType]] = Counter()
    for target, instances in fleet.items():
        total += len(instances)
        sightings = (judge(target, instance, policy, now) for instance in instances)
        for seen in (sighting for sighting in sightings if not sighting.too_young):
            failing += bool(seen.violations)
            exempted += bool(seen.exempted and not seen.violations)
            types.update((violation.tag_key, violation.type) for violation in seen.violations)
    also = f", {exempted:,} exempted" if exempted else ""
    yield f"A scan with it finds now: {failing:,} of {counted(total, 'instance')} with violations{also}"
    for key in policy.keys:
        words = ("missing", "empty", "with another value")
        counts = zip((types[key, kind] for kind in ViolationType), words, strict=True)
        if found := ", ".join(f"{number:,} {word}" for number, word in counts if number):
            yield f"  {_shown(key)}: {found}"


########################################################################################################
# 12 Command line: the options of each command, run_scan, COMMANDS, build_parser, main
########################################################################################################

DEFAULT_POLICY = Path(__file__).resolve().parent / "policies" / "default.yaml"
with contextlib.suppress(OSError, ValueError):  # the script is elsewhere, or the current directory is gone
    DEFAULT_POLICY = DEFAULT_POLICY.relative_to(Path.cwd())
DEFAULT_STATE = "instance_state.db"


def _number(kind: type[float], low: int, high: float = math.inf) -> Callable[[str], float]:
    """Return a function that reads a number in a range, for argparse."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (number := kind(text)) <= high:
                return number
        at_most = f", at most {high:g}" if high < math.inf else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {low}{at_most}")

    return read


ALL_ACCOUNTS = (1, 1)
OPEN = (Status.NEW, Status.REPEAT, Status.REOPENED)


def _time(text: str, examples: str = "90s, 36h, 7d or 1w") -> timedelta:
    """Return the duration that a text means, for argparse."""
    with contextlib.suppress(ValueError):
        return duration(text)
    raise argparse.ArgumentTypeError(f"{printable(text)!r} is not a time: write {examples}")


def _days(text: str) -> timedelta:
    """Return a duration of at least a day, for argparse: by 5m people mean months."""
    examples = "90d or 12w"
    if (age := _time(text, examples)) >= timedelta(days=1):
        return age
    why = ", as m is minutes" if text.endswith("m") else ""
    raise argparse.ArgumentTypeError(f"{text!r} is less than a day{why}: write {examples}")


def _shard(text: str) -> tuple[int, int]:
    """Return the share that 3/8 stands for, for argparse."""
    match = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"{text!r} is not a share: write the first of eight as 1/8")


def _statuses(word: str) -> tuple[Status, ...]:
    """Return the statuses that a word stands for, for argparse."""
    statuses: dict[str, tuple[Status, ...]] = {"open": OPEN} | {each.lower(): (each,) for each in Status}
    if word.lower() not in statuses:
        raise argparse.ArgumentTypeError(f"{printable(word)}: give open, {', '.join(Status)}")
    return statuses[word.lower()]


class Option(NamedTuple):
    """How an option is described and read; its field's type and default say the rest."""

    help: str
    metavar: str = "FILE"
    type: Callable[[str], Any] | None = None
    positional: bool = False


StatePath = Annotated[str, Option("the state: a file, or s3://BUCKET/KEY")]
PolicyPath = Annotated[str, Option("the policy")]
KnownPolicy = Annotated[str, Option("the policy; not needed where the state has only one")]
InstanceId = Annotated[str | None, Option("an instance id, such as i-0abc…", "INSTANCE", positional=True)]
FleetPaths = Annotated[
    list[str], Option("read a saved `aws ec2 describe-instances` answer, not AWS; - for stdin")
]
JsonPath = Annotated[str | None, Option("the result as JSON, - for stdout")]
Profile = Annotated[str | None, Option("the AWS profile whose credentials to use", "NAME")]
RegionNames = Annotated[list[str], Option("only this region", "REGION")]
Workers = Annotated[int, Option("accounts and regions to read at a time", "N", _number(int, 1))]
Quiet = Annotated[bool, Option("no summary and no progress, only errors")]
Verbose = Annotated[bool, Option("show each retry, and what the environment sets")]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOptions:
    """Which state is used."""

    state: StatePath = DEFAULT_STATE
    profile: Profile = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopeOptions(StateOptions):
    """Which policy is used, and for which regions and accounts; an empty list restricts nothing."""

    policy: PolicyPath = str(DEFAULT_POLICY)
    region: RegionNames
    account: Annotated[list[str], Option("only this account: its id or name", "ACCOUNT")]

    def includes(self, target: Target) -> bool:
        """Return whether a target is chosen."""
        of_account = not self.account or target.account_id in self.account
        return of_account and (not self.region or target.region in self.region)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanOptions(ScopeOptions):
    """Check all instances against the policy, remember what was found, and report it."""

    shard: Annotated[tuple[int, int], Option("only share I of N of the accounts", "I/N", _shard)] = (1, 1)
    instances: FleetPaths
    include_managed_resources: Annotated[bool, Option("the --instances files were saved with this option")]
    workers: Workers = 16
    csv: Annotated[str | None, Option("the findings (default: violators.csv; in a dry run none)")] = None
    json: JsonPath = None
    junit: Annotated[str | None, Option("the result as JUnit XML, for Jenkins, - for stdout")] = None
    prices: Annotated[
        str | None, Option("for costs: a CSV of instance_type,region,hourly_price (or hourly_price_eur)")
    ] = None
    creators: Annotated[bool, Option("look up in CloudTrail who launched what was found")]
    creators_budget: Annotated[
        timedelta, Option("how long --creators may take (default: 60s)", "TIME", _time)
    ] = timedelta(0, 60)
    fail_on: Annotated[FailOn, Option("the findings that cause exit code 3; new: NEW and REOPENED")] = "any"
    require_state: Annotated[bool, Option("fail if there is no state yet")]
    dry_run: Annotated[bool, Option("compare with the state without changing it, to preview a policy")]
    quiet: Quiet
    verbose: Verbose

    @property
    def narrowed(self) -> bool:
        """Whether only a part of the policy's scope is scanned."""
        return bool(self.region or self.account) or self.shard != ALL_ACCOUNTS

    def chooses(self, account_id: str) -> bool:
        """Return whether --account and --shard choose an account."""
        part, parts = self.shard
        # Not hash(), which differs between processes.
        share = int.from_bytes(hashlib.sha256(account_id.encode()).digest()[:8]) % parts
        return (not self.account or account_id in self.account) and share == part - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InitOptions:
    """Write a starter policy: from the tags that a fleet has, or from an AWS tag policy or Config rule."""

    instances: FleetPaths
    region: RegionNames
    profile: Profile = None
    workers: Workers = 16
    from_: Annotated[list[str], Option("an AWS tag policy, or required-tags of AWS Config, as JSON")]
    name: Annotated[str, Option("the policy's name; findings are stored under it", "NAME")] = "tags"
    output: Annotated[str, Option("the policy, a new file; - for stdout")] = "policy.yaml"
    quiet: Quiet
    verbose: Verbose


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateOptions:
    """Report mistakes in policy files, and what to write instead; needs no AWS."""

    policies: Annotated[list[str], Option("a policy file, - for stdin", "POLICY", positional=True)]
    json: JsonPath = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions(ScopeOptions):
    """Say why an instance passes or fails, and its history; without an INSTANCE, the rules of each region."""

    instance: InstanceId = None
    instances: FleetPaths
    live: Annotated[bool, Option("read the instance from AWS now")]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryOptions(ScopeOptions):
    """List findings in the state: open, resolved, or one instance's."""

    policy: KnownPolicy = ""
    instance: InstanceId = None
    status: Annotated[
        list[tuple[Status, ...]], Option("open, NEW, REPEAT, REOPENED or RESOLVED", "STATUS", _statuses)
    ]
    tag: Annotated[list[str], Option("only findings that lack this tag", "KEY")]
    older_than: Annotated[timedelta | None, Option("first seen longer ago, as 30d", "TIME", _time)] = None
    csv: Annotated[str | None, Option("the findings as CSV, - for stdout")] = None
    json: JsonPath = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions(StateOptions):
    """Write the dashboard: trends as one HTML page."""

    policy: KnownPolicy = ""
    html: Annotated[str, Option("the dashboard, - for stdout")]
    css: Annotated[str | None, Option("write the style to this file beside the page, which links to it")] = (
        None
    )
    quiet: Quiet


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions(StateOptions):
    """Delete scans, and findings that were resolved, longer ago than a time; the trend is kept."""

    older_than: Annotated[timedelta | None, Option("how long ago, such as 90d", "TIME", _days)] = None
    days: Annotated[int | None, Option("the same in days, at most 9999", "N", _number(int, 1, 9999))] = None
    dry_run: Annotated[bool, Option("only print what would be deleted")]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemediateOptions(ScopeOptions):
    """Plan the tags that would fix the open findings; --apply writes them."""

    role: Annotated[str | None, Option("the role to assume (default: the policy's role_name)", "NAME")] = None
    min_confidence: Annotated[
        float, Option("plan nothing less sure, from 0 to 1", "P", _number(float, 0, 1))
    ] = MIN_CONFIDENCE
    owner: Annotated[list[str], Option("only this owner's findings; '' is no known owner", "NAME")]
    csv: Annotated[str | None, Option("the plan (default: remediate-plan.csv), - for stdout")] = None
    json: JsonPath = None
    plan: Annotated[str | None, Option("the plan to apply, as written or as edited")] = None
    apply: Annotated[bool, Option("write the tags to AWS; without it nothing is changed")]
    max_changes: Annotated[int, Option("refuse to write more tags than this", "N", _number(int, 1))] = (
        MAX_CHANGES
    )
    undo: Annotated[str | None, Option("an undo file: revert what has not changed since its run")] = None
    quiet: Quiet
    verbose: Verbose


@dataclass(frozen=True, slots=True, kw_only=True)
class NotifyOptions:
    """Test the policy's notifications: send a sample to every channel, and record nothing."""

    policy: PolicyPath = str(DEFAULT_POLICY)
    profile: Profile = None
    test: Annotated[bool, Option("send the sample (required)")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaOptions:
    """Print the policy's JSON Schema (Draft 7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IamPolicyOptions:
    """Print the minimal IAM policies for this policy file."""

    policy: PolicyPath = str(DEFAULT_POLICY)
    state: StatePath = DEFAULT_STATE
    creators: Annotated[bool, Option("include what scan --creators needs")]


def run_scan(args: ScanOptions, now: datetime) -> ExitCode:
    """Read every target, record what was found, and write the outputs."""
    begun = time.monotonic()
    policy = _load_policy(args)
    if args.instances or not (policy.accounts and policy.accounts.organization):
        args = replace(args, account=account_ids(args.account, named_accounts(policy, {})))
    if args.include_managed_resources and not args.instances:
        raise UsageError("--include-managed-resources describes saved files: give it with --instances")
    if args.csv is None:
        args = replace(args, csv="" if args.dry_run else "violators.csv")
    outputs = _outputs(args, WRITERS)
    senders = {} if args.dry_run else _senders(args.profile, policy)
    may_hide_managed = bool(args.instances) and not args.include_managed_resources
    prices = load_prices(args.prices) if args.prices else Prices({})
    scan = Scan(str(uuid.uuid4()), policy, now, may_hide_managed, prices.currency)
    actions = (*READ_ACTIONS, *(CREATOR_ACTIONS if args.creators else ()))
    aws = None if args.instances else Aws(args.profile, args.workers, actions)
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(open_state(args, copied=args.dry_run, create=not args.require_state))
        state.check()
        if args.require_state:
            require_scans(state.path, state.name)
        staged = stack.enter_context(staged_outputs(outputs))
        db = stack.enter_context(contextlib.closing(open_sightings()))
        notices: list[str] = []
        scope = functools.partial(_accounts_in_scope, args, policy, notices)
        readings = read_live(args, policy, aws, scope) if aws else read_saved(args, policy)
        with sighting_errors():
            notices += _collect(args, db, scan, readings, prices)
            if aws and args.creators:
                notices += _look_up_creators(args, aws, db, state.path, scan)
        finished_at = now + timedelta(seconds=time.monotonic() - begun)
        stream = _message_stream(outputs)
        width = screen_width(stream)
        colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        command = ["tagcheck.py", "explain", *_given_again(args, "profile", "policy", "state")]
        recorded: list[tuple[ScanReport, str]] = []  # at each attempt

        def record(path: Path) -> None:
            with record_scan(db, path, scan, finished_at, state.name):
                report = _report(args, db, scan, finished_at, notices)
                if senders:
                    queue_notifications(db, scan, ending_subjects(policy, now.date()))
                    pending = functools.partial(fetch_pending, db, policy.name)
                    reminder = functools.partial(fetch_reminder, db, scan)
                    add_digest_lines(db, digest_lines(report, pending, reminder))
                stage_report(staged, WRITERS, report)
                summary = StringIO()
                csv_path = args.csv or ""
                write_summary(summary, report, csv_path, args.state, command, width, colour=colour)
                recorded.append((report, summary.getvalue()))
                if isinstance(state, LocalState):
                    SIGNALS.hold()  # the state and the outputs change together

        try:
            for path in state.attempts(scan.scan_id):
                record(path)
        except UploadError:
            if not recorded:
                record(state.path)  # a CSV can compare with the state as it was before the scan
            publish_report([output for output in staged if output.output.format == "csv"], emit)
            raise
        SIGNALS.hold()
        report, summary_text = recorded[-1]
        publish_report(staged, emit)
        if not args.quiet:
            emit(summary_text, stream)
        if senders:
            _notify(senders, db, state, report)
        return report.exit_code


def _senders(profile: str | None, policy: Policy) -> Senders:
    """Return how to send by each medium, before anything is read; raises UsageError, CredentialsError."""
    senders: dict[str, Callable[[Digest], None]] = {}
    notify = policy.notify or Notify()
    if notify.slack:
        webhook = find_webhook(notify.slack, os.environ)
        senders["slack"] = lambda digest: post_to_slack(webhook, digest_text(digest))
    if notify.sns or notify.email:
        aws = Aws(profile, workers=1)
        if topic := notify.sns and notify.sns.topic_arn:
            region = topic.split(":")[3]
            senders["sns"] = lambda digest: publish_to_sns(aws.client("sns", region), topic, digest)
        if email := notify.email:
            home = email.region or aws.session.region_name or home_region(sorted(policy.regions))
            senders["email"] = lambda digest: send_email(aws.client("sesv2", home), email, digest)
    return senders


def _notify(senders: Senders, db: Connection, state: State, report: ScanReport) -> None:
    """Send the digests, and say how many; raises NotificationError if some could not be sent."""
    notify = report.scan.policy.notify or Notify()
    sent = dict.fromkeys(notify.channels, 0)
    with sighting_errors():
        failures = _send(senders, db, state, report, sent)
        shown = "; ".join(itertools.islice(failures, 5))
        more = sum(1 for _ in failures)
    LOG.info("Messages sent: %s", ", ".join(f"{channel} {number:,}" for channel, number in sent.items()))
    if shown:
        shown += f"; and {more:,} more" if more else ""
        done = "the scan is recorded and its outputs are written, but not every notification was sent"
        raise NotificationError(f"{done}; the next scan tries again: {shown}")


def _send(
    senders: Senders, db: Connection, state: State, report: ScanReport, sent: dict[str, int]
) -> Iterator[str]:
    """Send the digests, record in the state what each channel was sent, count it, and yield what failed.

    A crash between the two makes the next scan send that channel's again: rather twice than never. A signal
    that came since the scan was recorded stops here: it cannot stop the scan, but it can stop messages.
    """
    policy, down = report.scan.policy, set[str]()
    for channel in sent:
        for digest in write_digests(report, channel, fetch_recipients(db, channel, OWNER_LINES)):
            try:
                if digest.medium in down:
                    raise NotificationError("not tried")
                SIGNALS.release()
                senders[digest.medium](digest)
                sent[channel] += 1
                continue
            except (TagcheckError, KeyboardInterrupt) as error:
                failure = error
            finally:
                SIGNALS.hold()
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
    args: ScanOptions, db: Connection, scan: Scan, finished_at: datetime, notices: Sequence[str]
) -> ScanReport:
    """Return what the outputs show of the scan that is being recorded."""
    coverage = fetch_coverage(db, scan)
    first = fetch_notice(db, scan, args.state, coverage, dry_run=args.dry_run)
    unseen = _unseen_notices(args, scan, fetch_unseen(db, scan), coverage)
    empty = "--shard {}/{} has no accounts: nothing was scanned".format(*args.shard)
    costs, unpriced = fetch_costs(db, scan)
    return ScanReport(
        *(scan, finished_at, args.dry_run, decide_exit_code(coverage, args.fail_on), coverage),
        findings=lambda: fetch_findings(db, scan),
        fresh=lambda: fetch_findings(db, scan, (Status.NEW, Status.REOPENED)),
        oldest=fetch_oldest(db, scan, SUMMARY_OLDEST),
        resolved=lambda: fetch_findings(db, scan, resolved=True),
        exempted=lambda: fetch_exempted(db),
        causes=fetch_causes(db, scan),
        costs=costs,
        unpriced=unpriced,
        operators=fetch_operators(db, scan),
        upcoming=fetch_upcoming(db, scan.policy, scan.started_at.date(), of_scan=True),
        exemptions=fetch_exemptions(db),
        notices=[*filter(None, [first]), *notices, *unseen, *([] if coverage else [empty])],
    )


def _look_up_creators(args: ScanOptions, aws: Aws, db: Connection, path: Path, scan: Scan) -> Iterator[str]:
    """Keep who created the instances with findings, where not yet known, and yield notices; fails no scan."""
    deadline = time.monotonic() + args.creators_budget.total_seconds()
    since = scan.started_at - timedelta(days=CLOUDTRAIL_DAYS)
    waiting = fetch_uncreated(db, path, scan, since)
    add_unknown_creators(db, since, f"launched more than {CLOUDTRAIL_DAYS} days ago")
    left = {target: {instance_id for instance_id, _ in launches} for target, launches in waiting.items()}
    if number := sum(map(len, left.values())):
        what = counted(number, "instance")
        LOG.info("Looking up who created %s, for at most %s", what, args.creators_budget)

    def describe(target: Target) -> Iterator[list[tuple[str, Creator]]]:
        with aws.account(target.account_id):
            client = aws.client("cloudtrail", target.region)
            yield from describe_creators(client, waiting[target], deadline)

    for target, creators in read_in_parallel([*waiting], describe, args.workers):
        if isinstance(creators, TargetError):
            yield f"Who created the instances in {target} was not looked up: {creators}"
            creators = [(instance_id, Creator(None, creators.code)) for instance_id in left[target]]
        if creators:
            add_creators(db, target, creators)
            left[target] -= {instance_id for instance_id, _ in creators}
    if number := sum(map(len, left.values())):
        who, seconds = counted(number, "instance"), int(args.creators_budget.total_seconds())
        limit = f"--creators-budget {seconds}s"
        yield f"Who created {who} was not looked up within {limit}: the next scan continues"


def _load_policy(args: ScopeOptions) -> Policy:
    """Return the policy; raises UsageError, also for a --region or --account that cannot be its."""
    policy = load_policy(args.policy)
    for region in args.region:
        if not policy.covers(region) or not is_region(region):
            covered = ", ".join(sorted(policy.regions))
            raise UsageError(f"--region {printable(region)}: {policy.file} does not cover it, only {covered}")
    for account_id in args.account:
        if account_id.isdecimal() and not re.fullmatch(ACCOUNT_ID, account_id):
            raise UsageError(f"--account {account_id}: an account id has 12 digits")
    return policy


def _check_instance(text: str | None) -> None:
    """Raise UsageError for a text that is given as an instance id, and is none."""
    if text is not None and not re.fullmatch("i-[0-9a-f]+", text):
        raise UsageError(f"{printable(text)} is not an instance id, such as i-0123456789abcdef0")


def named_accounts(policy: Policy, known: Mapping[str, Account]) -> dict[str, Account]:
    """Return what is known of accounts by their ids, with the names that the policy gives them."""
    names = dict(policy.accounts.names) if policy.accounts else {}
    named = {id_: replace(known.get(id_, Account()), name=name) for id_, name in names.items()}
    return {**known, **named}


def account_ids(texts: Iterable[str], accounts: Mapping[str, Account]) -> list[str]:
    """Return the ids of accounts that are given by id or name, as they are known; raises UsageError."""
    ids: list[str] = []
    for text in texts:
        alike = sorted(account_id for account_id, account in accounts.items() if account.name == text)
        if re.fullmatch(ACCOUNT_ID, text):  # whatever another account is called
            alike = [text]
        if len(alike) != 1:
            hint = did_you_mean(text, [account.name for account in accounts.values()])
            unknown = f"no account of this name is known here; an account id has 12 digits{hint}"
            which = f"{', '.join(alike)} have this name; give an id" if alike else unknown
            raise UsageError(f"--account {printable(text)}: {which}")
        ids += alike
    return ids


def _placed(target: Target, accounts: Mapping[str, Account]) -> Target:
    """Return a target with the name and the paths of its account."""
    account = accounts.get(target.account_id, Account())
    return replace(target, account_name=account.name, account_paths=account.paths)


# The fields of options that name files to read, and the files that SQLite keeps beside a state.
_INPUTS = ("policies", "policy", "prices", "instances", "plan", "undo", "state")
_JOURNALS = ("-journal", "-wal", "-shm")


def _outputs(args: object, formats: Iterable[str], *, new: bool = False) -> list[Output]:
    """Return the outputs that were asked for, each writable and a file of its own; raises TagcheckError."""
    stdout = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
    paths = {name: path for name in formats if (path := getattr(args, name))}
    outputs = [Output(name, "-" if path in stdout else path, new) for name, path in paths.items()]
    taken: dict[str, str] = {}  # what each file is
    for name in _INPUTS:
        given = getattr(args, name, None) or []
        for path in given if isinstance(given, list) else [given]:
            if path != "-":
                taken[os.path.realpath(path)] = path if name == "policies" else f"--{name} {path}"
            if name == "state":
                journals = (f"{os.path.realpath(path)}{end}" for end in _JOURNALS)
                taken |= dict.fromkeys(journals, f"the journal of --state {path}")
    for output in outputs:
        file = output.path if output.path == "-" else os.path.realpath(output.path)
        if file in taken:
            raise UsageError(f"{output} and {taken[file]} are the same file: give each its own")
        taken[file] = str(output)
    for output in outputs:
        check_output(output)
    return outputs


def _given_again(args: object, *names: str) -> Iterator[str]:
    """Yield the options that have another value than the default, as words of the next command."""
    for name in names:
        value = getattr(args, name)
        for each in value if isinstance(value, list) else [value]:
            if each not in (None, DEFAULT_STATE, str(DEFAULT_POLICY)):
                yield from (f"--{name}", each)


def _message_stream(outputs: Sequence[Output]) -> IO[str]:
    """Return where to print the summary: stderr if an output goes to stdout."""
    return sys.stderr if "-" in (output.path for output in outputs) else sys.stdout


@contextlib.contextmanager
def open_state(args: StateOptions, *, copied: bool = False, create: bool = False) -> Iterator[State]:
    """Yield the state, or a copy of it; `create` allows a new one. Raises UsageError, StateError."""
    with tempfile.TemporaryDirectory(prefix="tagcheck-") as directory:
        state: State
        if args.state.startswith("s3://"):
            bucket, key = split_s3(args.state)
            aws = Aws(args.profile, workers=1)
            s3 = aws.client("s3", aws.session.region_name or "us-east-1")
            path = Path(directory, "state.db")
            state = S3State(s3, bucket, key, path, SIGNALS.hold, create=create)
        else:
            state = LocalState(Path(args.state), create=create)
        yield state.copied(Path(directory, "copy.db")) if copied else state


@contextlib.contextmanager
def _reading_known(args: HistoryOptions | ReportOptions) -> Iterator[tuple[Connection, Policy]]:
    """Yield a connection for reading the state, and the policy: that given, else the state's only one."""
    policy = load_policy(args.policy) if args.policy else None
    with open_state(args) as state, reading_state(state) as db:
        found = fetch_policies(db)
        if not policy and len(found) == 1:
            [(name, file)] = found.items()
            policy = _policy_of_state(name, file)
        policy = policy or load_policy(str(DEFAULT_POLICY))
        require_policy(state.name, [*found], policy.name)
        yield db, policy


def _policy_of_state(name: str, file: str) -> Policy:
    """Return the policy whose name and file a state knows, without rules where the file is another now."""
    try:
        policy = load_policy(file) if os.path.isfile(file) else None
    except UsageError:
        policy = None
    return policy if policy and policy.name == name else Policy(file, "", "1", name, {})


@contextlib.contextmanager
def _reading(args: StateOptions, policy: str | None) -> Iterator[Connection]:
    """Yield a connection for reading the state; raises StateError, also if it has no scan of the policy."""
    with open_state(args) as state, reading_state(state) as db:
        if policy is not None:
            require_policy(state.name, [*fetch_policies(db)], policy)
        yield db


MAX_SILENT = 2  # targets that a dead endpoint may cost their time-outs

# A target, and a page of its instances, the error that ended it, or None at its end.
Reading = tuple[Target, list[Instance] | TargetError | None]


def read_live(
    args: ScanOptions | InitOptions,
    policy: Policy,
    aws: Aws,
    scope: Callable[[Aws, Caller], dict[str, Account]],
) -> Iterator[Reading]:
    """Yield what AWS answers for every target in scope, many targets at a time.

    Consecutive targets are of different accounts, so that a slow account does not keep all workers.
    """
    named = sorted(args.region or policy.regions.keys() - {"*"})
    caller = _identify(aws, policy, named)
    accounts = scope(aws, caller)
    places, asks_for_units = named_accounts(policy, accounts), policy.asks_for_units

    def enter(account_id: str) -> Iterator[list[str]]:
        account = accounts[account_id]
        if account.state != "ACTIVE":
            message = f"Organizations says {account.state!r}"
            raise CallError("UnknownAccountState", message, "organizations:ListAccounts")
        if asks_for_units and not account.paths:
            raise CallError("UnknownAccountPath", "", "organizations:ListAccounts")
        _enter(aws, policy.accounts, caller, account_id)
        yield named
        if "*" in policy.regions and not args.region:
            with aws.account(account_id):
                yield sorted(set(describe_regions(aws.client("ec2", caller.home))) - set(named))

    targets: list[Target] = []
    for account_id, regions in read_in_parallel(sorted(accounts), enter, args.workers):
        if isinstance(regions, list):
            targets += [_placed(Target(account_id, region), places) for region in regions]
        elif regions:
            yield _placed(Target(account_id, "*"), places), regions
    silent: Counter[str] = Counter()

    def describe(target: Target) -> Iterator[list[Instance]]:
        if silent[target.region] >= MAX_SILENT:
            raise TargetError("EndpointConnectionError", f"not tried: {target.region} does not answer")
        try:
            with aws.account(target.account_id):
                yield from describe_instances(aws.client("ec2", target.region))
            silent[target.region] = 0
        except TargetError as error:
            silent[target.region] += error.code in NO_CONNECTION
            raise

    targets.sort(key=lambda target: (target.region, target.account_id))
    yield from ((target, []) for target in targets)  # so that one knows how many there are
    yield from read_in_parallel(targets, describe, args.workers)


class Caller(NamedTuple):
    """Whose credentials are used, and the region that is asked what belongs to no region."""

    account_id: str
    partition: str
    arn: str
    home: str


def _identify(aws: Aws, policy: Policy, regions: Iterable[str]) -> Caller:
    """Return whose credentials these are; raises CredentialsError if the policy expects another's."""
    home = aws.session.region_name or home_region(regions)
    caller = Caller(*describe_caller(aws.client("sts", home)), home)
    if (expected := policy.expected_account) not in (None, caller.account_id):
        message = f"these are the credentials of {caller.account_id}; the policy expects {expected}"
        raise CredentialsError(message)
    return caller


def _enter(aws: Aws, accounts: Accounts | None, caller: Caller, account_id: str) -> None:
    """Enter an account by the role of the policy, or one's own as it is; raises TargetError."""
    if accounts is None or account_id == caller.account_id:
        aws.enter_own(account_id)
    else:
        aws.assume_role(account_id, accounts, caller.home, caller.partition)


def _accounts_in_scope(
    args: ScanOptions, policy: Policy, notices: list[str], aws: Aws, caller: Caller
) -> dict[str, Account]:
    """Return the accounts to scan by id; adds notices of inactive ones; raises TagcheckError."""
    accounts = _accounts_of(policy, aws, caller)
    args = replace(args, account=account_ids(args.account, named_accounts(policy, accounts)))
    in_scope = {each: account for each, account in accounts.items() if policy.covers_account(each)}
    if not in_scope:
        raise UsageError(f"{policy.file} leaves no accounts to scan: check ids and exclude")
    for account_id in args.account:
        if account_id not in in_scope:
            credentials = f"the credentials are of {caller.account_id}"
            raise UsageError(f"--account {account_id}: it is not in the policy's scope ({credentials})")
        if (state := in_scope[account_id].state) in INACTIVE:
            raise UsageError(f"--account {account_id}: it is {state}")
    chosen = {account_id: account for account_id, account in in_scope.items() if args.chooses(account_id)}
    active = {account_id: account for account_id, account in chosen.items() if account.state not in INACTIVE}
    for account_id in sorted(chosen.keys() - active):
        account = chosen[account_id]
        name = f" ({account.name})" if account.name else ""
        notices.append(f"Account {account_id} is {account.state}: not scanned{name}")
    if not active and args.shard == ALL_ACCOUNTS:
        all_are = ", ".join(sorted({account.state for account in chosen.values()}))
        raise TagcheckError(f"no account to scan: all in scope are {all_are}; check the policy's accounts")
    return active


def _accounts_of(policy: Policy, aws: Aws, caller: Caller) -> dict[str, Account]:
    """Return the accounts that the policy names, by id; raises CredentialsError."""
    if policy.accounts is None:
        return {caller.account_id: Account()}
    if policy.accounts.organization:
        return describe_accounts(aws.client("organizations", caller.home))
    return dict.fromkeys(policy.accounts.ids, Account())


Job = TypeVar("Job")
Page = TypeVar("Page")


def read_in_parallel(
    jobs: Sequence[Job], read: Callable[[Job], Iterator[list[Page]]], workers: int
) -> Iterator[tuple[Job, list[Page] | TargetError | None]]:
    """Yield the pages of many jobs as they come; a job ends with None, or with the TargetError that ended it.

    The queue is short, so that slow recording slows down reading. The threads are daemons: one that waits for
    an answer must not keep an interrupted run alive.
    """
    waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    readings: queue.Queue[tuple[Job, list[Page] | Exception | None]] = queue.Queue(1)

    def work() -> None:
        while (job := waiting.get()) is not None:
            end: Exception | None = None
            try:
                for page in read(job):
                    readings.put((job, page))
            except CredentialsError as error:
                end = TargetError("Credentials", str(error))
            except Exception as error:  # a bug goes to the main thread, which would wait forever
                end = error
            readings.put((job, end))

    threads = min(workers, len(jobs))
    for job in (*jobs, *[None] * threads):
        waiting.put(job)
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    ended = 0
    while ended < len(jobs):
        job, reading = readings.get()
        if isinstance(reading, Exception) and not isinstance(reading, TargetError):
            raise reading
        ended += not isinstance(reading, list)
        yield job, reading


TRUNCATED = "has a NextToken, so more follows: save it without --max-items and --no-paginate"


def read_saved(args: ScanOptions, policy: Policy) -> Iterator[Reading]:
    """Yield what saved files have of every target in scope.

    A region without an instance in the files counts as unread, unless --region says that they cover it.
    """
    instances, cut = load_fleet(args.instances)
    listed = policy.accounts.ids if policy.accounts and not args.account else ()
    found = {*args.account, *listed, *(target.account_id for target in instances)}
    in_scope = set(filter(policy.covers_account, found))
    chosen = set(filter(args.chooses, in_scope))
    named = args.region or policy.regions.keys() - {"*"}
    targets = {Target(account_id, region) for account_id in chosen for region in named}
    if not args.region:
        targets |= {t for t in instances if t.account_id in chosen and policy.covers(t.region)}
        targets |= {Target(account_id, "*") for account_id in chosen - {t.account_id for t in targets}}
    more = f"{cut} {TRUNCATED}"
    if not chosen:
        if not in_scope or args.shard == ALL_ACCOUNTS:
            raise UsageError("the files have no instance in scope: name its account with --account ID")
        if cut:
            raise UsageError(more)
    if left_out := instances.keys() - targets:
        number = counted(sum(len(instances[target]) for target in left_out), "instance")
        LOG.info("%s left out, not in scope: %s", number, ", ".join(map(str, sorted(left_out))))
    places, asks_for_units = named_accounts(policy, {}), policy.asks_for_units
    for target in sorted(_placed(target, places) for target in targets):
        if target in instances:
            yield target, instances[target]
        if asks_for_units:
            yield target, CallError("UnknownAccountPath", "", "")
        elif cut:  # what follows may be of any account and region
            yield target, TargetError("Truncated", more)
        elif target in instances or args.region:
            yield target, None
        else:
            what = "account" if target.region == "*" else "region"
            none = f"no instance of this {what} is in the files"
            message = f"{none}; if it has none, repeat --region for each region that the files cover"
            yield target, TargetError("NotInFiles", message)


MAX_NEW_STATES = 10  # to name in notices


def _collect(
    args: ScanOptions, db: Connection, scan: Scan, readings: Iterable[Reading], prices: Prices
) -> Iterator[str]:
    """Judge and keep every instance that is read; yields notices about states, exemptions and patterns."""
    policy = scan.policy
    numbers: dict[Target, int] = {}
    used: set[Exemption] = set()
    states: set[str] = set()
    for target, reading in with_progress(readings, policy.includes, quiet=args.quiet):
        if target not in numbers:
            numbers[target] = add_target(db, target)
        if isinstance(reading, TargetError):
            fail_target(db, numbers[target], reading)
        if not reading or isinstance(reading, TargetError):
            continue
        seen = [judge(target, instance, policy, scan.started_at) for instance in reading]
        if len(states) < MAX_NEW_STATES:
            states.update(filter(is_new_state, {instance.state for instance in reading}))
        used.update(case.exemption for one in seen for case in (*one.exempted, *one.exempted_later))
        priced = [(sighting, cost_of_month(prices, sighting.instance, target.region)) for sighting in seen]
        rules = policy.rules(target.region)
        add_sightings(db, numbers[target], priced, rules, policy.placeholder_values)
        if policy.normalize_aliases:
            add_aliased(db, numbers[target], seen, rules, policy.placeholder_values)
    add_suggestions(db, policy)
    yield from map(new_state_notice, sorted(states)[:MAX_NEW_STATES])
    today = scan.started_at.date()
    yield from map(str, policy_warnings(policy, today))
    for index, exemption in enumerate(policy.exemptions if not args.narrowed else ()):
        if exemption.holds(today) and exemption not in used:
            where = f"exemptions[{index}] ({exemption.reason})"
            place = (policy.file, exemption.line, exemption.column, where)
            yield str(Problem(*place, "exempted nothing in this scan", "warning"))
    yield from check_patterns(policy)


def _unseen_notices(
    args: ScanOptions, scan: Scan, unseen: Iterable[tuple[Target, int]], coverage: Iterable[Coverage]
) -> Iterator[str]:
    """Yield a notice for each target in scope with open findings that the scan neither saw nor resolved."""
    policy, read = scan.policy, {each.target for each in coverage}
    covers = policy.accounts.covers if policy.accounts else {each.account_id for each in read}.__contains__
    for target, number in unseen:
        where = f"{counted(number, 'open finding')} in {target}"
        if target in read:
            yield (
                f"{where} may be of instances that AWS hides and the files lack; they stay open. Save the "
                "files with `aws ec2 describe-instances --include-managed-resources`, and give that option "
                "here, too"
            )
        elif not args.narrowed and policy.covers(target.region) and covers(target.account_id):
            where += " was" if number == 1 else " were"
            yield f"{where} not checked and will stay open: this scan found no such region or account"


def run_init(args: InitOptions, now: datetime) -> ExitCode:
    """Write the policy that the tags of a fleet, or AWS's own rules, amount to; it replaces no file."""
    outputs = _outputs(args, INIT_WRITERS, new=True)
    if is_blank(args.name) or not is_printable(args.name):
        raise UsageError(f"--name {args.name!r}: give a name of visible characters")
    for region in args.region:
        if not is_region(region):
            raise UsageError(f"--region: AWS has no region {shown_value(region)}")
    given = read_rules(args.from_) if args.from_ else None
    fleet: dict[Target, list[Instance]] = {}
    unread: dict[str, TargetError] = {}
    if args.instances or not given:
        fleet, unread = _survey(args)
    starter = make_starter(args.name, fleet, args.region, given)
    starter, body, policy = check_starter(starter, args.output)
    lacking = [
        f"Not read in full, so the policy may lack something: {place}: {unread[place]}" for place in unread
    ]
    found = [*finding_lines(policy, fleet, now)] if fleet else []
    head = [*origin_lines(fleet, given), *found, *lacking, *starter.notes]
    text = "".join(f"# {printable(line)}\n" for line in head)
    SIGNALS.hold()  # what is written is also reported
    write_report(outputs, INIT_WRITERS, f"{text}\n{body}", emit)
    if not args.quiet and args.output != "-":
        emit_lines(_next_lines(args, starter, found[:1]))
    emit_lines(lacking, sys.stderr)
    return ExitCode.INCOMPLETE if unread else ExitCode.COMPLIANT


def _survey(args: InitOptions) -> tuple[dict[Target, list[Instance]], dict[str, TargetError]]:
    """Return the instances that a scan would judge, and what was not read in full; raises TagcheckError."""
    policy = Policy("init", "", "1", args.name, dict.fromkeys(args.region or ["*"], ()))
    read: dict[Target, list[Instance]] = {}
    unread: dict[str, TargetError] = {}
    if args.instances:
        read, cut = load_fleet(args.instances)
        unread = {cut: TargetError("Truncated", f"it {TRUNCATED}")} if cut else {}
    else:
        aws = Aws(args.profile, args.workers)
        readings = read_live(args, policy, aws, functools.partial(_accounts_of, policy))
        for target, reading in with_progress(readings, bool, quiet=args.quiet):
            if isinstance(reading, list):
                read.setdefault(target, []).extend(reading)
            elif reading:
                unread[str(target)] = reading
    fleet: dict[Target, list[Instance]] = {}
    for target in sorted(read):
        judged = [instance for instance in read[target] if policy.includes(instance.state)]
        if judged and policy.covers(target.region):
            fleet[target] = judged
    if not args.from_ and all(each.managed_by for each in itertools.chain.from_iterable(fleet.values())):
        number = counted(sum(map(len, read.values())), "instance")
        what = f"no instance whose tags a policy could follow (read: {number})"
        for place, error in unread.items():
            raise TargetError(error.code, f"{place}: {error.message}; elsewhere there is {what}")
        advice = (
            "terminated ones and those that AWS services operate do not count; name other files, --region or"
        )
        raise UsageError(f"{what}: {advice} --profile")
    return fleet, dict(sorted(unread.items()))


def _next_lines(args: InitOptions, starter: Starter, found: Iterable[str]) -> Iterator[str | Command]:
    """Yield what was written, and the command that comes next."""
    rules, regions = counted(len(starter.rules), "rule"), ", ".join(sorted(starter.regions))
    yield f"Wrote {args.output}: {rules} for {regions}"
    yield from found
    same = _given_again(args, "profile", "region", "instances")
    command = ["tagcheck.py", "scan", "--policy", args.output, *same, "--dry-run"]
    yield Command("Read it, and change what is wrong. Next:", command)


INIT_WRITERS: Writers[str] = {"output": lambda file, text: file.writelines([text])}


def run_validate(args: ValidateOptions, now: datetime) -> ExitCode:
    """Report what is wrong in each policy file; returns USAGE where one cannot be used."""
    outputs = _outputs(args, PROBLEM_WRITERS)
    results = {path: _problems(path, now.date()) for path in args.policies}
    errors = {path: sum(each.severity == "error" for each in problems) for path, problems in results.items()}
    write_report(outputs, PROBLEM_WRITERS, results, emit)
    for path, problems in results.items() if args.json != "-" else ():
        verdict = counted(errors[path], "error") if errors[path] else "valid"
        warned = len(problems) - errors[path]
        also = f", {counted(warned, 'warning')}" if warned else ""
        emit_lines([*problem_lines(problems), f"{path}: {verdict}{also}"])
    return ExitCode.USAGE if any(errors.values()) else ExitCode.COMPLIANT


def _problems(path: str, today: date) -> Sequence[Problem]:
    """Return the errors and warnings of a policy file."""
    try:
        return policy_warnings(load_policy(path), today)
    except UsageError as error:
        return error.problems if isinstance(error, PolicyError) else [Problem(path, 1, 1, "", str(error))]


def _write_problems(file: TextIOBase, results: Mapping[str, Sequence[Problem]]) -> None:
    """Write the problems of each file as JSON, for editors."""
    keys = ("line", "column", "severity", "where", "message")
    files = [
        {
            "file": path,
            "valid": all(problem.severity == "warning" for problem in problems),
            "problems": [to_record(problem, keys) for problem in problems[:MAX_PROBLEMS]],
            "problem_count": len(problems),
        }
        for path, problems in results.items()
    ]
    file.write(json.dumps({"version": __version__, "files": files}, indent=2) + "\n")


PROBLEM_WRITERS = {"json": _write_problems}


def run_schema(args: SchemaOptions, now: datetime) -> ExitCode:
    """Print the policy's JSON Schema."""
    emit(json.dumps(POLICY_SCHEMA, indent=2) + "\n")
    return ExitCode.COMPLIANT


def run_notify(args: NotifyOptions, now: datetime) -> ExitCode:
    """Send a marked sample to every channel of the policy (owners: the default), and print how it went."""
    if not args.test:
        raise UsageError("notify sends a marked sample to every channel of the policy: give --test to do so")
    policy = load_policy(args.policy)
    if not policy.notify:
        raise UsageError(f"{policy.file} has no notify: nobody is notified")
    notify, owners, code = policy.notify, policy.notify.owners or Owners(), ExitCode.COMPLIANT
    samples = [sample_digest(policy, channel) for channel in notify.channels if channel != "owners"]
    samples += [sample_digest(policy, "owners", owners.default)] if owners.default else []
    for digest in samples:
        only = Notify(**{digest.medium: getattr(notify, digest.medium)})
        try:
            _senders(args.profile, replace(policy, notify=only))[digest.medium](digest)
            result = "sent"
        except TagcheckError as error:
            code, result = ExitCode.FAILED, f"failed: {error}"
        emit_lines([f"{' '.join(filter(None, (digest.channel, digest.to)))}: {result}"])
    emit_lines(f"owners {to}: would get the findings of {name}, not sent" for name, to in owners.mapping)
    emit_lines(f"owners …@{domain}: would get their own findings, not sent" for domain in owners.domains)
    return code


def iam_documents(policy: Policy, state: str, *, creators: bool) -> dict[str, dict[str, Any]]:
    """Return the minimal IAM policies by who needs them; `remediate` is for a separate role that writes."""
    accounts, notify = policy.accounts, policy.notify or Notify()
    reading = [allow_statement(READ_ACTIONS if "*" in policy.regions else READ_ACTIONS[:1], "*")]
    if creators:
        reading.append(allow_statement(CREATOR_ACTIONS, "*"))
    listing = []
    if accounts and accounts.organization:
        listing.append(allow_statement(["organizations:ListAccounts"], "*"))
    scan, documents = [*reading], {}
    if accounts:
        members = ["*"] if accounts.organization else accounts.ids
        roles = [f"arn:*:iam::{account_id}:role/{accounts.role_name}" for account_id in members]
        scan += [allow_statement(["sts:AssumeRole"], roles), *listing]
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
        # Without it S3 answers 403 for a state that does not exist yet, as for one that may not be read.
        prefix = {"StringLike": {"s3:prefix": key}}
        scan.append(allow_statement(["s3:ListBucket"], f"arn:*:s3:::{bucket}", Condition=prefix))
    if notify.sns:
        scan.append(allow_statement(["sns:Publish"], notify.sns.topic_arn))
    if notify.email:
        sender = {"StringEquals": {"ses:FromAddress": notify.email.sender}}
        scan.append(allow_statement(["ses:SendEmail"], "*", Condition=sender))
    writing = allow_statement(
        [action for action in WRITE_ACTIONS if action not in READ_ACTIONS],
        "arn:*:ec2:*:*:instance/*",
        Condition={"ForAllValues:StringEquals": {"aws:TagKeys": sorted(policy.keys)}},
    )
    remediate = [allow_statement(READ_ACTIONS[:1], "*"), *listing, writing]
    return {"scan": policy_document(scan), **documents, "remediate": policy_document(remediate)}


def run_iam_policy(args: IamPolicyOptions, now: datetime) -> ExitCode:
    """Print the IAM policies that the policy's features need."""
    documents = iam_documents(load_policy(args.policy), args.state, creators=args.creators)
    emit(json.dumps(documents, indent=2) + "\n")
    return ExitCode.COMPLIANT


def run_explain(args: ExplainOptions, now: datetime) -> ExitCode:
    """Print the rules in force in a region, or why an instance passes or fails."""
    _check_instance(args.instance)
    policy = _load_policy(args)
    lines: list[str] = []
    if args.instance:
        known, changes, accounts = _known_history(args, policy, args.instance)
        args = replace(args, account=account_ids(args.account, accounts))
        fleet = load_fleet(args.instances)[0]
        for target, instance in _find_instance(args, policy, known, fleet):
            found, placed = known.get(target), _placed(target, accounts)
            likely = found.suggestions if found else ()
            likely = _suggested(policy, fleet, target, instance, now) if args.instances else likely
            lines += explain(policy, placed, instance, found, likely, changes, now)
    else:
        for region in args.region or sorted(policy.regions):
            lines += explain_region(policy, region, now.date())
    emit_lines(lines)
    return ExitCode.COMPLIANT


def _known_history(
    args: ExplainOptions, policy: Policy, instance_id: str
) -> tuple[dict[Target, Finding], list[Change], dict[str, Account]]:
    """Return an instance's findings and changes, and the accounts; --instances and --live need no state."""
    elsewhere = bool(args.instances or args.live)
    try:
        with _reading(args, None if elsewhere else policy.name) as db:
            known = {each.target: each for each in fetch_history(db, Selection(policy.name, instance_id))}
            changes = fetch_changes(db, policy.name, instance_id)
            return known, changes, named_accounts(policy, fetch_accounts(db))
    except MissingStateError as error:
        if not elsewhere:
            raise
        LOG.warning("%s", printable(f"The history of {instance_id} is not known: {error}"))
        return {}, [], named_accounts(policy, {})


def _suggested(
    policy: Policy, fleet: Fleet, target: Target, instance: Instance, now: datetime
) -> tuple[Suggestion, ...]:
    """Return the likely values of an instance's missing tags, as a scan of saved files finds them."""
    with contextlib.closing(open_sightings()) as db, sighting_errors():
        for place in filter(policy.covers_target, fleet):
            included = (each for each in fleet[place] if policy.includes(each.state))
            seen = [(judge(place, each, policy, now), None) for each in included]
            rules = policy.rules(place.region)
            add_sightings(db, add_target(db, place), seen, rules, policy.placeholder_values)
        add_suggestions(db, policy)
        return fetch_suggestions(db, target, instance.instance_id)


def _find_instance(
    args: ExplainOptions, policy: Policy, known: Mapping[Target, Finding], fleet: Fleet
) -> list[tuple[Target, Instance]]:
    """Return an instance as saved files, AWS or the state have it; raises UsageError where they have none."""
    if args.live:
        return [_describe_instance(args, policy, known)]
    if args.instances:
        every = ((target, instance) for target, instances in fleet.items() for instance in instances)
        cases = [case for case in every if case[1].instance_id == args.instance]
        none, why = f"{', '.join(args.instances)} has no {args.instance}", "name other files"
    else:
        cases = [(target, _instance_of(case)) for target, case in known.items()]
        none = f"{args.state} has no finding of {args.instance} under the policy {policy.name}"
        why = "it complied, was exempted or too young, or was never scanned; "
        why += "ask AWS with --live --region R, or saved files with --instances FILE"
    if chosen := [case for case in cases if args.includes(case[0]) and policy.covers_target(case[0])]:
        return chosen
    if cases:
        none += f" there, only in {', '.join(str(target) for target, _ in cases)}"
        why = f"--account or --region leaves it out, or {policy.file} does not cover it"
    raise UsageError(f"{none}: {why}")


def _instance_of(case: Finding) -> Instance:
    """Return an instance as it was when its finding was last seen."""
    more = {"instance_type": case.instance_type or "", "managed_by": case.managed_by or ""}
    launched = datetime.fromisoformat(case.launch_time)
    return Instance(case.instance_id, case.state, launched, case.tags, **more)


def _describe_instance(
    args: ExplainOptions, policy: Policy, known: Mapping[Target, Finding]
) -> tuple[Target, Instance]:
    """Return an instance as AWS has it now, from the first region that has it; raises UsageError."""
    named = sorted(policy.regions.keys() - {"*"})
    regions = args.region or sorted({target.region for target in known}) or named
    aws = Aws(args.profile, workers=1)
    caller = _identify(aws, policy, regions)
    account_id = caller.account_id
    if args.account and account_id not in args.account:
        only = f"--live looks only into the account of the credentials, {account_id}"
        raise UsageError(f"{only}: leave out --account, or choose others with --profile")
    aws.enter_own(account_id)
    if "*" in policy.regions and regions == named:
        with aws.account(account_id):
            regions = [*named, *sorted({*describe_regions(aws.client("ec2", caller.home))} - {*named})]
    for region in regions:
        try:
            with aws.account(account_id):
                pages = list(describe_instances(aws.client("ec2", region), InstanceIds=[args.instance]))
        except TargetError as error:
            if not is_gone(error):
                raise
            continue
        for instance in itertools.chain.from_iterable(pages):
            return Target(account_id, region), instance
    place = f"{account_id} {', '.join(regions)}"
    raise UsageError(f"{args.instance} is not in {place}: give its --region, or credentials of its account")


def run_history(args: HistoryOptions, now: datetime) -> ExitCode:
    """List findings that the state keeps, or the timeline of one instance."""
    _check_instance(args.instance)
    outputs = _outputs(args, HISTORY_WRITERS)
    statuses = [*itertools.chain(*args.status)]
    before = now - args.older_than if args.older_than else None
    with _reading_known(args) as (db, rules):
        policy = rules.name
        _check_tag_keys(db, rules, args.tag, now)
        accounts = account_ids(args.account, named_accounts(rules, fetch_accounts(db)))
        selection = Selection(policy, args.instance, accounts, args.region, statuses, args.tag, before)
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
            emit_lines(history_lines(report, screen_width(sys.stdout)))
    return ExitCode.COMPLIANT


def _check_tag_keys(db: Connection, policy: Policy, tags: Iterable[str], now: datetime) -> None:
    """Raise UsageError for a tag that neither the policy nor a finding names."""
    for tag in tags:
        if tag not in policy.keys and not any(fetch_history(db, Selection(policy.name, tag_keys=[tag]))):
            known = [*policy.keys, *(key for key, _ in fetch_open(db, policy.name, now).by_tag)]
            none = f"no finding under the policy {policy.name} lacks this tag"
            raise UsageError(f"--tag {tag}: {none}{did_you_mean(tag, known)}")


def run_report(args: ReportOptions, now: datetime) -> ExitCode:
    """Write the dashboard of a policy's findings."""
    if args.css == "-":
        raise UsageError("--css -: the page links to its style: name a file beside it, or leave out --css")
    outputs = _outputs(args, DASHBOARD_WRITERS)
    if args.css and args.html != "-" and Path(args.css).parent.resolve() != Path(args.html).parent.resolve():
        raise UsageError(
            f"--css {args.css} must be in the directory of --html {args.html}, which links to it"
        )
    with _reading_known(args) as (db, policy):
        trend, standings = fetch_trend(db, policy.name), fetch_standings(db, policy.name)
        if not (trend and standings):
            raise StateError(f"the state {args.state} has no counts of the policy {policy.name!r}: {WAY_OUT}")
        open_, today = fetch_open(db, policy.name, now), now.date()
        upcoming, spend = fetch_upcoming(db, policy, today), fetch_spend(db, policy.name)
    command = ["tagcheck.py", "remediate", "--policy", policy.file, *_given_again(args, "state")]
    page = (policy, now, trend, standings, open_, check_expiry(policy, today), upcoming)
    dashboard = Dashboard(*page, spend, command, Path(args.css or "").name)
    write_report(outputs, DASHBOARD_WRITERS, dashboard, emit)
    if (path := outputs[0].path) != "-":
        LOG.info("Wrote %s: %s", printable(path), counted(open_.total, "open finding"))
    return ExitCode.COMPLIANT


def run_prune(args: PruneOptions, now: datetime) -> ExitCode:
    """Delete what is older than a time, and print what was deleted."""
    if (args.days is None) == (args.older_than is None):
        raise UsageError("say how old what is deleted must be: --older-than 90d, or --days 90")
    before = now - (args.older_than or timedelta(days=args.days or 0))
    pruned = Pruned()
    with open_state(args, copied=args.dry_run) as state:
        state.check()
        for path in state.attempts(str(uuid.uuid4())):
            # An attempt that is repeated because its answer was lost finds nothing left to delete.
            pruned = max(pruned, prune_state(path, before, state.name))
    done = "Would delete" if args.dry_run else "Deleted"
    findings, scans = counted(pruned.findings, "finding"), counted(pruned.scans, "scan")
    counts = f"{scans} and the counts of {counted(pruned.coverage, 'target')} from before it"
    emit_lines([f"{done} {findings} resolved before {utc_text(before)}, {counts}; the trend is kept"])
    return ExitCode.COMPLIANT


def run_remediate(args: RemediateOptions, now: datetime) -> ExitCode:
    """Plan the tags that would fix the open findings, write those of a plan, or revert an earlier run."""
    policy = _load_policy(args)
    if args.role and not policy.accounts:
        raise UsageError(f"--role {printable(args.role)}: {policy.file} has no accounts to assume it in")
    new_plan = not (args.plan or args.undo or args.apply)
    args = replace(args, csv=args.csv or ("remediate-plan.csv" if new_plan else ""))
    outputs = _outputs(args, REMEDIATION_WRITERS)
    plans = [output for output in outputs if output.format == "csv"]
    undo_file = "" if args.apply else None
    with sighting_errors(), contextlib.ExitStack() as stack:
        rows, left_out = _planned_rows(args, policy, now)
        changes = sum(row.writes for row in rows)
        command = functools.partial(_next_command, args, changes)
        for output in plans:
            check_plan_output(output)
        staged = stack.enter_context(staged_outputs(outputs))
        if args.apply and changes:
            state_file = os.path.realpath(args.state) if os.path.islink(args.state) else args.state
            beside = Path() if args.state.startswith("s3://") else Path(state_file).parent
            undo = UndoFile(beside / f"remediate-undo-{now:%Y%m%dT%H%M%SZ}.csv")
            stack.callback(undo.close)
            stack.enter_context(_printing_undo_command(undo, command))
            _apply(args, policy, rows, stack.enter_context(open_state(args)), undo, now)
            undo_file = str(undo.path) if undo.rows else ""
        done = Remediation(policy, rows, undo_file, left_out)
        stage_report(staged, REMEDIATION_WRITERS, done)
        for output in plans:  # again, as applying takes its time
            check_plan_output(output)
        publish_report(staged, emit)
        if not args.quiet:
            stream = _message_stream(outputs)
            emit_lines(remediation_lines(done, args.csv or "", command, screen_width(stream)), stream)
        return rows.exit_code


def _check_owners(db: Connection, policy: Policy, owners: Iterable[str], now: datetime) -> None:
    """Raise UsageError for an owner of whom nothing is open; '' may always be asked for."""
    for owner in filter(None, owners):
        if not any(fetch_history(db, Selection(policy.name, statuses=OPEN, owners=[owner]))):
            known = [name for name, _ in fetch_open(db, policy.name, now).by_owner]
            none = f"no open finding under the policy {policy.name} has this owner"
            raise UsageError(
                f"--owner {owner}: {none}{did_you_mean(owner, known)}; report shows whose they are"
            )


def _planned_rows(
    args: RemediateOptions, policy: Policy, now: datetime
) -> tuple[PlanRows, Counter[LeftOut] | None]:
    """Return the rows of the plan or the undo file that was given, or of a new plan and what it lacks."""
    rows: Iterable[PlanRow] = ()
    left_out = None if args.plan or args.undo else Counter[LeftOut]()
    if args.plan:
        rows = read_plan(args.plan, policy, PLAN_ACTIONS)
    # A plan that is given comes from a state, too, and what is written is kept there.
    with _reading(args, None if left_out is None else policy.name) as db:
        known = named_accounts(policy, fetch_accounts(db))
        args = replace(args, account=account_ids(args.account, known))
        if args.undo:
            check = functools.partial(check_undo, db, args.state, policy.name)
            rows = read_plan(args.undo, policy, UNDO_ACTIONS, check)
        elif left_out is not None:
            owners = [*map(stripped, args.owner)]
            _check_owners(db, policy, owners, now)
            chosen = Selection(policy.name, None, args.account, args.region, OPEN, owners=owners)
            planned = plan(fetch_history(db, chosen), policy, args.min_confidence, left_out)
            every = [] if args.owner else fetch_aliased(db, policy.name)  # whose they are is not recorded
            rows = itertools.chain(planned, plan_aliased(every, policy, args.min_confidence))
        return PlanRows(row for row in rows if args.includes(row.target)), left_out


@contextlib.contextmanager
def _printing_undo_command(undo: UndoFile, command: Callable[..., list[str]]) -> Iterator[None]:
    """Print the command that reverts a run on stderr if the run fails before it prints its results."""
    try:
        yield
    except BaseException as error:  # a bug, too, must not leave tags written without a way back
        if undo.rows:
            emit_lines([Command("Undo it with:", command("--undo", str(undo.path), "--apply"))], sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            done = "what was written is recorded, and the same command continues from there"
            raise KeyboardInterrupt(done if undo.rows else "nothing was written") from None
        raise


def _next_command(args: RemediateOptions, changes: int, *more: str) -> list[str]:
    """Return the words of the command that writes what was planned, or reverts what was written."""
    words = ["tagcheck.py", "remediate", *_given_again(args, "policy", "state", "profile", "role")]
    words += ["--max-changes", str(changes)] if changes > MAX_CHANGES else []
    if "--undo" not in more:
        words += _given_again(args, "region", "account")  # a plan that was given may have rows of others
        if (path := args.undo or args.plan or args.csv or "-") != "-":
            words += ["--undo" if args.undo else "--plan", path]
        else:
            words += [f"--owner={name}" for name in args.owner]
            if args.min_confidence != MIN_CONFIDENCE:
                words += ["--min-confidence", str(args.min_confidence)]
    return [*words, *more]


def _apply(
    args: RemediateOptions, policy: Policy, rows: PlanRows, state: State, undo: UndoFile, now: datetime
) -> None:
    """Check a plan's size, the credentials and the accounts, then carry it out; raises TagcheckError."""
    begun, run = time.monotonic(), uuid.uuid4().hex
    if (number := sum(row.writes for row in rows)) > args.max_changes:
        limit = f"more than --max-changes {args.max_changes}: read it first, then pass --max-changes {number}"
        raise UsageError(f"the plan would write {number:,} tags, {limit}")
    state.check()
    aws = Aws(args.profile, 1, WRITE_ACTIONS, CALL_INTERVAL)
    regions = sorted({row.region for row in rows if row.writes})
    caller = _identify(aws, policy, regions)
    check_accounts(rows, policy, _accounts_of(policy, aws, caller))
    accounts = policy.accounts and replace(policy.accounts, role_name=args.role or policy.accounts.role_name)

    def describe(row: PlanRow) -> Change:
        at = now + timedelta(seconds=time.monotonic() - begun)
        return change_of(row, run, policy.name, caller.arn, utc_text(at))

    apply_plan(rows, aws, functools.partial(_enter, aws, accounts, caller), undo, state, describe)


def with_progress(
    readings: Iterable[Reading], includes: Callable[[str], bool], *, quiet: bool
) -> Iterator[Reading]:
    """Yield what is read of instances in the states that count, and show on stderr how far that is.

    On a terminal it is one line that changes, else a line for each target with instances or an error.
    """
    live = not quiet and sys.stderr.isatty()
    waiting: dict[Target, int] = {}  # the instances of targets that have not ended
    instances = ended = empty = 0
    begun, shown_at = time.monotonic(), 0.0
    for target, reading in readings:
        if isinstance(reading, list):
            included = [instance for instance in reading if includes(instance.state)]
            yield target, included
            waiting[target] = waiting.get(target, 0) + len(included)
            instances += len(included)
        else:
            yield target, reading
            number = waiting.pop(target, 0)
            ended += 1
            empty += not (number or reading)
            if not live and (reading or (number and not quiet)):
                how = f"not read: {reading}" if reading else counted(number, "instance")
                emit(printable(f"{target.account_id} {target.region}: {how}") + "\n", sys.stderr)
        if live and (now := time.monotonic()) - shown_at >= 0.1:
            shown_at = now
            minutes, seconds = divmod(int(now - begun), 60)
            regions = ", ".join(sorted({target.region for target in waiting}))
            targets = f"{ended:,}/{counted(ended + len(waiting), 'target')}"
            line = f"{targets} · {counted(instances, 'instance')} · {minutes}:{seconds:02}"
            line += f" · waiting: {regions}" if regions else ""
            emit(f"\r\x1b[K{cut_text(printable(line), shutil.get_terminal_size().columns - 1)}", sys.stderr)
    if live:
        emit("\r\x1b[K", sys.stderr)
    elif empty and not quiet:
        emit(f"{counted(empty, 'target')} without instances\n", sys.stderr)


class Signals:
    """Ctrl-C and SIGTERM: in the body of a `with`, the first ends the run, at once or when it is released."""

    held = came = ended = False
    numbers = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> None:
        self.held = self.came = self.ended = False
        for number in self.numbers:
            signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number in self.numbers:  # the exit code is decided; Python's own handlers would change it
            signal.signal(number, signal.SIG_IGN)

    def hold(self) -> Callable[[], None]:
        """Hold signals back from now on; returns a function that undoes this."""
        before, self.held = self.held, True
        return lambda: self.release(held=before)

    def release(self, *, held: bool = False) -> None:
        """Let signals end the run again; raises KeyboardInterrupt if one came while they were held."""
        self.held = held
        if self.came:
            self._handle()

    def _handle(self, *_: object) -> None:
        """End the run at the first signal; a second one must not interrupt the cleanup."""
        if self.held:
            self.came = True
        elif not self.ended:
            self.ended = True
            raise KeyboardInterrupt


SIGNALS = Signals()


def emit(text: str, stream: IO[str] | None = None) -> None:
    """Write text to a stream; raises OutputError for stdout, but not if its reader went away (`| head`)."""
    stream = stream or sys.stdout
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # What is left in the stream must not fail again when Python flushes it at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            message = f"cannot write to standard output: {error.strerror}; if this was a scan, it is recorded"
            raise OutputError(message) from error


MIN_WIDTH = 40  # columns; in fewer nothing is readable


def screen_width(stream: IO[str]) -> int | None:
    """Return how wide the terminal is that shows a stream; None for a file or a pipe."""
    is_known = stream.isatty() or os.environ.get("COLUMNS")
    return max(MIN_WIDTH, shutil.get_terminal_size().columns) if is_known else None


def emit_lines(lines: Iterable[str | Command], stream: IO[str] | None = None) -> None:
    """Write printable lines to stdout or another stream, a thousand at a time; raises OutputError.

    They are wrapped where the stream is a terminal.
    """
    width = screen_width(stream or sys.stdout)
    parts = (part for line in lines for part in fitted(line, width))
    while block := "".join(f"{part}\n" for part in itertools.islice(parts, 1000)):
        emit(block, stream)


COMMANDS: dict[str, tuple[Callable[[Any, datetime], ExitCode], type[Any]]] = {
    "scan": (run_scan, ScanOptions),
    "init": (run_init, InitOptions),
    "validate": (run_validate, ValidateOptions),
    "explain": (run_explain, ExplainOptions),
    "history": (run_history, HistoryOptions),
    "report": (run_report, ReportOptions),
    "prune": (run_prune, PruneOptions),
    "remediate": (run_remediate, RemediateOptions),
    "notify": (run_notify, NotifyOptions),
    "schema": (run_schema, SchemaOptions),
    "iam-policy": (run_iam_policy, IamPolicyOptions),
}
EXAMPLES = {
    "scan": ("--policy org.yaml", "--policy org.yaml --dry-run --region eu-west-1"),
    "init": ("", "--instances fleet.json --output org.yaml"),
    "validate": ("policies/*.yaml", "org.yaml --json -"),
    "explain": ("--policy org.yaml --region eu-west-1", "--policy org.yaml --live i-0123456789abcdef0"),
    "history": ("--status open --older-than 30d", "i-0123456789abcdef0"),
    "report": ("--html dashboard.html", "--state s3://bucket/key --html -"),
    "prune": ("--older-than 90d --dry-run", "--older-than 90d"),
    "remediate": ("--policy org.yaml", "--policy org.yaml --plan remediate-plan.csv --apply"),
    "notify": ("--policy org.yaml --test", "--policy org.yaml --profile ops --test"),
    "schema": ("> policies/policy.schema.json", "| less"),
    "iam-policy": ("--policy org.yaml", "--policy org.yaml --state s3://bucket/key"),
}


VARIABLES = (
    "TAGCHECK_POLICY is the default of --policy, and so on for every option that takes a FILE, and for "
    "--profile. TAGCHECK_CSV, TAGCHECK_JSON and TAGCHECK_JUNIT are for scan only."
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors say what was probably meant."""

    commands: Mapping[str, Parser] = {}

    def error(self, message: str) -> NoReturn:
        """Print the usage and what is wrong, and exit with 2."""
        if unknown := re.match("argument COMMAND: invalid choice: '(.*?)' ", message):
            hint = did_you_mean(unknown[1], [*COMMANDS])
            hint = hint or ": --help lists the commands; options come after the command"
            message = f"unknown command {unknown[1]!r}{hint}"
        super().error(printable(message))

    def refuse(self, word: str) -> NoReturn:
        """Print the usage and what is wrong about a word that is no option or argument, and exit with 2."""
        known = [option for action in self._actions for option in action.option_strings]
        if (option := word.partition("=")[0]) in known:
            self.error(f"{word} comes after the command: {self.prog} {word}")
        hint = did_you_mean(option, known)
        self.error(f"unknown {'option' if word.startswith('-') else 'argument'} {word}{hint}")


def build_parser() -> Parser:
    """Return the parser of COMMANDS, whose help is the docstring and the annotations of their options."""
    width = max(MIN_WIDTH, shutil.get_terminal_size().columns) - 2
    codes = [f"  {code:>3} {code.name:<11} {code.meaning}" for code in ExitCode]
    exit_codes = ["exit codes:", *(textwrap.fill(line, width, subsequent_indent=" " * 18) for line in codes)]
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    what = "Find the EC2 instances that lack their required tags. COMMAND --help lists its options."
    variables = textwrap.fill(VARIABLES, width, initial_indent="  ", subsequent_indent="  ")
    epilog = "\n".join(["environment:", variables, "", *exit_codes])
    about = textwrap.fill(what, width)
    parser = Parser("tagcheck.py", "%(prog)s COMMAND [options]", about, epilog, **shape)
    parser.add_argument("--version", action="version", version=f"tagcheck {__version__}")
    parser.set_defaults(quiet=False, verbose=False)
    commands = parser.add_subparsers(title="commands", prog=parser.prog, dest="command", metavar="COMMAND")
    for name, (_, options) in COMMANDS.items():
        examples = [f"tagcheck.py {name} {example}".split() for example in EXAMPLES.get(name, ())]
        shown = ["examples:", *(line for words in examples for line in command_lines(words, width))]
        shape["epilog"] = "\n".join([*shown, *(["", *exit_codes] if name == "scan" else [])])
        about = textwrap.fill(options.__doc__ or "", width)
        command = commands.add_parser(name, help=options.__doc__, description=about, **shape)
        hints, environment = get_type_hints(options, include_extras=True), dict[str, Any]()
        for each in fields(options):
            _add_option(command, each, hints[each.name], environment)
        required = [action for action in command._actions if action.required or not action.option_strings]
        command.usage = " ".join(["%(prog)s [options]", *map(_usage, required)])
        command.set_defaults(environment=environment)
    parser.commands = commands.choices
    return parser


def _usage(action: argparse.Action) -> str:
    """Return how a usage line shows an option or argument that stands there."""
    words = " ".join([*action.option_strings, f"{action.metavar}"])
    return f"{words} ..." if action.nargs == "+" else words if action.required else f"[{words}]"


def _add_option(command: Parser, filled: Field[Any], hint: Any, environment: dict[str, Any]) -> None:
    """Add the option that fills a field; `environment` gets what is set there for it, and how to say that."""
    [option] = hint.__metadata__
    kind = get_origin(hint.__origin__) or hint.__origin__
    more: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "type": option.type}
    if option.positional:
        command.add_argument(filled.name, nargs="+" if kind is list else "?", **more)
        return
    name = filled.name.rstrip("_")  # `from` is a word of Python, so that field ends in _
    flag, variable = f"--{name.replace('_', '-')}", f"TAGCHECK_{name.upper()}"
    if kind is bool:
        short = [flag[1:3]] if name in ("quiet", "verbose") else []
        command.add_argument(*short, flag, help=option.help, action="store_true")
        return
    more |= {"dest": filled.name, "default": filled.default}
    if kind is list:
        more |= {"help": f"{option.help} (repeatable)", "action": "append", "default": []}
    if kind is Literal:
        more |= {"metavar": None, "choices": get_args(hint.__origin__)}
    # A variable that names the CSV of a scan must not make `history` replace it.
    of_others = name in WRITERS and command.prog != "tagcheck.py scan"
    has_variable = (more["metavar"] == "FILE" or name == "profile") and not of_others
    if has_variable and (text := os.environ.get(variable)):
        source = f"{flag} {text} (from {variable})"
        environment[filled.name] = source, [text] if kind is list else text
        more["help"] += f" (default from {variable}: {printable(text)})".replace("%", "%%")
        more["default"] = None
    elif more["default"] and isinstance(more["default"], (str, int, float)):
        more["help"] += f" (default: {more['default']})"
    command.add_argument(flag, required=more["default"] is MISSING, **more)


# The options of which a command takes one: what to judge, and what to write.
ALTERNATIVES = ({"instances", "live", "creators"}, {"owner", "plan", "undo"})


def read_options(options: type[Any], given: argparse.Namespace) -> Any:
    """Return the record of a command's options: as given, else as the environment says, else the default.

    Raises UsageError for options that exclude each other, and for a text that neither the state nor JSON
    could keep. What is given on the command line excludes what the environment says.
    """
    values = {each.name: getattr(given, each.name) for each in fields(options)}
    chosen = {name for name, value in values.items() if value}
    sources: dict[str, str] = {}
    for name, (source, value) in given.environment.items():
        if any(name in group and chosen & group - {name} for group in ALTERNATIVES):
            values[name] = values[name] or type(value)()
        elif values[name] is None:
            LOG.debug("%s", printable(source))
            sources[name], values[name] = source, value
    for group in ALTERNATIVES:
        if len(both := [f"--{name}" for name in values if name in group and values[name]]) > 1:
            raise UsageError(f"{' and '.join(both)}: give one of them")
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and re.search("[\ud800-\udfff]", text):
                source = sources.get(name, f"the argument {text}")
                raise UsageError(f"{source}: it is not UTF-8; write it in UTF-8")
    return options(**values)


def _prepare_streams() -> None:
    """Let every text be printed, also where the caller has closed a stream, which then is None."""
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None, now: datetime | None = None) -> int:
    """Run a command and return its exit code; every expected failure ends here."""
    with SIGNALS:
        warnings.simplefilter("ignore", FutureWarning)  # of `re`, on patterns that work
        _prepare_streams()
        parser = build_parser()
        given, rest = parser.parse_known_args(argv)
        if given.command is None:
            parser.print_help(sys.stderr)
            return ExitCode.USAGE
        if rest:
            parser.commands[given.command].refuse(rest[0])
        LOG.handlers, LOG.propagate = [logging.StreamHandler(sys.stderr)], False
        LOG.setLevel(logging.DEBUG if given.verbose else logging.WARNING if given.quiet else logging.INFO)
        # botocore's log has tracebacks, and may have secrets; what it says comes as an exception.
        logging.getLogger("botocore").addHandler(logging.NullHandler())
        run, options = COMMANDS[given.command]
        try:
            try:
                os.getcwd()  # relative paths would lead nowhere
            except OSError as error:
                message = f"cannot use the current directory: {error.strerror}; change to another"
                raise UsageError(message) from error
            return run(read_options(options, given), now or datetime.now(UTC))
        except PolicyError as error:
            done = "written" if given.command == "remediate" else "scanned"
            emit(f"{error}\n{counted(len(error.problems), 'problem')}; nothing was {done}\n", sys.stderr)
            return error.exit_code
        except TagcheckError as error:
            failure, code = str(error), error.exit_code
        except KeyboardInterrupt as interrupt:
            failure, code = f"interrupted; {str(interrupt) or 'nothing was recorded'}", ExitCode.INTERRUPTED
        except ModuleNotFoundError as error:
            if error.name not in ("boto3", "botocore", "yaml", "jsonschema"):
                raise
            failure, code = str(PackageError(f"the package {error.name} is missing")), ExitCode.CRASHED
        emit_lines([f"tagcheck: {failure}"], sys.stderr)
        return code


if __name__ == "__main__":
    # botocore's models are 100,000 containers that stay. To look for cycles in them while they are made, and
    # once more at the end, took a third of a scan of 1,000 instances.
    gc.set_threshold(100_000, 50, 1000)
    exit_code = main()
    gc.freeze()
    raise SystemExit(exit_code)
