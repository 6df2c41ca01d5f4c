"""Diffs as git writes them, as text: what they do to each file, the files that they make, and the way back.

Lines end at line feeds alone: a form feed or a carriage return is part of its line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_HUNK = re.compile(r"@@ -(\d+(?:,\d+)?) \+(\d+(?:,\d+)?) @@(.*\n?)", re.DOTALL)
_NOWHERE = "/dev/null"
_BARE_END = "\\ No newline at end of file\n"
_BINARY = ("GIT binary patch", "Binary files ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a diff does to one file."""

    before: str | None  # path, None where the file is made
    after: str | None  # path, None where it goes
    header: tuple[str, ...]
    hunks: tuple[str, ...]  # the lines after the header

    @property
    def text(self) -> str:
        return "".join((*self.header, *self.hunks))

    @property
    def created(self) -> str | None:
        """The whole text of the plain text file that it makes; None where it makes none."""
        if self.before is not None or not any(line.startswith("new file mode 100644") for line in self.header):
            return None
        if _is_binary(self):
            return None
        lines: list[str] = []
        for line in self.hunks:
            if line.startswith("+"):
                lines.append(line[1:])
            elif line.startswith("\\"):
                lines[-1] = lines[-1].removesuffix("\n")
        return "".join(lines)


def changes(patch: str) -> list[Change]:
    """The files of a diff, in its order. ValueError where it has text and no `diff --git` line."""
    parts: list[list[str]] = []
    for line in _lines(patch):
        if line.startswith("diff --git "):
            parts.append([])
        elif not parts:
            if line.strip():
                raise ValueError(f"is no diff of git: it starts with {line.strip()[:40]!r}")
            continue
        parts[-1].append(line)
    return [_change(part) for part in parts]


def paths(patch: str) -> list[str]:
    """Every path that a diff names, before and after."""
    named = (path for change in changes(patch) for path in (change.before, change.after))
    return list(dict.fromkeys(path for path in named if path is not None))


def reverse(patch: str) -> str:
    """The diff that undoes `patch`. ValueError for binary files and copies, which no text takes back."""
    return "".join(_reversed(change) for change in reversed(changes(patch)))


def between(path: str, old: str | None, new: str | None) -> str:
    """The diff of one file from its text before and after, None where there is no such file; "" for equal texts."""
    if old == new:
        return ""
    before, after = (_NOWHERE if text is None else f"{side}/{path}" for side, text in (("a", old), ("b", new)))
    made = ["new file mode 100644\n"] if old is None else ["deleted file mode 100644\n"] if new is None else []
    body = difflib.unified_diff(_lines(old or ""), _lines(new or ""), before, after)
    lines = (line if line.endswith("\n") else f"{line}\n{_BARE_END}" for line in body)
    return "".join([f"diff --git a/{path} b/{path}\n", *made, *lines])


def _lines(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _is_binary(change: Change) -> bool:
    return any(line.startswith(_BINARY) for line in (*change.header, *change.hunks))


def _change(lines: list[str]) -> Change:
    start = next((i for i, line in enumerate(lines) if line.startswith("@@ ")), len(lines))
    header = lines[:start]
    same = _same_path(header[0])
    before = _named(header, "--- ", "rename from ", "copy from ") or same
    after = _named(header, "+++ ", "rename to ", "copy to ") or same
    if before is None or after is None:
        raise ValueError(f"names no file: {header[0].strip()[:80]!r}")
    made = any(line.startswith("new file mode") for line in header)
    gone = any(line.startswith("deleted file mode") for line in header)
    return Change(
        before=None if made or before == _NOWHERE else before,
        after=None if gone or after == _NOWHERE else after,
        header=tuple(header),
        hunks=tuple(lines[start:]),
    )


def _named(header: Iterable[str], marked: str, *bare: str) -> str | None:
    """The path on the header line that starts with `marked` (and has a prefix a/ or b/) or with one of `bare`."""
    for line in header:
        if line.startswith(marked):
            path = _unquoted(line.removeprefix(marked).rstrip("\n").partition("\t")[0])
            return path if path == _NOWHERE else path.partition("/")[2]
        for start in bare:
            if line.startswith(start):
                return _unquoted(line.removeprefix(start).rstrip("\n"))
    return None


def _same_path(line: str) -> str | None:
    """The path of a line `diff --git a/PATH b/PATH`, None where the two differ."""
    both = line.removeprefix("diff --git ").rstrip("\n")
    left, right = both[: len(both) // 2], both[len(both) // 2 + 1 :]
    if both.startswith('"'):
        left, right = _unquoted(left), _unquoted(right)
    return left[2:] if left[:2] == "a/" and right == f"b/{left[2:]}" else None


def _unquoted(path: str) -> str:
    """A path as git would open it: odd letters stand as octal numbers between quotes."""
    if not path.startswith('"'):
        return path
    return path[1:-1].encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")


# The way back


def _reversed(change: Change) -> str:
    if _is_binary(change) or any(line.startswith("copy ") for line in change.header):
        raise ValueError(f"cannot be taken back as text: {change.header[0].strip()[:80]!r}")
    return "".join([*_back_header(change), *_back_hunks(change.hunks)])


def _back_header(change: Change) -> Iterator[str]:
    values = {start: line.removeprefix(start) for start, line in map(_split_header, change.header)}
    for start, line in map(_split_header, change.header):
        rest = line.removeprefix(start)
        match start:
            case "diff --git " if change.before is not None and change.after is not None:
                yield line if change.before == change.after else f"{start}a/{change.after} b/{change.before}\n"
            case "new file mode ":
                yield f"deleted file mode {rest}"
            case "deleted file mode ":
                yield f"new file mode {rest}"
            case "old mode " | "new mode " | "rename from " | "rename to ":
                yield start + values[_OTHER[start]]
            case "index ":
                yield re.sub(r"^(\w+)\.\.(\w+)", r"index \2..\1", rest)
            case "--- ":
                yield "--- " + _with_prefix(values["+++ "], "a")
            case "+++ ":
                yield "+++ " + _with_prefix(values["--- "], "b")
            case _:
                yield line


_OTHER = {
    "old mode ": "new mode ",
    "new mode ": "old mode ",
    "rename from ": "rename to ",
    "rename to ": "rename from ",
}
_STARTS = ("diff --git ", "new file mode ", "deleted file mode ", *_OTHER, "index ", "--- ", "+++ ")


def _split_header(line: str) -> tuple[str, str]:
    return next((start for start in _STARTS if line.startswith(start)), ""), line


def _with_prefix(path: str, side: str) -> str:
    if path.startswith(_NOWHERE):
        return path
    return f'"{side}{path[2:]}' if path.startswith('"') else f"{side}{path[1:]}"


def _back_hunks(lines: Iterable[str]) -> Iterator[str]:
    gone: list[str] = []  # both already turned round
    come: list[str] = []
    last = gone
    for line in lines:
        if line.startswith("-"):
            (last := come).append(f"+{line[1:]}")
        elif line.startswith("+"):
            (last := gone).append(f"-{line[1:]}")
        elif line.startswith("\\") and (gone or come):
            last.append(line)
        else:
            yield from (*gone, *come)
            gone.clear()
            come.clear()
            hunk = _HUNK.match(line)
            yield f"@@ -{hunk[2]} +{hunk[1]} @@{hunk[3]}" if hunk else line
    yield from (*gone, *come)
