#!/usr/bin/env bash
# Trains on a Cloud TPU VM, a single host or a pod slice, and creates, sets up and deletes it.
set -u

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS]

Commands
  create   request the TPU and wait until it is ready; a preempted one is deleted first
  setup    install instdisc_jax and copy or mount the data on all hosts
  run      start on all hosts: python -m instdisc_jax.main --distributed ARGUMENTS
  tail     follow the output of the first host; Ctrl-C does not stop the run
  stop     stop the run on all hosts and wait until it has saved
  delete   delete the TPU
  all      create, setup and run, then wait for the run to end. A preempted TPU is recreated, and
           a failing run is tried up to three times in all. The run resumes from its checkpoints, which
           must be in a bucket: -- ... --workdir=gs://BUCKET/FOLDER

Options
  --name=NAME          name of the TPU
  --zone=ZONE          e.g. us-west4-a
  --type=TYPE          TPU type, e.g. v5litepod-8 (one host) or v5litepod-64 (a slice)
  --runtime=VERSION    TPU software version (default: the one for the type)
  --project=PROJECT    Google Cloud project (default: gcloud's own)
  --source=ADDRESS     what pip installs on the hosts: git+https://... or a name
  --configs=FOLDER     copied to the hosts (default: configs)
  --data=gs://...      folder in a bucket, copied to ~/data on each host; the host's disk holds 100 GB
  --data-disk=DISK     for larger data sets, instead of --data: a disk in the same zone, mounted
                       read-only at ~/data on each host
  --spot               request a spot TPU: cheaper, but may be preempted
  --direct             create the TPU without a queued resource, which would wait for a free TPU
  --check              before create, run or all: compile the run for --type, here, and refuse it if
                       it does not fit; needs instdisc_jax[tpu-compiler] here and ARGUMENTS
  --yes                do not ask before creating or deleting anything that costs money
  --dry-run            show every command, run nothing

Example: launch/tpu_vm.sh all --name=r50 --project=PROJECT --zone=us-west4-a --spot \
           --type=v5litepod-64 --source=git+https://ADDRESS --data-disk=imagenet -- \
           --config=configs/imagenet_tpu.py --workdir=gs://BUCKET/r50 --config.dataset.data_dir=data
EOF
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
. "$here/common.sh"

on_hosts() {  # WORKERS COMMAND: runs COMMAND in a shell on each of WORKERS
  show_or_run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

quoted() {  # WORDS...: as a command line for on_hosts
  local line
  line=$(show "$@")
  echo "${line% }"
}

describe() {
  if [[ -n $direct ]]; then
    gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)'
  else
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      '--format=value(state.state)'
  fi
}

state() {  # prints the TPU's state: nothing if it does not exist, UNKNOWN if the cloud does not answer
  local message
  describe 2>/dev/null && return
  message=$(describe 2>&1 >/dev/null)
  [[ $message == *NOT_FOUND* || $message == *'not found'* ]] && return
  echo "$message" >&2
  echo UNKNOWN
}

lost() {  # whether the TPU is certainly no longer available; sets now to its state
  now=$(state)
  [[ $now != ACTIVE && $now != READY && $now != UNKNOWN ]]
}

create_now() {
  local words=(gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}"
    "--accelerator-type=$type" "--runtime-version=$runtime")
  [[ -n $direct ]] && words=(gcloud compute tpus tpu-vm create "$name" "${where[@]}"
    "--accelerator-type=$type" "--version=$runtime")
  [[ -n $spot ]] && words+=(--spot)
  [[ -n $data_disk ]] && words+=("--data-disk=source=$data_disk,mode=read-only")
  show_or_run "${words[@]}"
}

topology() {  # prints the topology of --type, as instdisc_jax.compile names it
  local chips=${type##*-}
  [[ $chips =~ ^[1-9][0-9]*$ ]] || fail "--type is '$type', must end in a number of chips: set --type"
  case $type in
    v5litepod-*) shape v5e "$chips" 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 ;;
    v6e-*) shape v6e "$chips" 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 ;;
    v5p-*) shape v5p "$((chips / 2))" 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 ;;
    *) fail "--check knows v5litepod, v6e and v5p, not --type=$type: leave out --check" ;;
  esac
}

shape() {  # KIND CHIPS SHAPES...: prints the shape with so many chips
  local candidate
  for candidate in "${@:3}"; do
    if ((${candidate//x/*} == $2)); then
      echo "$1:$candidate"
      return
    fi
  done
  fail "--check knows no slice like --type=$type: leave out --check"
}

check_type() {  # with --check, refuses a run that does not fit --type
  local found
  [[ -n $check ]] || return 0
  [[ -n $type ]] || fail "no TPU type: set --type=TYPE, e.g. --type=v5litepod-8"
  found=$(topology) || exit 2
  check_fit "$found"
}

check_create() {
  [[ -n $type ]] || fail "no TPU type: set --type=TYPE, e.g. --type=v5litepod-8"
  [[ -z $data || -z $data_disk ]] ||
    fail "--data=$data and --data-disk=$data_disk must not both be set: remove one"
  [[ $data_disk != *,* ]] || fail "--data-disk is '$data_disk', must be a disk name: set --data-disk"
  if [[ -n $data_disk && $data_disk != */* ]]; then
    [[ -n $project ]] || fail "no project for --data-disk=$data_disk: set --project=PROJECT"
    data_disk=projects/$project/zones/$zone/disks/$data_disk
  fi
  [[ -z $runtime ]] || return
  case $type in
    v5lite*) runtime=v2-alpha-tpuv5-lite ;;
    v5p*) runtime=v2-alpha-tpuv5 ;;
    v6e*) runtime=v2-alpha-tpuv6e ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "no known runtime for --type=$type: set --runtime=VERSION" ;;
  esac
}

create() {
  check_create
  check_type
  if [[ -n $dry_run ]]; then
    create_now
    return
  fi
  local now created='' confirmed='' silent=0
  local action="create 1 TPU $type${spot:+ (spot)} named $name in $zone"
  while :; do
    now=$(state)
    if [[ $now == ACTIVE || $now == READY ]]; then
      echo "$name is ready"
      return
    fi
    [[ $now == UNKNOWN ]] || silent=0
    if [[ $now == STOPPED || ($now == FAILED && -n $created) ]]; then
      echo "failed: $name is $now: find out why with gcloud compute tpus, then delete it" >&2
      return 1
    fi
    case $now in
      '')
        [[ -z $created ]] || { echo "failed: $name is gone: run the same command again" >&2; return 1; }
        [[ -n $confirmed ]] || confirm "$action"
        create_now || return
        created=1 ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        [[ -n $confirmed ]] || confirm "delete $name, which is $now, and $action"
        confirmed=1 created=
        delete_now || return ;;
      UNKNOWN)
        ((++silent < 10)) || { echo "failed: no answer from gcloud about $name" >&2; return 1; } ;;
      *) echo "$name is $now: waiting" ;;
    esac
    sleep "$poll"
  done
}

check_setup() {
  [[ -n $source ]] || fail "nothing to install: set --source=ADDRESS, e.g. --source=git+https://..."
  [[ -d $configs ]] || fail "no folder '$configs': set --configs"
  [[ -z $data || $data == gs://?* ]] || fail "--data is '$data', must be gs://BUCKET/FOLDER: set --data"
}

setup() {
  check_setup
  show_or_run gcloud compute tpus tpu-vm scp --recurse "$configs" "$here/on_host.sh" "$name:" \
    "${where[@]}" --worker=all && on_hosts all "$(quoted bash on_host.sh install "$source")" || return
  if [[ -n $data_disk ]]; then
    on_hosts all 'bash on_host.sh mount'
  elif [[ -n $data ]]; then
    on_hosts all "$(quoted bash on_host.sh data "$data")"
  fi
}

run() {
  need_arguments main
  check_type
  on_hosts all "$(quoted bash on_host.sh start "${arguments[@]}")"
}

stop() {
  on_hosts all 'bash on_host.sh stop'
}

delete_now() {
  if [[ -n $direct ]]; then
    show_or_run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  else
    show_or_run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

delete() {
  confirm "delete 1 TPU${type:+ $type} named $name in $zone"
  delete_now
}

watch() {  # sets ended to the exit code of the run on the first host, or leaves it if the TPU is lost
  local now
  until lost; do
    ended=$(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
      '--command=bash on_host.sh code' 2>/dev/null)
    [[ -n $ended ]] && return
    sleep "$poll"
  done
}

still_there() {  # checks for two minutes, as the cloud may be slow to report a preemption
  local now i
  for ((i = 0; i < 5; i++)); do
    if lost; then
      echo "$name is ${now:-gone}: recreating it and resuming the run"
      return 1
    fi
    ((i == 4)) || sleep "$poll"
  done
}

all() {
  need_bucket TPU
  [[ -z $spot || -z $direct ]] ||
    fail "--spot and --direct must not both be set for all, which waits for a free TPU: remove --direct"
  check_create
  check_setup
  check_type
  check=''  # once is enough
  if [[ -n $dry_run ]]; then
    create && setup && run
    echo "# then, until the run ends: check the state every $poll s, and start over after a preemption"
    return
  fi
  local ended failures=0
  confirm "create 1 TPU $type${spot:+ (spot)} named $name in $zone, and delete and recreate it \
whenever it is lost"
  yes=1  # ask only once
  while :; do
    create || return
    ended=''
    setup && run && watch
    [[ $ended == 0 || $ended == 2 ]] && break  # success, or a mistake in the arguments
    still_there || continue
    [[ $ended == 75 ]] && break  # stopped by the user
    ((++failures < 3)) || break
    echo "the run failed${ended:+ with exit code $ended}: restarting it"
    stop
  done
  on_hosts 0 'tail -n 20 run.log'
  [[ $ended =~ ^[0-9]+$ ]] || ended=1
  return "$ended"
}

commands=(create setup run tail stop delete all)
options=(--name= --zone= --type= --runtime= --project= --source= --configs= --data= --data-disk=
  --spot --direct --check --yes --dry-run)
name='' zone='' type='' runtime='' project='' source='' configs=configs data='' data_disk=''
spot='' direct='' check='' yes='' dry_run='' poll=${POLL_SECONDS:-30}
parse_command "$@"
[[ -n $name ]] || fail "no name: set --name=NAME"
[[ -n $zone ]] || fail "no zone: set --zone=ZONE, e.g. --zone=us-west4-a"
need_tool gcloud "install the Google Cloud CLI"
where=("--zone=$zone")
[[ -n $project ]] && where+=("--project=$project")

case $command in
  tail) on_hosts 0 'tail -n 50 -F run.log' ;;
  *) "$command" ;;
esac
