#!/usr/bin/env bash
# A Cloud TPU slice: launch/tpu_vm.sh ACTION --project=P --zone=Z --name=N ... -- COMMAND
#
#   create    the slice, --type=v6e-16 --runtime=v2-alpha-tpuv6e [--queued] [--spot | --reserved]
#   sync      copy the last commit to all workers, install it [--bucket=B, mounted at /mnt/bucket]
#   run       COMMAND on all workers [--xla=SET]
#   stop      SIGTERM to the run; returns when it has saved
#   babysit   all of this until COMMAND exits with 0; a preempted slice is made again [--retries=3]
#   delete    the slice
#
# --queued waits for capacity in Google's queue. --dry-run prints the commands instead.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

action=${1:-}
[[ " create sync run stop babysit delete " == *" $action "* ]] ||
  fail "no action '$action': give one of create, sync, run, stop, babysit, delete"
shift
parse "project zone name type runtime bucket retries" "queued spot reserved" "$@"
need project zone name
not_both spot reserved
case $action in create | babysit) need type runtime ;; esac
case $action in run | babysit) need_command && make_worker ;; esac

name=${opt[name]}
place=(--project="${opt[project]}" --zone="${opt[zone]}")
archive=${TMPDIR:-/tmp}/hybridjax-$name.tar.gz
vm=(gcloud compute tpus tpu-vm)
queue=(gcloud compute tpus queued-resources)

on_workers() { run "${vm[@]}" ssh "$name" "${place[@]}" --worker=all --command="$1"; }

create() {
  local tier=()
  [[ -z ${opt[spot]} ]] || tier=(--spot)
  [[ -z ${opt[reserved]} ]] || tier=(--reserved)
  local shape=("${place[@]}" --accelerator-type="${opt[type]}")
  if [[ -z ${opt[queued]} ]]; then
    run "${vm[@]}" create "$name" "${shape[@]}" --version="${opt[runtime]}" "${tier[@]}"
  else
    run "${queue[@]}" create "$name" --node-id="$name" "${shape[@]}" \
      --runtime-version="${opt[runtime]}" "${tier[@]}" && await_queue
  fi
}

await_queue() {
  local ask=("${queue[@]}" describe "$name" "${place[@]}" '--format=value(state.state)') state
  [[ -z ${opt[dry-run]} ]] || { run "${ask[@]}" && return; } # a real one asks until ACTIVE
  while state=$("${ask[@]}"); do
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED) echo "the queued resource is $state" >&2 && return 1 ;;
    esac
    sleep 30
  done
  return 1
}

delete() {
  if [[ -z ${opt[queued]} ]]; then
    run "${vm[@]}" delete "$name" "${place[@]}" --quiet
  else
    run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet
  fi
}

pack() {
  [[ -z $(git status --porcelain) ]] || echo "note: only what is committed is copied" >&2
  run git archive --prefix=hybridjax/ --output="$archive" HEAD
}

install() {
  local setup=(bash launch/setup.sh tpu)
  [[ -z ${opt[bucket]} ]] || setup+=("${opt[bucket]}")
  run "${vm[@]}" scp "$archive" "$name:hybridjax.tar.gz" "${place[@]}" --worker=all &&
    on_workers "tar -xzf hybridjax.tar.gz && cd hybridjax && $(quoted "${setup[@]}")"
}

start() { on_workers "cd hybridjax && PATH=\$HOME/venv/bin:\$PATH exec $(quoted "${worker[@]}")"; }

# The brackets keep pkill from finding the shell that runs it.
stop() {
  local run='"[h]ybridjax[.]"'
  on_workers "pkill -TERM -f $run; while pgrep -f $run >/dev/null; do sleep 1; done"
}

state() { "${vm[@]}" describe "$name" "${place[@]}" '--format=value(state)' 2>/dev/null || true; }

attempt() {
  if [[ $(state) == READY ]]; then
    stop # a run may have outlived its connection
  else
    delete 2>/dev/null || true
    create || { sleep 60 && return 1; }
  fi
  install && start
}

babysit() {
  local failures=0 retries=${opt[retries]:-3}
  pack
  until attempt; do
    [[ $(state) == READY ]] || { echo "$name is gone: making it again" >&2 && continue; }
    ((++failures <= retries)) || fail "the command failed $failures times on $name: read its output"
  done
  echo "finished; $name is still there and costs money: launch/tpu_vm.sh delete" >&2
}

case $action in
  sync) pack && install ;;
  run) start ;;
  babysit)
    [[ -n ${opt[dry-run]} ]] || { babysit && exit; }
    delete && create && pack && install && start
    ;;
  *) "$action" ;;
esac
