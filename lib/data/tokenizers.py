"""A tokenizer as it was loaded: its limits, and the texts of its chat templates."""

from __future__ import annotations

import logging
import re
from copy import deepcopy
from functools import cache

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers import PreTrainedTokenizerBase

from ..util.errors import UserError

TEMPLATE = 2**16  # longest accepted chat template, in characters; several times the longest in use
JINJA = Environment(extensions=["jinja2.ext.loopcontrols"])
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag that transformers adds
log = logging.getLogger(__name__)


def keep_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Remember a tokenizer's padding and truncation, which any call of it removes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokenizer.limits = {name: getattr(backend, name, None) for name in ("padding", "truncation")}
    tokenizer("a")


def as_loaded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or a copy of it, with its padding and truncation as loaded."""
    limits = {name: value for name, value in getattr(tokenizer, "limits", {}).items() if value}
    tokenizer = deepcopy(tokenizer) if limits else tokenizer
    for name, value in limits.items():
        getattr(tokenizer.backend_tokenizer, f"enable_{name}")(**value)
    return tokenizer


def template_texts(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Return the literals of the chat templates and their text outside tags.

    A template that is not Jinja counts as one text. Raises UserError for one that is too long.
    """
    templates = tokenizer.chat_template or {}
    templates = {"": templates} if isinstance(templates, str) else templates
    return [text for template in templates.values() for text in _texts(template, name)]


@cache  # cached so that a warning appears once
def _texts(template: str, name: str) -> list[str]:
    if len(template) > TEMPLATE:
        problem = f"its chat template has more than {TEMPLATE} characters"
        raise UserError(name, problem, "Shorten or remove it")
    try:
        literals = list(JINJA.parse(GENERATION.sub("", template)).find_all(nodes.Literal))
    except (TemplateSyntaxError, RecursionError) as error:
        log.warning("%s: its chat template is not Jinja (%s) and stays unchanged", name, error)
        return [template]
    values = (getattr(literal, literal.fields[0]) for literal in literals)
    return [value for value in values if isinstance(value, str)]
