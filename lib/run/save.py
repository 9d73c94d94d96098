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

from ..data.tokenizer import as_loaded
from ..data.tokenizer_model import write_tokenizer_model
from ..eval import COMPARED_POSITIONS, some_logits
from ..model.access import local_only
from ..model.blocks import BlockRunner
from ..model.pretrained import cast, save_in_shards, text_alone
from ..model.processor import copy_processor
from ..packed.checkpoint import mark_packed_
from ..sparse import check_same_outputs
from ..util import progress
from ..util.command import typed
from ..util.errors import UserError, first_line
from ..util.files import partial_of, put_in_place, sync_all, temporary_folder, write_text
from ..util.host import gib
from .card import model_card
from .job import Job
from .record import finish_results

CARD = "README.md"  # the last file of a model that is saved


def save(job: Job, runner: BlockRunner, cleanup: ExitStack) -> None:
    """Save model and tokenizer as a new folder; blocks in files become its shards."""
    weights, folder, moved = runner.weights, job.outcome.folder, {}
    stage, target = partial_of(job.args.save_model), Path(job.args.save_model)
    job.dist.barrier()  # no rank reads the files any more
    if job.dist.is_main:
        holds_blocks = bool(folder) and folder.path.resolve() == stage.resolve()
        with job.timed("save"), ExitStack() as failed:
            if not holds_blocks:
                failed.callback(shutil.rmtree, stage, ignore_errors=True)
            _write(job, runner, stage)
            failed.pop_all()
            if holds_blocks:  # the folder is about to become the model
                other = None
                if not weights.resident:  # blocks that are still read stay until the end
                    other = cleanup.enter_context(temporary_folder(target.parent))
                moved = folder.hand_over(other)
                job.outcome.folder = None
            try:
                progress.on_step("rename", 0)
                put_in_place(stage, target)
                progress.on_step("rename", 1)
            except OSError as error:
                raise UserError(
                    f"--save_model {target}: {first_line(error)}. The complete model is in {stage}."
                ) from error
        job.outcome.is_saved = True
        print(f"saved: {target}", flush=True)
    weights.moved(job.dist.all_gather_object(moved)[0])


def _write(job: Job, runner: BlockRunner, stage: Path) -> None:
    """Write the complete model into a folder."""
    stage.mkdir(parents=True, exist_ok=True)
    for file in stage.glob("model*.safetensors*"):
        file.unlink()  # left by a run that was killed while saving
    alone = _text_alone(job, runner.model) if job.args.text_only else None
    try:
        shards = None if alone else runner.weights.shards()
        if not (shards and save_in_shards(runner.model, stage, runner.save_dtype, shards)):
            model = alone or runner.model
            with runner.weights.mapped(), cast(model, runner.save_dtype):
                model.save_pretrained(stage, max_shard_size="5GB")
    except SafetensorError as error:
        raise UserError(f"--save_model {job.args.save_model}: {error}. Check the disk.") from error
    as_loaded(job.tokenizer).save_pretrained(stage)
    progress.on_step("save tokenizer", 0)
    write_tokenizer_model(job.tokenizer, stage)
    if not alone and getattr(runner.model, "unread", None):
        copy_processor(job.checkpoint, stage, job.vocabulary and job.vocabulary.rows)
    sync_all(stage)
    sizes = (file.stat().st_size for file in stage.glob("model*.safetensors"))
    job.outcome.results |= {"saved_bytes": sum(sizes), "evaluation": []}
    finish_results(job, runner)
    write_card(job, stage)


def _text_alone(job: Job, model: nn.Module) -> nn.Module:
    """Return the text model alone, report what is left out, and check that outputs are the same."""
    alone = text_alone(model, job.checkpoint)
    if getattr(model, "hf_quantizer", None):
        mark_packed_(alone)
    window = job.texts.tests[0].ids[:1, :COMPARED_POSITIONS].to(job.device)
    before, after = some_logits(model, window), some_logits(alone, window)
    check_same_outputs(before, after, "--text_only", "whole and text alone", least=1e-5)
    gone = {name: each for name, each in model.state_dict().items() if name in model.unread}
    parts = ", ".join(sorted({".".join(name.split(".")[:2]) for name in gone}))
    size = gib(sum(each.nbytes for each in gone.values()))
    line = f"text only: {parts} are left out, {len(gone)} tensors, {size}"
    results = job.outcome.results
    results |= {"notes": [*results.get("notes", []), line], "loaded_by": None}
    job.print(line)
    return alone


def write_card(job: Job, folder: str | Path) -> None:
    """Write the card of the saved model in `folder`, with the figures measured so far."""
    sources = [source.text for source in job.sources if job.plan.reads_train]
    sources += [each.text for each in job.vocabulary_sources if each.text not in sources]
    card = model_card(job.outcome.results, sources, online=not local_only(job.checkpoint))
    write_text(Path(folder, CARD), card)


def close_store(job: Job) -> None:
    """Remove the folder of finished blocks, or print how to continue a run that ended early."""
    folder, args = job.outcome.folder, job.args
    if job.outcome.is_saved and not job.outcome.is_recorded:
        words = [*typed("prune").split(), "--model", args.save_model, "--eval_only"]
        words += ["--seqlen", job.seqlen, *["--column", args.column] * (args.column != "text")]
        words += ["--eval_data", *(test.text for test in job.tests)]
        how = shlex.join(map(str, words))
        print(f"{args.save_model} is complete, but not evaluated. To do that: {how}", flush=True)
    if not folder:
        return
    if job.outcome.is_recorded:
        folder.clear()
        return
    folder.close()
    if folder.files():
        how = "the same command continues"
        if not args.resume:
            how = f"add --resume {folder.path} to continue"
        how += " with another --save_model" * ("saved_bytes" in job.outcome.results)
        print(f"finished work is kept: {how}", flush=True)
