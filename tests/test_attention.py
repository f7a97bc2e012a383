"""Each pattern's blocks against its definition: dense attention under the pattern's mask, in float64.

Float64 leaves rounding only, so 1e-10 stands for equal. A block that misses a key, sees one twice or leaks the future
is wrong by more than 1e-3 on random numbers.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mm_gpt.errors import ConfigError
from mm_gpt.model import attention
from mm_gpt.model.attention import Kind, Pattern, attend, visible

ROOT = Path(__file__).parent.parent
KINDS = [
    "dense",
    "local",
    "strided",
    "strided_local",
    "strided_column",
    "strided_heads",
    "fixed",
    "fixed_block",
    "fixed_summary",
    "fixed_heads",
]


def make_pattern(kind: Kind, size: int, summary: int = 1) -> Pattern:
    if kind == "dense":
        return Pattern()
    if kind == "local":
        return Pattern(kind=kind, window=size)
    return Pattern(kind=kind, stride=size, summary=min(summary, size) if kind.startswith("fixed") else None)


def make_qkv(
    *, batch: int = 2, heads: int = 4, kv_heads: int = 2, queries: int = 24, keys: int | None = None, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, queries), (kv_heads, keys or queries), (kv_heads, keys or queries)]
    return [
        (2 * torch.randn(batch, *shape, 8, generator=generator, dtype=torch.float64)).requires_grad_()
        for shape in shapes
    ]


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    mask: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scores of all pairs, the pattern's own loops over pairs, zeros where nothing is left."""
    (H, T, C), (K, S) = q.shape[1:], k.shape[1:3]
    k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
    index = torch.arange(S)
    if positions is None:
        positions = (index[S - T :].unsqueeze(0), index.unsqueeze(0))
    allowed = torch.stack([by_hand(pattern, h < H // 2, *positions) for h in range(H)], dim=1)  # (B or 1, H, T, S)
    allowed = allowed & (index <= index[S - T :, None] if mask is None else mask)
    scores = q @ k.transpose(-1, -2) * (C**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    exps = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * allowed
    return exps / exps.sum(-1, keepdim=True).clamp(min=1e-30) @ v


def by_hand(pattern: Pattern, first_half: bool, queries: Tensor, keys: Tensor) -> Tensor:
    """The papers' sets, pair by pair in plain Python: `visible` is not trusted here."""

    def sees(i: int, j: int) -> bool:
        l, c = pattern.stride or 1, pattern.summary or 0
        band, column = i - j < l, (i - j) % l == 0
        block, summary = i // l == j // l, j % l in range(l - c, l) or i == j
        return (
            j <= i
            and {
                "dense": True,
                "local": i - j < (pattern.window or 0),
                "strided": band or column,
                "strided_local": band,
                "strided_column": column,
                "strided_heads": band if first_half else column,
                "fixed": block or summary,
                "fixed_block": block,
                "fixed_summary": summary,
                "fixed_heads": block if first_half else summary,
            }[pattern.kind]
        )

    rows = zip(queries.tolist(), keys.tolist(), strict=True)
    return torch.tensor([[[sees(i, j) for j in js] for i in is_] for is_, js in rows])


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    gradients = torch.autograd.grad((actual * weight).sum(), inputs)
    for ours, theirs in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def packed(lengths: list[int], padding: int) -> tuple[Tensor, Tensor]:
    """The causal mask (1, 1, T, T) of documents side by side with padding after them, and positions (1, T)."""
    documents = torch.tensor([n for n, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding)
    positions = torch.cat([torch.arange(n) for n in [*lengths, padding]]).unsqueeze(0)
    same = documents.unsqueeze(1) == documents
    return (same & torch.ones_like(same).tril())[None, None], positions


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    length=st.integers(1, 40),
    size=st.integers(1, 12),
    summary=st.integers(1, 3),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]),
)
def test_blocks_equal_the_definition(kind: Kind, length: int, size: int, summary: int, heads: tuple[int, int]) -> None:
    q, k, v = make_qkv(batch=1, heads=heads[0], kv_heads=heads[1], queries=length)
    pattern = make_pattern(kind, size, summary)
    assert_same(attend(q, k, v, pattern=pattern), oracle(q, k, v, pattern), [q, k, v])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    padding=st.integers(0, 6),
    size=st.integers(1, 9),
    with_positions=st.booleans(),
)
def test_packed_documents(kind: Kind, lengths: list[int], padding: int, size: int, with_positions: bool) -> None:
    """No key of another document, in any block; with positions a document looks as it does alone."""
    mask, places = packed(lengths, padding)
    q, k, v = make_qkv(batch=1, queries=mask.shape[-1])
    pattern = make_pattern(kind, size)
    positions = (places, places) if with_positions else None
    actual = attend(q, k, v, pattern=pattern, mask=mask, positions=positions)
    assert_same(actual, oracle(q, k, v, pattern, mask=mask, positions=positions), [q, k, v])
    if with_positions or not kind.startswith("fixed"):
        start = sum(lengths[:-1])
        document = slice(start, start + lengths[-1])
        alone = attend(q[:, :, document], k[:, :, document], v[:, :, document], pattern=pattern)
        torch.testing.assert_close(actual[:, :, document], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (1, 23), (3, 23), (9, 23), (22, 23)])
def test_queries_after_a_cache(kind: Kind, queries: int, keys: int) -> None:
    """New tokens after cached ones: the same as the last rows of the whole text at once."""
    q, k, v = make_qkv(queries=keys)
    pattern = make_pattern(kind, 4, 2)
    expected = attend(q, k, v, pattern=pattern)[:, :, keys - queries :]
    torch.testing.assert_close(attend(q[:, :, keys - queries :], k, v, pattern=pattern), expected, rtol=0, atol=1e-10)
    index = torch.arange(keys).expand(2, -1)
    allowed = torch.ones(keys, keys, dtype=torch.bool).tril()[keys - queries :].expand(2, 1, -1, -1)
    positions = (index[:, keys - queries :], index)
    actual = attend(q[:, :, keys - queries :], k, v, pattern=pattern, mask=allowed, positions=positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_softcap_and_scale(kind: Kind, masked: bool) -> None:
    """Gemma 2 caps scores before the mask: a cap after it would let masked keys back in with weight e^-cap."""
    q, k, v = make_qkv(queries=21)
    mask = packed([9, 8], 4)[0] if masked else None
    for pattern in (make_pattern(kind, 5), make_pattern(kind, 30)):
        actual = attend(q, k, v, pattern=pattern, mask=mask, scale=0.7, softcap=1.5)
        assert_same(actual, oracle(q, k, v, pattern, mask=mask, scale=0.7, softcap=1.5), [q, k, v])
        actual = attend(q[:, :, -1:], k, v, pattern=pattern, scale=0.7, softcap=1.5)
        torch.testing.assert_close(
            actual, oracle(q[:, :, -1:], k, v, pattern, scale=0.7, softcap=1.5), atol=1e-10, rtol=0
        )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_a_query_left_with_nothing_gets_zeros(kind: Kind, softcap: float | None) -> None:
    """Mask and pattern can exclude each other, on padding above all; 0 / 0 there would poison every gradient."""
    q, k, v = make_qkv(queries=20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[7:] = False
    mask[7:, 0] = True  # out of the band; in another block; in another column, for most
    pattern = make_pattern(kind, 4)
    actual = attend(q, k, v, pattern=pattern, mask=mask[None, None], softcap=softcap)
    assert (actual[:, :2, 9] == 0).all()
    assert_same(actual, oracle(q, k, v, pattern, mask=mask, softcap=softcap), [q, k, v])
    last = attend(q[:, :, -2:], k, v, pattern=pattern, mask=mask[None, None, -2:], softcap=softcap)
    torch.testing.assert_close(last, actual[:, :, -2:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_with_masks_of_their_own(kind: Kind) -> None:
    q, k, v = make_qkv(queries=19)
    mask = torch.cat([packed([10, 9], 0)[0], packed([4, 12], 3)[0]])
    pattern = make_pattern(kind, 5)
    assert_same(attend(q, k, v, pattern=pattern, mask=mask), oracle(q, k, v, pattern, mask=mask), [q, k, v])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
@pytest.mark.parametrize("size", [5, 30])
def test_patterns_look_back_under_any_mask(kind: Kind, size: int) -> None:
    """A mask that allows the future (a prefix, say) gives a pattern nothing ahead, in short rows as in long ones."""
    q, k, v = make_qkv(queries=19)
    pattern = make_pattern(kind, size)
    everything = torch.ones(1, 1, 19, 19, dtype=torch.bool)
    torch.testing.assert_close(
        attend(q, k, v, pattern=pattern, mask=everything), attend(q, k, v, pattern=pattern), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("kind", ["fixed", "fixed_block", "fixed_summary", "fixed_heads"])
def test_fixed_blocks_begin_where_positions_say(kind: Kind) -> None:
    """A row that starts in the middle of a block has a border inside, though it is shorter than a block."""
    q, k, v = make_qkv(batch=2, queries=6)
    places = torch.arange(6) + torch.tensor([[5], [13]])
    pattern = make_pattern(kind, 8, 2)
    actual = attend(q, k, v, pattern=pattern, positions=(places, places))
    assert_same(actual, oracle(q, k, v, pattern, positions=(places, places)), [q, k, v])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: Kind) -> None:
    """Scores, up to 16, are rounded to 2^-5 where a path does without SDPA, so weights are right within 3 %."""
    q, k, v = (x.detach().bfloat16() for x in make_qkv(queries=33))
    pattern = make_pattern(kind, 6)
    actual = attend(q, k, v, pattern=pattern)
    assert actual.dtype == torch.bfloat16
    expected = oracle(q.double(), k.double(), v.double(), pattern)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-5, atol=2**-4)


def test_windows_longer_than_a_block() -> None:
    """Blocks of 256 queries and a band that begins inside a block: 300 reaches two blocks back, 65 one."""
    q, k, v = make_qkv(batch=1, queries=700)
    for window in (64, 65, 256, 257, 300, 600, 699):
        allowed = visible(Pattern(kind="local", window=window), torch.arange(700), torch.arange(700))
        expected = attend(q, k, v, mask=allowed[None, None])
        actual = attend(q, k, v, pattern=Pattern(kind="local", window=window))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_a_band_as_long_as_the_text_is_dense() -> None:
    q, k, v = make_qkv(queries=17)
    dense = attend(q, k, v)
    for kind in ("local", "strided", "strided_local", "fixed", "fixed_block"):
        assert torch.equal(attend(q, k, v, pattern=make_pattern(kind, 17)), dense)


def test_the_encoder_sees_both_ways() -> None:
    q, k, v = make_qkv(queries=9)
    everything = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    expected = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).softmax(-1) @ v.repeat_interleave(2, 1)
    assert_same(attend(q, k, v, causal=False), expected, [q, k, v])
    torch.testing.assert_close(attend(q, k, v, mask=everything), expected, rtol=0, atol=1e-10)
    with pytest.raises(ConfigError, match="looks back only"):
        attend(q, k, v, pattern=Pattern(kind="local", window=3), causal=False)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_keeps_the_mean(kind: Kind) -> None:
    """Weights are dropped and the rest scaled up, in every path."""
    q, k, v = (x.detach() for x in make_qkv(batch=1, queries=12))
    torch.manual_seed(0)
    pattern = make_pattern(kind, 4)
    copies = [x.expand(2000, -1, -1, -1) for x in (q, k, v)]
    dropped = attend(*copies, pattern=pattern, dropout=0.3)
    assert (dropped[0] - dropped[1]).abs().max() > 1e-3
    # Standard deviation of a copy is below 0.66 |v| < 4; the mean of 2000 copies is within 5 of its own deviations.
    torch.testing.assert_close(dropped.mean(0), attend(q, k, v, pattern=pattern)[0], rtol=0, atol=5 * 4 / 2000**0.5)


def count(pattern: Pattern, n: int = 1024) -> int:
    return int(visible(pattern, torch.arange(n), torch.arange(n)).sum())


def test_golden_numbers_of_connections() -> None:
    """n = 1024, l = 32, counted from the papers' sets on paper."""
    assert count(Pattern()) == 1024 * 1025 // 2 == 524_800
    assert count(Pattern(kind="local", window=32)) == 32_272
    assert count(Pattern(kind="local", window=33)) == 33_264  # the band as the paper writes it
    assert count(Pattern(kind="strided_local", stride=32)) == 32_272
    assert count(Pattern(kind="strided_column", stride=32)) == 16_896
    assert count(Pattern(kind="strided", stride=32)) == 32_272 + 16_896 - 1024  # the query is in both sets
    assert count(Pattern(kind="fixed_block", stride=32)) == 16_896
    own = 1024 - 32  # a query that is no summary sees itself besides the 15,904 of the set
    assert count(Pattern(kind="fixed_summary", stride=32, summary=1)) == 15_904 + own
    assert count(Pattern(kind="fixed", stride=32, summary=1)) == 16_896 + 15_904 - 32
    assert count(Pattern(kind="strided_heads", stride=32)) == 32_272 + 16_896


@pytest.mark.parametrize("kind", ["strided_heads", "fixed_heads"])
@pytest.mark.parametrize("n", [64, 61])
def test_two_layers_connect_every_pair(kind: Kind, n: int) -> None:
    """Any earlier token reaches any later one within two steps, one by each set."""
    first, second = visible(make_pattern(kind, 8), torch.arange(n), torch.arange(n)).double()
    # strided: along the column to within l, then the band, either way. fixed: the block's last token, then later ones.
    reach = second @ first > 0
    assert torch.equal(reach, torch.ones(n, n, dtype=torch.bool).tril())


class LargestTensor(TorchFunctionMode):
    """The largest result of any torch function called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_no_path_makes_all_pairs(kind: Kind) -> None:
    """The promise of the blocks; a masked dense product would pass all tests above."""
    q, k, v = (torch.randn(1, 2, 2048, 4) for _ in range(3))
    with LargestTensor() as largest:
        attend(q, k, v, pattern=make_pattern(kind, 32))
    assert 2 * 2048 * 4 <= largest.numel <= 2048 * 2048 // 8


def test_a_new_token_reads_its_window_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a long cache a local layer's step must not grow: SDPA gets `window` keys and no mask."""
    seen = {}

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.update(keys=k.shape[2], mask=options["attn_mask"])
        return torch.zeros_like(q)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    q, k, v = make_qkv(queries=1, keys=500)
    attend(q, k, v, pattern=Pattern(kind="local", window=16))
    assert seen == {"keys": 16, "mask": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "locale", "window": 3}, "did you mean 'local'"),
        ({"kind": "local"}, "'local' needs window >= 1, not None"),
        ({"kind": "local", "window": 0}, "needs window >= 1, not 0"),
        ({"kind": "strided"}, "needs stride"),
        ({"kind": "fixed", "stride": 8}, "needs summary"),
        ({"kind": "fixed", "stride": 8, "summary": 9}, "summary 9 is more than stride 8"),
        ({"kind": "dense", "window": 3}, "'dense' takes no window"),
        ({"kind": "strided", "stride": 8, "summary": 2}, "'strided' takes no summary"),
    ],
)
def test_impossible_patterns(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pattern(**arguments)


def test_halves_need_an_even_number_of_heads() -> None:
    q, k, v = make_qkv(heads=3, kv_heads=1)
    with pytest.raises(ConfigError, match="3 heads"):
        attend(q, k, v, pattern=Pattern(kind="strided_heads", stride=4))


def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "examples" / "benchmarks" / "sparse_attention.py"
    if not script.is_file():
        pytest.skip("the examples are not installed")
    out, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    command = [script, "--lengths", "64", "128", "--repeats", "1", "--backward", "--out", out, "--plot", plot]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    runpy.run_path(str(script), run_name="__main__")
    assert "exponents" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert {row["pattern"] for row in saved["rows"]} == {"dense", "product", "local", "strided", "fixed"}
    assert 1.8 < saved["exponents"]["forward"]["product"]["peak_bytes"] < 2.2  # memory is exact at any length
    assert plot.stat().st_size > 1000
