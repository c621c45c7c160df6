"""The gated delta rule and the convolution of split rows are those of the whole rows."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_linear_attention_context import SEGMENTS, B, T, distance, gradients, line_of

from pallas_kernels.causal_convolution import causal_convolution
from pallas_kernels.gated_delta_rule import gated_delta_rule

Hq, Hk, H, K, V, D, W = 4, 1, 2, 4, 5, 3, 4  # of T = 48 tokens, 6 on each of 8 devices


def rule(rng, states):
    normal = lambda *shape: rng.standard_normal(shape)
    arrays = dict(
        q=normal(B, T, Hq, K),
        k=normal(B, T, Hk, K) / K**0.5,
        v=normal(B, T, H, V),
        beta=rng.uniform(0, 1, (B, T, H)),
        decay=-0.2 * np.abs(normal(B, T, H)),
    )
    weights = [normal(B, T, Hq, V)]
    if states:
        arrays["initial_state"] = normal(B, H, K, V)
        weights.append(normal(B, H, K, V))
    return gated_delta_rule, arrays, weights


def convolution(rng, states, size=W):
    normal = lambda *shape: rng.standard_normal(shape)
    arrays, weights = dict(x=normal(B, T, D), kernel=normal(D, size)), [normal(B, T, D)]
    if states:
        arrays["initial_state"] = normal(B, size - 1, D)
        weights.append(normal(B, size - 1, D))
    return causal_convolution, arrays, weights


OPS = {
    "rule": rule,
    "convolution": convolution,
    "wide convolution": lambda rng, states: convolution(rng, states, 17),  # over three devices
}
DEFAULT = {
    ("rule", 8, "long", True), ("rule", 4, "borders", True), ("rule", 8, "padding", True),
    ("convolution", 8, "long", True), ("convolution", 4, None, False),
    ("convolution", 8, "padding", True), ("wide convolution", 8, "long", True),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, devices, segments, states",
    [
        pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.slow)
        for case in (
            (name, devices, segments, states)
            for name in OPS
            for devices in (2, 4, 8)
            for segments in (None, *SEGMENTS)
            for states in (True, False)
        )
    ],
)
def test_split_rows_are_the_whole_rows(name, devices, segments, states, rng):
    op, arrays, weights = OPS[name](rng, states)
    segments = segments and SEGMENTS[segments]
    with jax.enable_x64(True):
        whole = lambda arrays: op(
            **arrays, segments=segments, output_final_state=True, implementation="reference")
        expected = gradients(whole, arrays, weights, np.float64)

    def local(arrays, segments):
        return op(**arrays, segments=segments, output_final_state=True, context_axis="context")

    rows = P(None, "context")
    specs = {name: P() if name in ("initial_state", "kernel") else rows for name in arrays}
    split = jax.shard_map(
        local,
        mesh=line_of(devices),
        in_specs=(specs, None if segments is None else rows),
        out_specs=(rows, P()),
        check_vma=False,
    )
    got = gradients(lambda arrays: split(arrays, segments), arrays, weights, np.float32)
    assert got.keys() == expected.keys()
    distances = {name: distance(got[name], expected[name]) for name in got}
    assert max(distances.values()) < 1e-5, distances
