"""The section `iteration`: rollouts, rewards, log-probs under both policies, and the updates of one buffer."""

import dataclasses
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dmpo_jax import build, data, phases, tasks
from dmpo_jax.grading import Grading
from dmpo_jax.messages import Turn
from dmpo_jax.structs import TrainState
from dmpo_jax.tasks.base import GeneratedTask
from dmpo_jax.tasks.judge import judge
from launch.bench import peers, programs, timing, workload
from launch.bench.results import Options, Result, compare


class Numbers:
  """A tokenizer for random weights: a text is the ids of its tokens, and all prompts have the same length."""

  def __init__(self, work: workload.Workload):
    self._length = work.config.task.max_prompt_length
    own = work.model.config
    self.vocab_size = own.vocab_size
    self.bos_token_id: int | None = None
    self.pad_token_id, self.mask_token_id = own.pad_token_id, own.mask_token_id
    self.eos_token_id = self.eot_token_id = own.eos_token_id
    self.end_token_ids = (own.eos_token_id,)
    self._ordinary = workload.ordinary_ids(own)

  def encode(self, text: str) -> list[int]:
    """Return ids that depend only on the text."""
    drawn = np.random.default_rng(list(text.encode())).choice(self._ordinary, self._length)
    return drawn.tolist()

  def encode_prompt(self, prompt: str | Sequence[Turn], prefill: str = "") -> list[int]:
    """Return as many ids as a prompt may have."""
    return self.encode(str(prompt) + prefill)

  def encode_answer(self, prompt: str | Sequence[Turn], answer: str, prefill: str = "") -> list[int]:
    """Return ids that depend only on the answer."""
    return self.encode(answer)

  def lacking(self, text: str) -> str:
    """Return no character: every character has a token."""
    return ""

  def decode(self, ids: Sequence[int]) -> str:
    """Return the ids before the first EOS as text."""
    ids = list(ids)
    end = ids.index(self.eos_token_id) if self.eos_token_id in ids else len(ids)
    return " ".join(map(str, ids[:end]))

  def piece(self, token_id: int) -> str:
    """Return one id as text."""
    return str(token_id)


def run(config: ConfigDict, options: Options) -> Result:
  """Measure iterations; the sections sample, score and update compare the numbers of their parts."""
  ours: dict[str, timing.Maker] = {"ours": (make_ours, (config,))}
  others = options.peers(make_peer, config)
  amount = config.rollout.num_prompts * config.rollout.group_size * config.sampler.completion_length
  return compare("iteration", config, options, ours, others, amount=amount, tolerances={})


def make_ours(config: ConfigDict) -> timing.Contender:
  """Build the phase of training; a turn collects a buffer and updates the policy from it."""
  work = workload.make(config, sharpness=workload.SHARPNESS)
  phase, state = _phase(work)
  buffer = 0

  def turn() -> None:
    nonlocal state, buffer
    with jax.set_mesh(work.mesh):
      state, buffer = _iterate(phase, state, buffer, config.train.updates_per_buffer), buffer + 1

  turn()  # compiles everything, so that compilation does not count as memory of an iteration
  names = ("sample", "score", "accumulate")
  flops = sum(programs.calls_of(name, config) * workload.count_flops(name, config) for name in names)
  return timing.Contender(turn, facts={"flops": flops})


def _iterate(phase: phases.Phase, state: TrainState, buffer: int, num_updates: int) -> TrainState:
  experience, _ = phase.buffers.complete(state, buffer, phase.buffers.generate(state, buffer))
  for _ in range(num_updates):
    state, metrics = phase.update(state, phase.frozen, experience)
    jax.device_get(metrics)  # as training does, for its log
  return state


def _phase(work: workload.Workload) -> tuple[phases.Phase, TrainState]:
  config, tokenizer = work.config, Numbers(work)
  spec = tasks.spec(config.task.to_dict())
  task = tasks.make_task(**spec)
  assert isinstance(task, GeneratedTask)
  records = list(task.generate("train", 16, config.seed))
  limits = dict(max_prompt_length=config.task.max_prompt_length, overlong="error")
  prompts = data.PromptStream(records, task, tokenizer, seed=config.seed, **limits)
  parts = build.Parts(
    mesh=work.mesh,
    rollout_mesh=work.meshes[1],
    tokenizer=tokenizer,
    model=work.model,
    task=task,
    grading=Grading(spec, **config.grading),
    prompts=prompts,
    correct_demonstrations=None,
    held_out=prompts.batch(0, 1),
  )
  workdir = epath.Path(tempfile.mkdtemp())
  phase, state = phases.training_phase(config, workdir, parts, work.policies.frozen)
  # Not at step 0, at which the policy is its own reference and is not scored.
  trained = workload.as_trained(work.policies.trainable)
  return phase, dataclasses.replace(state, trainable=trained, step=state.step + config.train.updates_per_buffer)


def make_peer(config: ConfigDict, official: str) -> timing.Contender:
  """Build the same iteration in PyTorch; our code grades its rewards too."""
  if config.sampler.name != "prefix_cache":
    raise ValueError(f"--peer: sampler.name={config.sampler.name!r}: the peer has only prefix_cache")
  work = workload.make(config, sharpness=workload.SHARPNESS)
  peer, tokenizer = peers.make(work, official), Numbers(work)
  task = tasks.make_task(**tasks.spec(config.task.to_dict()))
  assert isinstance(task, GeneratedTask)
  record = next(iter(task.generate("train", 1, config.seed)))

  def reward(completion: np.ndarray) -> np.ndarray:
    texts = [tokenizer.decode(row.tolist()) for row in completion]
    return np.array([judge(task, record, text, is_ended=True).reward for text in texts], np.float32)

  def turn() -> None:
    peer.iterate(reward)

  return timing.Contender(turn)
