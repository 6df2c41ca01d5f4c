"""The verifier as a Ray Serve application: over HTTP for people and scripts, by handle for `score`.

    POST /score  {"items": [{"task_id": "t", "sample": 0, "issue": "...", "patch": "...", "steps": []}]}
    -> {"policy": "...", "scores": [{"task_id": "t", "sample": 0, "verifier": 0.93, "reason": ""}]}

Answers carry their keys and the policy that gave them. A question that cannot be asked (longer than the model's
window) has `verifier: null` and a reason; a malformed request is answered with 422 and the field that is wrong.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import ray.exceptions
from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve

from entropo_ray import chat, config, observe, store
from entropo_ray.records import Score, Task
from entropo_ray.verify import model
from entropo_ray.verify.examples import Attempted, evidence
from entropo_ray.verify.model import Evidence

_START_S = 900.0  # a replica's weights must be up by then
_ANSWER_S = 600.0  # one request
_IN_FLIGHT = 64  # requests of one caller
_CHUNK = 8  # attempts in one request


class Question(BaseModel):
    items: Annotated[list[Evidence], Field(min_length=1, max_length=512)]


class Scored(BaseModel):
    task_id: str
    sample: int
    verifier: float | None
    reason: str = ""


class Scores(BaseModel):
    policy: str  # directory and digest of the weights that answered
    scores: list[Scored]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """One policy in a replica, as a whole: prompt and score never come from two of them."""

    name: str
    model: Any
    words: chat.Chat
    labels: model.Labels


@dataclasses.dataclass(frozen=True)
class Row:
    loaded: Loaded
    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids) + self.loaded.labels.room


api = FastAPI(title="entropo_ray verifier")


class Verifier:
    """One replica. The model runs in a thread of its own, so that the event loop goes on answering probes."""

    def __init__(self, cfg: config.Verifier) -> None:
        self._cfg = cfg
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._loaded: Loaded | None = None
        self._broken = ""
        self._batch.set_max_batch_size(cfg.batch_tokens)

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Other weights without a restart: {"policy": directory}."""
        policy = Path(user_config["policy"])
        self._loaded = await asyncio.get_running_loop().run_in_executor(self._thread, load, policy, self._cfg)

    async def check_health(self) -> None:
        """Raises after a failed forward pass, so that Serve replaces this replica."""
        if self._broken:
            raise RuntimeError(self._broken)

    @api.post("/score")
    async def score(self, question: Question) -> Scores:
        return await self.judge(question.items)

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        return {"policy": self._loaded.name if self._loaded else ""}

    async def judge(self, items: Sequence[Evidence]) -> Scores:
        """A score for each item, by key."""
        loaded = self._loaded
        assert loaded is not None, "Serve configures a replica before it sends requests"
        room = self._cfg.max_tokens - loaded.labels.room
        prompts = await asyncio.to_thread(lambda: [model.render(item, loaded.words, room) for item in items])
        rows = {i: Row(loaded, ids) for i, ids in enumerate(prompts) if ids is not None}
        by_length = sorted(rows, key=lambda i: len(rows[i]))  # a batch is closed by the first row that does not fit
        values = await asyncio.gather(*(self._batch(rows[i]) for i in by_length))
        scores = dict(zip(by_length, values, strict=True))
        return Scores(policy=loaded.name, scores=[_scored(item, scores.get(i)) for i, item in enumerate(items)])

    @serve.batch(batch_wait_timeout_s=0.01, batch_size_fn=lambda rows: len(rows) * max(map(len, rows)))
    async def _batch(self, rows: list[Row]) -> list[float]:
        """Rows of at most `batch_tokens` padded tokens, scored together."""
        return await self.forward(rows)

    async def forward(self, rows: list[Row]) -> list[float]:
        """P(YES) of each row, in order; one that raises is the last that this replica is asked for."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, score_rows, rows)
        except Exception as error:
            self._broken = f"scoring failed: {type(error).__name__}: {error}"
            raise


_deployment = serve.deployment(
    name="verifier",
    max_ongoing_requests=512,
    health_check_period_s=10,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=60,
)(serve.ingress(api)(Verifier))


def load(policy: Path, cfg: config.Verifier) -> Loaded:
    words = chat.load(policy)
    name = f"{policy}@{model.digest(policy)}"
    return Loaded(name, model.load(policy, gpus=cfg.replica_gpus), words, model.labels(words))


def score_rows(rows: Sequence[Row]) -> list[float]:
    """Scores in the order of the rows; those of two policies, met while one replaces the other, are kept apart."""
    scores: dict[int, float] = {}
    for loaded in {id(row.loaded): row.loaded for row in rows}.values():
        mine = [i for i, row in enumerate(rows) if row.loaded is loaded]
        values = model.score_batch(loaded.model, [rows[i].ids for i in mine], loaded.labels)
        scores |= zip(mine, values, strict=True)
    return [scores[i] for i in range(len(rows))]


def _scored(item: Evidence, value: float | None) -> Scored:
    reason = "" if value is not None else "issue and patch are longer than verifier.max_tokens"
    return Scored(task_id=item.task_id, sample=item.sample, verifier=value, reason=reason)


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `serve` and RayService: {"policy": directory, and any key of the section verifier}.

    ValueError on an unknown key or a policy that is not there.
    """
    knobs = {key: value for key, value in args.items() if key != "policy"}
    known = {field.name for field in dataclasses.fields(config.Verifier)}
    for key in knobs:
        if key not in known:
            raise ValueError(f"{key}: no key of the section verifier; known are {', '.join(sorted(known))}, policy")
    if "policy" not in args:
        raise ValueError("policy is required: the directory of the verifier's weights")
    return application(config.Verifier(**knobs), store.policy(str(args["policy"])).path)


def application(cfg: config.Verifier, policy: Path) -> serve.Application:
    if cfg.batch_tokens < cfg.max_tokens:
        raise ValueError(
            f"verifier.batch_tokens={cfg.batch_tokens}: must be at least verifier.max_tokens={cfg.max_tokens}, "
            "or the longest question fits no batch"
        )
    options = {"num_gpus": cfg.replica_gpus, "num_cpus": 1}
    replicas = _deployment.options(
        num_replicas=cfg.replicas, ray_actor_options=options, user_config={"policy": str(policy)}
    )
    return replicas.bind(cfg)


def deploy(cfg: config.Verifier, policy: Path, *, http: bool) -> Any:
    """Start (or renew) the application and wait until it runs; a handle to it.

    ValueError if the port is taken, RuntimeError with Serve's message if it does not come up.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _start(cfg, http=http)
    target = serve.RunTarget(application(cfg, policy), name=cfg.app, route_prefix="/" if http else None)
    handle = serve.run_many([target], wait_for_applications_running=False)[0]
    deadline = time.monotonic() + _START_S
    while (state := serve.status().applications[cfg.app]).status != "RUNNING":
        if state.status == "DEPLOY_FAILED" or time.monotonic() > deadline:
            raise RuntimeError(f"verifier.app={cfg.app} did not start ({state.status}): {state.message}")
        time.sleep(0.2)
    return handle


def _start(cfg: config.Verifier, *, http: bool) -> None:
    """Serve itself, which keeps the proxies that it was started with: an idle one without any gives way to one."""
    status = serve.status()
    if status.proxies or (status.applications and not http):
        return
    if status.applications:
        raise ValueError(
            f"verifier.app={cfg.app}: Serve runs here without HTTP for {', '.join(status.applications)}; wait for it"
        )
    if http:
        _port_free(cfg)
        serve.shutdown()
        serve.start(proxy_location="HeadOnly", http_options={"host": cfg.host, "port": cfg.port})
    else:
        serve.start(proxy_location="Disabled")


def _port_free(cfg: config.Verifier) -> None:
    with socket.socket(socket.AF_INET6 if ":" in cfg.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((cfg.host, cfg.port))
        except OSError as error:
            raise ValueError(
                f"verifier.port={cfg.port}: cannot listen on {cfg.host} ({error.strerror}); give another port"
            ) from None


@contextmanager
def _running(cfg: config.Verifier, policy: Path) -> Iterator[Any]:
    """A handle to the running application, or to one that lives as long as the block."""
    applications = serve.status().applications
    if cfg.app in applications and applications[cfg.app].status == "RUNNING":
        yield serve.get_app_handle(cfg.app)
        return
    try:
        yield deploy(cfg, policy, http=False)
    finally:
        serve.delete(cfg.app)


def score(
    trajectories: Path, suite: Sequence[Task], cfg: config.Verifier, *, policy: Path, to: Path
) -> dict[str, float]:
    """P(resolved) of every attempt; product Score. What could not be scored has no row: missing is not 0.

    Joins the running application if there is one, else deploys one for the time of the stage. Raises ValueError if
    the running one serves another policy, RuntimeError if nothing at all could be scored.
    """
    tasks = {task.id: task for task in suite}
    there = store.keys(to)
    attempts = (a for a in store.read(trajectories, Attempted) if (a.task_id, a.sample) not in there)
    items = (evidence(a, tasks[a.task_id]) for a in attempts)
    asked = store.rows(trajectories)
    with _running(cfg, policy) as handle, observe.progress("verify", asked - len(there)) as done:
        name = f"{policy}@{model.digest(policy)}"
        for chunk, answer in _ask(handle, items):
            done.step(len(chunk))
            if answer is None:
                continue
            if answer.policy != name:
                raise ValueError(
                    f"verifier.app={cfg.app} serves {answer.policy}, not {name}: "
                    "start it again with these weights, or give another verifier.app"
                )
            rows = [
                Score(task_id=s.task_id, sample=s.sample, verifier=s.verifier)
                for s in answer.scores
                if s.verifier is not None
            ]
            if rows:
                store.append(to, Score, rows, key=(rows[0].task_id, rows[0].sample))
    scored = len(store.keys(to))
    if not scored and asked:
        raise RuntimeError(f"verify: none of {asked} attempts could be scored; Serve's log says why")
    store.seal(to, Score)
    return {"scored": float(scored), "missing": float(asked - scored)}


def _ask(handle: Any, items: Iterator[Evidence]) -> Iterator[tuple[list[Evidence], Scores | None]]:
    """Chunks with their answers, a bounded number in flight; None where no replica answered."""
    open_: deque[tuple[list[Evidence], Any]] = deque()
    while True:
        while len(open_) < _IN_FLIGHT and (chunk := list(islice(items, _CHUNK))):
            open_.append((chunk, handle.judge.remote(chunk)))
        if not open_:
            return
        chunk, response = open_.popleft()
        try:
            yield chunk, response.result(timeout_s=_ANSWER_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            observe.log.warning("verify: no score for %d attempts from %s: %s", len(chunk), chunk[0].task_id, error)
            yield chunk, None
