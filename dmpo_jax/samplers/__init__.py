"""Decoding rules by name: one file each, on the loop of `loop.py`.

Each is `sample(denoiser, keys, *, completion_length, block_length, steps, temperature, **own) -> structs.Rollouts`.
"""

from dmpo_jax.samplers import llada

SAMPLERS = {"llada": llada.sample}
