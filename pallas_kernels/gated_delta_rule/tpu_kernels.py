"""The Pallas Mosaic TPU kernels of the gated delta rule by chunks, forward and backward.

The equations of `xla.py`, but for beta, which multiplies columns of matrices instead of rows: with
S the state that enters a chunk, D the decay from token to token, P = scale (Q K^T) . D beta^T, and
U the inverse of I + strictly_lower((K K^T) . D beta^T), so that beta E is what tokens write,

    E = U (V - read K S)        O = P E + scale read Q S        S' = keep S + K^T (write beta E)

and, for gradients dO of the outputs and dS' of the state that leaves,

    dE = P^T dO + write beta (K dS')        dV = U^T dE
    dS = keep dS' + scale (read Q)^T dO - (read K)^T dV

A grid step takes several chunks of several heads. Inverses wait for no state: the forward pass
makes those of the next grid step while the products with states wait for one another; so it has one
step more, the first, and the second writes over its outputs. What a product leaves for another
waits in VMEM, so that registers suffice. The forward pass of a gradient keeps the state that enters
each grid step; the backward pass computes the inverses, the other states and E again.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta_rule import tpu_chunks
from pallas_kernels.gated_delta_rule.tpu_chunks import Chunk, Plan
from pallas_kernels.gated_delta_rule.tpu_triangular import lockstep, together
from pallas_kernels.mosaic_tpu import LANES, NN, NT, VMEM, call, dot, strictly_lower, sum_columns


def _forward_kernel(plan, K, V, keep_states, *refs):
    rows_ref, q_ref, k_ref, v_ref, initial_ref, o_ref, state_ref, *states_ref, scratch = refs
    narrow = lambda x: x.astype(k_ref.dtype)
    heads = range(plan.heads)

    @pl.when(pl.program_id(2) <= 1)  # the first grid step's products are of nothing
    def _():
        state_ref[...] = initial_ref[...]

    if keep_states:
        states_ref[0][0, 0] = state_ref[0]

    def prepare(chunk):
        """What the next grid step needs, as far as it does not replace what this one does."""
        chunk.multiply(q_ref, k_ref, K)
        yield from chunk.measure()
        yield from together(chunk.block_inverses(head) for head in heads)

    def weigh(chunk, head):
        """The factors of the products with states."""
        refs, at_k = chunk.scratch, chunk.at(plan.key(head), K)
        chunk.make_column("read", head)
        yield
        refs["k_read"][head] = narrow(chunk.column("read", head, K) * k_ref[at_k])
        yield
        refs["k_write"][head] = narrow(k_ref[at_k].T * chunk.row("write", head))
        yield
        refs["keep"][head] = chunk.row("keep", head)
        for query in plan.queries_of(head):
            at = plan.output(query, head)
            decay = refs["decay"][head] * chunk.row("beta", head)
            refs["p"][at] = narrow(refs["qk"][plan.pair(query, head)] * decay)
            yield
            q = q_ref[chunk.at(query, K)]
            refs["q_read"][at] = narrow(plan.scale * chunk.column("read", head, K) * q)
            yield

    def step(chunk, head):
        refs, state = chunk.scratch, state_ref.at[0, head]
        error = v_ref[chunk.at(head, V)] - dot(refs["k_read"][head], narrow(state[...]), NN)
        refs["error"][head] = narrow(error)
        yield
        refs["written"][head] = narrow(dot(refs["inverse"][head], refs["error"][head], NN))
        yield
        for query in plan.queries_of(head):
            at = plan.output(query, head)
            o = dot(refs["p"][at], refs["written"][head], NN)
            o += dot(refs["q_read"][at], narrow(state[...]), NN)
            o_ref[chunk.at(at, V)] = o.astype(o_ref.dtype)
        keep = refs["keep"][head][:, :1]
        state[...] = keep * state[...] + dot(refs["k_write"][head], refs["written"][head], NN)
        yield

    def steps():
        for chunk in chunks:
            yield from together(step(chunk, head) for head in heads)

    chunks = [Chunk(plan, index, rows_ref, scratch) for index in range(plan.chunks)]
    lockstep([steps(), *map(prepare, chunks)])
    lockstep(f(chunk, head) for f in (Chunk.merge, weigh) for chunk in chunks for head in heads)


def _backward_kernel(plan, K, V, *refs):
    (rows_ref, q_ref, k_ref, v_ref, do_ref, dlast_ref, before_ref,
     dq_ref, dk_ref, dv_ref, dweights_ref, dstate_ref, scratch) = refs
    narrow = lambda x: x.astype(k_ref.dtype)
    heads = range(plan.heads)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = dlast_ref[...]

    def prepare(chunk):
        chunk.multiply(q_ref, k_ref, K)
        yield from chunk.measure()

    def again(chunk, head):
        """What the forward pass did not keep."""
        refs, at_k = chunk.scratch, chunk.at(plan.key(head), K)
        state = refs["following"].at[head] if chunk.index else before_ref.at[0, 0, head]
        refs["state"][head] = narrow(state[...])
        read = chunk.column("read", head, V) * dot(k_ref[at_k], refs["state"][head], NN)
        refs["error"][head] = narrow(v_ref[chunk.at(head, V)] - read)
        yield
        refs["written"][head] = narrow(dot(refs["inverse"][head], refs["error"][head], NN))
        refs["transposed"][head] = refs["inverse"][head].T
        yield
        if chunk.index < plan.chunks - 1:
            k_write = narrow(k_ref[at_k].T * chunk.row("write", head))
            refs["following"][head] = (
                chunk.keep(head) * state[...] + dot(k_write, refs["written"][head], NN))

    def own(chunk, head):
        """What the outputs give to E by the products Q K^T; columns of weights."""
        refs = chunk.scratch
        for query in plan.queries_of(head):
            do = do_ref.at[chunk.at(plan.output(query, head), V)]
            decay = refs["decay"][head] * chunk.row("beta", head)
            p = narrow(refs["qk"][plan.pair(query, head)] * decay)
            chunk.add("dwritten", head, dot(p.T, do[...], NN))
            yield
        chunk.make_column("read", head)
        yield
        chunk.make_column("write", head)
        yield

    def own_state(chunk, head):
        """What the outputs give to the state before, and the factor of what the system gives."""
        refs = chunk.scratch
        for query in plan.queries_of(head):
            do = do_ref.at[chunk.at(plan.output(query, head), V)]
            q_read = narrow(q_ref[chunk.at(query, K)].T * chunk.row("read", head))
            chunk.add("dstate", head, plan.scale * dot(q_read, do[...], NN))
            yield
        k = k_ref[chunk.at(plan.key(head), K)]
        refs["k_read"][head] = narrow(k.T * chunk.row("read", head))

    def outputs(chunk, head):
        """The gradients of the products Q K^T and Q S."""
        refs = chunk.scratch
        for query in plan.queries_of(head):
            do = do_ref.at[chunk.at(plan.output(query, head), V)]
            pair = plan.pair(query, head)
            dqk = dot(do[...], refs["written"][head], NT) * refs["decay"][head]
            chunk.add("dqk", pair, dqk * chunk.row("beta", head))
            chunk.add("between", head, dqk * refs["qk"][pair])
            yield
            dq_read = plan.scale * chunk.column("read", head, K) * dot(
                do[...], refs["state"][head], NT)
            chunk.add("dq", query, dq_read)
            chunk.add("reaching", head, dq_read * q_ref[chunk.at(query, K)])
            yield

    def step(chunk, head):
        """What waits for the gradient of the state, and that of the state before it."""
        refs, dstate = chunk.scratch, dstate_ref.at[0, head]
        at_k, at_v = chunk.at(plan.key(head), K), chunk.at(head, V)
        write, dafter = functools.partial(chunk.column, "write", head), narrow(dstate[...])
        dwritten = refs["dwritten"][head] + write(V) * dot(k_ref[at_k], dafter, NN)
        refs["dwritten_narrow"][head] = narrow(dwritten)
        dk_tail = dot(refs["written"][head], dafter, NT)
        chunk.add("dk", plan.key(head), write(K) * dk_tail)
        chunk.put("write", head, _sum_rows(dk_tail * k_ref[at_k]))
        kept = jnp.sum(chunk.keep(head) * dstate[...] * refs["state"][head], keepdims=True)
        last = lax.broadcasted_iota(jnp.int32, (1, plan.chunk), 1) == plan.chunk - 1
        chunk.gradient("reaching", head)[...] = jnp.where(last, kept, 0.0)
        yield
        dv_ref[at_v] = narrow(dot(refs["transposed"][head], refs["dwritten_narrow"][head], NN))
        yield
        dstate[...] = chunk.keep(head) * dstate[...] + (
            refs["dstate"][head] - dot(refs["k_read"][head], dv_ref[at_v], NN))
        yield

    def systems(chunk, head):
        """The gradients of the triangular system and its right side."""
        refs, key = chunk.scratch, plan.key(head)
        at_k, at_v = chunk.at(key, K), chunk.at(head, V)
        dk_read = -chunk.column("read", head, K) * dot(dv_ref[at_v], refs["state"][head], NT)
        chunk.add("dk", key, dk_read)
        chunk.add("reaching", head, dk_read * k_ref[at_k])
        yield
        da = dot(dv_ref[at_v], refs["written"][head], NT) * refs["decay"][head]
        refs["da"][head] = strictly_lower(-da)
        yield
        chunk.add("dkk", key, refs["da"][head] * chunk.row("beta", head))
        yield
        da = refs["da"][head] * refs["kk"][key]
        chunk.gradient("beta", head)[...] = sum_columns(refs["between"][head] + da)
        between = strictly_lower(refs["between"][head]) + da
        refs["between"][head] = between * chunk.row("beta", head)
        yield
        chunk.put("reaching", head, _sum_rows(refs["reaching"][head], refs["between"][head]))
        yield
        chunk.gradient("reaching", head)[...] -= sum_columns(refs["between"][head])

    def products(chunk):
        """The gradients of queries and keys, from those of their products."""
        refs = chunk.scratch
        for pair, (query, key) in enumerate(plan.pairs):
            refs["dqk_narrow"][pair] = narrow(plan.scale * refs["dqk"][pair])
            chunk.add("dq", query, dot(refs["dqk_narrow"][pair], k_ref[chunk.at(key, K)], NN))
            yield
            dqk = refs["dqk_narrow"][pair].T
            chunk.add("dk", key, dot(dqk, q_ref[chunk.at(query, K)], NN))
            yield
        for query in range(plan.queries):
            dq_ref[chunk.at(query, K)] = refs["dq"][query].astype(dq_ref.dtype)

    def finish(chunk):
        """The gradients of keys and weights, of which all parts are there."""
        refs = chunk.scratch
        for key in range(plan.keys):
            at_k = chunk.at(key, K)
            dkk = narrow(refs["dkk"][key] + refs["dkk"][key].T)
            dk = refs["dk"][key] + dot(dkk, k_ref[at_k], NN)
            dk_ref[at_k] = dk.astype(dk_ref.dtype)
        columns = refs["dcolumns"][...].T
        reaching, write = (columns[plan.gradients_of(name)] for name in ("reaching", "write"))
        chunk.dweights[plan.gradients_of("reaching")] += reaching
        chunk.dweights[plan.gradients_of("beta")] += chunk.rows_of("left") * write
        chunk.dweights[plan.gradients_of("write")] = chunk.rows_of("write") * write

    chunks = [Chunk(plan, index, rows_ref, scratch, dweights_ref) for index in range(plan.chunks)]
    of_all = lambda f, chunks: [f(chunk, head) for chunk in chunks for head in heads]
    lockstep(map(prepare, chunks))
    lockstep(of_all(Chunk.block_inverses, chunks))
    lockstep(of_all(Chunk.merge, chunks) + of_all(own, chunks))
    for index, chunk in enumerate(chunks):
        lockstep(of_all(again, [chunk]) + of_all(own_state, [chunk])
                 + of_all(outputs, chunks[:index][-1:]))
    later = []
    for chunk in reversed(chunks):
        waiting = of_all(outputs, [chunk]) if chunk is chunks[-1] else []
        lockstep([*of_all(step, [chunk]), *waiting, *of_all(systems, later),
                  *map(products, later)])
        for done in later:
            finish(done)
        later = [chunk]
    lockstep([*of_all(systems, later), *map(products, later)])
    finish(*later)


def _sum_rows(*terms):
    """The sums of each row of all the terms; only one reduction for those of the same width."""
    sums = {}
    for x in terms:
        for at in range(0, x.shape[1], LANES):
            part = x[:, at:at + LANES]
            sums[part.shape[1]] = sums.get(part.shape[1], 0.0) + part
    return sum(jnp.sum(x, axis=1, keepdims=True) for x in sums.values())


def _specs(plan, K, V, block_of, ahead):
    """Block specs by the kind of array; the grid is (groups of heads, rows, blocks of tokens).

    Of blocks of tokens, `ahead` gives those of queries, keys and weights, `block_of` the others'.
    """
    at = lambda heads, width, block_of=block_of: pl.BlockSpec(
        (1, plan.block, heads * width), lambda h, b, n: (b, block_of(n), h))
    return dict(
        rows=pl.BlockSpec((1, plan.chunks, 1, plan.rows, plan.chunk),
                          lambda h, b, n: (b, ahead(n), h, 0, 0)),
        q=at(plan.queries, K, ahead), k=at(plan.keys, K, ahead), v=at(plan.heads, V),
        o=at(plan.outputs, V),
        state=pl.BlockSpec((1, plan.heads, K, V), lambda h, b, n: (b, h, 0, 0)),
        states=pl.BlockSpec((1, 1, plan.heads, K, V), lambda h, b, n: (b, block_of(n), h, 0, 0)),
        dweights=pl.BlockSpec((1, plan.chunks, 1, plan.gradients, plan.chunk),
                              lambda h, b, n: (b, block_of(n), h, 0, 0)),
    )


def forward(plan: Plan, rows, q, k, v, initial_state, keep_states):
    B, T, _ = q.shape
    K, V = initial_state.shape[2:]
    blocks, G = T // plan.block, initial_state.shape[1] // plan.heads
    C, width = plan.chunk, G * plan.outputs * V
    shapes = [jax.ShapeDtypeStruct((B, T, width), v.dtype),
              jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)]
    outputs = ["o", "state"]
    if keep_states:
        shapes.append(jax.ShapeDtypeStruct((B, blocks, *initial_state.shape[1:]), jnp.float32))
        outputs.append("states")
    H, narrow = plan.heads, k.dtype
    scratch = tpu_chunks.scratch(
        plan, V, narrow, k_read=(H, C, K, narrow),
        k_write=(H, K, C, narrow), keep=(H, 1, C), p=(plan.outputs, C, C, narrow),
        q_read=(plan.outputs, C, K, narrow), error=(H, C, V, narrow))
    return call(
        functools.partial(_forward_kernel, plan, K, V, keep_states), "gated_delta_rule_forward",
        _specs(plan, K, V, lambda n: jnp.maximum(n - 1, 0), lambda n: jnp.minimum(n, blocks - 1)),
        ["rows", "q", "k", "v", "state"], outputs, [rows, q, k, v, initial_state], shapes,
        (G, B, blocks + 1), [scratch], vmem_limit_bytes=VMEM)


def backward(plan: Plan, rows, q, k, v, do, dstate, states):
    B, T, _ = q.shape
    _, H, K, V = dstate.shape
    blocks, G = T // plan.block, H // plan.heads
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    shapes += [jax.ShapeDtypeStruct((*rows.shape[:3], plan.gradients, plan.chunk), jnp.float32),
               jax.ShapeDtypeStruct(dstate.shape, jnp.float32)]
    C, heads, pairs, narrow = plan.chunk, plan.heads, len(plan.pairs), k.dtype
    scratch = tpu_chunks.scratch(
        plan, V, narrow, state=(heads, K, V, narrow), error=(heads, C, V, narrow),
        transposed=(heads, C, C, narrow), k_read=(heads, K, C, narrow), between=(heads, C, C),
        reaching=(heads, C, K), dqk=(pairs, C, C), dqk_narrow=(pairs, C, C, narrow),
        dq=(plan.queries, C, K), dk=(plan.keys, C, K), dkk=(plan.keys, C, C),
        dstate=(heads, K, V), dwritten=(heads, C, V), dwritten_narrow=(heads, C, V, narrow),
        da=(heads, C, C))
    scratch["following"] = pltpu.VMEM((1, heads, K, V), jnp.float32)
    scratch["dcolumns"] = pltpu.VMEM((plan.chunks, C, LANES), jnp.float32)
    reverse = lambda n: blocks - 1 - n
    return call(
        functools.partial(_backward_kernel, plan, K, V), "gated_delta_rule_backward",
        _specs(plan, K, V, reverse, reverse),
        ["rows", "q", "k", "v", "o", "state", "states"], ["q", "k", "v", "dweights", "state"],
        [rows, q, k, v, do, dstate, states], shapes, (G, B, blocks), [scratch],
        vmem_limit_bytes=VMEM)
