"""Masked diffusion language models by name."""

from dmpo_jax.models import llada

MODELS = {"llada": llada.LLaDA}
