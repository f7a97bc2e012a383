"""Several ranks as processes, for tests of what they do together."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def on_ranks(function: Callable[[int], Any], count: int = 2) -> list[Any]:
    """What `function(rank)` returns on each rank, or the text of what it raises, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ["WORLD_SIZE"] = str(count)
        try:
            results.put((rank, function(rank)))
        except Exception as error:
            results.put((rank, f"{type(error).__name__}: {error}"))

    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(count)]
