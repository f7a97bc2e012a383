"""Model folders: `config.json`, `model.safetensors`, `processor.json`, `tokenizer.json`, `README.md`.

A decoder that comes from the registry is not stored again: the folder names it and keeps what was trained on top.
`load_model` is the one door: our folders, the models of the package, decoders of the registry, Hugging Face folders,
and repositories of the hub by name.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mm_gpt import config as configs
from mm_gpt.errors import CheckpointError, MMGPTError, unknown_name
from mm_gpt.hub.families import check_foreign, is_foreign, load_foreign
from mm_gpt.hub.fetching import download, registry
from mm_gpt.hub.fetching.repository import fetch_repository, is_repository_name
from mm_gpt.hub.gguf import reader as gguf
from mm_gpt.hub.packing import PACKINGS, Packing, Update, packing_of, places, repack, stored_kinds
from mm_gpt.hub.public import SHORT_NAMES, long_name
from mm_gpt.hub.weights import (
    Checkpoint,
    NothingDrawn,
    Table,
    naming,
    open_safetensors,
    read_header,
    read_json,
    read_text,
    same,
    template_of,
    unfilled,
    write_json,
)
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.mmgpt import MMGPT, ModelConfig
from mm_gpt.model.packed import unfill
from mm_gpt.processor import Processor, ProcessorConfig
from mm_gpt.system.tensor_files import write_tensors
from mm_gpt.system.writing import write_text
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


def _nothing(name: str) -> bool:
    return False


def shipped_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def model_folder(name: str | Path) -> Path:
    """The folder of a model: `name` itself, one that the package ships, or a repository of the hub, by its own name or
    a short one, fetched if needed.

    Raises MMGPTError for an unknown name, DownloadError when a repository is out of reach.
    """
    name = long_name(name)
    if (folder := _local_folder(name)) is not None:
        return folder
    if str(name) in shipped_models():
        return SHIPPED / str(name)
    if is_repository_name(str(name)):
        return fetch_repository(str(name), check=check_small_files)
    if isinstance(name, Path) or Path(name).name != name:
        raise CheckpointError(f"{name}: no such model folder")
    known = [*shipped_models(), *decoder_names(), *SHORT_NAMES]
    unknown = unknown_name("model", name, known)
    raise MMGPTError(f"{unknown}; or give the folder of a model, or OWNER/NAME on the Hugging Face hub")


def _local_folder(name: str | Path) -> Path | None:
    """The folder that is meant, if one is. A bare word that names a model means the model, whatever lies here; a Path,
    or text with a slash, means a folder."""
    if isinstance(name, str) and (name in shipped_models() or name in decoder_names()):
        return None
    return Path(name) if Path(name).is_dir() else None


def check_small_files(folder: Path) -> None:
    """Before the weights are fetched: whether what came first is a model that can be loaded.

    Raises CheckpointError or ConfigError naming the file."""
    values = read_json(folder / "config.json")
    if is_foreign(values):
        check_foreign(folder, values)
    else:
        read_configs(folder)


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


def load_decoder(name: str, dtype: str = "fp32") -> tuple[Decoder, Tokenizer]:
    """A decoder and its tokenizer by registry name (downloaded on first use) or from a folder.

    `dtype`: how its matrices are kept (mm_gpt.hub.packing). Raises MMGPTError for an unknown name, DownloadError or
    CheckpointError when its files are out of reach or broken.
    """
    if (folder := _local_folder(name)) is not None:
        return _folder_decoder(folder, dtype)
    registry.lookup(name)
    paths = download.fetch(name)
    path = next((p for p in paths.values() if p.suffix == ".gguf"), None)
    if path is None:
        raise MMGPTError(f"{name!r} is in the registry, but is not a decoder")
    decoder, fields = gguf.load_gguf(path, dtype)
    return decoder, gguf.read_tokenizer(fields)


def _folder_decoder(folder: Path, dtype: str, *, above: tuple[Path, ...] = ()) -> tuple[Decoder, Tokenizer]:
    model, processor = _load_folder(folder, dtype=torch.float32, decoder_dtype=dtype, above=above)
    model.merge_lora()
    return model.decoder, processor.tokenizer


def save_model(
    model: MMGPT,
    processor: Processor,
    folder: Path,
    *,
    card: str | None = None,
    frozen: Mapping[str, Tensor] | None = None,
    exact: bool = False,
) -> None:
    """Write a model into an existing folder.

    Matrices are stored in half precision, except those whose values are beyond it, which stay as they are; vectors stay
    in float32. With `exact`, what half precision would round stays as it is as well. `frozen` has weights, by their
    names in the model, that are stored in place of the model's own: those that training does not change, as they were
    before it rounded them to bfloat16. Each file gets its name when it is whole. Raises CheckpointError naming the
    weight that is no finite number, or the file that cannot be written; and for a packed decoder, whose weights are no
    longer those of the checkpoint.
    """
    if model.decoder.packed_head:
        raise CheckpointError(f"{folder}: a packed decoder is not saved; load the model with dtype fp32")
    base_stored = not isinstance(model.config.decoder, str)
    state = {k: v for k, v in model.state_dict().items() if base_stored or not _is_base(k)}
    if (model.config.lora is not None) != any(".lora_" in name for name in state):
        raise CheckpointError("low-rank updates that were merged without a word to the configuration: MMGPT.merge_lora")
    for name, tensor in (frozen or {}).items():
        if name in state:
            if tensor.shape != state[name].shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(state[name].shape)}"
                raise CheckpointError(f"the frozen {name} has shape {shapes}")
            state[name] = tensor
    state = {name: compact(tensor, name, exact=exact) for name, tensor in state.items()}
    write_tensors(state, folder / "model.safetensors")
    write_json(folder / "config.json", configs.to_dict(model.config))
    write_json(folder / "processor.json", configs.to_dict(processor.config))
    if base_stored:
        tokenizer = processor.tokenizer
        write_text(folder / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
        ends = TokenizerConfig(
            end_of_text=tokenizer.end_of_text,
            end_of_turn=tokenizer.end_of_turn,
            more_ends=tokenizer.end_ids,
            names=tokenizer.names,
        )
        write_json(folder / "tokenizer_config.json", configs.to_dict(ends))
    if processor.template is not None:
        write_text(folder / TEMPLATE, processor.template.source)
    if card is not None:
        write_text(folder / "README.md", card)


def load_model(
    name: str | Path, *, dtype: torch.dtype = torch.float32, decoder_dtype: str = "fp32"
) -> tuple[MMGPT, Processor]:
    """A model by name or folder, on the CPU. Raises CheckpointError naming what is missing or left over.

    `dtype` is that of all parameters. `decoder_dtype`, one of mm_gpt.hub.packing.DTYPES, packs the matrices of the
    decoder, which then answers, but is neither trained nor saved; in fp32 they are parameters like the others.

    Names: those of the package, decoders of the registry, short ones of public models, `owner/name` on the Hugging Face
    hub. They come first: a folder that is called like one without a slash is given as `./name`, or as a Path.
    """
    if isinstance(name, str) and name in decoder_names():
        decoder, tokenizer = load_decoder(name, decoder_dtype)
        text = ProcessorConfig(max_length=decoder.config.max_length)
        processor = Processor(tokenizer, text, vocab_size=decoder.config.vocab_size)
        return MMGPT(ModelConfig(decoder=name), decoder).eval(), processor
    return _load_folder(model_folder(name), dtype=dtype, decoder_dtype=decoder_dtype)


def _load_folder(
    folder: Path, *, dtype: torch.dtype, decoder_dtype: str, above: tuple[Path, ...] = ()
) -> tuple[MMGPT, Processor]:
    """`above`: the folders that name this one as their decoder, each the one before it."""
    if folder.resolve() in above:
        raise CheckpointError(f"{folder}/config.json: the folder names itself as its decoder")
    values = read_json(folder / "config.json")
    if is_foreign(values):
        return load_foreign(folder, values, dtype=dtype, decoder_dtype=decoder_dtype)
    config, processor_config = read_configs(folder)
    # Low-rank updates are added to what is stored, not to what has been rounded
    base_dtype = "stored" if decoder_dtype != "fp32" and config.lora is not None else decoder_dtype
    if isinstance(config.decoder, str):
        below, skip = _local_folder(config.decoder), _is_base
        if below is None:
            decoder, tokenizer = load_decoder(config.decoder, base_dtype)
        else:
            decoder, tokenizer = _folder_decoder(below, base_dtype, above=(*above, folder.resolve()))
        decoder_config = decoder.config
    else:
        decoder, tokenizer, decoder_config, skip = None, _load_tokenizer(folder), config.decoder, _nothing
    if tokenizer.vocab_size > decoder_config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the decoder {decoder_config.vocab_size}"
        )
    weights = folder / "model.safetensors"
    with naming(f"{folder}/config.json"), unfilled():
        plan = MMGPT(dataclasses.replace(config, decoder=decoder_config))
        check_shapes(plan, weights, skip=skip)
    _check_images(plan, processor_config, f"{folder}/processor.json")
    if decoder_dtype != "fp32":
        decoder = _packed_decoder(folder, plan, decoder, decoder_dtype)
        if decoder is None:
            return _load_folder(folder, dtype=dtype, decoder_dtype="fp32", above=above)
        skip = _is_decoder
    with naming(f"{folder}/config.json"), NothingDrawn():
        model = MMGPT(config, decoder or Decoder(decoder_config))
    _copy(model, weights, skip=skip)
    template = None
    if (folder / TEMPLATE).exists():
        source = read_text(folder / TEMPLATE)
        template = ChatTemplate(
            source,
            special=tokenizer.names,
            where=str(folder / TEMPLATE),
            end_tokens=tokenizer.end_tokens,
            guarded=tokenizer.special,
        )
    with naming(f"{folder}/processor.json"):
        processor = Processor(tokenizer, processor_config, vocab_size=decoder_config.vocab_size, template=template)
    return model.eval(), processor


def _packed_decoder(folder: Path, plan: MMGPT, base: Decoder | None, dtype: str) -> Decoder | None:
    """The decoder of a folder, whose tensors are those of `plan`, packed as `dtype` says, with its low-rank updates.

    `base`: the decoder that the folder names, with its matrices as they are stored if there are updates. None: `auto`
    is float32.
    """
    lora = plan.config.lora
    if base is not None and lora is None:
        return base
    stored = PACKINGS["stored"]
    if base is None:
        with unfilled():
            base = Decoder(plan.decoder.config)
        checkpoint = Checkpoint(folder)
        table = _own_table(base, checkpoint.names)
        packing = packing_of(dtype, checkpoint.kinds(base, table), updated=lora is not None)
        if packing is None:
            return None
        unfill(base)
        checkpoint.load(base, table, packing=packing if lora is None else stored)
    else:
        packing = packing_of(dtype, stored_kinds(base), updated=True)
    if packing is None or lora is None:
        return base if packing is not None else None
    if packing is stored:  # sums are of no stored kind
        packing = Packing("F32", "F32")
    updates = {}
    with open_safetensors(folder / "model.safetensors") as file:
        names = set(file.keys())
        for name, _ in places(base):
            a, b = (f"decoder.{name.removesuffix('weight')}lora_{half}" for half in "ab")
            if a in names:
                scaled = lora.alpha / lora.rank * file.get_tensor(b).float()
                updates[name] = Update(scaled, file.get_tensor(a).float())
    repack(base, packing, updates, str(folder))
    return base


def _own_table(decoder: Decoder, names: Collection[str]) -> Table:
    """Our names in our own files: that of the parameter, or of the one below a low-rank update."""
    table = {}
    for name, _ in decoder.named_parameters():
        module, _, last = f"decoder.{name}".rpartition(".")
        inner = f"{module}.base.{last}"
        template, stored = template_of(name)[0], template_of(inner if inner in names else f"decoder.{name}")[0]
        table[template] = same(stored)
    return table


def _check_images(model: MMGPT, config: ProcessorConfig, where: str) -> None:
    """The processor's images against the model's: where they differ, memory has no bound, and no answer is right."""
    size = None if model.config.vision is None else model.config.vision.image_size
    given = None if config.image is None else config.image.size
    if size != given:
        raise CheckpointError(f"{where}: images of {given} pixels are prepared for a model that sees {size}")
    if config.mrope and not model.decoder.config.mrope_section:
        raise CheckpointError(f"{where}: mrope is true, but the decoder has no mrope_section")
    if config.tokens_per_image != model.tokens_per_image:
        raise CheckpointError(
            f"{where}: tokens_per_image is {config.tokens_per_image}, but the model makes {model.tokens_per_image}"
        )


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer_config.json"
    values = configs.from_dict(TokenizerConfig, read_json(path), where=str(path))
    if not all(0 <= id < 1 << 31 for id in values.more_ends):
        raise CheckpointError(f"{path}: more_ends {list(values.more_ends)} are no ids")
    return Tokenizer.from_file(
        folder / "tokenizer.json",
        end_of_text=values.end_of_text,
        end_of_turn=values.end_of_turn,
        more_ends=values.more_ends,
        names=values.names,
    )


def check_shapes(module: nn.Module, path: Path, *, prefix: str = "", skip: Callable[[str], bool] = _nothing) -> None:
    """Whether a safetensors file has the tensors of `module`, which may be on the meta device, and none else.

    With `prefix`, only the tensors under it are looked at. Raises CheckpointError naming the first that does not fit.
    """
    wanted = {prefix + name: tensor.shape for name, tensor in module.state_dict().items() if not skip(name)}
    stored = {name: entry for name, entry in read_header(path).items() if name.startswith(prefix)}
    if wrong := sorted(stored.keys() ^ wanted.keys()):
        what = "has an unknown tensor" if wrong[0] in stored else "lacks the tensor"
        raise CheckpointError(f"{path}: {what} {wrong[0]} ({len(wrong)} do not match)")
    for name, shape in wanted.items():
        if stored[name].shape != tuple(shape):
            raise CheckpointError(f"{path}: {name} has shape {stored[name].shape}, not {tuple(shape)}")


def fill(module: nn.Module, path: Path, *, prefix: str = "", skip: Callable[[str], bool] = _nothing) -> None:
    """Copy the tensors of a safetensors file into `module`, every one of them and nothing else.

    With `prefix`, only the tensors under it are looked at. Raises what `check_shapes` does.
    """
    check_shapes(module, path, prefix=prefix, skip=skip)
    _copy(module, path, prefix=prefix, skip=skip)


def _copy(module: nn.Module, path: Path, *, prefix: str = "", skip: Callable[[str], bool]) -> None:
    with open_safetensors(path) as file, torch.no_grad():
        for name, target in module.state_dict().items():
            if not skip(name):
                target.copy_(file.get_tensor(prefix + name))


def _is_base(name: str) -> bool:
    return _is_decoder(name) and ".lora_" not in name


def _is_decoder(name: str) -> bool:
    return name.startswith("decoder.")


def compact(tensor: Tensor, name: str, *, exact: bool = False) -> Tensor:
    """How a tensor is stored: in half precision, unless that is too small for it or, with `exact`, would round it."""
    tensor = tensor.detach()
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor.contiguous()
    half = tensor.to(torch.float16)
    if half.isfinite().all() and not (exact and (half.to(tensor.dtype) != tensor).any()):
        return half.contiguous()
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} holds values that are no finite numbers")
    return tensor.contiguous()
