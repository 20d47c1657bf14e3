"""The command `python -m launch.benchmark SECTION`: see `launch/bench/benchmark.py`."""

import sys

from launch.bench.benchmark import start

if __name__ == "__main__":
  start(*sys.argv[1:])
