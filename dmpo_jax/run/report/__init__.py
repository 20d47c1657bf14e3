"""A run's report: its workdir -> one report.html with curves, comparisons and completions.

`runs` reads workdirs, `charts` specifies what is drawn, `page` renders it all into one file that needs no network.
`summary` describes a run in a few lines of text; `tables` are for a terminal.
"""

from dmpo_jax.run.report.page import write
from dmpo_jax.run.report.summary import summarize

__all__ = ["summarize", "write"]
