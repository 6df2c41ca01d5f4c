"""Reference patches as edits, for demonstrations on training tasks. Nobody who is graded may see them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from entropo_ray.tasks import diffs, pack

Edits = Mapping[str, tuple["Edit", ...]]  # problem of a task -> what its reference patch does, in order

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? ")


@dataclass(frozen=True, slots=True)
class Edit:
    """One hunk: whole lines of a file, and what takes their place."""

    path: str
    first: int  # line at which `old` starts once the edits before it are made
    old: str
    new: str


def edits(path: str, ids: Sequence[str]) -> dict[str, tuple[Edit, ...]]:
    """The edits of the reference patches of some tasks of a pack, by problem.

    ValueError, one line: a task that is not for training or has no answer, or a patch that is more than changed lines
    of existing files.
    """
    home = Path(path).expanduser()
    answers, by_id = pack.answers(home), {task.id: task for task in pack.tasks(home)}
    found: dict[str, tuple[Edit, ...]] = {}
    for task in (by_id[key] for key in ids):
        if task.split != "train" or task.id not in answers:
            raise ValueError(
                f"{task.id}: split={task.split}: reference patches are shown for training tasks alone; "
                "give sft.split=train or sft.teacher=scripted"
            )
        try:
            found[task.problem] = tuple(_edits(answers[task.id].patch))
        except ValueError as error:
            raise ValueError(f"{task.id}: the reference patch {error}; give sft.teacher=scripted") from error
    return found


def _edits(patch: str) -> Iterator[Edit]:
    for change in diffs.changes(patch):
        if change.before is None or change.before != change.after or not change.hunks:
            raise ValueError(f"does more to {change.after or change.before} than change lines")
        shift = 0
        for start, lines in _hunks(change.hunks):
            old, new = ("".join(line[1:] for line in lines if line[0] in sides) for sides in (" -", " +"))
            if not old.strip():
                raise ValueError(f"changes {change.before} where nothing stands")
            yield Edit(change.before, start + shift, old.removesuffix("\n"), new.removesuffix("\n"))
            shift += new.count("\n") - old.count("\n")


def _hunks(lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(first line of the file before, its lines with their signs) of each hunk."""
    starts = [i for i, line in enumerate(lines) if line.startswith("@@ ")]
    if not starts:
        raise ValueError("holds bytes, not lines")
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        head = _HUNK.match(lines[start])
        if head is None:
            raise ValueError(f"has a hunk that cannot be read: {lines[start].strip()[:60]!r}")
        yield int(head[1]), [line for line in lines[start + 1 : stop] if line[0] in " -+"]
