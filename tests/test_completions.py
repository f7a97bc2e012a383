"""Completions in numbers: what is learned of them, their log-probabilities, and the reference policy."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_picture, make_tiny

from mm_gpt.alignment.completions import (
    completion_batch,
    completion_lengths,
    completion_sums,
    completions_document,
    last_positions,
    logprobs_and_entropy,
    prompt_document,
    sampled_document,
    token_logprobs,
    token_values,
)
from mm_gpt.alignment.reference import Reference
from mm_gpt.datasets.comparisons import Comparison, Completion
from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.loss import CHUNK, label_logprobs
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import IGNORE_INDEX, Batch, Processor, collate
from mm_gpt.templates.chat_template import ChatTemplate


def said(text: str) -> Completion:
    return Completion(({"role": "assistant", "content": [text]},))


def asked(text: str, *answers: str, seed: int | None = 0, key: str = "a") -> Comparison:
    image = [] if seed is None else [Image(make_picture(seed))]
    return Comparison(key, ({"role": "user", "content": [*image, text]},), tuple(map(said, answers)))


# ---- log-probabilities ----


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_label_logprobs_are_those_of_the_logits(softcap: float | None, temperature: float) -> None:
    """Values, entropy and both gradients against plain autograd, over more rows than a chunk."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, CHUNK // 2, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, CHUNK // 2), generator=generator)
    labels[0, :5] = IGNORE_INDEX
    scale = torch.randn(3, CHUNK // 2, generator=generator, dtype=torch.float64)
    grads = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            logprobs, entropy = label_logprobs(h, w, labels, softcap=softcap, temperature=temperature)
            assert not entropy.requires_grad
        else:
            logits = h @ w.T
            logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
            logs = logits.log_softmax(dim=-1)
            known = labels != IGNORE_INDEX
            plain = logs.gather(2, labels.clamp_min(0)[..., None])[..., 0].where(known, 0)
            torch.testing.assert_close(logprobs, plain)
            torch.testing.assert_close(entropy, (-(logs.exp() * logs).sum(-1)).where(known, 0))
            logprobs = plain
        (logprobs * scale).sum().backward()
        grads.append((h.grad, w.grad))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def plain_sum(model: MMGPT, processor: Processor, document: Document) -> float:
    """The log-probability of a document's targets, alone in a batch."""
    example = processor(document)
    hidden = model(collate([[example]], processor.pixels([example])))
    logs = F.log_softmax(model.decoder.logits(hidden)[0], dim=-1)
    known = (example.labels != IGNORE_INDEX).nonzero()[:, 0]
    return float(logs[known, example.labels[known]].sum().detach())


def test_completions_are_scored_as_if_they_were_alone() -> None:
    """Branches of different prompts, with and without images, in one padded batch, or each a row of its own."""
    model, processor = make_tiny()
    model.eval()
    comparisons = [
        asked("What?", "red", "a blue circle on red", "red blue", key="a"),
        asked("Which one is it, of those that you see?", "none", "both of them", seed=None, key="b"),
        asked("Describe the image in one sentence.", "A red circle.", seed=3, key="c"),
    ]
    documents = [completions_document(processor, c) for c in comparisons]
    expected = [
        plain_sum(model, processor, completions_document(processor, Comparison(c.key, c.prompt, (one,))))
        for c in comparisons
        for one in c.completions
    ]
    for separate, pad_left in ((False, False), (True, False), (False, True)):
        batch = completion_batch(processor, documents, separate=separate, pad_left=pad_left)
        assert batch.prompts.tolist() == [0, 0, 0, 1, 1, 2]
        assert len(batch.batch.input_ids) == (6 if separate else 3)
        with torch.no_grad():
            values = token_logprobs(model, batch.batch)
        torch.testing.assert_close(completion_sums(values, batch), torch.tensor(expected), atol=1e-4, rtol=1e-5)
        texts = [said for c in comparisons for said in c.completions]
        tokenizer = processor.tokenizer
        lengths = completion_lengths(batch)
        assert lengths.tolist() == [len(tokenizer.encode(t.text)) + 1 for t in texts]
        ends = batch.batch.input_ids[batch.rows, last_positions(batch)]
        assert set(ends.tolist()) <= set(tokenizer.end_ids)
        padded, mask = token_values(batch, values)
        assert mask.sum(dim=1).tolist() == lengths.tolist()
        torch.testing.assert_close(padded.sum(dim=1), completion_sums(values, batch))
        ids, _ = token_values(batch, batch.batch.labels.float())
        for own, inside, text in zip(ids.long(), mask, texts, strict=True):
            assert tokenizer.decode(own[inside][:-1].tolist()) == text.text


def test_sampled_ids_stay_as_they_were_sampled() -> None:
    """Ids that no text would be tokenised to; the prompt is that of the completions."""
    _, processor = make_tiny()
    comparison = asked("What?", "red")
    ids = processor.tokenizer.encode("r") + processor.tokenizer.encode("e") + processor.tokenizer.encode("d")
    assert ids != processor.tokenizer.encode("red")
    sampled = [(*ids, processor.tokenizer.end_ids[0]), tuple(ids[:1])]
    batch = completion_batch(processor, [sampled_document(processor, comparison, sampled)])
    labels, mask = token_values(batch, batch.batch.labels.float())
    assert [tuple(row[m].long().tolist()) for row, m in zip(labels, mask, strict=True)] == sampled
    prompt = processor(prompt_document(processor, comparison)).input_ids.tolist()
    assert batch.batch.input_ids[0].tolist()[: len(prompt) - 1] == prompt[:-1]
    written = completion_batch(processor, [completions_document(processor, comparison)])
    assert written.batch.input_ids[0].tolist()[: len(prompt)] == prompt


def test_text_is_continued_without_a_template() -> None:
    _, processor = make_tiny()
    comparison = Comparison("a", ({"role": "user", "content": ["A red"]},), (said(" circle."),), is_text=True)
    example = processor(completions_document(processor, comparison))
    assert processor.tokenizer.decode(example.input_ids.tolist()[:-1]) == "A red circle."
    learned = example.labels[example.labels != IGNORE_INDEX].tolist()
    assert learned == [*processor.tokenizer.encode(" circle."), processor.tokenizer.end_ids[0]]


def test_what_has_nothing_to_learn_is_refused() -> None:
    _, processor = make_tiny()
    with pytest.raises(MMGPTError, match="a: a prompt without completions"):
        completions_document(processor, asked("What?"))
    empty = Document((), ((Text("A", is_target=False),), (Text("A", is_target=False), Text("b"))), id="x")
    with pytest.raises(MMGPTError, match="x: a completion without a token"):
        completion_batch(processor, [empty])


def test_swapped_images_change_the_log_probabilities() -> None:
    model, processor = make_tiny()
    documents = [completions_document(processor, asked("What?", "red", "blue", seed=n)) for n in (0, 1)]
    batch = completion_batch(processor, documents)
    with torch.no_grad():
        before = token_logprobs(model.eval(), batch.batch)
        batch.batch.pixel_values = batch.batch.pixel_values.flip(0)
        after = token_logprobs(model, batch.batch)
    assert ((before - after).abs().amax(dim=1) > 1e-4).all()


# ---- answers that are read, not learned ----

WITH_GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
PLAIN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("source", [None, PLAIN, WITH_GENERATION])
def test_a_weight_of_0_leaves_an_answer_and_its_end_mark_out(source: str | None) -> None:
    _, plain = make_tiny()
    template = source and ChatTemplate(source, special={}, where="t", end_tokens=["<|im_end|>"])
    processor = Processor(plain.tokenizer, plain.config, vocab_size=plain.vocab_size, template=template or None)
    turns = [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 2, "abcd", strict=True)]

    def learned(*weights: object) -> str:
        own = [dict(turn) for turn in turns]
        own[1]["weight"], own[3]["weight"] = weights
        segments = processor.chat(own, answer_starts=False).segments
        return "|".join(s.text.strip() for s in segments if isinstance(s, Text) and s.is_target and s.text.strip())

    assert learned(1, 1).replace("|", "") == "b<im_end>d<im_end>"
    assert learned(0, 1).replace("|", "") == "d<im_end>"
    assert learned(1, 0).replace("|", "") == "b<im_end>"
    assert learned(0, 0) == ""
    with pytest.raises(MMGPTError, match="message 1 has weight 2"):
        learned(2, 1)


# ---- the reference ----


def loss_of(model: MMGPT, batch: Batch) -> torch.Tensor:
    return -token_logprobs(model, batch).sum()


@pytest.mark.parametrize("adapted", ["fresh", "trained", "full"])
def test_the_reference_is_the_model_before_training(adapted: str) -> None:
    """Bit for bit, with dropout in the policy; the policy is untouched by it, and gets no gradient from it."""
    model, processor = make_tiny()
    if adapted != "full":
        model.add_lora(LoRAConfig(rank=2, alpha=4, dropout=0.5))
        if adapted == "trained":
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
    batch = completion_batch(processor, [completions_document(processor, asked("What?", "red", "blue"))]).batch
    with torch.no_grad():
        start = token_logprobs(model.eval(), batch)
    reference = Reference(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    with reference.active():
        assert torch.equal(token_logprobs(model, batch), start)
    for _ in range(2):
        loss_of(model, batch).backward()
        optimizer.step()
    policy = [p.clone() for p in model.parameters()]
    with reference.active():
        found = token_logprobs(model, batch)
    assert torch.equal(found, start)
    assert not found.requires_grad
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(policy, model.parameters(), strict=True))
    with torch.no_grad():
        assert (token_logprobs(model.eval(), batch) - start).abs().max() > 1e-3
    model.decoder.requires_grad_(False)
    with pytest.raises(RuntimeError), reference.active():
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(policy, model.parameters(), strict=True))


def test_entropy_of_even_odds() -> None:
    model, processor = make_tiny()
    with torch.no_grad():
        model.decoder.head_weight.zero_()
    batch = completion_batch(processor, [completions_document(processor, asked("What?", "red"))])
    logprobs, entropy = logprobs_and_entropy(model, batch.batch)
    values, mask = token_values(batch, entropy)
    vocabulary = model.decoder.config.vocab_size
    torch.testing.assert_close(values[mask], torch.full_like(values[mask], math.log(vocabulary)))
    torch.testing.assert_close(token_values(batch, logprobs)[0][mask], -values[mask])
