"""The command line as a reader of --help meets it."""

from __future__ import annotations

from lib.run.flags import build_parser

PUBLISHED = """
model seed nsamples sparsity_ratio sparsity_type prune_method cache_dir use_variant save save_model
load_bit replace_sparse_layers eval_only prune_on_c4 device
""".split()
GROUPS = """
model, data, pruning, quantization and packing, vocabulary, recovery training, evaluation, output,
execution
"""


def test_help_is_short_and_in_groups() -> None:
    parser = build_parser()
    text = parser.format_help()
    assert text.startswith("usage: main.py --model MODEL [options]\n")
    places = [text.index(f"\n{' '.join(name.split())}:\n") for name in GROUPS.split(",")]
    assert places == sorted(places)
    assert text.count("python main.py --model MODEL") == 3  # examples
    for action in parser._actions:
        about = action.help.partition(" (default: ")[0].replace("%%", "%")
        assert len(about) <= (130 if action.dest in PUBLISHED else 100), action.dest


def test_hyphens_are_as_good_as_underscores() -> None:
    argv = [
        "--model",
        "m-1",
        "--prune-method=wanda",
        "--eval-data",
        "a-b_c",
        "--sparsity_type",
        "2:4",
    ]
    args = build_parser().parse_args(argv)
    assert (args.model, args.prune_method, args.eval_data) == ("m-1", "wanda", ["a-b_c"])
