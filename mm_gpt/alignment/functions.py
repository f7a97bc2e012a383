"""Functions of the user by name: `file.py:function` and `package.module:function`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm_gpt.errors import MMGPTError, unknown_name


def load_function(source: str) -> Callable[..., Any]:
    """The function that `source` names; its file or module is run. A file may import those beside it.

    Raises MMGPTError naming what is not there, or what fails as it is run.
    """
    place, _, name = source.rpartition(":")
    try:
        module = _module_of(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a script may end itself
        raise MMGPTError(f"{source}: {place} cannot be run ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise MMGPTError(f"{source}: {unknown_name('function', name, names)}")
    return function


def _module_of(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module
