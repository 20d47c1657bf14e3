"""Buckets: what keeps a run from using one is said before it starts, and one run at a time holds its lock."""

import json
import os
import platform
import socket
import subprocess
import sys
import threading
import time

import google.cloud
import pytest
from etils import epath
from programs import start

from dmpo_jax import processes
from dmpo_jax.config import ConfigError
from dmpo_jax.run import buckets, workdir
from dmpo_jax.run.buckets import Held, Lock
from launch.rehearse import bucket
from launch.rehearse.bucket import Fault

LEASE = 1.5  # seconds
LOCK = "gs://one/run/run.lock"


@pytest.fixture
def emulator(tmp_path, monkeypatch):
  with bucket.running(("one",), tmp_path / "emulator") as started:
    for name, value in started.environment.items():
      monkeypatch.setenv(name, value)
    yield started


# Whether a bucket can be used


def test_a_bucket_that_can_be_used_is_left_as_it_was(emulator):
  buckets.check({"config.model.init_from": "gs://one/llada_8b"}, {"--workdir": "gs://one/run"})
  buckets.check({"config.task.data_dir": "/some/folder"})
  assert emulator.buckets.objects("one") == {}
  assert emulator.unknown == []


@pytest.mark.parametrize(
  ("pattern", "status", "message"),
  [
    ("GET .*/o[?]", 403, "--hf=gs://one/hf: access is denied .* roles/storage.objectViewer to"),
    ("POST .*/o[?]", 403, "--workdir=gs://one/run: access is denied .*objectUser and .*legacyBucketReader"),
    ("GET .*/b/one[?]", 403, "--workdir=gs://one/run: access is denied"),
    ("GET .*/o[?]", 503, "it cannot be reached .ServiceUnavailable: "),
    ("GET .*/o[?]", 0, "it cannot be reached .ConnectionError: "),
  ],
)
def test_a_bucket_that_refuses_is_a_mistake(emulator, pattern, status, message):
  emulator.faults.append(Fault(pattern, 9, status))
  paths = {"--workdir": "gs://one/run"} if "--workdir" in message else {"--hf": "gs://one/hf"}
  with pytest.raises(ConfigError, match=message) as caught:
    buckets.check({} if "--workdir" in message else paths, paths if "--workdir" in message else {})
  assert len(str(caught.value).splitlines()) == 1


def test_a_bucket_that_was_busy_is_asked_again(emulator):
  emulator.faults += [Fault("GET .*/o[?]", 1, 429), Fault("POST .*/o[?]", 1, 503)]
  buckets.check({}, {"--workdir": "gs://one/run"})
  assert [fault.times for fault in emulator.faults] == [0, 0]


def test_a_bucket_that_is_not_there_is_a_mistake(emulator):
  with pytest.raises(
    ConfigError, match="--out=gs://two/x: there is no bucket two: gcloud storage buckets create gs://two"
  ):
    buckets.check({"--hf": "gs://one/hf"}, {"--out": "gs://two/x"})


def test_no_network_is_said_at_once(monkeypatch):
  monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
  began = time.monotonic()
  with pytest.raises(ConfigError, match=r"--workdir=gs://one/run: it cannot be reached \(ConnectionError"):
    buckets.check({}, {"--workdir": "gs://one/run"})
  assert time.monotonic() - began < buckets.CHECK_SECONDS + 1


def test_silence_is_no_answer(monkeypatch):
  monkeypatch.setattr(buckets, "CHECK_SECONDS", 0.5)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(ConfigError, match=r"--hf=gs://one/hf: no answer within 0 s|within 1 s"):
      buckets.check({"--hf": "gs://one/hf"})


def test_nobody_logged_in_is_said(monkeypatch, tmp_path):
  for name, value in {"NO_GCE_CHECK": "true", "CLOUDSDK_CONFIG": str(tmp_path), "GOOGLE_CLOUD_PROJECT": "p"}.items():
    monkeypatch.setenv(name, value)
  for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(ConfigError, match="no credentials found: run gcloud auth application-default login"):
    buckets.check({"--hf": "gs://one/hf"})


def test_a_missing_library_is_named(monkeypatch):
  monkeypatch.delattr(google.cloud, "storage", raising=False)
  monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
  with pytest.raises(
    ConfigError, match=r"google-cloud-storage is not installed, .*: pip install google-cloud-storage$"
  ):
    buckets.check({"--hf": "gs://one/hf"})


def test_other_stores_are_refused():
  with pytest.raises(ConfigError, match="--workdir=s3://one/run: give a folder or a gs:// path"):
    buckets.check({}, {"--workdir": "s3://one/run"})


@pytest.mark.parametrize(
  ("args", "option"),
  [
    (("--workdir=gs://two/run",), "--workdir=gs://two/run"),
    (("--workdir={folder}/run", "--config.model.init_from=gs://two/8b"), "config.model.init_from=gs://two/8b"),
  ],
)
def test_main_says_it_in_one_line_before_devices_are_touched(emulator, tmp_path, args, option):
  args = [arg.format(folder=tmp_path) for arg in args]
  done = start("--config=configs/smoke.py", *args)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {option}: there is no bucket two"), done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / "run").exists()


# The lock


@pytest.fixture
def make_lock(emulator):
  """Make locks of a short lease, whose losses are noted in `lost`; those that are held at the end are released."""
  made = []

  def make():
    lost = []
    lock = Lock(LOCK, on_lost=lost.append, lease_seconds=LEASE)
    lock.lost = lost
    made.append(lock)
    return lock

  yield make
  for lock in made:
    if lock._thread.is_alive():
      lock.release()


def die(lock):
  """Let a lock's process end without a word, as far as the bucket can see."""
  lock._is_ending.set()
  lock._thread.join()


def written(emulator):
  return json.loads(emulator.buckets.objects("one")["run/run.lock"].data)


def test_a_run_that_lives_is_named_to_the_next(emulator, make_lock):
  first = make_lock()
  first.acquire()
  said = written(emulator)
  assert (said["pid"], said["host"]) == (os.getpid(), platform.node())
  with pytest.raises(Held, match=rf"^process {os.getpid()} on {platform.node()}, since {said['since']}$"):
    make_lock().acquire()
  time.sleep(2 * LEASE)  # renewed all the time
  with pytest.raises(Held):
    make_lock().acquire()
  first.release()
  assert emulator.buckets.objects("one") == {}
  make_lock().acquire()
  assert first.lost == []


def test_the_lock_of_a_dead_run_is_taken_over_after_its_lease_and_the_dead_one_learns_it(make_lock):
  first, second = make_lock(), make_lock()
  first.acquire()
  die(first)
  began = time.monotonic()
  second.acquire()
  assert LEASE <= time.monotonic() - began < 4 * LEASE
  first._is_ending.clear()  # it was only asleep
  first._renew_until_released()
  assert first.lost == [f"process {os.getpid()} on {platform.node()}, since {second._metadata['since']}"]
  first._thread = threading.Thread(target=lambda: None)
  first._thread.start()
  first.release()
  with pytest.raises(Held):  # what the first one gives up is not its own any more
    make_lock().acquire()
  assert second.lost == []


def test_the_lock_of_a_process_that_died_on_this_host_is_taken_over_at_once(make_lock):
  gone = subprocess.Popen([sys.executable, "-c", ""])
  gone.wait()
  first, second = make_lock(), make_lock()
  first._metadata["pid"] = gone.pid
  first.acquire()
  die(first)
  began = time.monotonic()
  second.acquire()
  assert time.monotonic() - began < LEASE


def test_of_many_who_take_over_one_wins(make_lock):
  first, takers = make_lock(), [make_lock() for _ in range(6)]
  first.acquire()
  die(first)
  outcomes = []

  def take(lock):
    try:
      lock.acquire()
      outcomes.append("won")
    except Held:
      outcomes.append("held")

  threads = [threading.Thread(target=take, args=(lock,)) for lock in takers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
  assert sorted(outcomes) == ["held"] * 5 + ["won"]


def test_a_write_whose_answer_was_lost_counts(make_lock):
  lock = make_lock()
  assert lock._write(0)
  before = lock._generation
  assert lock._write(before)
  assert lock._write(before)  # again, as whoever heard nothing of the first time would
  assert lock._generation > before
  assert not make_lock()._write(before)


def test_a_short_outage_loses_nothing(emulator, make_lock):
  lock = make_lock()
  lock.acquire()
  emulator.faults.append(Fault("POST", 2, 503))
  time.sleep(2 * LEASE)
  assert emulator.faults[0].times == 0
  assert lock.lost == []
  with pytest.raises(Held):
    make_lock().acquire()


def test_a_lock_that_cannot_be_read_is_no_run(emulator, make_lock):
  emulator.buckets.put("one", "run/run.lock", b"\xff", {})
  make_lock().acquire()
  assert written(emulator)["pid"] == os.getpid()


def test_a_run_that_was_taken_over_stops(emulator, monkeypatch):
  monkeypatch.setattr(workdir, "LEASE_SECONDS", LEASE)
  folder = epath.Path("gs://one/run")
  with workdir.alone_in(folder):
    used = rf"gs://one/run is in use by another run, process {os.getpid()} on "
    with pytest.raises(ConfigError, match=used), workdir.alone_in(folder):
      pass
    processes.poll("the next step")
    taken = json.dumps({"pid": 1, "host": "another", "since": "now", "token": "its"}).encode()
    emulator.buckets.put("one", "run/run.lock", taken, {})
    time.sleep(LEASE)
    with pytest.raises(processes.Stopped, match="gs://one/run was taken over by process 1 on another, since now: "):
      processes.poll("the next step")
  assert emulator.buckets.objects("one")["run/run.lock"].data == taken


def test_a_lock_that_cannot_be_written_is_a_mistake(emulator):
  emulator.faults.append(Fault("POST", 1, 403))
  folder = epath.Path("gs://one/run")
  with pytest.raises(ConfigError, match="gs://one/run cannot be written to"), workdir.alone_in(folder):
    pass
