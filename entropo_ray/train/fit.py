"""Updates on a Ray cluster: who runs the ranks, and when the new policy is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from entropo_ray import config, store
from entropo_ray.records import Policy
from entropo_ray.train.reference import by_ray_data
from entropo_ray.train.step import Job
from entropo_ray.train.update import apart, imitation, preferred, publish

_RESTARTS = 3
_TAKEN_S = 600.0  # for a checkpoint, to be known to the controller
# glibc gives blocks of this size back to the kernel and faults them in again for every tensor of a step; a CPU rank
# that keeps them read 13 % more tokens a second (0.98M parameters, packs of 8 rows)
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def imitate(
    policy: Policy, examples: Path, cfg: config.Fit, *, seed: int, to: Path, read_epochs: int = 0
) -> dict[str, float]:
    """Whole Hugging Face weights at `to`, fitted to the action tokens of the Example product `examples`.

    The first `read_epochs` of the epochs fit all tokens: a model that knows no language learns it from what it reads.
    Examples without action tokens are left out and counted (`dropped_rows`). Raises ValueError for an example longer
    than `max_tokens`, for two with one key, and where none is left.
    """
    job, numbers = imitation(policy, examples, cfg, seed=seed, to=to, read_epochs=read_epochs)
    return _run(job, to) | numbers


def fit(
    policy: Policy, reference: Policy, out: store.Round, cfg: config.Train, *, seed: int, to: Path
) -> dict[str, float]:
    """The EntroPO update of one round: whole Hugging Face weights at `to`. Errors as of update.preferred."""
    job, numbers = preferred(policy, reference, out, cfg, seed=seed, to=to, through=by_ray_data)
    return numbers | _run(job, to)


def _run(job: Job, to: Path) -> dict[str, float]:
    """Start the ranks, wait for them, publish what rank 0 wrote."""
    started = time.perf_counter()
    partial = apart(to)
    cfg = job.cfg
    # the default of 2 s is the pace at which reports are taken and the end is noticed
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    trainer = TorchTrainer(
        _rank,
        train_loop_config={"job": replace(job, to=partial)},
        scaling_config=ScalingConfig(
            num_workers=cfg.workers,
            use_gpu=cfg.worker_gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": cfg.worker_gpus} if cfg.worker_gpus else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if cfg.worker_gpus else "gloo"),
        run_config=RunConfig(
            name="ranks",
            storage_path=str(partial),
            failure_config=FailureConfig(max_failures=_RESTARTS if cfg.checkpoint_steps else 0),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={} if cfg.worker_gpus else {"env_vars": _KEEP_MEMORY},
        ),
    )
    trainer.fit()
    shutil.rmtree(partial / "ranks", ignore_errors=True)
    return publish(job, partial, to) | {"seconds": time.perf_counter() - started}


def _rank(settings: dict[str, Job]) -> None:
    from entropo_ray.train.worker import Fitting  # here, so that the driver need not import DeepSpeed

    Fitting(settings["job"], Reported()).run()


class Reported:
    """A rank's checkpoints, kept by Ray Train."""

    def restore(self, load: Callable[[Path], None]) -> None:
        """Hand the last checkpoint's folder to `load`, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                load(Path(folder))

    def keep(self, step: int, save: Callable[[Path], None]) -> None:
        """What `save` writes into a folder becomes the checkpoint before `step`; all ranks call this equally often."""
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            name = f"step_{step:06d}"
            ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder), checkpoint_dir_name=name)
            ray.train.get_all_reported_checkpoints(timeout_s=_TAKEN_S)  # until it is taken: else steps pass unkept
