"""A fast tokenizer with fewer tokens: dependencies between tokens, and the trimmed files.

Byte-pair encoding (byte-level, or with tokens for bytes), Unigram and WordPiece can be trimmed. A
text whose tokens are all kept is tokenized as by the original: all merges of its words are kept,
and the removed merges belong to other words. A text with a removed token is split into smaller
tokens, down to bytes, and decodes to the same text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.templates import dated_texts, examples
from ..data.tokenizers import as_loaded, template_texts
from ..util.errors import UserError
from .kinds import (
    BLANK,
    BYTE_OF_LETTER,
    BYTE_TOKENS,
    Bpe,
    Unigram,
    Vocabulary,
    WordPiece,
    is_reserved,
    ranks_of,
)

# fields of a tokenizer's components that hold replacements for a blank
SUBSTITUTES = ("replacement", "content", "prepend", "String", "Regex")
ROLES = "user assistant system tool".split()
log = logging.getLogger(__name__)


class TrimmableTokenizer:
    """The tokens of a fast tokenizer by id, and the tokens that each of them is merged from.

    `name` names the tokenizer in messages; `file` is the content of its tokenizer.json, which some
    classes of transformers change. Raises UserError if it cannot be trimmed.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, file: dict[str, Any] | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise _unsupported(name, f"a {kind} without a tokenizer.json")
        self.tokenizer, self.name = tokenizer, name
        self.data: dict[str, Any] = json.loads(as_loaded(tokenizer).backend_tokenizer.to_str())
        self.file = file or self.data
        model = self.data["model"]
        self.kind = model.get("type")
        if self.kind not in ("BPE", "Unigram", "WordPiece"):
            raise _unsupported(name, f"of the kind {self.kind}")
        self.prefix = model.get("continuing_subword_prefix") or ""  # of a token inside a word
        for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(affix) and self.kind == "BPE":
                raise _unsupported(name, f"BPE with {affix} {model[affix]!r}")
        self.token_to_id: dict[str, int] = tokenizer.get_vocab()
        self.id_to_token = {index: token for token, index in self.token_to_id.items()}
        vocab = model["vocab"]
        # tokens of the model; the others are added tokens
        self.model_tokens = [t for t, _ in vocab] if self.kind == "Unigram" else list(vocab)
        if len(set(self.model_tokens)) < len(self.model_tokens):
            raise _unsupported(name, "one with duplicate tokens")

    def vocabulary(self, config_ids: Set[int] = frozenset(), rows: int | None = None) -> Vocabulary:
        """Return what `choose` needs to know; the tokens in `config_ids` are required.

        Tokens that have none of the model's `rows` are kept only if a text or a config has them.
        """
        model, special = self.data["model"], self.special_ids()
        special |= {i for i in self.id_to_token if rows is not None and i >= rows}
        options = dict(tokens=dict(self.id_to_token), special=special, basic=self.basic_ids())
        options |= dict(byte_level=self.is_byte_level, has_bytes=self.has_bytes)
        options["reasons"] = {
            "special": self.named_ids(),
            "chat template": self.template_ids(),
            "config": config_ids & self.id_to_token.keys(),
        }
        if self.kind == "Unigram":
            scores = {self.token_to_id[token]: score for token, score in model["vocab"]}
            return Unigram(**options, scores=scores)
        if self.kind == "WordPiece":  # written as in a GGUF file
            words = {*self.model_tokens} - {token["content"] for token in self.data["added_tokens"]}
            for index in map(self.token_to_id.get, words):
                token = self.id_to_token[index]
                inside = token.startswith(self.prefix)
                options["tokens"][index] = token[len(self.prefix) :] if inside else f"▁{token}"
            return WordPiece(**options)
        return Bpe(**options, ranks=ranks_of(model.get("merges") or ()))

    @property
    def is_byte_level(self) -> bool:
        components = (self.data["pre_tokenizer"], self.data["decoder"])
        return any(part.get("type") == "ByteLevel" for part in _components(components))

    @property
    def has_bytes(self) -> bool:
        """Whether letters that are no tokens are cut into bytes; else they are unknown."""
        falls_back = (
            self.data["model"].get("byte_fallback") and BYTE_TOKENS <= self.token_to_id.keys()
        )
        return self.is_byte_level or bool(falls_back)

    def basic_ids(self) -> set[int]:
        """Return the bytes, if there are any, and the sign for a blank."""
        basic = set(BYTE_OF_LETTER) if self.is_byte_level else BYTE_TOKENS | {BLANK}
        return {self.token_to_id[token] for token in basic if token in self.token_to_id}

    def special_ids(self) -> set[int]:
        """Return all special, added and reserved tokens."""
        tokens = {token["content"] for token in self.data["added_tokens"]}
        tokens |= {*self.tokenizer.all_special_tokens, *filter(is_reserved, self.model_tokens)}
        return {self.token_to_id[token] for token in tokens if token in self.token_to_id}

    def named_ids(self) -> set[int]:
        """Return special and added tokens, but with a reserved name only those that the tokenizer's
        settings name or that it inserts."""
        data, model = self.data, self.data["model"]
        components = (data["normalizer"], data["pre_tokenizer"], data["decoder"])
        # as bytes, the sign for a blank would not decode to a blank
        texts = (part.get(key) for part in _components(components) for key in SUBSTITUTES)
        needed = {text for text in texts if isinstance(text, str)} | {model.get("unk_token")}
        needed.update(self.tokenizer.all_special_tokens)
        if self.kind == "Unigram":
            # an unknown letter's score is computed from the lowest score
            needed.add(min(model["vocab"], key=lambda entry: entry[1])[0])
            if model["unk_id"] is not None:
                needed.add(self.model_tokens[model["unk_id"]])
        ids = {self.token_to_id[token] for token in needed if token in self.token_to_id}
        ids |= {i for i in self.special_ids() if not is_reserved(self.id_to_token[i])}
        return ids | self._inserted_ids()

    def _inserted_ids(self) -> set[int]:
        """Return the ids that the post-processor and padding add to a text."""
        ids: set[int] = set()
        for data in (self.data, self.file):
            ids |= {data["padding"]["pad_id"]} if data["padding"] else set()
            _map_ids(data["post_processor"], ids.add)
        return ids

    def template_ids(self) -> set[int]:
        """Return the tokens of the chat templates: of literals, text outside tags, and examples.

        If a template writes the date, the tokens of any date are included.
        """
        if not self.tokenizer.chat_template:
            return set()
        texts = [*ROLES, *template_texts(self.tokenizer, self.name)]
        try:
            for follows in (False, True):
                texts += [text for *_, text in examples(self.tokenizer, follows)]
            texts += dated_texts(self.tokenizer)
        except UserError as error:  # dialogues were not requested
            log.warning("%s", error)
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return {index for each in ids for index in each}

    def trimmed_json(self, kept: Sequence[int]) -> dict[str, Any]:
        """Return the content of a tokenizer.json with only the tokens `kept`, in this order."""
        places = {self.id_to_token[index]: place for place, index in enumerate(kept)}
        new_ids = {index: place for place, index in enumerate(kept)}
        data, model = dict(self.file), dict(self.file["model"])
        if self.kind == "Unigram":
            scores = dict(model["vocab"])
            model["vocab"] = [[token, scores[token]] for token in places if token in scores]
            if model["unk_id"] is not None:
                model["unk_id"] = places[self.model_tokens[model["unk_id"]]]
        else:
            model["vocab"] = {t: place for t, place in places.items() if t in model["vocab"]}
        if merges := model.get("merges"):
            model["merges"] = [[a, b] for a, b in merges if {a, b, a + b} <= places.keys()]
        added = [
            token | {"id": places[token["content"]]}
            for token in self.data["added_tokens"]
            if token["content"] in places
        ]
        data |= {"model": model, "added_tokens": sorted(added, key=lambda token: token["id"])}
        data["post_processor"] = _map_ids(data["post_processor"], new_ids.__getitem__)
        if data["padding"]:
            data["padding"] = data["padding"] | {"pad_id": new_ids[data["padding"]["pad_id"]]}
        return data


def _unsupported(name: str, what: str) -> UserError:
    problem = f"its tokenizer is {what}, and only fast BPE, Unigram and WordPiece can be trimmed"
    return UserError(name, problem, "Name another model")


def _components(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all components of a normalizer, pre-tokenizer or decoder, nested ones too."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for item in value if isinstance(value, list | tuple) else ():
        yield from _components(item)


def _map_ids(value: Any, new_id: Callable[[int], Any]) -> Any:
    """Return a post-processor with new ids; templates have them as `ids`, others as [token, id]."""
    match value:
        case [str() as token, int() as index]:
            return [token, new_id(index)]
        case list():
            return [_map_ids(each, new_id) for each in value]
        case {"ids": list() as ids}:
            return value | {"ids": [new_id(index) for index in ids]}
        case dict():
            return {key: _map_ids(each, new_id) for key, each in value.items()}
    return value
