"""The chunk encoder of hierarchical sparse attention: from the stream to a memory of chunks.

Length Generalization in Hierarchical Sparse Attention Models (arXiv 2510.17196): at mid-depth every
whole chunk of C tokens is read by a small bidirectional Transformer with a learned token (CLS) at
its end. The output at CLS gives the chunk's landmark, by which it is found, and the outputs at its
tokens give the keys and values that are read once it is found. So what makes a chunk retrievable
and what it says need not share one vector. It adds nothing to the stream.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridjax.config import UserError
from hybridjax.layers.linear import Linear, place_heads, split_heads
from hybridjax.layers.mlp import SwiGLU
from hybridjax.layers.norm import RMSNorm
from hybridjax.layers.qkv import QKV
from hybridjax.mixers.base import Context, Mixer
from hybridjax.mixers.chunk_memory import ChunkMemory, ChunkState
from hybridjax.sharding import over_mesh, place, ways


class ChunkEncoder(Mixer):
    publishes = ("memory",)
    adds = False

    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        chunk_size: int,
        kv_heads: int,
        head_dim: int,
        landmark_dim: int,
        groups: int | None = None,
        landmark: str = "cls",
        encoder_layers: int = 1,
        encoder_heads: int = 8,
        hidden: int | None = None,
        theta: float = 10_000.0,
        key_norm: bool = True,
        landmark_norm: bool = False,
        state_dtype: str | None = None,
        eps: float = 1e-6,
    ):
        """Args:
        kv_heads, head_dim: of the keys and values in the memory.
        groups: landmarks per chunk, each `landmark_dim` wide, for as many groups of query heads;
            default: one per K/V head.
        landmark: "cls", or "mean" of the outputs at the chunk's tokens.
        encoder_layers: 0 reads the stream as it is, and needs landmark="mean".
        encoder_heads: of width / encoder_heads each.
        hidden: width of the encoder's MLP; default: 8/3 of the width, to a multiple of 64.
        state_dtype: of the keys and values that decoding keeps; default: the model's.
        """
        if landmark not in ("cls", "mean"):
            raise UserError(f"landmark is {landmark!r}: use 'cls' or 'mean'")
        if landmark == "cls" and not encoder_layers:
            raise UserError("landmark='cls' needs an encoder: set encoder_layers, or 'mean'")
        self.chunk_size, self.kv_heads, self.head_dim = chunk_size, kv_heads, head_dim
        self.groups, self.landmark_dim = groups or kv_heads, landmark_dim
        self.width, self.state_dtype = width, state_dtype
        keys = iter(jax.random.split(key, encoder_layers + 4))
        layer = lambda: EncoderLayer(
            width, next(keys), heads=encoder_heads, theta=theta, eps=eps,
            hidden=hidden or max(64, 8 * width // 3 // 64 * 64),
        )  # fmt: skip
        self.layers = nnx.List([layer() for _ in range(encoder_layers)])
        self.norm = RMSNorm(width, eps=eps) if encoder_layers else None
        cls = jax.random.normal(next(keys), (width,)) * 0.02
        self.cls = nnx.Param(cls, axes=("embed",)) if landmark == "cls" else None
        project = lambda size: Linear((width, size), ("embed", "heads"), next(keys))
        self.landmark = project(self.groups * landmark_dim)
        self.key, self.value = project(kv_heads * head_dim), project(kv_heads * head_dim)
        self.landmark_norm = RMSNorm(landmark_dim, eps=eps) if landmark_norm else None
        self.key_norm = RMSNorm(head_dim, eps=eps) if key_norm else None

    @property
    def align(self) -> int:
        return self.chunk_size

    def __call__(self, x: Float[Array, "B T D"], ctx: Context):
        if missing := -x.shape[1] % self.chunk_size:  # the last chunk is not whole: no one sees it
            x = jnp.pad(place(x, "batch", None, None), ((0, 0), (0, missing), (0, 0)))
        landmarks, keys, values = self.encode(x)
        flat = lambda y: y.reshape(y.shape[0], -1, *y.shape[3:])
        segments = place(ctx.segments, "batch", None)[:, :: self.chunk_size]
        start = place(jnp.zeros(x.shape[0], jnp.int32), "batch")
        memory = ChunkMemory(
            landmarks, flat(keys), flat(values), segments, start, self.chunk_size
        )
        return None, {"memory": memory}

    def init_state(self, batch: int, max_length: int, dtype: jnp.dtype) -> ChunkState:
        count = -(-max_length // self.chunk_size)
        return ChunkState.empty(
            batch, count, self.chunk_size, self.width, self.groups, self.landmark_dim,
            self.kv_heads, self.head_dim, dtype, jnp.dtype(self.state_dtype or dtype),
        )  # fmt: skip

    def extend(self, x: Float[Array, "B T D"], state: ChunkState, ctx: Context):
        start = state.length
        state = state.append(place(x, "batch", None, None), ctx, self.encode)
        return None, state, {"memory": state.memory(start)}

    def encode(
        self, x: Float[Array, "B N*C D"]
    ) -> tuple[Float[Array, "B N G R"], Float[Array, "B N C G K"], Float[Array, "B N C G V"]]:
        """Landmarks, keys and values of whole chunks, on every device of the context axis."""
        size = self.chunk_size
        if self.cls is not None:
            x, size = _append(x, place(self.cls[...], None).astype(x.dtype), size), size + 1
        for layer in self.layers:
            x = layer(x, size)
        if self.norm is not None:
            x = self.norm(x)
        tokens, summary = _split(x, size, cls=self.cls is not None)
        landmarks = split_heads(self.landmark(summary), self.landmark_dim)
        keys = split_heads(self.key(tokens), self.head_dim)
        values = split_heads(self.value(tokens), self.head_dim)
        if self.landmark_norm is not None:
            landmarks = self.landmark_norm(landmarks)
        if self.key_norm is not None:
            keys = self.key_norm(keys)
        chunks = lambda y: place_heads(y).reshape(y.shape[0], -1, self.chunk_size, *y.shape[2:])
        return place_heads(landmarks), chunks(keys), chunks(values)


class EncoderLayer(nnx.Module):
    """A Transformer layer that sees all of a chunk and nothing else; positions from 0 in it."""

    def __init__(
        self, width: int, key: jax.Array, *, heads: int, hidden: int, theta: float, eps: float
    ):
        if width % heads:
            raise UserError(f"encoder_heads is {heads}: it must divide the width {width}")
        keys = jax.random.split(key, 3)
        self.qkv = QKV(
            width, keys[0], heads=heads, kv_heads=heads, head_dim=width // heads,
            rope=True, theta=theta, norm=True, eps=eps,
        )  # fmt: skip
        self.output = Linear((width, width), ("heads", "embed"), keys[1])
        self.mlp = SwiGLU(width, keys[2], hidden=hidden)
        self.attention_norm, self.mlp_norm = RMSNorm(width, eps=eps), RMSNorm(width, eps=eps)

    def __call__(self, x: Float[Array, "B N*C D"], size: int) -> Float[Array, "B N*C D"]:
        """`size`: tokens per chunk, C."""
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]) % size, x.shape[:2])
        q, k, v = self.qkv(self.attention_norm(x), place(positions, "batch", "length"))
        axes = ("batch", _rows(x, size), "heads", None)

        def attend(q, k, v):
            q, k, v = (y.reshape(y.shape[0], -1, size, *y.shape[2:]) for y in (q, k, v))
            logits = jnp.einsum("bnihd,bnjhd->bnhij", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5)
            o = jnp.einsum("bnhij,bnjhd->bnihd", weights.astype(v.dtype), v)
            return o.reshape(o.shape[0], -1, *o.shape[3:])

        o = over_mesh(attend, (axes,) * 3, (axes, q.shape))(q, k, v)
        x = x + self.output(o.reshape(*x.shape[:2], -1))
        return x + self.mlp(self.mlp_norm(x))


def _append(x: Float[Array, "B N*C D"], cls: Float[Array, " D"], size: int) -> Array:
    """Each chunk with one more token, the learned one, at its end."""
    axes = ("batch", _rows(x, size), None)

    def append(x, cls):
        chunks = x.reshape(x.shape[0], -1, size, x.shape[2])
        chunks = jnp.pad(chunks, ((0, 0), (0, 0), (0, 1), (0, 0))).at[:, :, size].set(cls)
        return chunks.reshape(x.shape[0], -1, x.shape[2])

    shape = (x.shape[0], x.shape[1] // size * (size + 1), x.shape[2])
    return over_mesh(append, (axes, (None,)), (axes, shape))(x, cls)


def _split(x: Float[Array, "B N*C D"], size: int, *, cls: bool) -> tuple[Array, Array]:
    """The chunks' tokens `[B, N C, D]` and one vector for each chunk `[B, N, D]`: its last token,
    which is then not among the others, or the mean."""
    batch, length, width = x.shape
    rows, count = _rows(x, size), length // size
    axes = ("batch", rows, None)

    def split(x):
        chunks = x.reshape(x.shape[0], -1, size, width)
        tokens = chunks[:, :, : size - cls]
        summary = chunks[:, :, -1] if cls else jnp.mean(tokens, axis=2)
        return tokens.reshape(x.shape[0], -1, width), summary

    shapes = (batch, count * (size - cls), width), (batch, count, width)
    return over_mesh(split, (axes,), tuple((axes, shape) for shape in shapes))(x)


def _rows(x: Float[Array, "B N*C D"], size: int) -> str | None:
    """The logical axis along which rows of chunks can be cut without cutting a chunk."""
    return "length" if x.shape[1] % (size * ways("length")) == 0 else None
