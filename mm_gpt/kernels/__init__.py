"""Kernels for the CPU, compiled at run time by numba."""
