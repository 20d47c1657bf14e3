"""Which variables of a model are trained, and which make the trained and the reference policy."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from dmpo_jax.models.config import ModelConfig
from dmpo_jax.structs import Params

TRAINED_DTYPE = "float32"  # of trained parameters and their moments: bfloat16 would round small updates away
COMPUTED = ("kernel", "head")  # ends of the names of what layers round to the activations' dtype and all-gather

Leaf = jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Trainable:
  """Either all of a model's parameters are learned, or adapters on parameters that stay frozen.

  Args:
    has_adapters: adapters (the collection "lora") are learned; False: all parameters ("params").
    dtype: of the activations.
  """

  has_adapters: bool
  dtype: str

  @classmethod
  def of(cls, config: ModelConfig) -> "Trainable":
    """Return what is trained of a model."""
    return cls(config.lora is not None, config.dtype)

  @property
  def collection(self) -> str:
    """The collection of variables that is trained, saved and exported."""
    return "lora" if self.has_adapters else "params"

  def policy(self, trained: PyTree, frozen: PyTree) -> Params:
    """Return the trained policy's variables: adapters on the frozen parameters, or the trained parameters alone."""
    return {"params": frozen, "lora": trained} if self.has_adapters else {"params": trained}

  def reference(self, frozen: PyTree, copy: PyTree = None) -> Params:
    """Return the reference policy's variables.

    Args:
      frozen: the base parameters.
      copy: an earlier state of what is trained, if the reference follows the policy; None: the reference is the base.
        A copy of adapters shares the base, so the model is held once.
    """
    return {"params": frozen} if copy is None else self.policy(copy, frozen)

  def computing(self, trained: PyTree) -> PyTree:
    """Round trained parameters to the activations' dtype once, as layers would at every use. Adapters stay float32.

    Rounded parameters are half the bytes to gather. The embedding stays float32: only single rows of it are read, and
    the gradients of all uses of a token are summed in its dtype.

    Args:
      trained: arrays, or their descriptions (`jax.ShapeDtypeStruct`), whose dtypes change likewise.
    """
    if self.has_adapters:
      return trained

    def cast(path: KeyPath, leaf: Leaf) -> Leaf:
      if not path[-1].key.endswith(COMPUTED) or leaf.dtype == jnp.dtype(self.dtype):
        return leaf
      return leaf.astype(self.dtype) if isinstance(leaf, jax.Array) else leaf.update(dtype=self.dtype)

    return jax.tree.map_with_path(cast, trained)
