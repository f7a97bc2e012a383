"""Rollouts against transformers' `generate`: the same weights and prompts, several sampled answers to each, in one run.

A trainer's loop is what counts: our side takes over the weights of a model in training anew each time, and keeps the
log-probability of every token; theirs generates from weights that stay, without log-probabilities. Both write as many
tokens as they are told to. The two take turns, so that a busy moment of the machine hits both; what counts is the ratio
of each turn. The log-probabilities of our samples are compared with those of a forward of transformers in float32.
Run it in front of all others where a machine is shared (`chrt -f 2 taskset -c 0,1 python …`).

    python examples/benchmarks/rollouts.py text --precision bf16
    python examples/benchmarks/rollouts.py images --precision fp32
    python examples/benchmarks/rollouts.py text --against torch
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from smolvlm import TEMPLATE, VOCABULARY, photos, processor_features, with_marks

import mm_gpt
from mm_gpt.document import Document, Image, Text
from mm_gpt.hub.checkpoint import load_decoder, load_model, save_model
from mm_gpt.hub.export.export_model import export_model
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig, collate
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.training.rollouts import Sample, Sampler
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.tiling import TilingConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

DECODER = "smollm2-135m-instruct"
SIDE = 256
"""Of a photo in pixels: one tile, 64 tokens."""
QUESTION = "Describe the image in one sentence."


def make_folders(folder: Path, job: str) -> None:
    """Our model in `own`, and the same for transformers in `hf`."""
    if (folder / "hf").exists():
        return
    torch.manual_seed(0)
    decoder: Decoder | None
    decoder, tokenizer = load_decoder(DECODER)
    config: Any = ModelConfig(decoder=decoder.config)
    length = decoder.config.max_length
    settings, template = ProcessorConfig(max_length=length), None
    if job == "images":  # as SmolVLM, smaller; the decoder has no weights for the marks of images
        tokenizer, decoder = with_marks(tokenizer), None
        tower = ViTConfig(
            image_size=SIDE,
            patch_size=16,
            width=768,
            num_layers=12,
            num_heads=12,
            mlp_width=3072,
            activation="gelu_tanh",
        )
        config = ModelConfig(
            decoder=dataclasses.replace(config.decoder, vocab_size=VOCABULARY),
            vision=VisionConfig(model=tower, image_size=SIDE),
            connector=ConnectorConfig(kind="pixel_shuffle", scale=2, bias=False),
            image_token_id=tokenizer.special["<image>"],
        )
        settings = ProcessorConfig(
            image=ImageTransformConfig(
                size=SIDE, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="lanczos", backend="torchvision"
            ),
            tokens_per_image=64,
            max_length=length,
            tiling=TilingConfig(kind="idefics3", longest_edge=SIDE),
            image_text=ImageTextConfig(token="<image>", kind="idefics3"),
            begin_of_text=True,
        )
        template = ChatTemplate(TEMPLATE, special=tokenizer.names, where="here", end_tokens=tokenizer.end_tokens)
    model = MMGPT(config, decoder)
    processor = Processor(tokenizer, settings, vocab_size=model.decoder.config.vocab_size, template=template)
    (folder / "own").mkdir(parents=True, exist_ok=True)
    save_model(model, processor, folder / "own")
    export_model(folder / "own", folder / "hf", format="hf", dtype="float32", overwrite=True)


def prompts_of(processor: Processor, job: str, count: int, tokens: int) -> list[Document]:
    """Passages of the documentation of `tokens` tokens each, or photos with a question."""
    if job == "images":
        pictures = [picture.resize((SIDE, SIDE)) for picture in photos(count)]
        return [processor.chat([{"role": "user", "content": [Image(p), QUESTION]}]) for p in pictures]
    docs = sorted((Path(mm_gpt.__file__).parents[1] / "docs").glob("*.md"))
    ids = processor.tokenizer.encode("\n".join(path.read_text(encoding="utf-8") for path in docs))
    passages = [tuple(ids[at * tokens : (at + 1) * tokens]) for at in range(count)]
    return [Document((Text("", is_target=False, ids=passage),)) for passage in passages]


class Ours:
    def __init__(self, folder: Path, precision: str, lora: int, tokens: int, *, compiled: bool = True):
        self.model, self.processor = load_model(folder / "own")
        self.processor.tokenizer.end_ids = ()  # as many tokens as theirs
        if lora:
            self.model.add_lora(LoRAConfig(rank=lora, alpha=2.0 * lora))
        self.model.train()
        self.precision = precision
        self.sampler = Sampler(self.model, self.processor, max_new_tokens=tokens, compiled=compiled)

    def __call__(self, documents: Sequence[Document], n: int, seed: int) -> list[list[Sample]]:
        is_bf16 = self.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if is_bf16 else nullcontext():
            return self.sampler(documents, n, range(seed, seed + len(documents)))


class Transformers:
    def __init__(self, folder: Path, job: str, precision: str, tokens: int):
        import transformers

        transformers.logging.set_verbosity_error()
        kind = transformers.AutoModelForImageTextToText if job == "images" else transformers.AutoModelForCausalLM
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = kind.from_pretrained(folder / "hf", dtype=dtype).eval()
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=0
        )

    @torch.inference_mode()
    def __call__(self, inputs: dict[str, torch.Tensor], n: int, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return self.model.generate(**self._typed(inputs), num_return_sequences=n)

    def _typed(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    @torch.inference_mode()
    def logprobs(self, inputs: dict[str, torch.Tensor], prompt: int, ids: Sequence[int]) -> torch.Tensor:
        """Of an answer to one of the prompts, (T,), by one forward."""
        own = {name: value[prompt : prompt + 1] for name, value in self._typed(inputs).items()}
        own["input_ids"] = torch.cat([own["input_ids"], torch.tensor([list(ids)])], dim=1)
        own["attention_mask"] = torch.ones_like(own["input_ids"])
        logits = self.model(**own).logits[0, -len(ids) - 1 : -1].float()
        return logits.log_softmax(dim=-1).gather(1, torch.tensor(list(ids))[:, None]).squeeze(1)


def their_inputs(processor: Processor, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """The same prompts as transformers takes them: all of one length."""
    examples = [processor(document) for document in documents]
    batch = collate([[example] for example in examples], processor.pixels(examples))
    inputs = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids)}
    if len(batch.pixel_values):
        inputs["pixel_values"] = batch.pixel_values[:, None]  # (prompts, 1 image, 3, H, W)
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("text", "images"))
    parser.add_argument("--against", choices=("transformers", "torch"), default="transformers", help="torch: our own")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of both sides")
    parser.add_argument("--lora", type=int, default=0, help="rank of our policy's low-rank updates; 0: it has none")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="of text")
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each sample")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where models are kept for the next run")
    parser.add_argument("-o", "--output", type=Path, help="add the turns to those in this JSON file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / args.job
        make_folders(folder, args.job)
        ours = Ours(folder, args.precision, args.lora, args.tokens)
        documents = prompts_of(ours.processor, args.job, args.prompts, args.prompt_tokens)
        inputs = their_inputs(ours.processor, documents)
        if args.against == "transformers":
            theirs = Transformers(folder, args.job, args.precision, args.tokens)
            written = lambda seed: theirs(inputs, args.samples, seed)[:, inputs["input_ids"].shape[1] :].numel()  # noqa: E731
        else:
            plain = Ours(folder, args.precision, args.lora, args.tokens, compiled=False)
            written = lambda seed: sum(len(s.ids) for own in plain(documents, args.samples, seed) for s in own)  # noqa: E731
        ours.sampler.max_new_tokens = 1
        ours(documents, 1, 0)  # compiles its step
        ours.sampler.max_new_tokens = args.tokens
        seconds: dict[str, list[float]] = {"mm-gpt": [], args.against: []}
        for repeat in range(args.repeats):
            start = time.perf_counter()
            samples = ours(documents, args.samples, repeat)
            between = time.perf_counter()
            count = written(repeat)
            seconds["mm-gpt"].append(between - start)
            seconds[args.against].append(time.perf_counter() - between)
            assert count == sum(len(s.ids) for own in samples for s in own) == args.prompts * args.samples * args.tokens
        exact = Transformers(folder, args.job, "fp32", args.tokens)
        differences = [
            (exact.logprobs(inputs, prompt, own[0].ids) - torch.tensor(own[0].logprobs)).abs().max().item()
            for prompt, own in enumerate(samples)
        ]
    settings = {
        name: getattr(args, name) for name in ("job", "against", "precision", "lora", "prompts", "samples", "tokens")
    }
    settings |= {"prompt_tokens": inputs["input_ids"].shape[1], "threads": torch.get_num_threads()}
    result = with_turns(args.output, settings, seconds, max(differences))
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    print(
        f"{args.job}, {args.precision}: {medians['mm-gpt']:.1f} s against {medians[args.against]:.1f} s, "
        f"{result['ratio']:.2f} x ({result['ratio_range'][0]:.2f} to {result['ratio_range'][1]:.2f}); "
        f"log-probabilities differ by at most {max(differences):.1e}"
    )


def with_turns(
    path: Path | None, settings: dict[str, Any], seconds: dict[str, list[float]], difference: float
) -> dict[str, Any]:
    """These turns with those that `path` has of the same settings, where they are then written to."""
    results = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else []
    before = next((r for r in results if settings.items() <= r.items()), None)
    if before is not None:
        results.remove(before)
        seconds = {name: before["seconds"][name] + values for name, values in seconds.items()}
        difference = max(difference, before["largest_logprob_difference"])
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    result = settings | {
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "largest_logprob_difference": difference,
        "processor": processor_features(),
    }
    if path is not None:
        path.write_text(json.dumps([*results, result], indent=2) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
