"""When two patches are one solution: compared without white space, comments and test files."""

from __future__ import annotations

import hashlib
import io
import re
import tokenize


def normalised(patch: str) -> str:
    """A patch as a word for counting: changed lines of product files without white space and Python comments."""
    changed: list[str] = []
    path = ""
    for line in patch.splitlines():
        if line.startswith("diff --git "):
            path = line.rpartition(" b/")[2]
        elif line.startswith(("+", "-")) and not line.startswith(("+++ ", "--- ")) and not _is_test(path):
            code = _code(line[1:]) if path.endswith(".py") else "".join(line[1:].split())
            if code:
                changed.append(f"{path}{line[0]}{code}")
    return "\n".join(changed)


def _is_test(path: str) -> bool:
    return re.search(r"(^|/)(tests?/|conftest\.py$|test_[^/]*$|[^/]*_test\.\w+$)", path) is not None


def _code(line: str) -> str:
    words: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline):
            if token.type != tokenize.COMMENT:
                words.append("".join(token.string.split()))
    except (tokenize.TokenError, SyntaxError):
        return "".join(line.split())  # one line of several, e.g. inside a long string
    return "".join(words)


def patch_class(patch: str) -> str:
    """A short name that patches share if they are one solution; "" for one that changes no product code."""
    words = normalised(patch)
    return hashlib.blake2b(words.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest() if words else ""
