"""Prompts with completions, and which of them are preferred: TRL's layouts, RLAIF-V, LLaVA-RLHF, HH.

A row is a `Comparison`. Stores and training know it as a `Conversation` of the prompt and its best completion, which
is what supervised fine-tuning learns; `metadata` holds the rest.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from math import isfinite
from typing import Any

from mm_gpt.datasets.formats.conversations import MARKER, RowImages, conversation_of, message_turns, speaker_turns
from mm_gpt.datasets.formats.interleaved import each_file
from mm_gpt.datasets.reading.files import base_name, folder_of
from mm_gpt.datasets.reading.rows import plain_text, read_rows
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter
from mm_gpt.document import Image, Message

COMPARISON = "comparison"
"""Of a conversation's metadata: all of a comparison that its messages do not say."""
CHAT_COLUMNS = ("conversations", "messages", "texts")
IMAGE_COLUMNS = ("images", "image", "file_names", "file_name")
_HUMAN = "\n\nHuman:"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Completion:
    """One answer to a prompt."""

    messages: tuple[Message, ...]
    """The assistant's turns, usually one; `content` is a list of strings."""
    rank: int = 0
    """Lower is better; completions of equal rank are not compared."""
    label: bool | None = None
    """Feedback without a pair: good or bad."""
    logprob: float | None = None
    """Nats, summed over its tokens: of the reference policy, where the data has it."""

    @property
    def text(self) -> str:
        """What the assistant says, without marks."""
        said = [part for message in self.messages if message["role"] == "assistant" for part in _parts(message)]
        return "".join(part for part in said if isinstance(part, str))


@dataclass(frozen=True)
class Comparison:
    """A prompt and its completions. Images are not decoded."""

    key: str
    prompt: tuple[Message, ...]
    """`content` is a list of strings and `mm_gpt.document.Image`s."""
    completions: tuple[Completion, ...] = ()
    """None: a prompt alone; two: a pair, the better one first; K of them with ranks."""
    is_text: bool = False
    """The completion continues the text of the prompt's only message, without a chat template."""
    margin: float | None = None
    """By how much the first of a pair is better."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, JSON values: reward functions get them."""

    @property
    def best(self) -> Completion | None:
        """The first of the best rank that is not labelled as bad."""
        return min((c for c in self.completions if c.label is not False), key=lambda c: c.rank, default=None)


def is_comparison(keys: set[str]) -> bool:
    """Whether a row with these keys is one of the layouts with answers."""
    return any(
        needed <= keys
        for needed in (
            {"chosen", "rejected"},
            {"prompt", "completion"},
            {"prompt", "completions"},
            {"conversations", "output_1", "output_2"},
        )
    )


def read_comparisons(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Conversation]:
    """The rows of JSON, JSON lines or parquet files, in any of these layouts:

    - TRL's: `prompt` alone; with `completion`, and a `label` (true: good); with `chosen` and `rejected`, which may hold
      the prompt instead. Texts are continued as they are, lists of messages are chats. `margin`, `ref_chosen_logps` and
      `ref_rejected_logps` (nats, summed; `ref_logps` of a single completion) are kept
    - `prompt`, `completions` and `ranks` (lower is better, equal is not compared) or `scores` (higher is better)
    - RLAIF-V: `image`, `question`, `chosen`, `rejected`
    - LLaVA-RLHF: `image`, `conversations`, `output_1`, `output_2` and `preference`, 1 or 2
    - HH: texts of `\\n\\nHuman:` and `\\n\\nAssistant:` turns
    - conversations of any kind that `read_conversations` knows: the last answer is the completion.

    `images` (or `image`) stand where content parts `{"type": "image"}` or `<image>` say, else before the first
    question; a text with images is a chat. `images` is the folder or URL prefix of named ones, by default the one that
    holds the file. Rows of stepwise supervision (`labels` of `completions`) are counted: nothing here learns from them.

    Raises MMGPTError when a file cannot be opened or is not JSON or parquet.
    """

    def read_one(file: str) -> Iterator[Conversation]:
        folder = folder_of(file) if images is None else images
        for number, row in read_rows(file, errors):
            place = f"{base_name(file)}:{number}"
            try:
                yield as_conversation(comparison_of(row, place, errors, folder))
            except BadRecordError as error:
                errors.add(str(error), place)

    return each_file(location, errors, read_one)


def comparison_of(row: Mapping[str, Any], place: str, errors: ErrorCounter, folder: str) -> Comparison:
    """One row as `read_comparisons` reads it; `place` names it where it has no `id`. Raises BadRecordError."""
    row = {name: value for name, value in row.items() if value is not None}  # parquet fills what a row lacks
    has_answers = is_comparison({*row}) or bool({"chosen", "rejected"} & {*row})
    if not has_answers and ("prompt" not in row or {*row} & set(CHAT_COLUMNS)):
        if not {*row} & set(CHAT_COLUMNS):
            raise BadRecordError("no prompt")
        return comparison_in(conversation_of(row, place, errors, folder))
    key = row.get("id")
    key = str(key) if isinstance(key, int | str) and key != "" else place
    used = {"id", *IMAGE_COLUMNS}
    images = RowImages(row, folder)
    margin: Any = None
    if "output_1" in row and "output_2" in row:
        used |= {"conversations", "output_1", "output_2", "preference"}
        prompt, completions = _llava_rlhf(row, images)
        is_text = False
    elif {"chosen", "rejected"} & {*row}:
        used |= {"prompt", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps", "margin"}
        used |= {"question"} - ({"question"} if "prompt" in row else set())
        margin = row.get("margin")
        prompt, completions, is_text = _pair(row, images)
    else:
        is_text = isinstance(row["prompt"], str) and not images.listed
        asked = [] if is_text else _turns(row["prompt"])
        prompt = _text_prompt(row["prompt"]) if is_text else _prompt(asked, images)
        if "completions" in row:
            used |= {"prompt", "completions", "ranks", "scores", "labels", "ref_logps", "margin"}
            margin = row.get("margin")
            completions = _ranked(row, asked, is_text)
        elif "completion" in row:
            used |= {"prompt", "completion", "label", "ref_logps"}
            label = row.get("label")
            if label is not None and (not isinstance(label, int) or label not in (0, 1)):
                raise BadRecordError("label that is neither true nor false")
            answer = _answer(_own_turns(row["completion"], asked), is_text)
            completions = (Completion(answer, 0, None if label is None else bool(label), _number(row, "ref_logps")),)
        else:
            used |= {"prompt"}
            completions = ()
    columns = {name: value for name, value in row.items() if name not in used and _is_json(value)}
    found = Comparison(key, prompt, completions, is_text, _finite(margin, "margin"), columns)
    check_comparison(found)
    return found


def check_comparison(comparison: Comparison) -> None:
    """Raises BadRecordError for what cannot be learned from: nothing asked or answered, or equal answers that differ
    in rank.
    """
    if not comparison.prompt:
        raise BadRecordError("no prompt")
    if comparison.prompt[-1]["role"] not in ("user", "tool"):
        raise BadRecordError("a prompt that does not end with a question")
    if not any(part.strip() if isinstance(part, str) else True for part in _parts(comparison.prompt[-1])):
        raise BadRecordError("an empty prompt")
    for completion in comparison.completions:
        messages = completion.messages
        if not messages or messages[0]["role"] != "assistant":
            raise BadRecordError("a completion that does not begin with an answer")
        if any(message["role"] not in ("assistant", "tool") for message in messages):
            raise BadRecordError("a question inside a completion")
        if any(isinstance(part, Image) for message in messages for part in _parts(message)):
            raise BadRecordError("an image in a completion")
        if not completion.text.strip() and not any(message.get("tool_calls") for message in messages):
            raise BadRecordError("an empty completion")
    ranks: dict[str, int] = {}
    for completion in comparison.completions:
        if ranks.setdefault(_stripped(completion), completion.rank) != completion.rank:
            is_pair = len(comparison.completions) == 2
            raise BadRecordError("equal chosen and rejected" if is_pair else "equal completions of different rank")


# ---- Layouts ----

Answered = tuple[tuple[Message, ...], tuple[Completion, ...]]


def _llava_rlhf(row: Mapping[str, Any], images: RowImages) -> Answered:
    preference = row.get("preference")
    if isinstance(preference, bool) or preference not in (1, 2):
        raise BadRecordError("preference that is neither 1 nor 2")
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise BadRecordError("conversations are no list")
    prompt = tuple(speaker_turns(turns, images))
    outputs = [row["output_1"], row["output_2"]]
    texts = [plain_text(output.get("value") if isinstance(output, Mapping) else output) for output in outputs]
    if preference == 2:
        texts.reverse()
    return prompt, tuple(Completion(_said(text), rank) for rank, text in enumerate(texts))


def _pair(row: Mapping[str, Any], images: RowImages) -> tuple[tuple[Message, ...], tuple[Completion, ...], bool]:
    if not {"chosen", "rejected"} <= {*row}:
        raise BadRecordError("only one of chosen and rejected")
    both: list[Any] = [row["chosen"], row["rejected"]]
    asked: Any = row.get("prompt", row.get("question"))
    if asked is None and all(isinstance(text, str) and text.startswith(_HUMAN) for text in both):
        both = [_hh_turns(text) for text in both]
    if all(isinstance(text, str) for text in both):
        is_text = isinstance(asked, str | None) and ("prompt" in row or asked is None) and not images.listed
        if asked is None:
            size = _shared_text(*both)
            asked, both = both[0][:size], [text[size:] for text in both]
        prompt = _text_prompt(asked) if is_text else _prompt(_turns(asked), images)
        answers = [_answer(text, is_text) for text in both]
    else:
        is_text = False
        chats = [_turns(turns, "assistant") for turns in both]
        turns = [] if asked is None or isinstance(asked, str) else _turns(asked)
        if not turns:  # the prompt is what both begin with: a text beside it says it once more
            turns = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*chats, strict=False))]
            if turns in chats:
                raise BadRecordError("equal chosen and rejected" if chats[0] == chats[1] else "an empty completion")
            if not turns and isinstance(asked, str):
                turns = _turns(asked)
        prompt = _prompt(turns, images)
        answers = [_answer(_own_turns(chat, turns), is_text) for chat in chats]
    logprobs = (_number(row, "ref_chosen_logps"), _number(row, "ref_rejected_logps"))
    pair = zip(answers, logprobs, strict=True)
    return prompt, tuple(Completion(answer, rank, None, known) for rank, (answer, known) in enumerate(pair)), is_text


def _ranked(row: Mapping[str, Any], asked: list[Any], is_text: bool) -> tuple[Completion, ...]:
    given, count = row["completions"], len(row["completions"]) if isinstance(row["completions"], list) else 0
    if not count:
        raise BadRecordError("completions are no list, or an empty one")
    if "ranks" not in row and "scores" not in row:
        stepwise = "labels" in row
        raise BadRecordError("stepwise supervision, which is not read" if stepwise else "no ranks or scores")

    def each(name: str) -> list[Any]:
        values = row.get(name, [None] * count)
        if not isinstance(values, list) or len(values) != count:
            raise BadRecordError(f"{name} that are not one for each completion")
        return values

    if "ranks" in row:
        ranks = each("ranks")
        if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
            raise BadRecordError("a rank that is no whole number")
    else:
        scores = [_finite(score, "score") for score in each("scores")]
        order = sorted({score for score in scores if score is not None}, reverse=True)
        if None in scores:
            raise BadRecordError("score that is no number")
        ranks = [order.index(score) for score in scores if score is not None]
    labels = each("labels")
    if not all(label is None or isinstance(label, bool) for label in labels):
        raise BadRecordError("label that is neither true nor false")
    logprobs = [_finite(value, "ref_logps") for value in each("ref_logps")]
    answers = [_answer(_own_turns(value, asked), is_text) for value in given]
    return tuple(map(Completion, answers, ranks, labels, logprobs))


def _hh_turns(text: str) -> list[Message]:
    _, *pieces = _HH_TURN.split(text)
    turns = [
        {"role": "user" if speaker == "Human" else "assistant", "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if any(one["role"] == other["role"] for one, other in pairwise(turns)):
        raise BadRecordError("turns that do not alternate")
    return turns


def _shared_text(chosen: str, rejected: str) -> int:
    """The length of the prompt that two texts begin with, as TRL finds it: a space before the answers is theirs."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    size = next((at for at, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    return size - 1 if 0 < size < min(len(chosen), len(rejected)) and chosen[size - 1] == " " else size


# ---- Their parts ----


def _turns(value: Any, role: str = "user") -> list[Any]:
    """A list of messages as it is; a message, or a text of `role`, as one."""
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}]
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, list):
        raise BadRecordError("neither a text nor messages")
    # parquet fills what a message or a part lacks with null
    return [_without_nulls(turn) for turn in value]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _prompt(turns: Sequence[Any], images: RowImages) -> tuple[Message, ...]:
    """The prompt's messages. Images that nothing in it stands for come first in the first question, as in TRL."""
    if images.listed and not any(map(_is_place, _all_parts(turns))):
        first = next((at for at, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"), 0)
        content = turns[first].get("content") if turns and isinstance(turns[first], dict) else None
        parts = content if isinstance(content, list) else [content]
        places = [{"type": "image"}] * len(images.listed)
        turns = [{**turn, "content": [*places, *parts]} if at == first else turn for at, turn in enumerate(turns)]
    return tuple(message_turns(turns, images))


def _all_parts(turns: Sequence[Any]) -> Iterator[Any]:
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        yield from content if isinstance(content, list) else [content]


def _is_place(part: Any) -> bool:
    text = part.get("text") if isinstance(part, dict) else part
    is_image = isinstance(part, dict) and part.get("type") in ("image", "image_url")
    return is_image or (isinstance(text, str) and MARKER in text)


def _text_prompt(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": [text]},) if text else ()


def _own_turns(value: Any, prompt: list[Any]) -> Any:
    """A completion without the prompt that it may begin with."""
    if isinstance(value, str):
        return value
    turns = _turns(value, "assistant")
    return turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns


def _answer(value: Any, is_text: bool) -> tuple[Message, ...]:
    if isinstance(value, str):
        return _said(value if is_text else value.strip())
    if is_text:
        raise BadRecordError("a text and a completion of messages")
    return tuple(message_turns(_turns(value, "assistant"), RowImages({}, "")))


def _said(text: str) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": [text]},)


def _parts(message: Message) -> list[Any]:
    content = message.get("content")
    return list(content) if isinstance(content, list | tuple) else [] if content is None else [content]


def _stripped(completion: Completion) -> str:
    """What tells completions apart: white space around an answer does not."""
    said = [{**message, "content": "".join(map(str, _parts(message))).strip()} for message in completion.messages]
    return json.dumps(said, sort_keys=True, default=str)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    return _finite(row.get(name), name)


def _finite(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise BadRecordError(f"{name} that is no number")
    return float(value)


def _is_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False


# ---- As a conversation, which stores hold and fine-tuning learns ----


def as_conversation(comparison: Comparison) -> Conversation:
    """The prompt and its best completion; `comparison_in` gives the comparison back."""
    best = comparison.best
    about = {
        "turns": len(comparison.prompt),
        "completions": [
            {"messages": list(c.messages), "rank": c.rank, "label": c.label, "logprob": c.logprob}
            for c in comparison.completions
        ],
        "is_text": comparison.is_text,
        "margin": comparison.margin,
        "columns": dict(comparison.columns),
    }
    messages = (*comparison.prompt, *(best.messages if best is not None else ()))
    return Conversation(comparison.key, messages, metadata={COMPARISON: about})


def comparison_in(conversation: Conversation) -> Comparison:
    """The comparison that a conversation holds; of another one, its last answer is the completion.

    Raises BadRecordError when there is none.
    """
    about = conversation.metadata.get(COMPARISON)
    messages = tuple({**m, "content": _parts(m)} for m in conversation.messages)
    if not isinstance(about, Mapping):
        roles = [message["role"] for message in messages]
        size = len(roles) if "assistant" not in roles else max(at for at, r in enumerate(roles) if r == "assistant")
        found = Comparison(
            conversation.key,
            messages[:size],
            (Completion((messages[size],)),) if size < len(messages) else (),
            columns=conversation.metadata,
        )
    else:
        try:
            completions = tuple(map(_stored_completion, about["completions"]))
            prompt, is_text = messages[: int(about["turns"])], bool(about["is_text"])
            margin, columns = _finite(about["margin"], "margin"), dict(about["columns"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadRecordError("a comparison that is not whole") from None
        found = Comparison(conversation.key, prompt, completions, is_text, margin, columns)
    check_comparison(found)
    return found


def _stored_completion(value: Mapping[str, Any]) -> Completion:
    messages = tuple({**message, "content": _parts(message)} for message in value["messages"])
    label = value["label"]
    return Completion(messages, int(value["rank"]), None if label is None else bool(label), _number(value, "logprob"))


def learned_messages(conversation: Conversation) -> tuple[Message, ...]:
    """The messages of a conversation as fine-tuning learns them: of a comparison the completion alone.

    Raises BadRecordError when nothing is to be learned.
    """
    about = conversation.metadata.get(COMPARISON)
    if not isinstance(about, Mapping):
        return conversation.messages
    size = about.get("turns")
    if not isinstance(size, int) or size >= len(conversation.messages):
        raise BadRecordError("no answer to learn")
    read = ({**m, "weight": 0} if m["role"] == "assistant" else m for m in conversation.messages[:size])
    return (*read, *conversation.messages[size:])


def is_plain_text(conversation: Conversation) -> bool:
    """Whether a conversation is a text with its continuation, to be read without a chat template."""
    about = conversation.metadata.get(COMPARISON)
    return isinstance(about, Mapping) and about.get("is_text") is True
