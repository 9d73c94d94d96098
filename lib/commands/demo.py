"""Run the whole pipeline on a tiny model that the demo trains, without network or GPU.
For a first look: it ends with a table of what each language loses, and the next command to try.

    bash launch.sh demo [--folder demo]

The demo trains a tiny model on Ukrainian and English stories and prunes it in one sweep: with
Wanda, SparseGPT and ADMM, at 50% and 2:4, calibrated on either language, evaluated on both. A
report with a picture is written. After an interruption the same command trains the model again, to
the same bytes, and keeps finished runs.

The model is small on purpose: without spare capacity it loses with every pruned weight, and its two
languages need different weights.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..run.results import NONE
from ..util.cli import make_parser, typed
from ..util.files import check_new_folder
from ..util.markdown import padded_table
from ..util.progress import progress, quiet
from .report.__main__ import write_report
from .report.table import load_runs, tables, unfinished
from .sweep.__main__ import build_sweep_parser, plan, run_all

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Texts = Mapping[str, Sequence[str]]  # documents by language
BEGIN, END = "<s>", "</s>"  # ids 0 and 1
SEED = 0
SPREAD = 0.05  # standard deviation of new weights
WARM_UP = 20  # steps
RATE = 6e-3  # peak learning rate; in the second half it falls to a twentieth
DECAY = 0.1  # weight decay of matrices
LANGUAGES = ("uk", "en")
STORIES = Path(__file__).parent / "demo_texts"
MARK = "demo.txt"  # marks the folder of a demo


@dataclass(frozen=True)
class Size:
    """The size of the demo: model, training, and number of runs."""

    vocabulary: int = 1024  # tokens
    window: int = 128  # tokens
    width: int = 96
    inner: int = 256
    blocks: int = 3
    heads: int = 4
    batch: int = 16  # windows per step, half of them in each language
    steps: int = 250
    stories: tuple[int, int] = (500, 25)  # per language, for training and test
    methods: Sequence[str] = ("wanda", "sparsegpt", "admm")
    types: Sequence[str] = ("unstructured", "2:4")
    nsamples: int = 64


def demo(folder: Path, size: Size, debug: bool = False) -> None:
    """Make texts, model, runs and report in `folder`, which is new or that of a demo."""
    import torch

    torch.set_num_threads(1)  # matrices this small gain nothing from more
    if not (folder / MARK).is_file():
        check_new_folder("--folder", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("Made by the demo, which may replace what is here.\n", "utf-8")

    print(f"1. Text: {sum(size.stories)} stories each in {', '.join(LANGUAGES)}")
    texts = {language: write_texts(folder / language, *size.stories) for language in LANGUAGES}

    print(f"2. Model: a tiny LLaMA for both, in {folder / 'model'}", flush=True)
    quiet()
    tokenizer = train_tokenizer(texts, size)
    train(tokenizer, texts, size).save_pretrained(folder / "model")  # the same bytes every time
    tokenizer.save_pretrained(folder / "model")

    tests = [str(folder / language) for language in LANGUAGES]
    flags = ["--models", str(folder / "model"), "--out", str(folder / "runs")]
    flags += ["--methods", *size.methods, "--types", *size.types]
    flags += ["--calibration", *tests, "--eval_data", *tests]
    run_flags = ["--device", "cpu", "--nsamples", str(size.nsamples)]
    print(f"3. Runs:\n   {typed('sweep')} {shlex.join([*flags, '--', *run_flags])}", flush=True)
    runs = plan(build_sweep_parser().parse_args([*flags, *["--debug"] * debug]), run_flags)
    run_all(runs, str(folder / "runs"), lambda: report(folder))
    first = ["--model", str(folder / "model"), "--calibration_data", tests[0]]
    first += ["--prune_method", "wanda", "--sparsity_type", "2:4", "--eval_data", *tests]
    print(f"next: {typed('prune')} {shlex.join(first)}")


def report(folder: Path) -> int:
    """Write the report on all runs, and print its perplexities; return the exit status."""
    place = folder / "runs"
    runs = load_runs([place])
    write_report(runs, unfinished([place]), folder)
    print(
        "4. Perplexity of other stories; `uk by en`: in uk, if en text decided which weights go\n"
    )
    print(*map(by_language, tables(runs)), sep="\n\n")
    print(f"\nwith intervals, KL and pictures: {folder / 'report.md'}")
    return 0


def by_language(table: DataFrame) -> str:
    """Return a row for each method and type, a column for each test and calibration language."""
    keys = ["method", "type", "measured_on", "calibrated_on"]
    figures = table.set_index(keys)["perplexity"].to_dict()
    pairs = [(test, text) for test in LANGUAGES for text in LANGUAGES]
    rows = []
    for method, kind in dict.fromkeys((method, kind) for method, kind, *_ in figures):
        found = [  # the dense model is of no text
            figures.get((method, kind, test, text)) or figures.get((method, kind, test, NONE))
            for test, text in pairs
        ]
        rows.append([method, kind, *(f"{each:.2f}" if each else "" for each in found)])
    return padded_table(["method", "type", *(f"{test} by {text}" for test, text in pairs)], rows, 2)


def write_texts(folder: Path, train: int, test: int) -> list[str]:
    """Write the first stories in the language `folder.name`; return those for training."""
    with gzip.open(STORIES / f"{folder.name}.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = list(file)[: train + test]
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(lines[:train]), "utf-8")
    (folder / "test.jsonl").write_text("".join(lines[train:]), "utf-8")
    return [json.loads(line)["text"] for line in lines[:train]]


def train_tokenizer(texts: Texts, size: Size) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on all texts; as LLaMA's, it puts `<s>` before a text."""
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    bpe, how = ByteLevelBPETokenizer(), dict(special_tokens=[BEGIN, END], show_progress=False)
    documents = chain.from_iterable(texts.values())
    bpe.train_from_iterator(documents, size.vocabulary, min_frequency=0, **how)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, 0)]
    )
    names = dict(bos_token=BEGIN, eos_token=END, model_max_length=size.window)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


def train(tokenizer: PreTrainedTokenizerFast, texts: Texts, size: Size) -> LlamaForCausalLM:
    """Train from scratch on windows of each language in turn; float32, on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        max_position_embeddings=size.window,
        initializer_range=SPREAD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config).train()
    tokenized = [tokenizer(list(each), verbose=False).input_ids for each in texts.values()]
    # all documents of a language as one row of ids (tokens,)
    streams = [torch.tensor(list(chain.from_iterable(ids))) for ids in tokenized]
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    rng = random.Random(SEED)
    with progress(size.steps, "training", "step") as on_progress:
        for step in range(size.steps):
            done = step / size.steps
            rate = RATE * min(1.0, (step + 1) / WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = rate * (1.0 if done < 0.5 else 0.05 + 1.9 * (1 - done))
            windows = []
            for i in range(size.batch):
                stream = streams[i % len(streams)]
                start = rng.randint(0, len(stream) - size.window)
                windows.append(stream[start : start + size.window])
            batch = torch.stack(windows)  # (batch, window)
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            on_progress(1)
    return model.eval()


def main(argv: list[str]) -> None:
    parser = make_parser("demo", __doc__)
    parser.add_argument("--folder", default="demo", help="folder for all files (default: demo)")
    args = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # for the runs
    start = time.perf_counter()
    demo(Path(args.folder), Size(), args.debug)
    print(f"done in {time.perf_counter() - start:.0f} s")
