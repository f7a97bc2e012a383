"""The multimodal model: what sees what, what is learned, and what is trained."""

import dataclasses
from typing import Any

import pytest
import torch
from conftest import make_picture, make_tiny, make_tokenizer, tiny_config
from torch import Tensor

from mm_gpt.document import Document, Image, Segment, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.model.lora import LoRAConfig, LoRALinear, add_lora, merge_lora
from mm_gpt.model.masks import attention_mask
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import IGNORE_INDEX, Batch, Example, Processor, ProcessorConfig, collate

FIELDS = ("image_rows", "image_grids", "image_tiles", "image_sizes", "pixel_values")
CONNECTORS = ["linear", "mlp", "pixel_shuffle", "resampler", "xconnector"]


@pytest.fixture(scope="module")
def shared() -> tuple[MMGPT, Processor]:
    """For tests that change nothing."""
    return make_tiny()


def picture(seed: int) -> Image:
    return Image(make_picture(seed))


def batch_of(processor: Processor, rows: list[list[Document]], **options: bool) -> Batch:
    examples = [[processor(document) for document in row] for row in rows]
    pixels = [processor.transform(i.load()) for row in examples for e in row for i in e.images]
    size = processor.config.image.size
    return collate(examples, torch.stack(pixels) if pixels else torch.zeros(0, 3, size, size), **options)


def hidden(model: MMGPT, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch)


def loss_of(model: MMGPT, batch: Batch) -> tuple[float, int]:
    with torch.no_grad():
        value, count = model.loss(batch)
    return value.item(), int(count)


# ---- images between words ----


@pytest.mark.parametrize("connector", CONNECTORS)
def test_an_image_changes_only_what_follows_it(connector: str) -> None:
    """An image spliced in at the wrong place, or the wrong image at the right one."""
    model, processor = make_tiny(connector=connector)
    parts: list[Segment] = [Text("first "), picture(1), Text(" then "), picture(2), picture(3), Text(" last")]
    base = batch_of(processor, [[Document(tuple(parts))]])
    starts = (base.input_ids[0] == processor.image_start_id).nonzero().flatten().tolist()
    before = hidden(model, base)[0]
    for index, position in enumerate((1, 3, 4)):
        changed = list(parts)
        changed[position] = picture(9)
        after = hidden(model, batch_of(processor, [[Document(tuple(changed))]]))[0]
        first = starts[index] + 1  # the mark before the image knows nothing of it yet
        assert torch.equal(before[:first], after[:first])
        assert (before[first:] != after[first:]).any(dim=-1).all()


@pytest.mark.parametrize("at", ["first", "last", "alone"])
def test_an_image_at_either_end(shared: tuple[MMGPT, Processor], at: str) -> None:
    """A batch whose only image ends the sequence gave NaN in a well-known toolkit."""
    model, processor = shared
    parts: dict[str, tuple[Segment, ...]] = {
        "first": (picture(1), Text("words")),
        "last": (Text("words"), picture(1)),
        "alone": (picture(1),),
    }
    batch = batch_of(processor, [[Document(parts[at])]])
    value, count = model.loss(batch)
    assert hidden(model, batch).isfinite().all()
    assert value.isfinite()
    assert int(count) == int((batch.labels != IGNORE_INDEX).sum())


def test_images_go_to_their_rows_in_order(shared: tuple[MMGPT, Processor]) -> None:
    """Rows with 2, 0, 1 and 3 images: each must give what it gives alone."""
    model, processor = shared
    numbers = [[1, 2], [], [3], [4, 5, 6]]
    documents = [Document((Text("see "), *(picture(n) for n in row), Text(" end"))) for row in numbers]
    together = batch_of(processor, [[d] for d in documents])
    embedded = model.embed(together).x
    for row, document in enumerate(documents):
        alone = model.embed(batch_of(processor, [[document]])).x[0]
        torch.testing.assert_close(embedded[row, : len(alone)], alone, rtol=0, atol=1e-5)


def test_image_marks_are_learned_embeddings(shared: tuple[MMGPT, Processor]) -> None:
    model, processor = shared
    batch = batch_of(processor, [[Document((Text("a"), picture(1)))]])
    embedded = model.embed(batch).x[0]
    assert torch.equal(embedded[batch.input_ids[0] == processor.image_start_id][0], model.image_marks[0])
    assert torch.equal(embedded[batch.input_ids[0] == processor.image_end_id][0], model.image_marks[1])


def test_a_mismatch_names_row_counts_and_id(shared: tuple[MMGPT, Processor]) -> None:
    model, processor = shared
    documents = [Document((picture(n), Text("x")), id=f"photo-{n}") for n in range(3)]
    batch = batch_of(processor, [[d] for d in documents])
    k = model.tokens_per_image
    two = {name: getattr(batch, name)[:2] for name in FIELDS}
    lost = dataclasses.replace(batch, **two)
    with pytest.raises(MMGPTError, match=rf"row 2 \(photo-2\): {k} image placeholders, but its images give 0 tokens"):
        model(lost)
    swapped = dataclasses.replace(batch, image_rows=torch.tensor([0, 0, 2]))  # the totals of the batch agree
    with pytest.raises(MMGPTError, match=rf"row 0 \(photo-0\): {k} image placeholders, .* give {2 * k} tokens"):
        model(swapped)
    cut = dataclasses.replace(batch, input_ids=batch.input_ids[:, 2:])
    with pytest.raises(MMGPTError, match=rf"row 0 .*: {k - 1} image placeholders, but its images give {k} tokens"):
        model(cut)
    with pytest.raises(MMGPTError, match="2 image tiles came for 3 places"):
        model(dataclasses.replace(batch, pixel_values=batch.pixel_values[:2]))
    text = batch_of(processor, [[Document((Text("x"),))]])
    one = {name: getattr(batch, name)[:1] for name in FIELDS}
    with pytest.raises(MMGPTError, match="row 0: 0 image placeholders"):
        model(dataclasses.replace(text, **one))


def test_a_decoder_by_name_must_be_given() -> None:
    tiny = tiny_config(400)
    with pytest.raises(MMGPTError, match="'smollm2-135m-instruct' must be loaded first"):
        MMGPT(ModelConfig(decoder="smollm2-135m-instruct", vision=tiny.vision, connector=tiny.connector))


def test_half_precision_model() -> None:
    """Pixels come in float32 whatever the weights are: on a GPU the model is bfloat16."""
    model, processor = make_tiny()
    batch = batch_of(processor, [[Document((picture(1), Text("a red circle")))]])
    exact = hidden(model, batch)
    rough = hidden(model.to(torch.bfloat16), batch)
    assert rough.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact, rough.float(), dim=-1).min() > 0.98


# ---- who sees whom ----


def noise_at(model: MMGPT, batch: Batch, where: Tensor) -> Tensor:
    """Hidden states with noise on the embeddings where `where` (B, T) is True."""
    with torch.no_grad():
        x = model.embed(batch).x
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        x = torch.where(where.unsqueeze(-1), x + noise, x)
        return model.decoder(x, batch.position_ids, mask=attention_mask(batch))


@pytest.mark.parametrize("disturbed", [1, 2, 3])
def test_packed_documents_do_not_see_each_other(shared: tuple[MMGPT, Processor], disturbed: int) -> None:
    """Resetting positions alone leaves the leak: noise in one document, bitwise silence in its neighbours."""
    model, processor = shared
    row = [
        Document((Text("one "), picture(1), Text("circle"))),
        Document((picture(2), Text("two dogs"), picture(3))),
        Document((Text("only words here"),)),
    ]
    batch = batch_of(processor, [row, [Document((Text("short"),))]])
    mine = batch.document_ids == disturbed
    mine[1] = False
    before, after = hidden(model, batch), noise_at(model, batch, mine)
    assert torch.equal(before[~mine], after[~mine])
    assert (before[mine] != after[mine]).any(dim=-1).all()


def test_branches_do_not_see_each_other(shared: tuple[MMGPT, Processor]) -> None:
    """Five captions of a photo: the second must not be copied from the first."""
    model, processor = shared
    document = processor.captions(picture(1), "Describe.", ["a red circle", "a blue dog", "words"])
    batch = batch_of(processor, [[document, Document((Text("neighbour"),))]])
    for number in (1, 2, 3):
        mine = batch.branch_ids == number
        before, after = hidden(model, batch), noise_at(model, batch, mine)
        assert torch.equal(before[~mine], after[~mine])
    trunk = (batch.document_ids == 1) & (batch.branch_ids == 0)
    after = noise_at(model, batch, trunk & (batch.position_ids == 0))
    assert (before != after).any(dim=-1)[batch.document_ids == 1].all()  # every branch sees the shared part
    assert torch.equal(before[batch.document_ids == 2], after[batch.document_ids == 2])


def test_packed_loss_equals_unpacked_loss(shared: tuple[MMGPT, Processor]) -> None:
    model, processor = shared
    documents = [
        Document((picture(1), Text("a red circle"))),
        processor.captions(picture(2), "Describe.", ["one", "two dogs", "three"]),
        Document((Text("only words"),)),
        processor.questions(picture(3), [("What?", "dog"), ("How many?", "3")]),
    ]
    packed = batch_of(processor, [documents[:3], documents[3:]], pad_left=False)
    value, count = loss_of(model, packed)
    alone = [loss_of(model, batch_of(processor, [[document]])) for document in documents]
    assert count == sum(c for _, c in alone)
    assert value / count == pytest.approx(sum(v for v, _ in alone) / count, abs=1e-5)


@pytest.mark.parametrize("kind", ["captions", "questions"])
def test_branches_have_the_loss_of_separate_documents(shared: tuple[MMGPT, Processor], kind: str) -> None:
    """One image for many captions is only an economy if nothing else changes."""
    model, processor = shared
    if kind == "captions":
        pairs = [("Describe.", "a red circle."), ("Describe.", "two dogs"), ("Describe.", "")]
        together = processor.captions(picture(2), "Describe.", [answer for _, answer in pairs])
    else:
        pairs = [("What is this?", "a circle"), ("Which colour has the ground?", "blue"), ("How many?", "12")]
        together = processor.questions(picture(2), pairs)
    value, count = loss_of(model, batch_of(processor, [[together]]))
    total, targets = 0.0, 0
    for question, answer in pairs:
        messages = [
            {"role": "user", "content": [picture(2), question]},
            {"role": "assistant", "content": answer},
        ]
        alone = loss_of(model, batch_of(processor, [[processor.chat(messages, answer_starts=False)]]))
        total, targets = total + alone[0], targets + alone[1]
    assert count == targets
    assert value / count == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("pad_left", [False, True])
def test_padding_changes_nothing(shared: tuple[MMGPT, Processor], pad_left: bool) -> None:
    model, processor = shared
    short, long = Document((picture(1), Text("cat"))), Document((Text("a long text " * 6), picture(2)))
    batch = batch_of(processor, [[short], [long]], pad_left=pad_left)
    alone = hidden(model, batch_of(processor, [[short]]))[0]
    padded = hidden(model, batch)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[0][batch.document_ids[0] > 0], alone, rtol=0, atol=2e-5)


def test_the_mask_is_left_out_where_it_says_nothing(shared: tuple[MMGPT, Processor]) -> None:
    _, processor = shared
    one = batch_of(processor, [[Document((Text("words"),))]])
    assert attention_mask(one) is None
    assert attention_mask(batch_of(processor, [[Document((Text("words"),))] * 2])) is not None
    assert attention_mask(batch_of(processor, [[processor.captions(picture(1), "x", ["y"])]])) is not None
    x = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5)[None]
    with torch.no_grad():
        decoder = shared[0].decoder
        causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
        expected = decoder(x, positions, mask=causal)
        torch.testing.assert_close(decoder(x, positions), expected, rtol=0, atol=1e-5)


PATTERNS: list[dict[str, Any]] = [
    {},
    {"attention": ("dense", "local"), "window": 3},
    {"attention": ("strided",), "stride": 3},
    {"attention": ("strided_heads", "fixed_heads"), "stride": 3, "summary": 1},
    {"attention": ("fixed",), "stride": 3, "summary": 1, "positions": "learned"},
    {"positions": "relative"},
    {"positions": "relative", "memory_length": 4},
]


@pytest.mark.parametrize("changes", PATTERNS, ids=str)
def test_padding_on_the_right_needs_no_mask(changes: dict[str, Any]) -> None:
    """Whole rows of different lengths, with the fast kernels: each is what it is alone, and gradients are finite."""
    tokenizer = make_tokenizer()
    decoder = dataclasses.replace(tiny_config(tokenizer.vocab_size).decoder, **changes)
    torch.manual_seed(0)
    model = MMGPT(ModelConfig(decoder=decoder)).eval()
    processor = Processor(tokenizer, ProcessorConfig(max_length=256), vocab_size=tokenizer.vocab_size)
    examples = [processor(Document((Text(text),))) for text in ("a", "a red circle " * 3, "one sentence, two")]
    none = torch.zeros(0, 3, 0, 0)
    batch = collate([[example] for example in examples], none, pad_to_multiple=8)
    assert attention_mask(batch) is None
    together, left = hidden(model, batch), collate([[example] for example in examples], none, pad_left=True)
    for row, example in enumerate(examples):
        alone = hidden(model, collate([[example]], none))[0]
        torch.testing.assert_close(together[row, : len(example)], alone, rtol=0, atol=2e-5)
        if "memory_length" not in changes:  # padding on the left moves the borders of segments
            torch.testing.assert_close(hidden(model, left)[row, -len(example) :], alone, rtol=0, atol=2e-5)
    model.loss(batch)[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pad_left", [False, True])
def test_a_prefix_is_read_in_both_directions(shared: tuple[MMGPT, Processor], pad_left: bool, window: int) -> None:
    """Token by token: packed documents with an image, with a second question behind the first answer, without any
    target, with nothing but targets; and padding."""
    _, processor = shared
    read = {"is_target": False}
    documents = [
        Document((picture(1), Text("what ", **read), Text("a circle"), Text(" then ", **read), Text("blue"))),
        Document((Text("only read", **read),)),
        Document((Text("only targets"),)),
    ]
    batch = batch_of(processor, [documents, documents[:1]], pad_left=pad_left)
    mask = attention_mask(batch, prefix_lm=True, window=window)
    assert mask is not None
    for row, (ids, labels) in enumerate(zip(batch.document_ids.tolist(), batch.labels.tolist(), strict=True)):
        for i, document in enumerate(ids):
            places = [at for at, other in enumerate(ids) if other == document]
            learned = [at for at in places if labels[at] != IGNORE_INDEX]
            prefix_end = learned[0] if learned else places[-1]  # what a label names stands one place further
            for j in range(len(ids)):
                together = i <= prefix_end and j <= prefix_end
                back = j <= i and (window is None or i - j < window)
                assert bool(mask[row, 0, i, j]) == (ids[j] == document and (together or back)), (row, i, j)


# ---- loss ----


def test_loss_is_the_plain_cross_entropy(shared: tuple[MMGPT, Processor]) -> None:
    model, processor = shared
    batch = batch_of(processor, [[Document((picture(1), Text("a red circle")))], [Document((Text("words"),))]])
    value, count = loss_of(model, batch)
    with torch.no_grad():
        logits = model.decoder.logits(model(batch))
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert count == int((batch.labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize(
    "documents",
    [[Document((Text("only words"),))], [Document((Text("x", is_target=False), picture(1)))], [Document((Text("a"),))]],
    ids=["no image", "no target", "neither"],
)
def test_a_batch_without_image_or_target_trains(documents: list[Document]) -> None:
    """0/0, or a backward pass without a graph."""
    model, processor = make_tiny()
    value, count = model.loss(batch_of(processor, [documents]))
    assert value.isfinite()
    value.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    if int(count) == 0:
        assert not any(g.any() for g in gradients)


def test_no_gradient_from_what_is_only_read() -> None:
    """Instruction tokens are context: the table's rows of unlearned, unread words stay without gradient."""
    model, processor = make_tiny()
    model.decoder.embedding.requires_grad_(False)
    document = Document((picture(1), Text("question", is_target=False), Text(" answer")))
    batch = batch_of(processor, [[document]])
    states = model(batch)
    states.retain_grad()
    from mm_gpt.model.loss import next_token_loss

    next_token_loss(states, model.decoder.head_weight, batch.labels)[0].backward()
    assert states.grad is not None
    assert torch.equal(states.grad[0].any(dim=-1), batch.labels[0] != IGNORE_INDEX)


# ---- what is trained ----


def gradient_names(model: MMGPT, processor: Processor) -> set[str]:
    batch = batch_of(processor, [[Document((picture(1), Text("a red circle")))]])
    model.train()
    model.loss(batch)[0].backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def tiny_with_lora(**changes: float) -> tuple[MMGPT, Processor]:
    model, processor = make_tiny()
    config = dataclasses.replace(model.config, lora=LoRAConfig(**({"rank": 4, "alpha": 8} | changes)))  # type: ignore[arg-type]
    torch.manual_seed(1)
    return MMGPT(config, model.decoder).eval(), processor


def randomise_lora(model: MMGPT) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))


def test_lora_starts_as_nothing() -> None:
    plain, processor = make_tiny()
    ids = processor(Document((Text("a red circle on a blue ground"),)))
    before = hidden(plain, batch_of_examples([ids]))
    add_lora(plain.decoder.blocks, LoRAConfig(rank=4, alpha=8))
    assert torch.equal(hidden(plain, batch_of_examples([ids])), before)


def batch_of_examples(examples: list[Example]) -> Batch:
    return collate([examples], torch.zeros(0, 3, 32, 32))


def test_merged_lora_is_the_same_model() -> None:
    model, processor = tiny_with_lora()
    batch = batch_of(processor, [[Document((picture(1), Text("a red circle")))]])
    start = hidden(model, batch)
    randomise_lora(model)
    adapted = hidden(model, batch)
    assert (adapted - start).abs().max() > 0.05
    merge_lora(model.decoder)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    torch.testing.assert_close(hidden(model, batch), adapted, rtol=0, atol=2e-5)


def test_lora_is_on_every_linear_layer_and_scaled() -> None:
    model, _ = tiny_with_lora(rank=4, alpha=12)
    layers = [m for m in model.decoder.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 4 * 3
    assert {layer.scale for layer in layers} == {3.0}


def test_only_the_update_of_a_frozen_decoder_is_trained() -> None:
    model, processor = tiny_with_lora()
    names = gradient_names(model, processor)
    decoder = {name for name in names if name.startswith("decoder.")}
    assert decoder
    assert all(".lora_b" in name for name in decoder)  # lora_a gets its first gradient once lora_b is not zero
    randomise_lora(model)
    model.zero_grad()
    names = gradient_names(model, processor)
    assert {n for n in names if n.startswith("decoder.")} == {
        n for n, _ in model.named_parameters() if n.startswith("decoder.") and ".lora_" in n
    }
    assert any(name.startswith("connector.") for name in names)
    assert "image_marks" in names


def test_lora_dropout_only_in_training() -> None:
    model, processor = tiny_with_lora(dropout=0.5)
    randomise_lora(model)
    batch = batch_of(processor, [[Document((Text("a red circle"),))]])
    assert torch.equal(hidden(model.eval(), batch), hidden(model, batch))
    model.train()
    assert not torch.equal(hidden(model, batch), hidden(model, batch))


@pytest.mark.parametrize("num_blocks", [0, 1, 2])
def test_exactly_the_last_vision_blocks_are_trained(num_blocks: int) -> None:
    """A released loop set requires_grad to True and then, always, to False."""
    model, processor = make_tiny()
    model.vision.unfreeze(num_blocks)
    names = {n.removeprefix("vision.") for n in gradient_names(model, processor) if n.startswith("vision.")}
    blocks = sorted({n.split("blocks.")[1].split(".")[0] for n, _ in model.vision.named_parameters() if "blocks." in n})
    expected = blocks[len(blocks) - num_blocks :]
    assert {n.split("blocks.")[1].split(".")[0] for n in names} == set(expected)
