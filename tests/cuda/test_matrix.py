"""Kinds of runs of the table (tests/matrix.py) on the pretended CUDA device, in ways of its own.

Weights are the CPU's to the last bit. A card is given so much memory that all fits, that training
does not, or that blocks come one at a time: a run then leaves a model that loads, or one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matrix
import pytest
import tiny
import torch
from matrix import KINDS, Place, compare, curve, has
from support import call, eager_experts, mistake, raising, reloaded, results, succeed, weights

from lib.run.memory import Memory

CARD, SMALL = "cuda:0", ["--nsamples", 4, "--batch_size", 2]
# bytes: the first holds all, the second weights but no training, the third blocks one at a time
CARDS = {"all": 10**8, "weights": 2_500_000, "a block": 1_080_000}
LARGE = {"llama": "large", "bfloat16": "large", "mixture": "large mixture", "wide": "large"}
HERE = {kind for kind in KINDS if not has(kind, "--load_bit", "adamw8bit", "mamba")}
UNTRAINED = {kind for kind in HERE if not has(kind, "--recover")}
ON_CARDS = "q4_0", "q4_0, trained", "int4, unstructured", "by error", "sparsegpt 2:4"
ON_CARDS += "sparsegpt neurons", "half the experts"
WAYS = {
    "as the CPU": HERE,
    "offloaded": UNTRAINED,
    "interrupted": HERE - {"one window"},
    "trained on the host": {kind for kind in HERE if has(kind, "--recover")},
    "on the second": {kind for kind in HERE if has(kind, "--quantize", "--recover")},
} | {f"with room for {card}": set(ON_CARDS) for card in CARDS}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place, sizes = Place(tmp_path_factory.mktemp("matrix")), dict(hidden_size=64)
    sizes |= dict(intermediate_size=64, vocab_size=tiny.ROWS)
    tiny.write_model(place.folder / "large", tiny.tiny_llama(num_hidden_layers=6, **sizes))
    mixture = tiny.build("mixtral", num_hidden_layers=4, **tiny.EXPERTS | sizes)
    tiny.write_model(place.folder / "large mixture", mixture)
    return place


def there(place: Place, kind: str, device: str = CARD) -> Path:
    """Where the undisturbed run on a device has left its model and results, made once."""
    folder = place.folder / device / kind
    if not folder.exists():
        succeed(*as_there(place.argv(kind, folder)), "--device", device)
    return folder


def as_there(argv: list) -> list:
    """A command line that computes as on the CPU, which has no bfloat16 of its own."""
    return [*argv, *([] if "--dtype" in argv else ["--dtype", "float32"])]


CASES = {(kind, "as the CPU") for kind in HERE} | matrix.chosen(WAYS, 110)


@pytest.mark.parametrize(("kind", "way"), sorted(CASES))
def test_the_same_model(
    kind: str, way: str, place: Place, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    argv = [*as_there(place.argv(kind, tmp_path)), "--device", CARD]
    with eager_experts():  # the device lacks grouped products
        if way == "as the CPU":
            as_the_cpu(kind, place)
        elif way == "offloaded":
            succeed(*argv, "--offload_folder", tmp_path / "away")
            compare(kind, there(place, kind), tmp_path)
        elif way == "interrupted":
            step = next(step for step, flag in matrix.STEPS.items() if has(kind, flag))
            argv += ["--resume", tmp_path / "kept"]
            with raising(KeyboardInterrupt(), step, 1):
                assert call(*argv).status != 0
            succeed(*argv)
            compare(kind, there(place, kind), tmp_path)
        elif way == "trained on the host":  # blocks of the model and its teacher are fetched
            monkeypatch.setattr(Memory, "wants_offloading", lambda *_: True)
            argv += ["--resume", tmp_path / "kept"]
            with raising(KeyboardInterrupt(), "recover", 1):
                assert "one block at a time" in call(*argv).out
            succeed(*argv)
            compare(kind, there(place, kind), tmp_path)
        elif way == "on the second":
            device.set_limit(0, torch.accelerator.memory_allocated(0))  # not a byte more
            succeed(*argv[:-1], "cuda:1")
            assert results(tmp_path / "out")["peak_memory"]["device"] > 0
            device.set_limit(0, 10**10)
            compare(kind, there(place, kind), tmp_path)
        else:
            card = way.removeprefix("with room for ")
            model, trimmed, _ = argv[1].partition("-trimmed")
            argv[1] = LARGE[model] + trimmed
            place.make(argv[1])
            device.set_limit(0, torch.accelerator.memory_allocated(0) + CARDS[card])
            with_room(kind, card, [*argv, *SMALL], tmp_path)


def as_the_cpu(kind: str, place: Place) -> None:
    """Trained weights are as good, and the same when they are trained again."""
    with_cpu, with_card = there(place, kind, "cpu"), there(place, kind)
    assert results(with_card / "out")["peak_memory"]["device"] > 0
    if has(kind, "--recover"):
        one, other = (curve(results(folder / "out")) for folder in (with_cpu, with_card))
        assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
        rel = 1e-2 if has(kind, "--quantize") else 1e-3  # a code that parts moves others
        assert [loss for _, loss in one] == pytest.approx([loss for _, loss in other], rel=rel)
    elif kind in ("by error", "by outliers"):  # shares of their own, which are rounded otherwise
        one, other = (results(folder / "out") for folder in (with_cpu, with_card))
        assert other["allocation"] == pytest.approx(one["allocation"], abs=1e-5)
        assert other["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
    else:
        one, other = weights(with_cpu / "model"), weights(with_card / "model")
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    for device in (CARD, "cpu") if has(kind, matrix.PACK) else (CARD,):
        reloaded(with_card / "model", with_card / "out", *matrix.BASE, "--device", device)


def with_room(kind: str, card: str, argv: list, folder: Path) -> None:
    trained = has(kind, "--recover")
    if trained and card == "a block":
        assert mistake(*argv).what.startswith("--recover ")
        assert not [*folder.glob("model*")]
        return
    done = succeed(*argv)
    fetched = card == "a block" or (trained and card == "weights")  # the host has room
    assert ("one block at a time" in done.out) == fetched
    reloaded(folder / "model", folder / "out", *matrix.BASE, "--device", CARD, *SMALL)
