"""Run files in llama.cpp: the losses of each on its own tokens, and its predictions beside the
reference's, which runs once for several files. What is finished is kept, text by text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...gguf.conversion import run_child
from ...gguf.file import GgufFile
from ...gguf.llama import PART, Llama, speeds
from ...gguf.lockstep import Step, lockstep, losses_of, match
from ...gguf.predictions import NOT_CAUSAL, embeds
from ...gguf.vocabulary import TOKENIZER, TOKENS
from ...util.errors import UserError
from ...util.host import available
from ...util.progress import progress
from ...util.statistics import quantiles

PROMPT, STEPS = 128, 48  # tokens by which speed is measured
TOGETHER = 8  # files beside the reference, at most


class Passage(NamedTuple):
    """What a file predicts: the `text` after its `prompt`, which only dialogues have."""

    prompt: str
    text: str


Texts = Mapping[str, Sequence[Passage]]  # by name


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
    def opened(self, gpu_layers: int) -> Iterator[None]:
        with self.running():
            self.model = Llama(self.path, gpu_layers)
        with closing(self.model):
            yield

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Those of `Llama`, while the file is opened."""
        with self.running():
            yield from self.model.logits(windows)

    @property
    def memory(self) -> int:
        """Bytes that the file and its logits take; llama.cpp has these twice."""
        return self.file.size + 8 * PART * len(self.file.fields[TOKENS].value)

    @property
    def context(self) -> int:
        """The most tokens of a window."""
        return self.file.value(f"{self.file.architecture}.context_length") or 2**31

    def window(self, passage: Passage) -> list[int]:
        """Return the tokens of a passage; a chat template writes those that begin a text."""
        ids = self.tokenizer.encode("".join(passage)).tolist()
        return ids if passage.prompt else [self.tokenizer.first, *ids]

    def prompt(self, passage: Passage) -> list[int]:
        """Return the tokens of the prompt, whose predictions do not count."""
        return self.tokenizer.encode(passage.prompt).tolist()


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
    """Measure what `record` lacks; `keep` is called after each text."""
    first = next(iter(texts.values()))[0]
    for file in files:  # in a child process, so that a file that aborts llama.cpp is named first
        if file.label not in record["speeds"]:
            options = dict(prompt=file.window(first)[:PROMPT], steps=STEPS, gpu_layers=gpu_layers)
            options |= dict(size=4 * file.file.size, model=str(file.path))
            with file.running():
                record["speeds"][file.label] = run_child(file.what, speeds, **options)
            keep()
    reference, losses = files[0] if record["asked"]["reference"] else None, record["losses"]
    left = {
        text: [each for each in files[bool(reference) :] if text not in losses.get(each.label, ())]
        for text in texts
    }
    unfinished = [each for each in files if any(each in its for its in left.values())]
    total = sum(len(texts[text]) * len(its) for text, its in left.items())
    with ExitStack() as beside, progress(total, "comparing", "passage", delay=1) as advance:
        if reference and unfinished:
            beside.enter_context(reference.opened(gpu_layers))
        for group in _groups(reference, unfinished):
            with ExitStack() as opened:
                for file in group:
                    opened.enter_context(file.opened(gpu_layers))
                for text, passages in texts.items():
                    if not (its := [file for file in group if file in left[text]]):
                        continue
                    every = [reference, *its] if reference else its
                    of_each = [*zip(every, *_run(every, passages, advance), strict=True)]
                    for file, nats, _ in of_each:
                        if not np.isfinite(nats).all():
                            raise file.refused("llama.cpp computes no finite values for it")
                    for file, nats, summary in of_each:
                        losses.setdefault(file.label, {})[text] = nats
                        if summary:
                            record["compared"].setdefault(file.label, {})[text] = summary
                    keep()


def _groups(reference: File | None, files: Sequence[File]) -> list[Sequence[File]]:
    """Return files in the groups that run together: with the reference's tokens, what fits."""
    if not reference:
        return [[file] for file in files]
    found = {file: match(reference.file, file.file) for file in files}
    same = [file for file, its in found.items() if its and its.rows is None]
    groups = [[file] for file in files if file not in same]
    fitting = (available() - reference.memory) // max([file.memory for file in same], default=1)
    size = max(1, min(TOGETHER, fitting))
    return groups + [same[n : n + size] for n in range(0, len(same), size)]


def _run(
    files: Sequence[File], passages: Sequence[Passage], advance: Callable[[int], None]
) -> tuple[list[list[float]], list[dict[str, Any] | None]]:
    """Return the losses in nats of each file by document, and how far it predicts from the first.

    More than two files have the same tokens. One whose own tokens are not those that are compared
    runs a second time.
    """
    own = [[file.window(passage) for passage in passages] for file in files]
    begins = [[max(0, len(file.prompt(each)) - 1) for each in passages] for file in files]
    found = match(*(each.file for each in files[:2])) if len(files) > 1 else None
    pairs = {n: found.pair(each) for n, each in enumerate(zip(*own[:2], strict=True)) if found}
    runs = {n: [pair[0], *pair[1:] * len(files[1:])] for n, pair in pairs.items() if pair}
    rows, side, steps = (found.rows, found.smaller or 0, {}) if runs else (None, 0, {})
    for n, every in zip(runs, lockstep(files, [*runs.values()], rows), strict=True):
        begin = begins[side][n]
        steps[n] = [Step(*(values[..., begin:] for values in step)) for step in every]
        advance(len(every))
    losses = []
    for number, (file, windows) in enumerate(zip(files, own, strict=True)):
        rest = [n for n in range(len(windows)) if n not in runs or runs[n][number] != windows[n]]
        sums = {
            n: float(every[max(0, number - 1)].losses[min(1, number)].sum())
            for n, every in steps.items()
            if n not in rest
        }
        for n, nats in zip(rest, losses_of(file, [windows[n] for n in rest]), strict=True):
            sums[n] = float(nats[begins[number][n] :].sum())
            advance(int(file is files[-1] and n not in runs))
        losses.append([sums[n] for n in range(len(windows))])
    beside = [dict(zip(steps, its, strict=True)) for its in zip(*steps.values(), strict=True)]
    found = [_summary(its) | {"renormalized": rows is not None} for its in beside]
    return losses, [None, *found] if found else [None] * len(files)


def _summary(steps: Mapping[int, Step]) -> dict[str, Any]:
    """Return the figures of a comparison over all tokens, and KL by document."""
    kl, equal, left_out = (
        np.concatenate([getattr(step, name) for step in steps.values()], -1)
        for name in ("kl", "equal", "left_out")
    )
    return {
        "documents": [*steps],
        "tokens": [len(step.kl) for step in steps.values()],
        "kl_by_document": [float(step.kl.mean()) for step in steps.values()],
        "kl": {"mean": float(kl.mean())} | quantiles(kl),
        "equal": float(equal.mean()),
        "left_out": left_out.mean(1).tolist(),
    }
