"""`python -m mm_gpt` is `mm-gpt`."""

import sys

from mm_gpt.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
