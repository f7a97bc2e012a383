"""Model folders: `config.json`, `model.safetensors`, `processor.json`, `tokenizer.json`, `README.md`.

A decoder that comes from the registry is not stored again: the folder names it and keeps what was trained on top.
`load_model` is the one door: our folders, the models of the package, decoders of the registry, Hugging Face folders,
and repositories of the hub by name.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_gpt import config as configs
from mm_gpt.errors import CheckpointError, MMGPTError, unknown_name
from mm_gpt.hub.families import is_foreign, load_foreign
from mm_gpt.hub.fetching import download, registry
from mm_gpt.hub.fetching.repository import fetch_repository, is_repository_name
from mm_gpt.hub.gguf import reader as gguf
from mm_gpt.hub.weights import open_safetensors, read_json, write_json
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.lora import merge_lora
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    end_of_text: str
    end_of_turn: str
    more_ends: tuple[int, ...] = ()
    """Further ids that end an answer."""
    names: dict[str, str] = field(default_factory=dict)
    """`bos_token` and the like: what a chat template may write."""


SHIPPED = Path(__file__).resolve().parent.parent / "weights"
"""Models inside the package, one folder each."""
TEMPLATE = "chat_template.jinja"


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def model_folder(name: str | Path) -> Path:
    """The folder of a model: `name` itself, one that the package ships, or a repository of the hub, fetched if needed.

    Raises MMGPTError for an unknown name, DownloadError when a repository is out of reach.
    """
    if Path(name).is_dir():
        return Path(name)
    if str(name) in shipped_models():
        return SHIPPED / str(name)
    if is_repository_name(str(name)):
        return fetch_repository(str(name))
    if Path(name).name != str(name):
        raise CheckpointError(f"{name}: no such model folder")
    known = [*shipped_models(), *decoder_names()]
    unknown = unknown_name("model", str(name), known)
    raise MMGPTError(f"{unknown}; or give the folder of a model, or OWNER/NAME on the Hugging Face hub")


def decoder_names() -> list[str]:
    """The decoders of the registry."""
    return sorted(e.name for e in registry.REGISTRY.values() if any(f.name.endswith(".gguf") for f in e.files))


def read_configs(folder: Path) -> tuple[ModelConfig, ProcessorConfig]:
    """What a model folder of ours says about its model.

    Raises CheckpointError or ConfigError naming the file and key."""
    values = read_json(folder / "config.json")
    model = configs.from_dict(ModelConfig, values, where=f"{folder}/config.json")
    values = read_json(folder / "processor.json")
    return model, configs.from_dict(ProcessorConfig, values, where=f"{folder}/processor.json")


def load_decoder(name: str) -> tuple[Decoder, Tokenizer]:
    """A decoder and its tokenizer by registry name (downloaded on first use) or from a Hugging Face folder.

    Raises MMGPTError for an unknown name, DownloadError or CheckpointError when its files are out of reach or broken.
    """
    if Path(name).is_dir():
        model, processor = load_model(Path(name))
        merge_lora(model.decoder)
        return model.decoder, processor.tokenizer
    registry.lookup(name)
    paths = download.fetch(name)
    path = next((p for p in paths.values() if p.suffix == ".gguf"), None)
    if path is None:
        raise MMGPTError(f"{name!r} is in the registry, but is not a decoder")
    decoder, fields = gguf.load_gguf(path)
    return decoder, Tokenizer.from_gguf_fields(fields, str(path))


def save_model(model: MMGPT, processor: Processor, folder: Path, *, card: str | None = None) -> None:
    """Write a model into an existing folder. Matrices are stored in half precision, vectors in float32."""
    base_stored = not isinstance(model.config.decoder, str)
    state = {k: _compact(v, k) for k, v in model.state_dict().items() if base_stored or not _is_base(k)}
    save_file(state, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # the library writes for the owner alone; a model is to be shared
    write_json(folder / "config.json", configs.to_dict(model.config))
    write_json(folder / "processor.json", configs.to_dict(processor.config))
    if base_stored:
        tokenizer = processor.tokenizer
        tokenizer.save(folder / "tokenizer.json")
        ends = TokenizerConfig(
            end_of_text=tokenizer.end_of_text,
            end_of_turn=tokenizer.end_of_turn,
            more_ends=tokenizer.end_ids,
            names=tokenizer.names,
        )
        write_json(folder / "tokenizer_config.json", configs.to_dict(ends))
    if processor.template is not None:
        (folder / TEMPLATE).write_text(processor.template.source, encoding="utf-8")
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def load_model(name: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[MMGPT, Processor]:
    """A model by name or folder, on the CPU. Raises CheckpointError naming what is missing or left over.

    Names: those of the package, decoders of the registry, `owner/name` on the Hugging Face hub.
    """
    if not Path(name).is_dir() and str(name) in decoder_names():
        decoder, tokenizer = load_decoder(str(name))
        text = ProcessorConfig(max_length=decoder.config.max_length)
        processor = Processor(tokenizer, text, vocab_size=decoder.config.vocab_size)
        return MMGPT(ModelConfig(decoder=str(name)), decoder).eval(), processor
    folder = model_folder(name)
    values = read_json(folder / "config.json")
    if is_foreign(values):
        return load_foreign(folder, values, dtype=dtype)
    config, processor_config = read_configs(folder)
    if isinstance(config.decoder, str):
        if Path(config.decoder).is_dir() and Path(config.decoder).samefile(folder):
            raise CheckpointError(f"{folder}/config.json: the folder names itself as its decoder")
        decoder, tokenizer = load_decoder(config.decoder)
    else:
        decoder = Decoder(config.decoder)
        tokenizer = _load_tokenizer(folder)
    model = MMGPT(config, decoder)
    vocab_size = decoder.config.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the decoder {vocab_size}")
    fill(model, folder / "model.safetensors", skip=_is_base if isinstance(config.decoder, str) else lambda _: False)
    template = None
    if (folder / TEMPLATE).exists():
        source = (folder / TEMPLATE).read_text(encoding="utf-8")
        template = ChatTemplate(
            source,
            special=tokenizer.names,
            where=str(folder / TEMPLATE),
            end_tokens=tokenizer.end_tokens,
            guarded=tokenizer.special,
        )
    return model.eval(), Processor(tokenizer, processor_config, vocab_size=vocab_size, template=template)


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    values = configs.from_dict(TokenizerConfig, read_json(path), where=str(path))
    return Tokenizer.from_file(
        folder / "tokenizer.json",
        end_of_text=values.end_of_text,
        end_of_turn=values.end_of_turn,
        more_ends=values.more_ends,
        names=values.names,
    )


def fill(module: nn.Module, path: Path, *, prefix: str = "", skip: Any = lambda _: False) -> None:
    """Copy the tensors of a safetensors file into `module`, every one of them and nothing else.

    With `prefix`, only the tensors under it are looked at. Raises CheckpointError naming the first that does not fit.
    """
    wanted = {prefix + name: tensor for name, tensor in module.state_dict().items() if not skip(name)}
    with open_safetensors(path) as file:
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
