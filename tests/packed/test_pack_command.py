"""--replace_sparse_layers, with --quantize int4 too, as runs of main.py: packed, saved, unpacked.

tests/test_matrix.py compares what was measured with what is saved.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from support import QUICK, mistake, program_of, results, succeed, weights

TEXTS = ["--calibration_data", "uk", "--eval_data", "uk"]
WANDA = ["--prune_method", "wanda"]
PACK = ["--replace_sparse_layers"]
PACK4 = [*PACK, "--quantize", "int4"]
pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_texts(folder / "uk", 40, 8)
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=2).bfloat16())
    tiny.write_model(folder / "falcon", tiny.ARCHITECTURES["Falcon"]())
    return folder


def run(model: Path | str, *flags: object, to: Path) -> dict:
    """Results of a run, which saves its model beside them."""
    saved = ["--save", to / "out", "--save_model", to / "model"]
    succeed("--model", model, *QUICK, *TEXTS, *flags, *saved)
    return results(to / "out")


def size(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in weights(folder / "model").values())


@pytest.mark.parametrize(("bits", "kind"), [(16, "2:4"), (4, "unstructured")])
def test_it_is_smaller_and_as_good_and_is_not_pruned_again(
    bits: int, kind: str, tmp_path: Path
) -> None:
    flags = [*WANDA, "--sparsity_type", kind]
    dense = run("model", *flags, to=tmp_path / "dense")
    packed = run("model", *flags, *(PACK if bits == 16 else PACK4), to=tmp_path / "packed")
    assert (packed["packed"]["bits"], packed["packed"]["linears"]) == (bits, 14)
    assert ("packed_embeddings" in packed) == (bits == 4)
    assert size(tmp_path / "packed") < (0.8 if bits == 16 else 0.5) * size(tmp_path / "dense")
    ratio = packed["perplexity"]["uk"] / dense["perplexity"]["uk"]
    assert ratio == pytest.approx(1, rel=1e-3 if bits == 16 else 0.1)
    card = (tmp_path / "packed/model/README.md").read_text("utf-8")
    assert "import packed_bitmask" in card
    succeed(tmp_path / "packed/model", tmp_path / "unpacked", program=program_of("unpack"))
    unpacked = (tmp_path / "unpacked/README.md").read_text("utf-8")
    head, code = unpacked.split("The weights were unpacked")
    assert card.startswith(head) and "packed_bitmask" not in code and "('unpacked')" in code
    for flags in (WANDA, PACK4, [*PACK, "--eval_only"]):
        error = mistake("--model", tmp_path / "packed/model", *QUICK, *TEXTS, *flags)
        assert "unpack" in str(error)


def test_rounded_on_text_wherever_it_is_read(tmp_path: Path) -> None:
    """Also of a model that was pruned before, and alike; without text to the nearest."""
    run("model", *WANDA, to=tmp_path / "pruned")
    run("model", *WANDA, *PACK4, to=tmp_path / "once")
    later = run(tmp_path / "pruned/model", *PACK4, to=tmp_path / "later")
    one, two = weights(tmp_path / "once/model"), weights(tmp_path / "later/model")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert later["calibration"]["windows"] == 8
    magnitude = ["--model", "model", *QUICK, "--eval_data", "uk", "--prune_method", "magnitude"]
    for text, rounded in (([], False), (["--calibration_data", "uk"], True)):
        done = succeed(*magnitude, *text, *PACK4, "--save", tmp_path / f"magnitude {rounded}")
        assert ("column by column" in done.out) == rounded


def test_unpack_leaves_what_an_unfinished_run_has_done(tmp_path: Path) -> None:
    run("model", *WANDA, *PACK, to=tmp_path)
    kept, unpack = tmp_path / "dense.partial", program_of("unpack")
    kept.mkdir()
    (kept / "block-00000.safetensors").write_bytes(b"hours")
    error = mistake(tmp_path / "model", tmp_path / "dense", program=unpack)
    assert "dense.partial" in error.problem
    assert [file.name for file in kept.iterdir()] == ["block-00000.safetensors"]


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--model", "falcon", *WANDA, *PACK4], "--replace_sparse_layers"),
        (["--model", "model", *PACK4], ""),
    ],
)
def test_what_packing_makes_no_smaller_is_refused(
    argv: list[object], flag: str, tmp_path: Path
) -> None:
    saved = ["--save", tmp_path, "--save_model", tmp_path / "model"]
    assert flag in mistake(*argv, *QUICK, *TEXTS, *saved).what
    assert not (tmp_path / "model").exists()
