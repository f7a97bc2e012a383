"""How large a model is, and how much arithmetic a training step of it takes: parameters and FLOPs, by part.

A product of (m, k) with (k, n) is 2·m·k·n FLOPs. Backward, a weight that is trained costs a product of the same size,
and so does each input through which a gradient flows: a model that is trained whole costs three times its forward pass,
a frozen one under a trained connector twice. Norms, activations and softmax are left out, as everywhere.

What is counted is what the model needs, not what a computer did: a query of a document of T tokens sees T keys, as in
the PaLM paper's definition of MFU (2204.02311, appendix B), whether or not a kernel skips those ahead of it; other
documents of the row and padding count nothing; what activation checkpointing computes again counts once.

Shapes: T tokens of a document, D width, H heads, K key-value heads, C head size, V vocabulary, P patches.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mm_gpt.config import check_numbers
from mm_gpt.errors import ConfigError
from mm_gpt.model.attention import Pattern
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import IGNORE_INDEX, Batch
from mm_gpt.vision.connectors import ConnectorConfig, build_connector
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.native_vit import Grid, NativeViTConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part; each is counted once."""

    embedding: int
    """Tables that are looked up: of tokens, unless it is the output layer as well, and of learned positions."""
    head: int
    """The matrix of the output layer, which with tied embeddings is that of the tokens."""
    decoder: int
    """The blocks and the last norm."""
    connector: int
    """With the embeddings of marks, newlines and concepts."""
    vision: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.decoder + self.connector + self.vision

    @property
    def without_embedding(self) -> int:
        """N of a scaling law: what takes part in products. Tables that are looked up do not, an output layer does."""
        return self.total - self.embedding


def parameter_counts(model: MMGPT | ModelConfig) -> ParameterCounts:
    """Of a model, or of what a config describes, for which no memory is taken."""
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = MMGPT(model)
    decoder = model.decoder
    table, tied = decoder.embedding.weight.numel(), decoder.head is None
    looked_up = (0 if tied else table) + _size(getattr(decoder, "position_embedding", None))
    connector = _size(model.connector) + _size(model.concepts)
    connector += sum(mark.numel() for mark in (model.image_marks, model.image_newline) if mark is not None)
    return ParameterCounts(
        embedding=looked_up,
        head=table if tied else _size(decoder.head),
        decoder=_size(decoder.blocks) + _size(decoder.norm),
        connector=connector,
        vision=_size(model.vision),
    )


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


class Flops(NamedTuple):
    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def times(self, number: float) -> "Flops":
        return Flops(self.forward * number, self.backward * number)

    def plus(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained of a decoder, and of what comes into it."""

    inputs: bool = True
    """Through embeddings, or the image tokens among them, flows a gradient."""
    blocks: bool = True
    head: bool = True
    lora_rank: int = 0
    """Of the low-rank updates on the blocks' linear layers; 0: there are none."""

    def __post_init__(self) -> None:
        check_numbers(self, "lora_rank", at_least=0)


NOTHING = Trained(inputs=False, blocks=False, head=False)


class _Tally:
    """FLOPs of products, one after the other on the way up; `flows` is whether a gradient comes back so far."""

    def __init__(self, *, flows: bool):
        self.forward = self.backward = 0.0
        self.flows = flows

    def product(self, rows: float, width: int, out: int, *, trained: bool) -> None:
        flops = 2.0 * rows * width * out
        self.forward += flops
        self.backward += flops * (self.flows + trained)
        self.flows = self.flows or trained

    def both_ways(self, flops: float) -> None:
        """A product of two activations, each with a gradient."""
        self.forward += flops
        self.backward += 2 * flops * self.flows

    @property
    def flops(self) -> Flops:
        return Flops(self.forward, self.backward)


Text = int | tuple[int, int]
"""Tokens of a document; or the tokens of a part of it, and all those that the part may see, itself included."""


def decoder_flops(
    config: DecoderConfig,
    lengths: Sequence[Text],
    *,
    supervised: int | None = None,
    trained: Trained = Trained(),
) -> Flops:
    """FLOPs of a decoder on documents of so many tokens, which do not see each other.

    supervised: positions that are projected to logits; None: all. With segment memory a part is a segment, which sees
    its memory as well, and projects it again.
    """
    texts = [(text, text) if isinstance(text, int) else text for text in lengths]
    tokens = sum(queries for queries, _ in texts)
    H, K, C, D = config.num_heads, config.num_kv_heads, config.head_size, config.width
    is_relative = config.positions == "relative"
    rows = sum(keys for _, keys in texts) if is_relative else tokens
    scores = [sum(_scores(config.pattern(n), *text) for text in texts) for n in range(len(config.attention))]
    tally = _Tally(flows=trained.inputs)

    def linear(rows: float, width: int, out: int) -> None:
        start = tally.flows
        tally.product(rows, width, out, trained=trained.blocks and not trained.lora_rank)
        if trained.lora_rank:
            tally.flows = start
            tally.product(rows, width, trained.lora_rank, trained=True)
            tally.product(rows, trained.lora_rank, out, trained=True)

    for layer in range(config.num_layers):
        pairs = scores[layer % len(scores)]
        tally.flows = tally.flows or (trained.blocks and not trained.lora_rank)  # the norm before
        linear(rows, D, (H + 2 * K) * C)
        if is_relative:  # distances are projected, once for all texts, and scored as keys are
            linear(max((keys for _, keys in texts), default=0), D, H * C)
            tally.both_ways(2.0 * pairs * H * C)
        tally.both_ways(4.0 * pairs * H * C)
        linear(tokens, H * C, D)
        linear(tokens, D, (1 + config.gated_mlp) * config.mlp_width)
        linear(tokens, config.mlp_width, D)
    tally.product(tokens if supervised is None else supervised, D, config.vocab_size, trained=trained.head)
    return tally.flops


def _scores(pattern: Pattern, queries: int, keys: int) -> float:
    """Pairs of a query and a key in its reach, had it as many before it as the last one has."""
    if pattern.halves is not None:
        return sum(_scores(half, queries, keys) for half in pattern.halves) / 2
    if pattern.kind == "dense":
        return queries * keys
    if pattern.kind == "local":
        return queries * min(keys, pattern.window or keys)
    stride, summary = pattern.stride or 1, pattern.summary or 0
    band, column, summaries = min(stride, keys), -(-keys // stride), summary * (keys // stride)
    reach = {
        "strided": band + column,
        "strided_local": band,
        "strided_column": column,
        "fixed": band + summaries,
        "fixed_block": band,
        "fixed_summary": 1 + summaries,
    }[pattern.kind]
    return queries * min(reach, keys)


def vision_flops(
    config: VisionConfig, images: int, *, grids: Sequence[Grid] = (), trained: bool | Sequence[bool] = True
) -> Flops:
    """FLOPs of a vision encoder on so many images (tiles) of the config's size, or on images of `grids` of cells.

    trained: all of it, none of it, or for each of its parameters in order whether it is trained. Raises ConfigError
    where a tower for images of any size comes without grids.
    """
    flags = trained if isinstance(trained, bool) else tuple(trained)
    if isinstance(config.model, NativeViTConfig):
        if images and not grids:
            raise ConfigError("a tower for images of any size needs the grid of each image")
        return _native_flops(config.model, grids, any(flags) if isinstance(flags, tuple) else flags)
    return _encoder_flops(config, flags).times(images)


def _native_flops(config: NativeViTConfig, grids: Sequence[Grid], trained: bool) -> Flops:
    cell, D, M = config.num_patches, config.width, config.mlp_width
    patches = sum(rows * columns for rows, columns in grids) * cell
    whole = sum((rows * columns * cell) ** 2 for rows, columns in grids)
    inside = whole
    if config.window:
        inside = sum(
            (height * width * cell) ** 2
            for rows, columns in grids
            for height in _pieces(rows, config.window)
            for width in _pieces(columns, config.window)
        )
    tally = _Tally(flows=False)
    tally.product(patches, 3 * config.patch_size**2, D, trained=trained)
    for layer in range(config.num_layers):
        tally.product(patches, D, 3 * D, trained=trained)
        tally.both_ways(4.0 * D * (inside if config.window and layer not in config.full_layers else whole))
        tally.product(patches, D, D, trained=trained)
        tally.product(patches, D, (1 + config.gated_mlp) * M, trained=trained)
        tally.product(patches, M, D, trained=trained)
    return tally.flops


def _pieces(length: int, size: int) -> list[int]:
    return [min(size, length - start) for start in range(0, length, size)]


@functools.lru_cache(maxsize=64)
def _encoder_flops(config: VisionConfig, trained: bool | tuple[bool, ...]) -> Flops:
    """Of one image, by a forward pass without numbers."""
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    _set_trained(encoder, trained)
    size = config.image_size
    # Two images, for batch statistics want more than one value
    return _counted(encoder, torch.empty(2, 3, size, size, device="meta"), encoder.see).times(0.5)


@functools.lru_cache(maxsize=64)
def connector_flops(
    config: ConnectorConfig,
    in_width: int,
    out_width: int,
    num_patches: int,
    *,
    trained: bool = True,
    inputs: bool = False,
) -> Flops:
    """FLOPs of a connector on the patches of one image; `inputs`: a gradient flows back into them."""
    with torch.device("meta"):
        connector = build_connector(config, in_width, out_width, num_patches)
    _set_trained(connector, trained)
    return _counted(connector, torch.empty(1, num_patches, in_width, device="meta", requires_grad=inputs), connector)


def _set_trained(module: nn.Module, trained: bool | tuple[bool, ...]) -> None:
    parameters = list(module.parameters())
    flags = [trained] * len(parameters) if isinstance(trained, bool) else trained
    if len(flags) != len(parameters):
        raise ConfigError(f"{len(flags)} parameters are said to be trained or not, of {len(parameters)}")
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)


def _counted(module: nn.Module, x: Tensor, run: Any) -> Flops:
    """Linear and convolutional layers by what they are given; products of activations by torch's count of the rest.

    torch's count of a convolution's backward pass takes the groups of a depthwise one for connected."""
    layers = {"forward": 0.0, "backward": 0.0, "flows": 0.0}

    def see(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        flops = 2.0 * output.numel() * layer.weight[0].numel()
        ways = layer.weight.requires_grad + inputs[0].requires_grad
        layers["forward"] += flops
        layers["backward"] += flops * ways * torch.is_grad_enabled()
        layers["flows"] += flops * output.requires_grad

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [layer.register_forward_hook(see) for layer in module.modules() if isinstance(layer, kinds)]
    with FlopCounterMode(display=False) as counter:
        run(x)
    for handle in handles:
        handle.remove()
    rest = max(0.0, counter.get_total_flops() - layers["forward"])
    share = layers["flows"] / max(1.0, layers["forward"])
    return Flops(layers["forward"] + rest, layers["backward"] + 2 * rest * share)


def batch_flops(model: MMGPT, batch: Batch) -> Flops:
    """FLOPs of a training step's forward and backward pass on a micro-batch, by what of the model is trained."""
    flops, images = Flops(), int(batch.image_tiles.sum())
    inputs = model.decoder.embedding.weight.requires_grad
    if images and model.vision is not None and model.connector is not None and model.config.connector is not None:
        grids = [(rows, columns) for rows, columns in batch.image_grids.tolist()]
        flags = [parameter.requires_grad for parameter in model.vision.parameters()]
        flops = flops.plus(vision_flops(model.vision.config, images, grids=grids, trained=flags))
        trains = any(parameter.requires_grad for parameter in model.connector.parameters())
        width, patches = model.vision.width, model.vision.num_patches
        one = connector_flops(
            model.config.connector, width, model.decoder.config.width, patches, trained=trains, inputs=any(flags)
        )
        flops = flops.plus(one.times(images))
        inputs = inputs or trains or any(flags)
    lora = 0 if model.config.lora is None else model.config.lora.rank
    trained = Trained(
        inputs=inputs,
        blocks=any(parameter.requires_grad for parameter in model.decoder.blocks.parameters()),
        head=(model.decoder.embedding if model.decoder.head is None else model.decoder.head).weight.requires_grad,
        lora_rank=lora,
    )
    supervised = int((batch.labels != IGNORE_INDEX).sum())
    config = model.decoder.config
    return flops.plus(decoder_flops(config, list(_texts(batch, config)), supervised=supervised, trained=trained))


def _texts(batch: Batch, config: DecoderConfig) -> Iterator[Text]:
    """The documents of a batch; of one with branches the shared part, and each branch with what it sees of it."""
    if config.memory_length:
        length = min(config.memory_length, config.max_length)
        for tokens in (batch.document_ids != 0).sum(dim=1).tolist():
            for start in range(0, tokens, length):
                new = min(length, tokens - start)
                yield new, new + min(start, config.memory_length)
        return
    for documents, branches in zip(batch.document_ids, batch.branch_ids, strict=True):
        parts, counts = torch.stack([documents, branches]).unique(dim=1, return_counts=True)
        shared: dict[int, int] = {}
        for (document, branch), count in zip(parts.T.tolist(), counts.tolist(), strict=True):  # in their order
            if document == 0:
                continue
            if branch == 0:
                shared[document] = count
            yield count, count + (shared.get(document, 0) if branch else 0)
