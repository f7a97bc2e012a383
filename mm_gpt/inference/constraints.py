"""Answers of a given form: a JSON schema, any JSON object, a regular expression, or one of several texts.

`llguidance` says which tokens may come next. What it does not enforce exactly is refused before the first token.
"""

import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import llguidance
import numpy as np

from mm_gpt.document import check_text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.inference.detokenizer import TokenBytes
from mm_gpt.inference.json_schema import enforceable, subschemas
from mm_gpt.inference.patterns import literal, portable
from mm_gpt.tokenizer import Tokenizer

MAX_GRAMMARS = 64
"""Compiled grammars that are kept."""
MAX_CHOICES = 1000
MAX_CHOICE, MAX_CHOICES_TEXT = 10_000, 100_000
"""Characters of one choice, and of all together."""
PLACE_SECONDS = 0.2
"""How long the place of what is refused is looked for."""
UNFULFILLED = "nothing fulfils it with this tokenizer"
UNTOLD = "options of oneOf that neither their type nor a constant of a required property tells apart; try anyOf"
LIMITS: dict[str, Any] = {
    "max_items_in_row": 20_000,
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""What a grammar may cost: a state of the lexer takes one to two kB, 50,000 units of fuel about a millisecond."""
JSON_STYLE = {
    # One space, or a new line and its indentation: white space without end would never have to stop.
    "whitespace_pattern": r"[ ]|\n[ \t]{0,32}",
    # An escaped letter would be another way to write the name of a property.
    "json_allowed_escapes": 'nrbtf\\"',
}


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """The form of an answer; exactly one of these is given. Raises ConfigError otherwise."""

    json_schema: dict[str, Any] | None = None
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """The whole answer matches it."""
    choices: tuple[str, ...] | None = None
    """The answer is one of these texts."""

    def __post_init__(self) -> None:
        given = [name for name in ("json_schema", "regex", "choices") if getattr(self, name) is not None]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            names = ", ".join(given) or "none"
            raise ConfigError(f"constraint: exactly one of json_schema, json_object, regex, choices, not {names}")
        if self.json_schema is not None and not isinstance(self.json_schema, dict):
            raise ConfigError(f"json_schema: expected an object, got {type(self.json_schema).__name__}")
        if self.regex is not None:
            _check_text(self.regex, "regex")
        if self.choices is not None:
            if isinstance(self.choices, str):
                raise ConfigError("choices: expected a list of texts, got one text")
            object.__setattr__(self, "choices", tuple(self.choices))
            for choice in self.choices:
                _check_text(choice, "choices")
            if not self.choices or not all(self.choices):
                raise ConfigError("choices: needs at least one text, and none may be empty")
            size = sum(map(len, self.choices))
            if len(self.choices) > MAX_CHOICES or size > MAX_CHOICES_TEXT or max(map(len, self.choices)) > MAX_CHOICE:
                raise ConfigError(
                    f"choices: {len(self.choices)} texts of {size} characters; at most {MAX_CHOICES} of "
                    f"{MAX_CHOICES_TEXT} together and {MAX_CHOICE} each are enforced"
                )

    @property
    def key(self) -> str:
        """Equal for constraints that ask for the same, properties in the same order."""
        try:
            return json.dumps([self.json_schema, self.json_object, self.regex, self.choices])
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"json_schema: cannot be written as JSON ({error})") from None


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name}: expected text, got {type(value).__name__}")
    check_text(value, name)


class Grammars:
    """Compiles constraints for a tokenizer, and keeps the last of them. Any thread may call it.

    vocab_size: V of the model's logits, which may be more than the tokenizer has. Others go on while one compiles.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.vocab_size = vocab_size
        self.end_ids = tuple(id for id in tokenizer.end_ids if id < vocab_size)
        never = {id for id in tokenizer.special.values() if id < vocab_size}.union(self.end_ids)
        self.never = np.array(sorted(never))
        """Ids that are not text."""
        tokens = TokenBytes(tokenizer)
        self.table = [b"" if id in never else piece for id, piece in enumerate(tokens.table(vocab_size))]
        changes = (
            id for id, piece in enumerate(self.table) if piece.startswith(b" ") and tokens(id, first=True) != piece
        )
        self.not_first = np.array(sorted(changes), dtype=np.int64)
        """Ids whose space is lost at the start of an answer."""
        self._longest = {piece: id for id, piece in enumerate(self.table) if piece}
        self._longest_size = max(map(len, self._longest))
        self._tokenizer = tokenizer
        wrapper = llguidance.TokenizerWrapper(_Vocabulary(self))
        self._matchers = llguidance.LLTokenizer(wrapper, eos_token=[*self.end_ids])
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint) -> "Grammar":
        """Raises ConfigError for what is malformed, too large, cannot be enforced or cannot be fulfilled."""
        key = constraint.key
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        grammar = self._compile(constraint)
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > MAX_GRAMMARS:
                self._kept.popitem(last=False)
        return grammar

    def _compile(self, constraint: Constraint) -> "Grammar":
        if constraint.regex is not None:
            try:
                return self._grammar(_from_regex(portable(constraint.regex, whole=True)))
            except ConfigError as error:
                raise ConfigError(f"regex: {error}") from None
        if constraint.choices is not None:
            try:
                return self._grammar(_from_regex("|".join(map(literal, constraint.choices))))
            except ConfigError as error:
                raise ConfigError(f"choices: {error}") from None
        schema = {"type": "object"} if constraint.json_schema is None else enforceable(constraint.json_schema)
        try:
            return self._grammar(self._from_schema(schema))
        except ConfigError as error:
            why = UNTOLD if "oneOf" in str(error) else error
            raise ConfigError(f"json_schema{self._culprit(schema)}: {why}") from None

    def _from_schema(self, schema: dict[str, Any]) -> str:
        style: Any = JSON_STYLE
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=style)

    def _grammar(self, grammar: str) -> "Grammar":
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(self._matchers, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ConfigError(_first_line(matcher.get_error()))
        compiled = Grammar(self, matcher)
        allowed = np.empty(self.vocab_size, dtype=bool)
        try:
            compiled.start().allowed(allowed)
        except MMGPTError as error:
            raise ConfigError(str(error)) from None
        return compiled

    def _culprit(self, schema: dict[str, Any]) -> str:
        """The place of the smallest part that is refused by itself."""
        definitions = schema.get("$defs", {})
        end = time.monotonic() + PLACE_SECONDS
        for path, part in subschemas(schema):  # the innermost first
            if time.monotonic() > end:
                break
            try:
                self._grammar(self._from_schema({"$defs": definitions, **part}))
            except ConfigError:
                return f" at {path}"
        return ""


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, grammars: Grammars):
        self._grammars = grammars
        self.eos_token_id = grammars.end_ids[0]
        self.tokens = grammars.table
        self.special_token_ids = grammars.never.tolist()

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text that must come: as the model knows it, else with the longest token each time."""
        data = text.encode() if isinstance(text, str) else text
        table = self._grammars.table
        ids = self._grammars._tokenizer.encode(data.decode()) if data else []
        if b"".join(table[id] for id in ids) == data:
            return ids
        ids, at = [], 0
        while at < len(data):
            sizes = range(min(self._grammars._longest_size, len(data) - at), 0, -1)
            size = next((n for n in sizes if data[at : at + n] in self._grammars._longest), 0)
            if not size:
                break
            ids.append(self._grammars._longest[data[at : at + size]])
            at += size
        return ids


def _from_regex(pattern: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": f"start: TEXT\nTEXT: /{pattern}/\n"}]})


def _first_line(error: str) -> str:
    return error.strip().partition("\n")[0]


class Grammar:
    """A compiled constraint."""

    def __init__(self, grammars: Grammars, matcher: Any):
        self._grammars, self._matcher = grammars, matcher

    def start(self) -> "GrammarState":
        return GrammarState(self._grammars, self._matcher.deep_copy(), is_empty=True)


class GrammarState:
    """Where an answer is in its grammar."""

    def __init__(self, grammars: Grammars, matcher: Any, *, is_empty: bool):
        self._grammars, self._matcher = grammars, matcher
        self._is_empty = is_empty
        self._bits = np.zeros((grammars.vocab_size + 31) // 32, dtype=np.int32)
        self.finished = False
        """An end id came, or nothing but one may follow."""

    def allowed(self, out: np.ndarray) -> None:
        """Write into `out` (V,) bool which ids may come next; the end ids where the answer may end.

        Raises MMGPTError when the grammar has become too large for the limits.
        """
        grammars = self._grammars
        if self.finished:
            out[:] = False
        else:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            self._check()
            out[:] = np.unpackbits(self._bits.view(np.uint8), count=len(out), bitorder="little").view(bool)
            out[grammars.never] = False
            if self._is_empty:
                out[grammars.not_first] = False
        if self.finished or self._matcher.is_accepting():
            out[[*grammars.end_ids]] = True
        if not out.any():
            raise MMGPTError(UNFULFILLED)

    def accept(self, id: int) -> None:
        """Take the next token. Raises MMGPTError for one that was not allowed."""
        if id in self._grammars.end_ids:
            if not (self.finished or self._matcher.is_accepting()):
                raise MMGPTError("the answer cannot end here")
            self.finished = True
            return
        if self.finished or not self._matcher.consume_token(id):
            self._check()
            raise MMGPTError(f"token {id} does not fit here")
        self._is_empty = False
        self.finished = self._matcher.is_stopped()
        if self.finished and not self._matcher.is_accepting():
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            error = _first_line(self._matcher.get_error())
            raise MMGPTError(UNFULFILLED if error.startswith("NoExtension") else error)

    def copy(self) -> "GrammarState":
        new = GrammarState(self._grammars, self._matcher.deep_copy(), is_empty=self._is_empty)
        new.finished = self.finished
        return new
