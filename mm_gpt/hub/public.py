"""The public checkpoints that are known to have a shape that loads, and what each family was compared with.

`mm-gpt models` and docs/models.md print these tables. A repository of a family that is not listed loads as well: the
list is for orientation. Sizes are counted from the published configurations; licences are those of the repositories.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublicModel:
    repository: str
    """`owner/name` on the Hugging Face hub."""
    family: str
    parameters: float
    """In millions."""
    licence: str

    @property
    def memory(self) -> str:
        """Of the weights, as they are loaded: float32 on the CPU, bfloat16 on a GPU."""
        return f"{self.parameters * 4 / 1000:.1f} / {self.parameters * 2 / 1000:.1f} GB"


@dataclass(frozen=True)
class FamilyCheck:
    """How a family was compared: with small random models of the real `transformers` classes, in float32."""

    name: str
    model_types: tuple[str, ...]
    """Of `config.json`."""
    reference: str
    difference: str
    """The largest difference of logits that was seen; those have a standard deviation above 0.1."""
    test: str


GEMMA, LLAMA2, LLAMA3 = "Gemma terms (gated)", "Llama 2 licence", "Llama 3.2 licence (gated)"

PUBLIC_MODELS = (
    PublicModel("HuggingFaceTB/SmolVLM-256M-Instruct", "SmolVLM", 256.5, "Apache-2.0"),
    PublicModel("HuggingFaceTB/SmolVLM-500M-Instruct", "SmolVLM", 507.5, "Apache-2.0"),
    PublicModel("HuggingFaceTB/SmolVLM-Instruct", "SmolVLM", 2246.3, "Apache-2.0"),
    PublicModel("HuggingFaceM4/Idefics3-8B-Llama3", "Idefics3", 8460, "Apache-2.0"),
    PublicModel("lusxvr/nanoVLM-222M", "nanoVLM", 222, "see its page"),
    PublicModel("llava-hf/llava-1.5-7b-hf", "LLaVA-1.5", 7063, LLAMA2),
    PublicModel("llava-hf/llava-v1.6-mistral-7b-hf", "LLaVA-NeXT", 7567, "Apache-2.0"),
    PublicModel("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "LLaVA-OneVision", 894, "Apache-2.0"),
    PublicModel("OpenGVLab/InternVL3-1B-hf", "InternVL", 938.2, "see its page"),
    PublicModel("Qwen/Qwen2-VL-2B-Instruct", "Qwen2-VL", 2209.0, "Apache-2.0"),
    PublicModel("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL", 3754.6, "Qwen research licence"),
    PublicModel("Qwen/Qwen3-VL-2B-Instruct", "Qwen3-VL", 2127.5, "Apache-2.0"),
    PublicModel("microsoft/kosmos-2-patch14-224", "Kosmos-2", 1664, "MIT"),
    PublicModel("google/paligemma-3b-mix-224", "PaliGemma", 2923, GEMMA),
    PublicModel("google/paligemma2-3b-pt-224", "PaliGemma", 3033, GEMMA),
    PublicModel("openai-community/gpt2", "GPT-2", 124.4, "MIT"),
    PublicModel("HuggingFaceTB/SmolLM2-135M-Instruct", "Llama", 134.5, "Apache-2.0"),
    PublicModel("HuggingFaceTB/SmolLM2-360M-Instruct", "Llama", 361.8, "Apache-2.0"),
    PublicModel("meta-llama/Llama-3.2-1B-Instruct", "Llama", 1235.8, LLAMA3),
    PublicModel("mistralai/Mistral-7B-Instruct-v0.2", "Mistral", 7241.7, "Apache-2.0"),
    PublicModel("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2", 494.0, "Apache-2.0"),
    PublicModel("Qwen/Qwen3-0.6B", "Qwen3", 596.0, "Apache-2.0"),
    PublicModel("google/gemma-2-2b-it", "Gemma 2", 2614.3, GEMMA),
    PublicModel("google/gemma-3-1b-it", "Gemma 3", 999.9, GEMMA),
)

FAMILY_CHECKS = (
    FamilyCheck(
        "SmolVLM, Idefics3",
        ("idefics3", "smolvlm"),
        "Idefics3ForConditionalGeneration and SmolVLM's",
        "2e-6",
        "test_family_idefics3",
    ),
    FamilyCheck(
        "nanoVLM", ("none",), "SiglipVisionModel with LlamaForCausalLM; its own code", "2e-6", "test_family_nanovlm"
    ),
    FamilyCheck("LLaVA-1.5", ("llava",), "LlavaForConditionalGeneration", "2e-6", "test_family_llava"),
    FamilyCheck("LLaVA-NeXT", ("llava_next",), "LlavaNextForConditionalGeneration", "2e-6", "test_family_llava"),
    FamilyCheck(
        "LLaVA-OneVision", ("llava_onevision",), "LlavaOnevisionForConditionalGeneration", "2e-6", "test_family_llava"
    ),
    FamilyCheck(
        "PaliGemma 1 and 2", ("paligemma",), "PaliGemmaForConditionalGeneration", "3e-6", "test_family_paligemma"
    ),
    FamilyCheck("InternVL", ("internvl",), "InternVLForConditionalGeneration", "2e-6", "test_family_internvl"),
    FamilyCheck("Qwen2-VL", ("qwen2_vl",), "Qwen2VLForConditionalGeneration", "5e-6", "test_family_qwen_vl"),
    FamilyCheck("Qwen2.5-VL", ("qwen2_5_vl",), "Qwen2_5_VLForConditionalGeneration", "5e-6", "test_family_qwen_vl"),
    FamilyCheck("Qwen3-VL", ("qwen3_vl",), "Qwen3VLForConditionalGeneration", "5e-6", "test_family_qwen_vl"),
    FamilyCheck("Kosmos-2", ("kosmos-2",), "Kosmos2ForConditionalGeneration", "2e-6", "test_family_kosmos2"),
)
"""Pixel values, tiling and prompt ids are equal, exactly, in all of them."""


def tables() -> dict[str, list[tuple[str, ...]]]:
    """The tables, each with its header, by their titles."""
    models: list[tuple[str, ...]] = [("REPOSITORY", "LICENCE", "PARAMETERS", "IN MEMORY", "FAMILY")]
    for model in PUBLIC_MODELS:
        parameters = f"{model.parameters:,.0f} M"
        models.append((model.repository, model.licence, parameters, model.memory, model.family))
    checks: list[tuple[str, ...]] = [("FAMILY", "MODEL TYPE", "COMPARED WITH", "LOGITS DIFFER BY", "TEST")]
    for check in FAMILY_CHECKS:
        kinds = ", ".join(check.model_types)
        checks.append((check.name, kinds, check.reference, check.difference, f"tests/{check.test}.py"))
    return {
        "Public checkpoints by name (memory: float32 on the CPU / bfloat16 on a GPU)": models,
        "Families, and what they were compared with (small random models, float32)": checks,
    }
