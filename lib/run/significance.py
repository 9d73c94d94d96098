"""Significance of a mean: intervals over documents and seeds, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from scipy import stats

LEVEL = 0.95


class MeanInterval(NamedTuple):
    """A mean, its interval, and the p-value for a mean of 0; nan if there is one document."""

    mean: float
    low: float
    high: float
    p: float
    documents: int
    seeds: int


def mean_interval(values: ndarray, documents: ndarray) -> MeanInterval:
    """Return the mean of values (seeds, windows) and its 95% interval, by Student's t.

    `documents` (windows,) numbers the document of each window. Documents and seeds are samples, and
    their variances are added:

    - Documents, since windows of one document are alike: the cluster-robust variance of a mean
      after averaging over seeds, G / (G - 1) * sum over documents of (sum of their windows'
      residuals)^2 / windows^2. G = windows^2 / (sum over documents of their windows^2) is the
      effective number of documents (Kish), with G - 1 degrees of freedom. For equally long
      documents this is the variance of the mean of their means.
    - Seeds: (variance of the means of each seed) / seeds, with seeds - 1 degrees of freedom. With a
      single seed it is unknown, and the interval holds for that draw only.

    Variation of single windows is in both, so the interval is rather too wide. The sum has the
    degrees of freedom of Welch and Satterthwaite. A single document gives no interval.
    """
    seeds, windows = values.shape
    mean = values.mean()
    _, numbers, lengths = np.unique(documents, return_inverse=True, return_counts=True)
    count = len(lengths)
    if count < 2:
        return MeanInterval(float(mean), nan, nan, nan, count, seeds)
    effective = windows**2 / (lengths**2).sum()
    sums = np.bincount(numbers, values.mean(0) - mean)  # (documents,)
    parts = [(effective / (effective - 1) * (sums**2).sum() / windows**2, effective - 1)]
    if seeds > 1:
        parts.append((values.mean(1).var(ddof=1) / seeds, seeds - 1))
    variance = sum(part for part, _ in parts)
    if not variance:  # all values are equal
        return MeanInterval(*[float(mean)] * 3, float(mean == 0), count, seeds)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    student = stats.t(freedom, scale=variance**0.5)
    half, p = student.ppf((1 + LEVEL) / 2), 2 * student.sf(abs(mean))
    return MeanInterval(*map(float, (mean, mean - half, mean + half, p)), count, seeds)


def holm(p: Sequence[float]) -> ndarray:
    """Return the p-values corrected for the number of tests (Holm, 1979).

    A nan is not a test, and stays.
    """
    p = np.asarray(p, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # nan is last
    adjusted = np.full(len(p), nan)
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1)
    return adjusted
