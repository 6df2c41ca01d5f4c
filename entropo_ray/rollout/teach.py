"""A scripted teacher's graded trajectories, and their retelling in the tokens of a model.

The teacher plays through the same agent code and the same sandboxes as a policy, and speaks in bytes: at this point no
tokenizer may exist yet. What it did is learnt by imitation alone, so its tokens need not be the model's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from entropo_ray import chat, config, store
from entropo_ray.agent.demonstrator import Demonstrator
from entropo_ray.agent.episode import Generate
from entropo_ray.agent.replay import retokenise
from entropo_ray.agent.scripted import ByteChat, Teacher
from entropo_ray.records import Example, Grade, Role, Task, Trajectory
from entropo_ray.rollout.episodes import widened
from entropo_ray.rollout.sample import Play, requests, seal, stream, unanswered
from entropo_ray.tasks.reference import edits

BYTES_A_TOKEN = 16  # room for a teacher that speaks in bytes: no tokenizer packs more into a token, on average

KEEP: dict[str, Callable[[Trajectory], bool]] = {
    "all": lambda trajectory: True,
    "finished": lambda trajectory: trajectory.stop.finished,
    "resolved": lambda trajectory: trajectory.grade is Grade.RESOLVED,
}


def teach(
    suite: Sequence[Task],
    cfg: config.Rollout,
    sft: config.Sft,
    *,
    seed: int,
    to: Path,
    answers: str | None = None,
    shown: str | None = None,
) -> dict[str, float]:
    """`sft.samples` attempts of the scripted teacher at each task, as a sealed product of trajectories; its numbers.

    It errs on purpose in a share `sft.error_rate` of them. `answers`: the pack whose hidden tests grade. `shown`: the
    pack whose reference patches the teacher demonstrates instead of searching for repairs.
    """
    if not suite:
        raise ValueError("the suite has no task: tasks.path, tasks.split and tasks.limit leave none")
    if sft.keep == "resolved" and answers is None:
        raise ValueError("sft.keep=resolved: the teacher's trajectories must be graded for that; give keep=finished")
    wide = dataclasses.replace(cfg, agent=widened(cfg.agent, BYTES_A_TOKEN))
    ids = tuple(task.id for task in suite)
    if shown is not None:
        edits(shown, ids)  # what is wrong with them is said here, not by an actor
    asked = requests(suite, sft.samples, role=Role.FIX, round=0, seed=seed, word="teach")
    timing: dict[str, float] = {}
    if missing := unanswered(asked, to):
        voice = functools.partial(teacher_voice, sft.error_rate, shown, ids)
        # imitation wants the tokens alone, and reading a patch takes longer than the rest of a teacher's episode
        play = Play(voice=voice, kind="scripted", temperature=0.0, answers=answers, patched=answers is not None)
        timing = stream(missing, play, wide, to=to)
    found = seal(asked, to, graded=answers is not None) | timing
    del found["entropy"]  # a script has none
    return found


def teacher_voice(error_rate: float, shown: str | None, ids: Sequence[str]) -> tuple[Generate, chat.Chat]:
    """Who answers in an episode actor of `teach`."""
    words = ByteChat()
    return Teacher(words, error_rate) if shown is None else Demonstrator(words, error_rate, edits(shown, ids)), words


def retell(trajectories: Path, chat_path: Path, cfg: config.Agent, *, keep: str, to: Path) -> dict[str, float]:
    """The teacher's trajectories as Examples in the tokens of the model at `chat_path`; how many, and how long.

    `keep`: all | finished | resolved. One longer than cfg.max_tokens is left out and counted. ValueError if none stays.
    """
    words = chat.load(chat_path)
    counts = {"examples": 0.0, "tokens": 0.0, "action_tokens": 0.0, "dropped": 0.0, "too_long": 0.0}

    def told() -> Iterator[Example]:
        for trajectory in store.read(trajectories, Trajectory):
            if trajectory.stop.infra or not trajectory.turns or not KEEP[keep](trajectory):
                counts["dropped"] += 1
                continue
            example = retokenise(trajectory, words, cfg)
            if len(example.token_ids) > cfg.max_tokens:
                counts["too_long"] += 1
                continue
            counts["tokens"] += len(example.token_ids)
            counts["action_tokens"] += sum(example.action_mask)
            yield example

    examples = list(told())
    if not examples:
        raise ValueError(f"sft.keep={keep}: none of the trajectories in {trajectories} can be kept: {counts}")
    counts["examples"] = store.write(to, Example, examples)
    return counts
