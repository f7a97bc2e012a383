"""Models for other programs: folders that Hugging Face loads, and GGUF files."""
