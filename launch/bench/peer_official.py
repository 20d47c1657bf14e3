"""The official PyTorch code of DMPO from a checkout: its model, functions of its trainer, and its sampler.

The checkout is that of github.com/yuchen-zhu-zyc/DMPO, unchanged. Packages that its trainer imports but that are not
installed (trl, datasets, wandb, pandas) are replaced by empty stand-ins; no function used here needs them.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import operator
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np

from dmpo_jax.hub.layout import checkpoint_places, to_tensors
from dmpo_jax.hub.model_config import model_config_to_hf
from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.lora import TARGETS
from launch.bench import workload

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # it would only compile one call of PyTorch's attention

from launch.bench.peer_torch import Peer, tensor, torch

ABSENT = ("trl", "datasets", "wandb", "pandas")
FILES = ("DMPO/dmpo_trainer.py", "fast_samplers/fast_dllm/modeling_llada.py", "fast_samplers/fast_dllm/generate.py")


class OfficialPeer(Peer):
  """The official code on a workload."""

  layer_names = types.MappingProxyType({name: name for name in TARGETS})

  def __init__(self, work: workload.Workload, checkout: str, **keywords: Any):
    own = work.config.objective
    if (own.min_mask_ratio, own.max_mask_ratio, own.antithetic) != (0.1, 1.0, True):
      raise ValueError("--official: its masks are antithetic with ratios in [0.1, 1]: set config.objective so")
    if keywords.pop("is_checkpointing", False):
      raise ValueError("--official: its model does not support gradient checkpointing")
    self._modeling, self._trainer, self._generate = load(checkout)
    super().__init__(work, **keywords)

  def make_model(self, config: ModelConfig, params: Mapping[str, Any]) -> torch.nn.Module:
    """Build the official LLaDA with our weights."""
    fields = model_config_to_hf(config, "llada")
    own = self._modeling.LLaDAConfig(**{key: value for key, value in fields.items() if key != "architectures"})
    model = self._modeling.LLaDAModelLM(own, init_params=True)

    def read(path: tuple[str, ...]) -> np.ndarray:
      return np.asarray(functools.reduce(operator.getitem, path, params))

    tensors = to_tensors(read, checkpoint_places(config, "llada"))
    model.load_state_dict({name: tensor(array) for name, array in tensors})
    return model.to(getattr(torch, config.dtype))

  def loss(self, is_masked: torch.Tensor | None) -> torch.Tensor:
    """Compute the loss of the official trainer, with the mean instead of the sum over prompts."""
    inputs = {
      "prompt_ids": self.prompt,
      "completion_ids": self.completion,
      "completion_mask": torch.ones_like(self.completion, dtype=torch.int),
      "advantages": self.weight,
      "negative_advantages": self.negative_weight,
      "log_prob_cur": torch.zeros(len(self.prompt)),
      "coeff": torch.ones(1),
    }
    with self._given(is_masked):
      return self._method("compute_loss")(self.model, inputs) / self.config.rollout.num_prompts

  @torch.no_grad()
  def elbo(self, is_masked: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Compute the log-probs of the rollouts by the official trainer."""
    self.model.eval()
    completion_mask = torch.ones_like(self.completion, dtype=torch.int)
    mask_samples = self.config.objective.num_elbo_samples
    with self._given(None if is_masked is None else self._rows(is_masked)):
      found = self._method("compute_log_prob_elbo")(
        self.model, self.prompt, self.completion, completion_mask, mask_samples
      )
    log_p_ref, log_p_old = (scores.sum(-1).numpy() for scores in found)
    return log_p_old, log_p_ref

  @torch.no_grad()
  def decode(self, temperature: float) -> torch.Tensor:
    """Decode by the official sampler."""
    self.model.eval()
    own = self.config.sampler
    rows = self._generate.generate_with_prefix_cache(
      self.model,
      self.prompt,
      steps=own.steps,
      gen_length=own.completion_length,
      block_length=own.block_length,
      temperature=temperature,
      mask_id=self.mask_token_id,
    )
    return rows[:, self.q :]

  def _method(self, name: str) -> Callable[..., Any]:
    """Bind a method of the official trainer to the attributes that it reads, without initialising a trainer."""
    own = self.config.objective
    trainer: Any = object.__new__(self._trainer)
    trainer.accelerator = types.SimpleNamespace(unwrap_model=lambda model: model)
    trainer.args = types.SimpleNamespace(
      mask_id=self.mask_token_id,
      num_replicates=own.num_mask_samples,
      loss="wdce",
      loss_antithetic=True,
      loss_mask_prob_clamp=True,
      loss_mask_non_eos=False,
      advantage_centering=own.wdce.baseline != "none",
      advantage_centering_unbias=own.wdce.baseline == "model",
      advantage_centering_neg=own.wdce.baseline == "negative",
      centering_strength=own.wdce.baseline_strength,
    )
    return getattr(trainer, name)

  @contextlib.contextmanager
  def _given(self, is_masked: torch.Tensor | None) -> Iterator[None]:
    """Make the two draws of the trainer result in these masks: first the ratios, then one number per position."""
    if is_masked is None:
      yield
      return
    half = is_masked[: len(is_masked) // 2]
    draws = iter([torch.full((len(half),), 0.5), torch.where(half, 0.0, 1.0)])
    with mock.patch.object(torch, "rand", side_effect=lambda *shape, **keywords: next(draws)):
      yield


def load(checkout: str) -> tuple[types.ModuleType, type, types.ModuleType]:
  """Import the official model, trainer and samplers.

  Raises:
    ValueError: files are missing or cannot be imported.
  """
  folder = pathlib.Path(checkout).expanduser().resolve()
  missing = [name for name in FILES if not (folder / name).is_file()]
  if missing:
    raise ValueError(f"--official={checkout}: no {missing[0]} there; give a checkout of the official DMPO repository")
  for path in (folder, folder / "DMPO"):
    if str(path) not in sys.path:
      sys.path.insert(0, str(path))
  absent = [name for name in ABSENT if name not in sys.modules and importlib.util.find_spec(name) is None]
  sys.meta_path.append(_StandIns(absent))
  try:
    modeling = importlib.import_module("fast_samplers.fast_dllm.modeling_llada")
    generate = importlib.import_module("fast_samplers.fast_dllm.generate")
    trainer = importlib.import_module("dmpo_trainer").DMPOTrainer
  except ImportError as error:
    raise ValueError(f"--official={checkout}: it cannot be imported ({error})") from error
  return modeling, trainer, generate


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Imports stand-ins of packages that are not installed: every name in them is an empty class."""

  def __init__(self, roots: list[str]):
    self._roots = roots

  def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
    if name.split(".")[0] not in self._roots:
      return None
    return importlib.machinery.ModuleSpec(name, self, is_package=True)

  def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
    return _StandIn(spec.name)

  def exec_module(self, module: types.ModuleType) -> None:
    pass


class _StandIn(types.ModuleType):
  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):
      raise AttributeError(name)
    if name.endswith("decorator"):
      return lambda function: function
    return type(name, (), {})
