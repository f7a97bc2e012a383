"""Models for other programs: folders that Hugging Face's classes load, and so vLLM serves, and GGUF files of llama.cpp.

The import's tables of names are read backwards, and the import is the judge: what it would not read back as the model
that it was given is refused, with the setting that has no counterpart. A folder is written beside its place and renamed
when it is whole.
"""

import shutil
from contextlib import suppress
from pathlib import Path

import torch

from mm_gpt.errors import CheckpointError, MMGPTError, unknown_name
from mm_gpt.hub.checkpoint import load_model
from mm_gpt.hub.export.folder import write_folder
from mm_gpt.hub.export.layout import INSTEAD
from mm_gpt.hub.fetching.repository import CONFIG_FILE
from mm_gpt.hub.gguf.mmproj import write_mmproj
from mm_gpt.hub.gguf.writer import GGUF_TYPES, write_decoder
from mm_gpt.model.mmgpt import MMGPT
from mm_gpt.processor import Processor
from mm_gpt.system.writing import whole_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"hf": tuple(DTYPES), "gguf": tuple(GGUF_TYPES)}
"""The formats, and how each may store matrices."""
DEFAULT_DTYPE = "float16"
"""Loses nothing of what training stored; vectors stay in float32 in any case."""


def export_model(
    name: str | Path,
    out: Path,
    *,
    format: str = "hf",
    dtype: str = DEFAULT_DTYPE,
    decoder_only: bool = False,
    overwrite: bool = False,
) -> list[Path]:
    """Write the model called `name` into the folder `out`; returns its files, the largest first.

    Low-rank updates are merged. `decoder_only` leaves the vision encoder out. Raises CheckpointError for what the
    format cannot express, MMGPTError for a wrong option or a folder that is in use.
    """
    if format not in FORMATS:
        raise MMGPTError(unknown_name("format", format, FORMATS))
    if dtype not in FORMATS[format]:
        raise MMGPTError(f"format {format}: {unknown_name('dtype', dtype, FORMATS[format])}")
    _check_place(Path(name), out, overwrite=overwrite)
    model, processor = load_model(name)
    if model.concepts is not None and not decoder_only:
        raise CheckpointError(f"{name}: concepts beside an image's tokens have no counterpart elsewhere; {INSTEAD}")
    model.merge_lora()
    place = out.resolve()  # a link to a folder stays, and what it leads to is replaced
    temporary = place.with_name(f".tmp-{place.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        temporary.mkdir(parents=True)
        if format == "hf":
            write_folder(model, processor, temporary, dtype=DTYPES[dtype], decoder_only=decoder_only)
        else:
            _write_gguf(model, processor, temporary, dtype=dtype, decoder_only=decoder_only)
        _replace(temporary, place)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(f"{temporary}", f"{out}")) from None
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sorted((path for path in out.iterdir() if path.is_file()), key=lambda path: -path.stat().st_size)


def _write_gguf(model: MMGPT, processor: Processor, folder: Path, *, dtype: str, decoder_only: bool) -> None:
    """Write `model-DTYPE.gguf`, and `mmproj-DTYPE.gguf` when the model sees, into an existing empty folder.

    Raises CheckpointError for what llama.cpp does not compute.
    """
    if model.vision is not None and not decoder_only:
        with whole_file(folder / f"mmproj-{dtype}.gguf") as partial:
            write_mmproj(model, processor, partial, dtype=dtype)
    elif model.config.prefix_lm:
        raise CheckpointError("prefix_lm True has no counterpart in GGUF's decoders: those read from left to right")
    with whole_file(folder / f"model-{dtype}.gguf") as partial:
        write_decoder(model.decoder, processor, partial, dtype=dtype)


def _check_place(source: Path, out: Path, *, overwrite: bool) -> None:
    if out.resolve() == Path.cwd():
        raise MMGPTError(f"{out}: the folder that you are in; an export replaces its folder, so give another one")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise MMGPTError(f"{out}: exists and is not empty; --overwrite replaces it")
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise MMGPTError(f"{out}: holds the model that is to be exported")
        files = {path.name for path in out.iterdir()}
        exported = CONFIG_FILE in files or any(name.endswith(".gguf") for name in files)
        # Folders in it are somebody's work, and so is a model of ours
        if not exported or "processor.json" in files or any(path.is_dir() for path in out.iterdir()):
            raise MMGPTError(f"{out}: holds no exported model, and is not replaced")
    elif out.exists() and not out.is_dir():
        raise MMGPTError(f"{out}: a file; an export is a folder")


def _replace(temporary: Path, out: Path) -> None:
    """Put the finished folder in place; what was there is deleted last."""
    old = out.with_name(f".old-{out.name}")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:
        with suppress(OSError):
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
