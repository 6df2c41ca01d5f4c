"""The bug factory: run a project's tests in sandboxes, put bugs into it, and keep those that some tests notice.

    survey    each test file alone, with the functions that its tests enter; then all of them together, as a grader runs
    try       the files that reach a function, on the file with a bug in it
    explain   a few of the broken tests again, with what they call and what comes of it: the issue is written from that

Results do not depend on which run ends first: bugs are tried in rounds of fixed size and judged in their order.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropo_ray import config, observe, sandbox
from entropo_ray.sandbox import SandboxError, SandboxSpec
from entropo_ray.tasks import fetch, inject, issues, layer, pack
from entropo_ray.tasks.fetch import Project
from entropo_ray.tasks.inject import Bug, Candidate, Injected, Shelf, Survey

_INSIDE = Path(__file__).with_name("factory_inside.py").read_text()
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "TZ": "UTC", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
_SAID_BYTES = 64 << 20
_START_S = 15.0  # of computing: an interpreter, pytest and the project's imports
_SLOWER = 4.0  # with functions traced, or a bug that makes things slow
_WAIT = 4.0  # how much longer a run may take on a busy machine than it computes
_FIND_S = 120.0
_HOMES = ("site-packages", "dist-packages", "_vendor", "opt/site")  # where a second copy of a module would lie
_ROUND = 8  # bugs tried at once
_SPARE = 1.2  # tasks made for each that is asked for, since not all of them hold
_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of tests said."""

    ended: bool
    output: str  # the end of what else was printed
    passed: frozenset[str] = frozenset()
    seconds: Mapping[str, float] = field(default_factory=dict)
    collected: tuple[str, ...] = ()
    uncollected: tuple[str, ...] = ()
    entered: Mapping[str, frozenset[tuple[str, int]]] = field(default_factory=dict)  # test -> (file, line)
    imported: frozenset[tuple[str, int]] = frozenset()
    why: tuple[Mapping[str, Any], ...] = ()


@dataclass(kw_only=True)
class Workshop:
    """One project on the bench."""

    project: Project
    layer: Path  # its repository layer, without a bug
    site: Path
    box: config.Sandbox
    turn: asyncio.Semaphore

    async def run(
        self,
        tests: Sequence[str],
        *,
        seconds: float,
        files: Mapping[str, str] | None = None,
        product: Sequence[str] = (),
        **asked: bool,
    ) -> Run:
        """Tests in a sandbox of their own; what they need beyond `seconds` is cut off. SandboxError if it dies."""
        nonce = secrets.token_hex(8)
        order: dict[str, Any] = {
            "nonce": nonce,
            "tests": list(tests),
            "files": dict(files or {}),
            "product": list(product),
        }
        order |= {"cpu_s": math.ceil(_START_S + _SLOWER * seconds)}
        order |= {"collect": False, "functions": False, "explain": False} | asked
        for tries_left in reversed(range(_TRIES)):
            try:
                return await self._run(nonce, order, seconds)
            except SandboxError as error:
                if not tries_left:
                    raise
                observe.log.info("%s: %s; %d tries left", self.project.name, error, tries_left)
        raise AssertionError("the last try returns or raises")

    async def second_copy(self) -> str:
        """Where a sandbox shows the project's modules once more, beside the repository; "" if nowhere."""
        homes = [f"*/{home}/{m}{end}" for m in self.project.modules for home in _HOMES for end in ("", ".py")]
        wanted = [word for pattern in homes for word in ("-o", "-path", pattern)][1:]
        async with self.turn, sandbox.open_sandbox(self._spec(_FIND_S), backend=self.box.backend) as box:
            search = ["/", "(", "-path", "/proc", "-o", "-path", "/testbed", ")", "-prune", "-o"]
            search += ["(", *wanted, ")", "-print", "-quit"]
            result = await box.exec(["bash", "-c", 'exec find "$@" 2>/dev/null', "find", *search])
        return result.output.decode(errors="replace").strip()

    def _spec(self, exec_s: float) -> SandboxSpec:
        return SandboxSpec(
            str(self.layer),
            site=str(self.site),
            env=_ENVIRONMENT,
            limits=sandbox.limits(self.box, exec_s=exec_s),
            labels={"role": "factory", "task": self.project.name},
            cluster=self.box.kubernetes,
        )

    async def _run(self, nonce: str, order: Mapping[str, Any], seconds: float) -> Run:
        spec = self._spec(_WAIT * (_START_S + _SLOWER * seconds))
        async with self.turn, sandbox.open_sandbox(spec, backend=self.box.backend) as box:
            words = ["python", "-P", "-c", _INSIDE]
            result = await box.exec(words, stdin=json.dumps(order).encode(), output_bytes=_SAID_BYTES)
        return read(result.output.decode(errors="replace"), nonce)


def read(output: str, nonce: str) -> Run:
    """The lines of the program inside."""
    said: dict[str, list[dict[str, Any]]] = {}
    rest = []
    for line in output.split("\n"):
        mark, _, words = line.partition("\t")
        if mark == nonce and words.endswith("}"):
            body = json.loads(words)
            said.setdefault(next(iter(body)) + ("/entered" if "entered" in body else ""), []).append(body)
        elif line.strip():
            rest.append(line.strip())
    places = {f["function"]: (f["file"], f["line"]) for f in said.get("function", [])}
    tests = said.get("test", [])
    return Run(
        ended="end" in said,
        output=" ".join(rest)[-300:],
        passed=frozenset(t["test"] for t in tests if t["passed"]),
        seconds={t["test"]: t["s"] for t in tests},
        collected=tuple(t for c in said.get("collected", []) for t in c["collected"]),
        uncollected=tuple(u["uncollected"] for u in said.get("uncollected", [])),
        entered={t["test"]: frozenset(places[n] for n in t["entered"]) for t in said.get("test/entered", [])},
        imported=frozenset(places[n] for i in said.get("imported", []) for n in i["imported"]),
        why=tuple(said.get("why", [])),
    )


async def survey(shop: Workshop, cfg: config.Source) -> Survey:
    """The tests that pass each time, in files that are quick enough. ValueError, one line, if there are none."""
    word = shop.project.word
    if copy := await shop.second_copy():
        raise ValueError(
            f"source.package={word}: {copy} holds it in every sandbox; remove that, or give another project"
        )
    found = await shop.run([], seconds=cfg.suite_s, collect=True)
    files = sorted({inject.file_of(test) for test in found.collected})
    files = [file for file in files if file.endswith(".py") and not inject.is_product(file) and _readable(shop, file)]
    if not files:
        why = found.uncollected[0] if found.uncollected else found.output
        raise ValueError(f"source.package={word}: no test was found in it; give a project with tests ({why})")
    alone = dict(zip(files, await asyncio.gather(*(_alone(shop, file, cfg) for file in files)), strict=True))
    whole = {file: run for file, run in alone.items() if run.ended and not run.uncollected and run.passed}
    together = await _together(shop, whole, cfg)
    kept = _within(together, list(whole), cfg)
    good = [t for f in kept for t in together.seconds if inject.file_of(t) == f and _plain(t)]
    good = [t for t in good if t in together.passed and t in whole[inject.file_of(t)].passed]
    if len(good) < 2:
        raise ValueError(
            f"source.package={word}: {len(good)} tests pass each time within source.file_s={cfg.file_s:g} and "
            f"source.suite_s={cfg.suite_s:g}; give another project, or more time ({together.output})"
        )
    entered: dict[tuple[str, int], list[str]] = {}
    for test in good:
        for place in whole[inject.file_of(test)].entered.get(test, ()):
            entered.setdefault(place, []).append(test)
    imported = frozenset(place for file in kept for place in whole[file].imported)
    return Survey(good=tuple(good), seconds=together.seconds, entered=entered, imported=imported)


def _readable(shop: Workshop, file: str) -> bool:
    try:
        (shop.project.tree / file).read_bytes().decode()
    except (UnicodeDecodeError, FileNotFoundError):
        return False
    return True


def _plain(test: str) -> bool:
    """Whether a test's id is one line that means the same in every run."""
    return test.isprintable() and " at 0x" not in test


async def _alone(shop: Workshop, file: str, cfg: config.Source) -> Run:
    return await shop.run([file], seconds=cfg.file_s, functions=True)


async def _together(shop: Workshop, whole: Mapping[str, Run], cfg: config.Source) -> Run:
    """As many files as fit, drawn by seed, in one run, as a grader would have it."""
    order = sorted(whole)
    random.Random(f"{cfg.seed}/{shop.project.name}/files").shuffle(order)
    chosen, cost = [], 0.0
    for file in order:
        seconds = sum(whole[file].seconds.values()) / 2  # functions were traced
        if seconds <= cfg.file_s and cost + seconds <= cfg.suite_s:
            chosen.append(file)
            cost += seconds
    return await shop.run(sorted(chosen), seconds=cfg.suite_s) if chosen else Run(ended=True, output="all are too slow")


def _within(together: Run, files: Sequence[str], cfg: config.Source) -> list[str]:
    """The files that are quick enough without a trace."""
    cost: Counter[str] = Counter()
    for test, seconds in together.seconds.items():
        cost[inject.file_of(test)] += seconds  # type: ignore[assignment]
    return [file for file in files if file in cost and cost[file] <= cfg.file_s]


async def make(shop: Workshop, cfg: config.Source, *, to: Path) -> tuple[list[Injected], dict[str, Any]]:
    """Tasks of a project, somewhat more than asked for, and what was tried; repositories are below `to`, uncommitted.

    ValueError, one line, if the project has no usable tests.
    """
    began = time.monotonic()
    seen = await survey(shop, cfg)
    stock = inject.stock(shop.project, seen, cfg)
    shelf, counts = Shelf(seen, cfg), Counter[str]()
    wanted, budget = round(cfg.count * _SPARE), cfg.count * cfg.tries
    product = sorted({path for path, _ in seen.entered if inject.is_product(path)})
    made: list[Injected] = []
    tried = 0
    with observe.progress(f"inject {shop.project.name}", budget) as counter:
        while tried < budget and len(made) < wanted:
            fair = (c for c in stock.candidates if not shelf.crowded(c))
            batch = list(itertools.islice(fair, min(_ROUND, budget - tried, wanted - len(made))))
            if not batch:
                break
            for one in await _round(shop, seen, shelf, batch, product):
                injected = (
                    one
                    if isinstance(one, str)
                    else inject.task(shop.project, seen, one, site=shop.site, seed=cfg.seed, to=to)
                )
                if isinstance(injected, Injected):
                    made.append(injected)
                else:
                    counts[injected or "no_issue"] += 1
                counter.step()
            tried += len(batch)
    return made, {
        "version": shop.project.version,
        "tests": len(seen.good),
        "suite_s": round(seen.cost_s(seen.files), 2),
        "functions": stock.functions,
        "found": stock.found,
        "tried": tried,
        "made": len(made),
        "refused": dict(sorted(counts.items())),
        "seconds": round(time.monotonic() - began, 1),
    }


async def _round(
    shop: Workshop, seen: Survey, shelf: Shelf, batch: Sequence[Candidate], product: Sequence[str]
) -> list[Bug | str]:
    """A bug, or why it is not kept, for each candidate."""
    runs = await asyncio.gather(
        *(shop.run(c.files, files={c.path: c.text}, seconds=seen.cost_s(c.files)) for c in batch)
    )
    found: list[Bug | str] = []
    for candidate, run in zip(batch, runs, strict=True):
        why = shelf.refuse(candidate, run.passed, ended=run.ended, collected=not run.uncollected)
        broken = inject.broken_tests(seen, candidate, run.passed)
        found.append(why or Bug(candidate=candidate, broken=broken))
    return await asyncio.gather(*(_explained(shop, seen, one, product) for one in found))


async def _explained(shop: Workshop, seen: Survey, one: Bug | str, product: Sequence[str]) -> Bug | str:
    if isinstance(one, str):
        return one
    tests = inject.easiest(seen, one.broken)
    bug = one.candidate
    run = await shop.run(
        tests, files={bug.path: bug.text}, seconds=seen.cost_s(bug.files), product=product, explain=True
    )
    return Bug(candidate=bug, broken=one.broken, symptoms=tuple(issues.symptom(said) for said in run.why))


def benches(cfg: config.Source, box: config.Sandbox, *, to: Path, scratch: Path) -> list[Workshop]:
    """Every package of the configuration, fetched, furnished below `to`, and ready for its survey.

    ValueError, one line, for the first that is not to be had, so that nothing is tried in vain.
    """
    turn = asyncio.Semaphore(len(os.sched_getaffinity(0)) + 1)  # starting a run waits for files now and then
    found: list[Workshop] = []
    words = fetch.words(cfg.package)
    counter = observe.progress("fetch", len(words))
    for number, word in enumerate(words):
        tree = scratch / f"tree-{number}"
        tree.mkdir()
        project = fetch.fetch(word, tree, timeout_s=cfg.fetch_s)
        if not any(bench.project.name == project.name for bench in found):
            site = pack.site(to, project.digest)
            for requirement in fetch.furnish(project, site, timeout_s=cfg.fetch_s):
                observe.log.info("%s: %s is not to be had; tests that need it are left out", word, requirement)
            base = scratch / f"layer-{number}"
            shutil.copytree(tree, base)
            layer.commit({base: True}, ignored=True)
            found.append(Workshop(project=project, layer=base, site=site, box=box, turn=turn))
            counter.step()
        else:
            raise ValueError(f"source.package={cfg.package}: {word} is {project.name}, which is there already")
    return found


def refusals(report: Mapping[str, Mapping[str, Any]]) -> Counter[str]:
    """Reason -> bugs that were not kept, over all packages of a report."""
    counts: Counter[str] = Counter()
    for facts in report.values():
        counts.update(facts.get("refused", {}))
    return counts
