"""Qwen3-Next's linear layer in `transformers`, and our mixer with the same weights.

Published weights are [out, in]; its two fused projections hold, for each key head in turn, that
head's rows of (query, key, values, gates) and of (beta, decay).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hybridjax.mixers.gated_deltanet import GatedDeltaNet


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 24
    heads: int = 2
    value_heads: int = 4
    head_dim: int = 16
    value_dim: int = 8
    convolution: int = 4


def random_weights(sizes: Sizes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """For every parameter of the layer, exact in f16, in which the golden file stores them."""
    inner, values = sizes.heads * sizes.head_dim, sizes.value_heads * sizes.value_dim
    matrix = lambda *shape: rng.normal(size=shape) / np.sqrt(shape[-1])
    weights = {
        "in_proj_qkvz.weight": matrix(2 * inner + 2 * values, sizes.width),
        "in_proj_ba.weight": matrix(2 * sizes.value_heads, sizes.width),
        "conv1d.weight": matrix(2 * inner + values, 1, sizes.convolution),
        "out_proj.weight": matrix(sizes.width, values),
        "norm.weight": rng.uniform(0.5, 1.5, sizes.value_dim),
        "A_log": np.log(rng.uniform(0.1, 16, sizes.value_heads)),
        "dt_bias": rng.uniform(-6, 1, sizes.value_heads),
    }
    return {name: x.astype(np.float16).astype(np.float32) for name, x in weights.items()}


def layer_with(sizes: Sizes, weights: dict[str, np.ndarray]):
    """The layer of `transformers` with these weights."""
    import torch
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=sizes.width,
        linear_num_key_heads=sizes.heads,
        linear_num_value_heads=sizes.value_heads,
        linear_key_head_dim=sizes.head_dim,
        linear_value_head_dim=sizes.value_dim,
        linear_conv_kernel_dim=sizes.convolution,
    )
    layer = Qwen3NextGatedDeltaNet(config, layer_idx=0)
    layer.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    return layer.float().eval()


def mixer_with(sizes: Sizes, weights: dict[str, np.ndarray]) -> GatedDeltaNet:
    """Our mixer, whose parameters are exactly these weights."""
    options = dataclasses.asdict(sizes)
    mixer = GatedDeltaNet(options.pop("width"), jax.random.key(0), **options)
    K, V, group = sizes.head_dim, sizes.value_dim, sizes.value_heads // sizes.heads
    fused = weights["in_proj_qkvz.weight"].reshape(sizes.heads, -1, sizes.width)
    q, k, v, z = np.split(fused, np.cumsum([K, K, group * V]), axis=1)
    gates = weights["in_proj_ba.weight"].reshape(sizes.heads, 2 * group, sizes.width)
    beta, decay = np.split(gates, 2, axis=1)
    linear = {"query": q, "key": k, "value": v, "gate": z, "beta": beta, "decay": decay}
    for name, value in linear.items():
        _fill(getattr(mixer, name).kernel, value.reshape(-1, sizes.width).T)
    _fill(mixer.output.kernel, weights["out_proj.weight"].T)
    inner = sizes.heads * K
    filters = np.split(weights["conv1d.weight"][:, 0], [inner, 2 * inner])
    for name, value in zip(("query", "key", "value"), filters):
        _fill(getattr(mixer, f"{name}_convolution").kernel, value)
    _fill(mixer.output_norm.scale, weights["norm.weight"])
    _fill(mixer.A_log, weights["A_log"])
    _fill(mixer.dt_bias, weights["dt_bias"])
    return mixer


def _fill(parameter, value):
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    parameter[...] = jnp.asarray(value)


def rule_arrays(rng: np.random.Generator, T: int) -> dict[str, np.ndarray]:
    """Arguments of the rule, in the layout that it shares with `transformers`."""
    B, H, K, V = 2, 2, 16, 8
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return dict(
        q=normal(B, T, H, K),
        k=normal(B, T, H, K),
        v=normal(B, T, H, V),
        beta=rng.uniform(0, 1, (B, T, H)).astype(np.float32),
        decay=-np.exp(normal(B, T, H)),
        initial_state=normal(B, H, K, V),
    )


def their_rule(form: str, q, k, v, beta, decay, initial_state):
    """`torch_{form}_gated_delta_rule`, form "chunk" or "recurrent"; tensors in and out."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    rule = getattr(modeling_qwen3_next, f"torch_{form}_gated_delta_rule")
    return rule(q, k, v, decay, beta, initial_state=initial_state, output_final_state=True,
                use_qk_l2norm_in_kernel=True)  # fmt: skip
