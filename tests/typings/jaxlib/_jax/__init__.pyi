# What `make lint` believes of jaxlib's extension, which has no types: only the classes that signatures name.

from typing import Any

class Device:
  id: int
  process_index: int
  platform: str
  device_kind: str
  def memory_stats(self) -> dict[str, int] | None: ...
  def __getattr__(self, name: str) -> Any: ...

class pytree:
  class PyTreeDef:
    def unflatten(self, leaves: Any) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...

def __getattr__(name: str) -> Any: ...
