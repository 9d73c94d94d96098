"""main.py for a comparison that users have no need of: linears are packed without any zero in them.

    python tests/bench/pack_dense.py BITS --model DENSE --replace_sparse_layers --pack_bits 4 ...

What it gives is a dense model rounded by this project's own code, at 8, 4 or 3 bits. There is no
form for 3 bits: they are the integers -4 to 3 in the form for 4 (`--pack_bits 4`). To train one on
its grid, let main.py prune next to nothing: `--prune_method magnitude --sparsity_ratio 0.00001`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import lib.packed.grid
import lib.run.flag_checks
import lib.sparse
import main as command_line
from lib.util.command import run


def pack_dense(bits: int) -> None:
    """Change the rules of this process."""
    lib.sparse.is_smaller_packed = lambda matrix: True
    lib.run.flag_checks.FEWEST_ZEROS = 0
    if bits == 3:
        lowest, highest = -4, 3
        lib.packed.grid.LIMITS[4] = lowest, highest
        lib.packed.grid.LOWEST = lib.sparse.LOWEST = lowest
        lib.packed.grid.HIGHEST = lib.sparse.HIGHEST = highest


if __name__ == "__main__":
    pack_dense(int(sys.argv.pop(1)))
    sys.exit(run(command_line.main))
