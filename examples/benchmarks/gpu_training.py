"""Training on one device against transformers: tokens/s, MFU, peak memory, and what a checkpoint costs.

The same Llama-shaped model, weights and batches on both sides, bf16 autocast over float32 weights, AdamW, clipping.
Ours is the loop's own `training_step`, plain, compiled, recomputing, and sharded (FSDP2) on a single rank, which shows
what sharding costs before it gains anything; theirs is plain, compiled and recomputing. `packed` rows hold documents of
a few hundred tokens: ours with a mask and by blocks (flex attention), which is what a GPU takes by itself. MFU is model
FLOPs over the device's peak, the same FLOPs for both sides. A checkpoint is written at once and in the background,
during which steps go on.

Each variant has a process of its own, one after the other, and the same first loss.

    python examples/benchmarks/gpu_training.py --size 1b --rows 8 --length 4096
    python examples/benchmarks/gpu_training.py --size tiny --rows 2 --length 128 --steps 2 --variants plain transformers
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_gpt.hub.checkpoint import save_model
from mm_gpt.model import mmgpt
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.flops import batch_flops, parameter_counts
from mm_gpt.model.masks import uses_blocks
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import IGNORE_INDEX, Batch, Processor, ProcessorConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.training.checkpoint import Progress
from mm_gpt.training.compiling import compile_blocks
from mm_gpt.training.language import count_targets
from mm_gpt.training.loop import training_step
from mm_gpt.training.optimizers import make_optimizer
from mm_gpt.training.parallel import shard_model
from mm_gpt.training.recompute import recompute_blocks
from mm_gpt.training.saving import Saver
from mm_gpt.training.stage import LOWEST_LOSS, ParameterGroup, Term
from mm_gpt.training.telemetry import known_peak, measured_peak, peak_memory
from mm_gpt.training.train_config import TrainConfig, use_bf16

RESULTS = Path(__file__).parents[2] / "docs/results/gpu_training.json"
LR = 1e-4


def _llama(vocab_size: int, width: int, num_layers: int, heads: tuple[int, int], mlp_width: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=width // heads[0],
        mlp_width=mlp_width,
        max_length=8192,
    )


SIZES = {
    "tiny": _llama(512, 64, 2, (4, 2), 128),
    "135m": _llama(49_152, 576, 30, (9, 3), 1536),
    "1b": _llama(49_152, 2048, 24, (32, 8), 8192),
}


@dataclass(frozen=True)
class Variant:
    theirs: bool = False
    compiled: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    sharded: bool = False
    packed: bool = False
    masked: bool = False
    """With a mask also where blocks serve."""
    saves: Literal["", "at once", "in the background"] = ""


VARIANTS = {
    "plain": Variant(),
    "compiled": Variant(compiled=True),
    "selective": Variant(recompute="selective"),
    "compiled selective": Variant(compiled=True, recompute="selective"),
    "full": Variant(recompute="full"),
    "sharded": Variant(sharded=True),
    "sharded compiled": Variant(sharded=True, compiled=True),
    "packed masked": Variant(packed=True, masked=True),
    "packed blocks": Variant(packed=True),
    "packed blocks compiled": Variant(packed=True, compiled=True),
    "saving at once": Variant(saves="at once"),
    "saving in the background": Variant(saves="in the background"),
    "transformers": Variant(theirs=True),
    "transformers compiled": Variant(theirs=True, compiled=True),
    "transformers recomputing": Variant(theirs=True, recompute="full"),
}


def make_batch(vocab_size: int, rows: int, length: int, *, packed: bool, seed: int) -> Batch:
    """Rows of random tokens: one document each, or documents of 50 to 650 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (rows, length), generator=generator)
    documents = torch.ones_like(ids)
    positions = torch.arange(length).repeat(rows, 1)
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
    for row in range(rows if packed else 0):
        start, number = 0, 0
        while start < length:
            end = min(length, start + int(torch.randint(50, 650, (), generator=generator)))
            number += 1
            documents[row, start:end] = number
            positions[row, start:end] = torch.arange(end - start)
            labels[row, end - 1] = IGNORE_INDEX
            start = end
    pairs, singles = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        document_ids=documents,
        branch_ids=torch.zeros_like(ids),
        image_rows=singles,
        image_grids=pairs,
        image_tiles=singles,
        image_sizes=pairs,
        pixel_values=torch.zeros(0, 3, 1, 1),
    )


class RandomTokens:
    """A stage that learns random tokens: as much arithmetic as any text."""

    on_policy = False
    decides = LOWEST_LOSS

    def __init__(self, model: MMGPT, variant: Variant, args: argparse.Namespace):
        self.model: Any = model
        self.variant, self.args = variant, args
        tokenizer = Tokenizer.train(["a few words"], 300)
        self.processor = Processor(tokenizer, ProcessorConfig(max_length=args.length), vocab_size=512)

    def prepare(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", list(self.model.parameters()))]

    def micro_batches(self, step: int, count: int) -> list[Batch]:
        config = SIZES[self.args.size]
        return [make_batch(config.vocab_size, self.args.rows, self.args.length, packed=self.variant.packed, seed=step)]

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"loss": count_targets(batch)}

    def loss(self, batch: Batch) -> dict[str, Term]:
        return {"loss": Term(self.model.loss(batch)[0], count_targets(batch))}

    def validate(self) -> dict[str, float]:
        return {}

    def samples(self) -> list[str]:
        return []

    def save(self, folder: Path) -> None:
        save_model(self.model, self.processor, folder)


@contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Step = Callable[[int], float]
"""One step, by its number; its loss."""


def our_step(
    variant: Variant, args: argparse.Namespace, device: torch.device
) -> tuple[Step, RandomTokens, torch.optim.Optimizer]:
    if variant.masked:
        mmgpt.uses_blocks = lambda config, device: False  # type: ignore[assignment]
    config = TrainConfig(steps=10_000, lr=LR, schedule="constant", precision=args.precision, device=str(device))
    stage = RandomTokens(make_model(args.size).to(device), variant, args)
    if variant.compiled:
        compile_blocks(stage.model.decoder, recompute=variant.recompute)
    elif variant.recompute != "none":
        recompute_blocks(stage.model.decoder, variant.recompute)
    if variant.sharded:
        shard_model(stage.model, 1, device, bf16=use_bf16(args.precision, device))
    optimizer = make_optimizer(stage.prepare(), config)
    stage.model.train()

    def step(number: int) -> float:
        return training_step(stage, stage.micro_batches(number, 1), optimizer, config, number, device)["loss"]

    return step, stage, optimizer


def their_step(variant: Variant, args: argparse.Namespace, device: torch.device) -> Step:
    theirs = their_model(make_model(args.size)).to(device).train()
    if variant.recompute == "full":
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    model: Any = torch.compile(theirs) if variant.compiled else theirs
    config = TrainConfig(steps=10_000, lr=LR)
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=LR, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=0.0, fused=True
    )

    def step(number: int) -> float:
        batch = make_batch(SIZES[args.size].vocab_size, args.rows, args.length, packed=False, seed=number)
        ids = batch.input_ids.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(args.precision, device)):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def make_model(size: str) -> MMGPT:
    torch.manual_seed(0)
    return MMGPT(ModelConfig(decoder=SIZES[size]))


def their_model(ours: MMGPT) -> Any:
    """transformers' Llama with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = ours.decoder.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_size,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_length,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
        )
    )
    inner, inner_kv = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    state = ours.decoder.state_dict()
    renamed: dict[str, Tensor] = {"model.embed_tokens.weight": state["embedding.weight"]}
    renamed |= {"model.norm.weight": state["norm.weight"]}
    for n in range(config.num_layers):
        own, their = f"blocks.{n}.", f"model.layers.{n}."
        q, k, v = state[own + "attention.qkv.weight"].split([inner, inner_kv, inner_kv])
        gate, up = state[own + "mlp.gate_up.weight"].chunk(2)
        renamed |= {
            their + "self_attn.q_proj.weight": q,
            their + "self_attn.k_proj.weight": k,
            their + "self_attn.v_proj.weight": v,
            their + "self_attn.o_proj.weight": state[own + "attention.out.weight"],
            their + "mlp.gate_proj.weight": gate,
            their + "mlp.up_proj.weight": up,
            their + "mlp.down_proj.weight": state[own + "mlp.down.weight"],
            their + "input_layernorm.weight": state[own + "attention_norm.weight"],
            their + "post_attention_layernorm.weight": state[own + "mlp_norm.weight"],
        }
    renamed["lm_head.weight"] = state["embedding.weight"]
    theirs.load_state_dict(renamed)
    return theirs


def timed(step: Step, numbers: Sequence[int], device: torch.device) -> list[float]:
    """Seconds of each step."""
    seconds = []
    for number in numbers:
        wait(device)
        start = time.perf_counter()
        step(number)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What one variant takes, in this process."""
    variant, device = VARIANTS[name], torch.device(args.device)
    with one_rank(device) if variant.sharded else tempfile.TemporaryDirectory():
        if variant.theirs:
            step = their_step(variant, args, device)
        else:
            step, stage, optimizer = our_step(variant, args, device)
        first = step(0)
        for number in range(1, args.warmup):
            step(number)
        wait(device)
        seconds = timed(step, range(args.warmup, args.warmup + args.steps), device)
        median = statistics.median(seconds)
        batch = make_batch(SIZES[args.size].vocab_size, args.rows, args.length, packed=variant.packed, seed=0)
        flops = batch_flops(make_model(args.size), batch).total
        tokens = batch.input_ids.numel()
        found: dict[str, Any] = {
            "first_loss": round(first, 4),
            "seconds": [round(each, 5) for each in seconds],
            "tokens_per_s": round(tokens / median, 1),
            "flops_per_token": round(flops / tokens),
            "mfu": round(flops / median / args.peak, 4),
            "peak_memory": peak_memory(device),
        }
        if variant.saves:
            found |= stalls(variant, args, step, stage, optimizer, median, device)
    return found


def stalls(
    variant: Variant,
    args: argparse.Namespace,
    step: Step,
    stage: RandomTokens,
    optimizer: torch.optim.Optimizer,
    usual: float,
    device: torch.device,
) -> dict[str, float]:
    """Seconds that a checkpoint holds training up: while it is begun, and what the steps beside it take longer."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Saver(Path(folder), device, background=variant.saves == "in the background") as saver,
    ):
        at, beside, blocked = args.warmup + args.steps, 0.0, 0.0
        for number in range(2):  # the first one allocates what the next one finds
            saver.finish()
            wait(device)
            start = time.perf_counter()
            saver.save(stage, optimizer, Progress(step=number + 1), best=False)
            blocked, beside = time.perf_counter() - start, 0.0
            while saver.is_writing:
                at += 1
                beside += timed(step, [at], device)[0] - usual
        start = time.perf_counter()
        saver.finish()
        blocked += time.perf_counter() - start
    return {"save_blocks_s": round(blocked, 4), "steps_beside_longer_s": round(max(0.0, beside), 4)}


def device_peak(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s of the device, and whether it is known or measured."""
    known = known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is not None:
        return known, "known"
    dtype = torch.bfloat16 if use_bf16(precision, device) else torch.float32
    return measured_peak(device, dtype), "measured"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10, help="that are measured, of each variant")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, at least 1")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return {}
    device = torch.device(args.device)
    args.peak, how = device_peak(device, args.precision)
    counts = parameter_counts(ModelConfig(decoder=SIZES[args.size]))
    found: dict[str, Any] = {
        "command": "python examples/benchmarks/gpu_training.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "peak_flops": args.peak,
        "peak": how,
        "parameters": dataclasses.asdict(counts) | {"total": counts.total},
        "variants": {},
    }
    for name in args.variants:
        if "blocks" in name and not uses_blocks(SIZES[args.size], device):
            print(f"{name}: left out, flex attention does not serve here")
            continue
        options = [f"--{key}={getattr(args, key)}" for key in ("size", "rows", "length", "steps", "warmup", "device")]
        options += [f"--precision={args.precision}", f"--peak={args.peak}", f"--measure={name}"]
        ended = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True)
        if ended.returncode:
            found["variants"][name] = {"failed": ended.returncode}
            print(f"{name}: failed ({ended.returncode})")
            continue
        values = found["variants"][name] = json.loads(ended.stdout.splitlines()[-1])
        rest = ", ".join(f"{key} {values[key]}" for key in values if key.endswith("_s") and key != "tokens_per_s")
        print(
            f"{name}: {values['tokens_per_s']:.0f} tok/s, MFU {values['mfu']:.1%}, "
            f"{values['peak_memory'] / 2**30:.2f} GiB, first loss {values['first_loss']} {rest}"
        )
        # Written each time: a machine that is lent may be gone before the last one
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
