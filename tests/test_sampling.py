"""The next token of each row: by its own settings, its own seed, and nothing of the rows beside it."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mm_gpt.errors import MMGPTError
from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.inference.sampling import Repeats, Sampler, candidates, choose, constrain, draw, logprobs_of, row_seed

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def probabilities(logits: Tensor, **options: Any) -> Tensor:
    """The distribution (V,) that is sampled from."""
    ids, weights = candidates(logits.numpy(), GenerationConfig(**({"temperature": 1.0} | options)))
    result = torch.zeros_like(logits)
    result[torch.from_numpy(ids)] = torch.from_numpy(weights / weights.sum(dtype=np.float64)).float()
    return result


def sampler(prompt: list[int] | Tensor = (), answer: list[int] = (), index: int = 0, **options: Any) -> Sampler:  # type: ignore[assignment]
    made = Sampler(GenerationConfig(**options), prompt, index)
    for id in answer:
        made.accept(id)
    return made


def adjusted(logits: Tensor, of: Sampler, mask: np.ndarray | None = None) -> Tensor:
    values = logits.clone()
    constrain(values, of, mask)
    return values


def one(logits: Tensor, of: Sampler, mask: np.ndarray | None = None) -> int:
    return int(choose(logits[None], [of], [mask]))


# ---- distributions ----


def test_probabilities_golden() -> None:
    plain = probabilities(LOGITS)
    torch.testing.assert_close(plain, LOGITS.softmax(-1))
    assert plain.tolist() == pytest.approx([0.5630, 0.2071, 0.1256, 0.0762, 0.0280], abs=1e-4)
    torch.testing.assert_close(probabilities(LOGITS, temperature=0.5), (LOGITS * 2).softmax(-1))
    assert probabilities(LOGITS, top_k=2).tolist() == pytest.approx([0.7311, 0.2689, 0, 0, 0], abs=1e-4)
    # 0.563 < 0.6 <= 0.770: the smallest set that reaches p has two tokens
    assert probabilities(LOGITS, top_p=0.6).tolist() == pytest.approx([0.7311, 0.2689, 0, 0, 0], abs=1e-4)
    assert probabilities(LOGITS, top_p=1e-9).tolist() == [1, 0, 0, 0, 0]
    # 0.2 of 0.563 is 0.113: three tokens are as likely
    kept = probabilities(LOGITS, min_p=0.2)
    assert kept.tolist() == pytest.approx([0.6285, 0.2312, 0.1402, 0, 0], abs=1e-4)


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30),
    st.floats(0.1, 5),
    st.integers(0, 40),
    st.floats(0.01, 1),
)
@settings(max_examples=100, deadline=None)
@example(values=[0.0, 1.1754943508222875e-38], temperature=1.0, top_k=0, top_p=0.25)
@example(values=[0.0, 1.0, 1.0, 1.1754943508222875e-38], temperature=1.0, top_k=3, top_p=1.0)
def test_probabilities_keep_the_top(values: list[float], temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.tensor(values)
    kept = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert kept.sum().item() == pytest.approx(1, abs=1e-5)
    full = (logits / temperature).softmax(-1)
    alive = kept > 0
    if top_k and top_k < len(values):
        assert int(alive.sum()) <= int((full >= full.sort().values[-top_k]).sum())
    assert full[alive].min() >= full[~alive].max() if (~alive).any() else True
    if not top_k or top_k >= len(values):
        assert full[alive].sum() >= top_p - 1e-5  # it reaches p,
        if alive.sum() > 1 and len(set(full.tolist())) == len(values):  # logits may differ and be as likely
            assert full[alive].sum() - full[alive].min() < top_p + 1e-5  # and with one token less it would not


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 40},
        {"top_k": 2999},
        {"top_p": 0.9},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"top_k": 100, "top_p": 0.8, "min_p": 0.02, "temperature": 1.7},
        {"temperature": 0.3, "top_p": 0.99},
    ],
)
def test_distributions_are_those_of_transformers(options: dict[str, Any], scale: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3000) * scale
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(options.get("temperature", 1.0)))])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    for row, expected in zip(logits, warpers(None, logits).softmax(-1), strict=True):
        found = probabilities(row, **options)
        differ = (found > 0) != (expected > 0)
        assert differ.sum() <= ("top_p" in options)  # the border of the nucleus, where float32 rounds its sum
        torch.testing.assert_close(found[~differ], expected[~differ], atol=2e-5, rtol=1e-3)


def test_a_large_vocabulary_has_the_same_nucleus() -> None:
    """It is looked for without a sort of everything: peaks, plateaus, and values that are all alike."""
    torch.manual_seed(1)
    for logits in (torch.randn(20_000) * 4, torch.randn(20_000) / 10, torch.randn(20_000).round(), torch.zeros(5000)):
        full = logits.double().softmax(-1)
        ordered = full.sort(descending=True).values
        for top_p in (0.1, 0.7, 0.999):
            size = int((ordered.cumsum(0) - ordered < top_p).sum())
            kept = probabilities(logits, top_p=top_p) > 0
            assert abs(int(kept.sum()) - int((full >= ordered[size - 1] * (1 - 1e-6)).sum())) <= 1


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_temperatures_at_the_limits(temperature: float) -> None:
    logits = torch.tensor([1e30, 1e30, -1e30, -math.inf, 5.0])
    found = probabilities(logits, temperature=temperature, top_p=0.9, top_k=4)
    assert found.tolist() == pytest.approx([0.5, 0.5, 0, 0, 0])
    near = torch.tensor([3.0, 2.0, -math.inf])
    assert probabilities(near, temperature=temperature).tolist() == pytest.approx(
        [1, 0, 0] if temperature < 1 else [0.5, 0.5, 0], abs=1e-5
    )


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(MMGPTError, match="not finite"):
        one(torch.full((5,), math.nan), sampler(temperature=1.0))


# ---- what changes logits ----


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5))
def test_exactly_what_would_repeat_a_run_is_named(ids: list[int], size: int) -> None:
    # Stops: an n-gram one too long or short, the last run missed, negative indices in short answers.
    def runs(tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]

    expected = {token for token in range(4) if runs([*ids, token])[-1:] and runs([*ids, token])[-1] in runs(ids)}

    def completed(size: int) -> set[int]:
        repeats = Repeats(size)
        for end in range(1, len(ids) + 1):
            repeats.add(ids[:end])
        return set(repeats.copy().completed_by(ids))

    assert completed(size) == expected
    assert completed(0) == set()


def test_repetition_penalty_is_that_of_transformers() -> None:
    """Of prompt and answer, once for each token however often it came; ids of images count for nothing."""
    torch.manual_seed(0)
    logits = torch.randn(50) * 3
    prompt, answer = [3, 3, 7, 20], [7, 9, 9, 9, 41]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + answer]), logits[None].clone())[0]
    made = sampler(torch.tensor([*prompt, 50, 99_999]), repetition_penalty=1.3)
    for id in answer:
        adjusted(logits, made)  # at each step, as it is called
        made.accept(id)
    torch.testing.assert_close(adjusted(logits, made), expected, rtol=0, atol=0)
    late = sampler(prompt, answer, repetition_penalty=1.3)
    torch.testing.assert_close(adjusted(logits, late), expected, rtol=0, atol=0)


def test_presence_and_frequency_penalties_by_hand() -> None:
    """vLLM's and OpenAI's rule: of the answer's tokens, after the repetition penalty of them and the prompt's."""
    made = sampler([1], [2, 2, 2, 0], presence_penalty=0.5, frequency_penalty=0.25)
    # 0: once, 0.5 + 0.25; 2: three times, 0.5 + 0.75; 1 is only the prompt's
    assert adjusted(LOGITS, made).tolist() == [1.25, 1.0, -0.75, 0.0, -1.0]
    made = sampler([1, 4], [2, 0], presence_penalty=0.5, repetition_penalty=2.0)
    assert adjusted(LOGITS, made).tolist() == [0.5, 0.5, -0.25, 0.0, -2.0]
    rewarded = sampler([], [2], presence_penalty=-2.0)
    assert adjusted(LOGITS, rewarded).tolist() == [2.0, 1.0, 2.5, 0.0, -1.0]


def test_bias_comes_before_penalties_as_in_transformers_and_vllm() -> None:
    bias = {1: 3.0, 4: -2.0}
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(id,): value for id, value in bias.items()}),
            RepetitionPenaltyLogitsProcessor(2.0),
        ]
    )
    expected = processors(torch.tensor([[1, 4]]), LOGITS[None].clone())[0]
    assert expected.tolist() == [2.0, 2.0, 0.5, 0.0, -6.0]
    made = sampler([1, 4], logit_bias=bias, repetition_penalty=2.0)
    assert adjusted(LOGITS, made).tolist() == expected.tolist()


def test_long_answers_are_counted_whole() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(500), torch.randint(0, 500, (1000,))
    made = sampler([], ids.tolist(), frequency_penalty=0.01, presence_penalty=0.1)
    counts = torch.bincount(ids, minlength=500)
    torch.testing.assert_close(adjusted(logits, made), logits - 0.01 * counts - 0.1 * (counts > 0))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_forbidden_runs_are_those_of_transformers(size: int) -> None:
    torch.manual_seed(size)
    logits, ids = torch.randn(6), torch.randint(0, 6, (5 if size == 1 else 12,)).tolist()
    expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor([ids]), logits[None].clone())[0]
    torch.testing.assert_close(adjusted(logits, sampler([], ids, no_repeat_ngram_size=size)), expected)


def test_a_grammar_outranks_what_would_repeat() -> None:
    """Stops: all tokens at minus infinity, and the first one taken, which the grammar forbids."""
    mask = np.array([False, False, True, False, False])
    for temperature in (0.0, 1.0):
        made = sampler([], [2], no_repeat_ngram_size=1, temperature=temperature)
        assert one(LOGITS, made, mask) == 2
        assert one(LOGITS, made, mask | np.array([False, False, False, True, False])) == 3


# ---- choosing ----


def test_each_row_has_its_own_settings() -> None:
    logits = torch.stack([LOGITS] * 5)
    samplers = [
        sampler(),
        sampler([], [0], presence_penalty=2.0),
        sampler(logit_bias={4: 50.0}, temperature=1.0),
        sampler(temperature=1.0, top_k=1),
        sampler(),
    ]
    masks = [None, None, None, None, np.array([False, False, False, True, True])]
    before = logits.clone()
    assert choose(logits, samplers, masks).tolist() == [0, 1, 4, 0, 3]
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_equal_logits_give_the_first() -> None:
    assert one(torch.zeros(7), sampler()) == 0


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 200}, {"min_p": 0.01, "repetition_penalty": 1.2}])
def test_a_draw_does_not_depend_on_the_rows_beside_it(options: dict[str, Any]) -> None:
    """Stops: one generator for all, the first row's settings for all, sums that depend on a batch's shape."""
    torch.manual_seed(0)
    logits = torch.randn(12, 7, 3000) * 2  # 12 steps, 7 rows

    def run(rows: list[int], others: dict[str, Any]) -> list[list[int]]:
        samplers = [sampler([5, 6], seed=n, temperature=0.9, **options) for n in rows]
        samplers += [sampler(seed=99, **others)]
        steps = []
        for step in logits:
            ids = choose(step[[*rows, 6]], samplers, [None] * len(samplers)).tolist()
            for made, id in zip(samplers, ids, strict=True):
                made.accept(id)
            steps.append(ids[:-1])
        return [list(ids) for ids in zip(*steps, strict=True)]

    together = run([0, 1, 2, 3, 4, 5], {"temperature": 1.5})
    assert together == [run([n], {})[0] for n in range(6)]
    assert len({tuple(ids) for ids in together}) == 6


def test_answers_to_one_prompt_have_different_seeds() -> None:
    assert row_seed(17, 0) == 17
    seeds = [row_seed(seed, index) for seed in (0, 1, 2, 2**63 - 1) for index in range(50)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    logits = torch.zeros(1000)
    drawn = [[one(logits, made) for _ in range(3)] for made in (sampler(index=n, temperature=1.0) for n in range(4))]
    assert len(set(map(tuple, drawn))) == 4


def test_prompts_do_not_share_their_draws() -> None:
    """Stops: the answers to many prompts end in one step, because all have drawn the same number."""
    logits = torch.zeros(1000)
    drawn = [one(logits, sampler([prompt], temperature=1.0)) for prompt in range(20)]
    assert len(set(drawn)) > 15
    assert drawn == [one(logits, sampler([prompt], temperature=1.0)) for prompt in range(20)]


def test_copies_draw_the_same_and_go_their_own_way() -> None:
    logits = torch.zeros(1000)
    first = sampler([1], [2, 3], temperature=1.0, repetition_penalty=1.5, no_repeat_ngram_size=1, frequency_penalty=1.0)
    one(logits, first)
    second = first.copy()
    assert [one(logits, first) for _ in range(5)] == [one(logits, second) for _ in range(5)]
    first.accept(7)
    untouched = sampler([1], [2, 3], repetition_penalty=1.5, no_repeat_ngram_size=1, frequency_penalty=1.0)
    ones = torch.ones(1000)
    torch.testing.assert_close(adjusted(ones, second), adjusted(ones, untouched))
    assert not torch.equal(adjusted(ones, first), adjusted(ones, second))


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}]
)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Pearson's chi-square: below the value that right draws exceed once in ten thousand runs."""
    logits = torch.tensor([1.0, -2.0, 0.5, 0.0, 2.0, -0.5, 1.5, -4.0])
    expected = probabilities(logits, **options)
    made = sampler(seed=3, **({"temperature": 1.0} | options))
    count = 6000
    drawn = torch.bincount(torch.tensor([one(logits, made) for _ in range(count)]), minlength=len(logits))
    alive = expected > 0
    assert drawn[~alive].sum() == 0
    chi_square = ((drawn - count * expected)[alive] ** 2 / (count * expected[alive])).sum()
    assert chi_square < {3: 21.1, 4: 23.5, 5: 25.7, 7: 29.9, 2: 18.4, 1: 15.1}[int(alive.sum()) - 1]


def test_a_draw_is_the_inverse_of_the_cumulative_weights() -> None:
    """In blocks as without; weights of zero are never drawn, not at the very ends either."""
    rng = np.random.default_rng(0)
    for size in (1, 2, 256, 257, 5000):
        weights = rng.random(size).astype(np.float32) ** 8
        weights[rng.random(size) < 0.3] = 0
        weights[size // 2] = 1
        cumulative = weights.cumsum(dtype=np.float64)
        for uniform in [0.0, 0.999999999999999, *rng.random(200)]:
            found = draw(weights, uniform)
            target = uniform * cumulative[-1]
            assert weights[found] > 0
            assert cumulative[found] >= target * (1 - 1e-12)
            assert cumulative[found] - weights[found] <= target * (1 + 1e-12)


# ---- log-probabilities ----


def test_log_probabilities_are_the_models_own() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 300) * 4
    ids = torch.randint(0, 300, (5,))
    chosen, top, top_ids = logprobs_of(logits, ids, 7)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(chosen.double(), expected.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(top.double(), expected.gather(1, top_ids), atol=1e-5, rtol=0)
    assert all((a >= b).all() for a, b in itertools.pairwise(top.T))
    alone = [logprobs_of(logits[n : n + 1], ids[n : n + 1], 7) for n in range(5)]
    for together, parts in zip((chosen, top, top_ids), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(parts), rtol=0, atol=0)


def test_more_log_probabilities_than_tokens() -> None:
    chosen, top, top_ids = logprobs_of(LOGITS[None].bfloat16(), torch.tensor([1]), 20)
    assert chosen.dtype == torch.float32
    assert top_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert top.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert logprobs_of(LOGITS[None], torch.tensor([1]), 0)[1].shape == (1, 0)
