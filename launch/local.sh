#!/usr/bin/env bash
# Several processes of one command on this host:
#
#   launch/local.sh [--dry-run] N [DEVICES] -- python -m hybridjax.train --config=...
#
# With DEVICES, each process has so many simulated CPU devices; without, process I has GPU I.
# The command gets --coordinator, --processes and --process. SIGTERM and SIGINT go on to every
# process (a notice to one: kill -TERM its pid, which is printed). The exit code is that of the
# first process that fails; then the others have GRACE seconds to end.
set -euo pipefail

GRACE=5

fail() { echo "local.sh: $1" >&2; exit 2; }

usage="usage: launch/local.sh [--dry-run] N [DEVICES] -- COMMAND..."
dry_run=
[[ ${1-} == --dry-run ]] && { dry_run=1; shift; }
count=${1-}
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "$usage"
shift
devices=
[[ ${1-} =~ ^[1-9][0-9]*$ ]] && { devices=$1; shift; }
[[ ${1-} == -- && $# -gt 1 ]] || fail "$usage"
shift

free_port() {
  local port
  for port in $(shuf -i 20000-32000 -n 100); do
    (: <"/dev/tcp/localhost/$port") 2>/dev/null || { echo "$port"; return; }
  done
  fail "no free port"
}

port=$(free_port)
pids=()
for ((i = 0; i < count; i++)); do
  settings=("JAX_LOCAL_DEVICE_IDS=$i")
  [[ -n $devices ]] && settings=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
  line=(env "${settings[@]}" "$@" "--coordinator=localhost:$port" "--processes=$count" "--process=$i")
  if [[ -n $dry_run ]]; then
    printf '%q ' "${line[@]}"
    echo
    continue
  fi
  "${line[@]}" > >(exec sed -u "s/^/[$i] /") 2>&1 &
  pids+=($!)
  echo "local.sh: process $i is pid $!"
done
[[ -n $dry_run ]] && exit

signal_all() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
trap 'signal_all TERM' TERM
trap 'signal_all INT' INT
trap 'signal_all KILL' EXIT

code=0
deadline=
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    status=0
    wait "${pids[i]}" || status=$?
    unset "pids[i]"
    if ((status && !code)); then
      code=$status
      deadline=$((SECONDS + GRACE))
      echo "local.sh: process $i ended with exit code $status" >&2
    fi
  done
  [[ -z $deadline ]] || ((SECONDS < deadline)) || signal_all KILL
  sleep 0.2
done
exit "$code"
