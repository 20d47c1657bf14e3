"""Operations executed against needed: every cause is what a program without it would save."""

import jax
import pytest
import tiny
from ml_collections import ConfigDict

from launch.bench import costs, operations, programs, workload

LENGTH = 18  # to which prompts are padded


def counted(devices, lengths, **changes):
  """Operations of a gradient for a buffer; and a function that counts them with other keys."""
  config = tiny.config(model__lora__rank=2, **changes)
  devices = jax.devices()[:devices]

  def traced(**keys):
    own = workload.changed(ConfigDict(config.to_dict()), {key.replace("__", "."): value for key, value in keys.items()})
    program = programs.trace("accumulate", own, *programs.place(own, devices))
    return programs.calls_of("accumulate", own) * costs.count_flops(program.jaxpr)

  return operations.count("accumulate", config, devices, lengths), traced


@pytest.mark.slow
def test_a_cause_is_what_a_program_without_it_saves():
  """Layers are recomputed, prompts padded, and each mask hides half of what goes through the head."""
  masks = dict(objective__antithetic=False, objective__min_mask_ratio=0.2, objective__max_mask_ratio=0.8)
  found, traced = counted(1, (6, 10), model__remat="full", **masks)
  assert found.executed == pytest.approx(traced())
  plain = traced(model__remat="none")
  assert found.causes["recomputation"] == pytest.approx(traced() - plain)
  shorter = [traced(model__remat="none", task__max_prompt_length=length) for length in (6, 10)]
  assert found.causes["padding"] == pytest.approx(plain - sum(shorter) / 2)
  size = programs.make_model(tiny.config()).config.embedding_size
  assert found.causes["head"] == pytest.approx((traced(model__embedding_size=2 * size) - traced()) / 2)
  assert max(map(abs, (found.causes["kernel"], found.causes["filled rows"]))) < 1e-6 * plain


@pytest.mark.slow
def test_rows_that_fill_up_the_devices_are_counted():
  """Three rollouts by two masks on eight devices: two of eight rows are copies. Nothing else but the last layer's."""
  own = dict(rollout__num_prompts=1, rollout__group_size=3, objective__num_mask_samples=2, model__remat="none")
  found, traced = counted(8, (LENGTH,), **own)
  size = programs.make_model(tiny.config()).config.embedding_size
  layers = found.executed - (traced(model__embedding_size=2 * size) - traced())
  assert found.causes["filled rows"] == pytest.approx(layers / 4)
  assert found.causes["last layer"] > 0  # only attention reads the prompt's positions there
  assert found.needed == pytest.approx(found.executed - layers / 4 - found.causes["last layer"])


def test_the_table_adds_up():
  found = [operations.Operations("score", 5e15, dict.fromkeys(operations.CAUSES, 0.5e15))]
  assert found[0].needed == 2e15
  layout = operations.table(found, peak=1e15)
  cells = [list(column.cells) for column in layout.columns]
  assert (cells[1][0], cells[1][-2:]) == ("5.0", ["2.0", "2.50"])
  assert cells[-1][0] == "5.0"
