"""The Jinja sandbox in which chat templates of strangers run: what they may use, and how much of it.

The environment is the one that public templates are written for (blocks trimmed, `break` and `continue`, `tojson`,
`raise_exception`, `namespace`, `{% generation %}`). A template cannot reach Python behind its values, and loops, long
texts and large numbers are bounded. A filter that makes one huge text in one step is not.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_LOOPS = 1_000_000
MAX_CHARACTERS = 20_000_000
MAX_BITS = 4096
"""Bounds on what a template may do: passes through loops and macros, length of a text, size of a number."""
# Variables whose names hold a space: a template cannot read or write them.
BUDGET, MARKS = "loop budget", "generation marks"


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


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment that chat templates are written for, with bounds on time and memory."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["namespace"] = lambda *args, **kwargs: _namespace(dict(*args, **kwargs))
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)

    def bound(self, tree: nodes.Template) -> nodes.Template:
        """`tree` with its loops, macros and joined texts counted."""
        bounded = _Bounded(self).visit(tree)
        assert isinstance(bounded, nodes.Template)
        return bounded

    @pass_context
    def counted(self, context: Context, items: Any) -> Any:
        """`items`, a loop's, after its passes have been taken from the budget."""
        items = items if hasattr(items, "__len__") else list(items)
        budget = context.resolve(BUDGET)
        budget[0] -= len(items) + 1
        if budget[0] < 0:
            raise SecurityError("it loops too often")
        return items

    def join(self, *values: Any) -> str:
        return self.bounded("".join(map(str, values)))

    def bounded(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple) and len(value) > MAX_CHARACTERS:
            raise SecurityError(f"it makes a text of more than {MAX_CHARACTERS} characters")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SecurityError("it makes a number that is too large")
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(times, int) and len(one) * times > MAX_CHARACTERS:
                    raise SecurityError(f"it makes a text of more than {MAX_CHARACTERS} characters")
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * right > MAX_BITS:
            raise SecurityError("it makes a number that is too large")
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\*|\d{5})", left):
            raise SecurityError("it pads a text too far")
        return self.bounded(super().call_binop(context, operator, left, right))


def _namespace(fields: dict[str, Any]) -> SafeNamespace:
    made = SafeNamespace()
    for name, value in fields.items():
        made[name] = value
    return made


class _Bounded(NodeTransformer):
    """Counts the passes through loops and macros, and checks the length of each `a ~ b`."""

    def __init__(self, environment: TemplateEnvironment):
        self.environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._call("counted", [node.iter], node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        one = nodes.Const("", lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(self._call("counted", [one], node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("join", node.nodes, node.lineno)

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
