"""HypeNet from its equations, in NumPy and float64: one row, token by token, no shared code.

Hybrid Linear Attention Done Right (arXiv 2601.22156), sections 4 and A; the order of norms, gates
and scalings is that of the published code, whose names the weights have.
"""

import numpy as np

EPS = 1e-6


def logits(weights, sizes, tokens, logit_base=None):
    """`[T, vocab]` for `tokens [T]`; `sizes` is `named_weights.Sizes`."""
    w = {name.removesuffix(".weight"): np.asarray(x, np.float64) for name, x in weights.items()}
    h = w["model.embed_tokens"][tokens]
    for i, letter in enumerate(sizes.layers):
        layer = {n.split(".", 3)[3]: x for n, x in w.items() if n.startswith(f"model.layers.{i}.")}
        mixer = {n.removeprefix("self_attn."): x for n, x in layer.items()}
        x = norm(h, layer["input_layernorm"])
        h = h + (_lightning(x, mixer, sizes) if letter == "L" else
                 _attention(x, mixer, sizes, logit_base))  # fmt: skip
        x = norm(h, layer["post_attention_layernorm"])
        gate = x @ layer["mlp.gate_proj"].T
        h = h + (gate * sigmoid(gate) * (x @ layer["mlp.up_proj"].T)) @ layer["mlp.down_proj"].T
    head = w["model.embed_tokens"] if sizes.tied else w["lm_head"]
    return norm(h, w["model.norm"]) @ head.T


def _lightning(x, w, sizes):
    q, k = (norm(_heads(x @ w[f"{n}_proj"].T, sizes), w[f"{n}_norm"]) for n in "qk")
    q, k = rotate(q, sizes.theta), rotate(k, sizes.theta)
    v = _heads(x @ w["v_proj"].T, sizes)
    T, H, K = q.shape
    k, v = (np.repeat(y, H // y.shape[1], axis=1) for y in (k, v))
    decay = np.exp(-slopes(H))
    state, o = np.zeros((H, K, K)), np.zeros((T, H, K))
    for t in range(T):
        state = decay[:, None, None] * state + k[t, :, :, None] * v[t, :, None, :]
        o[t] = np.einsum("hk,hkv->hv", q[t], state) / np.sqrt(K)
    o = norm(o.reshape(T, -1), w["o_norm"]) * sigmoid(x @ w["z_proj"].T)
    return o @ w["o_proj"].T


def _attention(x, w, sizes, logit_base):
    q, k = (norm(_heads(x @ w[f"{n}_proj"].T, sizes), w[f"{n}_norm"]) for n in "qk")
    v = _heads(x @ w["v_proj"].T, sizes)
    T, H, K = q.shape
    if logit_base is not None:
        q = q * (np.log(np.arange(T) + logit_base) / np.log(logit_base))[:, None, None]
    o = np.zeros((T, H, K))
    for h in range(H):
        g = h * k.shape[1] // H
        for t in range(T):
            scores = k[: t + 1, g] @ q[t, h] / np.sqrt(K)
            p = np.exp(scores - scores.max())
            o[t, h] = p @ v[: t + 1, g] / p.sum()
    return (o.reshape(T, -1) * sigmoid(x @ w["o_gate"].T)) @ w["o_proj"].T


def slopes(heads):
    """ALiBi's: for a power of two geometric; others fill up from every second slope of double."""
    n = 2 ** int(np.log2(heads))
    rest = 2.0 ** (-8.0 * np.arange(1, 2 * n, 2) / (2 * n))
    return np.concatenate([2.0 ** (-8.0 * np.arange(1, n + 1) / n), rest[: heads - n]])


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weight


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rotate(x, theta):
    T, _, K = x.shape
    angle = np.arange(T)[:, None, None] * theta ** (-np.arange(K // 2) / (K // 2))
    a, b = x[..., : K // 2], x[..., K // 2 :]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def _heads(y, sizes):
    return y.reshape(y.shape[0], -1, sizes.head_dim)
