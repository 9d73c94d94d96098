"""What a run leaves to be compared and repeated: losses by window, its command, its commit."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from pathlib import Path

import numpy
import pytest
import tiny
from support import QUICK, results, succeed

from lib.run import record

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def argv(tmp_path: Path) -> list[object]:
    model, texts = tiny.write_model(tmp_path / "model"), tiny.write_texts(tmp_path / "uk")
    tiny.write_texts(tmp_path / "en", 5, 3)
    data = ["--calibration_data", texts, "--eval_data", texts, tmp_path / "en"]
    return ["--model", model, *data, *QUICK]


PRUNED = ["--prune_method", "wanda", "--save", "pruned"]


def losses(folder: str) -> dict:
    return dict(numpy.load(Path(folder, results(folder)["losses"])))


def test_losses_of_every_window_stay(argv: list, tmp_path: Path) -> None:
    succeed(*argv, *PRUNED)
    succeed(*argv, "--eval_only", "--save", "dense")
    pruned, dense = losses("pruned"), losses("dense")
    assert {str(each.dtype) for each in pruned.values()} == {"float32", "int32"}
    assert set(dense) == {
        f"{number}.{name}" for number in range(2) for name in ("loss", "document", "tokens")
    }
    for number in range(2):
        test, own = results("pruned")["evaluation"][number], pruned[f"{number}.loss"]
        assert len(own) == test["windows"]
        assert math.log(test["perplexity"]) == pytest.approx(own.mean(), rel=1e-6)
        assert pruned[f"{number}.kl"].mean() == pytest.approx(test["kl"], rel=1e-5)
        assert pruned[f"{number}.agreement"].mean() == pytest.approx(test["top1_agreement"])
        assert pruned[f"{number}.dense_loss"] == pytest.approx(dense[f"{number}.loss"], rel=1e-5)
        assert (own != dense[f"{number}.loss"]).all()

    rows = (tmp_path / "uk/test.jsonl").read_text("utf-8").splitlines()
    texts, tokenizer = [json.loads(row)["text"] for row in rows], tiny.tiny_tokenizer()
    offsets = tokenizer("\n\n".join(texts), return_offsets_mapping=True)["offset_mapping"]
    slow = []
    for middle in range(16, len(pruned["0.document"]) * 32, 32):
        last = offsets[middle][1] - 1  # a character of the window's middle token
        slow.append(
            next(n for n in range(len(texts)) if last < len("\n\n".join(texts[: n + 1])) + 2)
        )
    assert pruned["0.document"].tolist() == slow and len(set(slow)) > 2


def test_fewer_test_windows_at_equal_distances(argv: list) -> None:
    succeed(*argv, *PRUNED, "--save_model", "whole")
    every, windows = losses("pruned"), results("pruned")["evaluation"][0]["windows"]
    said = succeed(
        *argv, *PRUNED[:2], "--save", "few", "--eval_windows", 3, "--save_model", "few/m"
    )
    test, few = results("few")["evaluation"][0], losses("few")
    assert (test["windows"], test["of_windows"], test["tokens"]) == (3, windows, 96)
    assert test["compared_windows"] == 3 and f"uk: 3 of {windows} windows" in said.out
    chosen = [number * windows // 3 for number in range(3)]
    for name in ("loss", "kl", "document", "tokens"):
        assert few[f"0.{name}"] == pytest.approx(every[f"0.{name}"][chosen], rel=1e-5), name
    nats = few["0.loss"].sum() * 31
    assert test["bits_per_byte"] == pytest.approx(nats / math.log(2) / test["bytes"])
    weights = "model.safetensors"
    assert Path("whole", weights).read_bytes() == Path("few/m", weights).read_bytes()
    before, now = (results(name)["fingerprint"] for name in ("pruned", "few"))
    assert before["pruning"] == now["pruning"] and before["measuring"] != now["measuring"]
    succeed(*argv, *PRUNED[:2], "--save", "more", "--eval_windows", 10**6)
    assert "of_windows" not in results("more")["evaluation"][0]


def test_the_command_makes_the_run_again(argv: list) -> None:
    succeed(*argv, *PRUNED, "--sparsity_ratio", 0, "--column", "text")
    words = shlex.split(results("pruned")["command"])
    assert words[:2] == ["python", "main.py"] and words.count("--sparsity_ratio") == 1
    first, kept = results("pruned"), losses("pruned")
    Path("pruned/results.json").unlink()
    succeed(*words[2:])
    assert results("pruned")["evaluation"] == first["evaluation"]
    assert results("pruned")["command"] == first["command"]
    assert all((losses("pruned")[name] == kept[name]).all() for name in kept)
    succeed(*argv, *PRUNED, "--seed", 1)  # what belongs together is moved aside together
    assert set(numpy.load("pruned/losses.1.npz")) == set(kept)


def test_the_commit_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.check_output(["git", *who, *words], cwd=tmp_path, text=True).strip()

    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() == {}
    git("init", "-q")
    for name in ("main.py", "lib", "runs"):
        (tmp_path / name).touch()
    git("add", "main.py", "lib")
    git("commit", "-qm", "all")
    assert record.commit() == {"commit": {"hash": git("rev-parse", "HEAD"), "changed": False}}
    (tmp_path / "main.py").write_text("other")
    assert record.commit()["commit"]["changed"]
    monkeypatch.setenv("PATH", "")
    assert record.commit() == {}
