"""Updates without Ray: one process or torchrun, on gloo; and what must not change a loss."""

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
from entropo_ray.records import Label, Pair, Trajectory

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
    """Policies, and rounds: three pairs a task, the same attempts as labels, and one pair of long trajectories."""
    from entropo_ray.train.initial import start

    home = tmp_path_factory.mktemp("alone")
    start(["def add(a, b):\n    return a + b\n" * 20], SHAPE, seed=3, to=home / "base")
    sparse_and_wide(home)
    attempts = [attempt(t, s) for t in range(TASKS) for s in range(SAMPLES)]
    for name in ("run", "labels"):
        store.write(store.round_of(home / name, 0).trajectories, Trajectory, attempts)
    pairs = [Pair(task_id=f"task-{t}", chosen=s, rejected=s + 1) for t in range(TASKS) for s in range(SAMPLES - 1)]
    store.write(store.round_of(home / "run", 0).preferences, Pair, pairs)
    labels = [Label(task_id=one.task_id, sample=one.sample, desirable=one.sample % 2 == 0) for one in attempts]
    store.write(store.round_of(home / "labels", 0).preferences, Label, labels)
    for name, last in (("long", 7), ("other", 8)):
        out = store.round_of(home / name, 0)
        store.write(out.trajectories, Trajectory, [long_attempt(sample, last) for sample in range(len(LONG))])
        store.write(out.preferences, Pair, [Pair(task_id="task-0", chosen=0, rejected=1)])
    return home


def sparse_and_wide(home):
    """A mixture of experts, and a policy of 151,936 words, with the tokenizer of `base`."""
    import shutil

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sparse = Qwen3MoeConfig(
        vocab_size=SHAPE.vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, moe_intermediate_size=16, num_experts=32, num_experts_per_tok=1, tie_word_embeddings=True,
        initializer_range=0.3,
    )  # fmt: skip
    wide = Qwen3Config(
        vocab_size=151_936, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, intermediate_size=128, tie_word_embeddings=True, max_position_embeddings=1 << 16,
    )  # fmt: skip
    for name, model in (("sparse", Qwen3MoeForCausalLM(sparse)), ("wide", Qwen3ForCausalLM(wide))):
        shutil.copytree(home / "base", home / name)
        (home / name / "model.safetensors").unlink()
        model.save_pretrained(home / name)


LONG = (32_768, 8_192)  # tokens


def long_attempt(sample, last):
    """One token in ten behind the first 4,096 is sampled; the last one is `last`, and is sampled, too."""
    rng, length = random.Random(sample), LONG[sample]
    ids = [rng.randrange(151_936) for _ in range(length)]
    mask = [n >= 4096 and n % 40 < 4 for n in range(length)]
    ids[-1], mask[-1] = last, True
    found = replace(attempt(0, sample), token_ids=tuple(ids), action_mask=tuple(mask))
    return replace(found, behaviour_logp=(0.0,) * length)


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


TRACES_ONE = {
    "1x8": {"micro_batch": 1, "share_prefix": False},
    "8x1": {"micro_batch": 8, "share_prefix": False, "zero_stage": 0},
    "8x1-shared": {"micro_batch": 8, "share_prefix": True},
    "by-tokens": {"pack_tokens": 300, "share_prefix": True},
    "zero-2": {"micro_batch": 2, "zero_stage": 2},
    "zero-3": {"micro_batch": 2, "zero_stage": 3},
    "checkpointing": {"micro_batch": 2, "checkpointing": True},
    "offload": {"micro_batch": 2, "zero_stage": 2, "offload": True},
    "kept-attention": {"micro_batch": 2, "checkpointing": True, "keep_attention": True},
    "deterministic": {"micro_batch": 8, "share_prefix": True, "deterministic": True},
    "tiled": {"micro_batch": 4, "mlp_tokens": 50, "logits": 1, "checkpointing": True},
}
TRACES_TWO = {
    "two-zero-1": {"micro_batch": 4, "share_prefix": False},
    "two-zero-2": {"pack_tokens": 300, "zero_stage": 2},
    "two-zero-3": {"micro_batch": 1, "zero_stage": 3},
    "sequence-zero-2": {"sequence_parallel": 2, "micro_batch": 4, "zero_stage": 2},
    "sequence-zero-3": {"sequence_parallel": 2, "pack_tokens": 300, "zero_stage": 3, "checkpointing": True},
}
KTO = {"run": "labels", "loss": "kto", "z0": "exact", "entropy": 0.02, "steps": 6, "micro_batch": 2}
ADAPTERS = {"lora_rank": 4, "lora_targets": ["q_proj", "down_proj"], "lr": 5e-3}
LORA = {**ADAPTERS, "steps": 4, "micro_batch": 4}
SPARSE = {"base": "sparse", "steps": 3, "micro_batch": 1, "lr": 3e-4}  # Adam makes steps of roundings near 0
WIDE = {"base": "wide", "steps": 1, "batch": 1, "max_tokens": 32_768, "checkpointing": True, "worker_threads": 0}
BF16 = {"precision": "bf16", "steps": 4, "lr": 1e-5}
KILLED = {"micro_batch": 2, "zero_stage": 2, "checkpoint_steps": 4, "steps": 12}
STALE = {"micro_batch": 8, "steps": 6, "checkpoint_steps": 2}


@pytest.fixture(scope="module")
def one(home):
    """Fits by name, all in one process: most of the time of a start goes into imports."""
    return run(
        home,
        {
            **TRACES_ONE,
            "lora": LORA,
            "sparse-one": SPARSE,
            "once": STALE,
            "bf16-alone": {**BF16, "micro_batch": 1, "share_prefix": False, "zero_stage": 1},
            "bf16-shared": {**BF16, "micro_batch": 8, "zero_stage": 2},
            "bf16-tokens": {**BF16, "pack_tokens": 300, "zero_stage": 3},
            "exact": KTO,
            "swapped": {**KTO, "z0": "kto"},
            "lora-exact": {**KTO, **ADAPTERS},
            "long-fit": {**WIDE, "run": "long"},
            "other-fit": {**WIDE, "run": "other"},
        },
    )


@pytest.fixture(scope="module")
def two(home):
    """Fits by name, in one torchrun of two ranks."""
    return run(
        home,
        {
            **TRACES_TWO,
            "undisturbed": KILLED,
            "lora-two": {**LORA, "zero_stage": 3},
            "sparse-two": {**SPARSE, "zero_stage": 3},
            "exact-two": {**KTO, "zero_stage": 3},
            "exact-sequence": {**KTO, "sequence_parallel": 2},
            "swapped-sequence": {**KTO, "z0": "kto", "sequence_parallel": 2},
            "lora-exact-two": {**KTO, **ADAPTERS, "zero_stage": 3},
        },
        ranks=2,
    )


def test_a_loss_trace_does_not_depend_on_packing_sharing_accumulation_stage_or_workers(one, two):
    """Twenty steps in fp32."""
    first = one["1x8"]
    assert len(first) == 20
    assert first[0]["loss"] == math.log(2)
    assert first[-1]["loss"] < 0.6
    for name, found in [*((name, one[name]) for name in TRACES_ONE), *((name, two[name]) for name in TRACES_TWO)]:
        # odd stretches of an MLP are matrix products of odd shapes, whose last bits a CPU does not promise
        assert found[0]["loss"] == (pytest.approx(math.log(2), abs=1e-8) if name == "tiled" else math.log(2)), name
        for step, (mine, truth) in enumerate(zip(found, first, strict=True)):
            for measure in ("loss", "margin", "logp_chosen", "logp_rejected"):
                assert mine[measure] == pytest.approx(truth[measure], abs=1e-5, rel=1e-5), (name, step, measure)


def test_labels_have_the_same_losses_and_reference_points_on_ranks_that_share_packs_or_weights(one, two):
    for alone, shared in (("exact", "exact-two"), ("exact", "exact-sequence"), ("swapped", "swapped-sequence")):
        for mine, truth in zip(two[shared], one[alone], strict=True):
            for measure in ("loss", "z0", "entropy"):
                assert mine[measure] == pytest.approx(truth[measure], abs=1e-5), (shared, truth["step"], measure)
    assert one["exact"][-1]["z0"] != pytest.approx(one["swapped"][-1]["z0"], abs=1e-3)


def test_with_adapters_the_reference_of_an_exact_reference_point_is_the_model_without_them(one, two):
    """So the first loss is that of all weights, later ones are not; ZeRO-3 gathers the same weights for both views."""
    for mine, truth in zip(two["lora-exact-two"], one["lora-exact"], strict=True):
        assert mine["loss"] == pytest.approx(truth["loss"], abs=1e-5)
        assert mine["z0"] == pytest.approx(truth["z0"], abs=1e-5)
    assert one["lora-exact"][0]["loss"] == pytest.approx(one["exact"][0]["loss"], abs=1e-6)
    assert one["lora-exact"][-1]["loss"] != pytest.approx(one["exact"][-1]["loss"], abs=1e-4)


def test_an_update_whose_rank_is_killed_ends_with_the_weights_of_an_undisturbed_one(home, two):
    """Bit for bit; steps since the last checkpoint are done again, and no others."""
    started = run(home, {"disturbed": KILLED}, ranks=2, restarts=1, wait=False)
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

    other = trace(home / "disturbed")
    assert [step["step"] for step in other] == list(range(12))
    assert [step["loss"] for step in other] == [step["loss"] for step in two["undisturbed"]]
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


def test_adapters_are_trained_alone_merged_and_lie_beside_the_weights(home, one, two):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    losses = [step["loss"] for step in one["lora"]]
    assert losses[0] == two["lora-two"][0]["loss"] == math.log(2)
    assert losses[-1] < math.log(2) - 1e-3
    assert [step["loss"] for step in two["lora-two"]] == pytest.approx(losses, abs=1e-5)

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


def test_a_start_with_other_settings_does_not_go_on_from_the_checkpoints_of_the_first(home, one):
    """Their directory says whose it is."""
    started = run(home, {"twice": {**STALE, "steps": 400}}, wait=False)
    latest = home / ".twice.alone.partial" / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not latest.is_file():
        assert started.poll() is None, started.stderr.read()[-3000:]
        assert time.monotonic() < deadline, "no checkpoint within 120 s"
        time.sleep(0.02)
    started.kill()
    started.communicate(timeout=30)
    found = run(home, {"twice": STALE})
    assert [step["loss"] for step in found["twice"]] == [step["loss"] for step in one["once"]]
    assert sorted(p.name for p in (home / "twice").iterdir()) == sorted(p.name for p in (home / "once").iterdir())
    assert not list(home.glob(".twice.*"))


def test_an_adapter_for_a_layer_that_is_not_there_is_refused(home):
    started = run(home, {"misspelt": {"lora_rank": 4, "lora_targets": ["q_proj", "experts"]}}, wait=False)
    _, errors = started.communicate(timeout=120)
    assert "lora_targets: experts is no linear layer of Qwen3ForCausalLM; it has down_proj, gate_proj" in errors
    assert started.returncode != 0


def test_a_mixture_of_experts_has_the_same_losses_on_two_ranks_under_zero_3(one, two):
    """Tokens of the two go to different experts."""
    losses = [step["loss"] for step in one["sparse-one"]]
    assert [step["loss"] for step in two["sparse-two"]] == pytest.approx(losses, abs=1e-5)
    for step in two["sparse-two"]:
        assert 0 < step["expert_entropy"] < 1
        assert step["expert_load_max"] > 1
        assert step["experts_idle"] >= 0


def test_a_long_trajectory_over_a_large_vocabulary_fits_and_its_last_token_counts(one):
    """32,768 and 8,192 tokens over 151,936 words: all logits of the longer one alone would be 18.6 GiB."""
    said = sum(sum(long_attempt(sample, 7).action_mask) for sample in range(len(LONG)))
    for (step,) in (one["long-fit"], one["other-fit"]):
        assert step["loss"] == math.log(2)
        assert step["action_tokens"] == said
        assert step["peak_gib"] < 6
    assert abs(one["long-fit"][0]["logp_chosen"] - one["other-fit"][0]["logp_chosen"]) > 1e-3


def test_in_bf16_a_policy_that_equals_its_reference_still_starts_at_exactly_ln_2(one):
    """Whatever the packs: a trajectory has the same bits in all of them. Masters are fp32, so small steps count."""
    found = [one[name] for name in ("bf16-alone", "bf16-shared", "bf16-tokens")]
    assert [steps[0]["loss"] for steps in found] == [math.log(2)] * 3
    for steps in found:
        assert len({step["loss"] for step in steps}) == 4


def test_optimizer_states_on_a_disk_change_no_loss_and_leave_nothing_there(home, tmp_path):
    """Through DeepSpeed's async_io, which a machine compiles once (minutes); it writes nothing below 1 MiB."""
    from torch.utils.cpp_extension import get_default_build_root

    built = [path.parent for path in Path(get_default_build_root()).glob("*/async_io/async_io.so")]
    if not any(sys.prefix in (path / "build.ninja").read_text() for path in built):  # else it is made anew
        pytest.skip(
            "DeepSpeed's async_io is not compiled here: apt-get install libaio-dev, then fit once with nvme_dir"
        )
    words = {"base": "wide", "steps": 3, "micro_batch": 8, "zero_stage": 3, "offload": True}
    started = run(home, {"host": words, "disk": {**words, "nvme_dir": str(tmp_path)}}, wait=False)
    written = set()
    deadline = time.monotonic() + 300
    while started.poll() is None:
        if time.monotonic() > deadline:
            started.kill()
            pytest.fail("a fit of 3 steps took more than 300 s")
        written |= {file.name for file in tmp_path.glob("**/*.swp")}
        time.sleep(0.1)
    assert started.returncode == 0, started.stderr.read()[-3000:]
    assert written
    assert not list(tmp_path.iterdir())
    losses = [step["loss"] for step in trace(home / "host")]
    assert losses[0] != losses[-1]
    assert [step["loss"] for step in trace(home / "disk")] == pytest.approx(losses, abs=1e-6)
