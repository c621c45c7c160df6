# shellcheck shell=bash
# Sourced by the launchers: XLA flags in named sets, --xla=SET[,SET...]. None is on by default; none
# was measured here. A flag that the installed XLA does not know ends the process at its start: look
# here first after an upgrade. tests/test_launch.py asks XLA for each of them.

# xla_flags SET: sets `flags`, and `variable` to the environment variable that they belong in.
xla_flags() {
  case $1 in
    # Collectives over a TPU's own network beside computation. Source: MaxText,
    # benchmarks/xla_flags_library.py, the group for overlapping the all-gathers of FSDP.
    overlap-tpu)
      variable=LIBTPU_INIT_ARGS
      flags=(
        --xla_enable_async_all_gather=true  # all-gathers start early and are awaited late
        --xla_tpu_enable_async_collective_fusion=true  # computation is fused into collectives
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true  # into all-gathers too
        --xla_tpu_enable_async_collective_fusion_multiple_steps=true  # over several fusions
        --xla_tpu_overlap_compute_collective_tc=true  # collectives share the core with matmuls
      ) ;;
    # Gradients between slices, over the data centre's network. Source: as above, data parallelism.
    slices-tpu)
      variable=LIBTPU_INIT_ARGS
      flags=(
        --xla_tpu_enable_data_parallel_all_reduce_opt=true  # all-reduces overlap the next layers
        --xla_tpu_data_parallel_opt_different_sized_ops=true  # also where layers differ in size
      ) ;;
    # More of the on-chip memory for fusions. Source: as above; its value for dense models.
    vmem-tpu)
      variable=LIBTPU_INIT_ARGS
      flags=(
        --xla_tpu_scoped_vmem_limit_kib=98304  # KiB a fusion may use; the rest is for prefetches
      ) ;;
    # Collectives of several GPUs beside computation. Source: JAX, docs/gpu_performance_tips.md;
    # NVIDIA JAX-Toolbox, GPU performance. Thresholds: at least one layer's weights; here 128 MiB.
    overlap-gpu)
      variable=XLA_FLAGS
      flags=(
        --xla_gpu_enable_latency_hiding_scheduler=true  # schedules collectives beside computation
        --xla_gpu_all_gather_combine_threshold_bytes=134217728  # joins small all-gathers
        --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728  # and small reduce-scatters
        --xla_gpu_all_reduce_combine_threshold_bytes=134217728  # and small all-reduces
      ) ;;
    *) fail "no flag set '$1': there are overlap-tpu, slices-tpu, vmem-tpu, overlap-gpu" ;;
  esac
}

# add_xla_flags SETS: appends VARIABLE=FLAGS, one per variable, to the caller's `variables`.
add_xla_flags() {
  local set variable flags tpu='' gpu=''
  for set in ${1//,/ }; do
    xla_flags "$set"
    if [[ $variable == XLA_FLAGS ]]; then gpu+=" ${flags[*]}"; else tpu+=" ${flags[*]}"; fi
  done
  [[ -z $tpu ]] || variables+=("LIBTPU_INIT_ARGS=${tpu# }")
  [[ -z $gpu ]] || variables+=("XLA_FLAGS=${gpu# }")
}
