"""Prompts that are all known at once, with several answers to each, which grow side by side by a token a step.

For a model that is being trained: its weights are read anew each time. `TorchRows` works for every decoder on every
device. `CompiledRows` steps by the engine's compiled function on the CPU, from a `DecoderCopy` of the weights; a row
has the same bits whoever is beside it, and answers share what their prompt takes in memory.

Shapes: P prompts, R rows, one an answer, T tokens of the longest prompt, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mm_gpt.inference.block_sequences import BlockSequence, BlockSequences
from mm_gpt.inference.compiled import missing
from mm_gpt.kernels.team import default_threads
from mm_gpt.model.cache import KVCache
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.lora import LoRALinear
from mm_gpt.model.mmgpt import MMGPT, ImageFeatures
from mm_gpt.processor import Batch, Example, collate

TOGETHER = 0.75
"""Torch takes rows that have ended out of its batch when at most this share of it is left."""


class Rows(Protocol):
    """Answers that grow. Each row's number is that of the answer, over all prompts in order."""

    logits: Tensor
    """(R, V): what follows the prompt in each row."""

    def step(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Read an id in each of the rows (R',), numbers in order that the step before had as well: logits (R', V)."""

    def close(self) -> None:
        """Let go of all memory."""


class TorchRows:
    """One batch, padded on its left, with a prompt's keys and values again for each of its answers."""

    def __init__(self, model: MMGPT, prompts: Batch, images: Sequence[ImageFeatures], counts: Sequence[int], room: int):
        """`prompts`: a row each, padded on their left. counts: of each prompt's answers. room: tokens of an answer."""
        self.decoder, device = model.decoder, model.device
        width = prompts.input_ids.shape[1]
        cache = KVCache(self.decoder.config, len(counts), width + room, dtype=kv_dtype(model), device=device)
        logits = self.decoder.logits(model(prompts, cache, images)[:, -1])
        first = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)  # the prompt of each row
        cache.select_rows(first)
        self.cache, self.logits = cache, logits[first]
        self.rows = torch.arange(len(first))
        last = prompts.position_ids[first, -1]
        self.positions = (last if last.dim() == 1 else last.amax(dim=1)) + 1
        self.seen = prompts.document_ids[first] > 0  # (R, T): what is padding is never looked at

    def step(self, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Rows`. Rows that have ended stay until they are many: to take them out copies all others."""
        if len(rows) <= TOGETHER * len(self.rows):
            kept = torch.searchsorted(self.rows, rows).to(self.seen.device)
            self.cache.select_rows(kept)
            self.rows, self.positions, self.seen = rows, self.positions[kept], self.seen[kept]
        places = torch.searchsorted(self.rows, rows).to(self.seen.device)
        given = torch.zeros(len(self.rows), dtype=torch.long, device=self.seen.device)
        given[places] = ids.to(given.device)
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(self.rows), 1)], dim=1)
        mask = None if self.seen.all() else self.seen[:, None, None]  # (R, 1, 1, tokens so far)
        positions = self.positions.clamp(max=self.decoder.config.max_length - 1)[:, None]  # of rows that have ended
        hidden = self.decoder(self.decoder.embed(given)[:, None], positions, mask=mask, cache=self.cache)
        self.positions = self.positions + 1
        return self.decoder.logits(hidden[places, -1])

    def close(self) -> None:
        """Nothing is kept elsewhere."""


class CompiledRows:
    """Each row a sequence in blocks; what answers have in common is there once."""

    def __init__(
        self,
        model: MMGPT,
        copy: "DecoderCopy",
        prompts: Sequence[Example],
        images: Sequence[Sequence[ImageFeatures]],
        counts: Sequence[int],
    ):
        """`copy`, of the model's decoder, is up to date; prompts are read by the model itself, one by one."""
        self.sequences = copy.sequences
        self.rows: dict[int, BlockSequence] = {}
        logits = []
        try:
            for example, features, count in zip(prompts, images, counts, strict=True):
                batch = collate([[example]], torch.zeros(0, 3, 0, 0))
                cache = KVCache(model.decoder.config, 1, len(example), dtype=kv_dtype(model), device=model.device)
                hidden = model(batch, cache, features)[0, -1:]
                logits.append(model.decoder.logits(hidden).expand(count, -1))
                first = self._add(
                    self.sequences.begin(cache.keys[:, 0], cache.values[:, 0], int(batch.position_ids.max()) + 1)
                )
                for _ in range(count - 1):
                    self._add(self.sequences.fork(first))
        except BaseException:
            self.close()
            raise
        self.logits = torch.cat(logits)

    def _add(self, sequence: BlockSequence) -> BlockSequence:
        self.rows[len(self.rows)] = sequence
        return sequence

    def step(self, rows: Tensor, ids: Tensor) -> Tensor:
        """See `Rows`."""
        going = rows.tolist()
        for row in self.rows.keys() - set(going):
            self.sequences.release(self.rows.pop(row))
        return self.sequences.step([self.rows[row] for row in going], ids.tolist())

    def close(self) -> None:
        for sequence in self.rows.values():
            self.sequences.release(sequence)
        self.rows = {}


class DecoderCopy:
    """The weights of a decoder in training as the compiled step reads them, on the CPU.

    Matrices are in what training multiplies with: bfloat16 where they are stored so or under autocast, else float32.
    Low-rank updates are added into their matrices, which stay float32: many an update is too small for bfloat16.
    """

    def __init__(self, source: Decoder):
        """Call `update` before the first use. Raises ConfigError for a decoder that `can_copy` refuses."""
        self.source, self.dtypes = source, matrix_dtypes(source)
        decoder = Decoder(source.config).to_empty(device="cpu").requires_grad_(False).eval()
        for name, module in decoder.named_modules():
            if name in self.dtypes:
                module.weight.data = module.weight.data.to(self.dtypes[name])
        self.update_into(decoder)
        threads = min(default_threads(), torch.get_num_threads())
        self.sequences = BlockSequences(decoder, make_room=lambda: False, threads=threads)

    def fits(self, decoder: Decoder) -> bool:
        """Whether this is a copy of that decoder, as it is multiplied now."""
        return decoder is self.source and matrix_dtypes(decoder) == self.dtypes

    def update(self) -> None:
        """Take over the weights that the source has now."""
        self.update_into(self.sequences.decoder)

    @torch.no_grad()
    def update_into(self, decoder: Decoder) -> None:
        """The source's weights, in place."""
        for name, module in decoder.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if not own:
                continue
            source = self.source.get_submodule(name)
            if isinstance(source, LoRALinear):
                update = (source.scale * source.lora_b.float()) @ source.lora_a.float()
                own.pop("weight").copy_(update.add_(source.base.weight))
                source = source.base
            for key, parameter in own.items():
                parameter.copy_(source.get_parameter(key))


def can_copy(decoder: Decoder) -> bool:
    """Whether `DecoderCopy` takes it: on the CPU, in numbers that the compiled step multiplies."""
    plain = decoder.device.type == "cpu" and not decoder.packed_head
    return plain and decoder.dtype in (torch.float32, torch.bfloat16) and missing(decoder.config) is None


def matrix_dtypes(decoder: Decoder) -> dict[str, torch.dtype]:
    """What each matrix is multiplied in when the decoder runs now, by its module's name."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    found = {}
    for name, module in decoder.named_modules():
        if isinstance(module, LoRALinear):
            found[name] = torch.float32
        elif isinstance(module, nn.Linear) or name == "embedding":
            if name.endswith(".base") and name.removesuffix(".base") in found:
                continue
            is_bf16 = autocast or module.weight.dtype == torch.bfloat16
            found[name] = torch.bfloat16 if is_bf16 else torch.float32
    return found


def kv_dtype(model: MMGPT) -> torch.dtype:
    """What the model's keys and values are in now."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.decoder.dtype
