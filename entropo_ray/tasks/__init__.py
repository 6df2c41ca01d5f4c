"""One issue and its hidden answer: where tasks come from."""

from __future__ import annotations

from pathlib import Path

from entropo_ray import config
from entropo_ray.records import Task
from entropo_ray.tasks import pack
from entropo_ray.tasks.pack import Mined, write

__all__ = ["Mined", "load", "write"]


def load(cfg: config.Tasks) -> list[Task]:
    """The tasks of a pack that the configuration asks for, in the pack's order.

    Raises ValueError, one line that names tasks.path, when the pack is missing, not whole, or has no such task.
    """
    path = Path(cfg.path).expanduser()
    if not path.is_dir():
        raise ValueError(f"tasks.path={cfg.path}: no such directory; run jobs/pack.py, or name a pack that exists")
    if not pack.whole(path):
        raise ValueError(f"tasks.path={cfg.path}: not whole (no `done`); run jobs/pack.py again")
    wanted = ("train", "test") if cfg.split == "all" else (cfg.split,)
    found = [t for t in pack.tasks(path) if t.split in wanted][: cfg.limit]
    if not found:
        raise ValueError(
            f"tasks.path={cfg.path}: no task with split={cfg.split} and limit={cfg.limit}; "
            "ask for another split, or run jobs/pack.py with a larger pack.count"
        )
    return found
