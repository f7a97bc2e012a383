"""Compiled kernels for the CPU, and the formats that weights are stored in."""
