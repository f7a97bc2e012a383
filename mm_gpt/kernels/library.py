"""Compiled functions, kept in the user's cache folder and named by what they were made from."""

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from mm_gpt.kernels.processor import ISA, features_of, machine_of
from mm_gpt.kernels.simd import Module


class Library:
    """Machine code in memory, kept for the life of the process."""

    def __init__(self, machine_code: bytes, level: ISA):
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine_of(level))
        self._engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(machine_code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        return self._engine.get_function_address(name)


_libraries: dict[str, Library] = {}
_making = threading.Lock()
"""Two threads that make the same one would lose one of them, and the code behind the addresses that it has given."""


@cache
def _sources() -> bytes:
    """What all of these kernels are made from: a change of it makes new ones."""
    names = (
        "processor",
        "simd",
        "library",
        "unpack",
        "matmul",
        "elementwise",
        "attention",
        "kv_blocks",
        "step",
        "team",
        "expand",
        "parallel",
        "training",
    )
    return b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in names)


def _cache_folder() -> Path:
    """Beside what is downloaded."""
    if folder := os.environ.get("MM_GPT_CACHE"):
        return Path(folder) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm-gpt" / "kernels"


def library(what: str, level: ISA, write: Callable[[Module], None]) -> Library:
    """The functions that `write` puts into a module; compiled once for each description, processor and source."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    made_from = f"{what} {level.name} {llvm.get_host_cpu_name()} {features_of(level)} {llvmlite.__version__} ".encode()
    key = hashlib.sha256(made_from + _sources()).hexdigest()[:32]
    with _making:
        if key not in _libraries:
            _libraries[key] = Library(_machine_code(key, level, write), level)
        return _libraries[key]


def _machine_code(key: str, level: ISA, write: Callable[[Module], None]) -> bytes:
    """From the cache, or compiled into it."""
    path = _cache_folder() / f"{key}.o"
    machine_code = b""
    with suppress(OSError):
        machine_code = path.read_bytes()
    # The digest in front tells a whole file from one that a full disk cut short.
    head, machine_code = machine_code[:32], machine_code[32:]
    if machine_code and hashlib.sha256(machine_code).digest() == head:
        return machine_code
    module = Module(level)
    write(module)
    machine_code = module.compile()
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(hashlib.sha256(machine_code).digest() + machine_code)
        partial.replace(path)
    return machine_code
