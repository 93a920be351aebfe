# shellcheck shell=bash disable=SC2154  # the scripts that source this set options, commands and yes
# Shared by gke.sh, tpu_vm.sh and local.sh. Each defines usage, its options and their defaults.

fail() {  # MESSAGE
  echo "error: $1" >&2
  exit 2
}

listed() {  # WORD WORDS...: whether WORD is one of WORDS
  local word
  for word in "${@:2}"; do
    [[ $1 == "$word" ]] && return
  done
  return 1
}

either() {  # WORDS...: 'a, b or c'
  local text
  printf -v text '%s, ' "${@:1:$#-1}"
  echo "${text%, } or ${!#}"
}

parse() {  # ARGUMENT...: reads those in options; whatever follows -- becomes arguments
  # --some-name=VALUE sets some_name, and is listed in options as --some-name=; --flag sets flag to 1.
  local option value
  arguments=()
  while (($#)); do
    case $1 in
      --help | -h) usage; exit 0 ;;
      --) arguments=("${@:2}"); return ;;
    esac
    option=${1%%=*} value=1
    [[ $1 != *=* ]] || option+='=' value=${1#*=}
    listed "$option" "${options[@]}" || fail "unknown argument '$1': see --help"
    option=${option#--} option=${option%=}
    printf -v "${option//-/_}" %s "$value"
    shift
  done
}

parse_command() {  # [COMMAND [ARGUMENT...]]: sets command, one of commands, and reads the rest
  local names
  names=$(either "${commands[@]}")
  (($#)) || fail "no command, must be $names: see --help"
  command=$1
  parse "${@:2}"
  listed "$command" --help -h && usage && exit
  listed "$command" "${commands[@]}" ||
    fail "unknown command '$command', must be $names: see --help"
}

number() {  # NAME VALUE SMALLEST
  if [[ ! $2 =~ ^(0|[1-9][0-9]*)$ ]] || (($2 < $3)); then
    fail "$1 is '$2', must be an integer of at least $3: set $1=N"
  fi
}

need_arguments() {  # COMMAND of instdisc_jax that they are for
  ((${#arguments[@]})) || fail "no arguments for instdisc_jax.$1: put them after --, see --help"
}

need_bucket() {  # HOST: what the run loses if the workdir is not in a bucket
  [[ " ${arguments[*]-} " == *' --workdir'[=\ ]'gs://'* ]] ||
    fail "a preempted $1 loses its disk: set --workdir=gs://BUCKET/FOLDER after --"
}

check_fit() {  # TOPOLOGY: with --check, refuses a run whose compiled programs do not fit its devices
  local word words=() next=''
  [[ -n $check ]] || return 0
  need_arguments main
  for word in "${arguments[@]}"; do
    [[ -z $next && $word != --config* ]] || words+=("$word")
    next=''
    [[ $word != --config ]] || next=1
  done
  show_or_run "${PYTHON:-python3}" -m instdisc_jax.compile "--topology=$1" "${words[@]}" ||
    fail "the run cannot be checked, or does not fit $1: see above; nothing was created or started"
}

need_tool() {  # TOOL REMEDY
  [[ -n $dry_run ]] || command -v "$1" >/dev/null || fail "no '$1' on the PATH: $2"
}

show() {  # WORDS...: as one line that a shell reads back as these words
  printf '%q ' "$@" && echo
}

show_or_run() {  # COMMAND...: shows it in a dry run, else runs it
  if [[ -n $dry_run ]]; then
    show "$@"
  else
    "$@"
  fi
}

confirm() {  # ACTION
  [[ -n $yes || -n $dry_run ]] && return
  [[ -t 0 ]] || fail "cannot ask whether to $1, there is no terminal: set --yes"
  local answer
  read -r -p "$1? [y/N] " answer
  [[ $answer == [yY]* ]] || fail "not confirmed: $1"
}
