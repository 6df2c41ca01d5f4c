"""What the hidden tests say of a patch: a fresh sandbox, the patch's bytes, then the tests, then a judgement.

Only this room and `tasks` open answers. Product code and tests share one interpreter, so evidence can be forged; it is
asked for in several ways (every test file gets one more test that must pass and one that must fail, pytest's reports
are held against the calls themselves, and both against the exit code), and evidence that contradicts itself is
TAMPERED. A sandbox that dies raises SandboxError: no verdict is not a failed one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import secrets
import string
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropo_ray import config, sandbox
from entropo_ray.records import Answer, Grade, Task, Verdict, digest, to_row
from entropo_ray.sandbox import ExecResult, Sandbox, SandboxError, SandboxSpec
from entropo_ray.sandbox.patch import PATCH_MB
from entropo_ray.tasks import diffs, pack, scripted, swebench
from entropo_ray.tasks.pack import Ruling

GRADER_VERSION = "pytest-2"  # part of every cache key: raise it when a verdict could change

# nothing of what loads pytest is garbage: collecting meanwhile costs a seventh of the CPU time of a short run
_INSIDE = "import gc\ngc.disable()\n" + Path(__file__).with_name("grade_inside.py").read_text()
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "TZ": "UTC", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
_EVIDENCE_BYTES = 8 << 20  # about 20,000 tests
_TESTS_FAILED = 1  # pytest's exit code when it ran to its end and a test failed, as one always does here
_LOG_BYTES = 32 << 20  # of a script's run
_AUDIT_BYTES = 64 << 20  # two lines an object
_RUN = 'script=$(cat); exec </dev/null; eval "$script"'  # read whole before it starts: nothing on disk to rewrite

# each attempt begins on a clean tree; the last ones take what fits roughly, as the official harness does
_APPLY = """
patch=$(mktemp) && cat > "$patch" || exit 90
quiet="git -c safe.directory=* -c core.hooksPath=/dev/null -c core.fsmonitor=false"
for how in "$quiet apply --whitespace=nowarn" "$quiet apply --whitespace=nowarn --3way" \\
    "patch --batch --forward --fuzz=5 -p1 -i"; do
    $how "$patch" > "$patch.said" 2>&1 && { $quiet reset -q; exit 0; }
    [ -e "$patch.first" ] || cp "$patch.said" "$patch.first"
    $quiet reset -q --hard && $quiet clean -fdq || exit 90
done
head -c 300 "$patch.first" && exit 1
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """Which tests decide, and which are only reported."""

    passing: tuple[str, ...]
    failing: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.passing, *self.failing, *self.watched)))

    @property
    def files(self) -> list[str]:
        return sorted({_file(test) for test in self.ids})


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """Two tests with random names at the end of one test file.

    The names are made of the words of the expected tests, so that no name tells a canary from a test.
    """

    passing: str
    failing: str

    @classmethod
    def hatch(cls, tests: Sequence[str]) -> Canary:
        words = sorted({word for test in tests for word in re.findall("[a-z]+", test.lower()) if len(word) > 2})
        taken = {_name(test) for test in tests}
        names: list[str] = []
        while len(names) < 2:
            ending = "".join(secrets.choice(string.ascii_lowercase) for _ in range(5))
            name = "_".join(["test", secrets.choice(words), ending, secrets.choice(words)])
            if name not in taken:
                taken.add(name)
                names.append(name)
        return cls(passing=names[0], failing=names[1])

    def text(self) -> str:
        a, b = secrets.randbelow(900) + 100, secrets.randbelow(900) + 100
        tests = [(self.passing, a * b), (self.failing, a * b + secrets.randbelow(90) + 10)]
        tests.sort()  # by name, so that the order tells nothing either
        return "".join(f"\n\ndef {name}():\n    assert {a} * {b} == {product}\n" for name, product in tests)


@dataclass(slots=True)
class Evidence:
    """What one run said, as lines in a pipe that cannot be unsaid."""

    exit_code: int | None
    ready: bool = False  # the patch is applied, the tests are written, pytest starts
    end: int | None = None  # pytest's own exit code; None: it never came to its end
    empty: bool = False  # nothing of the patch is left to grade
    patch_failed: str = ""
    dropped: list[str] = field(default_factory=list)
    phases: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # test id -> (phase, outcome) ...
    uncollected: dict[str, str] = field(default_factory=dict)  # collector that could not be read -> why
    why: dict[str, str] = field(default_factory=dict)  # test id -> first line of its failure
    strange: list[str] = field(default_factory=list)  # what no honest run says

    def passed(self, test: str) -> bool:
        phases = self.phases.get(test, [])
        return (
            phases.count(("ran", "passed")) == 1
            and {phase for phase, _ in phases} == _PHASES
            and not ({outcome for _, outcome in phases} - {"passed"})
        )

    def failed(self, test: str) -> bool:
        return any(outcome == "failed" for _, outcome in self.phases.get(test, []))

    def collected(self, path: str) -> bool:
        """False where an import error, or its like, kept a whole file from being read."""
        return not any(path == node or node == "" or path.startswith(f"{node}/") for node in self.uncollected)


_PHASES = {"setup", "ran", "call", "teardown"}


def _file(test: str) -> str:
    return test.partition("::")[0]


# One run


async def grade(task: Task, patch: str, answer: Answer, cfg: config.Sandbox) -> Verdict:
    """Hidden and visible tests on `patch`, in a fresh sandbox. SandboxError if it dies, ValueError on a bad answer."""
    return _unfit(patch) or await _hidden(task, patch, answer, cfg)


async def check(task: Task, patch: str, cfg: config.Sandbox) -> Verdict:
    """The visible tests alone on an untouched checkout with `patch`; RESOLVED if all pass. SandboxError if it dies."""
    if unfit := _unfit(patch):
        return unfit
    if not task.visible:
        return _verdict(Grade.RESOLVED, "there are no visible tests")
    return await _run(task, patch, Expectation(passing=task.visible), {}, cfg)


def _unfit(patch: str) -> Verdict | None:
    """The verdict on a patch that is none, or that no sandbox would have given out."""
    if not patch.strip():
        return _verdict(Grade.EMPTY, "the patch is empty")
    size = len(patch.encode(errors="surrogateescape"))
    if size > PATCH_MB << 20:
        return _verdict(Grade.PATCH_FAILED, f"the patch has {size} bytes, more than {PATCH_MB} MiB")
    return None


async def _hidden(task: Task, patch: str, answer: Answer, cfg: config.Sandbox) -> Verdict:
    if not answer.fail_to_pass:
        raise ValueError(f"{task.id}: fail_to_pass is empty: every patch would resolve it")
    if scripted.mine(answer):
        return await _scripted(task, patch, answer, cfg)
    if answer.parser != "pytest":
        raise ValueError(f"{task.id}: parser={answer.parser}: without a script of its own only pytest can be run")
    files = {file.path: file.text for file in answer.files}
    expectation = Expectation(
        passing=(*answer.fail_to_pass, *answer.pass_to_pass),
        failing=answer.expected_failures,
        watched=tuple(test for test in task.visible if _file(test) not in files),  # else the hidden version holds
    )
    return await _run(task, patch, expectation, files, cfg)


async def _run(
    task: Task, patch: str, expectation: Expectation, files: Mapping[str, str], cfg: config.Sandbox
) -> Verdict:
    nonce = secrets.token_hex(16)
    canaries = {path: Canary.hatch(expectation.ids) for path in expectation.files}
    order = {
        "nonce": nonce,
        "patch": patch,
        "files": dict(files),
        "tests": expectation.files,
        "canaries": {path: canary.text() for path, canary in canaries.items()},
    }
    began = time.monotonic()
    async with sandbox.open_sandbox(_spec(task, cfg), backend=cfg.backend) as box:
        result = await box.exec(
            ["python", "-P", "-c", _INSIDE], stdin=json.dumps(order).encode(), output_bytes=_EVIDENCE_BYTES
        )
    evidence = read_evidence(result, nonce)
    decision, reason = judge(evidence, expectation, canaries, limit=_limit(result))
    passed = tuple(test for test in expectation.ids if evidence.passed(test))
    return Verdict(
        grade=decision,
        passed=passed,
        failed=tuple(test for test in expectation.ids if test not in passed) if evidence.ready else (),
        dropped=tuple(evidence.dropped),
        exit_code=-1 if result.exit_code is None else result.exit_code,
        runs=1,
        seconds=time.monotonic() - began,
        reason=reason,
    )


async def _scripted(task: Task, patch: str, answer: Answer, cfg: config.Sandbox) -> Verdict:
    """By the answer's own script; an empty patch runs, for a validation asks what the tests say of it."""
    try:
        kept, dropped = scripted.admitted(patch, answer)
    except ValueError as error:
        return _verdict(Grade.PATCH_FAILED, f"the patch {error}")
    if patch and not kept:
        return dataclasses.replace(_verdict(Grade.EMPTY, "only protected files were changed"), dropped=dropped)
    began = time.monotonic()
    async with sandbox.open_sandbox(_spec(task, cfg), backend=cfg.backend) as box:
        try:
            log, result, canaries = await _run_script(box, kept, answer, timeout_s=cfg.grade_s)
        except _ApplyFailed as error:
            return dataclasses.replace(_verdict(Grade.PATCH_FAILED, str(error)), dropped=dropped)
    found = scripted.statuses(log, task, answer)
    decision, reason, passed = scripted.judge(log, found, answer, canaries, limit=_limit(result))
    return Verdict(
        grade=decision,
        passed=passed,
        failed=tuple(test for test in scripted.decisive(answer) if test not in passed),
        dropped=dropped,
        exit_code=-1 if log.code is None else log.code,
        runs=1,
        seconds=time.monotonic() - began,
        reason=reason,
    )


class _ApplyFailed(Exception):
    """The patch does not fit; one line of git's."""


async def _run_script(
    box: Sandbox, patch: str, answer: Answer, *, timeout_s: float
) -> tuple[scripted.Log, ExecResult, scripted.Canaries]:
    """Apply, lay out, run. _ApplyFailed if the patch does not fit; SandboxError if the script did not come to start."""
    if patch:
        await _apply(box, patch)
    for file in answer.files:
        if f"b/{file.path}" not in answer.script:  # else the script makes it, and expects that it is not there
            await box.write(file.path, file.text.encode())
    nonce, canaries = secrets.token_hex(16), scripted.hatched(answer)
    script = scripted.armed(answer.script, nonce, canaries)
    result = await box.exec(["bash", "-c", _RUN], stdin=script.encode(), timeout=timeout_s, output_bytes=_LOG_BYTES)
    log = scripted.read(result.output.decode(errors="replace"), nonce)
    if not log.started and not (result.timed_out or result.oom or result.disk_full):
        raise SandboxError(
            f"the script of the tests did not come to them (exit code {result.exit_code}): {_tail(result)}"
        )
    return log, result, canaries


async def _apply(box: Sandbox, patch: str) -> None:
    done = await box.exec(_APPLY, stdin=patch.encode(errors="surrogateescape"))
    if done.exit_code == 1:
        raise _ApplyFailed(done.output.decode(errors="replace").strip().split("\n")[0])
    if done.exit_code != 0:
        raise SandboxError(f"the patch could not be tried (exit code {done.exit_code}): {_tail(done)}")


def _tail(result: ExecResult) -> str:
    return " ".join(result.output[-400:].decode(errors="replace").split())


def _spec(task: Task, cfg: config.Sandbox) -> SandboxSpec:
    return SandboxSpec(
        image=task.image,
        workdir=task.workdir,
        site=task.site,
        env=_ENVIRONMENT,
        limits=sandbox.limits(cfg, exec_s=cfg.grade_s),
        labels={"role": "grade", "task": task.id},
        cluster=cfg.kubernetes,
    )


def _verdict(decision: Grade, reason: str) -> Verdict:
    """A verdict for which nothing had to run."""
    return Verdict(grade=decision, passed=(), failed=(), dropped=(), exit_code=-1, runs=0, seconds=0.0, reason=reason)


def _limit(result: ExecResult) -> str:
    """Which limit the run hit, "" for none."""
    hit = {"time-out": result.timed_out, "out of memory": result.oom, "out of disk": result.disk_full}
    return next((name for name, was in hit.items() if was), "")


# Evidence


def read_evidence(result: ExecResult, nonce: str) -> Evidence:
    """The recorder's lines in a run's output. SandboxError if pytest never came to start, which no patch can cause."""
    evidence = Evidence(result.exit_code)
    for line in result.output.decode(errors="replace").split("\n"):
        mark, _, said = line.partition("\t")
        if mark == nonce:
            _note(evidence, said.split("\t"))
    if not (evidence.ready or evidence.empty or evidence.patch_failed):
        tail = " ".join(result.output[-400:].decode(errors="replace").split())
        raise SandboxError(f"the grader did not start (exit code {result.exit_code}): {tail}")
    return evidence


def _note(evidence: Evidence, words: list[str]) -> None:  # noqa: C901 - one case a kind of line
    match words:
        case _ if evidence.end is not None:
            evidence.strange.append("a line after the end")
        case ["ready"]:
            evidence.ready = True
        case ["end", code]:
            evidence.end = int(code)
        case ["empty"]:
            evidence.empty = True
        case ["patch_failed", why]:
            evidence.patch_failed = why or "git apply failed"
        case ["dropped", path]:
            evidence.dropped.append(path)
        case ["ran", outcome, test]:
            evidence.phases.setdefault(test, []).append(("ran", outcome))
        case ["changed", path]:
            evidence.strange.append(f"{path} was not what the grader had written when it was read")
        case ["collect", "failed", node, why]:
            evidence.uncollected[node] = why
        case ["collect", "skipped", *_]:
            pass  # its canaries are missing, which says enough
        case [phase, outcome, test, why]:
            evidence.phases.setdefault(test, []).append((phase, outcome))
            if outcome == "failed":
                evidence.why.setdefault(test, why)
        case _:
            evidence.strange.append(f"an unreadable line: {words[0][:40]}")


# Judgement


def judge(
    evidence: Evidence, expectation: Expectation, canaries: Mapping[str, Canary], *, limit: str = ""
) -> tuple[Grade, str]:
    """The grade, and one line that says why. `limit` is the resource limit that the run hit, if any."""
    if evidence.patch_failed:
        return Grade.PATCH_FAILED, evidence.patch_failed
    if evidence.empty:
        return Grade.EMPTY, "only protected files were changed"
    if limit and evidence.end is None:
        return Grade.TIMEOUT, limit
    if contradiction := _contradiction(evidence, expectation, canaries):
        return Grade.TAMPERED, contradiction
    shortfall = _shortfall(evidence, expectation)
    if shortfall and limit:
        return Grade.TIMEOUT, limit
    return (Grade.UNRESOLVED, shortfall) if shortfall else (Grade.RESOLVED, "")


def _contradiction(evidence: Evidence, expectation: Expectation, canaries: Mapping[str, Canary]) -> str:
    """How the evidence contradicts itself, "" if it does not."""
    if evidence.end is None:  # a crash is honest, a crash that reports success is not
        return "" if evidence.exit_code else "the process left with exit code 0 before pytest had ended"
    if evidence.end != evidence.exit_code:
        return f"pytest ended with {evidence.end}, its process with {evidence.exit_code}"
    if evidence.strange:
        return evidence.strange[0]
    if evidence.end in (
        2,
        3,
        4,
    ):  # interrupted, internal error, usage: pytest itself says that it is not to be believed
        return ""
    for test, phases in evidence.phases.items():
        if phases.count(("ran", "passed")) + phases.count(("ran", "failed")) > 1:
            return f"{test} was called more than once"
        if ("ran", "failed") in phases and ("call", "passed") in phases:
            return f"{test} failed and was reported as passed"
    for path, canary in canaries.items():
        if evidence.collected(path) and (complaint := _dead(path, canary, evidence, expectation)):
            return complaint
    return "" if evidence.end == _TESTS_FAILED else f"exit code {evidence.end} although a test must fail"


def _dead(path: str, canary: Canary, evidence: Evidence, expectation: Expectation) -> str:
    """How the canary of one file that was read says that something is wrong."""
    passing, failing = f"{path}::{canary.passing}", f"{path}::{canary.failing}"
    if passing not in evidence.phases or not evidence.failed(failing):
        return f"{path}: a test that must fail did not"
    tests = [test for test in expectation.ids if _file(test) == path]
    if not evidence.passed(passing) and any(evidence.passed(test) for test in tests):
        return f"{path}: a test that must pass did not, others did"  # all failing is a broken fixture, and honest
    gone = [t for t in tests if t not in evidence.phases and t.count("::") == 1 and "[" not in t]
    return f"{gone[0]} is in its file and did not run" if gone else ""


def _shortfall(evidence: Evidence, expectation: Expectation) -> str:
    """What keeps the rule from being met, "" if nothing does."""
    if evidence.end is None:
        return f"the process ended before pytest did (exit code {evidence.exit_code})"
    if evidence.end != _TESTS_FAILED:
        return f"pytest ended with exit code {evidence.end}"
    wrong = [test for test in expectation.passing if not evidence.passed(test)]
    wrong += [test for test in expectation.failing if not evidence.failed(test)]
    if not wrong:
        return ""
    first = wrong[0]
    why = evidence.why.get(first) or next(iter(evidence.uncollected.values()), "") or "did not run"
    return f"{len(wrong)} of {len(expectation.passing) + len(expectation.failing)} tests, {first}: {why}"


# Answers


class Answers:
    """The answers of one pack, opaque to who holds them; equal patches of a task cost one run.

    Verdicts are kept in memory by (task and answer, patch, grader version). Time-outs and lost sandboxes are not kept.
    A time-out is asked again once, when less runs beside it, and what may be a flaky test `confirm` times.
    """

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        self._answers = answers
        self._runs: dict[str, asyncio.Task[Verdict]] = {}
        self._going = 0

    async def grade(self, task: Task, patch: str, cfg: config.Sandbox) -> Verdict:
        answer = self._answer(task)
        key = digest(json.dumps(to_row(task)), json.dumps(to_row(answer)), patch, GRADER_VERSION)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = asyncio.create_task(self._settled(task, patch, answer, cfg))
            run.add_done_callback(lambda ended: self._forget(key, ended))
        return await asyncio.shield(run)  # who gives up waiting must not take the run from the others

    async def _settled(self, task: Task, patch: str, answer: Answer, cfg: config.Sandbox) -> Verdict:
        verdict = await self._once(task, patch, answer, cfg)
        if verdict.grade is Grade.TIMEOUT:
            await self._calm(cfg.grade_s)
            verdict = _after(verdict, await self._once(task, patch, answer, cfg))
        for _ in range(cfg.confirm):
            if not _regressed(verdict, answer):
                break
            verdict = _confirmed(verdict, await self._once(task, patch, answer, cfg))
        return verdict

    async def _once(self, task: Task, patch: str, answer: Answer, cfg: config.Sandbox) -> Verdict:
        self._going += 1
        try:
            return await grade(task, patch, answer, cfg)
        finally:
            self._going -= 1

    async def _calm(self, wait_s: float) -> None:
        """Wait until half as much runs here as now, but not for long: other grades may keep coming."""
        most, deadline = self._going // 2, time.monotonic() + wait_s
        while self._going > most and time.monotonic() < deadline:  # noqa: ASYNC110 - an event belongs to one loop
            await asyncio.sleep(min(0.2, wait_s))

    async def validate(self, task: Task, cfg: config.Sandbox, *, runs: int) -> list[str]:
        """As the function of that name, with the answer of this pack."""
        return await validate(task, self._answer(task), cfg, runs=runs)

    def official(self, suite: Iterable[Task]) -> list[dict[str, Any]]:
        """The rows that the official harness grades these tasks by. ValueError where it cannot."""
        return [swebench.official(task, self._answer(task)) for task in suite]

    def _answer(self, task: Task) -> Answer:
        if task.id not in self._answers:
            raise ValueError(f"{task.id} has no answer in this pack; tasks.path names another one than its answers")
        return self._answers[task.id]

    def _forget(self, key: str, run: asyncio.Task[Verdict]) -> None:
        if run.cancelled() or run.exception() or run.result().grade is Grade.TIMEOUT:
            self._runs.pop(key, None)


def patience_s(cfg: config.Sandbox, *, setup_s: float) -> float:
    """No grade takes longer, its repetitions included, where a sandbox takes `setup_s` to come and go."""
    return cfg.grade_s + (2 + cfg.confirm) * (cfg.grade_s + setup_s)


def _after(first: Verdict, second: Verdict) -> Verdict:
    """The second of two verdicts, and what both took."""
    return dataclasses.replace(second, runs=first.runs + second.runs, seconds=first.seconds + second.seconds)


def _regressed(verdict: Verdict, answer: Answer) -> bool:
    """Whether all that had failed before passes, and something that had passed does not."""
    passed = set(verdict.passed)
    return (
        verdict.grade is Grade.UNRESOLVED
        and passed.issuperset(answer.fail_to_pass)
        and not passed.issuperset(answer.pass_to_pass)
    )


def _confirmed(first: Verdict, again: Verdict) -> Verdict:
    """Of two runs of one patch: their verdict if they agree, that of a forgery, else FLAKY."""
    both = _after(first, again)
    if again.grade in (first.grade, Grade.TAMPERED):
        return both
    passed = tuple(test for test in first.passed if test in again.passed)
    failed = tuple(dict.fromkeys((*first.failed, *again.failed)))
    said = f"{first.grade} ({first.reason}), and {again.grade} in run {both.runs}"
    return dataclasses.replace(both, grade=Grade.FLAKY, passed=passed, failed=failed, reason=said)


def answers_of(path: Path) -> Answers:
    """The answers of the pack at `path`. ValueError if there are none."""
    return Answers(pack.answers(path))


# Validation


async def validate(task: Task, answer: Answer, cfg: config.Sandbox, *, runs: int) -> list[str]:
    """Reasons to refuse a task, as `name: what was seen`; none for a good one. SandboxError if a sandbox dies.

    Good: the reference patch resolves it in each of `runs` runs, no change at all in none (that is run, not assumed),
    the visible tests pass on the untouched checkout, and the repository holds one commit and nothing of the answer.
    """
    if not answer.fail_to_pass:
        return ["no_f2p: fail_to_pass is empty"]
    if answer.parser != "pytest" and not scripted.mine(answer):
        return [f"unknown_parser: {answer.parser}"]
    gold = [await _hidden(task, answer.patch, answer, cfg) for _ in range(runs)]
    empty = [await _hidden(task, "", answer, cfg) for _ in range(runs)]
    refusals = _gold_refusals(gold) + _empty_refusals(empty)
    refusals += [f"visible_fails: {test}" for test in await _visible_failures(task, answer, empty, cfg)][:1]
    return refusals + await _leaks(task, answer, cfg)


async def settle(task: Task, answer: Answer, cfg: config.Sandbox, *, runs: int) -> Ruling:
    """As `validate`, for a row of a public data set, of which tests nobody has seen here.

    The visible tests are found: those of pass_to_pass that pass in each run on the untouched checkout. What must pass
    before and after, and does not do so in every run, is to be left out. Instable tests that decide refuse the task.
    """
    if not answer.fail_to_pass:
        return Ruling(reasons=("no_f2p: fail_to_pass is empty",))
    assert scripted.mine(answer), f"{task.id}: public rows have scripts, their own or made for them"
    gold = [await _hidden(task, answer.patch, answer, cfg) for _ in range(runs)]
    if reasons := _limit_refusals(gold):
        return Ruling(reasons=tuple(reasons))
    empty = [await _hidden(task, "", answer, cfg) for _ in range(runs)]
    unstable = tuple(t for t in (*answer.pass_to_pass, *answer.expected_failures) if _wavers(t, gold, empty))
    wavering = [t for t in answer.fail_to_pass if _wavers(t, gold, empty)]
    stable = pack.without(answer, unstable)
    gold, empty = [_again(v, stable) for v in gold], [_again(v, stable) for v in empty]
    reasons = [f"unstable_f2p: {wavering[0]} and {len(wavering) - 1} more"] if wavering else []
    reasons += _gold_refusals(gold) + _empty_refusals(empty)
    if reasons:
        return Ruling(reasons=tuple(reasons), unstable=unstable)
    visible = await _visible(task, stable.pass_to_pass, cfg, runs=runs)
    leaks = await _leaks(dataclasses.replace(task, visible=visible), stable, cfg)
    return Ruling(reasons=tuple(leaks), unstable=unstable, visible=visible)


def _wavers(test: str, *sides: Sequence[Verdict]) -> bool:
    """Whether runs of the same patch say different things of a test."""
    return any(len({test in verdict.passed for verdict in runs}) > 1 for runs in sides)


def _again(verdict: Verdict, answer: Answer) -> Verdict:
    """The verdict of a run, had only these tests been asked for. `passed` holds what is as it should be."""
    if verdict.grade not in (Grade.RESOLVED, Grade.UNRESOLVED):
        return verdict
    failed = tuple(test for test in scripted.decisive(answer) if test not in verdict.passed)
    # a run that did not end is no run in which only these tests were wrong
    mended = verdict.failed and not failed and verdict.exit_code >= 0
    if not mended:
        return dataclasses.replace(verdict, failed=failed)
    return dataclasses.replace(verdict, grade=Grade.RESOLVED, reason="", failed=())


def _limit_refusals(gold: Sequence[Verdict]) -> list[str]:
    """A reference patch that meets a limit says that the limit is wrong, not the task."""
    hit = [verdict.reason for verdict in gold if verdict.grade is Grade.TIMEOUT]
    return [f"wrong_limits: {hit[0]} in {len(hit)} of {len(gold)} runs of the reference patch"] if hit else []


_CAN_TEST = "import tomllib, pytest; pytest.hookimpl(wrapper=True)"  # what grade_inside asks for


async def _visible(task: Task, tests: Sequence[str], cfg: config.Sandbox, *, runs: int) -> tuple[str, ...]:
    """Those of the tests that pass on the untouched checkout each time; none where its Python cannot run ours."""
    async with sandbox.open_sandbox(_spec(task, cfg), backend=cfg.backend) as box:
        if (await box.exec(["python", "-P", "-c", _CAN_TEST])).exit_code != 0:
            return ()
        names = sorted({_file(test) for test in tests if ".py::" in test})
        listed = await box.exec(["git", "-c", "safe.directory=*", "ls-files", "-z"], output_bytes=_AUDIT_BYTES)
        there = set(listed.output.decode(errors="surrogateescape").split("\0")) & set(names)
    found = tuple(test for test in tests if _file(test) in there)
    for _ in range(runs if found else 0):
        verdict = await _run(task, "", Expectation(passing=found), {}, cfg)
        if verdict.grade not in (Grade.RESOLVED, Grade.UNRESOLVED):
            return ()
        found = verdict.passed
        if not found:
            break
    return found


def _gold_refusals(gold: Sequence[Verdict]) -> list[str]:
    wrong = [verdict for verdict in gold if verdict.grade is not Grade.RESOLVED]
    if dropped := gold[0].dropped:
        return [f"gold_protected: the reference patch changes {dropped[0]}, which is not graded"]
    if not wrong:
        return []
    first = wrong[0]
    seen = f"{first.grade}, {first.reason}"
    if len(wrong) < len(gold):
        return [f"gold_flaky: {len(wrong)} of {len(gold)} runs: {seen}"]
    if first.grade is Grade.TIMEOUT:
        return [f"too_slow: {seen}"]
    ran = first.grade is not Grade.UNRESOLVED or first.exit_code == _TESTS_FAILED
    return [f"gold_fails: {seen}" if ran else f"nothing_parsed: {seen}"]


def _empty_refusals(empty: Sequence[Verdict]) -> list[str]:
    passed = sum(verdict.grade is Grade.RESOLVED for verdict in empty)
    if passed == len(empty):
        return ["empty_passes: the hidden tests pass on the untouched checkout"]
    return [f"empty_flaky: the untouched checkout passes in {passed} of {len(empty)} runs"] if passed else []


async def _visible_failures(task: Task, answer: Answer, empty: Sequence[Verdict], cfg: config.Sandbox) -> list[str]:
    """Visible tests that fail on the untouched checkout."""
    hidden = {*(file.path for file in answer.files), *diffs.paths(answer.test_patch)}
    runs = list(empty)
    replaced = tuple(test for test in task.visible if _file(test) in hidden)
    if replaced:  # the grading run saw the hidden version of their files
        alone = await _run(task, "", Expectation(passing=task.visible), {}, cfg)
        return [test for test in task.visible if test not in alone.passed]
    return [test for test in task.visible if any(test not in verdict.passed for verdict in runs)]


_AUDIT = r"""
git() { command git -c safe.directory='*' "$@"; }
git cat-file --batch-all-objects --batch-check='object %(objecttype) %(objectname)' || exit 3
git rev-list --objects --no-object-names HEAD | sed 's/^/reachable /'
find . \( -path ./.git -o -name site-packages -o -name node_modules \) -prune \
    -o \( -name .pytest_cache -o -name '*.pyc' \) -print | sed 's/^/residue /'
for name in "$@"; do
    [ "$PUBLIC" ] && git grep -qwF -e "$name" HEAD && continue
    grep -rlwF --exclude-dir=.git -e "$name" . | sed "s/^/mention $name in /"
done
export GIT_INDEX_FILE=$(mktemp -u) GIT_OBJECT_DIRECTORY=$(mktemp -d) GIT_ALTERNATE_OBJECT_DIRECTORIES=$PWD/.git/objects
git read-tree HEAD && git apply --cached --whitespace=nowarn - || exit 0
git diff-index --cached --no-renames --diff-filter=AM HEAD | cut -d ' ' -f 4 | sed 's/^/gold /'
"""


async def _leaks(task: Task, answer: Answer, cfg: config.Sandbox) -> list[str]:
    """What the repository layer holds of the answer or of its history.

    What a public row's base commit says is no secret: the names of its tests and copies of its files are not counted.
    """
    known = {_name(test) for test in task.visible}
    names = sorted({_name(test) for test in answer.fail_to_pass} - known)
    public = scripted.mine(answer)
    async with sandbox.open_sandbox(_spec(task, cfg), backend=cfg.backend) as box:
        result = await box.exec(
            ["bash", "-c", _AUDIT, "audit", *names],
            env={"PUBLIC": "yes" if public else ""},
            stdin=answer.patch.encode(errors="surrogateescape"),
            timeout=cfg.grade_s,
            output_bytes=_AUDIT_BYTES,
        )
    if result.exit_code != 0 or result.truncated:
        return [f"leak_found: the repository cannot be read: {result.output[-200:].decode(errors='replace')}"]
    return _read_audit(result.output.decode(errors="replace").splitlines(), public=public)


def _name(test: str) -> str:
    return test.rpartition("::")[2].partition("[")[0]


def _read_audit(lines: Iterable[str], *, public: bool) -> list[str]:
    said: dict[str, list[str]] = {}
    for line in lines:
        kind, _, rest = line.partition(" ")
        said.setdefault(kind, []).append(rest)
    objects = {key: kind for kind, _, key in (entry.partition(" ") for entry in said.get("object", []))}
    refusals = []
    commits = sum(kind == "commit" for kind in objects.values())
    if commits != 1:
        refusals.append(f"not_one_commit: the repository holds {commits} commits")
    if unreachable := sorted(set(objects) - set(said.get("reachable", []))):
        refusals.append(f"leak_found: {len(unreachable)} objects that HEAD does not reach, {unreachable[0]}")
    secret = set(objects) - set(said.get("reachable", []) if public else [])
    if known := sorted(set(said.get("gold", [])) & secret):
        refusals.append(f"leak_found: a file of the reference patch is in the repository, blob {known[0]}")
    for kind, text in (("residue", "left from a test run"), ("mention", "a hidden test's name")):
        if found := said.get(kind):
            refusals.append(f"leak_found: {text}: {found[0]}")
    return refusals
