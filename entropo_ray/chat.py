"""Messages to token ids, append-only: one class a model family.

A prompt only ever grows: `opening`, then a sampled reply, then `observation`, then a sampled reply. Text from outside
(issue, file, tool output) is always plain text: a literal `<|im_end|>` in it never becomes the control id.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

# Added tokens that structure a conversation although some tokenizers do not mark them as special.
_CONTROL = re.compile(r"<\|.*\|>|</?(?:think|tool_call|tool_response)>", re.DOTALL)


class Words(Protocol):
    """Text to ids and back; control tokens are reached by name alone."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def control(self, name: str) -> int | None: ...


class TokenizerFile:
    """The words of a tokenizer.json, read without transformers."""

    def __init__(self, path: Path) -> None:
        layout = json.loads(path.read_text(encoding="utf-8"))
        self._controls = _mark_controls(layout)
        self._tokenizer = Tokenizer.from_str(json.dumps(layout))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # the library's own switch: special tokens met in a text are read letter by letter
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens shown; ids that the tokenizer does not know are left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def control(self, name: str) -> int | None:
        return self._controls.get(name)


def _mark_controls(layout: dict[str, Any]) -> dict[str, int]:
    """Mark every control token of a tokenizer.json as special, in place; their ids by name."""
    controls = {}
    for token in layout.get("added_tokens") or []:
        token["special"] = bool(token["special"]) or _CONTROL.fullmatch(token["content"]) is not None
        if token["special"]:
            controls[token["content"]] = int(token["id"])
    return controls


class Chat(ABC):
    """How one family writes a conversation.

    `end_ids` are the ids that end a reply; the first is the one that a reply of ours ends with.
    """

    ends: tuple[str, ...]  # names of end_ids, the first one required

    def __init__(self, words: Words) -> None:
        self._words = words
        found = [words.control(name) for name in self.ends[1:]]
        self.end_ids: tuple[int, ...] = (self._control(self.ends[0]), *(i for i in found if i is not None))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; none of them is a control id, whatever the text holds."""
        return self._words.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens shown."""
        return self._words.decode(ids)

    @abstractmethod
    def opening(self, system: str, user: str) -> list[int]:
        """System message, first user message and the cue for the reply."""

    @abstractmethod
    def observation(self, text: str, after: int | None = None) -> list[int]:
        """What stands between a reply and the next: glue, a user message with `text`, the cue.

        `after` is the reply's last id, so that a reply cut before its end is closed; None: it ended with end_ids[0].
        """

    def _control(self, name: str) -> int:
        found = self._words.control(name)
        if found is None:
            raise ValueError(f"the tokenizer has no {name}, which {type(self).__name__} needs: use the model's own")
        return found


class ChatML(Chat):
    """Qwen2, Qwen2.5, Qwen3: `<|im_start|>role\\n...<|im_end|>\\n`, and no thinking block in the cue."""

    ends = ("<|im_end|>", "<|endoftext|>")

    def __init__(self, words: Words) -> None:
        super().__init__(words)
        self._start = self._control("<|im_start|>")
        self._newline = self.encode("\n")
        self._cue = [self._start, *self.encode("assistant\n")]

    def opening(self, system: str, user: str) -> list[int]:
        return [*self._message("system", system), *self._message("user", user), *self._cue]

    def observation(self, text: str, after: int | None = None) -> list[int]:
        closing = [] if after in (None, self.end_ids[0]) else [self.end_ids[0]]
        return [*closing, *self._newline, *self._message("user", text), *self._cue]

    def messages(self, ids: Sequence[int]) -> list[tuple[str, str]]:
        """(role, text) of every message in a prompt of ours; the cue of a reply not yet given is left out."""
        found = []
        for part in _split(ids, self._start):
            if (self.end_ids[0]) not in part:
                continue
            role, _, text = self.decode(part[: part.index(self.end_ids[0])]).partition("\n")
            found.append((role, text))
        return found

    def _message(self, role: str, text: str) -> list[int]:
        # role and text in one piece, as the families' own templates are tokenised
        return [self._start, *self.encode(f"{role}\n{text}"), self.end_ids[0], *self._newline]


def _split(ids: Sequence[int], mark: int) -> list[list[int]]:
    """The stretches that each begin behind a `mark`."""
    parts: list[list[int]] = []
    for token in ids:
        if token == mark:
            parts.append([])
        elif parts:
            parts[-1].append(token)
    return parts


class Glm4(Chat):
    """GLM-4.5: messages begin with a role token and nothing closes them.

    So a reply ends with the role token of the next message, which is then already there and is not said again.
    """

    ends = ("<|user|>", "<|observation|>", "<|endoftext|>")

    def __init__(self, words: Words) -> None:
        super().__init__(words)
        self._begin = [self._control("[gMASK]"), self._control("<sop>")]
        self._system, self._assistant = self._control("<|system|>"), self._control("<|assistant|>")
        self._user = self.end_ids[0]
        self._roles = {i for i in (self._user, words.control("<|observation|>")) if i is not None}

    def opening(self, system: str, user: str) -> list[int]:
        first = [*self._begin, self._system, *self.encode(f"\n{system}")]
        return [*first, self._user, *self.encode(f"\n{user}"), self._assistant]

    def observation(self, text: str, after: int | None = None) -> list[int]:
        role = [] if after is None or after in self._roles else [self._user]
        return [*role, *self.encode(f"\n{text}"), self._assistant]


class Gemma3(Chat):
    """Gemma 3: `<start_of_turn>role\\n...<end_of_turn>\\n`; the system text leads the first user message."""

    ends = ("<end_of_turn>", "<eos>")

    def __init__(self, words: Words) -> None:
        super().__init__(words)
        self._bos, self._start = self._control("<bos>"), self._control("<start_of_turn>")
        self._newline = self.encode("\n")
        self._cue = [self._start, *self.encode("model\n")]

    def opening(self, system: str, user: str) -> list[int]:
        return [self._bos, *self._user(f"{system}\n\n{user.strip()}"), *self._cue]

    def observation(self, text: str, after: int | None = None) -> list[int]:
        closing = [] if after in (None, self.end_ids[0]) else [self.end_ids[0]]
        return [*closing, *self._newline, *self._user(text.strip()), *self._cue]

    def _user(self, text: str) -> list[int]:
        # the family's template trims user text
        return [self._start, *self.encode(f"user\n{text}"), self.end_ids[0], *self._newline]


FAMILIES: dict[str, type[Chat]] = {
    "qwen2": ChatML,
    "qwen3": ChatML,
    "qwen3_moe": ChatML,
    "glm4_moe": Glm4,
    "gemma3": Gemma3,
    "gemma3_text": Gemma3,
}


def load(path: Path) -> Chat:
    """The chat of a model directory, by `model_type` in config.json and the words of tokenizer.json.

    ValueError names what is missing or unknown.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise ValueError(f"{path}: no {name} there; give a directory of whole Hugging Face weights")
    kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is unknown; known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](TokenizerFile(path / "tokenizer.json"))
