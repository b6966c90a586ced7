"""From files to uint8 batches whose order is a function of (seed, step)."""
