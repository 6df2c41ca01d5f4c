"""Sandboxes under fire: owners, borrowers and drivers are killed at random while a stage runs, and nothing is left.

python tests/test_chaos.py SECONDS [SEED] [docker]     # the same, for as long as you like; stages in Docker by turns
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import engine
import pytest

from entropo_ray import config, sandbox, store, tasks
from entropo_ray.records import Outcome
from entropo_ray.sandbox import cgroup, docker, marks
from entropo_ray.sandbox.stage import STAGE
from entropo_ray.tasks import local

VICTIMS = {  # what a command line holds -> how often it is drawn
    "ray::Keeper": 3,
    "MapBatches(Episodes)": 3,
    "MapBatches(Graders)": 2,
    "entropo_ray.sandbox.launcher": 2,
    "entropo_ray.sandbox watch": 1,
    "test_chaos.py drive": 1,
}
ENGINES = ("dockerd", "containerd")  # what runs or is run by an engine, but for what is inside
RAYS = ("ray::", "/raylet", "/gcs_server", "/ray/_private/", "/ray/dashboard/")  # its own processes, and idle workers
SAMPLES = 8
PAUSE_S = 0.5, 40.0  # between two kills, log-uniform: in bursts, and with lulls in which stages end
PR_SET_CHILD_SUBREAPER = 36
SPARED: set[int] = set()  # processes of the test itself


def drive(home: Path) -> None:
    """Stage after stage, each resumed where a killed driver left it, until killed."""
    import ray

    from entropo_ray.rollout.teach import teach

    ray.init(num_cpus=8, resources={"sandbox": 64}, include_dashboard=False, log_to_driver=False)
    agent = config.Agent(tools="r2egym", max_steps=8, max_steps_hard=10, tool_s=20, wall_s=120)
    packs = [home / name for name in ("bwrap", "docker") if (home / name).is_dir()]
    for number in itertools.count():
        pack, to = packs[-1 - number % len(packs)], home / f"stage-{number}"
        box = config.Sandbox(backend=pack.name, memory_mb=512, disk_mb=64, per_node=8, ahead=2, grade_s=60)
        rollout = config.Rollout(
            agent=agent, sandbox=box, episodes=12, graders=6, tries=20, engines=0, samples=SAMPLES, episode_actors=1
        )
        if not store.done(to):
            suite = tasks.load(config.Tasks(path=str(pack)))
            teach(suite, rollout, config.Sft(samples=SAMPLES, error_rate=0.3), seed=number, to=to)


def ours() -> dict[int, str]:
    """Every living descendant of this process, which adopts orphans: pid -> command line."""
    parents, lines = {}, {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(directory.name)] = int(parent)
                    lines[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    found = {pid: lines.get(pid, "") for pid in found - {os.getpid()}}
    return {p: line for p, line in found.items() if p not in SPARED and not any(word in line for word in ENGINES)}


@contextlib.contextmanager
def driven(home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver, killed afterwards."""
    here = Path(__file__)
    scratch = home / "tmp"
    scratch.mkdir(exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(here.parents[1]), "TMPDIR": str(scratch)}
    env |= {"RAY_TMPDIR": tempfile.mkdtemp(prefix="er-", dir="/tmp")}  # sockets need short names
    with (home / "driver.log").open("ab") as log:
        command = [sys.executable, str(here), "drive", str(home)]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def storm(home: Path, seconds: float, seed: int) -> collections.Counter[str]:
    """Kill for so long; how many of each kind were killed."""
    rng = random.Random(seed)
    killed: collections.Counter[str] = collections.Counter()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with driven(home) as driver:
            while driver.poll() is None and time.monotonic() < deadline:
                time.sleep(math.exp(rng.uniform(*map(math.log, PAUSE_S))))
                alive = ours()
                kinds = {kind: [pid for pid, line in alive.items() if kind in line] for kind in VICTIMS}
                there = [kind for kind, pids in kinds.items() if pids]
                kind = rng.choices(there, [VICTIMS[kind] for kind in there])[0]
                if kind == "test_chaos.py drive" and not kinds["MapBatches(Episodes)"]:
                    continue  # let it come to work
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(kinds[kind]), signal.SIGKILL)
                    killed[kind] += 1
    until(
        lambda: not _of_ours(ours()),
        150,  # a worker waits a minute for a killed Ray; a minute until the patrol comes, and its time
        lambda: f"processes are left: {[line[:200] for line in _of_ours(ours()).values()]}",
    )
    for pid in ours():  # agents of a killed Ray wait for a minute and more
        os.kill(pid, signal.SIGKILL)
    return killed


def _of_ours(found: dict[int, str]) -> dict[int, str]:
    """Without what is Ray's own."""
    named = {pid: line for pid, line in found.items() if any(kind in line for kind in VICTIMS)}
    return named | {pid: line for pid, line in found.items() if not any(word in line for word in RAYS)}


def until(holds, seconds: float, what) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def containers() -> list[str]:
    """Containers and volumes of owners that are no more, where an engine is known."""
    if not docker._engines:
        return []
    api, ours = docker.engine().client.api, {"label": "entropo.owner"}
    found = [*api.containers(all=True, filters=ours), *(api.volumes(filters=ours)["Volumes"] or ())]
    return [str(thing) for thing in found if not marks.in_use(thing["Labels"])]


@contextlib.contextmanager
def patrolled(backends: list[str]) -> Iterator[None]:
    """What reaps once a minute on a node, whoever is killed there."""
    words = [sys.executable, "-m", "entropo_ray.sandbox", "watch", *backends]
    process = subprocess.Popen(words, cwd=Path(__file__).parents[1])
    SPARED.add(process.pid)
    try:
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(10)


def groups() -> list[str]:
    """Control groups of owners that are no more."""
    found = [path for root in cgroup.find().roots for path in Path(root).iterdir() if "-" in path.name]
    return [str(path) for path in found if path.is_dir() and not cgroup.alive(path.name)]


def mounts(home: Path) -> set[str]:
    """Where something is mounted that could be ours: other sandboxes and engines may be at work beside us."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return {point for point in points if point.startswith((f"{STAGE}/", str(home), "/tmp/newroot", "/newroot"))}


def trial(home: Path, seconds: float, seed: int, *, boxed: bool) -> dict[str, object]:
    """A storm, and what is left after it: AssertionError if anything is."""
    mined = local.generate(count=4, held_out=0, ambiguous=0, hidden=0, seed=0, to=home / "bwrap")
    tasks.write(home / "bwrap", mined)
    if boxed:
        docker.engine()
        images = [dataclasses.replace(m.task, image=engine.image_of(m.task.image)) for m in mined]
        tasks.write(home / "docker", [dataclasses.replace(m, task=task) for m, task in zip(mined, images, strict=True)])
    before = mounts(home)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with patrolled(["bwrap", "docker"] if boxed else ["bwrap"]):
        killed = storm(home, seconds, seed)
        until(lambda: not (groups() or containers()), 75, lambda: f"after a minute: {groups()}, {containers()}")
    assert mounts(home) == before
    assert list((home / "tmp").iterdir()) == []
    return {"killed": dict(killed), **_accounted(home)}


def _accounted(home: Path) -> dict[str, int]:
    """Rows of whole stages: each attempt once; of the last one: no attempt twice."""
    suite = tasks.load(config.Tasks(path=str(home / "bwrap")))
    expected = sorted((task.id, sample) for task in suite for sample in range(SAMPLES))
    stages = sorted(home.glob("stage-*"), key=lambda path: int(path.name.partition("-")[2]))
    whole = [path for path in stages if store.done(path)]
    answered = 0
    for path in whole:
        rows = list(store.read(path, Outcome))
        assert sorted((row.task_id, row.sample) for row in rows) == expected, path
        answered += sum(not row.stop.infra for row in rows)
    assert all(store.keys(path) <= set(expected) for path in stages)
    return {"stages": len(whole), "answered": answered, "lost": len(whole) * len(expected) - answered}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("backends", ["bwrap", pytest.param("bwrap and docker", marks=pytest.mark.docker)])
def test_ten_minutes_of_kills_leave_nothing(tmp_path, request, backends):
    """Threat 29."""
    words = [sys.executable, __file__, "600"]
    if "docker" in backends:
        request.getfixturevalue("docker_host")
        words += ["0", "docker"]
    if trouble := [line for line in sandbox.probe("bwrap") if "control group" not in line]:
        pytest.skip(trouble[0])
    env = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stages"] > 1
    assert set(found["killed"]) == set(VICTIMS)


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        drive(Path(sys.argv[2]))
    else:
        boxed = sys.argv[3:] == ["docker"]
        with tempfile.TemporaryDirectory() as directory, engine.running() if boxed else contextlib.nullcontext():
            found = trial(Path(directory), float(sys.argv[1]), int((*sys.argv, "0")[2]), boxed=boxed)
        sys.stdout.write(json.dumps(found) + "\n")
