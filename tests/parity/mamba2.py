"""Mamba-2's layer in `transformers`, and our mixer with the same weights.

Published weights are [out, in]; the rows of its fused projection are those of (gate, x, B, C, dt),
and its convolution is one of (x, B, C).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hybridjax.mixers.mamba2 import Mamba2


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 24
    heads: int = 4
    head_dim: int = 12
    state_dim: int = 8
    groups: int = 2
    convolution: int = 4

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def shared(self) -> int:
        return self.groups * self.state_dim


def random_weights(sizes: Sizes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """For every parameter of the layer, exact in f16, in which the golden file stores them."""
    convolved = sizes.inner + 2 * sizes.shared
    matrix = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-1])
    weights = {
        "in_proj.weight": matrix(sizes.inner + convolved + sizes.heads, sizes.width),
        "conv1d.weight": matrix(convolved, 1, sizes.convolution),
        "conv1d.bias": rng.normal(size=convolved) / 2,
        "out_proj.weight": matrix(sizes.width, sizes.inner),
        "norm.weight": rng.uniform(0.5, 1.5, sizes.inner),
        "A_log": np.log(rng.uniform(1, 16, sizes.heads)),
        "D": rng.uniform(0.5, 1.5, sizes.heads),
        "dt_bias": rng.uniform(-6, 1, sizes.heads),
    }
    return {name: x.astype(np.float16).astype(np.float32) for name, x in weights.items()}


def layer_with(sizes: Sizes, weights: dict[str, np.ndarray]):
    """The layer of `transformers` with these weights, in the form that needs no kernels."""
    import torch
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=sizes.width,
        expand=sizes.inner // sizes.width,
        num_heads=sizes.heads,
        head_dim=sizes.head_dim,
        state_size=sizes.state_dim,
        n_groups=sizes.groups,
        conv_kernel=sizes.convolution,
        chunk_size=16,
    )
    layer = Mamba2Mixer(config, layer_idx=0)
    layer.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    layer = layer.float().eval()
    layer.forward = layer.torch_forward
    return layer


def mixer_with(sizes: Sizes, weights: dict[str, np.ndarray]) -> Mamba2:
    """Our mixer, whose parameters are exactly these weights."""
    options = dataclasses.asdict(sizes)
    mixer = Mamba2(options.pop("width"), jax.random.key(0), **options)
    inner, shared = sizes.inner, sizes.shared
    ends = np.cumsum([inner, inner, shared, shared])
    for name, rows in zip(
        ("gate", "value", "key", "query", "step"), np.split(weights["in_proj.weight"], ends)
    ):
        _fill(getattr(mixer, name).kernel, rows.T)
    cut = lambda x: np.split(x, [inner, inner + shared])
    filters, biases = cut(weights["conv1d.weight"][:, 0]), cut(weights["conv1d.bias"])
    for name, kernel, bias in zip(("value", "key", "query"), filters, biases):
        convolution = getattr(mixer, f"{name}_convolution")
        _fill(convolution.kernel, kernel)
        _fill(convolution.bias, bias)
    _fill(mixer.output.kernel, weights["out_proj.weight"].T)
    _fill(mixer.output_norm.scale, weights["norm.weight"])
    for ours, theirs in dict(A_log="A_log", dt_bias="dt_bias", skip="D").items():
        _fill(getattr(mixer, ours), weights[theirs])
    return mixer


def _fill(parameter, value):
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    parameter[...] = jnp.asarray(value)
