"""What a model can still do, from plain text: choose the right option, and say it.

    abilities = [*abilities_of("uk", texts, seed=0), pairs_ability("pairs.jsonl")]
    scores = abilities[0].score(runner, tokenizer, bos=None, batch_tokens=1024)
    ability_record(abilities[0], scores, dense_scores)

A pruned model often still finds the right option the likeliest and no longer says it (arXiv
2606.17609), so both are told; and answers that flip against the dense model's show what equal
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
    says: bool = False  # short enough that greedy decoding may give the right one

    @property
    def score(self) -> partial[Scores]:
        """Scores of a model; takes what `scoring.score` takes besides the questions."""
        return partial(score, questions=self.questions, per_byte=self.per_byte)


def abilities_of(name: str, texts: Sequence[str], seed: int) -> list[Ability]:
    """What can be asked about the documents of one test set; kinds without any question are not
    among it, as in a language that does not part its words."""
    kinds = [
        Ability(name, "last word", last_words(texts, seed), says=True),
        Ability(name, "continuation", continuations(texts, seed), per_byte=True),
    ]
    return [ability for ability in kinds if ability.questions]


def pairs_ability(path: str) -> Ability:
    """The pairs of a file; UserError where it holds none."""
    return Ability(Path(path).stem, "pairs", read_pairs(path))


def ability_record(ability: Ability, own: Scores, dense: Scores | None) -> dict[str, Any]:
    """What stands in results.json: of the model, of the dense one, and which answers flipped."""
    options = len(ability.questions[0].options)
    record: dict[str, Any] = {
        "text": ability.text,
        "name": ability.name,
        "questions": len(ability.questions),
        "digest": digest(ability.questions),
        "chance": 1 / options,
        "model": _shares(ability, own),
    }
    if dense is not None:
        record |= {"dense": _shares(ability, dense), "flips": _flips(dense.chosen, own.chosen)}
        if ability.says:
            record["said_flips"] = _flips(dense.said, own.said)
    return record


def _shares(ability: Ability, scores: Scores) -> dict[str, Any]:
    """Accuracy, and the share said, with their 95% intervals."""
    record: dict[str, Any] = {}
    kinds = {"accuracy": scores.chosen} | ({"said": scores.said} if ability.says else {})
    for name, right in kinds.items():
        count = int(right.sum())
        record[name] = count / len(right)
        record[f"{name}_interval"] = list(wilson_interval(count, len(right)))
    return record


def _flips(dense: Tensor, own: Tensor) -> dict[str, Any]:
    """Questions that only the dense model, or only the other one, has right; McNemar's p."""
    lost, gained = int((dense & ~own).sum()), int((own & ~dense).sum())
    return {"lost": lost, "gained": gained, "p": mcnemar(lost, gained)}
