"""The steps of a rehearsal: each runs the user's own commands and checks what they leave."""

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
STEP_SECONDS = 900.0  # a command that takes longer counts as hanging
PROMPT = "Write 7 words about rivers."
PREEMPTED, KILLED = 75, 128 + signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Plan:
  """The settings of a rehearsal.

  Attributes:
    config: the small configuration.
    arguments: those of dmpo_jax.main that result in it.
    bucket: holds the checkpoint and the runs.
    folder: on this machine, for logs and the folders of the hosts.
    hosts: start the runs.
    others: resume them: half as many hosts, with as many devices in total.
    is_own_task: the task is that of the rehearsal, whose rewards vary.
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
    """Return the workdir of the undisturbed run."""
    return self.bucket / "undisturbed"

  @property
  def run(self) -> epath.Path:
    """Return the workdir of the run that is preempted, killed and resumed."""
    return self.bucket / "run"

  @property
  def one_host(self) -> Hosts:
    """Return the single host of commands that need no slice."""
    return dataclasses.replace(self.hosts, processes=1, devices=1)

  def num_held_out(self, task: str) -> int:
    """Return the number of evaluated prompts of a task: a user's file may have fewer than configured."""
    num = self.config.eval.num_prompts
    if not user.is_file(task):
      return num
    own = user.load(task, grader=self.config.task.user.grader)
    return min(len(list(own.records("test"))), num)

  def logs(self, step: str) -> pathlib.Path:
    """Return the folder of the output of a step's processes."""
    return self.folder / "logs" / step

  def start(self, step: str, workdir: epath.Path, hosts: Hosts, *more: str):
    """Start dmpo_jax.main on all hosts."""
    init = f"--config.model.init_from={self.bucket / 'checkpoint'}"
    return jobs.running(MAIN, [*self.arguments, init, f"--workdir={workdir}", *more], hosts, self.logs(step))


@dataclasses.dataclass(frozen=True)
class Step:
  """A step: `act` does it and returns descriptions of what was checked."""

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
  return [f"{count:,} parameters", checks.exists(out / "model.json", "model.json exists")]


def train_undisturbed(plan: Plan) -> list[str]:
  """Train without interruption."""
  with plan.start("undisturbed", plan.undisturbed, plan.hosts) as job:
    _finish(job, plan.hosts)
  return [*_whole(plan, plan.undisturbed), checks.rewards(plan.undisturbed, must_vary=plan.is_own_task)]


def preempt(plan: Plan) -> list[str]:
  """Send the notice of preemption to one process: all must save and end."""
  with plan.start("preempted", plan.run, plan.hosts) as job:
    _wait_for_row(plan, job, 1)
    job.signal(plan.hosts.processes - 1, signal.SIGTERM)
    begun = time.monotonic()
    job.expect([PREEMPTED] * plan.hosts.processes, STEP_SECONDS)
    seconds = time.monotonic() - begun
  return [f"all {plan.hosts.processes} ended with {PREEMPTED}, {seconds:.1f} s after the signal"]


def kill(plan: Plan) -> list[str]:
  """Resume, then kill one process: the others must stop, so that all can be started again."""
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
  if codes[victim] != KILLED or min(left) <= 2:  # launch/pods/supervise.sh restarts after more than 2
    raise Failed(f"the other processes stop for a restart: exit codes {codes}", job.logs[0])
  return [f"resumed after row {before}", f"the others ended with {sorted(set(left))}, {seconds:.1f} s after the kill"]


def resume(plan: Plan) -> list[str]:
  """Resume on half the hosts with twice the devices, until the run is finished."""
  before, starts = checks.last_row(plan.run), _num_starts(plan.run)
  with plan.start("resumed", plan.run, plan.others) as job:
    _finish(job, plan.others)
  if _num_starts(plan.run) != starts + 1:
    raise Failed(f"the start is recorded: {plan.run}/starts.jsonl must have one line more than {starts}", job.logs[0])
  return [f"resumed after row {before}", *_whole(plan, plan.run), checks.ends_alike(plan.undisturbed, plan.run)]


def evaluate(plan: Plan) -> list[str]:
  """Evaluate the policies; if eval.tasks is empty, on a task whose prompts are generated on each host."""
  own = plan.config.eval
  names = tuple(own.tasks or ("sudoku",))
  with plan.start("eval", plan.run, plan.others, "--mode=eval", f"--config.eval.tasks={names!r}") as job:
    _finish(job, plan.others)
  num_settings = max(len(own.lengths), 1) * max(len(own.samplers), 1)
  return [checks.evaluations(plan.run, {name: plan.num_held_out(name) for name in names}, num_settings)]


def sample(plan: Plan) -> list[str]:
  """Sample for a single prompt, fewer than there are devices."""
  with plan.start("sample", plan.run, plan.others, "--mode=sample", f"--prompt={PROMPT}", "--json", "--quiet") as job:
    _finish(job, plan.others)
  lines = [line for line in job.output().splitlines() if line.startswith("{")]
  found = [json.loads(line) for line in lines]
  if len(found) != 1 or found[0]["prompt"] != PROMPT or not found[0]["ids"]:
    raise Failed(f"one completion is printed: there are {len(found)}", job.logs[0])
  return [f"a completion of {len(found[0]['ids'])} tokens in {found[0]['calls']} model calls"]


def export(plan: Plan) -> list[str]:
  """Export to Hugging Face's layout and convert the result: untrained arrays must be unchanged."""
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
  changed = ("['kernel']",) if "all" in lora.targets else changed
  changed = ("kernel']", "kernel_scale']") if is_rounded else changed
  wanted, got = (
    {name: array for name, array in arrays(epath.Path(path)).items() if not name.endswith(changed)}
    for path in (source, again / "params")
  )
  if difference := compare(wanted, got):
    raise Failed(f"exported weights equal the run's: {difference}, in {out}")
  return ["the exported folder loads", f"{len(wanted)} arrays that were not trained are unchanged"]


STEPS = (
  Step("convert", "launch.convert_hf, a checkpoint into the bucket", convert),
  Step("train", "the undisturbed run", train_undisturbed),
  Step("preempt", "SIGTERM to one process of the other run", preempt),
  Step("kill", "resumed, SIGKILL to one process", kill),
  Step("resume", "on half the hosts with twice the devices", resume),
  Step("evaluate", "--mode=eval", evaluate),
  Step("sample", "--mode=sample", sample),
  Step("export", "launch.export_hf into the bucket, then launch.convert_hf", export),
)


def _finish(job: Job, hosts: Hosts) -> None:
  job.expect([0] * hosts.processes, STEP_SECONDS)


def _wait_for_row(plan: Plan, job: Job, step: int) -> None:
  job.wait_for(f"row {step} of {plan.run}/metrics.jsonl", lambda: checks.last_row(plan.run) >= step, STEP_SECONDS)


def _whole(plan: Plan, workdir: epath.Path) -> list[str]:
  """Check what every finished run must leave."""
  return [
    checks.rows_in_order(workdir, plan.config.train.num_buffers),
    checks.generations(workdir, plan.num_held_out(plan.config.task.name)),
    checks.exists(workdir / "report.html", "report"),
  ]


def _num_starts(workdir: epath.Path) -> int:
  return len((workdir / "starts.jsonl").read_text().splitlines())
