"""The chunked loss is torch's cross-entropy: value and gradients, whatever the chunk boundaries."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.model import loss as module
from mm_gpt.model.loss import next_token_loss
from mm_gpt.processor import IGNORE_INDEX


def reference(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_equals_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, chunk: int
) -> None:
    """Off-by-one at the last, shorter chunk; a weight gradient that only counts one chunk."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    hidden = torch.randn(3, 10, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(23, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 23, (3, 10))
    labels[0, :4] = labels[2] = IGNORE_INDEX
    value, count = next_token_loss(hidden, weight, labels)
    assert int(count) == 16
    assert value.dtype == dtype
    expected = reference(hidden, weight, labels)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
    ours = torch.autograd.grad(value * 0.37, [hidden, weight])
    theirs = torch.autograd.grad(expected * 0.37, [hidden, weight])
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    assert not ours[0][labels == IGNORE_INDEX].any()  # what is not learned gets exactly no gradient


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_each_position_may_have_a_factor(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    """Of either sign, in value and gradients of states and weights, over the bounds of chunks."""
    monkeypatch.setattr(module, "CHUNK", 4)
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    labels, scales = torch.randint(0, 23, (2, 5)), torch.randn(2, 5)
    labels[0, 1] = IGNORE_INDEX
    value, count = next_token_loss(hidden, weight, labels, softcap=softcap, scales=scales)
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    expected = (each * scales.flatten()).sum()
    assert int(count) == 9
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(total, [hidden, weight]) for total in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 4, IGNORE_INDEX, 0]])
    assert torch.autograd.gradcheck(lambda h, w: next_token_loss(h, w, labels)[0], (hidden, weight))


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    """A frozen decoder's table must not get one, nor a frozen trunk's states."""
    torch.manual_seed(0)
    tensors = {"hidden": torch.randn(1, 4, 3), "weight": torch.randn(5, 3)}
    tensors[trained].requires_grad_(True)
    next_token_loss(tensors["hidden"], tensors["weight"], torch.tensor([[1, 2, 3, 4]]))[0].backward()
    for name, tensor in tensors.items():
        assert (tensor.grad is not None) == (name == trained)


def test_nothing_supervised() -> None:
    """0/0: a batch without any target must neither fail nor give NaN gradients."""
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    value, count = next_token_loss(hidden, weight, torch.full((2, 3), IGNORE_INDEX))
    value.backward()
    assert value.item() == int(count) == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


@given(st.integers(1, 40), st.integers(2, 30), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_any_shape(length: int, vocab: int, share: float) -> None:
    generator = torch.Generator().manual_seed(length * 31 + vocab)
    hidden = torch.randn(2, length, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(vocab, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab, (2, length), generator=generator)
    labels[torch.rand(2, length, generator=generator) < share] = IGNORE_INDEX
    value, count = next_token_loss(hidden, weight, labels)
    assert int(count) == int((labels != IGNORE_INDEX).sum())
    torch.testing.assert_close(value, reference(hidden, weight, labels))


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad a trained table still asks for its gradient, which costs as much as the loss itself."""
    calls: list[object] = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: calls.append(dim) or softmax(self, dim))
    weight = torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        next_token_loss(torch.randn(1, 2, 3), weight, torch.tensor([[1, 2]]))
    assert not calls
    next_token_loss(torch.randn(1, 2, 3), weight, torch.tensor([[1, 2]]))
    assert calls


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((1, 2, 4), 1e4, requires_grad=True)
    weight = torch.eye(4) * 100
    value, _ = next_token_loss(hidden, weight, torch.tensor([[0, 3]]))
    value.backward()
    assert value.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
