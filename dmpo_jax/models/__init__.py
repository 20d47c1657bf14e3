"""Masked diffusion language models by name."""

from dmpo_jax.models.transformer import Transformer

MODELS = {"llada": Transformer}
