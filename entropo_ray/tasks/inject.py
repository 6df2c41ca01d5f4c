"""Tasks from any Python project: which bug to try in which function, which to keep, and the task that it becomes.

What runs is elsewhere: the survey of a project's tests comes in, and what a mutant's run said. A hidden test is one
that the bug breaks; the files that hold such tests are taken out of the repository and come back for the grader.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from entropo_ray import config
from entropo_ray.records import Answer, File, Task, from_row, to_row
from entropo_ray.tasks import diffs, issues, mutations
from entropo_ray.tasks.fetch import Project
from entropo_ray.tasks.mutations import Code, Function, Mutation
from entropo_ray.tasks.pack import Mined, repository

_SOURCE_BYTES = 400_000  # of a module; larger ones are tables
_MOST = 0.5  # a bug that breaks more of the tests than this is no bug but a ruin
_NOT_PRODUCT = {"test", "tests", "testing", "docs", "doc", "examples", "benchmark", "benchmarks", "bench", "build"}
_NOT_PRODUCT |= {"scripts", "tools", "ci", "dev", "tasks.py", "setup.py", "conftest.py", "noxfile.py"}


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a project's tests are and reach, seen without a bug."""

    good: tuple[str, ...]  # passed in every run, in order
    seconds: Mapping[str, float]  # of each good test
    entered: Mapping[tuple[str, int], Collection[str]]  # (file, line of a code object) -> tests that ran it
    imported: Collection[tuple[str, int]]  # those that ran while tests were imported

    @property
    def files(self) -> list[str]:
        return sorted({file_of(test) for test in self.good})

    def cost_s(self, files: Collection[str]) -> float:
        return sum(s for test, s in self.seconds.items() if file_of(test) in files)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A bug to try."""

    path: str
    function: str
    mutation: Mutation
    text: str  # the whole file with the bug in it
    files: tuple[str, ...]  # test files that reach the function


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A candidate that some tests notice."""

    candidate: Candidate
    broken: tuple[str, ...]
    symptoms: tuple[issues.Symptom, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Injected:
    """A task, its answer, and whence it comes."""

    mined: Mined
    provenance: dict[str, Any]

    @property
    def group(self) -> tuple[str, str]:
        return self.provenance["package"], self.provenance["file"]

    def in_split(self, split: str) -> Injected:
        return replace(self, mined=replace(self.mined, task=replace(self.mined.task, split=split)))


def row(one: Injected) -> dict[str, Any]:
    """As JSON has it, whole."""
    return {"task": to_row(one.mined.task), "answer": to_row(one.mined.answer), "provenance": one.provenance}


def of_row(said: Mapping[str, Any]) -> Injected:
    """The way back from `row`."""
    mined = Mined(from_row(Task, said["task"]), from_row(Answer, said["answer"]))
    return Injected(mined=mined, provenance=said["provenance"])


def file_of(test: str) -> str:
    return test.partition("::")[0]


def is_product(path: str) -> bool:
    """Whether a file of a project is neither test nor tool, as far as its name tells."""
    pure = PurePosixPath(path)
    test = (
        pure.name.startswith("test_") or pure.stem.endswith(("_test", "_tests")) or pure.name in ("test.py", "tests.py")
    )
    return pure.suffix == ".py" and not test and not _NOT_PRODUCT & set(pure.parts)


# Candidates


@dataclass(frozen=True)
class _Site:
    """One function and the bugs that are left to try in it, best drawn first."""

    path: str
    function: Function
    code: Code
    files: tuple[str, ...]
    left: list[Mutation] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Stock:
    """All bugs that a project offers."""

    functions: int  # that tests reach
    found: int  # mistakes that the rules know for them
    candidates: Iterator[Candidate]  # functions in turn, kinds mixed, the same for a seed


def stock(project: Project, survey: Survey, cfg: config.Source) -> Stock:
    """What can be tried in the functions that the tests reach."""
    places = list(_places(project, survey, cfg.seed))
    random.Random(f"{cfg.seed}/{project.name}/functions").shuffle(places)
    found = sum(len(place.left) for place in places)
    return Stock(functions=len(places), found=found, candidates=_candidates(places, cfg))


def _places(project: Project, survey: Survey, seed: int) -> Iterator[_Site]:
    reached = {path for path, _ in survey.entered if is_product(path)}
    for path in sorted(reached):
        try:
            text = (project.tree / path).read_bytes().decode()
            code = Code(text)
        except (UnicodeDecodeError, SyntaxError, FileNotFoundError):
            continue
        if "\r" in text or len(text) > _SOURCE_BYTES:
            continue
        for function in mutations.functions(code):
            inside = [key for key in survey.entered if key[0] == path and function.first <= key[1] <= function.last]
            files = {file_of(test) for key in inside for test in survey.entered[key]}
            if any((path, key[1]) in survey.imported for key in inside):
                files = set(survey.files)  # what runs while tests are imported may break any of them
            if files:
                found = mutations.mutations(code, function)
                rng = random.Random(f"{seed}/{project.name}/{path}/{function.name}")
                yield _Site(path, function, code, tuple(sorted(files)), _mixed(found, rng))


def _mixed(found: Sequence[Mutation], rng: random.Random) -> list[Mutation]:
    """One of each kind, then a second of each, and so on: kinds that a text offers often come no sooner."""
    kinds = list(dict.fromkeys(mutation.kind for mutation in found))
    rng.shuffle(kinds)
    turn: Counter[str] = Counter()
    ranked: list[tuple[int, int, Mutation]] = []
    for mutation in rng.sample(found, len(found)):
        ranked.append((turn[mutation.kind], kinds.index(mutation.kind), mutation))
        turn[mutation.kind] += 1
    return [mutation for _, _, mutation in sorted(ranked, key=lambda r: r[:2])]


def _candidates(places: Sequence[_Site], cfg: config.Source) -> Iterator[Candidate]:
    rng = random.Random(f"{cfg.seed}/candidates")
    seen: set[tuple[str, str]] = set()
    while any(place.left for place in places):
        for place in places:
            if not place.left:
                continue
            mutation = place.left.pop(0)
            if place.left and rng.random() < cfg.combined:
                mutation = mutations.together(mutation, rng.choice(place.left)) or mutation
            text = mutations.mutated(place.code, mutation)
            if text is not None and (place.path, text) not in seen:
                seen.add((place.path, text))
                yield Candidate(
                    path=place.path, function=place.function.name, mutation=mutation, text=text, files=place.files
                )


# What is kept


class Shelf:
    """The bugs of one project that are kept, no two alike."""

    def __init__(self, survey: Survey, cfg: config.Source) -> None:
        self._survey, self._cfg = survey, cfg
        self._of_function: Counter[tuple[str, str]] = Counter()
        self._seen: set[object] = set()

    def crowded(self, candidate: Candidate) -> bool:
        return self._of_function[candidate.path, candidate.function] >= self._cfg.per_function

    def refuse(self, candidate: Candidate, passed: Collection[str], *, ended: bool, collected: bool) -> str:
        """Why a bug is not kept, seen from the tests that still passed in the files that reach it; "" if it is."""
        broken = broken_tests(self._survey, candidate, passed)
        if not ended:
            return "no_end"
        if not collected:
            return "breaks_import"
        if not broken:
            return "unnoticed"
        if len(broken) > max(1, _MOST * len(self._survey.good)):
            return "breaks_most"
        if self.crowded(candidate):
            return "crowded"
        place = (candidate.path, candidate.function)
        # the same failures of the same function teach the same, and so does the same mistake in the same line
        signs = [(*place, broken), (*place, candidate.mutation.kind, candidate.mutation.line)]
        if any(sign in self._seen for sign in signs):
            return "alike"
        self._seen.update(signs)
        self._of_function[place] += 1
        return ""


def broken_tests(survey: Survey, candidate: Candidate, passed: Collection[str]) -> tuple[str, ...]:
    return tuple(t for t in survey.good if file_of(t) in candidate.files and t not in passed)


def easiest(survey: Survey, broken: Sequence[str], number: int = 4) -> list[str]:
    """Those of the broken tests that enter the fewest functions, which tend to show a bug best."""
    entered = Counter(test for tests in survey.entered.values() for test in tests)
    return sorted(broken, key=lambda test: (entered[test], survey.good.index(test)))[:number]


# Tasks


def task(project: Project, survey: Survey, bug: Bug, *, site: Path, seed: int, to: Path) -> Injected | None:
    """The task of a bug, its repository below `to` not yet committed; None if no issue can be written."""
    candidate = bug.candidate
    patch = diffs.between(candidate.path, candidate.text, (project.tree / candidate.path).read_bytes().decode())
    key = hashlib.blake2b(patch.encode(), digest_size=5).hexdigest()
    task_id = f"inject-{project.name}-{project.version}-{key}"
    hidden = sorted({file_of(test) for test in bug.broken})
    texts = {path: (project.tree / path).read_bytes().decode() for path in hidden}
    rng = random.Random(f"{seed}/{task_id}/issue")
    problem = issues.write(bug.symptoms, list(texts.values()), sorted(_names(bug.broken)), rng)
    if problem is None:
        return None
    home = repository(to, task_id)
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(project.tree, home)
    (home / candidate.path).write_bytes(candidate.text.encode())
    for path in hidden:
        (home / path).unlink()
    visible = tuple(test for test in survey.good if file_of(test) not in texts)
    still = tuple(test for test in survey.good if file_of(test) in texts and test not in bug.broken)
    made = Task(
        id=task_id,
        source="inject",
        split="train",
        repo=f"{project.name}-{project.version}",
        image=str(home),
        workdir="/testbed",
        problem=problem,
        test_command="python -m pytest -q",
        visible=visible,
        site=str(site),
    )
    answer = Answer(
        task_id=task_id,
        patch=patch,
        alternatives=(),
        files=tuple(File(path=path, text=text) for path, text in texts.items()),
        script=f"python -m pytest -rA -q --tb=short -p no:cacheprovider {' '.join(hidden)}\n",
        parser="pytest",
        fail_to_pass=bug.broken,
        pass_to_pass=(*still, *visible),
        expected_failures=(),
    )
    return Injected(mined=Mined(made, answer), provenance=_provenance(project, bug, task_id, seed))


def _names(tests: Sequence[str]) -> set[str]:
    """Words that only somebody knows who saw the tests: their names, their classes, their files."""
    words = {part.partition("[")[0] for test in tests for part in test.split("::")[1:]}
    return words | {PurePosixPath(file_of(test)).stem for test in tests}


def _provenance(project: Project, bug: Bug, task_id: str, seed: int) -> dict[str, Any]:
    candidate = bug.candidate
    return {
        "task_id": task_id,
        "package": project.name,
        "version": project.version,
        "file": candidate.path,
        "function": candidate.function,
        "line": candidate.mutation.line,
        "kinds": candidate.mutation.kind.split("+"),
        "broken": len(bug.broken),
        "seed": seed,
    }


def split(made: Sequence[Injected], cfg: config.Source) -> list[Injected]:
    """Whole files or packages to the test split until its share is reached, in an order drawn by seed."""

    def group(one: Injected) -> tuple[str, ...]:
        return one.group if cfg.held_out_by == "file" else one.group[:1]

    size = Counter(group(one) for one in made)
    order = sorted(size)
    random.Random(f"{cfg.seed}/held_out").shuffle(order)
    room = cfg.held_out * len(made)
    test: set[tuple[str, ...]] = set()
    for name in order:
        if size[name] <= room and len(size) > 1:
            test.add(name)
            room -= size[name]
    return [one.in_split("test" if group(one) in test else "train") for one in made]
