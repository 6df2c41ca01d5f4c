"""The EntroPO losses on plain tensors (arXiv 2509.12434), alpha = beta + entropy.

    r(tau) = alpha log pi(tau) - beta log pi_ref(tau) = beta (log pi - log pi_ref) + entropy log pi

`tau`'s log-probability is the sum over its action tokens, in nats. The second form is the one that is computed: where
policy and reference agree, its first term is exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

USEFUL = (0.1, 0.9)  # a pair outside teaches almost nothing, or cannot be helped


@dataclass(frozen=True)
class Loss:
    """Per-example losses [B], and what to log of each example, without gradient."""

    values: Tensor
    measures: dict[str, Tensor]


def reward(
    logp: Tensor,
    ref_logp: Tensor,
    *,
    beta: float,
    entropy: float,
    tokens: Tensor | None = None,
    hbar: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """[B] implicit reward from [B] log pi(tau) and log pi_ref(tau).

    `tokens` [B] counts action tokens. `hbar` (nats per token) adds back what length alone costs: entropy * hbar * n.
    `scale` (tokens) makes rewards per token: they are multiplied by scale / n.
    """
    value = beta * (logp - ref_logp) + entropy * logp
    if hbar:
        value = value + entropy * hbar * _counted(tokens)
    if scale is not None:
        value = value * (scale / _counted(tokens))
    return value


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    entropy: float,
    smoothing: float = 0.0,
    gap: float = 0.0,
    nll: float = 0.0,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
    **length: Any,
) -> Loss:
    """-(1 - smoothing) log sigma(m) - smoothing log sigma(-m), m = r(chosen) - r(rejected) - gap.

    `nll` weighs the chosen trajectory's mean negative log-likelihood per action token. All tensors are [B].
    """
    good = reward(chosen, ref_chosen, beta=beta, entropy=entropy, tokens=chosen_tokens, **length)
    bad = reward(rejected, ref_rejected, beta=beta, entropy=entropy, tokens=rejected_tokens, **length)
    margin = good - bad - gap
    values = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    if nll:
        values = values - nll * chosen / _counted(chosen_tokens)
    still = margin.detach()
    weight = torch.sigmoid(-still)
    return Loss(
        values,
        {
            "margin": still,
            "accuracy": (still > 0).to(still.dtype),
            "useful_share": ((weight >= USEFUL[0]) & (weight <= USEFUL[1])).to(still.dtype),
            "logp_chosen": chosen.detach(),
            "logp_rejected": rejected.detach(),
        },
    )


def kto(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    entropy: float,
    weight_pass: float = 1.0,
    weight_fail: float = 1.0,
    tokens: Tensor | None = None,
    **length: Any,
) -> Loss:
    """w_pass (1 - sigma(r - z0)) where `desirable` [B] holds, w_fail (1 - sigma(z0 - r)) elsewhere.

    `baseline` z0 (scalar or [B], in units of reward) is a constant: one that carries a gradient is refused.
    """
    assert not baseline.requires_grad, "the baseline z0 must not carry a gradient"
    value = reward(logp, ref_logp, beta=beta, entropy=entropy, tokens=tokens, **length)
    sign = torch.where(desirable, 1.0, -1.0).to(value.dtype)
    importance = torch.where(desirable, weight_pass, weight_fail).to(value.dtype)
    margin = sign * (value - baseline)
    still, passed = margin.detach(), desirable.to(value.dtype)
    weight = torch.sigmoid(-still)
    return Loss(
        importance * torch.sigmoid(-margin),
        {
            "margin": still,
            "accuracy": (still > 0).to(still.dtype),
            "useful_share": ((weight >= USEFUL[0]) & (weight <= USEFUL[1])).to(still.dtype),
            "reward": value.detach(),
            "logp": logp.detach(),
            "passed": passed,
        },
    )


def imitation(logp: Tensor, tokens: Tensor) -> Loss:
    """[B] summed negative log-likelihoods of action tokens; the caller divides by the tokens of the whole step."""
    return Loss(-logp, {"logp": logp.detach() / tokens})


def _counted(tokens: Tensor | None) -> Tensor:
    if tokens is None:
        raise ValueError("this length or likelihood term needs the number of action tokens of each trajectory")
    return tokens
