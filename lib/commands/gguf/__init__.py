"""Converts a saved folder to GGUF for llama.cpp and ollama, and proves that both agree."""

from ...formats.registry import FILES

# largest distances from the model; with one matrix 10% too large it is 0.08, with other weights 1.4
LIMITS = {"f32": 0.01, "f16": 0.05, "bf16": 0.2}  # other types have theirs
INSTALL = "pip install -r requirements-gguf.txt"


def types() -> list[str]:
    """Return the types of --type."""
    return [*LIMITS, *FILES]


def limit_of(type_: str) -> float:
    """Return the largest distance between predictions in a type and the model's."""
    return LIMITS.get(type_) or FILES[type_].limit
