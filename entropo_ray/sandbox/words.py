"""What no program can be given as a word; policies write anything."""

from __future__ import annotations

import os
from collections.abc import Iterable


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
