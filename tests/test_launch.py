"""Every recipe of launch.sh, by its name in a shell, to its end, and what it leaves."""

from __future__ import annotations

import ast
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from hub import Hub
from support import QUICK, ROOT, launch, launched, results, weights
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("at_place")

TESTS = {
    "demo": "demo/test_demo.py",
    "unstructured": "test_launch.py",
    "semistructured": "test_launch.py",
    "c4": "test_launch.py",
    "dense": "test_launch.py",
    "vocabulary": "vocabulary/test_vocabulary_command.py",
    "compress": "compress/test_compress.py",
    "sweep": "test_launch.py",
    "languages": "test_launch.py",
    "report": "test_launch.py",
    "overlap": "test_launch.py",
    "unpack": "test_launch.py",
    "gguf": "gguf/test_llama_cpp.py",
    "ubertext": "data/test_ubertext.py",
    "bench": "test_launch.py",
    "bench_sparse": "test_launch.py",
    "gpu": "test_launch.py",
}


@pytest.fixture(scope="module")
def place(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(trained, folder / "model")
    tiny.write_texts(folder / "uk", train=30, test=4)
    english = tiny.sentences(30, seed=9)
    tiny.write_texts(folder / "en", train=english, test=english[:4])
    return folder


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[Hub]:
    """A hub with the published data sets, and the model as owner/name."""
    rows = {split: (place / f"uk/{split}.jsonl").read_bytes() for split in ("train", "test")}
    english = gzip.compress((place / "en/train.jsonl").read_bytes())
    repositories = {
        "datasets/mshamrai/lang-pruning-uk-uber-text-2": {
            f"{split}.jsonl": text for split, text in rows.items()
        },
        "datasets/allenai/c4": {"en/c4-train.00000-of-01024.json.gz": english},
        "models/owner/name": {
            file.name: file.read_bytes() for file in (place / "model").iterdir() if file.stem
        },
    }
    with Hub(repositories) as found:
        yield found


# --- runs of main.py


@pytest.fixture(scope="module")
def downloaded(hub: Hub, place: Path) -> str:
    """What `unstructured` says; it has left the model in the cache `weights`."""
    argv = ["unstructured", "owner/name", "--cache_dir", "weights", "--save_model", "pruned"]
    return launched(argv, place, *QUICK, **hub.environment(place))


def test_unstructured_prunes_half_on_ubertext(downloaded: str, place: Path) -> None:
    found = results("out/unstructured")
    assert (found["method"], found["sparsity_type"]) == ("sparsegpt", "unstructured")
    assert found["sparsity"]["overall"] == 0.5
    assert found["calibration"]["name"] == "ubertext" and list(found["perplexity"]) == ["ubertext"]
    assert "perplexity ubertext: " in downloaded
    assert list(Path("weights/models--owner--name/snapshots").glob("*/model.safetensors"))
    assert "base_model: owner/name\n" in Path("pruned/README.md").read_text("utf-8")


def test_dense_measures_a_model_of_the_cache_while_the_hub_refuses(
    downloaded: str, hub: Hub, place: Path
) -> None:
    argv = ["dense", "owner/name", "--cache_dir", "weights", "--eval_data", "uk"]
    hub.status = 500
    try:
        launched(argv, place, *QUICK, **hub.environment(place))
    finally:
        hub.status = None
    found, pruned = results("out/dense"), results("out/unstructured")
    assert found["method"] == "dense" and found["sparsity"]["overall"] < 0.01
    assert found["perplexity"]["uk"] < pruned["perplexity"]["ubertext"]  # of the same text


def test_c4_calibrates_on_english_and_measures_on_ubertext(hub: Hub, place: Path) -> None:
    launched(["c4", "model"], place, *QUICK, **hub.environment(place))
    found = results("out/c4")
    assert (found["method"], found["sparsity_type"]) == ("sparsegpt", "unstructured")
    assert found["calibration"]["name"] == "c4" and list(found["perplexity"]) == ["ubertext"]
    assert any(path.endswith("en/c4-train.00000-of-01024.json.gz") for path in hub.asked)


@pytest.fixture(scope="module")
def packed(place: Path) -> str:
    argv = ["semistructured", "model", "--calibration_data", "uk", "--save_model", "packed"]
    return launched(argv, place, *QUICK)


def test_semistructured_packs_2_of_4(packed: str) -> None:
    found = results("out/semistructured")
    assert (found["method"], found["sparsity_type"]) == ("sparsegpt", "2:4")
    assert found["sparsity"]["overall"] == 0.5 and found["packed"]["bits"] == 16
    assert any(name.endswith("q_proj.mask") for name in weights("packed"))
    assert "packed linears: " in packed


def test_unpack_gives_a_dense_model_of_the_same_weights(packed: str, place: Path) -> None:
    assert launched(["unpack", "packed", "plain"], place) == "unpacked: plain\n"
    plain = AutoModelForCausalLM.from_pretrained("plain")
    groups = plain.model.layers[0].mlp.down_proj.weight.view(-1, 4)
    assert ((groups == 0).sum(1) == 2).all()
    assert not any(name.endswith(".mask") for name in weights("plain"))
    kept = torch.cat([one[one != 0] for one in weights("plain").values()])
    assert kept.isfinite().all() and len(kept) > 10_000


# --- several runs


@pytest.fixture(scope="module")
def pruned_twice(place: Path) -> str:
    return launched(["languages", "model", "uk", "en"], place, "--", *QUICK)


def test_languages_shows_what_two_masks_share(pruned_twice: str) -> None:
    said = json.loads(Path("languages/overlap/overlap.json").read_text("utf-8"))
    assert said["runs"] == ["uk (seed 0)", "en (seed 0)"]
    assert 0.5 < said["overall"]["overlap"] < 1 and said["overall"]["chance"] < 0.6
    assert "share\n" in pruned_twice and "| excess" in pruned_twice


def test_overlap_compares_pruned_models(pruned_twice: str, place: Path) -> None:
    runs = [f"languages/model/wanda-50-{name}-seed0" for name in ("uk", "en")]
    said = launched(["overlap", *runs, "--out", "shared"], place)
    before, after = (
        json.loads(Path(folder, "overlap.json").read_text("utf-8"))
        for folder in ("languages/overlap", "shared")
    )
    assert after["overall"]["overlap"] == before["overall"]["overlap"]
    assert f"{after['overall']['overlap']:.1%}" in said
    assert Path("shared/overlap.png").stat().st_size > 10_000


def test_report_has_a_row_for_each_run(pruned_twice: str, place: Path) -> None:
    said = launched(["report", "languages", "--out", "told"], place)
    assert said.count("\n| wanda ") == 2 and said.count("\n| dense ") == 1
    assert said.strip() in Path("told/report.md").read_text("utf-8")
    assert Path("told/report.csv").read_text("utf-8").count("\n") == 1 + 3 * 2


def test_sweep_runs_what_is_asked_for(place: Path) -> None:
    argv = ["sweep", "--models", "model", "--methods", "magnitude", "--types", "2:4"]
    said = launched([*argv, "--calibration", "uk"], place, "--", *QUICK)
    names = {file.parent.name for file in Path("runs").rglob("results.json")}
    assert names == {"dense", "magnitude-2of4"}
    assert said.count("\n| magnitude ") == 1 and "2 runs, 0 of them finished before" in said


# --- benchmarks


def test_bench_times_runs(place: Path) -> None:
    argv = ["bench", "--model", "model", "--calibration_data", "uk", "--no_peer", "--rounds", "1"]
    argv += ["--methods", "wanda", "--types", "2:4", "--nsamples", "2", "--seqlen", "32"]
    said = launched([*argv, "--save", "bench"], place)
    assert "| wanda | 2:4 |" in said.replace("  ", "")


def test_bench_sparse_splits_the_time_of_a_token(place: Path) -> None:
    argv = ["bench_sparse", "split", "--model", "model", "--rounds", "1"]
    said = launched([*argv, "--dtypes", "float32", "--shares", "0.5"], place)
    assert "milliseconds a token" in said and "| dense" in said


def test_gpu_checks_what_a_cpu_can_do(place: Path) -> None:
    argv = ["gpu", "--device", "cpu", "--small", "--only", "masks", "--save", "gpu"]
    said = launched(argv, place)
    report = json.loads(Path("gpu/gpu.json").read_text("utf-8"))["steps"]["masks"]
    assert report["result"] == "ok" and report["figures"]
    assert "| masks | ok |" in said


# --- the list


def test_launch_alone_lists_every_recipe(place: Path) -> None:
    said = launched([], place)
    assert set(re.findall(r"^  (\w+)", said, re.MULTILINE)) == TESTS.keys()


def test_every_recipe_is_launched_by_a_test() -> None:
    cases = (ROOT / "launch.sh").read_text("utf-8").partition("case $name in")[2]
    names = re.findall(r"^    ([\w| ]+)\)", cases, re.MULTILINE)
    assert {name for line in names for name in line.split(" | ")} - {"help"} == TESTS.keys()
    for recipe, file in TESTS.items():
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.List) and node.elts]
        firsts = {ast.unparse(word) for call in calls for word in call.elts[:6]}
        assert repr(recipe) in firsts, recipe


@pytest.mark.parametrize(
    "argv", [["nosuch"], ["dense"], ["unstructured", "--device", "cpu"], ["vocabulary", "model"]]
)
def test_a_mistake_is_refused_in_one_line(argv: list[str], place: Path) -> None:
    done = launch(argv, place)
    assert done.status == 2 and not done.out
    assert done.err.count("\n") == 1 and argv[0] in done.err
