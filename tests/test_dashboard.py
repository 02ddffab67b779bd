"""Dashboard: the page as a parser and as a browser see it, whatever is in a tag and however much there is."""

import base64
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tagcheck

NOW = datetime(2026, 2, 24, 11, 0, tzinfo=UTC)
REGIONS = sorted(tagcheck.AWS_REGIONS)[:17]
UNREAD = "UnauthorizedOperation: the credentials may not call ec2:DescribeInstances"
HOSTILE = (
    "</title><script>window.ran = 1</script><img src=http://left.invalid/x onerror=window.ran=1>",
    '=HYPERLINK("http://left.invalid/")',
    "\u202egnp.exe\x1b[2J\x00\u2028",
    "\U0001f600" * 256,
    "]]>'\"&amp;</style></svg></td>" + "W" * 220,
)


def standing(account=1, region=REGIONS[0], findings=2, instances=10, **more):
    target = tagcheck.Target(f"{account:012d}", region)
    fields = {
        "error": None,
        "last_read": "2026-02-24T10:30:45Z",
        "compliant": instances - findings,
        "exempted": 0,
    }
    return tagcheck.Standing(target, **fields | more, instances=instances, findings=findings)


def standings(accounts, regions):
    """Give the targets of so many accounts and regions; the accounts with the highest ids are worst."""
    return [
        standing(account, region, findings=account % 40 * (region != REGIONS[3]), instances=50)
        for account in range(1, accounts + 1)
        for region in REGIONS[:regions]
    ]


def points(*numbers, days=1.0, unread=()):
    """Give the trend of these open findings, so many days apart; the latest scan is half an hour old."""
    latest = NOW - timedelta(minutes=30)
    return [
        tagcheck.TrendPoint(
            tagcheck.utc_text(latest - timedelta(days=days * (len(numbers) - 1 - index))),
            number,
            new=number if not index else index % 7,
            reopened=index % 3,
            resolved=index % 5,
            targets=4,
            targets_unread=2 if index in unread else 0,
        )
        for index, number in enumerate(numbers)
    ]


def finding(text="web-1", **more):
    violation = tagcheck.Violation(text, tagcheck.ViolationType.NONCOMPLIANT_VALUE, text, None, text)
    near = tagcheck.Violation("CostCenter", tagcheck.ViolationType.MISSING, None, text, text)
    fields = {
        "account_id": "000000000001", "region": REGIONS[0], "instance_id": "i-0123456789abcdef0",
        "state": "running",
        "launch_time": "2025-01-01T00:00:00Z", "tags": {"Name": text}, "violations": (violation, near),
        "status": tagcheck.Status.REPEAT, "first_seen": "2025-08-08T10:00:00Z",
        "last_seen": "2026-02-24T10:30:45Z",
        "times_seen": 9, "times_reopened": 0, "resolved_at": None, "resolution": None, "created_by": text,
        "suggestions": (tagcheck.Suggestion("Owner", text, 0.9, text),),
        "instance_type": "m5.large", "cause": None,
        "monthly_cost": 70.08, "managed_by": None,
    }  # fmt: skip
    return tagcheck.Finding(**fields | more)


def cause(group, instances, tag_key="Owner"):
    """Give a group whose instances lack a tag."""
    target = tagcheck.Target("000000000001", REGIONS[0])
    return tagcheck.Cause(target, group, {tag_key: instances}, instances)


def owner(name, total=7, days=31, **more):
    """Give what an owner has open, with a name wherever a stranger can put one."""
    group = tagcheck.Group("autoscaling_group", name)
    fields = {
        "trend": [
            tagcheck.TrendPoint(f"{NOW.date() - timedelta(ago)}T00:00:00Z", total + ago, 0, 0, 0, 0, 0)
            for ago in reversed(range(days))
        ],
        "causes": [cause(group, 5, name)] * 3,
        "oldest": [tagcheck.Alike(finding(name, cause=group), 2)] * 5,
    }
    return tagcheck.OwnerFindings(name, total, 2, 12.0, **fields | more)


def open_findings(total, text="Owner", **more):
    """Give open findings in which a text stands wherever a stranger can put one."""
    group = tagcheck.Group("autoscaling_group", text)
    fields = {
        "by_tag": [(text, total), ("Project", 1)],
        "by_age": [("up to 1 day", 0), ("2 to 7 days", total)],
        "by_creator": [(text, total), ("carol", 1)],
        "by_owner": [(text, total)],
        "causes": [cause(group, 40, text), cause(group, 5, text)],
        "oldest": [tagcheck.Alike(finding(text), 1)],
        "priced": 1,
        "cost_by_tag": [(text, 1234.5), ("Owner", 99.0)],
        "by_operator": [(text, 4)],
        "oldest_unread": [tagcheck.Alike(finding(text, cause=group), 3)],
        "owners": [owner(text, total), owner("", 1), tagcheck.OwnerFindings(f"of {text}", 0, 3, None)],
        "owners_total": 3,
    }
    empty = dict.fromkeys(fields, ()) | {"priced": 0, "owners_total": 0}
    return tagcheck.OpenFindings(total, **(fields if total else empty) | more)


def dashboard(of=None, trend=None, found=None, text="org-tagging", endings=()):
    of = standings(3, 2) if of is None else of
    found = found or open_findings(sum(target.findings for target in of))
    policy = tagcheck.Policy(file="policy.yaml", digest="", version="1", name=text, regions={})
    return tagcheck.Dashboard(policy, NOW, trend or points(9, 8, found.total), of, found, endings)


def hostile_dashboard(text):
    """Give a dashboard with a text wherever strangers, AWS and the policy's author can write."""
    of = [standing(error=f"{text}: {text}"), standing(2, REGIONS[1], error=f"Code: {text}", last_read=None)]
    of.append(
        replace(of[0], target=tagcheck.Target(text[:40], text[:40]), error=None, findings=9, compliant=1)
    )
    ending = tagcheck.Problem("policy.yaml", 1, 1, f"exemptions[0] ({text})", f"ends {text}", "warning")
    policy = replace(dashboard().policy, name=text, file=text)
    return replace(dashboard(of, found=open_findings(2, text), endings=[ending]), policy=policy)


def large(unread=()):
    of = standings(500, 17)
    of = [replace(t, error=UNREAD) if index in unread else t for index, t in enumerate(of)]
    return dashboard(of, points(*range(9000, 5000, -10), unread=range(0, 400, 9)))


PAGES = {
    "one": lambda: dashboard([standing()], points(2)),
    "three": lambda: dashboard([standing(), standing(error=UNREAD)], points(2, 9, 4, unread=[2])),
    "clean": lambda: dashboard([standing(findings=0, instances=1234)]),
    "large": lambda: large(unread=range(0, 8500, 50)),
    "unread": lambda: dashboard(
        [standing(a, error=UNREAD, last_read=None, findings=0, instances=0) for a in range(9)]
    ),
} | {f"hostile-{n}": functools.partial(hostile_dashboard, text) for n, text in enumerate(HOSTILE)}


class Page(HTMLParser):
    """A page as a parser has it: elements with attributes, and the text of each; raises what is wrong."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, of):
        super().__init__(convert_charrefs=True)
        file = io.StringIO()
        tagcheck.write_html(file, of)
        self.source = file.getvalue()
        self.elements, self.open = [], []
        self.feed(self.source)
        self.close()
        assert not self.open
        self.text = " ".join(
            "".join(element["text"]) for element in self.elements if element["tag"] == "body"
        )
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes))
        element = {"tag": tag, "text": [], "parent": self.open[-1] if self.open else None, **dict(attributes)}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag
        if tag not in ("b", "code", "a", "span"):
            self.handle_data(" ")

    def handle_data(self, data):
        for element in self.open:
            element["text"].append(data)

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            element
            for element in self.elements
            if element["tag"] == tag and all(element.get(name) == value for name, value in wanted.items())
        ]

    def texts(self, tag, **attributes):
        return [re.sub(r"\s+", " ", "".join(e["text"])).strip() for e in self.all(tag, **attributes)]

    def card(self, number):
        return next(t for t in itertools.islice(self.texts("article"), number, None))


@pytest.mark.parametrize("name", PAGES)
def test_the_page_needs_nothing_and_runs_nothing(name):
    page = Page(PAGES[name]())
    assert page.source.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert len(page.source.encode()) < 1_000_000
    tags = Counter(element["tag"] for element in page.elements)
    assert not tags.keys() & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "use",
        "image",
        "base",
    }
    assert (tags["html"], tags["head"], tags["body"], tags["style"], tags["h1"]) == (1, 1, 1, 1, 1)
    for element in page.elements:
        names = {name for name in element if name.startswith("on")} | element.keys() & {
            "style",
            "src",
            "xlink:href",
        }
        assert not names
        console = element.get("rel") == "noreferrer" and "https://console.aws.amazon.com/ec2/home?region="
        assert element.get("href", "#").startswith(("#", console or "#"))
    rules = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"].split("; ")
    digest = base64.b64encode(
        hashlib.sha256("".join(page.all("style")[0]["text"]).encode()).digest()
    ).decode()
    assert rules == [
        "default-src 'none'",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert page.all("meta", name="referrer", content="no-referrer")
    assert page.all("meta", name="color-scheme", content="light dark")
    assert page.all("meta", name="viewport")
    assert "@media print" in page.source
    assert "url(" not in page.source.replace("url(http", "") and "@import" not in page.source


@pytest.mark.parametrize("name", PAGES)
def test_each_picture_says_what_it_shows(name):
    page = Page(PAGES[name]())
    named = {element["id"]: "".join(element["text"]) for element in page.elements if "id" in element}
    assert len(named) == sum("id" in element for element in page.elements)
    pictures = page.all("svg", role="img")
    assert len(pictures) >= (0 if name == "unread" else 1)
    for picture in pictures:
        words = [named[word] for word in picture["aria-labelledby"].split()]
        assert words and all(words)
    nested = [svg for svg in page.all("svg") if svg.get("role") != "img"]
    assert all(svg["parent"]["tag"] == "svg" for svg in nested)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_strangers_wrote_stays_text_in_every_place(text):
    page = Page(hostile_dashboard(text))
    shown = tagcheck.printable(text)
    start = tagcheck.cut_text(shown, 30).rstrip("…")
    assert page.texts("title")[0].startswith(start)
    assert page.texts("h1")[0].startswith(start)
    assert start.partition(":")[0] in page.texts("p", class_="banner")[0]
    assert start in page.card(1)
    assert start in page.card(2)
    assert any(cell.get("title", "").startswith(start) for cell in page.all("td"))
    heads = page.texts("th", scope="row")  # account, tag, creator, service, spend
    assert sum(name.startswith(start) for name in heads) == 5
    anchors = {tagcheck.owner_anchor(name): name for name in (text, "", f"of {text}")}
    assert {element["id"] for element in page.elements if element.get("id") in anchors} == {*anchors}
    assert page.texts("h3") == [re.sub(r"\s+", " ", tagcheck.cut_text(shown, 60)).strip(), "No known owner"]
    assert any(item.startswith(f"of {start[:20]}") for item in page.texts("li"))
    commands = [
        shlex.split("".join(code["text"])) for code in page.all("code") if "remediate" in code["text"][0]
    ]
    written = [["--owner", ""]] if text != shown else [[f"--owner={text}"], ["--owner", ""]]
    assert commands == [["tagcheck.py", "remediate", *words] for words in written]
    cells = list(zip((cell.get("data-label") for cell in page.all("td")), page.texts("td"), strict=True))
    for label in ("Name", "Lacks", "Probably", "Created by", "What to do", "When", "Exemption", "Why"):
        assert start in "".join(text for name, text in cells if name == label), label
    assert start in page.texts("footer")[0]
    assert not re.search("[\x00-\x09\x0b-\x1f\u2028\u202e]", page.source)
    assert len(page.source) < 60_000


def test_a_long_text_is_cut():
    page = Page(hostile_dashboard("x" * 256))
    words = (word for word in page.text.split() if "x" * 9 in word and not word.startswith("--owner="))
    assert max(map(len, words)) <= 240
    assert max(map(len, page.texts("th", scope="row"))) == 60


@pytest.mark.parametrize(
    ("trend", "answer"),
    [
        pytest.param(points(8), "8 open findings Not known yet: a trend needs a second scan.", id="one scan"),
        pytest.param(
            points(12, 8),
            "Getting better 8 open findings, 4 fewer (33%) than at the first scan, on 2026-02-23 (12)",
            id="two",
        ),
        pytest.param(
            points(12, 8, days=0.1),
            "8 open findings, 4 fewer (33%) than at the first scan, on 2026-02-24 08:06 (12)",
            id="the same day",
        ),
        pytest.param(
            points(*[5] * 20, *[4] * 40, 8),
            "Getting worse 8 open findings, 4 more (100%) than 30 days ago, on 2026-01-25 (4)",
            id="a month",
        ),
        pytest.param(
            points(2, 8, days=200),
            "Getting worse 8 open findings, 6 more (300%) than 200 days ago, on 2025-08-08 (2)",
            id="a gap",
        ),
        pytest.param(
            points(8, 3, 8),
            "Unchanged 8 open findings, as many as at the first scan, on 2026-02-22 (8)",
            id="unchanged",
        ),
        pytest.param(
            points(0, 8),
            "Getting worse 8 open findings, 8 more than at the first scan, on 2026-02-23 (0)",
            id="from none",
        ),
        pytest.param(
            points(9, 8, unread=[0]), "As far as is known: 2 targets not read then.", id="unread then"
        ),
    ],
)
def test_it_says_whether_it_gets_better(trend, answer):
    card = Page(dashboard([standing(findings=8)], trend)).card(0)
    assert answer in card
    assert card.startswith("Is it getting better?")


def test_it_says_where_it_is_worst():
    of = [
        standing(1, REGIONS[0], 30, 100),
        standing(2, REGIONS[1], 20, 1000),
        standing(2, REGIONS[2], 20, 1000),
        standing(3, REGIONS[1], 15, 15),
    ]
    page = Page(dashboard(of))
    card = page.card(1)
    assert card.startswith("Where is it worst? 000000000002 40 open, 98% compliant")
    assert f"35 open in {REGIONS[1]}, 96% compliant" in card
    assert f"Lowest share: 000000000003 {REGIONS[1]}, 0% of 15 instances compliant" in card
    assert "not read" not in card
    heat = [element["title"] for element in page.all("td") if "title" in element]
    assert heat[0].startswith("000000000002, all regions") and heat[1].startswith(
        f"000000000002, {REGIONS[1]}"
    )
    unread = replace(of[3], error=UNREAD)
    card = Page(dashboard([*of[:3], unread])).card(1)
    assert f"{unread.target}:" not in card
    assert "1 target not read: it may be worse there." in card
    card = Page(dashboard([replace(of[0], error=UNREAD)])).card(1)
    assert card.startswith("Where is it worst? 000000000001 30 open, 70% compliant 1 target not read")
    of = [standing(2, REGIONS[1], 90, 100), standing(2, REGIONS[2], 5, 100, error=UNREAD)]
    card = Page(dashboard(of)).card(1)
    assert f"000000000002 {REGIONS[1]}: 90 of 100 instances lack tags" in card


def test_where_nothing_stands_out_it_says_that_it_is_spread():
    """Eight accounts with 12 or 13 findings each: none has a twentieth of all more than the next."""
    of = [standing(account, REGIONS[account % 2], 12 + (account == 5), 50) for account in range(8)]
    page = Page(dashboard(of, found=open_findings(97, by_owner=[("a", 3), ("b", 2)], by_creator=())))
    assert page.card(1).startswith(
        "Where is it worst? Spread out No account above 14%; no region above 51% of the findings."
    )
    assert page.card(2).startswith("Who to ask? Spread out Owners: no owner above 4%: a (3), b (2)")
    heat = [element["title"] for element in page.all("td") if "title" in element]
    assert heat[0].startswith("000000000005, all regions: 13 of 50")
    leading = [replace(each, findings=18) if each.target.account_id.endswith("5") else each for each in of]
    assert Page(dashboard(leading)).card(1).startswith("Where is it worst? 000000000005 18 open")


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        ({"by_owner": []}, "Who to ask? ann created 1,200 of 2,000 instances with findings Then: bob (7)"),
        ({"by_creator": []}, "Who to ask? Spread out Owners: no owner above 1%: ann (9)"),
        (
            {"by_owner": [("eve", 400)]},
            "Who to ask? eve owns, or probably owns, 400 of 2,000 instances with findings "
            "Creators: ann (1,200), bob (7)",
        ),
        (
            {"by_creator": [], "by_owner": []},
            "Who to ask? Not known What each owner has open Most at once: 1 Auto Scaling group: 40 instances",
        ),
        (
            {"by_creator": [], "by_owner": [], "causes": []},
            "open Who created the instances is not known: scan --creators looks it up.",
        ),
    ],
)
def test_it_says_whom_to_ask(more, answer):
    people = {"by_creator": [("ann", 1200), ("bob", 7)], "by_owner": [("ann", 9)]}
    card = Page(dashboard(found=open_findings(2000, **people | more))).card(2)
    assert answer in card
    assert ("scan --creators" in card) == (more.get("by_creator") == [])


def test_where_all_is_well_it_says_so():
    page = Page(dashboard([standing(1, findings=0, instances=1000), standing(2, findings=0, instances=234)]))
    assert "Nowhere Every one of 1,234 instances carries its tags." in page.card(1)
    assert page.card(2) == "Who to ask? Nobody Nothing is open."
    assert not page.all("p", class_="banner")
    page = Page(dashboard([standing(findings=0, instances=9, compliant=6, exempted=2)]))
    assert "6 of 9 instances carry their tags; 2 exempted and 1 too young to judge." in page.card(1)


def test_what_was_not_read_is_never_called_clean():
    of = [
        standing(1, REGIONS[0], 0, error=UNREAD),
        standing(1, REGIONS[1], 0),
        standing(2, REGIONS[0], 0, 0, error="Throttling: later", last_read=None),
    ]
    page = Page(dashboard(of))
    assert (
        "Incomplete: 2 of 3 targets were not read (1 UnauthorizedOperation, 1 Throttling)"
        in page.texts("header")[0]
    )
    assert (
        "Not known Nothing is open in what was read. 2 targets not read: it may be worse there."
        in page.card(1)
    )
    assert "Nobody yet" in page.card(2)
    assert "Every one" not in page.text
    cells = {
        cell["title"]: (cell.get("class"), text)
        for cell, text in zip(page.all("td"), page.texts("td"), strict=True)
        if "title" in cell
    }
    assert cells[f"000000000001, {REGIONS[0]}"] == ("unread", "not read")
    assert cells[f"000000000001, {REGIONS[1]}: 0 of 10 instances lack tags"] == ("h0", "100%")
    assert cells["000000000001, all regions: 0 of 10 instances lack tags"] == ("unread", "100% 1 not read")
    assert cells[f"000000000002, {REGIONS[1]}"] == (None, "")
    rows = [
        re.sub(r"\s+", " ", "".join(row["text"])).strip()
        for row in page.all("tr")
        if "2DescribeInst" not in row
    ]
    assert f"000000000001 {REGIONS[0]} 2026-02-24 10:30 0 {UNREAD}" in rows
    assert f"000000000002 {REGIONS[0]} never not known Throttling: later" in rows


def test_a_share_is_never_rounded_up():
    page = Page(
        dashboard([standing(1, findings=1, instances=100_000), standing(2, findings=999, instances=1000)])
    )
    cells = [text for cell, text in zip(page.all("td"), page.texts("td"), strict=True) if "title" in cell]
    assert cells == ["<1%", "<1%", "99%", "99%", "99%", "99%"]
    assert {cell["class"] for cell in page.all("td") if "title" in cell} == {"h1", "h5"}


def test_of_many_accounts_the_worst_are_shown_and_the_rest_is_counted():
    page = Page(large(unread=range(0, 8500, 50)))
    heat = page.all("table", class_="heat")[0]
    rows = [
        row for row in page.all("tr") if row["parent"]["parent"] is heat and row["parent"]["tag"] == "tbody"
    ]
    names = [re.sub(r"\s+", " ", "".join(row["text"])).split(" ")[0] for row in rows]
    assert len(rows) == 32
    assert all(int(name) % 40 >= 37 for name in names[:30])
    assert "all the others (470)" in page.texts("th") and "all accounts" in page.texts("th")
    assert "Of 500 accounts these are the 30 worst." in page.text
    assert "Incomplete: 170 of 8,500 targets were not read" in page.text
    unread = [row for row in page.all("tr") if UNREAD in "".join(row["text"])]
    assert len(unread) == 50
    assert "… and 120 more" in page.texts("p")
    assert "425,000 instances in 500 accounts and 17 regions" in page.text


def within(element, ancestor):
    return element is not None and (element is ancestor or within(element["parent"], ancestor))


@pytest.mark.parametrize("scans", [2, 3, 400, 5000])
def test_a_chart_has_as_much_as_can_be_seen(scans):
    page = Page(dashboard(trend=points(*range(scans, 0, -1), days=0.25, unread=range(0, scans, 10))))
    chart, changes = page.all("svg", class_="chart")
    inside = [e for e in page.elements if e["tag"] in ("circle", "rect", "path")]
    hollow = [e for e in inside if e.get("class") == "hollow" and within(e, chart)]
    assert len(hollow) == -(-scans // 10) if scans <= 400 else 0 < len(hollow) <= 400
    assert 1 <= len({e["x"] for e in inside if e["tag"] == "rect" and within(e, changes)}) <= 60
    new = re.findall(r"([0-9,]+) NEW", "".join(changes["text"]))
    assert sum(int(number.replace(",", "")) for number in new) == scans + sum(i % 7 for i in range(scans))
    line = [e["d"] for e in inside if e["tag"] == "path" and within(e, chart)][1]
    assert line.count("L") == min(scans, 385 if scans == 5000 else 400) - 1
    assert f"in {tagcheck.counted(scans, 'scan')}" in page.text
    assert ("each bar is a scan" in page.text) == (scans < 60)
    assert len(page.source) < 200_000


def test_the_line_and_the_bars_have_their_heights():
    changes = zip(points(1, 100, 50), (1, 80, 0), (0, 19, 0), (0, 0, 50), strict=True)
    trend = [replace(point, new=n, reopened=r, resolved=d) for point, n, r, d in changes]
    page = Page(dashboard(trend=trend))
    path = [e["d"] for e in page.all("path")][-1]
    assert path == "M9.00,198.0L53.75,0.0L98.50,100.0"
    assert [(e["y"], "".join(e["text"])) for e in page.all("text")][:3] == [
        ("214.0", "0"),
        ("114.0", "50"),
        ("14.0", "100"),
    ]
    boxes = [(e["class"], float(e["y"]), float(e["height"])) for e in page.all("rect") if e["class"] != "bar"]
    assert boxes == [("new", 120.7, 1.0), ("new", 41.1, 80.5), ("again", 22.0, 19.1), ("done", 121.7, 50.3)]


def test_a_bar_is_as_long_as_its_number():
    page = Page(dashboard(found=open_findings(9, by_tag=[("Owner", 8), ("Project", 2), ("Team", 0)])))
    assert [bar["width"] for bar in page.all("rect", class_="bar")][:3] == ["100.0%", "25.0%", "100.0%"]
    assert "Team" not in page.texts("th")


def test_the_first_scan_does_not_flatten_the_others():
    trend = [
        replace(p, new=n, reopened=0, resolved=3)
        for p, n in zip(points(5000, 9, 9), (5000, 9, 6), strict=True)
    ]
    page = Page(dashboard(trend=trend))
    assert [float(e["height"]) for e in page.all("rect", class_="new")] == [112.5, 112.5, 75.0]
    assert "↑ 5,000 at first" in page.texts("text")
    down = [
        replace(p, new=n, reopened=0, resolved=r)
        for p, n, r in zip(points(202, 5), (202, 1), (0, 9), strict=True)
    ]
    page = Page(dashboard(trend=down))
    assert [float(e["height"]) for e in page.all("rect", class_="new")] == [75.0, 8.3]


def test_columns_and_sections_of_which_nothing_is_known_are_left_out():
    bare = finding(created_by=None, suggestions=(), monthly_cost=None)
    empty = {
        "by_creator": (),
        "by_owner": (),
        "causes": (),
        "cost_by_tag": (),
        "priced": 0,
        "by_operator": (),
        "owners": (),
        "oldest_unread": (),
    }
    page = Page(dashboard(found=open_findings(9, oldest=[tagcheck.Alike(bare, 1)], **empty)))
    assert {"Created by", "Probably", "A month"} & set(page.texts("th")) == set()
    titles = page.texts("h2")
    assert titles[3:] == [
        "Open findings over time",
        "Compliance by account and region",
        "Missing or invalid tags",
        "Age of open findings",
        "Open for longest",
    ]
    full = Page(
        dashboard(
            endings=[tagcheck.Problem("p", 1, 1, "exemptions[0] (it)", "ends on 2026-03-01", "warning")]
        )
    )
    assert {
        "Created by",
        "Owners",
        "Spend that lacks its tag",
        "Causes",
        "Exemptions that end",
    } < set(full.texts("h2"))
    rows = [row for row in full.texts("tr") if row.startswith("i-0123")]
    assert "2025-08-08, 200 days" in rows[0] and any(row.endswith("70") for row in rows)


def test_spend_begins_with_who_pays():
    page = Page(dashboard(found=open_findings(9, "Zebra")))
    assert page.text.index("Owner: 99") < page.text.index("Zebra: 1,234")
    assert "8 findings without a price left out" in page.text


def test_each_cause_shows_which_share_of_the_findings_it_closes():
    page = Page(dashboard(found=open_findings(90, owners=[owner("ann", 20)])))
    cells = [cell["text"] for cell in page.all("td", **{"data-label": "Closes"})]
    assert cells == [["40 (44%)"], ["5 (5%)"]]
    [line, *_] = [item for item in page.texts("li") if "lack" in item]
    assert line.startswith("25% of these: 1 Auto Scaling group: 5 instances lack ann; ")


def test_a_cause_of_many_tags_says_where_to_set_them():
    tags = {f"company:tag-{number:02}": 9 for number in range(15)}
    causes = [replace(cause(tagcheck.Group("autoscaling_group", "cart"), 9), tags=tags)]
    page = Page(dashboard(found=open_findings(9, causes=causes, owners=[owner("ann", 9, causes=causes)])))
    where = " and 10 more; set them on cart for new instances (PropagateAtLaunch)"
    [cell] = [text for text in page.texts("td") if "instances lack" in text]
    [item] = [text for text in page.texts("li") if "instances lack" in text]
    assert cell.endswith(where)
    assert item.endswith(f"{where}, in 000000000001 {REGIONS[0]}")


def headline(*args, **more):
    return Page(dashboard(*args, **more)).texts("p", class_="headline")[0]


def test_the_headline_is_one_sentence_to_forward():
    of, groups = [standing(findings=217, instances=400)], tagcheck.Group("autoscaling_group", "web")
    month = points(*[368] * 31, 217)
    causes = [cause(groups, number) for number in (40, 20, 15, 6, 4, 3)]
    found = functools.partial(open_findings, 217)
    assert headline(of, month, found(causes=causes)) == (
        "217 open findings, 41% fewer than 30 days ago; fixing 5 Auto Scaling groups would tag 85 instances"
    )
    causes = [cause(groups, 40), cause(tagcheck.Group("stack", "shop"), 2)]
    assert headline(of, points(217), found(causes=causes)) == (
        "217 open findings; fixing 2 groups would tag 42 instances"
    )
    less = replace(points(1, 217)[0], open=218)
    assert headline(of, [less, *points(217)], found(causes=())).startswith(
        "217 open findings, less than 1% fewer"
    )
    assert (
        headline(of, points(0, 217), found(causes=())) == "217 open findings, 217 more than at the first scan"
    )
    assert headline([standing(findings=0)], points(0, 0)) == "No open findings, as many as at the first scan"


def test_numbers_say_why_they_differ_from_the_terminal():
    of = [standing(1, findings=187, instances=200), standing(2, findings=30, instances=40, error=UNREAD)]
    facts = "187 + 30 as last read, in 1 target that the latest scan did not read"
    latest = points(1)[0].at
    of[0] = replace(of[0], last_read=latest)
    assert facts in Page(dashboard(of)).texts("header")[0]
    of[1] = replace(of[1], error=None)  # a scan of --account 1 leaves it out, too
    assert facts in Page(dashboard(of)).texts("header")[0]
    of[1] = replace(of[1], last_read=latest)
    assert "as last read" not in Page(dashboard(of)).texts("header")[0]


def test_the_share_of_spend_that_is_allocated_stands_beside_the_count():
    found = open_findings(9, cost_by_tag=[("CostCenter", 900.0), ("Owner", 250.0)])
    of = replace(dashboard(found=found), spend=[("EUR", 1000.0)])
    page = Page(replace(of, policy=replace(of.policy, regions={"*": (tagcheck.RequiredTag("Owner"),)})))
    fact = "75% of 1,000 EUR a month is allocated (has Owner), 250 EUR is not"
    assert fact in page.texts("header")[0]
    assert "12 EUR a month" in page.text
    page = Page(replace(of, spend=[("", 5.0), ("EUR", 1000.0)]))
    assert "the prices are in several currencies: unnamed, EUR" in page.texts("header")[0]
    assert "allocated" not in page.text


@pytest.mark.parametrize(
    ("region", "host"),
    [
        ("us-east-1", "console.aws.amazon.com"),
        ("ap-southeast-7", "console.aws.amazon.com"),
        ("cn-northwest-1", "console.amazonaws.cn"),
        ("us-gov-west-1", "console.amazonaws-us-gov.com"),
        *((region, None) for region in ("us-iso-east-1", "eu-isoe-west-1", "eusc-de-east-1", "us-east-1/x")),
    ],
)
def test_an_instance_links_to_the_console_of_its_partition(region, host):
    page = Page(dashboard(found=open_findings(1, oldest=[tagcheck.Alike(finding(region=region), 1)])))
    cell = next(cell for cell in page.all("td", **{"data-label": "Region"}) if cell["text"] == [region])
    links = [a for a in page.all("a", rel="noreferrer") if a["parent"]["parent"] is cell["parent"]]
    url = f"https://{host}/ec2/home?region={region}#InstanceDetails:instanceId=i-0123456789abcdef0"
    assert [a["href"] for a in links] == [url][: host is not None]


def test_an_id_that_is_none_is_not_linked():
    bad = finding(instance_id="i-1?x=<y>&javascript:1")
    page = Page(
        dashboard(found=open_findings(1, owners=(), oldest_unread=(), oldest=[tagcheck.Alike(bad, 1)]))
    )
    assert not page.all("a", rel="noreferrer")


@pytest.mark.parametrize(
    ("days", "labels"),
    [
        (1 / 1440, ["11:00", "10:30"]),
        (0.2 / 1440, ["10:29:48", "10:30:00", "10:29:51", "10:29:54", "10:29:57"]),
        (0.25, ["04:30", "10:30", "06:00", "07:30", "09:00"]),
        (1.0, ["02-23 10:30", "02-24 10:30", "02-23 16:30", "02-23 22:30", "02-24 04:30"]),
        (40.0, ["2026-01-15", "2026-02-24", "2026-01-25", "2026-02-04", "2026-02-14"]),
    ],
)
def test_a_time_axis_never_repeats_a_label(days, labels):
    page = Page(dashboard(trend=points(9, 8, days=days)))
    line, changes = page.all("svg", class_="chart")
    shown = [
        [
            "".join(text["text"])
            for text in page.all("text")
            if within(text, chart) and len("".join(text["text"])) > 4
        ]
        for chart in (line, changes)
    ]
    if days == 1 / 1440:
        labels = ["10:29", "10:30"]
    assert shown[0] == labels
    assert shown[1][:2] == labels[:2]


def test_what_is_empty_is_not_drawn():
    one = Page(dashboard([standing()], points(2)))
    assert "Open findings over time" not in one.text and not one.all("svg", class_="chart")
    clean = [replace(point, new=0, resolved=0) for point in points(0, 0)]
    clean = Page(dashboard([standing(findings=0)], clean))
    assert "Open findings over time" not in clean.text and "Owners" not in clean.text
    assert "up to 1 day" not in Page(dashboard()).text  # a bar of 0
    heat = Page(dashboard([standing(findings=3)])).texts("section")
    assert not any("not read" in text for text in heat if text.startswith("Compliance"))


def test_findings_that_are_alike_are_one_row_and_those_not_read_are_separate():
    group = tagcheck.Group("autoscaling_group", "web-asg")
    found = open_findings(
        9,
        owners=(),
        oldest=[tagcheck.Alike(finding(cause=group), 12)],
        oldest_unread=[tagcheck.Alike(finding(instance_id="i-00000000000000009"), 1)],
    )
    page = Page(dashboard(found=found))
    rows = [row for row in page.texts("tr") if row.startswith("i-0")]
    assert rows[0].startswith("i-0123456789abcdef0 and 11 more of the Auto Scaling group web-asg")
    assert rows[1].startswith("i-00000000000000009 web-1")
    read, unread = (
        page.text.index(title) for title in ("Open for longest", "Open for longest, as last read")
    )
    assert read < page.text.index("and 11 more") < unread < page.text.index("i-00000000000000009")


def test_an_anchor_is_safe_stable_and_of_one_owner():
    assert tagcheck.owner_anchor("Team Web <x>@example.com") == "owner-team-web-x-example-com-815d1fc97274"
    names = ["", "a", "A", "a ", "\ud800", "é", "è", "x" * 256, "x" * 255, *HOSTILE]
    anchors = [tagcheck.owner_anchor(name) for name in names]
    assert len({*anchors}) == len(names)
    assert all(re.fullmatch("owner(-[a-z0-9]+)+", anchor) and len(anchor) < 64 for anchor in anchors)


@pytest.mark.parametrize("text", ["team-{}@example.com", "&<>\"'" * 40 + "{}"])
def test_ten_thousand_owners_fit_into_a_page(text):
    owners = [owner(text.format(n), 10_000 - n) for n in range(50)]
    owners += [tagcheck.OwnerFindings(text.format(n), 9000 - n, 1, None) for n in range(50, 250)]
    page = Page(dashboard(found=open_findings(10**6, owners=owners, owners_total=10_000)))
    assert len(page.source.encode()) < 1_000_000
    assert len(page.all("section", class_="owner")) == 50
    anchors = {element.get("id") for element in page.elements}
    assert {tagcheck.owner_anchor(each.owner) for each in owners} <= anchors
    assert "… and 9,750 more" in page.texts("p")


def test_the_style_can_stand_beside_the_page():
    of = replace(dashboard(), css='a "b"&c.css')
    file = io.StringIO()
    tagcheck.write_html(file, of)
    assert '<link rel="stylesheet" href="a%20%22b%22%26c.css">' in file.getvalue()
    assert "<style" not in file.getvalue() and "sha256" not in file.getvalue()
    assert "style-src 'self' file:;" in file.getvalue()
    css = io.StringIO()
    tagcheck.write_css(css, of)
    assert css.getvalue() == tagcheck.HTML_STYLE


########################################################################################################
# In a browser
########################################################################################################

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome on PATH")


class Listener:
    """A proxy that answers nothing, and counts who came to it."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.asked = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self.socket.accept()
                with peer:
                    line = peer.recv(4096).decode(errors="replace").partition("\r\n")[0]
                    if "left.invalid" in line:  # the rest is Chromium's own, which asks after its news
                        self.asked.append(line)


class Browser:
    """Chromium behind a proxy that goes nowhere, spoken to in its DevTools protocol over two pipes."""

    def __init__(self, directory):
        self.directory, self.listener, self.numbers, self.events = (
            directory,
            Listener(),
            itertools.count(1),
            [],
        )
        self.pages = itertools.count(1)
        theirs, self.to = os.pipe()
        from_, theirs_to = os.pipe()
        self.answers = os.fdopen(from_, "rb")
        command = [
            CHROMIUM, "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            f"--proxy-server=http://127.0.0.1:{self.listener.socket.getsockname()[1]}",
            f"--user-data-dir={directory}", "--remote-debugging-pipe",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]  # fmt: skip
        # Chromium reads from 3 and writes to 4.
        pipes = "import os, sys; os.dup2(%d, 13); os.dup2(%d, 4); os.dup2(13, 3); "
        pipes += "os.execvp(sys.argv[1], sys.argv[1:])"
        launcher = [sys.executable, "-c", pipes % (theirs, theirs_to), *command]
        self.process = subprocess.Popen(launcher, pass_fds=(theirs, theirs_to), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(theirs_to)
        self.patience = self.wait_for_it()

    def wait_for_it(self):
        """Start the time that the next page may take."""
        patience = threading.Timer(60, self.process.kill)  # its end ends whatever waits for it
        patience.start()
        return patience

    def close(self):
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        self.process.wait(10)
        self.patience.cancel()
        os.close(self.to)
        self.answers.close()
        self.listener.socket.close()

    def call(self, method, session=None, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def read(self):
        text = b""
        while not text.endswith(b"\0"):
            piece = self.answers.read(1)
            assert piece, "the browser has gone"
            text += piece
        answer = json.loads(text[:-1])
        if "method" in answer:
            self.events.append(answer)
        return answer

    @contextlib.contextmanager
    def page(self, source, width, scheme="light", media=""):
        """Show a page; gives what runs an expression in it."""
        self.patience.cancel()
        self.patience = self.wait_for_it()
        path = self.directory / f"page{next(self.pages)}.html"
        path.write_text(source, encoding="utf-8")
        self.events.clear()
        self.listener.asked.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        call = functools.partial(self.call, session=session)
        for domain in ("Page", "Log", "Runtime", "Network"):
            call(f"{domain}.enable")
        call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        call(
            "Emulation.setEmulatedMedia",
            media=media,
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.read()
        yield lambda script: call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )["result"].get("value")
        self.call("Target.closeTarget", targetId=target)

    def complaints(self):
        """Give what the console has to complain of."""
        return [
            event["params"]
            for event in self.events
            if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        ]

    def requests(self):
        return [
            e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


LAYOUT = """(() => {
  const box = e => e.getBoundingClientRect();
  const charts = [...document.querySelectorAll('svg.chart')];
  return {
    page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    ran: window.ran === undefined ? 0 : 1,
    charts: charts.map(e => box(e).width),
    line: charts.length ? box(charts[0].querySelectorAll('path')[1]).width : innerWidth,
    bars: charts.length ? Math.min(...[...charts[1].querySelectorAll('rect')].map(e => box(e).width)) : 2,
    outside: [...document.querySelectorAll('svg text')]
      .filter(e => box(e).width && (box(e).left < 0 || box(e).right > innerWidth))
      .map(e => e.textContent),
    cards: [...document.querySelectorAll('.card')].map(e => box(e).top),
    label: getComputedStyle(document.querySelector('.list td') || document.body, '::before').content,
    rows: Math.max(0, ...[...document.querySelectorAll('.list tbody, .bars tbody, .lines, div.five')]
      .map(e => [...e.children].filter(row => box(row).height).length)),
    sideways: [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length,
    background: getComputedStyle(document.body).backgroundColor,
  };
})()"""  # fmt: skip


@in_browser
@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_it_and_has_nothing_to_complain_of(browser, name, width):
    with browser.page(Page(PAGES[name]()).source, width) as run:
        layout = run(LAYOUT)
        assert browser.complaints() == []
        assert [url for url in browser.requests() if not url.startswith("file:")] == []
        assert browser.listener.asked == []
    assert layout["page"] == 0
    assert layout["ran"] == 0
    assert layout["outside"] == []
    assert min(layout["charts"], default=width) > width * 0.7
    assert width != 360 or layout["rows"] <= 5
    assert layout["bars"] >= 2
    assert name == "one" or layout["line"] > width * 0.6
    assert (layout["label"] in ('"Instance"', '"Account"', '"Scan"')) == (width == 360)
    assert len(set(layout["cards"])) == {360: 3, 768: 2, 1280: 1}[width]
    assert layout["background"] == "rgb(250, 248, 243)"


ADDRESSES = """[...document.querySelectorAll('.list .whole, .list a, .list span.whole')].filter(e =>
  e.getBoundingClientRect().height && (() => {
    const range = document.createRange();
    range.selectNodeContents(e.tagName === 'TD' && e.querySelector('a, .whole') || e);
    const lines = new Set([...range.getClientRects()].filter(r => r.width).map(r => Math.round(r.top)));
    return lines.size > 1 && !/[ ,]/.test(e.textContent);
  })()).map(e => e.textContent)"""


@in_browser
def test_on_paper_nothing_is_cut_off(browser):
    with browser.page(Page(PAGES["large"]()).source, 703, media="print") as run:  # A4 with margins of 12 mm
        layout = run(LAYOUT)
        assert run(ADDRESSES) == []
        assert run("[...document.querySelectorAll('summary')].filter(e => e.offsetHeight).length") == 0
    assert layout["sideways"] == layout["page"] == 0
    assert layout["background"] == "rgb(255, 255, 255)"


@in_browser
def test_on_a_tablet_no_list_is_wider_than_the_page(browser):
    named = finding("web", account_name="production")
    found = open_findings(9, owners=(), oldest_unread=(), oldest=[tagcheck.Alike(named, 1)] * 9)
    with browser.page(Page(dashboard(found=found)).source, 768) as run:
        assert run(LAYOUT)["sideways"] == 0
        assert run(ADDRESSES) == []


CONTRAST = """(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => {
    const [r, g, b] = parse(c).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    while (e) {
      const c = getComputedStyle(e).backgroundColor;
      if (parse(c)[3] !== 0) return c;
      e = e.parentElement;
    }
  };
  const hasText = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  const shown = e => hasText(e) && !e.closest('title, desc');
  return [...document.querySelectorAll('body *')].filter(shown).map(e => {
    const style = getComputedStyle(e);
    const colour = e.tagName === 'text' ? style.fill : style.color;
    const [a, b] = [light(colour), light(behind(e))].sort((x, y) => y - x);
    return [e.textContent.slice(0, 40), e.className.toString(), (a + .05) / (b + .05)];
  }).filter(found => found[2] < 4.5);
})()"""  # fmt: skip


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_themes(browser, scheme):
    with browser.page(Page(PAGES["large"]()).source, 1280, scheme) as run:
        assert run(CONTRAST) == []
        assert (run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 20, 18)") == (
            scheme == "dark"
        )
    with browser.page("<body style='background:#fff'><p style='color:#999'>pale", 1280) as run:
        assert [found[0] for found in run(CONTRAST)] == ["pale"]


AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
FIND_VIOLATIONS = """axe.run({resultTypes: ['violations']}).then(result =>
  result.violations.map(each => [each.id, each.help, each.nodes.slice(0, 3).map(node => node.html)]))"""


@in_browser
@pytest.mark.skipif(not AXE.is_file(), reason="no axe.min.js of axe-core: name it in AXE_CORE")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_axe_finds_nothing_that_keeps_anybody_from_reading_it(browser, width, scheme):
    axe = AXE.read_text(encoding="utf-8")
    for name in ("three", "clean", "unread", "hostile-0"):
        with browser.page(Page(PAGES[name]()).source, width, scheme) as run:
            run(f"{axe}; 0")
            run("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert run(FIND_VIOLATIONS) == [], name
    with browser.page("<!DOCTYPE html><html><p style='color:#ccc'>pale", width, scheme) as run:
        run(f"{axe}; 0")
        assert {"color-contrast", "html-has-lang"} <= {found[0] for found in run(FIND_VIOLATIONS)}


@in_browser
def test_a_browser_takes_the_style_from_its_file(browser):
    (browser.directory / "page.css").write_text(tagcheck.HTML_STYLE, encoding="utf-8")
    file = io.StringIO()
    tagcheck.write_html(file, replace(dashboard(), css="page.css"))
    with browser.page(file.getvalue(), 1280) as run:
        assert run("getComputedStyle(document.body).backgroundColor") == "rgb(250, 248, 243)"
        assert browser.complaints() == []


@in_browser
def test_a_link_to_an_owner_whom_a_phone_folds_shows_it(browser):
    owners = [owner(f"team-{n}", 100 - n) for n in range(9)]
    source = Page(dashboard(found=open_findings(900, owners=owners, owners_total=9))).source
    height = f"document.getElementById({tagcheck.owner_anchor('team-8')!r}).getBoundingClientRect().height"
    with browser.page(source, 360) as run:
        assert run(height) == 0
        run(f"location.hash = {tagcheck.owner_anchor('team-8')!r}")
        assert run(height) > 0
    with browser.page(source, 360) as run:
        run("document.querySelectorAll('.rest').forEach(each => each.open = true)")
        assert run(height) > 0


@in_browser
def test_a_page_that_ran_or_loaded_something_would_be_noticed(browser):
    smuggled = "<script>window.ran = 1</script><img src='http://left.invalid/x'><p style='width:999px'>wide"
    source = Page(PAGES["one"]()).source
    policed = source.replace("</main>", f"{smuggled}</main>")
    with browser.page(policed, 360) as run:  # the page's own rules keep all of it out, and say so
        assert run("window.ran") is None
        assert browser.listener.asked == []
        assert len(browser.complaints()) >= 3
        assert run(LAYOUT)["page"] == 0
    free = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", policed)
    with browser.page(free, 360) as run:
        assert run("window.ran") == 1
        assert any("left.invalid" in line for line in browser.listener.asked)
        assert "http://left.invalid/x" in browser.requests()
        assert run(LAYOUT)["page"] > 0
