"""Memory in pages of its own; in huge ones, since weights come from others at little more than half the speed."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
LINE = 64


def huge(num_bytes: int) -> Tensor:
    """Zeros, uint8, that begin at a huge page where the system has them; touched pages alone cost memory."""
    size = (num_bytes + HUGE_PAGE - 1) // HUGE_PAGE * HUGE_PAGE + HUGE_PAGE
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + num_bytes]


def passing(num_bytes: int) -> Tensor:
    """Zeros, uint8, whose pages the system has back as soon as the tensor goes: the C library would keep them."""
    return torch.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=torch.uint8)[:num_bytes]


class Arena:
    """Room for tensors, one after the other."""

    def __init__(self, num_bytes: int):
        self._memory, self._used = huge(num_bytes), 0

    @staticmethod
    def room(tensor: Tensor) -> int:
        return (tensor.numel() * tensor.itemsize + LINE - 1) // LINE * LINE

    def take(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, contiguous."""
        place = self._memory[self._used : self._used + tensor.numel() * tensor.itemsize]
        self._used += self.room(tensor)
        copied = place.view(tensor.dtype).view(tensor.shape)
        copied.copy_(tensor)
        return copied
