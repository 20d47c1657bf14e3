"""The rehearsal's bucket: each library that a run uses reads and writes it as it would Google's."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from launch.rehearse import bucket
from launch.rehearse.api import Api, Request
from launch.rehearse.objects import Buckets, Refused


@pytest.fixture
def emulator(tmp_path):
  with bucket.running(("one", "two"), tmp_path) as started:
    yield started


def in_a_process(emulator, program, timeout=120):
  """Run a program that finds the bucket, and return what it printed; libraries read their variables once a process."""
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program)],
    env=os.environ | emulator.environment,
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.mark.slow
def test_gfile_reads_writes_and_renames(emulator):
  said = in_a_process(
    emulator,
    """
    import tensorflow as tf
    from etils import epath
    folder = epath.Path("gs://one/a folder")
    folder.mkdir(parents=True)
    data = bytes(range(256)) * 20000
    (folder / "x+y.bin").write_bytes(data)
    assert (folder / "x+y.bin").read_bytes() == data
    with tf.io.gfile.GFile("gs://one/a folder/x+y.bin", "rb") as file:
      file.seek(5_000_000)
      assert file.read(7) == data[5_000_000:5_000_007]
    (folder / "empty").write_bytes(b"")
    assert (folder / "empty").read_bytes() == b""
    (folder / "x+y.bin").rename("gs://one/other/z.bin")
    print(sorted(path.name for path in folder.iterdir()), (epath.Path("gs://one/other/z.bin")).stat().length)
    print(epath.Path("gs://one/nothing").exists(), epath.Path("gs://one/other").is_dir())
    folder.rmtree()
    """,
  )
  assert said.splitlines() == ["['empty'] 5120000", "False True"]
  assert sorted(emulator.buckets.objects("one")) == ["other/z.bin"]
  assert emulator.unknown == []


def test_tensorstore_reads_and_writes(emulator):
  in_a_process(
    emulator,
    """
    import numpy as np, tensorstore as ts
    spec = {"driver": "zarr3", "kvstore": {"driver": "gcs", "bucket": "one", "path": "array/"}}
    values = np.arange(60_000, dtype=np.float32).reshape(200, 300)
    made = ts.open(spec, create=True, dtype=ts.float32, shape=values.shape).result()
    made.write(values).result()
    assert (ts.open(spec).result().read().result() == values).all()
    store = ts.KvStore.open(spec["kvstore"]).result()
    assert store.read("absent").result().state == "missing"
    first = store.write("key", b"abc").result().generation
    store.write("key", b"later", if_equal=first).result()
    store.write("key", b"too late", if_equal=first).result()
    assert store.read("key").result().value == b"later"
    assert b"key" in store.list().result()
    store.delete_range(ts.KvStore.KeyRange("c", "d")).result()
    """,
  )
  assert "array/zarr.json" in emulator.buckets.objects("one")
  assert not any(name.startswith("array/c/") for name in emulator.buckets.objects("one"))
  assert emulator.unknown == []


def test_google_cloud_storage_keeps_to_preconditions(emulator):
  in_a_process(
    emulator,
    """
    import pytest
    from google.api_core.exceptions import NotFound, PreconditionFailed
    from google.cloud import storage
    client = storage.Client()
    assert not client.bucket("absent").exists()
    one = client.bucket("one")
    lock = one.blob("run/run.lock")
    lock.metadata = {"host": "a"}
    lock.upload_from_string("first", if_generation_match=0)
    with pytest.raises(PreconditionFailed):
      one.blob("run/run.lock").upload_from_string("second", if_generation_match=0)
    written = lock.generation
    lock.upload_from_string("renewed", if_generation_match=written)
    assert lock.generation > written
    with pytest.raises(PreconditionFailed):
      lock.delete(if_generation_match=written)
    again = one.get_blob("run/run.lock")
    assert (again.download_as_text(), again.metadata) == ("renewed", {"host": "a"})
    assert again.download_as_bytes(start=2, end=4) == b"new"
    big = one.blob("big")
    big.chunk_size = 256 * 1024
    big.upload_from_string(b"0123456789" * 100_000)  # resumable, in pieces
    assert big.download_as_bytes() == b"0123456789" * 100_000
    one.blob("both").compose([big, lock])
    assert one.blob("both").download_as_bytes()[-7:] == b"renewed"
    one.copy_blob(big, client.bucket("two"), "copy")
    one.rename_blob(big, "renamed")
    assert [blob.name for blob in client.list_blobs("one", page_size=1)] == ["both", "renamed", "run/run.lock"]
    everything = list(client.list_blobs("one"))
    with client.batch():
      for blob in everything:
        blob.delete()
    with pytest.raises(NotFound):
      lock.download_as_bytes()
    """,
  )
  assert emulator.buckets.objects("one") == {}
  assert list(emulator.buckets.objects("two")) == ["copy"]
  assert emulator.unknown == []


def test_faults_come_as_often_as_asked(emulator):
  emulator.faults.append(bucket.Fault("POST /upload", times=2))
  emulator.faults.append(bucket.Fault("GET .*alt=media", times=1, status=0))
  in_a_process(
    emulator,
    """
    from google.cloud import storage
    from google.cloud.storage.retry import DEFAULT_RETRY
    blob = storage.Client().bucket("one").blob("x")
    blob.upload_from_string("there", if_generation_match=0, retry=DEFAULT_RETRY.with_delay(initial=0.01))
    assert blob.download_as_text() == "there"
    """,
  )
  assert [fault.times for fault in emulator.faults] == [0, 0]


def test_the_log_has_every_request(emulator, tmp_path):
  in_a_process(emulator, "from google.cloud import storage; storage.Client().bucket('one').exists()")
  (line,) = (tmp_path / "requests.log").read_text().splitlines()
  assert line.startswith("GET /storage/v1/b/one")
  assert line.endswith(" 200")


def listed(names, **query):
  """What a listing has: items, prefixes and whether there is more."""
  buckets = Buckets(("b",))
  for name in names:
    buckets.put("b", name, b"", {})
  told = buckets.listing("b", query)
  return [item["name"] for item in told.get("items", ())], told.get("prefixes", []), told.get("nextPageToken")


@pytest.mark.parametrize(
  ("query", "wanted"),
  [
    ({}, (["a", "b/", "b/c", "b/d/e", "f"], [], None)),
    ({"delimiter": "/"}, (["a", "f"], ["b/"], None)),
    ({"delimiter": "/", "includeTrailingDelimiter": "true"}, (["a", "b/", "f"], ["b/"], None)),
    ({"prefix": "b/", "delimiter": "/"}, (["b/", "b/c"], ["b/d/"], None)),
    ({"maxResults": "2"}, (["a", "b/"], [], "b/")),
    ({"maxResults": "2", "pageToken": "b/", "delimiter": "/"}, (["f"], [], None)),
    ({"startOffset": "b/c", "endOffset": "f"}, (["b/c", "b/d/e"], [], None)),
  ],
)
def test_listings_fold_and_page(query, wanted):
  assert listed(["f", "b/d/e", "b/c", "b/", "a"], **query) == wanted


def test_conditions_on_what_is_there_and_what_is_not():
  buckets = Buckets(("b",))
  first = buckets.put("b", "x", b"1", {"ifGenerationMatch": "0"})
  refused = [{"ifGenerationMatch": "0"}, {"ifGenerationMatch": "7"}, {"ifMetagenerationMatch": "2"}]
  for conditions in refused:
    with pytest.raises(Refused, match="412"):
      buckets.put("b", "x", b"2", conditions)
  with pytest.raises(Refused, match="304"):
    buckets.get("b", "x", {"ifGenerationNotMatch": str(first.generation)})
  changed = buckets.patch("b", "x", {"metadata": {"k": "v"}}, {"ifMetagenerationMatch": "1"})
  assert (changed.generation, changed.metageneration, changed.metadata) == (first.generation, 2, {"k": "v"})
  with pytest.raises(Refused, match="404"):
    buckets.get("b", "x", {"generation": "7"})
  with pytest.raises(Refused, match="bucket does not exist"):
    buckets.put("c", "x", b"", {})


def test_what_it_does_not_know_is_said_and_noted():
  api = Api(Buckets(("b",)))
  told = api.answer(Request("GET", "/storage/v1/b/b/acl", {}))
  assert told.status == 501
  assert "does not support GET" in json.loads(told.body)["error"]["message"]
  assert api.unknown == ["GET /storage/v1/b/b/acl"]


def test_a_part_keeps_its_last_bytes():
  """gcsfs ends lines with a newline alone, the others with a carriage return before it."""
  for newline in (b"\n", b"\r\n"):
    data = b"\r\n1\r" if newline == b"\r\n" else b"\n1\r"
    lines = [b"--x", b"Content-Type: a", b"", b'{"name": "n"}', b"--x", b"Content-Type: b", b"", data, b"--x--"]
    api = Api(Buckets(("b",)))
    headers = {"content-type": "multipart/related; boundary='x'"}
    api.answer(Request("POST", "/upload/storage/v1/b/b/o?uploadType=multipart", headers, newline.join(lines)))
    assert api.buckets.objects("b")["n"].data == data
