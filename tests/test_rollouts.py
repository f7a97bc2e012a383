"""Rollouts: ids and log-probabilities that are those of a training forward, ends, bounds, and what is never drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_family_gemma3
import test_family_paligemma
import test_family_qwen_vl
import torch
from conftest import make_picture, make_tiny
from torch import Tensor, nn

from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import ConfigError, ContextOverflowError, ImageError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.inference.sampling import row_seed
from mm_gpt.inference.side_by_side import CompiledRows, TorchRows
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.loss import label_logprobs
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor, collate
from mm_gpt.training.rollouts import Sample, Sampler, draw, vision_ids

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
"""Log-probabilities in float32, in which sums of other order differ by 1e-6."""


def prompts_of(processor: Processor, images: Sequence[int] = (1, 0, 3), texts: Sequence[str] = ()) -> list[Document]:
    """Prompts of so many images each, of different lengths."""
    texts = texts or [f"A red circle{' on a blue ground' * n}?" for n in range(len(images))]
    return [
        processor.chat([{"role": "user", "content": [*(Image(make_picture(n + i)) for i in range(count)), text]}])
        for n, (count, text) in enumerate(zip(images, texts, strict=True))
    ]


@torch.no_grad()
def trainer_logprobs(
    model: MMGPT, processor: Processor, document: Document, ids: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Of a prompt's answer, read in one forward without a cache: (T,)."""
    example = processor(Document((*document.segments, Text("", ids=tuple(ids)))))
    batch = collate([[example]], processor.pixels([example]))
    logs = (model.decoder.logits(model(batch)[0]) / temperature).log_softmax(dim=-1)
    return logs[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def check(sampler: Sampler, documents: Sequence[Document], found: Sequence[Sequence[Sample]], **tolerance: Any) -> None:
    temperature = sampler.temperature or 1.0
    for document, own in zip(documents, found, strict=True):
        for sample in own:
            expected = trainer_logprobs(sampler.model, sampler.processor, document, sample.ids, temperature)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, **tolerance)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_are_those_of_a_training_forward(temperature: float, compiled: bool) -> None:
    """With a cache, padding, images and rows that end and leave; dropout and training mode would show."""
    model, processor = make_tiny()
    processor.tokenizer.end_ids = tuple(range(0, 400, 7))
    documents = prompts_of(processor)
    sampler = Sampler(model, processor, max_new_tokens=9, temperature=temperature, compiled=compiled)
    found = sampler(documents, 5, [1, 2, 3])
    check(sampler, documents, found, **EXACT)
    samples = [sample for own in found for sample in own]
    assert len(samples) == 15
    for sample in samples:
        ends = [id in processor.tokenizer.end_ids for id in sample.ids]
        assert len(sample.logprobs) == len(sample.ids) <= 9
        assert not any(ends[:-1])
        assert sample.finished == ends[-1]
        assert sample.finished or len(sample.ids) == 9
    if temperature:
        assert len({sample.ids for sample in samples}) > 10
        assert len({len(sample.ids) for sample in samples}) > 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@torch.no_grad()
def test_ids_are_those_of_a_naive_loop(temperature: float) -> None:
    """Prompts of different lengths side by side, with rows that end and leave: each as if it were alone."""
    model, processor = make_tiny()
    often = processor.tokenizer.end_ids = tuple(range(0, 400, 5))
    documents = prompts_of(processor)
    samples, longest, seeds = (4 if temperature else 1), 9, (7, 0, 7)
    expected: list[tuple[int, ...]] = []
    for document, seed in zip(documents, seeds, strict=True):
        for number in range(samples):
            numbers, ids = np.random.default_rng(row_seed(seed, number)).random(longest), []
            while len(ids) < longest and not (ids and ids[-1] in often):
                more = (Text("", ids=tuple(ids)),) if ids else ()
                example = processor(Document((*document.segments, *more)))
                hidden = model(collate([[example]], processor.pixels([example])))[0, -1]
                logits = model.decoder.logits(hidden).double()
                if temperature:
                    cumulated = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
                    ids.append(int((cumulated <= numbers[len(ids)]).sum()))
                else:
                    ids.append(int(logits.argmax()))
            expected.append(tuple(ids))
    for compiled in (False, True):
        sampler = Sampler(model, processor, max_new_tokens=longest, temperature=temperature, compiled=compiled)
        found = [sample.ids for own in sampler(documents, samples, seeds) for sample in own]
        assert found == expected
        if not temperature:
            warm = Sampler(model, processor, max_new_tokens=longest, temperature=2.0, compiled=compiled)
            assert warm(documents, samples, seeds, greedy=True) == sampler(documents, samples, seeds)
    if temperature:
        assert len(set(map(len, expected))) > 1
        assert len(set(expected)) > 6


FAMILIES: dict[str, Callable[[Path], Any]] = {
    "qwen2_vl": lambda folder: test_family_qwen_vl.make_theirs(folder, "qwen2_vl"),
    "qwen3_vl": lambda folder: test_family_qwen_vl.make_theirs(folder, "qwen3_vl"),
    "gemma3": test_family_gemma3.make_theirs,
    "paligemma": lambda folder: test_family_paligemma.make_theirs(folder, "gemma2", sliding_window=6),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_public_families(kind: str, tmp_path: Path) -> None:
    """Positions of rows and columns (M-RoPE), DeepStack, windows, images and prefixes that are read both ways."""
    made = FAMILIES[kind](tmp_path)
    model, processor = load_model(getattr(made, "folder", tmp_path))
    documents = prompts_of(processor, [1, 1, 1] if kind == "paligemma" else [1, 0, 2])
    drawn = []
    for compiled in (False, True):
        sampler = Sampler(model, processor, max_new_tokens=12, compiled=compiled)
        drawn.append(sampler(documents, 2, [1, 2, 3]))
        check(sampler, documents, drawn[-1], rtol=0, atol=1e-4 if kind == "gemma3" else 2e-5)
    assert [s.ids for own in drawn[0] for s in own] == [s.ids for own in drawn[1] for s in own]
    assert max(len(s.ids) for own in drawn[0] for s in own) > 4


def adapted(dropout: float = 0.5) -> tuple[MMGPT, Processor]:
    """A model in training, with low-rank updates that are not zero."""
    model, processor = make_tiny()
    model.add_lora(LoRAConfig(rank=2, alpha=4, dropout=dropout))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.3)
    return model.train(), processor


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_weights_that_change_are_seen(lora: bool, compiled: bool) -> None:
    """No prompt, no image and no copy of before is used again; norms, biases and updates change as matrices do."""
    model, processor = adapted() if lora else make_tiny()
    sampler = Sampler(model, processor, max_new_tokens=6, compiled=compiled)
    documents = prompts_of(processor)
    before = sampler(documents, 2, [1, 2, 3])
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.3)
        found = sampler(documents, 2, [1, 2, 3])
        model.eval()
        check(sampler, documents, found, **EXACT)
        model.train()
        assert found != before
        before = found
    assert sampler(documents, 2, [1, 2, 3]) == before


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_is_as_it_was(compiled: bool) -> None:
    """Without dropout while it samples; a part that was kept from training stays so, and gradients are none."""
    model, processor = adapted()
    assert model.vision is not None
    model.vision.eval()
    were = {name: module.training for name, module in model.named_modules()}
    sampler = Sampler(model, processor, max_new_tokens=4, compiled=compiled)
    documents = prompts_of(processor)
    assert sampler(documents, 2, [1, 2, 3]) == sampler(documents, 2, [1, 2, 3])
    assert {name: module.training for name, module in model.named_modules()} == were
    assert True in were.values()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ImageError):
        sampler([documents[0], Document((Image("there-is-none.png"),))], 1, [1, 2])
    assert {name: module.training for name, module in model.named_modules()} == were


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_under_autocast(lora: bool, compiled: bool) -> None:
    """Close to what training computes in bfloat16, whose casts of changed weights are not those of before, and which
    still learns afterwards."""
    model, processor = adapted(dropout=0.0) if lora else make_tiny()
    sampler = Sampler(model, processor, max_new_tokens=6, compiled=compiled)
    documents = prompts_of(processor)
    example = processor(documents[0])
    with torch.autocast("cpu", torch.bfloat16):
        sampler(documents, 4, [1, 2, 3])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.3)
        found = sampler(documents, 4, [1, 2, 3])
        gaps = [
            trainer_logprobs(model, processor, document, sample.ids) - torch.tensor(sample.logprobs)
            for document, own in zip(documents, found, strict=True)
            for sample in own
        ]
        model(collate([[example]], processor.pixels([example]))).sum().backward()
    assert torch.cat(gaps).abs().mean() < 0.1
    name = "decoder.blocks.0.mlp.down." + ("lora_b" if lora else "weight")
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    assert gradient.any()


def test_a_sample_depends_on_its_prompt_and_its_seed_alone() -> None:
    """Not on who is beside it, on how many there are, or on how much memory there is, bit by bit."""
    model, processor = make_tiny()
    sampler = Sampler(model, processor, max_new_tokens=7)
    documents = prompts_of(processor, (1, 0, 3, 2))
    found = sampler(documents, 5, [4, 5, 6, 7])
    assert found[1] == sampler(documents[1:2], 5, [5])[0]
    assert [own[:3] for own in found] == sampler(documents, 3, [4, 5, 6, 7])
    assert found[::-1] == sampler(documents[::-1], 5, [7, 6, 5, 4])
    assert found == Sampler(model, processor, max_new_tokens=7, max_tokens=1)(documents, 5, [4, 5, 6, 7])
    assert found != sampler(documents, 5, [5, 5, 6, 7])
    assert sampler([], 3, []) == []


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_side_by_side_are_bounded(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tokens of all rows, prompts included; a prompt whose samples are more than fit is read again."""
    model, processor = make_tiny()
    documents = prompts_of(processor, (0, 0, 0, 1))
    sizes: list[int] = []
    kind = CompiledRows if compiled else TorchRows
    plain = kind.step

    def step(self: Any, rows: Tensor, ids: Tensor) -> Tensor:
        sizes.append(len(rows))
        return plain(self, rows, ids)

    monkeypatch.setattr(kind, "step", step)
    longest = max(len(processor(document)) for document in documents) + 3
    sampler = Sampler(model, processor, max_new_tokens=3, max_tokens=4 * longest, compiled=compiled)
    found = sampler(documents, 6, [1, 2, 3, 4])
    check(sampler, documents, found, **EXACT)
    assert [len(own) for own in found] == [6] * 4
    assert len({sample.ids for own in found for sample in own}) > 15
    assert 4 <= max(sizes) <= 6


def test_blocks_are_given_back() -> None:
    """Also where it fails in the middle."""
    model, processor = make_tiny()
    sampler = Sampler(model, processor, max_new_tokens=5)
    documents = prompts_of(processor)
    sampler(documents, 4, [1, 2, 3])
    assert sampler._copy is not None
    sequences = sampler._copy.sequences
    assert sequences.blocks_in_use == 0
    with torch.no_grad():
        model.decoder.norm.weight.fill_(torch.nan)  # type: ignore[operator]
    for compiled in (True, False):
        sampler.compiled = compiled
        with pytest.raises(MMGPTError, match="no token can be drawn: logits are not finite"):
            sampler(documents, 4, [1, 2, 3])
    assert sequences.blocks_in_use == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_the_context_ends_for_each_prompt_by_itself(compiled: bool) -> None:
    model, processor = make_tiny()
    processor.tokenizer.end_ids = ()
    context = model.decoder.config.max_length
    documents = [Document((Text("", ids=tuple(range(1, 1 + size))),), id=str(size)) for size in (context - 3, 20)]
    sampler = Sampler(model, processor, max_new_tokens=5, compiled=compiled)
    found = sampler(documents, 2, [1, 2])
    check(sampler, documents, found, **EXACT)
    assert [len(sample.ids) for own in found for sample in own] == [3, 3, 5, 5]
    assert not any(sample.finished for own in found for sample in own)
    with pytest.raises(ContextOverflowError, match=r"prompt \(long\) has 256 tokens; the context holds 256"):
        sampler([Document((Text("", ids=(1,) * context),), id="long")], 1, [1])


def test_every_end_mark_ends() -> None:
    model, processor = make_tiny()
    processor.tokenizer.end_ids = (5, 9)
    with torch.no_grad():
        model.decoder.embedding.weight[[5, 9]] *= 3
    found = Sampler(model, processor, max_new_tokens=200)(prompts_of(processor), 10, [1, 2, 3])
    ends = {sample.ids[-1] for own in found for sample in own if sample.finished}
    assert ends == {5, 9}


@pytest.mark.parametrize("compiled", [False, True])
def test_what_stands_for_images_is_never_drawn(compiled: bool, tmp_path: Path) -> None:
    """10,000 tokens at temperature 2, of a model that wants to say nothing else. In the probabilities it counts, as in
    those that training computes."""
    test_family_qwen_vl.make_theirs(tmp_path, "qwen2_vl")
    model, processor = load_model(tmp_path)
    special = processor.tokenizer.special
    never = {special[f"<|{name}|>"] for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    assert set(vision_ids(processor)) == never
    processor.tokenizer.end_ids = ()
    with torch.no_grad():
        weight = model.decoder.head_weight
        weight.mul_(0.02)
        direction = model.decoder.norm.weight.sign()  # type: ignore[operator]
        weight[sorted(never)] += 0.3 * direction
    documents = prompts_of(processor, (1, 0))
    for temperature in (2.0, 0.0):
        n = 50 if temperature else 1
        sampler = Sampler(model, processor, max_new_tokens=100, temperature=temperature, compiled=compiled)
        found = sampler(documents, n, [1, 2])
        drawn = [id for own in found for sample in own for id in sample.ids]
        assert len(drawn) == 2 * n * 100
        assert not never & set(drawn)
    check(sampler, documents, found, **EXACT)


@torch.no_grad()
def test_tokens_come_as_often_as_the_model_says() -> None:
    model, processor = make_tiny()
    document = prompts_of(processor)[0]
    ((*found,),) = Sampler(model, processor, max_new_tokens=1, temperature=0.7)([document], 4000, [0])
    counts = torch.bincount(torch.tensor([sample.ids[0] for sample in found]), minlength=processor.vocab_size)
    example = processor(document)
    logits = model.decoder.logits(model(collate([[example]], processor.pixels([example])))[0, -1])
    likely = (logits / 0.7).softmax(dim=-1)
    spread = (likely * (1 - likely) / 4000).sqrt()
    assert ((counts / 4000 - likely).abs() < 5 * spread + 1e-3).all()


def test_large_vocabularies_are_summed_exactly() -> None:
    """By the sampler and by training: a sum in float32 that grows word by word loses 5e-6 of 49,152."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 16, 32, generator=generator)
    weight = torch.randn(49_152, 32, generator=generator) * 0.6
    logits = hidden[0] @ weight.T
    ids, logprobs = draw(logits, torch.rand(16, generator=generator).double(), 0.7, torch.tensor([3]))
    exact = (logits.double() / 0.7).log_softmax(dim=-1).gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=2e-6)
    trained, _ = label_logprobs(hidden, weight, ids[None], temperature=0.7)
    assert (trained[0] - exact).mean().abs() < 1e-6
    torch.testing.assert_close(trained[0].double(), exact, rtol=0, atol=4e-6)


@pytest.mark.parametrize("size", [1, 7, 256, 257, 600])
def test_a_draw_is_where_the_cumulated_probabilities_pass_a_number(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(40, size, generator=generator)
    uniform = torch.rand(40, generator=generator).double()
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    never = torch.tensor([0]) if size > 1 else torch.zeros(0, dtype=torch.long)
    ids, logprobs = draw(logits, uniform, 0.5, never)
    exact = (logits.double() / 0.5).softmax(dim=-1)
    torch.testing.assert_close(logprobs, exact.gather(1, ids[:, None]).squeeze(1).log(), atol=3e-6, rtol=0)
    exact[:, never] = 0
    cumulated = exact.cumsum(dim=-1) / exact.sum(dim=-1, keepdim=True)
    places = torch.searchsorted(cumulated, uniform[:, None], right=True).squeeze(1).clamp(max=size - 1)
    near = (cumulated - uniform[:, None]).abs().amin(dim=-1) < 1e-6
    assert torch.equal(ids[~near], places[~near])
    assert near.sum() <= 3 + 40 * (size == 1)
    assert not torch.isin(ids, never).any()
    likeliest, _ = draw(logits, None, 1.0, never)
    assert torch.equal(likeliest, exact.argmax(dim=-1))


def test_features_that_are_known_are_not_encoded_again() -> None:
    """And what is learned from them keeps its graph."""
    model, processor = make_tiny()
    documents = prompts_of(processor)
    examples = [processor(document) for document in documents]
    sampler = Sampler(model, processor, max_new_tokens=5)
    expected = sampler(documents, 3, [1, 2, 3])
    images = model.image_tokens(collate([[e] for e in examples], processor.pixels(examples)))
    processor.pixels = lambda examples: torch.zeros(0, 3, 1, 1)  # type: ignore[method-assign]
    assert model.vision is not None
    model.vision = nn.Identity()  # type: ignore[assignment]
    found = sampler(documents, 3, [1, 2, 3], images=images)
    assert [s.ids for own in found for s in own] == [s.ids for own in expected for s in own]
    assert images[0].tokens.requires_grad
    with pytest.raises(MMGPTError, match="features of 3 images came for prompts with 4"):
        sampler(documents, 3, [1, 2, 3], images=images[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_settings_have_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampler(*make_tiny(), **({"max_new_tokens": 4} | changes))


def test_seeds_are_one_a_prompt() -> None:
    model, processor = make_tiny()
    sampler = Sampler(model, processor, max_new_tokens=2)
    for n, seeds in ((0, [1, 2, 3]), (1, [1, 2]), (1, [1, 2, -3])):
        with pytest.raises(ConfigError, match="at least one sample, and a seed"):
            sampler(prompts_of(processor), n, seeds)
