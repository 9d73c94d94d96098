"""Check the folder to convert, and make a view of it for the converter.

The view is a folder of links to the weights, with additions: a tokenizer.model that merges as
tokenizer.json does (a folder's own may rank runs of blanks differently), the special tokens, and
config fields under the names that the converter reads.

The converter loads tokenizers with trust_remote_code, so the view holds neither code nor fields
that name code. Weights are linked, and all other files are written again from their data.
"""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..formats.grids import held_type
from ..formats.registry import AUTO
from ..model.folder import ModelFolder
from ..model.processor import FILES
from ..util.errors import UserError
from ..util.quirks import OLDER_FIELDS, PRE_TOKENIZERS
from ..vocabulary.tokenizer_model import (
    begins_with_blank,
    is_byte_level,
    is_sentencepiece,
    write_tokenizer_model,
)

LINKED = ("*.safetensors", "*.safetensors.index.json", "generation_config.json")
CODE = "auto_map"  # field that names code to run, in the folder or in a repository


def make_view(source: ModelFolder, folder: Path, weights: Path) -> Path:
    """Make the view in the new `folder`, with the weight files of the folder `weights`."""
    folder.mkdir()
    tokenizer = source.tokenizer
    tokenizer.save_pretrained(folder)
    for pattern in LINKED:
        for file in weights.glob(pattern):
            (folder / file.name).symlink_to(file.resolve())
    config = _without_code(weights / "config.json")
    for name in FILES:  # of a processor
        if (weights / name).suffix == ".json" and (weights / name).is_file():
            _write(folder / name, _without_code(weights / name))
    for name, older in OLDER_FIELDS.items():
        if name in config:
            config.setdefault(older, config[name])
    _write(folder / "config.json", config)
    ids = tokenizer("a").input_ids  # with the special tokens that the tokenizer adds
    settings = _without_code(folder / "tokenizer_config.json")
    for name, added in (("bos", ids[0]), ("eos", ids[-1])):
        token = getattr(tokenizer, f"{name}_token_id")
        settings[f"add_{name}_token"] = token is not None and token == added
    if is_sentencepiece(source.tokenizer_data):  # its format does not mark special added tokens
        write_tokenizer_model(tokenizer, folder)
        settings["add_prefix_space"] = begins_with_blank(source.tokenizer_data)
        settings["added_tokens_decoder"] = {
            str(token["id"]): {"content": token["content"], "special": token["special"]}
            for token in source.tokenizer_data["added_tokens"]
        }
    _write(folder / "tokenizer_config.json", settings)
    return folder


def open_source(path: str) -> ModelFolder:
    """Read config and tokenizer of a folder. Raises UserError if it cannot be converted."""
    source, flag = ModelFolder.open(path, "IN"), f"IN {path}"
    if not getattr(source.tokenizer, "is_fast", False):
        raise UserError(flag, "its tokenizer has no tokenizer.json", "Convert it first")
    if source.quantized_by and not source.is_packed:
        problem = f"its weights are quantized by {source.quantized_by}"
        raise UserError(flag, problem, "Name the unquantized model")
    data = source.tokenizer_data
    if not (is_byte_level(data) or is_sentencepiece(data)):
        kind = f"its tokenizer ({data['model'].get('type')})"
        problem = f"{kind} is neither byte-level BPE nor BPE with a token for every byte"
        raise UserError(flag, problem, "It cannot be converted")
    return source


def types_of(folder: Path) -> set[str]:
    """Return llama.cpp's types on whose grids the matrices of a folder are."""
    types = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for tensor in map(tensors.get_tensor, tensors.keys()):
                if tensor.dim() < 2 or not tensor.is_floating_point():
                    continue
                matrix = tensor.view(-1, *tensor.shape[-2:])[0]
                types.add(held_type(matrix) or held_type(matrix.mT))
    return types - {None}


def one_type(types: Set[str]) -> str | None:
    """Return the --quantize that gives a folder these types; None for none."""
    return AUTO if len(types) > 1 else min(types, default=None)


def pre_tokenizer_of(data: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer in a tokenizer.json, `data`; None if unknown.

    The converter identifies tokenizers by the ids of a check text. Tokenizers that its table lacks,
    such as self-trained ones, need this name.
    """
    part = data["pre_tokenizer"] or {}
    parts = part["pretokenizers"] if part.get("type") == "Sequence" else [part]
    *splits, level = parts
    if level.get("type") != "ByteLevel" or level.get("add_prefix_space"):
        return None
    if not splits:
        return "gpt-2" if level.get("use_regex", True) else None
    if len(splits) == 1 and splits[0]["type"] == "Digits":
        return "smollm" if splits[0]["individual_digits"] else None
    if len(splits) == 1 and splits[0]["type"] == "Split" and not level.get("use_regex", True):
        return PRE_TOKENIZERS.get(splits[0]["pattern"].get("Regex"))
    return None


def _without_code(path: Path) -> dict[str, Any]:
    """Return a file's fields without those that name code to run, at any depth."""

    def without_code(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name != CODE}

    return json.loads(path.read_text("utf-8"), object_hook=without_code)


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=2), "utf-8")
