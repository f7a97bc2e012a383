"""The order of an epoch."""

import random
from functools import lru_cache


@lru_cache(maxsize=2)  # a step asks again and again, and may lie at the turn of two epochs
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The numbers below `count` in an order that follows from the seed and the epoch."""
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
