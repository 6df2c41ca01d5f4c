"""Causal attention over a packed row: each sequence is computed alone, so no token can see another trajectory.

The function is registered with transformers under NAME and gets the pack's `groups` through the model's forward. It
never looks at masks or position ids: transformers isolates packed sequences by position ids only while no cache is in
use. A prompt that several sequences share stands in the row once. It is computed by a call of its own, and each
continuation by an ordinary causal call over both: the same calls for a sequence that is alone, as the last bits of a
kernel's result depend on the length of its input. So sharing changes no bit on a CPU, for one more call on the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from entropo_ray.train import varlen
from entropo_ray.train.parallel import Parallel

NAME = "entropo_packed"
States = tuple[Tensor, Tensor, Tensor]  # query, key and value [1, heads, tokens, D]
_IGNORED = {"position_ids", "use_cache", "output_attentions", "is_causal", "cache_position"}


def packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    groups: Sequence[tuple[int, Sequence[int]]],
    parallel: Parallel | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, T, heads, D] attention output of [1, heads, T, D] queries, and no weights; T is a stretch under `parallel`.

    Raises ValueError for features that this function does not compute, rather than leaving them out.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IGNORED)
    if attention_mask is not None or dropout or unknown:
        what = "a mask" if attention_mask is not None else f"dropout={dropout}" if dropout else ", ".join(unknown)
        raise ValueError(f"packed attention of {type(module).__name__} cannot compute {what}")
    if parallel:
        tokens = sum(prompt + sum(branches) for prompt, branches in groups)
        if key.shape[1] % parallel.ranks:  # too few key heads: each rank gets copies of those that its queries need
            key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], 1) for states in (key, value))
        query, key, value = (parallel.by_heads(states, tokens) for states in (query, key, value))
    attend = varlen.attend if varlen.usable(query, key.shape[1], one_by_one) else one_by_one
    found = attend(query, key, value, groups, scaling, sliding_window)
    if parallel:
        return parallel.by_tokens(found.transpose(1, 2)).transpose(1, 2).contiguous(), None
    return found, None


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, groups: varlen.Groups, scaling: float, window: int | None
) -> Tensor:
    """[1, T, heads, D] by a call for each prompt and each trajectory."""
    sizes = [size for prompt, branches in groups for size in (prompt, *branches) if size]
    parts = zip(*(torch.split(state, sizes, dim=2) for state in (query, key, value)), strict=True)
    rows = [
        row
        for prompt, branches in groups
        for row in _group(next(parts) if prompt else None, [next(parts) for _ in branches], scaling, window)
    ]
    return torch.cat([row.transpose(1, 2) for row in rows], dim=1)


def _group(prompt: States | None, branches: Sequence[States], scaling: float, window: int | None) -> list[Tensor]:
    """The outputs of a group in the row's order: of the prompt, alone, and of each continuation behind it."""
    if prompt is None:
        return [_causal(*branch, scaling, window) for branch in branches]
    found, length = [_causal(*prompt, scaling, window)], prompt[0].shape[2]
    for branch in branches:
        query, key, value = (torch.cat(both, dim=2) for both in zip(prompt, branch, strict=True))
        found.append(_causal(query, key, value, scaling, window)[:, :, length:])
    return found


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """One sequence; `window` tokens are visible, counting the token itself."""
    length = query.shape[2]
    if window is None or length <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    # by blocks of queries, so that no mask is larger than a window squared, twice
    blocks = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=query.device)[:, None] - torch.arange(
            first, stop, device=query.device
        )
        visible = (distance >= 0) & (distance < window)
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=visible,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(blocks, dim=2)


AttentionInterface.register(NAME, packed)
