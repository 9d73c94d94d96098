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

    row: str
    column: str
    form: str
    unit: float = 1.0


FIGURES = {
    "zeros": Figure("", "zeros", ".2%"),
    "saved_bytes": Figure("MB", "MB", ",.1f", 1e6),
    "bits_per_byte": Figure("bits per byte", "bits/byte", ".4f"),
    "perplexity": Figure("perplexity", "perplexity", ",.2f"),
    "standard_error": Figure("", "s.e.", ",.2f"),  # of the perplexity
    "rise": Figure("", "rise", "+,.1%"),
    "kl": Figure("KL from dense (nats)", "KL", ".4f"),
    "kl_99": Figure("", "KL 99%", ".3g"),  # of tokens, for a report
    "top1_agreement": Figure("top-1 agreement", "agreement", ".2%"),
    "loss_change": Figure("loss over dense (nats)", "", "+.4f"),  # paired by window
    "loss": Figure("loss (nats per token)", "", ".4f"),
    "task": Figure("", "", ".4f"),  # of lm-eval
}
ROWS = "bits_per_byte", "perplexity", "kl", "top1_agreement", "loss_change"  # of a test set


def shown(name: str, value: float | None, spread: float | None = None) -> str:
    """Return a figure as it is printed, and `±` its spread if it has one; "" if it is missing."""
    figure = FIGURES[name]
    if value is None or value != value:
        return ""
    text = format(value / figure.unit, figure.form)
    has_spread = spread is not None and math.isfinite(spread)  # nan for a single window
    return f"{text} ± {spread / figure.unit:{figure.form.strip('+')}}" if has_spread else text


def with_error(test: Mapping[str, Any], name: str) -> str:
    """Return a figure of a test set with its standard error, if it has one."""
    error = "standard_error" if name == "perplexity" else f"{name}_standard_error"
    return shown(name, test.get(name), test.get(error))


def figures_table(results: Mapping[str, Any]) -> str:
    """Return the table of figures, with a column for each model: dense, before training, this."""
    table: dict[str, list[str]] = {}

    def add(row: str, dense: str, own: str, early: str = "") -> None:
        table[row] = [dense, own, early]

    untrained = results.get("recovery", {}).get("before", {}) if is_trained(results) else {}
    for test in results["evaluation"]:
        name, dense = escape(test["name"]), dict(test.get("dense") or {})
        early = dict(untrained.get(test["name"]) or {})
        if "compared_perplexity" in test:
            values = [each.pop("perplexity", None) for each in (dense, early)]
            values.insert(1, test["compared_perplexity"])
            row = f"{name}, perplexity on {test['compared_windows']} windows"
            add(row, *(shown("perplexity", value) for value in values))
        for key in ROWS:
            if key in test:
                row = f"{name}, {FIGURES[key].row}"
                add(row, *(with_error(each, key) for each in (dense, test, early)))
        if of_tokens := test.get("kl_of_tokens"):
            values = ", ".join(f"{value:.3g}" for value in of_tokens.values())
            add(f"{name}, KL of tokens: {', '.join(of_tokens)}", "", values)
    for answers in results.get("answers", []):
        words = {"ended": "answers that end", "in_language": "answers in the language"}
        words |= {"tokens": f"tokens of an answer, at most {answers['limit']}"}
        models = [answers.get("dense"), answers.get("model")]
        for key, each in words.items():
            of = f", of {answers['prompts']}" * (key != "tokens")
            cells = (f"{one[key]:.0f}" if one else "" for one in models)
            add(f"{escape(answers['test'])}, {each}{of}", *cells)
    if "saved_bytes" in results:
        sizes = results.get("dense_bytes"), results["saved_bytes"]
        add("MB", *(shown("saved_bytes", size) for size in sizes))
    places = (0, 2, 1) if any(early for *_, early in table.values()) else (0, 1)
    rows = {"": ("dense", "this model", "before training")} | table
    head, *body = ([row, *(cells[place] for place in places)] for row, cells in rows.items())
    return padded_table(head, body)


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
