"""The commands of `mm-gpt`."""
