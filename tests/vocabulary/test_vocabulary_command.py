"""`--trim_vocabulary` as a user gives it: alone, composed with all else, interrupted, refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import kinds
import pytest
import tiny
import torch
from kinds import EN, UK
from support import QUICK, Done, call, results, weights
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
)

import lib.data.tokenizer
import lib.run.steps

pytestmark = pytest.mark.usefixtures("at_place")
ROWS = 640  # more than the tokenizer has
BASE = ["--model", "model", *QUICK]
TRIM = [*BASE, "--trim_vocabulary"]
PRUNE = ["--calibration_data", "uk", "--prune_method", "wanda", "--sparsity_type", "2:4"]
RECOVER = ["--recover", 20 * 256, "--recover_lr", "0.01"]
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    numbers = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3, vocab_size=ROWS)
    model = tiny.tiny_llama(tie_word_embeddings=True, **numbers).bfloat16()
    tiny.write_model(folder / "model", model, kinds.byte_level(regex=False, whole=True))
    tiny.write_texts(folder / "uk", train=kinds.texts(UK, 60, 1), test=kinds.texts(UK, 9, 2))
    tiny.write_texts(folder / "en", train=kinds.texts(EN, 60, 1), test=kinds.texts(EN, 9, 2))
    shutil.copytree(folder / "uk", folder / "untaught")
    (folder / "untaught/train.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def alone(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """The vocabulary alone, and the run's folder."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        argv = [*TRIM, "--vocabulary_data", "uk", "--save_model", folder / "model"]
        found = call(*argv, "--save", folder / "out")
    assert found.status == 0, found.err
    return found, folder


def test_what_is_said_and_recorded(alone: tuple[Done, Path]) -> None:
    done, folder = alone
    found = results(folder / "out")
    record = found["vocabulary"]
    assert record["rows"] % 64 == 0 and record["rows"] < record["rows_before"] == ROWS
    assert record["used"] <= record["tokens"] == record["rows"] and record["bytes_dropped"] > 0
    (test,) = record["tests"]
    assert test["documents"] == 9 and test["alike"] > 4 and test["rise"] < 0.05
    assert record["logits_differ"] < 1e-5
    assert f"vocabulary: {record['rows']} of {ROWS} rows stay" in done.out
    assert "uk: all 9 test documents decode to the same text" in done.out
    assert done.out.index("uk, bits per byte") < done.out.index("perplexity uk: ")
    assert json.dumps(found["fingerprint"]).count(record["digest"]) == 1
    card = (folder / "model/README.md").read_text("utf-8")
    assert record["note"] in card and "sparse" not in card


def test_loads_and_does_the_same(alone: tuple[Done, Path], place: Path) -> None:
    _, folder = alone
    folders = place / "model", folder / "model"
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in folders]
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in folders]
    assert models[1].get_input_embeddings().weight is models[1].lm_head.weight
    for text in kinds.texts(UK, 20, 1):
        old, new = (t(text, return_tensors="pt").input_ids for t in tokenizers)
        assert old.shape == new.shape
        with torch.no_grad():
            one, other = models[0](old).logits, models[1](new).logits
        before = one.log_softmax(-1).gather(-1, old[..., None])
        after = other.log_softmax(-1).gather(-1, new[..., None])
        assert torch.all(after >= before - 1e-2)  # fewer share the probability
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        new = getattr(tokenizers[1], name)
        assert getattr(models[1].config, name) == getattr(models[1].generation_config, name) == new
    argv = ["--eval_only", "--eval_data", "uk", "--save", folder / "again"]
    again = call("--model", folder / "model", *QUICK, *argv)
    assert again.status == 0 and "fewer tokens share" in again.out  # its config remembers
    first, second = results(folder / "out"), results(folder / "again")
    assert second["perplexity"]["uk"] == pytest.approx(first["perplexity"]["uk"], rel=1e-6)
    assert second["vocabulary"]["rows_before"] == ROWS


@pytest.mark.parametrize("flags", [["--trim_vocabulary"], []], ids=["trimmed", "whole"])
def test_padding_and_truncation_are_saved_as_loaded(flags: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree("model", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("Ġriver"), pad_token="Ġriver", length=9)
    tokenizer.enable_truncation(100, stride=7, direction="left")
    tokenizer.save(str(folder / "tokenizer.json"))
    argv = ["--model", folder, *QUICK, *PRUNE, *flags, "--save", tmp_path / "out"]
    assert call(*argv, "--save_model", tmp_path / "new").status == 0
    saved = Tokenizer.from_file(str(tmp_path / "new/tokenizer.json"))
    assert saved.truncation == tokenizer.truncation
    assert saved.padding == tokenizer.padding | {"pad_id": saved.token_to_id("Ġriver")}


def test_for_two_languages(tmp_path: Path) -> None:
    done = call(*TRIM, "--vocabulary_data", "uk", "en", "--save", tmp_path / "run")
    assert "uk: all 9 test" in done.out and "en: all 9 test" in done.out


def test_trimmed_first_then_all_as_on_a_model_trimmed_before(
    alone: tuple[Done, Path], tmp_path: Path
) -> None:
    _, folder = alone
    rest = [*PRUNE, *RECOVER, "--replace_sparse_layers"]
    one = call(*TRIM, *rest, "--save", tmp_path / "one", "--save_model", tmp_path / "first")
    assert one.status == 0, one.err
    argv = ["--model", folder / "model", *QUICK, *rest]
    two = call(*argv, "--save", tmp_path / "two", "--save_model", tmp_path / "second")
    assert two.status == 0, two.err
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(before[EMBEDDING]) == results(tmp_path / "one")["vocabulary"]["rows"]


def test_a_teacher_with_more_tokens(alone: tuple[Done, Path], tmp_path: Path) -> None:
    _, folder = alone
    prune = ["--model", folder / "model", *QUICK, *PRUNE, "--save_model", tmp_path / "pruned"]
    assert call(*prune, "--save", tmp_path / "out").status == 0
    argv = ["--model", tmp_path / "pruned", *QUICK, "--calibration_data", "uk", *RECOVER]
    losses = []
    for teacher in ("model", folder / "model"):  # the whole one, and the same trimmed
        found = call(*argv, "--teacher", teacher, "--save", tmp_path / "out")
        assert found.status == 0, found.err
        losses.append([one["loss"] for one in results(tmp_path / "out")["recovery"]["curve"]])
    assert losses[0] == losses[1]
    few = kinds.texts(UK[:2], 60, 1), kinds.texts(UK[:2], 9, 2)
    few = tiny.write_texts(tmp_path / "few", train=few[0], test=few[1])
    argv += ["--trim_vocabulary", "--calibration_data", few, "--save", tmp_path / "both"]
    both = call(*argv, "--eval_data", few, "--teacher", "model")
    assert both.status == 0, both.err  # trimmed once more, further
    record = results(tmp_path / "both")["vocabulary"]
    before = results(folder / "out")["vocabulary"]["rows"]
    assert record["rows"] < record["rows_before"] == before


def test_tables_of_layers_in_a_model_that_is_measured_as_a_whole(tmp_path: Path) -> None:
    numbers = dict(vocab_size=ROWS, vocab_size_per_layer_input=512, pad_token_id=3)
    model = tiny.build("gemma3n_text", **tiny.PER_LAYER | tiny.GEMMA_3N | numbers)
    tiny.write_model(tmp_path / "gemma", model, kinds.byte_level(size=600))
    argv = ["--model", tmp_path / "gemma", "--save_model", tmp_path / "model"]
    done = call(*TRIM, *argv, "--vocabulary_data", "uk", "--save", tmp_path / "out")
    assert done.status == 0 and "evaluated as a whole: --model" in done.out, done.err
    first, rows = results(tmp_path / "out"), results(tmp_path / "out")["vocabulary"]["rows"]
    assert first["vocabulary"]["logits_differ"] < 1e-5
    tensors = weights(tmp_path / "model")
    assert len(tensors["model.embed_tokens_per_layer.weight"]) == len(tensors[EMBEDDING]) == rows
    rest = ["--model", tmp_path / "model", "--save", tmp_path / "again"]
    again = call(*BASE, *rest, "--eval_only", "--eval_data", "uk")
    assert again.status == 0, again.err
    assert results(tmp_path / "again")["perplexity"] == first["perplexity"]
    (line,) = call(*BASE, *rest, *PRUNE).complaints
    assert "hidden states of another shape than its windows. It cannot be pruned" in line


BAD = {
    "no train text": (
        ["--vocabulary_data", "untaught"],
        "--vocabulary_data untaught: the folder has neither train",
    ),
    "slow": (["--model", "slow"], "is a ByT5Tokenizer without a tokenizer"),
    "words": (["--model", "words"], "the tokenizer of --model words is of the kind WordLevel"),
    "few rows": (["--model", "few"], "but the embedding of --model few has 512 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, place: Path, no_weights: None) -> None:
    argv, words = BAD[case]
    if "slow" in argv:
        tiny.write_model("slow", tokenizer=ByT5Tokenizer())
    if "words" in argv:
        words_only = Tokenizer(models.WordLevel({"a": 0, "text": 1, "?": 2}, unk_token="?"))
        tiny.write_model("words", tokenizer=PreTrainedTokenizerFast(tokenizer_object=words_only))
    if "few" in argv:
        few = tiny.tiny_llama(vocab_size=512)
        tiny.write_model("few", few, kinds.byte_level(regex=False))
    found = call(*TRIM, "--vocabulary_data", "uk", *argv)
    assert found.status == 1, found
    (line,) = found.complaints
    assert words in line


def test_a_text_that_reads_otherwise_stops_the_run(tmp_path, monkeypatch, no_weights) -> None:
    own = lib.data.tokenizer.TrimmableTokenizer.trimmed_json

    def broken(self, kept):
        data = own(self, kept)
        data["decoder"] = None
        return data

    monkeypatch.setattr(lib.data.tokenizer.TrimmableTokenizer, "trimmed_json", broken)
    found = call(*TRIM, "--vocabulary_data", "uk", "--save_model", tmp_path / "model")
    assert found.status == 1 and "decodes differently with the trimmed" in found.complaints[0]
    assert not (tmp_path / "model").exists()


def test_logits_that_differ_stop_the_run(tmp_path: Path, monkeypatch) -> None:
    own = lib.run.steps.keep_rows_
    monkeypatch.setattr("lib.run.steps.keep_rows_", lambda model, rows: own(model, rows.flip(0)))
    found = call(*TRIM, "--vocabulary_data", "uk", "--save_model", tmp_path / "model")
    assert found.status == 1 and "whole and trimmed outputs differ by" in found.complaints[0]
    assert not (tmp_path / "model").exists()


def bits_per_byte(model: Path | str, texts: Path | str) -> float:
    """Of pieces of test documents, each by itself: a slow reference of what trimming costs."""
    tokenizer, kind = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM
    loaded, nats, size = kind.from_pretrained(model, dtype=torch.float32), 0.0, 0
    for line in Path(texts, "test.jsonl").read_text("utf-8").splitlines():
        for piece in re.findall(r"\S[\s\S]{0,32}(?=\s|$)", json.loads(line)["text"]):
            ids = tokenizer(piece, add_special_tokens=False).input_ids
            if len(ids) < 32:
                ids = torch.tensor([[tokenizer.bos_token_id, *ids]])
                nats += float(loaded(ids, labels=ids).loss) * (ids.shape[1] - 1)
                size += len(piece.encode())
    return nats / math.log(2) / size


def test_what_trimming_costs_is_measured_on_the_same_bytes(alone: tuple[Done, Path]) -> None:
    done, folder = alone
    found = results(folder / "out")["vocabulary"]
    expected = [bits_per_byte(model, "uk") for model in ("model", folder / "model")]
    assert found["bits_per_byte_original"] == pytest.approx(expected[0], rel=2e-3)
    assert found["bits_per_byte_trimmed"] == pytest.approx(expected[1], rel=2e-3)
    cost = found["bits_per_byte_trimmed"] / found["bits_per_byte_original"] - 1
    assert f"trimming costs {cost:+.2%} bits per byte" in done.out
    card = (folder / "model" / "README.md").read_text("utf-8")
    assert re.search(r"\| +original \| +this model \|", card)


def test_text_that_is_too_little_is_warned_of(place: Path, tmp_path: Path) -> None:
    """Text of another language cuts the test text into bytes; few documents do not."""
    other = call(*TRIM, "--vocabulary_data", "en", "--eval_data", "uk", "--save", tmp_path / "en")
    assert other.status == 0 and "Give more text in the language" in other.out
    found = results(tmp_path / "en")["vocabulary"]
    assert found["bits_per_byte_trimmed"] > 1.02 * found["bits_per_byte_original"]
