"""MetaLM: spans read in both directions, and learned from none of their states."""

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.loss import next_token_loss
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.semicausal import SemiCausalConfig, SemiCausalLM, outside_labels, sample_spans
from mm_gpt.processor import IGNORE_INDEX, Batch

VOCAB = 50
SPANS = [[(3, 7), (10, 12)], [(1, 4)]]


def decoder_config(**changes: Any) -> DecoderConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_size": 8,
        "mlp_width": 64,
        "max_length": 64,
        "norm": "layer",
        "norm_place": "post",
        "gated_mlp": False,
        "activation": "gelu",
        "positions": "sinusoidal",
        "residual_scale": 2**0.5,
        "init": "deepnorm",
    }
    return DecoderConfig(**(values | changes))


def make_model(*, encoder_layers: int = 3) -> SemiCausalLM:
    torch.manual_seed(0)
    encoder = decoder_config(width=24, head_size=6, num_layers=encoder_layers, causal=False)
    return SemiCausalLM(SemiCausalConfig(decoder=decoder_config(), encoder=encoder)).eval()


@pytest.fixture(scope="module")
def model() -> SemiCausalLM:
    """For tests that change nothing."""
    return make_model()


def make_batch(*rows: list[int], seed: int = 0) -> Batch:
    """Random text; a row is the lengths of its documents, and 0s for as many tokens of padding."""
    generator = torch.Generator().manual_seed(seed)
    documents, positions, labels, ids = [], [], [], []
    for lengths in rows:
        row = [(n, i) for n, length in enumerate(lengths, start=1) for i in range(length)]
        row += [(0, 0)] * lengths.count(0)
        own = torch.randint(0, VOCAB, (len(row),), generator=generator).tolist()
        documents.append([n for n, _ in row])
        positions.append([i for _, i in row])
        next_document = [n for n, _ in row[1:]] + [0]
        labels.append(
            [
                own[t + 1] if n and n == after else IGNORE_INDEX
                for t, ((n, _), after) in enumerate(zip(row, next_document, strict=True))
            ]
        )
        ids.append(own)
    none = torch.zeros(0, dtype=torch.long)
    return Batch(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        position_ids=torch.tensor(positions),
        document_ids=torch.tensor(documents),
        branch_ids=torch.zeros(len(ids), len(ids[0]), dtype=torch.long),
        image_rows=none,
        image_grids=none.view(0, 2),
        image_tiles=none,
        image_sizes=none.view(0, 2),
        pixel_values=torch.zeros(0, 3, 0, 0),
    )


def with_token(batch: Batch, row: int, place: int) -> Batch:
    """The same batch, another token at one place; labels as they would then be."""
    ids, labels = batch.input_ids.clone(), batch.labels.clone()
    ids[row, place] = (ids[row, place] + 1) % VOCAB
    if place and labels[row, place - 1] != IGNORE_INDEX:
        labels[row, place - 1] = ids[row, place]
    return dataclasses.replace(batch, input_ids=ids, labels=labels)


def losses(model: SemiCausalLM, batch: Batch, spans: list[list[tuple[int, int]]]) -> Tensor:
    """(B, T), 0 where nothing is learned."""
    with torch.no_grad():
        logits = model.decoder.logits(model(batch, spans)).transpose(1, 2)
    labels = outside_labels(batch.labels, spans)
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


def changed(before: Tensor, after: Tensor) -> list[bool]:
    return (before != after).any(dim=-1).tolist()


# ---- what sees what ----


def test_a_span_is_read_in_both_directions_and_seen_by_nothing_before_it(model: SemiCausalLM) -> None:
    batch = make_batch([16], [16])
    other = with_token(batch, 0, 6)  # the last token of [3, 7)
    with torch.no_grad():
        before, after = model.encode(batch, SPANS), model.encode(other, SPANS)
        assert changed(before, after) == [True] * 4 + [False] * 5  # all of its span, no other span
        before, after = model(batch, SPANS), model(other, SPANS)
    assert changed(before[0], after[0]) == [False] * 3 + [True] * 13
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("place", [2, 8, 12])
def test_tokens_between_spans_are_causal(model: SemiCausalLM, place: int) -> None:
    batch = make_batch([16], [16])
    with torch.no_grad():
        before, after = model(batch, SPANS)[0], model(with_token(batch, 0, place), SPANS)[0]
    assert changed(before, after) == [t >= place for t in range(16)]


def test_a_span_is_the_same_alone_and_in_a_batch(model: SemiCausalLM) -> None:
    """Padding of shorter spans, and the order of rows and spans."""
    batch = make_batch([16], [16])
    with torch.no_grad():
        together = model.encode(batch, SPANS).split([4, 2, 3])
        alone = [model.encode(batch, spans) for spans in ([[(3, 7)], []], [[(10, 12)], []], [[], [(1, 4)]])]
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        x = model.embed(batch, [[(10, 12), (3, 7)], [(1, 4)]])  # the order in which spans are named says nothing
        torch.testing.assert_close(x[0, 3:7], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(x[0, 10:12], alone[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(x[1, 1:4], alone[2], rtol=0, atol=1e-5)
        outside = torch.ones(2, 16, dtype=torch.bool)
        outside[0, 3:7] = outside[0, 10:12] = outside[1, 1:4] = False
        assert torch.equal(x[outside], model.decoder.embed(batch.input_ids)[outside])


# ---- what is learned ----


def test_no_token_of_a_span_is_learned_and_the_one_after_it_is() -> None:
    """KOSMOS-2's code has a branch that silences [start, end - 1) of the targets only: the state of the last but one
    token, which was made of the last one too, would learn it."""
    batch = make_batch([16])
    labels = outside_labels(batch.labels, [[(3, 7), (10, 12)]])[0]
    ids = batch.input_ids[0].tolist()
    learned = [t for t in range(16) if labels[t] != IGNORE_INDEX]
    assert learned == [0, 1, 6, 7, 8, 11, 12, 13, 14]  # not 2–5, which would learn 3–6, nor 9 and 10
    assert [labels[t].item() for t in learned] == [ids[t + 1] for t in learned]
    assert (outside_labels(batch.labels, [[(0, 4)]])[0] != IGNORE_INDEX).nonzero().flatten().tolist() == [*range(3, 15)]
    assert (outside_labels(batch.labels, [[(12, 16)]])[0] != IGNORE_INDEX).sum() == 11
    touching = outside_labels(batch.labels, [[(3, 5), (5, 8)]])[0]
    assert (touching != IGNORE_INDEX).nonzero().flatten().tolist() == [0, 1, *range(7, 15)]


def test_the_last_token_of_a_span_counts_only_for_what_follows(model: SemiCausalLM) -> None:
    """Were it learned anywhere, or seen by what is learned before it, a loss up to position 5 would change."""
    batch = make_batch([16])
    spans = [[(3, 7), (10, 12)]]
    before, after = losses(model, batch, spans)[0], losses(model, with_token(batch, 0, 6), spans)[0]
    assert torch.equal(before[:6], after[:6])
    assert before[:2].all()
    assert (before != after).nonzero().flatten().tolist() == [6, 7, 8, 11, 12, 13, 14]


def test_states_before_a_target_in_a_span_get_no_gradient() -> None:
    model = make_model()
    batch = make_batch([16], [16])
    hidden = model(batch, SPANS)
    hidden.retain_grad()
    next_token_loss(hidden, model.decoder.head_weight, outside_labels(batch.labels, SPANS))[0].backward()
    assert hidden.grad is not None
    learned = hidden.grad.any(dim=-1)
    assert learned[0].nonzero().flatten().tolist() == [0, 1, 6, 7, 8, 11, 12, 13, 14]
    assert learned[1].nonzero().flatten().tolist() == [3, *range(4, 15)]


def test_loss_is_the_plain_cross_entropy(model: SemiCausalLM) -> None:
    batch = make_batch([9, 7], [16])
    with torch.no_grad():
        value, count = model.loss(batch, SPANS[1:] * 2)
    assert int(count) == (8 + 6 - 3) + (15 - 3)
    assert value.item() == pytest.approx(losses(model, batch, SPANS[1:] * 2).sum().item(), rel=1e-6)


def test_without_spans_it_is_the_plain_language_model(model: SemiCausalLM) -> None:
    batch = make_batch([16], [9, 7])
    plain = MMGPT(ModelConfig(decoder=model.config.decoder), model.decoder).eval()
    with torch.no_grad():
        assert torch.equal(model(batch, [[], []]), plain(batch))
        assert torch.equal(model.decoder.logits(model(batch, [[], []])), plain.decoder.logits(plain(batch)))
        value, count = model.loss(batch, [[], []])
        expected, expected_count = plain.loss(batch)
    assert torch.equal(value, expected)
    assert count == expected_count


# ---- packed rows ----


def test_packed_documents(model: SemiCausalLM) -> None:
    """A span of one document is silence for its neighbours, and the loss is that of the documents alone."""
    batch = make_batch([8, 12, 0, 0])
    spans = [[(2, 6), (10, 13), (17, 20)]]
    before, after = losses(model, batch, spans)[0], losses(model, with_token(batch, 0, 3), spans)[0]
    assert torch.equal(before[8:], after[8:])
    assert before[5] != after[5]
    total = 0.0
    for first, last, own in ((0, 8, [(2, 6)]), (8, 20, [(2, 5), (9, 12)])):
        columns = ("input_ids", "labels", "position_ids", "document_ids", "branch_ids")
        alone = dataclasses.replace(batch, **{name: getattr(batch, name)[:, first:last] for name in columns})
        total += losses(model, alone, [own]).sum().item()
    assert before.sum().item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[(2, 5), (4, 6)], []], r"row 0: span \[4, 6\) overlaps"),
        ([[], [(3, 3)]], r"row 1: span \[3, 3\) is empty or outside of the 12 tokens"),
        ([[], [(10, 13)]], r"row 1: span \[10, 13\) is empty or outside"),
        ([[(-2, 3)], []], r"row 0: span \[-2, 3\) is empty or outside"),
        ([[(6, 9)], []], r"row 0: span \[6, 9\) crosses documents"),
        ([[], [(10, 12)]], r"row 1: span \[10, 12\) .* is padding"),
        ([[], [(8, 11)]], r"row 1: span \[8, 11\) crosses documents"),
        ([[]], "spans of 1 rows came for 2 rows"),
    ],
)
def test_spans_that_cannot_be(model: SemiCausalLM, spans: list[list[tuple[int, int]]], message: str) -> None:
    with pytest.raises(MMGPTError, match=message):
        model(make_batch([8, 4], [10, 0, 0]), spans)


def test_a_span_longer_than_the_encoder_reads() -> None:
    config = make_model().config
    short = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, max_length=3))
    with pytest.raises(ContextOverflowError, match="4 tokens do not fit into the model's context of 3"):
        SemiCausalLM(short)(make_batch([16]), [[(3, 7)]])


def test_impossible_configs() -> None:
    causal, encoder = decoder_config(), decoder_config(causal=False)
    with pytest.raises(ConfigError, match="must be causal"):
        SemiCausalConfig(decoder=causal, encoder=causal)
    with pytest.raises(ConfigError, match="must be causal"):
        SemiCausalConfig(decoder=encoder, encoder=encoder)
    with pytest.raises(ConfigError, match="vocab_size 51 is not the decoder's 50"):
        SemiCausalConfig(decoder=causal, encoder=dataclasses.replace(encoder, vocab_size=51))


# ---- what is trained ----


@pytest.mark.parametrize("train_last", [0, 1, 2])
def test_exactly_the_last_encoder_blocks_are_trained(train_last: int) -> None:
    model = make_model(encoder_layers=3)
    model.freeze_encoder(train_last=train_last)
    model.train().loss(make_batch([16], [16]), SPANS)[0].backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    encoder = {name.split(".")[2] for name in names if name.startswith("encoder.")}
    assert encoder == {str(n) for n in range(3 - train_last, 3)}
    assert not any("encoder.embedding" in name for name in names)
    expected = {n for n, _ in model.named_parameters() if n.startswith(("decoder.", "connector."))}
    # A key's bias is the same for all keys of a query, and softmax forgets it: the fused bias still has q's and v's.
    assert {n for n in names if not n.startswith("encoder.")} == expected
    with pytest.raises(ConfigError, match="cannot train the last 4 blocks: the encoder has 3"):
        model.freeze_encoder(train_last=4)


def test_without_spans_nothing_of_the_encoder_is_trained() -> None:
    model = make_model()
    model.loss(make_batch([16]), [[]])[0].backward()
    assert all(p.grad is None for p in [*model.encoder.parameters(), *model.connector.parameters()])


# ---- which spans ----


def draw(seed: int, length: int = 2048, **options: Any) -> list[tuple[int, int]]:
    return sample_spans(length, generator=torch.Generator().manual_seed(seed), **options)


def test_spans_are_a_quarter_of_the_text() -> None:
    """MetaLM's: 64 to 128 tokens each, 25 % in all, and not always the same."""
    seen = torch.zeros(2048)
    for seed in range(200):
        spans = draw(seed)
        assert spans == sorted(spans)
        assert sum(end - start for start, end in spans) == 512
        assert all(64 <= end - start <= 128 for start, end in spans)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
        for start, end in spans:
            seen[start:end] += 1
    assert draw(0) == draw(0) != draw(1)
    # Away from both ends, where fewer spans can lie, every part of the text is in a span as often.
    parts = seen[128:-128].view(7, -1).mean(dim=1) / 200
    assert parts.min() > 0.2
    assert parts.max() < 0.32


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    padding=st.integers(0, 20),
    bounds=st.tuples(st.integers(1, 12), st.integers(0, 12)),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 1000),
)
def test_spans_lie_in_documents(
    lengths: list[int], padding: int, bounds: tuple[int, int], share: float, seed: int
) -> None:
    shortest, longest = bounds[0], bounds[0] + bounds[1]
    ids = [n for n, length in enumerate(lengths, start=1) for _ in range(length)] + [0] * padding
    options: dict[str, Any] = {"shortest": shortest, "longest": longest, "share": share}
    spans = draw(seed, len(ids), document_ids=ids, **options)
    last = 0
    for start, end in spans:
        assert last <= start
        assert shortest <= end - start <= longest
        assert len(set(ids[start:end])) == 1
        assert ids[start] != 0
        last = end
    assert sum(end - start for start, end in spans) <= share * sum(lengths)


def test_texts_too_short_for_a_span_have_none() -> None:
    assert draw(0, 255) == []
    assert len(draw(0, 256)) == 1
    assert draw(0, 0) == []
    assert draw(0, 2048, share=0.0) == []
    assert draw(0, 600, document_ids=[n for n in range(1, 11) for _ in range(60)]) == []  # 60 < 64 each


@pytest.mark.parametrize(("options", "message"), [({"shortest": 0}, "shortest"), ({"share": 1.0}, "share")])
def test_impossible_samples(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(0, **options)
    with pytest.raises(MMGPTError, match="document_ids of 3 tokens came for 4"):
        draw(0, 4, document_ids=[1, 1, 1])


def test_sampled_spans_are_accepted(model: SemiCausalLM) -> None:
    batch = make_batch([20, 30, 10, 0, 0])
    ids = batch.document_ids[0].tolist()
    spans = [draw(0, len(ids), document_ids=ids, shortest=3, longest=6)]
    value, count = model.loss(batch, spans)
    assert value.isfinite()
    assert 0 < int(count) < 57
