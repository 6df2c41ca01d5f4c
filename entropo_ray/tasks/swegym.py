"""SWE-Gym: rows in SWE-bench's form, without image, script or parser; its tests are pytest's."""

from __future__ import annotations

from entropo_ray.tasks.columns import Family, Images, Row
from entropo_ray.tasks.pack import Mined
from entropo_ray.tasks.swebench import COLUMNS, by_pytest


def mined(row: Row, images: Images) -> Mined:
    """A row of SWE-Gym. ValueError where pytest cannot run its tests by their names."""
    name = images.name(row, "swegym", "xingyaoww/sweb.eval.x86_64.{id_s}:latest")
    return by_pytest(row, source="swegym", image=name, remedy="leave the row out")


FAMILY = Family(
    marks=("test_patch", "base_commit", "version"),
    others=("environment_setup_commit", "meta"),
    columns=COLUMNS,
    split="train",
    mined=mined,
)
