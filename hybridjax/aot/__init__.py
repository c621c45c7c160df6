"""What a compiled program costs on hardware that is not at hand: the parts of `compile`."""
