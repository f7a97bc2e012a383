"""The Python API: `mm_gpt.load()` gives an `Assistant` that answers questions about images, captions and chats."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast, overload

import torch

from mm_gpt.config import from_dict
from mm_gpt.document import Document, Image, Message, Text, check_document, interleave
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.choice import chosen_model
from mm_gpt.hub.packing import check_dtype, weights_dtype
from mm_gpt.images import ImageSource
from mm_gpt.inference.chat_session import ChatSession
from mm_gpt.inference.constraints import Constraint
from mm_gpt.inference.engine import Engine, Stream
from mm_gpt.inference.generation import Answer, GenerationConfig
from mm_gpt.model.mmgpt import MMGPT, pick_device
from mm_gpt.processor import IGNORE_INDEX, Processor, collate
from mm_gpt.templates.prompts import CAPTION_PROMPT

CAPTION_NO_REPEAT, CHAT_NO_REPEAT = 3, 8
"""Default `no_repeat_ngram_size` of captions, which are one sentence, and of answers, which may hold lists and code.
For models that were trained here: they are small, and may never leave a loop by themselves. Public ones decode freely.
"""


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `ask`, `caption`, `chat` and `complete`; `GenerationConfig` describes them."""

    max_new_tokens: int
    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    num_beams: int
    length_penalty: float
    no_repeat_ngram_size: int
    stop: tuple[str, ...]
    seed: int
    logprobs: bool
    top_logprobs: int
    prompt_logprobs: bool
    constraint: Constraint


def load(name: str | Path | None = None, *, device: str = "auto", dtype: str = "auto") -> Assistant:
    """A model by name (`default` comes with the package, `smolvlm` and `owner/name` from the Hugging Face hub) or from
    a folder: of a training run, or of a public checkpoint. None is what `MM_GPT_MODEL` says, or the user's setting;
    where neither does, `default`.

    `device` is `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`. `dtype` says how the decoder's weights are
    kept: `fp32`, `bf16`, `int8`, `int4`, or `auto`, which is how they are stored where the processor multiplies that
    (docs/quantisation.md has what each costs). The first call may download the decoder's weights; see
    `mm_gpt.hub.fetching.download` for where they go.
    Raises MMGPTError for an unknown name, ConfigError for a device or dtype that is not there, CheckpointError for a
    broken folder, DownloadError when weights are out of reach.
    """
    check_dtype(dtype)
    place = pick_device(device)
    name = chosen_model() if name is None else name
    if place.type == "cpu":
        model, processor = load_model(name, decoder_dtype=dtype)
        return Assistant(model, processor)
    if dtype in ("int8", "int4"):
        raise ConfigError(f"dtype {dtype} is for the CPU; on {place} weights are bf16 or fp32")
    precision = torch.float32 if dtype == "fp32" else torch.bfloat16
    model, processor = load_model(name, dtype=precision)
    return Assistant(model, processor, device=place, dtype=precision)


class Assistant:
    """A loaded model, ready to answer. Calls do not depend on each other."""

    def __init__(
        self,
        model: MMGPT,
        processor: Processor,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ):
        """Takes `model` over: its low-rank updates are merged, and on the CPU its vision encoder is kept as its decoder
        is. On a GPU all of it becomes `dtype`."""
        device = device or torch.device("cpu")
        self.base_decoder = model.config.decoder
        """The decoder before its low-rank updates, if it has a name."""
        model.merge_lora()
        model.eval().requires_grad_(False)
        if device.type == "cpu":
            if model.vision is not None:
                model.vision.prepare(weights_dtype(model.decoder), model.connector)
        else:
            if model.vision is not None:
                model.vision.fold_batch_norm()
            model.to(device, dtype)
        self.model, self.processor = model, processor
        self.engine = Engine(model, processor, compiled=device.type == "cpu")
        config = processor.config
        self.is_public = config.image is None or config.image_text is not None
        """Whether images stand in the prompt by tokens of the vocabulary, as in published models, or not at all."""

    def ask(
        self,
        image: ImageSource | Image | Sequence[ImageSource | Image] | None,
        question: str,
        *,
        examples: Sequence[tuple[ImageSource | Image, str, str]] = (),
        **options: Unpack[GenerationOptions],
    ) -> Answer:
        """The answer to a question about an image, several images, or none.

        Images are paths, bytes, PIL images, arrays or http(s) URLs. `examples` are demonstrations (image, question,
        answer) shown before. Raises ImageError for an unreadable image, ConfigError for an impossible option.
        """
        messages: list[Message] = []
        for shown, asked, answered in examples:
            messages.append(_user([shown], asked))
            messages.append({"role": "assistant", "content": answered})
        messages.append(_user(_as_images(image), question))
        return self.chat(messages, **options)

    @overload
    def caption(
        self,
        images: str | Path | bytes | Image,
        *,
        batch_size: int = 8,
        prompt: str = CAPTION_PROMPT,
        **options: Unpack[GenerationOptions],
    ) -> Answer: ...
    @overload
    def caption(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 8,
        prompt: str = CAPTION_PROMPT,
        **options: Unpack[GenerationOptions],
    ) -> list[Answer]: ...
    def caption(
        self,
        images: Any,
        *,
        batch_size: int = 8,
        prompt: str = CAPTION_PROMPT,
        **options: Unpack[GenerationOptions],
    ) -> Answer | list[Answer]:
        """One sentence about each image: an Answer for one image, a list in the same order for several.

        `prompt` asks something else about each of them. `caption_config` says what is used where no option is given.
        Raises ImageError naming the first image that cannot be read.
        """
        single = not isinstance(images, list | tuple) and not _is_iterable_of_images(images)
        sources = [images] if single else list(images)
        answers = [cast(Answer, a) for a in self.captions(sources, batch_size=batch_size, prompt=prompt, **options)]
        return answers[0] if single else answers

    def captions(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 8,
        prompt: str = CAPTION_PROMPT,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Answer | None]:
        """`caption` for any number of images, one after the other; None for None. `batch_size` of them are worked on at
        a time: when one is done, the next takes its place."""
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        asked = (None if image is None else self.processor.chat([_user([image], prompt)]) for image in images)
        return self.engine.each(asked, self.caption_config(options), ahead=batch_size)

    def concepts(self, image: ImageSource | Image) -> list[tuple[str, float]]:
        """What the tower's classifier tells the decoder about an image: the likeliest kind ("dog"), then the names of
        classes, each with its probability; nothing for a model without concepts. Raises ImageError.
        """
        if self.model.concepts is None:
            return []
        tiles = self.processor.tiled(image if isinstance(image, Image) else Image(image)).tiles
        assert tiles is not None
        with self.engine.lock, torch.inference_mode():
            return self.model.told(tiles.pixel_values.to(self.model.device))[0]

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, **options: Unpack[GenerationOptions]
    ) -> Answer: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], **options: Unpack[GenerationOptions]
    ) -> Stream: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, **options: Unpack[GenerationOptions]
    ) -> Answer | Stream:
        """The assistant's next turn.

        messages: `{"role": "user" | "assistant" | "system", "content": text or a list of parts}`; a part is
        `{"type": "text", "text": ...}`, `{"type": "image", "image": source}`, a plain string, or an `Image`.
        With `stream`, an iterator of pieces of text, whose `answer` is complete at the end. `chat_config` says what is
        used where an option is not given.
        """
        if not messages:
            raise MMGPTError("chat needs at least one message")
        return self._run(self.processor.chat(messages), stream, self.chat_config(options))

    def conversation(self, **options: Unpack[GenerationOptions]) -> ChatSession:
        """A chat that keeps what it has read: `talk.say("...")` or `talk.say([Image(...), "..."])`, turn after turn."""
        return ChatSession(self.engine, self.chat_config(options))

    def caption_config(self, options: GenerationOptions | None = None) -> GenerationConfig:
        """How captions are generated: 3 beams unless `num_beams` or `temperature` says otherwise, at most 40 tokens; a
        model trained here repeats no three tokens. Raises ConfigError for an impossible option."""
        values: GenerationOptions = {**(options or {})}
        if "temperature" not in values:
            values.setdefault("num_beams", 3)
        values.setdefault("max_new_tokens", 40)
        values.setdefault("no_repeat_ngram_size", 0 if self._is_free(values) else CAPTION_NO_REPEAT)
        return generation_config(values)

    def chat_config(self, options: GenerationOptions | None = None) -> GenerationConfig:
        """How answers are generated: greedily, at most 128 tokens; a model trained here repeats no eight tokens. Raises
        ConfigError for an impossible option."""
        values: GenerationOptions = {**(options or {})}
        values.setdefault("no_repeat_ngram_size", 0 if self._is_free(values) else CHAT_NO_REPEAT)
        return generation_config(values)

    def _is_free(self, options: GenerationOptions) -> bool:
        """Whether answers may repeat themselves: those of public models, and where a form asks for it."""
        return self.is_public or options.get("constraint") is not None

    def samples(self, messages: Sequence[Message], **options: Unpack[GenerationOptions]) -> list[Answer]:
        """`n` answers to a chat, as `chat` takes it. They share its prompt; each one's seed follows from `seed` and its
        place. Raises ConfigError for an impossible option."""
        return self.engine.generate([self.processor.chat(messages)], self.chat_config(options))

    def complete(self, parts: str | Iterable[Any], **options: Unpack[GenerationOptions]) -> Answer:
        """Continue an interleaved prompt as it stands, without a chat template.

        `parts`: strings are text; `Image(source)`, PIL images, arrays and bytes are images.
        `model.complete([Image("a.jpg"), "A photo of a cat. ", Image("b.jpg"), "A photo of"])`
        """
        return cast(Answer, self._run(Document(tuple(interleave(parts))), False, generation_config(options)))

    def logprob(self, parts: str | Iterable[Any], continuation: str) -> float:
        """The summed natural log-probability of `continuation` after an interleaved prompt."""
        return float(self.token_logprobs(parts, continuation).sum())

    @torch.inference_mode()
    def token_logprobs(self, parts: str | Iterable[Any], continuation: str) -> torch.Tensor:
        """Natural log-probabilities of the continuation's tokens, (tokens,)."""
        prompt = interleave(parts)
        if prompt and isinstance(last := prompt[-1], Text):
            # A space belongs to the word after it: "Answer: " + "yes" is read as "Answer:" + " yes".
            bare = last.text.rstrip(" ")
            continuation = last.text[len(bare) :] + continuation
            prompt[-1] = dataclasses.replace(last, text=bare)
        document = Document((*prompt, Text(continuation, is_target=True)))
        check_document(document)
        example = self.processor(document)
        batch = collate([[example]], self.processor.pixels([example])).to(self.model.device)
        wanted = batch.labels[0] != IGNORE_INDEX
        if not wanted.any():  # a sum over nothing would be 0, that is, certain
            raise MMGPTError(f"{continuation!r} has no token of its own after the prompt: its first is part of it")
        logits = self.model.decoder.logits(self.model(batch)[0, wanted])
        return logits.log_softmax(-1).gather(1, batch.labels[0, wanted][:, None])[:, 0]

    def _run(self, document: Document, stream: bool, config: GenerationConfig) -> Answer | Stream:
        if config.n > 1:
            raise ConfigError(f"n is {config.n}, and one answer is given here: use samples()")
        if stream:
            return self.engine.stream(document, config)
        return self.engine.generate([document], config)[0]


def generation_config(options: GenerationOptions) -> GenerationConfig:
    """Checked options. Raises ConfigError naming a wrong one and the closest right one."""
    values = dict(options)
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    return from_dict(GenerationConfig, values, where="generation options")


def _user(images: Sequence[Any], text: str) -> Message:
    return {"role": "user", "content": [*(i if isinstance(i, Image) else Image(i) for i in images), text]}


def _as_images(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]


def _is_iterable_of_images(images: Any) -> bool:
    """A generator or another lazy iterable; strings, bytes, arrays and PIL images are single images."""
    return hasattr(images, "__next__")
