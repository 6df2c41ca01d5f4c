"""Which tools a policy has and what they take; text to typed arguments.

Names and parameters are those of the r2egym tool set, so that published policies and data work unchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Value: TypeAlias = str | int | bool | tuple[int, int]

VALUE_BYTES = 1 << 20  # longest parameter value, and longest file that is read whole


@dataclass(frozen=True, slots=True)
class Action:
    """One call with typed arguments; `bind` makes it from text."""

    name: str
    arguments: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Param:
    name: str
    kind: Literal["str", "word", "int", "bool", "range"]
    about: str
    required: bool = False
    hidden: bool = False  # accepted for published data, not described
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    about: str
    params: tuple[Param, ...]
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # required parameters by value of `command`
    aliases: Mapping[str, str] = field(default_factory=dict)


_FILE_EDITOR = Tool(
    "file_editor",
    "View, create and edit files. Edits last for the whole task.",
    (
        Param(
            "command",
            "word",
            "what to do",
            required=True,
            choices=("view", "create", "str_replace", "insert", "undo_edit"),
        ),
        Param("path", "word", "file or directory, absolute or from the repository's root", required=True),
        Param("view_range", "range", "view: first and last line, as [a, b]; b = -1 is the end"),
        Param("concise", "bool", "view: leave out the bodies of longer functions of a Python file"),
        Param("file_text", "str", "create: the new file's text"),
        Param("old_str", "str", "str_replace: text that occurs exactly once in the file, white space included"),
        Param("new_str", "str", "str_replace: its replacement; insert: the text to insert"),
        Param("insert_line", "int", "insert: the line behind which the text goes; 0 is the file's beginning"),
        Param("enable_linting", "bool", "refuse an edit after which the file is no longer Python", hidden=True),
        Param("python_only", "bool", "view: list Python files only", hidden=True),
    ),
    needs={
        "create": ("file_text",),
        "str_replace": ("old_str",),
        "insert": ("insert_line", "new_str"),
    },
)
_EXECUTE_BASH = Tool(
    "execute_bash",
    "Run a bash command in the repository's root. Each call is a fresh shell without input.",
    (Param("cmd", "str", "the command", required=True),),
    aliases={"command": "cmd"},
)
_SEARCH = Tool(
    "search",
    "Find a term in the files of a directory or in one file; hidden and binary files are skipped.",
    (
        Param("search_term", "str", "what to find: plain text, unless regex is true", required=True),
        Param("path", "word", "where; the repository's root if left out"),
        Param("regex", "bool", "the term is an extended regular expression"),
        Param("glob", "word", "only files whose name matches, like *.py"),
        Param("context", "int", "lines to show around a match"),
        Param("python_only", "bool", "only *.py files", hidden=True),
    ),
)
_FINISH = Tool(
    "finish",
    "End the task; the repository as it stands is the solution.",
    (
        Param("command", "word", "ignored", hidden=True),
        Param("result", "str", "ignored", hidden=True),
    ),
)
TOOLS: dict[str, Tool] = {tool.name: tool for tool in (_FILE_EDITOR, _EXECUTE_BASH, _SEARCH, _FINISH)}


def describe() -> str:
    """The tools as the system prompt shows them."""
    return "\n\n".join(_describe(tool) for tool in TOOLS.values())


def _describe(tool: Tool) -> str:
    lines = [f"{tool.name}: {tool.about}"]
    for param in tool.params:
        if not param.hidden:
            choices = f", one of {', '.join(param.choices)}" if param.choices else ""
            required = ", required" if param.required else ""
            lines.append(f"  {param.name} ({_KINDS[param.kind]}{required}{choices}): {param.about}")
    return "\n".join(lines)


# ---- arguments ----

_KINDS = {
    "str": "text",
    "word": "text without outer white space",
    "int": "whole number",
    "bool": "true or false",
    "range": "[a, b]",
}


class BadParams(Exception):
    """Arguments that do not fit the tool; the message says each fault."""


def bind(name: str, values: Sequence[tuple[str, str]]) -> Action:
    """Typed arguments of a call of TOOLS[name]. Raises BadParams with every fault."""
    tool = TOOLS[name]
    known = {param.name: param for param in tool.params}
    arguments: dict[str, Value] = {}
    faults = []
    for given, text in values:
        key = given if given in known else tool.aliases.get(given, given)
        if key not in known:
            visible = ", ".join(param.name for param in tool.params if not param.hidden)
            faults.append(f"{name} has no parameter {given}" + (f" (it has {visible})" if visible else ""))
        elif key in arguments:
            faults.append(f"{key} is given twice")
        else:
            try:
                arguments[key] = _convert(known[key], text)
            except ValueError as error:
                faults.append(f"{key}: {error}")
                arguments[key] = ""  # so that it is not called missing as well
    required = [param.name for param in tool.params if param.required]
    required += tool.needs.get(str(arguments.get("command")), ())
    faults += [f"{key} ({_KINDS[known[key].kind]}) is missing" for key in required if key not in arguments]
    if faults:
        raise BadParams("; ".join(faults) + ".")
    return Action(name, arguments)


def _convert(param: Param, text: str) -> Value:
    if len(text.encode(errors="surrogatepass")) > VALUE_BYTES:
        raise ValueError(f"longer than {VALUE_BYTES} bytes")
    value = _CONVERT[param.kind](text)
    if param.choices and value not in param.choices:
        raise ValueError(f"{str(value)[:40]!r} is not one of {', '.join(param.choices)}")
    if param.required and isinstance(value, str) and not value.strip():
        raise ValueError("is empty")
    return value


def _word(text: str) -> str:
    if "\0" in text or "\n" in text.strip():
        raise ValueError("must be one line")
    return text.strip()


def _int(text: str) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,15}", text.strip()) is None:
        raise ValueError(f"must be a whole number, not {text[:40]!r}")
    return int(text)


def _bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "false", "1", "0"):
        raise ValueError(f"must be true or false, not {text[:40]!r}")
    return word in ("true", "1")


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"[\[(]?\s*(-?[0-9]{1,15})\s*[,\s]\s*(-?[0-9]{1,15})\s*[\])]?", text.strip())
    if found is None:
        raise ValueError(f"must look like [1, 20], not {text[:40]!r}")
    return int(found[1]), int(found[2])


_CONVERT: dict[str, Callable[[str], Value]] = {
    "str": str,
    "word": _word,
    "int": _int,
    "bool": _bool,
    "range": _range,
}


def spec_hash() -> str:
    """Digest of all that TOOLS says, hidden parameters included."""
    plain = {
        tool.name: [
            tool.about,
            [[p.name, p.kind, p.about, p.required, p.choices] for p in tool.params],
            dict(tool.needs),
            dict(tool.aliases),
        ]
        for tool in TOOLS.values()
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
