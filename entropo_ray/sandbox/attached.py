"""The connection to one command in a container: its input goes in and its output comes out, both at once.

A script says READY once it has read the line that we send first: what comes before is the engine's complaint, not the
command's output, and no byte can arrive before we listen.
"""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

GATE = "read -r _ || exit 125\nprintf +\n"  # what every script begins with
READY = b"+"
Source = bytes | mmap.mmap
Sink = Callable[[bytes], object]

_CHUNK = 1 << 18
_LOOK_S = 0.25  # how soon a cut is seen
_HEADER = 8
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection(ABC):
    """Owns the socket. Setting `cut`, from any thread, is as if the time were up."""

    def __init__(
        self, connection: socket.socket, source: Source, sink: Sink, cut: threading.Event, first: bytes = b"\n"
    ) -> None:
        self._connection, self._source, self._sink, self._cut = connection, source, sink, cut
        self._unsent: bytes | None = self._wrapped(first)  # None: our side is closed
        self._next = 0  # of the source
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
            self._quiet()
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
                chunk = bytes(self._source[self._next : self._next + _CHUNK])
                self._next += len(chunk)
                self._unsent = self._wrapped(chunk) if chunk else self._input_ended()
        except _NOT_NOW:
            return
        except OSError:  # it reads no more, which is its own affair
            self._unsent = None

    def _receive(self) -> None:
        try:
            data = self._connection.recv(_CHUNK)
        except _NOT_NOW:
            return
        except OSError:
            data = b""
        self._over |= not data
        for payload in self._payloads(data):
            self._take(payload)

    @abstractmethod
    def _quiet(self) -> None:
        """Called between looks: what must be said, lest the connection be taken for dead."""

    @abstractmethod
    def _wrapped(self, data: bytes) -> bytes:
        """Input as it goes over the wire."""

    @abstractmethod
    def _input_ended(self) -> None:
        """Tell the command so."""

    @abstractmethod
    def _payloads(self, data: bytes) -> Iterator[bytes]:
        """The output that these bytes complete."""

    def _take(self, payload: bytes) -> None:
        if self.began:
            self._sink(payload)
        elif payload.startswith(READY):
            self.began = time.monotonic()
            self._sink(payload[len(READY) :])
        else:
            self.complaint += payload[:1000]


class Attached(Connection):
    """To a Docker engine.

    Output comes in frames: a byte that names the stream, three of nothing, a length, the bytes.
    """

    def __init__(
        self,
        connection: socket.socket,
        source: Source,
        sink: Sink,
        cut: threading.Event,
        *,
        key: str = "",
        first: bytes = b"\n",
    ) -> None:
        super().__init__(connection, source, sink, cut, first)
        self.key = key  # by which the engine knows the command; the first process has none
        self._frames = bytearray()

    def _wrapped(self, data: bytes) -> bytes:
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it has ended already
            self._connection.shutdown(socket.SHUT_RDWR)  # the client's own handle is closed only when it is collected
        super().close()

    def _quiet(self) -> None:
        """Nothing: no proxy is between."""

    def _input_ended(self) -> None:
        if self.key:  # the first process will be asked again
            self._connection.shutdown(socket.SHUT_WR)

    def _payloads(self, data: bytes) -> Iterator[bytes]:
        self._frames += data
        start, held = 0, len(self._frames)
        while held - start >= _HEADER:
            size = int.from_bytes(self._frames[start + 4 : start + _HEADER], "big")
            if held - start - _HEADER < size:
                break
            start += _HEADER
            yield bytes(self._frames[start : start + size])
            start += size
        del self._frames[:start]
