"""Updates over ranks and ZeRO stages: time of a step, and a rank's memory beside what train/size.py expects."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from entropo_ray import config, store
from entropo_ray.bench.cases import Case
from entropo_ray.bench.head import output
from entropo_ray.bench.systems import Settings, model_of, rows_of
from entropo_ray.records import Grade, Pair, Policy, Stop, Trajectory
from entropo_ray.train import alone, size
from entropo_ray.train.batch import Row
from entropo_ray.train.logprob import TILE_FLOATS

_WARM = 2  # steps that are not timed


@dataclass(frozen=True)
class Ranks:
    """`jobs/bench.py ranks`: the same steps over so many ranks at each stage, in fp32 on CPUs and bf16 on GPUs."""

    ranks: list[int] = field(default_factory=lambda: [1, 2])
    stages: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    layers: int = 4
    hidden: int = 512
    vocab: int = 32_768
    pairs: int = 4  # a step
    tokens: int = 128  # of a chosen trajectory; a rejected one has three quarters
    steps: int = 3  # timed, after a warm-up of 2
    threads: int = 1  # of a rank on CPU
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def case(self) -> Case:
        """Geometry and pairs."""
        heads = max(2, self.hidden // 64)
        shape = size.Shape(self.layers, self.hidden, heads, heads // 2, 64, self.vocab, 3 * self.hidden, tied=True)
        prompt = min(128, self.tokens // 4)
        rejected = 3 * self.tokens // 4
        return Case("ranks", shape, self.pairs, prompt=prompt, chosen=self.tokens, rejected=rejected)

    def fit(self, ranks: int, stage: int) -> config.Train:
        """The update that is timed."""
        cuda = self.device == "cuda"
        return config.Train(
            workers=ranks, zero_stage=stage,  # type: ignore[arg-type]
            batch=self.pairs, steps=_WARM + self.steps, max_tokens=1 << 20,
            precision="bf16" if cuda else "fp32", worker_gpus=int(cuda), worker_threads=self.threads,
        )  # fmt: skip


def run(cfg: Ranks) -> dict[str, Any]:
    """Everything measured, by ranks and stage; the table is printed on the way."""
    case, result = cfg.case, {}
    sys.stdout.write(
        f"{case.shape.weights / 1e6:.1f}M weights, {cfg.pairs} x ({case.chosen} + {case.rejected}) tokens a step\n"
        f"{'':16}{'s/step':>10}{'tok/s':>10}{'speed-up':>10}{'GiB':>10}{'expected':>10}\n"
    )
    with tempfile.TemporaryDirectory() as home:
        _write(cfg, Path(home))
        for ranks in cfg.ranks:
            for stage in cfg.stages:
                result[f"{ranks} x ZeRO-{stage}"] = found = _measured(cfg, ranks, stage, Path(home))
                found["speed_up"] = next(iter(result.values()))["seconds"] / found["seconds"]
                cells = [f"{found['seconds']:.3f}", f"{found['tokens_per_s']:.0f}", f"{found['speed_up']:.2f}"]
                cells += [f"{found['gib']:.2f}", f"{found['expected_gib']:.2f}"]
                sys.stdout.write(f"{ranks} x ZeRO-{stage:<8}" + "".join(f"{cell:>10}" for cell in cells) + "\n")
                sys.stdout.flush()
    return result


def _measured(cfg: Ranks, ranks: int, stage: int, home: Path) -> dict[str, float]:
    """One start of the ranks: a step of a tiny model, whose memory is that of the process, then the update."""
    words = [sys.executable, *(["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else [])]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"] if ranks > 1 else []
    words += ["-m", "entropo_ray.bench.ranks", str(home), json.dumps([asdict(cfg), ranks, stage])]
    output(words, f"{ranks} ranks at stage {stage}", {})
    tiny, found = (
        [json.loads(line) for line in (home / f"{name}-{ranks}-{stage}" / "steps.jsonl").read_text().splitlines()]
        for name in ("tiny", "full")
    )
    seconds = statistics.median(step["seconds"] for step in found[_WARM:])
    case = cfg.case
    return {
        "seconds": seconds,
        "tokens_per_s": case.pairs * (case.chosen + case.rejected) / seconds,
        "gib": found[-1]["peak_gib"] - (0.0 if cfg.device == "cuda" else tiny[-1]["peak_gib"]),
        "expected_gib": expected(cfg, ranks, stage)["all"],
    }


def expected(cfg: Ranks, ranks: int, stage: int) -> Mapping[str, float]:
    """What size.py says of a rank that holds one pair at a time."""
    case = cfg.case
    cuda = cfg.device == "cuda"
    layout = size.Layout(
        ranks=ranks, zero_stage=stage, bytes=2 if cuda else 4, kept="all", logits=TILE_FLOATS[cfg.device]
    )
    tokens = case.chosen + case.rejected - case.prompt
    return size.memory_gib(case.shape, layout, tokens, round(case.share * (tokens - case.prompt)))


def _write(cfg: Ranks, home: Path) -> None:
    """A full and a tiny policy, and a round of pairs for each."""
    tiny = replace(cfg, layers=1, hidden=64, vocab=97, tokens=64)
    for name, one in (("full", cfg), ("tiny", tiny)):
        settings = Settings(one.case, "cpu", "fp32", 1)
        model_of(settings).save_pretrained(home / f"{name}-policy")
        out = store.round_of(home / name, 0)
        pairs = rows_of(settings)
        store.write(out.trajectories, Trajectory, [_trajectory(row) for pair in pairs for row in pair])
        chosen = [pair[0].key[0] for pair in pairs]
        store.write(out.preferences, Pair, [Pair(task_id=task_id, chosen=0, rejected=1) for task_id in chosen])


def _trajectory(row: Row) -> Trajectory:
    """A record around tokens that nobody sampled."""
    task_id, sample = row.key
    return Trajectory(
        task_id=task_id, sample=sample, round=0, seed=0, kind="scripted", scaffold="", prompt="", temperature=1.0,
        turns=(), token_ids=tuple(row.token_ids.tolist()), action_mask=tuple(row.action_mask.tolist()),
        behaviour_logp=(0.0,) * len(row.token_ids), num_turns=len(row.turns()),
        num_actions=int(row.action_mask.sum()), num_tokens=len(row.token_ids), patch="", patch_class="", files=(),
        stop=Stop.AGENT, reason="", wall_s=0.0, grade=Grade.RESOLVED if sample == 0 else Grade.UNRESOLVED,
        verdict=None,
    )  # fmt: skip


def main() -> None:
    """A rank, or the only one."""
    home = Path(sys.argv[1])
    told, ranks, stage = json.loads(sys.argv[2])
    cfg = Ranks(**told)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with alone.ranks(gpus=cfg.device == "cuda") as driving:
        for name, steps in (("tiny", 1), ("full", _WARM + cfg.steps)) if driving else ():
            policy = Policy(path=home / f"{name}-policy", round=0)
            words = replace(cfg.fit(ranks, stage), steps=steps)
            out = store.round_of(home / name, 0)
            alone.fit(policy, policy, out, words, seed=0, to=home / f"{name}-{ranks}-{stage}")


if __name__ == "__main__":
    main()
