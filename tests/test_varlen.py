"""Attention of a pack in one call: what sees what. The kernel itself needs a GPU; here stands a loop in its place."""

from itertools import pairwise

import pytest
import torch

from entropo_ray.train import attention, varlen

GROUPS = ((20, (7, 33)), (0, (41,)), (17, (1,)))
TOKENS = sum(prompt + sum(branches) for prompt, branches in GROUPS)


def kernel(query, key, value, starts, key_starts, longest, longest_keys, **more):
    """As PyTorch's: queries are the last of what is seen, `window_size[0]` more tokens are visible to the left."""
    assert more["enable_gqa"]
    assert more["num_splits"] == 1
    left, right = more["window_size"]
    assert right == 0
    found = []
    for (a, b), (c, d) in zip(pairwise(starts.tolist()), pairwise(key_starts.tolist()), strict=True):
        assert b - a <= longest
        assert d - c <= longest_keys
        behind = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        visible = (behind >= 0) & ((behind <= left) if left >= 0 else True)
        shared = query.shape[1] // key.shape[1]
        keys, values = (states[c:d].repeat_interleave(shared, 1) for states in (key, value))
        weights = torch.einsum("qhd,khd->hqk", query[a:b], keys) * more["scale"]
        weights = weights.masked_fill(~visible, -torch.inf).softmax(-1)
        found.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(found)


def attend(*args):
    return varlen.attend(*args, kernel=kernel)


@pytest.mark.parametrize("window", [None, 9])
def test_one_call_for_all_sequences_equals_a_call_for_each(window):
    torch.manual_seed(0)
    states = [torch.randn(1, heads, TOKENS, 16, dtype=torch.float64) for heads in (4, 2, 2)]
    one = attention.one_by_one(*states, GROUPS, 0.3, window)
    assert one.shape == (1, TOKENS, 4, 16)
    torch.testing.assert_close(attend(*states, GROUPS, 0.3, window), one)
    alone = attend(*(part[:, :, 60:101] for part in states), ((0, (41,)),), 0.3, window)
    torch.testing.assert_close(alone, one[:, 60:101])


def test_a_kernel_that_sees_too_much_or_has_other_gradients_is_not_trusted():
    shape, cpu = (4, 2, 16), torch.device("cpu")
    for window in (None, 48):
        pairs = varlen._errors(cpu, torch.bfloat16, shape, window, attention.one_by_one, attend)
        assert len(pairs) == 4
        assert all(mine <= 2 * its + 1e-6 for mine, its in pairs)

    def blind(query, key, value, groups, scaling, window):
        tokens = query.shape[2]
        return attend(query, key, value, ((0, (tokens,)),), scaling, window)

    def detached(query, key, value, *more):
        return attend(query, key.detach() + 0 * key, value, *more)

    for wrong in (blind, detached):
        pairs = varlen._errors(cpu, torch.bfloat16, shape, None, attention.one_by_one, wrong)
        assert any(mine > 2 * its + 1e-6 for mine, its in pairs)


def test_on_a_cpu_and_in_fp32_each_sequence_has_its_own_call():
    assert not varlen.usable(torch.randn(1, 4, 8, 16, dtype=torch.bfloat16), 2, attention.one_by_one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_of_this_gpu_is_trusted():
    query = torch.randn(1, 4, 8, 64, dtype=torch.bfloat16, device="cuda")
    assert varlen.usable(query, 2, attention.one_by_one)
