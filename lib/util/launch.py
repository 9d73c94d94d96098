"""What torchrun, accelerate launch and mpirun tell a process of its place among several.

Importing this file imports nothing heavy.
"""

from __future__ import annotations

import os
import time

from lib.util.errors import UserError

TURN_SECONDS = 3


def environment_number(name: str, default: int) -> int:
    """RANK, LOCAL_RANK or WORLD_SIZE, under these names or mpirun's."""
    mpi = {"RANK": "RANK", "LOCAL_RANK": "LOCAL_RANK", "WORLD_SIZE": "SIZE"}[name]
    value = os.environ.get(name) or os.environ.get(f"OMPI_COMM_WORLD_{mpi}")
    return int(value) if value else default


def wait_turn() -> None:
    """Before a process that is not the first tells an error that has not been shared with others.

    Most are the same in all processes; the launcher ends this one when the first has told it.
    """
    if environment_number("RANK", 0) > 0:
        time.sleep(TURN_SECONDS)


def see_launched() -> None:
    """UserError where accelerate was asked for several processes but has started this one alone."""
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if asked and environment_number("WORLD_SIZE", 0) == 0:
        raise UserError(
            "accelerate launch --num_processes: without --multi_gpu it starts one process only; "
            "give --multi_gpu (on CPUs too, with --device cpu), or use torchrun --nproc_per_node"
        )
