"""Log-probabilities, entropies and KL of action tokens, without ever holding all logits.

Hidden states are gathered at the positions before action tokens, so the head sees nothing else; logits live for one
tile of positions, once forward and once again backward. With z the logits, p = softmax(z), l = logsumexp(z):

    log p_y = z_y - l        H = -sum p log p       dlog p_y/dz_v = [v = y] - p_v        dH/dz_v = -p_v (log p_v + H)

KL(p | q) = sum p (log p - log q) needs the logits of the other model at the same positions, tile by tile; it is a
measurement and carries no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropo_ray.train import attention
from entropo_ray.train.batch import Pack

# fp32 logits held at once, by kind of device: 256 MiB keep a GPU busy, 4 MiB stay near a CPU core
_TILE_FLOATS = {"cuda": 1 << 26, "cpu": 1 << 20}


@dataclass(frozen=True)
class Scores:
    """Of each action token of a pack, in nats, fp32."""

    logp: Tensor  # [A]
    entropy: Tensor  # [A], exact
    kl: Tensor | None = None  # [A], exact, to the distribution of another model; without gradient


@dataclass(frozen=True)
class Anchor:
    """The other model's last hidden states [A, H'] and its head [V, H'], which KL is measured to."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        anchor: Anchor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        entropy, total = torch.empty_like(logp), torch.empty_like(logp)
        kl = logp.new_empty(len(target) if anchor else 0)
        for rows in _tiles(len(target), weight):
            logits = _logits(hidden[rows], weight, bias, softcap)
            top = logits.amax(dim=-1, keepdim=True)
            logits -= top  # p is wanted only up to its sum: one exponential gives both results
            rise = logits.exp()
            mass = rise.sum(dim=-1)
            rest = mass.log()
            total[rows] = top.squeeze(1) + rest
            logp[rows] = logits.gather(1, target[rows, None]).squeeze(1) - rest
            entropy[rows] = rest - torch.linalg.vecdot(rise, logits) / mass
            if anchor:
                logits -= rest[:, None]
                kl[rows] = torch.linalg.vecdot(rise, logits - _log_q(anchor, rows)) / mass
        # The parameter itself is saved, never a cast copy: ZeRO-3 refills its storage before backward.
        ctx.save_for_backward(hidden, weight, target, bias, total, entropy)
        ctx.softcap = softcap
        ctx.mark_non_differentiable(kl)
        return logp, entropy, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_logp, d_entropy, _ = upstream
        hidden, weight, target, bias, total, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        through_entropy = bool(d_entropy.any())
        for rows in _tiles(len(target), weight):
            logits = _logits(hidden[rows], weight, bias, ctx.softcap)
            bend = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            log_p = logits.sub_(total[rows, None])
            if through_entropy:
                p = log_p.exp()
                slope = -p * (d_logp[rows, None] + d_entropy[rows, None] * (log_p + entropy[rows, None]))
            else:
                slope = log_p.exp_().mul_(-d_logp[rows, None])
            slope.scatter_add_(1, target[rows, None], d_logp[rows, None])
            if bend is not None:
                slope *= bend
            if d_bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(weight.dtype)
            d_hidden[rows] = slope @ weight
            d_weight += slope.T @ hidden[rows].to(weight.dtype)
        return d_hidden, d_weight.to(weight.dtype), None, None if d_bias is None else d_bias.to(bias.dtype), None, None


def _tiles(rows: int, weight: Tensor) -> list[slice]:
    size = max(64, _TILE_FLOATS[weight.device.type] // weight.shape[0])
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """fp32 logits, soft-capped where the model says so."""
    logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _log_q(anchor: Anchor, rows: slice) -> Tensor:
    """The other model's log-probs of a tile, by the same operations as ours: equal models have a KL of exactly 0."""
    logits = _logits(anchor.hidden[rows], anchor.weight, anchor.bias, anchor.softcap)
    logits -= logits.amax(dim=-1, keepdim=True)
    logits -= logits.exp().sum(dim=-1).log()[:, None]
    return logits


def score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    anchor: Anchor | None = None,
) -> Scores:
    """Scores of `target` [A] under the head `weight` [V, H] at `hidden` [A, H]; differentiable in all three floats.

    KL to `anchor` where one is given: a model over the same vocabulary [V].
    """
    found = _Score.apply(hidden, weight, target, bias, softcap, anchor)  # type: ignore[no-untyped-call]
    return Scores(found[0], found[1], found[2] if anchor else None)


class Scorer(nn.Module):
    """A causal language model of transformers that scores packs instead of returning logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.set_attn_implementation(attention.NAME)
        install(model)

    def forward(self, pack: Pack, anchor: Anchor | None = None) -> Scores:
        logp, entropy, kl = self.model.get_output_embeddings()(self._hidden(pack), pack.targets, anchor)
        return Scores(logp, entropy, kl if anchor else None)

    @torch.no_grad()
    def anchor(self, pack: Pack) -> Anchor:
        """What the KL of another model's pack to this one needs."""
        head = self.model.get_output_embeddings()
        softcap = getattr(self.model.config, "final_logit_softcapping", None)
        return Anchor(self._hidden(pack), head.weight, head.bias, softcap)

    def _hidden(self, pack: Pack) -> Tensor:
        """[A, H] last hidden states at the positions before action tokens."""
        hidden = self.model.base_model(
            input_ids=pack.input_ids, position_ids=pack.position_ids, lengths=pack.lengths, use_cache=False
        ).last_hidden_state[0]
        gathered: Tensor = hidden.index_select(0, pack.predictors)
        return gathered


def install(model: Any) -> None:
    """Make the head's forward (hidden, target, anchor) -> (logp, entropy, kl): ZeRO-3's hooks see its weight used.

    A plain tuple: those hooks find no tensors in a dataclass, and would not gather the weight before backward.

    Raises ValueError on a head that is more than a linear layer.
    """
    head = model.get_output_embeddings()
    kind = type(head)
    if kind is not nn.Linear:
        raise ValueError(f"model: the head of {type(model).__name__} is a {kind.__name__}, not a plain Linear")
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model: {type(model).__name__} scales its logits by {name}, which is not supported")
    softcap = getattr(model.config, "final_logit_softcapping", None)

    def forward(hidden: Tensor, target: Tensor, anchor: Anchor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _Score.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, target, head.bias, softcap, anchor
        )
        return found

    head.forward = forward


def sums(values: Tensor, pack: Pack) -> Tensor:
    """[B] float64 sums over the action tokens of each trajectory of [A] values."""
    return torch.stack([turns.sum() for turns in turn_sums(values, pack)])


def turn_sums(values: Tensor, pack: Pack) -> list[Tensor]:
    """[M] float64 sums over the action tokens of each turn of [A] values; M differs between trajectories."""
    # fp32 sums of thousands of tokens lose the small differences that a preference is made of
    parts = torch.split(values.double(), [count for turns in pack.turns for count in turns])
    summed = torch.stack([part.sum() for part in parts]) if parts else values.double()
    return list(torch.split(summed, [len(turns) for turns in pack.turns]))
