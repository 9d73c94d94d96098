"""Compare what two files predict in llama.cpp, of which one has fewer tokens."""

from __future__ import annotations

import math
from contextlib import closing
from typing import Any

import numpy as np

from ..gguf.llama import Llama, normalizers


def compare(
    before: str, after: str, windows: list[list[list[int]]], kept: list[int], places: int
) -> dict[str, Any]:
    """Compare the log-probabilities of two files; `kept` are the rows of the second in the first.

    `windows` are pairs of the same text's ids in both. Returns the losses of each window in nats
    (`before`, `after`), and the largest `distance` of log-probabilities after `places` beginnings
    with the same tokens in both, after the constant that the removed tokens held.
    """
    rows, losses = np.array(kept), {"before": [], "after": []}
    alike = [i for i, (old, new) in enumerate(windows) if old == rows[new].tolist()]
    chosen: set[tuple[int, int]] = set()  # windows and places
    for number in range(places if alike else 0):
        window = alike[number % len(alike)]
        length = len(windows[window][0])
        turn = number // len(alike) + 1
        chosen.add((window, turn * length // (places // len(alike) + 2)))
    expected: dict[tuple[int, int], np.ndarray] = {}
    distances = [0.0]
    for which, (name, path) in enumerate((("before", before), ("after", after))):
        ids, losses[name] = [pair[which] for pair in windows], [0.0] * len(windows)
        try:
            with closing(Llama(path)) as model:
                for window, begin, logits in model.logits(ids):
                    constants = normalizers(logits)
                    following = ids[window][begin + 1 : begin + 1 + len(logits)]
                    target = logits[np.arange(len(following)), following]
                    losses[name][window] += float((constants[: len(target)] - target).sum())
                    for place, row in enumerate(logits, begin):
                        if (window, place) not in chosen:
                            continue
                        values = row.astype(np.float64)
                        values = values[rows] if which == 0 else values
                        values = values - normalizers(values[None])
                        if which == 0:
                            expected[window, place] = values
                            continue
                        distances.append(np.abs(values - expected[window, place]).max())
        except ValueError as error:
            if which == 0:  # not a fault of the new file
                return {"reason": str(error)}
            raise
    distance = float(np.max(distances))
    if not math.isfinite(distance):
        raise ValueError("llama.cpp's log-probabilities are not finite")
    counts = {"beginnings": len(chosen), "values": len(chosen) * len(rows)}
    return losses | counts | {"distance": distance}
