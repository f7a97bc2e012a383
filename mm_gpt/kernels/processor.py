"""What the processor at hand can do, and how LLVM is told."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm

from mm_gpt.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class ISA:
    """What kernels may use of the processor. All levels compute integer dots to the same bits."""

    name: str
    madd_bits: int
    """Width of the instruction that multiplies int16 and adds pairs; 0: none."""
    dot_bf16: bool
    without: tuple[str, ...]
    """Beginnings of the processor's features that LLVM must not use."""


_LEVELS = (
    ISA("bf16", 512, True, ()),
    ISA("avx512", 512, False, ("avx512bf16",)),
    ISA("avx2", 256, False, ("avx512", "avx10", "evex")),
    ISA("plain", 0, False, ("avx512", "avx10", "evex", "avx2", "avxvnni")),
)


@cache
def host_features() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


@cache
def host_isa() -> ISA:
    """The highest level that this processor has."""
    has = host_features()
    if has.get("avx512bw") and has.get("avx512dq") and has.get("avx512vl"):
        return _LEVELS[0] if has.get("avx512bf16") else _LEVELS[1]
    return _LEVELS[2] if has.get("avx2") and has.get("fma") else _LEVELS[3]


def isa(name: str | None) -> ISA:
    """A level by name, no higher than the processor's. Raises ConfigError."""
    levels = {level.name: level for level in _LEVELS[_LEVELS.index(host_isa()) :]}
    if name is None:
        return host_isa()
    if name not in levels:
        raise ConfigError(unknown_name("instruction set", name, levels))
    return levels[name]


def features_of(level: ISA) -> str:
    on = {name: value and not name.startswith(level.without) for name, value in host_features().items()}
    return ",".join(("+" if value else "-") + name for name, value in sorted(on.items()))


def machine_of(level: ISA) -> Any:
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features_of(level), opt=2, reloc="pic", codemodel="jitdefault", jit=True
    )
