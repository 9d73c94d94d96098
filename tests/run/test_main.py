"""Whole runs of main.py on tiny models: what they compute, write and print, and what decides it."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
from pathlib import Path

import processes
import pytest
import tiny
import torch
from approval import Words
from safetensors import safe_open
from safetensors.torch import load_file
from support import QUICK, Done, ended, mistake, python, results, succeed, weights
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.data import documents
from lib.methods.registry import METHODS
from lib.model.pretrained import window_length

pytestmark = pytest.mark.usefixtures("elsewhere")

FULL = pytest.mark.full
SEQLEN, WINDOWS = 32, 8  # of QUICK
KEYS = {"model", "method", "sparsity_type", "sparsity_ratio", "flags", "seed", "versions"}
KEYS |= {"device", "calibration", "evaluation", "perplexity", "sparsity", "seconds"}
KEYS |= {"peak_memory", "footprint", "fingerprint", "dense_bytes"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def uk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_texts(tmp_path_factory.mktemp("texts") / "uk", 40, 8)


@pytest.fixture(scope="module")
def en(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = tiny.sentences(6, seed=7)
    return tiny.write_texts(tmp_path_factory.mktemp("texts") / "en", test=texts)


def run(model: Path | str, *flags: object, save: str = "out", saved: str | None = None) -> Done:
    """A run that succeeds; `saved`: the folder of its model, which is new."""
    if saved:
        shutil.rmtree(saved, ignore_errors=True)
    target = ["--save_model", saved] if saved else []
    done = succeed("--model", model, "--save", save, *target, *QUICK, *flags)
    return done


def same(one: str, other: str) -> bool:
    """Whether two saved models have the same weights, bit for bit."""
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(method: str, folder: Path | str = "out") -> dict[str, str]:
    """log_METHOD.txt as {column: value}."""
    text = Path(folder, f"log_{method}.txt").read_text("utf-8")
    assert text.endswith("\n")
    names, values = (line.split("\t") for line in text.splitlines() if line[0] != "#")
    return dict(zip(names, values, strict=True))


def published_perplexity(folder: Path, texts: Path) -> float:
    """By the published rule, with nothing of this package: whole logits, window after window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = (texts / "test.jsonl").read_text("utf-8").splitlines()
    text = "\n\n".join(json.loads(row)["text"] for row in rows)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    losses = []
    for index in range(ids.numel() // SEQLEN):
        window = ids[:, index * SEQLEN : (index + 1) * SEQLEN]
        with torch.no_grad():
            logits = model(window).logits.float()
        losses.append(F.cross_entropy(logits[0, :-1], window[0, 1:]) * SEQLEN)
    return math.exp(torch.stack(losses).sum() / (len(losses) * SEQLEN))


def zeros(folder: Path | str) -> dict[str, torch.Tensor]:
    """Where the weights of the decoder blocks' matrices are zero."""
    held = weights(folder).items()
    return {name: w == 0 for name, w in held if "layers" in name and w.dim() == 2}


# --- what a run computes and leaves


KINDS = [("wanda", "unstructured"), ("admm", "2:4"), ("magnitude", "4:8")]
KINDS += [(method, "unstructured") for method in METHODS if method != "wanda"]


@pytest.mark.parametrize(
    ("method", "kind"), [*KINDS[:2], *(pytest.param(*of, marks=FULL) for of in KINDS[2:])]
)
def test_a_whole_run(method: str, kind: str, model: Path, uk: Path) -> None:
    given = ["--calibration_data", uk, "--sparsity_type", kind, "--prune_method", method]
    done = run(model, *given, saved="new")
    found = results()
    assert found.keys() >= KEYS
    assert found["flags"].items() >= {"nsamples": WINDOWS, "sparsity_type": kind}.items()
    assert found["seconds"].keys() >= {"load", "dense", "prune", "save", "eval"}
    size = sum(weight.nbytes for weight in weights("new").values())
    assert size <= found["footprint"]["after"] == found["footprint"]["before"] < size + 1000
    masks = zeros("new")
    assert len(masks) == 14
    for mask in masks.values():
        assert mask.sum() * 2 == mask.numel()
        if kind != "unstructured":
            n, m = map(int, kind.split(":"))
            assert (mask.view(-1, m).sum(1) == n).all()
    shares = {f"{name}.weight": share for name, share in found["sparsity"]["linears"].items()}
    assert shares == dict.fromkeys(masks, 0.5) and found["sparsity"]["overall"] == 0.5
    value = published_perplexity(Path("new"), uk)
    assert found["perplexity"] == {"uk": pytest.approx(value, rel=1e-4)}
    row = {"method": method, "actual_sparsity": "0.5000"}
    assert log(method) == row | {"ppl_test": f"{found['perplexity']['uk']:.4f}"}
    last = [line for line in done.out.splitlines() if "perplexity" in line][-1]
    assert float(last.split()[-1]) == pytest.approx(value, rel=1e-4)
    [test] = found["evaluation"]
    assert test["kl"] > 0 and test["compared_windows"] == test["windows"]
    dense = test["dense"]["perplexity"]
    assert dense == pytest.approx(published_perplexity(model, uk), rel=1e-4)
    for figures in (f" {test['kl']:.4f} ± ", f" {dense:,.2f} | {test['perplexity']:,.2f} ± "):
        assert figures in re.sub(" +", " ", done.out)
    before, after = load_file(model / "model.safetensors"), weights("new")
    assert before.keys() == after.keys()
    for name in before.keys() - masks.keys():
        assert torch.equal(before[name], after[name]), name
    if method in ("wanda", "magnitude"):  # which only drop
        for name, mask in masks.items():
            assert torch.equal(before[name].masked_fill(mask, 0), after[name]), name


def test_evaluation_alone(model: Path, uk: Path) -> None:
    assert run(model, "--eval_only", "--eval_data", uk).complaints == []
    value = published_perplexity(model, uk)
    assert log("dense")["actual_sparsity"] == "0.0000"
    assert float(log("dense")["ppl_test"]) == pytest.approx(value, rel=1e-4)
    found = results()
    assert found["method"] == "dense" and found["calibration"] is None
    assert found["sparsity_type"] is None and found["sparsity_ratio"] is None
    assert "kl" not in found["evaluation"][0]
    [test] = found["evaluation"]
    assert test["tokens"] == test["windows"] * SEQLEN == test["windows"] * test["seqlen"]
    nats = math.log(value) * test["windows"] * (SEQLEN - 1)
    assert test["bits_per_byte"] == pytest.approx(nats / math.log(2) / test["bytes"], rel=1e-4)


def test_several_test_sets(model: Path, uk: Path, en: Path) -> None:
    run(model, "--prune_method", "magnitude", "--eval_data", en, uk)
    found = results()["perplexity"]
    assert list(found) == ["en", "uk"] and found["en"] != found["uk"]
    row = log("magnitude")
    assert list(row) == ["method", "actual_sparsity", "ppl_test", "ppl_en", "ppl_uk"]
    assert row["ppl_test"] == row["ppl_en"] == f"{found['en']:.4f}"
    assert row["ppl_uk"] == f"{found['uk']:.4f}"


def test_a_hub_that_is_out_of_reach_but_a_model_that_is_in_the_cache(
    model: Path, uk: Path, tmp_path: Path
) -> None:
    cached = tmp_path / "weights" / "models--owner--name"
    shutil.copytree(model, cached / "snapshots" / "a1b2c3")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a1b2c3")
    given = ["--prune_method", "magnitude", "--eval_data", uk]
    run("owner/name", "--cache_dir", tmp_path / "weights", *given, saved="new")
    assert "base_model: owner/name\n" in Path("new/README.md").read_text("utf-8")


# --- what a flag does


@pytest.mark.parametrize("bits", ["8", pytest.param("4", marks=FULL)])
def test_quantized_models(bits: str, trained: Path, uk: Path) -> None:
    given = ["--eval_only", "--eval_data", uk]
    run(trained, *given)
    done = run(trained, *given, "--load_bit", bits, save="small")
    dense, small = results(), results("small")
    near = {"8": 0.005, "4": 0.02}[bits]  # to zero every matrix multiplies it by 200
    assert small["perplexity"]["uk"] == pytest.approx(dense["perplexity"]["uk"], rel=near)
    assert small["perplexity"]["uk"] != dense["perplexity"]["uk"]
    assert small["footprint"]["after"] < dense["footprint"]["after"]
    assert done.complaints == []


@FULL
def test_dtypes(trained: Path, uk: Path, tmp_path: Path) -> None:
    """A bfloat16 checkpoint: worked on in float32 or bfloat16, saved in bfloat16 in both cases."""
    learned = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    halves = tiny.write_model(tmp_path / "halves", learned)
    given = ["--prune_method", "wanda", "--calibration_data", uk]
    for dtype in ("auto", "bfloat16", "float32"):
        run(halves, *given, "--dtype", dtype, save=dtype, saved=f"{dtype}-model")
        with safe_open(f"{dtype}-model/model.safetensors", framework="pt") as held:
            kinds = {held.get_tensor(name).dtype for name in held.keys()}
        saved = torch.float32 if dtype == "float32" else torch.bfloat16
        assert kinds == {saved}
        config = json.loads(Path(f"{dtype}-model/config.json").read_text("utf-8"))
        assert config["dtype"] == str(saved).removeprefix("torch.")
        again = ["--eval_only", "--eval_data", uk, "--dtype", dtype]
        run(f"{dtype}-model", *again, save="again")
        assert log("dense", "again")["ppl_test"] == log("wanda", dtype)["ppl_test"]
    exact, rounded = (results(dtype)["perplexity"]["uk"] for dtype in ("float32", "bfloat16"))
    assert rounded == pytest.approx(exact, rel=0.01)


def test_the_variant_gives_rows_shares_of_their_own_and_is_named(trained: Path, uk: Path) -> None:
    wanda = ["--prune_method", "wanda", "--calibration_data", uk]
    run(trained, *wanda, saved="plain")
    done = run(trained, *wanda, "--use_variant", saved="variant", save="variant-out")
    by_row = {name: [mask.sum(1) for mask in zeros(name).values()] for name in ("plain", "variant")}
    assert all(rows.unique().numel() == 1 for rows in by_row["plain"])
    assert all(rows.unique().numel() > 1 for rows in by_row["variant"])
    overall = results("variant-out")["sparsity"]["overall"]
    assert overall == pytest.approx(0.5, abs=0.02) and overall != 0.5
    for text in (done.out, Path("variant/README.md").read_text("utf-8")):
        assert "variant" in text


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=[FULL] * (method != "ria")) for method in METHODS]
)
def test_another_share_of_zeros_is_reached_and_costs_more(
    method: str, trained: Path, uk: Path
) -> None:
    flags = ["--prune_method", method, "--calibration_data", uk]
    run(trained, *flags, save="half")
    run(trained, *flags, "--sparsity_ratio", "0.75", save="more")
    half, more = results("half"), results("more")
    assert (half["sparsity"]["overall"], more["sparsity"]["overall"]) == (0.5, 0.75)
    assert more["perplexity"]["uk"] > 1.1 * half["perplexity"]["uk"]


@FULL
def test_settings_of_the_recovery(trained: Path, uk: Path) -> None:
    flags = ["--prune_method", "wanda", "--calibration_data", uk, "--recover", "512"]
    run(trained, *flags[:4], saved="pruned")
    for name, more in {
        "default": [],
        "same": ["--recover_ce_weight", "0.2"],
        "text": ["--recover_ce_weight", "0.9"],
        "slow": ["--recover_lr", "0.0001"],
        "fast": ["--recover_lr", "0.001"],
        "rank": ["--recover_rank", "2"],
    }.items():
        run(trained, *flags, *more, saved=name, save=f"out-{name}")
    assert same("default", "same") and not same("default", "text") and not same("rank", "default")
    assert results("out-text")["recovery"]["cross_entropy"] == 0.9
    assert results("out-rank")["recovery"]["rank"] == 2
    pruned, moved = weights("pruned"), {}
    for name in ("slow", "fast"):
        end = weights(name)
        moved[name] = sum((end[key] - pruned[key]).norm().item() for key in pruned)
    assert 5 < moved["fast"] / moved["slow"] < 15  # AdamW's steps are of about the rate


def test_bos_is_put_before_windows_where_the_model_needs_it(
    needs_bos: Path, trained: Path, uk: Path
) -> None:
    digests, perplexities = {}, {}
    for name, model in (("needs", needs_bos), ("does not", trained)):
        for bos in ("auto", "never"):
            run(model, "--eval_only", "--eval_data", uk, "--bos", bos, save=f"{name}-{bos}")
            [test] = results(f"{name}-{bos}")["evaluation"]
            digests[name, bos], perplexities[name, bos] = test["digest"], test["perplexity"]
    assert digests["needs", "auto"] != digests["needs", "never"]
    assert perplexities["needs", "never"] > 1.5 * perplexities["needs", "auto"]
    assert digests["does not", "auto"] == digests["does not", "never"]
    assert results("needs-auto")["bos"] == 0 and results("needs-never")["bos"] is None


@FULL
def test_a_run_that_is_continued_decides_as_it_did(
    needs_bos: Path, uk: Path, tmp_path: Path
) -> None:
    """Though on another test text it would not; no two blocks see different windows."""
    letters = "".join(random.Random(1).choices("qzxwvjkбгґщьюя#%&@!", k=4000))
    noise = tiny.write_texts(tmp_path / "noise", test=[letters])

    def flags(name: str, test: Path) -> list:
        argv = ["--model", needs_bos, "--prune_method", "wanda", "--calibration_data", uk, *QUICK]
        argv += ["--eval_data", test, "--resume", tmp_path / f"{name}-kept"]
        return [*argv, "--save_model", tmp_path / f"{name}-m", "--save", tmp_path / f"{name}-out"]

    assert processes.run(flags("resumed", noise), tmp_path, "prune 1:SIGKILL").status < 0
    for name, test in (("resumed", uk), ("noise", noise), ("uk", uk)):
        succeed(*flags(name, test))
    begun = {name: results(tmp_path / f"{name}-out")["bos"] for name in ("resumed", "noise", "uk")}
    assert begun == {"resumed": None, "noise": None, "uk": 0}
    whole, resumed = weights(tmp_path / "noise-m"), weights(tmp_path / "resumed-m")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_texts_are_read_once_though_windows_are_drawn_again(
    needs_bos: Path, uk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, own = [], documents._read
    monkeypatch.setattr(
        documents, "_read", lambda source, path: read.append(path) or own(source, path)
    )
    argv = ["--model", needs_bos, "--prune_method", "wanda", "--calibration_data", uk, *QUICK]
    succeed(*argv, "--save", tmp_path / "out")
    assert results(tmp_path / "out")["bos"] == 0
    assert sorted(path.name for path in read) == ["test.jsonl", "train.jsonl"]


def test_with_a_teacher_it_is_the_dense_model_that_needs_bos(needs_bos: Path, uk: Path) -> None:
    pruned = AutoModelForCausalLM.from_pretrained(needs_bos, dtype=torch.float32)
    embedding = pruned.get_input_embeddings().weight.data
    embedding[0] = embedding[3:].mean(0)  # its BOS helps no longer
    tiny.write_model(Path("pruned"), pruned)
    for more, bos in (([], None), (["--teacher", needs_bos], 0)):
        run("pruned", "--eval_only", "--eval_data", uk, *more)
        assert results()["bos"] == bos


def test_a_run_without_seqlen_takes_the_models_window_up_to_4096(trained: Path, uk: Path) -> None:
    for limit, window in ((131_072, 4096), (4096, 4096), (2048, 2048)):
        assert window_length(tiny.tiny_llama(max_position_embeddings=limit).config, None) == window
    given = ["--device", "cpu", "--eval_only", "--eval_data", uk, "--save", "out"]
    succeed("--model", trained, *given)
    assert results()["evaluation"][0]["seqlen"] == 128  # max_position_embeddings of tiny models


def test_the_default_window_is_one_that_the_texts_have(tmp_path: Path) -> None:
    wide = tiny.write_model(tmp_path / "wide", tiny.tiny_llama(max_position_embeddings=1024))
    Path("book.txt").write_text("\n\n".join(tiny.sentences(30)))
    given = ["--model", wide, "--device", "cpu", "--calibration_data", "book.txt", "--save", "out"]
    given += ["--prune_method", "wanda", "--nsamples", 20, "--completions", 0]
    done = succeed(*given)
    window, digest = (results()["calibration"][name] for name in ("seqlen", "digest"))
    assert f"window: {window} tokens" in done.out and window in (128, 256, 512)
    succeed(*given, "--seqlen", window)
    assert results()["calibration"]["digest"] == digest
    assert "--seqlen" in str(mistake(*given, "--seqlen", 2 * window))


def test_without_a_gpu_the_cpu_is_taken_and_named(trained: Path, uk: Path) -> None:
    given = ["--eval_only", "--eval_data", uk, "--save", "out", "--seqlen", "32"]
    done = succeed("--model", trained, *given)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert f"device: {device}\n" in done.out and results()["device"].startswith(device)


def test_remote_code_runs_only_where_it_is_trusted(trained: Path, uk: Path) -> None:
    folder = Path(shutil.copytree(trained, "odd"))
    tiny.own_code_(folder)
    flags = ["--eval_only", "--eval_data", uk]
    error = mistake("--model", folder, *QUICK, *flags)
    assert str(error).startswith(f"--model {folder}: ") and "--trust_remote_code" in str(error)
    run(trained, *flags, save="plain")
    run(folder, *flags, "--trust_remote_code", save="trusted")
    assert results("trusted")["perplexity"]["uk"] > 1.01 * results("plain")["perplexity"]["uk"]


def test_names_of_test_sets_do_not_steer_the_terminal(model: Path) -> None:
    texts = tiny.write_texts(Path("uk\x1b[2J\u202e"), 20, 4)
    done = run(model, "--eval_only", "--eval_data", texts)
    assert "\x1b" not in done.out and "\u202e" not in done.out and "perplexity uk[2J: " in done.out


@pytest.mark.parametrize(
    ("argv", "said"), [("--help", "recovery training:"), ("--model=M", "error:")]
)
def test_help_and_mistakes_import_nothing_heavy(argv: str, said: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['fcntl'] = None\n"  # of Unix alone
        "import main\n"
        "try: main.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print('imported:', *sys.modules)"
    )
    done = ended(python(code, argv, folder=tmp_path))
    assert said in done.out + done.err, done.err
    _, imported = done.out.split("imported:")
    heavy = {"torch", "transformers", "numpy", "datasets", "huggingface_hub", "matplotlib"}
    assert not heavy.intersection(imported.split())


def test_what_is_not_used_is_told(
    model: Path, uk: Path, caplog: pytest.LogCaptureFixture, words: Words
) -> None:
    folder = shutil.copytree(model, "more")
    config = json.loads((model / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "auto_map": {"AutoConfig": "a.A"}}
    Path("more/config.json").write_text(json.dumps(config))
    Path("more/log.txt").touch()
    os.truncate("more/log.txt", 2**40)  # nor are they read whole
    Path("more/chat_template.jinja").write_text("{% generation %}{% for m in messages %}")
    run(folder, "--calibration_data", uk, "--prune_method", "wanda", saved="new")
    assert "auto_map" not in Path("new/config.json").read_text()  # its code is not saved
    said = [record.getMessage() for record in caplog.records]
    words("on_the_way.txt", "\n".join(line for line in said if "--model" in line), "not used")


def test_calibrating_and_measuring_on_one_text_is_noted(model: Path, uk: Path) -> None:
    given = ["--calibration_data", uk, "--prune_method", "wanda"]
    for own in (uk / "train.jsonl", uk):
        done = run(model, *given, "--eval_data", own)
        assert (f"--eval_data {own}: --calibration_data" in done.out) == own.is_file()
