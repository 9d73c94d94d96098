"""Language-specific pruning of causal language models."""

__version__ = "0.3.0"
