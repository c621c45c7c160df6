"""Stick-breaking attention: from the newest key to the oldest, each takes part of what is left.

Scaling Stick-Breaking Attention (arXiv 2410.17980), section 2: with b_ts = sigmoid(q_t k_s /
sqrt(K)) for the keys s < t,

    o_t = sum_s b_ts prod_(s < r < t) (1 - b_tr) v_s.

It needs no positions. A token does not read itself. For decoding it keeps all keys and values.
"""

import jax

from hybridjax.mixers.attention import Attention
from pallas_kernels.stick_breaking_attention import stick_breaking_attention


class StickBreaking(Attention):
    def __init__(
        self,
        width: int,
        key: jax.Array,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        qk_norm: bool = True,
        gate: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__(
            width, key, heads=heads, head_dim=head_dim, kv_heads=kv_heads, qk_norm=qk_norm,
            gate=gate, eps=eps,
        )  # fmt: skip

    @staticmethod
    def kernel(q, k, v, *, window: None, **options) -> jax.Array:
        return stick_breaking_attention(q, k, v, **options)
