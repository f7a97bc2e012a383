"""The ladder that the documentation shows: manuals and picture pages, a tokenizer, and the recipe of all runs.

    python examples/scaling/manuals.py WORK/manuals
    python examples/scaling/picture_pages.py WORK/pages --pages 60000
    python examples/scaling/experiment.py WORK

writes `WORK/tokenizer` and `WORK/recipe.json`, for `mm-gpt scaling plan WORK/recipe.json ...`. Half of the tokens are
text, half are pages, unless `--pages-share` says otherwise; with 0 there is no tower. The tower is as small as towers
get and of one size on all rungs: a projection of each patch, and a block of attention over the nine of them.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import picture_pages

from mm_gpt.config import to_dict
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.document import Text
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.language import LanguageRecipe
from mm_gpt.training.train_config import TrainConfig
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

VOCABULARY = 1024
ROW = 128
TOKENIZER_PAGES = 400
"""Manual pages, and ten times as many picture pages, that the tokenizer is learned from."""
HALF = (0.5, 0.5, 0.5)
HELD_OUT = {"manuals/train.jsonl": "manuals/held_out.jsonl", "pages/train": "pages/held_out"}


def texts(work: Path) -> Iterator[str]:
    """What the tokenizer is learned from."""
    with (work / "manuals/train.jsonl").open(encoding="utf-8") as rows:
        for row, _ in zip(rows, range(TOKENIZER_PAGES), strict=False):
            yield json.loads(row)["text"][:20_000]
    rng = random.Random(4)
    for number in range(10 * TOKENIZER_PAGES):
        for segment in picture_pages.page(rng, number).segments:
            if isinstance(segment, Text):
                yield segment.text


def recipe(work: Path, *, pages_share: float = 0.5, held_out_units: int = 2500) -> LanguageRecipe:
    """Of all runs; the ladder says the decoder's size, the steps, the rate and the rows of each."""
    shares = {"manuals/train.jsonl": 1 - pages_share, "pages/train": pages_share}
    decoder = DecoderConfig(
        vocab_size=VOCABULARY,
        width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_size=16,
        mlp_width=88,
        max_length=512,
    )
    tower = ViTConfig(
        image_size=picture_pages.SIZE,
        patch_size=picture_pages.CELL,
        width=64,
        num_layers=1,
        num_heads=2,
        mlp_width=128,
    )
    return LanguageRecipe(
        train=TrainConfig(steps=1, lr=1e-3, weight_decay=0.1, beta2=0.98, precision="fp32", device="cpu"),
        model=ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=tower, image_size=tower.image_size) if pages_share else None,
            connector=ConnectorConfig(kind="linear") if pages_share else None,
        ),
        image=ImageTransformConfig(size=tower.image_size, mean=HALF, std=HALF) if pages_share else None,
        sources=tuple(SourceConfig(path=path, weight=share) for path, share in shares.items() if share),
        validation=tuple(SourceConfig(path=HELD_OUT[path]) for path, share in shares.items() if share),
        tokenizer=str(work / "tokenizer"),
        decoder="full",
        vision_blocks=None,
        vision_lr=1.0,
        row_length=ROW,
        rows=8,
        augment=False,
        wait=False,
        validation_images=held_out_units,
        data=str(work),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pages-share", type=float, default=0.5, help="of the tokens (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=2500, help="units of each source to validate on")
    parser.add_argument("-o", "--out", type=Path, help="default: WORK/recipe.json")
    args = parser.parse_args()
    if not (args.work / "tokenizer").is_dir():
        Tokenizer.train(texts(args.work), VOCABULARY).save_folder(args.work / "tokenizer")
    made = recipe(args.work, pages_share=args.pages_share, held_out_units=args.held_out)
    (args.out or args.work / "recipe.json").write_text(json.dumps(to_dict(made), indent=1) + "\n")


if __name__ == "__main__":
    main()
