"""Abilities of a model, measured on questions from plain text: it chooses an option, or says it.

    abilities = [*abilities_of("uk", texts, seed=0), pairs_ability("pairs.jsonl")]
    scores = abilities[0].score(runner, tokenizer, bos=None, batch_tokens=1024)
    ability_record(abilities[0], scores, dense_scores)

A pruned model often still finds the right option the likeliest but no longer says it (arXiv
2606.17609), so both are measured; and answers that flip against the dense model's show what equal
accuracies hide (arXiv 2407.09141).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.quality.questions import Question, continuations, digest, last_words, read_pairs
from lib.quality.scoring import Scores, score
from lib.quality.statistics import mcnemar, wilson_interval


@dataclass(frozen=True)
class Ability:
    """Questions of one kind about one text."""

    text: str  # name of the test set, or of the file
    name: str
    questions: list[Question]
    per_byte: bool = False  # its options differ in length
    says: bool = False  # its options are short enough for greedy decoding

    @property
    def score(self) -> partial[Scores]:
        """A function that scores a model, with the other arguments of `scoring.score`."""
        return partial(score, questions=self.questions, per_byte=self.per_byte)


def abilities_of(name: str, texts: Sequence[str], seed: int) -> list[Ability]:
    """Return the abilities that the documents of one test set have questions for.

    A kind without questions is left out, as in a language that does not separate its words.
    """
    kinds = [
        Ability(name, "last word", last_words(texts, seed), says=True),
        Ability(name, "continuation", continuations(texts, seed), per_byte=True),
    ]
    return [ability for ability in kinds if ability.questions]


def pairs_ability(path: str) -> Ability:
    """Return the ability of a file's pairs. Raises UserError if it holds none."""
    return Ability(Path(path).stem, "pairs", read_pairs(path))


def ability_record(ability: Ability, pruned: Scores, dense: Scores | None) -> dict[str, Any]:
    """Return the results.json record: shares of both models, and which answers flipped."""
    options = len(ability.questions[0].options)
    record: dict[str, Any] = {
        "text": ability.text,
        "name": ability.name,
        "questions": len(ability.questions),
        "digest": digest(ability.questions),
        "chance": 1 / options,
        "model": _shares(ability, pruned),
    }
    if dense is not None:
        record |= {"dense": _shares(ability, dense), "flips": _flips(dense.chosen, pruned.chosen)}
        if ability.says:
            record["said_flips"] = _flips(dense.said, pruned.said)
    return record


def _shares(ability: Ability, scores: Scores) -> dict[str, Any]:
    """Return the accuracy, and the share of answers said, with their 95% intervals."""
    record: dict[str, Any] = {}
    kinds = {"accuracy": scores.chosen} | ({"said": scores.said} if ability.says else {})
    for name, right in kinds.items():
        count = int(right.sum())
        record[name] = count / len(right)
        record[f"{name}_interval"] = list(wilson_interval(count, len(right)))
    return record


def _flips(dense: Tensor, pruned: Tensor) -> dict[str, Any]:
    """Count the questions that only one of two models has right, with McNemar's p-value."""
    lost, gained = int((dense & ~pruned).sum()), int((pruned & ~dense).sum())
    return {"lost": lost, "gained": gained, "p": mcnemar(lost, gained)}
