"""What is asked of the engine, and what it gives back: options, answers, and the pieces of an answer that grows."""

from dataclasses import dataclass, field
from typing import Any

from mm_gpt.document import check_text
from mm_gpt.errors import ConfigError
from mm_gpt.inference.constraints import Constraint

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
"""Logits divided by less do not fit into float32."""
MAX_LENGTH_PENALTY = 10.0
MAX_BEAMS = 1000
MAX_SEED = 2**63 - 1
MAX_SAMPLES = 1024
MAX_TOP_LOGPROBS = 1000
MAX_BIAS = 1e4
"""Far beyond the range of logits, and far within that of float32."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How an answer is generated. Raises ConfigError naming a value that is out of range."""

    max_new_tokens: int = 128
    n: int = 1
    """Answers to each prompt. They share the prompt, and each is drawn by a seed of its own."""
    temperature: float = 0.0
    """0 takes the most likely token each time; else from 1e-6 to 1e6."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    min_p: float = 0.0
    """Keeps the tokens that are at least so likely, as a share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Tokens of the prompt and the answer: positive logits are divided by it, others multiplied (CTRL, 1909.05858)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has, from -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as the answer has it, from -2 to 2."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of single ids."""
    num_beams: int = 1
    length_penalty: float = 0.6
    """Beam search divides a score by ((5 + length) / 6) ** length_penalty (GNMT, 1609.08144); from -10 to 10."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice in an answer; 0 lets everything repeat."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    seed: int = 0
    """Of sampling, from 0 to 2**63 - 1."""
    logprobs: bool = False
    top_logprobs: int = 0
    """With `logprobs`: how many of the likeliest tokens come with each one."""
    prompt_logprobs: bool = False
    """The log-probabilities of the prompt's own tokens come with the answer."""
    constraint: Constraint | None = None
    """What the answer has to look like; it holds for a whole answer, not for one that max_new_tokens cut off."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        checks = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "n": 1 <= self.n <= MAX_SAMPLES,
            "temperature": self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0.01 <= self.repetition_penalty <= 100,
            "presence_penalty": -2 <= self.presence_penalty <= 2,
            "frequency_penalty": -2 <= self.frequency_penalty <= 2,
            "logit_bias": all(id >= 0 and abs(bias) <= MAX_BIAS for id, bias in self.logit_bias.items()),
            "num_beams": 1 <= self.num_beams <= MAX_BEAMS,
            "length_penalty": abs(self.length_penalty) <= MAX_LENGTH_PENALTY,
            "no_repeat_ngram_size": self.no_repeat_ngram_size >= 0,
            "stop": all(self.stop),
            "seed": 0 <= self.seed <= MAX_SEED,
            "top_logprobs": 0 <= self.top_logprobs <= (MAX_TOP_LOGPROBS if self.logprobs else 0),
        }
        for name, fine in checks.items():
            if not fine:
                needs = " without logprobs" if name == "top_logprobs" and not self.logprobs else ""
                raise ConfigError(f"{name} cannot be {getattr(self, name)!r}{needs}")
        for text in self.stop:
            check_text(text, "stop")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError("beam search does not sample: set temperature to 0 or num_beams to 1")
        if self.num_beams > 1 and self.n > 1:
            raise ConfigError("beam search gives one answer: set n to 1 or num_beams to 1")


@dataclass(frozen=True)
class TopToken:
    """One of the likeliest tokens in a place."""

    token: str
    id: int
    logprob: float
    bytes: bytes


@dataclass(frozen=True)
class TokenLogprob:
    token: str
    id: int
    logprob: float
    """Natural logarithm of the model's own probability, before temperature, penalties and truncation."""
    bytes: bytes = b""
    """What the token adds to the text, which may be a part of a character."""
    top: tuple[TopToken, ...] = ()
    """The likeliest tokens in its place, from the likeliest on."""


class Answer(str):
    """The generated text, and what it took. `str(answer)` and everything else that a string does work."""

    text: str
    ids: tuple[int, ...]
    """The tokens generated, the end mark included."""
    prompt_tokens: int
    """Tokens of the prompt, images included."""
    image_tokens: int
    cached_tokens: int
    """Those of the prompt that were read before, for another answer."""
    completion_tokens: int
    """Tokens generated, the end mark included."""
    finish_reason: str
    """"stop": the model ended, or a stop text came. "length": max_new_tokens or the context was reached.
    "cancelled": nobody waited for it any more."""
    generation: GenerationConfig
    """The options that it was generated with, defaults included."""
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None
    """Of each token of the prompt; None for the first, and for images."""

    def __new__(
        cls,
        text: str,
        *,
        prompt_tokens: int,
        image_tokens: int,
        completion_tokens: int,
        finish_reason: str,
        generation: GenerationConfig,
        ids: tuple[int, ...] = (),
        cached_tokens: int = 0,
        logprobs: list[TokenLogprob] | None = None,
        prompt_logprobs: list[TokenLogprob | None] | None = None,
    ) -> "Answer":
        answer = super().__new__(cls, text)
        answer.text, answer.ids = text, ids
        answer.prompt_tokens, answer.image_tokens, answer.cached_tokens = prompt_tokens, image_tokens, cached_tokens
        answer.completion_tokens, answer.finish_reason = completion_tokens, finish_reason
        answer.generation, answer.logprobs, answer.prompt_logprobs = generation, logprobs, prompt_logprobs
        return answer

    def __str__(self) -> str:
        return self.text

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (self.text,), {k: v for k, v in self.__dict__.items() if k != "text"}  # for pickle and copy


@dataclass(frozen=True)
class Piece:
    """What one step adds to one of the answers to a prompt."""

    index: int
    """Which of the n answers."""
    text: str = ""
    tokens: tuple[TokenLogprob, ...] = ()
    """Those of this piece, where log-probabilities are asked for."""
    finish_reason: str | None = None
    """Set on the last piece of an answer, whose text may be empty."""
    error: Exception | None = None
    """Set on the last piece where there is no whole answer."""
