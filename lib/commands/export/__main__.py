"""Write a folder of --quantize q4_0 for vLLM, MLX or ONNX Runtime, and verify it.
For users of one of these engines; llama.cpp has `gguf`.

    bash launch.sh export OUT NEW --to compressed-tensors | mlx | onnx

OUT is a folder that main.py has saved with --quantize q4_0. All codes and scales are read back from
NEW and compared row by row, in any order, since engines reorder and join linear layers. The order
is verified by predictions: the engine runs NEW, and transformers runs OUT. At the first difference
the command stops and writes no NEW. If memory is too short to run both, NEW is written, and a line
reports the missing check.
"""

from __future__ import annotations

import shlex
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from ...model.access import Checkpoint, as_user_error, weight_bytes
from ...run.card import converted_card
from ...util.command import make_parser
from ...util.errors import UserError
from ...util.files import check_new_folder, staged_folder
from ...util.host import available, gib
from ...util.progress import quiet
from ..gguf.verify import LINES, SHORT, windows_of
from .engines import ENGINES, GridFolder, digests, load_transformers, open_folder

LIMIT = 1e-3  # sums in another order differ by 1e-5


def main(arguments: list[str]) -> None:
    """Write the folder OUT as the folder NEW for an engine, and verify it.

    Raises UserError, and leaves no folder, if it cannot be written or differs.
    """
    parser = make_parser("export", __doc__)
    parser.add_argument("source", metavar="OUT", help="folder saved with --quantize q4_0")
    parser.add_argument("new", metavar="NEW", help="new folder to write")
    parser.add_argument("--to", required=True, choices=list(ENGINES), help="format of NEW")
    args = parser.parse_args(arguments)
    quiet()
    path, new, to = args.source, args.new, args.to
    engine = ENGINES[to]
    check_new_folder("NEW", new, staged=True)
    check_installed(to)
    source = open_folder(path)
    if not (engine.stacks or source.plain):
        raise UserError(
            f"--to {to}: it supports neither the stacked experts nor the (in, out) layers of OUT "
            f"{path}. Use --to mlx, or gguf."
        )
    expected = digests(source.rows())
    by = as_user_error(Checkpoint(path, "OUT"), f"its model in {to}'s code", "Use gguf")
    quieted = redirect_stderr(StringIO()), redirect_stdout(StringIO())
    with staged_folder(new, "NEW") as stage, quieted[0], quieted[1], by:  # silences the engines
        engine.write(source, stage)
        found = digests(engine.stored(stage))
        if wrong := (expected - found).total() + (found - expected).total():
            problem = f"it is not written: {wrong} rows of codes or scales differ"
            raise UserError(f"NEW {new}: {problem}. Please report this.")
        lines = [f"{found.total():,} rows of codes and scales: 0 differ from the converted model's"]
        lines += verify(source, engine, stage, new)
        name = shlex.quote(Path(new).name)
        how = f"{engine.how.format(name)}\nhf upload USER/{name} {name}"
        about = dict(what=to, tag=to, kind="q4_0", changed=engine.changed)
        card = converted_card(path, how=how, proof=lines, **about)
        (stage / "README.md").write_text(card, "utf-8")
    size = sum(file.stat().st_size for file in Path(new).rglob("*.*") if file.is_file())
    print(*lines, f"written: {new}, {gib(size)}, {to}", sep="\n")


def check_installed(to: str) -> None:
    """Raise UserError if a package is missing that writes or verifies a format."""
    engine = ENGINES[to]
    if missing := [name for name in engine.packages if find_spec(name) is None]:
        problem = f"{missing[0]} is not installed"
        raise UserError(f"--to {to}: {problem}. Run pip install -r {engine.requirements}.")


def verify(source: GridFolder, engine: type, stage: Path, new: str) -> list[str]:
    """Run OUT and `stage`. Raises UserError if log-probabilities differ beyond the limit."""
    needed = 3 * weight_bytes(source.folder)
    if needed > available():
        what = "predictions and the order of rows"
        return [f"not verified: {what} (comparing them needs {gib(needed)} of memory)"]
    windows = windows_of(source.tokenizer, {"": LINES}, source.model.config)[""]
    windows = [ids[:SHORT] for ids in windows]
    new_logits, tables = engine.load(stage)
    out_logits, _ = load_transformers(source.folder, tables)
    loss = partial(cross_entropy, reduction="none")
    dense, exported = (  # log-probabilities (tokens,)
        -torch.cat([loss(logits(ids.tolist())[:-1].double(), ids[1:]) for ids in windows])
        for logits in (out_logits, new_logits)
    )
    distance = float((exported - dense).norm() / (dense - dense.mean()).norm())
    if not distance <= LIMIT:
        raise UserError(
            f"NEW {new}: it is not written: log-probabilities differ by {distance:.2g} of their "
            f"spread, more than {LIMIT}. The engine does not compute this model correctly."
        )
    return [
        f"log-probabilities of {len(dense)} tokens differ by {distance:.2g} of their spread, "
        f"by {float((exported - dense).abs().max()):.2g} nats at most",
        f"not run: {engine.not_run}",
    ]
