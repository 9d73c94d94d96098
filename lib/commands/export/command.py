"""Write a folder of --quantize q4_0 in the format of another engine, and prove that both agree.

bash launch.sh export OUT NEW --to compressed-tensors | mlx | onnx

OUT is a folder that main.py has saved with --quantize q4_0. No code and no scale changes: all are
read back from NEW and compared. Then the engine runs NEW, where it is installed, beside
transformers with OUT. At the first difference the command stops, and there is no NEW.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from lib.commands.export.engines import ENGINES, Loaded, load_transformers
from lib.commands.export.source import GridFolder, digests, open_folder
from lib.commands.gguf.proof import LINES, windows_of
from lib.run.card import export_card
from lib.util.command import Parser, add_debug_flag
from lib.util.errors import UserError
from lib.util.files import staged_folder
from lib.util.host import available, gib
from lib.util.progress import quiet

PROMPT = 8  # tokens


def main(arguments: list[str]) -> None:
    parser = Parser("export", description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="OUT", help="folder saved with --quantize q4_0")
    parser.add_argument("new", metavar="NEW", help="new folder to write")
    parser.add_argument("--to", required=True, choices=list(ENGINES), help="format of NEW")
    add_debug_flag(parser)
    args = parser.parse_args(arguments)
    quiet()
    export(args.source, args.new, args.to)


def export(path: str, new: str, to: str) -> None:
    """Write the folder `path` as the folder `new` for an engine, prove it, print and write a card.

    Raises UserError, and leaves no folder, where it can't be written or differs.
    """
    engine = ENGINES[to]
    if Path(new).exists():
        raise UserError(f"NEW {new}: exists; name a new folder")
    if missing := [name for name in engine.packages if find_spec(name) is None]:
        raise UserError(
            f"--to {to}: {missing[0]} is not installed; pip install -r {engine.requirements}"
        )
    source = open_folder(path)
    if lacking := engine.lacks(source):
        raise UserError(f"--to {to}: has no {lacking}, which OUT {path} is; use launch.sh gguf")
    source.check_grid()
    with staged_folder(new, "NEW") as stage, redirect_stderr(StringIO()):  # of engines' bars
        engine.write(source, stage)
        lines = [compare(source, engine, stage, new), *prove(source, engine, stage, new)]
        print(*lines, sep="\n", flush=True)
        (stage / "README.md").write_text(export_card(path, Path(new), to, engine, lines), "utf-8")
    size = sum(file.stat().st_size for file in Path(new).rglob("*") if file.is_file())
    print(f"written: {new}, {gib(size)}, {to}")


def compare(source: GridFolder, engine: type, stage: Path, new: str) -> str:
    """Compare all codes and scales, by row. Raises UserError where one differs."""
    found: Counter[bytes] = Counter()
    for codes, scales in engine.stored(stage):
        found += digests(codes, scales)
    if found != source.rows:
        count = max((source.rows - found).total(), (found - source.rows).total())
        raise UserError(f"NEW {new}: not written, {count} rows of codes and scales differ")
    return f"codes and scales: all {found.total():,} rows of {len(source.linears)} linears are OUT's"


def prove(source: GridFolder, engine: type, stage: Path, new: str) -> list[str]:
    """Run both folders. Raises UserError where log-probabilities differ by more than the limit."""
    needed = 3 * sum(file.stat().st_size for file in source.folder.glob("*.safetensors"))
    if needed > available():
        return [f"not proven: predictions (comparing them needs {gib(needed)} of memory)"]
    tokens = [source.tokenizer(line).input_ids for line in LINES]
    windows = windows_of(source.tokenizer, {"lines": LINES}, source.config)["lines"]
    results = [
        predictions(loaded, windows, [ids[:PROMPT] for ids in tokens])
        for loaded in (load_transformers(source.folder, engine.dtype), engine.load(stage))
    ]
    (dense, texts, _), (own, others, speed) = results
    distance = float((own - dense).norm() / (dense - dense.mean()).norm())
    if not distance <= engine.limit:
        raise UserError(
            f"NEW {new}: not written, predictions differ by {distance:.2g}, more than "
            f"{engine.limit}: the engine computes this model otherwise"
        )
    pairs = zip(texts, others, strict=True)
    same = sum(all(a == b for a, b in zip(*pair, strict=False)) for pair in pairs)
    return [
        f"log-probabilities of {len(own)} tokens in two windows differ by {distance:.2g}, at most "
        f"{float((own - dense).abs().max()):.2g} nats",
        f"greedy completions: {same} of {len(texts)} are the same, {speed:.0f} tokens a second",
        f"not run: {engine.not_run}",
    ]


def predictions(
    loaded: Loaded, windows: list[Tensor], prompts: list[list[int]]
) -> tuple[Tensor, list[list[int]], float]:
    """Log-probabilities of the windows' tokens, what follows prompts, and tokens a second."""
    logits, complete = loaded
    parts = [
        logits(window.tolist())[:-1].double().log_softmax(-1).gather(1, window[1:, None])
        for window in windows
    ]
    start = time.perf_counter()
    texts = [complete(prompt) for prompt in prompts]
    speed = sum(map(len, texts)) / (time.perf_counter() - start)
    return torch.cat(parts)[:, 0], texts, speed
