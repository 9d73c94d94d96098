"""Whether the model's passes on a CPU multiply in bfloat16: where that is faster and as good.

    choose_products(job, loaded, at_end)  # says in the log which way was taken

Weights, activations and gradients stay float32, and so do statistics, solvers, the trained weights
and everything that is added up: operands alone are rounded, inside a product. The processor must
have the instructions, `--dtype auto` must have chosen float32, and both ways must predict text that
nothing is trained on alike. Text is generated in float32: rounding costs more than it saves there.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

from lib.run.job import Job, LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

LEAST_WIDTH = 256  # of the hidden states; in narrower products rounding costs what it saves
TRIED_WINDOWS, TRIED_TOKENS = 2, 512
MOST_CHANGE = 2e-3  # of the mean loss, relatively
MOST_KL = 2e-3  # nats a token, of the predictions by float32 products from those by bfloat16


def choose_products(job: Job, loaded: LoadedModel, at_end: ExitStack) -> None:
    """Switch to bfloat16 products until `at_end` where that is faster and predicts alike."""
    from lib.util.products import bfloat16_products

    if not may_use_bfloat16(job, loaded):
        return
    with job.timed("products"):
        exact, loss = _predictions(loaded, job, rounded=False)
        rounded, rounded_loss = _predictions(loaded, job, rounded=True)
        kl = (exact.exp() * (exact - rounded)).sum(-1).mean().item()
    change = abs(rounded_loss - loss) / loss
    agrees = change <= MOST_CHANGE and kl <= MOST_KL  # not where either is nan
    agrees = all(job.dist.all_gather_object(agrees))
    if job.dist.is_main:
        seen = f"loss {loss:.4f} by float32, {rounded_loss:.4f} by bfloat16, KL {kl:.2g}"
        way = "bfloat16" if agrees else "float32"
        print(f"products: {way} ({seen}); --dtype float32 keeps float32", flush=True)
    if agrees:
        loaded.products = "bfloat16"
        at_end.enter_context(bfloat16_products())


def may_use_bfloat16(job: Job, loaded: LoadedModel) -> bool:
    """Whether it is worth trying: by flags, device, processor and the model's width."""
    import torch

    from lib.model.pretrained import pick_dtype
    from lib.util.products import has_bfloat16

    args = job.args
    plain = args.dtype == "auto" and not args.load_bit and job.device.type == "cpu"
    able = all(job.dist.all_gather_object(plain and has_bfloat16()))
    working = pick_dtype(args.dtype, job.config, job.device)
    width = job.config.get_text_config(decoder=True).hidden_size
    return able and working == torch.float32 and width >= LEAST_WIDTH


def _predictions(loaded: LoadedModel, job: Job, rounded: bool) -> tuple[Tensor, float]:
    """Log-probabilities (windows, positions, vocabulary) late in windows, and the mean loss."""
    import torch

    from lib.eval import COMPARED_POSITIONS
    from lib.util.products import bfloat16_products

    texts = job.texts
    text = texts.training.held_out if texts.training else texts.tests[0].windows
    ids = text[:TRIED_WINDOWS, :TRIED_TOKENS]
    positions = torch.arange(ids.shape[1] - 1)[-COMPARED_POSITIONS:]
    with bfloat16_products() if rounded else nullcontext():
        (states,) = loaded.runner.run_blocks([ids], 1, "cpu")
        logits = [loaded.runner.logits(states, batch)(positions) for batch in states.batches]
    log_p = torch.cat(logits).log_softmax(-1)
    loss = -log_p.gather(-1, ids[:, positions + 1, None]).mean().item()
    return log_p, loss
