"""Linear attention on Hopper GPUs (wgmma, TMA), by chunks of 64 tokens. bfloat16 inputs.

**One pass.** With G the running sum of the log decay in a chunk, outputs and every gradient are the
same contraction of three arrays with a state that travels over the chunks,

    pass(a, b, x):  y_i = scale * sum_{j <= i} exp(G_i - G_j) (a_i . b_j) x_j  +  read_i a_i S
                    S  <- keep S + sum_j write_j b_j x_j^T

with `read_i = scale exp(G_i)`, `write_j = exp(G_end - G_j)`, `keep = exp(G_end)`. In reverse, the
sum is over j >= i with exp(G_j - G_i), and read and write change places:

    o = pass(q, k, v)              dq = pass(do, v, k), its state being S^T
    dv = reverse pass(k, q, do)    dk = reverse pass(v, do, q), its state being dS^T

(Lightning Attention-2, https://arxiv.org/abs/2401.04658, algorithms 1 and 2.) Documents and
padding only change the weights: a pair in different documents, a read or write across a border,
and a kept state become 0. The log decay of token t has a part in all that passes it: with ' the
share that stays in the chunk and '' the share that reads or writes a state,

    sum_{i >= t} (dq_i . q_i - dk'_i . k_i) + sum_{j < t} dk''_j . k_j + keep <S_in, dS_out>

**Work.** A thread block (one warpgroup) takes one head and 64 columns of x, holds the state of
K x 64 in f32 registers and walks over the chunks; TMA loads run a chunk ahead. Two blocks fit
in an SM. A pass at K = V = 128 costs, per head and chunk of 64 tokens, 64 kB of HBM traffic (three
tiles in, one out) and, in two blocks of which each forms its own a b^T,

    2 * (2 * 64 * 64 * 128  +  2 * 64 * 64 * 64  +  2 * (2 * 64 * 128 * 64))  =  7.3 MFLOP

On an H200 (4.8 TB/s, 990 Tflop/s) these are 13.7 ns and 7.4 ns of the whole chip: the traffic
bounds it, so a larger chunk, which saves state products, would gain nothing. Forward 1 pass;
backward 3, plus 48 kB per chunk (a state, two more tiles) where the decay wants a gradient.

**Splits.** 264 blocks fill the chip's 132 SMs, but B H V / 64 may be far fewer (64 at one row of
32 heads), and each walks all T / 64 chunks in turn. Then T is cut into splits: one more pass
finds what each split adds to the state (b and x only, 32 kB), a product with the [splits, splits]
decays between them gives the state before each, and all splits run at once: 1.5 times the traffic
for 264 / (B H V / 64) times the blocks.
"""

import functools
import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import target_platform
from pallas_kernels.linear_attention.xla import _chunks, _documents_at_borders

C = 64  # tokens per chunk
COLUMNS = 64  # of x per thread block: a swizzle of 128 bytes
STAGES = 2  # chunks on their way or at work
BLOCKS = 264  # fill an H100 or H200: two on each of 132 SMs


def linear_attention(q, k, v, decay, *, scale, initial_state, segments, output_final_state,
                     chunk_size):
    del output_final_state  # it is at hand in any case
    _refuse_target()
    _refuse_arguments(q, k, v, chunk_size)
    B, T, H, _ = q.shape
    K, V = q.shape[-1], v.shape[-1]
    decay = jnp.broadcast_to(jnp.asarray(decay, jnp.float32), (B, T, H))
    if segments is not None:
        decay = jnp.where(segments[..., None] != 0, decay, 0)
        segments = _chunks(segments[..., None], C)
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, V))
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -T % C), (0, 0), (0, -x.shape[-1] % COLUMNS)])
    state = jnp.pad(initial_state.astype(jnp.float32),
                    [(0, 0), (0, 0), (0, -K % COLUMNS), (0, -V % COLUMNS)])
    o, state = _attend(scale, pad(q), pad(k), pad(v), _chunks(decay, C), state, segments)
    return o[:, :T, :, :V], state[..., :K, :V]


def _refuse_target():
    if target_platform() != "gpu":
        raise NotImplementedError(f"serves GPU only, the target is {target_platform()}")
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device or jax.devices()[0]
    if not re.search(r"\bG?H(100|200|800|20)\b", device.device_kind):
        raise NotImplementedError(
            f"serves Hopper only (compute capability 9.0), the target is {device.device_kind}")


def _refuse_arguments(q, k, v, chunk_size):
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        raise NotImplementedError(f"needs bfloat16 (float32 products would be tf32, 1e-3), "
                                  f"got {q.dtype}, {k.dtype}, {v.dtype}")
    if max(q.shape[-1], v.shape[-1]) > 128:
        raise NotImplementedError(f"needs K and V up to 128 (a wider state leaves the registers), "
                                  f"got {q.shape[-1]} and {v.shape[-1]}")
    if chunk_size not in (None, C):
        raise NotImplementedError(f"works by chunks of {C}, got chunk_size {chunk_size}")


# Forward and backward out of passes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, decay, initial_state, segments):
    return _forward(scale, q, k, v, decay, initial_state, segments)[0]


def _forward(scale, q, k, v, decay, initial_state, segments):
    weights = _weights(decay, segments, scale)
    incoming = _split(k, v, weights, initial_state)
    out = _pass(q, k, v, weights, incoming)
    return (out["y"], out["state"][:, :, -1]), incoming


def _attend_fwd(scale, *arguments):
    q, k, v, decay, initial_state, segments = jax.tree.map(
        lambda x: x.value, arguments, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    out, incoming = _forward(scale, q, k, v, decay, initial_state, segments)
    wants_decay = () if arguments[3].perturbed else None  # the structure is known when tracing
    return out, (q, k, v, decay, segments, incoming, wants_decay)


def _attend_bwd(scale, residuals, gradients):
    q, k, v, decay, segments, incoming, wants_decay = residuals
    do = _dense(gradients[0], v.shape, v.dtype)
    dfinal = _dense(gradients[1], (*incoming.shape[:2], *incoming.shape[3:]), jnp.float32)
    weights = _weights(decay, segments, scale)
    backwards = weights.reversed()
    dincoming = _split(q, do, backwards, dfinal, incoming.shape[2])
    for_dv = _pass(k, q, do, backwards, dincoming)
    incoming, dincoming = incoming.mT, dincoming.mT
    if wants_decay is None:
        for_dq = _pass(do, v, k, weights, incoming)
        for_dk = _pass(v, do, q, backwards, dincoming)
        ddecay = None
    else:
        for_dq = _pass(do, v, k, weights, incoming, dot=q, emit=True)
        for_dk = _pass(v, do, q, backwards, dincoming, dot=k, meet=for_dq["states"])
        ddecay = _ddecay(for_dq["dots"], for_dk["dots"], weights.keep * for_dk["meets"])
    return for_dq["y"], for_dk["y"], for_dv["y"], ddecay, for_dv["state"][:, :, 0], None


def _ddecay(dots_q, dots_k, through):
    """Every term is that of pairs of tokens which t lies between: nothing large cancels."""
    across = dots_k[..., 0, :]
    within = dots_q[..., 1, :] - (dots_k[..., 1, :] - across)
    before = jnp.pad(across[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    return (lax.cumsum(within, axis=3, reverse=True) + jnp.cumsum(before, axis=3)
            + through[..., None])


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _dense(gradient, shape, dtype):
    return jnp.zeros(shape, dtype) if isinstance(gradient, SymbolicZero) else gradient


class Weights(NamedTuple):
    """What decay and documents contribute, and the direction of travel."""

    tokens: Float[Array, "B H N 3 C"]  # the running decay; of a token, reading and writing
    documents: Int[Array, "B N 2 C"] | None  # of tokens i and j; those of padding equal none
    keep: Float[Array, "B H N"]
    scale: float
    reverse: bool = False

    def reversed(self):
        return self._replace(tokens=self.tokens[..., jnp.array([0, 2, 1]), :], reverse=True)


def _weights(decay, segments: Int[Array, "B 1 N C"] | None, scale) -> Weights:
    total = jnp.cumsum(decay, axis=-1)
    end = total[..., -1:]
    read, write, keep = scale * jnp.exp(total), jnp.exp(end - total), jnp.exp(end[..., 0])
    documents = None
    if segments is not None:
        before, after = _documents_at_borders(segments)
        real = segments != 0
        read = jnp.where(real & (segments == before), read, 0)
        write = jnp.where(real & (segments == after), write, 0)
        keep = jnp.where((before == after)[..., 0], keep, 0)
        none = jnp.iinfo(segments.dtype).min
        documents = [jnp.where(real, segments, none + n)[:, 0] for n in range(2)]
        documents = jnp.stack(documents, axis=-2).astype(jnp.int32)
    return Weights(jnp.stack([total, read, write], axis=-2), documents, keep, scale)


def _split(b, x, weights, state, splits=None) -> Float[Array, "B H S K X"]:
    """The state before each split, in the direction of travel."""
    B, H, N = weights.keep.shape
    splits = splits or _splits(B * H * x.shape[-1] // COLUMNS, N)
    if splits == 1:
        return state[:, :, None]
    added = _pass(None, b, x, weights, None, splits=splits)["state"]
    per = -(-N // splits)
    keep = jnp.pad(weights.keep, [(0, 0), (0, 0), (0, splits * per - N)], constant_values=1)
    keep = keep.reshape(B, H, splits, per).prod(-1)
    if weights.reverse:
        added, keep = added[:, :, ::-1], keep[:, :, ::-1]
    states = jnp.concatenate([state[:, :, None], added[:, :, :-1]], axis=2)
    at, source, between = jnp.ogrid[:splits, :splits, :splits]
    passes = (source <= between) & (between < at)
    decay = jnp.where(passes, keep[:, :, None, None], 1).prod(-1) * jnp.tri(splits)
    states = jnp.einsum("bhij,bhjkx->bhikx", decay, states, precision="highest")
    return states[:, :, ::-1] if weights.reverse else states


def _splits(blocks, N):
    if blocks >= BLOCKS // 2:
        return 1
    per = -(-N // min(BLOCKS // blocks, max(1, N // 4)))  # chunks: at least 4
    return -(-N // per)


# The pass.


def _pass(a, b, x, weights, state, *, splits=None, dot=None, emit=False, meet=None):
    """What one pass gives: "state" [B H S K X], after each split, and

      "y": [B T H X], if there are a and the states before the splits (else those are 0),
      "dots": [B H N 2 C], of y_i's part from the state, and of y_i, with dot_i if there is
        dot [B T H X]; both without x_i's own part in y_i, which no decay touches,
      "states": [B H N K X], in bf16, that before each chunk, if emit,
      "meets": [B H N], `<the state before a chunk, meet's>`, if there is meet [B H N K X].
    """
    B, T, H, K = b.shape
    X, N = x.shape[-1], T // C
    columns = X // COLUMNS
    splits = splits or state.shape[2]
    given = dict(a=a, b=b, x=x, tokens=weights.tokens, documents=weights.documents,
                 keep=weights.keep, state=state, dot=dot, meet=meet)
    if a is None:
        given["documents"] = None
    shapes = dict(state=((B, H, splits, K, X), jnp.float32))
    if a is not None:
        shapes["y"] = (x.shape, jnp.bfloat16)
    if dot is not None:
        shapes["dots"] = ((B, H, N, columns, 2, C), jnp.float32)
    if emit:
        shapes["states"] = ((B, H, N, K, X), jnp.bfloat16)
    if meet is not None:
        shapes["meets"] = ((B, H, N, columns, K), jnp.float32)
    given = {name: array for name, array in given.items() if array is not None}
    copies = {name: shape for name, shape in dict(
        a=(C, K), b=(C, K), x=(C, COLUMNS), dot=(C, COLUMNS), meet=(K, COLUMNS), tokens=(3, C),
        documents=(2, C)).items() if name in given}
    tiled = lambda *shape: plgpu.SMEM(
        shape, jnp.bfloat16,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))
    plain = dict(tokens=jnp.float32, documents=jnp.int32)
    scratch = {name: plgpu.SMEM((STAGES, *shape), plain[name]) if name in plain
               else tiled(STAGES, *shape) for name, shape in copies.items()}
    scratch |= {name: plgpu.SMEM(shapes[name][0][4:], jnp.float32)
                for name in ("dots", "meets") if name in shapes}
    scratch |= dict(staged=tiled(C, COLUMNS), bf16_state=tiled(K, COLUMNS),
                    arrived=plgpu.Barrier(num_arrivals=len(copies), num_barriers=STAGES))
    kernel = plgpu.kernel(
        functools.partial(_walk, scale=weights.scale, reverse=weights.reverse),
        out_type={name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()},
        grid=(columns, B * H, splits), grid_names=("column", "head", "split"),
        scratch_types=(scratch,),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    out = kernel(given)
    return out | {name: out[name].sum(axis) for name, axis in dict(dots=3, meets=(3, 4)).items()
                  if name in out}


LAYOUT = plgpu.Layout.WGMMA
ROWS, COLS = LAYOUT.reduce(1), LAYOUT.reduce(0)


def _walk(given, out, smem, *, scale, reverse):
    """One thread block: a head, COLUMNS columns of x, the chunks of a split in turn."""
    B, H, N = given["keep"].shape
    K = given["b"].shape[-1]
    split = lax.axis_index("split")
    b, h = _divmod(lax.axis_index("head"), H)
    column = lax.axis_index("column")
    columns = pl.ds(column * COLUMNS, COLUMNS)
    per = -(-N // out["state"].shape[2])
    count = jnp.minimum(per, N - split * per)
    chunk_at = lambda step: split * per + (count - 1 - step if reverse else step)

    def fetch(step):
        chunk, stage = chunk_at(step), lax.rem(step, STAGES)
        tokens = pl.ds(chunk * C, C)
        sources = dict(
            a=lambda ref: ref.at[b, tokens, h], b=lambda ref: ref.at[b, tokens, h],
            x=lambda ref: ref.at[b, tokens, h, columns],
            dot=lambda ref: ref.at[b, tokens, h, columns],
            meet=lambda ref: ref.at[b, h, chunk, :, columns],
            tokens=lambda ref: ref.at[b, h, chunk], documents=lambda ref: ref.at[b, chunk])
        for name, source in sources.items():
            if name in given:
                plgpu.copy_gmem_to_smem(
                    source(given[name]), smem[name].at[stage], smem["arrived"].at[stage])

    def step_of(step, state):
        chunk, stage = chunk_at(step), lax.rem(step, STAGES)
        plgpu.barrier_wait(smem["arrived"].at[stage])
        here = {name: smem[name].at[stage] for name in smem if name in given and name != "state"}
        keep = given["keep"][b, h, chunk]

        def dots(part, y):
            if "dots" in out:
                products = y * _load(here["dot"], LAYOUT).astype(jnp.float32)
                smem["dots"][part] = products.sum(1)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # staged and bf16_state are free again
        if "y" in out:
            smem["bf16_state"][...] = state.astype(jnp.bfloat16)
        x = _load(here["x"], LAYOUT).astype(jnp.float32)
        smem["staged"][...] = (x * _rows(here["tokens"].at[2], x.shape)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        if "states" in out:
            plgpu.copy_smem_to_gmem(smem["bf16_state"], out["states"].at[b, h, chunk, :, columns])
        if "meets" in out:
            products = state * _load(here["meet"], LAYOUT).astype(jnp.float32)
            smem["meets"][...] = products.sum(1)
        if "y" in out:
            y = mma(here["a"], smem["bf16_state"], x.shape) * _rows(here["tokens"].at[1], x.shape)
            dots(0, y)
            weights, own = _pairs(here, scale, reverse, apart="dots" in out)
            y = mma_add(y, weights, here["x"])
            dots(1, y)
            if own is not None:
                x = _load(here["x"], LAYOUT).astype(jnp.float32)  # again: registers are short
                y += lax.broadcast_in_dim(own, x.shape, [0]) * x
        state = mma_add(state * keep, _transposed(here["b"]), smem["staged"])
        if "y" in out:
            smem["staged"][...] = y.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                smem["staged"], out["y"].at[b, pl.ds(chunk * C, C), h, columns])
            for name in out.keys() & {"dots", "meets"}:
                plgpu.copy_smem_to_gmem(smem[name], out[name].at[b, h, chunk, column])
        pl.when(step + STAGES < count)(lambda: fetch(step + STAGES))
        return state

    for step in range(STAGES):
        pl.when(step < count)(functools.partial(fetch, jnp.int32(step)))
    if "state" in given:
        state = _load(given["state"].at[b, h, split, :, columns], LAYOUT, optimized=False)
    else:
        state = plgpu.layout_cast(jnp.zeros((K, COLUMNS), jnp.float32), LAYOUT)
    out["state"][b, h, split, :, columns] = lax.fori_loop(0, count, step_of, state)
    plgpu.wait_smem_to_gmem(0)


def _pairs(here, scale, reverse, apart):
    """The chunk's pairs of tokens, bf16 [C, C]; if apart, without the diagonal, which is [C]."""
    pairs = scale * mma(here["a"], _transposed(here["b"]), (C, C))
    i = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=LAYOUT)
    j = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=LAYOUT)
    decay = here["tokens"].at[0]
    decay = _rows(decay, (C, C)) - _cols(decay, (C, C))
    seen, decay = (i <= j, -decay) if reverse else (i >= j, decay)
    if "documents" in here:
        documents = here["documents"]
        seen &= _rows(documents.at[0], (C, C)) == _cols(documents.at[1], (C, C))
    own = None
    if apart:
        own = jnp.where(seen & (i == j), pairs, 0).sum(1)
        seen &= i != j
    pairs *= jnp.exp(jnp.where(seen, decay, 0))
    return jnp.where(seen, pairs, 0).astype(jnp.bfloat16), own


def mma(a, b, shape):
    def product(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))


def mma_add(x, a, b):
    """`x + a b` in x's registers; a may be in registers too."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(x))


def _transposed(ref):
    return ref.transpose((1, 0))


def _rows(ref, shape):
    return lax.broadcast_in_dim(_load(ref, ROWS), shape, [0])


def _cols(ref, shape):
    return lax.broadcast_in_dim(_load(ref, COLS), shape, [1])


def _load(ref, layout, **options):
    # Until jax 0.11 the index was an argument of its own.
    index = [()] if "idx" in inspect.signature(plgpu.load).parameters else []
    return plgpu.load(ref, *index, layout=layout, **options)


def _divmod(n, d):
    return lax.div(n, jnp.int32(d)), lax.rem(n, jnp.int32(d))
