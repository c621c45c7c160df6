"""What a kernel that keeps queries and the k best of a tile at hand cannot serve."""


def refuse_sizes(landmarks, k: int, *, widest: int, largest_k: int) -> None:
    """Raises NotImplementedError."""
    if landmarks.shape[1] == 0:
        raise NotImplementedError("needs at least one chunk")
    if landmarks.shape[-1] > widest or k > largest_k:
        raise NotImplementedError(f"needs landmarks up to {widest} wide and k up to "
                                  f"{largest_k}, got {landmarks.shape[-1]} and {k}")
