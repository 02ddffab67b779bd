"""Make up a fleet whose true tags are known, and let it drift day by day.

Tests take the pure functions: `fleet` (every tag is true), `hide`, `untidy`, `drifting`, `as_answer`. As a
script it scans each day of a drifting fleet and leaves the state: what a team has after a month. Every draw
is named by the seed and by what it decides, so that nothing depends on the order of the draws.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import random
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

TAGCHECK = Path(__file__).resolve().parent.parent / "tagcheck.py"
STATE = "instance_state.db"
REQUIRED = ("Owner", "CostCenter", "Environment", "Project")
UNTIL = date(2026, 11, 24)
NOW = datetime.combine(UNTIL, time(6), UTC)


# ---- What fleets are made of -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A sort of group: how often it occurs, its sizes, how far its tags agree, and what becomes of them."""

    weight: int
    sizes: tuple[int, int]
    agreement: float  # the share of instances with the group's own value, for each tag
    lapses: float  # the share of instances with something wrong in their tags
    ends: float  # the share of instances that ends each day


KINDS = {
    "asg": Kind(5, (8, 40), 0.99, 0.01, 0.02),
    "eks": Kind(4, (4, 24), 0.99, 0.01, 0.03),
    "stack": Kind(4, (3, 12), 0.97, 0.08, 0.005),
    "pets": Kind(6, (3, 9), 0.95, 0.20, 0.003),
    "alone": Kind(18, (1, 1), 1.0, 0.35, 0.015),
}
SCALED = ("asg", "eks")  # what ends there is launched again
CAMPAIGN = 0.4  # the share of what lacks tags that a campaign puts right
GROWTH, UNTAGGED_LAUNCHES, FIXED, BROKEN_AGAIN = 0.005, 0.05, 0.004, 0.012  # shares a day
TEAMS = "payments search identity logistics data-platform mobile billing observability research shop".split()
PEOPLE = (
    "ana.silva ben.diaz chen.wei dora.wolf emil.berg farah.aziz gus.ilic hana.sato ivo.rossi jo.kral".split()
)
KIM = "kim.larsen@example.com"  # launches and forgets
REGIONS = ("eu-west-1", "us-east-1", "eu-central-1")  # in every account, and named by the policy
MORE_REGIONS = ("ap-south-1", "us-west-2", "ca-central-1")
TYPES = {  # about what an hour costs in us-east-1, in dollars
    "t3.micro": 0.0104, "t3.medium": 0.0416, "m7g.large": 0.0816, "m7g.2xlarge": 0.3264, "c7g.xlarge": 0.145,
    "r7g.2xlarge": 0.4284, "m6i.4xlarge": 0.768, "g5.xlarge": 1.006,
}  # fmt: skip
NEAR_KEYS = dict(zip(REQUIRED, ("owner", "cost-center", "ENVIRONMENT", "project "), strict=True))
WRONG_VALUES = {"Environment": ("prd", "Production", "develop"), "CostCenter": ("1234", "cc-1234", "CC-12")}
LAB, LEGACY_CLUSTER = "lab", "platform-test"  # both are exempted
# What strangers write; None is a missing tag, so that each is a finding and comes into the reports.
HOSTILE: list[dict[str, str | None]] = [
    {"Name": "</title><script>alert(1)</script>", "Owner": None},
    {"Name": '=HYPERLINK("http://x")', "CostCenter": None},
    {"Name": "invoice\u202egpj.exe", "Project": None},
    {"Name": "\U0001f600" * 256, "Owner": None},
    {"Environment": "\x1b[2J\x1b[31mprod"},
    {"Environment": "<img src=x onerror=alert(1)>", "Owner\u200b": "x", "Owner": None},
]
HOSTILE_OWNER = '=HYPERLINK("http://x")'  # of a whole group, so that it is what a missing Owner probably is
LASTING = ("exempted", "hostile")  # causes that nobody puts right


def draw(*name: object) -> random.Random:
    """The random numbers of one decision, the same in every run."""
    return random.Random(repr(name))


def account_ids(accounts: int) -> list[str]:
    """The accounts; the first begins with a zero."""
    return ["012345678901", *(str(210_000_000_000 + 1_111 * n) for n in range(1, accounts))]


def worst_account(accounts: int) -> str:
    """The account whose tags are much worse than the others'."""
    return account_ids(accounts)[accounts // 2]


# ---- The fleet: Record, fleet, hide, as_answer -------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One instance: the tags that it carries, and what its required tags should be."""

    account_id: str
    region: str
    kind: str
    group: str
    instance_type: str
    vpc_id: str
    profile: str
    true_tags: Mapping[str, str]
    tags: Mapping[str, str]
    launched: datetime = NOW
    instance_id: str = ""
    state: str = "running"
    zone: str = "a"
    cause: str = ""  # why tags lack: template (of the whole group), lapse, forgotten, exempted, hostile
    before: Mapping[str, str] | None = None  # the tags as they were until somebody put them right

    @property
    def lacks(self) -> bool:
        """True where a required tag is not what it should be."""
        return any(self.tags.get(key) != value for key, value in self.true_tags.items())

    @property
    def unit(self) -> str:
        """What is put right in one go: the group's template, or the one instance."""
        return self.group if self.cause == "template" else self.instance_id


def without(tags: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """The tags but for some."""
    return {key: value for key, value in tags.items() if key not in keys}


def team_tags(team: str, rng: random.Random, personal: float) -> dict[str, str]:
    """The required tags of something that a team runs; a share of it bears a person's name."""
    number = TEAMS.index(team)
    owner = PEOPLE[number] if rng.random() < personal else f"team-{team}"
    cost_center = f"CC-{1000 + 10 * number + rng.choice((0, 0, 1))}"
    environment = rng.choices(("dev", "test", "prod"), (3, 2, 5))[0]
    project = f"{team}-{rng.choice(('api', 'batch', 'migration'))}"
    return dict(zip(REQUIRED, (f"{owner}@example.com", cost_center, environment, project), strict=True))


def structure_tags(kind: str, name: str, environment: str, place: str, rng: random.Random) -> dict[str, str]:
    """The tags that AWS and its tools give to the instances of a group."""
    found: dict[str, str] = {}
    if kind == "eks":
        cluster = f"platform-{environment}"
        found |= {"eks:cluster-name": cluster, "eks:nodegroup-name": name}
    if kind in SCALED:
        template = {"id": f"lt-0{rng.getrandbits(64):016x}", "version": str(rng.randint(1, 30))}
        found["aws:autoscaling:groupName"] = f"eks-{name}-{template['id'][-8:]}" if kind == "eks" else name
        found |= {f"aws:ec2launchtemplate:{key}": value for key, value in template.items()}
    if kind == "stack" or (kind == "asg" and rng.random() < 0.3):
        stack_id = f"arn:aws:cloudformation:{place}:stack/{name}/{rng.getrandbits(48):012x}"
        found |= {"aws:cloudformation:stack-name": name, "aws:cloudformation:stack-id": stack_id}
    return found


def group(seed: int, account_id: str, region: str, number: int, now: datetime, kim: bool) -> Iterator[Record]:
    """Yield the instances of one group by their true tags, which agree as far as those of its kind do."""
    rng = draw(seed, account_id, region, number)
    kind = "alone" if kim else rng.choices(list(KINDS), [kind.weight for kind in KINDS.values()])[0]
    team = rng.choice(draw(seed, account_id, "teams").sample(TEAMS, 4))
    common = team_tags(team, rng, {"pets": 0.3, "alone": 0.6}.get(kind, 0.05))
    common |= {"Owner": KIM, "Environment": "dev"} if kim else {}
    role = rng.choice(("db", "web", "cache", "queue", LAB)) if kind == "pets" else "worker"
    name = rng.choice(("test", "kim-tmp", "tmp2")) if kim else f"{common['Project']}-{role}"
    structure = structure_tags(kind, f"{name}-{number}", common["Environment"], f"{region}:{account_id}", rng)
    instance_type = rng.choice(list(TYPES)[2:] if kind in SCALED else list(TYPES)[:4])
    vpc_id = f"vpc-0{draw(seed, account_id, region, 'vpc', rng.randint(1, 2)).getrandbits(64):016x}"
    profile = "kim-sandbox" if kim else rng.choice((f"{team}-{role}", f"{team}-{role}", "ssm-default", ""))
    for n in range(1, rng.randint(*KINDS[kind].sizes) + 1):
        other = team_tags(rng.choice(TEAMS), rng, 0.2)
        true_tags = {k: common[k] if rng.random() < KINDS[kind].agreement else other[k] for k in REQUIRED}
        named = {} if kind == "eks" else {"Name": f"{name}-{n:02d}" if kind == "pets" else name}
        age = timedelta(hours=3, days=rng.uniform(0, 40) if kind in SCALED else rng.uniform(20, 900))
        yield Record(
            account_id, region, kind, f"{account_id}/{region}/{number}", instance_type,
            vpc_id, profile, true_tags,
            tags=named | structure | true_tags,
            launched=(now - age).replace(microsecond=0),
            instance_id=f"i-0{rng.getrandbits(64):016x}",
            state="stopped" if kind not in SCALED and rng.random() < 0.15 else "running",
            zone=rng.choice("abc"),
            cause="forgotten" if kim else "",
        )  # fmt: skip


def fleet(seed: int = 1, accounts: int = 6, instances: int = 1200, now: datetime = NOW) -> list[Record]:
    """A fleet in which every tag is there and true; each account has 3 to 5 regions and its own teams."""
    weights = list(itertools.accumulate(accounts + 2 - n for n in range(accounts)))
    records: list[Record] = []
    for account_id, weight in zip(account_ids(accounts), weights, strict=True):
        rng = draw(seed, account_id, "regions")
        regions = [*REGIONS, *rng.sample(MORE_REGIONS, rng.randint(0, 2))]
        end = instances * weight // weights[-1]
        kims = end - (end - len(records)) // 8 if account_id == worst_account(accounts) else end
        for number in itertools.count():
            if len(records) == end:
                break
            of_kim = len(records) >= kims
            some = [regions[0 if of_kim else number]] if of_kim or number < len(regions) else regions
            region = rng.choices(some, range(6, 6 - len(some), -1))[0]
            members = group(seed, account_id, region, number, now, of_kim)
            records += itertools.islice(members, (end if of_kim else kims) - len(records))
    return records


def hide(
    records: Iterable[Record],
    share: float,
    keys: Sequence[str] = REQUIRED,
    seed: int = 1,
    groups: bool = False,
) -> tuple[list[Record], dict[tuple[str, str], str]]:
    """Hide a share of the true tags, one by one or from whole groups; returns what they were."""
    hidden: dict[tuple[str, str], str] = {}
    left = []
    for record in records:
        drawn = record.group if groups else record.instance_id
        gone = [key for key in keys if draw(seed, "hide", drawn, key).random() < share]
        gone = [key for key in gone if record.tags.get(key) == record.true_tags[key]]
        hidden |= {(record.instance_id, key): record.true_tags[key] for key in gone}
        left.append(replace(record, tags=without(record.tags, gone)))
    return left, hidden


def as_answer(records: Iterable[Record]) -> dict[str, Any]:
    """The instances as `aws ec2 describe-instances` prints them, each in its own reservation."""
    return {"Reservations": [{"OwnerId": r.account_id, "Instances": [described(r)]} for r in records]}


def described(record: Record) -> dict[str, Any]:
    """One instance as AWS describes it."""
    profile = f"arn:aws:iam::{record.account_id}:instance-profile/{record.profile}"
    return {
        "InstanceId": record.instance_id,
        "InstanceType": record.instance_type,
        "State": {"Code": {"running": 16, "stopped": 80}[record.state], "Name": record.state},
        "LaunchTime": record.launched.isoformat(),
        "Placement": {"AvailabilityZone": record.region + record.zone, "Tenancy": "default"},
        "SubnetId": f"subnet-{record.vpc_id[4:-1]}{record.zone}",
        "VpcId": record.vpc_id,
        **({"IamInstanceProfile": {"Arn": profile}} if record.profile else {}),
        "Tags": [{"Key": key, "Value": value} for key, value in sorted(record.tags.items())],
    }


# ---- What goes wrong with its tags: untidy -----------------------------------------------------------------


def lapse(record: Record, rng: random.Random) -> Record:
    """The instance with something wrong in its tags."""
    key, wrong, tags = rng.choice(REQUIRED), rng.choice(list(WRONG_VALUES)), record.tags
    changes = {
        "missing": without(tags, [key]),
        "all missing": without(tags, REQUIRED),
        "near miss": without(tags, [key]) | {NEAR_KEYS[key]: record.true_tags[key]},
        "wrong": {**tags, wrong: rng.choice(WRONG_VALUES[wrong])},
        "placeholder": {**tags, key: rng.choice(("tbd", "TBD", "n/a", "unknown"))},
        "empty": {**tags, key: ""},
    }
    return replace(record, tags=rng.choices(list(changes.values()), (6, 3, 3, 3, 2, 1))[0], cause="lapse")


def untidy(records: Sequence[Record], seed: int = 1) -> list[Record]:
    """The fleet as it is found: templates, people and haste have left tags out; each record says why."""
    worst = worst_account(len({record.account_id for record in records}))
    groups = Counter(r.group for r in records if r.account_id == worst and r.kind == "asg").most_common(1)
    largest = [name for name, _ in groups]  # its template surely lacks tags
    found = [neglected(r, seed, r.account_id == worst, r.group in largest) for r in records]
    return hostile(found, seed)


def neglected(record: Record, seed: int, worse: bool, surely: bool) -> Record:
    """The instance as its group's template and its people have left it."""
    if record.cause == "forgotten":
        return replace(record, tags=without(record.tags, REQUIRED))
    if f"-{LAB}-" in record.tags.get("Name", ""):
        return replace(record, tags=without(record.tags, REQUIRED[:2]), cause="exempted")
    if record.tags.get("eks:cluster-name") == LEGACY_CLUSTER:
        return replace(record, tags=without(record.tags, ["Project"]), cause="exempted")
    rng = draw(seed, "template", record.group)
    if record.kind in ("asg", "eks", "stack") and (surely or rng.random() < (0.6 if worse else 0.1)):
        keys = rng.sample(REQUIRED, rng.choice((1, 1, 2, 3)))
        return replace(record, tags=without(record.tags, keys), cause="template")
    rng = draw(seed, "lapse", record.instance_id)
    return lapse(record, rng) if rng.random() < KINDS[record.kind].lapses * (2 if worse else 1) else record


def hostile(records: Iterable[Record], seed: int) -> list[Record]:
    """The fleet with what strangers write on a few instances, and on a group of which one lacks its Owner."""
    found = {record.instance_id: record for record in records}
    plain = [record for record in found.values() if record.kind in ("pets", "alone") and not record.cause]
    draw(seed, "hostile").shuffle(plain)
    for record, change in zip(plain, HOSTILE, strict=False):
        tags = {key: value for key, value in {**record.tags, **change}.items() if value is not None}
        found[record.instance_id] = replace(record, tags=tags, cause="hostile")
    owned = next((one.group for one in found.values() if one.kind == "asg" and not one.cause), None)
    for n, record in enumerate([record for record in found.values() if record.group == owned]):
        tags = {**record.tags, "Owner": HOSTILE_OWNER} if n else without(record.tags, ["Owner"])
        found[record.instance_id] = replace(record, tags=tags, cause="hostile")
    return list(found.values())


# ---- Drift: next_day, drifting -----------------------------------------------------------------------------


def launch(source: Record, seed: int, now: datetime) -> Record:
    """A new instance of the same group: with its template's tags, or in haste with fewer."""
    rng = draw(seed, "launch", now, source.instance_id)
    inherited = source.cause in ("template", "exempted", "forgotten")
    tags = source.tags if inherited else {**source.tags, **source.true_tags}
    if source.kind == "pets":
        tags = {**tags, "Name": f"{source.tags.get('Name', '')[:-2]}{rng.randint(10, 99)}"}
    launched = (now - timedelta(hours=rng.uniform(0, 24))).replace(microsecond=0)
    cause, instance_id = source.cause if inherited else "", f"i-0{rng.getrandbits(64):016x}"
    new = replace(source, instance_id=instance_id, launched=launched, tags=tags, cause=cause, before=None)
    new = replace(new, state="running", zone=rng.choice("abc"))
    in_haste = not inherited and rng.random() < KINDS[new.kind].lapses + UNTAGGED_LAUNCHES
    return lapse(new, rng) if in_haste else new


def put_right(record: Record) -> Record:
    """The instance with all its tags; what they were is remembered."""
    return replace(record, tags={**record.tags, **record.true_tags}, before=record.tags)


def mend(record: Record, seed: int, now: datetime) -> Record:
    """The instance a day later: somebody may have put its tags right, or undone that."""
    chance = draw(seed, "mend", now, record.unit if record.lacks else record.instance_id).random()
    if record.lacks and record.cause not in LASTING and chance < FIXED:
        return put_right(record)
    if record.before is not None and not record.lacks and chance < BROKEN_AGAIN:
        return replace(record, tags=record.before, before=None, cause="lapse")
    return record


def lacking(records: Iterable[Record]) -> Counter[str]:
    """How many instances lack tags that a campaign could put right, by what is put right in one go."""
    return Counter(record.unit for record in records if record.lacks and record.cause not in LASTING)


def next_day(records: Sequence[Record], seed: int, now: datetime, goal: float) -> list[Record]:
    """The fleet a day later; a campaign puts tags right until no more than `goal` instances lack them."""
    ended, grown = set(), []
    for record in records:
        rng = draw(seed, "day", now, record.instance_id)
        if record.cause != "hostile" and rng.random() < KINDS[record.kind].ends:
            ended.add(record.instance_id)
            grown += [record] if record.kind in SCALED else []
        elif record.cause != "hostile" and rng.random() < GROWTH:
            grown.append(record)
    found = [mend(record, seed, now) for record in records if record.instance_id not in ended]
    found += [launch(source, seed, now) for source in grown]
    units = lacking(found)
    chosen: set[str] = set()
    for unit in sorted(units, key=lambda unit: draw(seed, "campaign", unit).random()):
        if units.total() - sum(units[one] for one in chosen) > goal:
            chosen.add(unit)
    return [put_right(record) if record.lacks and record.unit in chosen else record for record in found]


def drifting(
    seed: int = 1, accounts: int = 6, instances: int = 1200, days: int = 30, until: date = UNTIL
) -> Iterator[tuple[datetime, list[Record]]]:
    """Yield each day's time and fleet; after two fifths of the days a campaign begins."""
    first = datetime.combine(until, time(6), UTC) - timedelta(days=days - 1)
    records = untidy(fleet(seed, accounts, instances, first), seed)
    begins, at_first = days * 2 // 5, 0
    for day in range(days):
        now, goal = first + timedelta(days=day), float("inf")
        if day <= begins:
            at_first = lacking(records).total()
        else:
            goal = at_first * (1 - CAMPAIGN * (day - begins) / (days - 1 - begins))
        records = next_day(records, seed, now, goal) if day else records
        yield now, records


# ---- The demo: what is written and scanned, main -----------------------------------------------------------


def policy_text(accounts: int, until: date) -> str:
    """The policy; a region that it names and the files lack counts as not read."""
    ids = ", ".join(f'"{account_id}"' for account_id in account_ids(accounts))
    return f"""version: 1
name: org-tagging
required_tags:
  - Owner
  - {{key: CostCenter, pattern: 'CC-[0-9]{{4}}'}}
  - {{key: Environment, values: [dev, test, prod]}}
  - Project
placeholder_values: [tbd, n/a, none, unknown]
grace_period: 2h
regions: {{{", ".join(f"{region}: {{}}" for region in REGIONS)}, "*": {{}}}}
accounts: {{ids: [{ids}], role_name: tagcheck-read}}
exemptions:
  - reason: the test cluster is torn down with the old platform
    tags: {{"eks:cluster-name": {LEGACY_CLUSTER}}}
    required_tags: [Project]
    expires: {until + timedelta(days=9)}
    approved_by: head of platform
    ticket: OPS-1234
  - reason: lab machines belong to nobody in particular
    tags: {{Name: "*-{LAB}-*"}}
    expires: {until + timedelta(days=1000)}
    approved_by: head of research
"""


def write_prices(path: Path) -> None:
    """Write what an hour of each type costs in each region, about."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("instance_type", "region", "hourly_price"))
        for region in (*REGIONS, *MORE_REGIONS):
            factor = 1.0 if region.startswith("us-") else 1.1
            writer.writerows((name, region, f"{price * factor:.4f}") for name, price in TYPES.items())


def run_demo(directory: Path, options: argparse.Namespace) -> int:
    """Scan day by day; returns 1 where a scan did not end as it should."""
    sys.path.insert(0, str(TAGCHECK.parent))
    import tagcheck

    policy, saved, prices = (directory / name for name in ("policy.yaml", "instances.json", "prices.csv"))
    policy.write_text(policy_text(options.accounts, options.until), encoding="utf-8")
    write_prices(prices)
    argv = ["scan", "--quiet", "--policy", str(policy), "--instances", str(saved)]
    argv += ["--state", str(directory / STATE), "--csv", str(directory / "violators.csv")]
    argv += ["--prices", str(prices)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    fleets = drifting(options.seed, options.accounts, options.instances, options.days, options.until)
    for day, (now, records) in enumerate(fleets):
        unread = day in (options.days // 4, options.days // 4 + 1, options.days - 1)
        left_out = (account_ids(options.accounts)[0], REGIONS[-1]) if unread else None
        seen = [record for record in records if (record.account_id, record.region) != left_out]
        saved.write_text(json.dumps(as_answer(seen), indent=1), encoding="utf-8")
        code = tagcheck.main(argv, now)
        for number, handler in handlers.items():  # a scan leaves them ignored
            signal.signal(number, handler)
        if code != (4 if unread else 3):
            print(f"the scan of {now:%Y-%m-%d} ended with {code}", file=sys.stderr)
            return 1
    print_days(directory / STATE)
    return 0


def print_days(state: Path) -> None:
    """Print what each scan found where it could read, as the state has it."""
    names = "instances findings exempted new repeat reopened resolved".split()
    sums = ", ".join(f"sum({name})" for name in names)
    with closing(sqlite3.connect(state)) as database:
        days = database.execute(
            f"SELECT substr(started_at, 1, 10), {sums}, sum(status = 'unread') "
            "FROM scans JOIN coverage ON scan = scans.id GROUP BY scans.id ORDER BY scans.id"
        ).fetchall()
    for name, *cells in [("day", *names, "unread"), *days]:
        print(f"{name:<10}" + "".join(f"{cell:>10}" for cell in cells))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo in a directory that has no state yet."""
    parser = argparse.ArgumentParser(description="Scan a made-up fleet day by day, and leave the state.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="made if it is not there")
    for name, default in {"days": 30, "accounts": 6, "instances": 1200, "seed": 1}.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help="%(default)s if left out"
        )
    parser.add_argument("--until", type=date.fromisoformat, default=UNTIL, metavar="DAY", help="the last day")
    options = parser.parse_args(argv)
    if (options.directory / STATE).exists():
        parser.error(f"{options.directory} has a state already: name another directory")
    options.directory.mkdir(parents=True, exist_ok=True)
    return run_demo(options.directory, options)


if __name__ == "__main__":
    sys.exit(main())
