"""The work directory of an image as a tar: unpacked here, changed, and packed with the owners and modes that it had.

What an image holds is not ours. Nothing here follows its links: they are made last, so that no file is written through
one, and what is neither file, directory nor link is refused.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

Entries = Mapping[str, tarfile.TarInfo]  # by path; "." is the directory itself

_BYTES = 32 << 30  # a work tree is copied into memory for each sandbox: more is of no use


def unpack(archive: IO[bytes], to: Path) -> dict[str, tarfile.TarInfo]:
    """Make `to` the tree of an archive; what it said of each path.

    The owner may read and write all of it, whatever its modes. ValueError for what has no place in a work tree.
    """
    try:
        return _unpack(archive, to)
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError, tarfile.TarError) as error:
        raise ValueError(f"the archive of the work directory contradicts itself: {error}") from error


def _unpack(archive: IO[bytes], to: Path) -> dict[str, tarfile.TarInfo]:
    entries: dict[str, tarfile.TarInfo] = {}
    later: list[tuple[Path, tarfile.TarInfo]] = []
    to.mkdir()
    size = 0
    with tarfile.open(fileobj=archive, mode="r:") as tar:
        for entry in tar:
            path = _inside(entry.name)
            entries[path] = entry
            size += entry.size
            if size > _BYTES:
                raise ValueError(f"the work directory is larger than {_BYTES >> 30} GiB")
            if entry.isdir():
                (to / path).mkdir(exist_ok=True, parents=True)
            elif entry.isreg():
                _write(tar, entry, to / path)
            elif entry.islnk():
                os.link(to / _inside(entry.linkname), to / path)
            else:
                later.append((to / path, entry))
    for target, entry in later:
        if not entry.issym():
            raise ValueError(f"the work directory holds {entry.name}, which is no file, directory or link")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(entry.linkname, target)  # noqa: PTH211 (a name that may lead anywhere)
        os.utime(target, (entry.mtime, entry.mtime), follow_symlinks=False)
    return entries


def _inside(name: str) -> str:
    path = os.path.normpath(name)
    if path.startswith("/") or path.split("/")[0] == "..":
        raise ValueError(f"the archive of the work directory holds {name!r}")
    return path


def _write(tar: tarfile.TarFile, entry: tarfile.TarInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    data = tar.extractfile(entry)
    assert data is not None, "a regular file has data"
    with data, target.open("xb") as file:
        shutil.copyfileobj(data, file, 1 << 20)
    target.chmod(entry.mode & 0o777 | 0o600)
    os.utime(target, (entry.mtime, entry.mtime))


def pack(tree: Path, name: str, entries: Entries, to: IO[bytes]) -> None:
    """Write a directory as an archive of one directory `name`.

    Paths that were unpacked keep owner and mode, new ones get the directory's owner.
    """
    top = entries["."]
    with tarfile.open(fileobj=to, mode="w:", format=tarfile.GNU_FORMAT) as tar:
        for path in _paths(tree):
            entry = tar.gettarinfo(tree / path, arcname=os.path.normpath(f"{name}/{path}"))
            before = entries.get(path)
            owner = before or top
            entry.uid, entry.gid, entry.uname, entry.gname = owner.uid, owner.gid, owner.uname, owner.gname
            entry.mode = _mode(entry, before)
            if entry.isreg():
                with (tree / path).open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)
    to.flush()


def _paths(tree: Path) -> Iterator[str]:
    yield "."
    for folder, folders, files in os.walk(tree):
        folders.sort()
        here = os.path.relpath(folder, tree)
        yield from (os.path.normpath(os.path.join(here, name)) for name in sorted((*folders, *files)))  # noqa: PTH118


def _mode(entry: tarfile.TarInfo, before: tarfile.TarInfo | None) -> int:
    """As it was, unless it is another kind of thing, or was made executable or not, meanwhile."""
    runs = bool(entry.mode & stat.S_IXUSR)
    if before is not None and before.isdir() == entry.isdir() and bool(before.mode & stat.S_IXUSR) == runs:
        return before.mode & 0o777
    return 0o755 if runs or entry.isdir() else 0o644


def led_to(tree: Path, folder: str) -> bool:
    """Whether a link of the tree leads below a folder outside of it, as environments do to their interpreter."""
    links = (tree / path for path in _paths(tree) if (tree / path).is_symlink())
    return any(os.path.normpath(link.readlink()).startswith(f"{folder}/") for link in links)
