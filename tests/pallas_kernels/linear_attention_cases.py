"""One table of cases for every implementation of linear attention, and how to run one."""

import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.linear_attention import linear_attention

B, CHUNK = 2, 16

FACTORS = dict(
    T=(1, 5, 16, 70, 83),  # one token, less than a chunk, one, several ragged grid steps
    widths=((64, 64), (64, 96), (128, 64), (96, 128), (256, 64), (64, 256)),  # K, V
    heads=(2, 3, 5),
    decay=("constant", "traced", "token", "none", "strong", "strong-token"),
    documents=("one", "packed", "late", "padding"),
    initial_state=(False, True),
    dtype=("float32", "bfloat16"),
)

TOLERANCES = {
    "float32": dict.fromkeys(("o", "state", "dq", "dk", "dv", "dinitial_state", "ddecay"), 1e-5),
    "bfloat16": dict(o=0.005, state=0.005, dq=0.008, dk=0.008, dv=0.008, dinitial_state=0.008,
                     ddecay=0.02),
}


def pairwise(factors, count):
    """`count` distinct cases, each with the most pairs of values not yet seen together.

    Once every pair was seen, they are counted anew.
    """
    values = [range(len(x)) for x in factors.values()]
    product = np.array(list(itertools.product(*values)))
    pairs = np.stack([(100 * a + b) * 10_000 + 100 * product[:, a] + product[:, b]
                      for a, b in itertools.combinations(range(len(values)), 2)], axis=1)
    _, pairs = np.unique(pairs, return_inverse=True)
    pairs = pairs.reshape(len(product), -1)
    wanted, free = np.ones(pairs.max() + 1, bool), np.ones(len(product), bool)
    # Among equals, one by a fixed permutation: the product's order would vary one factor only.
    order = np.random.default_rng(0).permutation(len(product))
    cases = []
    while len(cases) < count:
        gain = np.where(free, wanted[pairs].sum(1), -1)
        if gain.max() == 0:
            wanted[:] = True
            continue
        best = order[np.argmax(gain[order])]
        free[best], wanted[pairs[best]] = False, False
        cases.append({name: x[i] for (name, x), i in zip(factors.items(), product[best])})
    return cases


def name(case):
    K, V = case["widths"]
    state = "-state" if case["initial_state"] else ""
    return (f"T{case['T']}-H{case['heads']}-K{K}-V{V}-{case['decay']}-{case['documents']}{state}-"
            f"{case['dtype']}")


ALL = {name(case): case for values in itertools.product(*FACTORS.values())
       for case in [dict(zip(FACTORS, values))]}
TABLE = {name(case): case for case in pairwise(FACTORS, 150)}


# Drawn again: in the first draw a decay's gradient, of which one number is not almost 0, is a sum
# that nearly cancels (to 8, 180 or 270, where others are thousands). float32 errs there by 1e-5 to
# 5e-4 of it, the recurrence too.
_AGAIN = {
    "T70-H2-K96-V128-strong-one-float32",
    "T70-H3-K128-V64-strong-late-float32",
    "T70-H3-K96-V128-strong-padding-float32",
    "T83-H2-K96-V128-strong-late-float32",
}


def segments_of(documents, T):
    """Document ids [B, T]: gaps, documents of one token and across chunks, padding before all."""
    if documents == "one":
        return None
    runs = {
        "packed": ([(1, 1), (2, 30), (0, 3), (3, 1), (9, T)], [(4, 40), (5, 1), (6, 1), (0, T)]),
        "late": ([(0, 19), (7, T)], [(0, 3), (2, 8), (3, T)]),  # a row that begins with padding
        "padding": ([(0, T)], [(5, 33), (0, T)]),  # a row of nothing but padding
    }[documents]
    return np.stack([
        np.concatenate([np.full(length, document) for document, length in row])[:T]
        for row in runs]).astype(np.int32)


def make(case):
    """Arrays in f64 whose values the case's dtype can hold, weights of the results, options."""
    seed = name(case) + " again" * (name(case) in _AGAIN)
    rng = np.random.default_rng(zlib.crc32(seed.encode()))
    T, H, (K, V) = case["T"], case["heads"], case["widths"]
    normal = lambda *shape: rng.standard_normal(shape)
    rounded = lambda x: np.asarray(jnp.asarray(x, case["dtype"]).astype(jnp.float32), np.float64)
    decay = {
        "constant": lambda: -(2.0 ** -np.arange(1, H + 1)),
        "traced": lambda: -(2.0 ** -np.arange(1, H + 1)),
        "token": lambda: -np.abs(normal(B, T, H)),
        "none": lambda: np.zeros(H),
        "strong": lambda: -np.array([25.0, 0.01, 90.0, 3.0, 0.3])[:H],
        "strong-token": lambda: -60 * np.abs(normal(B, T, H)),
    }[case["decay"]]()
    arrays = dict(q=rounded(normal(B, T, H, K)), k=rounded(normal(B, T, H, K)),
                  v=rounded(normal(B, T, H, V)))
    if case["initial_state"]:
        arrays["initial_state"] = normal(B, H, K, V)
    constant = case["decay"] == "constant"
    if not constant:
        arrays["decay"] = decay.astype(np.float32).astype(np.float64)
    weights = rounded(normal(B, T, H, V)), normal(B, H, K, V)
    return arrays, weights, segments_of(case["documents"], T), tuple(decay) if constant else None


def run(case, implementation, wide=jnp.float32):
    """Outputs and the gradients by every array, in the case's dtype or all in a wide one."""
    arrays, weights, segments, constant = make(case)
    narrow = case["dtype"] if wide == jnp.float32 else wide
    arrays = {key: jnp.asarray(x, narrow if key in "qkv" else wide) for key, x in arrays.items()}
    weights = jnp.asarray(weights[0], narrow), jnp.asarray(weights[1], wide)
    return _outputs_and_gradients(implementation, constant, arrays, weights, segments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _outputs_and_gradients(implementation, constant, arrays, weights, segments):
    wide = weights[1].dtype
    fixed = {} if constant is None else {"decay": np.array(constant, wide)}

    def loss(arrays):
        out = linear_attention(**arrays, **fixed, segments=segments, chunk_size=CHUNK,
                               output_final_state=True, implementation=implementation)
        return sum((x * w).sum() for x, w in zip(out, weights)), out

    gradients, (o, state) = jax.grad(loss, has_aux=True)(arrays)
    return {"o": o, "state": state} | {f"d{key}": x for key, x in gradients.items()}


@functools.lru_cache(maxsize=len(TABLE))
def expected(case_name):
    """The oracle: the recurrence in float64."""
    with jax.enable_x64(True):
        results = run(ALL[case_name], "reference", jnp.float64)
        return {key: np.asarray(x) for key, x in results.items()}


def assert_is_the_oracle(case_name, implementation):
    """Root mean squares of the errors, relative to the value or 1e-3 of the largest gradient."""
    case, oracle = ALL[case_name], expected(case_name)
    got = run(case, implementation)
    assert got.keys() == oracle.keys()
    rms = lambda x: np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))
    largest = max(rms(x) for key, x in oracle.items() if key.startswith("d"))
    tolerances = TOLERANCES[case["dtype"]]
    errors = {key: rms(np.asarray(got[key], np.float64) - x)
              / max(rms(x), 1e-3 * largest, 1e-30) for key, x in oracle.items()}
    too_large = {key: float(x) for key, x in errors.items() if not x <= tolerances[key]}
    assert not too_large, too_large
