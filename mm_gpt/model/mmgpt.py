"""MMGPT: vision encoder -> connector -> image tokens spliced between text tokens -> causal decoder.

The design is KOSMOS-1's (2302.14045). Shapes: B rows, T tokens, N tiles of all images, P patches, k tokens per tile,
D width. An image is one tile, or several: its parts at full resolution and the whole of it, small.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.cache import KVCache
from mm_gpt.model.decoder import Decoder, init_weights
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.lora import LoRAConfig, add_lora, merge_lora
from mm_gpt.model.masks import attention_mask, block_mask, uses_blocks
from mm_gpt.processor import Batch
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.concepts import ConceptsConfig, ConceptTokens
from mm_gpt.vision.connectors import ConnectorConfig, build_connector
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.native_vit import NativeViT
from mm_gpt.vision.tiling import TilingConfig, assemble

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    decoder: str | DecoderConfig
    """A name in the weight registry (its weights are then loaded, not stored again), or a complete config."""
    vision: VisionConfig | None = None
    """None, and no connector: a model of text alone."""
    connector: ConnectorConfig | None = None
    lora: LoRAConfig | None = None
    image_token_id: int | None = None
    """The id in the vocabulary that stands for one image token. None: three ids right behind the vocabulary, for the
    image's begin, its tokens and its end, with embeddings of their own."""
    tiling: TilingConfig | None = None
    """LLaVA-NeXT's and OneVision's way to lay the tokens of an image's tiles out, row by row, each with a newline."""
    prefix_lm: bool = False
    """What comes before the first target is read in both directions (PaliGemma)."""
    bidirectional_images: bool = False
    """The tokens of an image see each other in both directions (Gemma 3)."""

    def __post_init__(self) -> None:
        if (self.vision is None) != (self.connector is None):
            raise ConfigError("vision and connector go together: give both, or neither for a model of text alone")
        own = (self.image_token_id is not None, self.tiling is not None, self.bidirectional_images)
        if self.vision is not None and self.vision.concepts is not None and self.tiling is not None:
            raise ConfigError("concepts are those of a whole image: they do not go with tiling")
        if self.vision is None and any(own):
            raise ConfigError("image_token_id, tiling and bidirectional_images need a vision encoder")


class ImageFeatures(NamedTuple):
    """One image, as the decoder sees it."""

    tokens: Tensor  # (k, D)
    deepstack: tuple[Tensor, ...] = ()
    """(k, D) each: what is added to its tokens behind the first layers of the decoder (DeepStack, 2406.04334)."""


@dataclass(frozen=True)
class Embedded:
    """What goes into the decoder."""

    x: Tensor  # (B, T, D)
    added: tuple[Tensor, ...] = ()
    """(B, T, D) each: what is added behind the first layers."""


class SeesImages(Protocol):
    def see(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]] = ()) -> tuple[Tensor, Tensor | None]:
        """As `VisionEncoder.see`."""


class MMGPT(nn.Module):
    """The multimodal model. `decoder` keeps its own vocabulary."""

    def __init__(self, config: ModelConfig, decoder: Decoder | None = None):
        super().__init__()
        self.config = config
        if decoder is None:
            if isinstance(config.decoder, str):
                raise MMGPTError(f"the decoder {config.decoder!r} must be loaded first (mm_gpt.hub.load_decoder)")
            decoder = Decoder(config.decoder)
            if not decoder.embedding.weight.is_meta:
                init_weights(decoder)
        self.decoder = decoder
        if config.lora is not None:
            self.add_lora(config.lora)
        self.vision: VisionEncoder | None = None
        self.connector: nn.Module | None = None
        self.image_marks: nn.Parameter | None = None
        self.image_newline: nn.Parameter | None = None
        self.concepts: ConceptTokens | None = None
        self.frozen_tower: SeesImages | None = None
        """What sees in the place of a frozen tower, in training."""
        if config.vision is None or config.connector is None:
            return
        self.vision = VisionEncoder(config.vision)
        width = decoder.config.width
        self.connector = build_connector(config.connector, self.vision.width, width, self.vision.num_patches)
        empty = decoder.packed_head or decoder.embedding.weight.is_meta  # what is drawn now is replaced by what is read
        scale = 0.02 if empty else decoder.embedding.weight.float().std().item()
        if config.image_token_id is None:
            marks = torch.empty(2, width)  # embeddings of <image> and </image>
            self.image_marks = nn.Parameter(nn.init.normal_(marks, std=scale))
        if config.tiling is not None:
            self.image_newline = nn.Parameter(nn.init.normal_(torch.empty(width), std=scale))
        if config.vision.concepts is not None:
            self.concepts = ConceptTokens(config.vision.concepts, width)

    def add_concepts(self, config: ConceptsConfig, state: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
        """Concepts for a tower without: `state` has what `ConceptClassifier.load_untouched` takes.

        Raises ConfigError or CheckpointError where they do not fit the tower.
        """
        if self.vision is None:
            raise ConfigError("this model reads text alone: it has no vision encoder for concepts")
        self.vision.add_concepts(config)
        assert self.vision.concepts is not None
        self.vision.concepts.load_untouched(state, getattr(self.vision.tower, "trunk", None))
        self.config = dataclasses.replace(self.config, vision=self.vision.config)
        self.concepts = ConceptTokens(config, self.decoder.config.width)
        self.concepts.tokenize(tokenizer.encode)

    def add_lora(self, config: LoRAConfig) -> None:
        """Freeze the decoder and put low-rank updates on the linear layers of its blocks."""
        self.config = dataclasses.replace(self.config, lora=config)
        self.decoder.requires_grad_(False)
        add_lora(self.decoder.blocks, config)

    def merge_lora(self) -> None:
        """Fold the low-rank updates into the decoder's weights, which then are the model's own to store."""
        merge_lora(self.decoder)
        if self.config.lora is not None:
            self.config = dataclasses.replace(self.config, lora=None, decoder=self.decoder.config)

    @property
    def tokens_per_image(self) -> int:
        """k, the tokens of one tile and its concepts; 0 for a model of text alone."""
        own = 0 if self.connector is None else int(self.connector.num_tokens)  # type: ignore[arg-type]
        return own + (0 if self.concepts is None else self.concepts.num_tokens)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def placeholder_id(self) -> int:
        """The id that stands for one image token."""
        inside = self.config.image_token_id
        return self.decoder.config.vocab_size + 1 if inside is None else inside

    def embed(self, batch: Batch, images: Sequence[ImageFeatures] | None = None) -> Embedded:
        """Text and images in place; `images` are those of `image_tokens`, where they are known already.

        Raises MMGPTError naming the row when its placeholders do not match its images.
        """
        vocab, ids = self.decoder.config.vocab_size, batch.input_ids
        x = self.decoder.embed(ids.where(ids < vocab, 0))
        placeholders = ids == self.placeholder_id
        if images is None:
            images = self.image_tokens(batch)
        self._check_rows(placeholders, images, batch)
        if not images:
            return Embedded(x)
        if self.image_marks is not None:
            marks = self.image_marks.to(x.dtype)
            x = torch.where((ids == vocab).unsqueeze(-1), marks[0], x)
            x = torch.where((ids == vocab + 2).unsqueeze(-1), marks[1], x)
        # Rows and images come in the same order, so the n-th run of placeholders is the n-th image.
        placed = lambda into, parts: into.masked_scatter(  # noqa: E731
            placeholders.unsqueeze(-1), torch.cat(parts).to(x.dtype)
        )
        levels = zip(*(image.deepstack for image in images), strict=True)
        added = tuple(placed(torch.zeros_like(x), level) for level in levels)
        return Embedded(placed(x, [image.tokens for image in images]), added)

    def image_tokens(self, batch: Batch) -> list[ImageFeatures]:
        """Each image of the batch, in order: what an image gives does not depend on the others."""
        if len(batch.pixel_values) != int(batch.image_tiles.sum()):
            raise MMGPTError(
                f"{len(batch.pixel_values)} image tiles came for {int(batch.image_tiles.sum())} places in the batch"
            )
        if len(batch.pixel_values) == 0:
            return []
        if self.vision is None or self.connector is None:
            raise MMGPTError("this model reads text alone: it has no vision encoder for the images")
        sizes, grids = ([(a, b) for a, b in pairs.tolist()] for pairs in (batch.image_sizes, batch.image_grids))
        images = []
        for tiles, size, grid in zip(self._features(batch, grids), sizes, grids, strict=True):
            tokens = assemble(tiles, self.config.tiling, size=size, grid=grid, newline=self.image_newline)
            tokens, *deepstack = tokens.split(self.decoder.config.width, dim=-1)
            images.append(ImageFeatures(tokens, tuple(deepstack)))
        return images

    def _features(self, batch: Batch, grids: Sequence[tuple[int, int]]) -> Iterable[Tensor]:
        """The tiles of each image, (tiles, k, D), with DeepStack (tiles, k, layers · D).

        Images of any size may be large: they go one by one, but for training."""
        assert self.vision is not None
        assert self.connector is not None
        counts = batch.image_tiles.tolist()
        if self.training or not isinstance(self.vision.tower, NativeViT):
            patches, scores = self._see(batch.pixel_values, grids)
            tokens = self.connector(patches)
            return (tokens if scores is None else self._with_concepts(tokens, scores, batch)).split(counts)
        each = zip(batch.pixel_values.split(counts), grids, strict=True)
        return [self.connector(self._see(pixels, [grid])[0]) for pixels, grid in each]

    def _see(self, pixel_values: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        """Patch tokens (N, P, D_v), and the probabilities of classes (N, C) where the model has concepts.

        On the CPU in float32, also inside autocast: bf16 convolutions are slower there."""
        assert self.vision is not None
        if self.training and self.frozen_tower is not None:
            patches, scores = self.frozen_tower.see(pixel_values, grids)
            return patches.float(), scores
        dtype = next(self.vision.parameters()).dtype
        with torch.autocast(pixel_values.device.type, enabled=pixel_values.is_cuda and torch.is_autocast_enabled()):
            patches, scores = self.vision.see(pixel_values.to(dtype), grids)
        # A tower may run in bf16 beside a connector in float32: see VisionEncoder.prepare
        return (patches if dtype == pixel_values.dtype else patches.to(self.decoder.dtype)), scores

    def told(self, pixel_values: Tensor) -> list[list[tuple[str, float]]]:
        """Of each image (N, 3, H, W) the kind and the names that the decoder is told, with their probabilities."""
        if self.concepts is None:
            raise MMGPTError("this model has no concepts")
        scores = self._see(pixel_values, ())[1]
        assert scores is not None
        return self.concepts.told(scores)

    def _with_concepts(self, tokens: Tensor, scores: Tensor, batch: Batch) -> Tensor:
        """(N, k, D), the tokens of an image and of its concepts; blanks for what is not shown of it."""
        assert self.concepts is not None
        scores = scores.clone()
        for n, given in enumerate(batch.image_concepts):
            if given is not None:
                scores[n] = self.concepts.scores_of(given)
        told = self.concepts(scores, self.decoder.embed).to(tokens.dtype)
        if any(shown != "all" for shown in batch.image_shown):
            blind = torch.tensor([shown == "concepts" for shown in batch.image_shown], device=tokens.device)
            untold = torch.tensor([shown == "pixels" for shown in batch.image_shown], device=tokens.device)
            tokens = torch.where(blind[:, None, None], self.concepts.blank_image.to(tokens.dtype), tokens)
            told = torch.where(untold[:, None, None], self.concepts.blank.to(tokens.dtype), told)
        if "borrowed" in batch.image_shown:
            if not self.training:
                raise MMGPTError("an image is shown with borrowed tokens in training alone")
            of = [(n + 1) % len(tokens) if s == "borrowed" else n for n, s in enumerate(batch.image_shown)]
            tokens = tokens[of]
        return torch.cat([tokens, told], dim=1)

    def _check_rows(self, placeholders: Tensor, images: Sequence[ImageFeatures], batch: Batch) -> None:
        given = [0] * len(placeholders)
        for row, image in zip(batch.image_rows.tolist(), images, strict=True):
            given[row] += len(image.tokens)
        for row, (wanted, got) in enumerate(zip(placeholders.sum(dim=1).tolist(), given, strict=True)):
            if wanted != got:
                name = f" ({batch.ids[row]})" if row < len(batch.ids) and batch.ids[row].strip() else ""
                raise MMGPTError(f"row {row}{name}: {wanted} image placeholders, but its images give {got} tokens")

    def forward(
        self, batch: Batch, cache: KVCache | None = None, images: Sequence[ImageFeatures] | None = None
    ) -> Tensor:
        """Hidden states (B, T, D); logits are `decoder.logits` of the positions that need them.

        `images` are those of `image_tokens`, where they are known already: the batch then needs no pixels."""
        by_blocks = self.training and cache is None and uses_blocks(self.decoder.config, self.device)
        masks = self.masks(batch, by_blocks=by_blocks)
        embedded = self.embed(batch, images)
        x, positions, length = embedded.x, batch.position_ids, self.decoder.config.memory_length
        if not length or cache is not None:
            return self.decoder(x, positions, **masks, cache=cache, added=embedded.added)
        # Transformer-XL: segment after segment, each with the states of those before as its memory.
        states, memory = [], None
        segment = min(length, self.decoder.config.max_length)
        for start in range(0, x.shape[1], segment):
            end, first = start + segment, max(0, start - length)
            seen = masks["mask"][:, :, start:end, first:end] if isinstance(masks["mask"], Tensor) else None
            hidden, memory = self.decoder.forward_segment(x[:, start:end], positions[:, start:end], memory, mask=seen)
            states.append(hidden)
        return torch.cat(states, dim=1)

    def masks(self, batch: Batch, *, past: int = 0, by_blocks: bool = False) -> dict[str, "Tensor | BlockMask | None"]:
        """What the decoder's layers may look at: its arguments `mask` and `local_mask`.

        `past`: how many tokens of each row's document are in the cache. No image may begin in them and end here.
        `by_blocks`: for flex attention, where `uses_blocks` says that it serves.
        """
        prefix_lm, window = self.config.prefix_lm, self.decoder.config.window
        images = batch.input_ids == self.placeholder_id if self.config.bidirectional_images else None
        if images is not None and not images.any():
            images = None
        if by_blocks:
            mask = block_mask(batch, prefix_lm=prefix_lm, images=images)
            if mask is None or window is None:
                return {"mask": mask, "local_mask": None}
            return {"mask": mask, "local_mask": block_mask(batch, prefix_lm=prefix_lm, images=images, window=window)}
        local_mask = None
        if window is not None and (prefix_lm or images is not None or batch.branch_ids.any()):
            local_mask = attention_mask(batch, prefix_lm=prefix_lm, images=images, window=window, past=past)
        return {
            "mask": attention_mask(batch, prefix_lm=prefix_lm, images=images, past=past),
            "local_mask": local_mask,
        }

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed next-token cross-entropy in nats, and the number of supervised positions."""
        with self.decoder.learning(batch.labels):
            return self.decoder.loss(self(batch), batch.labels)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU. Raises ConfigError for other kinds: none of them is tested."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {name!r} here ({torch.cuda.device_count()} CUDA devices); use auto or cpu"
        )
    return device
