#!/usr/bin/env bash
# Trains on a Cloud TPU VM, a single host or a slice of a pod: from making it to deleting it.
set -u

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS]

Commands
  create   ask for the TPU and wait until it is there
  setup    install instdisc_jax on all of its hosts, and copy the data there
  run      start on all hosts:  python -m instdisc_jax.main --distributed ARGUMENTS
  tail     follow the output of the first host; Ctrl-C leaves the run alone
  stop     stop the run on all hosts; it saves first
  delete   delete the TPU
  all      create, setup and run, and wait; a TPU that was preempted is made again and the run goes
           on from its checkpoints, which must be in a bucket: -- ... --workdir=gs://BUCKET/FOLDER

Options
  --name=NAME          of the TPU
  --zone=ZONE          e.g. us-west4-a
  --type=TYPE          of the TPU, e.g. v5litepod-8 (one host) or v5litepod-64 (a slice)
  --runtime=VERSION    of its software (default: v2-alpha-tpuv5-lite)
  --project=PROJECT    (default: gcloud's own)
  --source=ADDRESS     what pip installs on the hosts: git+https://..., gs://.../x.whl or a name
  --configs=FOLDER     copied to the hosts (default: configs)
  --data=gs://...      a folder of a bucket, copied to ~/data on each host (the disk must hold it)
  --spot               a spot TPU: cheaper, and may be taken away
  --direct             create without the queue of queued resources
  --yes                do not ask before making or deleting something that costs money
  --dry-run            show every command, run none

Example: launch/tpu_vm.sh all --name=r50 --zone=us-west4-a --type=v5litepod-64 --spot \
           --source=git+https://ADDRESS --data=gs://BUCKET/tfds -- \
           --config=configs/imagenet_tpu.py --workdir=gs://BUCKET/r50 --config.dataset.data_dir=data
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

on_hosts() {  # WORKERS COMMAND: in a shell of each of those hosts
  show_and gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

quoted() {  # WORD...: as one line that a shell reads back as these words
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
}

state() {  # of the TPU, or nothing where there is none
  if [[ -n $direct ]]; then
    gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)' 2>/dev/null
  else
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      '--format=value(state.state)' 2>/dev/null
  fi
}

create() {
  [[ -n $type ]] || fail "no type of TPU: set --type=TYPE, e.g. --type=v5litepod-8"
  local now='' spot_flag=()
  [[ -n $spot ]] && spot_flag=(--spot)
  [[ -n $dry_run ]] || now=$(state)
  if [[ $now == ACTIVE || $now == READY ]]; then
    echo "$name is there already"
    return
  fi
  if [[ $now == SUSPENDED || $now == FAILED || $now == PREEMPTED || $now == TERMINATED ]]; then
    echo "$name is $now: it is deleted and made again"
    delete_now
    now=
  fi
  if [[ -z $now ]]; then
    confirm "make 1 TPU $type${spot:+, spot,} named $name in $zone"
    if [[ -n $direct ]]; then
      show_and gcloud compute tpus tpu-vm create "$name" "${where[@]}" \
        "--accelerator-type=$type" "--version=$runtime" "${spot_flag[@]}" || return
    else
      show_and gcloud compute tpus queued-resources create "$name" "--node-id=$name" \
        "${where[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" \
        "${spot_flag[@]}" || return
    fi
  fi
  [[ -n $dry_run ]] && return
  until now=$(state) && [[ $now == ACTIVE || $now == READY ]]; do
    case $now in
      FAILED | SUSPENDED | PREEMPTED | '')
        echo "failed: $name is ${now:-gone}: run the same command again" >&2
        return 1 ;;
    esac
    echo "$name is $now: waiting"
    sleep "$poll"
  done
  echo "$name is there"
}

setup() {
  [[ -n $source ]] || fail "nothing to install: set --source=ADDRESS, e.g. --source=git+https://..."
  [[ -d $configs ]] || fail "no folder '$configs': set --configs"
  [[ -z $data || $data == gs://?* ]] || fail "--data is '$data', must be gs://BUCKET/FOLDER: set --data"
  show_and gcloud compute tpus tpu-vm scp --recurse "$configs" "$here/on_host.sh" "$name:" \
    "${where[@]}" --worker=all && on_hosts all "$(quoted bash on_host.sh install "$source")" || return
  [[ -z $data ]] || on_hosts all "$(quoted bash on_host.sh data "$data")"
}

run() {
  ((${#arguments[@]})) || fail "no arguments for instdisc_jax.main: put them after --, see --help"
  on_hosts all "$(quoted bash on_host.sh start "${arguments[@]}")"
}

code() {  # the exit code of the run on the first host; nothing while it runs
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    '--command=bash on_host.sh code' 2>/dev/null
}

delete_now() {
  if [[ -n $direct ]]; then
    show_and gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  else
    show_and gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

delete() {
  confirm "delete the TPU $name in $zone"
  delete_now
}

all() {
  [[ " ${arguments[*]-} " == *' --workdir=gs://'* ]] ||
    fail "a TPU that is taken away takes its disk along: set --workdir=gs://BUCKET/FOLDER after --"
  while :; do
    create && setup && run || return
    if [[ -n $dry_run ]]; then
      echo "# then, until the run has ended: state every $poll s; preempted, all of it again"
      return
    fi
    local now ended
    while now=$(state) && [[ $now == ACTIVE || $now == READY ]]; do
      ended=$(code)
      if [[ -n $ended ]]; then
        on_hosts 0 'tail -n 20 run.log'
        return "$ended"
      fi
      sleep "$poll"
    done
    echo "$name is ${now:-gone}: it is made again, and the run goes on"
    yes=1  # it was agreed to once
  done
}

(($#)) || fail "no command, must be create, setup, run, tail, stop, delete or all: see --help"
command=$1
shift
name='' zone='' type='' runtime=v2-alpha-tpuv5-lite project='' source='' configs=configs data=''
spot='' direct='' yes='' dry_run='' arguments=() poll=${POLL_SECONDS:-30}
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --source=*) source=${1#*=} ;;
    --configs=*) configs=${1#*=} ;;
    --data=*) data=${1#*=} ;;
    --spot) spot=1 ;;
    --direct) direct=1 ;;
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
  create | setup | run | tail | stop | delete | all) ;;
  *) fail "unknown command '$command', must be create, setup, run, tail, stop, delete or all: see \
--help" ;;
esac
[[ -n $name ]] || fail "no name: set --name=NAME"
[[ -n $zone ]] || fail "no zone: set --zone=ZONE, e.g. --zone=us-west4-a"
[[ -n $dry_run ]] || command -v gcloud >/dev/null ||
  fail "no 'gcloud' on the PATH: install the Google Cloud SDK"
where=("--zone=$zone")
[[ -n $project ]] && where+=("--project=$project")

case $command in
  tail) on_hosts 0 'tail -n 50 -F run.log' ;;
  stop) on_hosts all 'bash on_host.sh stop' ;;
  *) "$command" ;;
esac
