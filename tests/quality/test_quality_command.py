"""--abilities, --pairs and --fidelity: what a run records, prints and refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
from support import QUICK, call, results

from lib.quality.questions import digest, last_words

WORDS = "місто річка дерево сонце вікно книга дорога пташка хмара камінь зірка листя".split()
BASE = ["--model", "model", *QUICK, "--calibration_data", "uk", "--eval_data", "uk"]
PRUNE = [*BASE, "--prune_method", "wanda", "--sparsity_type", "2:4"]
pytestmark = pytest.mark.usefixtures("at_place")


def documents(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(6 * count)]
    return [" ".join(lines[start::count]) for start in range(count)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_model(folder / "model")
    tiny.write_texts(folder / "uk", train=documents(12, seed=1), test=documents(12, seed=2))
    pairs = [{"good": text, "bad": text[::-1]} for text in tiny.sentences(7, seed=3, words=4)]
    lines = "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
    (folder / "pairs.jsonl").write_text(lines, "utf-8")
    return folder


def test_abilities_stand_beside_the_dense_models(tmp_path: Path) -> None:
    flags = ["--abilities", "--pairs", "pairs.jsonl"]
    done = call(*PRUNE, *flags, "--save", tmp_path / "pruned")
    assert done.status == 0, done.err
    assert call(*BASE, "--eval_only", *flags, "--save", tmp_path / "dense").status == 0
    pruned, dense = (results(tmp_path / name)["abilities"] for name in ("pruned", "dense"))
    assert [one["name"] for one in pruned] == ["last word", "continuation", "pairs"]
    for own, alone in zip(pruned, dense, strict=True):
        assert own["dense"] == alone["model"] and own["digest"] == alone["digest"]
        assert "dense" not in alone and "flips" not in alone
        flips = own["flips"]
        change = own["model"]["accuracy"] - own["dense"]["accuracy"]
        assert flips["gained"] - flips["lost"] == pytest.approx(change * own["questions"])
        assert f"uk, {own['name']}, " in done.out or own["name"] == "pairs"
    assert pruned[2]["text"] == "pairs" and pruned[2]["chance"] == 0.5
    texts = [json.loads(line)["text"] for line in Path("uk/test.jsonl").open(encoding="utf-8")]
    assert pruned[0]["digest"] == digest(last_words(texts, 0))


def test_the_seed_draws_other_questions(tmp_path: Path) -> None:
    found = {}
    for seed in (0, 1):
        flags = ["--eval_only", "--abilities", "--seed", seed, "--save", tmp_path / str(seed)]
        assert call(*BASE, *flags).status == 0
        found[seed] = results(tmp_path / str(seed))
    assert found[0]["abilities"][0]["digest"] != found[1]["abilities"][0]["digest"]
    assert found[0]["fingerprint"]["measuring"] != found[1]["fingerprint"]["measuring"]


def test_blocks_that_are_fetched_answer_the_same(tmp_path: Path) -> None:
    flags = ["--abilities", "--fidelity"]
    assert call(*PRUNE, *flags, "--save", tmp_path / "one").status == 0
    away = ["--offload", tmp_path / "away", "--save", tmp_path / "two"]
    done = call(*PRUNE, *flags, *away)
    assert done.status == 0, done.err
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert one["abilities"] == two["abilities"]
    assert "fidelity" in one and "fidelity" not in two
    assert "fidelity: none, each of 64 tokens would fetch every block again" in done.out


def test_fidelity_of_both_models_and_of_the_text(tmp_path: Path) -> None:
    done = call(*PRUNE, "--fidelity", "--save", tmp_path)
    assert done.status == 0, done.err
    (record,) = results(tmp_path)["fidelity"]
    assert record["text"] == "uk" and record["scripts"] == ["CYRILLIC"]
    assert record["reference"]["known_words"] > 0.6  # the last word may be cut
    assert record["reference"]["foreign_script"] == 0.0
    for name in ("dense", "model"):
        assert all(value is None or 0 <= value <= 1 for value in record[name].values())
    assert record["dense"] != record["model"]
    assert f"uk, {record['beginnings']} completions: " in done.out


def test_a_model_that_can_not_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_, **__):
        raise ValueError("no cache\nof any kind")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", generate)
    done = call(*PRUNE, "--fidelity", "--prompts", 0, "--save", tmp_path)
    assert done.status == 0 and "fidelity" not in results(tmp_path)
    assert "fidelity: none, LlamaForCausalLM can't generate (no cache)" in done.out


def test_pairs_are_read_before_the_model(no_weights: None) -> None:
    done = call(*BASE, "--eval_only", "--pairs", "nowhere.jsonl")
    assert done.status == 1 and len(done.complaints) == 1
    assert done.complaints[0].startswith("error: --pairs nowhere.jsonl: can't be read")
