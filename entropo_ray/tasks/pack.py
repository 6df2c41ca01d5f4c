"""A task pack on disk, the same for every source: tasks.jsonl, answers.jsonl, repos/<id>/, and `done`, written last.

Sources with imports of their own add sites/<digest>/, what repositories import; those that know whence a task comes
add provenance.jsonl, which no sandbox sees. Tasks that no longer hold are listed in quarantine.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from entropo_ray.records import Answer, Grade, Graded, Outcome, Task, from_row, to_row

_TASKS = "tasks.jsonl"
_ANSWERS = "answers.jsonl"
_REPOS = "repos"
_SITES = "sites"
_DONE = "done"
_QUARANTINE = "quarantine.jsonl"
# columns that packs of before do not have
_LATER = {f.name: f.default for f in dataclasses.fields(Answer) if f.default is not dataclasses.MISSING}
PRACTICE = "practice"  # a split for a teacher to play on: never graded, so its answers are not kept


@dataclass(frozen=True)
class Mined:
    """A task and its answer, before they are parted, and what only the making of its repository needs."""

    task: Task
    answer: Answer
    base: str = ""  # commit that the image of a public data set starts from, "" for HEAD
    bug: str = ""  # diff that makes the task's checkout of that commit, where the image holds the repaired one
    remove: tuple[str, ...] = ()  # paths of the image that show hidden tests


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A task that is left out, and why."""

    id: str
    reasons: tuple[str, ...]
    when: str  # UTC


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """What trying a task of a public data set said."""

    reasons: tuple[str, ...] = ()  # to refuse it, as `name: what was seen`
    unstable: tuple[str, ...] = ()  # tests that are not to be asked for
    visible: tuple[str, ...] = ()  # tests that pass on the untouched checkout


def without(answer: Answer, unstable: Iterable[str]) -> Answer:
    """An answer that does not ask for some tests."""
    gone = set(unstable)
    passing, failing = (
        tuple(t for t in tests if t not in gone) for tests in (answer.pass_to_pass, answer.expected_failures)
    )
    return dataclasses.replace(answer, pass_to_pass=passing, expected_failures=failing)


def repository(to: Path, task_id: str) -> Path:
    """Where the repository of a task lies in a pack; absolute."""
    return _absolute(to) / _REPOS / task_id


def site(to: Path, digest: str) -> Path:
    """Where a directory of packages lies in a pack; absolute."""
    return _absolute(to) / _SITES / digest


def write(to: Path, mined: Sequence[Mined]) -> None:
    """Make `to`, which holds the repositories already, a whole pack.

    The image of a task below `to` is kept relative, so that a pack may be moved. ValueError for repeated ids.
    """
    repeated = [key for key, times in Counter(m.task.id for m in mined).items() if times > 1]
    if repeated:
        raise ValueError(f"two tasks of {to} share an id: {repeated[0]!r}")
    for m in mined:
        assert m.answer.task_id == m.task.id, f"{m.task.id} has the answer of {m.answer.task_id}"
    to.mkdir(parents=True, exist_ok=True)
    (to / _DONE).unlink(missing_ok=True)
    lines(to / _TASKS, (to_row(_relative(m.task, to)) for m in mined))
    lines(to / _ANSWERS, (to_row(m.answer) for m in mined if m.task.split != PRACTICE))
    _aside(to / _DONE, json.dumps({"tasks": len(mined)}) + "\n")


def sweep(to: Path, wanted: Sequence[Task]) -> None:
    """Remove the repositories and sites below `to` that none of these tasks has."""
    used = {Path(place) for task in wanted for place in (task.image, task.site) if place}
    for folder in (_REPOS, _SITES):
        for place in (_absolute(to) / folder).glob("*"):
            if place not in used:
                shutil.rmtree(place)


def whole(path: Path) -> bool:
    return (path / _DONE).is_file()


def tasks(path: Path) -> list[Task]:
    """The tasks of a whole pack, images and sites made absolute."""
    home = _absolute(path)
    found = [from_row(Task, {"site": ""} | row) for row in _rows(path / _TASKS)]  # packs of before have no site
    found = [replace(t, image=str(home / t.image)) if t.image.startswith(f"{_REPOS}/") else t for t in found]
    return [replace(t, site=str(home / t.site)) if t.site.startswith(f"{_SITES}/") else t for t in found]


def answers(path: Path) -> dict[str, Answer]:
    """The answers of a whole pack by task id. For graders alone."""
    return {row["task_id"]: from_row(Answer, _LATER | row) for row in _rows(path / _ANSWERS)}


# Quarantine


def quarantine_of(path: Path) -> Path:
    """Where a pack lists the tasks that no longer hold. The file need not exist."""
    return path / _QUARANTINE


def quarantined(file: Path) -> dict[str, Quarantined]:
    """The tasks of such a list by id. ValueError for a line that is none."""
    try:
        return {row["id"]: from_row(Quarantined, row) for row in _rows(file)}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected one object a line, with id, reasons and when; found {error!r}") from error


def quarantine(file: Path, reasons: Mapping[str, Sequence[str]]) -> int:
    """Add tasks, by id with their reasons, to a list that is made if need be; how many are new to it."""
    listed = quarantined(file) if file.is_file() else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = {key: Quarantined(id=key, reasons=tuple(r), when=now) for key, r in reasons.items() if key not in listed}
    if new:
        lines(file, map(to_row, (listed | new).values()))
    return len(new)


def list_flaky(file: Path, graded: Iterable[Graded | Outcome]) -> None:
    """The tasks of flaky verdicts in the form of a quarantine: whether they are to be left out is for people to say."""
    found: dict[str, list[str]] = defaultdict(list)
    for one in graded:
        if one.grade is Grade.FLAKY and one.verdict is not None:
            found[one.task_id].append(f"flaky: {one.verdict.reason}")
    quarantine(file, found)


def _relative(task: Task, to: Path) -> Task:
    image, packages = Path(task.image), Path(task.site)
    if image == repository(to, task.id):
        task = replace(task, image=f"{_REPOS}/{task.id}")
    if task.site and packages == site(to, packages.name):
        task = replace(task, site=f"{_SITES}/{packages.name}")
    return task


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links of shared mounts


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    _aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _aside(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
