"""A layer of `transformers` and our mixer with its weights, in f32 on the CPU."""

import jax
import numpy as np

from hybridjax.mixers.base import Context


def check_outputs(theirs, ours, x):
    import torch

    y = jax.jit(type(ours).__call__)(ours, x, Context.of_rows(x[..., 0]))
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    np.testing.assert_allclose(y, expected, atol=1e-4, rtol=1e-4)


def check_gradients(theirs, ours, x, mixer_with, atol):
    """By the inputs, and by every weight: mapped from theirs as the weights themselves are."""
    import torch

    @jax.jit
    def gradient(mixer, x):
        loss = lambda mixer, x: (mixer(x, Context.of_rows(x[..., 0])) ** 2).sum()
        return jax.grad(loss, argnums=(0, 1))(mixer, x)

    actual, actual_x = gradient(ours, x)
    their_x = torch.tensor(x, requires_grad=True)
    (theirs(their_x) ** 2).sum().backward()
    grads = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-3)
    close(actual_x, their_x.grad)
    jax.tree.map(close, actual, mixer_with(grads))
