"""Packing: whole examples into rows of a fixed number of tokens, first-fit decreasing over a window.

Next-fit loses 12 % of the positions of a typical caption mix, first-fit decreasing over a window of a thousand 1–2 %.
"""

from collections.abc import Sequence

from mm_gpt.errors import ContextOverflowError


def pack(lengths: Sequence[int], row_length: int, *, window: int = 1024) -> list[list[int]]:
    """Rows of example indices whose lengths sum to at most `row_length`; each index appears exactly once.

    Examples are taken `window` at a time, so that rows still follow the (shuffled) order roughly.
    Raises ContextOverflowError naming an example that fits into no row.
    """
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        block = range(start, min(start + window, len(lengths)))
        space: list[int] = []
        packed: list[list[int]] = []
        for index in sorted(block, key=lambda i: (-lengths[i], i)):
            if lengths[index] > row_length:
                raise ContextOverflowError(f"example {index} has {lengths[index]} tokens; a row holds {row_length}")
            for row, left in enumerate(space):
                if left >= lengths[index]:
                    packed[row].append(index)
                    space[row] -= lengths[index]
                    break
            else:
                packed.append([index])
                space.append(row_length - lengths[index])
        rows += packed
    return rows
