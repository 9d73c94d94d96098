"""The folder to convert: checks of it, and a view of it for the converter.

The view is a folder of links to the weights, with what transformers' folders lack: a
tokenizer.model that merges as tokenizer.json does (a folder's own may rank runs of blanks
otherwise), the special tokens, and config fields under the names that the converter reads.

The converter loads tokenizers with trust_remote_code, so the view holds no code of the folder and
nothing that names code: weights are linked, the rest is written anew from what was read as data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from lib.commands.gguf.pre_tokenizer import named_by_parts
from lib.data.tokenizer_model import (
    begins_with_blank,
    check_of,
    is_byte_level,
    is_sentencepiece,
    write_tokenizer_model,
)
from lib.packed.checkpoint import METHOD
from lib.util.errors import UserError

LINKED = ("*.safetensors", "*.safetensors.index.json", "generation_config.json")
CODE = "auto_map"  # field that names code to run, of the folder or of a repository


@dataclass(frozen=True)
class Source:
    """A folder with its config and tokenizer; `data` is the content of tokenizer.json."""

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, Any]

    @property
    def packed(self) -> bool:
        return quantised_by(self.config) == METHOD

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    @property
    def checks(self) -> dict[str, Any]:
        """What identifies the pre-tokenizer of a byte-level tokenizer to the converter."""
        if not is_byte_level(self.data):
            return {"check": None, "parts": None}
        return {"check": check_of(self.tokenizer), "parts": named_by_parts(self.data)}

    @property
    def begins_with_blank(self) -> bool:
        return is_sentencepiece(self.data) and begins_with_blank(self.data)

    def view(self, folder: Path, weights: Path) -> Path:
        """Make the view in the new `folder`, with the weight files of the folder `weights`."""
        folder.mkdir()
        self.tokenizer.save_pretrained(folder)
        for pattern in LINKED:
            for file in weights.glob(pattern):
                (folder / file.name).symlink_to(file.resolve())
        config = read_json(weights / "config.json")
        if "n_positions" in config:  # GPT-2's, under its older name
            config.setdefault("n_ctx", config["n_positions"])
        _write(folder / "config.json", config)
        settings = folder / "tokenizer_config.json"
        fields = read_json(settings) | self._ends()
        if is_sentencepiece(self.data):
            write_tokenizer_model(self.tokenizer, folder)
            fields |= self._added()
        _write(settings, fields)
        return folder

    def _ends(self) -> dict[str, bool]:
        """Return which special tokens the tokenizer adds around a text."""
        ids, tokenizer = self.tokenizer("a").input_ids, self.tokenizer
        return {
            "add_bos_token": tokenizer.bos_token_id is not None
            and ids[0] == tokenizer.bos_token_id,
            "add_eos_token": tokenizer.eos_token_id is not None
            and ids[-1] == tokenizer.eos_token_id,
        }

    def _added(self) -> dict[str, Any]:
        """Return what SentencePiece's format lacks: which added tokens are special."""
        decoder = {
            str(token["id"]): {"content": token["content"], "special": token["special"]}
            for token in self.data["added_tokens"]
        }
        blank = begins_with_blank(self.data)
        return {"add_prefix_space": blank, "added_tokens_decoder": decoder}


def open_source(path: str) -> Source:
    """Read config and tokenizer of a folder. Raises UserError if it can't be converted."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"IN {path}: no model folder (it has no config.json)")
    try:
        given = dict(local_files_only=True, trust_remote_code=False)
        config = AutoConfig.from_pretrained(folder, **given)
        tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"IN {path}: its config or tokenizer can't be read: {reason}") from error
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"IN {path}: holds no weights (*.safetensors)")
    method = quantised_by(config)
    if method not in (None, METHOD):
        raise UserError(
            f"IN {path}: its weights are quantised by {method}; convert the model that it was made "
            "of"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"IN {path}: its tokenizer has no tokenizer.json; only such are converted")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    if not (is_byte_level(data) or is_sentencepiece(data)):
        raise UserError(
            f"IN {path}: its tokenizer is of the kind {data['model'].get('type')}, neither "
            "byte-level BPE nor BPE with a token for every byte; only such are converted"
        )
    return Source(folder, config, tokenizer, data)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file's fields, at any depth without those that name code to run."""

    def without_code(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name != CODE}

    return json.loads(path.read_text("utf-8"), object_hook=without_code)


def quantised_by(config: PretrainedConfig) -> str | None:
    return (getattr(config, "quantization_config", None) or {}).get("quant_method")


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=2), "utf-8")
