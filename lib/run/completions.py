"""Continue prompts with the dense and the pruned model, for comparison by eye.

Prompts are beginnings of test documents, and the prompts of test dialogues. Decoding is greedy, so
that a model always writes the same text. The model and its generation settings stay unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from ..data.languages import is_in, script_of, words_of
from ..data.templates import prompt_of
from ..model.blocks import BlockRunner
from ..model.pretrained import window_length
from ..util.errors import first_line
from .run import Run

NEW_TOKENS = 40  # generated after each prompt
ANSWER_TOKENS = 256  # limit of an answer to a dialogue's prompt
CACHED_TOKENS = 16_384  # of all rows that are continued at a time
KNOWN_WINDOWS = 512  # their words count as known
REPLACEMENT = "\ufffd"  # tokenizers decode a partial character to it


class Completions:
    """Continues or, of dialogues, answers `--completions` prompts of every test set.

    One model follows another. Every rank generates all texts, so that none waits for another. If a
    model cannot generate, one line says why, and the run continues without completions.
    """

    def __init__(self, run: Run, runner: BlockRunner) -> None:
        self.run = run
        # beginnings, and prompts of dialogues: test, text, tokens
        self.prompts: list[tuple[str, str, list[int]]] = []
        self.asked: list[tuple[str, str, list[int]]] = []
        self.new_ids: dict[str, list[list[int]]] = {}  # continuations of all, by model name
        window = window_length(run.model.config, None)
        for test in run.windows.tests if run.flags.completions else ():
            prompts = [(decode(run.model.tokenizer, ids), ids.tolist()) for ids in test.prompts]
            self.prompts += [(test.name, *prompt) for prompt in prompts]
            for dialogue in test.dialogues:
                ids = prompt_of(run.model.tokenizer, dialogue.prompt, dialogue.tools)
                if 0 < len(ids) < window - NEW_TOKENS:
                    self.asked.append((test.name, dialogue.prompt[-1]["content"], ids))
        longest = max((len(ids) for *_, ids in self.asked), default=0)
        self.limit = min(ANSWER_TOKENS, window - longest)
        if (self.prompts or self.asked) and not runner.weights.zero_copy:
            self._skip(f"each of {NEW_TOKENS} tokens would fetch every block again")

    def generate(self, name: str, model: nn.Module) -> None:
        """Continue every prompt with `model`; `name` is `dense`, or `model` for the pruned one."""
        run, new_ids, batches = self.run, [], []
        window = window_length(run.model.config, None)
        for prompts, tokens in ((self.prompts, NEW_TOKENS), (self.asked, self.limit)):
            longest = max((len(ids) for *_, ids in prompts), default=0)
            tokens = min(tokens, window - longest)
            step = max(1, CACHED_TOKENS // (longest + tokens))
            for start in range(0, len(prompts), step):
                batches.append(([ids for *_, ids in prompts[start : start + step]], tokens))
        total = sum(tokens for _, tokens in batches)
        shown = "completing" if total else ""
        try:
            with run.timed("completions", shown, total, "token") as bar:
                for batch, tokens in batches:
                    made = count()
                    new_ids += continue_greedily(
                        model, batch, tokens, lambda token, made=made: (next(made), bar(token))
                    )
                    bar(tokens - next(made))  # the others are not generated, as all have ended
        except Exception as error:  # any model's code may fail; the pruned model must be saved
            self._skip(f"{type(model).__name__} cannot generate ({first_line(error)})")
        else:
            self.new_ids[name] = new_ids

    def answers(self) -> list[dict[str, Any]]:
        """Return a record of each test set of dialogues: how many answers end, and more."""
        run, records = self.run, []
        read = (run.windows.training and run.windows.training.windows, run.windows.calibration)
        read = [each for each in read if each is not None]
        for test in run.windows.tests:
            places = [place for place, (name, *_) in enumerate(self.asked) if name == test.name]
            if not (places and self.new_ids):
                continue
            windows = [each.ids[:KNOWN_WINDOWS] for each in (*read, test.windows)]
            text = "\n".join(decode(run.model.tokenizer, ids) for each in windows for ids in each)
            written, known = script_of(text), set(words_of(text))
            record = {"test": test.name, "prompts": len(places), "limit": self.limit}
            for name, new_ids in self.new_ids.items():
                answers = [new_ids[len(self.prompts) + place] for place in places]
                texts = [decode(run.model.tokenizer, ids) for ids in answers]
                record[name] = {
                    "ended": sum(len(ids) < self.limit for ids in answers),
                    "in_language": sum(is_in(written, known, text) for text in texts),
                    "tokens": sum(map(len, answers)) / len(answers),
                }
            records.append(record)
        return records

    def records(self) -> list[dict[str, str]]:
        """Return one record for each prompt: `test`, `prompt`, and each model's completion."""
        return [
            {"test": test, "prompt": prompt}
            | {
                name: decode_completion(self.run.model.tokenizer, ids, new_ids[index])
                for name, new_ids in self.new_ids.items()
            }
            for index, (test, prompt, ids) in enumerate([*self.prompts, *self.asked])
        ]

    def _skip(self, reason: str) -> None:
        self.prompts, self.asked = [], []
        self.run.print(f"completions: none, {reason}")


def continue_rows(
    model: nn.Module,
    prompts: Sequence[Tensor | list[int]],
    tokens: int,
    on_token: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """Return the continuation of each prompt, ids (tokens,), by the model's generation settings.

    Each has at most `tokens` ids, cut before the first EOS. Shorter prompts are padded on the left.
    `on_token` is called with 1 after each token of all.
    """

    def go_on(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        on_token(1)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    rows = [torch.as_tensor(ids).flip(0) for ids in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=-1).flip(1).to(model.device)
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    output = model.generate(
        input_ids=ids.clamp(min=0),
        attention_mask=(ids >= 0).long(),
        max_new_tokens=tokens,
        stopping_criteria=StoppingCriteriaList([go_on]),
        **({"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {}),
    )
    rows = output[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, id in enumerate(row) if id in ends), None)] for row in rows]


def continue_greedily(
    model: nn.Module,
    prompts: Sequence[Tensor | list[int]],
    tokens: int,
    on_token: Callable[[int], None] = lambda tokens: None,
) -> list[list[int]]:
    """As `continue_rows`, but greedy: settings such as penalties do not apply."""
    ends = model.generation_config.eos_token_id
    settings = GenerationConfig(eos_token_id=ends, do_sample=False)
    with mock.patch.object(model, "generation_config", settings):
        return continue_rows(model, prompts, tokens, on_token)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[int]) -> str:
    """Return the text of ids (tokens,), without special tokens or a partial last character."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip(REPLACEMENT)


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_ids: list[int]
) -> str:
    """Return the text that `new_ids` add to that of `prompt`.

    Both are decoded together: some tokenizers drop a space before the first token, and a character
    may begin in `prompt` and end in `new_ids`.
    """
    prompt_text, text = decode(tokenizer, prompt), decode(tokenizer, [*prompt, *new_ids])
    if text.startswith(prompt_text):
        return text.removeprefix(prompt_text)
    return decode(tokenizer, new_ids)
