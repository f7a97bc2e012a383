"""GGUF files: read, and written for llama.cpp."""
