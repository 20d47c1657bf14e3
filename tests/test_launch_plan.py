"""Planning: LLaDA-8B's gradient step by the real TPU compiler, and the decisions that are made of such figures."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny
from ml_collections import ConfigDict

from configs import llada_8b
from dmpo_jax import sharding
from launch import plan, tpu
from launch.bench import costs, programs

ROOT = pathlib.Path(__file__).resolve().parent.parent
HAS_COMPILER = (pathlib.Path(sys.prefix) / "libtpu").exists() or "TPU_LIBRARY_PATH" in os.environ
CHIP = tpu.CHIPS["TPU v5 lite"]


def plan_8b(out, *options):
  """Plan configs/llada_8b.py with the TPU compiler; return what it writes down and what it prints."""
  if not HAS_COMPILER:
    pytest.skip("the TPU compiler is not installed: make libtpu")
  command = [sys.executable, "-m", "launch.plan", "--config=configs/llada_8b.py", f"--out={out}", *options]
  of_tests = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")  # no product of bfloat16 is "highest"
  environment = {key: value for key, value in os.environ.items() if key not in of_tests}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(out.read_text()), done.stdout


NARROW = [
  f"--config.{path}={size}"
  for path, size in {
    "model.d_model": 256,
    "model.num_heads": 2,  # of 128, as the kernel asks
    "model.num_kv_heads": 2,
    "model.num_layers": 2,
    "model.mlp_hidden_size": 256,
    "model.vocab_size": 16384,
    "model.embedding_size": 16384,
    "model.lora.rank": 4,
    "sampler.completion_length": 64,
    "sampler.steps": 4,
    "rollout.chunk_prompts": 0,
    "sharding.rollout.data": 0,  # the samplers' mesh is that of the updates
    "sharding.rollout.fsdp": 0,
    "sharding.rollout.tensor": 0,
  }.items()
]


@pytest.mark.slow
def test_rows_that_chips_do_not_divide_compile_for_them(tmp_path):
  """Three rollouts, and twice as many rows of scores, on four chips: with the kernel, and nothing gathered for it."""
  options = ["--config.rollout.num_prompts=1", "--config.rollout.group_size=3", "--config.objective.num_mask_samples=2"]
  options += ["--config.train.microbatch_prompts=0", "--programs=sample,score,accumulate"]
  found, _ = plan_8b(tmp_path / "plan.json", "--topology=v5e:2x2", *NARROW, *options)
  assert found["attention"] == "splash"
  assert found["programs"].keys() == {"sample", "score", "accumulate"}
  for cost in found["programs"].values():
    assert not cost["is_refused"]
    assert cost["vocabulary"] == []


@pytest.mark.slow
def test_two_slices_exchange_gradients_alone(tmp_path):
  """Weights are gathered inside a slice of four chips; two slices sum up gradients of adapters, and metrics."""
  options = ["--topology=v5e:2x2", "--slices=2", "--programs=accumulate", "--config.rollout.num_prompts=2"]
  options += [
    "--config.rollout.group_size=4",
    "--config.train.microbatch_prompts=0",
    "--config.objective.num_mask_samples=2",
  ]
  found, shown = plan_8b(tmp_path / "plan.json", *NARROW, *options)
  assert found["topology"] == "2 x v5e:2x2"
  assert found["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  assert "mesh data 2 fsdp 4 (16 requested) tensor 1" in shown
  cost = found["programs"]["accumulate"]
  adapters = 2 * 4 * (4 * 2 * 256) * 4  # bytes: 2 layers' 4 targets of 256 x 4 and 4 x 256 numbers in float32
  assert adapters / 4 <= cost["collectives"]["between slices"]["bytes"] < adapters  # each chip its part of them


@pytest.mark.slow
def test_an_8b_gradient_step_on_sixteen_chips(tmp_path):
  """2 antithetic pairs a chip: a prompt's 16 rollouts of 4 masks each, 456 positions a row."""
  options = ["--topology=v5e:4x4", "--programs=accumulate"]
  options += ["--config.rollout.num_prompts=1", "--config.train.microbatch_prompts=1"]
  options += ["--config.rollout.chunk_prompts=1", "--config.model.remat=full", "--config.model.layer_rows=4"]
  found, shown = plan_8b(tmp_path / "plan.json", *options)
  cost = found["programs"]["accumulate"]
  assert found["attention"] == "splash"
  assert 0.9 < cost["arguments"] < 1.2  # a sixteenth of 16 GB, and of the adapters and their moments
  assert cost["peak"] < PEAK
  assert cost["vocabulary"] == []
  assert cost["collectives"]["all-gather"]["bytes"] < 40e9  # the weights, twice, and the head once
  tokens, weights = 64 * 456, 7e9
  assert 2.5 * 2 * tokens * weights < cost["flops"] < 5 * 2 * tokens * weights  # forward twice, and back
  assert "accumulate" in shown


PEAK = 2.25  # GiB; what has been seen is 2 % below


def cost(program="accumulate", peak=5.0, **changes):
  made = tpu.Cost(program, 1.0, peak, False, 1e15, {}, [], 2.0, 1.0, 60.0)
  return dataclasses.replace(made, **changes)


def some_slice(count=8):
  return tpu.Slice("v5e:2x4", jax.devices()[:count], CHIP)


def test_a_margin_is_left_free():
  where = some_slice()
  assert where.fits(cost(peak=14.0))
  assert not where.fits(cost(peak=15.0))
  assert not where.fits(cost(peak=1.0, is_refused=True))


def test_the_slower_of_products_and_links_is_the_time():
  config = tiny.config(rollout__chunk_prompts=2, train__microbatch_prompts=2)
  found = {"accumulate": cost(), "sample": cost("sample", seconds_links=3.0)}
  assert found["sample"].seconds == 3.0
  text = plan.describe_iteration(found, config, some_slice())
  assert f"{2 * config.train.updates_per_buffer} x accumulate 2.00 s + 2 x sample 3.00 s" in text
  assert "50% of 197 TFLOP/s" in text
  assert plan.table(list(found.values()), some_slice()).row_count == 2


def cost_of(name, seconds):
  return tpu.Cost(name, 1.0, 1.0, False, 1.0, {}, [], seconds, seconds / 2, 1.0)


def test_a_plan_says_how_often_a_notice_is_looked_for():
  config = tiny.config(rollout__chunk_prompts=2, rollout__group_size=4, eval__batch_size=16)
  found = {name: cost_of(name, seconds) for name, seconds in (("sample", 4.0), ("score", 1.0), ("move", 20.0))}
  said = "a poll for preemption at least every 8.0 s: rollouts 4.0 s, log-probs 1.0 s, evaluation 8.0 s"
  assert plan.describe_polls(found, config) == said
  assert "at least every 25.0 s" in plan.describe_polls(found | {"accumulate": cost_of("accumulate", 25.0)}, config)


@pytest.mark.parametrize(
  ("settings", "chunk_prompts", "chunk_rollouts", "microbatch_prompts", "batch_size"),
  [
    ("256", 2, 0, 2, 32),
    ("256,v5e-16", 2, 0, 2, 32),
    ("256,v6e-16", 8, 0, 8, 128),
    ("256,v5p-8", 1, 0, 4, 16),
    ("128,v5e-64", 32, 0, 8, 256),
    ("512", 1, 8, 4, 8),
    ("512,v5p-8", 1, 4, 2, 4),
    ("256,v5e-1", 1, 2, 1, 2),
  ],
)
def test_a_slice_has_parts_that_take_seconds(settings, chunk_prompts, chunk_rollouts, microbatch_prompts, batch_size):
  config = llada_8b.get_config(settings)
  assert (config.rollout.chunk_prompts, config.rollout.chunk_rollouts) == (chunk_prompts, chunk_rollouts)
  assert config.eval.batch_size == batch_size
  assert config.train.microbatch_prompts == microbatch_prompts
  assert config.sampler.completion_length == int(settings[:3])
  with pytest.raises(ValueError, match="slice 'v9-16': must be a kind"):
    llada_8b.get_config("256,v9-16")


def test_a_plan_has_the_meshes_of_a_run():
  config = llada_8b.get_config()
  mesh, rollout_mesh = sharding.make_meshes(**config.sharding.to_dict())
  assert programs.make_meshes(config, jax.devices()) == (mesh, rollout_mesh)
  assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}
  assert dict(rollout_mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
  config = tiny.config(sharding__fsdp=2, sharding__rollout__tensor=2)
  mesh, rollout_mesh = programs.make_meshes(config, jax.devices())
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
  assert dict(rollout_mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_the_programs_are_traced_as_training_calls_them():
  """For every objective's kind of buffer; on a mesh of eight virtual devices."""
  meshes = sharding.make_meshes(2, 2, 2, rollout=dict(data=4, fsdp=1, tensor=0))
  for objective in ("wdce", "diffu_grpo"):
    config = tiny.config(model__lora__rank=2, objective__name=objective, sampler__steps=4, sharding__rollout__fsdp=1)
    model = programs.make_model(config)
    for name in programs.PROGRAMS:
      assert programs.is_needed(name, config)
      traced = programs.trace(name, config, model, meshes)
      assert costs.count_flops(traced.jaxpr) > 0 or name in ("apply", "move")


def test_full_fine_tuning_is_traced_with_a_float32_state_and_bfloat16_policies():
  config = tiny.config(
    model__dtype="bfloat16",
    model__param_dtype="bfloat16",
    objective__sync_reference_every=2,
    train__microbatch_prompts=2,
  )
  meshes = sharding.make_meshes(2, 2, 2, rollout=dict(data=0, fsdp=0, tensor=0))
  model = programs.make_model(config)
  (gradient, state, frozen, *_), _ = programs.trace("accumulate", config, model, meshes).args_info
  assert jax.tree.map(lambda x: (x.shape, "float32"), state.trainable) == jax.tree.map(
    lambda x: (x.shape, str(x.dtype)), gradient
  )
  (state_of_apply, *_), _ = programs.trace("apply", config, model, meshes).args_info
  assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, state, state_of_apply))
  (policies, *_), _ = programs.trace("sample", config, model, meshes).args_info
  assert {str(x.dtype) for x in jax.tree.leaves((state.trainable, state.opt_state[1][0].mu))} == {"float32"}
  assert {str(x.dtype) for x in jax.tree.leaves(frozen)} == {"bfloat16"}
  for policy in (policies.trainable, policies.reference, state.reference):
    kernel, embedding = policy["blocks"]["q_proj"]["kernel"], policy["embedding"]
    assert (kernel.dtype, policy["head"].dtype, embedding.dtype) == ("bfloat16", "bfloat16", "float32")


def test_scores_that_an_objective_does_not_need_are_left_out():
  assert not programs.is_needed("score", tiny.config(objective__name="wd1"))
  assert not programs.is_needed("move", tiny.config())
  assert programs.is_needed("sample", tiny.config(objective__name="wd1"))
  assert not programs.is_needed("sample", tiny.config(objective__name="denoise"))


def test_a_model_without_a_tokenizer_needs_its_vocabulary():
  config = llada_8b.get_config()
  assert programs.make_model(config).config.vocab_size == 126464
  config = ConfigDict(config.to_dict())
  config.model.vocab_size = config.model.embedding_size = 0
  with pytest.raises(ValueError, match=r"config.model.vocab_size = 0"):
    programs.make_model(config)


@pytest.mark.parametrize(
  "message",
  [
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. Exceeded by 1.5G.",
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.25G) exceeds "
    "available HBM (15.75G).",
  ],
)
def test_the_compilers_refusal_is_read(message):
  assert tpu.refused_memory(message) == 17.25


def test_a_wrong_topology_is_one_message():
  with pytest.raises(ValueError, match="--topology=v5e:4by4"):
    tpu.find_slice("v5e:4by4")


@pytest.mark.skipif(not HAS_COMPILER, reason="the TPU compiler is not installed: make libtpu")
def test_an_axis_may_be_a_part_of_the_torus():
  """16 of 8 x 8 chips, as the shipped configuration asks for: the devices of an axis are neighbours."""
  program = """
from configs import llada_8b
from dmpo_jax import sharding
from launch import tpu
mesh, rollout_mesh = sharding.make_meshes(**llada_8b.get_config().sharding, devices=tpu.find_slice("v6e:8x8").devices)
print(mesh.devices.shape, rollout_mesh.devices.shape)
for group in (*mesh.devices.reshape(-1, 16), *rollout_mesh.devices.reshape(-1, 4)):
  width, height = (max(d.coords[i] for d in group) - min(d.coords[i] for d in group) + 1 for i in (0, 1))
  assert width * height == len(group), group
"""
  environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, "(4, 16, 1) (16, 1, 4)\n"), done.stderr[-3000:]
