"""One contract over every backend of this machine, the limits and walls of bubblewrap, and the patch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cluster
import engine
import pytest

from entropo_ray import config
from entropo_ray.sandbox import (
    BackendDown,
    ExecResult,
    ImageMissing,
    Limits,
    SandboxError,
    SandboxLost,
    SandboxSpec,
    bwrap,
    cgroup,
    limits,
    open_sandbox,
    output,
    probe,
    reap,
    seccomp,
)
from entropo_ray.sandbox.attached import CHUNK
from entropo_ray.sandbox.kernel import swapped
from entropo_ray.sandbox.line import Line

SMALL = Limits(memory_mb=192, pids=48, disk_mb=24, exec_s=20, life_s=120)
# every file with its kind, mode and content
LISTING = "find . -path ./.git -prune -o \\( -type f -o -type l \\) -printf '%p %y %m %l\\n' | sort; "
LISTING += "find . -path ./.git -prune -o -type f -print0 | sort -z | xargs -0 sha256sum"


@functools.cache
def trouble() -> str:
    """Why bubblewrap cannot be tested here; "" if it can."""
    lesser = ("control group", "system call filter")
    return "; ".join(sentence for sentence in probe("bwrap") if not any(word in sentence for word in lesser))


def needs_bwrap() -> None:
    if trouble():
        pytest.skip(trouble())


def needs_groups() -> None:
    needs_bwrap()
    if probe("bwrap"):
        pytest.skip("; ".join(probe("bwrap")))


@pytest.fixture(
    params=[
        "bwrap",
        "plain",
        pytest.param("docker", marks=pytest.mark.docker),
        "stand-in",
        pytest.param("kubernetes", marks=pytest.mark.kubernetes),
    ]
)
def backend(request):
    """Its name. Of Kubernetes twice: over a server made for tests, and over a cluster where there is one."""
    needs = {"docker": "docker_host", "stand-in": "kubernetes_server", "kubernetes": "kubernetes_cluster"}
    if request.param == "bwrap":
        needs_bwrap()
    if request.param in needs:
        request.getfixturevalue(needs[request.param])
    return request.param.replace("stand-in", "kubernetes")


def git(directory: Path, *words: str, stdin: bytes | None = None) -> bytes:
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "core.autocrlf=false")
    done = subprocess.run(["git", *identity, *words], cwd=directory, check=True, capture_output=True, input=stdin)
    return done.stdout


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """A repository layer, shared by all tests because no sandbox writes to it."""
    layer = tmp_path_factory.mktemp("image") / "layer"
    make_layer(layer)
    before = subprocess.run(["bash", "-c", LISTING], cwd=layer, capture_output=True).stdout
    yield str(layer)
    assert subprocess.run(["bash", "-c", LISTING], cwd=layer, capture_output=True).stdout == before


def make_layer(layer: Path) -> None:
    """The repository of these tests."""
    (layer / "pkg").mkdir(parents=True)
    (layer / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    (layer / "test_calc.py").write_text("from calc import add\n\n\ndef test_add():\n    assert add(2, 2) == 4\n")
    (layer / "pkg/data.txt").write_text("one\ntwo\nthree\n")
    (layer / ".gitignore").write_text("*.log\n__pycache__/\n")
    (layer / "run.sh").write_text("echo hi\n")
    (layer / "link").symlink_to("calc.py")
    git(layer, "init", "-q", "-b", "main")
    git(layer, "add", "-A")
    git(layer, "commit", "-qm", "base")


@pytest.fixture
def own_image(image, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(image, tmp_path / "layer", symlinks=True)
    return str(tmp_path / "layer")


def inside(image, work, *, backend="bwrap", limits=SMALL, **spec):
    """What `work(sandbox)` returns in a sandbox of its own (docker, kubernetes: on an image of the same content)."""
    if backend == "docker":
        image = engine.image_of(image)
    if backend == "kubernetes":
        image = cluster.image_of(image)

    async def whole():
        async with open_sandbox(SandboxSpec(image, limits=limits, **spec), backend=backend) as sandbox:
            return await work(sandbox)

    return asyncio.run(whole())


def run(image, cmd, *, backend="bwrap", limits=SMALL, **how) -> ExecResult:
    return inside(image, lambda sandbox: sandbox.exec(cmd, **how), backend=backend, limits=limits)


# --- the contract, over every backend ---------------------------------------------------------------------------------


def test_a_string_is_a_shell_command_and_a_sequence_is_not(backend, image):
    assert run(image, "echo $((1 + 1)) | cat", backend=backend).output == b"2\n"
    assert run(image, ["echo", "$((1 + 1)) | cat"], backend=backend).output == b"$((1 + 1)) | cat\n"


def test_a_failing_command_is_a_result(backend, image):
    assert run(image, "echo out; echo err >&2; exit 3", backend=backend).exit_code == 3
    assert run(image, "kill -SEGV $$", backend=backend).exit_code == 128 + signal.SIGSEGV
    assert run(image, "no-such-program", backend=backend).exit_code == 127
    assert run(image, ["no-such-program"], backend=backend).exit_code != 0
    assert run(image, "true", backend=backend, cwd="no/such/directory").exit_code != 0


def test_stdout_and_stderr_come_merged_in_order_and_as_bytes(backend, image):
    done = run(image, r"printf 'a\n'; printf 'b\xff\x00\r\n' >&2; printf c", backend=backend)
    assert done.output == b"a\nb\xff\x00\r\nc"
    assert done.total_bytes == len(done.output)
    assert not done.truncated


def test_a_site_is_importable_behind_the_runner_and_only_where_it_is_asked_for(backend, image, tmp_path):
    (tmp_path / "theirs.py").write_text("x = 5\n")
    (tmp_path / "pytest").mkdir()
    program = "import pytest, theirs; print(theirs.x, hasattr(pytest, 'main'))"

    def work(sandbox):
        return sandbox.exec(["python", "-P", "-c", program])

    if backend in ("docker", "kubernetes"):
        with pytest.raises(ImageMissing, match="brings its packages itself"):
            inside(image, work, backend=backend, site=str(tmp_path))
        return
    done = inside(image, work, backend=backend, site=str(tmp_path))
    assert (done.exit_code, done.output) == (0, b"5 True\n")
    assert inside(image, work, backend=backend).exit_code == 1
    with pytest.raises(ImageMissing, match="no such directory of packages"):
        inside(image, work, backend=backend, site=str(tmp_path / "none"))


def test_commands_stand_alone(backend, image):
    async def work(sandbox):
        await sandbox.exec("cd /testbed/pkg; export COLOUR=red; umask 0")
        return await sandbox.exec("pwd; echo ${COLOUR-none}")

    assert inside(image, work, backend=backend).output == b"/testbed\nnone\n"


def test_a_command_starts_with_no_signal_ignored_or_blocked(backend, image):
    """As from a terminal: a writer to a closed pipe ends quietly, and programs that catch SIGINT get it."""
    done = run(image, "grep -E 'SigBlk|SigIgn' /proc/self/status | cut -f2; yes | head -n 1", backend=backend)
    blocked, ignored, said = done.output.decode().split()
    own = 0b11 << 31  # 32 and 33 are the C library's, which lets no program set them and ignores them in what it spawns
    assert (int(blocked, 16), int(ignored, 16) & ~own, said) == (0, 0, "y")


def test_stdin_cwd_and_env_reach_the_command(backend, image):
    done = run(image, "cat; pwd; echo $COLOUR", backend=backend, stdin=b"\x00in\n", cwd="pkg", env={"COLOUR": "red"})
    assert done.output == b"\x00in\n/testbed/pkg\nred\n"
    assert run(image, "cat", backend=backend).output == b""


def test_a_command_past_its_time_leaves_what_it_printed(backend, image):
    done = run(image, "echo early; trap '' TERM INT HUP; sleep 60; echo late", backend=backend, timeout=0.5)
    assert (done.exit_code, done.timed_out, done.output) == (None, True, b"early\n")
    assert 0.4 < done.seconds < 10


def test_output_keeps_the_first_and_last_half(backend, image):
    done = run(image, "echo first; seq 100000; echo last", backend=backend, output_bytes=200)
    assert done.truncated
    assert done.total_bytes == len(b"first\nlast\n") + sum(len(f"{n}\n") for n in range(1, 100001))
    assert done.output.startswith(b"first\n1\n")
    assert done.output.endswith(b"100000\nlast\n")
    head, _, tail = done.output.partition(f"\n[… {done.total_bytes - 200} bytes cut …]\n".encode())
    assert (len(head), len(tail)) == (100, 100)


def test_files_are_read_and_written_as_bytes(backend, image):
    async def work(sandbox):
        await sandbox.write("new/deep/file.bin", b"\x00\xff\r\n")
        await sandbox.write("/testbed/calc.py", b"x = 1\n")
        await sandbox.write("run.sh", b"#!/bin/sh\necho ran\n", mode=0o755)
        listing = await sandbox.exec("./run.sh; cat calc.py; wc -c < new/deep/file.bin; echo more >> new/deep/file.bin")
        return listing.output, await sandbox.read("new/deep/file.bin"), await sandbox.read("/testbed/link")

    assert inside(image, work, backend=backend) == (b"ran\nx = 1\n4\n", b"\x00\xff\r\nmore\n", b"x = 1\n")
    assert Path(image, "calc.py").read_text().startswith("def add")


def test_only_regular_files_within_the_limit_are_read(backend, image):
    async def work(sandbox):
        await sandbox.exec("mkfifo pipe; head -c 2000 /dev/zero > big; ln -s loop loop")
        assert len(await sandbox.read("big", 2000)) == 2000
        with pytest.raises(ValueError, match="2000 bytes"):
            await sandbox.read("big", 1999)
        with pytest.raises(FileNotFoundError):
            await sandbox.read("missing")
        for path in ("pipe", "pkg", "calc.py/below"):
            with pytest.raises(OSError):  # noqa: PT011 (which one differs)
                await sandbox.read(path)
        with pytest.raises((OSError, RuntimeError)):
            await sandbox.read("loop")

    inside(image, work, backend=backend)


def test_reset_brings_the_image_back(backend, image):
    async def work(sandbox):
        await sandbox.exec("rm -rf * .git; touch junk ~/junk; mkdir -p a/b; chmod 0 a")
        await sandbox.reset()
        left = await sandbox.exec("git status --porcelain; ls -A ~; ls; git log --oneline | wc -l")
        return left.output, await sandbox.extract_patch()

    listing, patch = inside(image, work, backend=backend)
    assert listing == b"calc.py\nlink\npkg\nrun.sh\ntest_calc.py\n1\n"
    assert (patch.text, patch.files, patch.dropped, patch.lossy) == ("", (), (), False)


def test_tests_run_inside(backend, image):
    async def work(sandbox):
        before = await sandbox.exec("python -m pytest -q")
        await sandbox.write("calc.py", b"def add(a, b):\n    return a + b\n")
        return before, await sandbox.exec(["python", "-m", "pytest", "-q"])

    before, after = inside(image, work, backend=backend)
    assert before.exit_code == 1
    assert b"assert 0 == 4" in before.output
    assert after.exit_code == 0


def test_a_missing_layer_is_not_a_failed_command(backend, tmp_path):
    with pytest.raises(ImageMissing, match="no such repository layer"):
        run(str(tmp_path), "true", backend=backend)


def test_closing_twice_is_quiet_and_using_it_afterwards_is_not(backend, image):
    async def work(sandbox):
        await sandbox.close()
        await sandbox.close()
        with pytest.raises(SandboxLost):
            await sandbox.exec("true")

    inside(image, work, backend=backend)


def test_no_configuration_names_the_backend_without_walls():
    with pytest.raises(ValueError, match=r"rollout\.sandbox\.backend"):
        config.load(config.Run, ["rollout.sandbox.backend=plain", "model=m", "run_dir=d"])
    assert probe("plain")
    with pytest.raises(ValueError, match="unknown"):
        open_sandbox(SandboxSpec("x"), backend="chroot")


def test_limits_come_from_the_configuration():
    got = limits(config.Sandbox(memory_mb=5, pids=6, cpu=0.5, disk_mb=7, output_kb=8, life_s=9), exec_s=1.5)
    assert got == Limits(memory_mb=5, pids=6, cpu=0.5, disk_mb=7, exec_s=1.5, life_s=9, output_bytes=8192)
    assert limits(config.Sandbox(), exec_s=1, life_s=2).life_s == 2


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("step", [1, 3, 50, 1000])
def test_a_capture_never_depends_on_the_pieces(budget, step):
    data = bytes(range(256)) * 3
    capture = output.Capture(budget)
    for start in range(0, len(data), step):
        capture.feed(data[start : start + step])
    head, tail = budget - budget // 2, budget // 2
    assert capture.truncated
    assert (
        capture.text() == data[:head] + f"\n[… {len(data) - budget} bytes cut …]\n".encode() + data[len(data) - tail :]
    )


class Supervised:
    """Our end of a line, and the other one, played by the test."""

    def __init__(self):
        mine, self.theirs = socket.socketpair()
        self.theirs.settimeout(0.5)
        self.line = Line(mine)
        self.heard, self.cut = bytearray(), threading.Event()

    def run(self, source=b"", words=("true",), env=None):
        return self.line.run(words, env or {}, source, self.heard.extend, self.cut)

    def say(self, *words, step=1 << 20):
        whole = b"".join(b"\1\0\0\0" + len(word).to_bytes(4, "big") + word for word in words)
        for start in range(0, len(whole), step):
            self.theirs.sendall(whole[start : start + step])
            if step < len(whole):  # or it would be too many for the socket
                self.line.turn(0)

    def told(self):
        """What was sent."""
        for _ in range(8):
            self.line.turn(0)
        return self.theirs.recv(1 << 20)


@pytest.fixture
def other():
    made = Supervised()
    with made.theirs:
        yield made


@pytest.mark.parametrize("step", [1, 3, 8, 1000])
def test_output_never_depends_on_how_frames_arrive(other, step):
    command = other.run(b"given", ["echo", "x"], {"K": "v"})
    assert other.told() == b"run 1 11 1\nK=v\0echo\0x\0give 1 6\n\ngivengive 1 0\n"
    out = b"out 1 5\n+one\nout 1 7\n\1\0\nout "
    other.say(out[:3], out[3:10], b"", out[10:], b"out 1 500\n" + b"x" * 500, b"end 1 7\n", step=step)
    assert command.ended(5, start_s=5)
    assert command.code == 7
    assert bytes(other.heard) == b"one\n\1\0\nout " + b"x" * 500


def test_input_goes_piece_by_piece_as_it_is_taken(other):
    command = other.run(bytes(CHUNK) + b"rest")
    heard, whole = bytearray(), b"run 1 5 0\ntrue\0give 1 %d\n\n" % (CHUNK + 1) + bytes(CHUNK)
    while len(heard) < len(whole):
        heard += other.told()
    assert heard == whole
    with pytest.raises(TimeoutError):
        other.told()
    other.say(b"more 1\n")
    assert other.told() == b"give 1 4\nrestgive 1 0\n"
    other.say(b"more 1\n", b"end 1 0\n")
    assert command.ended(5, start_s=5)


def test_a_command_that_never_began_has_no_output(other):
    command = other.run()
    other.say(b"fail 1 Resource temporarily unavailable\n")
    assert command.ended(5, start_s=5)
    assert (command.began, command.complaint, other.heard) == (0.0, b"Resource temporarily unavailable", b"")
    with pytest.raises(TimeoutError, match="did not begin"):
        other.run().ended(5, start_s=0.05)


def test_what_an_earlier_command_still_says_is_not_a_later_ones(other):
    other.run().close()
    command = other.run()
    other.say(b"out 1 6\n+early", b"end 1 0\n", b"out 2 5\n+late", b"end 2 3\n")
    assert command.ended(5, start_s=5)
    assert (command.code, other.heard) == (3, b"late")


def test_an_answer_comes_between_a_commands_words(other):
    """Of a question that is asked while the command runs."""
    command, said = other.run(), bytearray()
    question = other.line.ask("w", b"tree", said.extend, threading.Event())
    assert other.told().endswith(b"settle w\ntree")
    other.say(b"out 1 2\n+o", b"tar: odd\n", b"+\nfree 1 2\nsettled w\n", b"out 1 1\nn", b"end 1 137\n")
    assert command.ended(5, start_s=5)
    assert (command.code, other.heard) == (137, b"on")
    assert (question.complaint, said) == (b"tar: odd\n", b"\nfree 1 2\nsettled w\n")


def test_waiting_ends_with_the_time_or_when_it_is_cut(other):
    command = other.run()
    other.say(b"out 1 6\n+early")
    assert not command.ended(0.05, start_s=5)
    begin = time.monotonic()
    other.cut.set()
    assert not command.ended(60, start_s=5)
    assert time.monotonic() - begin < 5
    assert other.heard == b"early"


@pytest.mark.parametrize("who", ["us", "them"])
def test_waiting_ends_with_the_line(other, who):
    command = other.run()
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(command.ended, 60, start_s=60)
        other.line.hang_up() if who == "us" else other.theirs.close()
        assert ended.result(10)
    assert command.code is None
    assert other.run().ended(60, start_s=60)


# --- walls ------------------------------------------------------------------------------------------------------------


def test_there_is_no_network(image):
    needs_bwrap()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        done = run(image, ["python", "-c", code])
    assert b"ConnectionRefusedError" in done.output
    assert b"gaierror" in run(image, ["python", "-c", "import socket; socket.getaddrinfo('example.org', 80)"]).output
    assert run(image, "tail -n +3 /proc/net/dev | grep -vc lo:").output == b"0\n"


def test_files_and_processes_of_the_host_are_not_there(image, tmp_path):
    needs_bwrap()
    secret = tmp_path / "secret"
    secret.write_text("swordfish")
    paths = [str(secret), image, str(Path(__file__).parent), "/etc/shadow", "/etc/hostname", f"/proc/{os.getpid()}"]
    for path in paths:
        done = run(image, ["ls", path])
        assert done.exit_code != 0, done.output
    assert b"ModuleNotFoundError" in run(image, ["python", "-c", "import omegaconf"]).output
    assert run(image, "grep -rs swordfish / --include=secret").output == b""


def test_the_agent_has_no_rights_and_no_descriptors_of_ours(image):
    needs_bwrap()
    done = run(image, "id -u; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status | cut -f2; sleep 1 & ls /proc/$!/fd")
    assert done.output.decode().split() == ["10001", "0" * 16, "0" * 16, "1", "0", "1", "2"]
    for word in (
        "mount -t tmpfs x /tmp",
        "unshare -U true",
        "unshare -n true",
        "mknod /tmp/d b 8 0",
        "touch /usr/x /x",
    ):
        assert run(image, word).exit_code != 0, word
    assert (
        b"layer" not in run(image, "cat /proc/1/cmdline /proc/self/mountinfo | tr '\\0' ' ' | grep -v upperdir").output
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a file that only root may read")
def test_the_agent_is_nobody_on_the_host(own_image):
    needs_bwrap()
    hidden = Path(own_image, "hidden")
    hidden.write_text("swordfish")
    os.chown(hidden, 4242, 4242)
    hidden.chmod(0o600)

    async def work(sandbox):
        with pytest.raises(PermissionError):
            await sandbox.read("hidden")
        return await sandbox.exec("cat hidden")

    assert b"Permission denied" in inside(own_image, work).output


def test_no_link_leads_out(image, tmp_path):
    needs_bwrap()
    outside = tmp_path / "outside"
    outside.write_text("host")

    async def work(sandbox):
        await sandbox.exec(
            f"ln -s {outside} abs; ln -s ../../../../../..{outside} rel; ln -s {tmp_path} dir; ln -s / root"
        )
        await sandbox.exec("ln -s /proc/self/root/etc/passwd magic; echo tmp > /tmp/t; ln -s /tmp/t within")
        for path in ("abs", "rel", "dir/outside", "root/etc/shadow", "magic", "../" * 12 + str(outside)):
            with pytest.raises(OSError):  # noqa: PT011 (which one differs)
                await sandbox.read(path)
        for path in ("abs", "rel", "/usr/evil", "/etc/passwd", "/evil"):
            with contextlib.suppress(OSError):
                await sandbox.write(path, b"agent")
        assert await sandbox.read("within") == b"tmp\n"
        return (await sandbox.read("root/etc/passwd")).decode()

    assert "agent:x:10001" in inside(image, work)
    assert outside.read_text() == "host"
    assert not Path("/usr/evil").exists()
    assert not Path("/evil").exists()


# --- attacks, over every backend with walls ---------------------------------------------------------------------------


@pytest.fixture(params=["bwrap", pytest.param("docker", marks=pytest.mark.docker)])
def walled(request):
    if request.param == "bwrap":
        needs_groups()
    else:
        request.getfixturevalue("docker_host")
    return request.param


INSIDE = "set -- /proc/[0-9]*; echo $#"
LIFE = {"exit_code": 0, "timed_out": False, "oom": False, "disk_full": False, "truncated": False}
ENDED = LIFE | {"exit_code": None, "timed_out": True}
ATTACKS = {
    "fork bomb": ("bomb() { bomb | bomb; }; bomb 2>/dev/null", ENDED),
    "10 GB of bytes": ("head -c 10G /dev/zero > /tmp/fill || exit 1", LIFE | {"exit_code": 1, "disk_full": True}),
    "10 GB of nothing": ("truncate -s 10G /tmp/sparse", LIFE | {"exit_code": 128 + signal.SIGXFSZ}),
    "memory": ("exec python -c 'bytearray(1 << 30)'", LIFE | {"exit_code": 137, "oom": True}),
    "endless print": ("yes", ENDED | {"truncated": True}),
    "setsid daemon": ("setsid bash -c \"trap '' TERM HUP INT; sleep 977\" >/dev/null 2>&1 </dev/null &", LIFE),
    "stubborn daemon": ("trap '' TERM HUP INT; setsid sleep 977 & sleep 977", ENDED),
    "link to a secret": ("ln -s /etc/shadow shadow; cat shadow", LIFE | {"exit_code": 1}),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_contained_and_has_a_named_result(walled, image, attack):
    """Threats 12 to 14 and 17."""
    command, expected = ATTACKS[attack]

    async def work(sandbox):
        before = await sandbox.exec(INSIDE)
        done = await sandbox.exec(command, timeout=1.5 if expected["timed_out"] else 15)
        after = await sandbox.exec(INSIDE)
        with pytest.raises(OSError):  # noqa: PT011 (there is none, or it is not to be read)
            await sandbox.read("shadow")
        return done, before.output, after.output

    done, before, after = inside(image, work, backend=walled)
    assert {name: getattr(done, name) for name in expected} == expected, done
    assert len(done.output) < SMALL.output_bytes + 100
    assert before == after


BUSY = """
import os, time
end = time.monotonic() + 2
children = [os.fork() for _ in range(2)]
while time.monotonic() < end:
    pass
if all(children):
    for child in children:
        os.waitpid(child, 0)
    print(sum(os.times()[:4]))
"""


def test_processors_are_limited(walled, image):
    """Threat 12: four processes that do nothing but compute get the time that one fifth of a processor has."""
    limits = dataclasses.replace(SMALL, cpu=0.2)
    done = inside(image, lambda sandbox: sandbox.exec(["python", "-c", BUSY]), backend=walled, limits=limits)
    assert 0 < float(done.output) < 0.2 * done.seconds + 0.1


def test_a_limit_that_cannot_be_had_is_an_error():
    """Where no controller can be written."""
    groups = cgroup.Groups("", "", unified=False)
    cgroup.Group(groups, "box", memory_mb=10, pids=10)
    with pytest.raises(OSError, match=r"set rollout\.sandbox\.cpu=0"):
        cgroup.Group(groups, "box", memory_mb=10, pids=10, cpu=1.0)


def test_files_without_end_are_a_full_disk(walled, image):
    """Threat 12: as many names as there may be, in one directory."""
    many = "import os\nfor n in range(10**6): os.close(os.open(f'/tmp/{n}', os.O_CREAT))"

    async def work(sandbox):
        done = await sandbox.exec(["python", "-c", many])
        return done, await sandbox.exec("find /tmp -type f -delete; echo x > /tmp/one && echo alive")

    limits = dataclasses.replace(SMALL, memory_mb=1024, disk_mb=512, exec_s=60)
    done, after = inside(image, work, backend=walled, limits=limits)
    assert b"No space left" in done.output
    assert (done.exit_code, done.disk_full, done.oom) == (1, True, False)
    assert (after.output, after.disk_full) == (b"alive\n", False)


def test_a_hundred_megabytes_of_changes_are_dropped_and_said(walled, image):
    """Threat 20; and little of it is ever in our own memory."""
    many = "for n in $(seq 33); do yes these are words | head -c 3M > part$n; done; head -c 5M /dev/zero > whole"

    async def work(sandbox):
        assert (await sandbox.exec(many)).exit_code == 0
        tracemalloc.start()
        try:
            patch = await sandbox.extract_patch()
            return patch, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    limits = dataclasses.replace(SMALL, memory_mb=1024, disk_mb=256, exec_s=60)
    patch, most = inside(image, work, backend=walled, limits=limits)
    assert (patch.text, patch.files, patch.lossy) == ("", (), True)
    assert patch.dropped == tuple(sorted([*(f"part{n}" for n in range(1, 34)), "whole"]))
    assert most < 32 << 20


BYTES = {
    "binary": ("head -c 3000 /dev/urandom > noise", "GIT binary patch"),
    "crlf": ("printf 'one\\r\\ntwo\\r\\n' > pkg/data.txt", "+two\r\n"),
    "no last newline": ("printf 'one\\ntwo' > pkg/data.txt", "\\ No newline at end of file"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_a_patch_keeps_every_byte(walled, image, tmp_path, kind):
    """Threats 15, 20 and 21: as text that is JSON, and back."""
    command, words = BYTES[kind]

    async def work(sandbox):
        await sandbox.exec(command)
        tree = await sandbox.exec("sha256sum $(git ls-files -o -m -- ':!link')")
        return await sandbox.extract_patch(), tree.output

    patch, tree = inside(image, work, backend=walled)
    assert (patch.dropped, patch.lossy) == ((), False)
    assert words in patch.text
    copy = tmp_path / "copy"
    shutil.copytree(image, copy, symlinks=True)
    git(copy, "apply", "--whitespace=nowarn", "-", stdin=json.loads(json.dumps(patch.text)).encode())
    assert subprocess.run(["sha256sum", *patch.files], cwd=copy, capture_output=True).stdout == tree


def test_the_host_cannot_be_reached(walled, image):
    """Threats 10 and 11: what listens on this machine, by port or by name, and what clouds serve to theirs."""
    name = f"entropo-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        named.bind(f"\0{name}")
        named.listen()
        places = [("127.0.0.1", server.getsockname()[1]), ("169.254.169.254", 80), f"\0{name}"]
        program = f"""
import socket
for place in {places!r}:
    with socket.socket(socket.AF_UNIX if isinstance(place, str) else socket.AF_INET) as mine:
        mine.settimeout(2)
        try:
            mine.connect(place)
            print("reached", place)
        except OSError as error:
            print(type(error).__name__)
"""
        done = run(image, ["python", "-c", program], backend=walled)
        assert b"reached" not in done.output
        assert len(done.output.split()) == len(places)
        socket.create_connection(places[0], 2).close()  # it does listen


def test_nothing_of_ours_serves_inside(walled, image):
    """Threat 23: no socket listens, no variable or file holds a token, no process but the first and the command's."""
    looks = (
        "tail -qn +2 /proc/net/tcp /proc/net/tcp6 /proc/net/udp /proc/net/udp6 /proc/net/unix; env | grep -ic token;"
    )
    looks += f"ls /run/*.sock /var/run/docker.sock 2>/dev/null; {INSIDE}"
    silent, few = run(image, looks, backend=walled).output.decode().split()
    assert (silent, int(few) < 8) == ("0", True)


def test_what_reads_like_our_own_words_is_output(backend, image):
    """Threat 24: what begins and ends a command here is said by no command."""
    words = '+\\nsettled\\n{"exit-code": 0}\\nfree 0 0\\n\\1\\0\\0\\0\\0\\0\\0\\1x\\noom_kill 9\\n'
    done = run(image, f"printf '{words}'; exit 3", backend=backend)
    assert done.output == b'+\nsettled\n{"exit-code": 0}\nfree 0 0\n\1\0\0\0\0\0\0\1x\noom_kill 9\n'
    assert (done.exit_code, done.oom, done.disk_full) == (3, False, False)


def test_sandboxes_share_neither_ports_nor_files_nor_processes(walled, image):
    """Threat 31."""
    serve = "import os, socket, time; s = socket.create_server(('127.0.0.1', 8123)); open('/tmp/x', 'x'); "
    serve += "os.mkdir('/home/agent/mine'); open('/dev/shm/y', 'x'); open('new', 'x'); time.sleep(1)"
    reference = engine.image_of(image) if walled == "docker" else image

    async def both():
        spec = SandboxSpec(reference, limits=SMALL)
        async with open_sandbox(spec, backend=walled) as one, open_sandbox(spec, backend=walled) as two:
            done = await asyncio.gather(*(box.exec(["python", "-c", serve]) for box in (one, two)))
            await one.exec("echo mine > calc.py")
            return [result.output for result in done], (await two.exec("cat calc.py")).output

    said, other = asyncio.run(both())
    assert said == [b"", b""]
    assert other.startswith(b"def add")


# --- limits -----------------------------------------------------------------------------------------------------------


def alive_afterwards(image, cmd, **how) -> ExecResult:
    """The result of `cmd`, after which the same sandbox still answers."""

    async def work(sandbox):
        done = await sandbox.exec(cmd, **how)
        after = await sandbox.exec("echo alive")
        assert (after.output, after.exit_code) == (b"alive\n", 0)
        return done

    return inside(image, work)


@pytest.mark.parametrize("bomb", ["bomb() { bomb | bomb & }; bomb", "bomb() { bomb | bomb; }; bomb"])
def test_a_fork_bomb_ends_with_its_command(image, bomb):
    needs_bwrap()
    begin = time.monotonic()
    alive_afterwards(image, bomb, timeout=0.7)
    assert time.monotonic() - begin < 10


FORKS = """
import os, time
made = 0
try:
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(9)
            os._exit(0)
        made += 1
except BlockingIOError:
    print(made)
"""


def test_processes_are_limited(image):
    needs_bwrap()
    assert 10 < int(alive_afterwards(image, ["python", "-c", FORKS]).output) < SMALL.pids


def test_a_process_counts_no_longer_than_it_lives(image):
    """Neither the commands of a sandbox one after another, nor the processes of one command, add up."""
    needs_groups()

    async def work(sandbox):
        for number in range(60):
            done = await sandbox.exec(["true"])
            assert done.exit_code == 0, (number, done)
        (group,) = (path for path in groups_of(bwrap.client().pid) if path.parents[1] == Path(cgroup.find().pids))
        assert (group / "pids.current").read_text() == "0\n"
        return await sandbox.exec("for i in $(seq 300); do /bin/true || exit 1; done; echo all")

    assert inside(image, work, limits=dataclasses.replace(SMALL, pids=16)).output == b"all\n"


def test_a_memory_hog_is_killed_and_said_so(image):
    needs_groups()
    done = alive_afterwards(image, ["python", "-c", "x = bytearray(1 << 30); print(len(x))"])
    assert (done.exit_code, done.oom, done.timed_out) == (137, True, False)
    assert not run(image, "true").oom


def test_a_hog_that_hides_behind_another_exit_code_is_seen(image):
    needs_groups()
    assert alive_afterwards(image, "python -c 'bytearray(1 << 30)'; exit 0").oom


@pytest.mark.parametrize("place", ["/testbed", "/tmp", "/home/agent", "/dev/shm"])
def test_a_full_disk_is_a_result(image, place):
    needs_bwrap()
    done = alive_afterwards(image, f"head -c 100M /dev/zero > {place}/fill; stat -c %s {place}/fill")
    assert done.disk_full
    assert 1 << 20 < int(done.output.split()[-1]) <= SMALL.disk_mb << 20


def test_a_sparse_file_is_stopped(image):
    needs_bwrap()
    assert alive_afterwards(image, "truncate -s 10G sparse").exit_code != 0


def test_writing_past_the_disk_is_an_os_error(image):
    needs_bwrap()

    async def work(sandbox):
        with pytest.raises(OSError, match="No space left"):
            await sandbox.write("fill", bytes(SMALL.disk_mb + 1 << 20))
        return (await sandbox.exec("rm fill && echo ok > fill && cat fill")).output

    assert inside(image, work) == b"ok\n"


def test_endless_output_is_drained_and_cut(image):
    needs_bwrap()
    done = alive_afterwards(image, "yes", timeout=0.5)
    assert done.timed_out
    assert done.truncated
    assert done.total_bytes > SMALL.output_bytes
    assert len(done.output) < SMALL.output_bytes + 100
    assert alive_afterwards(image, "head -c 300M /dev/zero").total_bytes == 300 << 20


def processes_with(word: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and word.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("ending", ["exit 0", "sleep 60"])
def test_nothing_survives_the_end_of_a_command(image, ending):
    needs_bwrap()
    mark = f"987{os.getpid()}"

    async def work(sandbox):
        daemon = f"setsid nohup bash -c \"trap '' TERM HUP; sleep {mark}\" >/dev/null 2>&1 </dev/null &"
        done = await sandbox.exec(f"{daemon} sleep 0.2; pgrep -c sleep; {ending}", timeout=1)
        return done, processes_with(mark)

    done, left = inside(image, work)
    assert int(done.output) >= 1
    assert left == []


def test_killing_everything_inside_hurts_only_the_command(image):
    needs_bwrap()
    assert alive_afterwards(image, "sleep 60 & (kill -9 -1); echo never").exit_code == 137
    assert alive_afterwards(image, "kill -9 1; echo still").output == b"still\n"


def test_words_that_no_program_can_take_are_failed_commands(image):
    needs_bwrap()
    for word in ("echo a\0b", "echo \ud800", "echo " + "x" * 3_000_000):
        assert alive_afterwards(image, word).exit_code == 126, word[:20]
    assert run(image, "wc -c", stdin=b"x" * 3_000_000).output == b"3000000\n"


def test_a_locked_working_directory_is_the_commands_failure(image):
    needs_bwrap()

    async def work(sandbox):
        await sandbox.exec("chmod 0 /testbed")
        return await sandbox.exec("true"), await sandbox.exec("chmod 755 /testbed; ls /testbed", cwd="/tmp")

    locked, opened = inside(image, work)
    assert locked.exit_code == 126
    assert b"Permission denied" in locked.output
    assert b"calc.py" in opened.output


def test_a_sandbox_ends_with_its_life(image):
    needs_bwrap()

    async def work(sandbox):
        begin = time.monotonic()
        with pytest.raises(SandboxLost):
            await sandbox.exec("sleep 60")
        with pytest.raises(SandboxLost, match="life is over"):
            await sandbox.exec("true")
        return time.monotonic() - begin

    assert 0.4 < inside(image, work, limits=Limits(life_s=0.5)) < 10


def test_a_cancelled_command_dies(image):
    needs_bwrap()
    mark = f"986{os.getpid()}"

    async def work(sandbox):
        task = asyncio.create_task(sandbox.exec(f"sleep {mark}"))
        assert await asyncio.to_thread(gone, lambda: not processes_with(f"sleep\0{mark}"))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        after = await sandbox.exec("echo next")
        return after.output, processes_with(mark)

    assert inside(image, work) == (b"next\n", [])


def test_one_command_at_a_time(image):
    needs_bwrap()

    async def work(sandbox):
        word = "test ! -e busy && touch busy && sleep 0.05 && rm busy"
        return [done.exit_code for done in await asyncio.gather(*(sandbox.exec(word) for _ in range(4)))]

    assert inside(image, work) == [0, 0, 0, 0]


# --- many, and the end of their owner ---------------------------------------------------------------------------------


def test_twenty_sandboxes_at_once_from_two_threads(image):
    needs_bwrap()

    async def one(number):
        async with open_sandbox(SandboxSpec(image, limits=SMALL)) as sandbox:
            await sandbox.write("mine", str(number).encode())
            done = await sandbox.exec("sleep 0.1; cat mine; echo more >> calc.py")
            patch = await sandbox.extract_patch()
            return done.output == str(number).encode() and patch.files == ("calc.py", "mine")

    async def ten(first):
        return await asyncio.gather(*(one(first + n) for n in range(10)))

    async def both():
        return await asyncio.gather(*(asyncio.to_thread(asyncio.run, ten(first)) for first in (0, 10)))

    assert asyncio.run(both()) == [[True] * 10] * 2
    assert groups_of(bwrap.client().pid) == []


def test_a_thread_that_ends_takes_no_sandbox_with_it(image):
    needs_bwrap()
    bwrap.client().stop()  # so that the thread below starts a new launcher

    async def first():
        async with open_sandbox(SandboxSpec(image)) as sandbox:
            return (await sandbox.exec("echo one")).output

    async def both():
        before = await asyncio.to_thread(asyncio.run, first())
        await asyncio.sleep(0.1)
        return before, await first()

    assert asyncio.run(both()) == (b"one\n", b"one\n")


def test_a_dead_launcher_is_a_lost_sandbox_and_the_next_one_works(image):
    needs_bwrap()
    mark = f"985{os.getpid()}"

    async def work(sandbox):
        task = asyncio.create_task(sandbox.exec(f"sleep {mark}"))
        await asyncio.sleep(0.3)
        os.kill(bwrap.client().pid, signal.SIGKILL)
        with pytest.raises(SandboxLost):
            await task
        with pytest.raises(SandboxError):
            await sandbox.exec("true")

    inside(image, work)
    assert run(image, "echo again").output == b"again\n"
    assert gone(lambda: processes_with(mark))
    reap()
    assert all(
        cgroup.alive(path.name) for root in cgroup.find().roots for path in Path(root).iterdir() if path.is_dir()
    )


def groups_of(launcher: int) -> list[Path]:
    """Control groups of the sandboxes of one launcher."""
    owners = [Path(root, cgroup.label(launcher)) for root in cgroup.find().roots]
    return [path for owner in owners if owner.is_dir() for path in owner.iterdir() if path.is_dir()]


def mounts() -> list[str]:
    """What is mounted here, but for Docker engines, which may be at work beside us."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if not any(word in line for word in ("/overlay2/", "/run/"))]


def gone(what, patience_s=10.0) -> bool:
    """True once `what()` is false or empty."""
    deadline = time.monotonic() + patience_s
    while what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not what()


OWNER = """
import asyncio, sys
from entropo_ray.sandbox import SandboxSpec, bwrap, open_sandbox

async def main():
    async with open_sandbox(SandboxSpec(sys.argv[1])) as one, open_sandbox(SandboxSpec(sys.argv[1])) as two:
        print(bwrap.client().pid, flush=True)
        await asyncio.gather(*(box.exec(f"setsid sleep {sys.argv[2]}; sleep 60") for box in (one, two)))

asyncio.run(main())
"""


def test_a_killed_owner_leaves_nothing(image):
    needs_bwrap()
    mark = f"984{os.getpid()}"
    before = mounts()
    with subprocess.Popen([sys.executable, "-c", OWNER, image, mark], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        launcher = int(owner.stdout.readline())
        name = cgroup.label(launcher)
        assert gone(lambda: len(processes_with(f"sleep\0{mark}")) < 2)
        owner.kill()
    assert gone(lambda: processes_with(mark))
    assert gone(lambda: cgroup.alive(name))
    assert [root for root in cgroup.find().roots if Path(root, name).exists()] == []
    assert mounts() == before


def test_reaping_touches_only_the_dead(image):
    needs_groups()
    groups = cgroup.find()
    with subprocess.Popen(["sleep", "60"]) as process:
        dead = cgroup.label(process.pid)
        process.kill()
    foreign = f"1-{dead.partition('-')[2]}"  # of another pid namespace: not ours to judge
    for name in (dead, foreign):
        cgroup.claim(groups, name)
        cgroup.Group(groups, f"{name}/0", memory_mb=10, pids=10)

    def left(name):
        return [root for root in groups.roots if Path(root, name).exists()]

    async def work(sandbox):
        assert reap() >= 1
        assert (left(dead), left(foreign)) == ([], groups.roots)
        return (await sandbox.exec("echo alive")).output

    try:
        assert inside(image, work) == b"alive\n"
    finally:
        cgroup.remove_owner(groups, foreign)


def test_launchers_that_begin_and_end_together_leave_each_other_their_groups(tmp_path):
    """On plain directories: an owner's claim holds while others remove the parent whenever it looks empty."""
    groups = cgroup.Groups(str(tmp_path / "entropo"), "", unified=False)

    def lives(owner):
        for _ in range(2000):
            cgroup.claim(groups, owner)
            Path(groups.memory, owner).rmdir()
            cgroup.leave(groups)

    with ThreadPoolExecutor(4) as pool:
        for ended in [pool.submit(lives, f"owner-{i}") for i in range(4)]:
            ended.result()
    assert not Path(groups.memory).exists()


@pytest.mark.parametrize("unified", [False, True])
def test_limits_are_written_in_the_words_of_each_version(tmp_path, unified):
    """On plain directories: which file gets which word, not that a kernel takes it (only version 1 runs here)."""
    roots = [tmp_path] * 3 if unified else [tmp_path / name for name in ("memory", "pids", "cpu")]
    memory, pids, cpu = map(str, roots)
    groups = cgroup.Groups(memory, pids, unified=unified, cpu=cpu)
    cgroup.claim(groups, "owner")
    cgroup.Group(groups, "owner/box", memory_mb=3, pids=7, cpu=1.5)
    written = {path.name: path.read_text() for path in tmp_path.rglob("box/*")}
    if unified:
        assert written == {"memory.max": "3145728", "memory.swap.max": "0", "pids.max": "7", "cpu.max": "150000 100000"}
        assert all((path / "cgroup.subtree_control").exists() for path in (tmp_path, tmp_path / "owner"))
    else:
        limits = {"memory.limit_in_bytes": "3145728", "memory.memsw.limit_in_bytes": "3145728", "pids.max": "7"}
        assert written == limits | {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "150000"}


def test_a_missing_bubblewrap_is_named(image, monkeypatch, tmp_path):
    monkeypatch.setattr(bwrap, "_clients", [])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert len(probe("bwrap")) == 1
    assert "apt-get install bubblewrap" in probe("bwrap")[0]
    with pytest.raises(BackendDown, match="bubblewrap"):
        run(image, "true")


def test_a_bubblewrap_that_cannot_start_is_no_failed_command(image, monkeypatch, tmp_path):
    needs_bwrap()
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho no namespaces >&2\nexit 1\n")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(bwrap, "_clients", [])
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    try:
        with pytest.raises(SandboxError, match="did not start"):
            run(image, "true")
        assert "sandboxes do not start here" in probe("bwrap")[0]
    finally:
        for client in bwrap._clients:
            client.stop()


ASK = """
import ctypes, json, sys
call = ctypes.CDLL(None, use_errno=True).syscall
def number(*words):
    ctypes.set_errno(0)
    return ctypes.get_errno() if call(*(ctypes.c_long(w) for w in words)) < 0 else 0
print(json.dumps({name: number(nr, -1, -1, -1, -1, -1, -1) for name, nr in json.loads(sys.argv[1]).items()}))
print(json.dumps([number(*words) for words in json.loads(sys.argv[2])]))
"""


def test_the_filter_closes_its_calls_and_leaves_threads_and_processes_alone(image):
    """With arguments for which the kernel without a filter has mostly other complaints, or none (personality)."""
    needs_bwrap()
    clone, ioctl, clone3, newuser, tiocsti = 56, 16, 435, 0x10000000, 0x5412
    if platform.machine() != "x86_64":
        clone, ioctl = 220, 29
    others = [(clone, newuser), (ioctl, 0, tiocsti), (ioctl, 0, tiocsti | 1 << 32), (clone3, 0, 0), (ioctl, 99, 0)]
    calls = seccomp.denied()
    result = run(image, ["python", "-c", ASK, json.dumps(calls), json.dumps(others)])
    first, second = result.output.decode().splitlines()
    assert json.loads(first) == dict.fromkeys(calls, errno.EPERM)
    assert json.loads(second) == [errno.EPERM, errno.EPERM, errno.EPERM, errno.ENOSYS, errno.EBADF]

    both = "import threading, subprocess; t = threading.Thread(target=lambda: subprocess.run(['true'], check=True)); "
    result = run(image, ["python", "-c", both + "t.start(); t.join(); print(open('/proc/self/status').read())"])
    assert b"Seccomp:\t2" in result.output


def test_a_filter_is_for_the_architectures_that_it_knows():
    """One struct sock_filter an instruction, jumps stay inside."""
    for machine in ("x86_64", "aarch64"):
        steps = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
        for place, (code, yes, no, _) in enumerate(steps):
            assert code & 7 != 5 or place + 1 + max(yes, no) < len(steps)
        assert len(steps) < 4096
    assert seccomp.program("riscv64") == b""


ORDINARY = """
import asyncio, json, sys
sys.argv, forks_code = sys.argv[:2], sys.argv[2]
from entropo_ray.sandbox import Limits, SandboxSpec, open_sandbox, probe


async def main():
    limits = Limits(pids=40, disk_mb=8, memory_mb=512)
    async with open_sandbox(SandboxSpec(sys.argv[1], limits=limits)) as box:
        await box.exec("echo x >> calc.py; mkdir sub; git commit -qam mine")
        await box.write("sub/new", b"y")
        full = await box.exec("head -c 9M /dev/zero > fill; rm fill; head -c 9M /dev/zero > /tmp/fill; rm -f sub/none")
        late = await box.exec("setsid sleep 60 & sleep 60", timeout=0.3)
        forks = await box.exec(["python", "-c", forks_code])
        who = await box.exec("id -u; ls / | tr '\\n' ' '; unshare -U true && echo nested")
        patch = await box.extract_patch()
        await box.reset()
        after = await box.exec("git status --porcelain; cat calc.py")
    facts = [full.disk_full, late.timed_out, forks.output.decode(), who.output.decode().split()[0]]
    print(json.dumps([*facts, b"nested" in who.output, patch.files, after.output.decode()]))

asyncio.run(main())
"""


def as_ordinary_user() -> tuple[list[str], dict[str, str]]:
    """Words and variables that run Python code as nobody, with this project importable."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for python in (sys.executable, "/usr/bin/python3"):
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-c"]
        code = "import os, sys; from entropo_ray.sandbox import bwrap; bwrap._runner(); os.listdir(sys.base_prefix)"
        code += "; sys.exit(not os.access(sys.executable, os.X_OK))"
        if not subprocess.run([*words, code], env=env, capture_output=True, cwd="/").returncode:
            return words, env
    pytest.skip("no interpreter here that an ordinary user can run, or this project is not theirs to read")


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to become an ordinary user (as one, every test here shows it)"
)
def test_an_ordinary_user_gets_sandboxes_too(image):
    needs_bwrap()
    become, env = as_ordinary_user()
    with tempfile.TemporaryDirectory() as directory:
        layer = Path(directory, "layer")
        shutil.copytree(image, layer, symlinks=True)
        for path in (layer.parent, layer, *layer.rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)
        done = subprocess.run([*become, ORDINARY, str(layer), FORKS], env=env, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    full, late, forks, who, nested, files, after = json.loads(done.stdout)
    assert (full, late, who, nested) == (True, True, "10001", False)
    assert 10 < int(forks) < 40
    assert files == ["calc.py", "sub/new"]
    assert after == "def add(a, b):\n    return a - b\n"


@pytest.mark.parametrize("pair", [(0, 10001), (10001, 0), (7, 7), (10000, 10001), (20000, 10001)])
def test_swapped_ids_are_a_permutation(pair):
    ranges = [tuple(map(int, line.split())) for line in swapped(*pair).splitlines()]
    assert sum(count for _, _, count in ranges) == 2**32 - 1
    ends = sorted((inner, inner + count) for inner, _, count in ranges)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ends))
    images = {at: next(out + at - first for first, out, n in ranges if first <= at < first + n) for at in pair}
    assert images == {pair[0]: pair[1], pair[1]: pair[0]}


# --- the patch --------------------------------------------------------------------------------------------------------

MATRIX = {
    "edited": "sed -i s/-/+/ calc.py",
    "new": "mkdir new; echo x > new/file.py; touch new/empty",
    "deleted": "rm calc.py pkg/data.txt",
    "renamed": "git mv calc.py sum.py",
    "mode": "chmod +x run.sh",
    "link": "ln -sf pkg/data.txt link; ln -s nowhere dangling",
    "type": "rm link; echo file > link; rm run.sh; ln -s calc.py run.sh",
    "staged": "echo x > a; git add a; echo y >> a",
    "committed": "echo x > a; git add a; git commit -qm mine; rm calc.py; git commit -qam more",
    "detached": "git checkout -q --detach; echo x > a; git add a; git commit -qm mine; git branch -D main",
    "stashed-index": "echo x >> calc.py; git update-index --assume-unchanged calc.py",
    "binary": "head -c 5000 /dev/urandom > noise; printf 'a\\0b' > nul",
    "latin-1": "printf 'caf\\xe9\\n' >> pkg/data.txt; printf '\\xff\\xfe' > 'odd *?[name] \"q\".txt'",
    "crlf": "printf 'a\\r\\nb\\r\\n' > dos.txt; printf 'one\\r\\ntwo\\nthree' > pkg/data.txt",
    "no last newline": "printf 'def add(a, b):\\n    return a + b' > calc.py",
    "odd names": "echo x > 'sp ace'; echo y > $'new\\nline'; echo z > ünï; echo w > '-dash'; echo v > 'tab\tq\"'",
    "attributes": "printf '* text eol=crlf\\n*.py -diff filter=evil\\n' > .gitattributes; printf 'x\\r\\n' > calc.py",
    "diff text": "printf 'diff --git a/x b/x\\n--- a/x\\n+++ b/x\\n' > looks.txt",
    "no git": "rm -rf .git; echo x >> calc.py",
    "foreign git": "rm -rf .git; git init -q; git add -A; git commit -qm all; echo x >> calc.py",
}


@pytest.mark.parametrize("change", MATRIX)
def test_a_patch_carries_the_whole_change(image, tmp_path, change):
    """Applied to a pristine copy, it gives the agent's tree to the byte."""
    needs_bwrap()

    async def work(sandbox):
        made = await sandbox.exec(MATRIX[change])
        assert made.exit_code == 0, made.output
        return await sandbox.extract_patch(), (await sandbox.exec(LISTING, output_bytes=1 << 20)).output

    patch, tree = inside(image, work)
    assert (patch.dropped, patch.lossy) == ((), False)
    assert patch.files
    copy = tmp_path / "copy"
    shutil.copytree(image, copy, symlinks=True)
    git(copy, "apply", "--whitespace=nowarn", "-", stdin=patch.text.encode())
    assert subprocess.run(["bash", "-c", LISTING], cwd=copy, capture_output=True).stdout == tree


def test_backends_agree_on_the_patch(image):
    needs_bwrap()
    cmd = "; ".join(MATRIX[name] for name in ("edited", "new", "latin-1", "odd names")) + "; echo x > a.log"

    async def work(sandbox):
        await sandbox.exec(cmd)
        return await sandbox.extract_patch()

    assert inside(image, work) == inside(image, work, backend="plain")


def patch_of(image, cmd, **how):
    async def work(sandbox):
        done = await sandbox.exec(cmd)
        assert done.exit_code == 0, done.output
        return await sandbox.extract_patch()

    return inside(image, work, **how)


def test_an_untouched_tree_has_no_patch(image):
    needs_bwrap()
    patch = patch_of(image, "touch calc.py; git status; python -m pytest -q -p no:cacheprovider; true")
    assert (patch.text, patch.files, patch.dropped, patch.lossy) == ("", (), (), False)


def test_caches_are_no_part_of_a_patch(image):
    needs_bwrap()
    patch = patch_of(
        image, "python -m pytest -q; PYTHONDONTWRITEBYTECODE= python -c 'import calc'; touch a.pyc; ls __pycache__"
    )
    assert (patch.text, patch.files, patch.lossy) == ("", (), False)
    assert "a.pyc" in patch.dropped


@pytest.mark.parametrize(
    ("cmd", "dropped"),
    [
        ("git init -q nested; echo x > nested/f", "nested"),
        ("git init -q nested; cd nested; echo x > f; git add f; git commit -qm x", "nested"),
        ("echo x > debug.log", "debug.log"),
        ("head -c 5M /dev/urandom > blob", "blob"),
        ("echo x > closed; chmod 0 closed", "closed"),
        ("seq 2000000 | head -c 9000000 | split -b 3000000; rm -f calc.py", "xaa"),
    ],
)
def test_what_a_patch_cannot_carry_is_said(image, cmd, dropped):
    needs_bwrap()
    patch = patch_of(image, cmd)
    assert patch.lossy
    assert dropped in patch.dropped
    assert f"a/{dropped}" not in patch.text


def test_a_rest_is_kept_when_something_is_dropped(image):
    needs_bwrap()
    patch = patch_of(image, "git init -q nested; mkfifo pipe; echo x >> calc.py; echo y > seen; echo z > debug.log")
    assert patch.files == ("calc.py", "seen")


def test_an_unreadable_tree_is_a_lossy_empty_patch(image):
    needs_bwrap()
    patch = patch_of(image, "chmod 0 .")
    assert (patch.text, patch.lossy) == ("", True)


def test_the_hidden_files_of_the_image_are_not_the_agents(own_image):
    needs_bwrap()
    Path(own_image, "build.log").write_text("made with the image")
    assert patch_of(own_image, "echo x > calc.py").dropped == ()
    assert patch_of(own_image, "echo x > build.log").dropped == ("build.log",)


@pytest.mark.parametrize("backend", ["bwrap", "plain"])
def test_git_obeys_nothing_that_the_agent_wrote(image, tmp_path, backend):
    if backend == "bwrap":
        needs_bwrap()
    marker = tmp_path / "marker"
    inner = "/testbed/MARK" if backend == "bwrap" else str(marker)
    hostile = f"""
printf '#!/bin/sh\\ntouch {inner}\\ncat' > /testbed/evil.sh; chmod +x /testbed/evil.sh
for key in core.fsmonitor diff.external core.pager filter.evil.clean filter.evil.smudge filter.evil.process \
    diff.evil.textconv diff.evil.command core.sshCommand core.editor; do
    git config $key /testbed/evil.sh; git config --global $key /testbed/evil.sh
done
git config filter.evil.required true
printf '* filter=evil diff=evil\\n' > .gitattributes
for hook in post-index-change pre-commit post-checkout; do cp evil.sh .git/hooks/$hook; done
rm -f {inner}
echo x >> calc.py
"""

    async def work(sandbox):
        done = await sandbox.exec(hostile)
        assert done.exit_code == 0, done.output
        patch = await sandbox.extract_patch()
        return patch, (await sandbox.exec("ls MARK")).exit_code

    patch, listed = inside(image, work, backend=backend)
    assert patch.files == (".gitattributes", "calc.py", "evil.sh")
    assert "+x\n" in patch.text
    assert not marker.exists()
    assert listed != 0


def test_an_image_without_a_commit_is_not_the_agents_fault(tmp_path):
    needs_bwrap()
    git(tmp_path, "init", "-q")
    with pytest.raises(SandboxError, match="image's own git"):
        patch_of(str(tmp_path), "true")
