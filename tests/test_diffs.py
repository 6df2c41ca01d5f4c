"""Laws of diffs as text, held against git: what is read is what git applies, and the way back leads back."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entropo_ray.tasks import diffs

_ENV = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
_FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# line feeds, an end without one, carriage returns and form feeds, and lines that look like parts of a diff
_TEXT = st.lists(
    st.sampled_from(["a", "b", "", "-- x", "++ y", "@@ -1 +1 @@", "diff --git a/x b/x", "c\r", "d\x0c", "\\ z"])
).map("\n".join)


def git(home, *words, data=None):
    text = None if data is None else data.encode()
    done = subprocess.run(["git", *words], cwd=home, env=_ENV, capture_output=True, input=text, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def content(home):
    return {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file() and ".git" not in p.parts}


def fill(home, files):
    for path, text in files.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes(text.encode())


def diff_of(tmp_path, before, after, *options):
    """What git says of two states of a folder."""
    home = Path(tempfile.mkdtemp(dir=tmp_path))
    git(home, "init", "--quiet")
    fill(home, before)
    git(home, "add", "--all", "--force")
    tree = git(home, "write-tree").strip()
    for path in home.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            path.unlink()
    fill(home, after)
    git(home, "add", "--all", "--force")
    return home, git(home, "diff", "--cached", *options, tree)


def applied(tmp_path, files, patch):
    home = Path(tempfile.mkdtemp(dir=tmp_path))
    fill(home, files)
    if patch:
        git(home, "apply", "--whitespace=nowarn", "-", data=patch)
    return content(home)


BEFORE = {
    "kept.py": "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n12\n13\n14\n",
    "gone.py": "x\n",
    "old name.py": "p\nq\nr\ns\nt\n",
    "bare.txt": "no end",
    "ümlaut\t.py": "x\n",
}
AFTER = {
    "kept.py": "1\n2\nthree\n4\n5\n6\n7\n8\n9\n10\n11\n12\n13\n",
    "dir/new.py": "a = 1\n\nb = 2",
    "dir/empty.py": "",
    "new name.py": "p\nq\nR\ns\nt\n",
    "bare.txt": "another end",
    "ümlaut\t.py": "y\n",
}


def test_the_files_of_a_diff_are_those_that_git_changes(tmp_path):
    _, patch = diff_of(tmp_path, BEFORE, AFTER, "--find-renames=40%")
    found = {(change.before, change.after) for change in diffs.changes(patch)}
    assert found == {
        ("kept.py", "kept.py"),
        ("gone.py", None),
        ("old name.py", "new name.py"),
        ("bare.txt", "bare.txt"),
        ("ümlaut\t.py", "ümlaut\t.py"),
        (None, "dir/new.py"),
        (None, "dir/empty.py"),
    }
    assert "".join(change.text for change in diffs.changes(patch)) == patch
    assert set(diffs.paths(patch)) == BEFORE.keys() | AFTER.keys()


def test_new_files_are_read_whole(tmp_path):
    _, patch = diff_of(tmp_path, BEFORE, AFTER, "--no-renames")
    made = {change.after: change.created for change in diffs.changes(patch) if change.created is not None}
    assert made == {path: AFTER[path] for path in ("dir/new.py", "dir/empty.py", "new name.py")}


def test_the_way_back_leads_back(tmp_path):
    _, patch = diff_of(tmp_path, BEFORE, AFTER, "--find-renames=40%")
    assert applied(tmp_path, AFTER, diffs.reverse(patch)) == {path: text.encode() for path, text in BEFORE.items()}
    assert diffs.reverse(diffs.reverse(patch)) == patch


def test_the_way_back_is_the_one_that_git_writes(tmp_path):
    _, patch = diff_of(tmp_path, BEFORE, AFTER, "--no-renames")
    _, theirs = diff_of(tmp_path, AFTER, BEFORE, "--no-renames")
    ours, theirs = (
        # the words after a hunk's numbers are of the old file, wherever it stands
        {re.sub(" @@.*", " @@", "".join(change.hunks)) for change in diffs.changes(text)}
        for text in (diffs.reverse(patch), theirs)
    )
    assert ours == theirs


@_FEW
@given(_TEXT, _TEXT)
def test_any_change_of_a_text_can_be_taken_back(tmp_path, old, new):
    _, patch = diff_of(tmp_path, {"f": old, "g": "same\n"}, {"f": new, "g": "same\n"})
    assert applied(tmp_path, {"f": new}, diffs.reverse(patch))["f"] == old.encode()


@_FEW
@given(st.none() | _TEXT, st.none() | _TEXT)
def test_a_diff_made_of_two_texts_does_what_it_says(tmp_path, old, new):
    before, after = ({} if text is None else {"a b/f.py": text} for text in (old, new))
    patch = diffs.between("a b/f.py", old, new)
    assert applied(tmp_path, before, patch) == {path: text.encode() for path, text in after.items()}
    if old is None and new is not None:
        assert diffs.changes(patch)[0].created == new


def test_modes_links_and_binary_files_are_no_plain_new_files(tmp_path):
    home, _ = diff_of(tmp_path, {"a": "x\n"}, {"a": "x\n"})
    fill(home, {"run.sh": "echo\n", "blob": "x\0y"})
    (home / "run.sh").chmod(0o755)
    (home / "link").symlink_to("a")
    git(home, "add", "--intent-to-add", "--all")
    changes = diffs.changes(git(home, "diff", "--binary"))
    assert {change.after for change in changes} == {"run.sh", "blob", "link"}
    assert [change.created for change in changes] == [None] * 3


def test_a_change_of_mode_is_taken_back(tmp_path):
    home, _ = diff_of(tmp_path, {"a": "x\n"}, {"a": "x\n"})
    (home / "a").chmod(0o755)
    git(home, "apply", "-", data=diffs.reverse(git(home, "diff")))
    assert not (home / "a").stat().st_mode & 0o111


@pytest.mark.parametrize("mark", ["GIT binary patch\nliteral 0\n", "Binary files a/x and b/x differ\n"])
def test_binary_changes_are_not_taken_back_by_guess(mark):
    with pytest.raises(ValueError, match="cannot be taken back as text: 'diff --git a/x b/x'"):
        diffs.reverse(f"diff --git a/x b/x\nindex 1234567..2345678 100644\n{mark}")


def test_text_that_is_no_diff_is_named():
    with pytest.raises(ValueError, match="is no diff of git: it starts with '--- a/x'"):
        diffs.changes("--- a/x\n+++ b/x\n")
    assert diffs.changes("") == diffs.changes("\n\n") == []
