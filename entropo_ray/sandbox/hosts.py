"""The /etc/hosts of containers without any network, to which a Docker engine gives none.

It lies in a volume, the one place on the engine's machine that we may write to and whose path we are told; from there
it is mounted, read-only. A volume belongs to a process as containers do, and is reaped like them.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import tarfile
import threading
import time
import uuid
from pathlib import PurePosixPath
from typing import Any

from entropo_ray.sandbox import SandboxSpec, marks

_TEXT = b"127.0.0.1\tlocalhost sandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_LIFE_S = 7 * 86400.0  # a file that is unlinked stays in the containers that have it


class Hosts:
    """The file of one process in one engine. From any thread; errors are the client's."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self._turn = threading.Lock()
        self._path, self._until = "", 0.0

    def path(self, image: str) -> str:
        """Of the file, where the engine is; `image` is any that it has."""
        with self._turn:
            if time.monotonic() >= self._until:
                self._path = self._written(image)
                self._until = time.monotonic() + _LIFE_S / 2
            return self._path

    def missed(self, said: str) -> None:
        """Write another one next time, if what the engine said is about this one: someone has removed it."""
        if self._path and self._path in said:
            self._until = 0.0

    def _written(self, image: str) -> str:
        labels = marks.labels(SandboxSpec(image, labels={"role": "hosts"}), _LIFE_S)
        name = f"entropo-{uuid.uuid4().hex[:16]}"
        volume = self._api.create_volume(name, labels=labels)
        atexit.register(self._remove, name, os.getpid())
        mounted = self._api.create_host_config(binds=[f"{name}:/mnt"], network_mode="none")
        through = self._api.create_container(image, ["true"], volumes=["/mnt"], host_config=mounted, labels=labels)
        try:
            self._api.put_archive(through["Id"], "/mnt", _archive())
        finally:
            self._api.remove_container(through["Id"], force=True, v=True)  # with those that the image asks for
        return str(PurePosixPath(volume["Mountpoint"], "hosts"))

    def _remove(self, name: str, owner: int) -> None:
        """Never raises: what stays is labelled. Not for a process that was forked off."""
        if os.getpid() == owner:
            with contextlib.suppress(OSError):  # which the client's errors are
                self._api.remove_volume(name, force=True)

    def reap(self) -> None:
        """Remove the volumes of owners that are dead, and those past their deadline."""
        found = self._api.volumes(filters={"label": "entropo.owner"})["Volumes"] or ()
        for volume in found:
            if not marks.in_use(volume["Labels"]):
                self._remove(volume["Name"], os.getpid())


def _archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as archive:
        entry = tarfile.TarInfo("hosts")
        entry.size = len(_TEXT)
        archive.addfile(entry, io.BytesIO(_TEXT))
    return file.getvalue()
