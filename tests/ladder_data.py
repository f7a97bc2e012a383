"""A small ladder for tests: texts of a chain of words, rungs of a few hundred weights, and logs as runs leave them."""

import json
import random
from pathlib import Path

from mm_gpt.config import to_dict
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.scaling.ladder import LadderPlan, PlannedRun
from mm_gpt.training.language import LanguageRecipe
from mm_gpt.training.train_config import TrainConfig

RULES = {
    "width_per_layer": 8,
    "head_size": 4,
    "tokens_per_parameter": 2.0,
    "batch_tokens": 1024.0,
    "batch_exponent": 0.3,
    "lr": 3e-3,
}


def write_texts(folder: Path, *, train: int = 1500, held_out: int = 30) -> None:
    rng = random.Random(0)

    def text() -> str:
        state, words = rng.randrange(60), []
        for _ in range(60):
            state = (state * 7 + rng.choice((1, 1, 1, 2, 3, 9))) % 60
            words.append(f"w{state}")
        return " ".join(words)

    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("held_out", held_out)):
        rows = "".join(json.dumps({"text": text()}) + "\n" for _ in range(count))
        (folder / f"{name}.jsonl").write_text(rows)


def text_recipe(folder: Path) -> LanguageRecipe:
    return LanguageRecipe(
        train=TrainConfig(steps=1, lr=1e-3, precision="fp32", device="cpu"),
        model=ModelConfig(
            decoder=DecoderConfig(
                vocab_size=300,
                width=16,
                num_layers=1,
                num_heads=2,
                num_kv_heads=2,
                head_size=8,
                mlp_width=32,
                max_length=256,
            )
        ),
        image=None,
        sources=(SourceConfig(path="train.jsonl"),),
        validation=(SourceConfig(path="held_out.jsonl"),),
        decoder="full",
        row_length=128,
        rows=4,
        augment=False,
        data=str(folder),
    )


def fake_run(folder: Path, plan: LadderPlan, run: PlannedRun, loss: float, *, text_loss: float | None = None) -> None:
    """What a finished run leaves in its folder, as far as a ladder reads it."""
    out = folder / run.name
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").write_text(json.dumps(to_dict(plan.recipe_of(run))))
    steps = [
        {"step": n, "loss": loss + 1 / n, "tokens": run.tokens * n / 10, "flops": run.flops * n / 10}
        for n in range(1, 11)
    ]
    losses = {"loss": loss, "loss held_out.jsonl": loss if text_loss is None else text_loss}
    rows = [*steps, {"step": run.steps, "validation": losses, "samples": []}]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_rungs(folder: Path, plan: LadderPlan) -> None:
    """Finished rungs that follow L(C) = 30 C^-0.15 + 1.5 to the last digit."""
    for run in plan.of_role("rung"):
        fake_run(folder, plan, run, law(run))


def law(run: PlannedRun) -> float:
    return float(30 * run.flops**-0.15 + 1.5)
