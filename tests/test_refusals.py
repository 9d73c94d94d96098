"""What bad input gets, for all commands: one line that names what is wrong, and nothing written.

The cases are the entries of words/refusals.txt: a command line, in brackets what is otherwise than
here (see `world`), and below it what is said. `main.py ...` has the flags of a quick run. For a new
case, write its first line there, and run `pytest --approve` on this test.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shlex
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from stat import S_ISDIR
from types import SimpleNamespace

import ggufs
import pytest
import tiny
import torch
from approval import FOLDER, Words, entries
from safetensors.torch import load_file, save, save_file
from support import QUICK, attempt, call, mistake, program_of, raising, replace_call
from tokenizers import Tokenizer, models
from transformers import (
    ByT5Tokenizer,
    LlamaPreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lib.util.errors import UserError
from lib.util.files import exclusive_lock

pytestmark = pytest.mark.usefixtures("at_place")


WITH_WEIGHTS = "once weights are read"
RUN = f"main.py {' '.join(QUICK)}"


CASES = [*entries(FOLDER / "refusals.txt")]
WANDA = ["--prune_method", "wanda", "--calibration_data", "uk", *QUICK]


METHOD = """
from langprune.methods.base import PruningMethod

class Mine(PruningMethod):
    power: float = 1.0
    rounds: int = 2

    def prune_(self, linear, inputs, sparsity): ...
"""
# --- the folder in which all commands run, and what differs in some cases


def changed(model: Path, folder: str, file: str, content: bytes | None) -> None:
    """A copy of a model with another file, or without it."""
    Path(shutil.copytree(model, folder), file).unlink(missing_ok=True)
    if content is not None:
        Path(folder, file).write_bytes(content)


def lines(file: str, *rows: object) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    written = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    Path(file).write_text("".join(f"{row}\n" for row in written), "utf-8")


def write_models(model: Path) -> None:
    """Models that can't be pruned, trimmed or trained, each for its own reason."""
    config = json.loads((model / "config.json").read_text())

    def fields(**other: object) -> bytes:
        return json.dumps(config | other).encode()

    shard, tokenizer = (
        (model / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")
    )
    broken: dict[str, tuple[str, bytes | None]] = {
        "no_config": ("config.json", None),
        "config_cut_short": ("config.json", b"{"),
        "unknown_kind": ("config.json", fields(model_type="nosuch")),
        "layers": ("config.json", fields(num_hidden_layers=10**7)),
        "experts": ("config.json", fields(model_type="phimoe", num_local_experts=10**7)),
        "tokens": ("config.json", fields(vocab_size=10**11)),
        "deeper": ("config.json", fields(num_hidden_layers=3)),
        "wider": ("config.json", fields(intermediate_size=128)),
        "adapter": ("adapter_config.json", b"{}"),
        "no_weights": ("model.safetensors", None),
        "weights_cut_short": ("model.safetensors", shard[:-100]),
        "no_header": ("model.safetensors", bytes(4000)),
        "long_template": ("chat_template.jinja", b"{%" * 33000),
        "no_tokenizer": ("tokenizer.json", tokenizer[:-100]),
    }
    for name, (file, content) in broken.items():
        changed(model, f"broken/{name}", file, content)
    indices = {
        "index_of_a_list": [],
        "index_without_names": {"weight_map": [1]},
        "index_of_a_number": {"weight_map": {"a": 5}},
        "index_outside": {"weight_map": {"a": "../a"}},
        "index_of_a_device": {"weight_map": {"a": "/dev/zero"}},
    }
    for name, index in indices.items():
        changed(model, f"broken/{name}", "model.safetensors", None)
        lines(f"broken/{name}/model.safetensors.index.json", index)
    changed(model, "broken/a_pipe", "tokenizer.json", None)
    os.mkfifo("broken/a_pipe/tokenizer.json")
    changed(model, "broken/a_device", "a.txt", None)
    Path("broken/a_device/a.txt").symlink_to("/dev/zero")
    four = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    changed(model, "four", "config.json", fields(quantization_config=four))
    changed(
        model,
        "gptq",
        "config.json",
        fields(quantization_config={"quant_method": "gptq", "bits": 4}),
    )
    splade = [{"path": "", "type": "sentence_transformers.sparse_encoder.models.SpladePooling"}]
    changed(model, "odd/sparse", "modules.json", json.dumps(splade).encode())
    changed(model, "odd/size", "config.json", fields(vocab_size=tiny.ROWS + 1))
    held = load_file(model / "model.safetensors")
    head, table = held["lm_head.weight"], held.pop("model.embed_tokens.weight")
    whole = held | {"model.embed_tokens.weight": table}
    others = {
        "tensor": whole | {"router.weight": head.clone()},
        "head": whole | {"shared.weight": head[:-9].clone()},
        "none": held,
    }
    for name, tensors in others.items():
        changed(model, f"odd/{name}", "model.safetensors", save(tensors))
    changed(model, "pickled", "model.safetensors", None)
    torch.save({}, "pickled/pytorch_model.bin")
    tiny.tiny_llama().save_pretrained("lost", max_shard_size="60KB")
    tiny.tiny_tokenizer().save_pretrained("lost")
    sorted(Path("lost").glob("*.safetensors"))[1].unlink()
    small = T5Config(vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    tiny.write_model("t5", T5ForConditionalGeneration(small))
    odd = dict(hidden_size=36, num_attention_heads=6, intermediate_size=60)
    tiny.write_model("narrow", tiny.tiny_llama(**odd))
    tiny.write_model("short", tiny.tiny_llama(vocab_size=200))
    tiny.write_model("whole", tiny.tiny_llama(vocab_size=320))  # the rows that its texts need
    tiny.write_model("slow", tokenizer=ByT5Tokenizer())
    of_words = Tokenizer(models.WordLevel({"a": 0, "text": 1, "?": 2}, unk_token="?"))
    tiny.write_model("words", tokenizer=PreTrainedTokenizerFast(tokenizer_object=of_words))
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
    tiny.write_model("unigram", tokenizer=PreTrainedTokenizerFast(tokenizer_object=unigram))
    tiny.write_model("other", tiny.tiny_llama(intermediate_size=48, vocab_size=tiny.ROWS))
    tiny.write_model("foreign", tokenizer=tiny.tiny_tokenizer(size=290))
    pruned = tiny.tiny_llama(vocab_size=tiny.ROWS)
    for block in pruned.model.layers:
        for weight in block.parameters():
            weight.data[..., ::2] = 0
    tiny.write_model("pruned", pruned)


def write_files() -> None:
    """Texts, results, masks and files of the user."""
    good = [{"text": text} for text in tiny.sentences(20)]
    lines("oops/train.jsonl", *good, "{oops")
    lines("oops/test.jsonl", "{")
    lines("half_read/train.jsonl", *good)
    lines("half_read/test.jsonl", "{")
    lines("blank/train.jsonl", "")
    lines("word/test.jsonl", {"text": "сонце"})
    lines("scant/train.jsonl", *good[:1])
    tiny.write_texts("seen", tiny.sentences(8), tiny.sentences(9))
    lines("untaught/test.jsonl", *good)
    words = "місто річка дерево сонце вікно книга дорога пташка хмара камінь".split()
    draw = random.Random(0)
    asks = [" ".join(draw.choices(words, k=14)) + "." for _ in range(40)]
    lines("asks/test.jsonl", *({"text": text} for text in asks))
    lines("few_words/test.jsonl", {"text": "Мало слів."})
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for split in ("train", "test"):
        lines(f"chat/{split}.jsonl", *9 * [chat])
    for name in ("empty", "mine"):
        Path(name).mkdir()
    for file in ("mine/thesis.txt", "taken.gguf", "named.gguf.json", "dump.bin", "none.py"):
        Path(file).write_text("mine")
    Path("none.py").unlink()
    Path("broken.py").write_text("1 / 0\n")
    Path("mine.py").write_text(METHOD)
    Path("empty.py").write_text(
        METHOD.partition("    power")[0].replace("Mine", "Empty") + "    pass\n"
    )
    Path("bad/pipe").mkdir(parents=True)
    os.mkfifo("bad/pipe/train.jsonl")
    Path("bad/cp1251.txt").write_bytes("слово".encode("cp1251") * 9)
    Path("bad/cp1251.csv").write_bytes("text\nслово слово".encode("cp1251"))
    lines("bad/column.csv", "id,body", "1,one")
    lines("bad/ragged.csv", "id,text", "1,one, two")
    lines("bad/blank.txt", " ")
    lines("bad/number.jsonl", {"text": 1})
    lines("bad/short.txt", "one two")
    Path("half.json").write_text("[]")
    up = "model.layers.0.mlp.up_proj.weight"
    types = dict(no_tensor={"nosuch": "q5_0"}, no_type={up: "q4_k"}, too_wide={up: "q3_k"})
    for name, its in types.items():
        Path(f"{name}.json").write_text(json.dumps(its))
    Path("texts.parquet").write_bytes(b"PAR1")
    Path("ended.partial").mkdir()  # of a run that was killed
    pairs = dict(empty="", cut="{", good='{"good": "a"}', blank='{"good": "a", "bad": " "}')
    pairs["null"] = '{"good": "a", "bad": "b"}\n{"good": "a", "bad": null}'
    pairs["equal"] = '\n{"good": "a", "bad": "a "}'
    for name, text in pairs.items():
        lines(f"pairs/{name}.jsonl", text)
    made = {"model": "m", "method": "wanda", "sparsity_type": "2:4", "sparsity_ratio": 0.5}
    made |= {"flags": {}, "seed": 0, "calibration": None, "evaluation": [], "perplexity": {}}
    reports = dict(cut="{", list="[]", lacks="{}", good=json.dumps(made | {"sparsity": {}}))
    for name, text in reports.items():
        lines(f"reports/{name}/results.json", text)
    for name, (blocks, width, zeros) in dict(
        a=(3, 16, 0), wide=(3, 32, 0), deep=(4, 16, 0), dense=(3, 16, 1)
    ).items():
        Path("masks", name).mkdir(parents=True)
        half = (torch.arange(24 * width).view(24, width) % 2 + zeros).float()
        masks = {
            f"model.layers.{block}.mlp.up_proj.weight": half.clone() for block in range(blocks)
        }
        save_file(masks, f"masks/{name}/model.safetensors")
    whole = Path("masks/a/model.safetensors").read_bytes()
    Path("masks/cut").mkdir()
    Path("masks/cut/model.safetensors").write_bytes(whole[:-100])


def write_ggufs() -> None:
    """Files that trim can't trim, each for its own reason."""
    whole = ggufs.model(Path("whole.gguf"), table=ggufs.Q8_0, head=None)
    shutil.copy(whole, "a-00001-of-00002.gguf")
    Path("left.gguf.partial").touch()
    Path("listed.gguf.vocabulary.json").touch()
    fields = ggufs.tokenizer("gpt2")
    tokens = fields["tokenizer.ggml.tokens"][1]
    listed = {"ids": [1, 2], "tokens": tokens[1:3], "rows": [1, 2], "record": {}}
    lines("kept.json", listed)
    lines("other_tokens.json", listed | {"tokens": tokens[2:4]})
    lines("without_end.json", listed | {"ids": [1], "tokens": tokens[1:2]})
    Path("trim").mkdir()
    data = whole.read_bytes()
    info = data.index(b"token_embd.weight") + 17  # dimensions, shape, type

    def field(kind: int, value: bytes) -> bytes:
        head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 17)
        return head + b"general.alignment" + struct.pack("<I", kind) + value

    spoiled = {
        "cut": data[:-9000],
        "cut_early": data[:5000],
        "big_endian": data[:4] + data[7:3:-1] + data[8:],
        "version": data[:4] + b"\1" + data[5:],
        "type": data[: info + 20] + b"\xfa" + data[info + 21 :],
        "nested": field(9, struct.pack("<IQ", 9, 1) * 20000),
        "alignment": field(4, struct.pack("<I", 0)),
        "alignment_text": field(8, struct.pack("<Qc", 1, b"x")),
    }
    for name, content in spoiled.items():
        Path(f"trim/{name}.gguf").write_bytes(content)
    tables = {
        "table": ("engram.weight", len(tokens)),
        "rows": ("output.weight", len(tokens) + 1),
        "d2t": ("d2t", 16),
        "tid2eid": ("blk.0.ffn_gate_tid2eid.weight", len(tokens)),
        "ordering": ("masked_embd_ordering.weight", 16),
    }
    for name, (tensor, rows) in tables.items():
        entry = (4, rows), ggufs.F32, ggufs.blocks(ggufs.F32, rows, 4, 0)
        ggufs.model(Path(f"trim/{name}.gguf"), table=ggufs.Q8_0, head=None, more={tensor: entry})
    twice = (ggufs.STRING, [*tokens[:-1], tokens[-2]])
    changed_fields = {
        "ple": {"llama.ple.layers": (ggufs.UINT32, 1)},
        "ids": {"llama.image_token_ids_of_mine": (ggufs.INT32, [1, 2])},
        "chameleon": {"general.architecture": (ggufs.STRING, "chameleon")},
        "rwkv": {"tokenizer.ggml.model": (ggufs.STRING, "rwkv")},
        "twice": {"tokenizer.ggml.tokens": twice},
        "pre": {"tokenizer.ggml.pre": (ggufs.STRING, "nosuch")},
    }
    for name, changes in changed_fields.items():
        options = dict(table=ggufs.Q8_0, head=None, changed=changes)
        ggufs.model(Path(f"trim/{name}.gguf"), **options)
    options = dict(table=ggufs.Q8_0, head=None, without="tokenizer.ggml.merges")
    ggufs.model(Path("trim/no_merges.gguf"), **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    with chdir(folder):
        model = tiny.write_model("model")
        shutil.copytree(model, "dense")
        tiny.write_texts("uk", 40, 8)
        write_models(model)
        write_files()
        if find_spec("gguf.constants"):
            write_ggufs()
    return folder


def hub_error(name: str) -> Callable:
    """A hub that answers every question about a model by an error."""
    from huggingface_hub import errors

    # the hub's client brings its own: httpx, or in later releases httpx2
    httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
    answer = httpx.Response(500, request=httpx.Request("GET", "http://hub"))
    error = {
        "missing": errors.RepositoryNotFoundError("404", response=answer),
        "gated": errors.GatedRepoError("403", response=answer),
        "broken": errors.HfHubHTTPError("500 broken", response=answer),
        "away": httpx.ConnectError("no route"),
    }[name]

    def model_info(*_: object, **__: object) -> None:
        raise error

    return model_info


@contextmanager
def world(name: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where something is so that is otherwise here."""
    what, _, more = name.partition(" ")
    with ExitStack() as stack:
        if name == "no blocks":
            patch.setattr(LlamaPreTrainedModel, "_no_split_modules", [])
        elif name == "no AVX2":
            patch.setattr("lib.packed.kernels.supported", lambda: False)
        elif name == "a full disk":
            patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
        elif name == "another command":
            stack.enter_context(exclusive_lock(Path("small-compress.lock"), ""))
        elif what == "the":
            patch.setattr("huggingface_hub.HfApi.model_info", hub_error(more.removeprefix("hub: ")))
        elif what == "no":
            patch.setitem(sys.modules, more, None)
        elif what == "with":
            patch.setitem(sys.modules, more, SimpleNamespace(__spec__=ModuleSpec(more, None)))
        yield


# --- the cases


def files() -> dict[str, object]:
    """All files and folders here, and whether files were written to.

    The folder that compress works in may stay, empty.
    """
    paths = [path for path in Path().rglob("*") if "__pycache__" not in path.parts]
    found = {str(path): path.lstat() for path in paths}
    return {
        path: S_ISDIR(one.st_mode) or (one.st_size, one.st_mtime_ns)
        for path, one in found.items()
        if not path.startswith("small-compress") or not S_ISDIR(one.st_mode)
    }


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_else(
    case: str, words: Words, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    line, _, where = case.removesuffix(")").partition(" (")
    if where != WITH_WEIGHTS:
        request.getfixturevalue("no_weights")
    replace_call(monkeypatch, lambda *argv: pytest.fail(f"{argv} is started"))
    before = files()
    program, *argv = shlex.split(line.replace("main.py ...", RUN))
    if program == "trim":
        pytest.importorskip("gguf.constants")  # tests/gguf is a namespace of this name
    with world(where, monkeypatch):
        done, _ = attempt(*argv, program=program_of(program))
    assert files() == before
    [said] = done.err.splitlines()
    words("refusals.txt", said + f"\nexit status {done.status}" * (done.status != 1), case)


# --- what is found on the way


@pytest.mark.parametrize("offload", [[], ["--offload_folder", "away"]])
@pytest.mark.parametrize("method", ["magnitude", "admm"])
def test_weights_that_are_not_finite(method: str, offload: list[str], tmp_path: Path) -> None:
    damaged = tiny.tiny_llama()
    damaged.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    folder, new = tiny.write_model(tmp_path / "damaged", damaged), tmp_path / "new"
    given = ["--calibration_data", "uk", *QUICK, "--save_model", new, *offload]
    assert mistake("--model", folder, "--prune_method", method, *given).what.startswith("--model")
    assert not new.exists()


@pytest.mark.parametrize("does", ["--prune_method wanda", "--prune_method admm", "--eval_only"])
def test_activations_that_become_infinite(does: str, tmp_path: Path) -> None:
    damaged = tiny.tiny_llama()
    damaged.model.layers[1].mlp.gate_proj.weight.data *= 1e38  # finite, but no product with it is
    folder = tiny.write_model(tmp_path / "damaged", damaged)
    data = ["--calibration_data", "uk", "--save", tmp_path / "out"]
    error = mistake("--model", folder, *does.split(), *data, *QUICK)
    assert error.what.startswith("--model") and "--dtype float32" in str(error)


def test_a_lack_of_memory_names_flags(words: Words, tmp_path: Path) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    with raising(full, "prune"):
        done = call(*WANDA, "--model", "model", "--save", tmp_path / "out")
    assert done.status == 1
    words("on_the_way.txt", "\n".join(done.complaints), "a lack of memory")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UserError):
        call("--model", "model", *WANDA, "--eval_data", "nosuch", "--debug")
