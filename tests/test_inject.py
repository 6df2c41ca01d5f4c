"""Laws of injected bugs: each is small and real, tests notice it, and neither text nor sandbox tells the answer."""

import ast
import asyncio
import dataclasses
import difflib
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from entropo_ray import config, factory, ingest, tasks
from entropo_ray.records import Task
from entropo_ray.sandbox import ImageMissing, SandboxSpec, open_sandbox
from entropo_ray.tasks import fetch, inject, issues, layer, mutations, pack
from entropo_ray.tasks.issues import Call, Symptom

BACKEND = "bwrap" if shutil.which("bwrap") else "plain"
BOX = config.Sandbox(backend=BACKEND, grade_s=30.0)

# kind -> a function, and a line that it may become ("" for a line that goes)
CASES = {
    "comparison": ("def f(a, b):\n    return a == b\n", "    return a != b"),
    "boundary": ("def f(a, b):\n    return a < b\n", "    return a <= b"),
    "arithmetic": ("def f(a, b):\n    return a + b  # sum\n", "    return a - b  # sum"),
    "assignment": ("def f(a):\n    a += 1\n    return a\n", "    a -= 1"),
    "boolean": ("def f(a, b):\n    return a and b\n", "    return a or b"),
    "negated": ("def f(a):\n    if a.ok:\n        return 1\n", "    if not a.ok:"),
    "operand": ("def f(a, b):\n    return a or b\n", "    return a"),
    "sign": ("def f(a):\n    return -a\n", "    return a"),
    "constant": ("def f():\n    return 'ab'\n", "    return 'a'"),
    "default": ("def f(a=True):\n    return a\n", "def f(a=False):"),
    "off_by_one": ("def f(n):\n    return list(range(n))\n", "    return list(range(n - 1))"),
    "attribute": ("def f(a):\n    return a.lower()\n", "    return a.upper()"),
    "variable": ("def f(a, b):\n    return a\n", "    return b"),
    "exception": ("def f():\n    raise ValueError('no')\n", "    raise TypeError('no')"),
    "arguments": ("def f(a, b):\n    return g(a, b)\n", "    return g(b, a)"),
    "order": ("def f(a, b):\n    return a, b\n", "    return b, a"),
    "keyword": ("def f(a):\n    return sorted(a, reverse=True)\n", "    return sorted(a)"),
    "unwrapped": ("def f(a):\n    return a.strip()\n", "    return a"),
    "statement": ("def f(a):\n    a.sort()\n    return a\n", ""),
    "guard": ("def f(a):\n    if not a:\n        return 0\n    return a[0]\n", ""),
    "branch": ("def f(a):\n    if a:\n        b = 1\n    else:\n        b = 2\n    return b\n", ""),
    "branches": ("def f(a):\n    return 1 if a else 2\n", "    return 2 if a else 1"),
    "early_exit": ("def f(a):\n    for x in a:\n        g(x)\n", "        break"),
    "loop": ("def f(a):\n    for x in a:\n        if x:\n            continue\n        g(x)\n", "            break"),
    "result": ("def f(a):\n    return a\n", "    return None"),
    "missing_body": ('def f(a):\n    """Doc."""\n    return a + 1\n', "    raise NotImplementedError"),
    "naive_body": ("def f(a):\n    b = a + 1\n    return b\n", "    return a"),
}
WIDE = '''"""Größe und – Maß."""


class Ä:
    @property
    def größe(self):  # ü
        return f"{self.a - 1!r}" + "ß" * (self.b - 1)  # – not this: -


def outer(x, /, *rest, key=None):
    def inner(y):
        return y < x  # <
    if (x ==  # == here
            3):
        return [inner(y) for y in rest if not y]
    elif x is not None and key in ("a", "b"):
        x = {**{}, "k": x[1:-1]}
    return x
'''


def every(text):
    code = mutations.Code(text)
    return code, [(f, m) for f in mutations.functions(code) for m in mutations.mutations(code, f)]


@pytest.mark.parametrize("kind", [*mutations.RULES, "missing_body", "naive_body"])
def test_each_kind_makes_its_mistake_and_touches_no_other_line(kind):
    source, expected = CASES[kind]
    code, found = every(source)
    texts = [mutations.mutated(code, m) for _, m in found if m.kind == kind]
    lines = [
        ({x[2:] for x in delta if x.startswith("+ ")}, {x[2:] for x in delta if x.startswith("- ")})
        for delta in (list(difflib.ndiff(source.splitlines(), text.splitlines())) for text in texts if text)
    ]
    assert lines, f"no {kind} in {source}"
    assert any(added == {expected} if expected else not added for added, _ in lines), lines
    assert all(len(added) <= 2 and len(removed) <= 2 for added, removed in lines), "more than the mistake was changed"


def test_what_is_made_of_any_source_is_a_program_that_means_something_else():
    code, found = every(WIDE)
    assert {"Ä.größe", "outer"} == {f.name for f, _ in found}
    assert len({m.kind for _, m in found}) >= 12
    made = [text for _, m in found if (text := mutations.mutated(code, m))]
    assert len(made) > 0.8 * len(found)
    for text in made:
        assert ast.dump(ast.parse(text)) != ast.dump(code.tree)
    comments = [line.partition("#")[2] for line in WIDE.splitlines() if "#" in line]
    kept = [sum(c in text for c in comments) for text in made]
    assert min(kept) >= len(comments) - 2, "a whole body may take its comments along, nothing else may"


def test_two_mistakes_lie_side_by_side_or_not_at_all():
    code, found = every("def f(a, b):\n    if a < b:\n        return a + 1\n    return b\n")
    by_kind = {m.kind: m for _, m in found}
    both = mutations.together(by_kind["boundary"], by_kind["arithmetic"])
    assert both.kind == "boundary+arithmetic"
    text = mutations.mutated(code, both)
    assert "a <= b" in text
    assert "a - 1" in text
    assert mutations.together(by_kind["boundary"], by_kind["comparison"]) is None
    assert mutations.together(by_kind["missing_body"], by_kind["boundary"]) is None


def test_positions_inside_f_strings_are_left_alone():
    _, found = every('def f(a):\n    return f"{a + 1} {a - 1}"\n')
    assert {m.kind for _, m in found} <= {"result", "missing_body", "naive_body"}


# --- issues -----------------------------------------------------------------------------------------------------------


def told(**words):
    calls = (Call(name="slug", call="slug('A b')", returned="'A-b'"),)
    base = {"error": "AssertionError", "message": "", "inside": False, "calls": calls, "compared": None}
    return Symptom(**(base | words))


@pytest.mark.parametrize(
    ("symptom", "words"),
    [
        (told(compared=("==", "'A-b'", "'a-b'")), ["slug('A b')", "'A-b'", "'a-b'"]),
        (told(compared=("==", "'a-b'", "'A-b'")), ["slug('A b')", "'A-b'", "'a-b'"]),
        (told(error="KeyError", message="'x'", inside=True), ["slug('A b')", "KeyError: 'x'"]),
        (told(error="Failed", message="DID NOT RAISE <class 'ValueError'>"), ["slug('A b')", "ValueError"]),
        (told(message="ValueError not raised"), ["slug('A b')", "ValueError"]),
        (told(), ["slug('A b')", "'A-b'"]),
    ],
)
def test_an_issue_tells_the_call_and_what_came_of_it(symptom, words):
    texts = {issues.write([symptom], [], [], random.Random(seed)) for seed in range(20)}
    assert len(texts) > 5, "always the same words"
    for text in texts:
        assert not [word for word in words if word not in text], text
    assert "`slug`" in next(iter(texts))


def test_which_value_is_wrong_is_told_the_right_way_round():
    for seed in range(10):
        text = issues.write([told(compared=("==", "'a-b'", "'A-b'"))], [], [], random.Random(seed))
        assert not any(f"{verb} `'a-b'`" in text for verb in ("returns", "gives", "I get", "got"))


def test_an_issue_quotes_neither_lines_nor_names_of_tests():
    failed = told(error="ValueError", message="the secret helper said no", inside=True)
    source = "def test_helper():\n    raise ValueError(\n        'the secret helper said no')\n"
    text = issues.write([failed], ["    the secret helper said no\n"], ["test_helper"], random.Random(0))
    assert "secret" not in text
    assert "ValueError" in text
    assert not issues.quotes(text, [source], ["test_helper"])
    assert issues.write([told()], ["slug('A b')\n" * 2, "`slug` is all"], ["slug"], random.Random(0)) is None
    assert issues.write([told(calls=())], [], [], random.Random(0)) is None


# --- what is kept -----------------------------------------------------------------------------------------------------

GOOD = tuple(f"tests/test_{file}.py::test_{number}" for file in "ab" for number in range(4))
SEEN = inject.Survey(
    good=GOOD,
    seconds=dict.fromkeys(GOOD, 0.1),
    entered={("m.py", 1): GOOD, ("m.py", 5): GOOD[1:], ("m.py", 7): GOOD[2:3]},
    imported=frozenset(),
)


def candidate(function="f", kind="constant", line=1, files=("tests/test_a.py",)):
    mutation = mutations.Mutation(kind, (mutations.Edit(0, 1, "x"),), line)
    return inject.Candidate(path="m.py", function=function, mutation=mutation, text="", files=files)


def judged(shelf, one, *broken, ended=True, collected=True):
    return shelf.refuse(one, set(GOOD) - set(broken), ended=ended, collected=collected)


def test_a_bug_that_nobody_or_everybody_notices_is_not_kept():
    shelf = inject.Shelf(SEEN, config.Source())
    assert judged(shelf, candidate()) == "unnoticed"
    assert judged(shelf, candidate(), GOOD[4]) == "unnoticed", "that file was not run"
    assert judged(shelf, candidate(files=("tests/test_a.py", "tests/test_b.py")), *GOOD[:5]) == "breaks_most"
    assert judged(shelf, candidate(), GOOD[0], ended=False) == "no_end"
    assert judged(shelf, candidate(), GOOD[0], collected=False) == "breaks_import"
    assert judged(shelf, candidate(), GOOD[0]) == ""


def test_no_two_bugs_of_a_function_are_alike_and_none_has_too_many():
    shelf = inject.Shelf(SEEN, config.Source(per_function=2))
    assert judged(shelf, candidate(), GOOD[0]) == ""
    assert judged(shelf, candidate(kind="loop"), GOOD[0]) == "alike", "the same failures"
    assert judged(shelf, candidate(), GOOD[1]) == "alike", "the same mistake in the same line"
    assert judged(shelf, candidate(kind="loop"), GOOD[1]) == ""
    assert judged(shelf, candidate(kind="sign"), GOOD[2]) == "crowded"
    assert judged(shelf, candidate("g"), GOOD[0]) == ""


def test_the_test_that_reaches_least_explains_a_bug():
    assert inject.easiest(SEEN, GOOD[:4], 3) == [GOOD[0], GOOD[1], GOOD[3]]


@pytest.mark.parametrize("by", ["file", "package"])
def test_the_test_split_takes_whole_groups_up_to_its_share(by):
    def one(package, file, number):
        task = Task(
            id=f"{package}-{file}-{number}", source="inject", split="train", repo=package, image="", workdir="",
            problem="", test_command="", visible=(),
        )  # fmt: skip
        return inject.Injected(mined=pack.Mined(task, None), provenance={"package": package, "file": file})

    made = [one(p, f, n) for p in "abcd" for f in "xyz" for n in range({"x": 1, "y": 1, "z": 3}[f])]
    found = inject.split(made, config.Source(held_out=0.25, held_out_by=by))
    groups = {"train": set(), "test": set()}
    for injected in found:
        groups[injected.mined.task.split].add(injected.group if by == "file" else injected.group[:1])
    assert not groups["train"] & groups["test"]
    assert 3 <= sum(i.mined.task.split == "test" for i in found) <= 5
    assert [i.mined.task.id for i in found] == [m.mined.task.id for m in made]


# --- the factory, from end to end -------------------------------------------------------------------------------------

FILES = {
    "pyproject.toml": '[project]\nname = "tiny-words"\nversion = "1.2"\n',
    "src/tiny/__init__.py": '"""Words."""\n',
    "src/tiny/text.py": '''"""Texts."""


def shorten(text, width=10, mark="..."):
    """At most `width` characters, the last of them a mark if something was cut."""
    if len(text) <= width:
        return text
    return text[: width - len(mark)] + mark  # the mark counts


def count(text, letters):
    """How often one of the letters occurs."""
    total = 0
    for letter in text:
        if letter in letters:
            total += 1
    return total
''',
    "src/tiny/lists.py": '''"""Lists."""


def first(items, default=None):
    if not items:
        raise ValueError("nothing there")
    return items[0] or default
''',
    "tests/test_shorten.py": """from tiny.text import shorten


def test_short_texts_stay():
    assert shorten("abc") == "abc"
    assert shorten("abcdefghij") == "abcdefghij"


def test_long_texts_are_cut():
    assert shorten("abcdefghijklmnop") == "abcdefg..."
    assert shorten("abcdefgh", 5, mark="!") == "abcd!"
""",
    "tests/test_count.py": """from tiny.text import count


def test_vowels_are_counted():
    assert count("banana", "aeiou") == 3


def test_never():
    assert count("banana", "n") == 1
""",
    "tests/test_first.py": """import pytest
from tiny.lists import first


@pytest.mark.parametrize("items", [[1, 2], [3]])
def test_first(items):
    assert first(items) == items[0]


def test_first_of_nothing():
    with pytest.raises(ValueError):
        first([])
    assert first([0], 5) == 5
""",
    "tests/test_slow.py": """import time

from tiny.text import count


def test_slow():
    time.sleep(3)
    assert count("a", "a") == 1
""",
}


def lay(home, files):
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    return home


def source_of(home, **words):
    base = {"kind": "inject", "package": str(home), "count": 5, "tries": 6, "file_s": 2.0, "held_out": 0.5}
    return config.Source(**(base | words))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = lay(tmp_path_factory.mktemp("source") / "words", FILES)
    to = tmp_path_factory.mktemp("packs") / "inject"
    numbers = ingest.ingest(config.Pack(), BOX, seed=0, to=to, source=source_of(home))
    return home, to, numbers


def test_a_package_becomes_tasks_that_hold(made):
    _, to, numbers = made
    suite = tasks.load(config.Tasks(path=str(to), split="all"))
    assert 3 <= len(suite) == numbers["tasks"] <= 5
    assert ingest.check(config.Pack(), BOX, path=to)["tasks"] == len(suite)
    report = json.loads((to / "report.json").read_text())["tiny-words"]
    assert report["tests"] == 6
    assert report["functions"] == 3
    assert report["kept"] == len(suite)
    assert report["found"] > report["tried"] == report["kept"] + report["spare"] + sum(report["refused"].values())
    assert numbers["refused"] == sum(report["refused"].values()) > 0


def test_failing_slow_and_hidden_tests_are_not_shown(made):
    _, to, _ = made
    for task in tasks.load(config.Tasks(path=str(to), split="all")):
        answer = pack.answers(to)[task.id]
        named = {*task.visible, *answer.fail_to_pass, *answer.pass_to_pass}
        assert not {test for test in named if "never" in test or "slow" in test}
        hidden = {file.path for file in answer.files}
        assert hidden == {inject.file_of(test) for test in answer.fail_to_pass}
        assert not [path for path in hidden if (Path(task.image) / path).exists()]
        assert {inject.file_of(test) for test in task.visible} <= {
            path for path in FILES if path not in hidden and path.startswith("tests/")
        }
        assert {file.path: file.text for file in answer.files} == {path: FILES[path] for path in hidden}


def test_the_reference_patch_is_the_bug_backwards(made, tmp_path):
    _, to, _ = made
    for task in tasks.load(config.Tasks(path=str(to), split="all")):
        shutil.copytree(task.image, tmp_path / task.id)
        patch = pack.answers(to)[task.id].patch
        subprocess.run(["git", "apply", "-"], cwd=tmp_path / task.id, input=patch.encode(), check=True, timeout=30)
        for path in ("src/tiny/text.py", "src/tiny/lists.py"):
            assert (tmp_path / task.id / path).read_text() == FILES[path]


def test_no_line_of_a_test_stands_in_an_issue(made):
    _, to, _ = made
    for task in tasks.load(config.Tasks(path=str(to), split="all")):
        for name, text in FILES.items():
            if name.startswith("tests/"):
                assert not [
                    line for line in map(str.strip, text.split("\n")) if len(line) > 13 and line in task.problem
                ]
        assert "test" not in task.problem
        assert any(f"`{name}`" in task.problem for name in ("shorten", "count", "first"))


def test_no_file_is_in_both_splits_and_provenance_tells_where_from(made):
    _, to, _ = made
    rows = {row["task_id"]: row for row in map(json.loads, (to / "provenance.jsonl").read_text().splitlines())}
    suite = tasks.load(config.Tasks(path=str(to), split="all"))
    assert list(rows) == [task.id for task in suite]
    files = {split: {rows[t.id]["file"] for t in suite if t.split == split} for split in ("train", "test")}
    assert not files["train"] & files["test"]
    assert all(row["package"] == "tiny-words" and row["version"] == "1.2" for row in rows.values())
    assert all(set(row["kinds"]) <= {*mutations.RULES, "missing_body", "naive_body"} for row in rows.values())


def test_equal_inputs_give_equal_packs(made, tmp_path):
    home, to, _ = made
    again = tmp_path / "again"
    ingest.ingest(config.Pack(), BOX, seed=0, to=again, source=source_of(home))

    def digests(place):
        paths = (p for p in sorted(place.rglob("*")) if p.is_file() and p.name not in ("index", "report.json"))
        return {str(p.relative_to(place)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

    assert digests(to) == digests(again)


def test_a_pack_of_bugs_keeps_its_settings(made):
    home, to, numbers = made
    again = ingest.ingest(config.Pack(), BOX, seed=0, to=to, source=source_of(home))
    assert again["tasks"] == numbers["tasks"]
    with pytest.raises(ValueError, match=r"source.seed=1: .* was made with source.seed=0"):
        ingest.ingest(config.Pack(), BOX, seed=0, to=to, source=source_of(home, seed=1))


def test_a_pack_made_when_the_key_had_another_name_is_still_known(tmp_path):
    cfg = config.Pack(count=1, held_out=0)
    ingest.ingest(cfg, BOX, seed=0, to=tmp_path / "pack")
    record = tmp_path / "pack" / "made_with.json"
    said = json.loads(record.read_text())
    said["pack.source"] = said.pop("source.kind")
    record.write_text(json.dumps(said))
    assert ingest.ingest(cfg, BOX, seed=0, to=tmp_path / "pack")["tasks"] == 1


def test_a_pack_may_be_moved_and_one_of_before_loads(made, tmp_path):
    _, to, _ = made
    shutil.copytree(to, tmp_path / "moved")
    suite = tasks.load(config.Tasks(path=str(tmp_path / "moved"), split="all"))
    assert {Path(task.site).parent for task in suite} == {tmp_path / "moved" / "sites"}
    assert all(Path(task.site, "sitecustomize.py").is_file() for task in suite)
    rows = [json.loads(line) for line in (to / "tasks.jsonl").read_text().splitlines()]
    assert all(row["site"].startswith("sites/") for row in rows)
    lines = [json.dumps({key: value for key, value in row.items() if key != "site"}) + "\n" for row in rows]
    (tmp_path / "moved" / "tasks.jsonl").write_text("".join(lines))
    assert {t.site for t in tasks.load(config.Tasks(path=str(tmp_path / "moved"), split="all"))} == {""}


def test_a_package_whose_tests_notice_nothing_is_an_error_in_one_line(tmp_path):
    files = {name: FILES[name] for name in ("pyproject.toml", "src/tiny/__init__.py", "src/tiny/text.py")}
    lay(tmp_path / "mute", files | {"tests/test_a.py": "def test_a():\n    pass\n\n\ndef test_b():\n    pass\n"})
    with pytest.raises(ValueError, match="no task holds") as error:
        ingest.ingest(config.Pack(), BOX, seed=0, to=tmp_path / "pack", source=source_of(tmp_path / "mute"))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "pack").exists()


def test_an_interrupted_run_tries_no_finished_package_again(tmp_path, monkeypatch):
    first = lay(tmp_path / "first", FILES)
    later = {**FILES, "pyproject.toml": FILES["pyproject.toml"].replace("tiny-words", "tiny-more")}
    source = source_of(f"{first},{lay(tmp_path / 'later', later)}", count=2)
    make, tried = ingest.factory.make, []

    async def one_alone(bench, *rest, **words):
        tried.append(bench.project.name)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return await make(bench, *rest, **words)

    monkeypatch.setattr(ingest.factory, "make", one_alone)
    to = tmp_path / "pack"
    with pytest.raises(KeyboardInterrupt):
        ingest.ingest(config.Pack(), BOX, seed=0, to=to, source=source)
    assert not to.exists()
    (tmp_path / ".pack.partial" / "repos" / "half-made").mkdir()
    assert ingest.ingest(config.Pack(), BOX, seed=0, to=to, source=source)["tasks"] == 4
    assert tried == ["tiny-words", "tiny-more", "tiny-more"]
    assert list(json.loads((to / "report.json").read_text())) == ["tiny-words", "tiny-more"]
    suite = tasks.load(config.Tasks(path=str(to), split="all"))
    assert sorted(path.name for path in (to / "repos").iterdir()) == sorted(task.id for task in suite)
    assert ingest.check(config.Pack(), BOX, path=to)["tasks"] == 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# --- the site ---------------------------------------------------------------------------------------------------------


def inside(spec, *commands):
    async def work():
        async with open_sandbox(spec, backend=BACKEND) as box:
            return [await box.exec(command) for command in commands]

    return asyncio.run(work())


def test_a_site_makes_packages_and_the_repository_importable_and_cannot_be_written(tmp_path):
    home = lay(tmp_path / "layer", {"src/mine/__init__.py": "from theirs import x\n"})
    layer.commit({home: True})
    project = fetch.fetch(str(lay(tmp_path / "p", {"src/mine/__init__.py": ""})), tmp_path / "tree", timeout_s=30)
    site = tmp_path / "site"
    fetch.furnish(project, site, timeout_s=30)
    (site / "theirs.py").write_text("x = 5\n")
    (site / "pytest.py").write_text("raise ImportError('not the runner')\n")
    words = ["-c", "import mine, pytest, importlib.metadata as m; print(mine.x, m.version('p'))"]
    spec = SandboxSpec(str(home), site=str(site))
    results = inside(spec, ["python", *words], ["python", "-P", *words], "cd /tmp && python " + f'-c "{words[1]}"')
    for done in results if BACKEND == "bwrap" else results[:0]:
        assert (done.exit_code, done.output) == (0, b"5 0\n")
    (done,) = inside(spec, ["python", "-P", "-c", "import mine; print(mine.x)"])
    assert (done.exit_code, done.output) == (0, b"5\n")
    if BACKEND == "bwrap":
        (done,) = inside(spec, "touch /opt/site/x")
        assert done.exit_code != 0
    (done,) = inside(dataclasses.replace(spec, site=""), ["python", "-c", "import theirs"])
    assert done.exit_code == 1
    with pytest.raises(ImageMissing, match="no such directory of packages"):
        inside(dataclasses.replace(spec, site=str(tmp_path / "none")), "true")


def test_a_site_holds_nothing_of_the_project_but_its_description(tmp_path):
    home = lay(tmp_path / "words", FILES)
    project = fetch.fetch(str(home), tmp_path / "tree", timeout_s=30)
    site = tmp_path / "site"
    fetch.furnish(project, site, timeout_s=30)
    found = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert found == {"sitecustomize.py", "tiny_words-1.2.dist-info/METADATA"}
    lay(
        site,
        {"tiny/__init__.py": "", "x/_vendor/tiny/text.py": "", "tiny_words-1.3.dist-info/RECORD": "", "x/y.py": ""},
    )
    fetch._remove(site, project)
    assert {str(p.relative_to(site)) for p in site.rglob("*.py")} == {"sitecustomize.py", "x/y.py"}


@pytest.mark.skipif(BACKEND != "bwrap", reason="bubblewrap is not installed")
def test_a_second_copy_of_the_project_in_the_sandbox_is_found(tmp_path):
    home = lay(tmp_path / "words", FILES)
    project = fetch.fetch(str(home), tmp_path / "tree", timeout_s=30)
    base, site = shutil.copytree(project.tree, tmp_path / "base"), lay(tmp_path / "site", {"a/b.py": ""})
    layer.commit({base: True})

    async def look():
        shop = factory.Workshop(project=project, layer=base, site=site, box=BOX, turn=asyncio.Semaphore(1))
        return await shop.second_copy()

    assert asyncio.run(look()) == ""
    lay(site, {"a/_vendor/tiny/text.py": ""})
    assert asyncio.run(look()) == "/opt/site/a/_vendor/tiny"


# --- what projects say of themselves ----------------------------------------------------------------------------------


def test_requirements_are_read_where_projects_write_them(tmp_path):
    toml = """[project]
name = "My.Pkg"
version = "2"
dependencies = ["six>=1", "tomli; python_version < '3'"]
[project.optional-dependencies]
test = ["pytest>=7", "hypothesis", "freezegun<2"]
docs = ["sphinx"]
[tool.pytest.ini_options]
addopts = "--cov=pkg --timeout=3"
"""
    lay(
        tmp_path / "p",
        {"pyproject.toml": toml, "pkg/__init__.py": "", "tests/requirements.txt": "mock==5  # old\n-r x\n"},
    )
    project = fetch.fetch(str(tmp_path / "p"), tmp_path / "tree", timeout_s=30)
    assert (project.name, project.version, project.modules, project.roots) == ("my-pkg", "2", ("pkg",), (".",))
    assert project.needs == ("six>=1",)
    assert project.tests == ("freezegun<2", "hypothesis", "mock==5", "pytest-cov", "pytest-timeout")


def test_only_tracked_files_of_a_repository_are_taken(tmp_path):
    lay(tmp_path / "p", {"a.py": "", "b.py": "", "tests/test_a.py": ""})
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "p", check=True, timeout=30)
    subprocess.run(["git", "add", "a.py", "tests"], cwd=tmp_path / "p", check=True, timeout=30)
    project = fetch.fetch(str(tmp_path / "p"), tmp_path / "tree", timeout_s=30)
    found = {str(path.relative_to(project.tree)) for path in project.tree.rglob("*") if path.is_file()}
    assert found == {"a.py", "tests/test_a.py"}


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"fast.c": "", "a.py": ""}, "fast.c: compiled modules"),
        ({"packaging/__init__.py": ""}, "a module packaging already"),
        ({"json/__init__.py": ""}, "a module json already"),
    ],
)
def test_projects_that_cannot_be_used_are_refused_in_one_line(tmp_path, files, complaint):
    lay(tmp_path / "p", files)
    with pytest.raises(ValueError, match=complaint) as error:
        fetch.fetch(str(tmp_path / "p"), tmp_path / "tree", timeout_s=30)
    assert str(error.value).startswith(f"source.package={tmp_path / 'p'}: ")
    assert len(str(error.value).splitlines()) == 1


def test_words_that_name_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a directory nor NAME"):
        fetch.fetch("./no/such", tmp_path / "tree", timeout_s=30)
    with pytest.raises(ValueError, match="names a twice"):
        fetch.words("a, b,a")
    with pytest.raises(ValueError, match=r"source.package is empty"):
        config.load(config.Run, ["model=x", "run_dir=y", "source.kind=inject"])
    with pytest.raises(ValueError, match=r"source.count=0: must be at least 1"):
        config.load(config.Run, ["model=x", "run_dir=y", "source.count=0"])


@pytest.mark.slow
def test_a_project_of_the_package_index_becomes_tasks(tmp_path):
    """Needs a package index."""
    words = ["source.kind=inject", "source.package=inflection==0.5.1", "source.count=4", f"tasks.path={tmp_path}/pack"]
    job = Path(__file__).resolve().parent.parent / "jobs" / "pack.py"
    command = [sys.executable, str(job), "model=x", f"run_dir={tmp_path}/run", *words]
    env = {"PYTHONPATH": str(job.parent.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "tasks 4" in done.stdout
