"""Images a second from a tar of JPEGs to normalised tensors of 224 x 224, against webdataset, in the same run.

One process, one thread, on one core where the system can hold a process there. Counted is processor time, which a busy
machine stretches less, and the ways take turns, so that a busy moment hits all of them. All read the same tar, from the
system's cache, and give float32 (3, 224, 224), the middle of the photo.

- mm-gpt: `Shard`, with the index that every shard of a corpus has, and `FastTransform`, with every check of files that
  nobody has checked before.
- webdataset pil: its own decoder, `decode("pil")`, and torchvision's bicubic Resize, CenterCrop, ToTensor, Normalize.
- webdataset torchrgb: for information; `decode("torchrgb")`, which makes floats before anything is resized.

Quality is the PSNR against the second, on the scale of 8-bit values. Photos are made from the package's samples:
enlarged, cut, and with the fine grain that a camera leaves, so that they have as many bits for each pixel as photos do.

    python examples/benchmarks/image_loading.py
    python examples/benchmarks/image_loading.py --tar PHOTOS.tar
"""

import argparse
import io
import json
import math
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image as PILImage
from torch import Tensor
from torchvision import transforms as tv
from tqdm import tqdm

import mm_gpt.serving
from mm_gpt.datasets.building.shards import Shard, index_path, index_tar
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Image
from mm_gpt.vision.transforms import CLIP_MEAN, CLIP_STD, FastTransform, ImageTransformConfig

SIZE = 224
WIDTHS = {640: 120, 2048: 24}
"""How many photos of each width there are."""
GRAIN = 6.0
"""Standard deviation of the grain, in 8-bit values."""
JPEG_SUFFIXES = ("jpg", "jpeg")


def write_photos(tar: Path, width: int, count: int) -> None:
    rng = np.random.default_rng(width)
    paths = sorted((Path(mm_gpt.serving.__file__).parent / "samples").glob("*.jpg"))
    with tarfile.open(tar, "w") as out:
        for number in range(count):
            photo = PILImage.open(paths[number % len(paths)]).convert("RGB")
            height = width * 3 // 4
            part = 0.7 + 0.3 * rng.random()  # of the largest part of that shape
            cut_width = min(photo.width, photo.height * 4 / 3) * part
            left, top = (photo.width - cut_width) * rng.random(), (photo.height - cut_width * 3 / 4) * rng.random()
            box = (left, top, left + cut_width, top + cut_width * 3 / 4)
            pixels = np.asarray(photo.resize((width, height), PILImage.Resampling.LANCZOS, box=box))
            noisy = pixels + rng.normal(0, GRAIN, (height, width, 1))
            data = io.BytesIO()
            PILImage.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{number:05d}.jpg")
            member.size = len(data.getvalue())
            out.addfile(member, io.BytesIO(data.getvalue()))


# ---- the ways ----


def ours(tar: Path) -> Iterator[Tensor]:
    transform = FastTransform(ImageTransformConfig(size=SIZE, mode="crop"))
    shard = Shard(tar)
    for number in range(len(shard)):
        _, members = shard.read(number)
        yield from (transform(Image(data)) for suffix, data in members.items() if suffix in JPEG_SUFFIXES)


def theirs(decoder: str, tar: Path) -> Iterator[Tensor]:
    resize = tv.Resize(SIZE, tv.InterpolationMode.BICUBIC, antialias=True)
    to_tensor = [tv.ToTensor()] if decoder == "pil" else []
    transform = tv.Compose([resize, tv.CenterCrop(SIZE), *to_tensor, tv.Normalize(CLIP_MEAN, CLIP_STD)])
    dataset = webdataset.WebDataset(str(tar), shardshuffle=False).decode(decoder).to_tuple("jpg;jpeg")
    return (transform(image) for (image,) in dataset)


WAYS: dict[str, Callable[[Path], Iterator[Tensor]]] = {
    "mm-gpt": ours,
    "webdataset pil": lambda tar: theirs("pil", tar),
    "webdataset torchrgb": lambda tar: theirs("torchrgb", tar),
}


def psnr(values: Tensor, reference: Tensor) -> float:
    """dB, of normalised tensors."""
    error = ((values - reference) * torch.tensor(CLIP_STD)[:, None, None]).square().mean().item()
    return -10 * math.log10(max(error, 1e-10))


def measure(tar: Path, rounds: int, title: str) -> dict[str, object]:
    values = {name: torch.stack(list(way(tar))) for name, way in WAYS.items()}  # also warms up
    count = len(values["mm-gpt"])
    if any(len(v) != count for v in values.values()):
        raise SystemExit(f"{tar}: the readers do not agree on how many JPEGs there are")
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in tqdm(range(rounds), desc=title):
        for name in list(WAYS)[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            for _ in WAYS[name](tar):
                pass
            seconds[name].append(time.process_time() - start)
    rates = {name: count / statistics.median(taken) for name, taken in seconds.items()}
    quality = [psnr(*pair) for pair in zip(values["mm-gpt"], values["webdataset pil"], strict=True)]
    return {
        "photos": title,
        "count": count,
        "bits_per_pixel": round(bits_per_pixel(tar), 2),
        "images_per_cpu_second": {name: round(rate, 1) for name, rate in rates.items()},
        "times_webdataset_pil": round(
            statistics.median(b / a for a, b in zip(seconds["mm-gpt"], seconds["webdataset pil"], strict=True)), 2
        ),
        "psnr_db": {"median": round(statistics.median(quality), 1), "least": round(min(quality), 1)},
    }


def bits_per_pixel(tar: Path) -> float:
    shard, bits, pixels = Shard(tar), 0, 0
    for number in range(len(shard)):
        for suffix, data in shard.read(number)[1].items():
            if suffix in JPEG_SUFFIXES:
                bits, pixels = bits + 8 * len(data), pixels + math.prod(Image(data).size())
    return bits / max(1, pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", type=Path, action="append", default=[], help="also these photos; more than once")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for width, count in WIDTHS.items():
            tar = Path(scratch, f"{width}.tar")
            write_photos(tar, width, count)
            np.save(index_path(tar), index_tar(tar, ErrorCounter()))
            rows.append(measure(tar, args.rounds, f"{width} x {width * 3 // 4}"))
        rows += [measure(tar, args.rounds, tar.name) for tar in args.tar]
    for row in rows:
        print(json.dumps(row))
    result = {
        "what": " ".join((__doc__ or "").split("\n\n    python")[0].split()),
        "rounds": args.rounds,
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow", "webdataset")},
        "processor": platform.processor() or platform.machine(),
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
