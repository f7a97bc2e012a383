"""Prompts with answers of which some are better than others: what reward models, DPO and on-policy learning read."""

from mm_gpt.datasets.formats.preferences import Comparison as Comparison
from mm_gpt.datasets.formats.preferences import Completion as Completion
