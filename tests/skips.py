"""The skipped tests by reason, at the end of a run; on CI none may lack what is installed there."""

from __future__ import annotations

import os
from collections import Counter

import pytest

NO_COMPILER = "needs a C++ compiler"
REQUIRED_ON_CI = NO_COMPILER, "needs the package", "the pretended CUDA"  # what .ci/run installs


def reasons(config: pytest.Config) -> Counter[str]:
    """Count the skipped tests by reason."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    given = (
        one.longrepr[2] if isinstance(one.longrepr, tuple) else one.longrepr for one in skipped
    )
    return Counter(str(reason).removeprefix("Skipped: ") for reason in given)


def missing_on_ci(config: pytest.Config) -> list[str]:
    """List the reasons for which tests must not be skipped on CI."""
    on_ci = os.environ.get("CI")
    return [why for why in reasons(config) if on_ci and why.startswith(REQUIRED_ON_CI)]


def print_table(reporter: pytest.TerminalReporter) -> None:
    for why, count in sorted(reasons(reporter.config).items()):
        reporter.write_line(f"{count:4} skipped: {why}")
    for why in missing_on_ci(reporter.config):
        reporter.write_line(f"CI: tests were skipped that must run here: {why}", red=True)
