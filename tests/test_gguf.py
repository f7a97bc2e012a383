"""GGUF files from strangers: each loads, or is refused in one line that names it."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFValueType, GGUFWriter

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.export.export_model import export_model
from mm_gpt.hub.gguf.file import Fields, read_gguf
from mm_gpt.hub.gguf.reader import load_gguf, read_tokenizer

EXTREMES = [n.to_bytes(8, "little") for n in (0, 1, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 64) - 1)]


@pytest.fixture(scope="module")
def whole(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small Llama as GGUF."""
    out = tmp_path_factory.mktemp("gguf") / "out"
    export_model(tiny_model_folder, out, format="gguf", decoder_only=True)
    (path,) = out.glob("*.gguf")
    return path.read_bytes()


def mutants(whole: bytes, count: int) -> Iterator[bytes]:
    """The file with one thing wrong: a byte, a number, a piece too many or too few, or the end."""
    draw = random.Random(0)
    end = whole.rindex(b"blk.") + 100  # what says how the rest is read
    for number in range(count):
        # Half of them near the beginning: counts, sizes and heads stand before the long vocabulary
        at = draw.randrange(1500 if number % 2 else end)
        kind = draw.randrange(6)
        if kind == 0:
            yield whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :]
        elif kind == 1:
            piece = draw.choice(EXTREMES)[: draw.choice((4, 8))]
            yield whole[:at] + piece + whole[at + len(piece) :]
        elif kind == 2:
            yield whole[:at] + whole[at + draw.randrange(1, 40) :]
        elif kind == 3:
            yield whole[:at] + draw.randbytes(draw.randrange(1, 40)) + whole[at:]
        elif kind == 4:
            yield whole[: draw.randrange(len(whole))]
        else:
            other = draw.randrange(end)
            yield whole[:at] + whole[other : other + 16] + whole[at + 16 :]


def refusal(path: Path) -> str | None:
    """What is said about a file that does not load."""
    try:
        _, fields = load_gguf(path)
        read_tokenizer(fields)
    except CheckpointError as error:
        return str(error)
    return None


def test_every_mutant_loads_or_is_refused_in_one_line(whole: bytes, tmp_path: Path) -> None:
    """Stops: a traceback, a loop over 2^64 values that are not there, memory for a size that nobody has."""
    path = tmp_path / "a.gguf"
    loaded = 0
    for mutant in mutants(whole, 300):
        path.write_bytes(mutant)
        message = refusal(path)
        loaded += message is None
        if message is not None:
            assert str(path) in message
            assert "\n" not in message
            assert len(message) < 1000
    assert 0 < loaded < 150


KEYS = {
    "llama.block_count": (0, -1, 3.5, "3", True, 10**9, 4, [3]),
    "llama.embedding_length": (0, -48, 48.0, "48", 1 << 40, 49, []),
    "llama.context_length": (0, -1, "256", 1 << 62),
    "llama.attention.head_count": (0, -6, 5, "6", [6, 6, 6]),
    "llama.attention.head_count_kv": (0, 4, -2, "2", [2, 2, 2]),
    "llama.attention.key_length": (0, 3, -8, "8", 1 << 40),
    "llama.attention.value_length": (16, "8"),
    "llama.attention.layer_norm_rms_epsilon": (0.0, -1.0, float("nan"), float("inf"), "1e-5", True),
    "llama.rope.freq_base": (0.0, -1.0, float("nan"), float("inf"), "10000"),
    "llama.rope.dimension_count": (0, 4, 7, "8"),
    "llama.rope.scaling.type": ("yarn", 3, ["linear"]),
    "llama.feed_forward_length": (0, -1, 97, "96"),
    "general.architecture": ("bert", 3, ["llama"]),
    "tokenizer.ggml.model": ("llama", 1),
    "tokenizer.ggml.pre": ("default", 1, ["smollm"]),
    "tokenizer.ggml.tokens": ("abc", [1, 2], ["a", "a"], []),
    "tokenizer.ggml.merges": ("a b", [1], ["ab"], ["never seen"]),
    "tokenizer.ggml.token_type": ("1", [1], ["1"], 1),
    "tokenizer.ggml.eos_token_id": (-1, 1 << 31, "0", 1.0, [0]),
}


@pytest.mark.parametrize("key", KEYS)
def test_each_field_is_checked_in_type_and_range(
    key: str, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm_gpt.hub.gguf import reader

    path = tmp_path / "a.gguf"
    path.write_bytes(whole)
    file = read_gguf(path)
    for value in KEYS[key]:
        changed = Fields({**file.fields, key: value}, str(path))
        monkeypatch.setattr(reader, "read_gguf", lambda _, fields=changed: type(file)(fields, file.tensors))
        message = refusal(path)
        assert message is not None, value
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert len(message) < 500


def test_lengths_are_compared_with_the_bytes_that_exist(tmp_path: Path) -> None:
    """2^60 texts in a file of a hundred bytes; arrays of arrays without end; a tensor larger than its file."""
    path = tmp_path / "a.gguf"
    name = struct.pack("<Q", 1) + b"x"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + name
    nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50
    tensor = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + name
    for content, message in (
        (head + struct.pack("<IIQ", 9, 8, 1 << 60), f"a field of {1 << 60} values"),
        (head + struct.pack("<IIQ", 9, 0, 1 << 20), "1048576 bytes at"),
        (head + struct.pack("<IQ", 8, 1 << 60), f"{1 << 60} bytes at"),
        (head + nested, "a field of type 9"),
        (head + struct.pack("<I", 77), "a field of type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "8 bytes at"),
        (tensor + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0), "reaches beyond the end"),
        (tensor + struct.pack("<IQIQ", 1, 32, 99, 0), "the unknown quantisation 99"),
        (tensor + struct.pack("<IQIQ", 1, 33, 8, 0), "rows of 33 values of x are no whole blocks of Q8_0"),
        (tensor + struct.pack("<I", 1 << 31), f"x has {1 << 31} dimensions"),
        (b"GGUF" + struct.pack("<I", 3 << 24), "version 50331648"),
        (b"", "empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_gguf(path)


def test_all_types_of_fields(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    expected = {"text": "é", "yes": True, "no": False, "list": [1, -2, 3], "floats": [0.5, -1.0], "texts": ["a", "ß"]}
    numbers = {"INT8": -3, "UINT8": 250, "INT16": -300, "UINT16": 60_000, "INT32": -70_000, "UINT32": 1 << 31}
    numbers |= {"INT64": -(1 << 40), "UINT64": 1 << 63, "FLOAT32": 0.25, "FLOAT64": 0.1}
    for name, value in numbers.items():
        writer.add_key_value(name, value, GGUFValueType[name])
    writer.add_string("text", "é")
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    for name in ("list", "floats", "texts"):
        writer.add_array(name, expected[name])  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = read_gguf(tmp_path / "a.gguf").fields
    assert fields == {"general.architecture": "llama", **numbers, **expected}
    assert all(type(fields[name]) is type(value) for name, value in (numbers | expected).items())
