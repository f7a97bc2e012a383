"""Public conversation datasets: which picture stands where, who speaks, and what is counted instead of guessed."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.formats.conversations import read_conversations
from mm_gpt.datasets.samples import Conversation, ErrorCounter, checked
from mm_gpt.document import Image
from mm_gpt.errors import ConfigError, MMGPTError
from mm_gpt.images import image_format

JPEG = b"\xff\xd8\xff not decoded here"


def read(location: Path | str, **options: Any) -> tuple[list[Conversation], dict[str, int]]:
    errors = ErrorCounter()
    return list(checked(read_conversations(str(location), errors, **options), errors)), dict(errors.counts)


def write_rows(folder: Path, *rows: Any, name: str = "rows.json") -> Path:
    for image in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        (folder / image).write_bytes(JPEG)
    lines = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(lines)
    return folder / name


def llava(*values: str, image: Any = None, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {"id": "997bb945", "conversations": turns, **({} if image is None else {"image": image}), **more}


def contents(conversation: Conversation) -> list[list[Any]]:
    """Each turn's parts, an image by its file name."""
    return [
        [Path(str(part.source)).name if isinstance(part, Image) else part for part in message["content"]]
        for message in conversation.messages
    ]


# ---- LLaVA and ShareGPT ----


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_llava(tmp_path: Path, name: str) -> None:
    row = llava("<image>\nWrite a prompt.\n", "a beautiful painting", image="sub/c.jpg", model="gpt-4", tags=["x"])
    conversations, errors = read(write_rows(tmp_path, row, name=name))
    assert errors == {}
    assert conversations == [
        Conversation(
            "997bb945",
            (
                {"role": "user", "content": [Image(tmp_path / "sub" / "c.jpg"), "Write a prompt."]},
                {"role": "assistant", "content": ["a beautiful painting"]},
            ),
            "rows",
            {"model": "gpt-4"},
        )
    ]


@pytest.mark.parametrize(
    ("text", "images", "parts"),
    [
        ("Which one?\n<image>", "a.jpg", ["Which one?", "a.jpg"]),  # ScienceQA
        ("What is <image> for?", "a.jpg", ["What is ", "a.jpg", " for?"]),
        ("<image>\n<image>\nCompare.", ["a.jpg", "b.jpg"], ["a.jpg", "b.jpg", "Compare."]),
        ("A: <image>\nB: <image>\nC?", ["a.jpg", "b.jpg"], ["A: ", "a.jpg", "B: ", "b.jpg", "C?"]),
        ("<image>", ["a.jpg"], ["a.jpg"]),
        ("<image><image> ?", ["a.jpg", "a.jpg"], ["a.jpg", "a.jpg", " ?"]),
        ("line\n\nline <image>", "a.jpg", ["line\n\nline ", "a.jpg"]),
        ("no image", None, ["no image"]),
        ("no image", "", ["no image"]),
    ],
)
def test_images_stand_where_their_markers_stood(tmp_path: Path, text: str, images: Any, parts: list[str]) -> None:
    conversations, errors = read(write_rows(tmp_path, llava(text, "ok", image=images)))
    assert errors == {}
    assert contents(conversations[0]) == [parts, ["ok"]]


def test_image_first_as_llava_was_trained(tmp_path: Path) -> None:
    row = llava("What is <image> for?", "x", "and\n<image>", "y", image=["a.jpg", "b.jpg"])
    conversations, _ = read(write_rows(tmp_path, row), image_first=True)
    assert contents(conversations[0]) == [["a.jpg", "What is  for?"], ["x"], ["b.jpg", "and"], ["y"]]


def test_the_second_image_may_come_in_a_later_turn(tmp_path: Path) -> None:
    row = llava("<image>\nOne?", "1", "<image>\nTwo?", "2", image=["a.jpg", "b.jpg"])
    assert contents(read(write_rows(tmp_path, row))[0][0]) == [["a.jpg", "One?"], ["1"], ["b.jpg", "Two?"], ["2"]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (llava("<image>\n<image> x", "y", image="a.jpg"), "more image markers than images"),
        (llava("<image> x", "y"), "more image markers than images"),
        (llava("x", "y", image="a.jpg"), "more images than image markers"),
        (llava("<image> x", "y", image=["a.jpg", "b.jpg"]), "more images than image markers"),
        (llava("<image> x", "y", image="no.jpg"), "no image"),
        (llava("<image> x", "y", image="../rows.json"), "image outside the folder"),
        (llava("<image> x", "y", image="/etc/passwd"), "image outside the folder"),
        (llava("<image> x", "y", image="file:///etc/passwd"), "image outside the folder"),
        (llava("<image> x", "y", image="a\x00.jpg"), "image outside the folder"),
        (llava("<image> x", "y", image="\ud83d.jpg"), "no image"),
        (llava("<image> x", "y", image="x" * 5000), "no image"),
        (llava("<image> x", "y", image=5), "no image"),
        (llava("<image> x", "y", image="data:image/png;base64,###"), "broken data URL"),
        (llava("<video> x", "y", video="v.mp4"), "a video"),
        (llava("x", ""), "an empty turn"),
        (llava("x"), "no answer"),
        (llava(), "no answer"),
        (llava("x", "\udc00"), "text is not Unicode"),
        ({"conversations": [{"from": "human", "value": None}]}, "text is not a string"),
        ({"conversations": [{"from": "human", "value": "x"}] * 2}, "turns that do not alternate"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "unknown speaker"),
        ({"conversations": [{"value": "x"}]}, "a turn without a speaker"),
        ({"conversations": ["x"]}, "a turn without a speaker"),
        ({"conversations": {}}, "no conversations, messages or texts"),
        ([], "JSON is not an object"),
    ],
)
def test_bad_rows_are_counted_and_skipped(tmp_path: Path, row: Any, reason: str) -> None:
    location = write_rows(tmp_path, row, llava("fine", "yes"))
    conversations, errors = read(location)
    assert [contents(c) for c in conversations] == [[["fine"], ["yes"]]]
    assert errors == {reason: 1}


def test_sharegpt(tmp_path: Path) -> None:
    """Long chats were cut into pieces, so that some begin with an answer: LLaVA and FastChat drop that as well."""
    turns = [
        ("system", "Be brief."),
        ("gpt", "the rest of an answer"),
        ("user", "Hi"),
        ("chatgpt", "Hello"),
        ("human", "?"),
    ]
    row = {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}
    conversations, errors = read(write_rows(tmp_path, row, name="rows.jsonl"))
    assert errors == {}
    assert conversations[0].key == "rows.jsonl:1"
    assert [m["role"] for m in conversations[0].messages] == ["system", "user", "assistant", "user"]
    assert contents(conversations[0]) == [["Be brief."], ["Hi"], ["Hello"], ["?"]]


def test_images_elsewhere(tmp_path: Path) -> None:
    location = write_rows(tmp_path, llava("<image> x", "y", image="sub/my c.jpg"))
    for prefix, place in (
        ("https://host/pics", "https://host/pics/sub/my%20c.jpg"),
        ("s3://b/p/", "s3://b/p/sub/my c.jpg"),
    ):
        assert read(location, images=prefix)[0][0].messages[0]["content"][0].source == place
    folder = tmp_path / "other" / "sub"
    folder.mkdir(parents=True)
    (folder / "my c.jpg").write_bytes(JPEG)
    assert read(location, images=str(tmp_path / "other"))[0][0].messages[0]["content"][0].source == folder / "my c.jpg"


def test_json_lines_called_json_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [json.dumps(llava("q", "a", id=n)) for n in range(2)]
    path.write_text("\ufeff" + rows[0] + '\n{"id": \n\n' + rows[1], encoding="utf-8")
    conversations, errors = read(path)
    assert [c.key for c in conversations] == ["0", "1"]
    assert errors == {"bad JSON": 1}


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["<image>", "\n", " ", "word", "<", "image>"]), max_size=12))
def test_no_word_is_lost_and_every_marker_has_its_image(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str]
) -> None:
    text = "x" + "".join(pieces)
    count = text.count("<image>")
    location = write_rows(tmp_path_factory.getbasetemp() / "any", llava(text, "y", image=["a.jpg"] * count))
    (conversation,), errors = read(location)
    assert errors == {}
    parts = conversation.messages[0]["content"]
    assert sum(isinstance(part, Image) for part in parts) == count
    written = "".join(part for part in parts if isinstance(part, str))
    assert "".join(written.split()) == "".join(text.replace("<image>", "").split())


# ---- Messages ----


def test_messages(tmp_path: Path) -> None:
    url = "https://host/x.jpg"
    data = "data:image/jpeg;base64," + base64.b64encode(JPEG).decode()
    content = [
        {"type": "image", "path": "a.jpg"},
        {"type": "text", "text": " What is <image>? "},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": data}},
        "and?",
    ]
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": " 4", "complete": False}]},
        {"id": 0, "messages": [{"role": "user", "content": "x"}, call, {"role": "tool", "content": "7"}]},
    ]
    conversations, errors = read(write_rows(tmp_path, *rows, name="chats.jsonl"))
    assert errors == {}
    parts = conversations[0].messages[0]["content"]
    assert parts == [Image(tmp_path / "a.jpg"), " What is <image>? ", Image(url), Image(JPEG), "and?"]
    # an answer may begin with a space that means something, and this one is not to teach where answers end
    assert conversations[0].messages[1] == {"role": "assistant", "content": [" 4"], "complete": False}
    assert conversations[1].key == "0"
    assert conversations[1].messages[1] == {**call, "content": []} | {"tool_calls": call["tool_calls"]}


def test_messages_with_the_images_listed_beside(tmp_path: Path) -> None:
    """TRL leaves the source out of image parts, LLaMA-Factory writes markers; both list the images beside."""
    answer = {"role": "assistant", "content": "y"}
    trl = [{"type": "image"}, {"type": "text", "text": "x"}, {"type": "image"}]
    rows = [
        {"messages": [{"role": "user", "content": trl}, answer], "images": ["a.jpg", "b.jpg"]},
        {"messages": [{"role": "user", "content": "<image>x<image>"}, answer], "images": ["a.jpg", "b.jpg"]},
        {"messages": [{"role": "user", "content": trl}, answer], "images": ["a.jpg"]},
        {"messages": [{"role": "user", "content": "x"}, answer], "images": ["a.jpg"]},
        {"messages": [{"role": "user", "content": "the tag <image> of SVG"}, answer]},
    ]
    conversations, errors = read(write_rows(tmp_path, *rows, name="chats.jsonl"))
    asked = [contents(c)[0] for c in conversations]
    assert asked == [["a.jpg", "x", "b.jpg"], ["a.jpg", "x", "b.jpg"], ["the tag <image> of SVG"]]
    assert errors == {"more image markers than images": 1, "more images than image markers": 1}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "robot", "content": "x"}, "a message without a known role"),
        ({"role": ["user"], "content": "x"}, "a message without a known role"),
        ("x", "a message without a known role"),
        ({"role": "user"}, "an empty turn"),
        ({"role": "user", "content": []}, "an empty turn"),
        ({"role": "user", "content": 7}, "a content part that is neither text nor image"),
        ({"role": "user", "content": [{"type": "audio"}]}, "a content part that is neither text nor image"),
        ({"role": "user", "content": [{"type": "text"}]}, "text is not a string"),
        ({"role": "user", "content": [{"type": "image", "path": "../x.jpg"}]}, "image outside the folder"),
        ({"role": "user", "content": [{"type": "image"}]}, "more image markers than images"),
        ({"role": "user", "content": "x"}, "no answer"),
    ],
)
def test_bad_messages_are_counted(tmp_path: Path, message: Any, reason: str) -> None:
    assert read(write_rows(tmp_path, {"messages": [message]})) == ([], {reason: 1})


# ---- The Cauldron and FineVision ----


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


def test_cauldron(tmp_path: Path) -> None:
    texts = [{"user": "<image>What?\n", "assistant": "A cat.", "source": "VQAv2"}, {"user": "b", "assistant": "c"}]
    two = [{"bytes": JPEG, "path": None}, {"bytes": JPEG + b"2", "path": "x.jpg"}]
    rows = [{"images": two, "texts": texts}, {"images": [], "texts": texts[1:]}, {"images": None, "texts": texts[1:]}]
    conversations, errors = read(write_parquet(tmp_path / "train-00000.parquet", rows))
    assert errors == {}
    assert conversations[0].messages == (
        {"role": "user", "content": [Image(JPEG), Image(JPEG + b"2"), "What?"]},
        {"role": "assistant", "content": ["A cat."]},
        {"role": "user", "content": ["b"]},
        {"role": "assistant", "content": ["c"]},
    )
    assert (conversations[0].key, conversations[0].source) == ("train-00000.parquet:1", "train-00000")
    assert conversations[0].metadata == {"source": "VQAv2"}
    assert [contents(c) for c in conversations[1:]] == [[["b"], ["c"]]] * 2


def test_finevision_ratings(tmp_path: Path) -> None:
    """The images must move to the first turn that is left, and a turn that nobody rated is kept."""
    texts = [{"user": str(n), "assistant": "x"} for n in range(4)]
    row = {
        "images": [{"bytes": JPEG, "path": None}],
        "texts": texts,
        "source": "aguvis",
        "relevance_ratings": [1, 5, 3, None],
        "image_correspondence_ratings": None,
        "visual_dependency_ratings": [5, 5, 2],
        "relevance_min": 1,
    }
    location = write_parquet(tmp_path / "f.parquet", [row])

    def kept(min_rating: Any) -> list[str]:
        conversations, _ = read(location, min_rating=min_rating)
        return [m["content"][-1] for c in conversations for m in c.messages if m["role"] == "user"]

    assert kept(0) == ["0", "1", "2", "3"]
    assert kept(2) == ["1", "2", "3"]
    assert kept(3) == ["1", "3"]
    assert kept({"visual_dependency": 3}) == ["0", "1", "3"]
    conversations, errors = read(location, min_rating=4)
    assert contents(conversations[0])[0] == [Path(str(JPEG)).name, "1"]
    assert conversations[0].metadata == {"source": "aguvis", "relevance_min": 1}
    assert errors == {"turn below min_rating": 2}
    only_bad = write_parquet(tmp_path / "g.parquet", [{**row, "texts": texts[:1]}])
    assert read(only_bad, min_rating=2) == ([], {"turn below min_rating": 1, "no turns": 1})
    with pytest.raises(ConfigError, match="no ratings beauty"):
        read_conversations(str(location), ErrorCounter(), min_rating={"beauty": 1})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": [{"bytes": None, "path": None}], "texts": [{"user": "a", "assistant": "b"}]}, "no image"),
        (
            {"images": [{"bytes": b"", "path": "../x.jpg"}], "texts": [{"user": "a", "assistant": "b"}]},
            "image outside the folder",
        ),
        ({"texts": [{"user": "a", "assistant": ""}]}, "an empty turn"),
        ({"texts": [{"user": "a", "assistant": None}]}, "text is not a string"),
        ({"texts": [None]}, "a turn without user and assistant"),
        ({"texts": []}, "no turns"),
        ({"question": "x"}, "no conversations, messages or texts"),
    ],
)
def test_bad_parquet_rows_are_counted(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    assert read(write_parquet(tmp_path / "x.parquet", [row])) == ([], {reason: 1})


def test_llava_rows_in_parquet(tmp_path: Path) -> None:
    """LLaVA-OneVision's data: the same turns, the image in the row."""
    row = llava("<image>\nx", "y", image={"bytes": JPEG, "path": None})
    conversations, errors = read(write_parquet(tmp_path / "x.parquet", [row]))
    assert errors == {}
    assert image_format(conversations[0].messages[0]["content"][0].source) == "jpg"


def test_folders_of_parquets_in_order_and_broken_ones(tmp_path: Path) -> None:
    for number in (1, 0):
        rows = [{"images": [], "texts": [{"user": str(number), "assistant": "x"}]}]
        write_parquet(tmp_path / "data" / f"train-{number}.parquet", rows)
    (tmp_path / "data" / "README.md").write_text("not a row")
    assert [contents(c)[0] for c in read(tmp_path / "data")[0]] == [["0"], ["1"]]
    (tmp_path / "data" / "train-1.parquet").write_bytes(b"PAR1 but not more")
    with pytest.raises(MMGPTError, match=r"train-1\.parquet: not a readable parquet"):
        read(tmp_path / "data")
    with pytest.raises(MMGPTError, match=r"nowhere"):
        read(tmp_path / "nowhere.json")
    (tmp_path / "cut.json").write_text('[{"id": 1}, ')
    with pytest.raises(MMGPTError, match=r"cut\.json: cut off"):
        read(tmp_path / "cut.json")
