"""Prompts with preferred answers: public layouts unchanged, what is counted, splits that leak nothing, writing."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import make_picture, make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.comparisons import Comparison, Comparisons, Completion, write_comparisons
from mm_gpt.datasets.formats.preferences import as_conversation, comparison_in, comparison_of
from mm_gpt.datasets.loading.index import Measure
from mm_gpt.datasets.loading.pieces import conversation_document
from mm_gpt.datasets.loading.sources import SourceConfig, open_sources
from mm_gpt.datasets.row_samples import from_hf_dataset, kind_of_row
from mm_gpt.datasets.samples import BadRecordError, Conversation, ErrorCounter
from mm_gpt.datasets.sources import read_samples
from mm_gpt.document import Image, Message, Text
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.processor import IGNORE_INDEX, Processor


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_GPT_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    make_picture(seed, (8, 8)).save(file, "PNG")
    return file.getvalue()


def user(*parts: Any) -> Message:
    return {"role": "user", "content": list(parts)}


def says(text: str) -> Message:
    return {"role": "assistant", "content": [text]}


ASKED = [{"role": "user", "content": "What color is the sky?"}]
BLUE, GREEN = ([{"role": "assistant", "content": f"It is {color}."}] for color in ("blue", "green"))
SKY = (user("What color is the sky?"),)
PAIR = (Completion((says("It is blue."),)), Completion((says("It is green."),), 1))
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <image>?"}]}]


def of(row: dict[str, Any], folder: Path | str = "/nowhere") -> Comparison:
    """The row's comparison, as stores give it back."""
    return comparison_in(as_conversation(comparison_of(row, "rows.jsonl:1", ErrorCounter(), str(folder))))


def shown(comparison: Comparison) -> list[list[Any]]:
    """The prompt's parts, an image by its file's name or its bytes."""
    return [
        [
            Path(str(p.source)).name if isinstance(p, Image) and not isinstance(p.source, bytes) else p
            for p in m["content"]
        ]
        for m in comparison.prompt
    ]


def texts(comparison: Comparison) -> list[str]:
    return [completion.text for completion in comparison.completions]


def put(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(("a.png", "b.png")):
        (folder / image).write_bytes(png(number))
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def open_rows(folder: Path, errors: ErrorCounter | None = None) -> Comparisons:
    return Comparisons.open([SourceConfig(path=".")], folder, errors or ErrorCounter())


# ---- Layouts ----


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": ASKED}, Comparison("rows.jsonl:1", SKY)),
        ({"prompt": "The sky is"}, Comparison("rows.jsonl:1", (user("The sky is"),), is_text=True)),
        (
            {"prompt": ASKED, "completion": BLUE, "id": 7},
            Comparison("7", SKY, (Completion((says("It is blue."),)),)),
        ),
        (
            {"prompt": "The sky is", "completion": " blue.", "label": True},
            Comparison("rows.jsonl:1", (user("The sky is"),), (Completion((says(" blue."),), label=True),), True),
        ),
        (
            {"prompt": ASKED, "completion": GREEN, "label": False, "ref_logps": -3},
            Comparison("rows.jsonl:1", SKY, (Completion((says("It is green."),), label=False, logprob=-3.0),)),
        ),
        ({"prompt": ASKED, "chosen": BLUE, "rejected": GREEN}, Comparison("rows.jsonl:1", SKY, PAIR)),
        ({"chosen": [*ASKED, *BLUE], "rejected": [*ASKED, *GREEN]}, Comparison("rows.jsonl:1", SKY, PAIR)),
        # UltraFeedback says the prompt once more as a text
        (
            {"prompt": "What?", "chosen": [*ASKED, *BLUE], "rejected": [*ASKED, *GREEN]},
            Comparison("rows.jsonl:1", SKY, PAIR),
        ),
        (
            {"prompt": ASKED, "chosen": [*ASKED, *BLUE], "rejected": [*ASKED, *GREEN], "score": [1, {"a": None}]},
            Comparison("rows.jsonl:1", SKY, PAIR, columns={"score": [1, {"a": None}]}),
        ),
        (
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green.", "margin": 2, "ref_chosen_logps": -1.5},
            Comparison(
                "rows.jsonl:1",
                (user("The sky is"),),
                (Completion((says(" blue."),), logprob=-1.5), Completion((says(" green."),), 1)),
                is_text=True,
                margin=2.0,
            ),
        ),
        (  # as TRL splits texts: the space is the answers'
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            Comparison(
                "rows.jsonl:1",
                (user("The sky is"),),
                (Completion((says(" blue."),)), Completion((says(" green."),), 1)),
                is_text=True,
            ),
        ),
        (
            {"prompt": ASKED, "completions": ["a", BLUE, GREEN[0]], "ranks": [2, 0, 0]},
            Comparison(
                "rows.jsonl:1",
                SKY,
                (Completion((says("a"),), 2), Completion(PAIR[0].messages), Completion(PAIR[1].messages)),
            ),
        ),
        (
            {"prompt": "x", "completions": ["a", "b", "c"], "scores": [0.5, 0.1, 0.5], "ref_logps": [-1, None, -2]},
            Comparison(
                "rows.jsonl:1",
                (user("x"),),
                (
                    Completion((says("a"),), logprob=-1.0),
                    Completion((says("b"),), 1),
                    Completion((says("c"),), logprob=-2.0),
                ),
                is_text=True,
            ),
        ),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Color?\n\nAssistant: Blue.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Color?\n\nAssistant: Green.",
            },
            Comparison(
                "rows.jsonl:1",
                (user("Hi"), says("Hello!"), user("Color?")),
                (Completion((says("Blue."),)), Completion((says("Green."),), 1)),
            ),
        ),
        (  # a conversation's last answer
            {"messages": [*ASKED, *GREEN, *ASKED, *BLUE], "source": "x"},
            Comparison(
                "rows.jsonl:1",
                (*SKY, says("It is green."), *SKY),
                (Completion((says("It is blue."),)),),
                columns={"source": "x"},
            ),
        ),
    ],
)
def test_layouts(row: dict[str, Any], expected: Comparison) -> None:
    nulls = {"image": None, "margin": None, "question": None, "rejected_ids": None}  # as parquet fills
    assert of(row) == expected
    assert of(nulls | row) == expected


def test_tool_calls_are_kept() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    answer = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "blue"}, *BLUE]
    found = of({"prompt": ASKED, "chosen": answer, "rejected": GREEN})
    assert found.completions[0].messages[0] == {"role": "assistant", "content": [], "tool_calls": [call]}
    assert texts(found) == ["It is blue.", "It is green."]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        # TRL, the images in parts: "<image>" in a text is text then
        ({"images": ["a.png"], "prompt": PARTS}, [["a.png", "What is <image>?"]]),
        # without a place: before the first question
        (
            {"images": ["a.png", "b.png"], "prompt": [{"role": "system", "content": "Be brief."}, *ASKED]},
            [["Be brief."], ["a.png", "b.png", "What color is the sky?"]],
        ),
        ({"image": "b.png", "prompt": "What is\n<image>"}, [["What is", "b.png"]]),
        ({"image": "b.png", "prompt": " What is this? "}, [["b.png", "What is this?"]]),
        ({"prompt": [user({"type": "image", "image": "a.png"}, {"type": "text", "text": "x"})]}, [["a.png", "x"]]),
        # RLAIF-V
        (
            {"image": {"bytes": png(), "path": "0.jpg"}, "question": "What?", "image_path": "x/0.jpg", "idx": 3},
            [[Image(png()), "What?"]],
        ),
    ],
)
def test_images(row: dict[str, Any], prompt: list[list[Any]], tmp_path: Path) -> None:
    found = of(row | {"chosen": "Blue.", "rejected": "Green."}, put(tmp_path))
    assert shown(found) == prompt
    assert (texts(found), found.is_text) == (["Blue.", "Green."], False)
    assert ("image_path" in found.columns) == ("image_path" in row)


def test_an_image_in_a_shared_prompt(tmp_path: Path) -> None:
    row = {"images": ["a.png"], "chosen": [*PARTS, *BLUE], "rejected": [*PARTS, *GREEN]}
    assert shown(of(row, put(tmp_path))) == [["a.png", "What is <image>?"]]


@pytest.mark.parametrize(("preference", "order"), [(1, ["one", "two"]), (2, ["two", "one"])])
def test_llava_rlhf(preference: int, order: list[str], tmp_path: Path) -> None:
    row = {
        "id": "000000",
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}],
        "output_1": {"from": "llava", "value": "one"},
        "output_2": {"from": "llava", "value": "two"},
        "preference": preference,
    }
    found = of(row, put(tmp_path))
    assert (found.key, shown(found), texts(found)) == ("000000", [["a.png", "What?"]], order)
    assert kind_of_row(row) == "comparisons"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ASKED, "chosen": BLUE}, "only one of chosen and rejected"),
        ({"prompt": ASKED, "chosen": BLUE, "rejected": BLUE}, "equal chosen and rejected"),
        ({"prompt": ASKED, "chosen": "yes ", "rejected": "yes"}, "equal chosen and rejected"),
        ({"chosen": [*ASKED, *BLUE], "rejected": [*ASKED, *BLUE]}, "equal chosen and rejected"),
        ({"chosen": "The sky", "rejected": "The sky"}, "an empty completion"),
        ({"chosen": [*ASKED, *BLUE], "rejected": ASKED}, "an empty completion"),
        ({"chosen": "yes", "rejected": "no"}, "no prompt"),
        ({"prompt": "", "chosen": "yes", "rejected": "no"}, "no prompt"),
        ({"prompt": " ", "chosen": "yes", "rejected": "no"}, "an empty prompt"),
        ({"prompt": "x", "chosen": "yes", "rejected": " "}, "an empty completion"),
        ({"prompt": "x", "completion": ""}, "an empty completion"),
        ({"prompt": ASKED, "completion": []}, "a completion that does not begin with an answer"),
        ({"prompt": ASKED, "completion": [*BLUE, *ASKED]}, "a question inside a completion"),
        ({"prompt": BLUE, "completion": BLUE}, "a prompt that does not end with a question"),
        ({"prompt": "x", "completion": BLUE}, "a text and a completion of messages"),
        ({"prompt": 5, "completion": "x"}, "neither a text nor messages"),
        ({"prompt": "x", "completion": "y", "label": "good"}, "label that is neither true nor false"),
        ({"prompt": "x", "completion": "y", "label": 2}, "label that is neither true nor false"),
        ({"prompt": "x", "chosen": "y", "rejected": "z", "margin": float("nan")}, "margin that is no number"),
        ({"prompt": "x", "chosen": "y", "rejected": "z", "ref_rejected_logps": "a"}, "ref_rejected_logps that is"),
        ({"prompt": "x", "completions": ["a", "b"], "labels": [True, False]}, "stepwise supervision"),
        ({"prompt": "x", "completions": ["a", "b"]}, "no ranks or scores"),
        ({"prompt": "x", "completions": [], "ranks": []}, "completions are no list, or an empty one"),
        ({"prompt": "x", "completions": ["a", "b"], "ranks": [1]}, "ranks that are not one for each"),
        ({"prompt": "x", "completions": ["a", "b"], "ranks": [1, True]}, "a rank that is no whole number"),
        ({"prompt": "x", "completions": ["a", "b"], "scores": [1, float("nan")]}, "score that is no number"),
        ({"prompt": "x", "completions": ["a", "b"], "scores": [1, None]}, "score that is no number"),
        ({"prompt": "x", "completions": ["a", "b", "a"], "ranks": [0, 1, 2]}, "equal completions of different rank"),
        ({"prompt": PARTS, "chosen": BLUE, "rejected": GREEN}, "more image markers than images"),
        ({"prompt": PARTS, "images": ["a.png", "b.png"], "completion": BLUE}, "more images than image markers"),
        ({"prompt": "<image> x", "image": "no.png", "completion": "y"}, "no image"),
        ({"prompt": "x", "image": "../x.png", "completion": "y"}, "image outside the folder"),
        ({"prompt": ASKED, "completion": [says({"type": "image", "image": "a.png"})]}, "no image"),  # type: ignore[arg-type]
        (
            {"conversations": [], "output_1": "a", "output_2": "b", "preference": 0},
            "preference that is neither 1 nor 2",
        ),
        ({"conversations": [], "output_1": "a", "output_2": "b", "preference": 1}, "no prompt"),
        ({"chosen": "\n\nHuman: a\n\nHuman: b", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "do not alternate"),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "an empty turn"),
        ({"completion": "b"}, "no prompt"),
    ],
)
def test_bad_rows(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadRecordError, match=reason):
        of(row, put(tmp_path))


@pytest.mark.parametrize(
    "change", [{"turns": "x"}, {"completions": 3}, {"completions": [{"rank": 0}]}, {"margin": "x"}]
)
def test_a_stored_comparison_that_is_broken(change: dict[str, Any]) -> None:
    """A corpus may come from anybody."""
    whole = as_conversation(Comparison("1", SKY, PAIR))
    broken = Conversation("1", whole.messages, metadata={"comparison": {**whole.metadata["comparison"], **change}})
    with pytest.raises(BadRecordError):
        comparison_in(broken)


# ---- Sources ----


def test_open_counts_what_cannot_be_used(tmp_path: Path) -> None:
    """And reads the rest of a folder that nobody has named the format of."""
    rows: list[dict[str, Any]] = [
        {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN},
        {"prompt": ASKED, "chosen": BLUE, "rejected": BLUE},
        {"prompt": PARTS, "images": ["b.png"], "completion": BLUE, "label": True},
        {"text": "A page."},
        {"prompt": PARTS, "images": ["none.png"]},
    ]
    errors = ErrorCounter()
    found = open_rows(put(tmp_path, *rows), errors)
    assert dict(errors.counts) == {"equal chosen and rejected": 1, "no image": 1, "no prompt": 1}
    assert errors.examples["equal chosen and rejected"] == ["rows.jsonl:2"]
    assert found.sizes.tolist() == [2, 1]
    assert found.images.tolist() == [0, 1]
    assert found[0].completions == PAIR
    assert shown(found[1]) == [["b.png", "What is <image>?"]]
    assert len(found[:1]) == 1
    assert found.only([1])[0] == found[1]
    again = open_rows(tmp_path)
    assert again.digest == found.digest
    assert again.digest != found.only([1]).digest
    twice = Comparisons.open([SourceConfig(path=".", repeat=2)], tmp_path, ErrorCounter())
    assert [c.key for c in twice] == [c.key for c in found] * 2


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    folder = put(tmp_path, {"prompt": ASKED, "chosen": BLUE, "rejected": BLUE})
    with pytest.raises(MMGPTError, match=r"no usable comparisons \(1 record skipped: 1 equal chosen"):
        open_rows(folder)
    with pytest.raises(ConfigError, match="whole repeat"):
        Comparisons.open([SourceConfig(path=".", repeat=0.5)], folder, ErrorCounter())


def test_rows_of_hugging_face(tmp_path: Path) -> None:
    """RLAIF-V's parquet, with the file inside."""
    rows = [{"image": {"bytes": png(), "path": "a.jpg"}, "question": "What?", "chosen": "A.", "rejected": "B."}]
    (sample,) = from_hf_dataset(rows, ErrorCounter())
    assert isinstance(sample, Conversation)
    found = comparison_in(sample)
    assert found.prompt == (user(Image(png()), "What?"),)
    assert texts(found) == ["A.", "B."]
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (stored,) = open_rows(tmp_path)
    assert (stored.prompt, stored.completions) == (found.prompt, found.completions)


def prompts(comparisons: Comparisons) -> set[str]:
    return {str(comparison.prompt) for comparison in comparisons}


def test_splits_share_no_prompt_and_no_image(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"Say {n % 20}", "chosen": f"{n}.", "rejected": "no"} for n in range(60)]
    rows += [{"images": [f"{n % 4}.png"], "prompt": f"What is {n}?", "chosen": "a", "rejected": "b"} for n in range(16)]
    folder = put(tmp_path, *rows)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number // 2))  # two names for one picture
    found = open_rows(folder)
    train, held = found.split(0.25, seed=1)
    assert len(train) + len(held) == 76
    assert 19 <= len(held) <= 19 + 8
    assert not prompts(train) & prompts(held)
    pictures = [
        {Path(str(c.prompt[0]["content"][0].source)).read_bytes() for c in part if c.prompt[0]["content"][1:]}
        for part in (train, held)
    ]
    assert not pictures[0] & pictures[1]
    assert [c.key for c in found.split(0.25, seed=1)[1]] == [c.key for c in held]
    assert prompts(found.split(0.25, seed=2)[1]) != prompts(held)
    # the order of rows changes nothing
    other = open_rows(put(tmp_path / "other", *rows[59::-1]))
    assert prompts(other.split(0.5, 3)[1]) == prompts(found.only(range(60)).split(0.5, 3)[1])
    assert [len(part) for part in found.split(0, seed=1)] == [76, 0]
    with pytest.raises(MMGPTError, match="3 comparisons with 1 different prompts: too few"):
        found.only([0, 20, 40]).split(0.5, 0)
    with pytest.raises(ConfigError, match="share"):
        found.split(1.0, 0)


# ---- Supervised fine-tuning ----


@cache
def processor() -> Processor:
    return make_tiny()[1]


def learned(conversation: Conversation) -> list[str]:
    segments = conversation_document(conversation, processor()).segments
    return [segment.text for segment in segments if isinstance(segment, Text) and segment.is_target]


def test_the_better_completion_alone_is_learned(tmp_path: Path) -> None:
    """Never an answer in the prompt, nor the worse one."""
    rows: list[dict[str, Any]] = [
        {"prompt": [*ASKED, *GREEN, *ASKED], "completion": BLUE},
        {"prompt": ASKED, "chosen": BLUE, "rejected": GREEN},
        {"prompt": ASKED, "completions": ["a", "b"], "ranks": [1, 0]},
        {"prompt": "The sky is", "completion": " blue."},
        {"messages": [*ASKED, *GREEN, *ASKED, *BLUE]},
        {"messages": [*ASKED, GREEN[0] | {"weight": 0}, *ASKED, *BLUE]},
        {"prompt": ASKED},
        {"prompt": ASKED, "completion": BLUE, "label": False},
    ]
    samples = list(read_samples(str(put(tmp_path, *rows)), ErrorCounter()))
    found = [learned(sample) for sample in samples[:6] if isinstance(sample, Conversation)]
    assert found == [
        ["It is blue.", "<|im_end|>"],
        ["It is blue.", "<|im_end|>"],
        ["b", "<|im_end|>"],
        [" blue.", "<|endoftext|>"],
        ["It is green.", "<|im_end|>", "It is blue.", "<|im_end|>"],
        ["It is blue.", "<|im_end|>"],
    ]
    for sample in samples[6:]:
        assert isinstance(sample, Conversation)
        with pytest.raises(BadRecordError, match="no answer to learn"):
            learned(sample)


def test_fine_tuning_reads_comparisons(tmp_path: Path) -> None:
    """Stops: prompts alone, and answers labelled as bad, that a run learns nothing or the wrong thing from."""
    rows: list[dict[str, Any]] = [
        {"prompt": PARTS, "images": ["a.png"], "chosen": BLUE, "rejected": GREEN},
        {"prompt": ASKED},
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": ASKED, "completion": BLUE, "label": False},
    ]
    errors, config = ErrorCounter(), SourceConfig(path=".")
    store = config.open(put(tmp_path, *rows), errors)
    (source,) = open_sources([config], [store], Measure(processor(), 256), folder=tmp_path, errors=errors)
    assert dict(errors.counts) == {"no answer to learn": 2}
    for unit, tokens in source.some(9):
        example = processor()(source.document(unit))
        assert len(example) == tokens
        ids = [label for label in example.labels.tolist() if label != IGNORE_INDEX]
        assert processor().tokenizer.decode(ids).strip() in ("It is blue.", "blue.")
    assert (len(source), source.images) == (2, 1)


# ---- Writing ----

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(str.strip)
NUMBERS = st.floats(-50, 0)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | TEXTS, st.lists, max_leaves=3).filter(
    lambda value: value is not None
)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    is_text = draw(st.booleans())
    parts = TEXTS if is_text else TEXTS | st.integers(0, 3).map(lambda n: Image(png(n)))
    prompt = [user(*draw(st.lists(parts, min_size=1, max_size=1 if is_text else 3)))]
    if not is_text and draw(st.booleans()):
        prompt = [{"role": "system", "content": [draw(TEXTS)]}, *prompt, says(draw(TEXTS)), user(draw(TEXTS))]
    answers = draw(st.lists(TEXTS, max_size=4, unique_by=str.strip))
    completions = tuple(
        Completion(
            (says(answer),),
            draw(st.integers(0, 3)),
            draw(st.sampled_from([None, True, False])),
            draw(st.none() | NUMBERS),
        )
        for answer in answers
    )
    columns = draw(
        st.dictionaries(st.sampled_from(["a", "answer", "question", "solution", "text"]), VALUES, max_size=2)
    )
    margin = draw(st.none() | st.floats(-5, 5)) if completions else None
    return Comparison(draw(TEXTS), tuple(prompt), completions, is_text, margin, columns)


def with_bytes(comparison: Comparison) -> Comparison:
    """With each image's file in place of its name."""

    def loaded(part: Any) -> Any:
        return Image(part.source.read_bytes()) if isinstance(part, Image) and isinstance(part.source, Path) else part

    prompt = tuple({**m, "content": [loaded(part) for part in m["content"]]} for m in comparison.prompt)
    return Comparison(comparison.key, prompt, *list(vars(comparison).values())[2:])


@given(st.lists(comparisons(), min_size=1, max_size=3))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, written: list[Comparison]) -> None:
    folder = tmp_path_factory.mktemp("written")
    assert write_comparisons(written, folder / "rows.jsonl") == len(written)
    errors = ErrorCounter()
    source = SourceConfig(path="rows.jsonl")
    assert list(map(with_bytes, Comparisons.open([source], folder, errors))) == written
    assert errors.total == 0


def test_written_rows_are_trl_s(tmp_path: Path) -> None:
    pair = Comparison("1", (user(Image(png()), "What?"),), PAIR, margin=0.5, columns={"answer": "x"})
    write_comparisons([pair, Comparison("2", (user("a"),), is_text=True)], tmp_path / "rows.jsonl")
    first, second = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert first.pop("images")[0].startswith("images/")
    assert first == {
        "id": "1",
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        "chosen": BLUE,
        "rejected": GREEN,
        "margin": 0.5,
        "answer": "x",
    }
    assert second == {"id": "2", "prompt": "a"}


@pytest.mark.parametrize(
    ("comparison", "reason"),
    [
        (Comparison("k", SKY, (PAIR[0], Completion(PAIR[0].messages, 1))), "k: equal chosen and rejected"),
        (Comparison("k", SKY, columns={"chosen": "x"}), "k: a column of the name 'chosen'"),
        (Comparison("k", SKY, columns={"messages": []}), "k: a column of the name 'messages'"),
        (Comparison("k", SKY, PAIR[:1], columns={"label": 3}), "k: a column of the name 'label'"),
        (Comparison("k", SKY, columns={"x": float("nan")}), "k: not JSON"),
        (Comparison("k", SKY, columns={"x": "\ud800"}), "k: not JSON"),
        (Comparison("k", (user(Image(b"GIF"), "x"),)), "k: an image of format unknown"),
        (Comparison("k", (user(Image(Path("no.png")), "x"),)), "k: unreadable image file"),
        (Comparison("k", (user(Image(png(), mirrored=True), "x"),)), "k: an image that is more than a file"),
        (Comparison("k", (user("a", "b"),), is_text=True), "k: more than one text"),
        (Comparison("k", SKY, margin=1.0), "k: a margin without completions"),
    ],
)
def test_what_cannot_be_written_is_named(comparison: Comparison, reason: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("before")
    with pytest.raises(MMGPTError, match=reason):
        write_comparisons([comparison], tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text() == "before"
