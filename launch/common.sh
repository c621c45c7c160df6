# shellcheck shell=bash
# Sourced by the launchers: options, faults in one line, dry runs, and the command they all end in.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/xla_flags.sh

declare -A opt # the options given, by name
command=()     # what follows `--`
worker=()      # what each host runs

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

# parse "OPTIONS" "SWITCHES" ARGUMENTS...: --option=value and --switch until `--`, then the command.
# An option that is not given is taken from the environment: --zone from HYBRIDJAX_ZONE.
parse() {
  local options="$1 xla" switches="$2 dry-run" name variable
  shift 2
  for name in $options $switches; do
    variable=${name//-/_}
    variable=HYBRIDJAX_${variable^^}
    opt[$name]=${!variable:-}
  done
  while (($#)); do
    case $1 in
      --) command=("${@:2}") && return ;;
      --*=*)
        name=${1%%=*} && name=${name#--}
        [[ " $options " == *" $name "* ]] || fail "unknown option --$name: give one of $options"
        opt[$name]=${1#*=}
        ;;
      --*)
        name=${1#--}
        [[ " $options " != *" $name "* ]] || fail "--$name has no value: give --$name=VALUE"
        [[ " $switches " == *" $name "* ]] || fail "unknown switch --$name: give one of $switches"
        opt[$name]=1
        ;;
      *) fail "unexpected argument '$1': options are --name=value, the command follows --" ;;
    esac
    shift
  done
}

# need NAMES...: these options must have a value.
need() {
  local name variable
  for name in "$@"; do
    variable=${name//-/_}
    [[ -n ${opt[$name]} ]] || fail "no $name: give --$name=VALUE or set HYBRIDJAX_${variable^^}"
  done
}

# not_both FIRST SECOND: options that exclude each other; one_of: and one of them is needed.
not_both() {
  [[ -z ${opt[$1]} || -z ${opt[$2]} ]] || fail "--$1 and --$2 exclude each other: give one"
}

one_of() {
  not_both "$1" "$2"
  [[ -n ${opt[$1]}${opt[$2]} ]] || fail "no $1 and no $2: give --$1=VALUE or --$2=VALUE"
}

# The command must be able to resume elsewhere: from the same work directory, which is not a URL.
need_command() {
  local word workdir=''
  ((${#command[@]})) || fail "no command: give -- python -m hybridjax.train --config=... and so on"
  for word in "${command[@]}"; do
    [[ $word != --workdir=* ]] || workdir=${word#--workdir=}
  done
  [[ -n $workdir ]] || fail "no --workdir=DIR in the command: a run resumes only from there"
  [[ $workdir != *://* ]] || fail "--workdir=$workdir is a URL: mount the bucket and give its path"
}

# One line that a shell reads back as exactly these words.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s' "${line# }"
}

# Run a command, or with --dry-run print it.
run() {
  if [[ -n ${opt[dry-run]} ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# The command as each host runs it, with the XLA flags that were asked for, into `worker`.
make_worker() {
  local variables=()
  add_xla_flags "${opt[xla]}"
  worker=(bash launch/worker.sh)
  ((${#variables[@]} == 0)) || worker+=(env "${variables[@]}")
  worker+=("${command[@]}")
}
