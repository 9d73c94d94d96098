"""Language-specific pruning of causal language models; `from langprune.prune import prune`."""

__version__ = "0.4.0"
