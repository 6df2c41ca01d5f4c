"""Every noun that travels between rooms, and how each lies in Parquet.

All records are frozen and hold plain values. A record whose fields are some of another's is a projection: reading it
touches those columns alone. `[L]` counts the tokens of one trajectory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

R = TypeVar("R")


class Stop(StrEnum):
    """Why an episode ended. The first nine are the policy's, the rest nobody's answer (they carry no grade)."""

    AGENT = "agent"  # finish called with soft steps left
    MAX_STEP = "max_step"  # finish called on the step at which the countdown reached 0
    AGENT_AFTER_LIMIT = "agent_after_limit"  # finish called after that
    ABS_STEP = "abs_step"  # hard step limit
    TOKEN = "token"  # no room for another reply
    WALL_TIME = "wall_time"
    MALFORMED_LIMIT = "malformed_limit"  # that many unreadable replies in a row
    ENV_ERROR = "env_error"  # the work tree is unusable after the agent's own actions
    LLM_ERROR = "llm_error"
    CONTEXT_OVERFLOW = "context_overflow"  # the first prompt does not fit
    INFRA_ERROR = "infra_error"  # the sandbox was lost
    CANCELLED = "cancelled"

    @property
    def infra(self) -> bool:
        """True where the ending is not the policy's doing, so that it is asked again and never graded."""
        return self in _INFRA_STOPS

    @property
    def finished(self) -> bool:
        return self in _FINISHED_STOPS


_INFRA_STOPS = frozenset({Stop.LLM_ERROR, Stop.CONTEXT_OVERFLOW, Stop.INFRA_ERROR, Stop.CANCELLED})
_FINISHED_STOPS = frozenset({Stop.AGENT, Stop.MAX_STEP, Stop.AGENT_AFTER_LIMIT})


class Grade(StrEnum):
    """What the hidden tests say of a patch. A dead sandbox is no grade at all (None)."""

    RESOLVED = "resolved"
    UNRESOLVED = "unresolved"
    EMPTY = "empty"  # no effective change; nothing was run
    PATCH_FAILED = "patch_failed"  # does not apply
    TIMEOUT = "timeout"
    TAMPERED = "tampered"  # the evidence contradicts itself; never chosen, never rejected
    FLAKY = "flaky"  # one run says this, another that; never chosen, never rejected


class Role(StrEnum):
    """What an episode is asked for."""

    FIX = "fix"
    TEST = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One issue, before any model has seen it; nothing in it knows the answer."""

    id: str  # unique over all sources
    source: str
    split: str  # train | test, by repository, never by row
    repo: str
    image: str  # docker, kubernetes: a reference; bwrap: directory of the repository layer (absolute once loaded)
    workdir: str
    problem: str
    test_command: str
    visible: tuple[str, ...]  # test ids that pass on the untouched checkout, found by running it
    site: str = ""  # directory of what the repository imports, beside itself (absolute once loaded); "": nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    path: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The second table, key task_id; imported by tasks and grade alone."""

    task_id: str
    patch: str  # reference (gold) patch
    alternatives: tuple[str, ...]  # other accepted patches, where the source knows any
    files: tuple[File, ...]  # hidden tests, written into the grading sandbox at grading time
    script: str  # bash that runs them
    parser: str  # pytest, or a swebench log parser's key
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    expected_failures: tuple[str, ...]
    test_patch: str = ""  # hidden changes of files that the repository has already, as a diff
    eval_type: str = "pass_and_fail"  # or fail_only, for logs that name failures alone; with a swebench parser
    version: str = ""  # of the project; some swebench parsers ask for it


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    task: Task
    role: Role
    sample: int
    round: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    reply: str  # sampled text, control tokens shown
    tool: str  # "" when the reply held no readable call
    command: str  # canonical text of the action, "" as above
    parse: str  # ParseStatus of the reply
    observation: str
    exit_code: int  # -1: none (killed, or no command ran)
    flags: tuple[str, ...]  # timeout oom truncated malformed
    start: int  # token_ids[start:stop] are the sampled tokens of this reply
    stop: int
    generate_s: float
    act_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    grade: Grade
    passed: tuple[str, ...]
    failed: tuple[str, ...]
    dropped: tuple[str, ...]  # protected files whose changes were not graded
    exit_code: int
    runs: int
    seconds: float
    reason: str  # one line, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One finished episode, as text and as the tokens that the engine really saw."""

    task_id: str
    sample: int
    round: int
    seed: int
    kind: str  # model | scripted
    scaffold: str  # hash of tools, parser and prompts
    prompt: str  # digest of the first prompt's token ids
    temperature: float
    turns: tuple[Turn, ...]
    token_ids: tuple[int, ...]  # [L] int32: prompt, replies, observations in order; never re-tokenised from text
    action_mask: tuple[bool, ...]  # [L] True on tokens that the policy sampled
    behaviour_logp: tuple[float, ...]  # [L] float32 nats, raw log pi at T = 1; 0.0 where the mask is False
    num_turns: int
    num_actions: int  # sum(action_mask)
    num_tokens: int  # L
    patch: str
    patch_class: str  # digest of the patch without white space, comments and test files; "" for none
    files: tuple[str, ...]
    stop: Stop
    reason: str  # one line for a stop that needs one, else ""
    wall_s: float
    grade: Grade | None
    verdict: Verdict | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What preferences need of a trajectory; a projection, so no tokens are read."""

    task_id: str
    sample: int
    kind: str
    prompt: str
    num_turns: int
    num_actions: int
    num_tokens: int
    patch_class: str
    stop: Stop
    grade: Grade | None
    verdict: Verdict | None

    @property
    def resolved(self) -> bool | None:
        """The label u: True, False, or None where there is none (lost sandbox, time-out, tampering, flaky tests)."""
        if self.grade in (None, Grade.TIMEOUT, Grade.TAMPERED, Grade.FLAKY):
            return None
        return self.grade is Grade.RESOLVED


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What reports and diversity measures need of a trajectory; a projection without tokens."""

    task_id: str
    sample: int
    num_turns: int
    num_actions: int
    stop: Stop
    grade: Grade | None
    patch: str
    wall_s: float
    verdict: Verdict | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """What imitation needs; a projection of Trajectory."""

    task_id: str
    sample: int
    token_ids: tuple[int, ...]
    action_mask: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Keys, not tokens: two trajectories of one task by their sample numbers."""

    task_id: str
    chosen: int
    rejected: int
    weight: float = 1.0  # of its loss, 1 on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    task_id: str
    sample: int
    desirable: bool
    weight: float = 1.0  # of its loss, 1 on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Reference log-probabilities, one float32 per action token."""

    task_id: str
    sample: int
    ref_logp: tuple[float, ...]  # [A] nats
    ref_entropy: tuple[float, ...]  # [A] nats, exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What a policy says of a trajectory and how far it is from another policy, one float32 per action token."""

    task_id: str
    sample: int
    logp: tuple[float, ...]  # [A] nats, at T = 1
    entropy: tuple[float, ...]  # [A] nats, exact
    kl: tuple[float, ...]  # [A] nats, exact, KL(policy | other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A directory of whole Hugging Face weights, and the round whose rollouts it samples."""

    path: Path
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    task_id: str
    sample: int
    verifier: float  # P(resolved) in [0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    task_id: str
    sample: int
    regressed: int  # visible tests broken by the patch
    reproduced: int  # reproduction tests passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a selector may know of an attempt. It has no grade: a label cannot leak into the choice."""

    task_id: str
    sample: int
    patch: str
    stop: Stop
    num_turns: int
    verifier: float | None  # None: no score, which is not 0
    regressed: int | None
    reproduced: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    task_id: str
    sample: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    task_id: str
    sample: int
    grade: Grade | None
    verdict: Verdict | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """SWE-bench's own line."""

    instance_id: str
    model_name_or_path: str
    model_patch: str


_PLAIN: dict[Any, pa.DataType] = {
    str: pa.large_string(),  # 32-bit offsets end at 2 GiB a column
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    Path: pa.large_string(),
}
# Token columns are the bulk of a run: 7 bytes a token instead of 24.
_NARROW = {
    "token_ids": pa.int32(),
    "behaviour_logp": pa.float32(),
    "ref_logp": pa.float32(),
    "ref_entropy": pa.float32(),
    "logp": pa.float32(),
    "entropy": pa.float32(),
    "kl": pa.float32(),
}


@functools.cache
def _hints(record: Any) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _optional(hint: Any) -> Any | None:
    """T of `T | None`, else None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(hint) if a is not type(None)]
        return rest[0] if len(rest) == 1 else None
    return None


def _arrow_type(hint: Any, name: str) -> pa.DataType:
    if (inner := _optional(hint)) is not None:
        return _arrow_type(inner, name)
    if typing.get_origin(hint) is tuple:
        return pa.large_list(_NARROW.get(name) or _arrow_type(typing.get_args(hint)[0], name))
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return pa.large_string()
    if dataclasses.is_dataclass(hint):
        return pa.struct([pa.field(n, _arrow_type(h, n)) for n, h in _hints(typing.cast(type, hint)).items()])
    return _PLAIN[hint]


def arrow_schema(record: type[Any]) -> pa.Schema:
    """The Arrow schema of a record. KeyError on a field type that has no rule.

    Explicit, because pyarrow infers `list<null>` from an empty list: the first trajectory without turns would break
    the data set.
    """
    key: Any = record  # a cached function wants a Hashable, which mypy does not see in a type
    return _schema(key)


@functools.cache
def _schema(record: Any) -> pa.Schema:
    return pa.schema([pa.field(name, _arrow_type(hint, name)) for name, hint in _hints(record).items()])


def _plain(value: Any) -> Any:
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        if value and isinstance(value[0], (int, float)):  # token columns: do not walk millions of numbers
            return list(value)
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_row(value)
    return value


def to_row(record: Any) -> dict[str, Any]:
    """A record as a row of plain values."""
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def _typed(hint: Any, value: Any) -> Any:
    if (inner := _optional(hint)) is not None:
        return None if value is None else _typed(inner, value)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if item in (int, float, bool, str):
            return tuple(value.tolist() if hasattr(value, "tolist") else value)
        return tuple(_typed(item, v) for v in value)
    if dataclasses.is_dataclass(hint):
        return from_row(typing.cast(type, hint), value)
    return hint(value)


def from_row(record: type[R], row: Mapping[str, Any]) -> R:
    """A row of plain values as a record; columns that the record does not have are ignored (projection)."""
    return record(**{name: _typed(hint, row[name]) for name, hint in _hints(typing.cast(Any, record)).items()})


def to_table(record: type, records: Iterable[Any]) -> pa.Table:
    return pa.Table.from_pylist([to_row(r) for r in records], schema=arrow_schema(record))


def from_table(record: type[R], table: pa.Table) -> Iterator[R]:
    for batch in table.to_batches(max_chunksize=256):
        for row in batch.to_pylist():
            yield from_row(record, row)


def digest(*parts: str) -> str:
    """A name for these texts in this order: 40 hexadecimal digits. Lone surrogates may be among them."""
    found = hashlib.blake2b(digest_size=20)
    for part in parts:
        data = part.encode(errors="surrogatepass")
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()
