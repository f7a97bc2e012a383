"""Libraries for structured output side by side: start, compile, and the mask of a token.

Those that are installed of llguidance, xgrammar and outlines-core. The vocabulary is that of SmolLM2, or a list of
base64 tokens, one a line, as `.tiktoken` files are. A mask is the mean over the tokens of an answer, of the best of
several rounds; times are of the processor, so that other work on the machine counts little.

    python examples/benchmarks/structured_output.py --out docs/results/structured_output.json
"""

import argparse
import base64
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mm_gpt.hub.checkpoint import load_decoder
from mm_gpt.inference.detokenizer import TokenBytes

TREE = {
    "type": "object",
    "properties": {"v": {"type": "number"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "required": ["v", "kids"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PATTERN = {
    "type": "object",
    "properties": {"d": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}-[a-z]{1,20}$"}},
    "required": ["d"],
    "additionalProperties": False,
}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "person": (PERSON, '{"name":"Ada Lovelace of London","age":36,"email":"ada.lovelace@example.com"}'),
    "tree": (
        {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"},
        '{"v":1.5,"kids":[{"v":2,"kids":[{"v":7,"kids":[]}]}]}',
    ),
    "any object": ({"type": "object"}, '{"a":"some text that is free","b":[1,2,{"c":null}],"d":true}'),
    "pattern": (PATTERN, '{"d":"AB-1234-lowercaseletters"}'),
}
Library = tuple[Callable[[dict[str, Any]], Any], Callable[[Any], None], Callable[[Any, int], Any]]
"""Compile a schema; compute the mask of a state; let a state take an id."""


def llguidance(tokens: list[bytes], special: list[int], words: dict[bytes, int]) -> Library:
    import llguidance as library

    class Vocabulary:
        eos_token_id, bos_token_id, special_token_ids = special[0], None, special

        def __init__(self) -> None:
            self.tokens = tokens

        def __call__(self, text: bytes | str) -> list[int]:
            return greedy(text.encode() if isinstance(text, str) else text, words)

    vocabulary = library.LLTokenizer(library.TokenizerWrapper(Vocabulary()))
    bits = np.zeros((len(tokens) + 31) // 32, dtype=np.int32)

    def compile(schema: dict[str, Any]) -> Any:
        return library.LLMatcher(vocabulary, library.LLMatcher.grammar_from_json_schema(schema), log_level=0)

    return (
        compile,
        lambda state: state.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes),
        lambda state, id: state.consume_token(id),
    )


def xgrammar(tokens: list[bytes], special: list[int], words: dict[bytes, int]) -> Library:
    import xgrammar as library

    info = library.TokenizerInfo(
        tokens,
        vocab_type=library.VocabType.RAW,
        vocab_size=len(tokens),
        stop_token_ids=special[:1],
        add_prefix_space=False,
    )
    compiler = library.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    bits = library.allocate_token_bitmask(1, len(tokens))
    return (
        lambda schema: library.GrammarMatcher(compiler.compile_json_schema(json.dumps(schema), strict_mode=False)),
        lambda state: state.fill_next_token_bitmask(bits),
        lambda state, id: state.accept_token(id),
    )


def outlines_core(tokens: list[bytes], special: list[int], words: dict[bytes, int]) -> Library:
    import outlines_core as library
    from outlines_core.json_schema import build_regex_from_schema

    vocabulary = library.Vocabulary(special[0], {piece: [id] for piece, id in words.items()})
    bits = np.zeros((1, (len(tokens) + 31) // 32), dtype=np.int32)
    return (
        lambda schema: library.Guide(library.Index(build_regex_from_schema(json.dumps(schema)), vocabulary)),
        lambda state: state.write_mask_into(bits.ctypes.data, bits.size, bits.itemsize),
        lambda state, id: state.advance(id, return_tokens=False),
    )


LIBRARIES = {"llguidance": llguidance, "xgrammar": xgrammar, "outlines_core": outlines_core}


def greedy(data: bytes, words: dict[bytes, int]) -> list[int]:
    """Ids of a text, the longest token each time."""
    ids = []
    while data:
        size = next(n for n in range(min(len(data), 64), 0, -1) if data[:n] in words)
        ids.append(words[data[:size]])
        data = data[size:]
    return ids


def vocabulary(path: str | None) -> tuple[list[bytes], list[int]]:
    """The bytes of each id, and the special ids, the end first."""
    if path is None:
        tokenizer = load_decoder("smollm2-135m-instruct")[1]
        return TokenBytes(tokenizer).table(tokenizer.vocab_size), [
            *dict.fromkeys([*tokenizer.end_ids, *tokenizer.special.values()])
        ]
    tokens = [base64.b64decode(line.split()[0]) for line in Path(path).read_text().splitlines() if line.strip()]
    return [*tokens, b"<|endoftext|>"], [len(tokens)]


def measure(name: str, tokens: list[bytes], special: list[int], rounds: int) -> dict[str, Any]:
    words = {piece: id for id, piece in enumerate(tokens) if piece and id not in special}
    start = time.process_time()
    __import__(name)
    imported = time.process_time()
    compile, mask, take = LIBRARIES[name](tokens, special, words)
    result: dict[str, Any] = {
        "import_ms": 1e3 * (imported - start),
        "tokenizer_ms": 1e3 * (time.process_time() - imported),
    }
    for case, (schema, answer) in CASES.items():
        ids = greedy(answer.encode(), words)
        compiled, masks = [], []
        for _ in range(rounds):
            start = time.process_time()
            state = compile(schema)
            compiled.append(time.process_time() - start)
            spent = 0.0
            for id in ids:
                start = time.process_time()
                mask(state)
                spent += time.process_time() - start
                take(state, id)
            masks.append(spent / len(ids))
        result[case] = {"compile_ms": 1e3 * min(compiled), "mask_us": 1e6 * min(masks)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", help="base64 tokens, one a line; those of SmolLM2 without it")
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokens, special = vocabulary(args.tokens)
    result: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "vocabulary": len(tokens)}
    for name in args.libraries:
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed", file=sys.stderr)
            continue
        result[name] = measure(name, tokens, special, args.rounds)
        print(name, json.dumps(result[name]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
