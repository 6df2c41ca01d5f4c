import numpy as np
import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from entropo_ray.train import logprob
from entropo_ray.train.batch import Row, pack
from entropo_ray.train.logprob import Scorer, install, score, sums


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


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_tiles_equal_full_logits_in_value_and_gradient(softcap, with_bias, monkeypatch):
    monkeypatch.setitem(logprob._TILE_FLOATS, "cpu", 1)  # the smallest tile, so that 300 rows are five tiles
    hidden, weight, target, bias = problem(torch.float32)
    bias = bias if with_bias else None
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    up_logp, up_entropy = torch.randn(300), torch.randn(300)

    def run(logp, entropy):
        return torch.autograd.grad((logp * up_logp + entropy * up_entropy).sum(), leaves)

    ours = score(hidden, weight, target, bias=bias, softcap=softcap)
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


def test_memory_of_the_head_does_not_grow_with_action_tokens(monkeypatch):
    monkeypatch.setitem(logprob._TILE_FLOATS, "cpu", 64 * 97)
    seen = []
    original = logprob._logits
    monkeypatch.setattr(logprob, "_logits", lambda hidden, *rest: seen.append(len(hidden)) or original(hidden, *rest))
    hidden, weight, target, _ = problem()
    score(hidden, weight, target).logp.sum().backward()
    assert max(seen) == 64
    assert sum(seen) == 600  # each row once forward and once backward


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
