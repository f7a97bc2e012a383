"""From Documents to numbers: Document -> Example -> Batch.

Shapes: T tokens of one example, B rows, N images of the whole batch, k tokens per image.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image as PILImage
from torch import Tensor

from mm_gpt.document import Document, Image, Message, Segment, Text
from mm_gpt.errors import ContextOverflowError, MMGPTError
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.transforms import ImageTransform, ImageTransformConfig

IGNORE_INDEX = -100
"""The label of a position where nothing is learned."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
    image: ImageTransformConfig
    tokens_per_image: int
    """k, the number of placeholders an image takes; the connector's output length."""
    max_length: int
    """Longest example in tokens."""


@dataclass
class Example:
    """One Document in numbers."""

    input_ids: Tensor  # (T,)
    labels: Tensor  # (T,) the next token, already shifted; IGNORE_INDEX where nothing is learned
    position_ids: Tensor  # (T,) every branch continues from the end of the shared part
    branch_ids: Tensor  # (T,) 0 in the shared part, 1, 2, ... in the branches
    images: list[Image]
    id: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass
class Batch:
    """What the model eats. Attention never crosses documents; `document_ids` 0 is padding."""

    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    document_ids: Tensor  # (B, T)
    branch_ids: Tensor  # (B, T)
    image_rows: Tensor  # (N,) the row that owns each image, ascending
    pixel_values: Tensor  # (N, 3, H, W)
    ids: list[str] = field(default_factory=list)

    def to(self, device: torch.device | str) -> "Batch":
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **tensors)


class Processor:
    """Tokenizer and image transform together. `<image>`, placeholder and `</image>` are ids behind the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, config: ProcessorConfig, *, vocab_size: int):
        """`vocab_size` is the decoder's: some pad their tables beyond the tokenizer's ids."""
        self.tokenizer, self.config = tokenizer, config
        self.transform = ImageTransform(config.image)
        first = vocab_size
        self.image_start_id, self.image_patch_id, self.image_end_id = first, first + 1, first + 2
        self._image_ids = [first, *[first + 1] * config.tokens_per_image, first + 2]

    # ---- Documents from what people write ----

    def chat(self, messages: Sequence[Message], *, answer_starts: bool = True) -> Document:
        """Render chat messages in the ChatML form. Assistant turns are targets, up to and with their end mark.

        `answer_starts` opens the assistant's next turn. Raises MMGPTError naming the message that is malformed.
        """
        segments: list[Segment] = []
        for index, message in enumerate(messages):
            segments += self._message(index, message)
        if answer_starts:
            segments.append(Text("<|im_start|>assistant\n", is_target=False, is_control=True))
        return Document(tuple(segments))

    def _message(self, index: int, message: Message) -> list[Segment]:
        if not isinstance(message, dict) or "content" not in message:
            raise MMGPTError(f"message {index} is not a dict with 'role' and 'content'")
        role = message.get("role")
        if role not in ROLES:
            raise MMGPTError(f"message {index} has role {role!r}; use 'system', 'user' or 'assistant'")
        target = role == "assistant"
        ends = target and message.get("complete", True)  # an answer that was cut off does not teach to end there
        return [
            Text(f"<|im_start|>{role}\n", is_target=False, is_control=True),
            *(_content_part(index, part, target) for part in _content_parts(message["content"])),
            Text("<|im_end|>", is_target=ends, is_control=True),
            Text("\n", is_target=False),
        ]

    def captions(self, image: Image, prompt: str, captions: Sequence[str], *, id: str = "") -> Document:
        """One image and prompt with several captions, each in a branch of its own, for training."""
        # The branches begin with the header's last token: what it predicts, the caption's first token, differs.
        shared: list[Segment] = [
            Text("<|im_start|>user\n", is_target=False, is_control=True),
            image,
            Text(prompt, is_target=False),
            Text("<|im_end|>", is_target=False, is_control=True),
            Text("\n", is_target=False),
            Text("<|im_start|>assistant", is_target=False, is_control=True),
        ]
        branches = [(Text("\n", is_target=False), *_answer(caption)) for caption in captions]
        return Document(tuple(shared), tuple(branches), id=id)

    def questions(self, image: Image, pairs: Sequence[tuple[str, str]], *, id: str = "") -> Document:
        """One image with (question, answer) pairs, each in a branch of its own, for training."""
        shared: list[Segment] = [Text("<|im_start|>user\n", is_target=False, is_control=True), image]
        branches = [
            (
                Text(question, is_target=False),
                Text("<|im_end|>", is_target=False, is_control=True),
                Text("\n", is_target=False),
                Text("<|im_start|>assistant\n", is_target=False, is_control=True),
                *_answer(answer),
            )
            for question, answer in pairs
        ]
        return Document(tuple(shared), tuple(branches), id=id)

    # ---- Document -> Example ----

    def pixels(self, examples: Sequence[Example]) -> Tensor:
        """The images of several examples in order, decoded and transformed: (N, 3, H, W). Raises ImageError."""
        images = [self.transform(image.load()) for example in examples for image in example.images]
        return stack_pixels(images, self.config.image.size)

    def __call__(self, document: Document) -> Example:
        """Raises ContextOverflowError when the document is longer than the context: images are never cut."""
        ids, targets = self._encode(document.segments)
        positions, branches = list(range(len(ids))), [0] * len(ids)
        labels = _next_token_labels(ids, targets)
        shared = len(ids)
        for number, branch in enumerate(document.branches, start=1):
            branch_ids, branch_targets = self._encode(branch)
            ids += branch_ids
            labels += _next_token_labels(branch_ids, branch_targets)
            positions += range(shared, shared + len(branch_ids))
            branches += [number] * len(branch_ids)
        if len(ids) > self.config.max_length:
            raise ContextOverflowError(
                f"{document.id or 'the prompt'} has {len(ids)} tokens ({len(document.images)} images of "
                f"{len(self._image_ids)} tokens); the context holds {self.config.max_length}"
            )
        as_tensor = lambda values: torch.tensor(values, dtype=torch.long)  # noqa: E731
        return Example(
            as_tensor(ids), as_tensor(labels), as_tensor(positions), as_tensor(branches), document.images, document.id
        )

    def _encode(self, segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        targets: list[bool] = []
        runs: list[tuple[str, bool, bool]] = []
        for segment in [*segments, None]:
            if isinstance(segment, Text):
                runs.append((segment.text, segment.is_target, segment.is_control))
                continue
            run_ids, run_targets = self.tokenizer.encode_runs(runs)
            runs = []
            ids += run_ids
            targets += run_targets
            if segment is not None:
                ids += self._image_ids
                targets += [False] * len(self._image_ids)  # an image is read, never predicted, its marks included
        return ids, targets


def _answer(text: str) -> tuple[Text, Text]:
    return Text(text), Text("<|im_end|>", is_control=True)


def _next_token_labels(ids: list[int], targets: list[bool]) -> list[int]:
    """Labels are shifted here, once: position t learns token t+1 where that one is a target.

    The first token of a part is therefore never learned: what comes before it belongs to other parts as well.
    """
    shifted = [id if target else IGNORE_INDEX for id, target in zip(ids[1:], targets[1:], strict=True)]
    return [*shifted, IGNORE_INDEX][: len(ids)]


def _content_parts(content: object) -> list[object]:
    return list(content) if isinstance(content, list | tuple) else [content]


def _content_part(index: int, part: object, target: bool) -> Segment:
    if isinstance(part, str):
        return Text(part, is_target=target)
    if isinstance(part, Image | Text):
        return part
    if isinstance(part, PILImage.Image):
        return Image(part)
    if isinstance(part, dict):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return Text(part["text"], is_target=target)
        if part.get("type") in ("image", "image_url"):
            for key in ("image", "url", "path", "image_url"):
                source = part.get(key)
                if isinstance(source, dict):  # OpenAI's form: {"image_url": {"url": ...}}
                    source = source.get("url")
                if source is not None:
                    return Image(source)
    raise MMGPTError(f"message {index} has a part that is neither text nor image: {str(part)[:80]!r}")


def stack_pixels(pixels: Sequence[Tensor], size: int) -> Tensor:
    """Transformed images (3, size, size) as one tensor (N, 3, size, size); N is 0 for a batch of text alone."""
    return torch.stack(list(pixels)) if pixels else torch.zeros(0, 3, size, size)


def collate(
    rows: Sequence[Sequence[Example]],
    pixel_values: Tensor,
    *,
    pad_id: int = 0,
    pad_left: bool = False,
    pad_to_multiple: int = 1,
) -> Batch:
    """Rows of packed Examples as one Batch, padded to the longest row; `pixel_values` (N, 3, H, W) in row order."""
    length = max((sum(map(len, row)) for row in rows), default=0)
    length = -(-length // pad_to_multiple) * pad_to_multiple
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
            padding = torch.full((pad,), value, dtype=torch.long)
            columns[name].append(torch.cat([padding, *tensors] if pad_left else [*tensors, padding]))
    image_rows = [n for n, row in enumerate(rows) for example in row for _ in example.images]
    return Batch(
        input_ids=torch.stack(columns["input"]),
        labels=torch.stack(columns["label"]),
        position_ids=torch.stack(columns["position"]),
        document_ids=torch.stack(columns["document"]),
        branch_ids=torch.stack(columns["branch"]),
        image_rows=torch.tensor(image_rows, dtype=torch.long),
        pixel_values=pixel_values,
        ids=[" ".join(example.id for example in row) for row in rows],
    )
