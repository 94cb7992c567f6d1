#!/usr/bin/env bash
# Creates a slice of TPU VMs and trains on it to the end of the run. See docs/tpu_pod.md.
#   tools/launch_tpu.sh --name=NAME --zone=ZONE --type=v5litepod-256 --version=v2-alpha-tpuv5-lite \
#       [FLAGS] -- --config=configs/pretrain.py --workdir=gs://BUCKET/cap [--config.some.field=value]
# Arguments after -- go to `python -m cap_pretrain.main` on every worker. Flags:
#   --project=ID       Google Cloud project; default: that of gcloud
#   --spot             create a preemptible slice, at a lower price
#   --queued           request the slice as a queued resource, which waits for capacity
#   --create_flag=F    extra flag of gcloud's create command, such as --create_flag=--network=NET
#   --mount=WHAT       gs://BUCKET or NFS_HOST:/SHARE, mounted at /mnt/runs on every worker; a workdir in a
#                      bucket (--workdir=gs://BUCKET/RUN) needs none
#   --env=NAME=VALUE   environment variable of the program; may be given repeatedly
#   --max_failures=3   give up after this many crashes in a row, each within --quick=600 seconds
#   --poll=30          seconds between checks of a slice that is not ready
#   --dry_run          print every command instead of running it
#   --stop             only stop the program on the slice, which saves a checkpoint first
# The program runs on without this script: Ctrl-C only stops following its log, and the same command
# follows it again. The slice is not deleted at the end of the run: delete it.
# Exit status: that of the run (0 done, 2 user's mistake, 143 stopped), or 1 if it is unknown.
set -euo pipefail

launcher=launch_tpu
. "$(dirname "${BASH_SOURCE[0]}")/launch_options.sh"
name='' zone='' type='' version='' project='' spot='' queued='' mount='' dry_run='' stop=''
max_failures=3 quick=600 poll=30
read_options 'name:label zone:word type:word version:word project:word mount:mount create_flag:each
  env:variable max_failures:number quick:number poll:seconds spot:switch queued:switch dry_run:switch
  stop:switch' "$@"
[[ $name && $zone ]] || mistake "--name and --zone are required."
if [[ ! $stop ]]; then
  [[ $type && $version ]] || mistake "--type and --version are required."
  need_program
fi
[[ $dry_run ]] || command -v gcloud >/dev/null || die 1 "gcloud is not installed."

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
where=("--zone=$zone" ${project:+"--project=$project"})
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

run() { # runs a command, or prints it
  if [[ $dry_run ]]; then quoted "$@" && echo; else "$@"; fi
}
tpus() { run gcloud compute tpus "$@" "${where[@]}"; }
worker() { # WORKERS VERB ARGUMENTS…: runs tools/launch_tpu_worker.sh on these workers
  local workers=$1 command
  shift
  command="bash cap_pretrain/tools/launch_tpu_worker.sh $(quoted "$@")"
  tpus tpu-vm ssh "$name" --worker="$workers" --command="$command"
}

state() { # tpu-vm|queued-resources FIELD: prints its state, ABSENT, or UNKNOWN if gcloud fails
  if tpus "$1" describe "$name" --format="value($2)" 2>"$temporary/error"; then return; fi
  if grep -qiE 'not.?found' "$temporary/error"; then echo ABSENT && return; fi
  cat "$temporary/error" >&2
  echo UNKNOWN
}

create() {
  local kind=(tpu-vm create "$name" --version="$version")
  if [[ $queued ]]; then
    kind=(queued-resources create "$name" --node-id="$name" --runtime-version="$version")
  fi
  tpus "${kind[@]}" --accelerator-type="$type" ${spot:+--spot} \
    ${each[@]+"${each[@]}"}
}

delete() { # deletes the remains of a preempted slice
  if [[ $queued ]]; then tpus queued-resources delete "$name" --force --quiet && return; fi
  tpus tpu-vm delete "$name" --quiet
}

make_ready() { # returns when the slice is READY
  local now='' before='' unknown=0
  while true; do
    now=$(state tpu-vm state)
    if [[ $now == READY ]]; then return; fi
    # While the node does not exist, the queued resource has the state.
    if [[ $queued && $now =~ ^(ABSENT|PREEMPTED|TERMINATED)$ ]]; then
      now=$(state queued-resources state.state)
    fi
    if [[ $now != "$before" ]]; then say "$name is $now"; fi
    if [[ $now == UNKNOWN ]]; then unknown=$((unknown + 1)); else unknown=0; fi
    before=$now
    case $now in
      ABSENT)
        installed=''
        create 2>"$temporary/error" || no_capacity
        ;;
      PREEMPTED | TERMINATED | SUSPENDED) delete ;;
      STOPPED | FAILED) die 1 "$name is $now; find out why, delete it, and run this again." ;;
    esac
    if ((unknown >= 10)); then die 1 "gcloud cannot determine the state of $name."; fi
    sleep "$poll"
  done
}

no_capacity() { # returns if creation failed for lack of capacity, else exits
  cat "$temporary/error" >&2
  grep -qiE 'no more capacity|insufficient capacity|UNAVAILABLE' "$temporary/error" ||
    die 1 "$name could not be created."
  say "no capacity in $zone; retrying (--queued waits in a queue)"
}

install() { # installs this working tree and its dependencies on all workers
  local unpack='rm -rf cap_pretrain/{cap_pretrain,configs,tools} && mkdir -p cap_pretrain'
  run env COPYFILE_DISABLE=1 tar -czf "$temporary/cap_pretrain.tgz" --exclude=__pycache__ \
    -C "$root" setup.py pyproject.toml README.md cap_pretrain configs tools
  tpus tpu-vm scp "$temporary/cap_pretrain.tgz" "$name:" --worker=all
  tpus tpu-vm ssh "$name" --worker=all \
    --command="$unpack && tar -xzf cap_pretrain.tgz -C cap_pretrain"
  worker all install ${mount:+"$mount"}
}

start() { # starts the program on all workers
  worker all start ${variables[@]+"${variables[@]/#/--env=}"} -- "${program[@]}"
}

running() { # returns 0 if the program runs on worker 0, 1 if not, 2 if this is unknown
  local script='cap_pretrain/tools/launch_tpu_worker.sh' found
  found=$(tpus tpu-vm ssh "$name" --worker=0 \
    --command="if [ -f $script ]; then bash $script state; else echo idle; fi") || return 2
  [[ $found == *running* ]]
}

if [[ $stop ]]; then
  worker all stop
  exit
fi
if [[ $dry_run ]]; then
  echo "# Create $name unless it is READY; a preempted slice is deleted first."
  create
  echo "# Copy and install the code on all workers, unless the program is running there."
  install
  echo "# Start the program on all workers and follow the log of worker 0."
  start
  worker 0 follow
  echo "# Get the exit statuses. 0, 2 and 130 end this, and 143 if the slice is still READY."
  echo "# A preemption repeats all of this; a crash restarts the program, up to $max_failures quick crashes in a row."
  worker all ended
  exit
fi

trap 'say "no longer following; the program keeps running. The same command follows it, --stop stops it."
  exit 130' INT
failures=0 silent=0 installed=''
while true; do
  make_ready
  idle=0 ended=''
  running || idle=$?
  # It still runs and worker 0 answers: what was lost before were connections.
  if ((idle == 0)); then silent=0; fi
  if ((idle == 1)); then
    # A failure here may be a preemption; otherwise it counts as a crash.
    if { [[ $installed ]] || install; } && start; then
      idle=0 installed=1
    else
      ended='1 0' installed=''
    fi
  fi
  if ((idle == 0)) && worker 0 follow; then # prints "ended STATUS SECONDS" for each worker
    ended=$(worker all ended | sed -nE 's/^ended ([0-9]{1,3} (0|[1-9][0-9]{0,8}))$/\1/p') || true
  fi
  statuses=$(awk '{print $1}' <<<"$ended" | sort -un | xargs)
  case " $statuses " in
    ' 0 ') say "done" && exit 0 ;;
    *' 2 '*) say "a mistake in the flags or files, reported above" && exit 2 ;;
    *' 130 '*) exit 130 ;;
  esac
  # A preemption also stops all workers by SIGTERM, and the slice may stay READY for a while.
  looks=1
  if [[ $statuses == 143 || $statuses == '75 143' ]]; then looks=5; fi
  for ((; looks > 0; looks--)); do
    sleep "$poll"
    if [[ $(state tpu-vm state) != READY ]]; then
      say "$name is no longer READY"
      continue 2
    fi
  done
  case "$statuses" in
    143 | '75 143') say "stopped by SIGTERM, not by a preemption" && exit 143 ;;
    '')
      silent=$((silent + 1))
      if ((silent >= 10)); then die 1 "the workers are unreachable, although $name is READY."; fi
      continue
      ;;
  esac
  silent=0
  seconds=$(awk '{print $2}' <<<"$ended" | sort -n | tail -n 1)
  if ((seconds < quick)); then failures=$((failures + 1)); else failures=1; fi
  if ((failures >= max_failures)); then die 1 "crashed $failures times in a row ($statuses)."; fi
  say "crashed ($statuses); restarting"
done
