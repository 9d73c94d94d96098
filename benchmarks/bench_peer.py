"""The other side of bench.py: llm-compressor prunes the same windows, in its environment.

    python bench_peer.py MODEL WINDOWS.safetensors METHOD TYPE RATIO REPORT.json [SAVE_FOLDER]

Imports nothing of this project, which need not be installed there. The report holds the seconds of
pruning alone and the largest resident size in bytes until then.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}


def main(name: str, windows: str, method: str, kind: str, ratio: str, report: str, *save: str):
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = load_file(windows)["windows"]  # (windows, tokens)
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    modifier = MODIFIERS[method](
        sparsity=float(ratio),
        mask_structure="0:0" if kind == "unstructured" else kind,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=[modifier],
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        pipeline="sequential",
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures = {"seconds": seconds, "peak": peak * (1 if sys.platform == "darwin" else 1024)}
    Path(report).write_text(json.dumps(figures), "utf-8")
    for folder in save:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
