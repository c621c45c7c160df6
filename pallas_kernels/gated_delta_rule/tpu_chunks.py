"""What the TPU kernels of the gated delta rule know of a grid step and of its chunks."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import mosaic_chunks
from pallas_kernels.gated_delta_rule import tpu_triangular
from pallas_kernels.mosaic_chunks import Weights
from pallas_kernels.mosaic_tpu import LANES, NT, dot


@dataclasses.dataclass(frozen=True)
class Plan(Weights):
    """What is known when the kernels are built; heads are those of a grid step."""

    heads: int  # states
    keys: int  # divides `heads`
    queries: int  # divides `heads`, or is a multiple
    chunk: int  # tokens per chunk
    chunks: int  # per grid step
    scale: float
    packed: bool
    exact: bool  # float32

    # Of what a token adds to the state, `left` is left at the chunk's end; `write` is beta of it.
    @property
    def _groups(self):
        return ("beta", "read", "left", "write", "keep", "total", *["rest"] * self.exact, "first")

    def key(self, head):
        return head * self.keys // self.heads

    def queries_of(self, head):
        group = max(1, self.queries // self.heads)
        first = head * self.queries // self.heads
        return range(first, first + group)

    @property
    def pairs(self):
        """The queries and the keys that meet."""
        return sorted({(query, self.key(head))
                       for head in range(self.heads) for query in self.queries_of(head)})

    def pair(self, query, head):
        return self.pairs.index((query, self.key(head)))

    @property
    def outputs(self):
        return max(self.heads, self.queries)

    def output(self, query, head):
        return query if self.queries > self.heads else head

    # Rows of the array of their gradients.
    def gradient(self, name, head=0):
        return ("beta", "reaching", "write").index(name) * self.heads + head

    def gradients_of(self, name):
        return slice(self.gradient(name), self.gradient(name) + self.heads)

    @property
    def gradients(self):
        return 3 * self.heads


class Chunk(mosaic_chunks.Chunk):
    """With what its keys and queries are to each other, and gradients as their terms come."""

    def __init__(self, plan, index, rows_ref, scratch, dweights_ref=None):
        super().__init__(plan, index, rows_ref, scratch)
        self.dweights = None if dweights_ref is None else dweights_ref.at[0, index, 0]
        self.begun = set()

    def rows_of(self, name):
        at = self.plan.row(name)
        return self.rows[at:at + self.plan.heads]

    def measure(self):
        """The decays from token to token."""
        plan, C = self.plan, self.plan.chunk
        i, j = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
        visible = j <= i
        if plan.packed:
            self.make_column("first")
            visible &= j >= self.column("first", 0, C).astype(jnp.int32)
        self.scratch["visible"][...] = jnp.where(visible, 0.0, -jnp.inf)
        for head in range(plan.heads):
            yield
            for name in ("total", *["rest"] * plan.exact):
                self.make_column(name, head)
            difference = self.log_decay(head) + self.scratch["visible"][...]
            self.scratch["decay"][head] = jnp.exp(difference)

    def add(self, name, at, x):
        """To a sum in scratch, which the first of its terms begins."""
        ref = self.scratch[name]
        ref[at] = ref[at] + x if (name, at) in self.begun else x
        self.begun.add((name, at))

    def gradient(self, name, head):
        """Of a weight, as a row."""
        at = self.plan.gradient(name, head)
        return self.dweights.at[at:at + 1]

    def put(self, name, head, column):
        """The gradient of a weight, or a part of it, as a column."""
        at = self.plan.gradient(name, head)
        self.scratch["dcolumns"][:, at:at + 1] = column

    def multiply(self, q_ref, k_ref, K):
        """What the chunk's keys and queries are to each other."""
        for key in range(self.plan.keys):
            k = k_ref[self.at(key, K)]
            self.scratch["kk"][key] = dot(k, k, NT)
        for index, (query, key) in enumerate(self.plan.pairs):
            q, k = q_ref[self.at(query, K)], k_ref[self.at(key, K)]
            self.scratch["qk"][index] = self.plan.scale * dot(q, k, NT)

    def block_inverses(self, head):
        refs, beta = self.scratch, self.row("beta", head)
        kk, decay = refs["kk"].at[self.plan.key(head)], refs["decay"].at[head]
        return tpu_triangular.block_inverses(
            lambda rows: kk[rows] * decay[rows] * beta,
            refs["diagonal"].at[head], refs["lower"].at[head])

    def merge(self, head):
        refs = (self.scratch[name].at[head] for name in ("diagonal", "lower", "inverse"))
        return tpu_triangular.merge(*refs)


def scratch(plan, V, narrow, **per_chunk):
    """What waits in VMEM, by name: shapes and types."""
    C = plan.chunk
    keep = lambda number, rows, columns, dtype=jnp.float32: pltpu.VMEM(
        (plan.chunks, number, rows, columns), dtype)
    return dict(
        columns=keep(plan.rows, C, LANES),
        visible=pltpu.VMEM((plan.chunks, C, C), jnp.float32),
        decay=keep(plan.heads, C, C),
        kk=keep(plan.keys, C, C),
        qk=keep(len(plan.pairs), C, C),
        inverse=keep(plan.heads, C, C, narrow),
        written=keep(plan.heads, C, V, narrow),
        **tpu_triangular.scratch(plan.chunks, plan.heads, C, plan.exact),
        **{name: keep(*shape) for name, shape in per_chunk.items()},
    )
