"""The head alone: time and memory of log-probabilities from full logits and from tiles, by length."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropo_ray.train.logprob import score

_WAIT_S = 1800
_EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # of glibc: nothing freed is kept


@dataclass(frozen=True)
class Logprob:
    """`jobs/bench.py logprob`."""

    tokens: list[int] = field(default_factory=lambda: [2048, 4096, 8192, 16_384])
    share: float = 0.22  # of the tokens that the policy sampled: what the head sees
    vocab: int = 151_936
    hidden: int = 256
    dtype: str = "fp32"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    repeats: int = 3
    threads: int = 0  # 0: all cores
    most_gib: float = 12.0  # full logits above this are not tried


def run(cfg: Logprob) -> dict[str, Any]:
    """Seconds and GiB above the inputs by variant and length, each in a process of its own."""
    result: dict[str, Any] = {}
    sys.stdout.write(f"{'':14}" + "".join(f"{n:>9} tokens" for n in cfg.tokens) + "   last / first\n")
    for name in VARIANTS:
        cells: list[dict[str, float] | None] = []
        for tokens in cfg.tokens:
            needed = 4 * 4 * cfg.share * tokens * cfg.vocab / 2**30
            cells.append(None if name == "full logits" and needed > cfg.most_gib else _measured(name, tokens, cfg))
        result[name] = dict(zip(map(str, cfg.tokens), cells, strict=True))
        for what in ("seconds", "gib"):
            shown = "".join(f"{'–':>16}" if cell is None else f"{cell[what]:16.3f}" for cell in cells)
            known = [cell[what] for cell in cells if cell is not None]
            sys.stdout.write(f"{name} {what:8}{shown}{known[-1] / known[0]:15.2f}\n")
        first, last = cells[0], cells[-1]
        if first is not None and last is not None:
            result[name]["growth"] = last["gib"] / first["gib"] - 1
    return result


def _measured(name: str, tokens: int, cfg: Logprob) -> dict[str, float]:
    """Time and memory by a process each: what is freed must go back at once to be seen, which takes time."""
    timed = _child(name, tokens, cfg, {})
    weighed = _child(name, tokens, replace(cfg, repeats=1), _EXACT)
    return {"seconds": timed["seconds"], "gib": weighed["gib"]}


def _child(name: str, tokens: int, cfg: Logprob, env: dict[str, str]) -> dict[str, float]:
    words = [sys.executable, "-m", "entropo_ray.bench.head", name, str(tokens), json.dumps(asdict(cfg))]
    found: dict[str, float] = json.loads(output(words, f"{name} at {tokens} tokens", env).splitlines()[-1])
    return found


def output(words: list[str], what: str, env: dict[str, str]) -> str:
    """What a process of a benchmark prints. RuntimeError, with the end of its complaint, where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=_WAIT_S, check=False, env=os.environ | env)
    if done.returncode:
        raise RuntimeError(f"{what} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _tiles(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return score(hidden, weight, target).logp


def _full(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, target[:, None]).squeeze(1)


VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"tiles": _tiles, "full logits": _full}


def main() -> None:
    """One variant at one length."""
    name, tokens, cfg = sys.argv[1], int(sys.argv[2]), Logprob(**json.loads(sys.argv[3]))
    torch.set_num_threads(cfg.threads or len(os.sched_getaffinity(0)))
    dtype = torch.float32 if cfg.dtype == "fp32" else torch.bfloat16
    torch.manual_seed(0)
    count = round(cfg.share * tokens)
    weight = torch.randn(cfg.vocab, cfg.hidden, device=cfg.device, dtype=dtype).mul_(0.05).requires_grad_()
    target = torch.randint(0, cfg.vocab, (count,), device=cfg.device)
    hidden = torch.randn(count, cfg.hidden, device=cfg.device, dtype=dtype, requires_grad=True)
    _once(VARIANTS[name], hidden[:64].detach().requires_grad_(), weight, target[:64])  # what is loaded on first use
    cuda = cfg.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() if cuda else status("VmRSS")
    seconds = [_once(VARIANTS[name], hidden, weight, target) for _ in range(cfg.repeats)]
    peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    print(json.dumps({"seconds": statistics.median(seconds), "gib": (peak - before) / 2**30}))  # noqa: T201


def _once(variant: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, target: Tensor) -> float:
    started = time.perf_counter()
    variant(hidden, weight, target).sum().backward()  # type: ignore[no-untyped-call]
    hidden.grad = weight.grad = None
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def status(name: str) -> int:
    """Bytes that the kernel counts for this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
