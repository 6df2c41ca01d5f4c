"""From packed rows to losses: turns, sides, weights; and that nothing but action tokens counts, whatever the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from entropo_ray import config
from entropo_ray.train import objective
from entropo_ray.train.batch import Row, branch, pack, swapped
from entropo_ray.train.logprob import Scorer, Scores
from entropo_ray.train.step import LOSSES, Job, Unit, batch_of, ratios, totals, turns_of

VOCAB = 61
ZERO = torch.zeros(1, dtype=torch.float64)


def model(seed=0):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=48, tie_word_embeddings=True,
        )
    )  # fmt: skip


def row(sample, mask, seed=0, task="t"):
    mask = np.array(mask, dtype=bool)
    ids = np.random.default_rng([seed, sample]).integers(0, VOCAB, len(mask)).astype(np.int32)
    return Row((task, sample), ids, mask)


def unit(*samples, desirable=True, weight=1.0):
    keys = tuple(("t", sample) for sample in samples)
    return Unit(
        keys=keys, actions=0, tokens=0, squares=0, longest=0, shortest=0, desirable=desirable, weight=weight
    )  # fmt: skip


def job(kind, **train):
    cfg = config.Train(**{"beta": 0.1, "entropy": 0.05, "smoothing": 0.0, "length": "raw"} | train)
    return Job(kind, None, None, (), cfg, 0, None)


def batch(scorer, rows, units, asked, *, weights=None, anchor=None, ref=None):
    """The batch of `units`; the reference is `ref`, or what scores now."""
    packed = pack(rows)
    scores = scorer(packed, anchor.anchor(packed) if anchor else None)
    with torch.no_grad():
        told = (ref or scorer)(packed).logp.split(list(packed.actions))
    reference = dict(zip(packed.keys, told, strict=True))
    found = {one.key: one for one in rows}
    turns = tuple(turns_of(one, found, asked.cfg) for one in units)
    return batch_of(packed, scores, tuple(units), weights or [1.0] * len(units), reference, turns)


ROWS = [
    row(0, [0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1]),  # turns of 2, 1 and 3 tokens
    row(1, [0, 0, 1, 1, 1, 1, 0, 0, 1]),  # 4 and 1
    row(2, [0, 1, 0, 0, 1, 1, 1]),  # 1 and 3
]


def logps(scorer, one):
    """[A] log-probs of one row's action tokens, and the turn of each."""
    turns = [n for n, (start, stop) in enumerate(one.turns()) for _ in range(start, stop)]
    return scorer(pack([one])).logp.double().detach(), torch.tensor(turns)


def test_turns_are_the_stretches_between_observations():
    assert ROWS[0].turns() == [(3, 5), (7, 8), (9, 12)]
    assert pack(ROWS).turns == ((2, 1, 3), (4, 1), (1, 3))


@pytest.mark.parametrize(
    ("turns", "weights"),
    [
        ("all", [[1, 1, 1], [1, 1]]),
        ("last", [[0, 0, 1], [0, 1]]),
        ("dmpo", [objective.turn_weights(3, 0.7), objective.turn_weights(2, 0.7)]),
        ("branch", [[1, 0, 0], [1, 0]]),  # other tokens from the first on, so the first turn is the one that differs
    ],
)
def test_each_turn_setting_weighs_the_turns_it_names(turns, weights):
    scorer, asked = Scorer(model()), job("pair", turns=turns)
    loss = LOSSES["pair"](batch(scorer, ROWS[:2], [unit(0, 1)], asked, ref=Scorer(model(1))), asked, ZERO)
    sums = []
    for one, weight in zip(ROWS, weights, strict=False):
        values, turn = logps(scorer, one)
        sums.append(float((values * torch.tensor(weight, dtype=torch.float64)[turn]).sum()))
    assert float(loss.measures["logp_chosen"]) == pytest.approx(sums[0], abs=1e-5)
    assert float(loss.measures["logp_rejected"]) == pytest.approx(sums[1], abs=1e-5)


def test_the_branch_is_the_first_turn_that_differs_behind_a_shared_prefix():
    one = row(0, [0, 0, 1, 1, 0, 1, 1, 0, 1])
    ids = one.token_ids.copy()
    ids[6:] = (ids[6:] + 1) % VOCAB  # inside the second turn
    assert branch(one, Row(("t", 1), ids, one.action_mask)) == (1, 1)
    ids = one.token_ids.copy()
    ids[4] = (ids[4] + 1) % VOCAB  # the tool answered otherwise
    assert branch(one, Row(("t", 1), ids, one.action_mask)) == (1, 1)
    ids, mask = one.token_ids.copy(), one.action_mask.copy()
    ids[6], mask[6] = (ids[6] + 1) % VOCAB, False  # its second reply ends where the other's goes on
    assert branch(one, Row(("t", 2), ids, mask)) == (1, 1)
    assert branch(one, Row(("t", 7), one.token_ids, one.action_mask)) is None


def test_a_pair_that_never_parts_teaches_nothing():
    scorer, asked = Scorer(model()), job("pair", turns="branch")
    twin = Row(("t", 1), ROWS[0].token_ids, ROWS[0].action_mask)
    loss = LOSSES["pair"](batch(scorer, [ROWS[0], twin], [unit(0, 1)], asked), asked, ZERO)
    assert float(loss.measures["margin"]) == 0.0


def test_a_swapped_trajectory_ends_with_the_other_s_last_reply():
    mixed = swapped(ROWS[0], ROWS[1])
    assert mixed.key == ROWS[0].key
    assert mixed.token_ids.tolist() == [*ROWS[0].token_ids[:9], ROWS[1].token_ids[8]]
    assert mixed.action_mask.tolist() == [*ROWS[0].action_mask[:9], True]


def test_policy_and_reference_that_agree_have_margin_zero_and_kl_zero():
    scorer = Scorer(model())
    asked = job("pair", entropy=0.0)
    loss = LOSSES["pair"](batch(scorer, ROWS[:2], [unit(0, 1)], asked), asked, ZERO)
    assert float(loss.measures["margin"]) == 0.0
    packed = pack(ROWS)
    assert float(scorer(packed, scorer.anchor(packed)).kl.abs().max()) == 0.0


def test_kl_is_that_of_full_logits():
    scorer, other = Scorer(model()), Scorer(model(1))
    packed = pack(ROWS)
    kl = scorer(packed, other.anchor(packed)).kl
    plain = []
    for one in ROWS:
        ids = torch.from_numpy(one.token_ids.astype(np.int64))[None]
        p, q = (torch.log_softmax(m(ids, use_cache=False).logits[0].double(), -1) for m in (model(), model(1)))
        where = torch.from_numpy(np.flatnonzero(one.action_mask)) - 1
        plain.append((p.exp() * (p - q)).sum(-1)[where])
    torch.testing.assert_close(kl.double(), torch.cat(plain), rtol=1e-4, atol=1e-5)
    assert float(kl.min()) >= 0
    assert not kl.requires_grad


def test_exact_z0_is_beta_kl_minus_entropy_of_each_trajectory():
    scorer, other, asked = Scorer(model()), Scorer(model(1)), job("label", loss="kto")
    labels = [unit(0), unit(1, desirable=False)]
    loss = LOSSES["label"](batch(scorer, ROWS[:2], labels, asked, anchor=other, ref=other), asked, ZERO)
    packed = pack(ROWS[:2])
    scores = scorer(packed, other.anchor(packed))
    for place, (kl, nats) in enumerate(
        zip(scores.kl.split(list(packed.actions)), scores.entropy.split(list(packed.actions)), strict=True)
    ):
        expected = 0.1 * float(kl.sum()) - 0.05 * float(nats.detach().sum())
        assert float(loss.measures["z0_exact"][place]) == pytest.approx(expected, abs=1e-5)


def test_published_kto_has_no_entropy_in_its_reward():
    scorer, other = Scorer(model()), Scorer(model(1))
    asked = job("label", loss="kto", variant="released", z0="released")
    loss = LOSSES["label"](batch(scorer, ROWS[:1], [unit(0)], asked, ref=other), asked, ZERO)
    ratio = (logps(scorer, ROWS[0])[0] - logps(other, ROWS[0])[0]).sum()
    assert float(loss.measures["reward"]) == pytest.approx(0.1 * float(ratio), abs=1e-6)


def test_the_squared_loss_and_its_gap_reach_the_pair():
    scorer, asked = Scorer(model()), job("pair", loss="ipo", gap=0.5, entropy=0.0)
    loss = LOSSES["pair"](batch(scorer, ROWS[:2], [unit(0, 1)], asked), asked, ZERO)
    assert float(loss.values.detach()) == 0.25


def test_unit_weights_scale_losses_and_leave_measures_alone():
    scorer, asked = Scorer(model()), job("pair")
    rows = ROWS[:2]
    plain = batch(scorer, rows, [unit(0, 1)], asked)
    heavy = batch(scorer, rows, [unit(0, 1, weight=3.0)], asked)
    sums = [totals(one, LOSSES["pair"](one, asked, ZERO)) for one in (plain, heavy)]
    assert sums[1]["loss"] == pytest.approx(3 * sums[0]["loss"], rel=1e-12)
    assert sums[1]["mean margin"] == sums[0]["mean margin"]


def losses(scorer, rows, asked):
    found = batch(scorer, rows, [unit(0, 1)], asked, anchor=Scorer(model(1)), ref=Scorer(model(1)))
    loss = LOSSES["pair"](found, asked, ZERO)
    return loss.values.detach(), found.scores.entropy.detach(), found.scores.kl, totals(found, loss)


def test_logits_that_predict_no_action_token_change_nothing_bit_for_bit():
    asked = job("pair", smoothing=0.05)
    plain, scorer = losses(Scorer(model()), ROWS[:2], asked), Scorer(model())
    outside = torch.ones(sum(pack(ROWS[:2]).lengths), dtype=torch.bool)
    outside[pack(ROWS[:2]).predictors] = False

    def spoil(_module, _inputs, out):
        out = out.clone()
        out[0, outside] = 1e3  # the last hidden states, so every logit at these positions
        return out

    hook = scorer.model.model.norm.register_forward_hook(spoil)
    found = losses(scorer, ROWS[:2], asked)
    hook.remove()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[:3], plain[:3], strict=True))
    assert found[3] == plain[3]


# lengths of the stretches of a trajectory: prompt, reply, observation, reply, ...; a reply may be one token
STRETCHES = st.lists(st.integers(1, 6), min_size=2, max_size=9)
SCORER = Scorer(model())


@settings(max_examples=30, deadline=None)
@given(st.lists(STRETCHES, min_size=2, max_size=4), st.sampled_from(["all", "last", "dmpo"]))
def test_ragged_batches_score_as_their_members_alone(shapes, turns):
    rows = [
        row(n, [place % 2 for place, length in enumerate(shape) for _ in range(length)])
        for n, shape in enumerate(shapes)
    ]
    asked = job("label", loss="bco", turns=turns)
    together = batch(SCORER, rows, [unit(n) for n in range(len(rows))], asked).side(0)
    for n, one in enumerate(rows):
        alone = batch(SCORER, [one], [unit(n)], asked).side(0)
        for name in ("logp", "ref_logp", "tokens", "nats"):
            torch.testing.assert_close(getattr(together, name)[n : n + 1], getattr(alone, name), rtol=1e-5, atol=1e-5)
        if turns == "all":
            assert float(alone.tokens) == int(one.action_mask.sum())


def test_a_row_without_an_action_token_has_no_turns_and_scores_nothing():
    packed = pack([row(0, [0, 0, 0]), row(1, [0, 1])])
    assert packed.turns == ((), (1,))
    assert packed.actions == (0, 1)


def test_a_small_difference_of_long_trajectories_survives_its_sums():
    """By token, then in double: what fp32 sums would leave of it is off by more than a step moves it."""
    long = row(0, [0] * 8 + [1] * 6000)
    packed = pack([long])
    rng = torch.Generator().manual_seed(0)
    logp = -5 * torch.rand(6000, generator=rng)
    reference = logp + 1e-4 * torch.randn(6000, generator=rng)
    truth = float((logp.double() - reference.double()).sum())
    _, ref_sum = ratios(packed, Scores(logp, logp), {long.key: reference})
    found = float(logp.double().sum() - ref_sum)
    assert found == pytest.approx(truth, abs=1e-7)
    in_fp32 = float(logp.cumsum(0)[-1] - reference.cumsum(0)[-1])
    assert abs(in_fp32 - truth) > 1e-4
