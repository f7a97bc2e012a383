"""Rewards of answers: the user's functions, reward models, rule-based rewards, and any of them added up.

A function is called as TRL calls it, `f(prompts, completions, completion_ids, images, **columns)`, by name and with
what it takes, and gives a list of numbers: `prompts` and `completions` are lists of messages for chats and strings for
plain text, the other columns of the prompts' rows come as lists under their names. None says that a reward has nothing
to say about an answer; one that is no finite number is counted and says nothing either: no mistake becomes a reward.

Shapes: N answers.
"""

import asyncio
import inspect
import logging
import math
import threading
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

import torch
from PIL import Image as PILImage
from torch import Tensor

from mm_gpt.alignment.answer_rewards import ANSWER_REWARDS
from mm_gpt.alignment.functions import load_function
from mm_gpt.alignment.reward_model import ModelReward, is_reward_model
from mm_gpt.alignment.rule_reward import RULES, RuleReward, load_rule_reward
from mm_gpt.config import check_numbers
from mm_gpt.datasets.comparisons import Comparison
from mm_gpt.datasets.samples import ErrorCounter
from mm_gpt.document import Image, Message
from mm_gpt.errors import ConfigError, MMGPTError, unknown_name

logger = logging.getLogger(__name__)

CONSTANT_AFTER = 64
"""Values, all of them equal, after which a reward is said to be constant; and answers without one."""
_OWN_NAMES = ("prompts", "completions", "completion_ids", "images")


class Reward(Protocol):
    """What judges answers."""

    name: str
    """Under which it is logged."""

    def __call__(
        self, comparisons: Sequence[Comparison], answers: Sequence[str], ids: Sequence[Sequence[int]] | None = None
    ) -> list[float | None]:
        """Of each answer to the prompt in its place, which is repeated for several answers to one.

        `ids` are the tokens that were sampled, the end mark included. None where the reward does not apply.
        """


@runtime_checkable
class FittedBeside(Protocol):
    """A reward whose scale is that of another one: it warns where it is used with others."""

    def check_beside(self, sources: Sequence[str]) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One of the rewards that are added up."""

    source: str
    """`file.py:function`, `package.module:function`, the folder of a reward model or of a rule-based reward, or one of
    exact_match, boxed_match, think_format."""
    weight: float = 1.0
    """0: it is logged, and adds nothing."""

    def __post_init__(self) -> None:
        check_numbers(self, "weight")
        if not self.source:
            raise ConfigError("a reward needs a source")


@dataclass(frozen=True)
class Scored:
    """Rewards of N answers."""

    total: Tensor  # (N,) float32, the weighted sum of those that apply; NaN where none does
    each: dict[str, Tensor]  # name: (N,) float32, not weighted; NaN where it does not apply


class Rewards:
    """Several rewards as one."""

    def __init__(self, configs: Sequence[RewardConfig], *, device: torch.device | str = "cpu"):
        """Raises ConfigError for one that is named twice and where none has a weight, and what `load_reward` does."""
        if not configs:
            raise ConfigError("give at least one reward")
        if twice := [source for source, n in Counter(config.source for config in configs).items() if n > 1]:
            raise ConfigError(f"the reward {twice[0]} is given twice")
        self.rewards = [load_reward(config.source, device=device) for config in configs]
        others = [
            str(reward.folder) if isinstance(reward, ModelReward) else config.source
            for config, reward in zip(configs, self.rewards, strict=True)
            if config.weight and not isinstance(reward, FittedBeside)  # a gauge is added to nothing
        ]
        for reward in self.rewards:
            if isinstance(reward, FittedBeside):
                reward.check_beside(others)
        self.weights = [config.weight for config in configs]
        if not any(self.weights):
            raise ConfigError("every reward has weight 0: there is nothing to be learned from")
        names = [reward.name for reward in self.rewards]
        self.names = [c.source if names.count(n) > 1 else n for c, n in zip(configs, names, strict=True)]
        """Those of the rewards; sources, where two rewards have one name."""
        self.errors = ErrorCounter()
        """Rewards that were no finite numbers, answers that no reward applies to, and what a model could not judge."""
        for reward in self.rewards:
            if isinstance(reward, ModelReward | RuleReward):
                reward.errors = self.errors
        self._watch = [_Watch(name) for name in self.names]

    def __call__(
        self, comparisons: Sequence[Comparison], answers: Sequence[str], ids: Sequence[Sequence[int]] | None = None
    ) -> Scored:
        """The rewards of each answer to the prompt in its place. Raises MMGPTError naming a reward that fails."""
        if len(comparisons) != len(answers) or (ids is not None and len(ids) != len(answers)):
            raise ValueError(f"{len(comparisons)} prompts, {len(answers)} answers, {ids and len(ids)} ids")
        each = {}
        for name, reward, watch in zip(self.names, self.rewards, self._watch, strict=True):
            values = self._numbers(name, reward(comparisons, answers, ids), comparisons)
            watch.see(values)
            each[name] = torch.tensor([math.nan if value is None else value for value in values])
        # What has no weight is only logged: it does not make an answer one that has a reward.
        weighted = torch.stack([w * each[name] for w, name in zip(self.weights, self.names, strict=True) if w])
        total = torch.where(weighted.isnan().all(dim=0), math.nan, weighted.nansum(dim=0))
        for comparison, is_unknown in zip(comparisons, total.isnan().tolist(), strict=True):
            if is_unknown:
                self.errors.add("answer that no reward applies to", comparison.key)
        return Scored(total, each)

    def _numbers(self, name: str, values: Any, comparisons: Sequence[Comparison]) -> list[float | None]:
        """What a reward gave, checked. Raises MMGPTError for another number of values, and for what is no number."""
        if hasattr(values, "tolist"):  # a tensor or an array
            values = values.tolist()
        if not isinstance(values, list | tuple):
            raise MMGPTError(f"reward {name}: gives {type(values).__name__}, not a list of numbers")
        if len(values) != len(comparisons):
            raise MMGPTError(f"reward {name}: gives {len(values)} values for {len(comparisons)} answers")
        return [self._number(name, value, each) for value, each in zip(values, comparisons, strict=True)]

    def _number(self, name: str, value: Any, comparison: Comparison) -> float | None:
        if value is None:
            return None
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real):  # numpy's numbers are Real, and so are True and False
            raise MMGPTError(f"reward {name}: gives {value!r:.60} for {comparison.key}, not a number or None")
        try:
            number = torch.tensor(float(value)).item()  # float32, which a large number does not fit into
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.errors.add(f"reward of {name} is {number}", comparison.key)
            return None
        return float(value)


class _Watch:
    """Says once, with its name, that a reward gives every answer the same, or none: nothing can be learned from it."""

    def __init__(self, name: str):
        self.name, self.first, self.number, self.without, self.is_over = name, math.nan, 0, 0, False

    def see(self, values: Sequence[float | None]) -> None:
        known = [value for value in values if value is not None]
        if self.is_over:
            return
        if not known:
            self.without += len(values)
            if not self.number and self.without >= CONSTANT_AFTER:
                self.is_over = True
                logger.warning("reward %s: none for any of the first %d answers", self.name, self.without)
            return
        self.first = known[0] if not self.number else self.first
        self.number += len(known)
        if any(value != self.first for value in known):
            self.is_over = True
        elif self.number >= CONSTANT_AFTER:
            self.is_over = True
            logger.warning("reward %s: %g for each of the first %d answers", self.name, self.first, self.number)


def load_reward(source: str, *, device: torch.device | str = "cpu") -> Reward:
    """The reward that `RewardConfig.source` names. Raises MMGPTError naming what is missing or wrong."""
    if source in ANSWER_REWARDS:
        return FunctionReward(ANSWER_REWARDS[source])
    folder = Path(source)
    if folder.is_dir():
        if (folder / RULES).is_file():
            return load_rule_reward(folder, device=str(device))
        if is_reward_model(folder):
            return ModelReward(folder, device=device)
        raise MMGPTError(f"{source}: neither a reward model nor a rule-based reward is in this folder")
    if ":" in source:
        return FunctionReward(load_function(source))
    raise MMGPTError(
        f"{unknown_name('reward', source, ANSWER_REWARDS)}; or give file.py:function, package.module:function, or the "
        "folder of a reward model"
    )


class FunctionReward:
    """A function as a reward."""

    def __init__(self, function: Callable[..., Any], *, name: str | None = None):
        """`function` may be async. Raises MMGPTError for a built-in that does not say what it takes."""
        self.function = function
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self._file = getattr(getattr(function, "__code__", None), "co_filename", None)
        try:
            self._parameters = inspect.signature(function).parameters
        except ValueError:
            raise MMGPTError(f"reward {self.name}: does not say what it takes; call it from a function") from None

    def __call__(
        self, comparisons: Sequence[Comparison], answers: Sequence[str], ids: Sequence[Sequence[int]] | None = None
    ) -> list[float | None]:
        """Raises MMGPTError naming the function, where it fails and how, or the column that it needs."""
        arguments = self._arguments(comparisons, answers, ids)
        try:
            values = self.function(**arguments)
            return _finished(values) if inspect.isawaitable(values) else values
        except (Exception, SystemExit) as error:
            places = traceback.extract_tb(error.__traceback__)
            place = next(each for each in places if each.filename == self._file or each is places[-1])
            where = f"{Path(place.filename).name}:{place.lineno}"
            raise MMGPTError(f"reward {self.name}: {type(error).__name__} at {where}: {error}") from error

    def _arguments(
        self, comparisons: Sequence[Comparison], answers: Sequence[str], ids: Sequence[Sequence[int]] | None
    ) -> dict[str, Any]:
        """What is given to the function: everything there is, or what it takes."""
        columns = sorted({name for comparison in comparisons for name in comparison.columns} - {*_OWN_NAMES})
        offered: dict[str, Any] = {
            "prompts": [_prompt(comparison) for comparison in comparisons],
            "completions": [_completion(c, answer) for c, answer in zip(comparisons, answers, strict=True)],
            "images": [Images(comparison) for comparison in comparisons],
            **{name: [comparison.columns.get(name) for comparison in comparisons] for name in columns},
        }
        if ids is not None:
            offered["completion_ids"] = [list(each) for each in ids]
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in self._parameters.values()):
            taken = offered
        else:
            taken = {name: values for name, values in offered.items() if name in self._parameters}
        for name, parameter in self._parameters.items():
            is_variable = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            if not is_variable and parameter.default is inspect.Parameter.empty and name not in taken:
                there = ", ".join(columns) or "none"
                raise MMGPTError(
                    f"reward {self.name}: needs {name!r}, which the prompts do not have (columns: {there})"
                )
        return taken


class Images(Sequence[PILImage.Image]):
    """The images of a prompt, each decoded when it is asked for."""

    def __init__(self, comparison: Comparison):
        parts = [part for message in comparison.prompt for part in _parts(message)]
        self._images = [part for part in parts if isinstance(part, Image)]

    def __len__(self) -> int:
        return len(self._images)

    @overload
    def __getitem__(self, index: int) -> PILImage.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[PILImage.Image]: ...
    def __getitem__(self, index: int | slice) -> PILImage.Image | list[PILImage.Image]:
        """Raises ImageError naming the image."""
        if isinstance(index, slice):
            return [image.load() for image in self._images[index]]
        return self._images[index].load()


def _prompt(comparison: Comparison) -> str | list[Message]:
    if comparison.is_text:
        return "".join(part for m in comparison.prompt for part in _parts(m) if isinstance(part, str))
    return [{**message, "content": _content(_parts(message))} for message in comparison.prompt]


def _completion(comparison: Comparison, answer: str) -> str | list[Message]:
    return str(answer) if comparison.is_text else [{"role": "assistant", "content": str(answer)}]


def _content(parts: Sequence[Any]) -> str | list[dict[str, str]]:
    """Text alone as a string, else parts; the images themselves are in `images`."""
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list | tuple) else [] if content is None else [content]


def _finished(coroutine: Awaitable[Any]) -> Any:
    """What an async function gives; also where an event loop is running, as in a notebook."""

    async def wait() -> Any:
        return await coroutine

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    found: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(asyncio.run(wait()))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
