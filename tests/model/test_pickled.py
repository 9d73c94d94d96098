"""benchmarks/to_safetensors.py, which the error for a model without safetensors names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from to_safetensors import main  # noqa: E402

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_pickled_shards_load_afterwards_with_all_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny.write_model("model")
    tensors = load_file("model/model.safetensors")
    Path("model/model.safetensors").unlink()
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        shard = {name: tensors[name] for name in some}
        torch.save(shard, f"model/pytorch_model-{number:05}-of-00002.bin")
    for name, key, old in (
        ("config.json", "architectures", ["LLaMAForCausalLM"]),
        ("tokenizer_config.json", "tokenizer_class", "LLaMATokenizer"),
    ):
        file = Path("model", name)
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: old}))
    main(["model", "new"])
    assert json.loads(Path("new/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    held = AutoModelForCausalLM.from_pretrained("new", dtype="auto").state_dict()
    assert all(torch.equal(held[name], tensors[name]) for name in names)
    before, after = (AutoTokenizer.from_pretrained(name) for name in ("model", "new"))
    assert before("слово word").input_ids == after("слово word").input_ids
    for argv, problem in (
        (["model", "new"], "NEW new exists. Name a new folder"),
        (["new", "newer"], "MODEL new has no pytorch_model*.bin"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        assert problem in capsys.readouterr().err
