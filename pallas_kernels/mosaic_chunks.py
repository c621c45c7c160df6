"""What the Mosaic TPU kernels of recurrences share: weights of chunks and heads, and a chunk."""

import jax.numpy as jnp

from pallas_kernels.mosaic_tpu import LANES, as_column, unknown_zero


class Weights:
    """Of a plan: the rows of its array of weights, a group of `heads` for each name in `_groups`,
    the last of them, `first`, one row for all: of the documents' first tokens, if packed."""

    @property
    def block(self):
        """Tokens of a grid step."""
        return self.chunk * self.chunks

    def row(self, name, head=0):
        return self._groups.index(name) * self.heads + head

    @property
    def rows(self):
        return self.row("first") + self.packed


class Chunk:
    """One chunk of a grid step: its part of the arrays and of the scratch, its heads' weights.

    Weights are rows (tokens are lanes) or columns (tokens are sublanes, repeated in all lanes).
    """

    def __init__(self, plan, index, rows_ref, scratch):
        self.plan, self.index, self.rows = plan, index, rows_ref.at[0, index, 0]
        self.tokens = slice(index * plan.chunk, (index + 1) * plan.chunk)
        self.again = unknown_zero()  # loads by it are not shared with those by 0
        self.scratch = {name: ref.at[self.again + index % ref.shape[0]]
                        for name, ref in scratch.items()}

    def at(self, head, width, block=0):
        return block, self.tokens, slice(head * width, (head + 1) * width)

    def row(self, name, head=0):
        at = self.plan.row(name, head)
        return self.rows[at:at + 1]

    def keep(self, head):
        return self.row("keep", head)[:, :1]

    def make_column(self, name, head=0):
        self.scratch["columns"][self.plan.row(name, head)] = as_column(self.row(name, head))

    def column(self, name, head, width):
        column = self.scratch["columns"][self.plan.row(name, head)]
        if width <= LANES:
            return column[:, :width]
        return jnp.concatenate([column] * (width // LANES), axis=1)

    def log_decay(self, head):
        """From token to token, [C, C], also where it is later: of the columns `total` and, if
        exact, `rest`."""
        C = self.plan.chunk
        difference = self.column("total", head, C) - self.row("total", head)
        if self.plan.exact:
            difference += self.column("rest", head, C) - self.row("rest", head)
        return difference
