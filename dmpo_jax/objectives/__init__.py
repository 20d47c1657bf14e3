"""What is minimised: masks, likelihood bounds, importance weights, and one file a loss.

Each loss is `loss(score, experience, keys, *, num_prompts, **own) -> (scalar, metrics)`: it draws its masks from the
rollouts' `keys`, asks `score(is_masked)` for the policy's log-probabilities under them, and returns a sum over the
prompts it was given divided by `num_prompts`. Its metrics are such sums too, so that losses, gradients and metrics of
microbatches of prompts add up to those of the whole buffer.
"""

from dmpo_jax.objectives import denoise, wdce

OBJECTIVES = {"wdce": wdce.loss, "denoise": denoise.loss}
