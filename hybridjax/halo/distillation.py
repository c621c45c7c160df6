"""Stage 2: the student's next-token distribution becomes the teacher's (arXiv 2601.22156, eq. 10).

KL(teacher || student) over the whole vocabulary, without temperature and without cross-entropy.
Logits are made a slice of tokens at a time, as in `loss.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridjax.layers.embedding import head_logits
from hybridjax.loss import in_slices, pick
from hybridjax.mixers.base import Context
from hybridjax.models.decoder import Decoder
from hybridjax.sharding import RULES, over_mesh, place
from hybridjax.train import hits, real_mean


def distillation_sums(
    student: Decoder, batch: dict[str, Array], key: Array, teacher: Decoder
) -> tuple[Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """The weighted sum of the divergence over a batch, and what is logged beside it."""
    ctx = Context(batch["positions"], batch["segments"], key=key)
    h, g = (model.hidden(batch["tokens"], ctx) for model in (student, teacher))
    kl, hit = kl_divergence(student, h, teacher, jax.lax.stop_gradient(g), batch["targets"])
    total = jnp.sum(kl * batch["loss_weights"])
    return total, {"kl": real_mean(kl, batch), "answer_accuracy": hits(hit, batch)}


def kl_divergence(
    student: Decoder,
    h: Float[Array, "B T D"],
    teacher: Decoder,
    g: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Each token's KL(teacher || student) in nats, and whether the target is the student's
    likeliest token. `h` and `g` are what the heads of student and teacher read."""
    tokens = ("batch", "length")
    kernels = [
        place(kernel.astype(h.dtype), None, "vocab")
        for kernel in (student.head_kernel(), jax.lax.stop_gradient(teacher.head_kernel()))
    ]

    def per_token(head, teacher_head, h, g, targets):
        def divergence(h, g, targets):
            logits = head_logits(h, head)
            log_q = jax.nn.log_softmax(logits)
            log_p = jax.nn.log_softmax(head_logits(g, teacher_head))
            kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
            return kl, (pick(logits, targets) >= jnp.max(logits, axis=-1)).astype(jnp.float32)

        return in_slices(divergence, head.shape[1], h, g, targets)

    return over_mesh(
        per_token,
        in_axes=((None, "vocab"),) * 2 + ((*tokens, None),) * 2 + (tokens,),
        out_axes=((tokens, targets.shape),) * 2,
        cut=RULES.batch + RULES.length,
    )(*kernels, h, g, place(targets, *tokens))
