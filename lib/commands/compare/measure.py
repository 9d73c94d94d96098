"""Run files in llama.cpp: the losses of each on its own tokens, and its predictions beside the
reference's. What is finished is kept, file by file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...gguf.conversion import run_child
from ...gguf.file import GgufFile
from ...gguf.llama import Llama, speeds
from ...gguf.lockstep import Step, lockstep, losses_of, match
from ...gguf.predictions import NOT_CAUSAL, embeds
from ...gguf.vocabulary import TOKENIZER, TOKENS
from ...util.errors import UserError
from ...util.progress import progress
from ...util.statistics import quantiles

PROMPT, STEPS = 128, 48  # tokens by which speed is measured


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
    def opened(self, gpu_layers: int) -> Iterator[Llama]:
        with self.running():
            model = Llama(self.path, gpu_layers)
        with closing(model):
            yield model

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
    passages: Sequence[Passage],
    advance: Callable[[int], None],
) -> tuple[list[list[float]], dict[str, Any] | None]:
    """Return the losses in nats of each file by document, and how far apart two predict.

    A file whose own tokens are not those that are compared runs a second time.
    """
    own = [[file.window(passage) for passage in passages] for file in files]
    begins = [[max(0, len(file.prompt(each)) - 1) for each in passages] for file in files]
    found = match(*(each.file for each in files)) if len(files) > 1 else None
    pairs = {n: found.pair(windows) for n, windows in enumerate(zip(*own, strict=True)) if found}
    pairs, steps = {n: pair for n, pair in pairs.items() if pair}, {}
    rows, side = (found.rows, found.smaller or 0) if pairs else (None, 0)
    for n, step in zip(pairs, lockstep(models, [*pairs.values()], rows), strict=True):
        steps[n] = Step(*(values[..., begins[side][n] :] for values in step))
        advance(1)
    losses = []
    for side, (model, windows) in enumerate(zip(models, own, strict=True)):
        rest = [n for n in range(len(windows)) if n not in pairs or pairs[n][side] != windows[n]]
        sums = {n: float(step.losses[side].sum()) for n, step in steps.items() if n not in rest}
        for n, nats in zip(rest, losses_of(model, [windows[n] for n in rest]), strict=True):
            sums[n] = float(nats[begins[side][n] :].sum())
            advance(int(model is models[-1] and n not in pairs))
        losses.append([sums[n] for n in range(len(windows))])
    return losses, _summary(steps) | {"renormalized": rows is not None} if pairs else None


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
