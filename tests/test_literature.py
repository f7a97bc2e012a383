"""The experiments on what the literature around GPT-4 names: their parts, and that each command runs."""

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import on_ranks
from torch import Tensor, nn

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.training.distributed import process_group, sum_gradients

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/literature"))
pytest.importorskip("asynchronous", reason="the examples are not installed")
import asynchronous
import gimp_manual
import objectives
import small_runs
import translation

ROWS = [torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(12)]


def run(module: Any, out: Path, monkeypatch: pytest.MonkeyPatch, seeds: int = 2) -> dict[str, Any]:
    plot = out.with_suffix(".png")
    page = out.with_suffix(".md")
    page.write_text(f"before\n<!-- {out.stem} -->\nold\n<!-- end of {out.stem} -->\nbehind\n")
    words = [module.__name__, "--quick", "--seeds", str(seeds), "-o", str(out), "--plot", str(plot)]
    words += ["--page", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    module.main()
    assert 4_000 < plot.stat().st_size < 40_000
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "behind"
    assert "old" not in lines
    assert sum(line.startswith("|") for line in lines) >= 4
    return json.loads(out.read_text())


# ---- Asynchronous updates ----


def regression() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.05)


def squared_error(model: nn.Module, rows: Tensor) -> tuple[Tensor, int]:
    return (model(rows[:, :5]) - rows[:, 5:]).square().sum(), len(rows)


def weights_of_a_rank(rank: int) -> list[list[float]]:
    """Synchronous training in a process of its own: half of each step's rows, gradients summed over ranks."""
    with process_group(torch.device("cpu")):
        model, optimizer = regression()
        for first, second in zip(ROWS[::2], ROWS[1::2], strict=True):
            optimizer.zero_grad()
            loss, _ = squared_error(model, (first, second)[rank])
            (loss / (len(first) + len(second))).backward()
            sum_gradients(list(model.parameters()))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return [p.detach().flatten().tolist() for p in model.parameters()]


def simulated(versions: Sequence[int]) -> list[list[float]]:
    model, optimizer = regression()
    steps = list(zip(ROWS[::2], ROWS[1::2], strict=True))
    asynchronous.train_stale(
        list(model.parameters()), optimizer, steps, lambda rows: squared_error(model, rows), versions, clip=1.0
    )
    return [p.detach().flatten().tolist() for p in model.parameters()]


def test_without_delay_the_simulation_is_synchronous_training_by_two_processes() -> None:
    """τ = 0 equals two real ranks, bit for bit."""
    ranks = on_ranks(weights_of_a_rank)
    assert ranks[0] == ranks[1] == simulated(asynchronous.constant_versions(0, 6))
    assert simulated(asynchronous.constant_versions(2, 6)) != ranks[0]


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_delay_is_that_of_the_definition(delay: int) -> None:
    """w(t + 1) = w(t) - lr · a · w(t - τ) on a parabola of curvature a, written out."""
    weight, rate, curvature, updates = nn.Parameter(torch.tensor([1.0], dtype=torch.float64)), 0.1, 3.0, 20
    expected = [1.0]
    for t in range(updates):
        expected.append(expected[t] - rate * curvature * expected[max(0, t - delay)])
    losses = asynchronous.train_stale(
        [weight],
        torch.optim.SGD([weight], lr=rate),
        [[curvature]] * updates,
        lambda a: ((a / 2 * weight.square()).sum(), 1),
        asynchronous.constant_versions(delay, updates),
    )
    assert weight.item() == pytest.approx(expected[-1], rel=1e-12)
    late = [expected[max(0, t - delay)] for t in range(updates)]
    assert losses == pytest.approx([curvature / 2 * w * w for w in late], rel=1e-12)


@pytest.mark.parametrize("delay", [0, 1, 4, 9])
def test_a_parabola_is_stable_up_to_the_known_rate(delay: int) -> None:
    """2 sin(π / (2 (2τ + 1))): just below it settles, just above it does not."""
    assert asynchronous.stability(0) == 2
    assert asynchronous.stability(1) == pytest.approx(1)

    def left_after(rate: float) -> float:
        weight, updates = nn.Parameter(torch.ones(1, dtype=torch.float64)), 2000
        asynchronous.train_stale(
            [weight],
            torch.optim.SGD([weight], lr=rate),
            [[None]] * updates,
            lambda _: ((weight.square() / 2).sum(), 1),
            asynchronous.constant_versions(delay, updates),
        )
        return abs(weight.item())

    assert left_after(0.97 * asynchronous.stability(delay)) < 0.2
    assert not left_after(1.03 * asynchronous.stability(delay)) < 5


def test_uneven_workers_are_as_late_on_average() -> None:
    workers, updates = 8, 20_000
    versions = asynchronous.uneven_versions(workers, updates, random.Random(0))
    delays = [update - version for update, version in enumerate(versions)]
    assert min(delays) >= 0
    assert max(delays) > 3 * workers
    assert statistics.mean(delays) == pytest.approx(workers - 1, rel=0.02)
    assert asynchronous.uneven_versions(1, 5, random.Random(0)) == [0, 1, 2, 3, 4]


def test_weights_of_the_future_are_refused() -> None:
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="update 0 cannot"):
        asynchronous.train_stale([weight], torch.optim.SGD([weight]), [[None]], lambda _: (weight.sum(), 1), [1])


def test_the_experiment_on_delays_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(asynchronous, tmp_path / "asynchronous.json", monkeypatch, seeds=1)
    ways = result["ways"]["adamw"]
    assert set(ways) == {"delayed", "uneven", "synchronous"}
    assert set(ways["delayed"]) == {"0", "3"}
    assert ways["delayed"]["0"]["cost"]["mean"] == 0
    assert all(own["loss"]["mean"] > 0 for way in ways.values() for own in way.values())


# ---- Objectives ----


@pytest.fixture(scope="module")
def made_up() -> Any:
    args = small_runs.options(None, "objectives", 1).parse_args([])
    return objectives.World(args, objectives.QUICK)


def test_counted_flops_are_those_of_the_formula(made_up: Any) -> None:
    """6 FLOPs a weight and token, 12·T·D a token for attention in each layer, and the head on what is supervised."""
    sizes, model = objectives.QUICK, made_up.fresh(objectives.NEXT, 0)
    tokens = sizes.rows * sizes.length
    body = sum(p.numel() for name, p in model.blocks.named_parameters() if p.dim() == 2)
    attention = 12 * sizes.length * sizes.width * sizes.layers * tokens
    head = 6 * model.head_weight.numel() * tokens
    assert made_up.flops[objectives.NEXT] == 6 * body * tokens + attention + head
    masked = made_up.flops[objectives.MASKED] - (6 * body * tokens + attention)
    assert 0.05 < masked / head < 0.3  # of 15 % of the tokens


def test_objectives_spend_the_same(made_up: Any) -> None:
    spent = [made_up.steps(name) * made_up.flops[name] for name in objectives.OBJECTIVES]
    assert max(spent) - min(spent) <= max(made_up.flops.values())
    rows = made_up.rows["train"][:3]
    draw = torch.Generator().manual_seed(0)
    counts = [
        objectives.objective_loss(name, made_up.fresh(name, 0), rows, made_up.mask_id, draw)[1]
        for name in objectives.OBJECTIVES
    ]
    assert counts[0] == 3 * objectives.QUICK.length
    assert 0 < counts[1] < counts[0] / 3
    assert counts[2] == 3


def test_a_copy_for_generation_sees_only_what_came_before(made_up: Any) -> None:
    """The adapted twin of a model that saw both sides: a later token changes no earlier state."""
    model = made_up.fresh(objectives.MASKED, 0)
    before = [p.clone() for p in model.parameters()]
    twin = made_up.adapt(model, 1e-3, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    ids = made_up.rows["test"][:1, :12]
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 50
    positions = torch.arange(12)[None]
    with torch.no_grad():
        for seen, equal in ((twin, True), (model, False)):
            a, b = (seen(seen.embed(x), positions)[0, :-1] for x in (ids, other))
            assert torch.allclose(a, b, atol=1e-5) is equal


def test_gaps_have_one_right_word_and_a_causal_model_takes_the_likeliest_text(made_up: Any) -> None:
    """The whole text, what comes after the gap included: scores of the gap alone would leave the right side unread."""
    model, right = made_up.fresh(objectives.NEXT, 1), 0
    positions = torch.arange(objectives.QUICK.length)[None]
    for row, place, choices in made_up.items:
        assert choices[0] == row[place]
        assert len(set(choices)) == objectives.CHOICES
        scores = []
        for choice in choices:
            filled = torch.cat([row[:place], torch.tensor([choice]), row[place + 1 :]])
            with torch.no_grad():
                logprobs = model.logits(model(model.embed(filled[None]), positions))[0].log_softmax(dim=-1)
            scores.append(sum(float(logprobs[at, filled[at + 1]]) for at in range(len(filled) - 1)))
        right += max(scores) == scores[0]
    assert made_up.cloze_accuracy(objectives.NEXT, model) == right / len(made_up.items)


def test_the_experiment_on_objectives_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(objectives, tmp_path / "objectives.json", monkeypatch, seeds=1)
    ways = result["ways"]
    assert set(ways) == {*objectives.OBJECTIVES, objectives.NONE}
    assert "cloze" not in ways[objectives.SEGMENTS]
    assert all(0 < way["generation"]["mean"] < 20 and 0 <= way["topics"]["mean"] <= 1 for way in ways.values())
    assert ways[objectives.MASKED]["curves"][0][-1][0] == objectives.QUICK.adapt_steps


# ---- Translations ----


@pytest.fixture(scope="module")
def two_languages() -> Any:
    args = small_runs.options(None, "translation", 1).parse_args([])
    return translation.World(args, translation.QUICK)


def test_the_nearest_is_found_both_ways() -> None:
    states = torch.eye(4)
    assert translation.retrieval(states, 3 * states) == 1
    assert translation.retrieval(states, states.roll(1, dims=0)) == 0
    assert translation.retrieval(states, states[[0, 1, 3, 2]]) == 0.5


def test_a_rare_language_is_rare_and_no_pair_is_of_another_page(two_languages: Any) -> None:
    """Translations are of the pages whose German is known anyway, and test pairs of none of them."""
    assert two_languages.counts["de"] < 0.7 * two_languages.counts["en"]
    known = {tuple(row) for pair in two_languages.pairs for row in pair}
    assert not known & {tuple(row) for pair in two_languages.test_pairs for row in pair}
    ids, positions, languages, present = two_languages.translated(random.Random(0), True)
    row, sides = ids[0][present[0]].tolist(), languages[0][present[0]].tolist()
    cut = row.index(two_languages.separator)
    assert positions[0, cut + 1] == 0
    assert sides[: cut + 1] == [sides[0]] * (cut + 1)
    pair = (row[:cut], row[cut + 1 : -1])
    assert (pair if sides[0] == 0 else pair[::-1]) in two_languages.pairs
    wrong, *_ = two_languages.translated(random.Random(0), False)
    assert wrong.shape[1] <= translation.QUICK.length
    assert wrong[0].tolist() != ids[0].tolist()


def test_without_a_language_embedding_the_encoder_knows_no_language(two_languages: Any) -> None:
    ids = two_languages.rows["test", "en"][:2]
    for embedded in (False, True):
        model = two_languages.fresh(translation.Way(language_embedding=embedded), 0)
        one, other = (model(*two_languages.monolingual(ids, language)) for language in ("en", "de"))
        assert torch.equal(one, other) is not embedded


def test_the_experiment_on_translations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(translation, tmp_path / "translation.json", monkeypatch, seeds=1)
    assert set(result["ways"]) == {*translation.WAYS, "random weights"}
    shares = result["shares"]
    assert shares["0.5"]["de"] > shares["0.7"]["de"] > shares["1.0"]["de"]
    assert result["effects"]["translations beside plain"]["loss de"]["ci95"] is None
    seen = result["tokens seen"]
    assert seen["translations"]["de"] > 0


# ---- What the experiments share ----


def test_a_stopped_experiment_goes_on_and_not_with_other_settings(tmp_path: Path) -> None:
    first = small_runs.Finished(tmp_path / "x.json", {"steps": 3})
    assert first.get("a", lambda: [1, math.inf]) == [1, math.inf]
    again = small_runs.Finished(tmp_path / "x.json", {"steps": 3})
    assert again.get("a", lambda: pytest.fail("made again")) == [1, math.inf]
    with pytest.raises(MMGPTError, match="other settings"):
        small_runs.Finished(tmp_path / "x.json", {"steps": 4})
    found = ["a: +1.000 [+0.500, +1.500]", f"b: loss: +0.100 [-1.000, +1.200]{small_runs.NO_EFFECT}"]
    page = tmp_path / "page.md"
    page.write_text("<!-- x -->\n<!-- end of x -->\n")
    args = argparse.Namespace(output=tmp_path / "x.json", page=page, plot=tmp_path / "x.png")
    small_runs.write({"found": found}, "| t |", args, again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.md", "x.json"]
    assert "- a: +1.000 [+0.500, +1.500]\n" in page.read_text()
    assert "Of all other pairs the interval of the difference holds 0.\n" in page.read_text()
    assert "](x.png)\n<!-- end of x -->" in page.read_text()
    page.write_text("nothing")
    with pytest.raises(MMGPTError, match="lacks"):
        small_runs.fill_page(page, "x", "")


def test_a_rate_is_found_by_walking_downhill() -> None:
    tried: list[float] = []

    def loss(rate: float) -> float:
        tried.append(rate)
        return math.nan if rate > 5 else abs(math.log2(rate / 0.25))

    assert small_runs.best_rate(loss, 8.0) == 0.25
    assert len(tried) == len(set(tried)) == 8  # none twice
    assert small_runs.best_rate(lambda rate: math.inf, 1.0) == 1.0


def test_more_steps_can_be_asked_for() -> None:
    words = small_runs.options(None, "objectives", 3).parse_args
    assert small_runs.chosen(words([]), objectives.FULL, objectives.QUICK) == objectives.FULL
    quick = small_runs.chosen(words(["--quick", "--steps", "9"]), objectives.FULL, objectives.QUICK)
    assert (quick.steps, quick.width) == (9, objectives.QUICK.width)
    with pytest.raises(ConfigError, match="--steps"):
        small_runs.chosen(words(["--steps", "0"]), objectives.FULL, objectives.QUICK)


def test_intervals_are_students() -> None:
    """Golden: of 1, 2, 3: mean 2, standard deviation 1, half-width 4.303 / √3."""
    found = small_runs.interval([1, 2, 3])
    assert found["ci95"] == [pytest.approx(2 - 4.303 / 3**0.5, abs=1e-4), pytest.approx(2 + 4.303 / 3**0.5, abs=1e-4)]
    assert "no effect shown" in small_runs.said(found | {"mean": 0, "ci95": [-1, 1]}, "x")
    assert "no effect" not in small_runs.said(small_runs.paired([1.1, 2.1, 3.2], [0, 1, 2]), "x")
    assert small_runs.interval([1.0, math.inf])["mean"] is None


def test_pages_stay_in_their_part_and_batches_show_every_row() -> None:
    pages = gimp_manual.generated_manual(("en", "de"), pages=120)
    parts = gimp_manual.split(pages)
    assert sum(map(len, parts.values())) == 120
    assert len(parts["train"]) > 60
    assert min(map(len, parts.values())) >= 5
    again = gimp_manual.split(pages[::-1])
    assert {p.name for p in again["test"]} == {p.name for p in parts["test"]}
    rows = torch.arange(10).unsqueeze(1)
    stream = small_runs.batches(rows, 4, seed=0)
    seen = torch.cat([next(stream) for _ in range(5)]).flatten()
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))


def test_a_page_of_another_length_has_no_pairs() -> None:
    page = gimp_manual.Page("p", None, {"en": ("a", "b", "GIMP"), "de": ("x", "y", "GIMP"), "fr": ("z",)})
    assert page.pairs("en", "de") == [("a", "x"), ("b", "y")]
    assert page.pairs("en", "fr") == []
