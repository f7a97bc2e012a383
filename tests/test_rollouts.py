"""Rollouts: ids and log-probabilities that are those of a training forward, ends, bounds, and what is never drawn."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import make_picture, make_tiny
from torch import Tensor

from mm_gpt.alignment.rollouts import Sample, Sampler
from mm_gpt.document import Document, Image, Text
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor, collate


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
    check(sampler, documents, found, rtol=0, atol=1e-5)
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
