"""CLIP loss and model."""

import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mm_gpt.errors import ConfigError
from mm_gpt.vision.contrastive import (
    ContrastiveConfig,
    ContrastiveModel,
    TextTower,
    TextTowerConfig,
    clip_loss,
    gather_features,
)
from mm_gpt.vision.encoder import VisionConfig

TEXT = TextTowerConfig(vocab_size=50, context_length=8, width=32, num_layers=2, num_heads=2)
VISION = VisionConfig(model="timm/test_vit", image_size=32)


def test_identical_embeddings_cost_ln_n() -> None:
    same = torch.randn(1, 16).expand(8, 16)
    assert clip_loss(same, same, 1.0).item() == pytest.approx(math.log(8), abs=1e-5)


def test_aligned_orthonormal_embeddings_at_scale_100_cost_nothing() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8))[0]
    assert clip_loss(basis, basis, math.log(100)).item() < 1e-6


def test_golden_value_of_two_pairs() -> None:
    """Two orthonormal pairs at scale e^1 = 2.718: loss = ln(1 + exp(-2.718)), worked by hand."""
    assert clip_loss(torch.eye(2), torch.eye(2), 1.0).item() == pytest.approx(math.log1p(math.exp(-math.e)), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6), factor=st.floats(0.1, 50))
def test_loss_is_symmetric_and_ignores_length(seed: int, n: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, n, 5, generator=generator)
    loss = clip_loss(images, texts, 2.0)
    torch.testing.assert_close(clip_loss(texts, images, 2.0), loss)
    torch.testing.assert_close(clip_loss(images * factor, texts, 2.0), loss, atol=1e-4, rtol=1e-4)
    order = torch.randperm(n, generator=generator)
    torch.testing.assert_close(clip_loss(images[order], texts[order], 2.0), loss, atol=1e-5, rtol=1e-4)


def test_scale_starts_at_clips_value_and_is_clamped() -> None:
    model = ContrastiveModel(ContrastiveConfig(vision=VISION, text_width=4, embedding_width=4))
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    images, texts = torch.randn(2, 3, 4)
    capped = clip_loss(images, texts, math.log(100))
    torch.testing.assert_close(model.loss(images, texts), capped)
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_mismatched_features_are_refused() -> None:
    """A batch with one caption too many would otherwise train on shifted pairs or broadcast."""
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2, 4\)"):
        clip_loss(torch.randn(3, 4), torch.randn(2, 4), 1.0)


def test_text_feature_does_not_see_padding_but_sees_every_token() -> None:
    torch.manual_seed(0)
    tower = TextTower(TEXT)
    ids = torch.randint(50, (1, 8))
    length = torch.tensor([5])
    feature = tower(ids, length)
    padding = ids.clone()
    padding[:, 5:] = (padding[:, 5:] + 7) % 50
    torch.testing.assert_close(tower(padding, length), feature)
    torch.testing.assert_close(tower(ids[:, :5], length), feature)
    for position in range(5):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 7) % 50
        assert not torch.allclose(tower(changed, length), feature, atol=1e-4)


@pytest.mark.parametrize(("num_tokens", "length", "message"), [(9, 3, "context is 8"), (4, 5, "1..4"), (4, 0, "1..4")])
def test_text_tower_refuses_bad_lengths(num_tokens: int, length: int, message: str) -> None:
    """Length 0 would index -1 and take the feature from the padding at the end."""
    with pytest.raises(ValueError, match=message):
        TextTower(TEXT)(torch.zeros(1, num_tokens, dtype=torch.long), torch.tensor([length]))


def test_config_wants_one_source_of_text() -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        ContrastiveConfig(vision=VISION)
    with pytest.raises(ConfigError, match="exactly one"):
        ContrastiveConfig(vision=VISION, text=TEXT, text_width=4)
    with pytest.raises(ConfigError, match="num_heads"):
        TextTowerConfig(vocab_size=10, width=30)


def test_eight_pairs_are_learned_perfectly() -> None:
    """The whole path, images and texts to retrieval: a broken gradient on either side leaves mistakes."""
    torch.manual_seed(0)
    model = ContrastiveModel(ContrastiveConfig(vision=VISION, text=TEXT, embedding_width=32)).train()
    pixels = torch.randn(8, 3, 32, 32)
    ids = torch.randint(50, (8, 8))
    lengths = torch.arange(1, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(30):
        loss = model.loss(model.encode_image(pixels), model.encode_text(ids, lengths))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.clamp_logit_scale()
    with torch.inference_mode():
        images = F.normalize(model.encode_image(pixels), dim=-1)
        texts = F.normalize(model.encode_text(ids, lengths), dim=-1)
    similarity = images @ texts.T
    assert similarity.argmax(dim=0).tolist() == list(range(8))
    assert similarity.argmax(dim=1).tolist() == list(range(8))


def test_precomputed_text_features_train_the_projection() -> None:
    model = ContrastiveModel(ContrastiveConfig(vision=VISION, text_width=6, embedding_width=4))
    loss = model.loss(model.encode_image(torch.randn(2, 3, 32, 32)), model.project_text(torch.randn(2, 6)))
    loss.backward()
    assert model.text is None
    assert model.text_projection.weight.grad is not None
    assert model.logit_scale.grad is not None


def _sharded_gradients(rank: int, store: str, images: torch.Tensor, texts: torch.Tensor, results: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = slice(3 * rank, 3 * rank + 3)
    weight = torch.eye(5, requires_grad=True)
    loss = clip_loss(gather_features(images[mine] @ weight), gather_features(texts[mine] @ weight), 1.5)
    loss.backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    results.put((rank, loss.item(), (weight.grad / 2).tolist()))  # type: ignore[attr-defined]
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Stops an all_gather without gradients, or one that counts them twice."""
    images, texts = torch.randn(2, 6, 5)
    weight = torch.eye(5, requires_grad=True)
    full = clip_loss(gather_features(images @ weight), gather_features(texts @ weight), 1.5)
    full.backward()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (str(tmp_path / "store"), images, texts, results)
    processes = [context.Process(target=_sharded_gradients, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    for _, loss, gradient in answers:
        assert loss == pytest.approx(full.item(), abs=1e-6)
        torch.testing.assert_close(torch.tensor(gradient), weight.grad, atol=1e-5, rtol=1e-4)
