"""A hub without a network."""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict


@pytest.fixture
def hub(monkeypatch):
    """A hub with one commit; `hub.sets` are what load_dataset gives, `hub.calls` what it got.

    hub.sets[id, config] = {split: {column: values}}, without the config where none is named.
    """
    hub = SimpleNamespace(sets={}, calls=[], error=None)

    def load_dataset(*args, **options):
        hub.calls.append((args, options))
        if hub.error:
            raise hub.error
        sets = {split: Dataset.from_dict(columns) for split, columns in hub.sets[args].items()}
        if not options.get("streaming"):
            return DatasetDict(sets)
        return IterableDatasetDict({k: rows.to_iterable_dataset() for k, rows in sets.items()})

    def dataset_info(self, name, timeout):
        return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return hub
