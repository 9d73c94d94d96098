"""Convert a packed checkpoint to the plain dense one that any engine reads.

python -m lib.commands.unpack IN OUT
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from lib.util.command import add_debug_flag, run
from lib.util.errors import UserError
from lib.util.files import check_new_folder, staged_folder

CARD = "README.md"


def unpack_folder(source: str, target: str) -> None:
    """Write the dense checkpoint of folder `source` to folder `target`, whole or not at all.

    The dense model must fit in host memory. Raises UserError if `source` is not packed or damaged,
    or if `target` exists and is not empty.
    """
    folder, out = Path(source), Path(target)
    if not (folder / "config.json").is_file():
        raise UserError(f"IN {source}: no model folder (it has no config.json)")
    check_new_folder("OUT", target)

    from transformers import AutoConfig, AutoModelForCausalLM

    from lib.packed.checkpoint import METHOD  # this registers the format with transformers
    from lib.util.progress import quiet

    quiet()
    config = AutoConfig.from_pretrained(folder)
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") != METHOD:
        raise UserError(f"IN {source}: not a packed checkpoint, nothing to unpack")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if model.is_quantized:  # without kernels for this processor it is dense already
        model.dequantize()
    with staged_folder(out, "OUT") as stage:
        model.save_pretrained(stage)
        for path in folder.iterdir():  # tokenizer, model card, ...
            if path.is_file() and ".safetensors" not in path.name:
                if not (stage / path.name).exists():
                    shutil.copy2(path, stage / path.name)
        if (stage / CARD).is_file():
            card = (stage / CARD).read_text("utf-8")
            (stage / CARD).write_text(unpacked_card(card, stored["bits"]), "utf-8")


def unpacked_card(card: str, bits: int) -> str:
    """Return a packed model's card whose section on packed weights is one on dense weights."""
    from lib.packed.checkpoint import CARD_HEADING

    rounded = "" if bits == 16 else f"; the others were rounded to {bits}-bit integers"
    section = f"Unpacked from a packed checkpoint: zeros are stored as weights{rounded}."
    heading = re.escape(CARD_HEADING)
    card = re.sub(rf"(?ms)^{heading}\n.*?(?=^#|\Z)", "", card)
    card = re.sub(r"(?m)^(# .*), packed\b", r"\1, unpacked", card)
    return f"{card.rstrip()}\n\n## Weights\n\n{section}\n"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="unpack", description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="IN", help="folder of a packed checkpoint")
    parser.add_argument("target", metavar="OUT", help="new folder for the dense checkpoint")
    add_debug_flag(parser)
    args = parser.parse_args(arguments)
    unpack_folder(args.source, args.target)
    print(f"unpacked: {args.target}")


if __name__ == "__main__":
    sys.exit(run(main))
