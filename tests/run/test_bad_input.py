"""What bad input gets: one line that names flag, value and way out; before weights load if it can.

Every mistake goes through main.py's own command line.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, Done, call
from transformers import LlamaPreTrainedModel, T5Config, T5ForConditionalGeneration

from lib.methods.registry import METHODS
from lib.util.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

WANDA = ["--prune_method", "wanda", *QUICK]
CALIBRATED = [name for name in METHODS if name != "magnitude"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_texts(tmp_path_factory.mktemp("texts") / "texts")


def complaint(done: Done, status: int, *words: object) -> str:
    """The one line that a mistake gave, which must hold all the words."""
    assert done.status == status, done
    assert "Traceback" not in done.err
    assert len(done.complaints) == 1, done.err
    line = done.complaints[0]
    for word in map(str, words):
        assert word in line, f"{word!r} is not in {line!r}"
    return line


# --- flags: status 2

FLAGS = {
    "ratio below 0": (["--sparsity_ratio", "-0.1"], ["--sparsity_ratio -0.1", "at least 0"]),
    "ratio 1": (["--sparsity_ratio", "1"], ["--sparsity_ratio 1", "below 1"]),
    "ratio above 1": (["--sparsity_ratio", "50"], ["--sparsity_ratio 50", "below 1"]),
    "ratio nan": (["--sparsity_ratio", "nan"], ["--sparsity_ratio nan", "below 1"]),
    "ratio no number": (["--sparsity_ratio", "half"], ["--sparsity_ratio", "'half'"]),
    "2:4 with another ratio": (
        ["--sparsity_type", "2:4", "--sparsity_ratio", "0.6"],
        ["--sparsity_ratio 0.6", "2:4", "use --sparsity_ratio 0.5"],
    ),
    "4:8 with another ratio": (
        ["--sparsity_type", "4:8", "--sparsity_ratio", "0.25"],
        ["--sparsity_ratio 0.25", "4:8", "use --sparsity_ratio 0.5"],
    ),
    "unknown type": (["--sparsity_type", "nosuch"], ["--sparsity_type", "nosuch", "2:4"]),
    "unknown method": (["--prune_method", "nosuch"], ["--prune_method", "nosuch", "wanda"]),
    "variant with N:M": (["--use_variant", "--sparsity_type", "2:4"], ["--use_variant", "2:4"]),
    "blend for another method": (["--blend", "0.5"], ["--blend 0.5", "admm", "wanda"]),
    "blend above 1": (["--prune_method", "admm", "--blend", "2"], ["--blend 2", "from 0 to 1"]),
    "blend nan": (["--prune_method", "admm", "--blend", "nan"], ["--blend nan", "from 0 to 1"]),
    "allocation of N:M": (
        ["--allocation", "owl", "--sparsity_type", "2:4"],
        ["--allocation owl", "--sparsity_type 2:4"],
    ),
    "allocation by nothing": (
        ["--allocation", "owl", "--prune_method", "magnitude"],
        ["--allocation owl", "activations", "magnitude"],
    ),
    "allocation without room": (
        ["--allocation", "owl", "--sparsity_ratio", "0.9"],
        ["--allocation owl", "--sparsity_ratio from 0.16 to 0.84", "0.9"],
    ),
    "replaced layers with next to no zeros": (
        ["--replace_sparse_layers", "--sparsity_ratio", "0.06"],
        ["--replace_sparse_layers", "--sparsity_ratio 0.06", "more than 0.0625"],
    ),
    "8 bits of nothing packed": (
        ["--pack_bits", "8"],
        ["--pack_bits 8", "--replace_sparse_layers"],
    ),
    "5 bits": (["--replace_sparse_layers", "--pack_bits", "5"], ["--pack_bits", "5", "4, 8, 16"]),
    "no windows": (["--nsamples", "0"], ["--nsamples 0", "at least 1"]),
    "negative windows": (["--nsamples", "-3"], ["--nsamples -3", "at least 1"]),
    "windows no number": (["--nsamples", "many"], ["--nsamples", "'many'"]),
    "windows of one token": (["--seqlen", "1"], ["--seqlen 1", "at least 2"]),
    "no batch": (["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
    "unknown dtype": (["--dtype", "float64"], ["--dtype", "float64", "bfloat16"]),
    "unknown bits": (["--load_bit", "3"], ["--load_bit", "'3'", "8"]),
    "C4 and other texts": (
        ["--prune_on_c4", "--calibration_data", "uk"],
        ["--prune_on_c4", "--calibration_data", "only one"],
    ),
    "evaluation and a method": (["--eval_only"], ["--eval_only", "--prune_method wanda"]),
    "empty value": (["--save", ""], ["--save", "empty"]),
    "empty data": (["--eval_data", ""], ["--eval_data", "empty"]),
    "unknown flag": (["--nosuch"], ["--nosuch"]),
    "abbreviated flag": (["--nsample", "8"], ["--nsample"]),
    "saving over the model": (["--save_model", "M"], ["--save_model M", "--model M"]),
    "saving over the results": (
        ["--save_model", "out", "--save", "out/log"],
        ["--save_model out", "--save out/log"],
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags(name: str) -> None:
    given, words = FLAGS[name]
    complaint(call("--model", "M", "--prune_method", "wanda", *given), 2, *words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--prune_method", "wanda"], ["--model"]),
        (["--model", "M"], ["--prune_method", "wanda", "--eval_only"]),
        (["--model"], ["--model"]),
        *[
            (["--model", "M", "--use_variant", *method], ["--use_variant", method[-1]])
            for method in (["--prune_method", "magnitude"], ["--prune_method", "sparsegpt"])
        ],
        (["--model", "M", "--use_variant", "--eval_only"], ["--use_variant", "wanda"]),
        (
            ["--model", "M", "--eval_only", "--save_model", "new"],
            ["--save_model new", "--eval_only"],
        ),
    ],
)
def test_flags_that_need_each_other(given: list[str], words: list[str]) -> None:
    complaint(call(*given), 2, *words)


# --- the model: status 1


def copied(model: Path, folder: Path, **changes: bytes | str | None) -> Path:
    """A copy of the model with files replaced (`config_json=...`) or, where None, missing."""
    shutil.copytree(model, folder)
    for name, content in changes.items():
        file = folder / ".".join(name.rsplit("_", 1))
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def config(model: Path, **changes: object) -> str:
    """The model's config.json with fields changed."""
    return json.dumps(json.loads((model / "config.json").read_text()) | changes)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nosuch", ["no such folder", "the hub can't be reached", "check"]),
        ("owner/nosuch", ["no such folder", "--cache_dir", "the hub can't be reached", "check"]),
        ("./nosuch", ["no such folder"]),
        ("/no/such/folder", ["no such folder"]),
        ("a/b/c", ["no such folder"]),
        ("not:an:id", ["no such folder", "owner/name"]),
    ],
)
def test_unknown_models(name: str, words: list[str], texts: Path, no_weights: None) -> None:
    done = call("--model", name, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {name}: ", *words)


def test_a_hub_that_answers_with_an_error(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    # the hub's client brings its own: httpx, or in later releases httpx2
    httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
    answer = httpx.Response(500, request=httpx.Request("GET", "http://hub"))
    for number, (error, word) in enumerate(
        [
            (errors.RepositoryNotFoundError("404", response=answer), "no such model on the hub"),
            (errors.GatedRepoError("403", response=answer), "access on request"),
            (errors.HfHubHTTPError("500 broken", response=answer), "500 broken"),
            (httpx.ConnectError("no route"), "can't be reached (no route)"),
            (httpx.ReadTimeout("too slow"), "can't be reached (too slow)"),
        ]
    ):

        def model_info(*_, error=error, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
        done = call("--model", f"owner/name{number}", "--calibration_data", texts, *WANDA)
        complaint(done, 1, f"--model owner/name{number}: ", word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the device is found")
def test_the_device_is_checked_before_the_network_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for name in ("model_info", "dataset_info"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", lambda *_, **__: asked.append("hub"))
    texts = ["--calibration_data", "c4:de", "--eval_data", "c4:de"]
    done = call("--model", "owner/name", "--prune_method", "wanda", *texts)
    complaint(done, 1, "--device cuda:0: no CUDA device was found", "--device cpu")
    assert not asked and not list(tmp_path.iterdir())


BROKEN: dict[str, tuple[Callable[[Path], dict], list[str]]] = {
    "config missing": (lambda m: {"config_json": None}, ["no config.json"]),
    "config cut short": (lambda m: {"config_json": "{"}, ["config.json", "not a valid JSON"]),
    "config of no model": (lambda m: {"config_json": "{}"}, ["config.json", "model_type"]),
    "unknown kind": (lambda m: {"config_json": config(m, model_type="nosuch")}, ["nosuch"]),
    "weights missing": (
        lambda m: {"model_safetensors": None},
        ["no model.safetensors", "safetensors only"],
    ),
    "weights empty": (lambda m: {"model_safetensors": b""}, ["model.safetensors", "cut short"]),
    "weights cut short": (
        lambda m: {"model_safetensors": (m / "model.safetensors").read_bytes()[:-100]},
        ["model.safetensors", "cut short; download it again"],
    ),
    "weights without a header": (
        lambda m: {"model_safetensors": bytes(4000)},
        ["model.safetensors", "download it again"],
    ),
    "tokenizer missing": (
        lambda m: {"tokenizer_json": None, "tokenizer_config_json": None},
        ["tokenizer", "put the tokenizer's files beside the weights"],
    ),
    "tokenizer cut short": (
        lambda m: {"tokenizer_json": (m / "tokenizer.json").read_text()[:500]},
        ["tokenizer", "put the tokenizer's files beside the weights"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models(
    name: str, model: Path, texts: Path, tmp_path: Path, no_weights: None
) -> None:
    changes, words = BROKEN[name]
    folder = copied(model, tmp_path / "broken", **changes(model))
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {folder}: ", *words)


def test_a_file_in_place_of_a_model(model: Path, texts: Path, no_weights: None) -> None:
    file = model / "model.safetensors"
    done = call("--model", file, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {file}: is a file", "name the folder")


@pytest.mark.parametrize("lost", ["a shard", "the index"])
def test_weights_in_shards(lost: str, texts: Path, tmp_path: Path, no_weights: None) -> None:
    folder = tmp_path / "sharded"
    tiny.tiny_llama().save_pretrained(folder, max_shard_size="60KB")
    tiny.tiny_tokenizer().save_pretrained(folder)
    shard, index = sorted(folder.glob("*.safetensors"))[1], "model.safetensors.index.json"
    if lost == "a shard":
        shard.unlink()
    else:
        (folder / index).write_text("{")
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    named = shard.name if lost == "a shard" else index
    complaint(done, 1, f"--model {folder}: ", named, "download")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, ["9 tensors are missing", "model.layers.2"]),
        ({"intermediate_size": 128}, ["mlp", "[32, 64]", "[32, 128]", "config.json"]),
    ],
)
def test_weights_that_do_not_fit_the_config(
    changes: dict, words: list[str], model: Path, texts: Path, tmp_path: Path
) -> None:
    folder = copied(model, tmp_path / "misfit", config_json=config(model, **changes))
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {folder}: ", *words)


def test_weights_that_are_not_used_are_told(
    model: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(model, tmp_path / "more", config_json=config(model, num_hidden_layers=1))
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    assert done.status == 0
    assert f"--model {folder}: 9 tensors are not used: model.layers.1" in caplog.text


def test_blocks_that_are_not_found(
    model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_no_split_modules", [])
    done = call("--model", model, "--calibration_data", texts, *WANDA)
    complaint(done, 1, "--model", "LlamaForCausalLM", "no lists of decoder blocks", "can't be")


def test_a_head_that_cant_be_packed(
    model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    class Head(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    monkeypatch.setattr(
        LlamaPreTrainedModel, "get_output_embeddings", lambda self: Head(8, 8, device="meta")
    )
    flags = ["--replace_sparse_layers", "--pack_embeddings", "8"]
    done = call("--model", model, "--calibration_data", texts, *WANDA, *flags)
    complaint(done, 1, "--pack_embeddings 8", "a head of class Head", "leave out the flag")


def test_a_model_of_another_kind(texts: Path, tmp_path: Path, no_weights: None) -> None:
    small = T5Config(vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    folder = tiny.write_model(tmp_path / "t5", T5ForConditionalGeneration(small))
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {folder}: ", "T5Config", "causal language model")


def test_inputs_that_no_pattern_divides(texts: Path, tmp_path: Path) -> None:
    narrow = tiny.tiny_llama(hidden_size=36, num_attention_heads=6, intermediate_size=60)
    folder = tiny.write_model(tmp_path / "narrow", narrow)
    given = ["--model", folder, "--calibration_data", texts, *WANDA, "--sparsity_type", "4:8"]
    complaint(call(*given), 1, "4:8", "q_proj", "36", "unstructured")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("nosuch", ["unknown device", "cpu"]),
        ("mps", ["only CUDA", "cpu"]),
        ("meta", ["only CUDA", "cpu"]),
        ("cuda:0", ["no CUDA device", "use --device cpu"]),
    ],
)
def test_devices(
    device: str,
    words: list[str],
    model: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_weights: None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = call("--model", model, "--calibration_data", texts, *WANDA, "--device", device)
    complaint(done, 1, f"--device {device}: ", *words)


def test_more_cuda_devices_than_there_are(
    model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    done = call("--model", model, "--calibration_data", texts, *WANDA, "--device", "cuda:2")
    complaint(done, 1, "--device cuda:2: ", "cuda:0 to cuda:1")


def test_a_window_longer_than_the_model_takes(model: Path, texts: Path, no_weights: None) -> None:
    done = call("--model", model, "--calibration_data", texts, *WANDA, "--seqlen", "129")
    complaint(done, 1, "--seqlen 129", "128")


# --- texts: status 1


def write(folder: Path, **files: str | bytes) -> Path:
    """Texts in a folder, files named as in `train_jsonl=...`."""
    folder.mkdir()
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / ".".join(name.rsplit("_", 1))).write_bytes(data)
    return folder


GOOD = "".join(json.dumps({"text": text}) + "\n" for text in tiny.sentences(20))
TEXTS = {
    "empty folder": ({}, ["no train*.jsonl"]),
    "empty file": (dict(train_jsonl=""), ["no text"]),
    "malformed line": (
        dict(train_jsonl=GOOD + "{oops\n", test_jsonl=GOOD),
        ["train.jsonl, line 21", "not JSON"],
    ),
    "no object": (
        dict(train_jsonl=GOOD + "[1]\n", test_jsonl=GOOD),
        ["train.jsonl, line 21", "not an object"],
    ),
    "no column": (
        dict(train_jsonl=GOOD + '{"body": "x"}\n', test_jsonl=GOOD),
        ["train.jsonl, line 21", "no column 'text'", "body"],
    ),
    "no string": (
        dict(train_jsonl=GOOD + '{"text": 5}\n', test_jsonl=GOOD),
        ["line 21", "int", "not a string"],
    ),
    "too few windows": (
        dict(train_jsonl=GOOD, test_jsonl=GOOD),
        ["20 texts", "only 20 windows of 32 tokens", "21", "--nsamples"],
    ),
    "all too short": (
        dict(train_jsonl='{"text": "сонце"}\n' * 3, test_jsonl=GOOD),
        ["all 3 texts are too short", "the longest has", "--seqlen"],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_calibration_texts(name: str, model: Path, tmp_path: Path, no_weights: None) -> None:
    files, words = TEXTS[name]
    folder = write(tmp_path / "uk", **files)
    given = ["--model", model, "--calibration_data", folder, "--eval_data", folder, *WANDA]
    done = call(*given, "--nsamples", 21)
    complaint(done, 1, f"--calibration_data {folder}: ", *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no test*.jsonl"]),
        ("", ["no text"]),
        ("{\n", ["test.jsonl, line 1", "not JSON"]),
        ('{"text": "сонце"}\n', ["tokens", "less than one window", "--seqlen"]),
    ],
)
def test_test_texts(
    content: str | None, words: list[str], model: Path, tmp_path: Path, no_weights: None
) -> None:
    files = {} if content is None else {"test_jsonl": content}
    folder = write(tmp_path / "uk", train_jsonl=GOOD, **files)
    done = call("--model", model, "--calibration_data", folder, "--eval_data", folder, *WANDA)
    complaint(done, 1, f"--eval_data {folder}: ", *words)


@pytest.mark.parametrize("flag", ["--calibration_data", "--eval_data"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nosuch", ["no such name", "ubertext"]),
        ("/no/such/folder", ["no such file or folder"]),
        ("nosuch.jsonl", ["no such file or folder"]),
        ("owner/nosuch", ["the hub can't be reached"]),
    ],
)
def test_unknown_sources(
    flag: str, source: str, words: list[str], model: Path, texts: Path, no_weights: None
) -> None:
    data = {"--calibration_data": texts, "--eval_data": texts} | {flag: source}
    given = [part for pair in data.items() for part in pair]
    complaint(call("--model", model, *given, *WANDA), 1, f"{flag} {source}: ", *words)


@pytest.mark.parametrize("source", ["c4:de", "wikipedia:uk", "owner/name", "{texts}/train.jsonl"])
def test_calibration_texts_without_a_test_text(
    source: str, model: Path, texts: Path, no_weights: None
) -> None:
    source = source.format(texts=texts)
    done = call("--model", model, "--calibration_data", source, *WANDA)
    complaint(done, 1, f"--calibration_data {source}: ", "no test text", "--eval_data")


def test_calibrating_and_measuring_on_one_text_is_noted(model: Path, texts: Path) -> None:
    given = ["--model", model, "--calibration_data", texts, *WANDA, "--eval_data"]
    for own in (texts / "train.jsonl", texts):
        done = call(*given, own)
        assert done.status == 0
        assert (f"--eval_data {own}: the model is calibrated on" in done.out) == own.is_file()
    dense = call("--model", model, "--eval_only", *given[2:4], *QUICK, "--eval_data", own)
    assert "calibrated on" not in dense.out


def test_tokens_for_which_the_embedding_has_no_row(
    texts: Path, tmp_path: Path, no_weights: None
) -> None:
    folder = tiny.write_model(tmp_path / "short", tiny.tiny_llama(vocab_size=200))
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {folder}: ", "embedding has 200 rows", "resize_token_embeddings")


# --- outputs: status 1


@pytest.mark.parametrize("flag", ["--save", "--save_model"])
def test_outputs_that_can_not_be_written(
    flag: str, model: Path, texts: Path, tmp_path: Path, no_weights: None
) -> None:
    given = ["--model", model, "--calibration_data", texts, *WANDA]
    file = tmp_path / "file"
    file.write_text("kept")
    complaint(call(*given, flag, file), 1, f"{flag} {file}: is a file", "name a folder")
    below = file / "below" / "new"  # no folder can be made there, not even by root
    complaint(call(*given, flag, below), 1, f"{flag} {below}: can't be written")
    assert file.read_text() == "kept"


def test_a_target_that_holds_something_else(
    model: Path, texts: Path, tmp_path: Path, no_weights: None
) -> None:
    thesis = tmp_path / "home" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("kept")
    given = ["--model", model, "--calibration_data", texts, *WANDA]
    done = call(*given, "--save_model", thesis.parent)
    complaint(done, 1, f"--save_model {thesis.parent}: ", "thesis.tex", "name another folder")
    (thesis.parent / "config.json").write_text("{}")  # a model, but not only
    done = call(*given, "--save_model", thesis.parent)
    complaint(done, 1, f"--save_model {thesis.parent}: ", "thesis.tex", "would be lost")
    assert thesis.read_text() == "kept"


def test_nothing_is_left_by_a_refused_run(model: Path, tmp_path: Path, no_weights: None) -> None:
    done = call("--model", model, "--calibration_data", tmp_path / "nosuch", *WANDA)
    assert done.status == 1
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


# --- what is found while pruning: status 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    method: str, value: float, texts: Path, tmp_path: Path
) -> None:
    damaged = tiny.tiny_llama()
    damaged.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    folder = tiny.write_model(tmp_path / "damaged", damaged)
    given = ["--calibration_data", texts, *QUICK, "--save_model", "new"]
    done = call("--model", folder, "--prune_method", method, *given)
    complaint(done, 1, "model.layers.1.mlp.up_proj", "nan or inf")
    assert not Path("new").exists()


def test_an_unpruned_model_that_is_not_finite(texts: Path, tmp_path: Path) -> None:
    given = ["--eval_only", "--eval_data", texts, *QUICK]
    for name, value in (("nan", float("nan")), ("huge", 1e38)):
        damaged = tiny.tiny_llama()
        damaged.model.layers[1].mlp.gate_proj.weight.data *= value
        folder = tiny.write_model(tmp_path / name, damaged)
        named = "gate_proj holds nan or inf" if name == "nan" else "down_proj: activations are not"
        complaint(call("--model", folder, *given), 1, f"model.layers.1.mlp.{named}")


@pytest.mark.parametrize("method", CALIBRATED)
def test_activations_that_become_infinite(method: str, texts: Path, tmp_path: Path) -> None:
    damaged = tiny.tiny_llama()
    damaged.model.layers[1].mlp.gate_proj.weight.data *= 1e38  # finite, but no product with it is
    folder = tiny.write_model(tmp_path / "damaged", damaged)
    done = call("--model", folder, "--prune_method", method, "--calibration_data", texts, *QUICK)
    complaint(done, 1, "model.layers.1.mlp.down_proj", "not finite", "--dtype float32")


def test_debug_shows_the_traceback(model: Path) -> None:
    with pytest.raises(UserError):
        call("--model", model, "--calibration_data", "nosuch", *WANDA, "--debug")
