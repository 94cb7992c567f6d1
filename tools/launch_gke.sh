#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster with a JobSet, which restarts it. See docs/tpu_pod.md.
#   tools/launch_gke.sh --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice \
#       --topology=16x16 [FLAGS] \
#       -- --config=configs/pretrain.py --workdir=gs://BUCKET/cap [--config.some.field=value]
# Arguments after -- go to `python -m cap_pretrain.main` in every pod. Flags:
#   --mount=WHAT          NFS_HOST:/SHARE or gs://BUCKET, mounted at /mnt/runs in every pod; needed
#                         unless the workdir is in a bucket
#   --env=NAME=VALUE      environment variable of the program; may be given repeatedly
#   --memory=GB           memory that a pod requests; default: 24 for each chip, half of what v5e has,
#                         and the dataset cache if --config.data.cache is below /dev/shm
#   --disk=GB             disk that a pod requests; default: 10, and the dataset cache: this host's part
#                         of --config.data.cache_gb (64). With --config.data.order=global every host
#                         keeps the whole dataset: give its size and 10 more
#   --hugepages           enable transparent hugepages on the nodes from a privileged container, which
#                         Autopilot refuses. The node pool can have them instead: linuxConfig:
#                         {transparentHugepageEnabled: TRANSPARENT_HUGEPAGE_ENABLED_ALWAYS} in the
#                         file of gcloud's --system-config-from-file
#   --chips_per_host=4    chips of the node pool's machine type: 4 for ct5lp-hightpu-4t
#   --spot                use a node pool of spot machines
#   --service_account=SA  Kubernetes service account with access to gs:// paths
#   --max_restarts=10     give up after this many crashes, not counting preemptions. Pods killed by
#                         SIGKILL count: they used too much memory, or had not saved when the
#                         notice of a preemption ran out
#   --dry_run             print the manifest instead of applying it
# An existing JobSet of that name is stopped, which saves a checkpoint, and replaced. The run resumes.
set -euo pipefail

launcher=launch_gke
. "$(dirname "${BASH_SOURCE[0]}")/launch_options.sh"
text() { # a YAML string
  local quote="'"
  printf "'%s'" "${1//$quote/$quote$quote}"
}

name='' image='' accelerator='' topology='' mount='' spot='' service_account='' dry_run=''
memory='' disk='' hugepages=''
chips_per_host=4 max_restarts=10
read_options 'name:label image:image accelerator:word topology:topology mount:mount
  chips_per_host:count service_account:word max_restarts:number env:variable
  memory:count disk:count hugepages:switch spot:switch dry_run:switch' "$@"
[[ $name && $image && $accelerator && $topology ]] ||
  mistake "--name, --image, --accelerator and --topology are required."
need_program
[[ $mount || " ${program[*]}" =~ [[:space:]]--?workdir[=[:space:]]gs:// ]] ||
  mistake "--mount: is required, or a workdir in a bucket (--workdir=gs://BUCKET/RUN)."
hosts=$((${topology//x/*} / chips_per_host))
((hosts * chips_per_host == ${topology//x/*})) ||
  mistake "--topology=$topology does not divide by --chips_per_host=$chips_per_host; change either."

# The part of the dataset cache that one host needs, in GB, if it reads blocks.
cache=$(given data.cache_gb 64)
[[ $cache =~ ^[0-9]{1,7}([.][0-9]{0,6})?$ ]] || cache=64 # not a number; the program says so
cache=$(awk -v all="$cache" -v hosts="$hosts" 'BEGIN { part = all / hosts; print int(part) + (part > int(part)) }')
on_disk=$cache in_memory=0
case $(given data.cache '') in /dev/shm | /dev/shm/*) on_disk=0 in_memory=$cache ;; esac
memory=${memory:-$((24 * chips_per_host + in_memory))}
disk=${disk:-$((10 + on_disk))}

volume() {
  if [[ ! $mount ]]; then return; fi
  echo "            - name: runs"
  if [[ $mount == gs://* ]]; then
    # See tools/launch_tpu_worker.sh for these options.
    local bucket=${mount#gs://}
    local options=metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
    cat <<END
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $(text "${bucket%/}")
                  mountOptions: $options,file-system:rename-dir-limit:0
END
  else
    cat <<END
              nfs:
                server: $(text "${mount%%:/*}")
                path: $(text "/${mount#*:/}")
END
  fi
}

environment() {
  local variable
  if ((${#variables[@]})); then echo "              env:"; fi
  # Kubernetes expands $(NAME) in values, as in flags, and replaces $$ by $.
  for variable in ${variables[@]+"${variables[@]}"}; do
    echo "              - name: $(text "${variable%%=*}")" # else NO is a boolean
    variable=${variable#*=}
    echo "                value: $(text "${variable//\$/\$\$}")"
  done
}

before() { # containers that run before the program
  if [[ ! $hugepages ]]; then return; fi
  cat <<END
            initContainers:
            - name: hugepages  # as JAX asks: the TPU runtime starts and ends faster
              image: $(text "$image")
              command: [sh, -c, 'echo always >/sys/kernel/mm/transparent_hugepage/enabled']
              securityContext: {privileged: true}
END
}

optional() {
  if [[ $spot ]]; then
    echo "              cloud.google.com/gke-spot: 'true'"
    echo "            tolerations: [{key: cloud.google.com/gke-spot, operator: Exists}]"
  fi
  echo "            serviceAccountName: $(text "${service_account:-default}")"
}

manifest() {
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(text "$name")
  annotations:
    # Puts all pods on one slice.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
      onJobFailureMessagePatterns: ['exit code 2 ']
    - name: preempted
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0  # a failed pod stops the others, and all restart
        podFailurePolicy:
          rules:
          # 137: SIGKILL, mostly for too much memory. These restarts count, also those of pods that the
          # node evicted for it: they have the condition of the last rule, whose restarts do not count.
          - action: Count
            onExitCodes: {containerName: main, operator: In, values: [137]}
          # 2: the user's mistake. 143: stopped by SIGTERM after saving.
          - action: FailJob
            onExitCodes: {containerName: main, operator: In, values: [2, 143]}
          - action: FailJob
            onPodConditions: [{type: DisruptionTarget, status: 'True'}]
        template:
          metadata:
            annotations: {gke-gcsfuse/volumes: '$([[ $mount == gs://* ]] && echo true || echo false)'}
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300  # for saving
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(text "$accelerator")
              cloud.google.com/gke-tpu-topology: $(text "$topology")
$(optional)
$(before)
            containers:
            - name: main
              image: $(text "$image")
              command: [python, -u, -m, cap_pretrain.main]
              args:
$(for flag in "${program[@]}"; do echo "              - $(text "${flag//\$/\$\$}")"; done)
$(environment)
              resources:
                requests: {google.com/tpu: $chips_per_host, memory: ${memory}G, ephemeral-storage: ${disk}G}
                limits: {google.com/tpu: $chips_per_host}
              volumeMounts:
              - {name: memory, mountPath: /dev/shm}
$([[ ! $mount ]] || echo "              - {name: runs, mountPath: /mnt/runs}")
            volumes:
            - name: memory  # shared memory of data workers; the default is 64 MB
              emptyDir: {medium: Memory}
$(volume)
END
}

if [[ $dry_run ]]; then
  manifest
  exit
fi
manifest=$(manifest) # fails, if it does, before anything is deleted
kubectl delete jobset "$name" --ignore-not-found --cascade=foreground
kubectl create -f - <<<"$manifest"
of="--selector=jobset.sigs.k8s.io/jobset-name=$name"
cat <<END
Pods: kubectl get pods $of
Log:  kubectl logs -f -c main --tail=200 $of,batch.kubernetes.io/job-completion-index=0
Stop: kubectl delete jobset $name
END
