"""GGUF files for llama.cpp and ollama: reading, vocabularies, conversion and proof."""

from __future__ import annotations

from pathlib import Path

from ..formats.registry import FILES
from ..util.errors import UserError

# largest distances from the model; with one matrix 10% too large it is 0.08, with other weights 1.4
LIMITS = {"f32": 0.01, "f16": 0.05, "bf16": 0.2}  # other types have theirs
INSTALL = "pip install -r requirements-gguf.txt"


def types() -> list[str]:
    """Return the types of --type."""
    return [*LIMITS, *FILES]


def limit_of(type_: str) -> float:
    """Return the largest distance between predictions in a type and the model's."""
    return LIMITS.get(type_) or FILES[type_].limit


def check_new(out: Path, named: str) -> None:
    """Raise UserError if OUT is not a *.gguf name, or if it, its record or its card exists."""
    if out.suffix != ".gguf":
        raise UserError(f"OUT {named}", "the name does not end with .gguf", "Give one that does")
    for path in (out, Path(f"{out}.json"), Path(f"{out}.md"), mmproj_of(out)):
        if path.exists() or path.is_symlink():
            raise UserError(f"OUT {named}", f"{path.name} exists", "Name a new file")


def mmproj_of(out: Path) -> Path:
    """Return the file beside OUT for the model's vision or audio part."""
    return out.with_name(f"mmproj-{out.name}")
