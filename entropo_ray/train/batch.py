"""Trajectories as one row of unpadded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

Key = tuple[str, int]


@dataclass(frozen=True)
class Row:
    """One trajectory's tokens as arrays."""

    key: Key
    token_ids: np.ndarray  # [L] int32
    action_mask: np.ndarray  # [L] bool

    def read(self) -> Row:
        """The row as if all but its first token were actions."""
        return replace(self, action_mask=np.arange(len(self.token_ids)) > 0)

    def head(self, tokens: int | None) -> Row:
        """The row cut to its first `tokens`; None: all of it."""
        return replace(self, token_ids=self.token_ids[:tokens], action_mask=self.action_mask[:tokens])

    def turns(self) -> list[tuple[int, int]]:
        """(start, stop) of each turn's action tokens: an observation always stands between two replies."""
        return stretches(self.action_mask)


def stretches(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of True in [L] bool."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def swapped(row: Row, other: Row) -> Row:
    """`row` up to its last reply, and there the last reply of `other`: an answer that does not belong to its prompt."""
    start, (begin, stop) = row.turns()[-1][0], other.turns()[-1]
    said = other.token_ids[begin:stop]
    mask = np.concatenate([row.action_mask[:start], np.ones(len(said), dtype=bool)])
    return Row(row.key, np.concatenate([row.token_ids[:start], said]), mask)


def branch(one: Row, other: Row) -> tuple[int, int] | None:
    """The turn of each row in which they part; None where no turn follows their parting.

    It is the turn that holds the first other token. One that had ended there is the same turn, said shorter; where the
    tools' answers part, it is the turn behind them.
    """
    shared = min(len(one.token_ids), len(other.token_ids))
    apart = np.flatnonzero(one.token_ids[:shared] != other.token_ids[:shared])
    first = int(apart[0]) if len(apart) else shared
    said = any(first < len(row.action_mask) and row.action_mask[first] for row in (one, other))
    places = [_turn_at(row, first, said) for row in (one, other)]
    return None if places[0] is None or places[1] is None else (places[0], places[1])


def _turn_at(row: Row, token: int, said: bool) -> int | None:
    """The first turn that ends behind `token`, or at it where one of the two rows still speaks there."""
    return next((i for i, (_, stop) in enumerate(row.turns()) if stop > token or (said and stop == token)), None)


@dataclass(frozen=True)
class Pack:
    """B trajectories of T tokens in all, A of them sampled by the policy, in order."""

    keys: tuple[Key, ...]  # [B]
    lengths: tuple[int, ...]  # [B] tokens, sum T
    actions: tuple[int, ...]  # [B] action tokens, sum A
    turns: tuple[tuple[int, ...], ...]  # [B][M] action tokens of each turn
    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T], from 0 in each trajectory
    predictors: Tensor  # [A] the position before each action token: its hidden state predicts the token
    targets: Tensor  # [A] action token ids

    def to(self, device: torch.device | str) -> Pack:
        """The pack with its tensors on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            predictors=self.predictors.to(device),
            targets=self.targets.to(device),
        )


def pack(rows: Sequence[Row]) -> Pack:
    """Rows end to end. ValueError, naming the key, for a row that starts with an action token (nothing predicts it)."""
    for row in rows:
        if row.action_mask[0]:
            raise ValueError(f"{row.key}: the first token is marked as sampled; a trajectory begins with its prompt")
    tokens = torch.from_numpy(np.concatenate([row.token_ids for row in rows]).astype(np.int64))
    where = torch.from_numpy(np.flatnonzero(np.concatenate([row.action_mask for row in rows])))
    lengths = tuple(len(row.token_ids) for row in rows)
    return Pack(
        keys=tuple(row.key for row in rows),
        lengths=lengths,
        actions=tuple(int(row.action_mask.sum()) for row in rows),
        turns=tuple(tuple(stop - start for start, stop in row.turns()) for row in rows),
        input_ids=tokens[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        predictors=where - 1,
        targets=tokens[where],
    )
