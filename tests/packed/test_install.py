"""What pip installs: the packed form for any program, and a command for main.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import torch
from support import LIMIT, ROOT, prune_, runner_of
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lib.packed import card_lines
from lib.packed.checkpoint import METHOD
from lib.sparse import swap_linears_

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed a copy of the sources, without a network."""
    if not [*metadata.distributions(name="pip")]:
        pytest.skip("needs pip")
    sources, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("target")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "main.py"):
        shutil.copy2(ROOT / name, sources)
    shutil.copytree(ROOT / "lib", sources / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", target, sources],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


def outside(command: list[str], installed: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run a command that sees what was installed, and not the repository."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT
    )


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.tiny_llama().eval().requires_grad_(False)
    prune_(model)
    swap_linears_(runner_of(model))
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder)
    return folder


@pytest.mark.full
def test_a_packed_checkpoint_loads_as_the_card_says(
    installed: Path, packed_folder: Path, tmp_path: Path
) -> None:
    lines = card_lines(str(packed_folder))
    assert lines[0].startswith("import packed_bitmask")
    code = [
        *lines,
        "import sys, torch",
        "ids = torch.arange(3, 15)[None]",
        "print(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())",
        "assert not any(name.partition('.')[0] in ('lib', 'main') for name in sys.modules)",
        "print(packed_bitmask.__file__)",
        # beside the repository's own package the last one's classes are used
        f"sys.path.append({str(ROOT)!r})",
        "import lib.packed",
        f"again = AutoModelForCausalLM.from_pretrained({str(packed_folder)!r})",
        "assert any(isinstance(m, lib.packed.SparseLinear) for m in again.modules())",
        "assert packed_bitmask.linear.kernels.ready() == lib.packed.linear.kernels.ready()",
        "assert again(ids).logits.equal(model(ids).logits)",
    ]
    done = outside([sys.executable, "-c", "\n".join(code)], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    tokens, file = done.stdout.splitlines()
    model = AutoModelForCausalLM.from_pretrained(packed_folder)
    assert tokens == str(model.generate(IDS, max_new_tokens=6, do_sample=False).tolist())
    assert Path(file).is_relative_to(installed)


def test_without_the_package_loading_fails_and_names_it(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    monkeypatch.setattr("transformers.quantizers.auto.logger.warning", warned.append)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(packed_folder)
    assert "import packed_bitmask" in warned[0]


@pytest.mark.full
def test_what_is_installed(installed: Path, tmp_path: Path) -> None:
    """The command, and two packages with nothing under a name that others use."""
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"bin", "langprune", "packed_bitmask"}
    assert (installed / "packed_bitmask" / "kernels.cpp").is_file()
    assert (installed / "langprune" / "main.py").is_file()
    for file in (ROOT / "lib").rglob("*"):
        if file.suffix not in (".pyc", ".md") and file.is_file():
            assert (installed / "langprune" / file.relative_to(ROOT / "lib")).is_file(), file
    code = "import langprune.main, langprune.prune, langprune.commands.sweep.run, sys\n"
    code += "assert not {'lib', 'main'} & set(sys.modules)"
    done = outside([sys.executable, "-c", code], installed, tmp_path)
    assert done.returncode == 0, done.stderr
    command = str(installed / "bin" / "langprune")
    for argv, word in (
        (["prune", "--help"], "usage: langprune prune "),
        (["gguf", "--help"], "usage: langprune gguf "),
        (["--version"], f"langprune {PROJECT['project']['version']}"),
        ([], "langprune NAME ..."),
    ):
        done = outside([command, *argv], installed, tmp_path)
        assert done.returncode == 0 and word in done.stdout, (argv, done.stderr)
    assert outside([command, "nosuch"], installed, tmp_path).returncode == 2
    tiny.write_model(tmp_path / "model", tiny.tiny_llama())
    tiny.write_texts(tmp_path / "uk", train=30, test=4)
    run = "prune --model model --prune_method wanda --calibration_data uk --nsamples 4 --seqlen 64"
    done = outside([command, *run.split(), "--device", "cpu", "--save", "out"], installed, tmp_path)
    assert done.returncode == 0 and (tmp_path / "out" / "results.json").is_file(), done.stderr


LIBRARY = """
import sys
IMPORT
import langprune
import torch
from transformers import LlamaConfig, LlamaForCausalLM
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4))
result = prune(model, torch.arange(64).repeat(4, 1), method="wanda", sparsity="2:4")
name = "model.layers.0.mlp.up_proj"
assert torch.equal(result.masks[name], model.get_submodule(name).weight == 0)
assert result.sparsity == 0.5 and 0 < result.errors[name] < 1
assert type(langprune.prune) is type(sys) and langprune.prune.prune is prune
assert not {"lib", "main"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    "order",
    [
        "from langprune.prune import prune",
        *(
            pytest.param(f"{first}\nfrom langprune.prune import prune", marks=pytest.mark.full)
            for first in (
                "import langprune.main, langprune.stages.quantize",
                "import langprune\nassert 'torch' not in sys.modules",
            )
        ),
    ],
)
def test_the_call_of_the_library_whatever_was_imported_first(
    order: str, installed: Path, tmp_path: Path
) -> None:
    code = LIBRARY.replace("IMPORT", order)
    done = outside([sys.executable, "-c", code], installed, tmp_path)
    assert done.returncode == 0, done.stderr


def test_requirements_and_version_stand_alike_wherever_they_stand() -> None:
    extra = PROJECT["project"]["optional-dependencies"]["test"]
    listed = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert sorted(listed) == sorted(PROJECT["project"]["dependencies"] + extra)
    # pyarrow and setuptools count their releases, whatever changes in them
    free = [line for line in listed if ",<" not in line]
    assert [line.partition(">=")[0] for line in free] == ["pyarrow", "setuptools"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {PROJECT['project']['version']}\n" in citation
