"""MMGPT: vision encoder -> connector -> image tokens spliced between text tokens -> causal decoder.

The design is KOSMOS-1's (2302.14045). Shapes: B rows, T tokens, N images, P patches, k tokens per image, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.model.decoder import Decoder, DecoderConfig, KVCache, init_weights
from mm_gpt.model.lora import LoRAConfig, add_lora
from mm_gpt.model.loss import next_token_loss
from mm_gpt.processor import Batch
from mm_gpt.vision.connectors import ConnectorConfig, build_connector
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    decoder: str | DecoderConfig
    """A name in the weight registry (its weights are then loaded, not stored again), or a complete config."""
    vision: VisionConfig
    connector: ConnectorConfig
    lora: LoRAConfig | None = None


class MMGPT(nn.Module):
    """The multimodal model. `decoder` keeps its own vocabulary; the three image ids lie right behind it."""

    def __init__(self, config: ModelConfig, decoder: Decoder | None = None):
        super().__init__()
        self.config = config
        if decoder is None:
            if isinstance(config.decoder, str):
                raise MMGPTError(f"the decoder {config.decoder!r} must be loaded first (mm_gpt.hub.load_decoder)")
            decoder = Decoder(config.decoder)
            init_weights(decoder)
        self.decoder = decoder
        if config.lora is not None:
            decoder.requires_grad_(False)
            add_lora(decoder.blocks, config.lora)
        self.vision = VisionEncoder(config.vision)
        width = decoder.config.width
        self.connector = build_connector(config.connector, self.vision.width, width, self.vision.num_patches)
        scale = decoder.embedding.weight.float().std().item() if not decoder.embedding.weight.is_meta else 0.02
        self.image_marks = nn.Parameter(torch.randn(2, width) * scale)  # embeddings of <image> and </image>

    @property
    def tokens_per_image(self) -> int:
        return int(self.connector.num_tokens)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self.image_marks.device

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings (B, T, D), text and images in place.

        Raises MMGPTError naming the row when its placeholders do not match its images.
        """
        vocab = self.decoder.config.vocab_size
        ids = batch.input_ids
        is_text = ids < vocab
        x = self.decoder.embedding(ids.where(is_text, 0))
        placeholders = ids == vocab + 1
        self._check_rows(placeholders, batch)
        if len(batch.image_rows) == 0:
            return x
        image_tokens = self.connector(self._see(batch.pixel_values))  # (N, k, D)
        marks = self.image_marks.to(x.dtype)
        x = torch.where((ids == vocab).unsqueeze(-1), marks[0], x)
        x = torch.where((ids == vocab + 2).unsqueeze(-1), marks[1], x)
        # Rows and images come in the same order, so the n-th run of k placeholders is the n-th image.
        return x.masked_scatter(placeholders.unsqueeze(-1), image_tokens.to(x.dtype))

    def _see(self, pixel_values: Tensor) -> Tensor:
        """Patch tokens (N, P, D_v). On the CPU in float32, also inside autocast: bf16 convolutions are slower there."""
        with torch.autocast(pixel_values.device.type, enabled=pixel_values.is_cuda and torch.is_autocast_enabled()):
            return self.vision(pixel_values.to(next(self.vision.parameters()).dtype))

    def _check_rows(self, placeholders: Tensor, batch: Batch) -> None:
        if len(batch.pixel_values) != len(batch.image_rows):
            raise MMGPTError(f"{len(batch.pixel_values)} images came for {len(batch.image_rows)} places in the batch")
        given = torch.bincount(batch.image_rows, minlength=len(placeholders)) * self.tokens_per_image
        wanted = placeholders.sum(dim=1)
        if not torch.equal(given, wanted):
            row = int((given != wanted).nonzero()[0])
            name = f" ({batch.ids[row]})" if row < len(batch.ids) and batch.ids[row].strip() else ""
            raise MMGPTError(
                f"row {row}{name}: {int(wanted[row])} image placeholders, but its images give {int(given[row])} tokens"
            )

    def forward(self, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, D); logits are `decoder.logits` of the positions that need them."""
        return self.decoder(self.embed(batch), batch.position_ids, mask=attention_mask(batch), cache=cache)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed next-token cross-entropy in nats, and the number of supervised positions."""
        return next_token_loss(self(batch), self.decoder.head_weight, batch.labels)


def attention_mask(batch: Batch) -> Tensor | None:
    """True where a query (B, 1, T, T) may look: back, inside its own document, in the shared part or its own branch.

    None when every row is one document without branches or padding: plain causal attention is faster.
    """
    documents, branches = batch.document_ids, batch.branch_ids
    if not branches.any() and (documents == documents[:, :1]).all() and documents.all():
        return None
    T = documents.shape[1]
    same = documents.unsqueeze(2) == documents.unsqueeze(1)  # (B, query, key)
    visible = (branches.unsqueeze(1) == 0) | (branches.unsqueeze(2) == branches.unsqueeze(1))
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    # Padding sees padding only: a row of the mask without any True would make its softmax NaN.
    return (same & visible & causal).unsqueeze(1)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"there is no device {name!r} here ({torch.cuda.device_count()} CUDA devices); use auto or cpu"
        )
    return device
