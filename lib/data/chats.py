"""Convert rows of chat datasets, in their common shapes, to dialogues. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LISTS = ("messages", "conversation", "conversations")  # columns that hold messages
PAIRS = (  # columns of a question, and of its answer
    (("prompt",), "completion"),
    (("instruction", "input"), "output"),
    (("instruction", "input"), "response"),
    (("inputs",), "targets"),
)
TOOLS = "tools"  # column of the tools that a model may call, in the form of templates
COLUMNS = {*LISTS, TOOLS, *(name for names, answer in PAIRS for name in (*names, answer))}
ROLES = {name: name for name in ("system", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")  # optional fields of a message


class DialogueError(ValueError):
    """A message that no chat template could render, and how to repair it."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix


@dataclass(frozen=True)
class Dialogue:
    """Messages and tools as a chat template takes them, in JSON; a document like a text."""

    json: str
    tools_json: str = "null"

    @property
    def messages(self) -> list[dict[str, Any]]:
        return json.loads(self.json)

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        return json.loads(self.tools_json)

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """Return the messages before the first answer."""
        messages = self.messages
        roles = [*(message["role"] for message in messages), "assistant"]
        return messages[: roles.index("assistant")]

    def __len__(self) -> int:
        return len(self.json)

    def strip(self) -> Dialogue:
        return self

    def encode(self) -> bytes:
        return f"{self.json}{self.tools_json if self.tools else ''}".encode()


Document = str | Dialogue


def plain_text(document: Document) -> str:
    """Return a document's text; of a dialogue, that of its messages."""
    if isinstance(document, str):
        return document
    return "\n\n".join(message["content"] for message in document.messages)


def dialogue_of(row: Mapping[str, object], column: str) -> Dialogue | None:
    """Return a row's dialogue, or None if a message has no text.

    Raises LookupError for a row without dialogue columns, DialogueError for invalid content.
    """
    for name in (column, *LISTS):
        if isinstance(row.get(name), list):
            return _dialogue(row[name], row.get(TOOLS))
    for names, answer in PAIRS:
        if answer in row and any(name in row for name in names):
            parts = [row[name] for name in (*names, answer) if row.get(name)]
            if any(isinstance(part, list) for part in parts):  # lists of messages
                messages = [message for part in parts for message in part]
                return _dialogue(messages, row.get(TOOLS))
            asked = {"role": "user", "content": "\n\n".join(map(str, parts[:-1]))}
            said = {"role": "assistant", "content": row[answer]}
            return _dialogue([asked, said], row.get(TOOLS))
    raise LookupError


def _dialogue(rows: list[Any], tools: Any) -> Dialogue | None:
    messages, tools = [], _tools(tools)
    for row in rows:
        row = row if isinstance(row, dict) else {}
        role, content = (
            row.get(a) or row.get(b) for a, b in (("role", "from"), ("content", "value"))
        )
        if not isinstance(role, str) or role not in ROLES:
            raise DialogueError(f"the role {role!r} is not one of {', '.join(ROLES)}", "Rename it")
        if isinstance(content, list):  # parts such as text and images
            texts = [part.get("text") or "" if isinstance(part, dict) else None for part in content]
            if not all(isinstance(text, str) for text in texts):
                fix = 'Write a text, or a list of {"type": "text", "text": ...}'
                raise DialogueError(f"the content {str(content)[:80]} is not text", fix)
            content = "".join(texts)
        more = {key: row[key] for key in KEPT if row.get(key)}
        if not (isinstance(content, str) and content.strip()) and "tool_calls" not in more:
            return None
        try:
            (content or "").encode()
        except UnicodeEncodeError:
            raise DialogueError("the text has half of a surrogate pair", "Repair it") from None
        messages.append({"role": ROLES[role], "content": content or ""} | more)
    return Dialogue(json.dumps(messages, ensure_ascii=False), tools) if messages else None


def _tools(value: Any) -> str:
    """Return a row's tools, a list or its JSON, as JSON."""
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
        if value and not all(isinstance(each, dict) for each in list(value)):
            raise ValueError
    except (ValueError, TypeError):
        fix = 'Write a list of {"type": "function", "function": ...}'
        raise DialogueError(f"the tools {str(value)[:80]} are not a list", fix) from None
    return json.dumps(_without_nulls(value) or None, ensure_ascii=False)


def _without_nulls(value: Any) -> Any:
    """Return JSON without the nulls with which a table fills fields that a row lacks."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
