"""One rank of a fitting stage: DeepSpeed in whatever process group there is.

Each rank reads its own rows by key from Parquet and follows the same plan; gradients and metrics meet in collectives.
Rank 0 writes one line a step to steps.jsonl, and the weights at the end.
"""

from __future__ import annotations

import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from entropo_ray import config
from entropo_ray.train import experts, lora, memory, objective, parallel, rows, size
from entropo_ray.train.baseline import Baseline, Seen
from entropo_ray.train.batch import Key, Pack, Row, pack
from entropo_ray.train.logprob import Anchor, Scorer
from entropo_ray.train.model import load, save
from entropo_ray.train.plan import Layout, Slot, Step, endless, plan
from entropo_ray.train.step import LOSSES, STEPS, Batch, Job, batch_of, ratios, totals, turns_of

_BETAS = (0.9, 0.95)
_TAG = "state"


class Kept(Protocol):
    """Where a rank's checkpoints go, and come from after a restart. Both calls are collective."""

    def restore(self, load: Callable[[Path], None]) -> None:
        """Hand the folder of the last checkpoint to `load`, if there is one."""

    def keep(self, step: int, save: Callable[[Path], None]) -> None:
        """What `save` writes into a folder is the state before step number `step`."""


class Fitting:
    """One rank's part of an update: its rows, its engine, and the plan that all ranks follow."""

    def __init__(self, job: Job, kept: Kept) -> None:
        self.job, self.cfg, self.kept = job, job.cfg, kept
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        if not self.cfg.worker_gpus:
            torch.set_num_threads(self.cfg.worker_threads or max(1, len(os.sched_getaffinity(0)) // self.ranks))
        self.parallel = parallel.groups(self.cfg.sequence_parallel)
        self.readers = self.ranks // self.cfg.sequence_parallel  # groups of ranks, each with packs of its own
        self.reader = self.rank // self.cfg.sequence_parallel
        torch.manual_seed(job.seed)
        self.model = load(job.policy, self.cfg)
        if self.cfg.lora_rank:
            lora.inject(self.model, self.cfg)
        self.load = experts.Load(self.model)
        parallel.check(self.model, self.cfg.sequence_parallel)
        self.steps = self._plan()
        self.reading = len(self.steps) * job.read_epochs // self.cfg.epochs  # steps; all epochs have as many
        self.rows, self.reference = self._read(job.trajectories, job.reference, job.cut)
        self.swapped: dict[Key, Row] = {}
        if job.swapped:
            self.swapped, self.swapped_reference = self._read(job.swapped, job.swapped_reference, None)
        self.disk = _own_directory(self.cfg.nvme_dir) if self.cfg.nvme_dir else None
        scorer = Scorer(self.model, floats=self.cfg.logits, parallel=self.parallel).train()
        self.engine = _engine(scorer, self.cfg, self.disk.name if self.disk else None)
        self.anchor = None
        if job.anchor and self.cfg.lora_rank and job.anchor.path == job.policy.path:
            self.anchor = self.engine.module  # with its adapters off
        elif job.anchor:
            self.anchor = (
                Scorer(load(job.anchor, self.cfg), floats=self.cfg.logits, parallel=self.parallel)
                .eval()
                .to(self.engine.device)
            )
        self.baseline = Baseline(job) if job.kind == "label" else None
        self.seen: list[Seen] = []  # of the step that runs

    @property
    def _follows(self) -> bool:
        """Whether another rank of the same pack speaks for it."""
        return self.parallel is not None and self.parallel.index > 0

    def _plan(self) -> list[Step]:
        shape = size.shape_of(self.model.config)
        costs = [size.operations(shape, u.tokens, u.squares, u.actions, kept="nothing") for u in self.job.units]
        layout = Layout(
            costs,
            ranks=self.readers,
            batch=self.cfg.batch,
            micro_batch=self.cfg.micro_batch,
            pack_tokens=self.cfg.pack_tokens,
            sizes=[unit.tokens for unit in self.job.units],
        )
        seed, round = self.job.seed, self.job.policy.round
        if self.cfg.steps:
            return endless(layout, self.cfg.steps, seed=seed, round=round)
        return [s for epoch in range(self.cfg.epochs) for s in plan(layout, seed=seed, round=round, epoch=epoch)]

    def _read(self, product: Path, reference: Path | None, cut: int | None) -> tuple[dict[Key, Row], dict[Key, Tensor]]:
        """This rank's trajectories, and their reference log-probs where there is a reference."""
        mine = {slot.unit for step in self.steps for micro in step for slot in micro[self.reader]}
        keys = {key for unit in mine for key in self.job.units[unit].keys}
        found = {key: row.head(cut) for key, row in rows.read(product, keys).items()}
        if reference is None:
            return found, {}
        scored = rows.per_token(reference, "ref_logp", keys)
        for key, row in found.items():
            if len(scored[key]) != int(row.action_mask.sum()):
                raise ValueError(
                    f"{reference}: {key} has {len(scored[key])} reference log-probs for "
                    f"{int(row.action_mask.sum())} action tokens: it was made from other trajectories; delete it"
                )
        return found, {key: torch.from_numpy(values) for key, values in scored.items()}

    def run(self) -> None:
        """All steps from the last checkpoint on, then the weights at job.to (rank 0)."""
        for number in range(self._resume(), len(self.steps)):
            started = time.perf_counter()
            line = self._step(number)
            line["seconds"] = time.perf_counter() - started
            if self.rank == 0:
                with (self.job.to / STEPS).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            every = self.cfg.checkpoint_steps
            if every and (number + 1) % every == 0 and number + 1 < len(self.steps):
                self._checkpoint(number + 1)
        state = gathered(self.model, gather=self.cfg.zero_stage == 3, keep=self.rank == 0)
        if self.rank == 0:
            if self.cfg.lora_rank:
                lora.save(self.model, state, self.cfg, self.job.policy.path, self.job.to / lora.FOLDER)
                state = lora.merged(self.model, state)
            save(self.model, state, self.job.policy, self.job.to)
        if self.disk:
            self.disk.cleanup()

    def _step(self, number: int) -> dict[str, float]:
        step = self.steps[number]
        lr = rate(number, len(self.steps), self.cfg)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        share = self._share(step, number < self.reading)
        mine: dict[str, float] = {}
        for micro in step:
            found = self._micro_step(micro[self.reader], self.ranks / share, number < self.reading)
            for name, value in found.items():
                mine[name] = mine.get(name, 0.0) + value
        self.engine.step()
        line = self._means(mine, share)
        line |= {"step": number, "lr": lr, "peak_gib": _peak_gib(), "pid": os.getpid()} | self._grad_norm(number)
        return line | self._seen() | self._experts()

    def _experts(self) -> dict[str, float]:
        counts = self.load.read()
        if counts.numel():
            counts = counts.to(self.engine.device)
            dist.all_reduce(counts)
        return experts.spread(counts.cpu())

    def _seen(self) -> dict[str, Any]:
        """What all ranks saw of the step's units goes into the baseline, and into the line as a histogram."""
        everyone: list[list[Seen]] = [[] for _ in range(self.ranks)]
        dist.all_gather_object(everyone, [] if self._follows else self.seen)
        self.seen = []
        seen = sorted((one for mine in everyone for one in mine), key=lambda one: one.unit)
        if not seen:
            return {}
        # of sigma(-margin), in ten bins: the weight with which a unit still pulls
        weights = torch.sigmoid(-torch.tensor([one.margin for one in seen], dtype=torch.float64))
        line: dict[str, Any] = {"weights": torch.histc(weights, bins=10, min=0.0, max=1.0).int().tolist()}
        if self.baseline:
            line |= {"z0": self.baseline.value, "z0_alone": float(self.baseline.alone)}
            self.baseline.update(seen)
        return line

    def _share(self, step: Step, reading: bool) -> float:
        """What the summed loss of a step is divided by: the tokens it fits when imitating, its units else."""
        units = [self.job.units[slot.unit] for micro in step for slots in micro for slot in slots if slot.weight]
        if reading:
            return float(sum(unit.tokens - len(unit.keys) for unit in units))  # nothing predicts a first token
        return float(sum(unit.actions for unit in units) if self.job.kind == "example" else len(units))

    def _micro_step(self, slots: tuple[Slot, ...], scale: float, reading: bool) -> dict[str, float]:
        batch = self._forward(slots, reading)
        exchanged = self._exchanged(batch) if self.swapped else None
        loss = LOSSES[self.job.kind](batch, self.job, self._point(slots, exchanged))
        if not bool(torch.isfinite(loss.values).all()):
            raise FloatingPointError(f"the loss is {loss.values.tolist()} for {[unit.keys for unit in batch.units]}")
        # DeepSpeed averages over ranks; `scale` makes it a mean over the whole step
        self.engine.backward((batch.importance * loss.values).sum() * scale)
        self._note(slots, loss, exchanged)
        return totals(batch, loss)

    def _exchanged(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[U] log pi and log pi_ref of each unit's trajectory with another's last reply."""
        packed = pack([self.swapped[unit.keys[0]] for unit in batch.units]).to(self.engine.device)
        with torch.no_grad():
            return ratios(packed, self.engine(packed), self.swapped_reference)

    def _point(self, slots: tuple[Slot, ...], exchanged: tuple[Tensor, Tensor] | None) -> Tensor:
        """The reference point of each label; a placeholder for what has none."""
        if self.baseline is None:
            return torch.zeros(len(slots), dtype=torch.float64)
        cfg = self.cfg
        assert isinstance(cfg, config.Train)
        if exchanged is None or cfg.variant != "released":
            return self.baseline.of([slot.unit for slot in slots])
        # as published: of this very micro-batch, the mean of the ranks' means
        total = torch.stack([values.mean() for values in exchanged])
        dist.all_reduce(total)
        logp, ref_logp = torch.split(total / self.ranks, 1)
        self.baseline.value = float(objective.z0_released(logp, ref_logp, beta=cfg.beta, entropy=cfg.entropy))
        return torch.full((len(slots),), self.baseline.value, dtype=torch.float64)

    def _note(self, slots: tuple[Slot, ...], loss: objective.Loss, exchanged: tuple[Tensor, Tensor] | None) -> None:
        measures = {name: values.tolist() for name, values in loss.measures.items()}
        if "margin" not in measures:
            return
        if exchanged:
            measures["ratio"] = (exchanged[0] - exchanged[1]).tolist()
        names = [name for name in ("reward", "margin", "nats", "z0_exact", "ratio") if name in measures]
        for place, slot in enumerate(slots):
            if slot.weight:
                self.seen.append(Seen(unit=slot.unit, **{name: measures[name][place] for name in names}))

    def _forward(self, slots: tuple[Slot, ...], reading: bool) -> Batch:
        units = tuple(self.job.units[slot.unit] for slot in slots)
        keys = dict.fromkeys(key for unit in units for key in unit.keys)
        read = [self.rows[key].read() if reading else self.rows[key] for key in keys]
        packed = pack(read, share=self.cfg.share_prefix).to(self.engine.device)
        with memory.on_host() if self.cfg.host_activations else nullcontext():
            scores = self.engine(packed, self._anchor(packed))
        turns = tuple(turns_of(unit, self.rows, self.cfg) for unit in units)
        return batch_of(packed, scores, units, [slot.weight for slot in slots], self.reference, turns)

    def _anchor(self, packed: Pack) -> Anchor | None:
        """The reference's view of a pack, where its distributions are needed."""
        if self.anchor is None:
            return None
        with lora.off(self.model) if self.anchor is self.engine.module else nullcontext():
            found: Anchor = self.anchor.anchor(packed)
        return found

    def _means(self, mine: dict[str, float], share: float) -> dict[str, float]:
        """Means over the step's units (entropy: over action tokens) and plain counts, of all ranks together."""
        names = sorted(mine)
        told = [0.0 if self._follows else mine[name] for name in names]
        vector = torch.tensor(told, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(vector)
        total = dict(zip(names, vector.tolist(), strict=True))
        units = total.pop("units")
        line = {"loss": total.pop("loss") / share, "entropy": total.pop("entropy") / total["action_tokens"]}
        for name, value in total.items():
            line[name.removeprefix("mean ")] = value / units if name.startswith("mean ") else value
        return line

    def _grad_norm(self, number: int) -> dict[str, float]:
        """Before clipping; DeepSpeed keeps none at stage 0 in fp32."""
        norm = self.engine.get_global_grad_norm()
        if norm is None:
            return {}
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"the gradient norm of step {number} is {norm}; its losses were finite")
        return {"grad_norm": float(norm)}

    def _checkpoint(self, step: int) -> None:
        state = {"step": step, "baseline": self._state()}
        self.kept.keep(step, lambda folder: self.engine.save_checkpoint(str(folder), tag=_TAG, client_state=state))

    def _state(self) -> dict[str, Any]:
        return self.baseline.state() if self.baseline else {}

    def _resume(self) -> int:
        """The step to begin with: 0, or that of the last checkpoint after a rank was lost."""
        step = 0

        def load(folder: Path) -> None:
            nonlocal step
            _, state = self.engine.load_checkpoint(str(folder), tag=_TAG)
            step = state["step"]
            if self.baseline:
                self.baseline.restore(state["baseline"])

        self.kept.restore(load)
        if self.rank == 0:
            log = self.job.to / STEPS
            lines = log.read_text().splitlines(keepends=True)[:step] if log.is_file() else []
            log.write_text("".join(lines))
        return step


def _own_directory(home: str) -> tempfile.TemporaryDirectory[str]:
    """DeepSpeed names its files by rank alone, so two runs on one node would share them."""
    Path(home).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=home, prefix="optimizer-")


def _offload(cfg: config.Fit, disk: str | None) -> dict[str, Any]:
    """Where ZeRO keeps the optimizer's states, if not beside the weights; `disk`: a directory of this rank alone.

    On a disk they go through DeepSpeed's async_io, which needs libaio's headers and is compiled at the first start.
    """
    if not cfg.offload:
        return {}
    if disk is None:
        return {"offload_optimizer": {"device": "cpu"}}
    return {"offload_optimizer": {"device": "nvme", "nvme_path": disk, "pin_memory": cfg.worker_gpus > 0}}


def _engine(module: torch.nn.Module, cfg: config.Fit, disk: str | None) -> Any:
    settings = {
        # steps differ in their number of packs, so we say where one ends; these two are not used then
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": cfg.lr,
                "betas": _BETAS,
                "weight_decay": cfg.weight_decay,
                "torch_adam": True,  # torch's own: DeepSpeed's would compile an extension at the first start
                "fused": True,  # 26 ms instead of 270 for 42M weights on two cores
            },
        },
        "gradient_clipping": cfg.clip,
        "bf16": {"enabled": cfg.precision == "bf16"},
        "zero_optimization": {"stage": cfg.zero_stage} | _offload(cfg, disk),
        "steps_per_print": 1 << 30,
    }
    # else DeepSpeed compiles a shared-memory collective on CPU, at the first start and only where a compiler is
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sparse = {type(block) for block in experts.blocks(module)}
    if sparse and cfg.zero_stage == 3:
        # ranks whose tokens go to other experts must gather the same weights, or they wait for each other for ever
        deepspeed.utils.set_z3_leaf_modules(module, list(sparse))
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=settings, dist_init_required=False)
    return engine


def rate(step: int, steps: int, cfg: config.Fit) -> float:
    """Learning rate: linear warm-up over a share of the steps, then a cosine down to 0, or constant."""
    warm = math.ceil(cfg.warmup * steps)
    if step < warm:
        return cfg.lr * (step + 1) / warm
    if cfg.schedule == "constant":
        return cfg.lr
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def gathered(model: Any, *, gather: bool, keep: bool) -> dict[str, Tensor]:
    """All weights on the CPU where `keep` holds; a collective under ZeRO-3 (`gather`), one parameter at a time.

    Buffers that belong to a model's state are among them: a router's bias is one.
    """
    kept = model.state_dict().keys() if keep else ()
    state = {name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers() if name in kept}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=gather):
            if keep:
                state[name] = parameter.detach().cpu().clone()
    return state


def _peak_gib() -> float:
    """Peak memory of this rank's process or, with a GPU, of its device."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
