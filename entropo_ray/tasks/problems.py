"""From a family to a problem: right, broken and rival programs, and the calls that tell them apart. Pure but for exec.

Every program is executed in this process on the family's own pool of calls, which are parted by what they tell:

    broken = right   visible tests, chosen to break as many rivals (wrong repairs) as possible
    broken != right  the issue's example and the hidden tests, chosen to break every rival
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from entropo_ray.tasks.families import TYPE_SHARES
from entropo_ray.tasks.forms import Family, Pair, Riddle, Words, changed, draw, fill, fits, split_kind

Program = tuple[str, ...]  # the texts of the functions at stake, in file order
Call = tuple[str, tuple[Any, ...]]  # function, arguments
Outcome = tuple[str, Any]  # ("returns", value) or ("raises", name of the exception)

_SHOWN_CHARS = 44  # the longest call that an issue quotes


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    family: str
    topic: str
    broken: Program
    right: Program
    same: tuple[Program, ...]  # accepted besides `right`
    rivals: tuple[Program, ...]  # wrong repairs
    readings: tuple[Program, ...]  # what the public text allows to be right; `right` is one of them
    secret: bool  # no visible test may decide between the readings
    calls: tuple[Call, ...]
    told: str  # the function that the issue names
    says: str  # its complaint; of a riddle the whole text, with $p, $q and $r to be filled


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A call and what it must return."""

    call: Call
    want: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    visible: tuple[Case, ...]
    failing: tuple[Case, ...]  # hidden, fail on the untouched checkout
    passing: tuple[Case, ...]  # hidden, pass on it
    example: Case  # for the issue
    now: Outcome  # of the example, on the untouched checkout


@functools.singledispatch
def pose(family: Any, rng: random.Random, fate: random.Random) -> Problem:
    """A problem of a family. `rng` makes everything public, `fate` whatever the public text must not tell."""
    raise TypeError(f"not a family: {family!r}")


@pose.register
def _plain(family: Family, rng: random.Random, fate: random.Random) -> Problem:
    del fate  # the docstring tells all
    words = draw(family.words, rng)
    right = (fill(family.code, words),)
    wrong = [(fill(changed(family.code, split_kind(bug)[1]), words),) for bug in family.bugs]
    calls = _calls("f", family.cases, words)
    shown = [w for w in wrong if _shows(w, right, calls)]
    broken = rng.choices(shown, [0.25**rank for rank in range(len(shown))])[0]
    return Problem(
        family=family.name,
        topic=family.topic,
        broken=broken,
        right=right,
        same=tuple((fill(changed(family.code, step), words),) for step in family.same),
        rivals=tuple(w for w in wrong if w != broken),
        readings=(right,),
        secret=False,
        calls=calls,
        told=words["f"],
        says=fill(rng.choice(family.says), words),
    )


@pose.register
def _ambiguous(family: Pair, rng: random.Random, fate: random.Random) -> Problem:
    words = draw(family.words, rng)
    flipped = rng.random() < 0.5
    order = rng.sample((0, 1), 2)
    guilty = fate.randrange(2)
    forms = [(code, changed(code, flip)) for code, flip in zip(family.code, family.flips, strict=False)]
    now = [f[flipped] for f in forms]
    mended = [[f[not flipped] if i == k else f[flipped] for k, f in enumerate(forms)] for i in (0, 1)]

    def program(helpers: Sequence[str], caller: str = family.code[2]) -> Program:
        return tuple(fill(code, words) for code in (*(helpers[i] for i in order), caller))

    readings = tuple(program(helpers) for helpers in mended)
    right = mended[guilty]
    same = [
        [changed(code, s) if k == guilty else code for k, code in enumerate(right)]
        for s in family.same[guilty]
        if fits(right[guilty], s)
    ]
    wrong = [program(codes[:2], codes[2]) for codes in mistaken((*now, family.code[2]), family.wrong)]
    return Problem(
        family=family.name,
        topic=family.topic,
        broken=program(now),
        right=readings[guilty],
        same=tuple(program(helpers) for helpers in same),
        rivals=(readings[1 - guilty], *wrong),
        readings=readings,
        secret=False,
        calls=tuple(c for hole, cases in zip("fgh", family.cases, strict=True) for c in _calls(hole, cases, words)),
        told=words["h"],
        says=fill(rng.choice(family.says), words),
    )


@pose.register
def _riddle(family: Riddle, rng: random.Random, fate: random.Random) -> Problem:
    words = draw(family.words, rng)
    readings = [(fill(changed(family.code, step), words),) for step in family.types]
    right = fate.choices(readings, TYPE_SHARES[: len(readings)])[0]
    wrong = [(fill(changed(family.code, step), words),) for step in family.wrong]
    later = {hole: f"${hole}" for hole in "pqr"}
    return Problem(
        family=family.name,
        topic=family.topic,
        broken=(fill(family.code, words),),
        right=right,
        same=(),
        rivals=(*(r for r in readings if r != right), *wrong),
        readings=tuple(readings),
        secret=True,
        calls=_calls("f", family.cases, words),
        told=words["f"],
        says=fill(rng.choice(family.says), {**words, **later}),
    )


def mistaken(codes: Sequence[str], steps: Sequence[str]) -> list[list[str]]:
    """The functions after each of the changes, made in the one function that it fits; others are left out."""
    found = []
    for step in steps:
        places = [i for i, code in enumerate(codes) if fits(code, step)]
        if len(places) == 1:
            found.append([changed(code, step) if i == places[0] else code for i, code in enumerate(codes)])
    return found


def part(problem: Problem, rng: random.Random) -> Cases:
    """Visible and hidden tests of a problem, and the example for its issue.

    Assertion if an accepted program differs from the right one, or a rival cannot be told from it.
    """
    calls = problem.calls
    right = outcomes(problem.right, calls)
    broken = outcomes(problem.broken, calls)
    readings = [outcomes(p, calls) for p in problem.readings]
    rivals = [outcomes(p, calls) for p in problem.rivals]
    usable = [i for i in _shuffled(calls, rng) if right[i][0] == "returns"]
    for program in problem.same:
        found = outcomes(program, calls)
        assert all(alike(found[i], right[i]) for i in usable), f"{program} is not the same as {problem.right}"
    quiet = [i for i in usable if alike(broken[i], right[i])]
    shown = [i for i in quiet if not problem.secret or all(alike(r[i], right[i]) for r in readings)]
    loud = [i for i in usable if not alike(broken[i], right[i])]
    visible = cover(shown, right, rivals, start=[], at_least=3)
    example = _example(problem, broken, readings, loud)
    failing = cover(loud, right, rivals, start=[example], at_least=2)
    alive = [r for r in rivals if all(alike(r[i], right[i]) for i in visible + failing)]
    passing = cover([i for i in quiet if i not in visible], right, alive, start=[], at_least=1)
    assert all(any(not alike(r[i], right[i]) for i in visible + failing + passing) for r in rivals), (
        f"a wrong repair of {problem.told} passes all tests: {problem.rivals}"
    )
    assert problem.secret or all(any(not alike(r[i], right[i]) for i in visible) for r in readings if r != right), (
        f"no visible test tells which helper of {problem.told} is at fault"
    )
    cases = [Case(call=call, want=want) for call, (_, want) in zip(calls, right, strict=True)]
    return Cases(
        visible=tuple(cases[i] for i in visible),
        failing=tuple(cases[i] for i in failing),
        passing=tuple(cases[i] for i in passing),
        example=cases[example],
        now=broken[example],
    )


def neighbour(family: Family, rng: random.Random) -> tuple[str, str, tuple[Case, ...]]:
    """A right function of a family: its name, its text, and visible tests that break as many bugs as possible."""
    words = draw(family.words, rng)
    right, calls, wants, rivals = _known(family, tuple(words.items()))
    chosen = cover(_shuffled(calls, rng), wants, rivals, start=[], at_least=2)
    return words["f"], right, tuple(Case(call=calls[i], want=wants[i][1]) for i in chosen)


@functools.cache  # a family has a few dozen sets of words, and is a neighbour many times
def _known(
    family: Family, words: tuple[tuple[str, str], ...]
) -> tuple[str, tuple[Call, ...], list[Outcome], list[list[Outcome]]]:
    """(text, calls, what they do, what they do under each bug) of the right function with these words."""
    names = dict(words)
    right = fill(family.code, names)
    calls = _calls("f", family.cases, names)
    wrong = [fill(changed(family.code, split_kind(bug)[1]), names) for bug in family.bugs]
    return right, calls, outcomes((right,), calls), [outcomes((text,), calls) for text in wrong]


def outcomes(program: Program, calls: Sequence[Call]) -> list[Outcome]:
    """What each call does. The programs are ours and short; none can hang."""
    space: dict[str, Any] = {}
    exec("\n\n".join(program), space)
    found: list[Outcome] = []
    for function, arguments in calls:
        try:
            found.append(("returns", space[function](*copy.deepcopy(arguments))))
        except Exception as error:  # whatever a broken program does is its outcome
            found.append(("raises", type(error).__name__))
    return found


def alike(one: Outcome, other: Outcome) -> bool:
    """Equal as a test sees it; True and 1 are told apart, since tests of truth say `is True`."""
    return one == other and isinstance(one[1], bool) == isinstance(other[1], bool)


def cover(
    pool: Sequence[int],
    right: Sequence[Outcome],
    rivals: Sequence[Sequence[Outcome]],
    *,
    start: list[int],
    at_least: int,
) -> list[int]:
    """Calls from the pool, greedily, until no more rivals break and there are at least so many (if there are)."""
    chosen = list(start)
    left = [i for i in pool if i not in start]
    alive = [r for r in rivals if all(alike(r[i], right[i]) for i in chosen)]
    while left:
        best = max(left, key=lambda i: sum(not alike(r[i], right[i]) for r in alive))
        broken = [r for r in alive if not alike(r[best], right[best])]
        if not broken and len(chosen) >= at_least:
            break
        chosen.append(best)
        left.remove(best)
        alive = [r for r in alive if r not in broken]
    return chosen


def _calls(hole: str, cases: str, words: Words) -> tuple[Call, ...]:
    """The pool that a family writes down; numbers and texts of its holes stand for themselves."""
    space: dict[str, Any] = {h: int(w) for h, w in words.items() if h in "kmj"}
    space |= {h: w for h, w in words.items() if h in "uvw"}
    return tuple((words[hole], arguments) for arguments in eval(cases, space))


def _shows(broken: Program, right: Program, calls: Sequence[Call]) -> bool:
    """Whether some call tells the two apart, and some does not, so that there is something to test either way."""
    equal = [alike(a, b) for a, b in zip(outcomes(broken, calls), outcomes(right, calls), strict=True)]
    return any(equal) and not all(equal)


def _example(
    problem: Problem, broken: Sequence[Outcome], readings: Sequence[Sequence[Outcome]], loud: Sequence[int]
) -> int:
    """The first short call of the told function that is wrong under every reading and so decides none.

    What it should return is told unless that is the secret, so the readings must agree on it.
    """
    fair = [
        i
        for i in loud
        if problem.calls[i][0] == problem.told
        and all(not alike(broken[i], r[i]) for r in readings)
        and (problem.secret or all(alike(readings[0][i], r[i]) for r in readings))
    ]
    assert fair, f"no example for {problem.told}"
    return min(fair, key=lambda i: len(repr(problem.calls[i])) > _SHOWN_CHARS)


def _shuffled(calls: Sequence[Call], rng: random.Random) -> list[int]:
    return rng.sample(range(len(calls)), len(calls))
