"""Scores that equal those of the official scripts, with intervals, in plain Python and numpy."""
