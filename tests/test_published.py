"""Configurations as public repositories have them: each is read, and gives the published number of parameters.

The numbers are those of the repositories' safetensors files. Nothing is built for real: the models are on the meta
device, and of the files there are only those that a family looks into.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mm_gpt.hub.export.folder import tensors_of
from mm_gpt.hub.families import (
    FAMILIES,
    gemma3,
    idefics3,
    is_foreign,
    kosmos2,
    llava,
    nanovlm,
    paligemma,
    qwen_vl,
    text,
)
from mm_gpt.hub.image_processors import read_image_processor
from mm_gpt.hub.weights import unfilled
from mm_gpt.model.mmgpt import MMGPT

READERS = {
    m.__name__.rpartition(".")[2]: m for m in (gemma3, idefics3, kosmos2, llava, nanovlm, paligemma, qwen_vl, text)
}
SIGLIP_MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP_MEAN = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
STEPS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 0.00392156862745098,
}


def smolvlm_images(tile: int, longest: int, kind: str = "Idefics3ImageProcessor") -> dict[str, Any]:
    return {
        **STEPS,
        **SIGLIP_MEAN,
        "do_image_splitting": True,
        "do_pad": True,
        "image_processor_type": kind,
        "max_image_size": {"longest_edge": tile},
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "size": {"longest_edge": longest},
    }


def smolvlm(vision: dict[str, Any], scale: int, image_token_id: int, **text: Any) -> dict[str, Any]:
    """What the Idefics3 and SmolVLM repositories share: most of the text half says nothing."""
    return {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": image_token_id,
        "model_type": "idefics3",
        "pad_token_id": 128_002,
        "scale_factor": scale,
        "text_config": {
            "_flash_attn_2_enabled": True,
            "_name_or_path": "None",
            "architectures": ["VLlama3ForCausalLM"],
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "neftune_noise_alpha": 0.0,
            "pad_token_id": 2,
            "perceiver_config": {"model_type": "vllama3", "qk_layer_norms_perceiver": False, "resampler_depth": 6},
            "pixel_shuffle_factor": scale,
            "qk_layer_norms": False,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16", "q4f16": "float16"}},
            "use_resampler": False,
            **text,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
        "use_cache": True,
        "use_reentrant_checkpointing": False,
        "vision_config": {**vision, "tie_word_embeddings": False, "use_base_siglip": False},
    }


VIDEO_SAMPLING = {"video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}}}
SMALL_TOWER = {
    "hidden_size": 768,
    "image_size": 512,
    "max_image_size": {"longest_edge": 512},
    "model_type": "idefics3_vision",
    "num_attention_heads": 12,
    "patch_size": 16,
    "size": {"longest_edge": 2048},
}
LARGE_TOWER = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "max_image_size": {"longest_edge": 384},
    "model_type": "idefics3",
    "num_hidden_layers": 27,
    "patch_size": 14,
}
SMOLLM_135M = {
    "head_dim": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
}
SMOLLM_360M = {
    "head_dim": 64,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_attention_heads": 15,
    "num_hidden_layers": 32,
    "num_key_value_heads": 5,
}
SMOLLM_17B = {"head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
SMOLVLM_TENSORS = ("model.vision_model.embeddings.patch_embedding.weight", "model.text_model.embed_tokens.weight")
CLIP_LARGE = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32_000,
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}
LLAVA_TENSORS = ("vision_tower.vision_model.embeddings.patch_embedding.weight", "language_model.model.norm.weight")
LLAVA_IMAGES = {
    **STEPS,
    **CLIP_MEAN,
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "size": {"shortest_edge": 336},
}
NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_PINPOINTS = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]


def paligemma(size: int, **text: Any) -> dict[str, Any]:
    tokens = (size // 14) ** 2
    return {
        "_vocab_size": 257_152,
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": 2048,
        "ignore_index": -100,
        "image_token_index": 257_152,
        "model_type": "paligemma",
        "pad_token_id": 0,
        "projection_dim": 2048,
        "text_config": {"num_image_tokens": tokens, "torch_dtype": "float32", "vocab_size": 257_216, **text},
        "torch_dtype": "float32",
        "transformers_version": "4.41.0.dev0",
        "vision_config": {
            **SO400M,
            "image_size": size,
            "num_image_tokens": tokens,
            "projection_dim": 2048,
            "projector_hidden_act": "gelu_fast",
            "vision_use_head": False,
        },
    }


def paligemma_images(size: int) -> dict[str, Any]:
    return {
        **STEPS,
        **SIGLIP_MEAN,
        "do_convert_rgb": None,
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": (size // 14) ** 2,
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "size": {"height": size, "width": size},
    }


def gemma3_config(**text: Any) -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255_999,
        "eoi_token_index": 256_000,
        "eos_token_id": [1, 106],
        "image_token_index": 262_144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {**SO400M, "image_size": 896, "vision_use_head": False},
    }


GEMMA3_IMAGES = {
    **STEPS,
    **SIGLIP_MEAN,
    "do_convert_rgb": None,
    "do_pan_and_scan": None,
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 256,
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "size": {"height": 896, "width": 896},
}
GEMMA3_SPECIAL = {"<start_of_image>": 255_999, "<end_of_image>": 256_000, "<image_soft_token>": 262_144}
GEMMA_2B = {
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "use_cache": True,
}
NANOVLM = {
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_patch_size": 16,
    "vit_img_size": 224,
    "vit_n_heads": 12,
    "vit_dropout": 0.0,
    "vit_n_blocks": 12,
    "vit_ln_eps": 1e-06,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip-base-patch16-224",
    "lm_hidden_dim": 576,
    "lm_inter_dim": 1536,
    "lm_rms_eps": 1e-05,
    "lm_re_base": 100_000,
    "lm_max_position_embeddings": 8192,
    "lm_vocab_size": 49_152,
    "lm_n_heads": 9,
    "lm_n_kv_heads": 3,
    "lm_dropout": 0.0,
    "lm_n_blocks": 30,
    "lm_attn_scaling": 1.0,
    "lm_max_length": 79,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "lm_model_type": "HuggingFaceTB/SmolLM2-135M",
    "lm_tokenizer": "HuggingFaceTB/cosmo2-tokenizer",
    "lm_eos_token_id": 0,
    "mp_pixel_shuffle_factor": 2,
    "vlm_load_backbone_weights": True,
    "vlm_checkpoint_path": "checkpoints/nanoVLM-222M",
}
QWEN = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06}

# name -> config.json, preprocessor_config.json, names of some tensors, special tokens, number of parameters
QWEN_IDS = {
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_end_token_id": 151_653,
    "vision_start_token_id": 151_652,
}
QWEN_VL = QWEN | QWEN_IDS
QWEN_VL |= {
    "max_position_embeddings": 32_768,
    "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
    "rope_theta": 1_000_000.0,
    "sliding_window": 32_768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_token_id": 151_654,
    "vocab_size": 151_936,
}
QWEN_VL_IMAGES = CLIP_MEAN | {
    "image_processor_type": "Qwen2VLImageProcessor",
    "max_pixels": 12_845_056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2VLProcessor",
    "temporal_patch_size": 2,
}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...], dict[str, int], float]] = {
    "HuggingFaceTB/SmolVLM-256M-Instruct": (
        smolvlm(SMALL_TOWER, 4, 49_190, **SMOLLM_135M, rope_theta=100_000, vocab_size=49_280),
        smolvlm_images(512, 2048),
        SMOLVLM_TENSORS,
        {"<image>": 49_190},
        256_484_928,
    ),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (
        smolvlm(SMALL_TOWER, 4, 49_190, **SMOLLM_360M, rope_theta=100_000, vocab_size=49_280)
        | {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"]},
        smolvlm_images(512, 2048, "SmolVLMImageProcessor") | VIDEO_SAMPLING,
        SMOLVLM_TENSORS,
        {"<image>": 49_190},
        507_482_304,
    ),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": (
        smolvlm(SMALL_TOWER | {"model_type": "smolvlm_vision"}, 4, 49_190, **SMOLLM_135M, vocab_size=49_280)
        | {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"]},
        smolvlm_images(512, 2048, "SmolVLMImageProcessor") | VIDEO_SAMPLING,
        SMOLVLM_TENSORS,
        {"<image>": 49_190},
        256_484_928,
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (
        smolvlm(
            LARGE_TOWER | {"model_type": "smolvlm_vision", "num_attention_heads": 16},
            3,
            49_190,
            **SMOLLM_17B,
            rope_theta=130_000,
            vocab_size=49_280,
        )
        | {"model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"]},
        smolvlm_images(384, 1536, "SmolVLMImageProcessor") | VIDEO_SAMPLING,
        SMOLVLM_TENSORS,
        {"<image>": 49_190},
        2_246_784_880,
    ),
    "HuggingFaceTB/SmolVLM-Instruct": (
        smolvlm(LARGE_TOWER, 3, 49_153, **SMOLLM_17B, rope_theta=273_768.0, vocab_size=49_155),
        smolvlm_images(384, 1536),
        SMOLVLM_TENSORS,
        {"<image>": 49_153},
        2_246_272_880,
    ),
    "llava-hf/llava-1.5-7b-hf": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": 32_000,
            "model_type": "llava",
            "pad_token_id": 32_001,
            "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32_064,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vision_config": CLIP_LARGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
        LLAVA_IMAGES,
        LLAVA_TENSORS,
        {"<image>": 32_000},
        7_063_427_072,
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": (
        {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "ignore_index": -100,
            "image_grid_pinpoints": NEXT_PINPOINTS,
            "image_token_index": 32_000,
            "model_type": "llava_next",
            "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
                "architectures": ["MistralForCausalLM"],
                "intermediate_size": 14_336,
                "max_position_embeddings": 32_768,
                "model_type": "mistral",
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-05,
                "rope_theta": 1_000_000.0,
                "sliding_window": None,
                "torch_dtype": "bfloat16",
                "vocab_size": 32_064,
            },
            "torch_dtype": "float16",
            "use_image_newline_parameter": True,
            "vision_config": CLIP_LARGE,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32_064,
        },
        LLAVA_IMAGES
        | {
            "aspect_ratio_setting": "anyres",
            "do_pad": True,
            "image_grid_pinpoints": NEXT_PINPOINTS,
            "image_processor_type": "LlavaNextImageProcessor",
        },
        (*LLAVA_TENSORS, "image_newline"),
        {"<image>": 32_000},
        7_566_747_648,
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": (
        {
            "architectures": ["LlavaOnevisionForConditionalGeneration"],
            "ignore_index": -100,
            "image_grid_pinpoints": ONEVISION_PINPOINTS,
            "image_token_index": 151_646,
            "model_type": "llava_onevision",
            "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "Qwen/Qwen2-0.5B-Instruct",
                "architectures": ["Qwen2ForCausalLM"],
                "bos_token_id": 151_643,
                "eos_token_id": 151_645,
                "hidden_size": 896,
                "intermediate_size": 4864,
                "max_window_layers": 24,
                "model_type": "qwen2",
                "num_attention_heads": 14,
                "num_hidden_layers": 24,
                "num_key_value_heads": 2,
                "rope_theta": 1_000_000.0,
                "tie_word_embeddings": True,
                "torch_dtype": "bfloat16",
                "vocab_size": 152_000,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_image_newline_parameter": True,
            "video_token_index": 151_647,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_config": SO400M | {"image_size": 384, "num_hidden_layers": 26, "vision_use_head": False},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        {
            **STEPS,
            **SIGLIP_MEAN,
            "do_pad": True,
            "image_grid_pinpoints": ONEVISION_PINPOINTS,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "resample": 3,
            "size": {"height": 384, "width": 384},
        },
        (*LLAVA_TENSORS, "image_newline"),
        {"<image>": 151_646},
        894e6,
    ),
    "google/paligemma-3b-pt-224": (
        paligemma(224, **GEMMA_2B),
        paligemma_images(224),
        LLAVA_TENSORS,
        {"<image>": 257_152},
        2_923_466_480,
    ),
    "google/paligemma2-3b-pt-224": (
        paligemma(224, **GEMMA2_2B) | {"hidden_size": 2304, "projection_dim": 2304},
        paligemma_images(224),
        LLAVA_TENSORS,
        {"<image>": 257_152},
        3_032_242_416,
    ),
    "google/gemma-3-4b-it": (
        gemma3_config(hidden_size=2560, intermediate_size=10_240, num_hidden_layers=34),
        GEMMA3_IMAGES,
        LLAVA_TENSORS,
        GEMMA3_SPECIAL,
        4_300_079_472,
    ),
    "google/gemma-3-27b-it": (
        gemma3_config(
            head_dim=128,
            hidden_size=5376,
            intermediate_size=21_504,
            num_attention_heads=32,
            num_hidden_layers=62,
            num_key_value_heads=16,
            query_pre_attn_scalar=168,
        ),
        GEMMA3_IMAGES,
        LLAVA_TENSORS,
        GEMMA3_SPECIAL,
        27_432_406_640,
    ),
    "microsoft/kosmos-2-patch14-224": (
        {
            "architectures": ["Kosmos2ForConditionalGeneration"],
            "latent_query_num": 64,
            "model_type": "kosmos-2",
            "text_config": {
                "activation_dropout": 0.0,
                "activation_function": "gelu",
                "add_cross_attention": False,
                "attention_dropout": 0.1,
                "attention_heads": 32,
                "dropout": 0.1,
                "embed_dim": 2048,
                "ffn_dim": 8192,
                "init_std": 0.02,
                "layer_norm_eps": 1e-05,
                "layerdrop": 0.0,
                "layers": 24,
                "max_position_embeddings": 2048,
                "model_type": "kosmos_2_text_model",
                "no_repeat_ngram_size": 3,
                "scale_embedding": True,
                "use_cache": True,
                "vocab_size": 65_037,
            },
            "torch_dtype": "float32",
            "vision_config": {
                "attention_dropout": 0.0,
                "hidden_act": "quick_gelu",
                "hidden_size": 1024,
                "image_size": 224,
                "intermediate_size": 4096,
                "layer_norm_eps": 1e-05,
                "model_type": "kosmos_2_vision_model",
                "num_attention_heads": 16,
                "num_channels": 3,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        },
        {
            **STEPS,
            **CLIP_MEAN,
            "crop_size": {"height": 224, "width": 224},
            "do_center_crop": True,
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "Kosmos2Processor",
            "resample": 3,
            "size": {"shortest_edge": 224},
            "use_square_size": True,
        },
        ("vision_model.model.embeddings.patch_embedding.weight",),
        {"<mask>": 64_001},
        1_664_485_376,
    ),
    "lusxvr/nanoVLM-222M": (NANOVLM, {}, ("decoder.token_embedding.weight",), {"<x>": 1, "<y>": 2}, 222e6),
    "openai-community/gpt2": (
        {
            "activation_function": "gelu_new",
            "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1,
            "bos_token_id": 50_256,
            "embd_pdrop": 0.1,
            "eos_token_id": 50_256,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05,
            "model_type": "gpt2",
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "resid_pdrop": 0.1,
            "summary_activation": None,
            "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50_257,
        },
        {},
        ("wte.weight",),
        {},
        124_439_808,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 576,
            "initializer_range": 0.041666666666666664,
            "intermediate_size": 1536,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "pad_token_id": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100_000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 49_152,
        },
        {},
        ("model.embed_tokens.weight",),
        {},
        134_515_008,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128_000,
            "eos_token_id": [128_001, 128_008, 128_009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131_072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 128_256,
        },
        {},
        ("model.embed_tokens.weight",),
        {},
        1_235_814_400,
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14_336,
            "max_position_embeddings": 32_768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 32_000,
        },
        {},
        ("model.embed_tokens.weight",),
        {},
        7_241_732_096,
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": (
        {
            **QWEN,
            "architectures": ["Qwen2ForCausalLM"],
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32_768,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rope_theta": 1_000_000.0,
            "sliding_window": 32_768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151_936,
        },
        {},
        ("model.embed_tokens.weight",),
        {},
        494_032_768,
    ),
    "Qwen/Qwen3-0.6B": (
        {
            **QWEN,
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 151_643,
            "eos_token_id": 151_645,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40_960,
            "max_window_layers": 28,
            "model_type": "qwen3",
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "rope_theta": 1_000_000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151_936,
        },
        {},
        ("model.embed_tokens.weight",),
        {},
        596_049_920,
    ),
    "Qwen/Qwen2-VL-2B-Instruct": (
        QWEN_VL
        | {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "max_window_layers": 28,
            "model_type": "qwen2_vl",
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "vision_config": {
                "depth": 32,
                "embed_dim": 1280,
                "hidden_size": 1536,
                "in_chans": 3,
                "mlp_ratio": 4,
                "num_heads": 16,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
            },
        },
        QWEN_VL_IMAGES,
        ("model.embed_tokens.weight", "visual.merger.ln_q.weight"),
        {"<|image_pad|>": 151_655},
        2_208_985_600,
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        QWEN_VL
        | {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "max_position_embeddings": 128_000,
            "max_window_layers": 70,
            "model_type": "qwen2_5_vl",
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "vision_config": {
                "depth": 32,
                "fullatt_block_indexes": [7, 15, 23, 31],
                "hidden_act": "silu",
                "hidden_size": 1280,
                "in_chans": 3,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 2048,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "spatial_patch_size": 14,
                "temporal_patch_size": 2,
                "tokens_per_second": 2,
                "window_size": 112,
            },
        },
        QWEN_VL_IMAGES | {"processor_class": "Qwen2_5_VLProcessor"},
        ("model.embed_tokens.weight", "visual.merger.ln_q.weight"),
        {"<|image_pad|>": 151_655},
        3_754_622_976,
    ),
    "Qwen/Qwen3-VL-2B-Instruct": (
        {
            **{key: value for key, value in QWEN_IDS.items() if key[:3] not in ("bos", "eos")},
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": {
                **QWEN,
                "attention_bias": False,
                "bos_token_id": 151_643,
                "dtype": "bfloat16",
                "eos_token_id": 151_645,
                "head_dim": 128,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "max_position_embeddings": 262_144,
                "model_type": "qwen3_vl_text",
                "num_attention_heads": 16,
                "num_hidden_layers": 28,
                "num_key_value_heads": 8,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
                "rope_theta": 5_000_000,
                "tie_word_embeddings": True,
                "use_cache": True,
                "vocab_size": 151_936,
            },
            "tie_word_embeddings": True,
            "vision_config": {
                "deepstack_visual_indexes": [5, 11, 17],
                "depth": 24,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1024,
                "in_channels": 3,
                "initializer_range": 0.02,
                "intermediate_size": 4096,
                "model_type": "qwen3_vl",
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 2048,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        SIGLIP_MEAN
        | {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "merge_size": 2,
            "patch_size": 16,
            "processor_class": "Qwen3VLProcessor",
            "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
            "temporal_patch_size": 2,
        },
        ("model.language_model.embed_tokens.weight", "model.visual.pos_embed.weight"),
        {"<|image_pad|>": 151_655},
        2_127_532_032,
    ),
    "google/gemma-2-2b-it": (
        GEMMA2_2B | {"vocab_size": 256_000, "bos_token_id": 2, "pad_token_id": 0, "eos_token_id": [1, 107]},
        {},
        ("model.embed_tokens.weight",),
        {},
        2_614_341_888,
    ),
    "google/gemma-3-1b-it": (
        {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "initializer_range": 0.02,
            "intermediate_size": 6912,
            "max_position_embeddings": 32_768,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10_000,
            "rope_scaling": None,
            "rope_theta": 1_000_000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 262_144,
        },
        {},
        ("model.embed_tokens.weight",),
        {},
        999_885_952,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And no key of these files is unknown to us."""
    config, images, tensors, special, published = PUBLISHED[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    save_file({tensor: torch.zeros(1) for tensor in tensors}, tmp_path / "model.safetensors")
    assert is_foreign(config)
    kind = "nanovlm" if "lm_tokenizer" in config else FAMILIES[config["model_type"]]
    tokenizer: Any = SimpleNamespace(
        backend=SimpleNamespace(token_to_id=lambda token: 64_003),  # Kosmos-2 asks for <image>
        special=special,
        names={"mask_token": "<mask>", "eos_token": "</s>", "bos_token": "<s>"},
        end_tokens=("</s>",),
        chat_template="{{ messages }}",
        chat_templates={"default": "{{ messages }}"},
    )
    plan = READERS[kind].read(tmp_path, config, tokenizer)
    with unfilled():
        model = MMGPT(plan.model)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == published if isinstance(published, int) else found == pytest.approx(published, rel=1e-3)
    assert caplog.records == []


# ---- the names of real index files ----


def layers(prefix: str, count: int, *names: str) -> list[str]:
    return [f"{prefix}{layer}.{name}" for layer in range(count) for name in names]


def both(*names: str) -> list[str]:
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def llama_names(prefix: str, count: int) -> list[str]:
    """Of Llama and Gemma: nine tensors a layer."""
    projections = [f"self_attn.{part}_proj.weight" for part in "qkvo"] + [
        f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    ]
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return [
        f"{prefix}embed_tokens.weight",
        f"{prefix}norm.weight",
        *layers(f"{prefix}layers.", count, *projections, *norms),
    ]


def clip_names(prefix: str, count: int) -> list[str]:
    blocks = both(
        *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    )
    embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    return [
        *(f"{prefix}embeddings.{name}" for name in embeddings),
        *both(f"{prefix}pre_layrnorm", f"{prefix}post_layernorm"),
        *layers(f"{prefix}encoder.layers.", count, *blocks),
    ]


LLAVA_NAMES = [
    *llama_names("language_model.model.", 32),
    "language_model.lm_head.weight",
    *both("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    *clip_names("vision_tower.vision_model.", 24),
]
GEMMA_CONFIG = GEMMA_2B | {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "transformers_version": "4.38.0.dev0",
    "vocab_size": 256_000,
}
# repository -> config.json, names of its index, bytes of its tensors (all of two bytes a value), further names that
# other versions have written and that are not needed
INDEXES: dict[str, tuple[dict[str, Any], list[str], int, list[str]]] = {
    "llava-hf/llava-1.5-7b-hf": (
        PUBLISHED["llava-hf/llava-1.5-7b-hf"][0],
        LLAVA_NAMES,
        14_126_854_144,
        [
            "vision_tower.vision_model.embeddings.position_ids",  # a buffer until transformers 4.31
            *layers("language_model.model.layers.", 32, "self_attn.rotary_emb.inv_freq"),
        ],
    ),
    "google/gemma-2b-it": (GEMMA_CONFIG, llama_names("model.", 18), 5_012_344_832, ["lm_head.weight"]),
}
RENAMED = {
    "as published": lambda name: name,
    # transformers 4.52 renames in memory; what it does not rename back on writing looks like this
    "as in memory": lambda name: (
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.", "model.vision_tower.")
        .replace("multi_modal", "model.multi_modal")
    ),
}


@pytest.mark.parametrize("written_as", RENAMED)
@pytest.mark.parametrize("name", INDEXES)
def test_all_names_of_an_index_are_wanted_and_no_others(name: str, written_as: str, tmp_path: Path) -> None:
    """686 of LLaVA-1.5, 164 of Gemma 2B, and the bytes that the index says."""
    config, names, num_bytes, unneeded = INDEXES[name]
    assert len(names) == {"llava-hf/llava-1.5-7b-hf": 686, "google/gemma-2b-it": 164}[name]
    rename = RENAMED[written_as] if name.startswith("llava") else RENAMED["as published"]
    names, unneeded = [*map(rename, names)], [*map(rename, unneeded)]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(LLAVA_IMAGES))
    save_file({tensor: torch.zeros(1) for tensor in [*names, *unneeded]}, tmp_path / "model.safetensors")
    kind = FAMILIES[config["model_type"]]
    tokenizer: Any = SimpleNamespace(
        special={"<image>": 32_000},
        names={},
        end_tokens=("</s>",),
        chat_template="{{ messages }}",
        chat_templates={"default": "{{ messages }}"},
    )
    plan = READERS[kind].read(tmp_path, config, tokenizer)
    with unfilled():
        model = MMGPT(plan.model)
    wanted = dict(tensors_of(model, plan.tables))
    assert sorted(wanted) == sorted(names)
    assert 2 * sum(tensor.numel() for tensor in wanted.values()) == num_bytes
    patterns = [re.compile(pattern) for pattern in plan.left_over]
    assert all(any(p.fullmatch(other) for p in patterns) for other in unneeded)


def test_configurations_and_processors_as_other_versions_wrote_them(tmp_path: Path) -> None:
    """transformers 4.36 to 5 say the same about LLaVA-1.5 in other words: each gives the same model and processor."""
    config, images, tensors, special, _ = PUBLISHED["llava-hf/llava-1.5-7b-hf"]
    text = config["text_config"]
    full_text = text | {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "head_dim": 128,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    old_rope, new_rope = (
        {"rope_theta": 10_000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    )
    without_index = {key: value for key, value in config.items() if key != "image_token_index"}
    lists = {"_valid_processor_keys": ["images", "do_resize"], "size": 336, "crop_size": 336}
    feature_extractor = {key: value for key, value in images.items() if key != "image_processor_type"}
    own = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
    }
    versions: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {
        "4.36": (config, images, None),
        "4.41": (config | {"text_config": text | old_rope}, images | lists, None),
        "4.46": (config | {"image_seq_length": 576}, images, own | {"vision_feature_select_strategy": "default"}),
        "4.53": (
            without_index | {"image_token_id": 32_000, "text_config": full_text | old_rope},
            images | {"image_processor_type": "CLIPImageProcessorFast"},
            own,
        ),
        "5": (
            without_index | {"image_token_id": 32_000, "text_config": full_text | new_rope},
            {},
            own | {"image_processor": images},
        ),
        "files of 2022": (config, feature_extractor | {"feature_extractor_type": "CLIPFeatureExtractor"}, None),
        "null": (config | {"vision_feature_layer": -2}, images | {"do_pad": None}, None),
    }
    tokenizer: Any = SimpleNamespace(
        special=special,
        names={},
        end_tokens=("</s>",),
        chat_template="{{ messages }}",
        chat_templates={"default": "{{ messages }}"},
    )
    found = {}
    for version, (values, preprocessor, processor) in versions.items():
        folder = tmp_path / version
        folder.mkdir()
        if preprocessor:
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        if processor is not None:
            (folder / "processor_config.json").write_text(json.dumps(processor))
        save_file({tensor: torch.zeros(1) for tensor in tensors}, folder / "model.safetensors")
        plan = llava.read(folder, values, tokenizer)
        found[version] = (plan.model, plan.processor, sorted(plan.tables), plan.left_over)
    assert all(plan == found["4.36"] for plan in found.values())


def test_the_first_image_files_of_kosmos_2() -> None:
    """`Kosmos2ImageProcessor` is CLIP's under another name."""
    values = {**LLAVA_IMAGES, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
    first = read_image_processor(values | {"image_processor_type": "Kosmos2ImageProcessor"}, "preprocessor_config.json")
    assert first == read_image_processor(values, "preprocessor_config.json")
