"""The model against the official PyTorch code, and what its results must not depend on."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxprs import arrays_of
from recorded_models import TINY, compiled, load, recorded, tiny

from dmpo_jax import policy, sharding
from dmpo_jax.models.attention import attend
from dmpo_jax.models.layers import rotary_frequencies, rotary_table, rotate
from dmpo_jax.models.lora import LoraConfig
from dmpo_jax.models.transformer import KVCache, Transformer, count_chunks, empty_kv_cache
from launch.bench import costs

TOLERANCE = 5e-4  # of recorded float32 logits with a standard deviation of 2-3


OPTIONS = dict(qk_norm=True, rotary_fraction=0.5, rope_scaling=(2.0, 1.0, 4.0, 8.0))  # as some families have them


def close(actual, wanted, tolerance=TOLERANCE):
  np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(wanted, np.float32), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
  ("name", "case"), [("m1_base", 2), ("m2_gqa", 1), ("m3_tied", 0), ("m3_tied", 2), ("m4_bf16", 0)]
)
def test_logits_are_the_recorded_ones(name, case):
  model, variables = load(name)
  arrays = recorded(name)
  logits = compiled(model)(variables, arrays[f"ids_{case}"])
  assert logits.dtype == jnp.float32
  close(logits, arrays[f"logits_{case}"])


@pytest.mark.parametrize("name", ["m2_gqa", "m3_tied"])
def test_masks_and_repeated_positions_are_honoured(name):
  model, variables = load(name)
  arrays = recorded(name)
  tokens = arrays["w_ids"]
  positions = jnp.broadcast_to(arrays["w_pos"], tokens.shape)
  assert len(set(arrays["w_pos"].tolist())) < tokens.shape[1]
  logits = compiled(model)(variables, tokens, positions=positions, attention_mask=arrays["w_mask4d"][:, 0])
  close(logits, arrays["w_logits"])


def test_hidden_states_are_the_recorded_ones():
  model, variables = load("m1_base")
  arrays = recorded("m1_base")

  @jax.jit
  def run(tokens):
    return model.apply(variables, tokens, capture_intermediates=True, mutable="intermediates")[1]["intermediates"]

  seen = run(arrays["ids_0"])
  stream = seen["blocks"]["__call__"][0][0]  # [layers, b, l, d], after each block
  for actual, name in zip(stream, ("hs_1", "hs_2", "last_block_out"), strict=True):
    close(actual, arrays[name])
  close(seen["final_norm"]["__call__"][0], arrays["hs_3"])
  for layer in (0, 2):
    close(seen["blocks"]["attn_out"]["__call__"][0][layer, :1], arrays[f"attn_out_{layer}"])
    close(seen["blocks"]["ff_out"]["__call__"][0][layer, :1], arrays[f"mlp_out_{layer}"])


@pytest.mark.parametrize("name", ["m2_gqa", "m3_tied"])
def test_prefix_and_dual_caches_give_the_recorded_logits(name):
  model, variables = load(name)
  arrays = recorded(name)
  before, after = arrays["c_ids_full"], arrays["c_ids_after"]
  start, end = arrays["c_block"].tolist()
  run, logits = compiled(model, "hidden"), compiled(model, "logits")
  _, kv_cache = run(variables, before, kv_cache=empty_kv_cache(model.config, *before.shape), cache_start=0)
  prefix, _ = run(variables, after[:, start:], kv_cache=kv_cache, cache_start=start)
  close(logits(variables, prefix), arrays["c_logits_prefix"])
  dual, written = run(variables, after[:, start:end], kv_cache=kv_cache, cache_start=start)
  close(logits(variables, dual), arrays["c_logits_dual"])
  np.testing.assert_array_equal(written.keys[:, :, :start], kv_cache.keys[:, :, :start])
  np.testing.assert_array_equal(written.keys[:, :, end:], kv_cache.keys[:, :, end:])


def test_cached_keys_and_values_are_the_recorded_ones():
  model, variables = load("m1_base")
  arrays = recorded("m1_base")
  tokens = arrays["c_ids_full"]
  _, kv_cache = compiled(model, "hidden")(variables, tokens, kv_cache=empty_kv_cache(model.config, *tokens.shape))
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  table = rotary_table(positions, rotary_frequencies(model.config.head_dim, model.config.rope_theta))
  close(kv_cache.keys[1], rotate(arrays["c_k_1"].swapaxes(1, 2), table))  # recorded before rotation
  close(kv_cache.values[1].swapaxes(1, 2), arrays["c_v_1"])


def test_bfloat16_run_is_near_the_recorded_one():
  arrays = recorded("m4_bf16")
  model, variables = load("m4_bf16", dtype="bfloat16", param_dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
  logits = compiled(model)(variables, arrays["ids_0"])
  assert logits.dtype == jnp.float32
  error = np.abs(np.asarray(logits - arrays["logits_0"]))
  official_error = np.abs(np.asarray(arrays["logits_bf16_0"] - arrays["logits_0"]))
  assert error.mean() < 1.2 * official_error.mean()
  assert error.max() < 1.5 * official_error.max()


def test_parameters_and_activations_have_dtypes_of_their_own():
  model, variables = tiny(dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  tokens = jnp.arange(6).reshape(1, 6)
  hidden, _ = compiled(model, "hidden")(variables, tokens)
  assert hidden.dtype == jnp.bfloat16
  assert compiled(model, "logits")(variables, hidden).dtype == jnp.float32
  assert empty_kv_cache(model.config, 1, 6).keys.dtype == jnp.bfloat16


def test_attention_is_a_softmax_in_float32():
  b, l, m, n, k, h = 2, 3, 5, 4, 2, 6
  draw = np.random.default_rng(1).normal
  query, key, value = (jnp.asarray(draw(size=shape)) for shape in ((b, l, n, h), (b, m, k, h), (b, m, k, h)))
  mask = np.arange(m) < np.array([[2], [5]])
  mixed = jax.jit(attend)(query, key, value, jnp.asarray(mask)[:, None])
  for row in range(b):
    for head in range(n):
      kept = np.asarray(key[row, mask[row], head // (n // k)], np.float64)
      scores = np.asarray(query[row, :, head], np.float64) @ kept.T / np.sqrt(h)
      weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
      wanted = weights @ np.asarray(value[row, mask[row], head // (n // k)])
      close(mixed[row, :, head * h : (head + 1) * h], wanted, 1e-5)
  nowhere = jax.jit(attend)(query, key, value, jnp.zeros((b, 1, m), bool))
  close(nowhere[0, :, :h], jnp.broadcast_to(value[0, :, 0].mean(0), (l, h)), 1e-5)
  huge = jax.jit(attend)(*(jnp.asarray(1e4 * array, jnp.bfloat16) for array in (query, key, value)), None)
  assert huge.dtype == jnp.bfloat16
  assert jnp.isfinite(huge).all()


def rows(seed, num_rows, length):
  return jax.random.randint(jax.random.key(seed), (num_rows, length), 0, TINY.vocab_size)


@pytest.mark.parametrize("with_cache", [False, True])
def test_padding_changes_nothing(with_cache):
  model, variables = tiny()
  run, tokens = compiled(model, "hidden"), rows(0, 2, 7)
  alone, _ = run(variables, tokens)
  padded = jnp.pad(tokens, ((0, 0), (4, 0)), constant_values=5)
  is_valid = jnp.broadcast_to(jnp.arange(11) >= 4, padded.shape)
  own = dict(kv_cache=empty_kv_cache(TINY, 2, 11)) if with_cache else {}
  hidden, kv_cache = run(variables, padded, is_valid=is_valid, **own)
  close(hidden[:, 4:], alone, 1e-5)
  if with_cache:  # the last three tokens again: their slots are rewritten, padding stays unseen, positions go on
    again, _ = run(variables, tokens[:, 4:], kv_cache=kv_cache, cache_start=8)
    close(again, alone[:, 4:], 1e-5)


def test_a_cache_holds_only_what_was_written():
  model, variables = tiny()
  run, tokens = compiled(model, "hidden"), rows(1, 2, 6)
  alone, _ = run(variables, tokens)
  junk = KVCache(*(jnp.full_like(array, 7) for array in empty_kv_cache(TINY, 2, 10)[:2]), jnp.zeros((2, 10), bool))
  hidden, kv_cache = run(variables, tokens, kv_cache=junk, cache_start=0)
  close(hidden, alone, 1e-5)
  np.testing.assert_array_equal(kv_cache.is_valid, np.broadcast_to(np.arange(10) < 6, (2, 10)))


def test_a_row_does_not_depend_on_its_batch():
  model, variables = tiny()
  tokens = rows(2, 5, 7)
  is_valid = jnp.arange(7) >= jnp.arange(5)[:, None]
  together = compiled(model)(variables, tokens, is_valid=is_valid)
  for row in (0, 4):
    alone = compiled(model)(variables, tokens[row : row + 1], is_valid=is_valid[row : row + 1])
    close(alone, together[row : row + 1], 1e-5)


def test_heads_may_have_any_width():
  """A model of half as many heads, and as wide ones, is the larger one without the output of its other heads."""
  lora = LoraConfig(2, 4.0, 0.0, ("q_proj", "k_proj", "attn_out"))
  large, variables = tiny(num_kv_heads=4, qkv_bias=True, lora=lora)
  h = TINY.head_dim
  small = Transformer(dataclasses.replace(large.config, num_heads=2, num_kv_heads=2, head_dim=h))

  def keep(path, array):
    (module, kind), width = [key.key for key in path[-2:]], 2 * h
    if module in ("q_proj", "k_proj", "v_proj") and kind != "A":
      return array[..., :width]
    return array[:, :width] if module == "attn_out" and kind != "B" else array

  def mute(path, array):
    is_output = path[-2].key == "attn_out" and path[-1].key != "B"
    return array.at[:, 2 * h :].set(0) if is_output else array

  halved = jax.tree_util.tree_map_with_path(keep, variables)
  shapes = jax.eval_shape(small.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  assert jax.tree.map(jnp.shape, halved) == jax.tree.map(jnp.shape, nn.unbox(shapes))
  tokens = rows(6, 2, 7)
  wanted = compiled(large)(jax.tree_util.tree_map_with_path(mute, variables), tokens)
  close(compiled(small)(halved, tokens), wanted, 1e-5)


def gradient(model, variables, tokens, **own):
  """Gradient of one number that depends on all of the model."""

  def loss(params):
    logits = model.apply({**variables, "params": params}, tokens, **own)
    return (jax.nn.log_softmax(logits)[..., 3] * jnp.arange(tokens.shape[1])).mean()

  return jax.jit(jax.value_and_grad(loss))(variables["params"])


def test_slow_waves_are_stretched_as_llama_3_does():
  """Of five waves, two fit into 64 tokens more than four times and two less than once; the third is in between."""
  plain = 10_000.0 ** -(np.arange(0, 10, 2) / 10)
  fit = 64 * plain / (2 * np.pi)  # 10.2, 1.6, 0.26, ...
  kept = np.clip((fit - 1.0) / 3.0, 0, 1)
  np.testing.assert_allclose(kept, [1, 0.2048, 0, 0, 0], atol=1e-3)
  wanted = plain * [1, 0.2048 + 0.7952 / 8, 1 / 8, 1 / 8, 1 / 8]
  np.testing.assert_allclose(rotary_frequencies(10, 10_000.0, (8.0, 1.0, 4.0, 64.0)), wanted, rtol=1e-3)


def test_what_is_behind_the_rotated_part_of_a_head_stays():
  x = jnp.arange(1.0, 7.0)[None, None, None]
  turned = rotate(x, rotary_table(jnp.array([[1]]), jnp.array([np.pi / 2, 0.0], jnp.float32)))
  np.testing.assert_allclose(turned[0, 0, 0], [-3, 2, 1, 4, 5, 6], atol=1e-6)


REMATS = ("none", "products", "dots", "attention", "full")


def test_remat_policies_give_equal_gradients():
  """Those that keep most, in chunks of rows, less, and nothing."""
  _, variables = tiny()
  wanted = gradient(Transformer(TINY), variables, rows(4, 8, 6))
  for remat, layer_rows in (("products", 4), ("attention", 0), ("full", 0)):
    own = Transformer(dataclasses.replace(TINY, remat=remat, layer_rows=layer_rows))
    found = gradient(own, variables, rows(4, 8, 6))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, wanted)
  assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(wanted[1]))


@pytest.mark.parametrize("layer_rows", [0, 2])
def test_remat_policies_compute_again_what_they_say(layer_rows):
  """Of attention's two products `products` repeats one, `dots` both; then the feed-forward; then the projections."""
  _, variables = tiny()
  (b, l), c = (8, 6), TINY
  flops = {}
  for remat in REMATS:
    model = Transformer(dataclasses.replace(TINY, remat=remat, layer_rows=layer_rows))
    program = jax.make_jaxpr(functools.partial(gradient, model))(variables, rows(4, b, l))
    flops[remat] = costs.count_flops(program) / c.num_layers
  product, width = 2 * b * l * l * c.d_model, c.num_kv_heads * c.head_dim
  again = {
    "products": product,
    "dots": 2 * product,
    "attention": product + 2 * b * l * c.d_model * 2 * c.mlp_hidden_size,
    "full": 2 * product + 2 * b * l * c.d_model * 2 * (c.mlp_hidden_size + c.d_model + width),
  }
  assert {remat: flops[remat] - flops["none"] for remat in again} == again


@pytest.mark.slow
def test_rows_in_chunks_change_no_number():
  """On one device and on eight, each with its own rows; padding, and dropout that belongs to a row wherever it is."""
  adapters = LoraConfig(2, 4.0, 0.1, ("q_proj", "up_proj", "ff_out"))
  model, variables = tiny(remat="full", num_layers=2, lora=adapters, **OPTIONS)
  tokens, keys = rows(7, 16, 6), jax.random.split(jax.random.key(1), 16)
  is_valid = jnp.arange(6) >= jnp.arange(16)[:, None] % 3

  def loss(layer_rows, variables):
    own = Transformer(dataclasses.replace(model.config, layer_rows=layer_rows))
    logits = own.apply(variables, tokens, is_valid=is_valid, dropout_keys=keys)
    return (jax.nn.log_softmax(logits)[..., 3] * is_valid).mean()

  def run(layer_rows, variables):
    return jax.jit(jax.value_and_grad(functools.partial(loss, layer_rows)))(variables)

  wanted = run(0, variables)
  mesh = sharding.make_mesh(2, 2, 2)
  split = jax.device_put(variables, sharding.layout(jax.eval_shape(model.init, jax.random.key(0), tokens), mesh))
  with jax.set_mesh(mesh):
    on_eight = run(2, split)
  for found in (run(4, variables), on_eight):
    jax.tree.map(lambda a, b: close(a, b, 1e-5), found, wanted)

  programs = [jax.make_jaxpr(jax.grad(functools.partial(loss, layer_rows)))(variables) for layer_rows in (0, 4)]
  assert costs.count_flops(programs[0]) == costs.count_flops(programs[1])
  hidden = [
    {shape for shape in arrays_of(program) if shape[-1:] == (24,) and shape[1:2] == (6,)} for program in programs
  ]
  assert hidden == [{(16, 6, 24)}, {(4, 6, 24)}]  # of the feed-forward


@pytest.mark.parametrize(
  ("num_rows", "layer_rows", "num_chunks"), [(32, 0, 1), (32, 4, 8), (6, 4, 2), (5, 4, 5), (3, 4, 1)]
)
def test_chunks_are_equal_and_no_larger_than_asked_for(num_rows, layer_rows, num_chunks):
  assert count_chunks(num_rows, layer_rows) == num_chunks


def test_rows_that_devices_do_not_share_evenly_are_one_chunk():
  model, variables = tiny(num_layers=2)
  with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
    assert [count_chunks(n, 1) for n in (3, 10, 12)] == [1, 1, 3]
    own = Transformer(dataclasses.replace(model.config, layer_rows=1))
    found = jax.jit(lambda variables: own.apply(variables, rows(7, 10, 6)))(variables)
  close(found, model.apply(variables, rows(7, 10, 6)), 1e-5)


def test_groups_of_rows_share_the_weights_that_were_gathered():
  """Over fsdp 4, in two chunks: each layer's weights once forward and once back, and nothing that has all rows."""
  model, _ = tiny(remat="full", num_layers=5, layer_rows=2, lora=LoraConfig(4, 4.0, 0.0, ("q_proj", "up_proj")))
  tokens, mesh = rows(8, 16, 6), sharding.make_mesh(1, 4, 1, devices=jax.devices()[:4])
  given = {name: policy.abstract_collection(model, mesh, name) for name in ("params", "lora")}

  def loss(lora, params):
    return model.apply({"params": params, "lora": lora}, tokens, method="hidden")[0].sum()

  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss)).lower(given["lora"], given["params"]).compile()
  gathered = [found for found in costs.count_collectives(program.as_text()) if found.kind == "all-gather"]
  assert {found.trips for found in gathered} == {model.config.num_layers}
  ffn = [found for found in gathered if found.shapes[0][-2:] == (TINY.mlp_hidden_size, TINY.d_model)]
  assert len(ffn) == 2
  assert not any(6 in shape for found in gathered for shape in found.shapes)


@pytest.mark.parametrize("layer_rows", [0, 2])
def test_tensor_parallel_devices_share_the_width_of_what_layers_keep(layer_rows):
  """Over fsdp 2 and tensor 2, the stream that is kept for the way back is halved along rows and along the width."""
  model, _ = tiny(remat="full", num_layers=5, layer_rows=layer_rows, lora=LoraConfig(4, 4.0, 0.0, ("q_proj", "ff_out")))
  tokens, mesh = rows(8, 16, 6), sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
  given = {name: policy.abstract_collection(model, mesh, name) for name in ("params", "lora")}

  def loss(lora, params):
    return model.apply({"params": params, "lora": lora}, tokens, method="hidden")[0].sum()

  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss)).lower(given["lora"], given["params"]).compile().as_text()
  kept = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[(5,8,6,\d+)\]", program)}
  assert kept == {(5, 8, 6, TINY.d_model // 2)}
  gathered = [c for c in costs.count_collectives(program) if c.kind == "all-gather"]
  of_stream = sum(c.size * c.trips for c in gathered if c.shapes[0][-2:] == (6, TINY.d_model))
  assert of_stream == 5 * 4 * (8 * 6 * TINY.d_model * 4)  # of each layer: after its norms, forward and back
  assert sum(c.size * c.trips for c in gathered) < 2.5 * of_stream  # with the weights


def test_layers_are_stacked():
  _, variables = tiny()
  blocks = variables["params"]["blocks"]
  assert {leaf.shape[0] for leaf in jax.tree.leaves(blocks)} == {TINY.num_layers}
  assert blocks["k_proj"]["kernel"].shape == (TINY.num_layers, TINY.d_model, TINY.num_kv_heads * TINY.head_dim)
  boxed = jax.eval_shape(Transformer(TINY).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
  assert boxed["blocks"]["ff_out"]["kernel"].names == ("layers", "ffn", "embed")
  assert boxed["embedding"].names == ("vocab", "embed")


def test_one_and_eight_devices_agree():
  model, variables = tiny(**OPTIONS)
  tokens, is_valid = rows(4, 8, 6), jnp.arange(6) >= jnp.arange(8)[:, None] % 3
  wanted_logits = compiled(model)(variables, tokens, is_valid=is_valid)
  wanted_gradient = gradient(model, variables, tokens, is_valid=is_valid)
  mesh = sharding.make_mesh(2, 2, 2)
  boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  split = jax.device_put(variables, sharding.layout(boxed, mesh))
  kernel = split["params"]["blocks"]["up_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4  # over fsdp and tensor
  with jax.set_mesh(mesh):
    logits = jax.jit(lambda variables, tokens: model.apply(variables, tokens, is_valid=is_valid))(split, tokens)
    assert logits.sharding.spec[0] == ("data", "fsdp")
    close(logits, wanted_logits, 1e-5)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), gradient(model, split, tokens, is_valid=is_valid), wanted_gradient)


def test_parameters_are_made_where_they_live():
  model, variables = tiny()
  mesh = sharding.make_mesh(2, 2, 2)

  def init(key):
    return model.init(key, jnp.zeros((1, 1), jnp.int32))

  where = sharding.layout(jax.eval_shape(init, jax.random.key(0)), mesh)
  with jax.set_mesh(mesh):
    made = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=where)(jax.random.key(0))
  assert jax.tree.structure(made) == jax.tree.structure(variables)
  params = made["params"]
  assert params["head"].sharding.spec == PartitionSpec(("fsdp",), ("tensor",))
  for array, std in [
    (params["embedding"], TINY.d_model**-0.5),
    (params["head"], TINY.d_model**-0.5),
    (params["blocks"]["up_proj"]["kernel"], TINY.d_model**-0.5),
    (params["blocks"]["ff_out"]["kernel"], (2 * TINY.num_layers * TINY.mlp_hidden_size) ** -0.5),
  ]:
    assert abs(float(array.std()) / std - 1) < 0.15
  kernel = params["blocks"]["q_proj"]["kernel"]
  assert not np.allclose(kernel[0], kernel[1])


def test_unused_rows_of_the_table_have_logits():
  model, variables = tiny()
  assert compiled(model)(variables, rows(5, 1, 4)).shape == (1, 4, TINY.embedding_size)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_heads": 6, "head_dim": 0}, "model.d_model=16"),
    ({"head_dim": 3}, "model.head_dim=3"),
    ({"rotary_fraction": 0.25}, "model.rotary_fraction=0.25: .* an even part of model.head_dim=4"),
    ({"rope_scaling": (2.0, 4.0, 1.0, 8.0)}, r"model.rope_scaling=\(2.0, 4.0, .* a larger high frequency factor"),
    ({"num_kv_heads": 3}, "model.num_kv_heads=3"),
    ({"embedding_size": 20}, "model.embedding_size=20"),
    ({"mask_token_id": 29}, "model.mask_token_id=29"),
    ({"remat": "dot"}, "model.remat='dot': must be one of none, products, dots, attention, full"),
    ({"dtype": "float16"}, "model.dtype='float16'"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **changes)
