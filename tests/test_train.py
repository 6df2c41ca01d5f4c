"""DeepSpeed on gloo through Ray Train: what a fitting stage leaves on disk, and what it never does."""

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

from entropo_ray import config, store
from entropo_ray.records import Example, Grade, Label, Measure, Pair, Policy, Reference, Stop, Trajectory

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[1]
FIT = {
    "max_tokens": 256,
    "lr": 3e-3,
    "batch": 4,
    "micro_batch": 2,
    "workers": 2,
    "worker_gpus": 0,
    "worker_threads": 1,
    "zero_stage": 2,
    "precision": "fp32",
}
SHAPE = config.Model(vocab=300, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=48)
KEYS = [(f"task-{task}", sample) for task in range(3) for sample in range(4)]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    from entropo_ray.train.initial import start

    to = tmp_path_factory.mktemp("base") / "policy"
    start(["def add(a, b):\n    return a + b\n" * 20], SHAPE, seed=3, to=to)
    return Policy(path=to, round=0)


def tokens_of(key):
    """A counting sequence, which a small model learns in a few steps, and its mask."""
    rng = random.Random(str(key))
    length, first = rng.randint(40, 90), rng.randint(3, 60)
    return tuple(first + n for n in range(length)), tuple(n >= 10 and n % 3 != 0 for n in range(length))


def trajectory(key):
    ids, mask = tokens_of(key)
    return Trajectory(
        task_id=key[0],
        sample=key[1],
        round=0,
        seed=0,
        kind="scripted",  # no engine drew it: its log-probs are not held against the trainer's
        scaffold="",
        prompt="",
        temperature=1.0,
        turns=(),
        token_ids=ids,
        action_mask=mask,
        behaviour_logp=tuple(0.0 for _ in ids),
        num_turns=1,
        num_actions=sum(mask),
        num_tokens=9,
        patch_class="",
        patch="",
        files=(),
        stop=Stop.AGENT,
        reason="",
        wall_s=0.0,
        grade=Grade.RESOLVED if key[1] % 2 == 0 else Grade.UNRESOLVED,
        verdict=None,
    )


def round_at(home, *, labels=False):
    """Twelve trajectories and six pairs (or twelve labels) of three tasks."""
    out = store.round_of(home, 0)
    store.write(out.trajectories, Trajectory, [trajectory(key) for key in KEYS])
    if labels:
        store.write(out.preferences, Label, [Label(task_id=t, sample=s, desirable=s % 2 == 0) for t, s in KEYS])
    else:
        pairs = [Pair(task_id=f"task-{n}", chosen=s, rejected=s + 1) for n in range(3) for s in (0, 2)]
        store.write(out.preferences, Pair, pairs)
    return out


def steps_of(product):
    return [json.loads(line) for line in (product / "steps.jsonl").read_text().splitlines()]


def lines_under(home):
    """The whole lines of the step log of the one stage that is at work below `home`."""
    logs = list(home.glob("**/.policy.*.partial/steps.jsonl"))
    return logs[0].read_text().split("\n")[:-1] if logs else []


def test_imitation_lowers_the_loss_and_leaves_a_hugging_face_directory(cluster, base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from entropo_ray.train.fit import imitate

    examples = [
        Example(task_id=t, sample=s, token_ids=tokens_of((t, s))[0], action_mask=tokens_of((t, s))[1]) for t, s in KEYS
    ]
    silent = Example(task_id="silent", sample=0, token_ids=(5, 6, 7), action_mask=(False, False, False))
    store.write(tmp_path / "examples", Example, [*examples, silent])
    to = tmp_path / "policy"
    cfg = config.Fit(**FIT | {"epochs": 8})
    numbers = imitate(base, tmp_path / "examples", cfg, seed=1, to=to, read_epochs=2)

    steps = steps_of(to)
    assert numbers["steps"] == len(steps) == 8 * 3
    assert steps[0]["loss"] == pytest.approx(math.log(SHAPE.vocab), abs=0.4)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert numbers["dropped_rows"] == 1
    assert numbers["rows"] == 8 * len(KEYS)
    # two epochs fit all but the first token of each, the others only what was said
    said = sum(sum(example.action_mask) for example in examples)
    assert numbers["action_tokens"] == 2 * sum(len(example.token_ids) - 1 for example in examples) + 6 * said
    assert max(step["lr"] for step in steps) == pytest.approx(FIT["lr"], rel=0.05)
    assert store.done(to)
    assert not list(tmp_path.glob(".*"))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(to), AutoTokenizer.from_pretrained(to)
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == [2, 0]
    before = AutoModelForCausalLM.from_pretrained(base.path)
    assert mean_nll(model, examples) < mean_nll(before, examples) - 1


def mean_nll(model, examples):
    """By all logits of the model as transformers runs it."""
    import torch

    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.token_ids])
        log_p = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
        mask = torch.tensor(example.action_mask[1:])
        total, count = total - float(log_p[mask].sum().detach()), count + int(mask.sum())
    return total / count


def test_one_and_two_workers_leave_the_same_loss_trace_from_exactly_ln_2(cluster, base, tmp_path):
    from entropo_ray.train.fit import fit

    plain = config.Train(**FIT | {"epochs": 2, "zero_stage": 3}, entropy=0.0, smoothing=0.0)
    out = round_at(tmp_path / "run")
    numbers = fit(base, base, out, plain, seed=0, to=out.policy)
    two = steps_of(out.policy)
    other = tmp_path / "other"
    fit(base, base, out, replace(plain, workers=1, micro_batch=1, zero_stage=1), seed=0, to=other)
    one = steps_of(other)

    assert len(two) == len(one) == 4  # six pairs: each epoch's second step is half empty
    assert two[0]["loss"] == one[0]["loss"] == math.log(2)
    assert two[0]["margin"] == 0.0
    assert [step["rows"] for step in two] == [step["rows"] for step in one]
    for left, right in zip(two, one, strict=True):
        for name in ("loss", "margin", "entropy", "logp_chosen", "logp_rejected"):
            assert left[name] == pytest.approx(right[name], abs=1e-5, rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    assert two[-1]["loss"] < math.log(2)
    assert {
        "steps", "loss", "margin", "accuracy", "useful_share", "logp_chosen", "logp_rejected", "entropy", "grad_norm",
        "rows", "tokens", "action_tokens", "peak_gib", "seconds",
    } <= set(numbers)  # fmt: skip

    rows = {(row.task_id, row.sample): row for row in store.read(out.reference, Reference)}
    assert rows.keys() == set(KEYS)
    for key, row in rows.items():
        assert len(row.ref_logp) == len(row.ref_entropy) == sum(tokens_of(key)[1])


def test_labels_train_from_an_exact_reference_point_whatever_the_number_of_workers(cluster, base, tmp_path):
    from entropo_ray.train.fit import fit

    out = round_at(tmp_path / "run", labels=True)
    cfg = config.Train(**FIT, loss="kto", z0="exact", entropy=0.01, length="debias")
    numbers = fit(base, base, out, cfg, seed=0, to=out.policy)
    other = tmp_path / "other"
    fit(base, base, out, replace(cfg, workers=1, micro_batch=4, zero_stage=0), seed=0, to=other)
    two, one = steps_of(out.policy), steps_of(other)
    assert numbers["steps"] == len(two) == len(one) == 3
    for left, right in zip(two, one, strict=True):
        for name in ("loss", "z0", "reward", "margin", "kl", "useful_share"):
            assert left[name] == pytest.approx(right[name], abs=1e-5, rel=1e-5), name
        assert left["weights"] == right["weights"]
        assert sum(left["weights"]) == 4
    # z0 is the mean reward of the round's own trajectories, so its first step is about undecided
    assert two[0]["loss"] == pytest.approx(0.5, abs=0.05)
    assert two[0]["kl"] == 0.0
    assert two[-1]["kl"] > 0


def test_the_published_kto_cuts_the_tail_clamps_its_reference_point_and_says_what_it_lost(cluster, base, tmp_path):
    from entropo_ray.train.fit import fit

    out = round_at(tmp_path / "run", labels=True)
    cfg = config.Train(
        **FIT | {"max_tokens": 50, "workers": 1, "zero_stage": 3},
        loss="kto",
        variant="released",
        z0="released",
        smoothing=0.0,
        length="raw",
    )
    numbers = fit(base, base, out, cfg, seed=0, to=out.policy)
    lengths = [len(tokens_of(key)[0]) for key in KEYS]
    lost = sum(sum(tokens_of(key)[1][50:]) for key in KEYS)
    assert numbers["lost_share"] == pytest.approx(lost / sum(sum(tokens_of(key)[1]) for key in KEYS))
    assert numbers["tokens"] == sum(min(length, 50) for length in lengths)
    # the reward of swapped answers is a large negative entropy term, and all of it is clamped away
    assert {step["z0"] for step in steps_of(out.policy)} == {0.0}
    swapped = {(row.task_id, row.sample): row.token_ids for row in store.read(out.swapped, Example)}
    assert swapped.keys() == set(KEYS)


def test_lambda_follows_the_entropy_target_from_round_to_round(cluster, base, tmp_path):
    from entropo_ray.train.fit import fit

    first, second = round_at(tmp_path / "run"), store.round_of(tmp_path / "run", 1)
    cfg = config.Train(**FIT | {"workers": 1}, entropy=0.02, entropy_target=5.0, entropy_step=0.1)
    numbers = fit(base, base, first, cfg, seed=0, to=first.policy)
    assert numbers["entropy_start"] == pytest.approx(math.log(SHAPE.vocab), abs=0.4)  # the start is nearly uniform
    assert numbers["entropy_weight"] == pytest.approx(0.02 * math.exp(0.1 * (5.0 - numbers["entropy_start"])))
    assert json.loads((first.policy / "update.json").read_text())["entropy"] == numbers["entropy_weight"]

    store.write(second.trajectories, Trajectory, [trajectory(key) for key in KEYS])
    store.write(second.preferences, Pair, list(store.read(first.preferences, Pair)))
    trained = Policy(path=first.policy, round=1)
    later = fit(trained, base, second, cfg, seed=0, to=second.policy)  # the reference is the first policy
    expected = numbers["entropy_weight"] * math.exp(0.1 * (5.0 - later["entropy_start"]))
    assert later["entropy_weight"] == pytest.approx(expected)
    assert later["kl_start"] > 0
    assert steps_of(second.policy)[0]["margin"] != 0.0
    measured = {(row.task_id, row.sample): row for row in store.read(second.current, Measure)}
    assert measured.keys() == set(KEYS)
    assert len(measured[KEYS[0]].kl) == sum(tokens_of(KEYS[0])[1])


def test_rejection_sampling_imitates_what_passed_for_as_many_steps_as_asked(cluster, base, tmp_path):
    from entropo_ray.train.fit import fit

    out = round_at(tmp_path / "run", labels=True)
    numbers = fit(base, base, out, config.Train(**FIT | {"workers": 1, "steps": 3}, loss="sft"), seed=0, to=out.policy)
    steps = steps_of(out.policy)
    assert numbers["steps"] == len(steps) == 3
    assert sum(step["rows"] for step in steps) == pytest.approx(12, abs=1)  # six passed; a step may hold one twice
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_a_driver_killed_in_the_update_leaves_no_product_and_keeps_the_reference(cluster, base, tmp_path):
    from entropo_ray.train.fit import fit

    out = round_at(tmp_path / "run")
    endless = FIT | {"workers": 1, "epochs": 2000}
    code = (
        "import ray, sys\nfrom pathlib import Path\nfrom entropo_ray import config, store\n"
        "from entropo_ray.records import Policy\nfrom entropo_ray.train.fit import fit\n"
        f"ray.init(address={cluster!r}, log_to_driver=False)\nbase = Policy(path=Path({str(base.path)!r}), round=0)\n"
        f"out = store.round_of({str(tmp_path / 'run')!r}, 0)\n"
        f"fit(base, base, out, config.Train(**{endless!r}), seed=0, to=out.policy)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while len(lines_under(tmp_path)) < 2:
        assert driver.poll() is None, driver.stderr.read().decode()[-2000:]
        assert time.monotonic() < deadline, "no step within 90 s"
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=30)
    assert not out.policy.exists()
    assert store.done(out.reference)

    scored = {path: path.stat().st_mtime_ns for path in out.reference.glob("*.parquet")}
    fit(base, base, out, config.Train(**FIT | {"workers": 1}), seed=0, to=out.policy)
    assert store.done(out.policy)
    assert {path: path.stat().st_mtime_ns for path in out.reference.glob("*.parquet")} == scored


def test_an_update_whose_rank_is_killed_resumes_and_ends_with_the_weights_of_an_undisturbed_one(
    cluster, base, tmp_path
):
    """Two workers of Ray Train; bit for bit, and no more than the steps since the last checkpoint are done again."""
    import threading

    from entropo_ray.train.fit import fit

    cfg = config.Train(
        **FIT | {"epochs": 6, "checkpoint_steps": 2, "workers": 2, "worker_threads": 1, "zero_stage": 2}, entropy=0.0
    )
    undisturbed = round_at(tmp_path / "undisturbed")
    fit(base, base, undisturbed, cfg, seed=0, to=undisturbed.policy)
    out = round_at(tmp_path / "run")
    seen = []

    def kill():
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not seen:
            if len(lines := lines_under(tmp_path / "run")) >= 5:
                os.kill(json.loads(lines[-1])["pid"], signal.SIGKILL)
                seen.extend(lines)
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    fit(base, base, out, cfg, seed=0, to=out.policy)
    thread.join()
    steps = steps_of(out.policy)
    assert [step["step"] for step in steps] == list(range(12))
    assert [step["loss"] for step in steps] == [step["loss"] for step in steps_of(undisturbed.policy)]
    pids = [step["pid"] for step in steps]
    assert len(set(pids)) == 2
    assert pids.index(pids[-1]) >= len(seen) - 2
    weights = [(one.policy / "model.safetensors").read_bytes() for one in (undisturbed, out)]
    assert weights[0] == weights[1]


def test_what_cannot_be_learnt_from_is_refused_before_any_machine_is_asked(base, tmp_path):
    from entropo_ray.train.fit import fit

    out = round_at(tmp_path / "run")
    longest = max(len(tokens_of(key)[0]) for key in KEYS)
    with pytest.raises(ValueError, match=rf"task-\d.*{longest} tokens, more than max_tokens={longest - 1}"):
        fit(base, base, out, config.Train(**FIT | {"max_tokens": longest - 1}), seed=0, to=out.policy)

    store.write(tmp_path / "foreign", Pair, [Pair(task_id="task-0", chosen=0, rejected=9)])
    with pytest.raises(ValueError, match=r"'task-0', 9"):
        fit(base, base, replace(out, preferences=tmp_path / "foreign"), config.Train(**FIT), seed=0, to=out.policy)

    store.write(tmp_path / "none", Pair, [])
    with pytest.raises(ValueError, match="no pair to learn from"):
        fit(base, base, replace(out, preferences=tmp_path / "none"), config.Train(**FIT), seed=0, to=out.policy)
    silent = replace(trajectory(("silent", 0)), action_mask=(False,) * len(tokens_of(("silent", 0))[0]))
    store.write(tmp_path / "silent", Trajectory, [silent])
    store.write(tmp_path / "said", Label, [Label(task_id="silent", sample=0, desirable=True)])
    quiet = replace(out, trajectories=tmp_path / "silent", preferences=tmp_path / "said")
    with pytest.raises(ValueError, match=r"'silent', 0.*no action token"):
        fit(base, base, quiet, config.Train(**FIT, loss="kto"), seed=0, to=out.policy)
    assert not out.policy.exists()
    assert not out.reference.exists()


def test_the_start_is_drawn_by_the_seed_alone(base, tmp_path):
    from entropo_ray.train.initial import start

    texts = ["def add(a, b):\n    return a + b\n" * 20]
    start(texts, SHAPE, seed=3, to=tmp_path / "same")
    start(texts, SHAPE, seed=4, to=tmp_path / "other")
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (base.path / name).read_bytes()
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (base.path / "model.safetensors").read_bytes()


def test_digits_are_single_tokens_controls_are_whole_and_text_survives(base):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base.path / "tokenizer.json"))
    assert [tokenizer.token_to_id(text) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert [tokenizer.id_to_token(token) for token in tokenizer.encode("2024").ids] == ["2", "0", "2", "4"]
    text = "naïve\t= 'x'  # ≤ 10\r\n\n  日本"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path):
    from entropo_ray.train.initial import start

    with pytest.raises(ValueError, match="vocab=200"):
        start(["text"], replace(SHAPE, vocab=200), seed=0, to=tmp_path / "policy")


def land(out, key):
    """A trajectory arrives, as a grader leaves it."""
    store.append(out.trajectories, Trajectory, [trajectory(key)], key=key)


def wait_for(what, seconds, found):
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.1)


def early_run(home, **more):
    words = {**FIT, "workers": 1, "reference_early": True, "worker_gpus": 0, **more}
    return config.load(config.Run, ["model=m", f"run_dir={home}", *(f"train.{k}={v}" for k, v in words.items())])


def test_references_are_scored_while_sampling_still_runs_and_equal_those_scored_afterwards(cluster, base, tmp_path):
    """Of tasks with both outcomes; what is played once more, and what is missing, is scored when sampling is over."""
    import ray

    from entropo_ray.train import reference
    from entropo_ray.train.early import early

    cfg = early_run(tmp_path)
    out = store.round_of(tmp_path / "run", 0)
    before = ray.available_resources()["CPU"]
    with early(base, out, cfg):
        for key in (("task-0", 0), ("task-0", 1), ("task-1", 0)):
            land(out, key)
        wait_for("early reference", 90, lambda: len(store.keys(out.reference)) == 2)
        assert store.keys(out.reference) == {("task-0", 0), ("task-0", 1)}
        again = replace(trajectory(("task-0", 1)), token_ids=tuple(reversed(trajectory(("task-0", 1)).token_ids)))
        store.append(out.trajectories, Trajectory, [again], key=("task-0", 1))
        for key in set(KEYS) - store.keys(out.trajectories):
            land(out, key)
        store.seal(out.trajectories, Trajectory)
    wait_for("CPU back", 30, lambda: ray.available_resources()["CPU"] == before)
    kept = store.keys(out.reference)
    assert ("task-0", 0) in kept
    assert ("task-0", 1) not in kept
    found = reference.score(base, out.trajectories, KEYS, cfg.train, to=out.reference)
    assert found["scored"] == len(KEYS) - len(kept)
    reference.score(base, out.trajectories, KEYS, cfg.train, to=tmp_path / "afterwards")
    assert list(store.read(out.reference, Reference)) == list(store.read(tmp_path / "afterwards", Reference))


def test_without_room_or_after_a_failure_all_references_are_scored_afterwards(cluster, base, tmp_path):
    from entropo_ray.train import reference
    from entropo_ray.train.early import early

    out = store.round_of(tmp_path / "run", 0)
    started = time.monotonic()
    with early(base, out, early_run(tmp_path, worker_gpus=1)):  # no GPU is free: no scorer is asked for
        for key in KEYS:
            land(out, key)
        time.sleep(5)
        store.seal(out.trajectories, Trajectory)
    assert time.monotonic() - started < 30
    cfg = early_run(tmp_path)
    assert reference.score(base, out.trajectories, KEYS, cfg.train, to=out.reference)["scored"] == len(KEYS)

    other = store.round_of(tmp_path / "other", 0)

    def interrupted():
        with early(base, other, cfg):
            land(other, KEYS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with early(base, other, cfg):  # the next start goes on with what has landed
        for key in KEYS[1:]:
            land(other, key)
        wait_for("early reference", 90, lambda: store.keys(other.reference))
        store.seal(other.trajectories, Trajectory)
    kept = len(store.keys(other.reference))
    assert kept
    assert reference.score(base, other.trajectories, KEYS, cfg.train, to=other.reference)["scored"] == len(KEYS) - kept
