"""JSON schemas into the part of JSON Schema that a grammar enforces exactly; the rest is refused, with its place.

The meaning is that of draft 2020-12, as far as drafts 6 to 2019-09 agree. What is written anew: patterns and formats
become patterns that every checker reads alike, exclusive bounds become the next number of 15 digits (a text such as
0.0…01 is above zero, and yet 0 for who reads it as a double), and references point into one list of definitions.
"""

import decimal
import json
import urllib.parse
from typing import Any

from mm_gpt.errors import ConfigError, unknown_name
from mm_gpt.inference.json_keywords import (
    ANNOTATIONS,
    CHECKS,
    DIGITS,
    FORMATS,
    LISTS,
    MAPS,
    REFUSED,
    SINGLE,
    SMALLEST,
    TYPES,
    Schema,
    check_names,
    fail,
    short,
)
from mm_gpt.inference.patterns import OTHER_ESCAPES, VARYING, portable

MAX_TEXT = 100_000
"""Characters of a schema, written as JSON."""
MAX_DEPTH = 64
"""Objects and lists inside each other in a schema."""
MAX_SCHEMAS = 2000
"""Schemas inside a schema."""
MAX_PATTERN_PROPERTIES = 50
DRAFTS = ("2020-12", "2019-09", "draft-07", "draft-06")


def enforceable(schema: Schema) -> Schema:
    """An equal schema, or a stricter one, that a grammar enforces. Raises ConfigError naming a keyword and its path."""
    try:
        text = json.dumps(schema, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: a circle, NaN, half a character
        raise ConfigError(f"json_schema: cannot be written as JSON ({error})") from None
    if len(text) > MAX_TEXT:
        raise ConfigError(f"json_schema: {len(text)} characters; at most {MAX_TEXT} are read")
    if _depth(schema) > MAX_DEPTH:
        raise ConfigError(f"json_schema: more than {MAX_DEPTH} objects and lists inside each other")
    written = _Writer(json.loads(text)).write()
    _check_ends(written)
    return written


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]:
        depth += 1
    return depth


class _Writer:
    """Writes one schema anew, keyword by keyword."""

    def __init__(self, root: Any):
        self.root = root
        self.definitions: dict[str, Any] = {}
        """Reference -> what stands there, written anew."""
        self.names: dict[str, str] = {}
        self.waiting: list[str] = []
        self.count = 0

    def write(self) -> Schema:
        root = self.root
        if isinstance(root, dict):
            draft = root.get("$schema")
            if draft is not None and not (isinstance(draft, str) and any(name in draft for name in DRAFTS)):
                raise fail("#/$schema", f"{draft!r} is none of the drafts that are read ({', '.join(DRAFTS)})")
            root = {key: value for key, value in root.items() if key not in ("$schema", "$id")}
        written = self.schema(root, "#", inlined=())
        while self.waiting:
            place = self.waiting.pop()
            self.definitions[place] = self.schema(self._find(place), place, inlined=())
        if isinstance(written, bool):
            written = {} if written else {"enum": []}
        if self.definitions:
            written["$defs"] = {self.names[place]: _named(value, place) for place, value in self.definitions.items()}
        return written

    def schema(self, value: Any, path: str, *, inlined: tuple[str, ...]) -> Any:
        self.count += 1
        if self.count > MAX_SCHEMAS:
            raise fail(path, f"more than {MAX_SCHEMAS} schemas inside the schema")
        if isinstance(value, bool):
            return value
        if not isinstance(value, dict):
            raise fail(path, f"a schema is an object or a boolean, not {short(value)}")
        out: Schema = {}
        for key, inner in value.items():
            at = f"{path}/{key}"
            if key in ANNOTATIONS or key.startswith("x-"):
                continue
            if key in ("$defs", "definitions"):
                if not isinstance(inner, dict):
                    raise fail(at, "must be an object")
            elif key in LISTS:
                out[key] = self._list(key, inner, at, inlined)
            elif key in MAPS:
                out[key] = self._map(key, inner, at, inlined)
            elif key in SINGLE:
                out[key] = self.schema(inner, at, inlined=inlined)
            elif key == "$ref":
                out[key] = self._reference(inner, at)
            elif key in CHECKS:
                CHECKS[key](inner, at)
                if key == "uniqueItems":
                    continue
                out[key] = int(inner) if key.startswith(("min", "max")) and key not in ("minimum", "maximum") else inner
            elif key in REFUSED:
                raise fail(at, f"{key} cannot be enforced")
            else:
                raise fail(at, unknown_name("keyword", key, [*CHECKS, *LISTS, *MAPS, *SINGLE, "$ref", "$defs"]))
        _check_names(value, f"{path}/patternProperties")
        _rewrite(out, path)
        return out

    def _list(self, key: str, value: Any, path: str, inlined: tuple[str, ...]) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise fail(path, "must be a list of schemas with at least one")
        out = []
        for i, option in enumerate(value):
            if (
                key == "oneOf"
                and isinstance(option, dict)
                and "$ref" in option
                and not option.keys() - {"$ref", *ANNOTATIONS}
            ):
                # Options are told apart by what they hold, which a reference hides.
                place = self._place(option["$ref"], f"{path}/{i}/$ref")
                if place not in inlined:
                    out.append(self.schema(self._find(place), place, inlined=(*inlined, place)))
                    continue
            out.append(self.schema(option, f"{path}/{i}", inlined=inlined))
        return out

    def _map(self, key: str, value: Any, path: str, inlined: tuple[str, ...]) -> Schema:
        if not isinstance(value, dict):
            raise fail(path, "must be an object")
        if key == "patternProperties" and len(value) > MAX_PATTERN_PROPERTIES:
            raise fail(path, f"{len(value)} patterns; at most {MAX_PATTERN_PROPERTIES} are enforced")
        check_names(list(value), path)
        out = {}
        for name, inner in value.items():
            at = f"{path}/{name}"
            written = _pattern(name, at) if key == "patternProperties" else name
            out[written] = self.schema(inner, at, inlined=inlined)
        return out

    def _reference(self, value: Any, path: str) -> str:
        place = self._place(value, path)
        if place not in self.names:
            self.names[place] = str(len(self.names))
            self.waiting.append(place)
        return f"#/$defs/{self.names[place]}"

    def _place(self, value: Any, path: str) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise fail(path, f"{short(value)} does not point into this schema (#/…)")
        self._find(value, path)
        return value

    def _find(self, place: str, path: str = "") -> Any:
        """What a JSON pointer (RFC 6901) of the root points to."""
        value = self.root
        for step in place.split("/")[1:]:
            name = urllib.parse.unquote(step).replace("~1", "/").replace("~0", "~")
            try:
                value = value[int(name)] if isinstance(value, list) else value[name]
            except (KeyError, ValueError, IndexError, TypeError):
                raise fail(path, f"nothing stands at {place}") from None
        if place == "#" and isinstance(value, dict):
            return {key: inner for key, inner in value.items() if key not in ("$schema", "$id")}
        return value


def _check_names(schema: Schema, path: str) -> None:
    """Refuse patterns of names where some names match for one reader and not for another, and may be written."""
    names = {*schema.get("properties", ()), *schema.get("required", ())}
    if schema.get("additionalProperties") is False and all(name.isascii() and name.isprintable() for name in names):
        return
    for pattern in schema.get("patternProperties", ()):
        if VARYING.search(OTHER_ESCAPES.sub("", pattern)):
            why = "cannot be enforced: name its letters, or set additionalProperties to false and use plain names"
            raise fail(path, f"{short(pattern)} {why}")


def _rewrite(schema: Schema, path: str) -> None:
    """Patterns, formats, bounds: in a form that all readers take alike. What is not there stays so."""
    minimum = schema.get("minProperties", 0)
    if minimum > max(1, len(set(schema.get("required", ())))):
        # Names that the schema does not list may come twice, and count once.
        raise fail(f"{path}/minProperties", "more than 1, and more than are required, cannot be enforced")
    if schema.get("type") != "integer":
        for exclusive, inclusive, nearer, following, zero in (
            ("exclusiveMinimum", "minimum", max, DIGITS.next_plus, SMALLEST),
            ("exclusiveMaximum", "maximum", min, DIGITS.next_minus, -SMALLEST),
        ):
            if exclusive in schema:
                excluded = schema.pop(exclusive)
                bound = float(following(decimal.Decimal(repr(excluded)))) if excluded else zero
                schema[inclusive] = nearer(schema.get(inclusive, bound), bound)
    patterns = [_pattern(schema.pop("pattern"), f"{path}/pattern")] if "pattern" in schema else []
    if "format" in schema:
        patterns.append(f"^{portable(FORMATS[schema.pop('format')])}$")
    if patterns:
        schema["pattern"] = patterns[0]
    if len(patterns) == 2:
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": patterns[1]}]


def _pattern(pattern: str, path: str) -> str:
    try:
        return f"^{portable(pattern)}$"
    except ConfigError as error:
        raise fail(path, str(error)) from None


# ---- Recursion ----


def _named(definition: Any, place: str) -> Schema:
    """With its place in the schema that was given, for messages."""
    whole: Schema = {"allOf": [definition]} if isinstance(definition, bool) else definition
    return whole | {"$comment": place}


def subschemas(root: Schema) -> list[tuple[str, Schema]]:
    """The schemas inside a schema and their paths, the innermost first."""
    found, waiting = [], [("#", root)]
    while waiting:
        path, schema = waiting.pop(0)
        path = schema.get("$comment", path)
        found.append((path, schema))
        inner = [(f"{key}/{i}", value) for key in LISTS for i, value in enumerate(schema.get(key, ()))]
        inner += [(f"{key}/{name}", value) for key in (*MAPS, "$defs") for name, value in schema.get(key, {}).items()]
        inner += [(key, schema[key]) for key in SINGLE if key in schema]
        waiting += [(f"{path}/{at}", value) for at, value in inner if isinstance(value, dict)]
    return found[::-1]


def _check_ends(root: Schema) -> None:
    """Refuse references that come back to themselves, or to what would hold itself without end."""
    definitions = root.get("$defs", {})
    for name in definitions:
        seen: set[str] = set()
        waiting = [definitions[name]]
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, bool):
                continue
            waiting += [inner for key in ("allOf", "anyOf", "oneOf") for inner in schema.get(key, ())]
            target = schema.get("$ref", "").removeprefix("#/$defs/")
            if target == name:
                raise fail(definitions[name]["$comment"], "a $ref leads back to itself, with no object or list between")
            if target and target not in seen:
                seen.add(target)
                waiting.append(definitions[target])
    ending: set[str] = set()
    while new := {name for name in definitions.keys() - ending if _ends(definitions[name], ending)}:
        ending |= new
    for path, schema in subschemas(root):
        if not _ends(schema, ending):
            raise fail(path, "a value would have to hold itself, by $ref, without end")


def _ends(schema: Any, ending: set[str]) -> bool:
    """Whether some finite value may fit, when those of the definitions in `ending` may."""
    if isinstance(schema, bool):
        return True
    if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in ending:
        return False
    if not all(_ends(inner, ending) for inner in schema.get("allOf", ())):
        return False
    if not all(any(_ends(inner, ending) for inner in schema[key]) for key in ("anyOf", "oneOf") if key in schema):
        return False
    types = schema.get("type", TYPES)
    types = {types} if isinstance(types, str) else set(types)
    if types - {"array", "object"} or "const" in schema or "enum" in schema:
        return True
    return ("object" in types and _object_ends(schema, ending)) or ("array" in types and _array_ends(schema, ending))


def _object_ends(schema: Schema, ending: set[str]) -> bool:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    required = schema.get("required", ())
    if not all(_ends(properties.get(name, others), ending) for name in required):
        return False
    if required or not schema.get("minProperties"):
        return True
    values = [*properties.values(), *schema.get("patternProperties", {}).values(), others]
    return any(value is not False and _ends(value, ending) for value in values)


def _array_ends(schema: Schema, ending: set[str]) -> bool:
    first = schema.get("prefixItems", [])
    items = [*first, schema.get("items", True)]
    return all(_ends(item, ending) for item in items[: int(schema.get("minItems", 0))])
