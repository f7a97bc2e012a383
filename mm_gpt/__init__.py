"""mm-gpt: a multimodal language model that reads images and text in any order and writes text.

import mm_gpt

model = mm_gpt.load()
print(model.ask("photo.jpg", "What is the dog doing?"))
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mm_gpt.document import Document, Image, Text
    from mm_gpt.errors import MMGPTError
    from mm_gpt.inference.assistant import Assistant, load
    from mm_gpt.inference.generation import Answer, GenerationConfig

_WHERE = {
    "Answer": "mm_gpt.inference.generation",
    "Assistant": "mm_gpt.inference.assistant",
    "Document": "mm_gpt.document",
    "GenerationConfig": "mm_gpt.inference.generation",
    "Image": "mm_gpt.document",
    "MMGPTError": "mm_gpt.errors",
    "Text": "mm_gpt.document",
    "load": "mm_gpt.inference.assistant",
}

__all__ = [  # noqa: RUF022 (what people start with comes first)
    "load",
    "Assistant",
    "Answer",
    "Document",
    "GenerationConfig",
    "Image",
    "MMGPTError",
    "Text",
]


def __getattr__(name: str) -> Any:
    """Import torch only when something is used that needs it: `mm-gpt --help` answers at once."""
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'mm_gpt' has no attribute {name!r}")
