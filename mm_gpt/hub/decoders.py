"""Decoders of Hugging Face checkpoints: GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 1, 2 and 3 (text).

One table of names serves all but GPT-2; a configuration's missing keys have the family's published defaults, on which
many repositories rely. The same tables serve the language half of whole models (`prefix`, `head`).
"""

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch

from mm_gpt.errors import CheckpointError, unknown_name
from mm_gpt.hub.weights import Checkpoint, Origin, Table, plus_one, same, transposed
from mm_gpt.model.decoder_config import DecoderConfig, PatternName
from mm_gpt.model.positions import RopeScaling

logger = logging.getLogger(__name__)

_LLAMA: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
_BIAS: dict[str, Any] = {"attention_bias": False}
_QWEN = _LLAMA | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN_VL = _QWEN | {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1_000_000.0,
}
_GEMMA = (
    _LLAMA
    | _BIAS
    | {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
)
_GEMMA2 = {key: value for key, value in _GEMMA.items() if key != "hidden_act"} | {
    "hidden_size": 2304,
    "hidden_activation": "gelu_pytorch_tanh",
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | _BIAS,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | _BIAS | {"head_dim": 128},
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen3_vl_text": _LLAMA
    | _BIAS
    | {
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 128_000,
        "rope_theta": 500_000.0,
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2
    | {
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
    },
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
}
"""What a key that is not in `config.json` stands for, by model type; None is decided by other keys."""
MROPE = {"qwen2_vl_text": (16, 24, 24), "qwen2_5_vl_text": (16, 24, 24), "qwen3_vl_text": (24, 20, 20)}
"""The rotary pairs that turn by time, row and column, where a file does not say."""
_FRACTIONS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "n_inner", "sliding_window", *_FRACTIONS[1:])

# Keys that change nothing about the numbers of a forward pass.
_HARMLESS = re.compile(
    r"_.*|architectures|model_type|.*dtype|.*token_ids?|use_cache|initializer_range|pretraining_tp|.*transformers.*"
    r"|.*dropout|.*pdrop|layer_types|rope_scaling|rope_parameters|hidden_act(ivation)?|cache_implementation|max_length"
    r"|id2label|label2id|return_dict|output_.*|problem_type|chunk_size_feed_forward|is_.*|task_specific_params|summary_.*"
    r"|n_ctx|gradient_checkpointing|bad_words_ids|begin_suppress_tokens|top_[kp]|temperature|do_sample|num_.*beam.*"
    r"|tie_encoder_decoder|torchscript|auto_map|finetuning_task|quantization_config|attn_implementation|license|name"
    r"|repetition_penalty|length_penalty|.*beams|min_length|early_stopping|typical_p|.*ngram_size|prefix|remove_.*"
    r"|pruned_heads|use_bfloat16|tokenizer_class|decoder_start_.*|cross_attention_.*|add_cross_attention|forced_.*"
    r"|exponential_decay_.*|suppress_tokens|encoder_.*|diversity_penalty|num_return_sequences|.*tp_plan|.*pp_plan"
    r"|original_max_position_embeddings"
)
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "use_bidirectional_attention": (False, None),
    "is_causal": (True, None),
    "clip_qkv": (None,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),  # float32 is what we compute in anyway, but the order differs
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


def decoder_config(values: dict[str, Any], where: str) -> DecoderConfig:
    """The DecoderConfig of a Hugging Face (text) configuration.

    Raises CheckpointError naming `where` and the key that is unknown, or whose value asks for what we do not have.
    """
    kind = str(values.get("model_type"))
    if kind not in DEFAULTS:
        raise CheckpointError(f"{where}: {unknown_name('model type', kind, DEFAULTS)}")
    _check(values, where)
    full = DEFAULTS[kind] | values
    for key, default in DEFAULTS[kind].items():
        _check_type(key, full[key], default, where)
    ignored = [
        key
        for key, value in values.items()
        # A key that is unknown and off is no news
        if value and key not in DEFAULTS[kind] and key not in _MUST_BE and not _HARMLESS.fullmatch(key)
    ]
    if ignored:
        logger.warning("%s: unknown keys are ignored: %s", where, ", ".join(ignored))
    try:
        return _gpt2(full, where) if kind == "gpt2" else _llama(kind, full, where)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{where}: lacks {error}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from None


def _check(values: dict[str, Any], where: str) -> None:
    for key, allowed in _MUST_BE.items():
        if key in values and values[key] not in allowed:
            value = repr(values[key])
            shown = value if len(value) < 40 else f"{value[:36]}..."
            raise CheckpointError(f"{where}: {key} {shown} is not supported, only {allowed[0]!r}")


def _check_type(key: str, value: Any, default: Any, where: str) -> None:
    """Raises CheckpointError for a value of another type than the default's, and for counts below one."""
    if value is None and key in _MAY_BE_NULL:
        return
    if isinstance(default, bool | str):
        kind, fits = type(default).__name__, isinstance(value, type(default))
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        whole = not isinstance(default, float) and key not in _FRACTIONS
        kind = "a whole number above 0" if whole else "a number above 0"
        least = key == "max_window_layers" and value == 0
        fits = number and (value > 0 or least) and (not whole or isinstance(value, int))
    if not fits:
        raise CheckpointError(f"{where}: {key} {value!r} is not {kind}")


def _llama(kind: str, values: dict[str, Any], where: str) -> DecoderConfig:
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    gemma = kind.startswith("gemma")
    patterns, window = _patterns(kind, values, where)
    theta, scaling, local_theta = _rope(kind, values, where)
    always_biased = kind in ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
    biases = kind != "mistral" and not always_biased and values["attention_bias"]
    activation = values["hidden_act" if "hidden_act" in DEFAULTS[kind] else "hidden_activation"]
    if kind == "gemma" and activation == "gelu":
        activation = "gelu_pytorch_tanh"  # the first files named the wrong one; the models were trained with this
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_size=values["head_dim"] or _split(values["hidden_size"], heads, where),
        mlp_width=values["intermediate_size"],
        max_length=values["max_position_embeddings"],
        norm_eps=float(values["rms_norm_eps"]),
        norm_place="both" if kind in ("gemma2", "gemma3_text") else "pre",
        qk_norm=kind in ("qwen3", "qwen3_vl_text", "gemma3_text"),
        activation=_activation(activation, where),  # type: ignore[arg-type]
        qkv_bias=biases or always_biased,
        output_bias=biases,
        rope_theta=theta,
        rope_scaling=scaling,
        mrope_section=_mrope(kind, values, where),
        mrope_interleaved=kind == "qwen3_vl_text",
        local_rope_theta=local_theta,
        attention=patterns,
        window=window,
        attention_scale=values["query_pre_attn_scalar"] ** -0.5 if "query_pre_attn_scalar" in DEFAULTS[kind] else None,
        attention_softcap=values.get("attn_logit_softcapping"),
        logit_softcap=values.get("final_logit_softcapping"),
        embedding_scale=values["hidden_size"] ** 0.5 if gemma else 1.0,
        tie_embeddings=bool(values["tie_word_embeddings"]),
    )


def _gpt2(values: dict[str, Any], where: str) -> DecoderConfig:
    width, heads = values["n_embd"], values["n_head"]
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        width=width,
        num_layers=values["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=_split(width, heads, where),
        mlp_width=values["n_inner"] or 4 * width,
        max_length=values["n_positions"],
        norm="layer",
        norm_eps=float(values["layer_norm_epsilon"]),
        activation=_activation(values["activation_function"], where),  # type: ignore[arg-type]
        gated_mlp=False,
        mlp_bias=True,
        qkv_bias=True,
        output_bias=True,
        positions="learned",
        tie_embeddings=bool(values["tie_word_embeddings"]),
    )


def _split(width: int, heads: int, where: str) -> int:
    if width % heads:
        raise CheckpointError(f"{where}: a width of {width} cannot be split into {heads} heads")
    return width // heads


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{where}: {unknown_name('activation', str(name), ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _patterns(kind: str, values: dict[str, Any], where: str) -> tuple[tuple[PatternName, ...], int | None]:
    """Which layers see a window only, and its size. Older files have a rule of the family instead of a list."""
    layers, window = values["num_hidden_layers"], values.get("sliding_window")
    if kind in ("llama", "gemma") or (kind.startswith("qwen") and not values.get("use_sliding_window")):
        window = None
    types = None if kind == "mistral" else values.get("layer_types")
    if types is not None and len(types) < layers:
        raise CheckpointError(f"{where}: layer_types has {len(types)} entries for {layers} layers")
    if types is None:
        types = ["sliding_attention"]
        if kind == "gemma2":
            types = ["sliding_attention", "full_attention"]
        elif kind == "gemma3_text":
            every = values.get("_sliding_window_pattern") or values["sliding_window_pattern"]
            types = ["sliding_attention"] * (every - 1) + ["full_attention"]
        elif "max_window_layers" in values:
            full = min(layers, values["max_window_layers"])
            types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    names: dict[str, PatternName] = {"full_attention": "dense", "sliding_attention": "local"}
    for name in types:
        if name not in names:
            raise CheckpointError(f"{where}: {unknown_name('layer type', str(name), names)}")
    if window is None or "sliding_attention" not in types[:layers]:
        return ("dense",), None
    return tuple(names[name] for name in types[:layers]), window


def _rope(kind: str, values: dict[str, Any], where: str) -> tuple[float, RopeScaling | None, float | None]:
    """Theta, scaling and the local layers' theta: newer files have `rope_parameters`, older ones `rope_scaling`."""
    newer, older = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    local_theta: float | None = None
    rope = older or newer
    if kind == "gemma3_text":
        rope = (newer.get("full_attention") or {}) | older
        local = newer.get("sliding_attention") or {}
        local_theta = float(local.get("rope_theta", values["rope_local_base_freq"]))
        if local.get("rope_type", "default") != "default":
            raise CheckpointError(f"{where}: rope scaling of the local layers is not supported")
    _check(rope, where)
    theta = float(rope.get("rope_theta", values["rope_theta"]))
    name = rope.get("rope_type", rope.get("type", "default"))
    if name in ("default", "mrope"):  # mrope has ordinary positions as long as there is text alone
        return theta, None, local_theta
    if name == "linear":
        return theta, RopeScaling(kind="linear", factor=float(rope["factor"])), local_theta
    if name != "llama3":
        raise CheckpointError(f"{where}: rope scaling {name!r} is not supported, only linear and llama3")
    original = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
    scaling = RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_length=int(values.get("original_max_position_embeddings") or original),
    )
    return theta, scaling, local_theta


def _mrope(kind: str, values: dict[str, Any], where: str) -> tuple[int, ...]:
    """How many rotary pairs turn by time, row and column; their order is the family's."""
    if kind not in MROPE:
        return ()
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    interleaved = kind == "qwen3_vl_text"
    if rope.get("mrope_interleaved", interleaved) is not interleaved:
        raise CheckpointError(f"{where}: mrope_interleaved must be {interleaved} for {kind}")
    section = rope.get("mrope_section", MROPE[kind])
    if not isinstance(section, list | tuple) or not all(type(count) is int for count in section):
        raise CheckpointError(f"{where}: mrope_section {section!r} is not a list of whole numbers")
    return tuple(section)


def decoder_table(kind: str, *, prefix: str = "model.", head: str = "lm_head.weight") -> Table:
    """Our decoder's parameters in the names of a model type; `prefix` goes before all but the head.

    The default is that of a language model in a file of its own: `model.`, or GPT-2's `transformer.`.
    """
    if kind == "gpt2":
        return _gpt2_table("transformer." if prefix == "model." else prefix, head)
    layer = prefix + "layers.{i}."
    norm = plus_one if kind.startswith("gemma") else same
    both = kind in ("gemma2", "gemma3_text")
    return {
        "embedding.weight": same(prefix + "embed_tokens.weight"),
        "norm.weight": norm(prefix + "norm.weight"),
        "head.weight": same(head),
        "blocks.{i}.attention_norm.weight": norm(layer + "input_layernorm.weight"),
        "blocks.{i}.attention.qkv.weight": same(*(f"{layer}self_attn.{p}_proj.weight" for p in "qkv")),
        "blocks.{i}.attention.qkv.bias": same(*(f"{layer}self_attn.{p}_proj.bias" for p in "qkv")),
        "blocks.{i}.attention.q_norm.weight": norm(layer + "self_attn.q_norm.weight"),
        "blocks.{i}.attention.k_norm.weight": norm(layer + "self_attn.k_norm.weight"),
        "blocks.{i}.attention.out.weight": same(layer + "self_attn.o_proj.weight"),
        "blocks.{i}.attention.out.bias": same(layer + "self_attn.o_proj.bias"),
        "blocks.{i}.attention_post_norm.weight": norm(layer + "post_attention_layernorm.weight"),
        "blocks.{i}.mlp_norm.weight": norm(
            layer + ("pre_feedforward_layernorm.weight" if both else "post_attention_layernorm.weight")
        ),
        "blocks.{i}.mlp_post_norm.weight": norm(layer + "post_feedforward_layernorm.weight"),
        "blocks.{i}.mlp.gate_up.weight": same(*(f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up"))),
        "blocks.{i}.mlp.down.weight": same(layer + "mlp.down_proj.weight"),
    }


def _gpt2_table(prefix: str, head: str) -> Table:
    layer = prefix + "h.{i}."
    names: Iterable[tuple[str, str]] = (
        ("attention.qkv", "attn.c_attn"),
        ("attention.out", "attn.c_proj"),
        ("mlp.up", "mlp.c_fc"),
        ("mlp.down", "mlp.c_proj"),
    )
    table: dict[str, Origin] = {
        "embedding.weight": same(prefix + "wte.weight"),
        "position_embedding.weight": same(prefix + "wpe.weight"),
        "norm.weight": same(prefix + "ln_f.weight"),
        "norm.bias": same(prefix + "ln_f.bias"),
        "head.weight": same(head),
    }
    for number, place in ((1, "attention_norm"), (2, "mlp_norm")):
        for part in ("weight", "bias"):
            table[f"blocks.{{i}}.{place}.{part}"] = same(f"{layer}ln_{number}.{part}")
    for ours, theirs in names:
        table[f"blocks.{{i}}.{ours}.weight"] = transposed(f"{layer}{theirs}.weight")
        table[f"blocks.{{i}}.{ours}.bias"] = same(f"{layer}{theirs}.bias")
    return table


def stored_prefix(kind: str, names: Collection[str]) -> str:
    """What stands before the names of a decoder's file: nothing in old ones of GPT-2, and in those of a bare stack."""
    prefix = "transformer." if kind == "gpt2" else "model."
    return prefix if any(name.startswith(prefix) for name in names) else ""


def settle_tying(config: DecoderConfig, table: Table, checkpoint: Checkpoint) -> tuple[DecoderConfig, Table]:
    """What is stored outranks `tie_word_embeddings`, as in transformers: two matrices that differ are two, and a single
    one, of whichever name, is both."""
    (embedding,), (head,) = table["embedding.weight"].parts, table["head.weight"].parts
    if not config.tie_embeddings or head not in checkpoint.names:
        return config, table
    if embedding not in checkpoint.names:
        return config, table | {"embedding.weight": same(head)}
    first, second = checkpoint.tensor(embedding), checkpoint.tensor(head)
    if first.dtype == second.dtype and torch.equal(first, second):
        return config, table
    return dataclasses.replace(config, tie_embeddings=False), table


DECODER_LEFT_OVER = (r".*rotary_emb\.inv_freq", r".*\.attn\.(masked_)?bias")
"""Buffers that old checkpoints carry and nobody reads."""


def tied_left_over(config: DecoderConfig, head: str = "lm_head.weight") -> tuple[str, ...]:
    """Some exporters store the tied matrix twice."""
    return (*DECODER_LEFT_OVER, *((re.escape(head),) if config.tie_embeddings else ()))


def part_sizes(config: DecoderConfig, name: str, num_parts: int, rows: int) -> list[int]:
    """Rows of each part of a stacked parameter, for writing: queries, keys, values; or equal parts."""
    if ".qkv." in name and num_parts == 3:
        kv = config.num_kv_heads * config.head_size
        return [config.num_heads * config.head_size, kv, kv]
    return [rows // num_parts] * num_parts
