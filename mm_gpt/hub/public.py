"""The public models that have a short name here, and what each family was compared with.

`mm-gpt models` and docs/models.md print these tables. A repository of a family that is not listed loads as well: the
list is for orientation. Sizes are counted from the published configurations; licences are those of the repositories.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublicModel:
    name: str
    """What it is called here, wherever a model is named."""
    repository: str
    """`owner/name` on the Hugging Face hub."""
    family: str
    parameters: float
    """In millions."""
    licence: str
    about: str

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


APACHE, GEMMA, LLAMA2, LLAMA3 = "Apache-2.0", "Gemma terms (gated)", "Llama 2 licence", "Llama 3.2 licence (gated)"

PUBLIC_MODELS = (
    PublicModel(
        "smolvlm",
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        "SmolVLM",
        256.5,
        APACHE,
        "photos, pages and charts; the smallest that reads",
    ),
    PublicModel(
        "smolvlm-500m",
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        "SmolVLM",
        507.5,
        APACHE,
        "the same, twice as large",
    ),
    PublicModel(
        "smolvlm-2b", "HuggingFaceTB/SmolVLM-Instruct", "SmolVLM", 2246.3, APACHE, "the same, nine times as large"
    ),
    PublicModel(
        "smolvlm2",
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "SmolVLM",
        256.5,
        APACHE,
        "SmolVLM trained on videos as well; images only here",
    ),
    PublicModel(
        "smolvlm2-500m",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "SmolVLM",
        507.5,
        APACHE,
        "the same, twice as large",
    ),
    PublicModel(
        "smolvlm2-2b",
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        "SmolVLM",
        2246.8,
        APACHE,
        "the same, nine times as large",
    ),
    PublicModel(
        "idefics3",
        "HuggingFaceM4/Idefics3-8B-Llama3",
        "Idefics3",
        8460,
        APACHE,
        "pages and photos, several at a time",
    ),
    PublicModel(
        "nanovlm", "lusxvr/nanoVLM-222M", "nanoVLM", 222, "see its page", "photos; made to be read and trained"
    ),
    PublicModel("llava", "llava-hf/llava-1.5-7b-hf", "LLaVA-1.5", 7063, LLAMA2, "photos, at 336 pixels"),
    PublicModel(
        "llava-next", "llava-hf/llava-v1.6-mistral-7b-hf", "LLaVA-NeXT", 7567, APACHE, "photos and pages in tiles"
    ),
    PublicModel(
        "llava-onevision",
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "LLaVA-OneVision",
        894,
        APACHE,
        "photos and pages, several at a time",
    ),
    PublicModel(
        "internvl3",
        "OpenGVLab/InternVL3-1B-hf",
        "InternVL",
        938.2,
        "see its page",
        "photos, pages and charts, in many languages",
    ),
    PublicModel(
        "qwen2-vl",
        "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen2-VL",
        2209.0,
        APACHE,
        "images of any shape, in many languages",
    ),
    PublicModel(
        "qwen2.5-vl",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen2.5-VL",
        3754.6,
        "Qwen research licence",
        "images of any shape, pages, places in them",
    ),
    PublicModel(
        "qwen3-vl",
        "Qwen/Qwen3-VL-2B-Instruct",
        "Qwen3-VL",
        2127.5,
        APACHE,
        "images of any shape, pages, places in them",
    ),
    PublicModel("gemma3", "google/gemma-3-4b-it", "Gemma 3", 4300.1, GEMMA, "photos and pages, in 140 languages"),
    PublicModel(
        "paligemma",
        "google/paligemma-3b-mix-224",
        "PaliGemma",
        2923,
        GEMMA,
        "one short prompt and its answer, no chats",
    ),
    PublicModel(
        "paligemma2", "google/paligemma2-3b-pt-224", "PaliGemma", 3033, GEMMA, "a start for training, not for questions"
    ),
    PublicModel(
        "kosmos-2", "microsoft/kosmos-2-patch14-224", "Kosmos-2", 1664, "MIT", "captions with the places of things"
    ),
    PublicModel("gpt2", "openai-community/gpt2", "GPT-2", 124.4, "MIT", "continues English text"),
    PublicModel("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "Llama", 134.5, APACHE, "chats, the smallest"),
    PublicModel("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", "Llama", 361.8, APACHE, "chats, small"),
    PublicModel("llama3.2", "meta-llama/Llama-3.2-1B-Instruct", "Llama", 1235.8, LLAMA3, "chats, in eight languages"),
    PublicModel("mistral", "mistralai/Mistral-7B-Instruct-v0.2", "Mistral", 7241.7, APACHE, "chats"),
    PublicModel("qwen2.5", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen2", 494.0, APACHE, "chats, in 29 languages"),
    PublicModel("qwen3", "Qwen/Qwen3-0.6B", "Qwen3", 596.0, APACHE, "thinks, then answers, in 119 languages"),
    PublicModel("gemma2", "google/gemma-2-2b-it", "Gemma 2", 2614.3, GEMMA, "chats in English"),
    PublicModel("gemma3-1b", "google/gemma-3-1b-it", "Gemma 3", 999.9, GEMMA, "chats, text alone"),
)
SHORT_NAMES = {model.name: model.repository for model in PUBLIC_MODELS}


def long_name(name: str | Path) -> str | Path:
    """The repository that a short name stands for; whatever is none of them stays as it is."""
    return SHORT_NAMES.get(name, name) if isinstance(name, str) else name


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
    FamilyCheck("Gemma 3 with images", ("gemma3",), "Gemma3ForConditionalGeneration", "2e-6", "test_family_gemma3"),
    FamilyCheck("InternVL", ("internvl",), "InternVLForConditionalGeneration", "2e-6", "test_family_internvl"),
    FamilyCheck("Qwen2-VL", ("qwen2_vl",), "Qwen2VLForConditionalGeneration", "5e-6", "test_family_qwen_vl"),
    FamilyCheck("Qwen2.5-VL", ("qwen2_5_vl",), "Qwen2_5_VLForConditionalGeneration", "5e-6", "test_family_qwen_vl"),
    FamilyCheck("Qwen3-VL", ("qwen3_vl",), "Qwen3VLForConditionalGeneration", "5e-6", "test_family_qwen_vl"),
    FamilyCheck("Kosmos-2", ("kosmos-2",), "Kosmos2ForConditionalGeneration", "2e-6", "test_family_kosmos2"),
)
"""Pixel values, tiling and prompt ids are equal, exactly, in all of them."""


def tables() -> dict[str, list[tuple[str, ...]]]:
    """The tables, each with its header, by their titles."""
    models: list[tuple[str, ...]] = [("NAME", "REPOSITORY", "PARAMETERS", "IN MEMORY", "LICENCE", "FAMILY", "WHAT")]
    for model in PUBLIC_MODELS:
        size = f"{model.parameters:,.0f} M"
        row = (model.name, model.repository, size, model.memory, model.licence, model.family, model.about)
        models.append(row)
    checks: list[tuple[str, ...]] = [("FAMILY", "MODEL TYPE", "COMPARED WITH", "LOGITS DIFFER BY", "TEST")]
    for check in FAMILY_CHECKS:
        kinds = ", ".join(check.model_types)
        checks.append((check.name, kinds, check.reference, check.difference, f"tests/{check.test}.py"))
    return {
        "Public models, by either name (memory: float32 on the CPU / bfloat16 on a GPU)": models,
        "Families, and what they were compared with (small random models, float32)": checks,
    }
