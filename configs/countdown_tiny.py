"""3-number Countdown on a laptop: a small model learns the form of an answer, then to hit the target by DMPO."""

from configs import base


def get_config():
  c = base.get_config()
  c.task.name = "countdown"
  c.warm_start.updates = 400
  return c.lock()
