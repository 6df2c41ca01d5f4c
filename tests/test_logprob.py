import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from entropo_ray.train import logprob
from entropo_ray.train.batch import Row, pack
from entropo_ray.train.logprob import Anchor, Head, Scorer, Shard, install, score, sums


def problem(dtype=torch.float64, rows=300, vocab=97, width=16):
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocab, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, vocab, (rows,)), bias


def full(hidden, weight, target, bias, softcap):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


# one tile, five of 64 positions by the whole vocabulary, 10 of 64 by 64 with a ragged end each
@pytest.mark.parametrize("floats", [0, 64 * 97, 1])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_tiles_equal_full_logits_in_value_and_gradient(softcap, with_bias, floats):
    hidden, weight, target, bias = problem(torch.float32)
    bias = bias if with_bias else None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    up_logp, up_entropy = torch.randn(300), torch.randn(300)

    def run(logp, entropy):
        return torch.autograd.grad((logp * up_logp + entropy * up_entropy).sum(), leaves)

    ours = score(hidden, weight, target, bias=bias, head=Head(softcap=softcap, floats=floats))
    logp, entropy = full(hidden, weight, target, bias, softcap)
    torch.testing.assert_close(ours.logp, logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, entropy, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(run(ours.logp, ours.entropy), run(logp, entropy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_no_action_token_gives_empty_scores_with_gradient():
    hidden, weight, _, _ = problem()
    scores = score(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    scores.logp.sum().backward()
    assert scores.logp.shape == (0,)
    assert float(weight.grad.abs().sum()) == 0


@pytest.mark.parametrize(("floats", "largest"), [(64 * 97, 64 * 97), (1, 64 * 64)])
def test_no_more_logits_are_held_than_asked_for(monkeypatch, floats, largest):
    seen = []
    original = logprob._logits

    def told(*words):
        seen.append(original(*words))
        return seen[-1]

    monkeypatch.setattr(logprob, "_logits", told)
    hidden, weight, target, _ = problem()
    score(hidden, weight, target, head=Head(floats=floats)).logp.sum().backward()
    assert max(tile.numel() for tile in seen) == largest
    assert sum(tile.numel() for tile in seen) == 2 * 300 * 97  # each logit once forward and once backward


@pytest.mark.parametrize("floats", [0, 1])
def test_kl_and_entropy_equal_those_of_full_logits_in_double(floats):
    """Logits of up to 12 nats, and another model near by: errors are those of the logits in fp32."""
    torch.manual_seed(1)
    hidden, weight, target = torch.randn(300, 16), 0.6 * torch.randn(1000, 16), torch.randint(0, 1000, (300,))
    near = weight + 0.05 * torch.randn_like(weight)
    scores = score(hidden, weight, target, head=Head(floats=floats), anchor=Anchor(hidden, near, None, None))
    log_p, log_q = (torch.log_softmax(hidden.double() @ head.double().T, -1) for head in (weight, near))
    chosen = log_p.gather(1, target[:, None]).squeeze(1)
    for found, truth in (
        (scores.logp, chosen),
        (scores.entropy, -(log_p.exp() * log_p).sum(-1)),
        (scores.kl, (log_p.exp() * (log_p - log_q)).sum(-1)),
    ):
        assert float((found.double() - truth).abs().max()) < 2e-6
    same = score(hidden, weight, target, head=Head(floats=floats), anchor=Anchor(hidden, weight, None, None))
    assert float(same.kl.abs().max()) == 0.0


def tiny(**options):
    torch.manual_seed(0)
    settings = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        tie_word_embeddings=True,
        **options,
    )
    return Qwen3ForCausalLM(settings)


def row(name, length, prompt, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros(length, dtype=bool)
    mask[prompt:] = rng.random(length - prompt) < 0.5
    mask[-1] = True
    return Row((name, 0), rng.integers(0, 61, length).astype(np.int32), mask)


ROWS = [row("a", 40, 10, 1), row("b", 23, 5, 2), row("c", 57, 30, 3)]


def plain(model, one):
    """Log-probs and entropies of one trajectory from all logits of an untouched model."""
    ids = torch.from_numpy(one.token_ids.astype(np.int64))
    log_p = torch.log_softmax(model(ids[None], use_cache=False).logits[0].float(), -1)
    where = np.flatnonzero(one.action_mask)
    before = log_p[where - 1]
    return before.gather(1, ids[where, None]).squeeze(1), -(before.exp() * before).sum(-1)


def test_a_packed_row_scores_like_each_trajectory_alone_from_full_logits():
    reference, scorer = tiny(), Scorer(tiny())
    packed = pack(ROWS)
    scores = scorer(packed)
    expected = [plain(reference, one) for one in ROWS]
    torch.testing.assert_close(scores.logp, torch.cat([logp for logp, _ in expected]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy, torch.cat([h for _, h in expected]), rtol=1e-5, atol=1e-5)
    totals = torch.stack([logp.double().sum() for logp, _ in expected])
    torch.testing.assert_close(sums(scores.logp, packed), totals, rtol=0, atol=1e-4)


def test_the_gradient_of_a_packed_row_is_the_sum_of_those_alone():
    scorer, reference = Scorer(tiny()), tiny()
    (-sums(scorer(pack(ROWS)).logp, pack(ROWS)).sum()).backward()
    sum(-plain(reference, one)[0].sum() for one in ROWS).backward()
    for mine, theirs in zip(scorer.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


def test_no_token_of_one_trajectory_reaches_another():
    scorer = Scorer(tiny())
    before = scorer(pack(ROWS)).logp.split([int(one.action_mask.sum()) for one in ROWS])
    for changed in range(3):
        for position in (0, len(ROWS[changed].token_ids) // 2, len(ROWS[changed].token_ids) - 1):
            ids = ROWS[changed].token_ids.copy()
            ids[position] = (ids[position] + 7) % 61
            rows = [*ROWS]
            rows[changed] = Row(rows[changed].key, ids, rows[changed].action_mask)
            after = scorer(pack(rows)).logp.split([int(one.action_mask.sum()) for one in ROWS])
            same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
            assert same == [other != changed for other in range(3)]


def test_only_hidden_states_before_action_tokens_reach_the_head():
    scorer = Scorer(tiny())
    packed = pack(ROWS)
    seen = []
    hook = scorer.model.model.norm.register_forward_hook(lambda _m, _i, out: seen.append(out) or out)
    plainly = scorer(packed).logp
    hook.remove()
    outside = torch.ones(seen[0].shape[1], dtype=torch.bool)
    outside[packed.predictors] = False

    def spoil(_module, _inputs, out):
        out = out.clone()
        out[0, outside] = 1e3
        return out

    hook = scorer.model.model.norm.register_forward_hook(spoil)
    assert torch.equal(scorer(packed).logp, plainly)
    hook.remove()


def test_the_pack_does_not_matter_bit_for_bit():
    scorer = Scorer(tiny())
    together = scorer(pack(ROWS)).logp
    alone = torch.cat([scorer(pack([one])).logp for one in ROWS])
    assert torch.equal(together, alone)


def test_sliding_windows_and_soft_caps_of_the_model_are_honoured():
    torch.manual_seed(0)
    settings = Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        sliding_window=16,
        final_logit_softcapping=5.0,
        attn_logit_softcapping=None,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(settings).eval()
    expected = torch.cat([plain(model, one)[0] for one in ROWS])
    torch.testing.assert_close(Scorer(model)(pack(ROWS)).logp, expected, rtol=1e-4, atol=1e-4)


def test_features_that_attention_cannot_compute_are_refused():
    scorer = Scorer(tiny(attention_dropout=0.1)).train()
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        scorer(pack(ROWS))


def test_an_unknown_head_is_refused():
    model = tiny()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="Sequential"):
        install(model)


def alike(prompt=24, tails=(9, 20, 2), task="t"):
    """Attempts at one task: the same prompt, and then a token that each of them says."""
    rng = np.random.default_rng(7)
    begin = rng.integers(0, 61, prompt).astype(np.int32)
    found = []
    for sample, tail in enumerate(tails):
        said = rng.random(tail) < 0.5
        said[[0, -1]] = True
        ids = np.concatenate([begin, rng.integers(0, 61, tail).astype(np.int32)])
        found.append(Row((task, sample), ids, np.concatenate([np.zeros(prompt, dtype=bool), said])))
    return found


OTHER = Row(("t", 9), ROWS[2].token_ids, ROWS[2].action_mask)  # of the same task, with another prompt
SHARING = [*alike()[:2], ROWS[0], *alike(tails=(5, 30), task="u"), OTHER, *alike(prompt=4, task="short"), alike()[2]]


def by_key(scorer, packed):
    return dict(zip(packed.keys, scorer(packed).logp.split(list(packed.actions)), strict=True))


def test_a_shared_prompt_stands_in_the_row_once():
    packed = pack(SHARING, share=True)
    assert packed.keys[:3] == (("t", 0), ("t", 1), ("t", 2))
    assert packed.groups[:3] == ((24, (9, 20, 2)), (0, (40,)), (24, (5, 30)))
    assert [(prompt, len(branches)) for prompt, branches in packed.groups[3:]] == [(OTHER.prompt, 1), *[(0, 1)] * 3]
    assert packed.input_ids.shape[1] == sum(packed.lengths) - 2 * 24 - 24
    assert len(packed.predictors) == sum(packed.actions)
    assert sorted(packed.keys) == sorted(row.key for row in SHARING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_or_shared_is_bitwise_what_each_trajectory_is_alone(dtype):
    scorer = Scorer(tiny().to(dtype))
    alone = {one.key: scorer(pack([one])).logp for one in SHARING}
    for share in (False, True):
        found = by_key(scorer, pack(SHARING, share=share))
        assert found.keys() == alone.keys()
        assert all(torch.equal(values, alone[key]) for key, values in found.items())


def test_sharing_does_not_change_the_gradient():
    apart, together = Scorer(tiny()), Scorer(tiny())
    for scorer, share in ((apart, False), (together, True)):
        packed = pack(SHARING, share=share)
        # a weight of its own for every trajectory, by key
        weights = {key: 1.0 + number for number, key in enumerate(sorted(packed.keys))}
        totals = sums(scorer(packed).logp, packed)
        (totals * torch.tensor([weights[key] for key in packed.keys])).sum().backward()
    for mine, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_no_continuation_of_a_shared_prompt_reaches_another():
    scorer = Scorer(tiny())
    rows = alike()
    before = by_key(scorer, pack(rows, share=True))
    for changed in range(3):
        ids = rows[changed].token_ids.copy()
        ids[-1] = (ids[-1] + 7) % 61
        others = [*rows]
        others[changed] = Row(rows[changed].key, ids, rows[changed].action_mask)
        packed = pack(others, share=True)
        assert packed.groups == ((24, (9, 20, 2)),)
        after = by_key(scorer, packed)
        assert [torch.equal(before[r.key], after[r.key]) for r in rows] == [n != changed for n in range(3)]


def test_a_window_is_computed_in_blocks():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 70, 8) for heads in (4, 2, 2))
    from entropo_ray.train.attention import _causal

    distance = torch.arange(70)[:, None] - torch.arange(70)[None, :]
    visible = (distance >= 0) & (distance < 16)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)
    torch.testing.assert_close(_causal(query, key, value, 8**-0.5, 16), expected, rtol=1e-5, atol=1e-6)


def _half_a_head(rank, home):
    """Of a rank of two: scores and gradients of its rows, beside those of the whole head."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=2)
    torch.manual_seed(1)
    hidden, weight, target = torch.randn(90, 16), 0.6 * torch.randn(1000, 16), torch.randint(0, 1000, (90,))
    near, bias = weight + 0.05 * torch.randn_like(weight), torch.randn(1000)
    mine = slice(0, 333) if rank == 0 else slice(333, 1000)  # ragged
    up = torch.randn(2, 90)

    def run(rows, shard):
        leaves = [leaf.clone().requires_grad_() for leaf in (hidden, weight[rows], bias[rows])]
        head = Head(softcap=12.0, floats=64 * 100, shard=shard)
        anchor = Anchor(hidden, near[rows], bias[rows], 12.0)
        scores = score(leaves[0], leaves[1], target, bias=leaves[2], head=head, anchor=anchor)
        (scores.logp * up[0] + scores.entropy * up[1]).sum().backward()
        return [scores.logp.detach(), scores.entropy.detach(), scores.kl, *(leaf.grad for leaf in leaves)]

    whole = run(slice(0, 1000), None)
    part = run(mine, Shard(dist.group.WORLD, mine.start))
    for number, (found, truth) in enumerate(zip(part, whole, strict=True)):
        truth = truth[mine] if number >= 4 else truth
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=2e-6)
    dist.destroy_process_group()


def test_a_head_that_is_split_over_two_ranks_scores_like_a_whole_one(tmp_path):
    torch.multiprocessing.spawn(_half_a_head, args=(str(tmp_path),), nprocs=2)
