"""Images with captions or questions: WebDataset tars, folders, lists. Nothing is decoded here.

A bad record never stops a run: it is counted by reason, named in a log warning, and skipped. The order is fixed: a tar
in its own order, a folder by name.

Safety: tars are opened as local files (`pipe:` and other URLs are only names of files that do not exist), only image,
.json and .txt members are read (a .pkl or .pyd member stays unread bytes), members over `MAX_MEMBER_BYTES` and sparse
members (small on disk, huge in memory) are refused, and a caption list cannot name a file outside its folder.
"""

import csv
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys

from mm_gpt.datasets.samples import IMAGE_SUFFIXES, BadRecordError, ErrorCounter, QuestionAnswer, Record
from mm_gpt.errors import MMGPTError

MAX_MEMBER_BYTES = 64 * 2**20


def read_records(path: str | Path, errors: ErrorCounter) -> Iterator[Record]:
    """The records of `path`, in an order that never changes; bad ones are counted in `errors` and skipped.

    `path` is one of
    - a WebDataset .tar: `key.jpg` with `key.json` (`{"captions": [...]}`, `{"caption": ...}` or
      `{"qa": [{"question", "answer", "answers"?}]}`) and/or `key.txt` (one caption a line), as from img2dataset
    - a folder with `captions.jsonl` (lines of `{"image": "photo.jpg", ...}` with the keys above) or `captions.csv`
      (columns image,caption; several lines may name one image)
    - a folder of images with `photo.txt` or `photo.json` beside `photo.jpg`
    - a folder of tars, read in order of their names.

    Raises MMGPTError, when called and not at the first record, if `path` does not exist or holds none of these.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() != ".tar":
            raise MMGPTError(f"{path}: expected a .tar or a folder")
        return _read_tar(path, errors)
    if not path.is_dir():
        raise MMGPTError(f"{path}: no such file or folder")
    names = sorted(path.iterdir())
    tars = [name for name in names if name.suffix.lower() == ".tar"]
    images = [name for name in names if _suffix(name.name) in IMAGE_SUFFIXES]
    lists = [path / name for name in ("captions.jsonl", "captions.csv") if (path / name).is_file()]
    if len(lists) + bool(tars) > 1:
        raise MMGPTError(f"{path}: holds {', '.join(p.name for p in [*lists, *tars[:1]])}; name the one to read")
    if lists:
        return _read_list(lists[0], errors)
    if tars:
        return (record for tar in tars for record in _read_tar(tar, errors))
    if images:
        return _read_folder(path, images, errors)
    raise MMGPTError(f"{path}: holds no .tar, no {', .'.join(IMAGE_SUFFIXES)} image and no captions.jsonl or .csv")


def _read_tar(path: Path, errors: ErrorCounter) -> Iterator[Record]:
    def duplicate(_: Exception) -> bool:
        errors.add("duplicate member", path.name)
        return True

    for sample in group_by_keys(_tar_members(path, errors), handler=duplicate):
        name = f"{path.name}:{sample['__key__']}"
        if "__refused__" in sample:
            errors.add(sample["__refused__"], name)
            continue
        try:
            yield _record(sample["__key__"], sample, path.stem)
        except BadRecordError as error:
            errors.add(str(error), name)


def _tar_members(path: Path, errors: ErrorCounter) -> Iterator[dict[str, Any]]:
    """What `group_by_keys` reads: {"fname", "data", "__url__"} for each image, .json or .txt member."""
    try:
        tar = tarfile.open(path, mode="r:")  # noqa: SIM115 (closed by the with below)
    except tarfile.ReadError:
        raise MMGPTError(f"{path}: not an uncompressed tar") from None
    with tar:
        while True:
            try:
                member = tar.next()
                if member is None:
                    break
                tar.members = []  # type: ignore[attr-defined]  # or a long shard keeps every header in memory
                suffix = _suffix(member.name)
                if not member.isreg() or suffix not in (*IMAGE_SUFFIXES, "json", "txt"):
                    continue
                if member.size > MAX_MEMBER_BYTES or member.issparse():
                    # Refused, not dropped: the rest of its record must not pass for a whole one.
                    key, _ = base_plus_ext(member.name)
                    yield {"fname": f"{key}.__refused__", "data": "member too large", "__url__": str(path)}
                    continue
                stream = tar.extractfile(member)
                assert stream is not None  # isreg() said so
                yield {"fname": member.name, "data": stream.read(), "__url__": str(path)}
            except (tarfile.ReadError, tarfile.HeaderError, EOFError) as error:
                errors.add(f"broken tar, rest of it unread ({error})", path.name)
                break


def _read_folder(folder: Path, images: list[Path], errors: ErrorCounter) -> Iterator[Record]:
    for image in images:
        try:
            fields: dict[str, Any] = {"image": image}
            for suffix in ("json", "txt"):
                beside = image.with_suffix(f".{suffix}")
                if beside.is_file():
                    fields[suffix] = beside.read_bytes()
            yield _record(image.stem, fields, folder.name)
        except BadRecordError as error:
            errors.add(str(error), str(image))


def _read_list(path: Path, errors: ErrorCounter) -> Iterator[Record]:
    folder = path.parent.resolve()
    rows = _jsonl_rows(path, errors) if path.suffix == ".jsonl" else _csv_rows(path)
    merged: dict[str, tuple[list[str], list[QuestionAnswer]]] = {}  # a dict keeps the order of first appearance
    for line, row in rows:
        try:
            image = row.get("image")
            if not isinstance(image, str) or not image:
                raise BadRecordError("no image named")
            captions, questions = _texts(row)
            if not captions and not questions:
                raise BadRecordError("no captions or questions")
            entry = merged.setdefault(image, ([], []))
            entry[0].extend(captions)
            entry[1].extend(questions)
        except BadRecordError as error:
            errors.add(str(error), f"{path.name}:{line}")
    for name, (captions, questions) in merged.items():
        image = (folder / name).resolve()
        if not image.is_relative_to(folder):
            errors.add("image outside the folder", f"{path.name}:{name}")
        elif _suffix(name) not in IMAGE_SUFFIXES or not image.is_file():
            errors.add("no image", f"{path.name}:{name}")
        else:
            yield Record(str(Path(name).with_suffix("")), image, _unique(captions), _unique(questions), folder.name)


def _jsonl_rows(path: Path, errors: ErrorCounter) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, _json(line)
                except BadRecordError as error:
                    errors.add(str(error), f"{path.name}:{number}")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = {"image", "caption"} - set(reader.fieldnames or ())
        if missing:
            raise MMGPTError(f"{path}: no column {' or '.join(sorted(missing))} in the first line")
        try:
            for row in reader:
                yield reader.line_num, {"image": row["image"], "caption": row["caption"] or ""}
        except csv.Error as error:
            raise MMGPTError(f"{path}: line {reader.line_num}: {error}") from None


def _record(key: str, fields: dict[str, Any], source: str) -> Record:
    """A record from {"json": bytes, "txt": bytes, an image suffix: bytes, or "image": Path}. Raises BadRecordError."""
    image = next((fields[s] for s in ("image", *IMAGE_SUFFIXES) if s in fields), None)
    if image is None:
        raise BadRecordError("no image")
    if (image.stat().st_size if isinstance(image, Path) else len(image)) == 0:
        raise BadRecordError("empty image")
    captions: list[str] = []
    questions: list[QuestionAnswer] = []
    if "json" in fields:
        values = _json(fields["json"])
        captions, questions = _texts(values)
        if isinstance(values.get("source"), str):
            source = values["source"]
    if "txt" in fields:
        captions += [line.strip() for line in _utf8(fields["txt"]).splitlines() if line.strip()]
    if not captions and not questions:
        raise BadRecordError("no captions or questions")
    # img2dataset writes the same caption to .txt and .json
    return Record(key, image, _unique(captions), _unique(questions), source)


def _texts(values: dict[str, Any]) -> tuple[list[str], list[QuestionAnswer]]:
    caption, captions, pairs = values.get("caption"), values.get("captions") or [], values.get("qa") or []
    captions = [*([caption] if caption else []), *(captions if isinstance(captions, list) else [captions])]
    if not all(isinstance(c, str) for c in captions):
        raise BadRecordError("captions are not text")
    return [c.strip() for c in captions if c.strip()], [
        _question(p) for p in (pairs if isinstance(pairs, list) else [0])
    ]


def _question(pair: Any) -> QuestionAnswer:
    if not isinstance(pair, dict) or not all(isinstance(pair.get(k), str) and pair[k] for k in ("question", "answer")):
        raise BadRecordError("question without text or answer")
    answers = pair.get("answers") or [pair["answer"]]
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise BadRecordError("answers are not a list of text")
    return QuestionAnswer(pair["question"], pair["answer"], tuple(answers))


def _json(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(_utf8(data))
    except (ValueError, RecursionError):
        raise BadRecordError("bad JSON") from None
    if not isinstance(values, dict):
        raise BadRecordError("JSON is not an object")
    return values


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRecordError("text is not UTF-8") from None


def _unique(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(items))


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def clean_caption(text: str) -> str:
    """A tokenised caption as people write it: `a man 's dog , in the snow .` becomes `A man's dog, in the snow.`

    Applying it twice changes nothing; an empty caption stays empty.
    """
    previous = None
    while text != previous:  # one change can open the way for another
        previous, text = text, _clean_once(text)
    return text


def _clean_once(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r"(\w) (?='(?:s|t|re|ve|ll|d|m)\b|n't\b)", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(\w+) ' (s|t|re|ve|ll)\b", r"\1'\2", text)
    text = re.sub(r'" ?([^"]*?) ?"', r'"\1"', text)
    text = re.sub(r"(?<!\S)' ([^']+?) '(?!\w)", r"'\1'", text)
    text = re.sub(r"(\ws) '(?= \w)", r"\1'", text)
    text = re.sub(r" ([.,!?;:]+)(?![^\s\"')])", r"\1", text)
    text = re.sub(r"([(#]) | (\))", r"\1\2", text)
    text = re.sub(r"(?<!\.)\.\.(?!\.)", ".", text)
    text = text.rstrip(" ,;:-")
    if not text:
        return ""
    if not re.search(r"[.!?][\"')]*$", text):
        text += "."
    return text[0].upper() + text[1:]
