"""What the tests share: AWS on a loopback port, and the script as its users run it."""

import contextlib
import csv
import functools
import io
import json
import logging
import os
import signal
import site
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

import pytest
from botocore.loaders import JSONFileLoader, Loader
from botocore.retries.standard import ExponentialBackoff

if TYPE_CHECKING:
    from aws_server import AwsServer

TAGCHECK = Path(__file__).resolve().parent.parent / "tagcheck.py"
sys.path.insert(0, str(TAGCHECK.parent))
with contextlib.chdir(Path(__file__).parent):  # so that the default policy has an absolute path
    import tagcheck as script_module


# Like the script, but at a given time: its directory and the time precede its arguments.
AT_A_TIME = """import sys, datetime; sys.path.insert(0, sys.argv.pop(1)); import tagcheck
raise SystemExit(tagcheck.main(now=datetime.datetime.fromisoformat(sys.argv.pop(1))))"""


class Interpreter:
    """The Python that runs the script where it has a process of its own."""

    ours = path = sys.executable


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests that take minutes be asked for, and the script run with another interpreter."""
    parser.addoption("--python", default=sys.executable, help="the interpreter that runs the script")
    parser.addoption("--soak", action="store_true", help="run the tests that take minutes as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that take minutes where nobody asked for them."""
    for item in items:
        if item.get_closest_marker("soak") and not config.getoption("soak"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run it with --soak"))


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests themselves from any true account, and from proxies on the way to loopback."""
    Interpreter.path = config.getoption("--python")
    config.addinivalue_line("markers", "soak: takes minutes, and is skipped without --soak")
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    hurry_boto()


def hurry_boto() -> None:
    """Let sessions share the parsed models of AWS's services, and shorten the pauses between tries."""
    load_once = functools.cache(functools.partial(JSONFileLoader.load_file, JSONFileLoader()))
    JSONFileLoader.load_file = lambda self, file_path: load_once(file_path)
    load_model_once = functools.cache(script_module.load_model)
    script_module.load_model = lambda path: load_model_once(path)
    list_once = functools.cache(Loader.list_available_services)
    of_paths = functools.cache(lambda paths: Loader([*paths], include_default_search_paths=False))
    Loader.list_available_services = lambda self, type_name: list_once(
        of_paths((*self.search_paths,)), type_name
    )
    delay_amount = ExponentialBackoff.delay_amount
    ExponentialBackoff.delay_amount = lambda *args: delay_amount(*args) / 100


@dataclass(frozen=True)
class Result:
    """What a run of the script left behind."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def lines(self) -> list[str]:
        """The lines of stdout."""
        return self.out.splitlines()

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
    process: bool = False,
) -> Result:
    """Run the script, and fail the test if it crashed or ended with another code than `check`.

    It runs inside this process, which is fast, unless a test asks for a `process` or cannot do without one.
    With `now`, that is the time for the script.
    """
    variables = clean_environment(cwd) | dict(env or {})
    given = stdin.encode() if isinstance(stdin, str) else stdin or b""
    process = process or stdin is not None or needs_process(args, script, env or {})
    run = run_process if process else run_here
    code, out, err = run(Call(args, cwd, script, variables, given, timeout, now))
    shown = f"tagcheck.py {' '.join(map(str, args))}\n--- stdout\n{out}\n--- stderr\n{err}"
    if "Traceback" in err:
        pytest.fail(f"crashed with exit code {code}: {shown}")
    if check is not None and code != check:
        pytest.fail(f"exit code {code}, not {check}: {shown}")
    return Result(code, out, err, cwd)


def needs_process(args: Sequence[str | Path], script: Path, env: Mapping[str, str]) -> bool:
    """Return whether a run depends on what only a process of its own can have."""
    return (
        threading.current_thread() is not threading.main_thread()
        or Interpreter.path != Interpreter.ours
        or (script != TAGCHECK and script not in CONSTANTS)
        or any(name.startswith(("PYTHON", "LANG", "LC_", "TZ")) for name in env)
        or any(str(arg).startswith("/dev/std") for arg in args)
    )


@dataclass(frozen=True)
class Call:
    """One call of the script, with all that it can see of its surroundings."""

    args: Sequence[str | Path]
    cwd: Path
    script: Path
    env: Mapping[str, str]
    stdin: bytes
    timeout: float
    now: datetime | None


def run_process(call: Call) -> tuple[int, str, str]:
    """Run the script in a process of its own; returns its exit code, stdout and stderr."""
    start = [call.script]
    if call.now is not None:
        start = ["-c", AT_A_TIME, call.script.parent, call.now.isoformat()]
    run = subprocess.run(
        [Interpreter.path, *start, *call.args],
        cwd=call.cwd,
        env=call.env,
        input=call.stdin,
        capture_output=True,
        timeout=call.timeout,
        check=False,
    )
    return run.returncode, run.stdout.decode(errors="replace"), run.stderr.decode(errors="replace")


def run_here(call: Call) -> tuple[int, str, str]:
    """Run the script's `main` in this process as in one of its own; returns its exit code, stdout and stderr.

    An exception that would crash the script passes through, for pytest to show and `--pdb` to look at.
    """
    streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n") for name in ("stdout", "stderr")}
    given = io.TextIOWrapper(io.BytesIO(call.stdin), "utf-8")
    threads = {*threading.enumerate()}
    constants = SHORT_PAUSES | CONSTANTS.get(call.script, {})
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(call.cwd))
        stack.enter_context(mock.patch.dict(os.environ, call.env, clear=True))
        stack.enter_context(mock.patch.multiple(sys, stdin=given, **streams))
        stack.enter_context(mock.patch.object(tempfile, "tempdir", None))
        stack.enter_context(mock.patch.object(threading, "excepthook", threading.__excepthook__))
        stack.enter_context(kept_handlers())
        stack.enter_context(as_if_new(script_module, constants))
        late = functools.partial(pytest.fail, f"the script still ran after {call.timeout:g} seconds")
        stack.enter_context(time_limit(call.timeout, late))
        try:
            code: Any = script_module.main([os.fspath(arg) for arg in call.args], now=call.now)
        except SystemExit as end:
            code = end.code
        finally:
            wait_for_threads(threads)
    if code == script_module.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt  # which was meant for pytest
    for stream in streams.values():
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(errors="replace") for stream in streams.values())
    return int(code or 0), out, err


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Put the handlers of signals, of the log and of warnings back to what they were."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logs = [(log, log.handlers[:], log.propagate, log.level) for log in map(logging.getLogger, LOGS)]
    with warnings.catch_warnings():
        # as Python itself has it, where pytest would show all
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = print_warning
        try:
            yield
        finally:
            for number, handler in signals.items():
                signal.signal(number, handler)
            for log, handlers, propagate, level in logs:
                log.handlers, log.propagate = handlers, propagate
                log.setLevel(level)


def print_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any
) -> None:
    """Print a warning to stderr, where Python prints it."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


@contextlib.contextmanager
def as_if_new(module: types.ModuleType, constants: Mapping[str, Any]) -> Iterator[None]:
    """Let a module have other constants, and empty caches; boto3 has no session."""
    boto3 = sys.modules.get("boto3")
    caches = [value for value in vars(module).values() if hasattr(value, "cache_clear")]
    assert all(getattr(module, name) for name in constants)
    with contextlib.ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(mock.patch.object(module, name, value))
        if boto3:
            stack.enter_context(mock.patch.object(boto3, "DEFAULT_SESSION", None))
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        yield


@contextlib.contextmanager
def time_limit(seconds: float, late: Callable[[], NoReturn]) -> Iterator[None]:
    """Call `late`, which raises, in the body where it takes longer."""
    former = signal.signal(signal.SIGALRM, lambda *_: late())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def wait_for_threads(earlier: Container[threading.Thread]) -> None:
    """Wait for the threads of a run, which would end with its process; the next test must not meet them."""
    deadline = time.monotonic() + 10
    for thread in threading.enumerate():
        if thread not in earlier and thread.name.endswith("(work)"):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                pytest.fail(f"{thread.name} goes on after its run: the test needs a process of its own")

    def callers() -> int:
        return sum(thread.name.endswith("(make_calls)") for thread in threading.enumerate())

    while callers() > len(script_module.IDLE_THREADS):
        if time.monotonic() > deadline:
            pytest.fail("a call goes on after its run: the test needs a process of its own")
        time.sleep(0.01)


#: The loggers that the script changes.
LOGS = ("tagcheck", "botocore")
#: What else would take most of the time of the tests.
SHORT_PAUSES = {
    "NETWORK_PAUSES": (0.02,),
    "S3_PAUSE": 0.05,
    "SLACK_PAUSES": (0.02, 0.02),
    "LOOKUP_PAUSE": 0.01,
}
#: What other constants the scripts of `script_with` have.
CONSTANTS: dict[Path, dict[str, Any]] = {}


def script_with(directory: Path, **constants: float | tuple[float, ...]) -> Path:
    """Write a script that is tagcheck.py with other constants, to see soon what would take minutes."""
    path = directory / "impatient.py"
    CONSTANTS[path] = constants
    lines = [
        *("import sys", f"sys.path.insert(0, {str(TAGCHECK.parent)!r})", "import tagcheck"),
        *(f"assert tagcheck.{name}; tagcheck.{name} = {value!r}" for name, value in constants.items()),
        "raise SystemExit(tagcheck.main())",
    ]
    path.write_text("\n".join(lines))
    return path


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
