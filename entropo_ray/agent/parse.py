"""A reply to an action and back: the XML codec.

    <function=NAME>
      <parameter=KEY>VALUE</parameter>
    </function>

Values travel verbatim. Only what could be taken for a tag is escaped, by one backslash behind its `<`, so every action
comes back as it was. Reading is linear in the reply's length: no pattern here backtracks over a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from entropo_ray.agent.spec import TOOLS, Action, BadParams, Value, bind

VERSION = 1  # of the codec; part of the scaffold's hash

_NAME = r"[A-Za-z_]\w*+"
# Structural: a mention of <function=foo> in prose is followed by neither.
OPENING = re.compile(rf"<function=({_NAME})>\s*+(?=<parameter=|</function>)")
_PARAMETER = re.compile(rf"<parameter=({_NAME})>")
_VALUE_END = re.compile(rf"</parameter>\s*+(?=<parameter={_NAME}>|</function>)")
_CLOSING = "</function>"
_ORPHAN = re.compile(r"</(?:function|parameter)>")
_TAG = r"(function=|/function>|parameter=|/parameter>)"
_TO_ESCAPE = re.compile(rf"<(\\*+){_TAG}")
_ESCAPED = re.compile(rf"<\\(\\*+){_TAG}")
_TRAILING_OK = re.compile(r"(?:\s|</tool_call>)*+")

FORMAT = "<function=NAME>\n  <parameter=KEY>VALUE</parameter>\n</function>"
ESCAPE_RULE = (
    "Inside a value write <\\function=, <\\/function>, <\\parameter= and <\\/parameter> for these tags "
    "(one backslash more after the < than the text has)."
)


class ParseStatus(StrEnum):
    OK = "ok"
    NO_CALL = "no_call"
    UNTERMINATED = "unterminated"
    AMBIGUOUS = "ambiguous"
    MULTIPLE_CALLS = "multiple_calls"
    UNKNOWN_TOOL = "unknown_tool"
    BAD_PARAMS = "bad_params"


@dataclass(frozen=True, slots=True)
class Call:
    """A call as it stands in a reply, not yet held against any tool."""

    name: str
    values: tuple[tuple[str, str], ...]  # (key, value) in order, repeated keys kept
    trailing: bool  # text behind the call


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reply asks for. `message` tells the policy what to do better; it is "" when status is ok."""

    status: ParseStatus
    action: Action | None
    message: str
    trailing: bool  # text behind the call; it stays in the tokens


class Unreadable(Exception):
    """A reply without exactly one whole call. Does not leave this module's callers in agent/."""

    def __init__(self, status: ParseStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def parse(reply: str) -> Parsed:
    """The action of a reply, held against TOOLS; never raises."""
    try:
        call = read(reply)
    except Unreadable as error:
        return Parsed(error.status, None, str(error), False)
    if call.name not in TOOLS:
        message = f"There is no tool named {call.name}. The tools are {', '.join(TOOLS)}."
        return Parsed(ParseStatus.UNKNOWN_TOOL, None, message, call.trailing)
    try:
        return Parsed(ParseStatus.OK, bind(call.name, call.values), "", call.trailing)
    except BadParams as error:
        return Parsed(ParseStatus.BAD_PARAMS, None, str(error), call.trailing)


def read(reply: str) -> Call:
    """The one call of a reply. Raises Unreadable."""
    opening = OPENING.search(reply, _after_thinking(reply))
    if opening is None:
        raise Unreadable(ParseStatus.NO_CALL, f"Every reply needs exactly one call:\n{FORMAT}")
    values, end = _values(reply, opening.end())
    rest = reply[end:]
    if more := len(OPENING.findall(rest)):
        raise Unreadable(
            ParseStatus.MULTIPLE_CALLS, f"{more + 1} calls in one reply; none was run. Send one call a reply."
        )
    if _ORPHAN.search(rest):
        raise Unreadable(ParseStatus.AMBIGUOUS, f"A closing tag stands behind the call. {ESCAPE_RULE}")
    trailing = _TRAILING_OK.fullmatch(rest) is None
    return Call(opening[1], tuple(values), trailing)


def encode(action: Action) -> str:
    """Canonical text of an action: one parameter a line."""
    return write(action.name, [(key, render(value)) for key, value in action.arguments.items()])


def write(name: str, values: list[tuple[str, str]]) -> str:
    """Canonical text of a call; `read` gives it back."""
    lines = [f"  <parameter={key}>{_raw(value)}</parameter>\n" for key, value in values]
    return f"<function={name}>\n{''.join(lines)}</function>"


def render(value: Value) -> str:
    """An argument as parameter text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def _after_thinking(reply: str) -> int:
    if not reply.lstrip().startswith("<think>"):
        return 0
    end = reply.find("</think>")
    return len(reply) if end < 0 else end


def _values(reply: str, at: int) -> tuple[list[tuple[str, str]], int]:
    """Parameters from `at` to the call's closing tag, and where that ends."""
    values = []
    while not reply.startswith(_CLOSING, at):
        key = _PARAMETER.match(reply, at)
        if key is None:
            raise Unreadable(ParseStatus.UNTERMINATED, f"A <parameter=KEY> has no name, or {_CLOSING} is missing.")
        end = _VALUE_END.search(reply, key.end())
        if end is None:
            raise Unreadable(
                ParseStatus.UNTERMINATED,
                f"The call does not end: </parameter> of {key[1]} followed by {_CLOSING} is missing.",
            )
        raw = reply[key.end() : end.start()]
        if OPENING.search(raw):
            raise Unreadable(ParseStatus.AMBIGUOUS, f"A call stands inside the value of {key[1]}. {ESCAPE_RULE}")
        values.append((key[1], _value(raw)))
        at = end.end()
    return values, at + len(_CLOSING)


def _value(raw: str) -> str:
    if len(raw) >= 2 and raw[0] == "\n" and raw[-1] == "\n":
        raw = raw[1:-1]
    return _ESCAPED.sub(r"<\1\2", raw)


def _raw(value: str) -> str:
    framed = "\n" in value or value != value.strip()
    escaped = _TO_ESCAPE.sub(r"<\\\1\2", value)
    return f"\n{escaped}\n" if framed else escaped
