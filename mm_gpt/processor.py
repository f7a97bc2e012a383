"""From Documents to numbers: Document -> Example -> Batch.

Shapes: T tokens of one example, B rows, M images and N tiles of the whole batch (an image is one tile or several), k
tokens per tile.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_gpt.document import Concepts, Document, Image, Message, Segment, Text
from mm_gpt.errors import ConfigError, ContextOverflowError, MMGPTError
from mm_gpt.templates.chat_template import ChatTemplate, begins_with, content_part, is_learned
from mm_gpt.templates.image_text import ImageTextConfig, image_text, mrope_positions
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.tiling import Tiled, Tiler, TilingConfig
from mm_gpt.vision.transforms import ImageTransform, ImageTransformConfig

IGNORE_INDEX = -100
"""The label of a position where nothing is learned."""
Size = tuple[int, int]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    image: ImageTransformConfig | None = None
    """None: a model of text alone."""
    tokens_per_image: int = 0
    """k, the number of placeholders that one tile takes; the connector's output length."""
    max_length: int
    """Longest example in tokens."""
    tiling: TilingConfig | None = None
    """How an image is cut into tiles; None: it is one."""
    image_text: ImageTextConfig | None = None
    """How an image is written with the vocabulary's own special tokens; None: with three ids right behind it."""
    mrope: bool = False
    """Positions have three components, in images the row and the column of a token besides its time (M-RoPE)."""
    begin_of_text: bool = False
    """Begin each text with the tokenizer's own first ids, unless it is written with them already."""
    begin_of_chat: bool = True
    """With `begin_of_text`: chats as well. Off for decoders alone, whose templates write what they want themselves."""

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1, not {self.max_length}")
        if self.image is None and (self.tokens_per_image or self.tiling is not None or self.image_text is not None):
            raise ConfigError("tokens_per_image, tiling and image_text need image")
        if self.image is not None and self.tokens_per_image < 1:
            raise ConfigError(f"image needs tokens_per_image of at least 1, not {self.tokens_per_image}")
        if self.tiling is not None and self.image_text is None:
            raise ConfigError("tiling needs image_text: how the tiles are written")
        if self.mrope and (self.tiling is None or self.tiling.kind != "native"):
            raise ConfigError("mrope needs tiling 'native': the rows and columns of an image are those of its tokens")


@dataclass
class Example:
    """One Document in numbers."""

    input_ids: Tensor  # (T,)
    labels: Tensor  # (T,) the next token, already shifted; IGNORE_INDEX where nothing is learned
    position_ids: Tensor  # (T,), with M-RoPE (T, 3); every branch continues from the end of the shared part
    branch_ids: Tensor  # (T,) 0 in the shared part, 1, 2, ... in the branches
    images: list[Image]
    grids: list[tuple[int, int]] = field(default_factory=list)
    """Rows and columns of tiles that each image is cut into, besides the one of the whole; (0, 0): not cut."""
    whole: bool = True
    """An image that is cut has the tile of the whole as well."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(height, width) of each image; (0, 0) where nothing depends on it."""
    image_starts: list[int] = field(default_factory=list)
    """The place of each image's first token."""
    image_tokens: int = 0
    """Tokens that stand for images, their marks included."""
    id: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class TiledImage(Image):
    """An image that is in the model's pixels already: those of the file are gone. See `Processor.tiled`."""

    tiles: Tiled | None = None

    def size(self) -> Size:
        assert self.tiles is not None
        return self.tiles.size


@dataclass
class Batch:
    """What the model eats. Attention never crosses documents; `document_ids` 0 is padding."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    position_ids: Tensor  # (B, T), with M-RoPE (B, T, 3): time, row and column
    document_ids: Tensor  # (B, T)
    branch_ids: Tensor  # (B, T)
    image_rows: Tensor  # (M,) the row that owns each image, ascending
    image_grids: Tensor  # (M, 2) rows and columns of tiles that each image is cut into, besides the one of the whole
    image_tiles: Tensor  # (M,) the tiles of each image, the one of the whole included
    image_sizes: Tensor  # (M, 2) height and width of each image; 0 where nothing depends on it
    pixel_values: Tensor  # (N, 3, H, W)
    image_shown: list[str] = field(default_factory=list)
    """Of each image, what a model with concepts is given of it: see `Image.shown`."""
    image_concepts: list[Mapping[str, float] | None] = field(default_factory=list)
    """Of each image, its concepts where they are given, not seen."""
    ids: list[str] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        """Between processes, ids travel as arrays: a handle of shared memory for each would take longer."""
        small = {
            k: v.numpy()
            for k, v in vars(self).items()
            if isinstance(v, Tensor) and v.is_cpu and not v.is_floating_point()
        }
        return vars(self) | small

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, torch.from_numpy(value) if isinstance(value, np.ndarray) else value)

    def to(self, device: torch.device | str) -> "Batch":
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)


@dataclass
class _Part:
    """A run of segments in numbers."""

    ids: list[int] = field(default_factory=list)
    targets: list[bool] = field(default_factory=list)
    images: list[tuple[int, int, Image, Size, Size]] = field(default_factory=list)
    """The places of each image's first id and of its last placeholder, the image, its grid and its size."""


class Processor:
    """Tokenizer and image transform together: the same one for training and for inference."""

    def __init__(
        self, tokenizer: Tokenizer, config: ProcessorConfig, *, vocab_size: int, template: ChatTemplate | None = None
    ):
        """`vocab_size` is the decoder's: some pad their tables beyond the tokenizer's ids. `template` renders chats;
        without one they are written as ChatML.

        Raises ConfigError when the tokenizer lacks the image token that the configuration names.
        """
        self.tokenizer, self.config, self.template, self.vocab_size = tokenizer, config, template, vocab_size
        self.transform = None if config.image is None else ImageTransform(config.image)
        self._tiler = None if config.image is None else Tiler(config.image, config.tiling)
        self._placeholder: int | None = None
        if config.image_text is None:
            # `<image>`, placeholder and `</image>` are ids behind the vocabulary.
            self.image_start_id, self.image_patch_id, self.image_end_id = vocab_size, vocab_size + 1, vocab_size + 2
        elif config.image_text.token not in tokenizer.special:
            raise ConfigError(f"the tokenizer has no special token {config.image_text.token!r} for images")
        else:
            self._placeholder = tokenizer.special[config.image_text.token]

    # ---- Documents from what people write ----

    def chat(self, messages: Sequence[Message], *, answer_starts: bool = True) -> Document:
        """Render chat messages by the model's template. Assistant turns are targets, up to and with their end mark.

        `answer_starts` opens the assistant's next turn. Raises MMGPTError naming the message that is malformed.
        """
        if self.template is not None:
            how = self.config.image_text
            token = None if how is None else how.written or how.token
            return Document(
                tuple(self.template.render(messages, add_generation_prompt=answer_starts, image_token=token))
            )
        segments: list[Segment] = []
        for index, message in enumerate(messages):
            segments += self._message(index, message)
        if answer_starts:
            segments.append(Text("<|im_start|>assistant\n", is_target=False, is_control=True))
        return Document(tuple(segments))

    def training_chat(self, messages: Sequence[Message]) -> Document:
        """Chat messages to learn the answers of. Where the template writes no end mark behind the last one (LLaVA's
        does not, nor GLM's, whose mark is the next speaker's), the end of the text is: without one a model would learn
        never to stop.

        Raises what `chat` does.
        """
        document = self.chat(messages, answer_starts=False)
        last = next((s for s in document.segments[::-1] if isinstance(s, Text) and s.is_target), None)
        is_closed = last is None or (last.is_control and last.text.rstrip().endswith(self.tokenizer.end_tokens))
        if is_closed or not is_learned(len(messages) - 1, messages[-1]) or not messages[-1].get("complete", True):
            return document
        segments = list(document.segments)
        while isinstance(segments[-1], Text) and not segments[-1].is_target:  # a space, which nobody would write
            segments.pop()
        return Document((*segments, Text(self.tokenizer.end_of_text, is_control=True)))

    def _message(self, index: int, message: Message) -> list[Segment]:
        if not isinstance(message, dict) or "content" not in message:
            raise MMGPTError(f"message {index} is not a dict with 'role' and 'content'")
        role = message.get("role")
        if role not in ROLES:
            raise MMGPTError(f"message {index} has role {role!r}; use 'system', 'user' or 'assistant'")
        target = is_learned(index, message)
        parts = [content_part(index, part, is_target=target) for part in _content_parts(message["content"])]
        if not target:
            parts = [dataclasses.replace(part, is_target=False) if isinstance(part, Text) else part for part in parts]
        ends = target and message.get("complete", True)  # an answer that was cut off does not teach to end there
        return [
            Text(f"<|im_start|>{role}\n", is_target=False, is_control=True),
            *parts,
            Text("<|im_end|>", is_target=ends, is_control=True),
            Text("\n", is_target=False),
        ]

    def captions(self, image: Image, prompt: str, captions: Sequence[str], *, id: str = "") -> Document:
        """One image and prompt with several captions, each in a branch of its own, for training."""
        return self.questions(image, [(prompt, caption) for caption in captions], id=id)

    def questions(self, image: Image, pairs: Sequence[tuple[str, str]], *, id: str = "") -> Document:
        """One image with (question, answer) pairs, each in a branch of its own, for training."""
        return Document((), tuple(self._pair(image, question, answer) for question, answer in pairs), id=id)

    def _pair(self, image: Image, question: str, answer: str) -> tuple[Segment, ...]:
        messages: list[Message] = [
            {"role": "user", "content": [image, question]},
            {"role": "assistant", "content": answer},
        ]
        return self.training_chat(messages).segments

    # ---- Document -> Example ----

    def pixels(self, examples: Sequence[Example]) -> Tensor:
        """The images of several examples in order, decoded, cut and transformed: (N, 3, H, W). Raises ImageError."""
        if self._tiler is None or not any(example.images for example in examples):
            return stack_pixels([], self.config.image)
        return torch.cat(
            [
                self.tiles(image, grid)
                for example in examples
                for image, grid in zip(example.images, example.grids, strict=True)
            ]
        )

    def tiled(self, image: Image) -> TiledImage:
        """A prompt's only image, decoded, cut and transformed now: in another thread, say. Raises ImageError, and
        MMGPTError where the model takes no images."""
        if self._tiler is None:
            raise MMGPTError(f"{image.name}: this model reads text alone, no images")
        return TiledImage(
            image.name, shown=image.shown, tiles=self._tiler(image.load())
        )  # the name: bytes would stay in memory

    def tiles(self, image: Image, grid: Size) -> Tensor:
        """One image, cut as its Example says: (N, 3, H, W). Raises ImageError."""
        if isinstance(image, TiledImage) and image.tiles is not None:
            return image.tiles.pixel_values
        if isinstance(image.source, Concepts):
            assert self.config.image is not None
            return torch.zeros(1, 3, self.config.image.size, self.config.image.size)
        assert self._tiler is not None
        return self._tiler(image.load(), alone=grid != (0, 0)).pixel_values

    def __call__(self, document: Document) -> Example:
        """Raises ContextOverflowError when the document is longer than the context: images are never cut."""
        parts = [self._encode([*document.segments, *branch]) for branch in document.branches or ((),)]
        shared = _common(parts) if document.branches else len(parts[0].ids)
        ids, branches = parts[0].ids[:shared], [0] * shared
        positions = [self._positions(parts[0])[:shared]]
        labels = _next_token_labels(ids, parts[0].targets[:shared])
        images = [found for found in parts[0].images if found[0] < shared]
        starts = [at for at, *_ in images]
        for number, part in enumerate(parts if document.branches else (), start=1):
            end = max((at for at, target in enumerate(part.targets, start=1) if target), default=len(part.ids))
            own = part.ids[shared:end]  # what the template writes behind the answer is for nobody to read
            inside = [found for found in part.images if shared <= found[0] < end]
            images += inside
            starts += [at - shared + len(ids) for at, *_ in inside]
            ids = ids + own
            labels += _next_token_labels(own, part.targets[shared:end])
            positions.append(self._positions(part)[shared:end])
            branches += [number] * len(own)
        image_tokens = sum(map(self.is_image, ids))
        if len(ids) > self.config.max_length:
            raise ContextOverflowError(
                f"{document.id or 'the prompt'} has {len(ids)} tokens ({len(images)} images of {image_tokens} tokens "
                f"in all); the context holds {self.config.max_length}"
            )
        as_tensor = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
        return Example(
            as_tensor(ids),
            as_tensor(labels),
            torch.cat(positions),
            as_tensor(branches),
            images=[image for _, _, image, _, _ in images],
            grids=[grid for *_, grid, _ in images],
            whole=self.config.tiling is None or self.config.tiling.whole,
            sizes=[size for *_, size in images],
            image_starts=starts,
            image_tokens=image_tokens,
            id=document.id,
        )

    def _positions(self, part: _Part) -> Tensor:
        """(T,), or (T, 3) with M-RoPE."""
        if not self.config.mrope:
            return torch.arange(len(part.ids))
        return mrope_positions(len(part.ids), [(first, grid) for first, _, _, grid, _ in part.images])

    def count(self, document: Document) -> int:
        """Tokens that a document without branches takes, however many the context holds. Raises ImageError."""
        return len(self._encode(document.segments).ids)

    def extent(self, segments: Sequence[Segment]) -> tuple[int, int, int]:
        """How a branch is read, in tokens: what it may share with others (up to the last one before its first target),
        where its last target ends, and all of it. Raises ImageError.
        """
        targets = self._encode(segments).targets
        first = targets.index(True) if True in targets else len(targets)
        end = max((at for at, target in enumerate(targets, start=1) if target), default=len(targets))
        return max(0, first - 1), end, len(targets)

    def is_image(self, id: int) -> bool:
        """Whether an id stands for (a part of) an image."""
        return id >= self.vocab_size if self._placeholder is None else id == self._placeholder

    def _encode(self, segments: Sequence[Segment]) -> _Part:
        part = _Part()
        runs: list[tuple[str, bool, bool]] = []
        written: list[tuple[Image, Size, Size, int]] = []  # image, grid, size, placeholders
        num_images = sum(isinstance(segment, Image) for segment in segments)

        def flush() -> None:
            ids, targets = self.tokenizer.encode_runs(runs)
            part.ids += ids
            part.targets += targets
            runs.clear()

        first = segments[0] if segments else None
        is_template = isinstance(first, Text) and first.is_control
        has_ids = isinstance(first, Text) and first.ids is not None  # whoever chose the tokens chose the first one
        wanted = self.config.begin_of_text and (self.config.begin_of_chat or not is_template) and not has_ids
        if wanted and not begins_with(segments, self.tokenizer.names.get("bos_token")):
            part.ids += self.tokenizer.prefix_ids
            part.targets += [False] * len(part.ids)
        for segment in segments:
            if isinstance(segment, Text) and segment.ids is not None:
                flush()
                part.ids += segment.ids
                part.targets += [segment.is_target] * len(segment.ids)
                continue
            if isinstance(segment, Text):
                runs.append((segment.text, segment.is_target, segment.is_control))
                continue
            if self._tiler is None:
                raise MMGPTError(f"{segment.name}: this model reads text alone, no images")
            size = (0, 0) if self.config.tiling is None else segment.size()
            grid = self._tiler.grid(*size, alone=num_images == 1)
            if self.config.image_text is None:
                flush()
                part.images.append((len(part.ids), len(part.ids) + self.config.tokens_per_image, segment, grid, size))
                own = [self.image_start_id, *[self.image_patch_id] * self.config.tokens_per_image, self.image_end_id]
                part.ids += own
                part.targets += [False] * len(own)  # an image is read, never predicted, its marks included
            else:
                text = image_text(
                    self.config.image_text,
                    self.config.tokens_per_image,
                    grid,
                    size,
                    self.config.tiling,
                    number=len(written),
                    count=num_images,
                )
                runs.append((text, False, True))
                written.append((segment, grid, size, text.count(self.config.image_text.token)))
        flush()
        if written:  # the text was encoded as a whole: find each image's first id
            places = [at for at, id in enumerate(part.ids) if id == self._placeholder]
            for image, grid, size, count in written:
                part.images.append((places[0], places[count - 1], image, grid, size))
                del places[:count]
        return part


def _common(parts: Sequence[_Part]) -> int:
    """How many ids at the start all parts share, images included.

    At least the last id before a part's first target stays with the part: what that id predicts differs. An image's
    placeholders stay together.
    """
    length = min(len(part.ids) for part in parts)
    for part in parts:
        target = part.targets.index(True) if True in part.targets else len(part.ids)
        length = min(length, target - 1)
    first, *others = parts
    for other in others:
        length = next((at for at in range(length) if first.ids[at] != other.ids[at]), length)
        for (at, _, image, grid, _), (_, _, its, its_grid, _) in zip(first.images, other.images, strict=False):
            if image is not its or grid != its_grid:
                length = min(length, at)
                break
    while inside := [at for part in parts for at, last, *_ in part.images if at < length <= last]:
        length = min(inside)
    return max(0, length)


def _next_token_labels(ids: list[int], targets: list[bool]) -> list[int]:
    """Labels are shifted here, once: position t learns token t+1 where that one is a target.

    The first token of a part is therefore never learned: what comes before it belongs to other parts as well.
    """
    shifted = [id if target else IGNORE_INDEX for id, target in zip(ids[1:], targets[1:], strict=True)]
    return [*shifted, IGNORE_INDEX][: len(ids)]


def _content_parts(content: object) -> list[object]:
    return list(content) if isinstance(content, list | tuple) else [content]


def stack_pixels(pixels: Sequence[Tensor], config: ImageTransformConfig | None) -> Tensor:
    """Transformed tiles (3, size, size) as one tensor (N, 3, size, size); N is 0 for a batch of text alone."""
    size = 0 if config is None else config.size
    return torch.stack(list(pixels)) if pixels else torch.zeros(0, 3, size, size)


def collate(
    rows: Sequence[Sequence[Example]],
    pixel_values: Tensor,
    *,
    pad_id: int = 0,
    pad_left: bool = False,
    pad_to_multiple: int = 1,
) -> Batch:
    """Rows of packed Examples as one Batch, padded to the longest row.

    pixel_values (N, 3, H, W): the tiles of all images, in row order.
    """
    length = max((sum(map(len, row)) for row in rows), default=0)
    length = -(-max(1, length) // pad_to_multiple) * pad_to_multiple
    components = next((e.position_ids.shape[1:] for row in rows for e in row), ())
    columns: dict[str, list[Tensor]] = {name: [] for name in ("input", "label", "position", "document", "branch")}
    for row in rows:
        pad = length - sum(map(len, row))
        parts = {
            "input": ([e.input_ids for e in row], pad_id),
            "label": ([e.labels for e in row], IGNORE_INDEX),
            "position": ([e.position_ids for e in row], 0),
            "document": ([torch.full_like(e.input_ids, n) for n, e in enumerate(row, start=1)], 0),
            "branch": ([e.branch_ids for e in row], 0),
        }
        for name, (tensors, value) in parts.items():
            shape = (pad, *components) if name == "position" else (pad,)
            padding = torch.full(shape, value, dtype=torch.long)
            columns[name].append(torch.cat([padding, *tensors] if pad_left else [*tensors, padding]))
    examples = [(n, example) for n, row in enumerate(rows) for example in row]
    grids = [grid for _, example in examples for grid in example.grids]
    sizes = [size for _, example in examples for size in example.sizes]
    tiles = [max(1, math.prod(g) + example.whole) for _, example in examples for g in example.grids]
    images = [image for _, example in examples for image in example.images]
    return Batch(
        input_ids=torch.stack(columns["input"]),
        labels=torch.stack(columns["label"]),
        position_ids=torch.stack(columns["position"]),
        document_ids=torch.stack(columns["document"]),
        branch_ids=torch.stack(columns["branch"]),
        image_rows=torch.tensor([n for n, example in examples for _ in example.grids], dtype=torch.long),
        image_grids=torch.tensor(grids, dtype=torch.long).reshape(-1, 2),
        image_tiles=torch.tensor(tiles, dtype=torch.long),
        image_sizes=torch.tensor(sizes, dtype=torch.long).reshape(-1, 2),
        pixel_values=pixel_values,
        image_shown=["concepts" if _given(i) is not None and i.shown == "all" else i.shown for i in images],
        image_concepts=[_given(image) for image in images],
        ids=[" ".join(example.id for example in row) for row in rows],
    )


def _given(image: Image) -> Mapping[str, float] | None:
    return image.source.scores if isinstance(image.source, Concepts) else None
