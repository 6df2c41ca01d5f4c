"""What an update needs: floating-point operations of a step, and memory of a rank. Arithmetic, no tensors.

The operations are those of the algorithm as it is computed here (recomputation included); memory counts what grows with
the model or the trajectory. `jobs/bench.py ranks` holds it against measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kept = Literal["all", "attention", "nothing"]  # of the activations: no recomputation, attention's outputs, layer inputs
_GIB = 2**30
_BUCKET = 500_000_000  # weights whose gradients DeepSpeed reduces at once


@dataclass(frozen=True)
class Shape:
    """A decoder as far as cost goes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    mlp: int  # inner width that one token uses in a layer, over its experts
    expert_weights: int = 0  # of all experts that a token does not use
    tied: bool = False

    @property
    def attention(self) -> int:
        """Weights of attention in one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def active(self) -> int:
        """Weights of the linear layers that one token goes through, the head apart."""
        return self.layers * (self.attention + 3 * self.hidden * self.mlp)

    @property
    def weights(self) -> int:
        """All weights."""
        return self.active + self.expert_weights + self.vocab * self.hidden * (1 if self.tied else 2)


def shape_of(config: Any) -> Shape:
    """From a transformers configuration: Qwen, Llama, Gemma and GLM families, dense or with experts."""
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    experts = getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None) or 0
    mlp, unused = getattr(config, "intermediate_size", 0), 0
    if experts:
        inner, used = config.moe_intermediate_size, config.num_experts_per_tok
        shared = getattr(config, "n_shared_experts", 0) or 0
        mlp = inner * (used + shared)
        unused = layers * 3 * hidden * inner * (experts - used)
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=config.vocab_size,
        mlp=mlp,
        expert_weights=unused,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
    )


def step_flops(
    shape: Shape, lengths: Sequence[int], prompt: int, actions: int, *, kept: Kept, shared: bool, active: int = 0
) -> float:
    """Of forward and backward over trajectories of one task with a common `prompt`, `actions` of their tokens sampled.

    8 a weight and token with recomputation, else 6; causal attention is half of its square, forward 1 of 3.5 (4.5 where
    it is recomputed); the head is computed twice. `active`: weights a token uses, if better known than by shape.
    """
    tokens = sum(lengths) - (prompt * (len(lengths) - 1) if shared else 0)
    return operations(shape, tokens, sum(length**2 for length in lengths), actions, kept=kept, active=active)


def operations(shape: Shape, tokens: int, squares: int, actions: int, *, kept: Kept, active: int = 0) -> float:
    """step_flops of so many tokens in the linear layers, and so large a sum of squared lengths."""
    linear = (6.0 if kept == "all" else 8.0) * (active or shape.active) * tokens
    forward = 2.0 * shape.layers * shape.heads * shape.head_dim * squares
    attention = forward * (4.5 if kept == "nothing" else 3.5)
    return linear + attention + 8.0 * shape.vocab * shape.hidden * actions


def reference_flops(shape: Shape, lengths: Sequence[int], prompt: int, actions: int, *, shared: bool) -> float:
    """Of the scoring pass over the same trajectories."""
    tokens = sum(lengths) - (prompt * (len(lengths) - 1) if shared else 0)
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * sum(length**2 for length in lengths)
    return 2.0 * shape.active * tokens + attention + 2.0 * shape.vocab * shape.hidden * actions


@dataclass(frozen=True)
class Layout:
    """How the ranks hold a model."""

    ranks: int = 1
    zero_stage: int = 3
    bytes: int = 2  # of a weight in the model: 2 for bf16, 4 for fp32
    offload: bool = False  # optimizer states in host memory
    lora_weights: int = 0  # trained ones, where adapters are
    sequence_parallel: int = 1
    kept: Kept = "nothing"
    logits: int = 1 << 26  # held at once


def memory_gib(shape: Shape, layout: Layout, tokens: int, actions: int) -> dict[str, float]:
    """Peak of a rank in GiB, by what it is for, with a pack of so many tokens and action tokens.

    States: weights and gradients in their own width, and 12 bytes a trained weight of fp32 master and moments, divided
    as the ZeRO stage says (8 at stage 0 in fp32: from stage 1 on DeepSpeed keeps a master even then). Gradients meet in
    a flat buffer of their own.
    """
    trained = layout.lora_weights or shape.weights
    width, ranks = layout.bytes, layout.ranks
    optimizer = trained * (12 if width == 2 or layout.zero_stage else 8) / (ranks if layout.zero_stage >= 1 else 1)
    meeting = width * min(trained, _BUCKET) if ranks > 1 or layout.zero_stage >= 2 else 0
    gradients = trained * width / (ranks if layout.zero_stage >= 2 else 1)
    weights = (shape.weights + layout.lora_weights) * width / (ranks if layout.zero_stage == 3 else 1)
    if layout.zero_stage == 3:
        weights += 2 * width * (shape.attention + 3 * shape.hidden * shape.mlp + shape.expert_weights / shape.layers)
    here = tokens / layout.sequence_parallel
    said = actions / layout.sequence_parallel
    attention_out = here * shape.heads * (shape.head_dim * width + 4)
    # inputs of a layer, and what its backward pass holds: states, queries, keys, values, and the inner width thrice
    inside = here * width * (6 * shape.hidden + 2 * shape.head_dim * (shape.heads + shape.kv_heads) + 3 * shape.mlp)
    activations = {
        "nothing": shape.layers * here * shape.hidden * width + inside,
        "attention": shape.layers * (here * shape.hidden * width + attention_out) + inside,
        "all": shape.layers * (inside + attention_out),
    }[layout.kept]
    head = 3.0 * 4 * layout.logits + said * shape.hidden * (width + 4)
    if not layout.lora_weights:
        head += shape.vocab * shape.hidden * width  # the weight's gradient before it joins the others
    found = {
        "weights": weights,
        "gradients": gradients,
        "buckets": meeting,
        "optimizer": 0.0 if layout.offload else optimizer,
        "activations": activations,
        "head": head,
    }
    found = {name: value / _GIB for name, value in found.items()}
    return found | {"all": sum(found.values())}
