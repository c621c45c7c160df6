"""Shapes of linear attention in published models, by name."""

from typing import NamedTuple


class Shape(NamedTuple):
    H: int
    K: int
    V: int
    decay: str = "heads"  # a constant per "heads", or one per "token" and head
    T: int = 4096  # tokens of a training row


SHAPES = {
    # HypeNet (https://arxiv.org/abs/2601.22156): Lightning layers in Qwen3's bodies.
    "hypenet-2b": Shape(H=16, K=128, V=128),
    "hypenet-5b": Shape(H=32, K=128, V=128),
    "hypenet-9b": Shape(H=32, K=128, V=128, T=32768),
    # MiniCPM-SALA: 24 Lightning layers, 32 heads each.
    "minicpm-sala": Shape(H=32, K=128, V=128, T=8192),
    # MiniMax-01 (https://arxiv.org/abs/2501.08313): seven of eight layers.
    "minimax-01": Shape(H=64, K=128, V=128, T=8192),
    # Mamba-2 2.7B (https://arxiv.org/abs/2405.21060): 80 heads of 64, state 128, a decay per token.
    "mamba2-2.7b": Shape(H=80, K=128, V=64, decay="token"),
    # The smallest configuration of this repository.
    "tiny": Shape(H=4, K=32, V=32, T=512),
}
