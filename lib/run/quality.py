"""Comparisons of the pruned model with the dense one besides perplexity.

quality = Quality(job, loaded)
quality.measure("dense", runner)          # before pruning
quality.measure("model", loaded.runner)
quality.records()                         # for results.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib.run.abilities import Abilities
from lib.run.fidelity import Fidelity

if TYPE_CHECKING:
    from lib.model.blocks import BlockRunner
    from lib.run.job import Job, LoadedModel


class Quality:
    """Measures `--abilities`, `--pairs` and `--fidelity` of a run."""

    def __init__(self, job: Job, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.abilities = Abilities(job)
        self.fidelity = Fidelity(job, loaded)

    def measure(self, name: str, runner: BlockRunner) -> None:
        """Score the model of `runner` on the questions, and let it continue texts.

        `name` is `dense` for the dense model, or `model` for the pruned one.
        """
        self.abilities.answer(name, runner, self.loaded.state_device)
        self.fidelity.generate(name, runner.model)

    def records(self) -> dict[str, Any]:
        """Return the records `abilities` and `fidelity`, as far as they were measured."""
        measured = {"abilities": self.abilities.records(), "fidelity": self.fidelity.records()}
        return {name: records for name, records in measured.items() if records}
