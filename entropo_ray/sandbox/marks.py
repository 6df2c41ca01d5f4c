"""What a container is known by: for whom it was made, by whom, and until when."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from entropo_ray.sandbox import SandboxSpec, cgroup

_LATE_S = 60  # past its deadline, a container is anyone's to remove


def host() -> str:
    """Names a boot of a machine: owners are judged only where they could be seen."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def labels(spec: SandboxSpec, life_s: float) -> dict[str, str]:
    """Of a container, from the moment of its creation."""
    given = {f"entropo.{key}": value for key, value in spec.labels.items()}
    ours = {"entropo.owner": cgroup.label(os.getpid()), "entropo.host": host()}
    ours["entropo.deadline"] = str(math.ceil(time.time() + life_s) + _LATE_S)
    return {"entropo.role": "rollout", **given, **ours}


def late(marks: Mapping[str, str]) -> bool:
    deadline = marks.get("entropo.deadline", "")
    return deadline.isdigit() and int(deadline) < time.time()


def in_use(marks: Mapping[str, str]) -> bool:
    """Not past its deadline, nor known to be without an owner."""
    return not late(marks) and (marks.get("entropo.host") != host() or cgroup.alive(marks["entropo.owner"]))
