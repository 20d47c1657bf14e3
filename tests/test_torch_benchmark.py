"""The benchmark's peer in PyTorch: it computes our numbers, on our masks (make test-torch)."""

import bench_tiny
import numpy as np
import pytest

from launch.bench import iteration as bench_iteration
from launch.bench import peers, results, workload
from launch.bench import sample as bench_sample
from launch.bench import score as bench_score
from launch.bench import update as bench_update

pytestmark = pytest.mark.torch
WHY = "PyTorch is not installed: make test-torch"
torch = pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("peft", reason=WHY)


@pytest.fixture(autouse=True)
def _one_device(use_devices):
  use_devices(1)


def compare(ours, peer, tolerances):
  numbers = {"ours": ours.check(), "PyTorch": peer.check()}
  return results.agree("ours", "PyTorch", numbers, tolerances)


@pytest.mark.parametrize("is_checkpointing", [False, True])
def test_loss_and_gradient(is_checkpointing):
  config = bench_tiny.config()
  peer = bench_update.make_peer(config, is_checkpointing, "")
  compare(bench_update.make_ours(config), peer, bench_update.TOLERANCES)
  peer.run()


def test_scores():
  config = bench_tiny.config()
  peer = bench_score.make_peer(config, "")
  compare(bench_score.make_ours(config), peer, bench_score.TOLERANCES)
  peer.run()


def test_tokens():
  config = bench_tiny.config(sampler__name="prefix_cache")
  peer = bench_sample.make_peer(config, "")
  compare(bench_sample.make_ours(config), peer, bench_sample.TOLERANCES)
  assert peer.run()["calls"] == config.sampler.steps


def test_an_iteration_changes_the_adapters():
  config = bench_tiny.config(optim__learning_rate=1e-2)
  bench_iteration.make_peer(config, "").run()
  peer = peers.make(workload.make(config, sharpness=workload.SHARPNESS))
  before = [weight.detach().clone() for weight in peer.trained]
  peer.iterate(lambda completion: np.arange(len(completion), dtype=np.float32))
  assert all((a != b).any() for a, b in zip(before, peer.trained, strict=True))
  assert torch.allclose(peer.weight.view(2, 2).sum(-1), torch.ones(2))


def test_another_sampler_than_the_peers_is_refused():
  with pytest.raises(ValueError, match=r"sampler\.name='llada': the peer draws rollouts by prefix_cache alone"):
    bench_iteration.make_peer(bench_tiny.config(sampler__name="llada"), "")


def test_no_checkout_is_refused(tmp_path):
  with pytest.raises(ValueError, match="give a checkout of the official DMPO repository"):
    bench_score.make_peer(bench_tiny.config(), str(tmp_path))
