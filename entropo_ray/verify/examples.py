"""Graded trajectories to YES/NO examples, in the tokens of the policy that becomes the verifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from entropo_ray import chat, config, store
from entropo_ray.records import Example, Grade, Stop, Task, Turn
from entropo_ray.verify.model import Evidence, Labels, Step, labels, render

_CHUNK = 64
_ANSWERS = {Grade.RESOLVED: True, Grade.UNRESOLVED: False, Grade.EMPTY: False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempted:
    """What a verifier is shown of a trajectory; a projection without its grade."""

    task_id: str
    sample: int
    turns: tuple[Turn, ...]
    patch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The same with the answer."""

    task_id: str
    sample: int
    turns: tuple[Turn, ...]
    patch: str
    stop: Stop
    grade: Grade | None


def evidence(attempt: Attempted | Judged, task: Task) -> Evidence:
    steps = tuple(Step(turn.command or turn.reply, turn.observation) for turn in attempt.turns)
    return Evidence(attempt.task_id, attempt.sample, task.problem, attempt.patch, steps)


def examples(
    trajectories: Sequence[Path], suite: Sequence[Task], cfg: config.Verifier, *, chat_path: Path, to: Path
) -> dict[str, float]:
    """Every finished attempt with an answer as prompt and label; product Example, loss on the label's tokens alone.

    Attempts that no test answered (no grade, time-out, tampering, a patch that does not apply) are dropped. Samples
    are numbered anew in each task, since rounds repeat theirs. ValueError if only one answer occurs.
    """
    words = chat.load(chat_path)
    answers = labels(words)
    counted: Counter[str] = Counter()
    partial = store.fresh(to)
    chunk: list[Example] = []
    for example in _examples(trajectories, {t.id: t for t in suite}, cfg, words, answers, counted):
        chunk.append(example)
        if len(chunk) == _CHUNK:
            _append(partial, chunk)
            chunk = []
    if chunk:
        _append(partial, chunk)
    if not counted["yes"] or not counted["no"]:
        raise ValueError(
            f"verifier: {counted['yes']} resolved and {counted['no']} unresolved attempts in {len(trajectories)} "
            "products; a verifier needs both: sample more rounds first"
        )
    rows = store.seal(partial, Example)
    store.publish(partial, to, rows=rows, parts=len(store.parts_of(partial)))
    names = ("yes", "no", "tokens", "dropped_unanswered", "dropped_unfinished", "dropped_long")
    return {"examples": float(rows), **{name: float(counted[name]) for name in names}}


def _append(partial: Path, chunk: list[Example]) -> None:
    store.append(partial, Example, chunk, key=(chunk[0].task_id, chunk[0].sample))


def _examples(
    trajectories: Sequence[Path],
    suite: dict[str, Task],
    cfg: config.Verifier,
    words: chat.Chat,
    answers: Labels,
    counted: Counter[str],
) -> Iterator[Example]:
    number: Counter[str] = Counter()
    for product in trajectories:
        for attempt in store.read(product, Judged):
            reason = _unfit(attempt, suite, product)
            prompt = None if reason else render(evidence(attempt, suite[attempt.task_id]), words, _room(cfg, answers))
            if prompt is None:
                counted[f"dropped_{reason or 'long'}"] += 1
                continue
            assert attempt.grade is not None
            right = _ANSWERS[attempt.grade]
            label = answers.yes if right else answers.no
            counted["yes" if right else "no"] += 1
            counted["tokens"] += len(prompt) + len(label)
            yield Example(
                task_id=attempt.task_id,
                sample=number[attempt.task_id],
                token_ids=(*prompt, *label),
                action_mask=(*[False] * len(prompt), *[True] * len(label)),
            )
            number[attempt.task_id] += 1


def _unfit(attempt: Judged, suite: dict[str, Task], product: Path) -> str:
    if attempt.grade not in _ANSWERS:  # a teacher's on practice tasks among them, which belong to no suite
        return "unanswered"
    if attempt.task_id not in suite:
        raise ValueError(f"tasks.path: {product} holds task {attempt.task_id}, which this suite lacks; give its own")
    return "" if attempt.stop.finished else "unfinished"


def _room(cfg: config.Verifier, answers: Labels) -> int:
    return cfg.max_tokens - answers.room
