"""Regular expressions in the part of the syntax that means the same to JavaScript, Python and Rust.

JSON Schema's `pattern` is JavaScript's; checkers use their own language's. What these read in different ways is
rewritten so that a text that matches here matches in all of them, or refused.
"""

import re
import warnings

from mm_gpt.errors import ConfigError

MAX_PATTERN = 2000
"""Characters of a pattern."""
MAX_GROUPS = 50
"""Groups inside each other."""
MAX_REPEAT = 10_000
ANY = r"(?s:.)"
# Fewer characters than each of the languages takes where a class is asked for, more where it is excluded.
CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}
EXCLUDED = {"d": r"\p{Nd}", "w": r"\p{L}\p{N}_", "s": r"\s\x1c-\x1f\x{feff}"}
CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
UNWRITABLE = re.compile("[\0-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that JSON text has no short escape for; the grammars of `llguidance` leave them away."""
OTHER_ESCAPES = re.compile(r"\\[^dDwWsS]")
VARYING = re.compile(r"\\[dDwWsS]|\.")
"""What some languages find in more texts than others, once other escapes are away."""
LINE_ENDS = r"\n\r\x{2028}\x{2029}"

_ESCAPE = r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[dDwWsSnrtfv]|0(?![0-9])|[^0-9A-Za-z\s])"
_TOKEN = re.compile(
    rf"""(?P<escape>{_ESCAPE})
    |(?P<set>\[\^?(?:\\.|[^\]\\])+\])
    |(?P<open>\((?:\?:|\?P?<[A-Za-z_]\w*>|(?!\?)))
    |(?P<close>\))
    |(?P<or>\|)
    |(?P<repeat>[*+?]|\{{(?P<least>\d+)(?:,(?P<most>\d*))?\}})
    |(?P<anchor>[\^$])
    |(?P<dot>\.)
    |(?P<literal>(?!\{{,\d*\}})[^\\\[(])""",
    re.VERBOSE | re.DOTALL,
)
_ITEM = re.compile(rf"(?P<escape>{_ESCAPE}|\\b)|(?P<literal>[^\\])", re.DOTALL)


def portable(pattern: str, *, whole: bool = False) -> str:
    """The pattern in Rust's syntax, for matching a whole text; unless `whole`, it may match anywhere in the text.

    Raises ConfigError for what is malformed, too large, or means different things in different languages.
    """
    if len(pattern) > MAX_PATTERN:
        raise ConfigError(f"a pattern of {len(pattern)} characters; at most {MAX_PATTERN} are read")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Python may read in another way one day; it is refused or escaped here
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{pattern!r} is not a regular expression ({error})") from None
    alternatives = [""]
    begins, ends = [False], [False]  # whether an alternative has ^ and $
    depth = at = 0
    repeatable = False
    while at < len(pattern):
        match = _TOKEN.match(pattern, at)
        if match is None or (ends[-1] and depth == 0 and match.lastgroup != "or"):
            raise _refused(pattern, at)
        kind, text = match.lastgroup, match.group()
        piece = ""
        if kind == "anchor":
            if depth or (text == "^" and (alternatives[-1] or begins[-1])):
                raise _refused(pattern, at)
            (begins if text == "^" else ends)[-1] = True
        elif kind == "or" and depth == 0:
            alternatives.append("")
            begins.append(False)
            ends.append(False)
        elif match["repeat"]:
            if not repeatable or max(int(match["least"] or 0), int(match["most"] or 0)) > MAX_REPEAT:
                raise _refused(pattern, at)
            piece = text
            at += pattern.startswith("?", match.end())  # as few as possible: the same texts
        elif kind == "open":
            depth += 1
            piece = "(?:"
        else:
            depth -= kind == "close"
            piece = _translate(pattern, at, str(kind), text)
        if depth > MAX_GROUPS:
            raise ConfigError(f"{pattern[:40]!r}…: more than {MAX_GROUPS} groups inside each other")
        repeatable = kind in ("escape", "set", "close", "dot", "literal")
        alternatives[-1] += piece
        at += len(text)
    anything = "" if whole else f"{ANY}*"
    full = (
        f"{'' if begin else anything}(?:{body}){'' if end else anything}"
        for body, begin, end in zip(alternatives, begins, ends, strict=True)
    )
    return f"(?:{'|'.join(full)})"


def _translate(pattern: str, at: int, kind: str, text: str) -> str:
    if kind == "dot":
        return f"[^{LINE_ENDS}]"
    if kind == "set":
        return _set(pattern, at, text)
    if kind == "literal":
        return _single(pattern, at, text)
    if kind == "escape":
        name = text[1]
        if name in CLASSES:
            return f"[{CLASSES[name]}]"
        if name.lower() in CLASSES:
            return f"[^{EXCLUDED[name.lower()]}]"
        return _single(pattern, at, text)
    return text


def _set(pattern: str, at: int, text: str) -> str:
    """A set in brackets. One such as [\\s\\S], of a class and its opposite, is any character."""
    negated = text.startswith("[^")
    items = [match.group() for match in _ITEM.finditer(text[1 + negated : -1])]
    if "".join(items) != text[1 + negated : -1]:
        raise _refused(pattern, at)
    opposites = [item for item in items if item in (r"\D", r"\W", r"\S")]
    if opposites:
        if not negated and all(item.lower() in items for item in opposites):
            return ANY
        raise _refused(pattern, at)
    parts = []
    i = 0
    while i < len(items):
        if items[i] in (r"\d", r"\w", r"\s"):
            parts.append((EXCLUDED if negated else CLASSES)[items[i][1]])
        elif items[i + 1 : i + 2] == ["-"] and i + 2 < len(items):
            low, high = (_character(pattern, at, item) for item in (items[i], items[i + 2]))
            parts.append(f"{literal(low)}-{literal(high)}" if low < high else _single(pattern, at, items[i]))
            i += 2
        else:
            parts.append(_single(pattern, at, items[i]))
        i += 1
    return f"[{'^' if negated else ''}{''.join(parts)}]"


def _single(pattern: str, at: int, item: str) -> str:
    character = _character(pattern, at, item)
    if UNWRITABLE.match(character):
        raise _refused(pattern, at)
    return literal(character)


def _character(pattern: str, at: int, item: str) -> str:
    """The character that an item without a class stands for."""
    if not item.startswith("\\"):
        return item
    if item[1:] == "b":
        return "\b"
    if item[1] in "xu" and len(item) > 2:
        character = chr(int(item[2:], 16))
        if "\ud800" <= character <= "\udfff":
            raise _refused(pattern, at)
        return character
    return CONTROLS.get(item[1], item[1])


def literal(text: str) -> str:
    """A pattern of exactly this text, in Rust's syntax."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


NEVER = (
    r"no look-around, back-reference, word border, named class, flag, or \D, \S, \W in a set; ^ and $ only at the ends"
)


def _refused(pattern: str, at: int) -> ConfigError:
    return ConfigError(f"{pattern!r}: {pattern[at : at + 4]!r} at {at} cannot be enforced ({NEVER})")
