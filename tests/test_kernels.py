"""Vector kernels against plain arithmetic: every storage format, every instruction set, threads, key-value blocks."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.kernels import elementwise, matmul
from mm_gpt.kernels import library as libraries
from mm_gpt.kernels.kv_blocks import BLOCK, BlockPool
from mm_gpt.kernels.library import library
from mm_gpt.kernels.processor import ISA, host_isa, isa
from mm_gpt.kernels.simd import F32, I64, Code, Module, Value
from mm_gpt.kernels.team import BASE, default_threads, team, write_barrier
from mm_gpt.kernels.unpack import BLOCK_FORMATS


def level(name: str) -> ISA:
    try:
        return isa(name)
    except ConfigError:
        pytest.skip(f"this processor has no {name}")


def stored(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random weights as they lie in memory, and their values."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)).astype(np.float32)
    if kind == "F32":
        return values, values
    if kind.endswith("_K"):  # the library only reads these: random bytes with scales that make sense
        form = BLOCK_FORMATS[kind]
        blocks = rng.integers(0, 256, (rows * columns // form.block_values, form.block_bytes), dtype=np.uint8)
        for at in (208,) if kind == "Q6_K" else (0, 2):
            blocks[:, at : at + 2] = rng.uniform(0.001, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
        data = blocks.reshape(rows, -1)
    else:
        data = np.ascontiguousarray(quantize(values, Type[kind]))
    return data, dequantize(data, Type[kind])


def product(kind: str, data: np.ndarray, x: np.ndarray, level: ISA, bias: np.ndarray | None = None) -> np.ndarray:
    """x (R, K) times stored weights -> (R, N)."""
    kernels = matmul.kernels(kind, level)
    rows, columns = x.shape
    stride = (columns + 63) // 64 * 256
    prepared = np.zeros((rows, stride), np.uint8)
    for row in range(rows):
        matmul.callable_at(kernels.prepare, 3)(x[row].ctypes.data, columns, prepared[row].ctypes.data)
    out = np.full((rows, len(data)), np.nan, np.float32)
    size = matmul.row_bytes(kind, columns)
    sizes = (columns, 0, len(data), prepared.ctypes.data, stride, rows, out.ctypes.data, 4 * len(data))
    matmul.callable_at(kernels.matmul, 11)(data.ctypes.data, size, *sizes, 0 if bias is None else bias.ctypes.data)
    return out


def round_bf16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().float().numpy()


def quantised(x: np.ndarray) -> np.ndarray:
    """What int16 in blocks of 32 leaves of activations, in float64."""
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    numbers = np.rint(blocks * (np.float32(32767) / np.maximum(largest, 1e-30)))
    return (numbers.astype(np.float64) * largest / 32767).reshape(x.shape)


@pytest.mark.parametrize("kind", matmul.KINDS)
def test_products_and_rows(kind: str) -> None:
    """All rows equal the plain product, and each has the bits that it has alone."""
    columns = {"F32": 77, "F16": 77, "BF16": 77}.get(kind, 512)  # floats end in a part of a vector
    data, values = stored(kind, 7, columns)
    x = np.random.default_rng(1).standard_normal((33, columns)).astype(np.float32)
    bias = np.arange(7, dtype=np.float32)
    out = product(kind, data, x, host_isa(), bias)
    form = matmul.prepared_for(kind)
    seen = {"f32": lambda: x.astype(np.float64), "bf16": lambda: round_bf16(x), "i16": lambda: quantised(x)}[form]()
    expected = seen.astype(np.float64) @ values.T.astype(np.float64) + bias
    # Sums in float32 over a few hundred products; the processor's bfloat16 dot rounds once more for each pair.
    assert np.abs(out - expected).max() < 3e-6 * np.abs(expected).max()
    for rows in (1, 2, 3, 4, 5, 8, 15, 32):
        start = 33 - rows
        np.testing.assert_array_equal(product(kind, data, x[start:], host_isa(), bias), out[start:])


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_1", pytest.param("Q5_K", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_instruction_sets_agree(kind: str, name: str) -> None:
    columns = 256
    data, _ = stored(kind, 5, columns)
    x = np.random.default_rng(1).standard_normal((5, columns)).astype(np.float32)
    lower, highest = product(kind, data, x, level(name)), product(kind, data, x, host_isa())
    if kind == "BF16":  # the processor's dot product rounds in its own way
        assert np.abs(lower - highest).max() < 1e-6 * np.abs(highest).max()
    else:
        np.testing.assert_array_equal(lower, highest)


@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_extreme_numbers_do_not_saturate(name: str) -> None:
    """-128 times -32767, everywhere: what 16-bit sums of pairs would cut off."""
    blocks = np.zeros((1, 2, 34), np.uint8)
    blocks[..., :2] = np.float16(1).reshape(1).view(np.uint8)
    blocks[..., 2:] = 0x80
    x = np.full((1, 64), -32767.0, np.float32)
    assert product("Q8_0", blocks.reshape(1, -1), x, level(name))[0, 0] == 64 * 128 * 32767


def test_blocks_of_zeros_and_nan() -> None:
    data, _ = stored("Q8_0", 3, 64)
    x = np.zeros((3, 64), np.float32)
    x[1, 40] = np.nan
    x[2] = 1e-38
    out = product("Q8_0", data, x, host_isa())
    assert (out[0] == 0).all()
    assert np.isnan(out[1]).all()  # never hidden by a conversion to integers
    assert (np.abs(out[2]) < 1e-30).all()


def test_unknown_instruction_set() -> None:
    with pytest.raises(ConfigError, match="instruction set 'avx1024'"):
        isa("avx1024")


# ---- functions ----


def apply(name: str, write: Callable[[Code, Value], Value], x: np.ndarray) -> np.ndarray:
    def module(module: Module) -> None:
        applying = module.function("apply", 3, exported=True)
        with applying as (code, (source, count, target)), code.loop(0, count * 4, 64) as i:
            code.store(write(code, code.load(source, elementwise.FLOATS, i)), target, i)

    function = matmul.callable_at(library(f"test {name}", host_isa(), module).address("apply"), 3)
    out = np.zeros_like(x)
    function(x.ctypes.data, len(x), out.ctypes.data)
    return out


FUNCTIONS: dict[str, tuple[Callable[[Code, Value], Value], Callable[[torch.Tensor], torch.Tensor]]] = {
    "exp": (elementwise.exp, torch.exp),
    "tanh": (elementwise.tanh, torch.tanh),
    "silu": (lambda code, x: elementwise.activate(code, "silu", x), torch.nn.functional.silu),
    "gelu": (lambda code, x: elementwise.activate(code, "gelu", x), torch.nn.functional.gelu),
    "gelu_tanh": (
        lambda code, x: elementwise.activate(code, "gelu_tanh", x),
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    ),
    "relu": (lambda code, x: elementwise.activate(code, "relu", x), torch.relu),
    "softcap": (lambda code, x: elementwise.softcap(code, 3.0, x), lambda x: 3 * torch.tanh(x / 3)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    x = np.concatenate([np.linspace(-12, 12, 4096), np.geomspace(1e-8, 1, 2048), -np.geomspace(1e-8, 1, 2048)])
    x = x.astype(np.float32)
    write, reference = FUNCTIONS[name]
    out = apply(name, write, x)
    expected = reference(torch.from_numpy(x).double()).numpy()
    error = np.abs(out - expected) / np.maximum(np.abs(expected), 1e-9)
    # Far out the error of a rounded argument grows with it: e^-18 of a gelu's tail has 18 times a float's.
    assert error[np.abs(x) < 4].max() < 2e-6
    assert error.max() < 2e-5


def test_exp_at_the_ends() -> None:
    x = np.array([-math.inf, -200, -88, 0, 88, 200, math.nan, *[0] * 9], np.float32)
    out = apply("exp", elementwise.exp, x)
    assert list(out[:4]) == [0, 0, 0, 1]
    assert np.isfinite(out[4:6]).all()
    assert np.isnan(out[6])


# ---- compiled code in the cache ----


def _library_of(name: str) -> Any:
    def write(module: Module) -> None:
        with module.function("answer", 1, exported=True) as (code, (out,)):
            code.store(code.number(F32, 42.0), out)

    return library(name, host_isa(), write)


def _answer(made: Any) -> float:
    out = np.zeros(1, np.float32)
    matmul.callable_at(made.address("answer"), 1)(out.ctypes.data)
    return float(out[0])


def test_cache_is_used_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path))
    assert _answer(_library_of("test cache")) == 42
    (path,) = tmp_path.glob("kernels/*.o")
    whole = path.read_bytes()
    for content in (whole, whole[:-100], b""):
        path.write_bytes(content)
        monkeypatch.setattr(libraries, "_libraries", {})
        assert _answer(_library_of("test cache")) == 42
        assert path.read_bytes() == whole


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path / "file"))
    assert _answer(_library_of("test no cache")) == 42


# ---- threads ----


def _counting(module: Module) -> None:
    """Each thread writes its number after all of them have written a first time."""
    barrier = write_barrier(module)
    with module.function("count", 4, exported=True) as (code, (out, thread, num_threads, memory)):
        base = code.load_i64(memory, BASE)
        code.store(thread + 1, out, thread * 8)
        code.call(barrier, memory, base + num_threads)
        total = code.variable(code.i64(0))
        with code.loop(0, num_threads) as other:
            total.set(total.get() + code.load_i64(out, other * 8))
        code.store(total.get(), out, (thread + num_threads) * 8)
        code.call(barrier, memory, base + num_threads * 2)


def _count(num_threads: int) -> list[int]:
    out = np.zeros(2 * num_threads, np.int64)
    team(num_threads).run(library("test count", host_isa(), _counting).address("count"), out.ctypes.data)
    return out.tolist()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_team(num_threads: int) -> None:
    expected = [*range(1, num_threads + 1), *[num_threads * (num_threads + 1) // 2] * num_threads]
    for _ in range(50):
        assert _count(num_threads) == expected


def test_team_wakes_after_sleep() -> None:
    _count(3)
    before = time.process_time()
    time.sleep(0.3)
    used = time.process_time() - before
    assert used < 0.2  # spinning threads would use most of both processors; not a matter of speed
    assert _count(3)[:3] == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_team_after_fork() -> None:
    assert _count(2)[:2] == [1, 2]
    child = os.fork()
    if child == 0:
        os._exit(0 if _count(2)[:2] == [1, 2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


TOPOLOGY = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4),
        ({TOPOLOGY.format(cpu): f"{cpu % 2},{cpu % 2 + 2}" for cpu in range(4)}, 2),  # two cores of two threads
        ({"proc/self/cgroup": "0::/box", "sys/fs/cgroup/box/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "100000 100000"}, 1),  # a limit further up
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        ({"proc/self/cgroup": "0::/host/name", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),  # inside a container
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),  # never less
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/job\n2:memory:/job",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
)
def test_default_threads(files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert default_threads(_machine(tmp_path, files)) == expected


# ---- key-value blocks ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_hold_what_is_written(dtype: torch.dtype) -> None:
    pool = BlockPool(2, 3, 20, dtype, max_bytes=1 << 22)
    keys, values = (torch.randn(2, 3, 50, 20).to(dtype) for _ in range(2))
    blocks = [pool.allocate() for _ in range(4)]
    for start, end in ((0, 7), (7, 33), (33, 33), (33, 50)):
        pool.write(blocks, start, keys[:, :, start:end], values[:, :, start:end])
    for length in (0, 1, 16, 50):
        read_keys, read_values = pool.read(blocks, length)
        assert torch.equal(read_keys, keys[:, :, :length])
        assert torch.equal(read_values, values[:, :, :length])
    other = pool.allocate()
    pool.copy(blocks[1], other)
    assert torch.equal(pool.read([blocks[0], other], 2 * BLOCK)[0], keys[:, :, : 2 * BLOCK])
    assert pool.num_used == 5


def test_blocks_end() -> None:
    pool = BlockPool(2, 3, 16, max_bytes=3 * 2 * 3 * 2 * 16 * BLOCK * 4)
    blocks = [pool.allocate() for _ in range(3)]
    assert len(set(blocks)) == 3
    with pytest.raises(MMGPTError, match="3 blocks"):
        pool.allocate()
    pool.release(blocks[1])
    assert pool.allocate() == blocks[1]


def test_blocks_of_another_type() -> None:
    with pytest.raises(ConfigError, match="float16"):
        BlockPool(1, 1, 16, torch.float16)


def test_threads_that_need_the_same_code_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops code from going away while a thread runs it: of two that were made, one took the other's place."""
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path))

    def write(module: Module) -> None:
        with module.function("store_7", 1, exported=True) as (code, (address,)):
            code.store(code.number(I64, 7), address)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: library("seven", host_isa(), write), range(8)))
    assert len({id(each) for each in made}) == 1
    out = np.zeros(1, np.int64)
    matmul.callable_at(made[0].address("store_7"), 1)(out.ctypes.data)
    assert out[0] == 7


def test_threads_end_before_python_does() -> None:
    """Stops: a crash at the end of a process, when code and memory go under threads that spin or sleep."""
    script = """
import time, torch
from mm_gpt.kernels import team
from mm_gpt.kernels.library import library
from mm_gpt.kernels.processor import host_isa
def write(module):
    barrier = team.write_barrier(module)
    with module.function("nothing", 4, exported=True) as (code, (argument, thread, threads, address)):
        code.call(barrier, address, code.load_i64(address, team.BASE) + threads)
made = team.team(3)
made.run(library("nothing", host_isa(), write).address("nothing"), 0)
made.run(library("nothing", host_isa(), write).address("nothing"), 0)
time.sleep(PAUSE)
"""
    for pause in ("0", "0.2"):  # threads that spin, and threads that sleep
        done = subprocess.run([sys.executable, "-c", script.replace("PAUSE", pause)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
