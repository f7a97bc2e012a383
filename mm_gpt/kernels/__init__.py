"""Compiled code for decoding on the CPU: vector products, key-value blocks, a team of threads, one call a step."""
