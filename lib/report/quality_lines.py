"""What a pruned model can still do, and how it writes, in lines for the terminal."""

from __future__ import annotations

from lib.report.results import AbilityRecord, FidelityRecord
from lib.util.terminal import one_line

FIGURES = {  # {figure of a fidelity record: what it is a share of}
    "language": "of the lines in its language",
    "foreign_script": "of the letters in foreign scripts",
    "known_words": "of the words in the train text",
    "repeated_4grams": "of the 4-grams repeated",
    "distinct_2grams": "of the 2-grams distinct",
}


def ability_line(record: AbilityRecord) -> str:
    """Shares right and said, beside the dense model's, and the answers that flipped."""
    model, dense = record["model"], record.get("dense")
    parts = []
    for key, word in (("accuracy", "right"), ("said", "said")):
        if key in model:
            part = f"{model[key]:.1%} {word}"
            parts.append(part + (f" (dense {dense[key]:.1%})" if dense else ""))
    if dense:
        flips = record["flips"]
        parts.append(f"{flips['lost']} lost, {flips['gained']} gained, p {flips['p']:.2g}")
    name = f"{one_line(record['text'])}, {record['name']}, {record['questions']} questions"
    return f"{name}: {', '.join(parts)}"


def fidelity_line(record: FidelityRecord) -> str:
    """Figures of the completions, beside those of the dense model's."""
    parts = []
    for key, words in FIGURES.items():
        value, dense = record["model"][key], record.get("dense", {}).get(key)
        if value is not None:
            part = f"{value:.1%} {words}"
            parts.append(part + (f" (dense {dense:.1%})" if dense is not None else ""))
    return f"{one_line(record['text'])}, {record['beginnings']} completions: {', '.join(parts)}"
