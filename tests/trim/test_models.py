"""Folders of every architecture that `trim` takes: the same logits, loaded as users load them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from support import loaded, representative, succeed
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vocabulary"))

import kinds  # noqa: E402

from lib.commands.trim.__main__ import main  # noqa: E402

EVERY = tiny.ALL | tiny.REFUSED
QUICK = ["Llama", "Mamba", "Phi", "Gemma 3n", "Gemma 4 multimodal", "Qwen3-VL"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.write_texts(folder / "uk", kinds.texts(kinds.UK[:12], 60, 1), kinds.texts(kinds.UK, 12, 2))
    return folder


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny vocabulary, most of which is bytes."""
    monkeypatch.setattr("lib.data.trimming_cost.MOST", 512)
    monkeypatch.setattr("lib.data.token_choice.MULTIPLE", 8)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", representative(EVERY, QUICK))
def test_same_logits_of_every_architecture(name: str, tmp_path: Path) -> None:
    """Also where a table for all blocks has fewer rows than the vocabulary."""
    texts = tiny.write_texts(tmp_path / "uk", train=[" ".join(tiny.WORDS[:4])] * 12, test=12)
    tiny.write_model(tmp_path / "model", EVERY[name](), tiny.tiny_tokenizer())
    argv = [tmp_path / "model", tmp_path / "out", "--data", texts]
    said = succeed(*argv, program=main).out
    assert "logits after 24 beginnings" in said and "not verified" not in said
    listed = json.loads((tmp_path / "out/vocabulary.json").read_text("utf-8"))
    rows = torch.tensor(listed["rows"])
    ids = torch.randint(len(rows), (2, 24), generator=torch.Generator().manual_seed(0))
    before, after = loaded(tmp_path / "model"), loaded(tmp_path / "out")
    expected = logits(before, rows[ids])[..., rows]
    torch.testing.assert_close(logits(after, ids), expected, rtol=1e-5, atol=1e-5)
    fields = vars(after.config.get_text_config(decoder=True))
    sizes = {v for k, v in fields.items() if k.startswith("vocab_size") and isinstance(v, int)}
    assert sizes == {len(rows)}
    tied = [
        model.get_input_embeddings().weight is model.get_output_embeddings().weight
        for model in (before, after)
    ]
    assert tied[0] == tied[1]
