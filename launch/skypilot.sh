#!/usr/bin/env bash
# SkyPilot, a managed job on spot machines of any cloud:
#   launch/skypilot.sh --infra=gcp --accelerators=tpu-v6e-8 --name=N --bucket=gs://B -- COMMAND
#
#   [--on-demand] [--xla=SET] [--dry-run]
#
# A TPU slice, or one machine with any number of GPUs. The bucket is mounted at /mnt/bucket: what is
# not there is lost at a preemption. Submits launch/skypilot.yaml.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "infra accelerators name bucket" "on-demand" "$@"
need infra accelerators name bucket
need_command

extra=gpu
[[ ${opt[accelerators]} != tpu-* ]] || extra=tpu
price=--use-spot
[[ -z ${opt[on-demand]} ]] || price=--no-use-spot

make_worker
run sky jobs launch --yes --name="${opt[name]}" \
  --infra="${opt[infra]}" --gpus="${opt[accelerators]}" "$price" \
  --env="BUCKET=${opt[bucket]}" --env="EXTRA=$extra" --env="COMMAND=$(quoted "${worker[@]}")" \
  launch/skypilot.yaml
