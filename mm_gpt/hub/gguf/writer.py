"""GGUF files for llama.cpp: the decoder with its tokenizer, and the vision encoder with its projector (`mmproj`).

llama.cpp derives from the architecture's name what the metadata does not say (the activation, the order of rotary
pairs, how images are cut). What it would compute otherwise is refused here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

from mm_gpt.errors import CheckpointError
from mm_gpt.hub.decoders import part_sizes
from mm_gpt.hub.export.decoders import decoder_values, essence, for_text_alone
from mm_gpt.hub.export.layout import template_source
from mm_gpt.hub.gguf.reader import ARCHITECTURES, rotary_pairs
from mm_gpt.hub.weights import written
from mm_gpt.model.decoder import Decoder
from mm_gpt.model.positions import rotary_frequencies
from mm_gpt.processor import Processor
from mm_gpt.tokenizer import GGUF_CONTROL, GGUF_PRE_TOKENIZERS, QWEN2_SPLIT, Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

GGUF_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}
"""How matrices may be stored; vectors are float32 in any case."""
FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}
"""`general.file_type`: what most of the tensors are."""
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
"""Token types besides GGUF_CONTROL."""


def write_decoder(decoder: Decoder, processor: Processor, path: Path, *, dtype: str) -> None:
    from gguf import GGUFWriter, RopeScalingType

    config = decoder.config
    kind = architecture(decoder)
    scaling = config.rope_scaling
    writer = GGUFWriter(path, kind, use_temp_file=True)
    writer.add_type("model")
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.head_size)
        writer.add_rope_freq_base(config.rope_theta)
        if scaling is not None and scaling.kind == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(scaling.factor)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(2)
    _add_tokenizer(writer, processor, config.vocab_size)
    if scaling is not None and scaling.kind == "llama3":
        where = config.head_size, config.rope_theta
        device, precise = decoder.norm.weight.device, decoder.norm.weight.dtype
        plain, slow = (rotary_frequencies(*where, way, precise, device) for way in (None, scaling))
        add_tensor(writer, "rope_freqs.weight", plain / slow, dtype)
    sizes: Callable[[str, int, int], list[int]] = lambda name, num, rows: part_sizes(config, name, num, rows)  # noqa: E731
    for name, tensor in written(decoder, ARCHITECTURES[kind], sizes):
        if kind == "llama" and (".attn_q." in name or ".attn_k." in name):
            tensor = rotary_pairs(tensor, config.head_size)
        add_tensor(writer, name, tensor, dtype)
    finish(writer)


def architecture(decoder: Decoder) -> str:
    """GGUF's name of what this decoder is. Raises CheckpointError naming the setting that has no counterpart."""
    alone = for_text_alone(decoder.config)
    config, values = essence(alone), decoder_values(alone)
    kind = values["model_type"]
    if "local" in config.attention:
        raise CheckpointError(
            f"attention {decoder.config.attention!r} has no counterpart in GGUF, where all layers are dense"
        )
    if kind not in ARCHITECTURES:
        raise CheckpointError(f"{kind} decoders are not written as GGUF, only {', '.join(ARCHITECTURES)}")
    activation = "gelu_tanh" if kind == "gpt2" else "silu"
    if config.activation != activation:
        raise CheckpointError(f"activation {config.activation!r} has no counterpart in GGUF's {kind}: {activation!r}")
    if kind == "qwen3" and config.qkv_bias:
        raise CheckpointError("qkv_bias True has no counterpart in GGUF's qwen3")
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3" and kind != "llama":
        raise CheckpointError(f"rope_scaling {config.rope_scaling!r} has no counterpart in GGUF's {kind}")
    return kind


def add_tensor(writer: "GGUFWriter", name: str, tensor: Tensor, dtype: str) -> None:
    """A vector in float32; a matrix as `dtype`, or in float16 where its rows are no multiple of Q8_0's 32."""
    from gguf import GGMLQuantizationType, quants

    data = tensor.detach().float().cpu().contiguous().numpy()
    kind = "F32" if data.ndim < 2 else GGUF_TYPES[dtype]
    if kind == "Q8_0" and data.shape[-1] % 32:
        kind = "F16"
    if kind == "F16" and abs(data).max() > 65504:
        raise CheckpointError(f"{name} holds values that float16 cannot store; --dtype bfloat16 can")
    stored = GGMLQuantizationType[kind]
    writer.add_tensor(name, quants.quantize(data, stored), raw_dtype=stored)


def finish(writer: "GGUFWriter") -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- Tokenizer ----

# Letters of several scripts, cases, numbers, blanks and line ends: what the known splits treat differently.
PROBE = (
    "Hello, World's it'S don’t WE'LL 3 33 1234567 x2y ½²  two   three\n\n \n four\t\tfive.\r\n...!? (a) _b-c\n"
    " 你好，世界 Привет мир नमस्ते e\u0301 🙂🙂 #@$ a\u00a0b  "
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    first = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_KNOWN: dict[str, Callable[[], Any]] = {
    **GGUF_PRE_TOKENIZERS,
    "qwen2": lambda: _split(QWEN2_SPLIT),
    "llama-bpe": lambda: _split(QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
}
"""By GGUF's name: the split before BPE, which only the name tells llama.cpp."""


def pre_tokenizer_name(backend: tokenizers.Tokenizer) -> str:
    """GGUF's name of a byte-level split. Raises CheckpointError for one that has none here."""
    given = backend.pre_tokenizer
    if given is not None:
        wanted = given.pre_tokenize_str(PROBE)
        for name, build in _KNOWN.items():
            if build().pre_tokenize_str(PROBE) == wanted:
                return name
    raise CheckpointError(f"the tokenizer splits text otherwise than GGUF's {', '.join(_KNOWN)}")


def _add_tokenizer(writer: "GGUFWriter", processor: Processor, vocab_size: int) -> None:
    tokenizer = processor.tokenizer
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(f"only byte-level BPE vocabularies are written as GGUF, not {model['type']} of this kind")
    pre = pre_tokenizer_name(tokenizer.backend)
    normalizer = state["normalizer"] and state["normalizer"]["type"]
    if normalizer not in (None, "NFC"):  # llama.cpp leaves NFC out, and so do the published files of Qwen
        raise CheckpointError(f"the tokenizer's normalizer {normalizer} has no counterpart in GGUF")
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise CheckpointError(f"ignore_merges {model.get('ignore_merges')!r} has no counterpart in GGUF's {pre!r}")
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, id in model["vocab"].items():
        tokens[id], types[id] = token, NORMAL
    for added in state["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = GGUF_CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    _add_special_ids(writer, tokenizer, begins=processor.config.begin_of_text)
    template = template_source(processor)
    if template is not None:
        writer.add_chat_template(template)


def _add_special_ids(writer: "GGUFWriter", tokenizer: Tokenizer, *, begins: bool) -> None:
    """llama.cpp has its own idea of each id that is not said, and ends an answer at the ids that it has names for."""
    turn = tokenizer.special[tokenizer.end_of_turn]
    others = [id for id in tokenizer.end_ids if id != turn]
    writer.add_eos_token_id(turn)
    for id, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(id)
    if len(others) > 2:
        raise CheckpointError(f"GGUF has names for three ids that end an answer, not for {len(others) + 1}")
    first, last = tokenizer.affixes if begins else ([], [])
    if len(first) > 1 or last:
        raise CheckpointError("GGUF can begin a text with one id; this tokenizer adds others")
    bos = tokenizer.names.get("bos_token")
    writer.add_bos_token_id(
        first[0] if first else tokenizer.special.get(bos or "", tokenizer.special[tokenizer.end_of_text])
    )
    writer.add_add_bos_token(bool(first))
    writer.add_add_eos_token(False)
    pad = tokenizer.names.get("pad_token")
    writer.add_pad_token_id(tokenizer.special.get(pad or "", tokenizer.special[tokenizer.end_of_text]))
