"""The questions of `--abilities` and `--pairs`, which both models answer.

abilities = Abilities(job)
abilities.answer("dense", dense_runner, state_device)   # before pruning
abilities.answer("model", runner, state_device)
abilities.records()                                     # for results.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lib.model.blocks import BlockRunner
    from lib.quality.abilities import Ability
    from lib.quality.scoring import Scores
    from lib.run.job import Job


class Abilities:
    """Holds the questions of a run and each model's scores; it is empty without the flags."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.scores: dict[str, list[Scores]] = {}  # {"dense" or "model": scores of each ability}
        self.abilities = _make_abilities(job)

    def answer(self, name: str, runner: BlockRunner, state_device: torch.device) -> None:
        """Score the model of `runner` on all questions.

        `name` is `dense` for the dense model, whose scores all runs of a sweep share, or `model`
        for the pruned one.
        """
        from lib.quality.questions import digest

        if not self.abilities:
            return

        def run() -> list[Scores]:
            with self.job.timed("abilities"):
                return self._answer(runner, state_device)

        digests = [digest(ability.questions) for ability in self.abilities]
        key = (*self.job.dense_key, "abilities", self.job.texts.bos, digests)
        is_dense = name == "dense"
        self.scores[name] = self.job.cache.dense_outputs(key, run) if is_dense else run()

    def records(self) -> list[dict[str, Any]]:
        """Return a record for each ability that the pruned model was scored on."""
        from lib.quality.abilities import ability_record

        pruned_scores = self.scores.get("model")
        if not pruned_scores:
            return []
        dense_scores = self.scores.get("dense") or [None] * len(self.abilities)
        return [
            ability_record(ability, pruned, dense)
            for ability, pruned, dense in zip(
                self.abilities, pruned_scores, dense_scores, strict=True
            )
        ]

    def _answer(self, runner: BlockRunner, state_device: torch.device) -> list[Scores]:
        from lib.model.pretrained import default_bos_id
        from lib.util.progress import progress

        job = self.job
        bos = job.texts.bos
        if bos is None and job.args.bos == "auto":
            bos = default_bos_id(job.tokenizer)
        total = sum(len(ability.questions) for ability in self.abilities)
        with progress(total, "abilities", "question", job.dist.is_main) as bar:
            return [
                ability.score(
                    runner,
                    job.tokenizer,
                    bos=bos,
                    batch_tokens=job.batch_size * job.seqlen,
                    dist=job.dist,
                    state_device=state_device,
                    on_progress=bar,
                )
                for ability in self.abilities
            ]


def _make_abilities(job: Job) -> list[Ability]:
    """Make the questions from the test documents, and from the file of --pairs."""
    from lib.data.documents import open_documents
    from lib.data.windows import test_documents
    from lib.quality.abilities import abilities_of, pairs_ability

    abilities: list[Ability] = []
    for source in job.tests if job.args.abilities else ():
        with open_documents(source, "test") as (documents, _):
            texts = test_documents(source, documents)
            kinds = abilities_of(source.name, list(texts), job.question_seed)
        abilities += kinds
        if job.dist.is_main:
            counts = [f"{len(kind.questions)} of {kind.name}" for kind in kinds]
            print(f"abilities {source.name}: questions {', '.join(counts) or 'none'}", flush=True)
    if job.args.pairs:
        abilities.append(pairs_ability(job.args.pairs))
    return abilities
