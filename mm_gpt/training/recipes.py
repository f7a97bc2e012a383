"""Recipes: functions that return a complete description of a training run. A new one is a few lines on another.

`mm-gpt train NAME --data FOLDER key=value ...` calls one by name.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm_gpt import config as configs
from mm_gpt.alignment.distillation import DistillationRecipe, DistillationTask
from mm_gpt.alignment.policy import PolicyTask
from mm_gpt.alignment.policy_recipe import PolicyRecipe
from mm_gpt.alignment.preference import PreferenceLoss, PreferenceRecipe, PreferenceTask
from mm_gpt.alignment.reward_training import RewardRecipe, RewardTask
from mm_gpt.datasets.loading.sources import SourceConfig
from mm_gpt.errors import MMGPTError, unknown_name
from mm_gpt.hub.weights import read_json
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.model.presets import PRESETS, preset
from mm_gpt.model.semicausal import SemiCausalConfig
from mm_gpt.training.classification import ClassificationRecipe, ClassificationTask, count_rows
from mm_gpt.training.contrastive import ContrastiveRecipe, ContrastiveTask
from mm_gpt.training.distributed import ranks
from mm_gpt.training.language import LanguageRecipe, LanguageTask
from mm_gpt.training.loop import train
from mm_gpt.training.schedules import step_sizes
from mm_gpt.training.self_critical import SelfCriticalRecipe, SelfCriticalTask
from mm_gpt.training.semicausal import SemiCausalRecipe, SemiCausalTask
from mm_gpt.training.stage import Stage
from mm_gpt.training.trackers import check_trackers
from mm_gpt.training.train_config import TrainConfig
from mm_gpt.vision.concepts import ConceptsConfig
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.contrastive import ContrastiveConfig, TextTowerConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.imagenet import read_classes
from mm_gpt.vision.transforms import ImageTransformConfig

logger = logging.getLogger(__name__)

Recipe = (
    LanguageRecipe
    | SemiCausalRecipe
    | SelfCriticalRecipe
    | ContrastiveRecipe
    | ClassificationRecipe
    | RewardRecipe
    | PolicyRecipe
    | PreferenceRecipe
)

HALF = (0.5, 0.5, 0.5)
LITE2 = VisionConfig(model="timm/tf_efficientnet_lite2", image_size=256)
LITE2_IMAGE = ImageTransformConfig(size=256, mode="squash", mean=HALF, std=HALF)
FLICKR8K_TRAIN = ("flickr8k/train-000000.tar", "flickr8k/train-000001.tar")
FLICKR8K_VALIDATION = "flickr8k/val-000000.tar"
TEXT_CHATS = Path(__file__).resolve().parents[2] / "examples/data/text_chats.jsonl"
"""In a checkout; the built package leaves it out."""


def tiny(data: str) -> LanguageRecipe:
    """From nothing to captions in under a minute on two cores: every weight, on a folder of simple pictures."""
    return LanguageRecipe(
        train=TrainConfig(
            steps=400, lr=2e-3, warmup_steps=20, weight_decay=0.01, log_every=10, validate_every=100, save_every=100
        ),
        model=ModelConfig(
            decoder=DecoderConfig(
                vocab_size=512,
                width=96,
                num_layers=3,
                num_heads=6,
                num_kv_heads=2,
                head_size=16,
                mlp_width=256,
                max_length=512,
            ),
            vision=VisionConfig(model="timm/test_vit2", image_size=64),
            connector=ConnectorConfig(kind="linear"),
        ),
        image=ImageTransformConfig(size=64, mean=HALF, std=HALF),
        sources=(SourceConfig(path="."),),
        holdout=0.1,
        decoder="full",
        vision_blocks=None,
        vision_lr=1.0,
        row_length=256,
        rows=4,
        augment=False,
        validation_images=16,
        data=data,
    )


def default_vision(data: str) -> ContrastiveRecipe:
    """The default model's vision tower: an ImageNet trunk tuned on Flickr8k's captions."""
    return ContrastiveRecipe(
        train=TrainConfig(
            steps=192, lr=1e-3, warmup_steps=20, weight_decay=0.05, precision="fp32", validate_every=63, save_every=63
        ),
        model=ContrastiveConfig(
            vision=LITE2,
            text=TextTowerConfig(vocab_size=49_152, context_length=40, width=576, num_layers=2, num_heads=9),
        ),
        image=LITE2_IMAGE,
        sources=(*(SourceConfig(path=path) for path in FLICKR8K_TRAIN), SourceConfig(path="coco2017_mini")),
        validation=(SourceConfig(path=FLICKR8K_VALIDATION),),
        decoder="smollm2-135m-instruct",
        vision_weights="efficientnet-lite2",
        data=data,
    )


def default(data: str) -> LanguageRecipe:
    """The model that the package ships: connector and low-rank adaptation on captions, questions and text chats."""
    return LanguageRecipe(
        train=TrainConfig(steps=760, lr=1e-3, warmup_steps=30, final_lr=0.02, validate_every=100, save_every=50),
        model=ModelConfig(
            decoder="smollm2-135m-instruct",
            vision=LITE2,
            connector=ConnectorConfig(kind="pixel_shuffle", scale=2),
            lora=LoRAConfig(rank=16, alpha=32),
        ),
        image=LITE2_IMAGE,
        sources=(
            *(SourceConfig(path=path, derived_share=0.5) for path in FLICKR8K_TRAIN),
            SourceConfig(path="coco2017_mini", derived_share=0.5),
            SourceConfig(path="daquar/train-000000.tar"),
            SourceConfig(path="easy_vqa/train-000000.tar"),
            SourceConfig(path="nlvr1/train-000000.tar"),
            SourceConfig(path=str(TEXT_CHATS)),
        ),
        validation=(
            SourceConfig(path=FLICKR8K_VALIDATION),
            SourceConfig(path="daquar/val-000000.tar"),
            SourceConfig(path="easy_vqa/val-000000.tar"),
            SourceConfig(path="nlvr1/val-000000.tar"),
        ),
        vision_weights="runs/default_vision/best",
        row_length=384,
        rows=4,
        validation_images=60,
        compile=True,
        data=data,
    )


def default_joint(data: str) -> LanguageRecipe:
    """`default` goes on with the vision tower's last blocks, mostly on captions."""
    recipe = default(data)
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, steps=640, lr=7e-4, final_lr=0.01),
        sources=_mixed(
            recipe.sources, flickr8k=1.0, coco2017_mini=2.0, daquar=1.5, easy_vqa=0.8, nlvr1=0.15, chats=0.5
        ),
        start="runs/default/best",
        vision_weights=None,
        vision_blocks=3,
        vision_lr=0.3,
    )


def default_questions(data: str) -> LanguageRecipe:
    """The last stage of the model that the package ships: `default_joint` goes on, mostly with questions."""
    recipe = default_joint(data)
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, steps=100, lr=4e-4, warmup_steps=10),
        sources=_mixed(
            recipe.sources, flickr8k=0.1, coco2017_mini=0.5, daquar=1.0, easy_vqa=1.0, nlvr1=0.1, chats=0.15
        ),
        start="runs/default_joint/best",
        vision_lr=0.5,
    )


def default_concepts(data: str) -> LanguageRecipe:
    """The default model learns what its trunk's classifier sees, and when to believe it.

    `DATA/concepts` holds what examples/concept_data/make_concept_data.py writes.
    """
    recipe = default_joint(data)
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, steps=700, lr=7e-4, warmup_steps=20),
        model=None,
        image=None,
        sources=(
            *_mixed(recipe.sources, flickr8k=0.8, coco2017_mini=3.0, daquar=1.8, easy_vqa=0.8, nlvr1=0.1, chats=1.2),
            SourceConfig(path="concepts/classes.tar", repeat=0.14),
            SourceConfig(path="concepts/photos.tar", repeat=0.35),
        ),
        start="runs/default_joint/best",
        concepts=imagenet_concepts(),
        row_length=256,
        rows=6,
    )


def imagenet_concepts() -> ConceptsConfig:
    """ImageNet's thousand classes as people call them."""
    classes = read_classes()
    return ConceptsConfig(names=tuple(c.plain for c in classes), kinds=tuple(c.kind for c in classes))


def default_critical(data: str) -> SelfCriticalRecipe:
    """Captions after the others: what the model samples itself is rewarded by CIDEr-D (self-critical training)."""
    return SelfCriticalRecipe(
        train=TrainConfig(steps=260, lr=2e-4, warmup_steps=10, final_lr=0.1, validate_every=50, save_every=50),
        start="runs/default_concepts/best",
        sources=(*(SourceConfig(path=path) for path in FLICKR8K_TRAIN), SourceConfig(path="coco2017_mini")),
        validation=(SourceConfig(path=FLICKR8K_VALIDATION),),
        max_captions=2,
        data=data,
    )


def _mixed(sources: tuple[SourceConfig, ...], *, chats: float, **repeat: float) -> tuple[SourceConfig, ...]:
    """The sources of `default`, `repeat` by their folders' names, with few of the questions derived from captions."""
    return tuple(
        dataclasses.replace(
            source,
            repeat=repeat.get(source.path.split("/")[0], chats),
            derived_share=min(source.derived_share, 0.06),
        )
        for source in sources
    )


def finetune(data: str) -> LanguageRecipe:
    """A model on your own folder of captioned photos: the default one, or start=NAME; decoder=full trains it all."""
    return LanguageRecipe(
        train=TrainConfig(steps=200, lr=2e-4, warmup_steps=10, validate_every=50, save_every=50),
        model=None,
        image=None,
        sources=(SourceConfig(path="."),),
        holdout=0.1,
        start="default",
        lora=LoRAConfig(rank=16, alpha=32),
        rows=2,
        data=data,
    )


def classify(data: str) -> ClassificationRecipe:
    """GPT-1's fine-tuning on labelled rows: three epochs of train.jsonl; validation.jsonl or a tenth of it checks."""
    has_validation = (Path(data) / "validation.jsonl").is_file()
    rows = count_rows(Path(data) / "train.jsonl") * (1.0 if has_validation else 0.9)
    steps = max(1, round(3 * rows / 32))
    return ClassificationRecipe(
        train=TrainConfig(
            steps=steps,
            lr=6.25e-5,
            schedule="linear",
            warmup_steps=max(1, round(0.002 * steps)),
            weight_decay=0.01,
            beta2=0.999,
            eps=1e-8,
            validate_every=max(1, steps // 3),
            save_every=max(1, steps // 3),
        ),
        start="smollm2-135m-instruct",
        validation="validation.jsonl" if has_validation else None,
        holdout=0.0 if has_validation else 0.1,
        data=data,
    )


def sft(data: str) -> LanguageRecipe:
    """Supervised fine-tuning on chats and instructions with images: the answers alone are learned."""
    recipe = finetune(data)
    return dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, final_lr=0.1), augment=False, row_length=1024
    )


def reward(data: str) -> RewardRecipe:
    """A reward model from comparisons of answers: the default model with a scalar head, or start=NAME.

    InstructGPT's loss; a new head learns faster than a low-rank adaptation.
    """
    return RewardRecipe(
        train=TrainConfig(steps=200, lr=3e-4, warmup_steps=10, validate_every=50, save_every=50),
        start="default",
        sources=(SourceConfig(path="."),),
        holdout=0.1,
        lora=LoRAConfig(rank=16, alpha=32),
        head_lr=3.0,
        comparisons=8,
        data=data,
    )


def ppo(data: str) -> PolicyRecipe:
    """PPO with a critic against rewards=MODEL_FOLDER or FILE.py:FUNCTION; pretraining=DATA makes it PPO-ptx.

    InstructGPT's settings but for its batch and learning rate: beta 0.02 in the reward, one pass, clips of 0.2.
    """
    return PolicyRecipe(
        train=TrainConfig(steps=200, lr=5e-5, warmup_steps=10, final_lr=1.0, validate_every=20, save_every=20),
        start="default",
        sources=(SourceConfig(path="."),),
        holdout=0.1,
        prompts=16,
        samples=1,
        minibatches=2,
        ema=0.992,
        lora=LoRAConfig(rank=16, alpha=32),
        data=data,
    )


def rloo(data: str) -> PolicyRecipe:
    """REINFORCE with each answer judged by the others to its prompt (RLOO): no critic; rewards as for ppo."""
    return dataclasses.replace(
        ppo(data), prompts=8, samples=4, minibatches=1, advantage="rloo", beta=0.05, ema=None, aggregation="sequence"
    )


def grpo(data: str) -> PolicyRecipe:
    """GRPO: answers to a prompt against their mean, without a reference (beta=0); rewards as for ppo.

    advantage=dr_grpo aggregation=constant is Dr. GRPO, ratio=sequence aggregation=sequence GSPO, clip_high=0.28 DAPO's.
    """
    return dataclasses.replace(
        ppo(data),
        prompts=4,
        samples=8,
        minibatches=1,
        advantage="grpo",
        beta=0.0,
        kl_in="loss",
        kl="k3",
        ema=None,
    )


def dpo(data: str) -> PreferenceRecipe:
    """The default model, or start=NAME, learns from pairs of answers by DPO; losses=ipo and others are its relatives.

    The paper's rate of 1e-6 is for all weights; a low-rank adaptation takes a higher one.
    """
    return PreferenceRecipe(
        train=TrainConfig(steps=200, lr=5e-5, warmup_steps=10, validate_every=50, save_every=50),
        start="default",
        sources=(SourceConfig(path="."),),
        holdout=0.1,
        lora=LoRAConfig(rank=16, alpha=32),
        data=data,
    )


def kto(data: str) -> PreferenceRecipe:
    """`dpo` for answers that are labelled good or bad, one at a time."""
    return dataclasses.replace(dpo(data), losses=(PreferenceLoss(kind="kto"),), batch_size=8)


def distill(data: str) -> DistillationRecipe:
    """A student of 19 million weights learns to answer about pictures as the default model does, or teacher=NAME.

    It begins with the teacher's vision tower, which stays as it is; its connector and its decoder are new.
    """
    return DistillationRecipe(
        train=TrainConfig(steps=2000, lr=1e-3, warmup_steps=50, weight_decay=0.01, validate_every=200, save_every=200),
        model=ModelConfig(
            decoder=DecoderConfig(
                vocab_size=49_152,
                width=256,
                num_layers=8,
                num_heads=4,
                num_kv_heads=2,
                head_size=64,
                mlp_width=704,
                max_length=2048,
            ),
            vision=LITE2,
            connector=ConnectorConfig(kind="pixel_shuffle", scale=2),
        ),
        image=LITE2_IMAGE,
        sources=(SourceConfig(path="."),),
        holdout=0.1,
        teacher="default",
        teacher_vision=True,
        decoder="full",
        row_length=256,
        rows=4,
        data=data,
    )


UNPUBLISHED_LR, UNPUBLISHED_BATCH = 2.5e-4, 64 * 512
"""For the presets whose paper names no learning rate: GPT's, and its batch in tokens."""

PRESET_STEPS = 2000


SMALLEST_VOCABULARY = 256 + 3
"""Of a tokenizer that is learned: all bytes, and the marks of texts and turns."""


DENSE_ROW = 2048
"""Tokens in a row of a preset with dense attention, whose context may be 40,000: memory grows with the square."""


def of_preset(name: str, data: str) -> LanguageRecipe | SemiCausalRecipe:
    """A published model from random weights, with its paper's hyperparameters, on plain text or captioned images.

    The paper's learning rate belongs to its batch: see `peak_rate`. Its warm-up takes a tenth of the steps at most,
    since these are few, and for the same reason they do not grow (GPT-3's `ramp_from`).
    """
    chosen = preset(name)
    config = chosen.config
    published = "lr" in chosen.training
    values: dict[str, Any] = {
        "lr": UNPUBLISHED_LR,
        **{name: value for name, value in chosen.training.items() if not name.startswith("ramp")},
        "steps": PRESET_STEPS,
        "warmup_steps": min(chosen.training.get("warmup_steps", 0), PRESET_STEPS // 10),
        "batch_tokens": chosen.batch_tokens if published else UNPUBLISHED_BATCH,
    }
    train = TrainConfig(**values)
    if isinstance(config, SemiCausalConfig):
        return SemiCausalRecipe(train=train, model=config, sources=(SourceConfig(path="."),), data=data)
    model = ModelConfig(decoder=config) if isinstance(config, DecoderConfig) else config
    decoder = model.decoder
    assert isinstance(decoder, DecoderConfig)
    if decoder.vocab_size < SMALLEST_VOCABULARY:  # Sparse Transformer's bytes
        decoder = dataclasses.replace(decoder, vocab_size=SMALLEST_VOCABULARY)
        model = dataclasses.replace(model, decoder=decoder)
    length = 4 * decoder.memory_length or decoder.max_length
    if decoder.attention == ("dense",):
        length = min(length, DENSE_ROW)
    return LanguageRecipe(
        train=train,
        model=model,
        image=None if model.vision is None else ImageTransformConfig(size=model.vision.image_size),
        sources=(SourceConfig(path="."),),
        holdout=0.1,
        decoder="full",
        vision_blocks=1,
        row_length=length,
        rows=max(1, 8192 // length),
        augment=False,
        data=data,
    )


RECIPES: dict[str, Callable[[str], Recipe]] = {
    "tiny": tiny,
    "finetune": finetune,
    "classify": classify,
    "sft": sft,
    "ppo": ppo,
    "rloo": rloo,
    "grpo": grpo,
    "reward": reward,
    "default_vision": default_vision,
    "default": default,
    "default_joint": default_joint,
    "default_questions": default_questions,
    "default_concepts": default_concepts,
    "default_critical": default_critical,
    "dpo": dpo,
    "kto": kto,
    "distill": distill,
}


def recipe(name: str, data: str) -> Recipe:
    """A recipe or a preset by name. Raises MMGPTError naming the closest one."""
    if name in RECIPES:
        return RECIPES[name](data)
    if name in PRESETS:
        return of_preset(name, data)
    raise MMGPTError(unknown_name("recipe", name, [*RECIPES, *PRESETS]))


def peak_rate(recipe: Recipe) -> float:
    """The peak learning rate of a run: `train.lr`, by the square root of the share of `batch_tokens` that a step holds.

    Adam's updates are as long whatever the batch, but noisier for a small one: with κ times the tokens in a step, √κ
    times the rate keeps the path of the weights (the square root scaling rule, 2205.10287). The rate is never raised.
    """
    config = recipe.train
    if config.batch_tokens is None or not isinstance(recipe, LanguageRecipe | SemiCausalRecipe):
        return config.lr
    decoder = None if recipe.model is None else recipe.model.decoder
    length = recipe.row_length
    if isinstance(decoder, DecoderConfig) and not decoder.memory_length:  # with a memory, a row is longer than that
        length = min(length, decoder.max_length)
    micro_tokens = recipe.rows * length * ranks()[1]
    tokens = step_sizes(config, micro_tokens).full * micro_tokens
    if tokens >= config.batch_tokens:
        return config.lr
    rate = config.lr * math.sqrt(tokens / config.batch_tokens)
    logger.info(
        "a step holds up to %s tokens, the learning rate of %g is meant for %s: the peak is %.3g "
        "(train.accumulate=%d makes up the batch, at the full rate)",
        f"{tokens:,}", config.lr, f"{config.batch_tokens:,}", rate, math.ceil(config.batch_tokens / micro_tokens),
    )  # fmt: skip
    return rate


def run_recipe(recipe: Recipe, out: Path, *, resume: bool = False, progress: bool = True) -> None:
    """Train a recipe into `out`; its best model is then in `out/best`. Raises what `train` raises."""
    check_trackers(recipe.train.trackers)
    stage: Stage
    match recipe:
        case DistillationRecipe():
            stage = DistillationTask(recipe)
        case LanguageRecipe():
            stage = LanguageTask(recipe)
        case SemiCausalRecipe():
            stage = SemiCausalTask(recipe)
        case SelfCriticalRecipe():
            stage = SelfCriticalTask(recipe)
        case ClassificationRecipe():
            stage = ClassificationTask(recipe)
        case PolicyRecipe():
            stage = PolicyTask(recipe)
        case PreferenceRecipe():
            stage = PreferenceTask(recipe)
        case RewardRecipe():
            stage = RewardTask(recipe)
        case _:
            stage = ContrastiveTask(recipe)
    if resume and (out / "recipe.json").exists():
        _check_same(recipe, out / "recipe.json")
    config = dataclasses.replace(recipe.train, lr=peak_rate(recipe))
    train(stage, config, out, resume=resume, progress=progress, describe=configs.to_dict(recipe))


def _check_same(recipe: Recipe, path: Path) -> None:
    """A run continues only as what it was; the number of steps may grow."""
    before = read_json(path)
    if not isinstance(before.get("train"), dict):
        raise MMGPTError(f"{path}: no recipe of a run")
    now = json.loads(json.dumps(configs.to_dict(recipe)))
    # A setting that came later had its default before.
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig) if f.default is not dataclasses.MISSING}
    before["train"] = json.loads(json.dumps(defaults)) | before["train"]
    for values in (before, now):
        for key in (
            *("steps", "log_every", "validate_every", "save_every", "patience"),
            *("noise_scale", "trackers", "mfu_peak"),
            *("shard", "recompute", "async_save"),  # how it is computed and kept, not what
        ):
            values["train"].pop(key, None)
        # Another number of ranks, with as many rows a step; or of workers.
        for key in ("rows", "workers"):
            values.pop(key, None)
        values["train"].pop("accumulate", None)
    before = {key: before.get(key) for key in now}
    if (other := configs.first_difference(now, before)) is not None:
        raise MMGPTError(f"{path.parent} was trained with another {other}: use the same recipe and overrides to resume")
