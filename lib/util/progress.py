"""Progress with time left: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LOG_SECONDS = 30  # between two lines where stderr is not a terminal


@contextmanager
def progress(
    total: int | None, what: str, unit: str, shown: bool = True
) -> Iterator[Callable[..., None]]:
    """A call that is told how many more of `total` are done, shown on stderr.

    Without a `total`, where no end is known, how many are done. It may also be given a short text
    to stand at the bar's end.
    """
    seconds = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        mininterval=seconds,
        maxinterval=seconds,
        smoothing=0.1,
        disable=not shown,
    ) as bar:

        def on_progress(done: int, note: str = "") -> None:
            if note:
                bar.set_postfix_str(note, refresh=False)
            bar.update(done)

        yield on_progress


def quiet() -> None:
    """No bars or advice of other packages between ours; bars of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    for package in ("bitsandbytes", "accelerate"):  # they tell of casts, and of what is offloaded
        logging.getLogger(package).setLevel(logging.ERROR)
    downloads = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # the hub's too
    if downloads:
        enable_progress_bars()
