"""Safetensors files of a folder in Hugging Face's layout: read by rows and written one shard at a time.

A file is a JSON header with each tensor's dtype, shape and offset, and then the bytes. Plain reads, unlike memory maps,
keep a conversion's memory at one piece, whatever the size of the shards.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


class Tensor(NamedTuple):
  """A tensor on disk."""

  file: epath.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int  # offset of its bytes in the file

  @property
  def size(self) -> int:
    """Number of bytes."""
    return self.dtype.itemsize * int(np.prod(self.shape))


class Shards(Mapping[str, np.ndarray]):
  """The tensors of a folder by name: of `name.safetensors`, or of the shards in `name.safetensors.index.json`.

  All headers are read and checked at once; tensors are read on access.
  """

  def __init__(self, folder: epath.PathLike, name: str = WEIGHTS):
    """Open `folder`, local or gs://.

    Raises:
      ValueError: there are no weights; a shard is missing, cut off or not a safetensors file; a file or a tensor is not
        in the index, or a tensor is in two files; or a dtype is not a float.
    """
    folder = epath.Path(folder)
    index = folder / f"{name}.index.json"
    if index.is_file():
      places = _read_index(index)
    elif (folder / name).is_file():
      places = None
    else:
      pickled = ", ".join(sorted(path.name for path in folder.glob("pytorch_model*.bin")))
      remedy = f"{pickled} cannot be read: have transformers save it again" if pickled else ""
      remedy = remedy or "give a folder in Hugging Face's layout"
      raise ValueError(f"{folder} holds neither {name} nor {index.name}: {remedy}")
    files = {name} if places is None else set(places.values())
    _check_files(folder, files, name)
    self.tensors: dict[str, Tensor] = {}
    for file in sorted(files):
      tensors = read_header(folder / file)
      if twice := sorted(tensors.keys() & self.tensors.keys()):
        first = self.tensors[twice[0]].file.name
        raise ValueError(f"{folder}: {twice[0]} is in {first} and in {file} ({len(twice)} such); remove one of them")
      self.tensors |= tensors
    if places is not None:
      _check_index(index, places, self.tensors)
    if not self.tensors:
      raise ValueError(f"{folder}: its safetensors files are empty")

  def __getitem__(self, name: str) -> np.ndarray:
    shape = self.tensors[name].shape
    return self.read_rows(name, 0, shape[0]) if shape else self.read_rows(name, 0, 1).reshape(())

  def __iter__(self) -> Iterator[str]:
    return iter(self.tensors)

  def __len__(self) -> int:
    return len(self.tensors)

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """Read the rows [start, stop) of a tensor.

    Raises:
      ValueError: the file has been cut since it was opened.
    """
    file, dtype, shape, offset = self.tensors[name]
    row = dtype.itemsize * int(np.prod(shape[1:]))
    with file.open("rb") as stream:
      stream.seek(offset + start * row)
      data = stream.read((stop - start) * row)
    if len(data) != (stop - start) * row:
      raise ValueError(f"{file} is cut off: it ends inside {name}")
    return np.frombuffer(data, dtype).reshape(-1, *shape[1:])


class Parts(Shards):
  """A folder of which some tensors are seen as parts, one below the other, under names of their own.

  Args:
    parts: the number of rows of each part, by tensor and by the part's name.
  """

  def __init__(self, shards: Shards, parts: Mapping[str, Mapping[str, int]]):
    self._shards = shards
    self.tensors = {name: tensor for name, tensor in shards.tensors.items() if name not in parts}
    self._places: dict[str, tuple[str, int]] = {}  # the tensor, and the part's first row in it
    for name, rows in parts.items():
      first, tensor = 0, shards.tensors[name]
      for part, number in rows.items():
        self.tensors[part] = tensor._replace(shape=(number, *tensor.shape[1:]))
        self._places[part] = name, first
        first += number

  def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """Read the rows [start, stop) of a tensor or part."""
    tensor, first = self._places.get(name, (name, 0))
    return self._shards.read_rows(tensor, first + start, first + stop)


def read_header(path: epath.Path) -> dict[str, Tensor]:
  """Read the header of a safetensors file, and check that the file is whole.

  Raises:
    ValueError: it is cut off or not a safetensors file, or has tensors that are not floats.
  """
  size = path.stat().length
  with path.open("rb") as stream:
    first = stream.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 0 < length <= min(_MAX_HEADER, size - 8):
      raise ValueError(f"{path} is cut off or not a safetensors file: {size} bytes")
    header = stream.read(length)
  try:
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
  except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not a safetensors file: its header cannot be read ({error!r})") from error
  end = 8 + length
  for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
    if tensor.start != end:  # the format leaves no gaps and shares no bytes
      raise ValueError(f"{path} is damaged: {name} begins at byte {tensor.start}, the tensor before it ends at {end}")
    end += tensor.size
  if end != size:
    raise ValueError(f"{path} is cut off or damaged: its header describes {end} bytes, the file has {size}")
  return tensors


def _tensor(path: epath.Path, name: str, entry: Mapping[str, Any], data: int) -> Tensor:
  if entry["dtype"] not in DTYPES:
    raise ValueError(f"{path}: {name} has the dtype {entry['dtype']}; it must be one of {', '.join(DTYPES)}")
  shape, offsets = entry["shape"], entry["data_offsets"]
  if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
    raise ValueError(f"{path} is damaged: {name} has the shape {shape} and the data_offsets {offsets}")
  tensor = Tensor(path, DTYPES[entry["dtype"]], tuple(shape), data + offsets[0])
  if offsets[1] - offsets[0] != tensor.size:
    raise ValueError(f"{path} is damaged: {name} has {offsets[1] - offsets[0]} bytes for the shape {shape}")
  return tensor


def _are_counts(values: object) -> bool:
  return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _read_index(path: epath.Path) -> dict[str, str]:
  try:
    places = dict(json.loads(path.read_text())["weight_map"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{path} is not an index of shards ({error!r})") from error
  for name, file in places.items():
    if not isinstance(file, str):
      raise ValueError(f"{path} is not an index of shards: it places {name} in {file!r}, which is no file name")
  return places


def _check_files(folder: epath.Path, files: set[str], name: str) -> None:
  """Compare the files that belong to the weights `name` with those in the folder."""
  index = folder / f"{name}.index.json"
  if missing := sorted(file for file in files if not (folder / file).is_file()):
    raise ValueError(f"{index} lists shards that are missing: {', '.join(missing)}")
  stem, suffix = name.split(".")
  if unlisted := sorted({path.name for path in folder.glob(f"{stem}*.{suffix}")} - files):
    problem = f"{index.name} does not list them" if index.is_file() else f"there is no {index.name}"
    raise ValueError(f"{folder} has {', '.join(unlisted)}, but {problem}: remove what does not belong to the model")


def _check_index(index: epath.Path, places: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
  """Compare the files that the index gives for tensors with those that hold them."""
  lost = sorted(name for name, file in places.items() if name not in tensors or tensors[name].file.name != file)
  if lost:
    raise ValueError(f"{index} places {lost[0]} in {places[lost[0]]}, which does not hold it ({len(lost)} such)")
  if unlisted := sorted(tensors.keys() - places.keys()):
    file = tensors[unlisted[0]].file.name
    raise ValueError(f"{index} does not list {unlisted[0]}, which is in {file} ({len(unlisted)} such)")


def write_file(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Write one file of tensors, local or in a bucket; the safetensors library writes local files only, with mode 0600.

  Wider dtypes come first, as readers expect a tensor to begin at a multiple of its dtype's size.
  """
  names = {dtype: name for name, dtype in DTYPES.items()}
  ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, array in ordered:
    header[name] = {"dtype": names[array.dtype], "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
    end += array.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as stream:
    stream.write(struct.pack("<Q", len(text)) + text)
    for _, array in ordered:
      stream.write(array.tobytes())


def write_shards(
  folder: epath.Path, sizes: Mapping[str, int], tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> list[str]:
  """Write tensors into shards of at most `max_bytes`, unless one tensor is larger; return the files' names.

  One shard is `model.safetensors`; several have an index.

  Args:
    sizes: bytes of every tensor, by name.
    tensors: names and values in the order of `sizes`, one at a time.
  """
  shards = _split(sizes, max_bytes)
  files = [WEIGHTS]
  if len(shards) > 1:
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
  tensors = iter(tensors)
  for file, names in zip(files, shards, strict=True):
    write_file(folder / file, dict(next(tensors) for _ in names))
  if len(shards) > 1:
    places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    files.append(f"{WEIGHTS}.index.json")
  return files


def _split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
  """Split tensor names into shards."""
  shards: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if shards[-1] and filled + size > max_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards
