"""Whether the loader keeps a training step waiting: the default model on interleaved documents, in one run.

- training: the recipe `finetune` on a corpus, once with each number of workers. `wait_per_step` is the seconds that
  the loop waited for data over the seconds of the step, as the loop itself measures both; the first step, which waits
  for the workers to start and the first window to be planned, is given apart.
- loader: the same batches without a model, by one process: rows, tokens and images for each second of processor time,
  and the positions of the rows that hold a token.
- webdataset: images for each second of processor time of a plain pipeline over the same shards: `decode("pil")`,
  torchvision's bicubic resize to the same size, batches. They take turns. Ours tokenises, packs and augments as well.

Documents are made from the package's samples or from tars of photos: paragraphs and one to four JPEGs each.

    python examples/benchmarks/loader.py
    python examples/benchmarks/loader.py --photos PHOTOS.tar --output loader.json
"""

import argparse
import dataclasses
import io
import json
import platform
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image as PILImage
from torchvision import transforms as tv

import mm_gpt.serving
from mm_gpt.datasets.building.shards import ShardWriter, write_corpus_file
from mm_gpt.document import Document, Image, Text
from mm_gpt.processor import Batch
from mm_gpt.training import recipes
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.loop import train
from mm_gpt.vision.transforms import ImageTransformConfig

WORDS = """
the a of in on with and light morning harbour station river glass stone green quiet people walking market window table
coffee rocket launch sky cat garden evening train bridge photo shows taken near old new small wide
"""
PHOTO_WIDTH = 640


# ---- the corpus ----


def sample_photos(rng: random.Random, count: int) -> list[bytes]:
    """Parts of the package's samples, as JPEGs of 640 x 480."""
    paths = sorted((Path(mm_gpt.serving.__file__).parent / "samples").glob("*.jpg"))
    photos = [PILImage.open(path).convert("RGB") for path in paths]
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        width = min(photo.width, photo.height * 4 / 3) * rng.uniform(0.6, 1.0)
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - width * 0.75)
        size = PHOTO_WIDTH, PHOTO_WIDTH * 3 // 4
        part = photo.resize(size, PILImage.Resampling.LANCZOS, box=(left, top, left + width, top + width * 0.75))
        data = io.BytesIO()
        part.save(data, "JPEG", quality=88)
        found.append(data.getvalue())
    return found


def tar_photos(tars: list[Path], count: int) -> list[bytes]:
    found: list[bytes] = []
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if len(found) < count and member.name.endswith((".jpg", ".jpeg")) and (file := tar.extractfile(member)):
                    found.append(file.read())
    return found


def write_corpus(folder: Path, photos: list[bytes], rng: random.Random) -> int:
    """Every photo once. The number of documents."""
    writer, documents, at = ShardWriter(folder, shard_bytes=8 * 2**20), 0, 0
    while at < len(photos):
        segments: list[Text | Image] = []
        for photo in photos[at : at + rng.randint(1, 4)]:
            for _ in range(rng.randint(1, 3)):
                words = rng.choices(WORDS.split(), k=rng.randint(20, 80))
                segments.append(Text(" ".join(words).capitalize() + "."))
            segments.append(Image(photo))
            at += 1
        writer.add(Document(tuple(segments), id=str(documents)))
        documents += 1
    write_corpus_file(folder, writer.close(), {})
    return documents


# ---- what is measured ----


def make_task(corpus: Path, steps: int, workers: int, device: str) -> LanguageTask:
    recipe = recipes.finetune(str(corpus))
    assert isinstance(recipe, LanguageRecipe)
    config = dataclasses.replace(
        recipe.train, steps=steps, log_every=1, validate_every=steps, save_every=steps, device=device
    )
    return LanguageTask(dataclasses.replace(recipe, train=config, workers=workers, validation_images=2))


def train_once(corpus: Path, steps: int, workers: int, device: str) -> dict[str, float]:
    task = make_task(corpus, steps, workers, device)
    with tempfile.TemporaryDirectory() as out:
        train(task, task.recipe.train, Path(out), progress=False)
        rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    steps_of = [row for row in rows if "data_seconds" in row]
    first, others = steps_of[0], steps_of[1:]
    ratios = [row["data_seconds"] / row["seconds"] for row in others]
    return {
        "workers": workers,
        "steps": len(others),
        "seconds_per_step": round(statistics.median(row["seconds"] for row in others), 3),
        "wait_per_step": round(sum(row["data_seconds"] for row in others) / sum(row["seconds"] for row in others), 5),
        "largest_wait_per_step": round(max(ratios), 5),
        "first_wait_per_step": round(first["data_seconds"] / first["seconds"], 4),
    }


def plain_batches(corpus: Path, config: ImageTransformConfig, size: int) -> Iterator[torch.Tensor]:
    """The images of the corpus by webdataset alone, endless."""
    transform = tv.Compose(
        [
            tv.Resize((config.size, config.size), tv.InterpolationMode.BICUBIC, antialias=True),
            tv.ToTensor(),
            tv.Normalize(config.mean, config.std),
        ]
    )
    paths = sorted(map(str, corpus.glob("*.tar")))
    batch = []
    while True:
        for sample in webdataset.WebDataset(paths, shardshuffle=False).decode("pil"):
            for value in sample.values():
                if isinstance(value, PILImage.Image):
                    batch.append(transform(value))
                    if len(batch) == size:
                        yield torch.stack(batch)
                        batch = []


def measure_loader(corpus: Path, rounds: int) -> dict[str, Any]:
    task = make_task(corpus, 1, 0, "cpu")
    assert task.processor.config.image is not None
    plain = plain_batches(corpus, task.processor.config.image, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(2):  # plans the first window
        task.loader.micro_batches(step)
        next(plain)
    rates: dict[str, list[float]] = {"ours": [], "webdataset": []}
    batches: list[Batch] = []
    cpu = 0.0
    for number in range(rounds):
        start = time.process_time()
        some = [batch for n in range(8) for batch in task.loader.micro_batches(2 + 8 * number + n)]
        taken = time.process_time() - start
        images = sum(len(batch.pixel_values) for batch in some)
        rates["ours"].append(images / taken)
        batches, cpu = batches + some, cpu + taken
        start = time.process_time()
        plain_images = 0
        while plain_images < images:
            plain_images += len(next(plain))
        rates["webdataset"].append(plain_images / (time.process_time() - start))
    torch.set_num_threads(threads)
    tokens = sum(int((batch.document_ids > 0).sum()) for batch in batches)
    rows = sum(len(batch.input_ids) for batch in batches)
    return {
        "rows_per_cpu_second": round(rows / cpu, 1),
        "tokens_per_cpu_second": round(tokens / cpu),
        "images_per_cpu_second": {name: round(statistics.median(rate), 1) for name, rate in rates.items()},
        "times_webdataset": round(statistics.median(a / b for a, b in zip(*rates.values(), strict=True)), 2),
        "images_per_row": round(sum(len(batch.pixel_values) for batch in batches) / rows, 2),
        "row_length": task.row_length,
        "positions_used_percent": round(100 * tokens / (rows * task.row_length), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, action="append", default=[], help="a tar of JPEGs; more than once")
    parser.add_argument("--count", type=int, default=400, help="photos in the corpus (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="of each training (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="of the loader alone (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    rng = random.Random(0)
    photos = tar_photos(args.photos, args.count) if args.photos else sample_photos(rng, args.count)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch, "corpus")
        documents = write_corpus(corpus, photos, rng)
        loader = measure_loader(corpus, args.rounds)
        print(json.dumps(loader), flush=True)
        training = []
        for workers in args.workers:
            training.append(train_once(corpus, args.steps, workers, args.device))
            print(json.dumps(training[-1]), flush=True)
    result = {
        "what": " ".join((__doc__ or "").split("\n\n    python")[0].split()),
        "documents": documents,
        "photos": len(photos),
        "photos_from": [path.name for path in args.photos] or "samples, 640 x 480",
        "device": args.device,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow", "webdataset")},
        "processor": platform.processor() or platform.machine(),
        "loader": loader,
        "training": training,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
