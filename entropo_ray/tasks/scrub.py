"""Repositories without a future: a history of one commit with the same tree, and a check that nothing else is left.

A checkout that an agent works in may hold the fix in its history, whether a branch shows it or not. Deleting branches
and tags leaves the objects; a new object store that only the wanted tree was copied into does not.
No configuration, hook or template but git's own defaults has a say, for the repositories are not ours.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PERSON = {"NAME": "Scrub", "EMAIL": "scrub@example.com", "DATE": "2024-01-01T12:00:00+0000"}
_MESSAGE = "Start"
_DEADLINE_S = 600.0
_CACHES = (".pytest_cache", "__pycache__", ".hypothesis", ".mypy_cache", ".tox")
_SETTINGS = (
    "safe.directory=*",
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.logAllRefUpdates=false",
    "core.autocrlf=false",
    "core.fsync=none",
    "gc.auto=0",
)
_GREP_NAMES = 2000  # patterns of one search; more of them cost memory
# files of a git directory that stand for work in progress, and need not be there
_LEFTOVERS = (
    "FETCH_HEAD",
    "MERGE_HEAD",
    "CHERRY_PICK_HEAD",
    "REVERT_HEAD",
    "BISECT_LOG",
    "rebase-merge",
    "rebase-apply",
    "sequencer",
    "worktrees",
    "modules",
    "commondir",
    "shallow",
    "info/grafts",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubbed:
    """What a repository is after its history was dropped."""

    commit: str  # the one commit, the same for the same tree
    tree: str
    replaced: str  # the commit that it stands for; scripts that name it have to be rewritten


# The way in


def scrub(repo: Path, *, base: str = "HEAD", patch: str = "", deadline_s: float = _DEADLINE_S) -> Scrubbed:
    """Give the checkout at `repo` a history of one commit: the tree of `base`, changed by `patch`.

    Tracked files become those of the tree; files that git does not track stay, but for caches of tools and for git
    directories of nested repositories. The new history is made aside and takes the place of the old one by renaming.
    ValueError if `base` is no commit of it or `patch` does not apply to that; RuntimeError if git fails.
    """
    git = _Git(repo, deadline_s)
    replaced = git.commit(base)
    tracked = git.paths("ls-files", "-z")
    with tempfile.TemporaryDirectory(prefix=".scrub-", dir=repo) as aside:
        new = Path(aside, ".git")
        form = git.line("rev-parse", "--show-object-format")
        words = ("--quiet", "--template=", "--initial-branch=main", f"--object-format={form}")
        _Git(Path(aside), git.left()).run("init", *words)
        with _objects_aside(git, aside) as apart:
            tree = _tree(apart, replaced, patch)
            _copy_tree(apart, tree, _Git(repo, git.left(), {"GIT_DIR": str(new)}))
        fresh = _Git(repo, git.left(), {"GIT_DIR": str(new)})
        commit = fresh.line("commit-tree", tree, "-m", _MESSAGE)
        fresh.run("update-ref", "refs/heads/main", commit)
        for path in set(tracked) - set(fresh.paths("ls-tree", "-r", "-z", "--name-only", tree)):
            _remove_inside(repo, os.fsdecode(path))
        fresh.run("read-tree", commit)
        fresh.start("update-index", "-q", "--refresh")  # equal files stay: a build that is newer than they must not age
        fresh.run("reset", "--quiet", "--hard")
        for name in ("logs", "ORIG_HEAD"):
            remove(new / name)
        old = Path(aside, "old")
        (repo / ".git").rename(old)
        new.rename(repo / ".git")
    made = _Git(repo, git.left())
    _tidy(repo, set(made.paths("ls-files", "-z")))
    _check(made, commit, tree)
    return Scrubbed(commit=commit, tree=tree, replaced=replaced)


def _tree(git: _Git, base: str, patch: str) -> str:
    """The tree of a commit after a patch; its objects go where `git` writes."""
    if not patch:
        return git.line("rev-parse", f"{base}^{{tree}}")
    git.run("read-tree", base)
    done = git.start("apply", "--cached", "--whitespace=nowarn", "-", stdin=patch.encode(errors="surrogateescape"))
    if done.returncode:
        raise ValueError(f"{git.repo}: a patch does not apply to {base}: {_last(done.stderr)}")
    return git.line("write-tree")


def _copy_tree(git: _Git, tree: str, to: _Git) -> None:
    """Copy the objects of a tree, and nothing else, from one object store to another."""
    # by objects, not by archive: an archive leaves out what the tree's own attributes ask it to
    objects = git.run("rev-list", "--objects", "--no-object-names", tree)
    with tempfile.TemporaryFile() as names, tempfile.TemporaryFile() as errors:
        names.write(objects)
        names.seek(0)
        packing = subprocess.Popen(
            git.words("pack-objects", "--stdout", "--quiet"),
            stdin=names,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=git.env,
        )
        try:
            to.run("index-pack", "--stdin", stdin=packing.stdout)  # one file: it is copied for every sandbox
            if packing.wait(git.left()):
                errors.seek(0)
                raise RuntimeError(f"git pack-objects in {git.repo} failed: {_last(errors.read())}")
        finally:
            packing.kill()
            packing.wait()


def _tidy(repo: Path, tracked: set[bytes]) -> None:
    """Remove what a run of the tests or a nested repository left, unless the tree itself holds it."""
    folders = {os.fsencode(parent) for path in tracked for parent in Path(os.fsdecode(path)).parents}

    def left_over(path: Path, name: str) -> bool:
        inside = path.relative_to(repo)
        if name in _CACHES:
            return os.fsencode(inside) not in folders and not _is_installed(inside)
        if name == ".git":
            return path.parent != repo
        return _is_test_cache(path, repo) and os.fsencode(inside) not in tracked

    for path, name in list(_walk(repo)):
        if left_over(path, name):
            remove(path)


def _check(git: _Git, commit: str, tree: str) -> None:
    """RuntimeError unless the new history is what it should be."""
    if git.line("rev-parse", "HEAD^{tree}") != tree or git.line("rev-parse", "HEAD") != commit:
        raise RuntimeError(f"{git.repo}: the scrubbed tree is not {tree}")
    if [kind for kind in git.objects().values() if kind == "commit"] != ["commit"]:
        raise RuntimeError(f"{git.repo}: the scrubbed history has more than one commit")


# The check


def leak_check(
    repo: Path,
    *,
    base: str = "HEAD",
    patches: Sequence[str] = (),
    hidden: Iterable[str] = (),
    visible: Iterable[str] = (),
    deadline_s: float = _DEADLINE_S,
) -> list[str]:
    """What the checkout at `repo` says of a task's answer, as `name: what was seen`; none if it is clean.

    `patches` are reference patches of the task, `hidden` its hidden tests and `visible` the tests that the checkout
    has, passing or not. ValueError if `base` is no commit of it; RuntimeError if git fails.
    """
    git = _Git(repo, deadline_s)
    commit = git.commit(base)
    objects = git.objects()
    past = set(git.run("rev-list", commit).decode().split())
    reasons = _objects_of_others(git, commit, past, objects)
    reasons += _connections(git, past)
    reasons += _reference(git, commit, patches, objects)
    reasons += _residue(repo, set(git.paths("ls-files", "-z")))
    return reasons + _mentions(git, {_name(t) for t in hidden} - {_name(t) for t in visible})


def _objects_of_others(git: _Git, commit: str, past: set[str], objects: Mapping[str, str]) -> list[str]:
    """Objects, reachable or not, that the base does not need."""
    reasons = []
    foreign = sorted(key for key, kind in objects.items() if kind == "commit" and key not in past)
    if foreign:
        reasons.append(f"foreign_commits: {len(foreign)} that are no ancestors of the base, first {foreign[0]}")
    needed = set(git.run("rev-list", "--objects", "--no-object-names", commit).decode().split())
    rest = sorted(set(objects) - needed - set(foreign))
    if rest:
        reasons.append(f"foreign_objects: {len(rest)} that the base does not reach, first {objects[rest[0]]} {rest[0]}")
    return reasons


def _connections(git: _Git, past: set[str]) -> list[str]:
    """Ways from this repository to other commits or to other repositories."""
    reasons = []
    home = git.home()
    refs = dict(
        line.split(" ")[::-1]
        for line in git.run("for-each-ref", "--format=%(objectname) %(refname)").decode().splitlines()
    )
    head = git.start("symbolic-ref", "--quiet", "HEAD").stdout.decode().strip()
    if "refs/stash" in refs:
        reasons.append("stash: refs/stash")
    if extra := sorted(set(refs) - {head, "refs/stash"}):
        reasons.append(f"extra_refs: {', '.join(extra[:3])}{' ...' if len(extra) > 3 else ''}")
    config = git.start("config", "--local", "--null", "--get-regexp", r"^(remote|branch|submodule|include|includeif)\.")
    if config.stdout:
        reasons.append(f"remote: {config.stdout.decode(errors='replace').splitlines()[0]}")
    for name in ("alternates", "http-alternates"):
        if (home / "objects/info" / name).exists():
            reasons.append(f"alternates: objects/info/{name}")
    reasons += [f"leftover: {name} in the git directory" for name in _LEFTOVERS if (home / name).exists()]
    if (home / "ORIG_HEAD").is_file() and (home / "ORIG_HEAD").read_text(errors="replace").strip() not in past:
        reasons.append("leftover: ORIG_HEAD is another commit")
    if told := next(_told_by_logs(home, past), None):
        reasons.append(f"reflog: {told}")
    return reasons


def _told_by_logs(home: Path, past: set[str]) -> Iterator[str]:
    """Reflogs that name a commit which is no ancestor of the base."""
    for log in sorted(path for path in (home / "logs").rglob("*") if path.is_file()):
        for line in log.read_text(errors="replace").splitlines():
            for key in line.split(" ")[:2]:
                if key.strip("0") and key not in past:
                    yield f"{log.relative_to(home)} names {key}"


def _reference(git: _Git, commit: str, patches: Sequence[str], objects: Mapping[str, str]) -> list[str]:
    """Files as a reference patch leaves them, among the objects or lying in the checkout."""
    reasons: list[str] = []
    blobs: set[str] = set()
    with tempfile.TemporaryDirectory() as aside, _objects_aside(git, aside) as apart:
        for patch in patches:
            try:
                tree = _tree(apart, commit, patch)
            except ValueError as error:
                reasons.append(f"reference: {error}")
                continue
            changed = apart.run(
                "diff-tree", "-r", "--raw", "--no-abbrev", "--no-renames", "--diff-filter=AM", commit, tree
            )
            blobs |= {line.split(" ")[3] for line in changed.decode(errors="replace").splitlines() if line[0] == ":"}
    blobs -= {line.split()[2] for line in git.run("ls-tree", "-r", commit).decode(errors="replace").splitlines()}
    if known := sorted(blobs & set(objects)):
        reasons.append(f"reference: a file of the reference patch is in the repository, blob {known[0]}")
    if copy := next((p for p in _untracked(git) if blobs and _blob(p, len(commit)) in blobs), None):
        reasons.append(f"reference: {copy.relative_to(git.repo)} is a file of the reference patch")
    return reasons


def _untracked(git: _Git) -> Iterator[Path]:
    """Plain files of the checkout that git does not track, ignored ones among them."""
    for path in git.paths("ls-files", "-o", "-z"):
        full = git.repo / os.fsdecode(path)
        if full.is_file() and not full.is_symlink():
            yield full


def _blob(path: Path, letters: int) -> str:
    """The id that git would give to a file's bytes; ids have `letters` letters."""
    digest = hashlib.sha1() if letters == 40 else hashlib.sha256()
    data = path.read_bytes()
    digest.update(b"blob %d\0" % len(data))
    digest.update(data)
    return digest.hexdigest()


def _residue(repo: Path, tracked: set[bytes]) -> list[str]:
    """What earlier runs of the tests left."""
    reasons = []
    for path, name in _walk(repo):
        if name == ".git" and path.parent != repo:
            reasons.append(f"nested_repository: {path.relative_to(repo)}")
        elif name == ".pytest_cache" or (
            _is_test_cache(path, repo) and os.fsencode(path.relative_to(repo)) not in tracked
        ):
            reasons.append(f"residue: {path.relative_to(repo)}")
    return reasons


def _mentions(git: _Git, names: set[str]) -> list[str]:
    """Files of the checkout, tracked or not, that hold the name of a hidden test as a word."""
    reasons = []
    listed = sorted(name for name in names if name)
    for start in range(0, len(listed), _GREP_NAMES):
        words = ["grep", "-rlwF", "--exclude-dir=.git", "-e", "\n".join(listed[start : start + _GREP_NAMES]), "."]
        done = _finished(words, git.left(), what=f"grep in {git.repo}", cwd=git.repo, env=git.env)
        if done.returncode > 1:
            raise RuntimeError(f"grep in {git.repo} failed: {_last(done.stderr)}")
        reasons += [
            f"mention: {path} names a hidden test" for path in done.stdout.decode(errors="replace").split("\n")[:-1]
        ]
    return reasons


def _name(test: str) -> str:
    """The bare name of a test: without file and class, without parameters, without the module that unittest adds."""
    return test.rpartition("::")[2].partition("[")[0].partition(" (")[0].strip()


def known(repo: Path, tests: Iterable[str], *, deadline_s: float = _DEADLINE_S) -> set[str]:
    """Those of the tests whose names stand in tracked files of the checkout at `repo`, which make no secret of them."""
    found: dict[str, list[str]] = {}
    for test in tests:
        found.setdefault(_name(test), []).append(test)
    found.pop("", None)
    if not found:
        return set()
    done = _Git(repo, deadline_s).start("grep", "-ohwF", "-f", "-", "HEAD", stdin="\n".join(found).encode())
    names = set(done.stdout.decode(errors="replace").splitlines())
    return {test for name in names & set(found) for test in found[name]}


# Files


def _walk(repo: Path) -> Iterator[tuple[Path, str]]:
    """Every file and folder but what the git directory holds; links are not followed."""
    for folder, folders, files in os.walk(repo):
        here = Path(folder)
        yield from ((here / name, name) for name in (*folders, *files))
        folders[:] = [name for name in folders if name != ".git"]


def _is_test_cache(path: Path, repo: Path) -> bool:
    """Compiled tests tell their names and constants. Those of installed libraries are nobody's secret."""
    inside = path.relative_to(repo)
    if path.suffix != ".pyc" or _is_installed(inside):
        return False
    source = path.name.partition(".")[0]
    at_test = source.startswith("test_") or source.endswith(("_test", "_tests")) or source in ("conftest", "tests")
    return at_test or bool({"test", "tests"} & set(inside.parts))


def _is_installed(inside: Path) -> bool:
    return "site-packages" in inside.parts or "node_modules" in inside.parts


def _remove_inside(repo: Path, path: str) -> None:
    """Remove a file of the checkout, unless a folder on the way to it has become a link."""
    if (repo / path).parent.resolve() == repo.resolve() / Path(path).parent:
        remove(repo / path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Git


class _Git:
    """The git of one repository, all calls together within a deadline."""

    def __init__(self, repo: Path, deadline_s: float, more: Mapping[str, str] | None = None) -> None:
        self.repo = repo
        self._deadline_s = deadline_s
        self._end = time.monotonic() + deadline_s
        identity = {f"GIT_{who}_{what}": text for who in ("AUTHOR", "COMMITTER") for what, text in _PERSON.items()}
        alone = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
        # replaced objects would hide what is really there, and a fetch would run commands that the repository names
        safe = {"GIT_NO_REPLACE_OBJECTS": "1", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}
        # else git would look for a repository in the folders above, and a work tree where the repository says
        place = {"GIT_DIR": str(repo.absolute() / ".git"), "GIT_WORK_TREE": str(repo.absolute())}
        path = {"PATH": os.environ.get("PATH", os.defpath)}
        self.env = path | alone | safe | identity | place | dict(more or {})

    def words(self, *words: str) -> list[str]:
        return ["git", "-C", str(self.repo), *(word for setting in _SETTINGS for word in ("-c", setting)), *words]

    def left(self) -> float:
        """Seconds until the deadline. RuntimeError once it has passed."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise RuntimeError(f"waited {self._deadline_s:.0f} s for the history of {self.repo}")
        return left

    def start(self, *words: str, stdin: Any = b"") -> subprocess.CompletedProcess[bytes]:
        """Run git to its end, however it ends."""
        what = f"git {words[0]} in {self.repo}"
        return _finished(self.words(*words), self.left(), what=what, stdin=stdin, env=self.env)

    def run(self, *words: str, stdin: Any = b"") -> bytes:
        """What git prints. RuntimeError with its own words if it fails."""
        done = self.start(*words, stdin=stdin)
        if done.returncode:
            raise RuntimeError(f"git {words[0]} in {self.repo} failed: {_last(done.stderr)}")
        return done.stdout

    def line(self, *words: str) -> str:
        return self.run(*words).decode().strip()

    def paths(self, *words: str) -> list[bytes]:
        """What git prints, split at zero bytes."""
        return [path for path in self.run(*words).split(b"\0") if path]

    def home(self) -> Path:
        return Path(self.line("rev-parse", "--absolute-git-dir"))

    def commit(self, name: str) -> str:
        """The id of a commit by any name. ValueError if there is none."""
        done = self.start("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if done.returncode:
            reason = _last(done.stderr) or f"no commit {name}"
            raise ValueError(f"{self.repo}: {reason}; give a git repository and a commit of it")
        return done.stdout.decode().strip()

    def objects(self) -> dict[str, str]:
        """Id -> kind of every object, reachable or not, packed or loose, borrowed or own."""
        listed = self.run("cat-file", "--batch-all-objects", "--unordered", "--batch-check=%(objectname) %(objecttype)")
        return dict(line.split(" ") for line in listed.decode().splitlines())


@contextmanager
def _objects_aside(git: _Git, folder: str) -> Iterator[_Git]:
    """The same repository for reading; new objects and the index go to a folder."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        Path(scratch, "objects").mkdir()
        apart = {
            "GIT_INDEX_FILE": str(Path(scratch, "index")),
            "GIT_OBJECT_DIRECTORY": str(Path(scratch, "objects")),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": git.line(
                "rev-parse", "--path-format=absolute", "--git-path", "objects"
            ),
        }
        yield _Git(git.repo, git.left(), apart)


def _finished(
    words: Sequence[str], deadline_s: float, *, what: str, stdin: Any = b"", **how: Any
) -> subprocess.CompletedProcess[bytes]:
    """A process at its end, its input bytes or an open file. RuntimeError when the deadline passes."""
    given = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
    try:
        return subprocess.run(words, capture_output=True, timeout=deadline_s, check=False, **given, **how)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"waited {deadline_s:.0f} s for {what}") from error


def _last(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
