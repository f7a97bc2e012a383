"""Attention by blocks of a mask (flex attention) against the mask itself.

The CPU's kernel of torch has no backward pass, and its stand-in in Python refuses gradients although it has them: that
check is taken away here. What only a compiled kernel shows, which blocks it visits, is compared in numbers, and in a
slow test by the compiled forward pass.
"""

from typing import Any, Literal

import pytest
import torch
from conftest import make_picture, make_tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention

from mm_gpt.document import Image
from mm_gpt.errors import ConfigError
from mm_gpt.model import flex
from mm_gpt.model.attention import Pattern, attend, visible
from mm_gpt.model.decoder_config import DecoderConfig
from mm_gpt.model.masks import attention_mask, block_mask, uses_blocks
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import IGNORE_INDEX, Batch, collate
from mm_gpt.training.recompute import recompute_blocks

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def packed(rows: list[list[tuple[int, ...]]], *, left: int = 0, right: int = 0) -> Batch:
    """Rows of documents: (tokens of the shared part, tokens of each branch ...), between padding."""
    lines: dict[str, list[list[int]]] = {"documents": [], "branches": [], "labels": []}
    for row in rows:
        documents, branches, labels = ([value] * left for value in (0, 0, IGNORE_INDEX))
        for number, parts in enumerate(row, start=1):
            for branch, tokens in enumerate(parts):
                documents += [number] * tokens
                branches += [branch] * tokens
                # The shared part's first half, and a branch's first token, are read only
                read = tokens // 2 if branch == 0 else 1
                labels += [IGNORE_INDEX] * read + [1] * (tokens - read)
        for name, values, value in (
            ("documents", documents, 0),
            ("branches", branches, 0),
            ("labels", labels, IGNORE_INDEX),
        ):
            lines[name].append(values + [value] * right)
    longest = max(map(len, lines["documents"]))
    padding = {"documents": 0, "branches": 0, "labels": IGNORE_INDEX}
    tensors = {
        name: torch.tensor([line + [padding[name]] * (longest - len(line)) for line in own])
        for name, own in lines.items()
    }
    nothing: dict[str, Any] = {name: torch.zeros(0, 2, dtype=torch.long) for name in ("image_grids", "image_sizes")}
    nothing |= {name: torch.zeros(0, dtype=torch.long) for name in ("image_rows", "image_tiles")}
    return Batch(
        input_ids=torch.zeros_like(tensors["documents"]),
        labels=tensors["labels"],
        position_ids=torch.zeros_like(tensors["documents"]),
        document_ids=tensors["documents"],
        branch_ids=tensors["branches"],
        pixel_values=torch.zeros(0, 3, 1, 1),
        **nothing,
    )


def runs_of_images(batch: Batch) -> Tensor:
    """Every fourth run of 20 tokens is an image, within its document and part."""
    index = torch.arange(batch.document_ids.shape[1])
    edge = torch.zeros_like(batch.document_ids, dtype=torch.bool)
    edge[:, 1:] = (batch.document_ids[:, 1:] != batch.document_ids[:, :-1]) | (
        batch.branch_ids[:, 1:] != batch.branch_ids[:, :-1]
    )
    return (index // 20 % 4 == 1) & (batch.document_ids > 0) & ~edge


PACKED = packed([[(150,), (20,), (60,)], [(40, 30, 25, 60), (30, 40, 5), (5,)]], right=12)
LONG = packed([[(100, 300, 290, 20), (70,)], [(300, 150, 150), (180,)]])  # branches of more than a block
CASES: dict[str, tuple[Batch, dict[str, Any]]] = {
    "documents": (packed([[(110,), (90,), (6,)]]), {}),
    "branches": (PACKED, {}),
    "padding on the left": (packed([[(40, 20), (30,)], [(90,)]], left=130), {}),
    "window": (PACKED, {"window": 40}),
    "window in one document": (packed([[(150,)]]), {"window": 40}),
    "prefix": (PACKED, {"prefix_lm": True}),
    "images": (PACKED, {"images": runs_of_images(PACKED)}),
    "all together": (PACKED, {"images": runs_of_images(PACKED), "prefix_lm": True, "window": 30}),
}
LONG_CASES: dict[str, tuple[Batch, dict[str, Any]]] = {
    "branches": (LONG, {}),
    "documents": (packed([[(700,), (100,)]]), {}),
    "window": (packed([[(800,), (40,)], [(500,), (300,)]]), {"window": 150}),
    "window and branches": (LONG, {"window": 130}),
    "all together": (LONG, {"images": runs_of_images(LONG), "prefix_lm": True, "window": 30}),
}


def projections(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    (B, T), generator = batch.input_ids.shape, torch.Generator().manual_seed(0)
    sizes = ((B, 4, T, 16), (B, 2, T, 16), (B, 2, T, 16))
    q, k, v = (torch.randn(size, generator=generator).requires_grad_() for size in sizes)
    return q, k, v


@pytest.mark.usefixtures("with_gradients")
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_equal_the_masked_form(name: str) -> None:
    """Equal to 1e-5, with grouped heads."""
    batch, options = CASES[name]
    mask, blocks = attention_mask(batch, **options), block_mask(batch, **options)
    if mask is None:  # a row of one document, of which a window hides some
        places = torch.arange(batch.input_ids.shape[1])
        mask = visible(Pattern(kind="local", window=options["window"]), places, places)
    assert blocks is not None
    inputs = projections(batch)
    weights = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    ends = [attend(*inputs, mask=each, scale=0.3) for each in (mask, blocks)]
    assert torch.allclose(*ends, atol=1e-5)
    masked, blocked = (torch.autograd.grad((end * weights).sum(), inputs) for end in ends)
    for expected, found in zip(masked, blocked, strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


def listed(blocks: Any, kind: str) -> Tensor:
    """(B, Q, K) the blocks that the kernel visits: in part, or as full ones."""
    numbers, order = getattr(blocks, f"{kind}num_blocks"), getattr(blocks, f"{kind}indices")
    count = torch.arange(order.shape[-1]) < numbers.unsqueeze(-1)
    return torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order.long(), count)[:, 0]


def check_blocks(batch: Batch, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    blocks, mask = block_mask(batch, **options), attention_mask(batch, **options)
    assert blocks is not None
    assert mask is not None
    T = batch.input_ids.shape[1]
    part, full = listed(blocks, "kv_"), listed(blocks, "full_kv_")
    assert not (part & full).any()
    mask = mask & (batch.document_ids > 0)[:, None, :, None]  # what padding sees is nothing to anybody
    room = torch.zeros(len(mask), -(-T // 128) * 128, -(-T // 128) * 128, dtype=torch.bool)
    room[:, :T, :T] = mask[:, 0]
    tiles = room.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))  # (B, Q, 128, K, 128)
    assert not (tiles.any(dim=4).any(dim=2) & ~(part | full)).any(), "a block that is seen is left out"
    whole = tiles.all(dim=4).all(dim=2) | ~tiles.any(dim=4).any(dim=2)  # or of padding alone
    assert not (full & ~whole).any(), "a block is taken for full that is not"
    return part, full, tiles.any(dim=4).any(dim=2)


@pytest.mark.parametrize("name", LONG_CASES)
def test_every_block_that_is_seen_is_visited(name: str) -> None:
    check_blocks(*LONG_CASES[name])


@given(
    st.lists(
        st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4),
        min_size=1,
        max_size=2,
    ),
    st.sampled_from([None, 10, 140]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 140),
)
def test_blocks_of_any_row(rows: Any, window: int | None, prefix: bool, images: bool, left: int) -> None:
    batch = packed(rows, left=left)
    options = {"window": window, "prefix_lm": prefix, "images": runs_of_images(batch) if images else None}
    if attention_mask(batch, **options) is not None:
        check_blocks(batch, options)


def test_what_is_not_seen_is_not_computed() -> None:
    """Documents of a block's length: one block each, not T² / 2; long ones are mostly full blocks."""
    part, full, seen = check_blocks(packed([[(128,)] * 8]), {})
    assert part.sum() == 8
    assert not full.any()
    part, full, _ = check_blocks(packed([[(1024,), (128,)]]), {})
    assert (int(part.sum()), int(full.sum())) == (9, 28)
    part, full, seen = check_blocks(packed([[(128, 256, 256)]]), {})
    assert torch.equal(part | full, seen)
    assert int(seen.sum()) == 11  # of 15: the two branches do not see each other
    part, full, seen = check_blocks(packed([[(2048,), (1,)]]), {"window": 128})
    assert int((part | full).sum()) <= 2 * 17


def test_a_row_of_one_document_needs_no_mask() -> None:
    assert block_mask(packed([[(100,)], [(90,)]])) is None
    assert block_mask(packed([[(100,)], [(90,)]]), window=20) is not None


def test_what_blocks_do_not_serve() -> None:
    blocks = block_mask(PACKED)
    for options in ({"pattern": Pattern(kind="local", window=4)}, {"dropout": 0.5}, {"softcap": 5.0}):
        with pytest.raises(ConfigError, match="a mask of blocks goes with dense attention, without dropout"):
            attend(*projections(PACKED), mask=blocks, **options)  # type: ignore[arg-type]
    sizes = {"vocab_size": 9, "width": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_size": 16}
    sizes |= {"mlp_width": 8, "max_length": 64}
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert uses_blocks(DecoderConfig(**sizes), cuda)  # type: ignore[arg-type]
    assert uses_blocks(DecoderConfig(**sizes, attention=("dense", "local"), window=8), cuda)  # type: ignore[arg-type]
    assert not uses_blocks(DecoderConfig(**sizes), cpu)  # type: ignore[arg-type]
    others: list[dict[str, Any]] = [
        {"dropout": 0.1},
        {"attention_softcap": 30.0},
        {"positions": "relative"},
        {"head_size": 8},
        {"attention": ("strided",), "stride": 4},
        {"causal": False},
    ]
    for change in others:
        assert not uses_blocks(DecoderConfig(**(sizes | change)), cuda)


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Models are trained by blocks on the CPU as well; the masks that they were given."""
    given: list[Any] = []
    plain = flex.flex_attend

    def watched(q: Tensor, k: Tensor, v: Tensor, blocks: Any, **options: Any) -> Tensor:
        given.append(blocks)
        return plain(q, k, v, blocks, **options)

    monkeypatch.setattr("mm_gpt.model.attention.flex_attend", watched)
    monkeypatch.setattr("mm_gpt.model.mmgpt.uses_blocks", lambda config, device: True)
    return given


@pytest.mark.usefixtures("with_gradients")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_s_loss_and_gradients(by_blocks: list[Any], recompute: Literal["none", "selective", "full"]) -> None:
    """Packed documents with images and branches, as a training step has them; also where blocks are computed again."""
    model, processor = make_tiny()
    if recompute != "none":
        recompute_blocks(model.decoder, recompute)
    photo = Image(make_picture())
    rows = [
        [processor(processor.captions(photo, "Describe it.", ["A red circle.", "A blue square."]))] * 2,
        [processor(processor.captions(photo, "What?", [f"A circle {n}." for n in range(3)]))],
    ]
    pixels = torch.cat([processor.pixels([example]) for row in rows for example in row])
    batch = collate(rows, pixels)

    def gradients(model: MMGPT) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss, count = model.loss(batch)
        (loss / count).backward()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    blocked, found = gradients(model.train())
    assert len(by_blocks) == (3 if recompute == "none" else 6)  # a layer each
    by_blocks.clear()
    masked, expected = gradients(model.eval())  # evaluation has its many shapes, and masks
    assert not by_blocks
    assert torch.allclose(blocked, masked, rtol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two kernels in C++
def test_the_compiled_kernel_visits_the_right_blocks() -> None:
    """The CPU's kernel, forward: it skips what is empty and trusts what is full."""
    compiled = flex._kernel(True)
    for name in ("branches", "window"):
        batch, options = LONG_CASES[name]
        q, k, v = (x.detach() for x in projections(batch))
        blocks = block_mask(batch, **options)
        expected = flex._kernel(False)(q, k, v, block_mask=blocks, enable_gqa=True)
        with torch.no_grad():
            found = compiled(q, k, v, block_mask=blocks, enable_gqa=True)
        assert torch.allclose(expected, found, atol=1e-5), name
