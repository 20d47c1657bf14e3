"""How completions were decided, token by token: what the report's player, the replay and the film show."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from dmpo_jax import messages
from dmpo_jax.run import grids
from dmpo_jax.run.report.runs import Row, Run, is_number

Animation = dict[str, Any]  # of a prompt: a pane for the first and for the last evaluation


def animations(run: Run) -> list[Animation]:
  """Return the prompts whose completions record when each token was decided, in the first and the last evaluation."""
  buffers = list(run.generations)
  found: dict[str, Animation] = {}
  for buffer in dict.fromkeys((*buffers[:1], *buffers[-1:])):
    for line in run.generations[buffer]:
      if is_animation(line.get("denoising")):
        prompt = messages.show(line.get("prompt", ""))
        animation = found.setdefault(prompt, {"prompt": prompt, "block_length": _block_length(run), "panes": []})
        if all(pane["buffer"] != buffer for pane in animation["panes"]):
          animation["panes"].append(_pane(line, buffer))
  return [animation | {"verdict": _verdict(animation["panes"])} for animation in found.values()]


def choose(found: list[Animation]) -> int:
  """Return the number of the prompt to open with: the first that only the trained policy solves, or the first one."""
  return next((i for i, one in enumerate(found) if one["verdict"] == "only the trained policy solves it"), 0)


def is_animation(record: object) -> TypeGuard[Mapping[str, Any]]:
  """Whether the `denoising` of a generation is complete and can be animated."""
  if not isinstance(record, Mapping):
    return False
  pieces, calls, confidence = (record.get(name, ()) for name in ("pieces", "committed_at", "confidence"))
  if not all(isinstance(part, list) and part for part in (pieces, calls, confidence)):
    return False
  return (
    len(pieces) == len(calls) == len(confidence)
    and all(isinstance(piece, str) for piece in pieces)
    and all(type(call) is int and call >= 0 for call in calls)
    and all(map(is_number, confidence))
  )


def grid_of(line: Row) -> grids.Grid | None:
  """Return the Sudoku whose cells are the tokens of a completion; None where they are something else."""
  grid, record = grids.of_record(line.get("record")), line.get("denoising")
  is_bare = line.get("prompt_name", "bare") == "bare"
  return grid if grid and is_bare and is_animation(record) and grid.fits(record["pieces"]) else None


def _pane(line: Row, buffer: int) -> dict[str, Any]:
  record, grid = line["denoising"], grid_of(line)
  return {
    "buffer": buffer,
    "when": "base" if buffer == 0 else f"after {buffer} buffers",
    "reward": line.get("reward"),
    "is_solved": line.get("is_solved"),
    "grid": grid and grid.drawn,
    "wrong": grid.find_wrong(record["pieces"]) if grid else [],
    **{name: list(record[name]) for name in ("pieces", "committed_at", "confidence")},
  }


def _block_length(run: Run) -> int:
  """Return the tokens of a block where completions have several; otherwise 0."""
  block, whole = run.count("sampler.block_length"), run.count("sampler.completion_length")
  return block if block and whole and block < whole else 0


def _verdict(panes: list[dict[str, Any]]) -> str:
  """Compare a prompt's completions before and after training; "" where it is not known whether they are right."""
  known = [pane["is_solved"] for pane in panes]
  if not all(type(is_solved) is bool for is_solved in known):
    return ""
  if len(known) == 1:
    return "solved" if known[0] else "not solved"
  both = {
    (False, True): "only the trained policy solves it",
    (True, False): "only the base solves it",
    (True, True): "both solve it",
    (False, False): "neither solves it",
  }
  return both[known[0], known[1]]
