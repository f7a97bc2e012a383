"""Parts of a build, as folders that are there whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from mm_gpt.errors import MMGPTError


def once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `make` writes into the folder that it is given, under the name `folder`; what it returns, as `report.json`.

    Nothing is made that is there already. Attempts may run at the same time, on any machines, and be killed at any
    point: each writes into a folder of its own, and the first that is finished takes the name.
    """
    report = folder / "report.json"
    if report.is_file():
        return read_json(report)
    # Not told by host and process: containers on two machines may agree in both.
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        values = json.dumps(make(temporary)) + "\n"
        (temporary / report.name).write_text(values, encoding="utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not report.is_file():  # else another attempt was faster, with the same result
                raise
    except OSError as error:  # a full disk, say
        raise MMGPTError(f"{folder}: cannot be made on {os.uname().nodename} ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_json(report)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MMGPTError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise MMGPTError(f"{path}: not an object")
    return values
