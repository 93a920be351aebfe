#!/usr/bin/env bash
# Runs one command with several processes on this machine, as on a cluster of several machines.
set -u

usage() {
  cat <<'EOF'
usage: launch/local.sh [OPTIONS] -- ARGUMENTS

Starts P processes with D virtual CPU devices each, as one run of

    python -m instdisc_jax.COMMAND ARGUMENTS

e.g. launch/local.sh --processes=2 --devices=4 -- --config=configs/digits.py --workdir=runs/two

Shows the output of process 0. If a process dies, ends the others and shows which one died, with the
last lines of its output. SIGTERM or Ctrl-C stops all processes; a training run saves first.
Exits with the code of the first process that failed.

Options
  --command=COMMAND    main, embed or evaluate (default: main)
  --processes=P        number of processes (default: 2)
  --devices=D          virtual CPU devices per process (default: 1); 0: the devices that JAX finds
  --heartbeat=SECONDS  how long a process may be silent (default: 100)
  --dry-run            show the commands, run nothing

PYTHON sets the interpreter (default: .venv/bin/python if it exists, else python3).
EOF
}

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

commands=(main embed evaluate)
options=(--command= --processes= --devices= --heartbeat= --dry-run)
command=main processes=2 devices=1 heartbeat=100 dry_run=''
parse "$@"
listed "$command" "${commands[@]}" ||
  fail "--command is '$command', must be $(either "${commands[@]}"): set --command"
for option in processes devices heartbeat; do  # without leading zeros, which mean octal to bash
  [[ ! ${!option} =~ ^[0-9]+$ ]] || printf -v "$option" %s "$((10#${!option}))"
done
number --processes "$processes" 1
number --devices "$devices" 0
number --heartbeat "$heartbeat" 1
need_arguments "$command"

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

start() {  # ID: starts that process
  local words=("${settings[@]}" "$PYTHON" -m "instdisc_jax.$command" "${arguments[@]}"
    "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$1"
    "--heartbeat_seconds=$heartbeat")
  if [[ -n $dry_run ]]; then
    show "${words[@]}"
    return
  elif (($1)); then
    "${words[@]}" >"$logs/process$1.log" 2>&1 &
  else
    "${words[@]}" &
  fi
  pids[$1]=$!
}

# shellcheck disable=SC2329  # the trap calls it
interrupt() {  # the terminal sends SIGINT to every process, but those that still start ignore it
  local pid
  for pid in "${pids[@]}"; do
    [[ $(cat "/proc/$pid/status") =~ SigIgn:[[:space:]]*([0-9a-f]+) ]] &&
      ((0x${BASH_REMATCH[1]} & 2)) && kill -TERM "$pid"
  done
}

trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
trap 'interrupt 2>/dev/null' INT

for ((id = 0; id < processes; id++)); do
  start "$id"
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
