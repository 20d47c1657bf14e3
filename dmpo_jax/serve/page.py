"""The served page: a prompt is typed, or an example of the run's task taken, and its denoising is played."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from dmpo_jax import files
from dmpo_jax.run import grids
from dmpo_jax.run.report.page import HERE as REPORT
from dmpo_jax.run.report.page import read_asset
from dmpo_jax.run.report.runs import list_generations

HERE = pathlib.Path(__file__).parent
POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
NUM_EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class About:
  """What the page says of the policy."""

  task: str = ""
  sampler: str = ""
  examples: Sequence[str] = ()  # prompts
  cells_are_tokens: bool = False  # completions are the cells of the Sudoku in their prompt

  def grid_of(self, prompt: str) -> grids.Grid | None:
    """Return the Sudoku that completes a prompt, if it is one."""
    return grids.in_prompt(prompt) if self.cells_are_tokens else None

  def as_json(self, model: str, completion_length: int, block_length: int) -> dict[str, Any]:
    """Describe the policy for the page."""
    return {
      "model": model,
      "task": self.task,
      "sampler": self.sampler,
      "examples": list(self.examples),
      "completion_length": completion_length,
      "block_length": block_length if block_length < completion_length else 0,  # 0: one block
    }


def read_examples(workdir: epath.Path | None) -> list[str]:
  """Return the first held-out prompts of a run's last evaluation, if there is one."""
  names = list_generations(workdir) if workdir is not None else {}
  if workdir is None or not names:
    return []
  rows = files.read_lines(workdir / names[max(names)]).rows
  prompts = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
  return list(dict.fromkeys(prompts))[:NUM_EXAMPLES]


def render() -> str:
  """Render the page, the same for every policy: it asks the server what is served."""
  loader = jinja2.FileSystemLoader([HERE, REPORT])
  template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("watch.html")
  return template.render(style=Markup(read_asset("page.css")), denoising=Markup(read_asset("denoising.js")))
