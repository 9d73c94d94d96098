"""Find and replace token ids in the fields of a config, however deeply they are nested.

Configs of models, generation and tokenizers hold token ids under many names (`eos_token_id`, a
list of them, `image_token_index`, `suppress_tokens`, ...). All are updated when ids change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..util.quirks import TOKEN_ID_FIELDS


def find_token_ids(fields: Mapping[str, Any]) -> set[int]:
    """Return every token id in `fields`, nested mappings."""
    ids: set[int] = set()
    map_token_ids(fields, ids.add)
    return ids


def map_token_ids(fields: Mapping[str, Any], new_id: Callable[[int], Any]) -> dict[str, Any]:
    """Return a copy of `fields` with `new_id` applied to every token id."""
    return {name: _map_field(name, value, new_id) for name, value in fields.items()}


def _map_field(name: Any, value: Any, new_id: Callable[[int], Any]) -> Any:
    if isinstance(name, str) and TOKEN_ID_FIELDS.fullmatch(name):
        if name == "sequence_bias" and value:
            pairs = value.items() if isinstance(value, Mapping) else value
            moved = [(_map_ids(ids, new_id), bias) for ids, bias in pairs]
            return dict(moved) if isinstance(value, Mapping) else [list(pair) for pair in moved]
        return _map_ids(value, new_id)
    if isinstance(value, Mapping):
        return {key: _map_field(key, item, new_id) for key, item in value.items()}
    return value


def _map_ids(value: Any, new_id: Callable[[int], Any]) -> Any:
    """Map an id, or nested lists of ids; return anything else unchanged."""
    if isinstance(value, list | tuple):
        return type(value)(_map_ids(item, new_id) for item in value)
    if isinstance(value, Mapping):
        return {key: _map_ids(item, new_id) for key, item in value.items()}
    is_id = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return new_id(value) if is_id else value
