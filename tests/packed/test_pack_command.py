"""--replace_sparse_layers, with --quantize int4 too, as runs of main.py: packed, saved, loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from support import QUICK, call, results, succeed, weights

from lib.commands import unpack

TEXTS = ["--calibration_data", "uk", "--eval_data", "uk"]
WANDA = ["--prune_method", "wanda"]
PACK = ["--replace_sparse_layers"]
PACK4 = [*PACK, "--quantize", "int4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_texts(folder / "uk", 40, 8)
    tiny.write_model(folder / "model", tiny.tiny_llama(num_hidden_layers=2).bfloat16())
    tiny.write_model(folder / "falcon", tiny.ARCHITECTURES["Falcon"]())
    return folder


pytestmark = pytest.mark.usefixtures("at_place")


def run(model: Path | str, *flags: object, to: Path, saved: bool = True):
    target = ["--save_model", to / "model"] if saved else []
    done = succeed("--model", model, *QUICK, *TEXTS, *flags, "--save", to / "out", *target)
    return done


def perplexity(folder: Path) -> float:
    return next(iter(results(folder / "out")["perplexity"].values()))


def size(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in weights(folder / "model").values())


@pytest.mark.parametrize(("bits", "kind"), [(16, "2:4"), (4, "unstructured")])
def test_what_was_measured_is_what_is_saved(bits: int, kind: str, tmp_path: Path) -> None:
    run("model", *WANDA, "--sparsity_type", kind, to=tmp_path / "dense")
    pack = PACK if bits == 16 else PACK4
    done = run("model", *WANDA, *pack, "--sparsity_type", kind, to=tmp_path / "packed")
    assert "14 by the kernels" in done.out or "could not be built" in done.out
    assert "footprint" in done.out
    found = results(tmp_path / "packed/out")
    assert found["packed"]["bits"] == bits and found["packed"]["linears"] == 14
    assert ("packed_embeddings" in found) == (bits == 4)
    assert size(tmp_path / "packed") < (0.8 if bits == 16 else 0.5) * size(tmp_path / "dense")
    assert "import packed_bitmask" in (tmp_path / "packed/model/README.md").read_text()
    ratio = perplexity(tmp_path / "packed") / perplexity(tmp_path / "dense")
    assert ratio == pytest.approx(1, rel=1e-3 if bits == 16 else 0.1)
    run(tmp_path / "packed/model", "--eval_only", to=tmp_path / "again", saved=False)
    again = perplexity(tmp_path / "again")
    assert again == pytest.approx(perplexity(tmp_path / "packed"), rel=1e-5)
    for flags in (WANDA, PACK4, [*PACK, "--eval_only"]):  # a packed model is not pruned again
        done = call("--model", tmp_path / "packed/model", *QUICK, *TEXTS, *flags)
        assert done.status == 1 and "unpack" in done.complaints[-1]


def test_rounded_on_text_wherever_it_is_read(tmp_path: Path) -> None:
    """Also of a model that was pruned before, and alike."""
    run("model", *WANDA, to=tmp_path / "pruned")
    done = run("model", *WANDA, *PACK4, to=tmp_path / "once")
    assert "quantized 14 linear layers to 4 bits, column by column" in done.out
    run(tmp_path / "pruned/model", *PACK4, to=tmp_path / "later")
    one, two = weights(tmp_path / "once/model"), weights(tmp_path / "later/model")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert results(tmp_path / "later/out")["calibration"]["windows"] == 8
    magnitude = ["--model", "model", *QUICK, "--eval_data", "uk", "--prune_method", "magnitude"]
    for text, rounded in (([], False), (["--calibration_data", "uk"], True)):
        done = call(*magnitude, *text, *PACK4, "--save", tmp_path / f"magnitude {rounded}")
        assert done.status == 0 and ("column by column" in done.out) == rounded


def test_unpack_leaves_what_an_unfinished_run_has_done(tmp_path: Path) -> None:
    run("model", *WANDA, *PACK, to=tmp_path)
    kept = tmp_path / "dense.partial"
    kept.mkdir()
    (kept / "block-00000.safetensors").write_bytes(b"hours")
    done = call(tmp_path / "model", tmp_path / "dense", program=unpack.main)
    assert done.status == 1 and "dense.partial exists" in done.complaints[-1]
    assert [file.name for file in kept.iterdir()] == ["block-00000.safetensors"]
    succeed(tmp_path / "model", tmp_path / "plain", program=unpack.main)
    assert weights(tmp_path / "plain")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--model", "falcon", *WANDA, *PACK4], ["--replace_sparse_layers: no", "FalconLinear"]),
        (["--model", "model", *PACK4], ["packing makes no linear layer smaller"]),
    ],
)
def test_refused_in_one_line(argv: list[object], words: list[str], tmp_path: Path) -> None:
    done = call(*argv, *QUICK, *TEXTS, "--save", tmp_path, "--save_model", tmp_path / "model")
    assert done.status == 1 and all(word in done.complaints[-1] for word in words)
    assert not (tmp_path / "model").exists()
