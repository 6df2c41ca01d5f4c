"""One episode: a policy, a sandbox and the limits between them; the result is always a Trajectory.

Token-in, token-out: the prompt of a turn is the prompt before it + the sampled ids + glue + the encoded observation.
What was sampled is never re-tokenised or rewritten, so what is trained on is what was sampled.

    opening -> [reply -> act -> observation] -> ... -> patch
"""

from __future__ import annotations

import array
import asyncio
import hashlib
import math
import re
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from entropo_ray import config
from entropo_ray.agent import parse, prompts, tools
from entropo_ray.chat import Chat
from entropo_ray.patches import patch_class
from entropo_ray.records import RolloutRequest, Stop, Trajectory, Turn
from entropo_ray.sandbox import BackendDown, CapacityError, Patch, Sandbox, SandboxError, SandboxLost

T = TypeVar("T")

ANSWER_S = 15.0  # a sandbox that takes so much longer than the limit it was given is lost
ABORT_S = 1.0  # time that an aborted generation or exec has to end
LINE_CHARS = 2_000


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply as the engine sampled it. `logprobs` are raw log pi at T = 1 in nats, one a token."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Literal["stop", "length"]


class Generate(Protocol):
    """The policy. Calls of one `episode` share a prefix. Raises EngineError."""

    async def __call__(self, prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Completion: ...


class EngineError(Exception):
    """No completion; nothing that the policy did."""


class PromptTooLong(EngineError):
    """The engine refused a length that the budget allowed: its window is smaller than agent.max_tokens."""


async def run_episode(
    request: RolloutRequest,
    generate: Generate,
    sandbox: Sandbox,
    chat: Chat,
    cfg: config.Agent,
    *,
    temperature: float,
    kind: str = "model",
    patched: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> Trajectory:
    """Play one episode in a sandbox that was just opened, and read its patch.

    `patched=False`: the patch is not read, and is empty; for attempts that nobody grades.
    Never raises for what the policy, the engine or the sandbox does: a lost engine or sandbox is a Stop with a reason.
    `cancelled` is asked before every call. Cancelling the task itself leaves no row.
    """
    episode = _Episode(request, generate, sandbox, chat, cfg, cancelled)
    await episode.play()
    patch = await episode.patch() if patched else _NO_PATCH
    return episode.trajectory(patch, temperature=temperature, kind=kind)


class _Ended(Exception):
    """The episode is over; carries why."""

    def __init__(self, stop: Stop, reason: str = "") -> None:
        super().__init__(reason)
        self.stop, self.reason = stop, reason


_NO_PATCH = Patch(text="", files=(), dropped=(), lossy=False)


@dataclass(slots=True)
class _Episode:
    request: RolloutRequest
    generate: Generate
    sandbox: Sandbox
    chat: Chat
    cfg: config.Agent
    cancelled: Callable[[], bool]
    started: float = field(default_factory=time.monotonic)
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)  # said, but not yet answered: joins ids with the next reply
    turns: list[Turn] = field(default_factory=list)
    malformed: int = 0  # unreadable replies in a row
    end: _Ended | None = None

    async def play(self) -> None:
        """Turns until the episode ends."""
        task = self.request.task
        state = tools.EpisodeState(task.workdir)
        self._say(self.chat.opening(prompts.system(self.cfg), prompts.task(task, self.cfg)), mask=False)
        while self.end is None:
            try:
                await self._turn(state)
            except _Ended as end:
                self.end = end

    async def _turn(self, state: tools.EpisodeState) -> None:
        """One reply and what it does. Raises _Ended by the first reason that holds."""
        self._check_before_call()
        room = self.cfg.max_tokens - len(self.ids) - len(self.pending)
        cap = min(self.cfg.max_reply_tokens, room)
        begun = time.monotonic()
        completion = await self._reply(cap)
        generate_s = time.monotonic() - begun
        start = self._append(completion)
        parsed = parse.parse(self.chat.decode(self._body(completion.token_ids)))
        self.malformed = 0 if parsed.action else self.malformed + 1
        begun = time.monotonic()
        lost = None
        try:
            result = await self._act(parsed, state, cap if completion.finish == "length" else None)
        except _Ended as end:  # the turn is recorded first: its tokens were sampled
            lost, result = end, tools.ToolResult("error", "")
        self.turns.append(self._recorded(parsed, result, start, generate_s, time.monotonic() - begun))
        if lost:
            raise lost
        self._check_after_step(parsed)

    # ---- limits, in the order of their checks ----

    def _check_before_call(self) -> None:
        if self.cancelled():
            raise _Ended(Stop.CANCELLED, "the round ended")
        self._check_limits()

    def _check_after_step(self, parsed: parse.Parsed) -> None:
        steps = len(self.turns)
        if parsed.action and parsed.action.name == "finish":
            soft = self.cfg.max_steps
            raise _Ended(Stop.AGENT if steps < soft else Stop.MAX_STEP if steps == soft else Stop.AGENT_AFTER_LIMIT)
        if 0 < self.cfg.malformed_limit <= self.malformed:
            raise _Ended(Stop.MALFORMED_LIMIT, f"{self.malformed} unreadable replies in a row: {parsed.status}")
        self.pending = self.chat.observation(self.turns[-1].observation, after=self.ids[-1])
        self._check_limits()

    def _check_limits(self) -> None:
        room = self.cfg.max_tokens - len(self.ids) - len(self.pending)
        if room < self.cfg.min_reply_tokens:
            stop = Stop.TOKEN if self.turns else Stop.CONTEXT_OVERFLOW
            raise _Ended(stop, f"room for {room} tokens of {self.cfg.max_tokens}")
        if len(self.turns) >= self.cfg.max_steps_hard:
            raise _Ended(Stop.ABS_STEP)
        if self._left() <= 0:
            raise _Ended(Stop.WALL_TIME, f"{self.cfg.wall_s:g} s have passed")

    def _left(self) -> float:
        """Seconds of the episode's one deadline."""
        return self.started + self.cfg.wall_s - time.monotonic()

    # ---- the reply ----

    async def _reply(self, cap: int) -> Completion:
        request, steps = self.request, len(self.turns)
        episode = f"{request.task.id}/{request.round}/{request.sample}"
        seed = (request.seed + steps) % (1 << 63)
        call = self.generate([*self.ids, *self.pending], episode=episode, seed=seed, max_tokens=cap)
        try:
            completion = await _bounded(call, min(self.cfg.llm_s, self._left()))
        except TimeoutError:
            if self._left() <= 0:
                raise _Ended(Stop.WALL_TIME, f"{self.cfg.wall_s:g} s passed during a generation") from None
            raise _Ended(Stop.LLM_ERROR, f"no completion within {self.cfg.llm_s:g} s") from None
        except PromptTooLong as error:
            raise _Ended(Stop.CONTEXT_OVERFLOW, _line(error)) from None
        except Exception as error:  # whatever it is, it becomes a row without a grade, never a label
            raise _Ended(Stop.LLM_ERROR, _line(error)) from None
        if len(completion.token_ids) != len(completion.logprobs) or not all(map(math.isfinite, completion.logprobs)):
            raise _Ended(Stop.LLM_ERROR, "the engine's log-probs are not finite, or not one a token")
        return completion

    def _append(self, completion: Completion) -> int:
        """Add what was said and the reply to it; where the reply starts."""
        self._say(self.pending, mask=False)
        self.pending = []
        start = len(self.ids)
        self._say(completion.token_ids, mask=True, logp=completion.logprobs)
        return start

    def _say(self, ids: Sequence[int], *, mask: bool, logp: Sequence[float] = ()) -> None:
        self.ids += ids
        self.mask += [mask] * len(ids)
        self.logp += logp if mask else [0.0] * len(ids)

    def _body(self, ids: Sequence[int]) -> Sequence[int]:
        """A reply without the id that ends it."""
        return ids[:-1] if ids and ids[-1] in self.chat.end_ids else ids

    # ---- the action ----

    async def _act(self, parsed: parse.Parsed, state: tools.EpisodeState, cap: int | None) -> tools.ToolResult:
        if parsed.action is None:
            return tools.ToolResult("error", prompts.unreadable(parsed, cap))
        limit = max(min(self.cfg.tool_s, self._left()), 0.1)
        running = tools.run(parsed.action, self.sandbox, state, self.cfg, timeout_s=limit)
        try:
            return await _bounded(running, limit + ANSWER_S)
        except TimeoutError:
            what = f"the sandbox did not answer within {limit:.0f} + {ANSWER_S:.0f} s"
            raise _Ended(Stop.INFRA_ERROR, f"{parsed.action.name}: {what}") from None
        except Exception as error:
            raise await self._blame(error) from None

    async def _blame(self, error: Exception) -> _Ended:
        """Whose fault a failure of the sandbox is: env_error where it still answers after actions of the policy."""
        lost = not isinstance(error, SandboxError) or isinstance(error, SandboxLost | BackendDown | CapacityError)
        if not lost and self.turns:
            try:
                done = await _bounded(self.sandbox.exec(["true"], timeout=ANSWER_S, cwd="/"), 2 * ANSWER_S)
            except Exception:
                return _Ended(Stop.INFRA_ERROR, _line(error))
            if done.exit_code == 0:
                return _Ended(Stop.ENV_ERROR, _line(error))
        return _Ended(Stop.INFRA_ERROR, _line(error))

    def _recorded(
        self, parsed: parse.Parsed, result: tools.ToolResult, start: int, generate_s: float, act_s: float
    ) -> Turn:
        action = parsed.action
        output = action is not None and action.name in ("execute_bash", "search")
        text, cut = shape(result.text, self.cfg, output=output)
        left = self.cfg.max_steps - len(self.turns) - 1
        if self.cfg.countdown and (action is None or action.name != "finish"):
            text += f"\n{prompts.remaining(max(left, 0))}"
        flags = set(result.flags)
        flags |= {"truncated"} if cut else set()
        flags |= {"malformed"} if action is None else set()
        flags |= {"trailing"} if parsed.trailing else set()
        return Turn(
            reply=self.chat.decode(self.ids[start:]),
            tool=action.name if action else "",
            command=parse.encode(action) if action else "",
            parse=parsed.status.value,
            observation=text,
            exit_code=-1 if result.exit_code is None else result.exit_code,
            flags=tuple(sorted(flags)),
            start=start,
            stop=len(self.ids),
            generate_s=generate_s,
            act_s=act_s,
        )

    # ---- the end ----

    async def patch(self) -> Patch:
        """The work tree's patch, whatever ended the episode; without one there must be no gradable stop."""
        assert self.end is not None
        if self.end.stop in (Stop.INFRA_ERROR, Stop.ENV_ERROR):
            return _NO_PATCH
        try:
            patch = await _bounded(self.sandbox.extract_patch(), self.cfg.extract_s)
            if patch.dropped != (".",):
                return patch
            failed = _Ended(Stop.ENV_ERROR if self.turns else Stop.INFRA_ERROR, "git cannot read the work tree")
        except TimeoutError:
            failed = _Ended(Stop.INFRA_ERROR, f"no patch within {self.cfg.extract_s:g} s")
        except Exception as error:
            failed = await self._blame(error)
        if not self.end.stop.infra:
            self.end = failed
        return _NO_PATCH

    def trajectory(self, patch: Patch, *, temperature: float, kind: str) -> Trajectory:
        assert self.end is not None
        request = self.request
        first = self.turns[0].start if self.turns else len(self.ids)
        return Trajectory(
            task_id=request.task.id,
            sample=request.sample,
            round=request.round,
            seed=request.seed,
            kind=kind,
            scaffold=prompts.scaffold(self.cfg),
            prompt=digest(self.ids[:first]),
            temperature=temperature,
            turns=tuple(self.turns),
            token_ids=tuple(self.ids),
            action_mask=tuple(self.mask),
            behaviour_logp=tuple(self.logp),
            num_turns=len(self.turns),
            num_actions=sum(self.mask),
            num_tokens=len(self.ids),
            patch=patch.text,
            patch_class=patch_class(patch.text),
            files=patch.files,
            stop=self.end.stop,
            reason=self.end.reason,
            wall_s=time.monotonic() - self.started,
            grade=None,
            verdict=None,
        )


def digest(ids: Sequence[int]) -> str:
    """Digest of token ids, equal on all machines."""
    packed = array.array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.sha256(packed.tobytes()).hexdigest()


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__


async def _bounded(work: Coroutine[Any, Any, T] | Awaitable[T], seconds: float) -> T:
    """The result of `work` within `seconds`; else it is cancelled and TimeoutError raised.

    Unlike asyncio.timeout this returns even where the work ignores its cancellation.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=max(seconds, 0.0))
        if task.cancelled():
            raise RuntimeError("cancelled from within")
        if task.done():
            return task.result()
        raise TimeoutError
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(_ignore)
            await asyncio.wait({task}, timeout=ABORT_S)


def _ignore(task: asyncio.Future[Any]) -> None:
    """Look at the result of work that came too late, or asyncio complains that nobody did."""
    if not task.cancelled():
        task.exception()


# ---- what the policy sees of a result ----

_ANSI = re.compile(r"\x1b(?:\[[0-?]*+[ -/]*+[@-~]?|\][^\x07\x1b]*+(?:\x07|\x1b\\)?|[ -/]*+[0-~]?)")


def shape(text: str, cfg: config.Agent, *, output: bool) -> tuple[str, bool]:
    """A result as the policy sees it, and whether anything was cut; at most observation_chars plus the notices.

    `output`: of a program, so terminal codes and overwritten lines are dropped and lines are cut to head and tail.
    Editor results are only bounded: their text must match the file's.
    """
    whole = text
    if output:
        text = _plain(text)
        whole = text
        text = _cut_lines(text, cfg.observation_lines)
    text = "\n".join(_cut_middle(line, LINE_CHARS) for line in text.split("\n"))
    text = _cut_middle(text, cfg.observation_chars)
    return text, text != whole


def _plain(text: str) -> str:
    """Without terminal codes and NUL; of a line that was overwritten, the last state."""
    text = _ANSI.sub("", text).replace("\0", "")
    lines = text.split("\n")
    return "\n".join(line.removesuffix("\r").rpartition("\r")[2] for line in lines)


def _cut_lines(text: str, limit: int) -> str:
    lines = text.split("\n")
    if len(lines) <= limit:
        return text
    head, tail = (limit + 1) // 2, limit // 2
    notice = f"[... {len(lines) - head - tail} lines cut ...]"
    return "\n".join([*lines[:head], notice, *lines[len(lines) - tail :]])


def _cut_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head, tail = (limit + 1) // 2, limit // 2
    return f"{text[:head]}[... {len(text) - limit} characters cut ...]{text[len(text) - tail :]}"
