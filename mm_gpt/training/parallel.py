"""Fully sharded training (FSDP2, 2304.11277): ranks share one copy of a model, each holds a slice of every weight.

A block of the decoder is whole only while it computes. Everything else, the root's, is whole from the start of a
forward pass to the end of its backward pass: embeddings, norm and head, which are used at both ends; the connector; and
the vision tower. So every rank gathers the tower's weights and sums its gradients in every micro-batch, whether it has
images or not, and nobody waits for a rank that reads text alone.

With shards on N of W ranks there are W / N copies (HSDP): slices are gathered among N, gradients summed over all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mm_gpt.errors import ConfigError
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.training.distributed import ranks


def sharing(shard: int | None) -> int:
    """How many ranks share a copy of the model under a setting `shard`; None means all.

    Raises ConfigError when they do not divide the ranks of the run.
    """
    world = ranks()[1]
    number = world if shard is None else shard
    if world % number:
        raise ConfigError(f"{number} ranks cannot share a copy of the model: the run has {world}, which it must divide")
    return number


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are slices, and what saves them must gather them first."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shard_model(model: MMGPT, number: int, device: torch.device, *, bf16: bool) -> None:
    """Divide `model` among each `number` ranks, on `device`. All ranks call it, and all get what rank 0 holds: on the
    others the model may lie on the meta device, without weights.

    What is trained, in which type, recomputed and compiled must be settled before. `bf16`: blocks are gathered and
    computed in bfloat16; what a rank keeps, and the sums of gradients, stay in float32. The root's weights are gathered
    as they are: autocast rounds them where products are taken, as without shards.

    Parameters are replaced, under the same names: groups for an optimizer are made afterwards. Raises ConfigError for
    a model that cannot be divided.
    """
    if model.decoder.config.memory_length:
        raise ConfigError("a model with segment memory is not sharded: its ranks read different numbers of segments")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ConfigError(f"{name} is a single number, which cannot be divided among ranks")
    whole = model.state_dict() if ranks()[0] == 0 else {}
    unsaved = _unsaved_buffers(model)
    mesh = _mesh(number, device)
    # Inputs are not cast: tables of rotary positions would be rounded with them.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.decoder.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the step's targets already
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
            module.set_reduce_scatter_unused_params(True)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        model.to_empty(device=device)
    set_model_state_dict(
        model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    _share_buffers(model, unsaved, device)
    model.decoder.embedding.register_forward_hook(_begin_gradient)
    used = _Used()
    model.register_forward_hook(used.watch)
    _USED[model] = used


def reshard(model: nn.Module) -> None:
    """After forward passes without a backward one: the root's weights are slices again. Nothing for other models."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _mesh(number: int, device: torch.device) -> DeviceMesh:
    world = ranks()[1]
    if number == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // number, number), mesh_dim_names=("copy", "shard"))


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _share_buffers(model: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
    """Rank 0's values of buffers that no state dict has."""
    buffers = dict(model.named_buffers())
    for name, value in values.items():
        if not value.is_meta:
            buffers[name].copy_(value)
        dist.broadcast(buffers[name], src=0)


def _begin_gradient(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
    """Where the embedding is frozen, a rank without images would have no backward pass at all, and the others would
    wait for its slices of the blocks."""
    if torch.is_grad_enabled() and module.training and not embedded.requires_grad:
        embedded.requires_grad_()
    return embedded


class _Used:
    """Which weights of the root had a gradient on this rank: the others get zeros from those that had none."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._watched: set[str] = set()

    def watch(self, model: nn.Module, args: Any, output: Any) -> None:
        """After the forward pass the root's parameters are whole, and the same objects each time."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor) and name not in self._watched:
                self._watched.add(name)
                parameter.register_hook(lambda _, name=name: self.names.add(name))


_USED: WeakKeyDictionary[nn.Module, _Used] = WeakKeyDictionary()


def forget_unused(model: nn.Module) -> None:
    """After a step's backward passes: a weight that no rank had a gradient for has none, instead of zeros.

    An optimizer leaves it alone then, as it does in one process: with zeros it would go on by its momentum.
    """
    used = _USED.get(model)
    if used is None:
        return
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and not _in_block(name)}
    names = sorted(parameters)
    device = next(model.parameters()).device
    present = torch.tensor([name in used.names for name in names], dtype=torch.int32, device=device)
    dist.all_reduce(present)
    used.names.clear()
    for name, number in zip(names, present.tolist(), strict=True):
        if not number:
            parameters[name].grad = None


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """Scale the gradients of all `parameters` down to a norm of at most `largest`; their norm before, a scalar.

    Of slices it is the norm of the whole, equal on every rank. Sharded and plain parameters may be mixed.
    """
    kinds: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            kinds.setdefault(mesh, []).append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = whole[0] if len(whole) == 1 else nn.utils.get_total_norm(whole)
    for kind in kinds.values():
        nn.utils.clip_grads_with_norm_(kind, largest, total)
    return total


def _in_block(name: str) -> bool:
    return name.startswith("decoder.blocks.")


@torch.no_grad()
def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole `state_dict` by its names, on the CPU of rank 0; the other ranks get nothing. All ranks call it.

    One weight at a time is whole on each device. A model that is not sharded gives what it has, without a copy.
    """
    leads = ranks()[0] == 0
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if leads:
            state[name] = whole.detach().cpu() if isinstance(tensor, DTensor) else whole.detach()
    return state


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While inside, `model.state_dict()` holds whole tensors on rank 0, for what saves a model. All ranks enter it."""
    if not is_sharded(model):
        yield
        return
    whole = full_state(model)

    def put(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, tensor in whole.items():
            state[prefix + name] = tensor

    handle = model.register_state_dict_post_hook(put)
    try:
        yield
    finally:
        handle.remove()
