#!/usr/bin/env bash
# Runs a command on plain TPU VMs: one machine, a slice, or several slices. See launch/README.md.
# Works with bash 3.2, the version of macOS.
set -euo pipefail

usage() {
  cat <<'END'
launch/tpu_vm.sh ACTION --name=NAME --zone=ZONE [--FLAG=VALUE ...] [-- COMMAND ...]

actions
  create    request a queued resource and wait for it
  install   copy the working tree to all workers and install it; mount the storage
  run       start COMMAND on all workers, detached; refused if a run is in progress
  logs      follow one worker (--slice=0 --worker=0 --lines=100)
  status    states of the request, of the slices, and of the run on each worker
  stop      SIGTERM on all workers: the program finishes its step, saves, and ends
  resume    all of the above until COMMAND has ended: creates, installs, runs, watches, and after
            a preemption deletes what is left and starts over (the program resumes on its own)
  delete    delete the request and its machines. Machines cost money until then.

flags
  --name, --zone, --project      of the queued resource (default project: gcloud's)
  --topology=v5p:4x4x4           as in `jaxrl_stable.aot`, v5p:4x4x4*2 for two slices of it;
                                 or --accelerator_type=v5p-128 --slices=2
  --spot, --reserved             instead of on-demand capacity
  --valid_until=6h               drop the request if nothing is free by then
  --runtime_version=...          image of the machines; the default follows the topology
  --network, --subnetwork, --service_account, --internal_ips      passed to gcloud
  --storage=gs://BUCKET          or HOST:/SHARE (NFS): mounted on all workers
  --mount=/mnt/jaxrl             mount point
  --python=3.12 --extras=tpu,kernels      what to install
  --grace=900                    seconds that `stop` waits before it kills
  --retries=3                    how often `resume` restarts a run that failed on its own
  --patience=20                  unanswered polls after which it gives up the machines
  --delete_when_done             `resume` deletes everything when it ends, even after a failure
  --poll=30                      seconds between polls
  --config=FILE                  flags from a file, one NAME=VALUE per line
  --dry_run                      print the commands, run none
END
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/resume.sh
. "$root/launch/resume.sh"

name="" zone="" project="" topology="" accelerator_type="" runtime_version=""
slices=1 spot=false reserved=false valid_until="" network="" subnetwork="" service_account=""
internal_ips=false storage="" mount=/mnt/jaxrl python=3.12 extras=tpu,kernels
slice=0 worker=0 lines=100 grace=900 dry_run=false
export poll=30 retries=3 patience=20 delete_when_done=false # of resume.sh

fail() {
  echo "error: $*" >&2
  exit 2
}

note() { echo "$(date +%H:%M:%S) $name: $*" >&2; }

set_flag() { # NAME=VALUE, or NAME for true
  local flag=${1%%=*} value=true
  case $1 in *=*) value=${1#*=} ;; esac
  case $flag in
    spot | reserved | internal_ips | delete_when_done | dry_run)
      case $value in true | false) ;; *) fail "--$flag takes no value, got $value" ;; esac
      ;;
    slices | slice | worker | lines | grace | retries | patience | poll)
      case $value in "" | *[!0-9]*) fail "--$flag must be a number, got $value" ;; esac
      ;;
    name | zone | project | topology | accelerator_type | runtime_version | valid_until | \
      network | subnetwork | service_account | storage | mount | python | extras) ;;
    config)
      read_config "$value"
      return
      ;;
    *) fail "unknown flag --$flag; --help lists all" ;;
  esac
  printf -v "$flag" %s "$value"
}

read_config() {
  local line
  [ -f "$1" ] || fail "--config=$1 does not exist"
  while IFS= read -r line || [ -n "$line" ]; do
    case $line in "" | \#*) ;; *) set_flag "$line" ;; esac
  done <"$1"
}

# ---- commands, printed or run

quote() { # one word as a shell would read it back
  local word=$1 escaped="'\\''"
  if [[ $word =~ ^--[a-z-]+= ]]; then # --flag='value', not '--flag=value'
    printf %s "${BASH_REMATCH[0]}"
    word=${word#*=}
  fi
  case $word in
    "" | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "${word//\'/$escaped}" ;;
    *) printf %s "$word" ;;
  esac
}

quoted() { # words, as one line
  local word separator=""
  for word in "$@"; do
    printf %s "$separator"
    quote "$word"
    separator=" "
  done
}

call() {
  if $dry_run; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

node() { # name of slice $1
  if [ "$slices" = 1 ]; then echo "$name"; else echo "$name-$1"; fi
}

tpu_vm() { # ACTION NODE ARGUMENTS...
  local route=()
  if $internal_ips; then route=(--internal-ip); fi
  call gcloud compute tpus tpu-vm "$@" "${where[@]}" ${route[@]+"${route[@]}"}
}

remote() { # NODE WORKER COMMAND; notices a lost machine within minutes, not half an hour
  tpu_vm ssh "$1" --worker="$2" --command="$3" \
    --ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=30
}

on_workers() { # NODE ARGUMENTS...: worker.sh on all its workers
  remote "$1" all "bash worker.sh $(quoted "${@:2}")"
}

# A new machine has no worker.sh yet.
ask() { # NODE: the state of the run on all its workers
  local known="if [ -e worker.sh ]; then bash worker.sh state" new="else echo \"\$(hostname) none\"; fi"
  remote "$1" all "$known; $new"
}

end() { # NODE SECONDS: stops the run, if any, on all its workers
  remote "$1" all "if [ -e worker.sh ]; then bash worker.sh stop $2; fi"
}

copy_to() { # NODE FILES...
  tpu_vm scp "${@:2}" "$1:" --worker=all
}

each_slice() { # FUNCTION ARGUMENTS...: FUNCTION NODE ARGUMENTS... for all slices at once
  local index pid pids="" failed=0
  for ((index = 0; index < slices; index++)); do
    if $dry_run || [ "$slices" = 1 ]; then
      "$1" "$(node "$index")" "${@:2}" || failed=1
    else
      "$1" "$(node "$index")" "${@:2}" &
      pids="$pids $!"
    fi
  done
  for pid in $pids; do wait "$pid" || failed=1; done
  return "$failed"
}

# ---- actions

accelerator() { # v5p:4x4x4, 64 chips, is called v5p-128: v4 and v5p count two cores per chip
  local version=${topology%%:*} shape=${topology#*:} chips=1 side
  if [ -n "$accelerator_type" ]; then
    echo "$accelerator_type"
    return
  fi
  [[ $topology =~ ^[a-z0-9]+:[0-9]+(x[0-9]+)+$ ]] ||
    fail "--topology must be like v5p:4x4x4, got '$topology'; or give --accelerator_type"
  for side in ${shape//x/ }; do chips=$((chips * side)); done
  case $version in
    v4 | v5p) echo "$version-$((chips * 2))" ;;
    v5e | v5litepod) echo "v5litepod-$chips" ;;
    v6e) echo "v6e-$chips" ;;
    *) fail "--topology=$topology: only v4, v5e, v5p and v6e are TPU VMs; newer ones need GKE" ;;
  esac
}

image() { # https://cloud.google.com/tpu/docs/runtimes
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5lite*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

request() {
  local options
  options=(--accelerator-type="$type" --runtime-version="${runtime_version:-$(image "$type")}")
  if [ "$slices" = 1 ]; then
    options+=(--node-id="$name")
  else
    options+=(--node-count="$slices" --node-prefix="$name")
  fi
  if $spot; then options+=(--spot); fi
  if $reserved; then options+=(--reserved); fi
  if [ -n "$valid_until" ]; then options+=(--valid-until-duration="$valid_until"); fi
  if [ -n "$network" ]; then options+=(--network="$network"); fi
  if [ -n "$subnetwork" ]; then options+=(--subnetwork="$subnetwork"); fi
  if [ -n "$service_account" ]; then options+=(--service-account="$service_account"); fi
  if $internal_ips; then options+=(--internal-ips); fi
  call gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
}

create() {
  local state seen=""
  if $dry_run; then
    request
    return
  fi
  state=$(queued_state)
  if [ "$state" = NONE ]; then
    request
  else
    note "the request exists already"
  fi
  note "waiting for machines; Ctrl-C leaves the request in the queue (delete removes it)"
  while true; do
    state=$(queued_state) || state="gcloud failed, trying again"
    if [ "$state" != "$seen" ]; then note "$state"; fi
    seen=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | NONE)
        fail "no machines: the request is $state;" \
          "see: gcloud compute tpus queued-resources describe $name ${where[*]}"
        ;;
    esac
    sleep "$poll"
  done
}

# Packs the tracked files as they are, changed or not. `resume` later installs the same archive.
pack() {
  local tree untracked
  if $dry_run; then
    echo "mkdir -p $(quote "$(dirname "$archive")")"
    echo "tree=\$(git -C $(quote "$root") stash create)"
    echo "git -C $(quote "$root") archive --output=$(quote "$archive") \"\${tree:-HEAD}\""
    return
  fi
  mkdir -p "$(dirname "$archive")"
  tree=$(git -C "$root" stash create) # an unreferenced commit of the working tree
  git -C "$root" archive --output="$archive" "${tree:-HEAD}"
  untracked=$(git -C "$root" ls-files --others --exclude-standard | wc -l)
  if [ "$untracked" -gt 0 ]; then note "$((untracked)) untracked files are not copied (git add)"; fi
}

install_archive() {
  if ! $dry_run; then note "installing on all workers"; fi
  each_slice copy_to "$archive" "$root/launch/worker.sh" || return
  if [ -n "$storage" ]; then each_slice on_workers mount "$storage" "$mount" || return; fi
  each_slice on_workers install "$python" "$extras"
}

start() { # on all workers, or on none if one is busy: half a run would wait for the other half
  local logs=-
  if [ -n "$storage" ]; then logs=$mount/logs/$name; fi
  each_slice on_workers idle || return
  each_slice on_workers start "$logs" "$@"
}

status() {
  call gcloud compute tpus queued-resources list "${where[@]}" --filter="name~\"/$name\$\""
  call gcloud compute tpus tpu-vm list "${where[@]}" --filter="name~\"/$name(-[0-9]+)?\$\""
  each_slice ask
}

delete() {
  call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# ---- main

action=${1:-help}
case $action in
  help | --help | -h)
    usage
    exit
    ;;
  create | install | run | logs | status | stop | resume | delete) shift ;;
  *) fail "unknown action $action; --help lists all" ;;
esac
while [ $# -gt 0 ]; do
  case $1 in
    --)
      shift
      break
      ;;
    --*) set_flag "${1#--}" ;;
    *) fail "unexpected $1; flags are --NAME=VALUE, and COMMAND follows --" ;;
  esac
  shift
done

case $topology in
  *\**)
    set_flag "slices=${topology#*\*}"
    topology=${topology%%\**}
    ;;
esac
[ -n "$name" ] || fail "--name is missing"
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name=$name: lower case letters, digits, -"
[ -n "$zone" ] || fail "--zone is missing"
[ "$slices" -ge 1 ] || fail "--slices must be at least 1"
if $spot && $reserved; then fail "--spot or --reserved, not both"; fi
case $storage in
  "" | gs://*/*) [ -z "${storage#gs://*/}" ] || [ -z "$storage" ] ||
    fail "--storage=$storage: only a whole bucket can be mounted, gs://BUCKET" ;;
  gs://?* | ?*:/*) ;;
  *) fail "--storage must be gs://BUCKET or HOST:/SHARE, got $storage" ;;
esac
storage=${storage%/}
case $action in
  run | resume) [ $# -gt 0 ] || fail "$action needs a command after --" ;;
  *) [ $# -eq 0 ] || fail "$action takes no command" ;;
esac
where=(--zone="$zone")
if [ -n "$project" ]; then where+=(--project="$project"); fi
archive=$root/runs/launch/$name/source.tar.gz
case $action in create | resume) type=$(accelerator) ;; esac

case $action in
  install)
    pack
    install_archive
    ;;
  run) start "$@" ;;
  logs) remote "$(node "$slice")" "$worker" "bash worker.sh log $lines" ;;
  stop) each_slice end "$grace" ;;
  delete)
    delete
    call rm -f "$archive" # a later `resume` of this name packs the working tree again
    ;;
  create | status | resume) "$action" "$@" ;;
esac
