"""The file system of a sandbox: one read-only skeleton per launcher, one mount namespace per sandbox.

    STAGE/root/            what the sandbox sees as /
      usr etc opt          read-only, of the host or generated; opt/site: a directory of packages, if there is one
      testbed              overlay: the image below, box/upper above
      tmp home/agent       directories of the box
    STAGE/box/             private tmpfs of `disk_mb`: upper work tmp home shm
    STAGE/image            the image itself, read-only, for the trusted extraction of the patch

A namespace that only an open descriptor holds vanishes with that descriptor, mounts and all; so nothing is left behind
however a launcher ends, and no tree that an agent wrote is ever walked. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from entropo_ray.sandbox import kernel

AGENT = 10001  # user and group inside
INODES = 200_000
# Exists everywhere, anyone may pass it, nobody keeps a repository below it: covered in our own mount namespace, it
# needs no directory of ours that a killed launcher could leave.
STAGE = "/sys/kernel" if os.path.isdir("/sys/kernel") else "/mnt"  # noqa: PTH112 (a name, not a file to open)
ROOT, BOX, IMAGE = f"{STAGE}/root", f"{STAGE}/box", f"{STAGE}/image"
_NO_DEVICES = kernel.MS_NOSUID | kernel.MS_NODEV
_READ_ONLY = _NO_DEVICES | kernel.MS_RDONLY

_ETC = {
    "passwd": f"root:x:0:0:root:/root:/bin/bash\nagent:x:{AGENT}:{AGENT}:agent:/home/agent:/bin/bash\n",
    "group": f"root:x:0:\nagent:x:{AGENT}:\n",
    "hosts": "127.0.0.1 localhost sandbox\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "gitconfig": "[user]\n\tname = agent\n\temail = agent@localhost\n[safe]\n\tdirectory = *\n",
}
_PYTEST = "#!/opt/runner/bin/python\nimport sys\n\nimport pytest\n\nsys.exit(pytest.main())\n"


@dataclass(frozen=True)
class Runner:
    """The Python that agents get: base interpreter, its home, and the files of the test runner's distributions."""

    prefix: str  # sys.base_prefix
    executable: str
    hidden: Sequence[str]  # directories of the interpreter that hold other packages
    packages: Sequence[str]  # files and directories that become importable


class Stage:
    """The launcher's own mount namespace with the skeleton in it. Must be made once, in a single-threaded process."""

    def __init__(self, runner: Runner) -> None:
        self.privileged = _own_namespace()
        kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_SLAVE)  # see the host's later mounts, show none
        kernel.mount("tmpfs", STAGE, "tmpfs", _NO_DEVICES, "mode=755")
        for name in ("root", "box", "image"):
            Path(STAGE, name).mkdir()
        self._writable = os.open(ROOT, os.O_PATH | os.O_CLOEXEC)
        _furnish(Path(ROOT), runner)
        kernel.bind(ROOT, ROOT, _READ_ONLY)
        self._namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._users: dict[tuple[int, int], int] = {}
        self.copies = ""  # why images are copied instead of overlaid, once that was seen

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """A fresh copy of the launcher's mount namespace inside the block; afterwards back in the launcher's own."""
        kernel.unshare(kernel.CLONE_NEWNS)
        try:
            yield
        finally:
            kernel.setns(self._namespace, kernel.CLONE_NEWNS)

    def mount_point(self, workdir: str) -> None:
        """Make the directory in the skeleton that a sandbox's repository is mounted on."""
        done = Path(ROOT, workdir.lstrip("/"))
        if not done.is_dir():
            parts = Path(workdir.lstrip("/")).parts
            for depth in range(len(parts)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir("/".join(parts[: depth + 1]), 0o755, dir_fd=self._writable)

    def users(self, uid: int, gid: int) -> int:
        """User namespace that shows the files of this owner as the agent's (cached)."""
        if (uid, gid) not in self._users:
            maps = (kernel.swapped(uid, AGENT), kernel.swapped(gid, AGENT))
            self._users[uid, gid] = kernel.user_namespace(*maps)
        return self._users[uid, gid]


class Box:
    """One sandbox's mounts. Holds descriptors only; `close` makes all of it vanish."""

    def __init__(self, stage: Stage, image: str, workdir: str, disk_mb: int, *, site: str = "") -> None:
        stage.mount_point(workdir)
        with stage.apart():
            kernel.mount("tmpfs", BOX, "tmpfs", _NO_DEVICES, f"mode=755,size={disk_mb}m,nr_inodes={INODES}")
            for name, mode in (("upper", 0o755), ("work", 0o755), ("tmp", 0o1777), ("home", 0o755), ("shm", 0o1777)):
                path = Path(BOX, name)
                path.mkdir()
                path.chmod(mode)
                if stage.privileged and name in ("upper", "home"):
                    os.chown(path, AGENT, AGENT)
            _mount_repository(stage, image, f"{ROOT}{workdir}")
            if site:
                _mount_site(stage, site, f"{ROOT}/opt/site")
            kernel.bind(f"{BOX}/tmp", f"{ROOT}/tmp", _NO_DEVICES)
            kernel.bind(f"{BOX}/home", f"{ROOT}/home/agent", _NO_DEVICES)
            self.namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            self.root = os.open(ROOT, os.O_PATH | os.O_CLOEXEC)
            self._disk = os.open(BOX, os.O_RDONLY | os.O_CLOEXEC)

    def full(self) -> bool:
        """True when no block or no inode is free."""
        space = os.fstatvfs(self._disk)
        return space.f_bfree == 0 or space.f_ffree == 0

    def close(self) -> None:
        for fd in (self.namespace, self.root, self._disk):
            os.close(fd)


def _own_namespace() -> bool:
    """Leave the host's mount namespace; True as root, False as an ordinary user (now root of a user namespace)."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        with contextlib.suppress(PermissionError):  # root of a container without CAP_SYS_ADMIN: as an ordinary user
            kernel.unshare(kernel.CLONE_NEWNS)
            return True
    kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    return False


def _furnish(root: Path, runner: Runner) -> None:
    for name in ("usr", "etc", "opt/runner", "proc", "dev", "tmp", "run", "testbed", "home/agent", "var"):
        (root / name).mkdir(parents=True)
    for name in ("image", "site"):
        (root / "opt" / name).mkdir()
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if Path("/", name).exists():
            (root / name).symlink_to(f"usr/{name}")
    (root / "var/tmp").symlink_to("/tmp")
    for name, text in _ETC.items():
        (root / "etc" / name).write_text(text)
    for name in ("ld.so.cache", "mime.types", "localtime"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"/etc/{name}", root / "etc" / name)
    kernel.bind("/usr", f"{root}/usr", _READ_ONLY)
    if Path("/etc/alternatives").is_dir():
        (root / "etc/alternatives").mkdir()
        kernel.bind("/etc/alternatives", f"{root}/etc/alternatives", _READ_ONLY)
    _install(root, runner)


def _install(root: Path, runner: Runner) -> None:
    """The interpreter at its own path, other packages hidden; the runner's packages and commands below /opt/runner."""
    if not Path(runner.prefix).is_relative_to("/usr"):
        (root / runner.prefix.lstrip("/")).mkdir(parents=True)
        kernel.bind(runner.prefix, f"{root}{runner.prefix}", _READ_ONLY)
    nothing = root / "opt/empty"
    nothing.mkdir()
    local = [] if Path(runner.prefix).is_relative_to("/usr/local") else ["/usr/local"]
    for directory in (*runner.hidden, *local):
        if (root / directory.lstrip("/")).is_dir():
            kernel.bind(str(nothing), f"{root}{directory}", _READ_ONLY)
    site, commands = root / "opt/runner/site", root / "opt/runner/bin"
    site.mkdir()
    commands.mkdir()
    for package in map(Path, runner.packages):
        copy = shutil.copytree if package.is_dir() else shutil.copy2
        copy(package, site / package.name)
    version = Path(runner.executable).name
    for name in dict.fromkeys(("python", "python3", version)):
        (commands / name).symlink_to(runner.executable)
    (commands / "pytest").write_text(_PYTEST)
    (commands / "pytest").chmod(0o755)


def _mount_repository(stage: Stage, image: str, target: str) -> None:
    """The image, owned by the agent, at IMAGE (read-only) and, copy-on-write, at `target`."""
    upper, work = f"{BOX}/upper", f"{BOX}/work"
    owner = os.stat(image)  # noqa: PTH116
    try:
        if stage.privileged:
            kernel.bind_idmapped(image, IMAGE, stage.users(owner.st_uid, owner.st_gid))
        elif owner.st_uid == 0:  # inside our user namespace, 0 is the ordinary user
            kernel.bind(image, IMAGE, _READ_ONLY)
        else:
            raise PermissionError(f"{image} belongs to another user")
        extra = "" if stage.privileged else ",userxattr"
        layers = f"lowerdir={IMAGE},upperdir={upper},workdir={work}{extra}"
        kernel.mount("overlay", target, "overlay", _NO_DEVICES, layers)
    except OSError as error:  # no idmapped mounts or no overlay on this file system: the slow way, same result
        stage.copies = str(error)
        _copy_repository(stage, image, target)


def _mount_site(stage: Stage, site: str, target: str) -> None:
    """A directory of packages, read-only; where that can be, as the agent's, whoever may read it outside."""
    owner = os.stat(site)  # noqa: PTH116
    try:
        if stage.privileged:
            kernel.bind_idmapped(site, target, stage.users(owner.st_uid, owner.st_gid))
            return
    except OSError:  # no idmapped mounts on this file system
        pass
    kernel.bind(site, target, _READ_ONLY)


def _copy_repository(stage: Stage, image: str, target: str) -> None:
    """The image copied into the box, for the agent; IMAGE becomes a second copy only the owner of which differs."""
    for directory in ("upper", "pristine"):
        copy = Path(BOX, directory)
        shutil.copytree(image, copy, symlinks=True, dirs_exist_ok=True)
        if stage.privileged:
            os.chown(copy, AGENT, AGENT)
            for path in copy.rglob("*"):
                os.chown(path, AGENT, AGENT, follow_symlinks=False)
    kernel.bind(f"{BOX}/pristine", IMAGE, _READ_ONLY)
    kernel.bind(f"{BOX}/upper", target, _NO_DEVICES)
