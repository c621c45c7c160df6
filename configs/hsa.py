"""Hierarchical sparse attention: trained on short rows, read on millions of tokens.

Paper: Understanding and Improving Length Generalization in Hierarchical Sparse Attention Models
(arXiv 2510.17196); code: RamstorageAI/long-context-modeling. Lower layers of sliding-window
attention, a chunk encoder at mid-depth, upper layers that retrieve chunks from its memory.

    python -m hybridjax.train --config=configs/hsa.py                   # tiny
    python -m hybridjax.train --config=configs/hsa.py:tiny,mean_pool

`tiny` trains on bytes that ship with the package: 900 steps of 16 rows of 256 tokens. What it then
finds in longer rows is in docs/results/hsa_length.md (`studies/hsa_length.py`). `mini`, for
ablations, has the paper's chunks of 64, each with several facts and look-alikes; it goes on from a
`tiny` with as many layers (`studies/hsa_principles.py` trains both):

    python -m hybridjax.train --config=configs/hsa.py:tiny,model.layers=SSEHH --workdir=runs/tiny
    python -m hybridjax.train --config=configs/hsa.py:mini --config.init_from=runs/tiny

`240m` and `345m` have a vocabulary that needs a tokenizer: `--config.data.tokenizer=PATH` and a
corpus in `--config.data.sources`. Known of the paper's 240M: window 512, chunks of 64, top-8, rows
of 4096, 8 B tokens; inferred: depth, width, heads and vocabulary, from the count of parameters; the
encoder, from the authors' code; the optimizer, from that of RAMba (arXiv 2504.16795). `345m` is the
like-for-like suite of HiLS (arXiv 2607.02980): 16 layers, 16 heads over 2, FFN 4096, top-32 at rows
of 8192; the places of its HSA layers, the encoder and tying are inferred.

The variant `tasks` adds the paper family's tasks to what is trained and asked: MQ-NIAH, variable
tracking, frequent words (RULER, arXiv 2404.06654) and BABILong's qa1 to qa3 (arXiv 2406.10149).

Others undo one choice each: `swa_only`, `mean_pool`, `no_encoder`, `no_bypass`, `stick`,
`joint`, `dense_topk`, `once_per_chunk`, `noise`, `recency_bias`, `off_by_one`, `mask_window`.
Others are the baselines, in as many layers of one kind and with as many parameters: full attention
(`rope`, `nope`, `yarn`), `landmark`, `nsa`, `moba`, `stick_breaking` and `mamba2`. `yarn` reads 16
times the training row; it has the parameters of `rope`, whose checkpoint it can start from:
`--config.init_from=WORKDIR`.
"""

import functools

import jax
from ml_collections import ConfigDict

from configs import hypenet
from hybridjax.config import UserError, build, choose
from hybridjax.data.sources import source
from hybridjax.mixers import MIXERS
from hybridjax.models import block, mixer, mlp


def get_config(arg: str | None = None) -> ConfigDict:
    return choose(arg, PRESETS, VARIANTS)


def legend(
    *, heads: int, head_dim: int, kv_heads: int, hidden: int, window: int, chunk_size: int,
    landmark_dim: int, top_k: int, encoder_layers: int, encoder_heads: int, encoder_hidden: int,
    norms: bool = False, noise: bool = False, recency_bias: bool = False,
) -> dict[str, ConfigDict]:  # fmt: skip
    """S: sliding window; E: chunk encoder; H: retrieves and reads; h: reads what H has chosen.

    `kv_heads` are those of the sliding window; the memory has one, for all query heads. `norms`: of
    landmarks and of the queries that look for them.
    """
    local = mixer(
        "attention", heads=heads, head_dim=head_dim, kv_heads=kv_heads, window=window,
        rope=True, gate=norms,
    )  # fmt: skip
    encoder = mixer(
        "chunk_encoder", chunk_size=chunk_size, kv_heads=1, head_dim=head_dim,
        landmark_dim=landmark_dim, encoder_layers=encoder_layers, encoder_heads=encoder_heads,
        hidden=encoder_hidden, landmark_norm=norms,
    )  # fmt: skip
    retrieval = mixer(
        "retrieval", groups=1, landmark_dim=landmark_dim, top_k=top_k, norm=norms, noise=noise,
        recency_bias=recency_bias,
    )  # fmt: skip
    read = mixer("hsa", heads=heads, head_dim=head_dim)
    ffn = mlp("swiglu", hidden=hidden)
    return dict(
        S=block(local, mlp=ffn),
        E=block(encoder),
        H=block(local, retrieval, read, mlp=ffn, residual="bypass"),
        h=block(local, read, mlp=ffn, residual="bypass"),
    )


# ---------------------------------------------------------------- minutes on a laptop


def tiny() -> ConfigDict:
    config = hypenet.tiny()
    config.update(name="hsa", steps=900, seq_len=256)
    config.model.layers = "SSEH"
    config.model.blocks = legend(
        heads=2, head_dim=32, kv_heads=2, hidden=128, window=32, chunk_size=16, landmark_dim=64,
        top_k=4, encoder_layers=1, encoder_heads=2, encoder_hidden=128, norms=True,
    )  # fmt: skip
    config.model.blocks.E.mixers[0].state_dtype = "float16"  # 2^25 tokens in 4.5 GiB
    # Of 16 rows 8 ask throughout, for few facts, which is learned soon; 4 at the end, for many; and
    # 4 for few in much text. Its chunks must not be taken for theirs, and those of program sources
    # look more like facts than prose does: hence the decoys.
    task = config.evaluation.task
    at_end = functools.partial(source, "retrieval", weight=0.25, dense=0.0, **task)
    config.data.sources = ConfigDict(
        dict(
            facts=source("retrieval", weight=0.5, facts=8, dense=1.0, **task),
            many=at_end(facts=20, queries=16, decoys=4),
            few=at_end(facts=4, queries=4, decoys=12),
        )
    )
    config.checkpoint.every = config.evaluation.every = 900
    config.evaluation.update(lengths=(1, 16, 256), facts=(4,), logit_bases=(), examples=64)
    return config


def mini() -> ConfigDict:
    """A question names one of many facts, of which a chunk holds eight, three of four alike; a
    variable's value takes two retrievals. 16 chunks in a row, as `tiny` has.

    From nothing it has not learned to retrieve within 1500 steps; from what `tiny` has learned with
    these layers it does within some hundred.
    """
    config = tiny()
    config.model.layers = "SSEHH"
    _set("attention", window=64)(config)
    _set("chunk_encoder", chunk_size=64)(config)
    facts = functools.partial(
        source, "retrieval", facts=20, key_length=2, alike=3, together=8, queries=8
    )
    variables = functools.partial(source, "variables", chains=6, hops=1, together=4)
    config.data.sources = ConfigDict(
        dict(
            facts=facts(weight=6.0, dense=1.0),
            needles=facts(weight=2.0, dense=0.0),
            assignments=variables(weight=1.5, dense=1.0),
            variables=variables(weight=0.5, dense=0.0),
        )
    )
    config.update(steps=500, seq_len=1024, batch_size=4)
    config.checkpoint.every = config.evaluation.every = 500
    config.evaluation.update(lengths=(1, 16), facts=(), tasks=("needles", "variables"))
    return config


def _crowded(config: ConfigDict) -> dict:
    """Facts `#ab=30;` side by side, as many as fill a chunk but for one, three of four alike."""
    chunk = _parts(config, "chunk_encoder")[0].chunk_size
    return dict(key_length=2, separator="=", alike=3, together=max(1, chunk // 7 - 1))


def _tasks(config: ConfigDict) -> None:
    """The tasks in as many rows as the facts and the text together have."""
    made = dict(
        needles=source("retrieval", facts=8, queries=2, **_crowded(config)),
        variables=source("variables", chains=2, hops=2, name_length=2),
        names=source("variables", chains=2, hops=2, name_length=2, ask="names"),
        words=source("words", letters=2),
        **{task: source("babilong", task=task, facts=4) for task in ("qa1", "qa2", "qa3")},
    )
    rows = sum(spec.weight for spec in config.data.sources.values())
    for spec in made.values():
        spec.weight = rows / len(made)
    config.data.sources.update(made)
    config.evaluation.tasks = tuple(made)


# ---------------------------------------------------------------- the papers' sizes


def _sized(layers: str, width: int, vocab: int, **shape) -> ConfigDict:
    blocks = legend(**shape)
    return hypenet.pretraining(
        "hsa", layers=layers, blocks=blocks, width=width, vocab=vocab, tied=True
    )


def paper_240m() -> ConfigDict:
    """8 B tokens: 61,440 steps of 32 rows. Given: window, chunk, top-8, row, steps and batch."""
    config = _sized(
        "SSSSSSSSEHSSSHSSS", 1024, 50280, heads=16, head_dim=64, kv_heads=1, hidden=2560,
        window=512, chunk_size=64, landmark_dim=1024, top_k=8, encoder_layers=2, encoder_heads=16,
        encoder_hidden=2688,
    )  # fmt: skip
    config.optimizer = ConfigDict(
        dict(learning_rate=2e-3, final_learning_rate=4e-4, warmup_steps=1229, weight_decay=1e-3)
    )
    config.update(steps=61_440, batch_size=32, seq_len=4096)
    return config


def hils_345m() -> ConfigDict:
    """31.5 B tokens: 30,000 steps of 128 rows, 5 % of them synthetic retrieval."""
    config = _sized(
        "SSSSSSSSEHSSSHSSS", 1024, 100278, heads=16, head_dim=64, kv_heads=2, hidden=4096,
        window=512, chunk_size=64, landmark_dim=1024, top_k=32, encoder_layers=1, encoder_heads=16,
        encoder_hidden=2688, noise=True, recency_bias=True,
    )  # fmt: skip
    config.optimizer = ConfigDict(
        dict(learning_rate=3e-4, final_learning_rate=3e-5, warmup_steps=210, weight_decay=0.01)
    )
    config.data.sources.text.weight = 0.95
    config.data.sources.facts = source("retrieval", weight=0.05)
    config.update(steps=30_000, batch_size=128, seq_len=8192)
    return config


PRESETS = {
    "tiny": tiny,
    "mini": mini,
    "240m": paper_240m,
    "345m": hils_345m,
}


# ---------------------------------------------------------------- one choice undone


def _parts(config: ConfigDict, type: str) -> list[ConfigDict]:
    """The specs of one type of mixer in the legend."""
    blocks = config.model.blocks.values()
    found = [m for b in blocks for m in b.mixers if m.type == type]
    return found or _absent(config, f"no {type}")


def _block(config: ConfigDict, letter: str) -> ConfigDict:
    return config.model.blocks.get(letter) or _absent(config, f"no block {letter!r}")


def _absent(config: ConfigDict, what: str):
    raise UserError(
        f"{config.name}: a variant before has left {what} in the stack {config.model.layers!r}, "
        "which a later one needs; leave one of them out (tasks can come first)"
    )


def _set(type: str, **options):
    def change(config: ConfigDict) -> None:
        for part in _parts(config, type):
            part.update(options)

    return change


def _swa_only(config: ConfigDict) -> None:
    """As many layers, none of which reads further than its window."""
    local = _block(config, "S")
    config.model.layers = "".join("S" for letter in config.model.layers if letter != "E")
    config.model.blocks = dict(S=local)


def _no_encoder(config: ConfigDict) -> None:
    _set("chunk_encoder", landmark="mean", encoder_layers=0)(config)


def _no_bypass(config: ConfigDict) -> None:
    for letter in "Hh":
        _block(config, letter).residual = "standard"


def _dense_topk(config: ConfigDict) -> None:
    """Every chunk of a training row can be read: sparsity is not enforced."""
    chunk = _parts(config, "chunk_encoder")[0].chunk_size
    _set("retrieval", top_k=config.seq_len // chunk)(config)


def _once_per_chunk(config: ConfigDict) -> None:
    _set("retrieval", every=_parts(config, "chunk_encoder")[0].chunk_size)(config)


def _mask_window(config: ConfigDict) -> None:
    _set("retrieval", window=_block(config, "S").mixers[0].window)(config)


# ---------------------------------------------------------------- baselines of the same size


def _baseline(type: str, **changes):
    """Every layer of one mixer, with the heads, window and chunks that HSA has.

    `changes`: options of the mixer, or functions of the preset that give them; None: left out.
    """

    def change(config: ConfigDict) -> None:
        local = _block(config, "S").mixers[0]
        heads = dict(heads=local.heads, head_dim=local.head_dim, kv_heads=local.kv_heads)
        given = {name: x(config) if callable(x) else x for name, x in changes.items()}
        options = {name: x for name, x in (heads | given).items() if x is not None}
        _replace_mixers(config.model, mixer(type, **options))

    return change


def _replace_mixers(model: ConfigDict, spec: ConfigDict) -> None:
    """As many layers of this mixer; the MLP takes or gives the difference in parameters."""
    size = lambda spec: _parameters(spec, model.width)
    layers = [letter for letter in model.layers if model.blocks[letter].mlp]
    spent = sum(size(m) for letter in model.layers for m in model.blocks[letter].mixers)
    ffn = model.blocks.S.mlp.copy_and_resolve_references()
    left = spent / len(layers) - size(spec)
    ffn.hidden = int(ffn.hidden + left / (3 * model.width)) // 8 * 8
    model.layers, model.blocks = "A" * len(layers), dict(A=block(spec, mlp=ffn))


def _parameters(spec: ConfigDict, width: int) -> int:
    shapes = jax.eval_shape(lambda: build(spec, MIXERS, width, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _option(type: str, name: str):
    return lambda config: _parts(config, type)[0][name]


def _yarn(config: ConfigDict) -> dict:
    return dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=config.seq_len)


_GATE = dict(gate=_option("attention", "gate"))
_CHUNKS = dict(chunk_size=_option("chunk_encoder", "chunk_size"))
_CHOSEN = _CHUNKS | dict(top_k=_option("retrieval", "top_k"))

VARIANTS = {
    "rope": _baseline("attention", rope=True, **_GATE),
    "nope": _baseline("attention", **_GATE),
    "yarn": _baseline("attention", rope=True, rope_scaling=_yarn, **_GATE),
    "landmark": _baseline("landmark", **_CHUNKS, **_GATE),
    "nsa": _baseline("nsa", window=_option("attention", "window"), **_CHOSEN, **_GATE),
    "moba": _baseline("moba", **_CHOSEN, **_GATE),
    "stick_breaking": _baseline("stick_breaking", **_GATE),
    "mamba2": _baseline(
        "mamba2",
        heads=lambda config: 2 * config.model.width // _parts(config, "attention")[0].head_dim,
        state_dim=lambda config: 2 * _parts(config, "attention")[0].head_dim,
        kv_heads=None,
    ),
    "swa_only": _swa_only,
    "mean_pool": _set("chunk_encoder", landmark="mean"),
    "no_encoder": _no_encoder,
    "no_bypass": _no_bypass,
    "stick": _set("retrieval", weights="stick"),
    "joint": _set("retrieval", weights="joint"),
    "dense_topk": _dense_topk,
    "once_per_chunk": _once_per_chunk,
    "noise": _set("retrieval", noise=True),
    "recency_bias": _set("retrieval", recency_bias=True),
    "off_by_one": _set("hsa", off_by_one=True),
    "mask_window": _mask_window,
    "tasks": _tasks,
}
