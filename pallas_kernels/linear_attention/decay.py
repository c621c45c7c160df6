"""Fixed decays per head. The log decay of a head is minus its slope."""

import numpy as np
from jaxtyping import Float


def alibi_slopes(heads: int) -> Float[np.ndarray, "H"]:
    """`2 ** (-8 (h + 1) / H)` for a power of two (ALiBi, https://arxiv.org/abs/2108.12409, §3).

    Other head counts take the slopes of the next lower power of two and then every second slope of
    its double, as the ALiBi authors' code does.
    """
    lower = 2 ** (heads.bit_length() - 1)
    slopes = _geometric(lower)
    if lower < heads:
        slopes = np.concatenate([slopes, _geometric(2 * lower)[::2][: heads - lower]])
    return slopes


def _geometric(heads: int) -> Float[np.ndarray, "H"]:
    return 2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)
