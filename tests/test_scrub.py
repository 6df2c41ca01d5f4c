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


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository whose second commit is the base."""
    home = tmp_path_factory.mktemp("template")
    git(home, "init", "--quiet", "--initial-branch=trunk")
    commit(home, "first", {"pkg/mod.py": "", "tests/test_mod.py": "def test_seen():\n    pass\n"})
    commit(
        home, "base", {"pkg/mod.py": _OLD, ".gitattributes": "tests export-ignore\n", "odd/ä\n.txt": b"\xff\x00\r\n"}
    )
    return home


@pytest.fixture
def repo(template, tmp_path):
    """A copy to plant into."""
    return shutil.copytree(template, tmp_path / "repo", symlinks=True)


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
    fix(repo)
    shutil.copytree(repo / ".git/logs", repo.parent / "logs")
    forget(repo)
    git(repo, "prune", "--expire=now")
    shutil.move(repo.parent / "logs", repo / ".git/logs")  # the object is gone, its name is not


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
    "stash": (stash, {"stash", "foreign_commits", "foreign_objects", "reference", "reflog"}),
    "dangling": (dangling, {"foreign_commits", "foreign_objects", "reference"}),
    "packed": (packed, {"foreign_commits", "foreign_objects", "reference"}),
    "alternates": (borrowed, {"alternates", "foreign_commits", "foreign_objects", "reference"}),
    "reflog": (reflog, {"reflog"}),
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
    assert kinds(scrub.leak_check(repo, patches=[GOLD], **_TESTS)) == expected


@pytest.mark.parametrize("plant", sorted(PLANTED.keys() - {"gold file", "mention"}))
def test_a_scrub_removes_each_planted_leak(repo, plant):
    """The two that are left out are plain files of the checkout, which a scrub keeps."""
    PLANTED[plant][0](repo)
    scrub.scrub(repo, base="trunk")
    assert scrub.leak_check(repo, patches=[GOLD], **_TESTS) == []


def tree_of(repo):
    return git(repo, "rev-parse", "trunk^{tree}")


def test_a_scrubbed_repository_is_one_commit_with_the_same_tree(repo):
    base, tree = git(repo, "rev-parse", "HEAD"), tree_of(repo)
    branch(repo)
    done = scrub.scrub(repo, base=base)
    assert (done.tree, done.replaced) == (tree, base)
    assert git(repo, "rev-parse", "HEAD", "HEAD^{tree}").split() == [done.commit, tree]
    listed = git(repo, "cat-file", "--batch-all-objects", "--batch-check=%(objecttype)").split()
    assert listed.count("commit") == 1
    assert git(repo, "status", "--porcelain") == ""
    assert (repo / "tests/test_mod.py").is_file()  # though the tree's attributes keep tests out of archives
    assert git(repo, "fsck", "--full", "--strict") == ""
    assert not list(repo.glob(".scrub-*"))


def test_the_same_tree_gives_the_same_commit_wherever_it_came_from(repo, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(repo, other, ignore=shutil.ignore_patterns(".git"))
    git(other, "init", "--quiet", "--initial-branch=another")
    commit(other, "quite another message", {})
    assert scrub.scrub(repo).commit == scrub.scrub(other).commit


def test_a_commit_that_stands_for_another_is_not_believed(repo):
    base, tree = git(repo, "rev-parse", "HEAD"), tree_of(repo)
    git(repo, "replace", base, fix(repo))
    assert "extra_refs" in kinds(scrub.leak_check(repo))
    assert scrub.scrub(repo, base=base).tree == tree


def test_scrubbing_twice_changes_nothing(repo):
    first = scrub.scrub(repo)
    second = scrub.scrub(repo)
    assert (second.commit, second.tree, second.replaced) == (first.commit, first.tree, first.commit)


def test_a_checkout_of_a_later_commit_loses_the_files_of_that_commit(repo):
    base = git(repo, "rev-parse", "HEAD")
    commit(repo, "later", {"pkg/mod.py": _NEW, "pkg/late.py": "x = 1\n"})
    put(repo, {"built.so": b"\0", "pkg/__pycache__/mod.cpython-311.pyc": b"\0"})
    scrub.scrub(repo, base=base)
    assert (repo / "pkg/mod.py").read_text() == _OLD
    assert not (repo / "pkg/late.py").exists()
    assert not (repo / "pkg/__pycache__").exists()
    assert (repo / "built.so").exists()  # a build that the tests may need


def test_a_bug_is_put_in_and_its_repair_leaves_no_object(repo):
    bug = diffs.between("pkg/mod.py", _OLD, "def f():\n    return 3\n")
    scrub.scrub(repo, patch=bug)
    assert (repo / "pkg/mod.py").read_text() == "def f():\n    return 3\n"
    assert scrub.leak_check(repo, patches=[diffs.reverse(bug)]) == []


def test_a_patch_that_does_not_apply_is_the_callers_mistake_and_changes_nothing(repo):
    before = git(repo, "rev-parse", "HEAD")
    with pytest.raises(ValueError, match=r"a patch does not apply to [0-9a-f]{40}: error: pkg/mod\.py"):
        scrub.scrub(repo, patch=diffs.between("pkg/mod.py", "other\n", "text\n"))
    assert git(repo, "rev-parse", "HEAD") == before
    assert not list(repo.glob(".scrub-*"))


def test_an_unknown_commit_is_named(repo):
    with pytest.raises(ValueError, match=r"no commit nowhere; give a git repository and a commit of it"):
        scrub.scrub(repo, base="nowhere")


def test_no_repository_is_named(tmp_path):
    with pytest.raises(ValueError, match="not a git repository"):
        scrub.leak_check(tmp_path)


def test_neither_hooks_nor_filters_nor_monitors_of_the_repository_run(repo, tmp_path):
    marker = tmp_path / "ran"
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {marker}\ncat\n")
    trap.chmod(0o755)
    for hook in ("post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc"):
        put(repo, {f".git/hooks/{hook}": f"#!/bin/sh\ntouch {marker}\n"})
        (repo / f".git/hooks/{hook}").chmod(0o755)
    git(repo, "config", "core.fsmonitor", str(trap))
    git(repo, "config", "filter.x.smudge", str(trap))
    git(repo, "config", "filter.x.clean", str(trap))
    git(repo, "config", "diff.external", str(trap))
    put(repo, {".git/info/attributes": "* filter=x\n"})
    armed = shutil.copytree(repo, tmp_path / "armed")
    scrub.leak_check(repo, patches=[GOLD], **_TESTS)
    scrub.scrub(repo)
    scrub.leak_check(repo, patches=[GOLD], **_TESTS)
    assert not marker.exists()
    git(armed, "reset", "--hard")  # without care they do
    assert marker.exists()


def test_a_folder_inside_of_a_repository_is_none_itself(repo):
    with pytest.raises(ValueError, match=r"repo/pkg: fatal: not a git repository: .*give a git repository"):
        scrub.leak_check(repo / "pkg")


def test_a_work_tree_that_the_repository_names_is_not_believed(repo, tmp_path):
    git(repo, "config", "core.worktree", str(tmp_path))
    gold_file(repo)
    assert scrub.leak_check(repo, patches=[GOLD]) == [
        "reference: build/lib/pkg/mod.py is a file of the reference patch"
    ]
    scrub.scrub(repo)
    assert git(repo, "rev-parse", "--show-toplevel") == str(repo)


def test_nothing_outside_of_the_checkout_is_removed(repo, tmp_path):
    """A folder of the old commit is a link by now, to files with names that git knows."""
    outside = tmp_path / "outside"
    put(outside, {"late.py": "precious\n", "__pycache__/test_x.pyc": b"\0"})
    base = git(repo, "rev-parse", "HEAD")
    commit(repo, "later", {"new/late.py": "x = 1\n"})
    shutil.rmtree(repo / "new")
    (repo / "new").symlink_to(outside)
    scrub.scrub(repo, base=base)
    assert (outside / "late.py").read_text() == "precious\n"
    assert (outside / "__pycache__/test_x.pyc").exists()


def test_a_missing_object_is_not_fetched_by_a_command_of_the_repository(repo, tmp_path):
    marker = tmp_path / "ran"
    for key, value in {
        "core.repositoryformatversion": "1",
        "extensions.partialclone": "origin",
        "remote.origin.url": "ssh://example.com/x",
        "remote.origin.promisor": "true",
        "core.sshCommand": f"touch {marker}; false",
    }.items():
        git(repo, "config", key, value)
    blob = git(repo, "rev-parse", "HEAD:pkg/mod.py")
    (repo / ".git/objects" / blob[:2] / blob[2:]).unlink()
    armed = shutil.copytree(repo, tmp_path / "armed", symlinks=True)
    with pytest.raises(RuntimeError, match="failed"):
        scrub.scrub(repo)
    assert not marker.exists()
    subprocess.run(["git", "cat-file", "-p", blob], cwd=armed, env=_ENV, capture_output=True, timeout=60, check=False)
    assert marker.exists()  # without care it runs


def test_a_deadline_says_what_it_waited_for(repo):
    with pytest.raises(RuntimeError, match=r"waited 0 s for the history of .*repo"):
        scrub.leak_check(repo, deadline_s=0)
    with pytest.raises(RuntimeError, match="waited 1 s for git log in x"):
        scrub._finished(["sleep", "60"], 1, what="git log in x")


def test_the_repositories_of_the_local_pack_are_clean(tmp_path):
    mined = local.generate(count=3, held_out=2, ambiguous=0.3, hidden=0.2, seed=5, to=tmp_path)
    for m in mined:
        known = {"hidden": (*m.answer.fail_to_pass, *m.answer.pass_to_pass), "visible": m.task.visible}
        home = Path(m.task.image)
        assert scrub.leak_check(home, patches=(m.answer.patch, *m.answer.alternatives), **known) == []
        put(home, {m.answer.files[0].path: m.answer.files[0].text})
        assert kinds(scrub.leak_check(home, patches=(m.answer.patch,), **known)) == {"mention"}
