"""How a function family is written down: code with holes, and textual changes of it.

A hole is `$` and one letter: `$a $b $c $d $x $y $z` and the function names `$f $g $h` stand for identifiers, `$k $m $j`
for numbers, `$u $v $w` for the inside of a string. A change is written `old => new`, and `old` occurs once in the code.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

Words = Mapping[str, str]  # hole -> what stands there

_HOLE = re.compile(r"\$([a-z])")
_SHAPES = {"kmj": r"-?\d+", "uvw": r'[^"\n]*?'}
_NAME = r"[A-Za-z_]\w*"

# Where several families want the same kind of name; each family is then told apart by its own lines alone.
_POOLS = {
    "NUMBERS": "numbers|scores",
    "ITEMS": "items|rows",
    "WORDS": "words|names",
    "TEXT": "text|line",
    "TABLE": "table|data",
    "LOOP": "x|v",
    "OTHER": "y|n",
    "THIRD": "z|m",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A function with one right behaviour, which its docstring states."""

    name: str
    topic: str  # number | list | text | table: which modules it may live in
    words: str  # hole=choice|choice ..., see `draw`
    code: str
    same: tuple[str, ...] = ()  # accepted rewritings
    bugs: tuple[str, ...]  # wrong ones, `kind: old => new`; each is met four times as often as the next
    cases: str  # Python list of argument tuples, over the holes k m j u v w
    says: tuple[str, ...]  # what somebody says who sees it misbehave, whatever the bug


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two helpers and their caller `$h`, which is right only if the helpers follow opposite conventions.

    Each helper has two forms, `code` as written and the one that `flips` makes of it, and no docstring says which is
    meant. With both or neither flipped the caller is wrong, and flipping either helper mends it.
    """

    name: str
    topic: str
    words: str
    code: tuple[str, str, str]  # $f, $g, $h
    flips: tuple[str, str]  # of $f, of $g
    same: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # rewritings of the forms of $f and of $g
    wrong: tuple[str, ...]  # changes of $f, $g or $h that mend nothing, or the caller alone
    cases: tuple[str, str, str]
    says: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Riddle:
    """A function whose issue does not say which of several behaviours is wanted: the answer's type is hidden."""

    name: str
    topic: str
    words: str
    code: str  # what is there now
    types: tuple[str, ...]  # the behaviours, most frequent first
    wrong: tuple[str, ...]
    cases: str
    says: tuple[str, ...]  # whole issue texts: $f, $p the path, $r what the call `$q` does now


def fill(template: str, words: Words) -> str:
    return _HOLE.sub(lambda hole: words[hole[1]], template)


def split_kind(bug: str) -> tuple[str, str]:
    """(kind, change) of `kind: old => new`."""
    kind, _, step = bug.partition(": ")
    return kind, step


def fits(code: str, step: str) -> bool:
    """Whether a change `old => new` says exactly one thing about this code."""
    return code.count(step.partition(" => ")[0]) == 1


def changed(code: str, step: str) -> str:
    """The code after one change `old => new`. Assertion if the old text is not there exactly once."""
    old, arrow, new = step.partition(" => ")
    assert arrow, f"not a change: {step!r}"
    assert code.count(old) == 1, f"{step!r} does not fit {code!r}"
    return code.replace(old, new)


def draw(spec: str, rng: random.Random, known: Words | None = None) -> dict[str, str]:
    """One choice for every hole of `hole=choice|choice ...` or `hole=POOL`, all different; known words stay."""
    words = dict(known or {})
    for entry in spec.split():
        hole, _, choices = entry.partition("=")
        if hole not in words:
            words[hole] = rng.choice([c for c in _POOLS.get(choices, choices).split("|") if c not in words.values()])
    return words


@functools.cache
def pattern(template: str) -> re.Pattern[str]:
    """A regular expression for all fillings of a template; equal holes must hold equal words."""
    parts: list[str] = []
    seen: set[str] = set()
    end = 0
    for hole in _HOLE.finditer(template):
        parts.append(re.escape(template[end : hole.start()]))
        letter = hole[1]
        shape = next((s for letters, s in _SHAPES.items() if letter in letters), _NAME)
        parts.append(f"(?P={letter})" if letter in seen else f"(?P<{letter}>{shape})")
        seen.add(letter)
        end = hole.end()
    parts.append(re.escape(template[end:]))
    return re.compile("".join(parts))


def match(template: str, text: str, words: Words | None = None) -> dict[str, str] | None:
    """The words that fill a template to give exactly this text, with those known before; None where there are none.

    Different holes hold different words, as `draw` draws them.
    """
    found = pattern(template).fullmatch(text)
    if found is None:
        return None
    filled = found.groupdict()
    if words and any(filled.get(hole, word) != word for hole, word in words.items()):
        return None
    filled |= words or {}
    return filled if len(set(filled.values())) == len(filled) else None


def functions(source: str) -> list[str]:
    """The texts of a file's top-level functions, in order, without trailing blank lines."""
    return [f.rstrip() for f in re.findall(r"^def .*?(?=^\S|\Z)", source, re.MULTILINE | re.DOTALL)]


def edit(source: str, target: str) -> tuple[str, str]:
    """(old, new): whole lines of `source`, unique in it, whose replacement gives `target`. The texts must differ.

    As few lines as possible; a mere insertion takes the line after it along, so that there is something to replace.
    """
    before, after = source.split("\n"), target.split("\n")
    assert before != after, "nothing to edit"
    top = _common(before, after)
    bottom = _common(before[top:][::-1], after[top:][::-1])
    stop, end = len(before) - bottom, len(after) - bottom
    if top == stop:
        stop, end = stop + 1, end + 1
    while source.count("\n".join(before[top:stop])) != 1:
        assert top > 0, "no unique text to replace"
        top -= 1
    return "\n".join(before[top:stop]), "\n".join(after[top:end])


def _common(left: list[str], right: list[str]) -> int:
    """Number of equal lines at the start."""
    number = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        number += 1
    return number
