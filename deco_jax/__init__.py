"""DeCo, frequency-decoupled pixel diffusion (arXiv 2511.19365), in JAX."""

__version__ = "0.1.0"
