"""Contamination: evaluation data inside training data."""
