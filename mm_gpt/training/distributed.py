"""Data parallelism under torchrun: each rank its own rows, one sum of all gradients a step.

A rank whose rows hold no image has no gradient for the vision side: it adds zeros, so no rank waits for another.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mm_gpt.config import first_difference
from mm_gpt.errors import MMGPTError

TIMEOUT = datetime.timedelta(hours=2)
"""For the first reading of a corpus, and what rank 0 writes alone."""
BUCKET = 2**24
"""Numbers that are summed at a time."""


def ranks() -> tuple[int, int]:
    """(rank, number of ranks), as torchrun says; (0, 1) without it. Raises MMGPTError when its variables are broken."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise MMGPTError("RANK and WORLD_SIZE are not numbers: start several ranks with torchrun") from None
    if not 0 <= rank < world:
        raise MMGPTError(f"RANK is {rank} of WORLD_SIZE {world}")
    return rank, world


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The ranks' group while inside; nothing for a single process."""
    if ranks()[1] == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(_local_rank())  # "cuda" is this one from here on, or all ranks would share the first
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _local_rank() -> int:
    """The rank on this machine, which is the number of its GPU. Raises MMGPTError when there are fewer GPUs."""
    local, count = int(os.environ.get("LOCAL_RANK", ranks()[0])), torch.cuda.device_count()
    if local >= count:
        raise MMGPTError(f"{local + 1} ranks on this machine, which has {count} CUDA devices")
    return local


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if ranks()[1] == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def union_over_ranks(names: Iterable[str], device: torch.device) -> list[str]:
    """The names that any rank has, in order: a rank without a micro-batch knows none of its own."""
    if ranks()[1] == 1:
        return sorted(names)
    texts = [found.decode() for found in gather_over_ranks("\n".join(sorted(names)).encode(), device)]
    return sorted({name for text in texts for name in text.splitlines()})


def gather_over_ranks(data: bytes, device: torch.device) -> list[bytes]:
    """What each rank has to say, in the order of the ranks."""
    world = ranks()[1]
    if world == 1:
        return [data]
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    mine = mine.to(device)
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world)]
    dist.all_gather(lengths, torch.tensor([len(mine)], device=device))
    longest = max(int(length) for length in lengths)
    everybody = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(world)]
    dist.all_gather(everybody, torch.nn.functional.pad(mine, (0, longest - len(mine))))
    return [e[: int(n)].cpu().numpy().tobytes() for e, n in zip(everybody, lengths, strict=True)]


def of_rank_0(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """JSON values as rank 0 has them: what ranks decide by must be equal to the last bit."""
    if ranks()[1] == 1:
        return values
    found: dict[str, Any] = json.loads(gather_over_ranks(json.dumps(values).encode(), device)[0])
    return found


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients summed over all ranks. A parameter that has none anywhere keeps none."""
    if ranks()[1] == 1 or not parameters:
        return
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(present)
    chosen = [p for p, number in zip(parameters, present.tolist(), strict=True) if number]
    while chosen:
        bucket: list[nn.Parameter] = []
        size = 0
        while chosen and (not bucket or size + chosen[0].numel() <= BUCKET):
            bucket.append(chosen.pop(0))
            size += bucket[-1].numel()
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).float().flatten() for p in bucket])
        dist.all_reduce(flat)
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def average_statistics(model: nn.Module) -> None:
    """The running statistics of BatchNorm, which each rank has seen other images for, made the same everywhere."""
    world = ranks()[1]
    if world == 1:
        return
    moving = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    buffers = [buffer for m in moving for buffer in (m.running_mean, m.running_var) if buffer is not None]
    if not buffers:  # frozen norms, or none
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= world
    for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def check_same_settings(values: dict[str, Any], device: torch.device) -> None:
    """Raises MMGPTError, on every rank, when JSON values that describe a run are not those of rank 0 on all of them:
    ranks with other numbers of steps would wait for each other, and with other data learn on without a word."""
    first, *others = [json.loads(told) for told in gather_over_ranks(json.dumps(values).encode(), device)]
    for number, other in enumerate(others, 1):
        if (key := first_difference(first, other)) is not None:
            raise MMGPTError(
                f"rank {number} has another {key} than rank 0: start all ranks by the same command, on the same data"
            )


def check_same_step(step: int, device: torch.device) -> None:
    """Raises MMGPTError, on every rank, when not all ranks are about to go on from the same step."""
    steps = [int(told) for told in gather_over_ranks(str(step).encode(), device)]
    if len(set(steps)) > 1:
        found = ", ".join(f"rank {number} at step {step}" for number, step in enumerate(steps))
        raise MMGPTError(f"the ranks do not continue from one checkpoint ({found}): --out must be a folder they share")


def check_same_weights(step: int, model: nn.Module, device: torch.device) -> None:
    """Raises MMGPTError, on every rank, when not all ranks have the same weights."""
    if ranks()[1] == 1:
        return
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    sums = gather_over_ranks(digest.digest(), device)
    if len(set(sums)) > 1:
        other = next(number for number, found in enumerate(sums) if found != sums[0])
        raise MMGPTError(
            f"rank {other} has other weights than rank 0 at step {step}: --out must be a folder they share, and the "
            "model that the run starts from the same"
        )


def raise_together(error: Exception | None, device: torch.device) -> None:
    """What one rank met with ends all of them: raises its own error there, and elsewhere MMGPTError with that line.

    All ranks call it, those without an error as well; each then knows that the others have come this far.
    """
    if ranks()[1] > 1:
        told = gather_over_ranks(("" if error is None else str(error) or type(error).__name__).encode(), device)
        for rank, text in enumerate(told):
            if text and error is None:
                raise MMGPTError(f"rank {rank}: {text.decode()}")
    if error is not None:
        raise error


def wait_for_all() -> None:
    if ranks()[1] > 1:
        dist.barrier()
