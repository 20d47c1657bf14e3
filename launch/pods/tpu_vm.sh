#!/usr/bin/env bash
# dmpo_jax on a Cloud TPU slice: create, set up, run on all workers, follow the log, stop, delete.
#
#   launch/pods/tpu_vm.sh create --name=dmpo --zone=us-west4-a --type=v5litepod-16 [--spot] [--queued]
#   launch/pods/tpu_vm.sh setup  --name=dmpo --zone=us-west4-a       # copies this checkout; installs Python and requirements
#   launch/pods/tpu_vm.sh run    --name=dmpo --zone=us-west4-a -- --config=configs/llada_8b.py --workdir=gs://bucket/run
#   launch/pods/tpu_vm.sh tail   --name=dmpo --zone=us-west4-a       # the log of worker 0
#   launch/pods/tpu_vm.sh stop   --name=dmpo --zone=us-west4-a       # SIGTERM: the run saves and ends with exit code 75
#   launch/pods/tpu_vm.sh delete --name=dmpo --zone=us-west4-a [--queued]
#
# The images of TPU VMs, v2-alpha-tpuv5-lite (v5e, the default of --version), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e) and
# tpu-ubuntu2204-base (v4), are Ubuntu 22.04 with Python 3.10, which is too old: `setup` lets uv download Python 3.11, which
# needs internet access. --dry-run prints the commands. --queued requests a queued resource, which waits for capacity.
# --restarts=N (10) limits how often `run` restarts an interrupted run. Needs gcloud, logged in, with a project set (or
# --project=ID).
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
  echo "$1; see the head of launch/pods/tpu_vm.sh" >&2
  exit 2
}

[[ $# -ge 1 ]] || usage "which of create, setup, run, tail, stop, delete?"
action=$1
shift
wanted_python=3.11                # the oldest supported
jax='jax[tpu]>=0.10,<0.12'        # the range of requirements.txt, with the TPU's libraries
name='' zone='' type='' version=v2-alpha-tpuv5-lite project='' restarts=10 spot='' queued='' dry='' arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;; # the image, see above
    --project=*) project=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot) spot=yes ;;
    --queued) queued=yes ;;
    --dry-run) dry=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) usage "unknown option $1" ;;
  esac
  shift
done
[[ -n $name ]] || usage "--name=NAME is missing"
[[ -n $zone ]] || usage "--zone=ZONE is missing"
where=(--zone="$zone")
[[ -n $project ]] && where+=(--project="$project")

call() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}
tpu() { call gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
on_workers() { tpu ssh "$name" --worker="$1" --command="$2"; }

case $action in
  create)
    [[ -n $type ]] || usage "--type=TYPE is missing, such as v5litepod-16"
    if [[ -n $queued ]]; then
      call gcloud compute tpus queued-resources create "$name" --node-id="$name" \
        --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot} "${where[@]}"
    else
      tpu create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
    fi
    ;;
  setup)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    call git archive --format=tar.gz --output="$archive" HEAD
    tpu scp "$archive" "$name:dmpo_jax.tar.gz" --worker=all
    python=.venv/bin/python
    install=(
      'mkdir -p dmpo_jax' 'tar xzf dmpo_jax.tar.gz -C dmpo_jax' 'cd dmpo_jax'
      'python3 -m pip install --user --quiet uv' # https://docs.astral.sh/uv: one file, which needs no other Python
      "python3 -m uv venv --quiet --clear --python $wanted_python .venv"
      "python3 -m uv pip install --quiet --python $python -r requirements.txt '$jax'"
      "$python -c 'import jax, dmpo_jax.main; print(jax.__version__)'"
    )
    command=$(printf ' && %s' "${install[@]}")
    on_workers all "${command# && }"
    ;;
  run)
    [[ ${#arguments[@]} -gt 0 ]] || usage "give the arguments of dmpo_jax.main after --"
    command=$(printf '%q ' launch/pods/supervise.sh "$restarts" .venv/bin/python -m dmpo_jax.main "${arguments[@]}")
    on_workers all "cd dmpo_jax && nohup $command > run.log 2>&1 < /dev/null & disown"
    ;;
  tail) on_workers 0 'tail -n 100 -f dmpo_jax/run.log' ;;
  stop) on_workers all 'pkill -TERM -f "[l]aunch/pods/supervise.sh" || true' ;;
  delete)
    if [[ -n $queued ]]; then
      call gcloud compute tpus queued-resources delete "$name" --force --quiet "${where[@]}"
    else
      tpu delete "$name" --quiet
    fi
    ;;
  *) usage "unknown action $action" ;;
esac
