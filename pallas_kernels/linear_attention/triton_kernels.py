"""The two Triton kernels that triton.py builds outputs and gradients from, and how to launch them.

    states:   S <- keep S + sum_j write_j b_j x_j^T                       from chunk to chunk
    outputs:  y_i = scale * sum_{j <= i} exp(G_i - G_j) (a_i . b_j) x_j  +  read_i a_i S

In reverse the chunks are taken last to first, the sum is over j >= i with exp(G_j - G_i), and read
and write change places. A program of `states` carries one tile of one head's state in registers; a
program of `outputs` makes one tile of columns of one chunk. Products take bfloat16 with f32 sums,
or float32 as three tf32 products.
"""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from jaxtyping import Array, Float, Int

# Of a tile of a state, and tokens per chunk, at most: three products take thrice the registers.
SIDE = {"bfloat16": 64, "float32": 32}
DEPTH = 32  # columns of a and b at a time in `outputs`
LEAST = 16  # rows and columns of a product


class Weights(NamedTuple):
    """What decay and documents contribute, and the direction of travel."""

    tokens: Float[Array, "B H N 4 C"]  # the running decay, its rounding; of reading, of writing
    documents: Int[Array, "B N 2 C"] | None  # of tokens i and j; those of padding equal none
    keep: Float[Array, "B H N"]
    scale: float
    reverse: bool = False


def states(
    name: str,
    b: Float[Array, "B T H K"],
    x: Float[Array, "B T H X"],
    weights: Weights,
    start: Float[Array, "B H K X"],
) -> tuple[Float[Array, "B H N K X"], Float[Array, "B H K X"]]:
    """The state before each chunk, in the direction of travel and in x's dtype, and after all.

    Args:
      name: of the kernel, in profiles.
    """
    (B, T, H, K), X = b.shape, x.shape[-1]
    N, C = weights.keep.shape[2], weights.tokens.shape[4]
    BK, BX = (_tile(width, SIDE[x.dtype.name]) for width in (K, X))
    shape = jax.ShapeDtypeStruct
    return _launch(
        name, states_kernel, B * H * -(-K // BK) * -(-X // BX),
        (b, x, weights.tokens, weights.keep, start),
        (shape((B, H, N, K, X), x.dtype), shape(start.shape, jnp.float32)),
        T=T, H=H, K=K, X=X, N=N, C=C, BK=BK, BX=BX, REVERSE=weights.reverse)


def outputs(
    name: str,
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    x: Float[Array, "B T H X"],
    weights: Weights,
    before: Float[Array, "B H N K X"] | Float[Array, "B H N X K"],
    *,
    transposed: bool = False,
    dot: Float[Array, "B T H X"] | None = None,
) -> tuple[Float[Array, "B T H X"], Float[Array, "2 B H N C"] | None]:
    """y, and if there is a dot its products with the parts of y_i that decays touch: that from the
    state, and that from the other tokens of the chunk.

    Args:
      before: the state before each chunk, as `states` gives it; transposed, S^T.
    """
    (B, T, H, K), X = b.shape, x.shape[-1]
    N, C = weights.keep.shape[2], weights.tokens.shape[4]
    BK, BX = _tile(K, DEPTH), _tile(X, SIDE[x.dtype.name])
    tiles = -(-X // BX)
    # Every kernel argument is an array: where there is none, one that is not looked at.
    documents = weights.tokens if weights.documents is None else weights.documents
    dots = (tiles, 2, B, H, N, C) if dot is not None else (1,)
    shape = jax.ShapeDtypeStruct
    y, dots = _launch(
        name, outputs_kernel, B * H * N * tiles,
        (a, b, x, weights.tokens, documents, before, x if dot is None else dot),
        (shape(x.shape, x.dtype), shape(dots, jnp.float32)),
        SCALE=float(weights.scale), B=B, T=T, H=H, K=K, X=X, N=N, C=C, BK=BK, BX=BX,
        REVERSE=weights.reverse, TRANSPOSED=transposed, PACKED=weights.documents is not None,
        DOT=dot is not None)
    return y, None if dot is None else dots.sum(0)


def _tile(width: int, most: int) -> int:
    return min(most, max(LEAST, 1 << (width - 1).bit_length()))


def _launch(name, kernel, programs, arrays, out, **constants):
    # Until jax-triton 0.4 it was called out_shape.
    known = inspect.signature(jax_triton.triton_call).parameters
    out = {"out_type" if "out_type" in known else "out_shape": out}
    return jax_triton.triton_call(
        *arrays, kernel=kernel, name=f"linear_attention_{name}", grid=(programs,), num_warps=4,
        num_stages=2, **out, **constants)


@triton.jit
def states_kernel(
    b_ptr, x_ptr, tokens_ptr, keep_ptr, start_ptr, states_ptr, end_ptr,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, X: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr, REVERSE: tl.constexpr,
):
    program, tiles = tl.program_id(0), (X + BX - 1) // BX
    cols = program % tiles * BX + tl.arange(0, BX)
    program, tiles = program // tiles, (K + BK - 1) // BK
    rows = program % tiles * BK + tl.arange(0, BK)
    head = (program // tiles).to(tl.int64)  # of those of all rows
    i = tl.arange(0, C)

    entries = rows[:, None] * X + cols[None, :]
    inside = (rows[:, None] < K) & (cols[None, :] < X)
    state = tl.load(start_ptr + head * K * X + entries, mask=inside, other=0.0)
    for step in range(N):
        n = N - 1 - step if REVERSE else step
        chunk = head * N + n
        token = (head // H * T + n * C) * H + head % H  # the chunk's first
        real = n * C + i < T
        b = tl.load(b_ptr + token * K + (i * H * K)[None, :] + rows[:, None],
                    mask=(rows[:, None] < K) & real[None, :], other=0.0)
        x = tl.load(x_ptr + token * X + (i * H * X)[:, None] + cols[None, :],
                    mask=real[:, None] & (cols[None, :] < X), other=0.0)
        write = tl.load(tokens_ptr + (chunk * 4 + (2 if REVERSE else 3)) * C + i)
        keep = tl.load(keep_ptr + chunk)
        tl.store(states_ptr + chunk * K * X + entries, state.to(x.dtype), mask=inside)
        x = (x.to(tl.float32) * write[:, None]).to(x.dtype)
        state = tl.dot(b, x, acc=state * keep, input_precision="tf32x3")
    tl.store(end_ptr + head * K * X + entries, state, mask=inside)


@triton.jit
def outputs_kernel(
    a_ptr, b_ptr, x_ptr, tokens_ptr, documents_ptr, states_ptr, dot_ptr, y_ptr, dots_ptr,
    SCALE: tl.constexpr, B: tl.constexpr, T: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    X: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, DOT: tl.constexpr,
):
    program, tiles = tl.program_id(0), (X + BX - 1) // BX
    tile, chunk = program % tiles, (program // tiles).to(tl.int64)
    n, head = chunk % N, chunk // N
    row = head // H
    cols = tile * BX + tl.arange(0, BX)
    i = tl.arange(0, C)
    token = (row * T + n * C) * H + head % H  # the chunk's first
    real = n * C + i < T

    pairs = tl.zeros((C, C), tl.float32)
    y = tl.zeros((C, BX), tl.float32)
    for first in range(0, K, BK):
        rows = first + tl.arange(0, BK)
        a = tl.load(a_ptr + token * K + (i * H * K)[:, None] + rows[None, :],
                    mask=real[:, None] & (rows[None, :] < K), other=0.0)
        b = tl.load(b_ptr + token * K + (i * H * K)[None, :] + rows[:, None],
                    mask=(rows[:, None] < K) & real[None, :], other=0.0)
        entries = (rows[:, None] + cols[None, :] * K if TRANSPOSED
                   else rows[:, None] * X + cols[None, :])
        state = tl.load(states_ptr + chunk * K * X + entries,
                        mask=(rows[:, None] < K) & (cols[None, :] < X), other=0.0)
        pairs = tl.dot(a, b, acc=pairs, input_precision="tf32x3")
        y = tl.dot(a, state, acc=y, input_precision="tf32x3")

    weights = tokens_ptr + chunk * 4 * C + i
    total, rest = tl.load(weights), tl.load(weights + C)
    y *= tl.load(weights + (3 if REVERSE else 2) * C)[:, None]
    decay = (total[:, None] - total[None, :]) + (rest[:, None] - rest[None, :])
    if REVERSE:
        seen = i[:, None] <= i[None, :]
        decay = -decay
    else:
        seen = i[:, None] >= i[None, :]
    if PACKED:
        documents = documents_ptr + (row * N + n) * 2 * C + i
        seen &= tl.load(documents)[:, None] == tl.load(documents + C)[None, :]
    pairs *= SCALE * tl.exp(tl.where(seen, decay, 0.0))
    pairs = tl.where(seen, pairs, 0.0)

    here = (i * H * X)[:, None] + cols[None, :]
    inside = real[:, None] & (cols[None, :] < X)
    x = tl.load(x_ptr + token * X + here, mask=inside, other=0.0)
    if DOT:  # apart from x_i's own part in y_i, which no decay touches
        dot = tl.load(dot_ptr + token * X + here, mask=inside, other=0.0).to(tl.float32)
        dots = dots_ptr + (tile.to(tl.int64) * 2 * B * H * N + chunk) * C + i
        tl.store(dots, tl.sum(y * dot, 1))
        own = i[:, None] == i[None, :]
        others = tl.where(own, 0.0, pairs).to(x.dtype)
        others = tl.dot(others, x, input_precision="tf32x3")
        tl.store(dots + B * H * N * C, tl.sum(others * dot, 1))
        y += others + tl.sum(tl.where(own, pairs, 0.0), 1)[:, None] * x.to(tl.float32)
    else:
        y = tl.dot(pairs.to(x.dtype), x, acc=y, input_precision="tf32x3")
    tl.store(y_ptr + token * X + here, y.to(x.dtype), mask=inside)
