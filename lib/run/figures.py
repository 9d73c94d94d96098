"""The figures of a run: how each is printed, and the table of them in a log, a card and a summary.

A report over runs prints the same figures in columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..util.errors import first_of
from ..util.markdown import escape, padded_table
from .plan import PRUNED_BEFORE
from .results import is_trained


class Figure(NamedTuple):
    """How a figure is printed; `row` and `column` are its names in the tables of runs."""

    row: str  # {}: the model that it is compared with
    column: str
    form: str
    unit: float = 1.0


FIGURES = {
    "zeros": Figure("", "zeros", ".2%"),
    "seeds": Figure("", "seeds", ".0f"),
    "saved_bytes": Figure("MB", "MB", ",.1f", 1e6),
    "bits_per_byte": Figure("bits per byte", "bits/byte", ".4f"),
    "perplexity": Figure("perplexity", "perplexity", ",.2f"),
    "standard_error": Figure("", "s.e.", ",.2f"),  # of the perplexity
    "rise": Figure("", "rise", "+,.1%"),
    "kl": Figure("KL from {} (nats)", "KL", ".4f"),
    "top1_agreement": Figure("top-1 agreement", "agreement", ".2%"),
    "loss_change": Figure("loss over {} (nats)", "", "+.4f"),  # paired by window
    "task": Figure("", "", ".4f"),  # of lm-eval
}
ROWS = "bits_per_byte", "perplexity", "kl", "top1_agreement", "loss_change"  # of a test set
# columns of its table; DENSE_COLUMN is the first without figures of the original
FIRST_COLUMN, DENSE_COLUMN, TRIMMED_COLUMN = "original", "dense", "trimmed"
EARLY_COLUMN, OWN_COLUMN = "before training", "this model"


def shown(name: str, value: float | None, spread: float | None = None) -> str:
    """Return a figure as it is printed, and `±` its spread if it has one; "" if it is missing."""
    figure = FIGURES[name]
    if value is None or value != value:
        return ""
    text = format(value / figure.unit, figure.form)
    has_spread = spread is not None and math.isfinite(spread)  # nan for a single window
    return f"{text} ± {spread / figure.unit:{figure.form.strip('+')}}" if has_spread else text


def figures_table(
    results: Mapping[str, Any],
    original: Mapping[str, Any] | None = None,
    more: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Return the table of figures, with a column for each model: FIRST, or DENSE, to OWN_COLUMN.

    `original` are the results of a run on the original model. If the vocabulary was trimmed then,
    the dense model is the trimmed one, and has a column of its own, unless nothing else was done.
    `more` are further rows: {row: {column: cell}}.
    """
    first = FIRST_COLUMN if original else DENSE_COLUMN
    compares, dense = any("dense" in test for test in results["evaluation"]), first
    if original and results.get("vocabulary"):
        dense = TRIMMED_COLUMN if compares else OWN_COLUMN
    table: dict[str, dict[str, str]] = {}

    def add(row: str, cells: Mapping[str, str]) -> None:
        table.setdefault(row, {}).update({name: cell for name, cell in cells.items() if cell})

    untrained = results.get("recovery", {}).get("before", {}) if is_trained(results) else {}
    of_original = {test["name"]: test for test in (original or {}).get("evaluation", [])}
    for test in results["evaluation"]:
        name, reference = escape(test["name"]), dict(test.get("dense") or {})
        before = dict(untrained.get(test["name"]) or {})
        if "compared_perplexity" in test:
            row = f"{name}, perplexity on {test['compared_windows']} windows"
            compared = {dense: reference.pop("perplexity")}
            compared |= {EARLY_COLUMN: before.pop("perplexity", None)}
            compared |= {OWN_COLUMN: test["compared_perplexity"]}
            add(row, {each: shown("perplexity", value) for each, value in compared.items()})
        models = {first: of_original.get(test["name"], {})}
        models[dense] = models.get(dense, {}) | reference
        models |= {EARLY_COLUMN: before, OWN_COLUMN: test}
        for key in ROWS:
            if key in test:
                cells = {each: _with_error(one, key) for each, one in models.items()}
                add(f"{name}, {FIGURES[key].row.format(dense)}", cells)
    for answers in results.get("answers", []):
        words = {"ended": "answers that end", "in_language": "answers in the language"}
        words |= {"tokens": f"tokens of an answer, at most {answers['limit']}"}
        for key, each in words.items():
            of = f", of {answers['prompts']}" * (key != "tokens")
            models = {dense: answers.get("dense"), OWN_COLUMN: answers.get("model")}
            cells = {name: f"{one[key]:.0f}" for name, one in models.items() if one}
            add(f"{escape(answers['test'])}, {each}{of}", cells)
    if "saved_bytes" in results:
        sizes = {first: (original or results).get("dense_bytes")}
        sizes |= {dense: results.get("dense_bytes"), OWN_COLUMN: results["saved_bytes"]}
        add("MB", {name: shown("saved_bytes", size) for name, size in sizes.items() if size})
    for row, cells in (more or {}).items():
        add(row, cells)
    used = {name for cells in table.values() for name in cells} | {first, OWN_COLUMN}
    order = [name for name in (first, TRIMMED_COLUMN, EARLY_COLUMN, OWN_COLUMN) if name in used]
    body = [[row, *(cells.get(name, "") for name in order)] for row, cells in table.items()]
    return padded_table(["", *order], body)


def _with_error(figures: Mapping[str, Any], key: str) -> str:
    error = "standard_error" if key == "perplexity" else f"{key}_standard_error"
    return shown(key, figures.get(key), figures.get(error))


def notes(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on the changes to the model."""
    zeros = results.get("sparsity", {}).get("overall")
    before = results["flags"].get("eval_only") or is_pruned_before(results)
    if smaller := results.get(kind := results["sparsity_type"]):
        share = smaller["weights_after"] / smaller["weights_before"]
        yield f"Each block has {smaller['after']} of its {smaller['before']} {kind}, all dense."
        yield f"Share of the blocks' weights that is left: {share:.4f}."
    elif zeros and (kind or before):
        yield f"Share of zeros in the blocks' weights: {zeros:.4f}."
    if vocabulary := results.get("vocabulary"):
        of = f" of {vocabulary['model']}" if "model" in vocabulary else ""
        yield f"{vocabulary['rows']:,} of {vocabulary['rows_before']:,} rows of the vocabulary{of}."
        yield vocabulary["note"]
    yield from results.get("notes", [])
    quantized = results.get("quantized", {})
    by_type: dict[str, list[str]] = {}
    for name, kind in quantized.get("types", {}).items():
        by_type.setdefault(kind or "16 bits", []).append(name)
    for kind, names in by_type.items():
        yield f"Tensors as {kind} ({len(names)}): {first_of(names)}."
    if (left := quantized.get("left")) and not by_type:
        yield f"Linear layers at 16 bits (rows are not a multiple of 32): {first_of(left)}."
    if "recovery" in results and not is_trained(results):
        yield "Training did not help; the model before it was kept."


def is_pruned_before(results: Mapping[str, Any]) -> bool:
    """Return whether the run trained a model that an earlier one had pruned."""
    return "recovery" in results and results["method"] == PRUNED_BEFORE
