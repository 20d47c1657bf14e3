"""What a person runs around the program: scripts that a linter passes, and the commands that they print."""

import os
import pathlib
import subprocess
import sys

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def run(*command, **environment):
  return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def tpu_vm(action, *options):
  return run(LAUNCH / "tpu_vm.sh", action, "--name=pod", "--zone=z1", "--dry-run", *options)


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
      "gcloud compute tpus tpu-vm ssh pod --worker=all --command=cd dmpo_jax && nohup launch/supervise.sh 5 "
      ".venv/bin/python -m dmpo_jax.main --config=configs/llada_8b.py --workdir=gs://b/run  > run.log 2>&1 "
      "< /dev/null & disown --zone=z1",
    ),
    (("tail",), "gcloud compute tpus tpu-vm ssh pod --worker=0 --command=tail -n 100 -f dmpo_jax/run.log --zone=z1"),
    (
      ("stop",),
      "gcloud compute tpus tpu-vm ssh pod --worker=all --command=pkill -TERM -f launch/supervise.sh || true --zone=z1",
    ),
    (("delete",), "gcloud compute tpus tpu-vm delete pod --quiet --zone=z1"),
    (("delete", "--queued"), "gcloud compute tpus queued-resources delete pod --force --quiet --zone=z1"),
  ],
)
def test_a_dry_run_prints_the_command(options, printed):
  done = tpu_vm(*options)
  assert done.returncode == 0, done.stderr
  assert done.stdout.replace("\\", "").strip() == printed


def test_set_up_copies_the_checkout_and_installs_it():
  archive, copy, install = tpu_vm("setup").stdout.splitlines()
  assert archive.startswith("git archive --format=tar.gz")
  assert copy.startswith("gcloud compute tpus tpu-vm scp")
  assert "requirements.txt" in install


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
  done = run(LAUNCH / "supervise.sh", "2", *command, SUPERVISE_PAUSE="0")
  assert done.returncode == code
  assert (tmp_path / "log").read_text().count("started") == starts


def test_a_signal_is_passed_on_and_ends_the_supervision(tmp_path):
  command = f"trap 'exit 75' TERM; echo ready > {tmp_path / 'log'}; while :; do sleep 0.05; done"
  process = subprocess.Popen([LAUNCH / "supervise.sh", "9", "bash", "-c", command])
  while not (tmp_path / "log").exists():
    assert process.poll() is None
  process.terminate()
  assert process.wait(timeout=20) == 75


def test_a_signal_in_the_pause_ends_it():
  process = subprocess.Popen(
    [LAUNCH / "supervise.sh", "9", "bash", "-c", "exit 75"],
    env={**os.environ, "SUPERVISE_PAUSE": "60"},
    stderr=subprocess.PIPE,
    text=True,
  )
  assert "restart 1 of 9" in process.stderr.readline()
  process.terminate()
  assert process.wait(timeout=20) == 75


def test_the_job_set_is_one_pod_a_host_and_restarts_only_what_was_interrupted():
  job_set = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (job,) = job_set["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  assert job["parallelism"] == job["completions"]
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"] == ["python", "-m", "dmpo_jax.main"]
  assert container["resources"]["limits"]["google.com/tpu"] == 4
  assert pod["restartPolicy"] == "Never"
