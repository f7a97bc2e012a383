"""Ids into text, one at a time: what is certain at once, in constant time a token, and the texts that end an answer."""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from mm_gpt.tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
ANCHOR = "a"
"""A token that others are decoded behind: some decoders write a token in another way at a text's very start."""


def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in a byte-level vocabulary: GPT-2's table."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LETTERS = _byte_letters()


class TokenBytes:
    """The bytes that each id of a tokenizer writes; b"" for special tokens and for ids without a token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        decoder = tokenizer.backend.decoder
        kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set[str]()
        self._is_byte_level, self._has_byte_tokens = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._decode = " ".join if decoder is None else decoder.decode
        self.special = frozenset(tokenizer.special.values())
        self._known: tuple[dict[int, bytes], dict[int, bytes]] = {}, {}

    def __call__(self, id: int, *, first: bool = False) -> bytes:
        """`first`: nothing stands before it (SentencePiece drops a space at a text's start)."""
        known = self._known[first]
        if id not in known:
            known[id] = self._bytes(id, first)
        return known[id]

    def _bytes(self, id: int, first: bool) -> bytes:
        token = self._tokenizer.backend.id_to_token(id)
        if token is None or id in self.special:
            return b""
        if self._is_byte_level:
            try:
                return bytes([BYTE_LETTERS[letter] for letter in token])
            except KeyError:  # an added token is written as it is
                return token.encode()
        byte = BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        if byte and int(byte[1], 16) >= 0x80:
            return bytes([int(byte[1], 16)])
        text = self._decode([token]) if first else self._decode([ANCHOR, token])[len(ANCHOR) :]
        return text.encode()

    def name(self, id: int) -> str:
        """The token as text; special ones by their names."""
        return self._tokenizer.decode([id], keep_special=True)

    def table(self, size: int) -> list[bytes]:
        """Those of the ids below `size`, behind other text."""
        return [self(id) for id in range(size)]


def _kinds(decoder: dict[str, Any]) -> set[str]:
    """The types of a decoder's steps."""
    return {decoder["type"]}.union(*(_kinds(step) for step in decoder.get("decoders", [])))


class Detokenizer:
    """The text of a growing list of ids. All pieces and the rest together are `tokenizer.decode(ids)`.

    One thing is better: of byte tokens of which some are no text, `decode` gives up the whole run, and this only them.
    """

    def __init__(self, tokens: TokenBytes):
        self._tokens = tokens
        self._is_empty = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, id: int) -> str:
        """The text that is now certain: half a character waits for its other half."""
        piece = self._tokens(id, first=self._is_empty)
        self._is_empty = self._is_empty and id in self._tokens.special
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """The rest: U+FFFD for half a character."""
        return self._utf8.decode(b"", final=True)

    def copy(self) -> "Detokenizer":
        new = Detokenizer(self._tokens)
        new._is_empty = self._is_empty
        new._utf8.setstate(self._utf8.getstate())
        return new


class StopMatcher:
    """Finds the first stop text in a text that comes in pieces; the pieces' borders change nothing.

    The stop text that is complete first counts; of several that end at one place, the longest. Knuth, Morris and Pratt
    (1977): a state for each stop text, so that a character costs the same however long they are.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._borders = tuple(_borders(stop) for stop in stops)
        self._matched = [0] * len(self._stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that cannot be part of a stop text any more, and whether one has come (the text before it)."""
        if not self._stops:
            return text, False
        self._held += text
        for end in range(len(self._held) - len(text) + 1, len(self._held) + 1):
            letter = self._held[end - 1]
            found = 0
            for i, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
                size = self._matched[i]
                while size and (size == len(stop) or stop[size] != letter):
                    size = borders[size - 1]
                self._matched[i] = size = size + (stop[size] == letter)
                if size == len(stop):
                    found = max(found, size)
            if found:
                before, self._held = self._held[: end - found], ""
                return before, True
        certain = len(self._held) - max(self._matched)
        released, self._held = self._held[:certain], self._held[certain:]
        return released, False

    def finish(self) -> str:
        """What was held back, when nothing comes any more."""
        rest, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return rest

    def copy(self) -> "StopMatcher":
        new = object.__new__(StopMatcher)
        new.__dict__.update(self.__dict__)
        new._matched = list(self._matched)
        return new


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest proper beginning that it also ends with."""
    borders = [0] * len(stop)
    size = 0
    for end in range(1, len(stop)):
        while size and stop[size] != stop[end]:
            size = borders[size - 1]
        size += stop[size] == stop[end]
        borders[end] = size
    return borders
