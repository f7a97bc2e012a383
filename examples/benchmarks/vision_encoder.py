"""How fast images are encoded, against `transformers` with the same weights in the same run, on the CPU.

The tower is SmolVLM-256M's (SigLIP-B/16 at 512 pixels) with random weights; an image here is one tile, of which a photo
makes 13 to 17. All take turns, so that a busy moment of the machine hits them alike; what is reported are medians and
their ratios, and the cosine similarity of the tokens to those of transformers in fp32, on photos.

    python examples/benchmarks/vision_encoder.py -o docs/results/vision_encoder.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import mm_gpt
from mm_gpt.hub.vision_towers import tower_prefix, vit_config, vit_left_over, vit_table
from mm_gpt.hub.weights import WeightLoader, unfilled
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder

SAMPLES = Path(mm_gpt.__file__).parent / "serving/samples"
DTYPES = ("fp32", "bf16", "int8")


def reference(layers: int) -> transformers.PreTrainedModel:
    """A tower with weights as large as those of trained ones: tokens differ, and no gain is one."""
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=12,
        image_size=512,
        patch_size=16,
        vision_use_head=False,
    )
    model = transformers.SiglipVisionModel(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                torch.nn.init.normal_(module.bias, std=0.1)
            elif isinstance(module, torch.nn.LayerNorm):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def ours(model: transformers.PreTrainedModel, dtype: str) -> VisionEncoder:
    config = vit_config(model.config.to_dict(), where="the reference")
    with unfilled():
        encoder = VisionEncoder(VisionConfig(model=config, image_size=config.image_size)).eval()
    encoder.to_empty(device="cpu")
    state = model.state_dict()
    prefix = tower_prefix(state, where="the reference")
    weights = WeightLoader("the reference", state)
    weights.fill(encoder.tower, vit_table(prefix), state.__getitem__)
    weights.finish(vit_left_over(prefix))
    if reason := encoder.prepare(dtype):  # type: ignore[arg-type]
        raise SystemExit(f"{dtype}: {reason}")
    return encoder


def photos(count: int) -> Tensor:
    """(N, 3, 512, 512): squares of the sample photos, from -1 to 1."""
    paths, tiles = sorted(SAMPLES.glob("*.jpg")), []
    for i in range(count):
        image = Image.open(paths[i % len(paths)]).convert("RGB").resize((768, 768))
        left, top = (i * 37) % 256, (i * 91) % 256
        tiles.append(np.array(image.crop((left, top, left + 512, top + 512))))
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 127.5 - 1


def features() -> list[str]:
    """What the processor has that matters here."""
    path = Path("/proc/cpuinfo")
    found = path.read_text() if path.is_file() else ""
    return [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in found.split()]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=2, help="encoded at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="processor time, for a busy machine; take one thread")
    parser.add_argument("--quick", action="store_true", help="two layers, two repeats: whether it runs, not how fast")
    parser.add_argument("-o", "--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.repeats = 2, 2
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu else time.perf_counter
    pixels = photos(args.tiles)
    model = reference(args.layers)
    half = reference(args.layers).bfloat16()
    ways: dict[str, Callable[[], Tensor]] = {
        "transformers fp32": lambda: model(pixel_values=pixels).last_hidden_state,
        "transformers bf16": lambda: half(pixel_values=pixels.bfloat16()).last_hidden_state.float(),
    }
    for dtype in DTYPES:
        encoder = ours(model, dtype)
        ways[f"mm-gpt {dtype}"] = lambda encoder=encoder: encoder(pixels)  # type: ignore[misc]
    exact = ways["transformers fp32"]()
    close = {name: F.cosine_similarity(run(), exact, dim=-1) for name, run in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(args.repeats), disable=None):
        for name, run in ways.items():
            start = clock()
            run()
            seconds[name].append((clock() - start) / args.tiles)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(medians["transformers fp32"], medians["transformers bf16"])
    result = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "features": features()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "clock": "processor time" if args.cpu else "wall",
        "layers": args.layers,
        "tiles": args.tiles,
        "repeats": args.repeats,
        "ways": {
            name: {
                "seconds_a_tile": round(medians[name], 4),
                "times_transformers_at_its_best": round(best / medians[name], 2),
                "cosine_mean": round(close[name].mean().item(), 6),
                "cosine_min": round(close[name].min().item(), 6),
            }
            for name in ways
        },
    }
    print(f"{'':20}{'s a tile':>10}{'x best':>8}{'cosine':>10}{'least':>10}")
    for name, row in result["ways"].items():  # type: ignore[attr-defined]
        print(f"{name:20}{row['seconds_a_tile']:10.3f}{row['times_transformers_at_its_best']:8.2f}", end="")
        print(f"{row['cosine_mean']:10.5f}{row['cosine_min']:10.5f}")
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
