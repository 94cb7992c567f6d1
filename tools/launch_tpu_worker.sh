#!/usr/bin/env bash
# What tools/launch_tpu.sh has each TPU VM do. It lies in ~/cap_pretrain/tools there.
#
#   install [MOUNT]   Python, this package and its dependencies; mounts gs://BUCKET or HOST:/SHARE
#   start FLAGS…      starts `python -m cap_pretrain.main FLAGS…`, unless it runs
#   state             prints "running" or "idle"
#   follow            prints its log until it has ended
#   ended             prints "ended STATUS SECONDS" of the last start (STATUS 1 if there is none)
#   stop              sends SIGTERM, which saves, and waits
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
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
    # Hosts must see at once what another has written, so nothing is remembered about files; by
    # default it is for a minute, and on large machines for ever. A folder is renamed where that is
    # atomic (in a bucket with a hierarchical namespace), else refused: checkpoints rely on it.
    local bucket=${1#gs://}
    gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
      --rename-dir-limit=0 "${bucket%/}" "$mount_point"
  else
    command -v mount.nfs >/dev/null || { apt update && apt install nfs-common; }
    # The same: names that are missing are looked up again, attributes kept for a second.
    sudo mount -t nfs -o hard,lookupcache=positive,actimeo=1 "$1" "$mount_point"
    sudo chmod 1777 "$mount_point"
  fi
}

ended() {
  # A host that is lost ends the others in time; this is for one that hangs all the same.
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
    if (($#)); then mount_runs "$1"; fi
    # TPU VMs come with Python 3.10, which is too old.
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [[ -x venv/bin/python ]] || uv venv --quiet --python 3.11 venv
    uv pip install --quiet --python venv/bin/python -e '.[tpu]' gcsfs
    ;;
  start)
    if alive; then echo "runs already" && exit; fi
    if [[ -e run/log ]]; then mv run/log "run/log.$(date +%Y%m%d_%H%M%S)"; fi
    rm -f run/pid run/ended
    # Outlives the connection, and the shell that waits for it keeps its status.
    # shellcheck disable=SC2016
    nohup setsid bash -c '
      venv/bin/python -u -m cap_pretrain.main "$@" &
      echo $! >run/pid
      wait $! && status=0 || status=$?
      echo "ended $status $SECONDS" >run/ended' _ "$@" >run/log 2>&1 </dev/null &
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
    echo "there is no $verb" >&2
    exit 2
    ;;
esac
