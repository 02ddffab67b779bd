"""What many tests make by hand: policies, instances as the AWS CLI prints them, and files of both."""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ACCOUNT, REGION = "123456789012", "us-east-1"
LAUNCHED = datetime(2026, 2, 24, 10, 30, 45, tzinfo=UTC)
#: The arguments that name the files of `save_policy` and `save_fleet`.
SAVED_FILES = ("--policy", "policy.yaml", "--instances", "fleet.json")
NO_TAGS: Mapping[str, str] = {}


def policy(**keys: Any) -> dict[str, Any]:
    """Make a policy that asks for Owner in one region, but for the keys that are given."""
    standard = {"version": 1, "name": "test", "required_tags": ["Owner"], "regions": {REGION: None}}
    return standard | keys


def save_policy(path: Path, **keys: Any) -> Path:
    """Save a policy, as `policy.yaml` in a directory or under another name; JSON is YAML."""
    return save(path, "policy.yaml", policy(**keys))


def save(path: Path, name: str, content: Any) -> Path:
    """Save a JSON file, under a name where the path is a directory."""
    path = path / name if path.is_dir() else path
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def instance_id(number: int) -> str:
    """Give the id of the instance with this number."""
    return f"i-{number:017x}"


def instance(
    number: int | str = 1,
    tags: Mapping[str, str] = NO_TAGS,
    *,
    region: str = REGION,
    launched: datetime | str = LAUNCHED,
    state: str = "running",
    **keys: Any,
) -> dict[str, Any]:
    """Make an instance by its number or its id; `keys` are more of what EC2 says of it."""
    return {
        "InstanceId": number if isinstance(number, str) else instance_id(number),
        "State": {"Name": state},
        "LaunchTime": launched if isinstance(launched, str) else launched.isoformat(),
        "Placement": {"AvailabilityZone": f"{region}a"},
        "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
    } | keys


def reservation(*args: Any, account: str = ACCOUNT, **keys: Any) -> dict[str, Any]:
    """Make a reservation of one instance; the arguments are those of `instance`."""
    return {"OwnerId": account, "Instances": [instance(*args, **keys)]}


def fleet(*items: Mapping[str, Any], account: str = ACCOUNT, **keys: Any) -> dict[str, Any]:
    """Make the answer with these reservations, or with one reservation of these instances."""
    if not all("Instances" in item for item in items):
        items = ({"OwnerId": account, "Instances": items},)
    return {"Reservations": items, **keys}


def save_fleet(path: Path, *items: Mapping[str, Any], account: str = ACCOUNT, **keys: Any) -> Path:
    """Save the answer that `fleet` makes, as `fleet.json` in a directory or under another name."""
    return save(path, "fleet.json", fleet(*items, account=account, **keys))


def query(state: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Ask a state."""
    with closing(sqlite3.connect(state)) as db:
        return db.execute(sql, values).fetchall()


def remembered(directory: Path, region: str = "%") -> list[tuple[Any, ...]]:
    """Read what the state holds of the findings of a region, every column of it."""
    sql = "SELECT * FROM findings WHERE region LIKE ? ORDER BY account_id, region, instance_id"
    return query(directory / "instance_state.db", sql, region)
