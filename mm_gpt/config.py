"""Configuration is plain dataclasses. This module turns them into JSON and back, and refuses what it does not know."""

import ast
import dataclasses
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from mm_gpt.errors import ConfigError, unknown_name

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as a JSON-ready dict, nested dataclasses included."""
    return dataclasses.asdict(config)


def field_docs(cls: type) -> dict[str, str]:
    """What stands in the source under each field of a dataclass, on one line; its own fields, not inherited ones."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def from_dict(cls: type[T], values: dict[str, Any], *, where: str = "") -> T:
    """Build dataclass `cls` from `values`, checking every key and every type, nested dataclasses included.

    `where` names the source (a file, say) in messages. Raises ConfigError naming the key and the closest right one.
    """
    where = where or cls.__name__
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object with keys, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}: {unknown_name('key', key, fields)}")
    built = {}
    for name, field in fields.items():
        if name in values:
            built[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: missing key {name!r}")
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """The key, as an override would write it, at which two JSON-ready dicts differ; one that is missing differs."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None if one == other else where
    for key in [*one, *(key for key in other if key not in one)]:
        path = f"{where}.{key}" if where else key
        if key not in one or key not in other:
            return path
        if (found := first_difference(one[key], other[key], path)) is not None:
            return found
    return None


def override(config: T, assignments: list[str]) -> T:
    """Apply command-line overrides such as `optimizer.lr=1e-3` to a (nested) dataclass and return the new one.

    All of one dataclass take effect at once: values that must fit each other may be changed in any order.
    """
    tree: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"override {assignment!r} is not of the form key=value")
        *parents, last = path.split(".")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"{path}: {key!r} has no keys of its own")
        if isinstance(branch.get(last), dict):
            raise ConfigError(f"{path}: {_first_leaf(path, branch[last])} was given as well")
        branch[last] = text
    return _override_all(config, tree, "")


def check_numbers(
    config: Any,
    *names: str,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise ConfigError for the first of these fields whose number is out of bounds, infinite or NaN. None passes."""
    bounds = [("at least", at_least), ("above", above), ("at most", at_most), ("below", below)]
    wanted = " and ".join(f"{words} {bound:,}" for words, bound in bounds if bound is not None)
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        fits = (
            (isinstance(value, int) or math.isfinite(value))  # an int may be too large for a float
            and (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        )
        if not fits:
            raise ConfigError(f"{name} must be {wanted or 'a finite number'}, not {value}")


def _paths(config: Any, where: str = "") -> Iterator[str]:
    """Every key that may be assigned, as it is written."""
    for field in dataclasses.fields(config):
        yield f"{where}{field.name}"
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from _paths(value, f"{where}{field.name}.")


def _override_all(config: Any, tree: dict[str, Any], where: str) -> Any:
    names = [f.name for f in dataclasses.fields(config)]
    changes = {}
    for key, value in tree.items():
        path = f"{where}{key}"
        if key not in names:
            inside = next((each for each in _paths(config, where) if each.endswith(f".{key}")), None)
            if inside is not None:
                raise ConfigError(f"{_first_leaf(path, value)}: unknown key {key!r}; did you mean {inside!r}?")
            raise ConfigError(f"{_first_leaf(path, value)}: {unknown_name('key', key, names)}")
        if isinstance(value, dict):
            child = getattr(config, key)
            if not dataclasses.is_dataclass(child):
                raise ConfigError(f"{_first_leaf(path, value)}: {key!r} has no keys of its own")
            changes[key] = _override_all(child, value, f"{path}.")
        else:
            changes[key] = _parse(typing.get_type_hints(type(config))[key], value, path)
    return dataclasses.replace(config, **changes)


def _first_leaf(path: str, value: Any) -> str:
    """The whole path that somebody wrote, for messages."""
    while isinstance(value, dict):
        key, value = next(iter(value.items()))
        path = f"{path}.{key}"
    return path


def _parse(hint: Any, text: str, where: str) -> Any:
    _check_text(text, where)
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            return tuple(_parse(item, part, where) for part in text.split(",") if part)
        if dataclasses.is_dataclass(option):
            # `sources=chats.jsonl`: the one key that it cannot do without
            fields = dataclasses.fields(option)
            needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
            if len(needed) == 1:
                return from_dict(option, {needed[0]: text}, where=where)  # type: ignore[arg-type]
        try:
            if option is bool:
                return {"true": True, "false": False}[text.lower()]
            if option in (int, float, str):
                return option(text)
        except (KeyError, ValueError):
            continue
        if typing.get_origin(option) is typing.Literal:
            return _convert(option, text, where)
    raise ConfigError(f"{where}: cannot read {text!r} as {_name(hint)}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    if _is_union(hint):
        errors = []
        classes = [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]
        if isinstance(value, dict) and classes:
            # The one that knows most of the keys: its message names the wrong key inside
            return _convert(max(classes, key=lambda option: _known(option, value)), value, where)
        for option in typing.get_args(hint):
            if option is type(None):
                if value is None:
                    return None
                continue
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0] if errors else ConfigError(f"{where}: must be null")
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}: {unknown_name('value', str(value), map(str, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected an object with keys, got {value!r}")
        of_keys, item = typing.get_args(hint)
        return {_convert(of_keys, key, where): _convert(item, v, f"{where}.{key}") for key, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where=where)  # type: ignore[arg-type]
    if isinstance(value, str):
        _check_text(value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise ConfigError(f"{where}: expected {_name(hint)}, got {value!r}")


def _known(config: Any, values: dict[str, Any]) -> int:
    return len(values.keys() & {field.name for field in dataclasses.fields(config)})


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: half a character (a lone surrogate) in {text!a}") from None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
