"""The program that runs inside a grading sandbox: apply the patch, lay out the tests, run pytest, say what happened.

`grade` sends this file's text to the sandbox's Python (3.11 or later, with pytest) and one JSON order on stdin; nobody
imports it. What it says goes straight into the pipe as lines that begin with the order's nonce: they cannot be unsaid,
so code that runs later in this process can add to the evidence but never take from it. Product code and tests share
this interpreter, hence a forgery cannot be excluded, only made to contradict itself.
"""

import configparser
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Generator, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

Say = Callable[..., None]

RUNNER_FILES = {"conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini"}
START_UP_FILES = {"sitecustomize.py", "usercustomize.py"}
SHARED_CONFIG = {"pyproject.toml", "setup.cfg"}  # only their tables for the runner are protected
SOURCE_ROOTS = (".", "src")  # where imports start, beside the folders of the tests
TEST_FOLDERS = {"test", "tests"}
GIT = ["git", "-c", "safe.directory=*", "-c", "core.autocrlf=false", "-c", "core.hooksPath=/dev/null"]


def voice(nonce: str) -> Say:
    """A function that writes one evidence line; pytest's own output goes nowhere, crashes still reach stderr."""
    write, pid, me = os.write, os.getpid, os.getpid()
    pipe = os.dup(1)  # not inherited by child processes
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)

    def say(*words: object) -> None:
        if pid() == me:  # a forked child is no witness
            line = "\t".join(str(word).replace("\n", " ").replace("\t", " ") for word in words)
            write(pipe, f"\n{nonce}\t{line}\n".encode(errors="replace"))

    return say


# The patch


def touched(patch: bytes) -> list[str]:
    """The paths that a patch changes, as git reads them. CalledProcessError if git cannot."""
    listed = _apply(patch, "--numstat", "-z")
    return [os.fsdecode(entry.split(b"\t", 2)[2]) for entry in listed.split(b"\0") if entry]


def _apply(patch: bytes, *options: str) -> bytes:
    command = [*GIT, "apply", "--whitespace=nowarn", *options]
    return subprocess.run(command, input=patch, capture_output=True, check=True).stdout


def apply(patch: bytes, without: Iterable[str]) -> None:
    """Apply all of a patch but some paths. CalledProcessError, and an untouched tree, if it does not fit."""
    _apply(patch, *(f"--exclude={_literal(path)}" for path in without))


def _literal(path: str) -> str:
    """A path as a pattern of git that matches nothing else."""
    return "".join(f"\\{letter}" if letter in "*?[\\" else letter for letter in path)


def protected(path: str, tests: Iterable[str]) -> bool:
    """Whether a change of `path` could decide what the tests say without touching what they test."""
    pure = PurePosixPath(path)
    if pure.name in RUNNER_FILES | START_UP_FILES or pure.suffix in (".pth", ".pyc"):
        return True
    if any(part == "__pycache__" or part.endswith((".egg-info", ".dist-info")) for part in pure.parts):
        return True
    homes = [PurePosixPath(test) for test in tests]
    # a file or link in the place of a folder, or a folder in the place of a file
    if any(pure == home or pure in home.parents or home in pure.parents for home in homes):
        return True
    folders = {folder for home in homes for folder in home.parents if folder.name in TEST_FOLDERS}
    if any(folder in pure.parents for folder in folders):  # helpers of the tests
        return True
    return any(_shadows(pure, root) for root in {*map(PurePosixPath, SOURCE_ROOTS), *(home.parent for home in homes)})


def _shadows(path: PurePosixPath, root: PurePosixPath) -> bool:
    """Whether a file would add a module below an import root that Python already finds elsewhere."""
    if root != PurePosixPath(".") and root not in path.parents:
        return False
    module = path.relative_to(root).parts[0].split(".")[0]
    if not module.isidentifier():
        return False
    if Path(root, f"{module}.py").exists() or any(Path(root, module).glob("**/*.py")):  # the base has it already
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # `__main__` and its like have no spec
        return True


def runner_tables(path: str) -> object:
    """What a shared configuration file says to pytest; its whole text where it cannot be read."""
    text = Path(path).read_text(errors="replace") if Path(path).is_file() else ""
    try:
        if path.endswith(".toml"):
            return tomllib.loads(text).get("tool", {}).get("pytest")
        sections = configparser.RawConfigParser()
        sections.read_string(text)
        return [(name, sections.items(name)) for name in ("tool:pytest", "pytest") if sections.has_section(name)]
    except (tomllib.TOMLDecodeError, configparser.Error, AttributeError):
        return text


def take(patch: bytes, tests: list[str]) -> tuple[list[str], list[str]]:
    """Apply a patch without what is protected; the paths that it changes, and those of them that were left out."""
    paths = touched(patch)
    dropped = sorted({path for path in paths if protected(path, tests)})
    shared = [path for path in paths if PurePosixPath(path).name in SHARED_CONFIG]
    before = {path: runner_tables(path) for path in shared if path not in dropped}
    kept = {path: Path(path).read_bytes() if Path(path).is_file() else None for path in before}
    if set(paths) - set(dropped):
        apply(patch, dropped)
    for path, tables in before.items():
        if runner_tables(path) != tables:
            place(path, kept[path])
            dropped.append(path)
    return paths, dropped


# The tests


def place(path: str, data: bytes | None) -> None:
    """Make a path a plain file with these bytes, or nothing at all, whatever lies there."""
    target = Path(path)
    target.unlink(missing_ok=True)
    if data is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


class Recorder:
    """Says each outcome twice: as the call itself ended, and as pytest reports it."""

    def __init__(self, say: Say, texts: dict[str, bytes]) -> None:
        self._say = say
        self._texts = texts

    def pytest_load_initial_conftests(self) -> None:
        # `-P` kept the repository off the path until the runner was loaded; the project's own `pythonpath` is kept
        sys.path.insert(0, str(Path.cwd()))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_make_collect_report(self, collector: Any) -> Generator[None, Any, Any]:
        text = self._texts.get(collector.nodeid)
        if text is not None and collector.path.read_bytes() != text:  # by product code that an earlier file imported
            self._say("changed", collector.nodeid)
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: Any) -> Generator[None, Any, Any]:
        try:
            result = yield
        except BaseException:
            self._say("ran", "failed", item.nodeid)
            raise
        self._say("ran", "passed", item.nodeid)
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._say(report.when, report.outcome, report.nodeid, _first_line(report))

    def pytest_collectreport(self, report: Any) -> None:
        if not report.passed:
            self._say("collect", report.outcome, report.nodeid, _first_line(report))


def _first_line(report: Any) -> str:
    if not report.failed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)  # pytest has half a dozen kinds of longrepr
    text = crash.message if crash else str(report.longrepr)
    return next((line for line in reversed(text.splitlines()) if line.startswith("E ")), text.split("\n")[0])[:200]


def run(texts: dict[str, bytes], say: Say) -> int:
    """Run the test files, which hold these texts; pytest's exit code."""
    options = ["-p", "no:cacheprovider", "-q", "--tb=short", "--maxfail=0", "--continue-on-collection-errors"]
    gc.freeze()  # what is loaded stays; see the caller, who switched the collector off
    gc.enable()
    say("ready")
    return int(pytest.main([*options, "--rootdir=.", "--", *texts], plugins=[Recorder(say, texts)]))


def changed(order: dict[str, Any], say: Say) -> bool:
    """Apply the order's patch; whether there is anything to test."""
    if not order["patch"]:  # an untouched checkout is asked for
        return True
    try:
        paths, dropped = take(order["patch"].encode(errors="surrogateescape"), [*order["tests"], *order["files"]])
    except subprocess.CalledProcessError as error:
        say("patch_failed", os.fsdecode(error.stderr).strip())
        return False
    for path in dropped:
        say("dropped", path)
    if set(paths) <= set(dropped):
        say("empty")
        return False
    return True


def main() -> None:
    leave = os._exit  # no exit handler and no thread of the product's has the last word
    order = json.load(sys.stdin)
    say = voice(order["nonce"])
    base = {path: Path(path).read_bytes() for path in order["tests"] if Path(path).is_file()}
    if not changed(order, say):
        leave(0)
    texts = base | {path: text.encode() for path, text in order["files"].items()}
    for path, canary in order["canaries"].items():
        texts[path] = texts.get(path, b"") + canary.encode()
    for path, text in texts.items():
        place(path, text)
    code = run({path: texts[path] for path in order["tests"]}, say)
    say("end", code)
    leave(code)


if __name__ == "__main__":
    main()
