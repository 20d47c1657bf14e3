"""TraceRL: a clipped ratio a token along the trajectory that was sampled, in chunks of model calls."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Key

from dmpo_jax.objectives.clipped import RatioObjective, averaged, estimate, token_loss
from dmpo_jax.objectives.objective import Loss
from dmpo_jax.objectives.weights import standardise
from dmpo_jax.structs import Experience, Score


@dataclasses.dataclass(frozen=True)
class TraceRl(RatioObjective):
  """TraceRL (arXiv 2509.06949). Its KL is to the policy that drew the rollouts."""

  @property
  def needs_reference(self) -> bool:
    return False

  def loss(self, score: Score, experience: Experience, keys: Key[Array, "p g"], num_prompts: int) -> Loss:
    """Compute TraceRL's loss without its value model (arXiv 2509.06949).

    (1 / num_prompts) sum_prompts mean_i (1/K_i) sum_k [- (1/|C_k|) sum_{l in C_k} min(rho_il A_i, clip(rho_il) A_i) +
    kl_weight * sum_{l in C_k} k3_il] over a rollout's K_i chunks C_k of positions, with `clipped.token_loss`'s rho and
    k3 to p_old, A the reward standardised within the group: as published, the surrogate is a chunk's mean and the KL
    its sum. There the mean is over the chunks of all rollouts, here over each rollout's and then the rollouts: a long
    trajectory counts no more than a short one.

    Published: likelihood trajectory with chunks of 8 calls of LLaDA's sampler, clip 0.2, kl_weight 0.01 on the k3
    estimate, groups of 8, one pass over a buffer's chunks, in as many updates as their number is multiples of the
    batch, all against the log-probabilities before the first. Here an update reads all chunks of the buffer, so that
    several updates take the place of the several batches of that pass.
    """
    assert self.likelihood is not None  # as `takes_likelihood` says
    assert experience.token_log_p_old is not None  # as `needs_token_log_probs` says
    policy, is_kept = estimate(score, experience, keys, self.likelihood), experience.is_kept
    is_read = policy.views.share > 0  # a mask sample reads a chunk
    size = is_read.sum(-1, keepdims=True)
    num_chunks = jnp.maximum((size > 0).sum(2), 1)
    share = (is_read / jnp.maximum(size, 1)).sum(2) / num_chunks
    kl_share = is_read.sum(2) / num_chunks
    losses, metrics = token_loss(
      policy.tokens,
      experience.token_log_p_old,
      experience.token_log_p_old,
      standardise(experience.reward, is_kept),
      share,
      is_kept,
      clip=self.clip,
      kl_weight=self.kl_weight * kl_share / jnp.where(share > 0, share, 1),
    )
    return averaged(losses, metrics, policy.entropy, is_kept, num_prompts)
