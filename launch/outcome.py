"""Everything that a finished run left, for a comparison with another run bit for bit."""

import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath


def outcome(workdir: epath.Path) -> dict[str, Any]:
  """Collect everything that a finished run left by name, except times."""
  left: dict[str, Any] = {}
  for phase in sorted((workdir / "checkpoints").iterdir()):
    saved = [path for path in phase.iterdir() if path.name.replace(".", "").isdigit()]  # 12; or 12.1, saved again
    newest = max(saved, key=lambda path: [int(part) for part in path.name.split(".")])
    left |= {f"{phase.name} state {name}": array for name, array in arrays(newest / "state").items()}
  for folder in ("policy", "best"):
    if (workdir / folder).exists():
      left |= {f"{folder} {name}": array for name, array in arrays(workdir / folder).items()}
  for number, line in enumerate((workdir / "metrics.jsonl").read_text().splitlines()):
    left[f"metrics row {number}"] = _timeless(json.loads(line))
  left["result"] = _timeless(json.loads((workdir / "result.json").read_text()))
  for path in sorted((workdir / "generations").iterdir()):
    left[f"generations {path.name}"] = path.read_text()
  return left


def arrays(path: epath.Path) -> dict[str, np.ndarray]:
  """Read saved arrays as NumPy arrays, whatever devices saved them."""
  reader = ocp.StandardCheckpointer()
  described = reader.metadata(path).item_metadata
  assert described is not None
  saved = described.tree
  read = reader.restore(path, jax.tree.map(lambda array: np.zeros(array.shape, array.dtype), saved))
  return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in jax.tree.flatten_with_path(read)[0]}


def _timeless(value: object) -> Any:
  """Drop values that depend on the clock."""
  if not isinstance(value, dict):
    return value
  return {name: _timeless(item) for name, item in value.items() if name != "time" and "second" not in name}


def compare(wanted: dict[str, Any], got: dict[str, Any]) -> str:
  """Describe the first difference of two outcomes; "" if there is none."""
  for name in sorted(wanted.keys() | got.keys()):
    if name not in wanted or name not in got:
      return f"{name} is missing in one of them"
    pair = (wanted[name], got[name])
    is_equal = _are_same_bits(*pair) if isinstance(wanted[name], np.ndarray) else pair[0] == pair[1]
    if not is_equal:
      return f"{name} differs"
  return ""


def _are_same_bits(one: np.ndarray, other: np.ndarray) -> bool:
  return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()
