"""Walls, limits, patch and end of Docker sandboxes, on a real engine. The contract itself is in test_sandbox.py."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import engine
import pytest
from test_sandbox import ASK, FORKS, MATRIX, git

from entropo_ray.sandbox import (
    BackendDown,
    CapacityError,
    ImageMissing,
    Limits,
    SandboxError,
    SandboxLost,
    SandboxSpec,
    cgroup,
    marks,
    open_sandbox,
    probe,
    reap,
    seccomp,
)
from entropo_ray.sandbox import docker as backend

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("docker_host")]
SMALL = Limits(memory_mb=192, pids=48, disk_mb=24, exec_s=20, life_s=300)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """A repository on this machine."""
    home = tmp_path_factory.mktemp("layer")
    (home / "pkg").mkdir()
    (home / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    (home / "pkg/data.txt").write_text("one\ntwo\nthree\n")
    (home / ".gitignore").write_text("*.log\n__pycache__/\n")
    (home / "run.sh").write_text("echo hi\n")
    (home / "link").symlink_to("calc.py")
    git(home, "init", "-q", "-b", "main")
    git(home, "add", "-A")
    git(home, "commit", "-qm", "base")
    return home


@pytest.fixture
def image(docker_host, layer):
    """The same repository as an image."""
    return engine.image_of(layer)


def inside(image, work, *, limits=SMALL, kind="docker", **spec):
    async def whole():
        async with open_sandbox(SandboxSpec(image, limits=limits, **spec), backend=kind) as sandbox:
            return await work(sandbox)

    return asyncio.run(whole())


def run(image, cmd, **how):
    return inside(image, lambda sandbox: sandbox.exec(cmd, **how))


def alive_afterwards(image, *commands, **how):
    """Results of commands, after each of which the same sandbox still answers."""

    async def work(sandbox):
        results = []
        for cmd in commands:
            results.append(await sandbox.exec(cmd, **how))
            after = await sandbox.exec("echo alive")
            assert (after.output, after.exit_code) == (b"alive\n", 0), cmd
        return results

    return inside(image, work)


def containers(**labels):
    filters = {"label": [f"entropo.{key}={value}" for key, value in labels.items()] or "entropo.owner"}
    return backend.engine().client.containers.list(all=True, filters=filters, ignore_removed=True)


def ours():
    return containers(owner=cgroup.label(os.getpid()))


def gone(what, patience_s=15.0):
    """True once `what()` is false or empty."""
    deadline = time.monotonic() + patience_s
    while what() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not what()


def commands_in(container):
    """Command lines of its processes, as the engine sees them."""
    top = container.top(ps_args="-eo pid,args")
    return [row[-1] for row in top["Processes"]]


# --- walls ------------------------------------------------------------------------------------------------------------


def test_the_agent_has_no_rights_and_no_network(image):
    words = ["mount -t tmpfs x /tmp", "unshare -U true", "unshare -n true", "mknod /tmp/d b 8 0", "touch /usr/x /x"]
    words += [
        "ls /var/run/docker.sock",
        "cat /etc/shadow",
        "cat /proc/1/maps",
        "cat /proc/1/environ",
        "setpriv --reuid 0 true",
    ]
    connect = "import socket; socket.create_connection(('10.0.0.1', 80), 2)"
    itself = """if True:
        import socket
        with socket.create_server(("127.0.0.1", 0)) as server:
            for name in "localhost", socket.gethostname():
                socket.create_connection((name, server.getsockname()[1]), 2)
                print(name, socket.gethostbyname(name), end=" ")
    """
    look_up = "import socket; socket.getaddrinfo('example.org', 80)"

    async def work(sandbox):
        status = "grep -E 'CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp:' /proc/self/status | cut -f2; "
        facts = await sandbox.exec(
            f"id -u; {status} sleep 2 & sleep 0.3; ls /proc/$!/fd; tail -n +3 /proc/net/dev | grep -vc lo:"
        )
        assert facts.output.decode().split() == ["10001", *["0" * 16] * 5, "1", "2", "0", "1", "2", "0"]
        for word in words:
            assert (await sandbox.exec(word)).exit_code != 0, word
        assert b"unreachable" in (await sandbox.exec(["python", "-c", connect])).output
        assert b"gaierror" in (await sandbox.exec(["python", "-c", look_up])).output
        assert (await sandbox.exec(["python", "-c", itself])).output == b"localhost 127.0.0.1 sandbox 127.0.0.1 "

    inside(image, work)


def test_calls_that_lead_out_are_closed(image):
    """Threat 26: by the engine's own filter, whatever the words."""
    names = ("mount", "pivot_root", "setns", "unshare", "bpf", "keyctl", "add_key", "perf_event_open", "kexec_load")
    calls = {name: number for name, number in seccomp.denied().items() if name in names}
    assert len(calls) == len(names)
    done = run(image, ["python", "-c", ASK, json.dumps(calls), "[]"])
    assert json.loads(done.output.splitlines()[0]) == dict.fromkeys(calls, errno.EPERM)


def test_links_and_pipes_stay_inside(image, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("host")

    async def work(sandbox):
        await sandbox.exec(f"ln -s {outside} abs; ln -s / root; echo tmp > /tmp/t; ln -s /tmp/t within; mkfifo pipe")
        for path in ("abs", "root/etc/shadow", "../" * 12 + str(outside), "pipe"):
            with pytest.raises(OSError):  # noqa: PT011 (which one differs)
                await sandbox.read(path)
        for path in ("abs", "/usr/evil", "/etc/passwd", "/evil", "pipe", "pkg", "a\0b"):
            with pytest.raises(OSError):  # noqa: PT011 (which one differs)
                await sandbox.write(path, b"agent")
        assert await sandbox.read("within") == b"tmp\n"
        with pytest.raises(OSError, match="No space left"):
            await sandbox.write("fill", bytes(SMALL.disk_mb << 20))

    inside(image, work)
    assert outside.read_text() == "host"


def test_what_an_image_asks_for_is_not_done(image, layer):
    """Its start-up command, health check, volumes and user; and `python` is there where it has only python3."""
    import docker

    dockerfile = f'FROM {image}\nENTRYPOINT ["false"]\nCMD ["false"]\nVOLUME /opt/wide\nHEALTHCHECK CMD touch /tmp/x\n'
    dockerfile += "USER root\nENV PATH=/usr/games:/usr/bin:/bin\n"
    client = docker.from_env()
    others = [volume for volume in client.volumes.list() if "entropo.owner" not in (volume.attrs["Labels"] or {})]
    built, _ = client.images.build(fileobj=io.BytesIO(dockerfile.encode()), tag="entropo-test:odd", rm=True)
    try:
        backend.engine()._hosts._until = 0  # written again, by way of this image
        done = run(
            built.id, "id -u; echo $PATH; readlink -f $(command -v python); ls /tmp; head -c 9M /dev/zero > /opt/wide/x"
        )
        assert [v for v in client.volumes.list() if "entropo.owner" not in (v.attrs["Labels"] or {})] == others
    finally:
        client.images.remove("entropo-test:odd", force=True)
    lines = done.output.decode().splitlines()
    assert lines[0] == "10001"
    assert lines[1].startswith("/usr/games:")
    assert "/usr/bin/python3" in lines[2]
    assert "No space left" in lines[3]


# --- limits -----------------------------------------------------------------------------------------------------------

SWARM = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


KILLER = """
import os
os.setsid()
if os.fork() == 0:
    while True:
        try:
            os.kill(-1, 9)
        except OSError:
            pass
"""


# takes its own output away from whoever else would read it
THIEF = """
import os
mine = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
while True:
    os.write(1, b"x")
    try:
        os.read(mine, 1)
    except BlockingIOError:
        pass
"""


def test_swarms_and_killers_end_with_their_command(image):
    bomb = "bomb() { bomb | bomb & }; bomb"
    begin = time.monotonic()
    words = (["python", "-c", code] for code in (SWARM, KILLER, THIEF))
    alive_afterwards(image, bomb, *words, timeout=0.7)
    assert time.monotonic() - begin < 60


def test_processes_and_memory_are_limited(image):
    hog = "python -c 'bytearray(1 << 30)'"
    forks, killed, hidden, calm = alive_afterwards(image, ["python", "-c", FORKS], hog, f"{hog}; exit 0", "true")
    assert 10 < int(forks.output) < SMALL.pids
    assert (killed.exit_code, killed.oom, killed.timed_out, killed.output) == (137, True, False, b"")
    assert (hidden.exit_code, hidden.oom) == (0, True)
    assert (calm.exit_code, calm.oom, calm.disk_full) == (0, False, False)


def test_a_full_disk_is_a_result(image):
    places = ["/testbed", "/tmp", "/home/agent", "/dev/shm"]
    fill = "head -c 100M /dev/zero > {0}/fill; stat -c %s {0}/fill"
    words = [word for place in places for word in (fill.format(place), f"rm {place}/fill")]
    *done, sparse = alive_afterwards(image, *words, "truncate -s 10G sparse")
    assert [result.disk_full for result in done] == [True, False] * 4
    sizes = [int(result.output.split()[-1]) for result in done[::2]]
    assert sum(sizes) <= SMALL.disk_mb << 20
    assert min(sizes) > 1 << 20
    assert sparse.exit_code == 128 + signal.SIGXFSZ


def test_endless_output_is_drained_and_cut(image):
    (endless,) = alive_afterwards(image, "yes", timeout=0.5)
    assert endless.timed_out
    assert endless.truncated
    assert endless.total_bytes > SMALL.output_bytes > len(endless.output) - 100
    much = run(image, "head -c 300M /dev/zero")
    assert (much.total_bytes, much.exit_code) == (300 << 20, 0)


@pytest.mark.parametrize("ending", ["exit 0", "sleep 60", "kill -9 $PPID"])
def test_nothing_survives_the_end_of_a_command(image, ending):
    daemon = "setsid nohup bash -c \"trap '' TERM HUP; sleep 987\" >/dev/null 2>&1 </dev/null &"

    async def work(sandbox):
        (box,) = ours()
        running = asyncio.create_task(sandbox.exec(f"{daemon} sleep 1; {ending}", timeout=2))
        seen = await asyncio.to_thread(gone, lambda: "sleep 987" not in commands_in(box))
        return seen, await running, commands_in(box)

    seen, done, left = inside(image, work)
    assert seen
    assert done.timed_out == (ending == "sleep 60")
    assert len(left) == 1  # the first process


def test_a_command_that_kills_all_hurts_only_itself(image):
    all_, first = alive_afterwards(image, "sleep 60 & (kill -9 -1); echo never", "kill -9 1; kill -INT 1; echo still")
    assert (all_.exit_code, all_.output) == (137, b"")
    assert first.output.endswith(b"still\n")


@pytest.mark.parametrize("what", ["prlimit(1, resource.RLIMIT_NOFILE, (3, 3))", "nice"])
def test_whoever_hobbles_the_first_process_loses_the_sandbox(image, what):
    """For what commands inherit of it would hobble all that come, those of a grader among them."""
    hobble = (
        f"import resource; resource.{what}" if what != "nice" else "import os; os.setpriority(os.PRIO_PROCESS, 1, 19)"
    )

    async def work(sandbox):
        assert (await sandbox.exec("ulimit -n")).output == b"4096\n"
        with pytest.raises(SandboxLost):
            await sandbox.exec(["python", "-c", hobble])

    inside(image, work)


def test_the_environment_is_the_images_and_ours(image):
    env = {"LANG": "C", "ODD": "a=b\nc", "LC_ALL": ""}
    done = inside(image, lambda sandbox: sandbox.exec(["env", "-0"], env={"MORE": "=", "EMPTY": ""}), env=env)
    found = dict(entry.split("=", 1) for entry in done.output.decode().split("\0") if entry)
    kept = {"MORE": "=", "EMPTY": "", **env, "HOME": "/home/agent", "HOSTNAME": "sandbox"}
    assert {key: found.get(key) for key in kept} == kept
    assert set(found) - set(kept) == {*backend.ENV, "PATH", "PWD", "OLDPWD", "SHLVL"} - set(kept)


def test_words_that_no_program_can_take_are_failed_commands(image):
    words = ("echo a\0b", "echo \ud800", "echo " + "x" * 200_000)
    assert [done.exit_code for done in alive_afterwards(image, *words, ["true", *["x" * 9999] * 400])] == [126] * 4
    assert run(image, "wc -c", stdin=b"x" * 3_000_000).output == b"3000000\n"
    assert run(image, "head -c 1", stdin=b"x" * 3_000_000).output == b"x"


def test_a_locked_working_directory_is_the_commands_failure(image):
    async def work(sandbox):
        await sandbox.exec("chmod 0 /testbed")
        return await sandbox.exec("true"), await sandbox.exec("chmod 755 /testbed; ls /testbed", cwd="/tmp")

    locked, opened = inside(image, work)
    assert locked.exit_code == 126
    assert b"Permission denied" in locked.output
    assert b"calc.py" in opened.output


def test_a_cancelled_command_dies_and_the_next_one_waits_for_that(image):
    async def work(sandbox):
        (box,) = ours()
        task = asyncio.create_task(sandbox.exec("sleep 986"))
        assert await asyncio.to_thread(gone, lambda: "sleep 986" not in commands_in(box))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        left = commands_in(box)
        word = "test ! -e busy && touch busy && sleep 0.05 && rm busy"
        return left, [done.exit_code for done in await asyncio.gather(*(sandbox.exec(word) for _ in range(3)))]

    left, codes = inside(image, work)
    assert "sleep 986" not in left
    assert codes == [0, 0, 0]


# --- the end of containers, of their owner, of the engine -------------------------------------------------------------


def test_a_sandbox_ends_with_its_life(image):
    async def work(sandbox):
        with pytest.raises(SandboxLost, match="life is over"):
            await sandbox.exec("sleep 60")
        with pytest.raises(SandboxLost, match="life is over"):
            await sandbox.exec("true")
        return await asyncio.to_thread(gone, ours)

    assert inside(image, work, limits=Limits(life_s=3))


def test_a_container_that_is_killed_is_a_lost_sandbox(image):
    async def work(sandbox):
        (box,) = ours()
        task = asyncio.create_task(sandbox.exec("sleep 60"))
        assert await asyncio.to_thread(gone, lambda: "sleep 60" not in commands_in(box))
        box.kill()
        with pytest.raises(SandboxLost):
            await task
        for use in (sandbox.exec("true"), sandbox.read("calc.py"), sandbox.write("x", b""), sandbox.extract_patch()):
            with pytest.raises(SandboxLost):
                await use

    inside(image, work)
    assert gone(ours)
    assert run(image, "echo again").output == b"again\n"


def test_a_cancelled_opening_leaves_nothing(image):
    async def whole(patience_s):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s), open_sandbox(SandboxSpec(image, limits=SMALL), backend="docker"):
                await asyncio.sleep(60)

    for patience_s in (0.01, 0.2, 0.5):
        asyncio.run(whole(patience_s))
        assert gone(ours)


OWNER = """
import asyncio, sys
from entropo_ray.sandbox import SandboxSpec, open_sandbox

async def main():
    spec = SandboxSpec(sys.argv[1], labels={"job": "leak"})
    async with open_sandbox(spec, backend="docker") as one, open_sandbox(spec, backend="docker") as two:
        print("open", flush=True)
        await asyncio.gather(*(box.exec("setsid sleep 60; sleep 60") for box in (one, two)))

asyncio.run(main())
"""


def test_containers_end_with_their_killed_owner(image):
    """Though nobody reaps."""
    words = [sys.executable, "-c", OWNER, image]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        assert len(containers(job="leak")) == 2
        owner.kill()
    assert gone(lambda: containers(job="leak"))


def test_reaping_removes_what_dead_owners_left_and_nothing_else(image):
    client = backend.engine().client
    spec = SandboxSpec(image)
    with subprocess.Popen(["sleep", "60"]) as process:
        dead = {"entropo.owner": cgroup.label(process.pid)}
        process.kill()
    made = {
        "foreign": {"other.owner": "x"},
        "late": marks.labels(spec, -1000),
        "a dead owner's": marks.labels(spec, 1000) | dead,
        "never started": marks.labels(spec, 1000),
        "another machine's": marks.labels(spec, 1000) | {"entropo.host": "x", "entropo.owner": "1-2-3"},
    }
    boxes = {name: client.containers.create(image, ["true"], labels=labels) for name, labels in made.items()}
    volumes = {name: client.volumes.create(labels=labels) for name, labels in made.items()}
    try:

        async def work(sandbox):
            assert reap("docker") == 2
            return (await sandbox.exec("echo alive")).output

        assert inside(image, work) == b"alive\n"
        left = {box.id for box in client.containers.list(all=True, ignore_removed=True)}
        assert {name for name, box in boxes.items() if box.id in left} == set(boxes) - {"late", "a dead owner's"}
        left = {volume.id for volume in client.volumes.list()}
        assert {name for name, volume in volumes.items() if volume.id in left} == set(boxes) - {
            "late",
            "a dead owner's",
        }
        assert reap("docker") == 0
    finally:
        for thing in (*boxes.values(), *volumes.values()):
            with contextlib.suppress(Exception):
                thing.remove(force=True)


def test_a_process_leaves_no_volume(image):
    """Removed by someone, the file of hosts is written again; at the end it goes."""
    code = """if True:
        import asyncio, sys
        from entropo_ray.sandbox import SandboxError, SandboxSpec, docker, open_sandbox
        async def localhost():
            async with open_sandbox(SandboxSpec(sys.argv[1]), backend="docker") as box:
                return (await box.exec("grep -c localhost /etc/hosts")).output
        print(asyncio.run(localhost()))
        api = docker.engine().client.api
        ours = {"label": "entropo.owner=" + docker.marks.cgroup.label(docker.os.getpid())}
        for volume in api.volumes(filters=ours)["Volumes"]:
            api.remove_volume(volume["Name"], force=True)
        try:
            asyncio.run(localhost())
        except SandboxError as error:
            print(type(error).__name__)
        print(asyncio.run(localhost()))
    """
    before = {volume.id for volume in backend.engine().client.volumes.list()}
    done = subprocess.run([sys.executable, "-c", code, image], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.splitlines() == ["b'2\\n'", "SandboxError", "b'2\\n'"], done.stderr
    assert {volume.id for volume in backend.engine().client.volumes.list()} == before


def test_every_container_says_whose_it_is(image):
    async def work(sandbox):
        (box,) = ours()
        return box.labels, box.attrs["HostConfig"]

    labels, host = inside(image, work, labels={"role": "grade", "task": "t-1"})
    assert labels["entropo.role"] == "grade"
    assert labels["entropo.task"] == "t-1"
    assert time.time() + SMALL.life_s < int(labels["entropo.deadline"]) < time.time() + SMALL.life_s + 120
    assert (host["NetworkMode"], host["CapDrop"], host["AutoRemove"]) == ("none", ["ALL"], True)
    assert host["Memory"] == host["MemorySwap"]


def test_an_engine_that_is_not_there_is_said(image, monkeypatch):
    monkeypatch.setattr(backend, "_engines", [])
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/socket")
    with pytest.raises(BackendDown, match="DOCKER_HOST"):
        run(image, "true")
    assert len(probe("docker")) == 1
    assert "does not answer" in probe("docker")[0]


def test_what_the_engine_says_becomes_the_right_error(image):
    from docker import errors

    def raised(error, **how):
        with pytest.raises(SandboxError) as caught, backend.asking("x", **how):
            raise error
        return type(caught.value)

    api = backend.engine().client.api
    with pytest.raises(errors.NotFound) as missing:
        api.inspect_container("entropo-none")
    assert raised(missing.value) is SandboxLost
    assert raised(missing.value, missing=ImageMissing) is ImageMissing
    assert raised(errors.APIError("x", explanation="write /x: no space left on device")) is CapacityError
    assert raised(errors.APIError("x", explanation="odd")) is SandboxError
    assert raised(ConnectionResetError("x")) is BackendDown


@pytest.mark.parametrize("reference", ["entropo-test:none", "Not A Reference", "/some/directory"])
def test_an_image_that_is_not_there_is_missing(reference):
    with pytest.raises(ImageMissing, match="no such repository layer"):
        run(reference, "true")


def test_this_engine_has_all_that_is_asked_for():
    facts = backend.engine().client.info()
    assert all("vfs" in sentence or not facts["MemoryLimit"] for sentence in probe("docker"))


# --- the patch --------------------------------------------------------------------------------------------------------


def patch_of(image, cmd, kind="docker"):
    async def work(sandbox):
        done = await sandbox.exec(cmd)
        assert done.exit_code == 0, done.output
        return await sandbox.extract_patch()

    return inside(image, work, kind=kind)


ODD = """
echo x > debug.log; touch a.pyc; mkfifo pipe; echo x > closed; chmod 0 closed pkg/data.txt
mkdir shut quiet; echo y > shut/f; chmod 0 shut; echo z > quiet/f; echo z > quiet/g; chmod 0 quiet/g; chmod 500 quiet
git init -q nested; echo x > nested/f; head -c 100 /dev/zero > nul; ln -s nowhere dangling
"""
CHANGES = {
    "one": "; ".join(MATRIX[name] for name in ("edited", "new", "mode", "latin-1", "odd names", "committed")),
    "two": "; ".join(MATRIX[name] for name in ("type", "crlf", "attributes", "foreign git")),
    "odd": ODD,
}


@pytest.mark.parametrize("change", CHANGES)
def test_backends_agree_on_the_patch(image, layer, change):
    if probe("bwrap"):
        pytest.skip("; ".join(probe("bwrap")))
    patch = patch_of(image, CHANGES[change])
    assert patch.files or change == "odd"
    assert patch == patch_of(str(layer), CHANGES[change], kind="bwrap")


def test_an_untouched_or_unreadable_tree_has_no_text(image):
    async def work(sandbox):
        before = await sandbox.extract_patch()
        await sandbox.exec("chmod 0 .")
        after = await sandbox.extract_patch()
        await sandbox.exec("chmod 755 /testbed; rm -rf /testbed/* /testbed/.git", cwd="/")
        return before, after, await sandbox.extract_patch()

    before, after, emptied = inside(image, work)
    assert (before.text, before.files, before.dropped, before.lossy) == ("", (), (), False)
    assert (after.text, after.lossy) == ("", True)
    assert emptied.files == ("calc.py", "link", "pkg/data.txt", "run.sh")


def test_git_obeys_nothing_that_the_agent_wrote(image):
    hostile = """
printf '#!/bin/sh\\ntouch /testbed/MARK /tmp/MARK\\ncat' > /testbed/evil.sh; chmod +x /testbed/evil.sh
for key in core.fsmonitor diff.external core.pager filter.evil.clean filter.evil.process diff.evil.textconv; do
    git config $key /testbed/evil.sh; git config --global $key /testbed/evil.sh
done
git config filter.evil.required true
printf '* filter=evil diff=evil\\n' > .gitattributes
cp evil.sh .git/hooks/post-index-change
rm -f MARK /tmp/MARK; echo x >> calc.py
"""

    async def work(sandbox):
        assert (await sandbox.exec(hostile)).exit_code == 0
        patch = await sandbox.extract_patch()
        return patch, (await sandbox.exec("ls MARK /tmp/MARK")).exit_code

    patch, listed = inside(image, work)
    assert patch.files == (".gitattributes", "calc.py", "evil.sh")
    assert "+x\n" in patch.text
    assert listed != 0


def test_an_image_without_a_commit_is_not_the_agents_fault(docker_host, tmp_path):
    git(tmp_path, "init", "-q")
    with pytest.raises(SandboxError, match="image's own git"):
        patch_of(engine.image_of(tmp_path), "true")
    assert gone(ours)


def test_a_work_directory_that_does_not_fit_is_said(image):
    here, spec = backend.engine(), SandboxSpec(image, limits=SMALL)
    known = here.image(spec)
    seed = here.seed(known, spec)
    settings = backend._settings(
        spec, known, seed, {spec.workdir: 4096}, 60, hosts=here._file_of_hosts(known), fill=spec.workdir
    )
    with pytest.raises(SandboxError, match=r"cannot be copied: tar: (.|\n)*No space left"):
        here._start(settings, 60, seed.tar)
    assert gone(ours)


def test_many_at_once_from_two_threads(image):
    async def one(number):
        async with open_sandbox(SandboxSpec(image, limits=SMALL), backend="docker") as sandbox:
            await sandbox.write("mine", str(number).encode())
            done = await sandbox.exec("cat mine; echo more >> calc.py")
            return done.output == str(number).encode()

    async def four(first):
        return await asyncio.gather(*(one(first + n) for n in range(4)))

    async def both():
        return await asyncio.gather(*(asyncio.to_thread(asyncio.run, four(first)) for first in (0, 4)))

    assert asyncio.run(both()) == [[True] * 4] * 2
    assert gone(ours)
    assert threading.active_count() < 300
