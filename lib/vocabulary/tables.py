"""The tables of a checkpoint's files with a row for each token, found without its weights.

Where transformers has the model's class, the tables are the tensors whose first size grows with the
vocabulary. Otherwise, as for static embedders, they are found by name. Nothing is guessed: an
unknown tensor of the vocabulary's size is refused. Files are mapped, and their tensors written from
the map: only kept rows are read into memory.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from ..model.blocks import Stop, replaced
from ..model.checkpoint import Checkpoint
from ..model.skeleton import build_skeleton
from ..util.errors import UserError

TRIMMED_FROM = "vocabulary_trimmed_from"  # field of a trimmed model's config: its rows at first
SIZE = re.compile(r"vocab_size\w*")  # fields of a config; `type_vocab_size` is another one
MORE = 64  # rows by which the vocabulary grows, to see which tensors do
READ_TOKENS = 1024  # looked up at a time, to find the rows that a model reads
FIX = "Only other models can be trimmed"
# of BERT's kinds, LLaMA's, ModernBERT, GPT-2, GPT-NeoX and T5; static ones of sentence-transformers
# and of model2vec
INPUTS = re.compile(
    r"(.*\.)?(word_embeddings|embed_tokens(_per_layer)?|tok_embeddings|wte|embed_in|shared)\.weight"
    r"|embedding\.weight|embeddings"
)
HEADS = re.compile(
    r"(.*\.)?(lm_head|embed_out|output_layer|decoder|vocab_projector)\.(weight|bias)"
    r"|(.*\.)?(predictions|lm_head)\.bias|weights"
)


@dataclass
class Tables:
    """The tensors of a checkpoint with a row for each token: {name in its files: their number}.

    `model` has no weights; None if transformers does not have its class. `smaller` is {path of an
    embedding in it: name in the files} of other tables than that of the input.
    """

    rows: int  # of the input's embedding
    names: dict[str, int]
    model: nn.Module | None = None
    smaller: dict[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> set[int]:
        return {self.rows, *self.names.values()}

    def kept(self, rows: Tensor, what: str) -> dict[str, Tensor]:
        """Return the rows to keep of each table, by name, for `rows` (tokens,) of the input's."""
        kept = dict.fromkeys(self.names, rows)
        if self.smaller:
            read = rows_read(self.model, [*self.smaller], rows, what)
            kept |= {name: read[path] for path, name in self.smaller.items()}
        return kept


def open_model(checkpoint: Checkpoint) -> nn.Module | None:
    """Build the model of a folder without weights, by the class that its config names.

    None if transformers has no such class.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.name, **checkpoint.options())
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        is_known = kind or checkpoint.trust_remote_code and hasattr(config, "auto_map")
        return build_skeleton(config, checkpoint, kind) if is_known else None
    except Exception:  # noqa: BLE001  code of models raises any
        return None


def tables_of(tensors: Mapping[str, Tensor], what: str, checkpoint: Checkpoint) -> Tables:
    """Find the tables among the `tensors` of a folder, `checkpoint`; `what` names it in messages.

    Raises UserError if there is none, and for a tensor of that size that is unknown.
    """
    model, growing, paths = open_model(checkpoint), {}, {}
    if model:
        growing = _growing(model, checkpoint, what)
        paths = _paths(model, tensors)
    tables = {n: len(t) for n, t in tensors.items() if paths.get(n) in growing}
    for name, size in tables.items():
        if size != growing[paths[name]]:
            problem = f"{name} has {size} rows, and by config.json {growing[paths[name]]}"
            raise UserError(what, problem, "Correct it, or name the unquantized model")
    if model:
        embedding = model.get_input_embeddings()
        inputs = {path for path, each in _state(model).items() if each is embedding.weight}
        found = [size for name, size in tables.items() if paths[name] in inputs]
    else:
        tables = {n: len(t) for n, t in tensors.items() if INPUTS.fullmatch(n) and t.dim() == 2}
        found = [*tables.values()]
    if not found:
        raise UserError(what, "no tensor is known to have a row for each token", FIX)
    rows = found[0]
    for name, tensor in tensors.items():
        if name in paths:
            continue
        shape = [*tensor.shape]
        if (name in tables or INPUTS.fullmatch(name) or HEADS.fullmatch(name)) and shape[0] == rows:
            tables[name] = rows
        elif name in tables or INPUTS.fullmatch(name) and len(shape) == 2:
            raise UserError(what, f"{name} has {shape[0]} rows for {rows} tokens", FIX)
        elif rows in shape:
            problem = f"{name} {shape} is unknown, and may have a row for each of {rows} tokens"
            raise UserError(what, problem, FIX)
    smaller = {}
    for name in tables.keys() & paths.keys():
        module = model.get_submodule(paths[name].rpartition(".")[0])
        if isinstance(module, nn.Embedding) and module is not embedding:
            if module.weight is not embedding.weight and paths[name] not in inputs:
                smaller[paths[name].rpartition(".")[0]] = name
    return Tables(rows, tables, model, smaller)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)


def _growing(model: nn.Module, checkpoint: Checkpoint, what: str) -> dict[str, int]:
    """Return {path: rows} of the tensors whose first size grows with the vocabulary.

    Raises UserError for other tensors that depend on it, or on the vocabulary of another part.
    """
    config = copy.deepcopy(model.config)
    text, sizes = config.get_text_config(), set()
    for each in nested(config):
        for name, value in vars(each).items():
            if SIZE.fullmatch(name) and isinstance(value, int):
                if each is text or value == text.vocab_size:
                    setattr(each, name, value + MORE)
                else:
                    sizes.add(value)
    larger = _state(build_skeleton(config, checkpoint, type(model)))
    growing = {}
    for path, tensor in _state(model).items():
        shape, other = [*tensor.shape], [*larger[path].shape]
        if shape == other:
            module = model.get_submodule(path.rpartition(".")[0])
            if not (isinstance(module, nn.Embedding) and shape[0] in sizes):
                continue
        elif other == [shape[0] + MORE, *shape[1:]]:
            growing[path] = shape[0]
            continue
        problem = f"a tensor {path} {shape}, which depends on its vocabulary"
        raise UserError(what, f"it has {problem}", FIX)
    return growing


def _paths(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {name in the files: path in the model} of the tensors that the model has."""
    transforms, state = get_model_conversion_mapping(model), _state(model)
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix
    renamed = {n: rename_source_key(n, renamings, converters, prefix, state)[0] for n in names}
    return {name: path for name, path in renamed.items() if path in state}


def rows_read(model: nn.Module, tables: list[str], ids: Tensor, what: str) -> dict[str, Tensor]:
    """Return the row of each of the `tables` that a bare model reads for `ids` (tokens,).

    For tokens beyond a smaller table this is another token's row. The forward pass ends once all
    tables were read. Raises UserError if most tokens do not choose their own row.
    """
    read: dict[str, list[Tensor]] = {path: [] for path in tables}

    def look_up(module: nn.Embedding, path: str, ids: Tensor) -> Tensor:
        if path in read:
            read[path].append(ids.flatten())
            if len(set(map(len, read.values()))) == 1:
                raise Stop
        return torch.empty(*ids.shape, module.embedding_dim, device="meta", dtype=torch.float32)

    modules = {path: model.get_submodule(path) for path in tables} | {
        "": model.get_input_embeddings()
    }
    patched = {module: partial(look_up, module, path) for path, module in modules.items()}
    with replaced(patched), torch.no_grad():
        for part in ids.split(READ_TOKENS):
            try:
                model(input_ids=part[None], use_cache=False)
            except Stop:
                continue
            except Exception:  # noqa: BLE001  code of models raises any
                break
    rows = {path: torch.cat([ids[:0], *parts]) for path, parts in read.items()}
    for path, found in rows.items():
        chosen = found.shape == ids.shape and (found == ids).sum() > len(ids) // 2
        if not chosen or found.max() >= modules[path].num_embeddings:
            size = modules[path].num_embeddings
            problem = f"it has a table {path} of {size} rows, which are not its tokens'"
            raise UserError(what, problem, FIX)
    return rows


def nested(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a config and all configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from nested(value)


def with_defaults(
    fields: Mapping[str, Any], config: Mapping[str, Any], wanted: Callable[[str, Any], bool]
) -> dict[str, Any]:
    """Return a config.json's fields with those that only its class has, if they are `wanted`."""
    fields = dict(fields)
    for name, value in config.items():
        if isinstance(value, Mapping):
            inner = with_defaults(fields.get(name) or {}, value, wanted)
            fields |= {name: inner} if inner else {}
        elif name not in fields and value is not None and wanted(str(name), value):
            fields[name] = value
    return fields


def write_rows(source: Path, target: Path, kept: Mapping[str, Tensor], what: str) -> None:
    """Write a file's tensors, of the tables the `kept` rows alone, and compare all bytes.

    Raises UserError if the written file has others.
    """
    with safe_open(source, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(source)  # mapped
    tensors |= {name: tensors[name][kept[name]] for name in kept.keys() & tensors.keys()}
    save_file(tensors, target, metadata)
    for name, written in load_file(target).items():
        expected = tensors.pop(name)
        both = [each.reshape(-1).view(torch.uint8) for each in (written, expected)]
        if written.dtype != expected.dtype or not torch.equal(*both):
            raise UserError(what, f"{name} is not as it was written", "Check the disk")
