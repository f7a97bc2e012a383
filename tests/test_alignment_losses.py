"""The formulas of alignment: published numbers, gradients, and sums that do not depend on how a batch is divided."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mm_gpt.alignment.losses import (
    AGGREGATIONS,
    DISTILLATION_KINDS,
    PREFERENCE_KINDS,
    aggregate,
    best_of_n_kl,
    centering_loss,
    comparison_pairs,
    distillation_loss,
    gae,
    group_advantages,
    kl_estimate,
    kto_loss,
    pairwise_loss,
    policy_loss,
    preference_loss,
    sampler_weights,
    token_rewards,
    value_loss,
    whiten,
)
from mm_gpt.errors import ConfigError


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(found: Tensor | float, *expected: float, within: float = 1e-6) -> bool:
    return bool(torch.allclose(torch.as_tensor(found).flatten().double(), tensor(*expected), rtol=0, atol=within))


# Reward models


def test_pairwise_loss_of_scores() -> None:
    better, worse = tensor(1.5), tensor(0.5)
    assert near(pairwise_loss(better, worse), 0.31326169, within=1e-8)
    assert near(pairwise_loss(better, worse, 0.3), 0.40318605, within=1e-8)
    assert near(pairwise_loss(better, worse) + 0.01 * centering_loss(better, worse), 0.35326169, within=1e-8)
    assert near(pairwise_loss(better, better), math.log(2), within=1e-12)
    assert near(pairwise_loss(better + 7, worse + 7), 0.31326169, within=1e-8)  # differences alone count


def test_all_pairs_of_a_prompt() -> None:
    scores = tensor(2, 1, 0.5, -1)
    better, worse = comparison_pairs([0, 1, 2, 3])
    losses = pairwise_loss(scores[better], scores[worse])
    assert len(losses) == 6
    assert near(losses.mean(), 0.22761343, within=1e-8)
    better, worse = comparison_pairs([1, 0, 1])  # ties are not compared
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(1, 0), (1, 2)]
    assert not len(comparison_pairs([0, 0])[0])


# Preferences


def pair(**options: float) -> Tensor:
    kind = options.pop("kind")
    return preference_loss(
        kind,  # type: ignore[arg-type]
        tensor(-12),
        tensor(-15),
        tensor(-13),
        tensor(-14),
        chosen_lengths=torch.tensor([6]),
        rejected_lengths=torch.tensor([10]),
        **{"beta": 0.1, **options},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kind": "sigmoid"}, 0.59813887),
        ({"kind": "hinge"}, 0.8),
        ({"kind": "ipo_sum"}, 9.0),
        ({"kind": "ipo"}, 22.404444),
        ({"kind": "sigmoid", "label_smoothing": 0.1}, 0.61813887),
        ({"kind": "robust", "label_smoothing": 0.1}, 0.57313887),
        # The rest by hand, from ratios of +1 and -1
        ({"kind": "sigmoid_norm"}, math.log1p(math.exp(-0.1 * (1 / 6 + 1 / 10)))),
        ({"kind": "simpo", "beta": 2.0, "gamma": 0.5}, math.log1p(math.exp(-2 * (-12 / 6 + 15 / 10) + 0.5))),
        ({"kind": "sppo_hard"}, 16.0 + 16.0),
        ({"kind": "apo_zero"}, 2 / (1 + math.exp(0.1))),
        ({"kind": "apo_down"}, 1 / (1 + math.exp(-0.1)) + 1 / (1 + math.exp(0.2))),
        ({"kind": "nca_pair"}, 1.5 * math.log1p(math.exp(-0.1)) + 0.5 * math.log1p(math.exp(0.1))),
    ],
)
def test_preference_losses(options: dict[str, float], expected: float) -> None:
    assert near(pair(**options), expected)


def test_exo_is_the_reverse_kl_to_smoothed_preferences() -> None:
    share = 1 / (1 + math.exp(-0.2))
    expected = share * math.log(share / 0.9) + (1 - share) * math.log((1 - share) / 0.1)
    assert near(pair(kind="exo_pair", label_smoothing=0.1), expected)


@pytest.mark.parametrize(
    ("rejected", "loss", "gradient"), [(-15.0, 0.59813887, -0.04501660), (-19.0, 0.43748795, -0.03543437)]
)
def test_gradient_of_dpo(rejected: float, loss: float, gradient: float) -> None:
    """Margins 2 and 6. The reference is a constant even where it could take a gradient."""
    inputs = [tensor(value).requires_grad_() for value in (-12.0, rejected, -13.0, -14.0)]
    found = preference_loss("sigmoid", *inputs, beta=0.1)
    found.sum().backward()
    assert near(found.detach(), loss, within=1e-8)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert near(inputs[0].grad, gradient, within=1e-8)
    assert near(inputs[1].grad, -gradient, within=1e-8)
    assert inputs[2].grad is inputs[3].grad is None


def test_policy_that_is_its_reference_has_loss_ln_2_until_a_step_is_taken() -> None:
    start = torch.tensor([[-12.0, -15.0], [-3.0, -2.5]])
    policy = start.clone().requires_grad_()

    def loss() -> Tensor:
        return preference_loss("sigmoid", policy[:, 0], policy[:, 1], start[:, 0], start[:, 1], beta=0.1)

    before = loss()
    assert before.tolist() == [torch.tensor(2.0).log().item()] * 2  # exactly
    before.sum().backward()
    with torch.no_grad():
        assert policy.grad is not None
        policy -= policy.grad
    assert (loss() < math.log(2)).all()


def options_of(kind: str) -> dict[str, float]:
    return {"label_smoothing": 0.1} if kind in ("exo_pair", "robust") else {}


@pytest.mark.parametrize("kind", sorted(PREFERENCE_KINDS))
def test_preference_gradients(kind: str) -> None:
    """They are those of finite differences, and raise the chosen answer over the rejected one."""
    generator = torch.Generator().manual_seed(0)
    values = [-10 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = torch.tensor([3, 5, 1, 9, 2])

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(
            kind,
            chosen,
            rejected,
            values[2],
            values[3],
            beta=0.3,
            chosen_lengths=lengths,
            rejected_lengths=lengths.flip(0),
            **options_of(kind),  # type: ignore[arg-type]
        )

    chosen, rejected = values[0].clone().requires_grad_(), values[1].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (chosen, rejected))
    at_start = [values[2].clone().requires_grad_(), values[3].clone().requires_grad_()]
    preference_loss(
        kind,
        *at_start,
        values[2],
        values[3],
        beta=0.3,
        chosen_lengths=lengths,
        rejected_lengths=lengths,
        **options_of(kind),  # type: ignore[arg-type]
    ).sum().backward()
    chosen_grad, rejected_grad = at_start[0].grad, at_start[1].grad
    assert chosen_grad is not None
    assert rejected_grad is not None
    assert (chosen_grad < rejected_grad).all()


def test_losses_far_from_the_reference_are_finite() -> None:
    far = torch.tensor([-4000.0, 0.0])
    for kind in PREFERENCE_KINDS:
        policy = far.clone().requires_grad_()
        loss = preference_loss(
            kind,
            policy,
            far.flip(0),
            far.flip(0),
            far,
            beta=1.0,
            chosen_lengths=torch.ones(2),
            rejected_lengths=torch.ones(2),
            **options_of(kind),  # type: ignore[arg-type]
        )
        loss.sum().backward()
        assert policy.grad is not None
        assert loss.isfinite().all(), kind
        assert policy.grad.isfinite().all(), kind


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kind": "sigmiod"}, "did you mean 'sigmoid'"),
        ({"kind": "hinge", "label_smoothing": 0.1}, "'hinge' has no label_smoothing"),
        ({"kind": "robust", "label_smoothing": 0.5}, "label_smoothing must be"),
        ({"kind": "exo_pair"}, "needs a label_smoothing above 0"),
        ({"kind": "sigmoid", "gamma": 1.0}, "has no gamma"),
        ({"kind": "sigmoid", "beta": 0.0}, "beta must be"),
        ({"kind": "sigmoid", "beta": math.nan}, "beta must be"),
    ],
)
def test_wrong_preference_losses_are_refused(options: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        pair(**options)


def test_kto() -> None:
    policy, ref = tensor(-12, -15).requires_grad_(), tensor(-13, -14).requires_grad_()
    labels = torch.tensor([True, False])
    loss = kto_loss(policy, ref, labels, 0.5, beta=0.1, desirable_weight=1.5, undesirable_weight=2.0)
    assert near(loss.detach(), 1.5 / (1 + math.exp(0.05)), 2.0 / (1 + math.exp(0.15)))
    loss.sum().backward()
    assert ref.grad is None
    assert policy.grad is not None
    assert policy.grad[0] < 0 < policy.grad[1]
    below = kto_loss(policy, ref, labels, -3.0, beta=0.1)  # an estimate of a KL may be negative: a KL is not
    assert near(below.detach(), *kto_loss(policy, ref, labels, 0.0, beta=0.1).tolist())
    zero = torch.tensor(0.5, requires_grad=True)
    kto_loss(policy, ref, labels, zero, beta=0.1).sum().backward()
    assert zero.grad is None
    same = kto_loss(ref.detach(), ref, labels, 0.0, beta=0.1)
    assert near(same, 0.5, 0.5, within=1e-12)


# Rewards and advantages

REWARDS, VALUES = tensor(-0.1, 0.05, -0.02, 1)[None], tensor(0.2, 0.3, 0.4, 0.5)[None]
WHOLE = torch.ones(1, 4, dtype=torch.bool)


def test_gae() -> None:
    advantages, returns = gae(REWARDS, VALUES, WHOLE, gamma=1, lam=0.95)
    assert near(advantages, 0.643387, 0.67725, 0.555, 0.5)
    assert near(returns, 0.843387, 0.97725, 0.955, 1)
    assert near(gae(REWARDS, VALUES, WHOLE, gamma=1, lam=1)[0], 0.73, 0.73, 0.58, 0.5)
    cut_off = gae(REWARDS, VALUES, WHOLE, gamma=1, lam=0.95, bootstrap=tensor(0.6))
    assert near(cut_off[0], 1.157812, 1.21875, 1.125, 1.1)


@given(st.lists(st.booleans(), min_size=4, max_size=9).filter(lambda own: sum(own) == 4))
def test_masked_tokens_change_no_advantage(own: list[bool]) -> None:
    mask = torch.tensor([own])
    rewards, values = torch.full(mask.shape, 99.0).double(), torch.full(mask.shape, -7.0).double()
    rewards[mask], values[mask] = REWARDS.flatten(), VALUES.flatten()
    for bootstrap in (None, tensor(0.6)):
        found = gae(rewards, values, mask, gamma=0.9, lam=0.95, bootstrap=bootstrap)
        expected = gae(REWARDS, VALUES, WHOLE, gamma=0.9, lam=0.95, bootstrap=bootstrap)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a[mask], b.flatten())
            assert not a[~mask].any()


def test_whitening() -> None:
    advantages = gae(REWARDS, VALUES, WHOLE, gamma=1, lam=0.95)[0]
    assert near(whiten(advantages, WHOLE), 0.704557, 1.186751, -0.55406, -1.337247)
    assert near(whiten(advantages, WHOLE, ddof=1), 0.610164, 1.027757, -0.47983, -1.158091)
    kept = whiten(advantages, WHOLE, shift_mean=False)
    assert near(kept.mean(), float(advantages.mean()))
    mask = torch.tensor([[True, False, True, True, True]])
    padded = torch.cat([advantages[:, :1], tensor(1e9)[None], advantages[:, 1:]], dim=1)
    assert near(whiten(padded, mask), 0.704557, 0, 1.186751, -0.55406, -1.337247)
    assert whiten(torch.full((2, 2), 0.1), torch.ones(2, 2, dtype=torch.bool)).abs().max() < 1e-3


def test_whitening_over_ranks_is_that_of_one() -> None:
    """Two ranks take turns: what each adds is summed as all-reduce would."""
    values, mask = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double(), torch.ones(4, 3).bool()
    parts = (values[:1], values[1:])
    mean = float(values.mean())

    def reduce_with(other: Tensor):  # type: ignore[no-untyped-def]
        def reduce(numbers: list[float]) -> list[float]:
            if len(numbers) == 2:
                return [numbers[0] + other.numel(), numbers[1] + float(other.sum())]
            return [numbers[0] + float((other - mean).square().sum())]

        return reduce

    found = [
        whiten(part, torch.ones_like(part).bool(), reduce=reduce_with(other))
        for part, other in zip(parts, reversed(parts), strict=True)
    ]
    assert torch.allclose(torch.cat(found), whiten(values, mask))


GROUP = torch.tensor([[1.0, 0, 0, 1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "won", "lost"),
    [
        ("grpo", 1.619835, -0.539945),
        ("rloo", 0.857143, -0.285714),
        ("dr_grpo", 0.75, -0.25),
        ("batch_std", 1.619835, -0.539945),  # one group is the whole batch
    ],
)
def test_group_advantages(kind: str, won: float, lost: float) -> None:
    assert near(group_advantages(kind, GROUP), *(won if reward else lost for reward in GROUP[0].tolist()))
    # A sample without a reward is as if it were not there
    nan = torch.tensor([[math.nan]])
    with_unknown = group_advantages(kind, torch.cat([nan, GROUP, nan], dim=1))
    assert near(with_unknown, 0, *group_advantages(kind, GROUP)[0].tolist(), 0)
    for equal in (torch.full((1, 7), 0.1), torch.full((1, 3), math.nan), torch.tensor([[0.3, math.nan]])):
        assert not group_advantages(kind, equal).any()


def test_batch_std_is_of_all_rewards() -> None:
    rewards = torch.tensor([[1.0, 0.0], [5.0, 3.0]])
    deviation = float(rewards.std())
    assert near(group_advantages("batch_std", rewards), *(x / (deviation + 1e-4) for x in (0.5, -0.5, 1, -1)))


def test_unknown_names_are_refused() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    one = torch.ones(1, 1)
    with pytest.raises(ConfigError, match="did you mean 'dr_grpo'"):
        group_advantages("drgrpo", GROUP)
    with pytest.raises(ConfigError, match="unknown KL estimate 'k4'"):
        kl_estimate("k4", one, one)
    with pytest.raises(ConfigError, match="did you mean 'sequence'"):
        policy_loss(one, one, one, mask, level="sequences")
    with pytest.raises(ConfigError, match="did you mean 'ppo'"):
        policy_loss(one, one, one, mask, kind="pp")
    with pytest.raises(ConfigError, match="did you mean 'constant'"):
        aggregate("const", one, mask)
    with pytest.raises(ConfigError, match="needs max_tokens"):
        aggregate("constant", one, mask)
    with pytest.raises(ConfigError, match="unknown sampler correction"):
        sampler_weights("tis", one, one, mask)
    with pytest.raises(ConfigError, match="did you mean 'reverse'"):
        distillation_loss(one, one, kind="revers")
    with pytest.raises(ConfigError, match="beta must be above 0 and below 1"):
        distillation_loss(one, one, kind="jsd", beta=1.0)
    with pytest.raises(ConfigError, match="temperature must be"):
        distillation_loss(one, one, temperature=0.0)
    with pytest.raises(ConfigError, match="n must be at least 1"):
        best_of_n_kl(0)


def test_the_score_lands_on_the_last_token() -> None:
    """However a response ended, and whatever stands behind it."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    kl = torch.full(mask.shape, 0.5)
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), kl, mask, beta=0.1)
    expected = torch.where(mask, -0.05, 0.0)
    expected[0, 2] += 1
    expected[1, 4] += 2
    expected[2, 2] += 3
    assert torch.allclose(rewards, expected)


# KL


@pytest.mark.parametrize(
    ("q", "expected"), [(0.25, (0.693147, 0.240227, 0.193147)), (0.8, (-0.470004, 0.110452, 0.129996))]
)
def test_kl_estimates(q: float, expected: tuple[float, ...]) -> None:
    found = [kl_estimate(kind, tensor(0.5).log(), tensor(q).log()) for kind in ("k1", "k2", "k3")]
    assert near(torch.cat(found), *expected)


def test_kl_estimates_on_average() -> None:
    p, q = tensor(0.7, 0.2, 0.1), tensor(0.5, 0.3, 0.2)
    mean = {kind: float(p @ kl_estimate(kind, p.log(), q.log())) for kind in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(0.0851228, abs=1e-7)
    assert mean["k3"] == pytest.approx(0.0851228, abs=1e-7)
    assert mean["k2"] == pytest.approx(0.0800876, abs=1e-7)


def test_gradients_of_kl_estimates() -> None:
    """Of samples, k2 as a loss has the KL's gradient; k1 has none at all, and k3 has another: both need the ratio."""
    logits, q = tensor(0.4, -0.3, 1.1).requires_grad_(), tensor(0.5, 0.3, 0.2)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, logits)[0]

    logp = logits.log_softmax(dim=0)
    probability = logp.exp().detach()
    truth = gradient((logp.exp() * (logp - q.log())).sum())
    sampled = {}
    for kind in ("k1", "k2", "k3"):
        logp = logits.log_softmax(dim=0)
        sampled[kind] = gradient((probability * kl_estimate(kind, logp, q.log())).sum())
        logp = logits.log_softmax(dim=0)
        ratio = (logp - logp.detach()).exp()
        if kind != "k2":
            assert torch.allclose(gradient((probability * ratio * kl_estimate(kind, logp, q.log())).sum()), truth)
    assert torch.allclose(sampled["k2"], truth)
    assert sampled["k1"].abs().max() < 1e-12
    assert not torch.allclose(sampled["k3"], truth, atol=1e-3)


def test_a_token_far_from_the_reference_has_a_finite_kl() -> None:
    logp = torch.tensor([0.0, -300.0], requires_grad=True)
    found = kl_estimate("k3", logp, torch.tensor([-300.0, 0.0]))
    found.sum().backward()
    assert found.isfinite().all()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


# Policies and values

ONE = torch.ones(1, 1, dtype=torch.bool)


def clipped(advantage: float, ratio: float, **options: float) -> tuple[float, bool]:
    loss, is_clipped = policy_loss(tensor(ratio).log()[None], tensor(0)[None], tensor(advantage), ONE, **options)  # type: ignore[arg-type]
    return float(loss), bool(is_clipped)


@pytest.mark.parametrize(
    ("advantage", "ratio", "options", "loss", "is_clipped"),
    [
        (1, 1.5, {"clip_high": 0.28}, -1.28, True),
        (1, 1.25, {"clip_high": 0.28}, -1.25, False),
        (1, 1.5, {}, -1.2, True),
        (-1, 0.5, {}, 0.8, True),
        (-1, 1.5, {}, 1.5, False),
        (1, 0.5, {}, -0.5, False),
        (-1, 5, {"dual_clip": 3.0}, 3, True),
        (-1, 5, {}, 5, False),
        (1, 5, {"dual_clip": 3.0}, -1.2, True),
    ],
)
def test_clipping(advantage: float, ratio: float, options: dict[str, float], loss: float, is_clipped: bool) -> None:
    assert clipped(advantage, ratio, **options) == (pytest.approx(loss), is_clipped)


def test_a_clipped_token_has_no_gradient() -> None:
    for advantage, ratio, options in ((1.0, 1.5, {}), (-1.0, 0.5, {}), (-1.0, 5.0, {"dual_clip": 3.0})):
        logp = tensor(ratio).log()[None].requires_grad_()
        loss = policy_loss(logp, tensor(0)[None], tensor(advantage), ONE, **options).loss  # type: ignore[arg-type]
        loss.sum().backward()
        assert logp.grad is not None
        assert not logp.grad.any()


def test_cispo_keeps_the_gradient_and_clips_its_weight() -> None:
    logp = tensor(5.0).log()[None].requires_grad_()
    loss, is_clipped = policy_loss(logp, tensor(0)[None], tensor(2.0), ONE, kind="cispo", clip_high=0.5)
    loss.sum().backward()
    assert logp.grad is not None
    assert near(logp.grad, -2 * 1.5)
    assert is_clipped.all()


def test_sequence_ratios() -> None:
    log_ratios = tensor(0.1, -0.2, 0.3, 9)[None]
    mask = torch.tensor([[True, True, True, False]])
    options = {"clip_low": 9.0, "clip_high": 9.0}
    mean = policy_loss(log_ratios, torch.zeros(1, 4), tensor(-1), mask, level="sequence", **options).loss  # type: ignore[arg-type]
    assert near(mean, 1.068939, 1.068939, 1.068939, 0)
    whole = policy_loss(log_ratios, torch.zeros(1, 4), tensor(-1), mask, level="sequence_sum", **options).loss  # type: ignore[arg-type]
    assert near(whole, *[math.exp(0.2)] * 3, 0)


@pytest.mark.parametrize("kind", ["ppo", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_first_update_is_the_policy_gradient(kind: str, level: str) -> None:
    """Ratios are 1 and nothing is clipped; the gradient of a token is its advantage. What the sampler and the
    advantages were made of gets none."""
    generator = torch.Generator().manual_seed(2)
    logp = (-torch.rand(3, 4, generator=generator)).requires_grad_()
    old, advantages = logp.detach().clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]]).bool()
    loss, is_clipped = policy_loss(logp, old, advantages, mask, kind=kind, level=level)
    total, count = aggregate("sequence", loss, mask)
    (total / count).backward()
    assert not is_clipped.any()
    lengths = mask.sum(1, keepdim=True)
    steps = 1 if kind == "cispo" or level != "sequence_sum" else lengths  # the sum's ratio has T times the mean's slope
    expected = torch.where(mask, -advantages.detach()[:, None] / lengths / 3 * steps, 0.0)
    assert logp.grad is not None
    assert torch.allclose(logp.grad, expected, atol=1e-6)
    assert old.grad is advantages.grad is None


def test_what_is_masked_may_be_anything() -> None:
    mask = torch.tensor([[True, False]])
    logp = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
    loss, _ = policy_loss(logp, torch.tensor([[-1.0, -2.0]]), torch.tensor([1.0]), mask)
    loss.sum().backward()
    assert loss.tolist() == [[-1.0, 0.0]]
    assert logp.grad is not None
    assert logp.grad.tolist() == [[-1.0, 0.0]]


def test_value_loss() -> None:
    value = tensor(1)[None].requires_grad_()
    free = value_loss(value, tensor(0.5)[None], tensor(2)[None], ONE)
    assert near(free.loss.detach(), 0.5)
    loss, is_clipped = value_loss(value, tensor(0.5)[None], tensor(2)[None], ONE, clip=0.2)
    assert near(loss.detach(), 0.845)
    assert is_clipped.all()
    loss.sum().backward()
    assert value.grad is not None
    assert not value.grad.any()
    assert not value_loss(value, value, tensor(2)[None], ~ONE, clip=0.2).loss.any()


# Sums that add up


def two_responses() -> tuple[Tensor, Tensor]:
    """Of 2 and 8 tokens, with advantages 1 and -1 at ratio 1."""
    mask = torch.arange(8)[None] < torch.tensor([[2], [8]])
    logp = torch.zeros(2, 8)
    return policy_loss(logp, logp, torch.tensor([1.0, -1.0]), mask).loss, mask


@pytest.mark.parametrize(("kind", "expected"), [("token", 0.6), ("sequence", 0.0), ("constant", 0.1875)])
def test_aggregation(kind: str, expected: float) -> None:
    total, count = aggregate(kind, *two_responses(), max_tokens=16)
    assert float(total) / count == pytest.approx(expected)


def test_a_mean_of_means_is_not_the_mean() -> None:
    parts = [aggregate("token", torch.full((1, n), x), torch.ones(1, n).bool()) for n, x in ((100, 0.5), (900, 0.3))]
    assert sum(float(total) for total, _ in parts) / sum(count for _, count in parts) == pytest.approx(0.32)


@pytest.mark.parametrize("kind", sorted(AGGREGATIONS))
@given(lengths=st.lists(st.integers(0, 6), min_size=2, max_size=6), cut=st.integers(1, 5), seed=st.integers(0, 99))
def test_micro_batches_are_one_batch(kind: str, lengths: list[int], cut: int, seed: int) -> None:
    """Whatever the division, and whatever padding a part needs, gradients are those of the whole batch."""
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    start = old + 0.3 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)

    def gradient(parts: list[slice]) -> Tensor:
        logp = start.clone().requires_grad_()
        sums, counts = [], 0.0
        for part in parts:
            width = max(int(mask[part].sum(1).max()), 1) if len(mask[part]) else 1
            own = mask[part, :width]
            loss = policy_loss(logp[part, :width], old[part, :width], advantages[part], own).loss
            total, count = aggregate(kind, loss, own, max_tokens=6)
            sums.append(total)
            counts += count
        (torch.stack(sums).sum() / max(counts, 1)).backward()
        assert logp.grad is not None
        return logp.grad

    assert torch.allclose(gradient([slice(None)]), gradient([slice(0, cut), slice(cut, None)]), atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [[1, 1, 1]]),
        ("token_truncate", [[3, 0.5, 1]]),
        ("token_mask", [[0, 0.5, 1]]),
        ("sequence_truncate", [[2]]),
        ("sequence_mask", [[2]]),
    ],
)
def test_sampler_weights(kind: str, expected: list[list[float]]) -> None:
    logp = torch.tensor([[4.0, 0.5, 7.0]]).log().requires_grad_()
    mask = torch.tensor([[True, True, False]])
    weights = sampler_weights(kind, logp, torch.zeros(1, 3), mask, cap=3.0)
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float32))
    assert not weights.requires_grad
    if kind == "sequence_mask":
        assert sampler_weights(kind, logp, torch.zeros(1, 3), mask, cap=1.5).tolist() == [[0]]


@pytest.mark.parametrize(("n", "expected"), [(1, 0.0), (4, 0.636294), (16, 1.835089), (64, 3.174508)])
def test_kl_of_the_best_of_n(n: int, expected: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(expected, abs=1e-6)


def test_kl_of_the_best_of_n_is_that_of_a_simulation() -> None:
    """Ranks are uniform: the best of n has density n u^(n-1), whose KL from the uniform one is integrated here."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = 4 * u**3
    assert float((density * density.log()).mean()) == pytest.approx(best_of_n_kl(4), abs=1e-6)


# Distillation


def test_distillation() -> None:
    p, q = tensor(0.7, 0.2, 0.1), tensor(0.5, 0.3, 0.2)  # teacher, student
    assert near(distillation_loss(q.log(), p.log()), 0.0851228)
    assert near(distillation_loss(p.log(), q.log(), kind="reverse"), 0.0851228)
    m = (p + q) / 2
    expected = (float((p * (p / m).log()).sum()) + float((q * (q / m).log()).sum())) / 2
    assert near(distillation_loss(q.log(), p.log(), kind="jsd"), expected)
    # Near its limits, divided by beta, JSD is the one KL or the other (2306.13649)
    assert near(distillation_loss(q.log(), p.log(), kind="jsd", beta=1e-6) * 1e6, 0.0851228, within=1e-5)


@pytest.mark.parametrize("kind", sorted(DISTILLATION_KINDS))
def test_distillation_gradients(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    teacher.requires_grad_()

    def loss(logits: Tensor) -> Tensor:
        return distillation_loss(logits, teacher, kind=kind, temperature=2.0, beta=0.3)

    assert loss(student).shape == (2, 3)
    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).sum().backward()
    assert teacher.grad is None
    same = teacher.detach().clone().requires_grad_()
    value = loss(same)
    value.sum().backward()
    assert same.grad is not None
    assert value.abs().max() < 1e-12
    assert same.grad.abs().max() < 1e-12


def test_distillation_keeps_its_size_at_any_temperature() -> None:
    """At high temperatures T^2 KL is half the variance of the logits' difference (1503.02531), not 0."""
    student, teacher = tensor(1, -2, 0.5), tensor(0.3, 1, -1)
    loss = distillation_loss(student, teacher, temperature=1e4)
    assert near(loss, float((student - teacher).var(correction=0)) / 2, within=1e-3)
