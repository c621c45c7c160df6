"""Text and synthetic tasks -> documents -> packed rows -> batches, on Grain."""
