"""Several ranks as processes, for tests of what they do together."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # sharding imports it: here once, instead of for seconds in each process


def on_ranks(function: Callable[[int], Any], count: int = 2, *, seconds: float = 300) -> list[Any]:
    """What `function(rank)` returns on each rank, or the text of what it raises, as torchrun would start them.

    Ranks that wait for each other for good are ended after `seconds`, and TimeoutError is raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")

    def run(rank: int, answer: Any) -> None:
        torch.set_num_threads(1)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
        os.environ["WORLD_SIZE"] = str(count)
        try:
            answer.send(function(rank))
        except Exception as error:
            answer.send(f"{type(error).__name__}: {error}")

    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [context.Process(target=run, args=(rank, pipes[rank][1])) for rank in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    try:
        found = []
        for rank, (reader, _) in enumerate(pipes):
            while not reader.poll(0.1):
                if time.monotonic() > end:
                    raise TimeoutError(f"rank {rank} of {count} has not come to an end")
                if not processes[rank].is_alive() and not reader.poll():
                    raise ChildProcessError(f"rank {rank} of {count} ended with {processes[rank].exitcode}")
            found.append(reader.recv())
    except (TimeoutError, ChildProcessError):
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()
    return found
