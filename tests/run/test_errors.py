"""What bad input gets: one line that names flag, value and way out, before weights are read."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from support import QUICK, Done, call, raising
from transformers import LlamaPreTrainedModel, T5Config, T5ForConditionalGeneration

from lib.util.errors import UserError

pytestmark = pytest.mark.usefixtures("elsewhere")

WANDA = ["--prune_method", "wanda", *QUICK]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_texts(tmp_path_factory.mktemp("texts") / "texts")


def complaint(done: Done, status: int, *words: object) -> None:
    """The one line that a mistake gave must hold all the words."""
    assert done.status == status, done
    assert "Traceback" not in done.err and "usage" not in done.err
    assert len(done.complaints) == 1, done.err
    for word in map(str, words):
        assert word in done.complaints[0], f"{word!r} is not in {done.complaints[0]!r}"


# flags after `--model M --prune_method wanda`, and words of the line that they get
FLAGS = [
    ("--sparsity_ratio -0.1", "--sparsity_ratio -0.1", "at least 0"),
    ("--sparsity_ratio 1", "--sparsity_ratio 1", "below 1"),
    ("--sparsity_ratio 50", "--sparsity_ratio 50", "such as 0.5 for 50%"),
    ("--sparsity_ratio nan", "--sparsity_ratio nan", "below 1"),
    ("--sparsity_ratio half", "--sparsity_ratio", "'half'"),
    ("--sparsity_type 2:4 --sparsity_ratio 0.6", "0.6", "2:4", "Use --sparsity_ratio 0.5"),
    ("--sparsity_type nosuch", "--sparsity_type", "nosuch", "2:4"),
    ("--prune_method nosuch", "--prune_method", "nosuch", "wanda"),
    ("--use_variant --sparsity_type 2:4", "--use_variant", "unstructured", "2:4"),
    ("--use_variant --prune_method admm", "--use_variant", "wanda", "admm"),
    ("--allocation error --sparsity_type 2:4", "--allocation error", "2:4"),
    ("--replace_sparse_layers --sparsity_ratio 0.06", "ratio 0.06", "more than 0.0625"),
    ("--quantize int4 --load_bit 4", "--quantize int4", "--load_bit 4"),
    ("--replace_sparse_layers --quantize q5", "--quantize", "q5", "q4_0"),
    ("--nsamples 0", "--nsamples", "0: must be at least 1"),
    ("--seqlen 1", "--seqlen", "1: must be at least 2"),
    ("--batch_size 0", "--batch_size", "0: must be at least 1"),
    ("--recover 9 --recover_lr 1", "--recover_lr", "1: must be above 0 and below 1"),
    (
        "--recover 9 --recover_ce_weight nan",
        "--recover_ce_weight",
        "nan: must be at least 0 and below 1",
    ),
    ("--recover_rank 4", "--recover_rank 4", "--recover"),
    ("--recover 64 --sparsity_ratio 0", "--recover 64", "nothing is pruned"),
    ("--recover 64 --load_bit 8", "--recover 64", "--load_bit 8"),
    ("--recover 64 --offload_folder away", "--recover 64", "--offload_folder away"),
    ("--recover 64 --teacher T", "--teacher T", "--prune_method wanda"),
    ("--replace_sparse_layers --load_bit 4", "--replace_sparse_layers", "--load_bit 4"),
    ("--offload_folder away --load_bit 4", "--offload_folder away", "--load_bit 4"),
    ("--sparsity_type neurons --load_bit 4", "neurons", "--load_bit 4"),
    ("--sparsity_type neurons --replace_sparse_layers", "neurons", "--replace_sparse_layers"),
    ("--sparsity_type neurons --sparsity_ratio 0", "--sparsity_ratio 0", "removes nothing"),
    ("--dtype float64", "--dtype", "float64", "bfloat16"),
    ("--load_bit 3", "--load_bit", "'3'", "8"),
    ("--prune_on_c4 --calibration_data uk", "--prune_on_c4", "--calibration_data"),
    ("--vocabulary_data uk", "--vocabulary_data uk", "--trim_vocabulary"),
    ("--eval_only", "--eval_only", "--prune_method wanda"),
    ("--save=", "--save", "empty"),
    ("--tasks ,", "--tasks", "is empty"),
    ("--include_path tasks", "--include_path tasks", "--tasks"),
    ("--nsample 8", "--nsample", "--help"),
    ("--save_model M", "--save_model M", "--model M"),
    ("--save_model out --save out/log", "--save_model out", "--save out/log"),
]


NEEDED = [  # as above, without --prune_method
    ("--eval_only --save_model new", "--save_model new", "--eval_only"),
    ("--eval_only --allocation error", "--allocation error", "--prune_method"),
    ("--completions 3", "--prune_method", "wanda", "--eval_only"),
]


@pytest.mark.parametrize("row", [*FLAGS, *NEEDED], ids=lambda row: row[0])
def test_flags(row: tuple[str, ...]) -> None:
    flags, *words = row
    method = [] if row in NEEDED else ["--prune_method", "wanda"]
    complaint(call("--model", "M", *method, *flags.split()), 2, *words)


NEEDING = {  # a package that is not installed: flags of a run that needs it
    "bitsandbytes": ["--load_bit 8", "--recover 2600 --recover_optimizer adamw8bit"],
    "datasets": ["--calibration_data c4", "--eval_data wikitext2"],
    "pyarrow": ["--calibration_data texts.parquet"],
}


@pytest.mark.parametrize("package", NEEDING)
def test_a_package_that_some_runs_need(
    package: str, model: Path, texts: Path, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/run/test_bare.py: others do without."""
    monkeypatch.setitem(sys.modules, package, None)
    Path("texts.parquet").write_bytes(b"PAR1")
    for flags in NEEDING[package]:
        data = ["--calibration_data", texts, "--eval_data", texts]
        done = call("--model", model, *data, *WANDA, *flags.split())
        complaint(
            done, 1, f"error: {package} is not installed. Run pip install -r requirements.txt."
        )


# --- the model: status 1


@pytest.mark.parametrize("name", ["owner/nosuch", "./nosuch", "a/b/c", "not:an:id"])
def test_unknown_models(name: str, texts: Path, no_weights: None) -> None:
    done = call("--model", name, "--calibration_data", texts, *WANDA)
    words = "the Hub cannot be reached" if name == "owner/nosuch" else "no such folder"
    complaint(done, 1, f"--model {name}: ", words)


def test_a_hub_that_answers_with_an_error(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    # the hub's client brings its own: httpx, or in later releases httpx2
    httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
    answer = httpx.Response(500, request=httpx.Request("GET", "http://hub"))
    for number, (error, word) in enumerate(
        [
            (errors.RepositoryNotFoundError("404", response=answer), "no such model is on the Hub"),
            (errors.GatedRepoError("403", response=answer), "access on request"),
            (errors.HfHubHTTPError("500 broken", response=answer), "500 broken"),
            (httpx.ConnectError("no route"), "cannot be reached (no route)"),
        ]
    ):

        def model_info(*_, error=error, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
        done = call("--model", f"owner/name{number}", "--calibration_data", texts, *WANDA)
        complaint(done, 1, f"--model owner/name{number}: ", word)


def config(model: Path, **changes: object) -> bytes:
    """The model's config.json with fields changed."""
    return json.dumps(json.loads((model / "config.json").read_text()) | changes).encode()


def cut(file: Path) -> bytes:
    return file.read_bytes()[:-100]


MIXTURE = dict(model_type="phimoe", num_local_experts=10**7)
BROKEN = {  # file: what it becomes (None: it is missing), and words of the line
    "config missing": ("config.json", lambda m: None, "no config.json"),
    "config cut short": ("config.json", lambda m: b"{", "not a valid JSON"),
    "unknown kind": ("config.json", lambda m: config(m, model_type="nosuch"), "nosuch"),
    "10^7 layers": ("config.json", lambda m: config(m, num_hidden_layers=10**7), "10000000 layers"),
    "10^7 experts": ("config.json", lambda m: config(m, **MIXTURE), "far larger"),
    "10^11 tokens": ("config.json", lambda m: config(m, vocab_size=10**11), "far larger"),
    "deeper": ("config.json", lambda m: config(m, num_hidden_layers=3), "weights lack"),
    "adapter": ("adapter_config.json", lambda m: b"{}", "holds an adapter (adapter_config.json"),
    "wider": ("config.json", lambda m: config(m, intermediate_size=128), "[32, 128]"),
    "weights missing": ("model.safetensors", lambda m: None, "only safetensors"),
    "weights cut short": ("model.safetensors", lambda m: cut(m / "model.safetensors"), "Download"),
    "no header": ("model.safetensors", lambda m: bytes(4000), "Download it again"),
    "long template": ("chat_template.jinja", lambda m: b"{%" * 33000, "template has more than"),
    "no tokenizer": ("tokenizer.json", lambda m: cut(m / "tokenizer.json"), "Put the tokenizer's"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models(name: str, model: Path, texts: Path, tmp_path: Path) -> None:
    file, change, words = BROKEN[name]
    folder = shutil.copytree(model, tmp_path / "broken")
    content = change(model)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {folder}: ", words)


def test_a_lost_shard(texts: Path, tmp_path: Path, no_weights: None) -> None:
    folder = tmp_path / "sharded"
    tiny.tiny_llama().save_pretrained(folder, max_shard_size="60KB")
    tiny.tiny_tokenizer().save_pretrained(folder)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {folder}: ", lost.name, "Download")


def test_what_is_not_used_is_told(
    model: Path, texts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(model, tmp_path / "more")
    (folder / "config.json").write_bytes(
        config(model, num_hidden_layers=1, auto_map={"AutoConfig": "a.A"})
    )
    (folder / "log.txt").touch()
    os.truncate(folder / "log.txt", 2**40)  # nor are they read whole
    (folder / "chat_template.jinja").write_text("{% generation %}{% for m in messages %}")
    given = ["--calibration_data", texts, "--save_model", tmp_path / "new"]
    done = call("--model", folder, *given, *WANDA)
    assert done.status == 0
    assert "auto_map" not in (tmp_path / "new/config.json").read_text()  # its code is not saved
    assert f"--model {folder}: 9 tensors are not used, such as model.layers.1" in caplog.text
    assert f"--model {folder}: its chat template is not Jinja (Unexpected end" in caplog.text


def test_models_that_cant_be_pruned(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_weights: None
) -> None:
    small = T5Config(vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    t5 = tiny.write_model(tmp_path / "t5", T5ForConditionalGeneration(small))
    narrow = tiny.tiny_llama(hidden_size=36, num_attention_heads=6, intermediate_size=60)
    narrow = tiny.write_model(tmp_path / "narrow", narrow)
    given = ["--calibration_data", texts, *WANDA]
    complaint(
        call("--model", t5, *given), 1, "an encoder-decoder model (t5)", "causal language model"
    )
    done = call("--model", narrow, *given, "--sparsity_type", "4:8")
    complaint(done, 1, "4:8", "q_proj", "36", "unstructured")
    done = call("--model", model, *given, "--seqlen", "129")
    complaint(done, 1, "--seqlen 129", "128")
    monkeypatch.setattr(LlamaPreTrainedModel, "_no_split_modules", [])
    complaint(call("--model", model, *given), 1, "LlamaForCausalLM", "no lists of decoder blocks")


DEVICES = {"nosuch": "the device is unknown", "mps": "float64", "meta": "no such device"}
DEVICES |= {"cuda:7": "no such device was found"}


@pytest.mark.parametrize("device", DEVICES)
def test_devices(device: str, model: Path, texts: Path, no_weights: None) -> None:
    done = call("--model", model, "--calibration_data", texts, *WANDA, "--device", device)
    complaint(done, 1, f"--device {device}: ", DEVICES[device], "cpu")


def test_tokens_for_which_the_embedding_has_no_row(
    texts: Path, tmp_path: Path, no_weights: None
) -> None:
    folder = tiny.write_model(tmp_path / "short", tiny.tiny_llama(vocab_size=200))
    done = call("--model", folder, "--calibration_data", texts, *WANDA)
    complaint(done, 1, f"--model {folder}: ", "embedding has 200 rows", "resize_token_embeddings")


# --- texts: status 1

GOOD = "".join(json.dumps({"text": text}) + "\n" for text in tiny.sentences(20))
TEXTS = [  # files of a folder, the flag that is complained of, words
    ({}, "--calibration_data", ["neither train*.jsonl"]),
    ({"train": "", "test": GOOD}, "--calibration_data", ["no text"]),
    ({"train": GOOD + "{oops\n", "test": GOOD}, "--calibration_data", ["line 21", "not JSON"]),
    ({"train": GOOD, "test": GOOD}, "--calibration_data", ["for 2100 windows", "--nsamples"]),
    ({"train": GOOD, "test": "{\n"}, "--eval_data", ["test.jsonl, line 1", "not JSON"]),
    ({"train": GOOD, "test": '{"text": "сонце"}\n'}, "--eval_data", ["tokens", "--seqlen"]),
]


@pytest.mark.parametrize("row", TEXTS, ids=lambda row: f"{row[1]} {row[2][0]}")
def test_texts(row: tuple, model: Path, tmp_path: Path, no_weights: None) -> None:
    files, flag, words = row
    folder = tmp_path / "uk"
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text(content, "utf-8")
    given = ["--calibration_data", folder, "--eval_data", folder, *WANDA]
    more = ["--nsamples", 2100] if flag == "--calibration_data" else []
    complaint(call("--model", model, *given, *more), 1, f"{flag} {folder}: ", *words)


@pytest.mark.parametrize("flag", ["--calibration_data", "--eval_data"])
def test_unknown_sources(flag: str, model: Path, texts: Path, no_weights: None) -> None:
    data = {"--calibration_data": texts, "--eval_data": texts} | {flag: "nosuch"}
    given = [part for pair in data.items() for part in pair]
    done = call("--model", model, *given, *WANDA)
    complaint(done, 1, f"{flag} nosuch: ", "no such name", "ubertext")
    assert not [path for path in Path().iterdir() if path.name != "cache"]  # nothing is left


def test_calibrating_and_measuring_on_one_text_is_noted(model: Path, texts: Path) -> None:
    given = ["--model", model, "--calibration_data", texts, *WANDA, "--eval_data"]
    for own in (texts / "train.jsonl", texts):
        done = call(*given, own)
        assert done.status == 0
        assert (f"--eval_data {own}: --calibration_data" in done.out) == own.is_file()


# --- what is found on the way: status 1


@pytest.mark.parametrize("offload", [[], ["--offload_folder", "away"]])
@pytest.mark.parametrize("method", ["magnitude", "admm"])
def test_weights_that_are_not_finite(
    method: str, offload: list[str], texts: Path, tmp_path: Path
) -> None:
    damaged = tiny.tiny_llama()
    damaged.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    folder = tiny.write_model(tmp_path / "damaged", damaged)
    given = ["--calibration_data", texts, *QUICK, "--save_model", "new", *offload]
    done = call("--model", folder, "--prune_method", method, *given)
    # where blocks are fetched one at a time, the dense model's loss shows it
    words = ["activations are not finite"] if offload else ["layers.1.mlp.up_proj holds nan or inf"]
    complaint(done, 1, "--model", *words, "the model again")
    assert not Path("new").exists()


@pytest.mark.parametrize("method", ["wanda", "admm"])
def test_activations_that_become_infinite(method: str, texts: Path, tmp_path: Path) -> None:
    damaged = tiny.tiny_llama()
    damaged.model.layers[1].mlp.gate_proj.weight.data *= 1e38  # finite, but no product with it is
    folder = tiny.write_model(tmp_path / "damaged", damaged)
    done = call("--model", folder, "--prune_method", method, "--calibration_data", texts, *QUICK)
    complaint(done, 1, "--model", "activations are not finite", "--dtype float32")
    done = call("--model", folder, "--eval_only", "--eval_data", texts, *QUICK)
    complaint(done, 1, "--model", "activations are not finite", "--dtype float32")


def test_a_lack_of_memory_names_flags(model: Path, texts: Path) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with raising(full, "prune"):
        done = call("--model", model, "--calibration_data", texts, *WANDA)
    complaint(done, 1, "out of memory", "--batch_size", "--offload_folder")


def test_debug_shows_the_traceback(model: Path) -> None:
    with pytest.raises(UserError):
        call("--model", model, "--calibration_data", "nosuch", *WANDA, "--debug")
