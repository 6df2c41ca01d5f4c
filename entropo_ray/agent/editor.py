"""The file editor: its commands on bytes from the sandbox.

Codec, newlines and everything that an edit does not name stay as they are. A view costs one read, an edit
one write more.
"""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from entropo_ray.agent.call import Run, ToolError, ToolResult, digest_of
from entropo_ray.agent.spec import VALUE_BYTES

LISTED = 500  # entries of a directory view


@dataclass(frozen=True, slots=True)
class _Text:
    """A file's text; `encode` gives the bytes back in its own codec and newlines are never changed."""

    text: str
    codec: str

    @classmethod
    def of(cls, data: bytes, shown: str) -> _Text:
        if b"\0" in data[:8192]:
            raise ToolError(f"{shown} is a binary file")
        try:
            return cls(data.decode("utf-8"), "utf-8")
        except UnicodeDecodeError:
            return cls(data.decode("latin-1"), "latin-1")

    def encode(self, text: str) -> bytes:
        try:
            return text.encode(self.codec)
        except UnicodeEncodeError as error:
            raise ToolError(f"the file is {self.codec}, which has no {error.object[error.start]!r}") from None

    @property
    def newline(self) -> str:
        return "\r\n" if 2 * self.text.count("\r\n") > self.text.count("\n") else "\n"

    def own(self, text: str) -> str:
        """`text` with this file's newlines."""
        return text.replace("\r\n", "\n").replace("\n", "\r\n") if self.newline == "\r\n" else text


def _lines(text: str) -> list[str]:
    """Lines as `cat -n` counts them, without their ends."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _numbered(lines: Sequence[str], first: int = 1) -> str:
    return "\n".join(f"{first + i:6}\t{line}" for i, line in enumerate(lines))


async def edit(call: Run) -> ToolResult:
    return ToolResult("ok", await _EDITOR[call.text("command")](call))


async def _view(call: Run) -> str:
    try:
        data = await call.sandbox.read(call.path, VALUE_BYTES)
    except FileNotFoundError:
        raise ToolError(f"{call.shown} does not exist") from None
    except (IsADirectoryError, ValueError):  # a directory, or a file over the limit
        return await _view_other(call)
    if data.startswith(b"\xef\xbb\xbf"):
        data = data[3:]  # the mark of UTF-8 is no text
    text = _Text.of(data, call.shown).text
    lines = _lines(text)
    if "view_range" in call.arguments:
        first, last = _checked_range(call, len(lines))
        return _clipped(lines[first - 1 : last], first, len(lines), call.view_chars)
    if _concise(call, len(lines)) and (kept := _condensed(text, call.view_chars)):
        return kept
    return _clipped(lines, 1, len(lines), call.view_chars) if lines else f"{call.shown} is empty."


def _concise(call: Run, count: int) -> bool:
    longer = call.cfg.auto_concise_lines > 0 and count > call.cfg.auto_concise_lines
    return call.shown.endswith(".py") and bool(call.arguments.get("concise", longer))


def _checked_range(call: Run, count: int) -> tuple[int, int]:
    first, end = call.span("view_range")
    last = count if end == -1 else end
    if not 1 <= first <= last <= count:
        raise ToolError(f"view_range [{first}, {end}] does not fit: {call.shown} has {count} lines")
    return first, last


def _clipped(lines: Sequence[str], first: int, count: int, room: int) -> str:
    """Numbered lines up to `room` characters, with what is missing and how to see it."""
    size = kept = 0
    for line in lines:
        size += len(line) + 8
        if size > room and kept:
            break
        kept += 1
    shown = _numbered(lines[:kept], first)
    if kept == len(lines):
        return shown
    last = first + kept - 1
    return f"{shown}\n(lines {first}-{last} of {count}; go on with view_range=[{last + 1}, {first + len(lines) - 1}])"


def _condensed(text: str, room: int) -> str | None:
    """The numbered file without bodies of 4 lines and more and class docstrings of 5; None where it is not Python."""
    source = text.replace("\r\n", "\n")
    if "\r" in source:
        return None
    try:
        gaps = dict(_gaps(_parsed(source)))
    except _UNPARSED:
        return None
    lines, shown, at = _lines(source), [], 1
    while at <= len(lines):
        if at in gaps:
            shown.append(f"      \t... lines {at}-{gaps[at]} not shown")
            at = gaps[at] + 1
        else:
            shown.append(f"{at:6}\t{lines[at - 1]}")
            at += 1
    note = "(condensed; view_range or concise=false shows the rest)"
    return _cut("\n".join(shown), room) + f"\n{note}" if gaps else None


_UNPARSED = (SyntaxError, ValueError, RecursionError, MemoryError)  # whatever a parser does with a stranger's text


def _parsed(source: str | bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the policy's code, not ours
        return ast.parse(source)


def _cut(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    kept = text[: text.rfind("\n", 0, room)]
    return f"{kept}\n(more follows; use view_range)"


def _gaps(node: ast.AST) -> list[tuple[int, int]]:
    """(first, last) line of every stretch that a condensed view leaves out; the outermost only."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue  # holds no statement, and may be nested without end
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = child.body[0]
            first = min([inner.lineno, *(d.lineno for d in getattr(inner, "decorator_list", []))])
            if first > child.lineno and (child.end_lineno or 0) - first + 1 >= 4:
                found.append((first, child.end_lineno or 0))
                continue
        elif isinstance(child, ast.ClassDef) and ast.get_docstring(child, clean=False) is not None:
            docstring = child.body[0]
            if (docstring.end_lineno or 0) - docstring.lineno + 1 >= 5:
                found.append((docstring.lineno, docstring.end_lineno or 0))
        found += _gaps(child)
    return found


async def _view_other(call: Run) -> str:
    """A directory, or a range of a file that is too large to be read whole."""
    hidden = ["!", "-path", call.path, "-name", ".*", "-prune"]  # below the path, which may itself be hidden
    # -H: the path may be a link. The first record is the path's own and tells what it is.
    found = await call.exec(["find", "-H", call.path, "-maxdepth", "2", *hidden, "-o", "-printf", "%y\t%P\\0"])
    own, _, below = found.output.partition(b"\0")
    if own == b"f\t":
        return await _view_large(call)
    if own != b"d\t":
        raise ToolError(f"{call.shown} is neither a directory nor a regular file")
    return _listing(call, below)


def _listing(call: Run, output: bytes) -> str:
    entries = []
    for record in output.decode(errors="replace").split("\0"):
        kind, _, name = record.rpartition("\n")[2].partition("\t")  # a complaint of find stands before a record
        if name and (not call.arguments.get("python_only") or kind == "d" or name.endswith(".py")):
            entries.append(name + "/" * (kind == "d"))
    entries.sort()
    rest = f"\n... and {len(entries) - LISTED} more" if len(entries) > LISTED else ""
    return "\n".join(entries[:LISTED]) + rest if entries else f"{call.shown} is an empty directory."


async def _view_large(call: Run) -> str:
    if "view_range" not in call.arguments:
        raise ToolError(f"{call.shown} is larger than {VALUE_BYTES} bytes or no regular file: give view_range")
    first, last = call.span("view_range")
    if first < 1 or (last != -1 and last < first):
        raise ToolError(f"view_range [{first}, {last}] does not fit")
    end = "$" if last == -1 else str(last)
    # the program counts the lines as it goes, so one run gives both
    done = await call.exec(["sed", "-n", "-e", f"{first},{end}p", "-e", "$=", "--", call.path])
    if done.exit_code != 0 or done.truncated:
        raise ToolError(f"{call.shown}: that range is too long, or this is no regular file")
    lines = _lines(_Text.of(done.output, call.shown).text)
    count = int(lines.pop())
    if first > count or last > count:
        raise ToolError(f"view_range [{first}, {last}] does not fit: {call.shown} has {count} lines")
    return _clipped(lines, first, count, call.view_chars)


async def _read_text(call: Run) -> tuple[bytes, _Text]:
    try:
        data = await call.sandbox.read(call.path, VALUE_BYTES)
    except FileNotFoundError:
        raise ToolError(f"{call.shown} does not exist") from None
    except ValueError:
        raise ToolError(f"{call.shown} is larger than {VALUE_BYTES} bytes or no regular file") from None
    return data, _Text.of(data, call.shown)


async def _write(call: Run, before: bytes | None, after: bytes) -> None:
    if call.arguments.get("enable_linting") and call.shown.endswith(".py"):
        fault = _python_fault(after)
        if fault and (before is None or not _python_fault(before)):
            raise ToolError(f"not done, {call.shown} would no longer be Python: {fault}")
    await call.sandbox.write(call.path, after, mode=await _mode(call, before))
    call.state.remember(call.path, before, after)


async def _mode(call: Run, before: bytes | None) -> int:
    """Mode bits that a written file gets. Only a script is worth the question: other files are not executable."""
    if before is None or not before.startswith(b"#!"):
        return 0o644
    done = await call.exec(["stat", "-L", "-c", "%a", "--", call.path])
    return int(done.output, 8) if done.exit_code == 0 else 0o644


def _python_fault(data: bytes) -> str:
    try:
        _parsed(data)
    except _UNPARSED as error:
        return str(error) or type(error).__name__
    return ""


async def _create(call: Run) -> str:
    text = call.text("file_text")
    try:
        await call.sandbox.read(call.path, 1)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, ValueError):  # there is something
        raise ToolError(f"{call.shown} exists already; str_replace changes it") from None
    else:
        raise ToolError(f"{call.shown} exists already; str_replace changes it")
    await _write(call, None, text.encode())
    lines = _lines(text)
    return f"Created {call.shown}.\n{_clipped(lines, 1, len(lines), call.view_chars)}".rstrip("\n")


async def _str_replace(call: Run) -> str:
    data, file = await _read_text(call)
    old, new = file.own(call.text("old_str")), file.own(call.text("new_str"))
    if not old:
        raise ToolError("old_str is empty")
    if old == new:
        raise ToolError("old_str and new_str are the same")
    at = file.text.find(old)
    if at < 0:
        raise ToolError(f"old_str is not in {call.shown}.{_nearest(file.text, old)}")
    if file.text.find(old, at + 1) >= 0:
        places = _places(file.text, old)
        raise ToolError(f"old_str is more than once in {call.shown}, at lines {places}; make it longer")
    after = file.text[:at] + new + file.text[at + len(old) :]
    await _write(call, data, file.encode(after))
    return _edited(call, after, at, len(new))


def _places(text: str, old: str) -> str:
    places: list[str] = []
    at = text.find(old)
    while at >= 0 and len(places) < 20:
        places.append(str(text.count("\n", 0, at) + 1))
        at = text.find(old, at + 1)
    return ", ".join(places)


def _nearest(text: str, old: str) -> str:
    """A sentence naming the line that is most like the first line of `old`, white space aside; "" if none is."""
    wanted = next((squeezed for line in _lines(old) if (squeezed := "".join(line.split()))), "")
    squeezed_lines = ["".join(line.split()) for line in _lines(text)[:5000]]
    near = [wanted] if wanted in squeezed_lines else []
    if not near and len(wanted) <= 200:
        short = [line for line in squeezed_lines[:1000] if len(line) <= 200]  # near misses cost time
        near = difflib.get_close_matches(wanted, short, n=1)
    if not wanted or not near:
        return ""
    number = squeezed_lines.index(near[0]) + 1
    return f" The nearest line is\n{_numbered([_lines(text)[number - 1]], number)}"


def _edited(call: Run, after: str, at: int, length: int) -> str:
    """What an edit of after[at:at + length] left, with a few lines around it."""
    context = 4 if call.cfg.prompt == "full" else 1  # a brief prompt stands for a small context window
    lines = _lines(after)
    first = max(after.count("\n", 0, at) - context, 0)
    last = after.count("\n", 0, at + length) + 1 + context
    shown = lines[first:last]
    return f"Edited {call.shown}.\n{_clipped(shown, first + 1, len(lines), call.view_chars)}".rstrip("\n")


async def _insert(call: Run) -> str:
    data, file = await _read_text(call)
    lines = file.text.split("\n")
    count = len(lines) - (lines[-1] == "")
    number = call.number("insert_line")
    if not 0 <= number <= count:
        raise ToolError(f"insert_line {number} does not fit: {call.shown} has {count} lines")
    new = file.own(call.text("new_str").removesuffix("\n").removesuffix("\r"))
    at = len("\n".join(lines[:number])) + (number > 0)
    if at > len(file.text):  # behind a last line without a newline, which the file keeps lacking
        inserted, at = file.newline + new, len(file.text)
    else:
        inserted = new + file.newline
    after = file.text[:at] + inserted + file.text[at:]
    await _write(call, data, file.encode(after))
    return _edited(call, after, at, len(inserted.removesuffix("\n")))


async def _undo(call: Run) -> str:
    steps = call.state.edits.get(call.path)
    if not steps:
        raise ToolError(f"there is no edit of {call.shown} to undo")
    step = steps[-1]
    try:
        now = await call.sandbox.read(call.path, VALUE_BYTES)
    except (FileNotFoundError, IsADirectoryError, ValueError):
        now = None
    if now is None or digest_of(now) != step.left:
        raise ToolError(f"{call.shown} was changed by other means since its last edit; nothing was undone")
    if step.before is None:
        await call.exec(["rm", "-f", "--", call.path])
    else:
        await call.sandbox.write(call.path, step.before, mode=await _mode(call, step.before))
    steps.pop()
    return f"Undid the last edit of {call.shown}."


_EDITOR = {"view": _view, "create": _create, "str_replace": _str_replace, "insert": _insert, "undo_edit": _undo}
