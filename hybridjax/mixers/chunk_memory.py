"""The memory of a row's past chunks: what a chunk encoder publishes, and what decoding keeps."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax import host_memory
from hybridjax.mixers.base import Context, new_length, place_state, state, state_field
from hybridjax.mixers.host_chunks import (
    CHUNKS,
    ON_HOST,
    RECENT,
    RECENT_CHUNKS,
    HostChunks,
    for_host,
    host_shape,
)
from hybridjax.sharding import context_axis, over_mesh, place

_LANDMARKS = ("batch", "length", "heads", None)
_PENDING = ("batch", None, None)
Encode = Callable[[Array], tuple[Array, Array, Array]]  # chunks -> landmarks, keys, values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkMemory:
    """Landmarks, keys and values of N chunks of C tokens; token t of the row sees chunk n of its
    own document once that is whole, which is where t >= (n + 1) C.

    Over the context axis the memory of a row that is read whole lies on every device, and that of a
    state in parts, as many chunks on each device, where they divide it.
    """

    landmarks: Float[Array, "B N G R"]
    keys: Float[Array, "B N*C G K"] | None  # None: they are on the host
    values: Float[Array, "B N*C G V"] | None
    segments: Int[Array, "B N"]  # the document of each chunk; 0: there is none
    start: Int[Array, " B"]  # tokens of the row before the queries
    chunk_size: int = dataclasses.field(metadata={"static": True})
    on_host: HostChunks | None = None


@state
class ChunkState:
    """`B (C D + N (G R + C G (K + V)))` elements, N = max_length / C, at the publisher alone; the N
    chunks split over context.

    With the chunks on the host the device has `B (C D + N G R + M C G (K + V))`: the last M of them
    are there too, chunk n in slot n % M, on every device. Else M is 0. On the host keys and values
    are as in `HostChunks`.
    """

    pending: Float[Array, "B C D"] = state_field(*_PENDING)  # the unfinished chunk, then zeros
    landmarks: Float[Array, "B N G R"] = state_field(*_LANDMARKS)
    keys: Float[Array, "B N C G K"] = state_field(*CHUNKS, placement="host")
    values: Float[Array, "B N C G V"] = state_field(*CHUNKS, placement="host")
    recent_keys: Float[Array, "B M C G K"] = state_field(*RECENT_CHUNKS)
    recent_values: Float[Array, "B M C G V"] = state_field(*RECENT_CHUNKS)
    length: Int[Array, " B"] = state_field("batch")

    @classmethod
    def empty(
        cls, batch: int, count: int, size: int, width: int, groups: int, landmark_dim: int,
        kv_heads: int, head_dim: int, dtype: jnp.dtype, kv_dtype: jnp.dtype,
    ) -> "ChunkState":  # fmt: skip
        zeros = lambda *shape, dtype=dtype: jnp.zeros((batch, *shape), dtype)
        heads = lambda count: (zeros(count, size, kv_heads, head_dim, dtype=kv_dtype),) * 2
        landmarks, length = zeros(count, groups, landmark_dim), jnp.zeros(batch, jnp.int32)
        return place_state(cls(zeros(size, width), landmarks, *heads(count), *heads(0), length))

    def with_chunks_on_host(self) -> "ChunkState":
        """This state, before the first token, with the chunks in the host's memory."""
        (batch, count, *chunk), dtype = self.keys.shape, self.keys.dtype
        recent = jnp.zeros((batch, min(count, RECENT), *chunk), dtype)
        state = dataclasses.replace(self, recent_keys=recent, recent_values=recent)
        blank = place(jnp.zeros(host_shape(batch, count, *chunk), dtype), *ON_HOST)
        blank = host_memory.to_host(blank)
        return dataclasses.replace(place_state(state), keys=blank, values=blank)

    def append(self, x: Float[Array, "B T D"], ctx: Context, encode: Encode) -> "ChunkState":
        """Takes the real tokens of x in, and encodes the chunks that they complete."""
        size, length = self.pending.shape[1], new_length(self.length, ctx)
        first, end = self.length // size, length // size
        line = self._line(jnp.where(ctx.segments[..., None] > 0, x, 0))
        count = line.shape[1] // size - 1  # more cannot become whole
        chunks = line[:, : count * size]
        shapes = jax.eval_shape(encode, chunks)
        blank = lambda _: tuple(
            place(jnp.zeros(s.shape, s.dtype), *_whole(_axes(s.ndim))) for s in shapes
        )
        new = jax.lax.cond(jnp.any(end > first), encode, blank, chunks)
        index = first[:, None] + jnp.arange(count)
        index = jnp.where(index < end[:, None], index, self.landmarks.shape[1])  # out of range
        kept = (self.landmarks, self.keys, self.values)
        caches = [_write(c, n, index, _axes(c.ndim)) for c, n in zip(kept, new, strict=True)]
        if (recent := self.recent_keys.shape[1]) > 0:
            last = (index >= end[:, None] - recent) & (index < end[:, None])
            index = jnp.where(last, index % recent, recent)
            kept = (self.recent_keys, self.recent_values)
            caches += [
                _write(c, n, index, RECENT_CHUNKS) for c, n in zip(kept, new[1:], strict=True)
            ]
        else:
            caches += [self.recent_keys, self.recent_values]
        newest = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))
        newest = over_mesh(newest, (_PENDING, ("batch",)), (_PENDING, self.pending.shape))
        return ChunkState(newest(line, (end - first) * size), *caches, length)

    def rewound(self, before: "ChunkState") -> "ChunkState":
        """The earlier state again, in these buffers: chunks beyond its length are not seen."""
        large = dict(landmarks=self.landmarks, keys=self.keys, values=self.values)
        return dataclasses.replace(before, **large)

    def memory(self, start: Int[Array, " B"]) -> ChunkMemory:
        """What queries from token `start` on read."""
        count, size = self.landmarks.shape[1], self.pending.shape[1]
        flat = lambda x: x.reshape(x.shape[0], count * size, *x.shape[3:])
        whole = self.length // size
        segments = (jnp.arange(count) < whole[:, None]).astype(jnp.int32)
        if host_memory.is_on_host(self.keys):
            recent = self.recent_keys, self.recent_values
            chunks = HostChunks(self.keys, self.values, *recent, whole)
            return ChunkMemory(self.landmarks, None, None, segments, start, size, chunks)
        keys, values = flat(self.keys), flat(self.values)
        return ChunkMemory(self.landmarks, keys, values, segments, start, size)

    def _line(self, x: Float[Array, "B T D"]) -> Float[Array, "B M*C D"]:
        """The pending tokens and x behind them, then zeros, to one chunk more than they fill."""
        size = self.pending.shape[1]
        chunks = -(-x.shape[1] // size) + 1

        def join(pending, x, filled):
            line = jnp.pad(pending, ((0, 0), (0, (chunks - 1) * size), (0, 0)))
            put = lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0)
            return jax.vmap(put)(line, x.astype(line.dtype), filled)

        shape = (x.shape[0], chunks * size, x.shape[2])
        join = over_mesh(join, (_PENDING, _PENDING, ("batch",)), (_PENDING, shape))
        return join(self.pending, x, self.length % size)


def _axes(ndim: int) -> tuple[str | None, ...]:
    return _LANDMARKS if ndim == 4 else CHUNKS


def _whole(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The same of chunks that are on every device of the context axis, as new ones are."""
    return axes[0], None, *axes[2:]


def _write(cache: Array, new: Array, index: Int[Array, "B M"], axes: tuple) -> Array:
    """The cache with the new chunks in their slots, those out of range left out."""
    axis, on_host = context_axis(cache.shape[1]) if axes[1] else None, host_memory.is_on_host(cache)

    def write(cache, new, index):
        slots = cache.shape[1]
        if axis is not None:  # each device writes what falls into its part
            index -= slots * jax.lax.axis_index(axis)
            index = jnp.where(index < 0, slots, index)  # negative ones would count from behind
        if on_host:
            return host_memory.write(cache, for_host(new), index)
        rows = jnp.arange(cache.shape[0])[:, None]
        return cache.at[rows, index].set(new.astype(cache.dtype), mode="drop")

    lies = ON_HOST if on_host else axes
    write = over_mesh(write, (lies, _whole(axes), ("batch", None)), (lies, cache.shape))
    return write(cache, new, index)
