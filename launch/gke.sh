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
  --hosts=N               nodes of the pool (default 1)
  --tpu=ACCELERATOR       e.g. tpu-v5-lite-podslice; with
  --topology=TOPOLOGY     e.g. 4x4
  --gpu=ACCELERATOR       in place of the two, e.g. nvidia-h100-80gb
  --chips=N               chips or GPUs of a host (default: 4 TPU chips, 8 GPUs)
  --restarts=N            how often it starts again after a failure or a preemption (default 100)

Options
  --namespace=NAMESPACE   of Kubernetes (default: kubectl's own)
  --yes                   do not ask before starting or deleting
  --dry-run               show every command and the JobSet, run nothing

Example: launch/gke.sh run --name=r18 --image=IMAGE --tpu=tpu-v5-lite-podslice --topology=4x4 \
           --hosts=4 -- --config=configs/imagenet.py:resnet18 --workdir=/bucket/r18
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

number() {  # NAME VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2', must be a number from 1 up: set $1=N"
}

json() {  # WORD...: a list, as YAML and JSON have it
  local word list=''
  for word in "$@"; do
    word=${word//\\/\\\\}
    list+="${list:+, }\"${word//\"/\\\"}\""
  done
  echo "[$list]"
}

jobset() {  # the filled-in jobset.yaml
  local resource=google.com/tpu selector command text
  selector="{cloud.google.com/gke-tpu-accelerator: $tpu, cloud.google.com/gke-tpu-topology: $topology}"
  if [[ -n $gpu ]]; then
    resource=nvidia.com/gpu
    selector="{cloud.google.com/gke-accelerator: $gpu}"
  fi
  # Kubernetes fills in $(...); the first host has the number 0 and a name of its own.
  command=$(json python -m instdisc_jax.main "--coordinator=$name-host-0-0.$name:8476" \
    "--num_processes=$hosts" "--process_id=\$(JOB_COMPLETION_INDEX)" "${arguments[@]}")
  text=$(<"$here/jobset.yaml")
  text=${text//@NAME@/"$name"}
  text=${text//@RESTARTS@/"$restarts"}
  text=${text//@HOSTS@/"$hosts"}
  text=${text//@SELECTOR@/"$selector"}
  text=${text//@RESOURCE@/"$resource"}
  text=${text//@CHIPS@/"$chips"}
  text=${text//@IMAGE@/"$(json "$image" | tr -d '[]')"}
  text=${text//@COMMAND@/"$command"}
  printf '%s\n' "$text"
}

run() {
  [[ -n $image ]] || fail "no image: set --image=IMAGE"
  [[ -n $tpu || -n $gpu ]] || fail "no hardware: set --tpu=ACCELERATOR and --topology, or --gpu"
  [[ -z $tpu || -z $gpu ]] || fail "--tpu=$tpu and --gpu=$gpu, must be one of them: leave one out"
  [[ -z $tpu || -n $topology ]] || fail "no topology of the TPU: set --topology=TOPOLOGY, e.g. 4x4"
  ((${#arguments[@]})) || fail "no arguments for instdisc_jax.main: put them after --, see --help"
  number --hosts "$hosts"
  number --restarts "$restarts"
  [[ -n $chips ]] || chips=$([[ -n $gpu ]] && echo 8 || echo 4)
  number --chips "$chips"
  if [[ -z $dry_run ]] && kubectl get jobset "$name" "${where[@]}" >/dev/null 2>&1; then
    echo "$name is there already: see launch/gke.sh status --name=$name"
    return
  fi
  confirm "start $name on $hosts host(s) of $chips ${gpu:-$tpu $topology}"
  if [[ -n $dry_run ]]; then
    show_and kubectl apply "${where[@]}" -f -
    jobset
  else
    jobset | kubectl apply "${where[@]}" -f -
  fi
}

(($#)) || fail "no command, must be run, tail, status or delete: see --help"
command=$1
shift
name='' image='' hosts=1 tpu='' topology='' gpu='' chips='' restarts=100 yes='' dry_run=''
where=() arguments=()
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
    --namespace=*) where+=("$1") ;;
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
  tail) show_and kubectl logs "${where[@]}" --follow --tail=50 \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" ;;
  status)
    show_and kubectl get jobset "$name" "${where[@]}"
    show_and kubectl get pods "${where[@]}" "--selector=jobset.sigs.k8s.io/jobset-name=$name" ;;
  delete)
    confirm "stop $name and delete its JobSet"
    show_and kubectl delete jobset "$name" "${where[@]}" ;;
esac
