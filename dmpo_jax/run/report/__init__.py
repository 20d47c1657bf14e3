"""A run as one page: what stands in its workdir -> curves, comparisons and completions in one report.html.

`runs` reads workdirs, `charts` says what is drawn of them, `page` puts all of it into one file without any network.
`summary` is the same in a few lines of text, `tables` are for a terminal.
"""

from dmpo_jax.run.report.page import write
from dmpo_jax.run.report.summary import summarize

__all__ = ["summarize", "write"]
