"""Text to token ids, and a small cache on disk of long texts that were tokenised before."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

FOLDER = "language-specific-pruning"
log = logging.getLogger(__name__)


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids (tokens,) of one text, int64, with the tokenizer's own special tokens.

    The same as `tokenizer(text, return_tensors="pt").input_ids[0]`, without its warning about
    texts longer than the model's window, which here are cut into windows afterwards.
    """
    encoding = tokenizer(text, return_tensors="pt", return_attention_mask=False, verbose=False)
    return encoding.input_ids[0].long()  # an empty text comes as float


def tokenise_cached(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """`tokenise`, or its result from an earlier run with the same text and tokenizer.

    A cache that can't be read or written costs time and nothing else.
    """
    file = _file(tokenizer, text)
    if file is None:
        return tokenise(tokenizer, text)
    try:
        return load_file(file)["ids"].long()
    except (OSError, SafetensorError, KeyError) as error:
        log.debug("no cached tokens in %s: %s", file, error)
    ids = tokenise(tokenizer, text)
    try:
        _write(file, ids)
    except (OSError, SafetensorError) as error:
        log.debug("tokens not cached in %s: %s", file, error)
    return ids


def cache_folder() -> Path:
    """Where tokenised texts are kept: under XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / FOLDER / "tokens"


def _file(tokenizer: PreTrainedTokenizerBase, text: str) -> Path | None:
    """The cache's file for this text and tokenizer; None for a tokenizer without a digest.

    The serialised backend holds vocabulary, merges, normaliser and the template that adds special
    tokens, all that makes ids of a text, save what the wrapper sets when it is called.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    import tokenizers

    settings = [type(tokenizer).__name__, tokenizers.__version__]
    for name in ("add_bos_token", "add_eos_token", "split_special_tokens"):
        settings.append(f"{name}={getattr(tokenizer, name, None)}")
    digest = hashlib.sha256()
    for part in (backend.to_str(), *settings, text):
        digest.update(hashlib.sha256(part.encode()).digest())
    return cache_folder() / f"{digest.hexdigest()}.safetensors"


def _write(file: Path, ids: Tensor) -> None:
    """Write beside the target and rename, so that no reader meets half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        new = Path(folder) / file.name
        save_file({"ids": ids.to(torch.int32)}, new)
        new.replace(file)
