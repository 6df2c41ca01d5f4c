"""The EntroPO losses and their relatives on plain tensors (arXiv 2509.12434), alpha = beta + entropy.

    r(tau) = alpha log pi(tau) - beta log pi_ref(tau) = beta (log pi - log pi_ref) + entropy log pi

`tau`'s log-probability is the sum over its action tokens, in nats. The second form is the one that is computed: where
policy and reference agree, its first term is exactly 0. entropy = 0 gives multi-turn DPO, KTO, BCO and IPO. No model
and no configuration in here: tensors are [B], one entry a trajectory or a pair, and should be float64 (a long sum in
fp32 drowns the difference that a preference is made of).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    return by_length(value, entropy=entropy, tokens=tokens, hbar=hbar, scale=scale)


def by_length(
    value: Tensor, *, entropy: float, tokens: Tensor | None = None, hbar: float = 0.0, scale: float | None = None
) -> Tensor:
    """[B] rewards, or parts of them that hold the entropy term, with the length treatment of `reward`."""
    if hbar:
        value = value + entropy * hbar * _counted(tokens)
    if scale is not None:
        value = value * (scale / _counted(tokens))
    return value


def _counted(tokens: Tensor | None) -> Tensor:
    if tokens is None:
        raise ValueError("this length or likelihood term needs the number of action tokens of each trajectory")
    return tokens


# --- pairs -----------------------------------------------------------------------------------------------------------


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

    `nll` weighs the chosen trajectory's mean negative log-likelihood per action token (RPO, arXiv 2404.19733); `gap`
    is SimPO's margin (arXiv 2405.14734). All tensors are [B]. d values / d log pi(chosen) is
    alpha (sigma(m) - (1 - smoothing)), and the negative of it for the rejected one.
    """
    margin = _margin(
        chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens, beta=beta, entropy=entropy, **length
    )
    margin = margin - gap
    values = -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)
    return _pairs(values, margin, chosen, rejected, ref_chosen, ref_rejected, nll, chosen_tokens)


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    entropy: float,
    gap: float,
    nll: float = 0.0,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
    **length: Any,
) -> Loss:
    """(m - gap)^2, m = r(chosen) - r(rejected): pairs of a resolved and an unresolved trajectory are worth `gap` > 0.

    Its minimiser is the optimum for the utility gap u(chosen) - u(rejected) = gap; with entropy 0 and
    gap = 1 / (2 tau) times beta it is IPO (arXiv 2310.12036) up to the factor beta^2. ValueError unless gap > 0.
    """
    if gap <= 0:
        raise ValueError(f"gap={gap}: ipo needs the utility gap of a pair, above 0")
    margin = _margin(
        chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens, beta=beta, entropy=entropy, **length
    )
    values = (margin - gap) ** 2
    return _pairs(values, margin, chosen, rejected, ref_chosen, ref_rejected, nll, chosen_tokens)


def _margin(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor | None,
    rejected_tokens: Tensor | None,
    **options: Any,
) -> Tensor:
    good = reward(chosen, ref_chosen, tokens=chosen_tokens, **options)
    return good - reward(rejected, ref_rejected, tokens=rejected_tokens, **options)


def _pairs(
    values: Tensor,
    margin: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    nll: float,
    chosen_tokens: Tensor | None,
) -> Loss:
    if nll:
        values = values - nll * chosen / _counted(chosen_tokens)
    gained, other = (chosen - ref_chosen).detach(), (rejected - ref_rejected).detach()
    return Loss(
        values,
        _decided(margin)
        | {
            "logp_chosen": chosen.detach(),
            "logp_rejected": rejected.detach(),
            "ratio_chosen": gained,
            "ratio_rejected": other,
            "displaced_share": (gained < 0).to(gained.dtype),  # the chosen became less likely than under the reference
        },
    )


# --- labels ----------------------------------------------------------------------------------------------------------


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
    """w_pass (1 - sigma(r - z0)) where `desirable` [B] holds, w_fail (1 - sigma(z0 - r)) elsewhere (arXiv 2402.01306).

    `baseline` z0 (scalar or [B], in units of reward) is a constant: one that carries a gradient is an assertion error.
    Not a proper loss: an example's own optimum is at infinity.
    """
    assert not baseline.requires_grad, "the baseline z0 must not carry a gradient"
    value = reward(logp, ref_logp, beta=beta, entropy=entropy, tokens=tokens, **length)
    importance, margin, measures = _labelled(value, logp, desirable, baseline, weight_pass, weight_fail)
    return Loss(importance * torch.sigmoid(-margin), measures)


def bco(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    delta: Tensor,
    *,
    beta: float,
    entropy: float,
    weight_pass: float = 1.0,
    weight_fail: float = 1.0,
    tokens: Tensor | None = None,
    **length: Any,
) -> Loss:
    """-log sigma(r - delta) where `desirable` [B] holds, -log sigma(delta - r) elsewhere (BCO, arXiv 2404.04656).

    `delta` (scalar or [B], in units of reward) may carry a gradient. Proper: if P(pass | tau) = sigma(u - b), the
    minimiser is the optimum of the objective, and delta = b - V_1 of the prompt.
    """
    value = reward(logp, ref_logp, beta=beta, entropy=entropy, tokens=tokens, **length)
    importance, margin, measures = _labelled(value, logp, desirable, delta, weight_pass, weight_fail)
    return Loss(-importance * logsigmoid(margin), measures)


def imitation(logp: Tensor, tokens: Tensor) -> Loss:
    """[B] summed negative log-likelihoods of action tokens; the caller divides by the tokens of the whole step."""
    return Loss(-logp, {"logp": logp.detach() / tokens})


def _labelled(
    value: Tensor, logp: Tensor, desirable: Tensor, point: Tensor, weight_pass: float, weight_fail: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """[B] weight of each label, [B] margin of its reward over the reference point, and measures."""
    importance = torch.where(desirable, weight_pass, weight_fail).to(value.dtype)
    margin = torch.where(desirable, 1.0, -1.0).to(value.dtype) * (value - point)
    far = (value.detach() - point.detach()).abs() > 4  # sigma' is below .018 there
    measures = {
        "reward": value.detach(),
        "logp": logp.detach(),
        "passed": desirable.to(value.dtype),
        "saturated_share": far.to(value.dtype),
    }
    return importance, margin, _decided(margin) | measures


def _decided(margin: Tensor) -> dict[str, Tensor]:
    still = margin.detach()
    return {"margin": still, "accuracy": (still > 0).to(still.dtype), "useful_share": useful(still)}


def useful(margin: Tensor) -> Tensor:
    """[B] 1.0 where sigma(-margin), with which a pair or label pulls, lies within USEFUL."""
    weight = torch.sigmoid(-margin)
    return ((weight >= USEFUL[0]) & (weight <= USEFUL[1])).to(margin.dtype)


# --- the reference point z0 of kto: the reward of a typical own output ------------------------------------------------


def z0_exact(kl: Tensor, nats: Tensor, *, beta: float, entropy: float, **length: Any) -> Tensor:
    """[B] beta * KL - entropy * H of each trajectory, from its sums over action tokens of exact KL and entropy (nats).

    Its mean over on-policy trajectories is z0, the mean reward, unless `scale` is given: a factor 1 / n of the
    trajectory itself does not commute with that mean. Negative wherever entropy outweighs KL, and never clamped.
    """
    return by_length(beta * kl - entropy * nats, entropy=entropy, **length).detach()


def z0_group(rewards: Tensor, groups: Sequence[Any], fallback: float) -> tuple[Tensor, int]:
    """[B] mean reward of the others of the same group, and how many are alone: those get `fallback`.

    `groups`: one hashable name an entry, of its task.
    """
    held = rewards.detach()
    places: dict[Any, list[int]] = {}
    for place, name in enumerate(groups):
        places.setdefault(name, []).append(place)
    baseline = torch.full_like(held, fallback)
    alone = 0
    for mine in places.values():
        if len(mine) == 1:
            alone += 1
            continue
        own = held[mine]
        baseline[mine] = (own.sum() - own) / (len(mine) - 1)
    return baseline, alone


def z0_mismatched(ratio: Tensor, nats: Tensor, *, beta: float, entropy: float) -> Tensor:
    """Scalar beta * max(0, mean log-ratio of mismatched [B]) - entropy * mean H [B] (KTO's and HALO's estimator).

    Only the KL part is estimated from mismatched answers, and only it is clamped: entropy is not bounded below by 0
    reward. ValueError below two mismatched examples, where nothing was exchanged.
    """
    if len(ratio) < 2:
        raise ValueError(f"z0=kto: {len(ratio)} examples in a batch, and mismatching needs 2; raise train.batch")
    return (beta * ratio.mean().clamp(min=0) - entropy * nats.mean()).detach()


def z0_released(logp: Tensor, ref_logp: Tensor, *, beta: float, entropy: float) -> Tensor:
    """Scalar beta * max(0, mean [alpha log pi(y') - beta log pi_ref(y')]) of mismatched y' [B], as published code does.

    A reward stands where a log-ratio belongs, is multiplied by beta once more, and its entropy part is clamped away.
    For replication alone, with rewards at entropy 0.
    """
    return (beta * ((beta + entropy) * logp - beta * ref_logp).mean().clamp(min=0)).detach()


# --- weights of turns and of stale trajectories, and the weight of entropy --------------------------------------------


def turn_weights(turns: int, gamma: float) -> list[float]:
    """DMPO's weights of turns j = 0 .. N-1: gamma^j (1 - gamma^(N-j)) / (1 - gamma^N); (N - j) / N at gamma = 1.

    arXiv 2406.14868. ValueError unless 0 < gamma <= 1 and turns >= 1.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"train.gamma={gamma}: must lie in (0, 1]")
    if turns < 1:
        raise ValueError(f"{turns} turns: a trajectory without a turn has no weights")
    if gamma == 1:
        return [(turns - j) / turns for j in range(turns)]
    return [gamma**j * (1 - gamma ** (turns - j)) / (1 - gamma**turns) for j in range(turns)]


def staleness(logp: Tensor, behaviour_logp: Tensor, tokens: Tensor) -> Tensor:
    """[B] drift since sampling, in nats per action token: (log pi_now - log pi_behaviour) / n."""
    return (logp - behaviour_logp) / tokens


def wpo_weights(drift: Tensor) -> Tensor:
    """[B] importance of stale trajectories, at most 1: exp of the drift per token (WPO, arXiv 2406.11827).

    Per token, as a whole trajectory's ratio is 0 or infinite in practice. The weight of a pair is its members' product.
    """
    return drift.clamp(max=0).exp().detach()


def effective_size(weights: Tensor) -> float:
    """Effective sample size (sum w)^2 / sum w^2 of [B] weights; 0 where all are 0."""
    squares = float((weights.double() ** 2).sum())
    return float(weights.double().sum()) ** 2 / squares if squares else 0.0


def dual(entropy: float, measured: float, target: float, *, step: float, low: float, high: float) -> float:
    """The next entropy weight: log lambda <- log lambda + step (target - measured), within [low, high].

    Dual ascent on the constraint that the policy's entropy (nats per action token) is `target`, as SAC does.
    """
    return min(high, max(low, entropy * math.exp(step * (target - measured))))
