"""TRL judges our losses: at entropy 0 they are those of its DPOTrainer and KTOTrainer, in value and in gradient.

Its trainers tokenise, batch and score with their own code. They know one reply a prompt; holes in their batch's
completion mask stand for what tools answered between turns.
"""

import copy
import os
import string
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn.functional import softplus
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from entropo_ray.train.batch import Row, pack
from entropo_ray.train.logprob import Scorer, sums
from entropo_ray.train.objective import dpo, kto, z0_mismatched

BETA = 0.1
LETTERS = (string.ascii_letters + string.digits)[:59] + ".-"  # one letter a token; "." ends a text, "-" pads
LENGTHS = [(3, 12, 6), (9, 5, 13), (14, 9, 4), (6, 7, 10)]  # of prompt, chosen and rejected


@pytest.fixture
def trl():
    """The package, in an environment that forgets what it and accelerate write into it."""
    wanted = "needs `pip install --no-deps trl==1.16.0 accelerate==1.15.0`"
    with mock.patch.dict(os.environ):
        pytest.importorskip("accelerate", reason=wanted, exc_type=ImportError)
        yield pytest.importorskip("trl", reason=wanted, exc_type=ImportError)


def models(swapped=False):
    """A policy and the reference that it has left; the same two at each call, so that each side has its own."""
    torch.manual_seed(5)  # one whose mismatched log-ratios have a mean above 0
    settings = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        tie_word_embeddings=True,
        initializer_range=0.2,  # at the default, all tokens are about equally likely
    )
    reference = Qwen3ForCausalLM(settings)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return (reference, policy) if swapped else (policy, reference)


def trainer_of(kind, settings, policy, reference, home, **options):
    from datasets import Dataset

    rng = np.random.default_rng(0)
    texts = [["".join(LETTERS[i] for i in rng.integers(0, 59, length)) for length in lengths] for lengths in LENGTHS]
    letters = Tokenizer(WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="-"))
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    options |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    options |= {"report_to": "none", "disable_tqdm": True, "train_sampling_strategy": "sequential"}
    return kind(
        policy,
        reference,
        settings(str(home), beta=BETA, max_length=None, **options),
        train_dataset=Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), t, strict=True)) for t in texts]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=".", pad_token="-"),
    )


def batches_of(trainer, turns):
    """TRL's batches; with `many` turns, about a third of a reply's letters are observations."""
    batches = list(trainer.get_train_dataloader())
    for batch in batches if turns == "many" else []:
        for prefix in ("", "KL_") if "KL_input_ids" in batch else ("",):
            batch[f"{prefix}completion_mask"] *= batch[f"{prefix}input_ids"] < 40
    return batches


def rows_of(batch, prefix=""):
    """The trajectories of a padded batch, in its order."""
    names = ("input_ids", "completion_mask", "attention_mask")
    padded = zip(*(batch[prefix + name].numpy() for name in names), strict=True)
    cut = [(ids[: seen.sum()], mask[: seen.sum()]) for ids, mask, seen in padded]
    return [Row(("row", i), ids.astype(np.int32), mask.astype(bool)) for i, (ids, mask) in enumerate(cut)]


def logps(scorer, rows):
    packed = pack(rows)
    return sums(scorer(packed).logp, packed)


def assert_same_gradient(ours, theirs):
    """Of each parameter, to 1e-5 of its norm; so it is of all together."""
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        norm = float(other.grad.norm())
        assert norm > 0
        assert float((mine.grad - other.grad).norm()) < 1e-5 * norm


# TRL's "sigmoid" does not smooth labels. Its "aot" does, after sorting a batch: a lone pair is in order.
@pytest.mark.parametrize(("loss", "smoothing", "size"), [("sigmoid", 0.0, 4), ("aot", 0.1, 1)])
@pytest.mark.parametrize("turns", ["one", "many"])
def test_dpo_without_entropy_is_that_of_trl(trl, tmp_path, loss, smoothing, size, turns):
    policy, reference = models()
    options = {"loss_type": [loss], "label_smoothing": smoothing, "per_device_train_batch_size": size}
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, policy, reference, tmp_path, **options)
    batches = batches_of(trainer, turns)
    theirs = torch.stack([trainer.compute_loss(policy, batch) for batch in batches]).mean()
    theirs.backward()

    ours, anchor = (Scorer(model) for model in models())
    halves = [(rows[: len(rows) // 2], rows[len(rows) // 2 :]) for rows in map(rows_of, batches)]
    chosen, rejected = ([row for half in halves for row in half[side]] for side in (0, 1))
    with torch.no_grad():
        refs = logps(anchor, chosen), logps(anchor, rejected)
    found = dpo(logps(ours, chosen), logps(ours, rejected), *refs, beta=BETA, entropy=0.0, smoothing=smoothing)
    found.values.mean().backward()
    assert len(found.values) == len(LENGTHS)
    assert (max(len(row.turns()) for row in chosen) > 1) == (turns == "many")
    assert found.values.mean().item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradient(ours.model, policy)


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("turns", ["one", "many"])
def test_kto_without_entropy_is_that_of_trl(trl, tmp_path, turns, clamped):
    policy, reference = models(swapped=clamped)  # the sign of every log-ratio turns with it
    options = {"desirable_weight": 1.0, "undesirable_weight": 1.5, "per_device_train_batch_size": 2 * len(LENGTHS)}
    trainer = trainer_of(trl.KTOTrainer, trl.KTOConfig, policy, reference, tmp_path, **options)
    (batch,) = batches_of(trainer, turns)
    theirs = trainer.compute_loss(policy, batch)
    theirs.backward()
    trainer.log({})
    kl = trainer.state.log_history[-1]["kl"]
    assert (kl == 0) == clamped

    ours, anchor = (Scorer(model) for model in models(swapped=clamped))
    rows, mismatched = rows_of(batch), rows_of(batch, "KL_")
    with torch.no_grad():
        ref_logp = logps(anchor, rows)
        ratio = logps(ours, mismatched) - logps(anchor, mismatched)
    z0 = torch.tensor(BETA * kl, dtype=torch.float64)
    weights = {"weight_pass": 1.0, "weight_fail": 1.5}
    found = kto(logps(ours, rows), ref_logp, batch["label"], z0, beta=BETA, entropy=0.0, **weights)
    found.values.mean().backward()
    estimate = z0_mismatched(ratio, torch.ones_like(ratio), beta=BETA, entropy=0.0)
    assert estimate.item() == pytest.approx(z0.item(), abs=1e-6)
    assert found.values.mean().item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradient(ours.model, policy)


def plain(model, row):
    """The log-probability of a trajectory's actions, from all logits of an untouched model."""
    ids = torch.from_numpy(row.token_ids.astype(np.int64))
    log_p = torch.log_softmax(model(ids[None], use_cache=False).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    return log_p[torch.from_numpy(row.action_mask[1:])].double().sum()


def sampled(prompt, length):
    """A trajectory of several turns."""
    rng = np.random.default_rng(length)
    acted = np.r_[np.zeros(prompt, dtype=bool), True, rng.random(length - 1) < 0.7]
    return Row(("row", length), rng.integers(0, 61, prompt + length).astype(np.int32), acted)


def test_the_gradient_of_dpo_with_entropy_is_that_of_full_logits():
    entropy, hbar, smoothing = 0.05, 0.2, 0.05
    chosen, rejected = ([sampled(lengths[0], lengths[side]) for lengths in LENGTHS] for side in (1, 2))
    policy, reference = models()

    def worth(row):
        length = entropy * hbar * int(row.action_mask.sum())
        return (BETA + entropy) * plain(policy, row) - BETA * plain(reference, row).detach() + length

    margin = torch.stack([worth(good) - worth(bad) for good, bad in zip(chosen, rejected, strict=True)])
    theirs = ((1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)).mean()
    theirs.backward()

    ours, anchor = (Scorer(model) for model in models())
    with torch.no_grad():
        refs = logps(anchor, chosen), logps(anchor, rejected)
    good, bad = (torch.tensor(pack(rows).actions, dtype=torch.float64) for rows in (chosen, rejected))
    options = {"beta": BETA, "entropy": entropy, "hbar": hbar, "smoothing": smoothing}
    found = dpo(logps(ours, chosen), logps(ours, rejected), *refs, chosen_tokens=good, rejected_tokens=bad, **options)
    found.values.mean().backward()
    assert found.values.mean().item() == pytest.approx(theirs.item(), rel=1e-6)
    assert_same_gradient(ours.model, policy)
