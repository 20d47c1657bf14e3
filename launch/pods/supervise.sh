#!/usr/bin/env bash
# Restart a command that was interrupted: preempted (75), killed, or stopped because another process of the job died.
#
#   launch/pods/supervise.sh RESTARTS COMMAND [ARGUMENT ...]
#
# A command that finished (0), gave up (1) or was called wrongly (2) is not restarted. The pause before a restart doubles
# from 1 to at most 60 seconds; SUPERVISE_PAUSE sets the first one.
set -uo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[0-9]+$ ]]; then
  echo "usage: launch/pods/supervise.sh RESTARTS COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
restarts=$1
shift
pause=${SUPERVISE_PAUSE:-1}

child=
stopping=
forward() {
  stopping=early
  [[ -n $child ]] && stopping=passed_on && kill -TERM "$child" 2>/dev/null
}
trap forward TERM INT

run() {  # waits for the end of the command, also if a signal arrives
  "$@" &
  child=$!
  [[ $stopping == early ]] && kill -TERM "$child"  # the signal came before the child was known
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait` while the command still saves
    wait "$child"
    code=$?
  done
  child=
}

for ((attempt = 0; ; attempt++)); do
  run "$@"
  ended=$code
  if [[ $ended -le 2 || -n $stopping || $attempt -ge $restarts ]]; then
    exit "$ended"
  fi
  echo "ended with exit code $ended: restart $((attempt + 1)) of $restarts in $pause s" >&2
  run sleep "$pause"
  [[ -n $stopping ]] && exit "$ended"
  pause=$((pause * 2 > 60 ? 60 : pause * 2))
done
