"""A Docker engine for tests, one that answers already or a private one for the session, and images of directories.

Nothing is pulled: the base image is a Debian made by debootstrap, kept as a tar in the user's cache directory.

python tests/engine.py COMMAND [WORD ...]     # run it with DOCKER_HOST set; IMAGE becomes a small image's name
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from entropo_ray.sandbox import bwrap, cgroup

PREFIX = "entropo-test"
_START_S, _STOP_S, _BUILD_S, _DEBIAN_S = 60, 20, 120, 400
_RELEASE = "bookworm"
_PACKAGES = ("python3", "git", "patch", "procps")  # the last two: for the official harness
_UNNEEDED = ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale")
_tags: dict[str, str] = {}  # digest of a build context -> image
_no_base: list[str] = []  # why there can be no base image: looked for once


@contextlib.contextmanager
def running() -> Iterator[str]:
    """Address of an engine, in DOCKER_HOST as long as the block lasts. Skips, saying why, where there can be none."""
    docker = pytest.importorskip("docker")
    with contextlib.suppress(docker.errors.DockerException):
        client = docker.from_env(timeout=10)
        client.ping()
        yield client.api.base_url
        _forget()
        return
    if os.geteuid() != 0 or not shutil.which("dockerd"):
        pytest.skip("no Docker engine answers, and starting one needs root and dockerd (make engine)")
    with _own() as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", address)
        yield address
        _tags.clear()


@contextlib.contextmanager
def _own() -> Iterator[str]:
    """A private engine: its data, its state and its socket are gone when the block ends."""
    place = _place()
    _sweep(place)
    name = f"{PREFIX}-{cgroup.label(os.getpid())}"
    data, state = place / name, Path("/run", name)
    words = ["dockerd", "--data-root", str(data), "--exec-root", f"{state}/exec", "-H", f"unix://{state}/socket"]
    words += ["-p", f"{state}/pid", "--storage-driver=overlay2", "--iptables=false", "--bridge=none"]
    state.mkdir()
    try:
        with (state / "log").open("wb") as log:
            # a killed test run takes its engine along
            words = ["setpriv", "--pdeathsig", "TERM", *words]
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            _await(f"unix://{state}/socket", process, state / "log")
            yield f"unix://{state}/socket"
        finally:
            _stop(process, state)
    finally:
        _erase(data, state)


def _place() -> Path:
    """A directory that layers can be stacked in, which is never one that is stacked itself."""
    for place in (Path(tempfile.gettempdir()), Path("/var/lib"), Path.home(), Path("/dev/shm")):
        kind = subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True).stdout.strip()
        if kind and kind not in ("overlayfs", "nfs", "fuseblk") and shutil.disk_usage(place).free > 2 << 30:
            return place
    return pytest.skip("no file system here that a Docker engine can keep its layers on (or no 2 GiB free)")


def _await(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import docker

    deadline = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(docker.errors.DockerException, OSError):
            docker.DockerClient(base_url=address, timeout=10).ping()
            return
        time.sleep(0.1)
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    pytest.skip(f"dockerd does not start here: {last[0] if last else 'no word in its log'}")


def _stop(process: subprocess.Popen[bytes], state: Path) -> None:
    import docker

    with contextlib.suppress(docker.errors.DockerException, OSError):
        client = docker.DockerClient(base_url=f"unix://{state}/socket", timeout=10)
        for container in client.containers.list(all=True, ignore_removed=True):
            with contextlib.suppress(docker.errors.DockerException, OSError):
                container.remove(force=True)
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with contextlib.suppress(OSError, ValueError):  # it outlives a killed dockerd
        os.kill(int((state / "exec/containerd/containerd.pid").read_text()), signal.SIGKILL)


def _erase(data: Path, state: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted(mounts, reverse=True):
        if any(Path(mount).is_relative_to(own) for own in (data, state)):
            subprocess.run(["umount", "-l", mount], check=False)
    for own in (data, state):
        shutil.rmtree(own, ignore_errors=True)


def _sweep(place: Path) -> None:
    """What killed test runs left."""
    for state in Path("/run").glob(f"{PREFIX}-*"):
        if not cgroup.alive(state.name.removeprefix(f"{PREFIX}-")):
            _erase(place / state.name, state)


# Images


def image_of(directory: str | Path, workdir: str = "/testbed", *, outside: str | Path | None = None) -> str:
    """An image of the engine in DOCKER_HOST whose working directory holds what `directory` does.

    What `outside` holds lies in its root.
    """
    import docker

    more = "COPY outside /\n" if outside else ""
    dockerfile = f"FROM {_base()}\n{more}COPY tree {workdir}\nWORKDIR {workdir}\nSTOPSIGNAL SIGKILL\n".encode()
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        archive.add(directory, "tree")
        if outside:
            archive.add(outside, "outside")
        header = tarfile.TarInfo("Dockerfile")
        header.size = len(dockerfile)
        archive.addfile(header, io.BytesIO(dockerfile))
    digest = hashlib.sha256(context.getvalue()).hexdigest()[:16]
    if digest not in _tags:
        context.seek(0)
        client = docker.from_env(timeout=_BUILD_S)
        client.images.build(fileobj=context, custom_context=True, tag=f"{PREFIX}:{digest}", rm=True, forcerm=True)
        _tags[digest] = f"{PREFIX}:{digest}"
    return _tags[digest]


def _base() -> str:
    """Debian's Python with the test runner that runs us: in the engine already, else of the cached Debian."""
    import docker

    client = docker.from_env(timeout=_BUILD_S)
    name = "-".join((_RELEASE, *_PACKAGES))
    reference = f"{PREFIX}-base:{name}-pytest-{pytest.__version__}"
    with contextlib.suppress(docker.errors.ImageNotFound):
        return client.images.get(reference).tags[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "entropo_ray", f"{name}.tar")
    if not cache.is_file():
        try:
            if not _no_base:
                _make_base(cache)
        except pytest.skip.Exception as skipped:
            _no_base.append(str(skipped))
    if _no_base:
        pytest.skip(_no_base[0])
    with tempfile.NamedTemporaryFile(prefix=f"{PREFIX}-") as whole:
        shutil.copyfile(cache, whole.name)
        with tarfile.open(whole.name, "a") as archive:
            for package in map(Path, bwrap._runner()["packages"]):
                archive.add(package, f"./usr/lib/python3/dist-packages/{package.name}", filter=_lasting)
        repository, _, tag = reference.partition(":")
        client.api.import_image(src=whole.name, repository=repository, tag=tag)
    return reference


def _lasting(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry


def _make_base(cache: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("the base image of Docker tests is not there, and making it needs root and debootstrap")
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-", dir=_place()) as directory:
        root = Path(directory, "root")
        words = ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", _RELEASE, str(root)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_DEBIAN_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"debootstrap did not end in {_DEBIAN_S} s")
        if done.returncode:
            pytest.skip(f"debootstrap makes no base image here: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
        for name in _UNNEEDED:
            shutil.rmtree(root / name, ignore_errors=True)
        partial = cache.with_name(f".{cache.name}.{os.getpid()}")
        subprocess.run(["tar", "-C", root, "-cf", partial, "."], check=True, timeout=_DEBIAN_S)
        partial.replace(cache)


def _forget() -> None:
    """Remove the images of this session; the base may stay for the next."""
    import docker

    client = docker.from_env(timeout=_BUILD_S)
    for tag in reversed(_tags.values()):
        with contextlib.suppress(docker.errors.DockerException):
            client.images.remove(tag, force=True)
    _tags.clear()


def _small() -> str:
    """An image of a repository with one file and one test."""
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-") as directory:
        Path(directory, "test_one.py").write_text("def test_one():\n    assert True\n")
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost")
        for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "base"]):
            subprocess.run(["git", *words], cwd=directory, check=True)
        return image_of(directory)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear up
    try:
        with running():
            words = [word.replace("IMAGE", _small()) if "IMAGE" in word else word for word in sys.argv[1:]]
            sys.exit(subprocess.run(words).returncode)
    except pytest.skip.Exception as skipped:
        sys.exit(str(skipped))
