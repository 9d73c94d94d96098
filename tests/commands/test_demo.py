"""The demo from the first story to the report, on a model that hardly learns."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import ROOT, program_of, results, succeed

from lib.commands import demo
from lib.commands.demo import Size, train, train_tokenizer

TINY = Size(vocabulary=300, window=16, width=16, inner=32, blocks=2, heads=2, batch=4, steps=40)
FEW = replace(TINY, window=32, blocks=1, steps=2, stories=(10, 1), methods=["admm"], types=["2:4"])
FEW = replace(FEW, nsamples=8)


@pytest.mark.full
@pytest.mark.usefixtures("elsewhere", "in_this_process")
def test_the_whole_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "Size", lambda: FEW)
    lines = succeed(program=program_of("demo")).out.splitlines()
    tables = re.findall(r"(?m)(?:^\|.*\n?)+", "\n".join(lines))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[-1].splitlines()]
    assert rows[0][2:] == ["uk by uk", "uk by en", "en by uk", "en by en"]
    assert [row[0] for row in rows[2:]] == ["dense", "admm"]
    of_dense = results(Path("demo/runs/model/dense"))["perplexity"]
    assert rows[2][2:] == [f"{of_dense[test]:.2f}" for test in ("uk", "uk", "en", "en")]
    by_english = results(Path("demo/runs/model/admm-2of4-en-seed0"))["perplexity"]
    assert rows[3][3:6:2] == [f"{by_english[test]:.2f}" for test in ("uk", "en")]
    report = Path("demo/report.md").read_text("utf-8")
    assert "| admm " in report
    files = list(Path("demo/runs").rglob("results.json"))
    assert len(files) == 3
    for file in files:
        run = results(file.parent)
        assert list(run["perplexity"]) == ["uk", "en"] and run["flags"]["device"] == "cpu"
    assert max(map(len, tables[-1].splitlines())) <= 80
    following = next(line for line in lines if line.startswith("next: python main.py "))
    readme = " ".join((ROOT / "README.md").read_text("utf-8").replace("\\\n", " ").split())
    assert following.removeprefix("next: ") in readme
    assert "perplexity uk: " in succeed(*following.split()[3:]).out


def test_a_model_learns_and_is_the_same_every_time(tmp_path: Path) -> None:
    """Forty steps bring the loss well below that of guessing all tokens alike."""
    texts = {name: demo.write_texts(tmp_path / name, 10, 1) for name in demo.LANGUAGES}
    tokenizer = train_tokenizer(texts, TINY)
    model = train(tokenizer, texts, TINY)
    assert len(tokenizer) == model.config.vocab_size
    for story in (texts["uk"][0], texts["en"][0]):
        ids = tokenizer(story).input_ids
        assert ids[0] == tokenizer.bos_token_id == model.config.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == story
        windows = torch.tensor(ids[:160]).view(10, 16)
        with torch.no_grad():
            loss = model(input_ids=windows, labels=windows).loss.item()
        assert loss < 0.9 * math.log(len(tokenizer))
    again = train(train_tokenizer(texts, TINY), texts, TINY).state_dict()
    assert all(torch.equal(again[name], each) for name, each in model.state_dict().items())
