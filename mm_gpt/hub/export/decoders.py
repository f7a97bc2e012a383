"""Decoders as Hugging Face configurations: the way back of `mm_gpt.hub.decoders`."""

import dataclasses
import math
from typing import Any

from mm_gpt.errors import CheckpointError, MMGPTError
from mm_gpt.hub.decoders import decoder_config
from mm_gpt.model.decoder_config import DecoderConfig

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
"""Model types in the order in which they are tried, and the class of a decoder alone."""


def decoder_values(config: DecoderConfig, *, kinds: tuple[str, ...] = tuple(CLASSES)) -> dict[str, Any]:
    """The `config.json` of the first of `kinds` that computes the same, without `architectures`.

    Raises CheckpointError that names the settings which the closest class lacks.
    """
    wanted = essence(config)
    fewest: tuple[str, list[str]] | None = None
    for kind in kinds:
        values = _values(kind, config)
        try:
            read = essence(decoder_config(values, kind))
        except MMGPTError:  # such as an odd head size: nothing that this class could be
            continue
        lacking = [f.name for f in dataclasses.fields(wanted) if getattr(wanted, f.name) != getattr(read, f.name)]
        if not lacking:
            return values
        if fewest is None or len(lacking) < len(fewest[1]):
            fewest = kind, lacking
    kind, lacking = fewest or (kinds[0], ["head_size"])
    settings = ", ".join(f"{name} {getattr(config, name)!r}" for name in lacking)
    raise CheckpointError(f"no Hugging Face class has this decoder: the closest one, {kind}, lacks {settings}")


def for_text_alone(config: DecoderConfig) -> DecoderConfig:
    """Without M-RoPE, which turns by one position where there are no images."""
    return dataclasses.replace(config, mrope_section=(), mrope_interleaved=False)


def essence(config: DecoderConfig) -> DecoderConfig:
    """The configuration with one spelling for all that compute the same."""
    patterns = [config.attention[layer % len(config.attention)] for layer in range(config.num_layers)]
    own_theta = config.local_rope_theta not in (None, config.rope_theta)
    if config.window is not None and config.window >= config.max_length and not own_theta:
        patterns = ["dense" if kind == "local" else kind for kind in patterns]
    local = "local" in patterns
    learned = config.positions in ("learned", "sinusoidal")
    rotary = config.positions in ("rope", "xpos")
    local_theta = config.local_rope_theta
    if local_theta is None and config.rope_scaling is None:
        local_theta = config.rope_theta
    scale, root = config.attention_scale, config.width**0.5
    return dataclasses.replace(
        config,
        attention=tuple(patterns) if set(patterns) != {"dense"} else ("dense",),
        window=config.window if local else None,
        position_offset=config.position_offset if learned else 0,
        rope_theta=config.rope_theta if rotary else 10_000.0,
        rope_scaling=config.rope_scaling if rotary else None,
        local_rope_theta=local_theta if rotary and local else None,
        attention_scale=None if scale is None or math.isclose(scale, config.head_size**-0.5) else round(scale, 12),
        embedding_scale=root if math.isclose(config.embedding_scale, root) else config.embedding_scale,
        dropout=0.0,
        init="scaled",
    )


def _values(kind: str, config: DecoderConfig) -> dict[str, Any]:
    if kind == "gpt2":
        return {
            "model_type": "gpt2",
            "vocab_size": config.vocab_size,
            "n_positions": config.max_length,
            "n_embd": config.width,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.mlp_width,
            "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
            "layer_norm_epsilon": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        }
    activation = "gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation
    values: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        # As published files have it; transformers 5 turns the two into its `rope_parameters`
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling(config),
    }
    if kind not in (
        "mistral",
        "qwen2",
        "qwen2_vl_text",
        "qwen2_5_vl_text",
    ):  # these have biases never, or at queries, keys and values always
        values["attention_bias"] = config.output_bias
    plain = essence(config)
    local = [plain.attention[layer % len(plain.attention)] == "local" for layer in range(config.num_layers)]
    types = ["sliding_attention" if is_local else "full_attention" for is_local in local]
    if kind == "mistral":
        values["sliding_window"] = config.window if all(local) else None
    elif kind.startswith("qwen"):
        values["use_sliding_window"] = any(local)
        if any(local):
            values |= {"sliding_window": config.window, "layer_types": types, "max_window_layers": local.index(True)}
    elif kind.startswith("gemma"):
        values["hidden_activation"] = activation
    if kind in ("gemma2", "gemma3_text"):
        scalar = (config.attention_scale or config.head_size**-0.5) ** -2
        values |= {
            "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
            "layer_types": types,
        }
        if any(local):
            values["sliding_window"] = config.window
    if kind == "gemma3_text":
        values["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
    return values


def _scaling(config: DecoderConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None and config.mrope_section:
        section = {"mrope_section": list(config.mrope_section)}
        if config.mrope_interleaved:
            return {"rope_type": "default", "mrope_interleaved": True, **section}
        return {"type": "mrope", **section}
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
