"""The stack: plan, block, decoder; and the words of a config's legend."""

from hybridjax.layers.mlp import mlp
from hybridjax.mixers import mixer
from hybridjax.models.block import block

__all__ = ["block", "mixer", "mlp"]
