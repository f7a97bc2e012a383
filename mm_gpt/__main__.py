"""`python -m mm_gpt` is `mm-gpt`."""

from typing import Never

from mm_gpt.commands.cli import main
from mm_gpt.system.processes import leave


def run() -> Never:
    """The process of a command, from its arguments to its exit code."""
    leave(main())


if __name__ == "__main__":
    run()
