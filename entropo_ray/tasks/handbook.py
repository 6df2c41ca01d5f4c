"""What an experienced engineer knows of the function families: which lines are right, which are the usual mistakes.

Only public text is read, the file and the issue. Where that leaves several repairs (which helper is at fault, which
behaviour is wanted) all of them are returned, in an order that tells nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from entropo_ray.tasks.families import FAMILIES, PAIRS, RIDDLES
from entropo_ray.tasks.forms import Family, Pair, Riddle, Words, changed, draw, edit, fill, functions, match, split_kind
from entropo_ray.tasks.problems import mistaken

OPEN = ("ambiguous", "riddle")  # kinds of repair where the text leaves several, of which one is wanted

_NUMBERED = re.compile(r"^ *\d+\t", re.MULTILINE)


@dataclass(frozen=True)
class Repair:
    old: str  # whole lines, unique in the file
    new: str
    kind: str  # of the bug, or one of OPEN


@dataclass(frozen=True)
class _Change:
    """One function's text, and what it becomes."""

    function: str
    becomes: str
    kind: str


def repairs(source: str, issue: str) -> list[Repair]:
    """Right fixes of what deviates in this file's text, the usual form first; [] when nothing deviates.

    Functions that the issue names come before others. Where the text leaves several readings (kind "ambiguous" or
    "riddle"), there is one repair for each of them, and only one is wanted.
    """
    source = plain(source)
    changes = [*_plain_fixes(source), *_pair_fixes(source), *_riddle_fixes(source)]
    return _repairs(source, sorted(changes, key=lambda c: not _named(c.function, issue)))


def mistakes(source: str, issue: str, rng: random.Random) -> list[Repair]:
    """Plausible wrong fixes in a random order: another wrong line in the place at fault, or the caller patched.

    After them come others that spoil a function which was right; those that the issue names are left alone.
    """
    source = plain(source)
    near = [*_plain_mistakes(source), *_pair_mistakes(source), *_riddle_mistakes(source)]
    far = [c for c in _spoilt_neighbours(source, rng) if not _named(c.function, issue)]
    return _repairs(source, [*rng.sample(near, len(near)), *rng.sample(far, len(far))])


def _named(function: str, issue: str) -> bool:
    return f"`{function[len('def ') : function.index('(')]}`" in issue


def plain(source: str) -> str:
    """A file's text without the line numbers with which a viewer may have printed it."""
    lines = [line for line in source.splitlines() if line.strip()]
    if lines and all(_NUMBERED.match(line) for line in lines):
        return _NUMBERED.sub("", source)
    return source


def _repairs(source: str, changes: list[_Change]) -> list[Repair]:
    found: dict[Repair, None] = {}
    for step in changes:
        old, new = edit(source, source.replace(step.function, step.becomes))
        found[Repair(old=old, new=new, kind=step.kind)] = None
    return list(found)


def _deviating(source: str) -> Iterator[tuple[Family, str, str, Words]]:
    """(family, kind of bug, text, words) of each function that is a family's form with a known mistake in it."""
    for text in functions(source):
        for family in FAMILIES:
            if match(family.code, text):
                break
            for bug in family.bugs:
                kind, step = split_kind(bug)
                words = match(changed(family.code, step), text)
                if words is not None:
                    yield family, kind, text, words


def _plain_fixes(source: str) -> Iterator[_Change]:
    for family, kind, text, words in _deviating(source):
        for code in (family.code, *(changed(family.code, step) for step in family.same)):
            yield _Change(text, fill(code, words), kind)


def _plain_mistakes(source: str) -> Iterator[_Change]:
    for family, kind, text, words in _deviating(source):
        known = draw(family.words, random.Random(text), words)
        for bug in family.bugs:
            wrong = fill(changed(family.code, split_kind(bug)[1]), known)
            if wrong != text:
                yield _Change(text, wrong, kind)


def _spoilt_neighbours(source: str, rng: random.Random) -> Iterator[_Change]:
    """Functions that are right, each with one usual mistake put in."""
    for text in functions(source):
        for family in FAMILIES:
            words = match(family.code, text)
            if words is not None:
                kind, step = split_kind(rng.choice(family.bugs))
                yield _Change(text, fill(changed(family.code, step), draw(family.words, rng, words)), kind)


def _disagreeing(source: str) -> Iterator[tuple[Pair, tuple[str, str, str], tuple[str, str, str], Words]]:
    """(family, codes, texts, words) of each pair of helpers that follow the same convention, and their caller."""
    texts = functions(source)
    for family in PAIRS:
        for codes in (family.code, (*map(changed, family.code, family.flips), family.code[2])):
            words: dict[str, str] = {}
            found: list[str] = []
            for code in codes:
                for text in texts:
                    filled = match(code, text, words)
                    if filled is not None and text not in found:
                        words = filled
                        found.append(text)
                        break
            if len(found) == len(codes):
                yield family, _three(codes), _three(found), words


def _three(texts: Sequence[str]) -> tuple[str, str, str]:
    first, second, third = texts
    return first, second, third


def _pair_fixes(source: str) -> Iterator[_Change]:
    """The other form of either helper: nothing that may be read here says which."""
    for family, codes, texts, words in _disagreeing(source):
        for code, forward, text, original in zip(codes, family.flips, texts, family.code, strict=False):
            other = original if code != original else changed(original, forward)
            yield _Change(text, fill(other, words), "ambiguous")


def _pair_mistakes(source: str) -> Iterator[_Change]:
    for family, codes, texts, words in _disagreeing(source):
        for wrong in mistaken(codes, family.wrong):
            for code, text in zip(wrong, texts, strict=True):
                if fill(code, words) != text:
                    yield _Change(text, fill(code, words), "ambiguous")


def _open(source: str) -> Iterator[tuple[Riddle, str, Words]]:
    for text in functions(source):
        for riddle in RIDDLES:
            words = match(riddle.code, text)
            if words is not None:
                yield riddle, text, words


def _riddle_fixes(source: str) -> Iterator[_Change]:
    for riddle, text, words in _open(source):
        for step in riddle.types:
            yield _Change(text, fill(changed(riddle.code, step), words), "riddle")


def _riddle_mistakes(source: str) -> Iterator[_Change]:
    for riddle, text, words in _open(source):
        for step in riddle.wrong:
            yield _Change(text, fill(changed(riddle.code, step), words), "riddle")
