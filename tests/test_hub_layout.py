"""Where tensors belong: axes, and tensors that do not fit the model."""

import numpy as np
import pytest
from recorded_models import load, settings, tensors

from dmpo_jax.hub.layout import check_tensors, checkpoint_places
from dmpo_jax.hub.model_config import model_config_from_hf


def test_kernels_are_input_first():
  _, variables = load("m2_gqa")
  gate = tensors("m2_gqa")["model.transformer.blocks.1.ff_proj.weight"]
  np.testing.assert_array_equal(variables["params"]["blocks"]["ff_proj"]["kernel"][1], gate.T)


def test_a_tied_model_has_no_head():
  assert "head" not in load("m3_tied")[1]["params"]


def test_tensors_that_do_not_fit_are_named():
  shapes = {name: array.shape for name, array in tensors("m3_tied").items()}
  places = checkpoint_places(model_config_from_hf(settings("m3_tied")), "llada")
  check_tensors(shapes, places, "x")
  missing = {name: shape for name, shape in shapes.items() if "blocks.1.k_proj" not in name}
  with pytest.raises(ValueError, match=r"1 missing \(model.transformer.blocks.1.k_proj.weight\)"):
    check_tensors(missing, places, "x")
  with pytest.raises(ValueError, match=r"1 unknown \(model.extra\)"):
    check_tensors(shapes | {"model.extra": (1,)}, places, "x")
  message = r"1 misshapen \(model.transformer.ln_f.weight has \[3\], the config asks for \[32\]"
  with pytest.raises(ValueError, match=message):
    check_tensors(shapes | {"model.transformer.ln_f.weight": (3,)}, places, "x")
