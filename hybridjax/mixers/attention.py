"""Softmax attention: full or sliding-window, rotary or position-free, grouped or not.

HypeNet's layers are position-free, with log-scaled logits at inference (arXiv 2601.22156, eq. 11):
queries are multiplied by ln(t + a) / ln(a), t from 0 in each document. With `rope=True` and
`gate=False` this is Qwen3's layer; with half of each head rotated in interleaved pairs, biases and
no norms it is GLM-4's.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.layers.linear import repeat_heads
from hybridjax.layers.qkv import QKV, GatedOutput
from hybridjax.mixers.base import Context, Mixer, new_length, place_state, state, state_field
from hybridjax.sharding import context_axis, over_mesh, place, ways
from pallas_kernels.attention import attention

_ROWS = ("batch", "length")  # split over context
_PIECE = ("batch", None)  # whole: a piece of a prompt, a window
_HEADS = ("heads", None)


@state
class KeyValueCache:
    """All keys and values: `2 B S G K` elements, S = max_length; the slots split over context.

    Where there are more devices along tensor than K/V heads, G counts them as repeated.
    """

    keys: Float[Array, "B S G K"] = state_field(*_ROWS, *_HEADS)
    values: Float[Array, "B S G K"] = state_field(*_ROWS, *_HEADS)
    length: Int[Array, " B"] = state_field("batch")

    def append(self, k: Array, v: Array, ctx: Context) -> "KeyValueCache":
        """Writes the real tokens of k, v `[B, T, G, K]` behind each row's last."""
        index = self.length[:, None] + jnp.arange(k.shape[1])
        index = jnp.where(ctx.segments > 0, index, self.keys.shape[1])  # padding: out of range

        axis, axes = context_axis(self.keys.shape[1]), (*_ROWS, *_HEADS)

        def write(cache, new, index):
            slots = cache.shape[1]
            if axis is not None:  # each device writes what falls into its part
                index -= slots * jax.lax.axis_index(axis)
                index = jnp.where(index < 0, slots, index)  # negative ones would count from behind
            rows = jnp.arange(new.shape[0])[:, None]
            return cache.at[rows, index].set(new.astype(cache.dtype), mode="drop")

        in_axes = (axes, (*_PIECE, *_HEADS), _PIECE)
        write = over_mesh(write, in_axes, (axes, self.keys.shape))
        keys, values = write(self.keys, k, index), write(self.values, v, index)
        return KeyValueCache(keys, values, new_length(self.length, ctx))


@state
class WindowCache:
    """The last `window` keys and values, newest at the end: `2 B window G K` elements."""

    keys: Float[Array, "B W G K"] = state_field(*_PIECE, *_HEADS)
    values: Float[Array, "B W G K"] = state_field(*_PIECE, *_HEADS)
    length: Int[Array, " B"] = state_field("batch")

    def index(self) -> Int[Array, "B W"]:
        """The position of the token in each slot; negative where there is none yet."""
        window = self.keys.shape[1]
        return self.length[:, None] + jnp.arange(-window, 0)

    def shift(self, keys: Array, values: Array, ctx: Context) -> "WindowCache":
        """Keeps the newest real tokens of keys, values `[B, window + T, G, K]`."""
        length = new_length(self.length, ctx)
        window = self.keys.shape[1]
        newest = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, window))
        axes = (*_PIECE, *_HEADS)
        newest = over_mesh(newest, (axes, ("batch",)), (axes, self.keys.shape))
        keep = lambda x: newest(x, length - self.length)
        return WindowCache(keep(keys), keep(values), length)


class Attention(Mixer):
    kernel = staticmethod(attention)  # how queries read keys and values

    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        rope: bool = False,
        theta: float = 10_000.0,
        rope_dim: int | None = None,
        rope_interleaved: bool = False,
        rope_scaling: Mapping[str, Any] | None = None,
        window: int | None = None,
        qk_norm: bool = True,
        qkv_bias: bool = False,
        gate: bool = True,
        eps: float = 1e-6,
    ):
        """Args:
        rope_dim: how many of a head's dimensions, the first ones, are rotated; None: all.
        rope_interleaved: rotated are the pairs (x_2i, x_2i+1), not (x_i, x_i+rope_dim/2).
        rope_scaling: as in Hugging Face's configs; `rope_type` is one of `position.SCALINGS`.
        window: the number of keys a query sees, its own included; None: all before it.
        """
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.window = window
        qkv_key, output_key = jax.random.split(key)
        self.qkv = QKV(
            width, qkv_key, heads=heads, kv_heads=self.kv_heads, head_dim=head_dim,
            rope=rope, theta=theta, rope_dim=rope_dim, rope_interleaved=rope_interleaved,
            rope_scaling=rope_scaling, norm=qk_norm, bias=qkv_bias, eps=eps,
        )  # fmt: skip
        self.output = GatedOutput(heads * head_dim, width, output_key, gate=gate)

    @property
    def reach(self) -> int | None:
        return None if self.window is None else self.window - 1

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, window: Int[Array, ""] | None = None
    ) -> Float[Array, "B T D"]:
        """`window`, where given, is the layer's window as traced data (a searched pattern)."""
        q, k, v = self._heads(x, ctx)
        segments = dict(q_segments=ctx.segments, k_segments=ctx.segments)
        return self.output(self._attend(q, k, v, window, _ROWS, _ROWS, **segments), x)

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype):
        slots = max_length if self.window is None else self.window
        heads = self.kv_heads * self._kv_repeats()
        buffer = jnp.zeros((batch, slots, heads, self.head_dim), dtype)
        kind = KeyValueCache if self.window is None else WindowCache
        return place_state(kind(buffer, buffer, jnp.zeros(batch, jnp.int32)))

    def extend(self, x: Float[Array, "B T D"], state, ctx: Context):
        q, k, v = (place(y, *_PIECE, *_HEADS) for y in self._heads(x, ctx))
        q_index = state.length[:, None] + jnp.arange(x.shape[1])
        if self.window is None:
            state = state.append(k, v, ctx)
            slots = jnp.arange(state.keys.shape[1])
            k_index = jnp.broadcast_to(slots, (x.shape[0], slots.size))
            index = dict(q_index=q_index, k_index=k_index)
            o = self._attend(q, state.keys, state.values, None, _PIECE, _ROWS, **index)
            return self.output(o, x), state
        keys = jnp.concatenate([state.keys, k.astype(state.keys.dtype)], axis=1)
        values = jnp.concatenate([state.values, v.astype(state.values.dtype)], axis=1)
        k_index = jnp.concatenate([state.index(), q_index], axis=1)
        seen = (k_index >= 0).astype(jnp.int32)
        o = self._attend(
            q, keys, values, None, _PIECE, _PIECE,
            q_index=q_index, k_index=k_index, q_segments=jnp.ones_like(q_index), k_segments=seen,
        )  # fmt: skip
        return self.output(o, x), state.shift(keys, values, ctx)

    def _heads(self, x: Float[Array, "B T D"], ctx: Context) -> tuple[Array, Array, Array]:
        """Queries `[B, T, H, K]` and keys, values `[B, T, G, K]`, as they meet in the softmax."""
        q, k, v = self.qkv(x, ctx.positions)
        k, v = (repeat_heads(x, self._kv_repeats()) for x in (k, v))
        if ctx.logit_base is not None:
            scale = jnp.log(ctx.positions + ctx.logit_base) / jnp.log(ctx.logit_base)
            q = (q * scale[:, :, None, None]).astype(q.dtype)
        return q, k, v

    def _attend(self, q, k, v, window, q_axes, k_axes, **places) -> Float[Array, "B T HK"]:
        """`q_axes`, `k_axes`: the logical axes of queries' and of keys' batch and tokens."""
        window = self.window if window is None else window
        names = list(places)
        axis = context_axis(k.shape[1]) if k_axes == _ROWS else None
        exchange = "merge" if axis and q_axes == _PIECE else None

        def kernel(q, k, v, window, *arrays):
            return self.kernel(
                q, k, v, window=window, context_axis=axis, exchange=exchange,
                **dict(zip(names, arrays, strict=True)),
            )  # fmt: skip

        in_heads = ((*q_axes, *_HEADS), *2 * ((*k_axes, *_HEADS),))
        in_places = tuple(q_axes if name.startswith("q_") else k_axes for name in names)
        if window is None or isinstance(window, int):  # static: kernels may specialise on it
            f = lambda q, k, v, *arrays: kernel(q, k, v, window, *arrays)
            arguments, in_axes = (q, k, v), in_heads
        else:
            f, arguments, in_axes = kernel, (q, k, v, window), (*in_heads, ())
        f = over_mesh(f, (*in_axes, *in_places), (in_heads[0], q.shape))
        o = f(*arguments, *places.values())
        return o.reshape(*q.shape[:2], -1)

    def _kv_repeats(self) -> int:
        """How often each K/V head is repeated so that every device has those its queries read."""
        devices = ways("heads")
        if self.heads % devices:
            return 1  # query heads are replicated, and so are K/V heads
        return math.lcm(self.kv_heads, devices) // self.kv_heads
