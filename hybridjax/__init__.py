"""hybridjax: long-context language models whose layers mix kinds of attention."""

__version__ = "0.1.0"
