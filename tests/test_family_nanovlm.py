"""nanoVLM's four generations against SigLIP and Llama of transformers glued together: logits, pixels, prompt ids."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
from conftest import make_picture
from family_checks import CLOSE, check_account, check_answers, check_finetuning, examples_of, logits_of, roughen, user
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.families import nanovlm
from mm_gpt.processor import IGNORE_INDEX

# Tiles of 24 pixels, an image enlarged to 48: grids of 2 x 2, 1 x 2 and 2 x 1; and one tile of 4 x 4 patches.
A, B, C = make_picture(0, (40, 30)), make_picture(1, (60, 21)), make_picture(2, (13, 57))
D = make_picture(3, (20, 24))  # one tile where nothing is enlarged
QUESTION = "What is this?"
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "vit_hidden_dim": 24,
    "vit_inter_dim": 40,
    "vit_patch_size": 6,
    "vit_img_size": 24,
    "vit_n_heads": 3,
    "vit_dropout": 0.0,
    "vit_n_blocks": 2,
    "vit_ln_eps": 1e-06,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip-base-patch16-224",
    "lm_hidden_dim": 32,
    "lm_inter_dim": 48,
    "lm_rms_eps": 1e-05,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 512,
    "lm_n_heads": 4,
    "lm_n_kv_heads": 2,
    "lm_dropout": 0.0,
    "lm_n_blocks": 2,
    "lm_attn_scaling": 1.0,
    "lm_max_length": 79,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_model_type": "HuggingFaceTB/SmolLM2-135M",
    "lm_tokenizer": "someone/tokenizer",
    "mp_pixel_shuffle_factor": 2,
    "vlm_load_backbone_weights": True,
    "vlm_checkpoint_path": "checkpoints",
}
MARKS = {f"r{row}c{column}": f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)}
GENERATIONS: dict[str, dict[str, Any]] = {
    # As nanoVLM-222M: neither an image token nor a template.
    "first": {"lm_eos_token_id": 0},
    # As nanoVLM-450M: an image token, one tile.
    "second": {"mp_image_token_length": 4, "vlm_extra_tokens": {"image_token": "<|image|>"}},
    "tiles": {
        "lm_chat_template": CHATML,
        "mp_image_token_length": 4,
        "max_img_size": 48,
        "vlm_extra_tokens": {"image_token": "<|image|>", **MARKS},
    },
    "third": {
        "lm_chat_template": CHATML,
        "mp_image_token_length": 4,
        "max_img_size": 48,
        "resize_to_max_side_len": True,
        "vlm_extra_tokens": {"image_token": "<|image|>", "global_image_token": "<|global_image|>", **MARKS},
        "hf_repo_name": "nanoVLM",
    },
}
CHATS: dict[str, list[tuple[list[PILImage.Image], str]]] = {
    "first": [([A], "What is this?"), ([B], "Is it red, é?"), ([], "What?")],
    "second": [([A], "What is this?"), ([B, C], "Is it red, é?"), ([], "What?")],
    "tiles": [([A], "What is this?"), ([D], "Which?"), ([B, D, C], "Is it red, é?"), ([], "What?"), ([D, D], "Hm.")],
    "third": [([A], "What is this?"), ([B, C], "Is it red, é?"), ([], "What?"), ([C, A, B], "\n\nWhich?")],
}


class Theirs(NamedTuple):
    """A model of two halves of transformers, and the folder that holds it as nanoVLM would."""

    name: str
    folder: Path
    tokenizer_folder: Path
    vision: Any
    decoder: Any
    projection: nn.Linear
    tokenizer: Any

    def pixels(self, images: list[PILImage.Image]) -> list[tuple[Tensor, tuple[int, int]]]:
        """Each image as its tiles, and their rows and columns."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import resize, to_tensor

        found = []
        for image in images:
            if self.name in ("first", "second"):
                found.append((to_tensor(resize(image, [24, 24]))[None], (1, 1)))
                continue
            long, short = max(image.size), min(image.size)
            most = 1 if self.name == "tiles" and long <= 24 else 2
            side = -(-short * most // long)  # tiles along the short side
            rows, cols = (side, most) if image.width >= image.height else (most, side)
            whole = to_tensor(resize(image, [rows * 24, cols * 24], InterpolationMode.BICUBIC))
            tiles = [tile for row in whole.split(24, dim=1) for tile in row.split(24, dim=2)]
            small = [resize(whole[None], [24, 24])[0]] if self.name == "third" else []
            found.append((torch.stack([*small, *tiles]), (rows, cols)))
        return found

    def ids(self, images: list[PILImage.Image], text: str) -> list[int]:
        """The prompt of nanoVLM's own scripts."""
        if self.name == "first":
            return self.tokenizer(f"Question: {text} Answer:").input_ids
        if self.name == "second":
            return self.tokenizer(f"{'<|image|>' * 4 * len(images)}Question: {text} Answer:").input_ids
        written = ""
        for number, (_, (rows, cols)) in enumerate(self.pixels(images)):
            written += f"<image: {number}>" if len(images) > 1 else ""
            written += "<|global_image|>" + "<|image|>" * 4 if self.name == "third" else ""
            for row in range(1, rows + 1):
                written += "".join(f"<row_{row}_col_{col}>" + "<|image|>" * 4 for col in range(1, cols + 1))
        message = {"role": "user", "content": written + text}
        ids = self.tokenizer.apply_chat_template([message], tokenize=True, add_generation_prompt=True)
        return ids["input_ids"]

    @torch.inference_mode()
    def embeddings(self, images: list[PILImage.Image], text: str) -> Tensor:
        ids = torch.tensor(self.ids(images, text))
        x = self.decoder.get_input_embeddings()(ids)
        if not images:
            return x
        tiles = torch.cat([pixels for pixels, _ in self.pixels(images)])
        patches = self.vision(tiles).last_hidden_state.view(-1, 2, 2, 2, 2, 24)
        tokens = self.projection(patches.transpose(2, 3).flatten(3).flatten(1, 2)).flatten(0, 1)
        if self.name == "first":
            return torch.cat([tokens, x])
        x[ids == self.tokenizer.image_token_id] = tokens
        return x

    @torch.inference_mode()
    def logits(self, images: list[PILImage.Image], text: str) -> Tensor:
        return self.decoder(inputs_embeds=self.embeddings(images, text)[None]).logits[0]

    def answer(self, image: PILImage.Image, text: str, count: int) -> list[int]:
        """Greedy decoding."""
        out = self.decoder.generate(
            inputs_embeds=self.embeddings([image], text)[None],
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return out[0].tolist()


def make_tokenizer(folder: Path) -> None:
    """The repository that `lm_tokenizer` names: a tokenizer of SmolLM2's kind, alone."""
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=words.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["Question: What is this? Answer: A red ball.", "\n\n"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    ).save_pretrained(folder)


def make_theirs(folder: Path, name: str, **changes: Any) -> Theirs:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

    values = CONFIG | GENERATIONS[name] | changes
    make_tokenizer(folder / "tokenizer")
    extra = {key: values[old] for key, old in (("chat_template", "lm_chat_template"),) if old in values}
    tokenizer = AutoTokenizer.from_pretrained(
        folder / "tokenizer", extra_special_tokens=values.get("vlm_extra_tokens") or {}, **extra
    )
    values["lm_vocab_size"] = len(tokenizer)
    vision = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=24,
            patch_size=6,
            vision_use_head=False,
        )
    ).eval()
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000},
            tie_word_embeddings=values["lm_tie_weights"],
        )
    ).eval()
    projection = nn.Linear(4 * 24, 32, bias=False)
    for module in (vision, decoder, projection):
        roughen(module)
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(values, indent=4))
    state = {"MP.proj.weight": projection.weight.detach(), **nanovlm_names(vision, decoder, values["lm_tie_weights"])}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model/model.safetensors")
    return Theirs(name, folder / "model", folder / "tokenizer", vision, decoder, projection, tokenizer)


def nanovlm_names(vision: nn.Module, decoder: nn.Module, tied: bool) -> dict[str, Tensor]:
    """The two halves in nanoVLM's names. A tied matrix has the head's name alone, as safetensors stores it."""
    state: dict[str, Tensor] = {"decoder.rotary_embd.inv_freq": torch.ones(4)}
    short = {"self_attn": "attn", "o_proj": "out_proj", "input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
    for name, tensor in decoder.state_dict().items():
        if name == "lm_head.weight":
            state["decoder.head.weight"] = tensor
        elif name == "model.embed_tokens.weight":
            state |= {} if tied else {"decoder.token_embedding.weight": tensor}
        else:
            parts = [short.get(part, part) for part in name.removeprefix("model.").split(".")]
            state["decoder." + ".".join(parts).replace("layers.", "blocks.")] = tensor
    theirs = vision.state_dict()
    for kind in ("weight", "bias"):
        state[f"vision_encoder.patch_embedding.conv.{kind}"] = theirs[f"embeddings.patch_embedding.{kind}"]
        state[f"vision_encoder.layer_norm.{kind}"] = theirs[f"post_layernorm.{kind}"]
        for i in range(2):
            layer, block = f"encoder.layers.{i}.", f"vision_encoder.blocks.{i}."
            qkv = [theirs[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{block}attn.qkv_proj.{kind}"] = torch.cat(qkv)
            state[f"{block}attn.out_proj.{kind}"] = theirs[f"{layer}self_attn.out_proj.{kind}"]
            for ours, old in (
                ("ln1", "layer_norm1"),
                ("ln2", "layer_norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            ):
                state[f"{block}{ours}.{kind}"] = theirs[f"{layer}{old}.{kind}"]
    positions = theirs["embeddings.position_embedding.weight"]
    return state | {"vision_encoder.patch_embedding.position_embedding": positions[None]}


@pytest.fixture(scope="module")
def generations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Theirs]:
    # The second has a head of its own, to have that as well.
    return {
        name: make_theirs(tmp_path_factory.mktemp(name), name, lm_tie_weights=name != "second") for name in GENERATIONS
    }


@pytest.fixture(autouse=True)
def hub(generations: dict[str, Theirs], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked for by name, instead of the network."""
    asked: list[str] = []

    def fetch(name: str, *, weights: bool) -> Path:
        assert not weights
        asked.append(name)
        return generations["first"].tokenizer_folder

    monkeypatch.setattr(nanovlm, "fetch_repository", fetch)
    return asked


@pytest.fixture(params=list(GENERATIONS))
def theirs(request: pytest.FixtureRequest, generations: dict[str, Theirs]) -> Theirs:
    return generations[request.param]


def test_same_logits_pixels_and_ids(theirs: Theirs, hub: list[str]) -> None:
    """Stops: ids of the model's own tokens in another order, tiles before the whole image, an image without its number,
    one name of a tied matrix only, an image that is normalised."""
    model, processor = load_model(theirs.folder)
    assert hub == ["someone/tokenizer"]
    cases = CHATS[theirs.name]
    chats = [[user(*images, text)] for images, text in cases]
    for example, (images, text) in zip(examples_of(processor, chats), cases, strict=True):
        ids = theirs.ids(images, text)
        if theirs.name == "first":  # the images' places are no part of its prompt
            assert example.input_ids.tolist()[4 * len(images) :] == ids
            assert example.image_tokens == 4 * len(images)
        else:
            assert example.input_ids.tolist() == ids
        if images:
            assert torch.equal(processor.pixels([example]), torch.cat([tiles for tiles, _ in theirs.pixels(images)]))
    for ours, (images, text) in zip(logits_of(model, processor, chats), cases, strict=True):
        expected = theirs.logits(images, text)
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, **CLOSE)
    one, other = logits_of(model, processor, [[user(A, "What?")], [user(make_picture(9, (40, 30)), "What?")]])
    assert (one - other).abs().max() > 0.1  # the picture matters


def test_the_same_answers(theirs: Theirs, tmp_path: Path) -> None:
    check_answers(theirs.folder, A, QUESTION, theirs.answer(A, QUESTION, 8), tmp_path)


def test_training_labels(theirs: Theirs) -> None:
    """The answer and its end are learned; the first models see "Answer:" and the answer without a space."""
    _, processor = load_model(theirs.folder)
    chat = [user(A, QUESTION), {"role": "assistant", "content": "A red ball."}]
    example = processor(processor.chat(chat, answer_starts=False))
    learned = example.labels[example.labels != IGNORE_INDEX].tolist()
    assert processor.tokenizer.decode(learned, keep_special=True) == "A red ball.<|im_end|>"
    text = processor.tokenizer.decode(example.input_ids.tolist())
    written = (
        "user\n" + QUESTION + "\nassistant\n" if theirs.name in ("tiles", "third") else f"Question: {QUESTION} Answer:"
    )
    assert written + "A red ball." in text


@pytest.mark.parametrize("name", ["first", "tiles", "third"])
def test_finetuning(generations: dict[str, Theirs], tmp_path: Path, name: str) -> None:
    chats = [[user(*images, text)] for images, text in CHATS[name]]
    changes = {"decoder": "full", "vision_blocks": 1} if name == "first" else {}
    check_finetuning(generations[name].folder, tmp_path, chats, **changes)


def test_a_folder_with_its_tokenizer(generations: dict[str, Theirs], tmp_path: Path, hub: list[str]) -> None:
    """Nothing is fetched then; the embedding may be stored under both of its names."""
    theirs = generations["third"]
    folder = shutil.copytree(theirs.folder, tmp_path / "whole")
    theirs.tokenizer.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["decoder.token_embedding.weight"] = state["decoder.head.weight"].clone()
    save_file(state, folder / "model.safetensors")
    model, processor = load_model(folder)
    assert not hub
    (ours,) = logits_of(model, processor, [[user(A, B, QUESTION)]])
    torch.testing.assert_close(ours, theirs.logits([A, B], QUESTION), **CLOSE)


def test_errors_name_what_does_not_fit(generations: dict[str, Theirs], tmp_path: Path) -> None:
    check_account(generations["third"].folder, tmp_path, "MP.proj.weight")
    values = json.loads((generations["third"].folder / "config.json").read_text())
    tokens = values["vlm_extra_tokens"]
    folder = tmp_path / "changed"
    shutil.copytree(generations["third"].folder, folder)
    for changes, message in (
        ({"lm_n_heads": None}, "lacks 'lm_n_heads'"),
        ({"lm_attn_scaling": 0.5}, "only lm_attn_scaling 1.0"),
        ({"vit_cls_flag": True}, "vit_cls_flag"),
        ({"mp_image_token_length": 64}, "mp_pixel_shuffle_factor 2 and mp_image_token_length 64 do not fit 4 x 4"),
        ({"mp_pixel_shuffle_factor": 3}, "mp_pixel_shuffle_factor 3"),
        ({"lm_tokenizer": None}, "lm_tokenizer does not name a tokenizer"),
        ({"vlm_extra_tokens": {**tokens, "r2c1": "<r2c1>"}}, "r2c1 must be <row_2_col_1>"),
        ({"vlm_extra_tokens": {"boi_token": "a", "image_token": "b"}}, "boi_token are not supported"),
        ({"vlm_extra_tokens": {"global_image_token": "a"}}, "has no image_token"),
        ({"vlm_extra_tokens": {"image_token": 1}}, "must map names to tokens"),
    ):
        changed = {key: value for key, value in (values | changes).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message) as caught:
            load_model(folder)
        assert str(folder / "config.json") in str(caught.value)
