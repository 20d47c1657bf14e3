"""The head in chunks equals the head as a whole, in values and gradients, and no array of all logits exists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jaxprs import arrays_of, products_of

from dmpo_jax import sharding
from dmpo_jax.models import head as head_module
from dmpo_jax.models.head import Split, divergence, split_vocabulary, token_scores
from dmpo_jax.structs import VOCAB_TILE
from launch.bench.costs import count_collectives

TOKENS, WIDTH, SIZE = 6, 5, 1000
RNG = np.random.default_rng(0)
HIDDEN = jnp.asarray(RNG.normal(size=(TOKENS, WIDTH)), jnp.float32)
HEAD = jnp.asarray(RNG.normal(size=(WIDTH, SIZE)), jnp.float32)
TARGETS = jnp.array([0, 999, 383, 384, 700, 768])  # at the ends of chunks, and where the last one reaches back
FACTOR = jnp.arange(1.0, TOKENS + 1)


def plain(hidden, head, targets):
  logits = hidden.astype(jnp.float32) @ head.astype(jnp.float32)
  log_p = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(log_p, targets[:, None], -1)[:, 0], -(jnp.exp(log_p) * log_p).sum(-1)


def weighted(score, hidden, head, targets=TARGETS):
  """A number that depends on all log-probabilities, and the scores."""
  scores = score(hidden, head, targets)
  return (FACTOR * scores[0]).sum(), scores


def gradient_of(score, argnums=(0, 1)):
  return jax.value_and_grad(lambda *arrays: weighted(score, *arrays), argnums=argnums, has_aux=True)


def assert_close(actual, wanted, **tolerance):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), tuple(actual), tuple(wanted))


@pytest.mark.parametrize("chunk_size", [128, 384, SIZE])
def test_chunks_are_the_whole(monkeypatch, chunk_size):
  monkeypatch.setattr(head_module, "CHUNK_SIZE", chunk_size)
  (_, scores), gradients = jax.jit(gradient_of(token_scores))(HIDDEN, HEAD)
  (_, wanted), wanted_gradients = gradient_of(plain)(HIDDEN, HEAD)
  assert_close(scores[:2], wanted, rtol=1e-5, atol=1e-6)
  assert_close(gradients, wanted_gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [128, 384, SIZE])
def test_the_divergence_from_a_teacher(monkeypatch, chunk_size):
  monkeypatch.setattr(head_module, "CHUNK_SIZE", chunk_size)
  teacher, teacher_head = HIDDEN[::-1], 1.5 * HEAD + 0.1

  def total(score):
    return jax.value_and_grad(lambda *arrays: (FACTOR * score(*arrays)).sum(), argnums=(0, 1, 2, 3))

  def plainly(hidden, head, teacher, teacher_head):
    taught = jax.lax.stop_gradient(jax.nn.softmax(teacher @ teacher_head))
    return (taught * (jnp.log(taught) - jax.nn.log_softmax(hidden @ head))).sum(-1)

  found = jax.jit(total(divergence))(HIDDEN, HEAD, teacher, teacher_head)
  wanted = total(plainly)(HIDDEN, HEAD, teacher, teacher_head)
  assert_close(jax.tree.leaves(found), jax.tree.leaves(wanted), rtol=2e-5, atol=2e-5)
  if chunk_size < SIZE:
    jaxpr = jax.make_jaxpr(total(divergence))(HIDDEN, HEAD, teacher, teacher_head)
    assert not [shape for shape in arrays_of(jaxpr) if shape[:1] == (TOKENS,) and SIZE in shape]


def test_one_gradient_alone_and_none_are_the_same_numbers(monkeypatch):
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 384)
  wanted = gradient_of(plain)(HIDDEN, HEAD)[1]
  for argnum in (0, 1):
    gradient = jax.jit(gradient_of(token_scores, argnum))(HIDDEN, HEAD)[1]
    np.testing.assert_allclose(gradient, wanted[argnum], rtol=1e-5, atol=1e-6)
  assert_close(jax.jit(token_scores)(HIDDEN, HEAD, TARGETS)[:2], plain(HIDDEN, HEAD, TARGETS), rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite(monkeypatch):
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 384)
  hidden = HIDDEN * jnp.array([1e-6, 30, 100, 300, 1000, 3000])[:, None]
  (_, scores), gradients = jax.jit(gradient_of(token_scores))(hidden, HEAD)
  (_, wanted), wanted_gradients = gradient_of(plain)(hidden, HEAD)
  np.testing.assert_allclose(scores.log_prob, wanted[0], rtol=1e-5)
  assert_close(gradients, wanted_gradients, rtol=1e-4, atol=1e-2)
  assert np.isfinite(scores.entropy).all()


def test_bfloat16_is_summed_in_float32(monkeypatch):
  """As far from float32 as the same rounded inputs are in one product, though many more numbers are added up."""
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 128)
  hidden, head = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
  (_, scores), gradients = jax.jit(gradient_of(token_scores))(hidden, head)
  (_, wanted), wanted_gradients = gradient_of(plain)(hidden.astype(jnp.float32), head.astype(jnp.float32))
  assert_close(scores[:2], wanted, rtol=1e-5, atol=1e-5)  # products of bfloat16 numbers are exact in float32
  assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16] * 2
  for gradient, other in zip(gradients, wanted_gradients, strict=True):
    np.testing.assert_allclose(gradient.astype(jnp.float32), other, atol=0.01 * np.abs(other).max())


def test_entropy_has_no_gradient(monkeypatch):
  for chunk_size in (384, SIZE):
    monkeypatch.setattr(head_module, "CHUNK_SIZE", chunk_size)
    slope = jax.grad(lambda hidden: token_scores(hidden, HEAD, TARGETS).entropy.sum())(HIDDEN)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("size", [1024, 1152])
def test_a_head_split_over_devices_is_the_whole_one(monkeypatch, size):
  """Each device's columns are read from its own share, be it a number of runs (1024) or not (1152)."""
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 512)
  hidden = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
  head, targets = jnp.asarray(RNG.normal(size=(4, size)), jnp.float32), jnp.arange(8) * (size // 8)

  def compute(hidden, head):
    def total(hidden, head):
      scores = token_scores(hidden, head, targets)
      return (jnp.arange(8.0) * scores.log_prob).sum(), scores

    return jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)

  alone = jax.jit(compute)(hidden, head)
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=4)
  with jax.set_mesh(mesh):
    placed = jax.device_put(head, NamedSharding(mesh, sharding.spec("embed", "vocab")))
    program = jax.jit(compute).lower(hidden, placed).compile()
    split = program(hidden, placed)
    assert split_vocabulary(size) == Split(4, size // 4, 128)
    gathered = [c.shapes for c in count_collectives(program.as_text()) if c.kind == "all-gather"]
    assert ((4, 1, 128),) in gathered
    assert not [shapes for shapes in gathered if (4, 1, size // 4) in shapes], "a chunk at a time, not the whole share"
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), split, alone)


def test_chunks_have_one_size_and_cover_the_vocabulary():
  for size in (8193, 32_000, 50_257, 126_464, 152_064):
    split = split_vocabulary(size)
    num_chunks = split.num_chunks
    assert num_chunks == -(-size // head_module.CHUNK_SIZE)
    assert split.step <= head_module.CHUNK_SIZE
    assert num_chunks * split.step - size < num_chunks * head_module.WIDTH_MULTIPLE
    chunks = [(np.asarray(ids), np.asarray(is_new)) for ids, is_new in map(split.ids, range(num_chunks))]
    np.testing.assert_array_equal(np.concatenate([ids[is_new] for ids, is_new in chunks]), np.arange(size))
    for ids, is_new in chunks:
      assert ids[0, 0] % VOCAB_TILE == ids[is_new][0] % VOCAB_TILE == 0, "no chunk cuts a tile"


def test_where_tiles_are_drawn_no_share_cuts_one():
  with jax.set_mesh(sharding.make_mesh(data=1, fsdp=2, tensor=4)):
    assert [split_vocabulary(size, VOCAB_TILE).num_shares for size in (10_240, 10_244)] == [4, 1]
    split = split_vocabulary(10_244)  # scores need no tiles
    seen = [np.asarray(ids)[np.asarray(is_new)] for ids, is_new in map(split.ids, range(split.num_chunks))]
  assert split.num_shares == 4
  np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(10_244))


@pytest.mark.parametrize(("argnums", "products"), [(None, 1), (0, 2), ((0, 1), 4)])
def test_a_chunk_at_a_time_and_no_product_too_many(monkeypatch, argnums, products):
  """Logits; for the gradient by hidden states one more; by the head's too, logits again and one more."""
  monkeypatch.setattr(head_module, "CHUNK_SIZE", 384)
  score = gradient_of(token_scores, argnums) if argnums is not None else lambda *arrays: weighted(token_scores, *arrays)
  program = jax.make_jaxpr(score)(HIDDEN, HEAD)
  assert len(products_of(program)) == products
  logits = {shape for shape in arrays_of(program) if len(shape) > 1 and shape[0] == TOKENS and shape[-1] > WIDTH}
  assert logits == {(TOKENS, 392), (TOKENS, 1, 392)}  # and the 8 ids of the incomplete tile
