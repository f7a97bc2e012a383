"""Alignment: reward models, reinforcement learning, preference losses, rule-based rewards, and the data for them."""
