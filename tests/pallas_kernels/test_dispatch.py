import jax
import numpy as np
import pytest
from targets import targeting

from pallas_kernels.attention import attention
from pallas_kernels.dispatch import Dispatch, target_platform
from pallas_kernels.linear_attention import linear_attention


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    "platform, target", [("tpu", "tpu"), ("gpu", "gpu"), ("cuda", "gpu"), ("cpu", "cpu")])
def test_the_mesh_tells_the_target(platform, target):
    with targeting("any", platform, num_cores=1):
        assert target_platform() == target


def test_without_a_mesh_the_default_backend_is_the_target():
    assert target_platform() == jax.default_backend()


@pytest.fixture
def op(monkeypatch):
    """An op with one implementation that serves nothing and two that return their name."""
    dispatch = Dispatch("op", "nowhere", names=("refuses", "fast", "xla"),
                        best={"tpu": ("refuses", "fast"), "gpu": ("refuses",)})

    def refuses():
        raise NotImplementedError("it never serves")

    found = {"refuses": refuses, "fast": lambda: "fast", "xla": lambda: "xla"}
    load = Dispatch._load
    monkeypatch.setattr(Dispatch, "_load", lambda self, name: found.get(name) or load(self, name))
    return dispatch


@pytest.mark.parametrize("platform, expected", [("tpu", "fast"), ("cpu", "xla")])
def test_none_takes_the_best_for_the_target(op, platform, expected):
    with targeting("any", platform, num_cores=1):
        assert op(None) == expected


def test_a_sequence_is_tried_in_order(op):
    assert op(("xla", "fast")) == "xla"
    assert op(["refuses", "fast"]) == "fast"


def test_a_name_never_falls_back(op):
    with pytest.raises(NotImplementedError, match="^it never serves$"):
        op("refuses")


def test_every_reason_is_listed(op):
    with targeting("any", "gpu", num_cores=1):
        with pytest.raises(NotImplementedError, match=r"op: .*refuses: it never serves"):
            op(None)


def test_an_unknown_name_is_told_the_known_ones(op):
    with pytest.raises(ValueError, match="'fats' is unknown; known are refuses, fast, xla"):
        op("fats")
    with pytest.raises(ValueError, match="known are"):
        op(("refuses", "fats"))


def test_a_backend_that_cannot_be_imported_gives_its_reason():
    op = Dispatch("op", "nowhere", names=("missing",), best={})
    with pytest.raises(NotImplementedError, match="cannot be imported"):
        op("missing")


LINEAR = dict(q=ones(2, 5, 3, 4), k=ones(2, 5, 3, 4), v=ones(2, 5, 3, 6), decay=-ones(3))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=ones(2, 5, 4)), "rank 4"),
        (dict(k=ones(2, 6, 3, 4)), r"k must be \[2, 5, 3, 4\]"),
        (dict(decay=-ones(4)), r"decay must be \[3\]"),
        (dict(decay=-ones(2, 5, 2)), r"decay must be \[2, 5, 3\]"),
        (dict(decay=np.array([-1.0, 0.5, -1.0])), r"must be <= 0, got values from -1.0 to 0.5"),
        (dict(initial_state=ones(2, 3, 6, 4)), r"initial_state must be \[2, 3, 4, 6\]"),
        (dict(segments=ones(2, 4, dtype=np.int32)), r"segments must be \[2, 5\]"),
        (dict(segments=ones(2, 5)), "segments must be integers"),
        (dict(v=ones(2, 5, 3, 6, dtype=np.int32)), "v must be floating point"),
        (dict(chunk_size=0), "chunk_size must be at least 1"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_linear_attention_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**LINEAR, **change})


FULL = dict(q=ones(2, 5, 4, 8), k=ones(2, 5, 2, 8), v=ones(2, 5, 2, 6))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(v=ones(2, 5, 6)), "rank 4"),
        (dict(k=ones(2, 5, 2, 6)), r"k must be \[2, 5, 2, 8\]"),
        (dict(k=ones(2, 5, 3, 8), v=ones(2, 5, 3, 6)), "multiple of key/value heads, got 4 and 3"),
        (dict(q_segments=ones(2, 5, dtype=np.int32)), "given together"),
        (dict(q=ones(2, 1, 4, 8)), r"must be given where T \(1\) differs from S \(5\)"),
        (dict(q_index=ones(2, 5)), "q_index must be integers"),
        (dict(window=0), "must be >= 1, got 0"),
        (dict(window=1.5), "window must be None or one integer"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_attention_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{**FULL, **change})
