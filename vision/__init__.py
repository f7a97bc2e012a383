"""Vision: open_clip encoders that give patch tokens, connectors, image transforms and contrastive (CLIP) training."""
