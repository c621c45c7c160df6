#!/usr/bin/env bash
# A GKE cluster made with xpk:
#   launch/gke_xpk.sh --project=P --zone=Z --cluster=C --name=N ... -- COMMAND
#
#   --tpu-type=v6e-16 [--slices=2]              TPU slices, or
#   --device-type=h100-mega-80gb-8 [--nodes=2]  GPU machines, one process on each
#   --image=I        has the repository, installed, as its working directory; or
#   --base-image=I   has the dependencies: xpk copies the repository in
#   [--storage=S] [--spot | --reservation=R] [--max-restarts=100] [--xla=SET] [--dry-run]
#
# xpk makes a JobSet. It starts all hosts again, at most --max-restarts times, when one ends with a
# code above 126: the 143 of worker.sh, or the abort of a host that lost another. Code 1, a fault
# that the user must mend, ends the job.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "project zone cluster name tpu-type device-type slices nodes image base-image storage \
reservation max-restarts" "spot" "$@"
need project zone cluster name
one_of tpu-type device-type
one_of image base-image
not_both spot reservation
need_command

submit=(
  xpk workload create
  --project="${opt[project]}" --zone="${opt[zone]}"
  --cluster="${opt[cluster]}" --workload="${opt[name]}"
  --max-restarts="${opt[max-restarts]:-100}"
  --termination-grace-period-seconds=120 # between SIGTERM and SIGKILL: the time to save
)
hosts=''
if [[ -n ${opt[tpu-type]} ]]; then
  submit+=(--tpu-type="${opt[tpu-type]}" --num-slices="${opt[slices]:-1}")
else
  submit+=(--device-type="${opt[device-type]}" --num-nodes="${opt[nodes]:-1}")
  # xpk names these its own way. The pod's shell expands them.
  # shellcheck disable=SC2016
  hosts='JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT '
  # shellcheck disable=SC2016
  hosts+='JAX_NUM_PROCESSES=$NNODES JAX_PROCESS_ID=$NODE_RANK '
fi
[[ -z ${opt[image]} ]] || submit+=(--docker-image="${opt[image]}")
[[ -z ${opt[base-image]} ]] || submit+=(--base-docker-image="${opt[base-image]}" --script-dir=.)
[[ -z ${opt[storage]} ]] || submit+=(--storage="${opt[storage]}")
[[ -z ${opt[spot]} ]] || submit+=(--spot)
[[ -z ${opt[reservation]} ]] || submit+=(--reservation="${opt[reservation]}")

make_worker
# `exec`: xpk signals the process that it started; that must be worker.sh, not a shell around it.
line="${hosts}exec $(quoted "${worker[@]}")"
# xpk 1.16 writes a GPU command into YAML as it is, between double quotes.
[[ -z $hosts || $line != *[\"\\]* ]] ||
  fail "xpk cannot carry quotes and backslashes to GPU hosts: put these settings into a config file"
run "${submit[@]}" --command="$line"
