from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags as config_flags

def DEFINE_config_file(
  name: str, default: str | None = ..., help_string: str = ..., flag_values: flags.FlagValues = ..., **kwargs: Any
) -> flags.FlagHolder[Any]: ...
def get_config_filename(config_flag: object) -> str: ...
def get_override_values(config_flag: object) -> dict[str, Any]: ...
