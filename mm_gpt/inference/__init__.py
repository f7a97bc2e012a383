"""Inference: one engine behind the Python API, the command line, the demo and evaluation."""
