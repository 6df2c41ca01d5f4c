"""All trajectories of a packed row in one call of a variable-length kernel, on GPUs where that is right.

One call a sequence leaves a GPU idle where sequences are short. PyTorch's kernel (flash attention) takes them all:
queries lie as they are in the row; keys of a continuation are its prompt's and its own, so prompts are copied. With
num_splits=1 a sequence's sums do not depend on its neighbours. Before it is trusted, outputs and gradients are held
against the calls of attention.py on the device itself; where they differ, or there is no such kernel, those stay.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[tuple[int, Sequence[int]]]
Loop = Callable[[Tensor, Tensor, Tensor, Groups, float, int | None], Tensor]  # -> [1, T, heads, D]
log = logging.getLogger("entropo_ray")
_TRIED: Groups = ((70, (33, 50)), (0, (41,)), (129, (64,)))
_WINDOWS = (None, 48)
_WORSE = 2.0  # times the error of the calls that are replaced, both against fp32


@dataclass(frozen=True)
class Spans:
    """Where the sequences of a row begin and end."""

    keys: Tensor  # [K] places in the row: what each sequence sees, sequence behind sequence
    starts: Tensor  # [N + 1] int32, of queries
    key_starts: Tensor  # [N + 1] int32
    longest: int
    longest_keys: int


@functools.lru_cache(maxsize=8)
def spans(groups: tuple[tuple[int, tuple[int, ...]], ...], device: torch.device) -> Spans:
    """Of a pack's groups: each prompt is a sequence, and each continuation one that also sees its prompt."""
    places: list[Tensor] = []
    queries: list[int] = []
    at = 0
    for prompt, branches in groups:
        shared = torch.arange(at, at + prompt)
        if prompt:
            places.append(shared)
            queries.append(prompt)
        at += prompt
        for size in branches:
            places.append(torch.cat([shared, torch.arange(at, at + size)]))
            queries.append(size)
            at += size
    seen = [len(part) for part in places]
    return Spans(
        keys=torch.cat(places).to(device),
        starts=torch.tensor([0, *accumulate(queries)], dtype=torch.int32, device=device),
        key_starts=torch.tensor([0, *accumulate(seen)], dtype=torch.int32, device=device),
        longest=max(queries),
        longest_keys=max(seen),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Groups,
    scaling: float,
    window: int | None,
    kernel: Callable[..., Any] | None = None,
) -> Tensor:
    """[1, T, heads, D] of [1, heads, T, D] queries; `window` tokens are visible, counting the token itself."""
    kernel = kernel or _kernel()
    where = spans(tuple((prompt, tuple(branches)) for prompt, branches in groups), query.device)
    found: Tensor = kernel(
        query[0].transpose(0, 1).contiguous(),
        *(states[0].index_select(1, where.keys).transpose(0, 1).contiguous() for states in (key, value)),
        where.starts,
        where.key_starts,
        where.longest,
        where.longest_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        num_splits=1,
    )
    return found[None]


def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # a build of torch without it must still import this module

    return varlen_attn


def usable(query: Tensor, heads: int, loop: Loop) -> bool:
    """Whether `attend` may stand in for `loop` with such queries and so many key heads."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and _right(query.device, query.dtype, query.shape[1], heads, query.shape[3], loop)


@functools.cache
def _right(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, loop: Loop) -> bool:
    """One check for each shape of heads in a process."""
    try:
        apart = [_errors(device, dtype, (heads, key_heads, size), window, loop) for window in _WINDOWS]
    except (ImportError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        log.info("attention: one call a sequence, as the variable-length kernel fails: %s", str(error).split("\n")[0])
        return False
    right = all(mine <= _WORSE * its + 1e-6 for window in apart for mine, its in window)
    log.info("attention: %s", "one call of the variable-length kernel a pack" if right else f"one a sequence: {apart}")
    return right


def _errors(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    window: int | None,
    loop: Loop,
    attend: Callable[..., Tensor] = attend,
) -> list[tuple[float, float]]:
    """RMS distances to fp32 of the output and of all three gradients: (of `attend`, of `loop`) each."""
    heads, key_heads, size = shape
    tokens = sum(prompt + sum(branches) for prompt, branches in _TRIED)
    drawn = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, n, tokens, size, generator=drawn).to(device, dtype) for n in (heads, key_heads, key_heads)]
    upstream = torch.randn(1, tokens, heads, size, generator=drawn).to(device, dtype)

    def graded(function: Any, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [states.detach().requires_grad_() for states in inputs]
        found = function(*leaves, _TRIED, size**-0.5, window)
        return [found.detach(), *torch.autograd.grad(found, leaves, upstream.to(found.dtype))]

    truth = graded(loop, [states.float() for states in exact])
    mine, its = graded(attend, exact), graded(loop, exact)
    return [
        (float((one.float() - right).square().mean().sqrt()), float((other.float() - right).square().mean().sqrt()))
        for one, other, right in zip(mine, its, truth, strict=True)
    ]
