"""GPT-1's transfer: task inputs, the two losses, the heuristics without training, and the recipe from rows to a model.

Numbers are compared in float64, where another order of additions is worth 1e-15 and a wrong token far more than 1e-12.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mm_gpt
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import CheckpointError, ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.model.classification import (
    Classifier,
    ClassifierBatch,
    ClassifierConfig,
    Kind,
    collate_sequences,
    kind_of,
    likeliest_choice,
    mean_logprob,
    sentiment,
    sequences,
)
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.presets import preset
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.training.classification import (
    ClassificationRecipe,
    ClassificationTask,
    LabelledMeasure,
    LabelledRows,
    load_classifier,
)
from mm_gpt.training.recipes import classify, recipe, run_recipe
from mm_gpt.training.train_config import TrainConfig

TOKENIZER = make_tokenizer()
V = TOKENIZER.vocab_size
START, DELIMITER, EXTRACT = V, V + 1, V + 2
ROWS: dict[Kind, list[dict[str, Any]]] = {
    "classification": [{"text": "A red circle."}, {"text": "blue ground, in one sentence"}, {"text": "image"}],
    "entailment": [
        {"premise": "A red circle.", "hypothesis": "A circle."},
        {"premise": "blue ground", "hypothesis": "Describe the image in one sentence."},
    ],
    "similarity": [{"a": "A red circle.", "b": "A circle, red"}, {"a": "ground", "b": "Describe the image."}],
    "multiple_choice": [
        {"context": "A circle on a ground.", "question": "What is red?", "choices": ["the circle", "ground", "it"]},
        {"context": "An image.", "question": "", "choices": ["yes", "no, in one sentence"]},
    ],
}


def gpt1_config(**changes: Any) -> DecoderConfig:
    """GPT-1, small: post-norm, learned positions, tied embeddings."""
    small = {"vocab_size": V, "width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_size": 8}
    config = preset("gpt1").config
    assert isinstance(config, DecoderConfig)
    return dataclasses.replace(config, **(small | {"mlp_width": 64, "max_length": 64, "dropout": 0.0} | changes))


def make_decoder(seed: int = 0, **changes: Any) -> Decoder:
    """Weights are large enough for tokens to matter."""
    decoder = Decoder(gpt1_config(**changes))
    init_weights(decoder, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8)
    return decoder


def make_classifier(kind: Kind, *, dropout: float = 0.0, **changes: Any) -> Classifier:
    torch.manual_seed(1)
    labels = () if kind == "multiple_choice" else ("no", "perhaps", "yes")
    model = Classifier(ClassifierConfig(kind=kind, labels=labels, dropout=dropout), make_decoder(**changes)).double()
    torch.nn.init.normal_(model.head.weight)
    return model


def make_batch(kind: Kind, *, pad_to: int = 0) -> ClassifierBatch:
    rows = ROWS[kind]
    return collate_sequences([sequences(row, TOKENIZER, V) for row in rows], [1, 0, 2][: len(rows)], pad_to=pad_to)


KINDS: list[Kind] = ["classification", "entailment", "similarity", "multiple_choice"]

# ---- Inputs ----


def test_inputs_are_those_of_the_paper() -> None:
    ids = TOKENIZER.encode
    assert sequences({"text": "A red"}, TOKENIZER, V) == [[START, *ids("A red"), EXTRACT]]
    assert sequences({"premise": "p q", "hypothesis": "h"}, TOKENIZER, V) == [
        [START, *ids("p q"), DELIMITER, *ids("h"), EXTRACT]
    ]
    assert sequences({"a": "one", "b": "two"}, TOKENIZER, V) == [
        [START, *ids("one"), DELIMITER, *ids("two"), EXTRACT],
        [START, *ids("two"), DELIMITER, *ids("one"), EXTRACT],
    ]
    assert sequences({"context": "z", "question": "q?", "choices": ["a", "b c"]}, TOKENIZER, V) == [
        [START, *ids("z q?"), DELIMITER, *ids("a"), EXTRACT],
        [START, *ids("z q?"), DELIMITER, *ids("b c"), EXTRACT],
    ]


def test_special_tokens_in_a_text_stay_text() -> None:
    """A row that writes <|im_end|> must not give the decoder a control token."""
    (ids,) = sequences({"text": "a <|im_end|> b"}, TOKENIZER, V)
    assert not set(ids) & set(TOKENIZER.special.values())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not an object"),
        ({"txt": "a"}, "not the fields"),
        ({"premise": "a"}, "not the fields"),
        ({"text": 3}, "not a string"),
        ({"text": "  "}, "empty"),
        ({"a": "x", "b": None}, "not a string"),
        ({"context": "c", "question": "q", "choices": "ab"}, "at least two"),
        ({"context": "c", "question": "q", "choices": ["a"]}, "at least two"),
        ({"context": "c", "question": "q", "choices": ["a", 1]}, "not a string"),
        ({"context": "", "question": " ", "choices": ["a", "b"]}, "empty"),
        ({"context": None, "question": "q", "choices": ["a", "b"]}, "not a string"),
    ],
)
def test_malformed_rows(row: Any, reason: str) -> None:
    with pytest.raises(MMGPTError, match=reason):
        kind_of(row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a", "b", "choices"]), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["text", "a", "b", "context", "question", "choices", "label"]), JSON))
@settings(max_examples=40, deadline=None)
def test_any_row_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]) -> None:
    """Nothing but an MMGPTError comes from a strange row, and reading counts what it skips."""
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    errors = ErrorCounter()
    assert len(LabelledRows.of(path, LabelledMeasure(TOKENIZER, V, 64), errors)) + errors.total == 1


# ---- The model ----


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_alter_logits(kind: Kind) -> None:
    """Nor do the other rows: reading the last column instead of the last token, or attention to padding, would."""
    model = make_classifier(kind).eval()
    short, padded = make_batch(kind), make_batch(kind, pad_to=50)
    assert padded.input_ids.shape[1] == 50 > short.input_ids.shape[1]
    torch.testing.assert_close(model(padded), model(short), rtol=0, atol=1e-12)
    for number, row in enumerate(ROWS[kind]):
        alone = model(collate_sequences([sequences(row, TOKENIZER, V)]))[0]
        torch.testing.assert_close(alone, model(padded)[number, : len(alone)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_head_reads_the_extract_token(kind: Kind) -> None:
    """Against the formulas, sequence by sequence, on the bare decoder."""
    model = make_classifier(kind).eval()
    table = torch.cat([model.decoder.embedding.weight, model.marks])
    for number, row in enumerate(ROWS[kind]):
        states = []
        for ids in sequences(row, TOKENIZER, V):
            x = table[ids][None]
            states.append(model.decoder(x, torch.arange(len(ids))[None])[0, -1])
        if kind == "multiple_choice":
            expected = torch.stack([state @ model.head.weight[0] for state in states])
        else:
            expected = model.head.weight @ torch.stack(states).sum(dim=0)
        found = model(make_batch(kind))[number, : len(expected)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_similarity_is_symmetric() -> None:
    """Representations are added before the head: concatenated, the order would show."""
    model = make_classifier("similarity").eval()
    swapped = [{"a": row["b"], "b": row["a"]} for row in ROWS["similarity"]]
    turned = model(collate_sequences([sequences(row, TOKENIZER, V) for row in swapped]))
    torch.testing.assert_close(model(make_batch("similarity")), turned, rtol=0, atol=1e-12)
    entailment = make_classifier("entailment").eval()
    one, other = (
        entailment(collate_sequences([sequences({"premise": p, "hypothesis": h}, TOKENIZER, V)]))
        for p, h in (("A red circle.", "ground"), ("ground", "A red circle."))
    )
    assert (one - other).abs().max() > 1e-3  # there the order counts


def test_choices_permute_with_the_options() -> None:
    model = make_classifier("multiple_choice").eval()
    row = ROWS["multiple_choice"][0]
    order = [2, 0, 1]
    turned = row | {"choices": [row["choices"][i] for i in order]}
    before, after = (model(collate_sequences([sequences(r, TOKENIZER, V)]))[0] for r in (row, turned))
    torch.testing.assert_close(after, before[order], rtol=0, atol=1e-12)
    assert (before[0] - before[1]).abs() > 1e-3


def test_fewer_choices_have_no_probability_beyond_them() -> None:
    found = make_classifier("multiple_choice").eval().probabilities(ROWS["multiple_choice"], TOKENIZER)
    assert [list(row) for row in found] == [["0", "1", "2"], ["0", "1"]]
    assert [sum(row.values()) for row in found] == pytest.approx([1.0, 1.0])


def test_new_parameters_are_the_head_and_the_marks() -> None:
    model = make_classifier("classification")
    new = {name: tuple(p.shape) for name, p in model.named_parameters() if not name.startswith("decoder.")}
    assert new == {"marks": (3, 32), "head.weight": (3, 32)}


def test_one_dropout_mask_for_all_sequences_of_an_example() -> None:
    """As in the released code. With a mask for each candidate, equal candidates would get unequal scores."""
    model = make_classifier("multiple_choice", dropout=0.5).train()
    row = {"context": "A circle", "question": "?", "choices": ["red", "red", "red"]}
    batch = collate_sequences([sequences(row, TOKENIZER, V)] * 2, [0, 0])
    torch.manual_seed(0)
    logits = model(batch)
    torch.testing.assert_close(logits, logits[:, :1].expand(2, 3), rtol=0, atol=1e-12)
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_what_a_classifier_refuses() -> None:
    with pytest.raises(ConfigError, match="causal"):
        make_classifier("classification", causal=False)
    with pytest.raises(ConfigError, match="two labels"):
        ClassifierConfig(kind="classification", labels=("yes",))
    with pytest.raises(ConfigError, match="no labels"):
        ClassifierConfig(kind="multiple_choice", labels=("a", "b"))
    model = make_classifier("classification").eval()
    with pytest.raises(ContextOverflowError, match="context of 64"):
        model.probabilities([{"text": "word " * 80}], TOKENIZER)
    with pytest.raises(MMGPTError, match="row 1 is similarity; this model does classification"):
        model.probabilities([{"text": "a"}, {"a": "x", "b": "y"}], TOKENIZER)
    assert model.probabilities([], TOKENIZER) == []


# ---- The two losses ----


def gradient(model: Classifier, batch: ClassifierBatch, auxiliary: float) -> Tensor:
    model.zero_grad()
    loss, count = model.loss(batch, auxiliary=auxiliary)
    (loss / count).backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_linear_in_lambda(kind: Kind) -> None:
    """g(λ) = g(0) + λ g_LM, and g(0) is that of the classifier alone."""
    model, batch = make_classifier(kind), make_batch(kind)
    none, half, whole = (gradient(model, batch, weight) for weight in (0.0, 0.5, 1.0))
    model.zero_grad()
    F.cross_entropy(model(batch), batch.labels).backward()
    alone = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.equal(none[none != 0], alone[alone != 0])
    torch.testing.assert_close(half, none + 0.5 * (whole - none), rtol=0, atol=1e-12)
    assert (whole - none).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_auxiliary_loss_is_the_language_model_on_all_sequences(kind: Kind) -> None:
    """Against log-softmax token by token: padding and marks are no targets, every candidate's text is one."""
    model = make_classifier(kind).eval()
    table = torch.cat([model.decoder.embedding.weight, model.marks])
    nats = []
    for row in ROWS[kind]:
        for ids in sequences(row, TOKENIZER, V):
            hidden = model.decoder(table[ids][None], torch.arange(len(ids))[None])[0]
            logprobs = model.decoder.logits(hidden).log_softmax(-1)
            nats += [-logprobs[at, id] for at, id in enumerate(ids[1:]) if id < V]
    batch = make_batch(kind, pad_to=50)
    whole, count = model.loss(batch, auxiliary=1.0)
    label, _ = model.loss(batch, auxiliary=0.0)
    assert int(count) == len(ROWS[kind])
    torch.testing.assert_close((whole - label) / count, torch.stack(nats).mean(), rtol=0, atol=1e-12)


# ---- Without training ----


@torch.no_grad()
def naive(decoder: Decoder, prompt: list[int], continuation: list[int]) -> list[float]:
    ids = torch.tensor([[*prompt, *continuation]])
    logprobs = decoder.logits(decoder(decoder.embed(ids), torch.arange(ids.shape[1])[None]))[0].log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + n, id]) for n, id in enumerate(continuation)]


def test_heuristics() -> None:
    decoder = make_decoder().double().eval()
    ids = TOKENIZER.encode
    prompt, answer = ids("A red"), ids(" circle on")
    expected = naive(decoder, prompt, answer)
    assert mean_logprob(decoder, prompt, answer) == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    scores = {word: sum(naive(decoder, ids("It is very"), ids(f" {word}"))) for word in ("positive", "negative")}
    assert sentiment(decoder, TOKENIZER, "It is") == max(scores, key=scores.__getitem__)
    with pytest.raises(MMGPTError, match="at least a token before"):
        mean_logprob(decoder, [], answer)


def test_the_likeliest_choice_is_not_the_shortest() -> None:
    """By summed log-probability a longer answer nearly always loses."""
    decoder = make_decoder().double().eval()
    choices = ["red", "blue ground in one sentence", "circle", "image on a ground"]
    found = [naive(decoder, TOKENIZER.encode("A"), TOKENIZER.encode(f" {choice}")) for choice in choices]
    means = [sum(values) / len(values) for values in found]
    sums = [sum(values) for values in found]
    assert likeliest_choice(decoder, TOKENIZER, "A", choices) == means.index(max(means))
    assert means.index(max(means)) != sums.index(max(sums))


# ---- The recipe ----


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved decoder of text, with random weights."""
    folder = tmp_path_factory.mktemp("start")
    config = gpt1_config(max_length=32, dropout=0.1)
    torch.manual_seed(0)
    model = MMGPT(ModelConfig(decoder=config))
    save_model(model, Processor(TOKENIZER, ProcessorConfig(max_length=32), vocab_size=V), folder)
    return folder


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def labelled(count: int) -> list[dict[str, Any]]:
    return [
        {"text": f"a {'red' if n % 2 else 'blue'} {'circle' if n % 3 else 'ground'} {n}", "label": n % 2}
        for n in range(count)
    ]


def make_recipe(data: Path, start: Path, **changes: Any) -> ClassificationRecipe:
    train = TrainConfig(steps=60, lr=1e-2, warmup_steps=2, precision="fp32", validate_every=30, save_every=60)
    values = {"train": train, "start": str(start), "holdout": 0.25, "batch_size": 8, "data": str(data)}
    return ClassificationRecipe(**(values | changes))


def test_from_rows_to_a_model_that_loads_again(start: Path, tmp_path: Path) -> None:
    """The whole way; the saved folder is a classifier, and a language model as well."""
    write(tmp_path / "train.jsonl", labelled(80))
    out = tmp_path / "run"
    run_recipe(make_recipe(tmp_path, start, auxiliary=0.1), out, progress=False)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [row["validation"] for row in log if "validation" in row][-1]
    assert last["accuracy"] == 1.0
    assert last["rows"] == 20
    assert 0.5 <= last["most frequent"] <= 0.8
    model, processor = load_classifier(out / "best")
    assert model.config.labels == ("0", "1")
    found = model.probabilities([{"text": "a red circle"}, {"text": "a blue ground"}], processor.tokenizer)
    assert [max(row, key=row.__getitem__) for row in found] == ["1", "0"]
    assert mm_gpt.load(out / "best", device="cpu").complete("a red", max_new_tokens=2).completion_tokens == 2
    with pytest.raises(CheckpointError, match=r"classifier\.json"):
        load_classifier(start)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_trained(kind: Kind, start: Path, tmp_path: Path) -> None:
    """Every kind, and a multimodal or adapted start is no matter: matrices are stored in half precision, so 1e-2."""
    rows = [row | {"label": n % 2} for n, row in enumerate(ROWS[kind] * 4)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.jsonl", rows[:2])
    task = ClassificationTask(make_recipe(tmp_path, start, holdout=0.0, validation="validation.jsonl"))
    assert set(task.validate()) == {"loss", "accuracy", "most frequent", "rows"}
    term = task.loss(task.micro_batches(0, 1)[0])["loss"]
    assert torch.isfinite(term.total)
    assert term.count == 8
    task.save(tmp_path)
    loaded, processor = load_classifier(tmp_path)
    before = task.model.eval().probabilities(ROWS[kind], processor.tokenizer)
    after = loaded.probabilities(ROWS[kind], processor.tokenizer)
    for one, other in zip(before, after, strict=True):
        assert one == pytest.approx(other, abs=1e-2)


def test_bad_rows_are_counted_and_skipped(start: Path, tmp_path: Path) -> None:
    bad = [
        "{",
        "[]",
        {"text": "no label"},
        {"text": "half", "label": 0.5},
        {"text": "word " * 40, "label": 1},
        {"a": "x", "b": "y", "label": 1},
        {"context": "c", "question": "q", "choices": ["a", "b"], "label": 2},
    ]
    write(tmp_path / "train.jsonl", [*labelled(6), *bad])
    write(tmp_path / "validation.jsonl", [*labelled(2), {"text": "new", "label": "never seen"}])
    task = ClassificationTask(make_recipe(tmp_path, start, holdout=0.0, validation="validation.jsonl"))
    assert (len(task.rows), len(task.held), task.errors.total) == (6, 2, 8)
    assert task.errors.examples["bad JSON"] == ["train.jsonl:7"]
    assert "row longer than the context" in task.errors.counts
    assert "similarity among classification" in task.errors.counts


def test_an_epoch_shows_every_row_once(start: Path, tmp_path: Path) -> None:
    """Also the last, smaller batch; and the order is a function of the step alone."""
    write(tmp_path / "train.jsonl", labelled(28))
    task = ClassificationTask(make_recipe(tmp_path, start))  # 21 rows are left to train on: 8 + 8 + 5
    for epoch in range(2):
        batches = [task.micro_batches(3 * epoch + step, 1)[0] for step in range(3)]
        shown = [tuple(ids[: int(n)].tolist()) for b in batches for ids, n in zip(b.input_ids, b.lengths, strict=True)]
        assert sorted(shown) == sorted(tuple(row.sequences[0]) for row in task.rows)
    assert torch.equal(task.micro_batches(4, 1)[0].input_ids, task.micro_batches(2, 2)[0].input_ids)


def test_starts_from_a_multimodal_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Its decoder is taken, and a mark's id is not an image's."""
    write(tmp_path / "train.jsonl", labelled(8))
    task = ClassificationTask(make_recipe(tmp_path, tiny_model_folder))
    decoder = load_model(tiny_model_folder)[0].decoder
    assert all(torch.equal(a, b) for a, b in zip(task.model.decoder.parameters(), decoder.parameters(), strict=True))
    assert all(p.requires_grad for p in task.model.parameters())


def test_starts_from_a_hugging_face_decoder(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    TOKENIZER.save(tmp_path / "gpt2/tokenizer.json")
    write(tmp_path / "gpt2/tokenizer_config.json", [{"eos_token": "<|endoftext|>"}])
    write(tmp_path / "train.jsonl", labelled(8))
    model = ClassificationTask(make_recipe(tmp_path, tmp_path / "gpt2")).model.eval()
    ids = sequences({"text": "a red circle"}, TOKENIZER, V)[0]
    table = torch.cat([theirs.transformer.wte.weight, model.marks])
    with torch.no_grad():
        state = theirs.transformer(inputs_embeds=table[ids][None]).last_hidden_state[0, -1]
        found = model(collate_sequences([[ids]]))[0]
    torch.testing.assert_close(found, model.head.weight @ state, rtol=0, atol=1e-5)


def test_papers_hyperparameters(tmp_path: Path) -> None:
    """Three epochs of batches of 32, warm-up over 0.2 % of them."""
    write(tmp_path / "train.jsonl", [*labelled(16_000), ""])
    write(tmp_path / "validation.jsonl", labelled(2))
    found = recipe("classify", str(tmp_path))
    assert isinstance(found, ClassificationRecipe)
    assert (found.train.steps, found.train.warmup_steps, found.train.lr) == (1500, 3, 6.25e-5)
    assert (found.batch_size, found.auxiliary, found.dropout) == (32, 0.5, 0.1)
    assert (found.validation, found.holdout) == ("validation.jsonl", 0.0)
    (tmp_path / "validation.jsonl").unlink()
    assert classify(str(tmp_path)).train.steps == 1350  # nine tenths of it
    assert classify(str(tmp_path / "nowhere")).train.steps == 1


@pytest.mark.parametrize(("share", "held"), [(0.4, 8), (0.25, 5), (0.7, 14)])
def test_a_share_of_the_rows_is_held_out(start: Path, tmp_path: Path, share: float, held: int) -> None:
    write(tmp_path / "train.jsonl", labelled(20))
    task = ClassificationTask(make_recipe(tmp_path, start, holdout=share))
    assert (len(task.held), len(task.rows)) == (held, 20 - held)
    assert not {str(row.sequences) for row in task.held} & {str(row.sequences) for row in task.rows}


def test_impossible_recipes(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holdout"):
        make_recipe(tmp_path, start, validation="v.jsonl")
    with pytest.raises(ConfigError, match="holdout"):
        make_recipe(tmp_path, start, holdout=0.0)
    with pytest.raises(ConfigError, match="auxiliary"):
        make_recipe(tmp_path, start, auxiliary=float("nan"))
    with pytest.raises(ConfigError, match="batch_size"):
        make_recipe(tmp_path, start, batch_size=0)
    with pytest.raises(MMGPTError, match=r"train\.jsonl: no such file"):
        ClassificationTask(make_recipe(tmp_path, start))
    write(tmp_path / "train.jsonl", ["{"])
    with pytest.raises(MMGPTError, match=r"no usable rows.*bad JSON"):
        ClassificationTask(make_recipe(tmp_path, start))
