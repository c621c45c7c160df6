"""Hybrids of Gated DeltaNet and softmax attention.

Paper: Gated Delta Networks: Improving Mamba2 with Delta Rule (arXiv 2412.06464); as in Qwen3-Next,
three recurrent layers stand before each layer of attention.

    python -m hybridjax.train --config=configs/gdn.py                  # tiny

`tiny` is hypenet's task and size, with Gated DeltaNet for Lightning; it trains on bytes that ship
with the package, in minutes on a laptop. `qwen3-next-shape` has the layers of Qwen3-Next-80B-A3B;
its vocabulary needs a tokenizer: `--config.data.tokenizer=PATH` and a corpus in
`--config.data.sources`. In three ways it is not that model: a dense MLP, as wide as the experts
that a token visits (ten and the shared one, 512 each), stands for the mixture; rotary positions
turn all of a head, not its first quarter; and norms are not centred on zero.
"""

from ml_collections import ConfigDict

from configs import hypenet
from hybridjax.config import choose
from hybridjax.models import block, mixer, mlp


def get_config(arg: str | None = None) -> ConfigDict:
    return choose(arg, PRESETS)


def tiny() -> ConfigDict:
    config = hypenet.tiny("GA")
    config.name = "gdn"
    blocks = config.model.blocks
    blocks.G = block(mixer("gated_deltanet", heads=4, head_dim=32), mlp=blocks.L.mlp)
    del blocks["L"]
    return config


def qwen3_next_shape() -> ConfigDict:
    linear = mixer("gated_deltanet", heads=16, head_dim=128, value_heads=32)
    full = mixer("attention", heads=16, head_dim=256, kv_heads=2, rope=True, theta=1e7)
    ffn = mlp("swiglu", hidden=11 * 512)
    return hypenet.pretraining(
        "gdn",
        layers="GGGA" * 12,
        blocks=dict(G=block(linear, mlp=ffn), A=block(full, mlp=ffn)),
        width=2048,
        vocab=151936,
    )


PRESETS = {"tiny": tiny, "qwen3-next-shape": qwen3_next_shape}
