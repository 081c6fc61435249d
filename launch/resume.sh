# shellcheck shell=bash disable=SC2154  # variables and functions come from tpu_vm.sh, which sources this file
# The action `resume` of tpu_vm.sh: what state a run is in, and what to do about it.

queued_state() { # of the request; NONE if it does not exist
  gcloud compute tpus queued-resources list "${where[@]}" \
    --format='value(name.basename(),state.state)' |
    awk -v name="$name" '$1 == name { found = $2 } END { print found ? found : "NONE" }'
}

slice_states() { # "NODE STATE" for each slice that exists
  local listed index
  listed=$(gcloud compute tpus tpu-vm list "${where[@]}" \
    --format='value(name.basename(),state)') || return
  for ((index = 0; index < slices; index++)); do
    awk -v name="$(node "$index")" '$1 == name { found = $2 }
      END { print name, found ? found : "MISSING" }' <<<"$listed"
  done
}

run_state() { # waiting | preempted | unreachable | idle | running | failed N | finished
  local states
  states=$(slice_states) || return
  if grep -qE ' (PREEMPTED|TERMINATED|STOPPED|STOPPING|DELETING|MISSING)$' <<<"$states"; then
    echo preempted
  elif grep -qv ' READY$' <<<"$states"; then
    echo waiting # for a repair
  elif ! states=$(each_slice ask 2>/dev/null); then
    echo unreachable
  elif grep -qE ' (none|lost)$' <<<"$states"; then
    echo idle # never started here, or lost in a reboot
  elif grep -q ' running$' <<<"$states"; then
    echo running
  elif grep -qE ' exit [1-9]' <<<"$states"; then
    echo "failed $(awk '/ exit [1-9]/ && !status { status = $3 } END { print status }' <<<"$states")"
  else
    echo finished
  fi
}

# ---- the loop

at_the_end() {
  if $delete_when_done; then delete; else note "the machines still cost money: delete them"; fi
}

give_up() {
  at_the_end
  fail "$@"
}

plan() { # of `resume`, for --dry_run
  echo "# no request yet, or deleted after a preemption"
  request
  echo "# once it is ACTIVE"
  [ -f "$archive" ] || pack
  install_archive
  start "$@"
  echo "# every $poll s"
  status
  echo "# after a preemption, and then from the top; with --delete_when_done also at the end"
  delete
}

resume() {
  local state="" seen="" before failures=0 refusals=0 silent=0 reached=false
  if $dry_run; then
    plan "$@"
    return
  fi
  if [ -f "$archive" ]; then note "installs the last archive again (install renews it)"; else pack; fi
  while true; do
    before=$state
    state=$(queued_state) || state="gcloud failed"
    if [ "$state" = ACTIVE ]; then
      refusals=0
      state=$(run_state) || state="gcloud failed"
    fi
    if [ "$state" != "$seen" ]; then note "$state"; fi
    seen=$state
    case $state in
      finished)
        at_the_end
        return
        ;;
      NONE)
        failures=0 reached=false
        request || refusals=$((refusals + 1))
        ;;
      FAILED)
        refusals=$((refusals + 1))
        delete || true
        ;;
      SUSPENDED | preempted) delete || true ;;
      idle)
        # What is left of a broken run waits for its lost peers and ignores SIGTERM.
        if each_slice end 20 && install_archive && start "$@"; then
          state=started
        elif [ "$failures" -ge "$retries" ]; then
          give_up "could not install or start, $((failures + 1)) times"
        else
          failures=$((failures + 1))
        fi
        ;;
      failed*)
        # A lost peer first makes the others fail; the state of its slice changes a little later.
        if [ "$before" = "$state" ] && [ "$failures" -ge "$retries" ]; then
          give_up "COMMAND $state, $((failures + 1)) times; see logs"
        elif [ "$before" = "$state" ] && start "$@"; then
          failures=$((failures + 1)) state=started
        fi
        ;;
      unreachable)
        silent=$((silent + 1))
        if [ "$silent" -ge "$patience" ] && $reached; then
          note "no answer from the workers $silent times, although the slices are READY"
          delete || true
        elif [ "$silent" -ge "$patience" ]; then
          give_up "no ssh to the workers; try status"
        fi
        ;;
    esac
    if [ "$refusals" -gt "$retries" ]; then
      give_up "the request was refused $refusals times; see the message above, or try create"
    fi
    case $state in idle | running | started | failed*) reached=true silent=0 ;; esac
    sleep "$poll"
  done
}
