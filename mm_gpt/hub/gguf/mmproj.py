"""The vision half of a model as llama.cpp's `mmproj` file: encoder, projector, and how its images are prepared.

The format has two projectors that fit ours: `mlp` (LLaVA-1.5) and `idefics3` (Idefics3, SmolVLM). It has keys for
sizes, mean and deviation. What it has none for is fixed in llama.cpp by the projector: the resize filter, padding, the
tanh approximation of GELU. `differences` says where that is not what the model has.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.gguf.writer import FILE_TYPES, add_tensor, finish
from mm_gpt.hub.weights import Table, same, written
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.native_vit import NativeViTConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = logging.getLogger(__name__)
INSTEAD = "--decoder-only exports the language model alone"
_NAMES = {
    "pre_norm": ("v.pre_ln",),
    "blocks.{i}.attention_norm": ("v.blk.{i}.ln1",),
    "blocks.{i}.attention.qkv": tuple(f"v.blk.{{i}}.attn_{p}" for p in "qkv"),
    "blocks.{i}.attention.out": ("v.blk.{i}.attn_out",),
    "blocks.{i}.mlp_norm": ("v.blk.{i}.ln2",),
    "blocks.{i}.mlp.up": ("v.blk.{i}.ffn_up",),
    "blocks.{i}.mlp.down": ("v.blk.{i}.ffn_down",),
    "post_norm": ("v.post_ln",),
}
TOWER: Table = {
    "class_token": same("v.class_embd"),
    "patch_embedding.weight": same("v.patch_embd.weight"),
    "patch_embedding.bias": same("v.patch_embd.bias"),
    "position_embedding": same("v.position_embd.weight"),
    **{
        f"{ours}.{part}": same(*(f"{name}.{part}" for name in theirs))
        for ours, theirs in _NAMES.items()
        for part in ("weight", "bias")
    },
}
PROJECTORS: dict[str, tuple[str, Table]] = {
    "mlp": (
        "mlp",
        {f"fc{n}.{part}": same(f"mm.{place}.{part}") for n, place in ((1, 0), (2, 2)) for part in ("weight", "bias")},
    ),
    "pixel_shuffle": ("idefics3", {"projection.weight": same("mm.model.fc.weight")}),
}
"""By our connector: llama.cpp's projector and its names."""


def write_mmproj(model: MMGPT, processor: Processor, path: Path, *, dtype: str) -> None:
    """Raises CheckpointError for what llama.cpp has no projector for."""
    from gguf import GGUFWriter

    vision, connector, image = model.config.vision, model.config.connector, processor.config.image
    assert vision is not None
    assert connector is not None
    assert image is not None
    if isinstance(vision.model, NativeViTConfig):
        raise CheckpointError(f"a tower for images of any size is not written as GGUF; {INSTEAD}")
    if not isinstance(vision.model, ViTConfig):
        raise CheckpointError(f"vision encoder {vision.model!r} has no counterpart in llama.cpp; {INSTEAD}")
    tower = vision.model
    if reason := _refusal(model, processor, tower, connector):
        raise CheckpointError(f"{reason} has no counterpart in llama.cpp; {INSTEAD}")
    projector, table = PROJECTORS[connector.kind]
    for difference in differences(tower, connector, image):
        logger.warning("llama.cpp: %s", difference)
    writer = GGUFWriter(path, "clip", use_temp_file=True)
    writer.add_type("mmproj")
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    _add_settings(writer, model, tower, image)
    if projector == "idefics3":
        assert processor.config.tiling is not None
        writer.add_vision_projector_scale_factor(connector.scale)
        writer.add_vision_preproc_image_size(processor.config.tiling.longest_edge)
    else:
        writer.add_array("clip.vision.feature_layer", [tower.depth])
    assert model.vision is not None
    assert model.connector is not None
    equal = lambda _, num, rows: [rows // num] * num  # noqa: E731
    skipped = () if tower.post_norm else ("v.post_ln.",)
    layers = tuple(f"v.blk.{layer}." for layer in range(tower.depth, tower.num_layers))
    for name, tensor in written(model.vision.get_submodule("tower"), TOWER, equal):
        if name.startswith((*skipped, *layers)):
            continue  # what is in the file is run
        precise = name.startswith(("v.patch_embd", "v.position_embd"))
        add_tensor(writer, name, tensor, "float32" if precise else dtype)
    for name, tensor in written(model.connector, table, equal):
        add_tensor(writer, name, tensor, dtype)
    finish(writer)


def _add_settings(writer: "GGUFWriter", model: MMGPT, tower: ViTConfig, image: ImageTransformConfig) -> None:
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(tower.mlp_width)
    writer.add_vision_block_count(tower.depth)
    writer.add_vision_head_count(tower.num_heads)
    writer.add_vision_projection_dim(model.decoder.config.width)
    writer.add_vision_attention_layernorm_eps(tower.norm_eps)
    writer.add_vision_image_mean(list(image.mean))
    writer.add_vision_image_std(list(image.std))
    writer.add_vision_use_gelu(tower.activation != "quick_gelu")


def _refusal(model: MMGPT, processor: Processor, tower: ViTConfig, connector: ConnectorConfig) -> str | None:
    """The first setting that llama.cpp cannot follow."""
    vision, tiling = model.config.vision, processor.config.tiling
    assert vision is not None
    if connector.kind not in PROJECTORS:
        return f"connector {connector.kind!r}"
    idefics = connector.kind == "pixel_shuffle"
    text = processor.config.image_text
    if text is None:
        return "begin and end marks of images behind the vocabulary"
    if (text.kind, text.before, text.after) != ("idefics3" if idefics else "plain", "", ""):
        return f"image_text {text!r}"
    if idefics and (tiling is None or tiling.kind != "idefics3" or not tiling.split):
        return f"connector 'pixel_shuffle' with tiling {tiling!r}"
    if not idefics and tiling is not None:
        return f"tiling {tiling.kind!r} with a newline behind each row of features"
    if connector.bias == idefics:
        return f"connector {connector.kind!r} with bias {connector.bias}"
    for name in ("include_class_token", "l2_normalize"):
        if getattr(vision, name):
            return f"vision {name} True"
    if idefics and (tower.class_token or not tower.post_norm or tower.depth != tower.num_layers):
        return "pixel_shuffle of a class token, of an inner layer or without the last norm"
    if model.config.prefix_lm:
        return "prefix_lm True"
    if tower.mlp_width == tower.width:
        return (
            f"mlp_width {tower.mlp_width} equal to width, by which llama.cpp tells old files with up and down swapped,"
        )
    return None


def differences(tower: ViTConfig, connector: ConnectorConfig, image: ImageTransformConfig) -> list[str]:
    """What llama.cpp does otherwise, because the format has no key for it: one line each."""
    found = []
    if tower.activation == "gelu":
        found.append("the encoder's GELU is computed by its tanh approximation")
    if tower.class_token:
        found.append("versions up to 11549 at least take the class token for the last patch, and give other features")
    if connector.kind == "mlp":
        found.append("the projector's GELU is computed by its tanh approximation")
        if (image.mode, image.interpolation) != ("pad", "bicubic"):
            found.append(f"images are padded, with bicubic interpolation, not {image.mode!r}, {image.interpolation!r}")
    elif image.interpolation != "lanczos":
        found.append(f"images are resized with Lanczos, not {image.interpolation!r}")
    return found
