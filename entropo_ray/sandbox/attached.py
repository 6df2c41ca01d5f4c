"""One command in a container, or one question to its first process: its input goes in as its output comes out.

A script says READY once it has read the line that we send first: what comes before is the engine's complaint, not the
command's output, and no byte can arrive before we listen.
"""

from __future__ import annotations

import mmap
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

GATE = "read -r _ || exit 125\nprintf +\n"  # what every script begins with
READY = b"+"
CHUNK = 1 << 18
Source = bytes | mmap.mmap
Sink = Callable[[bytes], object]

_LOOK_S = 0.25  # how soon a cut is seen


class Exchange(ABC):
    """Setting `cut`, from any thread, is as if the time were up."""

    def __init__(self, sink: Sink, cut: threading.Event) -> None:
        self._sink, self._cut = sink, cut
        self._over = False
        self.complaint = b""
        self.code: int | None = None  # of a command that has ended; 128 + n where signal n ended it
        self.asked, self.began = time.monotonic(), 0.0

    def ended(self, timeout_s: float, *, start_s: float) -> bool:
        """Until it has ended, or `timeout_s` after it began. TimeoutError if it does not begin."""
        while not self._over:
            until = self.began + timeout_s if self.began else self.asked + start_s
            left = until - time.monotonic()
            if left <= 0 and not self.began:
                raise TimeoutError(f"a command did not begin within {start_s:.0f} s")
            if left <= 0 or (self.began and self._cut.is_set()):
                return False
            self._turn(min(left, _LOOK_S))
        return True

    @abstractmethod
    def close(self) -> None:
        """Listen no more."""

    @abstractmethod
    def _turn(self, wait_s: float) -> None:
        """Send and receive what can be; if nothing can, wait for so long at most."""

    def _take(self, payload: bytes) -> None:
        if self.began:
            self._sink(payload)
        elif payload.startswith(READY):
            self.began = time.monotonic()
            self._sink(payload[len(READY) :])
        else:
            self.complaint += payload[:1000]


def exchange(
    connection: socket.socket, wait_s: float, receive: Callable[[], None], send: Callable[[], None] | None
) -> None:
    """Send (None: there is nothing) and receive what can be; if nothing can, wait for so long at most."""
    poll = select.poll()
    poll.register(connection, select.POLLIN | (select.POLLOUT if send else 0))
    for _, events in poll.poll(wait_s * 1000 + 1):
        if send and events & select.POLLOUT:
            send()
        if events & ~select.POLLOUT:
            receive()
