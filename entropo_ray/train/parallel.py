"""One pack over several ranks: each holds a stretch of its tokens, and for attention a part of the heads.

DeepSpeed-Ulysses (arXiv 2309.14509) around our own attention, so that packs and shared prompts stay what they are: two
all-to-all exchanges a layer turn [heads, T / ranks] into [heads / ranks, T] and back. Linear layers, the head and their
activations cost each rank its stretch alone, which is what makes long trajectories fit; it is no faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from entropo_ray.train.batch import Pack


@dataclass(frozen=True)
class Parallel:
    """The ranks that share a pack."""

    group: Any  # of torch.distributed
    ranks: int
    index: int  # of this rank among them

    def stretch(self, tokens: int) -> int:
        """Tokens of each rank; the last one's are filled up."""
        return -(-tokens // self.ranks)

    def part(self, pack: Pack) -> Part:
        """This rank's stretch of a pack."""
        size = self.stretch(pack.input_ids.shape[1])
        mine = slice(self.index * size, (self.index + 1) * size)
        missing = size * self.ranks - pack.input_ids.shape[1]
        here = torch.nonzero(pack.predictors // size == self.index).squeeze(1)
        return Part(
            input_ids=pad(pack.input_ids, (0, missing))[:, mine],
            position_ids=pad(pack.position_ids, (0, missing))[:, mine],
            predictors=pack.predictors[here] - mine.start,
            targets=pack.targets[here],
            actions=here,
        )

    def whole(self, values: Tensor, part: Part, actions: int) -> Tensor:
        """[A] values of all ranks from each one's own; gradients go back to the rank that holds the token."""
        mine = values.new_zeros(actions).index_put((part.actions,), values)
        summed: Tensor = _Summed.apply(mine, self.group)  # type: ignore[no-untyped-call]
        return summed

    def by_heads(self, states: Tensor, tokens: int) -> Tensor:
        """[1, heads / ranks, tokens, D] from [1, heads, stretch, D]: all tokens of a part of the heads."""
        exchanged: Tensor = _Exchanged.apply(states, self.group, self.ranks, True)  # type: ignore[no-untyped-call]
        return exchanged[:, :, :tokens]

    def by_tokens(self, states: Tensor) -> Tensor:
        """[1, heads, stretch, D] from [1, heads / ranks, tokens, D]: the inverse."""
        missing = self.stretch(states.shape[2]) * self.ranks - states.shape[2]
        filled = pad(states, (0, 0, 0, missing))
        exchanged: Tensor = _Exchanged.apply(filled, self.group, self.ranks, False)  # type: ignore[no-untyped-call]
        return exchanged


@dataclass(frozen=True)
class Part:
    """A stretch of a pack, and its action tokens."""

    input_ids: Tensor  # [1, stretch]
    position_ids: Tensor  # [1, stretch]
    predictors: Tensor  # [a] within the stretch
    targets: Tensor  # [a]
    actions: Tensor  # [a] their places among the pack's action tokens


class _Summed(torch.autograd.Function):
    """The sum over ranks of what all of them go on to use alike."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None  # every rank computes the same loss; its own part alone is its own to pass on


class _Exchanged(torch.autograd.Function):
    """Heads for tokens, or back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any, ranks: int, to_heads: bool) -> Tensor:
        ctx.group, ctx.ranks, ctx.to_heads = group, ranks, to_heads
        return _exchange(states, group, ranks, to_heads)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(upstream[0], ctx.group, ctx.ranks, not ctx.to_heads), None, None, None


def _exchange(states: Tensor, group: Any, ranks: int, to_heads: bool) -> Tensor:
    _, heads, tokens, width = states.shape
    if to_heads:
        sent = states.reshape(ranks, heads // ranks, tokens, width).contiguous()
    else:
        sent = states.reshape(heads, ranks, tokens // ranks, width).transpose(0, 1).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    if to_heads:
        return got.transpose(0, 1).reshape(1, heads // ranks, ranks * tokens, width)
    return got.reshape(1, ranks * heads, tokens // ranks, width)


def groups(ranks_of_one: int) -> Parallel | None:
    """The group of this rank where packs are spread over so many neighbours; None for 1. Collective.

    ValueError where the ranks cannot be divided.
    """
    if ranks_of_one == 1:
        return None
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks % ranks_of_one:
        raise ValueError(f"sequence_parallel={ranks_of_one}: does not divide the {ranks} workers")
    mine = None
    for start in range(0, ranks, ranks_of_one):  # every rank makes every group
        group = dist.new_group(list(range(start, start + ranks_of_one)))
        if start <= rank < start + ranks_of_one:
            mine = group
    return Parallel(mine, ranks_of_one, rank % ranks_of_one)


def check(model: Any, ranks: int) -> None:
    """ValueError where a model's heads cannot be divided."""
    heads = model.config.num_attention_heads
    if heads % ranks:
        raise ValueError(f"sequence_parallel={ranks}: {type(model).__name__} has {heads} attention heads")
