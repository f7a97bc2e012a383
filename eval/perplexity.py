"""Perplexity of plain text: exp of the mean negative log-likelihood of a token, in windows that do not overlap.

Every token of a text except its first is predicted exactly once, from the tokens before it in its window. Windows of
512 tokens make the numbers a little worse than a sliding window would; models are compared on the same windows.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from mm_gpt.errors import MMGPTError
from mm_gpt.model.decoder import Decoder
from mm_gpt.processor import IGNORE_INDEX

WINDOW = 512  # tokens predicted in one window


def read_text(path: Path) -> str:
    """Raises MMGPTError naming a file that is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise MMGPTError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise MMGPTError(f"{path}: {error.strerror or error}") from None


def windows(ids: Sequence[int], length: int) -> list[list[int]]:
    """Pieces of `length` + 1 ids or fewer; the last id of one is the first of the next, so each is a target once."""
    return [list(ids[start : start + length + 1]) for start in range(0, len(ids) - 1, length)]


@torch.inference_mode()
def window_nats(decoder: Decoder, pieces: Sequence[Sequence[int]]) -> list[float]:
    """The summed negative log-likelihood in nats of the ids of each piece after its first, in one batch."""
    device = decoder.device
    length = max(map(len, pieces)) - 1
    ids = torch.zeros(len(pieces), length, dtype=torch.long)
    labels = torch.full((len(pieces), length), IGNORE_INDEX)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece) - 1] = torch.tensor(piece[:-1])
        labels[row, : len(piece) - 1] = torch.tensor(piece[1:])
    ids, labels = ids.to(device), labels.to(device)
    # Padding stands on the right, where no causal attention sees it.
    hidden = decoder(decoder.embed(ids), torch.arange(length, device=device).expand(len(pieces), -1))
    return [decoder.loss(hidden[r : r + 1], labels[r : r + 1])[0].item() for r in range(len(pieces))]
