"""The evaluation harness: exact scores from a scripted engine, controls, interruption, and honest bookkeeping."""

import argparse
import dataclasses
import io
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_picture, make_tiny, make_tokenizer, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import mm_gpt
from mm_gpt.datasets.loading.draws import training_prompt
from mm_gpt.datasets.samples import QuestionAnswer
from mm_gpt.document import Document, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.eval.base import RatioScore, derangement
from mm_gpt.eval.config import EvalConfig
from mm_gpt.eval.harness import add_arguments, evaluate, git_commit, model_sha256, run, table
from mm_gpt.eval.metrics.captions import bleu, cider_d, rouge_l
from mm_gpt.eval.metrics.statistics import wilson_interval
from mm_gpt.eval.perplexity import windows
from mm_gpt.eval.tasks import accepted_answers
from mm_gpt.hub.checkpoint import save_model
from mm_gpt.hub.decoders import decoder_table, part_sizes
from mm_gpt.hub.weights import written
from mm_gpt.inference.assistant import Assistant
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor
from mm_gpt.templates.prompts import question_prompt


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    make_picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, records: Sequence[tuple[str, bytes, dict[str, Any]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, image, about in records:
            for name, data in ((f"{key}.png", image), (f"{key}.json", json.dumps(about).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def qa(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"qa": [{"question": question, "answer": answer} for question, answer in pairs]}


class ScriptedEngine:
    """Answers what `say` makes of the prompt's text and image bytes (None without an image)."""

    def __init__(self, say: Callable[[str, bytes | None], str], fail_at_call: int = 0):
        self.say, self.fail_at_call = say, fail_at_call
        self.calls: list[tuple[int, GenerationConfig]] = []

    def generate(self, documents: Sequence[Document], config: GenerationConfig) -> list[Answer]:
        self.calls.append((len(documents), config))
        if len(self.calls) == self.fail_at_call:
            raise KeyboardInterrupt
        answers = []
        for document in documents:
            prompt = "".join(s.text for s in document.segments if isinstance(s, Text) and not s.is_control).strip()
            image = document.images[0].source if document.images else None
            text = self.say(prompt, image if isinstance(image, bytes) else None)
            answers.append(
                Answer(
                    text,
                    prompt_tokens=1,
                    image_tokens=0,
                    completion_tokens=1,
                    finish_reason="stop",
                    generation=config,
                    logprobs=None,
                )
            )
        return answers


@pytest.fixture
def scripted(tiny_assistant: Assistant) -> Callable[..., Assistant]:
    def make(say: Callable[[str, bytes | None], str], fail_at_call: int = 0) -> Assistant:
        tiny_assistant.engine = ScriptedEngine(say, fail_at_call)  # type: ignore[assignment]
        return tiny_assistant

    return make


def config(task: str, data: Path, model: Path, **options: Any) -> EvalConfig:
    return EvalConfig(task=task, data=(str(data),), model=str(model), device="cpu", **options)


def read_samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.with_suffix(".samples.jsonl").read_text().splitlines()]


def without_date(path: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(path.read_text())
    del results["date"]
    return results


# ---- vqa ----


def test_vqa_scores_counts_and_schema(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    """Stops: a wrong denominator, lost skip counts, keys that readers of the file rely on going missing."""
    tar = write_tar(
        tmp_path / "v.tar",
        [
            ("a", png(0), qa(("is it red?", "yes"), ("is it blue?", "no"))),
            ("b", b"\x89PNG broken", qa(("is it red?", "yes"))),
            ("c", png(1), {"captions": ["A circle."]}),
            ("d", png(2), qa(("is it green?", "yes"), ("what is it?", "circle"))),
            ("e", png(3), qa(("word " * 400, "yes"))),
        ],
    )
    output = tmp_path / "out" / "r.json"
    results = evaluate(config("vqa", tar, tiny_model_folder), output, assistant=scripted(lambda p, i: "Yes."))
    assert set(results) == {
        "finished",
        "task",
        "model",
        "data",
        "mm_gpt_version",
        "git_commit",
        "date",
        "config",
        "generation",
        "counts",
        "intervals",
        "scale_in_table",
        "metrics",
        "baselines",
        "controls",
        "samples",
    }
    assert results == json.loads(output.read_text())
    assert results["finished"] is True
    assert results["mm_gpt_version"] == mm_gpt.__version__
    assert results["git_commit"] == git_commit()
    assert results["model"] == {"name": str(tiny_model_folder), "sha256": model_sha256(str(tiny_model_folder))}
    asked_with = GenerationConfig(max_new_tokens=32, no_repeat_ngram_size=8)
    assert results["generation"] == dataclasses.asdict(asked_with) | {"stop": []}
    counts = results["counts"]
    assert (counts["images"], counts["items"]) == (2, 4)
    assert counts["skipped"] == {"broken image": 1, "nothing for vqa": 1, "prompt too long": 1}
    assert set(results["metrics"]) == {"exact match"}
    assert set(results["metrics"]["exact match"]) == {"value", "low", "high"}
    assert results["metrics"]["exact match"]["value"] == 0.5
    baseline = results["baselines"]["majority_answer_of_this_set"]
    assert (baseline["answer"], baseline["metrics"]["exact match"]["value"]) == ("yes", 0.5)
    assert results["controls"] == {}
    assert results["config"]["num_beams"] == 1
    samples = read_samples(output)
    assert [s["id"] for s in samples] == ["a#0", "a#1", "d#0", "d#1"]
    assert [s["scores"]["exact match"] for s in samples] == [1, 0, 1, 0]
    assert samples[1] == {
        "id": "a#1",
        "control": "none",
        "question": "is it blue?",
        "answer": "no",
        "references": ["no"],
        "prediction": "Yes.",
        "scores": {"exact match": 0.0},
    }


def test_one_question_an_image_gives_wilsons_interval(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    tar = write_tar(tmp_path / "v.tar", [(str(i), png(i), qa(("q?", "yes" if i < 3 else "no"))) for i in range(4)])
    engine = scripted(lambda p, i: "yes")
    results = evaluate(config("vqa", tar, tiny_model_folder), tmp_path / "r.json", assistant=engine)
    low, high = wilson_interval(3, 4)
    assert results["metrics"]["exact match"] == {"value": 0.75, "low": low, "high": high}


def test_interval_counts_images_not_questions() -> None:
    """Stops: fifty questions about one photo counted as fifty independent trials, hence a far too narrow interval."""
    right = np.repeat([1.0, 0.0, 1.0, 0.0], 50)
    groups = np.repeat(np.arange(4), 50)
    low, high = RatioScore(right, np.ones(200), groups).interval()
    assert (low, high) == (0.0, 1.0)
    alike = RatioScore(np.zeros(200), np.ones(200), groups).interval()
    assert alike == wilson_interval(0, 200)


def test_ten_annotators_give_vqa_accuracy(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    """Stops: annotators' repeated answers made unique, which changes the official score."""
    answers = ["red"] * 2 + ["dark red"] * 8
    pair = {"question": "which colour?", "answer": "dark red", "answers": answers}
    tar = write_tar(tmp_path / "v.tar", [(k, png(i), {"qa": [pair]}) for i, k in enumerate("ab")])
    engine = scripted(lambda p, i: "red")
    metrics = evaluate(config("vqa", tar, tiny_model_folder), tmp_path / "r.json", assistant=engine)["metrics"]
    assert list(metrics) == ["VQA accuracy", "exact match"]
    assert metrics["VQA accuracy"]["value"] == pytest.approx(0.6)
    assert metrics["exact match"]["value"] == 1.0


def test_members_of_a_set_are_not_right_alone() -> None:
    """Stops: DAQUAR's "plant, books" counted right for "books", and its sets of four taken for four annotators."""
    assert accepted_answers(QuestionAnswer("q", "plant, books", ("plant", "books"))) == ["plant, books"]
    assert accepted_answers(QuestionAnswer("q", "sofa", ("sofa", "couch"))) == ["sofa", "couch"]
    assert accepted_answers(QuestionAnswer("q", "sofa", ("couch",))) == ["sofa", "couch"]
    assert accepted_answers(QuestionAnswer("q", "sofa")) == ["sofa"]


@pytest.mark.parametrize(("question", "answer"), [("There is a box ", "true"), ("what is it?", "box"), ("x", "false")])
def test_questions_are_asked_as_in_training(question: str, answer: str) -> None:
    asked = question_prompt(question, answer)
    assert asked in {training_prompt(question, answer, capital=capital) for capital in (False, True)}


# ---- captioning ----


def test_captioning_equals_the_metrics(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    """Stops: predictions that land beside another image's references after sorting and batching."""
    texts = [[f"a {c} {s} on the grass .", f"the {c} {s} is alone"] for c in ("red", "blue") for s in ("ball", "dog")]
    images = [png(i) for i in range(4)]
    tar = write_tar(
        tmp_path / "c.tar", [(f"k{i}", images[i], {"captions": captions}) for i, captions in enumerate(texts)]
    )
    said = {images[0]: "A red ball on the grass.", images[1]: "A dog", images[2]: "the blue ball", images[3]: "a cat"}
    options = {"batch_size": 3, "controls": ("no-image", "shuffled")}
    engine = scripted(lambda p, image: said[image] if image else "nothing at all")
    output = tmp_path / "r.json"
    results = evaluate(config("captioning", tar, tiny_model_folder, **options), output, assistant=engine)
    predictions = [said[image] for image in images]
    expected = {"CIDEr-D": cider_d(predictions, texts), "BLEU-4": bleu(predictions, texts)[3]}
    expected["ROUGE-L"] = rouge_l(predictions, texts)
    for name, score in expected.items():
        low, high = score.interval()
        assert results["metrics"][name] == {"value": score.score, "low": low, "high": high}
    samples = read_samples(output)
    assert [s["prediction"] for s in samples[:4]] == predictions
    assert samples[0]["scores"]["CIDEr-D"] == expected["CIDEr-D"].per_item[0]
    # In the task's order, whatever the order on the command line; each difference is plain minus control.
    assert list(results["controls"]) == ["shuffled", "no-image"]
    nothing = cider_d(["nothing at all"] * 4, texts)
    gain = results["controls"]["no-image"]["differences"]["CIDEr-D"]
    assert gain["value"] == pytest.approx(expected["CIDEr-D"].score - nothing.score)
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert {call[1].num_beams for call in engine.engine.calls} == {3}
    assert "CIDEr-D" in table(results)


def test_difference_is_paired(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    """Stops: the two conditions resampled apart. The same answers must differ by exactly 0 with no width."""
    tar = write_tar(tmp_path / "c.tar", [(f"k{i}", png(i), {"captions": [f"a dog number {i}"]}) for i in range(4)])
    engine = scripted(lambda p, i: "a dog number 2")
    options = config("captioning", tar, tiny_model_folder, controls=("blank",))
    results = evaluate(options, tmp_path / "r.json", assistant=engine)
    for difference in results["controls"]["blank"]["differences"].values():
        assert difference == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_controls_show_what_they_say(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    """Stops: a shuffled control that leaves an image in place or differs between the questions of one image."""
    images = {png(i): f"k{i}" for i in range(5)}
    tar = write_tar(tmp_path / "v.tar", [(k, image, qa(("x?", "a"), ("y?", "b"))) for image, k in images.items()])
    engine = scripted(lambda p, image: images[image] if image else "none")
    output = tmp_path / "r.json"
    evaluate(config("vqa", tar, tiny_model_folder, controls=("all",)), output, assistant=engine)
    shown: dict[str, dict[str, str]] = {}
    for sample in read_samples(output):
        shown.setdefault(sample["control"], {})[sample["id"]] = sample["prediction"]
    assert list(shown) == ["none", "shuffled", "blank", "no-image"]
    assert all(id.startswith(image) for id, image in shown["none"].items())
    assert not any(id.startswith(image) for id, image in shown["shuffled"].items())
    assert len({shown["shuffled"][f"k{i}#0"] for i in range(5)}) == 5
    assert all(shown["shuffled"][f"k{i}#0"] == shown["shuffled"][f"k{i}#1"] for i in range(5))
    assert set(shown["no-image"].values()) == {"none"}
    assert set(shown["blank"].values()) == {"none"}  # a picture, but not one of the data's


@given(st.integers(2, 200), st.integers(0, 2**32))
def test_derangement(n: int, seed: int) -> None:
    result = derangement(n, seed)
    assert sorted(result) == list(range(n))
    assert all(i != there for i, there in enumerate(result))
    assert result == derangement(n, seed)


# ---- interruption ----


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_run_continues(
    tmp_path: Path, tiny_model_folder: Path, scripted: Any, torn: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stops: losing finished predictions, doing them twice, and a torn last line that breaks or doubles a row."""
    # U+2028 is a line break for str.splitlines(), but not in a .jsonl file.
    records = [(f"k{i}", png(i), qa(("word " * i + "\u2028?", str(i)), ("what?", "é"))) for i in range(5)]
    tar = write_tar(tmp_path / "v.tar", records)
    options = config("vqa", tar, tiny_model_folder, batch_size=2, controls=("shuffled",))
    say = lambda prompt, image: str(prompt.count("word"))  # noqa: E731
    whole, output = tmp_path / "whole.json", tmp_path / "r.json"
    evaluate(options, whole, assistant=scripted(say))
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, output, assistant=scripted(say, fail_at_call=8))
    samples = output.with_suffix(".samples.jsonl")
    assert len(read_samples(output)) == 14
    assert json.loads(output.read_text())["finished"] is False
    if torn:
        samples.write_bytes(samples.read_bytes()[:-20])
    engine = scripted(say)
    evaluate(options, output, assistant=engine)
    assert sum(size for size, _ in engine.engine.calls) == (8 if torn else 6)
    assert without_date(output) | {"samples": ""} == without_date(whole) | {"samples": ""}
    assert samples.read_bytes() == whole.with_suffix(".samples.jsonl").read_bytes()
    # A finished run costs nothing more; another control only its own predictions.
    engine = scripted(say)
    evaluate(options, output, assistant=engine)
    assert engine.engine.calls == []
    evaluate(config("vqa", tar, tiny_model_folder, controls=("blank",)), output, assistant=engine)
    assert sum(size for size, _ in engine.engine.calls) == 10
    assert len(read_samples(output)) == 30, "the shuffled predictions were thrown away"


def test_results_of_another_run_are_never_mixed(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    """Stops: predictions of one model or data set scored as another's, or overwritten."""
    tar = write_tar(tmp_path / "v.tar", [("a", png(0), qa(("q?", "yes"))), ("b", png(1), qa(("q?", "no")))])
    output, engine = tmp_path / "r.json", scripted(lambda p, i: "yes")
    evaluate(config("vqa", tar, tiny_model_folder), output, assistant=engine)
    for options, what in [({"limit": 1}, "data sha256"), ({"num_beams": 2}, "num_beams: 1, now 2")]:
        with pytest.raises(MMGPTError, match=what):
            evaluate(config("vqa", tar, tiny_model_folder, **options), output, assistant=engine)
    results = evaluate(config("vqa", tar, tiny_model_folder, limit=1), output, assistant=engine, restart=True)
    assert results["counts"]["items"] == 1
    assert results["metrics"]["exact match"] == {"value": 1.0, "low": None, "high": None}  # one image has no spread
    output.write_text("{}")
    with pytest.raises(MMGPTError, match="is no results file"):
        evaluate(config("vqa", tar, tiny_model_folder), output, assistant=engine)
    output.unlink()
    with pytest.raises(MMGPTError, match="without its results"):
        evaluate(config("vqa", tar, tiny_model_folder), output, assistant=engine)


# ---- what goes wrong ----


def test_results_state_the_decoding_that_was_used(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    """Stops: scores of captions that could not repeat three tokens, beside others that could, and nothing says so."""
    tar = write_tar(tmp_path / "t.tar", [("a", png(0), {"captions": ["A circle."], **qa(("is it red?", "yes"))})])
    for task, beams, tokens, repeats in (("captioning", 3, 40, 3), ("vqa", 1, 32, 8)):
        for is_public in (False, True):
            assistant = scripted(lambda p, i: "A circle.")
            assistant.is_public = is_public
            output = tmp_path / f"{task}-{is_public}.json"
            results = evaluate(config(task, tar, tiny_model_folder), output, assistant=assistant)
            ((_, used),) = assistant.engine.calls
            assert results["generation"] == json.loads(json.dumps(asdict(used)))
            expected = (beams, tokens, 0 if is_public else repeats)
            assert (used.num_beams, used.max_new_tokens, used.no_repeat_ngram_size) == expected
            line = f"num_beams={beams}, max_new_tokens={tokens}, no_repeat_ngram_size={expected[2]}"
            assert line in table(results).splitlines()[0]
        assistant.is_public = False
        with pytest.raises(MMGPTError, match=f"no_repeat_ngram_size: 0, now {repeats}"):
            evaluate(config(task, tar, tiny_model_folder), output, assistant=assistant)


def test_mistakes_are_named(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    tar = write_tar(tmp_path / "c.tar", [("a", png(0), {"captions": ["a dog"]})])
    engine, output = scripted(lambda p, i: "yes"), tmp_path / "r.json"

    def fails(match: str, task: str, data: Path = tar, **options: Any) -> None:
        with pytest.raises(MMGPTError, match=match):
            evaluate(config(task, data, tiny_model_folder, **options), output, assistant=engine)
        assert not output.exists()

    fails("did you mean 'captioning'", "captionning")
    fails("did you mean 'shuffled'", "vqa", controls=("shufled",))
    fails("unknown control of perplexity 'blank'", "perplexity", controls=("blank",))
    fails("nothing to evaluate: 1 record skipped: 1 nothing for vqa", "vqa")
    fails("no such file", "captioning", tmp_path / "none.tar")
    fails("at least two images", "captioning", controls=("shuffled",))
    with pytest.raises(ConfigError, match="batch_size"):
        config("vqa", tar, tiny_model_folder, batch_size=0)


def test_duplicate_keys_stay_apart(tmp_path: Path, tiny_model_folder: Path, scripted: Any) -> None:
    """Stops: `0001` of two tars sharing one prediction."""
    tars = [write_tar(tmp_path / f"{n}.tar", [("0001", png(n), {"captions": [f"picture {n}"]})]) for n in (0, 1)]
    options = EvalConfig(task="captioning", data=tuple(map(str, tars)), model=str(tiny_model_folder))
    output = tmp_path / "r.json"
    assert evaluate(options, output, assistant=scripted(lambda p, i: "x"))["counts"]["items"] == 2
    assert [s["id"] for s in read_samples(output)] == ["0001", "0001@2"]


# ---- perplexity ----


@given(st.integers(0, 40), st.integers(1, 9))
def test_every_token_but_the_first_is_predicted_once(n: int, length: int) -> None:
    pieces = windows(list(range(n)), length)
    assert [id for piece in pieces for id in piece[1:]] == list(range(1, n))
    assert all(2 <= len(piece) <= length + 1 for piece in pieces)


TEXT = "A red circle on a blue ground. The user describes the image, in one sentence. " * 12


def naive_nats(decoder: Decoder, ids: list[int], length: int) -> tuple[float, int]:
    """Token by token, each from a forward pass over nothing but its own context, without a batch."""
    total, count = 0.0, 0
    for at in range(1, len(ids)):
        start = (at - 1) // length * length
        context = torch.tensor([ids[start:at]])
        hidden = decoder(decoder.embedding(context), torch.arange(at - start)[None])
        total -= decoder.logits(hidden[0, -1]).log_softmax(-1)[ids[at]].item()
        count += 1
    return total, count


def test_perplexity_by_hand(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Stops: padding, window borders or a shift counted wrongly. A decoder of its own has no `before`."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assistant = Assistant(*make_tiny())
    ids = assistant.processor.tokenizer.encode(TEXT)
    assert len(ids) > 256, "the text must not fit into one window"
    nats, count = naive_nats(assistant.model.decoder, ids, 256)
    results = evaluate(config("perplexity", file, tiny_model_folder), tmp_path / "r.json", assistant=assistant)
    assert results["metrics"]["nats per token"]["value"] == pytest.approx(nats / count, rel=1e-5)  # float32 sums
    assert results["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert sum(s["tokens"] for s in read_samples(tmp_path / "r.json")) == count == len(ids) - 1
    assert results["controls"] == {}
    assert results["generation"] is None
    with pytest.raises(MMGPTError, match="'before'"):
        evaluate(config("perplexity", file, tiny_model_folder, controls=("before",)), tmp_path / "s.json")


def adapted_model(folder: Path) -> tuple[Path, Decoder]:
    """A model whose decoder lies in a Hugging Face folder, with a low-rank adaptation, and that decoder."""
    tokenizer = make_tokenizer()
    base, out = folder / "base", folder / "model"
    base.mkdir()
    out.mkdir()
    tiny = tiny_config(tokenizer.vocab_size)
    decoder_config = tiny.decoder
    assert not isinstance(decoder_config, str)
    torch.manual_seed(1)
    decoder = Decoder(decoder_config)
    init_weights(decoder)
    state = dict(written(decoder, decoder_table("llama"), lambda *about: part_sizes(decoder_config, *about)))
    save_file(state, base / "model.safetensors")
    values = {
        "model_type": "llama",
        "vocab_size": decoder_config.vocab_size,
        "hidden_size": decoder_config.width,
        "num_hidden_layers": decoder_config.num_layers,
        "num_attention_heads": decoder_config.num_heads,
        "num_key_value_heads": decoder_config.num_kv_heads,
        "head_dim": decoder_config.head_size,
        "intermediate_size": decoder_config.mlp_width,
        "max_position_embeddings": decoder_config.max_length,
        "rms_norm_eps": decoder_config.norm_eps,
        "tie_word_embeddings": True,
    }
    (base / "config.json").write_text(json.dumps(values))
    tokenizer.save(base / "tokenizer.json")
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    model_config = ModelConfig(
        decoder=str(base), vision=tiny.vision, connector=tiny.connector, lora=LoRAConfig(rank=2, alpha=4)
    )
    untouched = Decoder(decoder_config)
    untouched.load_state_dict(decoder.state_dict())
    model = MMGPT(model_config, decoder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_()
    processor = make_tiny()[1]
    save_model(model, Processor(tokenizer, processor.config, vocab_size=decoder_config.vocab_size), out)
    return out, untouched


def test_perplexity_before_and_after(tmp_path: Path) -> None:
    """Stops: `before` measured on a decoder that already holds the merged adaptation."""
    model, untouched = adapted_model(tmp_path)
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    results = evaluate(config("perplexity", file, model), tmp_path / "r.json")
    before = results["controls"]["before"]
    nats, count = naive_nats(untouched, make_tokenizer().encode(TEXT), 256)
    assert before["metrics"]["nats per token"]["value"] == pytest.approx(nats / count, rel=1e-5)
    after = results["metrics"]["nats per token"]["value"]
    assert abs(after - nats / count) > 1e-3
    assert before["differences"]["nats per token"]["value"] == pytest.approx(after - nats / count, abs=1e-5)


# ---- the command ----


def test_command_with_a_real_model(tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stops: options that the command parses but the harness never sees; answers that differ from run to run."""
    tar = write_tar(tmp_path / "v.tar", [(f"k{i}", png(i), qa(("what is it?", "a"))) for i in range(3)])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    outputs = [tmp_path / "1.json", tmp_path / "2.json"]
    common = ["--task", "vqa", "--data", str(tar), "--model", str(tiny_model_folder), "--device", "cpu", "--limit", "2"]
    common += ["--control", "no-image", "--control", "shuffled", "--batch-size", "2", "--max-new-tokens", "3"]
    assert run(parser.parse_args([*common, "-o", str(outputs[0])])) == 0
    printed = capsys.readouterr().out
    assert "exact match" in printed
    assert "no-image" in printed
    assert run(parser.parse_args([*common, "-o", str(outputs[1]), "--json"])) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(outputs[1].read_text())
    assert read_samples(outputs[0]) == read_samples(outputs[1])
    results = without_date(outputs[0])
    assert results["counts"]["images"] == 2
    assert (results["config"]["batch_size"], results["config"]["max_new_tokens"]) == (2, 3)
    assert list(results["controls"]) == ["shuffled", "no-image"]


def test_importing_the_harness_is_light() -> None:
    """Stops: `mm-gpt --help` waiting for torch."""
    code = "import sys, mm_gpt.eval.harness; print([m for m in ('torch', 'numpy', 'PIL', 'tqdm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
