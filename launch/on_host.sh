#!/usr/bin/env bash
# launch/tpu_vm.sh runs this on each host of a TPU, in the home folder.
#
#   on_host.sh install SOURCE     install into ~/instdisc with its own Python, unless a run is active
#   on_host.sh data gs://...      copy into ~/data, except what is already there
#   on_host.sh mount              mount the data disk read-only at ~/data
#   on_host.sh start ARGUMENTS    start python -m instdisc_jax.main --distributed ARGUMENTS in the
#                                 background, unless a run is active
#   on_host.sh code               print the exit code: nothing during the run, "gone" if it left none
#   on_host.sh stop               send SIGTERM, and wait until the run has saved and stopped
set -u
cd || exit
verb=$1
shift
export PIP_BREAK_SYSTEM_PACKAGES=1  # only for uv: everything else goes into ~/instdisc

running() {
  [[ -f run.pid ]] && grep -qs instdisc_jax "/proc/$(<run.pid)/cmdline"
}

case $verb in
  install)
    if running; then
      echo "a run is active: nothing installed"
      exit
    fi
    # The Python of TPU VM images is too old for JAX.
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
      echo "already running"
      exit
    fi
    rm -f run.code run.stopping
    # A run that is stopped while it starts does not handle the signal yet, but has been stopped, too.
    # shellcheck disable=SC2016  # the inner shell expands these
    setsid bash -c '"$@"; code=$?; [[ $code == 0 || ! -e run.stopping ]] || code=75
      echo $code > run.code' run \
      instdisc/bin/python -m instdisc_jax.main --distributed "$@" >run.log 2>&1 </dev/null &
    echo $! >run.pid ;;
  code)
    running || cat run.code 2>/dev/null || echo gone ;;  # no code: the host was restarted
  stop)
    if running && [[ ! -f run.stopping ]]; then  # a second signal would stop it without saving
      touch run.stopping
      pkill -TERM -P "$(<run.pid)"
    fi
    for ((i = 0; i < 600; i++)); do
      running || exit 0
      sleep 0.5
    done
    echo "failed: the run has not stopped within 5 minutes" >&2
    exit 1 ;;
esac
