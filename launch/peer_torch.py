"""LLaDA's decoding in plain PyTorch, as it is published, on transformers' Llama: what the benchmark compares with."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dmpo_jax.models.llada import ModelConfig
from dmpo_jax.samplers import Plan

try:
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as missing:
  raise ValueError(f"--peer=torch: {missing}; pip install -r requirements-torch.txt") from missing

# names of ours -> names of transformers' Llama, whose kernels are [out, in]
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


def make_program(
  config: ModelConfig, params: Mapping[str, Any], prompt: np.ndarray, plan: Plan
) -> Callable[[], np.ndarray]:
  """Load our weights into the peer; the program decodes greedily and gives the completions [b, c]."""
  model = make_model(config, params)
  tokens = torch.from_numpy(prompt).long()
  return lambda: decode(model, tokens, plan, config.mask_token_id).numpy()


def make_model(config: ModelConfig, params: Mapping[str, Any]) -> "LlamaForCausalLM":
  """Build transformers' Llama with our weights."""
  model = LlamaForCausalLM(
    LlamaConfig(
      vocab_size=config.embedding_size,
      hidden_size=config.d_model,
      intermediate_size=config.mlp_hidden_size,
      num_hidden_layers=config.num_layers,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      rms_norm_eps=config.rms_norm_eps,
      rope_theta=config.rope_theta,
      use_cache=False,
      attn_implementation="sdpa",
    )
  )

  def tensor(array: Any) -> "torch.Tensor":
    return torch.from_numpy(np.array(array, np.float32))

  state = {
    "model.embed_tokens.weight": tensor(params["embedding"]),
    "model.norm.weight": tensor(params["final_norm"]["scale"]),
    "lm_head.weight": tensor(params["head"]).T,
  }
  for layer in range(config.num_layers):
    for ours, theirs in LAYER.items():
      (array,) = params["blocks"][ours].values()
      state[f"model.layers.{layer}.{theirs}.weight"] = (
        tensor(array[layer]).T if array.ndim == 3 else tensor(array[layer])
      )
  model.load_state_dict(state)
  return model.to(getattr(torch, config.dtype)).eval()


@torch.no_grad()
def decode(model: "LlamaForCausalLM", prompt: "torch.Tensor", plan: Plan, mask_token_id: int) -> "torch.Tensor":
  """Decode block by block, the most confident tokens first, as many a call as the schedule says (arXiv 2502.09992).

  As in the published code every call runs whole rows, with logits and a softmax for all their positions.
  """
  b, q = prompt.shape
  length, size, steps = plan.completion_length, plan.block_length, plan.steps_per_block
  rows = torch.cat([prompt, torch.full((b, length), mask_token_id)], dim=1)
  everywhere = torch.zeros(b, 1, q + length, q + length, dtype=model.dtype)  # added to the scores: not causal
  for start in range(q, q + length, size):
    counts = [size // steps + (step < size % steps) for step in range(steps)]
    for count in counts:
      logits = model(rows, attention_mask=everywhere).logits
      is_masked = rows == mask_token_id
      is_masked[:, start + size :] = False
      chosen = logits.argmax(-1)
      confidence = torch.softmax(logits, dim=-1).gather(-1, chosen[..., None])[..., 0]
      confidence = torch.where(is_masked, confidence, -torch.inf)
      for row in range(b):
        best = torch.topk(confidence[row], count).indices
        rows[row, best] = chosen[row, best]
  return rows[:, q:]
