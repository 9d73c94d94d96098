"""Completions of test prompts: what `generate` gives, and nothing else depends on them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, content, results, succeed
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib.run.completions import continue_greedily, decode, decode_completion

NEW_TOKENS = 8
BASE = ["--model", "model", *QUICK, "--completions", "3", "--eval_data", "uk", "en"]
PRUNE = ["--prune_method", "wanda", "--calibration_data", "uk", "--sparsity_type", "2:4"]
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    model = tiny.tiny_llama()
    model.generation_config = GenerationConfig(
        repetition_penalty=3.0, do_sample=True, temperature=2.0, bos_token_id=0, eos_token_id=1
    )
    tiny.write_model(folder / "model", model)
    tiny.write_texts(folder / "uk")
    tiny.write_texts(folder / "en", test=tiny.sentences(5, seed=7))
    return folder


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.run.completions.NEW_TOKENS", NEW_TOKENS)


def documents(name: str) -> list[str]:
    lines = Path(name, "test.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@cache
def opened(folder: Path | str) -> tuple:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)
    return AutoTokenizer.from_pretrained(folder), model


def by_generate(folder: Path | str, entry: dict[str, str]) -> str:
    """The completion of a saved model, by transformers alone."""
    tokenizer, model = opened(folder)
    (text,) = [text for text in documents(entry["test"]) if text.startswith(entry["prompt"])]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :16]
    whole = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert 16 < whole.shape[1] <= 16 + NEW_TOKENS
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in (ids[0], whole[0])]
    prompt, text = (text.rstrip("\ufffd") for text in texts)
    assert prompt == entry["prompt"]
    return text.removeprefix(prompt)


def test_each_model_continues_as_generate_does(tmp_path: Path) -> None:
    saved = ["--save", tmp_path / "run", "--save_model", tmp_path / "new"]
    for packs in ([], ["--replace_sparse_layers"]):
        saved[-1] = tmp_path / f"new{len(packs)}"
        done = succeed(*BASE, *PRUNE, *saved, *packs)
        completions = results(tmp_path / "run")["completions"]
        assert [entry["test"] for entry in completions] == ["uk"] * 3 + ["en"] * 3
        assert len({entry["prompt"] for entry in completions}) == 6
        for entry in completions:
            assert entry["dense"] == by_generate("model", entry)
            assert entry["model"] == by_generate(saved[-1], entry)
        assert any(entry["dense"] != entry["model"] for entry in completions)
        assert completions[0]["prompt"] in done.out
        card = (saved[-1] / "README.md").read_text("utf-8")
        assert not any(entry["prompt"] in card for entry in completions)  # a card may be published


def test_nothing_else_depends_on_them(tmp_path: Path) -> None:
    for count in (0, 2):
        folder = tmp_path / str(count)
        saved = ["--save", folder / "run", "--save_model", folder / "new", "--completions", count]
        succeed(*BASE, *PRUNE, *saved)
    without, beside = (results(tmp_path / str(count) / "run") for count in (0, 2))
    assert not without["completions"] and len(beside["completions"]) == 4
    for key in ("evaluation", "sparsity", "fingerprint", "calibration"):
        assert without[key] == beside[key], key
    assert content(tmp_path / "0/new") == content(tmp_path / "2/new")


def test_none_where_blocks_are_fetched_or_the_model_can_not_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = call(*BASE, *PRUNE, "--offload_folder", tmp_path / "away", "--save", tmp_path / "run")
    assert done.status == 0 and not results(tmp_path / "run")["completions"]
    line = f"completions: none, each of {NEW_TOKENS} tokens would fetch every block again"
    assert line in done.out.splitlines()

    def generate(*_, **__) -> Tensor:
        raise ValueError("no cache\nof any kind")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    done = call(*BASE, *PRUNE, "--save", tmp_path / "run", "--save_model", tmp_path / "new")
    assert done.status == 0 and not results(tmp_path / "run")["completions"]
    assert "completions: none, LlamaForCausalLM cannot generate (no cache)" in done.out
    assert (tmp_path / "new/model.safetensors").is_file()


@pytest.mark.parametrize(
    "name", ["Llama", "Gemma 2", "GPT-2", "Mixtral", "BLOOM", "Mamba", "Jamba"]
)
def test_the_most_likely_token_follows(name: str) -> None:
    """Against whole forward passes, one for each token, without a cache."""
    model = tiny.ALL[name]()
    ids = torch.randint(3, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    whole = ids
    with torch.no_grad():
        for _ in range(10):
            likely = model(input_ids=whole, use_cache=False).logits[:, -1].argmax(-1)
            whole = torch.cat([whole, likely[:, None]], 1)
    model.generation_config.eos_token_id = 300
    own = model.generation_config
    assert continue_greedily(model, ids, 10) == whole[:, 12:].tolist()
    assert model.generation_config is own
    ends = int(whole[1, 15])
    model.generation_config.eos_token_id = [300, ends]
    cut = [row[: (row.index(ends) if ends in row else None)] for row in whole[:, 12:].tolist()]
    assert continue_greedily(model, ids, 10) == cut and len(cut[1]) < 10


def test_characters_that_are_cut_in_two() -> None:
    tokenizer = tiny.tiny_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("їїї"))
    assert len(letters) == 6  # a token for each byte
    assert decode(tokenizer, letters[:3]) == "ї"
    assert decode_completion(tokenizer, letters[:3], letters[3:]) == "її"
    assert decode_completion(tokenizer, letters[:2], letters[2:5]) == "ї"
