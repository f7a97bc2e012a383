"""From samples to batches: pieces, the plan of an epoch, packing, and the loader."""
