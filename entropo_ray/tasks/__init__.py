"""One issue and its hidden answer: where tasks come from."""

from __future__ import annotations

import logging
from pathlib import Path

from entropo_ray import config
from entropo_ray.records import Task
from entropo_ray.tasks import pack
from entropo_ray.tasks.pack import Mined, write

__all__ = ["Mined", "load", "write"]

log = logging.getLogger("entropo_ray")


def load(cfg: config.Tasks) -> list[Task]:
    """The tasks of a pack that the configuration asks for, in the pack's order, without those in quarantine.

    Raises ValueError, one line that names tasks.path, when the pack is missing, not whole, or has no such task.
    """
    path = Path(cfg.path).expanduser()
    if not path.is_dir():
        raise ValueError(f"tasks.path={cfg.path}: no such directory; run jobs/pack.py, or name a pack that exists")
    if not pack.whole(path):
        raise ValueError(f"tasks.path={cfg.path}: not whole (no `done`); run jobs/pack.py again")
    wanted = ("train", "test") if cfg.split == "all" else (cfg.split,)
    found = [t for t in pack.tasks(path) if t.split in wanted]
    aside = {t.id for t in found} & _quarantined(cfg, path)
    if aside:
        log.info("tasks.path=%s: %d of %d tasks are in quarantine and left out", cfg.path, len(aside), len(found))
    found = [t for t in found if t.id not in aside][: cfg.limit]
    if not found:
        raise ValueError(
            f"tasks.path={cfg.path}: no task with split={cfg.split} and limit={cfg.limit}, {len(aside)} in quarantine; "
            "ask for another split, or run jobs/pack.py with a larger pack.count"
        )
    return found


def _quarantined(cfg: config.Tasks, path: Path) -> set[str]:
    """Ids of tasks to leave out. ValueError, one line that names the key, for a list that is not there."""
    files = [Path(word).expanduser() for word in cfg.quarantine]
    for file in files:
        if not file.is_file():
            raise ValueError(f"tasks.quarantine={file}: no such file; give lists like a pack's quarantine.jsonl")
    own = pack.quarantine_of(path)
    if own.is_file() and not cfg.quarantined:
        files.append(own)
    return {key for file in files for key in pack.quarantined(file)}
