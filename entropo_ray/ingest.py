"""Task packs: make the tasks of a source, prove each in sandboxes, and keep the pack only if they hold.

A pack is made beside its place and renamed, so that a pack that exists is a pack that was proved. The local source
knows its answers, so one task that does not hold is a defect; of injected bugs and of rows of public data sets those
that do not hold are left out.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from entropo_ray import config, curate, factory, grade, observe, sandbox, store, tasks
from entropo_ray.records import Task, digest
from entropo_ray.sandbox import SandboxError, docker, kubernetes
from entropo_ray.tasks import inject, layer, local, pack, rows
from entropo_ray.tasks.inject import Injected

Prove = Callable[[Task], Awaitable[list[str]]]  # reasons to refuse a task

_MADE_WITH = "made_with.json"
_TRIES = 3  # times that a validation lost to a sandbox is asked for


def ingest(
    cfg: config.Pack, box: config.Sandbox, *, seed: int, to: Path, source: config.Source | None = None
) -> dict[str, float]:
    """Make the pack at `to`, unless it is there already; how many tasks it holds and how many were refused.

    ValueError, one line: a task of the local source that does not hold, no task of another that does, `to` is in the
    way or was made with other settings, a package that is not to be had, no sandbox.
    """
    source = source or config.Source()
    settings = _settings(cfg, source, seed)
    if store.done(to):
        _same(settings, to)
        return _numbers(len(pack.tasks(to)))
    if to.exists() and any(to.iterdir()):
        raise ValueError(f"tasks.path={to}: exists and is no whole pack; remove it, or name another place")
    if source.kind == "rows" and box.backend != "docker":
        raise ValueError(
            f"rollout.sandbox.backend={box.backend}: source.kind=rows has tasks that live in Docker images; give docker"
        )
    if source.kind != "rows" and box.backend != "bwrap":
        raise ValueError(
            f"rollout.sandbox.backend={box.backend}: source.kind={source.kind} makes directories, not images; give "
            "bwrap, or tasks.path of a pack whose images are to be had there"
        )
    _ready(box)
    journal = curate.Journal(to.with_name(f".{to.name}.journal"))
    if source.kind == "local":
        numbers = _local(cfg, box, seed=seed, to=(partial := store.fresh(to)))
    elif source.kind == "rows":
        numbers = asyncio.run(_rows(cfg, source, box, journal, partial := store.fresh(to)))
    else:
        numbers = asyncio.run(_inject(cfg, source, box, journal, partial := store.beside(to)))
    (partial / _MADE_WITH).write_text(json.dumps(settings) + "\n")
    partial.replace(to)
    journal.close()
    return numbers


def _local(cfg: config.Pack, box: config.Sandbox, *, seed: int, to: Path) -> dict[str, float]:
    mined = local.generate(
        count=cfg.count,
        held_out=cfg.held_out,
        ambiguous=cfg.ambiguous,
        hidden=cfg.hidden,
        seed=seed,
        to=to,
        practice=cfg.practice,
        families=cfg.families,
    )
    answers = {m.task.id: m.answer for m in mined if m.task.split != pack.PRACTICE}

    async def prove(task: Task) -> list[str]:
        return await grade.validate(task, answers[task.id], box, runs=cfg.runs)

    _all_hold([m.task for m in mined if m.task.id in answers], prove, where="source.kind=local")
    tasks.write(to, mined)
    return _numbers(len(mined))


async def _inject(
    cfg: config.Pack, source: config.Source, box: config.Sandbox, journal: curate.Journal, to: Path
) -> dict[str, float]:
    """Tasks of every package, those alone that hold; provenance.jsonl and report.json tell the rest.

    A package that an interrupted run had finished is not tried again.
    """
    report: dict[str, Any] = {}
    kept: list[Injected] = []
    same = {key: value for key, value in config.section(source).items() if key not in ("package", "fetch_s")}
    version = json.dumps([grade.GRADER_VERSION, cfg.runs, config.section(box), same])
    with tempfile.TemporaryDirectory() as scratch:
        benches = factory.benches(source, box, to=to, scratch=Path(scratch))
        for bench in benches:
            key = digest(version, bench.project.digest, layer.digest(bench.project.tree))
            if not (said := journal.get(key)):
                try:
                    held, facts = await _package(cfg, source, box, bench, to)
                except ValueError as error:  # one package without usable tests does not spoil the others
                    if len(benches) == 1:
                        raise
                    observe.log.info("%s", error)
                    said = {"facts": {"kept": 0, "error": str(error), "refused": {}}, "tasks": []}
                else:
                    said = journal.put(key, facts=facts, tasks=[inject.row(one) for one in held])
            report[bench.project.name] = said["facts"]
            kept += map(inject.of_row, said["tasks"])
    if not kept:
        reasons = "; ".join(str(facts.get("error") or facts["refused"]) for facts in report.values())
        raise ValueError(
            f"source.package={source.package}: no task holds: {reasons}; give other packages or more tries"
        )
    kept = inject.split(kept, source)
    pack.sweep(to, [one.mined.task for one in kept])
    pack.lines(to / "provenance.jsonl", (one.provenance for one in kept))
    (to / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    tasks.write(to, [one.mined for one in kept])
    refused = Counter(factory.refusals(report))
    test = sum(one.mined.task.split == "test" for one in kept)
    return _numbers(len(kept), refused) | {"test": float(test)}


async def _package(
    cfg: config.Pack, source: config.Source, box: config.Sandbox, bench: factory.Workshop, to: Path
) -> tuple[list[Injected], dict[str, Any]]:
    """The tasks of one package that hold, and what was tried. ValueError, one line, if it has no usable tests."""
    spare, facts = await factory.make(bench, source, to=to)
    began = time.monotonic()
    held: list[Injected] = []
    while spare and len(held) < source.count:
        wanted = source.count - len(held)
        held += await _holding(spare[:wanted], box, runs=cfg.runs, facts=facts)
        spare = spare[wanted:]
    facts |= {"kept": len(held), "spare": len(spare), "validate_s": round(time.monotonic() - began, 1)}
    observe.log.info("%s: %s", bench.project.name, json.dumps(facts))
    return held, facts


async def _rows(
    cfg: config.Pack, source: config.Source, box: config.Sandbox, journal: curate.Journal, to: Path
) -> dict[str, float]:
    """Tasks of public data sets, those alone that hold; provenance.jsonl and report.json tell the rest."""
    unread: dict[str, str] = {}
    names = rows.Images(templates=source.images, mirror=source.mirror)
    mined = rows.read(source.rows, images=names, held_out=source.held_out, seed=source.seed, refused=unread)
    if mined and Path(mined[0].task.image).is_absolute():
        raise ValueError(f"source.rows={source.rows}: a pack of directories is used as it is; give it as tasks.path")
    mined = _parsed(mined[: source.limit], unread)

    async def prove(m: pack.Mined) -> pack.Ruling:
        return await grade.settle(m.task, m.answer, box, runs=cfg.runs)

    version = json.dumps([grade.GRADER_VERSION, cfg.runs, config.section(box)])
    found = await curate.Curator(source, journal, prove, version=version).curate(mined)
    said = curate.report(found, unread)
    kept = [outcome for outcome in found if not outcome.reasons]
    if not kept:
        reasons = [outcome.reasons[0] for outcome in found] + list(unread.values())
        raise ValueError(
            f"source.rows={source.rows}: no task holds, of {len(reasons)}: {reasons[0] if reasons else ''}"
        )
    pack.lines(to / "provenance.jsonl", (dict(outcome.facts) for outcome in kept))
    (to / "report.json").write_text(json.dumps(said, indent=1) + "\n")
    tasks.write(to, [outcome.mined for outcome in kept])
    test = sum(outcome.mined.task.split == "test" for outcome in kept)
    return _numbers(len(kept), curate.refusals(said)) | {"test": float(test)}


def _parsed(mined: Sequence[pack.Mined], unread: dict[str, str]) -> list[pack.Mined]:
    """Those whose log can be read."""
    for m in mined:
        try:
            rows.check_parsers([m])
        except ValueError as error:
            unread[m.task.id] = str(error)
    return [m for m in mined if m.task.id not in unread]


async def _holding(
    made: Sequence[Injected], box: config.Sandbox, *, runs: int, facts: dict[str, Any]
) -> list[Injected]:
    """Those that hold, in order; the reasons of the others are counted in `facts`."""
    layer.commit({Path(one.mined.task.image): True for one in made}, ignored=True)
    answers = {one.mined.task.id: one.mined.answer for one in made}

    async def prove(task: Task) -> list[str]:
        return await grade.validate(task, answers[task.id], box, runs=runs)

    refused = await _refused([one.mined.task for one in made], prove)
    counts = Counter(facts["refused"]) + Counter(reasons[0].partition(":")[0] for reasons in refused.values())
    facts["refused"] = dict(sorted(counts.items()))
    for task_id, reasons in refused.items():
        observe.log.debug("%s: refused: %s", task_id, "; ".join(reasons))
    return [one for one in made if one.mined.task.id not in refused]


def check(
    cfg: config.Pack, box: config.Sandbox, *, path: Path, source: config.Source | None = None
) -> dict[str, float]:
    """Prove every task of an existing pack again, but those in quarantine; images that are not there are pulled first.

    With cfg.quarantine those that do not hold are put there; without, they are a ValueError of one line.
    """
    suite = tasks.load(config.Tasks(path=str(path), split="all"))
    _ready(box)
    if box.backend == "docker":
        try:
            asyncio.run(curate.fetch({task.image for task in suite}, source or config.Source()))
        except SandboxError as error:
            raise ValueError(f"tasks.path={path}: {error}; push its images (source.push), or make it here") from error
    answers = grade.answers_of(path)

    async def prove(task: Task) -> list[str]:
        return await answers.validate(task, box, runs=cfg.runs)

    if not cfg.quarantine:
        _all_hold(suite, prove, where=f"tasks.path={path}")
        return _numbers(len(suite))
    refused = asyncio.run(_refused(suite, prove))
    pack.quarantine(pack.quarantine_of(path), refused)
    return _numbers(len(suite) - len(refused)) | {"quarantined": float(len(refused))}


def _numbers(count: int, refused: Mapping[str, int] | None = None) -> dict[str, float]:
    reasons = {f"refused_{reason}": float(times) for reason, times in sorted((refused or {}).items())}
    return {"tasks": float(count), "refused": sum(reasons.values()), **reasons}


def _ready(box: config.Sandbox) -> None:
    """Open one sandbox before anything is made. ValueError that says what is missing here."""

    async def trial(layer: str) -> None:
        if box.backend == "docker":  # no directory is an image there
            await asyncio.to_thread(docker.engine)
            return
        if box.backend == "kubernetes":
            await asyncio.to_thread(kubernetes.cluster, box.kubernetes.namespace)
            return
        async with sandbox.open_sandbox(sandbox.SandboxSpec(layer), backend=box.backend):
            pass

    try:
        with tempfile.TemporaryDirectory() as layer:
            Path(layer, ".git").mkdir()
            asyncio.run(trial(layer))
    except SandboxError as error:
        raise ValueError(str(error)) from error
    problems = sandbox.probe(box.backend, box.kubernetes) if box.strict else []
    if problems:
        raise ValueError(f"rollout.sandbox.strict=true: {problems[0]}")


def _settings(cfg: config.Pack, source: config.Source, seed: int) -> dict[str, Any]:
    """What a pack's bytes depend on."""
    if source.kind == "inject":
        return {f"source.{key}": value for key, value in config.section(source).items() if key != "fetch_s"}
    if source.kind == "rows":
        of_rows = ("kind", "rows", "limit", "images", "mirror", "push", "seed", "held_out")
        return {f"source.{key}": config.section(source)[key] for key in of_rows} | {"pack.runs": cfg.runs}
    made = {
        f"pack.{key}": value for key, value in config.section(cfg).items() if key not in ("check", "runs", "quarantine")
    }
    return {"source.kind": source.kind, **made, "seed": seed}


def _same(settings: Mapping[str, Any], to: Path) -> None:
    record = to / _MADE_WITH
    made = json.loads(record.read_text()) if record.is_file() else {}  # a pack of the user's own has none
    if "pack.source" in made:  # as the key was called once
        made["source.kind"] = made.pop("pack.source")
    for key, value in made.items():
        if settings.get(key) != value:
            raise ValueError(
                f"{key}={settings.get(key)}: {to} was made with {key}={value}; "
                "give another tasks.path, remove the pack, or give the old value"
            )


def _all_hold(suite: Sequence[Task], prove: Prove, *, where: str) -> None:
    """Prove all tasks, twice as many at once as there are cores. ValueError, one line, with the first that fails."""
    refused = asyncio.run(_refused(suite, prove))
    if refused:
        task_id, reasons = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(f"{where}: task {task_id}{more} does not hold: {'; '.join(reasons)}")


async def _refused(suite: Sequence[Task], prove: Prove) -> dict[str, list[str]]:
    """Task id -> reasons, in the order of the suite, for those that do not hold."""
    turn = asyncio.Semaphore(2 * len(os.sched_getaffinity(0)))

    async def one(task: Task) -> list[str]:
        async with turn:
            reasons = await _retried(task, prove)
        counter.step()
        return reasons

    with observe.progress("validate", len(suite)) as counter:
        found = await asyncio.gather(*(one(task) for task in suite))
    return {task.id: reasons for task, reasons in zip(suite, found, strict=True) if reasons}


async def _retried(task: Task, prove: Prove) -> list[str]:
    for tries_left in range(_TRIES - 1, 0, -1):
        try:
            return await prove(task)
        except SandboxError as error:
            observe.log.info("%s: %s; %d tries left", task.id, error, tries_left)
    return await prove(task)
