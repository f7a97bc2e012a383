"""Packed layers against torch's, for every way to store a weight."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mm_gpt.kernels.formats import FORMATS, PLAIN, quantize
from mm_gpt.model import packed
from mm_gpt.model.packed import PLAIN_DTYPES, Matrix, PackedEmbedding, PackedLinear, multiplies_bf16, unfill


def matrix(weight: Tensor, kind: str) -> Matrix:
    if kind in PLAIN:
        return Matrix(kind, weight.to(PLAIN_DTYPES[kind]))
    return Matrix(kind, torch.from_numpy(quantize(weight.numpy(), kind)))


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """With both kinds of processors; the relative error that multiplying adds to that of the weights."""
    monkeypatch.setattr(packed, "multiplies_bf16", lambda: request.param)
    return 6e-3 if request.param else 1e-6


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_kind(kind: str, product: float) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 256), torch.randn(2, 3, 256)
    stored = matrix(weight, kind)
    values = stored.values(0, 24)
    assert (stored.rows, stored.columns, values.dtype) == (24, 256, torch.float32)
    torch.testing.assert_close(stored.values(5, 9), values[5:9], rtol=0, atol=0)
    layer = PackedLinear(256, 24, bias=True)
    layer.parts = [stored]
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias.normal_()
    y, expected = layer(x), x @ values.t() + layer.bias
    assert y.dtype == torch.float32
    assert (y - expected).norm() <= product * expected.norm()


def test_parts_of_different_kinds(product: float) -> None:
    """Files of the Llama family may store q and k in 4 bits and v in 6."""
    torch.manual_seed(0)
    weight, x = torch.randn(40, 256), torch.randn(7, 256)
    layer = PackedLinear(256, 40, bias=False)
    layer.parts = [matrix(weight[:20], "Q4_K"), matrix(weight[20:30], "Q6_K"), matrix(weight[30:], "F32")]
    expected = x @ torch.cat([part.values(0, part.rows) for part in layer.parts]).t()
    assert (layer(x) - expected).norm() <= product * expected.norm()


def test_tiles_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix larger than a tile, expanded by several threads, to the last row."""
    torch.manual_seed(0)
    monkeypatch.setattr(packed, "TILE", 64 * 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight, x = torch.randn(150, 64), torch.randn(5, 64)
    stored = matrix(weight, "Q5_1")
    assert list(stored.tiles()) == [(0, 64), (64, 128), (128, 150)]
    torch.testing.assert_close(stored.product(x), x @ stored.values(0, 150).t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "BF16", "Q6_K"])
def test_embedding(kind: str) -> None:
    torch.manual_seed(0)
    embedding = PackedEmbedding(10, 256)
    embedding.matrix = matrix(torch.randn(10, 256), kind)
    ids = torch.tensor([[3, 0], [9, 3]])
    rows = embedding(ids)
    assert rows.shape == (2, 2, 256)
    torch.testing.assert_close(rows[1], embedding.matrix.values(0, 10)[[9, 3]], rtol=0, atol=0)
    with pytest.raises(IndexError):
        embedding(torch.tensor([10]))


def test_unfilled_modules_take_the_places() -> None:
    module = nn.ModuleDict({"embedding": nn.Embedding(3, 4), "position_embedding": nn.Embedding(3, 4)})
    module["inner"] = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5))
    unfill(module)
    assert isinstance(module["embedding"], PackedEmbedding)
    assert isinstance(module["position_embedding"], nn.Embedding)
    assert [name for name, _ in module.named_parameters()] == [
        "position_embedding.weight",
        "inner.0.bias",
        "inner.1.weight",
        "inner.1.bias",
    ]


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512_bf16 avx2", True), ("amx_bf16", True), ("avx512f avx512_vnni", False)]
)
def test_processors(tmp_path: Path, flags: str, expected: bool) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"model name\t: A\nflags\t\t: fpu {flags}\n")
    assert multiplies_bf16(path) is expected
    assert not multiplies_bf16(tmp_path / "nothing")
