"""The tokenizer.model of a fast tokenizer, read and used by sentencepiece itself."""

from __future__ import annotations

from pathlib import Path

import kinds
import tiny
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import AutoTokenizer

from lib.data.tokenizer_model import (
    CHECK,
    CHECK_TEXT,
    FILE,
    check_of,
    digest,
    write_tokenizer_model,
)


def test_sentencepiece_cuts_texts_as_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = kinds.byte_fallback()
    assert write_tokenizer_model(tokenizer, tmp_path)
    other = SentencePieceProcessor(model_file=str(tmp_path / FILE))
    for text in [*kinds.texts(kinds.UK, 20, 7), *kinds.texts(kinds.EN, 20, 7), "漢字  river\n", ""]:
        assert other.encode(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_pieces_have_their_numbers_and_types(tmp_path: Path) -> None:
    tokenizer = kinds.byte_fallback()
    tokenizer.add_tokens([AddedToken("[table]", special=False)])
    write_tokenizer_model(tokenizer, tmp_path)
    other = SentencePieceProcessor(model_file=str(tmp_path / FILE))
    assert other.vocab_size() == len(tokenizer)
    for token, number in tokenizer.get_vocab().items():
        assert other.id_to_piece(number) == token
        assert other.is_byte(number) == (token[:3] == "<0x")
        assert other.is_control(number) == (token in (kinds.BOS, kinds.EOS, kinds.PAD, kinds.USER))
    assert other.unk_id() == tokenizer.unk_token_id


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
