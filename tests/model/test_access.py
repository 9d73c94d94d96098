"""What is wrong with a checkpoint is told before its weights are read, under its flag."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch
from support import refused
from transformers import AutoModelForCausalLM

from lib.model import access
from lib.model.access import Checkpoint, check_folder
from lib.model.pretrained import load_config, load_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model", tiny.tiny_llama())


def test_an_index_of_another_form_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    wrong = [f'{{"weight_map": {{"a": {name}}}}}' for name in ("{}", "5", '"../a"', '"/dev/zero"')]
    for index in ("[]", '{"weight_map": [1]}', *wrong):
        (folder / INDEX).write_text(index)
        assert INDEX in refused(check_folder, Checkpoint(str(folder)))


@pytest.mark.parametrize("name", ["a.txt", "tokenizer.json", "additional_chat_templates/a.jinja"])
def test_pipes_and_devices_are_not_read(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        assert f"{name} is a pipe or a device" in refused(load_config, Checkpoint(str(folder)))


def test_weights_come_from_the_commit_of_the_config(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the hub's branch moves on in between."""
    config = load_config(Checkpoint(str(folder)))
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
