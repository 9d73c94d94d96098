"""The model card of a saved model: README.md with the Hub's metadata at its head.

A card may be published. It holds names but no paths, no test text and no prompt. Every name that
comes from a file or a flag is escaped.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, metadata_load
from yaml import YAMLError

from ..data.sources import BUILT_IN, local_name, parse_source
from ..formats.registry import AUTO, GRIDS
from ..methods.sparsity import SMALLER
from ..packed.checkpoint import card_lines
from ..util.errors import UserError, one_line
from ..util.markdown import escape
from .figures import figures_table, is_pruned_before, notes
from .flags import command_words, named
from .plan import packed as packed_by
from .results import is_trained

LOADING, RUNNING = "## How to load it", "## How to run it"
CARD = """\
---
{metadata}
---
# {title}

{text}

{how}
"""
MADE = """\
Made by langprune{texts}:

```bash
{command}
```

{table}
"""
PACKED = """\
The sparse linear layers are stored packed, kept weights {}. To read them, run `pip install .` in
the folder of the project that wrote them. The kernels require x86-64 with AVX2 or AVX-512; on
other processors the weights become dense when they are loaded. Other engines read dense weights,
which `langprune unpack {} {}-dense` writes.
"""
LICENSE = "license", "license_name", "license_link"
LANGUAGE_OF_SET = {"ubertext": "uk", "c4": "en", "fineweb": "en", "wikitext2": "en"}


def card(metadata: ModelCardData, title: str, text: Sequence[str], how: Sequence[str]) -> str:
    """Return a model card: the Hub's metadata, a title, paragraphs, and how the model is used."""
    paragraphs = ("\n\n".join(filter(None, map(str.strip, part))) for part in (text, how))
    return CARD.format(metadata=metadata, title=title, text=next(paragraphs), how=next(paragraphs))


def listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def model_card(results: Mapping[str, Any], sources: Sequence[str], online: bool = False) -> str:
    """Return the card: how the model was made, its figures, and how to load it.

    `results` as in lib/run/results.py; `sources` are the texts for calibration and training.
    `online`: the base model's card may be fetched from the Hub.
    """
    folder = Path(results["flags"].get("save_model") or "").name
    model = (results.get("vocabulary") or {}).get("model", results["model"])
    code = card_lines(folder, results.get("loaded_by") or "AutoModelForCausalLM")
    how = [LOADING]
    if is_packed := packed_by(results["flags"]):
        bits = results.get("packed", {}).get("bits", 16)
        values = "unchanged" if bits == 16 else f"as {bits}-bit integers"
        name = folder if re.fullmatch(r"[\w.-]+", folder) else "FOLDER"
        how.append(PACKED.format(values, name, name))
    lines = code if is_packed else code[1:]
    model = model if _is_hub_id(model) else Path(model).resolve().name
    texts = ", ".join(escape(_public(source)) for source in sources)
    made = MADE.format(
        texts=f" for the texts of {texts}" if texts else "",
        command=_command(results["flags"]),
        table=figures_table(results),
    )
    return card(
        _metadata(results, sources, is_packed, online),
        f"{escape(model)}, {_what_was_done(results)}",
        [made, listed(map(escape, notes(results)))],
        [*how, "\n".join(["```python", *lines, "```"])],
    )


def converted_card(
    folder: str, what: str, tag: str, kind: str, changed: str, how: str, proof: Sequence[str] = ()
) -> str:
    """Return the card of `what`, converted from the model in `folder` to weights of `kind`.

    License, base model, languages and datasets are those of the folder's card, as is its text if a
    run wrote it. `changed`: what conversion changes in a model saved as `kind`. `how`: shell
    commands for the usage section; `proof`: verification results.
    """
    title, text = f"# {Path(folder).resolve().name}", []
    try:
        base = ModelCard.load(Path(folder) / "README.md", ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError):
        base = ModelCard("---\n{}\n---\n")
    if "langprune" in (base.data.tags or []):
        title, _, own = base.text.strip().partition("\n")
        line = f"The figures are those of the model that was converted, before {kind}"
        exact = kind in GRIDS and kind in base.data.tags
        line += f", which has changed {changed}." if exact else "."
        text = [own.partition(f"\n{LOADING}\n")[0], line]
    kept = (*LICENSE, "base_model", "language", "datasets")
    metadata = ModelCardData(
        pipeline_tag="text-generation",
        base_model_relation="quantized" if base.data.get("base_model") else None,
        tags=list(dict.fromkeys([*(base.data.tags or []), tag])),
        **{name: base.data.get(name) for name in kept},
    )
    title = f"{title.removeprefix('# ')}, as {what}"
    return card(metadata, title, [*text, listed(proof)], [RUNNING, f"```bash\n{how}\n```"])


def unpacked_card(text: str, folder: str) -> str:
    """Return the card `text` of a packed model for the dense weights in `folder`."""
    kept, heading, how = text.partition(f"{LOADING}\n")
    if not (kind := re.search(r"import (AutoModel\w+)", how)):  # another program has written it
        return text
    line = "The weights were unpacked with `langprune unpack`; the table counts the packed ones."
    code = "\n".join(["```python", *card_lines(folder, kind[1])[1:], "```"])
    return f"{kept}{line}\n\n{heading}\n{code}\n"


def metadata_of(folder: str | Path) -> dict[str, Any]:
    """Return the metadata of a card in a folder; {} if there is none, or it is damaged."""
    try:
        return metadata_load(Path(folder) / "README.md") or {}
    except (OSError, ValueError, YAMLError):
        return {}


def quantized_as(folder: str | Path) -> str | None:
    """Return the type of --quantize of the run that saved a folder, by its card; None if none."""
    tags = metadata_of(folder).get("tags") or []
    return next((kind for kind in (AUTO, *GRIDS) if {kind, "langprune"} <= {*tags}), None)


def _metadata(
    results: Mapping[str, Any], sources: Sequence[str], is_packed: bool, online: bool
) -> ModelCardData:
    """Return the metadata; license, and the base of a local model, come from its README.md."""
    model, is_hub_id = results["model"], _is_hub_id(results["model"])
    folder = model
    if is_hub_id:
        where = dict(cache_dir=results["flags"].get("cache_dir"), local_files_only=not online)
        with suppress(OSError, ValueError):  # there is none, or no network
            folder = Path(hf_hub_download(model, "README.md", **where)).parent
    base = metadata_of(folder)
    method = results["method"] if results["sparsity_type"] else None
    tags = ["langprune", "pruned" if method or is_pruned_before(results) else None, method]
    tags.append("trimmed" if results.get("vocabulary") else None)
    tags.append(results.get("quantized", {}).get("format"))
    base_model = model if is_hub_id else base.get("base_model")
    bits = results.get("packed", {}).get("bits", 16)
    relation = "quantized" if results.get("quantized") or bits < 16 else "finetune"
    chosen = base.get("language") if results.get("vocabulary") else None  # for `trim`
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
        language=list(dict.fromkeys(filter(None, languages))) or chosen,
        tags=list(filter(None, tags)),
        **{name: base.get(name) for name in LICENSE},
    )


def _what_was_done(results: Mapping[str, Any]) -> str:
    kind, share = results["sparsity_type"], f"{100 * (results['sparsity_ratio'] or 0):g}%"
    goal = share if kind == "unstructured" else kind
    goal = f"{share} fewer {kind}" if kind in SMALLER else goal
    quantized = results.get("quantized", {})
    left, form = len(quantized.get("left", ())), quantized.get("format")
    layers = f"its linear layers{f' except {left}' * bool(left)} as llama.cpp's {form}"
    steps = {
        "sparsity_type": f"pruned by {results['method']} to {goal}",
        "recovery": "recovered" if kind or is_pruned_before(results) else "trained on the texts",
        "vocabulary": "its vocabulary trimmed",
        "packed": "its sparse linear layers packed",
        "quantized": "its tensors as several of llama.cpp's types" if form == AUTO else layers,
    }
    done = {key: results.get(key) for key in steps} | {"recovery": is_trained(results)}
    return ", ".join(words for key, words in steps.items() if done[key]) or "saved as it was"


def _command(flags: Mapping[str, Any]) -> str:
    """Return the command line, without defaults and with names for paths."""
    hidden = named(in_card=False)
    shown = {name: value for name, value in flags.items() if name not in hidden}
    shown["save_model"] = shown.get("save_model") and Path(shown["save_model"]).name
    return one_line(shlex.join(map(_public, command_words(shown))))


def _public(text: str) -> str:
    """Return a flag's value, but only the last name of a path, with or without a weight."""
    path = text.rpartition("=")[0] or text
    is_path = local_name(path) or path.startswith(("/", ".", "~")) or path.count("/") > 1
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
