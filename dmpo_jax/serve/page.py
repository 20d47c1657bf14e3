"""The served page: a prompt is typed, or an example of the run's task taken, and its denoising is played."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from dmpo_jax.run import grids
from dmpo_jax.run.report.page import HERE as REPORT
from dmpo_jax.run.report.page import read_asset

HERE = pathlib.Path(__file__).parent
POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclasses.dataclass(frozen=True)
class About:
  """What the page says of the policy."""

  task: str = ""
  sampler: str = ""
  examples: Sequence[str] = ()  # prompts
  blocks_have_prompt: bool = False  # the model counts blocks from the prompt's first token
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


def render() -> str:
  """Render the page, the same for every policy: it asks the server what is served."""
  loader = jinja2.FileSystemLoader([HERE, REPORT])
  template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("watch.html")
  return template.render(style=Markup(read_asset("page.css")), denoising=Markup(read_asset("denoising.js")))
