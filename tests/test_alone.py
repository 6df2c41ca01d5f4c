"""Updates without Ray: one process or torchrun, on gloo; and what must not change a loss."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_train import SHAPE, trajectory

from entropo_ray import store
from entropo_ray.records import Pair, Trajectory

ROOT = Path(__file__).parents[1]
TASKS, SAMPLES, PROMPT = 4, 4, 24
FIT = {
    "max_tokens": 256, "lr": 1e-3, "batch": 8, "micro_batch": 1, "worker_gpus": 0, "worker_threads": 1,
    "zero_stage": 1, "precision": "fp32", "steps": 20, "entropy": 0.0, "smoothing": 0.0, "length": "raw",
}  # fmt: skip


def attempt(task, sample):
    """The prompt of the task, then a counting reply broken by observations."""
    rng = random.Random(f"{task}/{sample}")
    prompt = [random.Random(task).randint(3, 200) for _ in range(PROMPT)]
    length, first = rng.randint(20, 60), rng.randint(3, 60)
    said = [n % 5 != 3 for n in range(length)]
    said[0] = True
    ids = (*prompt, *(first + n for n in range(length)))
    return replace(
        trajectory((f"task-{task}", sample)),
        token_ids=ids,
        action_mask=(*[False] * PROMPT, *said),
        behaviour_logp=(0.0,) * len(ids),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy, and a round with three pairs a task."""
    from entropo_ray.train.initial import start

    home = tmp_path_factory.mktemp("alone")
    start(["def add(a, b):\n    return a + b\n" * 20], SHAPE, seed=3, to=home / "base")
    out = store.round_of(home / "run", 0)
    store.write(out.trajectories, Trajectory, [attempt(t, s) for t in range(TASKS) for s in range(SAMPLES)])
    pairs = [Pair(task_id=f"task-{t}", chosen=s, rejected=s + 1) for t in range(TASKS) for s in range(SAMPLES - 1)]
    store.write(out.preferences, Pair, pairs)
    return home


PROGRAM = """
import sys, json
from pathlib import Path
from entropo_ray import config, store
from entropo_ray.records import Policy
from entropo_ray.train import alone

home, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
with alone.ranks(gpus=False) as driving:
    for name, words in settings.items() if driving else ():
        base = Policy(path=home / words.pop("base", "base"), round=0)
        out = store.round_of(home / words.pop("run", "run"), 0)
        alone.fit(base, base, out, config.Train(**words), seed=0, to=home / name)
"""


def run(home, settings, *, ranks=1, restarts=0, wait=True):
    """Fits by name of `settings`, in one start of so many ranks."""
    program = home / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    words = {name: {**FIT, "workers": ranks, **more} for name, more in settings.items()}
    started = subprocess.Popen(
        [*command, str(program), str(home), json.dumps(words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not wait:
        return started
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 0, errors[-3000:]
    return {name: trace(home / name) for name in settings}


def trace(product):
    return [json.loads(line) for line in (product / "steps.jsonl").read_text().splitlines()]


def test_a_loss_trace_does_not_depend_on_packing_sharing_accumulation_stage_or_workers(home):
    """Twenty steps in fp32. One process for all settings of one rank, one torchrun for all of two."""
    one = run(
        home,
        {
            "1x8": {"micro_batch": 1, "share_prefix": False},
            "8x1": {"micro_batch": 8, "share_prefix": False, "zero_stage": 0},
            "8x1-shared": {"micro_batch": 8, "share_prefix": True},
            "by-tokens": {"pack_tokens": 300, "share_prefix": True},
            "zero-2": {"micro_batch": 2, "zero_stage": 2},
            "zero-3": {"micro_batch": 2, "zero_stage": 3},
            "checkpointing": {"micro_batch": 2, "checkpointing": True},
            "offload": {"micro_batch": 2, "zero_stage": 2, "offload": True},
            "kept-attention": {"micro_batch": 2, "checkpointing": True, "keep_attention": True},
            "tiled": {"micro_batch": 4, "mlp_tokens": 50, "logits": 1, "checkpointing": True},
        },
    )
    two = run(
        home,
        {
            "two-zero-1": {"micro_batch": 4, "share_prefix": False},
            "two-zero-2": {"pack_tokens": 300, "zero_stage": 2},
            "two-zero-3": {"micro_batch": 1, "zero_stage": 3},
            "sequence-zero-2": {"sequence_parallel": 2, "micro_batch": 4, "zero_stage": 2},
            "sequence-zero-3": {"sequence_parallel": 2, "pack_tokens": 300, "zero_stage": 3, "checkpointing": True},
        },
        ranks=2,
    )
    first = one["1x8"]
    assert len(first) == 20
    assert first[0]["loss"] == math.log(2)
    assert first[-1]["loss"] < 0.6
    for name, found in itertools.chain(one.items(), two.items()):
        # odd stretches of an MLP are matrix products of odd shapes, whose last bits a CPU does not promise
        assert found[0]["loss"] == (pytest.approx(math.log(2), abs=1e-8) if name == "tiled" else math.log(2)), name
        for step, (mine, truth) in enumerate(zip(found, first, strict=True)):
            for measure in ("loss", "margin", "logp_chosen", "logp_rejected"):
                assert mine[measure] == pytest.approx(truth[measure], abs=1e-5, rel=1e-5), (name, step, measure)


def test_an_update_whose_rank_is_killed_ends_with_the_weights_of_an_undisturbed_one(home):
    """Bit for bit; steps since the last checkpoint are done again, and no others."""
    settings = {"micro_batch": 2, "zero_stage": 2, "checkpoint_steps": 4, "steps": 12}
    run(home, {"undisturbed": settings}, ranks=2)

    started = run(home, {"disturbed": settings}, ranks=2, restarts=1, wait=False)
    log = home / ".disturbed.alone.partial" / "steps.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 6):
        assert started.poll() is None, started.stderr.read()[-3000:]
        assert time.monotonic() < deadline, "no six steps within 120 s"
        time.sleep(0.02)
    seen = trace(log.parent)
    os.kill(seen[-1]["pid"], signal.SIGKILL)
    _, errors = started.communicate(timeout=180)
    assert started.returncode == 0, errors[-6000:]

    one, other = trace(home / "undisturbed"), trace(home / "disturbed")
    assert [step["step"] for step in other] == list(range(12))
    assert [step["loss"] for step in other] == [step["loss"] for step in one]
    pids = [step["pid"] for step in other]
    assert len(set(pids)) == 2
    assert pids.index(pids[-1]) % 4 == 0  # it went on from a checkpoint, at most an interval back
    assert pids.index(pids[-1]) >= len(seen) - 4
    weights = [(home / name / "model.safetensors").read_bytes() for name in ("undisturbed", "disturbed")]
    assert weights[0] == weights[1]
    assert not (home / "disturbed" / "checkpoints").exists()


def test_a_number_of_ranks_that_was_not_asked_for_is_refused(home):
    started = run(home, {"refused": {"workers": 3}}, ranks=2, wait=False)
    _, errors = started.communicate(timeout=120)
    assert started.returncode != 0
    assert "train.workers=3: 2 ranks were started; give train.workers=2" in errors
    assert not (home / "refused").exists()


def weights_of(product):
    from safetensors.torch import load_file

    return load_file(product / "model.safetensors")


def test_adapters_are_trained_alone_merged_and_lie_beside_the_weights(home):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    words = {"lora_rank": 4, "steps": 4, "micro_batch": 4, "lr": 1e-2, "lora_targets": ["q_proj", "down_proj"]}
    one = run(home, {"lora": words})["lora"]
    two = run(home, {"lora-two": {**words, "zero_stage": 3}}, ranks=2)["lora-two"]
    assert one[0]["loss"] == two[0]["loss"] == math.log(2)
    assert one[-1]["loss"] < math.log(2) - 1e-3
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], abs=1e-5)

    before, after = weights_of(home / "base"), weights_of(home / "lora")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj.weight" in name or "down_proj.weight" in name}
    ids = torch.arange(40)[None]
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    merged = AutoModelForCausalLM.from_pretrained(home / "lora")(ids).logits
    apart = PeftModel.from_pretrained(base, home / "lora" / "adapter")(ids).logits
    torch.testing.assert_close(merged, apart, rtol=1e-5, atol=1e-5)


def test_adapters_that_would_miss_the_experts_of_a_mixture_are_refused():
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from entropo_ray import config
    from entropo_ray.train import lora

    shape = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    shape |= {"num_key_value_heads": 1, "moe_intermediate_size": 8, "num_experts": 4, "mlp_only_layers": [0]}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, intermediate_size=24, num_experts_per_tok=1))
    with pytest.raises(ValueError, match=r"lora_targets: Qwen3MoeForCausalLM has experts that are 3-D parameters"):
        lora.inject(model, config.Fit(lora_rank=2))
    lora.inject(model, config.Fit(lora_rank=2, lora_targets=["q_proj"]))
    assert all(isinstance(layer.base_layer, torch.nn.Linear) for layer in lora.layers(model).values())


def test_a_start_with_other_settings_does_not_go_on_from_the_checkpoints_of_the_first(home):
    """Their directory says whose it is."""
    words = {"micro_batch": 8, "steps": 6, "checkpoint_steps": 2}
    started = run(home, {"twice": {**words, "steps": 400}}, wait=False)
    latest = home / ".twice.alone.partial" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not latest.is_file():
        assert started.poll() is None, started.stderr.read()[-3000:]
        assert time.monotonic() < deadline, "no checkpoint within 120 s"
        time.sleep(0.02)
    started.kill()
    started.communicate(timeout=30)
    found = run(home, {"twice": words, "once": words})
    assert [step["loss"] for step in found["twice"]] == [step["loss"] for step in found["once"]]
    assert sorted(p.name for p in (home / "twice").iterdir()) == sorted(p.name for p in (home / "once").iterdir())
    assert not list(home.glob(".twice.*"))


def test_an_adapter_for_a_layer_that_is_not_there_is_refused(home):
    started = run(home, {"misspelt": {"lora_rank": 4, "lora_targets": ["q_proj", "experts"]}}, wait=False)
    _, errors = started.communicate(timeout=120)
    assert "lora_targets: experts is no linear layer of Qwen3ForCausalLM; it has down_proj, gate_proj" in errors
    assert started.returncode != 0


def test_a_mixture_of_experts_has_the_same_losses_on_two_ranks_under_zero_3(home):
    """Tokens of the two go to different experts."""
    import shutil

    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = Qwen3MoeConfig(
        vocab_size=SHAPE.vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, moe_intermediate_size=16, num_experts=32, num_experts_per_tok=1, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    shutil.copytree(home / "base", home / "sparse")
    (home / "sparse" / "model.safetensors").unlink()
    Qwen3MoeForCausalLM(shape).save_pretrained(home / "sparse")
    words = {"base": "sparse", "steps": 4, "micro_batch": 1}
    one = run(home, {"sparse-one": words})["sparse-one"]
    two = run(home, {"sparse-two": {**words, "zero_stage": 3}}, ranks=2)["sparse-two"]
    assert [step["loss"] for step in two] == pytest.approx([step["loss"] for step in one], abs=1e-5)
    for step in two:
        assert 0 < step["expert_entropy"] < 1
        assert step["expert_load_max"] > 1
        assert step["experts_idle"] >= 0


def test_a_long_trajectory_over_a_large_vocabulary_fits_and_its_last_token_counts(home):
    """32,768 and 20,000 tokens over 151,936 words: all logits of the longer one alone would be 18.6 GiB."""
    import shutil

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=151_936, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=128, tie_word_embeddings=True, max_position_embeddings=1 << 16,
    )  # fmt: skip
    shutil.copytree(home / "base", home / "wide")
    (home / "wide" / "model.safetensors").unlink()
    Qwen3ForCausalLM(shape).save_pretrained(home / "wide")
    said = {}
    for name, last in (("long", 7), ("other", 8)):
        out = store.round_of(home / name, 0)
        rows = []
        for sample, length in enumerate((32_768, 20_000)):
            rng = random.Random(sample)
            ids = [rng.randrange(151_936) for _ in range(length)]
            mask = [n >= 4096 and n % 40 < 8 for n in range(length)]
            ids[-1], mask[-1] = last, True
            said[sample] = sum(mask)
            found = replace(attempt(0, sample), token_ids=tuple(ids), action_mask=tuple(mask))
            rows.append(replace(found, behaviour_logp=(0.0,) * length))
        store.write(out.trajectories, Trajectory, rows)
        store.write(out.preferences, Pair, [Pair(task_id="task-0", chosen=0, rejected=1)])
    words = {"base": "wide", "steps": 1, "batch": 1, "max_tokens": 32_768, "checkpointing": True}
    found = run(home, {"long-fit": {**words, "run": "long"}, "other-fit": {**words, "run": "other"}})
    for (step,) in found.values():
        assert step["loss"] == math.log(2)
        assert step["action_tokens"] == said[0] + said[1]
        assert step["peak_gib"] < 6
    (one,), (other,) = found.values()
    assert abs(one["logp_chosen"] - other["logp_chosen"]) > 1e-3


def test_in_bf16_a_policy_that_equals_its_reference_still_starts_at_exactly_ln_2(home):
    """Whatever the packs: a trajectory has the same bits in all of them. Masters are fp32, so small steps count."""
    words = {"precision": "bf16", "steps": 4, "lr": 1e-5}
    settings = {
        "bf16-alone": {"micro_batch": 1, "share_prefix": False, "zero_stage": 1},
        "bf16-shared": {"micro_batch": 8, "zero_stage": 2},
        "bf16-tokens": {"pack_tokens": 300, "zero_stage": 3},
    }
    found = run(home, {name: {**words, **more} for name, more in settings.items()})
    assert [steps[0]["loss"] for steps in found.values()] == [math.log(2)] * 3
    for steps in found.values():
        assert len({step["loss"] for step in steps}) == 4
