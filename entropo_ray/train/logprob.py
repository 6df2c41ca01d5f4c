"""Log-probabilities, entropies and KL of action tokens, without ever holding all logits.

Hidden states are gathered at the positions before action tokens, so the head sees nothing else; logits live for one
tile of positions and vocabulary, once forward and once again backward. With z the logits, m their greatest, and sums
over the vocabulary that are rescaled whenever a later tile holds a greater one:

    s = sum exp(z - m)      x = sum exp(z - m) (z - m)      log p_y = z_y - m - log s      H = log s - x / s

    dlog p_y/dz_v = [v = y] - p_v        dH/dz_v = -p_v (log p_v + H)

KL(p | q) = sum exp(z - m) ((z - m) - (z' - m')) / s - log s + log s' needs the logits z' of the other model at the
same positions, tile by tile; it is a measurement and carries no gradient. A head that is split over ranks by rows
gives the same sums, merged in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from entropo_ray.train import attention
from entropo_ray.train.batch import Pack
from entropo_ray.train.parallel import Parallel, Part

# fp32 logits held at once, by kind of device: 256 MiB keep a GPU busy, 4 MiB stay near a CPU core
TILE_FLOATS = {"cuda": 1 << 26, "cpu": 1 << 20}
_TILE_ROWS = {"cuda": 4096, "cpu": 512}  # of a vocabulary that does not fit in a tile
_LEAST_ROWS = 64  # of a whole vocabulary; fewer would read the weights too often
_EVEN = 16  # a CPU's matrix product of fewer rows sums in another order; rows are filled up to a multiple


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


@dataclass(frozen=True)
class Shard:
    """Which rows of a head that is split over the ranks of a group are here."""

    group: Any  # of torch.distributed
    start: int  # the first token id


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits, apart from its weights."""

    softcap: float | None = None  # z becomes c tanh(z / c)
    floats: int = 0  # logits held at once; 0: what suits the device
    shard: Shard | None = None


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, head: Head, anchor: Anchor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp = torch.empty(len(target), dtype=torch.float32, device=hidden.device)
        entropy, total = torch.empty_like(logp), torch.empty_like(logp)
        kl = logp.new_empty(len(target) if anchor else 0)
        tall, wide = _tile(weight, head.floats)
        start = head.shard.start if head.shard else 0
        for rows in _slices(len(target), tall):
            found: _Sums | None = None
            for columns in _slices(len(weight), wide):
                logits = _logits(hidden[rows], weight, bias, head.softcap, columns)
                other = None if anchor is None else _others(anchor, rows, columns)
                new = _Sums.of(logits, target[rows] - (start + columns.start), other)
                found = new if found is None else found.joined(new)
            assert found is not None
            if head.shard:
                found = found.gathered(head.shard.group)
            rest = found.mass.log()
            total[rows] = found.top + rest
            logp[rows] = found.chosen - rest
            entropy[rows] = rest - found.slope / found.mass
            if anchor:
                kl[rows] = found.gap / found.mass - rest + found.other_mass.log()
        # The parameter itself is saved, never a cast copy: ZeRO-3 refills its storage before backward.
        ctx.save_for_backward(hidden, weight, target, bias, total, entropy)
        ctx.head = head
        ctx.mark_non_differentiable(kl)
        return logp, entropy, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, bias, total, entropy = ctx.saved_tensors
        head: Head = ctx.head
        d_logp, d_entropy, _ = upstream
        through_entropy = d_entropy if bool(d_entropy.any()) else None
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        tall, wide = _tile(weight, head.floats)
        start = head.shard.start if head.shard else 0
        # vocabulary outside: a stripe of the weight's gradient is finished before the next begins
        for columns in _slices(len(weight), wide):
            stripe = None if d_weight is None else d_weight[columns]
            if stripe is not None and stripe.dtype != torch.float32:
                stripe = torch.zeros_like(stripe, dtype=torch.float32)
            for rows in _slices(len(target), tall):
                slope = _logits(hidden[rows], weight, bias, head.softcap, columns)
                bend = None if head.softcap is None else 1 - (slope / head.softcap) ** 2
                bent = None if through_entropy is None else through_entropy[rows]
                slope = _slope(slope, total[rows], entropy[rows], d_logp[rows], bent)
                _put(slope, target[rows] - (start + columns.start), d_logp[rows])
                if bend is not None:
                    slope *= bend
                if d_bias is not None:
                    d_bias[columns] += slope.sum(0)
                slope = slope.to(weight.dtype)
                _add_product(d_hidden[rows], slope, weight[columns])
                if stripe is not None:
                    _add_product(stripe, slope.T, hidden[rows].to(weight.dtype))
            if d_weight is not None and stripe is not None and stripe.dtype != d_weight.dtype:
                d_weight[columns] = stripe
        if head.shard:
            dist.all_reduce(d_hidden, group=head.shard.group)
        d_bias = None if d_bias is None or bias is None else d_bias.to(bias.dtype)
        return d_hidden.to(hidden.dtype), d_weight, None, d_bias, None, None


@dataclass(frozen=True)
class _Sums:
    """What a part of the vocabulary contributes, for each position of a tile; see the module's text.

    Vectors in double, so that many tiles are as exact as one.
    """

    top: Tensor  # m
    mass: Tensor  # s
    slope: Tensor  # x
    chosen: Tensor  # z_y - m, or -inf where the target lies in another part
    gap: Tensor  # sum exp(z - m) ((z - m) - (z' - m')), empty without another model
    other_top: Tensor  # m'
    other_mass: Tensor  # s'

    @classmethod
    def of(cls, logits: Tensor, target: Tensor, other: Tensor | None) -> _Sums:
        """`target`: index into these columns, outside of them where another part holds it. Overwrites the logits."""
        top = logits.amax(dim=-1)
        logits -= top[:, None]
        inside = (target >= 0) & (target < logits.shape[1])
        chosen = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        rise = logits.exp()
        mass, slope = rise.sum(dim=-1), torch.linalg.vecdot(rise, logits)
        gap = other_top = other_mass = top[:0]
        if other is not None:
            other_top = other.amax(dim=-1)
            other -= other_top[:, None]
            other_mass = other.exp().sum(dim=-1)
            gap = torch.linalg.vecdot(rise, torch.sub(logits, other, out=other))
        parts = (top, mass, slope, chosen.masked_fill(~inside, -torch.inf), gap, other_top, other_mass)
        return cls(*(part.double() for part in parts))

    def at(self, top: Tensor, other_top: Tensor) -> _Sums:
        """The same sums relative to greater maxima."""
        fall, other_fall = self.top - top, self.other_top - other_top
        less = fall.exp()
        gap = less * (self.gap + (fall - other_fall) * self.mass) if len(self.gap) else self.gap
        return _Sums(
            top,
            less * self.mass,
            less * (self.slope + fall * self.mass),
            self.chosen + fall,
            gap,
            other_top,
            self.other_mass * other_fall.exp(),
        )

    def joined(self, more: _Sums) -> _Sums:
        top, other_top = torch.maximum(self.top, more.top), torch.maximum(self.other_top, more.other_top)
        one, two = self.at(top, other_top), more.at(top, other_top)
        return _Sums(
            top,
            one.mass + two.mass,
            one.slope + two.slope,
            torch.maximum(one.chosen, two.chosen),
            one.gap + two.gap,
            other_top,
            one.other_mass + two.other_mass,
        )

    def gathered(self, group: Any) -> _Sums:
        """Those of all ranks together."""
        top, other_top = self.top.clone(), self.other_top.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        if len(other_top):
            dist.all_reduce(other_top, dist.ReduceOp.MAX, group=group)
        mine = self.at(top, other_top)
        parts = [mine.mass, mine.slope, mine.gap, mine.other_mass]
        summed, chosen = torch.cat(parts), mine.chosen.clone()
        dist.all_reduce(summed, group=group)
        dist.all_reduce(chosen, dist.ReduceOp.MAX, group=group)
        mass, slope, gap, other_mass = torch.split(summed, [len(part) for part in parts])
        return _Sums(top, mass, slope, chosen, gap, other_top, other_mass)


def _tile(weight: Tensor, floats: int) -> tuple[int, int]:
    """Rows and columns of a tile: the whole vocabulary where that leaves rows enough to read it for.

    Whatever the number of rows in all: other columns would be other sums, and a trajectory have other bits elsewhere.
    """
    kind, vocabulary = weight.device.type, len(weight)
    floats = floats or TILE_FLOATS[kind]
    if floats >= _LEAST_ROWS * vocabulary:
        return floats // vocabulary, vocabulary
    rows = min(_TILE_ROWS[kind], max(_LEAST_ROWS, floats // _LEAST_ROWS))
    return rows, max(_LEAST_ROWS, floats // rows)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other, the sum in fp32."""
    if one.dtype == torch.float32:
        total.addmm_(one, other)
    else:
        total += one @ other


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, columns: slice) -> Tensor:
    """fp32 logits of some columns, soft-capped where the model says so."""
    missing = -len(hidden) % _EVEN
    rows = pad(hidden, (0, 0, 0, missing)) if missing else hidden
    part = None if bias is None else bias[columns]
    logits = linear(rows.to(weight.dtype), weight[columns], part)[: len(hidden)].float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _others(anchor: Anchor, rows: slice, columns: slice) -> Tensor:
    """Another model's logits of a tile, by the same operations as ours: equal models have a KL of exactly 0."""
    return _logits(anchor.hidden[rows], anchor.weight, anchor.bias, anchor.softcap, columns)


def _slope(logits: Tensor, total: Tensor, entropy: Tensor, d_logp: Tensor, d_entropy: Tensor | None) -> Tensor:
    """The gradient that reaches the logits by way of p; overwrites them."""
    log_p = logits.sub_(total[:, None])
    if d_entropy is None:
        return log_p.exp_().mul_(-d_logp[:, None])
    p = log_p.exp()
    return -p * (d_logp[:, None] + d_entropy[:, None] * (log_p + entropy[:, None]))


def _put(slope: Tensor, target: Tensor, d_logp: Tensor) -> None:
    """Add [v = y] d_logp, where these columns hold y."""
    inside = (target >= 0) & (target < slope.shape[1])
    where = target.clamp(0, slope.shape[1] - 1)[:, None]
    slope.scatter_(1, where, slope.gather(1, where) + (d_logp * inside)[:, None])  # one a row: no order, unlike adding


def score(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    head: Head = Head(),
    anchor: Anchor | None = None,
) -> Scores:
    """Scores of `target` [A] under the head `weight` [V, H] at `hidden` [A, H]; differentiable in all three floats.

    KL to `anchor` where one is given: a model over the same vocabulary [V]. With head.shard, `weight`, `bias` and the
    anchor's are this rank's rows, `hidden` and `target` are the same on all ranks, and so are the scores.
    """
    found = _Score.apply(hidden, weight, target, bias, head, anchor)  # type: ignore[no-untyped-call]
    return Scores(found[0], found[1], found[2] if anchor else None)


class Scorer(nn.Module):
    """A causal language model of transformers that scores packs instead of returning logits."""

    def __init__(self, model: Any, *, floats: int = 0, parallel: Parallel | None = None) -> None:
        """`floats`: logits held at once; 0: what suits the device. `parallel`: the ranks that share each pack."""
        super().__init__()
        self.model = model
        self.parallel = parallel
        model.set_attn_implementation(attention.NAME)
        install(model, floats=floats)

    def forward(self, pack: Pack, anchor: Anchor | None = None) -> Scores:
        """Scores of the pack's action tokens, in its order."""
        part = self._part(pack)
        found = self.model.get_output_embeddings()(self._hidden(pack, part), part.targets, anchor)
        if self.parallel and isinstance(part, Part):
            found = [self.parallel.whole(values, part, len(pack.targets)) for values in found[: 3 if anchor else 2]]
        return Scores(found[0], found[1], found[2] if anchor else None)

    @torch.no_grad()
    def anchor(self, pack: Pack) -> Anchor:
        """What the KL of another model's pack to this one needs."""
        head = self.model.get_output_embeddings()
        return Anchor(self._hidden(pack, self._part(pack)), head.weight, head.bias, _softcap(self.model))

    def _part(self, pack: Pack) -> Pack | Part:
        return self.parallel.part(pack) if self.parallel else pack

    def _hidden(self, pack: Pack, part: Pack | Part) -> Tensor:
        """[A, H] last hidden states at the positions before action tokens; of the part that is here."""
        more = {"parallel": self.parallel} if self.parallel else {}
        hidden = self.model.base_model(
            input_ids=part.input_ids, position_ids=part.position_ids, groups=pack.groups, use_cache=False, **more
        ).last_hidden_state[0]
        gathered: Tensor = hidden.index_select(0, part.predictors)
        return gathered


def install(model: Any, *, floats: int = 0) -> None:
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
    options = Head(softcap=_softcap(model), floats=floats)

    def forward(hidden: Tensor, target: Tensor, anchor: Anchor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _Score.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, target, head.bias, options, anchor
        )
        return found

    head.forward = forward


def _softcap(model: Any) -> float | None:
    found: float | None = getattr(model.config, "final_logit_softcapping", None)
    return found


def sums(values: Tensor, pack: Pack) -> Tensor:
    """[B] float64 sums over the action tokens of each trajectory of [A] values."""
    return torch.stack([turns.sum() for turns in turn_sums(values, pack)])


def turn_sums(values: Tensor, pack: Pack) -> list[Tensor]:
    """[M] float64 sums over the action tokens of each turn of [A] values; M differs between trajectories."""
    # fp32 sums of thousands of tokens lose the small differences that a preference is made of
    parts = torch.split(values.double(), [count for turns in pack.turns for count in turns])
    summed = torch.stack([part.sum() for part in parts]) if parts else values.double()
    return list(torch.split(summed, [len(turns) for turns in pack.turns]))
