"""Public tag policies of other tools: each has an equal policy here that judges instances as its source does.

`data/policies/public` has a file for each public policy. Its first lines say what sort of policy the source
is, where it is from, and what it asks for. Its last ones say, after `#: `, how the source judges some
instances: `pass TAGS`, or `fail TAGS: KEY, KEY`. After the tags, `on TYPE` may give the instance type.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from builders import LAUNCHED, REGION, instance_id
from conftest import Result

import tagcheck as script

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
PUBLIC = sorted((Path(__file__).resolve().parent / "data" / "policies" / "public").glob("*.yaml"))
CASE = re.compile(r"(pass|fail) (\{.*\})(?: on (\S+))?(?:: (.+))?")
SORTS = {
    *("Cloud Custodian", "AWS Config", "AWS Organizations", "Open Policy Agent", "Sentinel", "Checkov"),
    *("TFLint", "Pulumi CrossGuard", "EventBridge"),
}


class Case(NamedTuple):
    """An instance, and the keys of the tags that the source finds wrong."""

    tags: dict[str, str]
    instance_type: str
    wrong: list[str]


def cases(path: Path) -> Iterator[Case]:
    """Yield the instances that the source judges."""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("#:"):
            found = CASE.fullmatch(line.removeprefix("#: "))
            assert found, line
            verdict, tags, instance_type, keys = found.groups("")
            assert (verdict == "fail") == bool(keys), line
            # The base loader reads every value as text.
            yield Case(yaml.load(tags, yaml.BaseLoader), instance_type, keys.split(", ") if keys else [])


def stem(path: Path) -> str:
    return path.stem


def test_there_are_policies_of_every_sort() -> None:
    sorts: Counter[str] = Counter()
    for path in PUBLIC:
        first, second, third = path.read_text("utf-8").splitlines()[:3]
        (sort,) = (name for name in SORTS if first.startswith(f"# {name} "))
        sorts[sort] += 1
        assert second.startswith("# Source: ")
        assert third.startswith("# Asks ")
    assert sorts.keys() == SORTS
    assert len(PUBLIC) >= 30


@pytest.mark.parametrize("path", PUBLIC, ids=stem)
def test_public_policy_is_valid(tagcheck: Callable[..., Result], path: Path) -> None:
    result = tagcheck("validate", path, now=NOW)
    assert (result.code, result.lines, result.err) == (0, [f"{path}: valid"], "")


@pytest.mark.parametrize("path", PUBLIC, ids=stem)
def test_public_policy_judges_as_its_source_does(path: Path) -> None:
    policy = script.load_policy(str(path))
    assert policy.name == path.stem
    target, fleet = script.Target("123456789012", REGION), [*cases(path)]
    assert len(fleet) >= 4
    assert {bool(case.wrong) for case in fleet} == {True, False}
    judged = []
    for number, (tags, instance_type, _) in enumerate(fleet):
        seen = script.Instance(instance_id(number), "running", LAUNCHED, tags, instance_type)
        violations = script.judge(target, seen, policy, NOW).violations
        judged.append(Case(tags, instance_type, [violation.tag_key for violation in violations]))
    assert judged == fleet
