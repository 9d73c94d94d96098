"""Whether a difference could be chance: the statistics, against slow references and scipy's."""

from __future__ import annotations

import math

import numpy
import pytest
from scipy import stats

from lib.util.statistics import holm, mean_interval

DOCUMENTS = numpy.repeat(range(6), 3)


def test_documents_of_one_length_are_the_sample() -> None:
    """The published t test over their means, whatever the windows in them."""
    values = numpy.random.default_rng(0).normal(0.1, 0.3, 18)
    found = mean_interval(values[None], DOCUMENTS[::-1])
    slow = stats.ttest_1samp(values.reshape(6, 3).mean(1), 0)
    assert found.p == pytest.approx(slow.pvalue) and found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(slow.confidence_interval()))
    assert (found.documents, found.seeds) == (6, 1)


def test_variances_of_documents_and_seeds_are_added() -> None:
    """A slow reference: loops over documents of several lengths, and Welch's degrees of freedom."""
    values = numpy.random.default_rng(1).normal(0.2, 0.3, (3, 9))
    documents = [0, 0, 0, 0, 1, 1, 2, 3, 3]
    tokens = numpy.array([3, 130, 130, 90, 4, 100, 40, 6, 130])  # that windows count
    each_token = numpy.repeat(values, tokens, axis=1)
    of_token = numpy.repeat(documents, tokens)
    averaged, mean, count = each_token.mean(0), each_token.mean(), tokens.sum()
    effective = count**2 / sum((of_token == each).sum() ** 2 for each in range(4))
    squares = sum((averaged - mean)[of_token == each].sum() ** 2 for each in range(4))
    over_documents = effective / (effective - 1) * squares / count**2
    over_seeds = stats.sem(each_token.mean(1)) ** 2
    total = over_documents + over_seeds
    freedom = total**2 / (over_documents**2 / (effective - 1) + over_seeds**2 / 2)
    found = mean_interval(values, numpy.array(documents), tokens)
    assert found.mean == pytest.approx(mean)
    expected = stats.t.interval(0.95, freedom, mean, math.sqrt(total))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / math.sqrt(total), freedom))


def test_what_cannot_be_told() -> None:
    one_document = mean_interval(numpy.ones((3, 4)), numpy.zeros(4))
    assert one_document.mean == 1 and math.isnan(one_document.p) and math.isnan(one_document.low)
    one_window = mean_interval(numpy.ones((1, 1)), numpy.zeros(1))
    assert one_window.mean == 1 and math.isnan(one_window.high)
    same = mean_interval(numpy.zeros((2, 4)), numpy.arange(4))
    assert (same.low, same.high, same.p) == (0, 0, 1)
    book = mean_interval(numpy.array([[0.1] * 60 + [0.2, 0.3]]), numpy.array([0] * 60 + [1, 2]))
    assert book.p > 0.5  # nearly all of the text is one document
    noise = numpy.random.default_rng(2).normal(0, 0.1, (3, 18))
    shifted = noise + [[0.0], [1.0], [2.0]]  # seeds differ by more than documents do
    assert mean_interval(shifted, DOCUMENTS).p > 0.1 > mean_interval(shifted[2:], DOCUMENTS).p


def test_all_tests_together() -> None:
    found = holm([0.01, 0.04, math.nan, 0.03, 0.005])
    assert found[[0, 1, 3, 4]] == pytest.approx([0.03, 0.06, 0.06, 0.02]) and math.isnan(found[2])
    assert list(holm([0.6, 0.7])) == [1, 1] and not len(holm([]))
