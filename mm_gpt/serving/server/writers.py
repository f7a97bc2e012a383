"""Choices of chats and of completions, with log-probabilities in the form of each."""

import codecs
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from mm_gpt.inference.generation import Piece, TokenLogprob, TopToken
from mm_gpt.serving.server.jobs import Job
from mm_gpt.serving.server.prompts import TextPrompt
from mm_gpt.serving.server.requests import ChatRequest, CompletionRequest
from mm_gpt.serving.server.responses import Choice

FLOOR = -9999.0
"""JSON has no minus infinity: log-probabilities are no lower than this."""


class ChatWriter:
    prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ChatRequest, end_ids: Collection[int]):
        self.generation, self.end_ids = request.generation, end_ids

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.tokens, len(choice.text.encode())) if self.generation.logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def opening(self) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": "", "refusal": None}
        return [_delta(index, first) for index in range(self.generation.n)]

    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The last token's text and the reason of the end never share a chunk."""
        logprobs = self._logprobs(piece.tokens, len(piece.text.encode())) if self.generation.logprobs else None
        deltas = []
        if piece.text or (logprobs and logprobs["content"]):
            deltas.append(_delta(index, {"content": piece.text}, logprobs))
        if piece.finish_reason is not None:
            deltas.append(_delta(index, {}, None, piece.finish_reason))
        return deltas

    def _logprobs(self, tokens: Iterable[TokenLogprob], num_bytes: int) -> dict[str, Any]:
        """The end mark is no part of the content, nor is what comes behind its bytes: a stop text, say."""
        content, used = [], 0
        for token in tokens:
            if token.id not in self.end_ids and used < num_bytes:
                content.append(_entry(token) | {"top_logprobs": [_entry(top) for top in token.top]})
            used += len(token.bytes)
        return {"content": content, "refusal": None}


def _delta(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _entry(token: TokenLogprob | TopToken) -> dict[str, Any]:
    return {"token": token.token, "logprob": max(FLOOR, token.logprob), "bytes": list(token.bytes)}


Shown = tuple[str, bytes, TokenLogprob | None]
"""A token's name, what it adds to the text, and how likely it was: unknown of a prompt's first."""


def _shown(token: TokenLogprob) -> Shown:
    return token.token, token.bytes, token


class TextWriter:
    prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, request: CompletionRequest, prompts: Sequence[TextPrompt], job: Job):
        self.request, self.prompts, self.job = request, prompts, job
        count = len(prompts) * request.generation.n
        self._is_new = [True] * count
        self._logprobs = [TextLogprobs(request.logprobs or 0) for _ in range(count)]

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, tokens = self._prompt(index)
        if self.request.wants_answers:
            text += choice.text
            tokens += map(_shown, choice.tokens)
        return self._written(index, text, tokens, choice.finish_reason)

    def opening(self) -> list[dict[str, Any]]:
        return []

    def deltas(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        text, tokens = self._prompt(index) if self._is_new[index] else ("", [])
        self._is_new[index] = False
        if self.request.wants_answers:
            text += piece.text
            tokens += map(_shown, piece.tokens)
        deltas = []
        if text or (tokens and self.request.logprobs is not None):
            deltas.append(self._written(index, text, tokens, None))
        if piece.finish_reason is not None:
            deltas.append(self._written(index, "", [], piece.finish_reason))
        return deltas

    def _prompt(self, index: int) -> tuple[str, list[Shown]]:
        """What is echoed, known when the prompt was read."""
        if not self.request.echo:
            return "", []
        number = index // self.request.generation.n
        prompt, logprobs = self.prompts[number], self.job.tickets[number].prompt_logprobs
        if logprobs is None:
            return prompt.text, []
        return prompt.text, [(*token, logprob) for token, logprob in zip(prompt.tokens, logprobs, strict=True)]

    def _written(self, index: int, text: str, tokens: list[Shown], finish_reason: str | None) -> dict[str, Any]:
        wanted = self.request.logprobs is not None and (tokens or finish_reason is None)
        logprobs = self._logprobs[index].of(tokens) if wanted else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


class TextLogprobs:
    """The four lists of a completion's tokens; offsets go on from one chunk to the next."""

    def __init__(self, num_top: int) -> None:
        self.num_top = num_top
        self._at = 0
        self._characters = codecs.getincrementaldecoder("utf-8")("ignore")

    def of(self, tokens: Iterable[Shown]) -> dict[str, Any]:
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for name, adds, token in tokens:
            lists["tokens"].append(name)
            lists["token_logprobs"].append(None if token is None else max(FLOOR, token.logprob))
            lists["top_logprobs"].append(None if token is None else self._top(token))
            lists["text_offset"].append(self._at)
            self._at += len(self._characters.decode(adds))
        return lists

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """By text; of tokens that read alike, the likeliest. The token itself is always there."""
        top: dict[str, float] = {}
        others: list[TokenLogprob | TopToken] = [*token.top[: self.num_top], token]
        for other in others:
            top.setdefault(other.token, max(FLOOR, other.logprob))
        return top
