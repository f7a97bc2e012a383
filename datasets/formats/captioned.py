"""Images with captions or questions: WebDataset tars, folders, lists, and what img2dataset writes. No image is decoded.

A bad record never stops a run: it is counted by reason, named in a log warning, and skipped. The order is fixed: a tar
in its own order, a folder by name.

Safety: tars are read as streams from wherever `files.open_file` allows (`pipe:` is refused), only image, .json and .txt
members are read (a .pkl or .pyd member stays unread bytes), members over `MAX_MEMBER_BYTES` and sparse members (small
on disk, huge in memory) are refused, and a caption list cannot name a file outside its folder.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_gpt.datasets.reading.archives import TAR_ERRORS, Tar
from mm_gpt.datasets.reading.files import base_name, is_hidden, is_remote, list_files, local_path, open_file, suffix_of
from mm_gpt.datasets.reading.parquet import read_parquet
from mm_gpt.datasets.reading.rows import (
    decode_text,
    find_image,
    parse_json,
    plain_values,
    read_csv,
    read_rows,
)
from mm_gpt.datasets.samples import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    BadRecordError,
    ErrorCounter,
    QuestionAnswer,
    Record,
    split_name,
)
from mm_gpt.document import Concepts
from mm_gpt.errors import MMGPTError
from mm_gpt.images import source_name

CAPTION_LISTS = ("captions.jsonl", "captions.csv")
NO_CAPTIONS = """images without captions: put photo.txt (a caption in each line) beside photo.jpg, or list them in \
captions.jsonl: {"image": "photo.jpg", "caption": "..."}"""
"""What to say of a folder of images alone."""
MAX_MEMBER_BYTES = 64 * 2**20
_NOT_METADATA = (
    "id",
    "key",
    "image",
    "concepts",
    "caption",
    "captions",
    "qa",
    "txt",
    "source",
    "exif",
    *IMAGE_SUFFIXES,
)
"""`exif` tells where and with what a photo was taken: it is of no use here, and private."""


def read_records(
    path: str | Path, errors: ErrorCounter, *, images: str | None = None, check_hash: bool = False
) -> Iterator[Record]:
    """The records of `path`, in an order that never changes; bad ones are counted in `errors` and skipped.

    `path` is one of
    - a WebDataset .tar: `key.jpg` with `key.json` (`{"captions": [...]}`, `{"caption": ...}` or
      `{"qa": [{"question", "answer", "answers"?}]}`) and/or `key.txt` (one caption a line), as from img2dataset;
      without an image, `key.json` may say what one would show: `{"concepts": {"golden retriever": 0.8}, ...}`
    - an img2dataset .parquet with the images inside (its "parquet" output)
    - a folder with `captions.jsonl` (lines of `{"image": "photo.jpg", ...}` with the keys above) or `captions.csv`
      (columns image,caption; several lines may name one image); `images` is the folder of the images, if another one
    - a folder of images, and of the folders in it, with `photo.txt` or `photo.json` beside `photo.jpg` (img2dataset's
      "files" output); a `.txt` that has no image is counted
    - a folder of tars, or else of such parquets, read in order of their names
    - a URL, a glob or `{00000..00010}` of tars or of such parquets, see `files.list_files`.

    Other plain values of the .json or the row (`url`, `width`, `height`, `sha256`, `status`, ...) become metadata. A
    `status` of a failed download is counted, and so are the failed downloads that a `00000_stats.json` beside a local
    shard tells of. `check_hash` counts and skips images whose `sha256` is missing or another one. img2dataset takes it
    before it resizes and encodes, so ask for this only where it did neither (`disable_all_reencoding`).

    Raises MMGPTError, when called and not at the first record, if `path` does not exist or holds none of these.
    """
    location = os.fspath(path)
    if is_remote(location):
        return _read_shards(_named_shards(location), errors, check_hash)
    path = local_path(location)
    if not path.exists():
        if re.search(r"[*?\[{]", location):
            return _read_shards(_named_shards(location), errors, check_hash)
        raise MMGPTError(f"{path}: no such file or folder")
    if not path.is_dir():
        if path.suffix.lower() not in (".tar", ".parquet"):
            raise MMGPTError(f"{path}: expected a .tar, a .parquet or a folder")
        return _read_shards([str(path)], errors, check_hash)
    names = sorted(name for name in path.iterdir() if not is_hidden(name.name))
    tars = [str(name) for name in names if name.suffix.lower() == ".tar"]
    lists = [path / name for name in CAPTION_LISTS if (path / name).is_file()]
    if len(lists) + bool(tars) > 1:
        found = ", ".join([*(p.name for p in lists), *map(base_name, tars[:1])])
        raise MMGPTError(f"{path}: holds {found}; name the one to read")
    if lists:
        return _read_list(lists[0], errors, path if images is None else local_path(images))
    if tars:
        return _read_shards(tars, errors, check_hash)
    files = [Path(name) for name in (list_files(str(path)) if names else [])]
    if any(_suffix(file.name) in IMAGE_SUFFIXES for file in files):
        return _read_folder(path, files, errors, check_hash)
    parquets = [str(name) for name in names if name.suffix.lower() == ".parquet"]
    if parquets:
        return _read_shards(parquets, errors, check_hash)
    raise MMGPTError(f"{path}: holds no .tar, no {', .'.join(IMAGE_SUFFIXES)} image and no captions.jsonl or .csv")


def _named_shards(location: str) -> list[str]:
    """The tars behind a URL or pattern, else the parquets: beside tars, those hold only what is known of them."""
    names = list_files(location)
    for suffix in (".tar", ".parquet"):
        shards = [name for name in names if suffix_of(name) == suffix]
        if shards:
            return shards
    raise MMGPTError(f"{source_name(location)}: holds no .tar and no .parquet")


def _read_shards(shards: Sequence[str], errors: ErrorCounter, check_hash: bool) -> Iterator[Record]:
    for shard in shards:
        read = _read_tar if suffix_of(shard) == ".tar" else _read_images_of_parquet
        yield from read(shard, errors, check_hash)


def _read_tar(location: str, errors: ErrorCounter, check_hash: bool) -> Iterator[Record]:
    tar = base_name(location)

    for sample in _grouped(_tar_members(location, errors), tar, errors):
        name = f"{tar}:{sample['__key__']}"
        if "__refused__" in sample:
            errors.add(sample["__refused__"], name)
            continue
        try:
            yield make_record(sample["__key__"], sample, Path(tar).stem, check_hash=check_hash)
        except BadRecordError as error:
            errors.add(str(error), name)
    _count_failed(location, errors)


def _grouped(members: Iterator[tuple[str, bytes | str]], tar: str, errors: ErrorCounter) -> Iterator[dict[str, Any]]:
    """Members that stand together and share a key, as webdataset groups them: {"__key__": ..., suffix: bytes, ...}."""
    sample: dict[str, Any] = {}
    for name, data in members:
        key, suffix = split_name(name)
        if key is None or suffix is None:
            continue
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        sample["__key__"] = key
        if suffix.lower() in sample:
            errors.add("duplicate member", tar)
        else:
            sample[suffix.lower()] = data
    if sample:
        yield sample


def _tar_members(location: str, errors: ErrorCounter) -> Iterator[tuple[str, bytes | str]]:
    """Name and content of each image, .json or .txt member."""
    with open_file(location) as stream:
        try:
            tar = Tar(stream)
        except TAR_ERRORS:
            raise MMGPTError(f"{source_name(location)}: not an uncompressed tar") from None
        with tar:
            while True:
                try:
                    member = tar.next()
                    if member is None:
                        break
                    suffix = _suffix(member.name)
                    if not member.isreg() or is_hidden(member.name):
                        continue
                    if f".{suffix}" in UNREAD_SUFFIXES:
                        errors.add(f"member that is not read (.{suffix})", f"{base_name(location)}:{member.name}")
                    if suffix not in (*IMAGE_SUFFIXES, "json", "txt"):
                        continue
                    if member.size > MAX_MEMBER_BYTES or member.issparse():
                        # Refused, not dropped: the rest of its record must not pass for a whole one.
                        key, _ = split_name(member.name)
                        yield f"{key}.__refused__", "member too large"
                        continue
                    file = tar.extractfile(member)
                    assert file is not None  # isreg() said so
                    yield member.name, file.read()
                except TAR_ERRORS as error:
                    errors.add(f"broken tar, rest of it unread ({error})", base_name(location))
                    break


def _read_images_of_parquet(location: str, errors: ErrorCounter, check_hash: bool) -> Iterator[Record]:
    name = base_name(location)
    for number, row in read_parquet(location, errors):
        columns = [suffix for suffix in IMAGE_SUFFIXES if suffix in row]
        if not columns:
            raise MMGPTError(f"{source_name(location)}: no column {' or '.join(IMAGE_SUFFIXES)} with images")
        try:
            image = next((row[column] for column in columns if row[column] is not None), None)
            if image is not None and not isinstance(image, bytes):
                raise BadRecordError("image is not bytes")
            key = row.get("key")
            text = row.get("txt")
            yield _record(
                str(key) if isinstance(key, int | str) else str(number),
                image,
                {**row, "caption": row.get("caption") or text},
                "",
                Path(name).stem,
                check_hash,
            )
        except BadRecordError as error:
            errors.add(str(error), f"{name}:{number}")


def _count_failed(location: str, errors: ErrorCounter) -> None:
    """Count the downloads that img2dataset's statistics beside a local shard call failed: a tar does not have them."""
    if is_remote(location):
        return
    shard = local_path(location)
    try:
        stats = json.loads(shard.with_name(f"{shard.stem}_stats.json").read_bytes())
        failed = sum(int(stats[name]) for name in ("failed_to_download", "failed_to_resize"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # written by something else
    if failed > 0:
        errors.add("not downloaded", f"{failed} of {shard.name}")
        errors.counts["not downloaded"] += failed - 1


def _read_folder(folder: Path, files: Sequence[Path], errors: ErrorCounter, check_hash: bool) -> Iterator[Record]:
    beside: dict[str, dict[str, Path]] = {}  # by path without suffix
    for file in files:
        if _suffix(file.name) in ("json", "txt"):
            beside.setdefault(str(file.with_suffix("")), {})[_suffix(file.name)] = file
    described: set[str] = set()
    for image in files:
        if _suffix(image.name) not in IMAGE_SUFFIXES:
            continue
        stem = str(image.with_suffix(""))
        described.add(stem)
        try:
            texts = {suffix: file.read_bytes() for suffix, file in beside.get(stem, {}).items()}
            key = image.with_suffix("").relative_to(folder).as_posix()
            yield make_record(key, {"image": image, **texts}, image.parent.name, check_hash=check_hash)
        except BadRecordError as error:
            errors.add(str(error), str(image))
        except OSError as error:
            errors.add("unreadable file", f"{image}: {error.strerror}")
    for stem, texts_of in beside.items():
        if "txt" in texts_of and stem not in described:
            errors.add("text without an image beside it", str(texts_of["txt"]))
    for one in sorted({file.parent for file in files}):
        _count_failed(str(one), errors)


def _read_list(path: Path, errors: ErrorCounter, folder: Path) -> Iterator[Record]:
    """The images that a list names, each once with all that the list says of it."""
    if path.suffix == ".csv":
        rows = read_csv(str(path), errors, columns=("image", "caption"))
    else:
        rows = read_rows(str(path), errors)
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
        try:
            if _suffix(name) not in IMAGE_SUFFIXES:
                raise BadRecordError(f"image that is not read (.{_suffix(name)})")
            found = find_image(str(folder), [name])
            if found is None:
                raise BadRecordError("no image")
            key = str(Path(name).with_suffix(""))
            yield Record(key, found, _unique(captions), _unique(questions), folder.resolve().name)
        except BadRecordError as error:
            errors.add(str(error), f"{path.name}:{name}")


def make_record(key: str, fields: Mapping[str, Any], source: str, *, check_hash: bool = False) -> Record:
    """A record from {"json": bytes, "txt": bytes, an image suffix: bytes, or "image": Path}. Raises BadRecordError."""
    image = next((fields[s] for s in ("image", *IMAGE_SUFFIXES) if s in fields), None)
    values = parse_json(fields["json"]) if "json" in fields else {}
    if not isinstance(values, dict):
        raise BadRecordError("JSON is not an object")
    return _record(key, image, values, decode_text(fields["txt"]) if "txt" in fields else "", source, check_hash)


def _record(
    key: str, image: bytes | Path | None, values: Mapping[str, Any], text: str, source: str, check_hash: bool
) -> Record:
    """`text` has one caption a line, unless it is just the caption that `values` have."""
    if values.get("status") in ("failed_to_download", "failed_to_resize"):
        raise BadRecordError("not downloaded")
    source_of_image: bytes | Path | Concepts
    if image is not None:
        source_of_image = image
        if (image.stat().st_size if isinstance(image, Path) else len(image)) == 0:
            raise BadRecordError("empty image")
    elif "concepts" in values:
        source_of_image = concepts_of(values["concepts"])
    else:
        raise BadRecordError("no image")
    captions, questions = _texts(values)
    # img2dataset writes the same caption to .txt and .json: one of several lines is still one
    if text.strip() not in captions:
        # not splitlines(): a caption may hold U+2028
        captions += [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if not captions and not questions:
        raise BadRecordError("no captions or questions")
    if check_hash and image is not None:
        data = image.read_bytes() if isinstance(image, Path) else image
        if values.get("sha256") != hashlib.sha256(data).hexdigest():
            raise BadRecordError("sha256 is missing or another one")
    if isinstance(values.get("source"), str):
        source = values["source"]
    metadata = plain_values(values, without=_NOT_METADATA)
    return Record(key, source_of_image, _unique(captions), _unique(questions), source, metadata)


def concepts_of(values: Any) -> Concepts:
    """`{"golden retriever": 0.8, ...}`, as JSON has it. Raises BadRecordError for anything else."""
    if not isinstance(values, dict) or not values:
        raise BadRecordError("concepts are not names with scores")
    if not all(name.strip() for name in values):
        raise BadRecordError("a concept without a name")
    for score in values.values():
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:  # NaN is neither
            raise BadRecordError("a concept's score is not a number from 0 to 1")
    return Concepts({name: float(score) for name, score in values.items()})


def _texts(values: Mapping[str, Any]) -> tuple[list[str], list[QuestionAnswer]]:
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
