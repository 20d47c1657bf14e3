"""What a person runs around the program: scripts that a linter passes, and the commands that they print."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from dmpo_jax import main
from dmpo_jax.config import command

ROOT = pathlib.Path(__file__).resolve().parent.parent
PODS = ROOT / "launch" / "pods"
SCRIPTS = sorted([*PODS.glob("*.sh"), *PODS.glob("*.sbatch")])


def run(*command, **environment):
  return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def tpu_vm(action, *options):
  return run(PODS / "tpu_vm.sh", action, "--name=pod", "--zone=z1", "--dry-run", *options)


def test_the_linter_passes_every_script():
  shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
  done = run(shellcheck, *SCRIPTS)
  assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run(script):
  assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
  ("options", "printed"),
  [
    (
      ("create", "--type=v5litepod-16", "--spot"),
      "gcloud compute tpus tpu-vm create pod --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot "
      "--zone=z1",
    ),
    (
      ("create", "--type=v6e-16", "--version=v2-alpha-tpuv6e", "--queued", "--project=mine"),
      "gcloud compute tpus queued-resources create pod --node-id=pod --accelerator-type=v6e-16 "
      "--runtime-version=v2-alpha-tpuv6e --zone=z1 --project=mine",
    ),
    (
      ("run", "--restarts=5", "--", "--config=configs/llada_8b.py", "--workdir=gs://b/run"),
      "gcloud compute tpus tpu-vm ssh pod --worker=all --command=cd dmpo_jax && nohup launch/pods/supervise.sh 5 "
      ".venv/bin/python -m dmpo_jax.main --config=configs/llada_8b.py --workdir=gs://b/run  > run.log 2>&1 "
      "< /dev/null & disown --zone=z1",
    ),
    (("tail",), "gcloud compute tpus tpu-vm ssh pod --worker=0 --command=tail -n 100 -f dmpo_jax/run.log --zone=z1"),
    (
      ("stop",),
      'gcloud compute tpus tpu-vm ssh pod --worker=all --command=pkill -TERM -f "[l]aunch/pods/supervise.sh" || true '
      "--zone=z1",
    ),
    (("delete",), "gcloud compute tpus tpu-vm delete pod --quiet --zone=z1"),
    (("delete", "--queued"), "gcloud compute tpus queued-resources delete pod --force --quiet --zone=z1"),
  ],
)
def test_a_dry_run_prints_the_command(options, printed):
  done = tpu_vm(*options)
  assert done.returncode == 0, done.stderr
  assert done.stdout.replace("\\", "").strip() == printed


def test_stop_finds_what_run_started():
  """Its pattern matches the supervisor's command line, and not the shell that `stop` itself runs in."""
  started, stopped = (tpu_vm(*options).stdout for options in (("run", "--", "--workdir=gs://b/run"), ("stop",)))
  (pattern,) = re.findall(r'-f "(.*?)"', stopped.replace("\\", ""))
  assert re.search(pattern, started.replace("\\", ""))
  assert not re.search(pattern, stopped.replace("\\", ""))


def test_set_up_copies_the_checkout_and_installs_it_with_a_python_of_its_own():
  archive, copy, install = tpu_vm("setup").stdout.splitlines()
  assert archive.startswith("git archive --format=tar.gz")
  assert copy.startswith("gcloud compute tpus tpu-vm scp")
  (remote,) = (word for word in shlex.split(install) if word.startswith("--command="))
  steps = remote.removeprefix("--command=").split(" && ")
  assert run("bash", "-n", "-c", " && ".join(steps)).returncode == 0
  assert steps[3:] == [
    "python3 -m pip install --user --quiet uv",
    "python3 -m uv venv --quiet --clear --python 3.11 .venv",
    f"python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt '{with_tpu()}'",
    ".venv/bin/python -c 'import jax, dmpo_jax.main; print(jax.__version__)'",
  ]


def with_tpu():
  """JAX with the libraries of TPUs, in the range that requirements.txt has."""
  return next(line for line in requirements("requirements.txt") if line.startswith("jax>")).replace("jax", "jax[tpu]")


def requirements(name):
  """What a list asks for, without its comments and the lists that it includes."""
  lines = ((ROOT / name).read_text()).splitlines()
  return [own for line in lines if (own := line.partition("#")[0].strip()) and not own.startswith("-r")]


def packages(name):
  """The packages of a list."""
  return set(map(canonical_name, requirements(name)))


def canonical_name(requirement):
  """The name of the package that a requirement is for, as pip compares names."""
  return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


INSTALLED = {canonical_name(found.metadata["Name"]) for found in importlib.metadata.distributions()}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("fly",), "unknown action fly"),
    (("create",), "--type=TYPE is missing"),
    (("run",), "give the arguments of dmpo_jax.main after --"),
    (("run", "--nmae=x"), "unknown option --nmae=x"),
  ],
)
def test_mistakes_are_named(options, message):
  done = tpu_vm(*options)
  assert done.returncode == 2
  assert message in done.stderr


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 1), (2, 1), (75, 3), (137, 3)])
def test_only_what_was_interrupted_is_started_again(tmp_path, code, starts):
  command = ("bash", "-c", f"echo started >> {tmp_path / 'log'}; exit {code}")
  done = run(PODS / "supervise.sh", "2", *command, SUPERVISE_PAUSE="0")
  assert done.returncode == code
  assert (tmp_path / "log").read_text().count("started") == starts


def test_a_signal_is_passed_on_and_ends_the_supervision(tmp_path):
  command = f"trap 'exit 75' TERM; echo ready > {tmp_path / 'log'}; while :; do sleep 0.05; done"
  process = subprocess.Popen([PODS / "supervise.sh", "9", "bash", "-c", command])
  while not (tmp_path / "log").exists():
    assert process.poll() is None
  process.terminate()
  assert process.wait(timeout=20) == 75


def test_a_signal_in_the_pause_ends_it():
  process = subprocess.Popen(
    [PODS / "supervise.sh", "9", "bash", "-c", "exit 75"],
    env={**os.environ, "SUPERVISE_PAUSE": "60"},
    stderr=subprocess.PIPE,
    text=True,
  )
  assert "restart 1 of 9" in process.stderr.readline()
  process.terminate()
  assert process.wait(timeout=20) == 75


def test_the_job_set_is_one_pod_a_host_and_restarts_only_what_was_interrupted():
  job_set = yaml.safe_load((PODS / "gke_jobset.yaml").read_text())
  assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (job,) = job_set["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  assert job["parallelism"] == job["completions"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"] == dockerfile()["ENTRYPOINT"][0]
  assert container["resources"]["limits"]["google.com/tpu"] == 4
  assert pod["restartPolicy"] == "Never"


def test_the_job_set_gives_up_where_the_supervisor_does(tmp_path):
  """With 1 and 2, whatever the program may end with."""
  job_set = yaml.safe_load((PODS / "gke_jobset.yaml").read_text())
  (job,) = job_set["spec"]["replicatedJobs"]
  (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
  (whole,) = job_set["spec"]["failurePolicy"]["rules"]
  assert (whole["action"], whole["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  killed = (128 + 6, 128 + 9)  # aborted, as JAX does when a process of the job died; out of the host's memory
  for code in (1, command.MISTAKE, main.INTERRUPTED, main.PREEMPTED, main.ABANDONED, *killed):
    supervised = run(PODS / "supervise.sh", "1", "bash", "-c", f"exit {code}", SUPERVISE_PAUSE="0")
    is_started_again = "restart 1 of 1" in supervised.stderr
    assert is_started_again == (code not in rule["onExitCodes"]["values"]), code


def dockerfile():
  """The instructions of the Dockerfile: their arguments by name, in order."""
  text = re.sub(r"^#.*\n", "", (PODS / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
  found = {}
  for line in filter(None, text.splitlines()):
    name, _, rest = line.partition(" ")
    found.setdefault(name, []).append(ast.literal_eval(rest) if rest.startswith("[") else shlex.split(rest))
  return found


@pytest.mark.slow
def test_the_steps_of_the_image_run(tmp_path):
  """Without Docker: a folder with nothing but the copied files starts the program; pip installs nothing new."""
  found = dockerfile()
  for source, target in found["COPY"]:
    path, copy = ROOT / source, tmp_path / target
    if path.is_dir():
      shutil.copytree(path, copy, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(path, copy)

  def step(*command):
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

  system, install, check = found["RUN"]
  assert "tini" in system
  assert install == ["pip", "install", "--no-cache-dir", "--requirement", "requirements.txt", with_tpu()]
  assert "tpu" in importlib.metadata.metadata("jax").get_all("Provides-Extra")
  assert "Would install" not in step("-m", *install[:2], "--dry-run", "--no-index", *install[3:-1])
  assert check[0] == "python"
  step(*check[1:])
  (entry,) = found["ENTRYPOINT"]
  assert entry[:3] == ["tini", "--", "python"]
  assert "--workdir" in step(*entry[3:], "--help")


# what a person develops with, and draws the documents' figures with
DEVELOPING = {"bench/growth", "study/estimators", "study/page"}


def test_what_a_run_imports_comes_with_its_list():
  root, installed = ROOT, with_what_they_need(packages("requirements.txt"))
  distributions = importlib.metadata.packages_distributions()
  own, optional = {"configs", "dmpo_jax", "launch"}, {"gguf", "wandb", "torch", "transformers", "peft"}
  developing = {root / "launch" / f"{name}.py" for name in DEVELOPING}
  for path in [path for folder in own for path in (root / folder).rglob("*.py") if path not in developing]:
    for node in ast.walk(ast.parse(path.read_text())):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      for name in {name.split(".")[0] for name in names} - own - optional - sys.stdlib_module_names:
        found = {canonical_name(one) for one in distributions[name]}
        assert found & installed, f"{path.relative_to(root)} imports {name}"


def with_what_they_need(names):
  """The packages, and all that are installed with them on a CPU, without their extras."""
  found, left = set(), set(names)
  while left:
    name = left.pop()
    found.add(name)
    needed = [requirement for requirement in importlib.metadata.requires(name) or () if "extra ==" not in requirement]
    left |= {name for one in needed if (name := canonical_name(one)) in INSTALLED} - found
  return found


def test_a_run_does_without_what_developing_needs():
  distributions = importlib.metadata.packages_distributions()
  assert packages("requirements-dev.txt") & packages("requirements.txt") == set()
  developing = packages("requirements-dev.txt") - with_what_they_need(packages("requirements.txt"))
  absent = [name for name, by in distributions.items() if set(map(canonical_name, by)) & developing]
  assert {"pytest", "ruff", "openai"} <= set(absent)
  program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({absent!r}))  # which makes their import fail
sys.argv = ["dmpo_jax.main", "--help"]
runpy.run_module("dmpo_jax.main", run_name="__main__", alter_sys=True)
"""
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert "--workdir" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(("fails", "code"), [("", 0), ("2", 7)])
def test_processes_that_end_at_one_moment_end_the_job(tmp_path, fails, code):
  """The job's exit code is that of the first process that failed, even where bash reports only one of several."""
  stand_in, failed = tmp_path / "python", tmp_path / "failed"
  stand_in.write_text(
    "#!/usr/bin/env bash\n"
    "[[ $1 == -c ]] && { echo 1; exit; }  # the port\n"
    f'[[ "${{@: -1}}" == "--process_id={fails}" ]] && {{ touch {failed}; exit 7; }}\n'
    f'[[ -z "{fails}" ]] && exit 0\n'
    f"while [[ ! -e {failed} ]]; do sleep 0.02; done\n"
    "sleep 0.5; exit 76\n"
  )
  stand_in.chmod(0o755)
  for _ in range(3):
    failed.unlink(missing_ok=True)
    assert run(PODS / "local.sh", "-n", "6", "-r", "0", "--", "x", PYTHON=str(stand_in)).returncode == code
