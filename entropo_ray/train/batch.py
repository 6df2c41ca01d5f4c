"""Trajectories as one row of unpadded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

Key = tuple[str, int]
_WORTH = 16  # tokens of a prompt, below which it is not told apart from what follows


@dataclass(frozen=True)
class Row:
    """One trajectory's tokens as arrays."""

    key: Key
    token_ids: np.ndarray  # [L] int32
    action_mask: np.ndarray  # [L] bool

    @property
    def prompt(self) -> int:
        """Tokens before the first action; 0 where they are few, or all there is."""
        first = int(self.action_mask.argmax())
        return first if first >= _WORTH else 0

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
    first = common(one.token_ids, other.token_ids)
    said = any(first < len(row.action_mask) and row.action_mask[first] for row in (one, other))
    places = [_turn_at(row, first, said) for row in (one, other)]
    return None if places[0] is None or places[1] is None else (places[0], places[1])


def _turn_at(row: Row, token: int, said: bool) -> int | None:
    """The first turn that ends behind `token`, or at it where one of the two rows still speaks there."""
    return next((i for i, (_, stop) in enumerate(row.turns()) if stop > token or (said and stop == token)), None)


Group = tuple[int, tuple[int, ...]]  # tokens of a prompt, and of each continuation behind it


@dataclass(frozen=True)
class Pack:
    """B trajectories in one row of T tokens, A of them sampled by the policy, trajectory by trajectory.

    Attempts at one task may be neighbours behind a single copy of their prompt: a trajectory is the prompt of its group
    followed by its own continuation.
    """

    keys: tuple[Key, ...]  # [B]
    lengths: tuple[int, ...]  # [B] tokens of each trajectory, its prompt included
    actions: tuple[int, ...]  # [B] action tokens, sum A
    turns: tuple[tuple[int, ...], ...]  # [B][M] action tokens of each turn
    groups: tuple[Group, ...]  # in the row's order; sum T
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


def pack(rows: Sequence[Row], *, share: bool = False) -> Pack:
    """The rows as a pack; `share`: rows of one task stand behind a single copy of their prompt.

    ValueError, naming the key, for a row that starts with an action token (nothing predicts it), or without any token.
    """
    for row in rows:
        if not len(row.token_ids):
            raise ValueError(f"{row.key}: has no token")
        if row.action_mask[0]:
            raise ValueError(f"{row.key}: the first token is marked as sampled; a trajectory begins with its prompt")
    members = _together(rows) if share else [[row] for row in rows]
    ids, positions, predictors, at = [], [], [], 0
    for group in members:
        begin, prompt = at, group[0].prompt
        for row in group:
            kept = 0 if row is group[0] else prompt  # the first brings the prompt
            ids.append(row.token_ids[kept:])
            positions.append(np.arange(kept, len(row.token_ids)))
            before = np.flatnonzero(row.action_mask) - 1
            predictors.append(before + np.where(before < prompt, begin, at - kept))
            at += len(row.token_ids) - kept
    ordered = [row for group in members for row in group]
    return Pack(
        keys=tuple(row.key for row in ordered),
        lengths=tuple(len(row.token_ids) for row in ordered),
        actions=tuple(int(row.action_mask.sum()) for row in ordered),
        turns=tuple(tuple(stop - start for start, stop in row.turns()) for row in ordered),
        groups=tuple((group[0].prompt, tuple(len(row.token_ids) - row.prompt for row in group)) for group in members),
        input_ids=_row(ids)[None],
        position_ids=_row(positions)[None],
        predictors=_row(predictors),
        targets=_row([row.token_ids[row.action_mask] for row in ordered]),
    )


def _row(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _together(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows by prompt, each group where its first row stood; what has no prompt to speak of stays alone."""
    found: dict[tuple[str, bytes | Key], list[Row]] = {}
    for row in rows:
        begin = row.token_ids[: row.prompt].tobytes() if row.prompt else row.key
        found.setdefault((row.key[0], begin), []).append(row)
    return list(found.values())


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two trajectories have in common from their beginning."""
    shortest = min(len(one), len(other))
    apart = np.flatnonzero(one[:shortest] != other[:shortest])
    return int(apart[0]) if len(apart) else shortest
