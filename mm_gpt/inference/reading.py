"""Prompts: what they hold, how they are read, and what of it is kept for the next one.

Reading a prompt costs far more than a token of its answer, and an image more than a page of text. So what was read is
kept for a while: the features of images, by what is in them, and the keys and values of whole prompts with their
answers, of which the next prompt takes over as much as it begins with.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm_gpt.document import Concepts, Image
from mm_gpt.inference.sequences import Sequences
from mm_gpt.model.mmgpt import MMGPT, ImageFeatures
from mm_gpt.processor import Example, Processor, collate

MAX_IMAGE_BYTES = 64 << 20
MAX_PROMPT_BYTES = 256 << 20
MAX_KEPT = 64
"""Prompts that are looked through for one that begins alike."""
MIN_SHARED = 8
"""Tokens that two prompts must share for it to be worth while."""
MAX_TILES = 16
"""Tiles of several images that go through the vision encoder together."""

Key = bytes


@dataclass(eq=False)
class Prompt:
    """A Document in numbers, its images in the model's pixels."""

    example: Example
    pixels: list[Tensor | None]
    """Of each image, its tiles (N, 3, H, W); None where they are not decoded yet."""
    keys: list[Key]
    """Of each image, a digest of its pixels, their shape, and how it was cut."""
    spans: list[tuple[int, int]]
    """The first and the last place of each image's tokens: a prompt is never cut between them."""
    features: dict[Key, ImageFeatures] = field(default_factory=dict)
    """What the vision encoder made of the images, until the prompt is read."""

    def __len__(self) -> int:
        return len(self.example)

    def tail(self, start: int) -> Example:
        """The example from token `start` on, with the images in it."""
        return tail(self.example, start)


@dataclass(eq=False)
class Reading:
    """A prompt that was read."""

    sequence: Any
    hidden: Tensor
    """(T, D) of the tokens that had to be read, the last one is the prompt's."""
    cached_tokens: int
    """Tokens of the prompt that had been read before."""


class Reader:
    """Reads prompts with a model, and keeps what it read within bounds of memory."""

    def __init__(self, model: MMGPT, processor: Processor, sequences: Sequences):
        self.model, self.processor, self.sequences = model, processor, sequences
        self.images = KeptFeatures(MAX_IMAGE_BYTES)
        self.prompts = KeptPrompts(sequences, MAX_PROMPT_BYTES)

    def prompt(self, example: Example, known: dict[Any, Key] | None = None) -> Prompt:
        """An example with its images decoded. Raises ImageError.

        `known` holds the digests of a conversation's images by source (which it keeps in memory) and cut; what is new
        is added. Images in it are not decoded but when they have to be encoded again."""
        known = {} if known is None else known
        pixels: list[Tensor | None] = []
        keys: list[Key] = []
        for image, grid, size in zip(example.images, example.grids, example.sizes, strict=True):
            name = (id(image.source), image.mirrored, image.shown, grid)
            tiles = None if name in known else self.processor.tiles(image, grid)
            if tiles is not None:
                known[name] = _key(tiles, grid, size, image)
            pixels.append(tiles)
            keys.append(known[name])
        return Prompt(example, pixels, keys, _spans(example, self.processor))

    def read(self, prompt: Prompt, *, reuse: bool = True) -> Reading:
        """Read a prompt, or what of it was not read before. `reuse` off reads all of it."""
        if self.model.config.prefix_lm:  # each token depends on those behind it
            reuse = False
        before, start = self.prompts.find(prompt) if reuse else (None, 0)
        new = prompt.tail(start)
        first = len(prompt.pixels) - len(new.images)
        self.see([prompt], first=first)
        features = [prompt.features[key] for key in prompt.keys[first:]]
        prompt.features, prompt.pixels = {}, [None] * len(prompt.pixels)
        batch = collate([[new]], self.processor.pixels([])).to(self.model.device)
        embedded, masks = self.model.embed(batch, features), self.model.masks(batch, past=start)
        sequence, hidden = self.sequences.read(before, start, embedded, batch.position_ids, masks)
        return Reading(sequence, hidden, start)

    def see(self, prompts: Many[Prompt], *, first: int = 0) -> None:
        """Encode the images of several prompts, from their image `first` on: those with few tiles together."""
        group: dict[Key, tuple[Prompt, int]] = {}
        tiles = 0
        for prompt in prompts:
            for number, key in list(enumerate(prompt.keys))[first:]:
                if key in prompt.features or key in group:
                    continue
                if (found := self.images.find(key)) is not None:
                    prompt.features[key] = found
                    continue
                more = len(self._tiles(prompt, number))
                if group and tiles + more > MAX_TILES:
                    self._encode(group)
                    group, tiles = {}, 0
                group[key] = (prompt, number)
                tiles += more
        if group:
            self._encode(group)
        for prompt in prompts:  # the same image in several prompts was encoded for one of them
            for key in prompt.keys[first:]:
                if key not in prompt.features:
                    prompt.features[key] = next(p.features[key] for p in prompts if key in p.features)

    def _tiles(self, prompt: Prompt, number: int) -> Tensor:
        tiles = prompt.pixels[number]
        if tiles is None:
            tiles = self.processor.tiles(prompt.example.images[number], prompt.example.grids[number])
            prompt.pixels[number] = tiles
        return tiles

    def _encode(self, group: dict[Key, tuple[Prompt, int]]) -> None:
        rows = [[only_image(prompt.example, number)] for prompt, number in group.values()]
        pixels = torch.cat([self._tiles(prompt, number) for prompt, number in group.values()])
        batch = collate(rows, pixels).to(self.model.device)
        for (key, (prompt, _)), image in zip(group.items(), self.model.image_tokens(batch), strict=True):
            # A part of all images' features would keep the others in memory as well.
            own = ImageFeatures(image.tokens.clone(), tuple(level.clone() for level in image.deepstack))
            prompt.features[key] = own
            self.images.keep(key, own)

    def forget(self) -> None:
        """To be called when the model's weights have changed."""
        self.images.clear()
        self.prompts.clear()


class KeptFeatures:
    """Features of images by digest. The least recently used go when they take too much memory."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.queries = self.hits = 0
        self._kept: OrderedDict[Key, ImageFeatures] = OrderedDict()

    def find(self, key: Key) -> ImageFeatures | None:
        self.queries += 1
        image = self._kept.get(key)
        if image is not None:
            self.hits += 1
            self._kept.move_to_end(key)
        return image

    def keep(self, key: Key, image: ImageFeatures) -> None:
        self._kept[key] = image
        self.bytes += _bytes(image)
        while self.bytes > self.max_bytes:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        self._kept.clear()
        self.bytes = 0


def _bytes(image: ImageFeatures) -> int:
    return sum(part.numel() * part.element_size() for part in (image.tokens, *image.deepstack))


@dataclass(eq=False)
class _KeptPrompt:
    ids: Tensor  # (S,) of the prompt and of what its answer has read
    images: list[tuple[int, Key]]
    """Where each begins."""
    sequence: Any
    bytes: int


class KeptPrompts:
    """Prompts that were read, with their answers, for those that begin alike.

    What is compared are the ids themselves, and the digests of whole images in their places.
    """

    def __init__(self, sequences: Sequences, max_bytes: int):
        self.sequences, self.max_bytes, self.bytes = sequences, max_bytes, 0
        self.queries = self.hits = 0
        """Tokens, not prompts."""
        self._kept: list[_KeptPrompt] = []
        """The one used last is the last."""

    def find(self, prompt: Prompt) -> tuple[Any, int]:
        """What shares the longest beginning with a prompt, and how much of it; at least its last token is left to be
        read. (None, 0) when that is not worth while."""
        self.queries += len(prompt)
        images = [(start, key) for (start, _), key in zip(prompt.spans, prompt.keys, strict=True)]
        shared = [(_common(prompt, images, kept), kept) for kept in self._kept]
        length, best = max(shared, key=lambda pair: pair[0], default=(0, None))
        if best is None or length < MIN_SHARED:
            return None, 0
        self.hits += length
        self._kept.remove(best)
        self._kept.append(best)
        return best.sequence, length

    def keep(self, prompt: Prompt, answer: Many[int], sequence: Any) -> None:
        """Take a sequence over: of the prompt, and as much of the answer as it has read."""
        sequence = self.sequences.own(sequence)
        ids = torch.cat([prompt.example.input_ids, torch.tensor(list(answer), dtype=torch.long)])[: sequence.length]
        images = [(start, key) for (start, _), key in zip(prompt.spans, prompt.keys, strict=True)]
        size = self.sequences.bytes(sequence)
        for kept in [kept for kept in self._kept if _is_part(kept, ids, images)]:
            self._drop(kept)
        self._kept.append(_KeptPrompt(ids, images, sequence, size))
        self.bytes += size
        while self._kept and (self.bytes > self.max_bytes or len(self._kept) > MAX_KEPT):
            self._drop(self._kept[0])

    def make_room(self) -> bool:
        """Let the prompt go that was used longest ago; whether there was one."""
        if self._kept:
            self._drop(self._kept[0])
            return True
        return False

    def clear(self) -> None:
        while self.make_room():
            pass

    def _drop(self, kept: _KeptPrompt) -> None:
        self._kept.remove(kept)
        self.bytes -= kept.bytes
        self.sequences.release(kept.sequence)


def _common(prompt: Prompt, images: list[tuple[int, Key]], kept: _KeptPrompt) -> int:
    """How many tokens at the start a prompt shares with one that is kept, whole images only."""
    most = min(len(prompt) - 1, len(kept.ids))
    differ = (prompt.example.input_ids[:most] != kept.ids[:most]).nonzero()
    length = int(differ[0]) if len(differ) else most
    for mine, its in zip(images, kept.images, strict=False):
        if mine != its:
            length = min(length, mine[0], its[0])
            break
    for start, last in prompt.spans:
        if start < length <= last:
            length = start
    return length


def _is_part(kept: _KeptPrompt, ids: Tensor, images: list[tuple[int, Key]]) -> bool:
    """Whether a prompt that is kept is the beginning of another one."""
    size = len(kept.ids)
    return size <= len(ids) and torch.equal(ids[:size], kept.ids) and images[: len(kept.images)] == kept.images


def _key(tiles: Tensor, grid: tuple[int, int], size: tuple[int, int], image: Image) -> Key:
    """A digest of what the model is given; the file it came from does not matter, the settings do."""
    given = sorted(image.source.scores.items()) if isinstance(image.source, Concepts) else None
    digest = hashlib.sha256(repr((tuple(tiles.shape), str(tiles.dtype), grid, size, image.shown, given)).encode())
    digest.update(tiles.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.digest()


def _spans(example: Example, processor: Processor) -> list[tuple[int, int]]:
    ids, starts = example.input_ids.tolist(), example.image_starts
    ends = [*starts[1:], len(ids)][: len(starts)]
    return [
        (start, max(at for at in range(start, end) if processor.is_image(ids[at])))
        for start, end in zip(starts, ends, strict=True)
    ]


def tail(example: Example, start: int) -> Example:
    """The rest of an example from token `start` on, with the images in it."""
    first = sum(at < start for at in example.image_starts)
    return Example(
        example.input_ids[start:],
        example.labels[start:],
        example.position_ids[start:],
        example.branch_ids[start:],
        images=example.images[first:],
        grids=example.grids[first:],
        whole=example.whole,
        sizes=example.sizes[first:],
        image_starts=[at - start for at in example.image_starts[first:]],
        id=example.id,
    )


def only_image(example: Example, number: int) -> Example:
    """An example of no text and one of the images."""
    none = example.input_ids[:0]
    return Example(
        none,
        none,
        example.position_ids[:0],
        none,
        images=[example.images[number]],
        grids=[example.grids[number]],
        whole=example.whole,
        sizes=[example.sizes[number]],
        id=example.id,
    )


def common_start(first: Many[int], second: Many[int]) -> int:
    """How many ids at the start two lists share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))
