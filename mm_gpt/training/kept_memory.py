"""Memory that a training step frees and asks for again.

The C library gives large pieces back to the system at once, and each step then waits for hundreds of thousands of pages
to be filled with zeros: a sixth of the time of a step on a CPU.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEPT = {M_MMAP_THRESHOLD: 64 << 20, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 8 << 20}
"""The few largest pieces, such as the gradient of a vocabulary, still come and go: among the others they would leave
holes that nothing fits into."""
_DEFAULTS = {M_MMAP_THRESHOLD: 128 << 10, M_TRIM_THRESHOLD: 128 << 10, M_TOP_PAD: 128 << 10}


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """While inside, what is freed stays with this process, where that is for us to say: on a CPU, with glibc."""
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if device.type != "cpu" or library is None:
        yield
        return
    for option, value in _KEPT.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _DEFAULTS.items():
            library.mallopt(option, value)
        library.malloc_trim(0)
