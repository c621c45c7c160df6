"""HALO: a pretrained Transformer becomes a hybrid by stages (arXiv 2601.22156, section 3)."""
