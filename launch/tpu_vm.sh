#!/usr/bin/env bash
# dmpo_jax on a Cloud TPU slice: create it, set it up, run on all of its workers, look on, stop, delete.
#
#   launch/tpu_vm.sh create --name=dmpo --zone=us-central2-b --type=v5litepod-16 [--spot] [--queued]
#   launch/tpu_vm.sh setup  --name=dmpo --zone=us-central2-b       # copies this checkout and installs requirements.txt
#   launch/tpu_vm.sh run    --name=dmpo --zone=us-central2-b -- --config=configs/llada_8b.py --workdir=gs://bucket/run
#   launch/tpu_vm.sh tail   --name=dmpo --zone=us-central2-b       # the log of worker 0
#   launch/tpu_vm.sh stop   --name=dmpo --zone=us-central2-b       # SIGTERM: the run saves and ends with exit code 75
#   launch/tpu_vm.sh delete --name=dmpo --zone=us-central2-b [--queued]
#
# --dry-run prints the commands. --queued asks through a queued resource, which waits for capacity. --restarts=N (10) is
# how often `run` starts an interrupted run again. Needs gcloud, logged in, with a project set (or --project=ID).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  echo "$1; see the head of launch/tpu_vm.sh" >&2
  exit 2
}

[[ $# -ge 1 ]] || usage "which of create, setup, run, tail, stop, delete?"
action=$1
shift
name='' zone='' type='' version=v2-alpha-tpuv5-lite project='' restarts=10 spot='' queued='' dry='' arguments=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;; # the TPU software: v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5 for v5p
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
    on_workers all 'mkdir -p dmpo_jax && tar xzf dmpo_jax.tar.gz -C dmpo_jax && cd dmpo_jax && python3 -m venv .venv && .venv/bin/pip install -r requirements.txt "jax[tpu]>=0.10,<0.12"'
    ;;
  run)
    [[ ${#arguments[@]} -gt 0 ]] || usage "give the arguments of dmpo_jax.main after --"
    command=$(printf '%q ' launch/supervise.sh "$restarts" .venv/bin/python -m dmpo_jax.main "${arguments[@]}")
    on_workers all "cd dmpo_jax && nohup $command > run.log 2>&1 < /dev/null & disown"
    ;;
  tail) on_workers 0 'tail -n 100 -f dmpo_jax/run.log' ;;
  stop) on_workers all 'pkill -TERM -f launch/supervise.sh || true' ;;
  delete)
    if [[ -n $queued ]]; then
      call gcloud compute tpus queued-resources delete "$name" --force --quiet "${where[@]}"
    else
      tpu delete "$name" --quiet
    fi
    ;;
  *) usage "unknown action $action" ;;
esac
