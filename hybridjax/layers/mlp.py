"""Feed-forward layers, and the registry by which a config names them."""

import jax
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from hybridjax.config import spec
from hybridjax.layers.linear import Linear

MLPS = {"swiglu": "hybridjax.layers.mlp:SwiGLU"}


def mlp(type: str, **options) -> ConfigDict:
    """The spec of an MLP for a config's legend: `mlp("swiglu", hidden=3072)`."""
    return spec(type, MLPS, **options)


class SwiGLU(nnx.Module):
    """`(silu(x W_gate) * x W_up) W_down` (arXiv 2002.05202, eq. 6)."""

    def __init__(self, width: int, key: jax.Array, *, hidden: int):
        keys = jax.random.split(key, 3)
        self.gate = Linear((width, hidden), ("embed", "mlp"), keys[0])
        self.up = Linear((width, hidden), ("embed", "mlp"), keys[1])
        self.output = Linear((hidden, width), ("mlp", "embed"), keys[2])

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.output(jax.nn.silu(self.gate(x)) * self.up(x))
