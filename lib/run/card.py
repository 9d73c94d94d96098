"""The model card of a saved model: README.md with the Hub's metadata at its head.

A card may be published. It holds names but no paths, no test text and no prompt. Every name that
comes from a file or a flag is escaped.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, metadata_load
from yaml import YAMLError

from ..data.sources import BUILT_IN, parse_source
from ..formats.packed.checkpoint import card_lines
from ..formats.registry import GRIDS
from ..methods.sparsity import SMALLER
from ..util.errors import UserError, first_of, one_line
from ..util.markdown import escape, padded_table
from .flags import command_words, named
from .plan import AUTO, PRUNED_BEFORE
from .plan import packed as packed_by
from .results import is_trained

HEADING = "## How to load it"
CARD = """\
---
{metadata}
---
# {title}

Made by langprune{texts}:

```bash
{command}
```

{table}

{notes}
{heading}
{packed}
```python
{code}
```
"""
PACKED = """
The sparse linear layers are stored packed, kept weights {}. To read them, run `pip install .` in
the folder of the project that wrote them. The kernels require x86-64 with AVX2 or AVX-512; on
other processors the weights become dense when they are loaded. Other engines read dense weights,
which `langprune unpack {} {}-dense` writes.
"""
CONVERTED = """\
---
{data}
---
{title}, as {what}
{text}
## How to run it

```bash
{how}
```
"""
FIGURES = {
    "bits_per_byte": ("bits per byte", ".4f"),
    "perplexity": ("perplexity", ",.2f"),
    "kl": ("KL from {} (nats)", ".4f"),
    "top1_agreement": ("top-1 agreement", ".2%"),
    "loss_change": ("loss over {} (nats)", "+.4f"),  # paired by window
}
# columns of its table; DENSE_COLUMN is the first without figures of the original
FIRST_COLUMN, DENSE_COLUMN, TRIMMED_COLUMN = "original", "dense", "trimmed"
EARLY_COLUMN, OWN_COLUMN = "before training", "this model"
LANGUAGE_OF_SET = {"ubertext": "uk", "c4": "en", "fineweb": "en", "wikitext2": "en"}


def model_card(results: Mapping[str, Any], sources: Sequence[str], online: bool = False) -> str:
    """Return the card: how the model was made, its figures, and how to load it.

    `results` as in lib/run/results.py; `sources` are the texts for calibration and training.
    `online`: the base model's card may be fetched from the Hub.
    """
    folder = Path(results["flags"].get("save_model") or "").name
    code = card_lines(folder, results.get("loaded_by") or "AutoModelForCausalLM")
    packed, model = "", results["model"]
    if is_packed := packed_by(results["flags"]):
        bits = results.get("packed", {}).get("bits", 16)
        values = "unchanged" if bits == 16 else f"as {bits}-bit integers"
        name = folder if re.fullmatch(r"[\w.-]+", folder) else "FOLDER"
        packed = PACKED.format(values, name, name)
    model = model if _is_hub_id(model) else Path(model).resolve().name
    texts = ", ".join(escape(_public(source)) for source in sources)
    return CARD.format(
        metadata=_metadata(results, sources, is_packed, online),
        title=f"{escape(model)}, {_what_was_done(results)}",
        texts=f" for the texts of {texts}" if texts else "",
        command=_command(results["flags"]),
        table=figures_table(results),
        notes="".join(f"- {escape(note)}\n" for note in notes(results)),
        heading=HEADING,
        packed=packed,
        code="\n".join(code if is_packed else code[1:]),
    )


def converted_card(
    folder: str, what: str, tag: str, kind: str, changed: str, how: str, proof: Sequence[str] = ()
) -> str:
    """Return the card of `what`, converted from the model in `folder` to weights of `kind`.

    License, base model, languages and datasets are those of the folder's card, as is its text if a
    run wrote it. `changed`: what conversion changes in a model saved as `kind`. `how`: shell
    commands for the usage section; `proof`: verification results.
    """
    title, text = f"# {Path(folder).resolve().name}", ""
    try:
        card = ModelCard.load(Path(folder) / "README.md", ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError):
        card = ModelCard("---\n{}\n---\n")
    if "langprune" in (card.data.tags or []):
        title, _, text = card.text.strip().partition("\n")
        text = text.partition(f"\n{HEADING}\n")[0]
        text += f"The figures are those of the model that was converted, before {kind}"
        exact = kind in GRIDS and kind in card.data.tags
        text += f", which has changed {changed}.\n" if exact else ".\n"
    text += "".join(f"\n- {line}" for line in proof) + "\n" * bool(proof)
    kept = ("license", "license_name", "license_link", "base_model", "language", "datasets")
    data = ModelCardData(
        pipeline_tag="text-generation",
        base_model_relation="quantized" if card.data.get("base_model") else None,
        tags=list(dict.fromkeys([*(card.data.tags or []), tag])),
        **{name: card.data.get(name) for name in kept},
    )
    return CONVERTED.format(data=data, title=title, what=what, text=text, how=how)


def _metadata(
    results: Mapping[str, Any], sources: Sequence[str], is_packed: bool, online: bool
) -> ModelCardData:
    """Return the metadata; license, and the base of a local model, come from its README.md."""
    model, is_hub_id = results["model"], _is_hub_id(results["model"])
    try:
        file = Path(model) / "README.md"
        if is_hub_id:
            where = dict(cache_dir=results["flags"].get("cache_dir"), local_files_only=not online)
            file = hf_hub_download(model, file.name, **where)
        base = metadata_load(file) or {}
    except (OSError, ValueError, YAMLError):  # there is none, or it is damaged
        base = {}
    method = results["method"] if results["sparsity_type"] else None
    tags = ["langprune", "pruned" if method or _pruned_before(results) else None, method]
    tags.append("trimmed" if results.get("vocabulary") else None)
    tags.append(results.get("quantized", {}).get("format"))
    base_model = model if is_hub_id else base.get("base_model")
    bits = results.get("packed", {}).get("bits", 16)
    relation = "quantized" if results.get("quantized") or bits < 16 else "finetune"
    hub_sets, languages = zip((None, None), *map(_set_and_language, sources), strict=True)
    return ModelCardData(
        model_name=Path(results["flags"].get("save_model") or model).name,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=_set_and_language(test["source"])[0] or escape(test["name"]),
                dataset_name=escape(test["name"]),
                metric_type=key,
                metric_value=round(test[key], 4),
            )
            for test in results["evaluation"]
            for key in ("perplexity", "bits_per_byte")
        ],
        library_name=None if is_packed else "transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        datasets=list(dict.fromkeys(filter(None, hub_sets))) or None,
        language=list(dict.fromkeys(filter(None, languages))) or None,
        tags=list(filter(None, tags)),
        **{name: base.get(name) for name in ("license", "license_name", "license_link")},
    )


def _pruned_before(results: Mapping[str, Any]) -> bool:
    return "recovery" in results and results["method"] == PRUNED_BEFORE


def _what_was_done(results: Mapping[str, Any]) -> str:
    kind, share = results["sparsity_type"], f"{100 * (results['sparsity_ratio'] or 0):g}%"
    goal = share if kind == "unstructured" else kind
    goal = f"{share} fewer {kind}" if kind in SMALLER else goal
    quantized = results.get("quantized", {})
    left, form = len(quantized.get("left", ())), quantized.get("format")
    layers = f"its linear layers{f' except {left}' * bool(left)} as llama.cpp's {form}"
    steps = {
        "sparsity_type": f"pruned by {results['method']} to {goal}",
        "recovery": "recovered" if kind or _pruned_before(results) else "trained on the texts",
        "vocabulary": "its vocabulary trimmed",
        "packed": "its sparse linear layers packed",
        "quantized": "its tensors as several of llama.cpp's types" if form == AUTO else layers,
    }
    done = {key: results.get(key) for key in steps} | {"recovery": is_trained(results)}
    return ", ".join(words for key, words in steps.items() if done[key]) or "saved as it was"


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
            add(row, {each: f"{value:,.2f}" for each, value in compared.items() if value})
        models = {first: of_original.get(test["name"], {})}
        models[dense] = models.get(dense, {}) | reference
        models |= {EARLY_COLUMN: before, OWN_COLUMN: test}
        for key, (words, form) in FIGURES.items():
            if key in test:
                cells = {each: _with_error(one, key, form) for each, one in models.items()}
                add(f"{name}, {words.format(dense)}", cells)
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
        add("MB", {name: f"{size / 1e6:,.1f}" for name, size in sizes.items() if size})
    for row, cells in (more or {}).items():
        add(row, cells)
    used = {name for cells in table.values() for name in cells} | {first, OWN_COLUMN}
    order = [name for name in (first, TRIMMED_COLUMN, EARLY_COLUMN, OWN_COLUMN) if name in used]
    body = [[row, *(cells.get(name, "") for name in order)] for row, cells in table.items()]
    return padded_table(["", *order], body)


def _with_error(figures: Mapping[str, Any], key: str, form: str) -> str:
    """Format a figure, with its standard error if there is one: `0.123 ± 0.004`."""
    name = "standard_error" if key == "perplexity" else f"{key}_standard_error"
    value, error = figures.get(key), figures.get(name)
    shown = "" if value is None else format(value, form)
    has_error = shown and error is not None and math.isfinite(error)  # nan for a single window
    return f"{shown} ± {error:{form.strip('+')}}" if has_error else shown


def notes(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield sentences on the changes to the model."""
    zeros = results.get("sparsity", {}).get("overall")
    before = results["flags"].get("eval_only") or _pruned_before(results)
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


def _command(flags: Mapping[str, Any]) -> str:
    """Return the command line, without defaults and with names for paths."""
    hidden = named(in_card=False)
    shown = {name: value for name, value in flags.items() if name not in hidden}
    shown["save_model"] = shown.get("save_model") and Path(shown["save_model"]).name
    return one_line(shlex.join(map(_public, command_words(shown))))


def _public(text: str) -> str:
    """Return a flag's value, but only the last name of a path, with or without a weight."""
    path = text.rpartition("=")[0] or text
    is_path = Path(path).exists() or path.startswith(("/", ".", "~")) or path.count("/") > 1
    return text.rstrip("/").rpartition("/")[2] if is_path else text


def _is_hub_id(model: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).exists()


def _set_and_language(source: str) -> tuple[str | None, str | None]:
    """Return a source's Hub dataset, and the language in the name of a built-in source."""
    try:
        hub = parse_source(source, "").hub
    except UserError:  # the path no longer exists
        hub = None
    kind, _, language = source.partition(":")
    if not language or f"{kind}:LANGUAGE" not in BUILT_IN:
        return hub, LANGUAGE_OF_SET.get(source)
    try:
        from langcodes import Language

        return hub, Language.get(language).language
    except (ImportError, ValueError):  # names of Wikipedia, such as `simple`
        return hub, None
