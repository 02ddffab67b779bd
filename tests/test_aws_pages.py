"""Pages of instances: our two readers and botocore's agree on every page, or refuse it."""

import copy
import functools
import itertools
import json
import random
import re
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError
from xml.sax.saxutils import escape

import benchmark
import pytest
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.parsers import create_parser
from conftest import time_limit

import tagcheck as script

ACCOUNT_ID, OTHER_ACCOUNT = "123456789012", "210987654321"
SHORT, SOAK = 800, 12_000  # pages

# ---- Pages that are whole: Element, random_instance, random_page -------------------------------------------


@dataclass
class Element:
    """An element of a page; bytes in its content are written as they are."""

    name: str
    content: list["Element | bytes"] = field(default_factory=list)
    attributes: bytes = b""

    def elements(self) -> list["Element"]:
        """Return the elements that it holds."""
        return [item for item in self.content if isinstance(item, Element)]

    def walk(self) -> Iterator["Element"]:
        """Yield it and all elements below it."""
        yield self
        for element in self.elements():
            yield from element.walk()

    def find(self, *names: str) -> list["Element"]:
        """Return all elements below with one of these names."""
        return [element for element in self.walk() if element.name in names]


def text(name: str, value: str) -> Element:
    """Make an element of a text."""
    return Element(name, [escape(value).encode()] if value else [])


def element(name: str, *elements: Element) -> Element:
    """Make an element of elements."""
    return Element(name, [*elements])


def tag(key: str, value: str) -> Element:
    """Make an item of a tagSet."""
    return element("item", text("key", key), text("value", value))


#: Texts of tags, as people and programs write them; the first ones are plain.
VALUES = (
    *("payments", "CC-1042", "Grüße", "経理部", "a & b", "<none>", "", "x" * 300, "true", "🦀 rust"),
    *("</value></item>", "<item><key>Owner</key><value>eve</value></item>", "<!-- no -->", "<?php ?>"),
    *("&amp;lt;", "]]", "] ]>", "<![CDATA[x", "&#65;", "&bogus;", " leads", "trails ", "\ttab\n", "\u200b"),
    *("\u202eevil", "'\"", "\u00a0", "\x7f\x85\u2028", "\ufeffBOM", "\U0001fffe", "\U000e0041", "e\u0301"),
    "=1+1",
)
KEYS = (
    *("Owner", "owner", "CostCenter", "aws:autoscaling:groupName", "a&b", "é", "🔑", "<k>", '"', " "),
    "\u200b",
)


def random_instance(chosen: random.Random, number: int) -> Element:
    """Make an instance as EC2 describes it: most members are there, and some that nobody reads."""
    keys = chosen.sample(KEYS, chosen.choice([0, 0, 1, 2, 4]))
    tags = [tag(key, chosen.choice(VALUES[: chosen.choice([6, len(VALUES)])])) for key in keys]
    group = element("item", text("groupId", "sg-1"), text("groupName", chosen.choice(VALUES)))
    interface = element(
        "item",
        text("subnetId", "subnet-wrong"),
        text("vpcId", "vpc-wrong"),
        text("ownerId", OTHER_ACCOUNT),
        element("groupSet", group),
        element("attachment", text("instanceId", "i-bad"), text("launchTime", "never"), text("status", "up")),
        element(
            "privateIpAddressesSet", element("item", element("association", text("publicIp", "10.0.0.1")))
        ),
    )
    operator = element(
        "operator", text("managed", chosen.choice(["true", "false"])), text("principal", "eks")
    )
    optional = [
        element("instanceState", text("code", "16"), text("name", "running")),
        text("dnsName", ""),
        text("reason", chosen.choice(VALUES)),
        text("instanceType", "m7g.large"),
        element("placement", text("availabilityZone", "us-east-1a"), text("groupName", "")),
        text("subnetId", "subnet-1"),
        text("vpcId", "vpc-1"),
        element("groupSet", copy.deepcopy(group)),
        element("productCodes"),
        element("tagSet", *tags),
        element("networkInterfaceSet", interface),
        element("iamInstanceProfile", text("arn", f"arn:aws:iam::{ACCOUNT_ID}:role/r"), text("id", "AIPA")),
        *([operator] if chosen.random() < 0.4 else []),
    ]
    always = [text("instanceId", f"i-{number:08x}"), text("launchTime", "2026-02-24T10:30:45.000Z")]
    kept = [member for n, member in enumerate(optional) if n == 0 or chosen.random() < 0.8]
    return element("item", *always, *kept)


def random_page(chosen: random.Random) -> Element:
    """Make a whole page of a few instances in a few reservations."""
    numbers = itertools.count(chosen.randrange(1000))
    reservations = []
    for _ in range(chosen.choice([0, 1, 1, 1, 1, 1, 1, 2, 2, 3])):
        many = chosen.choice([0, 1, 1, 1, 1, 1, 1, 2, 2, 3])
        instances = [random_instance(chosen, next(numbers)) for _ in range(many)]
        members = [
            text("reservationId", "r-1"),
            text("ownerId", ACCOUNT_ID),
            element("groupSet"),
            element("instancesSet", *instances),
        ]
        if chosen.random() < 0.3:
            members.append(text("requesterId", "940372691376"))
        reservations.append(element("item", *members))
    root = element(
        "DescribeInstancesResponse", text("requestId", "8f77"), element("reservationSet", *reservations)
    )
    root.attributes = b' xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"'
    if chosen.random() < 0.5:
        root.content.append(text("nextToken", chosen.choice(["eyJ2IjoiMiJ9", "a&b", "é", "", "a b"])))
    return root


# ---- Attacks on the elements of a page ---------------------------------------------------------------------

#: What the readers look for, and some names that look alike.
READ_NAMES = (
    *("reservationSet", "item", "ownerId", "instancesSet", "instanceId", "launchTime", "instanceType"),
    *("subnetId", "vpcId", "instanceState", "name", "iamInstanceProfile", "arn", "operator", "managed"),
    *("principal", "tagSet", "key", "value", "nextToken", "requestId"),
)
NAMES = (
    *READ_NAMES,
    *("groupSet", "instance", "instanceIds", "instanceid", "Item", "items", "keys", "keyName", "tag"),
    *("tagset", "tagSets", "valueX", "names", "nextTokens", "NextToken", "html", "a", "a1", "a-b", "a.b"),
    *("_a", "é", "x:a"),
)
#: Pieces that are put into a page as they are.
RAW: tuple[bytes, ...] = tuple(
    piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece
    for piece in (
        *("]]>", "]]", "]]&gt;", ">", '"', "'", "<", "<>", "</>", "<a", "<a>", "</a>", "<a/>", "<b>7</b>"),
        *("< a/>", "<![CDATA[x]]>", "<![CDATA[<item>]]>", "<![CDATA[]]>", "<![CDATA[", "<!-- c -->"),
        *("<!---->", "<!-- -- -->", "<!--", "-->", "<!-- <key>a</key> -->", "<?pi x?>", "<?pi"),
        *("<?xml version='1.0'?>", "<!DOCTYPE a>", "&amp;", "&lt;", "&gt;", "&quot;", "&apos;"),
        *("&amp;amp;", "&amp;lt;", "&#65;", "&#x41;", "&#13;", "&#xA;", "&#0;", "&#xFFFE;", "&#xD800;"),
        *("&#x110000;", "&#128;", "&nbsp;", "&bogus;", "&AMP;", "&LT;", "&lt", "&", "& ", "&amp", "&;"),
        *("&#;", "&#38;lt;", "&am&amp;p;", "\r", "\r\n", "\n", "\t", " ", "\u00a0", "\u2003", "\u2028"),
        *("\x85", "\x7f", "\x00", "\x01", "\x08", "\x0b", "\x0c", "\x0e", "\x1b", "\x1c", "\x1f", "\ufeff"),
        *("\ufffe", "\uffff", "\ufffd", "\uffef", "\U0001fffe", "\U0010ffff", "\ud800", "\udfff"),
        *("\ud83e\udd80", b"\xff", b"\xfe\xff", b"\x80", b"\xc3", b"\xc0\x80", b"\xe0\x80\x80"),
        *(b"\xf4\x90\x80\x80", b"\xf8", b"\xe9"),
    )
)
LAUNCH_TIMES = (
    *("2026-02-24", "20260224", "20260224T103045Z", "2026-02-24T10:30:45", "2026-02-24 10:30:45Z"),
    *("1771929045", "2026-02-24T10:30:45.123456789Z", "2026-02-24T10:30:45+05:30", "2026-W09-2"),
    *("2026W092", "2026", "202602", "2026-02-24T24:00:00Z", "2026-02-30T10:30:45Z"),
    *("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1969-12-31T23:59:59Z"),
    *("1970-01-01T00:00:00Z", "", " ", "now", "inf", "nan", "-1", "1e9", "20260224.5", "2026-02-24T10"),
    *("2026-02-24T1030", "2026-02-24T10:30:45,5Z", "2026-02-24X10:30:45Z", "2026-02-24T10:30:45z"),
    *("20260224103045", "2026-02-24T10:30:45.000Z ", "２０２６-02-24T10:30:45Z"),
    "2026-02-24T10:30:45+00:00:30",
)
ATTRIBUTES = (
    *(b' a="1"', b" a='1'", b" ", b"\n", b" a", b' a=""b=""', b' a="1" a="2"', b' a="&lt;"', b' a="<"', b"/"),
    *(b' a="]]>"', b' nextToken="t"', b' xml:lang="en"', b' x:a="1"', b' xmlns:x="urn:x"', b' xmlns="urn:x"'),
    *(
        b' xmlns=""',
        b' xmlns="a&#10;b"',
        b' xmlns="a\tb"',
        b' xmlns="a}b"',
        b' xmlns="{a"',
        b' xmlns="\xc3\xa9"',
    ),
    *(b' xmlns="http://www.w3.org/XML/1998/namespace"', b' xmlns="http://www.w3.org/2000/xmlns/"'),
    *(
        b' xmlns="http://ec2.amazonaws.com/doc/2026-01-01/"',
        b' xmlns="http://ec2.>"',
        b" xmlns='http://ec2.'",
    ),
)
OTHER_TEXTS = (
    *("", " ", "i-0", "i-", "I-0a", "i-0A", "i-0a\n", " i-0a", "i-0g", "x" * 2000, "true", "false", "TRUE"),
    "1",
    *("running", "\u00a0", ACCOUNT_ID, OTHER_ACCOUNT, "12345678901", f" {ACCOUNT_ID}", "é"),
)

TreeAttack = Callable[[random.Random, Element], None]


def any_element(chosen: random.Random, root: Element) -> Element:
    """Choose an element: by name first, so that rare names come as often as common ones."""
    elements = [*root.walk()]
    name = chosen.choice(sorted({each.name for each in elements}))
    return chosen.choice([each for each in elements if each.name == name])


def any_leaf(chosen: random.Random, root: Element) -> Element:
    """Choose an element without elements."""
    leaves = element("leaves", *(each for each in root.walk() if not each.elements()))
    return any_element(chosen, element("all", *leaves.elements())) if leaves.content else root


def any_parent(chosen: random.Random, root: Element) -> Element:
    """Choose an element of elements, among which another may be."""
    return chosen.choice([each for each in root.walk() if each.elements()] or [root])


def parent_of(root: Element, child: Element) -> Element:
    """Return the element that holds another, or that one itself where it is the root."""
    return next((each for each in root.walk() if any(item is child for item in each.content)), child)


def insert(chosen: random.Random, parent: Element, item: Element | bytes) -> None:
    """Put something at a random place among the content of an element."""
    parent.content.insert(chosen.randint(0, len(parent.content)), item)


def small_tree(chosen: random.Random, depth: int = 2) -> Element:
    """Make an element of any name, with more of them in it, or a text."""
    name = chosen.choice(NAMES)
    if not depth or chosen.random() < 0.4:
        return text(name, chosen.choice((*VALUES, *OTHER_TEXTS)))
    return element(name, *(small_tree(chosen, depth - 1) for _ in range(chosen.randrange(4))))


def shuffle_members(chosen: random.Random, root: Element) -> None:
    for each in root.walk():
        chosen.shuffle(each.content)


def shuffle_instances(chosen: random.Random, root: Element) -> None:
    for each in root.find("instancesSet", "instanceState", "operator", "iamInstanceProfile"):
        for some in (each, *each.elements()):
            chosen.shuffle(some.content)


def shuffle_one(chosen: random.Random, root: Element) -> None:
    chosen.shuffle(any_element(chosen, root).content)


def put_raw_text(chosen: random.Random, root: Element) -> None:
    leaf = any_leaf(chosen, root)
    raw = chosen.choice(RAW)
    leaf.content = chosen.choice([[*leaf.content, raw], [raw, *leaf.content], [raw]])


def put_raw_between(chosen: random.Random, root: Element) -> None:
    insert(chosen, any_element(chosen, root), chosen.choice(RAW))


def double(chosen: random.Random, root: Element) -> None:
    each = any_element(chosen, root)
    twin = copy.deepcopy(each)
    if chosen.random() < 0.5 and (leaf := any_leaf(chosen, twin)):
        leaf.content = [escape(chosen.choice((*VALUES, *OTHER_TEXTS))).encode()]
    insert(chosen, parent_of(root, each), twin)


def nest_alike(chosen: random.Random, root: Element) -> None:
    insert(chosen, any_parent(chosen, root), small_tree(chosen))


def nest_read(chosen: random.Random, root: Element) -> None:
    """Put a copy of a part of the page elsewhere, at any depth."""
    insert(chosen, any_parent(chosen, root), copy.deepcopy(any_element(chosen, root)))


def wrap(chosen: random.Random, root: Element) -> None:
    each = any_element(chosen, root)
    inner = Element(each.name, each.content, each.attributes)
    each.name, each.content, each.attributes = chosen.choice(NAMES), [inner], b""


def unwrap(chosen: random.Random, root: Element) -> None:
    each = any_element(chosen, root)
    parent = parent_of(root, each)
    if parent is not each:
        place = next(n for n, item in enumerate(parent.content) if item is each)
        parent.content[place : place + 1] = each.content


def leave_out(root: Element, each: Element) -> None:
    """Take an element out of the one that holds it."""
    parent = parent_of(root, each)
    parent.content = [item for item in parent.content if item is not each]


def drop(chosen: random.Random, root: Element) -> None:
    leave_out(root, any_element(chosen, root))


def rename(chosen: random.Random, root: Element) -> None:
    any_element(chosen, root).name = chosen.choice(NAMES)


def empty(chosen: random.Random, root: Element) -> None:
    any_element(chosen, root).content = []


def add_attribute(chosen: random.Random, root: Element) -> None:
    any_element(chosen, root).attributes += chosen.choice(ATTRIBUTES)


def add_prefix(chosen: random.Random, root: Element) -> None:
    """Give an element, perhaps a second one of a kind, the prefix of a namespace."""
    each = any_element(chosen, root)
    if chosen.random() < 0.5:
        double(chosen, each)
        each = any_element(chosen, root)
    each.name = f"x:{each.name}"
    if chosen.random() < 0.8:
        chosen.choice([each, root]).attributes += b' xmlns:x="urn:x"'


def nest_deeply(chosen: random.Random, root: Element) -> None:
    names = chosen.choice(
        [["a"], ["a", "b"], ["item"], ["item", "name"], ["instanceId"], ["value"], [*READ_NAMES]]
    )
    tower = text(names[0], "x")
    for level in range(chosen.choice([1, 4, 5, 6, 7, 8, 9, 50, 99, 100, 101, 102])):
        tower = element(names[level % len(names)], tower)
    insert(chosen, any_parent(chosen, root), tower)


def change_owner(chosen: random.Random, root: Element) -> None:
    for each in root.find("ownerId"):
        if chosen.random() < 0.7:
            each.content = [chosen.choice([OTHER_ACCOUNT, "", f" {ACCOUNT_ID}", ACCOUNT_ID, "x"]).encode()]
    for each in root.find("item"):
        if any(item.name == "ownerId" for item in each.elements()) and chosen.random() < 0.3:
            chosen.choice([chosen.shuffle, list.reverse, list.pop])(each.content)


def repeat_instance(chosen: random.Random, root: Element) -> None:
    """Put an instance a second time into a list, the same or not."""
    lists = root.find("instancesSet")
    instances = [each for one in lists for each in one.elements()]
    if instances:
        twin = copy.deepcopy(chosen.choice(instances))
        chosen.choice([shuffle_members, shuffle_members, drop, change_text, double])(chosen, twin)
        insert(chosen, chosen.choice(lists), twin)


def change_text(chosen: random.Random, root: Element) -> None:
    any_leaf(chosen, root).content = [escape(chosen.choice((*VALUES, *OTHER_TEXTS))).encode()]


def change_launch_time(chosen: random.Random, root: Element) -> None:
    for each in root.find("launchTime"):
        each.content = [chosen.choice(LAUNCH_TIMES).encode()]


def add_unread(chosen: random.Random, root: Element) -> None:
    each = any_parent(chosen, root)
    for _ in range(chosen.choice([1, 3, 300])):
        insert(chosen, each, chosen.choice([element("a"), text("b", "c"), element("item", element("a"))]))


#: Those that are worth more come twice.
TREE_ATTACKS: tuple[TreeAttack, ...] = (
    *(put_raw_text, put_raw_text, put_raw_between, put_raw_between, double, double, nest_alike, nest_read),
    *(wrap, unwrap, drop, rename, empty, add_attribute, add_prefix, nest_deeply, change_owner, change_text),
    *(repeat_instance, repeat_instance, change_launch_time, add_unread, shuffle_members, shuffle_instances),
    shuffle_one,
)

# ---- Attacks on the bytes of a page ------------------------------------------------------------------------

ByteAttack = Callable[[random.Random, bytes], bytes]


def cut(chosen: random.Random, page: bytes) -> bytes:
    return page[: chosen.randrange(len(page))]


def change_bytes(chosen: random.Random, page: bytes) -> bytes:
    """Change, add, drop or swap a few bytes anywhere."""
    changed = bytearray(page)
    for _ in range(chosen.choice([1, 1, 1, 2, 5])):
        place, other = chosen.randrange(len(changed)), chosen.randrange(len(changed))
        way = chosen.randrange(5)
        if way == 0:
            changed[place] = chosen.randrange(256)
        elif way == 1:
            changed[place] ^= 1 << chosen.randrange(8)
        elif way == 2:
            changed[place:place] = chosen.choice(
                [chosen.randbytes(1), chosen.choice(b"<>/&;]\r \0").to_bytes()]
            )
        elif way == 3:
            del changed[place]
        else:
            changed[place], changed[other] = changed[other], changed[place]
    return bytes(changed)


def change_tokens(chosen: random.Random, page: bytes) -> bytes:
    """Drop, double or swap whole tags and texts, so that most of the page stays well-formed."""
    tokens = re.findall(rb"<[^>]*>|[^<]+", page)
    first, second = sorted(chosen.choices(range(len(tokens)), k=2))
    way = chosen.randrange(4)
    if way == 0:
        del tokens[first]
    elif way == 1:
        tokens.insert(second, tokens[first])
    elif way == 2:
        tokens[first], tokens[second] = tokens[second], tokens[first]
    else:
        del tokens[first : min(second, first + chosen.randrange(1, 9))]
    return b"".join(tokens)


def splice(chosen: random.Random, page: bytes) -> bytes:
    """Drop or double a part, or put it elsewhere."""
    start, end, place = sorted(chosen.choices(range(len(page) + 1), k=3))
    return chosen.choice(
        [page[:start] + page[end:], page[:end] + page[start:], page[:place] + page[start:end] + page[place:]]
    )


def put_raw_anywhere(chosen: random.Random, page: bytes) -> bytes:
    place = chosen.randint(0, len(page))
    return page[:place] + chosen.choice(RAW) + page[place:]


def add_at_the_end(chosen: random.Random, page: bytes) -> bytes:
    ends = [
        b"x",
        b"<x/>",
        b"\0",
        b" \n\t ",
        b"\r\n",
        b"<!-- c -->",
        b"&amp;",
        b"\xc2\xa0",
        b"<?pi?>",
        b"<",
        b"\xff",
    ]
    return page + chosen.choice([*ends, page])


def change_declaration(chosen: random.Random, page: bytes) -> bytes:
    """Write another start of the document, for which the text may or may not be encoded."""
    root = page[page.index(b"<Desc") :] if b"<Desc" in page else page
    starts = (
        *("", " ", "\n", "\ufeff", '\ufeff<?xml version="1.0" encoding="UTF-8"?>', "<?xml version='1.0'?>"),
        '<?xml version="1.0" encoding="utf-8"?>',
        '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>',
        *('<?xml version="1.1" encoding="UTF-8"?>', '<?xml version="1.0"?>'),
        *('\n<?xml version="1.0" encoding="UTF-8"?>', '<?xml version="1.0" encoding="UTF-8"?>' * 2),
        *('<?xml version="1.0" encoding="UTF-8" ?>', "<!-- c -->", "<?pi?>"),
        *('<?xml version="1.0" encoding="ISO-8859-1"?>', '<?xml version="1.0" encoding="US-ASCII"?>'),
        *("<!DOCTYPE x>", '<?xml version="1.0" encoding="UTF-16"?>'),
        *('<?xml version="1.0" encoding="windows-1252"?>', "x", "<a/>"),
        '<?xml version="1.0" encoding="utf-7"?>',
        '<!DOCTYPE x [<!ENTITY bogus "b"> <!ENTITY e "<key>k</key>">]>',
        '<!DOCTYPE DescribeInstancesResponse [<!ATTLIST item a CDATA "1">]>',
    )
    return chosen.choice(starts).encode() + root


def encode_otherwise(chosen: random.Random, page: bytes) -> bytes:
    decoded = page.decode("utf-8", "replace")
    encoding = chosen.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-8-sig"])
    if chosen.random() < 0.7:
        declared = {"latin-1": "ISO-8859-1", "cp1252": "windows-1252"}.get(encoding, encoding.upper()[:6])
        decoded = decoded.replace('encoding="UTF-8"', f'encoding="{declared}"')
    return decoded.encode(encoding, "xmlcharrefreplace")


def change_an_end_tag(chosen: random.Random, page: bytes) -> bytes:
    ends = [*re.finditer(rb"</(\w+)>", page)]
    if not ends:
        return page
    end = chosen.choice(ends)
    name = end[1]
    others = (
        name[:-1],
        name + b"s",
        name.swapcase(),
        name + b" ",
        b" " + name,
        chosen.choice(NAMES).encode(),
    )
    return page[: end.start(1)] + chosen.choice(others) + page[end.end(1) :]


BYTE_ATTACKS: tuple[ByteAttack, ...] = (
    *(cut, change_bytes, change_bytes, change_bytes, change_tokens, change_tokens, change_tokens, splice),
    *(put_raw_anywhere, put_raw_anywhere, add_at_the_end, change_declaration, change_declaration),
    *(encode_otherwise, change_an_end_tag),
)


# ---- All of it: attacked_page ------------------------------------------------------------------------------


def written(chosen: random.Random, root: Element) -> bytes:
    """Write a page, in one of the ways that mean the same."""
    between = chosen.choice([[b""], [b"\n"], [b"\n    "], [b"", b" ", b"\n\t"]])
    ends_of_empty = chosen.choice([[b"/>"], [b"/>"], [b"/>"], [b""], [b"/>", b"", b" />"]])

    def write(each: Element) -> bytes:
        name = each.name.encode()
        if not each.content:
            return b"<%b%b%b" % (name, each.attributes, chosen.choice(ends_of_empty) or b"></%b>" % name)
        inner = b"".join(
            item if isinstance(item, bytes) else chosen.choice(between) + write(item) for item in each.content
        )
        end = chosen.choice(between) if each.elements() else b""
        return b"<%b%b>%b%b</%b>" % (name, each.attributes, inner, end, name)

    return (
        chosen.choice([b"", b'<?xml version="1.0" encoding="UTF-8"?>\n'])
        + write(root)
        + chosen.choice(between)
    )


@functools.cache
def ec2_model(*, pruned: bool) -> ServiceModel:
    """Return botocore's model of EC2, perhaps with the members alone that we read: others may be nonsense."""
    model = Loader().load_service_model("ec2", "service-2")
    read = {
        "Reservation": ["OwnerId", "Instances"],
        "InstanceState": ["Name"],
        "IamInstanceProfile": ["Arn"],
        "Instance": [
            *("InstanceId", "State", "LaunchTime", "Tags", "InstanceType", "IamInstanceProfile", "SubnetId"),
            *("VpcId", "Operator"),
        ],
    }
    shapes = dict(model["shapes"])
    for name, members in read.items() if pruned else ():
        shapes[name] = shapes[name] | {"members": {each: shapes[name]["members"][each] for each in members}}
    return ServiceModel(model | {"shapes": shapes}, "ec2")


def as_ec2_writes(name: str, shape: Any, value: Any) -> Element:
    """Turn what `aws ec2 describe-instances` printed back into the element it was."""
    if shape.type_name == "structure":
        members = [(shape.members[key], key, each) for key, each in value.items()]
        return element(
            name, *(as_ec2_writes(of.serialization.get("name", key), of, each) for of, key, each in members)
        )
    if shape.type_name == "list":
        return element(name, *(as_ec2_writes("item", shape.member, each) for each in value))
    return text(name, str(value).lower() if isinstance(value, bool) else str(value))


@functools.cache
def saved_reservations() -> list[Element]:
    """Return the reservations of an answer that was saved."""
    saved = json.loads((Path(__file__).parent / "data" / "fleet.json").read_text(encoding="utf-8"))
    shape = ec2_model(pruned=False).shape_for("ReservationList")
    return as_ec2_writes("reservationSet", shape, saved["Reservations"]).elements()


def attacked_page(number: int) -> bytes:
    """Make the page of a number, always the same: most with one attack, some whole, some with several.

    The numbers go through all attacks in turn.
    """
    chosen = random.Random(f"page {number}")
    root = random_page(chosen)
    if chosen.random() < 0.15:
        [reservations] = root.find("reservationSet")
        reservations.content = copy.deepcopy(chosen.sample(saved_reservations(), 2))
    attacks = (*TREE_ATTACKS, *BYTE_ATTACKS, None, None)
    wanted = [attacks[number % len(attacks)], *chosen.choices(attacks, k=chosen.choice([0, 0, 0, 1, 2]))]
    for change_tree in [attack for attack in wanted if attack in TREE_ATTACKS]:
        change_tree(chosen, root)
    page = written(chosen, root)
    for change_page in [attack for attack in wanted if attack in BYTE_ATTACKS]:
        page = change_page(chosen, page)
    return page


# ---- The comparison ----------------------------------------------------------------------------------------

Read = tuple[list[script.Instance], str]
Refused = tuple[type[Exception], str]


@functools.cache
def botocore_parser() -> tuple[Any, Any]:
    """Return botocore's parser of EC2's answers, and the shape of a page."""
    return create_parser("ec2"), ec2_model(pruned=True).shape_for("DescribeInstancesResult")


def of_botocore(page: bytes) -> Read:
    """Read a page as botocore does, and make of it what we make."""
    parser, shape = botocore_parser()
    answer = parser.parse({"status_code": 200, "headers": {}, "body": page}, shape)
    instances: dict[str, script.Instance] = {}
    for reservation in answer.get("Reservations", []):
        assert reservation.get("OwnerId", ACCOUNT_ID) == ACCOUNT_ID
        for item in reservation["Instances"]:
            operator = item.get("Operator", {})
            instance = script.Instance(
                item["InstanceId"],
                item["State"]["Name"],
                item["LaunchTime"].astimezone(UTC),
                {each["Key"]: each["Value"] for each in item.get("Tags", [])},
                item.get("InstanceType", ""),
                item.get("IamInstanceProfile", {}).get("Arn", ""),
                item.get("SubnetId", ""),
                item.get("VpcId", ""),
                (operator.get("Principal") or "unknown") if operator.get("Managed") else "",
            )
            assert len(instance.tags) == len(item.get("Tags", []))
            assert instances.setdefault(instance.instance_id, instance) == instance
    return [*instances.values()], answer.get("NextToken", "")


def result_of(read: Callable[[], Read], *refusals: type[Exception]) -> Read | Refused:
    """Return what a reader gives, or the kind and message of its refusal."""
    try:
        return read()
    except refusals as error:
        return type(error), str(error)


def of_parser(page: bytes) -> Read | Refused:
    """Read a page with the parser alone, as if it were too long to be held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "MAX_PLAIN_BYTES", 0)
        return result_of(lambda: script.parse_instances([page], ACCOUNT_ID), script.TargetError, ExpatError)


def of_patterns(page: bytes) -> Read | Refused:
    """Read a page with the patterns alone."""
    return result_of(lambda: script.read_plain_page(page, ACCOUNT_ID), ValueError)


def of_both(page: bytes) -> Read | Refused:
    """Read a page as a scan does, in pieces."""
    chosen = random.Random(page)
    cuts = sorted(chosen.choices(range(len(page) + 1), k=3))
    pieces = [page[start:end] for start, end in zip([0, *cuts], [*cuts, len(page)], strict=True)]
    return result_of(lambda: script.parse_instances(pieces, ACCOUNT_ID), script.TargetError, ExpatError)


def reader_of(page: bytes, about: str = "") -> str:
    """Check that no two readers differ about a page; returns which of ours reads it."""
    parser, patterns, both = of_parser(page), of_patterns(page), of_both(page)
    shown = f"{about} {page!r}"
    assert both == parser, shown
    if isinstance(patterns[0], list):
        assert patterns == parser, shown
    if not isinstance(parser[0], list):
        return "none"
    try:
        assert of_botocore(page) == parser, shown
    except Exception as error:
        pytest.fail(f"botocore: {error!r} for {shown}")
    return "patterns" if isinstance(patterns[0], list) else "parser"


def small_page() -> Element:
    """Make a page in which each element that is read comes once, and some that are not."""
    instance = element(
        "item",
        text("instanceId", "i-0a"),
        element("instanceState", text("code", "16"), text("name", "running")),
        text("instanceType", "m7g.large"),
        text("launchTime", "2026-02-24T10:30:45.000Z"),
        text("subnetId", "subnet-1"),
        text("vpcId", "vpc-1"),
        element("placement", text("groupName", "g"), element("more", text("name", "n"))),
        element("iamInstanceProfile", text("arn", "arn:aws:iam::1:role/r"), text("id", "AIPA")),
        element("operator", text("managed", "true"), text("principal", "eks")),
        element("tagSet", tag("Owner", "ann")),
    )
    members = [text("ownerId", ACCOUNT_ID), element("groupSet"), element("instancesSet", instance)]
    return element(
        "DescribeInstancesResponse",
        text("requestId", "8f77"),
        element("reservationSet", element("item", *members)),
        text("nextToken", "eyJ2"),
    )


Edit = Callable[[Element, Element], None]


def put(new: Element | bytes, place: int) -> Edit:
    """Give an edit that puts something at the start of an element, or at its end."""
    return lambda _, each: each.content.insert(len(each.content) * place, copy.deepcopy(new))


def renamed(name: str) -> Edit:
    """Give an edit that gives an element another name."""
    return lambda _, each: setattr(each, "name", name)


def marked(attributes: bytes) -> Edit:
    """Give an edit that gives an element attributes."""
    return lambda _, each: setattr(each, "attributes", attributes)


def retold(value: str) -> Edit:
    """Give an edit that puts a text in the place of what an element holds."""
    return lambda _, each: setattr(each, "content", text("", value).content)


def repeat_at_the_end(root: Element, each: Element) -> None:
    parent_of(root, each).content.append(copy.deepcopy(each))


EDITS: dict[str, list[Edit]] = {
    "a piece": [put(new, n % 2) for n, new in enumerate(RAW)],
    "an element": [put(element(name, *inner), 1) for name in NAMES for inner in ((), (text("a", "b"),))],
    "an element of text": [put(text(name, "true"), 0) for name in NAMES],
    "an element in another": [put(element("a", element("b", text(name, "x"))), 1) for name in NAMES],
    "another name": [renamed(name) for name in NAMES],
    "another text": [retold(value) for value in (*VALUES, *OTHER_TEXTS)],
    "an attribute": [marked(attributes) for attributes in ATTRIBUTES],
    "none": [leave_out],
    "twice": [repeat_at_the_end],
}


@pytest.mark.parametrize("edit", EDITS)
def test_readers_agree_with_botocore_on_every_edit_of_a_small_page(
    edit: str, request: pytest.FixtureRequest
) -> None:
    pairs = [*itertools.product(range(len([*small_page().walk()])), EDITS[edit])]
    step = 7 if len(EDITS[edit]) > len(ATTRIBUTES) and not request.config.getoption("soak") else 1
    for number, change in pairs[::step]:
        root = small_page()
        change(root, [*root.walk()][number])
        reader_of(written(random.Random(0), root), edit)


@pytest.mark.parametrize("launch_time", LAUNCH_TIMES)
def test_readers_agree_with_botocore_on_launch_times(launch_time: str) -> None:
    root = small_page()
    retold(launch_time)(root, *root.find("launchTime"))
    reader_of(written(random.Random(0), root))


@pytest.mark.parametrize("numbers", [range(SHORT), pytest.param(range(SHORT, SOAK), marks=pytest.mark.soak)])
def test_readers_agree_with_botocore_on_attacked_pages(numbers: range) -> None:
    readers = Counter(reader_of(attacked_page(number), f"attacked_page({number})") for number in numbers)
    assert min(readers[name] for name in ("patterns", "parser", "none")) > len(numbers) / 10


# ---- Pages as EC2 writes them ------------------------------------------------------------------------------


def benchmark_page(size: int, **form: str) -> bytes:
    """Give a page of the benchmark, whose instances are like EC2's."""
    fleet = benchmark.Fleet(2 * size, 1, 1)
    form |= {"MaxResults": str(size)}
    return benchmark.describe_instances(fleet, benchmark.OWN_ACCOUNT, benchmark.REGIONS[0], form)


def one_instance(*members: str) -> bytes:
    """Write a page of one instance, with more members."""
    state = "<instanceState><code>16</code><name>running</name></instanceState>"
    item = f"<item><instanceId>i-0a</instanceId>{state}"
    item += f"<launchTime>2026-02-24T10:30:45.000Z</launchTime>{''.join(members)}</item>"
    owner = f"<ownerId>{ACCOUNT_ID}</ownerId>"
    return benchmark.PAGE % (1, f"<item>{owner}<instancesSet>{item}</instancesSet></item>".encode(), b"")


def reservation_of_several() -> bytes:
    """Put the instances of a page of the benchmark into one reservation."""
    return re.sub(rb"</instancesSet>.*?<instancesSet>", b"", benchmark_page(9), flags=re.DOTALL)


TAG = "<tagSet><item><key>{}</key><value>{}</value></item></tagSet>"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(benchmark_page(30), id="the benchmark's"),
        pytest.param(benchmark_page(1), id="one instance"),
        pytest.param(benchmark_page(5, NextToken="5"), id="the last page"),
        pytest.param(reservation_of_several(), id="several instances in a reservation"),
        pytest.param(one_instance(), id="no tags"),
        pytest.param(one_instance("<tagSet/>"), id="an empty list of tags"),
        pytest.param(one_instance(TAG.format("a&amp;b", "&lt;&gt;&quot;&apos;&amp;lt;")), id="references"),
        pytest.param(one_instance(TAG.format("경로", "Grüße 🦀")), id="not ASCII"),
        pytest.param(one_instance(TAG.format("Owner", "")), id="an empty value"),
        pytest.param(one_instance(TAG.format("Owner", "a ]] > b")), id="brackets"),
        pytest.param(
            one_instance(
                "<operator><managed>true</managed><principal>eks.amazonaws.com</principal></operator>"
            ),
            id="an operator",
        ),
        pytest.param(
            one_instance("<stateReason><code>x</code><message>y</message></stateReason>"), id="a reason"
        ),
        pytest.param(benchmark_page(3).replace(b">\n", b">").replace(b"  <", b"<"), id="no white space"),
    ],
)
def test_pages_as_ec2_writes_them_are_read_by_patterns(page: bytes) -> None:
    assert reader_of(page) == "patterns"


def test_saved_answer_is_read_by_patterns() -> None:
    items = b"".join(written(random.Random(1), each) for each in saved_reservations())
    items = items.replace(b'<?xml version="1.0" encoding="UTF-8"?>', b"").replace(b" />", b"/>")
    assert reader_of(benchmark.PAGE % (1, items, b"")) == "patterns"


# ---- Pages that are made to take long, or much memory ------------------------------------------------------

MEGABYTE = 1_000_000
OPENED = f"<DescribeInstancesResponse><reservationSet><item><ownerId>{ACCOUNT_ID}</ownerId><instancesSet>"
CLOSED = "</instancesSet></item></reservationSet></DescribeInstancesResponse>"
INSTANCE = one_instance().decode().partition("<instancesSet>")[2].partition("</item>")[0]


def many(piece: str) -> str:
    """Repeat a piece until it is a megabyte."""
    return piece * (MEGABYTE // len(piece))


def tower(height: int) -> str:
    """Nest elements."""
    return "<a>" * height + "</a>" * height


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param("<item>" + many("<a>"), id="nested and unclosed"),
        pytest.param(many(f"{INSTANCE}{'<a>' * 7}"), id="nested and unclosed in each instance"),
        pytest.param(many("<item>"), id="items unclosed"),
        pytest.param(many("<item></item>"), id="items that are empty"),
        pytest.param(many(f"{INSTANCE}</item>"), id="the same instance"),
        pytest.param(many(f"{INSTANCE}{TAG.format('k', 'v')}</item>"), id="the same instance with a tag"),
        pytest.param(many("<a"), id="tags unclosed"),
        pytest.param("<item><" + many("a"), id="a long name"),
        pytest.param(f"{INSTANCE}{many('<a/>')}</item>", id="elements"),
        pytest.param(f"{INSTANCE}{many('<a/>')}<launchTime/></item>", id="elements, and one twice"),
        pytest.param(f"{INSTANCE}<b>{many('<a/>')}</b></item>", id="elements in another"),
        pytest.param(f"{INSTANCE}<b>{many('<a></a>')}", id="elements in one unclosed"),
        pytest.param(
            f"{INSTANCE}<b>{many('<item></item>')}<key/></b></item>", id="items, and a key out of place"
        ),
        pytest.param(f"{INSTANCE}<b>{many(tower(5))}</b></item>", id="towers"),
        pytest.param(f"{INSTANCE}<b>{many(tower(6))}</item>", id="towers, and one unclosed"),
        pytest.param(f"{INSTANCE}<b>{many(tower(9))}</b></item>", id="high towers"),
        pytest.param(f"<item>{many('<launchTime></launchTime>')}</item>", id="a member many times"),
        pytest.param(
            f"<item>{many('<vpcId>v</vpcId><subnetId>s</subnetId>')}</item>", id="two members many times"
        ),
        pytest.param(f"<item><operator>{many('<a/>')}</operator><operator>", id="elements in a part"),
        pytest.param(f"{INSTANCE}<tagSet>{many(TAG[8:-9])}</tagSet></item>", id="tags"),
        pytest.param(
            f"{INSTANCE}<tagSet>{many(TAG[8:-9])}<item/></tagSet></item>", id="tags, and an empty one"
        ),
        pytest.param(f"{INSTANCE}{TAG.format('k', many('&amp;'))}</item>", id="references"),
        pytest.param(many("&amp;") + "&", id="references, and a wrong one"),
        pytest.param(many("&"), id="ampersands"),
        pytest.param(many("]]"), id="brackets"),
        pytest.param(f"{INSTANCE}<b>{many('y')}</b></item>", id="a long text"),
        pytest.param(f"{INSTANCE}<b>{many('é')}", id="a long text unclosed"),
        pytest.param(f"{INSTANCE}{many(' ')}", id="blanks"),
        pytest.param(f"{INSTANCE}<tagSet>{many(' ')}", id="blanks in the tags"),
        pytest.param(INSTANCE.replace("i-0a", f"i-{many('0')}g") + "</item>", id="a long id"),
        pytest.param(INSTANCE.replace(".000Z", f".{many('0')}") + "</item>", id="a long time"),
    ],
)
def test_patterns_take_about_as_long_as_the_parser_and_little_memory(inner: str) -> None:
    page = f"{OPENED}{inner}{CLOSED}".encode()
    usual = f"{OPENED}{many(INSTANCE + '</item>')}{CLOSED}".encode()

    def seconds(read: Callable[[bytes], object], page: bytes) -> float:
        started = time.process_time()
        read(page)
        return time.process_time() - started

    with time_limit(60, functools.partial(pytest.fail, "the patterns take more than a minute")):
        taken = min(seconds(of_patterns, page) for _ in range(2))
    assert taken < 20 * seconds(of_parser, usual)
    tracemalloc.start()
    of_patterns(page)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * MEGABYTE


def test_answer_of_few_huge_elements_is_held_once() -> None:
    page = f"{OPENED}{INSTANCE}<b>{many('y') * 20}</b></item>{CLOSED}".encode()
    tracemalloc.start()
    instances, _ = script.parse_instances(
        iter(page[n : n + 65536] for n in range(0, len(page), 65536)), ACCOUNT_ID
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(instances) == 1
    assert peak < 2 * len(page)
