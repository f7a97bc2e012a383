"""The fields of a request: each is asked for by name and type, and what nobody asked for is refused."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mm_gpt.errors import closest
from mm_gpt.serving.server.errors import RequestError, invalid


def kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object", type(None): "null"}
    return names.get(type(value), "a number")


class Fields:
    """A JSON object of a request. null stands for a field that is not there."""

    def __init__(self, values: Any, path: str = ""):
        """Raises RequestError when `values` is no object; `path` says where it stands, and is empty at the top."""
        if not isinstance(values, dict):
            raise invalid(f"{path or 'the body'} must be an object, not {kind(values)}.", path, "invalid_type")
        self.values, self.path = values, path
        self._taken: set[str] = set()

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str) -> Any:
        """The value as it is, or None."""
        self._taken.add(name)
        return self.values.get(name)

    def wrong(self, name: str, wanted: str) -> RequestError:
        given = repr(self.values[name]) if isinstance(self.values[name], int | float) else kind(self.values[name])
        return invalid(f"{self.at(name)} must be {wanted}, not {given}.", self.at(name), "invalid_type")

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "a boolean")
        return value

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(name, "an integer")
        if not low <= value <= high:
            raise invalid(f"{self.at(name)} must be from {low} to {high}, not {value}.", self.at(name))
        return value

    def number(self, name: str, low: float, high: float, *, above: bool = False) -> float | None:
        """`above`: `low` itself is too little."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        if not low <= value <= high or not math.isfinite(value) or (above and value == low):
            span = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise invalid(f"{self.at(name)} must be {span}, not {value}.", self.at(name))
        return float(value)

    def choice(self, name: str, values: Iterable[str]) -> str | None:
        value = self.text(name)
        known = tuple(values)
        if value is not None and value not in known:
            raise invalid(f"{self.at(name)} must be {' or '.join(map(repr, known))}, not {value!r}.", self.at(name))
        return value

    def inside(self, name: str) -> "Fields | None":
        """An object within this one."""
        value = self.take(name)
        return None if value is None else Fields(value, self.at(name))

    def done(self, refused: Mapping[str, str] | None = None) -> None:
        """Raises RequestError for the first field that was not taken.

        `refused`: fields that the protocol has and this server does not, with the reason; null is fine for those.
        """
        refused = refused or {}
        for name, value in self.values.items():
            if name in self._taken or (name in refused and value is None):
                continue
            if name in refused:
                raise RequestError(
                    f"{self.at(name)} is not supported by this server: {refused[name]}.",
                    param=self.at(name),
                    code="unsupported_parameter",
                )
            close = closest(name, self._taken)
            hint = f" Did you mean {close!r}?" if close else ""
            raise RequestError(f"Unknown field {self.at(name)!r}.{hint}", param=self.at(name), code="unknown_parameter")
