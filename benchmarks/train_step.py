"""Tokens per second of a training step, beside the same network in PyTorch.

    python -m benchmarks.train_step --preset=tiny          # needs the parity extra

Both train a preset of configs/hypenet.py on the same batch, from the same weights, with the same
threads; PyTorch runs eagerly, with its own fused attention and optimizers. Rows of the batch hold
one document each, so PyTorch's attention needs no mask. Blocks of steps alternate in one process,
and the ratio is that of neighbouring blocks: what else the machine does disturbs both. On a machine
that is not idle, believe the CPU time, and run on one core (`taskset -c 0 python -m ...`): threads
that wait for one another spin.

    python -m benchmarks.train_step --preset=tiny,optimizer.name=adamw
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.batch import random_batch
from benchmarks.record import commit, cpu_name, spread
from configs import hypenet
from hybridjax import command
from hybridjax.config import Config, typed
from hybridjax.models.decoder import Decoder
from hybridjax.optimizer import make_optimizer
from hybridjax.sharding import make_mesh, place_parameters
from hybridjax.train import TrainState, make_train_step, put_batch
from pallas_kernels.linear_attention.decay import alibi_slopes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", help="of configs/hypenet.py, with overrides")
    parser.add_argument("--steps", type=int, default=10, help="per block")
    parser.add_argument("--blocks", type=int, default=15, help="of each side")
    parser.add_argument("--output", default="docs/results/train_step.json")
    args = parser.parse_args()

    command.prepare_jax()  # as training does; its memory settings serve both sides
    config = comparable(typed(hypenet.get_config(args.preset)))
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    jax.set_mesh(make_mesh(config.mesh))

    batch = random_batch(config)
    model = place_parameters(Decoder(config.model, jax.random.key(config.seed)))
    sides = {"pytorch": pytorch_steps(config, batch, model)}
    sides["hybridjax"] = hybridjax_steps(config, batch, model)  # donates the model
    losses = {name: run(1) for name, run in sides.items()}
    assert abs(losses["hybridjax"] - losses["pytorch"]) < 1e-4, losses

    tokens = args.steps * config.batch_size * config.seq_len
    clocks = {"tokens_per_second": time.perf_counter, "tokens_per_cpu_second": time.process_time}
    speeds = {clock: {name: [] for name in sides} for clock in clocks}
    for run in sides.values():
        run(3)
    for block in range(args.blocks):
        for name in sorted(sides, reverse=block % 2 == 1):
            start = {clock: read() for clock, read in clocks.items()}
            sides[name](args.steps)
            for clock, read in clocks.items():
                speeds[clock][name].append(tokens / (read() - start[clock]))

    result = {
        "command": f"python -m benchmarks.train_step --preset={args.preset}",
        "network": f"{config.model.layers}, width {config.model.width}, "
        f"batch {config.batch_size} x {config.seq_len}, {config.optimizer.name}",
        "machine": f"{cpu_name()}, {threads} threads",
        "versions": f"jax {jax.__version__}, torch {torch.__version__}",
        "commit": commit(),
        "first_loss": losses,
    }
    for clock, of in speeds.items():
        ratio = spread(np.divide(of["hybridjax"], of["pytorch"]))
        result[clock] = {name: spread(values) for name, values in of.items()} | {"ratio": ratio}
    report(result)
    path = pathlib.Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def comparable(config: Config) -> Config:
    """The config without what the PyTorch side leaves out: the schedule of the learning rate."""
    optimizer = dataclasses.replace(config.optimizer, schedule="constant", warmup_steps=0)
    return dataclasses.replace(config, optimizer=optimizer)


def hybridjax_steps(config: Config, batch: dict[str, np.ndarray], model: Decoder):
    """A function that takes steps and returns the last loss."""
    optimizer = make_optimizer(config.optimizer, config.steps, model)
    train_step = make_train_step(optimizer, config)
    batch = put_batch(batch)
    state = TrainState(jnp.zeros((), jnp.int32), model, jax.jit(optimizer.init)(model))

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, scalars = train_step(state, batch)
        return float(jax.block_until_ready((state, scalars))[1]["loss"])

    return run


# ---------------------------------------------------------------- the same in PyTorch


def pytorch_steps(config: Config, batch: dict[str, np.ndarray], model: Decoder):
    network = Network(config, model)
    tokens, targets = (torch.tensor(batch[name]).long() for name in ("tokens", "targets"))
    optimizers = pytorch_optimizers(config, network)

    def run(steps: int) -> float:
        for _ in range(steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = F.cross_entropy(network(tokens).flatten(0, 1), targets.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip)
            for optimizer in optimizers:
                optimizer.step()
        return loss.item()

    return run


def pytorch_optimizers(config: Config, network: nn.Module) -> list[torch.optim.Optimizer]:
    """Matrices by Muon where the config says so; the rest by AdamW."""
    o = config.optimizer
    matrices = [p for p in network.parameters() if p.ndim == 2]
    others = [p for p in network.parameters() if p.ndim != 2]
    adamw = dict(lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps)
    if o.name == "muon":
        muon = torch.optim.Muon(matrices, lr=o.learning_rate, weight_decay=o.weight_decay)
        return [muon, torch.optim.AdamW(others, weight_decay=0.0, **adamw)]
    groups = [dict(params=matrices, weight_decay=o.weight_decay),
              dict(params=others, weight_decay=0.0)]  # fmt: skip
    return [torch.optim.AdamW(groups, **adamw)]


class Network(nn.Module):
    """Modules are named nearly as in hybridjax, so that weights are copied by their paths."""

    def __init__(self, config: Config, model: Decoder):
        super().__init__()
        vocab, width = config.model.vocab, config.model.width
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList([Block(config, letter) for letter in config.model.layers])
        self.norm = nn.RMSNorm(width, eps=config.model.norm_eps)
        self.head = nn.Linear(width, vocab, bias=False)
        copy(self.embedding.weight, model.embedding.table[...])
        copy(self.norm.weight, model.norm.scale[...])
        if model.head is None:
            self.head.weight = self.embedding.weight
        else:
            copy(self.head.weight, model.head[...].T)
        for i, block in enumerate(self.blocks):
            for path, value in jax.tree.leaves_with_path(model.layer(i)):
                name = jax.tree_util.keystr(path[:-1], simple=True, separator=".")
                name = name.replace("qkv.", "").replace("mixers.0.output.gate", "mixers.0.gate")
                *names, kind = name.split(".")
                target = block.get_parameter(".".join([*names, "weight"]))
                copy(target, value.T if kind == "kernel" else value)

    def forward(self, tokens):
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def copy(parameter: nn.Parameter, value: jax.Array) -> None:
    parameter.data = torch.tensor(np.array(value))


class Block(nn.Module):
    def __init__(self, config: Config, letter: str):
        super().__init__()
        spec = config.model.blocks[letter]
        width, options = config.model.width, dict(spec.mixers[0])
        kind = {"attention": Attention, "lightning": Lightning}[options.pop("type")]
        self.mixers = nn.ModuleList([kind(config, options)])
        self.mlp = SwiGLU(width, spec.mlp["hidden"])
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=config.model.norm_eps) for _ in "12"])

    def forward(self, h):
        h = h + self.mixers[0](self.norms[0](h))
        return h + self.mlp(self.norms[1](h))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.output = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.output(F.silu(self.gate(x)) * self.up(x))


class Heads(nn.Module):
    """What both mixers share: projections, QK-norm, rotation and gate."""

    def __init__(self, config: Config, o: dict):
        super().__init__()
        width, self.head_dim, eps = config.model.width, o["head_dim"], o["eps"]
        inner, kv_inner = (self.head_dim * n for n in (o["heads"], o["kv_heads"] or o["heads"]))
        for name, size in dict(query=inner, key=kv_inner, value=kv_inner, gate=inner).items():
            setattr(self, name, nn.Linear(width, size, bias=False))
        self.output = nn.Linear(inner, width, bias=False)
        self.query_norm = nn.RMSNorm(self.head_dim, eps=eps)
        self.key_norm = nn.RMSNorm(self.head_dim, eps=eps)
        self.rope = o["rope"]
        half = torch.arange(self.head_dim // 2) / (self.head_dim // 2)
        angle = torch.arange(config.seq_len)[:, None] * o["theta"] ** -half
        self.cos, self.sin = angle.cos(), angle.sin()

    def forward(self, x):
        q, k, v = (self.split(f(x)) for f in (self.query, self.key, self.value))
        q, k = self.query_norm(q), self.key_norm(k)
        if self.rope:
            q, k = self.rotate(q), self.rotate(k)
        o = self.normed(self.mix(q, k, v).transpose(1, 2).flatten(2))
        return self.output(o * torch.sigmoid(self.gate(x)))

    def split(self, y):
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def rotate(self, x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], dim=-1)


class Attention(Heads):
    def mix(self, q, k, v):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    def normed(self, o):
        return o


class Lightning(Heads):
    """By chunks, as `pallas_kernels/linear_attention/xla.py` explains."""

    def __init__(self, config: Config, o: dict):
        super().__init__(config, o)
        self.normed = self.output_norm = nn.RMSNorm(o["heads"] * self.head_dim, eps=o["eps"])
        self.chunk = max(32, min(self.head_dim, 128))
        decay = torch.tensor(-alibi_slopes(o["heads"]), dtype=torch.float32)[:, None, None, None]
        i = torch.arange(self.chunk)
        distance = (i[:, None] - i).float()
        scale = self.head_dim**-0.5
        self.intra = scale * torch.exp((decay * distance).masked_fill(distance < 0, -torch.inf))
        self.read = scale * torch.exp(decay * (i[:, None] + 1))
        self.write = torch.exp(decay * (self.chunk - 1 - i[:, None]))
        self.keep = torch.exp(decay[:, 0] * self.chunk)

    def mix(self, q, k, v):
        q, k, v = (x.unflatten(2, (-1, self.chunk)) for x in (q, k, v))
        update = (k * self.write).mT @ v
        states = [torch.zeros_like(update[:, :, 0])]
        for n in range(q.shape[2] - 1):
            states.append(self.keep * states[-1] + update[:, :, n])
        o = (q @ k.mT * self.intra) @ v + (q * self.read) @ torch.stack(states, dim=2)
        return o.flatten(2, 3)


# ---------------------------------------------------------------- the report


def report(result: dict) -> None:
    print(f"{result['network']}; {result['machine']}; {result['versions']}")
    for clock in ("tokens_per_second", "tokens_per_cpu_second"):
        print(clock.replace("_", " "))
        for name, value in result[clock].items():
            low, high = value["quartiles"]
            form = ".2f" if name == "ratio" else ",.0f"
            print(f"  {name:10} {value['median']:10{form}}   ({low:{form}} to {high:{form}})")


if __name__ == "__main__":
    main()
