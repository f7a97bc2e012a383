"""The keywords of JSON Schema: which are enforced, which only describe, which are refused; and the values they take."""

import decimal
import json
from collections.abc import Callable
from typing import Any

from mm_gpt.errors import ConfigError, unknown_name
from mm_gpt.inference.patterns import UNWRITABLE

Schema = dict[str, Any]
MAX_NAME = 1000
"""Characters of a property's name."""
MAX_LENGTH = 10_000
"""Of minLength, maxLength, and a text in const or enum."""
MAX_ITEMS = 1000
"""Of minItems, maxItems, minProperties and maxProperties."""
MAX_MULTIPLE = 1000
LARGEST, SMALLEST = 2.0**53, 1e-6
"""Between these a double holds whole numbers exactly, and any number of `DIGITS` digits as that which is nearest."""
DIGITS = decimal.Context(prec=15)

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment"),
    *("contentEncoding", "contentMediaType", "discriminator", "example"),  # the last two are OpenAPI's
}
REFUSED = {
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames", "dependentRequired"),
    *("dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties", "additionalItems"),
    *("$id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$vocabulary", "contentSchema"),
}
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
"""Keywords that hold a list of schemas."""
MAPS = ("properties", "patternProperties")
"""Keywords that hold schemas by name."""
SINGLE = ("items", "additionalProperties")

_DAY = r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
_YEAR = r"(?:\d{3}[1-9]|\d{2}[1-9]\d|\d[1-9]\d{2}|[1-9]\d{3})"
_LEAP = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = rf"(?:{_YEAR}-{_DAY}|{_LEAP}-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": "^[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "hostname": rf"^(?:{_LABEL}\.){{0,2}}{_LABEL}$",
    "email": rf"^[A-Za-z0-9_%+-]{{1,32}}(?:\.[A-Za-z0-9_%+-]{{1,15}}){{0,2}}@(?:{_LABEL}\.){{1,2}}[A-Za-z]{{2,20}}$",
    "ipv4": rf"^(?:{_BYTE}\.){{3}}{_BYTE}$",
    "ipv6": "^(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}$",
    "uri": rf"^https?://(?:{_LABEL}\.){{0,2}}{_LABEL}(?::[1-9]\d{{0,3}})?(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]*)*$",
}
"""The texts of a format that are written: those that every checker takes, not all that its standard knows."""


def fail(path: str, why: str) -> ConfigError:
    return ConfigError(f"json_schema at {path}: {why}")


Check = Callable[[Any, str], None]


def short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(limit: int) -> Check:
    def check(value: Any, path: str) -> None:
        if not _is_number(value) or value != int(value) or value < 0:
            raise fail(path, f"must be a whole number from 0, not {short(value)}")
        if value > limit:
            raise fail(path, f"{short(value)} is above {limit}, the most that is enforced")

    return check


def _number(value: Any, path: str) -> None:
    if not _is_number(value):
        raise fail(path, f"must be a number, not {short(value)}")
    if abs(value) > LARGEST or 0 < abs(value) < SMALLEST:
        raise fail(path, f"{short(value)} cannot be enforced: a number from {SMALLEST} to 2**53, or 0")
    if value != int(value) and DIGITS.create_decimal(repr(value)) != decimal.Decimal(repr(value)):
        raise fail(path, f"{short(value)} cannot be enforced: it has more than {DIGITS.prec} digits")


def _multiple(value: Any, path: str) -> None:
    if not _is_number(value) or value <= 0:
        raise fail(path, f"must be a number above 0, not {short(value)}")
    if value != int(value) or value > MAX_MULTIPLE:
        raise fail(path, f"{short(value)} cannot be enforced: a whole number up to {MAX_MULTIPLE}")


def _types(value: Any, path: str) -> None:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in TYPES:
            raise fail(path, unknown_name("type", str(name), TYPES))
    if not names:
        raise fail(path, "names no type")


def check_names(value: Any, path: str) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fail(path, "must be a list of names")
    if any(len(name) > MAX_NAME for name in value):
        raise fail(path, f"a name of more than {MAX_NAME} characters")


def _text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise fail(path, f"must be a text, not {short(value)}")


def _format(value: Any, path: str) -> None:
    if not isinstance(value, str) or value not in FORMATS:
        raise fail(path, unknown_name("format", str(value), FORMATS))


def _constant(value: Any, path: str) -> None:
    values = [value]
    while values:
        value = values.pop()
        if _is_number(value):
            _number(value, path)
        if isinstance(value, str) and (found := UNWRITABLE.search(value)):
            raise fail(path, f"the character {found.group()!a} cannot be enforced")
        if isinstance(value, str) and len(value) > MAX_LENGTH:
            raise fail(path, f"a text of {len(value)} characters; at most {MAX_LENGTH} are enforced")
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _constants(value: Any, path: str) -> None:
    if not isinstance(value, list) or not value:
        raise fail(path, "must be a list with at least one value")
    _constant(value, path)


def _no(value: Any, path: str) -> None:
    if value is not False:
        raise fail(path, "uniqueItems cannot be enforced")


CHECKS: dict[str, Check] = {
    "type": _types,
    "const": _constant,
    "enum": _constants,
    "required": check_names,
    "pattern": _text,
    "format": _format,
    "multipleOf": _multiple,
    "uniqueItems": _no,
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _number),
    **dict.fromkeys(("minLength", "maxLength"), _count(MAX_LENGTH)),
    **dict.fromkeys(("minItems", "maxItems", "minProperties", "maxProperties"), _count(MAX_ITEMS)),
}
