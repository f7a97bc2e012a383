"""Public caption and question datasets: every field as the published files have it, and what is broken in copies."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_gpt.datasets.formats.pairs import read_coco, read_karpathy, read_textvqa, read_vizwiz, read_vqa
from mm_gpt.datasets.reading import rows
from mm_gpt.datasets.reading.rows import read_json, read_rows
from mm_gpt.datasets.samples import ErrorCounter, QuestionAnswer, Record, checked
from mm_gpt.errors import ConfigError, MMGPTError

Reader = Callable[..., Iterator[Record]]


def read(reader: Reader, location: Path | str, **options: Any) -> tuple[list[Record], dict[str, int]]:
    errors = ErrorCounter()
    return list(checked(reader(str(location), errors, **options), errors)), dict(errors.counts)


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xff\xd8\xff not decoded here")
    return path


# ---- COCO ----


def coco(*annotations: tuple[Any, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": {"year": 2014},
        "licenses": [{"id": 1}],
        "annotations": [{"image_id": i, "id": n, "caption": c} for n, (i, c) in enumerate(annotations)],
        "images": images,  # behind the annotations, as some tools write them
    }


def test_coco_one_record_an_image_with_all_its_captions(tmp_path: Path) -> None:
    name = "COCO_val2014_000000179765.jpg"
    there = image(tmp_path / "val2014" / name)
    info = {"id": 179765, "file_name": name, "height": 480, "width": 640, "license": 3}
    values = coco((179765, "A black Honda. "), (179765, "A motorcycle."), (179765, "A black Honda."), images=[info])
    annotations = write(tmp_path / "annotations" / "captions_val2014.json", values)
    records, errors = read(read_coco, annotations, images=str(tmp_path))
    assert errors == {}
    metadata = {"image_id": 179765, "height": 480, "width": 640}
    captions = ("A black Honda.", "A motorcycle.")
    assert records == [Record("179765", there, captions, (), "captions_val2014", metadata)]
    assert read(read_coco, annotations, images=str(tmp_path / "val2014"))[0] == records


def test_coco_url_only_where_no_folder_was_named(tmp_path: Path) -> None:
    """An image that is missing from the folder that the user named must not be fetched from elsewhere unasked."""
    url = "http://images.cocodataset.org/train2017/000000000009.jpg"
    info = {"id": 9, "file_name": "000000000009.jpg", "coco_url": url}
    annotations = write(tmp_path / "captions_train2017.json", coco((9, "x"), images=[info]))
    assert read(read_coco, annotations)[0][0].image == url
    assert read(read_coco, annotations, images=str(tmp_path)) == ([], {"no image": 1})
    there = image(tmp_path / "train2017" / "000000000009.jpg")
    assert read(read_coco, annotations)[0][0].image == there
    assert read(read_coco, annotations)[0][0].metadata["url"] == url
    assert read(read_coco, annotations, images="s3://bucket/coco")[0][0].image == "s3://bucket/coco/000000000009.jpg"


def test_coco_bad_records_are_counted(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    image(tmp_path.parent / "outside.jpg")
    images: list[Any] = [
        {"id": 1, "file_name": "a.jpg", "coco_url": "file:///etc/passwd"},
        {"id": 1, "file_name": "b.jpg"},
        {"id": 2, "file_name": "../outside.jpg"},
        {"id": 3, "file_name": "/etc/passwd"},
        {"id": 4, "file_name": "x" * 5000},
        {"id": 5, "file_name": "a.jpg"},
        {"id": [6], "file_name": "a.jpg"},
        {"id": 7, "file_name": 8},
        {"id": 8, "file_name": "a.jpg"},
        "no object",
    ]
    said = [(1, "fine"), (1, " "), (1, 5), (8, "\ud83d"), ([], "x"), (99, "y"), (2, "x"), (3, "x"), (4, "x")]
    records, errors = read(read_coco, write(tmp_path / "c.json", coco(*said, images=images)))
    assert [(r.key, r.captions) for r in records] == [("1", ("fine",))]
    assert "url" not in records[0].metadata
    assert errors == {
        "duplicate image": 1,
        "image outside the folder": 2,
        "no image": 1,
        "no captions or questions": 1,
        "no id": 2,
        "no file_name": 1,
        "empty caption": 1,
        "no caption": 1,
        "text is not Unicode": 1,
        "no image_id": 1,
        "captions of no image": 1,
    }


def test_coco_results_are_no_source(tmp_path: Path) -> None:
    """Captions that a model wrote would be trained on as if people had written them."""
    with pytest.raises(MMGPTError, match="as results are"):
        read(read_coco, write(tmp_path / "results.json", [{"image_id": 404464, "caption": "black and white photo"}]))
    with pytest.raises(MMGPTError, match="no 'images'"):
        read(read_coco, write(tmp_path / "other.json", {"data": []}))


# ---- Karpathy ----


def karpathy(split: str, number: int, **more: Any) -> dict[str, Any]:
    sentences = [{"tokens": ["a"], "raw": f"Photo {number}.\n", "imgid": number, "sentid": 1}, {"raw": "A photo."}]
    return {"imgid": number, "split": split, "filename": f"{number}.jpg", "sentences": sentences, **more}


@pytest.mark.parametrize(
    ("split", "numbers"),
    [("train", [0, 1]), ("restval", [1]), ("val", [2]), ("test", [3]), ("all", [0, 1, 2, 3])],
)
def test_karpathy_splits(tmp_path: Path, split: str, numbers: list[int]) -> None:
    """`train` without `restval` would lose 30,504 of COCO's images; with `test` in it, every score would be void."""
    names = ("train", "restval", "val", "test")
    values = [karpathy(s, n, filepath="val2014", cocoid=100 + n) for n, s in enumerate(names)]
    for number in range(4):
        image(tmp_path / "val2014" / f"{number}.jpg")
    location = write(tmp_path / "dataset_coco.json", {"images": values, "dataset": "coco"})
    records, errors = read(read_karpathy, location, split=split)
    assert errors == {}
    assert [r.key for r in records] == [str(100 + n) for n in numbers]
    assert records[0].captions == (f"Photo {numbers[0]}.", "A photo.")
    assert records[0].metadata == {"image_id": 100 + numbers[0], "split": names[numbers[0]]}


def test_karpathy_flickr_has_no_cocoid_and_no_filepath(tmp_path: Path) -> None:
    there = image(tmp_path / "images" / "0.jpg")
    values = [karpathy("train", 0), karpathy("train", 1), karpathy("dev", 2), {"split": "train", "filename": "3.jpg"}]
    location = write(tmp_path / "dataset_flickr8k.json", {"images": values, "dataset": "flickr8k"})
    records, errors = read(read_karpathy, location, images=str(tmp_path / "images"))
    assert [(r.key, r.image, r.source) for r in records] == [("0", there, "dataset_flickr8k")]
    assert errors == {"no image": 1, "unknown split": 1, "no sentences": 1}
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        read(read_karpathy, location, split="trian")


# ---- VQA ----


def vqa_pair(folder: Path, prefix: str = "v2_", subset: str = "val2014") -> Path:
    header = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": subset}
    asked = [(458752, 458752000, "What is this?"), (42, 42000, "How many?"), (458752, 458752001, "Is it red?")]
    questions = [{"image_id": i, "question": q, "question_id": n} for i, n, q in asked]
    write(folder / f"{prefix}OpenEnded_mscoco_{subset}_questions.json", {**header, "questions": questions})
    tens = {458752000: ["net"] * 6 + ["mesh"] * 4, 42000: ["2"] * 4 + ["3"] * 6, 458752001: ["yes"] * 10}
    annotations = [
        {
            "question_type": "what is",
            "multiple_choice_answer": max(set(ten), key=ten.count),
            "answers": [{"answer": a, "answer_confidence": "maybe", "answer_id": n + 1} for n, a in enumerate(ten)],
            "image_id": number // 1000,
            "answer_type": "other",
            "question_id": number,
        }
        for number, ten in reversed(tens.items())  # joined by id, never by place
    ]
    write(folder / f"{prefix}mscoco_{subset}_annotations.json", {**header, "annotations": annotations})
    return folder / f"{prefix}OpenEnded_mscoco_{subset}_questions.json"


@pytest.mark.parametrize("prefix", ["v2_", ""])
def test_vqa_questions_of_an_image_with_the_annotations_beside(tmp_path: Path, prefix: str) -> None:
    first = image(tmp_path / "val2014" / "COCO_val2014_000000458752.jpg")
    second = image(tmp_path / "000000000042.jpg")  # COCO 2017 has the same images under these names
    records, errors = read(read_vqa, vqa_pair(tmp_path, prefix))
    assert errors == {}
    assert [(r.key, r.image) for r in records] == [("458752", first), ("42", second)]
    assert records[0].questions == (
        QuestionAnswer("What is this?", "net", ("net",) * 6 + ("mesh",) * 4),
        QuestionAnswer("Is it red?", "yes", ("yes",) * 10),
    )
    assert records[1].questions[0] == QuestionAnswer("How many?", "3", ("3",) * 6 + ("2",) * 4)
    assert records[0].metadata == {
        "image_id": 458752,
        "question_ids": [458752000, 458752001],
        "question_types": ["what is", "what is"],
        "answer_types": ["other", "other"],
    }


def test_ok_vqa_has_no_multiple_choice_answer(tmp_path: Path) -> None:
    location = vqa_pair(tmp_path, "")
    image(tmp_path / "COCO_val2014_000000458752.jpg")
    beside = tmp_path / "mscoco_val2014_annotations.json"
    values = json.loads(beside.read_text())
    for annotation in values["annotations"]:
        del annotation["multiple_choice_answer"]
        for answer in annotation["answers"]:
            answer["raw_answer"] = answer["answer"] + "s"
    write(beside, values)
    records, errors = read(read_vqa, location)
    assert [q.answer for q in records[0].questions] == ["net", "yes"]
    assert errors == {"no image": 1}
    beside.rename(tmp_path / "moved.json")
    assert read(read_vqa, location, annotations=str(tmp_path / "moved.json"))[0] == records
    with pytest.raises(MMGPTError, match=r"no mscoco_val2014_annotations\.json beside it"):
        read(read_vqa, location)


def test_vqa_test_questions_have_no_answers(tmp_path: Path) -> None:
    """test-dev2015 is a part of test2015: its images carry that name."""
    location = vqa_pair(tmp_path, subset="test-dev2015")
    there = image(tmp_path / "test2015" / "COCO_test2015_000000458752.jpg")
    image(tmp_path / "COCO_test2015_000000000042.jpg")
    (tmp_path / "v2_mscoco_test-dev2015_annotations.json").unlink()
    records, errors = read(read_vqa, location, unanswered=True)
    assert errors == {}
    assert records[0].image == there
    assert records[0].questions == (QuestionAnswer("What is this?", ""), QuestionAnswer("Is it red?", ""))
    assert records[0].metadata == {"image_id": 458752, "question_ids": [458752000, 458752001]}


def test_vqa_variants_name_their_images_by_strings(tmp_path: Path) -> None:
    there = image(tmp_path / "VizWiz_val_00000000.jpg")
    values = {"questions": [{"image_id": there.name, "question": "what?", "question_id": "a"}]}
    location = write(tmp_path / "vizwiz_questions.json", values)
    annotation = {"question_id": "a", "answers": ["x", "y", "y"], "image_id": there.name}
    write(tmp_path / "vizwiz_annotations.json", {"annotations": [annotation]})
    records, _ = read(read_vqa, location)
    assert (records[0].image, records[0].questions[0].answer) == (there, "y")
    assert records[0].metadata == {"image_id": there.name, "question_ids": ["a"]}


def test_vqa_bad_questions_are_counted(tmp_path: Path) -> None:
    image(tmp_path / "1.jpg")
    image(tmp_path / "000000000001.jpg")
    asked: list[Any] = [
        {"image_id": 1, "question": "ok?", "question_id": 1},
        {"image_id": 1, "question": "lost?", "question_id": 2},
        {"image_id": 1, "question": " ", "question_id": 3},
        {"image_id": 1, "question": "empty?", "question_id": 4},
        {"image_id": "../1", "question": "x?", "question_id": 5},
        {"image_id": 1, "question_id": 6},
        {"image_id": "9" * 5000, "question": "x?", "question_id": 1},
        7,
    ]
    answered: list[Any] = [
        {"question_id": 1, "answers": [{"answer": "yes"}]},
        {"question_id": 3, "answers": ["x"]},
        {"question_id": 4, "answers": [{"answer": ""}]},
        {"question_id": 5, "answers": ["x"]},
        {"question_id": 6, "answers": ["x"]},
        {"question_id": 8, "answers": [None]},
        {"question_id": 9},
    ]
    location = write(tmp_path / "questions.json", {"questions": asked})
    write(tmp_path / "annotations.json", {"annotations": answered})
    records, errors = read(read_vqa, location)
    assert [r.questions for r in records] == [(QuestionAnswer("ok?", "yes", ("yes",)),)]
    assert errors == {
        "question without annotation": 1,
        "question without text or answer": 2,
        "image outside the folder": 1,
        "no question": 1,
        "no question_id": 1,
        "no image": 1,
        "text is not a string": 1,
        "no answers": 1,
    }
    with pytest.raises(MMGPTError, match="no 'questions'"):
        read(read_vqa, tmp_path / "annotations.json", unanswered=True)
    with pytest.raises(MMGPTError, match="no 'annotations'"):
        read(read_vqa, location, annotations=str(location))


def test_textvqa(tmp_path: Path) -> None:
    ten = ["nokia"] * 3 + [""] * 4 + ["toshiba"] * 3
    first = {
        "question": "what is the brand?",
        "image_id": "0054c91397f2fe05",
        "image_classes": ["Belt"],
        "flickr_original_url": "https://farm6.staticflickr.com/o.jpg",
        "flickr_300k_url": "https://c6.staticflickr.com/s.jpg",
        "image_width": 1024,
        "answers": ten,
        "question_tokens": ["what"],
        "question_id": 0,
        "set_name": "train",
    }
    second = {**first, "image_id": "b", "question_id": 1, "flickr_original_url": ""}
    again = {**first, "question": "and this?", "question_id": 2}
    location = write(tmp_path / "TextVQA_0.5.1_train.json", {"dataset_type": "train", "data": [first, second, again]})
    records, errors = read(read_textvqa, location)
    assert errors == {}
    assert [r.image for r in records] == [first["flickr_original_url"], first["flickr_300k_url"]]
    answers = ("nokia",) * 3 + ("",) * 4 + ("toshiba",) * 3
    assert records[0].questions[0] == QuestionAnswer("what is the brand?", "nokia", answers)
    assert records[0].metadata["question_ids"] == [0, 2]
    there = image(tmp_path / "train_images" / "b.jpg")
    records, errors = read(read_textvqa, location, images=str(tmp_path / "train_images"))
    assert [r.image for r in records] == [there]
    assert errors == {"no image": 1}


def test_textvqa_test_set_has_no_answers(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    location = write(tmp_path / "t.json", {"data": [{"question": "x?", "image_id": "a", "question_id": 5}]})
    assert read(read_textvqa, location) == ([], {"no answers": 1})
    assert read(read_textvqa, location, unanswered=True)[0][0].questions == (QuestionAnswer("x?", ""),)


def test_vizwiz_has_no_question_id_and_no_answer_id(tmp_path: Path) -> None:
    there = image(tmp_path / "VizWiz_train_00000000.jpg")
    row = {
        "image": there.name,
        "question": "What's the name of this product?",
        "answers": [
            {"answer_confidence": "yes", "answer": a} for a in ["basil", "unanswerable", "basil leaves", "basil"]
        ],
        "answer_type": "other",
        "answerable": 1,
    }
    location = write(tmp_path / "train.json", [row, {**row, "image": "../x.jpg"}, {**row, "answers": []}])
    records, errors = read(read_vizwiz, location)
    answers = ("basil", "basil", "unanswerable", "basil leaves")
    metadata = {"image_id": there.name, "question_ids": [there.name], "answer_types": ["other"], "answerable": [1]}
    question = QuestionAnswer(str(row["question"]), "basil", answers)
    assert records == [Record(there.name, there, (), (question,), "train", metadata)]
    assert errors == {"image outside the folder": 1, "question without text or answer": 1}


# ---- JSON as a stream ----

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.lists(values, max_size=6) | st.dictionaries(st.text(max_size=5), values, max_size=4), st.booleans())
def test_the_stream_reads_what_the_json_module_reads(
    tmp_path_factory: pytest.TempPathFactory, value: Any, indent: bool
) -> None:
    """With a window of one byte every number, escape and letter is cut once."""
    path = tmp_path_factory.getbasetemp() / "stream.json"
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1 if indent else None), encoding="utf-8-sig")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "WINDOW_BYTES", 1)
        found = list(read_json(str(path)))
    if isinstance(value, list):
        assert found == [("", item) for item in value]
    else:
        expected: list[Any] = []
        for key, member in value.items():
            expected += [(key, item) for item in member] if isinstance(member, list) else [(key, member)]
        assert found == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"a": 1}, {"b"', "cut off"),
        ("[1, 2", "cut off"),
        ('{"a": [1', "cut off"),
        ("[1 2]", "not JSON"),
        ("[1,]", "not JSON"),
        ("{1: 2}", "not JSON"),
        ('{"a" 2}', "not JSON"),
        ("[12abcdefghijkl]", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("7", "neither a list nor an object"),
        ("", "neither a list nor an object"),
        ("[1] [2]", "more than one JSON value"),
        ('["\udcff"]', "not UTF-8"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path: Path, text: str, reason: str) -> None:
    """A broken file must not pass for a shorter one, nor end in another error than the user's."""
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(MMGPTError, match=rf"x\.json: .*{reason}.*at character"):
        list(read_json(str(path)))


def test_endless_values_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ITEM_CHARS", 10_000)
    monkeypatch.setattr(rows, "WINDOW_BYTES", 1000)
    path = tmp_path / "x.json"
    path.write_text('["' + "x" * 100_000 + '"]')
    with pytest.raises(MMGPTError, match="too long"):
        list(read_json(str(path)))


def test_large_files_are_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    item = json.dumps({"id": "x" * 2000})
    path.write_text("[" + ",".join([item] * 10_000) + "]")  # 20 MB
    tracemalloc.start()
    assert sum(1 for _ in read_rows(str(path), ErrorCounter())) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def test_missing_files_are_named() -> None:
    for reader in (read_coco, read_karpathy, read_textvqa, read_vizwiz):
        with pytest.raises(MMGPTError, match="nowhere"):
            read(reader, "/nowhere.json")
    with pytest.raises(MMGPTError, match="nowhere"):
        read(read_vqa, "/nowhere.json", unanswered=True)
