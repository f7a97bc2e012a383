"""Naming the classes of photos, and the controls of models with concepts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny, make_tokenizer
from test_harness import config, png, read_samples, write_tar

from mm_gpt.document import Document, Image, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.eval.base import SHOWN
from mm_gpt.eval.harness import evaluate, table
from mm_gpt.eval.naming import QUESTION
from mm_gpt.inference.assistant import Assistant
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor
from mm_gpt.templates.prompts import CAPTION_PROMPT
from mm_gpt.vision.concepts import ConceptsConfig

GOLDEN_RETRIEVER, ZEBRA, TEAPOT = 207, 340, 849


class Speaker:
    """An engine that answers by the kind of prompt and the photo, and keeps what it was asked."""

    def __init__(self, said: dict[tuple[str, bytes | None], str]):
        self.said = said
        self.asked: list[tuple[str, Image | None, GenerationConfig]] = []

    def generate(self, documents: Sequence[Document], options: GenerationConfig) -> list[Answer]:
        answers = []
        for document in documents:
            prompt = "".join(s.text for s in document.segments if isinstance(s, Text) and not s.is_control).strip()
            image = document.images[0] if document.images else None
            self.asked.append((prompt, image, options))
            source = image.source if image is not None else None
            text = self.said.get((prompt, source if isinstance(source, bytes) else None), "nothing")
            answers.append(
                Answer(
                    text,
                    prompt_tokens=1,
                    image_tokens=0,
                    completion_tokens=1,
                    finish_reason="stop",
                    generation=options,
                    logprobs=None,
                )
            )
        return answers


def photo(index: Any) -> dict[str, Any]:
    return {"class": index, "name": "x", "qa": [{"question": QUESTION, "answer": "x"}]}


def speaking(said: dict[tuple[str, bytes | None], str], assistant: Assistant) -> tuple[Assistant, Speaker]:
    speaker = Speaker(said)
    assistant.engine = speaker  # type: ignore[assignment]
    return assistant, speaker


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    about = [("dog", png(0), photo(GOLDEN_RETRIEVER)), ("zebra", png(1), photo(ZEBRA)), ("pot", png(2), photo(TEAPOT))]
    return write_tar(tmp_path / "photos.tar", about)


@pytest.fixture
def with_concepts() -> Assistant:
    """A tiny model with two concepts, which its classifier reads from the tower's tokens."""
    plain, processor = make_tiny()
    concepts = ConceptsConfig(names=("cat", "dog"), kinds=("pet", "pet"), tokens=4, own_blocks=0, min_score=0.0)
    assert plain.config.vision is not None
    vision = dataclasses.replace(plain.config.vision, concepts=concepts)
    model = MMGPT(dataclasses.replace(plain.config, vision=vision)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)  # all but the concepts' own
    tokenizer = make_tokenizer()
    assert model.concepts is not None
    model.concepts.tokenize(tokenizer.encode)
    settings = dataclasses.replace(processor.config, tokens_per_image=model.tokens_per_image)
    return Assistant(model, Processor(tokenizer, settings, vocab_size=model.decoder.config.vocab_size))


def test_what_counts_as_named(tmp_path: Path, photos: Path, tiny_model_folder: Path, tiny_assistant: Assistant) -> None:
    """Stops: a caption that is scored as the answer, either of the two not counting, and a kind taken for the class."""
    said: dict[tuple[str, bytes | None], str] = {
        (CAPTION_PROMPT, png(0)): "A dog runs.",  # its kind alone
        (QUESTION, png(0)): "A cat.",
        (CAPTION_PROMPT, png(1)): "An animal on grass.",
        (QUESTION, png(1)): "Zebras",  # the class
        (CAPTION_PROMPT, png(2)): "A teapot and a cup.",  # the class
        (QUESTION, png(2)): "a pot",  # its kind alone
    }
    assistant, _ = speaking(said, tiny_assistant)
    output = tmp_path / "r.json"
    results = evaluate(config("naming", photos, tiny_model_folder), output, assistant=assistant)
    assert {name: round(3 * metric["value"]) for name, metric in results["metrics"].items()} == {
        "strict": 2,
        "kind": 3,
        "strict answer": 1,
        "kind answer": 2,
        "strict caption": 1,
        "kind caption": 2,
    }
    samples = {sample["id"]: sample for sample in read_samples(output)}
    assert samples["zebra"]["answer"] == "Zebras"
    assert samples["zebra"]["caption"] == "An animal on grass."
    assert samples["zebra"]["name"] == "zebra"
    assert samples["zebra"]["scores"]["strict"] == 1.0
    assert samples["dog"]["scores"] == {
        "strict": 0.0,
        "kind": 1.0,
        "strict answer": 0.0,
        "kind answer": 0.0,
        "strict caption": 0.0,
        "kind caption": 1.0,
    }
    assert "strict caption" in table(results)


@pytest.mark.parametrize(("options", "of_answers", "of_captions"), [({}, 1, 3), ({"num_beams": 2}, 2, 2)])
def test_captions_and_answers_have_their_own_search(
    tmp_path: Path,
    photos: Path,
    tiny_model_folder: Path,
    tiny_assistant: Assistant,
    options: dict[str, int],
    of_answers: int,
    of_captions: int,
) -> None:
    """Stops: captions searched like answers, so that they are not those of the captioning task."""
    assistant, speaker = speaking({}, tiny_assistant)
    evaluate(config("naming", photos, tiny_model_folder, **options), tmp_path / "r.json", assistant=assistant)
    assert {how.num_beams for prompt, _, how in speaker.asked if prompt == QUESTION} == {of_answers}
    assert {how.num_beams for prompt, _, how in speaker.asked if prompt == CAPTION_PROMPT} == {of_captions}


@pytest.mark.parametrize("wrong", [None, True, "340", 340.0, -1, 1000])
def test_a_record_without_a_class_is_counted(
    tmp_path: Path, tiny_model_folder: Path, tiny_assistant: Assistant, wrong: Any
) -> None:
    """Stops: class True read as class 1, and the last class for -1."""
    tar = write_tar(tmp_path / "p.tar", [("good", png(0), photo(ZEBRA)), ("bad", png(1), photo(wrong))])
    assistant, _ = speaking({}, tiny_assistant)
    results = evaluate(config("naming", tar, tiny_model_folder), tmp_path / "r.json", assistant=assistant)
    assert results["counts"]["items"] == 1
    assert results["counts"]["skipped"] == {"nothing for naming": 1}
    assert "bad" in str(results["counts"]["skipped_examples"])


def test_controls_of_concepts_need_concepts(
    tmp_path: Path, photos: Path, tiny_model_folder: Path, tiny_assistant: Assistant
) -> None:
    """Stops: a control that silently repeats the plain run, and `all` failing for what a model cannot have."""
    assistant, _ = speaking({}, tiny_assistant)
    for control in SHOWN:
        wanted = config("naming", photos, tiny_model_folder, controls=(control,))
        with pytest.raises(MMGPTError, match=f"{control}.*needs a model with concepts"):
            evaluate(wanted, tmp_path / "r.json", assistant=assistant)
    named_beside_all = config("naming", photos, tiny_model_folder, controls=("all", "no-concepts"))
    with pytest.raises(MMGPTError, match="no-concepts"):
        evaluate(named_beside_all, tmp_path / "r.json", assistant=assistant)
    every = config("naming", photos, tiny_model_folder, controls=("all",))
    results = evaluate(every, tmp_path / "r.json", assistant=assistant)
    assert list(results["controls"]) == ["shuffled", "blank", "no-image"]
    assert results["config"]["controls"] == ["shuffled", "blank", "no-image"]


def test_controls_of_concepts_show_what_they_say(
    tmp_path: Path, photos: Path, tiny_model_folder: Path, with_concepts: Assistant
) -> None:
    """Stops: another image in place of the same one shown in part, and the two controls mixed up."""
    assistant, speaker = speaking({}, with_concepts)
    wanted = config("naming", photos, tiny_model_folder, controls=("no-concepts", "concepts-alone"))
    evaluate(wanted, tmp_path / "r.json", assistant=assistant)
    shown: dict[str, set[Any]] = {}
    for _, image, _ in speaker.asked:
        assert image is not None
        shown.setdefault(image.shown, set()).add(image.source)
    every = {png(0), png(1), png(2)}
    assert shown == {"all": every, "pixels": every, "concepts": every}


def test_every_control_runs_on_a_model_with_concepts(
    tmp_path: Path, photos: Path, tiny_model_folder: Path, with_concepts: Assistant
) -> None:
    """Stops: a control that the model itself cannot answer."""
    wanted = config("naming", photos, tiny_model_folder, controls=("all",), max_new_tokens=3)
    results = evaluate(wanted, tmp_path / "r.json", assistant=with_concepts)
    assert list(results["controls"]) == ["shuffled", "blank", "no-image", "no-concepts", "concepts-alone"]
    assert results["counts"]["items"] == 3
    by_control: dict[str, list[tuple[str, str]]] = {}
    for sample in read_samples(tmp_path / "r.json"):
        by_control.setdefault(sample["control"], []).append((sample["answer"], sample["caption"]))
    assert by_control["no-concepts"] != by_control["concepts-alone"]


def test_other_image_tasks_have_the_controls(tmp_path: Path, tiny_model_folder: Path, with_concepts: Assistant) -> None:
    tar = write_tar(tmp_path / "c.tar", [(f"k{i}", png(i), {"captions": [f"a dog {i}"]}) for i in range(2)])
    assistant, speaker = speaking({}, with_concepts)
    wanted = config("captioning", tar, tiny_model_folder, controls=("concepts-alone",))
    results = evaluate(wanted, tmp_path / "r.json", assistant=assistant)
    assert list(results["controls"]) == ["concepts-alone"]
    assert [image.shown for _, image, _ in speaker.asked if image] == ["all", "all", "concepts", "concepts"]
