"""What a program is given: its environment, and words, some of which none can be given; policies write anything.

And what a registry says.
"""

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


_HOPELESS = (
    "not found",
    "does not exist",
    "manifest unknown",
    "no matching manifest",
    "access denied",
    "access to the resource is denied",
    "unauthorized",
    "authentication required",
    "invalid reference",
)


def hopeless(said: str) -> bool:
    """Whether these are a registry's words for what asking again does not help."""
    return any(words in said.lower() for words in _HOPELESS)
