"""What a finished run suggests: commands that repeat its own, quoted for a shell."""

import shlex

from dmpo_jax.run.suggestions import suggest

PROGRAM = "python -m dmpo_jax.main"
OWN = ["--config=configs/smoke.py", "--workdir=runs/my run", "--config.seed=1"]


def test_suggestions_repeat_the_command_and_its_overrides():
  found = [shlex.split(command) for _, command in suggest([PROGRAM, *OWN, "--quiet", "--mode=train"], "2 + 2 = ?")]
  assert [command[:6] for command in found] == [[*PROGRAM.split(), *OWN]] * 3
  assert found[0][6:] == ["--mode=sample", "--watch", "--prompt=2 + 2 = ?"]
  assert found[1][6:] == ["--mode=serve"]
  assert found[2][6:] == ["--mode=eval", "--config.eval.samplers=('llada','parallel','wino')"]


def test_a_prompt_that_fits_no_command_is_left_to_the_reader():
  for prompt in ("", "two\nlines", "x" * 61):
    assert suggest([PROGRAM, *OWN], prompt)[0][1].endswith("--watch --prompt=TEXT")
