"""What the tests of imported model families share: our side of a comparison, and the doors that all go through."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mm_gpt
from mm_gpt.commands.cli import main
from mm_gpt.config import to_dict
from mm_gpt.document import Image, Message
from mm_gpt.errors import CheckpointError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Example, Processor, collate
from mm_gpt.training.language import LanguageTask
from mm_gpt.training.loop import train
from mm_gpt.training.recipes import finetune

CLOSE = {"atol": 1e-4, "rtol": 0.0}
"""Logits of about 1 in float32, in which sums of other order differ by 1e-6; a wrong epsilon shows at 1e-3."""


def roughen(model: nn.Module, scale: float = 0.15) -> None:
    """Random weights that are nowhere at a value that hides them: norms are not 1, biases not 0, pictures matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def user(*parts: Any) -> Message:
    return {"role": "user", "content": list(parts)}


def examples_of(processor: Processor, chats: list[list[Message]]) -> list[Example]:
    return [processor(processor.chat(chat)) for chat in chats]


@torch.inference_mode()
def logits_of(model: MMGPT, processor: Processor, chats: list[list[Message]]) -> list[Tensor]:
    """Logits of every real position of each chat, from one batch padded on the left."""
    examples = examples_of(processor, chats)
    batch = collate([[e] for e in examples], processor.pixels(examples), pad_left=True)
    logits = model.decoder.logits(model(batch))
    return [row[-len(example) :] for row, example in zip(logits, examples, strict=True)]


def check_answers(folder: Path, picture: PILImage.Image, question: str, expected: list[int], tmp_path: Path) -> None:
    """`ask`, `caption`, `chat(stream=True)` and the command line; `expected` are the ids of greedy decoding."""
    assistant = mm_gpt.load(folder, device="cpu")
    options: Any = {"max_new_tokens": len(expected), "no_repeat_ngram_size": 0}
    answer = assistant.ask(picture, question, logprobs=True, **options)
    assert answer.logprobs is not None
    assert [token.id for token in answer.logprobs] == expected
    captions = assistant.caption([picture, make_picture(7, (50, 20))], prompt=question, num_beams=1, **options)
    assert captions[0] == answer
    stream = assistant.chat([user(picture, question)], stream=True, **options)
    assert "".join(stream).strip() == answer
    assert assistant.conversation(**options).say([Image(picture), question]) == answer
    picture.save(tmp_path / "shown.png")
    assert main(["ask", str(tmp_path / "shown.png"), question, "--model", str(folder), "--max-new-tokens", "3"]) == 0


def captioned_folder(folder: Path) -> Path:
    """Six pictures with a caption each; the second, which is not held out, has two."""
    folder.mkdir()
    for number in range(6):
        make_picture(number).save(folder / f"{number}.png")
        more = "\none more of it" if number == 1 else ""
        (folder / f"{number}.txt").write_text(f"a picture of number {number}{more}")
    return folder


def check_finetuning(start: Path, folder: Path, chats: list[list[Message]], **changes: Any) -> LanguageTask:
    """Two steps of the recipe `finetune`, and the saved model against the one in memory."""
    data = captioned_folder(folder / "pictures")
    recipe = finetune(str(data))
    train_config = dataclasses.replace(recipe.train, steps=2, precision="fp32", device="cpu")
    recipe = dataclasses.replace(recipe, start=str(start), train=train_config, **changes)
    task = LanguageTask(recipe)
    before = logits_of(task.model.eval(), task.processor, chats)
    task.model.train()
    train(task, recipe.train, folder / "run", progress=False, describe=to_dict(recipe))
    after = logits_of(task.model.eval(), task.processor, chats)
    again = logits_of(*load_model(folder / "run/best"), chats)
    for old, new, loaded in zip(before, after, again, strict=True):
        assert not torch.equal(old, new)
        # Matrices are stored in half precision: 11 bits of each weight.
        torch.testing.assert_close(loaded, new, atol=2e-2, rtol=0.0)
    return task


def check_account(folder: Path, tmp_path: Path, name: str) -> None:
    """A checkpoint without the tensor `name`, and with one that nobody knows, is refused with both names."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["a.tensor.of.nobody"] = state.pop(name)
    save_file(state, broken / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"lacks 1 tensor \({re.escape(name)}\).*a\.tensor\.of\.nobody.* left over"
    ):
        load_model(broken)


def as_published(folder: Path, target: Path, config: dict[str, Any], rename: dict[str, str], images: str) -> Path:
    """A copy as the family's public repositories are: `config`, tensors renamed by their beginnings, two shards with an
    index, and image settings (JSON) in a file of their own."""
    target.mkdir()
    for path in folder.iterdir():
        if path.name not in ("config.json", "processor_config.json", "model.safetensors"):
            shutil.copy(path, target)
    (target / "config.json").write_text(json.dumps(config))
    (target / "preprocessor_config.json").write_text(images)
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next((old for old in rename if name.startswith(old)), "")
        state[rename.get(old, "") + name.removeprefix(old)] = tensor
    names = sorted(state)
    weight_map = {}
    for number, shard in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in shard}, target / file)
        weight_map |= dict.fromkeys(shard, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target
