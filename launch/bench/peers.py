"""The PyTorch implementations that the benchmark compares with, imported only where one is asked for."""

from typing import TYPE_CHECKING

from launch.bench.workload import Workload

if TYPE_CHECKING:
  from launch.bench.peer_torch import Peer


def make(work: Workload, official: str = "", *, is_checkpointing: bool = False) -> "Peer":
  """Build the peer for a workload.

  Args:
    official: a checkout of the official code, which then does the work; "": our plain PyTorch code.
    is_checkpointing: recompute layers in the backward pass.

  Raises:
    ValueError: PyTorch is not installed, or the official code cannot do this work.
  """
  if official:
    from launch.bench.peer_official import OfficialPeer

    return OfficialPeer(work, official, is_checkpointing=is_checkpointing)
  from launch.bench.peer_torch import Peer

  return Peer(work, is_checkpointing=is_checkpointing)
