"""The command `python -m launch.study`: see `study.py`."""

from dmpo_jax.config import command
from launch.study import study

if __name__ == "__main__":
  command.run(study.main)
