"""The commands of alignment, but for training itself: answers judged, and the best of several kept."""

from mm_gpt.commands.command import Command

COMMANDS: dict[str, Command] = {}
