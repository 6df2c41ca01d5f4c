"""Images of a Docker engine: pulled, read, made anew with another work directory, pushed.

Nothing of an image runs here. A container of it is made and never started; what goes out and in, the engine packs and
unpacks itself. Credentials of a registry are those of Docker's own configuration.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import IO, Any

from entropo_ray.sandbox import ImageMissing, SandboxError, SandboxSpec, marks
from entropo_ray.sandbox.docker import asking
from entropo_ray.sandbox.registry import hopeless

_SILENT_S = 300  # of one answer: the engine unpacks layers and trees meanwhile
_LIFE_S = 7200.0  # of a container that is never started


class Shelf:
    """The images of one engine. From any thread."""

    def __init__(self) -> None:
        import docker

        with asking("looking for a Docker engine (DOCKER_HOST names it, else the default socket)"):
            self._client = docker.from_env(timeout=_SILENT_S, max_pool_size=16)
            self._client.ping()

    def facts(self, reference: str) -> Mapping[str, Any]:
        """What the engine knows of an image that it has. ImageMissing if it has none of that name."""
        with asking(f"image {reference}", missing=ImageMissing):
            return dict(self._client.images.get(reference).attrs)

    def labels(self, reference: str) -> dict[str, str]:
        """The labels of an image; none where the engine has none of that name."""
        try:
            return dict((self.facts(reference).get("Config") or {}).get("Labels") or {})
        except ImageMissing:
            return {}

    def pull(self, reference: str, *, within_s: float, cut: threading.Event | None = None) -> None:
        """Ask a registry once, until `cut`. ImageMissing where asking again does not help, else SandboxError."""
        self._exchange("pull", reference, within_s, cut)

    def push(self, reference: str, *, within_s: float, cut: threading.Event | None = None) -> None:
        """Give an image to the registry that its name says. Errors as of `pull`."""
        self._exchange("push", reference, within_s, cut)

    def _exchange(self, how: str, reference: str, within_s: float, cut: threading.Event | None) -> None:
        what = f"{how} of {reference}"
        ask = self._client.api.pull if how == "pull" else self._client.api.push
        try:
            with asking(what, missing=ImageMissing):
                _followed(ask(reference, stream=True, decode=True), what, within_s, cut)
        except SandboxError as error:
            if hopeless(str(error)):
                raise ImageMissing(str(error)) from error
            raise

    def remove(self, reference: str) -> None:
        """Forget a name. Never raises: what is in use stays."""
        with contextlib.suppress(SandboxError), asking(f"removing {reference}"):
            self._client.images.remove(reference)

    @contextlib.contextmanager
    def tree(self, image: str, workdir: str) -> Iterator[IO[bytes]]:
        """The work directory of an image, as a tar in a nameless file. ImageMissing if it has none."""
        with tempfile.TemporaryFile() as file:
            with self._container(image) as key, asking(f"{workdir} of {image}", missing=ImageMissing):
                stream, _ = self._client.api.get_archive(key, f"{workdir}/.")
                for chunk in stream:
                    file.write(chunk)
            file.seek(0)
            yield file

    def remake(
        self,
        image: str,
        tree: IO[bytes],
        *,
        workdir: str,
        remove: Iterable[str] = (),
        enter: Iterable[str] = (),
        tag: str,
        labels: Mapping[str, str],
    ) -> None:
        """`tag`: the image with `tree` (a tar, as `tree` gives it) in the place of its work directory.

        Files or directories of `remove` become empty files; directories of `enter` can be passed by anyone. Its first
        process is one that SIGKILL ends: others make the engine wait, ten seconds for each container.
        """
        with self._container(image, stop_signal="SIGKILL") as key, asking(f"making {tag}"):
            for path in remove:
                if self._mode(key, path) is not None:
                    self._put(key, path, _emptied(path))
            for path in enter:
                if (mode := self._mode(key, path)) is not None:
                    self._put(key, path, _directory(path, mode | 0o011))
            # a plain file replaces a whole directory, and a directory that file
            self._put(key, workdir, _emptied(workdir))
            self._client.api.put_archive(key, _above(workdir), tree)
            config = self.facts(image).get("Config") or {}
            # a container of the new image has its labels, and ours would say that it is one of our dead
            said = dict.fromkeys(_own_labels(image), "") | dict(labels)
            changes = [f"LABEL {name}={json.dumps(value)}" for name, value in said.items()]
            changes += [f"CMD {json.dumps(config['Cmd'])}"] if config.get("Cmd") else []
            repository, _, name = tag.rpartition(":")
            self._client.api.commit(key, repository=repository, tag=name, changes=changes, pause=False)

    @contextlib.contextmanager
    def _container(self, image: str, **more: Any) -> Iterator[str]:
        with asking(f"a container of {image}", missing=ImageMissing):
            made = self._client.containers.create(
                image, command=["true"], network_mode="none", labels=_own_labels(image), **more
            )
        try:
            yield made.id
        finally:
            with contextlib.suppress(SandboxError), asking(f"removing {made.id}"):
                made.remove(force=True, v=True)

    def _mode(self, key: str, path: str) -> int | None:
        """The permissions of a path, None if there is nothing."""
        from docker import errors

        try:
            stream, facts = self._client.api.get_archive(key, path)
        except errors.NotFound:
            return None
        stream.close()
        return int(facts["mode"]) & 0o777

    def _put(self, key: str, path: str, entry: tarfile.TarInfo) -> None:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w:") as archive:
            archive.addfile(entry)
        file.seek(0)
        self._client.api.put_archive(key, _above(path), file)


def _above(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _emptied(path: str) -> tarfile.TarInfo:
    return tarfile.TarInfo(PurePosixPath(path).name)


def _directory(path: str, mode: int) -> tarfile.TarInfo:
    entry = _emptied(path)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    return entry


def _own_labels(image: str) -> dict[str, str]:
    return marks.labels(SandboxSpec(image, labels={"role": "image"}), _LIFE_S)


def _followed(events: Iterator[Mapping[str, Any]], what: str, within_s: float, cut: threading.Event | None) -> None:
    """The end of what the engine tells line by line; an error is a line, too."""
    end = time.monotonic() + within_s
    for event in events:
        if said := event.get("error"):
            raise SandboxError(f"{what}: {' '.join(said.split())[:300]}")
        if cut is not None and cut.is_set():
            raise SandboxError(f"{what}: interrupted")
        if time.monotonic() > end:
            raise SandboxError(f"{what}: waited {within_s:.0f} s for it")


_shelves: list[tuple[int, Shelf]] = []


def shelf() -> Shelf:
    """That of the engine of this process. BackendDown says what was looked for when there is none."""
    if not (_shelves and _shelves[0][0] == os.getpid()):
        _shelves[:] = [(os.getpid(), Shelf())]
    return _shelves[0][1]
