"""Alignment: reward models, preference losses, and policies that learn from what they sample."""
