"""The table of flags: what it declares is what the parser, the checks and the README say."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, call

from lib.run.flag import Flag, Span
from lib.run.flags import (
    BEGIN,
    END,
    FLAGS,
    build_parser,
    method_options,
    settings,
    table,
    write_table,
)


def test_the_readmes_table_is_this_one() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    shown = readme.partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table(), "run: python -m lib.run.flags README.md"


def test_the_table_is_put_between_its_marks(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"# Head\n{BEGIN}\n| old |\n{END}\ntail", "utf-8")
    for _ in range(2):
        write_table(file)
        assert file.read_text("utf-8") == f"# Head\n{BEGIN}\n{table()}\n{END}\ntail"


def test_the_table_names_every_flag_once() -> None:
    rows = table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f"--{name}" for name in FLAGS]
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)


def test_the_command_prints_the_table() -> None:
    code = [sys.executable, "-m", "lib.run.flags"]
    shown = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == table()


def test_what_a_flag_names_is_a_flag() -> None:
    for flag in FLAGS.values():
        assert {*flag.needs, *flag.excludes} <= FLAGS.keys(), flag.name


def test_the_parsers_defaults_are_the_tables() -> None:
    args = build_parser().parse_args(["--model", "m"])
    assert vars(args).keys() == FLAGS.keys()
    assert [name for name, flag in FLAGS.items() if flag.is_given(args)] == ["model"]


@pytest.mark.parametrize(
    ("span", "inside", "outside", "text"),
    [
        (Span(1), [1, 10**9], [0, -1], "at least 1"),
        (Span(0, open="least"), [0.1], [0, -1], "above 0"),
        (Span(0, 1), [0, 0.5, 1], [-0.1, 1.1], "from 0 to 1"),
        (Span(0, 1, open="most"), [0, 0.99], [1], "from 0 to below 1"),
        (Span(0, 1, open="least most"), [0.5], [0, 1], "above 0 and below 1"),
    ],
)
def test_spans(span: Span, inside: list[float], outside: list[float], text: str) -> None:
    assert all(value in span for value in inside)
    assert not any(value in span for value in [*outside, float("nan")])
    assert str(span) == text


def test_settings_of_a_run_are_those_of_its_sparsity_type() -> None:
    for kind, has in (("neurons", True), ("unstructured", False), ("2:4", False)):
        args = ["--model", "M", "--prune_method", "wanda", "--sparsity_type", kind]
        found = settings(build_parser().parse_args(args))
        assert ("neurons_multiple" in found) == has and "nsamples" in found


def test_options_of_the_method_are_those_that_are_given() -> None:
    parse = build_parser().parse_args
    assert method_options(parse(["--model", "m"])) == {}
    assert method_options(parse(["--model", "m", "--use_variant"])) == {"variant": True}
    assert method_options(parse(["--model", "m", "--blend", "0"])) == {"blend": 0.0}


# where a run of main.py shows what a flag does: {flag: a test's file and name}
EFFECTS = {
    "model": "run/test_main.py::test_evaluation_alone",
    "cache_dir": "test_launch.py::test_unstructured_prunes_half_on_ubertext",
    "device": "run/test_bad_input.py::test_devices",
    "dtype": "run/test_main.py::test_dtypes",
    "load_bit": "run/test_main.py::test_quantised_models_are_evaluated",
    "seqlen": "run/test_effects.py::test_a_run_without_seqlen_takes_the_models_window_up_to_4096",
    "bos": "run/test_effects.py::test_bos_is_put_before_windows_where_the_model_needs_it",
    "batch_size": "run/test_effects.py::test_larger_batches_need_more_memory",
    "timeout": "distributed/test_failures.py::test_a_stopped_process_ends_the_others",
    "offload": "model/test_offload.py::test_the_same_weights_as_without",
    "trust_remote_code": "run/test_effects.py::test_remote_code_runs_only_where_it_is_trusted",
    "seed": "run/test_main.py::test_another_seed_draws_other_windows",
    "nsamples": "run/test_effects.py::test_as_many_windows_are_drawn_as_are_asked_for",
    "calibration_data": "run/test_published.py::test_masks_and_weights_are_the_published_ones",
    "prune_on_c4": "test_launch.py::test_c4_calibrates_on_english_and_measures_on_ubertext",
    "trim_vocabulary": "vocabulary/test_vocabulary_command.py::test_loads_and_does_the_same",
    "vocabulary_data": "vocabulary/test_vocabulary_command.py::test_by_its_name",
    "vocabulary_size": (
        "vocabulary/test_vocabulary_command.py::test_a_size_is_kept_and_rare_tokens_go"
    ),
    "vocabulary_minimum": (
        "vocabulary/test_vocabulary_command.py::test_a_size_is_kept_and_rare_tokens_go"
    ),
    "keep_reserved_tokens": (
        "vocabulary/test_vocabulary_command.py"
        "::test_reserved_tokens_go_with_their_rows_and_a_flag_keeps_them"
    ),
    "prune_method": "run/test_published.py::test_masks_and_weights_are_the_published_ones",
    "sparsity_ratio": "run/test_effects.py::test_another_share_of_zeros_is_reached_and_costs_more",
    "sparsity_type": "run/test_main.py::test_a_whole_run",
    "neurons_multiple": "run/test_effects.py::test_neurons_left_are_a_multiple",
    "allocation": "pruning/test_owl.py::test_a_run",
    "use_variant": (
        "run/test_effects.py::test_the_variant_gives_rows_shares_of_their_own_and_is_named"
    ),
    "blend": ("run/test_effects.py::test_the_blend_decides_how_much_of_earlier_errors_is_repaired"),
    "replace_sparse_layers": "test_launch.py::test_semistructured_packs_2_of_4",
    "pack_bits": "recover/test_recover_grid.py::test_what_was_measured_is_what_is_saved",
    "rounding": "round/test_round_command.py::test_nearest_is_each_weight_by_itself",
    "pack_embeddings": "run/test_replace.py::test_embedding_and_head_at_eight_bits",
    "recover": "recover/test_recover_command.py::test_what_a_run_says_and_leaves",
    "teacher": "recover/test_recover_command.py::test_a_model_that_was_pruned_before",
    "recover_rank": "recover/test_recover_command.py::test_at_a_low_rank_by_magnitude_and_packed",
    "recover_rate": "run/test_effects.py::test_a_higher_rate_moves_weights_further",
    "recover_ce": "run/test_effects.py::test_the_share_of_cross_entropy_changes_what_is_learned",
    "eval_only": "run/test_main.py::test_evaluation_alone",
    "eval_data": "run/test_main.py::test_several_test_sets",
    "prompts": "run/test_completions.py::test_nothing_else_depends_on_them",
    "abilities": "quality/test_quality_command.py::test_abilities_stand_beside_the_dense_models",
    "pairs": "quality/test_quality_command.py::test_abilities_stand_beside_the_dense_models",
    "fidelity": "quality/test_quality_command.py::test_fidelity_of_both_models_and_of_the_text",
    "depth": "quality/test_depth.py::test_a_run_ends_where_its_evaluation_does",
    "tasks": "run/test_tasks.py::test_numbers_are_recorded",
    "include_path": "run/test_tasks.py::test_a_task_of_ones_own",
    "save": "run/test_main.py::test_another_seed_draws_other_windows",
    "save_model": "run/test_main.py::test_a_fresh_process_loads_what_was_saved",
    "card_without_prompts": (
        "run/test_completions.py::test_a_card_shows_prompts_with_a_warning_and_can_be_had_without"
    ),
    "resume": "run/test_resume.py::test_killed_twice_and_the_same_bytes",
    "resume_anyway": (
        "run/test_resume.py::test_another_version_of_the_program_resumes_only_where_it_is_told_to"
    ),
    "debug": "run/test_bad_input.py::test_debug_shows_the_traceback",
}


def test_every_flag_has_a_test_of_what_it_does() -> None:
    assert EFFECTS.keys() == FLAGS.keys()
    # QUICK, and the recipes, put flags there too
    shared = "".join((ROOT / file).read_text("utf-8") for file in ("tests/support.py", "launch.sh"))
    for name, place in EFFECTS.items():
        file, _, test = place.partition("::")
        source = (ROOT / "tests" / file).read_text("utf-8")
        tree = ast.parse(source)
        found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert test in found, place
        assert f"--{name}" in source + shared, place


SPANNED = [flag for flag in FLAGS.values() if flag.span]


@pytest.mark.parametrize("flag", SPANNED, ids=lambda flag: flag.name)
def test_values_outside_a_span_are_refused_in_one_line(flag: Flag) -> None:
    done = call("--model", "m", f"--{flag.name}", "-1")
    assert done.status == 2
    assert done.complaints[0].endswith(f"--{flag.name} -1: must be {flag.span}")


def test_help_needs_no_module_of_unix_alone(tmp_path: Path) -> None:
    code = "import sys; sys.modules['fcntl'] = None; import main"
    code += "; main.main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--calibration_data" in done.stdout
