"""Two sums of "7B on one card, on paper" (tests/bench/gpu/README.md), in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from support import call, call_here, reloaded, results

from lib.commands import compress
from lib.run.load import fits_training

BLOCKS, WIDTH, INNER, TOKENS, RANK = 8, 128, 384, 64, 4  # tokens: of a batch
MATRIX = 4 * INNER * WIDTH  # bytes of the largest, float32
BLOCK = 4 * 4 * WIDTH**2 + 3 * MATRIX
OUTSIDE = 4 * 2 * tiny.VOCAB * WIDTH
BATCH = 4 * TOKENS * WIDTH
LOGITS = 4 * 4 * TOKENS * tiny.VOCAB
TRAINED = 16 * BLOCKS * RANK * (11 * WIDTH + 3 * INNER)
SUMS = {
    "--prune_method wanda": OUTSIDE + 2 * BLOCK + 11 * BATCH + max(5 * MATRIX, LOGITS),
    f"--prune_method wanda --recover 512 --recover_rank {RANK}": (
        OUTSIDE + 3 * BLOCKS * BLOCK + TRAINED + (BLOCKS + 40) * BATCH + 4 * MATRIX + LOGITS
    ),
}
FLAGS = ["--seqlen", "32", "--nsamples", "32", "--batch_size", "2", "--prompts", "0"]
FLAGS += ["--calibration_data", "uk", "--eval_data", "uk", "--device", "cuda:0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    sizes = dict(num_hidden_layers=BLOCKS, hidden_size=WIDTH, intermediate_size=INNER)
    tiny.write_model(folder / "model", tiny.tiny_llama(**sizes))
    tiny.write_texts(folder / "uk", train=60, test=3)
    return folder


@pytest.mark.usefixtures("at_place")
@pytest.mark.parametrize("argv", SUMS)
def test_what_a_card_needs_on_paper(argv: str, device: Any, tmp_path: Path) -> None:
    for share, status in ((1, 0), (0.6, 1)):
        limit = torch.accelerator.memory_allocated(0) + int(share * SUMS[argv])
        device.set_limit(0, limit)
        done = call("--model", "model", *FLAGS, *argv.split(), "--save", tmp_path / str(status))
        assert done.status == status, done.err
    assert "memory" in done.complaints[-1]


def test_compress_plans_without_training_where_only_the_weights_fit(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compress, "call", call_here)
    monkeypatch.setattr(compress, "find_spec", lambda name: None)
    model = tiny.tiny_llama(num_hidden_layers=12, intermediate_size=256)
    tiny.write_model("deep", model)
    tiny.write_texts("uk", tiny.sentences(200, words=60), tiny.sentences(8, 1, words=60))
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    argv = "deep small --data uk --device cuda:0 --minutes 3".split()
    argv += "--batch_size 2 --nsamples 8 --seqlen 64".split()
    device.set_limit(0, torch.accelerator.memory_allocated(0) + int(2.6 * weights) + 4_000_000)
    done = call(*argv, program=compress.main)
    assert done.status == 0, done.err
    assert "planned without training: it takes about" in done.out
    assert "recovery" not in results("small-compress/compressed")
    assert not list(Path("small-compress").rglob("recovery*"))
    measured = ["--seqlen", "64", "--eval_data", "small-compress/tests/uk.jsonl"]
    reloaded("small", "small-compress/compressed", "--device", "cuda:0", *measured)


def test_compress_trains_where_that_is_said_to_fit(
    device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is enough: with no byte more than it asks for, the training ends well."""
    monkeypatch.chdir(tmp_path)
    tiny.write_model("deep", tiny.tiny_llama(num_hidden_layers=4, intermediate_size=256))
    tiny.write_texts("uk", tiny.sentences(200, words=60), tiny.sentences(8, 1, words=60))
    flags = "--model deep --trim_vocabulary --calibration_data uk --quantize q4_0".split()
    flags += "--device cuda:0 --batch_size 2 --nsamples 8 --seqlen 64 --prompts 0".split()
    needed = fits_training(compress.check_job(list(flags), 512))[1]
    device.set_limit(0, torch.accelerator.memory_allocated(0) + needed)
    done = call(*flags, "--recover", "512", "--save", "out")
    assert done.status == 0, done.err
