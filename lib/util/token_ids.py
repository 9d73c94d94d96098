"""Numbers of tokens in the fields of a config: found and replaced, wherever they are nested.

Models, generation and tokenizers keep such numbers under many names (`eos_token_id`, a list of
them, `image_token_index`, `suppress_tokens`, ...). When tokens are renumbered all must follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

NAMES = re.compile(
    r"(.*_)?tokens?_(ids?|index|indices)|(begin_)?suppress_tokens|(bad|force)_words_ids"
    r"|forced_decoder_ids|sequence_bias|padding_idx"
)


def named_ids(fields: Mapping[str, Any]) -> set[int]:
    """Every number of a token that `fields`, nested mappings, hold."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    renumbered(fields, note)
    return found


def renumbered(fields: Mapping[str, Any], new: Callable[[int], int]) -> dict[str, Any]:
    """A copy of `fields` in which every number of a token is what `new` makes of it."""
    return {name: _field(name, value, new) for name, value in fields.items()}


def _field(name: Any, value: Any, new: Callable[[int], int]) -> Any:
    if isinstance(name, str) and NAMES.fullmatch(name):
        if name == "forced_decoder_ids" and value:
            return [[place, _numbers(number, new)] for place, number in value]
        if name == "sequence_bias" and value:
            pairs = value.items() if isinstance(value, Mapping) else value
            moved = [(_numbers(ids, new), bias) for ids, bias in pairs]
            return dict(moved) if isinstance(value, Mapping) else [list(pair) for pair in moved]
        return _numbers(value, new)
    if isinstance(value, Mapping):
        return {key: _field(key, item, new) for key, item in value.items()}
    return value


def _numbers(value: Any, new: Callable[[int], int]) -> Any:
    """A number, or lists of numbers; whatever else stands there stays."""
    if isinstance(value, list | tuple):
        return type(value)(_numbers(item, new) for item in value)
    if isinstance(value, Mapping):
        return {key: _numbers(item, new) for key, item in value.items()}
    counts = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return new(value) if counts else value
