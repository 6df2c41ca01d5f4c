"""The connection to the supervisor of one Docker container, over which everything goes that is done there.

The engine puts output in frames: a byte that names the stream, three of nothing, a length, the bytes. What the
supervisor obeys and says is told in supervisor.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from entropo_ray.sandbox.attached import CHUNK, Exchange, Sink, Source, exchange

_HEADER = 8
_OF_COMMANDS = (b"out", b"more", b"end", b"fail")


class Line:
    """Owns the socket; the supervisor ends with it. One thread at a time, but for `cut`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._frames, self._heard = bytearray(), bytearray()
        self._unsent: bytes | memoryview = b""
        self._queue: deque[Iterator[bytes]] = deque()
        self._numbers = itertools.count(1)
        self._commands: dict[bytes, Exchanged] = {}
        self._asking: Exchanged | None = None

    def run(
        self, words: Sequence[str], env: Mapping[str, str], source: Source, sink: Sink, cut: threading.Event
    ) -> Exchanged:
        """Start a command; it is given a line of its own before the source."""
        number = b"%d" % next(self._numbers)
        whole = [*(f"{key}={value}" for key, value in env.items()), *words]
        payload = b"".join(os.fsencode(word) + b"\0" for word in whole)
        command = self._commands[number] = Exchanged(self, number, _given(number, source), sink, cut)
        self.say([b"run %s %d %d\n" % (number, len(payload), len(env)) + payload])
        command.give()
        return command

    def ask(self, word: str, tree: Source, sink: Sink, cut: threading.Event) -> Exchanged:
        """Say a word, and then a tree, which is taken only before all else."""
        self._asking = Exchanged(self, b"", iter(()), sink, cut)
        self.say([f"settle {word}\n".encode()])
        self.say(bytes(tree[start : start + CHUNK]) for start in range(0, len(tree), CHUNK))
        return self._asking

    def hang_up(self) -> None:
        """From any thread: whoever waits for something here sees the end."""
        with contextlib.suppress(OSError):  # the other side did
            self._connection.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        self._connection.close()  # not while someone may wait

    def forget(self, exchange: Exchanged) -> None:
        self._commands.pop(exchange.number, None)
        if self._asking is exchange:
            self._asking = None

    def say(self, pieces: Iterable[bytes]) -> None:
        """In this order, as soon as the line takes it."""
        self._queue.append(iter(pieces))

    def turn(self, wait_s: float) -> None:
        """Send and receive what can be; if nothing can, wait for so long at most."""
        while not self._unsent and self._queue:
            self._unsent = memoryview(next(self._queue[0], b""))
            if not self._unsent:
                self._queue.popleft()
        exchange(self._connection, wait_s, self._receive, self._send if self._unsent else None)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # the other side is no more; what it said may still be read
            self._unsent = b""
            self._queue.clear()

    def _receive(self) -> None:
        try:
            data = self._connection.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            for exchange in self._open():
                exchange.end(None)
        self._frames += data
        start, held = 0, len(self._frames)
        while held - start >= _HEADER:
            size = int.from_bytes(self._frames[start + 4 : start + _HEADER], "big")
            if held - start - _HEADER < size:
                break
            start += _HEADER
            self._heard += self._frames[start : start + size]
            start += size
        del self._frames[:start]
        self._understand()

    def _open(self) -> list[Exchanged]:
        return [*self._commands.values(), *([self._asking] if self._asking else [])]

    def _understand(self) -> None:
        """What has been heard in whole. A line that no supervisor says is of the tools that come before it."""
        start = 0
        while end := self._heard.find(b"\n", start) + 1:
            line = bytes(self._heard[start:end])
            words = line.split()
            if words and words[0] in _OF_COMMANDS:
                size = int(words[2]) if words[0] == b"out" else 0
                if len(self._heard) < end + size:
                    break
                if command := self._commands.get(words[1]):
                    command.heard(words, bytes(self._heard[end : end + size]))
                end += size
            elif self._asking:
                self._asking.heard([], line)
            start = end
        del self._heard[:start]


class Exchanged(Exchange):
    """A command or a question on a line."""

    def __init__(self, line: Line, number: bytes, given: Iterator[bytes], sink: Sink, cut: threading.Event) -> None:
        super().__init__(sink, cut)
        self.number = number
        self._line, self._given = line, given

    def close(self) -> None:
        self._line.forget(self)

    def _turn(self, wait_s: float) -> None:
        self._line.turn(wait_s)

    def give(self) -> None:
        """The next piece of input: at first, and whenever the one before has been taken."""
        with contextlib.suppress(StopIteration):
            self._line.say([next(self._given)])

    def heard(self, words: Sequence[bytes], payload: bytes) -> None:
        """What the supervisor says of it."""
        match words:
            case [b"more", _]:
                self.give()
            case [b"end", _, code]:
                self.end(int(code))
            case [b"fail", _, *why]:
                self.complaint += b" ".join(why)
                self.end(None)
            case _:
                self._take(payload)

    def end(self, code: int | None) -> None:
        self._over, self.code = True, code


def _given(number: bytes, source: Source) -> Iterator[bytes]:
    """Input, piece by piece: a line of its own, and the source."""
    piece = b"\n" + source[:CHUNK]
    for start in range(CHUNK, len(source), CHUNK):
        yield b"give %s %d\n" % (number, len(piece)) + piece
        piece = source[start : start + CHUNK]
    yield b"give %s %d\n%sgive %s 0\n" % (number, len(piece), piece, number)
