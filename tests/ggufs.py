"""Tiny GGUF models of every kind of vocabulary that llama.cpp runs; plain Python and numpy."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 256  # one block of q4_K
UK = "сонце ріка ліс тихо пливе над старим містом вітер гойдає верби дорога веде до моря".split()
EN = "the old river runs past a quiet town where children play under tall green trees".split()
UK += [word + end for word in UK for end in ("ами", "ого", "еш")]
EN += [word + end for word in EN for end in ("ing", "less", "ward")]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>' }}{% endfor %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
RESERVED = [f"<unused{number}>" for number in range(6)]
F32, F16, Q8_0, Q4_K, Q6_K, IQ4_NL, BF16 = 0, 1, 8, 12, 14, 20, 30
STRING, ARRAY, UINT32, INT32, FLOAT32 = 8, 9, 4, 5, 6


def sentences(words: list[str], count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=20)) + draw.choice(".!\n") for _ in range(count)]


def write_texts(folder: Path, words: list[str], count: int = 40) -> Path:
    """A folder with train.jsonl and test.jsonl; the test has words that the other has not."""
    folder.mkdir(parents=True)
    for split, some in (("train", words[:-4]), ("test", words)):
        rows = [json.dumps({"text": text}) for text in sentences(some, count, len(split))]
        (folder / f"{split}.jsonl").write_text("\n".join(rows), "utf-8")
    return folder


def merged(letters: list[list[str]], count: int) -> list[tuple[str, str]]:
    """The first `count` merges of byte-pair encoding, trained on words."""
    merges = []
    for _ in range(count):
        pairs = Counter(pair for word in letters for pair in pairwise(word))
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in letters:
            for place in range(len(word) - 1, 0, -1):
                if tuple(word[place - 1 : place + 1]) == best:
                    word[place - 1 : place + 1] = ["".join(best)]
    return merges


def letters_of_bytes() -> dict[int, str]:
    """Byte-level letters, as GPT-2's encoder.py has them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [number for number in range(256) if number not in plain]
    return {n: chr(n) for n in plain} | {n: chr(256 + i) for i, n in enumerate(others)}


def tokenizer(kind: str, merges: int = 300) -> dict[str, tuple[int, Any]]:
    """The fields of a tokenizer for both languages, {name: (kind, value)}."""
    if kind == "gpt2":
        letter = letters_of_bytes()
        words = [[letter[b] for b in f" {word}".encode()] for word in UK + EN]
        base = [(token, 1) for token in letter.values()]
    else:
        words = [[*f"▁{word}"] for word in UK + EN]
        base = [(f"<0x{number:02X}>", 6) for number in range(256)] if kind != "bert" else []
        signs = [*"\n.!▁"] + [f"▁{sign}" for sign in "\n.!"] * (kind == "bert")
        base += [(token, 1) for token in dict.fromkeys([*signs, *sorted(set("".join(UK + EN)))])]
    pairs = merged(words, merges)
    tokens = [(token, 3) for token in SPECIAL]
    tokens[0] = ("<unk>", 2)
    tokens += [(token, 3) for token in RESERVED] + base + [(a + b, 1) for a, b in pairs]
    tokens = [*dict(tokens).items()]
    ids = {token: index for index, (token, _) in enumerate(tokens)}
    fields: dict[str, tuple[int, Any]] = {
        "tokenizer.ggml.model": (STRING, kind),
        "tokenizer.ggml.tokens": (STRING, [token for token, _ in tokens]),
        "tokenizer.ggml.token_type": (INT32, [number for _, number in tokens]),
        "tokenizer.ggml.bos_token_id": (UINT32, ids["<s>"]),
        "tokenizer.ggml.eos_token_id": (UINT32, ids["</s>"]),
        "tokenizer.ggml.unknown_token_id": (UINT32, ids["<unk>"]),
        "tokenizer.ggml.suppress_tokens": (INT32, [ids["<s>"], ids["<unused3>"]]),
        "tokenizer.chat_template": (STRING, TEMPLATE),
        "tokenizer.huggingface.json": (STRING, "{}"),
    }
    if kind in ("gpt2", "gemma4"):
        fields["tokenizer.ggml.pre"] = (STRING, "qwen2")
        fields["tokenizer.ggml.merges"] = (STRING, [f"{a} {b}" for a, b in pairs])
    if kind in ("llama", "t5"):
        order = {a + b: -1.0 - rank * 0.01 for rank, (a, b) in enumerate(pairs)}
        scores = [order.get(token, -9.0) * len(token) ** 0.5 for token, _ in tokens]
        fields["tokenizer.ggml.scores"] = (FLOAT32, scores)
    if kind == "bert":
        for name in ("seperator", "padding", "mask"):
            fields[f"tokenizer.ggml.{name}_token_id"] = (UINT32, ids["</s>"])
    return fields


def blocks(kind: int, rows: int, width: int, seed: int) -> np.ndarray:
    """Random bytes (rows, bytes) of a type, with small scales so that all numbers are finite."""
    from gguf import GGML_QUANT_SIZES

    draw = np.random.default_rng(seed)
    if kind in (F32, F16):
        values = draw.normal(0, 0.2, (rows, width))
        return values.astype(np.float32 if kind == F32 else np.float16).view(np.uint8)
    if kind == BF16:
        values = draw.normal(0, 0.2, (rows, width)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    scales = {Q8_0: (0,), IQ4_NL: (0,), Q4_K: (0, 2), Q6_K: (208,)}[kind]
    size, block = GGML_QUANT_SIZES[kind]
    data = draw.integers(0, 256, (rows * width // size, block), np.uint8)
    for place in scales:
        data[:, place : place + 2] = np.float16([0.001]).view(np.uint8)
    return data.reshape(rows, -1)


def write_gguf(
    path: Path,
    fields: dict[str, tuple[int, Any]],
    tensors: dict[str, tuple[tuple[int, ...], int, np.ndarray]],
) -> Path:
    """Write a file with gguf's own writer; tensors are {name: (shape, type, bytes)}."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, (kind, value) in fields.items():
        if isinstance(value, list):
            writer.add_key_value(name, value, GGUFValueType.ARRAY, GGUFValueType(kind))
        else:
            writer.add_key_value(name, value, GGUFValueType(kind))
    for name, (shape, kind, data) in tensors.items():
        data = np.ascontiguousarray(data).view(np.uint8).reshape(*shape[:0:-1], -1)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model(
    path: Path,
    kind: str = "gpt2",
    table: int = F32,
    head: int | None = F16,
    changed: dict[str, tuple[int, Any]] | None = None,
    more: dict[str, tuple[tuple[int, ...], int, np.ndarray] | None] | None = None,
    without: str = "",
    padding: int = 0,
) -> Path:
    """A LLaMA of one block; without `head` it is tied. `padding`: rows without a token.

    `more` are other tensors, None in place of one that is left out.
    """
    fields = tokenizer(kind)
    for number in range(padding):
        fields["tokenizer.ggml.tokens"][1].append(f"[PAD{number}]")
        fields["tokenizer.ggml.token_type"][1].append(5)
    rows = len(fields["tokenizer.ggml.tokens"][1])
    counts = dict(context_length=512, embedding_length=WIDTH, block_count=1, vocab_size=rows)
    counts |= {"feed_forward_length": 96, "rope.dimension_count": 64}
    counts |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    fields |= {f"llama.{name}": (UINT32, count) for name, count in counts.items()}
    fields["llama.attention.layer_norm_rms_epsilon"] = (FLOAT32, 1e-5)
    fields |= {"general.name": (STRING, "Tiny"), "general.size_label": (STRING, "1M")}
    fields = {n: v for n, v in (fields | (changed or {})).items() if n != without}
    shapes = dict(attn_q=(WIDTH, 256), attn_k=(WIDTH, 128), attn_v=(WIDTH, 128))
    shapes |= dict(attn_output=(256, WIDTH), ffn_gate=(WIDTH, 96), ffn_up=(WIDTH, 96))
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    shapes["blk.0.ffn_down.weight"] = (96, WIDTH)
    tensors = {
        name: (shape, F32, blocks(F32, shape[1], shape[0], seed))
        for seed, (name, shape) in enumerate(shapes.items())
    }
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors[f"{name}.weight"] = ((WIDTH,), F32, np.ones(WIDTH, np.float32))
    tensors["token_embd.weight"] = ((WIDTH, rows), table, blocks(table, rows, WIDTH, 8))
    if head is not None:
        tensors["output.weight"] = ((WIDTH, rows), head, blocks(head, rows, WIDTH, 9))
    tensors = {name: entry for name, entry in (tensors | (more or {})).items() if entry}
    return write_gguf(path, fields, tensors)


# gguf itself takes some packages, if they are there
WITHOUT = """
import sys
heavy = {*sys.argv.pop(1).split(",")}

class Blocked:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in heavy:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
from lib.commands.__main__ import main
try:
    main()
finally:
    print(*heavy & {*sys.modules})
"""


def run_without(heavy: str, *argv: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command where some packages, with commas between, cannot be imported.

    Its last line of output names those that were imported nevertheless.
    """
    root = str(Path(__file__).resolve().parents[1])
    words = [sys.executable, "-c", WITHOUT, heavy, *map(str, argv)]
    options = dict(env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
    return subprocess.run(words, cwd=cwd, **options)
