"""Concepts: what the untouched trunk's classifier sees, told to the decoder in words."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mm_gpt.commands.cli import main
from mm_gpt.document import Concepts, Image
from mm_gpt.errors import CheckpointError, ConfigError, ImageError, MMGPTError
from mm_gpt.hub.checkpoint import load_model, save_model
from mm_gpt.hub.export.export_model import export_model
from mm_gpt.inference.assistant import Assistant
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Batch, Processor, ProcessorConfig, collate
from mm_gpt.vision.concepts import ConceptsConfig, ConceptTokens
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.efficientnet import EfficientNetLite
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.tiling import TilingConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from tests.conftest import IMAGE_SIZE, make_picture, make_tiny, make_tokenizer, tiny_config

SIZE = 64
NAMES = ("tabby cat", "cat", "golden retriever", "pug", "cat")
KINDS = ("cat", "cat", "dog", "dog", "cat")
CONCEPTS = ConceptsConfig(names=NAMES, kinds=KINDS, count=2, tokens=12, own_blocks=3)
PLAIN = VisionConfig(model="timm/tf_efficientnet_lite0", image_size=SIZE)


def make_state(seed: int = 0) -> dict[str, Tensor]:
    """An EfficientNet-Lite0 with a classifier of five classes that disagree, in timm's names."""
    torch.manual_seed(seed)
    trunk = EfficientNetLite(0)
    state = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    return state | {"classifier.weight": torch.randn(5, 1280), "classifier.bias": torch.randn(5)}


def make_model(concepts: ConceptsConfig | None = CONCEPTS) -> tuple[MMGPT, Processor]:
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    config = ModelConfig(
        decoder=tiny_config(tokenizer.vocab_size).decoder,
        vision=PLAIN,
        connector=ConnectorConfig(kind="pixel_shuffle", scale=2),
    )
    model = MMGPT(config).eval()
    state = make_state()
    assert model.vision is not None
    trunk = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    model.vision.tower.trunk.load_state_dict(trunk)  # type: ignore[union-attr]
    if concepts is not None:
        model.add_concepts(concepts, state, tokenizer)
        with torch.no_grad():
            assert model.concepts is not None
            model.concepts.of_score.normal_()
    settings = ProcessorConfig(
        image=ImageTransformConfig(size=SIZE, mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3),
        tokens_per_image=model.tokens_per_image,
        max_length=256,
    )
    return model.eval(), Processor(tokenizer, settings, vocab_size=tokenizer.vocab_size)


def batch_of(processor: Processor, images: Sequence[Image]) -> Batch:
    rows = [[processor(processor.chat([{"role": "user", "content": [image, "What?"]}]))] for image in images]
    return collate(rows, processor.pixels([row[0] for row in rows]))


def tokens_of(model: MMGPT, processor: Processor, image: Image) -> Tensor:
    with torch.no_grad():
        return model.image_tokens(batch_of(processor, [image]))[0].tokens


def test_equal_names_add_up_and_the_likeliest_kind_comes_first() -> None:
    tokens = ConceptTokens(CONCEPTS, 8)
    tokens.tokenize(lambda text: range(len(text.split())))
    told = tokens.told(torch.tensor([[0.2, 0.25, 0.1, 0.25, 0.2], [0.0, 0.02, 0.92, 0.04, 0.02]]))
    assert [name for name, _ in told[0]] == ["cat", "pug"]  # the kind is a name of its own, and is told once
    assert told[0][0][1] == pytest.approx(0.45)
    assert [name for name, _ in told[1]] == ["dog", "golden retriever"]
    assert told[1][0][1] == pytest.approx(0.96)


def test_what_is_unlikely_or_too_long_is_left_out() -> None:
    tokens = ConceptTokens(dataclasses.replace(CONCEPTS, tokens=3, min_score=0.1), 4)
    tokens.tokenize(lambda text: {" dog": [1], " golden retriever": [2, 3, 4], " pug": [5, 6]}.get(text, [7] * 9))
    seen: list[Tensor] = []

    def embed(ids: Tensor) -> Tensor:
        seen.append(ids)
        return torch.nn.functional.one_hot(ids, 8)[..., :4].float()

    out = tokens(torch.tensor([[0.0, 0.0, 0.6, 0.35, 0.05]]), embed)
    assert seen[0].tolist() == [[1, 5, 6]]  # the retriever of three tokens no longer fits behind the kind
    assert out.shape == (1, 3, 4)
    told = tokens.told(torch.tensor([[0.0, 0.0, 0.6, 0.35, 0.05]]))
    assert [name for name, _ in told[0]] == ["dog", "pug"]  # what is said to be told is what the decoder is told
    torch.testing.assert_close(out[0, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    nothing = tokens(torch.full((1, 5), 0.02), embed)
    torch.testing.assert_close(nothing, tokens.blank.expand(1, 3, 4))


def test_scores_change_the_embeddings_of_names() -> None:
    tokens = ConceptTokens(CONCEPTS, 6)
    tokens.tokenize(make_tokenizer().encode)
    embed = torch.nn.Embedding(500, 6)
    with torch.no_grad():
        tokens.of_score[0, 1] = 1.0  # of a name: once for each unit of its probability
    sure, unsure = (tokens(torch.tensor([[0.0, 0.0, 0.0, p, 0.0]]), embed) for p in (0.9, 0.4))
    length = len(make_tokenizer().encode(" dog"))
    torch.testing.assert_close(sure[:, :length], unsure[:, :length])  # the kind's own weights are zero
    torch.testing.assert_close(sure[0, length] - unsure[0, length], torch.full((6,), 0.5))


def test_patch_tokens_are_those_without_concepts_and_scores_those_of_the_trunk() -> None:
    model, processor = make_model()
    plain, _ = make_model(None)
    assert model.vision is not None
    assert plain.vision is not None
    pixels = processor.pixels([processor(processor.chat([{"role": "user", "content": [Image(make_picture())]}]))])
    with torch.no_grad():
        tokens, scores = model.vision.see(pixels)
        torch.testing.assert_close(tokens, plain.vision(pixels), rtol=0, atol=0)
        torch.testing.assert_close(model.vision(pixels), tokens, rtol=0, atol=0)
        assert plain.vision.see(pixels)[1] is None
        state = make_state()
        trunk = EfficientNetLite(0).eval()
        trunk.load_state_dict({name: value for name, value in state.items() if not name.startswith("classifier.")})
        pooled = trunk.forward_features(pixels).mean(dim=(2, 3))
        wanted = (pooled @ state["classifier.weight"].T + state["classifier.bias"]).softmax(-1)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-5)


def test_the_classifier_keeps_what_it_sees_when_the_tower_is_tuned() -> None:
    model, _ = make_model()
    assert model.vision is not None
    pixels = torch.randn(2, 3, SIZE, SIZE)
    model.vision.unfreeze(3)
    trained = {name for name, parameter in model.vision.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(name.startswith("concepts.") for name in trained)
    tokens, scores = model.vision.see(pixels)
    with torch.no_grad():
        for name, parameter in model.vision.named_parameters():
            if name in trained:
                parameter.mul_(1.1)
    changed, same = model.vision.see(pixels)
    assert scores is not None
    assert same is not None
    torch.testing.assert_close(same, scores, rtol=0, atol=0)
    assert not torch.allclose(changed, tokens)
    for blocks in (4, None):
        with pytest.raises(ConfigError, match="all but the last 3 blocks as they are"):
            model.vision.unfreeze(blocks)


@pytest.mark.parametrize("keep", [True, False])
def test_folding_changes_neither_tokens_nor_scores(keep: bool) -> None:
    model, _ = make_model()
    vision = model.vision
    assert vision is not None
    pixels = torch.randn(1, 3, SIZE, SIZE)
    before = copy.deepcopy(vision.state_dict())
    with torch.no_grad():
        tokens, scores = vision.see(pixels)
        vision.fold_batch_norm(keep=keep)
        folded, same = vision.see(pixels)
    torch.testing.assert_close(folded, tokens, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(same, scores, rtol=1e-3, atol=1e-5)
    if keep:
        assert {n: t.tolist() for n, t in vision.state_dict().items()} == {n: t.tolist() for n, t in before.items()}
    else:
        with pytest.raises(MMGPTError, match="folded"):
            vision.state_dict()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_saved_model_sees_and_says_the_same(tmp_path: Path, dtype: str) -> None:
    model, processor = make_model()
    save_model(model, processor, tmp_path)
    first, second = Assistant(*make_model()), Assistant(*load_model(tmp_path, decoder_dtype=dtype))
    picture = make_picture(3)
    told, again = first.concepts(picture), second.concepts(picture)
    assert told
    if dtype == "fp32":
        assert [name for name, _ in told] == [name for name, _ in again]
        assert second.ask(picture, "What?", max_new_tokens=6) == first.ask(picture, "What?", max_new_tokens=6)
    for (_, score), (_, its) in zip(told, again, strict=False):
        assert its == pytest.approx(score, abs=0.05)


def test_a_model_in_half_precision_is_told_the_same() -> None:
    model, processor = make_model()
    image = Image(make_picture(4))
    tokens = tokens_of(model, processor, image)
    half = tokens_of(model.to(torch.bfloat16), processor, image)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half[-12:].float(), tokens[-12:], rtol=0.1, atol=0.1)


def test_what_is_shown_of_an_image() -> None:
    model, processor = make_model()
    assert model.concepts is not None
    picture, k = make_picture(1), model.tokens_per_image - CONCEPTS.tokens
    everything = tokens_of(model, processor, Image(picture))
    pixels = tokens_of(model, processor, Image(picture, shown="pixels"))
    concepts = tokens_of(model, processor, Image(picture, shown="concepts"))
    torch.testing.assert_close(pixels[:k], everything[:k])
    torch.testing.assert_close(pixels[k:], model.concepts.blank.expand(CONCEPTS.tokens, -1))
    torch.testing.assert_close(concepts[k:], everything[k:])
    torch.testing.assert_close(concepts[:k], model.concepts.blank_image.expand(k, -1))
    given = tokens_of(model, processor, Image(Concepts({"pug": 0.7, "cat": 0.2})))
    torch.testing.assert_close(given[:k], concepts[:k])
    wanted = model.concepts(model.concepts.scores_of({"pug": 0.7, "cat": 0.2})[None], model.decoder.embed)[0]
    torch.testing.assert_close(given[k:], wanted)


def test_concepts_may_borrow_the_tokens_of_the_next_image() -> None:
    model, processor = make_model()
    images = [Image(Concepts({"pug": 0.9}), shown="borrowed"), Image(make_picture(2))]
    with pytest.raises(MMGPTError, match="in training alone"):
        model.image_tokens(batch_of(processor, images))
    with torch.no_grad():
        first, second = model.train().image_tokens(batch_of(processor, images))
    k = model.tokens_per_image - CONCEPTS.tokens
    torch.testing.assert_close(first.tokens[:k], second.tokens[:k])
    assert not torch.allclose(first.tokens[k:], second.tokens[k:])


def test_an_engine_does_not_mix_up_what_is_shown() -> None:
    assistant = Assistant(*make_model())
    picture = make_picture(1)
    shown = [Image(picture, shown=how) for how in ("all", "pixels", "concepts")]  # type: ignore[arg-type]
    fresh = [Assistant(*make_model()).logprob([image, "It is"], " A red circle") for image in shown]
    assert len({round(value, 3) for value in fresh}) == 3
    answers = [assistant.ask(image, "What?", max_new_tokens=5) for image in shown * 2]
    alone = [Assistant(*make_model()).ask(image, "What?", max_new_tokens=5) for image in shown]
    assert [a.ids for a in answers] == [a.ids for a in alone] * 2


def test_wrong_configurations() -> None:
    with pytest.raises(ConfigError, match="2 names and 1 kinds"):
        ConceptsConfig(names=("a", "b"), kinds=("",))
    with pytest.raises(ConfigError, match="without a name"):
        ConceptsConfig(names=("a", " "), kinds=("", ""))
    with pytest.raises(ConfigError, match="tokens must be 1 to 256, not 0"):
        dataclasses.replace(CONCEPTS, tokens=0)
    with pytest.raises(ConfigError, match="own_blocks is 9: the trunk has 8 blocks"):
        VisionEncoder(dataclasses.replace(PLAIN, concepts=dataclasses.replace(CONCEPTS, own_blocks=9)))
    with pytest.raises(ConfigError, match="need the trunk of an EfficientNet-Lite"):
        VisionEncoder(VisionConfig(model="timm/test_vit", image_size=32, concepts=CONCEPTS))
    with pytest.raises(ConfigError, match="do not go with tiling"):
        ModelConfig(
            decoder="any",
            vision=dataclasses.replace(PLAIN, concepts=CONCEPTS),
            connector=ConnectorConfig(),
            tiling=TilingConfig(kind="internvl", max_tiles=2, min_tiles=1),
        )


def test_a_trunk_that_was_tuned_too_far_is_refused() -> None:
    model, processor = make_model(None)
    assert model.vision is not None
    state = make_state()
    with torch.no_grad():
        model.vision.tower.trunk.blocks[6][0].conv_pw.weight.mul_(2)  # type: ignore[union-attr, index]
    model.add_concepts(CONCEPTS, state, processor.tokenizer)
    with torch.no_grad():
        model.vision.tower.trunk.blocks[2][0].conv_pw.weight.mul_(2)  # type: ignore[union-attr, index]
    with pytest.raises(CheckpointError, match=r"blocks\.2\.0\.conv_pw\.weight of the tower .* was tuned"):
        model.add_concepts(CONCEPTS, state, processor.tokenizer)
    del state["classifier.bias"]
    with pytest.raises(CheckpointError):
        make_model(None)[0].add_concepts(CONCEPTS, state, processor.tokenizer)


def test_unknown_names_and_images_without_pixels_are_named() -> None:
    model, processor = make_model()
    with pytest.raises(MMGPTError, match="unknown concept 'pugg'; did you mean 'pug'"):
        tokens_of(model, processor, Image(Concepts({"pugg": 0.5})))
    with pytest.raises(ImageError, match="only the concepts"):
        Image(Concepts({"pug": 0.5})).load()


def test_a_model_without_concepts_has_none_to_tell(tiny_assistant: Assistant) -> None:
    assert tiny_assistant.concepts(make_picture()) == []
    with pytest.raises(MMGPTError, match="no concepts"):
        tiny_assistant.model.told(torch.zeros(1, 3, 32, 32))


def test_another_tower_lends_the_mean_of_its_tokens(tmp_path: Path) -> None:
    model, processor = make_tiny()
    assert model.vision is not None
    state = {"classifier.weight": torch.randn(5, model.vision.width), "classifier.bias": torch.randn(5)}
    model.add_concepts(dataclasses.replace(CONCEPTS, own_blocks=0), state, processor.tokenizer)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        tokens, scores = model.vision.see(pixels)
    wanted = (tokens.mean(1) @ state["classifier.weight"].T + state["classifier.bias"]).softmax(-1)
    torch.testing.assert_close(scores, wanted)
    with pytest.raises(ConfigError, match="all but the last 0 blocks"):
        model.vision.unfreeze(1)
    (tmp_path / "model").mkdir()
    sized = dataclasses.replace(processor.config, tokens_per_image=model.tokens_per_image)
    save_model(model, Processor(processor.tokenizer, sized, vocab_size=processor.vocab_size), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"concepts .* have no counterpart"):
        export_model(tmp_path / "model", tmp_path / "out")


def test_ask_tells_concepts_in_json(
    tmp_path: Path, picture_file: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = make_model()
    (tmp_path / "model").mkdir()
    save_model(model, processor, tmp_path / "model")
    assert main(["ask", str(picture_file), "What?", "-m", str(tmp_path / "model"), "--max-tokens", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["concepts"]
    assert told == [pytest.approx(dict(Assistant(*make_model()).concepts(make_picture())), abs=0.05)]
    assert main(["ask", str(picture_file), "What?", "-m", str(tiny_model_folder), "--max-tokens", "2", "--json"]) == 0
    assert "concepts" not in json.loads(capsys.readouterr().out)
