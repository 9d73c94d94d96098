"""A model folder as trim reads it: its files, and its parts with a vocabulary of their own.

A sentence-transformers folder is one thing; each folder in it with weights and a tokenizer is a
part. The tokenizer of a part is the one that AutoTokenizer loads, as users do.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...data.token_ids import find_token_ids, map_token_ids
from ...data.tokenizers import keep_limits
from ...model.checkpoint import ADAPTER, INDEX, Checkpoint, as_user_error, local_only
from ...model.matrix import unread_of
from ...model.processor import processor_ids
from ...util.errors import UserError
from ...util.quirks import TOKEN_ID_FIELDS
from ...vocabulary.tables import (
    SIZE,
    TRIMMED_FROM,
    Tables,
    open_model,
    rows_read,
    tables_of,
    with_defaults,
)
from ...vocabulary.tokenizer_json import TrimmableTokenizer
from ...vocabulary.tokenizer_model import CHECK, check_of, write_tokenizer_model
from ...vocabulary.vectors import MODULES, PROMPTS, read_json

# the model in another form, with the whole vocabulary
LEFT_OUT = """
*.onnx *.onnx_data *.gguf *.h5 *.msgpack *.ot *.pth *.tflite onnx/* openvino/* coreml/* original/*
consolidated*
pytorch_model*.bin* 0_Transformer/pytorch_model*.bin*
""".split()
TOKENIZER, LIST = "tokenizer.json", "vocabulary.json"  # the latter is a list by trim
MADE_AGAIN = ("vocab.txt", "vocab.json", "merges.txt", "unigram.json")  # tokenizers writes them
FIRST_IDS = 8  # an encoder's special tokens below stay: RoBERTa counts positions from padding's


class Fast:
    """A tokenizer with the methods that `compare_tokens` calls."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.rows = tokenizer, max(tokenizer.get_vocab().values()) + 1

    @property
    def first(self) -> int:
        """The id that begins a text: BOS, else an end token."""
        begins = self.tokenizer.bos_token_id
        return (self.tokenizer.eos_token_id if begins is None else begins) or 0

    def encode(self, text: str) -> np.ndarray:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of texts, encoded on all cores, without special tokens."""
        backend = self.tokenizer.backend_tokenizer
        encodings = backend.encode_batch_fast([*texts], add_special_tokens=False)
        return [np.array(encoding.ids, int) for encoding in encodings]

    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@dataclass
class Part:
    """A folder with a tokenizer and its tables: a model, or a module of one.

    `file` is the content of its tokenizer.json, None if it has none. `settings` are its other JSON
    files by path. `ids` are the tokens that stay, and `rows` (rows,) the row in IN of each of OUT,
    those of the `ids` first.
    """

    checkpoint: Checkpoint  # of the folder alone
    what: str  # the model in messages
    weights: list[Path]
    tables: Tables
    tokenizer: PreTrainedTokenizerBase
    file: dict[str, Any] | None
    settings: dict[Path, dict[str, Any]] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    rows: Tensor = field(default_factory=lambda: torch.arange(0))
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return Path(self.checkpoint.name)

    @cached_property
    def tokens(self) -> TrimmableTokenizer:
        return TrimmableTokenizer(self.tokenizer, self.what, self.file)

    @property
    def vocabulary_files(self) -> list[str]:
        return [path.name for path in self.folder.iterdir() if is_vocabulary(path.name)]

    def defaults(self, path: Path) -> dict[str, Any]:
        """Return what the class of the model adds to a config.json."""
        is_config = self.tables.model and path == self.folder / "config.json"
        return self.tables.model.config.to_dict() if is_config else {}

    def named_ids(self) -> set[int]:
        """Return the ids in settings, and those of low special tokens and of a processor."""
        ids = set()
        for path, fields in self.settings.items():
            ids |= find_token_ids(with_defaults(fields, self.defaults(path), _holds_ids))
        if self.tables.model and unread_of(self.tables.model):
            ids |= processor_ids(self.checkpoint, self.tokenizer)
        low = [i for i in (*self.tokenizer.all_special_ids, *ids) if i < FIRST_IDS]
        encodes = self.tables.model and not self.tables.model.can_generate()
        return ids | {*range(max(low, default=-1) + 1 if encodes else 0)}

    def renumbered(self, path: Path) -> dict[str, Any]:
        """Return the settings in a file with the new ids and sizes."""
        fields, rows = self.settings[path], self.rows.tolist()
        new = {old: place for place, old in enumerate([*self.ids, *rows[len(self.ids) :]])}
        if path.name == "added_tokens.json":
            return {token: new[index] for token, index in fields.items() if index in new}
        if path.name == INDEX:
            size = sum(sum(self.sizes(file).values()) for file in self.weights)
            return fields | {"metadata": fields.get("metadata", {}) | {"total_size": size}}

        def changes(name: str, value: Any) -> bool:
            is_size = SIZE.fullmatch(name) and value in self.tables.sizes
            return is_size or map_token_ids({name: value}, lambda i: new.get(i, i)) != {name: value}

        fields = with_defaults(fields, self.defaults(path), changes)
        fields = map_token_ids(fields, lambda index: new.get(index, index))
        if path.name == "config.json" and "model_type" in fields:
            fields.setdefault(TRIMMED_FROM, self.tables.rows)
        if path.name == "tokenizer_config.json":
            if listed := fields.get("added_tokens_decoder"):
                kept = {new.get(int(index)): token for index, token in listed.items()}
                kept = {str(i): token for i, token in kept.items() if i is not None}
                fields["added_tokens_decoder"] = kept
            if check := check_of(self.tokenizer):
                fields[CHECK] = check

        def sized(each: dict[str, Any]) -> dict[str, Any]:
            sizes = {k for k, v in each.items() if "vocab_size" in k and v in self.tables.sizes}
            return each | dict.fromkeys(sizes, len(rows))

        return json.loads(json.dumps(fields), object_hook=sized)

    def sizes(self, file: Path) -> dict[str, int]:
        """Return the bytes of the tensors that OUT has of a file of weights."""
        names, rows, tensors = self.tables.names, len(self.rows), load_file(file).items()
        return {n: t.nbytes // names[n] * rows if n in names else t.nbytes for n, t in tensors}

    @cached_property
    def tabled(self) -> list[Path]:
        """The files of weights that hold a table."""
        return [path for path in self.weights if self.tables.names.keys() & load_file(path).keys()]

    def write_settings(self, path: Path, target: Path) -> None:
        """Write a file of settings with the new ids and sizes."""
        text = json.dumps(self.renumbered(path), indent=2, ensure_ascii=False)
        target.write_text(text, "utf-8")

    def check_smaller(self, out: Checkpoint) -> None:
        """Raise UserError if OUT reads other rows of the smaller tables than IN for a token."""
        tables, every = [*self.tables.smaller], torch.arange(len(self.rows))
        before = rows_read(self.tables.model, tables, self.rows, self.what)
        after = rows_read(open_model(out), tables, every, str(out))
        for path, rows in before.items():
            if not torch.equal(rows[after[path]], rows):
                problem = f"it has a table {path} that trimming would break"
                raise UserError(self.what, problem, "Only other models can be trimmed")

    def write_tokenizer(self, target: Path) -> PreTrainedTokenizerBase:
        """Write every file of the vocabulary, and return the tokenizer that users load from it.

        Raises UserError if it has other ids than the written one.
        """
        for path in self.settings:
            if path.parent == self.folder:
                self.write_settings(path, target / path.name)
        for path in self.folder.glob("*.jinja"):
            shutil.copyfile(path, target / path.name)
        text = json.dumps(self.tokens.trimmed_json(self.ids), ensure_ascii=False)
        (target / TOKENIZER).write_text(text, "utf-8")
        copy = replace(self.checkpoint, name=str(target))
        tokenizer, _ = open_tokenizer(copy, f"OUT {target.name}")
        new = {self.tokens.id_to_token[index]: place for place, index in enumerate(self.ids)}
        if wrong := sorted(new.items() ^ tokenizer.get_vocab().items(), key=lambda item: item[1]):
            problem = f"its {type(tokenizer).__name__}, written and loaded, has another token than "
            problem += f"{wrong[0][0]!r} at {wrong[0][1]}"
            raise UserError(self.what, problem, "Please report this")
        with tempfile.TemporaryDirectory() as made:
            tokenizer.backend_tokenizer.model.save(made)
            for path in Path(made).iterdir():
                if path.name in self.vocabulary_files:
                    shutil.copyfile(path, target / path.name)
        if "tokenizer.model" in self.vocabulary_files:
            write_tokenizer_model(tokenizer, target)
        return tokenizer


def _holds_ids(name: str, _: Any) -> bool:
    return bool(TOKEN_ID_FIELDS.fullmatch(name))


class ModelFiles:
    """The files of IN, {path in the folder: path}, its parts, and what is `left` out.

    Raises UserError for what cannot be trimmed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.folder = _folder_of(checkpoint)
        paths = {p.relative_to(self.folder): p for p in sorted(self.folder.rglob("*"))}
        files = {str(n): p for n, p in paths.items() if p.is_file() and "/." not in f"/{n}"}
        self.left = [name for name in files if any(fnmatch(name, each) for each in LEFT_OUT)]
        made = {*self.left, "README.md"}  # the card is written again
        self.files = {n: p for n, p in files.items() if n not in made and p.name != LIST}
        with as_user_error(checkpoint, "a file of it", "Download it again"):
            self.parts = _parts([*self.files.values()], self.folder, checkpoint)
            for path in self.files.values():
                if path.suffix == ".json" and path.name not in (TOKENIZER, *MADE_AGAIN):
                    if isinstance(fields := read_json(path), dict):
                        self.part_of(path).settings[path] = fields

    @property
    def table_bytes(self) -> int:
        """The bytes of OUT's files with a table, which are written in any case."""
        files = ((part, file) for part in self.parts for file in part.tabled)
        return sum(sum(part.sizes(file).values()) for part, file in files)

    def part_of(self, path: Path) -> Part:
        """Return the part that a file belongs to: the innermost around it, else the first."""
        above = [part for part in self.parts if part.folder in path.parents]
        return max(above or self.parts[:1], key=lambda part: len(part.folder.parts))

    @property
    def is_causal(self) -> bool:
        """Whether it is one model that predicts the next token."""
        model = self.parts[0].tables.model
        name = (read_json(self.folder / "config.json").get("architectures") or [""])[0]
        predicts = model.can_generate() if model else name.endswith("ForCausalLM")
        return predicts and len(self.parts) == 1 and not (self.folder / MODULES).is_file()

    def prompts(self) -> list[str]:
        """Return the prompts that an embedder puts before texts."""
        return [*(read_json(self.folder / PROMPTS).get("prompts") or {}).values()]

    def is_made(self, path: Path) -> bool:
        """Return whether OUT's file of this name is written by the part."""
        part = self.part_of(path)
        return path in part.settings or path.parent == part.folder and is_vocabulary(path.name)


def _folder_of(checkpoint: Checkpoint) -> Path:
    """Return a folder, or that of a model that is downloaded from the Hub."""
    name = checkpoint.name
    if Path(name).is_dir():
        return Path(name).absolute()
    if Path(name).exists():
        raise UserError(str(checkpoint), "it is neither a GGUF file nor a folder", "Name one")
    options = dict(cache_dir=checkpoint.cache_dir, local_files_only=local_only(checkpoint))
    with as_user_error(checkpoint, "it", "Try again later"):
        return Path(snapshot_download(name, ignore_patterns=LEFT_OUT, **options))


def _parts(files: Sequence[Path], source: Path, checkpoint: Checkpoint) -> list[Part]:
    """Return the parts of a folder. Raises UserError for what cannot be trimmed."""
    what, about = str(checkpoint), [read_json(source / name) for name in (MODULES, PROMPTS)]
    if re.search("(?i)sparse_?encoder", str(about)):
        problem = "it is a sparse encoder, whose result has a place for each token"
        raise UserError(what, problem, "Only dense embedders can be trimmed")
    if any(path.name == ADAPTER for path in files):
        fix = "Merge it into its model with peft's merge_and_unload"
        raise UserError(what, f"it holds an adapter ({ADAPTER})", fix)
    parts = []
    for folder in dict.fromkeys(path.parent for path in files if is_vocabulary(path.name)):
        weights = [p for p in files if p.parent == folder and p.suffix == ".safetensors"]
        config = read_json(folder / "config.json")
        if not weights:
            continue
        if config.get("is_encoder_decoder") and "EncoderModel" not in str(config):
            problem = f"it is an encoder-decoder model ({config['model_type']})"
            raise UserError(what, problem, "Name an encoder or a causal model")
        tensors = {name: each for file in weights for name, each in load_file(file).items()}
        here = replace(checkpoint, name=str(folder))
        tables = tables_of(tensors, what, here)
        sizes = re.findall(r"'\w*vocab_size\w*': (\d+)", str(config))
        if not tables.model and sizes and str(tables.rows) not in sizes:
            problem = (
                f"config.json has a vocab_size of {sizes[0]}, and its table {tables.rows} rows"
            )
            raise UserError(what, problem, "Correct it")
        parts.append(Part(here, what, weights, tables, *open_tokenizer(here, what)))
    if not parts:
        has_weights = any(path.suffix == ".safetensors" for path in files)
        lacking = "tokenizer beside its weights" if has_weights else "weights in safetensors"
        fix = "Load it with transformers, and write it by save_pretrained"
        raise UserError(what, f"it has no {lacking}", fix)
    return parts


def open_tokenizer(
    checkpoint: Checkpoint, what: str
) -> tuple[PreTrainedTokenizerBase, dict[str, Any] | None]:
    """Return the tokenizer that AutoTokenizer loads, and the content of tokenizer.json, if any.

    Where transformers does not know it, or has other tokens, it is the one of tokenizer.json.
    """
    folder, file, tokenizer = Path(checkpoint.name), None, None
    if (folder / TOKENIZER).is_file():
        file = json.loads(Tokenizer.from_file(str(folder / TOKENIZER)).to_str())
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **checkpoint.options())
    except Exception as error:
        if not file:
            fix = "Put a working one beside the weights"
            raise UserError(what, "its tokenizer cannot be loaded", fix) from error
    if file:
        known = Tokenizer.from_file(str(folder / TOKENIZER)).get_vocab().items()
        if not (tokenizer and tokenizer.is_fast and known <= tokenizer.get_vocab().items()):
            tokenizer = _as_it_is(folder)
    keep_limits(tokenizer)
    return tokenizer, file


def _as_it_is(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of tokenizer.json, with the settings beside it."""
    fields = read_json(folder / "tokenizer_config.json")

    def text(token: Any) -> Any:
        return token["content"] if isinstance(token, dict) else token

    names = {f"{name}_token" for name in "bos eos unk sep pad cls mask".split()} & fields.keys()
    options = {name: text(fields[name]) for name in names if fields[name]}
    more = fields.get("additional_special_tokens") or fields.get("extra_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more  # by transformers 4
    options["extra_special_tokens"] = [text(token) for token in more]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / TOKENIZER), **options)
    template, file = fields.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}
    tokenizer.chat_template = file.read_text("utf-8") if file.is_file() else template
    tokenizer.name_or_path = folder.name
    return tokenizer


def is_vocabulary(name: str) -> bool:
    """Return whether a file of this name holds the tokens."""
    return name in (TOKENIZER, *MADE_AGAIN) or name.endswith(".model")
