"""Chat templates of public checkpoints: messages -> segments, each character knowing who wrote it.

A checkpoint ships its prompt as a Jinja template, and what counts is the text that the template renders, to the
character. But a rendered text alone does not say which part of it is the template's, where special tokens are meant,
and which is a user's, where they are an attack. So a conversation is rendered twice: as it is, and with an unguessable
word in place of each message. Putting the messages back must give the first rendering; whatever lies between them is
the template's. Templates that trim or take apart what people wrote are followed as long as the two still agree.
"""

import dataclasses
import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import TemplateError
from PIL import Image as PILImage

from mm_gpt.document import Image, Message, Segment, Text
from mm_gpt.errors import MMGPTError
from mm_gpt.templates.sandbox import MARKS, MAX_WORK, Generation, TemplateEnvironment, budget, searched_words
from mm_gpt.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class _Piece:
    """A stretch of the rendered text."""

    text: str
    generated: bool
    """Whether it stands in `{% generation %}`."""
    turn: "_Turn | None" = None
    """The message that it came from; None for the template's own text."""
    part: Text | None = None
    """The part of that message."""

    @property
    def is_content(self) -> bool:
        """Whether it is of the message's content, and not beside it, as tool calls and reasoning are."""
        if self.turn is None or self.part is None:
            return False
        # An answer that was looked up stands for its content, but vouches for its special tokens.
        return self.part.is_control or any(self.part is part for part in self.turn.parts)


class ChatTemplate:
    """A Jinja chat template, run in a sandbox."""

    def __init__(
        self,
        source: str,
        *,
        special: Mapping[str, str],
        where: str,
        end_tokens: Collection[str] = (),
        guarded: Collection[str] = (),
    ):
        """`special` are the template's variables `bos_token`, `eos_token`, ...; `where` names the file in errors.

        `end_tokens` close an assistant's turn, besides `eos_token`. `guarded` are all special tokens. Raises MMGPTError
        when the source is not a template.
        """
        self.source, self.special, self.where = source, dict(special), where
        self._end_tokens = tuple(end_tokens)
        ends = sorted({*end_tokens, *([special["eos_token"]] if "eos_token" in special else [])}, key=len)[::-1]
        self._end = re.compile(rf"\s*(?:{'|'.join(map(re.escape, ends))})" if ends else "(?!)")
        self._guarded = {*guarded, *ends}
        environment = TemplateEnvironment()
        try:
            tree = environment.parse(source)
            self._literals = searched_words(tree)
            uses = tree.find_all(nodes.ExtensionAttribute)
            self._has_generation = any(use.identifier == Generation.identifier for use in uses)
            self._template = environment.from_string(environment.bound(tree))
        except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise MMGPTError(f"{where}{line}: not a readable chat template ({_line(error)})") from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Compiled code does not travel between processes: the source does."""
        settings: dict[str, Any] = {"special": self.special, "where": self.where, "guarded": self._guarded}
        return partial(ChatTemplate, **settings, end_tokens=self._end_tokens), (self.source,)

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, where: str, name: str = "default") -> "ChatTemplate":
        """The template that came with `tokenizer`. Raises MMGPTError naming the ones that exist."""
        source = tokenizer.chat_templates.get(name)
        if source is None:
            known = ", ".join(sorted(tokenizer.chat_templates)) or "none"
            raise MMGPTError(f"{where}: no chat template named {name!r} (there: {known})")
        ends, special = tokenizer.end_tokens, tokenizer.special
        return cls(source, special=tokenizer.names, where=where, end_tokens=ends, guarded=special)

    def text(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, image_token: str | None = None, **extra: Any
    ) -> str:
        """The rendered text alone, as `apply_chat_template(..., tokenize=False)` gives it."""
        chat = [_Turn.of(index, message) for index, message in enumerate(messages)]
        variables = _variables(add_generation_prompt, extra)
        return self._run(self._data(chat, image_token, _same), variables)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, image_token: str | None = None, **extra: Any
    ) -> list[Segment]:
        """The conversation as segments whose texts, put together, are exactly the rendered text.

        The template's text is `is_control`, people's is not. `image_token` is what the template writes where an image
        belongs: it is replaced by the Image. An assistant's words and the end mark behind them are targets; in
        templates with `{% generation %}` that tag decides instead of the role. `extra` reaches the template as
        variables and is trusted. Raises MMGPTError for malformed messages and when the template fails.
        """
        chat = [_Turn.of(index, message) for index, message in enumerate(messages)]
        images = [part for turn in chat for part in turn.parts if isinstance(part, Image)]
        variables = _variables(add_generation_prompt, extra)
        real = self._run(self._data(chat, image_token, _same), variables)
        guarded = self._guarded | ({image_token} if image_token else set())
        kept = {literal for literal in self._literals if not any(token in literal for token in guarded)}

        def prompt(turn: _Turn) -> int:
            """The length of what is rendered before `turn`, -1 where that is no part of the whole."""
            try:
                opened = variables | {"add_generation_prompt": True}
                before = self._run(self._data(chat[: turn.index], image_token, _same), opened)
            except MMGPTError:
                return -1
            return len(before) if real.startswith(before) else -1

        for literals in (set(), kept):  # the second for templates that take messages apart at certain words
            found = self._follow(chat, image_token, literals, variables, real)
            if found is not None:
                return self._segments(found, images, image_token, prompt)
        return self._segments(self._search(chat, guarded, real), images, image_token, prompt)

    # ---- Rendering ----

    def _run(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any], marks: tuple[str, str] = ("", "")
    ) -> str:
        """The rendered text; `marks` are written around what `{% generation %}` encloses."""
        given = {**self.special, **variables, "messages": messages, MARKS: marks}
        try:
            with budget(MAX_WORK + 200 * len(str(given))):  # some templates walk through a string's characters
                return self._template.render(given)
        except Exception as error:  # a template is a program: whatever it raises is the template's fault
            raise MMGPTError(f"{self.where}: the chat template fails: {_line(error)}") from None

    def _data(self, chat: Sequence["_Turn"], image_token: str | None, put: Callable[..., str]) -> list[dict[str, Any]]:
        """The messages in the form that the template takes; `put(text, turn, part)` may replace each text."""
        messages = []
        for turn in chat:
            as_text = self._takes_text or not self._takes_parts if turn.is_text else not self._takes_parts
            if as_text:
                if image_token is None and any(isinstance(part, Image) for part in turn.parts):
                    raise MMGPTError(f"message {turn.index} has an image, but {self.where} has no image token")
                texts = [image_token or "" if isinstance(p, Image) else put(p.text, turn, p) for p in turn.parts]
                content: Any = "".join(texts)
            else:
                content = [
                    {"type": "image"}
                    if isinstance(part, Image)
                    else {"type": "text", "text": put(part.text, turn, part)}
                    for part in turn.parts
                ]
            rest = {key: self._plain(value, turn, key, put) for key, value in turn.rest.items()}
            messages.append({"role": turn.role, "content": content, **rest})
        return messages

    def _plain(self, value: Any, turn: "_Turn", key: str, put: Callable[..., str]) -> Any:
        """What a message holds besides its content (tool calls, reasoning), with each text through `put`."""
        if any(token in key for token in self._guarded):
            raise MMGPTError(f"message {turn.index} has a key with a special token in it: {key!r}")
        if isinstance(value, str):
            fixed = key in ("type", "id") and not any(token in value for token in self._guarded)
            return value if fixed else put(value, turn, Text(value))
        if isinstance(value, dict):
            return {str(k): self._plain(v, turn, str(k), put) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(v, turn, key, put) for v in value]
        if value is None or isinstance(value, int | float):
            return value
        raise MMGPTError(f"message {turn.index}: {key!r} is a {type(value).__name__}; only JSON values can be rendered")

    @cached_property
    def _takes_text(self) -> bool:
        """Whether the template reads a message's content as a string."""
        return self._reads(lambda word: word)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads a message's content as a list of parts."""
        return self._reads(lambda word: [{"type": "text", "text": word}])

    def _reads(self, form: Callable[[str], Any]) -> bool:
        word = "q" + secrets.token_hex(8)
        try:
            text = self._run([{"role": "user", "content": form(word)}], _variables(False, {}))
        except MMGPTError:
            return False
        return word in text and f"'{word}'" not in text and f'"{word}"' not in text  # a list, printed, is not read

    # ---- Who wrote what ----

    def _follow(
        self,
        chat: Sequence["_Turn"],
        image_token: str | None,
        literals: Collection[str],
        variables: Mapping[str, Any],
        real: str,
    ) -> list["_Piece"] | None:
        """`real` cut into the template's pieces and the messages', or None when it cannot be told who wrote what.

        `literals` in the messages stay where they are, because the template looks for them.
        """
        secret = "q" + secrets.token_hex(12)
        split = re.compile(f"({'|'.join(map(re.escape, sorted(literals, key=len)[::-1]))})" if literals else "(?!)")
        slots: list[_Piece] = []

        def put(text: str, turn: "_Turn", part: Text) -> str:
            pieces = split.split(text)
            for number in range(0, len(pieces), 2):  # the odd ones are the literals
                if pieces[number].strip():
                    slots.append(_Piece(pieces[number], False, turn, part))
                    pieces[number] = f"{secret}{len(slots) - 1}q"
            return "".join(pieces)

        try:
            marked = self._run(self._data(chat, image_token, put), variables, (f"{secret}inq", f"{secret}outq"))
        except MMGPTError:
            return None
        pieces: list[_Piece] = []
        generated = False
        for number, piece in enumerate(re.split(f"{secret}(\\d+|in|out)q", marked)):
            if number % 2 == 0:
                pieces += [_Piece(piece, generated)] if piece else []
            elif piece.isdigit():
                slot = slots[int(piece)]
                pieces.append(_Piece(slot.text, generated, slot.turn, slot.part))
            else:
                generated = piece == "in"
        texts = _align([_variants(p.text) if p.turn else [p.text] for p in pieces], real)
        if texts is None:
            return None
        return [dataclasses.replace(piece, text=text) for piece, text in zip(pieces, texts, strict=True)]

    def _search(self, chat: Sequence["_Turn"], guarded: Collection[str], real: str) -> list["_Piece"]:
        """For templates that rewrite messages: answers are looked up, and special tokens in messages are refused."""
        pieces: list[_Piece] = []
        at = 0
        for turn in chat:
            for part in turn.parts:
                if isinstance(part, Image):
                    continue
                forged = next((token for token in guarded if token in part.text), None)
                if forged is not None:
                    raise MMGPTError(
                        f"{self.where}: the chat template rewrites message {turn.index}, whose text contains the "
                        f"special token {forged!r}; remove it"
                    )
                if turn.role != "assistant" or not part.text.strip():
                    continue
                text = next((text for text in _variants(part.text) if real.count(text, at) == 1), None)
                if text is None:
                    raise MMGPTError(
                        f"{self.where}: the chat template rewrites message {turn.index}, so that it cannot be told "
                        "which part of the rendered text is the answer"
                    )
                start = real.index(text, at)
                pieces += [_Piece(real[at:start], False), _Piece(text, True, turn, Text(text, is_control=True))]
                at = start + len(text)
        return [*pieces, _Piece(real[at:], False)]

    def _segments(
        self,
        pieces: Sequence["_Piece"],
        images: Sequence[Image],
        image_token: str | None,
        prompt: Callable[["_Turn"], int],
    ) -> list[Segment]:
        """`prompt` tells where, in characters, a turn begins to be written by the model."""
        texts: list[Text] = []
        answer: _Turn | None = None  # the assistant's turn whose words came last and may now be closed
        last: _Turn | None = None  # whose words came last within one `{% generation %}`
        beside = False  # whether the answer's last words stand beside its content: a tool call, reasoning
        at = end_at = 0
        for number, piece in enumerate(pieces):
            at, end_at = end_at, end_at + len(piece.text)
            last = last if piece.generated else None
            if piece.turn is not None and piece.part is not None:
                last = piece.turn
                target = piece.turn.learned and piece.part.is_target
                target = target and (piece.generated or not self._has_generation)
                texts.append(Text(piece.text, is_target=target, is_control=piece.part.is_control))
                answer = piece.turn if target else None
                beside = not piece.is_content
                continue
            following = next((later for later in pieces[number:] if later.turn is not None), None)
            coming = None if following is None else following.turn
            between = answer is not None and coming is answer  # two pieces of one answer
            complete = answer is None or answer.complete  # an answer that was cut off does not teach to end there
            learned = 0
            if between or (piece.generated and answer is None):
                of = last or coming
                is_read = not between and of is not None and of.role == "assistant" and not of.learned
                learned = 0 if is_read else len(piece.text)
            elif piece.generated and complete:
                learned = len(piece.text.rstrip())  # a space behind an answer begins the next speaker's name
            elif answer is not None:
                # What closes a tool call is the model's to write, as its end is.
                end = (self._end.search if beside else self._end.match)(piece.text) if complete else None
                learned = end.end() if end else 0
                answer = None
            if following is not None and not (between or piece.generated or following.is_content):
                # What opens a tool call as well: all behind the prompt that the answer was given to.
                opened = prompt(coming) - at if coming is not None and coming.learned else -1
                if learned <= opened < len(piece.text):
                    texts.append(Text(piece.text[:learned], is_target=True, is_control=True))
                    texts.append(Text(piece.text[learned:opened], is_target=False, is_control=True))
                    texts.append(Text(piece.text[opened:], is_target=True, is_control=True))
                    continue
            texts.append(Text(piece.text[:learned], is_target=True, is_control=True))
            texts.append(Text(piece.text[learned:], is_target=False, is_control=True))
        return _with_images(texts, images, image_token, self.where)


@dataclass
class _Turn:
    """A checked message."""

    index: int
    role: str
    parts: list[Text | Image]
    is_text: bool
    complete: bool
    learned: bool
    rest: dict[str, Any]

    @classmethod
    def of(cls, index: int, message: Message) -> "_Turn":
        if not isinstance(message, dict) or message.get("content") is None:
            raise MMGPTError(f"message {index} is not a dict with 'role' and 'content'")
        role, content = message.get("role"), message["content"]
        if role not in ROLES:
            raise MMGPTError(f"message {index} has role {role!r}; use 'system', 'user' or 'assistant'")
        parts = list(content) if isinstance(content, list | tuple) else [content]
        own = ("role", "content", "complete", "weight")
        return cls(
            index,
            role,
            [content_part(index, part, is_target=role == "assistant") for part in parts],
            isinstance(content, str),
            message.get("complete", True),
            is_learned(index, message),
            {key: value for key, value in message.items() if key not in own and value is not None},
        )


def _variables(add_generation_prompt: bool, extra: Mapping[str, Any]) -> dict[str, Any]:
    now = datetime.now()  # one time for all renderings of a conversation
    clock = {"strftime_now": lambda pattern: now.strftime(pattern)}
    return {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt, **clock, **extra}


def _same(text: str, turn: "_Turn", part: Text) -> str:
    return text


def is_learned(index: int, message: Message) -> bool:
    """Whether message `index` is an answer to learn. Raises MMGPTError for a weight that is neither 0 nor 1."""
    weight = message.get("weight", 1)
    if weight not in (0, 1, None):
        raise MMGPTError(f"message {index} has weight {weight!r}; use 0 (not learned) or 1")
    return message.get("role") == "assistant" and weight != 0


def content_part(index: int, part: object, *, is_target: bool) -> Text | Image:
    """One part of message `index`, in any of the spellings in use. Raises MMGPTError for anything else."""
    if isinstance(part, str):
        return Text(part, is_target=is_target)
    if isinstance(part, Image | Text):
        return part
    if isinstance(part, PILImage.Image):
        return Image(part)
    if isinstance(part, dict):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return Text(part["text"], is_target=is_target)
        if part.get("type") in ("image", "image_url"):
            for key in ("image", "url", "path", "image_url"):
                source = part.get(key)
                if isinstance(source, dict):  # OpenAI's form: {"image_url": {"url": ...}}
                    source = source.get("url")
                if source is not None:
                    return Image(source)
        if part.get("type") in ("video", "video_url"):
            raise MMGPTError(f"message {index} has a video: models read text and images here; give frames as images")
    raise MMGPTError(f"message {index} has a part that is neither text nor image: {str(part)[:80]!r}")


def begins_with(segments: Sequence[Segment], token: str | None) -> bool:
    """Whether the rendered text begins with `token`.

    transformers' tokenizers add no `bos_token` to a rendered chat; its processors do, unless it is there already.
    """
    first = segments[0] if segments else None
    return bool(token) and isinstance(first, Text) and first.text.startswith(token or "")


def _with_images(texts: Sequence[Text], images: Sequence[Image], image_token: str | None, where: str) -> list[Segment]:
    """Neighbours that agree joined, and the images in the places that the template wrote for them."""
    segments: list[Segment] = []
    places = 0
    for text in texts:
        split = [text.text]
        if image_token and text.is_control:
            split = text.text.split(image_token)
        for number, piece in enumerate(split):
            if number:
                places += 1
                if places <= len(images):
                    segments.append(images[places - 1])
            last = segments[-1] if segments else None
            if not piece:
                continue
            if isinstance(last, Text) and (last.is_target, last.is_control) == (text.is_target, text.is_control):
                piece = last.text + piece
                segments.pop()
            segments.append(Text(piece, is_target=text.is_target, is_control=text.is_control))
    if places != len(images):
        raise MMGPTError(f"{where}: the chat template writes {places} places for {len(images)} images ({image_token})")
    return segments


def _variants(text: str) -> list[str]:
    """What a template may have made of `text`: itself first."""
    stripped = [text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n")]
    quoted = json.dumps(text, ensure_ascii=False)[1:-1]
    return list(dict.fromkeys([*stripped, text.rstrip("\n"), quoted]))


def _align(choices: Sequence[Sequence[str]], text: str) -> list[str] | None:
    """One of the choices for each piece such that they make up `text`; the first choices are preferred."""
    reached: list[dict[int, tuple[int, str]]] = [{0: (0, "")}]  # position -> where its last piece began, that piece
    for options in choices:
        step: dict[int, tuple[int, str]] = {}
        for start in reached[-1]:
            for option in options:
                if text.startswith(option, start):
                    step.setdefault(start + len(option), (start, option))
        reached.append(step)
    at, path = len(text), []
    for step in reversed(reached[1:]):
        if at not in step:
            return None
        at, piece = step[at]
        path.append(piece)
    return path[::-1] if at == 0 else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
