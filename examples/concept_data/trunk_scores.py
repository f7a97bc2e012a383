"""ImageNet class scores of the photos in tars, by the untouched EfficientNet-Lite2: computed once, then kept.

Shapes: N photos, 1000 classes.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from mm_gpt.datasets.formats.captioned import read_records
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.errors import ImageError
from mm_gpt.hub.fetching.download import fetch
from mm_gpt.images import load_image
from mm_gpt.vision.efficientnet import HEAD_WIDTH, load_efficientnet_lite
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.transforms import ImageTransform, ImageTransformConfig

HALF = (0.5, 0.5, 0.5)
SIDE = 256
"""Pixels: the default model's images, squashed to a square."""
BATCH = 16


class Trunk:
    """The network and its classifier, as they come from ImageNet."""

    def __init__(self) -> None:
        state = load_efficientnet_lite(next(iter(fetch("efficientnet-lite2").values())), with_classifier=True)
        self.classifier = nn.Linear(HEAD_WIDTH, 1000)
        own = ("classifier.weight", "classifier.bias")
        self.classifier.load_state_dict({name.partition(".")[2]: state.pop(name) for name in own})
        self.encoder = VisionEncoder(VisionConfig(model="timm/tf_efficientnet_lite2", image_size=SIDE))
        self.encoder.tower.trunk.load_state_dict(state)  # type: ignore[union-attr]
        self.encoder.eval()
        self.encoder.fold_batch_norm(keep=False)
        self.transform = ImageTransform(ImageTransformConfig(size=SIDE, mode="squash", mean=HALF, std=HALF))

    @torch.inference_mode()
    def __call__(self, images: Sequence[bytes | Path | str]) -> Tensor:
        """Probabilities (N, 1000). Raises ImageError."""
        pixels = torch.stack([self.transform(load_image(image)) for image in images])
        return F.softmax(self.classifier(self.encoder(pixels).mean(1)), dim=-1)

    def neighbours(self) -> Tensor:
        """Cosines (1000, 1000) between the classifier's rows: what it takes for one another."""
        rows = F.normalize(self.classifier.weight.detach(), dim=-1)
        return rows @ rows.T


def scores_of(tar: Path, kept: Path, trunk: Trunk) -> dict[str, Tensor]:
    """Probabilities (1000,) of each photo of a tar by its key, kept in the folder `kept`. Broken ones are left out."""
    state = tar.stat()
    name = hashlib.sha256(f"{tar.resolve()} {state.st_size} {SIDE}".encode()).hexdigest()[:16]
    file = kept / f"{tar.parent.name}-{tar.stem}-{name}.safetensors"
    if file.is_file():
        return {key: scores.float() for key, scores in load_file(file).items()}
    records = list(read_records(tar, ErrorCounter()))
    found: dict[str, Tensor] = {}
    for start in tqdm(range(0, len(records), BATCH), desc=f"scores of {tar.parent.name}/{tar.name}", unit="batch"):
        batch = records[start : start + BATCH]
        try:
            found |= {r.key: s.half() for r, s in zip(batch, trunk([r.image for r in batch]), strict=True)}
        except ImageError:  # then one by one, without the broken ones
            for record in batch:
                try:
                    found[record.key] = trunk([record.image])[0].half()
                except ImageError:
                    continue
    kept.mkdir(parents=True, exist_ok=True)
    save_file(found, file)
    return {key: scores.float() for key, scores in found.items()}
