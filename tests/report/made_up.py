"""Results of runs that nobody has run, for tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from lib.run.results import write_losses

LANGUAGES = {"uk": 20.0, "en": 40.0}  # perplexities of the dense model


def results(
    method: str,
    perplexity: dict[str, float | None],
    *,
    on: str | None = None,
    kind: str = "unstructured",
    ratio: float = 0.5,
    digest: str = "d0",
    **more: Any,
) -> dict[str, Any]:
    dense = method == "dense"
    tests = [
        {"name": name, "source": name, "tokens": 576, "windows": 18, "digest": f"{name}-{digest}"}
        | {"perplexity": value, "standard_error": 2.0, "bits_per_byte": value and value / 100}
        for name, value in perplexity.items()
    ]
    return {
        "model": "models/tiny",
        "method": method,
        "sparsity_type": None if dense else kind,
        "sparsity_ratio": None if dense else ratio,
        "flags": {"use_variant": False},
        "seed": 0,
        "calibration": {"name": on, "sources": [{"source": on, "share": 1.0}]} if on else None,
        "evaluation": tests,
        "sparsity": {"overall": 0.0 if dense else ratio, "linears": {}},
        "perplexity": perplexity,
    } | more


def write_run(
    folder: Path, *args: Any, losses: Mapping[str, Any] | None = None, **more: Any
) -> Path:
    """`losses`: {name in the losses file: values}."""
    folder.mkdir(parents=True)
    if losses:
        kinds = {name: torch.int32 if name.endswith("document") else None for name in losses}
        tensors = {name: torch.tensor(each, dtype=kinds[name]) for name, each in losses.items()}
        more |= {"losses": write_losses(folder, tensors)}
    (folder / "results.json").write_text(json.dumps(results(*args, **more)), "utf-8")
    return folder


def cells(axes: Axes) -> list[list[str]]:
    """The figures that stand in a heat map."""
    rows, columns = axes.images[0].get_array().shape
    by_place = {text.get_position(): text.get_text() for text in axes.texts}
    return [[by_place.get((j, i), "") for j in range(columns)] for i in range(rows)]
