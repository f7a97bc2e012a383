"""Storage formats: the bytes and bits of the reference, wherever it has them, and errors where it has none."""

import subprocess
import sys
from collections.abc import Iterator

import gguf
import numpy as np
import pytest

from mm_gpt.kernels.formats import FORMATS, PLAIN, dequantize, expand_bf16, quantize

REFERENCE = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""What the reference writes; K blocks it only reads."""
K_FORMATS = ("Q4_K", "Q5_K", "Q6_K")
LARGEST = np.finfo(np.float32).max


def cases() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    yield "normal", rng.standard_normal((256, 512))
    yield "zeros", np.zeros((3, 256))
    yield "minus zero", np.full((3, 256), -0.0)
    yield "one-hot", np.eye(256)[:8] * np.array([[1], [-1], [3], [-3], [65504], [-65504], [1e-3], [-7]])
    yield "largest half", rng.choice([65504.0, -65504.0], (8, 256))
    yield "largest", rng.choice([LARGEST, -LARGEST], (8, 256))
    yield "all the largest", np.full((2, 256), LARGEST)
    yield "subnormal", rng.standard_normal((8, 256)) * 1e-40
    yield "scales that are subnormal", rng.standard_normal((8, 256)) * 1e-37
    yield "scales that are subnormal halves", rng.standard_normal((8, 256)) * 1e-6
    yield "halfway", rng.integers(-254, 254, (64, 256)) / 2
    yield "one value", np.full((2, 256), 0.7)
    yield "below zero", -rng.random((8, 256))


CASES = {name: values.astype(np.float32) for name, values in cases()}


def theirs(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bytes_of_the_reference(name: str) -> None:
    for case, values in CASES.items():
        ours = quantize(values, name)
        expected = gguf.quants.quantize(values, theirs(name)).view(np.uint8)
        np.testing.assert_array_equal(ours, expected, err_msg=case)
        np.testing.assert_array_equal(
            bits(dequantize(ours, name)), bits(gguf.quants.dequantize(ours, theirs(name))), err_msg=case
        )


def test_signs_of_zeros_do_not_matter() -> None:
    """Which zero is the least value, and whose sign the minimum has, is left to the processor by the reference."""
    values = np.where(np.random.default_rng(0).random((8, 64)) < 0.5, 0.0, -0.0).astype(np.float32)
    for name in ("Q4_1", "Q5_1"):
        np.testing.assert_array_equal(dequantize(quantize(values, name), name), values)


def test_golden_bytes() -> None:
    """Known bytes, so that both sides do not change together."""
    x = np.linspace(-1.27, 1.27, 32, dtype=np.float32)[None]
    assert quantize(x, "Q8_0")[0, :10].tolist() == [31, 33, 129, 137, 145, 154, 162, 170, 178, 186]
    expected = [20, 49, 128, 145, 145, 162, 162, 179, 179, 196, 196, 213, 213, 230, 230, 247, 247, 248]
    assert quantize(x, "Q4_0")[0].tolist() == expected
    assert quantize(x, "Q4_1")[0, :8].tolist() == [107, 49, 20, 189, 128, 128, 145, 145]


def relative_error(values: np.ndarray, name: str, *, fit: bool = False) -> float:
    restored = dequantize(quantize(values, name, fit=fit), name)
    return float(np.linalg.norm(restored - values) / np.linalg.norm(values))


def test_golden_errors() -> None:
    values = CASES["normal"]
    expected = {
        "Q8_0": 0.0053595,
        "Q5_1": 0.037976,
        "Q5_0": 0.042820,
        "Q4_1": 0.078288,
        "Q4_0": 0.086017,
        "BF16": 0.0016614,
    }
    for name, error in expected.items():
        assert relative_error(values, name) == pytest.approx(error, rel=1e-4)
    # Searched scales against the plain ones of a format of as many bits or more
    assert relative_error(values, "Q4_K") < 0.073
    assert relative_error(values, "Q5_K") < 0.037
    assert relative_error(values, "Q6_K") < 0.018
    assert relative_error(values, "Q4_1", fit=True) < 0.071
    assert relative_error(values, "Q5_1", fit=True) < 0.035


@pytest.mark.parametrize("name", K_FORMATS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_k_blocks_are_read_as_the_reference_does(name: str) -> None:
    for values in CASES.values():
        blocks = quantize(values, name)
        np.testing.assert_array_equal(
            bits(dequantize(blocks, name)), bits(gguf.quants.dequantize(blocks, theirs(name)))
        )
    drawn = np.random.default_rng(1).integers(0, 256, (64, 2 * FORMATS[name].block_bytes), dtype=np.uint8)
    np.testing.assert_array_equal(dequantize(drawn, name), gguf.quants.dequantize(drawn, theirs(name)))


@pytest.mark.parametrize(("name", "plain"), [("Q4_K", "Q4_1"), ("Q5_K", "Q5_1"), ("Q6_K", "Q5_0"), ("Q4_1", "Q4_1")])
def test_searched_scales_are_not_worse(name: str, plain: str) -> None:
    for case in ("normal", "one-hot", "halfway", "below zero", "one value"):
        values = CASES[case]
        assert relative_error(values, name, fit=True) <= relative_error(values, plain) + 6e-4, case


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_largest_values(name: str) -> None:
    """What `largest` allows has finite scales."""
    for sign in (1, -1):
        values = np.zeros((1, 256), np.float32)
        values[0, ::3] = sign * FORMATS[name].largest
        assert np.isfinite(dequantize(quantize(values, name, fit=True), name)).all()


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_sizes_and_bfloat16(name: str) -> None:
    format, values = FORMATS[name], CASES["normal"]
    data = quantize(values, name)
    assert data.shape == (256, format.row_bytes(512))
    assert (format.block, format.block_bytes) == gguf.GGML_QUANT_SIZES[theirs(name)]
    if name not in PLAIN:
        out = np.empty(values.shape, np.uint16)
        expand_bf16(data, name, out)
        np.testing.assert_array_equal(out.view(np.uint8), quantize(dequantize(data, name), "BF16"))
        with pytest.raises(ValueError, match=rf"rows of 40 values are no whole blocks of {name}"):
            quantize(values[:, :40], name)


def test_importing_formats_is_cheap() -> None:
    code = "import sys, mm_gpt.kernels.formats; print([m for m in ('torch', 'numba', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
