"""Issue texts of injected bugs: what somebody writes who met the bug and never saw the tests.

Told are calls of the product and what came of them, as a failing test showed them; never a test's name, file or line.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LINE_CHARS = 14  # a shorter line of a test could stand anywhere
_LONG = 400  # characters of one message

_OPENINGS = (
    "`{name}` does not do what it should.",
    "I ran into a problem with `{name}`.",
    "There seems to be a bug in `{name}`.",
    "Something is off with `{name}`.",
    "`{name}` is broken in some cases.",
    "I get wrong behaviour from `{name}`.",
    "In our code `{name}` suddenly misbehaves.",
)
_WRONG = (
    "`{call}` returns `{now}`, but it should return `{want}`.",
    "For example `{call}` gives `{now}` instead of `{want}`.",
    "When I call `{call}` I get `{now}`; I expected `{want}`.",
    "Expected `{want}` from `{call}`, got `{now}`.",
)
_AFTER = (
    "With `{call}` the result turns out as `{now}` where `{want}` is right.",
    "After `{call}` I see `{now}`, and it should be `{want}`.",
    "Working with the result of `{call}`, I get `{now}` instead of `{want}`.",
)
_RAISES = (
    "`{call}` raises {error}, although the input is fine.",
    "Calling `{call}` ends with {error}. It should just work.",
    "`{call}` fails with {error}; no exception should come out of it.",
)
_SILENT = (
    "`{call}` should raise `{want}`, but no such error comes.",
    "I expected a `{want}` from `{call}`; nothing is raised.",
    "`{call}` is accepted, where a `{want}` is due.",
)
_VALUE = (
    "`{call}` returns `{now}`, which is wrong.",
    "For instance I get `{now}` from `{call}`, and that cannot be right.",
)
_VAGUE = (
    "The outcome of `{call}` is not right.",
    "`{call}` leads to a wrong result.",
)
_MORE = ("Also: {}", "Another case: {}", "{}")
_CLOSINGS = ("", "", "", "Other inputs seem to be fine.", "Could you have a look?", "This worked before.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of the product by a test; "" where nothing could be told."""

    name: str
    call: str
    returned: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """How one test failed."""

    error: str  # type of the exception
    message: str
    inside: bool  # the product raised it
    calls: tuple[Call, ...]  # the last one last
    compared: tuple[str, str, str] | None  # operator, left, right of the comparison that failed


def symptom(said: Mapping[str, Any]) -> Symptom:
    """From what the program inside said of a failing test."""
    calls = tuple(Call(name=c["name"], call=c["call"], returned=c["returned"] or "") for c in said["calls"])
    compared = tuple(said["compared"]) if said["compared"] else None
    if compared is None and (found := re.match(r"(.{1,160}?) != (.{1,160})$", said["message"])):
        compared = ("==", found[1], found[2])  # of unittest
    error, message = said["type"], said["message"]
    return Symptom(error=error, message=message, inside=said["inside"], calls=calls, compared=compared)


def write(symptoms: Sequence[Symptom], sources: Sequence[str], names: Sequence[str], rng: random.Random) -> str | None:
    """An issue from the clearest symptoms, that quotes none of the test sources and names; None if there is none."""
    ranked = sorted((s for s in symptoms if s.calls), key=_clarity)
    told: list[str] = []
    subject = ""
    for one in ranked:
        sentence = next((s for s in _sentences(one, rng) if not quotes(s, sources, names)), None)
        if sentence and sentence not in told and len(told) < 2:
            subject = subject or _subject(one)
            told.append(sentence)
    if not told:
        return None
    opening = rng.choice(_OPENINGS).format(name=subject)
    first, *more = told
    parts = [f"{opening} {first}", *(rng.choice(_MORE).format(line) for line in more), rng.choice(_CLOSINGS)]
    text = "\n\n".join(part for part in parts if part)
    return None if quotes(text, sources, names) else text


def quotes(text: str, sources: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a text holds a line of the sources that is not trivial, or one of the names."""
    lines = (line.strip() for source in sources for line in source.split("\n"))
    return any(len(line) >= _LINE_CHARS and line in text for line in lines) or any(
        re.search(rf"\b{re.escape(name)}\b", text) for name in names
    )


def _clarity(one: Symptom) -> tuple[int, int]:
    """Low for what is told best: values, then exceptions, then the rest; short before long."""
    last = one.calls[-1]
    if one.compared and _direct(one):
        rank = 0
    elif one.inside or one.error == "Failed":
        rank = 1
    elif one.compared and all(one.compared):
        rank = 2
    else:
        rank = 3
    return rank + 4 * last.call.count("..."), len(last.call)


def _subject(one: Symptom) -> str:
    return _plain(one.calls[-1].name)


def _plain(name: str) -> str:
    """A name without the special method that a user never writes."""
    owner, _, method = name.rpartition(".")
    return owner if owner and method.startswith("__") else name


def _direct(one: Symptom) -> tuple[str, str] | None:
    """(what came, what should have come) where a value that was compared is what the last call returned."""
    if not one.compared or not one.calls[-1].returned:
        return None
    op, left, right = one.compared
    if op not in ("==", "is") or left == right or not (left and right):
        return None
    if one.calls[-1].returned == left:
        return left, right
    return (right, left) if one.calls[-1].returned == right else None


def _sentences(one: Symptom, rng: random.Random) -> Iterator[str]:
    """Ways to tell a symptom, the clearest first."""
    last = one.calls[-1]
    call = last.call
    if found := _direct(one):
        yield rng.choice(_WRONG).format(call=call, now=found[0], want=found[1])
    elif one.inside:
        message = one.message.split("\n")[0][:_LONG]
        yield rng.choice(_RAISES).format(call=call, error=f"`{one.error}: {message}`" if message else f"`{one.error}`")
        yield rng.choice(_RAISES).format(call=call, error=f"`{one.error}`")
        yield rng.choice(_RAISES).format(call=_plain(last.name), error=f"`{one.error}`")
    elif raised := re.match(r"DID NOT RAISE <class '(?:.*\.)?(\w+)'>", one.message):
        yield rng.choice(_SILENT).format(call=call, want=raised[1])
    elif one.error == "AssertionError" and (missed := re.match(r"(\w+) not raised", one.message)):
        yield rng.choice(_SILENT).format(call=call, want=missed[1])
    elif one.compared and one.compared[0] == "==" and one.compared[1] and one.compared[2]:
        yield rng.choice(_AFTER).format(call=call, now=one.compared[1], want=one.compared[2])
    elif last.returned:
        yield rng.choice(_VALUE).format(call=call, now=last.returned)
    yield rng.choice(_VAGUE).format(call=call)
    yield rng.choice(_VAGUE).format(call=_plain(last.name))
