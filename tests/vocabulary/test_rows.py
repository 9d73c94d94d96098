"""A model with fewer rows: the same logits for the tokens that stay, and every number follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from support import loaded, refused, representative
from transformers import GenerationConfig, PreTrainedModel

from lib.model.checkpoint import Checkpoint
from lib.model.pretrained import fresh_copy
from lib.model.rows import TRIMMED_FROM, config_token_ids, keep_rows_, trimmable_rows

LAST = tiny.VOCAB - 1
ROWS = torch.tensor([0, 1, 2, *range(5, 60, 3), 100, 77, LAST, LAST - 2, LAST - 1])
TIED = dict(tie_word_embeddings=True)
# biased heads, scaled embeddings, projections after them, softcapped logits, experts, Conv1D
NAMES = "Llama|Gemma 2|Phi|GPT-J|GPT-2|OPT|MPT|Cohere|Granite|Mixtral|Mamba"
# a table for all blocks, of Gemma 3n with fewer rows than the vocabulary
NAMES += "|Gemma 3n|Gemma 4|Gemma 4, shared keys|Gemma 4 multimodal"


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


QUICK = "Gemma 2|Phi|GPT-2|OPT|Mixtral|Gemma 3n|Gemma 4 multimodal|Qwen3-VL".split("|")


@pytest.mark.parametrize("name", representative([*NAMES.split("|"), *tiny.VISION], QUICK))
def test_same_logits_here_and_loaded_again(name: str, tmp_path: Path) -> None:
    model = (tiny.ALL | tiny.REFUSED)[name]()
    ids = torch.randint(len(ROWS), (2, 24), generator=torch.Generator().manual_seed(0))
    assert trimmable_rows(model, Checkpoint("m")) == tiny.VOCAB
    before, tied = logits(model, ROWS[ids])[..., ROWS], is_tied(model)
    keep_rows_(model, ROWS)
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-5, atol=1e-5)
    assert is_tied(model) == tied
    fields = vars(model.config.get_text_config(decoder=True))
    assert {fields[key] for key in fields if "vocab_size" in key} == {len(ROWS)}
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    torch.testing.assert_close(logits(again, ids), before, rtol=1e-5, atol=1e-5)
    assert is_tied(again) == tied and trimmable_rows(again, Checkpoint("m")) == len(ROWS)


def test_tied_untied_and_a_copy_that_shares() -> None:
    for options in (TIED, {}):
        dense = tiny.tiny_llama(**options)
        whole = dense.get_input_embeddings().weight.clone()
        copy = fresh_copy(dense)
        keep_rows_(copy, ROWS)
        assert is_tied(copy) == bool(options)
        assert torch.equal(copy.get_input_embeddings().weight, whole[ROWS])
        assert dense.config.vocab_size == tiny.VOCAB
        assert torch.equal(dense.get_input_embeddings().weight, whole)
        keep_rows_(copy, torch.arange(9))
        assert getattr(copy.config, TRIMMED_FROM) == tiny.VOCAB  # what it was at first


def test_every_number_follows(tmp_path: Path) -> None:
    model = tiny.VISION["Gemma 3 multimodal"]()
    model.config.text_config.eos_token_id = [1, 8]
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=[1, 11], pad_token_id=2, suppress_tokens=[14, 17]
    )
    model.generation_config.bad_words_ids = [[20, 23], [26]]
    model.generation_config.forced_bos_token_id = 29
    model.generation_config.sequence_bias = [[[32, 35], 0.5]]
    model.config.text_config.unknown_token_id = -1
    model.save_pretrained(tmp_path)
    named = config_token_ids(Checkpoint(str(tmp_path)), model.config)
    assert named >= {0, 1, 2, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, LAST - 2, LAST - 1, LAST}
    assert min(named) == 0
    keep_rows_(model, ROWS)
    rows = ROWS.tolist()
    config, generation = model.config, model.generation_config
    assert config.image_token_id == rows.index(LAST) == len(rows) - 3
    assert config.boi_token_index == rows.index(LAST - 1)
    assert config.text_config.eos_token_id == [1, rows.index(8)]
    assert generation.eos_token_id == [1, rows.index(11)]
    assert generation.suppress_tokens == [rows.index(14), rows.index(17)]
    assert generation.bad_words_ids == [[rows.index(20), rows.index(23)], [rows.index(26)]]
    assert generation.forced_bos_token_id == rows.index(29)
    assert generation.sequence_bias == [[[rows.index(32), rows.index(35)], 0.5]]
    llama = tiny.tiny_llama()
    assert llama.get_input_embeddings().padding_idx == 2
    keep_rows_(llama, torch.tensor([0, 1, 7, 2]))
    assert llama.get_input_embeddings().padding_idx == llama.config.pad_token_id == 3


def test_tables_that_are_not_of_the_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    head, bag, buffer = (tiny.tiny_llama() for _ in range(3))
    head.lm_head = torch.nn.Linear(32, 384, bias=False)
    bag.model.embed_tokens = torch.nn.EmbeddingBag(320, 32)
    buffer.model.layers[0].mlp.register_buffer("bias_of_tokens", torch.zeros(tiny.VOCAB))
    for model, words in (
        (buffer, "model.layers.0.mlp.bias_of_tokens"),
        (head, "320 rows in its embedding, 384 in its head"),
        (bag, "class EmbeddingBag"),
    ):
        assert words in refused(trimmable_rows, model, Checkpoint("m"))
    model = tiny.tiny_llama()
    integers = torch.zeros(320, 32, dtype=torch.uint8)
    model.model.embed_tokens.weight = torch.nn.Parameter(integers, requires_grad=False)
    assert "torch.uint8" in refused(keep_rows_, model, ROWS)
    for read in (lambda ids: ids * 0, lambda ids: ids):  # of a kind of token; past its end
        model = tiny.tiny_llama(type_vocab_size=7)
        model.model.types = table = torch.nn.Embedding(7, 32)
        model.model.embed_tokens.register_forward_pre_hook(
            lambda _, args, table=table, read=read: table(read(args[0]))
        )
        assert trimmable_rows(model, Checkpoint("m")) == tiny.VOCAB
        assert "a table of [7, 32]" in refused(keep_rows_, model, ROWS)
    # the model reads its padding for an image's token, whatever has that id now
    monkeypatch.setattr("lib.model.rows._renumber_", lambda *args: None)
    model = tiny.REFUSED["Gemma 4 multimodal"]()
    assert "would break" in refused(keep_rows_, model, torch.arange(tiny.VOCAB).flip(0))
