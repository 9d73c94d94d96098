"""How a run's model is saved."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from lib.data.tokenizer_model import write_tokenizer_model
from lib.model.blocks import BlockRunner
from lib.model.pretrained import save_in_shards, save_model
from lib.run.job import Job
from lib.util.errors import UserError, first_line
from lib.util.files import partial_of, put_in_place, sync_all


def save(job: Job, runner: BlockRunner, cleanup: ExitStack) -> None:
    """Save model and tokenizer as a new folder; where blocks are in files, these are its shards."""
    weights, moved = runner.weights, {}
    weights.wait_for_readers()
    stage, target = partial_of(job.args.save_model), Path(job.args.save_model)
    if job.dist.is_main:
        holds_blocks = bool(job.store) and job.store.folder.resolve() == stage.resolve()
        stage.mkdir(parents=True, exist_ok=True)
        for file in stage.glob("model*.safetensors*"):
            file.unlink()  # of a run that was killed while it saved
        with job.timed("save"), ExitStack() as failed:
            if not holds_blocks:
                failed.callback(shutil.rmtree, stage, ignore_errors=True)
            try:
                shards = weights.shards()
                names = shards and save_in_shards(runner.model, stage, runner.save_dtype, shards)
                if not names:
                    with weights.mapped():
                        save_model(runner.model, stage, runner.save_dtype)
            except SafetensorError as error:
                raise UserError(f"--save_model {target}: can't be saved ({error})") from error
            job.tokenizer.save_pretrained(stage)
            write_tokenizer_model(job.tokenizer, stage)
            sync_all(stage)
            failed.pop_all()
            moved = {old: str(target / name) for old, name in (names or {}).items()}
            if job.store and (weights.resident or holds_blocks):
                if not (weights.resident or names):  # what is still read stays until the end
                    other = cleanup.enter_context(TemporaryDirectory(dir=target.parent))
                    for file in job.store.files():
                        moved[str(file)] = shutil.move(file, other)
                job.store.clear()
                job.store = None
            try:
                put_in_place(stage, target)
            except OSError as error:
                raise UserError(
                    f"--save_model {target}: {first_line(error)}; the whole model is in {stage}"
                ) from error
            for file in names or ():  # it has another name now
                Path(file).unlink(missing_ok=True)
        weight_files = target.glob("*.safetensors")
        job.results["saved_bytes"] = sum(file.stat().st_size for file in weight_files)
        print(f"saved: {target}", flush=True)
    weights.moved(job.dist.all_gather_object(moved)[0])


def close_store(job: Job) -> None:
    """Remove the folder of finished blocks, or say how to go on where the run ended early."""
    if not job.store:
        return
    if "saved_bytes" in job.results or ("seconds" in job.results and not job.args.save_model):
        job.store.clear()
        return
    job.store.close()
    if job.store.files():
        how = "the same command continues"
        if not job.args.resume:
            how = f"add --resume {job.store.folder} to continue"
        print(f"kept what is finished: {how}", flush=True)
