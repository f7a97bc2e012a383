"""Safetensors into modules: every type and transformation, shards, threads, and what it costs in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from mm_gpt.errors import CheckpointError
from mm_gpt.hub import weights
from mm_gpt.hub.weights import (
    CHUNK_BYTES,
    MAPPED_BYTES,
    Checkpoint,
    Table,
    WeightLoader,
    open_safetensors,
    plus_one,
    read_header,
    read_json,
    same,
    times,
    transposed,
    unfilled,
    written,
)

WIDE = CHUNK_BYTES // 2 + 3
"""Numbers in a tensor that takes several chunks in every type, the last one not full."""


class Module(nn.Module):
    """A parameter for each kind of origin."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.empty(WIDE))
        self.stacked = nn.Parameter(torch.empty(7, 4))
        self.turned = nn.Parameter(torch.empty(3, 5))
        self.norm = nn.Parameter(torch.empty(6))
        self.scaled = nn.Parameter(torch.empty(6))
        self.single = nn.Parameter(torch.empty(()))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(11))


TABLE: Table = {
    "wide": same("w"),
    "stacked": same("q", "k", "v"),
    "turned": transposed("t"),
    "norm": plus_one("n"),
    "scaled": times("s", 2.5),
    "single": same("one"),
    "nothing": same("none"),
    "layers.{i}.weight": same("l.{i}.w"),
    "layers.{i}.bias": same("l.{i}.b"),
}


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (WIDE,), "q": (4, 4), "k": (2, 4), "v": (1, 4), "t": (5, 3), "n": (6,), "s": (6,), "one": ()}
    shapes |= {"none": (0, 4)}
    for layer in range(11):
        shapes |= {f"l.{layer}.w": (2, 2), f"l.{layer}.b": (2,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def empty_module() -> Module:
    with unfilled():
        return Module()


def expected(stored: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    state = {
        "wide": stored["w"],
        "stacked": torch.cat([stored[name] for name in "qkv"]),
        "turned": stored["t"].T,
        "norm": stored["n"].float() + 1,
        "scaled": stored["s"].float() * 2.5,
        "single": stored["one"],
        "nothing": stored["none"],
    }
    for layer in range(11):
        state |= {f"layers.{layer}.weight": stored[f"l.{layer}.w"], f"layers.{layer}.bias": stored[f"l.{layer}.b"]}
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def write(folder: Path, state: dict[str, Tensor], *, shards: int = 1) -> None:
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return
    names, files = sorted(state), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: state[name] for name in names[number::shards]}, folder / file)
        files |= dict.fromkeys(names[number::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_type_and_origin(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, shards: int) -> None:
    """The numbers are those of safetensors' own reader: a chunk that begins one number late reads plausible ones."""
    write(tmp_path, tensors(stored), shards=shards)
    module, checkpoint = empty_module(), Checkpoint(tmp_path)
    checkpoint.load(module, TABLE, dtype=dtype)
    checkpoint.finish()
    for name, tensor in expected(tensors(stored), dtype).items():
        assert module.state_dict()[name].dtype == dtype
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=0, atol=0)


def test_parameters_that_exist_stay_where_they_are(tmp_path: Path) -> None:
    """A module that is not on the meta device keeps its device and whether it is trained."""
    write(tmp_path, tensors())
    module = Module().requires_grad_(False)
    Checkpoint(tmp_path).load(module, TABLE, dtype=torch.float16)
    assert not any(p.requires_grad or p.is_meta for p in module.parameters())
    torch.testing.assert_close(module.wide, tensors()["w"].half(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["in order", "out of order", "in two files", "not aligned"])
def test_matrices_that_are_a_piece_of_the_file(tmp_path: Path, kind: str) -> None:
    """Those are mapped; what is written into them, by training say, never reaches the file, nor the other way round."""
    rows = MAPPED_BYTES // 512
    table = {"layers.{i}.weight": same("{i}.up", "{i}.gate") if kind == "out of order" else same("{i}.gate", "{i}.up")}
    generator = torch.Generator().manual_seed(0)
    state = {f"0.{name}": torch.randn(rows, 128, generator=generator) for name in ("gate", "up")}
    write(tmp_path, state, shards=2 if kind == "in two files" else 1)
    file = tmp_path / "model.safetensors"
    if kind == "not aligned":  # a header that is not padded, as other writers may leave it
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        file.write_bytes((size + 1).to_bytes(8, "little") + content[8 : 8 + size] + b" " + content[8 + size :])
    with unfilled():
        module = nn.ModuleDict({"layers": nn.ModuleList([nn.Embedding(2 * rows, 128)])})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.load(module, table)
    weight = module.get_parameter("layers.0.weight")
    expected = torch.cat([state[name.format(i=0)] for name in table["layers.{i}.weight"].parts])
    torch.testing.assert_close(weight, expected, rtol=0, atol=0)
    if Path("/proc/self/maps").exists():
        assert is_mapped(weight) == (kind == "in order")
    with torch.no_grad():
        weight[0] += 1
    torch.testing.assert_close(checkpoint.tensor("0.gate"), state["0.gate"], rtol=0, atol=0)
    write(tmp_path, {"0.gate": torch.zeros(1)})
    torch.testing.assert_close(weight[1:], expected[1:], rtol=0, atol=0)


def is_mapped(tensor: Tensor) -> bool:
    """Whether the first byte belongs to a safetensors file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(("safetensors", "safetensors (deleted)"))
    return False


def test_there_and_back(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    module = empty_module()
    Checkpoint(tmp_path).load(module, TABLE)
    back = dict(written(module, TABLE, lambda name, parts, rows: [4, 2, 1]))
    assert set(back) == set(tensors())
    for name, tensor in tensors().items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=1e-6)  # the way there and back rounds twice


def test_account(tmp_path: Path) -> None:
    state = tensors()
    for layer in range(6):
        del state[f"l.{layer}.w"]
    write(tmp_path, state | {"new": torch.zeros(1), "head.bias": torch.zeros(1)})
    checkpoint = Checkpoint(tmp_path)
    checkpoint.load(empty_module(), TABLE)
    listed = r"lacks 6 tensors \(l\.0\.w, l\.1\.w, l\.2\.w, l\.3\.w, l\.4\.w, and 1 more\)"
    with pytest.raises(CheckpointError, match=listed + r" and has 1 tensor \(new\) left over"):
        checkpoint.finish([r"head\..*"])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("w", (3,), rf"w has shape \(3,\), not \({WIDE},\)"),
        ("t", (3, 5), r"t has shape \(5, 3\), not \(3, 5\)"),
        ("q", (4, 5), r"q has shape \(4, 5\), not \(4, 4\)"),
        ("v", (2, 4), r"v has shape \(2, 4\), not \(1, 4\)"),
        ("v", (0, 4), r"q, k, v have 6 rows, not 7"),
        ("q", (), r"q has shape \(\), not \(7, 4\)"),
        ("one", (1,), r"one has shape \(1,\), not \(\)"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    """A row too many must not run over into what lies behind."""
    state = tensors() | {name: torch.zeros(shape)}
    write(tmp_path, state)
    for fill in (
        lambda: Checkpoint(tmp_path).load(empty_module(), TABLE),
        lambda: WeightLoader("a.gguf", state).fill(empty_module(), TABLE, state.__getitem__),
    ):
        with pytest.raises(CheckpointError, match=message):
            fill()


def test_one_at_a_time(tmp_path: Path) -> None:
    write(tmp_path, tensors(torch.float16))
    tensor = Checkpoint(tmp_path).tensor("w")
    torch.testing.assert_close(tensor, tensors(torch.float16)["w"], rtol=0, atol=0)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """A mapped file would end the process here; errors of the reading threads must not get lost."""
    write(tmp_path, tensors())
    checkpoint = Checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends in the middle of a tensor"):
        checkpoint.load(empty_module(), TABLE)


def test_a_model_that_no_memory_holds(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.zeros(2)})
    with unfilled():
        module = nn.ParameterDict({"w": nn.Parameter(torch.empty(1 << 50))})
    with pytest.raises(CheckpointError, match=r"no memory for w of shape|w has shape \(2,\)"):
        Checkpoint(tmp_path).load(module, {"w": same("w")})


# ---- files ----


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is in the file, it is read as it is or refused with its name."""
    whole = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    damaged = whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "model.safetensors").write_bytes(damaged)
    problem = "model.safetensors"
    try:
        checkpoint = Checkpoint(folder)
        for name in checkpoint.names:
            checkpoint.tensor(name)
    except CheckpointError as error:
        problem = str(error)
    assert "model.safetensors" in problem


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=40))
def test_damaged_json(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("json") / "config.json"
    path.write_bytes(content)
    problem = str(path)
    try:
        assert isinstance(read_json(path), dict)
    except CheckpointError as error:
        problem = str(error)
    assert str(path) in problem


def test_what_stands_in_place_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a pickle, not safetensors"):
        open_safetensors(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(CheckpointError, match="Git LFS's note of them"):
        open_safetensors(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        open_safetensors(path)


def test_header(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.int8)}, tmp_path / "a", metadata={"a": "b"})
    header = read_header(tmp_path / "a")
    assert {name: (stored.dtype, stored.shape) for name, stored in header.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I8", (4,)),
    }


# ---- cost ----

MEASURE = """
import json, sys
from pathlib import Path
import torch
from mm_gpt.hub.weights import Checkpoint, same, unfilled

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

with unfilled():
    module = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Embedding(3000, 1024) for _ in range(5))})
before = memory("VmRSS")
checkpoint = Checkpoint(Path(sys.argv[1]))
checkpoint.load(module, {"layers.{i}.weight": same("{i}.a", "{i}.b")}, dtype=getattr(torch, sys.argv[2]))
for parameter in module.parameters():
    parameter.detach().max()  # what is mapped counts once it is used
print(json.dumps({"growth": memory("VmHWM") - before, "compiler": "torch._dynamo" in sys.modules}))
"""
# VmHWM and not ru_maxrss, which begins with what the parent of the process held.


@pytest.mark.slow  # a fresh Python that imports torch
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts as Linux does")
@pytest.mark.parametrize(
    ("stored", "dtype"), [("bfloat16", "float32"), ("float32", "float32"), ("float32", "bfloat16")]
)
def test_memory(tmp_path: Path, stored: str, dtype: str) -> None:
    """A second copy of the weights, even of those in one file, would be the limit of what can be loaded."""
    part = torch.ones(1500, 1024, dtype=getattr(torch, stored))
    write(tmp_path, {f"{n}.{part_name}": part.clone() for n in range(5) for part_name in "ab"}, shards=2)
    size = 5 * 3000 * 1024 * getattr(torch, dtype).itemsize  # 61 MB in float32
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 * size < result["growth"] < 1.3 * size
    assert not result["compiler"]


def test_nothing_is_drawn() -> None:
    with unfilled():
        module = nn.Sequential(nn.Linear(3, 3), nn.Embedding(3, 3), nn.LayerNorm(3), nn.Conv2d(3, 3, 2))
        nn.init.trunc_normal_(module[0].weight)
        nn.init.xavier_uniform_(tensor=module[0].weight)
    assert all(p.is_meta for p in module.parameters())
    linear = nn.Linear(3, 3)
    assert linear.weight.std() > 0  # only inside


def test_types_that_are_no_weights(tmp_path: Path) -> None:
    assert set(weights.DTYPES) == {"F64", "F32", "F16", "BF16"}
    write(tmp_path, {"w": torch.ones(4, 4, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match="w is stored as I8; quantised weights are not read"):
        Checkpoint(tmp_path).load(nn.ParameterDict({"w": nn.Parameter(torch.ones(4, 4))}), {"w": same("w")})
