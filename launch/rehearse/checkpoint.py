"""A tiny checkpoint in Hugging Face's layout: random weights, a tokenizer, a chat template."""

import copy
import json
import pathlib
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
import tokenizers
from etils import epath
from ml_collections import ConfigDict
from tokenizers import decoders, models, pre_tokenizers, trainers

from dmpo_jax import build, tasks
from dmpo_jax.hub.families import natural_family
from dmpo_jax.hub.layout import checkpoint_places, parts_of, tensor_shape
from dmpo_jax.hub.model_config import model_config_to_hf
from dmpo_jax.hub.shards import write_shards
from dmpo_jax.hub.tokenizer import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE
from dmpo_jax.tasks import user
from dmpo_jax.tasks.base import GeneratedTask, UserTask

SPECIAL = {
  "bos_token": "<|startoftext|>",
  "eos_token": "<|endoftext|>",
  "pad_token": "<|endoftext|>",
  "mask_token": "<|mdm_mask|>",
}
TURN = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEMPLATE = (
  "{% for message in messages %}{{ bos_token if loop.first }}"
  "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
  "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PIECES = 480  # of the tokenizer: fewer than the model has ids, as it is with LLaDA
SCALE = 0.02
SHARD_BYTES = 200_000  # several shards, as real checkpoints have


def write(folder: pathlib.Path, config: ConfigDict, scale: float = SCALE) -> int:
  """Write the model that `config.model` describes, with random weights; return its number of parameters.

  Args:
    scale: standard deviation of the weights.
  """
  folder.mkdir(parents=True)
  ids = _write_tokenizer(folder, _prompts(config))
  with copy.deepcopy(config).unlocked() as own:
    own.model.init_from, own.model.quantization = "", "none"
    special = build.SpecialIds(PIECES, ids["mask_token_id"], ids["eos_token_id"], ids["pad_token_id"])
    model = build.build_model(own, special).config
  family = natural_family(model)
  rng, dtype = np.random.default_rng(config.seed), jnp.dtype(config.model.param_dtype)
  places = checkpoint_places(model, family)
  shapes = {name: tensor_shape(places, parts) for name, parts in parts_of(places).items()}

  def tensors() -> Iterable[tuple[str, np.ndarray]]:
    for name, shape in shapes.items():
      is_scale = name in places and places[name].path[-1] == "scale"
      array = np.ones(shape) if is_scale else scale * rng.standard_normal(shape)
      yield name, array.astype(dtype)

  sizes = {name: int(np.prod(shape)) * dtype.itemsize for name, shape in shapes.items()}
  write_shards(epath.Path(folder), sizes, tensors(), SHARD_BYTES)
  (folder / MODEL_FILE).write_text(json.dumps(model_config_to_hf(model, family), indent=2))
  return sum(sizes.values()) // dtype.itemsize


def _prompts(config: ConfigDict) -> list[str]:
  """Prompts of the configured task and of those that make their own, to learn pieces from."""
  found = []
  for name in dict.fromkeys([config.task.name, "sudoku", "countdown"]):
    if not user.is_file(name) and name not in ("sudoku", "countdown"):
      continue
    with copy.deepcopy(config.task).unlocked() as own:
      own.name = name
    task = tasks.make_task(**tasks.spec(own.to_dict()))
    if isinstance(task, UserTask):
      found += map(task.prompt, task.records("train"))
    elif isinstance(task, GeneratedTask):
      found += map(task.prompt, task.generate("train", 64, 0))
  return found


def _write_tokenizer(folder: pathlib.Path, texts: list[str]) -> dict[str, int]:
  """Write a tokenizer of byte pairs; return the ids of its special tokens."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  special = list(dict.fromkeys([*SPECIAL.values(), *TURN]))
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=PIECES, special_tokens=special, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.save(str(folder / TOKENIZER_FILE))
  about = {**SPECIAL, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
  (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2))
  vocabulary = tokenizer.get_vocab()
  return {f"{kind}_id": vocabulary[SPECIAL[kind]] for kind in ("mask_token", "eos_token", "pad_token")}
