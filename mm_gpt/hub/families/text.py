"""Decoders alone, with the chat template of their tokenizer; a model without one continues its prompt as it stands."""

from pathlib import Path
from typing import Any

from mm_gpt.hub.decoders import decoder_config, decoder_table, settle_tying, stored_prefix, tied_left_over
from mm_gpt.hub.families import Import, plain_template, read_template
from mm_gpt.hub.weights import Checkpoint
from mm_gpt.model.mmgpt import ModelConfig
from mm_gpt.processor import ProcessorConfig
from mm_gpt.tokenizer import Tokenizer

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""For base models: what people write, and nothing else."""


def read(folder: Path, values: dict[str, Any], tokenizer: Tokenizer) -> Import:
    kind, checkpoint = str(values["model_type"]), Checkpoint(folder)
    table = decoder_table(kind, prefix=stored_prefix(kind, checkpoint.names))
    config, table = settle_tying(decoder_config(values, f"{folder}/config.json"), table, checkpoint)
    return Import(
        model=ModelConfig(decoder=config),
        processor=ProcessorConfig(max_length=config.max_length, begin_of_text=True, begin_of_chat=False),
        tables={"decoder": table},
        template=read_template(folder, tokenizer) or plain_template(PLAIN, folder, tokenizer),
        left_over=tied_left_over(config),
    )
