"""What makes a training step fast changes nothing that it computes: frozen towers, memory, compilers."""

import dataclasses
import logging
from typing import Any

import pytest
import torch

from mm_gpt.model import mmgpt
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.training import compiling, kept_memory
from mm_gpt.training.compiling import compile_blocks
from mm_gpt.training.features import FrozenTower, use_frozen_tower
from mm_gpt.vision.connectors import ConnectorConfig
from mm_gpt.vision.encoder import VisionConfig, VisionEncoder
from mm_gpt.vision.vit import ViTConfig

VIT = ViTConfig(image_size=32, patch_size=8, width=32, num_layers=2, num_heads=2, mlp_width=64)


def make_tower() -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(VisionConfig(model=VIT, image_size=32)).requires_grad_(False).train()


def pixels(number: int) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_frozen_tower_sees_what_the_tower_sees() -> None:
    """To the rounding of bfloat16; the tower itself stays as it was, to be saved."""
    tower = make_tower()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with torch.no_grad():
        expected = tower(pixels(3))
    frozen = FrozenTower(tower, max_bytes=0)
    found, scores = frozen.see(pixels(3))
    assert scores is None
    assert (found - expected).norm() < 0.02 * expected.norm()
    torch.testing.assert_close(tower.state_dict(), before, rtol=0, atol=0)
    assert tower.training


def test_what_is_remembered_equals_what_is_computed_bit_for_bit() -> None:
    """Alone, beside other images, remembered or not: a run that is resumed has forgotten, and must go on the same."""
    images = pixels(4)
    frozen, fresh = (FrozenTower(make_tower(), max_bytes=2**20) for _ in range(2))
    first, _ = frozen.see(images)
    assert frozen.hits == 0
    again, _ = frozen.see(images.flip(0))
    assert frozen.hits == 4
    torch.testing.assert_close(again.flip(0), first, rtol=0, atol=0)
    alone, _ = fresh.see(images[2:3])
    torch.testing.assert_close(alone, first[2:3], rtol=0, atol=0)


def test_memory_for_images_is_bounded() -> None:
    """When it is full, later images are computed each time, and what is there stays."""
    images = pixels(5)
    size = VIT.num_patches * VIT.width * 4
    frozen = FrozenTower(make_tower(), max_bytes=3 * size)
    expected, _ = frozen.see(images)
    found, _ = frozen.see(images)
    assert len(frozen.remembered) == 3
    assert frozen.hits == 3
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_other_pixels_are_another_image() -> None:
    """One bit of one pixel."""
    images, frozen = pixels(1), FrozenTower(make_tower(), max_bytes=2**20)
    frozen.see(images)
    changed = images.clone()
    changed[0, 0, 0, 0] = torch.nextafter(changed[0, 0, 0, 0], torch.tensor(9.0))
    frozen.see(changed)
    assert frozen.hits == 0


def make_model() -> mmgpt.MMGPT:
    torch.manual_seed(0)
    decoder = DecoderConfig(
        vocab_size=48, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_size=32, mlp_width=48, max_length=64
    )
    return mmgpt.MMGPT(
        mmgpt.ModelConfig(
            decoder=decoder,
            vision=VisionConfig(model=VIT, image_size=32),
            connector=ConnectorConfig(kind="linear"),
        )
    )


def test_only_a_frozen_tower_is_replaced_and_only_in_training() -> None:
    model = make_model()
    use_frozen_tower(model, max_bytes=0)
    assert model.frozen_tower is None
    assert model.vision is not None
    model.vision.unfreeze(0)
    names = set(model.state_dict())
    use_frozen_tower(model, max_bytes=0)
    assert set(model.state_dict()) == names
    calls: list[int] = []
    tower: Any = model.frozen_tower
    real = tower.see

    class Counting:
        def see(self, *args: Any) -> Any:
            calls.append(1)
            return real(*args)

    model.frozen_tower = Counting()
    model.train()._see(pixels(1), ())
    model.eval()._see(pixels(1), ())
    assert len(calls) == 1


def test_memory_is_kept_inside_and_given_back_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run ends in an error; on a GPU, and without glibc, nothing is set."""
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, option: int, value: int) -> None:
            calls.append((option, value))

        def malloc_trim(self, pad: int) -> None:
            calls.append((0, pad))

    monkeypatch.setattr(kept_memory.ctypes, "CDLL", lambda _: Library())
    monkeypatch.setattr(kept_memory.platform, "libc_ver", lambda: ("glibc", "2.36"))

    def fails() -> None:
        with kept_memory.kept_memory(torch.device("cpu")):
            assert (kept_memory.M_MMAP_THRESHOLD, 64 << 20) in calls
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert calls[-1] == (0, 0)
    assert (kept_memory.M_MMAP_THRESHOLD, 128 << 10) in calls
    calls.clear()
    with kept_memory.kept_memory(torch.device("cuda")):
        pass
    monkeypatch.setattr(kept_memory.platform, "libc_ver", lambda: ("", ""))
    with kept_memory.kept_memory(torch.device("cpu")):
        pass
    assert not calls


def test_without_a_compiler_a_line_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Once, and blocks train as they are written."""
    monkeypatch.setattr(compiling, "_no_compiler", lambda: "there is no C++ compiler (install g++)")
    config = DecoderConfig(
        vocab_size=16, width=16, num_layers=2, num_heads=2, num_kv_heads=2, head_size=8, mlp_width=16, max_length=8
    )
    decoder = Decoder(dataclasses.replace(config, norm_place="post"))
    with caplog.at_level(logging.WARNING):
        compile_blocks(decoder)
    assert [record.message for record in caplog.records] == [
        "blocks are not compiled: there is no C++ compiler (install g++)"
    ]
    assert all("forward" not in vars(block) for block in decoder.blocks)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_what_a_loss_asks_for_is_all_that_is_computed(share: float) -> None:
    """The last block for learned positions, gradients of a tied matrix in one place: all gradients are the same, and
    nothing of it is left for a loss outside."""
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=48, width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_size=32, mlp_width=48, max_length=64
    )
    decoder = Decoder(config).train()
    ids = torch.randint(48, (2, 65))
    labels = ids[:, 1:].masked_fill(torch.rand(2, 64) > share, -100)

    def gradients() -> dict[str, torch.Tensor]:
        decoder.zero_grad()
        hidden = decoder(decoder.embed(ids[:, :-1]), torch.arange(64).expand(2, -1))
        decoder.loss(hidden, labels)[0].backward()
        return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}

    expected = gradients()
    with decoder.learning(labels):
        found = gradients()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)
