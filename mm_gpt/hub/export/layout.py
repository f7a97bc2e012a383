"""What an export consists of: configuration, names of tensors, further files, and the chat template."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import tokenizers

from mm_gpt.hub.families import text
from mm_gpt.hub.weights import Table
from mm_gpt.processor import Processor
from mm_gpt.templates.chat_template import ChatTemplate
from mm_gpt.tokenizer import Tokenizer
from mm_gpt.vision.transforms import ImageTransformConfig

CHATML = """\
{%- for message in messages -%}
{%- if message['role'] not in ('system', 'user', 'assistant') -%}
{{- raise_exception("roles are 'system', 'user' and 'assistant'") -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- IMAGE -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""What a Processor without a template writes. IMAGE: an expression for the text of an image."""
INSTEAD = "--decoder-only exports the language model alone"
_FILTERS = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
NO_IMAGE = "raise_exception('this model reads text alone, no images')"


@dataclass(frozen=True, kw_only=True)
class Export:
    """A model in another format."""

    values: dict[str, Any]
    """`config.json`."""
    tables: dict[str, Table]
    """Tables of names by the part of the model, as an `Import` has them."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further JSON files."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Special tokens that the processor asks its tokenizer for, by name; none: `image_token` alone."""
    has_template: bool = True
    """The family's processor takes a chat template; others write the prompt themselves."""
    hidden_ids: tuple[int, ...] = ()
    """Ids that were no part of the vocabulary, and are never generated."""


def image_values(image: ImageTransformConfig) -> dict[str, Any]:
    """What all image processors have in common."""
    return {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": _FILTERS[image.interpolation],
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def template_source(processor: Processor, image: str = NO_IMAGE) -> str | None:
    """The chat template's source; None for a model that continues its prompt as it stands."""
    if processor.template is None:
        return CHATML.replace("IMAGE", image)
    return None if processor.template.source == text.PLAIN else processor.template.source


def with_tokens(tokenizer: Tokenizer, tokens: Iterable[str]) -> Tokenizer:
    """A copy of a tokenizer that knows further special tokens, behind all others."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
    return Tokenizer(
        backend,
        end_of_text=tokenizer.end_of_text,
        end_of_turn=tokenizer.end_of_turn,
        more_ends=tokenizer.end_ids,
        names=tokenizer.names,
    )


def with_template(processor: Processor, source: str, tokenizer: Tokenizer, **changes: Any) -> Processor:
    """A processor with another template and tokenizer, and `changes` of its configuration."""
    template = ChatTemplate(
        source,
        special=tokenizer.names,
        where="the chat template",
        end_tokens=tokenizer.end_tokens,
        guarded=tokenizer.special,
    )
    config = dataclasses.replace(processor.config, **changes)
    vocab_size = max(processor.vocab_size, tokenizer.vocab_size)
    return Processor(tokenizer, config, vocab_size=vocab_size, template=template)
