"""The connection to one command of a pod: channels of a websocket (v4 and v5 of the cluster's protocol).

The client's own stream has no deadline for the handshake, keeps all output, and cannot send and receive at once; what
is used here is the websocket library beneath it. Input cannot be ended in v4, so commands are told its size.
"""

from __future__ import annotations

import json
import os
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

from entropo_ray.sandbox.attached import CHUNK, Exchange, Sink, Source, exchange
from entropo_ray.sandbox.keeper import NAMES, OPEN_FILES

_PING_S = 20.0  # proxies cut connections that are silent for a minute or more
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_INPUT, _OUTPUT, _STATUS = 0, 1, 3
_PROTOCOLS = ["v5.channel.k8s.io", "v4.channel.k8s.io"]
# Words come as input, not in the address, which proxies bound to a few kilobytes. The first line tells how many there
# are, and how much input follows them.
BOOT = f"""
ulimit -c 0 -f "$1" -n {OPEN_FILES} 2>/dev/null
read -r words size && mapfile -t -d '' -n "$words" command || exit 125
export PATH="$PATH:{NAMES}"
exec env -- "${{command[@]}}" < <(exec head -c "$size" 2>/dev/null)
"""


class Refused(Exception):
    """No connection was made. `status`: the server's, 0 if it did not answer."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def dial(configuration: Any, path: str, query: Mapping[str, Any], timeout_s: float) -> Any:
    """A connected websocket, as a client of this configuration. Raises Refused."""
    import websocket

    tls: dict[str, Any] = {"cert_reqs": ssl.CERT_REQUIRED if configuration.verify_ssl else ssl.CERT_NONE}
    given = {
        "ca_certs": configuration.ssl_ca_cert,
        "certfile": configuration.cert_file,
        "keyfile": configuration.key_file,
        "server_hostname": configuration.tls_server_name,
    }
    tls |= {key: value for key, value in given.items() if value}
    if not configuration.verify_ssl or configuration.assert_hostname is False:
        tls["check_hostname"] = False
    rights = configuration.auth_settings().values()
    url = configuration.host.replace("http", "ws", 1) + f"{path}?{urlencode(query, doseq=True)}"
    try:
        return websocket.create_connection(
            url,
            timeout=timeout_s,
            sslopt=tls,
            header=[f"{right['key']}: {right['value']}" for right in rights if right["in"] == "header"],
            subprotocols=_PROTOCOLS,
            **_proxy(configuration),
        )
    except websocket.WebSocketBadStatusException as error:
        said = (error.resp_body or b"").decode(errors="replace")
        raise Refused(error.status_code, _message(said) or str(error)) from error
    except (websocket.WebSocketException, OSError) as error:
        raise Refused(0, str(error)) from error


def _proxy(configuration: Any) -> dict[str, Any]:
    """The proxy of a kubeconfig; this library would know of the environment's alone."""
    if not configuration.proxy:
        return {}
    found = urlsplit(configuration.proxy)
    login = (found.username, found.password) if found.username else None
    passed = [host.strip() for host in (configuration.no_proxy or "").split(",") if host.strip()]
    return {
        "proxy_type": "http" if found.scheme.startswith("http") else found.scheme,
        "http_proxy_host": found.hostname,
        "http_proxy_port": found.port,
        "http_proxy_auth": login,
        "http_no_proxy": passed or None,
    }


def header(words: Sequence[str], env: Mapping[str, str], size: int) -> bytes:
    """What BOOT reads before the input of the command, which has `size` bytes and a line before them."""
    whole = [*(f"{key}={value}" for key, value in env.items()), *words]
    return f"{len(whole)} {size + 1}\n".encode() + b"".join(os.fsencode(word) + b"\0" for word in whole) + b"\n"


class Channels(Exchange):
    """Over a connection of its own.

    The command's exit code comes over the status channel: `code`, or what went wrong instead: `complaint`.
    """

    def __init__(self, websocket: Any, source: Source, sink: Sink, cut: threading.Event, first: bytes) -> None:
        from websocket import frame_buffer

        super().__init__(sink, cut)
        self._websocket = websocket  # its end would be the connection's
        self._connection = websocket.sock
        self._connection.setblocking(False)
        self._source = source
        self._unsent: bytes | None = self._wrapped(first)  # None: all is said
        self._next = 0  # of the source
        self._arrived = bytearray()
        self._frames = frame_buffer(self._some, skip_utf8_validation=True)
        self._channel = -1  # of a message in several frames
        self._status = b""
        self._pinged = time.monotonic()

    def close(self) -> None:
        self._websocket.shutdown()

    def _turn(self, wait_s: float) -> None:
        self._quiet()
        exchange(self._connection, wait_s, self._receive, None if self._unsent is None else self._send)

    def _send(self) -> None:
        try:
            assert self._unsent is not None
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
            if not self._unsent:  # its size was told: nobody waits for more than there is
                chunk = bytes(self._source[self._next : self._next + CHUNK])
                self._next += len(chunk)
                self._unsent = self._wrapped(chunk) if chunk else None
        except _NOT_NOW:
            return
        except OSError:  # it reads no more, which is its own affair
            self._unsent = None

    def _receive(self) -> None:
        try:
            data = self._connection.recv(CHUNK)
        except _NOT_NOW:
            return
        except OSError:
            data = b""
        self._over |= not data
        for payload in self._payloads(data):
            self._take(payload)

    def _wrapped(self, data: bytes) -> bytes:
        from websocket import ABNF

        framed: bytes = ABNF.create_frame(bytes([_INPUT]) + data, ABNF.OPCODE_BINARY).format()
        return framed

    def _quiet(self) -> None:
        """What must be said, lest the connection be taken for dead."""
        from websocket import ABNF

        if time.monotonic() - self._pinged > _PING_S:
            self._pinged = time.monotonic()
            self._say(ABNF.create_frame(b"", ABNF.OPCODE_PING))

    def _say(self, frame: Any) -> None:
        """Behind the frame that is on its way, if one is."""
        self._unsent = (self._unsent or b"") + frame.format()

    def _some(self, size: int) -> bytes:
        if not self._arrived:
            raise BlockingIOError
        data = bytes(self._arrived[:size])
        del self._arrived[:size]
        return data

    def _payloads(self, data: bytes) -> Iterator[bytes]:
        from websocket import ABNF

        self._arrived += data
        while True:
            try:
                frame = self._frames.recv_frame()
            except BlockingIOError:
                return
            if frame.opcode in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT, ABNF.OPCODE_CONT):
                yield from self._message(frame)
            elif frame.opcode == ABNF.OPCODE_PING:
                self._say(ABNF.create_frame(frame.data, ABNF.OPCODE_PONG))
            elif frame.opcode == ABNF.OPCODE_CLOSE:
                self._over = True

    def _message(self, frame: Any) -> Iterator[bytes]:
        from websocket import ABNF

        payload: bytes = frame.data
        if frame.opcode != ABNF.OPCODE_CONT:
            self._channel, payload = (payload[0], payload[1:]) if payload else (-1, b"")
        if self._channel == _OUTPUT and payload:
            yield payload
        elif self._channel == _STATUS:
            self._status += payload
            if frame.fin and self._status:
                self._ended_with(self._status)

    def _ended_with(self, status: bytes) -> None:
        """The server's last word: success, an exit code, or why there is none."""
        facts = json.loads(status)
        causes = (facts.get("details") or {}).get("causes") or ()
        codes = [int(cause["message"]) for cause in causes if cause.get("reason") == "ExitCode"]
        if facts.get("status") == "Success":
            self.code = 0
        elif facts.get("reason") == "NonZeroExitCode" and codes:
            self.code = codes[0]
        else:
            self.complaint += str(facts.get("message") or status.decode(errors="replace")).encode()
        self._over = True


def _message(said: str) -> str:
    """What a server's answer says, which is mostly a Status object."""
    try:
        return str(json.loads(said)["message"])
    except (ValueError, KeyError, TypeError):
        return said.strip()
