"""The Pallas Mosaic TPU kernels of the gated delta rule by chunks, forward and backward.

The equations of `xla.py`: with S the state that enters a chunk, D the decay from token to token,
and T the inverse of I + A, A = strictly_lower(beta (K K^T) . D),

    E = T (beta (V - read K S))        O = scale ((Q K^T) . D E + read Q S)
    S' = keep S + K^T (write E)

A grid step takes several chunks of several heads: their inverses do not wait for a state, and fill
the latencies of the products that do.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when the kernels are built; heads are those of a grid step."""

    heads: int  # states
    keys: int  # divides `heads`
    queries: int  # divides `heads`, or is a multiple
    chunk: int  # tokens per chunk
    chunks: int  # per grid step
    scale: float
    packed: bool
    exact: bool  # float32

    @property
    def block(self):
        return self.chunk * self.chunks

    # Rows of the array of weights: a group of `heads` each, one for the documents' first tokens.
    def row(self, name, head=0):
        return self._groups.index(name) * self.heads + head

    @property
    def _groups(self):
        return ("beta", "read", "write", "keep", "total", *["rest"] * self.exact, "first")

    @property
    def rows(self):
        return self.row("first") + self.packed

    def key(self, head):
        return head * self.keys // self.heads

    def queries_of(self, head):
        group = max(1, self.queries // self.heads)
        first = head * self.queries // self.heads
        return range(first, first + group)


def _dot(a, b, contract):
    """A product of matrices in f32; `contract` names a dimension of each."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())),
                           precision=precision, preferred_element_type=jnp.float32)


_NN, _NT = (1, 0), (1, 1)


class _Chunk:
    """One chunk of a grid step: its part of the arrays, and the weights of its heads.

    Weights are rows (tokens are lanes) or columns (tokens are sublanes).
    """

    def __init__(self, plan, index, rows_ref, columns_ref):
        self.plan = plan
        self.rows_ref, self.columns_ref = rows_ref.at[0, index, 0], columns_ref.at[index]
        self.tokens = slice(index * plan.chunk, (index + 1) * plan.chunk)

    def at(self, head, width, tile=None):
        """Where an array holds a head, or a tile of LANES of it."""
        start, size = (0, width) if tile is None else (tile * LANES, LANES)
        return 0, self.tokens, slice(head * width + start, head * width + start + size)

    def row(self, name, head=0):
        at = self.plan.row(name, head)
        return self.rows_ref[at:at + 1]

    def column(self, name, head=0):
        at = self.plan.row(name, head)
        return self.columns_ref[:, at:at + 1]

    def keep(self, head):
        return self.row("keep", head)[:, :1]

    def intra(self, head):
        plan, C = self.plan, self.plan.chunk
        j = lax.broadcasted_iota(jnp.int32, (C, C), 1)
        inside = j <= lax.broadcasted_iota(jnp.int32, (C, C), 0)
        if plan.packed:
            inside &= j >= self.column("first").astype(jnp.int32)
        difference = self.column("total", head) - self.row("total", head)
        if plan.exact:
            difference += self.column("rest", head) - self.row("rest", head)
        return jnp.exp(jnp.where(inside, difference, -jnp.inf))


def _chunks_of_step(plan, rows_ref, columns_ref):
    for index in range(plan.chunks):
        rows = rows_ref[0, index, 0]
        rows = jnp.concatenate([rows, jnp.zeros((LANES - len(rows), plan.chunk), rows.dtype)])
        columns_ref[index] = rows.T
    return [_Chunk(plan, index, rows_ref, columns_ref) for index in range(plan.chunks)]


# ---------------------------------------------------------------- the triangular system

_BLOCK = 16


def _unit_lower_inverse(a, exact):
    """`(I + a)^-1` for a strictly lower triangular `a` [C, C], as in `triangular.py`."""
    C = len(a)
    block = lax.broadcasted_iota(jnp.int32, (_BLOCK, C), 1) // _BLOCK
    blocks = range(C // _BLOCK)
    rows = lambda i: slice(i * _BLOCK, (i + 1) * _BLOCK)
    diagonal = functools.reduce(lambda x, i: jnp.where(block == i, a[rows(i)], x), blocks, 0.0)
    x = _blocks_inverse(diagonal)
    x = jnp.concatenate([jnp.where(block == i, x, 0.0) for i in blocks])
    size = _BLOCK
    while size < C:
        x = _merge(a, x, size, exact)
        size *= 2
    return x


def _blocks_inverse(a):
    """The inverses of I + blocks side by side, [16, C], by substitution."""
    i, j = (lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in (0, 1))
    x = jnp.where(i == j % _BLOCK, 1.0, 0.0)
    for row in range(_BLOCK - 1):
        factor = jnp.take_along_axis(a, j - j % _BLOCK + row, axis=1)
        x -= factor * x[row:row + 1]
    return x


def _merge(a, x, size, exact):
    """Inverses of diagonal blocks of twice the size: [[X, 0], [-Y a X, Y]]."""
    C = len(a)
    column = lax.broadcasted_iota(jnp.int32, (size, C), 1)
    lower = range(size, C, 2 * size)
    off = [jnp.where((column >= i - size) & (column < i), a[i:i + size], 0.0) for i in lower]
    product = _product(jnp.concatenate(off), x, exact)
    parts = [product[n * size:(n + 1) * size] for n in range(len(lower))]
    nothing = jnp.zeros((size, C))
    product = jnp.concatenate([x for part in parts for x in (nothing, part)])
    second = jnp.concatenate([x[i:i + size] for i in lower])
    product = second - _product(second, product, exact)
    parts = [product[n * size:(n + 1) * size] for n in range(len(lower))]
    firsts = [x[i - size:i] for i in lower]
    return jnp.concatenate([x for pair in zip(firsts, parts, strict=True) for x in pair])


def _product(a, b, exact):
    """Of f32; if not `exact`, to 16 bits."""
    if exact:
        return _dot(a, b, _NN)
    (a, a_rest), (b, b_rest) = _split(a), _split(b)
    return _dot(a, b, _NN) + (_dot(a, b_rest, _NN) + _dot(a_rest, b, _NN))


def _split(x):
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _strictly_lower(x):
    i, j = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return jnp.where(j < i, x, 0.0)


# ---------------------------------------------------------------- kernels


def _forward_kernel(plan, K, V, keep_states, *refs):
    rows_ref, q_ref, k_ref, v_ref, initial_ref, o_ref, state_ref, *states_ref, columns_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    if keep_states:
        states_ref[0][0, 0] = state_ref[0]
    for chunk in _chunks_of_step(plan, rows_ref, columns_ref):
        for head in range(plan.heads):
            k = k_ref[chunk.at(plan.key(head), K)]
            intra, beta = chunk.intra(head), chunk.column("beta", head)
            read = chunk.column("read", head)
            a = _strictly_lower(beta * _dot(k, k, _NT) * intra)
            inverse = _unit_lower_inverse(a, plan.exact).astype(k.dtype)
            for tile in range(V // LANES):
                at = 0, head, slice(None), slice(tile * LANES, (tile + 1) * LANES)
                state = state_ref[at]
                narrow = state.astype(k.dtype)
                error = v_ref[chunk.at(head, V, tile)] - read * _dot(k, narrow, _NN)
                written = _dot(inverse, (beta * error).astype(k.dtype), _NN)
                for query in plan.queries_of(head):
                    q = q_ref[chunk.at(query, K)]
                    p = (plan.scale * _dot(q, k, _NT) * intra).astype(k.dtype)
                    o = _dot(p, written.astype(k.dtype), _NN)
                    o += plan.scale * read * _dot(q, narrow, _NN)
                    out = max(query, head) if plan.queries > plan.heads else head
                    o_ref[chunk.at(out, V, tile)] = o.astype(o_ref.dtype)
                k_write = (k.T * chunk.row("write", head)).astype(k.dtype)
                state_ref[at] = chunk.keep(head) * state + _dot(
                    k_write, written.astype(k.dtype), _NN)


def _specs(plan, K, V, block_of):
    """Block specs by the kind of array; the grid is (groups of heads, rows, blocks of tokens)."""
    at = lambda heads, width: pl.BlockSpec(
        (1, plan.block, heads * width), lambda h, b, n: (b, block_of(n), h))
    return dict(
        rows=pl.BlockSpec((1, plan.chunks, 1, plan.rows, plan.chunk),
                          lambda h, b, n: (b, block_of(n), h, 0, 0)),
        q=at(plan.queries, K), k=at(plan.keys, K), v=at(plan.heads, V),
        o=at(max(plan.heads, plan.queries), V),
        state=pl.BlockSpec((1, plan.heads, K, V), lambda h, b, n: (b, h, 0, 0)),
        states=pl.BlockSpec((1, 1, plan.heads, K, V), lambda h, b, n: (b, block_of(n), h, 0, 0)),
    )


def _call(kernel, plan, specs, inputs, outputs, arrays, shapes, grid, name, scratch):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specs[name] for name in inputs],
        out_specs=[specs[name] for name in outputs],
        out_shape=shapes,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")),
        name=name,
    )(*arrays)


def forward(plan, rows, q, k, v, initial_state, keep_states):
    B, T, _ = q.shape
    _, H, K, V = initial_state.shape
    blocks, G = T // plan.block, H // plan.heads
    width = G * max(plan.heads, plan.queries) * V
    shapes = [jax.ShapeDtypeStruct((B, T, width), v.dtype),
              jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)]
    outputs = ["o", "state"]
    if keep_states:
        shapes.append(jax.ShapeDtypeStruct((B, blocks, H, K, V), jnp.float32))
        outputs.append("states")
    return _call(
        functools.partial(_forward_kernel, plan, K, V, keep_states), plan,
        _specs(plan, K, V, lambda n: n), ["rows", "q", "k", "v", "state"], outputs,
        [rows, q, k, v, initial_state], shapes, (G, B, blocks),
        "gated_delta_rule_forward", [_columns(plan)])


def _columns(plan):
    return pltpu.VMEM((plan.chunks, plan.chunk, LANES), jnp.float32)
