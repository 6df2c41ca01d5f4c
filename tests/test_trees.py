"""Laws of curating that need no engine: trees as they were, pauses that end, journals that survive, honest rulings."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import tarfile
import time
from types import SimpleNamespace

import pytest
from test_rows import SWEBENCH, SWEGYM, as_jsonl

from entropo_ray import config, curate, grade, ingest
from entropo_ray.records import Grade, Verdict
from entropo_ray.sandbox import ImageMissing, SandboxError
from entropo_ray.tasks import local, pack, rows, scrub, trees


def archive(*entries):
    """A tar of (name, kind or bytes, settings)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as tar:
        for name, what, settings in entries:
            entry = tarfile.TarInfo(name)
            is_kind = what in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
            data = b"" if is_kind else what
            entry.type = what if is_kind else tarfile.REGTYPE
            entry.size = len(data)
            for key, value in settings.items():
                setattr(entry, key, value)
            tar.addfile(entry, io.BytesIO(data))
    file.seek(0)
    return file


TREE = (
    ("./", tarfile.DIRTYPE, {"mode": 0o755, "uid": 7, "gid": 8}),
    ("./closed/", tarfile.DIRTYPE, {"mode": 0o500, "uid": 9}),
    ("./closed/run", b"echo\n", {"mode": 0o4555, "uid": 9, "mtime": 1000}),
    ("./secret", b"x", {"mode": 0o040, "uid": 7, "mtime": 2000}),
    ("./same", tarfile.LNKTYPE, {"linkname": "./secret"}),
    ("./out", tarfile.SYMTYPE, {"linkname": "/root/uv/python", "mode": 0o777}),
    ("./ä\udcff", b"", {"mode": 0o644}),
)


def packed(tree, entries):
    file = io.BytesIO()
    trees.pack(tree, "testbed", entries, file)
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        return {m.name: (m, tar.extractfile(m).read() if m.isreg() else m.linkname) for m in tar.getmembers()}


def test_a_tree_comes_back_with_its_owners_modes_and_times(tmp_path):
    tree = tmp_path / "tree"
    entries = trees.unpack(archive(*TREE), tree)
    (tree / "new").write_text("new")
    (tree / "secret").chmod(0o755)  # made executable meanwhile
    found = packed(tree, entries)
    says = {name: (m.type, oct(m.mode), m.uid, what) for name, (m, what) in found.items()}
    assert says == {
        "testbed": (tarfile.DIRTYPE, "0o755", 7, ""),
        "testbed/closed": (tarfile.DIRTYPE, "0o500", 9, ""),
        "testbed/closed/run": (tarfile.REGTYPE, "0o555", 9, b"echo\n"),  # but no set-user-id
        "testbed/same": (tarfile.REGTYPE, "0o755", 0, b"x"),
        "testbed/secret": (tarfile.LNKTYPE, "0o755", 7, "testbed/same"),
        "testbed/out": (tarfile.SYMTYPE, "0o777", 0, "/root/uv/python"),
        "testbed/ä\udcff": (tarfile.REGTYPE, "0o644", 0, b""),
        "testbed/new": (tarfile.REGTYPE, "0o644", 7, b"new"),
    }
    assert found["testbed/closed/run"][0].mtime == 1000
    assert trees.led_to(tree, "/root")
    assert not trees.led_to(tree, "/root/uv/python")


HOSTILE = {
    "a way up": [("../x", b"", {})],
    "an absolute name": [("/x", b"", {})],
    "a file through a link": [("l", tarfile.SYMTYPE, {"linkname": ".."}), ("l/x", b"outside", {})],
    "a link to outside": [("l", tarfile.LNKTYPE, {"linkname": "../../outside"})],
    "a device": [("d", tarfile.CHRTYPE, {})],
    "a link to a directory": [("l", tarfile.LNKTYPE, {"linkname": "."})],
    "a link to nothing": [("l", tarfile.LNKTYPE, {"linkname": "x"})],
    "a file twice": [("x", b"one", {}), ("x", b"two", {})],
    "a pipe": [("p", tarfile.FIFOTYPE, {})],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_archive_reaches_nothing_outside(tmp_path, what):
    (tmp_path / "outside").write_text("precious")
    with pytest.raises(ValueError, match=r"the archive of|the work directory holds"):
        trees.unpack(archive(*HOSTILE[what]), tmp_path / "tree")
    assert (tmp_path / "outside").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "tree"]


def test_equal_files_are_left_as_they_are_by_a_scrub(tmp_path):
    """A build that is newer than its sources must not look old."""
    from test_scrub import commit, git

    git(tmp_path, "init", "--quiet")
    commit(tmp_path, "x", {"a.py": "1\n", "b.py": "1\n"})
    for name in ("a.py", "b.py"):
        os.utime(tmp_path / name, (1000, 1000))
    (tmp_path / "b.py").write_text("2\n")
    scrub.scrub(tmp_path)
    assert (tmp_path / "a.py").stat().st_mtime == 1000
    assert (tmp_path / "b.py").read_text() == "1\n"


def test_what_the_base_commit_says_is_known(tmp_path):
    from test_scrub import commit, git, put

    git(tmp_path, "init", "--quiet")
    commit(tmp_path, "x", {"t.py": "def test_a(): pass\ndef test_ab(): pass\n"})
    put(tmp_path, {"cache.txt": "test_c\n"})
    tests = ["t.py::test_a", "u.py::T::test_ab[1]", "t.py::test_c", "t.py::test_b"]
    assert scrub.known(tmp_path, tests) == set(tests[:2])
    assert scrub.known(tmp_path, []) == set()


# Pauses


def ask(*answers):
    left = list(answers)

    def asked(within_s, cut):
        assert within_s > 0
        if (answer := left.pop(0)) is not None:
            raise answer

    return asked, left


def test_a_busy_registry_is_asked_again_and_no_more_than_agreed(monkeypatch):
    monkeypatch.setattr(curate, "_PAUSE_S", 0.01)
    source = config.Source(pull_tries=3, pull_s=5)
    busy = SandboxError("slow down")
    asked, left = ask(busy, busy, None)
    asyncio.run(curate.again(asked, source))
    assert left == []
    asked, left = ask(*[busy] * 5)
    with pytest.raises(SandboxError, match=r"slow down \(3 tries\)"):
        asyncio.run(curate.again(asked, source))
    assert len(left) == 2
    asked, left = ask(ImageMissing("no such"), None)
    with pytest.raises(ImageMissing):
        asyncio.run(curate.again(asked, source))
    assert len(left) == 1
    monkeypatch.setattr(curate, "_PAUSE_S", 60)
    asked, _ = ask(busy, None)
    with pytest.raises(SandboxError, match=r"\(1 tries\)"):  # the pause would end after the deadline
        asyncio.run(curate.again(asked, source))


def test_who_is_interrupted_does_not_wait_for_the_registry():
    cuts = []

    def asked(within_s, cut):
        cuts.append(cut)
        assert cut.wait(30)
        raise SandboxError("interrupted")

    async def whole():
        run = asyncio.create_task(curate.again(asked, config.Source()))
        await asyncio.sleep(0.2)
        run.cancel()
        await asyncio.wait([run])
        return run.cancelled()

    began = time.monotonic()
    assert asyncio.run(whole())
    assert time.monotonic() - began < 20


# Journal, report


def test_a_journal_survives_a_line_that_was_cut_short(tmp_path):
    journal = curate.Journal(tmp_path / "journal")
    journal.put("a", reasons=[])
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"key": "b", "rea')
    again = curate.Journal(tmp_path / "journal")
    assert (again.get("a"), again.get("b")) == ({"key": "a", "reasons": []}, None)
    again.put("c", reasons=["x"])
    assert curate.Journal(tmp_path / "journal").get("c")["reasons"] == ["x"]


def test_a_recipe_is_known_by_all_that_an_image_depends_on():
    recipe = curate.Recipe(image="sha256:1", workdir="/testbed", base="a", bug="b", remove=("/c",))
    others = [{"image": "sha256:2"}, {"workdir": "/x"}, {"base": ""}, {"bug": ""}, {"remove": ()}]
    keys = {recipe.key, *(dataclasses.replace(recipe, **other).key for other in others)}
    assert len(keys) == 6
    assert dataclasses.replace(recipe).key == recipe.key


def test_a_report_tells_each_row(tmp_path):
    as_jsonl(tmp_path / "set", [SWEGYM | {"instance_id": f"x-{n}"} for n in range(3)])
    one, two, three = rows.read(tmp_path)
    found = [
        curate.Outcome(mined=one, unstable=("t.py::test_a",)),
        curate.Outcome(mined=two, reasons=("gold_fails: x", "y: z")),
        curate.Outcome(mined=three, reasons=("gold_fails: y",)),
    ]
    said = curate.report(found, {"x-9": "column patch: expected"})
    assert said["swegym owner/name"] == {
        "rows": 3,
        "kept": 1,
        "refused": {"gold_fails": {"x-1": "gold_fails: x; y: z", "x-2": "gold_fails: y"}},
        "unstable": {"x-0": ["t.py::test_a"]},
    }
    assert curate.refusals(said) == {"gold_fails": 2, "unread": 1}


# Rulings


def verdict(*passed, grade=Grade.UNRESOLVED, failed=("x",), reason="", code=1):
    return Verdict(
        grade=grade, passed=passed, failed=failed, dropped=(), exit_code=code, runs=1, seconds=0.0, reason=reason
    )


GOOD = verdict("f", "p", "q", grade=Grade.RESOLVED, failed=())
EMPTY = verdict("p", "q", failed=("f",))
RULED = {
    "all is well": ([GOOD, GOOD], [EMPTY, EMPTY], (), ()),
    "a test that wavers after the patch": ([GOOD, verdict("f", "p", failed=("q",))], [EMPTY, EMPTY], (), ("q",)),
    "a test that wavers before it": ([GOOD, GOOD], [EMPTY, verdict("p")], (), ("q",)),
    "a deciding test that wavers": (
        [GOOD, verdict("p", "q", failed=("f",), reason="1 of 3")],
        [EMPTY, EMPTY],
        ("unstable_f2p: f and 0 more", "gold_flaky: 1 of 2 runs: unresolved, 1 of 3"),
        (),
    ),
    "a test that never passes": (
        [verdict("f", "p", failed=("q",), reason="q: failed")] * 2,
        [EMPTY, EMPTY],
        ("gold_fails: unresolved, q: failed",),
        (),
    ),
    "a run that did not end": (
        [GOOD, verdict("f", "p", "q", failed=(), reason="no end", code=-1)],
        [EMPTY, EMPTY],
        ("gold_flaky: 1 of 2 runs: unresolved, no end",),
        (),
    ),
    "nothing to mend": ([GOOD, GOOD], [GOOD, GOOD], ("empty_passes: the hidden tests pass on the untouched",), ()),
    "too little memory": (
        [GOOD, verdict(grade=Grade.TIMEOUT, reason="out of memory")],
        [],
        ("wrong_limits: out of memory in 1 of 2 runs of the reference patch",),
        (),
    ),
}


@pytest.mark.parametrize("name", RULED)
def test_a_ruling_tells_the_task_from_its_tests_and_its_limits(tmp_path, monkeypatch, name):
    """Of verdicts that real runs give at random; those of real runs are in test_curate.py."""
    gold, empty, reasons, unstable = RULED[name]
    as_jsonl(tmp_path / "set", [SWEGYM])
    (m,) = rows.read(tmp_path)
    answer = dataclasses.replace(m.answer, fail_to_pass=("f",), pass_to_pass=("p", "q"))
    left = SimpleNamespace(gold=list(gold), empty=list(empty))

    async def hidden(task, patch, answer, cfg):
        return (left.gold if patch else left.empty).pop(0)

    async def seen(task, tests, cfg, *, runs):
        return tuple(tests)

    async def clean(task, answer, cfg):
        return []

    for key, fake in (("_hidden", hidden), ("_visible", seen), ("_leaks", clean)):
        monkeypatch.setattr(grade, key, fake)
    ruling = asyncio.run(grade.settle(m.task, answer, config.Sandbox(), runs=2))
    assert len(ruling.reasons) == len(reasons)
    assert all(found.startswith(reason) for found, reason in zip(ruling.reasons, reasons, strict=True))
    assert ruling.unstable == unstable
    assert ruling.visible == (() if reasons else tuple(t for t in ("p", "q") if t not in unstable))
    assert (left.gold, left.empty) == ([], [])


# Configuration


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["source.rows="], "source.rows is empty: source.kind=rows needs a file"),
        (["source.limit=0"], "source.limit=0: must be at least 1"),
        (["source.mirror=https://x"], r"source.mirror=https://x: give host\[:port\]"),
        (["source.push=a b"], r"source.push=a b: give host\[:port\]"),
        (["source.pulls=0"], "source.pulls=0: must be at least 1"),
        (["source.pull_s=0"], "source.pull_s=0.0: must be above 0"),
    ],
)
def test_keys_that_cannot_work_are_named(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        config.load(config.Run, ["model=x", "run_dir=y", "source.kind=rows", "source.rows=z", *words])


def test_rows_need_docker(tmp_path):
    source = config.Source(kind="rows", rows=str(tmp_path))
    with pytest.raises(ValueError, match=r"rollout\.sandbox\.backend=bwrap: source\.kind=rows .*; give docker"):
        ingest.ingest(config.Pack(), config.Sandbox(), seed=0, to=tmp_path / "pack", source=source)


def test_a_pack_of_directories_is_no_source_of_rows(tmp_path):
    mined = local.generate(count=1, held_out=0, ambiguous=0, hidden=0, seed=1, to=tmp_path / "local")
    pack.write(tmp_path / "local", mined)
    source, journal = config.Source(kind="rows", rows=str(tmp_path / "local")), curate.Journal(tmp_path / "journal")
    with pytest.raises(ValueError, match=r"source\.rows=.*: a pack of directories is used as it is; .*tasks\.path"):
        asyncio.run(ingest._rows(config.Pack(), source, config.Sandbox(), journal, tmp_path))


def test_rows_with_an_unknown_parser_are_left_out(tmp_path):
    as_jsonl(tmp_path / "set", [SWEBENCH, SWEBENCH | {"instance_id": "x-1", "log_parser": "parse_log_x"}])
    unread = {}
    assert [m.task.id for m in ingest._parsed(rows.read(tmp_path), unread)] == [SWEBENCH["instance_id"]]
    assert unread["x-1"].startswith("x-1: parser=parse_log_x: not among the")


def test_answers_leave_out_what_is_unstable(tmp_path):
    as_jsonl(tmp_path / "set", [SWEGYM])
    (m,) = rows.read(tmp_path)
    less = pack.without(m.answer, m.answer.pass_to_pass[:1])
    assert less.pass_to_pass == m.answer.pass_to_pass[1:]
    assert less.fail_to_pass == m.answer.fail_to_pass
