"""Tasks of public data sets: their images made safe for an agent, each task tried, and what came of each row.

    image     there already, or pulled with pauses; the first process of nothing in it is ever run for this
    tree      its work directory, here: a history of one commit, the bug in, what shows hidden tests gone, no leak left
    prepared  the image with that tree, under a name that is made of all that it was made from
    tried     by whoever is asked to, in sandboxes of the prepared image

What was tried is in a journal beside the pack, and prepared images bear their facts as labels: whoever starts again
after an interruption goes on where it was. The trees are unpacked on this machine, which is no breach of the rule that
the host opens nothing an agent wrote, for no agent was in them yet; git obeys nothing that they hold all the same.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from entropo_ray import config, observe
from entropo_ray.records import digest, to_row
from entropo_ray.sandbox import BackendDown, ImageMissing, SandboxError, images
from entropo_ray.sandbox.container import threaded
from entropo_ray.tasks import pack, scripts, scrub, trees
from entropo_ray.tasks.pack import Mined, Ruling
from entropo_ray.tasks.scrub import Scrubbed

Prove = Callable[[Mined], Awaitable[Ruling]]
Ask = Callable[[float, threading.Event], None]  # within seconds, until the event

_VERSION = "1"  # of the way from an image to a prepared one: raise it when the result could differ
_NAME = "entropo-prepared"
_MAKERS = 2  # trees unpacked at once; they are as large as repositories with their builds
_TRIES = 3  # times that a proof lost to a sandbox is asked for
_PAUSE_S = 2.0  # after the first try to pull
_CLOSED = "/root"  # home of some images' interpreter, which only its owner may enter


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that a prepared image depends on."""

    image: str  # id
    workdir: str
    base: str
    bug: str
    remove: tuple[str, ...]

    @property
    def key(self) -> str:
        return digest(_VERSION, *map(str, dataclasses.astuple(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one row."""

    mined: Mined  # with the prepared image and what trying it found, if it is kept
    reasons: tuple[str, ...] = ()  # it was refused
    unstable: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """What was tried, one JSON object a line, by the digest of all that it depends on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                row = json.loads(line)
            except ValueError:  # a line that an interruption cut short
                continue
            self._known[row["key"]] = row

    def get(self, key: str) -> dict[str, Any] | None:
        return self._known.get(key)

    def put(self, key: str, **said: Any) -> dict[str, Any]:
        self._known[key] = {"key": key, **said}
        # a cut line before it must not spoil this one
        with self._path.open("ab") as file:
            file.write(b"\n" + json.dumps(self._known[key]).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return self._known[key]

    def close(self) -> None:
        """Forget all of it: the pack is whole."""
        self._path.unlink(missing_ok=True)


class Curator:
    """One data set on the way to a pack."""

    def __init__(self, source: config.Source, journal: Journal, prove: Prove, *, version: str) -> None:
        self._source, self._journal, self._prove, self._version = source, journal, prove, version
        self._pulling = asyncio.Semaphore(source.pulls)
        self._making = asyncio.Semaphore(_MAKERS)
        self._proving = asyncio.Semaphore(2 * len(os.sched_getaffinity(0)))

    async def curate(self, mined: Sequence[Mined]) -> list[Outcome]:
        """What becomes of each task, in their order. BackendDown if there is no engine any more."""
        await asyncio.to_thread(images.shelf)
        groups: dict[str, list[Mined]] = defaultdict(list)
        for m in mined:
            groups[m.task.image].append(m)
        with observe.progress("tasks", len(mined)) as counter:
            runs = await asyncio.gather(*(self._image(name, some, counter) for name, some in groups.items()))
        found = {outcome.mined.task.id: outcome for run in runs for outcome in run}
        return [found[m.task.id] for m in mined]

    async def _image(self, name: str, mined: Sequence[Mined], counter: observe.Progress) -> list[Outcome]:
        """The tasks of one image of the data set."""
        try:
            async with self._pulling:
                image = await present(name, self._source)
        except BackendDown:
            raise
        except SandboxError as error:
            counter.step(len(mined))
            return [Outcome(mined=m, reasons=(f"no_image: {error}",)) for m in mined]
        recipes: dict[Recipe, list[Mined]] = defaultdict(list)
        for m in mined:
            recipes[Recipe(image=image, workdir=m.task.workdir, base=m.base, bug=m.bug, remove=m.remove)].append(m)
        found = await asyncio.gather(*(self._recipe(recipe, some, counter) for recipe, some in recipes.items()))
        return [outcome for some in found for outcome in some]

    async def _recipe(self, recipe: Recipe, mined: Sequence[Mined], counter: observe.Progress) -> list[Outcome]:
        """The tasks that one prepared image serves."""
        shelf, name = images.shelf(), self._name(recipe)
        keys = {m.task.id: self._key(recipe, m) for m in mined}
        lost = await self._prepared(recipe, keys, mined)
        facts = await asyncio.to_thread(shelf.labels, name)

        async def one(m: Mined) -> Outcome:
            key, ready = keys[m.task.id], _rewritten(m, name, facts)
            if m.task.id not in lost and self._journal.get(key) is None:
                lost.update(await self._tried(ready, key))
            counter.step()
            if m.task.id in lost:
                return Outcome(mined=m, reasons=(lost[m.task.id],))
            return _outcome(m, ready, self._journal.get(key) or {}, _provenance(m, recipe, ready, facts))

        found = list(await asyncio.gather(*map(one, mined)))
        if facts and not lost and all(outcome.reasons for outcome in found):
            await asyncio.to_thread(shelf.remove, name)
        return found

    def _key(self, recipe: Recipe, m: Mined) -> str:
        rows = (json.dumps(to_row(m.task)), json.dumps(to_row(m.answer)))
        return digest(self._version, self._name(recipe), *rows)

    def _name(self, recipe: Recipe) -> str:
        prefix = f"{self._source.push.rstrip('/')}/" if self._source.push else ""
        return f"{prefix}{_NAME}:{recipe.key}"

    async def _prepared(self, recipe: Recipe, keys: Mapping[str, str], mined: Sequence[Mined]) -> dict[str, str]:
        """Make the image for those that need it, and is not there; id -> why, where the engine could not.

        Trees that are unfit, or tell of the answer, are the row's fault and go into the journal.
        """
        shelf, name = images.shelf(), self._name(recipe)
        async with self._making:
            clean = set((await asyncio.to_thread(shelf.labels, name)).get("entropo.clean", "").split())
            said = {m.task.id: self._journal.get(keys[m.task.id]) for m in mined}
            need = [m for m in mined if not (said[m.task.id] or {}).get("reasons")]
            if {_secret(m) for m in need} <= clean:
                return {}
            try:
                leaks = await asyncio.to_thread(_prepare, shelf, recipe, need, name)
            except (ValueError, RuntimeError) as error:
                leaks = {m.task.id: [f"no_repository: {error}"] for m in need}
            except BackendDown:
                raise
            except SandboxError as error:
                return {m.task.id: f"not_prepared: {error}" for m in need}
        for task_id, reasons in leaks.items():
            if reasons:
                self._journal.put(keys[task_id], id=task_id, reasons=reasons)
        return {}

    async def _tried(self, m: Mined, key: str) -> dict[str, str]:
        """Put into the journal what a trial says; id -> reason, if none came to its end."""
        said: SandboxError | None = None
        for _ in range(_TRIES):
            try:
                async with self._proving:
                    ruling = await self._prove(m)
            except BackendDown:
                raise
            except SandboxError as error:
                said = error
                observe.log.info("%s: %s", m.task.id, said)
                continue
            if not ruling.reasons and self._source.push:
                try:
                    await again(lambda s, cut: images.shelf().push(m.task.image, within_s=s, cut=cut), self._source)
                except SandboxError as error:
                    return {m.task.id: f"not_pushed: {error}"}
            self._journal.put(
                key,
                id=m.task.id,
                reasons=list(ruling.reasons),
                unstable=list(ruling.unstable),
                visible=list(ruling.visible),
            )
            return {}
        return {m.task.id: f"no_verdict: {said}"}


# Images


async def present(name: str, source: config.Source) -> str:
    """The id of an image that the engine has, pulled if need be. ImageMissing if it cannot be had."""
    shelf = images.shelf()
    try:
        return str((await asyncio.to_thread(shelf.facts, name))["Id"])
    except ImageMissing:
        await again(lambda s, cut: shelf.pull(name, within_s=s, cut=cut), source)
        return str((await asyncio.to_thread(shelf.facts, name))["Id"])


async def fetch(names: Iterable[str], source: config.Source) -> None:
    """Pull those that the engine does not have, a few at once. SandboxError for the first that cannot be had."""
    turn = asyncio.Semaphore(source.pulls)

    async def one(name: str) -> None:
        async with turn:
            await present(name, source)

    await asyncio.gather(*map(one, sorted(names)))


async def again(ask: Ask, source: config.Source) -> None:
    """Ask a registry with pauses, until it answers, time or tries are up, or asking does not help."""
    end = time.monotonic() + source.pull_s
    for number in range(source.pull_tries):
        try:
            cut = threading.Event()
            return await threaded(functools.partial(ask, end - time.monotonic(), cut), cut)
        except (ImageMissing, BackendDown):
            raise
        except SandboxError as error:
            pause = _PAUSE_S * 2**number * random.uniform(0.5, 1.5)  # else all who were refused come back together
            if number + 1 == source.pull_tries or time.monotonic() + pause >= end:
                raise SandboxError(f"{error} ({number + 1} tries)") from error
            observe.log.info("%s; again in %.0f s", error, pause)
        await asyncio.sleep(pause)


# Trees


def _secret(m: Mined) -> str:
    """What a tree is searched for."""
    return digest(m.answer.patch, *m.answer.fail_to_pass)


def _prepare(shelf: images.Shelf, recipe: Recipe, mined: Sequence[Mined], name: str) -> dict[str, list[str]]:
    """Task id -> leaks; the image is made if there is a task without any. ValueError for a tree that is unfit."""
    with tempfile.TemporaryDirectory(prefix="entropo-") as scratch, shelf.tree(recipe.image, recipe.workdir) as old:
        tree = Path(scratch, "tree")
        entries = trees.unpack(old, tree)
        done = _scrubbed(tree, recipe)
        leaks = {m.task.id: _leaks(tree, m) for m in mined}
        clean = {_secret(m) for m in mined if not leaks[m.task.id]}
        if clean:
            with tempfile.TemporaryFile() as new:
                trees.pack(tree, PurePosixPath(recipe.workdir).name, entries, new)
                new.seek(0)
                _remade(shelf, recipe, tree, new, name, done, clean)
    return leaks


def _scrubbed(tree: Path, recipe: Recipe) -> Scrubbed:
    inside = [PurePosixPath(path) for path in recipe.remove if PurePosixPath(path).is_relative_to(recipe.workdir)]
    places = [tree / path.relative_to(recipe.workdir) for path in inside]
    for place in places:
        scrub.remove(place)
    done = scrub.scrub(tree, base=recipe.base or "HEAD", patch=recipe.bug)
    if back := next((place for place in places if os.path.lexists(place)), None):
        raise ValueError(f"{back.relative_to(tree)} shows hidden tests and is part of the base commit")
    return done


def _leaks(tree: Path, m: Mined) -> list[str]:
    hidden = m.answer.fail_to_pass
    # what the base commit itself says is no secret
    return scrub.leak_check(tree, patches=[m.answer.patch], hidden=hidden, visible=scrub.known(tree, hidden))


def _remade(
    shelf: images.Shelf, recipe: Recipe, tree: Path, new: IO[bytes], name: str, done: Scrubbed, clean: set[str]
) -> None:
    outside = [path for path in recipe.remove if not PurePosixPath(path).is_relative_to(recipe.workdir)]
    shelf.remake(
        recipe.image,
        new,
        workdir=recipe.workdir,
        remove=outside,
        enter=[_CLOSED] if trees.led_to(tree, _CLOSED) else [],
        tag=name,
        labels={
            "entropo.commit": done.commit,
            "entropo.replaced": done.replaced,
            "entropo.clean": " ".join(sorted(clean)),
        },
    )


# Rows


def _rewritten(m: Mined, image: str, facts: Mapping[str, str]) -> Mined:
    """The task in its prepared image, and its script with the one commit that is left."""
    task = dataclasses.replace(m.task, image=image)
    if not (old := facts.get("entropo.replaced")):
        return dataclasses.replace(m, task=task)
    script = scripts.rewritten(m.answer.script, old, facts["entropo.commit"])
    return dataclasses.replace(m, task=task, answer=dataclasses.replace(m.answer, script=script))


def _outcome(m: Mined, ready: Mined, said: Mapping[str, Any], facts: Mapping[str, str]) -> Outcome:
    if said["reasons"]:
        return Outcome(mined=m, reasons=tuple(said["reasons"]))
    task = dataclasses.replace(ready.task, visible=tuple(said["visible"]))
    kept = dataclasses.replace(ready, task=task, answer=pack.without(ready.answer, said["unstable"]))
    return Outcome(mined=kept, unstable=tuple(said["unstable"]), facts=facts)


def _provenance(m: Mined, recipe: Recipe, ready: Mined, facts: Mapping[str, str]) -> dict[str, str]:
    return {
        "task_id": m.task.id,
        "source": m.task.source,
        "repo": m.task.repo,
        "image": m.task.image,
        "image_id": recipe.image,
        "base": facts.get("entropo.replaced", ""),
        "commit": facts.get("entropo.commit", ""),
        "prepared": ready.task.image,
    }


def report(outcomes: Iterable[Outcome], unread: Mapping[str, str]) -> dict[str, Any]:
    """Per family and repository: how many rows, how many kept, and why the others were not."""
    said: dict[str, Any] = {}
    for outcome in outcomes:
        task = outcome.mined.task
        facts = said.setdefault(f"{task.source} {task.repo}", {"rows": 0, "kept": 0, "refused": {}, "unstable": {}})
        facts["rows"] += 1
        facts["kept"] += not outcome.reasons
        if outcome.reasons:
            reason = outcome.reasons[0].partition(":")[0]
            facts["refused"].setdefault(reason, {})[task.id] = "; ".join(outcome.reasons)
        if outcome.unstable:
            facts["unstable"][task.id] = list(outcome.unstable)
    if unread:
        said["unread"] = {"rows": len(unread), "kept": 0, "refused": {"unread": dict(unread)}, "unstable": {}}
    return said


def refusals(said: Mapping[str, Any]) -> Counter[str]:
    """Reason -> rows, over a report."""
    return Counter({reason: len(ids) for facts in said.values() for reason, ids in facts["refused"].items()})
