"""Running one call of a policy in a sandbox.

The logic of the tools runs here, on bytes from the sandbox; nothing is installed in the graded environment. A mistake
of the policy comes back as text with status "error"; SandboxError passes through.
"""

from __future__ import annotations

import posixpath
import re

from entropo_ray import config
from entropo_ray.agent.call import ENV, EpisodeState, Run, ToolError, ToolResult
from entropo_ray.agent.editor import edit
from entropo_ray.agent.spec import TOOLS, Action, describe
from entropo_ray.sandbox import Sandbox

__all__ = ["TOOLS", "Action", "EpisodeState", "ToolResult", "describe", "run"]

COMMAND_BYTES = 100_000  # a shell command is one element of argv, which Linux limits to 128 KiB
MATCHES, MATCHED_FILES = 100, 50  # of a search
LISTED = 500  # files whose further matches are counted


async def run(
    action: Action, sandbox: Sandbox, state: EpisodeState, cfg: config.Agent, *, timeout_s: float | None = None
) -> ToolResult:
    """Run one bound action; `timeout_s` (default cfg.tool_s) bounds what it starts in the sandbox.

    The policy's mistakes are results; SandboxError passes through.
    """
    call = Run(action.arguments, sandbox, state, cfg, timeout_s or cfg.tool_s)
    try:
        return await _RUN[action.name](call)
    except ToolError as error:
        return ToolResult("error", f"ERROR: {error}")
    except (TimeoutError, ConnectionError):  # these OSErrors are not about the policy's path
        raise
    except OSError as error:  # a path that cannot be read or written: permissions, a full disk, a file as a directory
        return ToolResult("error", f"ERROR: {call.shown}: {error.strerror or error}")


async def _finish(_: Run) -> ToolResult:
    return ToolResult("ok", "")


async def _bash(call: Run) -> ToolResult:
    command = call.text("cmd")
    if "\0" in command:
        raise ToolError("the command holds a NUL character")
    if len(command.encode(errors="replace")) > COMMAND_BYTES:
        raise ToolError(f"the command is longer than {COMMAND_BYTES} bytes: create a script and run that")
    done = await call.sandbox.exec(command, timeout=call.timeout_s, cwd=call.state.workdir, env=ENV)
    head = f"exit code: {done.exit_code}"
    if done.timed_out:
        head = f"exit code: none, killed after {call.timeout_s:.3g} s"
    head += " (out of memory)" * done.oom + " (no disk space left)" * done.disk_full
    flags = {"timeout": done.timed_out, "oom": done.oom, "truncated": done.truncated}
    return ToolResult(
        "timeout" if done.timed_out else "ok" if done.exit_code == 0 else "error",
        f"{head}\n{done.output.decode(errors='replace')}".rstrip("\n"),
        done.exit_code,
        done.total_bytes,
        tuple(name for name, holds in flags.items() if holds),
    )


async def _search(call: Run) -> ToolResult:
    term, where = call.text("search_term"), call.shown
    if "\n" in term or "\0" in term:
        raise ToolError("search_term must be one line")
    found = await call.exec(_grep(call))
    records = [record for record in _records(found.output) if record[1] is not None]
    if not records:
        if found.exit_code not in (0, 1):
            complaint = found.output.decode(errors="replace").strip().splitlines()
            raise ToolError(complaint[0] if complaint else f"grep ended with {found.exit_code}")
        hint = ""
        if not call.arguments.get("regex") and re.search(r"[\\^$*+?|\[\]()]", term):
            hint = " It was read as plain text; regex=true reads it as a regular expression."
        return ToolResult("ok", f"No match for {term!r} in {where}.{hint}")
    return ToolResult("ok", _matches(records), total_bytes=found.total_bytes)


def _grep(call: Run) -> list[str]:
    argv = ["grep", "-rnIHZ", "-E" if call.arguments.get("regex") else "-F", "--no-group-separator"]
    if glob := call.text("glob") or ("*.py" if call.arguments.get("python_only") else ""):
        argv.append(f"--include={glob}")  # before the exclusions: a first --include leaves out all other names
    name = posixpath.basename(posixpath.normpath(call.shown))
    if name in (".", "..") or not name.startswith("."):  # the exclusions would hold for the path itself as well
        argv += ["--exclude=.?*", "--exclude-dir=.?*"]
    if context := max(0, min(call.number("context"), 20)):
        argv.append(f"--context={context}")
    return [*argv, "-e", call.text("search_term"), "--", call.shown]


def _records(output: bytes) -> list[tuple[str, str | None]]:
    """(path, "line: text") of grep -nZ; the second is None for a line of another kind, such as a complaint."""
    records: list[tuple[str, str | None]] = []
    for line in output.decode(errors="replace").split("\n"):
        path, nul, rest = line.partition("\0")
        found = re.match(r"([0-9]+)([:-])", rest) if nul else None
        if found is None:
            records.append((path, None))
        else:
            records.append((path.removeprefix("./"), f"{found[1]}{found[2]} {rest[found.end() :]}"))
    return records


def _matches(records: list[tuple[str, str | None]]) -> str:
    """The first matches by file, then how many more each file has."""
    files: dict[str, list[str]] = {}
    for path, text in sorted(records, key=lambda record: record[0]):
        files.setdefault(path, []).append(text or "")
    lines, rest, room = [], [], MATCHES
    for index, (path, texts) in enumerate(files.items()):
        shown = texts[: room if index < MATCHED_FILES else 0]
        room -= len(shown)
        lines += [f"{path}:{text}" for text in shown]
        if len(shown) < len(texts):
            rest.append(f"{path}: {len(texts) - len(shown)} more lines")
    if rest:
        more = f"\n... and {len(rest) - LISTED} more files" if len(rest) > LISTED else ""
        lines.append("Not shown:\n" + "\n".join(rest[:LISTED]) + more)
    return "\n".join(lines)


_RUN = {"file_editor": edit, "execute_bash": _bash, "search": _search, "finish": _finish}
