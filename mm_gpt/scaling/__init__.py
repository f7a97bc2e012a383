"""Scaling laws: loss and capability of a run before it starts, from runs that cost a hundredth and less."""
