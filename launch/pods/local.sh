#!/usr/bin/env bash
# Run dmpo_jax as several processes on this machine, restarted together when one of them dies.
#
#   launch/pods/local.sh [-n PROCESSES] [-r RESTARTS] -- --config=configs/smoke.py --workdir=runs/smoke ...
#
# PROCESSES is 2 and RESTARTS 3 by default; PYTHON names the interpreter. This is for trying out what a pod does: on one
# machine with several accelerators, a single process (plain `python -m dmpo_jax.main`) uses all of them.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

processes=2 restarts=3
while getopts "n:r:" option; do
  case $option in
    n) processes=$OPTARG ;;
    r) restarts=$OPTARG ;;
    *)
      echo "usage: launch/pods/local.sh [-n PROCESSES] [-r RESTARTS] -- ARGUMENTS of dmpo_jax.main" >&2
      exit 2
      ;;
  esac
done
shift $((OPTIND - 1))

# One attempt: run all processes; return the exit code of the first one that failed.
attempt() {
  local python=$1 processes=$2 port code=0 running pids=()
  shift 2
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  for ((i = 0; i < processes; i++)); do
    "$python" -m dmpo_jax.main "$@" \
      --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$i" &
    pids+=($!)
  done
  trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
  while ((${#pids[@]})); do
    running=${#pids[@]}
    wait -n "${pids[@]}" 2>/dev/null # until one ends or a signal arrives; of several that end at once it may report one
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}"
      ended_with=$?
      ((code == 0)) && code=$ended_with
      unset "pids[i]"
    done
    pids=("${pids[@]}")
    ((${#pids[@]} < running)) || sleep 0.2
  done
  exit "$code"
}
export -f attempt

exec launch/pods/supervise.sh "$restarts" bash -c 'attempt "$@"' attempt "${PYTHON:-python3}" "$processes" "$@"
