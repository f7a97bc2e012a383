"""What only a GPU shows: the same answers as on the CPU, and training in bf16. Run with `pytest -m gpu`."""

from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from conftest import make_picture, make_tiny
from sharded_model import batch_of, document, whole
from test_flex import packed
from toy_stage import logged

from mm_gpt.config import override
from mm_gpt.inference.assistant import Assistant
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.masks import block_mask, uses_blocks
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Batch, collate
from mm_gpt.training.compiling import compile_blocks
from mm_gpt.training.parallel import gathered, shard_model
from mm_gpt.training.recipes import run_recipe, tiny
from mm_gpt.training.recompute import recompute_blocks
from mm_gpt.training.telemetry import known_peak
from mm_gpt.training.train_config import use_bf16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_hidden_states_agree_with_the_cpu() -> None:
    """In float32 with TF32 off, to 1e-4."""
    model, processor = make_tiny()
    example = processor(processor.chat([{"role": "user", "content": [make_picture(), "What is it?"]}]))
    pixels = torch.stack([processor.transform(image.load()) for image in example.images])
    batch = collate([[example]], pixels)
    with torch.inference_mode():
        expected = model(batch)
        found = model.cuda()(batch.to("cuda")).cpu()
    assert torch.allclose(expected, found, atol=1e-4)


def test_batches_equal_singles_in_bf16() -> None:
    """Left padding must not leak, in the precision that inference uses on a GPU."""
    assistant = Assistant(*make_tiny(), device=torch.device("cuda"))
    pictures = [make_picture(seed) for seed in range(4)]
    together = assistant.caption(pictures, batch_size=4, max_new_tokens=4)
    alone = [assistant.caption([picture], max_new_tokens=4)[0] for picture in pictures]
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 3  # a near tie may fall either way in bf16


def packed_model() -> tuple[MMGPT, Batch]:
    """A decoder with grouped heads of 32 and a window, and rows of several documents, with branches."""
    config = DecoderConfig(
        vocab_size=400,
        width=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        mlp_width=256,
        max_length=1024,
        attention=("dense", "local"),
        window=60,
    )
    torch.manual_seed(0)
    batch = packed([[(150,), (90,), (200,)], [(40, 30, 25, 60), (130, 140, 5), (5,)]], right=12)
    batch.input_ids = torch.randint(400, batch.input_ids.shape)
    batch.position_ids = torch.arange(batch.input_ids.shape[1]).repeat(2, 1)
    return MMGPT(ModelConfig(decoder=config)).cuda().train(), batch.to("cuda")


def gradients(model: MMGPT, batch: Batch, dtype: torch.dtype | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        loss, count = model.loss(batch)
    (loss / count).backward()
    return float((loss / count).detach()), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_by_blocks_equals_the_masked_form(
    compiled: bool, recompute: Literal["none", "selective", "full"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients in float32 with TF32 off, to 1e-5, whatever surrounds the kernel."""
    model, batch = packed_model()
    assert uses_blocks(model.decoder.config, model.device)
    with monkeypatch.context() as patched:
        patched.setattr("mm_gpt.model.mmgpt.uses_blocks", lambda config, device: False)
        masked, expected = gradients(model, batch)
    if compiled:
        compile_blocks(model.decoder, recompute=recompute)
    elif recompute != "none":
        recompute_blocks(model.decoder, recompute)
    blocked, found = gradients(model, batch)
    assert blocked == pytest.approx(masked, rel=1e-5)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5, rtol=1e-4), name


def test_attention_by_blocks_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float32 as the mask's kernel is."""
    model, batch = packed_model()
    exact, precise = gradients(model, batch)
    blocked, found = gradients(model, batch, torch.bfloat16)
    monkeypatch.setattr("mm_gpt.model.mmgpt.uses_blocks", lambda config, device: False)
    masked, expected = gradients(model, batch, torch.bfloat16)
    assert abs(blocked - exact) < 2 * abs(masked - exact) + 1e-3
    for name, gradient in precise.items():
        error, usual = ((each[name] - gradient).norm() for each in (found, expected))
        assert error < 2 * usual + 1e-3 * gradient.norm(), name


def test_blocks_take_no_memory_of_the_square() -> None:
    """A row of 16,384 tokens: a mask of it alone has 256 MiB."""
    batch = packed([[(512,)] * 32]).to("cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert block_mask(batch) is not None
    assert torch.cuda.max_memory_allocated() - before < 16 * 2**20


def test_a_known_gpu_has_an_mfu(tmp_path: Path) -> None:
    if known_peak(torch.cuda.get_device_name()) is None:
        pytest.skip("its data sheet is not in the table")
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    for number in range(12):
        make_picture(number).save(shapes / f"{number}.png")
        (shapes / f"{number}.txt").write_text("A red circle.\n")
    changes = ["train.steps=2", "train.log_every=1", "rows=1"]
    run_recipe(override(tiny(str(shapes)), changes), tmp_path / "run", progress=False)
    assert all(0 < value < 1 for value in logged(tmp_path / "run", "mfu").values())
    assert all(
        value < torch.cuda.get_device_properties(0).total_memory
        for value in logged(tmp_path / "run", "memory").values()
    )


def test_training_in_bf16_learns(tmp_path: Path) -> None:
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    for number in range(40):
        make_picture(number).save(shapes / f"{number}.png")
        (shapes / f"{number}.txt").write_text("A red circle.\n" if number % 2 else "A blue square.\n")
    assert use_bf16("auto", torch.device("cuda"))
    run_recipe(tiny(str(shapes)), tmp_path / "run", progress=False)
    assert (tmp_path / "run/best/model.safetensors").exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_in_one_slice_is_a_whole_one(tmp_path: Path, bf16: bool) -> None:
    """FSDP of one GPU: losses, gradients and what is saved."""
    device = torch.device("cuda")
    plain, processor = make_tiny()
    model, _ = make_tiny()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        plain.to(device).train()
        shard_model(model.train(), 1, device, bf16=bf16)
        with gathered(model):
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, plain.state_dict()[name].cpu()), name
        batch = batch_of(processor, [document(0, image=True)]).to(device)
        losses = []
        for each in (plain, model):
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                losses.append(each.loss(batch)[0])
            losses[-1].backward()
        tolerance = 2e-2 if bf16 else 1e-5
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=tolerance)
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                assert p.grad is not None
                distance = (whole(p.grad).float() - q.grad).norm() / q.grad.norm()
                assert distance < 5 * tolerance, name
    finally:
        dist.destroy_process_group()
