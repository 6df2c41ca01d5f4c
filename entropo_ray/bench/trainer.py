"""One optimizer step of ours and of TRL's trainers on the same weights and tokens, taking turns in one run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entropo_ray.bench.cases import CASES, Case, least_flops
from entropo_ray.bench.systems import Settings

RIVALS = ("trl", "trl precomputed")
_WAIT_S = 1800.0  # for one answer


@dataclass(frozen=True)
class Trainer:
    """`jobs/bench.py trainer`."""

    cases: list[str] = field(default_factory=lambda: ["vocabulary", "ragged", "equal", "kto"])
    systems: list[str] = field(default_factory=lambda: ["ours", *RIVALS])
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "bf16" if torch.cuda.is_available() else "fp32"
    steps: int = 4  # timed, after a warm-up of 2
    threads: int = 0  # 0: all cores
    truth: bool = True  # losses and gradients held against full logits in double


def run(cfg: Trainer) -> dict[str, Any]:
    """Everything measured, by case and system; the table is printed on the way."""
    unknown = [name for name in cfg.cases if name not in CASES] + [n for n in cfg.systems if n not in ("ours", *RIVALS)]
    if unknown:
        raise ValueError(f"{unknown[0]}: unknown; cases are {', '.join(CASES)}; systems are ours, {', '.join(RIVALS)}")
    threads = cfg.threads or len(os.sched_getaffinity(0))
    peak = _peak_flops(cfg)
    result: dict[str, Any] = {"device": cfg.device, "dtype": cfg.dtype, "threads": threads, "gemm_tflops": peak / 1e12}
    for name in cfg.cases:
        case = CASES[name]
        systems = [s for s in cfg.systems if not (case.kto and s == "trl precomputed")]
        settings = Settings(case, cfg.device, cfg.dtype, threads)
        found = _case(settings, systems, cfg)
        for system, numbers in found.items():
            numbers["share_of_least"] = least_flops(case) / peak / numbers["wall"]
            numbers["tokens_per_s"] = case.pairs * (case.chosen + case.rejected) / numbers["wall"]
            for measure in ("wall", "cpu", "above_gib") if system != "ours" and "ours" in found else ():
                numbers[f"{measure}_ratio"] = numbers[measure] / found["ours"][measure]
        result[name] = found
        sys.stdout.write("\n".join([*_lines(case, found), ""]))
        sys.stdout.flush()
    return result


def _case(settings: Settings, systems: Sequence[str], cfg: Trainer) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as home, ExitStack() as stack:
        file = Path(home) / "settings.json"
        file.write_text(json.dumps(asdict(settings)))
        truth = _check(stack.enter_context(_child("fp64", file)), Path(home)) if cfg.truth else None
        stack.close()  # its memory goes before the others come
        children = {name: stack.enter_context(_child(name, file)) for name in systems}
        found: dict[str, dict[str, float]] = {name: {} for name in systems}
        for name, child in children.items():
            if truth:
                found[name] |= _difference(_check(child, Path(home)), truth)
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
        for number in range(2 + cfg.steps):
            for name, child in children.items():  # turn by turn, so that a slow minute of the machine hits all
                if number == 1:
                    child.ask("reset")
                steps[name].append(child.ask("step"))
        for name, child in children.items():
            timed = steps[name][2:]
            found[name] |= {what: statistics.median(step[what] for step in timed) for what in ("wall", "cpu")}
            found[name] |= {"wall_min": min(step["wall"] for step in timed), "loss": steps[name][0]["loss"]}
            found[name] |= child.ask("peak")
        return found


def _check(child: _Child, home: Path) -> dict[str, Any]:
    file = home / f"{child.name.replace(' ', '-')}.npz"
    return child.ask(f"check {file}") | {"file": file}


def _difference(mine: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, float]:
    """Relative distance of all gradients together, and the distance of the loss."""
    apart = whole = 0.0
    with np.load(mine["file"]) as one, np.load(truth["file"]) as other:
        for name in other.files:
            right = other[name]
            apart += float(np.square(one[name] - right).sum())
            whole += float(np.square(right).sum())
    return {"loss_error": abs(mine["loss"] - truth["loss"]), "gradient_error": (apart / whole) ** 0.5}


@dataclass(frozen=True)
class _Child:
    """A system in its own process."""

    name: str
    process: subprocess.Popen[str]
    log: Path  # what it and its libraries say; a pipe that nobody reads would fill up

    def ask(self, word: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        guard = threading.Timer(_WAIT_S, self.process.kill)
        guard.start()
        line = self.process.stdout.readline()
        guard.cancel()
        if not line:
            said = self.log.read_text()[-2000:]
            raise RuntimeError(f"{self.name} ended, or gave no answer in {_WAIT_S:.0f} s: {said}")
        found: dict[str, float] = json.loads(line)
        return found


@contextmanager
def _child(name: str, settings: Path) -> Iterator[_Child]:
    command = [sys.executable, "-m", "entropo_ray.bench.systems", name, str(settings)]
    log = settings.with_name(f"{name.replace(' ', '-')}.log")
    with log.open("w") as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
    child = _Child(name, process, log)
    try:
        child.answer()
        yield child
    finally:
        process.kill()
        process.wait(timeout=30)


def _peak_flops(cfg: Trainer) -> float:
    """Rate of a large matrix product, which nothing here can exceed."""
    dtype = torch.float32 if cfg.dtype == "fp32" else torch.bfloat16
    size = 2048 if cfg.device == "cpu" else 8192
    one = torch.randn(size, size, dtype=dtype, device=cfg.device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        one @ one
        if cfg.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _lines(case: Case, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    heads = ("s/step", "cpu s", "times ours", "GiB above", "times ours", "tok/s", "of least", "loss err", "grad err")
    shape = case.shape
    rows = [
        f"\n{case.name}: {case.pairs} x ({case.chosen} + {case.rejected}) tokens, {case.share:.0%} sampled, vocabulary "
        f"{shape.vocab:,}, {shape.layers} layers of {shape.hidden}",
        f"{'':16}" + "".join(f"{head:>12}" for head in heads),
    ]
    for name, n in found.items():
        ratios = [f"{n[key]:.2f}" if key in n else "" for key in ("wall_ratio", "above_gib_ratio")]
        errors = [f"{n[key]:.1e}" if key in n else "–" for key in ("loss_error", "gradient_error")]
        cells = [f"{n['wall']:.3f}", f"{n['cpu']:.2f}", ratios[0], f"{n['above_gib']:.2f}", ratios[1]]
        cells += [f"{n['tokens_per_s']:.0f}", f"{n['share_of_least']:.0%}", *errors]
        rows.append(f"{name:16}" + "".join(f"{cell:>12}" for cell in cells))
    return rows
