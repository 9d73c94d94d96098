"""Folders of many kinds, whole and trimmed, converted and run by llama.cpp itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import kinds
import pytest
import tiny
import whole
from converted import convert, trimmed
from kinds import UK
from support import ROOT, start

import lib.data.tokenizer_model
import lib.gguf.command
import lib.gguf.proof
from lib.data.tokenizer_model import FILE, check_of
from lib.gguf import converter
from lib.gguf.command import main
from lib.gguf.logits import Reference
from lib.gguf.tokens import prove_tokens
from lib.util.errors import UserError

gguf = pytest.importorskip("gguf")


pytestmark = pytest.mark.usefixtures("quickly")


@pytest.mark.parametrize("name", whole.WHOLE)
def test_whole_and_trimmed_folders_are_cut_and_continued_alike(
    name: str, texts: Path, tmp_path: Path
) -> None:
    kind, fields, tokenizer = whole.WHOLE[name]
    folder = whole.write_whole(tmp_path / "whole", kind, fields, tokenizer())
    convert(folder, texts, tmp_path / "whole.gguf", "--type", "f32")
    smaller = trimmed(folder, texts, tmp_path / "smaller")
    record = convert(smaller, texts, tmp_path / "smaller.gguf")
    assert record["type"] == "bf16"


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    # without a BOS, the package's DeepSeek has the ids of another tokenizer that cuts alike
    [(whole.qwen, "qwen2"), (whole.deepseek, "joyai-llm")],
)
def test_the_converters_table_knows_a_whole_vocabulary_by_its_ids(tokenizer, name: str) -> None:
    from conversion import base

    request = {"pre": None, "check": check_of(tokenizer()), "parts": None}
    assert converter.pre_tokenizer(base.TextModel, request) == name


@pytest.mark.parametrize("copied", [False, True])
def test_mistral_with_and_without_the_sources_tokenizer_model(
    copied: bool, texts: Path, tmp_path: Path
) -> None:
    tokenizer = whole.mistral(tmp_path / "source")
    folder = whole.write_whole(tmp_path / "whole", "mistral", whole.WIDTHS, tokenizer)
    if copied:
        shutil.copy(whole.mistral_file(), folder / FILE)
    convert(folder, texts, tmp_path / "whole.gguf")
    smaller = trimmed(folder, texts, tmp_path / "smaller")
    assert (smaller / FILE).stat().st_size < 2e5
    convert(smaller, texts, tmp_path / "smaller.gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    return whole.write_whole(folder, "llama", whole.WIDTHS, kinds.byte_fallback())


@pytest.mark.parametrize("weight_type", ["f16", "q8_0", "q5_0", "q4_0"])
def test_types(weight_type: str, llama: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    logits = convert(llama, texts, out, "--type", weight_type)["proof"]["logits"]
    assert logits["unexplained"] < 0.06
    assert (logits["distance"] > 0.2) == (weight_type in ("q5_0", "q4_0"))
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == types["blk.1.attn_q.weight"] == weight_type.upper()
    assert types["blk.0.attn_norm.weight"] == "F32"
    file_type = gguf.LlamaFileType(int(reader.get_field("general.file_type").parts[-1][0]))
    assert file_type.name == f"MOSTLY_{weight_type.upper()}"


def test_a_packed_folder_is_unpacked_on_the_way(llama: Path, texts: Path, tmp_path: Path) -> None:
    prune = ["--prune_method", "magnitude", "--replace_sparse_layers"]
    packed = trimmed(llama, texts, tmp_path / "packed", *prune)
    assert "packed" in (packed / "config.json").read_text("utf-8")
    convert(packed, texts, tmp_path / "model.gguf")


def test_the_plain_converter_takes_a_saved_folder(llama: Path, texts: Path, tmp_path: Path) -> None:
    """With no help of ours: what is written beside the weights is enough."""
    folder = trimmed(llama, texts, tmp_path / "smaller")
    out = tmp_path / "plain.gguf"
    request = dict(llama=None, check=None, parts=None, pre=None, blocks=None, name="plain")
    converter.work(request | dict(folder=str(folder), out=str(out), outtype="f32"))
    tokenizer = lib.gguf.source.AutoTokenizer.from_pretrained(folder)
    prove_tokens(out, tokenizer, {"uk": kinds.texts(UK, 9, 2)})


def test_the_first_difference_of_tokens_ends_it(
    llama: Path, texts: Path, tmp_path: Path, monkeypatch
) -> None:
    own = lib.data.tokenizer_model.pieces

    def rotated(data: dict) -> list[tuple[str, float, int]]:
        *first, last = own(data)
        normal = [text for text, _, kind in first if kind == lib.data.tokenizer_model.NORMAL]
        texts = iter([*normal[1:], normal[0]])
        return [(next(texts) if one[0] in normal else one[0], *one[1:]) for one in first] + [last]

    monkeypatch.setattr(lib.data.tokenizer_model, "pieces", rotated)
    with pytest.raises(UserError, match=r"not written, document \d+ of .*: at token \d+ llama.cpp"):
        convert(llama, texts, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_blocks_that_llama_cpp_takes_for_others_end_it(texts: Path, tmp_path: Path) -> None:
    fields = whole.WIDTHS | tiny.WIDE | tiny.MIXED  # the second block's attention is full
    folder = whole.write_whole(tmp_path / "model", "gemma3_text", fields, whole.gemma())
    with pytest.raises(UserError, match="not written, logits after 8 beginnings differ by"):
        convert(folder, texts, tmp_path / "model.gguf", "--type", "f32")


def test_other_weights_end_it(llama: Path, texts: Path, tmp_path: Path, monkeypatch) -> None:
    fields = whole.WIDTHS | dict(seed=7)
    other = whole.write_whole(tmp_path / "other", "llama", fields, kinds.byte_fallback())
    monkeypatch.setattr(lib.gguf.proof, "Reference", lambda _, *more: Reference(other, *more))
    with pytest.raises(UserError, match="logits after 8 beginnings differ by .* more than q8_0"):
        convert(llama, texts, tmp_path / "model.gguf", "--type", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_without_a_runner_nothing_is_proven(
    llama: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    found = lib.gguf.command.find_spec
    monkeypatch.setattr(
        lib.gguf.command, "find_spec", lambda name: None if name == "xllamacpp" else found(name)
    )
    main([str(llama), str(tmp_path / "model.gguf")])
    assert "nothing was proven: xllamacpp is not installed" in capsys.readouterr().out
    assert whole.record_of(tmp_path / "model.gguf")["proof"] is None


def test_its_own_file_is_replaced_and_a_changed_one_is_not(
    llama: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model.gguf"
    left = tmp_path / ".model.gguf.partial-killed"
    left.mkdir()
    convert(llama, texts, out, "--type", "q8_0")
    convert(llama, texts, out, "--type", "f16")
    with out.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(UserError, match="exists, and no earlier run wrote it; name another file"):
        convert(llama, texts, out)


def test_an_architecture_that_the_converter_does_not_know(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["architectures"] = ["NobodysForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"IN .*model: llama.cpp's converter: it knows no Nobod"):
        main([str(folder), str(tmp_path / "model.gguf")])


def test_a_tokenizer_that_nobody_knows(texts: Path, tmp_path: Path) -> None:
    tokenizer = kinds.byte_level(regex=False)
    folder = whole.write_whole(tmp_path / "model", "llama", whole.WIDTHS, tokenizer)
    with pytest.raises(
        UserError, match="does not know how the tokenizer splits words; .* by --pre"
    ):
        main([str(folder), str(tmp_path / "model.gguf")])


def test_by_its_name(llama: Path, texts: Path, tmp_path: Path) -> None:
    """With the converter in a process of its own."""
    argv = ["bash", str(ROOT / "launch.sh"), "gguf", str(llama), "model.gguf"]
    argv += ["--data", str(texts / "uk")]
    code = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    process = start(["-c", code, *argv], tmp_path, PYTHON=sys.executable)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    *_, tokens, logits, written = out.splitlines()
    assert tokens == "uk: llama.cpp cuts all 9 documents alike"
    assert logits.startswith("logits after 8 beginnings differ by")
    assert written.startswith("written: model.gguf, ") and written.endswith(" KiB, bf16")
