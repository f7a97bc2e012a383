"""SmolVLM-256M at its real size, with random weights: photos in, tokens out, against transformers and llama.cpp.

All of them read the same weights from one folder, which is made once, and take turns, so that a busy moment of the
machine hits all. What is reported are medians and their ratios.

    python examples/benchmarks/smolvlm.py photo --folder smolvlm-random
    python examples/benchmarks/smolvlm.py captions --folder smolvlm-random --photos 64
"""

import argparse
import base64
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PILImage
from tokenizers import AddedToken
from tqdm import tqdm

import mm_gpt
from mm_gpt.hub.checkpoint import load_decoder, save_model
from mm_gpt.hub.export.export_model import export_model
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.templates.image_text import ImageTextConfig
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.tiling import TilingConfig
from mm_gpt.vision.transforms import ImageTransformConfig
from mm_gpt.vision.vit import ViTConfig

VOCABULARY = 49_280
QUESTION = "Describe the image in one sentence."
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIZES = ((4032, 3024), (1920, 1080), (640, 480), (512, 512), (1280, 960), (3000, 2000), (800, 1200), (300, 400))
"""Width and height of photos as phones, cameras and the web have them."""


def make_folder(folder: Path) -> None:
    """Our model, its Hugging Face folder and its GGUF files, under `folder`."""
    if (folder / "gguf").exists():
        return
    torch.manual_seed(0)
    decoder = DecoderConfig(
        vocab_size=VOCABULARY,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        mlp_width=1536,
        max_length=8192,
        rope_theta=100_000.0,
        tie_embeddings=False,
    )
    tower = ViTConfig(
        image_size=512,
        patch_size=16,
        width=768,
        num_layers=12,
        num_heads=12,
        mlp_width=3072,
        activation="gelu_tanh",
    )
    tokenizer = with_marks(load_decoder("smollm2-135m-instruct")[1])
    model = MMGPT(
        ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=tower, image_size=512),
            connector=ConnectorConfig(kind="pixel_shuffle", scale=4, bias=False),
            image_token_id=tokenizer.special["<image>"],
        )
    )
    processor = Processor(
        tokenizer,
        ProcessorConfig(
            image=ImageTransformConfig(
                size=512, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="lanczos", backend="torchvision"
            ),
            tokens_per_image=64,
            max_length=8192,
            tiling=TilingConfig(kind="idefics3", longest_edge=2048),
            image_text=ImageTextConfig(token="<image>", kind="idefics3"),
            begin_of_text=True,
        ),
        vocab_size=VOCABULARY,
        template=ChatTemplate(TEMPLATE, special=tokenizer.names, where="here", end_tokens=tokenizer.end_tokens),
    )
    (folder / "own").mkdir(parents=True, exist_ok=True)
    save_model(model.bfloat16(), processor, folder / "own")
    export_model(folder / "own", folder / "hf", format="hf", dtype="bfloat16", overwrite=True)
    export_model(folder / "own", folder / "gguf", format="gguf", dtype="bfloat16", overwrite=True)


def with_marks(tokenizer: Tokenizer) -> Tokenizer:
    """SmolLM2's tokenizer with SmolVLM's marks of images."""
    backend = tokenizer.backend
    marks = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return Tokenizer(backend, end_of_text="<|im_end|>", end_of_turn="<end_of_utterance>", names=tokenizer.names)


def photos(count: int) -> list[PILImage.Image]:
    """Real photos in mixed sizes."""
    import skimage.data

    samples = Path(mm_gpt.__file__).parent / "serving" / "samples"
    found = [PILImage.open(path).convert("RGB") for path in sorted(samples.glob("*.jpg"))]
    names = ("chelsea", "coffee", "astronaut", "rocket")
    found += [PILImage.fromarray(getattr(skimage.data, name)()) for name in names]
    result = []
    for number in range(count):
        picture = found[number % len(found)].rotate(number // len(found), resample=PILImage.Resampling.BILINEAR)
        result.append(picture.resize(SIZES[number % len(SIZES)], PILImage.Resampling.BICUBIC))
    return result


class Ours:
    def __init__(self, folder: Path, dtype: str, tokens: int):
        self.assistant = mm_gpt.load(folder / "hf", dtype=dtype)
        ends = self.assistant.processor.tokenizer.end_ids
        self.options: Any = {"max_new_tokens": tokens, "logit_bias": dict.fromkeys(ends, -1e4), "num_beams": 1}

    def photo(self, picture: PILImage.Image) -> int:
        self.assistant.engine.forget()
        return self.assistant.ask(picture, QUESTION, **self.options).completion_tokens

    def captions(self, pictures: Sequence[PILImage.Image]) -> int:
        self.assistant.engine.forget()
        return len(self.assistant.caption(list(pictures), prompt=QUESTION, **self.options))


class Transformers:
    def __init__(self, folder: Path, dtype: torch.dtype, tokens: int, batch_size: int):
        import transformers

        transformers.logging.set_verbosity_error()
        self.processor = transformers.AutoProcessor.from_pretrained(folder / "hf")
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "hf", dtype=dtype).eval()
        self.tokens, self.batch_size, self.dtype = tokens, batch_size, dtype

    @torch.inference_mode()
    def _run(self, pictures: Sequence[PILImage.Image]) -> int:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        prompt = self.processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = self.processor(
            text=[prompt] * len(pictures),
            images=[[picture] for picture in pictures],
            return_tensors="pt",
            padding=True,
        )
        inputs = {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        out = self.model.generate(**inputs, max_new_tokens=self.tokens, min_new_tokens=self.tokens, do_sample=False)
        return int(out.shape[1] - inputs["input_ids"].shape[1])

    def photo(self, picture: PILImage.Image) -> int:
        return self._run([picture])

    def captions(self, pictures: Sequence[PILImage.Image]) -> int:
        for start in range(0, len(pictures), self.batch_size):
            self._run(pictures[start : start + self.batch_size])
        return len(pictures)


class LlamaCpp:
    def __init__(self, folder: Path, tokens: int):
        import xllamacpp

        files = sorted((folder / "gguf").glob("*.gguf"))
        params = xllamacpp.CommonParams()
        params.model.path = str(next(path for path in files if "mmproj" not in path.name))
        params.mmproj.path = str(next(path for path in files if "mmproj" in path.name))
        params.n_ctx, params.n_parallel, params.warmup = 8192, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server, self.tokens = xllamacpp.Server(params), tokens

    def photo(self, picture: PILImage.Image) -> int:
        stream = io.BytesIO()
        picture.save(stream, "PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        request = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "cache_prompt": False,
        }
        answer = self.server.handle_chat_completions(request)
        return int(answer["usage"]["completion_tokens"])

    def captions(self, pictures: Sequence[PILImage.Image]) -> int:
        for picture in pictures:
            self.photo(picture)
        return len(pictures)


def processor_features() -> list[str]:
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return sorted(flag for flag in flags.split() if flag.startswith(("avx", "amx", "fma")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("photo", "captions"))
    parser.add_argument("--folder", type=Path, default=Path("smolvlm-random"), help="made if it is not there")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--photos", type=int, default=64, help="of captions")
    parser.add_argument("--batch-size", type=int, default=4, help="of transformers, for captions")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runners", nargs="+", help="of those that are named in the table; default: all")
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    make_folder(args.folder)
    makers: dict[str, Callable[[], Any]] = {
        "mm-gpt bf16": lambda: Ours(args.folder, "bf16", args.tokens),
        "mm-gpt int8": lambda: Ours(args.folder, "int8", args.tokens),
        "transformers bf16": lambda: Transformers(args.folder, torch.bfloat16, args.tokens, args.batch_size),
        "transformers fp32": lambda: Transformers(args.folder, torch.float32, args.tokens, args.batch_size),
        "llama.cpp bf16": lambda: LlamaCpp(args.folder, args.tokens),
    }
    runners = {name: make() for name, make in makers.items() if args.runners is None or name in args.runners}
    pictures = photos(1 if args.job == "photo" else args.photos)
    times: dict[str, list[float]] = {name: [] for name in runners}
    for repeat in tqdm(range(args.repeats + (args.job == "photo")), desc=args.job):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.photo(pictures[0]) if args.job == "photo" else runner.captions(pictures)
            if repeat or args.job == "captions":  # the first photo warms up
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    best = min((value for name, value in seconds.items() if name.startswith("transformers")), default=math.nan)
    rows = [{"name": name, "seconds": value, "ratio": best / value} for name, value in seconds.items()]
    print(f"{args.job}: medians of {args.repeats}, {torch.get_num_threads()} threads, {' '.join(processor_features())}")
    for row in rows:
        print(f"{row['name']:20} {row['seconds']:8.2f} s   {row['ratio']:5.2f} x transformers' best")
    if args.output:
        result = {"job": args.job, "tokens": args.tokens, "photos": len(pictures), "rows": rows}
        args.output.write_text(json.dumps(result | {"processor": processor_features()}, indent=2) + "\n")
    print(f"{len(pictures)} photos, {args.tokens} tokens each", file=sys.stderr)


if __name__ == "__main__":
    main()
