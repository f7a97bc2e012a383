"""A training step on the CPU: against transformers, and against this repository as it was.

Three jobs, each a whole step: forward, backward, clip, AdamW, in bfloat16 where the processor multiplies in it.

    text     SmolLM2-135M (random weights), 4 x 256 tokens, all learned; the peer is transformers' LlamaForCausalLM
    images   ViT-B/16, frozen, and the same decoder: 4 x 256 tokens, 196 of them an image's, the others learned; the
             peer is transformers' LlavaForConditionalGeneration. Images are new in each step; in `images-again` they
             were seen before, as in all epochs but the first
    stage    the recipe `default` of the default model; the peer is another checkout (git worktree add), `--before`

Each side is a process of its own, with its own allocator and its own peak of memory; they take turns, step by step, so
that a busy moment of the machine hits both. What counts is the ratio of the medians; on a busy machine, that of
processor seconds with `--threads 1`, which wait for nobody. `--without` turns one of our means
off in the peer's place, which is then ourselves: what each means brings.

    python examples/benchmarks/training_step.py text images images-again
    python examples/benchmarks/training_step.py stage --data DATA --before FOLDER
    python examples/benchmarks/training_step.py text --without blocks loss memory optimizer
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

OUT = Path("docs/results/training_step.json")
TARGETS = {"text": 1.5, "images": 2.0, "images-again": 2.0, "stage": 1.5}
MEANS = ("blocks", "loss", "memory", "optimizer", "tower")
ROWS, LENGTH, IMAGE_TOKENS, IMAGE_SIZE = 4, 256, 196, 224
SIZES = {"width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "inner": 1536, "vocabulary": 49_152}

Step = Callable[[int], Callable[[], object]]
"""Reads the batch of a step, and gives what is timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="+", choices=TARGETS)
    parser.add_argument("--data", default="/data", help="of the job stage: the folder of the default model's sources")
    parser.add_argument("--before", type=Path, help="of the job stage: the other checkout")
    parser.add_argument("--without", nargs="*", default=[], choices=MEANS, help="measure what each of these brings")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.jobs[0], args.worker, args.data, args.threads)
        return
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["machine"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    command = "python examples/benchmarks/training_step.py " + " ".join(sys.argv[1:])
    for job in args.jobs:
        peers = [f"without {means}" for means in args.without] or ["before" if job == "stage" else "transformers"]
        for peer in peers:
            found = compare(job, peer, args) | {"command": command}
            results.setdefault(job, {})[peer] = found
            args.out.write_text(json.dumps(results, indent=2) + "\n")
            print(job, json.dumps({peer: found}))


def compare(job: str, peer: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides, step by step in turns, the ratio, and the peak of memory of each."""
    sides = [Side(job, "ours", args, None), Side(job, peer, args, args.before if peer == "before" else None)]
    seconds: list[list[float]] = [[], []]
    worked: list[list[float]] = [[], []]
    for step in range(args.steps + 2):
        for side, times, work_times in zip(sides, seconds, worked, strict=True):
            took, worked_for = side.step(step)
            if step >= 2:  # the first ones compile and allocate
                times.append(took)
                work_times.append(worked_for)
    peaks = [side.end() for side in sides]
    ours, theirs = (statistics.median(times) for times in seconds)
    own_work, their_work = (statistics.median(times) for times in worked)
    return {
        "seconds": round(ours, 3),
        "peer_seconds": round(theirs, 3),
        "times_as_fast": round(theirs / ours, 3),
        "median_of_ratios": round(statistics.median(b / a for a, b in zip(*seconds, strict=True)), 3),
        "processor_seconds": round(own_work, 3),
        "peer_processor_seconds": round(their_work, 3),
        "processor_ratio": round(their_work / own_work, 3),
        "threads": args.threads,
        "load": round(os.getloadavg()[0], 1),
        "target": None if peer.startswith("without") else TARGETS[job],
        "peak_mb": peaks[0],
        "peer_peak_mb": peaks[1],
        "memory_ratio": round(peaks[0] / peaks[1], 3),
        "steps": args.steps,
    }


class Side:
    """A process that takes a step when it is told to."""

    def __init__(self, job: str, name: str, args: argparse.Namespace, checkout: Path | None):
        command = [sys.executable, __file__, job, "--worker", name, "--data", args.data, "--threads", str(args.threads)]
        root = (checkout or Path(__file__).resolve().parents[2]).resolve()
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def step(self, number: int) -> tuple[float, float]:
        """Seconds by the clock, and of processors."""
        clock, worked = self._ask(str(number)).split()
        return float(clock), float(worked)

    def end(self) -> int:
        """The peak of memory in MB."""
        peak = int(self._ask("end"))
        self.process.wait()
        return peak

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith("> "):
                return answer[2:]
        raise SystemExit("a side of the comparison ended early")


def work(job: str, name: str, data: str, threads: int) -> None:
    """One side: steps as they are asked for on the standard input."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    without = name.removeprefix("without ") if name.startswith("without ") else ""
    with ExitStack() as stack:
        if name == "transformers":
            step = transformers_step(job)
        else:
            if name == "ours" or without:
                prepare(stack, without)
            step = stage_step(data, without) if job == "stage" else our_step(job, without)
        for line in sys.stdin:
            if line.strip() == "end":
                print(">", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, flush=True)
                return
            run = step(int(line))
            begin, worked = time.perf_counter(), time.process_time()
            run()
            print(">", time.perf_counter() - begin, time.process_time() - worked, flush=True)


def prepare(stack: ExitStack, without: str) -> None:
    """What `mm-gpt train` sets up, but for one of our means."""
    import torch

    from mm_gpt.model import decoder, loss
    from mm_gpt.training.kept_memory import kept_memory

    if without != "memory":
        stack.enter_context(kept_memory(torch.device("cpu")))
    if without == "blocks":
        decoder.fused = lambda *_: None
    if without == "loss":
        loss.fused_kind = lambda *_: None


def batch_ids(step: int) -> Any:
    """(ROWS, LENGTH + 1) ids of a step."""
    import torch

    return torch.randint(SIZES["vocabulary"], (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))


def images_of(job: str, step: int) -> Any:
    """(ROWS, 3, H, W): others in each step, but where they were all seen before."""
    import torch

    generator = torch.Generator().manual_seed(0 if job == "images-again" else step)
    return torch.randn(ROWS, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def transformers_step(job: str) -> Step:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=SIZES["vocabulary"],
        hidden_size=SIZES["width"],
        intermediate_size=SIZES["inner"],
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=SIZES["heads"],
        num_key_value_heads=SIZES["kv_heads"],
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model: Any
    if job == "text":
        model = LlamaForCausalLM(text)
    else:
        vision = CLIPVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=IMAGE_SIZE,
            patch_size=16,
            projection_dim=512,
        )
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, tie_word_embeddings=True)
        model = LlavaForConditionalGeneration(config)
        model.model.vision_tower.requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(number: int) -> Callable[[], object]:
        ids = batch_ids(number)[:, :-1].clamp(min=2)
        inputs, labels = {"input_ids": ids}, ids.clone()
        if job != "text":
            ids[:, :IMAGE_TOKENS] = 1
            labels[:, :IMAGE_TOKENS] = -100
            inputs["pixel_values"] = images_of(job, number)
        return lambda: learn(inputs, labels)

    def learn(inputs: dict[str, Any], labels: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(job: str, without: str) -> Step:
    import torch

    from mm_gpt.model.decoder_config import DecoderConfig
    from mm_gpt.model.mmgpt import MMGPT, ModelConfig
    from mm_gpt.processor import IGNORE_INDEX, Batch
    from mm_gpt.training.features import use_frozen_tower
    from mm_gpt.training.loop import training_step
    from mm_gpt.training.stage import ParameterGroup, Term
    from mm_gpt.training.train_config import TrainConfig
    from mm_gpt.vision.connectors import ConnectorConfig
    from mm_gpt.vision.encoder import VisionConfig
    from mm_gpt.vision.vit import ViTConfig

    decoder = DecoderConfig(
        vocab_size=SIZES["vocabulary"],
        width=SIZES["width"],
        num_layers=SIZES["layers"],
        num_heads=SIZES["heads"],
        num_kv_heads=SIZES["kv_heads"],
        head_size=64,
        mlp_width=SIZES["inner"],
        max_length=2048,
    )
    config = ModelConfig(decoder=decoder)
    if job != "text":
        vit = ViTConfig(
            image_size=IMAGE_SIZE,
            patch_size=16,
            width=768,
            num_layers=12,
            num_heads=12,
            mlp_width=3072,
            class_token=True,
        )
        config = ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=vit, image_size=IMAGE_SIZE),
            connector=ConnectorConfig(kind="mlp"),
            image_token_id=1,
        )
    model = MMGPT(config).train()
    if model.vision is not None:
        model.vision.unfreeze(0)
        if without != "tower":
            use_frozen_tower(model, max_bytes=2**30)
    train = TrainConfig(steps=1000, lr=1e-4, precision="bf16")
    optimizer = an_optimizer(
        [ParameterGroup("all", [p for p in model.parameters() if p.requires_grad])], train, without
    )

    class Learns:
        """As much of a stage as a step asks for."""

        def __init__(self) -> None:
            self.model = model

        def counts(self, batch: Batch) -> dict[str, float]:
            return {"loss": float((batch.labels != IGNORE_INDEX).sum())}

        def loss(self, batch: Batch) -> dict[str, Term]:
            return {"loss": Term(model.loss(batch)[0], int(self.counts(batch)["loss"]))}

    stage: Any = Learns()

    def step(number: int) -> Callable[[], object]:
        given = batch_ids(number).clamp(min=2)
        ids, labels = given[:, :-1].clone(), given[:, 1:].clone()
        images = 0 if job == "text" else ROWS
        if images:
            ids[:, :IMAGE_TOKENS] = 1
            labels[:, : IMAGE_TOKENS - 1] = IGNORE_INDEX
        batch = Batch(
            input_ids=ids,
            labels=labels,
            position_ids=torch.arange(LENGTH).expand(ROWS, -1),
            document_ids=torch.ones_like(ids),
            branch_ids=torch.zeros_like(ids),
            image_rows=torch.arange(images),
            image_grids=torch.ones(images, 2, dtype=torch.long),
            image_tiles=torch.ones(images, dtype=torch.long),
            image_sizes=torch.zeros(images, 2, dtype=torch.long),
            pixel_values=images_of(job, number) if images else torch.zeros(0),
        )
        return lambda: training_step(stage, [batch], optimizer, train, number, torch.device("cpu"))

    return step


def stage_step(data: str, without: str) -> Step:
    """The default model's stage, also in a checkout of before."""
    import torch

    from mm_gpt.training import recipes
    from mm_gpt.training.language import LanguageTask
    from mm_gpt.training.loop import training_step

    recipe = dataclasses.replace(recipes.default(data), model=None, image=None, start="default", vision_weights=None)
    task = LanguageTask(recipe)
    groups = task.prepare()
    if without == "tower":
        task.model.frozen_tower = None
    task.model.train()
    optimizer = an_optimizer(groups, recipe.train, without)

    def step(number: int) -> Callable[[], object]:
        batches = task.micro_batches(number, recipe.train.accumulate)
        return lambda: training_step(task, batches, optimizer, recipe.train, number, torch.device("cpu"))

    return step


def an_optimizer(groups: Any, train: Any, without: str) -> Any:
    import torch

    from mm_gpt.training import loop  # where it is imported from has moved

    optimizer = loop.make_optimizer(groups, train)
    if without == "optimizer":
        optimizer = torch.optim.AdamW(optimizer.param_groups, foreach=True, fused=False)
    return optimizer


if __name__ == "__main__":
    main()
