"""A fast tokenizer made smaller: which of its tokens need which others, and the smaller one.

Byte-pair encoding (byte-level, or with tokens for bytes that no other token spells) and Unigram. A
text of which every token stays is cut as before: of the merges that its words went through none is
missing, and what is left of the others can only be less. A text that needs a dropped token is cut
into the parts of it, in the end into bytes, and reads the same.

The smaller tokenizer is written to a folder and loaded from it by AutoTokenizer, so that what a run
goes on with is what a user of the saved model will load.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lib.data.tokenizer_model import CHECK, check_of
from lib.util.errors import UserError
from lib.util.token_ids import renumbered

FLAG = "--trim_vocabulary"
BYTES = [f"<0x{number:02X}>" for number in range(256)]
LITERALS = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
TAGS = re.compile(r"\{[{%#].*?[}%#]\}", re.DOTALL)
ROLES = "user assistant system tool".split()


class Pieces:
    """The tokens of a fast tokenizer, by their numbers, and what each is made of.

    `named`: how messages name the tokenizer. UserError where it is none that can be made smaller.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, named: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            kind = type(tokenizer).__name__
            raise _refused(named, f"a slow one ({kind}, without a tokenizer.json)")
        self.tokenizer = tokenizer
        self.data: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        model = self.data["model"]
        self.kind = model.get("type")
        if self.kind not in ("BPE", "Unigram"):
            raise _refused(named, f"of the kind {self.kind}")
        for mark in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(mark):
                raise _refused(named, f"BPE with {mark} {model[mark]!r}")
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.tokens = {number: token for token, number in self.ids.items()}
        known = model["vocab"]
        self.own = [piece for piece, _ in known] if self.kind == "Unigram" else list(known)
        if len(set(self.own)) < len(self.own) or len(self.tokens) < len(self.ids):
            raise _refused(named, "one in which a token stands twice")
        self.ranks: dict[tuple[str, str], int] = {}
        for rank, merge in enumerate(model.get("merges") or ()):
            self.ranks.setdefault(_pair(merge), rank)

    def parts(self, number: int) -> set[int]:
        """The token itself and all that stand for a moment while merges make it of its letters.

        A token that no merges lead to (a special one, or one that is only taken whole) needs none.
        """
        token = self.tokens[number]
        letters = list(token)
        met = {token, *letters}
        while len(letters) > 1:
            ranked = [
                (self.ranks[pair], place)
                for place, pair in enumerate(pairwise(letters))
                if pair in self.ranks
            ]
            if not ranked:
                return {number}
            _, place = min(ranked)
            letters[place : place + 2] = ["".join(letters[place : place + 2])]
            met.add(letters[place])
        return {self.ids[part] for part in met}

    def indispensable(self) -> set[int]:
        """Special and added tokens, and what any text at all can be spelt with."""
        data, model = self.data, self.data["model"]
        needed = {token["content"] for token in data["added_tokens"]}
        needed |= set(self.tokenizer.all_special_tokens)
        places = (data["normalizer"], data["pre_tokenizer"], data["decoder"])
        needed |= set(_stand_ins(places))  # a blank's sign: as bytes it would stay a sign
        if any(part.get("type") == "ByteLevel" for part in _components(places)):
            needed |= set(pre_tokenizers.ByteLevel.alphabet())
        elif model.get("byte_fallback") and set(BYTES) <= self.ids.keys():
            needed |= set(BYTES)
        else:
            needed |= {token for token in self.own if len(token) == 1}
        if self.kind == "Unigram":
            # the worst score is also what an unknown letter's is reckoned from
            worst = min(model["vocab"], key=lambda piece: piece[1])[0]
            needed.add(worst)
            if model["unk_id"] is not None:
                needed.add(self.own[model["unk_id"]])
        elif model.get("unk_token"):
            needed.add(model["unk_token"])
        asked = _Asked()
        _post_processor(data["post_processor"], asked)
        padding = {data["padding"]["pad_id"]} if data["padding"] else set()
        return {self.ids[token] for token in needed if token in self.ids} | asked.keys() | padding

    def of_template(self) -> set[int]:
        """What the chat template writes: tokens of its texts, and of small talks made by it."""
        backend = self.tokenizer.backend_tokenizer
        texts = list(_template_texts(self.tokenizer))
        found = backend.encode_batch(texts, add_special_tokens=False)
        return {number for encoding in found for number in encoding.ids}

    def in_order(self, kept: Iterable[int]) -> list[int]:
        """The numbers as the smaller tokenizer will count them: its model's, then added tokens."""
        own = {self.ids[token] for token in self.own}
        return sorted(kept, key=lambda number: (number not in own, number))

    def smaller(self, kept: Sequence[int]) -> dict[str, Any]:
        """What stands in tokenizer.json when of all tokens only `kept`, in this order, are left."""
        new = {number: place for place, number in enumerate(kept)}
        data, model = dict(self.data), dict(self.data["model"])
        stay = {self.tokens[number] for number in kept}
        if self.kind == "Unigram":
            pieces = {piece: score for piece, score in model["vocab"]}
            ordered = [self.tokens[number] for number in kept if self.tokens[number] in pieces]
            model["vocab"] = [[piece, pieces[piece]] for piece in ordered]
            if model["unk_id"] is not None:
                model["unk_id"] = ordered.index(self.own[model["unk_id"]])
        else:
            own = set(self.own)
            tokens = (self.tokens[number] for number in kept)
            model["vocab"] = {token: new[self.ids[token]] for token in tokens if token in own}
            model["merges"] = [
                list(pair) for pair in map(_pair, model["merges"]) if _stays(pair, stay)
            ]
        added = [token | {"id": new[self.ids[token["content"]]]} for token in data["added_tokens"]]
        data |= {"model": model, "added_tokens": sorted(added, key=lambda token: token["id"])}
        data["post_processor"] = _post_processor(data["post_processor"], new)
        if data["padding"]:
            data["padding"] = data["padding"] | {"pad_id": new[data["padding"]["pad_id"]]}
        return data

    def reloaded(
        self, kept: Sequence[int], config: Any, trust_remote_code: bool
    ) -> PreTrainedTokenizerBase:
        """The smaller tokenizer, as AutoTokenizer loads it. UserError where it comes out wrong.

        `config`: the model's, which may decide on the tokenizer's class.
        """
        new = {number: place for place, number in enumerate(kept)}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config.to_json_file(folder / "config.json")
            self.tokenizer.save_pretrained(folder)
            text = json.dumps(self.smaller(kept), ensure_ascii=False)
            (folder / "tokenizer.json").write_text(text, "utf-8")
            settings = folder / "tokenizer_config.json"
            fields = renumbered(json.loads(settings.read_text("utf-8")), lambda n: new.get(n, n))
            if check := check_of(self.tokenizer):
                fields[CHECK] = check
            settings.write_text(json.dumps(fields, ensure_ascii=False), "utf-8")
            found = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        found.name_or_path = self.tokenizer.name_or_path
        wanted = {self.tokens[number]: place for number, place in new.items()}
        wrong = sorted(wanted.items() ^ found.get_vocab().items(), key=lambda item: item[1])
        if wrong:
            raise UserError(
                f"{FLAG}: {type(self.tokenizer).__name__}, written and loaded again, has another "
                f"token than {wrong[0][0]!r} at {wrong[0][1]}; this tokenizer can't be trimmed"
            )
        return found


def _refused(named: str, what: str) -> UserError:
    return UserError(
        f"{FLAG}: the tokenizer of {named} is {what}; only fast ones of the kinds BPE and Unigram "
        "can be trimmed, leave the flag out"
    )


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _stays(pair: tuple[str, str], stay: set[str]) -> bool:
    return pair[0] in stay and pair[1] in stay and "".join(pair) in stay


def _components(value: Any) -> Iterator[dict[str, Any]]:
    """All components of a normalizer, a pre-tokenizer or a decoder, nested ones too."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _components(item)


def _stand_ins(places: tuple) -> Iterator[str]:
    """What is written for a blank, as the tokenizer's parts say it."""
    for part in _components(places):
        yield from (
            part[key]
            for key in ("replacement", "content", "prepend")
            if isinstance(part.get(key), str)
        )
        if isinstance(pattern := part.get("pattern"), dict):
            yield from (text for text in pattern.values() if isinstance(text, str))


class _Asked(dict):
    """Every number stays what it is; holds those that were asked for."""

    def __missing__(self, number: int) -> int:
        self[number] = number
        return number


def _post_processor(value: Any, new: dict[int, int]) -> Any:
    """With new numbers; templates hold them in lists, others as [token, number]."""
    if not isinstance(value, dict):
        return value
    value = dict(value)
    if value["type"] == "Sequence":
        value["processors"] = [_post_processor(part, new) for part in value["processors"]]
    for token, entry in (value.get("special_tokens") or {}).items():
        moved = entry | {"ids": [new[number] for number in entry["ids"]]}
        value["special_tokens"] = value["special_tokens"] | {token: moved}
    for end in ("cls", "sep"):
        if isinstance(value.get(end), list):
            token, number = value[end]
            value[end] = [token, new[number]]
    return value


def _template_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    known = tokenizer.chat_template or {}
    for template in known.values() if isinstance(known, dict) else [known]:
        for one, other in LITERALS.findall(template):
            yield (one or other).replace("\\n", "\n")
        yield from TAGS.split(template)
        yield from ROLES
        user, reply = ({"role": role, "content": "."} for role in ROLES[:2])
        for talk in ([user], [user, reply, user], [{"role": "system", "content": "."}, user]):
            try:
                yield tokenizer.apply_chat_template(
                    talk, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except Exception:  # noqa: BLE001, S112  a template is a program that may refuse a talk
                continue
