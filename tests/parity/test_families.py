"""Models that `transformers` has saved, read by us, against `transformers`; and back."""

import functools
import itertools

import jax
import numpy as np
import pytest
from published import MODELS, published

from hybridjax import generate, huggingface
from hybridjax.models.decoder import Decoder

torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

pytestmark = pytest.mark.parity
LENGTH, NEW = 60, 12
GREEDY = functools.partial(generate.sample, temperature=0.0)


@pytest.fixture(params=MODELS)
def saved(request, rng, tmp_path):
    """Their model, and the directory where it saved itself, in shards."""
    theirs = published(request.param, rng)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="12KB")
    return theirs, tmp_path / "theirs"


def test_logits_and_greedy_text(saved, rng):
    theirs, directory = saved
    ours = huggingface.open_directory(directory).load()
    tokens = rng.integers(0, 48, (2, LENGTH))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        text = theirs.generate(
            torch.tensor(tokens), max_new_tokens=NEW, do_sample=False, use_cache=True
        )
    logits = jax.jit(Decoder.__call__)(ours, tokens)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
    state = generate.new_state(ours, 2, LENGTH + NEW)
    prefix = generate.prefill(ours, list(tokens), state, piece=LENGTH)
    steps = generate.decode(ours, prefix, jax.random.key(0), GREEDY)
    written = np.stack(list(itertools.islice(steps, NEW)), axis=1)
    np.testing.assert_array_equal(written, text[:, LENGTH:].numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_we_save_is_what_transformers_reads(saved, dtype, tmp_path):
    theirs, directory = saved
    read = huggingface.open_directory(directory)
    huggingface.save_directory(
        tmp_path / "ours", read.model, read.load(), settings=read.settings, dtype=dtype,
        shard_bytes=12_000,
    )  # fmt: skip
    again = type(theirs).from_pretrained(tmp_path / "ours", torch_dtype=getattr(torch, dtype))
    ignored = ("_name_or_path", "dtype", "torch_dtype", "architectures")
    kept = lambda model: {k: v for k, v in model.config.to_dict().items() if k not in ignored}
    assert kept(again) == kept(theirs)
    expected = dict(theirs.named_parameters())
    for name, value in again.named_parameters():
        assert torch.equal(value.float(), expected.pop(name)), name
    assert not expected
