"""Write a folder for an engine, read it back, and run both."""

from __future__ import annotations

import shlex
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ...formats.registry import EXPORTED
from ...gguf.proof import LINES, SHORT, windows_of
from ...model.checkpoint import Checkpoint, as_user_error, weight_bytes
from ...model.folder import ModelFolder
from ...model.pretrained import window_length
from ...run.card import converted_card
from ...util.errors import UserError
from ...util.files import staged_folder
from ...util.host import available, gib
from ...util.progress import quiet
from .codes import digests, grid_rows, load_transformers
from .engines import ENGINES

LIMIT = 1e-3  # sums in another order differ by 1e-5


def convert(path: str, new: str, to: str) -> None:
    """Write the folder `path` as the folder `new` for an engine. Raises UserError if it differs."""
    quiet()
    engine, source = ENGINES[to], ModelFolder.open(path, "OUT")
    if how := source.quantized_by:
        problem = f"its weights are {'packed' if source.is_packed else f'quantized by {how}'}"
        raise UserError(f"OUT {path}", problem, f"Name a folder of --quantize {EXPORTED}")
    if not (engine.stacks or source.is_plain):
        problem = f"it supports neither the stacked experts nor the (in, out) layers of OUT {path}"
        raise UserError(f"--to {to}", problem, "Use --to mlx, or gguf")
    expected = digests(grid_rows(source))
    by = as_user_error(Checkpoint(path, "OUT"), f"its model in {to}'s code", "Use gguf")
    quieted = redirect_stderr(StringIO()), redirect_stdout(StringIO())
    with staged_folder(new, "NEW") as stage, quieted[0], quieted[1], by:  # silences the engines
        engine.write(source, stage)
        found = digests(engine.stored(stage))
        if wrong := (expected - found).total() + (found - expected).total():
            problem = f"it is not written: {wrong} rows of codes or scales differ"
            raise UserError(f"NEW {new}", problem, "Please report this")
        lines = [f"{found.total():,} rows of codes and scales: 0 differ from the converted model's"]
        lines += run_both(source, engine, stage, new)
        name = shlex.quote(Path(new).name)
        how = f"{engine.how.format(name)}\nhf upload USER/{name} {name}"
        about = dict(what=to, tag=to, kind=EXPORTED, changed=engine.changed)
        card = converted_card(path, how=how, proof=lines, **about)
        (stage / "README.md").write_text(card, "utf-8")
    size = sum(file.stat().st_size for file in Path(new).rglob("*.*") if file.is_file())
    print(*lines, f"written: {new}, {size / 1e6:,.1f} MB, {to}", sep="\n")


def run_both(source: ModelFolder, engine: Any, stage: Path, new: str) -> list[str]:
    """Run OUT and `stage`. Raises UserError if log-probabilities differ beyond the limit."""
    needed = 3 * weight_bytes(source.folder)
    if needed > available():
        what = "predictions and the order of rows"
        return [f"not verified: {what} (comparing them needs {gib(needed)} of memory)"]
    windows = windows_of(source.tokenizer, {"": LINES}, source.config)[""]
    longest = min(SHORT, window_length(source.config, None) - 1)  # onnx wants room for one more
    windows = [ids[:longest] for ids in windows]
    new_logits, tables = engine.load(stage)
    out_logits = load_transformers(source.folder, tables)
    loss = partial(cross_entropy, reduction="none")
    dense, exported = (  # log-probabilities (tokens,)
        -torch.cat([loss(logits(ids.tolist())[:-1].double(), ids[1:]) for ids in windows])
        for logits in (out_logits, new_logits)
    )
    distance = float((exported - dense).norm() / (dense - dense.mean()).norm())
    if not distance <= LIMIT:
        problem = f"log-probabilities differ by {distance:.2g} of their spread, more than {LIMIT}"
        fix = "The engine does not compute this model correctly"
        raise UserError(f"NEW {new}", f"it is not written: {problem}", fix)
    return [
        f"log-probabilities of {len(dense)} tokens differ by {distance:.2g} of their spread, "
        f"by {float((exported - dense).abs().max()):.2g} nats at most",
        f"not run: {engine.not_run}",
    ]
