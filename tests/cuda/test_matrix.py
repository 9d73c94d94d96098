"""Runs of every kind on cards of three sizes: a model that loads, or one line before any change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chats
import pytest
import tiny
import torch
from support import RUNS_OF_EVERY_KIND as RUNS
from support import call, call_here, reloaded, results

from lib.commands.compress import __main__ as compress
from lib.commands.compress import measure
from lib.commands.compress import plan as compress_plan
from lib.model import pretrained

# bytes: the first holds all, the second weights but no training, the third blocks one at a time
CARDS = {"all": 10**8, "weights": 2_500_000, "a block": 1_080_000}
FLAGS = "--seqlen 32 --batch_size 2 --completions 0 --device cuda:0".split()
BASE = [*FLAGS, *"--nsamples 4 --calibration_data uk --eval_data uk".split()]
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, sizes = tmp_path_factory.mktemp("place"), dict(hidden_size=64, intermediate_size=64)
    llama = tiny.tiny_llama(num_hidden_layers=6, **sizes)
    mixture = tiny.build("mixtral", num_hidden_layers=4, **tiny.EXPERTS | sizes)
    tiny.write_model(folder / "llama", llama)
    tiny.write_model(folder / "chat", llama, chats.tokenizer_with(chats.LLAMA_3))
    tiny.write_model(folder / "mixtral", mixture)
    for model in (llama, mixture):
        weights = 4 * sum(parameter.numel() for parameter in model.parameters())
        assert CARDS["a block"] < 2 * weights < CARDS["weights"]
    tiny.write_texts(folder / "uk", train=60, test=2)
    chats.write(folder / "said", chats.some(80), chats.some(4, 1))
    return folder


@pytest.fixture(params=CARDS)
def card(request: pytest.FixtureRequest, device: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    load = pretrained.load_model

    def load_model(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        if hasattr(model.config, "num_local_experts"):  # the device lacks grouped products
            model.set_experts_implementation("eager")
        return model

    monkeypatch.setattr(pretrained, "load_model", load_model)
    device.set_limit(0, torch.accelerator.memory_allocated(0) + CARDS[request.param])
    return request.param


@pytest.mark.parametrize("case", RUNS)
def test_a_run(case: str, card: str, tmp_path: Path) -> None:
    model, *argv = RUNS[case].split()
    argv += ["--save", tmp_path / "run", "--save_model", tmp_path / "model"]
    done = call("--model", model, *BASE, *argv)
    if case == "q4_0 trained" and card != "all":
        assert done.status == 1 and len(done.complaints) == 1, done
        assert "--recover 512: training needs" in done.complaints[0]
        assert not [*tmp_path.glob("model*")]
        return
    assert done.status == 0, done.err
    assert ("one block at a time" in done.out) == (card == "a block")
    reloaded(tmp_path / "model", tmp_path / "run", *BASE)


@pytest.mark.parametrize("model, data", [("llama", "uk"), ("chat", "said")])
def test_compress(
    model: str, data: str, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any, trains: bool, **most: int) -> compress_plan.Times:
        return compress_plan.Times(2, 4, 512 * trains, 9.0)

    monkeypatch.setattr(compress_plan, "plan_time", plan)
    monkeypatch.setattr("lib.util.processes.call", call_here)
    monkeypatch.setattr(compress, "find_spec", lambda name: None)
    for name in ("STEPS", "ROUNDS"):
        monkeypatch.setattr(measure, name, 1)
    out = tmp_path / "out"
    done = call(model, out, "--data", data, *FLAGS, program=compress.main)
    assert done.status == 0 and not done.complaints, done.err
    (run,) = Path(f"{out}-compress").iterdir()
    trains = (model, card) == ("llama", "all")
    assert ("recovery" in results(run / "compressed")) == trains
    assert ("planned without training" in done.out) == (model == "llama" and not trains)
    reloaded(out, run / "compressed", *FLAGS, "--eval_data", *run.glob("tests/*"))
