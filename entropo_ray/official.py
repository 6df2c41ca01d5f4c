"""The official numbers: predictions through SWE-bench's own harness, and its verdicts held against ours.

The harness runs as a process of its own, since it lowers the limits of the process that it runs in. Its containers are
root, have a network and may mount: run it on a node that nothing else needs. All that it would find out late, in the
middle of a run or not at all, is checked before the start.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from entropo_ray.records import Grade, Graded, Prediction
from entropo_ray.sandbox import SandboxError

_COLUMNS = (
    "instance_id",
    "image",
    "repo",
    "version",
    "FAIL_TO_PASS",
    "PASS_TO_PASS",
    "log_parser",
    "eval_type",
    "eval_script",
)
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_COMMAND = "from swebench.cli.cli import main; main()"  # by string: this process must not load it
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MODEL = re.compile(r"[A-Za-z0-9][\w.@+-]*(/[A-Za-z0-9][\w.@+-]*)*")
_STOP_S = 120.0  # for the start and the end of one container
_ENGINE_S = 60.0  # for one word with the engine
_PATCH_FAILED, _TIMED_OUT = ">>>>> Patch Apply Failed", "Test timed out after"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the harness says of one prediction."""

    task_id: str
    resolved: bool  # as the official report counts it: whatever went wrong is unresolved
    grade: Grade | None  # None where not the patch but the harness or its surroundings failed
    failed: tuple[str, ...]  # expected tests that did not pass
    reason: str  # one line, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run of the harness."""

    run_id: str
    model: str
    results: tuple[Result, ...]  # in the order of the predictions
    infra: tuple[str, ...]  # ids whose surroundings failed, as the harness sees it
    ambiguous: tuple[str, ...]  # ids of which it cannot tell
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two verdicts on one prediction."""

    task_id: str
    official: Grade | None
    ours: Grade | None
    agree: bool | None  # None where one of them has no verdict
    official_reason: str  # one line each, for people
    our_reason: str


# A run


def run(
    rows: Sequence[Mapping[str, Any]],
    predictions: Sequence[Prediction],
    *,
    to: Path,
    run_id: str = "",
    workers: int = 1,
    timeout_s: int = 1800,
    start_s: float = 300.0,
) -> Report:
    """Grade predictions by the official harness in the empty or new directory `to`, which keeps its logs.

    `rows` are rows of swebench 5; the engine is the one that DOCKER_HOST names. ValueError, one line, for what cannot
    be graded; SandboxError if the engine does not answer or the harness fails or does not end.
    """
    run_id = run_id or f"entropo-{uuid.uuid4().hex[:12]}"
    check(rows, predictions, run_id=run_id)
    if workers < 1 or timeout_s < 1:
        raise ValueError(f"official: workers={workers}, timeout_s={timeout_s}: both have to be 1 or more")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"official: {to} is in the way; give an empty or a new directory")
    named = {prediction.instance_id for prediction in predictions}
    asked = [dict(row) for row in rows if row["instance_id"] in named]
    _check_engine({str(row["image"]) for row in asked})
    to.mkdir(parents=True, exist_ok=True)
    _write(to / "rows.jsonl", asked)
    _write(to / "predictions.jsonl", [asdict(prediction) for prediction in predictions])
    words = [
        sys.executable,
        "-P",
        "-c",
        _COMMAND,
        "eval",
        "rows.jsonl",
        "-p",
        "predictions.jsonl",
        "--run-id",
        run_id,
        "--report-dir",
        "report",
    ]
    words += ["-j", str(workers), "-t", str(timeout_s)]
    began = time.monotonic()
    try:
        _harness(words, to, deadline_s=start_s + math.ceil(len(asked) / workers) * (timeout_s + _STOP_S))
    finally:
        _remove_containers(run_id)
    return read(to, predictions, run_id=run_id, seconds=time.monotonic() - began)


def check(rows: Sequence[Mapping[str, Any]], predictions: Sequence[Prediction], *, run_id: str) -> None:
    """ValueError, one line, for the first thing that the harness would stumble over."""
    if not _SAFE.fullmatch(run_id):
        raise ValueError(f"official: run_id={run_id!r}: letters, digits and _ . - make a run id")
    for row in rows:
        for column in _COLUMNS:
            if row.get(column) is None:
                raise ValueError(f"official: row {row.get('instance_id')}: column {column} is missing; see swebench 5")
        if row["FAIL_TO_PASS"] in ([], (), "[]"):
            raise ValueError(f"official: row {row['instance_id']}: FAIL_TO_PASS is empty: every patch would resolve it")
    for what, ids in (
        ("rows", [str(r["instance_id"]) for r in rows]),
        ("predictions", [p.instance_id for p in predictions]),
    ):
        if repeated := [key for key, times in Counter(ids).items() if times > 1]:
            raise ValueError(f"official: two {what} share an id: {repeated[0]!r}")
    models = sorted({prediction.model_name_or_path for prediction in predictions})
    if len(models) != 1 or not _MODEL.fullmatch(models[0]):
        raise ValueError(
            f"official: model_name_or_path={', '.join(models) or 'none'}: give all one name, as owner/name"
        )
    known = {row["instance_id"] for row in rows}
    for prediction in predictions:
        _check_patch(prediction, known)


def _check_patch(prediction: Prediction, known: set[Any]) -> None:
    key, patch = prediction.instance_id, prediction.model_patch
    if key not in known:
        raise ValueError(f"official: {key}: a prediction without a row; take it out, or add its row")
    if not _SAFE.fullmatch(key):
        raise ValueError(f"official: {key!r}: letters, digits and _ . - make an id")
    if patch and not patch.endswith("\n"):
        raise ValueError(f"official: {key}: its patch does not end in a line feed, so that it would not apply")
    if patch and not patch.strip():
        raise ValueError(f"official: {key}: its patch is white space; an empty one is ''")
    try:
        patch.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"official: {key}: its patch is no UTF-8: {error}") from error


def _check_engine(images: set[str]) -> None:
    """SandboxError if no engine answers, ValueError if it lacks an image: the harness would try to fetch it."""
    answer = _docker("version", "--format", "{{.Server.Version}}")
    if answer.returncode:
        raise SandboxError(f"official: no Docker engine at DOCKER_HOST={_host()}: {_last(answer.stderr)}")
    if images and _docker("image", "inspect", "--format", "ok", *sorted(images)).returncode == 0:
        return
    for image in sorted(images):
        if _docker("image", "inspect", "--format", "ok", image).returncode:
            raise ValueError(f"official: image {image} is not on this node; load it first: docker pull {image}")


def _docker(*words: str) -> subprocess.CompletedProcess[str]:
    """One word with the engine. ValueError without the command, SandboxError without an answer."""
    try:
        return subprocess.run(["docker", *words], capture_output=True, text=True, timeout=_ENGINE_S, check=False)
    except FileNotFoundError as error:
        raise ValueError("official: no `docker` command on PATH, which the harness needs; install it") from error
    except subprocess.TimeoutExpired as error:
        raise SandboxError(f"official: waited {_ENGINE_S:.0f} s for docker {words[0]} at {_host()}") from error


def _host() -> str:
    return os.environ.get("DOCKER_HOST", "the default socket")


def _harness(words: Sequence[str], folder: Path, *, deadline_s: float) -> None:
    """Run the harness to its end. SandboxError, with its last words, if it fails or does not end in time."""
    with (folder / "harness.log").open("wb") as log:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | _OFFLINE,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired as error:
            raise SandboxError(f"official: waited {deadline_s:.0f} s for the harness in {folder}") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        said = _last((folder / "harness.log").read_text(errors="replace"))
        raise SandboxError(f"official: the harness in {folder} ended with exit code {code}: {said}")


def _remove_containers(run_id: str) -> None:
    """Remove what a run left, and nothing else: a killed harness removes nothing."""
    listed = _docker("ps", "--all", "--format", "{{.ID}} {{.Names}}", "--filter", f"name={run_id}")
    ours = re.compile(rf"(\w+) sweb\.eval\..*\.{re.escape(run_id)}(\.\d+)?")
    left = [found[1] for line in listed.stdout.splitlines() if (found := ours.fullmatch(line))]
    if left:
        _docker("rm", "--force", *left)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:400] if lines else ""


# What it left


def read(folder: Path, predictions: Sequence[Prediction], *, run_id: str, seconds: float = 0.0) -> Report:
    """The report of a run that ended in `folder`. ValueError if its summary is missing or contradicts its parts."""
    model = predictions[0].model_name_or_path
    name = model.replace("/", "__")
    summary_path = folder / "report" / f"{name}.{run_id}.json"
    if not summary_path.is_file():
        raise ValueError(f"official: {summary_path} is missing: the run {run_id} did not come to its end")
    summary = json.loads(summary_path.read_text())
    logs = folder / "logs/run_evaluation" / run_id / name
    results = tuple(_result(prediction, logs / prediction.instance_id, summary) for prediction in predictions)
    counted = {result.task_id for result in results if result.resolved}
    if counted != set(summary["resolved_ids"]):
        one = min(counted ^ set(summary["resolved_ids"]))
        raise ValueError(f"official: {summary_path}: {one} is resolved there or in its own report, not in both")
    return Report(
        run_id=run_id,
        model=model,
        results=results,
        infra=tuple(summary["infra_failure_ids"]),
        ambiguous=tuple(summary["ambiguous_failure_ids"]),
        seconds=seconds,
    )


def _result(prediction: Prediction, logs: Path, summary: Mapping[str, Any]) -> Result:
    key = prediction.instance_id
    if not prediction.model_patch:
        return Result(task_id=key, resolved=False, grade=Grade.EMPTY, failed=(), reason="the patch is empty")
    report = _instance_report(logs / "report.json", key)
    why = summary["failure_reasons"].get(key, "")
    if report is None:
        grade, reason = _without_report(logs / "run_instance.log")
        return Result(task_id=key, resolved=False, grade=grade, failed=(), reason=f"{why}: {reason}" if why else reason)
    failed = tuple(test for part in report.get("tests_status", {}).values() for test in part["failure"])
    if report["resolved"]:
        return Result(task_id=key, resolved=True, grade=Grade.RESOLVED, failed=failed, reason="")
    infra = key in summary["infra_failure_ids"]
    said = (
        f"{len(failed)} tests, {failed[0]}" if failed else "" if report["patch_successfully_applied"] else "no test log"
    )
    reason = ": ".join(part for part in (why, said) if part)
    return Result(task_id=key, resolved=False, grade=None if infra else Grade.UNRESOLVED, failed=failed, reason=reason)


def _instance_report(path: Path, key: str) -> Mapping[str, Any] | None:
    """The report of one instance, None where the harness wrote none that can be read."""
    try:
        report = json.loads(path.read_text())[key]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    return dict(report)


def _without_report(log: Path) -> tuple[Grade | None, str]:
    """Why an instance has no report: its patch, its time, or something that is no fault of it."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    if _PATCH_FAILED in text:
        return Grade.PATCH_FAILED, _last(text.rpartition(_PATCH_FAILED)[2].partition("Check (")[0])
    if _TIMED_OUT in text:
        return Grade.TIMEOUT, _TIMED_OUT + text.rpartition(_TIMED_OUT)[2].partition("\n")[0]
    said = _last(text.rpartition("\nCheck (")[0] or text)
    return None, re.sub(r"^\S*Error: (Error in evaluation for \S+: )?", "", said) or "no log"


# Agreement


def agreement(report: Report, ours: Sequence[Graded]) -> tuple[Comparison, ...]:
    """The verdicts of both graders by id; an id that only one of them has is there with None for the other.

    They agree if both say resolved or both do not. ValueError for two verdicts of ours on one task.
    """
    if repeated := [key for key, times in Counter(g.task_id for g in ours).items() if times > 1]:
        raise ValueError(f"official: two verdicts of ours on {repeated[0]}; the harness takes one prediction a task")
    theirs = {result.task_id: result for result in report.results}
    mine = {graded.task_id: graded for graded in ours}
    return tuple(_compared(key, theirs.get(key), mine.get(key)) for key in dict.fromkeys((*theirs, *mine)))


def _compared(key: str, theirs: Result | None, mine: Graded | None) -> Comparison:
    official, ours, agree = theirs.grade if theirs else None, mine.grade if mine else None, None
    if official is not None and ours is not None:
        agree = (official is Grade.RESOLVED) == (ours is Grade.RESOLVED)
    return Comparison(
        task_id=key,
        official=official,
        ours=ours,
        agree=agree,
        official_reason=theirs.reason if theirs else "no prediction",
        our_reason=mine.verdict.reason if mine and mine.verdict else "",
    )


def table(compared: Sequence[Comparison]) -> str:
    """The agreement as lines of text: counts by pair of verdicts, then every id that is not agreed on."""
    pairs = Counter((_word(c.official), _word(c.ours), c.agree) for c in compared)
    lines = [f"{'official':<12} {'ours':<12} {'agree':<6} tasks"]
    for (official, ours, agree), number in sorted(pairs.items(), key=lambda entry: (-entry[1], entry[0][:2])):
        lines.append(f"{official:<12} {ours:<12} {_AGREE[agree]:<6} {number}")
    rest = sorted((c for c in compared if not c.agree), key=lambda c: (c.agree is None, c.task_id))
    lines += [
        f"{c.task_id}: official {_said(c.official, c.official_reason)}, ours {_said(c.ours, c.our_reason)}"
        for c in rest
    ]
    return "\n".join(lines) + "\n"


_AGREE = {True: "yes", False: "no", None: "-"}


def _word(grade: Grade | None) -> str:
    return "none" if grade is None else grade.value


def _said(grade: Grade | None, reason: str) -> str:
    return f"{_word(grade)} ({reason})" if reason else _word(grade)
