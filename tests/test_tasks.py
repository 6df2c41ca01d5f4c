"""Laws of task packs: what a pack may hold, what its public text may tell, and what its tests decide."""

import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from entropo_ray import config, tasks
from entropo_ray.records import Answer, Task
from entropo_ray.tasks import diffs, handbook, local, pack, reference
from entropo_ray.tasks.families import FAMILIES, PAIRS, RIDDLES
from entropo_ray.tasks.forms import Family, changed, edit, functions, match, split_kind
from entropo_ray.tasks.pack import Mined
from entropo_ray.tasks.problems import part, pose

_SIZES = {"count": 80, "held_out": 24, "ambiguous": 0.34, "hidden": 0.1}
_ALL = (*FAMILIES, *PAIRS, *RIDDLES)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[Mined]]:
    to = tmp_path_factory.mktemp("packs") / "local"
    mined = local.generate(**_SIZES, seed=3, to=to)
    tasks.write(to, mined)
    return to, mined


def _path(answer: Answer) -> str:
    """The one file that the reference patch changes."""
    (path,) = re.findall(r"^\+\+\+ b/(.*)$", answer.patch, re.MULTILINE)
    return str(path)


def _source(m: Mined) -> str:
    return Path(m.task.image, _path(m.answer)).read_text()


def _kind(m: Mined) -> str:
    kind = handbook.repairs(_source(m), m.task.problem)[0].kind
    return kind if kind in ("ambiguous", "riddle") else "plain"


def _of_kind(mined: list[Mined], kind: str) -> list[Mined]:
    return [m for m in mined if _kind(m) == kind]


def _broken_tests(source: str, tests: str) -> set[str]:
    """Names of the tests that fail on a module, run in this process."""
    space: dict = {}
    exec(source, space)
    exec(re.sub(r"^from .*$", "", tests, flags=re.MULTILINE), space)
    failed = set()
    for name in re.findall(r"^def (test_\w+)", tests, re.MULTILINE):
        try:
            space[name]()
        except Exception:
            failed.add(name)
    return failed


def _visible(m: Mined) -> str:
    """The visible tests of the file at fault."""
    return Path(m.task.image, "tests", f"test_{Path(_path(m.answer)).name}").read_text()


def _judge(m: Mined, source: str) -> tuple[bool, bool]:
    """(all tests pass, all visible tests pass) for another text of the file at fault."""
    visible = not _broken_tests(source, _visible(m))
    return visible and not _broken_tests(source, m.answer.files[0].text), visible


def _applied(source: str, repair: handbook.Repair) -> str:
    assert source.count(repair.old) == 1
    return source.replace(repair.old, repair.new)


def _digest(to: Path) -> dict[str, str]:
    """Every file of a pack but what git keeps of the file system."""
    return {
        str(p.relative_to(to)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(to.rglob("*"))
        if p.is_file() and not str(p).endswith(".git/index")
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        to = tmp_path / name
        tasks.write(to, local.generate(count=8, held_out=4, ambiguous=0.34, hidden=0.1, seed=seed, to=to))
    a, b, c = (_digest(tmp_path / name) for name in "abc")
    assert a == b
    assert a["tasks.jsonl"] != c["tasks.jsonl"]
    assert len(a) > 12 * 5


def test_there_are_enough_families_and_kinds_of_bug():
    assert len(FAMILIES) >= 40
    kinds = {split_kind(bug)[0] for family in FAMILIES for bug in family.bugs}
    assert len(kinds) >= 12
    assert all(re.fullmatch(r"[a-z ]+", kind) for kind in kinds)
    assert len({family.name for family in _ALL}) == len(_ALL)


@pytest.mark.parametrize("family", _ALL, ids=lambda family: family.name)
def test_the_tests_of_every_family_decide(family):
    # part() asserts that accepted programs pass all tests and that every wrong one fails some
    for seed in range(12):
        problem = pose(family, random.Random(seed), random.Random(seed))
        cases = part(problem, random.Random(seed))
        assert cases.failing
        assert problem.secret or cases.visible
        old, _ = edit("\n\n".join(problem.broken), "\n\n".join(problem.right))
        assert old.count("\n") == 0


@pytest.mark.parametrize("family", [*PAIRS, *RIDDLES], ids=lambda family: family.name)
def test_public_text_does_not_tell_the_hidden_choice(family):
    worlds = {}
    for fate in range(60):
        problem = pose(family, random.Random(5), random.Random(fate))
        rng = random.Random(6)
        cases = part(problem, rng)
        told = (problem.broken, local.issue(problem, cases, "shop/calc.py", rng), problem.secret and cases.visible)
        worlds.setdefault(problem.right, set()).add(repr(told))
    assert len(worlds) >= (2 if family in PAIRS else 3)
    assert len(set().union(*worlds.values())) == 1


@pytest.mark.parametrize("family", PAIRS, ids=lambda family: family.name)
def test_mending_the_innocent_helper_breaks_a_visible_test(family):
    for seed in range(12):
        problem = pose(family, random.Random(seed), random.Random(seed))
        cases = part(problem, random.Random(seed))
        space: dict = {}
        (innocent,) = [p for p in problem.readings if p != problem.right]
        exec("\n\n".join(innocent), space)
        assert any(space[c.call[0]](*c.call[1]) != c.want for c in cases.visible)


def _at_stake(m: Mined) -> frozenset[str]:
    """The functions that some repair changes, and the name that the issue gives."""
    source = _source(m)
    now = set(functions(source))
    mended = [set(functions(_applied(source, r))) for r in handbook.repairs(source, m.task.problem)]
    return frozenset({re.findall(r"`([a-z_]+)`", m.task.problem)[0]}.union(*(now - other for other in mended)))


def test_splits_share_no_repository_no_function_and_no_file(made):
    _, mined = made
    split = {name: [m for m in mined if m.task.split == name] for name in ("train", "test")}
    assert (len(split["train"]), len(split["test"])) == (_SIZES["count"], _SIZES["held_out"])
    repos = [{m.task.repo for m in side} for side in split.values()]
    assert repos[0].isdisjoint(repos[1])
    assert sum(map(len, repos)) == len(mined)
    repaired = [{_at_stake(m) for m in side} for side in split.values()]
    assert repaired[0].isdisjoint(repaired[1])
    assert len({_source(m) for m in mined}) == len(mined)


def test_the_shares_are_those_asked_for(made):
    _, mined = made
    for split, size in (("train", _SIZES["count"]), ("test", _SIZES["held_out"])):
        kinds = Counter(_kind(m) for m in mined if m.task.split == split)
        assert kinds["ambiguous"] == round(size * _SIZES["ambiguous"])
        assert kinds["riddle"] == round(size * _SIZES["hidden"])
        assert sum(kinds.values()) == size


def test_most_tasks_have_another_accepted_patch(made):
    _, mined = made
    assert sum(bool(m.answer.alternatives) for m in mined) > 0.6 * len(mined)
    assert all(m.answer.patch not in m.answer.alternatives for m in mined)


def test_texts_are_short(made):
    _, mined = made
    for m in mined:
        assert 15 <= len(m.task.problem.split()) <= 45
        assert re.search(r"`[a-z_]+`", m.task.problem)
        source = _source(m)
        assert len(source.splitlines()) <= 40
        assert max(map(len, source.splitlines())) <= 80
        modules = list(Path(m.task.image).glob(f"{_path(m.answer).split('/')[0]}/*.py"))
        assert 3 <= len(modules) <= 7  # 2 to 6 and __init__.py
    assert sum(_path(m.answer) in m.task.problem for m in mined) > 0.8 * len(mined)


def test_no_package_hides_a_module_of_the_standard_library():
    assert not set(local._NOUNS.split()) & sys.stdlib_module_names


def test_hidden_tests_are_not_in_the_repository(made):
    _, mined = made
    for m in mined:
        texts = [p.read_text() for p in Path(m.task.image).rglob("*") if p.is_file() and ".git" not in p.parts]
        for file in m.answer.files:
            assert not Path(m.task.image, file.path).exists()
            assert not any(name in text for name in re.findall(r"def (test_\w+)", file.text) for text in texts)
        assert not set(m.task.visible) & set(m.answer.fail_to_pass)
        assert set(m.task.visible) <= set(m.answer.pass_to_pass)


def test_the_repository_holds_no_right_form_of_the_function_at_fault(made):
    _, mined = made
    for m in _of_kind(mined, "plain"):
        source = _source(m)
        (family,) = {f for f in FAMILIES for text in functions(source) for b in f.bugs if _is(f, b, text)}
        modules = Path(m.task.image, _path(m.answer)).parent.glob("*.py")
        assert not any(match(family.code, text) for p in modules for text in functions(p.read_text()))


def _is(family: Family, bug: str, text: str) -> bool:
    return match(changed(family.code, split_kind(bug)[1]), text) is not None


def test_repositories_hold_one_clean_commit(made):
    _, mined = made
    for m in mined[:3]:
        log = subprocess.run(
            ["git", "log", "--all", "--format=%an %aI"], cwd=m.task.image, capture_output=True, text=True, check=True
        )
        assert log.stdout.splitlines() == ["Local Pack 2024-01-01T12:00:00+00:00"]
        status = subprocess.run(["git", "status", "--porcelain"], cwd=m.task.image, capture_output=True, check=True)
        assert status.stdout == b""


def test_the_handbook_mends_every_plain_task_with_any_of_its_repairs(made):
    _, mined = made
    plain = _of_kind(mined, "plain")
    assert len(plain) > 40
    for m in plain:
        source = _source(m)
        for repair in handbook.repairs(source, m.task.problem):
            assert _judge(m, _applied(source, repair)) == (True, True)


def test_the_handbook_offers_every_reading_and_one_is_right(made):
    _, mined = made
    for m in mined:
        if _kind(m) == "plain":
            continue
        source = _source(m)
        offers = [_judge(m, _applied(source, r)) for r in handbook.repairs(source, m.task.problem)]
        assert sum(resolved for resolved, _ in offers) == 1
        if _kind(m) == "ambiguous":
            assert sum(not visible for _, visible in offers) == 1  # the innocent helper is pinned
        else:
            assert all(visible for _, visible in offers)  # nothing visible decides


def test_mistakes_never_resolve_and_about_half_break_a_visible_test(made):
    _, mined = made
    judged = []
    for m in mined:
        source = _source(m)
        wrong = handbook.mistakes(source, m.task.problem, random.Random(m.task.id))
        assert len(wrong) >= 2
        judged += [_judge(m, _applied(source, repair)) for repair in wrong]
    assert not any(resolved for resolved, _ in judged)
    assert sum(not visible for _, visible in judged) > 0.4 * len(judged)


def test_a_mended_file_needs_no_repair(made):
    _, mined = made
    for m in mined:
        if _kind(m) == "riddle":
            continue
        source = _source(m)
        mended = _applied(source, handbook.repairs(source, m.task.problem)[0])
        assert handbook.repairs(mended, m.task.problem) == []


def test_a_numbered_view_reads_like_the_file(made):
    _, mined = made
    source = _source(mined[0])
    view = "".join(f"{i:6d}\t{line}\n" for i, line in enumerate(source.splitlines(), 1))
    assert handbook.plain(view) == source
    assert handbook.repairs(view, "") == handbook.repairs(source, "")


def test_strangers_code_needs_no_repair():
    assert handbook.repairs("def f(:\n", "") == []
    assert handbook.repairs("def f(a):\n    return a + 1\n", "`f` fails") == []
    assert handbook.mistakes("", "", random.Random(0)) == []


def _run(m: Mined, patch: str, where: Path) -> set[str]:
    """Tests that pass after a patch, as the answer's own script has it."""
    shutil.copytree(m.task.image, where)
    if patch:
        subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=where, check=True)
    for file in m.answer.files:
        (where / file.path).write_text(file.text)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", m.answer.script], cwd=where, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    return set(re.findall(r"^PASSED (\S+)", done.stdout, re.MULTILINE))


def test_real_pytest_tells_gold_from_nothing_and_accepts_alternatives(made, tmp_path):
    _, mined = made
    for m in [m for kind, n in (("plain", 3), ("ambiguous", 2), ("riddle", 1)) for m in _of_kind(mined, kind)[:n]]:
        every = {*m.answer.fail_to_pass, *m.answer.pass_to_pass}
        assert _run(m, "", tmp_path / f"{m.task.id}-empty") == set(m.answer.pass_to_pass)
        assert _run(m, m.answer.patch, tmp_path / f"{m.task.id}-gold") == every
        for patch in m.answer.alternatives[:1]:
            assert _run(m, patch, tmp_path / f"{m.task.id}-other") == every


def test_a_pack_may_be_moved_and_loads_by_split_and_limit(made, tmp_path):
    to, mined = made
    moved = tmp_path / "elsewhere"
    shutil.copytree(to, moved)
    suite = tasks.load(config.Tasks(path=str(moved), split="all"))
    assert [t.id for t in suite] == [m.task.id for m in mined]
    assert all(Path(t.image) == moved / "repos" / t.id and Path(t.image, ".git").is_dir() for t in suite)
    assert {t.split for t in tasks.load(config.Tasks(path=str(moved), split="test"))} == {"test"}
    assert len(tasks.load(config.Tasks(path=str(moved), split="train", limit=2))) == 2
    assert pack.answers(moved) == {m.task.id: m.answer for m in mined}


def test_tasks_know_nothing_of_answers(made):
    to, _ = made
    text = (to / "tasks.jsonl").read_text()
    assert "test_hidden" not in text
    assert not {"patch", "alternatives", "files"} & set(Task.__dataclass_fields__)


def test_a_foreign_image_stays_as_it_is(made, tmp_path):
    _, mined = made
    tasks.write(tmp_path, [replace(mined[0], task=replace(mined[0].task, image="registry/image:1"))])
    assert tasks.load(config.Tasks(path=str(tmp_path), split="all"))[0].image == "registry/image:1"


def test_repeated_ids_are_refused(made, tmp_path):
    _, mined = made
    with pytest.raises(ValueError, match=f"share an id: '{mined[0].task.id}'"):
        tasks.write(tmp_path, [mined[0], mined[0]])
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("spoil", "says"), [("gone", "no such directory"), ("done", "not whole"), ("empty", "no task")]
)
def test_a_pack_that_cannot_be_used_is_named_in_one_line(made, tmp_path, spoil, says):
    _, mined = made
    to = tmp_path / "pack"
    if spoil != "gone":
        tasks.write(to, [m for m in mined if m.task.split == "train"])
    if spoil == "done":
        (to / "done").unlink()
    with pytest.raises(ValueError, match=f"^tasks.path={re.escape(str(to))}.*{says}.*jobs/pack.py") as error:
        tasks.load(config.Tasks(path=str(to), split="test"))
    assert "\n" not in str(error.value)


def test_a_pack_takes_the_first_families_alone(tmp_path):
    shares = {"ambiguous": 0.0, "hidden": 0.0, "seed": 0, "held_out": 0}
    mined = local.generate(count=12, to=tmp_path, families=2, **shares)
    assert all(
        any(_is(f, bug, t) for f in FAMILIES[:2] for bug in f.bugs for t in functions(_source(m))) for m in mined
    )
    for wrong in (0, len(FAMILIES) + 1):
        with pytest.raises(ValueError, match=rf"pack.families={wrong}: .* 1 to {len(FAMILIES)}"):
            local.generate(count=1, to=tmp_path, families=wrong, **shares)


def test_a_practice_task_is_a_clean_directory_without_a_commit(tmp_path):
    mined = local.generate(count=1, held_out=1, practice=2, ambiguous=0.0, hidden=0.0, seed=0, to=tmp_path)
    for m in mined:
        log = subprocess.run(
            ["git", "log", "--format=%s"], cwd=m.task.image, capture_output=True, text=True, check=False
        )
        assert log.stdout.split() == ([] if m.task.split == "practice" else ["Start"])
        assert Path(m.task.image, ".git", "HEAD").is_file()


def test_more_tasks_than_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at most"):
        local.generate(count=100_000, held_out=0, ambiguous=0.3, hidden=0.1, seed=0, to=tmp_path)


# ---- reference patches as edits ----


def test_edits_in_order_make_the_reference_patch(made):
    to, mined = made
    found = reference.edits(str(to), [task.id for task in tasks.load(config.Tasks(path=str(to)))])
    assert len(found) == _SIZES["count"]
    for m in mined:
        if m.task.split != "train":
            continue
        before = text = Path(m.task.image, _path(m.answer)).read_text()
        for edit_ in found[m.task.problem]:
            assert text.count(edit_.old) == 1, m.task.id
            assert text[: text.index(edit_.old)].count("\n") == edit_.first - 1
            text = text.replace(edit_.old, edit_.new)
        assert diffs.between(_path(m.answer), before, text) == m.answer.patch


_TWICE = "".join(f"line {n}\n" for n in range(40))


def test_edits_of_one_file_count_lines_as_they_are_by_then(made, tmp_path):
    _, mined = made
    after = _TWICE.replace("line 3\n", "line 3\nmore\nand more\n").replace("line 30\n", "")
    text = diffs.between("a.txt", _TWICE, after)
    one = next(m for m in mined if m.task.split == "train")
    (found,) = _edits_of(replace(one, answer=replace(one.answer, patch=text)), tmp_path).values()
    first, second = found
    assert (first.path, first.first, second.first) == ("a.txt", 2, 30)
    half = _TWICE.replace(first.old, first.new)
    assert half.split("\n")[second.first - 1] == second.old.split("\n")[0]
    assert half.replace(second.old, second.new) == after


def _edits_of(one: Mined, to: Path):
    tasks.write(to, [one])
    return reference.edits(str(to), [one.task.id])


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (diffs.between("new.py", None, "x\n"), "does more to new.py"),
        (diffs.between("old.py", "x\n", None), "does more to old.py"),
        ("diff --git a/x b/x\nGIT binary patch\nliteral 1\n", "does more to x"),
        ("diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1,0 +1 @@\n+x\n", "changes x where nothing stands"),
        ("diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ odd @@\n x\n+x\n", "cannot be read"),
    ],
)
def test_a_reference_patch_that_is_more_than_changed_lines_is_named(made, tmp_path, patch, says):
    one = next(m for m in made[1] if m.task.split == "train")
    with pytest.raises(ValueError, match=rf"^{one.task.id}: the reference patch .*{says}.*sft.teacher") as error:
        _edits_of(replace(one, answer=replace(one.answer, patch=patch)), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["test", "practice"])
def test_reference_patches_are_shown_for_training_tasks_alone(made, tmp_path, split):
    one = next(m for m in made[1] if m.task.split == "test")
    with pytest.raises(ValueError, match=rf"^{one.task.id}: split={split}: .* training tasks alone; give sft.split"):
        _edits_of(replace(one, task=replace(one.task, split=split)), tmp_path)
