"""Which layers stay attention: the official rule (arXiv 2601.22156, eq. 8) and its rivals.

Models that differ from the teacher in one layer are asked for facts (recall: needle tests at the
teacher's length) and to go on with text (the share of next tokens predicted, which stands for the
paper's commonsense benchmarks). All are one model with a choice in each layer: it compiles once.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybridjax.data.retrieval import Haystack, needle_batch
from hybridjax.data.tokenizer import Tokenizer
from hybridjax.evals.batches import in_batches
from hybridjax.evals.heldout import rows_of_text
from hybridjax.halo.config import SelectConfig
from hybridjax.halo.distillation import kl_divergence
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder

TEACHER, ALL_LINEAR = "teacher", "all linear"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model of the sweep: shares of needle tests and of next tokens, and its distance from the
    teacher in nats per token of text."""

    recall: float
    commonsense: float
    kl: float


# ---------------------------------------------------------------- the sweep


def sweep(depth: int) -> dict[str, tuple[int, ...]]:
    """Each model's choice per layer: 0 is attention, 1 linear."""
    one = lambda layer, value: tuple(value if i == layer else 1 - value for i in range(depth))
    return {
        TEACHER: (0,) * depth,
        ALL_LINEAR: (1,) * depth,
        **{f"linear {i}": one(i, 1) for i in range(depth)},
        **{f"attention {i}": one(i, 0) for i in range(depth)},
    }


@dataclasses.dataclass(frozen=True)
class Questions:
    """Rows of needle tests, then of text, of `T + 1` tokens each; and the tests' answers."""

    rows: Int[np.ndarray, "n T+1"]
    answers: Int[np.ndarray, "tests T"]

    @classmethod
    def of(
        cls, config: SelectConfig, tokenizer: Tokenizer, length: int, facts: int, task: Mapping
    ) -> "Questions":
        """From the `tune` documents, so that the held-out ones stay unseen."""
        haystack = Haystack(tokenizer, "tune", **task)
        tests = needle_batch(haystack, 0, config.examples, length, facts=facts)
        needles = np.concatenate([tests.tokens, tests.targets[:, -1:]], axis=1)
        text = rows_of_text(tokenizer, "tune", length, config.tokens)
        return cls(np.concatenate([needles, text]).astype(np.int32), tests.answers)


def measure(model: Decoder, chosen: tuple[int, ...], questions: Questions) -> Measured:
    """Asks the model that has option `chosen[i]` in layer i."""
    selected = jnp.asarray(chosen, jnp.int32)
    answers = in_batches(lambda rows: _measure(model, selected, rows), questions.rows)
    hit, kl = answers[:, 0], answers[:, 1]
    count = len(questions.answers)
    exact = ((hit[:count] > 0) | (questions.answers == 0)).all(axis=1)
    text = slice(count, None)
    return Measured(float(exact.mean()), float(hit[text].mean()), float(kl[text].mean()))


@jax.jit
def _measure(
    model: Decoder, selected: Int[Array, " L"], rows: Int[Array, "B T+1"]
) -> Float[Array, "B 2 T"]:
    """For each token whether it was predicted, and the distance from the teacher."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    ctx = Context.of_rows(tokens)
    h = model.hidden(tokens, ctx, selected)
    g = model.hidden(tokens, ctx, jnp.zeros_like(selected))
    kl, hit = kl_divergence(model, h, model, g, targets)
    return jnp.stack([hit, kl], axis=1)


# ---------------------------------------------------------------- the rules


def halo_score(
    recall: Float[np.ndarray, " L"],
    commonsense: Float[np.ndarray, " L"],
    eps: float = 1e-10,
    cap: float = 50.0,
) -> Float[np.ndarray, " L"]:
    """What making layer i linear costs in recall, per cost in commonsense; both against the best of
    the models with one linear layer. The defaults are the official code's."""
    drop = np.max(recall) - recall
    return np.minimum(cap, drop / (np.max(commonsense) - commonsense + eps))


def importance(
    rule: str, measured: Mapping[str, Measured], depth: int, config: SelectConfig
) -> Float[np.ndarray, " L"] | None:
    """Each layer's score by a rule that measures; None for the others."""
    field = lambda kind, name: np.array(
        [getattr(measured[f"{kind} {i}"], name) for i in range(depth)]
    )
    if rule == "halo":
        recall, commonsense = field("linear", "recall"), field("linear", "commonsense")
        return halo_score(recall, commonsense, config.eps, config.cap)
    if rule == "recall_drop":
        return measured[TEACHER].recall - field("linear", "recall")
    if rule == "kl":
        return measured[ALL_LINEAR].kl - field("attention", "kl")
    return None


def evenly(depth: int, keep: int) -> tuple[int, ...]:
    """The last layer of each of `keep` equal parts."""
    return tuple((i + 1) * depth // keep - 1 for i in range(keep))


def evenly_latter_half(depth: int, keep: int) -> tuple[int, ...]:
    half = depth // 2
    keep = min(keep, depth - half)
    return tuple(half + i for i in evenly(depth - half, keep))


PLACES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "even": evenly,
    "latter_half": evenly_latter_half,
    "all_linear": lambda depth, keep: (),
}
RULES = (
    "halo",  # recall lost per commonsense lost (arXiv 2601.22156, eq. 8)
    "recall_drop",  # Jet-Nemotron's (arXiv 2508.15884), as the official code has it
    "kl",  # what restoring attention saves in KL (arXiv 2512.20569), without its training
    *PLACES,
)


def scores_of_rules(
    measured: Mapping[str, Measured], depth: int, keep: int, config: SelectConfig
) -> dict[str, dict[str, list]]:
    """Each rule's `importance` of the layers, where it has one, and which layers are `kept`."""
    scores = {rule: importance(rule, measured, depth, config) for rule in RULES}
    drop = scores["recall_drop"]
    return {
        "importance": {rule: s.tolist() for rule, s in scores.items() if s is not None},
        "kept": {
            rule: list(PLACES[rule](depth, keep)) if s is None else largest(s, keep, drop)
            for rule, s in scores.items()
        },
    }


def largest(
    scores: Float[np.ndarray, " L"], keep: int, ties: Float[np.ndarray, " L"]
) -> list[int]:
    """The layers with the largest scores, in order. Of equal ones, as are all that reach the
    official score's cap, those with the largest `ties`; the lowest, if these are equal too."""
    return sorted(int(i) for i in np.lexsort((-ties, -scores))[:keep])
