"""The model that is taken where none is named: `MM_GPT_MODEL`, else the user's own setting, else the packaged one.

The setting is a line of `settings.toml` in the user's configuration folder, which `mm-gpt models --set-default` writes.
"""

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path

from mm_gpt.config import from_dict
from mm_gpt.errors import ConfigError, MMGPTError, unknown_name
from mm_gpt.hub.public import SHORT_NAMES
from mm_gpt.system.writing import write_text

PACKAGED = "default"
VARIABLE = "MM_GPT_MODEL"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`settings.toml`."""

    model: str = PACKAGED
    """The model that is taken where none is named."""


def settings_file() -> Path:
    """`XDG_CONFIG_HOME/mm-gpt/settings.toml`, else `~/.config/mm-gpt/settings.toml`. It need not exist."""
    if xdg := os.environ.get("XDG_CONFIG_HOME"):
        return Path(xdg).expanduser().absolute() / "mm-gpt" / "settings.toml"
    return Path.home() / ".config" / "mm-gpt" / "settings.toml"


def read_settings() -> Settings:
    """Raises ConfigError naming the file for what is no TOML, and for an unknown key and the closest right one."""
    path = settings_file()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not TOML
        raise ConfigError(f"{path}: not readable as TOML ({error})") from None
    return from_dict(Settings, values, where=str(path))


def chosen_model() -> str:
    """The model that is taken where none is named.

    Raises MMGPTError naming the variable or the file whose name means no model."""
    name, where = _choice()
    return checked_name(name, where=where)


def describe_choice() -> str:
    """One line for people: the model, and what says so."""
    name, where = _choice()
    return f"{checked_name(name, where=where)} ({where})"


def set_default(name: str) -> Path:
    """Write the setting; the file. A folder is kept by its whole path. Raises MMGPTError for what names no model."""
    name = checked_name(name, where="--set-default")
    if name not in SHORT_NAMES and name != PACKAGED and Path(name).is_dir():
        name = str(Path(name).resolve())
    read_settings()  # what is there and wrong is not replaced without a word
    path = settings_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"model = {json.dumps(name, ensure_ascii=False)}\n")  # JSON's strings are TOML's
    except OSError as error:
        raise MMGPTError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def checked_name(name: str, *, where: str) -> str:
    """`name`, if it can mean a model: no network is asked. Raises MMGPTError beginning with `where`."""
    if name in (PACKAGED, *SHORT_NAMES):
        return name
    # Imported where they are needed: the commands look for cheap mistakes before they load torch
    from mm_gpt.hub.checkpoint import decoder_names, shipped_models
    from mm_gpt.hub.fetching.repository import is_repository_name

    known = [*shipped_models(), *decoder_names(), *SHORT_NAMES]
    if name in known or Path(name).is_dir() or is_repository_name(name):
        return name
    unknown = unknown_name("model", name, known)
    raise MMGPTError(f"{where}: {unknown}; or give the folder of a model, or OWNER/NAME on the Hugging Face hub")


def _choice() -> tuple[str, str]:
    """The name, and where it is from."""
    if own := os.environ.get(VARIABLE):
        return own, VARIABLE
    path = settings_file()
    return (read_settings().model, f"{path}") if path.exists() else (PACKAGED, "in the package")
