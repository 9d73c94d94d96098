"""Convert a packed checkpoint to a plain dense one, for engines that cannot read packed weights.

bash launch.sh unpack IN OUT
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..util.cli import make_parser
from ..util.errors import UserError
from ..util.files import check_new_folder, staged_folder


def unpack_folder(source: str, target: str) -> None:
    """Write the dense checkpoint of folder `source` to folder `target`, complete or not at all.

    The dense model must fit in host memory. Raises UserError if `source` is not packed or is
    damaged, or if `target` exists and is not empty.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file():
        problem = "it is not a model folder (no config.json)"
        raise UserError(f"IN {source}", problem, "Name one")
    check_new_folder("OUT", target, staged=True)

    from transformers import AutoConfig

    from ..model.skeleton import auto_class

    # registers the format with transformers
    from ..packed.checkpoint import METHOD
    from ..run.card import unpacked_card
    from ..run.save import CARD
    from ..util.progress import quiet

    quiet()
    config = AutoConfig.from_pretrained(folder)
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") != METHOD:
        raise UserError(f"IN {source}", "it is not packed", "Name a packed checkpoint")
    model = auto_class(config).from_pretrained(folder, dtype="auto")
    if model.is_quantized:  # without kernels for this processor it is already dense
        model.dequantize()
    with staged_folder(target, "OUT") as stage:
        model.save_pretrained(stage)
        for path in folder.iterdir():  # the tokenizer and the card
            is_weights = ".safetensors" in path.name
            if path.is_file() and not is_weights and not (stage / path.name).exists():
                shutil.copy2(path, stage)
        if (card := stage / CARD).is_file():
            text = unpacked_card(card.read_text("utf-8"), Path(target).name)
            card.write_text(text, "utf-8")


def main(argv: list[str]) -> None:
    parser = make_parser("unpack", __doc__)
    parser.add_argument("source", metavar="IN", help="folder of a packed checkpoint")
    parser.add_argument("target", metavar="OUT", help="new folder for the dense checkpoint")
    args = parser.parse_args(argv)
    unpack_folder(args.source, args.target)
    print(f"unpacked: {args.target}")
