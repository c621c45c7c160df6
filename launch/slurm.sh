#!/usr/bin/env bash
# A SLURM cluster of GPUs: launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 --name=N -- COMMAND
#
#   [--cpus=8]  per process    [--partition=P] [--account=A] [--xla=SET] [--dry-run]
#
# One process per GPU; JAX finds the others by itself. Submits launch/slurm.sbatch, from the
# repository's root, which all nodes must see.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "nodes gpus cpus time name partition account" "" "$@"
need nodes gpus time name
need_command

submit=(
  sbatch --job-name="${opt[name]}" --time="${opt[time]}"
  --nodes="${opt[nodes]}" --gpus-per-node="${opt[gpus]}" --ntasks-per-node="${opt[gpus]}"
  --cpus-per-task="${opt[cpus]:-8}"
)
[[ -z ${opt[partition]} ]] || submit+=(--partition="${opt[partition]}")
[[ -z ${opt[account]} ]] || submit+=(--account="${opt[account]}")

make_worker
run "${submit[@]}" launch/slurm.sbatch "${worker[@]}"
