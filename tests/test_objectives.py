"""Masked tokens, halves of a document, and translations as objectives."""

import math

import pytest
import torch

from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.processor import IGNORE_INDEX
from mm_gpt.training.objectives import (
    LanguageEmbedding,
    contrastive_segment_loss,
    mask_tokens,
    mean_state,
    translation_pairs,
)

MASK = 1000


def masked(ids: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    return mask_tokens(ids, mask_id=MASK, vocab_size=1000, generator=torch.Generator().manual_seed(3), **options)  # type: ignore[arg-type]


def test_the_number_of_masked_tokens_is_binomial() -> None:
    """Golden: mask rate binomial. Mean n·p and variance n·p·(1 - p) over rows; a fixed number a row has variance 0."""
    rows, length, rate = 4000, 100, 0.15
    _, labels = masked(torch.full((rows, length), 7))
    counts = (labels != IGNORE_INDEX).sum(dim=1).double()
    variance = length * rate * (1 - rate)
    assert counts.mean() == pytest.approx(length * rate, abs=4 * math.sqrt(variance / rows))
    assert counts.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / rows))


def test_eighty_ten_ten() -> None:
    """What is shown in place of those chosen, to four standard deviations; the rest is shown as it is."""
    ids = torch.randint(1000, (400, 500), generator=torch.Generator().manual_seed(0))
    shown, labels = masked(ids)
    chosen = labels != IGNORE_INDEX
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(shown[~chosen], ids[~chosen])
    count = int(chosen.sum())
    as_mask, as_it_is = shown[chosen] == MASK, shown[chosen] == ids[chosen]
    for share, expected in ((as_mask, 0.8), (as_it_is, 0.1 + 0.1 / 1000), (~as_mask & ~as_it_is, 0.1 * 0.999)):
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert share.double().mean() == pytest.approx(expected, abs=4 * deviation)
    others = shown[chosen][~as_mask & ~as_it_is]
    assert others.min() < 20
    assert 980 <= others.max() < 1000


def test_padding_is_never_chosen_and_a_generator_decides() -> None:
    ids = torch.arange(600).reshape(6, 100)
    maskable = torch.arange(100) < torch.tensor([[100], [50], [3], [1], [0], [100]])
    shown, labels = masked(ids, rate=1.0, maskable=maskable)
    assert torch.equal(labels != IGNORE_INDEX, maskable)
    assert torch.equal(shown[~maskable], ids[~maskable])
    again = masked(ids, rate=1.0, maskable=maskable)
    assert torch.equal(shown, again[0])
    assert (masked(ids, rate=0.0)[1] == IGNORE_INDEX).all()
    for rate in (-0.1, 1.5, math.nan):
        with pytest.raises(ConfigError, match="rate"):
            masked(ids, rate=rate)


def test_a_mean_state_knows_no_padding() -> None:
    hidden = torch.randn(2, 5, 3)
    present = torch.arange(5) < torch.tensor([[5], [2]])
    found = mean_state(hidden, present)
    torch.testing.assert_close(found[1], hidden[1, :2].mean(dim=0))
    torch.testing.assert_close(mean_state(hidden)[0], found[0])
    assert mean_state(hidden, torch.zeros(2, 5, dtype=torch.bool)).isfinite().all()


def test_halves_that_are_told_apart_and_halves_that_are_not() -> None:
    """Closed forms: B · ln(1 + (B - 1) e^(-1/t)) for orthogonal documents, B · ln B where all are alike."""
    b, temperature = 6, 0.5
    apart = torch.eye(b) * 3
    expected = b * math.log(1 + (b - 1) * math.exp(-1 / temperature))
    assert contrastive_segment_loss(apart, 2 * apart, temperature=temperature).item() == pytest.approx(
        expected, rel=1e-5
    )
    alike = torch.ones(b, 4)
    assert contrastive_segment_loss(alike, alike).item() == pytest.approx(b * math.log(b), rel=1e-5)
    wrong = contrastive_segment_loss(apart, apart.roll(1, dims=0), temperature=temperature)
    assert wrong > b * math.log(b)
    for bad in (0.0, math.nan):
        with pytest.raises(ConfigError, match="temperature"):
            contrastive_segment_loss(apart, apart, temperature=bad)


def test_positions_of_the_target_begin_again() -> None:
    """Golden: TLM target positions restart at 0, and each side has its language."""
    ids, positions, languages, present = translation_pairs(
        [[5, 6, 7], [8]], [[15, 16], [17, 18]], languages=(0, 3), separator=2, max_length=8, padding=9
    )
    assert ids.tolist() == [[5, 6, 7, 2, 15, 16, 2], [8, 2, 17, 18, 2, 9, 9]]
    assert positions[0].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert positions[1, :5].tolist() == [0, 1, 0, 1, 2]
    assert languages[0].tolist() == [0, 0, 0, 0, 3, 3, 3]
    assert present.tolist() == [[True] * 7, [True] * 5 + [False] * 2]
    with pytest.raises(ContextOverflowError, match="pair 0 has 7"):
        translation_pairs([[5, 6, 7]], [[15, 16]], languages=(0, 1), separator=2, max_length=6)
    with pytest.raises(MMGPTError, match="1 sentences, but 0"):
        translation_pairs([[5]], [], languages=(0, 1), separator=2, max_length=6)


def test_a_language_is_a_vector_that_is_added() -> None:
    embedding = LanguageEmbedding(2, 4)
    x = torch.randn(1, 3, 4)
    found = embedding(x, torch.tensor([[0, 1, 1]]))
    torch.testing.assert_close(found[0, 1] - x[0, 1], embedding.table.weight[1])
    torch.testing.assert_close(found[0, 0] - x[0, 0], embedding.table.weight[0])
    with pytest.raises(ConfigError, match="languages"):
        LanguageEmbedding(0, 4)


def test_a_pair_is_the_same_beside_a_longer_one() -> None:
    """Through a decoder: padding is not seen, and with equal ids only the language tells the two sides apart."""
    config = DecoderConfig(
        vocab_size=24, width=8, num_layers=2, num_heads=2, num_kv_heads=2, head_size=4, mlp_width=16,
        max_length=12, norm="layer", positions="learned", causal=False, init="magneto",
    )  # fmt: skip
    torch.manual_seed(0)
    decoder, embedding = Decoder(config), LanguageEmbedding(2, 8)

    def states(sources: list[list[int]], targets: list[list[int]], languages: tuple[int, int]) -> torch.Tensor:
        ids, positions, sides, present = translation_pairs(
            sources, targets, languages=languages, separator=21, max_length=12
        )
        return decoder(embedding(decoder.embed(ids), sides), positions, mask=present[:, None, None])

    alone = states([[1, 2]], [[3, 4]], (0, 1))
    beside = states([[1, 2], [1, 2, 3, 4]], [[3, 4], [1, 2, 3, 4, 5]], (0, 1))
    torch.testing.assert_close(alone[0], beside[0, :6], atol=1e-5, rtol=1e-5)
    twins = states([[1, 2]], [[1, 2]], (0, 0))
    torch.testing.assert_close(twins[0, :3], twins[0, 3:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(states([[1, 2]], [[1, 2]], (0, 1))[0, :3], twins[0, 3:], atol=1e-3)
