"""Public caption and question datasets as Records: COCO, Karpathy's splits, VQA, OK-VQA, TextVQA and VizWiz.

One Record is one image with everything that is said about it; its images are looked for in the folder `images`, by
default the one that holds the annotations. A local image that is not there is counted; images elsewhere are not asked
for. Nothing is decoded. Files are read item by item, what they say by image is held in memory until they end.

`metadata` has what evaluation needs to join on: `image_id`, and `question_ids` in the order of `questions`.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_gpt.datasets.reading.files import base_name, exists, folder_of, is_remote
from mm_gpt.datasets.reading.rows import find_image, plain_text, read_json
from mm_gpt.datasets.samples import BadRecordError, ErrorCounter, QuestionAnswer, Record
from mm_gpt.errors import ConfigError, MMGPTError, unknown_name
from mm_gpt.images import is_url, source_name

KARPATHY_SPLITS = {
    "train": ("train", "restval"),
    "val": ("val",),
    "test": ("test",),
    "restval": ("restval",),
    "all": ("train", "restval", "val", "test"),
}
"""The splits of each `split`. `restval` are the images of COCO's validation set that are neither in `val` nor in
`test`: everybody trains on them."""


def read_coco(location: str, errors: ErrorCounter, *, images: str | None = None) -> Iterator[Record]:
    """The images of a COCO captions file (`images` and `annotations`) with all their captions.

    An image is `file_name` in `images`, or in the folder of its year there (`train2014/`). Without `images`, what is
    not beside the file is taken from its `coco_url`. Raises MMGPTError when the file is not one of annotations: a list
    is a file of results, made by a model.
    """
    files: dict[Any, dict[str, Any]] = {}
    captions: dict[Any, list[str]] = {}
    name = base_name(location)
    for key, item in read_json(location):
        try:
            if key == "":
                raise MMGPTError(f"{source_name(location)}: a list, as results are, not a file of COCO captions")
            if key == "images":
                image_id = _member(item, "id", (int, str))
                if image_id in files:
                    raise BadRecordError("duplicate image")
                _member(item, "file_name", str)
                wanted = ("file_name", "coco_url", "flickr_url", "width", "height")
                files[image_id] = {k: item[k] for k in wanted if item.get(k)}
            elif key == "annotations":
                caption = plain_text(_member(item, "caption", str))
                if not caption:
                    raise BadRecordError("empty caption")
                captions.setdefault(_member(item, "image_id", (int, str)), []).append(caption)
        except BadRecordError as error:
            errors.add(str(error), f"{name}:{key} {_id(item)}")
    if not files:
        raise MMGPTError(f"{source_name(location)}: no 'images', as a file of COCO captions has")
    for image_id, info in files.items():
        try:
            said = captions.pop(image_id, None)
            if not said:
                raise BadRecordError("no captions or questions")
            url = next((u for u in (info.pop("coco_url", None), info.pop("flickr_url", None)) if _is_http(u)), None)
            names = _coco_names(info.pop("file_name"), url)
            metadata = {"image_id": image_id, **({"url": url} if url else {}), **info}
            image = _image(location, images, names, url)
            yield Record(str(image_id), image, _unique(said), source=_source(location), metadata=metadata)
        except BadRecordError as error:
            errors.add(str(error), f"{name}:{str(image_id)[:80]}")
    for image_id in captions:
        errors.add("captions of no image", f"{name}:{str(image_id)[:80]}")


def read_karpathy(
    location: str, errors: ErrorCounter, *, images: str | None = None, split: str = "train"
) -> Iterator[Record]:
    """The images of one `split` of `dataset_coco.json`, `dataset_flickr8k.json` or `dataset_flickr30k.json`.

    `split` is a key of `KARPATHY_SPLITS`; "train" has the images of `restval` as well. An image is `filepath/filename`
    in `images`, or just `filename`. Flickr's have neither `filepath` nor `cocoid`. A. Karpathy and L. Fei-Fei, "Deep
    Visual-Semantic Alignments", 2015.
    """
    if split not in KARPATHY_SPLITS:
        raise ConfigError(unknown_name("split", split, KARPATHY_SPLITS))
    found = False
    for key, item in read_json(location):
        if key != "images":
            continue
        try:
            found = True
            if _member(item, "split", str) not in KARPATHY_SPLITS["all"]:
                raise BadRecordError("unknown split")
            if item["split"] not in KARPATHY_SPLITS[split]:
                continue
            file = _member(item, "filename", str)
            folder = item.get("filepath")
            names = [*([f"{folder}/{file}"] if isinstance(folder, str) and folder else []), file]
            sentences = _member(item, "sentences", list)
            said = [plain_text(_member(sentence, "raw", str)) for sentence in sentences]
            if not any(said):
                raise BadRecordError("no captions or questions")
            metadata = {"image_id": item.get("cocoid", item.get("imgid")), "split": item["split"]}
            image_key = str(item["cocoid"]) if "cocoid" in item else Path(file).stem
            image = _image(location, images, names)
            yield Record(image_key, image, _unique(said), source=_source(location), metadata=metadata)
        except BadRecordError as error:
            errors.add(str(error), f"{base_name(location)}:{_id(item)}")
    if not found:
        raise MMGPTError(f"{source_name(location)}: no 'images', as Karpathy's splits have")


def read_vqa(
    location: str,
    errors: ErrorCounter,
    *,
    images: str | None = None,
    annotations: str | None = None,
    unanswered: bool = False,
) -> Iterator[Record]:
    """The images of a VQA or OK-VQA questions file, each with its questions.

    `annotations` is the file with the answers, by default the one beside the questions whose name the datasets give it:
    `v2_OpenEnded_mscoco_val2014_questions.json` has `v2_mscoco_val2014_annotations.json`. `unanswered` reads a test
    set, whose answers are not public: none are looked for, all are empty. `answer` is `multiple_choice_answer`, or else
    the most common one; `answers` are all ten. metadata: `question_ids`, `question_types`, `answer_types`.

    Images are `COCO_val2014_000000000042.jpg` in `images` or in `val2014/` there, or COCO 2017's `000000000042.jpg`;
    `test-dev2015` questions are about images of `test2015`. A string for an image id is a file name.
    """
    answered = {} if unanswered else _read_annotations(annotations or _annotations_of(location), errors)
    groups, kinds = _Groups(), {"data_type": "", "data_subtype": ""}
    name, found = base_name(location), False
    for key, item in read_json(location):
        if key in kinds and isinstance(item, str):
            kinds[key] = item
        if key != "questions":
            continue
        try:
            found = True
            question_id = _member(item, "question_id", (int, str))
            image_id = _member(item, "image_id", (int, str))
            if unanswered:
                groups.add(image_id, _question(item), question_ids=question_id)
                continue
            if question_id not in answered:
                raise BadRecordError("question without annotation")
            answer, answers, question_type, answer_type = answered[question_id]
            groups.add(
                image_id,
                _question(item, answers, answer),
                question_ids=question_id,
                question_types=question_type,
                answer_types=answer_type,
            )
        except BadRecordError as error:
            errors.add(str(error), f"{name}:{_id(item)}")
    if not found:
        raise MMGPTError(f"{source_name(location)}: no 'questions', as a VQA questions file has")
    subset = re.search(r"(?:train|val|test(?:-dev)?)20\d\d", kinds["data_subtype"]) or re.search(
        r"(?:train|val|test(?:-dev)?)20\d\d", name
    )
    year = subset[0].replace("-dev", "") if subset else ""
    abstract = re.search(r"abstract_v\d+", f"{kinds['data_type']} {name}")
    for image_id, group in groups.by_image.items():
        group.names = _vqa_names(image_id, year, abstract[0] if abstract else "")
    yield from groups.records(location, images, errors)


def read_textvqa(
    location: str, errors: ErrorCounter, *, images: str | None = None, unanswered: bool = False
) -> Iterator[Record]:
    """The images of a TextVQA file (`data`: a list of questions), each with its questions.

    Images are `<image_id>.jpg` in `images`. Without `images`, what is not beside the file is taken from its
    `flickr_original_url`, or else its `flickr_300k_url`; many of those are gone. `unanswered`: as for `read_vqa`.
    """
    groups, found = _Groups(), False
    for key, item in read_json(location):
        if key != "data":
            continue
        try:
            found = True
            image_id = _member(item, "image_id", (int, str))
            question = _question(item) if unanswered else _question(item, _answers(item))
            group = groups.add(image_id, question, question_ids=_member(item, "question_id", (int, str)))
            urls = (item.get("flickr_original_url"), item.get("flickr_300k_url"))
            group.names, group.url = [f"{image_id}.jpg"], next((url for url in urls if _is_http(url)), None)
        except BadRecordError as error:
            errors.add(str(error), f"{base_name(location)}:{_id(item)}")
    if not found:
        raise MMGPTError(f"{source_name(location)}: no 'data', as a TextVQA file has")
    yield from groups.records(location, images, errors)


def read_vizwiz(
    location: str, errors: ErrorCounter, *, images: str | None = None, unanswered: bool = False
) -> Iterator[Record]:
    """The images of a VizWiz-VQA file (a list of `image`, `question`, `answers`, `answerable`), each with its question.

    There are no question ids: results are joined on the image's file name, which stands in their place. metadata:
    `question_ids`, `answer_types`, `answerable` (1 or 0). `unanswered`: as for `read_vqa`.
    """
    groups = _Groups()
    for key, item in read_json(location):
        if key != "":
            raise MMGPTError(f"{source_name(location)}: an object, not a list as a VizWiz file is")
        try:
            file = _member(item, "image", str)
            question = _question(item) if unanswered else _question(item, _answers(item))
            types, answerable = (
                item.get(k) if isinstance(item.get(k), int | str) else None for k in ("answer_type", "answerable")
            )
            group = groups.add(file, question, question_ids=file, answer_types=types, answerable=answerable)
            group.names = [file]
        except BadRecordError as error:
            errors.add(str(error), f"{base_name(location)}:{_id(item)}")
    yield from groups.records(location, images, errors)


@dataclass
class _Group:
    """The questions about one image, and a list of what is known about each under every name."""

    questions: list[QuestionAnswer] = field(default_factory=list)
    details: dict[str, list[Any]] = field(default_factory=dict)
    names: Sequence[str] = ()
    url: str | None = None


class _Groups:
    """Questions by image, in the order in which the images first come."""

    def __init__(self) -> None:
        self.by_image: dict[int | str, _Group] = {}

    def add(self, image_id: int | str, question: QuestionAnswer, **details: Any) -> _Group:
        group = self.by_image.setdefault(image_id, _Group())
        group.questions.append(question)
        for name, value in details.items():
            group.details.setdefault(name, []).append(value)
        return group

    def records(self, location: str, images: str | None, errors: ErrorCounter) -> Iterator[Record]:
        for image_id, group in self.by_image.items():
            try:
                known = {name: values for name, values in group.details.items() if any(v is not None for v in values)}
                metadata = {"image_id": image_id, **({"url": group.url} if group.url else {}), **known}
                image = _image(location, images, group.names, group.url)
                key = str(image_id)
                questions = tuple(group.questions)
                yield Record(key, image, questions=questions, source=_source(location), metadata=metadata)
            except BadRecordError as error:
                errors.add(str(error), f"{base_name(location)}:{str(image_id)[:80]}")


_Annotation = tuple[str | None, tuple[str, ...], str | None, str | None]


def _read_annotations(location: str, errors: ErrorCounter) -> dict[int | str, _Annotation]:
    """question id -> (multiple_choice_answer, answers, question_type, answer_type)."""
    found: dict[int | str, _Annotation] = {}
    for key, item in read_json(location):
        if key != "annotations":
            continue
        try:
            # Most of the millions of answers are the same few words: one string each.
            answers = tuple(map(sys.intern, _answers(item)))
            given, *types = (
                sys.intern(value) if isinstance(value, str) and value else None
                for value in (item.get(name) for name in ("multiple_choice_answer", "question_type", "answer_type"))
            )
            found[_member(item, "question_id", (int, str))] = (given, answers, types[0], types[1])
        except BadRecordError as error:
            errors.add(str(error), f"{base_name(location)}:{_id(item)}")
    if not found:
        raise MMGPTError(f"{source_name(location)}: no 'annotations', as a VQA annotations file has")
    return found


def _annotations_of(questions: str) -> str:
    """The public name of the annotations beside a questions file. Raises MMGPTError when there is none."""
    name = base_name(questions)
    guess = re.sub(r"(OpenEnded|MultipleChoice)_", "", name).replace("questions", "annotations")
    place = f"{folder_of(questions)}/{guess}"
    if guess == name or not exists(place):
        beside = "" if guess == name else f" (no {guess} beside it)"
        raise MMGPTError(f"{source_name(questions)}: name its file of annotations{beside}, or read it as unanswered")
    return place


def _question(item: Any, answers: Sequence[str] | None = None, answer: str | None = None) -> QuestionAnswer:
    """`answers` of None: not public. Those that agree with `answer` come first, as a QuestionAnswer has them."""
    question = plain_text(_member(item, "question", str))
    if not question:
        raise BadRecordError("question without text or answer")
    if answers is None:
        return QuestionAnswer(question, "")
    common = Counter(a for a in answers if a).most_common(1)
    answer = answer or (common[0][0] if common else "")
    if not answer:
        raise BadRecordError("question without text or answer")
    return QuestionAnswer(question, answer, tuple(sorted(answers, key=lambda a: a != answer)) or (answer,))


def _answers(item: Any) -> list[str]:
    """Of `[{"answer": ...}, ...]` or a list of text."""
    values = _member(item, "answers", list)
    return [plain_text(value.get("answer") if isinstance(value, dict) else value) for value in values]


def _coco_names(file_name: str, url: str | None) -> list[str]:
    year = re.match(r"COCO_([a-z]+20\d\d)_", file_name) or re.search(r"/([a-z]+20\d\d)/[^/]+$", url or "")
    return [file_name, *([f"{year[1]}/{file_name}"] if year else [])]


def _vqa_names(image_id: int | str, year: str, abstract: str) -> list[str]:
    if isinstance(image_id, str) and not re.fullmatch(r"[0-9]{1,18}", image_id):
        return [image_id if "." in image_id else f"{image_id}.jpg"]
    number = f"{int(image_id):012d}"
    file = f"{abstract}_{year}_{number}.png" if abstract else f"COCO_{year}_{number}.jpg" if year else f"{number}.jpg"
    return [file, *([f"{year}/{file}"] if year else []), f"{number}.jpg"]


def _image(location: str, images: str | None, names: Sequence[str], url: str | None = None) -> Path | str:
    """`images` was asked for, so no URL stands in for a file that is missing there."""
    folder = images if images is not None else folder_of(location)
    if url is not None and images is None and is_remote(folder):
        return url
    image = find_image(folder, names) or (url if images is None else None)
    if image is None:
        raise BadRecordError("no image")
    return image


def _member(item: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise BadRecordError(f"no {name}")
    return value


def _id(item: Any) -> str:
    """What names an item in a message."""
    names = ("question_id", "id", "cocoid", "filename", "image", "image_id")
    values = (item.get(name) for name in names) if isinstance(item, dict) else ()
    return next((str(value)[:80] for value in values if isinstance(value, int | str)), "?")


def _is_http(url: Any) -> bool:
    return isinstance(url, str) and is_url(url) and url[:4].lower() == "http"


def _source(location: str) -> str:
    return Path(base_name(location)).name.partition(".")[0]


def _unique(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text))
