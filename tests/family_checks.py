"""What the tests of imported model families share: our side of a comparison, and the doors that all families go through."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_picture
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mm_gpt
from mm_gpt.cli import main
from mm_gpt.document import Message
from mm_gpt.errors import CheckpointError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Example, Processor, collate
from mm_gpt.training.language import LanguageRecipe, LanguageTask
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
    picture.save(tmp_path / "shown.png")
    assert main(["ask", str(tmp_path / "shown.png"), question, "--model", str(folder), "--max-new-tokens", "3"]) == 0


def captioned_folder(folder: Path) -> Path:
    """Six pictures with a caption each, and a second one for the first."""
    folder.mkdir()
    rows = ["file_name,caption"]
    for number in range(6):
        make_picture(number).save(folder / f"{number}.png")
        rows.append(f"{number}.png,a picture of number {number}")
    (folder / "captions.csv").write_text("\n".join([*rows, "0.png,one more of it"]))
    return folder


def finetuned(start: Path, data: Path, **changes: Any) -> LanguageTask:
    """Two steps of the recipe `finetune` from `start`; every parameter that is trained gets a finite gradient."""
    recipe: LanguageRecipe = finetune(str(data))
    train = dataclasses.replace(recipe.train, steps=2, lr=1e-2, warmup_steps=1, precision="fp32", device="cpu")
    task = LanguageTask(dataclasses.replace(recipe, start=str(start), train=train, row_length=128, **changes))
    groups = task.parameter_groups()
    optimizer = torch.optim.SGD([p for group in groups for p in group.parameters if p.requires_grad], lr=1e-2)
    task.model.train()
    for step in range(2):
        optimizer.zero_grad()
        for batch in task.micro_batches(step, 1):
            loss, count = task.loss(batch)
            (loss / count).backward()
        assert count > 0
        for group in groups:
            for parameter in group.parameters:
                if parameter.requires_grad:
                    assert parameter.grad is not None
                    assert parameter.grad.isfinite().all()
        optimizer.step()
    task.model.eval()
    return task
