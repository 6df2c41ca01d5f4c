"""How the launcher is spoken to: requests with descriptors over one socket, each answered over its own.

Standard library only.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]


class Lost(Exception):
    """The sandbox asked for is no more."""


def guarded(answer: socket.socket, work: Callable[[], object]) -> None:
    """Trouble of the system is the answer, not the launcher's end."""
    try:
        work()
    except (OSError, Lost) as error:
        trouble = {"error": str(error), "errno": getattr(error, "errno", None), "lost": isinstance(error, Lost)}
        reply(answer, trouble)


def finished(answer: socket.socket, work: Callable[[], object]) -> None:
    """Do `work`, then say so, or why not."""

    def both() -> None:
        work()
        reply(answer, {})

    guarded(answer, both)


def reply(answer: socket.socket, body: Request, fds: list[int] | None = None) -> None:
    """Answer once and hang up."""
    with answer, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the asker hung up
        socket.send_fds(answer, [json.dumps(body).encode()], fds or [])


def receive(requests: socket.socket) -> tuple[bytes, list[int]]:
    """The next request: a byte and its descriptors; no byte when the owner is gone."""
    space = socket.CMSG_SPACE(8 * array.array("i").itemsize)
    message, ancillary, _, _ = requests.recvmsg(64, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds)


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
