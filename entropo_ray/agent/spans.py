"""Which tokens of a reply are thought, tool name and arguments."""

from __future__ import annotations

from collections.abc import Sequence

from entropo_ray.agent.parse import OPENING
from entropo_ray.chat import Chat

SEGMENTS = ("thought", "tool", "arguments")


def spans(ids: Sequence[int], chat: Chat) -> dict[str, tuple[int, int]]:
    """(start, stop) of each segment in the ids of one reply; they follow each other and cover all of it.

    The thought is what stands before the last call; the tool is `<function=NAME>`; the arguments are the rest, closing
    tags and the end of turn among them. A reply without a call is all thought. A token that holds a part of the tool's
    name belongs to the tool, as that is what it decides: tokenizers may join a name with the tag that follows.
    """
    calls = list(OPENING.finditer(chat.decode(ids)))
    if not calls:
        return dict.fromkeys(SEGMENTS, (len(ids), len(ids))) | {"thought": (0, len(ids))}
    first, last = calls[-1].start(), calls[-1].end(1) + 1
    begin, end = _fewest(ids, chat, first + 1) - 1, _fewest(ids, chat, last)
    return {"thought": (0, begin), "tool": (begin, end), "arguments": (end, len(ids))}


def _fewest(ids: Sequence[int], chat: Chat, size: int) -> int:
    """The fewest tokens whose text has at least `size` characters; their text only grows, so halving finds it."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        if len(chat.decode(ids[:middle])) >= size:
            high = middle
        else:
            low = middle + 1
    return low
