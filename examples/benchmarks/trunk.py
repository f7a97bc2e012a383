"""Milliseconds an image in the default model's trunk on the CPU: as it is trained, folded, with concepts, in bf16.

BatchNorm folds into the convolutions, and where the processor multiplies in bf16 the convolutions run in that. Concepts
add the trunk's own last blocks and its classifier. All take turns, so that a busy moment of the machine hits each; what
is reported are medians, and their ratios to the trunk as it is trained.

    python examples/benchmarks/trunk.py -o docs/results/trunk.json
"""

import argparse
import copy
import json
import os
import statistics
import time
from pathlib import Path

import torch

from mm_gpt.training.recipes import imagenet_concepts
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder


def variants(model: str, size: int) -> dict[str, VisionEncoder]:
    """Encoders with the same weights."""
    torch.manual_seed(0)
    plain = VisionEncoder(VisionConfig(model=model, image_size=size, concepts=imagenet_concepts())).eval()
    without = copy.deepcopy(plain)
    without.concepts = None
    made = {"as trained": without}
    for name, encoder, dtype in (
        ("folded", without, "fp32"),
        ("folded, concepts", plain, "fp32"),
        ("bf16", without, "bf16"),
        ("bf16, concepts", plain, "bf16"),
    ):
        made[name] = copy.deepcopy(encoder)
        lack = made[name].prepare(dtype)  # type: ignore[arg-type]
        if lack is not None:
            print(f"left out: {name} ({lack})")
            del made[name]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm/tf_efficientnet_lite2", help="an EfficientNet-Lite")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--images", type=int, default=1, help="at a time")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    encoders = variants(args.model, args.image_size)
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    pixels = torch.randn(args.images, 3, args.image_size, args.image_size)
    with torch.inference_mode():
        for repeat in range(args.repeats + 2):
            for name, encoder in encoders.items():
                own = pixels.to(next(encoder.parameters()).dtype)
                start = time.perf_counter()
                encoder.see(own)
                if repeat >= 2:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(values) / args.images for name, values in seconds.items()}
    result = {
        "model": args.model,
        "image_size": args.image_size,
        "images": args.images,
        "cores": os.cpu_count(),
        "ms an image": medians,
        "ratio": {name: value / medians["as trained"] for name, value in medians.items()},
        "bytes of concepts in half precision": concept_bytes(encoders["folded, concepts"]),
    }
    print(json.dumps(result, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def concept_bytes(encoder: VisionEncoder) -> int:
    assert encoder.concepts is not None
    return sum(2 * parameter.numel() for parameter in encoder.concepts.parameters())


if __name__ == "__main__":
    main()
