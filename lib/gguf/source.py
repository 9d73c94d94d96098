"""The folder to convert: checks of it, and a view of it for the converter.

The view is a folder of links, with what transformers' folders lack: a tokenizer.model that merges
as tokenizer.json does (a folder's own may rank runs of blanks otherwise), the special tokens, and
config fields under the names that the converter reads.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lib.data.tokenizer_model import (
    FILE,
    begins_with_blank,
    check_of,
    is_byte_level,
    is_sentencepiece,
    write_tokenizer_model,
)
from lib.gguf.pre_tokenizer import named_by_parts
from lib.packed.checkpoint import METHOD
from lib.util.errors import UserError

# written for the view, never linked: the converter prefers them to tokenizer.json
MADE = frozenset({FILE, "added_tokens.json", "tokenizer_config.json", "config.json"})


@dataclass(frozen=True)
class Source:
    """A folder with its config and tokenizer; `data` is the content of tokenizer.json."""

    folder: Path
    config: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, Any]

    @property
    def packed(self) -> bool:
        return _quantised_by(self.config) == METHOD

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
        for file in weights.iterdir():
            if file.name not in MADE and file.is_file() and not (folder / file.name).exists():
                os.symlink(file.resolve(), folder / file.name)
        config = json.loads((weights / "config.json").read_text("utf-8"))
        if "n_positions" in config:  # GPT-2's, under its older name
            config.setdefault("n_ctx", config["n_positions"])
        _write(folder / "config.json", config)
        settings = folder / "tokenizer_config.json"
        fields = json.loads(settings.read_text("utf-8")) | self._ends()
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
        config = json.loads((folder / "config.json").read_text("utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"IN {path}: its config or tokenizer can't be read: {reason}") from error
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"IN {path}: holds no weights (*.safetensors)")
    method = _quantised_by(config)
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


def _quantised_by(config: dict[str, Any]) -> str | None:
    return (config.get("quantization_config") or {}).get("quant_method")


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)  # replaces a link, not the file behind it
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=2), "utf-8")
