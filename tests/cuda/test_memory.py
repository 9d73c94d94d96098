"""Two sums of "7B on one card, on paper" (docs/hardware.md), in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from support import call

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
