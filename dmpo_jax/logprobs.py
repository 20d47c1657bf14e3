"""Log-probabilities of completions under given masks: the one place where the model and the estimators meet.

`make_score` closes over a policy and completions for a gradient step. `make_log_probs` jits what a buffer needs: the
estimates of the policy that drew it and of the reference, under the same masks.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from dmpo_jax import noise, sharding
from dmpo_jax.models.denoiser import completion_hidden
from dmpo_jax.models.head import divergence, token_scores
from dmpo_jax.models.noised import noised_hidden
from dmpo_jax.models.trainable import Trainable
from dmpo_jax.models.transformer import Transformer
from dmpo_jax.objectives.likelihood import Estimator, Views
from dmpo_jax.objectives.masking import Completions
from dmpo_jax.policy import Policies
from dmpo_jax.structs import LogProbs, Pairs, Prompts, Routing, Score, Scores


def make_log_probs(
  model: Transformer, mesh: Mesh, estimator: Estimator, *, per_token: bool = False, with_reference: bool = True
) -> jax.stages.Wrapped:
  """Jit the estimates of the policy's and the reference's log-probabilities of completions.

  `log_probs(policies, prompts, completion, is_counted, committed_at, key, seen=None, first=0) -> LogProbs`, on every
  device of `mesh`; `first` is the index of each prompt's first rollout. Both policies are scored under the same views,
  so that most of their noise cancels in the log-ratio.

  Args:
    per_token: give each position's part of the estimate, [p, g, c], instead of one estimate a draw, [p, g, draws].
    with_reference: False: the reference is not scored, and `log_p_ref` is `log_p_old`.
  """
  trainable = Trainable.of(model.config)
  read = estimator.tokens if per_token else estimator.estimates

  def log_probs(
    policies: Policies, prompts: Prompts, completion, is_counted, committed_at, key, seen=None, first=0
  ) -> LogProbs:
    keys = noise.row_keys(key, prompts.prompt_id, completion.shape[1], first)
    views = estimator.views(keys, Completions(is_counted, committed_at, prompts.is_valid))
    uncounted = seen if estimator.replays else None

    def score(variables: Mapping[str, Any]) -> Scores:
      scored = make_score(model, variables, prompts, completion, is_counted=is_counted, uncounted=uncounted)
      return scored(views.is_masked, views.prompt_is_masked, pairs=estimator.pairs)

    old = ref = score(trainable.policy(policies.trainable, policies.frozen))
    if with_reference:
      ref = score(trainable.reference(policies.frozen, policies.reference))
    return LogProbs(read(old.log_prob, views), read(ref.log_prob, views), _mean_entropy(old, views))

  return jax.jit(log_probs, out_shardings=sharding.replicated(mesh))


def _mean_entropy(scores: Scores, views: Views) -> Float[Array, "p g"]:
  """Average the entropy over the positions that the estimate reads, nats."""
  is_read = views.share > 0
  return jnp.where(is_read, scores.entropy, 0).sum((2, 3)) / jnp.maximum(is_read.sum((2, 3)), 1)


def make_score(
  model: Transformer,
  variables: Mapping[str, Any],
  prompts: Prompts,
  completion: Int[Array, "p g c"],
  *,
  is_counted: Bool[Array, "p g c"] | None = None,
  uncounted: Int[Array, "p g c"] | None = None,
  dropout_keys: Key[Array, "p g"] | None = None,
  teacher: Mapping[str, Any] | None = None,
) -> Score:
  """Close over a policy and its completions; the result maps masks to scores.

  `score(is_masked, prompt_is_masked=None, pairs=())`, [p, g, r, c] and [p, g, r, q], gives log p(y_l | prompt, y with
  the masked positions hidden) and the entropy of that distribution at every completion position, float32 [p, g, r, c].

  `pairs` names mask samples (i, j) that are wanted where i masks a position, and of j at the others, as complementary
  masks are: both then have the scores of the one that is wanted, and only these go through the head.

  This is the one place that decides what the model attends to: the prompt, the counted positions that are not masked,
  and MASK at the positions that are not counted. With a model that attends by blocks a position sees its own block so,
  and the blocks before it without masks. So no score depends on what a completion holds behind its EOS, and
  that of the rest is its own, whatever would have followed: as in sampling, where later positions are still MASK.

  Args:
    is_counted: positions that the likelihood counts; None: all.
    uncounted: what stands at the others instead of MASK, for a likelihood that `replays` what the sampler saw.
    dropout_keys: keys of the rollouts when the adapters' dropout is on; a mask sample folds in its index.
    teacher: variables of another policy; the scores then have the divergence from it, too.
  """
  mask = model.config.mask_token_id
  shown = completion
  if is_counted is not None:
    shown = jnp.where(is_counted, completion, mask if uncounted is None else uncounted)

  def score(
    is_masked: Bool[Array, "p g r c"], prompt_is_masked: Bool[Array, "p g r q"] | None = None, pairs: Pairs = ()
  ) -> Scores:
    p, g, _, c = is_masked.shape
    noised = jnp.where(is_masked, mask, shown[:, :, None])

    def states(
      variables: Mapping[str, Any], keys: Key[Array, "p g"] | None
    ) -> tuple[Float[Array, "t d"], list[int], Routing | None]:
      hidden, routing = _hidden(model, variables, prompts, prompt_is_masked, shown, noised, keys)
      packed, source = _pack(hidden, is_masked, pairs)
      return sharding.fill_rows(packed.reshape(-1, hidden.shape[-1])), source, routing

    hidden, source, routing = states(variables, dropout_keys)
    targets = jnp.broadcast_to(completion[:, :, None], (p, g, max(source) + 1, c))
    head = model.head_of(variables)
    num_ids = model.config.vocab_size
    scores = token_scores(hidden, head, sharding.fill_rows(targets.reshape(-1)), num_ids)
    if teacher is not None:
      taught, *_ = states(teacher, None)
      scores = scores._replace(divergence=divergence(hidden, head, taught, model.head_of(teacher), num_ids))
    scores = jax.tree.map(lambda array: _stack(array[: targets.size].reshape(targets.shape), source), scores)
    return scores._replace(routing=routing)

  return score


def _hidden(
  model: Transformer,
  variables: Mapping[str, Any],
  prompts: Prompts,
  prompt_is_masked: Bool[Array, "p g r q"] | None,
  shown: Int[Array, "p g c"],
  noised: Int[Array, "p g r c"],
  dropout_keys: Key[Array, "p g"] | None,
) -> tuple[Float[Array, "p g r c d"], Routing | None]:
  """Return the hidden states that predict noised completions."""
  if not model.config.block_length:
    return _hidden_of_rows(model, variables, prompts, prompt_is_masked, noised, dropout_keys)
  if prompt_is_masked is not None:
    raise ValueError("objective.one_step.prompt_mask_ratio: must be 0 for a model that attends by blocks")
  return noised_hidden(model, variables, prompts, shown, noised, dropout_keys)


def _hidden_of_rows(
  model: Transformer,
  variables: Mapping[str, Any],
  prompts: Prompts,
  prompt_is_masked: Bool[Array, "p g r q"] | None,
  noised: Int[Array, "p g r c"],
  dropout_keys: Key[Array, "p g"] | None,
) -> tuple[Float[Array, "p g r c d"], Routing | None]:
  """Run a row [prompt; completion] for each mask sample, filled up to what the devices divide."""
  p, g, r, c = noised.shape

  def rows(array: jax.Array) -> jax.Array:
    array = jnp.broadcast_to(array, (p, g, r, array.shape[-1])).reshape(p * g * r, -1)
    return sharding.fill_rows(array)

  prompt = rows(prompts.tokens[:, None, None])
  if prompt_is_masked is not None:
    prompt = jnp.where(rows(prompt_is_masked), model.config.mask_token_id, prompt)
  keys = None if dropout_keys is None else _sample_keys(dropout_keys, r)
  is_valid = rows(prompts.is_valid[:, None, None])
  hidden, routing = completion_hidden(model, variables, prompt, is_valid, rows(noised), keys)
  routing = jax.tree.map(lambda rows: _of_rollouts(rows, (p, g, r)), routing)
  return hidden[: p * g * r].reshape(p, g, r, c, -1), routing


def _sample_keys(keys: Key[Array, "p g"], num: int) -> Key[Array, "rows"]:
  """Derive a key for each mask sample of each rollout."""
  keys = jax.vmap(jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num))))(keys)
  return sharding.fill_rows(keys.reshape(-1))


def _pack(
  hidden: Float[Array, "p g r c d"], is_masked: Bool[Array, "p g r c"], pairs: Pairs
) -> tuple[Float[Array, "p g s c d"], list[int]]:
  """Take one hidden state of each pair at every position; also says where each mask sample's is now."""
  if not pairs:
    return hidden, list(range(is_masked.shape[2]))
  chosen = [jnp.where(is_masked[:, :, i, :, None], hidden[:, :, i], hidden[:, :, j]) for i, j in pairs]
  source = {mask_sample: number for number, pair in enumerate(pairs) for mask_sample in pair}
  for mask_sample in range(is_masked.shape[2]):
    if mask_sample not in source:
      source[mask_sample] = len(chosen)
      chosen.append(hidden[:, :, mask_sample])
  return jnp.stack(chosen, axis=2), [source[mask_sample] for mask_sample in range(is_masked.shape[2])]


def _of_rollouts(rows: Float[Array, "y rows *e"], sizes: tuple[int, int, int]) -> Float[Array, "y p g *e"]:
  """Add up the rows of each rollout's mask samples; those that fill the devices are dropped."""
  p, g, r = sizes
  return rows[:, : p * g * r].reshape(-1, p, g, r, *rows.shape[2:]).sum(3)


def _stack(array: Float[Array, "p g s c"], source: list[int]) -> Float[Array, "p g r c"]:
  return jnp.stack([array[:, :, index] for index in source], axis=2)
