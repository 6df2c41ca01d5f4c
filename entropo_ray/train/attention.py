"""Causal attention over a packed row: each sequence is computed alone, so no token can see another trajectory.

The function is registered with transformers under NAME and gets `lengths` through the model's forward. It never looks
at masks or position ids: transformers isolates packed sequences by position ids only while no cache is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "entropo_packed"
_IGNORED = {"position_ids", "use_cache", "output_attentions", "is_causal", "cache_position"}


def packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    lengths: Sequence[int],
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, T, heads, D] attention output of [1, heads, T, D] queries, and no weights.

    Raises ValueError for features that this function does not compute, rather than leaving them out.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _IGNORED)
    if attention_mask is not None or dropout or unknown:
        what = "a mask" if attention_mask is not None else f"dropout={dropout}" if dropout else ", ".join(unknown)
        raise ValueError(f"packed attention of {type(module).__name__} cannot compute {what}")
    parts = [torch.split(states, list(lengths), dim=2) for states in (query, key, value)]
    rows = [_causal(q, k, v, scaling, sliding_window) for q, k, v in zip(*parts, strict=True)]
    return torch.cat([row.transpose(1, 2) for row in rows], dim=1), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """One sequence; `window` tokens are visible, counting the token itself."""
    length = query.shape[2]
    if window is None or length <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance < window)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)


AttentionInterface.register(NAME, packed)
