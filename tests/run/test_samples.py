"""What models say beside their perplexity: the right words, and nothing else is touched by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, call, content, results
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lib.report.results import load_runs
from lib.report.samples import what_they_say
from lib.run.samples import TOKENS, continuations, continued, text_of

BASE = ["--model", "model", *QUICK, "--eval_data", "uk", "en"]
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


def documents(name: str) -> list[str]:
    lines = Path(name, "test.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def by_generate(folder: Path | str, sample: dict[str, str]) -> str:
    """What a saved model says, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (text,) = [one for one in documents(sample["test"]) if one.startswith(sample["beginning"])]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :16]
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1)
    whole = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    assert 16 < whole.shape[1] <= 16 + TOKENS
    both = (tokenizer.decode(one, skip_special_tokens=True) for one in (ids[0], whole[0]))
    begun, said = (one.rstrip("\ufffd") for one in both)
    assert begun == sample["beginning"]
    return said.removeprefix(begun)


def test_each_model_says_what_generate_gives(tmp_path: Path) -> None:
    done = call(*BASE, *PRUNE, "--save", tmp_path / "run", "--save_model", tmp_path / "new")
    assert done.status == 0, done.err
    found = results(tmp_path / "run")
    samples = found["samples"]
    assert [one["test"] for one in samples] == ["uk"] * 3 + ["en"] * 3
    assert len({one["beginning"] for one in samples}) == 6
    for one in samples:
        assert one["dense"] == by_generate("model", one)
        assert one["model"] == by_generate(tmp_path / "new", one)
    assert any(one["dense"] != one["model"] for one in samples)
    assert found["seconds"]["samples"] > 0
    for text in (
        (tmp_path / "new/README.md").read_text("utf-8"),
        what_they_say(load_runs([tmp_path])),
    ):
        for one in samples:
            assert one["beginning"].replace("|", "&#124;") in text
    assert f"uk: {samples[0]['beginning']} ..." in done.out
    assert done.out.count("  dense model: ") == done.out.count("  this model: ") == 2


def test_nothing_else_depends_on_them(tmp_path: Path) -> None:
    found = {}
    for count in (0, 2):
        folder = tmp_path / str(count)
        saved = ["--save", folder / "run", "--save_model", folder / "new", "--samples", count]
        assert call(*BASE, *PRUNE, *saved).status == 0
        found[count] = results(folder / "run")
    assert "samples" not in found[0] and len(found[2]["samples"]) == 4
    for key in ("evaluation", "perplexity", "sparsity", "fingerprint", "calibration"):
        assert found[0][key] == found[2][key], key
    without, beside = (content(tmp_path / str(count) / "new") for count in (0, 2))
    different = {name for name in without if without[name] != beside[name]}
    assert without.keys() == beside.keys() and different == {"README.md", "manifest.json"}
    assert "Beginnings" not in (tmp_path / "0/new/README.md").read_text("utf-8")


def test_fewer_are_the_first_of_more(tmp_path: Path) -> None:
    said = {}
    for count in (1, 4):
        argv = [*BASE, "--eval_only", "--save", tmp_path, "--samples", count]
        assert call(*argv).status == 0
        said[count] = results(tmp_path)["samples"]
    assert said[1] == [said[4][0], said[4][4]]
    assert all(one.keys() == {"test", "beginning", "model"} for one in said[4])


def test_a_recovered_model_stands_beside_its_teacher(tmp_path: Path) -> None:
    first = [*BASE, *PRUNE, "--save", tmp_path / "one", "--save_model", tmp_path / "pruned"]
    assert call(*first).status == 0
    again = ["--model", tmp_path / "pruned", *BASE[2:], "--calibration_data", "uk"]
    again += ["--teacher", "model", "--recover", 320, "--save", tmp_path / "two"]
    assert call(*again, "--save_model", tmp_path / "recovered").status == 0
    before, after = (results(tmp_path / name)["samples"] for name in ("one", "two"))
    assert [one["dense"] for one in before] == [one["dense"] for one in after]
    assert after[0]["model"] == by_generate(tmp_path / "recovered", after[0])


def test_packed_linears_speak_for_themselves(tmp_path: Path) -> None:
    saved = ["--save", tmp_path / "run", "--save_model", tmp_path / "packed"]
    assert call(*BASE, *PRUNE, "--replace_sparse_layers", *saved).status == 0
    for one in results(tmp_path / "run")["samples"]:
        assert one["model"] == by_generate(tmp_path / "packed", one)


def test_blocks_that_are_fetched_say_nothing(tmp_path: Path) -> None:
    done = call(*BASE, *PRUNE, "--offload", tmp_path / "away", "--save", tmp_path / "run")
    assert done.status == 0 and "samples" not in results(tmp_path / "run")
    (line,) = [line for line in done.out.splitlines() if line.startswith("samples: ")]
    assert line == f"samples: none, each of {TOKENS} tokens would fetch every block again"


def test_a_model_that_can_not_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_, **__) -> Tensor:
        raise ValueError("no cache\nof any kind")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    done = call(*BASE, *PRUNE, "--save", tmp_path / "run", "--save_model", tmp_path / "new")
    assert done.status == 0 and "samples" not in results(tmp_path / "run")
    line = "samples: none, LlamaForCausalLM can't generate (no cache)"
    assert done.out.count("samples") == 1 and line in done.out
    assert (tmp_path / "new/model.safetensors").is_file()


def test_a_number_below_zero_is_refused() -> None:
    done = call(*BASE, *PRUNE, "--samples", -1)
    assert done.status == 2 and "--samples -1: must be a number of documents" in done.err


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
    assert continuations(model, ids, 10) == whole[:, 12:].tolist()
    assert model.generation_config is own
    ends = int(whole[1, 15])
    model.generation_config.eos_token_id = [300, ends]
    cut = [row[: (row.index(ends) if ends in row else None)] for row in whole[:, 12:].tolist()]
    assert continuations(model, ids, 10) == cut and len(cut[1]) < 10


def test_characters_that_are_cut_in_two() -> None:
    tokenizer = tiny.tiny_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("їїї"))
    assert len(letters) == 6  # a token for each byte
    assert text_of(tokenizer, letters[:3]) == "ї"
    assert continued(tokenizer, letters[:3], letters[3:]) == "її"
    assert continued(tokenizer, letters[:2], letters[2:5]) == "ї"
