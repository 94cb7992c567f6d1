#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster with a JobSet, which restarts it. See docs/tpu_pod.md.
#   tools/launch_gke.sh --name=NAME --image=IMAGE --accelerator=tpu-v5-lite-podslice \
#       --topology=16x16 --mount=NFS_HOST:/SHARE [FLAGS] \
#       -- --config=configs/pretrain.py --workdir=/mnt/runs/cap [--config.some.field=value]
# Arguments after -- go to `python -m cap_pretrain.main` in every pod. Flags:
#   --mount=WHAT          NFS_HOST:/SHARE or gs://BUCKET, mounted at /mnt/runs in every pod
#   --chips_per_host=4    chips of the node pool's machine type: 4 for ct5lp-hightpu-4t
#   --spot                use a node pool of spot machines
#   --service_account=SA  Kubernetes service account with access to gs:// paths
#   --max_restarts=10     give up after this many crashes, not counting preemptions
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
chips_per_host=4 max_restarts=10
read_options 'name:label image:image accelerator:word topology:topology mount:mount
  chips_per_host:count service_account:word max_restarts:number spot:switch dry_run:switch' "$@"
[[ $name && $image && $accelerator && $topology && $mount ]] ||
  mistake "--name, --image, --accelerator, --topology and --mount are required."
need_program
hosts=$((${topology//x/*} / chips_per_host))
((hosts * chips_per_host == ${topology//x/*})) ||
  mistake "--topology=$topology does not divide by --chips_per_host=$chips_per_host; change either."

volume() {
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
            containers:
            - name: main
              image: $(text "$image")
              command: [python, -u, -m, cap_pretrain.main]
              args:
$(for flag in "${program[@]}"; do echo "              - $(text "${flag//\$/\$\$}")"; done)
              resources:
                requests: {google.com/tpu: $chips_per_host}
                limits: {google.com/tpu: $chips_per_host}
              volumeMounts:
              - {name: runs, mountPath: /mnt/runs}
              - {name: memory, mountPath: /dev/shm}
            volumes:
            - name: memory  # shared memory of data workers; the default is 64 MB
              emptyDir: {medium: Memory}
            - name: runs
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
