"""Run files in llama.cpp: the losses of each on its own tokens, and its predictions beside the
reference's. What is finished is kept, file by file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...gguf.conversion import run_child
from ...gguf.file import GgufFile
from ...gguf.llama import Llama, speeds
from ...gguf.lockstep import lockstep, losses_of, match
from ...gguf.predictions import NOT_CAUSAL, embeds
from ...gguf.vocabulary import TOKENIZER, TOKENS
from ...util.errors import UserError
from ...util.progress import progress

PROMPT, STEPS = 128, 48  # tokens by which speed is measured
SUMMARY: dict[str, Callable[[np.ndarray], float]] = {
    "mean": np.mean,
    "median": np.median,
    "99%": partial(np.quantile, q=0.99),
    "99.9%": partial(np.quantile, q=0.999),
    "largest": np.max,
}
Texts = Mapping[str, Sequence[str]]  # passages by name


class File:
    """A file that is compared. Raises UserError if llama.cpp does not read it, or for embedders."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label, self.what = path, label, f"FILE {path}"
        self.file = GgufFile(path, self.what)
        if TOKENS not in self.file.fields:
            raise self.refused("it holds no tokenizer, so it is no language model")
        if embeds(self.file) or self.file.value(f"{TOKENIZER}model") in NOT_CAUSAL:
            raise self.refused("it embeds texts, and predicts no next token")
        with self.running():
            self.tokenizer = Llama(path, tokenizer_alone=True)

    def refused(self, problem: str) -> UserError:
        return UserError(self.what, problem, "Leave it out")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Convert what llama.cpp says of the file."""
        try:
            yield
        except ValueError as error:
            raise self.refused(getattr(error, "problem", str(error))) from error

    @contextmanager
    def opened(self, gpu_layers: int) -> Iterator[Llama]:
        with self.running():
            model = Llama(self.path, gpu_layers)
        with closing(model):
            yield model

    @property
    def context(self) -> int:
        """The most tokens of a window."""
        return self.file.value(f"{self.file.architecture}.context_length") or 2**31

    def window(self, text: str) -> list[int]:
        return [self.tokenizer.first, *self.tokenizer.encode(text).tolist()]


def open_files(names: Sequence[str]) -> list[File]:
    """Return the files, named by their stems, or by their paths where two stems are equal."""
    paths = [*map(Path, names)]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UserError(f"FILE {twice[0]}", "it is named twice", "Name it once")
    stems = [path.stem for path in paths]
    labels = [p.stem if stems.count(p.stem) == 1 else str(p) for p in paths]
    return [*map(File, paths, labels)]


def measure(
    record: dict[str, Any],
    files: Sequence[File],
    texts: Texts,
    gpu_layers: int,
    keep: Callable[[], None],
) -> None:
    """Measure what `record` lacks, with at most two files open; `keep` is called after each."""
    first = next(iter(texts.values()))[0]
    for file in files:  # in a child process, so that a file that aborts llama.cpp is named first
        if file.label not in record["speeds"]:
            options = dict(prompt=file.window(first)[:PROMPT], steps=STEPS, gpu_layers=gpu_layers)
            options |= dict(size=4 * file.file.size, model=str(file.path))
            with file.running():
                record["speeds"][file.label] = run_child(file.what, speeds, **options)
            keep()
    reference = files[0] if record["asked"]["reference"] else None
    losses, beside = record["losses"], nullcontext()
    left = [each for each in files[bool(reference) :] if each.label not in losses]
    if reference and left:
        beside = reference.opened(gpu_layers)
    total = len(left) * sum(map(len, texts.values()))
    with beside as model, progress(total, "comparing", "passage", delay=1) as advance:
        for file in left:
            found, pair = {}, [reference, file] if reference else [file]
            with file.opened(gpu_layers) as other, file.running():
                models = [model, other] if reference else [other]
                for text, passages in texts.items():
                    found[text] = _run(pair, models, passages, advance)
            for text, (of_pair, compared) in found.items():
                for each, values in zip(pair, of_pair, strict=True):
                    if not np.isfinite(values).all():
                        raise each.refused("llama.cpp computes no finite values for it")
                    losses.setdefault(each.label, {})[text] = values
                if compared:
                    record["compared"].setdefault(file.label, {})[text] = compared
            keep()


def _run(
    files: Sequence[File],
    models: Sequence[Llama],
    passages: Sequence[str],
    advance: Callable[[int], None],
) -> tuple[list[list[float]], dict[str, Any] | None]:
    """Return the losses in nats of each file by document, and how far apart two predict.

    A file whose own tokens are not those that are compared runs a second time.
    """
    own = [[file.window(passage) for passage in passages] for file in files]
    found = match(*(each.file for each in files)) if len(files) > 1 else None
    pairs = {n: found.pair(windows) for n, windows in enumerate(zip(*own, strict=True)) if found}
    pairs = {n: pair for n, pair in pairs.items() if pair}
    numbers, steps = [*pairs], {n: [] for n in pairs}
    for at, step in lockstep(models, [*pairs.values()], found.rows) if pairs else ():
        steps[numbers[at]].append(step)
        advance(1)
    losses = []
    for side, (model, windows) in enumerate(zip(models, own, strict=True)):
        same = {n for n in pairs if pairs[n][side] == windows[n]}
        rest = [n for n in range(len(windows)) if n not in same]
        sums = {n: sum(float(step.losses[side].sum()) for step in steps[n]) for n in same}
        for at, nats in losses_of(model, [windows[n] for n in rest]):
            sums[rest[at]] = sums.get(rest[at], 0.0) + float(nats.sum())
            advance(int(model is models[-1] and rest[at] not in pairs))
        losses.append([sums[n] for n in range(len(windows))])
    return losses, _summary(steps) | {"renormalized": found.rows is not None} if pairs else None


def _summary(steps: Mapping[int, Sequence[Any]]) -> dict[str, Any]:
    """Return the figures of a comparison over all tokens, and KL by document."""
    kl = {number: np.concatenate([step.kl for step in of]) for number, of in steps.items()}
    flat, every = [step for of in steps.values() for step in of], np.concatenate([*kl.values()])
    return {
        "documents": [*kl],
        "tokens": [*map(len, kl.values())],
        "kl_by_document": [float(values.mean()) for values in kl.values()],
        "kl": {name: float(of(every)) for name, of in SUMMARY.items()},
        "equal": float(np.concatenate([step.equal for step in flat]).mean()),
        "left_out": np.concatenate([step.left_out for step in flat], 1).mean(1).tolist(),
    }
