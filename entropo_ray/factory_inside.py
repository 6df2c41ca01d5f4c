"""The program that runs a project's tests for the bug factory, inside a sandbox, and says what each of them did.

`factory` sends this file's text to the sandbox's Python with one JSON order on stdin; nobody imports it. Each line of
what it says is the order's nonce, a tab and a JSON object. Tests run as the grader runs them. Project and tests are
trusted here: no policy wrote a line of them.

    tests      files or tests to run (none: what the project's configuration says)
    collect    only say which tests there are
    files      path -> text, written first
    functions  also say which functions each test enters
    cpu_s      the kernel ends the run when it has computed so long, however slowly it came to that
    explain    also say how each failing test called the files `product`, and what came of it
"""

import inspect
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = f"{Path.cwd()}/"
SHOWN_CHARS = 160  # of one value
PASSED = ["passed", "passed", "passed"]


class Voice:
    """Lines into the pipe that pytest's own output does not reach."""

    def __init__(self, nonce: str) -> None:
        self._nonce, self._pipe = nonce, os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):  # crashes still reach stderr
            os.dup2(nowhere, fd)

    def say(self, **words: object) -> None:
        data = f"\n{self._nonce}\t{json.dumps(words)}\n".encode(errors="replace")
        while data:
            data = data[os.write(self._pipe, data) :]


def clock() -> float:
    """Seconds that pass for this thread, without those it waited for a processor: the same on a busy machine."""
    try:
        waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):  # a kernel that does not count them
        waited = 0.0
    return time.perf_counter() - waited


class Functions:
    """Which functions of the repository are entered; each is told once and has a number from then on."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._numbers: dict[int, int] = {}  # id of a code object -> number, or -1 for those outside
        self._codes: list[CodeType] = []  # alive, so that no id comes twice
        self.entered: set[int] = set()

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            code = frame.f_code
            number = self._numbers.get(id(code))
            if number is None:
                number = self._number(code)
            if number >= 0:
                self.entered.add(number)

    def _number(self, code: CodeType) -> int:
        path, number = code.co_filename, -1
        if path.startswith(ROOT):
            number = len(self._codes)
            self._voice.say(function=number, file=path.removeprefix(ROOT), line=code.co_firstlineno)
        self._codes.append(code)
        self._numbers[id(code)] = number
        return number


class Calls:
    """How tests call the product: what with, and what came back."""

    def __init__(self, product: set[str], tests: set[str]) -> None:
        self._product, self._tests = product, tests
        self._open: dict[int, dict[str, Any]] = {}
        self.made: list[dict[str, Any]] = []

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_back is not None:
            code, caller = frame.f_code, frame.f_back.f_code
            ours = code.co_filename.startswith(ROOT) and code.co_filename[len(ROOT) :] in self._product
            if ours and caller.co_filename[len(ROOT) :] in self._tests and "<" not in code.co_qualname:
                call = {"name": code.co_qualname, "call": shown_call(frame), "returned": None}
                self._open[id(frame)] = call
                self.made = [*self.made[-19:], call]
        elif event == "return" and id(frame) in self._open:
            call = self._open.pop(id(frame))
            if not frame.f_code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
                call["returned"] = shown(argument)


def shown(value: object) -> str:
    """A value as a reader would write it, "" if that is long or says nothing."""
    try:
        text = repr(value)
    except Exception:  # a broken object may do anything
        return ""
    return "" if len(text) > SHOWN_CHARS or " at 0x" in text or "\n" in text or text.startswith("<") else text


def shown_call(frame: FrameType) -> str:
    """A call as source text, defaults left out; "..." for what cannot be shown."""
    code, values = frame.f_code, frame.f_locals
    positional = list(code.co_varnames[: code.co_argcount])
    named = list(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])
    rest = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
    if positional[:1] in (["self"], ["cls"]):
        del positional[0]
    defaults = known_defaults(frame)
    words, skipped = [], False
    for name in positional:
        if name in defaults and same(values.get(name), defaults[name]):
            skipped = True
        else:
            words.append(f"{name}={written(values.get(name))}" if skipped else written(values.get(name)))
    if code.co_flags & inspect.CO_VARARGS:
        words += [written(value) for value in values.get(rest[0], ())]
        rest = rest[1:]
    words += [f"{n}={written(values.get(n))}" for n in named if not same(values.get(n), defaults.get(n, words))]
    if code.co_flags & inspect.CO_VARKEYWORDS:
        words += [f"{name}={written(value)}" for name, value in values.get(rest[0], {}).items()]
    return as_written(code.co_qualname, ", ".join(words))


def as_written(name: str, arguments: str) -> str:
    """A call as people write it: special methods by what calls them."""
    owner, _, method = name.rpartition(".")
    if method in ("__str__", "__repr__", "__len__", "__bytes__", "__bool__", "__hash__", "__int__", "__float__"):
        return f"{method.strip('_')}({owner}(...))"
    match method:
        case "__init__":
            return f"{owner}({arguments})"
        case "__call__":
            return f"{owner}(...)({arguments})"
        case "__getitem__":
            return f"{owner}(...)[{arguments}]"
        case "__contains__":
            return f"{arguments} in {owner}(...)"
        case "__eq__":
            return f"{owner}(...) == {arguments}"
    return f"{name}({arguments})"


def written(value: object) -> str:
    return shown(value) or "..."


def same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, int | str | float) and one == other)


def known_defaults(frame: FrameType) -> dict[str, object]:
    """Parameter -> default of the function that a frame runs, as far as it can be found by its name."""
    found: Any = frame.f_globals
    for name in frame.f_code.co_qualname.split("."):
        found = found.get(name) if isinstance(found, dict) else inspect.getattr_static(found, name, None)
    found = getattr(found, "__func__", found)  # class methods and static methods
    if getattr(found, "__code__", None) is not frame.f_code:
        return {}
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    given = found.__defaults__ or ()
    return {**dict(zip(names[len(names) - len(given) :], given, strict=True)), **(found.__kwdefaults__ or {})}


class Reporter:
    """Says outcomes, and what the order asked for beside them."""

    def __init__(self, voice: Voice, order: dict[str, Any]) -> None:
        self._voice = voice
        self._functions = Functions(voice) if order["functions"] else None
        files = {test.partition("::")[0] for test in order["tests"]}
        self._calls = Calls(set(order["product"]), files) if order["explain"] else None
        self._product = set(order["product"])
        self._outcomes: list[str] = []
        self._compared: list[str] | None = None

    def pytest_load_initial_conftests(self) -> None:
        sys.path.insert(0, str(Path.cwd()))  # as the grader does

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection(self) -> Generator[None, Any, Any]:
        self._trace(self._functions)
        result = yield
        self._trace(None)
        if self._functions:
            self._voice.say(imported=sorted(self._functions.entered))
        return result

    def pytest_collection_finish(self, session: Any) -> None:
        self._voice.say(collected=[item.nodeid for item in session.items])

    def _trace(self, tracer: Functions | Calls | None) -> None:
        hook: Any = tracer.trace if tracer else None
        threading.setprofile(hook)
        sys.setprofile(hook)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> Generator[None, Any, Any]:
        self._outcomes, self._compared = [], None
        began = clock()
        if self._functions:
            self._functions.entered = set()
        if self._calls:
            self._calls.made = []
        self._trace(self._functions or self._calls)
        result = yield
        self._trace(None)
        self._voice.say(test=item.nodeid, passed=self._outcomes == PASSED, s=round(clock() - began, 4))
        if self._functions:
            self._voice.say(test=item.nodeid, entered=sorted(self._functions.entered))
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._outcomes.append("xpassed" if hasattr(report, "wasxfail") else report.outcome)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._voice.say(uncollected=report.nodeid)

    def pytest_assertrepr_compare(self, op: str, left: object, right: object) -> None:
        if self._calls and self._compared is None:
            self._compared = [op, shown(left), shown(right)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, Any]:
        report = yield
        if self._calls and report.failed and call.excinfo is not None:
            self._trace(None)
            self._voice.say(why=item.nodeid, **self._why(call.excinfo, self._calls.made))
        return report

    def _why(self, failure: Any, calls: list[dict[str, Any]]) -> dict[str, Any]:
        trail = [str(entry.path).removeprefix(ROOT) for entry in failure.traceback]
        ours = [path for path in trail if path in self._product]
        known = [path for path in trail if not path.startswith("/")]
        return {
            "type": failure.type.__name__,
            "message": str(failure.value)[:600],
            "inside": bool(ours) and known[-1] in self._product,
            "calls": calls,
            "compared": self._compared,
        }


def main() -> None:
    order = json.load(sys.stdin)
    voice = Voice(order["nonce"])
    resource.setrlimit(resource.RLIMIT_CPU, (order["cpu_s"], order["cpu_s"] + 1))
    for path, text in order["files"].items():
        Path(path).write_text(text, encoding="utf-8", newline="")
    options = ["-p", "no:cacheprovider", "-q", "--tb=short", "--maxfail=0", "--continue-on-collection-errors"]
    options += ["--collect-only"] if order["collect"] else []
    code = pytest.main([*options, "--rootdir=.", "--", *order["tests"]], plugins=[Reporter(voice, order)])
    voice.say(end=int(code))
    os._exit(0)  # a thread of the product's could keep the process


if __name__ == "__main__":
    main()
