"""Digests of a model's files, which depend on their content and not on where they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PIECE = 4096  # bytes that are read at the beginning, in the middle and at the end of a tensor
TENSORS = 1000  # per file; of a file with more, this many are spread over all
SETTINGS = (  # what a tokenizer and generation read, besides the config
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
WRITTEN_BY = ("_name_or_path", "transformers_version")  # fields that change no result


def weights_digest(name: str, config: Any) -> str:
    """Return the commit of a model on the hub, or a digest of a local model's weight files.

    The digest covers their headers and three pieces of each tensor, not every byte.
    """
    commit = getattr(config, "_commit_hash", None)
    if commit or not Path(name).is_dir():
        return str(commit)
    hasher = hashlib.sha256()
    for file in sorted(Path(name).glob("*.safetensors")):
        hasher.update(f"{file.name} {file.stat().st_size}\n".encode())
        for piece in _pieces(file):
            hasher.update(piece)
    return hasher.hexdigest()[:16]


def _pieces(file: Path) -> Iterator[bytes]:
    """Yield the header of a safetensors file, then pieces of its tensors."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, file.stat().st_size))
        yield header
        entries = json.loads(header)
        spans = sorted(
            tuple(entry["data_offsets"]) for key, entry in entries.items() if key != "__metadata__"
        )
        for begin, end in spans[:: -(-len(spans) // TENSORS) or 1]:
            for start in sorted({begin, (begin + end) // 2, max(begin, end - PIECE)}):
                opened.seek(8 + length + start)
                yield opened.read(min(PIECE, end - start))


def config_digest(config: Any) -> str:
    """Return the digest of a model's config, without its location and the version that wrote it."""
    fields = config.to_dict()
    return json_digest({key: value for key, value in fields.items() if key not in WRITTEN_BY})


def settings_digest(name: str, config: Any) -> str:
    """Return the digest of the files of tokenizer, chat template and generation."""
    commit = getattr(config, "_commit_hash", None)
    folder = Path(name)
    if commit or not folder.is_dir():
        return str(commit)
    files = sorted(
        {file for pattern in SETTINGS for file in folder.glob(pattern) if file.is_file()}
    )
    return json_digest({os.fspath(file.relative_to(folder)): _content(file) for file in files})


def _content(file: Path) -> Any:
    """Return the fields of generation_config.json, or the digest of any other file."""
    if file.name == "generation_config.json":
        fields = json.loads(file.read_text("utf-8"))
        return {key: value for key, value in fields.items() if key not in WRITTEN_BY}
    return hashlib.sha256(file.read_bytes()).hexdigest()


def json_digest(value: Any) -> str:
    """Return the digest of plain values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
