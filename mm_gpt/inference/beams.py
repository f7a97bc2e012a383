"""Beam search: the best beginnings of one prompt's answer, side by side.

Shapes: W beams, V vocabulary.
"""

import math

import torch
from torch import Tensor

from mm_gpt.inference.generation import GenerationConfig
from mm_gpt.inference.rows import Row, adjusted, token_logprobs
from mm_gpt.inference.sequences import Sequences


class BeamSearch:
    """Keep the `num_beams` best beginnings; an ended one competes with its length penalty."""

    def __init__(self, first: Row, sequences: Sequences):
        self.config, self.sequences = first.config, sequences
        self.limit, self.step = first.limit, 0
        self.rows = [first]
        """The beams that go on, from the best to the worst."""
        self._scores = [0.0]
        self._ended: list[tuple[float, Row]] = []

    @property
    def is_done(self) -> bool:
        return not self.rows

    @property
    def best(self) -> Row:
        """The best answer that has ended."""
        return max(self._ended, key=lambda pair: pair[0])[1]

    def advance(self, logits: Tensor) -> None:
        """Choose among all that may follow the beams: logits (W, V)."""
        self.step += 1
        W, config = self.config.num_beams, self.config
        logprobs = logits.log_softmax(-1)
        V = logprobs.shape[-1]
        scores = torch.tensor(self._scores, dtype=logprobs.dtype, device=logprobs.device)
        total = scores[:, None] + adjusted(logprobs, self.rows)
        # Enough even when every beam's best tokens are the two end marks.
        best = total.flatten().topk(min(3 * W, total.numel()))
        survivors: list[tuple[float, Row, Row]] = []
        for rank, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            if len(survivors) == W or not math.isfinite(score):
                break
            parent, token = divmod(at, V)
            row = self.rows[parent].copy()
            (logprob,) = token_logprobs(logits[parent : parent + 1], [token], [row])
            row.add(token, logprob)
            if row.finish_reason == "stop":
                if rank < W:
                    self._ended.append((score / length_penalty(self.step, config), row))
            else:
                survivors.append((score, self.rows[parent], row))
        if self.step == self.limit:
            self._ended += [(score / length_penalty(self.step, config), row) for score, _, row in survivors]
            survivors = []
        self._ended = sorted(self._ended, key=lambda pair: -pair[0])[:W]
        if survivors and len(self._ended) == W:
            # A score only falls, and the penalty is mildest at one end of the lengths to come: what may come is not
            # above this.
            lengths = (self.step + 1, self.limit)
            bound = max(survivors[0][0] / length_penalty(length, config) for length in lengths)
            if self._ended[-1][0] >= bound:
                survivors = []
        self._go_on(survivors)

    def _go_on(self, survivors: list[tuple[float, Row, Row]]) -> None:
        """Each beam's sequence goes to its first child; the others get forks of it."""
        parents, self._scores = self.rows, [score for score, _, _ in survivors]
        self.rows = [row for _, _, row in survivors]
        given: set[int] = set()
        later: list[tuple[Row, Row]] = []
        for _, parent, row in survivors:
            if id(parent) in given:
                later.append((parent, row))
            else:
                given.add(id(parent))
                row.sequence = parent.sequence
        for parent in parents:
            if id(parent) not in given:
                self.sequences.release(parent.sequence)
        for parent, row in later:  # when there is most room
            row.sequence = self.sequences.fork(parent.sequence)
        for parent in parents:
            parent.sequence = None

    def close(self) -> None:
        """Let go of what the beams hold."""
        for row in self.rows:
            if row.sequence is not None:  # a fork that there was no room for
                self.sequences.release(row.sequence)
        self.rows = []


def length_penalty(length: int, config: GenerationConfig) -> float:
    """What a score is divided by: GNMT, 1609.08144, equation 14."""
    return ((5 + length) / 6) ** config.length_penalty
