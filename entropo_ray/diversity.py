"""How a policy spreads: exact entropies by turn and by part of a reply, and how many solutions it really has.

Entropies are in nats per action token at T = 1, from Measure rows joined to trajectories by key.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np

from entropo_ray import chat, store
from entropo_ray.agent.spans import SEGMENTS, spans
from entropo_ray.records import Measure, Turn

TURNS = 8  # turns that are reported one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A projection of Trajectory: the tokens, and where each reply lies."""

    task_id: str
    sample: int
    turns: tuple[Turn, ...]
    token_ids: tuple[int, ...]


def entropies(trajectories: Path, measures: Path, words: chat.Chat) -> dict[str, float]:
    """`entropy_exact` and `kl`, and the entropy of each of SEGMENTS (`entropy_thought` ...) and of each of the first
    TURNS turns (`entropy_turn_1` ...), all means per action token."""
    measured = {(m.task_id, m.sample): m for m in store.read(measures, Measure)}
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, values: Sequence[float]) -> None:
        sums[name][0] += math.fsum(values)
        sums[name][1] += len(values)

    for told in store.read(trajectories, Told):
        found = measured.get((told.task_id, told.sample))
        if found is None:
            continue
        add("entropy_exact", found.entropy)
        add("kl", found.kl)
        at = 0
        for number, turn in enumerate(told.turns):
            values = found.entropy[at : at + turn.stop - turn.start]
            at += len(values)
            if number < TURNS:
                add(f"entropy_turn_{number + 1}", values)
            for name, (start, stop) in spans(told.token_ids[turn.start : turn.stop], words).items():
                add(f"entropy_{name}", values[start:stop])
        assert at == len(found.entropy), f"{told.task_id}/{told.sample}: {at} sampled, {len(found.entropy)} scored"
    turns = [f"entropy_turn_{number + 1}" for number in range(TURNS)]
    order = ["entropy_exact", "kl", *(f"entropy_{segment}" for segment in SEGMENTS), *turns]
    return {name: sums[name][0] / sums[name][1] for name in order if sums[name][1]}


def entropy(classes: Iterable[str]) -> float:
    """Entropy of the empirical distribution over classes, in nats; its exponential is the number of effective ones."""
    counts = np.array(list(Counter(classes).values()), dtype=float)
    shares = counts / counts.sum() if len(counts) else counts
    return float(-(shares * np.log(shares)).sum())


def likeness(texts: Sequence[str]) -> np.ndarray:
    """[n, n] share of characters that two texts have in common in order (difflib's ratio, made symmetric)."""
    found = np.eye(len(texts))
    for i, one in enumerate(texts):
        for j in range(i):
            ratio = 1.0 if one == texts[j] else SequenceMatcher(None, one, texts[j], autojunk=False).ratio()
            found[i, j] = found[j, i] = ratio
    return found


def vendi(similarity: np.ndarray) -> float:
    """Vendi score of a symmetric [n, n] similarity with ones on its diagonal: exp of the entropy of its spectrum / n.

    1 where all are alike, n where none is (Friedman and Dieng 2023, arXiv 2210.02410). ValueError on another shape or
    diagonal.
    """
    n = len(similarity)
    if similarity.shape != (n, n) or not n or not np.allclose(np.diag(similarity), 1.0):
        raise ValueError(f"vendi: needs a square similarity with ones on its diagonal, not {similarity.shape}")
    values = np.linalg.eigvalsh(similarity / n)
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))
