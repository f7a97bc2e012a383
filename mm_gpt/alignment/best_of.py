"""The best of n answers (best-of-n, rejection sampling): n samples of each prompt, judged, and the best one kept.

What is kept is data for supervised tuning, or with the worst one a preference pair. Samples of one prompt share the
reading of it. Every prompt's samples and rewards are on the disk before the next ones are drawn: a run that was stopped
or killed continues, and one set of samples serves both kinds of data.

How much the reward grows with n, and how far from the model itself that leads (log n - (n - 1) / n nats, exactly), is
the line that policies trained on the same reward are held against (2009.01325, 2210.10760).
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

from mm_gpt.alignment.completions import prompt_document
from mm_gpt.alignment.losses import best_of_n_kl
from mm_gpt.alignment.rewards import Rewards
from mm_gpt.config import to_dict
from mm_gpt.datasets.comparisons import Comparison, Comparisons, Completion, write_comparisons
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.inference.engine import Engine, Job, Run
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.inference.sampling import row_seed
from mm_gpt.system.locks import open_locked
from mm_gpt.system.stopping import Stopper
from mm_gpt.system.writing import naming

_LAYOUT = ("label", "labels", "margin", "ranks", "scores", "ref_logps", "ref_chosen_logps", "ref_rejected_logps")
"""Columns that would be read as something about the answers."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The samples of one prompt."""

    place: int
    """Of the prompt, among all."""
    key: str
    answers: tuple[str, ...] = ()
    finished: tuple[bool, ...] = ()
    """False: cut off. Such an answer is never kept: it would be taught to end there."""
    totals: tuple[float | None, ...] = ()
    """None: no reward applies."""
    rewards: dict[str, tuple[float | None, ...]] = dataclasses.field(default_factory=dict)
    """By the reward's name, not weighted."""
    error: str = ""
    """Why there are none."""

    @property
    def order(self) -> list[int]:
        """The finished answers that have a reward, from the best to the worst; of equal ones, the first one first."""
        known = {n: total for n, total in enumerate(self.totals) if total is not None and self.finished[n]}
        return sorted(known, key=lambda n: -known[n])


def sample_candidates(
    engine: Engine,
    comparisons: Sequence[Comparison],
    places: Sequence[int],
    rewards: Rewards,
    generation: GenerationConfig,
) -> Iterator[list[Candidates]]:
    """The candidates of the prompts in these places, as many at a time as the engine has rows for.

    `generation.n` samples of each; what a prompt gets depends on its place and the seed, not on its company. A prompt
    that cannot be read or does not fit has an `error`. Raises ConfigError without sampling, MMGPTError naming a reward
    that fails.
    """
    if generation.n > 1 and generation.temperature == 0:
        raise ConfigError(f"{generation.n} answers at temperature 0 are one answer: set a temperature above 0")
    step = max(1, engine.max_rows // generation.n)
    for start in range(0, len(places), step):
        answered = _answered(engine, comparisons, places[start : start + step], generation)
        yield _judged(answered, rewards)


Answered = tuple[Candidates, Comparison | None, Sequence[Answer]]
"""The candidates without their rewards, and what these are asked of."""


def _answered(
    engine: Engine, comparisons: Sequence[Comparison], places: Sequence[int], generation: GenerationConfig
) -> list[Answered]:
    """The samples of each prompt, or what is wrong with it."""
    jobs: list[tuple[Candidates, Comparison | None, Job | None]] = []
    run = Run(engine)
    try:
        for place in places:
            comparison = None
            candidates = Candidates(place=place, key=str(place))
            try:
                comparison = comparisons[place]
                candidates = dataclasses.replace(candidates, key=comparison.key)
                config = dataclasses.replace(generation, seed=row_seed(generation.seed, place + 1))
                job = engine.job(prompt_document(engine.processor, comparison), config)
            except (BadRecordError, MMGPTError) as error:
                jobs.append((_failed(candidates, error), None, None))
            else:
                run.waiting.append(job)
                jobs.append((candidates, comparison, job))
        while run.is_busy:
            run.step()
    finally:
        run.close()
    return [_samples(*each) for each in jobs]


def _samples(candidates: Candidates, comparison: Comparison | None, job: Job | None) -> Answered:
    if job is None:
        return candidates, None, ()
    try:
        answers = job.answers()
    except MMGPTError as error:
        return _failed(candidates, error), None, ()
    texts = tuple(answer.text for answer in answers)
    finished = tuple(answer.finish_reason == "stop" for answer in answers)
    return dataclasses.replace(candidates, answers=texts, finished=finished), comparison, answers


def _failed(candidates: Candidates, error: Exception) -> Candidates:
    return dataclasses.replace(candidates, error=" ".join(str(error).split()))


def _judged(answered: Sequence[Answered], rewards: Rewards) -> list[Candidates]:
    """With their rewards, all of which are asked for at once."""
    asked = [(comparison, answer) for _, comparison, answers in answered if comparison for answer in answers]
    if not asked:
        return [candidates for candidates, _, _ in answered]
    comparisons, answers = zip(*asked, strict=True)
    scored = rewards(comparisons, [answer.text for answer in answers], [answer.ids for answer in answers])
    totals = iter(_numbers(scored.total.tolist()))
    each = {name: iter(_numbers(values.tolist())) for name, values in scored.each.items()}
    judged = []
    for candidates, _, own in answered:
        own_rewards = {name: tuple(itertools.islice(values, len(own))) for name, values in each.items()}
        own_totals = tuple(itertools.islice(totals, len(own)))
        judged.append(dataclasses.replace(candidates, totals=own_totals, rewards=own_rewards if own else {}))
    return judged


def _numbers(values: Sequence[float]) -> list[float | None]:
    """Float32 as people write it: 0.1, and not 0.10000000149."""
    return [None if math.isnan(value) else float(f"{value:.7g}") for value in values]


# ---- What is kept ----


def best_answer(
    comparison: Comparison, candidates: Candidates, *, keep_above: float | None = None
) -> Comparison | None:
    """The prompt with its best answer, and the column `reward`; None where there is none above `keep_above`."""
    kept = _kept(candidates, keep_above)
    return _with(comparison, candidates, kept[:1]) if kept else None


def best_and_worst(
    comparison: Comparison, candidates: Candidates, *, keep_above: float | None = None
) -> Comparison | None:
    """The prompt with its best answer preferred to its worst; None where they are equal, in words or in reward."""
    kept = _kept(candidates, keep_above)
    if not kept or candidates.totals[kept[0]] == candidates.totals[kept[-1]]:
        return None
    if candidates.answers[kept[0]].strip() == candidates.answers[kept[-1]].strip():
        return None
    return _with(comparison, candidates, [kept[0], kept[-1]])


def _kept(candidates: Candidates, keep_above: float | None) -> list[int]:
    """Answers with some text, from the best on; none where the best one is not above `keep_above`."""
    order = [n for n in candidates.order if candidates.answers[n].strip()]
    best = candidates.totals[order[0]] if order else None
    return [] if best is None or (keep_above is not None and best <= keep_above) else order


def _with(comparison: Comparison, candidates: Candidates, chosen: Sequence[int]) -> Comparison:
    completions = tuple(
        Completion(({"role": "assistant", "content": [candidates.answers[n]]},), rank) for rank, n in enumerate(chosen)
    )
    columns = {name: value for name, value in comparison.columns.items() if name not in _LAYOUT}
    names = ("reward",) if len(chosen) == 1 else ("reward", "reward_rejected")
    columns |= {name: candidates.totals[n] for name, n in zip(names, chosen, strict=True)}
    return dataclasses.replace(comparison, completions=completions, margin=None, columns=columns)


# ---- How much it brings ----


def best_of_curve(totals: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """The mean reward of the best of k, for k = 1, 2, 4, ... and the most samples that a prompt has.

    `totals` are the rewards of each prompt's samples. Of n samples all choices of k are averaged, so that small k are
    known well; prompts with fewer than k do not count. Beside it 95 % of where the mean over other prompts would be,
    and the KL of the best of k from the model in nats.
    """
    most = max(map(len, totals), default=0)
    curve = []
    for k in sorted({min(2**power, most) for power in range(most.bit_length() + 1)} - {0}):
        values = [expected_best(own, k) for own in totals if len(own) >= k]
        spread = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        point = {"n": k, "kl": best_of_n_kl(k), "reward": fmean(values), "prompts": len(values)}
        curve.append(point if math.isnan(spread) else point | {"interval": spread})
    return curve


def expected_best(rewards: Sequence[float], k: int) -> float:
    """The mean of the best of k of these, over all choices of k: the i-th smallest is it in C(i - 1, k - 1) of them."""
    shares = [math.comb(i, k - 1) for i in range(len(rewards))]
    return math.fsum(share * reward for share, reward in zip(shares, sorted(rewards), strict=True)) / sum(shares)


# ---- The command ----


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    prompts: int
    skipped: int
    """Prompts that could not be answered, or whose answers have no reward."""
    kept: int
    stopped: bool
    """By Ctrl-C or SIGTERM: nothing is written but the samples."""
    curve: list[dict[str, float]]
    errors: str
    """What was wrong with what was skipped."""

    def lines(self) -> list[str]:
        """To be read."""
        told = [
            f"best of {point['n']:g}: reward {point['reward']:.4g}"
            + (f" ± {point['interval']:.2g}" if "interval" in point else "")
            + f", KL {point['kl']:.3f} nats ({point['prompts']:g} prompts)"
            for point in self.curve
        ]
        return [*told, f"{self.kept} of {self.prompts} prompts kept, {self.skipped} skipped"]


def samples_path(out: Path) -> Path:
    """Where the samples of a run are, beside what is kept of them."""
    return out.with_name(f"{out.stem}.samples.jsonl")


def best_of_n(
    engine: Engine,
    comparisons: Comparisons,
    rewards: Rewards,
    generation: GenerationConfig,
    out: Path,
    *,
    about: dict[str, Any],
    keep_above: float | None = None,
    pairs: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Sample, judge, and write what is kept into `out` as `write_comparisons` does; see `best_answer` and, for `pairs`,
    `best_and_worst`.

    The samples are in `samples_path(out)`, which a run with the same `about` (JSON values: the model, the rewards),
    prompts and options continues. Ctrl-C ends after the prompts that are being answered. `progress` None shows a bar
    when stderr is a terminal. Raises MMGPTError for samples of another run, unless `overwrite`.
    """
    header = about | {"prompts": comparisons.digest, "generation": to_dict(generation)}
    log = _SampleLog(samples_path(out), json.loads(json.dumps(header)), overwrite=overwrite)
    stopped = False
    with log, Stopper() as stopper:
        pending = [place for place in range(len(comparisons)) if place not in log.done]
        bar = tqdm(
            total=len(comparisons),
            initial=len(log.done),
            unit="prompt",
            disable=None if progress is None else not progress,
            dynamic_ncols=True,
        )
        with bar:
            left = len(pending)
            for group in sample_candidates(engine, comparisons, pending, rewards, generation):
                log.add(group)
                left -= len(group)
                bar.update(len(group))
                if stopper.requested and left:
                    stopped = True
                    break
    return _finish(log, comparisons, out, keep_above=keep_above, pairs=pairs, stopped=stopped)


def _finish(
    log: "_SampleLog", comparisons: Comparisons, out: Path, *, keep_above: float | None, pairs: bool, stopped: bool
) -> Summary:
    """Read all samples again, one prompt's at a time; write what is kept, unless the run was stopped."""
    totals: list[list[float]] = []
    errors = ErrorCounter()

    def kept() -> Iterator[Comparison]:
        choose = best_and_worst if pairs else best_answer
        for candidates in log.read():
            known = [total for total in candidates.totals if total is not None]
            if candidates.error:
                errors.add(candidates.error, candidates.key)
            elif not known:
                errors.add("prompt whose answers have no reward", candidates.key)
            else:
                try:
                    comparison = comparisons[candidates.place]
                except (BadRecordError, MMGPTError) as error:  # its image is gone since
                    errors.add(str(error), candidates.key)
                    continue
                totals.append(known)
                found = choose(comparison, candidates, keep_above=keep_above)
                if found is not None:
                    yield found

    count = sum(1 for _ in kept()) if stopped else write_comparisons(kept(), out)
    return Summary(len(log.done), errors.total, count, stopped, best_of_curve(totals), errors.summary())


class _SampleLog:
    """JSON lines: what the run is, then the candidates of each prompt. Continued after the last whole line."""

    def __init__(self, path: Path, header: dict[str, Any], *, overwrite: bool):
        """Raises MMGPTError for the samples of another run, and for what another process is writing."""
        self.path = path
        self.done: set[int] = set()
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open_locked(path, path)
        try:
            if overwrite:
                self._file.truncate(0)
            end = self._known(header)
            self._file.truncate(end)
            if not end:
                self._write([header])
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "_SampleLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, group: Sequence[Candidates]) -> None:
        """On the disk when it returns."""
        self._write([to_dict(candidates) for candidates in group])
        self.done.update(candidates.place for candidates in group)

    def read(self) -> Iterator[Candidates]:
        """In the order of the prompts: they were drawn in it."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if number:
                    yield self._candidates(line, number)

    def _candidates(self, line: bytes, number: int) -> Candidates:
        try:
            values = json.loads(line)
            values["rewards"] = {name: tuple(each) for name, each in values["rewards"].items()}
            for name in ("answers", "finished", "totals"):
                values[name] = tuple(values[name])
            return Candidates(**values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise MMGPTError(f"{self.path}: line {number + 1} holds no samples; --overwrite starts anew") from None

    def _known(self, header: dict[str, Any]) -> int:
        """The length of the whole lines, once it is clear that they are of this run."""
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                if number:
                    self.done.add(self._candidates(line, number).place)
                    continue
                try:
                    before = json.loads(line)
                except ValueError:
                    before = None
                if not isinstance(before, dict):
                    raise MMGPTError(f"{self.path}: not the samples of a run; --overwrite starts anew")
                for name in {**before, **header}:
                    if before.get(name) != header.get(name):
                        raise MMGPTError(f"{self.path}: samples of a run with other {name}; --overwrite starts anew")
        return end

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        data = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
        with naming(self.path):
            end = self._file.seek(0, os.SEEK_END)
            written = self._file.write(data)
            if written != len(data):  # the disk is full
                self._file.truncate(end)
                raise MMGPTError(f"{self.path}: cannot be written (the disk is full)")
            os.fsync(self._file.fileno())
