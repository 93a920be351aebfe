#!/usr/bin/env bash
# Trains on a TPU or GPU node pool of a GKE cluster, as a JobSet.
set -u

usage() {
  cat <<'EOF'
usage: launch/gke.sh COMMAND --name=NAME [OPTIONS] [-- ARGUMENTS]

Commands
  run      create a JobSet with one process per host: python -m instdisc_jax.main ... ARGUMENTS
           does nothing if a JobSet of that name is active
  tail     follow the output of the first host
  status   show the state of the JobSet and its pods
  delete   stop the run, wait until it has saved, and delete the JobSet; the nodes stay

Options of run
  --image=IMAGE           container image with instdisc_jax, its configs, and JAX for the hardware
  --tpu=ACCELERATOR       TPU type, e.g. tpu-v5-lite-podslice; needs --topology
  --topology=TOPOLOGY     TPU topology, e.g. 4x4
  --gpu=ACCELERATOR       GPU type, e.g. nvidia-h100-80gb; replaces --tpu and --topology
  --chips=N               chips or GPUs per host (default: 4 TPU chips, 8 GPUs)
  --hosts=N               number of hosts (default: as many as the topology has; 1 for GPUs)
  --bucket=BUCKET         bucket to read the data from, mounted at /bucket; the cluster needs
                          Cloud Storage FUSE
  --service-account=NAME  Kubernetes service account with read and write access to the buckets
                          (default: default)
  --queue=QUEUE           Kueue queue that admits the JobSet (default: none)
  --check                 compile the run for the hardware, here, and refuse it if it does not fit;
                          needs instdisc_jax[tpu-compiler] or [gpu-compiler] here
  --restarts=N            restarts allowed after failures and preemptions (default: 100); a mistake in
                          ARGUMENTS (exit code 2) ends the run at once

Options
  --namespace=NAMESPACE   Kubernetes namespace (default: kubectl's own)
  --yes                   do not ask before starting or deleting
  --dry-run               show every command and the JobSet, run nothing

A preempted pod loses its disk, so the workdir must be in a bucket.

Example: launch/gke.sh run --name=r18 --image=IMAGE --tpu=tpu-v5-lite-podslice --topology=4x4 \
           --bucket=BUCKET --service-account=trainer -- --config=configs/imagenet.py:resnet18 \
           --workdir=gs://BUCKET/r18 --config.dataset.data_dir=/bucket/tfds
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

json() {  # WORD: as a JSON string, which YAML reads too
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  echo "\"${word//$'\n'/\\n}\""
}

json_list() {  # WORDS...: as a JSON list of strings
  local word list=''
  for word in "$@"; do
    list+="${list:+, }$(json "$word")"
  done
  echo "[$list]"
}

set_shape() {  # sets chips and hosts from the hardware, where they are not given
  local all
  if [[ -n $gpu ]]; then
    : "${chips:=8}" "${hosts:=1}"
  else
    [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
      fail "--topology is '$topology', must be integers joined by 'x': set --topology, e.g. 4x4"
    all=$((${topology//x/*}))
    : "${chips:=$((all < 4 ? all : 4))}"
    number --chips "$chips" 1
    : "${hosts:=$((all / chips))}"
  fi
  number --chips "$chips" 1
  number --hosts "$hosts" 1
  [[ -n $gpu ]] || ((hosts * chips == all)) ||
    fail "--topology=$topology has $all chips, but $hosts host(s) with $chips chips each have \
$((hosts * chips)): set --hosts or --chips"
}

check_hardware() {  # with --check, refuses a run that does not fit the hardware
  [[ -n $check ]] || return 0
  case ${gpu:-$tpu} in
    tpu-v5-lite-podslice) check_fit "v5e:$topology" ;;
    tpu-v6e-slice) check_fit "v6e:$topology" ;;
    tpu-v5p-slice) check_fit "v5p:$topology" ;;
    nvidia-h100-*) check_fit "h100:$((hosts * chips))" ;;
    *) fail "--check knows tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice and nvidia-h100, not \
${gpu:-$tpu}: leave out --check" ;;
  esac
}

jobset() {  # prints jobset.yaml, filled in
  local resource=google.com/tpu selector command text annotations='{}' labels='{}' volume mount
  selector="{cloud.google.com/gke-tpu-accelerator: $tpu, cloud.google.com/gke-tpu-topology: $topology}"
  if [[ -n $gpu ]]; then
    resource=nvidia.com/gpu
    selector="{cloud.google.com/gke-accelerator: $gpu}"
  fi
  volume='{name: shm, emptyDir: {medium: Memory}}' mount='{name: shm, mountPath: /dev/shm}'
  if [[ -n $bucket ]]; then
    annotations='{gke-gcsfuse/volumes: "true"}'
    volume+=", {name: bucket, csi: {driver: gcsfuse.csi.storage.gke.io, readOnly: true, \
volumeAttributes: {bucketName: $(json "$bucket"), mountOptions: implicit-dirs}}}"
    mount+=', {name: bucket, mountPath: /bucket, readOnly: true}'
  fi
  [[ -z $queue ]] || labels="{kueue.x-k8s.io/queue-name: $(json "$queue")}"
  # Kubernetes expands $(...) but not $$(...). The first host has index 0 and a stable name.
  command=$(json_list python -m instdisc_jax.main "--coordinator=$name-host-0-0.$name:8476" \
    "--num_processes=$hosts" "--process_id=\$(JOB_COMPLETION_INDEX)" "${arguments[@]//\$(/\$\$(}")
  text=$(<"$here/jobset.yaml")
  text=${text//@NAME@/"$(json "$name")"}
  text=${text//@LABELS@/"$labels"}
  text=${text//@RESTARTS@/"$restarts"}
  text=${text//@HOSTS@/"$hosts"}
  text=${text//@SELECTOR@/"$selector"}
  text=${text//@RESOURCE@/"$resource"}
  text=${text//@CHIPS@/"$chips"}
  text=${text//@IMAGE@/"$(json "$image")"}
  text=${text//@SERVICE_ACCOUNT@/"$(json "$service_account")"}
  text=${text//@ANNOTATIONS@/"$annotations"}
  text=${text//@VOLUMES@/"[$volume]"}
  text=${text//@MOUNTS@/"[$mount]"}
  text=${text//@COMMAND@/"$command"}
  printf '%s\n' "$text"
}

run() {
  local ended
  [[ -n $image ]] || fail "no image: set --image=IMAGE"
  [[ -n $tpu || -n $gpu ]] || fail "no hardware: set --tpu=ACCELERATOR and --topology, or --gpu"
  [[ -z $tpu || -z $gpu ]] || fail "--tpu=$tpu and --gpu=$gpu must not both be set: remove one"
  [[ -z $tpu || -n $topology ]] || fail "no TPU topology: set --topology=TOPOLOGY, e.g. 4x4"
  set_shape
  number --restarts "$restarts" 0
  need_arguments main
  need_bucket pod
  [[ -z $queue || $queue =~ ^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$ ]] ||
    fail "--queue is '$queue', must be lower-case letters, digits, '-' and '.': set --queue=QUEUE"
  check_hardware
  if [[ -z $dry_run ]] && ended=$("${kubectl[@]}" get jobset "$name" \
      '--output=jsonpath={.status.terminalState}' 2>/dev/null); then
    [[ -z $ended ]] ||
      fail "$name has ended ($ended): delete it first, launch/gke.sh delete --name=$name"
    echo "$name already exists: see launch/gke.sh status --name=$name"
    return
  fi
  confirm "start $name on $hosts host(s) with $chips chip(s) each (${gpu:-$tpu $topology})"
  show_or_run "${kubectl[@]}" apply -f - < <(jobset)
  [[ -z $dry_run ]] || jobset
}

commands=(run tail status delete)
options=(--name= --image= --tpu= --topology= --gpu= --chips= --hosts= --bucket= --service-account=
  --queue= --restarts= --namespace= --check --yes --dry-run)
name='' image='' tpu='' topology='' gpu='' chips='' hosts='' bucket='' service_account=default
queue='' restarts=100 namespace='' check='' yes='' dry_run=''
parse_command "$@"
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "name is '$name', must be lower-case letters, digits and '-', at most 40: set --name=NAME"
need_tool kubectl "install it, and get credentials for the cluster"
kubectl=(kubectl)
[[ -z $namespace ]] || kubectl+=("--namespace=$namespace")

case $command in
  run) run ;;
  tail) show_or_run "${kubectl[@]}" logs --follow --tail=50 --container=train \
    "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" ;;
  status)
    show_or_run "${kubectl[@]}" get jobset "$name" &&
      show_or_run "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" ;;
  delete)
    confirm "stop $name and delete its JobSet"
    show_or_run "${kubectl[@]}" delete jobset "$name" --cascade=foreground --wait ;;
esac
