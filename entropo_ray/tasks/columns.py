"""What the readers of public data sets share: a row that knows where it lies, a family, the names of images.

Every complaint is one ValueError line: file, row, column, what was expected, what was found.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from entropo_ray.tasks import diffs
from entropo_ray.tasks.pack import Mined

WORKDIR = "/testbed"  # where the images of all these families hold the repository
_SHOWN = 60  # characters of a wrong value


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a data set."""

    where: str  # its file, or the data set's name
    id: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """A text that is not empty."""
        value = self.values.get(column)
        if not isinstance(value, str) or not value.strip():
            raise self.odd(column, "a text that is not empty")
        return value

    def optional(self, column: str) -> str:
        """A text, "" where the column is missing or null."""
        value = self.values.get(column)
        if value is not None and not isinstance(value, str):
            raise self.odd(column, "a text")
        return value or ""

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts, which may lie as a JSON string."""
        value = self.plain(column)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.odd(column, "a list of texts, or one as a JSON string")
        return tuple(value)

    def mapping(self, column: str) -> Mapping[str, Any]:
        """A mapping, which may lie as a JSON string."""
        value = self.plain(column)
        if not isinstance(value, Mapping):
            raise self.odd(column, "a mapping, or one as a JSON string")
        return value

    def plain(self, column: str) -> Any:
        """Any value, decoded where it lies as a JSON string."""
        value = self.values.get(column)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise self.odd(column, "JSON") from error

    def patch(self, column: str) -> str:
        """A diff of git that ends in a line feed, as every tool that applies it expects."""
        value = self.text(column)
        try:
            diffs.changes(value)
        except ValueError as error:
            raise self.odd(column, f"a diff of git, but it {error}") from error
        return value if value.endswith("\n") else f"{value}\n"

    def commit(self, column: str) -> str:
        value = self.text(column)
        if not re.fullmatch(r"[0-9a-f]{40}", value):
            raise self.odd(column, "a full commit id, 40 letters of 0-9a-f")
        return value

    def odd(self, column: str, expected: str) -> ValueError:
        """What to raise for a column that is not as it should be."""
        found = repr(self.values[column])[:_SHOWN] if column in self.values else "no such column"
        return ValueError(f"{self.where}, row {self.id}, column {column}: expected {expected}; found {found}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Which image a row runs in.

    A template holds {image} (the row's own column), {id} (its instance id), {id_1776} and {id_s} (that id with `__`
    written in these two ways, in lower case), as the families publish their images.
    """

    templates: Mapping[str, str] = field(default_factory=dict)  # by family, in place of the published ones
    mirror: str = ""  # prefix of all names, such as host:5000/cache; takes the place of a registry host in a name

    def name(self, row: Row, family: str, published: str, *, image: str = "") -> str:
        """The image of a row. ValueError for a template that does not fit or a row that names none."""
        template = self.templates.get(family, published)
        if image == "" and "{image}" in template:
            raise ValueError(
                f"{row.where}, row {row.id}: has no image; take a split that has, or set images.templates.{family}"
            )
        key = row.id.lower()
        words = {"image": image, "id": key, "id_1776": key.replace("__", "_1776_"), "id_s": key.replace("__", "_s_")}
        return self._mirrored(template.format(**words))

    def check(self, families: Mapping[str, Any]) -> None:
        """ValueError, one line, for a template or a mirror that cannot be used."""
        known = ("image", "id", "id_1776", "id_s")
        for family, template in self.templates.items():
            if family not in families:
                raise ValueError(f"images.templates.{family}: no such family; known: {', '.join(families)}")
            fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
            if not fields or fields - set(known):
                raise ValueError(f"images.templates.{family}={template}: a template holds one of {_braced(known)}")
        if "://" in self.mirror or self.mirror != self.mirror.strip():
            raise ValueError(f"images.mirror={self.mirror!r}: give host[:port][/path], without scheme or white space")

    def _mirrored(self, name: str) -> str:
        if not self.mirror:
            return name
        first, _, rest = name.partition("/")
        is_host = bool(rest) and ("." in first or ":" in first or first == "localhost")
        return f"{self.mirror.rstrip('/')}/{rest if is_host else name}"


def _braced(words: tuple[str, ...]) -> str:
    return ", ".join(f"{{{word}}}" for word in words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A published form of rows, recognized by its columns."""

    marks: tuple[str, ...]  # columns that tell it from the families after it
    others: tuple[str, ...] = ()  # columns that say it is none of it
    key: tuple[str, ...] = ("instance_id",)  # columns that make the id, joined by `__`
    columns: tuple[str, ...]  # that it needs
    extra: tuple[str, ...] = ()  # that it reads where they exist
    split: str  # test for benchmarks, train for the rest
    mined: Callable[[Row, Images], Mined]


def pytest_ids(row: Row, tests: tuple[str, ...], column: str, remedy: str) -> None:
    """ValueError unless all tests are named as pytest names them."""
    for test in tests:
        path, _, name = test.partition("::")
        if not path.endswith(".py") or not name:
            raise ValueError(
                f"{row.where}, row {row.id}, column {column}: expected tests as path.py::name, since the row brings no "
                f"script that runs them; found {test[:_SHOWN]!r}; {remedy}"
            )
