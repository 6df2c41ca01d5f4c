"""One system under measurement, in a process of its own: steps on request, over standard input and output.

    python -m entropo_ray.bench.systems SYSTEM SETTINGS.json

A line of JSON comes back for each word: `step`, `check` (loss and gradients of the first weights, into a file), `peak`.
Every system gets the same weights, tokens, masks, optimizer and threads; each keeps its own way of computing.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import Qwen3Config, Qwen3ForCausalLM

from entropo_ray import config
from entropo_ray.bench.cases import Case
from entropo_ray.bench.head import status
from entropo_ray.train.batch import Row, pack
from entropo_ray.train.logprob import Scorer
from entropo_ray.train.size import Shape
from entropo_ray.train.step import LOSSES, Job, Unit, batch_of

BETA, LR = 0.1, 1e-6


@dataclass(frozen=True)
class Settings:
    """Of all systems of a case."""

    case: Case
    device: str
    dtype: str
    threads: int
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float32 if self.dtype == "fp32" else torch.bfloat16


def read(text: str) -> Settings:
    """Settings as they were written with dataclasses.asdict."""
    told = json.loads(text)
    case = told.pop("case")
    return Settings(case=Case(**case | {"shape": Shape(**case["shape"])}), **told)


def model_of(settings: Settings, *, reference: bool = False) -> Any:
    """The policy, or the reference that it left a little."""
    shape = settings.case.shape
    torch.manual_seed(settings.seed)
    told = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 18,
    )
    model: Any = Qwen3ForCausalLM(told)
    if not reference:
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.002 * torch.randn_like(weight)
    return model.to(settings.torch_dtype).to(settings.device)


def rows_of(settings: Settings) -> list[tuple[Row, Row]]:
    """Pairs (chosen, rejected), the same for every system; a turn is 16 to 48 sampled tokens."""
    case, rng = settings.case, np.random.default_rng(settings.seed)
    pairs = []
    for number in range(case.pairs):
        prompt = rng.integers(0, case.shape.vocab, case.prompt)
        pair = []
        for sample, length in enumerate((case.chosen, case.rejected)):
            ids = np.concatenate([prompt, rng.integers(0, case.shape.vocab, length - case.prompt)])
            pair.append(Row((f"task-{number}", sample), ids.astype(np.int32), _mask(length, case, rng)))
        pairs.append((pair[0], pair[1]))
    return pairs


def _mask(length: int, case: Case, rng: np.random.Generator) -> np.ndarray:
    mask, at = np.zeros(length, dtype=bool), case.prompt
    if case.share == 1.0:
        mask[at:] = True
    while at < length and case.share < 1.0:
        said = int(rng.integers(16, 49))
        mask[at : at + said] = True
        at += round(said / case.share)
    return mask


class System:
    """What is timed: `loss` builds a graph, the rest is the same for all."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rows = rows_of(settings)
        self.model = model_of(settings)
        if settings.case.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.prepare()
        # fused: the default of transformers' trainer, and so of TRL's
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        gc.collect()

    def prepare(self) -> None:
        """What is done once a round."""

    def loss(self) -> Tensor:
        """Scalar, with a graph."""
        raise NotImplementedError

    def step(self) -> dict[str, float]:
        """One optimizer step."""
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return {"loss": value, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    def check(self, to: Path) -> dict[str, float]:
        """The loss, and the gradient of each parameter as a file."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        found = {names[id(w)]: w.grad.detach().cpu().double().numpy() for w in self.model.parameters()}
        np.savez(to, **found)
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss.detach())}


class Ours(System):
    """The scorer, packs and loss that a rank uses; the reference is scored once a round.

    Labels have a reference point that costs no pass (z0 as with onpolicy, here 0), where TRL scores mismatched answers.
    """

    def prepare(self) -> None:
        self.scorer = Scorer(self.model)
        flat = [row for pair in self.rows for row in pair]
        with torch.no_grad():
            reference = Scorer(model_of(self.settings, reference=True))
            packed = pack(flat, share=True).to(self.settings.device)
            told = reference(packed).logp.split(list(packed.actions))
        self.reference = dict(zip(packed.keys, told, strict=True))
        kto, batch = self.settings.case.kto, len(flat) if self.settings.case.kto else len(self.rows)
        cfg = config.Train(
            loss="kto" if kto else "dpo", beta=BETA, entropy=0.0, smoothing=0.0, length="raw", batch=batch
        )
        self.job = Job(cfg.kind, None, None, (), cfg, 0, None)  # type: ignore[arg-type]
        groups = [(row,) for row in flat] if kto else list(self.rows)
        self.units = tuple(
            Unit(keys=tuple(r.key for r in group), actions=0, tokens=0, squares=0, longest=0, shortest=0,
                 desirable=group[0].key[1] == 0) for group in groups
        )  # fmt: skip

    def loss(self) -> Tensor:
        packed = pack([row for pair in self.rows for row in pair], share=True).to(self.settings.device)
        turns = tuple((None,) * len(unit.keys) for unit in self.units)
        count = len(self.units)
        batch = batch_of(packed, self.scorer(packed), self.units, [1.0] * count, self.reference, turns)
        return LOSSES[self.job.kind](batch, self.job, torch.zeros(count, dtype=torch.float64)).values.mean()


class Truth(System):
    """All logits of what was sampled, in double, one trajectory at a time: what the others are held against."""

    def prepare(self) -> None:
        self.model = self.model.double()
        self.other = model_of(self.settings, reference=True).double()

    def loss(self) -> Tensor:
        return torch.stack([self._pair(*pair) for pair in self.rows]).mean()

    def _pair(self, chosen: Row, rejected: Row) -> Tensor:
        ratios = []
        for row in (chosen, rejected):
            with torch.no_grad():
                reference = self._logp(self.other, row)
            ratios.append(self._logp(self.model, row) - reference)
        if self.settings.case.kto:  # against a reference point of 0
            return (torch.sigmoid(-BETA * ratios[0]) + torch.sigmoid(BETA * ratios[1])) / 2
        return -logsigmoid(BETA * (ratios[0] - ratios[1]))

    def _logp(self, model: Any, row: Row) -> Tensor:
        ids = torch.from_numpy(row.token_ids.astype(np.int64)).to(self.settings.device)
        where = torch.from_numpy(np.flatnonzero(row.action_mask)).to(self.settings.device)
        hidden = model.model(ids[None], use_cache=False).last_hidden_state[0, where - 1]
        logits = model.lm_head(hidden)
        logp = torch.log_softmax(logits, -1).gather(1, ids[where, None])
        return logp.sum()


class Trl(System):
    """TRL's DPOTrainer or KTOTrainer as they come; its batches get holes in their masks, as it knows no turns."""

    precompute = False

    def prepare(self) -> None:
        kind = "KTO" if self.settings.case.kto else "DPO"
        reference = None if self.precompute and kind == "DPO" else model_of(self.settings, reference=True)
        self.trainer = _trainer(kind, self.settings, self.model, reference, precompute=self.precompute)
        self.batch = self._padded([pair[0] for pair in self.rows] + [pair[1] for pair in self.rows])
        if kind == "KTO":
            self._kto_batch()
        elif self.precompute:
            policy = {name: weight.clone() for name, weight in self.model.state_dict().items()}
            self.model.load_state_dict(model_of(self.settings, reference=True).state_dict())
            names = ("ref_chosen_logps", "ref_rejected_logps")
            self.batch |= dict(zip(names, self.trainer.compute_ref_log_probs(self.model, self.batch), strict=True))
            self.model.load_state_dict(policy)

    def _padded(self, rows: list[Row]) -> dict[str, Any]:
        length = max(len(row.token_ids) for row in rows)
        batch = {
            name: torch.zeros(len(rows), length, dtype=torch.int64)
            for name in ("input_ids", "attention_mask", "completion_mask")
        }
        for number, row in enumerate(rows):
            size = len(row.token_ids)
            batch["input_ids"][number, :size] = torch.from_numpy(row.token_ids.astype(np.int64))
            batch["attention_mask"][number, :size] = 1
            batch["completion_mask"][number, :size] = torch.from_numpy(row.action_mask.astype(np.int64))
        return {name: values.to(self.settings.device) for name, values in batch.items()}

    def _kto_batch(self) -> None:
        count = len(self.rows)
        mismatched = {f"KL_{name}": values.roll(1, 0) for name, values in self.batch.items()}
        self.batch |= mismatched | {"label": torch.tensor([True] * count + [False] * count)}

    def loss(self) -> Tensor:
        found: Tensor = self.trainer.compute_loss(self.model, self.batch)
        return found


class TrlPrecomputed(Trl):
    """With precompute_ref_log_probs: no reference model in memory."""

    precompute = True


def _trainer(kind: str, settings: Settings, policy: Any, reference: Any, *, precompute: bool) -> Any:
    import trl
    from datasets import Dataset  # type: ignore[import-untyped]
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"-": 0, ".": 1, "a": 2}, unk_token="-"))
    options: dict[str, Any] = {
        "use_cpu": settings.device == "cpu", "bf16": False, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": settings.case.checkpointing, "dataloader_pin_memory": False, "beta": BETA,
        "max_length": None, "precompute_ref_log_probs": precompute,
    }  # fmt: skip
    told = {"prompt": "a", "chosen": "a", "rejected": "."}
    if kind == "KTO":
        told = {"prompt": "a", "completion": "a", "label": True}  # type: ignore[dict-item]
        options["per_device_train_batch_size"] = 2
    home = tempfile.gettempdir()  # nothing is written there
    return getattr(trl, f"{kind}Trainer")(
        policy,
        reference,
        getattr(trl, f"{kind}Config")(home, **options),
        train_dataset=Dataset.from_list([told, told]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token=".", pad_token="-"),
    )


SYSTEMS: dict[str, Callable[[Settings], System]] = {
    "ours": Ours,
    "trl": Trl,
    "trl precomputed": TrlPrecomputed,
    "fp64": Truth,
}


def main() -> None:
    """Serve one system."""
    name, settings = sys.argv[1], read(Path(sys.argv[2]).read_text())
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(settings.threads)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print does not mix with the answers
    if name.startswith("trl"):
        importlib.import_module("trl").DPOTrainer  # noqa: B018  (it loads on first use)
    cuda = settings.device == "cuda"
    before = status("VmRSS") / 2**30
    system = SYSTEMS[name](settings)
    weights = sum(weight.numel() * weight.element_size() for weight in system.model.parameters()) / 2**30
    for word in itertools.chain(["ready"], (line.strip() for line in iter(sys.stdin.readline, ""))):
        answer: dict[str, float] = {}
        if word == "step":
            answer = system.step()
        elif word.startswith("check "):
            answer = system.check(Path(word.removeprefix("check ")))
        elif word == "reset":
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        elif word == "peak":
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else status("VmHWM") / 2**30 - before
            answer = {"above_gib": peak - weights, "model_gib": weights}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
