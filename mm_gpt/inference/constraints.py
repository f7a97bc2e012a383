"""stand-in"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Constraint:
    regex: str | None = None


class GrammarState: ...


class Grammar:
    def start(self): ...


class Grammars:
    def __init__(self, tokenizer, vocab_size): ...
    def compile(self, constraint): ...
