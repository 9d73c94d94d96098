"""The model card of a pruned model: README.md with the hub's YAML head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LANGUAGE_OF_SET = {"ubertext": "uk", "c4": "en", "wikitext2": "en"}


def model_card(results: dict[str, Any], languages: list[str], extra: list[str]) -> str:
    """Markdown that tells how the model was pruned, on what, and what it cost."""
    model, method = results["model"], results["method"]
    kind = results["sparsity_type"]
    what = f"{results['sparsity_ratio']:.0%} of the weights" if kind == "unstructured" else kind
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_id(model):
        head += [f"base_model: {model}"]
    if languages:
        head += ["language:", *[f"- {language}" for language in languages]]
    head += ["tags:", "- pruned", "- sparse", f"- {method}", "---"]
    base = model if is_hub_id(model) else Path(model).name
    lines = [
        f"# {base}, pruned by {method} to {what}",
        "",
        f"Every linear layer of the decoder blocks was pruned by {method}; embeddings and the "
        f"output head are dense. Zeros among the pruned weights: "
        f"{results['sparsity']['overall']:.4f}.",
        "",
        "| | |",
        "|---|---|",
        *[f"| {name} | {value} |" for name, value in _facts(results)],
        "",
        "| test text | perplexity | tokens |",
        "|---|---|---|",
        *[
            f"| {test['name']} | {test['perplexity']:.4f} | {test['tokens']} |"
            for test in results["evaluation"]
        ],
        "",
        *extra,
    ]
    return "\n".join(head + lines).rstrip() + "\n"


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    calibration = results["calibration"]
    facts = [("sparsity type", results["sparsity_type"]), ("seed", results["seed"])]
    if calibration:
        size = f"{calibration['windows']} windows of {calibration['seqlen']} tokens"
        facts.append(("calibrated on", f"{calibration['name']}, {size}"))
        facts.append(("digest of the windows", f"`{calibration['digest']}`"))
    facts += [(f"{name} option", value) for name, value in results.get("options", {}).items()]
    return [(name, str(value)) for name, value in facts]


def is_hub_id(model: str) -> bool:
    """Whether `model` names a repository on the hub and not a folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).exists()


def languages_of(names: list[str]) -> list[str]:
    """Language codes that the names of the calibration sets tell: `uk`, `c4:de`, ubertext."""
    found = []
    for name in names:
        code = LANGUAGE_OF_SET.get(name) or re.split(r"[:_]", name.split("/")[-1])[-1]
        if re.fullmatch(r"[a-z]{2,3}", code) and code not in found:
            found.append(code)
    return found
