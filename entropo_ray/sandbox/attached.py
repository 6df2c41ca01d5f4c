"""The connection to one command of a Docker engine: its input goes in and its output comes out, both at once.

Output comes in frames (a byte that names the stream, three of nothing, a length, the bytes). A script says READY once
it has read the line that we send first: what comes before is the engine's complaint, not the command's output, and no
byte can arrive before we listen.
"""

from __future__ import annotations

import mmap
import select
import socket
import threading
import time
from collections.abc import Callable

GATE = "read -r _ || exit 125\nprintf +\n"  # what every script begins with
READY = b"+"
Source = bytes | mmap.mmap
Sink = Callable[[bytes], object]

_CHUNK = 1 << 18
_LOOK_S = 0.25  # how soon a cut is seen
_HEADER = 8


class Attached:
    """Owns the connection. Setting `cut`, from any thread, is as if the time were up."""

    def __init__(self, connection: socket.socket, source: Source, sink: Sink, cut: threading.Event) -> None:
        self._connection, self._source, self._sink, self._cut = connection, source, sink, cut
        self._unsent: bytes | None = b"\n"  # None: our side is closed
        self._next = 0  # of the source
        self._frames = bytearray()
        self._over = False
        self.complaint = b""
        self.asked, self.began = time.monotonic(), 0.0
        connection.setblocking(False)

    def ended(self, timeout_s: float, *, start_s: float) -> bool:
        """Until the command has ended, or `timeout_s` after it began. TimeoutError if it does not begin."""
        poll = select.poll()
        while not self._over:
            until = self.began + timeout_s if self.began else self.asked + start_s
            left = until - time.monotonic()
            if left <= 0 and not self.began:
                raise TimeoutError(f"a command did not begin within {start_s:.0f} s")
            if left <= 0 or (self.began and self._cut.is_set()):
                return False
            poll.register(self._connection, select.POLLIN | (0 if self._unsent is None else select.POLLOUT))
            for _, events in poll.poll(min(left, _LOOK_S) * 1000 + 1):
                if events & select.POLLOUT:
                    self._send()
                if events & ~select.POLLOUT:
                    self._receive()
        return True

    def close(self) -> None:
        self._connection.close()

    def _send(self) -> None:
        try:
            assert self._unsent is not None
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
            if not self._unsent:
                self._unsent = bytes(self._source[self._next : self._next + _CHUNK])
                self._next += len(self._unsent)
            if not self._unsent:
                self._unsent = None
                self._connection.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:  # it reads no more, which is its own affair
            self._unsent = None

    def _receive(self) -> None:
        try:
            data = self._connection.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._over = not data
        self._frames += data
        start, held = 0, len(self._frames)
        while held - start >= _HEADER:
            size = int.from_bytes(self._frames[start + 4 : start + _HEADER], "big")
            if held - start - _HEADER < size:
                break
            start += _HEADER
            self._take(bytes(self._frames[start : start + size]))
            start += size
        del self._frames[:start]

    def _take(self, payload: bytes) -> None:
        if self.began:
            self._sink(payload)
        elif payload.startswith(READY):
            self.began = time.monotonic()
            self._sink(payload[len(READY) :])
        else:
            self.complaint += payload[:1000]
