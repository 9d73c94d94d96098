"""The model card of a pruned model: README.md with the hub's YAML head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lib.data.sources import BUILT_IN
from lib.methods.sparsity import UNSTRUCTURED

ISO_639_1 = frozenset(
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da "
    "de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy "
    "hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg "
    "li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or "
    "os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta "
    "te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu".split()
)
LANGUAGE_OF_SET = {"ubertext": "uk", "c4": "en", "wikitext2": "en"}


def model_card(results: dict[str, Any], languages: list[str], extra: list[str]) -> str:
    """Markdown that tells how the model was pruned, on what, and what it cost."""
    model, method = results["model"], results["method"]
    kind = results["sparsity_type"]
    if kind is None:
        how = "its 2:4 linears packed"
    elif kind == UNSTRUCTURED:
        how = f"pruned by {method} to {100 * results['sparsity_ratio']:g}% zeros"
    else:
        how = f"pruned by {method} to {kind}"
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_id(model):
        head += [f"base_model: {model}"]
    if languages:
        head += [
            "language:",
            *[f"- '{code}'" if code == "no" else f"- {code}" for code in languages],
        ]
    tags = ["pruned", "sparse", *([method] if kind else [])]
    head += ["tags:", *[f"- {tag}" for tag in tags], "---"]
    base = model if is_hub_id(model) else Path(model).name
    lines = [
        f"# {base}, {how}",
        "",
        "Linear layers of the decoder blocks are sparse; embeddings and the output head are dense. "
        f"Zeros among the blocks' weights: {results['sparsity']['overall']:.4f}.",
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


def packed_card(folder: str) -> list[str]:
    """How to load a checkpoint whose 2:4 linears are packed, in three lines of Python."""
    from lib.sparse import card_lines

    return [
        "The 2:4 linears are stored packed. With this project's `lib` on the path:",
        "",
        "```python",
        *card_lines(folder),
        "```",
    ]


def is_hub_id(model: str) -> bool:
    """Whether `model` names a repository on the hub and not a folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).exists()


def languages_of(names: list[str]) -> list[str]:
    """Language codes that names of calibration sets tell: ubertext, `c4:de`, a folder `uk`."""
    found = []
    for name in names:
        kind, _, language = name.partition(":")
        code = LANGUAGE_OF_SET.get(name) or name.split("/")[-1]
        if language and f"{kind}:LANGUAGE" in BUILT_IN:
            code = re.split("[_-]", language)[0]
        elif code not in ISO_639_1:
            continue
        if code not in found:
            found.append(code)
    return found
