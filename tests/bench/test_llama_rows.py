"""llama.cpp's rows in the table of `bench_sparse model --llama`, by a stand-in for llama-bench."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_sparse

LLAMA_BENCH = """\
#!/bin/sh
echo "$@" >> "$(dirname "$0")/arguments"
echo '[{"n_prompt": 512, "n_gen": 0, "avg_ts": 900.5}, {"n_prompt": 0, "n_gen": 64, "avg_ts": 100}]'
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "llama" / "build" / "bin"
    folder.mkdir(parents=True)
    (folder / "llama-bench").write_text(LLAMA_BENCH)
    (folder / "llama-bench").chmod(0o755)
    return tmp_path / "llama"


def test_rows_have_a_speed_a_ratio_and_a_size(checkout, tmp_path, monkeypatch):
    converted = []

    def convert(arguments: list[str]) -> None:
        converted.append(arguments)
        Path(arguments[1]).write_bytes(bytes(2_000_000))

    monkeypatch.setattr(bench_sparse.lib.gguf.command, "main", convert)
    args = argparse.Namespace(model="FOLDER", llama=str(checkout))
    rows = bench_sparse.llama_rows(args, tmp_path, {"generate": 20.0, "prefill": 450.0})
    cells = ["100.0 (5.00x)", "", "900.5 (2.00x)", "2 MB"]
    assert rows == {f"llama.cpp, {kind}": cells for kind in ("f16", "q8_0", "q4_0")}
    assert [(one[0], one[3]) for one in converted] == [
        ("FOLDER", kind) for kind in ("f16", "q8_0", "q4_0")
    ]
    first = (checkout / "build" / "bin" / "arguments").read_text().splitlines()[0]
    threads = torch.get_num_threads()
    assert first == f"-m {tmp_path / 'f16.gguf'} -t {threads} -p 512 -n 64 -o json"


def test_a_checkout_that_is_not_built_is_named(tmp_path):
    with pytest.raises(SystemExit, match="llama-bench is not built there"):
        bench_sparse.llama_bench(str(tmp_path), tmp_path / "f16.gguf")
