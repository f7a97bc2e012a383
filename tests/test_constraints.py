"""Answers of a given form: those of an accepted schema fit it, and all else is refused before the first token."""

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import sentencepiece_tokenizer

from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.inference.constraints import Constraint, Grammars, GrammarState
from mm_gpt.inference.detokenizer import TokenBytes
from mm_gpt.inference.json_keywords import CHECKS, LISTS, MAPS, SINGLE
from mm_gpt.inference.patterns import portable
from mm_gpt.tokenizer import Tokenizer
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer()
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size + 50)  # rows of logits that no token has
CLOSED = {"type": "object", "additionalProperties": False}
ANIMALS = {
    "cat": CLOSED | {"properties": {"kind": {"const": "cat"}, "lives": {"enum": [1, 9]}}, "required": ["kind"]},
    "dog": CLOSED | {"properties": {"kind": {"const": "dog"}, "good": {"type": "boolean"}}, "required": ["kind"]},
}
TREE = CLOSED | {
    "properties": {"v": {"type": "boolean"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}},
    "required": ["v", "kids"],
}


def integers(**bounds: Any) -> dict[str, Any]:
    return {"type": "integer", **bounds}


def numbers(**bounds: Any) -> dict[str, Any]:
    return {"type": "number", **bounds}


def text(**bounds: Any) -> dict[str, Any]:
    return {"type": "string", **bounds}


def array(**bounds: Any) -> dict[str, Any]:
    return {"type": "array", **bounds}


def several(key: str, *schemas: Any, **more: Any) -> dict[str, Any]:
    return {key: list(schemas), **more}


ENFORCED: dict[str, dict[str, Any]] = {
    "anything": {},
    "object": {"type": "object"},
    "no type": {"minimum": 3, "maxLength": 2, "minItems": 1, "required": ["a"], "maxItems": 2},
    "true and false": {"type": "object", "properties": {"a": True, "b": False}, "required": ["a"]},
    "person": CLOSED
    | {"properties": {"name": text(minLength=2, maxLength=6), "age": integers(minimum=0, maximum=130)}}
    | {"required": ["name", "age"]},
    "more names": {"type": "object", "properties": {"a": integers()}, "additionalProperties": text(maxLength=3)},
    "names with signs": {"type": "object", "properties": {'a"b\\c\n\x01é': {"type": "null"}, "": False}}
    | {"required": ['a"b\\c\n\x01é'], "additionalProperties": {"type": "boolean"}},
    "patternProperties": {"type": "object", "patternProperties": {"^a": integers(), "^b": text(maxLength=2)}}
    | {"additionalProperties": False, "minProperties": 1},
    "patternProperties and a name": {"type": "object", "properties": {"ab": {"type": ["integer", "string"]}}}
    | {"patternProperties": {"^a": text(maxLength=2)}, "required": ["ab"]},
    "patternProperties of any letters": CLOSED
    | {"properties": {"a b": text(maxLength=2)}, "patternProperties": {r"^\w+$": integers()}},
    "allOf types": several("allOf", {"type": ["integer", "string"]}, {"type": ["string", "null"]}, {"maxLength": 3}),
    "allOf objects": several(
        "allOf",
        {"type": "object", "properties": {"a": integers(minimum=3)}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"maximum": 9}, "b": {"type": "boolean"}}, "required": ["b"]},
    ),
    "allOf closed": several(
        "allOf", CLOSED | {"properties": {"a": integers()}}, {"type": "object", "properties": {"b": integers()}}
    ),
    "allOf patterns": several("allOf", {"pattern": "a"}, {"pattern": "b"}, {"maxLength": 4}, type="string"),
    "anyOf": several("anyOf", integers(minimum=5, maximum=8), text(enum=["x", "y"]), {"type": "null"}),
    "anyOf required": CLOSED
    | {"properties": {"a": integers(minimum=0, maximum=9), "b": {"type": "boolean"}}}
    | several("anyOf", {"required": ["a"]}, {"required": ["b"]}),
    "oneOf types": several("oneOf", integers(), text(maxLength=3), {"type": "null"}),
    "oneOf tags": several("oneOf", {"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}) | {"$defs": ANIMALS},
    "multipleOf": integers(multipleOf=7, minimum=-30, maximum=100),
    "multipleOf twice": integers(allOf=[{"multipleOf": 4}, {"multipleOf": 6}], minimum=0, maximum=1000),
    "multipleOf of numbers": numbers(multipleOf=3),
    "number bounds": numbers(minimum=-1.5, exclusiveMaximum=2.25),
    "number beyond 0": numbers(exclusiveMinimum=0, exclusiveMaximum=1),
    "number below 0": numbers(exclusiveMaximum=0),
    "integer bounds": integers(exclusiveMinimum=2.5, exclusiveMaximum=6),
    "large integers": integers(minimum=2**53 - 5, maximum=2**53),
    "bound of several types": {"type": ["integer", "null"], "exclusiveMinimum": 3, "maximum": 30},
    "enum": {"enum": [1, 2.5, -3, 0, 1e3, 0.1, True, None, "a", [1, "b"], {"x": 1}]},
    "const": {"const": {"a": [1, {"b": None}], "c": 'é"\\\n'}},
    "lengths": text(minLength=2, maxLength=5),
    "pattern": text(pattern=r"^[A-Z]{2}-\d+$"),
    "pattern anywhere": text(pattern="ab", maxLength=6),
    "pattern of two": text(pattern="^a|b$", maxLength=4),
    "pattern of others": text(pattern=r"^\W\D\S[^\w][^\d\s].$"),
    "pattern of signs": text(pattern=r'^["\\/\n\x00-\x1f]{2,4}$'),
    "pattern and format": text(format="date", pattern="^20"),
    **{f"format {name}": text(format=name) for name in ("date", "date-time", "time", "uuid", "hostname", "email")},
    **{f"format {name}": text(format=name) for name in ("ipv4", "ipv6", "uri")},
    "items": array(items=integers(minimum=0, maximum=9), minItems=2, maxItems=4),
    "prefixItems": array(prefixItems=[integers(), text(maxLength=2)], items=False, minItems=1),
    "properties by number": {"type": "object", "maxProperties": 2, "additionalProperties": integers()},
    "one of the properties": CLOSED
    | {"properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "minProperties": 1, "maxProperties": 1},
    "tree": {"$ref": "#/$defs/n", "$defs": {"n": TREE}},
    "$ref to the root": CLOSED | {"properties": {"next": several("anyOf", {"$ref": "#"}, {"type": "null"})}},
    "$ref with more": {"$ref": "#/$defs/a~1b~0c", "maximum": 7, "$defs": {"a/b~c": integers(minimum=2)}},
    "draft 7": {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": integers()}}
    | {"$ref": "#/definitions/a"},
    "annotations": integers(title="T", description="D", default=0, examples=[1], **{"x-guidance": {"lenient": True}}),
}

REFUSED: dict[str, tuple[Any, str]] = {
    "not": ({"not": text()}, r"#/not: not cannot be enforced"),
    "if": ({"properties": {"a": {"if": text(), "then": text()}}}, r"#/properties/a/if: if cannot"),
    "uniqueItems": (array(uniqueItems=True), "#/uniqueItems"),
    "contains": (array(contains=integers()), "#/contains"),
    "dependentRequired": ({"dependentRequired": {"a": ["b"]}}, "#/dependentRequired"),
    "oneOf": (several("oneOf", integers(minimum=0), integers(maximum=9)), "at #: options of oneOf"),
    "oneOf inside": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"x": {"oneOf": [True, True]}}}}},
        "at #/\\$defs/a/properties/x: options of oneOf",
    ),
    "oneOf of optional tags": (
        several("oneOf", *(CLOSED | {"properties": {"k": {"const": k}}} for k in "ab")),
        "options of oneOf",
    ),
    "patterns that overlap": (
        {"type": "object", "patternProperties": {"a": integers(), "b": text()}},
        "not disjoint",
    ),
    "patterns of names that differ by language": (
        {"type": "object", "patternProperties": {r"^\w*$": integers()}},
        r"#/patternProperties: .* cannot be enforced: name its letters",
    ),
    "multipleOf a fraction": (numbers(multipleOf=0.01), "#/multipleOf: 0.01"),
    "digits": (numbers(minimum=0.12345678901234567), "more than 15 digits"),
    "large number": ({"const": 2**53 + 1}, "#/const: 9007199254740993"),
    "NaN": (numbers(minimum=float("nan")), "cannot be written as JSON"),
    "no JSON": ({"const": {1, 2}}, "cannot be written as JSON"),
    "half a character": ({"const": "\ud800"}, "cannot be written as JSON"),
    "control characters": ({"const": "a\0b"}, r"#/const: the character '\\x00'"),
    "control characters in patterns": (text(pattern=r"a\x00b"), r"#/pattern: .* cannot be enforced"),
    "names twice": ({"type": "object", "minProperties": 2}, "#/minProperties"),
    "regex": (text(pattern="(("), "#/pattern: '\\(\\(' is not a regular expression"),
    "look-ahead": (text(pattern="^(?!a)b"), "#/pattern: .* look-around"),
    "format": (text(format="unknown"), "#/format: unknown format 'unknown'"),
    "remote $ref": ({"$ref": "https://example.com/a.json"}, "#/\\$ref: .* does not point into this schema"),
    "lost $ref": ({"$ref": "#/$defs/a"}, "#/\\$ref: nothing stands at #/\\$defs/a"),
    "$ref to no schema": ({"$ref": "#/title", "title": "x"}, "#/title: a schema is an object or a boolean"),
    "$ref to itself": ({"$ref": "#"}, "at #: a \\$ref leads back to itself"),
    "$ref in a circle": (
        {"$ref": "#/$defs/a", "$defs": {"a": several("anyOf", {"$ref": "#/$defs/b"}), "b": {"$ref": "#/$defs/a"}}},
        "leads back to itself",
    ),
    "endless object": (CLOSED | {"properties": {"next": {"$ref": "#"}}, "required": ["next"]}, "without end"),
    "endless array": (array(items={"$ref": "#"}, minItems=1), "without end"),
    "endless where optional": (
        CLOSED
        | {"properties": {"a": {"$ref": "#/$defs/e"}}, "$defs": {"e": array(items={"$ref": "#/$defs/e"}, minItems=1)}},
        "#/\\$defs/e/items: .* without end",
    ),
    "$id": ({"properties": {"a": {"$id": "b"}}}, r"#/properties/a/\$id"),
    "old draft": ({"$schema": "http://json-schema.org/draft-04/schema#"}, "none of the drafts"),
    "misspelt": (text(minLenght=3), "unknown keyword 'minLenght'; did you mean 'minLength'"),
    "type": ({"type": "strnig"}, "unknown type 'strnig'; did you mean 'string'"),
    "value of minimum": (integers(minimum="3"), '#/minimum: must be a number, not "3"'),
    "value of required": ({"required": "a"}, "#/required: must be a list of names"),
    "value of anyOf": ({"anyOf": []}, "#/anyOf: must be a list of schemas"),
    "value of properties": ({"properties": [1]}, "#/properties: must be an object"),
    "value of maxLength": (text(maxLength=-1), "#/maxLength: must be a whole number"),
    "value of items": (array(items=[integers()]), "#/items: a schema is an object or a boolean"),
    "lengths crossed": (text(minLength=5, maxLength=2), "[Uu]nsatisfiable"),
    "no type left": (text(enum=[1]), "[Uu]nsatisfiable"),
    "no multiple": (integers(multipleOf=7, minimum=1, maximum=6), "[Uu]nsatisfiable"),
    "no text": (text(pattern="^(ab)+$", minLength=3, maxLength=3), "[Uu]nsatisfiable"),
    "required and closed": (CLOSED | {"required": ["b"]}, "[Uu]nsatisfiable"),
    "false": ({"allOf": [False]}, "[Uu]nsatisfiable"),
    "deep": (json.loads('{"items":' * 100 + "{}" + "}" * 100), "more than 64 objects"),
    "deeper than the reader": ({"const": json.loads("[" * 900 + "]" * 900)}, "more than 64 objects"),
    "long": ({"enum": ["x" * 9000] * 20}, "at most 100000 are read"),
    "many": ({"anyOf": [{"type": "null"}] * 3000}, "more than 2000 schemas"),
    "many at once": (
        {"$ref": "#/$defs/0", "$defs": {str(i): {"oneOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(30)}}
        | {"$defs": {str(i): {"oneOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(30)} | {"30": integers()}},
        "more than 2000 schemas",
    ),
    "a product": (
        several(
            "allOf",
            *({"anyOf": [{"type": "object", "required": [f"{i} {j}"]} for j in range(8)]} for i in range(6)),
        ),
        "too (large|big)|fuel",
    ),
    "long repetition": (array(minItems=10**9), "#/minItems: 1000000000 is above 1000"),
}

CLOSERS = np.zeros(GRAMMARS.vocab_size, dtype=bool)
CLOSERS[[id for id, piece in enumerate(GRAMMARS.table) if piece in b'"}],:01ea' and piece]] = True


def walk(grammars: Grammars, constraint: Constraint, seed: int, most: int = 300) -> tuple[list[int], GrammarState]:
    """A random answer; half of its tokens are those that close something, so that it ends."""
    state = grammars.compile(constraint).start()
    rng, allowed, ids = np.random.default_rng(seed), np.empty(grammars.vocab_size, dtype=bool), []
    while not state.finished and len(ids) < most:
        state.allowed(allowed)
        closing = allowed & CLOSERS[: len(allowed)] if grammars is GRAMMARS and rng.random() < 0.5 else allowed
        ids.append(int(rng.choice(np.flatnonzero(closing if closing.any() else allowed))))
        state.accept(ids[-1])
    return ids, state


def check_walks(name: str, count: int) -> None:
    schema = ENFORCED[name]
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    checker = kind(schema, format_checker=kind.FORMAT_CHECKER)
    ended = 0
    for seed in range(count):
        ids, state = walk(GRAMMARS, Constraint(json_schema=schema), seed)
        if state.finished:
            checker.validate(json.loads(TOKENIZER.decode(ids)))
            ended += 1
    assert ended >= 0.8 * count


@pytest.mark.parametrize("name", ENFORCED)
def test_answers_fit_their_schema(name: str) -> None:
    """Stops: keywords ignored without a word, names written twice in two spellings, values that double rounds away."""
    check_walks(name, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENFORCED)
def test_many_answers_fit_their_schema(name: str) -> None:
    check_walks(name, 1000)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused(name: str) -> None:
    schema, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message) as caught:
        GRAMMARS.compile(Constraint(json_schema=schema))
    assert "\n" not in str(caught.value)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 2.5, 1e308, 10**400, 1e-300, 2**70, "", "#", "#/", "#/$defs/0/a", "string", "^a$", "date"]),
    st.lists(st.sampled_from([0, "a", {}, [], True, "string", {"type": "integer"}, {"$ref": "#"}]), max_size=3),
    st.dictionaries(
        st.sampled_from(["a", "type", "0", "[", "$ref"]), st.sampled_from([0, "a", {}, [], True]), max_size=2
    ),
)


@given(
    st.dictionaries(
        st.sampled_from(sorted({*CHECKS, *LISTS, *MAPS, *SINGLE, "$ref", "$defs", "$schema", "title"})), VALUES
    )
)
@settings(max_examples=100)
def test_whatever_stands_in_a_schema_is_read_or_refused(schema: dict[str, Any]) -> None:
    """Stops: a traceback for a malformed schema."""
    refusal = ""
    try:
        state = GRAMMARS.compile(Constraint(json_schema=schema)).start()
    except ConfigError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert refusal or allowed_by(state)


def test_more_than_the_parser_can_hold_is_an_error_not_a_free_answer() -> None:
    schema = text(pattern="^(a|aa|aaa)*$", minLength=5000, maxLength=9999)
    with pytest.raises(MMGPTError, match="too many"):
        walk(GRAMMARS, Constraint(json_schema=schema), 0)


def test_any_json_object() -> None:
    for seed in range(10):
        ids, state = walk(GRAMMARS, Constraint(json_object=True), seed)
        assert not state.finished or isinstance(json.loads(TOKENIZER.decode(ids)), dict)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_exactly_one_of_the_choices(kind: str) -> None:
    """Stops: a choice that is the beginning of another cannot be reached, a first space that the decoder drops."""
    tokenizer = {"bytes": make_tokenizer, "sentencepiece": sentencepiece_tokenizer}[kind]()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    choices = ("yes", "yes dog", "no / maybe", "é 👩‍🚀", "<|im_end|>", "/a\\.b*")
    found = set()
    for seed in range(150):
        ids, state = walk(grammars, Constraint(choices=choices), seed)
        assert state.finished
        found.add(tokenizer.decode(ids))
    assert found == set(choices)


@pytest.mark.parametrize(
    "regex",
    [
        r"\d{3}-[a-c]+\.?",
        "yes|no",
        r"^a(b|c)*$",
        r"[^\s\w]{2}",
        "é+.",
        r"\(\[\{[\]^-]",
        "(?:x{2,3}?){2}",
        "a{b}",
        r"\W\S\D",
    ],
)
def test_answers_match_their_regex(regex: str) -> None:
    for seed in range(8):
        ids, state = walk(GRAMMARS, Constraint(regex=regex), seed, most=40)
        answer = TOKENIZER.decode(ids)
        assert not state.finished or re.fullmatch(regex, answer), answer


@pytest.mark.parametrize(
    "regex",
    [
        "((",
        "a**",
        "(?=a)",
        r"(a)\1",
        r"\bword",
        "(?i)a",
        "(^a)b",
        "a$b",
        r"[\D]",
        "[]a]",
        "a{20000}",
        "(" * 60 + ")" * 60,
        "x" * 3000,
        "a{,3}",
        r"\ud83d\ude00",
        r"\p{L}",
        r"a\x00",
    ],
)
def test_regexes_that_are_refused(regex: str) -> None:
    with pytest.raises(ConfigError, match=r"regex: ") as caught:
        GRAMMARS.compile(Constraint(regex=regex))
    assert len(str(caught.value)) < 300


@given(st.text(alphabet="ab|()[]^$*+?{}1,2\\-.dWs", max_size=8))
@settings(max_examples=150)
def test_a_pattern_means_what_python_means_or_is_refused(regex: str) -> None:
    try:
        grammar = GRAMMARS.compile(Constraint(regex=regex)).start()
    except ConfigError:
        return
    for seed in range(2):
        ids, state = walk(GRAMMARS, Constraint(regex=regex), seed, most=12)
        assert not state.finished or re.fullmatch(regex, TOKENIZER.decode(ids))
    assert not grammar.finished or re.fullmatch(regex, "")


def test_a_search_may_match_anywhere() -> None:
    assert portable("^a|b$") == "(?:(?:a)(?s:.)*|(?s:.)*(?:b))"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of .* not none"),
        ({"regex": "a", "json_object": True}, "exactly one of .* not regex, json_object"),
        ({"choices": ()}, "at least one"),
        ({"choices": ("a", "")}, "none may be empty"),
        ({"choices": "abc"}, "expected a list"),
        ({"choices": (1,)}, "choices: expected text, got int"),
        ({"choices": ("a",) * 2000}, "at most 1000"),
        ({"choices": ("a" * 20_000,)}, "at most 1000"),
        ({"choices": ("\ud800",)}, "choices"),
        ({"json_schema": [1]}, "json_schema: expected an object, got list"),
        ({"regex": 3}, "regex: expected text, got int"),
    ],
)
def test_constraints_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(MMGPTError, match=message):
        Constraint(**given)


# ---- states ----


def state_of(constraint: Constraint) -> GrammarState:
    return GRAMMARS.compile(constraint).start()


def allowed_by(state: GrammarState) -> set[int]:
    allowed = np.empty(GRAMMARS.vocab_size, dtype=bool)
    state.allowed(allowed)
    return set(np.flatnonzero(allowed).tolist())


def ids_of(answer: str) -> list[int]:
    return TOKENIZER.encode(answer)


def test_end_ids_come_exactly_where_the_answer_may_end() -> None:
    """Special tokens never come inside, not even as the text of theirs that a grammar asks for."""
    ends, special = set(TOKENIZER.end_ids), set(TOKENIZER.special.values())
    state = state_of(Constraint(regex="a+<?"))
    assert not allowed_by(state) & special
    state.accept(*ids_of("a"))
    assert allowed_by(state) & special == ends
    with pytest.raises(MMGPTError, match="satisfy"):
        state.copy().accept(*ids_of("b"))
    with pytest.raises(MMGPTError, match="cannot end here"):
        state_of(Constraint(regex="a+")).accept(TOKENIZER.end_ids[0])
    assert not state.finished
    state.accept(TOKENIZER.end_ids[-1])
    assert state.finished
    assert allowed_by(state) == ends


def test_an_answer_that_cannot_go_on_is_finished() -> None:
    """So that no step is spent on its end mark."""
    state = state_of(Constraint(json_schema=integers(enum=[7])))
    for id in ids_of("7"):
        state.accept(id)
    assert state.finished
    assert allowed_by(state) == set(TOKENIZER.end_ids)


def test_copies_go_their_own_way() -> None:
    one = state_of(Constraint(choices=("ab", "ac")))
    one.accept(*ids_of("a"))
    two = one.copy()
    one.accept(*ids_of("b"))
    assert one.finished
    assert not two.finished
    assert allowed_by(two) >= {*ids_of("b"), *ids_of("c")}
    two.accept(*ids_of("c"))
    assert two.finished


def test_compiled_grammars_are_kept() -> None:
    first = GRAMMARS.compile(Constraint(json_schema={"type": "object", "properties": {"kept": integers()}}))
    assert GRAMMARS.compile(Constraint(json_schema={"type": "object", "properties": {"kept": integers()}})) is first
    state = first.start()
    del first
    assert allowed_by(state)


def test_the_bytes_of_tokens_are_their_text() -> None:
    """Stops: gaps in a vocabulary that are allowed, or a token that writes other bytes than it decodes to."""
    tokens = TokenBytes(TOKENIZER)
    for id in range(TOKENIZER.vocab_size):
        assert tokens(id).decode(errors="replace") == TOKENIZER.decode([id])
    assert GRAMMARS.table[TOKENIZER.vocab_size :] == [b""] * 50
    state = state_of(Constraint(regex=r"[\s\S]*"))
    assert not allowed_by(state) & set(range(TOKENIZER.vocab_size, GRAMMARS.vocab_size))


def test_what_a_vocabulary_cannot_write_is_refused() -> None:
    letters = {token: id for id, token in enumerate(["<s>", "a", "b"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    grammars = Grammars(Tokenizer(backend, end_of_text="<s>", end_of_turn="<s>"), 3)
    assert walk(grammars, Constraint(regex="[ab]{3}"), 0)[1].finished
    for impossible in (Constraint(regex="c"), Constraint(json_object=True)):
        with pytest.raises(ConfigError, match="nothing fulfils it with this tokenizer"):
            grammars.compile(impossible)
    with pytest.raises(MMGPTError, match="nothing fulfils it with this tokenizer"):  # known only when it gets there
        walk(grammars, Constraint(regex="ac+"), 0)


def test_sentencepiece_loses_the_first_space() -> None:
    """What its decoder would not write back is not allowed: " dog" after ids of " dog" would be "dog"."""
    tokenizer: Tokenizer = sentencepiece_tokenizer()
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    with pytest.raises(ConfigError, match="nothing fulfils"):
        grammars.compile(Constraint(regex=" dog"))
    ids, state = walk(grammars, Constraint(json_schema=text(maxLength=4)), 3)
    assert state.finished
    assert len(json.loads(tokenizer.decode(ids))) <= 4
