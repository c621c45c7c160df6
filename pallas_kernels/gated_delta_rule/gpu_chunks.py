"""What is worked out for each chunk by itself, on Hopper: the systems and the gradients.

A thread block of one warpgroup takes one chunk of one head. See gpu.py for the equations.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.hopper import COLUMNS, C, across, down, load_f32, tile

TOTAL, READ, WRITE, BETA = range(4)  # rows of Weights.tokens
BLOCK = 128  # columns of v whose gradients a thread block works out


class Weights(NamedTuple):
    """What decay, beta and documents contribute."""

    tokens: Float[Array, "B H N 4 C"]  # the running decay; of a token, reading and writing; beta
    documents: Int[Array, "B N 2 C"] | None  # of tokens i and j; those of padding equal none
    keep: Float[Array, "B H N"]
    scale: float


class Systems(NamedTuple):
    """The chunks' equations: `E = u + w S`, `O = p E + scale read q S`."""

    w: Float[Array, "B T H K"]
    u: Float[Array, "B T H V"]
    p: Float[Array, "B H N C C"]
    inverse: Float[Array, "B H N C C"] | None  # (I + A)^-1


def solve(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    weights: Weights,
    *,
    keep_inverse: bool,
) -> Systems:
    """The systems of all chunks, bf16. T is a multiple of C, K and V of COLUMNS."""
    (B, T, H, V), K, N = v.shape, k.shape[-1], v.shape[1] // C
    given = dict(k=k, tokens=weights.tokens, documents=weights.documents, q=q, v=v)
    given = {name: array for name, array in given.items() if array is not None}
    square = jax.ShapeDtypeStruct((B, H, N, C, C), jnp.bfloat16)
    out = dict(w=jax.ShapeDtypeStruct((B, T, H, K), jnp.bfloat16), p=square,
               u=jax.ShapeDtypeStruct((B, T, H, V), jnp.bfloat16))
    if keep_inverse:
        out["inverse"] = square
    shared = dict(k=tile(C, K), q=tile(C, K), v=tile(C, V), p=tile(C, C),
                  factor=tile(2, C, C), product=tile(2, C, C))
    out = _call(_solve, "solve", given, out, shared, (N, B * H), scale=weights.scale)
    return Systems(out["w"], out["u"], out["p"], out.get("inverse"))


def gradients(
    q: Float[Array, "B T Hq K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T H V"],
    do: Float[Array, "B T H V"],
    e: Float[Array, "B T H V"],
    de: Float[Array, "B T H V"],
    states: Float[Array, "B H N K V"],
    dstates: Float[Array, "B H N K V"],
    inverse: Float[Array, "B H N C C"],
    weights: Weights,
) -> dict[str, Array]:
    """Those of q, k, v and of the weights, from all states and what was written, with gradients.

    Returns:
      "dq", "dk": [B T H P K] bf16, of each value head and part of V: to be summed.
      "dv": [B T H V] bf16.
      "dtokens": [B H N 4 C] f32: of beta, and of the logarithms of what reaches a token (so of its
        decay and of all before), of `write`, and of `keep` (to be summed over C).
    """
    (B, T, H, V), K, N = v.shape, k.shape[-1], v.shape[1] // C
    width = BLOCK if V % BLOCK == 0 else COLUMNS
    P = V // width
    given = dict(tokens=weights.tokens, inverse=inverse, de=de, v=v, documents=weights.documents,
                 e=e, do=do, states=states, k=k, dstates=dstates, q=q)
    given = {name: array for name, array in given.items() if array is not None}
    out = dict(dq=jax.ShapeDtypeStruct((B, T, H, P, K), jnp.bfloat16),
               dk=jax.ShapeDtypeStruct((B, T, H, P, K), jnp.bfloat16),
               dv=jax.ShapeDtypeStruct((B, T, H, V), jnp.bfloat16),
               dtokens=jax.ShapeDtypeStruct((B, H, N, P, 4, C), jnp.float32))
    shared = {name: tile(C, width) for name in ("v", "do", "e", "de")}
    shared |= {name: tile(K, width) for name in ("states", "dstates")}
    shared |= dict(q=tile(C, K), k=tile(C, K), inverse=tile(C, C), pairs=tile(C, C),
                   dk=tile(C, K), dtokens=plgpu.SMEM((4, C), jnp.float32))
    out = _call(_gradients, "gradients", given, out, shared, (N, B * H, P), scale=weights.scale)
    return out | dict(dtokens=out["dtokens"].sum(3))


def _call(kernel, name, given, out, shared, grid, **options):
    shared["tokens"] = plgpu.SMEM((4, C), jnp.float32)
    if "documents" in given:
        shared["documents"] = plgpu.SMEM((2, C), jnp.int32)
    shared["arrived"] = plgpu.Barrier(num_arrivals=1, num_barriers=len(given))
    return plgpu.kernel(
        functools.partial(_with_arrivals, kernel, **options), out_type=out,
        scratch_types=(shared,), grid=grid, grid_names=("chunk", "head", "part")[:len(grid)],
        compiler_params=hopper.COMPILER_PARAMS, kernel_name=f"gated_delta_rule_{name}")(given)


def _with_arrivals(kernel, given, out, smem, **options):
    """The kernel with `here(name)`: the block's part of an array, when it has arrived."""
    H, V = given["v"].shape[2:]
    chunk, head = lax.axis_index("chunk"), lax.axis_index("head")
    b, h = lax.div(head, jnp.int32(H)), lax.rem(head, jnp.int32(H))
    parts = V // smem["v"].shape[-1]
    part = lax.axis_index("part") if parts > 1 else jnp.int32(0)
    columns = pl.ds(part * (V // parts), V // parts)

    def at(name, ref):
        tokens = pl.ds(chunk * C, C)
        match name:
            case "q" | "k":
                return ref.at[b, tokens, lax.div(h * ref.shape[2], jnp.int32(H))]
            case "w":
                return ref.at[b, tokens, h]
            case "dq" | "dk":
                return ref.at[b, tokens, h, part]
            case "u" | "v" | "dv" | "e" | "de" | "do":
                return ref.at[b, tokens, h, columns]
            case "states" | "dstates":
                return ref.at[b, h, chunk, :, columns]
            case "documents":
                return ref.at[b, chunk]
            case "dtokens":
                return ref.at[b, h, chunk, part]
            case "tokens" | "p" | "inverse":
                return ref.at[b, h, chunk]

    for index, (name, ref) in enumerate(given.items()):
        plgpu.copy_gmem_to_smem(at(name, ref), smem[name], smem["arrived"].at[index])

    @functools.cache
    def here(name):
        plgpu.barrier_wait(smem["arrived"].at[list(given).index(name)])
        return smem[name]

    def leave(name, source):
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(source, at(name, out[name]))

    kernel(here, leave, out, smem, packed="documents" in given, **options)
    plgpu.wait_smem_to_gmem(0)


def _decay(here, packed):
    """From token j to token i >= j, 0 where a document ends between them."""
    i, j = hopper.indices()
    seen = i >= j
    if packed:
        seen &= across(here("documents").at[0]) == down(here("documents").at[1])
    total = here("tokens").at[TOTAL]
    return jnp.exp(jnp.where(seen, across(total) - down(total), -jnp.inf))


def _below(x):
    i, j = hopper.indices()
    return jnp.where(i > j, x, 0)


def _solve(here, leave, out, smem, *, packed, scale):
    tokens = here("tokens")
    decay, k = _decay(here, packed), here("k")
    a = _below(hopper.mma((C, C), (k, k.T)) * decay * across(tokens.at[BETA]))
    smem["p"][...] = (scale * hopper.mma((C, C), (here("q"), k.T)) * decay).astype(jnp.bfloat16)
    leave("p", smem["p"])
    x = unit_lower_inverse(a, smem["factor"], smem["product"])
    if "inverse" in out:
        kept = smem["factor"].at[0]
        kept[...] = x.astype(jnp.bfloat16)
        leave("inverse", kept)
    x *= down(tokens.at[BETA])
    v, written = here("v"), x.astype(jnp.bfloat16)
    for columns in _parts(v.shape[1]):
        part = v.at[:, columns]
        part[...] = hopper.mma((C, COLUMNS), (written, part)).astype(jnp.bfloat16)
    leave("u", v)
    w = hopper.mma(k.shape, ((-x * down(tokens.at[READ])).astype(jnp.bfloat16), k))
    k[...] = w.astype(jnp.bfloat16)
    leave("w", k)


def unit_lower_inverse(a, factor, product):
    """`(I + a)^-1` for a strictly lower triangular `a`, f32 in registers, as in triangular.py.

    Neighbouring blocks are merged by products of whole matrices, of which a mask keeps a's part;
    8 bits of an operand would be too few where keys resemble one another: products of 16.
    """
    i, j = hopper.indices()
    x = jnp.where(i == j, 1.0, 0.0) - jnp.where((i ^ j) == 1, a, 0)
    for level in range(1, 6):
        off = jnp.where((i >> level) ^ (j >> level) == 1, a, 0)
        _split_into(factor, x)
        off_x = hopper.mma((C, C), *_of_16_bits(off, factor))
        _split_into(product, off_x)
        x = hopper.mma_add(x, *_of_16_bits(-x, product))
    return x


def _split(x):
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _split_into(ref, x):
    for n, part in enumerate(_split(x)):
        ref[n] = part
    plgpu.commit_smem()


def _of_16_bits(a, split):
    high, low = _split(a)
    return (high, split.at[0]), (high, split.at[1]), (low, split.at[0])


def _gradients(here, leave, out, smem, *, packed, scale):
    """64 columns at a time: the registers hold no more."""
    K, width = smem["states"].shape
    shape = C, COLUMNS
    row = lambda name: here("tokens").at[name]
    beta = hopper.load(row(BETA), hopper.ROWS)
    # The right side of the system.
    dr, v, dbeta = here("de"), here("v"), 0
    for part in _parts(width):
        x = hopper.mma(shape, (here("inverse").T, dr.at[:, part]))
        dbeta += (x * load_f32(v.at[:, part])).sum(1)
        dr.at[:, part][...] = _narrow(x)
        v.at[:, part][...] = _narrow(_by_rows(beta) * x)
    leave("dv", v)
    # Between the tokens of a chunk: through keys, and through queries.
    e, do = here("e"), here("do")
    decay = _decay(here, packed)
    through_keys = _below(-hopper.mma((C, C), (dr, e.T)) * decay)
    smem["inverse"][...] = _narrow(_by_rows(beta) * through_keys)
    through_keys = _narrow(through_keys)
    pairs = scale * hopper.mma((C, C), (do, e.T)) * decay
    i, j = hopper.indices()
    own = jnp.where(i == j, pairs, 0).sum(1)
    smem["pairs"][...] = _narrow(_below(pairs))
    plgpu.commit_smem()
    keys, pairs = smem["inverse"], smem["pairs"]
    states, dstates = here("states"), here("dstates")
    q, k = here("q"), here("k")

    def of_keys(n, sums):
        """As rows of the system, as what is written to the state, as columns of both."""
        right, write, passed = sums
        part = pl.ds(n * COLUMNS, COLUMNS)
        dk = -across(row(READ)) * hopper.mma(shape, (dr, states.at[part].T))
        dk = hopper.mma_add(dk, (through_keys, k.at[:, part]))
        right += _dot(dk, k.at[:, part])
        dk *= _by_rows(beta)
        x = across(row(WRITE)) * hopper.mma(shape, (e, dstates.at[part].T))
        write += _dot(x, k.at[:, part])
        dk += x
        x = hopper.mma(shape, (pairs.T, q.at[:, part]), (keys.T, k.at[:, part]))
        passed += _dot(x, k.at[:, part])
        dk += x + _by_rows(own) * load_f32(q.at[:, part])
        smem["dk"].at[:, part][...] = _narrow(dk)
        return right, write, passed

    def of_queries(n, sums):
        reaching, kept = sums
        part = pl.ds(n * COLUMNS, COLUMNS)
        dq = (scale * across(row(READ))) * hopper.mma(shape, (do, states.at[part].T))
        dq = hopper.mma_add(dq, (pairs, k.at[:, part]))
        reaching += _dot(dq, q.at[:, part])
        dq += _by_rows(own) * load_f32(k.at[:, part])
        q.at[:, part][...] = _narrow(dq)
        for columns in _parts(width):
            kept += _dot(load_f32(states.at[part, columns]), dstates.at[part, columns])
        return reaching, kept

    zero = plgpu.layout_cast(jnp.zeros(C, jnp.float32), hopper.ROWS)
    right, write, passed = lax.fori_loop(0, K // COLUMNS, of_keys, (zero, zero, zero))
    leave("dk", smem["dk"])
    reaching, kept = lax.fori_loop(0, K // COLUMNS, of_queries, (zero, zero))
    leave("dq", q)
    rows = dbeta + right, reaching + beta * right - passed, write, kept
    for n, x in enumerate(rows):
        smem["dtokens"][n] = x
    leave("dtokens", smem["dtokens"])


def _dot(x, ref):
    return (x * load_f32(ref)).sum(1)


def _narrow(x):
    return x.astype(jnp.bfloat16)


def _by_rows(x):
    return lax.broadcast_in_dim(x, (C, COLUMNS), [0])


def _parts(width):
    return [pl.ds(start, COLUMNS) for start in range(0, width, COLUMNS)]
