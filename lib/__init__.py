"""Language-specific pruning of causal language models; `from langprune import prune`."""

__version__ = "0.3.0"


def __getattr__(name: str) -> object:
    """Import `prune` where it is first asked for: torch takes seconds to import."""
    if name == "prune":
        from importlib import import_module

        return import_module(".prune", __name__)
    raise AttributeError(f"module {__name__} has no attribute {name}")
