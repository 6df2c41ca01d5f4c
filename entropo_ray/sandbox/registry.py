"""What registries of images say, whoever asked them: a Docker engine, or the node of a cluster."""

from __future__ import annotations

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
