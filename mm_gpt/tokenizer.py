"""Tokenizers, from a Hugging Face folder, OpenAI's GPT-2 files, or the vocabulary inside a GGUF file.

`tokenizers` does the splitting and merging. What is added here is trust: special tokens are recognised only in text
that a template wrote. Ids are those of one call of the backend on the whole text, because a split at the borders of
messages gives others (SentencePiece puts a space before a text's first word, byte-level BPE merges across borders).
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mm_gpt.errors import CheckpointError, MMGPTError

# GGUF names the split that comes before BPE. SmolLM2 writes numbers digit by digit.
GGUF_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}
GGUF_CONTROL = 3  # the token type of special tokens in GGUF
SPECIAL_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
"""The keys of `tokenizer_config.json` that a chat template may read as variables."""
VOCABULARIES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # the second: OpenAI's own names
# Contractions, words with one leading character, single digits, punctuation with its line ends, white space.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_GAPS = 100_000
"""Ids without a token that a vocabulary may have, besides as many as it has tokens."""
Span = tuple[int, int]


class Tokenizer:
    """Text <-> ids. Special tokens are recognised only where the caller says that the text is trusted."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        end_of_text: str,
        end_of_turn: str,
        more_ends: Sequence[int] = (),
        names: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        """`more_ends` are further ids that end an answer, `names` maps `bos_token` and the like to special tokens.

        `chat_templates` are Jinja sources by name. The backend is changed: its truncation and padding are turned off.
        """
        self.backend = backend
        backend.encode_special_tokens = False
        backend.no_truncation()  # some files carry the settings of their author's last call
        backend.no_padding()
        _keep_spaces_in_offsets(backend)
        self.special = {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        for token in (end_of_text, end_of_turn):
            if token not in self.special:
                raise CheckpointError(f"the tokenizer has no special token {token!r}")
        self.end_of_text, self.end_of_turn = end_of_text, end_of_turn
        self.names = dict(names or {})
        self.chat_templates = dict(chat_templates or {})
        self.end_ids = tuple(dict.fromkeys([self.special[end_of_text], self.special[end_of_turn], *more_ends]))
        """Ids after which the model has said what it had to say."""
        self._special_text = {id: text for text, id in self.special.items()}
        self._split_special = re.compile("|".join(map(re.escape, sorted(self.special, key=len)[::-1])))
        # What a character becomes that the vocabulary lacks is special in some files, and yet no forgery.
        probe = backend.encode("\U000ffffd", add_special_tokens=False).ids
        self._unknown = set(probe) & set(self._special_text)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab().values())

    @cached_property
    def fingerprint(self) -> str:
        """Names this tokenizer by all that decides its ids: 16 hexadecimal digits."""
        return hashlib.sha256(f"{self.backend.to_str()}{self.end_of_text}{self.end_of_turn}".encode()).hexdigest()[:16]

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """The texts of `end_ids`."""
        return tuple(token for token in map(self.backend.id_to_token, self.end_ids) if token is not None)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template."""
        return self.chat_templates.get("default")

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]]:
        """The ids that the file's own rule puts before and behind a text (`<s>` in Llama 2, nothing in GPT-2)."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        full = self.backend.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]

    @property
    def prefix_ids(self) -> list[int]:
        return self.affixes[0]

    def without_ids_from(self, vocab_size: int) -> "Tokenizer":
        """Without the added tokens that a decoder of `vocab_size` ids has no rows for: such text stays text.

        Gemma 3's text models come with the tokenizer of those that see, which has one more token.
        """
        state = json.loads(self.backend.to_str())
        for token in [token for token in state["added_tokens"] if token["id"] >= vocab_size]:
            state["added_tokens"].remove(token)
            if isinstance(state["model"].get("vocab"), dict):
                state["model"]["vocab"].pop(token["content"], None)
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
        return Tokenizer(
            backend,
            end_of_text=self.end_of_text,
            end_of_turn=self.end_of_turn,
            more_ends=[id for id in self.end_ids if id < vocab_size],
            names={name: token for name, token in self.names.items() if backend.token_to_id(token) is not None},
            chat_templates=self.chat_templates,
        )

    # ---- Text -> ids ----

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Special tokens written in it stay plain text unless `allow_special`."""
        return self.encode_runs([(text, False, allow_special)])[0]

    def encode_runs(self, runs: Sequence[tuple[str, bool, bool]]) -> tuple[list[int], list[bool]]:
        """Ids of the concatenated runs (text, is_target, allow_special), and for each id whether it is a target.

        The runs are encoded as one string. A token belongs to the run of its first character that is no space: the
        first word behind "Assistant: " is the answer's. Only where a run that does not `allow_special` holds a special
        token, or completes one, is the text encoded in another way: so that it stays text. Raises MMGPTError when the
        vocabulary leaves no way to write it as text.
        """
        text = "".join(piece for piece, *_ in runs)
        if not text:
            return [], []
        trusted = b"".join(bytes([allow]) * len(piece) for piece, _, allow in runs)
        encoding = self.backend.encode(text, add_special_tokens=False)
        ids, spans = encoding.ids, encoding.offsets
        if not self._special_text.keys().isdisjoint(ids):
            spans = [self._without_spaces(text, id, span) for id, span in zip(ids, spans, strict=True)]
            if self._forged(text, trusted, ids, spans):
                ids, spans = self._encode_guarded(text, trusted)
        target = [target for piece, target, _ in runs for _ in piece]
        return ids, [target[_first_letter(text, *span)] for span in spans]

    def _without_spaces(self, text: str, id: int, span: Span) -> Span:
        """Some special tokens swallow the spaces around them; the token itself is what remains."""
        if id not in self._special_text:
            return span
        piece = text[slice(*span)]
        return span[0] + len(piece) - len(piece.lstrip()), span[1] - len(piece) + len(piece.rstrip())

    def _forged(self, text: str, trusted: bytes, ids: Sequence[int], spans: Sequence[Span]) -> list[Span]:
        """Where special ids came out of text that nobody vouches for."""
        return [
            (start, end)
            for id, (start, end) in zip(ids, spans, strict=True)
            if id in self._special_text
            and 0 in trusted[start:end]
            and (id not in self._unknown or self._special_text[id] in text[start:end])
        ]

    @cached_property
    def _guarded(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int], str]:
        """A backend that knows each special token only by a secret name, so that no text can name it.

        Returns the backend, special token -> secret name, id of the secret name -> id of the special token, and a
        secret name that stands for nothing: it keeps apart what must not become one token.
        """
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        secret = secrets.token_hex(8)
        flags = {token.content: token for token in self.backend.get_added_tokens_decoder().values()}
        names = {token: f"{secret}n{id}n" for token, id in self.special.items()}
        cut = f"{secret}cut"
        backend.add_tokens(
            [
                AddedToken(name, special=False, normalized=False, lstrip=flags[t].lstrip, rstrip=flags[t].rstrip)
                for t, name in names.items()
            ]
            + [AddedToken(cut, special=False, normalized=False)]
        )
        ids = backend.get_vocab()
        meaning = {ids[name]: self.special[token] for token, name in names.items()}
        return backend, names, meaning, cut

    def _encode_guarded(self, text: str, trusted: bytes) -> tuple[list[int], list[Span]]:
        """Ids and spans of `text`, with special ids only where the text is trusted."""
        backend, names, meaning, cut = self._guarded
        cut_id = backend.token_to_id(cut)
        tokens: dict[int, str] = {}  # the special tokens in trusted text, by their start
        for stretch in re.finditer(rb"\x01+", trusted):
            for match in self._split_special.finditer(text, *stretch.span()):
                tokens[match.start()] = match.group()
        cuts: set[int] = set()
        while True:
            pieces: list[str] = []
            origin: list[int] = []  # for each character of the pieces, where it stands in `text`
            at = 0
            for place in sorted(tokens.keys() | cuts):
                pieces.append(text[at:place])
                origin += range(at, place)
                at = place
                if place in cuts:
                    pieces.append(cut)
                    origin += [place] * len(cut)
                if place in tokens:
                    pieces.append(names[tokens[place]])
                    origin += [place] * len(pieces[-1])
                    at += len(tokens[place])
            pieces.append(text[at:])
            origin += range(at, len(text) + 1)
            encoding = backend.encode("".join(pieces), add_special_tokens=False)
            ids: list[int] = []
            spans: list[Span] = []
            plain_ids: list[int] = []  # -1 for those that are special by right
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if id != cut_id:
                    ids.append(meaning.get(id, id))
                    plain_ids.append(-1 if id in meaning else id)
                    spans.append(self._without_spaces(text, plain_ids[-1], (origin[start], origin[end - 1] + 1)))
            forged = self._forged(text, trusted, plain_ids, spans)
            new = {start + 1 for start, end in forged if end - start > 1} - cuts
            if not forged:
                return ids, spans
            if not new:  # Unigram vocabularies hold special tokens as words: cutting them is all that can be done
                start, end = forged[0]
                raise MMGPTError(f"{text[start:end]!r} in a text can only be written as a special token; remove it")
            cuts |= new

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of `ids`; bytes that are not yet whole characters come out as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=not keep_special)

    # ---- Files ----

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self.backend.save(str(path))

    def save_folder(self, folder: Path) -> None:
        """Write what `from_hf_folder` reads: the vocabulary, and which ids end a text or an answer."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "tokenizer.json")
        names = {"eos_token": self.end_of_text, **self.names}
        (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")
        ends = {"eos_token_id": list(self.end_ids)}
        (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")

    @classmethod
    def from_file(
        cls,
        path: Path,
        *,
        end_of_text: str,
        end_of_turn: str,
        more_ends: Sequence[int] = (),
        names: Mapping[str, str] | None = None,
    ) -> "Tokenizer":
        """From a `tokenizer.json`. Raises CheckpointError naming the file."""
        backend = _read_backend(path)
        with _library_errors(f"{path}: the tokenizer does not work"):
            tokenizer = cls(backend, end_of_text=end_of_text, end_of_turn=end_of_turn, more_ends=more_ends, names=names)
            tokenizer.affixes  # noqa: B018 (the first text through all of its parts)
        return tokenizer

    @classmethod
    def from_hf_folder(cls, folder: Path) -> "Tokenizer":
        """From the tokenizer files of a Hugging Face folder, its end ids and chat templates included.

        The vocabulary is `tokenizer.json`, or `vocab.json` with `merges.txt` (`encoder.json` with `vocab.bpe`).
        Raises CheckpointError naming the file that is missing or broken.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        config = _read_json(folder / "tokenizer_config.json", optional=True)
        names = _special_names(folder, config)
        vocabulary = next((pair for pair in VOCABULARIES if all((folder / file).exists() for file in pair)), None)
        if (folder / "tokenizer.json").exists():
            backend = _read_backend(folder / "tokenizer.json")
        elif vocabulary is not None:
            kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
            if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
                raise CheckpointError(f"{folder}: lacks tokenizer.json, without which {kind} cannot be read")
            backend = _read_vocabulary(folder / vocabulary[0], folder / vocabulary[1], qwen2=kind == "Qwen2Tokenizer")
            names = _GPT2_NAMES[kind] | names
        elif (folder / "tokenizer.model").exists():
            raise CheckpointError(
                f"{folder}/tokenizer.model: a bare SentencePiece model is not read; write tokenizer.json with "
                "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        else:
            raise CheckpointError(f"{folder}: has neither tokenizer.json nor vocab.json with merges.txt")
        _add_tokens(backend, folder, config, names)
        bos = names.get("bos_token")
        bos_id = None if bos is None else backend.token_to_id(bos)
        if config.get("add_bos_token") and bos_id is not None and not (folder / "tokenizer.json").exists():
            post = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
            backend.post_processor = post  # tokenizer.json would say so itself
        ends, where = _end_ids(folder)
        eos = names.get("eos_token") or next((t for t in map(backend.id_to_token, ends) if t is not None), None)
        if eos is None:
            raise CheckpointError(f"{folder}/tokenizer_config.json: no eos_token, nor does {where} name an id")
        if backend.token_to_id(eos) is None:
            raise CheckpointError(f"{folder}: the vocabulary lacks the eos_token {eos!r}")
        _make_special(backend, [eos])
        templates = _chat_templates(folder, config)
        more_ends = [id for id in ends if backend.id_to_token(id) is not None]
        with _library_errors(f"{folder}: the tokenizer does not work"):
            tokenizer = cls(
                backend, end_of_text=eos, end_of_turn=eos, more_ends=more_ends, names=names, chat_templates=templates
            )
            tokenizer.affixes  # noqa: B018 (the first text through all of its parts)
        return tokenizer

    @classmethod
    def from_gpt2_files(cls, encoder_json: Path, vocab_bpe: Path) -> "Tokenizer":
        """From the files that OpenAI published for GPT-2 and GPT-3. Raises CheckpointError naming the file."""
        backend = _read_vocabulary(encoder_json, vocab_bpe)
        end = "<|endoftext|>"
        if backend.token_to_id(end) is None:
            raise CheckpointError(f"{encoder_json}: lacks {end}")
        _make_special(backend, [end])
        return cls(backend, end_of_text=end, end_of_turn=end, names=_GPT2_NAMES["GPT2Tokenizer"])

    @classmethod
    def from_bpe(
        cls,
        vocabulary: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        pre_tokenizer: pre_tokenizers.PreTokenizer,
        special: Sequence[str],
        end_of_turn: str,
        where: str,
    ) -> "Tokenizer":
        """A byte-level BPE from its parts, with GPT-2's end of a text. Raises CheckpointError naming `where`."""
        with _library_errors(f"{where}: the tokenizer does not work"):
            backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
            backend.pre_tokenizer = pre_tokenizer
            backend.decoder = decoders.ByteLevel()
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
            tokenizer = cls(backend, end_of_text="<|endoftext|>", end_of_turn=end_of_turn)
            tokenizer.affixes  # noqa: B018 (the first text through all of its parts)
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, split: str | None = None) -> "Tokenizer":
        """A byte-level BPE learned from `texts`, with at most `vocab_size` ids.

        `split` is a regular expression whose matches no merge crosses; SmolLM2's rule when there is none.
        """
        backend = tokenizers.Tokenizer(models.BPE())
        if split is None:
            backend.pre_tokenizer = GGUF_PRE_TOKENIZERS["smollm"]()
        else:
            words = pre_tokenizers.Split(Regex(split), "isolated")
            as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
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


def _first_letter(text: str, start: int, end: int) -> int:
    """Where the first character of a span stands that is no white space; its start if there is none."""
    piece = text[start:end]
    spaces = len(piece) - len(piece.lstrip())
    return min(start, len(text) - 1) if spaces == len(piece) else start + spaces


_GPT2_NAMES = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


def _keep_spaces_in_offsets(backend: tokenizers.Tokenizer) -> None:
    """Turn off `trim_offsets`: it hides that a token starts with the space before its word, in another run perhaps."""
    if backend.post_processor is None:
        return
    post = backend.post_processor
    state = json.loads(post.__getstate__())
    for step in state.get("processors", [state]):
        if "trim_offsets" in step:
            step["trim_offsets"] = False
    post.__setstate__(json.dumps(state).encode())
    backend.post_processor = post


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """The Rust library raises bare Exception, and BaseException where it fails itself."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except MMGPTError as error:
        raise CheckpointError(f"{what.partition(': ')[0]}: {error}") from None
    except BaseException as error:
        raise CheckpointError(f"{what} ({error})") from None


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    with _library_errors(f"{path}: not a readable tokenizer"):
        backend = tokenizers.Tokenizer.from_file(str(path))
    ids = backend.get_vocab().values()
    if max(ids, default=0) > MAX_GAPS + 2 * len(ids):  # the library counts all the way to the last id
        raise CheckpointError(f"{path}: its ids go up to {max(ids)}, but it has {len(ids)} tokens")
    return backend


def _read_vocabulary(vocabulary: Path, merges: Path, *, qwen2: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE from token -> id and a list of merges, with the split of GPT-2 or of Qwen2."""
    ids = _read_json(vocabulary)
    lines = _read_text(merges).split("\n")
    pairs: list[Any] = [tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{merges}: line {next(p for p in pairs if len(p) != 2)} is not a pair of tokens")
    if any(token.endswith("</w>") for token in ids):
        raise CheckpointError(f"{vocabulary}: not a byte-level vocabulary (its words end in </w>)")
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{merges}: does not fit {vocabulary.name} ({error})") from None
    backend.pre_tokenizer = GGUF_PRE_TOKENIZERS["gpt-2"]()
    if qwen2:
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _special_names(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like -> the token's text."""
    values = config
    if "added_tokens_decoder" not in config:  # older folders keep the names in a file of their own
        values = config | _read_json(folder / "special_tokens_map.json", optional=True)
    return {name: _text_of(values[name]) for name in SPECIAL_NAMES if values.get(name)}


def _add_tokens(backend: tokenizers.Tokenizer, folder: Path, config: dict[str, Any], names: Mapping[str, str]) -> None:
    """Add what the files beside the vocabulary name, and mark as special what may never come out of plain text."""
    declared: dict[int, AddedToken] = {}
    try:
        for id, token in config.get("added_tokens_decoder", {}).items():
            declared[int(id)] = AddedToken(**token)
        for text, id in _read_json(folder / "added_tokens.json", optional=True).items():
            declared.setdefault(int(id), AddedToken(text, normalized=text not in names.values()))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: added_tokens_decoder or added_tokens.json is malformed ({error})") from None
    for id, token in sorted(declared.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != id:
            got = backend.token_to_id(token.content)
            raise CheckpointError(f"{folder}: {token.content!r} is declared as id {id}, but the vocabulary gives {got}")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise CheckpointError(f"{folder}/tokenizer_config.json: the extra special tokens {extra!r} are no list")
    known = [t for t in [*names.values(), *map(_text_of, extra)] if backend.token_to_id(t) is not None]
    # An image placeholder that plain text could write would open a place for an image that is not there.
    model = _read_json(folder / "config.json", optional=True)
    added = backend.get_added_tokens_decoder()
    images = [model[key] for key in ("image_token_id", "image_token_index") if isinstance(model.get(key), int)]
    _make_special(backend, [*known, *(added[id].content for id in images if id in added)])


def _make_special(backend: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in tokens:
        old = added.get(text) or AddedToken(text, normalized=False)
        if not old.special or text not in added:
            flags = {"lstrip": old.lstrip, "rstrip": old.rstrip, "single_word": old.single_word}
            backend.add_special_tokens([AddedToken(text, special=True, normalized=old.normalized, **flags)])


def _end_ids(folder: Path) -> tuple[list[int], str]:
    """The ids that end an answer, and the file that says so. A generation config outranks the model's."""
    for file in ("generation_config.json", "config.json"):
        values = _read_json(folder / file, optional=True)
        for part in (values, values.get("text_config") or {}):
            ends = part.get("eos_token_id")
            if ends is not None:
                ends = ends if isinstance(ends, list) else [ends]
                if not all(isinstance(id, int) and 0 <= id < 1 << 32 for id in ends):
                    raise CheckpointError(f"{folder / file}: eos_token_id {ends} is not a list of ids")
                return ends, file
    return [], "config.json"


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name, from the places where transformers looks, its order kept."""
    named = {path.stem: _read_text(path) for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    for file in ("processor_config.json", "chat_template.json"):
        template = _read_json(folder / file, optional=True).get("chat_template")
        if template is not None:
            return named | _by_name(template, folder / file)
    if (folder / "chat_template.jinja").exists():
        return named | {"default": _read_text(folder / "chat_template.jinja")}
    return named | _by_name(config.get("chat_template") or {}, folder / "tokenizer_config.json")


def _by_name(template: Any, path: Path) -> dict[str, str]:
    if isinstance(template, str):
        return {"default": template}
    try:
        pairs = template.items() if isinstance(template, dict) else [(t["name"], t["template"]) for t in template]
        named = dict(pairs)
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(source, str) for source in named.values()):
        raise CheckpointError(f"{path}: chat_template is neither a template nor a list of named ones")
    return named


def _text_of(token: Any) -> str:
    """A token's text: files write it bare, or as an object with its flags."""
    return str(token.get("content") if isinstance(token, dict) else token)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as text ({error})") from None


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; an empty one when the file is `optional` and not there."""
    if not path.exists():
        if optional:
            return {}
        raise CheckpointError(f"{path}: no such file")
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number without end
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values
