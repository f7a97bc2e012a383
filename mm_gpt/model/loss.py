"""Next-token loss that never holds the logits of all positions.

A vocabulary of 49,152 makes logits the largest tensor of training. Here only supervised positions are projected, in
chunks, and each chunk's gradient is taken at once, so that one chunk of logits exists at a time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm_gpt.kernels.training import LANES, Kind, kernel
from mm_gpt.processor import IGNORE_INDEX

CHUNK = 512  # positions projected at a time: 512 · 49,152 float32 logits are 100 MB
FUSED_CHUNK = 512
"""The same where logits become their gradient in their own place."""
WORDS = 8192
"""Of the vocabulary, whose gradients are rounded at a time."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, scales: Tensor | None
    ) -> Tensor:
        if softcap is None and (kind := fused_kind(hidden, weight)) is not None:
            return _fused_forward(ctx, hidden, weight, labels, scales, kind)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=precise)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if ctx.needs_input_grad[1] else None
        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = F.linear(hidden[rows], weight.to(hidden.dtype)).to(precise)
            if softcap is not None:
                bent = torch.tanh(logits / softcap)
                logits = softcap * bent
            if scales is None:
                total += F.cross_entropy(logits, labels[rows], reduction="sum")
            else:
                total += F.cross_entropy(logits, labels[rows], reduction="none") @ scales[rows].to(precise)
            if grad_hidden is None and grad_weight is None:
                continue
            grad = logits.softmax(dim=-1)
            grad[torch.arange(len(grad), device=grad.device), labels[rows]] -= 1
            if scales is not None:
                grad *= scales[rows].to(precise).unsqueeze(1)
            if softcap is not None:
                grad *= 1 - bent * bent
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden[rows]).to(precise)
        ctx.once = False
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was taken already, and is not kept for a second time")
        grads: tuple[Tensor | None, ...] = ctx.gradients
        if ctx.once:  # nobody else has them: scaled where they are
            ctx.gradients = None
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_output)
        else:
            grads = tuple(None if grad is None else grad * grad_output.to(grad.dtype) for grad in grads)
        return (*grads, None, None, None)  # type: ignore[return-value]


def fused_kind(hidden: Tensor, weight: Tensor) -> Kind | None:
    """The type in which the loss is computed by compiled passes over the logits; None: by torch's."""
    if hidden.device.type != "cpu" or len(weight) % LANES or hidden.dtype == torch.float64:
        return None
    if torch.is_autocast_enabled("cpu"):
        return "bf16" if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None
    return "f32" if hidden.dtype == weight.dtype == torch.float32 else None


def _fused_forward(
    ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scales: Tensor | None, kind: Kind
) -> Tensor:
    """As above, in few passes: the logits of a chunk become its gradient where they lie."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    wants_hidden, wants_weight = ctx.needs_input_grad[:2]
    matrix, rows, labels = weight.detach().to(dtype), hidden.to(dtype), labels.contiguous()
    scales = torch.ones(len(labels)) if scales is None else scales.float().contiguous()
    losses = torch.empty(len(labels))
    grad_hidden = torch.empty_like(hidden) if wants_hidden else None
    grad_weight: Tensor | None = None
    with torch.autocast("cpu", enabled=False):
        for start in range(0, len(labels), FUSED_CHUNK):
            at = slice(start, start + FUSED_CHUNK)
            logits = F.linear(rows[at], matrix)
            places = [each.data_ptr() for each in (logits, labels[at], scales[at], losses[at])]
            learns = wants_hidden or wants_weight
            kernel("cross_entropy", kind, learns=learns)(len(logits), [*places, len(weight)], torch.get_num_threads())
            if grad_hidden is not None:
                grad_hidden[at] = logits @ matrix
            if wants_weight:
                if grad_weight is None:
                    grad_weight = torch.zeros_like(weight, dtype=torch.float32)
                for word in range(0, len(weight), WORDS):
                    some = slice(word, word + WORDS)
                    grad_weight[some] += logits[:, some].t() @ rows[at]
            del logits  # before there are others
    if wants_weight and grad_weight is None:
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
    ctx.once = True
    ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
    return losses.sum()


def next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy (nats) over supervised positions, and their count.

    hidden (B, T, D), weight (V, D), labels (B, T) already shifted; `softcap` is the decoder's `logit_softcap`.
    scales (B, T): what each position's loss is multiplied by, of either sign; None: 1.
    The caller divides by the step's global count, so that micro-batches with more targets weigh more.
    """
    if not torch.is_grad_enabled():  # autograd functions are not told, and would compute gradients for nothing
        weight = weight.detach()
    supervised = labels != IGNORE_INDEX
    rows = hidden[supervised]  # (M, D)
    own = None if scales is None else scales[supervised]
    loss = _ChunkedCrossEntropy.apply(rows, weight, labels[supervised], softcap, own)
    return loss, supervised.sum()


class TiedEmbedding(torch.autograd.Function):
    """Rows of a matrix (V, D), and the matrix itself for the output layer. Their gradients meet here: those of the rows
    are added into the other, where torch would fill a second (V, D) with zeros for them, and then add the two up."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor | None, whole: Tensor | None) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        if rows is None:
            return whole, None
        if whole is None:
            whole = rows.new_zeros(ctx.shape)
        return whole.index_add_(0, ids.flatten(), rows.flatten(0, -2).to(whole.dtype)), None


class _ChunkedLogprobs(torch.autograd.Function):
    """The gradient of a log-probability with respect to its hidden state is taken with it: (M, D), not (M, V)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy = (hidden.new_zeros(len(labels), dtype=precise) for _ in range(2))
        wanted = ctx.needs_input_grad[0]
        grad_hidden = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            logits, slope = _logits(hidden[rows], weight, softcap, temperature)
            # log_softmax adds a vocabulary up in a row: for 49,152 words all is 5e-6 too high
            logs = logits - logits.logsumexp(dim=-1, keepdim=True)
            logprobs[rows] = logs.gather(1, labels[rows, None]).squeeze(1)
            probabilities = logs.exp()
            entropy[rows] = -(probabilities * logs).sum(dim=-1)
            if grad_hidden is not None:
                grad = _logit_grad(probabilities, labels[rows], slope, temperature).to(hidden.dtype)
                grad_hidden[rows] = grad @ weight.to(hidden.dtype)
        ctx.save_for_backward(grad_hidden, hidden, weight, labels)
        ctx.softcap, ctx.temperature = softcap, temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, hidden, weight, labels = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:  # the logits once more: what they are multiplied by was not known before
            grad_weight = torch.zeros_like(weight, dtype=grad_output.dtype)
            for start in range(0, len(labels), CHUNK):
                rows = slice(start, start + CHUNK)
                logits, slope = _logits(hidden[rows], weight, ctx.softcap, ctx.temperature)
                grad = _logit_grad(logits.softmax(dim=-1), labels[rows], slope, ctx.temperature)
                grad *= grad_output[rows].unsqueeze(1)
                grad_weight += (grad.to(hidden.dtype).T @ hidden[rows]).to(grad_weight.dtype)
            grad_weight = grad_weight.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad_output.unsqueeze(1)).to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Logits over the temperature (M, V), and with a soft cap the slope of the cap."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(precise)
    if softcap is None:
        return logits / temperature, None
    bent = torch.tanh(logits / softcap)
    return bent * (softcap / temperature), 1 - bent * bent


def _logit_grad(probabilities: Tensor, labels: Tensor, slope: Tensor | None, temperature: float) -> Tensor:
    """d log p(label) / d logits (M, V), those before soft cap and temperature. Overwrites `probabilities`."""
    grad = probabilities.neg_()
    grad[torch.arange(len(grad), device=grad.device), labels] += 1
    grad /= temperature
    return grad if slope is None else grad * slope


def label_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The log-probability (nats) of each label under softmax(logits / temperature), and the entropy in its place.

    hidden (B, T, D), weight (V, D), labels (B, T) already shifted; both results (B, T), float32, and 0 where there is
    no label. The entropy has no gradient.
    """
    if not torch.is_grad_enabled():
        weight = weight.detach()
    supervised = labels != IGNORE_INDEX
    found = _ChunkedLogprobs.apply(hidden[supervised], weight, labels[supervised], softcap, temperature)
    places = supervised.nonzero(as_tuple=True)
    logprobs, entropy = (each.new_zeros(labels.shape).index_put(places, each) for each in found)
    return logprobs, entropy
