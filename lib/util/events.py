"""What a run is doing, for programs that follow it or end it at a certain moment.

    with listening(lambda event, number: print(event, number)):
        main.main(argv)

prints `weights of MODEL 0` when weights are read, `step load 0` when a step begins (by the names of
`seconds` in results.json), `pruning 0` when the blocks begin, `pruning 1` after the first of them,
`solve NAMES 0` where linears that share an input are solved, `pack 0`, `tokenizer.model 0`,
`card 0`, `recovery.png 0` and `summary 0` before these are made, and in a sweep `run NAME 0` for
each run. A listener that raises an error makes the run fail there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int], None]
listeners: list[Listener] = []


def emit(event: str, number: int = 0) -> None:
    """Tell every listener."""
    for listener in listeners:
        listener(event, number)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `listener` is called with each event and its number."""
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)
