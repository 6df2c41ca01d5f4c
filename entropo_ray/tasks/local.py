"""The local pack: small Python packages with real tests, one injected bug each, made from a seed.

Three kinds of task. Plain: the docstring says what is right. Ambiguous: either of two helpers could be at fault, and
only the tests say which. Riddle: the issue leaves open what is wanted, and no visible test decides it.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entropo_ray.records import Answer, File, Task
from entropo_ray.tasks import diffs, layer
from entropo_ray.tasks.families import FAMILIES, PAIRS, RIDDLES
from entropo_ray.tasks.forms import Family, Pair, Riddle, edit, fill
from entropo_ray.tasks.pack import PRACTICE, Mined, repository
from entropo_ray.tasks.problems import Case, Cases, Problem, Program, neighbour, part, pose

Kind = Family | Pair | Riddle

_ADJECTIVES = (
    "amber blue bold brave bright brisk calm clear cool crisp deep fair fast firm fresh gentle glad golden grand green "
    "happy keen kind light lucky mild neat noble plain proud quick quiet rapid red rich sharp silver small soft solid "
    "steady still strong sunny swift tall tidy warm white wise young agile airy ample austere breezy busy candid "
    "careful cheery civil clever daring dear dense early easy eager exact fancy fine frank frosty fuzzy giant "
    "grey handy humble jolly loyal lunar merry modest mossy nimble polar royal rustic"
)
_NOUNS = (
    "anchor barn basket beacon bridge cabin canal castle cedar cellar clock comet corner desk dock engine field forest "
    "garden gate harbor hill island kettle ladder lake lantern library market meadow mill orchard paper pier pocket "
    "pond quarry river school shelf ship sailor station stone table tower train valley wagon window"
)
_MODULES = {
    "number": ("calc", "maths", "figures", "measure"),
    "list": ("lists", "rows", "items", "batch"),
    "text": ("text", "strings", "titles", "labels"),
    "table": ("tables", "records", "fields", "store"),
}
_SCRIPT = "python -m pytest -rA -q --tb=short -p no:cacheprovider tests\n"
_TRIES = 200

_OPENINGS = (  # {says}, {f} the function, {path}, {call}, {is_} what it does, {want}
    "{says} `{call}` {is_}, it should be {want}. The function `{f}` is in\n./{path}",
    "`{f}` looks wrong. {says} For example `{call}` {is_} instead of {want}.\n./{path}",
    "{says}\n\nI called `{f}`: `{call}` {is_}, but I expected {want}. It is in\n./{path}",
    "Problem with `{f}`: {says} `{call}` {is_} where {want} is right. See\n./{path}",
    "I think there is a bug in `{f}`. {says} `{call}` {is_} and not {want}.\n./{path}",
    "Since the last release `{f}` misbehaves. {says} `{call}` {is_}, we need {want}. File:\n./{path}",
)
_BARE_OPENINGS = (  # without the path: the file has to be searched for
    "`{f}` is broken. {says} For example `{call}` {is_}, I expected {want}.",
    "{says} I traced it to `{f}`: `{call}` {is_} instead of {want}.",
)
_BARE_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A file of functions and its visible tests."""

    package: str
    name: str
    before: Program  # functions above those at stake
    after: Program
    cases: tuple[Case, ...]  # visible, of all its functions

    @property
    def path(self) -> str:
        return f"{self.package}/{self.name}.py"

    def text(self, program: Program = ()) -> str:
        """The file with a program in its place."""
        title = f'"""Functions for {self.name}."""'
        return "\n\n\n".join((title, *self.before, *program, *self.after)) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """What earlier tasks are made of: no file twice, and no function under repair in both splits."""

    files: set[str]
    programs: dict[Program, str]  # -> its split

    def take(self, file: str, program: Program, split: str) -> bool:
        """Whether a task of this split may have them; if so it has."""
        if file in self.files or self.programs.setdefault(program, split) != split:
            return False
        self.files.add(file)
        return True


def generate(
    *,
    count: int,
    held_out: int,
    ambiguous: float,
    hidden: float,
    seed: int,
    to: Path,
    practice: int = 0,
    families: int | None = None,
) -> list[Mined]:
    """`count` training, `held_out` test and `practice` tasks; their repositories are written below `to`/repos.

    Practice tasks are files in an empty repository, without a commit: nobody reads a patch of them.
    The same arguments give the same bytes (indexes of git apart). `ambiguous` and `hidden` are shares of each split;
    plain tasks are of the first `families` families (None: all).
    Raises ValueError when more tasks are asked for than there are words to make them of, or families than there are.
    """
    if families is not None and not 1 <= families <= len(FAMILIES):
        raise ValueError(f"pack.families={families}: the local source has 1 to {len(FAMILIES)}")
    names = _names(seed)
    drawn = _Drawn(files=set(), programs={})
    mined: list[Mined] = []
    names[PRACTICE] = names["train"][count:]
    for split, size in (("train", count), ("test", held_out), (PRACTICE, practice)):
        if size > len(names[split]):
            raise ValueError(f"pack: {size} {split} tasks: the local source has names for {len(names[split])} at most")
        kinds = _kinds(
            size, FAMILIES[:families], ambiguous=ambiguous, hidden=hidden, rng=random.Random(f"{seed}/{split}/kinds")
        )
        for name, family in zip(names[split], kinds, strict=False):
            mined.append(_task(name, split, family, seed=seed, drawn=drawn, to=to))
    # nobody reads a patch of practice, and two processes a task are half of a pack's time
    layer.commit({Path(m.task.image): m.task.split != PRACTICE for m in mined})
    return mined


def _names(seed: int) -> dict[str, list[tuple[str, str]]]:
    """Repository names of each split in a random order: every third pair of words is a test name."""
    rng = random.Random(f"{seed}/names")
    names: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for i, adjective in enumerate(_ADJECTIVES.split()):
        for j, noun in enumerate(_NOUNS.split()):
            names["test" if (i + j) % 3 == 0 else "train"].append((adjective, noun))
    for split in names.values():
        rng.shuffle(split)
    return names


def _kinds(
    size: int, plain_families: Sequence[Family], *, ambiguous: float, hidden: float, rng: random.Random
) -> list[Kind]:
    """The family of each task: every family as often as any other of its kind, give or take one."""
    pairs, riddles = round(size * ambiguous), round(size * hidden)
    plain = max(size - pairs - riddles, 0)
    kinds: list[Kind] = []
    for number, families in ((plain, plain_families), (pairs, PAIRS), (riddles, RIDDLES)):
        kinds += _even(number, families, rng)
    rng.shuffle(kinds)
    return kinds


def _even(number: int, families: Sequence[Any], rng: random.Random) -> list[Any]:
    drawn: list[Any] = []
    while len(drawn) < number:
        drawn += rng.sample(families, len(families))
    return drawn[:number]


def _task(name: tuple[str, str], split: str, family: Kind, *, seed: int, drawn: _Drawn, to: Path) -> Mined:
    """One task and its repository. Tries other words until the file is new and the bug's lines are unique in it."""
    label = "-".join(name)
    rng = random.Random(f"{seed}/{split}/{label}/text")
    fate = random.Random(f"{seed}/{split}/{label}/answer")  # apart, so that no text tells the hidden choice
    for _ in range(_TRIES):
        problem = pose(family, rng, fate)
        cases = part(problem, rng)
        modules = _modules(name[1], problem, cases, rng)
        source = modules[0].text(problem.broken)
        old, _ = edit(source, modules[0].text(problem.right))
        if "\n" not in old and drawn.take(source, problem.broken, split):
            task = _public(label, split, problem, cases, modules, rng, to)
            return Mined(task=task, answer=_answer(task, problem, cases, modules[0]))
    raise ValueError(f"pack: too many tasks: no new one of the family {family.name} in {_TRIES} tries; ask for fewer")


def _modules(package: str, problem: Problem, cases: Cases, rng: random.Random) -> list[Module]:
    """The modules of a package, that of the problem first; no two functions share a name."""
    taken = {function for function, _ in problem.calls}
    first = (problem.topic, rng.choice(_MODULES[problem.topic]))
    others = [(topic, name) for topic, names in _MODULES.items() for name in names if (topic, name) != first]
    number = rng.choices((1, 2, 3, 4, 5), (5, 5, 3, 2, 1))[0]
    modules: list[Module] = []
    for topic, name in (first, *rng.sample(others, number)):
        size = rng.choice((2, 3) if modules else (0,) if len(problem.right) > 1 else (0, 0, 1))
        # a right function of the family at fault would show the answer
        families = [f for f in FAMILIES if f.topic == topic and f.name != problem.family]
        before, after, tests = _neighbours(families, size, taken, rng)
        tests = tests if modules else cases.visible + tests
        modules.append(Module(package=package, name=name, before=before, after=after, cases=tests))
    return modules


def _neighbours(
    families: Sequence[Family], size: int, taken: set[str], rng: random.Random
) -> tuple[Program, Program, tuple[Case, ...]]:
    """Right functions to stand above and below a program, with their tests; `taken` grows by their names."""
    places: tuple[list[str], list[str]] = ([], [])
    tests: list[Case] = []
    for family in rng.sample(families, min(size, len(families))):
        function, text, cases = neighbour(family, rng)
        if function in taken:
            continue
        taken.add(function)
        rng.choice(places).append(text)
        tests += cases
    return tuple(places[0]), tuple(places[1]), tuple(tests)


def _public(
    label: str, split: str, problem: Problem, cases: Cases, modules: list[Module], rng: random.Random, to: Path
) -> Task:
    """The task, and its repository on disk, not yet committed."""
    task_id = f"local-{label}"
    home = repository(to, task_id)
    shutil.rmtree(home, ignore_errors=True)
    files = _files(label, problem, modules)
    for path, text in files.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(text, encoding="utf-8")
    return Task(
        id=task_id,
        source="local",
        split=split,
        repo=label,
        image=str(home),
        workdir="/testbed",
        problem=issue(problem, cases, modules[0].path, rng),
        test_command="python -m pytest -q",
        visible=tuple(test for m in modules for test in _ids(_visible_path(m), m.cases)),
    )


def _files(label: str, problem: Problem, modules: list[Module]) -> dict[str, str]:
    files = {
        "README.md": f"# {label}\n\nSmall functions. Tests: `python -m pytest -q`.\n",
        ".gitignore": "__pycache__/\n.pytest_cache/\n",
        f"{modules[0].package}/__init__.py": f'"""The package of {label}."""\n',
    }
    for module in modules:
        files[module.path] = module.text(problem.broken if module is modules[0] else ())
        if module.cases:
            files[_visible_path(module)] = tests_text(module, module.cases, "")
    return files


def _answer(task: Task, problem: Problem, cases: Cases, module: Module) -> Answer:
    path = f"tests/test_hidden_{module.name}.py"
    hidden = cases.failing + cases.passing
    ids = _ids(path, hidden, "hidden_")
    before = module.text(problem.broken)
    return Answer(
        task_id=task.id,
        patch=diffs.between(module.path, before, module.text(problem.right)),
        alternatives=tuple(diffs.between(module.path, before, module.text(p)) for p in problem.same),
        files=(File(path=path, text=tests_text(module, hidden, "hidden_")),),
        script=_SCRIPT,
        parser="pytest",
        fail_to_pass=tuple(ids[: len(cases.failing)]),
        pass_to_pass=(*ids[len(cases.failing) :], *task.visible),
        expected_failures=(),
    )


def issue(problem: Problem, cases: Cases, path: str, rng: random.Random) -> str:
    """What somebody writes who met the bug."""
    call, now = show(cases.example.call), cases.now
    if problem.secret:
        result = f"`{now[1]!r}`" if now[0] == "returns" else f"raises {now[1]}"
        return fill(problem.says, {"p": path, "q": call, "r": result})
    opening = rng.choice(_BARE_OPENINGS if rng.random() < _BARE_SHARE else _OPENINGS)
    is_ = f"{now[0]} `{now[1]!r}`" if now[0] == "returns" else f"raises {now[1]}"
    return opening.format(
        says=problem.says, f=problem.told, path=path, call=call, is_=is_, want=f"`{cases.example.want!r}`"
    )


def show(call: tuple[str, tuple[Any, ...]]) -> str:
    """A call as source text."""
    return f"{call[0]}({', '.join(map(repr, call[1]))})"


def tests_text(module: Module, cases: Sequence[Case], prefix: str) -> str:
    """A file of tests, one call in each; the prefix keeps the names of hidden tests out of the repository."""
    functions = sorted({case.call[0] for case in cases})
    parts = [f"from {module.package}.{module.name} import {', '.join(functions)}"]
    for name, case in zip(_test_names(cases, prefix), cases, strict=True):
        equal = "is" if case.want is None or isinstance(case.want, bool) else "=="
        parts.append(f"def {name}():\n    assert {show(case.call)} {equal} {case.want!r}")
    return "\n\n\n".join(parts) + "\n"


def _test_names(cases: Iterable[Case], prefix: str = "") -> list[str]:
    """test_<function>_1, test_<function>_2 ..."""
    number: Counter[str] = Counter()
    names: list[str] = []
    for case in cases:
        number[case.call[0]] += 1
        names.append(f"test_{prefix}{case.call[0]}_{number[case.call[0]]}")
    return names


def _visible_path(module: Module) -> str:
    return f"tests/test_{module.name}.py"


def _ids(path: str, cases: Sequence[Case], prefix: str = "") -> list[str]:
    return [f"{path}::{name}" for name in _test_names(cases, prefix)]
