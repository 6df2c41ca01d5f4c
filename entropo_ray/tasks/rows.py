"""Rows of public data sets as tasks: from files, a directory of them, a name on the hub, or a pack that exists.

A row's family is recognized by its columns, never by a name. Reading runs nothing: which visible tests a task has, and
whether it holds at all, has to be found in sandboxes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entropo_ray.tasks import pack, r2egym, rebench, swebench, swegym, swesmith
from entropo_ray.tasks.columns import Family, Images, Row
from entropo_ray.tasks.pack import Mined

__all__ = ["FAMILIES", "Images", "check_parsers", "read"]

# in this order: the marks of the later ones are columns of the earlier ones too
FAMILIES: dict[str, Family] = {
    "r2egym": r2egym.FAMILY,
    "rebench": rebench.FAMILY,
    "swebench": swebench.FAMILY,
    "swesmith": swesmith.FAMILY,
    "swebench4": swebench.FAMILY_OLD,
    "swegym": swegym.FAMILY,
}
_SUFFIXES = (".json", ".jsonl", ".parquet")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # it becomes the name of a directory
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
_BATCH = 32  # rows of parquet at once; some hold a megabyte


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """The rows of one file, or of one split on the hub."""

    where: str
    columns: frozenset[str]
    rows: Iterator[Mapping[str, Any]]  # to be read once


def read(
    where: str | Path,
    *,
    images: Images | None = None,
    held_out: float = 0.0,
    seed: int = 0,
    refused: dict[str, str] | None = None,
) -> list[Mined]:
    """The tasks of a .json, .jsonl or .parquet file, a directory of them, a hub name (owner/name[:split]) or a pack.

    Benchmarks are test tasks, the rest is train, but for the share `held_out` of its repositories, drawn by `seed`;
    a repository has one split, whatever families speak of it. The tasks of a pack keep theirs.
    ValueError, one line, for the first row that cannot be read, or with `refused` a reason there by row id.
    """
    images = images or Images()
    images.check(FAMILIES)
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out}: give a share of the repositories, from 0 to below 1")
    path = Path(where).expanduser()
    if pack.whole(path):
        return _of_pack(path)
    found: list[tuple[Family, Mined]] = []
    for table in _tables(str(where), path):
        found += _converted(table, images, refused)
    repeated = [key for key, times in Counter(m.task.id for _, m in found).items() if times > 1]
    if repeated:
        raise ValueError(
            f"{where}: {len(repeated)} ids stand on two rows or more, first {repeated[0]}; read them apart"
        )
    return _split(found, held_out, seed)


def check_parsers(mined: Iterable[Mined]) -> None:
    """ValueError, one line, for a log parser that the installed swebench does not have. Takes a second to load it."""
    from swebench.harness.log_parsers import PARSER_REGISTRY

    for m in mined:
        if m.answer.parser != "pytest" and m.answer.parser not in PARSER_REGISTRY:
            raise ValueError(f"{m.task.id}: parser={m.answer.parser}: not among the {len(PARSER_REGISTRY)} of swebench")


def _of_pack(path: Path) -> list[Mined]:
    """The tasks of a pack that have an answer."""
    answers = pack.answers(path)
    return [Mined(task=task, answer=answers[task.id]) for task in pack.tasks(path) if task.id in answers]


# Rows


def _converted(table: _Table, images: Images, refused: dict[str, str] | None) -> Iterator[tuple[Family, Mined]]:
    family = _recognized(table)
    needed = (*family.columns, *family.extra)
    for number, values in enumerate(table.rows, start=1):
        row = _row(table.where, family, {key: values[key] for key in needed if key in values}, number)
        try:
            for column in family.columns:
                if column not in row.values:
                    raise row.odd(column, "a value")
            yield family, family.mined(row, images)
        except ValueError as error:
            if refused is None:
                raise
            refused[row.id] = str(error)


def _recognized(table: _Table) -> Family:
    for family in FAMILIES.values():
        if table.columns.issuperset(family.marks) and table.columns.isdisjoint(family.others):
            return family
    raise ValueError(
        f"{table.where}: columns of no known family: {', '.join(sorted(table.columns)) or 'none'}; "
        f"known: {'; '.join(f'{name} by {_marks(family)}' for name, family in FAMILIES.items())}"
    )


def _marks(family: Family) -> str:
    return " + ".join(family.marks) + (f" without {', '.join(family.others)}" if family.others else "")


def _row(where: str, family: Family, values: Mapping[str, Any], number: int) -> Row:
    row = Row(where=where, id=f"number {number}", values=values)
    key = "__".join(row.text(column) for column in family.key)
    if not _SAFE_ID.fullmatch(key):
        raise row.odd(family.key[0], "an id of letters, digits and . _ + -")
    return replace(row, id=key)


def _split(found: Sequence[tuple[Family, Mined]], held_out: float, seed: int) -> list[Mined]:
    """Each task with its split, which is its repository's."""
    tested = {_project(m) for family, m in found if family.split == "test"}
    free = {_project(m) for _, m in found} - tested
    number = max(1, round(held_out * len(free))) if held_out and free else 0
    if number and number == len(free):
        raise ValueError(f"held_out={held_out}: {len(free)} repositories cannot be split; give 0, or read more rows")
    tested |= set(sorted(free, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode()).digest())[:number])
    return [replace(m, task=replace(m.task, split="test" if _project(m) in tested else "train")) for _, m in found]


def _project(m: Mined) -> str:
    """What tells repositories apart. Families write owners differently or not at all, so that they do not count."""
    return m.task.repo.rpartition("/")[2].lower()


# Tables


def _tables(where: str, path: Path) -> Iterator[_Table]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.is_file() and p.name[0] != ".")
        if not files:
            raise ValueError(f"{where}: no file that ends in {', '.join(_SUFFIXES)}, and no whole pack")
        yield from map(_file, files)
    elif path.is_file():
        yield _file(path)
    elif hub := _HUB_NAME.fullmatch(where):
        yield _hub(where, hub[1], hub[2])
    else:
        raise ValueError(f"{where}: no such file or directory, and no name on the hub, which is owner/name[:split]")


def _file(path: Path) -> _Table:
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(_SUFFIXES)}")
    rows = _lines(path) if path.suffix == ".jsonl" else _json(path.read_bytes(), str(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of rows, each a mapping of columns")
    return _Table(where=str(path), columns=frozenset[str]().union(*rows), rows=iter(rows))


def _lines(path: Path) -> list[Any]:
    with path.open("rb") as lines:
        return [_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ValueError(f"{where}: expected JSON: {error}") from error


def _parquet(path: Path) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a parquet file: {error}") from error
    names = file.schema_arrow.names
    # a table may be larger than memory; columns that no family asks for are its bulk
    wanted = {column for family in FAMILIES.values() for column in (*family.columns, *family.extra)}
    batches = file.iter_batches(batch_size=_BATCH, columns=[name for name in names if name in wanted])
    return _Table(where=str(path), columns=frozenset(names), rows=(row for b in batches for row in b.to_pylist()))


def _hub(where: str, name: str, split: str | None) -> _Table:
    """A split of a data set on the hub, the only one where none is named."""
    import datasets  # type: ignore[import-untyped]

    try:
        if split is None:
            splits = datasets.get_dataset_split_names(name)
            if len(splits) != 1:
                raise ValueError(f"{where}: has the splits {', '.join(map(str, splits))}; name one: {name}:{splits[0]}")
            split = str(splits[0])
        table = datasets.load_dataset(name, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: cannot be read from the hub ({reason}); give a local file or directory") from error
    return _Table(where=where, columns=frozenset(table.column_names), rows=iter(table))
