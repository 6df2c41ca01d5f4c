"""Which tokens of a reply are thought, tool name and arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence

from entropo_ray.chat import Chat

SEGMENTS = ("thought", "tool", "arguments")
_CALL = re.compile(r"<function=[A-Za-z_]\w*>?")


def spans(ids: Sequence[int], chat: Chat) -> dict[str, tuple[int, int]]:
    """(start, stop) of each segment in the ids of one reply; they follow each other and cover all of it.

    The thought is what stands before the last call; the tool is `<function=NAME>`; the arguments are the rest, closing
    tags and the end of turn among them. A reply without a call is all thought. A token on a border belongs to the
    segment in which it ends.
    """
    calls = list(_CALL.finditer(chat.decode(ids)))
    if not calls:
        return dict.fromkeys(SEGMENTS, (len(ids), len(ids))) | {"thought": (0, len(ids))}
    begin, end = (_tokens_to(ids, chat, place) for place in calls[-1].span())
    return {"thought": (0, begin), "tool": (begin, end), "arguments": (end, len(ids))}


def _tokens_to(ids: Sequence[int], chat: Chat, place: int) -> int:
    """How many tokens end at or before a place in the text; their text only grows, so halving finds it."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(chat.decode(ids[:middle])) <= place:
            low = middle
        else:
            high = middle - 1
    return low
