"""Progress with time left: a bar on a terminal, occasional lines in a log.

`on_step` sees every step of a run, so that a test can make it fail there.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

from tqdm import tqdm

LOG_SECONDS = 30  # between two lines if stderr is not a terminal


def on_step(name: str, number: int) -> None:
    """Do nothing; called when a step begins (0), and each time that it advances (1, 2, ...)."""


@contextmanager
def progress(
    total: int | None, what: str, unit: str, shown: bool = True, step: str = "", delay: float = 0
) -> Iterator[Callable[..., None]]:
    """Yield a function that advances a progress bar on stderr by a number of units.

    `total` is None if the end is not known: the bar shows the time alone. The function also takes a
    short note, which is printed at the end of the bar. With 0 units it shows that time passes.
    `on_step` gets the name `step`, by default `what`. A terminal shows the bar after `delay`
    seconds.
    """
    in_log = not sys.stderr.isatty()
    numbers, step, scaled = count(), step or what, unit == "B"
    seconds = LOG_SECONDS if in_log else 0.1
    with tqdm(
        total=total,
        desc=what,
        unit=unit if scaled else f" {unit}",
        unit_scale=scaled,
        mininterval=seconds,
        maxinterval=seconds,
        delay=max(delay, seconds if in_log else 0),
        **({"ncols": 0} if in_log else _size()),
        file=_Lines() if in_log else None,
        smoothing=0.1,
        bar_format="{desc}: {elapsed}" if total is None else None,
        disable=not shown,
    ) as bar:

        def on_progress(done: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            on_step(step, next(numbers))
            if done:
                bar.update(done)
            elif shown and time.time() - max(bar.last_print_t, bar.start_t + delay) >= seconds:
                bar.last_print_t = time.time()
                bar.refresh()

        on_step(step, next(numbers))
        yield on_progress


def _size() -> dict[str, int]:
    """Return the size of a bar, {} for that of the terminal: some do not know their own."""
    with suppress(OSError):
        if not os.get_terminal_size(sys.stderr.fileno()).columns:
            return {"ncols": 80, "nrows": 24}
    return {}


class _Lines:
    """A log, which gets lines instead of a bar that overwrites itself."""

    last = ""

    def write(self, text: str) -> None:
        if text.strip() and text.strip() != self.last:
            self.last = text.strip()
            print(self.last, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def quiet() -> None:
    """Silence the bars and hints of other packages, except the bars of downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    for package in ("bitsandbytes", "accelerate"):  # they report casts and offloaded modules
        logging.getLogger(package).setLevel(logging.ERROR)
    downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # also the Hub's bars
    if downloads:
        enable_progress_bars()
