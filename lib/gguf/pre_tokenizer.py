"""The name that llama.cpp has for how a byte-level tokenizer splits a text into words.

The converter knows it by the ids of a check text. A tokenizer that its table does not hold, trained
by oneself say, is known here by its own parts, where they are among the common ones. Whether
llama.cpp then cuts texts alike is for the proof to say.
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
    """The name for a tokenizer.json, read to `data`; None where its parts are not common ones."""
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
