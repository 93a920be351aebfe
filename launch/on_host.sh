#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each host of a TPU, in its home folder.
#
#   on_host.sh install SOURCE     into ~/instdisc, with a Python of its own; not under a run
#   on_host.sh data gs://...      copied into ~/data; what is there already is not copied again
#   on_host.sh mount              the data disk, at ~/data, to read
#   on_host.sh start ARGUMENTS    python -m instdisc_jax.main --distributed ARGUMENTS, in the background
#   on_host.sh code               its exit code; nothing while it runs, "gone" if it left none
#   on_host.sh stop               SIGTERM: it saves and stops; waits for that
set -u
cd || exit
verb=$1
shift
export PIP_BREAK_SYSTEM_PACKAGES=1  # uv is all that is put beside the system's own

running() {
  [[ -f run.pid ]] && grep -qs instdisc_jax "/proc/$(<run.pid)/cmdline"
}

case $verb in
  install)
    if running; then
      echo "it runs: nothing is installed under it"
      exit
    fi
    # The images' Python is older than JAX wants.
    python3 -m pip install --quiet --user --upgrade uv &&
      python3 -m uv venv --quiet --allow-existing --python '>=3.11,<3.14' instdisc &&
      python3 -m uv pip install --quiet --upgrade --python instdisc/bin/python "${JAX:-jax[tpu]}" \
        gcsfs "$@" ;;
  data)
    mkdir -p data && gcloud storage rsync --recursive "$1" data ;;
  mount)
    mountpoint -q data && exit
    for disk in /dev/disk/by-id/google-persistent-disk-1 /dev/sdb /dev/nvme0n2; do
      [[ -b $disk ]] && mkdir -p data && exec sudo mount -o ro,noload "$disk" data
    done
    echo "failed: this host has no data disk" >&2
    exit 1 ;;
  start)
    if running; then
      echo "it runs already"
      exit
    fi
    rm -f run.code run.stopping
    # shellcheck disable=SC2016  # the inner shell expands these
    setsid bash -c '"$@"; echo $? > run.code' run \
      instdisc/bin/python -m instdisc_jax.main --distributed "$@" >run.log 2>&1 </dev/null &
    echo $! >run.pid ;;
  code)
    running || cat run.code 2>/dev/null || echo gone ;;  # the host was restarted
  stop)
    if running && [[ ! -f run.stopping ]]; then  # a second signal would end it without saving
      touch run.stopping
      pkill -TERM -P "$(<run.pid)"
    fi
    for ((i = 0; i < 600; i++)); do
      running || exit 0
      sleep 0.5
    done
    echo "failed: it has not stopped in 5 minutes" >&2
    exit 1 ;;
esac
