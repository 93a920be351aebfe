# shellcheck shell=bash disable=SC2154  # the scripts that read this set dry_run and yes
# What tpu_vm.sh and gke.sh share.

fail() {
  echo "error: $1" >&2
  exit 2
}

show_and() {  # COMMAND...: shows it, and runs it unless this is a dry run
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

confirm() {  # WHAT
  [[ -n $yes || -n $dry_run ]] && return
  [[ -t 0 ]] || fail "$1 wants an answer, and there is no terminal: set --yes"
  local answer
  read -r -p "$1? [y/N] " answer
  [[ $answer == [yY]* ]] || fail "$1: not done"
}
