"""The model card of a pruned model: README.md with the hub's metadata at its head.

A card may be published. It holds names, never paths, and every name that comes from a file or a
flag is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCardData

from lib.data.sources import BUILT_IN
from lib.methods.sparsity import NEURONS, UNSTRUCTURED
from lib.report.completion_tables import completions_of_run
from lib.report.markdown import compact_table, escape
from lib.report.quality_tables import abilities_of_run, fidelity_of_run
from lib.report.results import (
    EvaluationRecord,
    NeuronsRecord,
    RecoveryRecord,
    Results,
    VocabularyRecord,
)
from lib.run.card_engines import engines, unpacking
from lib.run.record import changed_options, with_error

LANGUAGE_OF_SET = {"ubertext": "uk", "c4": "en", "wikitext2": "en"}


def model_card(results: Results, sources: list[str]) -> str:
    """Return the card: how the model was pruned, on which texts, and what that cost.

    `sources` are the texts that it was calibrated, recovered or trimmed on. The completions are
    left out under `--card_without_prompts`.
    """
    recovery, vocabulary = results.get("recovery"), results.get("vocabulary")
    packed = results["flags"].get("replace_sparse_layers")
    sections = [[f"# {escape(name_of(results['model']))}, {_how(results)}"]]
    if is_sparse(results):
        sections.append(_sparsity(results))
    if neurons := results.get("neurons"):
        sections.append(_neurons(neurons))
    if vocabulary:
        sections.append(_vocabulary(vocabulary))
    if is_sparse(results) or neurons:
        sections.append([compact_table(["", ""], _facts(results))])
    if notes := results.get("notes"):
        sections.append([f"- {escape(note)}" for note in notes])
    sections.append([_evaluation(results["evaluation"], bool(vocabulary))])
    if abilities := results.get("abilities"):
        sections.append(["Answers to questions from test texts:", "", abilities_of_run(abilities)])
    if fidelity := results.get("fidelity"):
        sections.append(["Text that the models write:", "", fidelity_of_run(fidelity)])
    if shows_prompts(results):
        sections.append(_completions(results))
    if recovery:
        sections.append(_recovery(results, recovery))
    if packed:
        sections.append(_packing(results))
    sections.append(how_to_run(results))
    if folder := saved_name(results):
        sections.append(engines(folder, bool(packed)))
    body = "\n\n".join("\n".join(lines) for lines in sections if lines)
    return f"---\n{_metadata(results, sources).to_yaml()}\n---\n{body}\n"


def shows_prompts(results: Results) -> bool:
    """Return whether the card shows beginnings of test documents."""
    without = results["flags"].get("card_without_prompts")
    return bool(results.get("completions")) and not without


def is_sparse(results: Results) -> bool:
    """Return whether linears of the model have zeros, from this run or an earlier one."""
    if "neurons" in results:
        return False
    packed = results["flags"].get("replace_sparse_layers")
    return bool(results["sparsity_type"] or "recovery" in results or packed)


def _metadata(results: Results, sources: list[str]) -> ModelCardData:
    model, pruned = results["model"], results["sparsity_type"]
    tags = ["pruned", "sparse"] if is_sparse(results) else []
    tags = ["pruned"] if "neurons" in results else tags
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=model if is_hub_id(model) else None,
        language=languages_of(sources) or None,
        tags=[*tags, *([results["method"]] if pruned else [])],
    )


def _how(results: Results) -> str:
    """Say what the run did to the model, for the title."""
    kind, method, flags = results["sparsity_type"], results["method"], results["flags"]
    done = []
    if kind:
        share = f"{100 * results['sparsity_ratio']:g}%"
        if kind == NEURONS:
            done.append(f"{share} of its MLPs' neurons removed by {method}")
        else:
            target = f"{share} zeros" if kind == UNSTRUCTURED else kind
            done.append(f"pruned by {method} to {target}")
    if "recovery" in results:
        done.append("recovered" if kind else "a pruned model recovered")
    if not done and flags.get("replace_sparse_layers"):
        done.append("its sparse linears packed")
    how = " and ".join(done)
    if flags.get("trim_vocabulary") or not how:
        how += f"{', ' if how else ''}its vocabulary trimmed"
    return how


def _sparsity(results: Results) -> list[str]:
    return [
        "Linear layers of the decoder blocks are sparse; embeddings and the output head are dense. "
        f"Zeros among the blocks' weights: {results['sparsity']['overall']:.4f}."
    ]


def _neurons(neurons: NeuronsRecord) -> list[str]:
    """Say how many neurons are left, and how much that saves."""
    share = 1 - neurons["bytes_after"] / neurons["bytes_before"]
    return [
        f"Each MLP has {neurons['after']} of its {neurons['before']} neurons "
        f"(`{neurons['field']}`). All matrices are dense, and smaller: {share:.1%} of the model's "
        "bytes are gone, whatever runs it."
    ]


def _vocabulary(vocabulary: VocabularyRecord) -> list[str]:
    """Say how many tokens are left, and how much longer test texts become."""
    sources = ", ".join(escape(Path(source).name) for source in vocabulary.get("sources", []))
    used = f", those that the texts of {sources} use" if sources else ""
    lines = [
        f"Of {vocabulary['rows_before']} rows of its vocabulary {vocabulary['rows']} are left"
        f"{used}. Other text is cut into more tokens, and reads the same.",
        "",
        vocabulary["note"],
    ]
    if tests := vocabulary.get("tests"):
        head = ["test text", "documents cut alike", "rise in tokens"]
        body = []
        for test in tests:
            alike = f"{test['alike']} of {test['documents']}"
            body.append([escape(test["name"]), alike, f"{test['rise']:+.2%}"])
        lines += ["", compact_table(head, body)]
    return lines


def _facts(results: Results) -> Iterable[tuple[str, str]]:
    """Yield how the model was made, as rows of a table."""
    yield "sparsity type", str(results["sparsity_type"])
    yield "seed", str(results["seed"])
    if calibration := results["calibration"]:
        size = f"{calibration['windows']} windows of {calibration['seqlen']} tokens"
        yield "calibrated on", f"{escape(calibration['name'])}, {size}"
        yield "digest of the windows", f"`{calibration['digest']}`"
    for name, value in changed_options(results).items():
        yield f"{name} option", "yes" if value is True else str(value)
    if results.get("allocation"):
        yield "allocation of the zeros", results["settings"]["allocation"]
    if recovery := results.get("recovery"):
        yield "recovered on", f"{escape(recovery['text']['name'])}, {recovery['tokens']} tokens"
        yield "teacher", escape(name_of(recovery["teacher"]))
        yield "share of cross-entropy", f"{recovery['cross_entropy']:g}"
        yield "time of the recovery", f"{recovery['seconds']:.0f} s"


def _evaluation(tests: list[EvaluationRecord], bits_first: bool) -> str:
    """Return the table of figures, one row for each test set."""
    head = ["test text", *(["bits per byte"] if bits_first else []), "perplexity"]
    further = {"kl": "KL from dense, nats a token", "top1_agreement": "same most likely token"}
    further = {key: title for key, title in further.items() if any(key in test for test in tests)}
    body = []
    for test in tests:
        cells = [f"{test['bits_per_byte']:.4f}"] if bits_first else []
        cells += [f"{test['perplexity']:.4f}"]
        cells += [
            with_error(test, key, percent=key != "kl") if key in test else "" for key in further
        ]
        body.append([escape(test["name"]), *cells, str(test["tokens"])])
    return compact_table([*head, *further.values(), "tokens"], body)


def _completions(results: Results) -> list[str]:
    return [
        "Beginnings of test documents, continued greedily:",
        "",
        completions_of_run(results["completions"]),
    ]


def _recovery(results: Results, recovery: RecoveryRecord) -> list[str]:
    """Return the tables of perplexities before and after the recovery, and of its curve."""
    before_and_after = (
        [
            escape(name),
            *(f"{x:.4f}" for x in (recovery["dense"][name], recovery["before"][name], value)),
        ]
        for name, value in results["perplexity"].items()
    )
    curve = ([str(point["tokens"]), f"{point['perplexity']:.4f}"] for point in recovery["curve"])
    return [
        "The weights that pruning kept were trained on, with the dense model as teacher:",
        "",
        compact_table(["test text", "dense", "pruned", "recovered"], before_and_after),
        "",
        compact_table(["tokens", "perplexity of training text held out"], curve),
    ]


def _packing(results: Results) -> list[str]:
    """Say how large the packed linears are, and how to unpack them."""
    from lib.packed.checkpoint import CARD_HEADING

    size = ""
    if packed := results.get("packed"):
        values = "they were" if packed["bits"] == 16 else f"{packed['bits']}-bit integers"
        share = packed["bytes"] / packed["dense_bytes"]
        size = f", kept weights as {values}, in {share:.3f} of their dense size"
    stored = f"The sparse linears are stored packed{size}."
    if rows := results.get("packed_embeddings"):
        names = " and ".join(f"`{name}`" for name in rows["modules"])
        stored += f" {names}: 8-bit integers with a scale for each row."
    return [CARD_HEADING, "", stored, "", unpacking(saved_name(results))]


def how_to_run(results: Results) -> list[str]:
    """Return the code that loads the saved folder, packed or plain."""
    folder = saved_name(results)
    if results["flags"].get("replace_sparse_layers"):
        from lib.packed.checkpoint import card_lines

        intro = (
            "Install what reads them, with `pip install .` in the folder of the project that "
            "wrote them; then:"
        )
        return [intro, "", "```python", *card_lines(folder), "```"]
    return [
        "```python",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({folder!r})",
        "```",
    ]


def saved_name(results: Results) -> str:
    """Return the name of the folder that the model is saved to."""
    return Path(results["flags"].get("save_model") or "").name


def name_of(model: str) -> str:
    """Return a hub id unchanged, and of a local folder the name alone."""
    return model if is_hub_id(model) else Path(model).resolve().name


def is_hub_id(model: str) -> bool:
    """Return whether `model` names a repository on the hub and not a folder."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", model)) and not Path(model).exists()


def languages_of(sources: list[str]) -> list[str]:
    """Return the codes of the languages that built-in sets such as `c4:de` name."""
    codes = []
    for source in sources:
        kind, _, language = source.partition(":")
        code = LANGUAGE_OF_SET.get(source)
        if language and f"{kind}:LANGUAGE" in BUILT_IN:
            code = re.split("[_-]", language)[0]
        if code and code not in codes:
            codes.append(code)
    return codes
