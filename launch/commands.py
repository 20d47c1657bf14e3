"""How the commands in this folder start."""

from collections.abc import Callable

from absl import app

from dmpo_jax.config import command


def start(main: Callable[..., None], *, takes_more: bool = False) -> None:
  """Parse the flags and call `main`. If it raises a ValueError, print its message and exit with code 2.

  Args:
    takes_more: `main` gets the arguments that follow the flags; without it they are refused.
  """

  def call(argv: list[str]) -> None:
    more = argv[1:]
    if more and not takes_more:
      raise app.UsageError(f"unexpected argument {more[0]!r}: options start with --, see --help")
    try:
      main(*more)
    except ValueError as error:
      command.complain(error)

  command.run(call)
