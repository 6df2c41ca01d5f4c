"""Leases: who holds a sandbox, how many there are, and that none is left, whatever happens to borrowers and pool."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sandbox import mounts

from entropo_ray import sandbox
from entropo_ray.sandbox import CapacityError, Limits, SandboxError, SandboxLost, SandboxSpec, cgroup, pool
from entropo_ray.sandbox.pool import Bounds, Pool, borrow

SMALL = Bounds(live=2, lease_s=0.4, wait_s=0.3, create_s=5.0)


@pytest.fixture
def image(tmp_path):
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "file").write_text("as it was\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"]):
        subprocess.run(["git", *words], cwd=layer, check=True)
    return str(layer)


@pytest.fixture
def opened(monkeypatch):
    """Sandboxes that are open now; `opened.delay` seconds for a creation, `opened.broken` ones fail."""

    class Opened(list):
        delay = 0.0
        broken = False

    living = Opened()
    real = sandbox.make_sandbox

    @contextlib.asynccontextmanager
    async def counted(spec, *, backend):
        await asyncio.sleep(living.delay)
        if living.broken:
            raise sandbox.BackendDown("no")
        async with real(spec, backend=backend) as box:
            living.append(box)
            try:
                yield box
            finally:
                living.remove(box)

    monkeypatch.setattr(pool, "make_sandbox", counted)
    return living


def call_of(lender):
    async def call(name, *words, **options):
        return await getattr(lender, name)(*words, **options)

    return call


async def until(holds, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        await asyncio.sleep(0.01)


def with_pool(bounds, work):
    """Run work(pool); nothing may be left and every lease must be accounted for afterwards."""

    async def all_of_it():
        lender = Pool(bounds, "plain", tick_s=0.02)
        try:
            return await work(lender)
        finally:
            await lender.drain(5.0)
            counts = await lender.stats()
            assert (counts.live, counts.lent, counts.waiting) == (0, 0, 0)
            assert counts.acquired == counts.released + counts.expired + counts.orphaned

    return asyncio.run(all_of_it())


def test_a_lent_sandbox_is_a_sandbox(image, opened):
    async def work(lender):
        async with borrow(call_of(lender), SandboxSpec(image)) as box:
            assert (await box.exec("cat; cat file; pwd", stdin=b"in ")).output == b"in as it was\n/testbed\n"
            await box.write("new", b"text\n")
            assert await box.read("new") == b"text\n"
            assert (await box.extract_patch()).files == ("new",)
            with pytest.raises(FileNotFoundError):
                await box.read("nothing")
            await box.reset()
            assert (await box.extract_patch()).text == ""
        assert opened == []
        counts = await lender.stats()
        assert (counts.acquired, counts.released) == (1, 1)
        assert counts.create_ms > 0

    with_pool(SMALL, work)


def test_no_more_than_there_are_places_and_who_waits_is_told(image, opened):
    async def work(lender):
        first = await lender.acquire(SandboxSpec(image))
        await lender.acquire(SandboxSpec(image))
        with pytest.raises(CapacityError, match=r"in 0\.3* s|in 0 s: all 2 are taken"):
            await lender.acquire(SandboxSpec(image))
        waiting = asyncio.create_task(lender.acquire(SandboxSpec(image)))
        await asyncio.sleep(0.05)
        await lender.release(first)
        await waiting
        assert len(opened) == 2

    with_pool(dataclasses.replace(SMALL, lease_s=30), work)


def test_a_lease_ends_when_nobody_renews_it_and_not_while_a_command_runs(image, opened):
    async def work(lender):
        lease = await lender.acquire(SandboxSpec(image))
        assert (await lender.exec(lease, "sleep 0.8; echo done")).output == b"done\n"
        await until(lambda: not opened)
        with pytest.raises(SandboxLost):
            await lender.exec(lease, "true")
        with pytest.raises(SandboxLost):
            await lender.renew(lease)
        await lender.release(lease)
        counts = await lender.stats()
        assert (counts.expired, counts.released) == (1, 0)

        async with borrow(call_of(lender), SandboxSpec(image)) as box:
            await asyncio.sleep(1.0)  # renewed meanwhile
            assert (await box.exec("echo here")).output == b"here\n"

    with_pool(SMALL, work)


def test_another_token_opens_nothing(image, opened):
    async def work(lender):
        lease = await lender.acquire(SandboxSpec(image))
        with pytest.raises(SandboxLost):
            await lender.read(dataclasses.replace(lease, token="guess"), "file")
        await lender.release(dataclasses.replace(lease, token="guess"))
        assert await lender.read(lease, "file") == b"as it was\n"

    with_pool(SMALL, work)


def test_a_borrower_that_dies_loses_its_sandbox_at_once(image, opened):
    borrower = subprocess.Popen(["sleep", "60"])

    async def work(lender):
        lease = await lender.acquire(SandboxSpec(image), cgroup.label(borrower.pid))
        await asyncio.sleep(0.1)
        assert await lender.read(lease, "file")
        borrower.kill()
        borrower.wait(5)
        await until(lambda: not opened)
        assert (await lender.stats()).orphaned == 1

    with_pool(dataclasses.replace(SMALL, lease_s=30), work)


def test_a_creation_that_comes_late_is_closed_and_its_place_given_back(image, opened):
    async def work(lender):
        opened.delay = 0.3
        with pytest.raises(CapacityError, match="was not there after"):
            await lender.acquire(SandboxSpec(image))
        assert (await lender.stats()).live == 1
        await until(lambda: lender._taken == 0)
        assert opened == []
        opened.delay = 0.0
        await lender.acquire(SandboxSpec(image))
        assert (await lender.stats()).late == 1

    with_pool(dataclasses.replace(SMALL, create_s=0.1), work)


def test_a_creation_that_fails_takes_no_place(image, opened):
    async def work(lender):
        opened.broken = True
        for _ in range(3):
            with pytest.raises(SandboxError):
                await lender.acquire(SandboxSpec(image))
        opened.broken = False
        await lender.acquire(SandboxSpec(image))

    with_pool(dataclasses.replace(SMALL, live=1), work)


def test_what_comes_next_is_made_ahead_along_the_schedule_and_gives_way(image, opened, tmp_path):
    others = [str(Path(tmp_path, name)) for name in "abc"]
    for other in others:
        subprocess.run(["cp", "-r", image, other], check=True)
    coming = [SandboxSpec(path, labels={"n": str(n)}) for n, path in enumerate([*others, others[0]])]

    async def work(lender):
        await lender.schedule(coming)
        await until(lambda: len(lender._ahead) == 2)
        assert [held.box._spec.image for held in lender._ahead] == others[:2]
        dead = lender._ahead[0].box
        await dead.close()  # it died: whoever asks gets another
        lease = await lender.acquire(SandboxSpec(others[0], labels={"n": "other"}))
        assert (await lender.exec(lease, "echo here")).output == b"here\n"
        counts = await lender.stats()
        assert (counts.lost, counts.ahead) == (1, 0)
        await until(lambda: [held.box._spec.image for held in lender._ahead] == others[1:3])
        await lender.acquire(SandboxSpec(others[1]))
        assert (await lender.stats()).ahead == 1
        await lender.acquire(SandboxSpec(image))  # not on the schedule, all places taken: the last one made ahead ends
        assert len(opened) == 3

    with_pool(dataclasses.replace(SMALL, live=3, ahead=2, lease_s=30), work)


def test_a_pool_that_is_closed_ends_what_is_being_made(image, opened):
    async def work(lender):
        opened.delay = 0.3
        await lender.schedule([SandboxSpec(image)] * 4)
        asked = [asyncio.create_task(lender.acquire(SandboxSpec(image))) for _ in range(3)]
        await asyncio.sleep(0.1)
        await lender.drain(5.0)
        assert opened == []
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(one) for one in found} == {CapacityError}
        with pytest.raises(CapacityError, match="closed"):
            await lender.acquire(SandboxSpec(image))

    with_pool(dataclasses.replace(SMALL, live=3, ahead=2, wait_s=5.0), work)


def test_a_storm_of_borrowers_leaves_nothing(image, opened):
    """Cancelled while they wait, create or run; releasing twice; forgetting; failing creations."""
    rng = random.Random(0)

    async def one(lender):
        lease = await lender.acquire(SandboxSpec(image))
        await lender.exec(lease, "sleep 0.0$((RANDOM % 5))")
        for _ in range(rng.choice((0, 1, 2))):
            await lender.release(lease)

    async def work(lender):
        await lender.schedule([SandboxSpec(image)] * 20)
        tasks = []
        for n in range(60):
            opened.broken, opened.delay = n % 7 == 3, rng.choice((0.0, 0.02))
            tasks.append(asyncio.create_task(one(lender)))
            await asyncio.sleep(rng.choice((0.0, 0.01)))
            if n % 3 == 0:
                rng.choice(tasks).cancel()
        opened.broken = False
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in found} <= {type(None), asyncio.CancelledError, CapacityError, sandbox.BackendDown}
        assert sum(one is None for one in found) > 20
        await until(lambda: not lender._lent)

    with_pool(dataclasses.replace(SMALL, live=4, ahead=2, wait_s=5.0), work)
    assert opened == []


OWNER = """
import asyncio, sys
from entropo_ray.sandbox import Limits, SandboxSpec
from entropo_ray.sandbox.pool import Bounds, Pool

async def main():
    lender = Pool(Bounds(live=20, ahead=4), "bwrap")
    await lender.schedule([SandboxSpec(sys.argv[1], limits=Limits(memory_mb=64, pids=16, disk_mb=8))] * 20)
    leases = [await lender.acquire(SandboxSpec(sys.argv[1])) for _ in range(8)]
    for lease in leases[1:]:
        asyncio.create_task(lender.exec(lease, "setsid sleep 300 & echo busy; sleep 300"))
    await asyncio.sleep(1.0)
    await lender.exec(leases[0], "true")
    print("busy", flush=True)
    await asyncio.sleep(300)

asyncio.run(main())
"""


WITNESSES = {
    "of its own": lambda pid: ["-m", "entropo_ray.sandbox", "watch", str(pid)],
    "of the node": lambda pid: ["-c", "from entropo_ray.sandbox.__main__ import patrol; patrol(['bwrap'], every_s=1)"],
}


@pytest.mark.parametrize("witness", WITNESSES)
def test_a_killed_pool_leaves_neither_process_nor_mount_nor_group(image, witness):
    if trouble := [line for line in sandbox.probe("bwrap") if "control group" not in line]:
        pytest.skip(trouble[0])
    mounted = mounts()

    def left():
        groups = [path for root in cgroup.find().roots for path in Path(root).iterdir() if "-" in path.name]
        return [path for path in groups if not cgroup.alive(path.name)]

    def sleepers():
        found = subprocess.run(["pgrep", "-fx", "sleep 300"], capture_output=True, text=True)
        return found.stdout.split()

    before = sleepers()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, image], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    watching = subprocess.Popen([sys.executable, *WITNESSES[witness](owner.pid)])
    try:
        assert owner.stdout.readline() == b"busy\n"
        assert len(sleepers()) >= len(before) + 7
    finally:
        os.kill(owner.pid, signal.SIGKILL)
        owner.communicate(timeout=10)
    if witness == "of the node":
        deadline = time.monotonic() + 30
        while left() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert watching.poll() is None
        watching.kill()
    assert watching.wait(30) == (0 if witness == "of its own" else -signal.SIGKILL)
    assert sleepers() == before
    assert left() == []
    assert mounts() == mounted


def test_the_command_line_says_what_it_can(capsys):
    from entropo_ray.sandbox.__main__ import main

    assert main(["reap"]) == 0
    assert capsys.readouterr().out.startswith("reaped ")
    assert main(["destroy"]) == 2
    assert "watch PID" in capsys.readouterr().err


def test_limits_tell_kinds_apart_and_labels_do_not(image):
    spec = SandboxSpec(image, labels={"task": "a"})
    assert pool._kind(spec) == pool._kind(dataclasses.replace(spec, labels={"task": "b"}))
    assert pool._kind(spec) != pool._kind(dataclasses.replace(spec, limits=Limits(pids=3)))
