"""Chat templates in the manner of well-known ones, tokenizers that have them, and dialogues."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import tiny
from transformers import PreTrainedTokenizerFast

LLAMA_3 = """\
{{- bos_token }}{% for m in messages %}
{{- '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"""
DATED = LLAMA_3.replace("bos_token", "bos_token + strftime_now('%A %d %B %Y ')", 1)
GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}
{% endif %}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles alternate') }}
{%- endif %}{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- m.content | trim + '<end>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"""
QWEN_3 = """\
{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ '<tool>' + call.function | tojson + '</tool>' }}
{%- endfor %}{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}
{%- endfor %}"""
MARKS = {
    LLAMA_3: ["<|start|>", "<|end|>", "<|eot|>"],
    GEMMA: ["<start>", "<end>"],
    QWEN_3: ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool>", "</tool>"],
    MISTRAL: ["[INST]", "[/INST]"],
}
ENDS = {LLAMA_3: "<|eot|>", GEMMA: "<end>", QWEN_3: "<|im_end|>", MISTRAL: tiny.EOS}


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a template, and a token for each of its marks."""
    tokenizer = tiny.tiny_tokenizer()
    marks = MARKS.get(LLAMA_3 if template == DATED else template, [])
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def said(*contents: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": each} for role, each in zip(roles, contents, strict=False)]


def some(count: int, seed: int = 0, words: int = 6) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)
    line = lambda n: " ".join(draw.choices(tiny.WORDS, k=n))  # noqa: E731
    return [said(line(4), line(words)) for _ in range(count)]


def write(folder: Path, train: Sequence, test: Sequence) -> Path:
    """Write dialogues as rows with `messages`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, dialogues in (("train", train), ("test", test)):
        lines = [json.dumps({"messages": each}, ensure_ascii=False) + "\n" for each in dialogues]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder
