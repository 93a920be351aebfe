#!/usr/bin/env bash
# Trains on a Cloud TPU VM, a single host or a slice of a pod: from making it to deleting it.
set -u

usage() {
  cat <<'EOF'
usage: launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- ARGUMENTS]

Commands
  create   ask for the TPU and wait until it is there; one that was taken away is deleted first
  setup    install instdisc_jax on all of its hosts, and bring the data there
  run      start on all hosts:  python -m instdisc_jax.main --distributed ARGUMENTS
  tail     follow the output of the first host; Ctrl-C leaves the run alone
  stop     stop the run on all hosts, and wait until it has saved
  delete   delete the TPU
  all      create, setup and run, and wait. A TPU that was taken away is made again, a run that failed is
           started again up to three times, and goes on from its checkpoints, which must be in a bucket:
           -- ... --workdir=gs://BUCKET/FOLDER

Options
  --name=NAME          of the TPU
  --zone=ZONE          e.g. us-west4-a
  --type=TYPE          of the TPU, e.g. v5litepod-8 (one host) or v5litepod-64 (a slice)
  --runtime=VERSION    of its software (default: the one for its type)
  --project=PROJECT    (default: gcloud's own)
  --source=ADDRESS     what pip installs on the hosts: git+https://..., gs://.../x.whl or a name
  --configs=FOLDER     copied to the hosts (default: configs)
  --data=gs://...      a folder of a bucket, copied to ~/data on each host, whose disk has 100 GB in all
  --data-disk=DISK     in its place, for larger sets: a disk of that zone with the data, mounted at ~/data
                       on each host, to read
  --spot               a spot TPU: cheaper, and may be taken away
  --direct             create without the queue of queued resources
  --yes                do not ask before making or deleting something that costs money
  --dry-run            show every command, run none

Example: launch/tpu_vm.sh all --name=r50 --project=PROJECT --zone=us-west4-a --spot \
           --type=v5litepod-64 --source=git+https://ADDRESS --data-disk=imagenet -- \
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

describe() {
  if [[ -n $direct ]]; then
    gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)'
  else
    gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
      '--format=value(state.state)'
  fi
}

state() {  # of the TPU; nothing where there is none, UNKNOWN where the cloud does not answer
  local told
  describe 2>/dev/null && return
  told=$(describe 2>&1 >/dev/null)
  [[ $told == *NOT_FOUND* || $told == *'not found'* ]] && return
  echo "$told" >&2
  echo UNKNOWN
}

taken() {  # whether the TPU is surely not there any more; sets now to its state
  now=$(state)
  [[ $now != ACTIVE && $now != READY && $now != UNKNOWN ]]
}

make() {
  local words=(gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}"
    "--accelerator-type=$type" "--runtime-version=$runtime")
  [[ -n $direct ]] && words=(gcloud compute tpus tpu-vm create "$name" "${where[@]}"
    "--accelerator-type=$type" "--version=$runtime")
  [[ -n $spot ]] && words+=(--spot)
  [[ -n $data_disk ]] && words+=("--data-disk=source=$data_disk,mode=read-only")
  show_and "${words[@]}"
}

check_create() {
  [[ -n $type ]] || fail "no type of TPU: set --type=TYPE, e.g. --type=v5litepod-8"
  [[ -z $data || -z $data_disk ]] || fail "--data=$data and --data-disk=$data_disk, must be one: leave one out"
  [[ $data_disk != *,* ]] || fail "--data-disk is '$data_disk', must be the name of a disk: set --data-disk"
  if [[ -n $data_disk && $data_disk != */* ]]; then
    [[ -n $project ]] || fail "a disk is named with its project: set --project=PROJECT"
    data_disk=projects/$project/zones/$zone/disks/$data_disk
  fi
  [[ -z $runtime ]] || return
  case $type in
    v5lite*) runtime=v2-alpha-tpuv5-lite ;;
    v5p*) runtime=v2-alpha-tpuv5 ;;
    v6e*) runtime=v2-alpha-tpuv6e ;;
    v[234]-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "no runtime is known for --type=$type: set --runtime=VERSION" ;;
  esac
}

create() {
  check_create
  if [[ -n $dry_run ]]; then
    make
    return
  fi
  local now made='' agreed='' silent=0 what="make 1 TPU $type${spot:+, spot,} named $name in $zone"
  while :; do
    now=$(state)
    if [[ $now == ACTIVE || $now == READY ]]; then
      echo "$name is there"
      return
    fi
    [[ $now == UNKNOWN ]] || silent=0
    if [[ $now == STOPPED || ($now == FAILED && -n $made) ]]; then
      echo "failed: $name is $now: see why with gcloud compute tpus, and delete it" >&2
      return 1
    fi
    case $now in
      '')
        [[ -z $made ]] || { echo "failed: $name is gone: run the same command again" >&2; return 1; }
        [[ -n $agreed ]] || confirm "$what"
        make || return
        made=1 ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        [[ -n $agreed ]] || confirm "delete $name, which is $now, and $what"
        agreed=1 made=
        delete_now || return ;;
      UNKNOWN)
        ((++silent < 10)) || { echo "failed: gcloud does not tell of $name" >&2; return 1; } ;;
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
  show_and gcloud compute tpus tpu-vm scp --recurse "$configs" "$here/on_host.sh" "$name:" \
    "${where[@]}" --worker=all && on_hosts all "$(quoted bash on_host.sh install "$source")" || return
  if [[ -n $data_disk ]]; then
    on_hosts all 'bash on_host.sh mount'
  elif [[ -n $data ]]; then
    on_hosts all "$(quoted bash on_host.sh data "$data")"
  fi
}

run() {
  ((${#arguments[@]})) || fail "no arguments for instdisc_jax.main: put them after --, see --help"
  on_hosts all "$(quoted bash on_host.sh start "${arguments[@]}")"
}

stop() {
  on_hosts all 'bash on_host.sh stop'
}

delete_now() {
  if [[ -n $direct ]]; then
    show_and gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  else
    show_and gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

delete() {
  confirm "delete 1 TPU${type:+ $type}, $name in $zone"
  delete_now
}

watch() {  # sets ended to the exit code of the run on the first host, or leaves it: the TPU is gone
  local now
  until taken; do
    ended=$(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
      '--command=bash on_host.sh code' 2>/dev/null)
    [[ -n $ended ]] && return
    sleep "$poll"
    ((++polls))
  done
}

still_there() {  # two minutes after something failed, for the cloud may be slow to say it took the TPU
  local now i
  for ((i = 0; i < 5; i++)); do
    if taken; then
      echo "$name is ${now:-gone}: it is made again, and the run goes on"
      return 1
    fi
    ((i == 4)) || sleep "$poll"
  done
}

all() {
  [[ " ${arguments[*]-} " == *' --workdir'[=\ ]'gs://'* ]] ||
    fail "a TPU that is taken away takes its disk along: set --workdir=gs://BUCKET/FOLDER after --"
  check_create
  check_setup
  if [[ -n $dry_run ]]; then
    create && setup && run
    echo "# then, until the run has ended: state every $poll s; taken away, all of it again"
    return
  fi
  local ended polls failures=0
  while :; do
    create || return
    yes=1  # it was agreed to once
    ended='' polls=0
    setup && run && watch
    [[ $ended == 0 || $ended == 2 ]] && break  # well, or a mistake in what was asked for
    still_there || continue
    [[ $ended == 75 ]] && break  # somebody stopped it
    ((polls > 20)) && failures=0
    ((++failures < 3)) || break
    echo "the run failed${ended:+ with code $ended}: it is started again"
    stop
  done
  on_hosts 0 'tail -n 20 run.log'
  [[ $ended =~ ^[0-9]+$ ]] || ended=1
  return "$ended"
}

(($#)) || fail "no command, must be create, setup, run, tail, stop, delete or all: see --help"
command=$1
shift
name='' zone='' type='' runtime='' project='' source='' configs=configs data='' data_disk=''
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
    --data-disk=*) data_disk=${1#*=} ;;
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
  *) "$command" ;;
esac
