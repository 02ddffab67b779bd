"""What the tests share: AWS on a loopback port, and the script as its users run it."""

import csv
import json
import os
import site
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from aws_server import AwsServer

TAGCHECK = Path(__file__).resolve().parent.parent / "tagcheck.py"


# As the script, but for the time: its directory and the time stand before its arguments.
AT_A_TIME = """import sys, datetime; sys.path.insert(0, sys.argv.pop(1)); import tagcheck
raise SystemExit(tagcheck.main(now=datetime.datetime.fromisoformat(sys.argv.pop(1))))"""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests that take minutes be asked for, and the script run with another interpreter."""
    parser.addoption("--python", default=sys.executable, help="the interpreter that runs the script")
    parser.addoption("--soak", action="store_true", help="run the tests that take minutes as well")


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """Run the files of the whole suite side by side, as a test mostly waits for the script that it runs."""
    only_told = ("help", "version", "collectonly", "markers", "showfixtures")
    if config.args_source is pytest.Config.ArgsSource.ARGS or any(map(vars(config.option).get, only_told)):
        return None
    files = sorted(Path(__file__).parent.glob("test_*.py"), key=lambda file: -file.stat().st_size)

    def run(file: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, done in zip(files, pool.map(run, files), strict=True):
            passed = done.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
            failed += not passed
            *before, last = done.stdout.splitlines() or [""]
            print(*([] if passed else [*before, done.stderr]), f"{file.name}: {last}", sep="\n", flush=True)
    return int(failed > 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that take minutes where nobody asked for them."""
    for item in items:
        if item.get_closest_marker("soak") and not config.getoption("soak"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with --soak"))


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests themselves from any true account, and from proxies on the way to loopback."""
    os.environ["PYTHON_OF_THE_SCRIPT"] = config.getoption("--python")
    config.addinivalue_line("markers", "soak: takes minutes, and is skipped without --soak")
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


@dataclass(frozen=True)
class Result:
    """What a run of the script left behind."""

    code: int
    out: str
    err: str
    cwd: Path

    def json(self, name: str) -> Any:
        """Read a JSON file that the run wrote, or its stdout for `-`."""
        return json.loads(self.out if name == "-" else (self.cwd / name).read_text(encoding="utf-8"))

    def csv(self, name: str) -> list[dict[str, str]]:
        """Read the rows of a CSV file that the run wrote, or of its stdout for `-`, by its header."""
        text = self.out if name == "-" else (self.cwd / name).read_bytes().decode()
        return list(csv.DictReader(text.splitlines(keepends=True)))


def clean_environment(home: Path) -> dict[str, str]:
    """Give the environment of a script that knows of no AWS account, no proxy and no settings of a person."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR", "SYSTEMROOT") if name in os.environ}
    return kept | {
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONUSERBASE": site.getuserbase(),  # packages may be installed under the true home
    }


def run_tagcheck(
    *args: str | Path,
    cwd: Path,
    script: Path = TAGCHECK,
    env: Mapping[str, str] | None = None,
    stdin: str | bytes | None = None,
    check: int | None = None,
    timeout: float = 60,
    now: datetime | None = None,
) -> Result:
    """Run the script, and fail the test where it crashed or ended with another code than `check`.

    With `now` it is that time for the script.
    """
    told = [script] if now is None else ["-c", AT_A_TIME, script.parent, now.isoformat()]
    run = subprocess.run(
        [os.environ["PYTHON_OF_THE_SCRIPT"], *told, *args],
        cwd=cwd,
        env=clean_environment(cwd) | dict(env or {}),
        input=stdin.encode() if isinstance(stdin, str) else stdin or b"",
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    out, err = run.stdout.decode(errors="replace"), run.stderr.decode(errors="replace")
    shown = f"tagcheck.py {' '.join(map(str, args))}\n--- stdout\n{out}\n--- stderr\n{err}"
    if "Traceback" in err:
        pytest.fail(f"crashed with exit code {run.returncode}: {shown}")
    if check is not None and run.returncode != check:
        pytest.fail(f"exit code {run.returncode}, not {check}: {shown}")
    return Result(run.returncode, out, err, cwd)


def script_with(directory: Path, **constants: float | tuple[float, ...]) -> Path:
    """Write a script that is tagcheck.py with other constants, to see soon what would take minutes."""
    path = directory / "impatient.py"
    lines = [
        *("import sys", f"sys.path.insert(0, {str(TAGCHECK.parent)!r})", "import tagcheck"),
        *(f"assert tagcheck.{name}; tagcheck.{name} = {value!r}" for name, value in constants.items()),
        "raise SystemExit(tagcheck.main())",
    ]
    path.write_text("\n".join(lines))
    return path


Case = TypeVar("Case")
Outcome = TypeVar("Outcome")


def at_once(run: Callable[[str, Case], Outcome], cases: Mapping[str, Case]) -> dict[str, Future[Outcome]]:
    """Run cases that have nothing to do with each other at the same time; each fails where it is asked for."""
    with ThreadPoolExecutor(4) as pool:
        return {name: pool.submit(run, name, case) for name, case in cases.items()}


@pytest.fixture
def tagcheck(tmp_path: Path) -> Callable[..., Result]:
    """Give `run_tagcheck` that runs in the test's own directory, unless told otherwise."""

    def run(*args: str | Path, cwd: Path = tmp_path, **options: Any) -> Result:
        return run_tagcheck(*args, cwd=cwd, **options)

    return run


@pytest.fixture(scope="session")
def aws_server() -> Iterator["AwsServer"]:
    """Run one server for all tests that want one."""
    from aws_server import AwsServer  # moto takes a second to import

    server = AwsServer()
    yield server
    server.stop()


@pytest.fixture
def aws(aws_server: "AwsServer") -> "AwsServer":
    """Give the server as new: no instances, no faults, no requests."""
    aws_server.reset()
    return aws_server
