"""The Hopper kernels (wgmma, TMA) of attention over chosen chunks. See gpu.py for the equations.

Logits lie as [keys, heads]: the 64 keys of a chunk are the rows of a product, and the heads of a
group its columns, 8 or more of them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.hopper import COLS, LAYOUT, C, tile

STAGES = 2  # slots, or tiles of pairs, on their way or at work
LSE, D, WEIGHT, SEEN = range(4)  # rows of what `by_chunk` is told about a pair and head
_LEAST = -1e30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernels are built."""

    scale: float
    off_by_one: bool
    joint: bool


def forward(
    plan: Plan,
    q: Float[Array, "B T G R K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    indices: Int[Array, "B T G J"],
    seen: Int[Array, "B T G J"],
    weights: Float[Array, "B T G J"] | None,
    *,
    keep: bool,
) -> dict[str, Array]:
    """R is a multiple of 8, K and V of 64. `seen`: how many keys of each slot's chunk count.

    Returns:
      "o": [B T G R V] bf16.
      "lse": if keep, [B T G J R] f32, the logarithms of the softmaxes' denominators; J = 1 if
        joint, and is filled up to what `rows` says.
    """
    (B, T, G, R, K), V, J = q.shape, v.shape[-1], indices.shape[-1]
    out = dict(o=jax.ShapeDtypeStruct((B, T, G, R, V), jnp.bfloat16))
    if keep:
        softmaxes = rows(1 if plan.joint else J, R)
        out["lse"] = jax.ShapeDtypeStruct((B, T, G, softmaxes, R), jnp.float32)
    shared = dict(q=tile(R, K), k=tile(STAGES, C, K), v=tile(STAGES, C, V), pairs=tile(R, C),
                  o=tile(R, V)) | _rows(out, "lse")
    given = dict(q=q, k=k, v=v, indices=indices, seen=seen, weights=weights)
    return _call(_forward, "forward", plan, given, out, shared, (B * G, T), arrivals=(1, 2))


def by_query(
    plan: Plan, q, k, v, do, indices, seen, weights, lse, d: Float[Array, "B T G 1 R"] | None
) -> dict[str, Array]:
    """From the gradient of the outputs and `lse`, and if joint d = sum p dp.

    Returns:
      "dq": [B T G R K] bf16.
      "d": unless joint, [B T G J R] f32.
    """
    (B, T, G, R, K), V = q.shape, v.shape[-1]
    out = dict(dq=jax.ShapeDtypeStruct(q.shape, jnp.bfloat16))
    if not plan.joint:
        out["d"] = jax.ShapeDtypeStruct(lse.shape, jnp.float32)
    given = dict(q=q, do=do, k=k, v=v, indices=indices, seen=seen, weights=weights, lse=lse, d=d)
    shared = dict(q=tile(R, K), do=tile(R, V), k=tile(STAGES, C, K), v=tile(STAGES, C, V),
                  pairs=tile(R, C), dq=tile(R, K)) | _rows(given | out, "lse", "d")
    return _call(_by_query, "by_query", plan, given, out, shared, (B * G, T),
                 arrivals=(4 if plan.joint else 3, 2))


def by_chunk(
    plan: Plan, q, k, v, do,
    columns: Float[Array, "B G 4 PR"],
    tokens: Int[Array, "B G P"],
    first: Int[Array, "B G N1"],
    parts: int,
) -> dict[str, Array]:
    """From the (query, slot) pairs sorted by chunk, chunk i's from `first[..., i]` on.

    Args:
      columns: of each pair and head lse, d, weight and the number of keys seen; `C // R` pairs
        more than there are, and so are the tokens, the pairs' queries.
      parts: thread blocks that share the pairs of a chunk.

    Returns: "dk": [parts B S G K] and "dv": [parts B S G V] f32, to be summed.
    """
    (B, S, G, K), V = k.shape, v.shape[-1]
    wide = lambda x: jax.ShapeDtypeStruct((parts, *x.shape), jnp.float32)
    shared = dict(k=tile(C, K), v=tile(C, V), q=tile(STAGES, C, K), do=tile(STAGES, C, V),
                  columns=plgpu.SMEM((STAGES, 4, C), jnp.float32))
    given = dict(q=q, k=k, v=v, do=do, columns=columns, tokens=tokens, first=first)
    return _call(_by_chunk, "by_chunk", plan, given, dict(dk=wide(k), dv=wide(v)), shared,
                 (B * G, S // C * parts), arrivals=(2, 2 * (C // q.shape[3]) + 1))


def rows(softmaxes, R):
    """Copies of f32 numbers, R per softmax, are of whole 128 bytes."""
    return softmaxes + -softmaxes % max(1, 32 // R)


def _rows(arrays, *names):
    """Shared memory for a query's numbers per softmax and head."""
    return {name: plgpu.SMEM(arrays[name].shape[3:], jnp.float32)
            for name in names if name in arrays}


def _call(kernel, name, plan, given, out, shared, grid, arrivals):
    """`arrivals`: how many copies are awaited once, and how many at every step.

    The last axis of the grid is the one whose length CUDA does not limit.
    """
    given = {name: array for name, array in given.items() if array is not None}
    shared |= dict(once=plgpu.Barrier(num_arrivals=arrivals[0]),
                   arrived=plgpu.Barrier(num_arrivals=arrivals[1], num_barriers=STAGES))
    return plgpu.kernel(
        functools.partial(kernel, plan=plan), out_type=out, scratch_types=(shared,), grid=grid,
        grid_names=("group", "place"), compiler_params=hopper.COMPILER_PARAMS,
        kernel_name=f"chunk_sparse_attention_{name}")(given)


def _slots(given, smem):
    """A query's place, its number of slots, and what to call before and after using one.

    The first awaits the chunk in the slot, and returns its keys and values.
    """
    G, J = given["indices"].shape[2:]
    t, (b, g) = lax.axis_index("place"), _divided(lax.axis_index("group"), G)

    def fetch(j):
        stage = lax.rem(j, STAGES)
        keys = pl.ds(given["indices"][b, t, g, j] * C, C)
        for name in ("k", "v"):
            plgpu.copy_gmem_to_smem(
                given[name].at[b, keys, g], smem[name].at[stage], smem["arrived"].at[stage])

    def await_chunk(j):
        stage = lax.rem(j, STAGES)
        plgpu.barrier_wait(smem["arrived"].at[stage])
        return smem["k"].at[stage], smem["v"].at[stage]

    def release(j):
        pl.when(j + STAGES < J)(lambda: fetch(j + STAGES))

    for name in ("q", "do", "lse", "d"):
        if name in given:
            plgpu.copy_gmem_to_smem(given[name].at[b, t, g], smem[name], smem["once"])
    for j in range(min(STAGES, J)):
        fetch(jnp.int32(j))
    plgpu.barrier_wait(smem["once"])
    return (b, t, g), J, await_chunk, release


def _forward(given, out, smem, *, plan):
    at, J, await_chunk, release = _slots(given, smem)
    R, V = smem["o"].shape
    row = lambda x: plgpu.layout_cast(jnp.full((R,), x, jnp.float32), COLS)
    nothing = (row(0.0), row(1.0)) if plan.off_by_one else (row(_LEAST), row(0.0))

    def keep(softmax, base, total):
        if "lse" in out:
            smem["lse"][softmax] = base + jnp.log(jnp.where(total == 0, 1, total))

    def slot(j, carry):
        base, total, o = carry
        k, v = await_chunk(j)
        s = _logits(plan, k, smem["q"], given["seen"][*at, j])
        new = jnp.maximum(base, s.max(0))
        p = jnp.exp(s - _down(new, C))
        kept = jnp.exp(base - new)
        total = kept * total + p.sum(0)
        if plan.joint:
            o, base = o * _down(kept, V), new
        else:
            keep(j, new, total)
            p *= _down(given["weights"][*at, j] / jnp.where(total == 0, 1, total), C)
            base, total = nothing
        _stage(smem["pairs"], p)
        o = hopper.mma_add(o, (v.T, smem["pairs"].T))
        release(j)
        return base, total, o

    o = plgpu.layout_cast(jnp.zeros((V, R), jnp.float32), LAYOUT)
    base, total, o = lax.fori_loop(0, J, slot, (*nothing, o))
    if plan.joint:
        keep(0, base, total)
        o /= _down(jnp.where(total == 0, 1, total), V)
    _stage(smem["o"], o)
    _leave(smem, out, at)


def _by_query(given, out, smem, *, plan):
    at, J, await_chunk, release = _slots(given, smem)
    R, K = smem["dq"].shape

    def slot(j, dq):
        k, v = await_chunk(j)
        softmax = 0 if plan.joint else j
        s = _logits(plan, k, smem["q"], given["seen"][*at, j])
        p = jnp.exp(s - _down(_load(smem["lse"].at[softmax]), C))
        dp = hopper.mma((C, R), (v, smem["do"].T))
        if plan.joint:
            d = _load(smem["d"].at[softmax])
        else:
            d = (p * dp).sum(0)
            smem["d"][j] = d
            p *= given["weights"][*at, j]
        _stage(smem["pairs"], plan.scale * p * (dp - _down(d, C)))
        dq = hopper.mma_add(dq, (k.T, smem["pairs"].T))
        release(j)
        return dq

    dq = plgpu.layout_cast(jnp.zeros((K, R), jnp.float32), LAYOUT)
    _stage(smem["dq"], lax.fori_loop(0, J, slot, dq))
    _leave(smem, out, at)


def _by_chunk(given, out, smem, *, plan):
    G, R, K = given["q"].shape[2:]
    V, P = given["v"].shape[-1], C // R
    parts = out["dk"].shape[0]
    b, g = _divided(lax.axis_index("group"), G)
    n, part = _divided(lax.axis_index("place"), parts)
    begin, end = given["first"][b, g, n], given["first"][b, g, n + 1]
    share = lax.div(end - begin + (P * parts - 1), jnp.int32(P * parts)) * P
    begin = jnp.minimum(begin + part * share, end)
    end = jnp.minimum(begin + share, end)
    steps = lax.div(end - begin + (P - 1), jnp.int32(P))

    def fetch(i):
        stage, place = lax.rem(i, STAGES), begin + i * P
        arrived = smem["arrived"].at[stage]
        plgpu.copy_gmem_to_smem(given["columns"].at[b, g, :, pl.ds(place * R, C)],
                                smem["columns"].at[stage], arrived)
        tokens = [given["tokens"][b, g, place + p] for p in range(P)]
        for p, t in enumerate(tokens):
            for name in ("q", "do"):
                plgpu.copy_gmem_to_smem(
                    given[name].at[b, t, g], smem[name].at[stage, pl.ds(p * R, R)], arrived)

    def step(i, sums):
        dk, dv = sums
        stage = lax.rem(i, STAGES)
        plgpu.barrier_wait(smem["arrived"].at[stage])
        q, do, columns = (smem[name].at[stage] for name in ("q", "do", "columns"))
        column = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=COLS)
        seen = _load(columns.at[SEEN]).astype(jnp.int32)
        seen = jnp.where(column < (end - begin - i * P) * R, seen, 0)
        s = _logits(plan, smem["k"], q, _down(seen, C))
        p = jnp.exp(s - _down(_load(columns.at[LSE]), C))
        p *= _down(_load(columns.at[WEIGHT]), C)
        dv = hopper.mma_add(dv, (p.astype(jnp.bfloat16), do))
        dp = hopper.mma((C, C), (smem["v"], do.T))
        ds = plan.scale * p * (dp - _down(_load(columns.at[D]), C))
        dk = hopper.mma_add(dk, (ds.astype(jnp.bfloat16), q))
        pl.when(i + STAGES < steps)(lambda: fetch(i + STAGES))
        return dk, dv

    keys = pl.ds(n * C, C)
    for name in ("k", "v"):
        plgpu.copy_gmem_to_smem(given[name].at[b, keys, g], smem[name], smem["once"])
    for i in range(STAGES):
        pl.when(i < steps)(functools.partial(fetch, jnp.int32(i)))
    plgpu.barrier_wait(smem["once"])
    zero = lambda *shape: plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT)
    dk, dv = lax.fori_loop(0, steps, step, (zero(C, K), zero(C, V)))
    out["dk"][part, b, keys, g] = dk
    out["dv"][part, b, keys, g] = dv


def _divided(x, by):
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def _logits(plan, k, q, seen):
    """[C, columns of q], -inf from key `seen` on."""
    s = plan.scale * hopper.mma((C, q.shape[0]), (k, q.T))
    i = plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=LAYOUT)
    return jnp.where(i < seen, s, -jnp.inf)


def _load(ref):
    """A number per head."""
    return hopper.load(ref, COLS)


def _down(x, rows):
    return lax.broadcast_in_dim(x, (rows, *x.shape), [1])


def _stage(ref, x):
    """x [64 n, R] as a matrix [R, 64 n] for products."""
    ref.T[...] = plgpu.layout_cast(x.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()


def _leave(smem, out, at):
    plgpu.commit_smem()
    for name, ref in out.items():
        plgpu.copy_smem_to_gmem(smem[name], ref.at[*at])
    plgpu.wait_smem_to_gmem(0)
