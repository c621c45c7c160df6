"""One file per benchmark; each takes a model and returns plain numbers."""
