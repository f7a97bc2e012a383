"""The formulas of alignment, as functions of tensors: preferences, policies, values, distillation.

Nothing is averaged in here: a loss comes per pair, per completion or per token, and the caller sums it and divides once
by what the whole step holds, over micro-batches and ranks. Log-probabilities are in nats; those of the reference and of
the sampler are constants, whatever they were made of. Methods have the names that TRL gives them, where it has them.

Shapes: N pairs or completions, R responses of a rollout, T their tokens, P prompts, k samples of each, V vocabulary.
Masks are True where a token is the response's own; what stands elsewhere changes nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_gpt.errors import ConfigError, unknown_name

MAX_LOG_RATIO = 20.0
"""Ratios of probabilities are e^-20 to e^20: beyond, a ratio says no more, and its square would leave float32."""


# Reward models


def pairwise_loss(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigma(better - worse - margin) of scores (N,): Bradley-Terry as in InstructGPT (2203.02155). (N,)"""
    return -F.logsigmoid(better - worse - margin)


def centering_loss(better: Tensor, worse: Tensor) -> Tensor:
    """(better + worse)^2 of scores (N,): holds them around 0, since differences alone leave their level free. (N,)"""
    return (better + worse).square()


def comparison_pairs(ranks: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
    """Of one prompt's K ranks, lower is better: the indices (better, worse) of all pairs that are not tied, (N,) each.

    All pairs of a prompt belong into one batch: apart, each completion would be learned K - 1 times (2203.02155).
    """
    order = torch.as_tensor(ranks)
    better, worse = (order[:, None] < order[None, :]).nonzero(as_tuple=True)
    return better, worse


# Preferences


PREFERENCE_KINDS = {
    "sigmoid": "DPO (2305.18290); with label_smoothing the conservative cDPO",
    "robust": "DPO that is unbiased under flipped labels (2403.00409); label_smoothing is their share, below 0.5",
    "hinge": "SLiC (2305.10425) on the same difference",
    "ipo": "IPO (2310.12036) on log-ratios averaged over tokens, as its authors and TRL do",
    "ipo_sum": "IPO on summed log-ratios, as the paper's formula and OpenRLHF have it",
    "sigmoid_norm": "DPO on log-ratios averaged over tokens (Tülu 3, 2411.15124)",
    "simpo": "SimPO (2405.14734): averaged log-probabilities without a reference, a target margin gamma",
    "exo_pair": "EXO (2402.00856): reverse KL to preferences of which label_smoothing are flipped; above 0",
    "nca_pair": "NCA (2402.05369): also raises the chosen one's probability itself",
    "sppo_hard": "SPPO (2405.00675) with certain preferences",
    "apo_zero": "APO (2408.06266) where chosen answers are better than the model's own",
    "apo_down": "APO where chosen answers are worse than the model's own",
}
"""What `preference_loss` knows."""
_SMOOTHED = ("sigmoid", "sigmoid_norm", "simpo", "robust", "exo_pair")
BY_LENGTH = ("ipo", "sigmoid_norm", "simpo")
"""The kinds that compare averages over tokens."""


def check_preference_kind(kind: str, *, beta: float, label_smoothing: float = 0.0, gamma: float = 0.0) -> None:
    """Raises ConfigError for an unknown kind, and for a number that the kind would not look at or cannot use."""
    if kind not in PREFERENCE_KINDS:
        raise ConfigError(unknown_name("preference loss", kind, PREFERENCE_KINDS))
    if not (beta > 0 and math.isfinite(beta)):
        raise ConfigError(f"beta must be a finite number above 0, not {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"label_smoothing must be at least 0 and below 0.5, not {label_smoothing}")
    if label_smoothing and kind not in _SMOOTHED:
        raise ConfigError(f"the loss {kind!r} has no label_smoothing (these have: {', '.join(_SMOOTHED)})")
    if kind == "exo_pair" and not label_smoothing:
        raise ConfigError("the loss 'exo_pair' needs a label_smoothing above 0: its target would be infinitely far")
    if gamma and kind != "simpo":
        raise ConfigError(f"the loss {kind!r} has no gamma: only simpo has")


def preference_loss(
    kind: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    gamma: float = 0.0,
) -> Tensor:
    """The loss (N,) of pairs, given the summed log-probabilities (N,) of both answers under policy and reference.

    `PREFERENCE_KINDS` says what there is. Lengths (N,) in tokens are needed where averages are taken; `simpo` alone
    needs no reference. Where the policy is its reference, `sigmoid` is exactly ln 2. Raises what
    `check_preference_kind` does.
    """
    check_preference_kind(kind, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    chosen, rejected = policy_chosen, policy_rejected
    if kind != "simpo":
        assert ref_chosen is not None, f"{kind} needs a reference"
        assert ref_rejected is not None, f"{kind} needs a reference"
        chosen, rejected = chosen - ref_chosen.detach(), rejected - ref_rejected.detach()
    if kind in BY_LENGTH:
        assert chosen_lengths is not None, f"{kind} needs lengths"
        assert rejected_lengths is not None, f"{kind} needs lengths"
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    delta = chosen - rejected
    right, wrong = -F.logsigmoid(beta * delta - gamma), -F.logsigmoid(gamma - beta * delta)
    if kind in ("sigmoid", "sigmoid_norm", "simpo"):
        return (1 - label_smoothing) * right + label_smoothing * wrong
    if kind == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    if kind == "hinge":
        return F.relu(1 - beta * delta)
    if kind in ("ipo", "ipo_sum"):
        return (delta - 1 / (2 * beta)).square()
    if kind == "exo_pair":  # KL of the policy's preference from the smoothed one
        share = torch.sigmoid(beta * delta)
        expected = math.log1p(-label_smoothing), math.log(label_smoothing)
        return share * (-right - expected[0]) + (1 - share) * (-wrong - expected[1])
    if kind == "nca_pair":
        own = F.logsigmoid(beta * chosen)
        return -own - 0.5 * F.logsigmoid(-beta * chosen) - 0.5 * F.logsigmoid(-beta * rejected)
    if kind == "sppo_hard":
        return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    if kind == "apo_zero":
        return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    assert kind == "apo_down"
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * delta)


def kto_loss(
    policy: Tensor,
    ref: Tensor,
    labels: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (2402.01306) of single answers, (N,): log-probabilities (N,), labels (N,) bool for good or bad.

    `kl` is the zero point that both are judged by: the mean of log policy - log reference over answers that belong to
    other prompts, over the whole batch. It is held constant, and never below 0.
    """
    zero = torch.as_tensor(kl, dtype=policy.dtype, device=policy.device).detach().clamp(min=0)
    gain = beta * (policy - ref.detach() - zero)
    return torch.where(labels, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


# Rewards and advantages


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Rewards (R, T): -beta * kl (R, T) on each token, and the response's score (R,) on its last one (2009.01325).

    The last one is the last of the mask: whatever ended the response, and whatever padding looks like. A response
    without tokens gets nothing.
    """
    rewards = torch.where(mask, -beta * kl, 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1, keepdim=True)
    return rewards.scatter_add(1, last, torch.where(mask.any(1), scores, 0.0)[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438): advantages and returns, (R, T) each, 0 where masked.

    Masked tokens, wherever they stand, are as if they were not there. `bootstrap` (R,) is what is still expected behind
    the last token: the critic's value there for a response that was cut off, 0 (as without it) for one that ended.
    """
    after = rewards.new_zeros(len(rewards)) if bootstrap is None else bootstrap.to(rewards.dtype)
    advantage, advantages = torch.zeros_like(after), torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        own = mask[:, t]
        delta = rewards[:, t] + gamma * after - values[:, t]
        advantage = torch.where(own, delta + gamma * lam * advantage, advantage)
        after = torch.where(own, values[:, t], after)
        advantages[:, t] = torch.where(own, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


Reduce = Callable[[list[float]], list[float]]
"""Sums numbers over ranks: `functools.partial(sum_over_ranks, device=...)`."""


def _mean_and_variance(values: Tensor, ddof: int, reduce: Reduce) -> tuple[float, float]:
    """Of 1-D values, over all ranks."""
    values = values.detach().double()
    count, total = reduce([float(len(values)), float(values.sum())])
    mean = total / max(count, 1)
    (squares,) = reduce([float((values - mean).square().sum())])
    return mean, squares / max(count - ddof, 1)


def whiten(values: Tensor, mask: Tensor, *, ddof: int = 0, shift_mean: bool = True, reduce: Reduce = list) -> Tensor:
    """Values (R, T) with mean 0 and variance 1 over the tokens of the mask, 0 elsewhere.

    Give the whole batch of a step, not a micro-batch; `reduce` adds the other ranks' part. The variance is divided by
    the count less `ddof`; 1e-8 is added to it. `shift_mean` False keeps the mean, as for rewards.
    """
    mean, variance = _mean_and_variance(values[mask], ddof, reduce)
    white = (values - mean) * (variance + 1e-8) ** -0.5
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


ADVANTAGE_KINDS = {
    "grpo": "less the group's mean, divided by its standard deviation (ddof 1) + 1e-4 (2402.03300, as TRL)",
    "dr_grpo": "less the group's mean (2503.20783)",
    "rloo": "less the mean of the group's others (2402.14740)",
    "batch_std": "less the group's mean, divided by the standard deviation (ddof 1) of all rewards + 1e-4 (2508.08221)",
}
"""What `group_advantages` knows."""


def group_advantages(kind: str, rewards: Tensor, *, reduce: Reduce = list) -> Tensor:
    """Advantages (P, k) of rewards (P, k); a NaN is a sample without a reward: left out, its advantage 0.

    A sample that has no other to be compared with has advantage 0, and so has each of a group of equal rewards.
    `batch_std` looks at all prompts, over all ranks by `reduce`. Raises ConfigError for an unknown kind.
    """
    if kind not in ADVANTAGE_KINDS:
        raise ConfigError(unknown_name("advantage", kind, ADVANTAGE_KINDS))
    known = ~rewards.isnan()
    count = known.sum(dim=1, keepdim=True)
    filled = torch.where(known, rewards, 0.0)
    centered = filled - filled.sum(dim=1, keepdim=True) / count.clamp(min=1)
    # Equal rewards are exactly 0, where their mean is not exactly they
    lowest = torch.where(known, rewards, math.inf).amin(dim=1, keepdim=True)
    highest = torch.where(known, rewards, -math.inf).amax(dim=1, keepdim=True)
    centered = torch.where(known & (lowest < highest), centered, 0.0)
    if kind == "rloo":
        return centered * count / (count - 1).clamp(min=1)
    if kind == "grpo":
        deviation = (centered.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        return centered / (deviation + 1e-4)
    if kind == "batch_std":
        return centered / (math.sqrt(_mean_and_variance(rewards[known], 1, reduce)[1]) + 1e-4)
    return centered


KL_KINDS = ("k1", "k2", "k3")


def kl_estimate(kind: str, logp: Tensor, ref: Tensor) -> Tensor:
    """Of samples of the policy, an estimate of KL(policy || ref) each, shaped as they are (joschu.net/blog/kl-approx).

    k1 (log-ratio) and k3 are unbiased, k3 never below 0 and with less variance; k2 (half the square) is biased. As a
    penalty in the *reward*, k1 is right. In the *loss*, the gradient of k2 as it is is that of the KL; those of k1 and
    k3 are not, without the ratio to the sampler before them. Raises ConfigError for an unknown kind.
    """
    ratio = logp - ref.detach()
    if kind == "k1":
        return ratio
    if kind == "k2":
        return ratio.square() / 2
    if kind == "k3":
        return torch.exp((-ratio).clamp(max=MAX_LOG_RATIO)) - 1 + ratio
    raise ConfigError(unknown_name("KL estimate", kind, KL_KINDS))


# Policies and values


POLICY_KINDS = {
    "ppo": "the worse of the ratio's and the clipped ratio's objective (1707.06347)",
    "cispo": "the clipped ratio as a constant weight of the log-probability: no token loses its gradient (2506.13585)",
}
"""What `policy_loss` knows."""
RATIO_LEVELS = {
    "token": "each token's own ratio",
    "sequence": "of a whole response, the length-normalised ratio: exp(mean log-ratio), as GSPO (2507.18071)",
    "sequence_sum": "of a whole response, the ratio of its probabilities: exp(sum of log-ratios), as RLOO",
}
"""Of which probabilities the ratio is."""


def ratios(level: str, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """pi / pi_old, (R, T) for tokens, (R, 1) for sequences. Raises ConfigError for an unknown level."""
    if level not in RATIO_LEVELS:
        raise ConfigError(unknown_name("level of ratios", level, RATIO_LEVELS))
    log_ratio = torch.where(mask, logp - old.detach(), 0.0)
    if level != "token":
        log_ratio = log_ratio.sum(dim=1, keepdim=True)
    if level == "sequence":
        log_ratio = log_ratio / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


class Clipped(NamedTuple):
    """A loss (R, T), 0 where masked, and in which places a clip decides it (R, T) bool."""

    loss: Tensor
    is_clipped: Tensor


def policy_loss(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    level: str = "token",
    kind: str = "ppo",
) -> Clipped:
    """The clipped loss of a policy: log-probabilities now and when sampled (R, T), advantages (R, T), (R, 1) or (R,).

    Ratios are held in [1 - clip_low, 1 + clip_high]; DAPO's clip-higher (2503.14476) is `clip_high` 0.28. `dual_clip`
    (1912.09729) bounds the loss of a negative advantage at that many times it. `POLICY_KINDS` and `RATIO_LEVELS` say
    what there is; with a sequence's ratio each token carries the sequence's term, to be averaged over each sequence.
    Where logp is old, ratios are 1 and the gradient is the policy gradient. Raises ConfigError for an unknown name.
    """
    if kind not in POLICY_KINDS:
        raise ConfigError(unknown_name("policy loss", kind, POLICY_KINDS))
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.detach()
    ratio = ratios(level, logp, old, mask)
    held = ratio.clamp(1 - clip_low, 1 + clip_high)
    if kind == "cispo":
        loss = -advantages * held.detach() * logp
        is_clipped = ratio != held
    else:
        free, bounded = -advantages * ratio, -advantages * held
        loss, is_clipped = torch.maximum(free, bounded), bounded > free
        if dual_clip is not None:
            most = torch.where(advantages < 0, -advantages * dual_clip, math.inf)
            loss, is_clipped = torch.minimum(loss, most), is_clipped | (loss > most)
    return Clipped(torch.where(mask, loss, 0.0), mask & is_clipped)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = None
) -> Clipped:
    """Half the squared error of a critic, (R, T); with `clip` that of a value at most so far from its old one, where
    it is the greater (1707.06347's code, 2009.01325)."""
    free = (values - returns).square()
    if clip is None:
        return Clipped(torch.where(mask, free / 2, 0.0), torch.zeros_like(mask))
    old = old_values.detach()
    held = (old + (values - old).clamp(-clip, clip) - returns).square()
    return Clipped(torch.where(mask, torch.maximum(free, held) / 2, 0.0), mask & (held > free))


AGGREGATIONS = {
    "token": "all tokens weigh the same (DAPO, 2503.14476)",
    "sequence": "all responses weigh the same, and so do the tokens of each (GRPO, 2402.03300)",
    "constant": "the sum, divided by responses times max_tokens: no length is favoured (Dr. GRPO, 2503.20783)",
}
"""What `aggregate` knows."""


def aggregate_count(kind: str, mask: Tensor, *, max_tokens: int | None = None) -> float:
    """What `aggregate`'s sum of this mask is divided by. A response without tokens counts for nothing."""
    if kind not in AGGREGATIONS:
        raise ConfigError(unknown_name("aggregation", kind, AGGREGATIONS))
    if kind == "token":
        return float(mask.sum())
    responses = float(mask.any(dim=1).sum())
    if kind == "sequence":
        return responses
    if max_tokens is None:
        raise ConfigError("the aggregation 'constant' needs max_tokens")
    return responses * max_tokens


def aggregate(kind: str, loss: Tensor, mask: Tensor, *, max_tokens: int | None = None) -> tuple[Tensor, float]:
    """A loss (R, T) as (sum, count): sums of micro-batches and ranks, divided by the sum of their counts, are exactly
    what the whole batch gives. Raises ConfigError for an unknown kind."""
    count = aggregate_count(kind, mask, max_tokens=max_tokens)
    loss = torch.where(mask, loss, 0.0)
    if kind == "sequence":
        loss = loss / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return loss.sum(), count


CORRECTIONS = {
    "none": "all weights are 1",
    "token_truncate": "each token's ratio, at most cap",
    "token_mask": "each token's ratio, 0 where it is above cap",
    "sequence_truncate": "the response's ratio, at most cap",
    "sequence_mask": "the response's ratio, 0 where it is above cap",
}
"""What `sampler_weights` knows."""


def sampler_weights(kind: str, logp: Tensor, sampler: Tensor, mask: Tensor, *, cap: float = 3.0) -> Tensor:
    """Weights for the loss of samples that were drawn by slightly other probabilities than training computes.

    `logp` (R, T) is what training found for the weights that sampled, `sampler` (R, T) what the sampler said. Constant,
    (R, T) for tokens, (R, 1) for responses. Raises ConfigError for an unknown kind.
    """
    if kind not in CORRECTIONS:
        raise ConfigError(unknown_name("sampler correction", kind, CORRECTIONS))
    if kind == "none":
        return torch.ones_like(logp)
    level, _, what = kind.partition("_")
    ratio = ratios("token" if level == "token" else "sequence_sum", logp.detach(), sampler, mask)
    return ratio.clamp(max=cap) if what == "truncate" else torch.where(ratio > cap, 0.0, ratio)


def best_of_n_kl(n: int) -> float:
    """KL of the best of n samples from one sample, in nats: log n - (n - 1) / n (2009.01325). Exact where no two
    answers score the same, else an upper bound (2401.01879)."""
    if n < 1:
        raise ConfigError(f"n must be at least 1, not {n}")
    return math.log(n) - (n - 1) / n


# Distillation


DISTILLATION_KINDS = {
    "forward": "KL(teacher || student) (1503.02531)",
    "reverse": "KL(student || teacher), which seeks a mode (2306.08543)",
    "jsd": "beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student (2306.13649)",
}
"""What `distillation_loss` knows."""


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    kind: str = "forward",
    beta: float = 0.5,
) -> Tensor:
    """How far a student's next token is from its teacher's, per position: logits (..., V) to (...).

    Logits are divided by `temperature`, and the loss is multiplied by its square, so that gradients keep their size
    (1503.02531). The teacher gets no gradient. Raises ConfigError for an unknown kind or a number out of range.
    """
    if kind not in DISTILLATION_KINDS:
        raise ConfigError(unknown_name("distillation", kind, DISTILLATION_KINDS))
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature must be a finite number above 0, not {temperature}")
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(precise) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().to(precise) / temperature, dim=-1)
    if kind == "forward":
        loss = _kl(teacher, student)
    elif kind == "reverse":
        loss = _kl(student, teacher)
    else:
        if not 0 < beta < 1:
            raise ConfigError(f"beta must be above 0 and below 1, not {beta}; its limits are 'forward' and 'reverse'")
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        loss = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    return loss * temperature**2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities (..., V)."""
    return (p.exp() * (p - q)).sum(dim=-1)
