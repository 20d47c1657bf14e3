"""The published LLaDA, its sampler and DMPO in plain PyTorch, for comparison in the benchmark.

It uses transformers' Llama with attention in both directions and PEFT's adapters, and computes the logits of all
positions over the whole vocabulary, as the published trainer does.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dmpo_jax.models.config import ModelConfig
from dmpo_jax.models.lora import LoraConfig
from launch.bench import workload

os.environ.setdefault("USE_TF", "0")  # otherwise transformers imports TensorFlow if it is installed
try:
  import peft  # pyright: ignore[reportMissingImports]  # optional
  import torch  # pyright: ignore[reportMissingImports]
  from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
except ImportError as missing:
  raise ValueError(f"--peer=torch: {missing}; pip install -r requirements-torch.txt") from missing

# our names -> names in transformers' Llama, whose kernels are [out, in]
LAYER = {
  "attn_norm": "input_layernorm",
  "q_proj": "self_attn.q_proj",
  "k_proj": "self_attn.k_proj",
  "v_proj": "self_attn.v_proj",
  "attn_out": "self_attn.o_proj",
  "ff_norm": "post_attention_layernorm",
  "ff_proj": "mlp.gate_proj",
  "up_proj": "mlp.up_proj",
  "ff_out": "mlp.down_proj",
}


def tensor(array: Any) -> torch.Tensor:
  """Copy an array; floating-point numbers become float32, integers int64."""
  array = np.asarray(array)
  if array.dtype == bool:
    return torch.tensor(array)
  return torch.tensor(array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float32))


class Peer:
  """The workload's model and buffer in PyTorch.

  Args:
    is_checkpointing: recompute layers in the backward pass; off in the published configuration.
  """

  layer_names: Mapping[str, str] = LAYER

  def __init__(self, work: workload.Workload, *, is_checkpointing: bool = False):
    self.config, own = work.config, work.model.config
    self.mask_token_id = own.mask_token_id
    self.model = self.make_model(own, work.policies.frozen)
    if own.lora is not None:
      self.model = self._adapt(own.lora, work.policies.trainable)
    self._module = self.model.get_base_model() if own.lora is not None else self.model
    if is_checkpointing:
      self._module.gradient_checkpointing_enable({"use_reentrant": False})
    experience = work.experience
    self.group_size = work.config.rollout.group_size
    q, c = work.config.task.max_prompt_length, work.config.sampler.completion_length
    self.prompt = tensor(experience.prompts.tokens).repeat_interleave(self.group_size, 0)  # [b, q]
    self.completion = tensor(experience.completion).reshape(-1, c)  # [b, c]
    self.weight, self.negative_weight = (
      tensor(array).reshape(-1) for array in (experience.weight, experience.negative_weight)
    )
    self.q, self.c, self.trained = q, c, [p for p in self.model.parameters() if p.requires_grad]
    optim = work.config.optim
    self.optimizer = torch.optim.AdamW(
      self.trained, lr=optim.learning_rate, betas=(optim.b1, optim.b2), weight_decay=optim.weight_decay
    )

  def make_model(self, config: ModelConfig, params: Mapping[str, Any]) -> torch.nn.Module:
    """Build transformers' Llama with our weights."""
    model = LlamaForCausalLM(
      LlamaConfig(
        vocab_size=config.embedding_size,
        hidden_size=config.d_model,
        intermediate_size=config.mlp_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,  # pyright: ignore[reportCallIssue]  # taken as **kwargs by new versions
        use_cache=False,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
      )
    )
    named = {
      "model.embed_tokens.weight": params["embedding"],
      "model.norm.weight": params["final_norm"]["scale"],
      "lm_head.weight": np.asarray(params["head"]).T,
    }
    for layer in range(config.num_layers):
      for ours, theirs in LAYER.items():
        (array,) = params["blocks"][ours].values()
        named[f"model.layers.{layer}.{theirs}.weight"] = np.asarray(array)[layer].T  # a norm's scale has one axis
    model.load_state_dict({name: tensor(array) for name, array in named.items()})
    return model.to(getattr(torch, config.dtype))

  def _adapt(self, lora: LoraConfig, adapters: Mapping[str, Any]) -> torch.nn.Module:
    """Wrap the model in PEFT's adapters, with our values."""
    names = "|".join(re.escape(self.layer_names[name]) for name in lora.targets)
    wrapped = peft.get_peft_model(
      self.model,
      peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=rf".*\.\d+\.({names})"
      ),
    )
    with torch.no_grad():
      for name, module, layer in self._adapted(wrapped, lora):
        own = adapters["blocks"][name]
        module.lora_A["default"].weight.copy_(tensor(own["A"][layer]).T)
        module.lora_B["default"].weight.copy_(tensor(own["B"][layer]).T)
    return wrapped

  def _adapted(self, wrapped: torch.nn.Module, lora: LoraConfig) -> Iterator[tuple[str, torch.nn.Module, int]]:
    modules = dict(wrapped.named_modules())
    for layer in range(self.config.model.num_layers):
      for name in lora.targets:
        (found,) = (key for key in modules if key.endswith(f".{layer}.{self.layer_names[name]}"))
        yield name, modules[found], layer

  def logits(self, rows: torch.Tensor, **keywords: Any) -> torch.Tensor:
    """Run the model with every position attending to all others."""
    everywhere = torch.zeros(1, 1, 1, 1, dtype=self._module.dtype)
    seen = rows.shape[1] + (keywords["past_key_values"].get_seq_length() if "past_key_values" in keywords else 0)
    mask = everywhere.expand(len(rows), 1, rows.shape[1], seen)  # added to the scores
    return self.model(rows, attention_mask=mask, **keywords).logits

  # the gradient step

  def update(self, is_masked: np.ndarray | None = None) -> tuple[float, float, dict[str, Any]]:
    """Take one step; return its loss, the gradient's norm, and the gradient as it was clipped, named as ours."""
    self.model.train()
    self.optimizer.zero_grad()
    loss = self.loss(None if is_masked is None else self._rows(is_masked))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm)
    self.optimizer.step()
    return float(loss.detach()), float(norm), self._gradient()

  def loss(self, is_masked: torch.Tensor | None) -> torch.Tensor:
    """Compute the weighted denoising cross-entropy (DMPO, arXiv 2510.08233), under these masks or random ones."""
    own = self.config.objective
    mask_samples = own.num_mask_samples
    rows = torch.cat([self.prompt, self.completion], dim=1).repeat(mask_samples, 1)
    is_hidden, num_masked = self._hide(rows, mask_samples, is_masked)
    logits = self.logits(torch.where(is_hidden, self.mask_token_id, rows))
    losses = _cross_entropy(logits, rows, is_hidden)
    coefficient = (self.weight - own.wdce.baseline_strength * self.negative_weight).repeat(mask_samples)
    return (losses.sum(-1) / num_masked * coefficient).sum() / mask_samples / self.config.rollout.num_prompts

  def _rows(self, is_masked: np.ndarray) -> torch.Tensor:
    """Order our masks [p, g, r, c] as the published code orders its rows: mask sample by mask sample."""
    return torch.tensor(np.moveaxis(is_masked, 2, 0).reshape(-1, self.c))

  def _hide(
    self, rows: torch.Tensor, mask_samples: int, is_masked: torch.Tensor | None
  ) -> tuple[torch.Tensor, torch.Tensor]:
    """Mark and count the masked positions, in antithetic pairs."""
    if is_masked is None:
      own = self.config.objective
      half = len(rows) // 2
      ratio = own.min_mask_ratio + (own.max_mask_ratio - own.min_mask_ratio) * torch.rand(half, 1)
      first = torch.rand(half, self.c) < ratio
      is_masked = torch.cat([first, ~first])
    assert is_masked is not None
    is_hidden = torch.zeros(rows.shape, dtype=torch.bool)
    is_hidden[:, self.q :] = is_masked
    return is_hidden, is_masked.sum(-1).clamp(min=1)

  def _gradient(self) -> dict[str, Any]:
    lora = self._lora()
    if lora is None:
      raise ValueError("the benchmark compares gradients of adapters alone: set model.lora.rank")
    found: dict[str, dict[str, list]] = {name: {"A": [], "B": []} for name in lora.targets}
    for name, module, _ in self._adapted(self.model, lora):
      for part in ("A", "B"):
        found[name][part].append(getattr(module, f"lora_{part}")["default"].weight.grad.numpy().T.copy())
    return {"blocks": {name: {part: np.stack(arrays) for part, arrays in own.items()} for name, own in found.items()}}

  def _lora(self) -> LoraConfig | None:
    own = self.config.model.lora
    return LoraConfig(own.rank, own.alpha, own.dropout, tuple(own.targets)) if own.rank else None

  # log-probs of the rollouts

  @torch.no_grad()
  def elbo(self, is_masked: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Estimate log p of the completions under the policy and under the reference, on the same masks, [b] each."""
    self.model.eval()
    mask_samples = self.config.objective.num_elbo_samples
    rows = torch.cat([self.prompt, self.completion], dim=1).repeat(mask_samples, 1)
    is_hidden, num_masked = self._hide(rows, mask_samples, None if is_masked is None else self._rows(is_masked))
    noised, found = torch.where(is_hidden, self.mask_token_id, rows), []
    logits_old = self.logits(noised)
    with self.model.disable_adapter():
      logits_ref = self.logits(noised)  # as published, both in memory at once
    for logits in (logits_old, logits_ref):
      bound = (self.c / num_masked)[:, None] * -_cross_entropy(logits, rows, is_hidden)
      found.append(bound.view(mask_samples, len(self.prompt), -1).mean(0).sum(-1).numpy())
    return found[0], found[1]

  # rollouts, and the whole iteration

  def iterate(self, reward: Callable[[np.ndarray], np.ndarray]) -> None:
    """Sample a buffer, weigh it by `reward` (completions [b, c] -> [b]) and log-probs, and do its updates."""
    config = self.config
    self.completion = self.decode(config.sampler.temperature)
    rewards = tensor(reward(self.completion.numpy())) / config.objective.alpha
    log_p_old, log_p_ref = map(tensor, self.elbo())

    def weigh(exponent: torch.Tensor) -> torch.Tensor:
      return torch.softmax(exponent.view(-1, self.group_size), dim=-1).flatten()

    self.weight = weigh(log_p_ref - log_p_old + rewards)
    self.negative_weight = weigh(log_p_ref - log_p_old - rewards)
    for _ in range(config.train.updates_per_buffer):
      self.update()

  @torch.no_grad()
  def decode(self, temperature: float) -> torch.Tensor:
    """Decode the completions [b, c] in the scheduled number of calls, the most confident tokens first.

    After the first call of a block, what precedes the block is cached (`prefix_cache`, arXiv 2505.22618).
    """
    self.model.eval()
    rows, size = self._masked_rows(), self.config.sampler.block_length
    for start in range(self.q, self.q + self.c, size):
      first, *others = self._counts()
      cache = DynamicCache()
      logits = self.logits(rows, past_key_values=cache, use_cache=True)
      self._commit(rows, logits, 0, start + size, first, temperature)
      for count in others:
        cache.crop(start)
        logits = self.logits(rows[:, start:], past_key_values=cache, use_cache=True)
        self._commit(rows, logits, start, start + size, count, temperature)
    return rows[:, self.q :]

  def _masked_rows(self) -> torch.Tensor:
    return torch.cat([self.prompt, torch.full((len(self.prompt), self.c), self.mask_token_id)], dim=1)

  def _counts(self) -> list[int]:
    own = self.config.sampler
    steps, size = own.steps * own.block_length // own.completion_length, own.block_length
    return [size // steps + (step < size % steps) for step in range(steps)]

  def _commit(
    self,
    rows: torch.Tensor,
    logits: torch.Tensor,
    first: int,
    end: int,
    count: int,
    temperature: float,
  ) -> None:
    """Fill the `count` most confident masked positions of each row before `end`; logits start at position `first`.

    As published: noise and softmax in float64 at all positions over the whole vocabulary, then row by row.
    """
    seen, noisy = rows[:, first:], logits
    if temperature > 0:
      uniform = torch.rand_like(logits, dtype=torch.float64)
      noisy = logits.double() - temperature * torch.log(-torch.log(uniform + 1e-10) + 1e-10)
    chosen = noisy.argmax(-1)
    confidence = torch.softmax(logits.double(), dim=-1).gather(-1, chosen[..., None])[..., 0]
    is_open = seen == self.mask_token_id
    is_open[:, end - first :] = False
    confidence = torch.where(is_open, confidence, -torch.inf)
    for row in range(len(rows)):
      best = torch.topk(confidence[row], count).indices
      seen[row, best] = chosen[row, best]


def _cross_entropy(logits: torch.Tensor, rows: torch.Tensor, is_hidden: torch.Tensor) -> torch.Tensor:
  """Return -log p of every hidden token and 0 elsewhere; softmax in float32 at every position."""
  losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows.flatten(), reduction="none")
  return losses.view(rows.shape).masked_fill(~is_hidden, 0)
