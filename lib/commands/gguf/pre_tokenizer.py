"""Finds llama.cpp's name for how a byte-level tokenizer splits a text into words.

The converter looks tokenizers up by the ids of a check text. One that its table lacks, such as a
self-trained one, is identified here by its parts if these are common. The proof then checks whether
llama.cpp tokenises alike.
"""

from __future__ import annotations

from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = (
    r"{}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OF_PATTERN = {
    WORDS.format(CONTRACTIONS, "{1,3}"): "llama-bpe",  # Llama 3
    WORDS.format(CONTRACTIONS, ""): "qwen2",
}


def named_by_parts(data: dict[str, Any]) -> str | None:
    """Return the name for the content of a tokenizer.json; None if its parts are uncommon."""
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
        return OF_PATTERN.get(splits[0]["pattern"].get("Regex"))
    return None
