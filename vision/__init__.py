"""Vision: encoders that give patch tokens, connectors, image transforms and tiling, contrastive (CLIP) training."""
