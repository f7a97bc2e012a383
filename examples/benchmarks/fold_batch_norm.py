"""What folding BatchNorm into the convolutions saves of an image's time in the vision encoder, on the CPU.

The two take turns, so that a busy moment of the machine hits both; what is reported is the ratio of the medians.

    python examples/benchmarks/fold_batch_norm.py
"""

import argparse
import copy
import statistics
import time

import torch

from mm_gpt.vision.encoder import VisionConfig, VisionEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timm/tf_efficientnet_lite2", help="an EfficientNet of timm")
    parser.add_argument("--image-size", type=int, default=260)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    plain = VisionEncoder(VisionConfig(model=args.model, image_size=args.image_size)).eval()
    folded = copy.deepcopy(plain)
    folded.fold_batch_norm()
    pixels = torch.randn(1, 3, args.image_size, args.image_size)
    seconds: dict[str, list[float]] = {"plain": [], "folded": []}
    with torch.inference_mode():
        difference = (plain(pixels) - folded(pixels)).abs().max().item()
        for _ in range(args.repeats):
            for name, encoder in (("plain", plain), ("folded", folded)):
                start = time.perf_counter()
                encoder(pixels)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    saved = 1 - medians["folded"] / medians["plain"]
    print(f"{medians['plain']:.1f} ms an image, folded {medians['folded']:.1f} ms: {saved:.0%} less", end="; ")
    print(f"tokens differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
