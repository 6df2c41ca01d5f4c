"""Where fitting starts without a model: a random policy that can copy."""

import math

import torch

from entropo_ray import config
from entropo_ray.train.batch import Row, pack
from entropo_ray.train.initial import _model, give_copying
from entropo_ray.train.logprob import Scorer

SHAPE = config.Model(vocab=1024)


def surprise(model):
    """Mean -log p (nats) of the second half of random sequences that repeat their first half."""
    rng = torch.Generator().manual_seed(1)
    rows = []
    for number in range(8):
        half = torch.randint(3, 1024, (30,), generator=rng).int()
        mask = torch.arange(60) > 30
        rows.append(Row(("t", number), torch.cat([half, half]).numpy(), mask.numpy()))
    with torch.no_grad():
        return -float(Scorer(model).eval()(pack(rows)).logp.mean())


def test_a_fresh_model_copies_what_it_saw_before():
    assert surprise(_model(SHAPE, 1024, 0)) < 0.6 * math.log(1024)  # chance is log V


def test_one_that_is_too_small_is_left_random():
    small = _model(config.Model(vocab=1024, kv_heads=1, heads=2), 1024, 0)
    before = [parameter.clone() for parameter in small.parameters()]
    give_copying(small, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    assert surprise(small) > 0.9 * math.log(1024)
