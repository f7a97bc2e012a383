"""What a command imports before it answers, and how its process ends. Times are measured by examples/benchmarks."""

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_SIZE, make_picture, make_tiny

from mm_gpt.hub.checkpoint import save_model
from mm_gpt.model.lora import LoRAConfig
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.vision.encoder import VisionConfig
from mm_gpt.vision.vit import ViTConfig

NEVER = (
    "gradio",
    "huggingface_hub",
    "matplotlib",
    "open_clip",
    "sympy",
    "timm",
    "torch._dynamo",
    "torch.distributed.tensor",
    "torchvision",
    "transformers",
    "triton",
)
"""Each takes a tenth of a second to some seconds, and an answer needs none of them."""
TOWERS: dict[str, str | ViTConfig] = {
    "lite": "timm/tf_efficientnet_lite0",
    "vit": ViTConfig(image_size=IMAGE_SIZE, patch_size=16, width=32, num_layers=1, num_heads=2, mlp_width=64),
}


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args], capture_output=True, text=True, timeout=600
    )


def save(tower: str, folder: Path) -> Path:
    """A tiny model of our own kinds, in a new folder."""
    model, processor = make_tiny()
    config = dataclasses.replace(
        model.config,
        vision=VisionConfig(model=TOWERS[tower], image_size=IMAGE_SIZE),
        lora=LoRAConfig(rank=2, alpha=2.0),
    )
    torch.manual_seed(0)
    model = MMGPT(config)
    processor = type(processor)(
        processor.tokenizer,
        dataclasses.replace(processor.config, tokens_per_image=model.tokens_per_image),
        vocab_size=processor.tokenizer.vocab_size,
    )
    folder.mkdir()
    save_model(model, processor, folder)
    return folder


@pytest.mark.parametrize("tower", TOWERS)
def test_an_answer_imports_what_it_needs(tower: str, tmp_path: Path) -> None:
    folder = save(tower, tmp_path / "model")
    make_picture().save(tmp_path / "picture.png")
    done = run(
        """
        import sys
        from mm_gpt.commands.cli import main
        code = main(["ask", sys.argv[1], "What is it?", "--model", sys.argv[2], "--max-new-tokens", "2"])
        print(*(name for name in sys.argv[3:] if name in sys.modules), file=sys.stderr)
        sys.exit(code)
        """,
        str(tmp_path / "picture.png"),
        str(folder),
        *NEVER,
    )
    assert (done.returncode, done.stderr) == (0, "\n")


@pytest.mark.parametrize("argv", [["ask", "missing.jpg", "What?"], ["chat", "missing.jpg"], ["caption", "missing.jpg"]])
def test_a_wrong_path_is_told_before_torch_is_imported(argv: list[str]) -> None:
    done = run(
        """
        import sys
        from mm_gpt.commands.cli import main
        code = main(sys.argv[1:])
        sys.exit(9 if "torch" in sys.modules else code)
        """,
        *argv,
    )
    assert done.returncode == 1, done.stderr
    assert "missing.jpg" in done.stderr


def test_collection_goes_on_after_a_start() -> None:
    """Whatever happens in it, and also where one is inside another."""
    done = run(
        """
        import gc
        from mm_gpt.commands.command import nothing_collected
        try:
            with nothing_collected(), nothing_collected():
                print(gc.isenabled())
                1 / 0
        except ZeroDivisionError:
            print(gc.isenabled(), gc.get_freeze_count() > 0)
        gc.disable()
        with nothing_collected():
            pass
        print(gc.isenabled())
        """
    )
    assert done.stdout.split() == ["False", "True", "True", "False"], done.stderr


def test_leaving_loses_nothing() -> None:
    """Threads, also of pools, end first; what is registered runs; streams are flushed; the code is the given one."""
    done = run(
        """
        import atexit, concurrent.futures, sys, tempfile, threading, time
        from mm_gpt.system.processes import leave

        def late():
            time.sleep(0.1)
            sys.stdout.write("thread ")

        atexit.register(lambda: sys.stdout.write("atexit "))
        concurrent.futures.ThreadPoolExecutor(1).submit(late)
        folder = tempfile.TemporaryDirectory(prefix="left-")
        print(folder.name)
        leave(3)
        """
    )
    folder, _, rest = done.stdout.partition("\n")
    assert (done.returncode, rest.split(), done.stderr) == (3, ["thread", "atexit"], "")
    assert not Path(folder).exists()


def test_leaving_tells_of_what_cannot_be_written() -> None:
    code = (
        "import sys; from mm_gpt.system.processes import leave; sys.stdout = open('/dev/full', 'w'); print(); leave(0)"
    )
    assert run(code).returncode == 120


def test_python_m_gives_the_commands_code(tmp_path: Path) -> None:
    for argv, code in ((["--version"], 0), (["nope"], 2), (["ask", "missing.jpg", "What?"], 1)):
        done = subprocess.run([sys.executable, "-m", "mm_gpt", *argv], capture_output=True, text=True, timeout=600)
        assert done.returncode == code
