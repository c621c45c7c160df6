"""The decoder over stacks of every kind that the legend and the planner allow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hybridjax.config import MeshConfig, ModelConfig, UserError, typed
from hybridjax.mixers.base import Context
from hybridjax.models import block, mixer, mlp
from hybridjax.models.decoder import REMAT, Decoder
from hybridjax.sharding import make_mesh, place, place_parameters

WIDTH, VOCAB = 16, 23
HEADS = dict(heads=2, head_dim=8)
FFN = mlp("swiglu", hidden=16)
TWO = mixer("choice", options=(mixer("attention", **HEADS), mixer("lightning", **HEADS)))
LEGEND = dict(
    A=block(mixer("attention", **HEADS), mlp=FFN),
    # The output norm blows the rounding of a first token up, whose output may be near zero.
    L=block(mixer("lightning", output_norm=False, **HEADS), mlp=FFN),
    C=block(TWO, mlp=FFN),
    M=block(mixer("toys:Mean"), mlp=FFN),
    E=block(mixer("toys:Encoder")),
    H=block(mixer("toys:Mean"), mixer("toys:Reader"), mlp=FFN),
    h=block(mixer("toys:Follower"), mlp=FFN),
    D=block(mixer("toys:Indexer"), mlp=FFN),
    d=block(mixer("toys:Sharer"), mlp=FFN),
    B=block(mixer("toys:Mean"), mixer("toys:Mean"), mlp=FFN, residual="bypass"),
    N=block(mixer("toys:Mean"), mlp=FFN, norms="sandwich", scale=0.5),
)
STACKS = {
    "hybrid": "LLA" * 2,
    "memory": "MME" + "HMh" * 2,
    "indices": "Dd" * 2 + "Ddd",
    "variants": "BN" * 2,
}


@functools.cache
def decoder(layers, **changes):
    config = dict(layers=layers, blocks=LEGEND, width=WIDTH, vocab=VOCAB) | changes
    config = typed(ConfigDict(config), ModelConfig)
    return jax.jit(lambda: Decoder(config, jax.random.key(7)))()


def variant(model, **attributes):
    """The same parameters in a decoder with other static attributes."""
    leaves, treedef = jax.tree.flatten(model)
    model = jax.tree.unflatten(treedef, leaves)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def tokens_of(rng, batch=2, length=9):
    return jnp.asarray(rng.integers(VOCAB, size=(batch, length)), jnp.int32)


@jax.jit
def loss_and_gradient(model, tokens):
    return jax.value_and_grad(lambda model: jnp.mean(jnp.sin(3 * model(tokens))))(model)


def close(actual, expected, tolerance=2e-6):
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=10 * tolerance, atol=tolerance)
    jax.tree.map(check, jax.tree.leaves(actual), jax.tree.leaves(expected))


# ---------------------------------------------------------------- scan and remat


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(
            layers, id=name, marks=() if name == "memory" else pytest.mark.slow
        )
        for name, layers in STACKS.items()
    ],
)
def test_scan_changes_no_number(rng, layers):
    model, tokens = decoder(layers), tokens_of(rng)
    assert any(group.repeats > 1 for group in model.plan)
    result = loss_and_gradient(model, tokens)
    close(result, loss_and_gradient(variant(model, scan=False), tokens), 1e-5)
    # Every layer has a gradient, the publishers outside of a scan included.
    for path, leaf in jax.tree_util.tree_leaves_with_path(result[1].groups):
        per_layer = jnp.sum(jnp.abs(leaf.reshape(leaf.shape[0], -1)), axis=1)
        assert bool((per_layer > 0).all()), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(name, marks=() if name == "names" else pytest.mark.slow)
        for name in REMAT
        if name != "none"
    ],
)
def test_remat_changes_no_number(rng, remat):
    model, tokens = decoder(STACKS["memory"]), tokens_of(rng)
    expected = loss_and_gradient(model, tokens)
    close(loss_and_gradient(variant(model, remat=remat), tokens), expected)


def test_remat_is_one_of_the_known():
    with pytest.raises(UserError, match="remat is 'some': use one of none, names, dots, full"):
        decoder("M", remat="some")


# ---------------------------------------------------------------- decoding


@jax.jit
def forward(model, tokens):
    return model(tokens)


@functools.partial(jax.jit, donate_argnums=2)
def extended(model, tokens, state, segments):
    h, state = model.extend(tokens, state, segments)
    return model.logits(h), state


@functools.partial(jax.jit, static_argnums=(1, 2))
def new_state(model, batch, max_length):
    return model.init_state(batch, max_length)


def read(model, tokens, pieces, max_length=13):
    """Logits and state after consuming the tokens in pieces of at most four, padded to four."""
    state = new_state(model, tokens.shape[0], max_length)
    outputs, start = [], 0
    for size in pieces:
        piece = jnp.pad(tokens[:, start : start + size], ((0, 0), (0, 4 - size)))
        segments = jnp.broadcast_to(jnp.arange(4) < size, piece.shape).astype(jnp.int32)
        logits, state = extended(model, piece, state, segments)
        outputs.append(logits[:, :size])
        start += size
    return jnp.concatenate(outputs, axis=1), state


@pytest.mark.parametrize("layers", STACKS.values(), ids=STACKS.keys())
def test_extend_in_any_split_is_the_parallel_form(rng, layers):
    model, tokens = decoder(layers), tokens_of(rng)
    expected = forward(model, tokens)
    for pieces in ([1] * 9, [4, 2, 3]):
        logits, state = read(model, tokens, pieces)
        close(logits, expected, 1e-5)
        assert state.length.tolist() == [9, 9]


def test_extend_unscanned_is_extend(rng):
    model, tokens = decoder(STACKS["memory"]), tokens_of(rng)
    expected = read(model, tokens, [4, 2, 3])
    close(read(variant(model, scan=False), tokens, [4, 2, 3]), expected)


def test_extend_on_a_mesh_is_extend_on_one_device(rng):
    model, tokens = decoder(STACKS["variants"]), tokens_of(rng, batch=4)
    expected = jax.device_get(read(model, tokens, [4, 3]))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        actual = read(place_parameters(model), place(tokens, "batch", "length"), [4, 3])
    close(jax.device_get(actual), expected, 1e-5)


def test_a_shared_memory_has_one_cache():
    batch, room = 2, 64
    of = lambda layers: jax.eval_shape(lambda: decoder(layers).init_state(batch, room)).layers
    cache = batch * room * WIDTH * 4
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    length, mean = 4 * batch, 4 * batch * WIDTH
    reader, follower = mean + 2 * length, length
    assert size(of("E" + "Hh" * 4)) == cache + length + 4 * (reader + follower)


def test_a_state_can_be_continued_in_two_ways(rng):
    model, tokens = decoder(STACKS["memory"]), tokens_of(rng)
    other = tokens.at[:, 4:].set(VOCAB - 1 - tokens[:, 4:])
    _, state = read(model, tokens, [4])
    ends = [t[:, 4:8] for t in (tokens, other)]
    ones = jnp.ones_like(ends[0])
    for end, whole in zip(ends, (tokens, other), strict=True):
        logits, _ = extended(model, end, jax.tree.map(jnp.copy, state), ones)
        close(logits, forward(model, whole)[:, 4:8], 1e-5)


# ---------------------------------------------------------------- data per layer


def by_hand(model, tokens, change):
    """The forward pass layer by layer, each block changed by `change(block, index)`."""
    ctx, h = Context.of_rows(tokens), model.embedding(tokens, jnp.float32)
    for index in range(len(model.counted)):
        h, ctx = change(model.layer(index), index)(h, ctx)
    return model.logits(model.norm(h))


def test_a_sweep_over_choices_compiles_once(rng):
    model, tokens = decoder("CC"), tokens_of(rng)

    @jax.jit
    def chosen(model, tokens, selected):
        return model(tokens, data=selected)

    def select(selected):
        def change(block, index):
            block.mixers[0] = block.mixers[0].options[selected[index]]
            return block

        return change

    for selected in ([0, 1], [1, 0]):
        logits = chosen(model, tokens, jnp.array(selected))
        close(logits, jax.jit(lambda m, t, s=selected: by_hand(m, t, select(s)))(model, tokens))
    assert chosen._cache_size() == 1


def test_a_sweep_over_windows_compiles_once(rng):
    model, tokens = decoder("AA"), tokens_of(rng)

    @jax.jit
    def windowed(model, tokens, windows):
        return model(tokens, data=windows)

    def narrow(windows):
        def change(block, index):
            block.mixers[0].window = windows[index]
            return block

        return change

    for windows in ([9, 9], [1, 4]):
        logits = windowed(model, tokens, jnp.array(windows))
        close(logits, jax.jit(lambda m, t, w=windows: by_hand(m, t, narrow(w)))(model, tokens))
    assert windowed._cache_size() == 1


def test_a_choice_is_not_decoded():
    with pytest.raises(UserError, match="build the chosen stack to decode"):
        decoder("CC").init_state(1, 4)


# ---------------------------------------------------------------- fold


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("layers", ["MMNMMNMN", STACKS["memory"]])
def test_fold_visits_the_layers_in_order(layers, scan):
    model = variant(decoder(layers), scan=scan)
    numbers = jnp.arange(len(layers))

    def visit(block, h, ctx, number, doubled):
        return 2 * h + number, ctx, {"number": number, "doubled": doubled, "h": h[0, 0, 0]}

    ctx = Context.of_rows(jnp.zeros((1, 1), jnp.int32))
    start = jnp.zeros((1, 1, 1), jnp.int32)
    first = lambda block, h, ctx, number: (h, ctx, 2 * number)
    _, doubled = jax.jit(lambda m: m.fold(first, start, ctx, numbers))(model)
    h, out = jax.jit(lambda m, d: m.fold(visit, start, ctx, numbers, d))(model, doubled)
    out, expected = out.stack(), [0]
    for number in range(len(layers)):
        expected.append(2 * expected[-1] + number)
    assert out["number"].tolist() == numbers.tolist()
    assert out["doubled"].tolist() == (2 * numbers).tolist()
    assert [*out["h"].tolist(), int(h[0, 0, 0])] == expected


def test_fold_gives_each_layer_its_parameters():
    model = decoder("MMNMMNMN")
    ctx, h = Context.of_rows(jnp.zeros((1, 1), jnp.int32)), jnp.zeros((1, 1, WIDTH))
    read = lambda block, h, ctx: (h, ctx, block.mlp.up.kernel[...])
    _, kernels = jax.jit(lambda m: m.fold(read, h, ctx))(model)
    for index, kernel in enumerate(kernels.stack()):
        np.testing.assert_array_equal(kernel, model.layer(index).mlp.up.kernel[...])
    assert len(np.unique(kernels.stack()[:, 0, 0])) == 8


def test_layers_that_add_nothing_are_not_counted():
    model = decoder(STACKS["memory"])  # MM E HMh HMh
    kinds = [type(model.layer(i).mixers[-1]).__name__ for i in range(len(model.counted))]
    assert kinds == ["Mean"] * 2 + ["Reader", "Mean", "Follower"] * 2
    assert len(model.layer(2).mixers) == 2
    with pytest.raises(IndexError):
        model.layer(8)


# ---------------------------------------------------------------- the block


def bypass(block, h, ctx):
    """arXiv 2510.17196, eq. 6b, after a mixer of the standard kind."""
    first, last = block.mixers
    h = h + first(block.norms[0](h), ctx)
    return h + block.mlp(block.norms[2](h + last(block.norms[1](h), ctx)))


def sandwich(block, h, ctx):
    h = h + 0.5 * block.output_norms[0](block.mixers[0](block.norms[0](h), ctx))
    return h + 0.5 * block.output_norms[1](block.mlp(block.norms[1](h)))


def standard(block, h, ctx):
    h = h + block.mixers[0](block.norms[0](h), ctx)
    return h + block.mlp(block.norms[1](h))


@pytest.mark.parametrize("letter, formula", [("B", bypass), ("N", sandwich), ("M", standard)])
def test_a_block_is_its_formula(rng, letter, formula):
    block = decoder(letter).layer(0)
    scales = [jnp.asarray(rng.uniform(0.5, 2, WIDTH), jnp.float32) for _ in range(5)]
    for norm, scale in zip([*block.norms, *block.output_norms], scales):
        norm.scale[...] = scale
    h = jnp.asarray(rng.normal(size=(2, 9, WIDTH)), jnp.float32)
    ctx = Context.of_rows(h[..., 0])
    close(jax.jit(lambda b, h: b(h, ctx)[0])(block, h), jax.jit(formula)(block, h, ctx))


FAULTS = {
    "residual": (dict(residual="none"), "block residual is 'none': use one of"),
    "norms": (dict(norms="post"), "block norms is 'post': use one of"),
    "bypass": (dict(residual="bypass"), "a bypass block needs a mixer that adds"),
}


@pytest.mark.parametrize("options, message", FAULTS.values(), ids=FAULTS.keys())
def test_faults_of_a_legend(options, message):
    with pytest.raises(UserError, match=message):
        decoder.__wrapped__("X", blocks=dict(X=block(mixer("toys:Mean"), **options)))


# ---------------------------------------------------------------- the ends


def test_a_tied_head_is_the_embedding(rng):
    tied, tokens = decoder("M", tied=True), tokens_of(rng)
    assert tied.head is None and decoder("M").head.shape == (WIDTH, VOCAB)
    h = jax.jit(lambda m, t: m.hidden(t))(tied, tokens)
    close(forward(tied, tokens), h @ tied.embedding.table[...].T, 1e-5)


def test_bf16_is_near_f32(rng):
    model, tokens = decoder("LA", embedding_std=1.0), tokens_of(rng, length=20)
    low = variant(model, dtype="bfloat16")
    hidden = jax.jit(lambda m, t: (m.hidden(t), m(t)))
    (h, logits), (_, expected) = hidden(low, tokens), hidden(model, tokens)
    assert h.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((logits - expected) ** 2) / jnp.mean(expected**2))
    assert 0 < error < 0.05
    state = jax.eval_shape(lambda: low.init_state(1, 8)).layers
    assert state[1][0].keys.dtype == jnp.bfloat16 and state[0][0].recurrent.dtype == jnp.float32
