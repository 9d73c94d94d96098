"""What torchrun and accelerate launch tell a process of its place among several.

Importing this file imports nothing heavy.
"""

from __future__ import annotations

import os
import time

from lib.util.errors import UserError

TURN_SECONDS = 3


def environment_number(name: str, default: int) -> int:
    """RANK, LOCAL_RANK or WORLD_SIZE."""
    return int(os.environ.get(name) or default)


def defer_to_rank0() -> None:
    """Before a process that is not the first tells an error.

    Most are the same in all processes, or follow from another's; the launcher ends this one when
    the first has told it.
    """
    if environment_number("RANK", 0) > 0:
        time.sleep(TURN_SECONDS)


def check_launcher() -> None:
    """UserError where accelerate was asked for several processes but has started this one alone.

    It then says where they meet, as torch wants to know it, but not how many there are. The other
    name is the one that accelerate documents for its Accelerator and sets in all it starts.
    """
    names = "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"
    if all(name in os.environ for name in names) and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch --num_processes: without --multi_gpu it starts one process only; "
            "give --multi_gpu (on CPUs too, with --device cpu), or use torchrun --nproc_per_node"
        )
