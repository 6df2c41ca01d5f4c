"""What is kept of a command's output: the first and the last half of a budget, whatever comes between."""

from __future__ import annotations

import asyncio
import os

_CHUNK = 1 << 18


class Capture:
    """Bytes fed in pieces; memory stays within twice the budget."""

    def __init__(self, budget: int) -> None:
        self._head_bytes = budget - budget // 2
        self._tail_bytes = budget // 2
        self._head, self._tail = bytearray(), bytearray()
        self.total = 0

    def feed(self, data: bytes) -> None:
        self.total += len(data)
        room = self._head_bytes - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._tail_bytes:
            del self._tail[: len(self._tail) - self._tail_bytes]

    @property
    def truncated(self) -> bool:
        return self.total > self._head_bytes + self._tail_bytes

    def text(self) -> bytes:
        """Everything, or both halves with the cut marked between."""
        if not self.truncated:
            return bytes(self._head + self._tail)
        cut = self.total - self._head_bytes - self._tail_bytes
        tail = self._tail[len(self._tail) - self._tail_bytes :]
        return bytes(self._head) + b"\n[\xe2\x80\xa6 %d bytes cut \xe2\x80\xa6]\n" % cut + bytes(tail)


class Drain:
    """Reads a pipe to its end on the running event loop, so that a writer never blocks. Owns the descriptor."""

    def __init__(self, fd: int, budget: int) -> None:
        self._fd = fd
        self.capture = Capture(budget)
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[None] = self._loop.create_future()
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return
        if data:
            self.capture.feed(data)
        else:
            self._loop.remove_reader(self._fd)
            if not self._end.done():
                self._end.set_result(None)

    async def end(self, timeout_s: float) -> None:
        """Until every writer has closed the pipe; TimeoutError."""
        await asyncio.wait_for(asyncio.shield(self._end), timeout_s)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._end.cancel()
        os.close(self._fd)
