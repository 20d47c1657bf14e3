"""A stand-in for a checkpoint's tokenizer: bytes as tokens, and the special tokens of LLaDA or Dream at their ids."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

LLADA = {
  "<|startoftext|>": 126080,
  "<|endoftext|>": 126081,
  "<|mdm_mask|>": 126336,
  "<|start_header_id|>": 126346,
  "<|end_header_id|>": 126347,
  "<|eot_id|>": 126348,
}
LLADA_CONFIG = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
LLADA_TEMPLATE = (
  "{% for message in messages %}"
  "{{ bos_token if loop.first }}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
  "{{ message['content'] | trim }}<|eot_id|>"
  "{% endfor %}"
  "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

DREAM = {
  "<|endoftext|>": 151643,
  "<|im_start|>": 151644,
  "<|im_end|>": 151645,
  "<|beginoftext|>": 151665,
  "<|mask|>": 151666,
}
DREAM_CONFIG = {
  "bos_token": "<|beginoftext|>",
  "eos_token": "<|endoftext|>",
  "pad_token": "<|endoftext|>",
  "mask_token": "<|mask|>",
}
DREAM_TEMPLATE = (
  "{%- for message in messages %}"
  "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
  "{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write(folder, special=LLADA, config=LLADA_CONFIG, template=LLADA_TEMPLATE, model_config=None):
  """Write tokenizer.json, tokenizer_config.json and, if given, config.json; return the folder."""
  free = [i for i in range(max(special.values()) + 1) if i not in special.values()]
  pieces = sorted(pre_tokenizers.ByteLevel.alphabet())  # where ids are few, the last of these are not in it
  vocab = special | {f"<unused {i}>": i for i in free[len(pieces) :]} | dict(zip(pieces, free, strict=False))
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges=[]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(list(special))
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
  about = dict(config, tokenizer_class="PreTrainedTokenizerFast")
  if template is not None:
    about["chat_template"] = template
  (folder / "tokenizer_config.json").write_text(json.dumps(about))
  if model_config is not None:
    (folder / "config.json").write_text(json.dumps(model_config))
  return folder
