"""The frontier counts every weight of a dense model, those too that were rounded to zero."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_frontier

ROWS, WIDTH, KEPT = 6, 128, 500  # of 768 weights the others were rounded to zero


@pytest.mark.parametrize(("bits", "stored"), [(8, 8), (4, 4), (3, 4)])
def test_every_weight_has_its_bits_and_no_mask_counts(
    bits: int, stored: int, tmp_path: Path
) -> None:
    scales = torch.zeros(ROWS, WIDTH // 64, dtype=torch.bfloat16)
    tensors = {
        "linear.mask": torch.zeros(ROWS, WIDTH // 8, dtype=torch.uint8),
        "linear.values": torch.zeros(KEPT * stored // 8, dtype=torch.uint8),
        "linear.scale": scales,
        "norm.weight": torch.zeros(WIDTH),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    packed = {"bits": stored, "linears": {"linear": [ROWS, WIDTH, KEPT]}}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": packed}))
    expected = ROWS * WIDTH * bits // 8 + scales.nbytes + 4 * WIDTH
    assert bench_frontier.dense_bytes(tmp_path, bits) == expected
