"""What a program is given: its environment, and words, some of which none can be given; policies write anything."""

from __future__ import annotations

import os
from collections.abc import Iterable

# what the agent finds in the environment, whatever the backend
PLAIN = {
    "HOME": "/home/agent",
    "USER": "agent",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "TERM": "dumb",
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def unspeakable(words: Iterable[str]) -> bytes:
    """What a shell would say of the first word that cannot be given to a program; empty if all can."""
    for word in words:
        if "\0" in word:
            return b"bash: the command holds a NUL character\n"
        try:
            os.fsencode(word)
        except UnicodeEncodeError:
            return b"bash: the command holds a lone surrogate\n"
    return b""
