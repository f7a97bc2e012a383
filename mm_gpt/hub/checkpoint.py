"""Model folders: `config.json`, `model.safetensors`, `processor.json`, `tokenizer.json`, `README.md`.

A decoder that comes from the registry is not stored again: the folder names it and keeps what was trained on top.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_gpt import config as configs
from mm_gpt.errors import CheckpointError, MMGPTError, unknown_name
from mm_gpt.hub import download, llama, registry
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    end_of_text: str
    end_of_turn: str


SHIPPED = Path(__file__).resolve().parent.parent / "weights"
"""Models inside the package, one folder each."""


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def model_folder(name: str | Path) -> Path:
    """The folder of a model that the package ships, or `name` itself if it is a folder. Raises MMGPTError otherwise."""
    if Path(name).is_dir():
        return Path(name)
    if str(name) not in shipped_models():
        raise MMGPTError(f"{unknown_name('model', str(name), shipped_models())}; or give the folder of a trained model")
    return SHIPPED / str(name)


def read_configs(folder: Path) -> tuple[ModelConfig, ProcessorConfig]:
    """What a model folder says about its model. Raises CheckpointError or ConfigError naming the file and key."""
    values = llama.read_json(folder / "config.json")
    model = configs.from_dict(ModelConfig, values, where=f"{folder}/config.json")
    values = llama.read_json(folder / "processor.json")
    return model, configs.from_dict(ProcessorConfig, values, where=f"{folder}/processor.json")


def load_decoder(name: str) -> tuple[Decoder, Tokenizer]:
    """A decoder and its tokenizer by registry name (downloaded on first use) or from a Hugging Face folder.

    Raises MMGPTError for an unknown name, DownloadError or CheckpointError when its files are out of reach or broken.
    """
    folder = Path(name)
    if folder.is_dir():
        decoder = llama.load_hf_folder(folder)
        ends = llama.read_json(folder / "tokenizer_config.json")
        end = _token_text(ends.get("eos_token"))
        tokenizer = Tokenizer.from_file(folder / "tokenizer.json", end_of_text=end, end_of_turn=end)
        return decoder, tokenizer
    registry.lookup(name)
    paths = download.fetch(name)
    path = next((p for p in paths.values() if p.suffix == ".gguf"), None)
    if path is None:
        raise MMGPTError(f"{name!r} is in the registry, but is not a decoder")
    decoder, fields = llama.load_gguf(path)
    return decoder, Tokenizer.from_gguf_fields(fields, str(path))


def save_model(model: MMGPT, processor: Processor, folder: Path, *, card: str | None = None) -> None:
    """Write a model into an existing folder. Matrices are stored in half precision, vectors in float32."""
    base_stored = not isinstance(model.config.decoder, str)
    state = {k: _compact(v, k) for k, v in model.state_dict().items() if base_stored or not _is_base(k)}
    save_file(state, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # the library writes for the owner alone; a model is to be shared
    _write_json(folder / "config.json", configs.to_dict(model.config))
    _write_json(folder / "processor.json", configs.to_dict(processor.config))
    if base_stored:
        tokenizer = processor.tokenizer
        tokenizer.save(folder / "tokenizer.json")
        ends = TokenizerConfig(end_of_text=tokenizer.end_of_text, end_of_turn=tokenizer.end_of_turn)
        _write_json(folder / "tokenizer_config.json", configs.to_dict(ends))
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def load_model(folder: Path) -> tuple[MMGPT, Processor]:
    """The model in a folder, in float32 on the CPU. Raises CheckpointError naming what is missing or left over."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    config, processor_config = read_configs(folder)
    if isinstance(config.decoder, str):
        decoder, tokenizer = load_decoder(config.decoder)
    else:
        decoder = Decoder(config.decoder)
        where = f"{folder}/tokenizer_config.json"
        ends = configs.from_dict(TokenizerConfig, llama.read_json(folder / "tokenizer_config.json"), where=where)
        tokenizer = Tokenizer.from_file(
            folder / "tokenizer.json", end_of_text=ends.end_of_text, end_of_turn=ends.end_of_turn
        )
    model = MMGPT(config, decoder)
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the decoder {decoder.config.vocab_size}"
        )
    fill(model, folder / "model.safetensors", skip=_is_base if isinstance(config.decoder, str) else lambda _: False)
    return model.eval(), Processor(tokenizer, processor_config, vocab_size=decoder.config.vocab_size)


def fill(module: nn.Module, path: Path, *, prefix: str = "", skip: Any = lambda _: False) -> None:
    """Copy the tensors of a safetensors file into `module`, every one of them and nothing else.

    With `prefix`, only the tensors under it are looked at. Raises CheckpointError naming the first that does not fit.
    """
    wanted = {prefix + name: tensor for name, tensor in module.state_dict().items() if not skip(name)}
    with llama.open_safetensors(path) as file:
        stored = {name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118 (not a dict)
        if stored != set(wanted):
            wrong = sorted(stored ^ set(wanted))[0]
            what = "has an unknown tensor" if wrong in stored else "lacks the tensor"
            raise CheckpointError(f"{path}: {what} {wrong} ({len(stored ^ set(wanted))} do not match)")
        for name, target in wanted.items():
            tensor = file.get_tensor(name)
            if tensor.shape != target.shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(target.shape)}"
                raise CheckpointError(f"{path}: {name} has shape {shapes}")
            with torch.no_grad():
                target.copy_(tensor)


def _is_base(name: str) -> bool:
    return name.startswith("decoder.") and ".lora_" not in name


def _compact(tensor: Tensor, name: str) -> Tensor:
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor.detach().contiguous()
    half = tensor.detach().to(torch.float16)
    if not half.isfinite().all():
        raise CheckpointError(f"{name} holds values that half precision cannot store")
    return half.contiguous()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _token_text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
