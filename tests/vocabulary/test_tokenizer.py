"""Fewer tokens: which stay, that texts of them are cut as before, that all texts read alike; and
the tokenizer.model that sentencepiece itself reads."""

from __future__ import annotations

import itertools
import json
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import chats
import kinds
import numpy as np
import pytest
import tiny
from kinds import EN, KINDS, RESERVED, UK
from sentencepiece import SentencePieceProcessor
from support import refused, representative
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lib.commands.trim.folder import choose_tokens
from lib.commands.trim.parts import Part, open_tokenizer
from lib.data.chats import plain_text
from lib.data.documents import Corpus
from lib.data.lines import LINES
from lib.data.sources import parse_sources
from lib.data.templates import examples
from lib.data.windows import encode, token_bytes
from lib.model.checkpoint import Checkpoint
from lib.vocabulary.choice import PRICE, choose
from lib.vocabulary.tables import Tables
from lib.vocabulary.tokenizer_json import TrimmableTokenizer
from lib.vocabulary.tokenizer_model import (
    CHECK,
    CHECK_TEXT,
    FILE,
    check_of,
    digest,
    write_tokenizer_model,
)

UNHEARD = [
    "📐 emoji 🏳️‍🌈",
    "漢字かな交じり文",
    "žluťoučký kůň",
    "x" * 70,
    "  a\t\n\n b",
    "",
    "2026!",
]


@pytest.fixture(scope="module")
def uk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "uk"
    return tiny.write_texts(folder, train=kinds.texts(UK, 40, 1), test=kinds.texts(UK, 9, 2))


@pytest.fixture(autouse=True)
def any_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also lists that save too little."""
    monkeypatch.setattr("lib.commands.trim.choosing.MOST_ROWS", 1)


@dataclass
class Trimmed:
    """What stays of a vocabulary, and the tokenizer that users load."""

    rows: np.ndarray
    ids: list[int]
    record: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast


def trimmed(
    tokenizer: PreTrainedTokenizerFast, texts: Path, rows: int = 0, config_ids: Iterable[int] = ()
) -> Trimmed:
    corpora = [Corpus(each) for each in parse_sources([str(texts)], "--data")]
    args = Namespace(rows=None, price=PRICE, keep=None)
    with TemporaryDirectory() as name, TemporaryDirectory() as new:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        tables = Tables(rows or max(tokenizer.get_vocab().values()) + 1, {})
        here = Checkpoint(str(folder), "IN")
        part = Part(here, "IN m", [], tables, *open_tokenizer(here, "IN m"))
        part.settings[folder / "tokenizer_config.json"] = settings
        part.settings[folder / "generation_config.json"] = {"suppress_tokens": [*config_ids]}
        choose_tokens(part, args, corpora, plain_text, [])
        smaller = part.write_tokenizer(Path(new))
    return Trimmed(part.rows.numpy(), part.ids, part.record, smaller)


def cut(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("kind", representative(KINDS, list(KINDS)[1:5]))
def test_texts_of_kept_tokens_are_cut_as_before_and_all_texts_read_alike(
    kind: str, uk: Path, tmp_path: Path
) -> None:
    before = KINDS[kind]()
    found = trimmed(before, uk)
    after = found.tokenizer
    assert len(after) < len(before) and len(found.rows) % 64 == 0
    kept = set(after.get_vocab())
    alike = 0
    mixed = kinds.texts([*UK, *UK, "river", "ґ"], 60, 3)
    for text in [*kinds.texts(UK, 60, 1), *kinds.texts(UK, 60, 4), *mixed, *kinds.texts(EN, 60)]:
        old, new = cut(before, text), cut(after, text)
        if kept.issuperset(old):
            assert new == old
            ids = after(text).input_ids  # BOS too
            assert found.rows[ids].tolist() == before(text).input_ids
            alike += 1
    assert alike >= 80
    for text in [*mixed, *kinds.texts(EN, 9), *UNHEARD, *LINES, *LINES[-3]]:
        read = (
            one.decode(one(text).input_ids, skip_special_tokens=True) for one in (before, after)
        )
        assert len(set(read)) == 1
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == after.get_vocab()
    for text in [*mixed, *UNHEARD]:
        assert again(text).input_ids == after(text).input_ids


def test_words_of_the_chat_template_stay(uk: Path) -> None:
    """Roles, tool calls and thinking marks too, as they stand in a dialogue."""
    tokenizer = kinds.byte_level()
    left = trimmed(tokenizer, uk).tokenizer.get_vocab().keys()
    gone = [t for t in tokenizer.get_vocab() if t not in left and t[0] == "Ġ" and t[1:].isascii()]
    quoted, plain = sorted(gone, key=len)[-2:]
    template = "{% for m in messages %}{{ 'WORD' + m['content'] }}{% endfor %} PLAIN"
    template = template.replace("WORD", quoted.replace("Ġ", " ")).replace("PLAIN", plain[1:])
    for given in (template, {"default": "{%", "rag": template}):
        tokenizer.chat_template = given
        assert trimmed(tokenizer, uk).tokenizer.get_vocab().keys() >= {quoted, plain}
    for template in (chats.QWEN_3, chats.MISTRAL):
        tokenizer.chat_template = template
        texts = [text for follows in (False, True) for *_, text in examples(tokenizer, follows)]
        assert len(texts) >= 4 and ("<think>" in "".join(texts)) == ("think" in template)
        left = trimmed(tokenizer, uk).tokenizer
        assert all(tokenizer.tokenize(text) == left.tokenize(text) for text in texts)


def test_what_no_text_uses_fills_up_by_the_letters_of_the_texts(uk: Path) -> None:
    tokenizer = kinds.byte_fallback(600)
    vocabulary = TrimmableTokenizer(tokenizer, "m").vocabulary()
    latin = {i for i, t in vocabulary.tokens.items() if len(t) > 1 and t.strip("▁").isascii()}
    counts = np.zeros(len(vocabulary.tokens), dtype=np.int64)
    for letter in set("".join(UK)) | {"▁"}:
        counts[vocabulary.ids[letter]] = 100
    chosen = set(choose(vocabulary, counts, held_out=counts // 10, price=1e6).ids)
    unused = {i for i in chosen - vocabulary.required if not counts[i]}
    assert len(chosen) % 64 == 0 and unused and not unused & latin


def test_what_configs_name_stays_even_past_the_tokenizer(uk: Path) -> None:
    tokenizer = kinds.byte_level()
    river = tokenizer.convert_tokens_to_ids("Ġriver")
    last = max(tokenizer.get_vocab().values())
    found = trimmed(tokenizer, uk, rows=last + 99, config_ids={river, last + 7, 10**6})
    rows = found.rows.tolist()
    assert river in rows and rows[-1] == last + 7 and len(rows) % 64 == 0
    assert len(found.tokenizer) == len(rows) - 1
    everything = trimmed(kinds.byte_level(300), uk, rows=330)  # nothing to drop but padding
    assert len(everything.rows) == 320 and everything.rows.tolist() == list(range(320))


def test_what_the_post_processor_and_padding_name_stays(uk: Path) -> None:
    tokenizer = kinds.byte_level()
    backend = tokenizer.backend_tokenizer
    cls, sep = ((token, backend.token_to_id(token)) for token in ("Ġriver", "Ġunder"))
    backend.post_processor = processors.Sequence([processors.BertProcessing(sep, cls)])
    backend.enable_padding(pad_id=backend.token_to_id("Ġtown"), pad_token="Ġtown")
    found = trimmed(tokenizer, uk)
    padding = found.tokenizer.limits["padding"]
    assert found.rows[padding["pad_id"]] == backend.token_to_id("Ġtown")
    ids = found.tokenizer("тихо").input_ids
    assert [found.rows[ids[place]].item() for place in (0, -1)] == [cls[1], sep[1]]


@pytest.mark.parametrize(
    "kind", representative(kinds.WITH_RESERVED, ["byte-level", "byte fallback", "unigram"])
)
def test_reserved_tokens_go_unless_they_are_used_or_named(
    kind: str, uk: Path, tmp_path: Path
) -> None:
    result = trimmed(kinds.WITH_RESERVED[kind](), uk)
    assert not result.tokenizer.get_vocab().keys() & set(RESERVED)
    for text in ("тихо <unused3> river", "<unused12>"):  # no longer special
        ids = result.tokenizer(text, add_special_tokens=False).input_ids
        assert result.tokenizer.decode(ids) == text

    named = kinds.WITH_RESERVED[kind]()
    named.add_tokens([f"<unused{number}>" for number in range(200, 210)])  # as in EmbeddingGemma
    named.pad_token = "<unused2>"
    named.chat_template = "{{ '<unused3>' }}"
    folder = tiny.write_texts(tmp_path / "uk", train=[*kinds.texts(UK, 40, 1), "і <unused5> так"])
    config_ids = {named.convert_tokens_to_ids("<unused4>")}
    after = trimmed(named, folder, config_ids=config_ids)
    stay = {f"<unused{number}>" for number in (2, 3, 4, 5)}
    assert after.tokenizer.get_vocab().keys() & set(RESERVED) == stay
    assert not any("<unused20" in token for token in after.tokenizer.get_vocab())
    assert after.tokenizer.pad_token == "<unused2>"


def test_a_special_token_without_a_row_stays_where_no_text_has_it(uk: Path) -> None:
    tokenizer = kinds.byte_level()
    rows = tokenizer.convert_tokens_to_ids(kinds.USER)  # the last token's id
    result = trimmed(tokenizer, uk, rows=rows)
    index = result.tokenizer.convert_tokens_to_ids(kinds.USER)
    assert index < len(result.rows) and int(result.rows.max()) < rows
    originals = result.rows.tolist()
    assert len(set(originals)) == len(originals)
    assert originals[index] not in tokenizer("тихо river", add_special_tokens=False).input_ids


def test_refused() -> None:
    suffix = models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>")
    twice = models.Unigram([("<unk>", 0.0), ("a", -1.0), ("a", -2.0)], 0)
    for model, words in ((suffix, "BPE with end_of_word_suffix"), (twice, "duplicate")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
        assert words in refused(TrimmableTokenizer, tokenizer, "--model m")


def test_rows_that_another_program_takes_for_another_model_are_avoided(
    uk: Path, monkeypatch
) -> None:
    rows = len(trimmed(kinds.byte_level(), uk).rows)
    monkeypatch.setattr("lib.vocabulary.choice.MISLEADING_ROWS", {rows})
    assert len(trimmed(kinds.byte_level(), uk).rows) == rows + 64


def test_the_whole_vocabularys_check_outlives_trimming_twice(uk: Path, tmp_path: Path) -> None:
    before = kinds.byte_level()
    once = trimmed(before, uk).tokenizer
    twice = trimmed(once, tiny.write_texts(tmp_path, train=["тихо"], test=["тихо"])).tokenizer
    assert len(twice) < len(once)
    assert once.init_kwargs[CHECK] == twice.init_kwargs[CHECK] == check_of(before)
    assert CHECK not in trimmed(kinds.byte_fallback(), uk).tokenizer.init_kwargs


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "without bytes" not in kind])
def test_each_token_stands_for_its_bytes(kind: str) -> None:
    """As told by the tokens themselves, wherever one ends with a letter of the text."""
    text = " сонце над рікою,  the river runs. 我们今天去公园 🙂 ґанок\n\nnew ﬁ"
    tokenizer = KINDS[kind]()
    encoding = encode(tokenizer, text)
    tokens = tokenizer.convert_ids_to_tokens(encoding.input_ids[0])[1:]  # the first is BOS
    if "byte-level" in kind:
        own = [len(token) for token in tokens]
    else:
        own = [1 if "<0x" in token else len(token.replace("▁", " ").encode()) for token in tokens]
        own[0] -= tokens[0] == "▁" and kind == "byte fallback"  # put before the text
    sizes = token_bytes(encoding, text)
    assert sizes[0] == 0 and sizes.sum() == sum(own) == len(text.encode())
    ends = set(itertools.accumulate(len(letter.encode()) for letter in text))
    pairs = list(zip(sizes[1:].cumsum(0).tolist(), itertools.accumulate(own), strict=True))
    assert all(by_offsets == end for by_offsets, end in pairs if end in ends)
    inside = [by_offsets - end for by_offsets, end in pairs if end not in ends]
    assert inside and all(-4 < difference < 4 for difference in inside)


def test_little_text_keeps_tokens_that_are_likely_in_its_scripts(tmp_path: Path) -> None:
    """Without them text that was not counted takes more tokens; letters of other scripts go."""
    tokenizer = kinds.byte_level(size=700)
    few = tiny.write_texts(
        tmp_path / "few", train=[text[:40] for text in kinds.texts(UK, 10, 1)], test=2
    )
    many = tiny.write_texts(tmp_path / "many", train=kinds.texts(UK, 300, 1), test=2)
    record = trimmed(tokenizer, few).record
    assert record["rise"] > 0.003 and record["likely"] > 0
    assert record["used"] + record["likely"] <= record["tokens"] < record["tokens_before"]
    record = trimmed(tokenizer, many).record
    assert record["rise"] <= 0.003 and record["likely"] == 0
    one = tiny.write_texts(tmp_path / "one", train=[kinds.texts(UK, 1, 1)[0][:40]], test=2)
    vocabulary = trimmed(tokenizer, one)  # too short to hold any text out
    assert vocabulary.record["rise"] is None and vocabulary.record["likely"] > 0


# --- the tokenizer.model of a fast tokenizer


def test_sentencepiece_reads_it_as_the_tokenizer_is(tmp_path: Path) -> None:
    """It cuts texts alike; pieces have their numbers and types."""
    tokenizer = kinds.byte_fallback()
    tokenizer.add_tokens([AddedToken("[table]", special=False)])
    assert write_tokenizer_model(tokenizer, tmp_path)
    other = SentencePieceProcessor(model_file=str(tmp_path / FILE))
    for text in [*kinds.texts(UK, 20, 7), *kinds.texts(EN, 20, 7), "漢字  river\n", ""]:
        assert other.encode(text) == tokenizer(text, add_special_tokens=False).input_ids
    assert other.vocab_size() == len(tokenizer) and other.unk_id() == tokenizer.unk_token_id
    for token, number in tokenizer.get_vocab().items():
        assert other.id_to_piece(number) == token
        assert other.is_byte(number) == (token[:3] == "<0x")
        assert other.is_control(number) == (token in (kinds.BOS, kinds.EOS, kinds.PAD, kinds.USER))


def test_check_is_the_whole_vocabularys_and_outlives_saving(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    check = check_of(tokenizer)
    assert check == {"text": digest(CHECK_TEXT), "ids": tokenizer(CHECK_TEXT).input_ids}
    assert check_of(kinds.byte_fallback()) is check_of(kinds.unigram()) is None
    assert not write_tokenizer_model(tokenizer, tmp_path) and not list(tmp_path.iterdir())
    tokenizer.init_kwargs[CHECK] = {"text": "another", "ids": [1]}
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert check_of(again) == {"text": "another", "ids": [1]}
