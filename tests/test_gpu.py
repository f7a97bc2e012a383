"""What only a GPU shows: the same answers as on the CPU, and training in bf16. Run with `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_picture, make_tiny
from sharded_model import batch_of, document, whole

from mm_gpt.inference.assistant import Assistant
from mm_gpt.processor import collate
from mm_gpt.training.parallel import gathered, shard_model
from mm_gpt.training.recipes import run_recipe, tiny
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
