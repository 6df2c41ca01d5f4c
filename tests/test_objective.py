import pytest
import torch

from entropo_ray.train.objective import Loss, dpo, imitation, kto, reward

DOUBLE = {"dtype": torch.float64}
TOKENS = {"chosen_tokens": torch.tensor([5.0], **DOUBLE), "rejected_tokens": torch.tensor([8.0], **DOUBLE)}


def of(*values, grad=False):
    return torch.tensor(values, **DOUBLE, requires_grad=grad)


def pair(**options):
    """One pair of the method page: log pi -10 and -12.5, log pi_ref -11 and -11.5, 5 and 8 action tokens."""
    chosen, rejected = of(-10.0, grad=True), of(-12.5, grad=True)
    loss = dpo(chosen, rejected, of(-11.0), of(-11.5), **{"beta": 0.1, "entropy": 0.0} | TOKENS | options)
    loss.values.sum().backward()
    loss = Loss(loss.values.detach(), loss.measures)
    return loss, float(chosen.grad), float(rejected.grad)


@pytest.mark.parametrize(
    ("options", "margin", "value", "slope"),
    [
        ({}, 0.2, 0.5981388694, -0.0450166003),
        ({"entropy": 0.01}, 0.225, 0.5869620020, -0.0488384720),
        ({"entropy": 0.05}, 0.325, 0.5437926040, -0.0629186543),
        ({"entropy": 0.05, "smoothing": 0.1}, 0.325, 0.5762926040, -0.0479186543),
        ({"entropy": 0.05, "hbar": 0.25}, 0.2875, 0.5596938230, -0.0642924027),
        ({"entropy": 0.05, "scale": 6.0}, 0.06375, 0.6617801024, -0.0871322212),
        ({"scale": 6.0}, 0.195, 0.6003927939, -0.0541684670),
        ({"entropy": 0.01, "nll": 0.1}, 0.225, 0.7869620020, -0.0688384720),
        ({"beta": 0.0, "entropy": 2.0, "scale": 1.0, "gap": 0.5}, -1.375, 1.6004126516, -0.3192747111),
    ],
)
def test_pair_losses_are_the_golden_numbers(options, margin, value, slope):
    loss, chosen, _ = pair(**options)
    assert float(loss.measures["margin"]) == pytest.approx(margin, abs=1e-9)
    assert float(loss.values) == pytest.approx(value, abs=1e-9)
    assert chosen == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize("entropy", [0.0, 0.01, 0.25])
@pytest.mark.parametrize("smoothing", [0.0, 0.05, 0.2])
def test_the_gradient_carries_alpha_not_beta(entropy, smoothing):
    loss, chosen, rejected = pair(entropy=entropy, smoothing=smoothing)
    slope = (0.1 + entropy) * float(torch.sigmoid(loss.measures["margin"]) - (1 - smoothing))
    assert chosen == pytest.approx(slope, abs=1e-15)
    assert rejected == pytest.approx(-slope, abs=1e-15)


def test_no_entropy_is_plain_dpo():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = -100 * torch.rand(4, 64, generator=generator, **DOUBLE)
    ours = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, entropy=0.0).values
    logits = 0.3 * (chosen - ref_chosen) - 0.3 * (rejected - ref_rejected)
    assert torch.equal(ours, -torch.nn.functional.logsigmoid(logits))


def test_agreement_with_the_reference_is_a_margin_of_exactly_zero():
    logp = of(-1503.7, -311.2)
    loss = dpo(logp[:1], logp[1:], logp[:1], logp[1:], beta=0.1, entropy=0.0)
    assert float(loss.measures["margin"]) == 0.0
    assert torch.equal(loss.values, torch.log(of(2.0)))


def test_debiasing_removes_what_length_alone_gives():
    # 1,000 pairs whose log-probs are -hbar per token and nothing else: without debiasing the margin is length
    tokens = torch.arange(100, 2100, 2, **DOUBLE)
    logp = -0.25 * tokens
    flat = torch.full_like(tokens, 700.0)
    options = {"beta": 0.1, "entropy": 0.05, "chosen_tokens": tokens, "rejected_tokens": flat}
    raw = dpo(logp, -0.25 * flat, logp, -0.25 * flat, **options).measures
    debiased = dpo(logp, -0.25 * flat, logp, -0.25 * flat, hbar=0.25, **options).measures
    assert float(raw["margin"].abs().max()) > 10
    assert float(debiased["margin"].abs().max()) < 1e-9
    assert float(debiased["useful_share"].mean()) == 1.0
    assert float(raw["useful_share"].mean()) < 0.5


@pytest.mark.parametrize(
    ("entropy", "baseline", "passed", "failed"),
    [
        (0.05, 0.0, (0.5986876601, -0.0360391119), (0.3262929005, 0.0329738765)),
        (0.05, -0.5, (0.4750208125, -0.0374064060), (0.4439861095, 0.0370293666)),
        (0.0, 0.0, (0.4750208125, None), (0.4750208125, None)),
        (0.0, -0.5, (0.3543436938, None), (0.5986876601, None)),
    ],
)
def test_label_losses_are_the_golden_numbers(entropy, baseline, passed, failed):
    logp = of(-10.0, -12.5, grad=True)
    loss = kto(logp, of(-11.0, -11.5), torch.tensor([True, False]), of(baseline), beta=0.1, entropy=entropy)
    loss.values.sum().backward()
    for value, slope, (golden, golden_slope) in zip(loss.values, logp.grad, (passed, failed), strict=True):
        assert float(value.detach()) == pytest.approx(golden, abs=1e-9)
        if golden_slope is not None:
            assert float(slope) == pytest.approx(golden_slope, abs=1e-9)


def test_label_weights_scale_their_own_side():
    arguments = (of(-10.0, -12.5), of(-11.0, -11.5), torch.tensor([True, False]), of(0.0))
    plain = kto(*arguments, beta=0.1, entropy=0.0).values
    weighted = kto(*arguments, beta=0.1, entropy=0.0, weight_pass=2.0, weight_fail=3.0).values
    assert torch.equal(weighted, plain * of(2.0, 3.0))


def test_a_baseline_with_gradient_is_refused():
    with pytest.raises(AssertionError, match="gradient"):
        kto(of(-1.0), of(-1.0), torch.tensor([True]), of(0.0, grad=True), beta=0.1, entropy=0.0)


def test_the_useful_share_counts_pairs_that_can_still_learn():
    chosen = of(0.0, 2.1, 2.3, -2.1, -2.3)  # beta 1: the margin; ln 9 = 2.197 is the border
    zero = torch.zeros(5, **DOUBLE)
    measures = dpo(chosen, zero, zero, zero, beta=1.0, entropy=0.0).measures
    assert measures["useful_share"].tolist() == [1, 1, 0, 1, 0]
    assert measures["accuracy"].tolist() == [0, 1, 1, 0, 0]


def test_length_terms_need_token_counts():
    with pytest.raises(ValueError, match="number of action tokens"):
        reward(of(-1.0), of(-1.0), beta=0.1, entropy=0.1, hbar=0.2)


def test_imitation_sums_and_reports_per_token():
    loss = imitation(of(-6.0, -8.0), of(3.0, 2.0))
    assert loss.values.tolist() == [6.0, 8.0]
    assert loss.measures["logp"].tolist() == [-2.0, -4.0]
