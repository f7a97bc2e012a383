"""The Jinja sandbox in which chat templates of strangers run: what they may use, and how much of it.

The environment is the one that public templates are written for (blocks trimmed, `break` and `continue`, `tojson`,
`raise_exception`, `namespace`, `{% generation %}`). A template cannot reach Python behind its values. All that it does
is paid for out of a budget of work, before it is done: nodes of the template that run, characters that are read or
written, nested values that are compared or printed. Filters and methods that no prompt needs, and whose cost depends
on a number alone (`center`, `wordwrap`), are not there.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK = 5_000_000
"""For one rendering, besides what the length of the messages allows. On one core it is gone in some seconds."""
STEP = 20
"""The price of a value, next to a character of a text, which costs 1."""
MAX_BITS = 4096
"""Of a number."""
# A variable whose name holds a space: a template cannot read or write it.
MARKS = "generation marks"
_NO_FILTERS = {
    *("batch", "center", "filesizeformat", "forceescape", "groupby", "pprint", "random", "slice", "striptags"),
    *("truncate", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
}
_NO_METHODS = {
    *("center", "encode", "expandtabs", "ljust", "maketrans", "rjust", "translate", "zfill"),
    *("from_bytes", "to_bytes"),
}
_INNER_NAMES = {"_loop_vars", "_block_vars"}
"""Arguments that Jinja adds to calls."""
_AT_ONCE = {"attr", "count", "d", "default", "first", "items", "last", "length", "safe"}
"""Filters that do not look at all that they are given."""
_ONE_BY_ONE = {"list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"}
"""Filters that take every element and do not look into it."""
_TESTS_THAT_COMPARE = {"==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", ">", "gt", "greaterthan"} | {
    *("<=", "le", ">=", "ge", "in", "lower", "upper")
}
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\*|\d{4})")
_WIDE_BRACES = re.compile(r"\d{4}|\{[^{}]*\{")
_WIDEST = 1000
"""What the formats that pass these two can add to each value."""

_left: ContextVar[list[int]] = ContextVar("work left")


@contextmanager
def budget(work: int) -> Iterator[None]:
    """All templates that run inside it together may do so much."""
    token = _left.set([work])
    try:
        yield
    finally:
        _left.reset(token)


def spend(work: int) -> None:
    left = _left.get()
    left[0] -= work
    if left[0] < 0:
        raise SecurityError("it works too long, or writes too much")


def size_of(value: Any, indent: int = 0) -> int:
    """How much it is to read all of a nested value, or to write it with an `indent`; no more than is left is counted.

    Values that stand in several places count in each of them: that is how often they are printed.
    """
    if isinstance(value, str):
        return STEP + len(value)
    left, size = _left.get()[0], 0
    rest = [(value, 0)]
    while rest and size <= left:
        item, depth = rest.pop()
        size += STEP + indent * depth
        if isinstance(item, str | list | tuple | dict):
            size += len(item)
        if size > left or isinstance(item, str):
            continue
        if isinstance(item, dict):
            rest += [(key, depth) for key in item] + [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list | tuple):
            rest += [(inner, depth + 1) for inner in item]
        elif isinstance(item, range):
            size += STEP * len(item)
    return size


def _cost(name: str, value: Any, args: Sequence[Any], options: Mapping[str, Any]) -> int:
    """Of a filter or a method `name` on `value`, from what it reads and what it may write."""
    given = [*args, *options.values()]
    cost = 1 + size_of(value) + size_of(given)
    spend(0 if cost <= _left.get()[0] else cost)  # before anything is counted or printed
    numbers = [abs(number) for number in given if isinstance(number, int)]
    if name == "tojson":
        return cost + size_of(value, sum(numbers) + size_of(given))
    if name == "round" and numbers and max(numbers) > 100:
        raise SecurityError("it rounds to more than 100 digits")
    if name == "sum":
        starts = "start" in options or len(args) > 1  # with a list, which grows and is copied at each step
        return cost * (len(value) + 1) if starts and hasattr(value, "__len__") else cost
    if name not in ("replace", "join", "indent", "format"):
        return cost
    texts = [text for text in given if isinstance(text, str)]
    text = value if isinstance(value, str) else str(value)
    if name == "join":  # a filter of a list, or a method of what stands between
        between = text if isinstance(value, str) and not texts else max(texts, key=len, default="")
        longest = max((len(x) for x in (value, *given) if isinstance(x, list | tuple | str)), default=0)
        return cost + longest * len(between)
    if name == "replace":
        old = texts[0] if len(args) > 1 and texts else ""
        return cost + (text.count(old) + 1) * max(map(len, texts), default=0)
    if name == "indent":
        return cost + (text.count("\n") + 1) * max([*numbers, *map(len, texts), 4])
    if _WIDE_PERCENT.search(text):
        raise SecurityError("it pads a text too far")
    return cost + text.count("%") * (size_of(given) + _WIDEST)


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's name)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def mark(context: Context, caller: Callable[[], str]) -> str:
        before, behind = context.resolve(MARKS)
        return f"{before}{caller()}{behind}"


class SafeNamespace(Namespace):
    """A namespace whose fields a template cannot name like Python's inner ones."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no field {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # what is in it may be much larger than it
        return "<Namespace>"


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for, with bounds on time and memory."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        # Not optimized: no part of a template may run before there is a budget
        extensions = [Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        filters: dict[str, Any] = {**self.filters, "tojson": _to_json}
        tests: dict[str, Any] = self.tests
        self.filters = {name: _paid(name, call) for name, call in filters.items() if name not in _NO_FILTERS}
        tests.update({name: _paid(name, tests[name]) for name in _TESTS_THAT_COMPARE})
        self.globals = {
            "range": self.globals["range"],  # the sandbox's, which ends at 100,000
            "raise_exception": _raise_exception,
            "namespace": lambda *args, **kwargs: _namespace(dict(*args, **kwargs)),
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        }

    def bound(self, tree: nodes.Template) -> nodes.Template:
        """`tree` with all that it does paid for."""
        bounded = _Bounded(self).visit(tree)
        assert isinstance(bounded, nodes.Template)
        return bounded

    # ---- What the bounded tree calls ----

    def spent(self, work: int) -> str:
        spend(work)
        return ""

    def looked_at(self, value: Any) -> Any:
        spend(size_of(value))
        return value

    def cut_out(self, value: Any) -> Any:
        spend(STEP + len(value) if hasattr(value, "__len__") else STEP)
        return value

    def gone_through(self, value: Any) -> Any:
        spend(STEP * (1 + len(value) if hasattr(value, "__len__") else 1))
        return value

    def written(self, value: Any) -> str:
        spend(size_of(value))
        text = str(value)
        if not isinstance(value, str):
            spend(len(text))
        return text

    def join(self, *values: Any) -> str:
        return "".join(map(self.written, values))

    # ---- What Jinja calls ----

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        text: str = value.__self__

        def paid(*args: Any, **kwargs: Any) -> str:
            if _WIDE_BRACES.search(text):
                raise SecurityError("it pads a text too far")
            spend(len(text) + text.count("{") * (size_of([args, kwargs]) + _WIDEST))
            return formatted(*args, **kwargs)

        return paid

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if owner is self:  # the bounded tree's
            return obj(*args)
        if isinstance(owner, str | list | tuple):
            args = tuple(map(_settled, args))
            spend(_cost(obj.__name__, owner, args, kwargs))
        elif not isinstance(obj, Macro):  # whose body pays
            spend(size_of([args, [kwargs[name] for name in kwargs.keys() - _INNER_NAMES]]))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "*" and not numbers:
            for one, times in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(times, int):
                    spend(size_of(one) * max(times, 0))
        elif operator == "**" and numbers and left.bit_length() * right > MAX_BITS:
            raise SecurityError("it makes a number that is too large")
        elif operator == "%" and isinstance(left, str):
            spend(_cost("format", left, [right], {}))
        elif operator == "+" and not numbers:
            spend(size_of(left) + size_of(right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and result.bit_length() > MAX_BITS:
            raise SecurityError("it makes a number that is too large")
        return result


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that is paid for. It looks to Jinja as the one that it stands for."""
    inner = int(getattr(function, "jinja_pass_arg", None) is not None)  # Jinja's own argument comes first

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        given = [*args[:inner], *map(_settled, args[inner:])]
        value: Any = given[inner] if len(given) > inner else None
        if name in _AT_ONCE:
            spend(STEP)
        elif name in _ONE_BY_ONE:
            spend(STEP * (1 + len(value) if hasattr(value, "__len__") else 1))
        else:
            spend(_cost(name, value, given[inner + 1 :], kwargs))
        return function(*given, **kwargs)

    return paid


def _settled(value: Any) -> Any:
    """What `map` and `select` give, as a list, so that it can be measured."""
    return list(value) if isinstance(value, Iterator) else value


def _namespace(fields: dict[str, Any]) -> SafeNamespace:
    made = SafeNamespace()
    for name, value in fields.items():
        made[name] = value
    return made


class _Bounded(NodeTransformer):
    """Puts a price on what costs more the larger its values are, and on each pass through a loop or a macro."""

    def __init__(self, environment: TemplateEnvironment):
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node.iter = self._call("gone_through", [node.iter], node.lineno)  # a pass that `if` leaves out has a price, too
        return self._pass(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._pass(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._pass(node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        texts = [nodes.Const(n.data, lineno=n.lineno) if isinstance(n, nodes.TemplateData) else n for n in node.nodes]
        node.nodes = [self._call("written", [text], node.lineno) for text in texts]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("join", node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._looked_at(node.expr)
        for operand in node.ops:
            operand.expr = self._looked_at(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return self._call("cut_out", [node], node.lineno)
        node.arg = self._looked_at(node.arg)  # a key is hashed
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._looked_at(node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._looked_at(node)

    def _pass(self, node: Any) -> nodes.Node:
        """A pass through `node.body` costs as much as there is in it."""
        parts = sum(1 for part in node.body for _ in part.find_all(nodes.Node))
        work = nodes.Const(STEP + 5 * parts, lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("spent", [work], node.lineno), lineno=node.lineno))
        return node

    def _looked_at(self, node: nodes.Expr) -> nodes.Expr:
        return node if isinstance(node, nodes.Const) else self._call("looked_at", [node], node.lineno)

    def _call(self, name: str, args: list[Any], line: int) -> nodes.Call:
        call = nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)
        call.set_lineno(line)
        call.set_environment(self.environment)
        return call


STRING_METHODS = {
    *("split", "rsplit", "partition", "rpartition", "replace", "removeprefix", "removesuffix"),
    *("startswith", "endswith", "find", "rfind", "index", "count", "strip", "lstrip", "rstrip"),
}
"""Methods whose string arguments are words that a template looks for."""


def searched_words(tree: nodes.Template) -> set[str]:
    """The words that the template looks for in messages."""
    found: list[nodes.Node] = []
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in STRING_METHODS:
            found += call.args
    for test in tree.find_all(nodes.Compare):
        found += [test.expr for operand in test.ops if operand.op in ("in", "notin")]
    for filter in tree.find_all(nodes.Filter):
        found += filter.args if filter.name == "replace" else []
    words = (node.value for node in found if isinstance(node, nodes.Const))
    return {word for word in words if isinstance(word, str) and word.strip()}


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
