"""Suggestions: the right name for a wrong one, and none where nothing is close."""

import pytest

from mm_gpt.commands.cli import COMMANDS
from mm_gpt.errors import closest, not_installed, unknown_name

OPTIONS = ("--model", "--device", "--max-new-tokens", "--temperature", "--num-beams", "--json", "--top-p")


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("captoin", COMMANDS, "caption"),
        ("aks", COMMANDS, "ask"),
        ("CHAT", COMMANDS, "chat"),
        ("model", COMMANDS, "models"),
        ("evaluate", COMMANDS, "eval"),
        ("smollm2", ("default", "smollm2-135m-instruct"), "smollm2-135m-instruct"),
        ("Default", ("default", "smollm2-135m-instruct"), "default"),
        ("temp", ("temperature", "top_k"), "temperature"),
        ("max_tokens", ("max_new_tokens", "top_k"), "max_new_tokens"),
        ("--num_beams", OPTIONS, "--num-beams"),
        ("--temprature", OPTIONS, "--temperature"),
        (".json", (".csv", ".jsonl"), ".jsonl"),
        # Nothing is close: another word, even with letters in common
        ("dance", COMMANDS, None),
        ("generate", COMMANDS, None),
        ("run", COMMANDS, None),
        ("list", COMMANDS, None),
        ("question", COMMANDS, None),
        (".txt", (".csv", ".jsonl"), None),
        (".jpg", (".csv", ".jsonl"), None),
        ("huggingface", ("hf", "gguf"), None),
        ("none", ("shuffled", "blank", "no-image"), None),
        ("epochs", ("steps", "lr"), None),
        ("--image", OPTIONS, None),
        ("t", ("temperature", "top_k"), None),
        ("to", ("top_k", "top_p"), None),
    ],
)
def test_a_name_is_suggested_only_when_it_is_close(name: str, known: tuple[str, ...], meant: str | None) -> None:
    assert closest(name, known) == meant
    said = unknown_name("thing", name, known)
    assert ("did you mean" in said) == (meant is not None)
    assert all(each in said for each in known)


def test_hints_name_no_package_of_an_index() -> None:
    """A stranger could register the name."""
    assert not_installed("pyarrow", "corpus").endswith('pip install -e ".[corpus]"')
