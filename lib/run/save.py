"""Save the model of a run: a new folder, complete or not at all.

OUT.partial gets weights, tokenizer and, last, the card: a folder with a card is a complete model.
Then it is renamed to OUT. Finished blocks in other folders stay until the results are written. So
the files on disk are always the model, or a run that can be continued.
"""

from __future__ import annotations

import shlex
import shutil
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from ..data.tokenizers import as_loaded
from ..model.blocks import BlockRunner
from ..model.checkpoint import local_only
from ..model.matrix import unread_of
from ..model.processor import copy_processor
from ..model.reference import COMPARED_POSITIONS, some_logits
from ..model.saving import cast, save_in_shards, text_alone
from ..packed.checkpoint import mark_packed_
from ..sparse import check_same_outputs
from ..util import progress
from ..util.cli import typed
from ..util.errors import UserError, first_line
from ..util.files import partial_of, put_in_place, sync_all, temporary_folder, write_text
from ..util.host import gib
from ..vocabulary.tokenizer_model import write_tokenizer_model
from .card import model_card
from .run import Run
from .trimmed import write_list

CARD = "README.md"  # the last file of a model that is saved


def save(run: Run, runner: BlockRunner, cleanup: ExitStack) -> None:
    """Save model and tokenizer as a new folder; blocks in files become its shards."""
    weights, folder, moved = runner.weights, run.folder, {}
    partial, target = partial_of(run.flags.save_model), Path(run.flags.save_model)
    run.dist.barrier()  # no rank reads the files any more
    if run.dist.is_main:
        holds_blocks = bool(folder) and folder.path.resolve() == partial.resolve()
        with run.timed("save"), ExitStack() as failed:
            if not holds_blocks:
                failed.callback(shutil.rmtree, partial, ignore_errors=True)
            _write(run, runner, partial)
            failed.pop_all()
            if holds_blocks:  # the folder is about to become the model
                other = None
                if not weights.resident:  # blocks that are still read stay until the end
                    other = cleanup.enter_context(temporary_folder(target.parent))
                moved = folder.hand_over(other)
                run.folder = None
            try:
                progress.on_step("rename", 0)
                put_in_place(partial, target)
                progress.on_step("rename", 1)
            except OSError as error:
                raise UserError(
                    f"--save_model {target}",
                    first_line(error),
                    f"The complete model is in {partial}",
                ) from error
        run.is_saved = True
        print(f"saved: {target}", flush=True)
    weights.moved(run.dist.all_gather_object(moved)[0])


def _write(run: Run, runner: BlockRunner, folder: Path) -> None:
    """Write the complete model into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()  # left by a run that was killed while saving
    alone = _text_alone(run, runner.model) if run.flags.text_only else None
    try:
        shards = None if alone else runner.weights.shards()
        if not (shards and save_in_shards(runner.model, folder, runner.save_dtype, shards)):
            model = alone or runner.model
            with runner.weights.mapped(), cast(model, runner.save_dtype):
                model.save_pretrained(folder, max_shard_size="5GB")
    except SafetensorError as error:
        raise UserError(
            f"--save_model {run.flags.save_model}", str(error), "Check the disk"
        ) from error
    as_loaded(run.model.tokenizer).save_pretrained(folder)
    progress.on_step("save tokenizer", 0)
    write_tokenizer_model(run.model.tokenizer, folder)
    if not alone and unread_of(runner.model):
        copy_processor(run.model.checkpoint, folder)
    write_list(run.model, folder)
    sync_all(folder)
    sizes = (file.stat().st_size for file in folder.glob("model*.safetensors"))
    run.results |= {"saved_bytes": sum(sizes), "evaluation": []}
    write_card(run, folder)


def _text_alone(run: Run, model: nn.Module) -> nn.Module:
    """Return the text model alone, report what is left out, and check that outputs are the same."""
    alone = text_alone(model, run.model.checkpoint)
    if getattr(model, "hf_quantizer", None):
        mark_packed_(alone)
    window = run.windows.tests[0].ids[:1, :COMPARED_POSITIONS].to(run.device)
    before, after = some_logits(model, window), some_logits(alone, window)
    check_same_outputs(before, after, "--text_only", "whole and text alone", least=1e-5)
    gone = {name: each for name, each in model.state_dict().items() if name in unread_of(model)}
    parts = ", ".join(sorted({".".join(name.split(".")[:2]) for name in gone}))
    size = gib(sum(each.nbytes for each in gone.values()))
    line = f"text only: {parts} are left out, {len(gone)} tensors, {size}"
    results = run.results
    results |= {"notes": [*results.get("notes", []), line], "loaded_by": None}
    run.print(line)
    return alone


def write_card(run: Run, folder: str | Path) -> None:
    """Write the card of the saved model in `folder`, with the figures measured so far."""
    corpora = run.corpora.calibration if run.flags.reads_train else ()
    sources = [*dict.fromkeys(corpus.source.text for corpus in corpora)]
    card = model_card(run.results, sources, online=not local_only(run.model.checkpoint))
    write_text(Path(folder, CARD), card)


def close_folder(run: Run) -> None:
    """Remove the folder of finished blocks, or print how to continue a run that ended early."""
    folder, flags = run.folder, run.flags
    if run.is_saved and not run.is_recorded:
        words = [*typed("prune").split(), "--model", flags.save_model, "--eval_only"]
        words += [
            "--seqlen",
            run.windows.seqlen,
            *["--column", flags.column] * (flags.column != "text"),
        ]
        words += ["--eval_data", *(test.source.text for test in run.corpora.tests)]
        how = shlex.join(map(str, words))
        print(f"{flags.save_model} is complete, but not evaluated. To do that: {how}", flush=True)
    if not folder:
        return
    if run.is_recorded:
        folder.clear()
        return
    folder.close()
    if folder.files():
        how = "the same command continues"
        if not flags.resume:
            how = f"add --resume {folder.path} to continue"
        how += " with another --save_model" * ("saved_bytes" in run.results)
        print(f"finished work is kept: {how}", flush=True)
