"""Token columns by key: Parquet to numpy, without a Python number per token."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from entropo_ray import store
from entropo_ray.train.batch import Key, Row, stretches


@dataclass(frozen=True)
class Size:
    """Of one trajectory."""

    tokens: int
    actions: int
    lost: int = 0  # action tokens behind the cut


def sizes(product: Path, cut: int | None = None) -> dict[Key, Size]:
    """The size of every row, or of its first `cut` tokens. ValueError, naming the key, where two rows share one."""
    found: dict[Key, Size] = {}
    for table in _tables(product, ["action_mask"]):
        for key, mask in zip(_keys(table), _arrays(table["action_mask"]), strict=True):
            if key in found:
                raise ValueError(f"two rows of {product} share the key {key}: what is learnt from them is undefined")
            kept = mask[:cut]
            actions = int(kept.sum())
            found[key] = Size(tokens=len(kept), actions=actions, lost=int(mask.sum()) - actions)
    return found


def read(product: Path, keys: Collection[Key]) -> dict[Key, Row]:
    """The rows of `keys`. ValueError, naming the first key that is missing."""
    found: dict[Key, Row] = {}
    for table in _tables(product, ["token_ids", "action_mask"], keys):
        columns = (_arrays(table["token_ids"]), _arrays(table["action_mask"]))
        for key, ids, mask in zip(_keys(table), *columns, strict=True):
            found[key] = Row(key, ids, mask)
    _check(found.keys(), keys, product)
    return found


def landed(product: Path, keys: Collection[Key]) -> dict[Key, Row]:
    """As `read`, of a product that may still grow: each of `keys` has arrived."""
    try:
        tables = [pq.read_table(store.part_of(product, key)) for key in keys]
    except FileNotFoundError:  # sealed meanwhile; a row that never arrived is complained of there
        return read(product, keys)
    found: dict[Key, Row] = {}
    for table in tables:
        (key,), (ids,), (mask,) = _keys(table), _arrays(table["token_ids"]), _arrays(table["action_mask"])
        found[key] = Row(key, ids, mask)
    return found


def digests(product: Path, keys: Collection[Key]) -> dict[Key, str]:
    """What tells the tokens of two trajectories apart, by key; rows that are not there are left out."""
    found: dict[Key, str] = {}
    for table in _tables(product, ["token_ids", "action_mask"], keys):
        columns = (_arrays(table["token_ids"]), _arrays(table["action_mask"]))
        for key, ids, mask in zip(_keys(table), *columns, strict=True):
            found[key] = digest(Row(key, ids, mask))
    return found


def digest(row: Row) -> str:
    """Of a trajectory's tokens and mask."""
    parts = (row.token_ids.astype(np.int32).tobytes(), row.action_mask.astype(bool).tobytes())
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def column_sums(
    product: Path, names: Sequence[str], keys: Collection[Key], weights: Mapping[Key, np.ndarray] | None = None
) -> dict[str, dict[Key, float]]:
    """Sums over tokens of list columns, in double: name -> key -> sum. ValueError, naming the first missing key.

    `weights` [A] by key, of the action tokens: 1 where none are given.
    """
    found: dict[str, dict[Key, float]] = {name: {} for name in names}
    for table in _tables(product, list(names), keys):
        for name in names:
            for key, values in zip(_keys(table), _arrays(table[name]), strict=True):
                held = values.astype(np.float64)
                found[name][key] = float(held @ weights[key] if weights else held.sum())
    _check(found[names[0]].keys(), keys, product)
    return found


def turns(product: Path, keys: Collection[Key], cut: int | None = None) -> dict[Key, list[int]]:
    """Action tokens of each turn. ValueError, naming the first missing key."""
    found: dict[Key, list[int]] = {}
    for table in _tables(product, ["action_mask"], keys):
        for key, mask in zip(_keys(table), _arrays(table["action_mask"]), strict=True):
            found[key] = [stop - start for start, stop in stretches(mask[:cut])]
    _check(found.keys(), keys, product)
    return found


def behaviour(product: Path, keys: Collection[Key], cut: int | None = None) -> dict[Key, float]:
    """Sums of the sampler's own log-probs, in nats at T = 1. ValueError, naming the first missing key."""
    found: dict[Key, float] = {}
    for table in _tables(product, ["behaviour_logp"], keys):
        sums = (float(values[:cut].sum(dtype=np.float64)) for values in _arrays(table["behaviour_logp"]))
        found.update(zip(_keys(table), sums, strict=True))
    _check(found.keys(), keys, product)
    return found


def drawn(product: Path, keys: Collection[Key], round: int, cut: int | None = None) -> dict[Key, np.ndarray]:
    """[A] the sampler's log-probs of those `keys` that the engines drew in this round (none of a teacher's)."""
    found: dict[Key, np.ndarray] = {}
    for table in _tables(product, ["kind", "round", "behaviour_logp", "action_mask"], keys):
        columns = (table["kind"].to_pylist(), table["round"].to_pylist())
        lists = (_arrays(table["behaviour_logp"]), _arrays(table["action_mask"]))
        for key, kind, number, values, mask in zip(_keys(table), *columns, *lists, strict=True):
            if kind == "model" and number == round:
                found[key] = values[:cut][mask[:cut].astype(bool)]
    return found


def per_token(product: Path, column: str, keys: Collection[Key]) -> dict[Key, np.ndarray]:
    """[A] values of one list column by key. ValueError, naming the first missing key."""
    found: dict[Key, np.ndarray] = {}
    for table in _tables(product, [column], keys):
        found.update(zip(_keys(table), _arrays(table[column]), strict=True))
    _check(found.keys(), keys, product)
    return found


def _check(found: Collection[Key], keys: Collection[Key], product: Path) -> None:
    missing = sorted(set(keys) - set(found))
    if missing:
        raise ValueError(f"{product} has no row for {missing[0]} ({len(missing)} of {len(set(keys))} keys are missing)")


def _tables(product: Path, columns: list[str], keys: Collection[Key] | None = None) -> Iterator[pa.Table]:
    wanted = None if keys is None else set(keys)
    for part in store.parts_of(product):
        file = pq.ParquetFile(part)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["task_id", "sample", *columns])
            if wanted is not None:
                table = table.filter(pa.array([key in wanted for key in _keys(table)], pa.bool_()))
            yield table


def _keys(table: pa.Table) -> list[Key]:
    return list(zip(table["task_id"].to_pylist(), table["sample"].to_pylist(), strict=True))


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The lists of a column as copies, so that a kept row does not keep its whole table."""
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        values = pc.list_flatten(chunk).to_numpy(zero_copy_only=False)
        ends = np.cumsum(pc.list_value_length(chunk).to_numpy(zero_copy_only=False))
        arrays += [piece.copy() for piece in np.split(values, ends[:-1])]
    return arrays
