"""The command `python -m launch.benchmark SECTION`: see `launch/bench/main.py`."""

import sys

from launch.bench.main import start

if __name__ == "__main__":
  start(*sys.argv[1:])
