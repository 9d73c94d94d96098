"""Render dialogues with a model's chat template, and find the text that an assistant has written.

A template is a program that comes with the model. It runs in a child process (render_child.py), one
for all dialogues, which ends if a rendering takes too long.

Many templates write the date. A run has one fixed date, so that its texts do not depend on the
clock: the current one, or that of `set_date`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..util.errors import UserError
from .chats import Dialogue
from .samples import Sample

QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
PARAMETER = {"type": "string", "description": "a"}
PARAMETERS = {"type": "object", "properties": {"a": PARAMETER}, "required": ["a"]}
FUNCTION = {"name": "a", "description": "a", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "a", "arguments": {"a": "a"}}}
RESULT = {"role": "tool", "name": "a", "tool_call_id": CALL["id"], "content": "a"}
EXAMPLES = {  # cover everything that templates write
    "system": [{"role": "system", "content": "a"}, QUESTION, ANSWER],
    "several turns": [QUESTION, ANSWER, QUESTION, ANSWER],
    "thinking": [QUESTION, ANSWER | {"reasoning_content": "a"}],
    "tool call": [QUESTION, ANSWER | {"content": "", "tool_calls": [CALL]}, RESULT, ANSWER],
}
SECONDS = 20.0  # limit for one rendering, which usually takes milliseconds
CLOCK = "strftime_now"  # the function with which templates ask for the date
# every day of a leap year, and a day of each year, cover all words and numbers of dates
DAYS = [str(date(2024, 1, 1) + timedelta(days)) for days in range(366)]
DAYS += [f"{year}-01-01" for year in range(2000, 2100)]
_date = str(date.today())


class Template:
    """A chat template in its child; `name` is the model's. `problem`: the last error."""

    def __init__(self, name: str, template: str, given: str) -> None:
        self.name, self.problem = name, ""
        command = [sys.executable, "-P", str(Path(__file__).with_name("render_child.py"))]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True)
        self.child.stdin.write(json.dumps([template, json.loads(given), SECONDS]) + "\n")
        if self.render([{"role": "user", "content": "Hi"}], True) is None:
            raise self._error(f"fails ({self.problem})")

    def render(
        self,
        messages: list[dict[str, Any]],
        follows: bool = False,
        tools: list[dict[str, Any]] | None = None,
        day: str | None = None,
        **more: bool,
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """Return the text and the assistant's spans in it; None if the template raises an error.

        `follows`: add the generation prompt. `day`: the date, if not the run's. `more`: extra
        template variables.
        """
        line = json.dumps([messages, follows, day or _date, more | {"tools": tools}])
        try:
            self.child.stdin.write(line + "\n")
            self.child.stdin.flush()
            answer = json.loads(self.child.stdout.readline())
        except (BrokenPipeError, ValueError):  # the child has ended
            raise self._error("does not end, or needs more memory than there is") from None
        self.problem = answer.get("error", "")
        return None if self.problem else (answer["text"], answer["spans"])

    def fitted(
        self, messages: list[dict[str, Any]], follows: bool = False, **more: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the result of `render`, or no text if the template rejects the messages.

        If it has no system role, as Gemma's, the system message is put before the first question.
        """
        rendering = self.render(messages, follows, **more)
        if rendering is None and [message["role"] for message in messages[:2]] == [
            "system",
            "user",
        ]:
            words = "\n\n".join(message["content"] for message in messages[:2])
            joined = [messages[1] | {"content": words}, *messages[2:]]
            rendering = self.render(joined, follows, **more)
        return rendering or ("", [])

    def _error(self, problem: str) -> UserError:
        return UserError(
            self.name, f"its chat template {problem}", "Repair it, or add {--no_chat_template}"
        )


_template = cache(Template)


def open_template(name: str, template: str | None, tokens: Mapping[str, Any]) -> Template:
    """Return the chat template of a model `name`, with its special tokens.

    Raises UserError if there is none, or it fails.
    """
    if not template:
        raise UserError(name, "it has no chat template", "Give plain text")
    return _template(name, template, json.dumps(dict(tokens)))


def set_date(day: str) -> None:
    """Set the date, YYYY-MM-DD, that all templates of this process write."""
    global _date
    _date = day


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template asks for the date."""
    return CLOCK in str(tokenizer.chat_template)


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Return the template of a tokenizer. Raises UserError if it has no working one."""
    name = f"{{--model}} {tokenizer.name_or_path}"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            name,
            "its tokenizer has no chat template, which dialogues require",
            "Give plain text, or add {--no_chat_template}",
        ) from None
    return _template(name, template, json.dumps(tokenizer.special_tokens_map))


def examples(
    tokenizer: PreTrainedTokenizerBase, follows: bool
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield kind, messages with tools, and text of the EXAMPLES that the template accepts."""
    for kind, messages in EXAMPLES.items():
        prompt = messages[: -1 if follows else None]
        tools = TOOLS if kind == "tool call" else None
        if rendering := template_of(tokenizer).render(prompt, follows, tools):
            yield kind, {"messages": prompt, "tools": tools}, rendering[0]


def dated_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the EXAMPLES in which the template writes the date, for each of the DAYS."""
    template = template_of(tokenizer)
    for kind, messages in EXAMPLES.items() if writes_date(tokenizer) else ():
        tools = TOOLS if kind == "tool call" else None
        first, second = (template.render(messages[:-1], True, tools, day) for day in DAYS[:2])
        for day in DAYS if first != second else ():
            if rendering := template.render(messages[:-1], True, tools, day):
                yield rendering[0]


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    follows: bool = False,
    **more: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """Return the result of `Template.fitted` with a tokenizer's template."""
    return template_of(tokenizer).fitted(messages, follows, **more)


def prompt_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Return the prompt tokens of an immediate answer, without thinking; [] for no messages."""
    more = dict(enable_thinking=False, tools=tools)
    text = rendered(tokenizer, messages, True, **more)[0] if messages else ""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def document_text(tokenizer: PreTrainedTokenizerBase, document: str | Dialogue) -> str:
    """Return a document's text; "" for a dialogue that the template rejects."""
    if isinstance(document, str):
        return document
    return rendered(tokenizer, document.messages, tools=document.tools)[0]


def sample_of_dialogue(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> Sample:
    """Return a dialogue's tokens; the mask marks those that an assistant has written.

    Answers without text, such as calls of tools that a template leaves out, do not count.
    """
    text, spans = rendered(tokenizer, dialogue.messages, tools=dialogue.tools)
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    if not encoding.is_fast:
        name = f"{{--model}} {tokenizer.name_or_path}"
        problem = "its tokenizer has no tokenizer.json, which dialogues require"
        raise UserError(name, problem, "Name another model, or add {--no_chat_template}")
    starts, ends = torch.tensor(encoding[0].offsets, dtype=torch.long).view(-1, 2).T
    ids, empty = torch.tensor(encoding.input_ids, dtype=torch.long), 0
    mask = torch.zeros(len(starts), dtype=torch.bool)
    for start, end in spans:
        answer = (ends > start) & (starts < end)
        says = bool(tokenizer.decode(ids[answer], skip_special_tokens=True).strip())
        mask |= answer & says
        empty += not says
    return Sample(ids, mask, empty)
