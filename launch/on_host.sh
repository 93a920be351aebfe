#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each host of a TPU, in its home folder.
#
#   on_host.sh install SOURCE     into ~/instdisc, made once
#   on_host.sh data gs://...      copied into ~/data; what is there already is not copied again
#   on_host.sh start ARGUMENTS    python -m instdisc_jax.main --distributed ARGUMENTS, in the background
#   on_host.sh code               its exit code, nothing while it runs
#   on_host.sh stop               SIGTERM: it saves and stops
set -u
cd || exit
verb=$1
shift

running() {
  [[ -f run.pid ]] && kill -0 "$(<run.pid)" 2>/dev/null
}

case $verb in
  install)
    python3 -m venv instdisc && instdisc/bin/pip install --quiet --upgrade 'jax[tpu]' gcsfs "$@" ;;
  data)
    mkdir -p data && gcloud storage rsync --recursive "$1" data ;;
  start)
    if running; then
      echo "it runs already"
      exit
    fi
    rm -f run.code
    # shellcheck disable=SC2016  # the inner shell expands these
    setsid bash -c '"$@"; echo $? > run.code' run \
      instdisc/bin/python -m instdisc_jax.main --distributed "$@" >run.log 2>&1 </dev/null &
    echo $! >run.pid ;;
  code)
    running || cat run.code 2>/dev/null || echo 1 ;;  # gone without a code: the host was restarted
  stop)
    if running; then pkill -TERM -P "$(<run.pid)"; fi ;;
esac
