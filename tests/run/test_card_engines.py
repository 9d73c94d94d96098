"""The card's section on engines."""

from __future__ import annotations

import re

from lib.run.card_engines import engines


def test_every_engine_has_a_command_and_says_whether_it_was_run() -> None:
    heading, _, table = engines("gemma-uk", packed=False)
    assert heading == "## Engines"
    rows = dict(re.findall(r"(?m)^\| ([\w.]+) \| (.*) \|$", table))
    assert list(rows) == ["engine", "llama.cpp", "ollama", "CTranslate2", "vLLM"]
    assert "launch.sh gguf gemma-uk gemma-uk.gguf --type q8_0" in rows["llama.cpp"]
    assert "`FROM ./gemma-uk.gguf`" in rows["ollama"]
    for name, row in list(rows.items())[1:]:
        assert re.search(r"\| (run with .*\d|not run)", row), name


def test_packed_folders_are_unpacked_for_engines_that_read_dense_ones() -> None:
    text = "\n".join(engines("small", packed=True))
    assert "`vllm serve small-dense`" in text and "--model small-dense" in text
    assert "launch.sh gguf small small.gguf" in text


def test_a_name_that_a_shell_or_markdown_would_read_is_not_shown() -> None:
    text = "\n".join(engines("a`b|$(c)", packed=False))
    assert "$(c)" not in text and "vllm serve FOLDER" in text
