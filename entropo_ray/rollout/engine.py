"""vLLM in Ray actors, and the pool that makes them one `Generate`.

All vLLM names live here, and are imported inside the actor alone. Engines take ids and give ids: prompts are built and
replies are read by `chat`, in the episode actors. An engine serves one policy for the length of one stage, so a
restarted one (Ray replays its constructor's arguments) can never serve another.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError

from entropo_ray import config
from entropo_ray.agent.episode import Completion, EngineError
from entropo_ray.chat import Chat
from entropo_ray.records import Policy

log = logging.getLogger("entropo_ray")

START_CPU_S, START_GPU_S = (
    300.0,
    1800.0,
)  # from asking for the actors to their first tokens; weights may come by network
HOMELESS_S = 120.0  # wait for any healthy engine; a restart takes 12 s (tiny model, CPU) and more
DEADLINE = 0.9  # of llm_s: the engine gives up before its caller does, and so is known to be late
SLACK_S = 30.0  # an engine that is later than its own deadline does not answer at all
CPU_KV_MB = 256  # default key-value cache of a CPU engine: vLLM's own default would claim a share of the machine
DEADLINES_IN_A_ROW = 3  # on one engine; then it counts as sick
_LOST = 70  # exit status of an actor whose engine died; Ray restarts it
_HOMES = 10_000  # episodes whose engine is remembered


@dataclass(frozen=True, slots=True)
class Reply:
    """What an engine gave. Failures that a caller can answer are a `finish`, so that they cross Ray as a value."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # nats, raw log pi at T = 1, one per token
    finish: Literal["stop", "length", "abort", "deadline"]  # the last two are no answer


class EngineStuck(Exception):
    """An engine that started does not generate."""


# --- the actor -------------------------------------------------------------------------------------------------------


class Engine:
    """One vLLM engine. Ray actor: see `engines` for its options."""

    def __init__(self, model: str, end_ids: Sequence[int], cfg: config.Rollout, seed: int) -> None:
        _environment(cfg)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        self._cfg = cfg
        self._end_ids = list(end_ids)
        self._count = itertools.count()
        self._warming = asyncio.Lock()
        self._warm = False
        args = AsyncEngineArgs(model=model, seed=seed % 2**31, **_engine_args(cfg))
        self._llm: Any = AsyncLLM.from_engine_args(args, stat_loggers=[RayPrometheusStatLogger])

    async def generate(self, prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Reply:
        """Sample a reply; it ends with the first of `end_ids`, which is part of it.

        A reply that takes longer than DEADLINE x `llm_s` is `deadline`, and its work is gone from the engine.
        """
        room = self._cfg.agent.max_tokens - len(prompt)
        assert 0 < max_tokens <= room, f"{episode}: {max_tokens} tokens asked for, room for {room}"
        await self.ready()
        return await self._generate(list(prompt), episode=episode, seed=seed, max_tokens=max_tokens)

    async def ready(self) -> int:
        """The actor's process id, once it has generated.

        The first forward pass is a 64-token one: the CPU build dies (SIGILL) where AMX is first met by a tiny one.
        """
        async with self._warming:
            if not self._warm:
                room = self._cfg.agent.max_tokens
                prompt = [(7 * i) % 97 for i in range(min(64, room - 1))]
                reply = await self._generate(prompt, episode="ready", seed=0, max_tokens=min(8, room - len(prompt)))
                if not reply.token_ids:
                    raise EngineStuck(f"no first token: {reply.finish}")
                self._warm = True
        return os.getpid()

    async def close(self) -> None:
        """End the engine's processes, so that their memory is free on return."""
        self._llm.shutdown()

    async def _generate(self, prompt: list[int], *, episode: str, seed: int, max_tokens: int) -> Reply:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        request = f"{os.getpid()}-{episode}-{next(self._count)}"  # never twice in one engine
        try:
            async with asyncio.timeout(DEADLINE * self._cfg.agent.llm_s):
                stream = self._llm.generate({"prompt_token_ids": prompt}, self._params(seed, max_tokens), request)
                return _reply(await _last(stream), request)
        except TimeoutError:
            return Reply((), (), "deadline")
        except EngineGenerateError:
            return Reply((), (), "abort")
        except EngineDeadError:
            # exit_actor() would count as intended; an actor left alive would fail every later call
            log.exception("engine of %s died", self._llm.model_config.model)
            os._exit(_LOST)

    def _params(self, seed: int, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self._cfg.temperature,
            top_p=self._cfg.top_p,
            top_k=self._cfg.top_k,
            seed=seed % 2**63,
            stop_token_ids=self._end_ids,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


async def _last(stream: AsyncIterator[Any]) -> Any:
    """The one output of a FINAL_ONLY stream."""
    outputs = [output.outputs[0] async for output in stream]
    assert len(outputs) == 1, f"the engine ended a request with {len(outputs)} outputs"
    return outputs[0]


def _reply(output: Any, request: str) -> Reply:
    if output.finish_reason not in ("stop", "length"):
        return Reply((), (), "abort")  # partial output is not an answer
    ids = tuple(output.token_ids)
    logprobs = tuple(step[token].logprob for token, step in zip(ids, output.logprobs, strict=True))
    assert all(map(math.isfinite, logprobs)), f"{request}: a log-probability is not finite"
    return Reply(ids, logprobs, output.finish_reason)


def _environment(cfg: config.Rollout) -> None:
    """Before vLLM is imported: it reads these once."""
    values = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not cfg.engine_gpus:
        # The engine core runs the model itself instead of starting a worker for it: up in half the time, 0.6 GiB less.
        values["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # "auto" would bind every engine of the machine to the same cores
        values["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    for name, value in values.items():
        os.environ.setdefault(name, value)


def _engine_args(cfg: config.Rollout) -> dict[str, Any]:
    length = cfg.agent.max_tokens
    shared = {
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # nothing from the model directory: sampling is ours alone
        "max_model_len": length,
        "max_num_seqs": min(cfg.episodes, 256),
    }
    if cfg.engine_gpus:
        kv = {"kv_cache_memory_bytes": cfg.engine_kv_mb << 20} if cfg.engine_kv_mb else {}
        backend = "mp" if cfg.engine_gpus > 1 else "uni"  # not "ray": one actor, one node
        return {**shared, **kv, "tensor_parallel_size": cfg.engine_gpus, "distributed_executor_backend": backend}
    return {
        **shared,
        "dtype": "float32",  # as fast as bfloat16 for tiny models, and equal to the trainer's log-probabilities
        "enforce_eager": True,
        "kv_cache_memory_bytes": (cfg.engine_kv_mb or CPU_KV_MB) << 20,
        "gpu_memory_utilization": 0.1,  # also gates CPU memory
        "block_size": 32,  # of the prefix cache; 128 would recompute most of a short turn
        # A seeded request whose prefill is split kills the CPU engine ("CPU Generator does not use offset"): never.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(length, 4096),
    }


# --- starting and ending ---------------------------------------------------------------------------------------------


@contextmanager
def engines(policy: Policy, cfg: config.Rollout, *, end_ids: Sequence[int], seed: int) -> Iterator[list[str]]:
    """The names of `cfg.engines` actors that have all generated once; they are gone at exit.

    TimeoutError tells what was asked for and what the cluster has.
    """
    run = secrets.token_hex(4)  # the last stage's actors may still be dying under their names
    names = [f"engine-{run}-{i}" for i in range(cfg.engines)]
    actors = [_actor(name, cfg).remote(str(policy.path), tuple(end_ids), cfg, seed + i) for i, name in enumerate(names)]
    try:
        _await_start(actors, cfg)
        yield names
    finally:
        _close(actors)


def _actor(name: str, cfg: config.Rollout) -> Any:
    return ray.remote(Engine).options(
        name=name,
        num_cpus=1,
        num_gpus=cfg.engine_gpus,
        max_restarts=5,
        max_task_retries=0,  # the pool asks again, elsewhere
        # Calls of episodes never queue, so `ready` never waits behind them. A concurrency group of its own would run it
        # in another event loop, where vLLM's sockets never answer.
        max_concurrency=64 + 4 * cfg.episodes,
    )


def _await_start(actors: list[Any], cfg: config.Rollout) -> None:
    start_s = START_GPU_S if cfg.engine_gpus else START_CPU_S
    try:
        ray.get([actor.ready.remote() for actor in actors], timeout=start_s)
    except GetTimeoutError:
        raise TimeoutError(
            f"rollout.engines={cfg.engines} of 1 CPU and {cfg.engine_gpus} GPUs each did not start in {start_s:.0f} s; "
            f"the cluster has {resources(ray.cluster_resources())}, free {resources(ray.available_resources())}"
        ) from None


def resources(found: Mapping[str, float]) -> str:
    return json.dumps({name: found.get(name, 0.0) for name in ("CPU", "GPU", "sandbox")})


def _close(actors: list[Any]) -> None:
    """End all engines; what does not answer in time is killed all the same."""
    try:
        ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=15)
    finally:
        for actor in actors:
            ray.kill(actor)


# --- the pool --------------------------------------------------------------------------------------------------------


class EngineDown(Exception):
    """An engine did not answer; `final` where it never will."""

    def __init__(self, reason: str, *, final: bool) -> None:
        super().__init__(reason)
        self.final = final


class Endpoint(Protocol):
    """An engine as the pool sees it. Both raise EngineDown; anything else they raise is a fault of ours."""

    async def generate(self, prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Reply: ...

    async def ready(self) -> None: ...


class Remote:
    """An engine actor by its name."""

    def __init__(self, name: str, llm_s: float) -> None:
        self._actor = ray.get_actor(name)
        self._llm_s = llm_s

    async def generate(self, prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Reply:
        ref = self._actor.generate.remote(list(prompt), episode=episode, seed=seed, max_tokens=max_tokens)
        reply: Reply = await _answer(ref, self._llm_s + SLACK_S)
        return reply

    async def ready(self) -> None:
        try:
            await _answer(self._actor.ready.remote(), HOMELESS_S)
        except EngineStuck as error:
            raise EngineDown(_one_line(error), final=False) from None


async def _answer(ref: Any, within_s: float) -> Any:
    try:
        async with asyncio.timeout(within_s):
            return await ref
    except TimeoutError:
        ray.cancel(ref)
        raise EngineDown(f"no answer in {within_s:.0f} s", final=False) from None
    except asyncio.CancelledError:
        ray.cancel(ref)  # the episode gave up: the engine must not go on for nobody
        raise
    except ActorUnavailableError as error:
        raise EngineDown(_one_line(error), final=False) from None
    except (ActorDiedError, RayActorError) as error:
        raise EngineDown(_one_line(error), final=True) from None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Pool:
    """A `Generate` over several engines: sticky per episode, away from sick engines, one more try elsewhere.

    Sticky, because an episode's prefix is cached on its engine. An engine that fails is taken out before any further
    choice (fewest calls in flight alone would send all traffic to one that fails fast) and comes back once `ready`
    succeeds. Each episode actor owns its pool; there is no central balancer.
    """

    def __init__(self, engines: Mapping[str, Endpoint], chat: Chat, *, homeless_s: float = HOMELESS_S) -> None:
        self._engines = dict(engines)
        self._chat = chat
        self._homeless_s = homeless_s
        self._healthy = set(self._engines)
        self._in_flight: Counter[str] = Counter()
        self._deadlines: Counter[str] = Counter()  # in a row
        self._homes: dict[str, str] = {}
        self._errors: dict[str, str] = {}  # last error by engine
        self._nurses: set[asyncio.Task[None]] = set()
        self.extra = 0  # calls that were sent a second time

    async def __call__(self, prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Completion:
        """Raises EngineError when two engines in turn gave no answer, or none is healthy for `homeless_s`."""
        avoid = None
        for attempt in range(2):
            self.extra += attempt
            name = await self._place(episode, avoid)
            try:
                reply = await self._ask(name, prompt, episode=episode, seed=seed, max_tokens=max_tokens)
            except EngineDown as down:
                self._quarantine(name, down)
            else:
                if reply.finish == "stop" or reply.finish == "length":
                    self._deadlines[name] = 0
                    return Completion(
                        token_ids=reply.token_ids,
                        logprobs=reply.logprobs,
                        text=self._chat.decode(reply.token_ids),
                        finish=reply.finish,
                    )
                self._note(name, reply.finish)
            avoid = name
        raise EngineError(f"two calls without an answer; {self._last_errors()}")

    async def _ask(self, name: str, prompt: Sequence[int], *, episode: str, seed: int, max_tokens: int) -> Reply:
        self._in_flight[name] += 1
        try:
            return await self._engines[name].generate(prompt, episode=episode, seed=seed, max_tokens=max_tokens)
        finally:
            self._in_flight[name] -= 1

    async def _place(self, episode: str, avoid: str | None) -> str:
        """The episode's engine while that is healthy, else the healthy one with the fewest calls."""
        give_up = time.monotonic() + self._homeless_s
        while not self._healthy:
            if not self._engines or time.monotonic() > give_up:
                raise EngineError(f"no healthy engine; {self._last_errors()}")
            await asyncio.sleep(0.1)
        home = self._homes.get(episode)
        if home not in self._healthy or home == avoid:
            choice = self._healthy - {avoid} or self._healthy
            home = min(choice, key=lambda name: (self._in_flight[name], random.random()))
        self._homes.pop(episode, None)
        self._homes[episode] = home  # last in order: the longest unused are forgotten first
        if len(self._homes) > _HOMES:
            del self._homes[next(iter(self._homes))]
        return home

    def _note(self, name: str, finish: str) -> None:
        """A call without an answer from a living engine; several deadlines in a row make it sick."""
        self._errors[name] = finish
        self._deadlines[name] += finish == "deadline"
        if self._deadlines[name] >= DEADLINES_IN_A_ROW:
            self._quarantine(name, EngineDown(f"{DEADLINES_IN_A_ROW} deadlines in a row", final=False))

    def _quarantine(self, name: str, down: EngineDown) -> None:
        self._errors[name] = str(down)
        if down.final:
            self._healthy.discard(name)
            self._engines.pop(name, None)
        elif name in self._healthy:
            self._healthy.discard(name)
            nurse = asyncio.create_task(self._nurse(name))
            self._nurses.add(nurse)  # the loop itself keeps weak references only
            nurse.add_done_callback(self._nurses.discard)

    async def _nurse(self, name: str) -> None:
        """Ask every second; readmit on success, drop an engine that will never answer."""
        while name in self._engines:
            await asyncio.sleep(1)
            try:
                await self._engines[name].ready()
            except EngineDown as down:
                self._errors[name] = str(down)
                if down.final:
                    self._engines.pop(name, None)
            else:
                self._deadlines[name] = 0
                self._healthy.add(name)
                return

    def _last_errors(self) -> str:
        return "last errors: " + (
            "; ".join(f"{name}: {error}" for name, error in sorted(self._errors.items())) or "none"
        )


def pool(names: Sequence[str], chat: Chat, cfg: config.Rollout) -> Pool:
    """The pool of one episode actor."""
    return Pool({name: Remote(name, cfg.agent.llm_s) for name in names}, chat)
