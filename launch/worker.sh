#!/usr/bin/env bash
# Runs on one worker (one machine of a TPU slice). tpu_vm.sh copies this file to the home directory
# of every worker and calls it over ssh:
#
#   worker.sh mount STORAGE DIRECTORY       STORAGE is gs://BUCKET or HOST:/SHARE (NFS)
#   worker.sh install PYTHON EXTRAS         ~/source.tar.gz into a virtual environment
#   worker.sh idle                          fails if a run is in progress
#   worker.sh start LOGS COMMAND...         detached; LOGS: directory for copies of the log, or -
#   worker.sh state                         one line: HOST none | running | exit N | lost
#   worker.sh stop SECONDS                  SIGTERM; after SECONDS, SIGKILL to what still runs
#   worker.sh log LINES                     the end of the log, followed while the run lasts
set -euo pipefail

home=${JAXRL_HOME:-$HOME/jaxrl}
boot_id=${JAXRL_BOOT_ID:-/proc/sys/kernel/random/boot_id}
publish_seconds=${JAXRL_PUBLISH_SECONDS:-60} pause=${JAXRL_PAUSE:-0.5}

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

alive() { kill -0 "$(cat "$home/$1")" 2>/dev/null; }

# True if the command has not ended and belongs to this boot; older process numbers mean nothing.
running() {
  [ -f "$home/pid" ] && [ ! -f "$home/exit" ] && [ "$(cat "$boot_id")" = "$(cat "$home/boot")" ] &&
    { alive pid || alive supervisor; }
}

mount_storage() {
  local storage=$1 directory=$2
  if mountpoint --quiet "$directory"; then return; fi
  sudo mkdir -p "$directory"
  case $storage in
    gs://*)
      command -v gcsfuse >/dev/null || install_gcsfuse
      sudo chown "$(id -u):$(id -g)" "$directory"
      # Without metadata caches each worker sees immediately what the others wrote. Saving a
      # checkpoint together needs that.
      gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        "${storage#gs://}" "$directory"
      ;;
    *)
      command -v mount.nfs >/dev/null || apt_install nfs-common
      # A version-3 server never releases the lock of a machine that has vanished, and the run
      # could not continue on new ones. Version 4 releases it and ignores this option.
      sudo mount -t nfs -o local_lock=flock "$storage" "$directory"
      sudo chown "$(id -u):$(id -g)" "$directory"
      ;;
  esac
}

# https://cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  curl --silent --show-error --fail "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -c -s) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt_install gcsfuse
}

# A new machine first updates itself and holds the apt lock for minutes.
apt_install() {
  local wait=(-o DPkg::Lock::Timeout=900)
  sudo apt-get "${wait[@]}" update --quiet=2
  sudo DEBIAN_FRONTEND=noninteractive apt-get "${wait[@]}" install --quiet=2 --yes "$@"
}

install_source() {
  local python=$1 extras=$2
  idle
  rm -rf "$home/source"
  mkdir -p "$home/source"
  tar -xzf "$HOME/source.tar.gz" -C "$home/source"
  # uv installs its own Python: the one of the TPU images (3.10) is too old for the package.
  python3 -m pip install --quiet --upgrade --target "$home/uv" uv
  "$home/uv/bin/uv" venv --quiet --allow-existing --python "$python" "$home/venv"
  "$home/uv/bin/uv" pip install --quiet --python "$home/venv/bin/python" "$home/source${extras:+[$extras]}"
}

idle() {
  if running; then
    fail "a run is in progress: $(cat "$home/command")(process $(cat "$home/pid")); stop it first"
  fi
}

start() {
  idle
  [ -x "$home/venv/bin/python" ] || fail "nothing is installed; install first"
  rm -f "$home/exit" "$home/pid"
  printf '%q ' "${@:2}" >"$home/command"
  setsid nohup bash "$0" supervise "$@" </dev/null >/dev/null 2>&1 &
  local tries
  for ((tries = 0; tries < 100; tries++)); do
    if [ -f "$home/pid" ]; then return; fi
    sleep 0.1
  done
  fail "the run did not start"
}

# Runs the command as a child and waits for its end, so that SIGTERM reaches only the command.
supervise() {
  local logs=$1 log=$home/log status=0
  shift
  publish() {
    if [ "$logs" = - ]; then return; fi
    timeout 120 mkdir -p "$logs" && timeout 120 cp "$log" "$logs/$(hostname).log" || true
  }
  cd "$home/source"
  # Without a TPU jax would silently use the CPU; naming it first makes its absence an error.
  export PATH="$home/venv/bin:$PATH" PYTHONUNBUFFERED=1 JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
  "$@" >>"$log" 2>&1 &
  local child=$!
  cat "$boot_id" >"$home/boot"
  echo "$$" >"$home/supervisor"
  echo "$child" >"$home/pid"
  # A file in a mounted bucket appears when it is closed, hence copies instead of a second log.
  while ! timeout "$publish_seconds" tail --pid="$child" -s "$pause" -f /dev/null; do publish; done
  wait "$child" || status=$?
  publish
  echo "$status" >"$home/exit"
}

signal() { kill -"$1" "$(cat "$home/pid")" 2>/dev/null || true; }

state() {
  local word=none
  if [ -f "$home/exit" ]; then
    word="exit $(cat "$home/exit")"
  elif running; then
    word=running
  elif [ -f "$home/pid" ]; then
    word=lost
  fi
  echo "$(hostname) $word"
}

stop() {
  local deadline=$((SECONDS + $1))
  if running; then signal TERM; fi
  while running && [ "$SECONDS" -lt "$deadline" ]; do sleep "$pause"; done
  if ! running; then return; fi
  echo "$(hostname): still there after $1 s; killed" >&2
  signal KILL
  while running; do sleep "$pause"; done
}

follow() {
  [ -f "$home/log" ] || fail "there is no log; nothing was started here"
  if running; then
    tail -n "$1" -F --pid="$(cat "$home/pid")" "$home/log"
  else
    tail -n "$1" "$home/log"
  fi
}

mkdir -p "$home"
action=$1
shift
case $action in
  mount) mount_storage "$@" ;;
  install) install_source "$@" ;;
  log) follow "$@" ;;
  idle | start | supervise | state | stop) "$action" "$@" ;;
  *) fail "unknown action $action" ;;
esac
