"""Ladders: runs of growing size on the same data, whose settings are functions of their size alone.

A rung that were tuned by itself would be tuned better or worse than its neighbours, and the law would be one of that
care. So learning rate, batch, warm-up and tokens follow from N, as in OLMo's ladder (Bhagia et al., arXiv 2412.04403);
the two or three constants are chosen on the smallest rungs, then frozen in a plan, which names the target as well.

N counts the decoder with its output layer, without tables that are looked up, the vision tower and the connector; the
other ways of counting stand beside it. D are tokens that are read, those of images among them and padding not.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mm_gpt.config import check_numbers, from_dict, to_dict
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub.weights import read_json
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.flops import batch_flops, decoder_flops, parameter_counts
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Batch
from mm_gpt.system.writing import write_text
from mm_gpt.training.language import LanguageRecipe, LanguageTask, prepare_language
from mm_gpt.training.loop import training_step
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.train_config import TrainConfig

REFERENCE = 100_000
"""The N at which `lr` and `batch_tokens` hold."""
SAMPLE_ROWS = 96
"""Rows of training data that a plan looks at, to count FLOPs, padding and the shares of the sources."""
TIMED_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """The rules of a ladder."""

    widths: tuple[int, ...]
    """Of the rungs, ascending."""
    targets: tuple[int, ...] = ()
    """Widths of what is to be predicted."""
    layers: int | None = None
    """Of all sizes; None: one for each `width_per_layer`. A law bends where depth is what small sizes lack."""
    width_per_layer: int = 16
    head_size: int = 16
    tokens_per_parameter: float = 20.0
    """D / N of rungs and targets."""
    budgets: tuple[float, ...] = (1.0,)
    """D of the rungs as multiples of that: L(N, D) needs more than one, L(C) takes the runs of the first alone."""
    seeds: int = 1
    """Runs of each rung up to `seeds_width`, which differ by their seed: how far apart they end is noise."""
    seeds_width: int = 0
    lr: float = 5e-3
    """Peak at N = 100,000; lr · (N / 100,000)^lr_exponent elsewhere."""
    lr_exponent: float = -1 / 3
    batch_tokens: float = 2048.0
    """Tokens in a step at N = 100,000; by `batch_exponent` elsewhere."""
    batch_exponent: float = 2 / 3
    warmup_tokens_per_parameter: float = 1.0

    def __post_init__(self) -> None:
        if not self.widths:
            raise ConfigError("widths is empty: name the widths of the rungs")
        if not self.budgets:
            raise ConfigError("budgets is empty: 1 is that of a ladder with one run for each size")
        for name in ("widths", "targets", "budgets"):
            values = getattr(self, name)
            if any(not value > 0 for value in values) or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be different numbers above 0, not {','.join(map(str, values))}")
        if self.targets and min(self.targets) <= max(self.widths):
            raise ConfigError(f"the target {min(self.targets)} must be wider than the widest rung {max(self.widths)}")
        check_numbers(self, "layers", "width_per_layer", "head_size", "seeds", at_least=1)
        check_numbers(self, "tokens_per_parameter", "lr", "batch_tokens", above=0)
        check_numbers(self, "seeds_width", "warmup_tokens_per_parameter", at_least=0)
        check_numbers(self, "lr_exponent", "batch_exponent", at_least=-2, at_most=2)


FORMULAS = {
    "layers": "layers, or max(1, width // width_per_layer)",
    "heads": "max(1, round(width / head_size))",
    "tokens": "tokens_per_parameter * N",
    "lr": "lr * (N / 100000) ** lr_exponent",
    "batch_tokens": "batch_tokens * (N / 100000) ** batch_exponent, in whole rows",
    "warmup_tokens": "warmup_tokens_per_parameter * N",
}
"""What the plan says about where its numbers are from; `decoder_of` and `Settings` are what computes them."""


def decoder_of(base: DecoderConfig, width: int, config: LadderConfig) -> DecoderConfig:
    """`base` at another size; an MLP is 8/3 as wide as the states, without gate 4 times, in whole eights."""
    heads = max(1, round(width / config.head_size))
    ratio = 8 / 3 if base.gated_mlp else 4
    return dataclasses.replace(
        base,
        width=width,
        num_layers=config.layers or max(1, width // config.width_per_layer),
        num_heads=heads,
        num_kv_heads=heads,
        head_size=config.head_size,
        mlp_width=max(8, 8 * math.ceil(width * ratio / 8)),
    )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What follows from N and D: pure numbers, before they become rows and steps."""

    lr: float
    batch_tokens: float
    warmup_tokens: float
    tokens: float

    @classmethod
    def of(cls, parameters: float, config: LadderConfig, *, budget: float = 1.0) -> "Settings":
        size = parameters / REFERENCE
        return cls(
            lr=config.lr * size**config.lr_exponent,
            batch_tokens=config.batch_tokens * size**config.batch_exponent,
            warmup_tokens=config.warmup_tokens_per_parameter * parameters,
            tokens=config.tokens_per_parameter * parameters * budget,
        )


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run of a plan: an ordinary one, whose folder has its name."""

    name: str
    role: Literal["rung", "target"]
    width: int
    layers: int
    heads: int
    mlp_width: int
    seed: int
    budget: float
    parameters: int
    """N: the decoder with its output layer."""
    blocks: int
    """Without the output layer."""
    embedding: int
    """Tables that are looked up; 0 where the output layer is one."""
    vision: int
    """Tower and connector."""
    tokens: float
    """D, padding not counted."""
    flops: float
    """Counted for the whole run."""
    flops_6nd: float
    """6 N D, to compare."""
    flops_attention: float
    flops_vision: float
    lr: float
    rows: int
    steps: int
    warmup_steps: int
    seconds: float | None = None
    """An estimate from a few steps, on the machine that made the plan."""

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise ConfigError(f"{self.name!r} is no name of a run: its folder lies beside the plan")
        check_numbers(self, "width", "layers", "heads", "mlp_width", "rows", "steps", at_least=1)
        check_numbers(self, "budget", "parameters", "tokens", "flops", "lr", above=0)
        check_numbers(self, "seed", "warmup_steps", at_least=0)


@dataclass(frozen=True, kw_only=True)
class PlanData:
    """What the rungs and targets read."""

    sources: tuple[str, ...]
    shares: tuple[float, ...]
    """Of each source, of the tokens."""
    tokens: tuple[float, ...]
    """That each source has: more than any run takes of it."""
    fill: float
    """Share of a row's places that are not padding."""
    digest: tuple[str, ...]
    """Of the contents of each source."""


@dataclass(frozen=True, kw_only=True)
class LadderPlan:
    """What `mm-gpt scaling plan` writes and the other commands read."""

    ladder: LadderConfig
    recipe: dict[str, Any]
    """The LanguageRecipe of all runs, but for what the ladder says."""
    data: PlanData
    runs: tuple[PlannedRun, ...]
    formulas: dict[str, str] = dataclasses.field(default_factory=lambda: dict(FORMULAS))

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"two runs are called {twice[0]}")
        if not self.of_role("rung"):
            raise ConfigError("a plan needs rungs")

    def run(self, name: str) -> PlannedRun:
        """Raises MMGPTError for a name that the plan does not have."""
        for run in self.runs:
            if run.name == name:
                return run
        raise MMGPTError(f"the plan has no run {name!r} (it has: {', '.join(run.name for run in self.runs)})")

    def of_role(self, role: str) -> tuple[PlannedRun, ...]:
        return tuple(run for run in self.runs if run.role == role)

    def recipe_of(self, run: PlannedRun) -> LanguageRecipe:
        """The recipe of an ordinary run."""
        base = from_dict(LanguageRecipe, self.recipe, where="plan.recipe")
        return sized(base, run, self.ladder)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(to_dict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "LadderPlan":
        """Raises MMGPTError naming the file and what is wrong with it."""
        if not path.is_file():
            raise MMGPTError(f"{path}: no such plan; `mm-gpt scaling plan` makes one")
        return from_dict(cls, read_json(path), where=str(path))


def sized(base: LanguageRecipe, run: PlannedRun, config: LadderConfig) -> LanguageRecipe:
    """The recipe of all runs, for one of them."""
    train = dataclasses.replace(
        base.train,
        steps=run.steps,
        lr=run.lr,
        warmup_steps=run.warmup_steps,
        seed=base.train.seed + run.seed,
        batch_tokens=None,
        accumulate=1,
        log_every=max(1, run.steps // 50),
        validate_every=run.steps,
        save_every=max(1, run.steps // 5),
    )
    return dataclasses.replace(base, train=train, model=_model(base, run.width, config), rows=run.rows)


def _model(base: LanguageRecipe, width: int, config: LadderConfig) -> ModelConfig:
    assert base.model is not None
    assert isinstance(base.model.decoder, DecoderConfig)
    return dataclasses.replace(base.model, decoder=decoder_of(base.model.decoder, width, config))


def check_base(base: LanguageRecipe) -> None:
    """Raises ConfigError where a recipe's runs would not be points of one law."""
    if base.start is not None or base.model is None or not isinstance(base.model.decoder, DecoderConfig):
        raise ConfigError("a ladder trains from random weights: the recipe needs a model, and no start")
    if base.model.lora is not None or base.decoder != "full":
        raise ConfigError("a ladder trains all of the decoder: decoder=full, without lora")
    if base.model.decoder.memory_length:
        raise ConfigError("a ladder's decoder has no segment memory")
    for name in ("accumulate", "step_tokens", "ramp_from", "patience", "noise_scale"):
        if getattr(base.train, name) != getattr(TrainConfig, name):
            raise ConfigError(f"a ladder says itself how large and how many its steps are: leave out train.{name}")


def make_plan(base: LanguageRecipe, config: LadderConfig, *, timed: bool = True) -> LadderPlan:
    """Sizes, settings, FLOPs and, where `timed`, how long each run takes here.

    Raises ConfigError where a run would read a source more than once: what repeats is worth less, and the law bends.
    """
    check_base(base)
    smallest = dataclasses.replace(base, model=_model(base, min(config.widths), config))
    task = LanguageTask(smallest)
    batches = _sample(task, base)
    places = sum(batch.input_ids.numel() for batch in batches)
    tokens = sum(int((batch.document_ids != 0).sum()) for batch in batches)
    data = PlanData(
        sources=tuple(source.name for source in task.sources),
        shares=_shares(task),
        tokens=tuple(float(source.tokens) for source in task.sources),
        fill=tokens / places,
        digest=tuple(source.digest for source in task.sources),
    )
    runs = []
    for role, widths in (("rung", config.widths), ("target", config.targets)):
        for width in sorted(widths):
            for budget in config.budgets if role == "rung" else (1.0,):
                extra = width <= config.seeds_width and role == "rung" and budget == config.budgets[0]
                for seed in range(config.seeds if extra else 1):
                    runs.append(_planned(base, config, role, width, budget, seed, data, batches))
    if timed:
        seconds = {width: _seconds_per_token(base, config, width) for width in (*config.widths, *config.targets)}
        runs = [dataclasses.replace(run, seconds=run.tokens / data.fill * seconds[run.width]) for run in runs]
    _check_enough(data, runs)
    return LadderPlan(ladder=config, recipe=json.loads(json.dumps(to_dict(base))), data=data, runs=tuple(runs))


def _sample(task: LanguageTask, base: LanguageRecipe) -> list[Batch]:
    """The first micro-batches of training, `SAMPLE_ROWS` rows or a few more."""
    return [batch for step in range(math.ceil(SAMPLE_ROWS / base.rows)) for batch in task.micro_batches(step, 1)]


def _shares(task: LanguageTask) -> tuple[float, ...]:
    weights = task.loader.plan.weights
    return tuple(weight / sum(weights) for weight in weights)


def _planned(
    base: LanguageRecipe,
    config: LadderConfig,
    role: Any,
    width: int,
    budget: float,
    seed: int,
    data: PlanData,
    batches: Sequence[Batch],
) -> PlannedRun:
    model_config = _model(base, width, config)
    counts = parameter_counts(model_config)
    parameters = counts.decoder + counts.head
    settings = Settings.of(parameters, config, budget=budget)
    rows = max(1, round(settings.batch_tokens / (base.row_length * data.fill)))
    step_tokens = rows * base.row_length * data.fill
    steps = max(1, round(settings.tokens / step_tokens))
    tokens = steps * step_tokens
    flops, attention, vision = flops_per_token(base, model_config, batches)
    decoder = model_config.decoder
    assert isinstance(decoder, DecoderConfig)
    name = f"w{width}" + (f"-d{budget:g}" if budget != 1 else "") + (f"-seed{seed}" if seed else "")
    return PlannedRun(
        name=name,
        role=role,
        width=width,
        layers=decoder.num_layers,
        heads=decoder.num_heads,
        mlp_width=decoder.mlp_width,
        seed=seed,
        budget=budget,
        parameters=parameters,
        blocks=counts.decoder,
        embedding=counts.embedding,
        vision=counts.vision + counts.connector,
        tokens=tokens,
        flops=flops * tokens,
        flops_6nd=6.0 * parameters * tokens,
        flops_attention=attention * tokens,
        flops_vision=vision * tokens,
        lr=settings.lr,
        rows=rows,
        steps=steps,
        warmup_steps=max(1, round(settings.warmup_tokens / step_tokens)),
    )


def flops_per_token(
    base: LanguageRecipe, model_config: ModelConfig, batches: Sequence[Batch]
) -> tuple[float, float, float]:
    """FLOPs of training per token, as counted on `batches`; how many of them attention's scores and sums take, and how
    many what sees the images."""
    with torch.device("meta"):
        model = MMGPT(model_config)
    prepare_language(model, dataclasses.replace(base, compile=False))
    tokens = total = text = without_scores = 0.0
    decoder = model_config.decoder
    assert isinstance(decoder, DecoderConfig)
    for batch in batches:
        own = int((batch.document_ids != 0).sum())
        supervised = int((batch.labels >= 0).sum())
        lengths = [
            count
            for row in batch.document_ids
            for count in row[row != 0].unique(return_counts=True)[1].tolist()
        ]  # fmt: skip
        tokens += own
        total += batch_flops(model, batch).total
        text += decoder_flops(decoder, lengths, supervised=supervised).total
        without_scores += decoder_flops(decoder, [1] * own, supervised=supervised).total
    return total / tokens, (text - without_scores) / tokens, (total - text) / tokens


def _seconds_per_token(base: LanguageRecipe, config: LadderConfig, width: int) -> float:
    """For each place of a row; the fastest of a few steps, since others may use the machine as well."""
    recipe = dataclasses.replace(base, model=_model(base, width, config))
    task = LanguageTask(recipe)
    optimizer = make_optimizer(task.prepare(), recipe.train, task.model)
    task.model.train()
    found = []
    for step in range(TIMED_STEPS + 1):
        batches = task.micro_batches(step, recipe.train.accumulate)
        begin = time.perf_counter()
        training_step(task, batches, optimizer, recipe.train, step, task.model.device)
        places = sum(batch.input_ids.numel() for batch in batches)
        found.append((time.perf_counter() - begin) / places)
    return min(found[1:])


def _check_enough(data: PlanData, runs: Sequence[PlannedRun]) -> None:
    largest = max(runs, key=lambda run: run.tokens)
    for name, share, tokens in zip(data.sources, data.shares, data.tokens, strict=True):
        if share * largest.tokens > tokens:
            raise ConfigError(
                f"{name}: {largest.name} reads {share * largest.tokens:,.0f} tokens of it, and it has {tokens:,.0f}: "
                "data that repeat bend the law; add data, or lower tokens_per_parameter"
            )


def table(plan: LadderPlan) -> str:
    """The plan for people."""
    lines = [
        f"{'run':14} {'role':6} {'layers':>6} {'N':>11} {'blocks':>11} {'+ vision':>11} {'D':>12} {'FLOPs':>9} "
        f"{'/ 6ND':>6} {'lr':>9} {'rows':>5} {'steps':>6} {'minutes':>8}"
    ]
    for run in plan.runs:
        minutes = "" if run.seconds is None else f"{run.seconds / 60:.1f}"
        lines.append(
            f"{run.name:14} {run.role:6} {run.layers:6} {run.parameters:11,} {run.blocks:11,} "
            f"{run.parameters + run.embedding + run.vision:11,} {run.tokens:12,.0f} {run.flops:9.2e} "
            f"{run.flops / run.flops_6nd:6.2f} {run.lr:9.2e} {run.rows:5} {run.steps:6} {minutes:>8}"
        )
    for name, share, tokens in zip(plan.data.sources, plan.data.shares, plan.data.tokens, strict=True):
        lines.append(f"{name}: {share:.0%} of the tokens, of {tokens:,.0f}")
    return "\n".join(lines)
