"""A hub without a network."""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict

import lib.data.hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with one commit; `hub.sets` are what load_dataset gives, `hub.calls` what it got.

    hub.sets[id, config] = {split: {column: values}}, without the config where none is named; a
    split may also be a set that is streamed. `hub.error` is what load_dataset raises,
    `hub.unreachable` what the hub's client does when it is asked for the commit.
    """
    hub = SimpleNamespace(sets={}, calls=[], error=None, unreachable=None)

    def load_dataset(*args, **options):
        hub.calls.append((args, options))
        if hub.error:
            raise hub.error
        sets = {
            split: Dataset.from_dict(given) if isinstance(given, dict) else given
            for split, given in hub.sets[args].items()
        }
        if not options.get("streaming"):
            return DatasetDict(sets)
        return {
            split: rows.to_iterable_dataset() if isinstance(rows, Dataset) else rows
            for split, rows in sets.items()
        }

    def dataset_info(self, name, timeout):
        if hub.unreachable:
            raise hub.unreachable
        return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr(lib.data.hub, "load", lib.data.hub.load.__wrapped__)  # never remembered
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return hub
