"""Buckets in memory: objects with generations and preconditions, as in Google Cloud Storage."""

import base64
import dataclasses
import hashlib
import itertools
import time
from collections.abc import Mapping
from typing import Any

import google_crc32c

PAGE = 1000  # entries in a page of a listing, unless the request asks for fewer


class Refused(Exception):
  """A request cannot be served: an HTTP status and the reason."""

  def __init__(self, status: int, reason: str):
    super().__init__(f"{status} {reason}")
    self.status, self.reason = status, reason


@dataclasses.dataclass(frozen=True)
class Object:
  """One version of an object: its bytes and metadata."""

  data: bytes
  generation: int
  updated: float  # seconds since the epoch
  created: float
  metageneration: int = 1
  content_type: str = "application/octet-stream"
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def describe(self, bucket: str, name: str) -> dict[str, Any]:
    """Return the JSON resource of the object."""
    return {
      "kind": "storage#object",
      "id": f"{bucket}/{name}/{self.generation}",
      "bucket": bucket,
      "name": name,
      "generation": str(self.generation),
      "metageneration": str(self.metageneration),
      "size": str(len(self.data)),
      "md5Hash": base64.b64encode(hashlib.md5(self.data).digest()).decode(),
      "crc32c": base64.b64encode(google_crc32c.Checksum(self.data).digest()).decode(),
      "timeCreated": _rfc3339(self.created),
      "updated": _rfc3339(self.updated),
      "contentType": self.content_type,
      "metadata": dict(self.metadata),
      "storageClass": "STANDARD",
      "etag": str(self.generation),
    }


class Buckets:
  """Buckets by name, each with its objects by name."""

  def __init__(self, names: tuple[str, ...] = ()):
    self._buckets: dict[str, dict[str, Object]] = {name: {} for name in names}
    self._generations = itertools.count(int(time.time() * 1e6))

  def create(self, bucket: str) -> None:
    """Create an empty bucket, unless it exists."""
    self._buckets.setdefault(bucket, {})

  def objects(self, bucket: str) -> dict[str, Object]:
    """Return the objects of a bucket; changing the dict changes the bucket."""
    if bucket not in self._buckets:
      raise Refused(404, f"The specified bucket does not exist: {bucket}")
    return self._buckets[bucket]

  def get(self, bucket: str, name: str, conditions: Mapping[str, str]) -> Object:
    """Return the current version of an object, if it meets the conditions."""
    found = self.objects(bucket).get(name)
    if found is None or conditions.get("generation", str(found.generation)) != str(found.generation):
      raise Refused(404, f"No such object: {bucket}/{name}")
    self.check(bucket, name, conditions)
    return found

  def put(self, bucket: str, name: str, data: bytes, conditions: Mapping[str, str], **metadata: Any) -> Object:
    """Write an object, which gets a new generation."""
    self.check(bucket, name, conditions)
    now = time.time()
    made = Object(data, next(self._generations), updated=now, created=now, **metadata)
    self.objects(bucket)[name] = made
    return made

  def patch(self, bucket: str, name: str, about: Mapping[str, Any], conditions: Mapping[str, str]) -> Object:
    """Change the metadata of an object, which keeps its generation; a key whose value is None is removed."""
    old = self.get(bucket, name, conditions)
    metadata = {key: value for key, value in {**old.metadata, **(about.get("metadata") or {})}.items() if value}
    changed = dataclasses.replace(
      old,
      metageneration=old.metageneration + 1,
      updated=time.time(),
      content_type=about.get("contentType") or old.content_type,
      metadata=metadata,
    )
    self.objects(bucket)[name] = changed
    return changed

  def delete(self, bucket: str, name: str, conditions: Mapping[str, str]) -> None:
    """Remove an object."""
    self.get(bucket, name, conditions)
    del self.objects(bucket)[name]

  def check(self, bucket: str, name: str, conditions: Mapping[str, str]) -> None:
    """Check the preconditions of a request; a missing object has generation 0."""
    found = self.objects(bucket).get(name)
    current = {
      "Generation": found.generation if found else 0,
      "Metageneration": found.metageneration if found else 0,
    }
    for what, number in current.items():
      if int(conditions.get(f"if{what}Match", number)) != number:
        raise Refused(412, "conditionNotMet")
      if int(conditions.get(f"if{what}NotMatch", -1)) == number:
        raise Refused(304, "notModified")

  def listing(self, bucket: str, query: Mapping[str, str]) -> dict[str, Any]:
    """Return a page of the objects of a bucket, and of the prefixes that end at the delimiter, sorted by name."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    objects, prefixes = self.objects(bucket), set()
    names = set()
    for name in objects:
      is_outside = name < query.get("startOffset", "") or (query.get("endOffset") and name >= query["endOffset"])
      if is_outside or not name.startswith(prefix):
        continue
      end = name.find(delimiter, len(prefix)) + len(delimiter) if delimiter else 0
      if end < max(len(delimiter), 1):  # no delimiter after the prefix
        names.add(name)
        continue
      prefixes.add(name[:end])
      if name[:end] == name and query.get("includeTrailingDelimiter") == "true":
        names.add(name)
    keys = sorted(key for key in names | prefixes if key > query.get("pageToken", ""))
    limit = int(query.get("maxResults", PAGE))
    page = keys[:limit]
    found: dict[str, Any] = {"kind": "storage#objects"}
    if items := [objects[name].describe(bucket, name) for name in page if name in names]:
      found["items"] = items
    if folded := [key for key in page if key in prefixes]:
      found["prefixes"] = folded
    if len(keys) > limit:
      found["nextPageToken"] = page[-1]
    return found


def _rfc3339(when: float) -> str:
  return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(when))}.{int(when % 1 * 1000):03d}Z"
