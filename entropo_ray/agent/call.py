"""One call on its way to the sandbox: arguments, limits, what it remembers, what comes back."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from entropo_ray import config
from entropo_ray.agent.spec import VALUE_BYTES, Value
from entropo_ray.sandbox import ExecResult, Sandbox

UNDO_STEPS, UNDO_BYTES = 20, 4 << 20  # per file; per episode
ENV = {"PAGER": "cat", "TERM": "dumb", "LC_ALL": "C.UTF-8"}


@dataclass(frozen=True, slots=True)
class ToolResult:
    status: Literal["ok", "error", "timeout"]
    text: str
    exit_code: int | None = None  # of a shell command
    total_bytes: int = 0  # of its output, before any cut
    flags: tuple[str, ...] = ()  # timeout oom truncated


@dataclass(frozen=True, slots=True)
class Edit:
    """One undo step: what stood there (None: no file), and the digest of what the edit left."""

    before: bytes | None
    left: str


@dataclass(slots=True)
class EpisodeState:
    """What the tools remember of an episode, out of the policy's reach."""

    workdir: str
    edits: dict[str, list[Edit]] = field(default_factory=dict)

    def remember(self, path: str, before: bytes | None, after: bytes) -> None:
        """Add an undo step; the oldest go where the file's or the episode's bound is passed."""
        steps = self.edits.setdefault(path, [])
        steps.append(Edit(before, digest_of(after)))
        del steps[:-UNDO_STEPS]
        while sum(len(e.before or b"") for s in self.edits.values() for e in s) > UNDO_BYTES:
            fullest = max(self.edits.values(), key=lambda s: sum(len(e.before or b"") for e in s))
            fullest.pop(0)


class ToolError(Exception):
    """A mistake of the policy; the message is its observation."""


@dataclass(frozen=True, slots=True)
class Run:
    """One call on its way: its arguments and where it acts."""

    arguments: Mapping[str, Value]
    sandbox: Sandbox
    state: EpisodeState
    cfg: config.Agent
    timeout_s: float

    def text(self, name: str, default: str = "") -> str:
        value = self.arguments.get(name, default)
        assert isinstance(value, str), name
        return value

    def number(self, name: str, default: int = 0) -> int:
        value = self.arguments.get(name, default)
        assert isinstance(value, int), name
        return value

    def span(self, name: str) -> tuple[int, int]:
        value = self.arguments[name]
        assert isinstance(value, tuple), name
        return value

    @property
    def shown(self) -> str:
        """The path as the policy wrote it."""
        return self.text("path", ".")

    @property
    def path(self) -> str:
        return posixpath.join(self.state.workdir, self.shown)

    @property
    def view_chars(self) -> int:
        """Room for a view, so that the observation's own limit never cuts it in the middle."""
        return max(self.cfg.observation_chars - 200, 200)

    async def exec(self, argv: Sequence[str]) -> ExecResult:
        """A helper program in the repository's root; ToolError where it takes too long."""
        done = await self.sandbox.exec(
            argv, timeout=self.timeout_s, cwd=self.state.workdir, env=ENV, output_bytes=VALUE_BYTES
        )
        if done.timed_out:
            raise ToolError(f"not done within {self.timeout_s:.3g} s; ask for less")
        return done


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
