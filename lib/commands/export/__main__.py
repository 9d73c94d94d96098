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

from importlib.util import find_spec

from ...util.cli import make_parser
from ...util.errors import UserError
from ...util.files import check_new_folder
from .engines import ENGINES


def main(arguments: list[str]) -> None:
    parser = make_parser("export", __doc__)
    parser.add_argument("source", metavar="OUT", help="folder saved with --quantize q4_0")
    parser.add_argument("new", metavar="NEW", help="new folder to write")
    parser.add_argument("--to", required=True, choices=list(ENGINES), help="format of NEW")
    args = parser.parse_args(arguments)
    check_new_folder("NEW", args.new, staged=True)
    try:
        check_installed("--to", args.to)
    except UserError:
        from ...model.folder import ModelFolder
        from .codes import grid_rows

        next(grid_rows(ModelFolder.open(args.source, "OUT")), None)  # raises for any other folder
        raise
    # imports torch, which a wrong flag does not need
    from .convert import convert

    convert(args.source, args.new, args.to)


def check_installed(flag: str, to: str) -> None:
    """Raise UserError if a package is missing that writes or verifies the format of a flag."""
    engine = ENGINES[to]
    if missing := [name for name in engine.packages if find_spec(name) is None]:
        fix = f"Run pip install -r {engine.requirements}"
        raise UserError(f"{flag} {to}", f"{missing[0]} is not installed", fix)
