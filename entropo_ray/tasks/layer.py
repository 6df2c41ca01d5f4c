"""Repository layers: directories of files become git repositories of one commit, the same for the same files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

_DATE = "2024-01-01T12:00:00+0000"
_GITS = 4  # git processes at once; they mostly wait


def commit(homes: Mapping[Path, bool], *, ignored: bool = False) -> None:
    """Make each directory a repository; where the mapping says so, with one commit of all its files.

    `ignored`: of those too that a .gitignore names. RuntimeError with git's own words if it fails.
    """
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(_GITS) as pool:
        _git(Path(scratch), "init", "--initial-branch=main", "--template=")
        work = partial(_repository, Path(scratch, ".git"), ignored=ignored)
        list(pool.map(work, homes.keys(), homes.values()))


def digest(home: Path) -> str:
    """Of the files below a directory: names, bytes and whether they are executable."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in home.rglob("*") if p.is_file()):
        data = path.read_bytes()
        head = [str(path.relative_to(home)), os.access(path, os.X_OK), len(data)]
        found.update(json.dumps(head).encode() + data)
    return found.hexdigest()


def _repository(empty: Path, home: Path, committed: bool, *, ignored: bool) -> None:
    """A copy of an empty repository, which is quicker than to start a new one, and one commit of all files."""
    shutil.rmtree(home / ".git", ignore_errors=True)
    shutil.copytree(empty, home / ".git")
    if committed:
        _git(home, "add", "--all", *(("--force",) if ignored else ()))
        _git(home, "commit", "--no-verify", "--message", "Start")


def _git(home: Path, *words: str) -> None:
    person = {"NAME": "Local Pack", "EMAIL": "local@example.com", "DATE": _DATE}
    identity = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in person.items()}
    # no user's configuration: hooks, signing or line endings would change the commit
    alone = {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "PATH": os.environ.get("PATH", os.defpath),
    }
    done = subprocess.run(
        ["git", "-c", "gc.auto=0", "-c", "core.fsync=none", *words],
        cwd=home,
        env=alone | identity,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"git {words[0]} in {home} failed: {done.stderr.strip()}")
