"""The way of a user, step by step: each runs the user's own commands and checks what they leave."""

import dataclasses
import json
import pathlib
import signal
import time
from collections.abc import Callable, Sequence

from etils import epath
from ml_collections import ConfigDict

from dmpo_jax.tasks import user
from launch.outcome import arrays, compare
from launch.rehearse import checkpoint, checks, jobs
from launch.rehearse.jobs import Failed, Hosts, Job

MAIN = "dmpo_jax.main"
STEP_SECONDS = 900.0  # a command that takes longer hangs
PROMPT = "Write 7 words about rivers."
PREEMPTED, KILLED = 75, 128 + signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is rehearsed, and where.

  Attributes:
    config: the small configuration. arguments: of dmpo_jax.main, which make it.
    bucket: gets the checkpoint and the runs. folder: on this machine, gets logs and what hosts keep for themselves.
    hosts: that run it first. others: that go on with it, as many devices on half the hosts.
    is_own_task: whether the task is the rehearsal's, of which the rewards are known to vary.
  """

  config: ConfigDict
  arguments: Sequence[str]
  bucket: epath.Path
  folder: pathlib.Path
  hosts: Hosts
  others: Hosts
  is_own_task: bool

  @property
  def undisturbed(self) -> epath.Path:
    """The workdir of the run that is left alone."""
    return self.bucket / "undisturbed"

  @property
  def run(self) -> epath.Path:
    """The workdir of the run that is preempted, killed and resumed."""
    return self.bucket / "run"

  @property
  def one_host(self) -> Hosts:
    """For commands that need no slice."""
    return dataclasses.replace(self.hosts, processes=1, devices=1)

  def num_held_out(self, task: str) -> int:
    """How many prompts of a task are evaluated: a user's file may have fewer than are asked for."""
    num = self.config.eval.num_prompts
    if not user.is_file(task):
      return num
    return min(len(list(user.load(task, grader=self.config.task.user.grader).records("test"))), num)

  def logs(self, step: str) -> pathlib.Path:
    """Where a step's processes write what they print."""
    return self.folder / "logs" / step

  def start(self, step: str, workdir: epath.Path, hosts: Hosts, *more: str):
    """Start dmpo_jax.main on all hosts."""
    init = f"--config.model.init_from={self.bucket / 'checkpoint'}"
    return jobs.running(MAIN, [*self.arguments, init, f"--workdir={workdir}", *more], hosts, self.logs(step))


@dataclasses.dataclass(frozen=True)
class Step:
  """A step: `act` does it and returns what was checked."""

  name: str
  what: str
  act: Callable[[Plan], list[str]]


def convert(plan: Plan) -> list[str]:
  """Make a checkpoint in Hugging Face's layout and convert it into the bucket."""
  count = checkpoint.write(plan.folder / "hf", plan.config)
  dtype = ["--dtype=int8"] if plan.config.model.quantization == "int8" else []
  out = plan.bucket / "checkpoint"
  arguments = [f"--hf={plan.folder / 'hf'}", f"--out={out}", *dtype]
  with jobs.running("launch.convert_hf", arguments, plan.one_host, plan.logs("convert")) as job:
    _finish(job, plan.one_host)
  return [f"{count:,} parameters", checks.exists(out / "model.json", "model.json is there")]


def train_undisturbed(plan: Plan) -> list[str]:
  """Train from beginning to end."""
  with plan.start("undisturbed", plan.undisturbed, plan.hosts) as job:
    _finish(job, plan.hosts)
  return [*_whole(plan, plan.undisturbed), checks.rewards(plan.undisturbed, must_vary=plan.is_own_task)]


def preempt(plan: Plan) -> list[str]:
  """Give one process of the run the notice of preemption: all save and end."""
  with plan.start("preempted", plan.run, plan.hosts) as job:
    _wait_for_row(plan, job, 1)
    job.signal(plan.hosts.processes - 1, signal.SIGTERM)
    begun = time.monotonic()
    job.expect([PREEMPTED] * plan.hosts.processes, STEP_SECONDS)
    seconds = time.monotonic() - begun
  return [f"all {plan.hosts.processes} ended with {PREEMPTED}, {seconds:.1f} s after the signal"]


def kill(plan: Plan) -> list[str]:
  """Go on, then kill one process: the others stop, so that they can be started again."""
  before, starts = checks.last_row(plan.run), _num_starts(plan.run)
  with plan.start("killed", plan.run, plan.hosts) as job:
    job.wait_for("the start", lambda: _num_starts(plan.run) > starts, STEP_SECONDS)
    _wait_for_row(plan, job, min(before + 1, plan.config.train.num_buffers - 1))
    victim = plan.hosts.processes - 1
    job.signal(victim, signal.SIGKILL)
    begun = time.monotonic()
    codes = job.codes(STEP_SECONDS)
    seconds = time.monotonic() - begun
  left = codes[:victim]
  if codes[victim] != KILLED or min(left) <= 2:  # launch/pods/supervise.sh starts again what ended with more than 2
    raise Failed(f"the others stop, to be started again: exit codes {codes}", job.logs[0])
  return [f"went on after row {before}", f"the others ended with {sorted(set(left))}, {seconds:.1f} s after the kill"]


def resume(plan: Plan) -> list[str]:
  """Go on to the end, on half the hosts with twice the devices."""
  before, starts = checks.last_row(plan.run), _num_starts(plan.run)
  with plan.start("resumed", plan.run, plan.others) as job:
    _finish(job, plan.others)
  if _num_starts(plan.run) != starts + 1:
    raise Failed(f"the start is recorded: {plan.run}/starts.jsonl has not one line more than {starts}", job.logs[0])
  return [f"went on after row {before}", *_whole(plan, plan.run), checks.ends_alike(plan.undisturbed, plan.run)]


def evaluate(plan: Plan) -> list[str]:
  """Evaluate the policies; where no tasks are named, on one whose prompts are made on each host."""
  own = plan.config.eval
  names = tuple(own.tasks or ("sudoku",))
  with plan.start("eval", plan.run, plan.others, "--mode=eval", f"--config.eval.tasks={names!r}") as job:
    _finish(job, plan.others)
  num_settings = max(len(own.lengths), 1) * max(len(own.samplers), 1)
  return [checks.evaluations(plan.run, {name: plan.num_held_out(name) for name in names}, num_settings)]


def sample(plan: Plan) -> list[str]:
  """Decode one prompt, which is fewer than there are devices."""
  with plan.start("sample", plan.run, plan.others, "--mode=sample", f"--prompt={PROMPT}", "--json", "--quiet") as job:
    _finish(job, plan.others)
  lines = [line for line in job.output().splitlines() if line.startswith("{")]
  told = [json.loads(line) for line in lines]
  if len(told) != 1 or told[0]["prompt"] != PROMPT or not told[0]["ids"]:
    raise Failed(f"one completion is printed: there are {len(told)}", job.logs[0])
  return [f"a completion of {len(told[0]['ids'])} tokens in {told[0]['calls']} model calls"]


def export(plan: Plan) -> list[str]:
  """Export to Hugging Face's layout, and convert that again: what was not trained must come back as it was."""
  out, again = plan.bucket / "exported", plan.folder / "converted_again"
  with jobs.running(
    "launch.export_hf", [f"--run={plan.run}", f"--out={out}"], plan.one_host, plan.logs("export")
  ) as job:
    _finish(job, plan.one_host)
  arguments = [f"--hf={out}", f"--out={again}"]
  with jobs.running("launch.convert_hf", arguments, plan.one_host, plan.logs("convert_again")) as job:
    _finish(job, plan.one_host)
  lora, is_rounded = plan.config.model.lora, plan.config.model.quantization == "int8"
  source = plan.bucket / "checkpoint" / "params" if lora.rank else plan.run / "policy"
  changed = tuple(f"['{name}']['kernel']" for name in lora.targets) if lora.rank else ()
  changed = ("['kernel']", "['kernel_scale']") if is_rounded or "all" in lora.targets else changed
  wanted, got = (
    {name: array for name, array in arrays(epath.Path(path)).items() if not name.endswith(changed)}
    for path in (source, again / "params")
  )
  if difference := compare(wanted, got):
    raise Failed(f"exported weights are the run's: {difference}, in {out}")
  return ["the exported folder loads", f"{len(wanted)} arrays that were not trained are as they were"]


STEPS = (
  Step("convert", "launch.convert_hf, a checkpoint into the bucket", convert),
  Step("train", "undisturbed, to its end", train_undisturbed),
  Step("preempt", "SIGTERM to one process of the other run", preempt),
  Step("kill", "resumed, SIGKILL to one process", kill),
  Step("resume", "on half the hosts with twice the devices, to its end", resume),
  Step("evaluate", "--mode=eval", evaluate),
  Step("sample", "--mode=sample", sample),
  Step("export", "launch.export_hf into the bucket, and converted again", export),
)


def _finish(job: Job, hosts: Hosts) -> None:
  job.expect([0] * hosts.processes, STEP_SECONDS)


def _wait_for_row(plan: Plan, job: Job, step: int) -> None:
  job.wait_for(f"row {step} of {plan.run}/metrics.jsonl", lambda: checks.last_row(plan.run) >= step, STEP_SECONDS)


def _whole(plan: Plan, workdir: epath.Path) -> list[str]:
  """Check what a finished run must have left."""
  return [
    checks.rows_in_order(workdir, plan.config.train.num_buffers),
    checks.generations(workdir, plan.num_held_out(plan.config.task.name)),
    checks.exists(workdir / "report.html", "report"),
  ]


def _num_starts(workdir: epath.Path) -> int:
  return len((workdir / "starts.jsonl").read_text().splitlines())
