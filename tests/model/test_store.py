"""Blocks that come from disk one at a time: the same bytes, one copy a machine, no traces left."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from support import CPU, QUICK, Done, at, call, no_file_larger_than, refused
from transformers import AutoModelForCausalLM

from lib.model import checkpoint as access
from lib.model.checkpoint import Checkpoint
from lib.model.pretrained import load_config, load_model
from lib.model.skeleton import build_skeleton, decoder_blocks
from lib.offload.store import FileBlockStore, device_map

pytestmark = pytest.mark.usefixtures("at_place")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    sharded = tiny.write_model(folder / "sharded", tiny.tiny_llama(num_hidden_layers=3))
    tiny.tiny_llama(num_hidden_layers=3).save_pretrained(sharded, max_shard_size="60KB")
    (sharded / "model.safetensors").unlink()
    tiny.write_texts(folder / "uk", test=3)
    return folder


def prune(model: str | Path, folder: Path) -> Done:
    data = ["--calibration_data", "uk", "--eval_data", "uk", "--save", folder / "run"]
    flags = [*QUICK, *data, "--prune_method", "wanda", "--save_model", folder / "model"]
    return call("--model", model, *flags, "--offload_folder", folder / "away")


def opened(checkpoint: str, folder: Path, writes: bool = True) -> FileBlockStore:
    """A model whose blocks lie in a folder, converted there."""
    model = Checkpoint(checkpoint)
    config = load_config(model)
    bare = build_skeleton(config, model)
    where = device_map(bare, decoder_blocks(bare)[0], CPU)
    options = dict(dtype=torch.float32, device_map=where, offload=str(folder), writes=writes)
    loaded = load_model(model, config, **options)
    return FileBlockStore(loaded, CPU, folder=None, on_disk=False, cast_on_load=False)


def test_finished_blocks_become_the_shards_of_the_model(tmp_path: Path) -> None:
    """Nothing is written twice."""
    done = prune("sharded", tmp_path)
    assert done.status == 0 and done.complaints == [], done.err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "model"}
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    by_file: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        by_file.setdefault(file, set()).add(".".join(name.split(".")[:3]))
    assert len(by_file) == 4  # three blocks, and what is outside them
    assert all(len(blocks) == 1 for blocks in by_file.values() if "model.layers.0" in blocks)


def test_one_rank_of_a_machine_converts(tmp_path: Path) -> None:
    """Fused experts are written once, and mapped by all."""
    tiny.write_model(tmp_path / "mixture", tiny.ARCHITECTURES["Mixtral"]())
    places, times = [], []
    for writes in (True, False):
        places.append(opened(str(tmp_path / "mixture"), tmp_path / "new", writes).places)
        files = (tmp_path / "new").glob("*.safetensors")
        times.append({file.name: file.stat().st_mtime_ns for file in files})
    assert places[0] == places[1]
    assert times[0] == times[1] and any("experts" in file for file in times[0])


def test_a_copy_of_a_fetched_block_leaves_memory_at_once(tmp_path: Path) -> None:
    """Nothing collects garbage where a device is full."""
    store = opened("sharded", tmp_path)
    gc.disable()
    try:
        with store.on_device(1):
            copied = copy.deepcopy(store.blocks[1])
            alive = weakref.ref(copied.mlp.up_proj.weight)
            del copied
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_holds_something_is_refused(begun: bool, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    (away / "block-00000.safetensors").write_bytes(b"mine")
    if begun:
        (away / "job.json").write_text("{}")
    [line] = prune("sharded", tmp_path).complaints
    assert f"--offload_folder {away}: " in line and ("--resume" in line) == begun
    assert (away / "block-00000.safetensors").read_bytes() == b"mine"


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path: Path) -> None:
    with no_file_larger_than(10_000):
        done = prune("sharded", tmp_path)
    [line] = done.complaints
    assert "error: --offload_folder" in line and "block-00000.safetensors" in line
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_shard_that_is_damaged_in_the_middle_of_the_run(damage: str, tmp_path: Path) -> None:
    folder = shutil.copytree("sharded", tmp_path / "sharded")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"]["model.layers.2.mlp.up_proj.weight"]

    def break_it() -> None:
        data = file.read_bytes()
        file.unlink()
        if damage == "cut":
            file.write_bytes(data[:2000])

    with at("prune", 1, break_it):
        done = prune(folder, tmp_path)
    [line] = done.complaints
    assert done.status == 1 and file.name in line
    assert not (tmp_path / "model").exists() and (tmp_path / "away" / "job.json").exists()


def test_weights_come_from_the_commit_of_the_config(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the hub's branch moves on in between."""
    config = load_config(Checkpoint("sharded"))
    config._commit_hash = "c0ffee"
    asked = []

    def from_pretrained(name: str, **options: object) -> None:
        asked.append(options["revision"])
        raise OSError("offline")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(access, "local_only", lambda checkpoint: False)
    where = dict(dtype=torch.float32, device_map={"": "cpu"})
    assert "offline" in refused(load_model, Checkpoint("owner/name"), config, **where)
    assert asked == ["c0ffee"]


def test_blocks_that_share_weights_are_not_offloaded(tmp_path: Path) -> None:
    """As Zamba 2's do: one can't be brought without the other."""
    tiny.write_model("sharing", tiny.HYBRIDS["Zamba2"]())
    done = prune("sharing", tmp_path)
    assert done.status == 1 and "share weights" in done.complaints[0]
