"""What is wrong with a checkpoint is told before its weights are read, under its flag."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from lib.model import access
from lib.model.access import Checkpoint, check_folder
from lib.model.pretrained import load_config, load_model
from lib.util.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_model(tmp_path / "model", tiny.tiny_llama())


@pytest.mark.parametrize(
    "index",
    ["[]", '{"weight_map": [1]}']
    + [f'{{"weight_map": {{"a": {name}}}}}' for name in ("{}", "5", '"../a"', '"/dev/zero"')],
)
def test_an_index_of_another_form_is_refused(index: str, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="model.safetensors.index.json cannot be loaded"):
        check_folder(Checkpoint(str(folder)))


@pytest.mark.parametrize("name", ["a.txt", "tokenizer.json", "additional_chat_templates/a.jinja"])
def test_pipes_and_devices_are_not_read(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(UserError, match=f"{name} is a pipe or a device. Remove"):
            load_config(Checkpoint(str(folder)))


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
    with pytest.raises(UserError, match="offline"):
        load_model(Checkpoint("owner/name"), config, dtype=torch.float32, device_map={"": "cpu"})
    assert asked == ["c0ffee"]
