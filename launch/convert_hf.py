"""Convert a checkpoint or a PEFT adapter in Hugging Face's layout to what `model.init_from` loads.

    python -m launch.convert_hf --hf=DIR_OR_REPO --out=DIR_OR_GS [--dtype=bfloat16|float32|int8]
    python -m launch.convert_hf --hf=Qwen/Qwen3-0.6B --out=DIR --adapt     # an autoregressive model, for diffusion
    python -m launch.convert_hf --hf=FILE.gguf --out=DIR --adapt           # the same of llama.cpp's format, dequantised
    python -m launch.convert_hf --hf=ADAPTER_DIR --base=CONVERTED_DIR --out=DIR    # for model.lora.init_from

All names, shapes and shard lengths are checked before anything is written. Tensors are then read and written in pieces
of at most 16 MiB, so memory use does not depend on the size of the checkpoint; --dtype=int8 reads projections twice.
The other files of the checkpoint (tokenizer, config, the model's code) are copied.

--adapt takes Llama, Qwen2 and Qwen3 models: their attention becomes full, and they get a mask token, in the table and
in the tokenizer. Train the result with objective.name=denoise before anything else. A GGUF file (Llama's architecture)
needs the extra gguf and as much disk as its float32 weights, in the temporary folder, while it is converted.
"""

import contextlib
import os
import re
import resource
import tempfile
import time
from collections.abc import Iterator

from absl import flags
from etils import epath

from dmpo_jax.hub import gguf, pretrained
from dmpo_jax.hub.adapt import AS_IT_IS, FLAGS, Adaptation
from dmpo_jax.hub.convert import convert_adapter, convert_model
from dmpo_jax.hub.shards import ADAPTER, WEIGHTS, Shards
from dmpo_jax.hub.tokenizer import has_tokenizer
from dmpo_jax.run import buckets, progress
from launch import commands

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_folder(hf: str, revision: str | None = None) -> epath.Path:
  """Return the folder of a checkpoint; a name that is not a folder is downloaded from the hub.

  Raises:
    ValueError: there is no such folder and the hub does not provide it, or a revision of a folder is asked for.
  """
  folder = epath.Path(hf).expanduser()
  if folder.is_dir():
    if revision is not None:
      raise ValueError(f"--revision={revision}: --hf={hf} is a folder, and only the hub has revisions; leave it out")
    return folder
  if not HUB_ID.fullmatch(hf):
    raise ValueError(f"--hf={hf}: neither a folder nor the name of a repository such as GSAI-ML/LLaDA-8B-Instruct")
  from huggingface_hub import snapshot_download  # slow to import and seldom needed

  try:
    return epath.Path(
      snapshot_download(hf, revision=revision, allow_patterns=[*pretrained.SIDE_FILES, "*.safetensors"])
    )
  except Exception as error:  # the hub's client raises its network library's errors
    raise ValueError(f"--hf={hf}: no such folder, and the hub does not provide it ({error})") from error


@contextlib.contextmanager
def opened(hf: str, revision: str | None) -> Iterator[epath.Path]:
  """Yield the folder of a checkpoint (see `find_folder`), for a GGUF file a temporary one of its name.

  Raises:
    ValueError: there is no such checkpoint, or it cannot be read.
  """
  if not hf.endswith(gguf.SUFFIX):
    yield find_folder(hf, revision)
    return
  if revision is not None:
    raise ValueError(f"--revision={revision}: --hf={hf} is a file, and only the hub has revisions; leave it out")
  with tempfile.TemporaryDirectory() as temporary:
    folder = epath.Path(temporary) / os.path.basename(hf)
    folder.mkdir()
    gguf.unpack(epath.Path(hf).expanduser(), folder)
    yield folder


def run(
  hf: str, revision: str | None, out: epath.Path, base: epath.Path | None, dtype: str, asked: Adaptation = AS_IT_IS
) -> None:
  """Convert with a progress bar, and print a summary."""
  start = time.monotonic()
  with opened(hf, revision) as source:
    count, notes = _convert(hf, source, out, base, dtype, asked)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"{out}: {count:,} parameters, {time.monotonic() - start:.1f} s, at most {peak:.2f} GiB of memory")
  for note in notes:
    print(note)
  if base is None and not has_tokenizer(out):
    print(f"{hf} has no tokenizer: copy one into {out}")


def _convert(
  hf: str, source: epath.Path, out: epath.Path, base: epath.Path | None, dtype: str, asked: Adaptation
) -> tuple[int, tuple[str, ...]]:
  """Convert with a progress bar; return the number of parameters and what to tell the user."""
  is_adapter = (source / "adapter_config.json").exists()
  if is_adapter and base is None:
    raise ValueError(f"{source} holds an adapter: give its model's converted folder with --base")
  if is_adapter and dtype != "same":
    raise ValueError(f"--dtype={dtype}: {source} holds an adapter, and adapters are kept in float32; leave it out")
  if base is not None and not is_adapter:
    raise ValueError(f"--base={base}: {source} holds a model and no adapter_config.json; leave it out")
  if is_adapter and asked != AS_IT_IS:
    raise ValueError(f"{source} holds an adapter: leave out {FLAGS}")
  size = sum(tensor.size for tensor in Shards(source, ADAPTER if is_adapter else WEIGHTS).tensors.values())
  with progress.Progress("converting", size, unit="bytes") as shown:
    if base is not None:
      return convert_adapter(source, base, out, shown.advance), ()
    path = epath.Path(hf).expanduser()
    origin = "" if path.is_dir() else os.path.abspath(path) if path.is_file() else hf
    return convert_model(source, out, dtype, shown.advance, origin, asked)


def define_flags() -> None:
  """Declare the command's flags; not on import, as every command has an --out of its own."""
  flags.adopt_module_key_flags(progress)
  flags.DEFINE_string(
    "hf", None, "A folder (or gs:// path) in Hugging Face's layout, a repository of the hub, or a GGUF file."
  )
  flags.DEFINE_string("revision", None, "Branch, tag or commit of the hub's repository.")
  flags.DEFINE_string("out", None, "The folder (or gs:// path) to write; it must not exist.")
  flags.DEFINE_string("base", None, "For an adapter: the converted folder of the model that it is for.")
  text = "Of the parameters written. int8: only the projections of the layers, the rest as stored."
  flags.DEFINE_enum("dtype", "same", ["same", "bfloat16", "float32", "int8"], text)
  flags.DEFINE_boolean("adapt", False, "Make a diffusion model of an autoregressive one (Llama, Qwen2, Qwen3).")
  flags.DEFINE_string(
    "mask_token", "", "Its mask token, new or one of its tokenizer's; by default its own or <|mask|>."
  )
  text = "Whether logits predict the next position, for Llama, Qwen2 and Qwen3; by default as config.json says, or not."
  flags.DEFINE_boolean("shift_logits", None, text)
  text = (
    "Blocks by which tokens attend, for Llama, Qwen2 and Qwen3 (dllm's BD3LM); by default as config.json says, or none."
  )
  flags.DEFINE_integer("block_length", None, text, lower_bound=1)
  flags.mark_flags_as_required(["hf", "out"])


def main() -> None:
  """Convert what the flags name."""
  given = flags.FLAGS
  base = epath.Path(given.base).expanduser() if given.base else None
  buckets.check({"--hf": given.hf, "--base": given.base or ""}, {"--out": given.out})
  asked = Adaptation(given.adapt, given.mask_token, given.shift_logits, given.block_length)
  run(given.hf, given.revision, epath.Path(given.out).expanduser(), base, given.dtype, asked)


if __name__ == "__main__":
  define_flags()
  commands.start(main)
