"""Matrix products in int8 and bfloat16: exact against integers, the same bits whoever else is in the batch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mm_gpt.errors import MMGPTError
from mm_gpt.kernels import gemm as kernels
from mm_gpt.kernels.full_attention import attend, room_for_heads
from mm_gpt.kernels.gemm import MAX_COLUMNS, Kind, gemm, pack
from mm_gpt.kernels.tiles import missing, run

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SIZES = [(1, 1), (3, 5), (64, 64), (65, 63), (127, 130), (200, 768)]
KINDS: tuple[Kind, ...] = ("int8", "bf16")


def bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().double().numpy()


def whole_numbers(rows: int, columns: int, low: int, high: int, seed: int = 0) -> np.ndarray:
    """With both ends in each row, so that its scale is known."""
    values = np.random.default_rng(seed).integers(low, high + 1, (rows, columns))
    values[:, 0], values[:, -1] = low, high
    return values


@pytest.mark.parametrize(("n", "k"), [(1, 2), (3, 5), (64, 64), (65, 63), (130, 515)])
@pytest.mark.parametrize("low", [0, -100, -255])
def test_sums_of_integers_are_exact(n: int, k: int, low: int) -> None:
    """M = 1 to 33, odd N and K, against int64. Stops: sums that saturate, a wrong zero point, padding that counts."""
    weights = whole_numbers(n, k, -127, 127)
    packed = pack(weights.astype(np.float32), None, "int8")
    for m in range(1, 34):
        x = whole_numbers(m, k, low, low + 255, seed=m)
        assert (gemm(x.astype(np.float32), packed) == (x @ weights.T).astype(np.float32)).all()


@pytest.mark.parametrize("weight", [-127, 127])
@pytest.mark.parametrize("k", [4096, MAX_COLUMNS])
def test_the_largest_sums_are_exact(weight: int, k: int) -> None:
    """255 * 127 in each place: what saturates in int16 pairs, and at `MAX_COLUMNS` comes close to the end of int32."""
    packed = pack(np.full((2, k), weight, np.float32), None, "int8")
    for value in (255, -255):
        sums = gemm(np.full((1, k), value, np.float32), packed)
        assert (sums == np.float32(np.int64(value) * weight * k)).all()


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_bf16_is_the_product_of_rounded_values(n: int, k: int) -> None:
    generator = np.random.default_rng(0)
    weights, bias = (generator.standard_normal(shape, dtype=np.float32) for shape in ((n, k), n))
    packed = pack(weights, bias, "bf16")
    for m in (1, 6, 33):
        x = generator.standard_normal((m, k), dtype=np.float32)
        expected = bf16(x) @ bf16(weights).T + bias
        np.testing.assert_allclose(gemm(x, packed), expected, atol=1e-6 * k**0.5, rtol=1e-5)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int8_is_close(n: int, k: int) -> None:
    """To about a hundredth, as 8 bits allow; in one place, exactly."""
    generator = np.random.default_rng(0)
    weights, bias = (generator.standard_normal(shape, dtype=np.float32) for shape in ((n, k), n))
    x = generator.standard_normal((50, k), dtype=np.float32)
    expected = x @ weights.T
    error = gemm(x, pack(weights, bias, "int8")) - bias - expected
    assert np.linalg.norm(error) < 0.015 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_do_not_depend_on_its_company(kind: Kind) -> None:
    """Whatever the number of rows and threads, and wherever the row stands."""
    generator = np.random.default_rng(0)
    packed = pack(generator.standard_normal((200, 130), dtype=np.float32), None, kind)
    x = generator.standard_normal((150, 130), dtype=np.float32)
    alone = np.concatenate([gemm(row[None], packed) for row in x])
    assert alone.std() > 1
    for threads in (1, 2, 3):
        for m in (2, 7, 64, 150):
            assert (gemm(x[-m:], packed, threads=threads) == alone[-m:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_constants(kind: Kind) -> None:
    packed = pack(np.eye(8, dtype=np.float32), np.arange(8, dtype=np.float32), kind)
    x = np.array([[0.0] * 8, [2.0] * 8, [-2.0] * 8, [1e-42] * 8], np.float32)
    np.testing.assert_array_equal(gemm(x, packed), np.arange(8) + np.array([[0], [2], [-2], [0]]))
    assert gemm(x[:0], packed).shape == (0, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(kind: Kind, bad: float) -> None:
    """Stops: a NaN that quantising turns into a number."""
    packed = pack(np.ones((3, 70), np.float32), None, kind)
    x = np.ones((5, 70), np.float32)
    x[2, 69] = bad
    out = gemm(x, packed)
    assert not np.isfinite(out[2]).any()
    assert (np.delete(out, 2, axis=0) == 70).all()


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(MMGPTError, match="not finite"):
        pack(np.array([[np.inf, 1]], np.float32), None, "int8")
    with pytest.raises(MMGPTError, match="0 x 3"):
        pack(np.ones((0, 3), np.float32), None, "bf16")
    with pytest.raises(MMGPTError, match="65537 columns"):
        pack(np.ones((1, MAX_COLUMNS + 1), np.float32), None, "int8")
    with pytest.raises(ValueError, match="rows of 4"):
        gemm(np.ones((2, 3), np.float32), pack(np.ones((2, 4), np.float32), None, "int8"))


ACTIVATIONS: list[tuple[int, Any]] = [
    (kernels.GELU, F.gelu),
    (kernels.GELU_TANH, lambda x: F.gelu(x, approximate="tanh")),
    (kernels.QUICK_GELU, lambda x: x * torch.sigmoid(1.702 * x)),
]


@pytest.mark.parametrize(("activation", "reference"), ACTIVATIONS)
def test_activations(activation: int, reference: Any) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4001), [0, -0.0, 1e30, -1e30, 1e-30]]).astype(np.float32)
    expected = reference(torch.from_numpy(x).double()).numpy()
    kernels.activate(x[None], activation)
    np.testing.assert_allclose(x, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("centred", [True, False])
def test_norms(centred: bool) -> None:
    torch.manual_seed(0)
    x, gain, offset = torch.randn(7, 50) * 3 + 1, torch.randn(50), torch.randn(50)
    out = np.zeros((4, 50), np.float32)
    offset = offset if centred else torch.zeros(50)
    kernels.normalise_rows(x.numpy(), 2, 6, (centred, gain.numpy(), offset.numpy(), 1e-6), out)
    expected = F.layer_norm(x, (50,), gain, offset, 1e-6) if centred else F.rms_norm(x, (50,), gain, 1e-6)
    np.testing.assert_allclose(out, expected[2:6].numpy(), atol=1e-5)


def attention(qkv: torch.Tensor, heads: int, threads: int = 1) -> torch.Tensor:
    """(N, T, 3 * H * C) to (N, T, H * C)."""
    images, tokens, width = qkv.shape
    rows = room_for_heads(images * tokens, width)
    kernels.to_bf16(qkv.view(-1, width).numpy(), 0, images * tokens, rows, 0)
    return torch.from_numpy(attend(rows, images, heads, threads=threads)).view(images, tokens, -1)


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 2), (5, 3, 20), (64, 2, 64), (77, 2, 72), (200, 1, 130)])
@pytest.mark.parametrize("scale", [1, 30])
def test_attention(tokens: int, heads: int, size: int, scale: int) -> None:
    """Any number of tokens and features; also where nearly all weight is on one key."""
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * heads * size)
    qkv[..., : heads * size] *= scale
    q, k, v = (y.view(2, tokens, heads, size).transpose(1, 2) for y in qkv.bfloat16().double().chunk(3, dim=-1))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    found = attention(qkv, heads)
    assert (found - expected).norm() < 0.005 * expected.norm()
    for threads in (1, 2, 3):  # the same bits, also without the other image
        assert torch.equal(attention(qkv[1:], heads, threads), found[1:])


def test_attention_lets_nan_through() -> None:
    qkv = torch.ones(1, 9, 3 * 16)
    qkv[0, 3, 5] = torch.nan  # a query
    out = attention(qkv, 1)[0]
    assert out[3].isnan().all()
    np.testing.assert_allclose(np.delete(out, 3, axis=0), 1, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_item_is_done_once_and_errors_come_out(threads: int) -> None:
    done: list[int] = []
    run(done.append, range(100), threads)
    assert sorted(done) == list(range(100))

    def fail(item: int) -> None:
        done.append(item)
        if item == 7:
            raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        run(fail, range(20), threads)
    run(done.append, [1000], threads)  # the threads live on
    assert done[-1] == 1000
