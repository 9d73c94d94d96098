"""Write the tokenizer data that llama.cpp's converter and others need beside tokenizer.json.

Tokenizers like SentencePiece's have byte-pair encoding with a token for every byte, as in Llama 2,
Mistral 7B and Gemma. They get a `tokenizer.model`: every piece with its type and a score. A score
is the negated rank of the first merge that makes the token. An engine that merges by score then
applies the merges of tokenizer.json in their order.

The converter identifies byte-level tokenizers by the ids of a certain text. Trimming changes the
ids, so the tokenizer's config stores those of the original vocabulary.

The file's format is sentencepiece_model.proto of google/sentencepiece, written here field by field,
because the package's own classes work only with the newest protobuf.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kinds import BYTE_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # ModelProto.SentencePiece.Type
UNREACHED = -1e6  # score of tokens without a merge

CHECK = "llama_cpp_check"  # field of tokenizer_config.json
# the text of llama.cpp's convert_hf_to_gguf_update.py whose ids identify a tokenizer
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


def check_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """Return the original vocabulary's encoding of CHECK_TEXT: the text's digest and the ids.

    None for a tokenizer that is not byte-level. A trimmed tokenizer returns its stored value.
    """
    if CHECK in tokenizer.init_kwargs:
        return tokenizer.init_kwargs[CHECK]
    if not is_byte_level(_data(tokenizer)):
        return None
    return {"text": digest(CHECK_TEXT), "ids": list(tokenizer.encode(CHECK_TEXT))}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_byte_level(data: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json, read to `data`, is byte-level BPE."""
    return data["model"].get("type") == "BPE" and '"ByteLevel"' in json.dumps(
        [data["pre_tokenizer"], data["normalizer"]]
    )


def is_sentencepiece(data: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json, read to `data`, is BPE with byte fallback."""
    model = data["model"]
    return (
        model.get("type") == "BPE"
        and bool(model.get("byte_fallback"))
        and _unknown(model) in model["vocab"]
        and BYTE_TOKENS <= model["vocab"].keys()
    )


def _unknown(model: dict[str, Any]) -> str:
    return model.get("unk_token") or "<unk>"


def begins_with_blank(data: dict[str, Any]) -> bool:
    """Return whether the tokenizer puts a blank before a text."""
    parts = json.dumps([data["normalizer"], data["pre_tokenizer"]])
    return bool(re.search('"Prepend"|"prepend_scheme": "(always|first)"', parts))


def write_tokenizer_model(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Write FILE into `folder` and return True if the tokenizer is like SentencePiece's."""
    if not getattr(tokenizer, "is_fast", False) or not is_sentencepiece(data := _data(tokenizer)):
        return False
    (folder / FILE).write_bytes(_model_proto(data, pieces(data)))
    return True


def pieces(data: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Return text, score and type of every token of a tokenizer.json by id, without gaps."""
    model = data["model"]
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge), rank)
    tokens = dict(model["vocab"])
    kinds = dict.fromkeys(BYTE_TOKENS, BYTE)
    for token in data["added_tokens"]:
        tokens[token["content"]] = token["id"]
        kinds[token["content"]] = CONTROL if token["special"] else USER_DEFINED
    kinds[_unknown(model)] = UNKNOWN
    count = max(tokens.values()) + 1
    listed = [(f"<unused id {number}>", UNREACHED, UNUSED) for number in range(count)]
    for token, number in tokens.items():
        score = -float(ranks[token]) if token in ranks else UNREACHED
        kind = kinds.get(token, NORMAL)
        listed[number] = (token, score if kind == NORMAL else 0.0, kind)
    return listed


def _data(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _model_proto(data: dict[str, Any], listed: list[tuple[str, float, int]]) -> bytes:
    """Return a ModelProto: pieces, and the other settings that engines read."""
    unknown = _unknown(data["model"])
    number = next(i for i, (_, _, kind) in enumerate(listed) if kind == UNKNOWN)
    trainer = {3: 2, 4: len(listed), 35: 1}  # BPE, size, byte fallback
    trainer |= {40: number, 41: -1, 42: -1, 43: -1, 45: unknown.encode()}
    # blanks are kept, and written as ▁
    normalizer = {1: b"identity", 3: int(begins_with_blank(data)), 4: 0, 5: 1}
    parts = (_message({1: text.encode(), 2: score, 3: kind}) for text, score, kind in listed)
    written = b"".join(_message({1: part}) for part in parts)
    return written + _message({2: _message(trainer), 3: _message(normalizer)})


def _message(fields: dict[int, int | float | bytes]) -> bytes:
    """Return a protobuf message from its fields by number."""
    written = b""
    for number, value in fields.items():
        match value:
            case int():
                written += _varint(number << 3) + _varint(value)
            case float():
                written += _varint(number << 3 | 5) + struct.pack("<f", value)
            case bytes():
                written += _varint(number << 3 | 2) + _varint(len(value)) + value
    return written


def _varint(value: int) -> bytes:
    value %= 2**64  # two's complement of negative numbers
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])
