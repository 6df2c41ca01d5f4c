"""Where the products of a run lie, whether they are whole, and Parquet in and out.

A product is a directory of Parquet parts (or of weights); it is whole when the file `done` exists, which is written
last. `append` makes one part per call, durable at once; `seal` merges the parts and writes `done`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from entropo_ray.records import Policy, arrow_schema, from_table, to_table

R = TypeVar("R")
_MERGED_BYTES = 256 << 20


@dataclass(frozen=True)
class Round:
    trajectories: Path
    preferences: Path
    reference: Path
    policy: Path

    @property
    def current(self) -> Path:
        """Measures of the policy that is fitted, where it is not the reference."""
        return self.policy.with_name("current")

    @property
    def swapped(self) -> Path:
        """Trajectories whose last reply is another's (Example rows), and in `swapped_reference` their log-probs."""
        return self.policy.with_name("swapped")

    @property
    def swapped_reference(self) -> Path:
        return self.policy.with_name("swapped_reference")


@dataclass(frozen=True)
class Seed:
    trajectories: Path
    base: Path
    examples: Path
    policy: Path


@dataclass(frozen=True)
class Evaluation:
    trajectories: Path
    executions: Path
    measures: Path
    scores: Path
    choice: Path
    grades: Path
    official: Path  # Comparison rows, agreement.txt, and what the official harness left
    numbers: Path  # evaluation.json


def round_of(run_dir: str | Path, t: int) -> Round:
    home = place(run_dir) / f"round-{t:02d}"
    return Round(home / "trajectories", home / "preferences", home / "reference", home / "policy")


def seed_of(run_dir: str | Path) -> Seed:
    home = place(run_dir) / "seed"
    return Seed(home / "trajectories", home / "base", home / "examples", home / "policy")


def verifier_of(run_dir: str | Path) -> Path:
    return place(run_dir) / "verifier" / "policy"


def evaluation_of(run_dir: str | Path, name: str = "") -> Evaluation:
    home = place(run_dir) / (f"evaluation-{name}" if name else "evaluation")
    return Evaluation(
        home / "trajectories",
        home / "executions",
        home / "measures",
        home / "scores",
        home / "choice",
        home / "grades",
        home / "official",
        home.with_name(home.name + ".json"),
    )


def place(word: str | Path) -> Path:
    """An absolute path, made on the driver: workers have another working directory."""
    return Path(os.path.abspath(Path(word).expanduser()))  # noqa: PTH100 - resolve() would follow links of shared mounts


def policy(word: str, round: int = 0) -> Policy:
    """The policy that a word names. A directory becomes absolute; ValueError if it is a path that does not exist.

    A hub name (two words, one slash, nothing of that name on disk) is left as it is.
    """
    path = place(word)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model={word}: no config.json in {path}; give a Hugging Face model directory")
        return Policy(path=path, round=round)
    if word.count("/") == 1 and not word.startswith((".", "/", "~")) and not path.parent.is_dir():
        return Policy(path=Path(word), round=round)
    raise ValueError(f"model={word}: no such directory: {path} (jobs/sft.py makes runs/<name>/seed/policy)")


def last_policy(run_dir: str | Path, *, start: str) -> Policy:
    """The policy of the last whole round, or the first policy where no round is whole."""
    t = 0
    while done(round_of(run_dir, t).policy):
        t += 1
    return policy(str(round_of(run_dir, t - 1).policy), round=t) if t else policy(start)


def done(product: Path) -> bool:
    return (product / "done").is_file()


def mark(product: Path, **facts: Any) -> None:
    """Write `done`, last: everything before it is on disk."""
    partial = product / ".done"
    with partial.open("w") as file:
        json.dump(facts, file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(product / "done")
    _sync(product)


def facts(product: Path) -> dict[str, Any]:
    """What `done` says of a whole product."""
    return dict(json.loads((product / "done").read_text()))


def write(product: Path, record: type[R], records: Iterable[R]) -> int:
    """A whole product in one call; the number of rows."""
    _clear(product)
    rows = list(records)
    _part(product, "part-00000", to_table(record, rows))
    mark(product, rows=len(rows), parts=1)
    return len(rows)


def append(product: Path, record: type[R], records: list[R], *, key: tuple[str, int], **facts: str) -> int:
    """One part, durable on return, named by its key: the same key again replaces the part.

    `facts` stay with the part until the product is sealed; `facts_of` reads them.
    """
    task_id, sample = key
    product.mkdir(parents=True, exist_ok=True)
    table = to_table(record, records).replace_schema_metadata(facts | {"task_id": task_id, "sample": str(sample)})
    _part(product, part_of(product, key).stem, table)
    return len(records)


def part_of(product: Path, key: tuple[str, int]) -> Path:
    """Where the row of a key lies while its product still grows."""
    task_id, sample = key
    name = hashlib.blake2b(f"{task_id}/{sample}".encode(), digest_size=12).hexdigest()
    return product / f"part-{name}.parquet"


def facts_of(part: Path) -> dict[str, str]:
    """What `append` was told of a part, its key as task_id and sample included."""
    return {name.decode(): value.decode() for name, value in (pq.read_schema(part).metadata or {}).items()}


def landed(product: Path, record: type[R], seen: set[str]) -> list[R]:
    """The records of a growing product whose parts are not in `seen`, which gets their names.

    A part that is sealed away or replaced while it is read is left for the next call, or for `read`.
    """
    found: list[R] = []
    for part in sorted(product.glob("part-*.parquet")):
        if part.name in seen:
            continue
        try:
            table = pq.read_table(part, columns=arrow_schema(record).names)
        except (FileNotFoundError, pa.ArrowInvalid):
            continue
        seen.add(part.name)
        found += from_table(record, table)
    return found


def keys(product: Path) -> set[tuple[str, int]]:
    """The keys of all whole parts, sealed or not."""
    found: set[tuple[str, int]] = set()
    for part in parts_of(product) if done(product) else sorted(product.glob("part-*.parquet")):
        table = pq.read_table(part, columns=["task_id", "sample"])
        found |= set(zip(table["task_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
    return found


def seal(product: Path, record: type[Any]) -> int:
    """Merge the parts, refuse repeated keys, write `done` last; the number of rows.

    A kill in between loses nothing: merged parts carry a name that a rerun overwrites, and single parts are removed
    only after `done`.
    """
    parts = sorted(p for p in product.glob("part-*.parquet"))
    seen: set[tuple[str, int]] = set()
    merged: list[str] = []
    rows = 0
    for number, group in enumerate(_groups(parts)):
        table = pa.concat_tables([pq.read_table(p, schema=arrow_schema(record)) for p in group])
        table = table.sort_by([("task_id", "ascending"), ("sample", "ascending")])
        for key in zip(table["task_id"].to_pylist(), table["sample"].to_pylist(), strict=True):
            assert key not in seen, f"{product}: the key {key} occurs twice"
            seen.add(key)
        merged.append(f"merged-{number:05d}.parquet")
        _part(product, f"merged-{number:05d}", table)
        rows += table.num_rows
    product.mkdir(parents=True, exist_ok=True)
    if not merged:
        _part(product, "merged-00000", to_table(record, []))
        merged = ["merged-00000.parquet"]
    mark(product, rows=rows, parts=len(merged))
    for part in parts:
        part.unlink()
    return rows


def save(path: Path, text: str) -> Path:
    """A file of text, whole or not there: written aside, then renamed. Its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def read(product: Path, record: type[R]) -> Iterator[R]:
    """The records of a whole product. FileNotFoundError if it is not done, ValueError if it lacks a column."""
    columns = arrow_schema(record).names
    for part in parts_of(product):
        with pq.ParquetFile(part) as file:
            missing = sorted(set(columns) - set(file.schema_arrow.names))
            if missing:
                raise ValueError(
                    f"{product} has no column {missing[0]}: an older version made it; give another run_dir"
                )
            table = file.read(columns=columns)
        yield from from_table(record, table)


def find(product: Path, record: type[R], keys: Iterable[tuple[str, int]]) -> list[R]:
    """The records with these (task_id, sample), by key; the others are filtered before they become records."""
    wanted = set(keys)
    tasks = [("task_id", "in", sorted({task_id for task_id, _ in wanted}))]
    found: dict[tuple[str, int], R] = {}
    for part in parts_of(product) if wanted else []:
        table = pq.read_table(part, columns=arrow_schema(record).names, filters=tasks)
        names = list(zip(table["task_id"].to_pylist(), table["sample"].to_pylist(), strict=True))
        mine = table.filter(pa.array([key in wanted for key in names], pa.bool_()))
        found |= zip((key for key in names if key in wanted), from_table(record, mine), strict=True)
    return [found[key] for key in sorted(found)]


def rows(product: Path) -> int:
    return sum(pq.ParquetFile(p).metadata.num_rows for p in parts_of(product))


def parts_of(product: Path) -> list[Path]:
    """The Parquet files of a whole product. FileNotFoundError if it is not done."""
    if not done(product):
        raise FileNotFoundError(f"{product} is not whole (no `done`): run the stage that makes it again")
    merged = sorted(product.glob("merged-*.parquet"))
    return merged or sorted(product.glob("part-*.parquet"))


def fresh(product: Path) -> Path:
    """An empty directory beside the product, to be published with `publish`."""
    shutil.rmtree(beside(product))
    return beside(product)


def beside(product: Path) -> Path:
    """The same as it was left, for who knows what of it is whole."""
    partial = product.with_name(f".{product.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def publish(partial: Path, product: Path, **facts: Any) -> None:
    """Make a directory filled beside a product the product itself: rename, then `done`."""
    assert not done(product), f"{product} is whole already"
    shutil.rmtree(product, ignore_errors=True)
    partial.replace(product)
    _sync(product.parent)
    mark(product, **facts)


def _clear(product: Path) -> None:
    assert not done(product), f"{product} is whole already"
    shutil.rmtree(product, ignore_errors=True)
    product.mkdir(parents=True)


def _part(product: Path, name: str, table: pa.Table) -> None:
    partial = product / f".{name}.{os.getpid()}"
    with partial.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(product / f"{name}.parquet")


def _groups(parts: list[Path]) -> Iterator[list[Path]]:
    group: list[Path] = []
    size = 0
    for part in parts:
        if group and size + part.stat().st_size > _MERGED_BYTES:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.stat().st_size
    if group:
        yield group


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
