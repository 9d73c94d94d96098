"""Beginnings of test documents, continued greedily by the dense and by the pruned model.

Decoding is greedy, so that a model always gives the same text. The model and its generation
settings stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lib.model.blocks import BlockRunner
from lib.model.pretrained import window_length
from lib.run.job import Job
from lib.util.errors import first_line

NEW_TOKENS = 40  # generated after each prompt
REPLACEMENT = "\ufffd"  # tokenizers decode half a character to it


class Completions:
    """Continues the prompts of every test set, `--prompts` of each, by one model after another.

    Every rank of a job generates all of them, so that none waits for another. If a model can't
    generate, one line says why and the run continues without completions.
    """

    def __init__(self, job: Job, runner: BlockRunner) -> None:
        self.job = job
        self.texts: dict[str, list[str]] = {}  # {"dense" or "model": one text for each prompt}
        self.prompts = [
            (test.name, ids) for test in job.texts.tests for ids in test.prompts if job.args.prompts
        ]
        if self.prompts and not runner.weights.zero_copy:
            self._skip(f"each of {NEW_TOKENS} tokens would fetch every block again")

    def generate(self, name: str, model: nn.Module) -> None:
        """Continue every prompt by `model`; `name`: `dense`, or `model` for the pruned one."""
        if not self.prompts:
            return
        job = self.job
        prompts = torch.stack([ids for _, ids in self.prompts])  # (prompts, tokens)
        tokens = min(NEW_TOKENS, window_length(job.config, None) - prompts.shape[1])
        batch_size = max(1, job.batch_size * job.seqlen // (prompts.shape[1] + tokens))
        new_ids = []
        try:
            with job.timed("completions"):
                for batch in prompts.split(batch_size):
                    new_ids += continue_greedily(model, batch.to(job.device), tokens)
        except Exception as error:  # raised by any model's own code; the pruned model must be saved
            self._skip(f"{type(model).__name__} can't generate ({first_line(error)})")
        else:
            pairs = zip(prompts.tolist(), new_ids, strict=True)
            self.texts[name] = [decode_completion(job.tokenizer, *pair) for pair in pairs]

    def records(self) -> list[dict[str, str]]:
        """Return one record for each prompt: `test`, `prompt`, and each model's completion."""
        return [
            {"test": test, "prompt": decode(self.job.tokenizer, ids)}
            | {name: texts[index] for name, texts in self.texts.items()}
            for index, (test, ids) in enumerate(self.prompts)
        ]

    def _skip(self, reason: str) -> None:
        self.prompts = []
        self.job.print(f"completions: none, {reason}")


def continue_greedily(model: nn.Module, ids: Tensor, tokens: int) -> list[list[int]]:
    """Return up to `tokens` ids that continue each row of `ids` (n, tokens) greedily.

    The model's own generation settings (penalties, temperature) do not apply.
    """
    settings = model.generation_config
    ends = settings.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    model.generation_config = GenerationConfig()
    try:
        options = {"eos_token_id": ends, "pad_token_id": ends[0]} if ends else {}
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            **options,
        )
    finally:
        model.generation_config = settings
    rows = output[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, id in enumerate(row) if id in ends), None)] for row in rows]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Tensor | list[int]) -> str:
    """Return the text of ids (tokens,), without special tokens or half a character at its end."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip(REPLACEMENT)


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], new_ids: list[int]
) -> str:
    """Return what `new_ids` add to the text of `prompt`.

    Both are decoded together: some tokenizers drop a blank before a first token, and a character
    may begin in `prompt` and end in `new_ids`.
    """
    prompt_text, text = decode(tokenizer, prompt), decode(tokenizer, [*prompt, *new_ids])
    if text.startswith(prompt_text):
        return text.removeprefix(prompt_text)
    return decode(tokenizer, new_ids)
