#!/usr/bin/env bash
# Trains on a TPU or GPU node pool of a GKE cluster, as a JobSet.
set -u

usage() {
  cat <<'EOF'
usage: launch/gke.sh COMMAND --name=NAME [OPTIONS] [-- ARGUMENTS]

Commands
  run      start a JobSet of one process per host:  python -m instdisc_jax.main ... ARGUMENTS
           a JobSet of that name that is there already is left alone
  tail     follow the output of the first host
  status   what Kubernetes says of it
  delete   stop the run, which saves first, and delete the JobSet; the nodes stay

Options of run
  --image=IMAGE           a container image with instdisc_jax, its configs, and JAX for the hardware
  --tpu=ACCELERATOR       e.g. tpu-v5-lite-podslice; with
  --topology=TOPOLOGY     e.g. 4x4
  --gpu=ACCELERATOR       in place of the two, e.g. nvidia-h100-80gb
  --chips=N               chips or GPUs of a host (default: 4 TPU chips, 8 GPUs)
  --hosts=N               nodes of the pool (default: those of the topology; of GPUs 1)
  --bucket=BUCKET         a bucket to read the data from, which is mounted at /bucket
  --service-account=NAME  of Kubernetes, which may read and write the buckets (default: default)
  --restarts=N            how often it starts again after a failure or a preemption (default 100); a
                          mistake in ARGUMENTS (exit code 2) ends it at once

Options
  --namespace=NAMESPACE   of Kubernetes (default: kubectl's own)
  --yes                   do not ask before starting or deleting
  --dry-run               show every command and the JobSet, run nothing

A pod that is taken away takes its disk along, so the workdir must be in a bucket. Cloud Storage FUSE
must be enabled in the cluster for --bucket.

Example: launch/gke.sh run --name=r18 --image=IMAGE --tpu=tpu-v5-lite-podslice --topology=4x4 \
           --bucket=BUCKET --service-account=trainer -- --config=configs/imagenet.py:resnet18 \
           --workdir=gs://BUCKET/r18 --config.dataset.data_dir=/bucket/tfds
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

number() {  # NAME VALUE SMALLEST
  if [[ ! $2 =~ ^(0|[1-9][0-9]*)$ ]] || (($2 < $3)); then
    fail "$1 is '$2', must be a number from $3 up: set $1=N"
  fi
}

json() {  # WORD...: a list, as YAML and JSON have it
  local word list=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    list+="${list:+, }\"${word//$'\n'/\\n}\""
  done
  echo "[$list]"
}

shape() {  # sets chips and hosts, from the hardware
  local all
  if [[ -n $gpu ]]; then
    : "${chips:=8}" "${hosts:=1}"
  else
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
      fail "--topology is '$topology', must be numbers with x between: set --topology, e.g. 4x4"
    all=$((${topology//x/*}))
    : "${chips:=$((all < 4 ? all : 4))}"
    number --chips "$chips" 1
    : "${hosts:=$((all / chips))}"
  fi
  number --chips "$chips" 1
  number --hosts "$hosts" 1
  [[ -n $gpu ]] || ((hosts * chips == all)) ||
    fail "--topology=$topology has $all chips, and $hosts host(s) of $chips have $((hosts * chips)): \
set --hosts or --chips"
}

jobset() {  # the filled-in jobset.yaml
  local resource=google.com/tpu selector command text annotations='{}' volume mount
  selector="{cloud.google.com/gke-tpu-accelerator: $tpu, cloud.google.com/gke-tpu-topology: $topology}"
  if [[ -n $gpu ]]; then
    resource=nvidia.com/gpu
    selector="{cloud.google.com/gke-accelerator: $gpu}"
  fi
  volume='{name: shm, emptyDir: {medium: Memory}}' mount='{name: shm, mountPath: /dev/shm}'
  if [[ -n $bucket ]]; then
    annotations='{gke-gcsfuse/volumes: "true"}'
    volume+=", {name: bucket, csi: {driver: gcsfuse.csi.storage.gke.io, readOnly: true, \
volumeAttributes: {bucketName: $(quoted "$bucket"), mountOptions: implicit-dirs}}}"
    mount+=', {name: bucket, mountPath: /bucket, readOnly: true}'
  fi
  # Kubernetes fills in $(...), but not $$(...); the first host has the number 0 and a name of its own.
  command=$(json python -m instdisc_jax.main "--coordinator=$name-host-0-0.$name:8476" \
    "--num_processes=$hosts" "--process_id=\$(JOB_COMPLETION_INDEX)" "${arguments[@]//\$(/\$\$(}")
  text=$(<"$here/jobset.yaml")
  text=${text//@NAME@/"$(quoted "$name")"}
  text=${text//@RESTARTS@/"$restarts"}
  text=${text//@HOSTS@/"$hosts"}
  text=${text//@SELECTOR@/"$selector"}
  text=${text//@RESOURCE@/"$resource"}
  text=${text//@CHIPS@/"$chips"}
  text=${text//@IMAGE@/"$(quoted "$image")"}
  text=${text//@SERVICE_ACCOUNT@/"$(quoted "$service_account")"}
  text=${text//@ANNOTATIONS@/"$annotations"}
  text=${text//@VOLUMES@/"[$volume]"}
  text=${text//@MOUNTS@/"[$mount]"}
  text=${text//@COMMAND@/"$command"}
  printf '%s\n' "$text"
}

quoted() {  # WORD: as YAML and JSON have it
  local list
  list=$(json "$1")
  list=${list#[}
  echo "${list%]}"
}

run() {
  [[ -n $image ]] || fail "no image: set --image=IMAGE"
  [[ -n $tpu || -n $gpu ]] || fail "no hardware: set --tpu=ACCELERATOR and --topology, or --gpu"
  [[ -z $tpu || -z $gpu ]] || fail "--tpu=$tpu and --gpu=$gpu, must be one of them: leave one out"
  [[ -z $tpu || -n $topology ]] || fail "no topology of the TPU: set --topology=TOPOLOGY, e.g. 4x4"
  shape
  number --restarts "$restarts" 0
  ((${#arguments[@]})) || fail "no arguments for instdisc_jax.main: put them after --, see --help"
  [[ " ${arguments[*]} " == *' --workdir'[=\ ]'gs://'* ]] ||
    fail "a pod that is taken away takes its disk along: set --workdir=gs://BUCKET/FOLDER after --"
  if [[ -z $dry_run ]] && "${kubectl[@]}" get jobset "$name" >/dev/null 2>&1; then
    echo "$name is there already: see launch/gke.sh status --name=$name"
    return
  fi
  confirm "start $name on $hosts host(s) of $chips ${gpu:-$tpu $topology}"
  show_and "${kubectl[@]}" apply -f - < <(jobset)
  [[ -z $dry_run ]] || jobset
}

(($#)) || fail "no command, must be run, tail, status or delete: see --help"
command=$1
shift
name='' image='' hosts='' tpu='' topology='' gpu='' chips='' bucket='' service_account=default
restarts=100 yes='' dry_run='' kubectl=(kubectl) arguments=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --gpu=*) gpu=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --service-account=*) service_account=${1#*=} ;;
    --namespace=*) kubectl+=("$1") ;;
    --yes) yes=1 ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; arguments=("$@"); break ;;
    *) fail "unknown argument '$1': see --help" ;;
  esac
  shift
done
case $command in
  --help | -h) usage; exit 0 ;;
  run | tail | status | delete) ;;
  *) fail "unknown command '$command', must be run, tail, status or delete: see --help" ;;
esac
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "name is '$name', must be lower-case letters, digits and '-', up to 40: set --name=NAME"
[[ -n $dry_run ]] || command -v kubectl >/dev/null ||
  fail "no 'kubectl' on the PATH: install it, and get the cluster's credentials"

case $command in
  run) run ;;
  tail) show_and "${kubectl[@]}" logs --follow --tail=50 --container=train \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" ;;
  status)
    show_and "${kubectl[@]}" get jobset "$name"
    show_and "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" ;;
  delete)
    confirm "stop $name and delete its JobSet"
    show_and "${kubectl[@]}" delete jobset "$name" ;;
esac
