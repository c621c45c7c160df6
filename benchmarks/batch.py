"""A batch to time: random tokens, one document per row."""

import numpy as np

from hybridjax.config import Config


def random_batch(config: Config) -> dict[str, np.ndarray]:
    shape = config.batch_size, config.seq_len
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, (shape[0], shape[1] + 1))
    return dict(
        tokens=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        loss_weights=np.ones(shape, np.float32),
        segments=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        answers=np.zeros(shape, np.int32),
    )
