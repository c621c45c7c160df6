"""Writes the golden files: weights, tokens and logits as published code makes them.

    python tests/parity/make_golden.py --hypenet=PATH/hybrid-linear-attention

Qwen3, Llama, GLM-4 and the layers of Qwen3-Next and Mamba-2 are those of `transformers`. HypeNet is
the authors' code (thunlp/hybrid-linear-attention), run from a clone on the CPU: its two kernels are
replaced by the recurrence they stand for, and its cast of scaled queries to bfloat16 is undone.
Both need the `parity` extra and einops.
"""

import argparse
import json
import pathlib
import sys
import types

import mamba2
import numpy as np
import qwen3_next
from named_weights import Sizes, random_weights
from published import GOLDEN, published

HERE = pathlib.Path(__file__).parent
QWEN3 = Sizes("QQ", tied=False)
HYPENET = Sizes("LALL", heads=6, kv_heads=2, head_dim=8)
LOGIT_BASE = 20  # small, to be felt in a short sequence
LENGTH = 80
NEW = 12  # tokens written after these


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hypenet", type=pathlib.Path, help="a clone of the authors' repository")
    clone = parser.parse_args().hypenet
    rng = np.random.default_rng(0)
    write("qwen3", QWEN3, rng, lambda weights: {"": qwen3_with(QWEN3, weights)})
    write_qwen3_next(np.random.default_rng(0))
    write_mamba2(np.random.default_rng(0))
    for name in GOLDEN:
        write_published(name, np.random.default_rng(0))
    if clone:
        package = clone / "halo/modeling/hypenet"
        write(
            "hypenet", HYPENET, rng,
            lambda weights: {
                "": hypenet_with(package, HYPENET, weights, None),
                "_scaled": hypenet_with(package, HYPENET, weights, f"hype {LOGIT_BASE}"),
            },
        )  # fmt: skip


def write(name, sizes, rng, models):
    import torch

    weights = random_weights(sizes.model(), rng)
    tokens = rng.integers(0, sizes.vocab, (1, LENGTH))
    logits = {}
    with torch.no_grad():
        for suffix, model in models(weights).items():
            logits[f"logits{suffix}"] = model(torch.tensor(tokens)).logits.numpy()
    halves = {name: x.astype(np.float16) for name, x in weights.items()}
    path = HERE / f"{name}.npz"
    np.savez_compressed(
        path, settings=settings_of(model), tokens=tokens.astype(np.int32), **logits, **halves
    )
    print(f"{path}: {path.stat().st_size:,} bytes")


def settings_of(model):
    """Its config.json."""
    model.config.architectures = [type(model).__name__]
    return json.dumps(json.loads(model.config.to_json_string(use_diff=False)))


def write_published(name, rng):
    """A model with its config.json, and the text that it writes greedily."""
    import torch

    model = published(name, rng)
    tokens = rng.integers(0, model.config.vocab_size, (1, LENGTH))
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.numpy()
        text = model.generate(torch.tensor(tokens), max_new_tokens=NEW, do_sample=False).numpy()
    weights = {n: p.detach().numpy().astype(np.float16) for n, p in model.named_parameters()}
    path = HERE / f"{name}.npz"
    np.savez_compressed(
        path, settings=settings_of(model), tokens=tokens.astype(np.int32), logits=logits,
        text=text[:, LENGTH:].astype(np.int32), **weights,
    )  # fmt: skip
    print(f"{path}: {path.stat().st_size:,} bytes")


def write_qwen3_next(rng):
    """The layer, and the rule alone: arguments by their name, results of both of its forms."""
    import torch

    weights = qwen3_next.random_weights(qwen3_next.Sizes(), rng)
    x = rng.normal(size=(2, LENGTH, qwen3_next.Sizes().width)).astype(np.float32)
    arrays = qwen3_next.rule_arrays(rng, LENGTH)
    results = {}
    with torch.no_grad():
        y = qwen3_next.layer_with(qwen3_next.Sizes(), weights)(torch.tensor(x)).numpy()
        for form in ("chunk", "recurrent"):
            tensors = {name: torch.tensor(a) for name, a in arrays.items()}
            o, state = qwen3_next.their_rule(form, **tensors)
            results |= {f"rule {form} o": o.numpy(), f"rule {form} state": state.numpy()}
    layer = {f"layer {name}": w.astype(np.float16) for name, w in weights.items()}
    rule = {f"rule {name}": a for name, a in arrays.items()}
    path = HERE / "qwen3_next.npz"
    np.savez_compressed(path, x=x, y=y, **layer, **rule, **results)
    print(f"{path}: {path.stat().st_size:,} bytes")


def write_mamba2(rng):
    import torch

    weights = mamba2.random_weights(mamba2.Sizes(), rng)
    x = rng.normal(size=(2, LENGTH, mamba2.Sizes().width)).astype(np.float32)
    with torch.no_grad():
        y = mamba2.layer_with(mamba2.Sizes(), weights)(torch.tensor(x)).numpy()
    path = HERE / "mamba2.npz"
    halves = {name: w.astype(np.float16) for name, w in weights.items()}
    np.savez_compressed(path, x=x, y=y, **halves)
    print(f"{path}: {path.stat().st_size:,} bytes")


def qwen3_with(sizes, weights):
    """Qwen3 of `transformers` with these weights."""
    import transformers

    config = transformers.Qwen3Config(**_sizes(sizes), attn_implementation="eager")
    return _filled(transformers.Qwen3ForCausalLM(config), weights)


def hypenet_with(package, sizes, weights, scaling):
    """The authors' HypeNet with these weights; `scaling`: their `attn_logits_scaling`."""
    config_class, model_class = _import_hypenet(package)
    kinds = {"A": "attn", "L": "lightning-attn"}
    config = config_class(
        **_sizes(sizes),
        mixer_types=[kinds[letter] for letter in sizes.layers],
        attn_use_rope=False,
        attn_use_output_gate=True,
        attn_logits_scaling=scaling,
        lightning_nh=sizes.heads,
        lightning_nkv=sizes.heads,
        lightning_head_dim=sizes.head_dim,
        lightning_use_rope=True,
        lightning_use_qk_norm=True,
        lightning_use_output_norm=True,
        lightning_use_output_gate=True,
        use_cache=False,
        _attn_implementation="eager",
    )
    config.max_window_layers = 0
    return _filled(model_class(config), weights)


def _sizes(sizes):
    return dict(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=len(sizes.layers),
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope_theta=sizes.theta,
        tie_word_embeddings=sizes.tied,
        rms_norm_eps=1e-6,
    )


def _filled(model, weights):
    import torch

    if model.config.tie_word_embeddings:
        weights = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    return model.float().eval()


def _import_hypenet(package):
    """The authors' modules, with stand-ins for what is not on the CPU or not used here."""
    import torch

    def recurrence(q, k, v, g_gamma, scale, initial_state=None, output_final_state=True):
        state, o = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
        for t in range(q.shape[1]):
            state = g_gamma.exp()[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            o.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(o, dim=1), state

    kernels = dict(chunk_simple_gla=recurrence, fused_recurrent_simple_gla=recurrence)
    for name in ("fla", "fla.ops", "fla.modules", "fla.ops.simple_gla", "cut_cross_entropy",
                 "fla.ops.simple_gla.fused_recurrent"):  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(kernels, ShortConvolution=None, linear_cross_entropy=None)
        module.__path__ = []
        sys.modules[name] = module
    hypenet = types.ModuleType("hypenet")
    hypenet.__path__ = [str(package)]
    sys.modules["hypenet"] = hypenet

    from hypenet import configuration_hypenet, modeling_hypenet, modeling_qwen3

    # The only use of `torch.bfloat16` in that file is the cast of scaled queries.
    modeling_qwen3.torch = types.SimpleNamespace(**vars(torch) | {"bfloat16": torch.float32})
    return configuration_hypenet.HypeNetConfig, modeling_hypenet.HypeNetForCausalLM


if __name__ == "__main__":
    main()
