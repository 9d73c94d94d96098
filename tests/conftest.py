"""Tests run from the repository root, offline, on one thread and without progress bars."""

import os
import shutil
import sys
from pathlib import Path

# before the first import of torch, transformers or datasets; commands run by tests inherit it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["COLUMNS"] = "80"  # of the terminal, wherever tests are started
os.environ["OMP_NUM_THREADS"] = "1"  # on tensors this small a second thread only waits
os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # as main.py sets it for several ranks

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    sys.path.insert(0, str(folder))

import pytest  # noqa: E402  and not torch, which takes seconds that the controller of workers saves

os.fsync = lambda _: None  # no test cuts the power, and hundreds of runs would wait for the disk
LONGEST = "test_matrix", "test_ranks", "test_install", "test_bare", "test_launch"  # files
REQUIRED_ON_CI = "needs the kernels", "needs the package", "the pretended CUDA"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests on the pretended CUDA device run alone: it can't be removed, and others expect none.

    Files of both have the same names.
    """
    on_it = ROOT / "tests" / "cuda" in collection_path.parents
    asked = config.getoption("markexpr") == "cuda"
    return True if collection_path.suffix == ".py" and on_it != asked else None


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write what is said now into tests/words, to be read and committed"
    parser.addoption("--approve", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "cuda: on the pretended CUDA device, see tests/cuda; run by pytest -m cuda",
        "full: slower than the default suite allows; runs in CI by pytest -m full",
    ):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """No test may be skipped for an untrue reason, nor on CI for what .ci/run installs."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and session.exitstatus == 0:  # workers have none
        skipped = " ".join(str(one.longrepr) for one in reporter.stats.get("skipped", []))
        untrue = ["Install a C++ compiler"] if shutil.which("c++") or shutil.which("g++") else []
        required = [f"Skipped: {why}" for why in REQUIRED_ON_CI if os.environ.get("CI")]
        if wrong := [why for why in (*untrue, *required) if why in skipped]:
            reporter.write_line(f"tests were skipped that must run here: {wrong}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where trained models are kept, until the next session if there is a cache."""
    cache = getattr(request.config, "cache", None)
    return Path(cache.mkdir("models")) if cache else tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def trained(models: Path) -> Path:
    """A model that has learned something, see trained.py."""
    from trained import trained_model

    return trained_model(models)


@pytest.fixture(scope="session")
def needs_bos(models: Path) -> Path:
    """The same, but windows that do not begin with BOS make it predict at random."""
    from trained import trained_model

    return trained_model(models, needs_bos=True)


@pytest.fixture
def words(request: pytest.FixtureRequest) -> object:
    """Compares what is said with what was approved, see approval.py."""
    from approval import Words

    return Words(request.config.getoption("approve"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that reads weights fails the test."""
    monkeypatch.setattr(
        "lib.model.pretrained.load_model", lambda *_, **__: pytest.fail("weights were read")
    )


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed linears are multiplied by torch alone, as where there is no compiler."""
    monkeypatch.setattr("lib.packed.kernels.ready", lambda: False)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of the test's own: defaults such as `--save out`, and caches, end there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def at_place(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder that a module's own fixture `place` fills, with a cache of the test's own."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def runs():
    """A process that runs llama.cpp, file after file; its crash leaves the tests alive."""
    from concurrent.futures import ProcessPoolExecutor

    from processes import forkserver

    with ProcessPoolExecutor(1, forkserver()) as pool:
        yield pool


@pytest.fixture
def quickly(runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter and the reader run here, where torch is imported already."""
    from support import LIMIT

    from lib.commands.gguf import convert
    from lib.gguf import llama
    from lib.gguf import proof as verify
    from lib.util.errors import UserError

    def here(what: str, function, size: float = 0, **arguments):
        try:
            if function.__module__ == llama.__name__:
                return runs.submit(function, **arguments).result(LIMIT)
            return function(**arguments)
        except Exception as error:
            raise UserError(what, str(error), "Please report this") from error

    for caller in (convert, verify):
        monkeypatch.setattr(caller, "run_child", here)
