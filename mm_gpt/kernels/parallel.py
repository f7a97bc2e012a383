"""Compiled loops over rows, run by the threads that torch has already: OpenMP's own, where the process has it.

A second pool of threads beside torch's would compete with it for the cores. Rows go in a fixed number of pieces, each
taken by the next free thread, so that what is summed piece by piece does not depend on the threads.
"""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from llvmlite import ir

from mm_gpt.kernels.library import library
from mm_gpt.kernels.processor import host_isa
from mm_gpt.kernels.simd import I64, Code, Module, Value

PIECES = 32
"""Into which rows go. Sums over rows are taken in each and then over them, in order."""
_HEAD = 4  # numbers in front of a kernel's own arguments: next piece, pieces, rows of a piece, rows

Body = Callable[[Code, Value, Value, Value, list[Value]], None]
"""body(code, piece, first row, end, arguments)."""


def write_rows(module: Module, name: str, num_args: int, body: Body) -> None:
    """A function over the pieces of the rows that nobody has taken yet; any number of threads may be in it."""
    with module.function(name, 1, exported=True) as (code, (argument,)):
        pieces, size, rows = (code.load_i64(argument, 8 * i) for i in (1, 2, 3))
        args = [code.load_i64(argument, 8 * (_HEAD + i)) for i in range(num_args)]
        with code.repeat() as leave_if:
            place = code.builder.inttoptr(argument.ir, I64.as_pointer())
            piece = Value(code, code.builder.atomic_rmw("add", place, ir.Constant(I64, 1), "acq_rel"))
            leave_if(piece >= pieces)
            start = piece * size
            end = start + size
            end = (end < rows).where(end, rows)
            with code.when(start < end):
                body(code, piece, start, end, args)


class Kernel:
    """A function of `write_rows`, compiled for this processor when it is first called, and kept on the disk."""

    def __init__(self, what: str, num_args: int, body: Body):
        self._what, self._num_args, self._body = what, num_args, body
        self._function: Callable[[int], None] | None = None
        self._address = 0

    def __call__(self, rows: int, args: Sequence[int], threads: int) -> None:
        """Over so many rows, with addresses and numbers as arguments."""
        assert len(args) == self._num_args
        if self._function is None:
            write = lambda module: write_rows(module, "rows", self._num_args, self._body)  # noqa: E731
            self._address = library(self._what, host_isa(), write).address("rows")
            self._function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._address)
        argument = (ctypes.c_int64 * (_HEAD + len(args)))(0, PIECES, -(-rows // PIECES), rows, *args)
        if threads == 1 or rows < PIECES:
            self._function(ctypes.addressof(argument))
        elif (start := _openmp()) is not None:
            start(self._address, ctypes.addressof(argument), threads, 0)
        else:
            list(_pool(threads).map(self._function, [ctypes.addressof(argument)] * threads))


@cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """GNU's entry into a parallel region, of the library that torch has loaded. LLVM's own has it as well."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if "omp" in line and line.count(" ") >= 5}
    for path in sorted(paths, key=lambda path: ("torch" not in path, path)):
        if not Path(path).name.startswith(("libgomp", "libomp", "libiomp")):
            continue
        try:
            start = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        start.restype, start.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return start
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mm-gpt-rows")
