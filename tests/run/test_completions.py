"""Completions of test prompts: what `generate` gives, and nothing else depends on them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from approval import Words
from support import QUICK, results, succeed, weights
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


@pytest.mark.parametrize("packs", [[], ["--replace_sparse_layers"]], ids=["dense", "packed"])
def test_each_model_continues_as_generate_does(packs: list[str], tmp_path: Path) -> None:
    """And nothing else depends on it."""
    new, run = tmp_path / "new", tmp_path / "run"
    done = succeed(*BASE, *PRUNE, *packs, "--save", run, "--save_model", new)
    completions = results(run)["completions"]
    assert [entry["test"] for entry in completions] == ["uk"] * 3 + ["en"] * 3
    assert len({entry["prompt"] for entry in completions}) == 6
    for entry in completions:
        assert entry["dense"] == by_generate("model", entry)
        assert entry["model"] == by_generate(new, entry)
    assert any(entry["dense"] != entry["model"] for entry in completions)
    assert completions[0]["prompt"] in done.out
    card = (new / "README.md").read_text("utf-8")
    assert not any(entry["prompt"] in card for entry in completions)  # a card may be published
    if packs:
        return
    saved = ["--save", tmp_path / "none", "--save_model", tmp_path / "without", "--completions", 0]
    succeed(*BASE, *PRUNE, *saved)
    without, beside = results(tmp_path / "none"), results(run)
    assert not without["completions"]
    for key in ("evaluation", "sparsity", "fingerprint", "calibration"):
        assert without[key] == beside[key], key
    assert weights(tmp_path / "without").keys() == weights(new).keys()
    for name, tensor in weights(tmp_path / "without").items():
        assert torch.equal(tensor, weights(new)[name]), name


def test_none_where_blocks_are_fetched_or_the_model_can_not_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Words
) -> None:
    run = tmp_path / "run"
    one = succeed(*BASE, *PRUNE, "--offload_folder", tmp_path / "away", "--save", run)
    assert not results(run)["completions"]

    def generate(*_, **__) -> Tensor:
        raise ValueError("no cache\nof any kind")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    other = succeed(*BASE, *PRUNE, "--save", run, "--save_model", tmp_path / "new")
    assert not results(run)["completions"]
    for name, done in {"that read blocks": one, "of a model that can't": other}.items():
        lines = [line for line in done.out.splitlines() if "completions: " in line]
        words("on_the_way.txt", "\n".join(lines), f"completions {name}")
    assert (tmp_path / "new/model.safetensors").is_file()


ARCHITECTURES = ["Llama", "Gemma 2", "GPT-2", "Mixtral", "BLOOM", "Mamba", "Jamba"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name != "Gemma 2")) for name in ARCHITECTURES],
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
