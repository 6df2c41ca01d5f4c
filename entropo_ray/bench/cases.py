"""What is measured: a model's geometry, pairs of trajectories, and the work that they need at least."""

from __future__ import annotations

from dataclasses import dataclass, field

from entropo_ray.train.size import Shape


def body(vocab: int = 151_936) -> Shape:
    """A small Qwen3 with random weights under a vocabulary of this size."""
    return Shape(4, 256, 4, 2, 64, vocab, 768, tied=True)


@dataclass(frozen=True)
class Case:
    """Pairs of attempts at tasks of their own; `share`: of the tokens behind the prompt, those the policy sampled."""

    name: str
    shape: Shape = field(default_factory=body)
    pairs: int = 1
    prompt: int = 128
    chosen: int = 1024  # tokens of a chosen trajectory, its prompt included
    rejected: int = 756
    share: float = 0.22
    kto: bool = False  # the same trajectories as labelled ones
    checkpointing: bool = False


CASES = {
    case.name: case
    for case in (
        Case("vocabulary"),
        Case("kto", kto=True),
        Case("ragged", body(1024), pairs=2, prompt=128, chosen=2048, rejected=819, share=1.0),
        Case("equal", body(1024), pairs=2, prompt=128, chosen=1024, rejected=1024, share=1.0),
        Case("checkpointing", checkpointing=True),
        Case("half", share=0.5),
        Case("long", chosen=4096, rejected=3072),
    )
}


def least_flops(case: Case) -> float:
    """6 a weight and token, 3 times causal attention forward, and the head at what was sampled: nothing done twice."""
    shape = case.shape
    total = 0.0
    for length in (case.chosen, case.rejected):
        actions = case.share * (length - case.prompt)
        total += 6.0 * shape.active * length + 6.0 * shape.vocab * shape.hidden * actions
        total += 3 * 2.0 * shape.layers * shape.heads * shape.head_dim * length**2
    return case.pairs * total
