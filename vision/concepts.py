"""Concepts: what a tower's own classifier sees in an image, told to the decoder in words.

An ImageNet trunk knows a thousand things that few captions name. The names of the likeliest ones come behind the tokens
of the image, as object tags do in Oscar (2004.06165) and RAM (2306.03514): the decoder's own embeddings of their words,
each plus a learned vector that tells how sure the classifier is. So the decoder can say words that no caption taught
it, and learns when to believe them.

Shapes: N images, C classes, U names and kinds, k concept tokens, D width of the decoder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_gpt.errors import CheckpointError, ConfigError, MMGPTError, unknown_name
from mm_gpt.vision.efficientnet import EfficientNetLite, LastBlocks


@dataclass(frozen=True, kw_only=True)
class ConceptsConfig:
    names: tuple[str, ...]
    """What people call each class, in the order of the classifier's outputs. The scores of equal names add up."""
    kinds: tuple[str, ...]
    """The broader kind of each class ("dog"); "" for none. The likeliest kind comes before the names."""
    count: int = 3
    """Names at most."""
    min_score: float = 0.05
    """Names and kinds below this probability are not told."""
    tokens: int = 8
    """k, how many tokens they may take; a name that does not fit any more is left out."""
    own_blocks: int = 3
    """How many of the trunk's last blocks the classifier has for itself, where the tower's own are tuned; the head
    convolution is one. 0: the classifier reads the mean of the tower's tokens."""

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.kinds):
            raise ConfigError(f"{len(self.names)} names and {len(self.kinds)} kinds: each class needs both")
        if not all(name.strip() for name in self.names):
            raise ConfigError("a class without a name")
        for field in ("count", "tokens"):
            if not 1 <= getattr(self, field) <= 256:
                raise ConfigError(f"{field} must be 1 to 256, not {getattr(self, field)}")
        if not 0 <= self.min_score < 1:
            raise ConfigError(f"min_score must be at least 0 and below 1, not {self.min_score}")
        if self.own_blocks < 0:
            raise ConfigError(f"own_blocks must be at least 0, not {self.own_blocks}")

    def spoken(self) -> tuple[list[str], list[str]]:
        """Each name once, and each kind once, in alphabetical order: the rows of `ConceptTokens.ids`."""
        return sorted(set(self.names)), sorted(set(self.kinds) - {""})


class ConceptClassifier(nn.Module):
    """What the tower sees to class probabilities (N, C). Never trained: its weights are the trunk's own."""

    def __init__(self, config: ConceptsConfig, trunk: nn.Module | None, width: int) -> None:
        """`trunk` is the tower's, `width` that of its tokens. Raises ConfigError where it cannot lend its blocks."""
        super().__init__()
        self.own: LastBlocks | None = None
        if config.own_blocks:
            if not isinstance(trunk, EfficientNetLite):
                raise ConfigError("concepts with blocks of their own need the trunk of an EfficientNet-Lite")
            if config.own_blocks > len(trunk.blocks) + 1:
                raise ConfigError(f"own_blocks is {config.own_blocks}: the trunk has {len(trunk.blocks) + 1} blocks")
            self.own = LastBlocks(trunk, config.own_blocks)
        self.classifier = nn.Linear(width, len(config.names))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """What the trunk's own blocks are given (N, c, h, w), or the tower's tokens (N, P, D_v), to (N, C)."""
        with torch.no_grad():
            pooled = x.mean(dim=1) if self.own is None else self.own(x).mean(dim=(2, 3))
            return self.classifier(pooled).float().softmax(dim=-1)

    def load_untouched(self, state: Mapping[str, Tensor], trunk: nn.Module | None) -> None:
        """Take the classifier's weights, and those of the blocks that are its own, from `state`.

        For the `trunk` of an EfficientNet-Lite these are all of its weights before it was tuned, in timm's names; for
        other towers `classifier.weight` and `classifier.bias`.
        Raises CheckpointError where they do not fit, or where the blocks that `trunk` lends are other ones.
        """
        if isinstance(trunk, EfficientNetLite):
            own_blocks = 0 if self.own is None else len(self.own.blocks) + 1
            for name, tensor in trunk.named_before(own_blocks):
                if not _alike(tensor, state.get(name)):
                    raise CheckpointError(f"{name} of the tower is not that of the classifier's trunk: it was tuned")
        own = {name: value for name, value in state.items() if name.startswith("classifier.")}
        if self.own is not None:
            own |= {f"own.{name}": state[name] for name in self.own.state_dict() if name in state}
        try:
            self.load_state_dict(own, strict=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"not the weights of this classifier: {reason}") from None


def _alike(tensor: Tensor, other: Tensor | None) -> bool:
    """Up to the half precision in which matrices are stored."""
    return other is not None and tensor.shape == other.shape and torch.allclose(tensor, other, rtol=1e-3, atol=1e-4)


class ConceptTokens(nn.Module):
    """Class probabilities (N, C) to token embeddings (N, k, D)."""

    ids: Tensor
    _of_name: Tensor
    _of_kind: Tensor

    def __init__(self, config: ConceptsConfig, width: int) -> None:
        super().__init__()
        self.config, self.num_tokens = config, config.tokens
        self._names, self._kinds = config.spoken()
        places = {name: n for n, name in enumerate(self._names)}
        kinds = {kind: n for n, kind in enumerate(self._kinds)} | {"": len(self._kinds)}
        self.register_buffer("_of_name", torch.tensor([places[name] for name in config.names]), persistent=False)
        self.register_buffer("_of_kind", torch.tensor([kinds[kind] for kind in config.kinds]), persistent=False)
        empty = torch.full((len(self._names) + len(self._kinds), config.tokens), -1, dtype=torch.int32)
        self.register_buffer("ids", empty)  # (U, k) the tokens of each name and kind, then -1
        self.of_score = nn.Parameter(torch.zeros(2, 3, width))
        """Of a name, of a kind: what is added to its embeddings once, times its probability, times its logarithm."""
        self.blank = nn.Parameter(torch.randn(width) * 0.02)
        """What stands where there is no concept."""
        self._first = {name: n for n, name in reversed(list(enumerate(config.names)))}
        """The first class of each name."""
        self.blank_image = nn.Parameter(torch.randn(width) * 0.02)
        """What stands for each other token of an image of which the concepts alone are shown."""

    def tokenize(self, encode: Callable[[str], Sequence[int]]) -> None:
        """Write `ids` by a tokenizer. A name of more tokens than there are is never told."""
        for row, name in enumerate([*self._names, *self._kinds]):
            ids = list(encode(f" {name}"))
            if len(ids) <= self.num_tokens:
                self.ids[row] = torch.tensor(ids + [-1] * (self.num_tokens - len(ids)), dtype=torch.int32)

    def told(self, scores: Tensor) -> list[list[tuple[str, float]]]:
        """(N, C) to what is told of each image: the likeliest kind, then names, each with its probability."""
        names, kinds = self._sums(scores)
        return [
            [(self._word(row), score) for row, score, _ in self._entries(own, of_kinds)]
            for own, of_kinds in zip(names, kinds, strict=True)
        ]

    def scores_of(self, given: Mapping[str, float]) -> Tensor:
        """(C,) probabilities of classes from those of names. Raises MMGPTError for a name that is none of them."""
        scores = torch.zeros(len(self.config.names))
        for name, score in given.items():
            if name not in self._first:
                raise MMGPTError(unknown_name("concept", name, self._names))
            scores[self._first[name]] = score
        return scores

    def forward(self, scores: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, C) to (N, k, D); `embed` gives the decoder's embeddings of ids."""
        ids = torch.full((len(scores), self.num_tokens), -1)
        is_kind = torch.zeros_like(ids)
        probability = torch.ones(ids.shape)
        for n, (names, kinds) in enumerate(zip(*self._sums(scores), strict=True)):
            at = 0
            for row, score, own in self._entries(names, kinds):
                end = at + len(own)
                ids[n, at:end], is_kind[n, at:end] = own, int(row >= len(self._names))
                probability[n, at:end] = score
                at = end
        ids, is_kind, probability = (t.to(self.blank.device) for t in (ids, is_kind, probability))
        size = torch.stack([torch.ones_like(probability), probability, probability.log()], dim=-1)  # (N, k, 3)
        of_score = self.of_score[is_kind]  # (N, k, 3, D)
        told = embed(ids.clamp(min=0)) + torch.einsum("nkf,nkfd->nkd", size.to(of_score.dtype), of_score)
        return torch.where((ids >= 0).unsqueeze(-1), told, self.blank.to(told.dtype))

    def _sums(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of names, and of kinds, on the CPU."""
        scores = scores.detach().float().cpu()
        of_name, of_kind = self._of_name.cpu(), self._of_kind.cpu()
        names = scores.new_zeros(len(scores), len(self._names)).index_add_(1, of_name, scores)
        kinds = scores.new_zeros(len(scores), len(self._kinds) + 1).index_add_(1, of_kind, scores)
        return names, kinds[:, :-1]

    def _entries(self, names: Tensor, kinds: Tensor) -> Iterator[tuple[int, float, Tensor]]:
        """Rows of `ids` with their probabilities and tokens, in the order in which they are told; what fits."""
        found: list[tuple[int, float]] = []
        best = names.topk(min(self.config.count, len(names)))
        if len(kinds):
            likeliest = kinds.max(dim=0)
            kind = len(self._names) + int(likeliest.indices)
            if self._word(kind) not in map(self._word, best.indices.tolist()):  # one that is a name too is told once
                found.append((kind, float(likeliest.values)))
        found += zip(best.indices.tolist(), best.values.tolist(), strict=True)
        left = self.num_tokens
        for row, score in found:
            own = self.ids[row].cpu()
            own = own[own >= 0].long()
            if score >= max(self.config.min_score, 1e-6) and 0 < len(own) <= left:
                left -= len(own)
                yield row, min(score, 1.0), own

    def _word(self, row: int) -> str:
        return self._names[row] if row < len(self._names) else self._kinds[row - len(self._names)]
