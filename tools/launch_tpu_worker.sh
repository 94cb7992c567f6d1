#!/usr/bin/env bash
# Commands that tools/launch_tpu.sh runs on each TPU VM, from ~/cap_pretrain/tools.
#   install [MOUNT]   install Python, this package and its dependencies; mount gs://BUCKET or HOST:/SHARE
#   start [--env=NAME=VALUE]… -- FLAGS…
#                     start `python -m cap_pretrain.main FLAGS…`, unless it is running
#   state             print "running" or "idle"
#   follow            print the program's log until it exits
#   ended             wait, then print "ended STATUS SECONDS" of the last start (STATUS 1 if unknown)
#   stop              send SIGTERM, on which the program saves a checkpoint, and wait
set -euo pipefail

launcher=launch_tpu_worker
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/launch_options.sh
mount_point=/mnt/runs
mkdir -p run
verb=$1
shift

alive() { [[ -s run/pid ]] && grep -qs cap_pretrain.main "/proc/$(<run/pid)/cmdline"; }
apt() { sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq "$@"; }

install_gcsfuse() { # https://cloud.google.com/storage/docs/cloud-storage-fuse/install
  local key=/usr/share/keyrings/cloud.google.asc
  curl -sSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt update
  apt install gcsfuse
}

mount_runs() {
  if mountpoint -q "$mount_point"; then return; fi
  sudo mkdir -p "$mount_point"
  if [[ $1 == gs://* ]]; then
    command -v gcsfuse >/dev/null || install_gcsfuse
    sudo chown "$(id -un)" "$mount_point"
    # Metadata is not cached (by default for a minute or forever), to see others' writes at once.
    # Folders are renamed only where this is atomic (hierarchical namespace), as checkpoints need it.
    local bucket=${1#gs://}
    gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      --rename-dir-limit=0 "${bucket%/}" "$mount_point"
  else
    command -v mount.nfs >/dev/null || { apt update && apt install nfs-common; }
    # Likewise, missing names are not cached, and attributes are cached for one second.
    sudo mount -t nfs -o hard,lookupcache=positive,actimeo=1 "$1" "$mount_point"
    sudo chmod 1777 "$mount_point"
  fi
}

# JAX asks for this on v5e and newer: the TPU runtime starts and ends faster. A reboot resets it.
enable_hugepages() {
  sudo sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled' ||
    say "transparent hugepages could not be enabled; the program starts without them."
}

# When a user's last session ends, systemd deletes the user's files in /dev/shm, such as local copies
# of checkpoints (RemoveIPC in logind.conf), but not those of users that linger.
keep_memory() {
  sudo loginctl enable-linger "$(id -un)" ||
    say "files in /dev/shm may not outlive the program; set checkpoint.local to a folder on a disk."
}

ended() {
  # When a host is lost the others exit by themselves; this handles one that hangs nevertheless.
  for ((i = 0; i < 600; i++)); do
    if ! alive; then break; fi
    sleep 1
  done
  if alive; then kill -KILL "$(<run/pid)"; fi
  for ((i = 0; i < 50; i++)); do
    if [[ -s run/ended ]]; then break; fi
    sleep 0.1
  done
  cat run/ended 2>/dev/null || echo "ended 1 0"
}

case $verb in
  install)
    if (($#)); then check mount mount "$1" && mount_runs "$1"; fi
    # TPU VMs have Python 3.10, which is too old.
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [[ -x venv/bin/python ]] || uv venv --quiet --python 3.11 venv
    uv pip install --quiet --python venv/bin/python -e '.[tpu,gcs]'
    ;;
  start)
    read_options 'env:variable' "$@"
    if alive; then echo "already running" && exit; fi
    if [[ -e run/log ]]; then mv run/log "run/log.$(date +%Y%m%d_%H%M%S)"; fi
    rm -f run/pid run/ended
    enable_hugepages
    keep_memory
    # It outlives the connection, and the waiting shell records its exit status.
    # shellcheck disable=SC2016
    nohup setsid bash -c '
      "$@" &
      echo $! >run/pid
      wait $! && status=0 || status=$?
      echo "ended $status $SECONDS" >run/ended' _ \
      env ${variables[@]+"${variables[@]}"} venv/bin/python -u -m cap_pretrain.main \
      ${program[@]+"${program[@]}"} >run/log 2>&1 </dev/null &
    until [[ -s run/pid ]]; do sleep 0.1; done
    ;;
  state) if alive; then echo running; else echo idle; fi ;;
  follow) tail -n 200 -s 0.2 -F --pid="$(<run/pid)" run/log 2>/dev/null ;;
  ended) ended ;;
  stop)
    if alive; then kill -TERM "$(<run/pid)"; fi
    ended
    ;;
  *)
    mistake "$(printf 'unknown command %q' "$verb")"
    ;;
esac
