"""DMPO: reinforcement learning of masked diffusion language models, in JAX."""

__version__ = "0.2.0.dev0"
