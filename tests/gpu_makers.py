"""Contenders for the tests of their processes."""

import time


def sleep(seconds):
  """Take long to build."""
  time.sleep(seconds)
