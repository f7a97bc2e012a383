"""What is reported about quantised weights."""

import argparse
import runpy
from pathlib import Path

import pytest
import torch
from conftest import make_picture

import mm_gpt

EXAMPLE = runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples/quantisation_quality.py"))


def test_divergence() -> None:
    """Its direction and unit."""
    p, q = (torch.tensor([logits]).log_softmax(-1) for logits in ([2.0, 1.0, 0.0], [1.9, 1.1, 0.0]))
    divergences = EXAMPLE["divergences"]
    assert divergences(p, q).item() == pytest.approx(0.0037597, abs=5e-7)
    assert divergences(q, p).item() == pytest.approx(0.0038509, abs=5e-7)
    assert divergences(p, p).item() == 0


def test_what_is_compared() -> None:
    p = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]).log_softmax(-1)
    q = torch.tensor([[1.9, 1.1, 0.0], [0.0, 3.0, 1.0]]).log_softmax(-1)
    found = EXAMPLE["compared"]([p[:1], p[1:]], iter([q[:1], q[1:]]))
    assert found["same_first_choice"] == 0.5
    assert found["positions"] == 2
    assert found["kl_99.9"] <= (p.exp() * (p - q)).sum(-1).max() < 2 * found["mean_kl"]


def test_perplexity() -> None:
    logprobs = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]).log()
    assert EXAMPLE["perplexity"]([logprobs], [torch.tensor([0, 1, 0])]) == pytest.approx((1 / (0.75 * 0.5)) ** 0.5)


def test_scores_of_a_task(tiny_model_folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        make_picture(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("A red circle on a blue ground.")
    args = argparse.Namespace(captioning=str(tmp_path), vqa=None, model=str(tiny_model_folder), limit=2)
    assistant = mm_gpt.load(tiny_model_folder, dtype="int8")
    found = EXAMPLE["scores"](assistant, args, "int8")
    assert found.keys() == {"captioning"}
    assert found["captioning"]
