"""How fast a recurrent mixer starts out to forget."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def time_step_bias(key: jax.Array, heads: int) -> Float[Array, "H"]:
    """The bias whose softplus is log-uniform in [0.001, 0.1], as published code has it."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    step = jnp.exp(jax.random.uniform(key, heads, minval=low, maxval=high))
    return step + jnp.log(-jnp.expm1(-step))
