"""What a trimmed vocabulary costs: bits per byte of both models on the same passages of text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

COSTS = "bits_per_byte_original", "bits_per_byte_trimmed", "cost_interval"  # in a record


def record_cost(
    record: dict[str, Any], original: np.ndarray, trimmed: np.ndarray, n_bytes: int
) -> None:
    """Record COSTS by both models' losses on the same windows, (n,) each, in nats.

    The interval is that of a ratio of sums over independent windows (Cochran, Sampling Techniques,
    1977, section 6.4), with an approximation of Student's t; None for few windows.
    """
    ratio, whole, freedom = trimmed.sum() / original.sum(), original.sum(), len(original) - 1
    interval, bits = None, whole / math.log(2) / n_bytes
    if freedom > 2:
        spread = np.square(trimmed - ratio * original).sum() * len(original) / freedom
        half = math.sqrt(spread) * (1.96 + 2.37 / freedom + 2.82 / freedom**2) / whole
        interval = [float(ratio - 1 - half), float(ratio - 1 + half)]
    record |= zip(COSTS, (float(bits), float(bits * ratio), interval), strict=True)


def cost_line(record: dict[str, Any], n_bytes: int, text: str) -> str:
    """Return a line on the cost in a record, measured on so many bytes of `text`."""
    original, trimmed, interval = (record[name] for name in COSTS)
    between = " (95% interval {:+.2%} to {:+.2%})".format(*interval) if interval else ""
    return (
        f"trimming costs {trimmed / original - 1:+.2%} bits per byte{between} on {n_bytes:,} bytes "
        f"of {text}: original {original:.4f}, trimmed {trimmed:.4f}"
    )
