"""Evaluation: tasks, metrics, the harness that runs a model on them, and reports."""
