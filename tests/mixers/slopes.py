"""Gradients against the slopes of a NumPy float64 oracle."""

import jax
import numpy as np

STEP = 1e-6


def check_gradients(rng, value, mixers, x, gradients):
    """Each leaf in a random direction, and the input.

    `value(mixers, x)`: the oracle's loss; `gradients`: of the mixers and of x.
    """
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), mixers)
    of_mixers, of_x = gradients
    for path, leaf in [*jax.tree_util.tree_leaves_with_path(of_mixers), ("x", of_x)]:
        direction = rng.normal(size=leaf.shape)

        def shifted(step):
            if path == "x":
                return value(exact, x + step * direction)
            add = lambda p, w: w + step * direction if p == path else w
            return value(jax.tree_util.tree_map_with_path(add, exact), x)

        slope = (shifted(STEP) - shifted(-STEP)) / (2 * STEP)
        found = np.sum(np.asarray(leaf, np.float64) * direction)
        np.testing.assert_allclose(found, slope, rtol=2e-3, atol=2e-3, err_msg=str(path))
