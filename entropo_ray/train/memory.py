"""Fewer activations at a time: what is recomputed, what is kept in host memory, and MLPs by stretches of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
)
_FEW = 16
_WORTH = 1 << 20  # bytes of a tensor below which a trip to the host is not


def options(*, keep_attention: bool) -> dict[str, Any]:
    """Of gradient checkpointing; `keep_attention`: everything is recomputed but attention's outputs.

    Attention's cost grows with the square of the length and its output only with the length, so for long trajectories
    it is the dearest thing to recompute and among the cheapest to keep.
    """
    if not keep_attention:
        return {"use_reentrant": False}
    kept = [getattr(torch.ops.aten, name).default for name in _ATTENTION if hasattr(torch.ops.aten, name)]
    if hasattr(torch.ops.torch_attn, "_varlen_attn"):  # registered where train/varlen.py has loaded it
        kept.append(torch.ops.torch_attn._varlen_attn.default)
    return {"use_reentrant": False, "context_fn": functools.partial(create_selective_checkpoint_contexts, kept)}


def tile_mlps(model: Any, tokens: int) -> None:
    """Have the MLPs of all layers work through `tokens` at a time: exact, for one forward more (arXiv 2506.13996).

    Mixtures of experts are left as they are: each expert sees a part of the tokens already.
    """
    for module in model.modules():
        if isinstance(module, nn.Module) and type(module).__name__.endswith("MLP"):
            module.forward = functools.partial(_tiled, module.forward, tokens)


def _tiled(forward: Any, tokens: int, states: Tensor) -> Tensor:
    length = states.shape[-2]
    if length < tokens + _FEW:
        found: Tensor = forward(states)
        return found
    # a rest of a few goes with its neighbours: a CPU's matrix product of a few rows sums in another order
    starts = list(range(0, length - _FEW, tokens))
    sizes = [stop - start for start, stop in pairwise([*starts, length])]
    parts = [checkpoint(forward, part, use_reentrant=False) for part in torch.split(states, sizes, dim=-2)]
    return torch.cat(parts, dim=-2)


@contextmanager
def on_host() -> Iterator[None]:
    """Large tensors that autograd keeps lie in host memory; with recomputation, these are the inputs of layers."""

    def away(tensor: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        if tensor.is_leaf or tensor.numel() * tensor.element_size() < _WORTH or not tensor.is_cuda:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return tensor.device, host

    def back(kept: tuple[torch.device, Tensor] | Tensor) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(away, back):
        yield
