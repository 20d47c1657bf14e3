"""DMPO: reinforcement learning of masked diffusion language models, in JAX."""
