"""Networks as Flax NNX modules: DeCo and its parts, the baselines, the frozen teachers."""
