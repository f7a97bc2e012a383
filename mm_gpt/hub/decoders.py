"""Decoders of Hugging Face checkpoints: GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 1, 2 and 3 (text).

One table of names serves all but GPT-2; a configuration's missing keys have the family's published defaults, on which
many repositories rely. The same tables serve the language half of whole models (`prefix`, `head`).
"""

import logging
import re
from collections.abc import Iterable
from typing import Any

from mm_gpt.errors import CheckpointError, unknown_name
from mm_gpt.hub.weights import Origin, Table, plus_one, same, transposed
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
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10_000.0,
}
_QWEN = _LLAMA | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = _LLAMA | {
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
_GEMMA2 = _GEMMA | {
    "hidden_size": 2304,
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
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14_336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
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
"""What a key that is not in `config.json` stands for, by model type."""

# Keys that change nothing about the numbers of a forward pass.
_HARMLESS = re.compile(
    r"_.*|architectures|model_type|.*dtype|.*token_ids?|use_cache|initializer_range|pretraining_tp|.*transformers.*"
    r"|.*dropout|.*pdrop|layer_types|rope_scaling|rope_parameters|hidden_activation|cache_implementation|max_length"
    r"|id2label|label2id|return_dict|output_.*|problem_type|chunk_size_feed_forward|is_.*|task_specific_params|summary_.*"
    r"|n_ctx|gradient_checkpointing|bad_words_ids|begin_suppress_tokens|top_[kp]|temperature|do_sample|num_.*beam.*"
    r"|tie_encoder_decoder|torchscript|auto_map|finetuning_task|quantization_config|attn_implementation|license|name"
    r"|repetition_penalty|length_penalty|.*beams|min_length|early_stopping|typical_p|.*ngram_size|prefix|remove_.*"
    r"|pruned_heads|use_bfloat16|tokenizer_class|decoder_start_.*|cross_attention_.*|add_cross_attention|forced_.*"
    r"|exponential_decay_.*|suppress_tokens|encoder_.*|diversity_penalty|num_return_sequences|.*tp_plan|.*pp_plan"
)
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "use_bidirectional_attention": (False, None),
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
    kind = values.get("model_type")
    if kind not in DEFAULTS:
        raise CheckpointError(f"{where}: {unknown_name('model type', str(kind), DEFAULTS)}")
    for key, allowed in _MUST_BE.items():
        if key in values and values[key] not in allowed:
            raise CheckpointError(f"{where}: {key} {values[key]!r} is not supported, only {allowed[0]!r}")
    full = DEFAULTS[kind] | values
    ignored = [k for k in values if k not in DEFAULTS[kind] and k not in _MUST_BE and not _HARMLESS.fullmatch(k)]
    if ignored:
        logger.warning("%s: unknown keys are ignored: %s", where, ", ".join(ignored))
    try:
        return _gpt2(full, where) if kind == "gpt2" else _llama(kind, full, where)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{where}: {type(error).__name__} {error} while reading the configuration") from None


def _llama(kind: str, values: dict[str, Any], where: str) -> DecoderConfig:
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    gemma = kind.startswith("gemma")
    patterns, window = _patterns(kind, values, where)
    theta, scaling, local_theta = _rope(kind, values, where)
    return DecoderConfig(
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=values["num_key_value_heads"] or heads,
        head_size=values["head_dim"] or values["hidden_size"] // heads,
        mlp_width=values["intermediate_size"],
        max_length=values["max_position_embeddings"],
        norm_eps=float(values["rms_norm_eps"]),
        norm_place="both" if kind in ("gemma2", "gemma3_text") else "pre",
        qk_norm=kind in ("qwen3", "gemma3_text"),
        activation=_activation(values.get("hidden_activation") or values["hidden_act"], where),  # type: ignore[arg-type]
        qkv_bias=bool(values["attention_bias"]) or kind == "qwen2",
        output_bias=bool(values["attention_bias"]),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
        attention=patterns,
        window=window,
        attention_scale=values["query_pre_attn_scalar"] ** -0.5 if "query_pre_attn_scalar" in values else None,
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
        head_size=width // heads,
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


def _activation(name: str, where: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{where}: {unknown_name('activation', str(name), ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _patterns(kind: str, values: dict[str, Any], where: str) -> tuple[tuple[PatternName, ...], int | None]:
    """Which layers see a window only, and its size."""
    layers, window = values["num_hidden_layers"], values.get("sliding_window")
    types = values.get("layer_types")
    if types is None:
        if kind == "gemma2":
            types = ["sliding_attention", "full_attention"]
        elif kind == "gemma3_text":
            every = values.get("_sliding_window_pattern") or values["sliding_window_pattern"]
            types = ["sliding_attention"] * (every - 1) + ["full_attention"]
        elif kind in ("qwen2", "qwen3"):
            first = values["max_window_layers"] if values["use_sliding_window"] else layers
            types = ["full_attention" if layer < first else "sliding_attention" for layer in range(layers)]
        elif kind == "mistral":
            types = ["sliding_attention"]
        else:
            return ("dense",), None
    names: dict[str, PatternName] = {"full_attention": "dense", "sliding_attention": "local"}
    for name in types:
        if name not in names:
            raise CheckpointError(f"{where}: {unknown_name('layer type', str(name), names)}")
    if window is None or "sliding_attention" not in types:
        return ("dense",), None
    return tuple(names[name] for name in types), window


def _rope(kind: str, values: dict[str, Any], where: str) -> tuple[float, RopeScaling | None, float | None]:
    """Theta, scaling and the local layers' theta: newer files have `rope_parameters`, older ones `rope_scaling`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    local: float | None = None
    if kind == "gemma3_text":
        local = float(values["rope_local_base_freq"])
        if "sliding_attention" in rope:
            local = float(rope["sliding_attention"].get("rope_theta", local))
            if rope["sliding_attention"].get("rope_type", "default") != "default":
                raise CheckpointError(f"{where}: rope scaling of the local layers is not supported")
            rope = rope.get("full_attention", {})
    theta = float(rope.get("rope_theta", values["rope_theta"]))
    name = rope.get("rope_type", rope.get("type", "default"))
    if name in ("default", "mrope"):  # mrope has ordinary positions as long as there is text alone
        return theta, None, local
    if name not in ("linear", "llama3"):
        raise CheckpointError(f"{where}: rope scaling {name!r} is not supported, only linear and llama3")
    if name == "linear":
        return theta, RopeScaling(kind="linear", factor=float(rope["factor"])), local
    scaling = RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_length=int(rope["original_max_position_embeddings"]),
    )
    return theta, scaling, local


def decoder_table(kind: str, *, prefix: str = "model.", head: str = "lm_head.weight") -> Table:
    """Our decoder's parameters in the names of a model type; `prefix` goes before all but the head."""
    if kind == "gpt2":
        return _gpt2_table(prefix, head)
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
    prefix = "transformer." if prefix == "model." else prefix
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
