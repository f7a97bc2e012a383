"""The model: one causal decoder, and the multimodal wrapper that feeds it images and text."""
