"""The model card of a pruned model: README.md with the hub's head of metadata."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from lib.data.sources import BUILT_IN
from lib.methods.sparsity import UNSTRUCTURED
from lib.report.completion_tables import completions_of_run

LANGUAGE_OF_SET = {"ubertext": "uk", "c4": "en", "wikitext2": "en"}


def model_card(results: dict[str, Any], sources: list[str]) -> str:
    """Markdown that tells how the model was pruned, on what, and what it cost.

    `sources`: the names of the texts that it was calibrated on, none where no text was looked at.
    """
    model, method = results["model"], results["method"]
    kind = results["sparsity_type"]
    vocabulary, packed = results.get("vocabulary"), results["flags"]["replace_sparse_layers"]
    trims = results["flags"].get("trim_vocabulary")
    if kind is None:
        how = "its sparse linears packed" if packed else "its vocabulary trimmed"
    elif kind == UNSTRUCTURED:
        how = f"pruned by {method} to {100 * results['sparsity_ratio']:g}% zeros"
    else:
        how = f"pruned by {method} to {kind}"
    recovery = results.get("recovery")
    if recovery:
        how = "a pruned model recovered" if kind is None else f"{how} and recovered"
    if trims and "vocabulary" not in how:
        how += ", its vocabulary trimmed"
    on_hub = is_hub_id(model)
    sparse = bool(kind or recovery or packed)
    first = "bits per byte | perplexity" if vocabulary else "perplexity"
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=model if on_hub else None,
        language=languages_of(sources) or None,
        tags=[*(["pruned", "sparse"] if sparse else []), *([method] if kind else [])],
    )
    lines = [
        "---",
        head.to_yaml(),
        "---",
        f"# {model if on_hub else Path(model).name}, {how}",
        "",
        *(_sparse(results) if sparse else []),
        *(_vocabulary(vocabulary) if vocabulary else []),
        *(_told(results) if sparse else []),
        f"| test text | {first} | tokens |",
        "|---|---|---|---|" if vocabulary else "|---|---|---|",
        *[_measured(test, bool(vocabulary)) for test in results["evaluation"]],
        "",
        *(_completions(results) if results.get("completions") else []),
        *(_recovery(results) if recovery else []),
        *(_packed(results) if packed else []),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _sparse(results: dict[str, Any]) -> list[str]:
    return [
        "Linear layers of the decoder blocks are sparse; embeddings and the output head are dense. "
        f"Zeros among the blocks' weights: {results['sparsity']['overall']:.4f}.",
        "",
    ]


def _vocabulary(vocabulary: dict[str, Any]) -> list[str]:
    """What is left of the tokens, and how other texts than the chosen ones fare."""
    sources = ", ".join(Path(source).name for source in vocabulary.get("sources", []))
    chosen = f", those that the texts of {sources} use" if sources else ""
    lines = [
        f"Of {vocabulary['rows_before']} rows of its vocabulary {vocabulary['rows']} are left"
        f"{chosen}. Other text is cut into more tokens, and reads the same.",
        "",
        vocabulary["note"],
        "",
    ]
    tests = vocabulary.get("tests", [])
    if tests:
        lines += ["| test text | documents cut alike | rise in tokens |", "|---|---|---|"]
    for test in tests:
        alike = f"{test['alike']} of {test['documents']}"
        lines.append(f"| {test['name']} | {alike} | {test['rise']:+.2%} |")
    return [*lines, ""] if tests else lines


def _measured(test: dict[str, Any], bits: bool) -> str:
    figures = [test["bits_per_byte"]] if bits else []
    cells = [test["name"], *(f"{value:.4f}" for value in (*figures, test["perplexity"]))]
    return f"| {' | '.join(cells)} | {test['tokens']} |"


def _told(results: dict[str, Any]) -> list[str]:
    lines = [f"| {name} | {value} |" for name, value in _facts(results)]
    return ["| | |", "|---|---|", *lines, ""]


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    calibration = results["calibration"]
    facts = [("sparsity type", results["sparsity_type"]), ("seed", results["seed"])]
    if calibration:
        size = f"{calibration['windows']} windows of {calibration['seqlen']} tokens"
        facts.append(("calibrated on", f"{calibration['name']}, {size}"))
        facts.append(("digest of the windows", f"`{calibration['digest']}`"))
    facts += [(f"{name} option", value) for name, value in results["options"].items()]
    if results.get("allocation"):
        facts.append(("allocation of the zeros", results["settings"]["allocation"]))
    if recovery := results.get("recovery"):
        facts.append(("recovered on", f"{recovery['text']['name']}, {recovery['tokens']} tokens"))
        facts.append(("teacher", recovery["teacher"]))
        facts.append(("share of cross-entropy", f"{recovery['cross_entropy']:g}"))
        facts.append(("time of the recovery", f"{recovery['seconds']:.0f} s"))
    return [(name, str(value)) for name, value in facts]


def _completions(results: dict[str, Any]) -> list[str]:
    """The model's completions, beside the dense one's."""
    return [
        "Beginnings of test documents, continued greedily:",
        "",
        completions_of_run(results["completions"]),
        "",
    ]


def _recovery(results: dict[str, Any]) -> list[str]:
    """What the training of the kept weights gave back."""
    recovery = results["recovery"]
    return [
        "The weights that pruning kept were trained on, with the dense model as teacher:",
        "",
        "| test text | dense | pruned | recovered |",
        "|---|---|---|---|",
        *[
            f"| {name} | {recovery['dense'][name]:.4f} | {recovery['before'][name]:.4f} "
            f"| {value:.4f} |"
            for name, value in results["perplexity"].items()
        ],
        "",
        "| tokens | perplexity of training text held out |",
        "|---|---|",
        *[f"| {one['tokens']} | {one['perplexity']:.4f} |" for one in recovery["curve"]],
        "",
    ]


def _packed(results: dict[str, Any]) -> list[str]:
    """How to load a checkpoint whose linears are packed, in three lines of Python."""
    from lib.sparse import card_lines

    packed = results.get("packed")
    size = ""
    if packed:
        values = "8-bit integers" if packed["bits"] == 8 else "they were"
        share = packed["bytes"] / packed["dense_bytes"]
        size = f", kept weights as {values}, in {share:.3f} of their dense size"
    return [
        f"The sparse linears are stored packed{size}. With this project's `lib` on the path:",
        "",
        "```python",
        *card_lines(results["flags"]["save_model"]),
        "```",
    ]


def is_hub_id(model: str) -> bool:
    """Whether `model` names a repository on the hub and not a folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).exists()


def languages_of(sources: list[str]) -> list[str]:
    """Codes of the languages that built-in sets name: `ubertext`, `c4:de`; a folder names none."""
    found = []
    for source in sources:
        kind, _, language = source.partition(":")
        code = LANGUAGE_OF_SET.get(source)
        if language and f"{kind}:LANGUAGE" in BUILT_IN:
            code = re.split("[_-]", language)[0]
        if code and code not in found:
            found.append(code)
    return found
