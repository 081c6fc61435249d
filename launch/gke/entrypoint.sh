#!/usr/bin/env bash
# Runs the command of a pod. On SIGTERM the program saves and exits with 0. Kubernetes would take
# this for the end of the training: a pod that leaves its node with status 0 counts as completed
# (kubernetes/kubernetes#118310). This script exits with 143 instead, so the JobSet starts again.
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
