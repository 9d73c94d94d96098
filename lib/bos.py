"""Whether a window should begin with the tokenizer's BOS token.

The published protocol cuts windows out of running text, which most models take in their stride.
Some (Gemma) collapse without the token. `--bos auto` therefore asks two things: does the tokenizer
put BOS before a text by itself, and is the dense model much worse on a few windows without it?
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib.errors import UserError
from lib.eval import perplexity
from lib.sweep import Sweep

TRIED_WINDOWS, TRIED_TOKENS = 4, 256
COLLAPSE = 1.5  # perplexity without BOS over that with it, from which on a model needs it


def own_bos(tokenizer) -> int | None:
    """The BOS id if the tokenizer puts it before every text by itself, else None."""
    bos = tokenizer.bos_token_id
    first = tokenizer("a").input_ids[:1]
    return bos if bos is not None and first == [bos] else None


def forced_bos(tokenizer) -> int:
    """The BOS id for `--bos always`; UserError where the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise UserError("--bos always: the model's tokenizer has no BOS token; use --bos never")
    return tokenizer.bos_token_id


def needs_bos(sweep: Sweep, windows: Tensor, bos: int) -> bool:
    """Whether perplexity on the first of windows (n, tokens) collapses without BOS."""
    bare = windows[:TRIED_WINDOWS, :TRIED_TOKENS].clone()
    begun = torch.cat([bare.new_full((len(bare), 1), bos), bare[:, :-1]], dim=1)
    without, begun = (perplexity(sweep, ids, 1).value for ids in (bare, begun))
    return without > COLLAPSE * begun
