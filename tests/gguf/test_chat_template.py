"""llama.cpp renders dialogues as the folder's tokenizer does, and ends answers where it does."""

from __future__ import annotations

from pathlib import Path

import chats
import pytest
import tiny
import whole
from support import refused, representative

from lib.commands.gguf import convert
from lib.commands.gguf.__main__ import main
from lib.model.folder import ModelFolder

pytest.importorskip("xllamacpp", reason="needs the package of requirements-gguf.txt")
pytestmark = pytest.mark.usefixtures("quickly")
whole_view = convert.make_view


@pytest.mark.parametrize("template", representative(chats.MARKS, [chats.QWEN_3]))
def test_dialogues_are_rendered_alike(template: str, tmp_path: Path, capsys) -> None:
    tokenizer = chats.tokenizer_with(template)
    tokenizer.eos_token = chats.ENDS[template]
    folder = whole.write_whole(tmp_path / "model", "llama", whole.WIDTHS, tokenizer)
    main([str(folder), str(tmp_path / "model.gguf"), "--type", "q8_0"])
    out = capsys.readouterr().out
    assert "thinking): llama" in out or "thinking, tool call): llama" in out
    assert "the end of an answer" not in out and "chat template of a system" not in out
    assert "-cnv" in (tmp_path / "model.gguf.md").read_text("utf-8")


def test_another_template_and_another_end_are_told(tmp_path: Path, monkeypatch, capsys) -> None:
    tokenizer = chats.tokenizer_with(chats.GEMMA)  # whose end of turn is not its eos_token
    folder = whole.write_whole(tmp_path / "model", "llama", whole.WIDTHS, tokenizer)
    main([str(folder), str(tmp_path / "a.gguf"), "--type", "q8_0"])
    assert "not verified: " in (out := capsys.readouterr().out)
    assert "the end of an answer (llama.cpp does not stop at '<end>')" in out
    monkeypatch.setattr(convert, "make_view", view_with_another_template)
    line = refused(main, [str(folder), str(tmp_path / "b.gguf"), "--type", "q8_0"])
    assert "not written: chat template, several turns: at token" in line


def view_with_another_template(source: ModelFolder, folder: Path, weights: Path) -> Path:
    before, source.tokenizer.chat_template = source.tokenizer.chat_template, chats.QWEN_3
    try:
        return whole_view(source, folder, weights)
    finally:
        source.tokenizer.chat_template = before


def test_a_base_model_is_no_chat(tmp_path: Path, capsys) -> None:
    folder = whole.write_whole(tmp_path / "model", "llama", whole.WIDTHS, tiny.tiny_tokenizer())
    main([str(folder), str(tmp_path / "model.gguf"), "--type", "q8_0"])
    assert "dialogues" not in capsys.readouterr().out
    assert "-cnv" not in (tmp_path / "model.gguf.md").read_text("utf-8")
