"""Laws of a scrubbed history: the same tree, one commit, and every way to the answer that can be planted is found."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from entropo_ray.tasks import diffs, local, scrub

_OLD, _NEW = "def f():\n    return 1\n", "def f():\n    return 2\n"
GOLD = diffs.between("pkg/mod.py", _OLD, _NEW)
_ENV = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
_ENV |= {f"GIT_{who}_{what}": "x@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(repo, *words, data=None):
    done = subprocess.run(["git", *words], cwd=repo, env=_ENV, capture_output=True, input=data, timeout=60, check=True)
    return done.stdout.decode().strip()


def put(repo, files):
    for path, text in files.items():
        target = Path(repo, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text if isinstance(text, bytes) else text.encode())


def commit(repo, message, files):
    put(repo, files)
    git(repo, "add", "--all", "--force")
    git(repo, "commit", "--quiet", "--message", message)
    return git(repo, "rev-parse", "HEAD")


@pytest.fixture
def repo(tmp_path):
    """A repository whose second commit is the base."""
    home = tmp_path / "repo"
    home.mkdir()
    git(home, "init", "--quiet", "--initial-branch=trunk")
    commit(home, "first", {"pkg/mod.py": "", "tests/test_mod.py": "def test_seen():\n    pass\n"})
    commit(home, "base", {"pkg/mod.py": _OLD, ".gitattributes": "tests export-ignore\n", "odd/ä\n.txt": b"\xff\x00\r\n"})
    return home


def fix(repo):
    """A commit with the fix, on a branch that is gone again; its id."""
    git(repo, "checkout", "--quiet", "-b", "future")
    found = commit(repo, "the fix", {"pkg/mod.py": _NEW})
    git(repo, "checkout", "--quiet", "trunk")
    git(repo, "branch", "--quiet", "-D", "future")
    return found


def forget(repo):
    """Drop the reflogs, so that nothing but the planted way is left."""
    shutil.rmtree(repo / ".git/logs")


def branch(repo):
    git(repo, "branch", "solution", fix(repo))
    forget(repo)


def tag(repo):
    git(repo, "tag", "--annotate", "v2", "--message", "x", fix(repo))
    forget(repo)


def stash(repo):
    put(repo, {"pkg/mod.py": _NEW})
    git(repo, "stash", "--quiet")


def dangling(repo):
    fix(repo)
    forget(repo)


def packed(repo):
    git(repo, "branch", "solution", fix(repo))
    git(repo, "repack", "--quiet", "-a", "-d")
    git(repo, "branch", "--quiet", "-D", "solution")
    forget(repo)


def borrowed(repo):
    other = repo.parent / "other"
    git(repo.parent, "clone", "--quiet", str(repo), str(other))
    fix(other)
    (repo / ".git/objects/info/alternates").write_text(f"{other}/.git/objects\n")


def reflog(repo):
    fixed = fix(repo)
    git(repo, "prune", "--expire=now", fixed)  # the object stays named by the log alone


def remote(repo):
    git(repo, "remote", "add", "origin", "https://example.com/x.git")


def fetched(repo):
    (repo / ".git/FETCH_HEAD").write_text("")


def worktree(repo):
    (repo / ".git/worktrees/x").mkdir(parents=True)


def cache(repo):
    put(repo, {".pytest_cache/v/cache/nodeids": "[]"})


def compiled(repo):
    put(repo, {"tests/__pycache__/test_mod.cpython-311.pyc": b"\0"})


def gold_blob(repo):
    git(repo, "hash-object", "-w", "--stdin", data=_NEW.encode())


def gold_file(repo):
    put(repo, {"build/lib/pkg/mod.py": _NEW})


def nested(repo):
    put(repo, {"vendor/.git/HEAD": "ref: refs/heads/main\n"})


def mention(repo):
    put(repo, {"notes.txt": "see test_secret\n"})


def replaced(repo):
    git(repo, "update-ref", "refs/notes/x", "HEAD")


PLANTED = {
    "branch": (branch, {"foreign_commits", "extra_refs", "reference", "foreign_objects"}),
    "tag": (tag, {"foreign_commits", "extra_refs", "reference", "foreign_objects"}),
    "stash": (stash, {"stash", "foreign_commits", "foreign_objects", "reference", "reflog", "leftover"}),
    "dangling": (dangling, {"foreign_commits", "foreign_objects", "reference"}),
    "packed": (packed, {"foreign_commits", "foreign_objects", "reference"}),
    "alternates": (borrowed, {"alternates", "foreign_commits", "foreign_objects", "reference"}),
    "reflog": (reflog, {"reflog", "foreign_commits", "foreign_objects", "reference"}),
    "remote": (remote, {"remote"}),
    "fetched": (fetched, {"leftover"}),
    "worktree": (worktree, {"leftover"}),
    "pytest cache": (cache, {"residue"}),
    "compiled test": (compiled, {"residue"}),
    "gold blob": (gold_blob, {"foreign_objects", "reference"}),
    "gold file": (gold_file, {"reference"}),
    "nested": (nested, {"nested_repository"}),
    "mention": (mention, {"mention"}),
    "another ref": (replaced, {"extra_refs"}),
}
_TESTS = {"hidden": ["tests/test_mod.py::TestIt::test_secret[1]"], "visible": ["tests/test_mod.py::test_seen"]}


def kinds(reasons):
    return {reason.partition(":")[0] for reason in reasons}


def test_a_plain_history_is_clean(repo):
    assert scrub.leak_check(repo, patches=[GOLD], **_TESTS) == []


@pytest.mark.parametrize("plant", PLANTED)
def test_each_planted_leak_is_found_and_named(repo, plant):
    do, expected = PLANTED[plant]
    do(repo)
    found = kinds(scrub.leak_check(repo, patches=[GOLD], **_TESTS))
    assert found
    assert found <= expected
    assert {"branch": "extra_refs", "pytest cache": "residue"}.get(plant, next(iter(found))) in found
