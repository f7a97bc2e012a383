"""Byte-level BPE tokenizers, from a `tokenizer.json` or from the vocabulary inside a GGUF file (via `tokenizers`)."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from mm_gpt.errors import CheckpointError

# GGUF names the split that comes before BPE. SmolLM2 writes numbers digit by digit.
GGUF_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}
GGUF_CONTROL = 3  # the token type of special tokens in GGUF


class Tokenizer:
    """Text <-> ids. Special tokens are recognised only where the caller says that the text is trusted."""

    def __init__(self, backend: tokenizers.Tokenizer, *, end_of_text: str, end_of_turn: str):
        self.backend = backend
        backend.encode_special_tokens = True  # plain text never becomes a special token
        self.special = {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        for token in (end_of_text, end_of_turn):
            if token not in self.special:
                raise CheckpointError(f"the tokenizer has no special token {token!r}")
        self.end_of_text, self.end_of_turn = end_of_text, end_of_turn
        self._split_special = re.compile("(" + "|".join(map(re.escape, sorted(self.special, key=len)[::-1])) + ")")

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def end_ids(self) -> tuple[int, int]:
        """Ids after which the model has said what it had to say."""
        return self.special[self.end_of_text], self.special[self.end_of_turn]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Special tokens written in it stay plain text unless `allow_special`."""
        return self.encode_runs([(text, False, allow_special)])[0]

    def encode_runs(self, runs: Sequence[tuple[str, bool, bool]]) -> tuple[list[int], list[bool]]:
        """Ids of the concatenated runs (text, is_target, allow_special), and for each id whether it is a target.

        Neighbouring runs are encoded as one string, as a chat template would. A token belongs to the run in which
        it starts.
        """
        ids: list[int] = []
        is_target: list[bool] = []
        pending: list[tuple[str, bool]] = []

        def flush() -> None:
            text = "".join(piece for piece, _ in pending)
            if text:
                encoding = self.backend.encode(text, add_special_tokens=False)
                owner = [target for piece, target in pending for _ in piece]
                ids.extend(encoding.ids)
                is_target.extend(owner[start] for start, _ in encoding.offsets)
            pending.clear()

        for text, target, allow_special in runs:
            for piece in self._split_special.split(text) if allow_special else [text]:
                if allow_special and piece in self.special:
                    flush()
                    ids.append(self.special[piece])
                    is_target.append(target)
                elif piece:
                    pending.append((piece, target))
        flush()
        return ids, is_target

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of `ids`; bytes that are not yet whole characters come out as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=not keep_special)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.backend.save(str(path))

    @classmethod
    def from_file(cls, path: Path, *, end_of_text: str, end_of_turn: str) -> "Tokenizer":
        """From a `tokenizer.json`. Raises CheckpointError naming the file."""
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from None
        return cls(backend, end_of_text=end_of_text, end_of_turn=end_of_turn)

    @classmethod
    def from_gguf_fields(cls, fields: dict[str, Any], where: str) -> "Tokenizer":
        """From the metadata of a GGUF file with byte-level BPE. Raises CheckpointError naming `where`."""
        pre = fields.get("tokenizer.ggml.pre", "gpt-2")
        if fields.get("tokenizer.ggml.model") != "gpt2" or pre not in GGUF_PRE_TOKENIZERS:
            raise CheckpointError(f"{where}: tokenizer {fields.get('tokenizer.ggml.model')!r}/{pre!r} is not supported")
        try:
            tokens = fields["tokenizer.ggml.tokens"]
            merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
            kinds, end_of_turn = fields["tokenizer.ggml.token_type"], tokens[fields["tokenizer.ggml.eos_token_id"]]
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"{where}: the tokenizer's metadata is not complete ({error})") from None
        backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        backend.pre_tokenizer = GGUF_PRE_TOKENIZERS[pre]()
        backend.decoder = decoders.ByteLevel()
        control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == GGUF_CONTROL]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
        return cls(backend, end_of_text="<|endoftext|>", end_of_turn=end_of_turn)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE learned from `texts`, with at most `vocab_size` ids."""
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = GGUF_PRE_TOKENIZERS["smollm"]()
        backend.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, end_of_text="<|endoftext|>", end_of_turn="<|im_end|>")
