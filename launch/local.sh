#!/usr/bin/env bash
# Trains with several processes on this machine, as a cluster does with several machines.
set -u

usage() {
  cat <<'EOF'
usage: launch/local.sh [--processes=P] [--devices=D] [--heartbeat=SECONDS] [--dry-run] -- ARGUMENTS

Starts P processes (default 2) of D virtual CPU devices each (default 1) as one run of

    python -m instdisc_jax.main ARGUMENTS

e.g. launch/local.sh --processes=2 --devices=4 -- --config=configs/digits.py --workdir=runs/two

The output of process 0 is shown. If one dies the others are ended, and a line says which one it was,
with the end of its output. On SIGTERM or Ctrl-C the run saves and stops.
The exit code is that of the first process that did not end well.

  --processes=P        number of processes
  --devices=D          virtual CPU devices of each; 0: whatever JAX shows
  --heartbeat=SECONDS  how long a process may be silent (default 100)
  --dry-run            show the commands, start nothing

PYTHON names the interpreter (default: .venv/bin/python if it is there, else python3).
EOF
}

fail() {
  echo "error: $1" >&2
  exit 2
}

number() {  # NAME VALUE SMALLEST
  if [[ ! $2 =~ ^[0-9]+$ ]] || ((10#$2 < $3)); then
    fail "$1 is '$2', must be a number from $3 up: set $1=N"
  fi
}

processes=2 devices=1 heartbeat=100 dry_run=
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --heartbeat=*) heartbeat=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown argument '$1': see --help" ;;
  esac
  shift
done
number --processes "$processes" 1
number --devices "$devices" 0
number --heartbeat "$heartbeat" 1
processes=$((10#$processes)) devices=$((10#$devices)) heartbeat=$((10#$heartbeat))
(($#)) || fail "no arguments for instdisc_jax.main: put them after --, see --help"

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
command -v "$PYTHON" >/dev/null || fail "no '$PYTHON': set PYTHON to a Python with instdisc_jax"
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') \
  || fail "'$PYTHON' does not run: set PYTHON to a Python with instdisc_jax"

settings=(env)
((devices)) && settings+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
[[ -n $dry_run ]] || logs=$(mktemp -d)
pids=()

start() {  # PROCESS ARGUMENTS...
  local id=$1
  shift
  local command=("${settings[@]}" "$PYTHON" -m instdisc_jax.main "$@"
    "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$id"
    "--heartbeat_seconds=$heartbeat")
  if [[ -n $dry_run ]]; then
    printf '%q ' "${command[@]}" && echo
  elif ((id)); then
    "${command[@]}" >"$logs/process$id.log" 2>&1 &
  else
    "${command[@]}" &
  fi
  [[ -n $dry_run ]] || pids[id]=$!
}

trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap : INT  # the terminal has sent it to all of them

for ((id = 0; id < processes; id++)); do
  start "$id" "$@"
done
[[ -n $dry_run ]] && exit 0

code=0
while ((${#pids[@]})); do
  sleep 0.2
  for id in "${!pids[@]}"; do
    kill -0 "${pids[id]}" 2>/dev/null && continue
    wait "${pids[id]}"
    status=$?
    unset "pids[$id]"
    ((status == 0 || code)) && continue
    code=$status
    ((status == 75)) && continue  # stopped by a signal, as the others are about to be
    how="exit code $status"
    ((status > 128)) && how="signal $((status - 128))"
    echo "process $id of $processes died first ($how): ending the others" >&2
    ((id)) && tail -n 5 "$logs/process$id.log" >&2
    ((${#pids[@]})) || continue
    { sleep 2; kill -TERM "${pids[@]}"; sleep 5; kill -KILL "${pids[@]}"; } 2>/dev/null &
    killer=$!
  done
done
[[ -n ${killer:-} ]] && kill "$killer" 2>/dev/null
rm -rf "$logs"
exit "$code"
