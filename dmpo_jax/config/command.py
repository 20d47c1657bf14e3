"""How every command starts: a mistake in its flags ends it with one message and exit code 2.

A configuration file is a program of the user's, so an exception while it loads is such a mistake too.
"""

import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from dmpo_jax.config import ConfigError
from dmpo_jax.config.keys import KEYS
from dmpo_jax.config.renamed import RENAMED, new_name
from dmpo_jax.spelling import did_you_mean

HELP = {"--help", "-help", "-h", "-?", "--helpshort", "--helpfull"}
INSTALLED = pathlib.Path(__file__).resolve().parents[2]  # where the package lies, with the shipped configs/ beside it
MISTAKE = 2  # exit code; nothing was started
_MISSING = re.compile(r"Flag --(\w+) must have a value other than None")  # as absl says it


def run(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> None:
  """Parse the flags of `argv` (default: `sys.argv`) and call `main` with the remaining arguments."""
  absl.logging.set_verbosity(absl.logging.WARNING)
  _silence_tensorflow()
  app.run(lambda rest: _call(main, rest), argv=None if argv is None else list(argv), flags_parser=parse)


def _silence_tensorflow() -> None:
  """Turn off what TensorFlow prints as it is imported, for TensorBoard's files or gs:// paths."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it prints, below any log level, that oneDNN is in use


def parse(argv: Sequence[str], known: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Parse the flags and load the configurations that they name; return the remaining arguments."""
  before_end = set(argv[: argv.index("--")] if "--" in argv else argv)
  if before_end & HELP:
    app.usage(shorthelp="--helpfull" not in before_end, writeto_stdout=True)
    sys.exit(0)
  try:
    rest = known(list(map(_find_shipped, argv)))
    for name in known:
      if config_flags.is_config_flag(known[name]) and known[name].present:
        _check_loaded(known[name].value)
  except Exception as error:  # an error of a flag, or anything that a configuration file raises
    if "--traceback" in argv:
      traceback.print_exc()
    complain(_describe(error, argv))
  return rest


def _find_shipped(arg: str) -> str:
  """Point `--config=configs/NAME.py` to the shipped file where the working directory has none of that name."""
  path, colon, argument = arg.removeprefix("--config=").partition(":")
  if not arg.startswith("--config=") or pathlib.Path(path).exists() or not (INSTALLED / path).is_file():
    return arg
  return f"--config={INSTALLED / path}{colon}{argument}"


def complain(problem: object) -> NoReturn:
  """Print a mistake in the command and exit."""
  print(f"error: {problem}", file=sys.stderr)
  sys.exit(MISTAKE)


def _call(main: Callable[[list[str]], Any], rest: list[str]) -> None:
  try:
    main(rest)
  except (app.UsageError, ConfigError) as error:
    complain(error)
  except OSError as error:  # a full disk, a folder without write permission
    print(f"stopped: {error}", file=sys.stderr)
    sys.exit(1)


def _check_loaded(config: Any) -> None:
  if not isinstance(config, ConfigDict):
    config.items()  # raises if the file is missing
    raise flags.IllegalFlagValueError("--config: the file's get_config() must return a ConfigDict")


def _describe(error: Exception, argv: Sequence[str]) -> str:
  """Describe an error: of a flag in absl's words, of a configuration file with the line."""
  given = next((arg for arg in argv if arg.startswith("--config=")), "--config")
  if isinstance(error, OSError):
    is_absent = "Failed loading config file" in f"{error} {error.__cause__}"
    return f"{given}: {'no such file' if is_absent else error.__cause__ or error}"
  if missing := _MISSING.search(str(error)):
    return f"--{missing[1]} is missing; --help says what it is"
  if "Error whilst parsing config file" in str(error):  # wrapped by ml_collections, then by absl
    cause = error.__context__
    assert cause is not None
    assert isinstance(cause.__context__, Exception)
    error = cause.__context__
  elif isinstance(error, flags.Error):
    return str(error)
  if unknown := _unknown_keys(error, argv):
    return "\n".join(unknown)
  place = traceback.extract_tb(error.__traceback__)[-1]
  where = "" if isinstance(error, SyntaxError) else f" ({place.filename}, line {place.lineno})"
  kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
  return f"{given}: {kind}{error}{where}{_renamed_keys(error)}"


def _unknown_keys(error: Exception, argv: Sequence[str]) -> list[str]:
  """Name the overridden keys that do not exist, if the error is about them."""
  if not isinstance(error, AttributeError | KeyError):
    return []
  overrides = [arg[len("--config.") :].split("=")[0] for arg in argv if arg.startswith("--config.")]
  unknown = [path for path in overrides if path not in KEYS and any(part in str(error) for part in path.split("."))]
  return [
    f"--config.{path}: " + (new_name(path) if path in RENAMED else f"no such key{did_you_mean(path, KEYS)}")
    for path in unknown
  ]


def _renamed_keys(error: Exception) -> str:
  """Name the new keys if a configuration file uses an old one."""
  if not isinstance(error, AttributeError | KeyError):
    return ""
  named = re.match(r"""["']*(?:Key ")?(\w+)""", str(error))
  old = [path for path, names in RENAMED.items() if names and named and path.rpartition(".")[2] == named[1]]
  return "".join(f"; {path} {new_name(path)}" for path in old)
