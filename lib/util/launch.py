"""What torchrun and accelerate launch say in the environment of each process.

Importing this file imports nothing heavy.
"""

from __future__ import annotations

import os
import time

from lib.util.errors import UserError

TURN_SECONDS = 3


def environment_number(name: str, default: int) -> int:
    """Read RANK, LOCAL_RANK or WORLD_SIZE from the environment."""
    return int(os.environ.get(name) or default)


def defer_to_rank0() -> None:
    """Wait before another process than the first reports an error.

    Most errors are the same in all processes, or follow from another's; the launcher ends this one
    when the first has reported its own.
    """
    if environment_number("RANK", 0) > 0:
        time.sleep(TURN_SECONDS)


def check_launcher() -> None:
    """Raise UserError where accelerate was asked for several processes but has started only this.

    It then sets MASTER_PORT but no WORLD_SIZE. ACCELERATE_MIXED_PRECISION is documented, and set in
    every process that accelerate starts.
    """
    names = "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"
    if all(name in os.environ for name in names) and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --num_processes: without --multi_gpu it starts one process only; "
            "give --multi_gpu (on CPUs too, with --device cpu), or use torchrun --nproc_per_node"
        )
