"""The benchmark of training on a GPU, tiny and on the CPU: both sides learn the same, and what it reports is there."""

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_gpt.model import mmgpt

SCRIPT = Path(__file__).parent.parent / "examples/benchmarks/gpu_training.py"
TINY = {"size": "tiny", "rows": 2, "length": 128, "steps": 1, "warmup": 1, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    if not SCRIPT.is_file():
        pytest.skip("the examples are not installed")
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def measure(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(mmgpt, "uses_blocks", mmgpt.uses_blocks)  # which a variant replaces
    return lambda name, **changes: script["measure"](name, argparse.Namespace(**(TINY | {"peak": 1e12} | changes)))


def test_all_variants_compute_the_same_loss(measure: Any) -> None:
    """Another model, or another batch, would make their speeds say nothing."""
    found = {name: measure(name) for name in ("plain", "selective", "full", "sharded", "transformers")}
    first = {name: values["first_loss"] for name, values in found.items()}
    assert all(loss == pytest.approx(first["plain"], abs=2e-4) for loss in first.values()), first
    for values in found.values():
        assert values["tokens_per_s"] > 0
        assert values["mfu"] > 0
        assert values["peak_memory"] > 2**20
        assert values["flops_per_token"] == found["plain"]["flops_per_token"]


@pytest.mark.parametrize("name", ["saving at once", "saving in the background"])
def test_what_a_checkpoint_costs(measure: Any, name: str) -> None:
    values = measure(name)
    assert values["save_blocks_s"] > 0
    assert values["steps_beside_longer_s"] >= 0
    if name == "saving at once":
        assert values["steps_beside_longer_s"] == 0


def test_packed_rows(script: dict[str, Any], measure: Any) -> None:
    batch = script["make_batch"](512, 2, 1024, packed=True, seed=0)
    assert batch.document_ids.max() > 1
    ends = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    assert (batch.labels[:, :-1][ends] == -100).all()
    assert (batch.position_ids[:, 1:][ends] == 0).all()
    plain, packed = measure("plain", length=1024), measure("packed masked", length=1024)
    assert packed["flops_per_token"] < plain["flops_per_token"]  # attention within documents


@pytest.mark.slow
def test_the_command_writes_its_result(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    options = [f"--{key}={value}" for key, value in TINY.items()]
    script["main"]([*options, "--variants", "plain", "packed blocks", f"--out={out}"])
    found = json.loads(out.read_text())
    assert list(found["variants"]) == ["plain"]
    assert found["peak"] == "measured"
    assert found["torch"] == torch.__version__
    assert found["parameters"]["total"] > 0
    assert "packed blocks: left out" in capsys.readouterr().out
