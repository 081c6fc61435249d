#!/usr/bin/env bash
# Runs the command of a pod. Asked to stop by SIGTERM, the program saves and exits with 0, which
# Kubernetes takes for the end of the training: a pod that leaves its node like that counts as
# completed (kubernetes/kubernetes#118310). 143 says instead that there is more to do, so that the
# JobSet starts again.
set -euo pipefail

"$@" &
child=$!
asked=false
trap 'asked=true; kill -TERM "$child" 2>/dev/null || true' TERM

status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do # the signal ends `wait`, not the program
  status=0
  wait "$child" || status=$?
done
if $asked; then exit 143; fi
exit "$status"
