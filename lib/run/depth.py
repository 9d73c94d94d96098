"""How the error grows with depth: the divergence from the dense model after each pruned block.

depth = Depth(job, loaded, runner)  # of the dense model, before it is pruned
depth.after_block()                 # called when a block was pruned, the later ones still dense
depth.records()                     # for results.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib.run.job import Job, LoadedModel

if TYPE_CHECKING:
    from lib.model.blocks import BlockRunner
    from lib.report.results import DepthRecord

WINDOWS = 4  # of each test set: every block takes them through the whole model


class Depth:
    """Measures the model whenever one more of its blocks was pruned."""

    def __init__(self, job: Job, loaded: LoadedModel, dense: BlockRunner) -> None:
        from lib.quality.reference import DenseReference, dense_states, tail_of

        self.job, self.loaded = job, loaded
        self.windows = [test.windows[:WINDOWS] for test in job.texts.tests]
        with job.timed("depth"):
            states = dense_states(
                dense,
                self.windows,
                job.batch_size,
                dist=job.dist,
                state_device=loaded.state_device,
            )
        self.reference = DenseReference(tail_of(dense), states)
        self.measured: list[DepthRecord] = [
            {"name": test.facts["name"], "windows": len(windows), "kl": [], "top1_agreement": []}
            for test, windows in zip(job.texts.tests, self.windows, strict=True)
        ]

    def after_block(self) -> None:
        """Compare the model as it is now with the dense one."""
        from lib.eval import perplexities

        with self.job.timed("depth"):
            measured = perplexities(
                self.loaded.runner,
                self.windows,
                self.job.batch_size,
                dist=self.job.dist,
                state_device=self.loaded.state_device,
                reference=self.reference,
            )
        for record, figures in zip(self.measured, measured, strict=True):
            record["kl"].append(figures.divergence.kl)
            record["top1_agreement"].append(figures.divergence.top1_agreement)

    def records(self) -> list[DepthRecord]:
        """Return for each test set the figures after each block, the first block first."""
        return self.measured
