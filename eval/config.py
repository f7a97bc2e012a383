"""What an evaluation is asked to do."""

from dataclasses import dataclass

from mm_gpt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation. None means the task's own default."""

    task: str
    data: tuple[str, ...]
    """Tars or folders of records; text files for perplexity."""
    model: str = "default"
    controls: tuple[str, ...] | None = None
    limit: int | None = None
    """Only the first so many images (windows of text)."""
    batch_size: int = 8
    num_beams: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    """Of the shuffled control and the bootstrap."""
    device: str = "auto"
    dtype: str = "auto"
    """How the decoder's weights are kept: auto, fp32, bf16, int8 or int4."""
    contamination: str | None = None
    """A report of what the training corpus holds of the data: scores are split by it."""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "num_beams", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be from 0 to 2**63 - 1, not {self.seed}")
